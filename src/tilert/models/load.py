"""From a checkpoint's config and tensors to a graph and the weights that it is bound to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Value
from tilert.ir.program import Scale
from tilert.models.config import DecoderConfig
from tilert.models.derived import ROPE_TABLE, tensor_parts
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
    found, parts = check(graph, config, tensors), tensor_parts(config, graph.devices)
    bound: dict[str, np.ndarray] = {}
    for name, value in graph.weights.items():
        if name == ROPE_TABLE:
            bound[name] = np.concatenate(rotary_table(config, context), axis=1)
        elif name in parts:
            bound[name] = parts[name].rows(tensors[parts[name].source])
        else:
            bound[name] = tensors[name].reshape(-1, value.cols)
    for name, scale in found.items():
        part = parts.get(name)
        rows = bound[name].shape if part is None else part.stored
        stored = _stored_scale(config, part.source if part else name, rows, tensors)
        values = tensors[stored.name].astype(np.float32).reshape(grid(rows, stored.block))
        bound[scale.name] = part.scales(values, stored.block) if part else values
    return bound


def scales(
    graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, Scale]:
    """For each weight that is stored in FP8, where its scales are.

    Raises UserError when they are missing, do not fit, or the config does not speak of them.
    """
    found: dict[str, Scale] = {}
    parts = tensor_parts(config, graph.devices)
    for name, value in graph.weights.items():
        part = parts.get(name)
        source = part.source if part else name
        if name == ROPE_TABLE or tensors[source].dtype != DType.F8E4M3.numpy:
            continue
        assert isinstance(value.rows, int)
        shape = part.stored if part else (value.rows, value.cols)
        stored = _stored_scale(config, source, shape, tensors)
        found[name] = Scale(f"{name}.scale", part.block(stored.block)) if part else stored
    return found


def _stored_scale(
    config: DecoderConfig, name: str, shape: tuple[int, int], tensors: Mapping[str, np.ndarray]
) -> Scale:
    """Where the scales of a tensor are. Raises like `scales`."""
    if config.quantization is None:
        raise UserError(f"tensor '{name}' is FP8, but config.json has no quantization_config")
    missing = scale_name(name, config.quantization.suffix)
    scale = tensors.get(missing)
    if scale is None:
        raise UserError(f"tensor '{name}' is FP8, but its scales '{missing}' are missing")
    return config.quantization.scale(name, shape, scale)


def dtypes(
    graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, DType]:
    """Element type of every weight of the graph as `bind` gives it, before anything is read."""
    parts = tensor_parts(config, graph.devices)
    sources = {name: parts[name].source if name in parts else name for name in graph.weights}
    return {
        name: DType.F32 if name == ROPE_TABLE else DType.of(tensors[source])
        for name, source in sources.items()
    }


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
    products -= gathered
    parts = tensor_parts(config, graph.devices)
    for name, value in graph.weights.items():
        if name == ROPE_TABLE:
            continue
        shape, fp8_fits = (value.rows, value.cols), name in products
        if name in parts:
            name, shape = parts[name].source, parts[name].stored
        array = tensors[name]
        wanted = (value.cols,) if value.rows == 1 and array.ndim == 1 else shape
        if array.shape != wanted:
            raise UserError(
                f"tensor '{name}' has shape {list(array.shape)}, but the config asks for {list(wanted)}"
            )
        fp8 = array.dtype == DType.F8E4M3.numpy and fp8_fits
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


def guessing_layers(config: DecoderConfig) -> tuple[str, ...]:
    """Prefixes of the tensors of layers behind the last, which guess further tokens; see mtp.py."""
    layers, extra = config.num_hidden_layers, config.latent
    count = extra.num_nextn_predict_layers if extra else 0
    return tuple(f"model.layers.{layer}." for layer in range(layers, layers + count))


def _check_names(graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> None:
    parts = tensor_parts(config, graph.devices)
    wanted = (graph.weights.keys() - {ROPE_TABLE} - parts.keys()) | {
        parts[name].source for name in parts.keys() & graph.weights.keys()
    }
    ignored = {name for name in tensors if name.endswith(_RECOMPUTED)}
    guessing = guessing_layers(config)
    if not any(
        name.startswith(guessing) for name in wanted
    ):  # else the graph is that of such a layer
        ignored |= {name for name in tensors if name.startswith(guessing)}
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
