"""What happens before what in a program: clocks of all runs, and the first conflict they leave open.

*Happens before.* Run p happens before run w when p stands earlier in the same queue, or w waits for a
signal that cannot have come without p, or through a chain of these. A wait for `threshold` of `total`
signals proves the first `threshold - (total - n)` of the n producers in each worker's queue: the other
workers can have given at most total - n. For threshold == total these are all producers; for producers
in one queue they are the first `threshold`; "any two of four" proves nothing. This holds as long as no
producer signals for step s + 1 while another still owes step s, because a counter does not tell steps
apart; the rule `overtaking` proves that.

*Two steps are enough.* Waits reach back at most one step, queues continue across steps, and every step
is like any other, so a chain from step s to step s + 1 stays within these two and looks the same for
every s. When two runs X and Y conflict, X in step s happens before Y in step s + 1 (checked), and Y in
step s + 1 before Y in any later step (queue order): steps further apart are ordered too.

*What is seen.* A signal without order (ir/tags.py) says that a run is done, not that its words can be seen.
Words with tags need no more. Others can be seen once their own run, or one behind it in its queue, has
signalled with order, and by all who know of that: a second clock counts only such chains.

*Cache rows* move from step to step: the rows [0, T) of one step lie somewhere in the past rows of the
next, and how far they move is known only at run time. Between the steps all rows of a column therefore
take the latest access of any of its rows, which can only add demands. The same goes for ops of one step
that count the rows by other positions (see cache_frames).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tilert.ir.program import Kind, Program, Region, Run, Wait
from tilert.ir.regions import Cells, cache_moves
from tilert.ir.tags import Tags, derive

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Place:
    """A run with its worker and its position in that worker's queue."""

    worker: int
    position: int
    run: Run


class Facts:
    """What several rules need of one program, each computed when it is first asked for.

    Runs are numbered in the order of the op table, then of their tiles. Moments count the runs that a
    worker has completed: the run at `position` of step s is complete at s * len(queue) + position + 1.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.lengths = [len(queue) for queue in program.queues]

    @cached_property
    def places(self) -> list[Place]:
        """All runs by number."""
        queues = enumerate(self.program.queues)
        flat = [Place(w, i, run) for w, queue in queues for i, run in enumerate(queue)]
        return sorted(flat, key=lambda p: (p.run.op, p.run.lo, p.worker, p.position))

    @cached_property
    def numbers(self) -> list[list[int]]:
        """Run numbers by worker and position."""
        numbers = [[-1] * length for length in self.lengths]
        for number, place in enumerate(self.places):
            numbers[place.worker][place.position] = number
        return numbers

    @cached_property
    def of_op(self) -> list[list[int]]:
        """Run numbers of each op."""
        runs: list[list[int]] = [[] for _ in self.program.ops]
        for number, place in enumerate(self.places):
            runs[place.run.op].append(number)
        return runs

    @cached_property
    def reads(self) -> list[list[Region]]:
        """Regions that each run reads."""
        ops = self.program.ops
        return [ops[p.run.op].reads(p.run.lo, p.run.hi) for p in self.places]

    @cached_property
    def writes(self) -> list[list[Region]]:
        """Regions that each run writes."""
        ops = self.program.ops
        return [ops[p.run.op].writes(p.run.lo, p.run.hi) for p in self.places]

    @cached_property
    def changing(self) -> set[int]:
        """Buffers that some run writes; nothing else can be raced for."""
        return {r.buffer for regions in self.writes for r in regions}

    @cached_property
    def cells(self) -> Cells:
        """Cells of all regions in buffers that change, and in activations that somebody reads."""
        kinds = [b.kind for b in self.program.buffers]
        seen = {r for regions in (*self.reads, *self.writes) for r in regions}
        seen = {r for r in seen if r.buffer in self.changing or kinds[r.buffer] is not Kind.WEIGHT}
        return Cells([*seen, *(self.of_step(r) for r in seen)])

    def of_step(self, r: Region) -> Region:
        """The part of a region that this step must have made: of a cache only the step's own rows."""
        if self.program.buffers[r.buffer].kind is not Kind.CACHE:
            return r
        return r._replace(row_lo=max(r.row_lo, 0), row_hi=max(r.row_hi, 0))

    @cached_property
    def moves(self) -> list[list[int]]:
        """For each op the caches whose rows move before it; see cache_moves."""
        return cache_moves(self.program.buffers, self.program.ops)

    @cached_property
    def producers(self) -> list[dict[int, list[int]]]:
        """For each counter: worker -> runs that signal it, in queue order."""
        found: list[dict[int, list[int]]] = [{} for _ in self.program.counters]
        for worker, numbers in enumerate(self.numbers):
            for number in numbers:
                signal = self.places[number].run.signal
                if signal >= 0:
                    found[signal].setdefault(worker, []).append(number)
        return found

    @cached_property
    def order(self) -> list[int]:
        """One legal order of a step, as run numbers; shorter than the table when the step gets stuck.

        Waits only ever become true and stay true, so whatever is ready may go first: every way to
        proceed completes the same set of runs. A launch of many steps can always go step by step
        (each counter then stands at a multiple of its total, and waits with lag 1 hold), hence a
        single step that completes proves that no launch deadlocks.
        """
        value = [0] * len(self.program.counters)
        asleep: dict[tuple[int, int], list[int]] = defaultdict(list)  # (counter, value) -> workers
        position = [0] * len(self.lengths)
        awake, done = list(range(len(self.lengths)))[::-1], list[int]()
        while awake:
            worker = awake.pop()
            queue = self.program.queues[worker]
            while position[worker] < len(queue):
                run = queue[position[worker]]
                late = next(
                    (w for w in run.waits if not w.lag and value[w.counter] < w.threshold), None
                )
                if late:
                    asleep[late.counter, late.threshold].append(worker)
                    break
                done.append(self.numbers[worker][position[worker]])
                position[worker] += 1
                if run.signal >= 0:
                    value[run.signal] += 1
                    awake += asleep.pop((run.signal, value[run.signal]), [])
        return done

    @cached_property
    def tags(self) -> Tags:
        """The words that say themselves whether they are there."""
        return derive(self.program)

    @cached_property
    def clock(self) -> Ints:
        """[step, run, worker]: the moment of `worker` that happens before the run has completed."""
        return self._clock()

    @cached_property
    def seen(self) -> Ints:
        """Likewise: the moment up to which all that `worker` has stored can be seen by the run."""
        return self._clock(self.tags.silent) if self.tags.writers else self.clock

    @cached_property
    def seen_sparing(self) -> Ints:
        """Likewise in steps in which nobody needs what some ops write."""
        return self._clock(self.tags.may_be_silent)

    def _clock(self, silent: Callable[[int], bool] | None = None) -> Ints:
        """silent: which ops signal without order. Such a signal, or none, tells of its own worker only what
        an ordered signal before it in the queue has told. What it tells of others could be seen before."""
        count, workers = len(self.places), len(self.lengths)
        clock = np.zeros((2, count, workers), np.int32)
        told = np.zeros_like(clock) if silent else clock
        for step in range(2):
            proven: dict[Wait, Ints] = {}
            for number in self.order:
                place, mine = self.places[number], clock[step, number]
                before = self._before(step, place)
                if before is not None:
                    mine[:] = clock[before]
                for wait in place.run.waits:
                    if step < wait.lag:
                        continue
                    if wait not in proven:
                        proven[wait] = told[step - wait.lag, self.proves(wait)].max(0, initial=0)
                    np.maximum(mine, proven[wait], out=mine)
                mine[place.worker] = self.moment(step, place)
                if silent is None:
                    continue
                told[step, number] = mine
                if place.run.signal < 0 or silent(place.run.op):
                    own = 0 if before is None else told[before][place.worker]
                    told[step, number, place.worker] = own
        return clock

    def _before(self, step: int, place: Place) -> tuple[int, int] | None:
        """Step and number of the run before in the queue; None for the first of all."""
        if place.position:
            return step, self.numbers[place.worker][place.position - 1]
        return (0, self.numbers[place.worker][-1]) if step else None

    def moment(self, step: int, place: Place) -> int:
        """When the run is complete, in moments of its worker."""
        return step * self.lengths[place.worker] + place.position + 1

    def proves(self, wait: Wait) -> list[int]:
        """Runs that must have signalled when the wait holds; the last such run of each worker."""
        total = self.program.counters[wait.counter].total
        last = list[int]()
        for runs in self.producers[wait.counter].values():
            sure = wait.threshold - (total - len(runs))
            if sure > 0:
                last.append(runs[sure - 1])
        return last

    @cached_property
    def conflict(self) -> tuple[str, str] | None:
        """The first pair of runs in conflict that is not ordered by the table: (rule, sentence)."""
        found = _Walk(self).first()
        if found is None:
            return None
        first, second = self.places[found.earlier], self.places[found.later]
        text = f"{self.name(first)} and {self.name(second)} both use {self.where(found.region)}"
        same = self.clock[1, found.earlier, second.worker] >= self.moment(1, second)
        if found.step and same:
            return "meaning", f"{text}; they run in this order's reverse, against the op table"
        when = "in the same step" if found.step else "the first in the step before"
        return "ordering", f"{text}, {when}; one of them writes, and nothing orders them"

    @cached_property
    def unseen(self) -> str | None:
        """The first pair of runs of which one needs words of the other that nothing makes visible to it."""
        found = _Walk(self, seen=True).first() if self.tags.writers else None
        if found is None and self.tags.spared:
            found = _Walk(self, seen=True, sparing=True).first()
        if found is None:
            return None
        first, second = self.places[found.earlier], self.places[found.later]
        return (
            f"{self.name(second)} uses {self.where(found.region)} of {self.name(first)}, but only signals"
            " without order lie between them, and the words have no tags"
        )

    def name(self, place: Place) -> str:
        """How messages name a run."""
        run = place.run
        known = 0 <= run.op < len(self.program.ops)
        kind = type(self.program.ops[run.op]).__name__.lower() if known else "?"
        return (
            f"worker {place.worker}, run {place.position} (o{run.op} {kind} [{run.lo}, {run.hi}))"
        )

    def where(self, r: Region) -> str:
        """How messages name a region."""
        name = self.program.buffers[r.buffer].label
        return f"b{r.buffer} '{name}' [{r.row_lo}:{r.row_hi}, {r.col_lo}:{r.col_hi}]"


@dataclass(frozen=True, slots=True)
class _Conflict:
    """Two runs by number of which the later one, in the second step, does not know the earlier one."""

    earlier: int
    later: int
    region: Region
    step: int  # of the earlier one


class _Walk:
    """Two steps in table order. For each cell and worker: the moment of its last write, and of its last
    access of any kind. A run must happen after what the table puts before it wherever they conflict.

    Runs of one op do not conflict (rule `partition`), so an op is handled at once. The first step only
    leaves its traces: conflicts within a step are found in the second.

    seen: what was written before must be seen as well, but where words have tags. sparing: in steps without
    the ops of which nobody needs what they write; who reads that all the same finds what was there.
    """

    def __init__(self, facts: Facts, *, seen: bool = False, sparing: bool = False) -> None:
        self.facts, self.seen = facts, seen
        self.clock = facts.seen_sparing if sparing else facts.seen if seen else facts.clock
        self.without = facts.tags.spared if sparing else frozenset[int]()
        shape = (facts.cells.count, len(facts.lengths))
        self.written, self.touched = np.zeros(shape, np.int32), np.zeros(shape, np.int32)

    def first(self) -> _Conflict | None:
        """None when all is well."""
        facts = self.facts
        for step in range(2):
            for op, (moved, runs) in enumerate(zip(facts.moves, facts.of_op, strict=True)):
                self._shift_caches(moved)
                if op in self.without:
                    continue
                reads, writes = (
                    self._by_region(table, runs) for table in (facts.reads, facts.writes)
                )
                before = self.written if self.seen else self.touched
                for regions, table in ((reads, self.written), (writes, before)) if step else ():
                    for region, users in regions.items():
                        if found := self._check(region, users, table):
                            return found
                for region, readers in reads.items():
                    cells = facts.cells.of(region)
                    self.touched[cells] = np.maximum(
                        self.touched[cells], self._moments(step, readers)
                    )
                for region, writers in writes.items():
                    self._overwrite(region, step, writers[0])
            self._shift_caches(range(len(facts.program.buffers)))
        return None

    def _by_region(self, table: list[list[Region]], runs: list[int]) -> dict[Region, list[int]]:
        groups: dict[Region, list[int]] = {}
        for number in runs:
            for region in table[number]:
                if region.buffer in self.facts.changing:
                    groups.setdefault(region, []).append(number)
        return groups

    def _moments(self, step: int, runs: list[int]) -> Ints:
        latest = np.zeros(len(self.facts.lengths), np.int32)
        for number in runs:
            place = self.facts.places[number]
            latest[place.worker] = max(latest[place.worker], self.facts.moment(step, place))
        return latest

    def _overwrite(self, region: Region, step: int, writer: int) -> None:
        cells, place = self.facts.cells.of(region), self.facts.places[writer]
        for table in (self.written, self.touched):
            table[cells] = 0  # whoever comes after this write comes after what came before it
            table[cells, place.worker] = self.facts.moment(step, place)

    def _shift_caches(self, moved: Iterable[int]) -> None:
        for index in moved:
            grid = self.facts.cells.grid(index)
            if self.facts.program.buffers[index].kind is Kind.CACHE and grid.size:
                for table in (self.written, self.touched):
                    table[grid] = table[grid].max(axis=0, keepdims=True)

    def _check(self, region: Region, runs: list[int], table: Ints) -> _Conflict | None:
        """Whether each run of the second step knows all earlier accesses to the region."""
        facts = self.facts
        if self.seen and region.buffer in facts.tags.writers:
            return None
        needed = table[facts.cells.of(region)].max(axis=0, initial=0)
        missing = np.argwhere(needed > self.clock[1, runs])
        if not missing.size:
            return None
        index, worker = int(missing[0, 0]), int(missing[0, 1])
        step, position = divmod(int(needed[worker]) - 1, facts.lengths[worker])
        return _Conflict(facts.numbers[worker][position], runs[index], region, step)
