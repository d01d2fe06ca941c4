"""Multi-token prediction: the layer behind a model's last one, which guesses the token after the next.

Formulas: DeepSeek-V3 Technical Report (https://arxiv.org/abs/2412.19437), section 2.2, with the order of
eh_proj's columns as vLLM's deepseek_mtp.py and SGLang's deepseek_nextn.py read it. At position i the layer
takes the token at i + 1 and the hidden state at i: the model's after its last norm, or, for the second and
later guesses, the layer's own after shared_head.norm (as SGLang does; vLLM takes it before that norm). Of
several such layers the first makes all guesses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from tilert.ir.graph import Graph, Value
from tilert.models.config import DecoderConfig
from tilert.models.decoder import mlp_block
from tilert.models.derived import embedding_part, hidden_part
from tilert.models.load import guessing_layers
from tilert.models.mla import latent_block

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def layer_tensors(
    config: DecoderConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors that the layer can use: its own, and the model's embedding and head where it has none
    of its own. Empty when the checkpoint has no such layer."""
    prefixes = guessing_layers(config)[:1]
    own = {name: array for name, array in tensors.items() if prefixes and name.startswith(prefixes)}
    if not own:
        return {}
    shared = {_embedding(config, own), _head(config, own)} & tensors.keys()
    return own | {name: tensors[name] for name in shared}


def extended(config: DecoderConfig) -> DecoderConfig:
    """The settings of the model with the layer as its last: with experts as the one before has them, and,
    in a model with indexers, with an indexer of its own."""
    latent, experts = config.latent, config.experts
    assert latent is not None, f"{config.model_type} has no layer that guesses"
    if latent.index:
        latent = replace(latent, index=replace(latent.index, full=(*latent.index.full, True)))
    if experts:
        experts = replace(experts, sparse=(*experts.sparse, experts.sparse[-1]))
    return replace(config, num_hidden_layers=config.num_hidden_layers + 1, latent=latent,
                   experts=experts)  # fmt: skip


def build(config: DecoderConfig, context: int, names: Collection[str]) -> Graph:
    """The graph of the layer: token ids and the input `given` [tokens, hidden_size] to logits and `hidden`,
    what `given` is for the next guess. names: of the tensors that the checkpoint has."""
    layer, width, eps = config.num_hidden_layers, config.hidden_size, config.rms_norm_eps
    prefix, graph = f"model.layers.{layer}", Graph(f"{config.model_type}.mtp")

    def normed(name: str, x: Value, weight: str) -> Value:
        return graph.rms_norm(name, x, graph.vector(f"{prefix}.{weight}.weight", width), eps)

    table = graph.weight(_embedding(config, names), config.vocab_size, width)
    token = normed("enorm", graph.embed("embed", table), "enorm")
    state = normed("hnorm", graph.given("given", width), "hnorm")
    # eh_proj of both side by side is the sum of two products.
    x = graph.linear("e_proj", token, graph.weight(embedding_part(layer), width, width))
    y = graph.linear("h_proj", state, graph.weight(hidden_part(layer), width, width))
    whole = extended(config)
    x, _ = latent_block(graph, whole, layer, graph.add("x_in", x, y), context, None)
    x = mlp_block(graph, whole, layer, x)
    norm = graph.vector(f"{prefix}.shared_head.norm.weight", width)
    last = graph.rms_norm("hidden", x, norm, eps, gather=True)
    graph.outputs.append(last)
    graph.linear("logits", last, graph.weight(_head(config, names), config.vocab_size, width))
    return graph


def _embedding(config: DecoderConfig, names: Collection[str]) -> str:
    own = f"model.layers.{config.num_hidden_layers}.embed_tokens.weight"
    return own if own in names else EMBEDDING


def _head(config: DecoderConfig, names: Collection[str]) -> str:
    own = f"model.layers.{config.num_hidden_layers}.shared_head.head.weight"
    if own in names:
        return own
    return _embedding(config, names) if config.tie_word_embeddings else HEAD
