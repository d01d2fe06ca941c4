"""The engine: batching, prefix reuse, preemption, stopping, cancelling; text through LLM."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

from tilert import LLM, SamplingParams
from tilert.engine.cache import PageCache
from tilert.errors import UserError
from tilert.ir.program import PAGE

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    families.make("llama", path)
    return path


def load(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **{"skip_tokenizer_init": True, "threads": 2, **options})


def prompt(length: int, seed: int = 0) -> dict[str, Any]:
    ids = np.random.default_rng([seed, length]).integers(3, 199, length)
    return {"prompt_token_ids": [int(t) for t in ids]}


def answer(llm: LLM, p: Any, params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate(p, params)[0].outputs[0].token_ids


def test_a_batch_gives_what_each_prompt_gives_alone(folder: Path) -> None:
    llm = load(folder)
    prompts = [prompt(n) for n in (3, 70, 17, 1, 130, 9, 64, 65, 33, 5, 128)]
    together = [r.outputs[0].token_ids for r in llm.generate(prompts, GREEDY)]
    assert together == [answer(load(folder), p) for p in prompts]
    llm.engine.cache.check()


def test_two_runs_give_the_same_tokens_and_logits(folder: Path) -> None:
    runs = [
        load(folder).generate(prompt(30), SamplingParams(seed=7, max_tokens=20, logprobs=3))
        for _ in range(2)
    ]
    first, second = (run[0].outputs[0] for run in runs)
    assert first.token_ids == second.token_ids
    assert first.cumulative_logprob == second.cumulative_logprob


def test_a_known_prefix_is_not_computed_again(folder: Path) -> None:
    llm = load(folder)
    long = prompt(130)["prompt_token_ids"]
    expected = answer(load(folder), {"prompt_token_ids": [*long, 5]})
    answer(llm, {"prompt_token_ids": long})
    computed = []
    step = llm.runner.step
    llm.runner.step = lambda rows, outputs: (computed.append(len(rows)), step(rows, outputs))[1]  # type: ignore
    assert answer(llm, {"prompt_token_ids": [*long, 5]}) == expected
    assert computed[0] == 131 - 2 * PAGE  # two full pages were found


def test_n_outputs_share_the_prompt_and_differ_by_their_draws(folder: Path) -> None:
    params = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=12, ignore_eos=True)
    outputs = load(folder).generate(prompt(70), params)[0].outputs
    assert [o.index for o in outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in outputs}) == 4
    assert all(o.finish_reason == "length" for o in outputs)
    again = load(folder).generate(prompt(70), params)[0].outputs
    assert [o.token_ids for o in outputs] == [o.token_ids for o in again]


def test_sequences_are_preempted_and_resumed_when_pages_run_out(folder: Path) -> None:
    prompts = [prompt(60, seed) for seed in range(3)]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = [answer(load(folder), p, params) for p in prompts]
    llm = load(folder)
    llm.engine.cache = PageCache(4)  # each sequence grows into its second page
    assert [r.outputs[0].token_ids for r in llm.generate(prompts, params)] == expected
    llm.engine.cache.check()


def test_finish_reasons(folder: Path) -> None:
    llm = load(folder)
    tokens = answer(llm, prompt(10))
    stopped = llm.generate(
        prompt(10), SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[tokens[5]])
    )
    first = tokens.index(tokens[5])
    assert stopped[0].outputs[0].token_ids == tokens[: first + 1]
    assert (stopped[0].outputs[0].finish_reason, stopped[0].outputs[0].stop_reason) == (
        "stop",
        tokens[5],
    )
    limited = llm.generate(
        prompt(250), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    )
    assert len(limited[0].outputs[0].token_ids) == 6  # the context has 256 positions
    assert limited[0].outputs[0].finish_reason == "length"


def test_a_closed_stream_cancels_and_leaves_nothing_behind(folder: Path) -> None:
    llm = load(folder)
    expected = answer(load(folder), prompt(40))
    for count in (1, 2, 7):
        stream = llm.stream(prompt(40), GREEDY)
        got = [delta.token_id for delta in itertools.islice(stream, count)]
        stream.close()  # type: ignore[attr-defined]
        assert got == expected[:count]
        assert not llm.engine.running
        llm.engine.cache.check()
    assert answer(llm, prompt(40)) == expected


def test_streams_can_be_read_in_turn(folder: Path) -> None:
    llm = load(folder)
    first, second = prompt(30), prompt(9)
    expected = [answer(load(folder), p) for p in (first, second)]
    pairs = zip(llm.stream(first, GREEDY), llm.stream(second, GREEDY), strict=True)
    got = list(zip(*((a.token_id, b.token_id) for a, b in pairs), strict=True))
    assert [list(tokens) for tokens in got] == expected
    open_stream = llm.stream(first, GREEDY)
    begun = [next(open_stream).token_id for _ in range(3)]
    assert answer(llm, second) == expected[1]  # another request beside it
    assert begun + [delta.token_id for delta in open_stream] == expected[0]
    llm.stream(first, GREEDY)  # never read: nothing happens
    assert answer(llm, second) == expected[1]
    assert not llm.engine.running
    assert not llm.engine.waiting


def test_a_refused_prompt_leaves_nothing_behind(folder: Path) -> None:
    llm = load(folder)
    with pytest.raises(UserError, match="empty"):
        llm.generate([prompt(5), {"prompt_token_ids": []}], GREEDY)
    assert answer(llm, prompt(5)) == answer(load(folder), prompt(5))


def test_logits_have_storage_of_their_own(tmp_path: Path) -> None:
    """A vocabulary as wide as another activation: shapes alone would let them share."""
    families.make("llama", tmp_path, vocab_size=68, intermediate_size=68)
    llm = load(tmp_path)
    ids = [int(t) for t in np.random.default_rng(0).integers(3, 67, 12)]
    assert len(answer(llm, {"prompt_token_ids": ids})) == 20


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    llm = load(folder)
    broken = {k: v.copy() for k, v in llm.runner.weights.items()}
    broken["model.norm.weight"][:] = np.nan
    llm.runner.weights = broken
    with pytest.raises(UserError, match="largest logit is nan: its weights are damaged"):
        answer(llm, prompt(5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": list(range(3, 200)) * 2}, "context holds 256"),
        ({"prompt_token_ids": [5, 500]}, "500 is outside the vocabulary"),
        ({"prompt_token_ids": [5, -1]}, "-1 is outside the vocabulary"),
        ({"prompt_token_ids": "abc"}, "list of ints"),
        ({}, "list of ints"),
        ("text", "needs the tokenizer"),
        ([1, 2, 3], "a prompt must be text"),
        (None, "prompts is a NoneType"),
        ({"prompt_token_ids": [True]}, "list of ints"),
    ],
)
def test_bad_prompts_are_refused_in_one_sentence(folder: Path, given: Any, message: str) -> None:
    llm = load(folder)
    with pytest.raises(UserError, match=message) as caught:
        llm.generate(given, GREEDY)
    assert "\n" not in str(caught.value)
    assert not llm.engine.waiting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 257}, "accepts 1 to 256"),
        ({"max_num_seqs": 9}, "accepted are 1 to 8"),
        ({"backend": "interpreter", "threads": -5}, "threads is -5; accepted are 1 to 1024"),
        ({"backend": "gpu"}, "cpu, cuda and interpreter"),
    ],
)
def test_bad_options_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(folder, **options)


def test_params_may_be_a_dict(folder: Path) -> None:
    llm = load(folder)
    given = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    assert answer(llm, prompt(4), given) == answer(llm, prompt(4))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sampling_params is a str"):
        answer(llm, prompt(4), "greedy")  # type: ignore[arg-type]


def test_page_cache_keeps_shared_pages_until_the_last_user_is_gone() -> None:
    cache = PageCache(4)
    tokens = list(range(2 * PAGE + 1))
    pages = [cache.take(), cache.take(), cache.take()]
    cache.remember(tokens, pages)
    shared = cache.match(tokens)
    assert shared == pages[:2]
    cache.release(pages)
    assert cache.free == 2  # one never taken, one released; two still in use by the match
    cache.release(shared)
    cache.check()
    assert cache.match([*tokens[:PAGE], 7]) == pages[:1]
