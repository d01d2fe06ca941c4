"""A mixture of experts: the router's choice, and products with the matrices that it has chosen.

Weights of a layer's experts are banks: `bank` matrices stacked in the rows of one buffer. Which of them
a token needs is known only when Route has run, so the products declare that they read a whole bank, and
a back end that streams weights ahead waits for `chosen` (Op.choice) before it asks for their rows.

Sources: transformers' modeling_qwen3_moe.py (softmax), modeling_mixtral.py (the same, renormalised) and
modeling_deepseek_v3.py (sigmoid, bias, groups).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.dtype import DType
from tilert.ir.program import NONE, Buf, Cost, Op, Region
from tilert.ops.linear import multiplicand, rounded, weight_f32
from tilert.ops.memory import Memory, count

SOFTMAX, SIGMOID = 0, 1  # scoring
TINY = np.float32(1e-20)  # keeps the sum of the chosen scores from being zero


@dataclass(frozen=True, slots=True)
class Route(Op):
    """The `top_k` of `experts` experts that each token goes to, and their weights; a tile is a token.

    score = softmax(logits) or sigmoid(logits) over all experts. Chosen are the largest logits (scoring
    SOFTMAX: the order is that of the scores), or the largest score + bias (SIGMOID). Among equal ones the
    lower number is taken first. n_group > 1: only experts of the `topk_group` groups whose two best sum
    to most, groups being consecutive experts. weights = score of the chosen, without the bias, divided by
    (their sum + 1e-20) if norm_topk_prob, times routed_scaling_factor.
    `chosen` holds the experts in rising order, so that sums over them have one order.
    logits [rows, experts] f32, bias [1, experts], chosen [rows, top_k] i32, weights [rows, top_k] f32.
    """

    opcode: ClassVar[int] = 20
    logits: Buf
    bias: Buf
    chosen: Buf
    weights: Buf
    counts: Buf
    rows: int
    experts: int
    top_k: int
    n_group: int
    topk_group: int
    scoring: int
    norm_topk_prob: int
    routed_scaling_factor: float

    @property
    def tiles(self) -> int:
        return self.rows

    def reads(self, lo: int, hi: int) -> list[Region]:
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.logits, lo, hi, 0, self.experts)]
        return out if self.bias == NONE else [*out, Region(self.bias, 0, 1, 0, self.experts)]

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(buf, lo, hi, 0, self.top_k) for buf in (self.chosen, self.weights)]

    def tagging(self) -> tuple[Buf, ...]:
        """Of several tokens those that a step has not are not written."""
        return (self.chosen, self.weights) if self.rows == 1 else ()

    def tag_checking(self) -> tuple[Buf, ...]:
        return (self.logits,)

    def whole_reads(self) -> tuple[Buf, ...]:
        return (self.logits,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, (hi - lo) * self.experts * (self.top_k + 8))

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition. Rows beyond the step's count are left alone."""
        bias = np.float32(0)
        if self.bias != NONE:
            bias = mem.read(self.bias, 0, 1, 0, self.experts)[0].astype(np.float32)
        for t in range(lo, min(hi, count(mem, self.counts, 0))):
            logits = mem.read(self.logits, t, t + 1, 0, self.experts)[0]
            if self.scoring == SIGMOID:
                scores = 1 / (1 + np.exp(-logits))
                chosen = self._best(scores + bias)
            else:
                scores = np.exp(logits - logits.max())
                scores /= scores.sum()
                chosen = self._best(logits + bias)
            weights = scores[chosen]
            if self.norm_topk_prob:
                weights = weights / (weights.sum() + TINY)
            mem.write(self.chosen, t, 0, chosen[None])
            mem.write(self.weights, t, 0, weights[None] * np.float32(self.routed_scaling_factor))

    def _best(self, values: np.ndarray) -> np.ndarray:
        """The chosen experts, in rising order."""
        if self.n_group > 1:
            groups = values.reshape(self.n_group, -1)
            sums = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
            kept = np.argsort(-sums, kind="stable")[: self.topk_group]
            inside = np.isin(np.arange(self.n_group), kept)
            values = np.where(inside[:, None], groups, np.float32(-np.inf)).ravel()
        return np.sort(np.argsort(-values, kind="stable")[: self.top_k])


@dataclass(frozen=True, slots=True)
class ExpertGate(Op):
    """y[t, j * n + r] = silu(x'[t] @ w[e, r]) * (x'[t] @ w_up[e, r]) with e = chosen[t, j].

    x' is x, or RMSNorm(x) * norm when `norm` is given; see Linear, for x_type too. A tile is a block of
    `tile_rows` rows r: with by_slot of one slot j, for all tokens in turn (few tokens: who has many
    workers cuts finely); else of all slots, so that rows of an expert are read once for all its tokens.
    x [rows, k] f32; w, w_up [bank * n, k]; chosen [rows, top_k] i32; y [rows, top_k * n].
    """

    opcode: ClassVar[int] = 21
    x: Buf
    w: Buf
    w_up: Buf
    norm: Buf
    chosen: Buf
    y: Buf
    counts: Buf
    rows: int
    k: int
    n: int
    bank: int
    top_k: int
    tile_rows: int
    by_slot: int
    eps: float
    x_type: int = DType.F32

    @property
    def blocks(self) -> int:
        """Tiles of one slot."""
        return -(-self.n // self.tile_rows)

    @property
    def tiles(self) -> int:
        return self.blocks * (self.top_k if self.by_slot else 1)

    @property
    def choice(self) -> Buf:
        return self.chosen

    @property
    def passes(self) -> int:
        return 1 if self.by_slot else self.top_k

    @property
    def turns(self) -> int:
        return self.rows

    def column(self, tile: int) -> int:
        """First column of y of a tile; without by_slot, of its part of the first slot."""
        slot, block = divmod(tile, self.blocks)
        return slot * self.n + min(block * self.tile_rows, self.n)

    def weight_rows(self, lo: int, hi: int) -> int:
        return 2 * (self.column(hi) - self.column(lo))

    def pass_bytes(self, dtype_bytes: int) -> int:
        return self.weight_rows(0, 1) * self.k * dtype_bytes

    def reads(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.column(lo), self.column(hi)
        slots = (begin // self.n, -(-end // self.n)) if self.by_slot else (0, self.top_k)
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.x, 0, self.rows, 0, self.k),
               Region(self.chosen, 0, self.rows, *slots)]  # fmt: skip
        # Any matrix of the banks may be chosen.
        out += [Region(w, 0, self.bank * self.n, 0, self.k) for w in (self.w, self.w_up)]
        return out if self.norm == NONE else [*out, Region(self.norm, 0, 1, 0, self.k)]

    def writes(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.column(lo), self.column(hi)
        firsts = [0] if self.by_slot else range(0, self.top_k * self.n, self.n)
        return [Region(self.y, 0, self.rows, first + begin, first + end) for first in firsts]

    def tagging(self) -> tuple[Buf, ...]:
        return (self.y,)

    def tag_checking(self) -> tuple[Buf, ...]:
        return (self.x, self.chosen)

    def whole_reads(self) -> tuple[Buf, ...]:
        return (self.x,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        """Of the weights only those of as many experts as the step's tokens can choose."""
        elements = self.weight_rows(lo, hi) * self.k  # of one expert
        slots = self.top_k if self.by_slot else 1  # over which tiles share the experts
        read = elements * min(self.rows * self.top_k, self.bank) // slots
        return Cost(read * dtype_bytes, 0, 2 * elements * self.passes * self.turns)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        rows = count(mem, self.counts, 0)
        x = mem.read(self.x, 0, rows, 0, self.k)
        x, root = multiplicand(mem, x, self.norm, self.eps, DType(self.x_type))
        for tile in range(lo, hi):
            begin, end = self.column(tile), self.column(tile + 1)
            slot, first = divmod(begin, self.n)
            for j in [slot] if self.by_slot else range(self.top_k):
                y = np.zeros((rows, end - begin), np.float32)
                for expert, t in _by_expert(mem, self.chosen, rows, j, self.bank):
                    row = expert * self.n + first
                    gate, up = (
                        x[t] @ weight_f32(mem, w, row, row + end - begin, self.k).T / root[t]
                        for w in (self.w, self.w_up)
                    )
                    y[t] = gate / (1 + np.exp(-gate)) * up
                mem.write(self.y, 0, j * self.n + first, y)


@dataclass(frozen=True, slots=True)
class ExpertDown(Op):
    """y[t, r] += w[e, r] @ (weights[t, j] * x[t, j]) with e = chosen[t, j], for j = 0, 1, .. in turn.

    x[t, j] are columns [j * k, (j + 1) * k) of x; with its weight it is rounded to x_type as in Linear,
    so that the sum over j is one product over top_k * k. A tile is a block of `tile_rows` rows r, for
    all tokens.
    x [rows, top_k * k]; w [bank * n, k]; chosen i32 and weights f32 [rows, top_k]; y [rows, n] f32.
    """

    opcode: ClassVar[int] = 22
    x: Buf
    w: Buf
    chosen: Buf
    weights: Buf
    y: Buf
    counts: Buf
    rows: int
    k: int
    n: int
    bank: int
    top_k: int
    tile_rows: int
    x_type: int = DType.F32

    @property
    def tiles(self) -> int:
        return -(-self.n // self.tile_rows)

    @property
    def choice(self) -> Buf:
        return self.chosen

    @property
    def passes(self) -> int:
        return self.top_k

    @property
    def turns(self) -> int:
        return self.rows

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Rows of each matrix of tiles [lo, hi), which are columns of y."""
        return lo * self.tile_rows, min(hi * self.tile_rows, self.n)

    def weight_rows(self, lo: int, hi: int) -> int:
        begin, end = self.span(lo, hi)
        return end - begin

    def pass_bytes(self, dtype_bytes: int) -> int:
        return self.weight_rows(0, 1) * self.k * dtype_bytes

    def reads(self, lo: int, hi: int) -> list[Region]:
        return [
            Region(self.counts, 0, 1, 0, 2),
            Region(self.x, 0, self.rows, 0, self.top_k * self.k),
            Region(self.chosen, 0, self.rows, 0, self.top_k),
            Region(self.weights, 0, self.rows, 0, self.top_k),
            Region(self.w, 0, self.bank * self.n, 0, self.k),  # any matrix may be chosen
            *self.writes(lo, hi),
        ]

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.y, 0, self.rows, *self.span(lo, hi))]

    def tagging(self) -> tuple[Buf, ...]:
        return (self.y,)

    def tag_checking(self) -> tuple[Buf, ...]:
        return (self.x, self.y, self.chosen, self.weights)  # y: the residual

    def whole_reads(self) -> tuple[Buf, ...]:
        return (self.x,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        """As of ExpertGate."""
        elements = self.weight_rows(lo, hi) * self.k
        read = elements * min(self.rows * self.top_k, self.bank)
        return Cost(read * dtype_bytes, 0, 2 * elements * self.passes * self.turns)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        rows, (begin, end) = count(mem, self.counts, 0), self.span(lo, hi)
        y = mem.read(self.y, 0, rows, begin, end)
        weights = mem.read(self.weights, 0, rows, 0, self.top_k)
        for j in range(self.top_k):
            x = mem.read(self.x, 0, rows, j * self.k, (j + 1) * self.k).astype(np.float32)
            x = rounded(weights[:, j, None] * x, DType(self.x_type))
            for expert, t in _by_expert(mem, self.chosen, rows, j, self.bank):
                row = expert * self.n + begin
                y[t] += x[t] @ weight_f32(mem, self.w, row, row + end - begin, self.k).T
        mem.write(self.y, 0, begin, y)


def _by_expert(
    mem: Memory, chosen: Buf, rows: int, slot: int, bank: int
) -> list[tuple[int, np.ndarray]]:
    """Each expert that some tokens chose in a slot, with those tokens."""
    experts = mem.read(chosen, 0, rows, slot, slot + 1)[:, 0]
    assert ((experts >= 0) & (experts < bank)).all(), f"experts {experts} outside [0, {bank})"
    return [(int(e), np.flatnonzero(experts == e)) for e in np.unique(experts)]
