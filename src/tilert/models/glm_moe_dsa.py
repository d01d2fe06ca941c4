"""glm_moe_dsa (GLM-5): deepseek_v32 with other sizes, where layers may share an indexer's choice."""

from __future__ import annotations

from tilert.models import deepseek_v3, experts
from tilert.models.config import FamilyRules
from tilert.models.latent import LatentRules

RULES = FamilyRules(
    model_type="glm_moe_dsa",
    architectures=("GlmMoeDsaForCausalLM",),
    defaults={
        **deepseek_v3.RULES.defaults,
        "vocab_size": 154880,
        "hidden_size": 6144,
        "intermediate_size": 12288,
        "num_hidden_layers": 78,
        "num_attention_heads": 64,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 2048,
        "v_head_dim": 256,
        "qk_nope_head_dim": 192,
        "index_n_heads": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    fixed=deepseek_v3.FIXED,
    qkv_bias=None,
    o_bias=None,
    qk_norm=False,
    sliding="never",
    experts=experts.DEEPSEEK,
    latent=LatentRules(indexed=True, index_interleave=True, shared=True),
)
