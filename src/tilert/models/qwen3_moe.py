"""qwen3_moe: qwen3 whose layers, or some of them, have experts instead of an MLP."""

from __future__ import annotations

from tilert.models import experts
from tilert.models.config import FamilyRules

RULES = FamilyRules(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,  # of layers without experts
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "sliding_window": None,  # these two mean something only with use_sliding_window
        "max_window_layers": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": None,
        "num_local_experts": None,
        "norm_topk_prob": False,
    },
    fixed={"mlp_bias": (False,), "use_sliding_window": (False,)},
    qkv_bias=None,
    o_bias=None,
    qk_norm=True,
    sliding="never",
    experts=experts.QWEN3,
)
