"""The interpreter: the definition of what a program means, in numpy, and the judge of every schedule.

It executes the protocol itself (protocol.py: queues, waits, signals, steps that run into each other) with
the reference bodies of tilert.ops, in any legal order: one tile at a time, in turns between workers, and
what a tile writes appears only when the worker has its next turn. Vector clocks report two runs that
touch the same cell without being ordered, also when this execution happened to come out right. Every
access is checked against the regions that the op declares, and an activation may only be read when it
was written in the same step. Knows no compiler; has no speed to speak of.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np

from tilert.backends.protocol import DeadlockError, Place, Protocol, run_name
from tilert.errors import UserError
from tilert.ir.program import NONE, PAGE, PAST, Buf, Buffer, Kind, Op, Program, Region
from tilert.ir.regions import Cells, cache_frames
from tilert.ops import Accept, Draw, NextToken, Report

_Write = tuple[int, tuple[int | slice, ...], np.ndarray]  # buffer, index, values


class AccessError(AssertionError):
    """A tile touched what its op does not declare, or read what this step has not written."""


class RaceError(AssertionError):
    """Two runs touched the same cell, one of them writing, and nothing ordered them."""


def allocate_caches(program: Program, pages: int) -> dict[str, np.ndarray]:
    """Zeroed caches [pages, 64, cols] by buffer name; programs of one model may share them."""
    caches = (b for b in program.buffers if b.kind is Kind.CACHE)
    return {b.name: np.zeros((pages, PAGE, b.cols), b.dtype.numpy) for b in caches}


class Interpreter:
    """One program bound to its weights and to caches that programs may share.

    weights: [rows, cols] (or [cols] for one row) by buffer name, in the dtype that the program says;
    caches: from allocate_caches. order: a key of ORDERS, or "sequential" for the op table's own order,
    which asks no counter. Results do not depend on order and seed when the program is sound. Raises
    UserError when a weight or cache is missing or has another shape or dtype.
    """

    allocate_caches = staticmethod(allocate_caches)

    def __init__(
        self, program: Program, weights: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray],
        *, order: str = "random", seed: int = 0, detect_races: bool = True,
    ) -> None:  # fmt: skip
        if order != "sequential" and order not in ORDERS:
            known = ", ".join(("sequential", *ORDERS))
            raise UserError(f"order '{order}' is not known; accepted are {known}")
        self.program, self.order, self.seed = program, order, seed
        self.memory = _Memory(program, weights, caches)
        arrays = zip(program.buffers, self.memory.arrays, strict=True)
        self.state = {b.name: array for b, array in arrays if b.kind is Kind.STATE}
        self._races = _Races(program) if detect_races and order != "sequential" else None
        self._epoch = 0  # steps of all launches so far

    def read(self, name: str) -> np.ndarray:
        """A view of an activation or state buffer; the next launch overwrites it."""
        buf = self.program.buffer_ids[name]
        assert self.program.buffers[buf].kind in (Kind.WORK, Kind.STATE), f"{name} has other owners"
        return self.memory.arrays[buf]

    def steps(self, count: int) -> Iterator[np.ndarray]:
        """Run up to `count` steps; after each, the sampled ids [outputs] (none when nothing samples).

        Workers may be in later steps by then. Closing the iterator cancels: steps that a worker has
        begun are finished, no other is begun. Raises RaceError, DeadlockError or AccessError when the
        program is unsound.
        """
        assert count >= 1, f"{count} steps"
        first, self._epoch = self._epoch + 1, self._epoch + count
        if self.order == "sequential":
            for step in range(count):
                yield self._step_in_table_order(first + step)
            return
        launch = _Launch(
            self.program, self.memory, self._races, self.order, self.seed, count, first
        )
        try:
            while launch.advance():
                while launch.sampled:
                    yield launch.sampled.pop(0)
        except GeneratorExit:
            launch.protocol.end = launch.begun
            while launch.advance():
                pass
            raise

    def run(
        self, steps: int = 1, on_token: Callable[[np.ndarray], bool] | None = None
    ) -> list[np.ndarray]:
        """Run up to `steps` steps and return the sampled ids [outputs] of each.

        on_token is called with each step's ids; when it returns True, that step is the last.
        """
        made: list[np.ndarray] = []
        launched = self.steps(steps)
        for sampled in launched:
            made.append(sampled)
            if on_token is not None and on_token(sampled):
                break
        launched.close()  # type: ignore[attr-defined]
        return made

    def _step_in_table_order(self, epoch: int) -> np.ndarray:
        sampled = np.empty(0, np.int32)
        for op in self.program.ops:
            for tile in range(op.tiles):
                self.memory.apply(self.memory.execute(op, tile, epoch), epoch)
            if _ends(op):
                sampled = self.memory.sampled(op)
        return sampled


class _Memory:
    """All buffers of a program, as tilert.ops.memory.Memory, for one tile at a time.

    Reads see memory as it is; writes are collected until `apply`. Epochs number the steps of all
    launches; every activation and cache entry remembers the epoch of its last write.
    """

    def __init__(
        self, program: Program, weights: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray]
    ) -> None:
        self.program = program
        work = [b for b in program.buffers if b.kind is Kind.WORK]
        ends = {d: max((b.offset + b.bytes for b in work if b.device == d), default=0) // 4
                for d in {b.device for b in work}}  # fmt: skip
        arenas = {d: np.full(end, np.nan, np.float32) for d, end in ends.items()}
        epochs = {d: np.zeros(2 * end, np.int32) for d, end in ends.items()}  # of 2 bytes each
        self.arrays: list[np.ndarray] = []
        self.epochs: list[np.ndarray | None] = []
        for b in program.buffers:
            epoch = None
            if b.kind is Kind.WEIGHT:
                array = _weight(b, weights)
            elif b.kind is Kind.STATE:
                array = np.zeros((b.rows, b.cols), b.dtype.numpy)
            elif b.kind is Kind.CACHE:
                array = _cache(b, caches)
                epoch = np.zeros(array.shape, np.int32)
            else:
                part = slice(b.offset // 4, (b.offset + b.bytes) // 4)
                array = arenas[b.device][part].view(b.dtype.numpy).reshape(b.rows, b.cols)
                halves = slice(b.offset // 2, (b.offset + b.bytes) // 2, b.dtype.bytes // 2)
                epoch = epochs[b.device][halves].reshape(b.rows, b.cols)
            self.arrays.append(array)
            self.epochs.append(epoch)
        self._op: Op | None = None
        self._tile = self._epoch = 0
        self._reads: dict[int, list[Region]] = {}
        self._writes: dict[int, list[Region]] = {}
        self._pending: list[_Write] = []

    def execute(self, op: Op, tile: int, epoch: int) -> list[_Write]:
        """Compute one tile; what it writes is returned, not yet stored."""
        self._op, self._tile, self._epoch, self._pending = op, tile, epoch, []
        self._reads = _by_buffer(op.reads(tile, tile + 1))
        self._writes = _by_buffer(op.writes(tile, tile + 1))
        for index in list(self._reads):  # block scales go with their weight
            b = self.program.buffers[index]
            if b.scale != NONE:
                cut = [Region(b.scale, r.row_lo // b.block[0], -(-r.row_hi // b.block[0]),
                              r.col_lo // b.block[1], -(-r.col_hi // b.block[1]))
                       for r in self._reads[index]]  # fmt: skip
                whole = [Region(b.scale, 0, b.scale_shape[0], 0, b.scale_shape[1])]
                self._reads.setdefault(b.scale, []).extend(cut if b.bank == 1 else whole)
        op.reference(self, tile, tile + 1)  # type: ignore[attr-defined]
        return self._pending

    def apply(self, writes: list[_Write], epoch: int) -> None:
        """Store what a tile wrote."""
        for buffer, index, values in writes:
            self.arrays[buffer][index] = values
            epochs = self.epochs[buffer]
            if epochs is not None:
                epochs[index] = epoch

    def sampled(self, op: Accept | Draw | NextToken | Report) -> np.ndarray:
        """A copy of the ids that the step has chosen; op: the one that ends it."""
        return self.arrays[op.sampled][0, : self.arrays[op.counts][0, 1]].copy()

    def buffer(self, buf: Buf) -> Buffer:
        """The description of a buffer."""
        return self.program.buffers[buf]

    def read(self, buf: Buf, row_lo: int, row_hi: int, col_lo: int, col_hi: int) -> np.ndarray:
        """A copy of a rectangle (of a weight: a view) in the buffer's own dtype."""
        self._check(self._reads, Region(buf, row_lo, row_hi, col_lo, col_hi), "reads")
        index = slice(row_lo, row_hi), slice(col_lo, col_hi)
        epochs, values = self.epochs[buf], self.arrays[buf][index]
        if epochs is None:
            return values if self.buffer(buf).kind is Kind.WEIGHT else values.copy()
        if not (epochs[index] == self._epoch).all():
            where = Region(buf, row_lo, row_hi, col_lo, col_hi)
            raise AccessError(
                f"{self._who()} reads what this step has not written: {self._where(where)}"
            )
        return values.copy()

    def write(self, buf: Buf, row_lo: int, col_lo: int, values: np.ndarray) -> None:
        """Store a 2-D array, converted to the buffer's dtype, with its corner at (row_lo, col_lo)."""
        rows, cols = values.shape
        self._check(
            self._writes, Region(buf, row_lo, row_lo + rows, col_lo, col_lo + cols), "writes"
        )
        index = slice(row_lo, row_lo + rows), slice(col_lo, col_lo + cols)
        self._pending.append((buf, index, values.astype(self.arrays[buf].dtype)))

    def read_cache(
        self, buf: Buf, token: int, lo: int, hi: int, col_lo: int, col_hi: int
    ) -> np.ndarray:
        """Positions [lo, hi) of the sequence that `token` of this step belongs to: [hi - lo, cols]."""
        page, slot = self._locate(buf, token, np.arange(lo, hi))
        in_step, rows = self._rows_of_step(token, lo, hi)
        first = -1 if len(rows) < hi - lo else int(rows.min())
        end = int(rows.max()) + 1 if len(rows) else 0
        self._check(self._reads, Region(buf, first, max(end, first + 1), col_lo, col_hi), "reads")
        epochs = self.epochs[buf]
        assert epochs is not None
        if not (epochs[page[in_step], slot[in_step], col_lo:col_hi] == self._epoch).all():
            where = Region(buf, first, end, col_lo, col_hi)
            raise AccessError(
                f"{self._who()} reads what this step has not written: {self._where(where)}"
            )
        return self.arrays[buf][page, slot, col_lo:col_hi]

    def write_cache(self, buf: Buf, token: int, col_lo: int, values: np.ndarray) -> None:
        """Store one row of values at the position of `token` in its sequence."""
        col_hi = col_lo + len(values)
        self._check(self._writes, Region(buf, token, token + 1, col_lo, col_hi), "writes")
        position = self._operand("positions")[0, token : token + 1]
        page, slot = self._locate(buf, token, position)
        index = int(page[0]), int(slot[0]), slice(col_lo, col_hi)
        self._pending.append((buf, index, values.astype(self.arrays[buf].dtype)))

    def _operand(self, name: str) -> np.ndarray:
        """A state buffer that the current op names, all of it."""
        buf = getattr(self._op, name)
        assert buf in self._reads, f"{self._who()} does not declare that it reads {name}"
        return self.arrays[buf]

    def _locate(self, buf: Buf, token: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Physical page and slot of each position of the token's sequence."""
        page = self._operand("pages")[self._operand("sequences")[0, token], positions // PAGE]
        count = len(self.arrays[buf])
        assert ((page >= 0) & (page < count)).all(), f"{self._who()}: pages {page} of {count}"
        return page, positions % PAGE

    def _rows_of_step(self, token: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of the positions [lo, hi) belong to tokens of this step, as indices, and the tokens."""
        tokens = int(self._operand("counts")[0, 0])
        sequences = self._operand("sequences")[0, :tokens]
        positions = self._operand("positions")[0, :tokens]
        same = (sequences == sequences[token]) & (positions >= lo) & (positions < hi)
        rows = np.flatnonzero(same)
        return positions[rows] - lo, rows

    def _check(self, declared: dict[int, list[Region]], r: Region, verb: str) -> None:
        for d in declared.get(r.buffer, ()):
            if (d.row_lo <= r.row_lo and r.row_hi <= d.row_hi
                    and d.col_lo <= r.col_lo and r.col_hi <= d.col_hi):  # fmt: skip
                return
        raise AccessError(f"{self._who()} {verb} what its op does not declare: {self._where(r)}")

    def _who(self) -> str:
        return f"tile {self._tile} of {type(self._op).__name__.lower()}"

    def _where(self, r: Region) -> str:
        return _region_name(self.program, r)


def _ends(op: Op) -> TypeGuard[Accept | Draw | NextToken | Report]:
    """True for the op behind which a step's tokens are told."""
    return isinstance(op, Accept | NextToken | Report) or (isinstance(op, Draw) and op.feed > 0)


def _by_buffer(regions: list[Region]) -> dict[int, list[Region]]:
    found: dict[int, list[Region]] = {}
    for region in regions:
        found.setdefault(region.buffer, []).append(region)
    return found


def _region_name(program: Program, r: Region) -> str:
    name = program.buffers[r.buffer].label
    return f"b{r.buffer} '{name}' [{r.row_lo}:{r.row_hi}, {r.col_lo}:{r.col_hi}]"


def _weight(b: Buffer, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    for name in b.parts:
        if name not in weights:
            raise UserError(f"weight '{name}' is missing")
    array = weights[b.parts[0]]
    if len(b.parts) > 1:
        rows = (weights[name].reshape(-1, b.cols if b.rows > 1 else 1) for name in b.parts)
        array = np.concatenate([*rows]).reshape(b.rows, b.cols)
    if array.shape != (b.rows, b.cols) and not (b.rows == 1 and array.shape == (b.cols,)):
        raise UserError(
            f"weight '{b.name}' has shape {array.shape}; the program needs {(b.rows, b.cols)}"
        )
    if array.dtype != b.dtype.numpy:
        raise UserError(
            f"weight '{b.name}' has dtype {array.dtype}; the program needs {b.dtype.numpy}"
        )
    return array.reshape(b.rows, b.cols)


def _cache(b: Buffer, caches: Mapping[str, np.ndarray]) -> np.ndarray:
    array = caches.get(b.name)
    if array is None:
        raise UserError(f"cache '{b.name}' is missing")
    if array.shape[1:] != (PAGE, b.cols) or array.dtype != b.dtype.numpy:
        raise UserError(f"cache '{b.name}' is {array.dtype} {array.shape}; the program needs"
                        f" {b.dtype.numpy} [pages, {PAGE}, {b.cols}]")  # fmt: skip
    return array


@dataclass(slots=True)
class _Worker:
    """What a worker does at its place: the tile of its run, computed (writes held) or not."""

    at: Place
    clock: np.ndarray  # runs of each worker, over all steps, that happened before what comes next
    tile: int = -1  # -1: the run has not started
    writes: list[_Write] | None = None
    since: int = -1  # turn at which it became ready; -1 while it waits


@dataclass(slots=True)
class _Signals:
    """What happened before each signal of a counter (from number `first` on)."""

    first: int = 0
    known: list[np.ndarray] = field(default_factory=list[np.ndarray])

    def add(self, clock: np.ndarray) -> None:
        """One more; a wait for it also knows all signals before."""
        self.known.append(np.maximum(clock, self.known[-1]) if self.known else clock.copy())

    def forget(self, value: int) -> None:
        """Drop what no wait can ask for any more: signals below `value`."""
        drop = min(max(value - 1 - self.first, 0), len(self.known) - 1)
        if drop > 0:
            del self.known[:drop]
            self.first += drop


class _Launch:
    """One launch of up to `end` steps; `advance` gives one worker one turn."""

    def __init__(
        self, program: Program, memory: _Memory, races: _Races | None, order: str, seed: int,
        end: int, epoch: int,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.races, self.epoch = program, memory, races, epoch
        self.protocol, self.begun, self.turn = Protocol(program, end), 1, 0
        self.random, self.victim = random.Random(seed), seed % max(1, len(program.queues))
        self.pick = ORDERS[order]
        workers = len(program.queues)
        self.workers = [_Worker(at, np.zeros(workers, np.int64)) for at in self.protocol.places]
        self.signals = [_Signals() for _ in program.counters]
        self.sampled: list[np.ndarray] = []
        self.finished = 0  # steps that all workers have completed
        self.samples = any(map(_ends, program.ops))
        if races is not None:
            races.begin()

    def advance(self) -> bool:
        """Let one ready worker compute a tile or store one; False when the launch is over."""
        ready = [w for w in self.workers if self._ready(w)]
        if not ready:
            if stuck := self.protocol.stuck():
                raise DeadlockError(self.program, stuck)
            return False
        self.turn += 1
        worker = self.pick(ready, self)
        if worker.writes is not None:
            self._store(worker)
        else:
            if worker.tile < 0:
                self._start(worker)
            op = self.program.ops[worker.at.run.op]
            worker.writes = self.memory.execute(op, worker.tile, self.epoch + worker.at.step)
        return True

    def _ready(self, w: _Worker) -> bool:
        if w.tile < 0 and not self.protocol.ready(w.at):
            return False
        if w.since < 0:
            w.since = self.turn
        return True

    def _start(self, w: _Worker) -> None:
        self.begun = max(self.begun, w.at.step + 1)
        w.tile = w.at.run.lo
        if self.races is None:
            return
        for wait in w.at.run.waits:
            signals, want = self.signals[wait.counter], self.protocol.want(w.at, wait)
            if want > 0:  # it could have gone on at the very signal that it wanted
                np.maximum(w.clock, signals.known[want - 1 - signals.first], out=w.clock)
        self.races.check(w)

    def _store(self, w: _Worker) -> None:
        assert w.writes is not None
        self.memory.apply(w.writes, self.epoch + w.at.step)
        w.writes, w.tile = None, w.tile + 1
        if w.tile < w.at.run.hi:
            return
        run, op = w.at.run, self.program.ops[w.at.run.op]
        w.clock[w.at.worker] = w.at.step * len(w.at.queue) + w.at.position + 1
        if run.signal >= 0:
            self.signals[run.signal].add(w.clock)
        if _ends(op):
            self.sampled.append(self.memory.sampled(op))
        w.tile = w.since = -1
        self.protocol.finish(w.at)
        if w.at.position == 0:
            self._end_step()

    def _end_step(self) -> None:
        behind = min(w.at.step for w in self.workers)
        if behind == self.finished:
            return
        self.finished = behind
        if not self.samples:
            self.sampled.append(np.empty(0, np.int32))
        for signals, counter in zip(self.signals, self.program.counters, strict=True):
            signals.forget((behind - 1) * counter.total)


class _Races:
    """For each cell and worker the last write and the last access, as moments of the worker's clock.

    Rows of a cache move between steps, and between ops that count them by other positions, so accesses
    of different steps or frames conflict when their columns do.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        ops, flat = (
            program.ops,
            [(w, i) for w, q in enumerate(program.queues) for i in range(len(q))],
        )
        runs = {at: program.queues[at[0]][at[1]] for at in flat}
        reads = {at: ops[r.op].reads(r.lo, r.hi) for at, r in runs.items()}
        self.writes = {at: ops[r.op].writes(r.lo, r.hi) for at, r in runs.items()}
        changing = {r.buffer for regions in self.writes.values() for r in regions}
        self.reads = {at: [r for r in rs if r.buffer in changing] for at, rs in reads.items()}
        named = [r for table in (self.reads, self.writes) for rs in table.values() for r in rs]
        self.cells = Cells([*named, *(self._column(r) for r in named)])
        self.lengths = np.asarray([max(1, len(q)) for q in program.queues], np.int64)
        frames = cache_frames(program.buffers, ops)
        caches = {b for found in frames for b in found}
        # Of each cache: by worker and position in its queue, how the run counts the cache's rows.
        shape = len(program.queues), int(self.lengths.max(initial=1))
        self.frames = {b: np.full(shape, -1) for b in caches}
        for at, run in runs.items():
            for b, frame in frames[run.op].items():
                self.frames[b][at] = frame
        self.written = np.zeros((self.cells.count, len(program.queues)), np.int64)
        self.touched = np.zeros_like(self.written)

    def begin(self) -> None:
        """A launch starts after everything before it."""
        self.written[:] = 0
        self.touched[:] = 0

    def check(self, w: _Worker) -> None:
        """Note the accesses of the run that the worker starts; RaceError when one is not ordered."""
        at, moment = (w.at.worker, w.at.position), w.at.step * len(w.at.queue) + w.at.position + 1
        for region in self.reads[at]:
            self._compare(w, region, self.written)
        for region in self.writes[at]:
            self._compare(w, region, self.touched)
        for region in self.reads[at]:
            self.touched[self.cells.of(region), w.at.worker] = moment
        for region in self.writes[at]:
            cells = self.cells.of(region)
            self.touched[cells, w.at.worker] = self.written[cells, w.at.worker] = moment

    def _column(self, r: Region) -> Region:
        if self.program.buffers[r.buffer].kind is not Kind.CACHE:
            return r
        return r._replace(row_lo=-PAST, row_hi=self.program.tokens)

    def _compare(self, w: _Worker, region: Region, table: np.ndarray) -> None:
        own, column = self.cells.of(region), self._column(region)
        if column is not region:
            every = self.cells.of(column)
            moments = table[every]
            step, position = np.divmod(moments - 1, self.lengths)
            frames = self.frames[region.buffer]
            frame = frames[np.arange(len(self.lengths)), position]
            elsewhere = (step != w.at.step) | (frame != frames[w.at.worker, w.at.position])
            moments = np.where(np.isin(every, own)[:, None] | elsewhere, moments, 0)
        else:
            moments = table[own]
        late = np.argwhere(moments > w.clock)
        late = late[late[:, 1] != w.at.worker]
        if not late.size:
            return
        cell, other = late[0].tolist()
        step, position = divmod(int(moments[cell, other]) - 1, int(self.lengths[other]))
        raise RaceError(
            f"{run_name(self.program, other, position)} in step {step} and"
            f" {run_name(self.program, w.at.worker, w.at.position)} in step {w.at.step} both use"
            f" {_region_name(self.program, region)}; one of them writes, and nothing orders them"
        )


def _starve(ready: list[_Worker], launch: _Launch) -> _Worker:
    others = [w for w in ready if w.at.worker != launch.victim]
    return launch.random.choice(others or ready)


def _hold_writes(ready: list[_Worker], launch: _Launch) -> _Worker:
    return launch.random.choice([w for w in ready if w.writes is None] or ready)


# Who gets the next turn among the workers that can use one.
ORDERS: dict[str, Callable[[list[_Worker], _Launch], _Worker]] = {
    "random": lambda ready, launch: launch.random.choice(ready),
    "lowest": lambda ready, launch: ready[0],  # as far as it gets before the next worker moves
    "highest": lambda ready, launch: ready[-1],
    "newest": lambda ready, launch: max(ready, key=lambda w: w.since),
    "ahead": lambda ready, launch: max(ready, key=lambda w: (w.at.step, w.at.position)),
    "behind": lambda ready, launch: min(ready, key=lambda w: (w.at.step, w.at.position)),
    "starve": _starve,  # one worker, chosen by the seed, moves only when no other can
    "hold-writes": _hold_writes,  # results appear as late as possible
}
