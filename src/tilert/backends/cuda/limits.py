"""How the shared memory of a block is divided: ring, scratch, queue. One place for these sums."""

from __future__ import annotations

from tilert.errors import UserError
from tilert.ir.program import Program
from tilert.ops import Attend, Draw

SLOT_PAD = 128  # bytes behind a slot: rows that are not aligned arrive with their neighbours' bytes
DRAW_BYTES = 13 << 10  # struct DrawScratch
RUN_BYTES, WAIT_BYTES = 96, 4  # struct Run, struct Wait
SHARED_BYTES = 6144  # at least sizeof(Shared) and alignment; checked when the kernel is loaded
MIN_SLOTS = 2


def scratch_bytes(program: Program) -> int:
    """Bytes between the barriers of one op: Attend's Scratch, DrawScratch, or a little for the others."""
    sizes = [
        18 * op.head_dim * 2 + 4 * op.group * (op.head_dim + 2) * 4 + 4 * op.group
        for op in program.ops
        if isinstance(op, Attend)
    ]
    sizes += [DRAW_BYTES for op in program.ops if isinstance(op, Draw)]
    return -(-max([256, *sizes]) // 16) * 16


def queue_bytes(program: Program) -> int:
    """Bytes of the longest queue with its waits, and of the counters' totals."""
    longest = max(
        len(queue) * RUN_BYTES + sum(len(run.waits) for run in queue) * WAIT_BYTES
        for queue in program.queues
    )
    return longest + 4 * len(program.counters)


def shared_bytes(program: Program, slots: int) -> int:
    """Dynamic shared memory of a block whose ring has so many slots."""
    ring = slots * (program.machine.slot_bytes + SLOT_PAD)
    return ring + scratch_bytes(program) + SHARED_BYTES + queue_bytes(program)


def fitting_slots(program: Program, available: int) -> int:
    """Slots of the ring, at most the machine's; UserError when `available` bytes hold too few."""
    for slots in range(program.machine.slots, MIN_SLOTS - 1, -1):
        if shared_bytes(program, slots) <= available:
            return slots
    raise UserError(
        f"the program needs {shared_bytes(program, MIN_SLOTS)} bytes of shared memory per block, but"
        f" the device has {available}"
    )
