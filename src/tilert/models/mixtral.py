"""mixtral: mistral whose every layer has experts, chosen by a softmax over those that are chosen."""

from __future__ import annotations

from tilert.models import experts
from tilert.models.config import FamilyRules

RULES = FamilyRules(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,  # of each expert
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": None,
        "num_experts": None,
    },
    fixed={"attention_bias": (False,), "mlp_bias": (False,)},
    qkv_bias=False,
    o_bias=False,
    qk_norm=False,
    sliding="every layer",
    rope_theta=1e6,
    experts=experts.MIXTRAL,
)
