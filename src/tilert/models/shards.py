"""How a model is cut over devices: the axis of each stored tensor, and the graph of one device.

A weight says its axis (`Value.shard`); its bias and its FP8 scales follow it, and so does the tensor that
a derived weight is made of. A layer that guesses further tokens is cut as the last layer is. What no weight
names is held whole by every device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Node, Value
from tilert.ir.program import Scale
from tilert.models.config import DecoderConfig
from tilert.models.derived import tensor_parts
from tilert.models.load import check
from tilert.models.quantization import scale_name

MAX_DEVICES = 64
PER_HEAD = ("kv_heads", "heads", "groups")  # attributes of nodes that count heads
OWN_HEAD, HEAD = "shared_head.head.weight", "lm_head.weight"  # of a guessing layer, of the model


def cut_axes(
    graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray], devices: int
) -> dict[str, int | None]:
    """The axis of each tensor that `devices` devices divide; None: every device has the whole.

    Raises UserError like `check`, and for a number of devices that does not divide heads, rows or columns,
    or that would cut a block of scales.
    """
    _check_devices(devices)
    check(graph, config, tensors)
    axes: dict[str, int | None] = dict.fromkeys(tensors)
    if devices == 1:
        return axes
    _check_heads(graph, devices)
    for name, axis in _stored_axes(graph, config, tensors).items():
        if axis is None or name not in tensors:
            continue
        size = tensors[name].shape[axis]
        if size % devices:
            what = "columns" if axis else "rows"
            raise _indivisible(f"tensor '{name}' has {size} {what}", size, devices)
        axes[name] = axis
        if (scale := _scale(config, name, tensors)) is not None:
            axes[scale.name] = _scale_axis(name, axis, size, scale, devices)
    return axes


def part_of(graph: Graph, devices: int) -> Graph:
    """The graph of one of `devices` devices, from that of the whole model: weights are cut along their
    axis, and with them the heads and columns that they make.

    A product over cut columns gives the device's own share of a sum over all devices, which the graph
    takes for the sum: a node that adds the others' is for the ops of several devices to bring. Logits are
    those of the device's rows of the head. Raises UserError like `cut_axes`.
    """
    _check_devices(devices)
    _check_heads(graph, devices)
    if devices == 1:
        return graph
    made = Graph(graph.name, devices=devices)
    own: dict[Value, Value] = {}  # by the value of the whole model
    for name, value in graph.weights.items():
        made.weights[name] = own[value] = _part(value, value.shard, devices)
    for node in graph.nodes:
        _add_part(node, made, own, devices)
    made.outputs = [own[value] for value in graph.outputs]
    return made


def _add_part(node: Node, made: Graph, own: dict[Value, Value], devices: int) -> None:
    """A node of the whole model as one device has it. `own` has its inputs, and gets its output."""
    w, bias = node.inputs.get("w"), node.inputs.get("bias")
    if w is not None and bias is not None and w.shard == 0 and own[bias].cols == bias.cols:
        made.weights[bias.name] = own[bias] = _part(bias, 1, devices)
    for bank in (v for v in node.inputs.values() if v is not None and v.parts):
        own[bank] = replace(
            _part(bank, bank.shard, devices), parts=tuple(own[part] for part in bank.parts)
        )
    inputs = {key: value and own[value] for key, value in node.inputs.items()}
    activations = [v for v in node.inputs.values() if v is not None and not v.weight]
    # What heads and columns are cut into stays so until a product joins them.
    cut = w.shard == 0 if w is not None else any(own[v].cols < v.cols for v in activations)
    attrs = {k: v // devices if cut and k in PER_HEAD else v for k, v in node.attrs.items()}
    output = own[node.output] = _part(node.output, 1 if cut else None, devices)
    if w is not None and "groups" not in attrs:
        x, part = inputs["x"], own[w]
        assert x is not None and x.cols == part.cols, f"{node}: {x} with {part}"
    made.nodes.append(Node(node.op, inputs, output, attrs))


def _part(value: Value, axis: int | None, devices: int) -> Value:
    """A value of which one device has its part along an axis."""
    if axis is None:
        return value
    size = value.cols if axis else value.rows
    assert isinstance(size, int), f"{value} is cut along its tokens"
    if size % devices:
        what = "columns" if axis else "rows"
        raise _indivisible(f"'{value.name}' has {size} {what}", size, devices)
    return replace(value, **{"cols" if axis else "rows": size // devices})


def _stored_axes(
    graph: Graph, config: DecoderConfig, names: Iterable[str]
) -> dict[str, int | None]:
    """The axis of each tensor that a weight is made of. A bias is cut as the rows of its matrix are."""
    parts = tensor_parts(config)
    axes = {
        parts[name].source if name in parts else name: value.shard
        for name, value in graph.weights.items()
    }
    for node in graph.nodes:
        w, bias = node.inputs.get("w"), node.inputs.get("bias")
        if w is not None and bias is not None and w.shard == 0:
            axes[bias.name] = 0
    extra = config.latent.num_nextn_predict_layers if config.latent else 0
    last = config.num_hidden_layers - 1
    for layer in range(last + 1, last + 1 + extra):
        prefix = f"model.layers.{layer}."
        for name in (name for name in names if name.startswith(prefix)):
            own = name.removeprefix(prefix)
            axes[name] = axes.get(HEAD if own == OWN_HEAD else f"model.layers.{last}.{own}")
    return axes


def _scale(config: DecoderConfig, name: str, tensors: Mapping[str, np.ndarray]) -> Scale | None:
    """Where the scales of a tensor are; None when it has none."""
    if config.quantization is None or tensors[name].dtype != DType.F8E4M3.numpy:
        return None
    stored = scale_name(name, config.quantization.suffix)
    if stored not in tensors:  # of a guessing layer, which `check` passes over
        raise UserError(f"tensor '{name}' is FP8, but its scales '{stored}' are missing")
    rows, cols = tensors[name].shape
    return config.quantization.scale(name, (rows, cols), tensors[stored])


def _check_devices(devices: int) -> None:
    if not 1 <= devices <= MAX_DEVICES:
        raise UserError(f"the number of devices is {devices}; accepted are 1 to {MAX_DEVICES}")


def _check_heads(graph: Graph, devices: int) -> None:
    """Rows of a projection are cut between heads, never inside of one."""
    for node in graph.nodes:
        for key in PER_HEAD[:2]:
            count = int(node.attrs.get(key, devices))
            if count % devices:
                what = "key-value heads" if key == "kv_heads" else "heads"
                raise _indivisible(f"the model has {count} {what}", count, devices)


def _scale_axis(name: str, axis: int, size: int, scale: Scale, devices: int) -> int | None:
    """How the scales of a weight are cut that is cut along `axis`, where it has `size` elements."""
    block, part = scale.block[axis], size // devices
    if block >= size:
        return None  # one scale for all of them
    if part % block:
        what = "columns" if axis else "rows"
        raise UserError(
            f"{devices} devices would cut tensor '{name}' into parts of {part} {what}, within a block of"
            f" {block} {what} that share a scale; accepted are numbers of devices that cut between blocks"
        )
    return axis


def _indivisible(what: str, count: int, devices: int) -> UserError:
    good = [n for n in range(1, min(count, MAX_DEVICES) + 1) if count % n == 0]
    return UserError(
        f"{what}, which {devices} devices do not divide; accepted are {', '.join(map(str, good))}"
    )
