"""Rotary position embedding of queries and keys, and appending keys and values to the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.program import NONE, Buf, Cost, Op, Region
from tilert.ops.memory import Memory, count
from tilert.ops.norm import rms_norm


def rotate(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """Half-split RoPE (Su et al. 2021 in the order of transformers' rotate_half).

    x [..., head_dim], cos_sin [head_dim]: the cosines, then the sines, of head_dim / 2 angles.
    """
    half = x.shape[-1] // 2
    cos, sin = cos_sin[:half], cos_sin[half:]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def halves(x: np.ndarray) -> np.ndarray:
    """Neighbours (2i, 2i + 1) moved to (i, i + half), where `rotate` pairs them: for interleaved RoPE."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def turned(x: np.ndarray, norm: np.ndarray | None, eps: float, cos_sin: np.ndarray) -> np.ndarray:
    """A head as attention wants it: normed if there is a norm, then rotated."""
    return rotate(x if norm is None else rms_norm(x, norm, eps), cos_sin)


@dataclass(frozen=True, slots=True)
class Rope(Op):
    """Tile i < heads: q head i is normed (if q_norm), rotated, and stored in place.

    Tile heads + g: k head g is normed (if k_norm), rotated and appended to k_cache, v head g to
    v_cache. q [rows, heads * head_dim], k and v [rows, kv_heads * head_dim] f32; table [context,
    head_dim] f32.
    """

    opcode: ClassVar[int] = 4
    q: Buf
    k: Buf
    v: Buf
    q_norm: Buf
    k_norm: Buf
    table: Buf
    k_cache: Buf
    v_cache: Buf
    positions: Buf
    sequences: Buf
    pages: Buf
    counts: Buf
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    page_rows: int
    page_cols: int
    eps: float

    @property
    def tiles(self) -> int:
        return self.heads + self.kv_heads

    def reads(self, lo: int, hi: int) -> list[Region]:
        d = self.head_dim
        out = [
            Region(self.counts, 0, 1, 0, 2),
            Region(self.positions, 0, 1, 0, self.rows),
            Region(self.table, 0, self.context, 0, d),
        ]
        q_hi, kv_lo = min(hi, self.heads), max(lo, self.heads) - self.heads
        if lo < q_hi:
            out.append(Region(self.q, 0, self.rows, lo * d, q_hi * d))
            out += [Region(self.q_norm, 0, 1, 0, d)] if self.q_norm != NONE else []
        if kv_lo < hi - self.heads:
            kv_hi = hi - self.heads
            out += [Region(b, 0, self.rows, kv_lo * d, kv_hi * d) for b in (self.k, self.v)]
            out += [Region(self.sequences, 0, 1, 0, self.rows),
                    Region(self.pages, 0, self.page_rows, 0, self.page_cols)]  # fmt: skip
            out += [Region(self.k_norm, 0, 1, 0, d)] if self.k_norm != NONE else []
        return out

    def writes(self, lo: int, hi: int) -> list[Region]:
        d = self.head_dim
        out: list[Region] = []
        q_hi, kv_lo = min(hi, self.heads), max(lo, self.heads) - self.heads
        if lo < q_hi:
            out.append(Region(self.q, 0, self.rows, lo * d, q_hi * d))
        if kv_lo < hi - self.heads:
            kv_hi = hi - self.heads
            caches = (self.k_cache, self.v_cache)
            out += [Region(b, 0, self.rows, kv_lo * d, kv_hi * d) for b in caches]
        return out

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        # Appending stores each element of k into a cache line of its own: about four rotations' time.
        appended = max(hi, self.heads) - max(lo, self.heads)
        return Cost(0, 0, 6 * (hi - lo + 4 * appended) * self.rows * self.head_dim)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, one token of one head at a time."""
        tokens, d = count(mem, self.counts, 0), self.head_dim
        for t in range(tokens):
            position = int(mem.read(self.positions, 0, 1, t, t + 1)[0, 0])
            assert 0 <= position < self.context, f"position {position} outside [0, {self.context})"
            angles = mem.read(self.table, position, position + 1, 0, d)[0]
            for tile in range(lo, hi):
                if tile < self.heads:
                    q = self._turned(mem, self.q, self.q_norm, t, tile, angles)
                    mem.write(self.q, t, tile * d, q)
                else:
                    g = tile - self.heads
                    mem.write_cache(
                        self.k_cache,
                        t,
                        g * d,
                        self._turned(mem, self.k, self.k_norm, t, g, angles)[0],
                    )
                    mem.write_cache(
                        self.v_cache, t, g * d, mem.read(self.v, t, t + 1, g * d, g * d + d)[0]
                    )

    def _turned(
        self, mem: Memory, buf: Buf, norm: Buf, token: int, head: int, angles: np.ndarray
    ) -> np.ndarray:
        d = self.head_dim
        x = mem.read(buf, token, token + 1, head * d, head * d + d)
        weight = None if norm == NONE else mem.read(norm, 0, 1, 0, d)
        return turned(x, weight, self.eps, angles)
