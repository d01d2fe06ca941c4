"""Waits and counters from the regions that runs read and write.

The ops are walked in table order through two steps. For each cell of memory the pass knows, per
worker, the last run that wrote and the last that read it; a run needs the writers of what it reads,
and the writers and readers of what it writes. Needs that other needs already imply are dropped
(vector clocks tell). Runs of one op that the same set of runs waits for share a counter. A need in
the step before becomes a wait with lag 1.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from tilert.ir.program import Buffer, Counter, Kind, Op, Region, Run, Wait
from tilert.ir.regions import Cells

Need = tuple[int, int]  # (op, lag)


@dataclass(frozen=True, slots=True)
class _Place:
    """A run with its number in op order, its worker and its position in that worker's queue."""

    number: int
    worker: int
    position: int
    run: Run


def depend(
    buffers: tuple[Buffer, ...], ops: tuple[Op, ...], queues: list[list[Run]]
) -> tuple[tuple[Counter, ...], tuple[tuple[Run, ...], ...]]:
    """Counters, and the queues with waits and signals."""
    places = _in_op_order(queues)
    needs = _Walk(buffers, ops, queues, places).needs()
    return _assign_counters(places, needs, queues)


def _in_op_order(queues: list[list[Run]]) -> list[_Place]:
    flat: list[tuple[int, int, int, int, Run]] = [
        (r.op, r.lo, w, i, r) for w, queue in enumerate(queues) for i, r in enumerate(queue)
    ]
    flat.sort(key=lambda item: item[:4])
    return [_Place(n, w, i, r) for n, (_, _, w, i, r) in enumerate(flat)]


class _Walk:
    """Two steps in op order, collecting for each run of the second step what it must wait for."""

    def __init__(
        self,
        buffers: tuple[Buffer, ...],
        ops: tuple[Op, ...],
        queues: list[list[Run]],
        places: list[_Place],
    ) -> None:
        self.buffers, self.places, self.lengths = buffers, places, [len(q) for q in queues]
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
        self.newest = [-1] * len(queues)  # number of the latest run of each worker

    @staticmethod
    def _changing(regions: list[Region], changing: set[int]) -> list[Region]:
        return [r for r in regions if r.buffer in changing]

    def needs(self) -> list[dict[Need, list[int]]]:
        """Per run: (op, lag) -> numbers of the runs of that op to wait for."""
        n = len(self.places)
        found: list[dict[Need, list[int]]] = []
        for step in range(2):
            for place in self.places:
                wanted = self._visit(step, place)
                if step == 1:
                    found.append(wanted)
            self._shift_caches()
        assert len(found) == n
        return found

    def _visit(self, step: int, place: _Place) -> dict[Need, list[int]]:
        n, me = len(self.places), step * len(self.places) + place.number
        read = [self.cells.of(r) for r in self.reads[place.number]]
        written = [self.cells.of(r) for r in self.writes[place.number]]
        earlier = [self.last_write[c] for c in (*read, *written)] + [
            self.last_read[c] for c in written
        ]
        flat = np.concatenate([e.ravel() for e in earlier])
        numbers = np.unique(flat[flat >= 0])
        clock = self.clock[me]
        previous = self.newest[place.worker]
        if previous >= 0:
            clock[:] = self.clock[previous]
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number in map(int, numbers):
            before, index = divmod(number, n)
            groups[before, self.places[index].run.op].append(number)
        wanted: dict[Need, list[int]] = {}
        for before, op in sorted(groups, reverse=True):
            group = groups[before, op]
            if all(self._at(k) <= clock[self.places[k % n].worker] for k in group):
                continue
            wanted[op, step - before] = [k % n for k in group]
            np.maximum(clock, self.clock[group].max(axis=0), out=clock)
        clock[place.worker] = self._at(me)
        self.newest[place.worker] = me
        for cells in read:
            self.last_read[cells, place.worker] = me
        for cells in written:
            self.last_write[cells] = -1
            self.last_read[cells] = -1
            self.last_write[cells, place.worker] = me
        return wanted

    def _at(self, number: int) -> int:
        """Position of a run in its worker's queue, counted through both steps."""
        step, index = divmod(number, len(self.places))
        place = self.places[index]
        return step * self.lengths[place.worker] + place.position

    def _shift_caches(self) -> None:
        """Positions of this step are past ones of the next: every row takes the latest of all rows."""
        for index, buffer in enumerate(self.buffers):
            grid = self.cells.grid(index)
            if buffer.kind is Kind.CACHE and grid.size:
                for table in (self.last_write, self.last_read):
                    table[grid] = table[grid].max(axis=0, keepdims=True)


def _assign_counters(
    places: list[_Place], needs: list[dict[Need, list[int]]], queues: list[list[Run]]
) -> tuple[tuple[Counter, ...], tuple[tuple[Run, ...], ...]]:
    """One counter per set of runs that is waited for as a whole."""
    waiters: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for waiter, wanted in enumerate(needs):
        for (_, lag), numbers in wanted.items():
            for number in numbers:
                waiters[number].add((waiter, lag))
    classes: dict[tuple[int, frozenset[tuple[int, int]]], list[int]] = defaultdict(list)
    for number in sorted(waiters):
        classes[places[number].run.op, frozenset(waiters[number])].append(number)
    signal: dict[int, int] = {}
    waits: dict[int, list[Wait]] = defaultdict(list)
    counters: list[Counter] = []
    for (_, who), numbers in classes.items():
        counter = len(counters)
        counters.append(Counter(len(numbers)))
        signal.update(dict.fromkeys(numbers, counter))
        for waiter, lag in who:
            waits[waiter].append(Wait(counter, len(numbers), lag))
    out = [list(queue) for queue in queues]
    for p in places:
        out[p.worker][p.position] = replace(
            p.run, waits=tuple(sorted(waits[p.number])), signal=signal.get(p.number, -1)
        )
    return tuple(counters), tuple(map(tuple, out))
