"""deepseek_v3: multi-head latent attention, dense layers first and then mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilert.models import experts
from tilert.models.config import FamilyRules
from tilert.models.latent import LatentRules

EXPERTS: Mapping[str, Any] = {
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "mlp_layer_types": None,
    "num_experts": None,  # another name of n_routed_experts
}
# What transformers' modules have fixed, too.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "moe_layer_freq": (1, None),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "moe_router_dtype": ("float32", None),
}

RULES = FamilyRules(
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    defaults={
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "attention_bias": False,
        **EXPERTS,
    },
    fixed=FIXED,
    qkv_bias=None,
    o_bias=None,
    qk_norm=False,
    sliding="never",
    experts=experts.DEEPSEEK,
    latent=LatentRules(indexed=False),
)
