"""The CUDA source of one program: shapes of its ops as template arguments, sizes as constants.

Each distinct shape of an op is a variant, one instantiation of a template in the .cuh files; a run
names its variant. Two programs with the same shapes have the same source, so the cubin is cached.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from tilert.backends.cuda import shapes
from tilert.backends.cuda.limits import (
    HELD_WORDS,
    MAX_CHOSEN,
    MAX_GROUPS,
    MAX_INDEX_HEADS,
    SLOT_PAD,
    UNIT_ROWS,
    Layout,
    entry_bytes,
    scratch_bytes,
    shared_struct_bytes,
)
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.program import NONE, PAGE, Buf, Op, Program
from tilert.ir.tags import TAGS, Tags, derive
from tilert.ops import (
    Accept,
    Adjust,
    Append,
    Argmax,
    Attend,
    Bins,
    Combine,
    Draw,
    Embed,
    ExpertDown,
    ExpertGate,
    Guess,
    IndexRope,
    IndexScore,
    LatentAppend,
    LatentAttention,
    Linear,
    NextToken,
    Norm,
    Report,
    Route,
    Select,
    Sift,
    Survey,
    Totals,
)
from tilert.ops.logprobs import MOST, REPORT_WORDS, SURVEY_WORDS

FOLDER = Path(__file__).parent
HEADERS = (
    "ptx.cuh", "program.cuh", "tile.cuh", "inputs.cuh", "staged.cuh", "products.cuh", "linear.cuh",
    "combine.cuh", "heads.cuh", "attend.cuh", "sample.cuh", "draw.cuh", "logprobs.cuh", "experts.cuh",
    "packed.cuh", "latents.cuh", "mla.cuh", "select.cuh", "index.cuh", "norm.cuh", "shape.cuh",
    "shape_inputs.cuh", "shapes.cuh",
)  # fmt: skip
KERNEL = "tilert_program"
# kShapeShift, kPassShift: a run's variant has 6 bits, its shape too
SHAPE_SHIFT, PASS_SHIFT = 6, 12


@dataclass(frozen=True, slots=True)
class Source:
    """What the compiler is given, and for each op of the program the number of its variant, from
    SHAPE_SHIFT on that of its shape."""

    text: str
    headers: dict[str, str]
    variants: list[int]


def generate(program: Program, layout: Layout, *, trace: bool = False) -> Source:
    """The source of a program for blocks of that layout; with `trace` every run leaves its times.

    Raises UserError for heads that the kernel has no form of, AssertionError for an op that the compiler
    never emits for such machines.
    """
    known, table = dict[str, int](), dict[str, int]()
    tags = derive(program)
    # With several passes a loader knows too late where its tokens are.
    several = passes(program)[-1] > 1

    def variant(op: Op, shared: shapes.PRODUCTS | None) -> int:
        if shared is None:
            return known.setdefault(_type(program, op, tags), len(known))
        chosen = _flag(not isinstance(shared, Linear))
        code = known.setdefault(f"AnyShape<{chosen}>", len(known))
        shape = shapes.initializer(program, shared, tags, spared=not several)
        number = table.setdefault(shape, len(table))
        return code | number << SHAPE_SHIFT

    variants = list(map(variant, program.ops, shapes.sharing(program)))
    most = 1 << SHAPE_SHIFT, 1 << PASS_SHIFT - SHAPE_SHIFT
    assert len(known) <= most[0] and len(table) <= most[1], "a run has bits for no more"
    names = "\n".join(f"using V{i} = {name};" for name, i in known.items())
    cases = " ".join(f"X({i})" for i in known.values())
    machine, slots = program.machine, layout.slots
    constants = {
        "kSlots": slots, "kSlotBytes": machine.slot_bytes, "kSlotPitch": machine.slot_bytes + SLOT_PAD,
        "kWindow": min(machine.window, slots), "kPage": PAGE,
        "kScratchBytes": scratch_bytes(program, program.tokens),
        "kEntries": layout.entries, "kEntryBytes": entry_bytes(program, layout.entries),
        "kTurn": tags.stride % TAGS, "kTokens": program.tokens,
        "kSharedBytes": shared_struct_bytes(program, program.tokens),
        "kHeldWords": HELD_WORDS, "kVariants": len(known),
        "kPasses": passes(program)[-1], "kTakenUnits": layout.units,
        "kMost": MOST, "kSurveyWords": SURVEY_WORDS, "kReportWords": REPORT_WORDS,
        "kShapeScales": shapes.kept_scales(program, program.tokens),
        "kMixture": int(any(isinstance(op, ExpertGate) for op in program.ops)),
    }  # fmt: skip
    headers = {name: (FOLDER / name).read_text(encoding="utf-8") for name in HEADERS}
    headers["constants.h"] = "#pragma once\n" + "".join(
        f"constexpr int {name} = {value};\n" for name, value in constants.items()
    )
    chosen = {op.chosen for op in program.ops if isinstance(op, Route)}
    tagged = bool(chosen) and chosen <= tags.writers.keys()
    for name, value in {"kTrace": trace, "kChoiceTagged": tagged}.items():
        headers["constants.h"] += f"constexpr bool {name} = {_flag(value)};\n"
    rows = ",\n".join(f"    {{{shape}}}" for shape in table or ["0"])
    headers["shapes.h"] = f"#pragma once\n__constant__ const Shape kShapes[] = {{\n{rows}}};\n"
    headers["variants.h"] = f"#pragma once\n{names}\n#define TILERT_VARIANTS(X) {cases}\n"
    return Source((FOLDER / "kernel.cu").read_text(encoding="utf-8"), headers, variants)


def passes(program: Program) -> list[int]:
    """The pass that each op belongs to, and behind them how many there are: the model's is the first, and
    the layer's that guesses follow."""
    number, found = 0, list[int]()
    for op in program.ops:
        found.append(number)
        number += isinstance(op, Accept | Guess)
    return [*found, max(number, 1)]


def _type(program: Program, op: Op, tags: Tags) -> str:
    """The instantiation of an op: its shape without addresses."""
    if isinstance(op, Linear):
        return _linear(program, op, tags)
    if isinstance(op, Attend):
        _check_heads(program, op)
        assert passes(program)[-1] == 1, "its waits need not say where the tokens of a pass are"
        norms = ", ".join(_weight(program, b) for b in (op.q_norm, op.k_norm))
        return (
            f"Attend<{op.heads}, {op.kv_heads}, {op.head_dim}, {op.window}, {op.splits}, {op.block},"
            f" {_flag(all(b in tags.writers for b in (op.q, op.k, op.v)))}, {norms},"
            f" {_bits(op.eps)}, {_bits(op.scale)},"
            f" {', '.join(str(program.buffers[b].cols) for b in (op.q, op.k, op.v))},"
            f" {_flag(op.y in tags.writers)}>"
        )
    if isinstance(op, Append):  # in the same code
        return _type(program, attend_of(program, op), tags)
    if isinstance(op, LatentAppend | LatentAttention):
        return _latent(program, op, tags)
    if isinstance(op, IndexRope | IndexScore | Select):
        return _index(program, op, tags)
    if isinstance(op, Combine):
        return (
            f"Combine<{op.heads}, {op.group}, {op.head_dim}, {op.parts}, {op.splits},"
            f" {_active(program, op.part)}, {_flag(op.part in tags.writers)},"
            f" {_flag(op.y in tags.writers)}, {_narrow(program, op.y)}>"
        )
    if isinstance(op, Embed):
        return f"Embed<{op.width}, {_weight(program, op.table)}, {_flag(op.y in tags.writers)}>"
    if isinstance(op, Argmax):
        return f"Argmax<{op.vocab}, {op.chunk}>"
    if isinstance(op, Draw):
        return f"Draw<{op.vocab}, {op.chunk}, {_flag(bool(op.feed))}>"
    if isinstance(op, Adjust | Bins | Sift | Survey):
        return f"{type(op).__name__}<{op.vocab}, {op.chunk}>"
    if isinstance(op, Report):
        return f"Report<{op.chunks}>"
    if isinstance(op, Totals):
        return f"Totals<{op.chunks}, {op.width}>"
    if isinstance(op, Route):
        _check_choice(op)
        return (
            f"Route<{op.experts}, {op.top_k}, {op.n_group}, {op.topk_group}, {op.scoring},"
            f" {_flag(bool(op.norm_topk_prob))}, {_bits(op.routed_scaling_factor)},"
            f" {_flag(op.logits in tags.writers)}, {_weight(program, op.bias)}>"
        )
    if isinstance(op, ExpertGate):
        return _gate(program, op, tags)
    if isinstance(op, ExpertDown):
        return _down(program, op, tags)
    if isinstance(op, Norm):
        last = op.gather != NONE and passes(program)[-1] > 1
        return (
            f"Norm<{op.width}, {_flag(last)}, {_flag(op.x in tags.writers)},"
            f" {_weight(program, op.weight)}, {_bits(op.eps)}>"
        )
    assert isinstance(op, NextToken | Accept | Guess), f"{type(op).__name__} has no CUDA form"
    return f"{type(op).__name__}<{op.chunks}>"


def attend_of(program: Program, op: Append) -> Attend:
    """The attention whose keys and values an op appends."""
    return next(o for o in program.ops if isinstance(o, Attend) and o.k_cache == op.k_cache)


def _check_heads(program: Program, op: Attend) -> None:
    d, slot = op.head_dim, program.machine.slot_bytes
    if d % 16 or not 16 <= d <= 128 or 2 * PAGE * d > slot or op.group > 16:
        raise UserError(
            f"the model has heads of {d} elements, {op.group} for each kv head; the back end 'cuda' accepts"
            f" multiples of 16 up to {min(128, slot // (2 * PAGE))}, and up to 16 for each; 'cpu' runs it"
        )


def _latent(program: Program, op: LatentAppend | LatentAttention, tags: Tags) -> str:
    width, slot = op.lora + op.rope, program.machine.slot_bytes
    nope = op.nope if isinstance(op, LatentAttention) else 0
    if op.lora % 16 or op.rope % 16 or nope % 4 or 2 * UNIT_ROWS * width > slot:
        raise UserError(
            f"the model has latents of {op.lora} and rotated keys of {op.rope} elements; the back end 'cuda'"
            f" accepts multiples of 16, together up to {slot // (2 * UNIT_ROWS)}; 'cpu' runs it"
        )
    if isinstance(op, LatentAppend):
        return (
            f"LatentAppend<{op.rope}, {op.lora}, {_flag(bool(op.interleave))},"
            f" {_flag(op.kv in tags.writers)}, {_weight(program, op.weight)}, {_bits(op.eps)},"
            f" {_pitch(program, op.kv)}, {_flag(bool(op.packed))}>"
        )
    assert op.q_col % 4 == 0, "a piece of a head is loaded as four words"
    assert op.block == 1, "a tile has one token"
    tagged = ", ".join(_flag(buf in tags.writers) for buf in (op.q, op.q_rope, op.y))
    return (
        f"LatentAttention<{op.heads}, {op.tile_heads}, {op.nope}, {op.rope}, {op.lora}, {op.splits},"
        f" {op.topk}, {_flag(bool(op.interleave))}, {tagged}, {_bits(op.scale)},"
        f" {_pitch(program, op.q)}, {_pitch(program, op.q_rope)}, {_flag(bool(op.packed))}>"
    )


def _index(program: Program, op: IndexRope | IndexScore | Select, tags: Tags) -> str:
    if isinstance(op, Select):
        return f"Select<{op.topk}, {op.splits}, {op.width}>"
    slot = program.machine.slot_bytes
    most = min(128, slot // PAGE - 4)
    if not 16 <= op.head_dim <= most or op.heads > MAX_INDEX_HEADS:
        raise UserError(
            f"the indexer has {op.heads} heads of {op.head_dim} elements; the back end 'cuda' accepts up to"
            f" {MAX_INDEX_HEADS} heads of 16 to {most}; 'cpu' runs it"
        )
    assert op.q_col % 4 == 0, "a piece of a head is loaded as four words"
    assert op.index_scale != NONE, "keys are e4m3 with scales"
    if isinstance(op, IndexScore):
        return (
            f"IndexScore<{op.heads}, {op.head_dim}, {op.topk}, {op.splits}, {op.width},"
            f" {_flag(op.head_weights in tags.writers)}, {_bits(op.scale)}, {_pitch(program, op.q)},"
            f" {_pitch(program, op.head_weights)}>"
        )
    norms = ", ".join(_weight(program, b) for b in (op.weight, op.shift))
    return (
        f"IndexRope<{op.heads}, {op.head_dim}, {op.rope}, {_flag(bool(op.interleave))},"
        f" {_flag(op.k in tags.writers)}, {norms}, {_bits(op.eps)}, {_pitch(program, op.q)},"
        f" {_pitch(program, op.k)}>"
    )


def _pitch(program: Program, buf: Buf) -> int:
    """From one token's row of an activation to the next one's; with one token shapes do not differ by it."""
    return 0 if program.tokens == 1 else program.buffers[buf].cols


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _narrow(program: Program, buf: Buf) -> str:
    return _flag(program.buffers[buf].dtype is DType.BF16)


def _linear(program: Program, op: Linear, tags: Tags) -> str:
    x, rows = _input(program, op, tags), "Straight"
    if op.groups > 1:
        assert x != "Stored", "each block has another part of x"
        rows = f"Blocks<{op.n // op.groups}, {op.x_stride}>"
    epilogue = ("kStore", "kAdd", "kGate")[op.epilogue]
    made = _product(program, op, tags, epilogue, x, rows)
    # With several passes a loader knows too late where its tokens are.
    if op.beyond == 0 or passes(program)[-1] > 1:
        return made
    assert op.y not in tags.writers, "a word that is not written has an old tag"
    return f"Beyond<{op.beyond}, {made}>"


def _gate(program: Program, op: ExpertGate, tags: Tags) -> str:
    assert op.by_slot, "steps of many tokens are not for this back end"
    rows = f"InTurn<{op.n}, {op.tile_rows}, {op.top_k}>"
    return _product(program, op, tags, "kGate", _input(program, op, tags), rows)


def _down(program: Program, op: ExpertDown, tags: Tags) -> str:
    x = f"Weighted<{_flag(op.x in tags.writers)}, {op.k}, {op.top_k}>"
    return _product(program, op, tags, "kAdd", x, f"SideBySide<{op.n}, {op.top_k}>")


def _input(program: Program, op: Linear | ExpertGate, tags: Tags) -> str:
    checked, pitch = _flag(op.x in tags.writers), _pitch(program, op.x)
    if op.norm != NONE:
        return f"Normed<{checked}, {_weight(program, op.norm)}, {_bits(op.eps)}, {pitch}>"
    return "Stored" if program.buffers[op.x].dtype is DType.BF16 else f"Plain<{checked}, {pitch}>"


def _product(
    program: Program, op: Linear | ExpertGate | ExpertDown, tags: Tags, epilogue: str, x: str, rows: str
) -> str:  # fmt: skip
    """A Linear of the kernel, which takes experts as well; x: its Input, rows: its Source."""
    y, bias = program.buffers[op.y], op.bias if isinstance(op, Linear) else NONE
    # For one token, products of other widths are the same.
    pitch = y.cols if program.tokens > 1 else 0
    return (
        f"Linear<{op.k}, {_weight(program, op.w)}, {op.tile_rows}, {epilogue},"
        f" {_flag(op.y in tags.writers)}, {_narrow(program, op.y)}, {_flag(op.x_type != DType.F32)},"
        f" {pitch}, {x}, {_weight(program, bias)}, {_scales(program, op)}, {rows}>"
    )


def _active(program: Program, shares: Buf) -> str:
    """Which of the shares of attention in a buffer hold something."""
    made = next(o for o in program.ops if isinstance(o, Attend | LatentAttention) and o.y == shares)
    if isinstance(made, Attend):
        return f"PastPages<{made.window}>"
    return "EveryShare" if made.topk else "SeenPages"


def _check_choice(op: Route) -> None:
    if op.top_k > MAX_CHOSEN or op.n_group > MAX_GROUPS:
        raise UserError(
            f"the model has {op.n_group} groups of experts and {op.top_k} experts for each token; the back"
            f" end 'cuda' accepts up to {MAX_GROUPS} and {MAX_CHOSEN}; 'cpu' runs it"
        )


def _scales(program: Program, op: Linear | ExpertGate | ExpertDown) -> str:
    b = program.buffers[op.w]
    if isinstance(op, ExpertGate | ExpertDown) and op.k * b.dtype.bytes % 16:
        raise UserError(
            f"the model's experts have rows of {op.k * b.dtype.bytes} bytes; the back end 'cuda' accepts"
            " multiples of 16; 'cpu' runs it"
        )
    if b.scale == NONE:
        return "Unscaled"
    rows, cols = b.block
    # Scales that cover rows of one matrix multiply sums of rows; others are held beside x'.
    held = cols < op.k or isinstance(op, ExpertDown)
    if held and rows % op.tile_rows and (rows > 1 or op.x_type == DType.F32):
        raise UserError(
            f"weights have scales for blocks of {rows} rows, and tiles {op.tile_rows} rows; the back end"
            " 'cuda' accepts blocks of whole tiles, and of one row where its columns are multiples of 64;"
            " 'cpu' runs it"
        )
    return f"Scaled<{rows}, {cols}>"


def _weight(program: Program, buf: Buf) -> str:
    if buf == NONE:
        return "None"
    names = {DType.BF16: "BF16", DType.F16: "F16", DType.F32: "F32", DType.F8E4M3: "F8"}
    dtype = program.buffers[buf].dtype
    assert dtype in names, f"weights of type {dtype.name} have no CUDA form yet"
    return names[dtype]


def _bits(value: float) -> str:
    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08x}u"
