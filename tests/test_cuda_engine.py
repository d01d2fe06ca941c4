"""The CUDA back end under the engine: a real model, its kernel run by the emulator."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulator import SUPPORTED, EmulatedDevice
from test_glassllm import convert

from tilert import LLM, SamplingParams
from tilert.backends.cuda import open_device, runtime
from tilert.backends.cuda.backend import UNSET, CudaBackend
from tilert.errors import UserError
from tilert.ops import Draw
from tilert.serve import llm as serving
from tilert.serve import report, trace, tune

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the emulator needs g++ on x86-64")
PROMPTS = [[5, 9, 33, 7, 260, 12], [1, 2, 3]]


@pytest.fixture(scope="module")
def glassllm(glassllm_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """glassllm as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("glassllm")
    convert(np.load(glassllm_wheel / "glassllm" / "weights" / "en.npz"), folder)
    return folder


@pytest.fixture
def device(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> EmulatedDevice:
    made = EmulatedDevice(tmp_path_factory.getbasetemp() / "kernels")
    monkeypatch.setattr(serving, "open_device", lambda notify: made)
    return made


def answers(model: LLM, params: SamplingParams) -> list[list[int]]:
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    return [result.outputs[0].token_ids for result in model.generate(prompts, params)]


def test_tokens_equal_the_cpu(glassllm: Path, device: EmulatedDevice) -> None:
    cpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64)
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    for params in (
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=3, max_tokens=6, ignore_eos=True),
    ):
        assert answers(gpu, params) == answers(cpu, params)


def test_loading_is_timed_by_phase(glassllm: Path, device: EmulatedDevice) -> None:
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    assert list(gpu.load_phases) == ["device", "files", "program", "weights", "kernel"]
    assert all(seconds > 0 for seconds in gpu.load_phases.values())
    assert gpu.first_use == {}
    assert sum(gpu.load_phases.values()) <= gpu.load_seconds
    (output,) = gpu.generate(
        {"prompt_token_ids": PROMPTS[0]}, SamplingParams(temperature=0, max_tokens=2)
    )
    assert re.search(
        r"loaded in [\d.]+ s \(device [\d.]+, files [\d.]+, program [\d.]+, weights [\d.]+,"
        r" kernel [\d.]+\), at first use prompts 1.50\]$",
        report.stats(output, gpu.load_seconds, gpu.load_phases, {"prompts": 1.5}),
    )


def test_tuning_keeps_the_best_window(
    glassllm: Path, device: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))
    for name, value in {"WINDOWS": (1, 2, 9), "STEPS": 2, "REPEATS": 1, "WARMING": 0}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(tune, "_milliseconds", lambda backend: 1.0 / backend.program.machine.window)
    said: list[str] = []

    def model() -> LLM:
        return LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")

    device.machine = replace(device.machine, window=1)
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    first = model()
    expected = answers(first, greedy)
    assert tune.search(first.runner, first.tuning_path, 0, said.append) == {
        1: 1.0
    }  # no time for another
    assert model().runner.machine.window == 1
    assert tune.search(first.runner, first.tuning_path, 60, said.append) == {
        1: 1.0,
        2: 0.5,
    }  # the ring has 4 slots
    assert said[-1] == "window 2: 0.5000 ms per token"
    second = model()
    assert second.runner.machine.window == 2
    assert answers(second, greedy) == expected
    first.tuning_path.write_bytes(b"damaged")
    assert model().runner.machine.window == 1


def test_tuning_times_steps_of_a_gpu_only(glassllm: Path, device: EmulatedDevice) -> None:
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    backend = gpu.runner.backend("decode")
    assert isinstance(backend, CudaBackend)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STEPS": 2, "REPEATS": 2, "WARMING": 0}.items():
            patch.setattr(tune, name, value)
        assert tune._milliseconds(backend) > 0
    cpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64)
    with pytest.raises(UserError, match=r"^tune is for the back end 'cuda'; give --backend cuda"):
        tune.search(cpu.runner, cpu.tuning_path, 1, print)


def test_streaming_can_be_stopped(glassllm: Path, device: EmulatedDevice) -> None:
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    whole = [d.token_id for d in gpu.stream({"prompt_token_ids": PROMPTS[0]}, params)]
    stream: Any = gpu.stream({"prompt_token_ids": PROMPTS[0]}, params)
    assert [next(stream).token_id for _ in range(5)] == whole[:5]
    stream.close()
    again = [d.token_id for d in gpu.stream({"prompt_token_ids": PROMPTS[0]}, params)]
    assert again == whole


def test_the_kernel_stops_by_itself(glassllm: Path, device: EmulatedDevice) -> None:
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    free = answers(gpu, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[1]
    stop = next(t for t in free if free.index(t) > 3)
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    stream = gpu.stream({"prompt_token_ids": PROMPTS[1]}, params)
    assert [d.token_id for d in stream] == free[: free.index(stop) + 1]
    backend = gpu.runner.backend("decode")
    assert isinstance(backend, CudaBackend)
    made = np.flatnonzero(backend.mailbox[:19] != UNSET)
    assert made.size == free.index(stop)  # the first token is the prompt's


def test_a_trace_shows_the_gpu(glassllm: Path, device: EmulatedDevice) -> None:
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    recorded = trace.record(gpu, {"prompt_token_ids": PROMPTS[1]}, params)
    runs = sum(map(len, recorded.program.queues))
    assert all(len(step.spans) == runs for step in recorded.steps)
    assert recorded.processor == "emulated GPU, ring of 4 slots"
    assert "emulated GPU" in trace.page(recorded)
    assert "gate_proj" in trace.summary(recorded)


def test_a_trace_of_sampled_steps_shows_the_draw(glassllm: Path, device: EmulatedDevice) -> None:
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=4, ignore_eos=True)
    recorded = trace.record(gpu, {"prompt_token_ids": PROMPTS[1]}, params)
    assert len(recorded.steps) == 3
    assert isinstance(recorded.program.ops[-1], Draw)
    assert "Draw" in trace.page(recorded)


def test_a_model_that_does_not_fit_is_refused(
    glassllm: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda: 600_000_000)
    with pytest.raises(UserError, match=r"emulated GPU has 0\.6 GB free: 0\.0 GB are missing"):
        LLM(glassllm, skip_tokenizer_init=True, backend="cuda")


def test_without_a_gpu_there_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"no CUDA device|needs the package"):
        open_device()


def test_sampled_tokens_come_many_to_a_launch(
    glassllm: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch has the tokens that launches of one step have, also where min_tokens ends."""
    params = SamplingParams(
        temperature=0.9, top_p=0.9, top_k=40, seed=7, repetition_penalty=1.3, frequency_penalty=0.2,
        logit_bias={17: 2.0}, min_tokens=5, max_tokens=12,
    )  # fmt: skip
    launches: list[int] = []
    steps = CudaBackend.steps

    def counted(backend: CudaBackend, count: int) -> Any:
        launches.append(count)
        return steps(backend, count)

    monkeypatch.setattr(CudaBackend, "steps", counted)
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    prompt = {"prompt_token_ids": PROMPTS[1]}
    together = [d.token_id for d in gpu.stream(prompt, params)]
    assert launches == [1, 1, 1, 4, 7]  # the prompt, which gives the first token, and two launches
    monkeypatch.setattr("tilert.engine.engine.LAUNCH_STEPS", 1)
    assert [d.token_id for d in gpu.stream(prompt, params)] == together
    monkeypatch.setattr(type(gpu.runner), "samples", False)
    assert [d.token_id for d in gpu.stream(prompt, params)] == together


def test_logprobs_are_read_on_the_host(glassllm: Path, device: EmulatedDevice) -> None:
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    plain = SamplingParams(temperature=0.8, seed=3, max_tokens=6, ignore_eos=True)
    shown = SamplingParams(temperature=0.8, seed=3, max_tokens=6, ignore_eos=True, logprobs=2)
    assert answers(gpu, shown) == answers(gpu, plain)


def test_the_prompts_length_alone_says_how_it_is_computed(
    glassllm: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some launches of the program for a few tokens (of one here), or the prompt runner, waited for."""
    monkeypatch.setattr(runtime, "SHORT_LAUNCHES", 20)
    asked: list[Any] = []

    class Runner:
        def wait(self) -> None:
            asked.append("wait")

        def run(self, tokens: Any, begin: int, pages: Any, outputs: Any) -> torch.Tensor:
            asked.append((len(tokens), begin, outputs))
            return torch.zeros(len(outputs), 1024)

    monkeypatch.setattr(device, "prompt_runner", lambda *_: Runner())
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=128, backend="cuda")
    cpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=128)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for count in (9, 20):
        prompt = {"prompt_token_ids": list(range(1, count + 1))}
        (ours,), (expected,) = gpu.generate(prompt, one), cpu.generate(prompt, one)
        assert ours.outputs[0].token_ids == expected.outputs[0].token_ids
    assert not asked
    (output,) = gpu.generate({"prompt_token_ids": [7] * 21}, one)
    assert output.outputs[0].token_ids == [0]
    assert asked == ["wait", (21, 0, [20])]
    assert gpu.first_use.keys() == {"prompts"}
