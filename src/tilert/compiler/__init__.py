"""The compiler: graph and machine in, verified program out. Pure functions; no device, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tilert.compiler.depend import depend
from tilert.compiler.guess import lower_speculation
from tilert.compiler.levels import arrange
from tilert.compiler.lower import lower
from tilert.compiler.lowering import Limits
from tilert.compiler.memory import place
from tilert.compiler.schedule import schedule
from tilert.compiler.verify import verify
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Speculation
from tilert.ir.machine import Machine
from tilert.ir.program import Program, Scale
from tilert.ir.tags import derive, taggable

__all__ = ["Limits", "build"]


def build(
    graph: Graph | Speculation, machine: Machine, limits: Limits, dtypes: Mapping[str, DType],
    scales: Mapping[str, Scale] | None = None,
) -> Program:  # fmt: skip
    """The program that computes `graph` on `machine` in steps of up to `limits.tokens` tokens.

    dtypes: element type of each weight as stored; a name that is absent counts as f32. scales: of the
    weights that are stored in FP8.
    Deterministic: the same input gives the same bytes. Raises VerifyError when the result is not
    proven sound, which is a fault of the compiler and never of the input.
    """
    if isinstance(graph, Speculation):
        buffers, ops = lower_speculation(graph, machine, limits, dtypes, scales or {})
    else:
        buffers, ops = lower(graph, machine, limits, dtypes, scales or {})
    ops, levels = arrange(machine, buffers, ops)
    tagged = taggable(buffers, ops) if machine.slots else ()
    buffers, ops = place(buffers, ops, levels, {value.name for value in graph.outputs}, tagged)
    queues = schedule(machine, buffers, ops, levels)
    program = Program(
        machine, limits.tokens, limits.outputs, limits.sequences, limits.context,
        buffers, ops, (), (),
    )  # fmt: skip
    counters, queues = depend(buffers, ops, queues, derive(program))
    program = replace(program, counters=counters, queues=queues)
    verify(program)
    return program
