"""FP8 checkpoints: weights in e4m3 with scales beside them, used as stored.

Two ways of writing it down are read: `fp8` (DeepSeek and Qwen: transformers' FineGrainedFP8Config; vLLM's
per-tensor form) and `compressed-tensors` with format float-quantized. What they say of activations
is not followed: activations stay in f32 here, which is what the scheme approximates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilert.errors import UserError
from tilert.ir.program import Scale

_METHODS = "accepted are null, fp8 and compressed-tensors (float-quantized, 8 bits)"
_FP8_KEYS = {"quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt",
             "modules_to_not_convert", "ignored_layers", "dequantize"}  # fmt: skip
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHT_KEYS = {"num_bits": (8,), "type": ("float",), "symmetric": (True,), "dynamic": (False, None),
                "group_size": (None,), "actorder": (None, False)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantization:
    """suffix: of the name of a weight's scales; block: rows and columns that share one, None where the
    shape of the scales tells."""

    suffix: str
    block: tuple[int, int] | None

    def scale(self, name: str, shape: tuple[int, int], scales: np.ndarray) -> Scale:
        """Where the scales of a weight are, and how many rows and columns share one.

        Raises UserError when they do not fit the weight.
        """
        rows, cols = shape
        block = self.block
        if block is None and scales.size == 1:
            block = rows, cols
        elif block is None and scales.shape in ((rows, 1), (rows,)):
            block = 1, cols
        if block is None or scales.size != math.prod(grid(shape, block)):
            raise UserError(
                f"the scales of tensor '{name}' have shape {list(scales.shape)}, which does not fit"
                f" {list(shape)} {f'in blocks of {list(block)}' if block else 'rows'}"
            )
        return Scale(scale_name(name, self.suffix), block)


def scale_name(weight: str, suffix: str) -> str:
    """Name of the tensor with the scales of a weight."""
    return weight.removesuffix("weight") + suffix


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks there are along rows and columns."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def parse(config: Any) -> Quantization | None:
    """What `quantization_config` says. Raises UserError for anything that is not read exactly."""
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise UserError(f"quantization_config is {config!r}; {_METHODS}")
    method = config.get("quant_method")
    if method == "fp8":
        return _fp8(config)
    if method == "compressed-tensors":
        return _compressed(config)
    raise UserError(f"quantization_config has quant_method {method!r}; {_METHODS}")


def _fp8(config: Mapping[str, Any]) -> Quantization:
    if unknown := sorted(config.keys() - _FP8_KEYS):
        raise UserError(f"quantization_config has the key '{unknown[0]}' that tilert does not know")
    _expect(config, "fmt", ("e4m3", None))
    _expect(config, "scale_fmt", ("ue8m0", "float", None))  # how the scales were rounded
    _expect(config, "dequantize", (False, None))
    block = config.get("weight_block_size")
    if block is None:
        return Quantization("weight_scale", None)
    if not isinstance(block, list) or len(block) != 2 or not all(
        type(n) is int and n > 0 for n in block
    ):  # fmt: skip
        raise UserError(f"weight_block_size is {block!r}; accepted are null and [rows, columns]")
    return Quantization("weight_scale_inv", (block[0], block[1]))


def _compressed(config: Mapping[str, Any]) -> Quantization:
    _expect(config, "format", ("float-quantized",))
    _expect(config, "kv_cache_scheme", (None,))
    _expect(config, "sparsity_config", (None, {}))
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise UserError("config_groups of quantization_config must hold one group")
    (group,) = groups.values()
    if not isinstance(group, Mapping) or group.keys() - _GROUP_KEYS:
        raise UserError(f"config_groups holds {group!r}; known keys are {', '.join(_GROUP_KEYS)}")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise UserError(f"the weights of config_groups are {weights!r}; accepted is an object")
    for key, accepted in _WEIGHT_KEYS.items():
        _expect(weights, key, accepted)
    _expect(weights, "strategy", ("tensor", "channel", "block"))
    block = weights.get("block_structure")
    if weights["strategy"] != "block":
        return Quantization("weight_scale", None)
    if not isinstance(block, list) or len(block) != 2:
        raise UserError(f"block_structure is {block!r}; accepted is [rows, columns]")
    return Quantization("weight_scale", (int(block[0]), int(block[1])))


def _expect(section: Mapping[str, Any], key: str, accepted: tuple[Any, ...]) -> None:
    value = section.get(key)
    if value not in accepted:
        good = ", ".join("null" if a is None else str(a) for a in accepted)
        raise UserError(f"quantization_config has {key} {value!r}; accepted: {good}")
