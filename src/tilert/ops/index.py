"""The indexer of DeepSeek sparse attention (DeepSeek-V3.2-Exp): which positions a token attends to.

A key per position, and per token a few query heads, all turned by a Hadamard matrix, which changes no dot
product but spreads outliers; score of a position = sum over heads of weight * relu(q . k); the best
index_topk positions are selected. Where the key cache is e4m3, queries and keys are quantised with one scale
a row, a power of two, as DeepSeek's inference code does (scale_fmt ue8m0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.dtype import DType
from tilert.ir.program import NONE, PAGE, PAST, Buf, Cost, Op, Region
from tilert.ops.memory import Memory, count
from tilert.ops.rope import halves, rotate

E4M3_MAX = 448.0
SMALLEST = 1e-4  # largest magnitude that a row is taken to have at least


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in f32."""
    x = x.astype(np.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(eps)) * weight + bias


def hadamard(x: np.ndarray) -> np.ndarray:
    """x times the Hadamard matrix of its width (Sylvester's order, a power of two) * width^-0.5."""
    width, step = x.shape[-1], 1
    assert width & (width - 1) == 0, f"{width} is no power of two"
    while step < width:
        pairs = x.reshape(*x.shape[:-1], -1, 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([first + second, first - second], axis=-2).reshape(x.shape)
        step *= 2
    return x * np.float32(width**-0.5)


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x / scale in e4m3, scale [..., 1] f32): the least power of two with which no element overflows."""
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(SMALLEST))
    mantissa, exponent = np.frexp(largest * np.float32(1 / E4M3_MAX))
    scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
    return np.clip(x / scale, -E4M3_MAX, E4M3_MAX).astype(DType.F8E4M3.numpy), scale


@dataclass(frozen=True, slots=True)
class IndexRope(Op):
    """Tile i < heads: the indexer's query head i is rotated, turned and (e4m3) rounded in place.

    Tile heads: the key gets its LayerNorm, is rotated and turned, and is appended to index_cache; its
    scale, where the cache is e4m3, to index_scale. Only the first `rope` of head_dim columns are rotated.
    q [rows, >= q_col + heads * head_dim], k [rows, >= k_col + head_dim] f32; weight, shift [1,
    head_dim] of the norm; table [context, rope] f32; index_cache [context, head_dim], index_scale
    [context, 1] f32. Rounded queries are stored times their scale, which f32 and bf16 hold exactly.
    """

    opcode: ClassVar[int] = 25
    q: Buf
    k: Buf
    weight: Buf
    shift: Buf
    table: Buf
    index_cache: Buf
    index_scale: Buf
    positions: Buf
    sequences: Buf
    pages: Buf
    counts: Buf
    rows: int
    heads: int
    head_dim: int
    rope: int
    q_col: int
    k_col: int
    interleave: int
    context: int
    page_rows: int
    page_cols: int
    eps: float

    @property
    def tiles(self) -> int:
        return self.heads + 1

    def _queries(self, lo: int, hi: int) -> list[Region]:
        first, end = (
            self.q_col + lo * self.head_dim,
            self.q_col + min(hi, self.heads) * self.head_dim,
        )
        return [Region(self.q, 0, self.rows, first, end)] if first < end else []

    def reads(self, lo: int, hi: int) -> list[Region]:
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.positions, 0, 1, 0, self.rows),
               Region(self.table, 0, self.context, 0, self.rope), *self._queries(lo, hi)]  # fmt: skip
        if hi > self.heads:
            out += [Region(self.k, 0, self.rows, self.k_col, self.k_col + self.head_dim),
                    Region(self.weight, 0, 1, 0, self.head_dim),
                    Region(self.shift, 0, 1, 0, self.head_dim),
                    Region(self.sequences, 0, 1, 0, self.rows),
                    Region(self.pages, 0, self.page_rows, 0, self.page_cols)]  # fmt: skip
        return out

    def writes(self, lo: int, hi: int) -> list[Region]:
        out = self._queries(lo, hi)
        if hi > self.heads:
            out.append(Region(self.index_cache, 0, self.rows, 0, self.head_dim))
            if self.index_scale != NONE:
                out.append(Region(self.index_scale, 0, self.rows, 0, 1))
        return out

    def tag_checking(self) -> tuple[Buf, ...]:
        return (self.k,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, 2 * (hi - lo) * self.rows * self.head_dim * self.head_dim.bit_length())

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, one token of one head at a time."""
        d = self.head_dim
        for t in range(count(mem, self.counts, 0)):
            position = int(mem.read(self.positions, 0, 1, t, t + 1)[0, 0])
            assert 0 <= position < self.context, f"position {position} outside [0, {self.context})"
            angles = mem.read(self.table, position, position + 1, 0, self.rope)[0]
            for head in range(lo, min(hi, self.heads)):
                col = self.q_col + head * d
                q = self._turned(mem.read(self.q, t, t + 1, col, col + d), angles)
                if self.index_scale != NONE:
                    values, scale = quantised(q)
                    q = values.astype(np.float32) * scale
                mem.write(self.q, t, col, q)
            if hi > self.heads:
                self._append(mem, t, angles)

    def _append(self, mem: Memory, t: int, angles: np.ndarray) -> None:
        d = self.head_dim
        k = mem.read(self.k, t, t + 1, self.k_col, self.k_col + d)
        weight, shift = (
            mem.read(b, 0, 1, 0, d).astype(np.float32) for b in (self.weight, self.shift)
        )
        k = self._turned(layer_norm(k, weight, shift, self.eps), angles)
        if self.index_scale == NONE:
            mem.write_cache(self.index_cache, t, 0, k[0])
        else:
            values, scale = quantised(k)
            mem.write_cache(self.index_cache, t, 0, values[0])
            mem.write_cache(self.index_scale, t, 0, scale[0])

    def _turned(self, x: np.ndarray, angles: np.ndarray) -> np.ndarray:
        first, rest = x[:, : self.rope], x[:, self.rope :]
        rotated = rotate(halves(first) if self.interleave else first, angles)
        return hadamard(np.concatenate([rotated, rest], axis=1))


@dataclass(frozen=True, slots=True)
class IndexScore(Op):
    """Tile b * splits + s: scores of the tokens of block b at the positions of share s, the largest first.

    score(p) = scale * sum over heads of head_weights[h] * relu(q[h] . k[p]). Page n of a sequence belongs
    to share n % splits, so that shares stay even as the context grows. The scores of a share lie in y
    [rows, splits * width] from column s * width on, in falling order and equal ones in the order of their
    positions, which lie beside them in order [rows, splits * width] i32: so whoever selects reads of each
    share only as much as it may take. A token that sees no more than topk positions needs no scores and
    gets none.
    """

    opcode: ClassVar[int] = 26
    q: Buf
    head_weights: Buf
    index_cache: Buf
    index_scale: Buf
    y: Buf
    order: Buf
    positions: Buf
    sequences: Buf
    pages: Buf
    counts: Buf
    rows: int
    heads: int
    head_dim: int
    q_col: int
    w_col: int
    topk: int
    splits: int
    width: int
    block: int
    page_rows: int
    page_cols: int
    scale: float

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.block) * self.splits

    def place(self, tile: int) -> tuple[int, int, int]:
        """(first token, end token, split) of a tile."""
        block, split = divmod(tile, self.splits)
        return block * self.block, min((block + 1) * self.block, self.rows), split

    def reads(self, lo: int, hi: int) -> list[Region]:
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.positions, 0, 1, 0, self.rows),
               Region(self.sequences, 0, 1, 0, self.rows),
               Region(self.pages, 0, self.page_rows, 0, self.page_cols)]  # fmt: skip
        caches = [(self.index_cache, self.head_dim), (self.index_scale, 1)]
        first, w = self.q_col, self.w_col
        for begin, end, _ in (self.place(tile) for tile in range(lo, hi)):
            out += [Region(self.q, begin, end, first, first + self.heads * self.head_dim),
                    Region(self.head_weights, begin, end, w, w + self.heads)]  # fmt: skip
            out += [Region(b, -PAST, end, 0, cols) for b, cols in caches if b != NONE]
        return out

    def writes(self, lo: int, hi: int) -> list[Region]:
        places = [self.place(tile) for tile in range(lo, hi)]
        return [
            Region(buf, begin, end, split * self.width, (split + 1) * self.width)
            for begin, end, split in places
            for buf in (self.y, self.order)
        ]

    @property
    def spared(self) -> int:
        return self.topk

    def tag_checking(self) -> tuple[Buf, ...]:
        return (self.head_weights,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        if context < self.topk:
            return Cost(0)
        seen, bytes_each = -(-context // self.splits), 4 if self.index_scale == NONE else 1
        flops = sum(2 * (e - b) for b, e, _ in (self.place(tile) for tile in range(lo, hi)))
        return Cost(0, (hi - lo) * seen * self.head_dim * bytes_each,
                    flops * self.heads * seen * self.head_dim)  # fmt: skip

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, one token and page at a time, and a stable sort."""
        tokens = count(mem, self.counts, 0)
        for begin, end, split in (self.place(tile) for tile in range(lo, hi)):
            for t in range(begin, min(end, tokens)):
                visible = int(mem.read(self.positions, 0, 1, t, t + 1)[0, 0]) + 1
                held = share_positions(split, visible, self.splits)
                if visible > self.topk and held.size:
                    scores = self._scores(mem, t, held)
                    best = np.argsort(-scores, kind="stable")
                    mem.write(self.y, t, split * self.width, scores[None, best])
                    mem.write(self.order, t, split * self.width, held[None, best])

    def _scores(self, mem: Memory, t: int, held: np.ndarray) -> np.ndarray:
        """The scores of a share's positions for token t."""
        d, first = self.head_dim, self.q_col
        q_HD = mem.read(self.q, t, t + 1, first, first + self.heads * d).reshape(self.heads, d)
        w_1H = mem.read(self.head_weights, t, t + 1, self.w_col, self.w_col + self.heads)
        pieces: list[np.ndarray] = []
        for page in np.split(held, np.flatnonzero(np.diff(held // PAGE)) + 1):
            begin, end = int(page[0]), int(page[-1]) + 1
            k_SD = mem.read_cache(self.index_cache, t, begin, end, 0, d).astype(np.float32)
            if self.index_scale != NONE:
                k_SD = k_SD * mem.read_cache(self.index_scale, t, begin, end, 0, 1)
            pieces.append((w_1H @ np.maximum(q_HD @ k_SD.T, 0) * np.float32(self.scale))[0])
        return np.concatenate(pieces)


def share_positions(split: int, visible: int, splits: int) -> np.ndarray:
    """The positions below `visible` whose pages belong to a share, rising."""
    positions = np.arange(visible)
    return positions[positions // PAGE % splits == split]


@dataclass(frozen=True, slots=True)
class Select(Op):
    """Tile t: the topk positions of token t with the largest scores, in rising order.

    Of equal scores the lower position is taken first. A token that sees no more than topk positions
    selects them all; its row of `chosen` [rows, topk] i32 then has as many entries as it sees, and the
    rest is undefined. scores, order: y and order of IndexScore.
    """

    opcode: ClassVar[int] = 27
    scores: Buf
    order: Buf
    chosen: Buf
    positions: Buf
    counts: Buf
    rows: int
    topk: int
    splits: int
    width: int

    @property
    def tiles(self) -> int:
        return self.rows

    def reads(self, lo: int, hi: int) -> list[Region]:
        width = self.splits * self.width
        return [Region(self.counts, 0, 1, 0, 2), Region(self.positions, 0, 1, 0, self.rows),
                Region(self.scores, lo, hi, 0, width), Region(self.order, lo, hi, 0, width)]  # fmt: skip

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.chosen, lo, hi, 0, self.topk)]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, 4 * (hi - lo) * self.topk)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, by a stable sort of the scores in the order of their positions."""
        for t in range(lo, min(hi, count(mem, self.counts, 0))):
            visible = int(mem.read(self.positions, 0, 1, t, t + 1)[0, 0]) + 1
            best = np.arange(visible)
            if visible > self.topk:
                best = np.argsort(-self._scores(mem, t, visible), kind="stable")[: self.topk]
            mem.write(self.chosen, t, 0, np.sort(best)[None])

    def _scores(self, mem: Memory, t: int, visible: int) -> np.ndarray:
        """By position."""
        scores = np.empty(visible, np.float32)
        for split in range(min(self.splits, -(-visible // PAGE))):
            first = split * self.width
            end = first + share_positions(split, visible, self.splits).size
            at = mem.read(self.order, t, t + 1, first, end)[0]
            scores[at] = mem.read(self.scores, t, t + 1, first, end)[0]
        return scores
