"""Mixtures of experts: their settings in config.json, and their part of the op graph.

Families differ in what they call things and in how the router scores; ExpertsRules says so. Formulas
follow transformers' modeling_qwen3_moe.py, modeling_qwen2_moe.py, modeling_mixtral.py and
modeling_deepseek_v3.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilert.errors import UserError
from tilert.ir.graph import Graph, Value
from tilert.models.section import Section

MAX_EXPERTS = 1 << 12
MAX_WIDTH = 1 << 20


@dataclass(frozen=True, slots=True)
class ExpertsRules:
    """What a family calls its keys and tensors, and how its router scores.

    `matrices` are gate, up and down of each expert. shared: of the expert that every token takes, None
    for none; `shared_gate`: its share is the sigmoid of one more logit. norm_topk_prob None: the key of
    that name decides.
    """

    prefix: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    count: tuple[str, ...] = ("num_experts", "num_local_experts")  # two names of one key
    width: str = "moe_intermediate_size"
    shared: str | None = None
    shared_gate: bool = False
    sigmoid: bool = False  # of logits; chosen with e_score_correction_bias
    norm_topk_prob: bool | None = None


QWEN3 = ExpertsRules()
QWEN2 = ExpertsRules(shared="shared_expert", shared_gate=True)
MIXTRAL = ExpertsRules(
    prefix="block_sparse_moe", matrices=("w1", "w3", "w2"), count=("num_local_experts", "num_experts"),
    width="intermediate_size", norm_topk_prob=True,
)  # fmt: skip
DEEPSEEK = ExpertsRules(
    count=("n_routed_experts", "num_experts"), shared="shared_experts", sigmoid=True
)


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Settings under their names in transformers; sizes in elements."""

    rules: ExpertsRules
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    sparse: tuple[bool, ...]  # by layer: it has experts, and no MLP
    norm_topk_prob: bool
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    shared_intermediate_size: int = 0  # 0: there is no shared expert


def parse(section: Section, rules: ExpertsRules, layers: int) -> ExpertsConfig:
    """The settings of a section whose keys are known and have their defaults.

    Raises UserError for a value of the wrong type or out of range, or that does not fit another.
    """
    stated = [key for key in rules.count if section.values.get(key) is not None]
    if not stated:
        raise UserError(f"{section.name} lacks {rules.count[0]}, the number of experts")
    experts = section.integer(stated[0], 1, MAX_EXPERTS)
    if len(stated) > 1:
        section.agree(stated[0], experts, stated[1], section.integer(stated[1], 1, MAX_EXPERTS))
    n_group, topk_group = _groups(section, experts)
    most = topk_group * (experts // n_group)
    width = section.integer(rules.width, 1, MAX_WIDTH)
    norm = rules.norm_topk_prob
    factor = 1.0
    if "routed_scaling_factor" in section.values:
        factor = section.number("routed_scaling_factor", 1e-6, 1e6)
    return ExpertsConfig(
        rules=rules,
        num_experts=experts,
        num_experts_per_tok=section.integer("num_experts_per_tok", 1, most),
        moe_intermediate_size=width,
        sparse=_sparse(section, layers),
        norm_topk_prob=section.boolean("norm_topk_prob") if norm is None else norm,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=factor,
        shared_intermediate_size=_shared(section, rules, width),
    )


def _groups(section: Section, experts: int) -> tuple[int, int]:
    """(n_group, topk_group)."""
    if section.values.get("n_group") is None:
        return 1, 1
    n_group = section.integer("n_group", 1, experts)
    if experts % n_group or (
        n_group > 1 and experts // n_group < 2
    ):  # a group's best two are summed
        raise section.error(
            "n_group", f"accepted are divisors of the {experts} experts into groups of two or more"
        )
    return n_group, section.integer("topk_group", 1, n_group)


def _sparse(section: Section, layers: int) -> tuple[bool, ...]:
    """Which layers have experts."""
    if section.values.get("mlp_layer_types") is not None:
        return _stated(section, layers)
    first, step, dense = 0, 1, list[int]()
    if section.values.get("first_k_dense_replace") is not None:
        first = section.integer("first_k_dense_replace", 0, 1 << 12)
    if "decoder_sparse_step" in section.values:
        step = section.integer("decoder_sparse_step", 1, 1 << 12)
    if section.values.get("mlp_only_layers") is not None:
        dense = section.values["mlp_only_layers"]
        if not isinstance(dense, list) or any(type(n) is not int or n < 0 for n in dense):
            raise section.error("mlp_only_layers", "accepted are lists of numbers of layers")
    return tuple(
        layer >= first and (layer + 1) % step == 0 and layer not in dense for layer in range(layers)
    )


def _stated(section: Section, layers: int) -> tuple[bool, ...]:
    """What mlp_layer_types says of each layer; it is asked before all other keys."""
    types = section.values["mlp_layer_types"]
    if not isinstance(types, list) or any(entry not in ("dense", "sparse") for entry in types):
        raise section.error("mlp_layer_types", "accepted are lists of dense and sparse")
    if len(types) != layers:
        raise UserError(
            f"{section.name} has {len(types)} mlp_layer_types; accepted is one for each of the {layers}"
            " num_hidden_layers"
        )
    return tuple(entry == "sparse" for entry in types)


def _shared(section: Section, rules: ExpertsRules, width: int) -> int:
    """Columns of the shared expert."""
    if rules.shared is None:
        return 0
    if rules.shared_gate:
        return section.integer("shared_expert_intermediate_size", 1, MAX_WIDTH)
    if section.values.get("n_shared_experts") is None:
        return 0
    return width * section.integer("n_shared_experts", 0, MAX_EXPERTS)


def block(graph: Graph, experts: ExpertsConfig, layer: int, x: Value, normed: Value) -> Value:
    """The residual x with what the experts of a layer make of `normed` added to it.

    What needs no choice stands after the router, so that it is at hand while the router decides. So does
    its sum with x, of which the experts still read the old.
    """
    prefix, rules = f"model.layers.{layer}.{experts.rules.prefix}", experts.rules
    count, width = experts.num_experts, experts.moe_intermediate_size
    gate = graph.weight(f"{prefix}.gate.weight", count, x.cols)
    logits = graph.linear(f"l{layer}.router", normed, gate)
    bias = graph.vector(f"{prefix}.gate.e_score_correction_bias", count) if rules.sigmoid else None
    route = graph.route(
        f"l{layer}.route", logits, bias, top_k=experts.num_experts_per_tok, n_group=experts.n_group,
        topk_group=experts.topk_group, sigmoid=rules.sigmoid, norm_topk_prob=experts.norm_topk_prob,
        routed_scaling_factor=experts.routed_scaling_factor,
    )  # fmt: skip
    shared = None
    if experts.shared_intermediate_size and rules.shared_gate:
        shared = _gated_shared(graph, experts, layer, prefix, normed)
    elif experts.shared_intermediate_size:
        shared = _plain_shared(graph, experts, layer, prefix, normed)
        x = graph.add(f"l{layer}.x_shared", x, shared)
    each = [f"{prefix}.experts.{i}" for i in range(count)]
    mixed = _mixture(graph, rules, f"l{layer}.experts", each, width, normed, route)
    if shared is not None and rules.shared_gate:  # only now: the experts have read x
        x = graph.add(f"l{layer}.x_shared", x, shared)
    return graph.add(f"l{layer}.x_mlp", x, mixed)


def _mixture(
    graph: Graph, rules: ExpertsRules, name: str, each: list[str], width: int, x: Value, route: Value
) -> Value:  # fmt: skip
    """The weighted sum over the chosen ones of the experts whose tensors begin with `each`."""
    shapes = ((width, x.cols, 0), (width, x.cols, 0), (x.cols, width, 1))
    gate, up, down = (
        graph.bank(f"{name}.{matrix}", [f"{e}.{matrix}.weight" for e in each], *shape)
        for matrix, shape in zip(rules.matrices, shapes, strict=True)
    )
    return graph.experts(name, x, route, gate, up, down)


def _plain_shared(graph: Graph, experts: ExpertsConfig, layer: int, prefix: str, x: Value) -> Value:
    """What an expert that all tokens take whole makes of x."""
    rows, name = experts.shared_intermediate_size, f"{prefix}.{experts.rules.shared}"
    gate, up = (
        graph.linear(
            f"l{layer}.shared_{n}", x, graph.weight(f"{name}.{n}_proj.weight", rows, x.cols, 0)
        )
        for n in ("gate", "up")
    )
    mixed = graph.silu_mul(f"l{layer}.shared", gate, up)
    down = graph.weight(f"{name}.down_proj.weight", x.cols, rows, 1)
    return graph.linear(f"l{layer}.shared_down", mixed, down)


def _gated_shared(graph: Graph, experts: ExpertsConfig, layer: int, prefix: str, x: Value) -> Value:
    """An expert that all tokens take to the share that the sigmoid of a logit says: a mixture of one."""
    name = f"{prefix}.{experts.rules.shared}"
    logit = graph.linear(f"l{layer}.share", x, graph.weight(f"{name}_gate.weight", 1, x.cols))
    route = graph.route(f"l{layer}.shared_route", logit, None, top_k=1, sigmoid=True)
    width = experts.shared_intermediate_size
    return _mixture(graph, experts.rules, f"l{layer}.shared", [name], width, x, route)
