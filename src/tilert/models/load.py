"""From a checkpoint's config and tensors to a graph and the weights that it is bound to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.models.config import DecoderConfig
from tilert.models.decoder import ROPE_TABLE
from tilert.models.rotary import rotary_table

_FLOATS = (DType.F32, DType.BF16, DType.F16)
# Tensors that old checkpoints carry and that are computed from the config instead.
_RECOMPUTED = ("rotary_emb.inv_freq",)


def bind(graph: Graph, config: DecoderConfig, context: int, tensors: Mapping[str, np.ndarray]) -> dict[
    str, np.ndarray
]:  # fmt: skip
    """The array of every weight of the graph, by name, vectors as one row. Raises like `check`."""
    check(graph, config, tensors)
    return {
        name: np.concatenate(rotary_table(config, context), axis=1)
        if name == ROPE_TABLE
        else tensors[name].reshape(-1, value.cols)
        for name, value in graph.weights.items()
    }


def check(graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises UserError for a missing or extra tensor, a wrong shape, or a dtype other than f32, bf16,
    f16."""
    _check_names(graph, config, tensors)
    for name, value in graph.weights.items():
        if name == ROPE_TABLE:
            continue
        array = tensors[name]
        wanted = (value.cols,) if value.rows == 1 and array.ndim == 1 else (value.rows, value.cols)
        if array.shape != wanted:
            raise UserError(
                f"tensor '{name}' has shape {list(array.shape)}, but the config asks for {list(wanted)}"
            )
        if array.dtype not in [d.numpy for d in _FLOATS]:
            raise UserError(
                f"tensor '{name}' is {array.dtype}; accepted are float32, bfloat16 and float16"
            )


def _check_names(graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> None:
    wanted = graph.weights.keys() - {ROPE_TABLE}
    ignored = {name for name in tensors if name.endswith(_RECOMPUTED)}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # a stored copy of the embedding
    missing = sorted(wanted - tensors.keys())
    extra = sorted(tensors.keys() - wanted - ignored)
    for kind, names in (("lacks the tensor", missing), ("has the unknown tensor", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"the checkpoint {kind} '{names[0]}'{more} for model_type '{config.model_type}'"
            )
