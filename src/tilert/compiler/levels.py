"""The order of ops: levels of ops that do not need each other, few and of even length.

Dependencies are those of regions: read after write, write after read, write after write, so the sums that
are added to one buffer stay in their order. The longest chain decides how many levels there are. What is
not on it goes as late as its readers allow (which lets what it reads go late, too, beside ops that leave
workers idle), then to that level of those left to it where it adds least. What nobody in the pass reads
(keys and values put into a cache) follows at once behind what it reads, for itself: it stands beside the
chain anyway.

Only where each op is dealt out for itself (balance.py) and machines have rings: a CPU keeps the code of all
ops in its caches and hands off in a fifth of a microsecond, so nothing is gained there by running an op
on a part of its cores. Where a whole step is dealt out in bytes, order and balance are left as they are.

An op that makes positions ends a pass: no op crosses it, for rows of caches count anew behind it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from tilert.compiler.balance import Work, dealt_by_op, level_seconds, work
from tilert.ir.machine import Machine
from tilert.ir.program import NONE, Buffer, Kind, Op, Program, Region, hulls, several_passes

ROUNDS = 2  # of looking for a better level for each op


def arrange(
    machine: Machine, buffers: Sequence[Buffer], ops: Sequence[Op]
) -> tuple[list[Op], list[int]]:
    """The ops in an order of levels, and the level of each. Elsewhere each op is a level of its own."""
    if not (machine.slots and dealt_by_op(machine, ops)):
        return list(ops), list(range(len(ops)))
    sizes = Program(machine, 1, 1, 1, 1, tuple(buffers), tuple(ops), (), ())
    works = [work(op, sizes) for op in ops]
    needs, level, first = needed(buffers, ops), [0] * len(ops), 0
    for lo, hi in pairwise(_borders(ops)):
        found = _Pass([{n - lo for n in needs[i] if n >= lo} for i in range(lo, hi)],
                      works[lo:hi], machine.workers).levels()  # fmt: skip
        level[lo:hi] = [first + each for each in found]
        first += max(found) + 1
    order = sorted(range(len(ops)), key=lambda i: (level[i], i))
    return [ops[i] for i in order], [level[i] for i in order]


def needed(buffers: Sequence[Buffer], ops: Sequence[Op]) -> list[set[int]]:
    """For each op those before it that it needs; not all that are implied by others."""
    accesses = [
        (list(dict.fromkeys(op.reads(0, op.tiles))), _joined(op.writes(0, op.tiles))) for op in ops
    ]
    changing = {r.buffer for _, writes in accesses for r in writes}
    moving = several_passes(ops)  # then rows of caches do not count from one position

    def seen(regions: list[Region]) -> list[Region]:
        whole = {b for b in changing if moving and buffers[b].kind is Kind.CACHE}
        return [
            r._replace(row_lo=0, row_hi=1) if r.buffer in whole else r
            for r in regions if r.buffer in changing
        ]  # fmt: skip

    past: dict[int, list[tuple[Region, int, bool]]] = defaultdict(list)  # region, op, does it write
    found: list[set[int]] = []
    for index, (reads, writes) in enumerate(accesses):
        reads, writes = seen(reads), seen(writes)
        found.append({
            op for r in reads for q, op, written in past[r.buffer] if written and q.overlaps(r)
        } | {op for r in writes for q, op, _ in past[r.buffer] if q.overlaps(r)})  # fmt: skip
        for r in writes:  # who needs what was there needs this op, which has waited for it
            past[r.buffer] = [a for a in past[r.buffer] if not _inside(a[0], r)]
        for written, regions in ((False, reads), (True, writes)):
            for r in regions:
                past[r.buffer].append((r, index, written))
    return found


def side_by_side(program: Program) -> list[list[int]]:
    """The ops of a program in groups that run at the same time: neighbours in the table of which none needs
    another, and no worker runs two. What only fills a cache stands for itself, beside whatever it is."""
    workers = [set[int]() for _ in program.ops]
    kinds = [{program.buffers[r.buffer].kind for r in op.writes(0, op.tiles)} for op in program.ops]
    for worker, queue in enumerate(program.queues):
        for run in queue:
            workers[run.op].add(worker)
    groups: list[list[int]] = []
    for op, needs in enumerate(needed(program.buffers, program.ops)):
        last = groups[-1] if groups else []
        filling = any(kinds[each] == {Kind.CACHE} for each in (op, *last))
        apart = filling or any(other in needs or workers[other] & workers[op] for other in last)
        if last and not apart:
            last.append(op)
        else:
            groups.append([op])
    return groups


def _joined(writes: Sequence[Region]) -> list[Region]:
    """What an op writes, regions that do not overlap; one of each buffer where they fill a rectangle."""
    regions = list(dict.fromkeys(writes))
    found: list[Region] = []
    for whole in hulls(regions):
        each = [r for r in regions if r.buffer == whole.buffer]
        found += [whole] if sum(r.size for r in each) == whole.size else each
    return found


def _inside(a: Region, b: Region) -> bool:
    return (
        b.row_lo <= a.row_lo
        and a.row_hi <= b.row_hi
        and b.col_lo <= a.col_lo
        and a.col_hi <= b.col_hi
    )


def _borders(ops: Sequence[Op]) -> list[int]:
    """Where parts of the table begin that no op leaves, and its end: behind each op that makes positions,
    and that op alone."""
    positions = {getattr(op, "positions", NONE) for op in ops} - {NONE}
    makers = [
        i for i, op in enumerate(ops) if any(r.buffer in positions for r in op.writes(0, op.tiles))
    ]
    return sorted({0, len(ops), *makers, *(i + 1 for i in makers)})


class _Pass:
    """Levels of consecutive ops, which are numbered from 0 here."""

    def __init__(self, needs: list[set[int]], works: list[Work], workers: int) -> None:
        self.needs, self.works, self.workers = needs, works, workers
        self.readers: list[set[int]] = [set() for _ in needs]
        for op, earlier in enumerate(needs):
            for other in earlier:
                self.readers[other].add(op)
        self.level = [0] * len(needs)
        self.members: dict[int, set[int]] = defaultdict(set)

    def levels(self) -> list[int]:
        """The level of each op."""
        self._as_early_as_possible()
        self._as_late_as_possible()
        read = [op for op, readers in enumerate(self.readers) if readers]
        for op in read:
            self.members[self.level[op]].add(op)
        for _ in range(ROUNDS):
            for op in read:
                self._settle(op)
        return [2 * level + (not self.readers[op]) for op, level in enumerate(self.level)]

    def _as_early_as_possible(self) -> None:
        for op in range(len(self.needs)):
            self.level[op] = self._earliest(op)

    def _as_late_as_possible(self) -> None:
        for op in reversed(range(len(self.needs))):
            if self.readers[op]:
                self.level[op] = self._latest(op)

    def _earliest(self, op: int) -> int:
        return max((self.level[other] + 1 for other in self.needs[op]), default=0)

    def _latest(self, op: int) -> int:
        return min(self.level[other] - 1 for other in self.readers[op])

    def _settle(self, op: int) -> None:
        """Move an op to the level where it adds least; of several such to the latest."""
        here = self.level[op]
        self.members[here].remove(op)
        added = {
            level: self._seconds(self.members[level] | {op}) - self._seconds(self.members[level])
            for level in range(self._earliest(op), self._latest(op) + 1)
        }
        least = min(added.values()) + 1e-9
        self.level[op] = max(level for level, seconds in added.items() if seconds <= least)
        self.members[self.level[op]].add(op)

    def _seconds(self, ops: set[int]) -> float:
        if not ops:
            return 0.0
        return level_seconds(tuple(self.works[op] for op in sorted(ops)), self.workers)
