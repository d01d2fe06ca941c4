"""qwen2_moe: qwen2 with experts, and a shared one beside them that a gate of its own weighs."""

from __future__ import annotations

from tilert.models import experts
from tilert.models.config import FamilyRules

RULES = FamilyRules(
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,  # of layers without experts
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "sliding_window": None,  # these two mean something only with use_sliding_window
        "max_window_layers": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": None,
        "num_local_experts": None,
        "norm_topk_prob": False,
    },
    fixed={
        "attention_bias": (True,),
        "qkv_bias": (True,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
    },
    qkv_bias=True,
    o_bias=False,
    qk_norm=False,
    sliding="never",
    experts=experts.QWEN2,
)
