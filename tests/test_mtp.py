"""Multi-token prediction: the layer's numbers and guesses against torch, and that only the time shows it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import guessing
import numpy as np
import programs
import pytest
from safetensors.torch import load_file, save_file
from test_models import TOLERANCE, tokens_for

from tilert import LLM, SamplingParams
from tilert.backends.interpreter import ORDERS
from tilert.engine import engine
from tilert.engine.cache import PageCache
from tilert.engine.engine import Engine
from tilert.engine.mtp import LayerDrafter
from tilert.engine.runner import Row, Runner
from tilert.errors import UserError
from tilert.ir.machine import NULL, cpu
from tilert.models.derived import ColumnPart

FREE = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def opened(folder: Path, drafts: int = 3, **options: Any) -> LLM:
    return LLM(
        folder, skip_tokenizer_init=True, threads=2, num_speculative_tokens=drafts, **options
    )


def made(llm: LLM, prompt: list[int], params: SamplingParams = FREE) -> list[int]:
    return llm.generate({"prompt_token_ids": prompt}, params)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("family", "backend", "shared"),
    [
        ("deepseek_v3", "cpu", True),
        ("deepseek_v3-one-product", "cpu", False),
        ("deepseek_v32", "cpu", False),
        ("deepseek_v32", "interpreter", True),
        ("glm_moe_dsa", "cpu", False),
    ],
)
def test_hidden_states_and_guesses_are_those_of_torch(
    family: str, backend: Any, shared: bool, tmp_path: Path
) -> None:
    """Prompts, several rows and one, beyond what an indexer selects."""
    reference = guessing.make(family, tmp_path, shared=shared)
    llm, tokens = opened(tmp_path, backend=backend), tokens_for(34)
    layer = llm.engine.layer
    assert layer is not None
    hidden, expected = reference.hidden(tokens).numpy(), reference.logits(tokens)
    llm.runner.set_pages(0, [1])
    begin = 0
    for size in (20, 1, 7, 1, 4):
        rows = [Row(tokens[p], p, 0) for p in range(begin, begin + size)]
        llm.runner.step(rows, range(size) if size <= 8 else [size - 1])
        given = llm.runner.hidden(0, size)
        assert np.abs(given - hidden[begin : begin + size]).max() < TOLERANCE
        following = [Row(tokens[row.position + 1], row.position, 0) for row in rows]
        layer.step(following, [size - 1], given)
        begin += size
        assert np.abs(layer.logits()[0] - expected[begin - 1]).max() < TOLERANCE


class Draft(NamedTuple):
    """A draft, the tokens before it, and the logits of its last guess where the host made it."""

    tokens: list[int]
    guesses: list[int]
    logits: np.ndarray | None


@pytest.fixture(params=["host", "device"])
def drafts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Draft]:
    """Every draft that is made; on the device, where a launch has one step, all but the first."""
    seen: list[Draft] = []
    draft, skip = LayerDrafter.draft, LayerDrafter.skip

    def noted(self: LayerDrafter, most: int) -> list[int]:
        made = not self._ready
        guesses = draft(self, most)
        if guesses and made:
            seen.append(Draft(list(self.tokens), guesses, self.runner.logits()[0].copy()))
        return guesses

    def skipped(self: LayerDrafter, end: int, ready: Sequence[int] = ()) -> None:
        if ready:
            seen.append(Draft(list(self.tokens), list(ready), None))
        skip(self, end, ready)

    monkeypatch.setattr(LayerDrafter, "draft", noted)
    monkeypatch.setattr(LayerDrafter, "skip", skipped)
    if request.param == "host":
        monkeypatch.setattr(Engine, "_guess_steps", lambda *_: 0)
    monkeypatch.setattr(engine, "LAUNCH_STEPS", 4)
    return seen


def check(reference: guessing.Reference, drafts: list[Draft]) -> None:
    """The first, the last, and some between."""
    assert drafts
    for draft in [*drafts[:: len(drafts) // 3 + 1], drafts[-1]]:
        guesses, logits = reference.draft(draft.tokens, len(draft.guesses))
        assert draft.guesses == guesses, len(draft.tokens)
        if draft.logits is not None:
            assert np.abs(draft.logits - logits).max() < TOLERANCE, len(draft.tokens)
    drafts.clear()


def test_drafts_are_those_of_torch(tmp_path: Path, drafts: list[Draft]) -> None:
    """Also after a prompt in pieces, a prefix that was found, a time among others, and a cancellation."""
    reference = guessing.make("deepseek_v32", tmp_path, 0.3, max_position_embeddings=512)
    llm, tokens = opened(tmp_path), tokens_for(300)
    few = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    made(llm, tokens[:270], few)
    check(reference, drafts)
    computed = []
    step = Runner.step

    def counted(self: Runner, rows: list[Row], *rest: Any) -> np.ndarray:
        computed.append(len(rows))
        return step(self, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "step", counted)
        made(llm, [*tokens[:200], 9, 8], few)  # finds three pages and takes two of them
    assert computed[0] == 202 - 128
    check(reference, drafts)
    prompts = [{"prompt_token_ids": tokens[i : 40 + i]} for i in (100, 140)]
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm.generate(prompts, [few, long])
    lengths = [len(draft.tokens) for draft in drafts]  # while both ran, nothing was drafted
    alone = [41] if drafts[1].logits is not None else [41, 42]  # before the other one came
    assert lengths[: len(alone)] == alone
    assert min(lengths[len(alone) :]) > 40 + 4
    check(reference, drafts)
    with closing(llm.stream({"prompt_token_ids": tokens[30:100]}, long)) as stream:  # type: ignore[type-var]
        for _ in range(5):
            next(stream)
    llm.engine.cache.check()
    made(llm, tokens[30:110], few)
    check(reference, drafts)


def test_sequences_that_start_over_are_drafted_for_as_before(
    tmp_path: Path, drafts: list[Draft]
) -> None:
    reference = guessing.make("deepseek_v3", tmp_path)
    prompts = [{"prompt_token_ids": tokens_for(58 + i)} for i in range(3)]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    plain, llm = opened(tmp_path, 0), opened(tmp_path)
    llm.engine.cache = PageCache(4)  # each sequence grows into its second page
    requests, expected = (m.generate(prompts, params) for m in (llm, plain))
    assert [r.outputs[0].token_ids for r in requests] == [r.outputs[0].token_ids for r in expected]
    llm.engine.cache.check()
    check(reference, drafts)


def test_a_prefix_of_a_sequence_that_was_never_drafted_for(
    tmp_path: Path, drafts: list[Draft]
) -> None:
    reference = guessing.make("deepseek_v3", tmp_path)
    llm, tokens = opened(tmp_path), tokens_for(230)
    made(llm, tokens, SamplingParams(temperature=0, max_tokens=1))
    assert not drafts
    made(llm, tokens)
    check(reference, drafts)


@pytest.mark.parametrize("adds", [0.0, 0.05])
def test_outputs_are_the_same_and_right_guesses_are_accepted(adds: float, tmp_path: Path) -> None:
    guessing.make("deepseek_v32", tmp_path, adds)
    plain, prompt = opened(tmp_path, 0), tokens_for(21)
    assert plain.speculative_method is None
    sampled = SamplingParams(temperature=0.6, seed=3, top_p=0.9, max_tokens=20, ignore_eos=True)
    for count in (1, 3):
        llm = opened(tmp_path, count)
        request = llm.generate({"prompt_token_ids": prompt}, FREE)[0]
        assert request.outputs[0].token_ids == made(plain, prompt)
        assert made(llm, prompt, sampled) == made(plain, prompt, sampled)
        seen = request.metrics
        assert seen.speculative_method == "mtp"
        assert seen.accepted_tokens > 0
        if not adds:  # all of them; 19 tokens come after the prompt's
            assert seen.verified == {1: [2] * 9, 3: [4] * 4 + [3]}[count]
    for length in (5, 6, 7):
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        assert made(llm, prompt, params) == made(plain, prompt)[:length]


ON_HOST: dict[str, Any] = {
    "logprobs": 0
}  # what only the host can give, so it takes the guesses there


@pytest.mark.parametrize(
    ("family", "backend"),
    [("deepseek_v3", "cpu"), ("deepseek_v32", "interpreter"), ("glm_moe_dsa", "cpu")],
)
def test_the_device_guesses_and_verifies_as_the_host_does(
    family: str, backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and statistics, with guesses of which some are right; in one launch and in several."""
    guessing.make(family, tmp_path, 0.03)
    prompt, launches = {"prompt_token_ids": tokens_for(59)}, []
    guess = Runner.guess

    def counted(self: Runner, *args: Any) -> Any:
        launches.append(args[4])
        return guess(self, *args)

    monkeypatch.setattr(Runner, "guess", counted)
    for count in (1, 3) if backend == "cpu" else (2,):
        llm = opened(tmp_path, count, backend=backend)
        params: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
        expected = llm.generate(prompt, SamplingParams(**params, **ON_HOST))[0]
        assert not launches
        for steps in (64, 2 * count + 2):
            monkeypatch.setattr(engine, "LAUNCH_STEPS", steps)
            request = llm.generate(prompt, SamplingParams(**params))[0]
            assert request.outputs[0].token_ids == expected.outputs[0].token_ids
            assert request.metrics.verified == expected.metrics.verified
            assert request.metrics.drafted_tokens == expected.metrics.drafted_tokens
            assert {1, 2} <= set(request.metrics.verified), "some guesses are right, others are not"
            assert sum(launches) >= len(request.metrics.verified)
            assert len(launches) > (1 if steps == 64 else 4)
            launches.clear()


def test_a_stop_within_accepted_guesses_and_a_stream_that_is_closed(tmp_path: Path) -> None:
    guessing.make("deepseek_v32", tmp_path, 0.0)
    prompt, llm = {"prompt_token_ids": tokens_for(62)}, opened(tmp_path)
    whole = made(llm, tokens_for(62))
    for place in (6, 7, 8, 9):  # each row of a step
        stop = SamplingParams(
            temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[whole[place]]
        )
        output = llm.generate(prompt, stop)[0].outputs[0]
        assert output.token_ids == whole[: whole.index(whole[place]) + 1]
        assert output.finish_reason == "stop"
        assert made(llm, tokens_for(62)) == whole
        with closing(llm.stream(prompt, FREE)) as stream:  # type: ignore[type-var]
            assert [next(stream).token_id for _ in range(place)] == whole[:place]
        llm.engine.cache.check()
        assert made(llm, tokens_for(62)) == whole


def test_a_step_of_guesses_gives_the_same_bits_in_every_order(tmp_path: Path) -> None:
    guessing.make("deepseek_v32", tmp_path)
    llm = opened(tmp_path, max_model_len=128, max_num_seqs=2)
    assert llm.engine.layer is not None
    for machine, drafts in ((cpu(2), 1), (cpu(3), 3), (NULL, 2)):
        program = llm.runner.guessing(llm.engine.layer, drafts, machine)
        weights = programs.make_weights(program)
        expected = programs.outcome(program, weights, "sequential", steps=4)
        for order in list(ORDERS)[:: 1 + drafts]:
            assert programs.outcome(program, weights, order, 1, steps=4) == expected


def test_a_prompt_of_one_token_has_nothing_to_guess_from(tmp_path: Path) -> None:
    guessing.make("deepseek_v3", tmp_path, 0.05)
    plain, llm = opened(tmp_path, 0), opened(tmp_path)
    for params in (FREE, SamplingParams(temperature=0.6, seed=3, max_tokens=9, ignore_eos=True)):
        assert made(llm, [7], params) == made(plain, [7], params)


@pytest.mark.parametrize("adds", [0.0, 0.05])
def test_guesses_stay_inside_the_context(adds: float, tmp_path: Path) -> None:
    guessing.make("deepseek_v3", tmp_path, adds)
    plain, llm = (opened(tmp_path, n, max_model_len=96, max_num_seqs=1) for n in (0, 3))
    to_the_end = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for length in (70, 87, 88, 89, 90, 94, 95):
        tokens = made(llm, tokens_for(length), to_the_end)
        assert len(tokens) == 96 - length
        assert tokens == made(plain, tokens_for(length), to_the_end)


def test_guesses_of_one_step_are_those_of_torch(tmp_path: Path) -> None:
    """The logits of a step's last guess, after steps of which each accepts another number."""
    reference = guessing.make("deepseek_v32", tmp_path)
    llm, tokens = opened(tmp_path, 3), tokens_for(100)
    runner, layer = llm.runner, llm.engine.layer
    assert layer is not None
    greedy, known = made(opened(tmp_path, 0), tokens[:60]), tokens[:60]
    made(llm, tokens[:60], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    position, expected = 60, [*tokens[:60], *greedy]
    runner.set_pages(0, [0, 1])
    rows = [Row(token, p, 0) for p, token in enumerate(known)]
    runner.step(rows, [])
    layer.step([Row(expected[p + 1], p, 0) for p in range(60)], [], runner.hidden(0, 60))
    for right in (0, 3, 1, 2, 0):
        fed = expected[position : position + 1 + right]
        fed += [(expected[position + right + 1] + 1) % 199] * (4 - len(fed))
        (new,) = runner.guess(layer, fed, position, 0, 1)
        position += right + 1
        assert new == expected[position - right : position + 1]
        guesses, logits = reference.draft(expected[: position + 1], 3)
        assert runner.guesses(layer, 3) == guesses
        last = runner._guessing(layer, 3).read("guess3.logits")[0]
        assert np.abs(last - logits).max() < TOLERANCE


def test_who_guesses_can_be_chosen(tmp_path: Path) -> None:
    guessing.make("deepseek_v3", tmp_path)
    assert opened(tmp_path).speculative_method == "mtp"
    assert opened(tmp_path, speculative_method="mtp").speculative_method == "mtp"
    llm = opened(tmp_path, speculative_method="lookup")
    assert llm.speculative_method == "lookup"
    assert llm.engine.layer is None
    assert not llm.runner.graph.outputs


def changed(folder: Path, change: dict[str, Any]) -> None:
    """Tensors of the layer by name: another one, or None for none."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        tensors.pop(guessing.PREFIX + name, None)
        if tensor is not None:
            tensors[guessing.PREFIX + name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_errors(tmp_path: Path) -> None:
    reference = guessing.make("deepseek_v3", tmp_path)
    eh_proj = reference.own["eh_proj"]

    def refused(text: str, drafts: int = 3, **options: Any) -> None:
        with pytest.raises(UserError) as caught:
            opened(tmp_path, drafts, **options)
        assert text in str(caught.value)

    refused(
        "speculative_method 'eagle' is not known; accepted are auto", speculative_method="eagle"
    )
    refused("'mtp', but num_speculative_tokens is 0; accepted are 1", 0, speculative_method="mtp")
    changed(tmp_path, {"eh_proj.weight": eh_proj[:, :7].clone()})
    refused(
        "tensor 'model.layers.3.eh_proj.weight' has shape [48, 7], but the config asks for [48, 96]"
    )
    changed(tmp_path, {"eh_proj.weight": None})
    refused("lacks the tensor 'model.layers.3.eh_proj.weight'")
    changed(tmp_path, {"eh_proj.weight": eh_proj, "fc.weight": eh_proj.clone()})
    refused("has the unknown tensor 'model.layers.3.fc.weight'")
    assert opened(tmp_path, 0).speculative_method is None  # nobody asks for the layer
    tensors = load_file(tmp_path / "model.safetensors")
    own = {n: None for n in tensors if n.startswith(guessing.PREFIX)}
    changed(tmp_path, {n.removeprefix(guessing.PREFIX): None for n in own})
    refused(
        "has no layer that guesses tokens; accepted are auto and lookup", speculative_method="mtp"
    )
    assert opened(tmp_path).speculative_method == "lookup"


def test_columns_of_a_tensor_keep_their_scales() -> None:
    """Blocks of scales that reach across the border between the two halves, too."""
    random = np.random.default_rng(1)
    for block in ((4, 4), (8, 6), (5, 24)):
        stored = random.integers(-9, 9, (10, 24)).astype(np.float32)
        rows, cols = (-(-n // b) for n, b in zip(stored.shape, block, strict=True))
        scales = random.random((rows, cols), np.float32)
        spread = np.kron(scales, np.ones(block, np.float32))[:10, :24]
        for first in (0, 12):
            part = ColumnPart("eh_proj", (10, 24), first, 12)
            own = np.kron(part.scales(scales, block), np.ones(part.block(block), np.float32))
            expected = (stored * spread)[:, first : first + 12]
            assert np.array_equal(part.rows(stored) * own[:10, :12], expected)
