"""When products and routers begin to look for their x: after some of the signals of its makers, or at once.

A word with a tag says itself that it is there (ir/tags.py); a counter only says when it is worth while to
look. Its signal, and the poll that finds it, take as long as to read x. But words that are late are read
again, by all workers, from the L2 cache that also feeds the stream of weights. For one token a short x is
looked for at once, a long one when most have signalled. Steps of several tokens wait for all signals: there,
to read x again costs more than a poll.
"""

from __future__ import annotations

from collections.abc import Iterable

from tilert.ir.program import NONE, Program, Run, Wait
from tilert.ir.tags import Tags
from tilert.ops import ExpertDown, ExpertGate, Route

SHORT = 4096  # words of x
MOST = 0.6  # of the signals; both are the best of some on an H100 (docs/log.md)


class Looks:
    """For the runs of a program: which of their waits are left out, or hold before all have signalled."""

    def __init__(self, program: Program, tags: Tags) -> None:
        self.totals = [counter.total for counter in program.counters]
        self.signals: list[set[int]] = [set() for _ in program.ops]  # counters of each op
        for run in (run for queue in program.queues for run in queue):
            self.signals[run.op].add(run.signal)
        self.makers: list[int] = [NONE] * len(program.ops)  # of x, told by words
        self.others: list[frozenset[int]] = [frozenset()] * len(program.ops)
        self.short = [False] * len(program.ops)
        self.choices = _choices(program)
        self.choosers = [_others(program, tags, self.choices, i) for i in range(len(program.ops))]
        for index, op in enumerate(program.ops):
            if program.tokens == 1 and (whole := op.whole_reads()):
                self.makers[index], self.others[index] = tags.told(program, index)
                (x,) = (program.buffers[buf] for buf in whole)
                self.short[index] = x.rows * x.cols <= SHORT

    def wanted(self, run: Run, own: set[int]) -> dict[Wait, int]:
        """The waits of a run that are kept, and for how many signals each is. own: ops that its worker
        runs."""
        found = dict[Wait, int]()
        for wait in run.waits:
            if wait.threshold != self.totals[wait.counter]:
                found[wait] = wait.threshold  # not for all of an op's runs
                continue
            if self.for_choice(run.op, wait) and not own.isdisjoint(self.choosers[run.op]):
                continue  # it read the choice before, so it finds this one by its words
            if not self._for_x(run.op, wait):
                found[wait] = wait.threshold
            elif not self.short[run.op]:
                found[wait] = max(1, int(MOST * wait.threshold))
            elif not self._reads_the_newest(run.op, own):
                found[wait] = 1
        return found

    def at_hand(self, run: Run, own: set[int], wanted: Iterable[Wait]) -> bool:
        """Whether the run may look for x before its other waits hold; wanted: those that are kept."""
        return self._reads_the_newest(run.op, own) and not any(
            self._for_x(run.op, wait) for wait in wanted
        )

    def for_choice(self, op: int, wait: Wait) -> bool:
        """Whether a wait is for the choice of what an op streams."""
        return (
            op in self.choices and not wait.lag and wait.counter in self.signals[self.choices[op]]
        )

    def _for_x(self, op: int, wait: Wait) -> bool:
        maker = self.makers[op]
        return maker != NONE and not wait.lag and wait.counter in self.signals[maker]

    def _reads_the_newest(self, op: int, own: set[int]) -> bool:
        """A worker that has read what was there before finds nothing older."""
        return self.makers[op] != NONE and not own.isdisjoint(self.others[op])


def _choices(program: Program) -> dict[int, int]:
    """For each op that streams what is chosen: the op that chooses."""
    found: dict[int, int] = {}
    last: dict[int, int] = {}  # the op that wrote each choice
    for index, op in enumerate(program.ops):
        if isinstance(op, ExpertGate | ExpertDown):
            found[index] = last[op.chosen]
        elif isinstance(op, Route):
            last[op.chosen] = index
    return found


def _others(program: Program, tags: Tags, choices: dict[int, int], index: int) -> frozenset[int]:
    """Of an op that streams by a choice with tags: those that stream by what was chosen before in its
    buffer. Loaders read all of it."""
    op = program.ops[index]
    if index not in choices or op.choice not in tags.writers:
        return frozenset()
    before = tags.before(op.choice, choices[index])
    return frozenset(
        i for i, maker in choices.items() if maker == before and program.ops[i].choice == op.choice
    )
