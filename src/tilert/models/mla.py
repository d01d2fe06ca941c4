"""The graph of multi-head latent attention, with the indexer of sparse attention where a family has it.

Weights are absorbed: queries become latents before attention, and latents become values after it, so the
cache holds one latent per position and no heads. Formulas follow transformers' modeling_deepseek_v3.py,
modeling_deepseek_v32.py and modeling_glm_moe_dsa.py.
"""

from __future__ import annotations

import math

from tilert.ir.graph import Graph, Value
from tilert.models.blocks import project
from tilert.models.config import DecoderConfig
from tilert.models.derived import ROPE_TABLE, key_part, value_part
from tilert.models.latent import IndexConfig, LatentConfig

_EPS = 1e-6  # of the norms inside attention, whatever rms_norm_eps says


def attention_scale(config: DecoderConfig, latent: LatentConfig) -> float:
    """What scores are multiplied by: qk_head_dim^-0.5, and yarn's mscale_all_dim squared."""
    scale, rope = latent.qk_head_dim**-0.5, config.rope_scaling
    if rope.mscale_all_dim and rope.factor and rope.factor > 1:
        mscale = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
        scale *= mscale * mscale
    return scale


def latent_block(
    graph: Graph, config: DecoderConfig, layer: int, x: Value, context: int,
    selected: Value | None,
) -> tuple[Value, Value | None]:  # fmt: skip
    """(residual after attention, positions that the layer's queries see; None: all).

    selected: what the layer before has chosen, for layers without an indexer of their own.
    """
    latent = config.latent
    assert latent is not None, f"{config.model_type} has no latent attention"
    # Latents and what is selected are the same for all heads, so every device makes them whole.
    prefix, at = f"model.layers.{layer}.self_attn", f"l{layer}"
    heads, lora = config.num_attention_heads, latent.kv_lora_rank
    weight = graph.vector(f"model.layers.{layer}.input_layernorm.weight", config.hidden_size)
    normed = graph.rms_norm(f"{at}.attn_in", x, weight, config.rms_norm_eps)
    source = normed
    if latent.q_lora_rank is not None:
        down = project(graph, f"{prefix}.q_a_proj", normed, latent.q_lora_rank,
                       bias=config.qkv_bias, shard=None, name=f"{at}.q_down")  # fmt: skip
        norm = graph.vector(f"{prefix}.q_a_layernorm.weight", latent.q_lora_rank)
        source = graph.rms_norm(f"{at}.q_latent", down, norm, _EPS)
    kv = project(graph, f"{prefix}.kv_a_proj_with_mqa", normed, latent.cache_width,
                 bias=config.qkv_bias, shard=None, name=f"{at}.kv")  # fmt: skip
    indexed = latent.index if latent.index and latent.index.full[layer] else None
    keys = _index_keys(graph, f"{prefix}.indexer", layer, normed, indexed) if indexed else None
    name = "q_proj" if latent.q_lora_rank is None else "q_b_proj"
    q = project(graph, f"{prefix}.{name}", source, heads * latent.qk_head_dim, bias=False, shard=0,
                name=f"{at}.q")  # fmt: skip
    table = graph.weight(ROPE_TABLE, context, latent.qk_rope_head_dim)
    # The cache's rows first: they wait for nothing of what follows.
    rotated = graph.latent_rope(
        f"{at}.q_rope", q, kv, graph.vector(f"{prefix}.kv_a_layernorm.weight", lora), table,
        layer=layer, heads=heads, nope=latent.qk_nope_head_dim, eps=_EPS,
        interleave=latent.rope_interleave,
    )  # fmt: skip
    scores: Value | None = None
    if indexed and keys:
        scores = _scores(graph, f"{prefix}.indexer", layer, source, keys, table, indexed)
    up = graph.weight(key_part(layer), heads * lora, latent.qk_nope_head_dim, 0)
    q_latent = graph.block_linear(f"{at}.q_up", q, up, heads, stride=latent.qk_head_dim)
    if scores and indexed:  # after what does not wait for the scores
        selected = graph.select(f"{at}.selected", scores, indexed.index_topk)
    mixed = graph.latent_attention(
        f"{at}.attn", q_latent, rotated, selected, layer=layer, heads=heads, lora=lora,
        nope=latent.qk_nope_head_dim, scale=attention_scale(config, latent),
    )  # fmt: skip
    down = graph.weight(value_part(layer), heads * latent.v_head_dim, lora, 0)
    values = graph.block_linear(f"{at}.v", mixed, down, heads, stride=lora)
    out = project(graph, f"{prefix}.o_proj", values, config.hidden_size, bias=config.o_bias,
                  shard=1, name=f"{at}.o")  # fmt: skip
    return graph.add(f"{at}.x_attn", x, out), selected


def _index_keys(
    graph: Graph, prefix: str, layer: int, normed: Value, index: IndexConfig
) -> tuple[Value, Value]:
    """(the step's keys, weights of the query heads), both made from the hidden state."""
    k = project(graph, f"{prefix}.wk", normed, index.index_head_dim, bias=False, shard=None,
                name=f"l{layer}.index_k")  # fmt: skip
    weights = project(graph, f"{prefix}.weights_proj", normed, index.index_n_heads, bias=False,
                      shard=None, name=f"l{layer}.index_w")  # fmt: skip
    return k, weights


def _scores(
    graph: Graph, prefix: str, layer: int, latent: Value, keys: tuple[Value, Value], table: Value,
    index: IndexConfig,
) -> Value:  # fmt: skip
    """The indexer's score of every position, for the step's tokens; their keys join its cache."""
    (k, weights), (heads, d) = keys, (index.index_n_heads, index.index_head_dim)
    q = project(graph, f"{prefix}.wq_b", latent, heads * d, bias=False, shard=None,
                name=f"l{layer}.index_q")  # fmt: skip
    norm, bias = (graph.vector(f"{prefix}.k_norm.{name}", d) for name in ("weight", "bias"))
    q = graph.index_rope(f"l{layer}.index_rope", q, k, norm, bias, table, layer=layer, eps=_EPS,
                         interleave=index.interleave)  # fmt: skip
    return graph.index_score(
        f"l{layer}.index", q, weights, layer=layer, head_dim=d, topk=index.index_topk,
        scale=(d * heads) ** -0.5,
    )  # fmt: skip
