"""From a checkpoint's config and tensors to a graph and the weights that it is bound to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Value
from tilert.ir.program import Scale
from tilert.models.config import DecoderConfig
from tilert.models.decoder import ROPE_TABLE
from tilert.models.quantization import grid, scale_name
from tilert.models.rotary import rotary_table

_FLOATS = (DType.F32, DType.BF16, DType.F16)
# Tensors that old checkpoints carry and that are computed from the config instead.
_RECOMPUTED = ("rotary_emb.inv_freq",)


def bind(graph: Graph, config: DecoderConfig, context: int, tensors: Mapping[str, np.ndarray]) -> dict[
    str, np.ndarray
]:  # fmt: skip
    """The array of every weight of the graph by name, vectors as one row, and of the scales of those
    in FP8, f32 and one per block. Raises like `check`."""
    found = check(graph, config, tensors)
    bound = {
        name: np.concatenate(rotary_table(config, context), axis=1)
        if name == ROPE_TABLE
        else tensors[name].reshape(-1, value.cols)
        for name, value in graph.weights.items()
    }
    for name, scale in found.items():
        blocks = grid((len(bound[name]), bound[name].shape[1]), scale.block)
        bound[scale.name] = tensors[scale.name].astype(np.float32).reshape(blocks)
    return bound


def scales(
    graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, Scale]:
    """For each weight that is stored in FP8, where its scales are.

    Raises UserError when they are missing, do not fit, or the config does not speak of them.
    """
    found: dict[str, Scale] = {}
    for name, value in graph.weights.items():
        if name == ROPE_TABLE or tensors[name].dtype != DType.F8E4M3.numpy:
            continue
        if config.quantization is None:
            raise UserError(f"tensor '{name}' is FP8, but config.json has no quantization_config")
        scale = tensors.get(scale_name(name, config.quantization.suffix))
        if scale is None:
            missing = scale_name(name, config.quantization.suffix)
            raise UserError(f"tensor '{name}' is FP8, but its scales '{missing}' are missing")
        assert isinstance(value.rows, int)
        found[name] = config.quantization.scale(name, (value.rows, value.cols), scale)
    return found


def check(
    graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, Scale]:
    """What `scales` finds, after everything else has been checked.

    Raises UserError for a missing or extra tensor, a wrong shape, or a dtype that is not read.
    """
    _check_names(graph, config, tensors)
    products = {v.name for n in graph.nodes if n.op == "linear" for v in (n.inputs["w"],) if v}
    products |= {part.name for bank in _banks(graph) for part in bank.parts}
    gathered = {v.name for n in graph.nodes if n.op == "embed" for v in (n.inputs["table"],) if v}
    for name, value in graph.weights.items():
        if name == ROPE_TABLE:
            continue
        array = tensors[name]
        wanted = (value.cols,) if value.rows == 1 and array.ndim == 1 else (value.rows, value.cols)
        if array.shape != wanted:
            raise UserError(
                f"tensor '{name}' has shape {list(array.shape)}, but the config asks for {list(wanted)}"
            )
        fp8 = array.dtype == DType.F8E4M3.numpy and name in products - gathered
        if not fp8 and array.dtype not in [d.numpy for d in _FLOATS]:
            raise UserError(
                f"tensor '{name}' is {array.dtype}; accepted are float32, bfloat16 and float16, and"
                " float8_e4m3fn for matrices of layers"
            )
    found = scales(graph, config, tensors)
    for bank in _banks(graph):
        first = bank.parts[0].name
        for name in (part.name for part in bank.parts):
            if tensors[name].dtype != tensors[first].dtype:
                raise UserError(
                    f"tensor '{name}' is {tensors[name].dtype} and '{first}' {tensors[first].dtype};"
                    " accepted are experts of one layer with one type"
                )
            if name in found and found[name].block != found[first].block:
                raise UserError(
                    f"tensors '{name}' and '{first}' have scales for {list(found[name].block)} and"
                    f" {list(found[first].block)} elements; accepted are experts of one layer with one"
                    " kind of scales"
                )
    return found


def _banks(graph: Graph) -> list[Value]:
    """The banks of all layers."""
    return [v for n in graph.nodes if n.op == "experts" for v in n.inputs.values() if v and v.parts]


def _check_names(graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> None:
    wanted = graph.weights.keys() - {ROPE_TABLE}
    ignored = {name for name in tensors if name.endswith(_RECOMPUTED)}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # a stored copy of the embedding
    if config.quantization is not None:  # scales of weights, and of activations, which stay f32
        suffixes = config.quantization.suffix, "input_scale"
        ignored |= {scale_name(name, suffix) for name in wanted for suffix in suffixes}
    missing = sorted(wanted - tensors.keys())
    extra = sorted(tensors.keys() - wanted - ignored)
    for kind, names in (("lacks the tensor", missing), ("has the unknown tensor", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"the checkpoint {kind} '{names[0]}'{more} for model_type '{config.model_type}'"
            )
