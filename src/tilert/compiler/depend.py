"""Waits and counters from the regions that runs read and write.

The ops are walked in table order through two steps. For each cell of memory the pass knows, per
worker, the last run that wrote and the last that read it; a run needs the writers of what it reads,
and the writers and readers of what it writes. Needs that other needs already imply are dropped
(vector clocks tell), but not the need for what chooses the weights that a run streams, nor for the past
rows of a cache that it streams: the loader runs ahead of its worker, whose earlier waits tell it nothing.
What a worker hands to itself is implied by its queue. Where signals may be silent (ir/tags.py) there are two
clocks: what has happened before a run, and what can also be seen by then; words without tags need the
second one.

Runs of one op that the same set of runs waits for share a counter. A need in the step before becomes a wait
with lag 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from tilert.ir.program import (
    NONE,
    Buffer,
    Counter,
    Kind,
    Op,
    Region,
    Run,
    Wait,
    several_passes,
)
from tilert.ir.regions import Cells, cache_moves
from tilert.ir.tags import Tags

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class _Place:
    """A run with its number in op order, its worker and its position in that worker's queue."""

    number: int
    worker: int
    position: int
    run: Run


def depend(
    buffers: tuple[Buffer, ...], ops: tuple[Op, ...], queues: list[list[Run]], tags: Tags
) -> tuple[tuple[Counter, ...], tuple[tuple[Run, ...], ...]]:
    """Counters, and the queues with waits and signals. tags: of these buffers and ops."""
    places = _in_op_order(queues)
    return _assign_counters(places, _Walk(buffers, ops, queues, places, tags).run(), queues)


def _in_op_order(queues: list[list[Run]]) -> list[_Place]:
    flat: list[tuple[int, int, int, int, Run]] = [
        (r.op, r.lo, w, i, r) for w, queue in enumerate(queues) for i, r in enumerate(queue)
    ]
    flat.sort(key=lambda item: item[:4])
    return [_Place(n, w, i, r) for n, (_, _, w, i, r) in enumerate(flat)]


@dataclass(slots=True)
class _Group:
    """Runs of one op, of this step or the one before, that some runs wait for as a whole."""

    lag: int
    numbers: Ints  # in op order
    waiters: list[int] = field(default_factory=list[int])


class _Walk:
    """Two steps in op order, collecting for each run of the second step what it must wait for.

    Runs of one op do not depend on each other, so all of them see the tables as the op found them;
    and most of them touch the same regions, so what a region needs is worked out once.
    """

    def __init__(
        self,
        buffers: tuple[Buffer, ...],
        ops: tuple[Op, ...],
        queues: list[list[Run]],
        places: list[_Place],
        tags: Tags,
    ) -> None:
        self.buffers, self.places, self.ops, self.tags = buffers, places, ops, tags
        self.moves, self.held = cache_moves(buffers, ops), several_passes(ops)
        changing = {r.buffer for p in places for r in ops[p.run.op].writes(p.run.lo, p.run.hi)}
        self.reads = [
            self._changing(ops[p.run.op].reads(p.run.lo, p.run.hi), changing) for p in places
        ]
        self.writes = [ops[p.run.op].writes(p.run.lo, p.run.hi) for p in places]
        self.cells = Cells(r for regions in (*self.reads, *self.writes) for r in regions)
        shape = (self.cells.count, len(queues))
        self.last_write = np.full(shape, -1, dtype=np.int64)  # number of a run, step * n + number
        self.last_read = np.full(shape, -1, dtype=np.int64)
        self.clock = np.full((2 * len(places), len(queues)), -1, dtype=np.int64)
        # What the signal of a run says of each worker: the last run whose words can be seen by then. Of
        # its own worker a silent one says only what an ordered signal before it has said.
        self.told = np.full_like(self.clock, -1)
        self.published = np.full(len(queues), -1, dtype=np.int64)  # by ordered signals so far
        self.awaited = np.zeros(len(places), bool)  # runs that are known to signal
        self.newest = [-1] * len(queues)  # number of the latest run of each worker
        # Of each run number of both steps: its op, its worker, its place in that worker's two steps.
        self.op = np.tile(np.asarray([p.run.op for p in places]), 2)
        self.worker = np.tile(np.asarray([p.worker for p in places]), 2)
        length = np.asarray([len(queues[p.worker]) for p in places])
        position = np.asarray([p.position for p in places])
        self.at = np.concatenate([position, position + length])
        self.groups: dict[tuple[int, bytes], _Group] = {}

    @staticmethod
    def _changing(regions: list[Region], changing: set[int]) -> list[Region]:
        return [r for r in regions if r.buffer in changing]

    def run(self) -> list[_Group]:
        """Everything that runs of a step wait for."""
        for step in range(2):
            for op, run in groupby(self.places, key=lambda place: place.run.op):
                self._shift_caches(self.moves[op])
                self._visit_op(step, list(run))
            self._shift_caches(range(len(self.buffers)))
        return list(self.groups.values())

    def _visit_op(self, step: int, places: list[_Place]) -> None:
        earlier: dict[tuple[Region, bool], Ints] = {}
        plain: dict[Region, Ints] = {}  # of those, who wrote words without tags
        joined: dict[bytes, tuple[Ints, Ints]] = {}  # what a group knows, and what it tells
        op = self.ops[places[0].run.op]
        for place in places:
            needs = [(r, False) for r in self.reads[place.number]]
            needs += [(r, True) for r in self.writes[place.number]]
            for need in needs:
                if need not in earlier:
                    earlier[need] = self._earlier(*need)
                    plain[need[0]] = self._plain(need[0])
            found = [earlier[need] for need in needs if earlier[need].size]
            numbers = found[0] if len(found) == 1 else _union(found)
            unseen = _union([plain[region] for region, _ in needs if plain[region].size])
            held = set[int]()
            if place.run.ring >= 0:
                held = {*self._kind(self._streamed(op, earlier, needs)).tolist()}
            self._visit(step, place, numbers, unseen, held, joined)
        for place in places:
            self._note(step * len(self.places) + place.number, place)

    def _streamed(
        self, op: Op, earlier: dict[tuple[Region, bool], Ints], needs: list[tuple[Region, bool]]
    ) -> Ints:
        """Runs that the loader of a run of `op` must wait for itself: those that made the choice of what it
        streams, and those of the step before that appended to the cache that it streams; not with several
        passes, for there it waits for all that its worker does before it streams past rows."""
        made = [earlier[r, w] for r, w in needs if r.buffer == op.choice != NONE]
        past = [earlier[r, w] for r, w in needs if r.row_lo < 0 and not w and not self.held]
        return _union([*made, *(runs[runs < len(self.places)] for runs in past)])

    def _earlier(self, region: Region, written: bool) -> Ints:
        """Runs that a reader of the region must wait for, or a writer."""
        cells = self.cells.of(region)
        found = [self.last_write[cells], self.last_read[cells]][: 1 + written]
        return _union([table[table >= 0] for table in found])

    def _plain(self, region: Region) -> Ints:
        """Runs of which the region has words that do not say themselves whether they are there."""
        if not self.tags.writers or region.buffer in self.tags.writers:
            return np.empty(0, np.int64)
        table = self.last_write[self.cells.of(region)]
        return _union([table[table >= 0]])

    def _kind(self, numbers: Ints) -> Ints:
        """Step and op of runs as one number, which rises with theirs."""
        return numbers // len(self.places) * len(self.op) + self.op[numbers]

    def _visit(
        self, step: int, place: _Place, numbers: Ints, plain: Ints, held: set[int],
        joined: dict[bytes, tuple[Ints, Ints]],
    ) -> None:  # fmt: skip
        """Wait for `numbers`, and so that what those among them in `plain` wrote is seen; for those whose
        kind is in `held` whatever the worker knows."""
        me = step * len(self.places) + place.number
        clock, seen = self.clock[me], self.told[me]
        self._follow(place, clock, seen)
        # Latest first: what an op waited for itself need not be waited for again.
        kind = self._kind(numbers)
        cuts = np.flatnonzero(kind[1:] != kind[:-1])
        for group in np.split(numbers, cuts + 1)[::-1]:
            known = (self.at[group] <= clock[self.worker[group]]).all()
            hidden = self.at[group] > seen[self.worker[group]]
            if known and hidden.any():
                known = not hidden[np.isin(group, plain)].any()
            if known and not (held and held & {*self._kind(group[:1]).tolist()}):
                continue
            name = group.tobytes()
            if name not in joined:
                joined[name] = self.clock[group].max(axis=0), self.told[group].max(axis=0)
            for own, theirs in zip((clock, seen), joined[name], strict=True):
                np.maximum(own, theirs, out=own)
            if step == 1:
                lag = 1 - int(group[0]) // len(self.places)
                made = self.groups.setdefault((lag, name), _Group(lag, group % len(self.places)))
                made.waiters.append(place.number)
                self.awaited[made.numbers] = True
        clock[place.worker] = self.at[me]
        silent = self.tags.may_be_silent(place.run.op)
        seen[place.worker] = self.published[place.worker] if silent else self.at[me]
        self.newest[place.worker] = me

    def _follow(self, place: _Place, clock: Ints, seen: Ints) -> None:
        """Into the clocks of a run goes what the run before it in the queue knew: a barrier of the worker
        lies between the two."""
        previous = self.newest[place.worker]
        if previous < 0:
            return
        clock[:], seen[:] = self.clock[previous], self.told[previous]
        seen[place.worker] = self.at[previous]
        before = self.places[previous % len(self.places)]
        if self.awaited[before.number] and not self.tags.may_be_silent(before.run.op):
            self.published[place.worker] = self.at[previous]

    def _note(self, me: int, place: _Place) -> None:
        """Leave the traces of a run for those that come after its op."""
        for region in self.reads[place.number]:
            self.last_read[self.cells.of(region), place.worker] = me
        for region in self.writes[place.number]:
            cells = self.cells.of(region)
            self.last_write[cells] = -1
            self.last_read[cells] = -1
            self.last_write[cells, place.worker] = me

    def _shift_caches(self, moved: Iterable[int]) -> None:
        """Positions of this step are past ones of the next: every row takes the latest of all rows."""
        for index in moved:
            grid = self.cells.grid(index)
            if self.buffers[index].kind is Kind.CACHE and grid.size:
                for table in (self.last_write, self.last_read):
                    table[grid] = table[grid].max(axis=0, keepdims=True)


def _union(found: list[Ints]) -> Ints:
    """All numbers of some arrays, sorted, each once."""
    numbers = np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)
    return (
        numbers[np.concatenate([[True], numbers[1:] != numbers[:-1]])] if numbers.size else numbers
    )


def _assign_counters(
    places: list[_Place], groups: list[_Group], queues: list[list[Run]]
) -> tuple[tuple[Counter, ...], tuple[tuple[Run, ...], ...]]:
    """One counter per set of runs that is waited for as a whole.

    A run waits for one group of an op and step at most, so runs that are in the same groups are those
    that the same runs wait for.
    """
    member: dict[int, list[int]] = defaultdict(list)  # run to groups
    for index, group in enumerate(groups):
        for number in group.numbers.tolist():
            member[number].append(index)
    classes: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for number in sorted(member):
        classes[places[number].run.op, tuple(member[number])].append(number)
    signal: dict[int, int] = {}
    waits: dict[int, list[Wait]] = defaultdict(list)
    counters: list[Counter] = []
    for (_, among), numbers in classes.items():
        counter = len(counters)
        counters.append(Counter(len(numbers)))
        signal.update(dict.fromkeys(numbers, counter))
        for group in (groups[index] for index in among):
            for waiter in group.waiters:
                waits[waiter].append(Wait(counter, len(numbers), group.lag))
    out = [list(queue) for queue in queues]
    for p in places:
        out[p.worker][p.position] = replace(
            p.run, waits=tuple(sorted(waits[p.number])), signal=signal.get(p.number, -1)
        )
    return tuple(counters), tuple(map(tuple, out))
