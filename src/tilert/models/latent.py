"""Settings of multi-head latent attention and of the indexer of sparse attention, read strictly.

Meanings and defaults are those of transformers' deepseek_v3, deepseek_v32 and glm_moe_dsa. Knows no
graph; what differs between the families stands in their own files as LatentRules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilert.errors import UserError
from tilert.models.section import Section

_MAX_HEAD = 1 << 12
_SIZES = {"kv_lora_rank": 1 << 16, "qk_nope_head_dim": _MAX_HEAD, "qk_rope_head_dim": _MAX_HEAD,
          "v_head_dim": _MAX_HEAD}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LatentRules:
    """What differs between families with latent attention.

    indexed: layers have an indexer. index_interleave: it rotates neighbours, not halves. shared: a
    layer may reuse the positions that the layer before it has selected.
    """

    indexed: bool
    index_interleave: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """The indexer; `full` says of each layer whether it has one of its own."""

    index_n_heads: int
    index_head_dim: int
    index_topk: int
    interleave: bool
    full: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Sizes in elements; q_lora_rank None: queries are made from the hidden state by one product."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool
    num_nextn_predict_layers: int  # layers after the last one that guess further tokens
    index: IndexConfig | None

    @property
    def qk_head_dim(self) -> int:
        """Columns of a query head: without position, then rotated."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Elements of a row of a layer's cache: the latent, then the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def defaults(rules: LatentRules) -> Mapping[str, Any]:
    """The keys that `parse` reads, with the value where config.json is silent."""
    keys: dict[str, Any] = {
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_head_dim": None,  # like head_dim, computed from the others whatever it says
        "rope_interleave": True,
        "num_nextn_predict_layers": 1,
    }
    if rules.indexed:
        keys |= {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
                 "indexer_rope_interleave": None}  # fmt: skip
    if rules.shared:
        keys |= {"indexer_types": None, "index_topk_pattern": None, "index_topk_freq": 1,
                 "index_skip_topk_offset": 2}  # fmt: skip
    return keys


def parse(section: Section, rules: LatentRules) -> LatentConfig:
    """The checked settings. Raises UserError for what is out of range or not computed."""
    sizes = {key: section.integer(key, 1, limit) for key, limit in _SIZES.items()}
    if sizes["qk_rope_head_dim"] % 2:
        raise section.error("qk_rope_head_dim", "accepted are even sizes")
    q_rank = None
    if section.values["q_lora_rank"] is not None:
        q_rank = section.integer("q_lora_rank", 1, 1 << 16)
    elif rules.indexed:
        raise section.error("q_lora_rank", "accepted are whole numbers, for the indexer reads it")
    heads = section.values["num_attention_heads"]
    section.one_of("num_key_value_heads", (heads, None))
    if rules.indexed:
        section.one_of("rope_interleave", (True, None))
    elif section.values["rope_interleave"] is not None:
        section.boolean("rope_interleave")
    extra = 0
    if section.values["num_nextn_predict_layers"] is not None:
        extra = section.integer("num_nextn_predict_layers", 0, 64)
    return LatentConfig(
        q_lora_rank=q_rank,
        **sizes,
        rope_interleave=section.values["rope_interleave"] is not False,
        num_nextn_predict_layers=extra,
        index=_index(section, rules, sizes["qk_rope_head_dim"]) if rules.indexed else None,
    )


def layer_types(rules: LatentRules) -> tuple[str, ...]:
    """What `layer_types` may call every layer of such a family: new names and old ones of transformers."""
    if rules.indexed:
        return "indexed_attention", "deepseek_sparse_attention"
    return ("full_attention",)


def _index(section: Section, rules: LatentRules, rope: int) -> IndexConfig:
    dim = section.integer("index_head_dim", 1, _MAX_HEAD)
    if dim & (dim - 1) or dim < rope:
        raise section.error(
            "index_head_dim", f"accepted are powers of two from qk_rope_head_dim, {rope}, on"
        )
    section.one_of("indexer_rope_interleave", (rules.index_interleave, None))
    layers = section.values["num_hidden_layers"]
    return IndexConfig(
        index_n_heads=section.integer("index_n_heads", 1, _MAX_HEAD),
        index_head_dim=dim,
        index_topk=section.integer("index_topk", 1, 1 << 20),
        interleave=rules.index_interleave,
        full=_full(section, layers) if rules.shared else (True,) * layers,
    )


def _full(section: Section, layers: int) -> tuple[bool, ...]:
    """Which layers have an indexer: stated by name, by letter, or one of every `index_topk_freq`."""
    names = {"full": True, "shared": False, "F": True, "S": False}
    for key in ("indexer_types", "index_topk_pattern"):
        stated = section.values[key]
        if stated is None:
            continue
        if not isinstance(stated, list | str) or any(entry not in names for entry in stated):
            raise section.error(
                key, "accepted are lists of full and shared, or of the letters F and S"
            )
        if len(stated) != layers:
            raise UserError(
                f"{section.name} has {len(stated)} {key}; accepted is one for each of the {layers}"
                " num_hidden_layers"
            )
        if not names[stated[0]]:
            raise section.error(key, "accepted is full in the first layer")
        return tuple(names[entry] for entry in stated)
    every = max(section.integer("index_topk_freq", 0, layers), 1)
    offset = section.integer("index_skip_topk_offset", 0, layers)
    return tuple(max(layer - offset + 1, 0) % every == 0 for layer in range(layers))
