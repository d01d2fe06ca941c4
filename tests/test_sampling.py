"""Sampling: every feature against a slow reference, the truncations against transformers, the
distributions of draws, and the sentences about bad parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tilert import SamplingParams
from tilert.engine.core import RequestMetrics
from tilert.engine.sampling import Sampler
from tilert.errors import UserError

VOCAB = 997  # not a multiple of the block of a draw, and more than one block
EOS = (2, 7)


def rows(count: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng([seed, vocab]).standard_normal((count, vocab))
    return (noise * scale).astype(np.float32)


def sampler(vocab: int = VOCAB, prompt: Sequence[int] = (5, 6, 5), **params: Any) -> Sampler:
    return Sampler(SamplingParams(max_tokens=None, **params), prompt, vocab, EOS)


def uniform(seed: int, index: int, place: int) -> float:
    """The draw by its definition: the top 53 bits of the first word of a Philox block."""
    words = np.random.Philox(key=np.asarray([seed, index], np.uint64), counter=place)
    return int(words.random_raw()) / 2**11 // 1 / 2**53


def adjusted(
    p: SamplingParams, logits: np.ndarray, prompt: Sequence[int], made: Sequence[int]
) -> list[float]:
    """Masks, bias and penalties, token by token in double precision."""
    out = []
    for token, value in enumerate(logits.tolist()):
        if p.allowed_token_ids is not None and token not in p.allowed_token_ids:
            value = -math.inf
        if len(made) < p.min_tokens and token in {*EOS, *(p.stop_token_ids or ())}:
            value = -math.inf
        value += (p.logit_bias or {}).get(token, 0.0)
        if token in {*prompt, *made}:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        count = list(made).count(token)
        value -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        out.append(value)
    return out


def distribution(p: SamplingParams, logits: Sequence[float]) -> list[float]:
    """Temperature, min_p, top_k and top_p on a sorted list; probabilities by token id."""
    best = max(logits)
    weights = [math.exp((x - best) / p.temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda t: (-logits[t], t))
    order = [t for t in order if weights[t] >= p.min_p]
    order = order[: p.top_k] if p.top_k > 0 else order
    total, running, kept = sum(weights[t] for t in order), 0.0, []
    for token in order:
        kept.append(token)
        running += weights[token]
        if running >= p.top_p * total and p.top_p < 1:
            break
    return [weights[t] / running if t in set(kept) else 0.0 for t in range(len(weights))]


def chosen(probabilities: Sequence[float], share: float) -> int:
    """The token in whose stretch of the unit interval, in order of ids, the share falls."""
    running = 0.0
    for token, probability in enumerate(probabilities):
        running += probability
        if running > share:
            return token
    raise AssertionError(f"{running} is not more than {share}")


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.2},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k above the vocabulary": {"top_k": 5000},
    "top_p": {"top_p": 0.8},
    "small top_p": {"top_p": 1e-6},
    "large top_p": {"top_p": 0.9999},
    "min_p": {"min_p": 0.1},
    "min_p of one": {"min_p": 1.0},
    "all truncations": {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "repetition": {"repetition_penalty": 1.7},
    "reward of repetition": {"repetition_penalty": 0.6},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": -1.5},
    "all penalties": {
        "repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4, "top_k": 20
    },
    "bias": {"logit_bias": {11: 8.0, 500: 9.5, 996: 100.0, 3: -100.0}},
    "allowed": {"allowed_token_ids": [2, 9, 44, 996]},
    "allowed with top_k": {"allowed_token_ids": [9, 44, 996], "top_k": 9, "top_p": 0.9},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": [9], "logit_bias": {2: 50, 7: 50, 9: 50}},
    "ignore_eos": {"min_tokens": 6, "ignore_eos": True, "logit_bias": {2: 50, 7: 50}},
    "everything": {
        "temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
        "frequency_penalty": 0.2, "presence_penalty": 0.1, "min_tokens": 3, "logit_bias": {4: 3.0},
        "allowed_token_ids": list(range(0, 900, 2)),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("greedy", [False, True])
def test_each_feature_gives_the_tokens_of_the_slow_reference(name: str, greedy: bool) -> None:
    given = FEATURES[name] | {"seed": 12345} | ({"temperature": 0} if greedy else {})
    prompt, made = [5, 6, 5, 100], []
    subject = sampler(prompt=prompt, **given)
    for logits in np.tile(rows(4, scale=2.0), (3, 1)):  # rows come again, so that penalties matter
        before = logits.copy()
        values = adjusted(subject.params, logits, prompt, made)
        if greedy:
            expected = values.index(max(values))
        else:
            share = uniform(12345, 0, len(made))
            expected = chosen(distribution(subject.params, values), share)
        token = subject.sample(logits).token_id
        assert token == expected, f"place {len(made)}"
        assert np.array_equal(logits, before)
        made.append(token)


def kept(vocab: int, logits: np.ndarray, **params: Any) -> set[int]:
    """Every token that a draw can give: one draw in the middle of each token's stretch."""
    subject = sampler(vocab=vocab, **params)
    weights = np.asarray(
        distribution(SamplingParams(temperature=subject.params.temperature), logits.tolist())
    )
    found = set()
    for share in (np.arange(4000) + 0.5) / 4000:
        subject._uniform = lambda share=share: float(share)  # type: ignore[method-assign]
        found.add(subject._draw(logits, logits.max()))
    assert weights[list(found)].min() > 0
    return found


@pytest.mark.parametrize(
    "given",
    [
        {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.6, "top_k": 12},
        {"temperature": 1.8, "top_p": 0.9}, {"top_k": 15, "top_p": 0.8},
    ],
)  # fmt: skip
def test_truncation_keeps_the_tokens_that_transformers_keeps(given: dict[str, Any]) -> None:
    for logits in rows(4, vocab=60, scale=1.5):
        steps: LogitsProcessorList = LogitsProcessorList()
        steps.append(TemperatureLogitsWarper(float(given.get("temperature", 1.0))))
        if "min_p" in given:
            steps.append(MinPLogitsWarper(given["min_p"]))
        if "top_k" in given:
            steps.append(TopKLogitsWarper(given["top_k"]))
        if "top_p" in given:
            steps.append(TopPLogitsWarper(given["top_p"]))
        scores = steps(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits)[None])  # type: ignore[arg-type]
        expected = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
        assert kept(60, logits, **given) == expected


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    prompt = [5, 6, 5, 100]
    subject = sampler(prompt=prompt, repetition_penalty=penalty)
    subject.commit(42)
    for logits in rows(3):
        ids = torch.tensor([[*prompt, 42]])
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(logits)[None])  # type: ignore[arg-type]
        np.testing.assert_array_equal(subject._adjust(logits), expected[0].numpy())


@pytest.mark.parametrize(
    "given",
    [
        {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_p": 0.6}, {"top_k": 4}, {"min_p": 0.15},
        {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.03},
    ],
)  # fmt: skip
def test_draws_follow_the_distribution(given: dict[str, Any]) -> None:
    """Chi-square against the reference; the seeds are fixed, so that this passes always or never."""
    draws = 20_000
    logits = rows(1, vocab=24, scale=1.2)[0]
    subject = sampler(vocab=24, prompt=[1], seed=99, **given)
    counts = Counter(subject.sample(logits).token_id for _ in range(draws))
    expected = np.asarray(distribution(subject.params, logits.tolist())) * draws
    assert set(counts) <= set(np.flatnonzero(expected).tolist())
    often = [t for t in range(24) if expected[t] >= 5]
    chi_square = sum((counts[t] - expected[t]) ** 2 / expected[t] for t in often)
    freedom = len(often) - 1
    # Wilson and Hilferty: the cube root is close to normal; 3.1 standard deviations, about 1 in 1000.
    spread = 2 / (9 * freedom)
    assert chi_square < freedom * (1 - spread + 3.1 * math.sqrt(spread)) ** 3


def test_seeds_and_indices_give_independent_draws() -> None:
    logits = np.zeros(16, np.float32)
    for seed, index in ((2, 0), (1, 1)):
        first = Sampler(SamplingParams(seed=1), [1], 16, EOS)
        second = Sampler(SamplingParams(seed=seed), [1], 16, EOS, index=index)
        same = sum(first.sample(logits)[0] == second.sample(logits)[0] for _ in range(4000))
        assert abs(same - 250) < 4 * math.sqrt(250)


def test_a_seed_gives_the_same_tokens_in_every_version() -> None:
    subject = sampler(vocab=1000, seed=2024, temperature=0.9)
    logits = np.zeros(1000, np.float32)
    made = [subject.sample(logits).token_id for _ in range(8)]
    assert made == [753, 515, 133, 723, 40, 53, 668, 441]


def test_draws_do_not_depend_on_what_runs_beside() -> None:
    given: dict[str, Any] = {"top_p": 0.9, "repetition_penalty": 1.2}
    logits = rows(12)
    alone = sampler(seed=3, **given)
    expected = [alone.sample(row).token_id for row in logits]
    beside, other = sampler(seed=3, **given), sampler(seed=4)
    batch = np.concatenate([rows(12, seed=1)[:, None], logits[:, None]], axis=1)
    got = []
    for pair in batch:
        other.sample(pair[0])
        got.append(beside.sample(pair[1]).token_id)
    assert got == expected


@pytest.mark.parametrize("place", [1, 5, 11])
def test_a_sequence_resumes_with_the_same_draws(place: int) -> None:
    given = {"seed": -5, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "min_tokens": 6}
    logits, first, second = rows(12), sampler(**given), sampler(**given)
    tokens = [first.sample(row).token_id for row in logits]
    for token in tokens[:place]:
        second.commit(token)
    assert [second.sample(row).token_id for row in logits[place:]] == tokens[place:]


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_each_sampler_has_its_own(seed: int | None) -> None:
    logits = np.zeros(1000, np.float32)
    runs = [sampler(vocab=1000, seed=seed) for _ in range(2)]
    first, second = ([s.sample(logits)[0] for _ in range(8)] for s in runs)
    assert first != second


def test_the_lowest_id_wins_among_equals() -> None:
    logits = np.zeros(600, np.float32)
    logits[[4, 300, 599]] = 5
    assert sampler(vocab=600, temperature=0).sample(logits).token_id == 4
    assert kept(600, logits, top_k=2) == {4, 300}
    assert kept(600, logits, top_k=1) == {4}
    assert kept(600, np.zeros(600, np.float32), top_k=3) == {0, 1, 2}
    assert kept(600, np.zeros(600, np.float32), top_p=0.5) == set(range(300))
    token, _, top = sampler(vocab=600, temperature=0, logprobs=4).sample(logits)
    assert (token, [t for t, _, _ in top]) == (4, [4, 300, 599, 0])
    picked = sampler(vocab=600, temperature=0, logprobs=0, allowed_token_ids=[599]).sample(logits)
    assert picked.top == [(599, picked.logprob, 3)]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1030])
def test_a_draw_never_gives_a_token_without_weight(vocab: int, share: float) -> None:
    for allowed in ([0], [vocab - 1], [vocab // 2], list(range(0, vocab, 3))):
        subject = sampler(vocab=vocab, prompt=[0], allowed_token_ids=allowed)
        subject._uniform = lambda: share  # type: ignore[method-assign]
        assert subject.sample(rows(1, vocab=vocab)[0]).token_id in allowed


@given(st.data())
def test_any_parameters_give_a_token_that_the_reference_keeps(data: st.DataObject) -> None:
    """Rows with ties, -inf and large steps; the token must be among those of the slow reference."""
    vocab = data.draw(st.integers(1, 600))
    levels = data.draw(st.lists(st.integers(-320, 320), min_size=1, max_size=9))
    picks = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, len(levels), vocab)
    logits = np.asarray(levels, np.float32)[picks] / 8  # float32 tells eighths apart
    if vocab > 1 and data.draw(st.booleans()):
        logits[vocab // 2 :] = -np.inf
    given = {
        "temperature": data.draw(st.sampled_from([1e-5, 0.1, 1.0, 100.0])),
        "top_k": data.draw(st.sampled_from([-1, 0, 1, 3, 300])),
        "top_p": data.draw(st.sampled_from([1e-9, 0.3, 0.9, 0.99999999, 1.0])),
        "min_p": data.draw(st.sampled_from([0.0, 0.05, 1.0])),
        "seed": data.draw(st.integers(0, 2**64 - 1)),
    }
    token = sampler(vocab=vocab, prompt=[0], **given).sample(logits).token_id
    probabilities = distribution(SamplingParams(**given), logits.tolist())
    if given["top_p"] in (1.0, 1e-9):  # else equal sums may round to either side of the share
        assert probabilities[token] > 0
    better = np.count_nonzero(logits > logits[token]) + np.count_nonzero(
        logits[:token] == logits[token]
    )
    assert np.isfinite(logits[token])
    assert given["top_k"] <= 0 or better < given["top_k"]
    assert given["min_p"] < 1 or logits[token] == logits.max()


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize(
    "given", [{"temperature": 0}, {"temperature": 2.0, "presence_penalty": 1.0}]
)
def test_logprobs_are_those_of_the_raw_logits(count: int, given: dict[str, Any]) -> None:
    subject = sampler(logprobs=count, seed=8, logit_bias={700: 3.0}, **given)
    for row in rows(6):
        token, logprob, top = subject.sample(row)
        expected = torch.log_softmax(torch.from_numpy(row).double(), dim=0).numpy()
        order = np.argsort(-row, kind="stable").tolist()
        wanted = order[:count] + ([token] if token not in order[:count] else [])
        assert [t for t, _, _ in top] == wanted
        assert [rank for _, _, rank in top] == [order.index(t) + 1 for t in wanted]
        np.testing.assert_allclose([value for _, value, _ in top], expected[wanted], atol=2e-6)
        assert logprob == dict((t, value) for t, value, _ in top)[token]
        assert all(type(t) is int and type(rank) is int for t, _, rank in top)


def test_logprobs_of_a_vocabulary_smaller_than_asked() -> None:
    assert (
        len(sampler(vocab=3, prompt=[1], temperature=0, logprobs=20).sample(rows(1, 3)[0]).top) == 3
    )


def test_without_logprobs_there_are_none() -> None:
    for result in (sampler().sample(rows(1)[0]), sampler(temperature=0).commit(3)):
        assert math.isnan(result.logprob)
        assert result.top == []


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({}, True),
        ({"top_p": 0.5, "top_k": 3, "min_p": 0.1, "stop_token_ids": [4], "seed": 1}, True),
        ({"temperature": 1e-6}, True),
        ({"temperature": 0.1}, False),
        ({"logprobs": 0}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"logit_bias": {}}, True),
        ({"allowed_token_ids": [3]}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
    ],
)
def test_plain_greedy_is_when_the_largest_logit_alone_decides(
    given: dict[str, Any], plain: bool
) -> None:
    params: dict[str, Any] = {"temperature": 0} | given
    subject = sampler(**params)
    assert subject.is_plain_greedy is plain


def test_min_tokens_ends_and_then_greedy_is_plain() -> None:
    subject = sampler(temperature=0, min_tokens=2)
    logits = rows(1)[0]
    logits[[2, 7]] = 90  # both end the sequence
    for _ in range(2):
        assert not subject.is_plain_greedy
        assert subject.sample(logits).token_id not in EOS
    assert subject.is_plain_greedy
    assert subject.sample(logits).token_id == 2


def test_a_row_without_a_best_token_is_refused() -> None:
    for temperature in (0, 1):
        for value in (math.nan, math.inf):
            logits = rows(1)[0]
            logits[50] = value
            with pytest.raises(UserError, match=f"largest logit is {value}: its weights"):
                sampler(temperature=temperature).sample(logits)
    with pytest.raises(AssertionError, match="logits of 997"):
        sampler().sample(np.zeros(996, np.float32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"allowed_token_ids": [3, 997]},
            "allowed_token_ids names token 997; this model accepts 0 to 996",
        ),
        ({"logit_bias": {5000: 1.0}}, "logit_bias names token 5000"),
        ({"stop_token_ids": [997]}, "stop_token_ids names token 997"),
        (
            {"allowed_token_ids": [2, 7], "min_tokens": 1},
            "min_tokens is 1, but every allowed token",
        ),
    ],
)
def test_ids_that_the_model_does_not_have_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler(**given)


def test_end_of_sequence_ids_outside_the_logits_are_ignored() -> None:
    subject = Sampler(SamplingParams(min_tokens=1, temperature=0), [1], 6, (2, 7))
    assert subject.sample(np.asarray([0, 0, 9, 0, 1, 0], np.float32)).token_id == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n is 0; accepted are integers from 1 to 64"),
    ({"n": True}, "n is True; accepted are integers"),
    ({"n": 2, "temperature": 0}, "n is 2 with temperature 0; greedy decoding gives one output"),
    ({"temperature": -0.1}, "temperature is -0.1; accepted are numbers from 0 to 100"),
    ({"temperature": math.nan}, "temperature is nan; accepted are numbers from 0 to 100"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": 10**400}, "temperature is 1000"),
    ({"temperature": "1"}, "temperature is '1'"),
    ({"temperature": True}, "temperature is True"),
    ({"temperature": None}, "temperature is None"),
    ({"temperature": np.float32(-1)}, "temperature is -1.0;"),
    ({"top_p": 0}, "top_p is 0; accepted are numbers above 0 and up to 1"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_k": -2}, "top_k is -2; accepted are integers -1 or more"),
    ({"top_k": 3.0}, "top_k is 3.0; accepted are integers"),
    ({"min_p": 1.5}, "min_p is 1.5; accepted are numbers from 0 to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0; accepted are numbers from 0.01 to 100"),
    ({"presence_penalty": 2.1}, "presence_penalty is 2.1; accepted are numbers from -2 to 2"),
    ({"frequency_penalty": -math.inf}, "frequency_penalty is -inf"),
    ({"seed": 1.5}, "seed is 1.5; accepted are integers"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"max_tokens": 0}, "max_tokens is 0; accepted are integers 1 or more"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"min_tokens": 20}, "min_tokens is 20; it must not exceed max_tokens, 16"),
    ({"logprobs": 21}, "logprobs is 21; accepted are integers from 0 to 20"),
    ({"logprobs": True}, "logprobs is True"),
    ({"stop": 5}, "stop is 5; accepted are lists of strings"),
    ({"stop": ""}, "stop is ''; accepted are non-empty strings"),
    ({"stop": ["a", ""]}, "accepted are non-empty strings"),
    ({"stop": ["a", 3]}, "accepted are non-empty strings"),
    ({"stop": {"a": 1}}, "accepted are lists of strings"),
    ({"stop": "a", "detokenize": False}, "stop is 'a' with detokenize False"),
    ({"stop_token_ids": 5}, "stop_token_ids is 5; accepted are lists of token ids"),
    ({"stop_token_ids": "12"}, "stop_token_ids is '12'; accepted are lists of token ids"),
    ({"stop_token_ids": [1, -2]}, "stop_token_ids is -2; accepted are integers from 0"),
    ({"stop_token_ids": [2**70]}, "stop_token_ids is 1180591620717411303424"),
    ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
    ({"allowed_token_ids": [False]}, "allowed_token_ids is False"),
    ({"logit_bias": [1]}, r"logit_bias is \[1\]; accepted are mappings"),
    ({"logit_bias": {1: 101}}, "logit_bias is 101; accepted are numbers from -100 to 100"),
    ({"logit_bias": {1: math.nan}}, "logit_bias is nan"),
    ({"logit_bias": {"1": 1}}, "logit_bias is '1'; accepted are integers"),
    ({"ignore_eos": "no"}, "ignore_eos is 'no'; accepted are True and False"),
    ({"skip_special_tokens": 1}, "skip_special_tokens is 1"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_parameters_are_refused_in_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        SamplingParams(**given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 160


def test_parameters_from_json() -> None:
    given = {"temperature": 0.5, "logit_bias": {"12": 3, 13: -1}, "stop": ["a"], "seed": 4}
    expected = SamplingParams(temperature=0.5, logit_bias={12: 3.0, 13: -1.0}, stop=["a"], seed=4)
    assert SamplingParams.from_dict(given) == expected
    with pytest.raises(
        UserError, match=r"'best_of' is not known; accepted are allowed_token_ids, "
    ):
        SamplingParams.from_dict({"best_of": 2})
    with pytest.raises(UserError, match="logit_bias is 'x'"):
        SamplingParams.from_dict({"logit_bias": {"x": 2}})
    with pytest.raises(TypeError):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_parameters_do_not_change_under_a_request() -> None:
    stop, ids, bias = ["a"], np.asarray([3, 4]), {3: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, allowed_token_ids={3}, logit_bias=bias)  # type: ignore[arg-type]
    stop.append("b")
    ids[0] = 9
    bias[4] = 1.0
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (3, 4), {3: 1.0})
    assert SamplingParams(stop="abc").stop == "abc"


def test_metrics_are_read_from_the_times() -> None:
    metrics = RequestMetrics(arrival_time=10.0, prompt_tokens=4)
    assert (metrics.time_to_first_token, metrics.time_per_output_token) == (None, None)
    metrics.first_token_time = metrics.last_token_time = 10.5
    metrics.generated_tokens = 1
    assert (metrics.time_to_first_token, metrics.time_per_output_token) == (0.5, None)
    metrics.last_token_time, metrics.generated_tokens = 11.5, 5
    assert metrics.time_per_output_token == 0.25
