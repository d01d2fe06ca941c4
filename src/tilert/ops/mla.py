"""Multi-head latent attention with absorbed weights (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one row per position for all heads: the normed latent, then the rotated key that the heads
share. Queries come as latents too (q W_uk, a block-diagonal product), and the result is a weighted sum of
latents per head, which the next product (W_uv) makes values of. So attention is that of many query heads
over one kv head whose values are the first part of its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.dtype import DType
from tilert.ir.program import NONE, PAST, Buf, Cost, Op, Region
from tilert.ops.attend import page_share
from tilert.ops.attention import empty_share, share, weigh
from tilert.ops.index import E4M3_MAX
from tilert.ops.memory import Memory, count
from tilert.ops.norm import rms_norm
from tilert.ops.rope import halves, rotate

CHOSEN_UNIT = 16  # chosen positions that no two shares have parts of
CACHE_BYTES = 2  # of an element, where costs are weighed: caches of GPUs are bf16
SCALE_COLS = 128  # latents of a packed row that share a scale
TINY = np.finfo(np.float32).tiny  # the least scale: no latent is divided by zero


def packed_bytes(lora: int, rope: int) -> int:
    """Bytes of a packed row: latents in e4m3, their scales in f32, filled up to 16 bytes, and the rotated key
    in bf16. 512 latents and a key of 64 take 656: the row of FlashMLA's FP8 cache, fp8_ds_mla of vLLM."""
    return lora + _scale_bytes(lora) + 2 * rope


def _scale_bytes(lora: int) -> int:
    return -(-_scales(lora) * DType.F32.bytes // 16) * 16


def _scales(lora: int) -> int:
    return -(-lora // SCALE_COLS)


def pack(row: np.ndarray, lora: int) -> np.ndarray:
    """The bytes u8 [packed_bytes] of a row f32 [lora + rope].

    Of SCALE_COLS latents v each the scale is max(|v|) / 448, and what is kept is v / scale, rounded to e4m3,
    as vLLM's concat_and_cache_ds_mla does.
    """
    scales = np.zeros(_scale_bytes(lora) // DType.F32.bytes, np.float32)
    values = np.empty(lora, DType.F8E4M3.numpy)
    for i, first in enumerate(range(0, lora, SCALE_COLS)):
        v = row[first : min(first + SCALE_COLS, lora)]
        scales[i] = max(np.abs(v).max() / np.float32(E4M3_MAX), TINY)
        values[first : first + v.size] = np.clip(v / scales[i], -E4M3_MAX, E4M3_MAX)
    parts = values, scales, row[lora:].astype(DType.BF16.numpy)
    return np.concatenate([part.view(np.uint8) for part in parts])


def unpack(rows: np.ndarray, lora: int) -> np.ndarray:
    """What attention takes of packed rows u8 [n, packed_bytes]: bf16 [n, lora + rope], the products of
    latents and scales rounded to it, for matrix units multiply no e4m3 by scales within a sum."""
    end, key = lora + _scales(lora) * DType.F32.bytes, lora + _scale_bytes(lora)
    latents, scales, keys = (
        np.ascontiguousarray(part).view(dtype.numpy)
        for part, dtype in ((rows[:, :lora], DType.F8E4M3), (rows[:, lora:end], DType.F32),
                            (rows[:, key:], DType.BF16))
    )  # fmt: skip
    each = np.repeat(scales, SCALE_COLS, axis=1)[:, :lora]
    widened = (latents.astype(np.float32) * each).astype(keys.dtype)
    return np.concatenate([widened, keys], axis=1)


def cache_cols(op: LatentAppend | LatentAttention) -> int:
    """Columns of the cache of an op: elements of a row, or bytes of a packed one."""
    return packed_bytes(op.lora, op.rope) if op.packed else op.lora + op.rope


@dataclass(frozen=True, slots=True)
class LatentAppend(Op):
    """One tile: the latent is normed, the shared key rotated, and both appended to the cache.

    kv [rows, >= kv_col + lora + rope] f32; weight [1, lora] of the norm; table [context, rope] f32;
    latent_cache [context, lora + rope], or with `packed` the bytes that `pack` makes of such rows.
    interleave: pairs are neighbours (2i, 2i + 1); either way the first elements of all pairs are stored
    before the second ones.
    """

    opcode: ClassVar[int] = 23
    kv: Buf
    weight: Buf
    table: Buf
    latent_cache: Buf
    positions: Buf
    sequences: Buf
    pages: Buf
    counts: Buf
    rows: int
    rope: int
    lora: int
    kv_col: int
    interleave: int
    packed: int
    context: int
    page_rows: int
    page_cols: int
    eps: float

    @property
    def tiles(self) -> int:
        return 1

    def reads(self, lo: int, hi: int) -> list[Region]:
        col = self.kv_col
        return [Region(self.counts, 0, 1, 0, 2), Region(self.positions, 0, 1, 0, self.rows),
                Region(self.sequences, 0, 1, 0, self.rows),
                Region(self.pages, 0, self.page_rows, 0, self.page_cols),
                Region(self.table, 0, self.context, 0, self.rope),
                Region(self.weight, 0, 1, 0, self.lora),
                Region(self.kv, 0, self.rows, col, col + self.lora + self.rope)]  # fmt: skip

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.latent_cache, 0, self.rows, 0, cache_cols(self))]

    def tag_checking(self) -> tuple[Buf, ...]:
        return (self.kv,)

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, 6 * self.rows * (self.lora + self.rope))

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, one token at a time."""
        first, key = self.kv_col, self.kv_col + self.lora
        for t in range(count(mem, self.counts, 0)):
            latent = mem.read(self.kv, t, t + 1, first, key)
            latent = rms_norm(latent, mem.read(self.weight, 0, 1, 0, self.lora), self.eps)
            turned = _turned(mem, self, t, mem.read(self.kv, t, t + 1, key, key + self.rope))
            row = np.concatenate([latent, turned], axis=1)[0]
            mem.write_cache(self.latent_cache, t, 0, pack(row, self.lora) if self.packed else row)


def _turned(mem: Memory, op: LatentAppend | LatentAttention, t: int, x: np.ndarray) -> np.ndarray:
    """x [..., rope] of token t, rotated."""
    position = int(mem.read(op.positions, 0, 1, t, t + 1)[0, 0])
    assert 0 <= position < op.context, f"position {position} outside [0, {op.context})"
    angles = mem.read(op.table, position, position + 1, 0, op.rope)[0]
    return rotate(halves(x) if op.interleave else x, angles)


@dataclass(frozen=True, slots=True)
class LatentAttention(Op):
    """Tile (b * heads / tile_heads + g) * splits + s: tokens of block b, heads [g * tile_heads, (g + 1) *
    tile_heads), share s of the positions.

    score = scale * (q . latent + q_rope . key), softmax over positions, y = sum of weights * latents.
    q [rows, heads * lora] f32: queries as latents; q_rope [rows, >= q_col + heads * (nope + rope)] f32: as
    the product left them, for the last `rope` columns of a head are rotated here, as LatentAppend does the
    key, by table [context, rope] f32; both are rounded to the type of rows as attention takes them, the
    cache's own, or with `packed` the one that `unpack` gives. selected [rows, topk] i32,
    when given: a token at position p attends to the first min(topk, p + 1) positions of its row, and a
    share is an even part of those, in units of CHOSEN_UNIT. Else it attends to all of [0, p], and a share
    has the pages that page_share deals to it; back ends may leave out shares without positions then. y as
    of Attention with a kv head for each head and head_dim = lora, which Combine merges where splits > 1.
    """

    opcode: ClassVar[int] = 24
    q: Buf
    q_rope: Buf
    table: Buf
    latent_cache: Buf
    selected: Buf
    y: Buf
    positions: Buf
    sequences: Buf
    pages: Buf
    counts: Buf
    rows: int
    heads: int
    tile_heads: int
    nope: int
    rope: int
    lora: int
    q_col: int
    interleave: int
    packed: int
    topk: int  # 0 without `selected`
    splits: int
    block: int
    context: int
    page_rows: int
    page_cols: int
    scale: float

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.block) * (self.heads // self.tile_heads) * self.splits

    @property
    def choice(self) -> Buf:
        return self.selected

    @property
    def group(self) -> int:
        """Heads that lie side by side within a share of y."""
        return 1

    @property
    def head_dim(self) -> int:
        """Columns of a head of y."""
        return self.lora

    def place(self, tile: int) -> tuple[int, int, int, int]:
        """(first token, end token, group of heads, split) of a tile."""
        rest, split = divmod(tile, self.splits)
        block, g = divmod(rest, self.heads // self.tile_heads)
        return block * self.block, min((block + 1) * self.block, self.rows), g, split

    def heads_of(self, g: int) -> range:
        """The heads of group g."""
        return range(g * self.tile_heads, (g + 1) * self.tile_heads)

    def columns(self, head: int, split: int) -> tuple[int, int]:
        """Columns of y that a head and a split have."""
        width = self.lora if self.splits == 1 else self.lora + 2
        first = (head * self.splits + split) * width
        return first, first + width

    def reads(self, lo: int, hi: int) -> list[Region]:
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.positions, 0, 1, 0, self.rows),
               Region(self.sequences, 0, 1, 0, self.rows),
               Region(self.table, 0, self.context, 0, self.rope),
               Region(self.pages, 0, self.page_rows, 0, self.page_cols)]  # fmt: skip
        head = self.nope + self.rope
        for tile in range(lo, hi):
            begin, end, g, _ = self.place(tile)
            first, last = g * self.tile_heads, (g + 1) * self.tile_heads
            rotated = self.q_col + first * head + self.nope, self.q_col + last * head
            out += [Region(self.q, begin, end, first * self.lora, last * self.lora),
                    Region(self.q_rope, begin, end, *rotated),
                    # Tokens of the step see each other only backwards, so later ones are not read.
                    Region(self.latent_cache, -PAST, end, 0, cache_cols(self))]  # fmt: skip
            if self.selected != NONE:
                out.append(Region(self.selected, begin, end, 0, self.topk))
        return out

    def writes(self, lo: int, hi: int) -> list[Region]:
        places = [self.place(tile) for tile in range(lo, hi)]
        return [
            Region(self.y, b, e, *self.columns(head, split))
            for b, e, g, split in places
            for head in self.heads_of(g)
        ]

    @property
    def leaves_out(self) -> tuple[int, ...]:
        return self.topk, self.splits

    def tagging(self) -> tuple[Buf, ...]:
        return (self.y,)

    def tag_checking(self) -> tuple[Buf, ...]:
        return self.q, self.q_rope

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        cache_bytes = flops = 0
        row_bytes = cache_cols(self) * (1 if self.packed else CACHE_BYTES)
        for tile in range(lo, hi):
            begin, end, _, _ = self.place(tile)
            seen = min(context + end, self.topk or context + end)
            seen = -(-seen // self.splits)
            cache_bytes += seen * row_bytes
            flops += 2 * (end - begin) * self.tile_heads * seen * (2 * self.lora + self.rope)
        return Cost(0, cache_bytes, flops)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition, one token at a time."""
        tokens = count(mem, self.counts, 0)
        for tile in range(lo, hi):
            begin, end, g, split = self.place(tile)
            for t in range(begin, min(end, tokens)):
                for head, y in zip(self.heads_of(g), self._token(mem, t, g, split), strict=True):
                    mem.write(self.y, t, self.columns(head, split)[0], y[None])

    def _token(self, mem: Memory, t: int, g: int, split: int) -> np.ndarray:
        """What the heads of group g get from a share: a row for each."""
        cuts = self._positions(mem, t, split)
        if not cuts:
            return empty_share(self.tile_heads, self.lora).reshape(self.tile_heads, -1)
        rows = np.concatenate(
            [mem.read_cache(self.latent_cache, t, lo, hi, 0, cache_cols(self)) for lo, hi in cuts]
        )
        if self.packed:
            rows = unpack(rows, self.lora)
        q_JC = self._queries(mem, t, g).astype(rows.dtype).astype(np.float32)
        k_SC = rows.astype(np.float32)
        out_JC, m_J1, sum_J1 = weigh(q_JC, k_SC, k_SC[:, : self.lora], self.scale)
        if self.splits == 1:
            return out_JC / sum_J1
        return np.concatenate([out_JC, m_J1, sum_J1], axis=1)

    def _positions(self, mem: Memory, t: int, split: int) -> list[tuple[int, int]]:
        """Positions that a share of token t covers, as [begin, end) in rising order."""
        visible = int(mem.read(self.positions, 0, 1, t, t + 1)[0, 0]) + 1
        if self.selected == NONE:
            return page_share(0, visible, split, self.splits)
        chosen = min(self.topk, visible)
        units = share(0, -(-chosen // CHOSEN_UNIT), split, self.splits)
        begin, end = (min(chosen, unit * CHOSEN_UNIT) for unit in units)
        if begin == end:
            return []
        chosen = mem.read(self.selected, t, t + 1, begin, end)[0]
        cuts = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
        return [(int(cut[0]), int(cut[-1]) + 1) for cut in cuts]

    def _queries(self, mem: Memory, t: int, g: int) -> np.ndarray:
        """[tile_heads, lora + rope]: what meets the rows of the cache."""
        head, heads = self.nope + self.rope, self.heads_of(g)
        q = mem.read(self.q, t, t + 1, heads.start * self.lora, heads.stop * self.lora)
        raw = [
            mem.read(self.q_rope, t, t + 1, col + self.nope, col + head)[0]
            for col in (self.q_col + h * head for h in heads)
        ]
        turned = _turned(mem, self, t, np.stack(raw))
        return np.concatenate([q.reshape(-1, self.lora), turned], axis=1)
