"""A model and the layer that guesses its next tokens to the ops of one step: several passes in turn.

The model takes the last token and the guesses behind it; Accept says how many of them are right. The first
pass of the layer takes the tokens that count, at their positions, and guesses from the last of them; each
further pass takes the guess before it. A pass counts the rows of the layer's caches from its own position,
which only the run knows. What a wrong guess has left in the caches lies behind the next step's first
position, and that step writes there before it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tilert.compiler.lower import lower_argmax, lower_nodes
from tilert.compiler.lowering import Limits, Lowering
from tilert.ir.dtype import DType
from tilert.ir.graph import Speculation
from tilert.ir.machine import Machine
from tilert.ir.program import Buf, Buffer, Kind, Op, Scale
from tilert.ops import Accept, Guess


def lower_speculation(
    graph: Speculation, machine: Machine, limits: Limits, dtypes: Mapping[str, DType],
    scales: Mapping[str, Scale],
) -> tuple[list[Buffer], list[Op]]:  # fmt: skip
    """Buffers and ops of a step; limits.tokens is one more than the drafts, at least."""
    assert limits.tokens == limits.outputs > graph.drafts, "a row for each token of the step"
    model = Lowering(graph.model, machine, limits, dtypes, scales)
    lower_nodes(model)
    first, others = _accept(model)
    (hidden,) = graph.model.outputs
    given, tokens = model.home[hidden], model.state("tokens")
    for number in range(1, graph.drafts + 1):
        low = Lowering(
            graph.layer, machine, _limits(model, number), dtypes, scales, model.buffers, model.ops,
            model.ids, scope=f"guess{number}.", given=given, states=first if number == 1 else others,
        )  # fmt: skip
        lower_nodes(low)
        part, chunks = lower_argmax(low, graph.layer.nodes[-1].output)
        low.ops.append(Guess(part, others["tokens"], tokens, others["positions"], number, chunks))
        (hidden,) = graph.layer.outputs
        given = low.home[hidden]
    return model.buffers, model.ops


def _limits(model: Lowering, number: int) -> Limits:
    """Of a pass of the layer, which has one row but for the first. A machine with rings has kernels for one
    number of rows, of which such a pass leaves all but one alone."""
    if model.fused:
        return model.limits
    return replace(model.limits, tokens=model.limits.tokens if number == 1 else 1, outputs=1)


def _accept(model: Lowering) -> tuple[dict[str, Buf], dict[str, Buf]]:
    """The states of the layer's first pass, which Accept makes, and those of its further ones."""

    def state(name: str, cols: int) -> Buf:
        return model.buffer(name, Kind.STATE, DType.I32, 1, cols)

    rows = model.limits.tokens
    fewest, outputs = (rows, rows) if model.fused else (1, 1)
    common = {name: model.state(name) for name in ("sequences", "pages", "sampled")}
    first = common | {
        "tokens": state("following", rows), "positions": state("places", rows),
        "counts": state("kept", 2), "output_rows": state("last", outputs),
    }  # fmt: skip
    others = common | {
        "tokens": state("guess", fewest), "positions": state("place", fewest),
        "counts": state("one", 2), "output_rows": state("only", outputs),
    }  # fmt: skip
    part, chunks = lower_argmax(model, model.graph.nodes[-1].output)
    model.ops.append(
        Accept(part, model.state("sampled"), model.state("tokens"), model.state("positions"),
               model.state("counts"), first["tokens"], first["positions"], first["counts"],
               first["output_rows"], others["positions"], rows, chunks)
    )  # fmt: skip
    return first, others
