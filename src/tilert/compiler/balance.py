"""What ops cost, and how many workers each op of a level gets.

A *level* is a few consecutive ops of which none needs another. Where every op pays much before its first
tile (its code comes from memory, it makes x, its workers meet), a worker had better run one op of a level
than a part of each: then the level pays once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tilert.ir.machine import Machine
from tilert.ir.program import NONE, Kind, Op, Program
from tilert.ops import ExpertDown, ExpertGate, Linear

TYPICAL_PAST = 512  # positions assumed in the cache when costs are weighed
# Positions at which a level is weighed: below what an indexer selects, where its ops do nothing, and beyond.
PASTS = (TYPICAL_PAST, 32768)
# What an op takes beside its bytes, in seconds, where a step's code is cold; from the stamps of one rank of
# DeepSeek-V3.2, for one token and for four (docs/log.md).
OPENING = 2.5e-6  # of a run, before its first tile
WORD = 0.4e-9  # more of it for each word of a product's x, which every worker makes for itself
TILE = 0.2e-6  # of a tile of a product, however little it reads: its warps meet
TOKEN = 0.45e-6  # more of it for each further token of the step: 448 tiles on 2 workers took 350 us with four
LATENCY = 1e-6  # of a tile without weights


@dataclass(frozen=True, slots=True)
class Work:
    """An op as far as dealing goes: its tiles, and at each of PASTS the seconds of a run's opening and of a
    tile."""

    tiles: int
    times: tuple[tuple[float, float], ...]

    def end(self, tiles: int) -> float:
        """Seconds of a run of so many tiles, at the past where they take longest."""
        return max(opening + tiles * each for opening, each in self.times)

    def until(self, end: float) -> int:
        """Tiles of a run that takes no longer."""
        return min(math.floor((end - opening) / each + 1e-6) for opening, each in self.times)

    def seconds(self, tiles: int) -> list[float]:
        """Seconds of a run of so many tiles, at each past."""
        return [opening + tiles * each for opening, each in self.times]


def dealt_by_op(machine: Machine, ops: Sequence[Op]) -> bool:
    """True when each op is dealt out evenly for itself, as hand-offs decide what a step takes: where the
    machine says so, and where weights are chosen at run time, past which nobody can stream."""
    return machine.even or (machine.slots > 0 and any(op.choice != NONE for op in ops))


def tile_seconds(
    op: Op, lo: int, hi: int, itemsize: int, machine: Machine, past: int = TYPICAL_PAST
) -> float:
    """Estimated time of tiles [lo, hi) on one worker while all workers are busy."""
    cost = op.cost(lo, hi, itemsize, past)
    share = machine.read_bandwidth / machine.workers_per_device
    return max((cost.bytes + cost.cache_bytes) / share, cost.flops / machine.worker_flops) + 1e-9


def uniform(op: Op) -> bool:
    """True for ops whose tiles all cost the same and mostly read weights."""
    return op.weight_rows(0, 1) > 0


def work(op: Op, program: Program) -> Work:
    """The op's tiles, and what they take in the mean. program: tells of operands and the machine."""
    itemsize, machine = program.weight_itemsize(op), program.machine
    each = [tile_seconds(op, 0, op.tiles, itemsize, machine, past) / op.tiles for past in PASTS]
    if not uniform(op):
        return Work(op.tiles, tuple((OPENING, max(s, LATENCY)) for s in each))
    words = sum(r.size for r in op.reads(0, 1) if program.buffers[r.buffer].kind is Kind.WORK)
    nothing = [op.cost(0, op.tiles, itemsize, past).bytes == 0 for past in PASTS]
    openings = [OPENING + WORD * words * (not idle) for idle in nothing]
    assert isinstance(op, Linear | ExpertGate | ExpertDown)
    least = TILE + TOKEN * (op.rows - 1)
    tiles = [s if idle else max(s, least) for s, idle in zip(each, nothing, strict=True)]
    return Work(op.tiles, tuple(zip(openings, tiles, strict=True)))


@lru_cache(4096)
def shares(level: tuple[Work, ...], workers: int) -> tuple[int, ...]:
    """How many workers each op of a level gets so that the last one ends soonest; empty when that takes
    longer than one op after another, each on all workers."""
    counts = _fewest(level, workers)
    if len(level) == 1 or not counts or _beside(level, counts) >= _in_turn(level, workers):
        return ()
    for _ in range(workers - sum(counts)):  # who is left over helps where most is to do
        short = [i for i, w in enumerate(level) if counts[i] < w.tiles]
        if not short:
            break
        most = max(short, key=lambda i: level[i].end(-(-level[i].tiles // counts[i])))
        counts[most] += 1
    return tuple(counts)


@lru_cache(4096)
def level_seconds(level: tuple[Work, ...], workers: int) -> float:
    """Seconds of a level, summed over PASTS, as it is dealt out."""
    counts = shares(level, workers)
    return _beside(level, counts) if counts else _in_turn(level, workers)


def _fewest(level: tuple[Work, ...], workers: int) -> list[int]:
    """As few workers for each op as let all of them end as soon as possible; empty when there are too few.

    The level ends when some worker has done a whole number of tiles: the least such time for which the
    workers suffice.
    """
    if len(level) > workers:
        return []
    ends = sorted({w.end(n) for w in level for n in range(1, w.tiles + 1)})
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(_needed(w, ends[middle]) for w in level) <= workers:
            high = middle
        else:
            low = middle + 1
    return [int(_needed(w, ends[low])) for w in level]


def _needed(work: Work, end: float) -> float:
    """Workers that do all tiles until `end`."""
    each = work.until(end)
    return -(-work.tiles // each) if each > 0 else math.inf


def _beside(level: tuple[Work, ...], counts: Sequence[int]) -> float:
    ends = [w.seconds(-(-w.tiles // n)) for w, n in zip(level, counts, strict=True)]
    return sum(max(each) for each in zip(*ends, strict=True))


def _in_turn(level: tuple[Work, ...], workers: int) -> float:
    return sum(sum(w.seconds(-(-w.tiles // workers))) for w in level)
