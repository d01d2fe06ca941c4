"""Log-probabilities of a step on the device: what the drawn token and the best ones have under the raw
logits, before masks, biases, penalties and temperature.

The weights are those of draw.py at temperature 1, whole numbers whose sum does not depend on its order, so
a host that adds up the same logits gets the same bits: a device hands over logits and the sum of weights,
and `Found.logprob` makes the logarithm of both. Tokens stand in order of falling logit, of equal logits in
order of rising id; the rank of a token is its place there, from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tilert.ir.program import Buf, Cost, Op, Region
from tilert.ops import draw
from tilert.ops.memory import Memory

MOST = 20  # best tokens of a step that can be told
MAX_CHUNK = 8192  # logits of a tile of Survey: its candidates lie in shared memory
HEAD = 4  # words of a row of Survey before its keys
SURVEY_WORDS = HEAD + 2 * MOST
HALF_BITS = 30  # of the sum of weights in a word: no word of a report has all its bits set
REPORT = np.dtype(  # what Report writes; in logprobs.cuh by the number of the word
    [("rank", "<i4"), ("logit", "<f4"), ("best", "<f4"), ("total", "<u4", (2,)),
     ("top", [("id", "<i4"), ("logit", "<f4")], (MOST,))]
)  # fmt: skip
REPORT_WORDS = REPORT.itemsize // 4
REPORT_HEAD = REPORT_WORDS - 2 * MOST  # words before the best tokens


class Found(NamedTuple):
    """Of one step: rank and logit of its token, the largest logit, the sum of the weights of all tokens
    (the best weighs 2^40), and (id, logit) of the best tokens in order."""

    rank: int
    logit: float
    best: float
    total: int
    top: list[tuple[int, float]]

    def logprob(self, logit: float) -> float:
        """Natural logarithm of the probability of a token with that logit.

        Off by less than 1e-6 beside an exact log-softmax of the same f32 logits: every weight is rounded
        to 3e-7 of itself, and cut by less than 2^-40 of the best one's.
        """
        return logit - self.best - math.log(self.total * 2.0**-draw.WHOLE_BITS)

    @classmethod
    def of(cls, logits: np.ndarray, token: int, count: int) -> Found:
        """The definition, of f32 logits [vocab] without NaN; count: of best tokens."""
        best = logits.max()
        top: list[int] = []
        if count:
            at = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
            top = at[np.argsort(-logits[at], kind="stable")][:count].tolist()
        ahead = np.count_nonzero(logits > logits[token])
        ahead += np.count_nonzero(logits[:token] == logits[token])
        total = int(draw.weigh(logits, best, 1.0).sum())
        pairs = [(t, float(logits[t])) for t in top]
        return cls(int(ahead) + 1, float(logits[token]), float(best), total, pairs)

    @classmethod
    def told(cls, words: np.ndarray, count: int) -> Found:
        """What a device tells in the words of Report."""
        row: Any = np.ascontiguousarray(words, np.int32).view(REPORT)[0]
        low, high = row["total"].tolist()
        total = low | high << HALF_BITS
        top = row["top"][:count].tolist()
        return cls(int(row["rank"]), float(row["logit"]), float(row["best"]), total, top)


def _best(mem: Memory, part: Buf, chunks: int) -> np.float32:
    """The largest logit, from what Argmax leaves of the chunks."""
    return mem.read(part, 0, 1, 0, 2 * chunks)[0, ::2].max()


def _asked(mem: Memory, controls: Buf) -> int:
    """How many of the best tokens are to be told."""
    words = mem.read(controls, 0, 1, 0, draw.CONTROL_WORDS)
    return int(words.view(draw.CONTROLS)[0, 0]["logprobs"])


@dataclass(frozen=True, slots=True)
class Survey(Op):
    """survey[c] = of chunk c: how many tokens stand before the drawn one, 0, the weight of all its tokens as
    a low and a high word, then the keys (draw.py: Sift) of its best in falling order; 0 behind the last.

    logits [1, vocab] f32; part [1, 2 * tiles] f32 from Argmax; controls as in draw.py, sampled [1, 1] i32;
    survey [tiles, SURVEY_WORDS] i32.
    """

    opcode: ClassVar[int] = 15
    logits: Buf
    part: Buf
    controls: Buf
    sampled: Buf
    survey: Buf
    vocab: int
    chunk: int

    @property
    def tiles(self) -> int:
        return -(-self.vocab // self.chunk)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Vocabulary ids of tiles [lo, hi)."""
        return lo * self.chunk, min(hi * self.chunk, self.vocab)

    def reads(self, lo: int, hi: int) -> list[Region]:
        columns = {self.logits: self.vocab, self.part: 2 * self.tiles,
                   self.controls: draw.CONTROL_WORDS, self.sampled: 1}  # fmt: skip
        return [Region(buf, 0, 1, 0, cols) for buf, cols in columns.items()]

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.survey, lo, hi, 0, SURVEY_WORDS)]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        begin, end = self.span(lo, hi)
        return Cost(0, 0, end - begin)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        best, count = _best(mem, self.part, self.tiles), _asked(mem, self.controls)
        token = int(mem.read(self.sampled, 0, 1, 0, 1)[0, 0])
        logits = mem.read(self.logits, 0, 1, 0, self.vocab)[0] + np.float32(0)  # no negative zero
        own = draw.order_keys(logits[token : token + 1], np.asarray([token]))[0]
        for tile in range(lo, hi):
            begin, end = self.span(tile, tile + 1)
            found = draw.order_keys(logits[begin:end], np.arange(begin, end))
            row = np.zeros((1, SURVEY_WORDS), np.int32)
            row[0, 0] = np.count_nonzero(found > own)
            weights = draw.weigh(logits[begin:end], best, 1.0)
            row[:, 2:HEAD] = draw.halves(weights.sum(keepdims=True))
            top = np.sort(found)[::-1][:count]
            row[0, HEAD : HEAD + 2 * top.size] = draw.halves(top).ravel()
            mem.write(self.survey, tile, 0, row)


@dataclass(frozen=True, slots=True)
class Report(Op):
    """report = what the step's token and the best tokens have (REPORT: logits, rank, the sum of weights in
    halves of 30 bits); only then the next step is made ready: tokens = sampled, positions += 1.

    survey from Survey; logits, part, controls, sampled as there; tokens, positions [1, 1] i32, report
    [1, REPORT_WORDS] i32. Behind the last of the tokens that are asked for it holds zeros.
    """

    opcode: ClassVar[int] = 16
    logits: Buf
    part: Buf
    survey: Buf
    controls: Buf
    counts: Buf
    sampled: Buf
    tokens: Buf
    positions: Buf
    report: Buf
    vocab: int
    chunks: int

    @property
    def tiles(self) -> int:
        return 1

    def reads(self, lo: int, hi: int) -> list[Region]:
        columns = {self.logits: self.vocab, self.part: 2 * self.chunks, self.sampled: 1,
                   self.controls: draw.CONTROL_WORDS, self.positions: 1, self.counts: 2}  # fmt: skip
        survey = Region(self.survey, 0, self.chunks, 0, SURVEY_WORDS)
        return [survey, *(Region(buf, 0, 1, 0, cols) for buf, cols in columns.items())]

    def writes(self, lo: int, hi: int) -> list[Region]:
        columns = {self.report: REPORT_WORDS, self.tokens: 1, self.positions: 1}
        return [Region(buf, 0, 1, 0, cols) for buf, cols in columns.items()]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, self.chunks * SURVEY_WORDS)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        sampled = mem.read(self.sampled, 0, 1, 0, 1)
        token, count = int(sampled[0, 0]), _asked(mem, self.controls)
        rows = mem.read(self.survey, 0, self.chunks, 0, SURVEY_WORDS)
        out = np.zeros(1, REPORT)
        out["rank"] = 1 + rows[:, 0].sum()
        out["logit"] = mem.read(self.logits, 0, 1, token, token + 1) + np.float32(0)
        out["best"] = _best(mem, self.part, self.chunks)
        total = int(draw.joined(rows[:, :HEAD]).sum())
        out["total"] = total & (1 << HALF_BITS) - 1, total >> HALF_BITS
        found = np.ascontiguousarray(rows[:, HEAD:]).view(np.uint64).ravel()
        top = np.sort(found[found > 0])[::-1][:count]
        out["top"]["id"][0, : top.size] = draw.key_ids(top)
        out["top"]["logit"][0, : top.size] = draw.key_scores(top)
        mem.write(self.report, 0, 0, out.view(np.int32)[None])
        mem.write(self.tokens, 0, 0, sampled)
        mem.write(self.positions, 0, 0, mem.read(self.positions, 0, 1, 0, 1) + 1)
