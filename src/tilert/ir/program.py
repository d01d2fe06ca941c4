"""The tile program: plain data that every back end runs and that the verifier proves sound.

A program is a table of buffers, a table of ops in their sequential meaning (running the ops in
table order, one tile after another, *is* what the program computes), and one queue of runs per
worker. A run executes consecutive tiles of one op. It starts when its waits hold and signals one
counter after all its writes. Counters only grow: in step s (from 0) a wait (counter, threshold,
lag) holds when

    value >= max(0, s - lag) * total(counter) + threshold          (lag 1 in step 0: always holds)

Nothing is reset between steps. This file knows nothing of particular ops: those are in tilert.ops.
"""

from __future__ import annotations

import dataclasses
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import ClassVar, NamedTuple, NewType

from tilert.ir.dtype import DType
from tilert.ir.machine import Machine

Buf = NewType("Buf", int)  # index into Program.buffers
NONE = Buf(-1)  # no such operand
PAGE = 64  # positions per page of the KV cache
JOIN = "+"
PAST = 1 << 30  # cache rows of earlier steps are [-PAST, 0)


class Kind(IntEnum):
    """Who owns a buffer's bytes, and who may write them."""

    WEIGHT = 0  # read only, bound by name to a tensor of the checkpoint
    STATE = 1  # written by the host between launches, or by the program
    CACHE = 2  # keys or values of all positions, paged; rows are relative to this step's tokens
    WORK = 3  # activations, in the device's arena at `offset`


@dataclass(frozen=True, slots=True)
class Buffer:
    """A 2-D array. A CACHE has `cols` values per position; its rows are capacity in positions.

    `scale` names the buffer of block scales of an FP8 weight (one f32 per `block` of rows x cols).
    `bank` matrices are stacked in the rows of a weight of which an op picks some at run time
    (experts); each begins blocks of its own. A weight may be several tensors that lie one after
    another; see `parts`.
    """

    name: str
    kind: Kind
    dtype: DType
    rows: int
    cols: int
    device: int = 0
    offset: int = -1
    scale: Buf = NONE
    block: tuple[int, int] = (0, 0)
    bank: int = 1

    @property
    def bytes(self) -> int:
        """Size in bytes when stored densely."""
        return self.rows * self.cols * self.dtype.bytes

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of a weight, whose elements follow one another; a name joins theirs by JOIN."""
        return tuple(self.name.split(JOIN))

    @property
    def label(self) -> str:
        """The name for people: of many tensors the first, and how many more there are."""
        more = self.name.count(JOIN)
        return self.name if more < 4 else f"{self.name.partition(JOIN)[0]}{JOIN}{more}"

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Rows and columns of the block scales."""
        rows, cols = self.block
        return self.bank * -(-(self.rows // self.bank) // rows), -(-self.cols // cols)


class Scale(NamedTuple):
    """Block scales of an FP8 weight: the tensor that holds them, and rows and columns that share one."""

    name: str
    block: tuple[int, int]


class Region(NamedTuple):
    """A rectangle of a buffer: rows [row_lo, row_hi) and columns [col_lo, col_hi).

    Rows of a CACHE count from the first token of this step: [0, T) are the step's own positions and
    [-PAST, 0) those of earlier steps, in every sequence.
    """

    buffer: int
    row_lo: int
    row_hi: int
    col_lo: int
    col_hi: int

    def overlaps(self, other: Region) -> bool:
        """True when both touch at least one common element."""
        return (
            self.buffer == other.buffer
            and self.row_lo < other.row_hi
            and other.row_lo < self.row_hi
            and self.col_lo < other.col_hi
            and other.col_lo < self.col_hi
        )

    @property
    def size(self) -> int:
        """Elements."""
        return (self.row_hi - self.row_lo) * (self.col_hi - self.col_lo)


def hulls(regions: Iterable[Region]) -> list[Region]:
    """Of each buffer the smallest region that holds all of those given."""
    found: dict[int, Region] = {}
    for r in regions:
        own = found.get(r.buffer, r)
        found[r.buffer] = Region(
            r.buffer, min(own.row_lo, r.row_lo), max(own.row_hi, r.row_hi),
            min(own.col_lo, r.col_lo), max(own.col_hi, r.col_hi),
        )  # fmt: skip
    return list(found.values())


class Cost(NamedTuple):
    """What a range of tiles moves and computes: streamed bytes, bytes of KV cache, f32 operations."""

    bytes: int
    cache_bytes: int = 0
    flops: int = 0


class Op(ABC):
    """One op of the program: a frozen dataclass whose fields are buffers (Buf), ints and floats.

    Subclasses live in tilert.ops and declare everything about the op in one place.
    """

    opcode: ClassVar[int]
    __slots__ = ()

    def __post_init__(self) -> None:
        # Floats are what the binary form can hold, so that every back end sees the same number.
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if f.type == "float":
                value = struct.unpack("<f", struct.pack("<f", getattr(self, f.name)))[0]
                object.__setattr__(self, f.name, value)

    # True when the loader can stream what the op reads, because no activation chooses its address.
    streamed: ClassVar[bool] = True

    @property
    @abstractmethod
    def tiles(self) -> int:
        """How many tiles the op is cut into."""

    @property
    def choice(self) -> Buf:
        """The buffer whose values choose the rows of weights that the op streams; NONE when their
        addresses are known beforehand. Every run that streams them waits itself for its writers."""
        return NONE

    @property
    def passes(self) -> int:
        """How often a tile streams its rows in turn, each time of the matrix that a choice names. The
        same for every choice, so that tickets are known beforehand."""
        return 1

    @property
    def turns(self) -> int:
        """How often a tile goes through all its passes: once for each token that has a choice of its own."""
        return 1

    def weight_rows(self, lo: int, hi: int) -> int:
        """Rows of weights, of all matrices together, that tiles [lo, hi) stream in one pass."""
        return 0

    def pass_bytes(self, dtype_bytes: int) -> int:
        """Bytes of the weights that the first tile streams in one pass."""
        return self.cost(0, 1, dtype_bytes, 0).bytes

    @abstractmethod
    def reads(self, lo: int, hi: int) -> list[Region]:
        """Regions that tiles [lo, hi) may read. Weights and host-only state are included."""

    @abstractmethod
    def writes(self, lo: int, hi: int) -> list[Region]:
        """Regions that tiles [lo, hi) write, all of them completely (for the tokens of the step)."""

    @property
    def leaves_out(self) -> tuple[int, ...]:
        """What decides which words of its outputs an op does not write, as nobody reads them; see
        ir/tags.py. Empty: it writes all."""
        return ()

    @property
    def spared(self) -> int:
        """Where no token of a step sees more than so many positions, nobody needs what the op writes: a back
        end may leave it out there, and signal without order. 0: it is always needed."""
        return 0

    def tagging(self) -> tuple[Buf, ...]:
        """Buffers whose words the op can write with a tag; see tags.py."""
        return ()

    def tag_checking(self) -> tuple[Buf, ...]:
        """Buffers whose words the op reads again until they have the tag that it expects."""
        return ()

    def whole_reads(self) -> tuple[Buf, ...]:
        """Of those the ones of which each tile reads every word that its regions name, in any step."""
        return ()

    @abstractmethod
    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        """What tiles [lo, hi) cost with weights of `dtype_bytes` at `context` past positions."""


class Wait(NamedTuple):
    """Start only when `counter` has reached `threshold` signals of step s - lag."""

    counter: int
    threshold: int
    lag: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """Tiles [lo, hi) of one op on one worker: wait, compute, signal once.

    `ring` is the ticket of the first ring slot that its weights take: the number of units that the
    worker's queue streams before it in one step; -1 on machines that have no ring.
    """

    op: int
    lo: int
    hi: int
    waits: tuple[Wait, ...] = ()
    signal: int = -1
    ring: int = -1


@dataclass(frozen=True, slots=True)
class Counter:
    """`total` runs signal it in each step; it lives in the memory of `device`."""

    total: int
    device: int = 0


def several_passes(ops: Sequence[Op]) -> bool:
    """True when the ops of a step count positions from several buffers, which only the run knows."""
    return len({getattr(op, "positions", NONE) for op in ops} - {NONE}) > 1


@dataclass(frozen=True)
class Program:
    """Everything a back end needs besides the bytes of weights and caches.

    tokens: most tokens of one step; outputs: most rows of logits of one step; sequences: rows of
    the page table; context: most positions of one sequence.
    """

    machine: Machine
    tokens: int
    outputs: int
    sequences: int
    context: int
    buffers: tuple[Buffer, ...]
    ops: tuple[Op, ...]
    counters: tuple[Counter, ...]
    queues: tuple[tuple[Run, ...], ...]

    @cached_property
    def buffer_ids(self) -> dict[str, Buf]:
        """Buffer index by name."""
        return {buffer.name: Buf(i) for i, buffer in enumerate(self.buffers)}

    @property
    def arena_bytes(self) -> int:
        """Bytes of the activation arena of the largest device."""
        return max((b.offset + b.bytes for b in self.buffers if b.kind is Kind.WORK), default=0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that the program is bound to, each counted once."""
        return sum(b.bytes for b in self.buffers if b.kind is Kind.WEIGHT)

    @property
    def held(self) -> bool:
        """True when a step has several passes: past cache rows are not streamed before all waits of the run
        that reads them hold."""
        return several_passes(self.ops)

    def weight_itemsize(self, op: Op) -> int:
        """Bytes per element of the op's weights; the widest when they differ, 4 when it has none."""
        weights = [b for b in self.operands(op) if b.kind is Kind.WEIGHT]
        matrices = [b.dtype.bytes for b in weights if b.rows > 1]
        return max(matrices or [b.dtype.bytes for b in weights], default=4)

    def ring_units(self, op: Op, lo: int, hi: int) -> int:
        """Ring slots that the weights of tiles [lo, hi) take in turn; each turn of a tile starts a new slot,
        and as many of its passes share one as fit.

        Of a tile that is larger than a slot, all rows are streamed in pieces side by side.
        """
        if not op.streamed:
            return 0
        size, rows = op.pass_bytes(self.weight_itemsize(op)), max(1, op.weight_rows(0, 1))
        slot = self.machine.slot_bytes
        if size <= slot:
            passes = -(-op.passes // (slot // size)) if size else 0
            return (hi - lo) * op.turns * passes
        return (hi - lo) * op.turns * op.passes * -(-(size // rows) // (slot // rows))

    def operands(self, op: Op) -> list[Buffer]:
        """The buffers that an op names, in the order of its fields."""
        return [self.buffers[i] for i in self.operand_ids(op) if i != NONE]

    @staticmethod
    def operand_ids(op: Op) -> list[Buf]:
        """Indices of the buffers that an op names, NONE included."""
        return [getattr(op, f.name) for f in dataclasses.fields(op) if f.type == "Buf"]  # type: ignore[arg-type]
