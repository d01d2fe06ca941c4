"""qwen3: qwen2 with a norm over each head of q and k, and no biases unless attention_bias asks."""

from __future__ import annotations

from tilert.models.config import FamilyRules

RULES = FamilyRules(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    fixed={"mlp_bias": (False,)},
    qkv_bias=None,
    o_bias=None,
    qk_norm=True,
    sliding="by layer",
)
