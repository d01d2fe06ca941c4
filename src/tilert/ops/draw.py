"""Sampling on the device: the definition of a draw, and the ops that spread it over all workers.

A token weighs a whole number: 2^40 exp((score - best) / temperature), cut to an integer, by a formula
whose every operation IEEE 754 rounds in one way. Sums of integers do not depend on their order, so
whoever adds, in whatever order, finds the same border and the same token: engine/sampling.py on the
host, the reference bodies here, and the kernel.

Tokens stand in order of falling score, of equal scores in order of rising id. `top_k` keeps the first
k, the nucleus the fewest that reach the share top_p of the weight of those. The draw goes through the
kept tokens in order of ids and takes the first where the running weight exceeds uniform * total.

The border is found in two looks. All tokens are counted and weighed in bins of raw distance from the
best score (Bins, Totals); the bins tell the one in which the border lies, and only the tokens of that
one are ordered (Sift, Draw). With top_k and top_p together, where the second border depends on the first,
all tokens down to the bin of the first are candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tilert.ir.program import Buf, Cost, Op, Region
from tilert.ops.memory import Memory

BINS = 256
BINS_PER_UNIT = 8  # so that 32 units of raw score are told apart; the last bin has the rest
CONTROL_WORDS = 16
MAX_VOCAB = 1 << 18  # a kernel may add so many parts of weights in 32 bits
MASKED, BIASED, COUNTED = 1, 2, 4  # flags: which of mask, biases and tally count
IN_PROMPT = 1 << 30  # of a tally; the bits below count how often the token was made
CONTROLS = np.dtype(  # struct Controls of draw.cuh
    [(name, "<u4") for name in ("flags", "top_k")]
    + [(name, "<f4") for name in ("temperature", "repetition", "frequency", "presence")]
    + [(name, "<u4") for name in ("shift", "logprobs")]
    + [(name, "<u8") for name in ("share", "floor", "seed", "index")]
)
assert CONTROLS.itemsize == 4 * CONTROL_WORDS

WHOLE_BITS = 40  # the best token weighs 2^40, so 2^23 tokens do not overflow a sum
_BLOCK = 8192  # scores at a time, so that what is between two operations stays in the cache
_LOWEST = np.float32(-64)  # e^-64 weighs nothing
_LOG2E, _ROUND = np.float32(1.44269504088896340736), np.float32(3 << 22)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SERIES = tuple(  # Cephes expf
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
)  # fmt: skip


def row_words(chunk: int) -> int:
    """Words of a row of candidates; rows begin at multiples of 16 bytes."""
    return 4 + -(-chunk // 2) * 4


def weigh(scores: np.ndarray, best: np.float32, temperature: float) -> np.ndarray:
    """int64 weights of f32 scores, none of them above `best`; the best weighs 2^40."""
    out = np.empty(scores.shape, np.int64)
    for begin in range(0, scores.size, _BLOCK):
        part = slice(begin, begin + _BLOCK)
        x = scores[part] - best
        x /= np.float32(temperature)
        _exponentials(np.maximum(x, _LOWEST, out=x), out[part])
    return out


def _exponentials(x: np.ndarray, out: np.ndarray) -> None:
    n = x * _LOG2E
    n += _ROUND
    n -= _ROUND  # the nearest integer
    x -= n * _LN2_HIGH
    x -= n * _LN2_LOW
    y = _SERIES[0] * x
    for term in _SERIES[1:-1]:
        y += term
        y *= x
    y += _SERIES[-1]
    y *= x * x
    y += x
    y += np.float32(1)
    n += np.float32(WHOLE_BITS + 127)
    power = n.astype(np.int32)
    power <<= 23
    y *= power.view(np.float32)  # 2^(40 + n); this product is exact
    out[:] = y


def least_weight(min_p: float) -> int:
    """The least weight that min_p keeps."""
    numerator, denominator = float(np.float32(min_p)).as_integer_ratio()
    return -(-(numerator << WHOLE_BITS) // denominator)


def share_bits(top_p: float) -> int:
    """top_p in units of 2^-64, rounded up; 0 for all."""
    numerator, denominator = float(top_p).as_integer_ratio()
    return -(-(numerator << 64) // denominator) if top_p < 1.0 else 0


def nucleus_weight(total: int, share: int) -> int:
    """The weight that the nucleus must reach: the share of the total, rounded up."""
    return -(-total * share >> 64)


def random_word(seed: int, index: int, place: int) -> int:
    """53 random bits of the token at `place` of output `index`: from Philox 4x64-10, first word."""
    stream = np.random.Philox(key=np.asarray([seed, index], np.uint64), counter=place)
    return int(stream.random_raw()) >> 11


def aim(word: int, total: int) -> int:
    """The weight in [0, total) that 53 random bits point at; the draw gives the token that covers it."""
    return word * total >> 53


class _Range(NamedTuple):
    """Bins [low, high] hold the border; `tokens` lie in lower bins and are kept, with this weight."""

    low: int
    high: int
    tokens: int
    weight: int
    total: int  # weight of all tokens


def _controls(mem: Memory, buf: Buf) -> Any:
    return mem.read(buf, 0, 1, 0, CONTROL_WORDS).view(CONTROLS)[0, 0]


def _best(mem: Memory, peaks: Buf, chunks: int) -> np.float32:
    return mem.read(peaks, 0, 1, 0, chunks).max()  # of a NaN, if there is one


def _bins(scores: np.ndarray, best: np.float32) -> np.ndarray:
    distance = (best - scores) * np.float32(BINS_PER_UNIT)
    return np.where(distance < BINS - 1, distance, BINS - 1).astype(np.int64)


def _weights(scores: np.ndarray, best: np.float32, controls: Any) -> np.ndarray:
    weights = weigh(scores, best, controls["temperature"])
    return weights * (weights >= int(controls["floor"]))


def _range(totals: np.ndarray, controls: Any) -> _Range:
    """totals: [bins, 4] words."""
    counts, weights = totals[:, 0].cumsum(), joined(totals).cumsum()
    total, top_k, share = int(weights[-1]), int(controls["top_k"]), int(controls["share"])
    if top_k:
        border = int(counts.searchsorted(top_k))
    elif share:
        border = int(weights.searchsorted(nucleus_weight(total, share)))
    else:
        return _Range(BINS, BINS, 0, total, total)
    if not border or (top_k and share):
        return _Range(0, border, 0, 0, total)
    return _Range(border, border, int(counts[border - 1]), int(weights[border - 1]), total)


def order_keys(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """u64 of f32 scores without negative zeros: they rise with the order, the first token's is largest."""
    bits = scores.view(np.uint32)
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    return rising << np.uint64(32) | (0xFFFFFFFF - ids).astype(np.uint64)


def key_scores(keys: np.ndarray) -> np.ndarray:
    """The scores that keys were made of."""
    rising = (keys >> np.uint64(32)).astype(np.uint32)
    return np.where(rising >> 31, rising ^ np.uint32(1 << 31), ~rising).view(np.float32)


def key_ids(keys: np.ndarray) -> np.ndarray:
    """The ids that keys were made of."""
    return 0xFFFFFFFF - (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def halves(values: np.ndarray) -> np.ndarray:
    """i32 [n, 2]: low and high halves of values of 64 bits."""
    return np.ascontiguousarray(values).view(np.int32).reshape(-1, 2)


def joined(words: np.ndarray) -> np.ndarray:
    """int64 in columns 2 and 3 of a table of words."""
    return np.ascontiguousarray(words[:, 2:]).view(np.int64)[:, 0]


@dataclass(frozen=True, slots=True)
class _Chunked(Op):
    """Vocabulary ids in chunks, a tile for each."""

    @property
    def tiles(self) -> int:
        return -(-self.vocab // self.chunk)  # type: ignore[attr-defined]

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Vocabulary ids of tiles [lo, hi)."""
        return lo * self.chunk, min(hi * self.chunk, self.vocab)  # type: ignore[attr-defined]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        begin, end = self.span(lo, hi)
        return Cost(0, 0, end - begin)


@dataclass(frozen=True, slots=True)
class Adjust(_Chunked):
    """scores = logits after mask, biases and penalties; peaks[c] = the largest score of chunk c.

    logits, scores [1, vocab], peaks [1, tiles] f32. mask: a bit for each id, set where it is allowed;
    biases [1, vocab] f32; tally [1, vocab] i32: how often each token was made, 2^30 more when the
    prompt has it. Which of them count, and the penalties, is in controls. A NaN is the largest.
    """

    opcode: ClassVar[int] = 10
    logits: Buf
    controls: Buf
    mask: Buf
    biases: Buf
    tally: Buf
    scores: Buf
    peaks: Buf
    vocab: int
    chunk: int

    def reads(self, lo: int, hi: int) -> list[Region]:
        begin, end = self.span(lo, hi)
        states = [Region(b, 0, 1, begin, end) for b in (self.logits, self.biases, self.tally)]
        mask = Region(self.mask, 0, 1, begin // 32, -(-end // 32))
        return [Region(self.controls, 0, 1, 0, CONTROL_WORDS), mask, *states]

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.scores, 0, 1, *self.span(lo, hi)), Region(self.peaks, 0, 1, lo, hi)]

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        controls = _controls(mem, self.controls)
        for tile in range(lo, hi):
            begin, end = self.span(tile, tile + 1)
            scores = self._adjusted(mem, controls, begin, end) + np.float32(0)  # no negative zero
            mem.write(self.scores, 0, begin, scores[None])
            mem.write(self.peaks, 0, tile, scores.max()[None, None])

    def _adjusted(self, mem: Memory, controls: Any, begin: int, end: int) -> np.ndarray:
        scores = mem.read(self.logits, 0, 1, begin, end)[0]
        if controls["flags"] & MASKED:
            words = mem.read(self.mask, 0, 1, begin // 32, -(-end // 32))[0]
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[begin % 32 :]
            scores = np.where(allowed[: end - begin], scores, np.float32(-np.inf))
        if controls["flags"] & BIASED:
            scores = scores + mem.read(self.biases, 0, 1, begin, end)[0]
        if controls["flags"] & COUNTED:
            tally = mem.read(self.tally, 0, 1, begin, end)[0]
            penalty = np.float32(controls["repetition"])
            made = (tally & IN_PROMPT - 1).astype(np.float32)
            repeated = np.where(scores > 0, scores / penalty, scores * penalty)
            scores = np.where(tally != 0, repeated, scores)
            less = controls["frequency"] * made + controls["presence"]
            scores = np.where(made > 0, scores - less, scores)
        return scores


@dataclass(frozen=True, slots=True)
class Bins(_Chunked):
    """bins[c] = for each bin of chunk c: tokens, 0, and their weight as a low and a high word.

    Bin i holds the scores that lie i/8 to (i + 1)/8 below the best of all. scores [1, vocab], peaks
    [1, tiles] f32; bins [tiles, 4 * 256] i32.
    """

    opcode: ClassVar[int] = 11
    controls: Buf
    scores: Buf
    peaks: Buf
    bins: Buf
    vocab: int
    chunk: int

    def reads(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.controls, 0, 1, 0, CONTROL_WORDS), Region(self.peaks, 0, 1, 0, self.tiles),
                Region(self.scores, 0, 1, *self.span(lo, hi))]  # fmt: skip

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.bins, lo, hi, 0, 4 * BINS)]

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition; nothing is weighed when no score is a best one."""
        controls, best = _controls(mem, self.controls), _best(mem, self.peaks, self.tiles)
        for tile in range(lo, hi):
            scores = mem.read(self.scores, 0, 1, *self.span(tile, tile + 1))[0]
            out, sums = np.zeros((BINS, 4), np.int32), np.zeros(BINS, np.int64)
            if np.isfinite(best):
                at = _bins(scores, best)
                np.add.at(out[:, 0], at, 1)
                np.add.at(sums, at, _weights(scores, best, controls))
            out[:, 2:] = halves(sums)
            mem.write(self.bins, tile, 0, out.reshape(1, -1))


@dataclass(frozen=True, slots=True)
class Totals(Op):
    """totals = the sum of the bins of all chunks; a tile is `width` bins.

    bins [chunks, 4 * 256], totals [1, 4 * 256] i32, both in the layout of Bins.
    """

    opcode: ClassVar[int] = 12
    bins: Buf
    totals: Buf
    chunks: int
    width: int

    @property
    def tiles(self) -> int:
        return -(-BINS // self.width)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Words of the bins of tiles [lo, hi)."""
        return 4 * lo * self.width, 4 * min(hi * self.width, BINS)

    def reads(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.bins, 0, self.chunks, *self.span(lo, hi))]

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.totals, 0, 1, *self.span(lo, hi))]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        begin, end = self.span(lo, hi)
        return Cost(0, 0, (end - begin) * self.chunks)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        begin, end = self.span(lo, hi)
        words = mem.read(self.bins, 0, self.chunks, begin, end).reshape(self.chunks, -1, 4)
        out = words.sum(axis=0, dtype=np.int32)
        weights = np.ascontiguousarray(words[..., 2:]).view(np.int64)
        out[:, 2:] = halves(weights.sum(axis=0))
        mem.write(self.totals, 0, begin, out.reshape(1, -1))


@dataclass(frozen=True, slots=True)
class Sift(_Chunked):
    """The tokens of a chunk that the border may part, and the weight of those that it cannot.

    candidates[c] = their number, the bits of the best score of all, the weight of the chunk's tokens in
    bins before the border's as a low and a high word; then the candidates' keys in any order, low words
    first: above the score so that it compares as an integer, below 2^32 - 1 - id. scores [1, vocab],
    peaks [1, tiles] f32; totals [1, 4 * 256], candidates [tiles, row_words(chunk)] i32.
    """

    opcode: ClassVar[int] = 13
    controls: Buf
    scores: Buf
    peaks: Buf
    totals: Buf
    candidates: Buf
    vocab: int
    chunk: int

    def reads(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.controls, 0, 1, 0, CONTROL_WORDS), Region(self.peaks, 0, 1, 0, self.tiles),
                Region(self.totals, 0, 1, 0, 4 * BINS),
                Region(self.scores, 0, 1, *self.span(lo, hi))]  # fmt: skip

    def writes(self, lo: int, hi: int) -> list[Region]:
        return [Region(self.candidates, lo, hi, 0, row_words(self.chunk))]

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition; places behind the last candidate hold nothing."""
        controls, best = _controls(mem, self.controls), _best(mem, self.peaks, self.tiles)
        found = _range(mem.read(self.totals, 0, 1, 0, 4 * BINS).reshape(BINS, 4), controls)
        for tile in range(lo, hi):
            begin, end = self.span(tile, tile + 1)
            scores = mem.read(self.scores, 0, 1, begin, end)[0]
            row = np.zeros((1, row_words(self.chunk)), np.int32)
            row[0, 1] = best.view(np.int32)
            if np.isfinite(best):
                at = _bins(scores, best)
                ids = np.flatnonzero((at >= found.low) & (at <= found.high))
                row[0, 4 : 4 + 2 * ids.size] = halves(order_keys(scores[ids], begin + ids)).ravel()
                above = _weights(scores[at < found.low], best, controls).sum(keepdims=True)
                row[0, 0], row[:, 2:4] = ids.size, halves(above)
            mem.write(self.candidates, tile, 0, row)


@dataclass(frozen=True, slots=True)
class Draw(Op):
    """sampled = the token that is drawn, 0 when the best score is no number; tally[sampled] += 1 where
    tallies count. With `feed`, the next step is made ready: tokens = sampled, positions += 1.

    Operands as in Sift; sampled, tokens, positions [1, 1] i32.
    """

    opcode: ClassVar[int] = 14
    controls: Buf
    scores: Buf
    totals: Buf
    candidates: Buf
    tally: Buf
    counts: Buf
    sampled: Buf
    tokens: Buf
    positions: Buf
    vocab: int
    chunk: int
    chunks: int
    feed: int

    @property
    def tiles(self) -> int:
        return 1

    def reads(self, lo: int, hi: int) -> list[Region]:
        columns = {
            self.controls: CONTROL_WORDS, self.scores: self.vocab, self.totals: 4 * BINS,
            self.tally: self.vocab, self.positions: 1, self.counts: 2,
        }  # fmt: skip
        candidates = Region(self.candidates, 0, self.chunks, 0, row_words(self.chunk))
        return [candidates, *(Region(buf, 0, 1, 0, cols) for buf, cols in columns.items())]

    def writes(self, lo: int, hi: int) -> list[Region]:
        columns = {self.sampled: 1, self.tally: self.vocab}
        columns |= {self.tokens: 1, self.positions: 1} if self.feed else {}
        return [Region(buf, 0, 1, 0, cols) for buf, cols in columns.items()]

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost(0, 0, 4 * BINS + self.chunk)

    def reference(self, mem: Memory, lo: int, hi: int) -> None:
        """The definition."""
        controls = _controls(mem, self.controls)
        position = int(mem.read(self.positions, 0, 1, 0, 1)[0, 0])
        best = mem.read(self.candidates, 0, 1, 1, 2).view(np.float32)[0, 0]
        chosen = self._drawn(mem, controls, best, position) if np.isfinite(best) else 0
        for buf in (self.sampled, self.tokens)[: 1 + self.feed]:
            mem.write(buf, 0, 0, np.asarray([[chosen]], np.int32))
        if self.feed:
            mem.write(self.positions, 0, 0, np.asarray([[position + 1]], np.int32))
        if controls["flags"] & COUNTED:
            mem.write(self.tally, 0, chosen, mem.read(self.tally, 0, 1, chosen, chosen + 1) + 1)

    def _drawn(self, mem: Memory, controls: Any, best: np.float32, position: int) -> int:
        found = _range(mem.read(self.totals, 0, 1, 0, 4 * BINS).reshape(BINS, 4), controls)
        rows = mem.read(self.candidates, 0, self.chunks, 0, row_words(self.chunk))
        parts = [row[4 : 4 + 2 * row[0]].view(np.uint64) for row in rows]
        keys = np.concatenate(parts)
        cut = _cut(np.sort(keys)[::-1], best, controls, found)
        scores = mem.read(self.scores, 0, 1, 0, self.vocab)[0]
        kept = order_keys(scores, np.arange(self.vocab)) >= cut
        kept |= _bins(scores, best) < found.low
        running = np.cumsum(_weights(scores, best, controls) * kept)
        place = (position + int(controls["shift"])) % 2**32
        word = random_word(int(controls["seed"]), int(controls["index"]), place)
        return int(running.searchsorted(aim(word, int(running[-1])), "right"))


def _cut(keys: np.ndarray, best: np.float32, controls: Any, found: _Range) -> np.uint64:
    """The key of the last candidate that is kept. keys: of all candidates, falling."""
    total, top_k, share = found.total, int(controls["top_k"]), int(controls["share"])
    if top_k:
        keys = keys[: top_k - found.tokens]
    if share:
        running = found.weight + np.cumsum(_weights(key_scores(keys), best, controls))
        if top_k:
            total = int(running[-1])
        keys = keys[: int(running.searchsorted(nucleus_weight(total, share))) + 1]
    return keys[-1] if keys.size else np.uint64(2**64 - 1)
