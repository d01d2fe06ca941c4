"""The op graph of a model: values with checked shapes, nodes in execution order.

A model file builds one graph, whatever the machine and however many tokens a step has: the first
dimension of activations is the symbol TOKENS or OUTPUTS. Folding (a norm into the matrix product
that follows it, a sum into the one before) is the compiler's choice, not the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

TOKENS, OUTPUTS = "tokens", "outputs"


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A 2-D array in the graph. `weight` values are bound by name to tensors of the checkpoint.

    rows is TOKENS, OUTPUTS or, for a weight, a number. `shard` names the axis that is cut over
    devices (0 rows, 1 columns), None when every device holds the whole. `parts` are the matrices of a
    bank (one per expert), each a weight of its own, stacked in its rows.
    """

    name: str
    rows: int | str
    cols: int
    weight: bool = False
    shard: int | None = None
    parts: tuple[Value, ...] = ()

    def __str__(self) -> str:
        cut = "" if self.shard is None else f" shard={self.shard}"
        return f"{self.name}[{self.rows}, {self.cols}]{cut}"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One op: named inputs (None: absent), one output value, numbers."""

    op: str
    inputs: dict[str, Value | None]
    output: Value
    attrs: dict[str, float] = field(default_factory=dict[str, float])

    def __str__(self) -> str:
        inputs = ", ".join(f"{k}={v.name}" for k, v in self.inputs.items() if v is not None)
        attrs = "".join(f" {k}={v:g}" for k, v in self.attrs.items())
        return f"{self.output} = {self.op}({inputs}){attrs}"


@dataclass(slots=True)
class Graph:
    """Nodes in order; each method appends one and returns its output.

    `devices` share the model, and the graph is the part of one of them (models/shards.py: part_of); its
    products over cut columns are that device's share of a sum. `outputs` are the activations that the host
    reads after a step, besides the logits, which the last node makes.
    """

    name: str
    nodes: list[Node] = field(default_factory=list[Node])
    weights: dict[str, Value] = field(default_factory=dict[str, Value])
    outputs: list[Value] = field(default_factory=list[Value])
    devices: int = 1

    def weight(self, name: str, rows: int, cols: int, shard: int | None = None) -> Value:
        """The weight of that name; asking again must ask for the same shape."""
        value = self.weights.setdefault(name, Value(name, rows, cols, True, shard))
        assert (value.rows, value.cols) == (rows, cols), (
            f"{name} asked as {rows}x{cols}, is {value}"
        )
        return value

    def vector(self, name: str, cols: int) -> Value:
        """A one-dimensional weight, held as one row."""
        return self.weight(name, 1, cols)

    def bank(
        self, name: str, names: Sequence[str], rows: int, cols: int, shard: int | None = None
    ) -> Value:
        """Weights [rows, cols] of those names as one value, of which an op picks some at run time."""
        parts = tuple(self.weight(part, rows, cols, shard) for part in names)
        return Value(name, len(parts) * rows, cols, True, shard, parts)

    def _add(
        self,
        op: str,
        name: str,
        rows: int | str,
        cols: int,
        inputs: dict[str, Value | None],
        **attrs: float,
    ) -> Value:
        output = Value(name, rows, cols)
        self.nodes.append(Node(op, inputs, output, attrs))
        return output

    def embed(self, name: str, table: Value) -> Value:
        """Rows of `table` for the step's token ids."""
        return self._add("embed", name, TOKENS, table.cols, {"table": table})

    def given(self, name: str, cols: int) -> Value:
        """Numbers for each token of the step, which the host writes before it."""
        return self._add("given", name, TOKENS, cols, {})

    def rms_norm(
        self, name: str, x: Value, weight: Value, eps: float, *, gather: bool = False
    ) -> Value:
        """RMSNorm of x; with `gather` only of the rows whose logits are wanted."""
        assert x.cols == weight.cols, f"norm {name}: {x} with {weight}"
        rows = OUTPUTS if gather else x.rows
        return self._add("rms_norm", name, rows, x.cols, {"x": x, "weight": weight}, eps=eps)

    def linear(self, name: str, x: Value, w: Value, bias: Value | None = None) -> Value:
        """x @ w.T + bias; w [n, k]."""
        assert x.cols == w.cols and isinstance(w.rows, int), f"linear {name}: {x} with {w}"
        assert bias is None or bias.cols == w.rows, f"linear {name}: bias {bias} for {w}"
        return self._add("linear", name, x.rows, w.rows, {"x": x, "w": w, "bias": bias})

    def block_linear(self, name: str, x: Value, w: Value, groups: int, *, stride: int) -> Value:
        """Block-diagonal product: rows of `w` [n, k] are `groups` blocks, and block g is multiplied by
        columns [g * stride, + k) of x."""
        assert isinstance(w.rows, int) and w.rows % groups == 0, f"block_linear {name}: {w}"
        assert (groups - 1) * stride + w.cols <= x.cols, f"block_linear {name}: {x} with {w}"
        inputs: dict[str, Value | None] = {"x": x, "w": w, "bias": None}
        return self._add("linear", name, x.rows, w.rows, inputs, groups=groups, stride=stride)

    def silu_mul(self, name: str, gate: Value, up: Value) -> Value:
        """silu(gate) * up."""
        assert gate.cols == up.cols, f"silu_mul {name}: {gate} with {up}"
        return self._add("silu_mul", name, gate.rows, gate.cols, {"gate": gate, "up": up})

    def add(self, name: str, x: Value, y: Value) -> Value:
        """x + y."""
        assert x.cols == y.cols, f"add {name}: {x} with {y}"
        return self._add("add", name, x.rows, x.cols, {"x": x, "y": y})

    def rope(
        self, name: str, q: Value, k: Value, v: Value, table: Value, *, layer: int, head_dim: int,
        eps: float, q_norm: Value | None = None, k_norm: Value | None = None,
    ) -> Value:  # fmt: skip
        """Rotated (and normed) q; k and v of this step go into the caches of `layer`."""
        assert k.cols == v.cols and q.cols % k.cols == 0 and k.cols % head_dim == 0, f"rope {name}"
        inputs = {"q": q, "k": k, "v": v, "table": table, "q_norm": q_norm, "k_norm": k_norm}
        attrs = {"layer": layer, "head_dim": head_dim, "kv_heads": k.cols // head_dim, "eps": eps}
        return self._add("rope", name, q.rows, q.cols, inputs, **attrs)

    def attention(
        self,
        name: str,
        q: Value,
        *,
        layer: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
    ) -> Value:
        """Causal attention of q over the caches of `layer`; window 0 sees all of the past."""
        attrs = {
            "layer": layer,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "scale": scale,
            "window": window,
        }
        return self._add("attention", name, q.rows, q.cols, {"q": q}, **attrs)

    def latent_rope(
        self, name: str, q: Value, kv: Value, norm: Value, table: Value, *, layer: int, heads: int,
        nope: int, eps: float, interleave: bool,
    ) -> Value:  # fmt: skip
        """q with the last columns of each head rotated; normed latents and rotated keys of `kv` go into
        the latent cache of `layer`."""
        assert kv.cols == norm.cols + table.cols, f"latent_rope {name}: {kv} with {norm}, {table}"
        assert q.cols == heads * (nope + table.cols), f"latent_rope {name}: {q} of {heads} heads"
        inputs: dict[str, Value | None] = {"q": q, "kv": kv, "norm": norm, "table": table}
        attrs = {"layer": layer, "heads": heads, "nope": nope, "eps": eps, "interleave": interleave}
        return self._add("latent_rope", name, q.rows, q.cols, inputs, **attrs)

    def latent_attention(
        self, name: str, q: Value, rotated: Value, selected: Value | None, *, layer: int, heads: int,
        lora: int, nope: int, scale: float,
    ) -> Value:  # fmt: skip
        """Weighted sums of the latents of `layer`, one per head; of the selected positions, or of all."""
        assert q.cols == heads * lora and rotated.cols % heads == 0, f"latent_attention {name}: {q}"
        inputs = {"q": q, "rotated": rotated, "selected": selected}
        attrs = {"layer": layer, "heads": heads, "lora": lora, "nope": nope, "scale": scale}
        return self._add("latent_attention", name, q.rows, q.cols, inputs, **attrs)

    def index_rope(
        self, name: str, q: Value, k: Value, norm: Value, bias: Value, table: Value, *, layer: int,
        eps: float, interleave: bool,
    ) -> Value:  # fmt: skip
        """q as the indexer wants it; keys of this step, normed with `norm` and `bias`, go into its cache."""
        assert k.cols == norm.cols == bias.cols and q.cols % k.cols == 0, f"index_rope {name}: {k}"
        inputs: dict[str, Value | None] = {
            "q": q,
            "k": k,
            "norm": norm,
            "bias": bias,
            "table": table,
        }
        attrs = {"layer": layer, "eps": eps, "interleave": interleave}
        return self._add("index_rope", name, q.rows, q.cols, inputs, **attrs)

    def index_score(
        self, name: str, q: Value, weights: Value, *, layer: int, head_dim: int, topk: int,
        scale: float,
    ) -> Value:  # fmt: skip
        """Scores of all positions; the compiler knows how many columns that takes."""
        assert q.cols == weights.cols * head_dim, f"index_score {name}: {q} with {weights}"
        attrs = {"layer": layer, "head_dim": head_dim, "topk": topk, "scale": scale}
        return self._add("index_score", name, q.rows, 1, {"q": q, "weights": weights}, **attrs)

    def select(self, name: str, scores: Value, topk: int) -> Value:
        """The topk positions with the largest scores, as integers."""
        return self._add("select", name, scores.rows, topk, {"scores": scores}, topk=topk)

    def route(
        self, name: str, logits: Value, bias: Value | None, *, top_k: int, n_group: int = 1,
        topk_group: int = 1, sigmoid: bool = False, norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
    ) -> Value:  # fmt: skip
        """Weights [tokens, top_k] of the experts that the logits choose; see ops/experts.py: Route."""
        assert bias is None or bias.cols == logits.cols, f"route {name}: {bias} with {logits}"
        assert logits.cols % n_group == 0 and top_k <= topk_group * (logits.cols // n_group), (
            f"route {name}: {top_k} of {topk_group} of {n_group} groups of {logits}"
        )
        attrs = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group, "sigmoid": sigmoid,
                 "norm_topk_prob": norm_topk_prob,
                 "routed_scaling_factor": routed_scaling_factor}  # fmt: skip
        inputs = {"logits": logits, "bias": bias}
        return self._add("route", name, logits.rows, top_k, inputs, **attrs)

    def experts(
        self, name: str, x: Value, route: Value, gate: Value, up: Value, down: Value
    ) -> Value:
        """Sum over what `route` has chosen of weight * down @ (silu(gate @ x) * (up @ x)).

        gate, up and down are banks with a matrix for each expert; what is made is added to a residual.
        """
        assert x.cols == gate.cols == up.cols and gate.rows == up.rows, (
            f"experts {name}: {gate}, {up}"
        )
        assert len(gate.parts) == len(up.parts) == len(down.parts), f"experts {name}: three banks"
        assert gate.rows == len(gate.parts) * down.cols, f"experts {name}: {gate} into {down}"
        width = down.parts[0].rows
        assert isinstance(width, int)
        inputs: dict[str, Value | None] = {
            "x": x, "route": route, "gate": gate, "up": up, "down": down,
        }  # fmt: skip
        return self._add("experts", name, x.rows, width, inputs)

    def __str__(self) -> str:
        return f"graph {self.name}\n" + "".join(f"  {node}\n" for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Speculation:
    """A model and the layer that guesses its next tokens (models/mtp.py), to be one program: a step takes
    the last token and `drafts` guesses for those that follow, says how many were right, and guesses anew.

    model: with its hidden states as its output; layer: takes such as `given`, and has as its output those
    for the next guess.
    """

    model: Graph
    layer: Graph
    drafts: int

    @property
    def outputs(self) -> list[Value]:
        """None: the host needs nothing of a step but its tokens."""
        return []
