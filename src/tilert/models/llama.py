"""llama: what LlamaForCausalLM's config.json may say, and how the family differs from its siblings."""

from __future__ import annotations

from tilert.models.config import FamilyRules

RULES = FamilyRules(
    model_type="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),  # the second is of early conversions
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    },
    fixed={"sliding_window": (None,)},
    qkv_bias=None,
    o_bias=None,
    qk_norm=False,
    sliding="never",
)
