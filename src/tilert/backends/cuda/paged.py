"""Caches of PyTorch tensors in the pages that the persistent program reads.

Rows of keys, values and latents lie with their 16-byte pieces permuted, as the matrix units like to read
them (`swizzle`); what an indexer keeps lies plainly.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from tilert.backends.cuda.backend import swizzle
from tilert.ir.program import PAGE

PIECE = 8  # elements that are permuted as one


class StepCaches:
    """Caches as one step of one sequence sees them: it makes the rows of positions [begin, end).

    tensors: each [pages, heads, 64, width] by buffer name. pages: of the sequence. Where rows lie is worked
    out once and serves all layers.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], pages: torch.Tensor, begin: int, end: int
    ) -> None:
        self.tensors, self.pages, self.begin, self.end = tensors, pages, begin, end
        self._places: dict[tuple[int, int, int, int], torch.Tensor] = {}

    def append(self, name: str, x: torch.Tensor, *, plain: bool = False) -> None:
        """x [T, heads, width] are the rows of this step."""
        cache = self.tensors[name]
        size = cache.shape[-1] if plain else PIECE
        places = self._pieces(cache.shape, self.begin, size).long()
        _raw(cache).view(-1, size).index_copy_(
            0, places.flatten(), _raw(x.to(cache.dtype)).reshape(-1, size)
        )

    def read(self, name: str, first_page: int = 0, *, plain: bool = False) -> torch.Tensor:
        """[heads, positions, width] from a page of the sequence on to the last row of this step.

        Rows not yet written may hold anything, and a weight of 0 does not silence a NaN: they are left out.
        """
        cache = self.tensors[name]
        heads, width = cache.shape[1], cache.shape[-1]
        size = width if plain else PIECE
        places = self._pieces(cache.shape, first_page * PAGE, size).transpose(0, 1)
        found = _raw(cache).view(-1, size).index_select(0, places.flatten())
        return found.view(cache.dtype).view(heads, -1, width)

    def _pieces(self, shape: tuple[int, ...], first: int, size: int) -> torch.Tensor:
        """i32 [positions, heads, pieces]: which pieces of `size` elements of a cache of that shape are the
        rows of positions [first, end)."""
        _, heads, _, width = shape
        key = first, heads, width, size
        if key not in self._places:
            device = self.pages.device
            positions = torch.arange(first, self.end, device=device)
            pages, rows = self.pages[positions // PAGE], positions % PAGE
            head = pages[:, None] * heads + torch.arange(heads, device=device)
            begin = (head * PAGE + rows[:, None]) * (width // size)  # of a row, in pieces
            inside = _order(width, size, device)[rows]
            self._places[key] = begin.int()[:, :, None] + inside[:, None]
        return self._places[key]


@lru_cache
def _order(width: int, size: int, device: torch.device) -> torch.Tensor:
    """i32 [64, pieces] the pieces of the rows of a page; kept, as a copy to a GPU waits for all before."""
    order = swizzle(width)[:, ::PIECE] // PIECE if size < width else np.zeros((PAGE, 1))
    return torch.from_numpy(order.astype(np.int32)).to(device)


def _raw(x: torch.Tensor) -> torch.Tensor:
    """Elements of one byte as integers: not every op that moves elements knows e4m3."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
