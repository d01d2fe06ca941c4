"""Latent attention and the indexer of sparse attention to ops.

On machines with rings many workers share the heads and positions of few tokens: each tile has as many
heads as one matrix instruction has rows, and as many workers merge the shares, each some columns of a head.
"""

from __future__ import annotations

import math

from tilert.compiler.lowering import PROMPT_BLOCK, Lowering, operand
from tilert.ir.dtype import DType
from tilert.ir.graph import Node, Value
from tilert.ir.program import NONE, PAGE, Buf, Kind
from tilert.ops import Combine, IndexRope, IndexScore, LatentAppend, LatentAttention, Select
from tilert.ops.mla import packed_bytes

HEADS = 16  # of a tile on machines with rings: rows of a matrix instruction
MAX_SPLITS = 32  # each share has a page then, of 2048 selected positions
PART = 64  # columns of a head that a worker merges, where heads are so wide


def _paged(low: Lowering) -> tuple[Buf, Buf, Buf, Buf]:
    """Positions, sequences, pages and counts: what an op with a cache reads."""
    return low.state("positions"), low.state("sequences"), low.state("pages"), low.state("counts")


def _latent_cache(low: Lowering, layer: int, lora: int, rope: int) -> Buf:
    """The latent cache of a layer; its columns are those of ops/mla.py: cache_cols."""
    if low.machine.packed_latents:
        return low.cache("latent", layer, packed_bytes(lora, rope), DType.U8)
    return low.cache("latent", layer, lora + rope)


def wanted_beyond(low: Lowering, product: Value) -> int:
    """How many positions a token must see more than for anybody to read a product, because it makes queries
    of an indexer and no others; 0 where that is not so or the machine computes it all the same."""
    readers = low.readers.get(product, [])
    if not low.fused or len(readers) != 1 or readers[0].op != "index_rope":
        return 0
    if readers[0].inputs["q"] is not product:
        return 0
    (scores,) = low.readers[readers[0].output]
    return int(scores.attrs["topk"])


def _lower_latent_rope(low: Lowering, node: Node) -> None:
    """The cache gets its rows; attention rotates the queries that it takes."""
    q, kv, norm, table = (operand(node, name) for name in ("q", "kv", "norm", "table"))
    lim, layer = low.limits, int(node.attrs["layer"])
    low.home[node.output] = low.home[q]
    low.column[node.output] = low.column.get(q, 0)
    low.ops.append(
        LatentAppend(low.home[kv], low.weight(norm), low.weight(table),
                     _latent_cache(low, layer, norm.cols, table.cols), *_paged(low), lim.tokens, table.cols,
                     norm.cols, low.column.get(kv, 0), int(node.attrs["interleave"]),
                     int(low.machine.packed_latents), lim.context, lim.sequences, lim.pages,
                     node.attrs["eps"])
    )  # fmt: skip


def _heads_and_splits(low: Lowering, heads: int) -> tuple[int, int]:
    """(heads of a tile, shares of the positions). Shares decide the order of sums, so all steps of few
    tokens have the same."""
    machine = low.machine
    if not low.few:
        return heads // math.gcd(heads, machine.workers), 1
    if not low.fused:  # every worker has all heads, and reads its own positions once
        return heads, machine.splits or machine.workers
    group = next(n for n in range(min(heads, HEADS), 0, -1) if heads % n == 0)
    rule = min(MAX_SPLITS, machine.workers // (heads // group))
    return group, max(2, machine.splits or rule)  # at least two, for what follows merges shares


def _lower_latent_attention(low: Lowering, node: Node) -> None:
    q, rotated, selected = operand(node, "q"), operand(node, "rotated"), node.inputs["selected"]
    layer, heads, lora, nope = (int(node.attrs[n]) for n in ("layer", "heads", "lora", "nope"))
    turning, lim = low.maker[rotated], low.limits
    assert turning.op == "latent_rope", f"{node}: its queries are not rotated"
    table = operand(turning, "table")
    group, splits = _heads_and_splits(low, heads)
    y = part = low.work(node.output)
    if splits > 1:
        name, width = f"{node.output.name}.part", heads * splits * (lora + 2)
        part = low.buffer(name, Kind.WORK, DType.F32, lim.tokens, width)
    op = LatentAttention(
        low.home[q], low.home[rotated], low.weight(table),
        _latent_cache(low, layer, lora, table.cols), NONE if selected is None else low.home[selected],
        part, *_paged(low), lim.tokens, heads, group, nope, table.cols, lora, low.column.get(rotated, 0),
        int(turning.attrs["interleave"]), int(low.machine.packed_latents),
        selected.cols if selected else 0, splits,
        # With rings there are workers enough to take the tokens of a step side by side.
        1 if low.fused else lim.tokens if low.few else PROMPT_BLOCK, lim.context, lim.sequences, lim.pages,
        node.attrs["scale"],
    )  # fmt: skip
    low.ops.append(op)
    if splits > 1:
        parts = lora // PART if low.fused and lora % PART == 0 else 1
        low.ops.append(
            Combine(part, y, op.counts, op.rows, heads, heads, lora, splits, window=0, parts=parts)
        )


def _index_caches(low: Lowering, layer: int, cols: int) -> tuple[Buf, Buf]:
    """The indexer's keys, and their scales where they are e4m3."""
    dtype = low.machine.index_dtype
    keys = low.cache("index", layer, cols, dtype)
    if dtype is not DType.F8E4M3:
        return keys, NONE
    return keys, low.cache("index_scale", layer, 1, DType.F32)


def _lower_index_rope(low: Lowering, node: Node) -> None:
    q, k, norm, bias, table = (operand(node, n) for n in ("q", "k", "norm", "bias", "table"))
    lim, layer = low.limits, int(node.attrs["layer"])
    low.home[node.output] = low.home[q]
    low.column[node.output] = column = low.column.get(q, 0)
    low.ops.append(
        IndexRope(low.home[q], low.home[k], low.weight(norm), low.weight(bias), low.weight(table),
                  *_index_caches(low, layer, k.cols), *_paged(low), lim.tokens, q.cols // k.cols, k.cols,
                  table.cols, column, low.column.get(k, 0), int(node.attrs["interleave"]), lim.context,
                  lim.sequences, lim.pages, node.attrs["eps"])
    )  # fmt: skip


def _lower_index_score(low: Lowering, node: Node) -> None:
    q, weights, lim = operand(node, "q"), operand(node, "weights"), low.limits
    layer, d, topk = (int(node.attrs[name]) for name in ("layer", "head_dim", "topk"))
    splits = min(low.machine.workers, lim.pages)
    width = -(-lim.pages // splits) * PAGE
    order = f"{node.output.name}.order"
    low.ops.append(
        IndexScore(low.home[q], low.home[weights], *_index_caches(low, layer, d),
                   low.work(node.output, splits * width),
                   low.buffer(order, Kind.WORK, DType.I32, lim.tokens, splits * width), *_paged(low),
                   lim.tokens, weights.cols, d, low.column.get(q, 0), low.column.get(weights, 0), topk,
                   splits, width, lim.tokens if low.few else PROMPT_BLOCK, lim.sequences, lim.pages,
                   node.attrs["scale"])
    )  # fmt: skip


def _lower_select(low: Lowering, node: Node) -> None:
    scores = operand(node, "scores")
    made = next(op for op in reversed(low.ops) if isinstance(op, IndexScore))
    assert made.y == low.home[scores], f"{node}: the scores are not those of the last indexer"
    low.ops.append(
        Select(made.y, made.order, low.work(node.output, dtype=DType.I32), low.state("positions"),
               low.state("counts"), made.rows, int(node.attrs["topk"]), made.splits, made.width)
    )  # fmt: skip


LOWER_LATENT = {
    "latent_rope": _lower_latent_rope,
    "latent_attention": _lower_latent_attention,
    "index_rope": _lower_index_rope,
    "index_score": _lower_index_score,
    "select": _lower_select,
}
