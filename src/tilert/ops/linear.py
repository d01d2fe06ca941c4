"""Matrix times activations, with what is folded into it: a norm before, a sum or a gate after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.dtype import DType
from tilert.ir.program import NONE, Buf, Cost, Op, Region
from tilert.ops.memory import Memory, count
from tilert.ops.norm import root_mean_square

STORE, ADD, GATE = 0, 1, 2  # epilogues


@dataclass(frozen=True, slots=True)
class Linear(Op):
    """y[:, y_col + r] = epilogue(x' @ w[r] + bias[r]) for the rows r of a tile, f32 sums.

    x' is x, or RMSNorm(x) * norm when `norm` is given. Epilogue STORE stores, ADD stores the sum with
    the same cells of `residual`, or of y itself where that is not given, GATE stores
    silu(x' @ w[r] + bias[r]) * (x' @ w_up[r] + bias_up[r]).
    x [rows, >= x_col + k] f32; w, w_up [n, k]; y [rows, >= y_col + n] f32.
    groups > 1: block-diagonal. The rows of w are as many blocks, and block g is multiplied by columns
    [x_col + g * x_stride, + k) of x; no tile has rows of two blocks. Such a product has no norm and only
    stores.
    `gather`, when given, is an i32 buffer [1, rows]: row i of x' is made from x[gather[i]].
    beyond > 0: y is read only where a token of the step sees more than so many positions, of those that
    `when` holds, i32 [1, rows]. Where none does, a back end may leave the op out: y then holds anything.
    x_type: what the multiplier takes; x' is rounded to it (see rounded). With a norm, the root of the
    mean square divides the products and not x'.
    """

    opcode: ClassVar[int] = 1
    x: Buf
    w: Buf
    w_up: Buf
    bias: Buf
    bias_up: Buf
    norm: Buf
    y: Buf
    counts: Buf
    count_index: int  # 0: x has a row per token, 1: a row per output
    rows: int  # capacity in tokens or outputs
    k: int
    n: int
    y_col: int
    tile_rows: int
    epilogue: int
    eps: float
    gather: Buf = NONE
    x_rows: int = 1  # rows of x that `gather` may name
    x_type: int = DType.F32
    x_col: int = 0
    groups: int = 1
    x_stride: int = 0  # columns from one group's x to the next's
    when: Buf = NONE  # positions, with `beyond`
    beyond: int = 0
    residual: Buf = NONE  # of y's shape, with ADD

    @property
    def tiles(self) -> int:
        return self.groups * -(-self.n // self.groups // self.tile_rows)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Weight rows of tiles [lo, hi)."""
        rows = self.n // self.groups
        each = -(-rows // self.tile_rows)  # tiles of a group

        def border(tile: int) -> int:
            group, inside = divmod(tile, each)
            return group * rows + inside * self.tile_rows

        return border(lo), border(hi)

    def groups_of(self, lo: int, hi: int) -> range:
        """The groups that tiles [lo, hi) belong to."""
        each = self.tiles // self.groups
        return range(lo // each, -(-hi // each))

    def x_regions(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """Columns [begin, end) of x that tiles [lo, hi) read, one piece after another."""
        first = [self.x_col + g * self.x_stride for g in self.groups_of(lo, hi)]
        return [(col, col + self.k) for col in first]

    @property
    def old(self) -> Buf:
        """What ADD adds to."""
        return self.y if self.residual == NONE else self.residual

    @property
    def spared(self) -> int:
        return self.beyond

    def weight_rows(self, lo: int, hi: int) -> int:
        begin, end = self.span(lo, hi)
        return (end - begin) * (2 if self.epilogue == GATE else 1)

    def reads(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.span(lo, hi)
        out = [Region(self.counts, 0, 1, 0, 2)]
        if self.when != NONE:
            out.append(Region(self.when, 0, 1, 0, self.rows))
        if self.gather != NONE:
            out.append(Region(self.gather, 0, 1, 0, self.rows))
        rows = self.rows if self.gather == NONE else self.x_rows
        out += [Region(self.x, 0, rows, *columns) for columns in self.x_regions(lo, hi)]
        out += [Region(w, begin, end, 0, self.k) for w in (self.w, self.w_up) if w != NONE]
        out += [Region(b, 0, 1, begin, end) for b in (self.bias, self.bias_up) if b != NONE]
        if self.norm != NONE:
            out.append(Region(self.norm, 0, 1, 0, self.k))
        if self.epilogue == ADD:
            out += [r._replace(buffer=self.old) for r in self.writes(lo, hi)]
        return out

    def writes(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.span(lo, hi)
        return [Region(self.y, 0, self.rows, self.y_col + begin, self.y_col + end)]

    def tagging(self) -> tuple[Buf, ...]:
        return (self.y,)

    def tag_checking(self) -> tuple[Buf, ...]:
        return self.x, self.old

    def whole_reads(self) -> tuple[Buf, ...]:
        return () if self.beyond or self.x_rows > 1 else (self.x,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        elements = self.weight_rows(lo, hi) * self.k
        if context + self.rows <= self.beyond:
            return Cost(0)
        return Cost(elements * dtype_bytes, 0, 2 * elements * self.rows)

    def pass_bytes(self, dtype_bytes: int) -> int:
        return self.weight_rows(0, 1) * self.k * dtype_bytes

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, on whatever the step's real number of rows is."""
        if self.groups > 1:
            for tile in range(lo, hi):
                begin, end = self.span(tile, tile + 1)
                x = rounded(self._block(mem, tile), DType(self.x_type))
                y = self._product(mem, self.w, self.bias, x, np.ones(1, np.float32), begin, end)
                mem.write(self.y, 0, self.y_col + begin, y)
            return
        begin, end = self.span(lo, hi)
        rows = count(mem, self.counts, self.count_index)
        if self.beyond and mem.read(self.when, 0, 1, 0, rows).max() < self.beyond:
            nothing = np.full((rows, end - begin), np.nan, np.float32)  # which must not matter
            return mem.write(self.y, 0, self.y_col + begin, nothing)
        x = self._input(mem, rows)
        x, root = multiplicand(mem, x, self.norm, self.eps, DType(self.x_type))
        y = self._product(mem, self.w, self.bias, x, root, begin, end)
        if self.epilogue == ADD:
            y += mem.read(self.old, 0, rows, self.y_col + begin, self.y_col + end)
        elif self.epilogue == GATE:
            up = self._product(mem, self.w_up, self.bias_up, x, root, begin, end)
            y = y / (1 + np.exp(-y)) * up
        mem.write(self.y, 0, self.y_col + begin, y)

    def _input(self, mem: Memory, rows: int) -> np.ndarray:
        ((begin, end),) = self.x_regions(0, 1)
        if self.gather == NONE:
            return mem.read(self.x, 0, rows, begin, end)
        chosen = mem.read(self.gather, 0, 1, 0, rows)[0]
        return np.concatenate([mem.read(self.x, int(r), int(r) + 1, begin, end) for r in chosen])

    def _block(self, mem: Memory, tile: int) -> np.ndarray:
        """x of the group that a tile belongs to, [rows, k]."""
        rows = count(mem, self.counts, self.count_index)
        (columns,) = self.x_regions(tile, tile + 1)
        return mem.read(self.x, 0, rows, *columns)

    def _product(
        self, mem: Memory, w: Buf, bias: Buf, x: np.ndarray, root: np.ndarray, begin: int, end: int
    ) -> np.ndarray:
        y = x @ weight_f32(mem, w, begin, end, self.k).T / root
        if bias != NONE:
            y = y + mem.read(bias, 0, 1, begin, end).astype(np.float32)
        return y


def multiplicand(
    mem: Memory, x: np.ndarray, norm: Buf, eps: float, x_type: DType
) -> tuple[np.ndarray, np.ndarray]:
    """x' [rows, k], and what its products are divided by [rows, 1]: the root when there is a norm."""
    root = np.ones((len(x), 1), np.float32)
    if norm != NONE:
        root = root_mean_square(x, eps)
        x = x * mem.read(norm, 0, 1, 0, x.shape[1]).astype(np.float32)
    return rounded(x, x_type), root


def multiplier(weight: DType) -> DType:
    """What matrix units take x' as for weights of this type; F32 where it is not for them."""
    return {DType.BF16: DType.BF16, DType.F8E4M3: DType.F16}.get(weight, DType.F32)


def rounded(x: np.ndarray, x_type: DType) -> np.ndarray:
    """f32 values that x_type can hold. f16 holds x / 16, so that only what is beyond a million is cut off."""
    if x_type is DType.F16:
        return np.clip(x / 16, -65504, 65504).astype(np.float16).astype(np.float32) * 16
    return x.astype(x_type.numpy).astype(np.float32)


def weight_f32(mem: Memory, w: Buf, begin: int, end: int, k: int) -> np.ndarray:
    """Rows [begin, end) of a weight in f32, block scales applied (value * scale of its block).

    Of a bank the rows are those of one matrix."""
    values = mem.read(w, begin, end, 0, k).astype(np.float32)
    described = mem.buffer(w)
    if described.scale == NONE:
        return values
    block_rows, block_cols = described.block
    matrix, first = divmod(begin, described.rows // described.bank)
    rows = np.arange(first, first + end - begin) // block_rows
    rows += matrix * (described.scale_shape[0] // described.bank)
    scales = mem.read(described.scale, int(rows[0]), int(rows[-1]) + 1, 0, -(-k // block_cols))
    return values * np.repeat(scales[rows - rows[0]], block_cols, axis=1)[:, :k]
