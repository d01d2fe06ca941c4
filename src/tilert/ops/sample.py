"""Greedy choice of the next token on the device, and the bookkeeping that lets steps follow each other.

A step may be one of guessing and verifying: all its tokens but the first are guesses for what comes after
the one before, and the model's choices say how many of them are right (Accept). Then the layer that
guesses (models/mtp.py) runs in the same step, first over the tokens that count, then over each guess but
the last (Guess).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilert.ir.program import Buf, Cost, Op, Region
from tilert.ops.memory import Memory, count


def _best(mem: Memory, part: Buf, rows: int, chunks: int) -> np.ndarray:
    """i32 [1, rows]: the best of all chunks of each row; of equal ones the first."""
    parts = mem.read(part, 0, rows, 0, 2 * chunks).reshape(rows, chunks, 2)
    best = parts[..., 0].argmax(axis=1)
    return parts[np.arange(rows), best, 1].astype(np.int32)[None]


@dataclass(frozen=True, slots=True)
class Argmax(Op):
    """part[:, 2 c] and part[:, 2 c + 1] = largest logit of chunk c and its index (the lowest of ties).

    logits [rows, vocab] f32, part [rows, 2 * tiles] f32; an index is exact in f32 up to 2^24.
    """

    opcode: ClassVar[int] = 7
    logits: Buf
    part: Buf
    counts: Buf
    rows: int
    vocab: int
    chunk: int

    @property
    def tiles(self) -> int:
        return -(-self.vocab // self.chunk)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Vocabulary ids of tiles [lo, hi)."""
        return lo * self.chunk, min(hi * self.chunk, self.vocab)

    def reads(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.span(lo, hi)
        return [Region(self.counts, 0, 1, 0, 2), Region(self.logits, 0, self.rows, begin, end)]

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.part, 0, self.rows, 2 * lo, 2 * hi)]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        begin, end = self.span(lo, hi)
        return Cost(0, 0, (end - begin) * self.rows)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        rows = count(mem, self.counts, 1)
        for tile in range(lo, hi):
            begin, end = self.span(tile, tile + 1)
            logits = mem.read(self.logits, 0, rows, begin, end)
            best = logits.argmax(axis=1)
            values = np.take_along_axis(logits, best[:, None], axis=1)
            mem.write(
                self.part, 0, 2 * tile, np.concatenate([values, best[:, None] + begin], axis=1)
            )


@dataclass(frozen=True, slots=True)
class NextToken(Op):
    """sampled[o] = the best of all chunks. With `feed`, the next step is made ready: tokens[o] =
    sampled[o] and positions[o] += 1 (row o of the outputs then is token o of the step).

    part [rows, 2 * chunks] f32; sampled, tokens, positions [1, >= rows] i32.
    """

    opcode: ClassVar[int] = 8
    part: Buf
    sampled: Buf
    tokens: Buf
    positions: Buf
    counts: Buf
    rows: int
    chunks: int
    feed: int

    @property
    def tiles(self) -> int:
        return 1

    def reads(self, lo: int, hi: int) -> list[Region]:
        out = [Region(self.counts, 0, 1, 0, 2), Region(self.part, 0, self.rows, 0, 2 * self.chunks)]
        return [*out, Region(self.positions, 0, 1, 0, self.rows)] if self.feed else out

    def writes(self, lo: int, hi: int) -> list[Region]:
        fed = (self.tokens, self.positions) if self.feed else ()
        return [Region(b, 0, 1, 0, self.rows) for b in (self.sampled, *fed)]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, self.rows * self.chunks)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition; chunks are in id order, so the first of equal values has the lowest id."""
        rows = count(mem, self.counts, 1)
        chosen = _best(mem, self.part, rows, self.chunks)
        mem.write(self.sampled, 0, 0, chosen)
        if self.feed:
            mem.write(self.tokens, 0, 0, chosen)
            mem.write(self.positions, 0, 0, mem.read(self.positions, 0, 1, 0, rows) + 1)


@dataclass(frozen=True, slots=True)
class Accept(Op):
    """What a step over n tokens comes to when all but the first were guessed: with `following[i]` the best
    of all chunks of row i, the guess tokens[i + 1] is right when it is following[i] and those before it are.

    a is the number of right guesses. sampled = following[: a + 1], then -1. The next step's first token is
    tokens[0] = following[a], and positions += a + 1. For the layer that guesses: places = the positions
    before that, kept = (a + 1, 1), which are the rows that it takes and those whose logits are wanted,
    last[0] = a, the row to guess from, and place[0] = its position. part [rows, 2 * chunks] f32; kept
    [1, 2], last and place [1, 1], all others [1, >= rows] i32. Rows of `following` and `places` behind n
    stay as they are.
    """

    opcode: ClassVar[int] = 28
    part: Buf
    sampled: Buf
    tokens: Buf
    positions: Buf
    counts: Buf
    following: Buf
    places: Buf
    kept: Buf
    last: Buf
    place: Buf
    rows: int
    chunks: int

    @property
    def tiles(self) -> int:
        return 1

    def reads(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.counts, 0, 1, 0, 2), Region(self.part, 0, self.rows, 0, 2 * self.chunks),
                *(Region(b, 0, 1, 0, self.rows) for b in (self.tokens, self.positions))]  # fmt: skip

    def writes(self, lo: int, hi: int) -> list[Region]:
        whole = (self.sampled, self.positions, self.following, self.places)
        return [*(Region(b, 0, 1, 0, self.rows) for b in whole), Region(self.kept, 0, 1, 0, 2),
                *(Region(b, 0, 1, 0, 1) for b in (self.tokens, self.last, self.place))]  # fmt: skip

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, self.rows * self.chunks)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        rows = count(mem, self.counts, 1)
        following = _best(mem, self.part, rows, self.chunks)
        right = mem.read(self.tokens, 0, 1, 1, rows)[0] == following[0, :-1]
        accepted = int(np.logical_and.accumulate(right).sum())
        positions = mem.read(self.positions, 0, 1, 0, rows)
        sampled = np.full((1, self.rows), -1, np.int32)
        sampled[0, : accepted + 1] = following[0, : accepted + 1]
        made = {
            self.sampled: sampled, self.following: following, self.places: positions,
            self.tokens: following[:, accepted : accepted + 1], self.positions: positions + accepted + 1,
            self.kept: np.asarray([[accepted + 1, 1]]), self.last: np.asarray([[accepted]]),
            self.place: positions[:, accepted : accepted + 1],
        }  # fmt: skip
        for buf, values in made.items():
            mem.write(buf, 0, 0, values)


@dataclass(frozen=True, slots=True)
class Guess(Op):
    """The best of all chunks is guess number `column` of the next step: tokens[column] = sampled[0] = it.
    What guesses the one after takes it at the next position: positions[0] += 1.

    part [1, 2 * chunks] f32; tokens [1, > column], sampled and positions [1, 1] i32.
    """

    opcode: ClassVar[int] = 29
    part: Buf
    sampled: Buf
    tokens: Buf
    positions: Buf
    column: int
    chunks: int

    @property
    def tiles(self) -> int:
        return 1

    def reads(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.part, 0, 1, 0, 2 * self.chunks), Region(self.positions, 0, 1, 0, 1)]

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.tokens, 0, 1, self.column, self.column + 1),
                *(Region(b, 0, 1, 0, 1) for b in (self.sampled, self.positions))]  # fmt: skip

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, self.chunks)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        guess = _best(mem, self.part, 1, self.chunks)
        mem.write(self.sampled, 0, 0, guess)
        mem.write(self.tokens, 0, self.column, guess)
        mem.write(self.positions, 0, 0, mem.read(self.positions, 0, 1, 0, 1) + 1)
