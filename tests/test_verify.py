"""Broken programs must be refused by the rule that is meant for them, sound ones must pass."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import replace
from typing import Any

import numpy as np
import programs
import pytest
from broken import (
    BROKEN,
    behind_a_silent_signal,
    loose_pair,
    missing_wait_before_a_read,
    own_inputs,
    two_writers,
    without_wait,
)
from programs import GOOD, HIDDEN, tiny_model
from test_cuda_kernel import LATENT, MODELS, compiled

from tilert.backends.interpreter import ORDERS, DeadlockError, RaceError
from tilert.compiler.verify import RULES, VerifyError, verify
from tilert.ir.dtype import DType
from tilert.ir.machine import NULL, cpu
from tilert.ir.program import Kind, Program
from tilert.ir.regions import Cells
from tilert.ir.tags import Tags
from tilert.ops import Accept, Append, Attend, Guess, NextToken


@pytest.mark.parametrize("name", BROKEN)
def test_broken_program_is_refused_by_its_rule(name: str) -> None:
    rule, make = BROKEN[name]
    with pytest.raises(VerifyError) as caught:
        verify(make())
    assert caught.value.rule == rule, str(caught.value)


def test_every_rule_has_a_broken_program_and_there_are_enough() -> None:
    assert {rule for rule, _ in BROKEN.values()} == {rule.__name__ for rule in RULES}
    assert len(BROKEN) >= 80


DYNAMIC = [
    n
    for n, (rule, _) in BROKEN.items()
    if rule in ("deadlock", "ordering", "overtaking", "meaning")
]


@pytest.mark.parametrize("name", DYNAMIC)
def test_interpreter_catches_on_its_own_what_the_rules_refuse(name: str) -> None:
    program = BROKEN[name][1]()
    weights = programs.make_weights(program)
    try:
        expected = programs.outcome(program, weights, "sequential")
    except AssertionError:
        return  # the table itself makes no sense
    caught: list[str] = []
    for order in ORDERS:
        for seed in range(3):
            try:
                if programs.outcome(program, weights, order, seed) != expected:
                    caught.append("wrong")
            except (DeadlockError, RaceError) as error:
                caught.append(type(error).__name__)
            except AssertionError:
                caught.append("access")
    assert caught


@pytest.mark.parametrize("name", GOOD)
def test_sound_program_passes(name: str) -> None:
    verify(GOOD[name])


@pytest.mark.parametrize(
    "program",
    [
        two_writers(ordered=True),
        two_writers(False, (0, HIDDEN)),
        own_inputs(True),
        loose_pair(True),
        behind_a_silent_signal(ordered=True),
        behind_a_silent_signal(whole=False),
    ],
    ids=[
        "two writers in turn",
        "two writers side by side",
        "cache handed back",
        "producers in step",
        "words behind a signal of their own",
        "words behind an ordered signal",
    ],
)
def test_sound_sibling_of_a_broken_program_passes(program: Program) -> None:
    verify(program)
    weights = programs.make_weights(program)
    expected = programs.outcome(program, weights, "sequential")
    for order in ORDERS:
        assert programs.outcome(program, weights, order, 1) == expected


def test_what_one_worker_hands_to_itself_needs_no_wait() -> None:
    """Queue order holds it, so the compiler leaves the wait out; see also test_cuda_kernel.py. A loader runs
    ahead of the queue, and waits for what the step before has appended."""
    alone = tiny_model(replace(NULL, workers_per_device=1), 1)
    verify(alone)
    for run in alone.queues[0]:
        op = alone.ops[run.op]
        assert (run.signal >= 0) == isinstance(op, Append)
        assert [wait.lag for wait in run.waits] == [1] * isinstance(op, Attend)


def test_a_compiler_that_takes_all_signals_for_ordered_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who appends latents takes the position that the step before has left, and knows of that by a product,
    whose words have tags."""
    monkeypatch.setitem(MODELS, "six workers", (LATENT, DType.BF16, 6, {}))
    compiled("six workers")
    monkeypatch.setattr("tilert.compiler.derive", lambda program: Tags({}, {}, 0))
    with pytest.raises(VerifyError, match=r"^handoff: .* latentappend .* of .* nexttoken "):
        compiled("six workers")


def test_message_names_worker_run_op_buffer_and_region() -> None:
    with pytest.raises(VerifyError) as caught:
        verify(missing_wait_before_a_read())
    text = str(caught.value)
    for part in ("ordering: ", "worker 0, run 0 (o0 embed [0, 1))", "worker 1, run 0 (o1 linear [2, 4))",
                 "'x' [0:1, 0:16]", "same step"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("tokens", [1, 4, 33])
@pytest.mark.parametrize("machine", [cpu(1), cpu(2), cpu(3), cpu(16), NULL], ids=lambda m: m.name)
def test_compiled_models_pass_and_need_nearly_all_their_waits(machine: Any, tokens: int) -> None:
    program = tiny_model(machine, tokens)
    verify(program)
    kept, refused = 0, Tally[str]()
    for worker, queue in enumerate(program.queues):
        for position, run in enumerate(queue):
            for which in range(len(run.waits)):
                try:
                    verify(without_wait(program, worker, position, which))
                    kept += 1
                except VerifyError as error:
                    refused[error.rule] += 1
    assert set(refused) <= {"ordering", "meaning", "overtaking", "stream"}
    assert refused.total() >= 4 * kept, f"{kept} waits are not needed, {refused.total()} are"


@pytest.mark.parametrize("name", [*GOOD, "compiled"])
def test_regions_of_a_run_are_those_of_its_tiles(name: str) -> None:
    program = tiny_model(cpu(2), 33) if name == "compiled" else GOOD[name]
    for op in program.ops:
        for regions in (op.reads, op.writes):
            whole, tiles = regions(0, op.tiles), [regions(t, t + 1) for t in range(op.tiles)]
            cells = Cells([*whole, *(r for tile in tiles for r in tile)])

            def covered(regions: Any, cells: Cells = cells) -> set[int]:
                return set(np.concatenate([cells.of(r) for r in regions]).tolist())

            assert covered(whole) == set.union(*(covered(tile) for tile in tiles)), op


def test_only_what_makes_the_next_step_ready_writes_state() -> None:
    for program in GOOD.values():
        for op in program.ops:
            kinds = {program.buffers[r.buffer].kind for r in op.writes(0, op.tiles)}
            assert (Kind.STATE in kinds) == isinstance(op, NextToken | Accept | Guess)
