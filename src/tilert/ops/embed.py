"""Token ids to rows of the embedding table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.program import Buf, Cost, Op, Region
from tilert.ops.memory import Memory, count


@dataclass(frozen=True, slots=True)
class Embed(Op):
    """y[t] = table[tokens[t]] widened to f32; a tile is `block` tokens.

    tokens [1, rows] i32, table [vocab, width], y [rows, width] f32.
    """

    opcode: ClassVar[int] = 3
    streamed: ClassVar[bool] = False  # the token ids choose the rows
    tokens: Buf
    table: Buf
    y: Buf
    counts: Buf
    vocab: int
    rows: int
    width: int
    block: int

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.block)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Tokens of tiles [lo, hi)."""
        return lo * self.block, min(hi * self.block, self.rows)

    def reads(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.span(lo, hi)
        return [
            Region(self.counts, 0, 1, 0, 2),
            Region(self.tokens, 0, 1, begin, end),
            Region(self.table, 0, self.vocab, 0, self.width),
        ]

    def writes(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.span(lo, hi)
        return [Region(self.y, begin, end, 0, self.width)]

    def tagging(self) -> tuple[Buf, ...]:
        return (self.y,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        begin, end = self.span(lo, hi)
        return Cost((end - begin) * self.width * dtype_bytes)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition; an id outside the vocabulary is a broken invariant of the host."""
        begin, end = self.span(lo, hi)
        for t in range(begin, min(end, count(mem, self.counts, 0))):
            token = int(mem.read(self.tokens, 0, 1, t, t + 1)[0, 0])
            assert 0 <= token < self.vocab, f"token id {token} outside [0, {self.vocab})"
            row = mem.read(self.table, token, token + 1, 0, self.width)
            mem.write(self.y, t, 0, row.astype(np.float32))
