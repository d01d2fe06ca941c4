"""`tilert replay`: a recorded hang is walked again by the interpreter's protocol, and told in a few lines.

Either the walk stands still, too, and the program is at fault; or it comes to the end, and the device is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise

from tilert.backends.hang import Hang
from tilert.backends.protocol import (
    BY_RUN,
    BY_TAG,
    BY_UNIT,
    DeadlockError,
    Protocol,
    Standstill,
    Stuck,
    op_name,
    run_name,
    words_of,
)
from tilert.ir.program import NONE, Program
from tilert.ir.tags import derive

SHOWN = 6  # of a list that can be as long as there are workers


def report(hang: Hang) -> list[str]:
    """Lines on what the device recorded, what the walk found, and whose fault it was."""
    lines = [*_launch(hang), ""]
    try:
        Protocol(hang.program, hang.steps).walk()
    except DeadlockError as error:
        return lines + _of_program(hang, error.stuck)
    return lines + _of_device(hang)


def _launch(hang: Hang) -> list[str]:
    program, stuck = hang.program, hang.stuck
    workers = sorted({s.worker for s in stuck})
    silent = [w for w, queue in enumerate(program.queues) if queue and w not in workers]
    at = ", ".join(
        f"{p} of sequence {s}" for p, s in zip(hang.positions, hang.sequences, strict=True)
    )
    lines = [
        f"launch: {len(program.queues)} workers, {hang.steps} steps of {len(hang.positions)} tokens, from"
        f" position {at}",
        f"device: gave up while {len(workers)} workers waited",
    ]
    if silent:
        lines[-1] += f"; no word of {_workers(silent)}"
    return lines + ([f"        first of all: {_wait(program, hang.root())}"] if stuck else [])


def _of_program(hang: Hang, stuck: list[Stuck]) -> list[str]:
    """The walk stands still as well."""
    program, still = hang.program, Standstill(hang.program, stuck)
    lines = [f"replay: the interpreter stands still, too; {len(still.waits)} workers wait"]
    roots = still.roots()
    for root in roots[:1]:
        lines += [f"cause:  {_wait(program, root)}", *_signals(still, root)]
        if root.counter in still.signallers:
            step = still.asked(root)
            lines += [f"        all of them are done with step {step}: this wait can never hold"]
    if not roots:
        lines += ["cause:  workers wait for each other in a circle, of which no wait can ever hold"]
    lines += _chain(program, still)
    lines += ["fault:  the program's"]
    blamed = roots[:1] or still.chain()[-1:]
    if blamed[0] in hang.stuck:
        return [
            *lines,
            "        the device stood at the same place: the same waiter, counter and values",
        ]
    lines += ["        the device stood at another place; it may be at fault as well"]
    return lines + (_words(hang) if any(s.counter == BY_TAG for s in hang.stuck) else [])


def _of_device(hang: Hang) -> list[str]:
    """The walk came to the end."""
    lines = ["replay: the protocol runs through to the end, so the program is sound"]
    if not hang.stuck:
        return [*lines, "fault:  the device's; no worker said what it waited for"]
    if hang.root().counter in (BY_UNIT, BY_RUN):
        return [*lines, "fault:  the device's: a copy that never arrived, or tables that changed"]
    if hang.root().counter == BY_TAG:
        return [
            *lines, *_words(hang),
            "fault:  the device's: words that came too late or never, or tables that changed",
        ]  # fmt: skip
    still = Standstill(hang.program, hang.stuck)
    if not still.roots():
        return [
            *lines, *_chain(hang.program, still),
            "fault:  the device's: what the workers recorded cannot come of this program",
        ]  # fmt: skip
    return [
        *lines, f"cause:  {_wait(hang.program, hang.root())}; no other's wait explains it",
        *_signals(still, hang.root()), *_first(hang, still), *_chain(hang.program, still),
        "fault:  the device's: a worker that was killed or took too long, or a signal that was lost or late",
    ]  # fmt: skip


def _first(hang: Hang, still: Standstill) -> list[str]:
    """Who stood still first, of those that should have signalled the wait that nothing explains."""
    root, program = hang.root(), hang.program
    given, silent = 0, list[int]()
    for worker, places in still.signallers.get(root.counter, {}).items():
        if worker in still.waits:
            at = still.waits[worker][0]
            given += at.step * len(places) + bisect_left(places, at.run)
        else:
            silent.append(worker)
    if len(silent) == 1:  # then it is known how often it has signalled
        places = still.signallers[root.counter][silent[0]]
        step, place = divmod(max(0, root.have - given), len(places))
        if step < hang.steps:
            name = run_name(program, silent[0], places[place])
            return [f"first:  {name} in step {step} has not ended; the worker left no word"]
    if len(silent) > 1:
        return [f"first:  one of {_workers(silent)}, which left no word and should have signalled"]
    return [
        f"first:  worker {root.worker} itself: all others are past these runs, so a signal is lost"
    ]


def _words(hang: Hang) -> list[str]:
    """Of a reader that met other tags than it expects: whose words it was waiting for."""
    program, root = hang.program, hang.root()
    waiter = root if root.counter == BY_TAG else next(s for s in hang.stuck if s.counter == BY_TAG)
    buf, writer = words_of(program, derive(program), waiter)
    said = "nothing that this run reads has that tag in this step: the device's tables differ"
    if writer != NONE:
        name = program.buffers[buf].name
        said = f"that is what {op_name(program, writer)} writes to '{name}' in this step"
    return [f"words:  {_wait(program, waiter)}", f"        {said}"]


def _wait(program: Program, s: Stuck) -> str:
    who = f"{run_name(program, s.worker, s.run)} in step {s.step} waits for"
    if s.counter == BY_TAG:
        return f"{who} words with tag {s.want} and finds other tags (no counter)"
    if s.counter == BY_UNIT:
        return f"{who} a unit of weights or of the cache that it had asked for"
    if s.counter == BY_RUN:
        return f"{who} its own entry of the queue"
    return f"{who} c{s.counter}: it has {s.have}, wants {s.want}"


def _signals(still: Standstill, s: Stuck) -> list[str]:
    """Who signals what the wait is for."""
    places = [(w, p) for w, found in still.signallers.get(s.counter, {}).items() for p in found]
    if not places:
        return [f"        no run signals c{s.counter}: this wait can never hold"]
    names = [run_name(still.program, worker, place) for worker, place in places]
    listed = ", ".join(names[:SHOWN]) + (
        f", {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
    return [f"        c{s.counter} is signalled by {len(names)} runs of each step: {listed}"]


def _chain(program: Program, still: Standstill) -> list[str]:
    """Who waits for whom, the cause last."""
    chain = still.chain()
    if len(chain) < 2:
        return []
    lines = [f"{_wait(program, a)}, which worker {b.worker} owes" for a, b in pairwise(chain)]
    ends = "where the circle closes" if chain[-1] in chain[:-1] else "the cause"
    lines = [*lines[-SHOWN:], f"worker {chain[-1].worker}, run {chain[-1].run}: {ends}"]
    if len(chain) - 1 > SHOWN:
        lines.insert(0, f"({len(chain) - 1 - SHOWN} more before)")
    return [("chain:  " if i == 0 else "        ") + line for i, line in enumerate(lines)]


def _workers(workers: Iterable[int]) -> str:
    listed = list(workers)
    names = ", ".join(map(str, listed[:SHOWN])) + (
        f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    )
    return f"worker {names}" if len(listed) == 1 else f"workers {names}"
