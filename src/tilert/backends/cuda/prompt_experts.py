"""The nodes of mixtures of experts for prompts, with PyTorch; formulas as in ops/experts.py.

The rows of all tokens, once for each of their experts, are sorted by expert, so that one grouped product
takes a whole bank. Nothing here waits for the device, but for the size of each group where a bank is
widened in parts or PyTorch has no grouped product for its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

WIDENED = 1 << 26  # most bytes of weights that are held widened at once
TINY = 1e-20
_grouped_mm = getattr(functional, "grouped_mm", None)  # from PyTorch 2.10 on


def widened(w: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """bf16, rounded once: w [.., n, k] in e4m3 times the scales of its blocks, f32 [.., blocks, blocks]."""
    out = w.to(torch.bfloat16)  # exact
    n, k = w.shape[-2:]
    rows = scale.repeat_interleave(block[0], dim=-2)[..., :n, :]
    if k % block[1]:
        return out.mul_(rows.repeat_interleave(block[1], dim=-1)[..., :k])
    out.unflatten(-1, (-1, block[1])).mul_(rows[..., None])
    return out


def scaled_product(
    x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """bf16 [T, n] x @ w.T of a weight [n, k] in e4m3, of which some rows are widened at a time."""
    n, k = w.shape
    each = block[0] if block[0] < n else 1  # rows that must stay together
    step = max(1, WIDENED // (2 * k * each)) * each
    x = x.to(torch.bfloat16)
    if step >= n:
        return functional.linear(x, widened(w, scale, block))
    y = x.new_empty(len(x), n)
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        factors = scale[first // each : -(-rows.stop // each)] if len(scale) > 1 else scale
        torch.mm(x, widened(w[rows], factors, block).T, out=y[:, rows])
    return y


@dataclass(frozen=True, slots=True)
class Bank:
    """Matrices [experts, n, k] as stored, and of those in e4m3 the scales [experts, blocks, blocks]."""

    w: torch.Tensor
    scale: torch.Tensor | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def taken(self) -> torch.dtype:
        """What its products take."""
        return self.w.dtype if self.scale is None else torch.bfloat16

    @property
    def at_once(self) -> int:
        """How many of its matrices are widened together."""
        matrix = self.w.shape[1] * self.w.shape[2] * self.taken.itemsize
        return len(self.w) if self.scale is None else max(1, WIDENED // matrix)

    def part(self, first: int, last: int) -> torch.Tensor:
        """Matrices [first, last) as products take them."""
        w = self.w[first:last]
        return w if self.scale is None else widened(w, self.scale[first:last], self.block)


class Groups:
    """Rows sorted by expert. ends: i32 [experts], the row behind each expert's last."""

    def __init__(self, ends: torch.Tensor) -> None:
        self.ends = ends

    @cached_property
    def borders(self) -> list[int]:
        """[experts + 1], on the host."""
        return [0, *self.ends.tolist()]

    def product(self, x: torch.Tensor, bank: Bank) -> torch.Tensor:
        """[rows, n] each row of x times the matrix of its expert, in the type that the bank takes."""
        x = x.to(bank.taken)
        experts, n, k = bank.w.shape
        # Rows of 16 bytes, or copies of them would not be aligned.
        fits = x.dtype is torch.bfloat16 and n % 8 == 0 and k % 8 == 0
        grouped = _grouped_mm if fits else None
        if grouped and bank.at_once >= experts:
            return grouped(x, bank.part(0, experts).transpose(1, 2), offs=self.ends)
        y = x.new_empty(len(x), n)
        for first in range(0, experts, bank.at_once):
            last = min(first + bank.at_once, experts)
            begin, end = self.borders[first], self.borders[last]
            if begin == end:
                continue
            w, ends = bank.part(first, last), self.ends[first:last] - begin
            if grouped:
                y[begin:end] = grouped(x[begin:end], w.transpose(1, 2), offs=ends)
                continue
            for i, expert in enumerate(range(first, last)):
                rows = slice(self.borders[expert], self.borders[expert + 1])
                torch.mm(x[rows], w[i].T, out=y[rows])
        return y


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """f32 silu(gate) * up."""
    return functional.silu(gate.to(torch.float32, copy=True), inplace=True).mul_(up)


def choose(
    logits: torch.Tensor, bias: torch.Tensor | None, attrs: Mapping[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token in rising order, i64 [T, top_k], and their weights, f32; see Route.

    logits f32 [T, experts], bias f32 [experts]; attrs: those of the node.
    """
    scores = logits.sigmoid() if attrs["sigmoid"] else logits.softmax(dim=-1)
    values = scores if attrs["sigmoid"] else logits
    values = values if bias is None else values + bias
    n_group = int(attrs["n_group"])
    if n_group > 1:
        groups = values.unflatten(-1, (n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(-1, _largest(best, int(attrs["topk_group"])), True)
        values = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    chosen = _largest(values, int(attrs["top_k"])).sort(dim=-1).values
    weights = scores.gather(-1, chosen)
    if attrs["norm_topk_prob"]:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return chosen, weights * attrs["routed_scaling_factor"]


def _largest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` largest of each row are; of equal ones those with the lowest index."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def mixture(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate: Bank, up: Bank, down: Bank
) -> torch.Tensor:
    """f32 [T, n] the sum over the chosen experts, in rising order, of down @ (weight * gated(x)).

    x [T, k]; chosen and weights [T, top_k].
    """
    experts, top_k = len(gate.w), chosen.shape[1]
    ranked, order = chosen.flatten().sort(stable=True)  # by expert; order: pair of each row
    numbers = torch.arange(experts, device=x.device)
    groups = Groups(torch.searchsorted(ranked, numbers, right=True, out_int32=True))
    rows = x.to(gate.taken)[order // top_k]
    made = gated(groups.product(rows, gate), groups.product(rows, up))
    del rows
    made = groups.product(made.mul_(weights.flatten()[order, None]), down)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return made[place].unflatten(0, (-1, top_k)).sum(dim=1, dtype=torch.float32)
