"""The state of lowering: tables under construction, and which value lives in which buffer."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tilert.ir.dtype import DType
from tilert.ir.graph import OUTPUTS, Graph, Node, Value
from tilert.ir.machine import Machine
from tilert.ir.program import JOIN, NONE, PAGE, Buf, Buffer, Kind, Op, Scale

FEW_TOKENS = 8  # up to this many tokens a step is bound by reading weights
MAX_SPLITS = 8  # that the rule takes: a product merges their partial results
PROMPT_BLOCK = 32  # tokens per tile of row-wise ops and of attention in steps of many tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """Capacities of one program (see Program), and how it chooses tokens: the best, or sampled; of sampled
    ones it may report log-probabilities."""

    tokens: int
    outputs: int
    sequences: int
    context: int
    sampled: bool = False
    logprobs: bool = False

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
    place: dict[Node, int] = field(default_factory=dict[Node, int])  # in the graph
    chosen: dict[Value, Buf] = field(default_factory=dict[Value, Buf])  # by the output of a route
    routing: set[Value | None] = field(
        default_factory=set[Value | None]
    )  # logits that choose experts
    readers: dict[Value, list[Node]] = field(default_factory=dict[Value, list[Node]])
    # Of a pass over a layer that guesses, in a program with other passes: what stands before the names of
    # its activations, where it finds what the host gives elsewhere, and the states that are its own.
    scope: str = ""
    given: Buf = NONE
    states: dict[str, Buf] = field(default_factory=dict[str, Buf])

    def __post_init__(self) -> None:
        nodes = self.graph.nodes
        self.uses.update(v for node in nodes for v in node.inputs.values() if v is not None)
        self.maker.update({node.output: node for node in nodes})
        self.place.update({node: i for i, node in enumerate(nodes)})
        for node in nodes:
            for value in node.inputs.values():
                if value is not None:
                    self.readers.setdefault(value, []).append(node)
        self.routing.update(node.inputs["logits"] for node in nodes if node.op == "route")

    @property
    def fused(self) -> bool:
        """True when rotation and attention are one op."""
        return self.few and self.machine.slots > 0

    @property
    def few(self) -> bool:
        """True when the step has so few tokens that reading weights decides its time."""
        return self.limits.tokens <= FEW_TOKENS

    def buffer(self, name: str, kind: Kind, dtype: DType, rows: int, cols: int) -> Buf:
        """The buffer of that name, made at the first call."""
        if kind is Kind.WORK:
            name = self.scope + name
        if name not in self.ids:
            self.ids[name] = Buf(len(self.buffers))
            self.buffers.append(Buffer(name, kind, dtype, rows, cols))
        return self.ids[name]

    def state(self, name: str) -> Buf:
        """A buffer that the host writes before a launch, or the pass before."""
        if name in self.states:
            return self.states[name]
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
        first = value.parts[0]
        assert all(self.alike(first, v) for v in value.parts), f"matrices of {value} differ in type"
        buf = self.joined(list(value.parts))
        self.buffers[buf] = replace(self.buffers[buf], bank=len(value.parts))
        return buf

    def alike(self, a: Value, b: Value) -> bool:
        """True when two weights have one element type and blocks of scales of one shape."""
        first, second = self.scales.get(a.name), self.scales.get(b.name)
        blocks = first.block if first else None, second.block if second else None
        types = [self.dtypes.get(v.name, DType.F32) for v in (a, b)]
        return blocks[0] == blocks[1] and types[0] == types[1]

    def joinable(self, values: list[Value]) -> bool:
        """True when the weights have one type, and scales whose blocks do not reach across a border."""
        if not all(self.alike(values[0], v) for v in values):
            return False
        scale = self.scales.get(values[0].name)
        rows = [v.rows for v in values[:-1] if isinstance(v.rows, int)]
        return scale is None or all(r % scale.block[0] == 0 for r in rows)

    def cache(self, kind: str, layer: int, cols: int, dtype: DType | None = None) -> Buf:
        """A cache of a layer, of the machine's type for keys and values unless another is given."""
        dtype = self.machine.cache_dtype if dtype is None else dtype
        name = f"layers.{layer}.{kind}_cache"
        return self.buffer(name, Kind.CACHE, dtype, self.limits.context, cols)

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
        if node is None or node.op != "rms_norm" or not self.few or value in self.graph.outputs:
            return False
        return value.rows != OUTPUTS or self.fused


def operand(node: Node, name: str) -> Value:
    """An input that the node must have."""
    value = node.inputs[name]
    assert value is not None, f"{node} lacks its input {name}"
    return value
