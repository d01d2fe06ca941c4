"""Cells: the finest common cut of all regions that a set of accesses names.

Each buffer is cut at every row and column border that occurs; a region is then a set of whole
cells, so overlap questions become set questions on small integers. Used to derive dependencies
(compiler/ depend.py), to prove them (compiler/verify.py) and to watch for races
(backends/interpreter.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from tilert.ir.program import Region


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
