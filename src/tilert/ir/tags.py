"""Tags: words that say themselves which write they come from, so that no signal must order them.

A signal that orders memory makes its worker wait until all its writes are seen everywhere: on a GPU
that streams, that is longer than the hand-off itself. Instead a *tagged* buffer holds floats, or numbers
of chosen experts, whose last eight bits name the op and step that wrote them. A reader that finds another
tag reads again; counters then only say when it is worth while to look, which may be before all have
signalled (told).

A buffer is tagged when everything that touches it can do that (Op.tagging, Op.tag_checking) and every
write covers it. An op that writes tagged buffers signals without ordering memory. Tag of a write:
1 + (rank + step * stride) % 255; memory starts as zeros, tag 0.

Words that nobody reads may be left out at run time (Op.leaves_out: shares of attention without positions).
What is left out only shrinks in a launch; so where all writers of a buffer leave out the same, a word is
either still zero or was written by each of them since somebody first read it. Not so in steps of several
passes, each of which has as many tokens as it finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tilert.ir.dtype import DType
from tilert.ir.program import NONE, Buf, Buffer, Kind, Op, Program, several_passes

TAGS = 255  # 1 to 255
MOST_TOKENS = 8  # of a step whose rows are all written, whether they hold tokens or not


@dataclass(frozen=True, slots=True)
class Tags:
    """For each tagged buffer the ops that write it, in table order; rank: of each such op. spared: ops that
    signal without order in a step in which nobody needs what they write (Op.spared)."""

    writers: dict[Buf, list[int]]
    rank: dict[int, int]
    stride: int
    spared: frozenset[int] = frozenset()

    def writer(self, buf: Buf, reader: int) -> int:
        """The op whose write a reader of the buffer expects: the last one before it."""
        return max(op for op in self.writers[buf] if op < reader)

    def before(self, buf: Buf, op: int) -> int:
        """The op whose write that of `op` replaces: of the step before, where it is the first."""
        writers = self.writers[buf]
        return writers[writers.index(op) - 1]

    def tag(self, op: int, step: int) -> int:
        """The tag of what the op writes in a step."""
        return 1 + (self.rank[op] + step * self.stride) % TAGS

    def silent(self, op: int) -> bool:
        """True when the op signals without ordering memory."""
        return op in self.rank

    def may_be_silent(self, op: int) -> bool:
        """True when it does so in some steps, at least."""
        return op in self.rank or op in self.spared

    def told(self, program: Program, reader: int) -> tuple[int, frozenset[int]]:
        """The op of which another, `reader`, finds out by words alone that all its runs are done, and the ops
        that read all of what was there before; (NONE, none) where there is no such op.

        Each tile of the reader reads every word that the op writes. A worker stores a word after all that it
        has read for it, so where all words are there nothing of the op is under way but its signals. What was
        written before is read, in each tile, by others; the op's runs have waited for those. So who has seen
        one signal of the op, or has run one of the others itself, cannot find words that are older still,
        whose tags might look the same.
        """
        length = len(program.ops)
        for buf in program.ops[reader].whole_reads():
            if buf not in self.writers or not _reads_all(program, reader, buf):
                continue
            last = self.writer(buf, reader)
            before = self.before(buf, last)
            between = (i % length for i in range(before + 1, last + length * (before >= last)))
            if others := frozenset(i for i in between if _reads_all(program, i, buf)):
                return last, others
        return NONE, frozenset()


def derive(program: Program) -> Tags:
    """The tags of a verified program. Machines without rings have none: their hand-offs are cheap.

    Readers signal after they have read, and the next writer waits for that: so a reader can only see
    the write that it expects or the one before. AssertionError when those had one tag, or when an op
    would signal without order what it wrote elsewhere.
    """
    writers: dict[Buf, list[int]] = {}
    if program.machine.slots and program.tokens <= MOST_TOKENS:
        writers = taggable(program.buffers, program.ops)
    ranks = {op: i for i, op in enumerate(sorted({op for ops in writers.values() for op in ops}))}
    stride = len(ranks)
    while any((ranks[ops[0]] + stride - ranks[ops[-1]]) % TAGS == 0 for ops in writers.values()):
        stride += 1  # the last write of a step and the first of the next
    spared = frozenset(i for i, op in enumerate(program.ops) if op.spared)
    tags = Tags(writers, ranks, stride, spared if writers and not program.held else frozenset())
    for buf, ops in writers.items():
        cycle = [ranks[op] for op in ops] + [ranks[ops[0]] + stride]
        name = program.buffers[buf].name
        assert all((b - a) % TAGS for a, b in pairwise(cycle)), f"two writes of '{name}' look alike"
        assert all(_writes(program.ops[op]) <= writers.keys() for op in ops), f"{name} is not alone"
    return tags


def taggable(buffers: Sequence[Buffer], ops: Sequence[Op]) -> dict[Buf, list[int]]:
    """Ops that write each buffer that can be tagged."""
    found: dict[Buf, list[int]] = {
        Buf(i): [] for i, b in enumerate(buffers)
        if b.kind is Kind.WORK and b.dtype in (DType.F32, DType.I32)
    }  # fmt: skip
    several = several_passes(ops)
    for index, op in enumerate(ops):
        for buf in {r.buffer for r in op.writes(0, op.tiles)} & found.keys():
            if buf in op.tagging() and _whole(buffers[buf], op, Buf(buf)):
                found[Buf(buf)].append(index)
            else:
                del found[Buf(buf)]
        for buf in {r.buffer for r in op.reads(0, op.tiles)} & found.keys():
            if buf not in op.tag_checking():
                del found[Buf(buf)]
    found = {
        buf: writers for buf, writers in found.items()
        if writers and len({ops[op].leaves_out for op in writers}) == 1
        and not (several and ops[writers[0]].leaves_out)
    }  # fmt: skip
    # A signal is ordered or not for all that its op writes.
    while half := {buf for buf, writers in found.items()
                   if any(_writes(ops[op]) - found.keys() for op in writers)}:  # fmt: skip
        found = {buf: writers for buf, writers in found.items() if buf not in half}
    return found


def _whole(b: Buffer, op: Op, buf: Buf) -> bool:
    regions = [r for r in op.writes(0, op.tiles) if r.buffer == buf]
    return sum(r.size for r in regions) == b.rows * b.cols


def _reads_all(program: Program, index: int, buf: Buf) -> bool:
    """Whether each tile of an op reads every word of a buffer."""
    op, b = program.ops[index], program.buffers[buf]
    return buf in op.whole_reads() and any(
        r.buffer == buf and (r.row_lo, r.row_hi, r.col_lo, r.col_hi) == (0, b.rows, 0, b.cols)
        for r in set(op.reads(0, 1)) & set(op.reads(op.tiles - 1, op.tiles))
    )


def _writes(op: Op) -> set[int]:
    return {r.buffer for r in op.writes(0, op.tiles)}
