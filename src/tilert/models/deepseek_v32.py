"""deepseek_v32: deepseek_v3 whose tokens attend to the positions that an indexer selects."""

from __future__ import annotations

from tilert.models import deepseek_v3, experts
from tilert.models.config import FamilyRules
from tilert.models.latent import LatentRules

RULES = FamilyRules(
    model_type="deepseek_v32",
    architectures=("DeepseekV32ForCausalLM",),
    defaults={**deepseek_v3.RULES.defaults, "max_position_embeddings": 163840},
    fixed=deepseek_v3.FIXED,
    qkv_bias=None,
    o_bias=None,
    qk_norm=False,
    sliding="never",
    experts=experts.DEEPSEEK,
    latent=LatentRules(indexed=True),
)
