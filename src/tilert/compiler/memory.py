"""Where activations live: buffers whose lifetimes do not meet share storage; offsets in the arena.

Only buffers of the same type and shape share, so a region of one is a region of the other and the
dependency pass sees every reuse. Buffers of tagged words share with such alone: others would take their
tags from them, and so the rounding, in the programs of some numbers of tokens and not in others. Program
outputs (the logits, their peaks where tokens are drawn, and what the graph names) keep storage of their
own: the host reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import replace

from tilert.ir.dtype import DType
from tilert.ir.encode import field_kinds
from tilert.ir.program import NONE, Buf, Buffer, Kind, Op
from tilert.ops import Adjust, Argmax

ALIGN = 64  # bytes; a cache line, and more than any vector load needs


def place(
    buffers: list[Buffer],
    ops: list[Op],
    levels: Sequence[int],
    outputs: Collection[str] = (),
    tagged: Collection[Buf] = (),
) -> tuple[tuple[Buffer, ...], tuple[Op, ...]]:
    """Share, drop and number buffers again, give offsets, and rename the ops' operands.

    levels: of each op; those of one run at the same time, so none takes storage that another still reads.
    outputs: names of buffers that the host reads besides the logits. tagged: buffers whose words can have
    tags (ir/tags.py).
    """
    target = _share(buffers, ops, levels, outputs, tagged)
    kept: list[Buffer] = []
    number: dict[Buf, Buf] = {NONE: NONE}
    offset = 0
    for i, buffer in enumerate(buffers):
        if target[Buf(i)] != i:
            continue
        if buffer.kind is Kind.WORK:
            buffer = replace(buffer, offset=offset)
            offset += -(-buffer.bytes // ALIGN) * ALIGN
        number[Buf(i)] = Buf(len(kept))
        kept.append(buffer)
    for i in range(len(buffers)):
        number[Buf(i)] = number[target[Buf(i)]]
    kept = [replace(b, scale=number[b.scale]) if b.scale != NONE else b for b in kept]
    return tuple(kept), tuple(_rename(op, number) for op in ops)


def _operand_names(op: Op) -> list[str]:
    return [name for name, kind in field_kinds(type(op)) if kind == "Buf"]


def _share(
    buffers: list[Buffer],
    ops: list[Op],
    levels: Sequence[int],
    names: Collection[str],
    tagged: Collection[Buf],
) -> dict[Buf, Buf]:
    """For each buffer the one whose storage it takes (itself when it opens new storage)."""
    first: dict[Buf, int] = {}
    last: dict[Buf, int] = {}
    for level, op in zip(levels, ops, strict=True):
        for buf in (getattr(op, name) for name in _operand_names(op)):
            first.setdefault(buf, level)
            last[buf] = level
    target = {Buf(i): Buf(i) for i in range(len(buffers))}
    outputs = {op.logits for op in ops if isinstance(op, Argmax | Adjust)}
    outputs |= {op.peaks for op in ops if isinstance(op, Adjust)}
    outputs |= {buf for buf in first if buf != NONE and buffers[buf].name in names}
    free: list[tuple[int, Buf]] = []  # (last level that uses the storage, storage)
    work = [b for b in first if b != NONE and buffers[b].kind is Kind.WORK]
    for buf in sorted(work, key=lambda b: (first[b], b)):
        if buf in outputs:
            continue
        alike = *_shape(buffers[buf]), buf in tagged
        for slot, (end, storage) in enumerate(free):
            if end < first[buf] and (*_shape(buffers[storage]), storage in tagged) == alike:
                target[buf] = storage
                free[slot] = (last[buf], storage)
                break
        else:
            free.append((last[buf], buf))
    return target


def _shape(b: Buffer) -> tuple[DType, int, int]:
    return b.dtype, b.rows, b.cols


def _rename(op: Op, number: dict[Buf, Buf]) -> Op:
    names = _operand_names(op)
    return dataclasses.replace(op, **{name: number[getattr(op, name)] for name in names})  # type: ignore[type-var]
