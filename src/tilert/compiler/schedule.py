"""Runs onto workers: consecutive tiles of each op, so that every worker moves about the same time.

The balance carries over op borders: a worker that got more of one op gets less of the next, which
is what matters when weights are streamed ahead of the hand-offs. Where hand-offs are what a step waits
for, an op should end early everywhere: each op is dealt out evenly for itself where a machine asks for it,
and where weights are chosen at run time, for nobody can stream past a choice that all wait for.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tilert.ir.machine import Machine
from tilert.ir.program import NONE, Buffer, Op, Program, Run

TYPICAL_PAST = 512  # positions assumed in the cache when costs are weighed


def tile_seconds(op: Op, lo: int, hi: int, itemsize: int, machine: Machine) -> float:
    """Estimated time of tiles [lo, hi) on one worker while all workers are busy."""
    cost = op.cost(lo, hi, itemsize, TYPICAL_PAST)
    share = machine.read_bandwidth / machine.workers_per_device
    return max((cost.bytes + cost.cache_bytes) / share, cost.flops / machine.worker_flops) + 1e-9


def schedule(machine: Machine, buffers: tuple[Buffer, ...], ops: tuple[Op, ...]) -> list[list[Run]]:
    """Queues of runs without waits, in op order, with their ring tickets."""
    sizes = Program(machine, 1, 1, 1, 1, buffers, ops, (), ())  # only to ask for operand sizes
    tickets = [0 if machine.slots else -1] * machine.workers
    load = np.zeros(machine.workers)
    queues: list[list[Run]] = [[] for _ in range(machine.workers)]
    chosen = machine.slots > 0 and any(op.choice != NONE for op in ops)
    for index, op in enumerate(ops):
        itemsize = sizes.weight_itemsize(op)
        seconds = np.asarray([tile_seconds(op, t, t + 1, itemsize, machine) for t in _samples(op)])
        if len(seconds) < op.tiles:  # a long uniform op: all tiles but the last cost the same
            seconds = np.append(np.full(op.tiles - 1, seconds[0]), seconds[-1])
        # A tile without weights takes mostly latency, which its bytes and flops do not tell: two of them
        # on one worker would take twice as long.
        alone = machine.slots and op.tiles <= machine.workers and not _uniform(op)
        even = alone or machine.even or chosen
        ranges = _evenly(op.tiles, load) if even else _ranges(seconds, load)
        for worker, (lo, hi) in enumerate(ranges):
            if lo < hi:
                queues[worker].append(Run(index, lo, hi, ring=tickets[worker]))
                if machine.slots:
                    tickets[worker] += sizes.ring_units(op, lo, hi)
                load[worker] += seconds[lo:hi].sum()
        load -= load.min()
    return queues


def _uniform(op: Op) -> bool:
    """True for ops whose tiles all cost the same and mostly read weights."""
    return op.weight_rows(0, 1) > 0


def _evenly(tiles: int, load: np.ndarray) -> list[tuple[int, int]]:
    """As many tiles for each worker; what is left over, one for each of the least loaded ones."""
    each, left_over = divmod(tiles, len(load))
    counts = np.full(len(load), each)
    counts[np.argsort(load, kind="stable")[:left_over]] += 1
    return list(pairwise([0, *np.cumsum(counts).tolist()]))


def _samples(op: Op) -> list[int]:
    return [0, op.tiles - 1] if _uniform(op) and op.tiles > 2 else list(range(op.tiles))


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
