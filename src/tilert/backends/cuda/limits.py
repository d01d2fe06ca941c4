"""What a block holds: how its shared memory is divided, and how many tokens its registers take."""

from __future__ import annotations

from dataclasses import dataclass

from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.program import NONE, Program
from tilert.ops import (
    Attend,
    Draw,
    IndexRope,
    IndexScore,
    LatentAttention,
    LatentRope,
    Linear,
    Route,
    Select,
)

SLOT_PAD = 128  # bytes behind a slot: rows that are not aligned arrive with their neighbours' bytes
DRAW_BYTES = 13 << 10  # struct DrawScratch
INDEX_BYTES = 8448  # Select's Scratch, which is larger than IndexScore's
RUN_BYTES, WAIT_BYTES = 96, 8  # struct Run, struct Wait
ENTRIES = 16  # of a queue that does not fit: about as many runs as a layer has
MIN_SLOTS = 2
THREADS, WARPS = 256, 8  # that compute
HELD_WORDS = 128  # of x' in the registers of a thread: half of them; the rest is in shared memory
ENOUGH_SLOTS = 4  # of the ring that a step of several tokens must leave
UNIT_ROWS = 16  # of a latent cache, in a slot
TAKEN_ROWS = 64  # of a latent cache, at once
MAX_CHOSEN = MAX_GROUPS = 32  # experts of a token, groups of experts: one for each lane of a warp
MAX_ROWS = 32  # of query heads, of all tokens of a step: two blocks of 16 for the matrix units


@dataclass(frozen=True, slots=True)
class Layout:
    """How the shared memory of a block is divided: slots of the ring, and entries of the queue that it
    holds at a time; 0 entries: the whole queue."""

    slots: int
    entries: int


def step_rows(program: Program, available: int) -> int:
    """Most tokens of a step (1, 2, 4 or 8), from the program of one, where a block has so many bytes of
    shared memory: each block holds x' of all tokens, in its registers and what they leave over there.

    One where a product does not go through the matrix units, where each token has experts of its own, and
    with latent attention.
    """
    if any(isinstance(op, LatentAttention) for op in program.ops):
        return 1
    linears = [op for op in program.ops if isinstance(op, Linear)]
    if any(op.x_type == DType.F32 for op in linears):
        return 1
    if any(isinstance(op, Route) for op in program.ops):
        return 1
    group = max((op.group for op in program.ops if isinstance(op, Attend)), default=1)
    ring = ENOUGH_SLOTS * (program.machine.slot_bytes + SLOT_PAD)
    # Their queues are a little longer.
    room = available - ring - 2 * min(queue_bytes(program, n) for n in (0, ENTRIES))
    return next(
        rows for rows in (8, 4, 2, 1)
        if rows == 1 or (
            rows * group <= MAX_ROWS
            and max(kept_bytes(program, op, rows) for op in linears) + shared_struct_bytes(rows) <= room
        )
    )  # fmt: skip


def kept_bytes(program: Program, op: Linear, tokens: int) -> int:
    """What registers do not hold of a product's x' for so many tokens (Matrix::Operand), in bytes."""
    if op.x_type == DType.F32:
        return 0
    itemsize, matrices = program.weight_itemsize(op), 1 if op.w_up == NONE else 2
    rows, row_bytes = op.tile_rows * matrices, op.k * itemsize
    share = program.machine.slot_bytes // rows
    pieces = -(-row_bytes // share)
    piece = row_bytes if pieces == 1 else -(-row_bytes // pieces // 64) * 64
    spread = WARPS * max(1, 16 // rows)  # blocks of 64 bytes that are taken at once
    last = row_bytes - (pieces - 1) * piece
    steps = (pieces - 1) * -(-piece // (64 * spread)) + -(-last // (64 * spread))
    columns = max(1, 16 // rows) * max(tokens, 2)
    words = max(1, columns // 8) * 8 // itemsize  # of a step
    return max(0, steps - HELD_WORDS // words) * words * 4 * THREADS


def shared_struct_bytes(tokens: int) -> int:
    """At least sizeof(Shared), and alignment; a static_assert compares them."""
    chunk_rows = 32 if tokens == 1 else 16
    return 1024 + 4 * tokens * (8 + 2 * 2 * chunk_rows * 9)


def scratch_bytes(program: Program) -> int:
    """Bytes that one op has for itself: Attend's Scratch, DrawScratch, x' beyond the registers, Route's
    scores where it sorts out groups, or a little for the others."""
    sizes = [
        _attend_bytes(op.group, op.head_dim, program.tokens)
        for op in program.ops
        if isinstance(op, Attend)
    ]
    sizes += [DRAW_BYTES for op in program.ops if isinstance(op, Draw)]
    linears = (op for op in program.ops if isinstance(op, Linear))
    sizes += [kept_bytes(program, op, program.tokens) for op in linears]
    sizes += [_latent_bytes(op) for op in program.ops if isinstance(op, LatentAttention)]
    sizes += [4 * (op.lora + op.rope) for op in program.ops if isinstance(op, LatentRope)]
    sizes += [32 * op.head_dim for op in program.ops if isinstance(op, IndexRope)]
    sizes += [INDEX_BYTES for op in program.ops if isinstance(op, IndexScore | Select)]
    sizes += [4 * op.experts for op in program.ops if isinstance(op, Route) and op.n_group > 1]
    return -(-max([256, *sizes]) // 16) * 16


def _attend_bytes(group: int, head_dim: int, tokens: int) -> int:
    rows = group * tokens
    halves = (-(-rows // 16) * 16 + 2 * tokens) * head_dim
    raw, merged = tokens * (group + 2) * head_dim, 4 * min(rows, 16) * (head_dim + 2)
    return 2 * halves + 4 * (tokens * head_dim + max(raw, merged) + rows)


def _latent_bytes(op: LatentAttention) -> int:
    share = -(-op.topk // op.splits)
    listed = -(-share // UNIT_ROWS) * UNIT_ROWS + 4
    scores = 2 * 16 * (TAKEN_ROWS + 8)
    return 2 * 17 * (op.lora + op.rope) + 4 * (scores + listed)


def entry_bytes(program: Program, entries: int) -> int:
    """From one run of a queue in shared memory to the next: the run alone where the whole queue is there,
    else with room for the waits of any run behind it."""
    if entries == 0:
        return RUN_BYTES
    waits = max(len(run.waits) for queue in program.queues for run in queue)
    return -(-(RUN_BYTES + WAIT_BYTES * waits) // 16) * 16


def queue_bytes(program: Program, entries: int) -> int:
    """Bytes of so many entries of a queue; with 0, of the longest queue with its waits."""
    if entries:
        return entries * entry_bytes(program, entries)
    longest = max(
        len(queue) * RUN_BYTES + sum(len(run.waits) for run in queue) * WAIT_BYTES
        for queue in program.queues
    )
    return -(-longest // 16) * 16


def shared_bytes(program: Program, layout: Layout) -> int:
    """Dynamic shared memory of a block."""
    ring = layout.slots * (program.machine.slot_bytes + SLOT_PAD)
    own = scratch_bytes(program) + shared_struct_bytes(program.tokens)
    return ring + own + queue_bytes(program, layout.entries)


def fitting(program: Program, available: int) -> Layout:
    """The layout with most slots, at most the machine's, but with the whole queue where that takes one slot
    at most; UserError when `available` bytes hold too few."""

    def fits(layout: Layout) -> bool:
        return layout.slots >= MIN_SLOTS and shared_bytes(program, layout) <= available

    for slots in range(program.machine.slots, MIN_SLOTS - 1, -1):
        if fits(Layout(slots, 0)):
            return Layout(slots, 0)
        if fits(part := Layout(slots, ENTRIES)):
            whole = Layout(slots - 1, 0)  # a slot less is not felt
            return whole if fits(whole) else part
    least = shared_bytes(program, Layout(MIN_SLOTS, ENTRIES))
    raise UserError(
        f"the program needs {least} bytes of shared memory per block, but the device has {available}"
    )
