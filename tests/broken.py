"""Programs that are wrong in one way each, by the name of the rule that must refuse them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import programs
from programs import GOOD, HIDDEN, VOCAB, Draft, linear, phased

from tilert.ir.dtype import DType
from tilert.ir.machine import cpu
from tilert.ir.program import NONE, Buf, Buffer, Counter, Kind, Program, Run, Wait
from tilert.ops import Attention, Embed, Rope

BROKEN: dict[str, tuple[str, Callable[[], Program]]] = {}


def breaks(rule: str) -> Callable[[Callable[[], Program]], Callable[[], Program]]:
    """Register a function that makes a program which only `rule` may refuse."""

    def register(make: Callable[[], Program]) -> Callable[[], Program]:
        assert make.__name__ not in BROKEN
        BROKEN[make.__name__] = (rule, make)
        return make

    return register


def with_run(program: Program, worker: int, position: int, **changes: Any) -> Program:
    queues = [list(queue) for queue in program.queues]
    queues[worker][position] = replace(queues[worker][position], **changes)
    return replace(program, queues=tuple(map(tuple, queues)))


def with_wait(
    program: Program, worker: int, position: int, which: int = 0, **changes: int
) -> Program:
    waits = list(program.queues[worker][position].waits)
    waits[which] = waits[which]._replace(**changes)
    return with_run(program, worker, position, waits=tuple(waits))


def without_wait(program: Program, worker: int, position: int, which: int = 0) -> Program:
    waits = list(program.queues[worker][position].waits)
    del waits[which]
    return with_run(program, worker, position, waits=tuple(waits))


def swapped(program: Program, worker: int, first: int, second: int) -> Program:
    queue = list(program.queues[worker])
    queue[first], queue[second] = queue[second], queue[first]
    return with_queue(program, worker, queue)


def with_queue(program: Program, worker: int, queue: list[Run]) -> Program:
    queues = list(program.queues)
    queues[worker] = tuple(queue)
    return replace(program, queues=tuple(queues))


def with_op(program: Program, index: int, **changes: Any) -> Program:
    ops = list(program.ops)
    ops[index] = replace(ops[index], **changes)  # type: ignore[type-var]
    return replace(program, ops=tuple(ops))


def with_buffer(program: Program, name: str, /, **changes: Any) -> Program:
    buffers = list(program.buffers)
    index = program.buffer_ids[name]
    buffers[index] = replace(buffers[index], **changes)
    return replace(program, buffers=tuple(buffers))


def with_total(program: Program, counter: int, total: int) -> Program:
    counters = list(program.counters)
    counters[counter] = replace(counters[counter], total=total)
    return replace(program, counters=tuple(counters))


def counted(program: Program) -> Program:
    """The program with totals that fit its signals."""
    signals = [run.signal for queue in program.queues for run in queue]
    counters = tuple(replace(c, total=signals.count(i)) for i, c in enumerate(program.counters))
    return replace(program, counters=counters)


def buffer_id(program: Program, name: str) -> Buf:
    return program.buffer_ids[name]


# --- deadlock ---------------------------------------------------------------------------------------


@breaks("deadlock")
def cycle_of_two_workers() -> Program:
    return with_run(GOOD["greedy"], 0, 0, waits=(Wait(1, 2),))


@breaks("deadlock")
def wait_for_oneself() -> Program:
    return with_run(GOOD["greedy"], 0, 3, waits=(Wait(2, 1), Wait(3, 1)))


@breaks("deadlock")
def wait_for_a_later_run_of_the_same_queue() -> Program:
    return with_run(GOOD["stream"], 0, 0, waits=(Wait(0, 1),))


@breaks("deadlock")
def queue_order_against_the_waits() -> Program:
    return swapped(GOOD["greedy"], 0, 1, 2)


@breaks("deadlock")
def two_signals_exchanged() -> Program:
    program = with_run(GOOD["greedy"], 1, 0, signal=2)
    return counted(with_run(program, 1, 1, signal=1))


@breaks("deadlock")
def lag_wait_without_its_lag() -> Program:
    return with_wait(GOOD["pipeline"], 0, 0, 0, lag=0)


# --- counters ---------------------------------------------------------------------------------------


@breaks("counters")
def threshold_one_too_high() -> Program:
    return with_wait(GOOD["greedy"], 0, 2, threshold=3)


@breaks("counters")
def threshold_zero() -> Program:
    return with_wait(GOOD["greedy"], 0, 2, threshold=0)


@breaks("counters")
def threshold_negative() -> Program:
    return with_wait(GOOD["pipeline"], 0, 0, threshold=-1)


@breaks("counters")
def lag_two() -> Program:
    return with_wait(GOOD["pipeline"], 0, 0, lag=2)


@breaks("counters")
def lag_negative() -> Program:
    return with_wait(GOOD["greedy"], 0, 2, lag=-1)


@breaks("counters")
def total_too_high() -> Program:
    return with_total(GOOD["greedy"], 1, 3)


@breaks("counters")
def total_too_low() -> Program:
    return with_total(GOOD["greedy"], 1, 1)


@breaks("counters")
def counter_never_signalled() -> Program:
    program = replace(GOOD["greedy"], counters=(*GOOD["greedy"].counters, Counter(0)))
    return with_run(program, 0, 6, waits=(Wait(4, 1), Wait(5, 1)))


@breaks("counters")
def signal_dropped() -> Program:
    return counted(with_run(GOOD["greedy"], 1, 1, signal=-1))


@breaks("counters")
def signal_on_the_wrong_counter() -> Program:
    return with_run(GOOD["greedy"], 1, 0, signal=0)


# --- ordering ---------------------------------------------------------------------------------------


@breaks("ordering")
def missing_wait_before_a_read() -> Program:
    return without_wait(GOOD["greedy"], 1, 0)


@breaks("ordering")
def missing_wait_before_overwriting_what_is_read() -> Program:
    return without_wait(GOOD["pipeline"], 0, 0, 1)


@breaks("ordering")
def missing_wait_in_the_next_step() -> Program:
    return without_wait(GOOD["pipeline"], 0, 0, 0)


@breaks("ordering")
def missing_wait_at_the_end_of_a_step() -> Program:
    return without_wait(GOOD["greedy"], 0, 6)


@breaks("ordering")
def threshold_one_too_low() -> Program:
    return with_wait(GOOD["greedy"], 0, 2, threshold=1)


@breaks("ordering")
def first_piece_of_a_stream_for_the_second() -> Program:
    return with_wait(GOOD["stream"], 1, 0, threshold=1)


@breaks("ordering")
def any_two_of_three_producers() -> Program:
    program = GOOD["barriers"]
    worker, position = next((w, i) for w, queue in enumerate(program.queues)
                            for i, run in enumerate(queue) if run.op == 2)  # fmt: skip
    assert program.counters[program.queues[worker][position].waits[0].counter].total == 3
    return with_wait(program, worker, position, threshold=2)


@breaks("ordering")
def lag_where_the_same_step_is_needed() -> Program:
    return with_wait(GOOD["greedy"], 1, 0, lag=1)


@breaks("ordering")
def wait_on_the_wrong_counter() -> Program:
    return with_wait(GOOD["greedy"], 1, 2, counter=0)


@breaks("ordering")
def signal_before_the_work_is_done() -> Program:
    program = with_run(GOOD["greedy"], 0, 4, signal=3)
    program = with_run(program, 0, 2, signal=3)
    program = with_run(with_run(program, 0, 3, signal=-1), 0, 4, signal=-1)
    return counted(program)


def two_writers(ordered: bool, columns: tuple[int, int] = (0, 0)) -> Program:
    """Two workers fill the same buffer; nobody reads in between."""
    d = Draft(cpu(2))
    counts, tokens = d.state("counts", 2), d.state("tokens", 1)
    x, y = d.work("x", 1, HIDDEN), d.work("y", 1, 2 * HIDDEN)
    table, w = d.weight("table", VOCAB, HIDDEN), d.weight("w", HIDDEN, HIDDEN)
    d.op(Embed(tokens, table, x, counts, VOCAB, 1, HIDDEN, 1))
    for column in columns:
        d.op(linear(x, w, y, counts, k=HIDDEN, n=HIDDEN, tile=4, y_col=column))
    embedded, first, second = d.counter(), d.counter(), d.counter()
    d.run(0, 0, 0, 1, (second, 1, 1), signal=embedded)
    d.run(0, 1, 0, 4, signal=first)
    d.run(1, 2, 0, 4, (embedded, 1), *([(first, 1)] if ordered else []), signal=second)
    return d.program()


@breaks("ordering")
def two_ops_write_the_same_buffer() -> Program:
    return two_writers(ordered=False)


@breaks("ordering")
def two_ops_write_overlapping_columns() -> Program:
    return two_writers(ordered=False, columns=(0, HIDDEN - 1))


def own_inputs(ordered: bool) -> Program:
    """Worker 0 fills the cache, worker 1 attends; their only hand-back is across steps."""
    d, dim, heads = Draft(cpu(2)), 4, 2
    counts, tokens, at = d.state("counts", 2), d.state("tokens", 1), d.state("positions", 1)
    who, pages = d.state("sequences", 1), d.state("pages", 2)
    k_cache, v_cache = (d.add(Buffer(f"{n}_cache", Kind.CACHE, DType.F32, 128, dim)) for n in "kv")
    table, rope = d.weight("table", VOCAB, HIDDEN), d.weight("rope", 128, dim)
    rows: list[Buf] = []
    for name, cols in (("q", heads * dim), ("k", dim), ("v", dim)):
        x, y = d.work(f"x.{name}", 1, HIDDEN), d.work(name, 1, cols)
        rows.append(y)
        d.op(Embed(tokens, table, x, counts, VOCAB, 1, HIDDEN, 1))
        d.op(linear(x, d.weight(f"w{name}", cols, HIDDEN), y, counts, k=HIDDEN, n=cols, tile=4))
    q, k, v = rows
    d.op(Rope(q, k, v, NONE, NONE, rope, k_cache, v_cache, at, who, pages, counts, 1, heads, 1, dim,
              128, 1, 2, 1e-5))  # fmt: skip
    y = d.work("mixed", 1, heads * dim)
    d.op(
        Attention(
            q, k_cache, v_cache, y, at, who, pages, counts, 1, heads, 1, dim, 0, 1, 1, 1, 2, 0.5
        )
    )
    appended, attended = d.counter(), d.counter()
    for op in (2, 3, 4, 5):
        d.run(0, op, 0, 1)
    d.run(0, 6, heads, heads + 1, *([(attended, 1, 1)] if ordered else []), signal=appended)
    d.run(1, 0, 0, 1)
    d.run(1, 1, 0, 2)
    d.run(1, 6, 0, heads)
    d.run(1, 7, 0, 1, (appended, 1), signal=attended)
    return d.program()


@breaks("ordering")
def cache_rows_of_the_next_step_while_this_one_reads() -> Program:
    return own_inputs(ordered=False)


@breaks("ordering")
def storage_reused_while_it_is_read() -> Program:
    program = GOOD["pipeline"]  # worker 1 reads `last` while worker 2 writes `side`
    y = buffer_id(program, "last")
    return with_op(program, 1, y=y)


def loose_pair(read_both: bool) -> Program:
    """Two producers signal one counter; the consumer may need one of them only."""
    d = Draft(cpu(3))
    counts, tokens = d.state("counts", 2), d.state("tokens", 1)
    table, w = d.weight("table", VOCAB, HIDDEN), d.weight("w", HIDDEN, HIDDEN)
    first, second = d.work("first", 1, HIDDEN), d.work("second", 1, HIDDEN)
    d.op(Embed(tokens, table, first, counts, VOCAB, 1, HIDDEN, 1))
    d.op(Embed(tokens, table, second, counts, VOCAB, 1, HIDDEN, 1))
    for i, x in enumerate((first, second)[0 if read_both else 1 :]):
        d.op(linear(x, w, d.work(f"y{i}", 1, HIDDEN), counts, k=HIDDEN, n=HIDDEN, tile=4))
    made, used = d.counter(), d.counter()
    d.run(0, 0, 0, 1, *([(used, 1, 1)] if read_both else []), signal=made)
    d.run(1, 1, 0, 1, (used, 1, 1), signal=made)
    for op in range(2, len(d.ops)):
        last = op == len(d.ops) - 1
        d.run(2, op, 0, 4, (made, 2), signal=used if last else -1)
    return d.program()


@breaks("overtaking")
def fast_producer_signals_twice_for_the_slow_one() -> Program:
    return loose_pair(read_both=False)


# --- meaning and coverage ---------------------------------------------------------------------------


def reordered(program: Program, order: list[int]) -> Program:
    """The table in another order; the queues run what they ran."""
    ops = tuple(program.ops[i] for i in order)
    queues = tuple(
        tuple(replace(r, op=order.index(r.op)) for r in queue) for queue in program.queues
    )
    return replace(program, ops=ops, queues=queues)


@breaks("meaning")
def op_table_in_another_order_than_the_queues() -> Program:
    return reordered(GOOD["greedy"], [0, 2, 1, 3, 4, 5, 6])


@breaks("meaning")
def queue_order_against_the_op_table() -> Program:
    return swapped(GOOD["greedy"], 1, 2, 3)


@breaks("meaning")
def attention_runs_before_the_append_that_the_table_puts_first() -> Program:
    d = programs.attention_draft(cpu(4), 1, 1)
    phased(d, [0, 1, 2, 3, 5, 4, *range(6, len(d.ops))])
    return d.program()


@breaks("coverage")
def cache_rows_read_before_they_are_appended() -> Program:
    d = programs.attention_draft(cpu(3), 3, 2)
    d.ops[4], d.ops[5] = d.ops[5], d.ops[4]
    phased(d)
    return d.program()


@breaks("coverage")
def cache_rows_read_before_a_pass_appends_them() -> Program:
    """The pass before has written row 0, too, but of other positions."""
    d = programs.guess_draft(cpu(3))
    second = [i for i, op in enumerate(d.ops) if isinstance(op, Rope)][1]
    d.ops[second : second + 2] = d.ops[second + 1], d.ops[second]
    phased(d)
    return d.program()


@breaks("coverage")
def activation_that_nobody_writes() -> Program:
    program = GOOD["greedy"]
    lost = Buffer("lost", Kind.WORK, DType.F32, 1, HIDDEN, offset=1 << 16)
    program = replace(program, buffers=(*program.buffers, lost))
    return with_op(program, 1, x=Buf(len(program.buffers) - 1))


@breaks("coverage")
def activation_left_over_from_the_step_before() -> Program:
    d = programs.greedy_draft(cpu(2))
    d.ops[0], d.ops[1] = d.ops[1], d.ops[0]
    phased(d)
    return d.program()


@breaks("coverage")
def sum_into_what_is_not_there() -> Program:
    return with_op(GOOD["devices"], 1, epilogue=1)


@breaks("coverage")
def half_of_an_activation_is_written() -> Program:
    d = Draft(cpu(1))
    counts, tokens = d.state("counts", 2), d.state("tokens", 1)
    x, y, z = (d.work(n, 1, HIDDEN) for n in "xyz")
    d.op(Embed(tokens, d.weight("table", VOCAB, HIDDEN), x, counts, VOCAB, 1, HIDDEN, 1))
    d.op(linear(x, d.weight("half", 8, HIDDEN), y, counts, k=HIDDEN, n=8, tile=4))
    d.op(linear(y, d.weight("w", HIDDEN, HIDDEN), z, counts, k=HIDDEN, n=HIDDEN, tile=4))
    phased(d)
    return d.program()


# --- partition --------------------------------------------------------------------------------------


@breaks("partition")
def tile_run_twice() -> Program:
    return with_run(GOOD["greedy"], 0, 1, hi=3)


@breaks("partition")
def tile_never_run() -> Program:
    return with_run(GOOD["greedy"], 0, 1, hi=1)


@breaks("partition")
def last_tile_never_run() -> Program:
    return with_run(GOOD["greedy"], 1, 0, hi=3)


@breaks("partition")
def op_without_runs() -> Program:
    program = GOOD["stream"]
    return with_queue(program, 1, [r for r in program.queues[1] if r.op != 3])


@breaks("partition")
def run_on_two_workers() -> Program:
    program = GOOD["pipeline"]
    again = replace(program.queues[2][0], signal=-1)
    return with_queue(program, 1, [*program.queues[1], again])


@breaks("partition")
def tiles_that_read_what_their_neighbours_write() -> Program:
    program = GOOD["stream"]
    square = Buffer("square", Kind.WEIGHT, DType.F32, HIDDEN, HIDDEN)
    program = replace(program, buffers=(*program.buffers, square))
    last = buffer_id(program, "last")
    return with_op(program, 2, w=Buf(len(program.buffers) - 1), x=last, y=last, n=VOCAB)


# --- structure --------------------------------------------------------------------------------------


@breaks("structure")
def more_queues_than_workers() -> Program:
    return replace(GOOD["greedy"], queues=(*GOOD["greedy"].queues, ()))


@breaks("structure")
def fewer_queues_than_workers() -> Program:
    return replace(GOOD["greedy"], machine=cpu(3))


@breaks("structure")
def tiles_beyond_the_op() -> Program:
    return with_run(GOOD["greedy"], 1, 0, hi=5)


@breaks("structure")
def tiles_below_zero() -> Program:
    return with_run(GOOD["greedy"], 0, 1, lo=-1)


@breaks("structure")
def empty_run() -> Program:
    return with_run(GOOD["greedy"], 0, 1, lo=2)


@breaks("structure")
def op_that_does_not_exist() -> Program:
    return with_run(GOOD["greedy"], 0, 1, op=7)


@breaks("structure")
def negative_op() -> Program:
    return with_run(GOOD["greedy"], 0, 6, op=-1)


@breaks("structure")
def signal_that_does_not_exist() -> Program:
    return with_run(GOOD["greedy"], 0, 4, signal=5)


@breaks("structure")
def wait_that_does_not_exist() -> Program:
    return with_wait(GOOD["greedy"], 0, 2, counter=-1)


@breaks("structure")
def operand_that_does_not_exist() -> Program:
    return with_op(GOOD["greedy"], 0, y=99)


@breaks("structure")
def operand_that_must_be_given() -> Program:
    return with_op(GOOD["greedy"], 0, y=NONE)


@breaks("structure")
def columns_outside_the_buffer() -> Program:
    return with_op(GOOD["greedy"], 2, y_col=4)


@breaks("structure")
def rows_outside_the_buffer() -> Program:
    return with_op(GOOD["greedy"], 1, rows=4)


@breaks("structure")
def weight_smaller_than_the_op_reads() -> Program:
    return with_buffer(GOOD["greedy"], "table", rows=VOCAB - 1)


@breaks("structure")
def bias_shorter_than_the_op_reads() -> Program:
    return with_buffer(GOOD["greedy"], "bias", cols=HIDDEN - 1)


@breaks("structure")
def page_table_smaller_than_the_op_reads() -> Program:
    return with_buffer(GOOD["attention"], "pages", rows=1)


@breaks("structure")
def cache_rows_beyond_the_tokens_of_a_step() -> Program:
    return replace(GOOD["attention"], tokens=2)


@breaks("structure")
def weight_that_is_written() -> Program:
    return with_buffer(GOOD["greedy"], "x", kind=Kind.WEIGHT, offset=-1)


@breaks("structure")
def cache_in_place_of_an_activation() -> Program:
    return with_op(GOOD["attention"], 1, y=buffer_id(GOOD["attention"], "k_cache"))


@breaks("structure")
def activation_in_place_of_a_weight() -> Program:
    return with_op(GOOD["greedy"], 1, w=buffer_id(GOOD["greedy"], "logits"))


@breaks("structure")
def token_ids_of_float_type() -> Program:
    return with_buffer(GOOD["greedy"], "tokens", dtype=DType.F32)


@breaks("structure")
def activation_of_integer_type() -> Program:
    return with_buffer(GOOD["greedy"], "h", dtype=DType.I32)


@breaks("structure")
def activation_of_half_precision() -> Program:
    return with_buffer(GOOD["greedy"], "h", dtype=DType.BF16)


@breaks("structure")
def two_buffers_of_one_name() -> Program:
    return with_buffer(GOOD["greedy"], "h", name="x")


@breaks("structure")
def buffer_without_columns() -> Program:
    return with_buffer(GOOD["greedy"], "bias", cols=0)


@breaks("structure")
def buffer_on_a_missing_device() -> Program:
    return with_buffer(GOOD["greedy"], "x", device=1)


@breaks("structure")
def counter_on_a_missing_device() -> Program:
    return replace(GOOD["devices"], counters=(Counter(1, 2),))


@breaks("structure")
def tiles_of_no_rows() -> Program:
    return with_op(GOOD["greedy"], 1, tile_rows=0)


@breaks("structure")
def heads_that_do_not_divide() -> Program:
    return with_op(GOOD["wide"], 5, kv_heads=3)


@breaks("structure")
def gate_without_its_second_weight() -> Program:
    return with_op(GOOD["greedy"], 1, w_up=NONE)


@breaks("structure")
def unknown_epilogue() -> Program:
    return with_op(GOOD["greedy"], 2, epilogue=3)


@breaks("structure")
def residual_of_a_product_that_adds_nothing() -> Program:
    return with_op(GOOD["greedy"], 1, residual=buffer_id(GOOD["greedy"], "h"))


@breaks("structure")
def residual_of_another_shape() -> Program:
    return with_op(GOOD["greedy"], 2, residual=buffer_id(GOOD["greedy"], "h"))


@breaks("structure")
def experts_outside_the_bank() -> Program:
    return with_op(GOOD["experts"], 3, bank=5)


@breaks("structure")
def matrices_of_a_bank_with_other_rows() -> Program:
    return with_op(GOOD["experts"], 3, n=4)


@breaks("structure")
def bank_for_an_op_that_takes_one_matrix() -> Program:
    return with_op(GOOD["experts"], 1, w=buffer_id(GOOD["experts"], "gate"))


@breaks("structure")
def choice_of_floats() -> Program:
    return with_op(GOOD["experts"], 3, chosen=buffer_id(GOOD["experts"], "weights"))


@breaks("structure")
def more_experts_chosen_than_there_are() -> Program:
    return with_op(GOOD["experts"], 2, top_k=5)


@breaks("structure")
def more_experts_chosen_than_the_kept_groups_hold() -> Program:
    return with_op(GOOD["experts"], 2, n_group=4)


@breaks("structure")
def experts_that_do_not_divide_into_groups() -> Program:
    return with_op(GOOD["experts"], 2, n_group=3)


@breaks("structure")
def unknown_scoring() -> Program:
    return with_op(GOOD["experts"], 2, scoring=2)


@breaks("structure")
def rows_that_do_not_divide_into_a_bank() -> Program:
    return with_buffer(GOOD["experts"], "gate", rows=33)


@breaks("structure")
def too_few_block_scales() -> Program:
    return with_buffer(GOOD["experts"], "down.scale", rows=11)  # as if blocks crossed the matrices


@breaks("ordering")
def experts_without_a_wait_for_the_choice() -> Program:
    return without_wait(GOOD["experts"], 0, 3)


@breaks("coverage")
def experts_before_the_choice() -> Program:
    d = programs.experts_draft(cpu(2))
    d.ops[2], d.ops[3] = d.ops[3], d.ops[2]
    phased(d)
    return d.program()


@breaks("choice")
def loader_that_trusts_the_waits_of_its_queue() -> Program:
    """The last wait of ExpertDown is the one for the choice; its worker knows that already."""
    program = GOOD["streamed_experts"]
    position = next(i for i, run in enumerate(program.queues[0]) if run.op == 4)
    return without_wait(program, 0, position, -1)


# Ops of GOOD["latent"]: 3 index rope, 4 scores, 5 latent append, 6 block-diagonal, 7 select, 8 attention,
# 9 combine.


@breaks("structure")
def heads_that_do_not_divide_into_parts() -> Program:
    return with_op(GOOD["latent"], 9, parts=3)


@breaks("structure")
def heads_that_do_not_divide_into_tiles() -> Program:
    return with_op(GOOD["latent"], 8, tile_heads=3)


@breaks("structure")
def selected_positions_without_a_number() -> Program:
    return with_op(GOOD["latent"], 8, topk=0)


@breaks("structure")
def number_of_positions_without_a_selection() -> Program:
    return with_op(GOOD["latent"], 8, selected=NONE)


@breaks("structure")
def selected_positions_as_floats() -> Program:
    return with_buffer(GOOD["latent"], "selected", dtype=DType.F32)


@breaks("structure")
def columns_that_are_not_rotated_in_pairs() -> Program:
    return with_op(GOOD["latent"], 5, rope=1)


@breaks("structure")
def more_columns_rotated_than_a_head_has() -> Program:
    return with_op(GOOD["latent"], 3, rope=10)


@breaks("structure")
def keys_of_a_width_without_hadamard_matrix() -> Program:
    return with_op(GOOD["latent"], 3, head_dim=6)


@breaks("structure")
def scores_for_fewer_positions_than_a_sequence_has() -> Program:
    return with_op(GOOD["latent"], 4, width=32)


@breaks("structure")
def rows_that_do_not_divide_into_groups() -> Program:
    return with_op(GOOD["latent"], 6, groups=3)


@breaks("structure")
def groups_with_a_norm() -> Program:
    return with_op(GOOD["latent"], 6, norm=buffer_id(GOOD["latent"], "norm"))


@breaks("structure")
def groups_that_reach_beyond_their_input() -> Program:
    return with_op(GOOD["latent"], 6, x_stride=13)


@breaks("structure")
def keys_of_an_indexer_in_another_type() -> Program:
    return with_buffer(GOOD["latent"], "keys", dtype=DType.F8E4M3)


@breaks("structure")
def packed_rows_of_a_plain_cache() -> Program:
    return with_op(GOOD["latent"], 5, packed=1)


@breaks("structure")
def packed_rows_that_are_not_bytes() -> Program:
    return with_buffer(GOOD["streamed_latent"], "latents", dtype=DType.BF16)


@breaks("sparing")
def queries_of_attention_that_are_left_out() -> Program:
    program = GOOD["latent"]
    return with_op(program, 6, beyond=8, when=buffer_id(program, "positions"))


@breaks("structure")
def left_out_without_positions() -> Program:
    return with_op(GOOD["latent"], 6, beyond=8)


@breaks("sparing")
def scores_left_out_where_some_are_selected() -> Program:
    return with_op(GOOD["latent"], 4, topk=17)


def latent_with_ops_exchanged(first: int, second: int) -> Program:
    d = programs.latent_draft(cpu(2), 2, 2)
    d.ops[first], d.ops[second] = d.ops[second], d.ops[first]
    phased(d)
    return d.program()


@breaks("coverage")
def positions_selected_before_they_have_scores() -> Program:
    return latent_with_ops_exchanged(4, 7)


@breaks("coverage")
def attention_before_the_selection() -> Program:
    return latent_with_ops_exchanged(7, 8)


@breaks("coverage")
def scores_before_the_keys_are_appended() -> Program:
    return latent_with_ops_exchanged(3, 4)


@breaks("ordering")
def attention_that_does_not_wait_for_the_selection() -> Program:
    return without_wait(GOOD["latent"], 0, 8)


@breaks("choice")
def loader_of_selected_rows_that_trusts_its_queue() -> Program:
    program = GOOD["streamed_latent"]
    position = next(i for i, run in enumerate(program.queues[1]) if run.op == 8)
    waits = program.queues[1][position].waits
    return without_wait(program, 1, position, max(i for i, w in enumerate(waits) if not w.lag))


def behind_a_silent_signal(
    *, ordered: bool = False, whole: bool = True, beyond: int = 0
) -> Program:
    """Worker 0 makes logits, then something that has tags if it is `whole`; worker 1, which takes the logits,
    waits for the signal of that, and with `ordered` for that of the logits, too."""
    d = Draft(programs.RING)
    counts, tokens, positions = d.state("counts", 2), d.state("tokens", 1), d.state("positions", 1)
    x, side = d.work("x", 1, HIDDEN), d.work("side", 1, HIDDEN + (not whole))
    d.op(Embed(tokens, d.weight("table", VOCAB, HIDDEN), x, counts, VOCAB, 1, HIDDEN, 1))
    extra = linear(x, d.weight("extra", HIDDEN, HIDDEN), side, counts, k=HIDDEN, n=HIDDEN, tile=4)
    d.op(replace(extra, beyond=beyond, when=positions if beyond else NONE))
    programs.choose(d, x, counts, tokens, 1)
    made, chosen = d.counter(), d.counter()
    logits = [d.counter()] if ordered else []
    d.run(0, 0, 0, 1, (chosen, 1, 1))
    d.run(0, 2, 0, 1)
    d.run(0, 3, 0, 4, signal=logits[0] if ordered else -1)
    d.run(0, 1, 0, 4, signal=made)
    d.run(1, 4, 0, 2, (made, 1), *((counter, 1) for counter in logits))
    d.run(1, 5, 0, 1, signal=chosen)
    return d.program()


@breaks("handoff")
def words_without_tags_behind_a_silent_signal() -> Program:
    return behind_a_silent_signal()


@breaks("handoff")
def words_behind_a_signal_that_is_silent_where_nobody_needs_the_op() -> Program:
    return behind_a_silent_signal(whole=False, beyond=8)


@breaks("ordering")
def product_moved_away_from_its_producer() -> Program:
    """Where the norm and the product of it are on one worker, no wait lies between them."""
    program = GOOD["pipeline"]
    queue, other = list(program.queues[1]), list(program.queues[2])
    assert not queue[1].waits
    assert queue[0].signal < 0
    return with_queue(with_queue(program, 2, [*other, queue.pop(1)]), 1, queue)


@breaks("structure")
def block_scales_that_do_not_exist() -> Program:
    return with_buffer(GOOD["experts"], "down", scale=Buf(99))


@breaks("structure")
def block_scales_without_a_block() -> Program:
    return with_buffer(GOOD["experts"], "down", block=(0, 0))


# --- devices, memory, ring --------------------------------------------------------------------------


@breaks("devices")
def activation_of_another_device() -> Program:
    return with_op(GOOD["devices"], 3, x=buffer_id(GOOD["devices"], "x"))


@breaks("devices")
def run_on_the_wrong_device() -> Program:
    program = GOOD["devices"]
    return replace(program, queues=program.queues[::-1])


@breaks("devices")
def block_scales_of_another_device() -> Program:
    program = with_buffer(GOOD["devices"], "table", rows=VOCAB)
    scale = Buffer("w.scale", Kind.WEIGHT, DType.F32, 4, 4, device=1)
    program = replace(program, buffers=(*program.buffers, scale))
    return with_buffer(program, "w", scale=Buf(len(program.buffers) - 1), block=(4, 4))


@breaks("memory")
def activations_that_overlap() -> Program:
    return with_buffer(GOOD["greedy"], "h", offset=0)


@breaks("memory")
def activations_that_share_their_last_byte() -> Program:
    program = with_buffer(GOOD["greedy"], "logits", offset=1 << 12)
    return with_buffer(program, "last", offset=(1 << 12) - 64, cols=17)


@breaks("memory")
def activation_not_aligned() -> Program:
    return with_buffer(GOOD["greedy"], "h", offset=(1 << 12) + 32)


@breaks("memory")
def activation_without_a_place() -> Program:
    return with_buffer(GOOD["greedy"], "h", offset=-1)


@breaks("memory")
def weight_in_the_arena() -> Program:
    return with_buffer(GOOD["greedy"], "table", offset=1 << 12)


@breaks("memory")
def arena_too_small() -> Program:
    program = GOOD["greedy"]
    return replace(program, machine=replace(program.machine, arena_bytes=program.arena_bytes - 1))


@breaks("ring")
def ring_ticket_off_by_one() -> Program:
    run = GOOD["ring"].queues[1][1]
    return with_run(GOOD["ring"], 1, 1, ring=run.ring + 1)


@breaks("ring")
def ring_tickets_in_another_order_than_the_queue() -> Program:
    return swapped(GOOD["ring"], 1, 0, 1)


@breaks("ring")
def ring_ticket_missing() -> Program:
    return with_run(GOOD["ring"], 0, 0, ring=-1)


@breaks("ring")
def ring_ticket_on_a_machine_without_ring() -> Program:
    return with_run(GOOD["greedy"], 0, 0, ring=0)


@breaks("ring")
def ring_with_slots_of_no_bytes() -> Program:
    program = GOOD["ring"]
    return replace(program, machine=replace(program.machine, slot_bytes=0))


@breaks("stream")
def past_rows_streamed_before_they_are_appended() -> Program:
    """The worker itself is in order with the append, but its loader is not."""
    program = GOOD["streamed_latent"]
    position = next(i for i, run in enumerate(program.queues[1]) if run.op == 8)
    late = next(i for i, wait in enumerate(program.queues[1][position].waits) if wait.lag)
    return without_wait(program, 1, position, late)
