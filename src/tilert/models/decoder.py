"""The op graph shared by the decoder families.

Their files hold what differs (which config keys, defaults, biases, norms of q and k); the graph
reads it from DecoderConfig. Formulas follow transformers' modeling_llama.py and its siblings.
"""

from __future__ import annotations

from tilert.ir.graph import Graph, Value
from tilert.models import experts
from tilert.models.blocks import project
from tilert.models.config import DecoderConfig
from tilert.models.derived import ROPE_TABLE
from tilert.models.mla import latent_block


def build(config: DecoderConfig, context: int, *, hidden: bool = False) -> Graph:
    """The graph of a model whose sequences have at most `context` positions.

    hidden: the hidden states [tokens, hidden_size] after the last norm are an output of that name.
    """
    graph = Graph(config.model_type)
    width, vocab = config.hidden_size, config.vocab_size
    table = graph.weight("model.embed_tokens.weight", vocab, width)
    x = graph.embed("embed", table)
    selected: Value | None = None
    for layer in range(config.num_hidden_layers):
        if config.latent:
            x, selected = latent_block(graph, config, layer, x, context, selected)
        else:
            x = _attention_block(graph, config, layer, x, context)
        x = mlp_block(graph, config, layer, x)
    norm = graph.vector("model.norm.weight", width)
    if hidden:
        graph.outputs.append(graph.rms_norm("hidden", x, norm, config.rms_norm_eps))
    last = graph.rms_norm("final", x, norm, config.rms_norm_eps, gather=True)
    head = table if config.tie_word_embeddings else graph.weight("lm_head.weight", vocab, width, 0)
    graph.linear("logits", last, head)
    return graph


def _attention_block(
    graph: Graph, config: DecoderConfig, layer: int, x: Value, context: int
) -> Value:
    prefix, d = f"model.layers.{layer}.self_attn", config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weight = graph.vector(f"model.layers.{layer}.input_layernorm.weight", config.hidden_size)
    normed = graph.rms_norm(f"l{layer}.attn_in", x, weight, config.rms_norm_eps)
    bias = config.qkv_bias
    q = project(
        graph, f"{prefix}.q_proj", normed, heads * d, bias=bias, shard=0, name=f"l{layer}.q"
    )
    k = project(
        graph, f"{prefix}.k_proj", normed, kv_heads * d, bias=bias, shard=0, name=f"l{layer}.k"
    )
    v = project(
        graph, f"{prefix}.v_proj", normed, kv_heads * d, bias=bias, shard=0, name=f"l{layer}.v"
    )
    q_norm = graph.vector(f"{prefix}.q_norm.weight", d) if config.qk_norm else None
    k_norm = graph.vector(f"{prefix}.k_norm.weight", d) if config.qk_norm else None
    q = graph.rope(
        f"l{layer}.q_rope", q, k, v, graph.weight(ROPE_TABLE, context, d), layer=layer, head_dim=d,
        eps=config.rms_norm_eps, q_norm=q_norm, k_norm=k_norm,
    )  # fmt: skip
    sliding = config.layer_types[layer] == "sliding_attention"
    window = config.sliding_window if sliding and config.sliding_window else 0
    mixed = graph.attention(
        f"l{layer}.attn",
        q,
        layer=layer,
        kv_heads=kv_heads,
        head_dim=d,
        scale=d**-0.5,
        window=window,
    )
    out = project(
        graph,
        f"{prefix}.o_proj",
        mixed,
        config.hidden_size,
        bias=config.o_bias,
        shard=1,
        name=f"l{layer}.o",
    )
    return graph.add(f"l{layer}.x_attn", x, out)


def mlp_block(graph: Graph, config: DecoderConfig, layer: int, x: Value) -> Value:
    """The residual x with what the MLP or the experts of a layer add to it."""
    prefix, width, bias = f"model.layers.{layer}.mlp", config.intermediate_size, config.mlp_bias
    weight = graph.vector(
        f"model.layers.{layer}.post_attention_layernorm.weight", config.hidden_size
    )
    normed = graph.rms_norm(f"l{layer}.mlp_in", x, weight, config.rms_norm_eps)
    if config.experts and config.experts.sparse[layer]:
        return experts.block(graph, config.experts, layer, x, normed)
    gate = project(
        graph, f"{prefix}.gate_proj", normed, width, bias=bias, shard=0, name=f"l{layer}.gate"
    )
    up = project(graph, f"{prefix}.up_proj", normed, width, bias=bias, shard=0, name=f"l{layer}.up")
    mixed = graph.silu_mul(f"l{layer}.mlp", gate, up)
    down = project(
        graph,
        f"{prefix}.down_proj",
        mixed,
        config.hidden_size,
        bias=bias,
        shard=1,
        name=f"l{layer}.down",
    )
    return graph.add(f"l{layer}.x_mlp", x, down)
