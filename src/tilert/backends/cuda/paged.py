"""Caches of PyTorch tensors in the pages that the persistent program reads.

Rows of keys, values and latents lie with their 16-byte pieces permuted, as the matrix units like to read
them (`swizzle`); what an indexer keeps lies plainly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tilert.backends.cuda.backend import swizzle
from tilert.ir.program import PAGE


class PagedCaches:
    """tensors: each [pages, heads, 64, width] by buffer name, all on one device."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.tensors, self.device = tensors, device
        self._orders: dict[int, torch.Tensor] = {}  # swizzles by width

    def append(
        self, name: str, pages: torch.Tensor, positions: torch.Tensor, x: torch.Tensor, *,
        plain: bool = False,
    ) -> None:  # fmt: skip
        """x [T, heads, width] at `positions` [T] of the sequence that has `pages`."""
        cache, rows = self.tensors[name], positions % PAGE
        x = x.to(cache.dtype)
        if not plain:
            pieces = x.unflatten(-1, (-1, 8))  # [T, heads, pieces, 8]
            order = self._order(x.shape[-1])[rows]
            x = pieces.gather(2, order[:, None, :, None].expand(pieces.shape)).flatten(-2)
        cache[pages[positions // PAGE], :, rows] = x

    def read(
        self, name: str, pages: torch.Tensor, first_page: int, end: int, *, plain: bool = False
    ) -> torch.Tensor:
        """[heads, positions, width] from a page of the sequence on to position `end`."""
        stored = self.tensors[name].index_select(0, pages[first_page : -(-end // PAGE)])
        if not plain:
            pieces = stored.unflatten(-1, (-1, 8))
            order = self._order(stored.shape[3])[None, None, :, :, None].expand(pieces.shape)
            stored = pieces.gather(3, order).flatten(-2)  # [pages, heads, 64, width]
        # Rows not yet written may hold anything, and a weight of 0 does not silence a NaN.
        return stored.transpose(0, 1).flatten(1, 2)[:, : end - first_page * PAGE]

    def _order(self, width: int) -> torch.Tensor:
        """[64, width / 8] pieces of a row, permuted."""
        if width not in self._orders:
            pieces = torch.from_numpy(swizzle(width)[:, ::8] // 8)
            self._orders[width] = pieces.to(self.device)
        return self._orders[width]
