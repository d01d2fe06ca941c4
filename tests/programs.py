"""Small sound programs, made by hand from ops and buffers, with weights and a first state for each.

They are the material of the tests of the verifier and of the interpreter: two to four workers, with
and without a ring, one token and several, full barriers between ops and the fewest waits that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tilert.backends.interpreter import Interpreter
from tilert.compiler import Limits, build
from tilert.ir.dtype import DType
from tilert.ir.machine import Machine, cpu
from tilert.ir.program import NONE, Buf, Buffer, Counter, Kind, Op, Program, Run, Wait
from tilert.models import load_config
from tilert.models.decoder import build as build_graph
from tilert.ops import (
    Accept,
    Argmax,
    Attention,
    Combine,
    Embed,
    ExpertDown,
    ExpertGate,
    Guess,
    IndexRope,
    IndexScore,
    LatentAppend,
    LatentAttention,
    Linear,
    NextToken,
    Norm,
    Rope,
    Route,
    Select,
)
from tilert.ops.experts import SOFTMAX
from tilert.ops.linear import ADD, GATE, STORE
from tilert.ops.mla import packed_bytes

VOCAB, HIDDEN, CONTEXT = 12, 16, 128
RING = Machine("ring", 2, slots=4, slot_bytes=96, window=2)
PAIR = Machine("pair", 1, devices=2)


class Draft:
    """A program under construction."""

    def __init__(
        self, machine: Machine, tokens: int = 1, outputs: int = 1, sequences: int = 1
    ) -> None:
        self.machine, self.tokens, self.outputs, self.sequences = (
            machine,
            tokens,
            outputs,
            sequences,
        )
        self.buffers: list[Buffer] = []
        self.ops: list[Op] = []
        self.totals: list[int] = []
        self.queues: list[list[Run]] = [[] for _ in range(machine.workers)]
        self.arena = [0] * machine.devices
        self.mark = ""  # appended to the names of state buffers of another device

    def add(self, buffer: Buffer) -> Buf:
        self.buffers.append(buffer)
        return Buf(len(self.buffers) - 1)

    def weight(self, name: str, rows: int, cols: int, dtype: DType = DType.F32) -> Buf:
        return self.add(Buffer(name, Kind.WEIGHT, dtype, rows, cols))

    def work(self, name: str, rows: int, cols: int, device: int = 0) -> Buf:
        offset = self.arena[device]
        self.arena[device] += -(-4 * rows * cols // 64) * 64
        return self.add(Buffer(name, Kind.WORK, DType.F32, rows, cols, device, offset))

    def state(self, name: str, cols: int, rows: int = 1, device: int = 0) -> Buf:
        return self.add(Buffer(name, Kind.STATE, DType.I32, rows, cols, device))

    def op(self, op: Op) -> int:
        self.ops.append(op)
        return len(self.ops) - 1

    def counter(self) -> int:
        self.totals.append(0)
        return len(self.totals) - 1

    def run(
        self, worker: int, op: int, lo: int, hi: int, *waits: tuple[int, ...], signal: int = -1
    ) -> None:
        """Append a run; a wait is (counter, threshold) or (counter, threshold, lag)."""
        wait = tuple(Wait(*w) for w in waits)
        self.queues[worker].append(Run(op, lo, hi, wait, signal))
        if signal >= 0:
            self.totals[signal] += 1

    def program(self) -> Program:
        """The program, with its ring tickets."""
        made = Program(
            self.machine, self.tokens, self.outputs, self.sequences, CONTEXT, tuple(self.buffers),
            tuple(self.ops), tuple(map(Counter, self.totals)), tuple(map(tuple, self.queues)),
        )  # fmt: skip
        return with_tickets(made)


def units(program: Program, op: Op, tile: int) -> int:
    """Ring slots of one tile."""
    return program.ring_units(op, tile, tile + 1)


def with_tickets(program: Program) -> Program:
    """The program with right ring tickets."""
    queues: list[tuple[Run, ...]] = []
    for queue in program.queues:
        ticket, runs = 0, []
        for run in queue:
            runs.append(replace(run, ring=ticket if program.machine.slots else -1))
            if program.machine.slots:
                ticket += sum(units(program, program.ops[run.op], t) for t in range(run.lo, run.hi))
        queues.append(tuple(runs))
    return replace(program, queues=tuple(queues))


def linear(
    x: Buf, w: Buf, y: Buf, counts: Buf, *, k: int, n: int, tile: int, rows: int = 1,
    epilogue: int = STORE, w_up: Buf = NONE, bias: Buf = NONE, norm: Buf = NONE,
    count_index: int = 0, y_col: int = 0,
) -> Linear:  # fmt: skip
    return Linear(x, w, w_up, bias, NONE, norm, y, counts, count_index, rows, k, n, y_col, tile,
                  epilogue, 1e-5)  # fmt: skip


def phased(
    draft: Draft, ops: Sequence[int] | None = None, workers: Sequence[int] | None = None
) -> None:
    """Spread each op over the workers with a full barrier after each op."""
    ops = range(len(draft.ops)) if ops is None else ops
    workers = range(draft.machine.workers) if workers is None else workers
    counters = {op: draft.counter() for op in ops}
    for i, op in enumerate(ops):
        tiles = draft.ops[op].tiles
        for n, worker in enumerate(workers):
            lo, hi = tiles * n // len(workers), tiles * (n + 1) // len(workers)
            if lo < hi:
                before = counters[ops[i - 1]]
                total = min(draft.ops[ops[i - 1]].tiles, len(workers))
                wait = (before, total, 0 if i else 1)
                draft.run(worker, op, lo, hi, wait, signal=counters[op])


def choose(
    draft: Draft, x: Buf, counts: Buf, tokens: Buf, rows: int, *, feed: int = 1
) -> list[int]:
    """Ops from the residual to the next token: gathering norm, logits, argmax, next token."""
    table = draft.weight("head", VOCAB, HIDDEN)
    last, logits = draft.work("last", rows, HIDDEN), draft.work("logits", rows, VOCAB)
    part = draft.work("part", rows, 4)
    gather, positions = draft.state("output_rows", rows), _named(draft, "positions", rows)
    norm = Norm(
        x,
        draft.weight("final_norm", 1, HIDDEN),
        gather,
        last,
        counts,
        rows,
        rows,
        HIDDEN,
        rows,
        1e-5,
    )
    head = linear(last, table, logits, counts, k=HIDDEN, n=VOCAB, tile=3, rows=rows, count_index=1)
    sampled = draft.state("sampled", rows)
    return [draft.op(op) for op in (
        norm, head, Argmax(logits, part, counts, rows, VOCAB, 6),
        NextToken(part, sampled, tokens, positions, counts, rows, 2, feed),
    )]  # fmt: skip


def _named(draft: Draft, name: str, cols: int) -> Buf:
    for i, buffer in enumerate(draft.buffers):
        if buffer.name == name:
            return Buf(i)
    return draft.state(name, cols)


def greedy_draft(machine: Machine) -> Draft:
    """Embedding, a gated MLP added to the residual, the choice: seven ops, no attention."""
    d = Draft(machine)
    counts, tokens = d.state("counts", 2), d.state("tokens", 1)
    x, h = d.work("x", 1, HIDDEN), d.work("h", 1, 8)
    d.op(Embed(tokens, d.weight("table", VOCAB, HIDDEN), x, counts, VOCAB, 1, HIDDEN, 1))
    d.op(linear(x, d.weight("gate", 8, HIDDEN), h, counts, k=HIDDEN, n=8, tile=2, epilogue=GATE,
                w_up=d.weight("up", 8, HIDDEN), norm=d.weight("norm", 1, HIDDEN)))  # fmt: skip
    d.op(linear(h, d.weight("down", HIDDEN, 8, DType.BF16), x, counts, k=8, n=HIDDEN, tile=4, epilogue=ADD,
                bias=d.weight("bias", 1, HIDDEN)))  # fmt: skip
    choose(d, x, counts, tokens, 1)
    return d


def greedy() -> Program:
    """Two workers, the fewest waits: worker 0 starts a step when it knows that worker 1 is done."""
    d = greedy_draft(cpu(2))
    embedded, gated, added, normed, chosen = (d.counter() for _ in range(5))
    d.run(0, 0, 0, 1, signal=embedded)
    d.run(0, 1, 0, 2, signal=gated)
    d.run(1, 1, 2, 4, (embedded, 1), signal=gated)
    d.run(0, 2, 0, 2, (gated, 2))
    d.run(1, 2, 2, 4, (gated, 2), signal=added)
    d.run(0, 3, 0, 1, (added, 1), signal=normed)
    d.run(0, 4, 0, 2)
    d.run(1, 4, 2, 4, (normed, 1))
    d.run(0, 5, 0, 1)
    d.run(1, 5, 1, 2, signal=chosen)
    d.run(0, 6, 0, 1, (chosen, 1))
    return d.program()


def barriers() -> Program:
    """The same ops on three workers with a barrier after each."""
    d = greedy_draft(cpu(3))
    phased(d)
    return d.program()


def ring() -> Program:
    """The same ops on a machine that streams weights through a ring."""
    d = greedy_draft(RING)
    phased(d)
    return d.program()


def pipeline() -> Program:
    """Three workers that are in different steps most of the time; every hand-back is a lag wait."""
    d = Draft(cpu(3))
    counts, tokens = d.state("counts", 2), d.state("tokens", 1)
    x, side = d.work("x", 1, HIDDEN), d.work("side", 1, HIDDEN)
    d.op(Embed(tokens, d.weight("table", VOCAB, HIDDEN), x, counts, VOCAB, 1, HIDDEN, 1))
    d.op(linear(x, d.weight("extra", HIDDEN, HIDDEN), side, counts, k=HIDDEN, n=HIDDEN, tile=4))
    choose(d, x, counts, tokens, 1)
    embedded, looked, chosen = (d.counter() for _ in range(3))
    d.run(0, 0, 0, 1, (chosen, 1, 1), (looked, 1, 1), signal=embedded)
    d.run(1, 2, 0, 1, (embedded, 1))
    d.run(1, 3, 0, 4)
    d.run(1, 4, 0, 2)
    d.run(1, 5, 0, 1, signal=chosen)
    d.run(2, 1, 0, 4, (embedded, 1), signal=looked)
    return d.program()


def stream() -> Program:
    """One worker hands over piece by piece: thresholds below the total, all producers in one queue."""
    d = Draft(cpu(2))
    counts, tokens = d.state("counts", 2), d.state("tokens", 1)
    x = d.work("x", 1, HIDDEN)
    d.op(Embed(tokens, d.weight("table", VOCAB, HIDDEN), x, counts, VOCAB, 1, HIDDEN, 1))
    choose(d, x, counts, tokens, 1)
    pieces, chosen = d.counter(), d.counter()
    d.run(0, 0, 0, 1, (chosen, 1, 1))
    d.run(0, 1, 0, 1)
    for tile in range(4):
        d.run(0, 2, tile, tile + 1, signal=pieces)
    d.run(1, 3, 0, 1, (pieces, 2))
    d.run(1, 3, 1, 2, (pieces, 4))
    d.run(1, 4, 0, 1, signal=chosen)
    return d.program()


def attention_draft(machine: Machine, tokens: int, splits: int) -> Draft:
    """A whole layer of attention for up to `tokens` tokens of two sequences."""
    d, heads, kv_heads, dim = Draft(machine, tokens, tokens, 2), 4, 2, 4
    counts, ids = d.state("counts", 2), d.state("tokens", tokens)
    at, who = d.state("positions", tokens), d.state("sequences", tokens)
    pages = d.state("pages", 2, rows=2)
    x, q = d.work("x", tokens, HIDDEN), d.work("q", tokens, heads * dim)
    k, v = d.work("k", tokens, kv_heads * dim), d.work("v", tokens, kv_heads * dim)
    norm, table = d.weight("norm", 1, HIDDEN), d.weight("rope", CONTEXT, dim)
    k_cache, v_cache = (
        d.add(Buffer(f"{name}_cache", Kind.CACHE, DType.F32, CONTEXT, kv_heads * dim))
        for name in "kv"
    )
    mixed = d.work("mixed", tokens, heads * dim)
    width = heads * splits * (dim + 2)
    shares = d.work("shares", tokens, width) if splits > 1 else mixed
    d.op(Embed(ids, d.weight("table", VOCAB, HIDDEN), x, counts, VOCAB, tokens, HIDDEN, 1))
    for y, name in ((q, "wq"), (k, "wk"), (v, "wv")):
        n = d.buffers[y].cols
        w = d.weight(name, n, HIDDEN, DType.F16)
        d.op(linear(x, w, y, counts, k=HIDDEN, n=n, tile=4, rows=tokens, norm=norm))
    q_norm = d.weight("q_norm", 1, dim)
    d.op(Rope(q, k, v, q_norm, NONE, table, k_cache, v_cache, at, who, pages, counts, tokens, heads,
              kv_heads, dim, CONTEXT, 2, 2, 1e-5))  # fmt: skip
    d.op(Attention(q, k_cache, v_cache, shares, at, who, pages, counts, tokens, heads, kv_heads, dim, 0,
                   splits, max(1, tokens // 2), 2, 2, 0.5))  # fmt: skip
    if splits > 1:
        d.op(Combine(shares, mixed, counts, tokens, heads, kv_heads, dim, splits, 0))
    wo = d.weight("wo", HIDDEN, HIDDEN)
    d.op(linear(mixed, wo, x, counts, k=HIDDEN, n=HIDDEN, tile=4, rows=tokens, epilogue=ADD))
    choose(d, x, counts, ids, tokens)
    return d


def attention() -> Program:
    """Several tokens, shares of the positions on three workers."""
    d = attention_draft(cpu(3), 3, 2)
    phased(d)
    return d.program()


def wide() -> Program:
    """One token, no shares, four workers."""
    d = attention_draft(cpu(4), 1, 1)
    phased(d)
    return d.program()


def devices() -> Program:
    """Two devices with their own buffers; only counters are shared."""
    d = Draft(PAIR)
    for device in (0, 1):
        mark = f"@{device}" if device else ""
        counts, tokens = (
            d.state(f"{n}{mark}", c, device=device) for n, c in (("counts", 2), ("tokens", 1))
        )
        x, y = (d.work(f"{n}{mark}", 1, HIDDEN, device) for n in "xy")
        table, w = d.weight(f"table{mark}", VOCAB, HIDDEN), d.weight(f"w{mark}", HIDDEN, HIDDEN)
        for weight in (table, w):
            d.buffers[weight] = replace(d.buffers[weight], device=device)
        d.op(Embed(tokens, table, x, counts, VOCAB, 1, HIDDEN, 1))
        d.op(linear(x, w, y, counts, k=HIDDEN, n=HIDDEN, tile=4))
    there = d.counter()
    d.run(0, 0, 0, 1)
    d.run(0, 1, 0, 4, signal=there)
    d.run(1, 2, 0, 1, (there, 1))
    d.run(1, 3, 0, 4)
    return d.program()


def experts_draft(machine: Machine, rows: int = 1) -> Draft:
    """A mixture of two of four experts: banks in f16, the last in FP8 with block scales that no matrix
    shares with the next."""
    d = Draft(machine, rows, rows)
    counts, tokens = d.state("counts", 2), d.state("tokens", rows)
    x, h = d.work("x", rows, HIDDEN), d.work("h", rows, 2 * 8)
    logits, weights = d.work("router", rows, 4), d.work("weights", rows, 2)
    chosen = d.work("chosen", rows, 2)
    d.buffers[chosen] = replace(d.buffers[chosen], dtype=DType.I32)
    gate, up = (
        d.add(Buffer(name, Kind.WEIGHT, DType.F16, 4 * 8, HIDDEN, bank=4))
        for name in ("gate", "up")
    )
    scale, norm = d.weight("down.scale", 4 * 3, 2), d.weight("norm", 1, HIDDEN)
    down = d.add(Buffer("down", Kind.WEIGHT, DType.F8E4M3, 4 * HIDDEN, 8, scale=scale, block=(6, 6),
                        bank=4))  # fmt: skip
    d.op(Embed(tokens, d.weight("table", VOCAB, HIDDEN), x, counts, VOCAB, rows, HIDDEN, 1))
    d.op(linear(x, d.weight("wr", 4, HIDDEN), logits, counts, k=HIDDEN, n=4, tile=2, rows=rows,
                norm=norm))  # fmt: skip
    d.op(Route(logits, NONE, chosen, weights, counts, rows, 4, 2, 1, 1, SOFTMAX, 1, 1.5))
    d.op(ExpertGate(x, gate, up, norm, chosen, h, counts, rows, HIDDEN, 8, 4, 2, 4, 1, 1e-5))
    d.op(ExpertDown(h, down, chosen, weights, x, counts, rows, 8, HIDDEN, 4, 2, 4))
    choose(d, x, counts, tokens, rows)
    return d


def experts() -> Program:
    """A mixture of experts on two workers."""
    d = experts_draft(cpu(2))
    phased(d)
    return d.program()


def streamed_experts() -> Program:
    """The same through a ring: who streams what is chosen waits itself for the choice."""
    d = experts_draft(RING, 2)
    phased(d)
    wait_for_choices(d)
    return d.program()


def latent_draft(machine: Machine, tokens: int, splits: int, topk: int = 16) -> Draft:
    """A layer of latent attention over at most `topk` positions that an indexer selects, with products
    side by side in one buffer, block-diagonal ones, and shares of positions."""
    d, heads, nope, rope, lora, dim = Draft(machine, tokens, tokens, 2), 4, 4, 2, 8, 8
    counts, ids = d.state("counts", 2), d.state("tokens", tokens)
    at, who = d.state("positions", tokens), d.state("sequences", tokens)
    pages = d.state("pages", 2, rows=2)
    paged = (at, who, pages, counts, tokens)
    x, table = d.work("x", tokens, HIDDEN), d.weight("rope", CONTEXT, rope)
    q_width, q_cols = heads * (nope + rope), heads * (nope + rope) + 2 * dim
    q, kv = d.work("q", tokens, q_cols), d.work("kv", tokens, lora + rope + dim + 2)
    queries, mixed = d.work("queries", tokens, heads * lora), d.work("mixed", tokens, heads * lora)
    shares = d.work("shares", tokens, heads * splits * (lora + 2)) if splits > 1 else mixed
    scores, order = d.work("scores", tokens, 2 * 64), d.work("order", tokens, 2 * 64)
    selected = d.work("selected", tokens, topk)
    for buf in (order, selected):
        d.buffers[buf] = replace(d.buffers[buf], dtype=DType.I32)
    values = d.work("values", tokens, HIDDEN)
    packed = machine.packed_latents
    latent = (DType.U8, packed_bytes(lora, rope)) if packed else (machine.cache_dtype, lora + rope)
    latents = d.add(Buffer("latents", Kind.CACHE, latent[0], CONTEXT, latent[1]))
    keys = d.add(Buffer("keys", Kind.CACHE, machine.index_dtype, CONTEXT, dim))
    scale = NONE
    if machine.index_dtype is DType.F8E4M3:
        scale = d.add(Buffer("scales", Kind.CACHE, DType.F32, CONTEXT, 1))
    norm = d.weight("norm", 1, HIDDEN)
    d.op(Embed(ids, d.weight("table", VOCAB, HIDDEN), x, counts, VOCAB, tokens, HIDDEN, 1))
    for y, name in ((q, "wq"), (kv, "wkv")):
        n = d.buffers[y].cols
        d.op(linear(x, d.weight(name, n, HIDDEN), y, counts, k=HIDDEN, n=n, tile=8, rows=tokens,
                    norm=norm))  # fmt: skip
    d.op(IndexRope(q, kv, d.weight("k_norm", 1, dim), d.weight("k_shift", 1, dim), table, keys, scale,
                   *paged, 2, dim, rope, q_width, lora + rope, 0, CONTEXT, 2, 2, 1e-6))  # fmt: skip
    d.op(IndexScore(q, kv, keys, scale, scores, order, *paged, 2, dim, q_width, lora + rope + dim, topk, 2,
                    64, max(1, tokens // 2), 2, 2, 0.25))  # fmt: skip
    d.op(LatentAppend(kv, d.weight("kv_norm", 1, lora), table, latents, *paged, rope, lora, 0, 1,
                      int(packed), CONTEXT, 2, 2, 1e-6))  # fmt: skip
    up = linear(q, d.weight("up", heads * lora, nope), queries, counts, k=nope, n=heads * lora, tile=4,
                rows=tokens)  # fmt: skip
    d.op(replace(up, groups=heads, x_stride=nope + rope))
    d.op(Select(scores, order, selected, at, counts, tokens, topk, 2, 64))
    d.op(LatentAttention(queries, q, table, latents, selected, shares, *paged, heads, 2, nope, rope, lora, 0,
                         1, int(packed), topk, splits, max(1, tokens // 2), CONTEXT, 2, 2, 0.4))  # fmt: skip
    if splits > 1:
        d.op(Combine(shares, mixed, counts, tokens, heads, heads, lora, splits, 0))
    down = linear(mixed, d.weight("down", HIDDEN, lora), values, counts, k=lora, n=HIDDEN, tile=3,
                  rows=tokens)  # fmt: skip
    d.op(replace(down, groups=heads, x_stride=lora))
    d.op(linear(values, d.weight("wo", HIDDEN, HIDDEN), x, counts, k=HIDDEN, n=HIDDEN, tile=4,
                rows=tokens, epilogue=ADD))  # fmt: skip
    choose(d, x, counts, ids, tokens)
    return d


def latent() -> Program:
    """Two tokens of which one sees more positions than are selected, shares on three workers."""
    d = latent_draft(cpu(3), 2, 2)
    phased(d)
    return d.program()


def streamed_latent() -> Program:
    """One token through a ring, keys in e4m3 and packed latents: the product merges the shares, and who
    streams the rows that were selected waits itself for the choice."""
    d = latent_draft(replace(RING, index_dtype=DType.F8E4M3, packed_latents=True), 1, 2)
    phased(d)
    wait_for_appends(d)
    wait_for_choices(d)
    return d.program()


def guess_draft(machine: Machine) -> Draft:
    """Three tokens of which two were guessed, and a layer of attention that makes two guesses: one pass
    over the tokens that count, at positions of their own, and one over the first guess."""
    d, rows = Draft(machine, 3, 3, 2), 3
    tokens, positions, counts = (
        d.state(n, c) for n, c in (("tokens", 3), ("positions", 3), ("counts", 2))
    )
    following, places, kept, last = (
        d.state(n, c) for n, c in (("following", 3), ("places", 3), ("kept", 2), ("last", 1))
    )
    guess, place, one = (d.state(n, c) for n, c in (("guess", 1), ("place", 1), ("one", 2)))
    table, x = d.weight("table", VOCAB, HIDDEN), d.work("x", rows, HIDDEN)
    head, part = d.weight("head", VOCAB, HIDDEN), d.work("part", rows, 4)
    k_cache, v_cache = (
        d.add(Buffer(f"{name}_cache", Kind.CACHE, DType.F32, CONTEXT, 4)) for name in "kv"
    )
    who, pages = d.state("sequences", 3), d.state("pages", 2, rows=2)
    d.op(Embed(tokens, table, x, counts, VOCAB, rows, HIDDEN, 1))

    def choose(x: Buf, rows: int, counts: Buf, part: Buf) -> None:
        logits = d.work(f"logits{len(d.ops)}", rows, VOCAB)
        d.op(linear(x, head, logits, counts, k=HIDDEN, n=VOCAB, tile=3, rows=rows, count_index=1))
        d.op(Argmax(logits, part, counts, rows, VOCAB, 6))

    choose(x, rows, counts, part)
    sampled = d.state("sampled", 3)
    d.op(
        Accept(
            part, sampled, tokens, positions, counts, following, places, kept, last, place, rows, 2
        )
    )
    passes = (following, places, kept, last, 3), (guess, place, one, d.state("only", 1), 1)
    for number, (ids, at, counts, row, rows) in enumerate(passes, 1):
        x = d.work(f"x{number}", rows, HIDDEN)
        q, k, v, mixed = (d.work(f"{name}{number}", rows, 4) for name in ("q", "k", "v", "mixed"))
        d.op(Embed(ids, table, x, counts, VOCAB, rows, HIDDEN, 1))
        for y, name in ((q, "wq"), (k, "wk"), (v, "wv")):
            w = _weight_of(d, name, 4, HIDDEN)
            d.op(linear(x, w, y, counts, k=HIDDEN, n=4, tile=4, rows=rows))
        d.op(Rope(q, k, v, NONE, NONE, _weight_of(d, "rope", CONTEXT, 4), k_cache, v_cache, at, who, pages,
                  counts, rows, 1, 1, 4, CONTEXT, 2, 2, 1e-5))  # fmt: skip
        d.op(Attention(q, k_cache, v_cache, mixed, at, who, pages, counts, rows, 1, 1, 4, 0, 1, 1, 2, 2,
                       0.5))  # fmt: skip
        d.op(linear(mixed, _weight_of(d, "wo", HIDDEN, 4), x, counts, k=4, n=HIDDEN, tile=4, rows=rows,
                    epilogue=ADD))  # fmt: skip
        z, part = d.work(f"z{number}", 1, HIDDEN), d.work(f"part{number}", 1, 4)
        norm = _weight_of(d, "final_norm", 1, HIDDEN)
        d.op(Norm(x, norm, row, z, counts, rows, 1, HIDDEN, 1, 1e-5))
        choose(z, 1, counts, part)
        d.op(Guess(part, guess, tokens, place, number, 2))
    return d


def _weight_of(draft: Draft, name: str, rows: int, cols: int) -> Buf:
    names = [b.name for b in draft.buffers]
    return Buf(names.index(name)) if name in names else draft.weight(name, rows, cols)


def guesses() -> Program:
    """A step that verifies guesses and makes new ones, on three workers."""
    d = guess_draft(cpu(3))
    phased(d)
    return d.program()


def wait_for_choices(d: Draft) -> None:
    """Whoever streams what an op has chosen gets a wait for that op."""
    for queue in d.queues:
        for i, run in enumerate(queue):
            choice = d.ops[run.op].choice
            if choice == NONE:
                continue
            maker = next(
                op for op, made in enumerate(d.ops)
                if any(r.buffer == choice for r in made.writes(0, made.tiles))
            )  # fmt: skip
            counter = next(r.signal for q in d.queues for r in q if r.op == maker)
            if all(w.counter != counter for w in run.waits):
                waits = (*run.waits, Wait(counter, d.totals[counter]))
                queue[i] = replace(run, waits=waits)


def wait_for_appends(d: Draft) -> None:
    """Whoever streams past rows of a cache gets a wait for those who append to it, in the step before."""
    for queue in d.queues:
        for i, run in enumerate(queue):
            past = {r.buffer for r in d.ops[run.op].reads(run.lo, run.hi) if r.row_lo < 0}
            makers = [
                op for op, made in enumerate(d.ops)
                if past & {r.buffer for r in made.writes(0, made.tiles)}
            ]  # fmt: skip
            signals = [next(r.signal for q in d.queues for r in q if r.op == op) for op in makers]
            waits = (Wait(counter, d.totals[counter], 1) for counter in signals)
            queue[i] = replace(run, waits=(*run.waits, *waits))


def loose() -> Program:
    """Three workers of which the first may run steps ahead: nobody needs what it makes."""
    d = Draft(cpu(3))
    counts, tokens = d.state("counts", 2), d.state("tokens", 1)
    table, w = d.weight("table", VOCAB, HIDDEN), d.weight("w", HIDDEN, HIDDEN)
    first, second = d.work("first", 1, HIDDEN), d.work("second", 1, HIDDEN)
    d.op(Embed(tokens, table, first, counts, VOCAB, 1, HIDDEN, 1))
    d.op(Embed(tokens, table, second, counts, VOCAB, 1, HIDDEN, 1))
    d.op(linear(second, w, d.work("y", 1, HIDDEN), counts, k=HIDDEN, n=HIDDEN, tile=4))
    spare, made, used = d.counter(), d.counter(), d.counter()
    d.run(0, 0, 0, 1, signal=spare)
    d.run(1, 1, 0, 1, (used, 1, 1), signal=made)
    d.run(2, 2, 0, 4, (made, 1), (spare, 1), signal=used)
    return d.program()


GOOD = {make.__name__: make() for make in (
    greedy, barriers, ring, pipeline, stream, loose, attention, wide, devices, experts,
    streamed_experts, latent, streamed_latent, guesses,
)}  # fmt: skip


def tiny_model(
    machine: Machine, tokens: int, hidden_size: int = 16, kv_heads: int = 2, *, joined: bool = True
) -> Program:
    """A compiled llama of two layers. joined: q, k and v may be one product."""
    config = load_config({
        "model_type": "llama", "vocab_size": 40, "hidden_size": hidden_size, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    })  # fmt: skip
    return build(
        build_graph(config, 128),
        machine,
        Limits(tokens, min(tokens, 8), 2, 128),
        {} if joined else {f"model.layers.{i}.self_attn.v_proj.weight": DType.BF16 for i in (0, 1)},
    )


def make_weights(program: Program) -> dict[str, np.ndarray]:
    """Random weights by name, the same for the same program."""
    random = np.random.default_rng(len(program.buffers) + 3)
    weights: dict[str, np.ndarray] = {}
    for b in program.buffers:
        if b.kind is Kind.WEIGHT:
            values = random.standard_normal((b.rows, b.cols)).astype(np.float32)
            pieces = np.array_split(
                values.astype(b.dtype.numpy), len(b.parts), axis=int(b.rows == 1)
            )
            weights.update(zip(b.parts, pieces, strict=True))
    return weights


def set_state(state: dict[str, np.ndarray], program: Program) -> None:
    """Two tokens when there is room (else one), at the end of a page and near the start; guesses are of
    one sequence."""
    used = min(2, program.tokens)
    first = {"tokens": [3, 7], "positions": [62, 5], "sequences": [1, 0], "output_rows": [0, 1]}
    if "following" in state:
        used = program.tokens
        first |= {
            "tokens": [3, 8, 7],
            "positions": [62, 63, 64],
            "sequences": [1, 1, 1],
            "one": [1, 1],
        }
    for name, array in state.items():
        kind = name.split("@")[0]
        if kind == "counts":
            array[0] = used, used
        elif kind == "pages":
            array[:] = np.asarray([[4, 1], [0, 3]])[: len(array), : array.shape[1]]
        elif kind in first:
            values = first[kind][: array.shape[1]]
            if kind == "sequences":
                values = [value % program.sequences for value in values]
            array[0, : len(values)] = values


@dataclass(frozen=True)
class Outcome:
    """Everything that a launch leaves: sampled ids of each step, and all memory as bytes."""

    sampled: tuple[bytes, ...]
    memory: dict[str, bytes]


def outcome(
    program: Program, weights: dict[str, np.ndarray], order: str, seed: int = 0, steps: int = 3
) -> Outcome:
    """Run `steps` steps from the first state."""
    caches = Interpreter.allocate_caches(program, 5)
    random = np.random.default_rng(1)
    for name in sorted(caches):
        caches[name][:] = random.standard_normal(caches[name].shape)
    machine = Interpreter(program, weights, caches, order=order, seed=seed)
    set_state(machine.state, program)
    sampled = [ids.tobytes() for ids in machine.run(steps)]
    memory = {name: array.tobytes() for name, array in caches.items()}
    for b in program.buffers:
        if b.kind in (Kind.WORK, Kind.STATE):
            memory[b.name] = machine.read(b.name).tobytes()
    return Outcome(tuple(sampled), memory)
