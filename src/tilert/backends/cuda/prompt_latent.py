"""The nodes of latent and of sparse attention for prompts, with PyTorch; formulas as in ops/mla.py and
ops/index.py. What needs a score for each head, token and position is computed for a few tokens at a time.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from tilert.backends.cuda.paged import PagedCaches

MOST = 1 << 26  # elements of the scores that are held at once
E4M3_MAX = 448.0
SMALLEST = 1e-4


def turned(x: torch.Tensor, angles: torch.Tensor, interleave: bool) -> torch.Tensor:
    """x [..., d] rotated; angles: cosines, then sines, on the last axis. Interleaved: neighbours are pairs,
    and the first elements of all pairs come before the second ones."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    cosine, sine = angles.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def block_linear(x: torch.Tensor, w: torch.Tensor, groups: int, stride: int) -> torch.Tensor:
    """x [T, >= groups * stride], w [rows, k]: block g of the rows times columns [g * stride, + k) of x."""
    own = x[:, : groups * stride].unflatten(1, (groups, stride))[..., : w.shape[1]]
    y = own.transpose(0, 1).to(w.dtype) @ w.unflatten(0, (groups, -1)).transpose(1, 2)
    return y.transpose(0, 1).flatten(1).float()


def attend(
    q: torch.Tensor, rows: torch.Tensor, lora: int, scale: float, mask: torch.Tensor
) -> torch.Tensor:
    """[T, heads, lora] weighted latents. q [T, heads, width]; rows [S, width] of the cache, whose first
    `lora` columns are the values; mask [T, S]: what a token sees."""
    out: list[torch.Tensor] = []
    step = max(1, MOST // (q.shape[1] * len(rows)))
    for some, seen in zip(q.split(step), mask.split(step), strict=True):
        scores = (some.to(rows.dtype) @ rows.T).float() * scale
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
        out.append((weights.to(rows.dtype) @ rows[:, :lora]).float())
    return torch.cat(out)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """ops/index.py: hadamard."""
    width, step = x.shape[-1], 1
    while step < width:
        pairs = x.unflatten(-1, (-1, 2, step))
        first, second = pairs.unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        step *= 2
    return x * width**-0.5


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / scale in e4m3, scale [..., 1]); ops/index.py: quantised."""
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) * (1 / E4M3_MAX)
    mantissa, exponent = torch.frexp(largest)
    scale = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def index_query(x: torch.Tensor, angles: torch.Tensor, interleave: bool) -> torch.Tensor:
    """x [T, heads, d] rotated in its first columns, and turned; angles [T, 1, rope]."""
    rope = angles.shape[-1]
    return hadamard(torch.cat([turned(x[..., :rope], angles, interleave), x[..., rope:]], dim=-1))


def index_key(
    x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, eps: float, angles: torch.Tensor,
    interleave: bool,
) -> torch.Tensor:  # fmt: skip
    """x [T, d] normed, then as a query of one head: [T, 1, d]."""
    shape = (x.shape[-1],)
    x = functional.layer_norm(x, shape, weight.view(-1).float(), shift.view(-1).float(), eps)
    return index_query(x[:, None], angles, interleave)


def append_key(
    caches: PagedCaches, layer: int, pages: torch.Tensor, positions: torch.Tensor, k: torch.Tensor
) -> bool:
    """Keys [T, 1, d] into the indexer's caches; True where those are e4m3."""
    name, scales = f"layers.{layer}.index_cache", f"layers.{layer}.index_scale_cache"
    if scales not in caches.tensors:
        caches.append(name, pages, positions, k, plain=True)
        return False
    values, scale = quantised(k)
    caches.append(name, pages, positions, values, plain=True)
    caches.append(scales, pages, positions, scale, plain=True)
    return True


def index_scores(
    caches: PagedCaches, layer: int, pages: torch.Tensor, end: int, q: torch.Tensor,
    weights: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """[T, end] scores of all positions. q [T, heads, d], weights [T, heads]."""
    keys = caches.read(f"layers.{layer}.index_cache", pages, 0, end, plain=True)[0].float()
    if (scales := f"layers.{layer}.index_scale_cache") in caches.tensors:
        keys = keys * caches.read(scales, pages, 0, end, plain=True)[0]
    out: list[torch.Tensor] = []
    step = max(1, MOST // (q.shape[1] * end))
    for some, weight in zip(q.split(step), weights.split(step), strict=True):
        out.append((weight[:, None] @ (some @ keys.T).relu())[:, 0] * scale)
    return torch.cat(out)


def select(scores: torch.Tensor, positions: torch.Tensor, topk: int) -> torch.Tensor:
    """bool [T, S]: the topk best of the positions that each token sees, of equal ones the lowest."""
    seen = torch.arange(scores.shape[1], device=scores.device) <= positions[:, None]
    if scores.shape[1] <= topk:
        return seen
    order = scores.masked_fill(~seen, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    return seen & torch.zeros_like(seen).scatter_(-1, order[:, :topk], True)
