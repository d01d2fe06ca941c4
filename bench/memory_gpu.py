"""Which step of a process takes how much of a GPU's memory, in MB, under each of several limits of the stack.

    python bench/memory_gpu.py [--stack-limits 1024,128] [--model NAME] [--context N] [--out FILE]

The steps are those of a process that loads a model, makes tokens and works on prompts: the context, weights
(zeros: the memory is the same) and cache, copies to them, a program's kernel, its tables and first launch,
PyTorch from its import to its first product and attention, prompts of 1,024 tokens, sampled tokens; at last
what could be given back. `step_mb`: what the driver says that the step has taken, of which `known_mb` was
asked for by name. `beyond_mb`: all in use so far but weights and cache, which is what start_gpu.py reports of
a whole process. Behind PyTorch's import each line has what its allocator holds.

--stack-limits: bytes of a thread's stack that a context begins with, a process for each; by default the
driver's own, 1,024, and ours (STACK of device.py). The driver reserves them for all threads that the GPU
could hold, 270,000 of them on an H100, and more when a kernel takes more (`local_size_bytes` of ours). What
PyTorch reads from the environment (PYTORCH_CUDA_ALLOC_CONF, CUBLAS_WORKSPACE_CONFIG, ...) can be set for a
run; the results say what was.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from decode_gpu import (
    MODELS,
    comma_list,
    compiled,
    config_of,
    environment,
    one_sentence,
    result_options,
    shape_alone,
    stored,
)
from start_gpu import used_by_others

from tilert.backends.cuda import open_device
from tilert.backends.cuda.backend import CudaBackend, Memory, cache_shapes
from tilert.backends.cuda.late import give_back
from tilert.backends.cuda.source import Source
from tilert.engine.runner import PROMPT as CHUNK
from tilert.engine.runner import TOKENS
from tilert.ir.dtype import DType
from tilert.ir.program import PAGE, Kind, Program
from tilert.models import load_config
from tilert.models.decoder import build as build_graph

PROMPT, STEPS = 1024, 64
TIMEOUT = 240.0  # seconds of a process
WHOLE = "all of a process"
DRIVERS = 1024  # bytes of a thread's stack that the driver would give
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG",
            "CUBLASLT_WORKSPACE_SIZE", "CUDA_MODULE_LOADING", "CUDA_DEVICE_MAX_CONNECTIONS",
            "TORCH_CUDNN_SDPA_PREFERRED")  # fmt: skip
Note = Callable[..., None]


def mb(size: float) -> float:
    """Bytes as MB, to a tenth."""
    return round(size / 1e6, 1)


class Meter:
    """Prints what each step took since the last one, and keeps the lines."""

    def __init__(self, used: Callable[[], int], before: int) -> None:
        """used: bytes in use on the GPU, by whomever; before: those in use before this process."""
        self.used, self.before, self.last, self.held = used, before, before, 0
        self.lines: list[dict[str, Any]] = []

    def note(self, step: str, known: int = 0, *, held: bool = False, **more: Any) -> None:
        """A step has ended. known: bytes it asked for; held: they are weights or cache."""
        gc.collect()
        used, self.held = self.used(), self.held + known * held
        line = {"step": step, "step_mb": mb(used - self.last), "known_mb": mb(known)}
        line |= {"beyond_mb": mb(used - self.before - self.held), **more, **allocator()}
        self.last = used
        self.lines.append(line)
        print(json.dumps(line), flush=True)


def allocator() -> dict[str, float]:
    """What PyTorch's allocator holds, and held at most since it was last asked; nothing before its use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    found = {"allocated_mb": mb(torch.cuda.memory_allocated()),
             "reserved_mb": mb(torch.cuda.memory_reserved()),
             "peak_mb": mb(torch.cuda.max_memory_allocated())}  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    return found


def used(device: Any) -> int:
    """Bytes in use on this GPU, by whomever."""
    from cuda.bindings import driver  # type: ignore[attr-defined]

    free, total = device.context(driver.cuMemGetInfo)
    return total - free


LIMITS = ("STACK_SIZE", "PRINTF_FIFO_SIZE", "MALLOC_HEAP_SIZE")


def limits(device: Any) -> dict[str, int]:
    """What the context reserves for each thread's stack, for printf and for malloc of kernels, in bytes."""
    from cuda.bindings import driver  # type: ignore[attr-defined]

    which = {name.lower(): getattr(driver.CUlimit, f"CU_LIMIT_{name}") for name in LIMITS}
    return {name: int(device.context(driver.cuCtxGetLimit, w)) for name, w in which.items()}


class Watched(CudaBackend):
    """A back end that tells what its kernel and its tables take."""

    def __init__(self, label: str, note: Note, *arguments: Any) -> None:
        self.label, self._note = label, note
        super().__init__(*arguments)
        sizes = [m.size for m in (self.arena, self.counters, self.outcome, self.inputs)]
        sizes += [m.size for m in (*self.tables.values(), *self.sampling.values())]
        note(f"{label}: tables, arena", sum(sizes), pinned_mb=mb(self.mailbox.nbytes))

    def _load(self, source: Source) -> Any:
        made: Any = super()._load(source)
        found = {name.lower(): made.attribute(name) for name in ("LOCAL_SIZE_BYTES", "NUM_REGS")}
        self._note(f"{self.label}: kernel", **found)
        return made


class Parts:
    """A model of zeros on a device, made step by step."""

    def __init__(self, name: str, context: int, device: Any, meter: Meter) -> None:
        self.name, self.context, self.device, self.meter = name, context, device, meter
        config = load_config(config_of(name))
        self.graph = build_graph(config, context)
        self.dtypes, self.scales = stored(name, self.graph)
        program = self.program("decode")
        meter.note("program")
        self.weights = {
            b.name: device.allocate(b.bytes) for b in program.buffers if b.kind is Kind.WEIGHT
        }
        for memory in self.weights.values():
            memory.clear()
        meter.note("weights", sum(m.size for m in self.weights.values()), held=True)
        self.shapes = cache_shapes(program, context // PAGE)
        self.types = {b.name: b.dtype for b in program.buffers if b.kind is Kind.CACHE}
        self.caches = {
            n: device.allocate(self.types[n].bytes * int(np.prod(s)))
            for n, s in self.shapes.items()
        }
        for memory in self.caches.values():
            memory.clear()
        meter.note("cache", sum(m.size for m in self.caches.values()), held=True)
        largest = max(self.weights.values(), key=lambda m: m.size)
        device.upload([(largest, np.zeros(largest.size, np.uint8))], lambda size: None)
        meter.note("copies of weights")

    def program(self, kind: str) -> Program:
        """As the engine has it."""
        return compiled(
            self.name, self.context, self.device, TOKENS[kind], sampled=kind == "sampled"
        )

    def made(self, kind: str) -> Watched:
        """A program on the device, after a launch of many steps."""
        addresses = [{n: m.address for n, m in ms.items()} for ms in (self.weights, self.caches)]
        backend = Watched(kind, self.meter.note, self.program(kind), *addresses, self.device)
        if kind == "sampled":
            backend.state["controls"][0, 1:3] = (
                1,
                np.float32(1).view(np.int32),
            )  # top_k, temperature
        backend.state["pages"][0] = np.arange(self.context // PAGE)
        self.launch(backend)
        self.meter.note(f"{kind}: launch")
        return backend

    def launch(self, backend: CudaBackend) -> None:
        """Many steps over the first tokens."""
        rows = backend.program.tokens
        backend.state["counts"][0], backend.state["output_rows"][0] = rows, np.arange(rows)
        backend.state["positions"][0] = np.arange(rows)
        for _ in backend.steps(STEPS):
            pass

    def runner(self) -> Any:
        """What computes prompts, over the memory of the device."""
        from tilert.backends.cuda.prompt import over_memory

        tensors: dict[str, tuple[Memory, tuple[int, ...], DType]] = {}
        for buffer in (b for b in self.program("decode").buffers if b.kind is Kind.WEIGHT):
            begin = 0
            for part in buffer.parts:
                array, whole = self.array(part), self.weights[buffer.name]
                own = whole.part(begin, array.nbytes)
                tensors[part] = own, array.shape, DType.of(array)
                begin += array.nbytes
        caches = {n: (m, self.shapes[n], self.types[n]) for n, m in self.caches.items()}
        return over_memory(self.graph, tensors, caches, {})

    def array(self, name: str) -> np.ndarray:
        """A host array of a weight's shape and type."""
        value = self.graph.weights[name]
        assert isinstance(value.rows, int), f"{name} has no fixed shape"
        return shape_alone((value.rows, value.cols), self.dtypes.get(name, DType.F32))


def with_torch(parts: Parts, note: Note) -> Any:
    """PyTorch, one piece of it after another; the runner of prompts."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import sdpa_kernel

    from tilert.backends.cuda.prompt import ATTENTION

    note("import torch")
    place = next(iter(parts.weights.values())).tensor.device
    x = torch.zeros(256, 256, dtype=torch.bfloat16, device=place)
    note("PyTorch's first tensor")
    functional.linear(x, x).float().cpu()
    note("PyTorch's first product")
    heads = x.view(1, 8, 128, 64)
    with sdpa_kernel(ATTENTION):  # cuDNN's would bring libraries that prompts do without
        functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).cpu()
    note("PyTorch's first attention")
    del x, heads
    runner = parts.runner()
    note("runner of prompts")
    runner.warm_up()
    note("runner: warmed up")
    return runner


def prompts(parts: Parts, runner: Any, note: Note) -> None:
    """Prompts as the engine gives them and whole, twice each, and what is given back behind them."""
    pages = list(range(parts.context // PAGE))
    for size in dict.fromkeys((min(CHUNK, PROMPT), PROMPT)):
        label = f"prompt of {PROMPT}, {size} at a time"
        for turn in ("first", "again"):
            for begin in range(0, PROMPT, size):
                last = begin + size == PROMPT
                runner.run([7] * size, begin, pages, [size - 1] if last else []).cpu()
            note(f"{label}, {turn}")
        give_back()
        note(f"{label}: behind it")


def what_could_be_given_back(note: Note) -> None:
    """Of what PyTorch holds behind a prompt."""
    import torch

    torch.cuda.empty_cache()
    note("all of PyTorch's idle blocks given back")
    if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):
        clear()
    torch.cuda.empty_cache()
    note("workspaces of cuBLAS given back")


def measure(name: str, context: int, device: Any, meter: Meter) -> None:
    """All steps in turn, behind the context."""
    parts = Parts(name, context, device, meter)
    decode = parts.made("decode")
    runner = with_torch(parts, meter.note)
    prompts(parts, runner, meter.note)
    sampled = parts.made("sampled")
    for backend in (decode, sampled):
        parts.launch(backend)
    meter.note(WHOLE)
    what_could_be_given_back(meter.note)


def loading() -> str:
    """Whether the driver loads kernels when they are first launched (LAZY) or all at once (EAGER)."""
    from cuda.bindings import driver  # type: ignore[attr-defined]

    error, mode = driver.cuModuleGetLoadingMode()
    return mode.name.rsplit("_", 2)[1] if error == driver.CUresult.CUDA_SUCCESS else "unknown"


def settings() -> Mapping[str, str | None]:
    """What the environment says of PyTorch's memory."""
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def in_process(limit: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of a process whose context begins with such stacks, as it prints them; those that came, where
    it fails or takes too long, and then one of what it failed with."""
    command = [sys.executable, __file__, "--stack-limit", str(limit), "--model", args.model]
    child = subprocess.Popen(
        [*command, "--context", str(args.context)], stdout=subprocess.PIPE, text=True
    )
    timer = threading.Timer(TIMEOUT, child.kill)
    timer.start()
    assert child.stdout is not None, "it was asked for"
    lines: list[dict[str, Any]] = []
    for text in child.stdout:
        print(f"stack {limit}: {text.strip()}", flush=True)
        if text.startswith("{"):  # not what a library says
            lines.append(json.loads(text))
    code = child.wait()
    timer.cancel()
    return lines + [{"step": "failed", "code": code}] * bool(code)


def alone(args: argparse.Namespace) -> None:
    """The lines of this process, printed. Raises UserError without a GPU."""
    from tilert.backends.cuda import device as module

    before = used_by_others()
    module.STACK = args.stack_limit
    device = open_device()
    if device.torch is not None:
        device.torch.get()  # a thread loads PyTorch's libraries, whose kernels then are known
    meter = Meter(partial(used, device), before)
    meter.note("context", limits=limits(device), before_mb=mb(before))
    measure(args.model, args.context, device, meter)


def side_by_side(found: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """What each step took under each limit; below, all of a process beyond weights and cache."""
    steps = dict.fromkeys(line["step"] for lines in found.values() for line in lines)
    by_step = [{line["step"]: line for line in lines} for lines in found.values()]
    rows = [("MB of the step", [f"stack {limit}" for limit in found])]
    for step in steps:
        rows.append((step, [str(own.get(step, {}).get("step_mb", "")) for own in by_step]))
    whole = [str(own.get(WHOLE, {}).get("beyond_mb", "")) for own in by_step]
    rows.append((f"{WHOLE}, beyond weights and cache", whole))
    return "\n".join(f"{name:<52}" + "".join(f"{c:>14}" for c in cells) for name, cells in rows)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dense = [name for name, config in MODELS.items() if "num_experts" not in config]
    parser.add_argument("--stack-limits", type=comma_list, default=[], help="bytes, with commas")
    parser.add_argument("--model", default="Llama-3.2-1B", choices=dense)
    parser.add_argument("--context", type=int, default=2048, help="positions of the cache")
    result_options(parser)
    parser.add_argument("--stack-limit", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.context < PROMPT or args.context % PAGE:
        parser.error(f"--context accepts multiples of {PAGE} from {PROMPT} on")
    if not all(limit.isdecimal() for limit in args.stack_limits):
        parser.error("--stack-limits accepts numbers of bytes, with commas")
    return args


@one_sentence
def main() -> int:
    """Print a line for each step and write them as JSON; 2 without a GPU, 1 when a process has failed."""
    args = arguments()
    if args.stack_limit is not None:
        alone(args)
        return 0
    device = open_device()
    from tilert.backends.cuda.device import STACK

    result: dict[str, Any] = {
        **environment(device, "memory_gpu.py", args.commit), "model": args.model,
        "context": args.context, "settings": settings(), "loading": loading(), "stack_limits": {},
    }  # fmt: skip
    for limit in dict.fromkeys(map(int, args.stack_limits or (DRIVERS, STACK))):
        result["stack_limits"][limit] = in_process(limit, args)
        if args.out:  # a run that is cut short leaves these
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(side_by_side(result["stack_limits"]))
    return int(any(lines[-1]["step"] == "failed" for lines in result["stack_limits"].values()))


if __name__ == "__main__":
    sys.exit(main())
