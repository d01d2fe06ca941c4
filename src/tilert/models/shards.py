"""How a checkpoint is cut over devices: which axis of each stored tensor, read off the table of weights.

A weight says its axis (`Value.shard`); its bias and its FP8 scales follow it. What no weight names is held
whole by every device.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tilert.errors import UserError
from tilert.ir.graph import Graph
from tilert.ir.program import JOIN, Scale
from tilert.models.config import DecoderConfig
from tilert.models.load import check

MAX_DEVICES = 64


def cut_axes(
    graph: Graph, config: DecoderConfig, tensors: Mapping[str, np.ndarray], devices: int
) -> dict[str, int | None]:
    """The axis of each tensor that `devices` devices divide; None: every device has the whole.

    Raises UserError like `check`, and for a number of devices that does not divide heads, rows or columns,
    or that would cut a block of scales.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise UserError(f"the number of devices is {devices}; accepted are 1 to {MAX_DEVICES}")
    scales = check(graph, config, tensors)
    axes: dict[str, int | None] = dict.fromkeys(tensors)
    if devices == 1:
        return axes
    _check_heads(graph, devices)
    for name, axis in _stored_axes(graph).items():
        if axis is None or name not in tensors:
            continue
        size = tensors[name].shape[axis]
        if size % devices:
            what = "columns" if axis else "rows"
            raise _indivisible(f"tensor '{name}' has {size} {what}", size, devices)
        axes[name] = axis
        if name in scales:
            axes[scales[name].name] = _scale_axis(name, axis, size, scales[name], devices)
    return axes


def _stored_axes(graph: Graph) -> dict[str, int | None]:
    """The axis of each tensor that a weight is made of. A bias is cut as the rows of its matrix are."""
    axes = {part: v.shard for v in graph.weights.values() for part in v.name.split(JOIN)}
    for node in graph.nodes:
        w, bias = node.inputs.get("w"), node.inputs.get("bias")
        if w is not None and bias is not None and w.shard == 0:
            axes[bias.name] = 0
    return axes


def _check_heads(graph: Graph, devices: int) -> None:
    """Rows of a projection are cut between heads, never inside of one."""
    for node in graph.nodes:
        for key in ("kv_heads", "heads"):
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
