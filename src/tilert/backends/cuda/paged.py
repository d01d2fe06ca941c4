"""Caches of PyTorch tensors in the pages that the persistent program reads.

Rows of keys, values and latents lie with their 16-byte pieces permuted, as the matrix units like to read
them (`swizzle`); what an indexer keeps and packed latents lie plainly.
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
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def append(self, name: str, x: torch.Tensor, *, plain: bool = False) -> None:
        """x [T, heads, width] are the rows of this step."""
        cache = self.tensors[name]
        size = cache.shape[-1] if plain else PIECE
        places = self._once(cache.shape, size, self.begin, by_head=False)
        rows = _raw(x.to(cache.dtype)).reshape(-1, size)
        _raw(cache).view(-1, size).index_copy_(0, places, rows)

    def read(self, name: str, first_page: int = 0, *, plain: bool = False) -> torch.Tensor:
        """[heads, positions, width] from a page of the sequence on to the last row of this step.

        Rows not yet written may hold anything, and a weight of 0 does not silence a NaN: they are left out.
        """
        cache = self.tensors[name]
        _, heads, _, width = cache.shape
        size = width if plain else PIECE
        places = self._once(cache.shape, size, first_page * PAGE, by_head=True)
        found = _raw(cache).view(-1, size).index_select(0, places)
        return found.view(cache.dtype).view(heads, -1, width)

    def _once(
        self, shape: tuple[int, ...], size: int, first: int, *, by_head: bool
    ) -> torch.Tensor:
        """As _places, worked out for the first layer that asks. i64 in the order of x, else i32."""
        key = *shape[1:], size, first, by_head
        if key not in self._known:
            places = self._places(shape, size, first)
            order = places.transpose(0, 1) if by_head else places.long()
            self._known[key] = order.flatten()
        return self._known[key]

    def _places(self, shape: tuple[int, ...], size: int, first: int) -> torch.Tensor:
        """i32 [positions, heads, pieces]: which pieces of `size` elements of a cache of that shape are the
        rows of positions [first, end)."""
        _, heads, _, width = shape
        device = self.pages.device
        positions = torch.arange(first, self.end, device=device)
        pages, rows = self.pages[positions // PAGE], positions % PAGE
        head = pages[:, None] * heads + torch.arange(heads, device=device)
        begin = (head * PAGE + rows[:, None]) * (width // size)  # of a row, in pieces
        return begin.int()[:, :, None] + _order(width, size, device)[rows][:, None]


@lru_cache
def _order(width: int, size: int, device: torch.device) -> torch.Tensor:
    """i32 [64, pieces] the pieces of the rows of a page; kept, as a copy to a GPU waits for all before."""
    order = swizzle(width)[:, ::PIECE] // PIECE if size < width else np.zeros((PAGE, 1))
    return torch.from_numpy(order.astype(np.int32)).to(device)


def _raw(x: torch.Tensor) -> torch.Tensor:
    """Elements of one byte as integers: not every op that moves elements knows e4m3."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
