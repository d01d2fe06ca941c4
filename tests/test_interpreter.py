"""The interpreter: legal orders agree, what is illegal is caught, launches and caches behave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import programs
import pytest
from programs import CONTEXT, GOOD, HIDDEN, VOCAB, Draft, linear, phased, tiny_model

from tilert.backends.interpreter import (
    ORDERS,
    AccessError,
    DeadlockError,
    Interpreter,
    RaceError,
    allocate_caches,
)
from tilert.backends.protocol import Protocol, Stuck
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.machine import NULL, cpu
from tilert.ir.program import PAGE, Kind, Program, Region, Run, Wait
from tilert.ops import Embed
from tilert.ops.linear import ADD
from tilert.ops.memory import Memory


def started(program: Program, **options: Any) -> Interpreter:
    made = Interpreter(
        program, programs.make_weights(program), allocate_caches(program, 5), **options
    )
    programs.set_state(made.state, program)
    return made


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_bits_of_the_op_table(name: str, order: str) -> None:
    program = GOOD[name]
    weights = programs.make_weights(program)
    expected = programs.outcome(program, weights, "sequential", steps=4)
    for seed in range(4):
        assert programs.outcome(program, weights, order, seed, steps=4) == expected


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_compiled_models_agree_in_every_order(tokens: int) -> None:
    for machine in (cpu(3), NULL):
        program = tiny_model(machine, tokens)
        weights = programs.make_weights(program)
        expected = programs.outcome(program, weights, "sequential")
        for order in ORDERS:
            assert programs.outcome(program, weights, order, tokens) == expected


@pytest.mark.parametrize("order", ["sequential", *ORDERS])
def test_one_launch_of_many_steps_equals_many_launches_of_one(order: str) -> None:
    program = GOOD["attention"]
    together, apart = started(program, order=order), started(program, order=order)
    at_once = together.run(4)
    one_by_one = [apart.run(1)[0] for _ in range(4)]
    assert np.array_equal(at_once, one_by_one)
    assert np.array_equal(together.state["positions"], apart.state["positions"])


# --- values against numpy ---------------------------------------------------------------------------


def test_experts_and_block_scales_are_what_numpy_says() -> None:
    program = GOOD["experts"]
    weights = programs.make_weights(program)
    made = started(program)
    made.run(1)
    wide = {name: w.astype(np.float32) for name, w in weights.items()}
    gate, up = (wide[name].reshape(4, 8, HIDDEN) for name in ("gate", "up"))
    # Blocks of six rows begin anew in each of the four matrices of sixteen.
    scale = (
        wide["down.scale"].reshape(4, 3, 2).repeat(6, axis=1)[:, :16].repeat(6, axis=2)[:, :, :8]
    )
    down = wide["down"].reshape(4, HIDDEN, 8) * scale
    x = wide["table"][3]
    normed = x / np.sqrt(np.mean(x * x) + 1e-5) * wide["norm"][0]
    logits = wide["wr"] @ normed
    chosen = sorted(np.argsort(-logits)[:2].tolist())
    assert made.read("chosen")[0].tolist() == chosen
    share = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum() * 1.5
    for e, weight in zip(chosen, share, strict=True):
        g = gate[e] @ normed
        x = x + weight * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ normed)))
    x = x / np.sqrt(np.mean(x * x) + 1e-5) * weights["final_norm"][0]
    np.testing.assert_allclose(made.read("logits")[0], weights["head"] @ x, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_weights_of_every_type_are_widened(dtype: Any) -> None:
    d = Draft(cpu(1))
    counts, tokens = d.state("counts", 2), d.state("tokens", 1)
    x, y = d.work("x", 1, HIDDEN), d.work("y", 1, 8)
    kind = DType.of(np.zeros(1, dtype))
    d.op(Embed(tokens, d.weight("table", VOCAB, HIDDEN, kind), x, counts, VOCAB, 1, HIDDEN, 1))
    d.op(linear(x, d.weight("w", 8, HIDDEN, kind), y, counts, k=HIDDEN, n=8, tile=3,
                bias=d.weight("b", 1, 8, kind)))  # fmt: skip
    phased(d)
    program = d.program()
    made = started(program)
    made.run(1)
    table, w, b = (
        programs.make_weights(program)[n].astype(np.float32) for n in ("table", "w", "b")
    )
    np.testing.assert_allclose(made.read("y")[0], w @ table[3] + b[0], rtol=1e-5, atol=1e-5)


def test_cache_rows_go_to_the_page_and_slot_of_their_position() -> None:
    program = GOOD["attention"]
    caches = allocate_caches(program, 5)
    made = Interpreter(program, programs.make_weights(program), caches)
    programs.set_state(made.state, program)
    made.run(3)
    written = {(page, slot) for page, slot in np.argwhere(caches["v_cache"].any(axis=2)).tolist()}
    # Token 0: positions 62, 63, 64 of sequence 1 (pages 0, 3); token 1: 5, 6, 7 of sequence 0 (4, 1).
    assert written == {(0, 62), (0, 63), (3, 0), (4, 5), (4, 6), (4, 7)}
    assert made.state["positions"][0, :2].tolist() == [65, 8]


def test_rows_beyond_the_counts_are_left_alone() -> None:
    made = started(GOOD["attention"])
    made.run(2)
    assert np.isnan(made.read("x")[2]).all()
    assert not np.isnan(made.read("x")[:2]).any()
    assert made.state["sampled"][0, 2] == 0


# --- launches ---------------------------------------------------------------------------------------


def test_on_token_ends_the_launch_and_steps_begun_are_finished() -> None:
    for order in ("sequential", *ORDERS):
        made = started(GOOD["greedy"], order=order)
        seen: list[int] = []

        def stop(ids: np.ndarray, seen: list[int] = seen) -> bool:
            seen.append(int(ids[0]))
            return len(seen) == 3

        tokens = made.run(10, stop)
        assert [int(t[0]) for t in tokens] == seen
        assert len(seen) == 3
        done = int(made.state["positions"][0, 0]) - 62
        assert 3 <= done <= 5
        following = made.run(1)  # a launch after a cancelled one starts clean
        assert len(following) == 1
        assert int(made.state["positions"][0, 0]) == 62 + done + 1


def test_ids_are_copies_of_the_wanted_rows() -> None:
    made = started(GOOD["attention"])
    first, second = made.run(2)
    assert first.shape == second.shape == (2,)
    assert first.dtype == np.int32
    assert not np.shares_memory(first, made.state["sampled"])


def test_steps_are_made_while_the_caller_looks() -> None:
    made = started(GOOD["greedy"], order="lowest")
    steps = made.steps(5)
    next(steps)
    assert int(made.state["positions"][0, 0]) == 63
    steps.close()  # type: ignore[attr-defined]
    assert int(made.state["positions"][0, 0]) <= 64


def test_programs_share_caches() -> None:
    alone = programs.attention_draft(cpu(2), 1, 1)
    phased(alone)
    small, large = alone.program(), GOOD["attention"]
    weights = programs.make_weights(large)
    caches = allocate_caches(large, 5)
    pair = [Interpreter(p, weights, caches) for p in (large, small)]
    for made in pair:
        programs.set_state(made.state, made.program)
    pair[0].run(1)
    before = caches["k_cache"].copy()
    pair[1].state["positions"][0, 0] = 63
    pair[1].run(1)
    touched = np.argwhere((caches["k_cache"] != before).any(axis=2)).tolist()
    assert touched == [[0, 63]]


# --- what is refused --------------------------------------------------------------------------------


def test_missing_or_wrong_weights_and_caches_are_user_errors() -> None:
    program = GOOD["attention"]
    weights, caches = programs.make_weights(program), allocate_caches(program, 1)
    bad: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray], str]] = [
        ({k: v for k, v in weights.items() if k != "wq"}, caches, "'wq' is missing"),
        ({**weights, "wq": weights["wq"][:8]}, caches, "shape"),
        ({**weights, "wq": weights["wq"].astype(np.float32)}, caches, "dtype float32"),
        (weights, {"k_cache": caches["k_cache"]}, "'v_cache' is missing"),
        (weights, {**caches, "v_cache": caches["v_cache"][:, :32]}, "float32"),
    ]
    for some_weights, some_caches, text in bad:
        with pytest.raises(UserError, match=text):
            Interpreter(program, some_weights, some_caches)
    with pytest.raises(UserError, match="accepted are sequential, random"):
        Interpreter(program, weights, caches, order="fast")
    Interpreter(program, {**weights, "norm": weights["norm"][0]}, caches)  # a vector for one row


def changed(program: Program, worker: int, position: int, **changes: Any) -> Program:
    queues = [list(queue) for queue in program.queues]
    queues[worker][position] = replace(queues[worker][position], **changes)
    return replace(program, queues=tuple(map(tuple, queues)))


def test_deadlock_names_everyone_who_waits() -> None:
    program = changed(GOOD["greedy"], 0, 0, waits=(Wait(1, 2),))
    with pytest.raises(DeadlockError) as caught:
        started(program).run(2)
    text = str(caught.value)
    assert "worker 0, run 0 (o0 embed [0, 1)) in step 0 waits: c1 has 0, wants 2" in text
    assert "worker 1, run 0 (o1 linear [2, 4)) in step 0 waits: c0 has 0, wants 1" in text


@pytest.mark.parametrize("name", GOOD)
def test_the_protocol_alone_ends_where_the_interpreter_does(name: str) -> None:
    """Sound programs, and each with one wait that asks for a signal more, of which some can go on for a
    few steps or for ever."""
    program = GOOD[name]
    Protocol(program, 5).walk()
    waits = [
        (w, i) for w, queue in enumerate(program.queues) for i, r in enumerate(queue) if r.waits
    ]
    for worker, place in waits[:: max(1, len(waits) // 6)]:
        first, *others = program.queues[worker][place].waits
        more = first._replace(threshold=first.threshold + 1)
        broken = changed(program, worker, place, waits=(more, *others))
        ends: list[list[Stuck]] = []
        for walk in (
            Protocol(broken, 3).walk,
            partial(started(broken, detect_races=False).run, 3),
            partial(started(broken, order="starve", detect_races=False).run, 3),
        ):
            try:
                walk()
                ends.append([])
            except DeadlockError as error:
                ends.append(error.stuck)
        assert ends[0] == ends[1] == ends[2]


def test_a_sound_launch_of_any_length_is_walked_in_two_steps() -> None:
    long = Protocol(GOOD["pipeline"], 1 << 40)
    long.walk()
    assert {at.step for at in long.places} == {2}
    late = changed(GOOD["pipeline"], 2, 0, signal=-1)  # looked: lacks its signal from step 1 on
    with pytest.raises(
        DeadlockError, match=r"worker 0, run 0 .* in step 1 waits: c1 has 0, wants 1"
    ):
        Protocol(late, 1 << 40).walk()


@pytest.mark.parametrize("seed", range(5))
def test_race_is_reported_also_when_the_values_come_out_right(seed: int) -> None:
    program = changed(GOOD["pipeline"], 0, 0, waits=(Wait(2, 1, 1),))  # side is read unprotected
    expected = programs.outcome(GOOD["pipeline"], programs.make_weights(program), "sequential")
    with pytest.raises(RaceError) as caught:
        started(program, seed=seed).run(3)
    text = str(caught.value)
    assert "worker 0, run 0 (o0 embed [0, 1))" in text
    assert "worker 2, run 0 (o1 linear [0, 4))" in text
    assert "'x' [0:1, 0:16]" in text
    calm = started(program, order="behind", detect_races=False)
    assert [ids.tobytes() for ids in calm.run(3)] == list(expected.sampled)


def test_missing_wait_shows_in_the_values_without_the_detector() -> None:
    program = changed(GOOD["pipeline"], 0, 0, waits=(Wait(2, 1, 1),))
    expected = started(GOOD["pipeline"], order="sequential")
    expected.run(3)
    sides = set[bytes]()
    for seed in range(12):
        made = started(program, order="starve", seed=seed, detect_races=False)
        try:
            made.run(3)
        except AccessError:  # worker 2 met an activation of another step
            sides.add(b"")
            continue
        sides.add(made.read("side").tobytes())
    assert sides != {expected.read("side").tobytes()}


def test_waits_count_the_signals_that_were_wanted_not_those_that_came() -> None:
    """The second of two signals is there when worker 2 looks; it had asked for one only."""
    program = changed(GOOD["loose"], 1, 0, signal=0)
    program = changed(program, 2, 0, waits=(Wait(0, 1),))
    with pytest.raises(RaceError, match="'second'"):
        started(program, order="lowest").run(1)


@dataclass(frozen=True, slots=True)
class Liar(Embed):
    """An embedding that declares less than it touches."""

    hides: str = "int"  # no field of the binary form; the tests do not encode it

    def reads(self, lo: int, hi: int) -> list[Region]:
        found = Embed.reads(self, lo, hi)
        return [r for r in found if self.hides != "reads" or r.buffer != self.table]

    def writes(self, lo: int, hi: int) -> list[Region]:
        cut = 1 if self.hides == "writes" else 0
        return [r._replace(col_hi=r.col_hi - cut) for r in Embed.writes(self, lo, hi)]

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        Embed.reference(self, mem, lo, hi)
        if self.hides == "counts":
            mem.read(self.counts, 0, 1, 1, 3)


@pytest.mark.parametrize("hides", ["reads", "writes", "counts"])
def test_access_that_is_not_declared_is_refused(hides: str) -> None:
    program = GOOD["devices"]
    op = program.ops[0]
    assert isinstance(op, Embed)
    liar = Liar(op.tokens, op.table, op.y, op.counts, op.vocab, op.rows, op.width, op.block, hides)
    program = replace(program, ops=(liar, *program.ops[1:]))
    for order in ("sequential", "random"):
        with pytest.raises(AccessError, match="does not declare"):
            started(program, order=order).run(1)


def test_reading_an_activation_of_the_step_before_is_refused() -> None:
    d = programs.greedy_draft(cpu(1))
    d.ops[0], d.ops[1] = d.ops[1], d.ops[0]
    phased(d)
    for order in ("sequential", "random"):
        with pytest.raises(AccessError, match="has not written"):
            started(d.program(), order=order).run(1)


def test_reading_cache_rows_before_they_are_appended_is_refused() -> None:
    d = programs.attention_draft(cpu(2), 2, 1)
    d.ops[4], d.ops[5] = d.ops[5], d.ops[4]
    phased(d)
    with pytest.raises(AccessError, match="_cache'"):
        started(d.program()).run(1)


def test_sum_into_an_activation_of_the_step_before_is_refused_in_later_steps_too() -> None:
    program = GOOD["devices"]
    op = replace(program.ops[1], epilogue=ADD)  # type: ignore[type-var]
    made = started(GOOD["devices"])
    made.run(1)
    made.program = replace(program, ops=(program.ops[0], op, *program.ops[2:]))
    with pytest.raises(AccessError, match="'y'"):
        made.run(1)


def test_page_outside_the_caches_and_ids_outside_their_range_are_refused() -> None:
    for name, value in (("pages", 7), ("tokens", VOCAB), ("positions", CONTEXT)):
        made = started(GOOD["attention"])
        made.state[name][:] = value
        with pytest.raises((AssertionError, IndexError)):
            made.run(1)


def test_names_of_weights_and_caches_cannot_be_read() -> None:
    made = started(GOOD["wide"])
    for b in made.program.buffers:
        if b.kind in (Kind.WEIGHT, Kind.CACHE):
            with pytest.raises(AssertionError, match="other owners"):
                made.read(b.name)
        else:
            assert made.read(b.name).shape == (b.rows, b.cols)
    assert PAGE == 64


def test_memory_of_a_long_launch_stays_bounded() -> None:
    made = started(GOOD["greedy"])

    def histories() -> Iterator[int]:
        launched = made.steps(40)
        for _ in launched:
            frame = launched.gi_frame  # type: ignore[attr-defined]
            yield max(len(s.known) for s in frame.f_locals["launch"].signals)

    assert max(histories()) <= 6
    assert isinstance(GOOD["greedy"].queues[0][0], Run)
