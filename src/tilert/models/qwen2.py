"""qwen2: llama with biases on q, k and v only, and optional sliding windows in some layers."""

from __future__ import annotations

from tilert.models.config import FamilyRules

RULES = FamilyRules(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    fixed={"attention_bias": (True,), "mlp_bias": (False,)},
    qkv_bias=True,
    o_bias=False,
    qk_norm=False,
    sliding="by layer",
)
