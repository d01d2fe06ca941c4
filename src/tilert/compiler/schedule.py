"""Runs onto workers: consecutive tiles of each op, so that every worker moves about the same time.

The balance carries over op borders: a worker that got more of one op gets less of the next, which
is what matters when weights are streamed ahead of the hand-offs. Where hand-offs are what a step waits
for, an op should end early everywhere: each op is dealt out evenly for itself where a machine asks for it,
and where weights are chosen at run time, for nobody can stream past a choice that all wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np

from tilert.compiler.balance import Work, dealt_by_op, shares, tile_seconds, uniform, work
from tilert.ir.machine import Machine
from tilert.ir.program import Buffer, Op, Program, Run


def schedule(
    machine: Machine, buffers: tuple[Buffer, ...], ops: tuple[Op, ...], levels: Sequence[int]
) -> list[list[Run]]:
    """Queues of runs without waits, in op order, with their ring tickets; levels: of each op."""
    deal = _Deal(machine, buffers, ops)
    for _, numbered in groupby(enumerate(ops), key=lambda each: levels[each[0]]):
        deal.level(list(numbered))
    return deal.queues


class _Deal:
    """Queues under construction, and how much every worker has so far."""

    def __init__(self, machine: Machine, buffers: tuple[Buffer, ...], ops: tuple[Op, ...]) -> None:
        self.machine = machine
        # Only to ask for operand sizes.
        self.sizes = Program(machine, 1, 1, 1, 1, buffers, ops, (), ())
        self.by_op = dealt_by_op(machine, ops)
        self.tickets = [0 if machine.slots else -1] * machine.workers
        self.load = np.zeros(machine.workers)
        self.queues: list[list[Run]] = [[] for _ in range(machine.workers)]
        # Of levels of several ops: who does what. Workers meet the same code in every layer then, and
        # have it at hand if it fits.
        self.known: dict[tuple[Work, ...], list[list[tuple[int, int]]]] = {}

    def level(self, ops: list[tuple[int, Op]]) -> None:
        """Deal out the ops of a level."""
        seconds = [self._seconds(op) for _, op in ops]
        beside = self._ranges_beside([op for _, op in ops]) if len(ops) > 1 else []
        for i, (index, op) in enumerate(ops):
            if beside:
                ranges = beside[i]
            else:
                # A tile without weights takes mostly latency, which its bytes and flops do not tell: two
                # of them on one worker would take twice as long. By its flops, 256 heads of `Combine`
                # were four workers'.
                alone = self.machine.slots and not uniform(op)
                even = alone or self.by_op
                ranges = _evenly(op.tiles, self.load) if even else _ranges(seconds[i], self.load)
            self._put(index, op, ranges, seconds[i])

    def _seconds(self, op: Op) -> np.ndarray:
        """Of each tile."""
        itemsize = self.sizes.weight_itemsize(op)
        found = [tile_seconds(op, t, t + 1, itemsize, self.machine) for t in _samples(op)]
        if len(found) < op.tiles:  # a long uniform op: all tiles but the last cost the same
            found = [found[0]] * (op.tiles - 1) + [found[-1]]
        return np.asarray(found)

    def _put(self, index: int, op: Op, ranges: list[tuple[int, int]], seconds: np.ndarray) -> None:
        for worker, (lo, hi) in enumerate(ranges):
            if lo < hi:
                self.queues[worker].append(Run(index, lo, hi, ring=self.tickets[worker]))
                if self.machine.slots:
                    self.tickets[worker] += self.sizes.ring_units(op, lo, hi)
                self.load[worker] += seconds[lo:hi].sum()
        self.load -= self.load.min()

    def _ranges_beside(self, ops: list[Op]) -> list[list[tuple[int, int]]]:
        """Ranges of tiles by worker for each op of a level, every worker with tiles of one op at most; none
        where that would take longer.

        The op whose workers have most to do takes the least loaded ones.
        """
        works = tuple(work(op, self.sizes) for op in ops)
        if works in self.known:
            return self.known[works]
        counts = shares(works, self.machine.workers)
        if not counts:
            return []
        seconds = [w.end(-(-w.tiles // n)) for w, n in zip(works, counts, strict=True)]
        free = np.argsort(self.load, kind="stable")
        found = [[(0, 0)] * len(free) for _ in works]
        for i in sorted(range(len(works)), key=lambda i: -seconds[i]):
            mine, free = np.sort(free[: counts[i]]), free[counts[i] :]
            for worker, tiles in zip(mine, _evenly(works[i].tiles, self.load[mine]), strict=True):
                found[i][worker] = tiles
        self.known[works] = found
        return found


def _evenly(tiles: int, load: np.ndarray) -> list[tuple[int, int]]:
    """As many tiles for each worker; what is left over, one for each of the least loaded ones."""
    each, left_over = divmod(tiles, len(load))
    counts = np.full(len(load), each)
    counts[np.argsort(load, kind="stable")[:left_over]] += 1
    return list(pairwise([0, *np.cumsum(counts).tolist()]))


def _samples(op: Op) -> list[int]:
    return [0, op.tiles - 1] if uniform(op) and op.tiles > 2 else list(range(op.tiles))


def _ranges(seconds: np.ndarray, load: np.ndarray) -> list[tuple[int, int]]:
    """Cut the tiles into one consecutive range per worker so that load plus new work is level.

    The least loaded workers are filled up to the level that the total work reaches. Borders fall on
    the tile border nearest to the ideal one.
    """
    total = seconds.sum()
    rising = np.sort(load)
    # Work that lifts every worker below to the load of each; those that the total reaches take part.
    filled = rising * np.arange(1, len(load) + 1) - np.cumsum(rising)
    count = int(np.searchsorted(filled, float(total), side="right"))
    level = (total + rising[:count].sum()) / count
    quota = np.maximum(level - load, 0)
    ends = np.concatenate([[0], np.cumsum(seconds)])
    wanted = np.cumsum(quota)
    cuts = np.searchsorted(ends, wanted - 1e-15)
    lower = np.maximum(cuts - 1, 0)
    cuts = np.where(
        wanted - ends[lower] < ends[np.minimum(cuts, len(seconds))] - wanted, lower, cuts
    )
    cuts = np.maximum.accumulate(np.clip(cuts, 0, len(seconds)))
    cuts[-1] = len(seconds)
    borders = [0, *cuts.tolist()]
    return list(pairwise(borders))
