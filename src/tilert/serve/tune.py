"""Search on this card for how many units of weights should be under way, and keep what was best.

More of them keep the memory busy, fewer let every other access come back sooner: what is best depends on
the card and on how much of a step is streaming (docs/log.md). The result is kept by card and shapes, and
LLM asks for it when it loads a model.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from tilert.backends.cuda.backend import CudaBackend
from tilert.backends.cuda.runtime import CudaRuntime
from tilert.engine.runner import Runner
from tilert.errors import UserError
from tilert.files import cache_folder, keep, kept
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.machine import Machine
from tilert.ir.program import PAGE

WINDOWS = (2, 3, 4, 6)
STEPS, REPEATS = 64, 5
WARMING = 0.2  # seconds of steps before the first that counts


def path_of(device: str, graph: Graph, dtypes: Mapping[str, DType]) -> Path:
    """Where the result for a card and a model's shapes is kept."""
    key = hashlib.sha256(repr((device, graph.nodes, sorted(dtypes.items()))).encode()).hexdigest()
    return cache_folder() / "tuned" / key[:32]


def tuned(machine: Machine, path: Path) -> Machine:
    """The machine with the window that was found best; as it is when nothing was kept."""
    if (data := kept(path)) is None:
        return machine
    return replace(machine, window=min(json.loads(data)["window"], machine.slots))


def search(
    runner: Runner, path: Path, seconds: float, say: Callable[[str], None]
) -> dict[int, float]:
    """Milliseconds per token by window, the machine's own first; the best is kept under `path`.

    Stops when `seconds` have passed. Raises UserError for another back end than 'cuda'.
    """
    place, machine = runner.place, runner.machine
    if not isinstance(place, CudaRuntime):
        raise UserError(
            "tune is for the back end 'cuda'; give --backend cuda on a machine with a GPU"
        )
    program, found = runner.program("decode"), {}
    began = time.perf_counter()
    windows = [machine.window, *(w for w in WINDOWS if w != machine.window and w <= machine.slots)]
    for window in windows:
        if found and time.perf_counter() - began > seconds:
            break
        changed = replace(program, machine=replace(machine, window=window))
        found[window] = _milliseconds(place.bound(changed))
        say(f"window {window}: {found[window]:.4f} ms per token")
    best = min(found, key=found.__getitem__)
    data = json.dumps({"window": best, "ms": found, "device": place.device.name})
    keep(path, data.encode())
    return found


def _milliseconds(backend: CudaBackend) -> float:
    """Median time per token of launches from the middle of the context on."""
    state = backend.state
    steps = min(STEPS, backend.program.context // 2)
    state["counts"][0] = 1, 1
    state["pages"][0] = range(-(-backend.program.context // PAGE))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < REPEATS:
        state["tokens"][0, 0], state["positions"][0, 0] = 1, backend.program.context // 2
        start = time.perf_counter()
        made = sum(1 for _ in backend.steps(steps))
        if start - began > WARMING:
            times.append((time.perf_counter() - start) / made * 1e3)
    return statistics.median(times)
