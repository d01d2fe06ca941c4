"""From a row of logits to a token: masks, penalties, truncation and the draw, in numpy.

A draw depends on the seed, the output's index and the token's place only (Philox, a counter-based
generator), so it is the same whatever else runs beside it and wherever a sequence is resumed, and on
a device that samples by itself: ops/draw.py defines weights, borders and the draw in integers, and
`fill` hands a sampler's state over. Among equals the lowest id wins. Truncation sets weights to zero
instead of gathering what is left: on a whole vocabulary that is several times faster. Knows no text
and no stop strings.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tilert.engine.core import SamplingParams
from tilert.errors import UserError
from tilert.ops import draw
from tilert.ops.logprobs import Found

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

    def steady(self, steps: int) -> int:
        """How many of the next `steps` tokens a device can sample by itself: none beyond the place where
        min_tokens ends."""
        left = self.params.min_tokens - self.length
        return min(steps, left) if left > 0 else steps

    def fill(self, state: Mapping[str, np.ndarray], position: int) -> None:
        """Write what the ops of ops/draw.py need into their state buffers. position: of the token
        that the next step begins with."""
        p = self.params
        held_back = self.length < p.min_tokens
        masked, biased = self.allowed is not None or held_back, self.bias_ids.size > 0
        counted = self.seen is not None or self.made is not None
        flags = draw.MASKED * masked | draw.BIASED * biased | draw.COUNTED * counted
        greedy, seed, index = p.greedy, *self.key.tolist()
        top_k = 1 if greedy else p.top_k if 0 < p.top_k < self.vocab_size else 0
        state["controls"][0] = np.asarray((
            flags, top_k, 1.0 if greedy else p.temperature, p.repetition_penalty, p.frequency_penalty,
            p.presence_penalty, (self.length - position) % 2**32, self._best_told,
            0 if greedy else draw.share_bits(p.top_p), 0 if greedy else draw.least_weight(p.min_p),
            seed, index,
        ), draw.CONTROLS)[None].view(np.int32)  # fmt: skip
        if masked:
            mask = np.ones(32 * state["mask"].shape[1], bool)
            if self.allowed is not None:
                mask[:] = False
                mask[self.allowed] = True
            if held_back:
                mask[self.banned] = False
            state["mask"][0] = np.packbits(mask, bitorder="little").view(np.int32)
        if biased:
            state["biases"][:] = 0
            state["biases"][0, self.bias_ids] = self.bias
        if counted:
            tally = state["tally"][0]
            tally[:] = 0 if self.made is None else self.made.counts
            if self.seen is not None:
                tally[self.seen.ids] |= draw.IN_PROMPT

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
        return _with_logprobs(token, Found.of(logits, token, self._best_told))

    def commit(self, token_id: int, report: np.ndarray | None = None) -> SampledToken:
        """Account for a token that was chosen elsewhere; report: what ops/logprobs.py tells of its step."""
        self._count(token_id)
        if report is None:
            return SampledToken(token_id, float("nan"), [])
        return _with_logprobs(token_id, Found.told(report, self._best_told))

    @property
    def _best_told(self) -> int:
        """Of how many of the best tokens the log-probabilities are told."""
        return min(self.params.logprobs or 0, self.vocab_size)

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
        weights = draw.weigh(logits, best, p.temperature)
        if 0 < p.top_k < logits.size:
            border = np.partition(logits, -p.top_k)[-p.top_k]
            _cut(weights, logits, border, p.top_k)
        if p.min_p:
            weights *= weights >= draw.least_weight(p.min_p)
        if p.top_p < 1.0:
            _cut(weights, logits, *_nucleus(weights, logits, best, p))
        return _covering(weights, self._uniform())

    def _uniform(self) -> float:
        """A multiple of 2^-53 in [0, 1) that belongs to this seed, output and place."""
        seed, index = self.key.tolist()
        return draw.random_word(seed, index, self.length) * 2.0**-53


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


def _cut(weights: np.ndarray, logits: np.ndarray, border: np.float32, count: int) -> None:
    """Set all weights to zero but those of the `count` largest logits, the smallest of them `border`."""
    keep = logits >= border
    if surplus := np.count_nonzero(keep) - count:
        keep[np.flatnonzero(logits == border)[-surplus:]] = False
    weights *= keep


def _nucleus(
    weights: np.ndarray, logits: np.ndarray, best: np.float32, p: SamplingParams
) -> tuple[np.float32, int]:
    """(smallest logit, count) of the fewest best tokens that reach the share top_p of all weights.

    Holtzman et al. 2019; the token that crosses the share is kept. Tokens that were truncated before
    have no weight.
    """
    total = int(weights.sum())
    goal = draw.nucleus_weight(total, draw.share_bits(p.top_p))
    # What lies below the average weight of the rest cannot be needed: all of it together is less
    # than the rest. Half of that average leaves room for rounding, and few logits are to be sorted.
    floor = (total - goal) // (2 * weights.size)
    ordered = np.sort(logits[weights > floor])[::-1]
    running = draw.weigh(ordered, best, p.temperature).cumsum()
    last = int(running.searchsorted(goal))
    border = ordered[last]
    equal = last + 1 - int(np.count_nonzero(ordered > border))
    return border, int(np.count_nonzero(logits > border)) + equal


def _covering(weights: np.ndarray, uniform: float) -> int:
    """The first position where the running sum exceeds uniform * total."""
    sums = np.add.reduceat(weights, np.arange(0, weights.size, BLOCK)).cumsum()
    goal = draw.aim(int(uniform * 2**53), int(sums[-1]))
    block = int(sums.searchsorted(goal, "right"))
    rest = goal - (int(sums[block - 1]) if block else 0)
    inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum()
    return block * BLOCK + int(inside.searchsorted(rest, "right"))


def _with_logprobs(token: int, found: Found) -> SampledToken:
    """The token with log-softmax values of the raw logits: its own and those of the best."""
    logprob = found.logprob(found.logit)
    entries = [(t, found.logprob(logit), rank) for rank, (t, logit) in enumerate(found.top, 1)]
    if found.rank > len(entries):
        entries.append((token, logprob, found.rank))
    return SampledToken(token, logprob, entries)
