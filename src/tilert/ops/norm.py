"""RMSNorm (Zhang and Sennrich 2019; transformers LlamaRMSNorm), alone or gathering chosen rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.program import NONE, Buf, Cost, Op, Region
from tilert.ops.memory import Memory, count


def root_mean_square(x: np.ndarray, eps: float) -> np.ndarray:
    """sqrt(mean(x^2) + eps) over the last axis, in f32; [..., 1]."""
    x = x.astype(np.float32)
    return np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in f32; weight [1, width]."""
    return x.astype(np.float32) * (1 / root_mean_square(x, eps)) * weight.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Norm(Op):
    """y[i] = RMSNorm(x[gather[i]]) * weight, or of x[i] without `gather`; a tile is `block` rows.

    x [x_rows, width] f32, weight [1, width], gather [1, rows] i32, y [rows, width] f32.
    """

    opcode: ClassVar[int] = 2
    x: Buf
    weight: Buf
    gather: Buf
    y: Buf
    counts: Buf
    x_rows: int
    rows: int
    width: int
    block: int
    eps: float

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.block)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Rows of y of tiles [lo, hi)."""
        return lo * self.block, min(hi * self.block, self.rows)

    def reads(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.span(lo, hi)
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.weight, 0, 1, 0, self.width)]
        if self.gather == NONE:
            return [*out, Region(self.x, begin, end, 0, self.width)]
        return [*out, Region(self.gather, 0, 1, begin, end),
                Region(self.x, 0, self.x_rows, 0, self.width)]  # fmt: skip

    def writes(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.span(lo, hi)
        return [Region(self.y, begin, end, 0, self.width)]

    def tag_checking(self) -> tuple[Buf, ...]:
        return (self.x,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        begin, end = self.span(lo, hi)
        return Cost(0, 0, 4 * (end - begin) * self.width)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition. Rows beyond the step's count are left alone."""
        begin, end = self.span(lo, hi)
        end = min(end, count(mem, self.counts, 0 if self.gather == NONE else 1))
        weight = mem.read(self.weight, 0, 1, 0, self.width)
        for row in range(begin, end):
            source = (
                row if self.gather == NONE else int(mem.read(self.gather, 0, 1, row, row + 1)[0, 0])
            )
            x = mem.read(self.x, source, source + 1, 0, self.width)
            mem.write(self.y, row, 0, rms_norm(x, weight, self.eps))
