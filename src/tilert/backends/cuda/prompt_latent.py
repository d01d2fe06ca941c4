"""The nodes of latent and of sparse attention for prompts, with PyTorch; formulas as in ops/mla.py and
ops/index.py. What needs a score for each head, token and position is computed for a few tokens at a time.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional

from tilert.backends.cuda.paged import StepCaches

MOST = 1 << 24  # elements of the scores that are held at once
E4M3_MAX = 448.0
SMALLEST = 1e-4
SCALE_COLS = 128  # latents of a packed row that share a scale
TINY = torch.finfo(torch.float32).tiny


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
    return y.transpose(0, 1).flatten(1)


def attend(
    q: torch.Tensor, rotated: torch.Tensor, rows: torch.Tensor, scale: float, mask: torch.Tensor
) -> torch.Tensor:
    """[T, heads, lora] weighted latents, in the type of `rows`. q [T, heads, lora] and rotated [T, heads, r];
    rows [S, lora + r] of the cache; mask [T, S]: what a token sees, which is nothing behind itself, and the
    last token is the last row."""
    lora, count, hidden = q.shape[2], len(rows), ~mask
    out = rows.new_empty(q.shape)
    step = max(1, MOST // (q.shape[1] * count))
    for begin in range(0, len(q), step):
        end = min(begin + step, len(q))
        past = rows[: count - len(q) + end]
        both = [x[begin:end].to(rows.dtype) for x in (q, rotated)]
        scores = (torch.cat(both, dim=-1) @ past.T).float().mul_(scale)
        scores.masked_fill_(hidden[begin:end, None, : len(past)], -torch.inf)
        torch.matmul(scores.softmax(dim=-1).to(rows.dtype), past[:, :lora], out=out[begin:end])
    return out


def append_row(caches: StepCaches, layer: int, row: torch.Tensor, lora: int) -> None:
    """Latents and keys [T, 1, lora + r] into the cache of a layer, packed where that is of bytes."""
    name = f"layers.{layer}.latent_cache"
    if caches.tensors[name].dtype is torch.uint8:
        caches.append(name, packed(row, lora), plain=True)
    else:
        caches.append(name, row)


def rows(caches: StepCaches, layer: int, lora: int) -> torch.Tensor:
    """[S, lora + r] all rows of the sequence, as attention takes them."""
    name = f"layers.{layer}.latent_cache"
    if caches.tensors[name].dtype is torch.uint8:
        return unpacked(caches.read(name, plain=True)[0], lora)
    return caches.read(name)[0]


def packed(row: torch.Tensor, lora: int) -> torch.Tensor:
    """The bytes u8 [T, 1, n] of rows [T, 1, lora + r]; ops/mla.py: pack."""
    row, count = row.float(), -(-lora // SCALE_COLS)
    tiles = functional.pad(row[..., :lora], (0, count * SCALE_COLS - lora))
    tiles = tiles.unflatten(-1, (count, SCALE_COLS))
    scales = (tiles.abs().amax(dim=-1, keepdim=True) / E4M3_MAX).clamp(min=TINY)
    values = (tiles / scales).clamp(-E4M3_MAX, E4M3_MAX).flatten(-2)[..., :lora]
    parts = (values.to(torch.float8_e4m3fn), functional.pad(scales[..., 0], (0, -count % 4)),
             row[..., lora:].to(torch.bfloat16))  # fmt: skip
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpacked(stored: torch.Tensor, lora: int) -> torch.Tensor:
    """bf16 [S, lora + r] of bytes u8 [S, n], some rows at a time; ops/mla.py: unpack."""
    count = -(-lora // SCALE_COLS)
    key = lora + 4 * (count + -count % 4)
    width = lora + (stored.shape[1] - key) // 2
    out = stored.new_empty(len(stored), width, dtype=torch.bfloat16)
    step = MOST // width
    for some, to in zip(stored.split(step), out.split(step), strict=True):
        latents = some[:, :lora].contiguous().view(torch.float8_e4m3fn).float()
        scales = some[:, lora : lora + 4 * count].contiguous().view(torch.float32)
        to[:, :lora] = latents * scales.repeat_interleave(SCALE_COLS, dim=1)[:, :lora]
        to[:, lora:] = some[:, key:].contiguous().view(torch.bfloat16)
    return out


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """ops/index.py: hadamard; as one product, whose factors are exact."""
    return x @ _signs(x.shape[-1], x.device) * x.shape[-1] ** -0.5


@lru_cache
def _signs(width: int, device: torch.device) -> torch.Tensor:
    """[width, width] Sylvester's matrix of 1 and -1."""
    signs = torch.ones(1, 1)
    while len(signs) < width:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), signs)
    return signs.to(device)


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


def append_key(caches: StepCaches, layer: int, k: torch.Tensor) -> bool:
    """Keys [T, 1, d] into the indexer's caches; True where those are e4m3."""
    name, scales = f"layers.{layer}.index_cache", f"layers.{layer}.index_scale_cache"
    if scales not in caches.tensors:
        caches.append(name, k, plain=True)
        return False
    values, scale = quantised(k)
    caches.append(name, values, plain=True)
    caches.append(scales, scale, plain=True)
    return True


def index_scores(
    caches: StepCaches, layer: int, q: torch.Tensor, weights: torch.Tensor, scale: float
) -> torch.Tensor:
    """f32 [T, positions] scores of all positions. q [T, heads, d], weights [T, heads]."""
    keys = caches.read(f"layers.{layer}.index_cache", plain=True)[0].float()
    if (scales := f"layers.{layer}.index_scale_cache") in caches.tensors:
        keys = keys * caches.read(scales, plain=True)[0]
    out = q.new_empty(len(q), len(keys))
    step = max(1, MOST // (q.shape[1] * len(keys)))
    for some, weight, to in zip(q.split(step), weights.split(step), out.split(step), strict=True):
        torch.mul((weight[:, None] @ (some @ keys.T).relu_())[:, 0], scale, out=to)
    return out


def select(scores: torch.Tensor, positions: torch.Tensor, topk: int) -> torch.Tensor:
    """bool [T, S]: the topk best of the positions that each token sees, of equal ones the lowest."""
    seen = torch.arange(scores.shape[1], device=scores.device) <= positions[:, None]
    if scores.shape[1] <= topk:
        return seen
    step = max(1, MOST // 4 // scores.shape[1])  # a sort takes several times what it sorts
    for some, of in zip(scores.split(step), seen.split(step), strict=True):
        order = some.masked_fill(~of, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        of &= torch.zeros_like(of).scatter_(-1, order[:, :topk], True)
    return seen
