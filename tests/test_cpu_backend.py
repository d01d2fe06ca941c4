"""The CPU back end against the ops' numpy definitions: all ops, any number of threads, many steps.

Programs are made by hand, with a counter between each op and the next, so that nothing here depends on
the compiler.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from tilert.backends.cpu import (
    ISAS,
    CpuBackend,
    Pool,
    _core,
    allocate_caches,
    cache_shapes,
    make_pool,
)
from tilert.errors import UserError
from tilert.ir import encode, machine
from tilert.ir.dtype import DType
from tilert.ir.program import NONE, PAGE, Buf, Buffer, Counter, Kind, Op, Program, Run, Wait
from tilert.ops import Argmax, Attention, Combine, Embed, Linear, NextToken, Norm, Rope
from tilert.ops.linear import ADD, GATE, STORE

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 61, 32, 4, 2, 8, 48
SEQUENCES, CONTEXT, PAGES = 3, 200, 13
TABLE_COLS = -(-CONTEXT // PAGE)
EPS = 1e-5


class Tables:
    """Buffers and ops under construction."""

    def __init__(self, tokens: int, outputs: int) -> None:
        self.tokens, self.outputs = tokens, outputs
        self.buffers: list[Buffer] = []
        self.ops: list[Op] = []
        self.offset = 0

    def add(self, name: str, kind: Kind, dtype: DType, rows: int, cols: int) -> Buf:
        buffer = Buffer(name, kind, dtype, rows, cols)
        if kind is Kind.WORK:
            buffer = dataclasses.replace(buffer, offset=self.offset)
            self.offset += -(-buffer.bytes // 64) * 64
        self.buffers.append(buffer)
        return Buf(len(self.buffers) - 1)

    def weight(self, name: str, rows: int, cols: int, dtype: DType = DType.BF16) -> Buf:
        return self.add(name, Kind.WEIGHT, dtype, rows, cols)

    def matrix(self, name: str, rows: int, cols: int, dtype: DType, block: tuple[int, int]) -> Buf:
        """A weight of a product; FP8 has a scale for each block."""
        made = self.weight(name, rows, cols, dtype)
        if dtype is DType.F8E4M3:
            blocks = -(-rows // block[0]), -(-cols // block[1])
            scale = self.weight(f"{name}_scale", *blocks, DType.F32)
            self.buffers[made] = dataclasses.replace(self.buffers[made], scale=scale, block=block)
        return made

    def work(self, name: str, cols: int, rows: int | None = None) -> Buf:
        return self.add(name, Kind.WORK, DType.F32, rows or self.tokens, cols)

    def state(self) -> SimpleNamespace:
        cols = {"tokens": self.tokens, "positions": self.tokens, "sequences": self.tokens,
                "output_rows": self.outputs, "counts": 2, "sampled": self.outputs}  # fmt: skip
        made = {n: self.add(n, Kind.STATE, DType.I32, 1, c) for n, c in cols.items()}
        made["pages"] = self.add("pages", Kind.STATE, DType.I32, SEQUENCES, TABLE_COLS)
        return SimpleNamespace(**made)

    def program(self, workers: int) -> Program:
        """Tiles of each op split evenly; an op starts when the one before it has ended everywhere."""
        shares = [
            [(op.tiles * w // workers, op.tiles * (w + 1) // workers) for w in range(workers)]
            for op in self.ops
        ]
        totals = [sum(lo < hi for lo, hi in share) for share in shares]
        queues: list[list[Run]] = [[] for _ in range(workers)]
        for i, share in enumerate(shares):
            for queue, (lo, hi) in zip(queues, share, strict=True):
                before = (i - 1) % len(self.ops)
                wait = Wait(before, totals[before], int(i == 0))
                if lo < hi:
                    queue.append(Run(i, lo, hi, (wait,), i))
        return Program(
            machine.cpu(workers), self.tokens, self.outputs, SEQUENCES, CONTEXT,
            tuple(self.buffers), tuple(self.ops), tuple(Counter(n) for n in totals),
            tuple(map(tuple, queues)),
        )  # fmt: skip


def decoder(
    workers: int, tokens: int = 1, *, splits: int = 1, block: int = 8, window: int = 0,
    dtype: DType = DType.BF16, small: DType = DType.F32, biases: bool = False, feed: bool = True,
    scaled: tuple[int, int] = (8, 16),
) -> Program:  # fmt: skip
    """One layer of a decoder with every op of the instruction set; a greedy token per row."""
    t = Tables(tokens, tokens)
    s = t.state()
    q_width, kv_width, split_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, HEADS * (HEAD_DIM + 2)
    x, logits, part = t.work("x", WIDTH), t.work("logits", VOCAB), t.work("argmax", 2 * 5)
    added = t.work("added", WIDTH)
    q, y, k, v = (
        t.work("q", q_width),
        t.work("y", q_width),
        t.work("k", kv_width),
        t.work("v", kv_width),
    )
    hidden, last = t.work("hidden", HIDDEN), t.work("last", WIDTH)
    shares = t.work("shares", splits * split_width)
    embed = t.weight("embed", VOCAB, WIDTH, DType.BF16 if dtype is DType.F8E4M3 else dtype)

    def norm(name: str, width: int = WIDTH) -> Buf:
        return t.weight(name, 1, width, small)

    def linear(
        name: str, x: Buf, y: Buf, n: int, k: int, norm: Buf, epilogue: int = STORE, tile: int = 4,
        residual: Buf = NONE,
    ) -> None:  # fmt: skip
        w = t.matrix(name, n, k, dtype, scaled)
        up = t.matrix(f"{name}_up", n, k, dtype, scaled) if epilogue == GATE else NONE
        bias = t.weight(f"{name}_bias", 1, n, small) if biases else NONE
        bias_up = t.weight(f"{name}_up_bias", 1, n, small) if biases and up != NONE else NONE
        t.ops.append(Linear(x, w, up, bias, bias_up, norm, y, s.counts, 0, tokens, k, n, 0,
                            tile, epilogue, EPS, residual=residual))  # fmt: skip

    t.ops.append(Embed(s.tokens, embed, x, s.counts, VOCAB, tokens, WIDTH, 2))
    first = norm("norm_1")
    for name, out, n in (("wq", q, q_width), ("wk", k, kv_width), ("wv", v, kv_width)):
        linear(name, x, out, n, WIDTH, first)
    k_cache = t.add("k_cache", Kind.CACHE, DType.F32, CONTEXT, kv_width)
    v_cache = t.add("v_cache", Kind.CACHE, DType.F32, CONTEXT, kv_width)
    table = t.weight("rope", CONTEXT, HEAD_DIM, DType.F32)
    paged = (s.positions, s.sequences, s.pages, s.counts, tokens, HEADS, KV_HEADS, HEAD_DIM)
    t.ops.append(Rope(q, k, v, norm("q_norm", HEAD_DIM), norm("k_norm", HEAD_DIM), table, k_cache,
                      v_cache, *paged, CONTEXT, SEQUENCES, TABLE_COLS, EPS))  # fmt: skip
    t.ops.append(Attention(q, k_cache, v_cache, y if splits == 1 else shares, *paged, window, splits,
                           block, SEQUENCES, TABLE_COLS, HEAD_DIM**-0.5))  # fmt: skip
    if splits > 1:
        t.ops.append(Combine(shares, y, s.counts, tokens, HEADS, KV_HEADS, HEAD_DIM, splits,
                             window))  # fmt: skip
    linear("wo", y, x, WIDTH, q_width, NONE, ADD, 5)
    linear("gate", x, hidden, HIDDEN, WIDTH, norm("norm_2"), GATE, 7)
    linear("down", hidden, added, WIDTH, HIDDEN, NONE, ADD, residual=x)
    t.ops.append(
        Norm(added, norm("norm_3"), s.output_rows, last, s.counts, tokens, tokens, WIDTH, 2, EPS)
    )
    linear("head", last, logits, VOCAB, WIDTH, NONE, STORE, 6)
    t.ops.append(Argmax(logits, part, s.counts, tokens, VOCAB, 13))
    t.ops.append(NextToken(part, s.sampled, s.tokens, s.positions, s.counts, tokens, 5, int(feed)))
    return t.program(workers)


@cache
def weights_of(program: Program) -> dict[str, np.ndarray]:
    """Random weights of a size that keeps activations near one."""
    made = {}
    for b in program.buffers:
        if b.kind is Kind.WEIGHT:
            rng = np.random.default_rng(sum(b.name.encode()))
            values = rng.standard_normal((b.rows, b.cols)) * (1 if b.rows == 1 else b.cols**-0.5)
            if b.name == "rope":
                angles = np.arange(b.rows)[:, None] * 10.0 ** -np.arange(b.cols // 2)
                values = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
            made[b.name] = values.astype(b.dtype.numpy)
    return made


def prepare(state: Mapping[str, np.ndarray], rows: list[tuple[int, int]], seed: int = 0) -> None:
    """State of a step of (sequence, position) rows; the pages of the sequences are scattered."""
    rng = np.random.default_rng(seed)
    n = len(rows)
    state["tokens"][0, :n] = rng.integers(0, VOCAB, n)
    state["sequences"][0, :n] = [sequence for sequence, _ in rows]
    state["positions"][0, :n] = [position for _, position in rows]
    state["output_rows"][0, :n] = range(n)
    state["counts"][0] = n, n
    pages = np.random.default_rng(1).permutation(PAGES)
    state["pages"][:] = pages[: state["pages"].size].reshape(state["pages"].shape)


def fill(caches: Mapping[str, np.ndarray]) -> None:
    """Random keys and values in all pages, as if the past had been computed."""
    for name in sorted(caches):
        rng = np.random.default_rng(sum(name.encode()))
        caches[name][:] = rng.standard_normal(caches[name].shape)


class Reference:
    """Memory of the ops' reference bodies, run one op after another; caches as the CPU stores them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weights = weights_of(program)
        self.caches = allocate_caches(program, PAGES)
        self.arrays = {
            b.name: np.zeros((b.rows, b.cols), b.dtype.numpy)
            for b in program.buffers
            if b.kind in (Kind.STATE, Kind.WORK)
        } | self.weights
        self.state = self.arrays

    def buffer(self, buf: Buf) -> Buffer:
        return self.program.buffers[buf]

    def read(self, buf: Buf, row_lo: int, row_hi: int, col_lo: int, col_hi: int) -> np.ndarray:
        return self.arrays[self.buffer(buf).name][row_lo:row_hi, col_lo:col_hi].copy()

    def write(self, buf: Buf, row_lo: int, col_lo: int, values: np.ndarray) -> None:
        rows, cols = values.shape
        array = self.arrays[self.buffer(buf).name]
        array[row_lo : row_lo + rows, col_lo : col_lo + cols] = values

    def _cell(self, buf: Buf, token: int, position: int, col: int) -> np.ndarray:
        """The head_dim values of one position of one kv head, as a view."""
        name = self.buffer(buf).name
        sequence = self.arrays["sequences"][0, token]
        page, offset = self.arrays["pages"][sequence, position // PAGE], position % PAGE
        values = self.caches[name][page, col // HEAD_DIM]
        return values[:, offset] if cache_shapes(self.program)[name][2] == PAGE else values[offset]

    def read_cache(
        self, buf: Buf, token: int, lo: int, hi: int, col_lo: int, col_hi: int
    ) -> np.ndarray:
        assert col_hi - col_lo == HEAD_DIM
        return np.stack([self._cell(buf, token, p, col_lo) for p in range(lo, hi)])

    def write_cache(self, buf: Buf, token: int, col_lo: int, values: np.ndarray) -> None:
        position = int(self.arrays["positions"][0, token])
        self._cell(buf, token, position, col_lo)[:] = values

    def run(self, steps: int = 1) -> list[np.ndarray]:
        made = []
        for _ in range(steps):
            for op in self.program.ops:
                op.reference(self, 0, op.tiles)  # type: ignore[attr-defined]
            made.append(self.arrays["sampled"][0, : self.arrays["counts"][0, 1]].copy())
        return made


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    yield {n: make_pool(n) for n in (1, 2, 3)}
    gc.collect()


def backend(program: Program, pool: Pool, **options: float) -> CpuBackend:
    caches = allocate_caches(program, PAGES)
    made = CpuBackend(program, weights_of(program), caches, pool, **options)
    made.test_caches = caches  # type: ignore[attr-defined]
    return made


def check(program: Program, pool: Pool, rows: list[tuple[int, int]], steps: int) -> None:
    """Both give the same tokens, and the same activations and caches but for rounding."""
    expected, got = Reference(program), backend(program, pool)
    for each in (expected.caches, got.test_caches):  # type: ignore[attr-defined]
        fill(each)
    prepare(expected.state, rows)
    prepare(got.state, rows)
    tokens = expected.run(steps)
    np.testing.assert_array_equal(got.run(steps), tokens)
    for buffer in program.buffers:
        if buffer.kind in (Kind.WORK, Kind.STATE):
            want, have = expected.arrays[buffer.name], got.read(buffer.name)
            np.testing.assert_allclose(have, want, 2e-4, 2e-4, err_msg=buffer.name)
    for name, want in expected.caches.items():
        have = got.test_caches[name]  # type: ignore[attr-defined]
        np.testing.assert_allclose(have, want, 2e-4, 2e-4, err_msg=name)


ALONE = [(1, 130)]
SCATTERED = [(0, 5), (2, 63), (1, 64), (0, 90)]
FOLLOWING = [(2, 60 + i) for i in range(11)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (ALONE, {}),
        (ALONE, {"splits": 2, "biases": True}),
        (ALONE, {"dtype": DType.F32, "window": 70}),
        (ALONE, {"dtype": DType.F16, "small": DType.BF16, "biases": True}),
        (SCATTERED, {"splits": 3, "tokens": 5}),
        (SCATTERED, {"small": DType.F16, "tokens": 4, "biases": True}),
        (FOLLOWING, {"tokens": 11, "block": 4, "feed": False}),
        (FOLLOWING, {"tokens": 16, "block": 16, "feed": False, "window": 20, "dtype": DType.F32}),
        ([*FOLLOWING, (0, 3)], {"tokens": 12, "block": 4, "feed": False}),
        ([(2, 0)], {"splits": 3}),
        (ALONE, {"dtype": DType.F8E4M3}),
        (SCATTERED, {"dtype": DType.F8E4M3, "tokens": 4, "biases": True, "scaled": (3, 32)}),
        (FOLLOWING, {"dtype": DType.F8E4M3, "tokens": 11, "feed": False}),
        (FOLLOWING, {"dtype": DType.F8E4M3, "tokens": 11, "feed": False, "scaled": (1, 100)}),
        (FOLLOWING, {"dtype": DType.F8E4M3, "tokens": 11, "feed": False, "scaled": (4, 7)}),
        (SCATTERED, {"dtype": DType.F8E4M3, "tokens": 4, "scaled": (5, 1)}),
    ],
)
def test_equals_the_definition(
    pools: dict[int, Pool], threads: int, rows: list[tuple[int, int]], options: dict
) -> None:
    steps = 1 if options.get("feed") is False else 4
    check(decoder(threads, **options), pools[threads], rows, steps)


def test_fewer_workers_than_threads(pools: dict[int, Pool]) -> None:
    check(decoder(1), pools[3], ALONE, 2)


@pytest.mark.parametrize("tokens", [1, 4])
def test_same_bits_on_every_run(pools: dict[int, Pool], tokens: int) -> None:
    made = backend(decoder(3, tokens, splits=2), pools[3])
    rows = SCATTERED[:3][:tokens]  # three sequences
    seen = set()
    for _ in range(5):
        prepare(made.state, rows)
        tokens_made = np.stack(made.run(20))
        seen.add((tokens_made.tobytes(), made.read("logits").tobytes(), made.read("x").tobytes()))
    assert len(seen) == 1


def test_launches_go_on_where_the_last_one_ended(pools: dict[int, Pool]) -> None:
    whole, parts = (backend(decoder(2), pools[2]) for _ in range(2))
    prepare(whole.state, [(0, 0)])
    prepare(parts.state, [(0, 0)])
    expected = np.stack(whole.run(150))  # crosses two page borders
    np.testing.assert_array_equal(np.concatenate([parts.run(n) for n in (1, 2, 140, 7)]), expected)
    assert parts.state["positions"][0, 0] == 150


def test_tokens_arrive_in_order_while_steps_go_on(pools: dict[int, Pool]) -> None:
    made = backend(decoder(2), pools[2])
    prepare(made.state, [(0, 0)])
    expected = np.stack(made.run(50))
    prepare(made.state, [(0, 0)])
    seen: list[np.ndarray] = []
    assert len(made.run(50, lambda row: bool(seen.append(row)))) == 50
    np.testing.assert_array_equal(seen, expected)
    prepare(made.state, [(0, 0)])
    np.testing.assert_array_equal(list(made.steps(50)), expected)


def test_cancel_ends_at_a_step_border(pools: dict[int, Pool]) -> None:
    made = backend(decoder(2), pools[2])
    prepare(made.state, [(0, 0)])
    expected = np.stack(made.run(190))
    for stop in (1, 2, 30):
        prepare(made.state, [(0, 0)])
        seen: list[np.ndarray] = []

        def on_token(row: np.ndarray, seen: list = seen, stop: int = stop) -> bool:
            seen.append(row)
            return len(seen) == stop

        np.testing.assert_array_equal(made.run(190, on_token), expected[:stop])
        # All workers have ended the same step: the state is that of a whole number of steps.
        steps = int(made.state["positions"][0, 0])
        assert stop <= steps <= 190
        assert made.state["sampled"][0, 0] == made.state["tokens"][0, 0] == expected[steps - 1, 0]


def test_closing_the_iterator_frees_the_pool(pools: dict[int, Pool]) -> None:
    program = decoder(2)
    first, second = backend(program, pools[2]), backend(program, pools[2])
    prepare(first.state, [(0, 0)])
    prepare(second.state, [(0, 0)])
    launched = first.steps(100)
    token = next(launched)
    launched.close()
    np.testing.assert_array_equal(second.run(1), [token])


def test_an_error_of_the_caller_frees_the_pool(pools: dict[int, Pool]) -> None:
    made = backend(decoder(2), pools[2])
    prepare(made.state, [(0, 0)])

    def on_token(_: np.ndarray) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:  # the traceback keeps the iterator alive
        made.run(100, on_token)
    prepare(made.state, [(0, 0)])
    assert len(made.run(3)) == 3
    del kept


def test_a_dropped_launch_does_not_harm(pools: dict[int, Pool]) -> None:
    for _ in range(20):
        made = backend(decoder(2), pools[2])
        prepare(made.state, [(0, 0)])
        launched = made.steps(150)
        next(launched)
        del made, launched  # memory goes away while the workers run, unless the end is awaited
    gc.collect()
    check(decoder(2), pools[2], ALONE, 1)


def test_executors_take_turns_on_one_pool(pools: dict[int, Pool]) -> None:
    decode, prompt = decoder(2), decoder(1, 11, feed=False)
    caches = allocate_caches(decode, PAGES)
    runs = [CpuBackend(p, weights_of(p), caches, pools[2]) for p in (decode, prompt)]
    expected = Reference(decode), Reference(prompt)
    for e in expected:
        e.caches = expected[0].caches
    for first in (0, 11):  # a prompt in two pieces, then eight tokens
        rows = [(1, first + i) for i in range(11)]
        for each in (runs[1], expected[1]):
            prepare(each.state, rows, seed=first)
        np.testing.assert_array_equal(runs[1].run(), expected[1].run())
    for each in (runs[0], expected[0]):
        prepare(each.state, [(1, 22)])
    np.testing.assert_array_equal(runs[0].run(8), expected[0].run(8))


def test_two_host_threads_share_a_pool(pools: dict[int, Pool]) -> None:
    program = decoder(2)
    runs = [backend(program, pools[2]) for _ in range(2)]
    expected = Reference(program)
    prepare(expected.state, [(0, 0)])
    tokens = expected.run(3)
    failures = []

    def many(made: CpuBackend) -> None:
        for _ in range(40):
            prepare(made.state, [(0, 0)])
            if not np.array_equal(made.run(3), tokens):
                failures.append(made)

    threads = [threading.Thread(target=many, args=(made,)) for made in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_second_launch_at_once_is_an_error(pools: dict[int, Pool]) -> None:
    made = backend(decoder(1), pools[1])
    prepare(made.state, [(0, 0)])
    first = made.steps(199)
    next(first)
    if made._core.wait(0, 0)[1]:  # still running
        with pytest.raises(RuntimeError, match="has not ended"):
            next(made.steps(1))
    first.close()


def _with_wait(program: Program, worker: int, run: int, wait: Wait) -> Program:
    queues = [list(queue) for queue in program.queues]
    changed = queues[worker][run]
    queues[worker][run] = dataclasses.replace(changed, waits=(*changed.waits, wait))
    return dataclasses.replace(program, queues=tuple(map(tuple, queues)))


def test_a_deadlock_is_an_error_and_the_pool_lives(pools: dict[int, Pool]) -> None:
    good = decoder(3)
    stuck = backend(_with_wait(good, 1, 2, Wait(4, 1000)), pools[3], wait_limit=0.2)
    prepare(stuck.state, [(0, 0)])
    message = r"worker \d, step 0, run \d+ \(op \d+, \w+\): waited 0.2 s for counter \d+"
    with pytest.raises(RuntimeError, match=message + r": it has \d+, wants \d+"):
        stuck.run(3)
    check(good, pools[3], ALONE, 2)
    with pytest.raises(RuntimeError, match="waited"):
        stuck.run(3)


def test_a_deadlock_in_a_later_step_gives_the_steps_before(pools: dict[int, Pool]) -> None:
    # The last op signals once per step, so that two signals of step 0 never come.
    good = decoder(1)
    last = len(good.ops) - 1
    stuck = backend(_with_wait(good, 0, 0, Wait(last, 2, 1)), pools[1], wait_limit=0.2)
    prepare(stuck.state, [(0, 0)])
    launched = stuck.steps(5)
    assert next(launched).shape == (1,)  # lag 1 holds in step 0
    with pytest.raises(RuntimeError, match=rf"step 1, .* counter {last}: it has 1, wants 2"):
        next(launched)


def test_interrupt_while_waiting_cancels(pools: dict[int, Pool]) -> None:
    good = decoder(1)
    stuck = backend(_with_wait(good, 0, 0, Wait(3, 1000)), pools[1], wait_limit=0.5)
    prepare(stuck.state, [(0, 0)])
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises((KeyboardInterrupt, RuntimeError)) as caught:
        stuck.run(1)
    chain = caught.value, caught.value.__context__
    assert any(isinstance(error, KeyboardInterrupt) for error in chain)
    check(good, pools[1], ALONE, 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", VOCAB, rf"embed\): token id {VOCAB} is outside \[0, {VOCAB}\)"),
        ("tokens", -1, "token id -1"),
        ("positions", CONTEXT, "position 200"),
        ("positions", -7, "position -7"),
        ("sequences", SEQUENCES, "sequence 3"),
        ("pages", PAGES, "page 13"),
        ("pages", -1, "page -1"),
        ("counts", 2, "2 rows"),
        ("counts", -1, "-1 rows"),
        ("output_rows", 1, "row 1"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_state_that_leads_outside_memory_is_an_error(
    pools: dict[int, Pool], threads: int, name: str, value: int, message: str
) -> None:
    program = decoder(threads)
    made = backend(program, pools[threads])
    prepare(made.state, ALONE)
    made.state[name][:] = value
    with pytest.raises(RuntimeError, match=message):
        made.run(2)
    check(program, pools[threads], ALONE, 1)


def test_a_loop_beyond_the_context_is_an_error(pools: dict[int, Pool]) -> None:
    made = backend(decoder(2), pools[2])
    prepare(made.state, [(0, CONTEXT - 3)])
    seen = []
    with pytest.raises(RuntimeError, match=f"position {CONTEXT}"):
        seen.extend(made.steps(5))
    prepare(made.state, [(0, CONTEXT - 3)])
    assert len(made.run(3)) == 3


def test_trace_has_every_run_in_order(pools: dict[int, Pool]) -> None:
    program = decoder(2)
    made = backend(program, pools[2])
    prepare(made.state, ALONE)
    made.run(1)
    assert made.records().shape == (0, 6)
    made.trace(True)
    prepare(made.state, ALONE)
    made.run(3)
    records = made.records()
    expected = [
        (worker, run, step)
        for worker, queue in enumerate(program.queues)
        for step in range(3)
        for run in range(len(queue))
    ]
    assert list(map(tuple, records[:, :3].tolist())) == expected
    times = records[:, 3:]
    assert (np.diff(times, axis=1) >= 0).all()
    for worker in range(2):
        own = times[records[:, 0] == worker]
        assert (own[1:, 0] >= own[:-1, 2]).all()
    # With one counter between ops, no run starts before all runs of the op before it have ended.
    ops = np.array([program.queues[w][r].op for w, r in records[:, :2]])
    order = records[:, 2] * len(program.ops) + ops
    for place in range(1, order.max() + 1):
        assert times[order == place, 1].min() >= times[order == place - 1, 2].max()
    made.trace(False)
    made.run(1)
    assert not made.records().size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: None, "weight 'wq' is missing"),
        (lambda w: w[:-1], r"weight 'wq' has shape \(31, 32\); the program needs \(32, 32\)"),
        (lambda w: w.astype(np.float32), "dtype float32; the program needs bfloat16"),
        (lambda w: w.T, "weight 'wq' is not contiguous"),
    ],
)
def test_wrong_weights_are_named(pools: dict[int, Pool], change, message: str) -> None:  # noqa: ANN001
    program = decoder(1)
    weights = dict(weights_of(program))
    weights["wq"] = change(weights["wq"])
    if weights["wq"] is None:
        del weights["wq"]
    with pytest.raises(UserError, match=message):
        CpuBackend(program, weights, allocate_caches(program, PAGES), pools[1])


def test_vectors_may_have_one_dimension_and_be_read_only(pools: dict[int, Pool]) -> None:
    program = decoder(1)
    weights = {n: w[0] if w.shape[0] == 1 else w.copy() for n, w in weights_of(program).items()}
    for weight in weights.values():
        weight.flags.writeable = False
    made = CpuBackend(program, weights, allocate_caches(program, PAGES), pools[1])
    expected = backend(program, pools[1])
    for each in (made, expected):
        prepare(each.state, [(0, 0)])
    np.testing.assert_array_equal(made.run(4), expected.run(4))


def test_programs_of_other_machines_are_refused(pools: dict[int, Pool]) -> None:
    program = decoder(3)

    def refused(changed: Program, message: str) -> None:
        with pytest.raises(UserError, match=message):
            CpuBackend(changed, weights_of(program), {}, pools[3])

    refused(dataclasses.replace(program, machine=machine.NULL), "streams through rings")
    two = dataclasses.replace(program.machine, devices=2)
    refused(dataclasses.replace(program, machine=two), "for 2 devices")
    with pytest.raises(UserError, match="has 3 workers, but the pool has 2 threads"):
        CpuBackend(program, weights_of(program), {}, pools[2])


def test_binary_programs_are_checked(pools: dict[int, Pool]) -> None:
    program = decoder(1)
    data = encode.to_bytes(program)
    made = backend(program, pools[1])
    addresses = [[(a.ctypes.data, a.nbytes) for a in parts] for parts in made._parts]

    def bind(changed: bytes, memory: list[list[tuple[int, int]]] = addresses) -> None:
        _core.Executor(pools[1].core, pools[1].isa, changed, memory, None)

    bind(data)
    for cut in (0, 10, 60, len(data) // 2, len(data) - 1):
        with pytest.raises(RuntimeError, match="not a valid program"):
            bind(data[:cut])
    words = np.frombuffer(data[: len(data) // 4 * 4], np.int32)
    for at in range(len(encode.HEADER)):  # a header that lies
        for value in (-1, 1 << 30):
            changed = words.copy()
            changed[at] = value
            if encode.HEADER[at] in ("tokens", "outputs", "sequences", "context") and value > 0:
                continue  # more room than is used
            with pytest.raises(RuntimeError):
                bind(changed.tobytes() + data[len(words) * 4 :])
    with pytest.raises(RuntimeError, match="too little memory"):
        bind(data, [[(p, max(0, n - 4)) for p, n in parts] for parts in addresses])
    with pytest.raises(RuntimeError, match="one entry per buffer"):
        bind(data, [[], *addresses[1:]])
    run = dataclasses.replace(program.queues[0][0], hi=99)
    longer = dataclasses.replace(program, queues=((run, *program.queues[0][1:]),))
    with pytest.raises(RuntimeError, match="ends at tile 99 of 1"):
        bind(encode.to_bytes(longer))


def test_operands_that_are_too_small_are_refused(pools: dict[int, Pool]) -> None:
    program = decoder(1)
    for i, op in enumerate(program.ops):
        for f in dataclasses.fields(op):  # type: ignore[arg-type]
            grows = ("rows", "k", "n", "width", "vocab", "heads", "kv_heads", "head_dim", "page_rows",
                     "page_cols", "y_col", "chunks", "x_rows", "context", "splits")  # fmt: skip
            if f.name not in grows:
                continue
            ops = list(program.ops)
            changed = getattr(op, f.name) * 64 + 64
            ops[i] = dataclasses.replace(op, **{f.name: changed})  # type: ignore[type-var]
            with pytest.raises(RuntimeError, match=rf"op {i} "):
                backend(dataclasses.replace(program, ops=tuple(ops)), pools[1])


@pytest.mark.parametrize("isa", ISAS)
def test_chosen_kernels(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("TILERT_CPU_ISA", isa)
    if _core.find_isa(isa) is None:
        with pytest.raises(UserError, match="this machine accepts portable"):
            make_pool(1)
        return
    pool = make_pool(2)
    assert pool.isa == isa
    check(decoder(2, 4, splits=2), pool, SCATTERED, 2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_code_of_fp8_is_widened_exactly(
    monkeypatch: pytest.MonkeyPatch, isa: str, tokens: int
) -> None:
    if _core.find_isa(isa) is None:
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("TILERT_CPU_ISA", isa)
    t = Tables(tokens, 1)
    state = t.state()
    x, y = t.work("x", 40), t.work("y", 256)
    w = t.matrix("w", 256, 40, DType.F8E4M3, (256, 40))
    t.ops.append(Linear(x, w, NONE, NONE, NONE, NONE, y, state.counts, 0, tokens, 40, 256, 0, 16,
                        STORE, EPS))  # fmt: skip
    part = t.work("part", 2, 1)
    t.ops.append(Argmax(y, part, state.counts, 1, 256, 256))
    t.ops.append(NextToken(part, state.sampled, NONE, NONE, state.counts, 1, 1, 0))
    program = t.program(1)
    codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 40, axis=1)
    weights = {"w": codes.view(ml_dtypes.float8_e4m3fn), "w_scale": np.ones((1, 1), np.float32)}
    made = CpuBackend(program, weights, {}, make_pool(1))
    made.state["counts"][0] = tokens, 1
    one = 37  # in the last columns, which fill no vector
    made.read("x")[:, one] = 1
    made.run(1)
    exact = weights["w"][:, one].astype(np.float32)
    known = ~np.isnan(exact)
    assert known.sum() == 254
    np.testing.assert_array_equal(made.read("y")[0, known], exact[known])
    assert np.isnan(made.read("y")[0, ~known]).all()


def test_unknown_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILERT_CPU_ISA", "sse9")
    with pytest.raises(UserError, match="TILERT_CPU_ISA is 'sse9'; this machine accepts portable"):
        make_pool(1)


def test_pool_sizes() -> None:
    assert make_pool(2).size == 2
    assert make_pool().size == len(os.sched_getaffinity(0))
    for threads in (0, -1, 2000):
        with pytest.raises(UserError, match=f"threads is {threads}; accepted are 1 to 1024"):
            make_pool(threads)


def test_read_rate(pools: dict[int, Pool]) -> None:
    arrays = [np.ones(n, ml_dtypes.bfloat16) for n in (1, 7, 1000, 1 << 20)]
    for pool in pools.values():
        assert pool.measure_read_rate(arrays) > 0
