"""Rotation and attention in one tile: what a GPU gains from having a hand-off less.

The same formulas as Rope and Attention. Past positions come from the cache and never depend on this
step, so a loader may stream them early; the step's own keys and values are rotated where they are used,
and once more by Append, beside the chain of ops that a token waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tilert.ir.program import NONE, PAGE, PAST, Buf, Cost, Op, Region
from tilert.ops.attention import empty_share, visible, weigh
from tilert.ops.memory import Memory, count
from tilert.ops.rope import turned

QUERY_ROWS = 16  # of matrix units: query heads that a tile has, of all its tokens


def block_tokens(group: int, rows: int) -> int:
    """Tokens of a tile of Attend, in steps of up to `rows`: blocks are as even as they can be."""
    blocks = -(-rows // max(1, QUERY_ROWS // group))
    return -(-rows // blocks)


def page_share(lo: int, hi: int, split: int, splits: int) -> list[tuple[int, int]]:
    """The part of the positions [lo, hi) that belongs to `split`, [begin, end) in each of its pages.

    Pages are dealt out in rounds that begin one split later each, for the first split has most to do
    besides. A page belongs to the same split whoever looks: what a token finds does not depend on how
    many tokens the step has.
    """
    pages = range(lo // PAGE, -(-hi // PAGE)) if lo < hi else range(0)
    own = [page for page in pages if split_of(page, splits) == split]
    return [(max(lo, page * PAGE), min(hi, (page + 1) * PAGE)) for page in own]


def split_of(page: Any, splits: int) -> Any:
    """The split that a page belongs to; or for an array of pages."""
    return (page + page // splits) % splits


def head_of(
    mem: Memory, op: Attend | Append, buf: Buf, norm: Buf, t: int, col: int
) -> np.ndarray:  # fmt: skip
    """A head of token t, from column `col` of a buffer on: normed if there is a norm, and rotated."""
    d = op.head_dim
    position = int(mem.read(op.positions, 0, 1, t, t + 1)[0, 0])
    assert 0 <= position < op.context, f"position {position} outside [0, {op.context})"
    x = mem.read(buf, t, t + 1, col, col + d)[0]
    weight = None if norm == NONE else mem.read(norm, 0, 1, 0, d)[0]
    angles = mem.read(op.table, position, position + 1, 0, d)[0]
    return turned(x, weight, op.eps, angles)


def fresh_rows(
    mem: Memory, op: Attend | Append, g: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The step's own keys and values of a kv head, [tokens, head_dim], rounded as the cache is."""
    d, cache = op.head_dim, mem.buffer(op.k_cache).dtype.numpy
    k = np.stack([head_of(mem, op, op.k, op.k_norm, t, op.k_col + g * d) for t in range(tokens)])
    v = mem.read(op.v, 0, tokens, op.v_col + g * d, op.v_col + (g + 1) * d)
    return k.astype(cache).astype(np.float32), v.astype(cache).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Append(Op):
    """Tile g: the step's keys and values of kv head g into the caches, as Attend has them.

    Nothing in the step waits for it: attention has its own keys and values, and whoever streams past rows
    in the next step waits for this one's signal.
    """

    opcode: ClassVar[int] = 31
    k: Buf
    v: Buf
    k_norm: Buf
    table: Buf
    k_cache: Buf
    v_cache: Buf
    positions: Buf
    sequences: Buf
    pages: Buf
    counts: Buf
    rows: int
    kv_heads: int
    head_dim: int
    context: int
    page_rows: int
    page_cols: int
    eps: float
    k_col: int  # where keys and values begin in their buffers
    v_col: int

    @property
    def tiles(self) -> int:
        return self.kv_heads

    def reads(self, lo: int, hi: int) -> list[Region]:
        d = self.head_dim
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.table, 0, self.context, 0, d),
               Region(self.pages, 0, self.page_rows, 0, self.page_cols)]  # fmt: skip
        out += [Region(b, 0, 1, 0, self.rows) for b in (self.positions, self.sequences)]
        out += [Region(self.k_norm, 0, 1, 0, d)] if self.k_norm != NONE else []
        fresh = ((self.k, self.k_col), (self.v, self.v_col))
        return out + [Region(b, 0, self.rows, c + lo * d, c + hi * d) for b, c in fresh]

    def writes(self, lo: int, hi: int) -> list[Region]:
        d, caches = self.head_dim, (self.k_cache, self.v_cache)
        return [Region(b, 0, self.rows, lo * d, hi * d) for b in caches]

    def tag_checking(self) -> tuple[Buf, ...]:
        return self.k, self.v

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, 12 * (hi - lo) * self.rows * self.head_dim)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, one token at a time."""
        tokens, d = count(mem, self.counts, 0), self.head_dim
        for g in range(lo, hi):
            k, v = fresh_rows(mem, self, g, tokens)
            for t in range(tokens):
                mem.write_cache(self.k_cache, t, g * d, k[t])
                mem.write_cache(self.v_cache, t, g * d, v[t])


@dataclass(frozen=True, slots=True)
class Attend(Op):
    """Tile (b * kv_heads + g) * splits + s: tokens of block b, kv head g with its group of query heads,
    share s of the past positions.

    q, k, v as the products left them, in buffers of their own or side by side in one: q and k are
    normed (if q_norm, k_norm) and rotated here, then all are rounded to the cache's type. Split 0 also
    attends to each token's own position. y [rows, heads * splits * (head_dim + 2)] gets the partial
    results in the layout of Attention with splits > 1; back ends may leave out shares without positions,
    for Combine leaves them out, too. A token sees the earlier tokens of its sequence in the same step as
    part of their pages, also where those are of another block.
    """

    opcode: ClassVar[int] = 9
    q: Buf
    k: Buf
    v: Buf
    q_norm: Buf
    k_norm: Buf
    table: Buf
    k_cache: Buf
    v_cache: Buf
    y: Buf
    positions: Buf
    sequences: Buf
    pages: Buf
    counts: Buf
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    splits: int
    context: int
    page_rows: int
    page_cols: int
    eps: float
    scale: float
    k_col: int  # where keys and values begin in their buffers
    v_col: int

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.block) * self.kv_heads * self.splits

    @property
    def block(self) -> int:
        """Tokens of a tile."""
        return block_tokens(self.group, self.rows)

    def place(self, tile: int) -> tuple[int, int, int]:
        """(block, kv head, share) of a tile."""
        block, rest = divmod(tile, self.kv_heads * self.splits)
        return block, *divmod(rest, self.splits)

    def span(self, block: int) -> tuple[int, int]:
        """Tokens [lo, hi) of a block."""
        return block * self.block, min((block + 1) * self.block, self.rows)

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    def reads(self, lo: int, hi: int) -> list[Region]:
        d, q_width = self.head_dim, self.group * self.head_dim
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.table, 0, self.context, 0, d),
               Region(self.pages, 0, self.page_rows, 0, self.page_cols)]  # fmt: skip
        out += [Region(b, 0, 1, 0, self.rows) for b in (self.positions, self.sequences)]
        out += [Region(b, 0, 1, 0, d) for b in (self.q_norm, self.k_norm) if b != NONE]
        for tile in range(lo, hi):
            block, g, split = self.place(tile)
            begin, end = self.span(block)
            out.append(Region(self.q, begin, end, g * q_width, (g + 1) * q_width))
            out += [Region(b, -PAST, 0, g * d, (g + 1) * d) for b in (self.k_cache, self.v_cache)]
            if split == 0 or self.rows > 1:
                fresh = ((self.k, self.k_col), (self.v, self.v_col))
                out += [Region(b, 0, end, c + g * d, c + (g + 1) * d) for b, c in fresh]
        return out

    def writes(self, lo: int, hi: int) -> list[Region]:
        width, each = self.group * (self.head_dim + 2), self.kv_heads * self.splits
        out: list[Region] = []
        for block in range(lo // each, -(-hi // each)):
            first, last = max(lo - block * each, 0), min(hi - block * each, each)
            out.append(Region(self.y, *self.span(block), first * width, last * width))
        return out

    @property
    def leaves_out(self) -> tuple[int, ...]:
        return self.window, self.splits

    def tagging(self) -> tuple[Buf, ...]:
        return (self.y,)

    def tag_checking(self) -> tuple[Buf, ...]:
        return self.q, self.k, self.v

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        seen = min(context, self.window) if self.window else context
        seen = -(-seen // self.splits) * (hi - lo)
        flops = 4 * self.block * self.group * (seen + self.rows) * self.head_dim
        return Cost(0, 4 * seen * self.head_dim, flops)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, one token at a time."""
        tokens, width = count(mem, self.counts, 0), self.group * (self.head_dim + 2)
        for tile in range(lo, hi):
            block, g, split = self.place(tile)
            begin, end = self.span(block)
            end = min(end, tokens)
            if begin >= end:
                continue
            fresh = fresh_rows(mem, self, g, end) if split == 0 or self.rows > 1 else None
            for t in range(begin, end):
                y = self._token(mem, t, g, split, fresh)
                mem.write(self.y, t, (g * self.splits + split) * width, y)

    def _token(
        self, mem: Memory, t: int, g: int, split: int, fresh: tuple[np.ndarray, np.ndarray] | None
    ) -> np.ndarray:
        d = self.head_dim
        tokens = count(mem, self.counts, 0)
        positions = mem.read(self.positions, 0, 1, 0, tokens)[0]
        sequences = mem.read(self.sequences, 0, 1, 0, tokens)[0]
        lo, own = visible(int(positions[t]), self.window)[0], int(positions[t])
        past = int(positions[sequences == sequences[t]].min())
        keys: list[list[np.ndarray]] = [
            [np.zeros((0, d), np.float32)],
            [np.zeros((0, d), np.float32)],
        ]
        for begin, end in page_share(lo, min(past, own), split, self.splits):
            for part, b in zip(keys, (self.k_cache, self.v_cache), strict=True):
                part.append(mem.read_cache(b, t, begin, end, g * d, (g + 1) * d).astype(np.float32))
        if fresh is not None:
            here = (positions < own) & (split_of(positions // PAGE, self.splits) == split)
            here |= (positions == own) & (split == 0)
            here &= (sequences == sequences[t]) & (positions >= lo)
            for part, made in zip(keys, fresh, strict=True):
                part.append(made[here[: len(made)]])
        k_SD, v_SD = (np.concatenate(part) for part in keys)
        if not len(k_SD):
            return empty_share(self.group, d)
        heads = range(g * self.group, (g + 1) * self.group)
        q_JD = np.stack([head_of(mem, self, self.q, self.q_norm, t, head * d) for head in heads])
        q_JD = q_JD.astype(mem.buffer(self.k_cache).dtype.numpy).astype(np.float32)
        return np.concatenate(weigh(q_JD, k_SD, v_SD, self.scale), axis=1).reshape(1, -1)
