"""Speculation: drafts, their verification, and that nothing but the time shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from emulator import SUPPORTED, EmulatedDevice
from test_glassllm import convert

from tilert import LLM, SamplingParams
from tilert.backends.cpu import ISAS
from tilert.engine.core import RequestMetrics
from tilert.engine.runner import FEW, Row, Runner
from tilert.engine.speculate import Drafter
from tilert.errors import UserError
from tilert.ir.program import PAGE
from tilert.serve import llm as serving
from tilert.serve import report

# Sizes whose products all go through the matrix units.
FOR_MATRIX_UNITS = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def prefilled(runner: Runner, length: int) -> list[Row]:
    """Rows that follow `length` random tokens, whose keys and values are computed."""
    tokens = np.random.default_rng(length).integers(3, 199, length + FEW).tolist()
    runner.set_pages(0, range(-(-len(tokens) // PAGE)))
    rows = [Row(token, position, 0) for position, token in enumerate(tokens)]
    runner.step(rows[:length], [])
    return rows[length:]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("family", "threads"),
    [("llama", 1), ("mistral", 2), ("qwen3", 2), ("qwen2_moe", 2), ("deepseek_v32", 2)],
)
def test_a_row_has_the_same_bits_alone_and_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, threads: int, isa: str
) -> None:
    families.make(family, tmp_path)
    monkeypatch.setenv("TILERT_CPU_ISA", isa)
    try:
        runner = LLM(tmp_path, skip_tokenizer_init=True, threads=threads).runner
    except UserError:  # this machine cannot run them
        pytest.skip(f"no {isa}")
    for length in (5, PAGE - 3, 200):
        rows = prefilled(runner, length)
        alone = []
        for row in rows:
            runner.step([row], [0])
            alone.append(runner.logits()[0].copy())
        for count in range(2, FEW + 1):
            runner.step(rows[:count], range(count))
            assert np.array_equal(runner.logits(), alone[:count])


def drafted(tokens: list[int], longest: int = 7, most: int = 7) -> list[int]:
    return Drafter(tokens, longest).draft(most)


def test_drafts_go_on_as_the_text_went_on_before() -> None:
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    assert drafted(text) == []  # nothing has come twice
    assert drafted([*text, 5, 6]) == []  # known, but no guess has come true yet
    assert drafted([*text, 5, 6, 7, 8]) == [9, 10]  # two have: trust grows by one with each
    assert drafted([*text, *text[:7]]) == [12, 5, 6, 7, 8]
    assert drafted([*text, *text[:7]], most=2) == [12, 5]
    assert drafted([*text, *text[:7]], longest=3) == [12, 5, 6]


def test_a_draft_may_run_into_itself() -> None:
    assert drafted([3, 4] * 5) == [3, 4, 3, 4, 3, 4]
    assert drafted([7] * 9, most=4) == [7, 7, 7, 7]


def test_trust_is_halved_by_a_wrong_guess_and_the_latest_occurrence_counts() -> None:
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    tokens = [*text, *text]
    drafter = Drafter(tokens, 7)
    assert len(drafter.draft(7)) == 6  # the first two tokens of the copy had nothing to be found by
    tokens.append(99)  # it was 5 before
    assert drafter.draft(7) == []
    assert drafter.trust == 3
    tokens += [6, 7]  # two guessable tokens bring the place back
    assert drafter.draft(7) == [8, 9, 10]
    tokens[:] = [1, 2, 50, 1, 2, 60, 1, 2]
    found = Drafter(tokens, 7)
    found.draft(0)
    found.trust = 1
    assert found.draft(1) == [60]


def test_drafts_do_not_depend_on_when_they_are_asked_for() -> None:
    made = np.random.default_rng(5).integers(0, 4, 300).tolist()
    tokens: list[int] = []
    watched = Drafter(tokens, 7)
    for token in made:
        tokens.append(token)
        assert watched.draft(7) == drafted(tokens)


@pytest.fixture(scope="module")
def models(glassllm_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """The same model without speculation and with it."""
    folder = tmp_path_factory.mktemp("glassllm")
    convert(np.load(glassllm_wheel / "glassllm" / "weights" / "en.npz"), folder)
    return (
        LLM(folder, skip_tokenizer_init=True, threads=2),
        LLM(folder, skip_tokenizer_init=True, threads=2, num_speculative_tokens=7),
    )


REPEATING = [5, 9, 33, 7, 260, 12] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.7, "seed": 11},
        {"temperature": 1.0, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0.5, "seed": 1, "n": 1, "top_k": 3},
    ],
)
def test_outputs_are_the_same_and_steps_fewer(
    models: tuple[LLM, LLM], options: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=90, ignore_eos=True, **options)
    prompts = [{"prompt_token_ids": REPEATING[i:]} for i in range(3)]
    accepted = 0
    for prompt in prompts:
        (plain,), (quick,) = (model.generate(prompt, params) for model in models)
        assert quick.outputs[0].token_ids == plain.outputs[0].token_ids
        assert quick.outputs[0].logprobs == plain.outputs[0].logprobs
        assert not plain.metrics.verified
        assert plain.metrics.drafted_tokens == 0
        seen = quick.metrics
        assert seen.accepted_tokens <= seen.drafted_tokens
        assert all(1 <= count <= 8 for count in seen.verified)
        accepted += seen.accepted_tokens
    assert accepted > 0 or options["temperature"]  # what is drawn may never repeat


def test_a_stop_or_the_limit_within_a_draft_ends_the_output(models: tuple[LLM, LLM]) -> None:
    free = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    whole = models[0].generate({"prompt_token_ids": REPEATING}, free)[0].outputs[0].token_ids
    for length in (30, 31, 32, 33):
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        result = models[1].generate({"prompt_token_ids": REPEATING}, params)[0].outputs[0]
        assert result.token_ids == whole[:length]
        assert result.finish_reason == "length"
    stop = whole[40]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop_token_ids=[stop])
    result = models[1].generate({"prompt_token_ids": REPEATING}, params)[0].outputs[0]
    assert result.token_ids == whole[: whole.index(stop) + 1]
    assert result.finish_reason == "stop"
    again = models[1].generate({"prompt_token_ids": REPEATING}, free)[0].outputs[0]
    assert again.token_ids == whole  # and nothing wrong was left in the cache


def test_drafts_are_made_for_a_sequence_that_is_alone(
    models: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, alone = models[1].engine, []
    verify = engine._verify

    def watched(sequence: Any, draft: list[int]) -> Any:
        alone.append(engine.running == [sequence])
        return verify(sequence, draft)

    monkeypatch.setattr(engine, "_verify", watched)
    params = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (40, 70)
    ]
    prompts = [{"prompt_token_ids": REPEATING}, {"prompt_token_ids": REPEATING[1:]}]
    plain, quick = (model.generate(prompts, params) for model in models)
    for one, other in zip(plain, quick, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert not quick[0].metrics.verified
    assert alone
    assert all(alone)


def test_a_stream_that_is_closed_within_a_draft_leaves_the_engine_whole(
    models: tuple[LLM, LLM],
) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    whole = models[0].generate({"prompt_token_ids": REPEATING}, params)[0].outputs[0].token_ids
    for count in (20, 41, 42, 43):
        stream: Any = models[1].stream({"prompt_token_ids": REPEATING}, params)
        assert [next(stream).token_id for _ in range(count)] == whole[:count]
        stream.close()
        models[1].engine.cache.check()
    assert (
        models[1].generate({"prompt_token_ids": REPEATING}, params)[0].outputs[0].token_ids == whole
    )


@pytest.mark.skipif(not SUPPORTED, reason="the emulator needs g++ on x86-64")
def test_a_gpu_verifies_in_steps_of_as_many_rows_as_drafts_need(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = EmulatedDevice(kernels)
    monkeypatch.setattr(serving, "open_device", lambda notify: made)
    families.make("llama", tmp_path, torch.bfloat16, **FOR_MATRIX_UNITS)
    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 128, "backend": "cuda"}
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompt = {"prompt_token_ids": [8, 38, 15] * 3}  # the answer comes to repeat one token
    plain = LLM(tmp_path, **options).generate(prompt, params)[0].outputs[0].token_ids
    model = LLM(tmp_path, **options, num_speculative_tokens=3)
    quick = model.generate(prompt, params)[0]
    assert quick.outputs[0].token_ids == plain
    assert quick.metrics.accepted_tokens > 0
    assert "few4" in model.runner.programs


def test_too_many_tokens_are_refused(tmp_path: Path) -> None:
    families.make("llama", tmp_path)
    with pytest.raises(UserError, match=r"^num_speculative_tokens is 8; accepted are 0 to 7$"):
        LLM(tmp_path, skip_tokenizer_init=True, num_speculative_tokens=8)


def test_the_statistics_name_drafts_and_steps() -> None:
    metrics = RequestMetrics(0.0, 5, 20, 1.0, 2.0, 2.0, 6, [4, 1, 3], "lookup")
    assert report.speculation(metrics) == (
        "lookup: 5 of 6 drafted tokens accepted: 2.67 tokens per verifying step (1 to 4, 3 steps)"
    )
