"""Time per output token on one GPU, beside the rate at which its memory can be read, and peers.

    make bench-gpu        or, for a part: python bench/decode_gpu.py --models Llama-3.2-1B --inputs 32,1024

Random weights at true shapes (what they are changes no time; that the numbers are right is shown by
tests/test_cuda_shapes.py), batch 1, greedy, no speculation. 128 tokens after 32, 1024, ... others; the
first comes with the prompt, the other 127 are timed, from the launch to the last token on the host, by
the host's clock. A prompt of up to 1024 tokens is run, in chunks as the engine does; before a longer
one, and behind all of them, the cache holds random values. Each figure is the median over processes of
the medians of their repeats.

`ceiling`: what this GPU reads, measured in the same run (gpu_ceiling.py). `share`: the time in which the
weights and the cache could be read at that rate, over the time taken.

--rows: steps over several tokens of one sequence (verification of drafts), many in one launch as well;
--trace: with the stamps of every run being taken.

Peers, with --peers: `transformers` (compiled whole) and `eager`, with the same shapes and protocol, and
`chain`, tilert's own tiles as one kernel per op in a CUDA graph; one process for each input. With
--gpt-fast and --megakernels, a checkout of theirs, once for each model (gpu_peers.py, gpu_chain.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from functools import cache, partial, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_ceiling
import gpu_peers
import numpy as np
from gpu_chain import FIRST, time_chain
from gpu_peers import NotMeasured, output_of

from tilert.backends.cuda import open_device
from tilert.backends.cuda.backend import CudaBackend
from tilert.backends.cuda.runtime import CudaRuntime, GpuDevice, Pieces
from tilert.compiler import Limits
from tilert.compiler.units import with_units
from tilert.engine.programs import program_for
from tilert.engine.runner import TOKENS
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.machine import Machine
from tilert.ir.program import PAGE, Kind, Program, Scale
from tilert.models import load_config
from tilert.models.decoder import build as build_graph
from tilert.models.derived import ROPE_TABLE
from tilert.models.quantization import grid
from tilert.models.rotary import rotary_table
from tilert.ops import ExpertDown, ExpertGate
from tilert.serve.shipped import shipped

STEPS, LONGEST_PROMPT, BLOCK = 127, 1024, (128, 128)
OURS_TIMEOUT = 300.0  # seconds of one process
RESULTS = Path(__file__).parent / "results"
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "max_position_embeddings": 40960, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "head_dim": 64, "tie_word_embeddings": True,
                     "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}},
    "Llama-3.1-8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336,
                     "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False,
                     "rope_scaling": {**LLAMA3_ROPE, "factor": 8.0}},
    "Qwen3-0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16},
    "Qwen3-1.7B": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                   "num_attention_heads": 16},
    "Qwen3-4B": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32},
    "Qwen3-8B": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": False},
    "Qwen3-30B-A3B": {**QWEN3, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
                      "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
                      "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                      "norm_topk_prob": True, "tie_word_embeddings": False},
}  # fmt: skip
FP8 = "-FP8"  # behind a model's name: linear layers in e4m3 with a scale for each 128 x 128 block
PEERS = ("transformers", "eager", "chain")


def one_sentence(main: Callable[[], int]) -> Callable[[], int]:
    """`main` of a benchmark; where there is no GPU, or not what it needs, it says so and gives 2."""

    @wraps(main)
    def told() -> int:
        try:
            return main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return told


def result_options(parser: argparse.ArgumentParser, out: Path | None = None) -> None:
    """The flags of every benchmark for its results. out: the file, unless another is named."""
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    parser.add_argument("--out", type=Path, default=out, help="file of the results")


def known() -> list[str]:
    """The names of models, with and without FP8."""
    return [*MODELS, *(f"{name}{FP8}" for name in MODELS)]


def config_of(name: str) -> dict[str, Any]:
    """The Hugging Face configuration of a model's name, with or without FP8 behind it."""
    return MODELS[name.removesuffix(FP8)]


def stored(name: str, graph: Graph) -> tuple[dict[str, DType], dict[str, Scale]]:
    """Types of the weights of a model, and where the scales of those in FP8 are."""
    dtypes = {n: DType.BF16 for n in graph.weights if n != ROPE_TABLE}
    linear = [n for n in dtypes if n.endswith("_proj.weight")] if name.endswith(FP8) else []
    scales = {n: Scale(f"{n}_scale_inv", BLOCK) for n in linear}
    return dtypes | dict.fromkeys(linear, DType.F8E4M3), scales


def compiled(
    name: str, context: int, device: Any, tokens: int = 1, *, sampled: bool = False
) -> Program:
    """A model's program of so many tokens for that many positions; compiled once, then kept on disk."""
    graph, limits = (
        build_graph(load_config(config_of(name)), context),
        Limits(tokens, tokens, 1, context, sampled),
    )
    dtypes, scales = stored(name, graph)
    machine = machine_of(name, graph, device)
    return program_for(graph, machine, limits, dtypes, scales)


def machine_of(name: str, graph: Graph, device: Any) -> Machine:
    """The machine that LLM compiles a model for on a card where nothing was tuned."""
    dtypes, scales = stored(name, graph)
    machine = with_units(graph, device.machine, dtypes, scales)
    return replace(machine, **shipped(device.name, stored_bytes(name, graph)))


def stored_bytes(name: str, graph: Graph) -> int:
    """Bytes of all weights, without their scales."""
    dtypes, _ = stored(name, graph)
    shapes = {n: v.rows * v.cols for n, v in graph.weights.items() if isinstance(v.rows, int)}
    return sum(shapes[n] * dtype.bytes for n, dtype in dtypes.items())


def capacity(inputs: Sequence[int]) -> int:
    """Positions, in whole pages, that the longest input and its output need."""
    return -(-(max(inputs) + STEPS + 1) // PAGE) * PAGE


def step_bytes(name: str, program: Program, past: float) -> float:
    """Bytes of weights that a step reads, of experts those that it chooses, and of the cache with `past`
    positions."""
    config = load_config(config_of(name))
    shares: dict[int, float] = {}  # of buffers of which not all is read
    for op in program.ops:
        if isinstance(op, ExpertGate | ExpertDown):
            for b in (b for b in program.operands(op) if b.bank > 1):
                share = op.top_k / b.bank
                shares |= {program.buffer_ids[b.name]: share, b.scale: share}
    weights = sum(
        b.bytes * shares.get(i, 1.0) for i, b in enumerate(program.buffers)
        if b.kind is Kind.WEIGHT and b.name != ROPE_TABLE
        and (config.tie_word_embeddings or "embed_tokens" not in b.name)
    )  # fmt: skip
    width = config.num_key_value_heads * config.head_dim
    return weights + past * config.num_hidden_layers * 2 * 2 * width


def fill(memory: Any, rows: int, cols: int, dtype: DType) -> None:
    """Random values, made where they are needed: [rows, cols] of a weight or of its scales (f32)."""
    import torch

    values = torch.randn(rows, cols, device=memory.tensor.device)
    if dtype is DType.F32:
        typed = torch.full_like(values, 1 / 400)
    elif dtype is DType.F8E4M3:
        typed = (values * 400 * cols**-0.5).clamp(-440, 440).to(torch.float8_e4m3fn)
    else:
        typed = (1 + 0.1 * values if rows == 1 else values * cols**-0.5).bfloat16()
    memory.tensor.copy_(typed.view(torch.uint8).view(-1))


def fill_cache(memory: Any) -> None:
    """Random keys or values for all positions."""
    import torch

    memory.tensor.view(torch.bfloat16).normal_(0, 0.5)


def shape_alone(shape: tuple[int, int], dtype: DType) -> np.ndarray:
    """An array of that shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype.numpy), shape)


class RandomModel(CudaRuntime):
    """A model of random weights and an all random cache; the host holds their shapes alone."""

    def __init__(self, name: str, context: int, device: GpuDevice) -> None:
        config = load_config(config_of(name))
        graph = build_graph(config, context)
        dtypes, scales = stored(name, graph)
        shapes = {n: (v.rows, v.cols) for n, v in graph.weights.items() if isinstance(v.rows, int)}
        arrays = {n: shape_alone(shapes[n], dtype) for n, dtype in dtypes.items()}
        for n, scale in scales.items():
            arrays[scale.name] = shape_alone(grid(shapes[n], scale.block), DType.F32)
        arrays[ROPE_TABLE] = np.concatenate(rotary_table(config, context), axis=1)
        super().__init__(device, graph, arrays, context // PAGE)

        @cache
        def program(kind: str) -> Program:
            return compiled(name, context, device, TOKENS[kind] if kind != "prompt" else 1)

        self.program = program
        decode = self.backend("decode", program)
        assert isinstance(decode, CudaBackend)
        self.decode, self.vocab = decode, config.vocab_size
        self.prompt = self.backend("prompt", program)
        if self._prompts is not None:
            self._prompts.wait()  # nothing else is under way while times are taken
        for memory in self.caches.values():
            fill_cache(memory)
        self.decode.state["counts"][0] = 1, 1
        for each in (self.decode, self.prompt):
            each.state["pages"][0] = np.arange(self.num_pages)

    def _load(self, program: Program) -> None:
        """Random bytes instead of those of `arrays`, laid out as the program's buffers are."""
        for buffer in (b for b in program.buffers if b.kind is Kind.WEIGHT):
            memory, begin = self.device.allocate(buffer.bytes), 0
            self.weights[buffer.name] = memory
            for part in buffer.parts:
                array = self.arrays[part]
                self.tensors[part] = memory.part(begin, array.nbytes)
                begin += array.nbytes
                if part == ROPE_TABLE:
                    self.tensors[part].write(array)
                else:
                    rows, cols = array.shape
                    fill(self.tensors[part], rows, cols, DType.of(array))

    def first_token(self, ids: Sequence[int]) -> int:
        """The greedy token after a prompt, whose keys and values go into the cache."""
        state, sampled = self.prompt.state, np.zeros(1, np.int32)
        chunk = state["tokens"].shape[1]
        for begin in range(0, len(ids), chunk):
            part = ids[begin : begin + chunk]
            state["tokens"][0, : len(part)] = part
            state["positions"][0, : len(part)] = np.arange(begin, begin + len(part))
            state["output_rows"][0, 0] = len(part) - 1
            state["counts"][0] = len(part), begin + len(part) == len(ids)
            (sampled,) = self.prompt.steps(1)
        return int(sampled[0])

    def tokens(self, first: int, position: int, count: int) -> list[int]:
        """`count` greedy tokens after the token `first` at `position`."""
        state = self.decode.state
        state["tokens"][0, 0], state["positions"][0, 0] = first, position
        return [int(token[0]) for token in self.decode.steps(count)]

    def of_rows(self, rows: int) -> CudaBackend | None:
        """What runs steps over so many tokens; None when the device has no program for them."""
        kind = next((k for k, tokens in TOKENS.items() if tokens == rows and "few" in k), None)
        if kind is None or rows > self.step_rows(self.program):
            return None
        backend = self.backend(kind, self.program)
        assert isinstance(backend, Pieces)
        return backend.made

    def steps_of(self, rows: int, position: int, count: int) -> list[int] | None:
        """One greedy token of each of `count` steps over `rows` consecutive tokens, the first of them at
        `position`, in one launch; None when the device has no program for so many."""
        if (made := self.of_rows(rows)) is None:
            return None
        state = made.state
        state["counts"][0], state["output_rows"][0] = rows, np.arange(rows)
        state["tokens"][0], state["positions"][0] = FIRST, position + np.arange(rows)
        state["pages"][0] = np.arange(self.num_pages)
        return [int(tokens[0]) for tokens in made.steps(count)]


def repeated(
    model: RandomModel, repeats: int, steps: Callable[[], list[int] | None]
) -> list[float]:
    """Milliseconds per step of `repeats` launches after one to warm up; none when there are no steps."""
    found: list[float] = []
    for _ in range(repeats + 1):
        model.decode.arena.read(0, 1, np.uint8)  # the device has nothing else to do
        begin = time.perf_counter()
        if (made := steps()) is None:
            return []
        found.append((time.perf_counter() - begin) / len(made) * 1e3)
    return found[1:]


def time_steps(
    model: RandomModel, before: int, rows: Sequence[int], repeats: int, *, trace: bool
) -> dict[str, list[float]]:
    """Milliseconds per step over several tokens, by their number, and with the trace on."""
    found = {
        f"rows_{n}_ms": repeated(model, repeats, partial(model.steps_of, n, before, STEPS))
        for n in rows
    }
    if trace:
        model.decode.trace(True)
        found["trace_ms"] = repeated(model, repeats, partial(model.tokens, FIRST, before, STEPS))
        model.decode.trace(False)
    return found


def time_ours(
    name: str, inputs: Sequence[int], repeats: int, device: GpuDevice, rows: Sequence[int] = (),
    *, trace: bool = False,
) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """By input: milliseconds of the repeats, `token_ms` and `first_token_ms` (none: not run), and those
    of time_steps."""
    model = RandomModel(name, capacity(inputs), device)
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, list[float]]] = {}
    for before in inputs:
        ids = rng.integers(0, model.vocab, before).tolist()
        samples: dict[str, list[float]] = {"token_ms": [], "first_token_ms": []}
        for repeat in range(repeats + 1):
            first, prompt_ms = FIRST, None
            model.decode.arena.read(0, 1, np.uint8)  # the device has nothing else to do
            marks = [time.perf_counter()]
            if before <= LONGEST_PROMPT:
                first = model.first_token(ids)
                prompt_ms = (time.perf_counter() - marks[0]) * 1e3
            marks = [time.perf_counter()]
            made = model.tokens(first, before, STEPS)
            marks.append(time.perf_counter())
            assert len(made) == STEPS, f"{len(made)} tokens instead of {STEPS}"
            if repeat:  # the first is the warm-up
                samples["token_ms"].append((marks[1] - marks[0]) / STEPS * 1e3)
                samples["first_token_ms"] += [] if prompt_ms is None else [prompt_ms]
        found[str(before)] = samples | time_steps(model, before, rows, repeats, trace=trace)
    return found


def summary(samples: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of the repeats of each process: the median over their medians, the extremes, the medians."""
    medians = [statistics.median(each) for each in samples]
    return {
        "ms": statistics.median(medians), "min": min(map(min, samples)),
        "max": max(map(max, samples)), "processes": medians,
    }  # fmt: skip


def row_of(
    name: str, before: int, found: Sequence[dict[str, list[float]]], moved: float, ceiling: float
) -> dict[str, Any]:
    """A row of the table from the processes' samples; moved: bytes of a step, ceiling: bytes/s."""
    token = summary([each["token_ms"] for each in found])
    ms = token.pop("ms")
    first = [each["first_token_ms"] for each in found if each["first_token_ms"]]
    others = {
        name.removesuffix("_ms"): summary([each[name] for each in found])
        for name, samples in found[0].items()
        if name.startswith(("rows_", "trace")) and samples
    }
    for other in others.values():
        other["ratio"] = other["ms"] / ms
    return {
        "model": name, "input": before, "ms_per_token": ms, **token, "bytes": moved,
        "share": moved / ceiling / ms * 1e3,
        "first_token_ms": summary(first)["ms"] if first else None, "steps": others, "peers": {},
    }  # fmt: skip


def add_peer(row: dict[str, Any], peer: str, measured: dict[str, Any]) -> None:
    """A peer's figures into a row, with the ratio of its time to ours."""
    row["peers"][peer] = {**measured, "ratio": measured["token_ms"] / row["ms_per_token"]}


def in_child(arguments: Sequence[str], timeout: float) -> Any:
    """What this script, called again, prints as its last line; NotMeasured when it does not."""
    text = output_of([sys.executable, __file__, *arguments], timeout)
    return json.loads(text.splitlines()[-1])


def attempt(what: str, measure: Callable[[], Any]) -> Any:
    """What `measure` returns; None, and a sentence for the user, when there is nothing."""
    try:
        return measure()
    except NotMeasured as error:
        print(f"{what}: {error}", file=sys.stderr, flush=True)
        return None


def rows_of(
    name: str, args: argparse.Namespace, device: GpuDevice, ceiling: float
) -> Iterator[dict[str, Any]]:
    """The table's rows of one model. Peers are asked behind each, and then stand in it, too."""
    program = compiled(name, capacity(args.inputs), device)
    common = ["--inputs", ",".join(map(str, args.inputs)), "--repeats", str(args.repeats)]
    common += ["--rows", ",".join(map(str, args.rows))] if args.rows else []
    common += ["--trace"] * args.trace
    tries = [
        attempt(name, lambda: in_child(["--child", "--models", name, *common], OURS_TIMEOUT))
        for _ in range(args.processes)
    ]
    found = [each for each in tries if each is not None]
    for place, before in enumerate(args.inputs if found else ()):
        moved = step_bytes(name, program, before + STEPS / 2)
        row = row_of(name, before, [each[str(before)] for each in found], moved, ceiling)
        yield row
        ask_peers(row, args, first=place == 0)
        print(line_of(row), flush=True)


def ask_peers(row: dict[str, Any], args: argparse.Namespace, *, first: bool) -> None:
    """The figures of the peers; with FP8 weights in blocks only the chain is the same model."""
    name, before = row["model"], row["input"]
    fp8 = name.endswith(FP8)
    for peer in (p for p in args.peers if p == "chain" or not fp8):
        asked = f"--peer {peer} --models {name} --inputs {before} --repeats {args.repeats}".split()
        made = attempt(f"{peer}, {name}", lambda asked=asked: in_child(asked, args.peer_timeout))
        if made:
            medians = {n: statistics.median(ms) for n, ms in made.items()}
            add_peer(row, peer, {**medians, "samples": made})
    for peer, checkout, measure in (
        ("gpt-fast", args.gpt_fast, gpu_peers.time_gpt_fast),
        ("megakernels", args.megakernels, gpu_peers.time_megakernels),
    ):
        if checkout and first and not fp8:  # by their own protocol, which has one short prompt
            given = checkout.absolute(), name, STEPS + 1, args.peer_timeout
            ms = attempt(f"{peer}, {name}", lambda run=measure, given=given: run(*given))
            if ms:
                add_peer(row, peer, {"token_ms": ms})


def line_of(row: dict[str, Any]) -> str:
    """One line of the table."""
    first, peers, steps = row["first_token_ms"], row["peers"].items(), row["steps"].items()
    return (
        f"{row['model']:<14} after {row['input']:>6} | {row['ms_per_token']:7.4f} ms/token"
        f" ({row['min']:.4f} to {row['max']:.4f}) | {row['share']:6.1%} of the ceiling"
        + (f" | first token {first:.1f} ms" if first else "")
        + "".join(f" | {n.replace('_', ' ')} {s['ms']:.4f} ms, x{s['ratio']:.3f}" for n, s in steps)
        + "".join(f" | {n} {p['token_ms']:.3f} ms, ratio {p['ratio']:.2f}" for n, p in peers)
    )


def spoken(command: Sequence[str]) -> str:
    """What a small command prints; nothing when there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(device: GpuDevice, script: str, commit: str | None) -> dict[str, Any]:
    """Where and with what the figures were made."""
    import torch

    try:
        peer = version("transformers")
    except PackageNotFoundError:
        peer = None
    chosen = sys.argv[1:]
    for option in ("--commit", "--out"):  # they say nothing of what was measured
        if option in chosen:
            del chosen[chosen.index(option) : chosen.index(option) + 2]
    return {
        "device": device.name, "workers": device.machine.workers_per_device,
        "driver": spoken(["nvidia-smi", "-i", "0", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "cuda": torch.version.cuda, "torch": torch.__version__, "transformers": peer,
        "python": platform.python_version(),
        "commit": commit or spoken(["git", "rev-parse", "--short", "HEAD"]),
        "date": date.today().isoformat(), "command": " ".join([f"python bench/{script}", *chosen]),
    }  # fmt: skip


def results_file(device_name: str, kind: str = "decode-gpu") -> Path:
    """Where the results of a device are kept: 'NVIDIA H200' is h200."""
    words = re.sub("[^a-z0-9]+", "-", device_name.lower().replace("nvidia", "")).strip("-")
    return RESULTS / f"{kind}-{words}.json"


def comma_list(text: str) -> list[str]:
    """The parts of an argument."""
    return [part for part in text.split(",") if part]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=comma_list, default=[*MODELS, f"Qwen3-8B{FP8}"],
                        help=f"names, with commas; {FP8} behind one: FP8 weights in blocks")  # fmt: skip
    parser.add_argument("--inputs", type=lambda text: [int(n) for n in comma_list(text)],
                        default=[32, 1024, 8192, 32768], help="tokens before, with commas")  # fmt: skip
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="in each process")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in comma_list(text)], default=[],
                        help="of 2,4,8: also steps over so many tokens")  # fmt: skip
    parser.add_argument("--trace", action="store_true", help="also with the trace on")
    parser.add_argument("--peers", type=comma_list, nargs="?", default=[], const=[*PEERS],
                        help=f"alone: all of {','.join(PEERS)}")  # fmt: skip
    parser.add_argument("--peer-timeout", type=float, default=300.0, help="seconds for each")
    parser.add_argument("--gpt-fast", type=Path, help="a checkout with converted weights")
    parser.add_argument("--megakernels", type=Path, help="a checkout with its kernel built")
    result_options(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for what, given, accepted in (("model", args.models, known()), ("peer", args.peers, [*PEERS])):
        if unknown := [name for name in given if name not in accepted]:
            parser.error(f"{what} '{unknown[0]}' is not known; accepted are {', '.join(accepted)}")
    longest = min(config_of(name)["max_position_embeddings"] for name in args.models) - STEPS - 1
    if not args.inputs or not 1 <= min(args.inputs) <= max(args.inputs) <= longest:
        parser.error(f"--inputs accepts numbers from 1 to {longest} for these models")
    if unknown := [n for n in args.rows if n not in (2, 4, 8)]:
        parser.error(f"--rows accepts 2, 4 and 8, not {unknown[0]}")
    if args.processes < 1 or args.repeats < 1:
        parser.error("--processes and --repeats accept 1 and more")
    return args


def time_peer(peer: str, name: str, before: int, repeats: int, device: Any) -> dict[str, Any]:
    """Milliseconds of the repeats: `token_ms`, and what else the peer measures."""
    if peer == "chain":
        model = RandomModel(name, capacity([before]), device)
        return {"token_ms": time_chain(model.decode, before, STEPS, repeats)}
    return gpu_peers.time_transformers(
        config_of(name), before, STEPS, repeats, compiled=peer == "transformers"
    )


@one_sentence
def main() -> int:
    """Print the table and write it as JSON; 2 without a GPU."""
    args = arguments()
    device = open_device()
    if args.child:
        asked = args.models[0], args.inputs, args.repeats, device, args.rows
        print(json.dumps(time_ours(*asked, trace=args.trace)))
    elif args.peer:
        asked = args.peer, args.models[0], args.inputs[0], args.repeats
        print(json.dumps(time_peer(*asked, device)))
    else:
        run(args, device)
    return 0


def run(args: argparse.Namespace, device: GpuDevice) -> None:
    """The whole benchmark, in processes of its own."""
    import torch

    ceilings = gpu_ceiling.measure(device)
    ceiling = max(ceilings.values())
    torch.cuda.empty_cache()  # for the processes
    listed = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceilings.items())
    print(f"{device.name}: ceiling {ceiling / 1e9:.0f} GB/s ({listed})", flush=True)
    protocol = {
        "timed_tokens": STEPS, "processes": args.processes, "repeats": args.repeats,
        "longest_prompt_that_is_run": LONGEST_PROMPT,
    }  # fmt: skip
    result = {
        **environment(device, "decode_gpu.py", args.commit), "protocol": protocol,
        "ceiling": ceiling, "ceilings": ceilings, "rows": [],
    }  # fmt: skip
    out = args.out or results_file(device.name)
    out.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:  # a run that is cut short leaves what it has
        out.write_text(json.dumps(result, indent=1) + "\n")

    for name in args.models:
        for row in rows_of(name, args, device, ceiling):
            result["rows"].append(row)
            keep()
        keep()


if __name__ == "__main__":
    sys.exit(main())
