"""Graph nodes to ops cut into tiles: folding and tile sizes for one machine and one step size.

Folded where the machine gains: a norm into every product that reads it (few tokens: each worker
repeats the norm, which is cheaper than a hand-off), a residual sum into the product before it, gate
and up into one op. Machines that stream weights through rings have many workers and wait longest for
hand-offs: there q, k and v are one product, rotation and attention are one op, keys and values are
appended beside the chain of ops, and the last norm is folded too. Every activation gets a buffer of its
own here; memory.py makes them share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tilert.compiler.latent import LOWER_LATENT, wanted_beyond
from tilert.compiler.lowering import (
    FEW_TOKENS,
    MAX_SPLITS,
    PROMPT_BLOCK,
    Limits,
    Lowering,
    operand,
)
from tilert.ir.dtype import DType
from tilert.ir.graph import OUTPUTS, Graph, Node, Value
from tilert.ir.machine import Machine
from tilert.ir.program import NONE, Buf, Buffer, Kind, Op, Scale
from tilert.ops import (
    Adjust,
    Append,
    Argmax,
    Attend,
    Attention,
    Bins,
    Combine,
    Draw,
    Embed,
    ExpertDown,
    ExpertGate,
    Linear,
    NextToken,
    Norm,
    Report,
    Rope,
    Route,
    Sift,
    Survey,
    Totals,
)
from tilert.ops.draw import BINS, CONTROL_WORDS, MAX_VOCAB, row_words
from tilert.ops.experts import SIGMOID, SOFTMAX
from tilert.ops.linear import ADD, GATE, STORE, multiplier
from tilert.ops.logprobs import MAX_CHUNK, REPORT_WORDS, SURVEY_WORDS


def lower(
    graph: Graph, machine: Machine, limits: Limits, dtypes: Mapping[str, DType],
    scales: Mapping[str, Scale],
) -> tuple[list[Buffer], list[Op]]:  # fmt: skip
    """Buffers and ops of a graph, in an order that computes it; see build."""
    low = Lowering(graph, machine, limits, dtypes, scales)
    lower_nodes(low)
    choose = _lower_draw if limits.sampled else _lower_choice
    choose(low, graph.nodes[-1].output)
    return low.buffers, low.ops


def lower_nodes(low: Lowering) -> None:
    """The ops of all nodes, to the logits."""
    for name in ("counts", "tokens", "positions", "sequences", "output_rows", "pages", "sampled"):
        low.state(name)
    for node in low.graph.nodes:
        _LOWER[node.op](low, node)


def _lower_embed(low: Lowering, node: Node) -> None:
    table = operand(node, "table")
    assert isinstance(table.rows, int)
    block = 1 if low.fused else low.limits.tokens if low.few else PROMPT_BLOCK
    low.ops.append(
        Embed(low.state("tokens"), low.weight(table), low.work(node.output), low.state("counts"),
              table.rows, low.limits.tokens, table.cols, block)
    )  # fmt: skip


def _lower_given(low: Lowering, node: Node) -> None:
    name, rows, cols = node.output.name, low.rows(node.output), node.output.cols
    if low.given == NONE:
        low.given = low.buffer(name, Kind.STATE, DType.F32, rows, cols)
    low.home[node.output] = low.given


BY_COLUMN = {"rms_norm", "latent_rope", "index_rope", "index_score"}


def _lower_norm(low: Lowering, node: Node) -> None:
    if low.folded(node.output):
        return
    x, gathers = operand(node, "x"), node.output.rows == OUTPUTS
    rows = low.rows(node.output)
    low.ops.append(
        Norm(low.home[x], low.weight(node.inputs["weight"]),
             low.state("output_rows") if gathers else NONE, low.work(node.output), low.state("counts"),
             low.rows(x), rows, x.cols, rows if rows <= FEW_TOKENS else PROMPT_BLOCK, node.attrs["eps"])
    )  # fmt: skip


def _lower_linear(low: Lowering, node: Node) -> None:
    if low.uses[node.output] == 1 and _takes(low.readers[node.output][0], node.output):
        return  # emitted with its only consumer
    if node.output in low.home:
        return  # emitted with the first of its siblings
    nodes, column = _siblings(low, node), 0
    y = low.work([n.output for n in nodes])
    for each in nodes:
        low.column[each.output] = column
        column += each.output.cols
    _emit_linear(low, nodes, y, STORE)


def _takes(consumer: Node, product: Value) -> bool:
    """True when `consumer` is computed by the product itself: a sum, but not where it is the residual."""
    return consumer.op == "silu_mul" or (consumer.op == "add" and consumer.inputs["y"] is product)


def _siblings(low: Lowering, node: Node) -> list[Node]:
    """The products of one input that are computed as one, where hand-offs are dear: q, k and v, or those
    that latent attention reads."""
    if not low.fused or wanted_beyond(low, node.output):
        return [node]
    if _by_column(low, node):
        return _columns(low, node)
    if low.uses[node.output] != 1:
        return [node]
    if (consumer := low.readers[node.output][0]).op != "rope":
        return [node]
    nodes = [low.maker[operand(consumer, name)] for name in ("q", "k", "v")]
    biases = [n.inputs["bias"] for n in nodes]
    given = [b for b in biases if b is not None]
    weights = [operand(n, "w") for n in nodes]
    fit = len({operand(n, "x") for n in nodes}) == 1 and len(given) in (0, len(biases))
    return nodes if fit and low.joinable(weights) and low.joinable(given or weights) else [node]


def _by_column(low: Lowering, node: Node) -> bool:
    """True when all that reads a product can take it as columns of a wider buffer."""
    readers = low.readers.get(node.output, [])
    wide = [n.op in BY_COLUMN or (n.op == "linear" and "groups" in n.attrs) for n in readers]
    return node.op == "linear" and "groups" not in node.attrs and bool(wide) and all(wide)


def _columns(low: Lowering, node: Node) -> list[Node]:
    """The products of the same input, all taken by column, whose weights can lie one after another.

    Of those with block scales, one whose rows end inside a block can only be the last.
    """
    alike = [n for n in low.readers[operand(node, "x")] if _by_column(low, n)]
    alike = [n for n in alike if not wanted_beyond(low, n.output)]
    biased = node.inputs["bias"] is not None
    alike = [n for n in alike if (n.inputs["bias"] is not None) is biased]
    w, scale = operand(node, "w"), low.scales.get(operand(node, "w").name)
    alike = [n for n in alike if low.alike(w, operand(n, "w"))]
    if scale is None:
        return alike
    ends = [n for n in alike if n.output.cols % scale.block[0]]
    if node in ends[1:]:
        return [node]
    return [n for n in alike if n not in ends] + ends[:1]


def _lower_add(low: Lowering, node: Node) -> None:
    residual, product = operand(node, "x"), operand(node, "y")
    maker = low.maker[product]
    assert maker.op in ("linear", "experts") and low.uses[product] == 1, (
        f"{node}: the sum does not follow a product"
    )
    old, late = low.home[residual], _read_later(low, node, residual)
    if not late:
        low.home[node.output] = old  # in place: the old residual is dead
    if maker.op == "experts":
        assert not late, f"{node}: {residual} is still read after the sum"
        _emit_down(low, maker, old)
    elif late:
        _emit_linear(low, [maker], low.work(node.output), ADD, residual=old)
    else:
        _emit_linear(low, [maker], old, ADD)


def _read_later(low: Lowering, node: Node, value: Value) -> bool:
    """True when a node behind this one reads a value, be it through a norm that is folded into it."""
    folded = [n.output for n in low.readers[value] if n.op == "rms_norm" and low.folded(n.output)]
    place = low.place[node]
    readers = (n for v in (value, *folded) for n in low.readers.get(v, []))
    return any(low.place[n] > place for n in readers)


def _lower_silu_mul(low: Lowering, node: Node) -> None:
    gate, up = low.maker[operand(node, "gate")], low.maker[operand(node, "up")]
    assert gate.op == up.op == "linear" and gate.inputs["x"] is up.inputs["x"], (
        f"{node}: not a gated pair"
    )
    _emit_linear(low, [gate], low.work(node.output, dtype=_stored(low, node.output)), GATE, up)


def _lower_route(low: Lowering, node: Node) -> None:
    logits, bias, rows = operand(node, "logits"), node.inputs["bias"], low.rows(node.output)
    top_k, n_group, topk_group, sigmoid, renormalise = (
        int(node.attrs[name])
        for name in ("top_k", "n_group", "topk_group", "sigmoid", "norm_topk_prob")
    )
    chosen = low.buffer(f"{node.output.name}.chosen", Kind.WORK, DType.I32, rows, top_k)
    low.chosen[node.output] = chosen
    low.ops.append(
        Route(low.home[logits], low.weight(bias), chosen, low.work(node.output), low.state("counts"),
              rows, logits.cols, top_k, n_group, topk_group, SIGMOID if sigmoid else SOFTMAX,
              renormalise, node.attrs["routed_scaling_factor"])
    )  # fmt: skip


def _lower_experts(low: Lowering, node: Node) -> None:
    """Gate and up; down follows with the sum that takes it, so that products that need no choice can
    stand between them."""
    x, route, gate, up, down = (operand(node, n) for n in ("x", "route", "gate", "up", "down"))
    norm, eps, source, rows = NONE, 0.0, x, low.rows(x)
    if low.folded(x):
        maker = low.maker[x]
        source, norm = operand(maker, "x"), low.weight(maker.inputs["weight"])
        eps = maker.attrs["eps"]
    n, k, row = down.cols, gate.cols, gate.parts[0]
    dtype = low.dtypes.get(row.name, DType.F32)
    y = low.buffer(f"{node.output.name}.h", Kind.WORK, DType.F32, rows, route.cols * n)
    low.home[node.output] = y
    low.ops.append(
        ExpertGate(low.home[source], low.bank(gate), low.bank(up), norm, low.chosen[route], y,
                   low.state("counts"), rows, k, n, len(gate.parts), route.cols,
                   tile_rows(low.machine, rows, k * dtype.bytes, 2), int(low.few), eps,
                   _x_type(low, row, dtype))
    )  # fmt: skip


def _emit_down(low: Lowering, node: Node, y: Buf) -> None:
    route, down = operand(node, "route"), operand(node, "down")
    rows, row = low.rows(node.output), down.parts[0]
    dtype = low.dtypes.get(row.name, DType.F32)
    tile = tile_rows(low.machine, rows, down.cols * dtype.bytes)
    if low.fused:
        # x of all chosen experts stays in registers. A tile of eight rows takes half as many of those as
        # one of sixteen, and where that is more than a unit, one of four takes half again: then all lanes
        # have other elements of one token. Tiles of several experts share a slot.
        tile = min(tile, 8)
        if tile * route.cols * down.cols * dtype.bytes > low.machine.slot_bytes:
            tile = min(tile, 4)
    low.ops.append(
        ExpertDown(low.home[node.output], low.bank(down), low.chosen[route], low.home[route], y,
                   low.state("counts"), rows, down.cols, node.output.cols, len(down.parts), route.cols,
                   tile, _x_type(low, row, dtype))
    )  # fmt: skip


def _emit_linear(
    low: Lowering, nodes: list[Node], y: Buf, epilogue: int, up: Node | None = None,
    residual: Buf = NONE,
) -> None:  # fmt: skip
    """The product of one node, or of several with the same input whose outputs are side by side."""
    x, w = operand(nodes[0], "x"), [operand(node, "w") for node in nodes]
    biases = [b for node in nodes if (b := node.inputs["bias"]) is not None]
    norm, gather, eps, source = NONE, NONE, 0.0, x
    if low.folded(x):
        maker = low.maker[x]
        source, norm = operand(maker, "x"), low.weight(maker.inputs["weight"])
        eps = maker.attrs["eps"]
        gather = low.state("output_rows") if x.rows == OUTPUTS else NONE
    n, k = sum(v.rows for v in w if isinstance(v.rows, int)), w[0].cols
    rows = low.rows(x)
    dtype, matrices = low.dtypes.get(w[0].name, DType.F32), 2 if up else 1
    tile = tile_rows(low.machine, rows, k * dtype.bytes, matrices)
    beyond = wanted_beyond(low, nodes[0].output)
    blocks = int(nodes[0].attrs.get("groups", 1)), int(nodes[0].attrs.get("stride", 0))
    if blocks[0] > 1:  # no tile has rows of two blocks; with a ring, tiles are powers of two
        block = n // blocks[0]
        tile = math.gcd(tile, block) if low.machine.slots else min(tile, block)
    low.ops.append(
        Linear(low.home[source], low.joined(w), low.weight(up.inputs["w"]) if up else NONE,
               low.joined(biases) if biases else NONE, low.weight(up.inputs["bias"]) if up else NONE,
               norm, y, low.state("counts"), 1 if x.rows == OUTPUTS else 0, rows, k, n,
               0, tile, epilogue, eps,
               gather, low.rows(source) if gather != NONE else 1,
               # What rounding moves across a border would send a token to another expert.
               DType.F32 if nodes[0].output in low.routing else _x_type(low, w[0], dtype),
               low.column.get(source, 0), *blocks, low.state("positions") if beyond else NONE, beyond,
               residual)
    )  # fmt: skip


def _x_type(low: Lowering, w: Value, dtype: DType) -> DType:
    """What a product takes x' as: matrix units read rows in blocks of 64 bytes, each with one scale."""
    if not low.fused:
        return DType.F32
    scale = low.scales.get(w.name)
    per_scale = scale.block[1] if scale and scale.block[1] < w.cols else w.cols
    whole = w.cols * dtype.bytes % 64 == 0 and per_scale * dtype.bytes % 64 == 0
    return multiplier(dtype) if whole else DType.F32


def _stored(low: Lowering, value: Value) -> DType:
    """BF16 for what one product alone takes, as bf16: with several tokens, to load it takes longer than
    what a tag saves. Else F32."""
    consumer = low.readers[value][0]
    if low.limits.tokens == 1 or consumer.op != "linear" or low.uses[value] > 1:
        return DType.F32
    w = operand(consumer, "w")
    x_type = _x_type(low, w, low.dtypes.get(w.name, DType.F32))
    return x_type if x_type is DType.BF16 else DType.F32


def tile_rows(machine: Machine, tokens: int, row_bytes: int, matrices: int = 1) -> int:
    """Output rows per tile.

    With a ring: as many as fit one slot, up to 16. Where that is less than four of all matrices together,
    four, whose pieces share slots, so that each element of x meets four rows; or fewer where the pieces
    would be less than a quarter of a slot, for many small copies are slower. Without a ring: about 16 KB
    for few tokens, so that workers can share evenly; for many tokens 32 rows, a panel that the CPU kernel
    keeps in its cache.
    """
    slot = machine.slot_bytes
    if machine.slots:
        fit = min(slot // (row_bytes * matrices), 16)
        if fit * matrices >= 4 or row_bytes % 16:
            return 1 << (max(fit, 1).bit_length() - 1)
        pieces = {rows: -(-row_bytes // (slot // rows)) for rows in (4, 2, 1)}
        large = (rows for rows in (4, 2) if row_bytes // pieces[rows] >= slot // 4)
        return max(next(large, 1) // matrices, 1)
    row_bytes *= matrices
    if tokens > FEW_TOKENS:
        return 32
    return min(64, max(4, 16384 // row_bytes // 4 * 4))


def _lower_rope(low: Lowering, node: Node) -> None:
    if low.fused:
        return  # part of the attention that reads it
    q, k, v, table = (operand(node, name) for name in ("q", "k", "v", "table"))
    layer, d, kv_heads = (int(node.attrs[name]) for name in ("layer", "head_dim", "kv_heads"))
    lim = low.limits
    low.home[node.output] = low.home[q]
    low.ops.append(
        Rope(low.home[q], low.home[k], low.home[v], low.weight(node.inputs["q_norm"]),
             low.weight(node.inputs["k_norm"]), low.weight(table), low.cache("k", layer, k.cols),
             low.cache("v", layer, v.cols), low.state("positions"), low.state("sequences"),
             low.state("pages"), low.state("counts"), lim.tokens, q.cols // d, kv_heads, d, lim.context,
             lim.sequences, lim.pages, node.attrs["eps"])
    )  # fmt: skip


def _splits(low: Lowering, kv_heads: int) -> int:
    """Shares of the past positions of one kv head: what the machine says, else a rule.

    They decide in which order sums are taken, so all steps of few tokens have the same.
    """
    machine = low.machine
    if not low.few:
        return 1
    if low.fused:  # at least two, for Combine merges shares
        return max(2, machine.splits or min(MAX_SPLITS, machine.workers // kv_heads))
    return machine.splits or machine.workers // math.gcd(kv_heads, machine.workers)


def _lower_attend(low: Lowering, node: Node) -> None:
    rope, lim = low.maker[operand(node, "q")], low.limits
    assert rope.op == "rope", f"{node}: its queries are not rotated"
    q, k, v, table = (operand(rope, name) for name in ("q", "k", "v", "table"))
    layer, d, kv_heads = (int(node.attrs[name]) for name in ("layer", "head_dim", "kv_heads"))
    heads, splits = q.cols // d, _splits(low, kv_heads)
    window, width = int(node.attrs["window"]), heads * splits * (d + 2)
    part = low.buffer(f"{node.output.name}.part", Kind.WORK, DType.F32, lim.tokens, width)
    y = low.work(node.output, dtype=_stored(low, node.output))
    norms = low.weight(rope.inputs["q_norm"]), low.weight(rope.inputs["k_norm"])
    caches = low.cache("k", layer, k.cols), low.cache("v", layer, v.cols)
    states = low.state("positions"), low.state("sequences"), low.state("pages"), low.state("counts")
    table, eps = low.weight(table), rope.attrs["eps"]
    limits = lim.context, lim.sequences, lim.pages
    columns = low.column.get(k, 0), low.column.get(v, 0)
    low.ops += [
        Attend(low.home[q], low.home[k], low.home[v], *norms, table, *caches, part, *states, lim.tokens,
               heads, kv_heads, d, window, splits, *limits, eps, node.attrs["scale"], *columns),
        Append(low.home[k], low.home[v], norms[1], table, *caches, *states, lim.tokens, kv_heads, d,
               *limits, eps, *columns),
        Combine(part, y, states[3], lim.tokens, heads, kv_heads, d, splits, window),
    ]  # fmt: skip


def _lower_attention(low: Lowering, node: Node) -> None:
    if low.fused:
        return _lower_attend(low, node)
    q, lim = operand(node, "q"), low.limits
    layer, d, kv_heads = (int(node.attrs[name]) for name in ("layer", "head_dim", "kv_heads"))
    heads, splits = q.cols // d, _splits(low, kv_heads)
    y = low.work(node.output)
    target = y
    if splits > 1:
        name = f"{node.output.name}.part"
        target = low.buffer(name, Kind.WORK, DType.F32, lim.tokens, heads * splits * (d + 2))
    low.ops.append(
        Attention(low.home[q], low.cache("k", layer, kv_heads * d), low.cache("v", layer, kv_heads * d),
                  target, low.state("positions"), low.state("sequences"), low.state("pages"),
                  low.state("counts"), lim.tokens, heads, kv_heads, d, int(node.attrs["window"]), splits,
                  lim.tokens if low.few else PROMPT_BLOCK, lim.sequences, lim.pages, node.attrs["scale"])
    )  # fmt: skip
    if splits > 1:
        low.ops.append(
            Combine(target, y, low.state("counts"), lim.tokens, heads, kv_heads, d, splits,
                    int(node.attrs["window"]))
        )  # fmt: skip


def _lower_choice(low: Lowering, logits: Value) -> None:
    """The best token of each row; in steps of few tokens it also makes the next step ready."""
    rows, (part, chunks) = low.limits.outputs, lower_argmax(low, logits)
    feed = int(low.limits.tokens == low.limits.outputs)
    low.ops.append(
        NextToken(part, low.state("sampled"), low.state("tokens"), low.state("positions"),
                  low.state("counts"), rows, chunks, feed)
    )  # fmt: skip


def lower_argmax(low: Lowering, logits: Value) -> tuple[Buf, int]:
    """The buffer of the largest logits of all chunks, and how many chunks there are."""
    rows, workers = low.limits.outputs, low.machine.workers
    chunk = -(-logits.cols // workers)
    chunks = -(-logits.cols // chunk)
    part = low.buffer("argmax", Kind.WORK, DType.F32, rows, 2 * chunks)
    low.ops.append(Argmax(low.home[logits], part, low.state("counts"), rows, logits.cols, chunk))
    return part, chunks


def _lower_draw(low: Lowering, logits: Value) -> None:
    """One token is sampled from the logits and makes the next step ready; see ops/draw.py."""
    lim, vocab = low.limits, logits.cols
    assert lim.tokens == lim.outputs == 1, "only steps of one token are sampled on the device"
    assert vocab <= MAX_VOCAB, f"{vocab} tokens are too many to be sampled on the device"
    chunk = -(-vocab // low.machine.workers)
    chunks = -(-vocab // chunk)

    def state(name: str, dtype: DType, cols: int) -> Buf:
        return low.buffer(name, Kind.STATE, dtype, 1, cols)

    def work(name: str, dtype: DType, rows: int, cols: int) -> Buf:
        return low.buffer(name, Kind.WORK, dtype, rows, cols)

    controls = state("controls", DType.I32, CONTROL_WORDS)
    mask, tally = state("mask", DType.I32, -(-vocab // 32)), state("tally", DType.I32, vocab)
    biases = state("biases", DType.F32, vocab)
    scores, peaks = work("scores", DType.F32, 1, vocab), work("peaks", DType.F32, 1, chunks)
    bins, totals = work("bins", DType.I32, chunks, 4 * BINS), work("totals", DType.I32, 1, 4 * BINS)
    candidates = work("candidates", DType.I32, chunks, row_words(chunk))
    low.ops += [
        Adjust(low.home[logits], controls, mask, biases, tally, scores, peaks, vocab, chunk),
        Bins(controls, scores, peaks, bins, vocab, chunk),
        Totals(bins, totals, chunks, -(-BINS // low.machine.workers)),
        Sift(controls, scores, peaks, totals, candidates, vocab, chunk),
        Draw(controls, scores, totals, candidates, tally, low.state("counts"), low.state("sampled"),
             low.state("tokens"), low.state("positions"), vocab, chunk, chunks, int(not lim.logprobs)),
    ]  # fmt: skip
    if lim.logprobs:
        _lower_report(low, logits, controls)


def _lower_report(low: Lowering, logits: Value, controls: Buf) -> None:
    """Log-probabilities of the step's token and of the best ones; see ops/logprobs.py."""
    vocab, home, sampled = logits.cols, low.home[logits], low.state("sampled")
    chunk = min(-(-vocab // low.machine.workers), MAX_CHUNK)
    chunks = -(-vocab // chunk)
    part = low.buffer("argmax", Kind.WORK, DType.F32, 1, 2 * chunks)
    survey = low.buffer("survey", Kind.WORK, DType.I32, chunks, SURVEY_WORDS)
    report = low.buffer("report", Kind.STATE, DType.I32, 1, REPORT_WORDS)
    low.ops += [
        Argmax(home, part, low.state("counts"), 1, vocab, chunk),
        Survey(home, part, controls, sampled, survey, vocab, chunk),
        Report(home, part, survey, controls, low.state("counts"), sampled, low.state("tokens"),
               low.state("positions"), report, vocab, chunks),
    ]  # fmt: skip


_LOWER = {
    "embed": _lower_embed,
    "given": _lower_given,
    "rms_norm": _lower_norm,
    "linear": _lower_linear,
    "add": _lower_add,
    "silu_mul": _lower_silu_mul,
    "rope": _lower_rope,
    "attention": _lower_attention,
    "route": _lower_route,
    "experts": _lower_experts,
    **LOWER_LATENT,
}
