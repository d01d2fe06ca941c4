"""Cells: the finest common cut of all regions that a set of accesses names.

Each buffer is cut at every row and column border that occurs; a region is then a set of whole
cells, so overlap questions become set questions on small integers. Used to derive dependencies
(compiler/ depend.py), to prove them (compiler/verify.py) and to watch for races
(backends/interpreter.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from tilert.ir.program import NONE, Buf, Buffer, Kind, Op, Program, Region


def cache_frames(buffers: Sequence[Buffer], ops: Sequence[Op]) -> list[dict[int, int]]:
    """For each op, of every cache that it names: by which positions it counts the rows, as a number.

    Rows count from the first token of the buffer `positions` that an op names. Another such buffer, or the
    same one after an op has written it, is another frame: what is row 0 there, only the run knows.
    """
    named = [getattr(op, "positions", NONE) for op in ops]
    written: dict[Buf, int] = dict.fromkeys(named, 0)  # how often so far
    numbers: dict[tuple[Buf, int], int] = {}
    frames: list[dict[int, int]] = []
    for op, positions in zip(ops, named, strict=True):
        operands = [b for b in Program.operand_ids(op) if b != NONE]
        number = numbers.setdefault((positions, written[positions]), len(numbers))
        frames.append({b: number for b in operands if buffers[b].kind is Kind.CACHE})
        if any(b in written for b in operands):
            for buf in {r.buffer for r in op.writes(0, op.tiles)} & written.keys():
                written[Buf(buf)] += 1
    return frames


def cache_moves(buffers: Sequence[Buffer], ops: Sequence[Op]) -> list[list[int]]:
    """For each op the caches whose rows it counts by other positions than the op before it did.

    Between the two, all rows of a column count as one.
    """
    last: dict[int, int] = {}
    moves: list[list[int]] = []
    for frames in cache_frames(buffers, ops):
        moves.append([b for b, frame in frames.items() if last.get(b, frame) != frame])
        last |= frames
    return moves


class Cells:
    """Numbers the cells of all buffers from 0 to `count`; `of` gives the cells of a region."""

    def __init__(self, regions: Iterable[Region]) -> None:
        rows: dict[int, set[int]] = defaultdict(set)
        cols: dict[int, set[int]] = defaultdict(set)
        for r in regions:
            rows[r.buffer] |= {r.row_lo, r.row_hi}
            cols[r.buffer] |= {r.col_lo, r.col_hi}
        self.count = 0
        self._row_cuts: dict[int, dict[int, int]] = {}
        self._col_cuts: dict[int, dict[int, int]] = {}
        self._numbers: dict[
            int, np.ndarray
        ] = {}  # buffer -> [row cells, col cells] of cell numbers
        self._known: dict[Region, np.ndarray] = {}
        for buffer in rows:
            self._row_cuts[buffer] = {cut: i for i, cut in enumerate(sorted(rows[buffer]))}
            self._col_cuts[buffer] = {cut: i for i, cut in enumerate(sorted(cols[buffer]))}
            shape = (len(rows[buffer]) - 1, len(cols[buffer]) - 1)
            size = shape[0] * shape[1]
            self._numbers[buffer] = np.arange(self.count, self.count + size).reshape(shape)
            self.count += size

    def of(self, region: Region) -> np.ndarray:
        """Cell numbers of a region whose borders were all given to the constructor."""
        known = self._known.get(region)
        if known is None:
            row, col = self._row_cuts[region.buffer], self._col_cuts[region.buffer]
            grid = self._numbers[region.buffer]
            known = grid[
                row[region.row_lo] : row[region.row_hi], col[region.col_lo] : col[region.col_hi]
            ].ravel()
            self._known[region] = known
        return known

    def grid(self, buffer: int) -> np.ndarray:
        """Cell numbers of a whole buffer as [row cells, column cells]; empty when never named."""
        return self._numbers.get(buffer, np.empty((0, 0), dtype=np.int64))

    def owner(self, cell: int) -> int:
        """The buffer that a cell belongs to."""
        for buffer, numbers in self._numbers.items():
            if numbers.size and numbers[0, 0] <= cell <= numbers[-1, -1]:
                return buffer
        raise KeyError(cell)
