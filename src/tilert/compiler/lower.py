"""Graph nodes to ops cut into tiles: folding and tile sizes for one machine and one step size.

Folded where the machine gains: a norm into every product that reads it (few tokens: each worker
repeats the norm, which is cheaper than a hand-off), a residual sum into the product before it, gate
and up into one op. Machines that stream weights through rings have many workers and wait longest for
hand-offs: there q, k and v are one product, rotation, append and attention are one op, the product
after them merges its partial results, and the last norm is folded too. Every activation gets a buffer
of its own here; memory.py makes them share.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tilert.ir.dtype import DType
from tilert.ir.graph import OUTPUTS, Graph, Node, Value
from tilert.ir.machine import Machine
from tilert.ir.program import JOIN, NONE, PAGE, Buf, Buffer, Kind, Op, Scale
from tilert.ops import (
    Adjust,
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
    Rope,
    Route,
    Sift,
    Totals,
)
from tilert.ops.draw import BINS, CONTROL_WORDS, MAX_VOCAB, row_words
from tilert.ops.experts import SIGMOID, SOFTMAX
from tilert.ops.linear import ADD, GATE, STORE, multiplier

FEW_TOKENS = 8  # up to this many tokens a step is bound by reading weights
MAX_SPLITS = 8  # that the rule takes: a product merges their partial results
PROMPT_BLOCK = 32  # tokens per tile of row-wise ops and of attention in steps of many tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """Capacities of one program (see Program), and how it chooses tokens: the best, or sampled."""

    tokens: int
    outputs: int
    sequences: int
    context: int
    sampled: bool = False

    @property
    def pages(self) -> int:
        """Pages that one sequence can have."""
        return -(-self.context // PAGE)


@dataclass(slots=True)
class Lowering:
    """The state of the pass: tables under construction, and which value lives in which buffer."""

    graph: Graph
    machine: Machine
    limits: Limits
    dtypes: Mapping[str, DType]
    scales: Mapping[str, Scale]
    buffers: list[Buffer] = field(default_factory=list[Buffer])
    ops: list[Op] = field(default_factory=list[Op])
    ids: dict[str, Buf] = field(default_factory=dict[str, Buf])
    home: dict[Value, Buf] = field(default_factory=dict[Value, Buf])
    column: dict[Value, int] = field(default_factory=dict[Value, int])  # in its home, if not 0
    uses: Tally[Value] = field(default_factory=Tally[Value])
    maker: dict[Value, Node] = field(default_factory=dict[Value, Node])
    attends: dict[Value, Attend] = field(default_factory=dict[Value, Attend])
    chosen: dict[Value, Buf] = field(default_factory=dict[Value, Buf])  # by the output of a route
    routing: set[Value | None] = field(
        default_factory=set[Value | None]
    )  # logits that choose experts

    @property
    def fused(self) -> bool:
        """True when rotation, attention and the merge of its shares take no hand-offs of their own."""
        return self.few and self.machine.slots > 0

    @property
    def few(self) -> bool:
        """True when the step has so few tokens that reading weights decides its time."""
        return self.limits.tokens <= FEW_TOKENS

    def buffer(self, name: str, kind: Kind, dtype: DType, rows: int, cols: int) -> Buf:
        """The buffer of that name, made at the first call."""
        if name not in self.ids:
            self.ids[name] = Buf(len(self.buffers))
            self.buffers.append(Buffer(name, kind, dtype, rows, cols))
        return self.ids[name]

    def state(self, name: str) -> Buf:
        """A buffer that the host writes before a launch."""
        lim = self.limits
        cols = {"tokens": lim.tokens, "positions": lim.tokens, "sequences": lim.tokens, "counts": 2,
                "output_rows": lim.outputs, "sampled": lim.outputs, "pages": lim.pages}  # fmt: skip
        rows = lim.sequences if name == "pages" else 1
        return self.buffer(name, Kind.STATE, DType.I32, rows, cols[name])

    def weight(self, value: Value | None) -> Buf:
        """The buffer of a weight; NONE for None."""
        if value is None:
            return NONE
        assert value.weight and isinstance(value.rows, int), f"{value} is not a weight"
        dtype = self.dtypes.get(value.name, DType.F32)
        buf = self.buffer(value.name, Kind.WEIGHT, dtype, value.rows, value.cols)
        if (scale := self.scales.get(value.name)) and self.buffers[buf].scale == NONE:
            blocks = -(-value.rows // scale.block[0]), -(-value.cols // scale.block[1])
            of = self.buffer(scale.name, Kind.WEIGHT, DType.F32, *blocks)
            self.buffers[buf] = replace(self.buffers[buf], scale=of, block=scale.block)
        return buf

    def joined(self, values: list[Value]) -> Buf:
        """The buffer of weights that lie one after another; vectors become one vector."""
        if len(values) == 1:
            return self.weight(values[0])
        dtype, first = self.dtypes.get(values[0].name, DType.F32), values[0]
        rows = [v.rows for v in values if isinstance(v.rows, int)]
        name, vector = JOIN.join(v.name for v in values), first.rows == 1
        shape = (1, sum(v.cols for v in values)) if vector else (sum(rows), first.cols)
        buf = self.buffer(name, Kind.WEIGHT, dtype, *shape)
        if first.name in self.scales and self.buffers[buf].scale == NONE:
            block = self.scales[first.name].block
            names = JOIN.join(self.scales[v.name].name for v in values)
            blocks = sum(-(-r // block[0]) for r in rows), -(-first.cols // block[1])
            of = self.buffer(names, Kind.WEIGHT, DType.F32, *blocks)
            self.buffers[buf] = replace(self.buffers[buf], scale=of, block=block)
        return buf

    def bank(self, value: Value) -> Buf:
        """The buffer of the matrices of a bank."""
        kinds = {(self.dtypes.get(v.name), getattr(self.scales.get(v.name), "block", None))
                 for v in value.parts}  # fmt: skip
        assert len(kinds) == 1, f"the matrices of {value} differ in type"
        buf = self.joined(list(value.parts))
        self.buffers[buf] = replace(self.buffers[buf], bank=len(value.parts))
        return buf

    def joinable(self, values: list[Value]) -> bool:
        """True when the weights have one type, and scales whose blocks do not reach across a border."""
        scales = [self.scales.get(v.name) for v in values]
        blocks = {s.block if s else None for s in scales}
        if len({self.dtypes.get(v.name, DType.F32) for v in values}) > 1 or len(blocks) > 1:
            return False
        block = blocks.pop()
        rows = [v.rows for v in values[:-1] if isinstance(v.rows, int)]
        return block is None or all(r % block[0] == 0 for r in rows)

    def cache(self, kind: str, layer: int, cols: int) -> Buf:
        """The key or value cache of a layer."""
        return self.buffer(
            f"layers.{layer}.{kind}_cache", Kind.CACHE, self.machine.cache_dtype, self.limits.context,
            cols,
        )  # fmt: skip

    def work(
        self, value: Value | list[Value], cols: int | None = None, dtype: DType = DType.F32
    ) -> Buf:
        """A new activation buffer for a value (`cols` per row for it) or for several side by side."""
        values = value if isinstance(value, list) else [value]
        name, width = JOIN.join(v.name for v in values), cols or sum(v.cols for v in values)
        buf = self.buffer(name, Kind.WORK, dtype, self.rows(values[0]), width)
        self.home.update(dict.fromkeys(values, buf))
        return buf

    def rows(self, value: Value) -> int:
        """Capacity in rows of an activation."""
        return self.limits.outputs if value.rows == OUTPUTS else self.limits.tokens

    def folded(self, value: Value) -> bool:
        """True when the norm that makes `value` is repeated inside each product that reads it."""
        node = self.maker.get(value)
        if node is None or node.op != "rms_norm" or not self.few:
            return False
        return value.rows != OUTPUTS or self.fused


def lower(
    graph: Graph, machine: Machine, limits: Limits, dtypes: Mapping[str, DType],
    scales: Mapping[str, Scale],
) -> tuple[list[Buffer], list[Op]]:  # fmt: skip
    """Buffers and ops of a graph, in an order that computes it; see build."""
    low = Lowering(graph, machine, limits, dtypes, scales)
    low.uses.update(v for node in graph.nodes for v in node.inputs.values() if v is not None)
    low.maker.update({node.output: node for node in graph.nodes})
    low.routing.update(node.inputs["logits"] for node in graph.nodes if node.op == "route")
    _check_sums(low)
    for name in ("counts", "tokens", "positions", "sequences", "output_rows", "pages", "sampled"):
        low.state(name)
    for node in graph.nodes:
        _LOWER[node.op](low, node)
    choose = _lower_draw if limits.sampled else _lower_choice
    choose(low, graph.nodes[-1].output)
    return low.buffers, low.ops


def _input(node: Node, name: str) -> Value:
    value = node.inputs[name]
    assert value is not None, f"{node} lacks its input {name}"
    return value


def _lower_embed(low: Lowering, node: Node) -> None:
    table = _input(node, "table")
    assert isinstance(table.rows, int)
    block = 1 if low.fused else low.limits.tokens if low.few else PROMPT_BLOCK
    low.ops.append(
        Embed(low.state("tokens"), low.weight(table), low.work(node.output), low.state("counts"),
              table.rows, low.limits.tokens, table.cols, block)
    )  # fmt: skip


def _lower_norm(low: Lowering, node: Node) -> None:
    if low.folded(node.output):
        return
    x, gathers = _input(node, "x"), node.output.rows == OUTPUTS
    rows = low.rows(node.output)
    low.ops.append(
        Norm(low.home[x], low.weight(node.inputs["weight"]),
             low.state("output_rows") if gathers else NONE, low.work(node.output), low.state("counts"),
             low.rows(x), rows, x.cols, rows if rows <= FEW_TOKENS else PROMPT_BLOCK, node.attrs["eps"])
    )  # fmt: skip


def _lower_linear(low: Lowering, node: Node) -> None:
    if low.uses[node.output] == 1 and _consumer(low, node.output).op in ("add", "silu_mul"):
        return  # emitted with its only consumer
    nodes = _siblings(low, node)
    if node is not nodes[0]:
        return  # emitted with the first of them
    y, column = low.work([n.output for n in nodes]), 0
    for each in nodes:
        low.column[each.output] = column
        column += each.output.cols
    _emit_linear(low, nodes, y, STORE)


def _siblings(low: Lowering, node: Node) -> list[Node]:
    """The products of one input that are computed as one: q, k and v where hand-offs are dear."""
    if not low.fused or low.uses[node.output] != 1:
        return [node]
    if (consumer := _consumer(low, node.output)).op != "rope":
        return [node]
    nodes = [low.maker[_input(consumer, name)] for name in ("q", "k", "v")]
    biases = [n.inputs["bias"] for n in nodes]
    given = [b for b in biases if b is not None]
    weights = [_input(n, "w") for n in nodes]
    fit = len({_input(n, "x") for n in nodes}) == 1 and len(given) in (0, len(biases))
    return nodes if fit and low.joinable(weights) and low.joinable(given or weights) else [node]


def _lower_add(low: Lowering, node: Node) -> None:
    residual, product = _input(node, "x"), _input(node, "y")
    maker = low.maker[product]
    assert maker.op in ("linear", "experts") and low.uses[product] == 1, (
        f"{node}: the sum does not follow a product"
    )
    low.home[node.output] = low.home[residual]  # in place: the old residual is dead
    if maker.op == "experts":
        _emit_down(low, maker, low.home[residual])
    else:
        _emit_linear(low, [maker], low.home[residual], ADD)


def _check_sums(low: Lowering) -> None:
    """A sum takes the place of its residual, so nothing may read that afterwards, not even through a
    norm that is folded into its readers."""
    last = {v: i for i, n in enumerate(low.graph.nodes) for v in n.inputs.values() if v is not None}
    for i, node in enumerate(low.graph.nodes):
        if node.op == "add":
            residual = _input(node, "x")
            norms = [
                v for v, m in low.maker.items() if m.inputs.get("x") is residual and low.folded(v)
            ]
            late = [v for v in (residual, *norms) if last.get(v, 0) > i]
            assert not late, f"{node}: {late[0]} is still read after the sum"


def _lower_silu_mul(low: Lowering, node: Node) -> None:
    gate, up = low.maker[_input(node, "gate")], low.maker[_input(node, "up")]
    assert gate.op == up.op == "linear" and gate.inputs["x"] is up.inputs["x"], (
        f"{node}: not a gated pair"
    )
    _emit_linear(low, [gate], low.work(node.output, dtype=_stored(low, node.output)), GATE, up)


def _consumer(low: Lowering, value: Value) -> Node:
    return next(n for n in low.graph.nodes if value in n.inputs.values())


def _lower_route(low: Lowering, node: Node) -> None:
    logits, bias, rows = _input(node, "logits"), node.inputs["bias"], low.rows(node.output)
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
    x, route, gate, up, down = (_input(node, n) for n in ("x", "route", "gate", "up", "down"))
    norm, eps, source, rows = NONE, 0.0, x, low.rows(x)
    if low.folded(x):
        maker = low.maker[x]
        source, norm = _input(maker, "x"), low.weight(maker.inputs["weight"])
        eps = maker.attrs["eps"]
    n, k, row = down.cols, gate.cols, gate.parts[0]
    dtype, down_type = (low.dtypes.get(v.parts[0].name, DType.F32) for v in (gate, down))
    narrow = low.limits.tokens > 1 and _x_type(low, down.parts[0], down_type) is DType.BF16
    y = low.buffer(f"{node.output.name}.h", Kind.WORK, DType.BF16 if narrow else DType.F32, rows,
                   route.cols * n)  # fmt: skip
    low.home[node.output] = y
    low.ops.append(
        ExpertGate(low.home[source], low.bank(gate), low.bank(up), norm, low.chosen[route], y,
                   low.state("counts"), rows, k, n, len(gate.parts), route.cols,
                   tile_rows(low.machine, rows, k * dtype.bytes, 2), int(low.few), eps,
                   _x_type(low, row, dtype))
    )  # fmt: skip


def _emit_down(low: Lowering, node: Node, y: Buf) -> None:
    route, down = _input(node, "route"), _input(node, "down")
    rows, row = low.rows(node.output), down.parts[0]
    dtype = low.dtypes.get(row.name, DType.F32)
    tile = tile_rows(low.machine, rows, down.cols * dtype.bytes)
    if low.fused:
        # x of all chosen experts stays in registers, and a row of eight takes half as many of those as
        # one of sixteen. Tiles of several experts share a slot.
        tile = min(tile, 8)
    low.ops.append(
        ExpertDown(low.home[node.output], low.bank(down), low.chosen[route], low.home[route], y,
                   low.state("counts"), rows, down.cols, node.output.cols, len(down.parts), route.cols,
                   tile, _x_type(low, row, dtype))
    )  # fmt: skip


def _emit_linear(
    low: Lowering, nodes: list[Node], y: Buf, epilogue: int, up: Node | None = None
) -> None:
    """The product of one node, or of several with the same input whose outputs are side by side."""
    x, w = _input(nodes[0], "x"), [_input(node, "w") for node in nodes]
    biases = [b for node in nodes if (b := node.inputs["bias"]) is not None]
    norm, gather, eps, source = NONE, NONE, 0.0, x
    if low.folded(x):
        maker = low.maker[x]
        source, norm = _input(maker, "x"), low.weight(maker.inputs["weight"])
        eps = maker.attrs["eps"]
        gather = low.state("output_rows") if x.rows == OUTPUTS else NONE
    n, k = sum(v.rows for v in w if isinstance(v.rows, int)), w[0].cols
    rows, attend = low.rows(x), low.attends.get(x)
    shares = (attend.splits, attend.group, attend.head_dim) if attend else (1, 1, 1)
    dtype, matrices = low.dtypes.get(w[0].name, DType.F32), 2 if up else 1
    low.ops.append(
        Linear(low.home[source], low.joined(w), low.weight(up.inputs["w"]) if up else NONE,
               low.joined(biases) if biases else NONE, low.weight(up.inputs["bias"]) if up else NONE,
               norm, y, low.state("counts"), 1 if x.rows == OUTPUTS else 0, rows, k, n,
               0, tile_rows(low.machine, rows, k * dtype.bytes, matrices), epilogue, eps,
               gather, low.rows(source) if gather != NONE else 1, *shares,
               # What rounding moves across a border would send a token to another expert.
               DType.F32 if nodes[0].output in low.routing else _x_type(low, w[0], dtype))
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
    consumer = _consumer(low, value)
    if low.limits.tokens == 1 or consumer.op != "linear" or low.uses[value] > 1:
        return DType.F32
    w = _input(consumer, "w")
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
    q, k, v, table = (_input(node, name) for name in ("q", "k", "v", "table"))
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
    if low.fused:  # at least two, for what follows merges shares
        return max(2, machine.splits or min(MAX_SPLITS, machine.workers // kv_heads))
    return machine.splits or machine.workers // math.gcd(kv_heads, machine.workers)


def _lower_attend(low: Lowering, node: Node) -> None:
    rope, lim = low.maker[_input(node, "q")], low.limits
    assert rope.op == "rope", f"{node}: its queries are not rotated"
    q, k, v, table = (_input(rope, name) for name in ("q", "k", "v", "table"))
    layer, d, kv_heads = (int(node.attrs[name]) for name in ("layer", "head_dim", "kv_heads"))
    heads, splits = q.cols // d, _splits(low, kv_heads)
    window, width = int(node.attrs["window"]), heads * splits * (d + 2)
    one = lim.tokens == 1
    y = low.work(node.output, width if one else None, _stored(low, node.output))
    part = (
        y
        if one
        else low.buffer(f"{node.output.name}.part", Kind.WORK, DType.F32, lim.tokens, width)
    )
    op = Attend(
        low.home[q], low.home[k], low.home[v], low.weight(rope.inputs["q_norm"]),
        low.weight(rope.inputs["k_norm"]), low.weight(table), low.cache("k", layer, k.cols),
        low.cache("v", layer, v.cols), part, low.state("positions"), low.state("sequences"),
        low.state("pages"), low.state("counts"), lim.tokens, heads, kv_heads, d, window, splits,
        lim.context, lim.sequences, lim.pages, rope.attrs["eps"], node.attrs["scale"],
        low.column.get(k, 0), low.column.get(v, 0),
    )  # fmt: skip
    low.ops.append(op)
    if one:  # the product that follows merges the shares; for more tokens it would read too much
        low.attends[node.output] = op
    else:
        merged = Combine(part, y, op.counts, op.rows, heads, kv_heads, d, splits, window)
        low.ops.append(merged)


def _lower_attention(low: Lowering, node: Node) -> None:
    if low.fused:
        return _lower_attend(low, node)
    q, lim = _input(node, "q"), low.limits
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
    """Argmax of the logits; in steps of few tokens it also makes the next step ready."""
    rows, workers = low.limits.outputs, low.machine.workers
    chunk = -(-logits.cols // workers)
    chunks = -(-logits.cols // chunk)
    part = low.buffer("argmax", Kind.WORK, DType.F32, rows, 2 * chunks)
    low.ops.append(Argmax(low.home[logits], part, low.state("counts"), rows, logits.cols, chunk))
    feed = int(low.limits.tokens == low.limits.outputs)
    low.ops.append(
        NextToken(part, low.state("sampled"), low.state("tokens"), low.state("positions"),
                  low.state("counts"), rows, chunks, feed)
    )  # fmt: skip


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
             low.state("tokens"), low.state("positions"), vocab, chunk, chunks),
    ]  # fmt: skip


_LOWER = {
    "embed": _lower_embed,
    "rms_norm": _lower_norm,
    "linear": _lower_linear,
    "add": _lower_add,
    "silu_mul": _lower_silu_mul,
    "rope": _lower_rope,
    "attention": _lower_attention,
    "route": _lower_route,
    "experts": _lower_experts,
}
