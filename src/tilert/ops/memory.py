"""What a reference body may do to memory. The interpreter implements it and watches every access."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tilert.ir.program import Buf, Buffer


class Memory(Protocol):
    """Access to the buffers of one program, all indices as in Region; every access is checked."""

    def buffer(self, buf: Buf) -> Buffer:
        """The description of a buffer."""
        ...

    def read(self, buf: Buf, row_lo: int, row_hi: int, col_lo: int, col_hi: int) -> np.ndarray:
        """A copy of a rectangle in the buffer's own dtype."""
        ...

    def write(self, buf: Buf, row_lo: int, col_lo: int, values: np.ndarray) -> None:
        """Store a 2-D array, converted to the buffer's dtype, with its corner at (row_lo, col_lo)."""
        ...

    def read_cache(
        self, buf: Buf, token: int, lo: int, hi: int, col_lo: int, col_hi: int
    ) -> np.ndarray:
        """Positions [lo, hi) of the sequence that `token` of this step belongs to: [hi - lo, cols]."""
        ...

    def write_cache(self, buf: Buf, token: int, col_lo: int, values: np.ndarray) -> None:
        """Store one row of values at the position of `token` in its sequence."""
        ...


def count(mem: Memory, counts: Buf, which: int) -> int:
    """Tokens (which 0) or rows of logits (which 1) of this step."""
    return int(mem.read(counts, 0, 1, which, which + 1)[0, 0])
