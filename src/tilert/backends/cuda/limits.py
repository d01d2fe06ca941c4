"""What a block holds: how its shared memory is divided, and how many tokens its registers take."""

from __future__ import annotations

from dataclasses import dataclass

from tilert.backends.cuda import shapes
from tilert.backends.cuda.shapes import PRODUCTS, WARPS, matrices
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.program import NONE, Op, Program
from tilert.ops import (
    Attend,
    Combine,
    Draw,
    ExpertDown,
    IndexRope,
    IndexScore,
    LatentAppend,
    LatentAttention,
    Route,
    Select,
)
from tilert.ops.attend import QUERY_ROWS, block_tokens
from tilert.ops.mla import cache_cols

SLOT_PAD = 128  # bytes behind a slot: rows that are not aligned arrive with their neighbours' bytes
DRAW_BYTES = 13 << 10  # struct DrawScratch
COMBINE_BYTES = 8192  # Combine's Scratch, of more than MOST_AT_ONCE shares
MOST_AT_ONCE = 8  # shares that one warp merges
RUN_BYTES, WAIT_BYTES = 96, 8  # struct Run, struct Wait
ENTRIES = 16  # of a queue that does not fit: about as many runs as a layer has
MIN_SLOTS = 2
THREADS = 32 * WARPS  # that compute
HELD_WORDS = 128  # of x' in the registers of a thread: half of them; the rest is in shared memory
PLAIN_WORDS = 160  # of x' and of sums, where products do without the matrix units
ENOUGH_SLOTS = 4  # of the ring that a step of several tokens must leave
UNIT_ROWS = 16  # of a latent cache, in a slot
MAX_UNITS = 4  # of a latent cache that are taken together
MAX_CHOSEN = MAX_GROUPS = 32  # experts of a token, groups of experts: one for each lane of a warp
MAX_INDEX_HEADS = 64  # of an indexer: a warp has all of a token's in its registers


@dataclass(frozen=True, slots=True)
class Layout:
    """How the shared memory of a block is divided: slots of the ring, and entries of the queue that it
    holds at a time; 0 entries: the whole queue. `units` of a latent cache are taken together."""

    slots: int
    entries: int
    units: int = 1


def step_rows(program: Program, available: int) -> int:
    """Most tokens of a step (1, 2, 4 or 8), from the program of one, where a block has so many bytes of
    shared memory: each block holds x' of all tokens, in its registers and what they leave over there.
    """
    least = max(ENOUGH_SLOTS, _taken_units(program, available))
    ring = least * (program.machine.slot_bytes + SLOT_PAD)
    # Their queues are a little longer.
    room = available - ring - 2 * min(queue_bytes(program, n) for n in (0, ENTRIES))
    return next(
        rows for rows in (8, 4, 2, 1)
        if rows == 1 or (
            all(_holds(program, op, rows) for op in program.ops)
            and scratch_bytes(program, rows) + shared_struct_bytes(program, rows) <= room
        )
    )  # fmt: skip


def _holds(program: Program, op: Op, tokens: int) -> bool:
    """Whether the registers of a block take an op of so many tokens."""
    if isinstance(op, ExpertDown):  # over eight tokens the kernel of Qwen3-30B-A3B spills 1.6 KB
        return tokens <= 4
    if isinstance(op, PRODUCTS) and op.x_type == DType.F32:
        return _plain_words(program, op, tokens) <= PLAIN_WORDS
    return True


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a row of weights, with all its parts, is cut into pieces (struct Tile); sizes in bytes."""

    unit_rows: int
    pieces: int
    piece: int
    cycle: int  # pieces after which one begins with a part again
    cycle_bytes: int

    @staticmethod
    def of(program: Program, op: PRODUCTS) -> _Cut:
        parts = shapes.parts(op)
        rows, slot = op.tile_rows * matrices(op), program.machine.slot_bytes
        row_bytes = op.k * program.weight_itemsize(op)
        if rows * row_bytes <= slot:
            pieces = -(-parts // (slot // (rows * row_bytes)))
            together = -(-parts // pieces)
            return _Cut(rows, pieces, together * row_bytes, pieces, parts * row_bytes)
        each = -(-row_bytes // (slot // rows))
        return _Cut(rows, parts * each, -(-row_bytes // each // 64) * 64, each, row_bytes)

    def steps(self, at_once: int) -> int:
        """Of so many bytes at once, in which a row is taken."""
        last = self.cycle_bytes - (self.cycle - 1) * self.piece
        return (self.pieces - 1) * -(-self.piece // at_once) + -(-last // at_once)


def kept_bytes(program: Program, op: PRODUCTS, tokens: int) -> int:
    """What registers do not hold of a product's x' for so many tokens (Matrix::Operand), in bytes."""
    if op.x_type == DType.F32:
        return 0
    cut, itemsize = _Cut.of(program, op), program.weight_itemsize(op)
    segments = max(1, 16 // cut.unit_rows)
    steps = cut.steps(64 * WARPS * segments)
    words = max(1, segments * max(tokens, 2) // 8) * 8 // itemsize  # of a step
    return max(0, steps - HELD_WORDS // words) * words * 4 * THREADS


def _staged_bytes(program: Program, op: PRODUCTS, tokens: int) -> int:
    """What normed x' of several tokens takes on its way to registers (struct Staging), in bytes."""
    if tokens == 1 or op.x_type == DType.F32 or isinstance(op, ExpertDown) or op.norm == NONE:
        return 0
    cut, itemsize = _Cut.of(program, op), program.weight_itemsize(op)
    segments = max(1, 16 // cut.unit_rows)
    steps = cut.steps(64 * WARPS * segments)
    loads = steps * max(1, segments // 4) * (2 // itemsize)  # of a lane, for a token
    at_once = min(tokens, 1 if loads > 4 else 2 if loads > 2 else 4)
    return WARPS * at_once * steps * segments * (64 // itemsize) * 2


def _plain_words(program: Program, op: PRODUCTS, tokens: int) -> int:
    """What a thread holds of x', sums and scales without matrix units (struct Scalar)."""
    cut, itemsize = _Cut.of(program, op), program.weight_itemsize(op)
    aligned = op.k * itemsize % 16 == 0
    wide = 16 // itemsize if aligned else 1
    chunks = cut.cycle_bytes * (cut.pieces // cut.cycle) // itemsize // wide
    warps = next(n for n in (8, 4, 2, 1) if chunks >= 32 * n or n == 1)
    own = cut.steps(32 * warps * wide * itemsize)
    rows = -(-cut.unit_rows * warps // WARPS)
    return tokens * (own * wide + rows) + own * matrices(op)


def shared_struct_bytes(program: Program, tokens: int) -> int:
    """At least sizeof(Shared), and alignment; a static_assert compares them."""
    chunk_rows = 32 if tokens == 1 else 16
    return (
        1024
        + 4 * shapes.kept_scales(program, tokens)
        + 4 * tokens * (8 + MAX_CHOSEN + 2 * 2 * chunk_rows * 9)
    )


def scratch_bytes(program: Program, tokens: int) -> int:
    """Bytes that one op has for itself in steps of so many tokens."""
    sizes = [
        shapes.input_bytes(shared, tokens) if shared else _scratch(program, op, tokens)
        for op, shared in zip(program.ops, shapes.sharing(program), strict=True)
    ]
    return -(-max([256, *sizes]) // 16) * 16


def _scratch(program: Program, op: Op, tokens: int) -> int:
    """Of one op: its Scratch; of a product x' that is not in registers, or on its way there; scores where
    Route sorts out groups."""
    if isinstance(op, PRODUCTS):
        return kept_bytes(program, op, tokens) + _staged_bytes(program, op, tokens)
    if isinstance(op, Attend):
        return _attend_bytes(op.group, op.head_dim, tokens)
    if isinstance(op, Combine):
        return COMBINE_BYTES if op.splits > MOST_AT_ONCE else 0
    if isinstance(op, LatentAttention):
        return _latent_bytes(op, tokens)
    if isinstance(op, LatentAppend):
        return 4 * (op.lora + op.rope) * tokens
    if isinstance(op, IndexRope):
        return 4 * WARPS * op.head_dim
    if isinstance(op, IndexScore):
        return _score_bytes(op, tokens)
    if isinstance(op, Select):
        return _select_bytes(op)
    if isinstance(op, Route) and op.n_group > 1:
        return 4 * op.experts * tokens
    return DRAW_BYTES if isinstance(op, Draw) else 0


def _attend_bytes(group: int, head_dim: int, tokens: int) -> int:
    rows = group * block_tokens(group, tokens)
    halves = (QUERY_ROWS + 2 * tokens) * head_dim
    raw, merged = (rows + 2 * tokens) * head_dim, 4 * rows * (head_dim + (2 if tokens == 1 else 8))
    return 2 * halves + 4 * (tokens * head_dim + max(raw, merged) + rows)


def _latent_bytes(op: LatentAttention, tokens: int) -> int:
    share = -(-op.topk // op.splits)
    listed = -(-share // UNIT_ROWS) * UNIT_ROWS + 4
    taken = 16 * (MAX_UNITS * UNIT_ROWS + 8)  # scores of both halves of a row, weights in bf16
    row_bytes = cache_cols(op) * (1 if op.packed else 2)
    return 32 * (op.lora + op.rope) + tokens * row_bytes + (2 * 4 + 2) * taken + 4 * (16 + listed)


def _score_bytes(op: IndexScore, tokens: int) -> int:
    queries = -(-op.heads // 16) * 16 * (2 * (op.head_dim + 8) + 4)
    return max(queries, (16 + 4 * tokens) * op.width)


def _select_bytes(op: Select) -> int:
    pool = -(-max(6 * THREADS, op.topk * 13 // 8, 28 * op.splits) // 4) * 4
    return 8 * (pool + THREADS) + 4 * (3 * WARPS + 5 + op.splits) + 16


def _taken_units(program: Program, available: int) -> int:
    """Units of a latent cache that are taken together: half of a ring, and of a block's memory.

    They decide the order of sums, so the programs of all numbers of tokens take as many.
    """
    if not any(isinstance(op, LatentAttention) for op in program.ops):
        return 1
    machine = program.machine
    most = min(machine.slots, available // (machine.slot_bytes + SLOT_PAD)) // 2
    return next((units for units in (MAX_UNITS, 2) if units <= most), 1)


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
    own = scratch_bytes(program, program.tokens) + shared_struct_bytes(program, program.tokens)
    return ring + own + queue_bytes(program, layout.entries)


def fitting(program: Program, available: int) -> Layout:
    """The layout with most slots, at most the machine's, but with the whole queue where that takes one slot
    at most; UserError when `available` bytes hold too few."""
    units = _taken_units(program, available)
    least = max(MIN_SLOTS, units)

    def fits(layout: Layout) -> bool:
        return layout.slots >= least and shared_bytes(program, layout) <= available

    for slots in range(program.machine.slots, least - 1, -1):
        if fits(Layout(slots, 0, units)):
            return Layout(slots, 0, units)
        if fits(part := Layout(slots, ENTRIES, units)):
            whole = Layout(slots - 1, 0, units)  # a slot less is not felt
            return whole if fits(whole) else part
    needed = shared_bytes(program, Layout(least, ENTRIES, units))
    raise UserError(
        f"the program needs {needed} bytes of shared memory per block, but the device has {available}"
    )
