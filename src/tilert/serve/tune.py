"""Search on this card for the settings under which a model's token takes least, and keep the best.

Five fields of the machine are searched, one after another (coordinate descent), by what they promise:

    window      units under way: more keep the memory busy, fewer let every other access come back sooner
    unit        slots x slot_bytes of the ring: how many whole rows arrive at once
    splits      workers that share a kv head's past positions, against what it takes to merge them
    even        each op dealt out for itself, or a whole step
    window      again, where another unit was better

A window or another dealing computes the same bits. Units and splits change the order of sums: a tuned
program rounds differently, as another card does. The result is kept by card and shapes, and LLM asks for
it when it loads a model, for all programs; without one, what was measured before counts (shipped.py).
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tilert.backends.cuda.backend import CudaBackend
from tilert.backends.cuda.limits import MIN_SLOTS
from tilert.backends.cuda.runtime import CudaRuntime
from tilert.compiler.units import bytes_in_tiles, cache_unit
from tilert.engine.runner import Runner
from tilert.errors import UserError
from tilert.files import cache_folder, keep, kept
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.machine import Machine
from tilert.ir.program import PAGE, Program
from tilert.models.derived import ROPE_TABLE
from tilert.ops import Attend, LatentAttention
from tilert.serve.shipped import shipped

FIELDS = ("window", "slots", "slot_bytes", "splits", "even")  # of the machine, as they are kept
FLIGHT = (32 << 10, 48 << 10, 64 << 10, 96 << 10)  # bytes under way that are tried as windows
UNITS = (8 << 10, 20 << 10, 24 << 10, 32 << 10)  # bytes of a slot that are tried, beside the card's
GAIN = 0.003  # share of the time that another setting must save: less is noise
ROUNDING = (
    0.1  # of the largest logit: more than other orders of sums change, less than a fault does
)
PAST = 512  # positions with keys and values before the middle of the context, a page for each of 8 splits
STEPS, REPEATS = 64, 5
WARMING = 0.2  # seconds of steps before the first that counts


def path_of(device: str, graph: Graph, dtypes: Mapping[str, DType]) -> Path:
    """Where the result for a card and a model's shapes is kept, whatever its context."""
    shapes = [(w.name, w.rows, w.cols) for w in graph.weights.values() if w.name != ROPE_TABLE]
    parts = device, str(graph), sorted(shapes), sorted(dtypes.items())
    return cache_folder() / "tuned" / hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def tuned(machine: Machine, card: str, size: int, path: Path) -> Machine:
    """The machine for a model of `size` bytes on a card, with what was found best, here or before.

    As it is when nothing was, or when what is kept is not for such a machine.
    """
    return _changed(machine, _kept(path)) or _changed(machine, shipped(card, size)) or machine


def _kept(path: Path) -> Any:
    try:
        return json.loads(kept(path) or b"{}")
    except ValueError:
        return {}


def _changed(machine: Machine, given: Any) -> Machine | None:
    """The machine with the given fields; None when there are none or they cannot be.

    A result of an older tilert has only the window.
    """
    if not isinstance(given, Mapping):
        return None
    fields = {name: given[name] for name in FIELDS if name in given}
    if not fields or any(type(v) is not type(getattr(machine, n)) for n, v in fields.items()):
        return None
    changed = replace(machine, **fields)
    most = (
        machine.slots + 1
    ) * machine.slot_bytes - 1  # slots of another size may leave less unused
    fits = changed.slots >= MIN_SLOTS and changed.slot_bytes >= 1024
    fits &= changed.slot_bytes % 1024 == 0 and changed.slots * changed.slot_bytes <= most
    fits &= changed.window >= 1 and (changed.splits == 0 or 2 <= changed.splits <= machine.workers)
    return replace(changed, window=min(changed.window, changed.slots)) if fits else None


def described(machine: Machine) -> str:
    """The settings in words."""
    splits = f"{machine.splits} splits" if machine.splits else "splits by rule"
    dealt = "each op" if machine.even else "a whole step"
    ring = f"{machine.slots} units of {machine.slot_bytes / 1024:g} KB, window {machine.window}"
    return f"{ring}, {splits}, {dealt} dealt evenly"


def search(
    runner: Runner, path: Path, seconds: float, say: Callable[[str], None]
) -> dict[Machine, float]:
    """Milliseconds per token by machine in the order of trial, the runner's own first.

    The best is kept under `path` as soon as it is known; `say` is told of each. Nothing is begun that
    would probably end after `seconds`, but the runner's own machine is timed always. Raises UserError
    for another back end than 'cuda', RuntimeError when a program computes something else.
    """
    if not isinstance(runner.place, CudaRuntime):
        raise UserError(
            "tune is for the back end 'cuda'; give --backend cuda on a machine with a GPU"
        )
    return _Search(runner, runner.place, path, say).run(seconds)


class _Search:
    """What was measured so far; weights and caches stay where they are."""

    def __init__(
        self, runner: Runner, place: CudaRuntime, path: Path, say: Callable[[str], None]
    ) -> None:
        self.runner, self.place, self.path, self.say = runner, place, path, say
        self.best = runner.machine
        self.found: dict[Machine, float] = {}
        self.refused: set[Machine] = set()
        self.programs: dict[Machine, Program] = {}  # by machine without its window
        self.logits = np.zeros(0, np.float32)  # of the runner's own machine

    def run(self, seconds: float) -> dict[Machine, float]:
        began = time.perf_counter()
        self._attempt(self.best)
        longest = 0.0
        for machine in self._candidates():
            if machine in self.found or machine in self.refused:
                continue
            start = time.perf_counter()
            if start + longest > began + seconds:
                self.say(f"no time left for {described(machine)} and what follows")
                break
            self._attempt(machine)
            longest = max(longest, time.perf_counter() - start)
        before, after = self.found[self.runner.machine], self.found[self.best]
        self.say(f"kept: {described(self.best)}: {after:.4f} ms per token, {before:.4f} before")
        return self.found

    def _candidates(self) -> Iterator[Machine]:
        """What to try next; looks at what the one before has given."""
        yield from self._windows(self.best)
        yield from self._units(self.best)
        yield from self._splits(self.best)
        yield replace(self.best, even=not self.best.even)
        yield from self._windows(self.best)

    def _windows(self, base: Machine) -> Iterator[Machine]:
        """Narrower ones, then wider ones, each as long as they are better."""
        sizes = sorted({round(flight / base.slot_bytes) for flight in FLIGHT})
        sizes = [size for size in sizes if 1 <= size <= base.slots]
        narrower = [size for size in reversed(sizes) if size < base.window]
        for side in (narrower, [size for size in sizes if size > base.window]):
            for window in side:
                yield replace(base, window=window)
                if self.best.window != window:
                    break

    def _units(self, base: Machine) -> Iterator[Machine]:
        """As many bytes in the ring and under way, in other units; see compiler/units.py."""
        own, program = self.place.device.machine, self._program(base)
        ring, flight = own.slots * own.slot_bytes, base.window * base.slot_bytes
        pages = [2 * PAGE * op.head_dim for op in program.ops if isinstance(op, Attend)]
        page = max([cache_unit(program.ops), *pages])
        sizes = {*UNITS, own.slot_bytes} - {base.slot_bytes}
        fitting = [size for size in sizes if page <= size <= ring // MIN_SLOTS]
        made = [
            replace(base, slots=ring // size, slot_bytes=size, window=max(1, round(flight / size)))
            for size in fitting
        ]

        def promise(machine: Machine) -> tuple[int, int]:
            near = -abs(machine.slot_bytes - base.slot_bytes)
            return bytes_in_tiles(program.buffers, program.ops, machine), near

        yield from sorted(made, key=promise, reverse=True)

    def _splits(self, base: Machine) -> Iterator[Machine]:
        """Half and twice as many, of which each still has a worker."""
        ops = self._program(base).ops
        attend = next(op for op in ops if isinstance(op, Attend | LatentAttention))
        for splits in (attend.splits // 2, attend.splits * 2):
            if 2 <= splits <= base.workers // (attend.tiles // attend.splits):
                yield replace(base, splits=splits)

    def _program(self, machine: Machine) -> Program:
        """The program of one token; a window changes nothing in it but its own number."""
        key = replace(machine, window=0)
        if key not in self.programs:
            own = machine == self.runner.machine
            made = (
                self.runner.compiled("decode", machine)
                if not own
                else self.runner.program("decode")
            )
            self.programs[key] = made
        return replace(self.programs[key], machine=machine)

    def _attempt(self, machine: Machine) -> None:
        """Time one; it becomes the best, and is kept, when it is faster than noise."""
        name = described(machine)
        try:
            backend = self.place.bound(self._program(machine))
        except UserError as error:  # of the back end, which does not have every shape in every unit
            self.refused.add(machine)
            return self.say(f"{name}: not for this model: {error}")
        if not self.found:
            _fill_past(backend)
        self._compare(machine, _logits(backend))
        ms = self.found[machine] = _milliseconds(backend)
        self.say(f"{name}: {ms:.4f} ms per token")
        if ms <= self.found[self.best] * (1 - GAIN) or machine == self.best:
            self.best = machine
            fields = {field: getattr(machine, field) for field in FIELDS}
            data = json.dumps({**fields, "ms": ms, "device": self.place.device.name})
            keep(self.path, data.encode())

    def _compare(self, machine: Machine, logits: np.ndarray) -> None:
        """RuntimeError when a program computes something else than that of the runner's own machine."""
        own = self.runner.machine
        if machine == own:
            self.logits = logits
        same = (machine.slot_bytes, machine.splits) == (own.slot_bytes, own.splits)
        allowed = 0 if same else ROUNDING * np.abs(self.logits).max()
        if not (off := np.abs(logits - self.logits).max()) <= allowed:
            raise RuntimeError(
                f"with {described(machine)} a logit is {off:.3g} off, where {allowed:.3g} can be"
            )


def _begin(backend: CudaBackend, position: int) -> None:
    """One token at a position."""
    state = backend.state
    state["counts"][0] = 1, 1
    state["pages"][0] = range(-(-backend.program.context // PAGE))
    state["tokens"][0, 0], state["positions"][0, 0] = 1, position


def _fill_past(backend: CudaBackend) -> None:
    """Keys and values for what is compared: all programs find the same, for none writes there again."""
    middle = backend.program.context // 2
    steps = min(PAST, middle)
    _begin(backend, middle - steps)
    for _ in backend.steps(steps):
        pass


def _logits(backend: CudaBackend) -> np.ndarray:
    """Of one step in the middle of the context."""
    _begin(backend, backend.program.context // 2)
    for _ in backend.steps(1):
        pass
    return backend.read("logits")[0]


def _milliseconds(backend: CudaBackend) -> float:
    """Median time per token of launches from the middle of the context on."""
    middle = backend.program.context // 2
    steps, times = min(STEPS, middle), list[float]()
    began = time.perf_counter()
    while len(times) < REPEATS:
        _begin(backend, middle)
        start = time.perf_counter()
        made = sum(1 for _ in backend.steps(steps))
        if start - began > WARMING:
            times.append((time.perf_counter() - start) / made * 1e3)
    return statistics.median(times)
