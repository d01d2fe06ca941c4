"""From a row of logits to a token: masks, penalties, truncation and the draw, in numpy.

A draw depends on the seed, the output's index and the token's place only (Philox, a counter-based
generator), so it is the same whatever else runs beside it and wherever a sequence is resumed.
Among equals the lowest id wins. Truncation sets weights to zero instead of gathering what is left:
on a whole vocabulary that is several times faster. Knows no text and no stop strings.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tilert.engine.core import SamplingParams
from tilert.errors import UserError

BLOCK = 256  # weights per partial sum: a draw adds these up, then looks into one block


class SampledToken(NamedTuple):
    """A token and its log-probability under the raw logits; NaN and [] when logprobs were not asked for.

    top: (token id, log-probability, rank) of the best tokens and of this one, in order of rank.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float, int]]


def check_finite(logit: float) -> None:
    """Raises UserError when the largest logit of a row is not a number that can be."""
    if not np.isfinite(logit):
        raise UserError(
            f"the model's largest logit is {logit}: its weights are damaged, or overflow in their type"
        )


class Sampler:
    """The state of one output sequence: counts of tokens for penalties, and its random stream.

    index tells the n outputs of one request apart. A sampler that is given the tokens made so far
    through `commit` goes on exactly like the one that made them (with the same seed).
    Raises UserError for token ids in `params` that the vocabulary does not have.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        eos_token_ids: Sequence[int],
        index: int = 0,
    ) -> None:
        self.params, self.vocab_size = params, vocab_size
        self.length = 0  # tokens made so far
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self.key = np.asarray([seed % 2**64, index], dtype=np.uint64)
        stops = self._inside("stop_token_ids", params.stop_token_ids or ())
        # Like vLLM, the end of sequence is held back by min_tokens even under ignore_eos.
        self.banned = np.union1d(stops, [t for t in eos_token_ids if t < vocab_size]).astype(int)
        self.allowed = None
        if params.allowed_token_ids is not None:
            self.allowed = self._inside("allowed_token_ids", params.allowed_token_ids)
        bias = params.logit_bias or {}
        self.bias_ids = self._inside("logit_bias", bias)
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        self.seen = self.made = None
        if params.repetition_penalty != 1.0:
            self.seen = _Counts(vocab_size, prompt_token_ids)
        if params.frequency_penalty or params.presence_penalty:
            self.made = _Counts(vocab_size)
        choice = np.arange(vocab_size) if self.allowed is None else self.allowed
        if params.min_tokens and not np.setdiff1d(choice, self.banned).size:
            raise UserError(
                f"min_tokens is {params.min_tokens}, but every allowed token would end the output;"
                " min_tokens must be 0 or allowed_token_ids must name another token"
            )

    def _inside(self, name: str, token_ids: Iterable[int]) -> np.ndarray:
        ids = np.asarray([*token_ids], dtype=np.int64)
        if ids.size and ids.max() >= self.vocab_size:
            raise UserError(
                f"{name} names token {ids.max()}; this model accepts 0 to {self.vocab_size - 1}"
            )
        return ids

    @property
    def is_plain_greedy(self) -> bool:
        """True when the largest raw logit is the next token and nothing else is asked for."""
        p = self.params
        changed = p.logprobs is not None or self.allowed is not None or self.bias_ids.size
        penalties = self.seen is not None or self.made is not None
        return p.greedy and not changed and not penalties and self.length >= p.min_tokens

    def sample(self, logits: np.ndarray) -> SampledToken:
        """Choose the next token from raw logits [vocab_size], which stay as they are; account for it."""
        assert logits.shape == (self.vocab_size,), f"{logits.shape} logits of {self.vocab_size}"
        logits = np.asarray(logits, dtype=np.float32)
        adjusted = self._adjust(logits)
        best = int(adjusted.argmax())  # of a NaN, if there is one
        check_finite(adjusted[best])
        token = best if self.params.greedy else self._draw(adjusted, adjusted[best])
        self._count(token)
        if self.params.logprobs is None:
            return SampledToken(token, float("nan"), [])
        return _with_logprobs(token, logits, min(self.params.logprobs, self.vocab_size))

    def commit(self, token_id: int) -> SampledToken:
        """Account for a token that was chosen elsewhere."""
        self._count(token_id)
        return SampledToken(token_id, float("nan"), [])

    def _count(self, token: int) -> None:
        self.length += 1
        for counts in (self.seen, self.made):
            if counts is not None:
                counts.add(token)

    def _adjust(self, logits: np.ndarray) -> np.ndarray:
        """Logits after masks, bias and penalties; the argument itself when there are none."""
        p, held_back = self.params, self.length < self.params.min_tokens
        if self.allowed is not None:
            out = np.full_like(logits, -np.inf)
            out[self.allowed] = logits[self.allowed]
        elif held_back or self.bias_ids.size or self.seen or self.made:
            out = logits.copy()
        else:
            return logits
        if held_back:
            out[self.banned] = -np.inf
        out[self.bias_ids] += self.bias
        if self.seen:  # Keskar et al. 2019 (CTRL): divide what is positive, multiply the rest
            ids, penalty = self.seen.ids, np.float32(p.repetition_penalty)
            seen = out[ids]
            out[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self.made:
            ids = self.made.ids
            frequency = np.float32(p.frequency_penalty) * self.made.counts[ids]
            out[ids] -= frequency + np.float32(p.presence_penalty)
        return out

    def _draw(self, logits: np.ndarray, best: np.float32) -> int:
        """One token from the tempered, then truncated distribution."""
        p = self.params
        weights = np.exp((logits - best) / np.float32(p.temperature))  # the best token weighs 1
        if p.min_p:
            weights *= weights >= np.float32(p.min_p)
        if 0 < p.top_k < logits.size:
            border = np.partition(logits, -p.top_k)[-p.top_k]
            _cut(weights, logits, border, p.top_k)
        if p.top_p < 1.0:
            _cut(weights, weights, *_nucleus(weights, p.top_p))
        return _reach(weights, self._uniform(), "right")

    def _uniform(self) -> float:
        """A multiple of 2^-53 in [0, 1) that belongs to this seed, output and place."""
        stream = np.random.Philox(key=self.key, counter=self.length)
        return (int(stream.random_raw()) >> 11) * 2.0**-53


class _Counts:
    """How often each token occurred; adding one is O(1), and `ids` are the distinct ones."""

    def __init__(self, vocab_size: int, token_ids: Sequence[int] = ()) -> None:
        found = np.bincount(np.asarray(token_ids, dtype=np.int64), minlength=vocab_size)
        self.counts = found.astype(np.float32)  # [vocab_size], exact up to 2^24
        distinct = np.flatnonzero(found)
        self._ids = np.empty(vocab_size, np.int64)
        self._ids[: distinct.size] = distinct
        self._size = distinct.size

    def add(self, token: int) -> None:
        if not self.counts[token]:
            self._ids[self._size] = token
            self._size += 1
        self.counts[token] += 1

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self._size]


def _cut(weights: np.ndarray, values: np.ndarray, border: np.float32, count: int) -> None:
    """Set all weights to zero but those of the `count` largest values, the smallest of them `border`."""
    keep = values >= border
    if surplus := np.count_nonzero(keep) - count:
        keep[np.flatnonzero(values == border)[-surplus:]] = False
    weights *= keep


def _nucleus(weights: np.ndarray, top_p: float) -> tuple[np.float32, int]:
    """(smallest weight, count) of the fewest best tokens that reach the share top_p of all weights.

    Holtzman et al. 2019; the token that crosses the share is kept.
    """
    total = weights.sum(dtype=np.float64)
    # What lies below the average weight of the rest cannot be needed: all of it together is less
    # than the rest. Half of that average leaves room for rounding, and few weights are to be sorted.
    floor = 0.5 * (1.0 - top_p) * total / weights.size
    enough = weights >= floor
    few = np.count_nonzero(enough) < weights.size // 8  # to gather more costs more than to sort all
    best = np.sort(weights[enough] if few else weights)[::-1]
    count = _reach(best, top_p, "left", total) + 1
    return best[count - 1], count


def _reach(
    weights: np.ndarray, share: float, side: Literal["left", "right"], total: float | None = None
) -> int:
    """The first position where the running sum reaches share * total (left) or exceeds it (right).

    total: the sum of the weights, unless the share is one of something larger. Rounding may leave
    the target just above the sum; then it is the last position with a positive weight.
    """
    sums = np.add.reduceat(weights, np.arange(0, weights.size, BLOCK), dtype=np.float64).cumsum()
    target = share * (sums[-1] if total is None else total)
    block = _crossing(sums, target, side)
    rest = target - (sums[block - 1] if block else 0.0)
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + _crossing(inside, rest, side)


def _crossing(sums: np.ndarray, target: float, side: Literal["left", "right"]) -> int:
    # No further than the first place that has the whole sum: what follows there has no weight.
    return min(int(sums.searchsorted(target, side)), int(sums.searchsorted(sums[-1], "left")))


def _with_logprobs(token: int, logits: np.ndarray, count: int) -> SampledToken:
    """The token with log-softmax values of the raw logits: its own and the `count` best."""
    best = logits.max()
    log_sum = float(best) + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
    top: list[int] = []
    if count:
        at = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
        top = at[np.argsort(-logits[at], kind="stable")][:count].tolist()
    entries = [(t, float(logits[t]) - log_sum, rank) for rank, t in enumerate(top, 1)]
    logprob = float(logits[token]) - log_sum
    if token not in top:
        better = int(np.count_nonzero(logits > logits[token]))
        equal = int(np.count_nonzero(logits[:token] == logits[token]))
        entries.append((token, logprob, better + equal + 1))
    return SampledToken(token, logprob, entries)
