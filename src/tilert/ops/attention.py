"""Causal attention over the paged KV cache (grouped queries, sliding window), split over positions.

With `splits` > 1 a tile covers a share of the positions and leaves an unnormalised partial result;
Combine merges the shares in a fixed order (flash-decoding, Dao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.program import PAST, Buf, Cost, Op, Region
from tilert.ops.memory import Memory, count


def visible(position: int, window: int) -> tuple[int, int]:
    """Positions [lo, hi) that a query at `position` sees; window 0 means all of the past."""
    return (max(0, position + 1 - window) if window else 0), position + 1


def share(lo: int, hi: int, split: int, splits: int) -> tuple[int, int]:
    """The part of [lo, hi) that `split` of `splits` covers."""
    length = hi - lo
    return lo + length * split // splits, lo + length * (split + 1) // splits


def weigh(
    q_JD: np.ndarray, k_SD: np.ndarray, v_SD: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sum of exp(score - m) * v [J, D], m [J, 1], sum of exp(score - m) [J, 1]) of J query heads."""
    score_JS = q_JD @ k_SD.T * np.float32(scale)
    m_J1 = score_JS.max(axis=1, keepdims=True)
    weight_JS = np.exp(score_JS - m_J1)
    return weight_JS @ v_SD, m_J1, weight_JS.sum(axis=1, keepdims=True)


def empty_share(group: int, head_dim: int) -> np.ndarray:
    """The partial result [1, group * (head_dim + 2)] of a share without positions."""
    empty = np.zeros((group, head_dim + 2), np.float32)
    empty[:, head_dim] = -np.inf
    return empty.reshape(1, -1)


def merge(part: np.ndarray, group_width: int, head_dim: int, splits: int) -> np.ndarray:
    """[rows, group_width] from the partial results of one kv head's group of query heads.

    part [rows, splits * group * (head_dim + 2)]: every share is rescaled to the common maximum, all
    are added and divided by the sum.
    """
    group = group_width // head_dim
    part_TPJX = part.reshape(len(part), splits, group, head_dim + 2)
    m = part_TPJX[..., head_dim : head_dim + 1]
    weight = np.exp(m - m.max(axis=1, keepdims=True))
    out = (part_TPJX[..., :head_dim] * weight).sum(axis=1)
    total = (part_TPJX[..., head_dim + 1 :] * weight).sum(axis=1)
    return (out / total).reshape(len(part), group_width)


@dataclass(frozen=True, slots=True)
class Attention(Op):
    """Tile ((b * kv_heads) + g) * splits + s: tokens of block b, kv head g, share s of the positions.

    splits == 1: y [rows, heads * head_dim] gets softmax(scale * q k^T) v of the group's query
    heads. splits > 1: y [rows, heads * splits * (head_dim + 2)] gets for each query head j of group
    g, at column ((g * splits + s) * group + j) * (head_dim + 2): sum of exp(score - m) * v, then m,
    then the sum of exp(score - m); m is -inf and the sums 0 where the share is empty.
    """

    opcode: ClassVar[int] = 5
    q: Buf
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
    block: int
    page_rows: int
    page_cols: int
    scale: float

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.block) * self.kv_heads * self.splits

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    def place(self, tile: int) -> tuple[int, int, int, int]:
        """(first token, end token, kv head, split) of a tile."""
        block, rest = divmod(tile, self.kv_heads * self.splits)
        g, split = divmod(rest, self.splits)
        return block * self.block, min((block + 1) * self.block, self.rows), g, split

    def columns(self, g: int, split: int) -> tuple[int, int]:
        """Columns of y that kv head g and this split write."""
        if self.splits == 1:
            width = self.group * self.head_dim
            return g * width, (g + 1) * width
        width = self.group * (self.head_dim + 2)
        first = (g * self.splits + split) * width
        return first, first + width

    def reads(self, lo: int, hi: int) -> list[Region]:
        out = [
            Region(self.counts, 0, 1, 0, 2),
            Region(self.positions, 0, 1, 0, self.rows),
            Region(self.sequences, 0, 1, 0, self.rows),
            Region(self.pages, 0, self.page_rows, 0, self.page_cols),
        ]
        d, q_width = self.head_dim, self.group * self.head_dim
        for tile in range(lo, hi):
            begin, end, g, _ = self.place(tile)
            out.append(Region(self.q, begin, end, g * q_width, (g + 1) * q_width))
            # Tokens of the step see each other only backwards, so later ones are not read.
            caches = (self.k_cache, self.v_cache)
            out += [Region(b, -PAST, end, g * d, (g + 1) * d) for b in caches]
        return out

    def writes(self, lo: int, hi: int) -> list[Region]:
        out: list[Region] = []
        for tile in range(lo, hi):
            begin, end, g, split = self.place(tile)
            out.append(Region(self.y, begin, end, *self.columns(g, split)))
        return out

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        cache_bytes = flops = 0
        for tile in range(lo, hi):
            begin, end, _, _ = self.place(tile)
            seen = (
                context + end if not self.window else min(context + end, self.window + end - begin)
            )
            seen = -(-seen // self.splits)
            cache_bytes += 2 * seen * self.head_dim * 4
            flops += 4 * (end - begin) * self.group * seen * self.head_dim
        return Cost(0, cache_bytes, flops)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, one token at a time."""
        tokens = count(mem, self.counts, 0)
        for tile in range(lo, hi):
            begin, end, g, split = self.place(tile)
            for t in range(begin, min(end, tokens)):
                mem.write(self.y, t, self.columns(g, split)[0], self._token(mem, t, g, split))

    def _token(self, mem: Memory, t: int, g: int, split: int) -> np.ndarray:
        d, width = self.head_dim, self.group * self.head_dim
        position = int(mem.read(self.positions, 0, 1, t, t + 1)[0, 0])
        begin, end = share(*visible(position, self.window), split, self.splits)
        q_JD = mem.read(self.q, t, t + 1, g * width, (g + 1) * width).reshape(self.group, d)
        if begin == end:
            return empty_share(self.group, d)
        k_SD = mem.read_cache(self.k_cache, t, begin, end, g * d, (g + 1) * d)
        v_SD = mem.read_cache(self.v_cache, t, begin, end, g * d, (g + 1) * d)
        out_JD, m_J1, sum_J1 = weigh(q_JD, k_SD, v_SD, self.scale)
        if self.splits == 1:
            return (out_JD / sum_J1).reshape(1, -1)
        return np.concatenate([out_JD, m_J1, sum_J1], axis=1).reshape(1, -1)


@dataclass(frozen=True, slots=True)
class Combine(Op):
    """Merge the shares that attention left. Tile (t * heads + h) * parts + p: token t, query head h, part
    p of its columns.

    part [rows, heads * splits * (head_dim + 2)] f32, y [rows, heads * head_dim] f32. window: of the
    attention, for back ends that leave out shares without positions.
    """

    opcode: ClassVar[int] = 6
    part: Buf
    y: Buf
    counts: Buf
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    splits: int
    window: int
    parts: int = 1

    @property
    def tiles(self) -> int:
        return self.rows * self.heads * self.parts

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    def share(self, head: int, split: int) -> int:
        """Where the share of a query head begins in a row of `part`."""
        g, j = divmod(head, self.group)
        return ((g * self.splits + split) * self.group + j) * (self.head_dim + 2)

    def reads(self, lo: int, hi: int) -> list[Region]:
        out = [Region(self.counts, 0, 1, 0, 2)]
        for t, first, last in self._groups(lo // self.parts, -(-hi // self.parts)):
            together = self.splits if self.group == 1 else 1  # shares that lie side by side
            for split in range(0, self.splits, together):
                width = (last - first) * together * (self.head_dim + 2)
                begin = self.share(first, split)
                out.append(Region(self.part, t, t + 1, begin, begin + width))
        return out

    def _groups(self, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
        """(token, first head, end) of the heads [lo, hi) of all tokens, those of one kv head together:
        their shares lie side by side."""
        while lo < hi:
            end = min(hi, (lo // self.group + 1) * self.group)
            t, first = divmod(lo, self.heads)
            yield t, first, first + end - lo
            lo = end

    def writes(self, lo: int, hi: int) -> list[Region]:
        row, width = self.heads * self.parts, self.head_dim // self.parts
        out: list[Region] = []
        while lo < hi:
            t, first = divmod(lo, row)
            end = min(hi, lo + row - first)
            out.append(Region(self.y, t, t + 1, first * width, (first + end - lo) * width))
            lo = end
        return out

    def tagging(self) -> tuple[Buf, ...]:
        return (self.y,)

    def tag_checking(self) -> tuple[Buf, ...]:
        return (self.part,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, 3 * (hi - lo) * self.splits * self.head_dim // self.parts)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition: rescale every share to the common maximum, add, divide."""
        d, tokens, width = self.head_dim, count(mem, self.counts, 0), self.head_dim // self.parts
        for tile in range(lo, hi):
            (t, head), first = divmod(tile // self.parts, self.heads), tile % self.parts * width
            if t < tokens:
                at = [self.share(head, split) for split in range(self.splits)]
                part = np.concatenate(
                    [mem.read(self.part, t, t + 1, a, a + d + 2) for a in at], axis=1
                )
                merged = merge(part, d, d, self.splits)[:, first : first + width]
                mem.write(self.y, t, head * d + first, merged)
