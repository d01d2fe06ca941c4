"""Greedy choice of the next token on the device, and the bookkeeping that lets steps follow each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.program import Buf, Cost, Op, Region
from tilert.ops.memory import Memory, count


@dataclass(frozen=True, slots=True)
class Argmax(Op):
    """part[:, 2 c] and part[:, 2 c + 1] = largest logit of chunk c and its index (the lowest of ties).

    logits [rows, vocab] f32, part [rows, 2 * tiles] f32; an index is exact in f32 up to 2^24.
    """

    opcode: ClassVar[int] = 7
    logits: Buf
    part: Buf
    counts: Buf
    rows: int
    vocab: int
    chunk: int

    @property
    def tiles(self) -> int:
        return -(-self.vocab // self.chunk)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Vocabulary ids of tiles [lo, hi)."""
        return lo * self.chunk, min(hi * self.chunk, self.vocab)

    def reads(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.span(lo, hi)
        return [Region(self.counts, 0, 1, 0, 2), Region(self.logits, 0, self.rows, begin, end)]

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.part, 0, self.rows, 2 * lo, 2 * hi)]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        begin, end = self.span(lo, hi)
        return Cost(0, 0, (end - begin) * self.rows)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        rows = count(mem, self.counts, 1)
        for tile in range(lo, hi):
            begin, end = self.span(tile, tile + 1)
            logits = mem.read(self.logits, 0, rows, begin, end)
            best = logits.argmax(axis=1)
            values = np.take_along_axis(logits, best[:, None], axis=1)
            mem.write(
                self.part, 0, 2 * tile, np.concatenate([values, best[:, None] + begin], axis=1)
            )


@dataclass(frozen=True, slots=True)
class NextToken(Op):
    """sampled[o] = the best of all chunks. With `feed`, the next step is made ready: tokens[o] =
    sampled[o] and positions[o] += 1 (row o of the outputs then is token o of the step).

    part [rows, 2 * chunks] f32; sampled, tokens, positions [1, >= rows] i32.
    """

    opcode: ClassVar[int] = 8
    part: Buf
    sampled: Buf
    tokens: Buf
    positions: Buf
    counts: Buf
    rows: int
    chunks: int
    feed: int

    @property
    def tiles(self) -> int:
        return 1

    def reads(self, lo: int, hi: int) -> list[Region]:
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.part, 0, self.rows, 0, 2 * self.chunks)]
        return [*out, Region(self.positions, 0, 1, 0, self.rows)] if self.feed else out

    def writes(self, lo: int, hi: int) -> list[Region]:
        fed = (self.tokens, self.positions) if self.feed else ()
        return [Region(b, 0, 1, 0, self.rows) for b in (self.sampled, *fed)]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, self.rows * self.chunks)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition; chunks are in id order, so the first of equal values has the lowest id."""
        rows = count(mem, self.counts, 1)
        part = mem.read(self.part, 0, rows, 0, 2 * self.chunks).reshape(rows, self.chunks, 2)
        best = part[..., 0].argmax(axis=1)
        chosen = part[np.arange(rows), best, 1].astype(np.int32)[None]
        mem.write(self.sampled, 0, 0, chosen)
        if self.feed:
            mem.write(self.tokens, 0, 0, chosen)
            mem.write(self.positions, 0, 0, mem.read(self.positions, 0, 1, 0, rows) + 1)
