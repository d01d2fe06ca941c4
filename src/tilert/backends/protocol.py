"""The protocol of one launch: queues, waits, signals, and steps that run into each other; no numbers.

The interpreter computes on top of it. Walked alone, without what the runs compute, it says of any program
whether all its steps can be made, and it says so of programs whose weights are not at hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tilert.ir.program import NONE, Program, Run, Wait
from tilert.ir.tags import Tags, derive

# In place of a counter, when it was words (kByTag), a unit of the stream (kByUnit) or the run itself (kByRun)
# that did not come.
BY_TAG, BY_UNIT, BY_RUN = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD


class Stuck(NamedTuple):
    """A wait that does not hold: `run` counts from the start of the worker's queue; `have` and `want`
    are signals of the counter since the launch began."""

    worker: int
    run: int
    step: int
    counter: int
    have: int
    want: int


class DeadlockError(AssertionError):
    """Runs are left and no worker can proceed; `stuck` has every wait that does not hold."""

    def __init__(self, program: Program, stuck: list[Stuck]) -> None:
        super().__init__("; ".join(
            f"{run_name(program, s.worker, s.run)} in step {s.step} waits: c{s.counter} has {s.have},"
            f" wants {s.want}" for s in stuck
        ))  # fmt: skip
        self.stuck = stuck


@dataclass(slots=True)
class Place:
    """Where a worker is: in which step, and at which run of its queue."""

    worker: int
    queue: tuple[Run, ...]
    step: int = 0
    position: int = 0

    @property
    def run(self) -> Run:
        """The run that it is at."""
        return self.queue[self.position]


class Protocol:
    """A launch of up to `end` steps: which waits hold, and what the end of a run changes."""

    def __init__(self, program: Program, end: int) -> None:
        self.program, self.end = program, end
        self.values = [0] * len(program.counters)
        self.places = [Place(w, queue) for w, queue in enumerate(program.queues) if queue]

    def ready(self, at: Place) -> bool:
        """True when the worker has a run left and all waits of it hold."""
        return at.step < self.end and next(self.missing(at), None) is None

    def missing(self, at: Place) -> Iterator[tuple[Wait, int]]:
        """Waits of the worker's run that do not hold yet, with the values that they want."""
        for wait in at.run.waits:
            want = self.want(at, wait)
            if self.values[wait.counter] < want:
                yield wait, want

    def want(self, at: Place, wait: Wait) -> int:
        """The value of the counter at which the wait holds."""
        if at.step < wait.lag:
            return 0
        return (at.step - wait.lag) * self.program.counters[wait.counter].total + wait.threshold

    def finish(self, at: Place) -> None:
        """End the worker's run: signal, and go on to the next."""
        if at.run.signal >= 0:
            self.values[at.run.signal] += 1
        at.position += 1
        if at.position == len(at.queue):
            at.position, at.step = 0, at.step + 1

    def stuck(self) -> list[Stuck]:
        """Every wait that keeps a worker from its next run."""
        return [
            Stuck(at.worker, at.position, at.step, wait.counter, self.values[wait.counter], want)
            for at in self.places if at.step < self.end for wait, want in self.missing(at)
        ]  # fmt: skip

    def walk(self) -> None:
        """Take every worker as far as it gets; DeadlockError when that is not the end of the launch.

        Whose turn it is decides nothing: a counter only grows, so a wait that holds goes on holding, and
        every order ends at the same place. When all workers can make step 0 together and then step 1,
        they can make each later step likewise, and are left after those two.
        """
        if self.end > 2 and self._make(0) and self._make(1):
            return
        self._walk_to(self.end)
        if stuck := self.stuck():
            raise DeadlockError(self.program, stuck)

    def _make(self, step: int) -> bool:
        """Walk no further than one step; True when nothing of it is left and nobody owes a signal."""
        self._walk_to(step + 1)
        totals = [(step + 1) * counter.total for counter in self.program.counters]
        return all(at.step == step + 1 for at in self.places) and self.values == totals

    def _walk_to(self, end: int) -> None:
        moved = True
        while moved:
            moved = False
            for at in self.places:
                while at.step < end and next(self.missing(at), None) is None:
                    self.finish(at)
                    moved = True


def words_of(program: Program, tags: Tags, s: Stuck) -> tuple[int, int]:
    """Of a worker that found other tags than the one that it wanted: the buffer that it read, and the op that
    writes that tag to it in that step; (NONE, NONE) where nothing that the run reads has the tag."""
    index = program.queues[s.worker][s.run].op
    for buf in program.ops[index].tag_checking():
        if buf in tags.writers and min(tags.writers[buf]) < index:
            writer = tags.writer(buf, index)
            if tags.tag(writer, s.step) == s.want:
                return buf, writer
    return NONE, NONE


def op_name(program: Program, index: int) -> str:
    """An op for people: number and kind."""
    return f"o{index} {type(program.ops[index]).__name__.lower()}"


class Standstill:
    """Who waits for whom, among workers that can not proceed; what they wait for is in `stuck`."""

    def __init__(self, program: Program, stuck: Iterable[Stuck]) -> None:
        self.program = program
        # Of each counter: who signals it, with the places in the queue of the runs that do.
        self.signallers: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        # Likewise of each op: who runs it.
        self.makers: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for worker, queue in enumerate(program.queues):
            for place, run in enumerate(queue):
                self.signallers[run.signal][worker].append(place)
                self.makers[run.op][worker].append(place)
        self.waits: dict[int, list[Stuck]] = defaultdict(list)
        for each in stuck:
            self.waits[each.worker].append(each)
        for worker, waits in self.waits.items():  # what nobody's wait explains comes first
            self.waits[worker] = sorted(waits, key=lambda s: bool(self.debtors(s)))

    @cached_property
    def tags(self) -> Tags:
        """Of the program; for it takes long, and all workers may wait for words."""
        return derive(self.program)

    def asked(self, s: Stuck) -> int:
        """The step whose signals the wait is for."""
        waits = self.program.queues[s.worker][s.run].waits
        return s.step - next((w.lag for w in waits if w.counter == s.counter), 0)

    def debtors(self, s: Stuck) -> list[int]:
        """Workers that stand still before they have signalled, or made words, as often as the step asks."""
        step, owed = self.asked(s), self.signallers.get(s.counter, {})
        if s.counter == BY_TAG:
            owed = self.makers.get(words_of(self.program, self.tags, s)[1], {})
        return [
            worker for worker, places in owed.items()
            if worker in self.waits
            and (self.waits[worker][0].step, self.waits[worker][0].run) <= (step, places[-1])
        ]  # fmt: skip

    def roots(self) -> list[Stuck]:
        """Waits that no other's wait explains, in the order in which the op table would come to them."""
        queues = self.program.queues
        found = [s for waits in self.waits.values() for s in waits if not self.debtors(s)]
        return sorted(found, key=lambda s: (s.step, queues[s.worker][s.run].op, s.worker))

    def chain(self) -> list[Stuck]:
        """The longest way from a wait, over the waits of who owes it, to the first of the roots.

        Where there is no root, workers wait in a circle, and the last wait closes it.
        """
        ways = [self._follow(waits[0]) for waits in self.waits.values()]
        to_root = [way for way in ways if [way[-1]] == self.roots()[:1]]
        return max(to_root or ways, key=len, default=[])

    def _follow(self, s: Stuck) -> list[Stuck]:
        way = [s]
        while debtors := self.debtors(s):
            s = self.waits[debtors[0]][0]
            way.append(s)
            if s in way[:-1]:
                break
        return way


def run_name(program: Program, worker: int, position: int) -> str:
    """A run for people: worker, place in the queue, op and tiles."""
    run = program.queues[worker][position]
    return f"worker {worker}, run {position} ({op_name(program, run.op)} [{run.lo}, {run.hi}))"
