"""Products that share one body of code (shapes.cuh): which ones, and the table of their shapes.

A product with code of its own has its shape in it as constants, and takes 15 to 40 KB. A few of them fit
the instruction cache of a multiprocessor (128 KB); a layer of DeepSeek-V3.2 has thirteen. Where a program
has more than FEW, those that the one body can do share it.
"""

from __future__ import annotations

from tilert.ir.dtype import DType
from tilert.ir.program import NONE, Program
from tilert.ir.tags import Tags
from tilert.ops import ExpertDown, ExpertGate, Linear

FEW = 8
COLUMNS = 64  # of scales in a part, at most: two for each lane
WARPS = 8  # that compute
PAD = 32  # ShapeInputs::kPad
SEGMENTED = (2, 4, 8, 16)  # rows of a unit of which 16 segments are made
STRAIGHT, DIAGONAL, IN_TURN, SIDE_BY_SIDE = range(4)  # enum Rows
PRODUCTS = Linear | ExpertGate | ExpertDown


def sharing(program: Program) -> list[PRODUCTS | None]:
    """The program's ops, those that have code of their own as None; all have where shapes are few."""
    kinds = {_key(program, op) for op in program.ops if isinstance(op, PRODUCTS)}
    return [
        op if len(kinds) > FEW and isinstance(op, PRODUCTS) and has_shape(program, op) else None
        for op in program.ops
    ]


def _key(program: Program, op: PRODUCTS) -> tuple[object, ...]:
    """What the code of a product depends on, so far as it decides how many there are."""
    epilogue = op.epilogue if isinstance(op, Linear) else -1
    groups = op.groups if isinstance(op, Linear) else 1
    return type(op), op.k, program.buffers[op.w].dtype, op.tile_rows, epilogue, groups, op.x_type


def parts(op: PRODUCTS) -> int:
    """Parts of a row of weights along k."""
    return op.top_k if isinstance(op, ExpertDown) else 1


def matrices(op: PRODUCTS) -> int:
    """Matrices whose rows a tile has: two with a gate."""
    return 1 if isinstance(op, ExpertDown) or op.w_up == NONE else 2


def has_shape(program: Program, op: PRODUCTS) -> bool:
    """Whether the one body of code can do an op: its weights are e4m3 with scales for blocks, and a tile's
    rows fit a slot."""
    if op.x_type == DType.F32 or (isinstance(op, Linear) and op.bias != NONE):
        return False
    weights = program.buffers[op.w]
    if weights.dtype is not DType.F8E4M3 or weights.scale == NONE:
        return False
    rows = op.tile_rows * matrices(op)
    norm = NONE if isinstance(op, ExpertDown) else op.norm
    return (
        rows in SEGMENTED
        and op.k % 64 == 0
        and rows * parts(op) * op.k <= program.machine.slot_bytes
        and program.buffers[op.x].dtype is DType.F32
        and (norm == NONE or program.buffers[norm].dtype is DType.BF16)
        and _bank_rows(op) % op.tile_rows == 0
        and parts(op) * matrices(op)
        <= WARPS  # each fetches the scales of one, for any number of tokens
        and _has_scales(program, op)
    )


def _bank_rows(op: PRODUCTS) -> int:
    """Rows of a chosen matrix; of a block-diagonal one those with the same x; else nothing."""
    if isinstance(op, Linear):
        return op.n // op.groups if op.groups > 1 else 0
    return op.n


def _has_scales(program: Program, op: PRODUCTS) -> bool:
    rows, cols = program.buffers[op.w].block
    step = _step(op)
    power = rows & (rows - 1) == 0 and cols & (cols - 1) == 0
    return (
        power and rows % op.tile_rows == 0 and cols >= 64
        and -(-op.k // cols) <= COLUMNS
        and step % cols == 0 and (parts(op) == 1 or step % op.k == 0 == op.k % cols)
    )  # fmt: skip


def _step(op: PRODUCTS) -> int:
    """Elements of a row that all warps take at once."""
    return 64 * WARPS * 16 // (op.tile_rows * matrices(op))


def _items(tokens: int) -> int:
    """Groups of rows, each for a matrix or part, of which a block keeps the scales (AnyShape::kItems)."""
    return WARPS * max(2, tokens)


def kept_scales(program: Program, tokens: int) -> int:
    """How many scales a block keeps in shared memory (kShapeScales); 0 where no product shares code."""
    own = [-(-op.k // program.buffers[op.w].block[1]) for op in sharing(program) if op]
    return _items(tokens) * max(own, default=0)


def input_bytes(op: PRODUCTS, tokens: int) -> int:
    """What x' of so many tokens takes of a block's shared memory."""
    return 2 * tokens * (op.k * parts(op) + PAD)


def _inverse(divisor: int) -> int:
    """See quotient in shapes.cuh. Of 0, by which nothing is divided: 0."""
    return -(-(1 << 31) // divisor) if divisor else 0


def initializer(program: Program, op: PRODUCTS, tags: Tags, *, spared: bool) -> str:
    """An op's struct Shape; spared: a product that nobody reads may be left out."""
    kind = {ExpertGate: IN_TURN, ExpertDown: SIDE_BY_SIDE}.get(type(op), STRAIGHT)
    count, stride, beyond, epilogue = 0, 0, 0, "kGate" if isinstance(op, ExpertGate) else "kAdd"
    if isinstance(op, Linear):
        epilogue, beyond = ("kStore", "kAdd", "kGate")[op.epilogue], op.beyond if spared else 0
        assert not (beyond and op.y in tags.writers), "a word that is not written has an old tag"
        kind, stride = (DIAGONAL, op.x_stride) if op.groups > 1 else (STRAIGHT, 0)
    else:
        count = op.top_k
    bank, each = _bank_rows(op), matrices(op) * parts(op)
    rows, cols = program.buffers[op.w].block
    shifts = rows.bit_length() - 1, (cols // 64).bit_length() - 1
    columns, groups = -(-op.k // cols), -(-bank // rows)
    tables = 1 if isinstance(op, Linear) else program.tokens
    fitting = _items(program.tokens) // (each * tables)
    step = _step(op)
    weight_step = step if parts(op) == 1 else step * op.tile_rows * matrices(op)
    segments = 16 // (op.tile_rows * matrices(op))
    inverses = (_inverse(n) for n in (bank, each, op.k, op.k // 64))
    one = program.tokens == 1  # then shapes do not differ by the width of an activation
    pitches = (0, 0) if one else (program.buffers[op.x].cols, program.buffers[op.y].cols)
    normed = not isinstance(op, ExpertDown) and op.norm != NONE
    eps = 0.0 if isinstance(op, ExpertDown) else op.eps
    flags = (
        normed, isinstance(op, ExpertDown), op.x in tags.writers, op.y in tags.writers,
        program.buffers[op.y].dtype is DType.BF16,
    )  # fmt: skip
    numbers = (
        op.k, parts(op), op.tile_rows, matrices(op), segments.bit_length() - 1, kind, bank, weight_step,
        *inverses, count, stride, *shifts, columns, groups, _inverse(groups), fitting, *pitches,
        epilogue, beyond, f"{eps!r}f", f"{1 / (op.k * parts(op))!r}f",
    )  # fmt: skip
    return ", ".join([*map(str, numbers), *("true" if flag else "false" for flag in flags)])
