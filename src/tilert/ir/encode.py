"""The binary and the text form of a program.

Binary: little-endian int32 words, then a JSON tail with the machine and the names, which no device
needs. The word layout is declared once, here, and generated into the C++ header by tilert.ops.
Text: one line per buffer, op, counter and run, for people and for golden tests.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tilert.ir.dtype import DType
from tilert.ir.machine import Machine
from tilert.ir.program import Buf, Buffer, Counter, Kind, Op, Program, Run, Wait

MAGIC = 0x454C4954  # "TILE"
VERSION = 1
# Names of the words of each record, in order. Tables follow the header in the order of its counts.
HEADER = (
    "magic", "version", "tokens", "outputs", "sequences", "context", "num_buffers", "num_op_words",
    "num_ops", "num_counters", "num_workers", "num_runs", "num_waits", "num_tail_bytes",
)  # fmt: skip
BUFFER = (
    "kind", "dtype", "rows", "cols", "device", "offset_lo", "offset_hi", "scale", "block_rows",
    "block_cols", "bank",
)  # fmt: skip
RUN = ("op", "lo", "hi", "signal", "ring", "wait_begin", "wait_end")
WAIT = ("counter", "threshold", "lag")
COUNTER = ("total", "device")


def field_kinds(op: type[Op]) -> list[tuple[str, str]]:
    """(name, 'Buf' | 'int' | 'float') of each field of an op class, in word order."""
    return [(f.name, str(f.type)) for f in dataclasses.fields(op)]  # type: ignore[arg-type]


def op_words(op: Op) -> list[int]:
    """The op as words: opcode, then its fields; floats as the bits of a float32."""
    words = [op.opcode]
    for name, kind in field_kinds(type(op)):
        value = getattr(op, name)
        words.append(struct.unpack("<i", struct.pack("<f", value))[0] if kind == "float" else value)
    return words


def _op_from_words(words: Sequence[int], classes: dict[int, type[Op]]) -> Op:
    kind = classes[words[0]]
    values = [
        struct.unpack("<f", struct.pack("<i", word))[0] if field == "float" else word
        for word, (_, field) in zip(words[1:], field_kinds(kind), strict=True)
    ]
    return kind(*values)


def to_bytes(program: Program) -> bytes:
    """The binary form. Equal programs give equal bytes."""
    runs = [run for queue in program.queues for run in queue]
    op_table = [op_words(op) for op in program.ops]
    waits = [wait for run in runs for wait in run.waits]
    tail = json.dumps(
        {
            "machine": dataclasses.asdict(program.machine),
            "names": [b.name for b in program.buffers],
        },
        separators=(",", ":"),
    ).encode()
    header = [
        MAGIC, VERSION, program.tokens, program.outputs, program.sequences, program.context,
        len(program.buffers), sum(map(len, op_table)), len(op_table), len(program.counters),
        len(program.queues), len(runs), len(waits), len(tail),
    ]  # fmt: skip
    words: list[int] = list(header)
    for b in program.buffers:
        low, high = b.offset & 0xFFFFFFFF, b.offset >> 32
        words += [b.kind, b.dtype, b.rows, b.cols, b.device, low - (1 << 32) * (low >> 31), high,
                  b.scale, *b.block, b.bank]  # fmt: skip
    words += [word for op in op_table for word in op]
    words += _starts(map(len, op_table))
    words += [word for c in program.counters for word in (c.total, c.device)]
    words += _starts(map(len, program.queues))
    bounds = _starts(len(run.waits) for run in runs)
    for run, (begin, end) in zip(runs, pairwise(bounds), strict=True):
        words += [run.op, run.lo, run.hi, run.signal, run.ring, begin, end]
    words += [word for wait in waits for word in wait]
    return np.asarray(words, dtype="<i4").tobytes() + tail


def _starts(lengths: Iterable[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def table(self, count: int, width: int) -> np.ndarray:
        size = 4 * count * width
        assert self.at + size <= len(self.data), f"program ends inside a table at byte {self.at}"
        words = np.frombuffer(self.data, "<i4", count * width, self.at).reshape(count, width)
        self.at += size
        return words


def from_bytes(data: bytes, op_classes: Iterable[type[Op]]) -> Program:
    """The program of its binary form; AssertionError when the bytes are not one."""
    read = _Reader(data)
    head = dict(zip(HEADER, read.table(1, len(HEADER))[0].tolist(), strict=True))
    assert head["magic"] == MAGIC and head["version"] == VERSION, "not a program of this version"
    buffer_rows = read.table(head["num_buffers"], len(BUFFER)).tolist()
    op_table = read.table(head["num_op_words"], 1)[:, 0].tolist()
    op_starts = read.table(head["num_ops"] + 1, 1)[:, 0].tolist()
    counters = tuple(Counter(*row) for row in read.table(head["num_counters"], 2).tolist())
    queue_starts = read.table(head["num_workers"] + 1, 1)[:, 0].tolist()
    run_rows = read.table(head["num_runs"], len(RUN)).tolist()
    waits = [Wait(*row) for row in read.table(head["num_waits"], len(WAIT)).tolist()]
    tail = json.loads(data[read.at : read.at + head["num_tail_bytes"]])
    classes = {cls.opcode: cls for cls in op_classes}
    runs = [
        Run(op, lo, hi, tuple(waits[b:e]), sig, ring) for op, lo, hi, sig, ring, b, e in run_rows
    ]
    return Program(
        _machine(tail["machine"]), head["tokens"], head["outputs"], head["sequences"], head["context"],
        tuple(_buffer(name, row) for name, row in zip(tail["names"], buffer_rows, strict=True)),
        tuple(_op_from_words(op_table[a:b], classes) for a, b in pairwise(op_starts)),
        counters,
        tuple(tuple(runs[a:b]) for a, b in pairwise(queue_starts)),
    )  # fmt: skip


def _machine(fields: dict[str, Any]) -> Machine:
    for name in ("cache_dtype", "index_dtype"):
        fields[name] = DType(fields[name])
    return Machine(**fields)


def _buffer(name: str, row: Sequence[int]) -> Buffer:
    kind, dtype, rows, cols, device, low, high, scale, block_rows, block_cols, bank = row
    offset = (low & 0xFFFFFFFF) | (high << 32)
    return Buffer(name, Kind(kind), DType(dtype), rows, cols, device, offset, Buf(scale),
                  (block_rows, block_cols), bank)  # fmt: skip


def to_text(program: Program) -> str:
    """The readable form: what `tilert compile --print` shows and golden tests hold."""
    m = program.machine
    lines = [
        f"program machine={m.name} workers={m.workers} devices={m.devices} ring={m.slots}x{m.slot_bytes}"
        f" tokens={program.tokens} outputs={program.outputs} sequences={program.sequences}"
        f" context={program.context}"
    ]
    for i, b in enumerate(program.buffers):
        extra = f" @{b.offset}" if b.kind is Kind.WORK else ""
        extra += f" scale=b{b.scale}/{b.block[0]}x{b.block[1]}" if b.scale >= 0 else ""
        extra += f" bank={b.bank}" if b.bank > 1 else ""
        extra += f" device={b.device}" if b.device else ""
        lines.append(
            f"b{i} {b.kind.name.lower()} {b.dtype.name.lower()}[{b.rows}, {b.cols}] {b.label}{extra}"
        )
    for i, op in enumerate(program.ops):
        lines.append(f"o{i} {_op_text(op)} tiles={op.tiles}")
    lines += [f"c{i} total={c.total} device={c.device}" for i, c in enumerate(program.counters)]
    for worker, queue in enumerate(program.queues):
        lines.append(f"worker {worker}")
        lines += [f"  {_run_text(run, program)}" for run in queue]
    return "\n".join(lines) + "\n"


def _op_text(op: Op) -> str:
    parts = [type(op).__name__.lower()]
    for name, kind in field_kinds(type(op)):
        value = getattr(op, name)
        if kind == "Buf":
            parts += [f"{name}=b{value}"] if value >= 0 else []
        else:
            parts.append(f"{name}={value:g}" if kind == "float" else f"{name}={value}")
    return " ".join(parts)


def _run_text(run: Run, program: Program) -> str:
    name = type(program.ops[run.op]).__name__.lower()
    waits = "".join(f" wait c{w.counter}>={w.threshold}{'-' if w.lag else ''}" for w in run.waits)
    signal = f" signal c{run.signal}" if run.signal >= 0 else ""
    ring = f" ring={run.ring}" if run.ring >= 0 else ""
    return f"o{run.op} {name} [{run.lo}, {run.hi}){waits}{signal}{ring}"
