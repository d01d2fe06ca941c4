"""Model families: from config.json to settings, to an op graph, to the weights bound to it.

load_config chooses the family by model_type. Knows nothing of files, devices or tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilert.errors import UserError
from tilert.models import (
    deepseek_v3,
    deepseek_v32,
    glm_moe_dsa,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from tilert.models.config import DecoderConfig, parse

_MODULES = (
    llama, qwen2, qwen3, mistral, qwen2_moe, qwen3_moe, mixtral, deepseek_v3, deepseek_v32, glm_moe_dsa,
)  # fmt: skip
FAMILIES = {module.RULES.model_type: module.RULES for module in _MODULES}
# Families that many ask for, and what they would need.
LACKING = {"gpt_oss": "attention sinks, experts with biases and MXFP4 weights"}


def load_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> DecoderConfig:
    """The checked settings of a model from its config.json and generation_config.json.

    Raises UserError for a model_type without a family here, and for whatever `parse` refuses.
    """
    for name, value in (("config.json", config), ("generation_config.json", generation_config)):
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"{name} holds a {type(value).__name__}; accepted is a JSON object")
    accepted = ", ".join(FAMILIES)
    model_type = config.get("model_type")
    if model_type is None:
        raise UserError(f"config.json has no model_type; accepted are {accepted}")
    if isinstance(model_type, str) and model_type in LACKING:
        raise UserError(
            f"config.json has model_type {model_type!r}, which needs {LACKING[model_type]} that tilert does"
            f" not have; accepted are {accepted}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"config.json has model_type {model_type!r}; accepted are {accepted}")
    return parse(config, FAMILIES[model_type], generation_config)
