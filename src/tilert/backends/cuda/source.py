"""The CUDA source of one program: shapes of its ops as template arguments, sizes as constants.

Each distinct shape of an op is a variant, one instantiation of a template in the .cuh files; a run
names its variant. Two programs with the same shapes have the same source, so the cubin is cached.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from tilert.backends.cuda.limits import (
    HELD_WORDS,
    MAX_CHOSEN,
    MAX_GROUPS,
    SLOT_PAD,
    UNIT_ROWS,
    scratch_bytes,
    shared_struct_bytes,
)
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.program import NONE, PAGE, Buf, Op, Program
from tilert.ir.tags import TAGS, Tags, derive
from tilert.ops import (
    Adjust,
    Argmax,
    Attend,
    Bins,
    Combine,
    Draw,
    Embed,
    ExpertDown,
    ExpertGate,
    IndexRope,
    IndexScore,
    LatentAttention,
    LatentRope,
    Linear,
    NextToken,
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
    "ptx.cuh", "program.cuh", "tile.cuh", "inputs.cuh", "products.cuh", "linear.cuh", "attend.cuh",
    "sample.cuh", "draw.cuh", "logprobs.cuh", "experts.cuh", "mla.cuh", "index.cuh",
)  # fmt: skip
KERNEL = "tilert_program"


@dataclass(frozen=True, slots=True)
class Source:
    """What the compiler is given, and for each op of the program the number of its variant."""

    text: str
    headers: dict[str, str]
    variants: list[int]


def generate(program: Program, slots: int, *, trace: bool = False) -> Source:
    """The source of a program whose ring has `slots` slots; with `trace` every run leaves its times.

    Raises UserError for heads that the kernel has no form of, AssertionError for an op that the compiler
    never emits for such machines.
    """
    known: dict[str, int] = {}
    tags = derive(program)
    variants = [known.setdefault(_type(program, op, tags), len(known)) for op in program.ops]
    names = "\n".join(f"using V{i} = {name};" for name, i in known.items())
    cases = " ".join(f"X({i})" for i in known.values())
    machine = program.machine
    constants = {
        "kSlots": slots, "kSlotBytes": machine.slot_bytes, "kSlotPitch": machine.slot_bytes + SLOT_PAD,
        "kWindow": min(machine.window, slots), "kPage": PAGE, "kScratchBytes": scratch_bytes(program),
        "kCounters": len(program.counters), "kTurn": tags.stride % TAGS, "kTokens": program.tokens,
        "kStreamLead": program.stream_lead, "kSharedBytes": shared_struct_bytes(program.tokens),
        "kHeldWords": HELD_WORDS, "kVariants": len(known), "kMost": MOST,
        "kSurveyWords": SURVEY_WORDS, "kReportWords": REPORT_WORDS,
    }  # fmt: skip
    headers = {name: (FOLDER / name).read_text(encoding="utf-8") for name in HEADERS}
    headers["constants.h"] = "#pragma once\n" + "".join(
        f"constexpr int {name} = {value};\n" for name, value in constants.items()
    )
    headers["constants.h"] += f"constexpr bool kTrace = {'true' if trace else 'false'};\n"
    headers["variants.h"] = f"#pragma once\n{names}\n#define TILERT_VARIANTS(X) {cases}\n"
    return Source((FOLDER / "kernel.cu").read_text(encoding="utf-8"), headers, variants)


def _type(program: Program, op: Op, tags: Tags) -> str:
    """The instantiation of an op: its shape without addresses."""
    if isinstance(op, Linear):
        return _linear(program, op, tags)
    if isinstance(op, Attend):
        _check_heads(program, op)
        norms = ", ".join(_weight(program, b) for b in (op.q_norm, op.k_norm))
        return (
            f"Attend<{op.heads}, {op.kv_heads}, {op.head_dim}, {op.window}, {op.splits},"
            f" {_flag(all(b in tags.writers for b in (op.q, op.k, op.v)))}, {norms},"
            f" {_bits(op.eps)}, {_bits(op.scale)},"
            f" {', '.join(str(program.buffers[b].cols) for b in (op.q, op.k, op.v))}>"
        )
    if isinstance(op, LatentRope | LatentAttention):
        return _latent(program, op, tags)
    if isinstance(op, IndexRope | IndexScore | Select):
        return _index(program, op, tags)
    if isinstance(op, Combine):
        return (
            f"Combine<{op.kv_heads}, {op.group}, {op.head_dim}, {op.splits}, {op.window},"
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
    assert isinstance(op, NextToken), f"{type(op).__name__} has no CUDA form"
    return f"NextToken<{op.chunks}>"


def _check_heads(program: Program, op: Attend) -> None:
    d, slot = op.head_dim, program.machine.slot_bytes
    if d % 16 or not 16 <= d <= 128 or 2 * PAGE * d > slot or op.group > 16:
        raise UserError(
            f"the model has heads of {d} elements, {op.group} for each kv head; the back end 'cuda' accepts"
            f" multiples of 16 up to {min(128, slot // (2 * PAGE))}, and up to 16 for each; 'cpu' runs it"
        )


def _latent(program: Program, op: LatentRope | LatentAttention, tags: Tags) -> str:
    width, slot = op.lora + op.rope, program.machine.slot_bytes
    if op.lora % 16 or op.rope % 16 or op.nope % 4 or 2 * UNIT_ROWS * width > slot:
        raise UserError(
            f"the model has latents of {op.lora} and rotated keys of {op.rope} elements; the back end 'cuda'"
            f" accepts multiples of 16, together up to {slot // (2 * UNIT_ROWS)}; 'cpu' runs it"
        )
    assert op.q_col % 4 == 0, "a piece of a head is loaded as four words"
    if isinstance(op, LatentRope):
        return (
            f"LatentRope<{op.heads}, {op.nope}, {op.rope}, {op.lora}, {_flag(bool(op.interleave))},"
            f" {_flag(op.kv in tags.writers)}, {_weight(program, op.weight)}, {_bits(op.eps)}>"
        )
    return (
        f"LatentAttention<{op.tile_heads}, {op.nope}, {op.rope}, {op.lora}, {op.splits}, {op.topk},"
        f" {_flag(op.q in tags.writers)}, {_bits(op.scale)}>"
    )


def _index(program: Program, op: IndexRope | IndexScore | Select, tags: Tags) -> str:
    if isinstance(op, Select):
        return f"Select<{op.topk}, {op.splits}, {op.width}>"
    slot = program.machine.slot_bytes
    most = min(128, slot // PAGE - 4)
    if not 16 <= op.head_dim <= most or op.heads > 128:
        raise UserError(
            f"the indexer has {op.heads} heads of {op.head_dim} elements; the back end 'cuda' accepts up to"
            f" 128 heads of 16 to {most}; 'cpu' runs it"
        )
    assert op.q_col % 4 == 0, "a piece of a head is loaded as four words"
    assert op.index_scale != NONE, "keys are e4m3 with scales"
    if isinstance(op, IndexScore):
        return (
            f"IndexScore<{op.heads}, {op.head_dim}, {op.topk}, {op.splits}, {op.width},"
            f" {_flag(op.head_weights in tags.writers)}, {_bits(op.scale)}>"
        )
    norms = ", ".join(_weight(program, b) for b in (op.weight, op.shift))
    return (
        f"IndexRope<{op.heads}, {op.head_dim}, {op.rope}, {_flag(bool(op.interleave))},"
        f" {_flag(op.k in tags.writers)}, {norms}, {_bits(op.eps)}>"
    )


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _narrow(program: Program, buf: Buf) -> str:
    return _flag(program.buffers[buf].dtype is DType.BF16)


def _linear(program: Program, op: Linear, tags: Tags) -> str:
    x, rows = _input(program, op, tags), "Straight"
    if op.splits > 1:
        x = f"Merged<{op.splits}, {op.group}, {op.head_dim}, {_active(program, op)}>"
    if op.groups > 1:
        stride = op.splits * (op.head_dim + 2) if op.splits > 1 else op.x_stride
        rows = f"Blocks<{op.n // op.groups}, {stride}>"
    epilogue = ("kStore", "kAdd", "kGate")[op.epilogue]
    return _product(program, op, tags, epilogue, x, rows)


def _gate(program: Program, op: ExpertGate, tags: Tags) -> str:
    assert op.by_slot, "steps of many tokens are not for this back end"
    rows = f"InTurn<{op.n}, {op.tile_rows}, {op.top_k}>"
    return _product(program, op, tags, "kGate", _input(program, op, tags), rows)


def _down(program: Program, op: ExpertDown, tags: Tags) -> str:
    x = f"Weighted<{_flag(op.x in tags.writers)}, {op.k}, {op.top_k}>"
    return _product(program, op, tags, "kAdd", x, f"SideBySide<{op.n}, {op.top_k}>")


def _input(program: Program, op: Linear | ExpertGate, tags: Tags) -> str:
    checked = _flag(op.x in tags.writers)
    if op.norm != NONE:
        return f"Normed<{checked}, {_weight(program, op.norm)}, {_bits(op.eps)}>"
    return "Stored" if program.buffers[op.x].dtype is DType.BF16 else f"Plain<{checked}>"


def _product(
    program: Program, op: Linear | ExpertGate | ExpertDown, tags: Tags, epilogue: str, x: str, rows: str
) -> str:  # fmt: skip
    """A Linear of the kernel, which takes experts as well; x: its Input, rows: its Source."""
    y, bias = program.buffers[op.y], op.bias if isinstance(op, Linear) else NONE
    return (
        f"Linear<{op.k}, {_weight(program, op.w)}, {op.tile_rows}, {epilogue},"
        f" {_flag(op.y in tags.writers)}, {_narrow(program, op.y)}, {_flag(op.x_type != DType.F32)},"
        f" {y.cols}, {x}, {_weight(program, bias)}, {_scales(program, op)}, {rows}>"
    )


def _active(program: Program, op: Linear) -> str:
    """Which of the shares that a product merges hold something."""
    made = next(o for o in program.ops if isinstance(o, Attend | LatentAttention) and o.y == op.x)
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
    if rows % op.tile_rows and (cols < op.k or isinstance(op, ExpertDown)):
        raise UserError(
            f"weights have scales for blocks of {rows} rows, and tiles {op.tile_rows} rows; the back end"
            " 'cuda' accepts blocks of whole tiles"
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
