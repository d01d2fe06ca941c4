"""mistral: llama without biases, and with a sliding window in every layer unless it is null."""

from __future__ import annotations

from tilert.models.config import FamilyRules

RULES = FamilyRules(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": 4096,
    },
    fixed={"attention_bias": (False,), "mlp_bias": (False,)},
    qkv_bias=False,
    o_bias=False,
    qk_norm=False,
    sliding="every layer",
)
