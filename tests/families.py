"""Tiny random models of every family, made with transformers: the independent reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from tilert.ir.graph import Graph
from tilert.ir.program import JOIN, Scale

SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 68,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}  # fmt: skip

MIXTURE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}

# name -> (config class, options)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-head": ("LlamaConfig", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "llama-odd": (
        "LlamaConfig",
        {"intermediate_size": 341, "hidden_size": 36, "num_key_value_heads": 3},
    ),
    "llama-llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "llama-dynamic": ("LlamaConfig", {"rope_parameters": DYNAMIC}),
    "llama-dynamic-short": (
        "LlamaConfig",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 48},
    ),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama-longrope": ("LlamaConfig", {"rope_parameters": LONG}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**MIXTURE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-some-layers": (
        "Qwen3MoeConfig",
        {**MIXTURE, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
    ),
    "qwen2_moe": ("Qwen2MoeConfig", {**MIXTURE, "shared_expert_intermediate_size": 36}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "mistral-full": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
}
# Sizes of latent attention, one dense layer before experts. Many index heads: scores of zero, which tie,
# are rare.
LATENT = {
    "num_key_value_heads": 6, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 12, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2,
}  # fmt: skip
INDEX = {**LATENT, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 8}
LATENT_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}
FAMILIES |= {
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "deepseek_v3-yarn": (
        "DeepseekV3Config",
        {**LATENT, "rope_parameters": LATENT_YARN, "attention_bias": True},
    ),
    "deepseek_v3-one-product": (
        "DeepseekV3Config",
        {**LATENT, "q_lora_rank": None, "rope_interleave": False},
    ),
    "deepseek_v32": ("DeepseekV32Config", INDEX),
    "glm_moe_dsa": ("GlmMoeDsaConfig", {**INDEX, "indexer_types": ["full", "shared", "full"]}),
}


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write the model into `folder` in the Hugging Face layout; returns the transformers model."""
    kind, options = FAMILIES[name]
    config = getattr(transformers, kind)(**{**SIZES, **options, **changes})
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros: make them count
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in parameter_name))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        for buffer_name, buffer in model.named_buffers():
            if "correction_bias" in buffer_name:  # it starts as zeros
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(folder)
    return model


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    """[len(tokens), vocab_size] logits of the whole sequence at once."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def stacked(
    graph: Graph, weights: dict[str, torch.Tensor], scales: dict[str, Scale]
) -> tuple[dict[str, torch.Tensor], dict[str, Scale]]:
    """Weights and where scales are, with the matrices of each bank as one, as prompts on a GPU find them."""
    weights, scales = dict(weights), dict(scales)
    banks = [v for n in graph.nodes for v in n.inputs.values() if v and v.parts]
    for parts in ([part.name for part in bank.parts] for bank in banks):
        joined = JOIN.join(parts)
        weights[joined] = torch.cat([weights[name] for name in parts])
        if parts[0] in scales:
            names = [scales[name].name for name in parts]
            scales[joined] = Scale(JOIN.join(names), scales[parts[0]].block)
            weights[scales[joined].name] = torch.cat([weights[name] for name in names])
    return weights, scales
