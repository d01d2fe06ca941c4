"""The nouns of a request: what is asked for, and what comes back, in the shape that vLLM made known.

Parameters are checked here, once, as far as that needs no model; ids beyond the vocabulary are found
by the sampler. Text appears only as something to carry: stop strings are matched by who detokenizes.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from tilert.errors import UserError
from tilert.ops.logprobs import MOST as MAX_LOGPROBS  # alternatives per token that may be asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop; names and defaults are vLLM's.

    Order of effects: allowed_token_ids, min_tokens, logit_bias, repetition, frequency and presence
    penalties, then greedy (temperature 0) or temperature, min_p, top_k, top_p and the draw.
    Raises UserError for values outside their range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None or -1: a fresh one for each output
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: to the end of the context
    min_tokens: int = 0
    logprobs: int | None = None  # alternatives per token; 0: the chosen token only
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, 64)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens is {self.min_tokens}; it must not exceed max_tokens, {self.max_tokens}"
            )
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "skip_special_tokens",
            "detokenize",
        ):
            if not isinstance(getattr(self, name), bool):
                raise UserError(
                    f"{name} is {_show(getattr(self, name))}; accepted are True and False"
                )
        if self.n > 1 and self.greedy:
            raise UserError(
                f"n is {self.n} with temperature {self.temperature:g}; greedy decoding gives one"
                " output, so n must be 1"
            )
        self._take_lists()
        if self.seed == -1:  # as in vLLM and llama.cpp: a fresh seed per request
            object.__setattr__(self, "seed", None)

    def _take_lists(self) -> None:
        """Check what holds several values, and keep a copy that cannot change under a request."""
        if self.stop is not None and not isinstance(self.stop, str):
            object.__setattr__(self, "stop", _several("stop", self.stop, "strings"))
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        if any(not isinstance(s, str) or not s for s in stops):
            raise UserError(f"stop is {_show(self.stop)}; accepted are non-empty strings")
        if stops and not self.detokenize:
            raise UserError(f"stop is {_show(self.stop)} with detokenize False; it needs the text")
        for name in ("stop_token_ids", "allowed_token_ids"):
            if (given := getattr(self, name)) is not None:
                tokens = _several(name, given, "token ids")
                object.__setattr__(self, name, tuple(_token(name, t) for t in tokens))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UserError("allowed_token_ids is empty; it must name at least one token")
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(
                f"logit_bias is {_show(self.logit_bias)}; accepted are mappings from token id to number"
            )
        for bias in self.logit_bias.values():
            _number("logit_bias", bias, -100.0, 100.0)
        bias = {_token("logit_bias", t): float(b) for t, b in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias)

    @property
    def greedy(self) -> bool:
        """True when the best token is taken, without a draw."""
        return self.temperature < 1e-5

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """From named values as JSON has them: the keys of logit_bias may be digits in a string.

        Raises UserError for a name that is not a field.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(str(name) for name in values if name not in known):
            raise UserError(
                f"sampling parameter '{unknown[0]}' is not known; accepted are {', '.join(sorted(known))}"
            )
        values = dict(values)
        if isinstance(bias := values.get("logit_bias"), Mapping):
            values["logit_bias"] = {
                int(t) if isinstance(t, str) and t.isdecimal() else t: b for t, b in bias.items()
            }
        return cls(**values)


def _several(name: str, value: Any, what: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise UserError(f"{name} is {_show(value)}; accepted are lists of {what}")
    return tuple(value)


def _token(name: str, value: Any) -> int:
    _integer(name, value, 0, 2**31 - 1)
    return int(value)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    span = f"{low} or more" if high is None else f"from {low} to {high}"
    if not _is(value, Integral) or value < low or (high is not None and value > high):
        raise UserError(f"{name} is {_show(value)}; accepted are integers {span}")


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    span = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
    if (
        not _is(value, Real) or not low <= value <= high or (above and value == low)
    ):  # NaN fails, too
        raise UserError(f"{name} is {_show(value)}; accepted are numbers {span}")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _show(value: Any) -> str:
    """What was given, on one line and cut short when it is long."""
    plain = isinstance(value, Real) and not isinstance(value, int)  # a numpy float without its type
    return str(value) if plain else reprlib.repr(value)


@dataclass(slots=True)
class Logprob:
    """Natural logarithm of a token's probability under the raw logits; rank 1 is the best token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One output of a request; logprobs holds one mapping from token id per token."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # stop, length or abort
    stop_reason: int | str | None = None  # the token id or the string that stopped it


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of time.perf_counter(), and counts of tokens over all outputs.

    With speculation, `drafted_tokens` were guessed (by whom says `speculative_method`), and `verified` has
    for each step that verified some how many tokens it gave: one, and one more for each right guess.
    """

    arrival_time: float
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    drafted_tokens: int = 0
    verified: list[int] = field(default_factory=list)
    speculative_method: str | None = None

    @property
    def accepted_tokens(self) -> int:
        """Drafted tokens that became part of an output."""
        return sum(self.verified) - len(self.verified)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds per token after the first, over all outputs; None for fewer than two tokens."""
        if (
            self.first_token_time is None
            or self.last_token_time is None
            or self.generated_tokens < 2
        ):
            return None
        return (self.last_token_time - self.first_token_time) / (self.generated_tokens - 1)


@dataclass(slots=True)
class RequestOutput:
    """A request and all of its outputs."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))
