"""How large a unit of the stream is, so that most weights arrive as tiles of at least four rows.

Each element of x that is read from shared memory should meet four rows of weights. Where the machine's
own slots hold fewer whole rows and pieces of them would be too small (lower.tile_rows), slots that are a
quarter or a half larger may hold four; the ring has fewer of them then, but twice what is under way.
Rows of a cache that are only of use together must fit a slot, however large they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tilert.compiler.lower import lower, tile_rows
from tilert.compiler.lowering import Limits
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.machine import Machine
from tilert.ir.program import PAGE, Buffer, Op, Scale
from tilert.ops import ExpertDown, ExpertGate, IndexScore, LatentAttention, Linear
from tilert.ops.linear import GATE

LATENT_ROWS = 16  # of a latent cache that a unit has: the depth of a matrix instruction
WANTED = 4  # rows of all matrices of a tile together


def with_units(
    graph: Graph, machine: Machine, dtypes: Mapping[str, DType],
    scales: Mapping[str, Scale] | None = None,
) -> Machine:  # fmt: skip
    """The machine with the slots that suit the weights of `graph`; the same one without a ring."""
    if not machine.slots:
        return machine
    buffers, ops = lower(graph, machine, Limits(1, 1, 1, PAGE), dtypes, scales or {})
    ring, size = machine.slots * machine.slot_bytes, machine.slot_bytes
    least = cache_unit(ops)
    sizes = [
        each
        for each in (size, size + size // 4, size + size // 2)
        if each >= least and (each == size or ring // each >= 2 * machine.window)
    ] or [-(-least // 1024) * 1024]
    made = [replace(machine, slots=ring // each, slot_bytes=each) for each in sizes]
    # The first, so the smallest, of equals.
    return max(made, key=lambda each: bytes_in_tiles(buffers, ops, each))


def cache_unit(ops: Sequence[Op]) -> int:
    """Bytes of the largest unit that is cut from a cache of latents (bf16, which packed rows become in their
    slot) or of an indexer's keys (e4m3, a page with its scales)."""
    latents = [
        2 * LATENT_ROWS * (op.lora + op.rope) for op in ops if isinstance(op, LatentAttention)
    ]
    return max(
        [0, *latents, *(PAGE * (op.head_dim + 4) for op in ops if isinstance(op, IndexScore))]
    )


def bytes_in_tiles(buffers: Sequence[Buffer], ops: Sequence[Op], machine: Machine) -> int:
    """Bytes of weights whose tiles would have as many rows as wanted in the units of a machine."""
    total = 0
    for op in ops:
        if isinstance(op, Linear | ExpertGate | ExpertDown):
            gated = isinstance(op, ExpertGate) or (isinstance(op, Linear) and op.epilogue == GATE)
            itemsize, matrices = buffers[op.w].dtype.bytes, 2 if gated else 1
            if tile_rows(machine, 1, op.k * itemsize, matrices) * matrices >= WANTED:
                total += op.cost(0, op.tiles, itemsize, 0).bytes
    return total
