"""The verifier against the interpreter: random changes of sound programs, and random schedules.

A mutant that the verifier accepts must give the bits of its own op table in every order tried, with no
race and no deadlock. One that it refuses may be harmless, but many must be caught by the interpreter
alone, or the judge would be blind. TILERT_MUTANTS=n tries n fresh mutants instead of the fixed ones.
"""

from __future__ import annotations

import importlib
import os
import random
from collections import Counter as Tally
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import programs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import GOOD, tiny_model, with_tickets

from tilert.backends.interpreter import ORDERS, Interpreter
from tilert.compiler import order as proof
from tilert.compiler.depend import depend
from tilert.compiler.verify import VerifyError, verify
from tilert.ir import machine
from tilert.ir.program import Counter, Kind, Program, Run, Wait
from tilert.ir.tags import derive

FRESH = os.environ.get("TILERT_MUTANTS")
COUNT = int(FRESH or 1600)
SETTINGS = settings(max_examples=COUNT, derandomize=FRESH is None, database=None,
                    suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
JUDGED = (
    "deadlock",
    "overtaking",
    "ordering",
    "meaning",
)  # rules whose breach an execution can show

OPERANDS = ("x", "y", "q", "k", "v", "part", "logits", "weights", "chosen", "selected", "scores")

Mutation = Callable[[random.Random, Program], Program]


def scattered(seed: int, base: str = "") -> Program:
    """Ops cut into random runs on random workers, with waits from the dependency pass."""
    dice = random.Random(seed)
    drafts = {
        "mlp": lambda: programs.greedy_draft(machine.cpu(dice.randint(2, 4))),
        "experts": lambda: programs.experts_draft(
            machine.cpu(dice.randint(2, 4)), dice.randint(1, 3)
        ),
        "attention": lambda: programs.attention_draft(
            machine.cpu(dice.randint(2, 4)), dice.randint(1, 3), dice.randint(1, 3)
        ),
        "guesses": lambda: programs.guess_draft(machine.cpu(dice.randint(2, 4))),
        "latent": lambda: programs.latent_draft(
            machine.cpu(dice.randint(2, 4)), dice.randint(1, 3), dice.randint(1, 2)
        ),
    }
    draft = drafts[base or dice.choice(list(drafts))]()
    queues: list[list[Run]] = [[] for _ in range(draft.machine.workers)]
    for index, op in enumerate(draft.ops):
        borders = sorted(
            {0, op.tiles, *(dice.randint(0, op.tiles) for _ in range(dice.randint(0, 3)))}
        )
        for lo, hi in pairwise(borders):
            dice.choice(queues).append(Run(index, lo, hi))
    made = draft.program()
    counters, done = depend(made.buffers, made.ops, queues, derive(made))
    return with_tickets(replace(made, counters=counters, queues=done))


def cooked(program: Program) -> list[tuple[int, int]]:
    """(worker, position) of all runs."""
    return [(w, i) for w, queue in enumerate(program.queues) for i in range(len(queue))]


def edited(program: Program, at: tuple[int, int], **changes: Any) -> Program:
    queues = [list(queue) for queue in program.queues]
    queues[at[0]][at[1]] = replace(queues[at[0]][at[1]], **changes)
    return replace(program, queues=tuple(map(tuple, queues)))


def a_wait(dice: random.Random, program: Program) -> tuple[tuple[int, int], int] | None:
    """A run that waits, and which of its waits."""
    found = [
        (at, i) for at in cooked(program) for i in range(len(program.queues[at[0]][at[1]].waits))
    ]
    return dice.choice(found) if found else None


def with_changed_wait(
    dice: random.Random, program: Program, change: Callable[[Wait], Iterable[Wait]]
) -> Program:
    """One wait becomes what `change` makes of it."""
    found = a_wait(dice, program)
    if found is None:
        return program
    at, which = found
    waits = list(program.queues[at[0]][at[1]].waits)
    waits[which : which + 1] = change(waits[which])
    return edited(program, at, waits=tuple(waits))


def drop_wait(dice: random.Random, program: Program) -> Program:
    return with_changed_wait(dice, program, lambda wait: [])


def change_threshold(dice: random.Random, program: Program) -> Program:
    by = dice.choice((-2, -1, 1))
    return with_changed_wait(dice, program, lambda w: [w._replace(threshold=w.threshold + by)])


def change_lag(dice: random.Random, program: Program) -> Program:
    lag = dice.choice((0, 1, 1 - dice.randint(0, 1), 2))
    return with_changed_wait(dice, program, lambda w: [w._replace(lag=lag)])


def turn_lag(dice: random.Random, program: Program) -> Program:
    return with_changed_wait(dice, program, lambda w: [w._replace(lag=1 - w.lag)])


def change_counter(dice: random.Random, program: Program) -> Program:
    counter = dice.randrange(len(program.counters))
    return with_changed_wait(dice, program, lambda w: [w._replace(counter=counter)])


def move_wait(dice: random.Random, program: Program) -> Program:
    """A wait goes to a neighbour in the queue."""
    found = a_wait(dice, program)
    if found is None:
        return program
    (worker, position), which = found
    to = position + dice.choice((-1, 1))
    if not 0 <= to < len(program.queues[worker]):
        return program
    waits = list(program.queues[worker][position].waits)
    moved = waits.pop(which)
    program = edited(program, (worker, position), waits=tuple(waits))
    return edited(program, (worker, to), waits=(*program.queues[worker][to].waits, moved))


def add_wait(dice: random.Random, program: Program) -> Program:
    at, counter = dice.choice(cooked(program)), dice.randrange(len(program.counters))
    total = program.counters[counter].total
    wait = Wait(counter, dice.randint(1, max(1, total)), dice.randint(0, 1))
    return edited(program, at, waits=(*program.queues[at[0]][at[1]].waits, wait))


def swap_runs(dice: random.Random, program: Program) -> Program:
    """Neighbours in a queue change places, with or without their waits and signals."""
    worker = dice.randrange(len(program.queues))
    queue = list(program.queues[worker])
    if len(queue) < 2:
        return program
    i = dice.randrange(len(queue) - 1)
    a, b = queue[i], queue[i + 1]
    if dice.random() < 0.5:
        queue[i], queue[i + 1] = b, a
    else:
        queue[i] = replace(a, op=b.op, lo=b.lo, hi=b.hi)
        queue[i + 1] = replace(b, op=a.op, lo=a.lo, hi=a.hi)
    queues = list(program.queues)
    queues[worker] = tuple(queue)
    return replace(program, queues=tuple(queues))


def move_run(dice: random.Random, program: Program) -> Program:
    """A run goes to any place of any queue."""
    worker, position = dice.choice(cooked(program))
    queues = [list(queue) for queue in program.queues]
    run = queues[worker].pop(position)
    target = dice.choice(queues)
    target.insert(dice.randint(0, len(target)), run)
    return replace(program, queues=tuple(map(tuple, queues)))


def move_border(dice: random.Random, program: Program) -> Program:
    """Tiles go from a run to another of the same op; sometimes they get lost."""
    first, second = dice.choice(cooked(program)), dice.choice(cooked(program))
    a, b = (program.queues[w][i] for w, i in (first, second))
    by = dice.choice((-1, 1))
    program = edited(program, first, hi=a.hi + by)
    if b.op == a.op and b.lo == a.hi:
        program = edited(program, second, lo=b.lo + by)
    return program


def split_run(dice: random.Random, program: Program) -> Program:
    """A run becomes two, on one worker or on two; both signal."""
    worker, position = dice.choice(cooked(program))
    run = program.queues[worker][position]
    if run.hi - run.lo < 2:
        return program
    cut = dice.randrange(run.lo + 1, run.hi)
    queues = [list(queue) for queue in program.queues]
    queues[worker][position] = replace(run, hi=cut)
    rest = replace(run, lo=cut, waits=run.waits if dice.random() < 0.7 else ())
    if dice.random() < 0.5:
        queues[worker].insert(position + 1, rest)
    else:
        target = dice.choice(queues)
        target.insert(dice.randint(0, len(target)), rest)
    return replace(program, queues=tuple(map(tuple, queues)))


def change_signal(dice: random.Random, program: Program) -> Program:
    signal = dice.randrange(-1, len(program.counters))
    return edited(program, dice.choice(cooked(program)), signal=signal)


def merge_counters(dice: random.Random, program: Program) -> Program:
    """Two counters become one; waits for either wait for its share or for everything."""
    if len(program.counters) < 2:
        return program
    keep, gone = dice.sample(range(len(program.counters)), 2)
    whole = dice.random() < 0.7
    total = program.counters[keep].total + program.counters[gone].total

    def renamed(wait: Wait) -> Wait:
        if wait.counter not in (keep, gone):
            return wait
        full = wait.threshold == program.counters[wait.counter].total
        return Wait(keep, total if whole and full else wait.threshold, wait.lag)

    queues = tuple(
        tuple(replace(run, waits=tuple(map(renamed, run.waits)),
                      signal=keep if run.signal == gone else run.signal) for run in queue)
        for queue in program.queues
    )  # fmt: skip
    return replace(program, queues=queues)


def change_total(dice: random.Random, program: Program) -> Program:
    index, counters = dice.randrange(len(program.counters)), list(program.counters)
    counters[index] = Counter(counters[index].total + dice.choice((-1, 1)))
    return replace(program, counters=tuple(counters))


def alias(dice: random.Random, program: Program) -> Program:
    """An op uses another activation of the same shape, or all ops do."""
    work = [i for i, b in enumerate(program.buffers) if b.kind is Kind.WORK]
    one, other = dice.choice(work), dice.choice(work)
    a, b = program.buffers[one], program.buffers[other]
    if (a.rows, a.cols) != (b.rows, b.cols):
        return program
    everywhere, chosen = dice.random() < 0.6, dice.randrange(len(program.ops))
    ops = list(program.ops)
    for i, op in enumerate(ops):
        if everywhere or i == chosen:
            names = [n for n in OPERANDS if getattr(op, n, -1) == one]
            ops[i] = replace(op, **dict.fromkeys(names, other))  # type: ignore[type-var]
    return replace(program, ops=tuple(ops))


def shift_buffer(dice: random.Random, program: Program) -> Program:
    """An activation moves in the arena."""
    work = [i for i, b in enumerate(program.buffers) if b.kind is Kind.WORK]
    index, buffers = dice.choice(work), list(program.buffers)
    offset = buffers[index].offset + dice.choice((-64, -32, 32, 64, 4096))
    buffers[index] = replace(buffers[index], offset=offset)
    return replace(program, buffers=tuple(buffers))


def change_ticket(dice: random.Random, program: Program) -> Program:
    at = dice.choice(cooked(program))
    return edited(program, at, ring=program.queues[at[0]][at[1]].ring + dice.choice((-1, 1)))


def swap_ops(dice: random.Random, program: Program) -> Program:
    """Two neighbours of the op table change places; runs follow their op."""
    i, ops = dice.randrange(len(program.ops) - 1), list(program.ops)
    ops[i], ops[i + 1] = ops[i + 1], ops[i]
    new = {i: i + 1, i + 1: i}
    queues = tuple(tuple(replace(r, op=new.get(r.op, r.op)) for r in q) for q in program.queues)
    return replace(program, ops=tuple(ops), queues=queues)


MUTATIONS: tuple[Mutation, ...] = (
    drop_wait, drop_wait, change_threshold, change_lag, turn_lag, change_counter, move_wait, add_wait,
    swap_runs, move_run, move_run, move_border, split_run, change_signal, merge_counters,
    merge_counters, change_total, alias, shift_buffer, change_ticket, swap_ops,
)  # fmt: skip


def repaired(program: Program) -> Program:
    """Totals and tickets that fit, and full thresholds that stay full: so that the deep rules decide."""
    signals = [run.signal for queue in program.queues for run in queue]
    old = [c.total for c in program.counters]
    new = [signals.count(i) for i in range(len(old))]

    def fitting(wait: Wait) -> Wait:
        full = wait.threshold == old[wait.counter]
        return wait._replace(threshold=new[wait.counter] if full else wait.threshold)

    queues = tuple(
        tuple(replace(r, waits=tuple(fitting(w) for w in r.waits if new[w.counter])) for r in queue)
        for queue in program.queues
    )
    return with_tickets(replace(program, counters=tuple(map(Counter, new)), queues=queues))


COMPILED = [tiny_model(machine.cpu(2), 1), tiny_model(machine.NULL, 3)]
BASES = [*GOOD.values(), *COMPILED, *(scattered(seed) for seed in range(13))]
WEIGHTS = {id(program): programs.make_weights(program) for program in BASES}


def mutant(base: Program, seed: int) -> Program:
    """One to three changes of a sound program, then perhaps repairs."""
    dice = random.Random(seed)
    program = base
    for _ in range(dice.choice((1, 1, 2, 3))):
        program = dice.choice(MUTATIONS)(dice, program)
    if dice.random() < 0.7:
        program = repaired(program)
    return program


def wrong(program: Program, weights: dict[str, Any], orders: Iterable[tuple[str, int]]) -> str:
    """What the interpreter finds in some order that the op table does not say; "" when nothing."""
    expected = programs.outcome(program, weights, "sequential")
    for order, seed in orders:
        try:
            if programs.outcome(program, weights, order, seed) != expected:
                return f"{order} {seed}: other results"
        except AssertionError as error:
            return f"{order} {seed}: {type(error).__name__}: {error}"
    return ""


ALL_ORDERS = [
    (order, seed) for order in ORDERS for seed in range(4 if order in ("random", "starve") else 1)
]
SOME_ORDERS = [
    ("starve", 0),
    ("starve", 1),
    ("ahead", 0),
    ("highest", 0),
    ("lowest", 0),
    ("starve", 2),
]


def test_accepted_mutants_compute_what_their_op_table_says() -> None:
    tally: Tally[str] = Tally()
    seen: set[Program] = set()
    refused: Tally[str] = Tally()

    @SETTINGS
    @given(st.sampled_from(BASES), st.integers(0, 1 << 40))
    def judge(base: Program, seed: int) -> None:
        program, weights = mutant(base, seed), WEIGHTS[id(base)]
        if program == base or program in seen:
            return
        seen.add(program)
        try:
            verify(program)
        except VerifyError as error:
            tally["refused"] += 1
            refused[error.rule] += 1
            if error.rule in JUDGED and tally["judged"] < 300:
                try:
                    found = wrong(program, weights, SOME_ORDERS)
                except AssertionError:
                    return  # its op table makes no sense
                tally["judged"] += 1
                tally["confirmed"] += bool(found)
            return
        tally["accepted"] += 1
        found = wrong(program, weights, ALL_ORDERS)
        assert not found, f"wrongly accepted: {found}"

    judge()
    print(f"{len(seen)} mutants: {dict(tally)}; refused by {dict(refused)}")
    assert tally["accepted"] + tally["refused"] == len(seen) >= min(1000, COUNT * 2 // 3)
    assert tally["accepted"] >= len(seen) // 20
    assert tally["confirmed"] >= tally["judged"] * 2 // 3


def without(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Leave rules out."""

    def weaken(patch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("tilert.compiler.verify")
        patch.setattr(module, "RULES", tuple(r for r in module.RULES if r.__name__ not in names))

    return weaken


def trust_any_threshold(patch: pytest.MonkeyPatch) -> None:
    def proves(facts: proof.Facts, wait: Wait) -> list[int]:
        return [runs[-1] for runs in facts.producers[wait.counter].values()]

    patch.setattr(proof.Facts, "proves", proves)


def forget_readers(patch: pytest.MonkeyPatch) -> None:
    """Look for reads after writes only."""
    check = proof._Walk._check

    def only_reads(walk: proof._Walk, region: Any, runs: list[int], table: Any) -> Any:
        return None if table is walk.touched else check(walk, region, runs, table)

    patch.setattr(proof._Walk, "_check", only_reads)


def look_at_one_step(patch: pytest.MonkeyPatch) -> None:
    """Overlook conflicts with the step before."""
    check = proof._Walk._check

    def within(walk: proof._Walk, region: Any, runs: list[int], table: Any) -> Any:
        found = check(walk, region, runs, table)
        return None if found and found.step == 0 else found

    patch.setattr(proof._Walk, "_check", within)


@pytest.mark.parametrize(
    "weaken",
    [without("partition"), without("ordering", "meaning"), without("meaning"), without("coverage"),
     without("overtaking"), trust_any_threshold, forget_readers, look_at_one_step],
    ids=["partition", "ordering", "meaning", "coverage", "overtaking", "thresholds", "readers", "steps"],
)  # fmt: skip
def test_a_weakened_verifier_is_found_out(
    weaken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    weaken(monkeypatch)
    for number in range(4000):
        base = BASES[number % len(BASES)]
        program = mutant(base, number)
        if program == base:
            continue
        try:
            verify(program)
        except VerifyError:
            continue
        try:
            if wrong(program, WEIGHTS[id(base)], SOME_ORDERS):
                return
        except AssertionError:
            return  # accepted, though the op table itself cannot be run
    pytest.fail("no mutant was wrongly accepted")


@settings(max_examples=60, derandomize=FRESH is None, database=None)
@given(st.integers(0, 1 << 40))
def test_random_schedules_with_derived_waits_are_sound(seed: int) -> None:
    program = scattered(seed)
    verify(program)
    assert not wrong(program, programs.make_weights(program), ALL_ORDERS[:: 1 + seed % 3])


def test_every_order_is_tried() -> None:
    assert {order for order, _ in ALL_ORDERS} == set(ORDERS)
    assert Interpreter.allocate_caches(GOOD["wide"], 2)["k_cache"].shape == (2, 64, 8)
