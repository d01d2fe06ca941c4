"""The CUDA back end under the engine: a real model, its kernel run by the emulator."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import guessing
import numpy as np
import pytest
import torch
from emulator import SUPPORTED, EmulatedDevice
from test_glassllm import convert

from tilert import LLM, SamplingParams
from tilert.backends.cuda import open_device, runtime
from tilert.backends.cuda.backend import UNSET, CudaBackend
from tilert.backends.cuda.runtime import CudaRuntime
from tilert.engine import engine
from tilert.engine.core import RequestOutput
from tilert.errors import UserError
from tilert.files import keep
from tilert.ir.machine import B200, H200, Machine, by_name
from tilert.ir.program import NONE, Buf, Program
from tilert.ops import Attend, Draw, Norm
from tilert.serve import llm as serving
from tilert.serve import report, trace, tune
from tilert.serve import shipped as shipping
from tilert.serve.shipped import SHIPPED, Shipped

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the emulator needs g++ on x86-64")
PROMPTS = [[5, 9, 33, 7, 260, 12], [1, 2, 3]]


@pytest.fixture(scope="module")
def glassllm(glassllm_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """glassllm as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("glassllm")
    convert(np.load(glassllm_wheel / "glassllm" / "weights" / "en.npz"), folder)
    return folder


@pytest.fixture
def device(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    made = EmulatedDevice(kernels)
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


def test_what_a_step_may_hold_is_worked_out_once(
    glassllm: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes milliseconds, and is asked for before each step."""
    asked: list[str] = []
    own = runtime.step_rows
    monkeypatch.setattr(runtime, "step_rows", lambda *given: asked.append("rows") or own(*given))
    gpu = LLM(
        glassllm,
        skip_tokenizer_init=True,
        max_model_len=64,
        backend="cuda",
        num_speculative_tokens=3,
    )
    prompt = {"prompt_token_ids": [5, 9, 33, 5, 9]}
    gpu.generate(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert asked == ["rows"]


@pytest.mark.parametrize(
    ("name", "alike", "kept"),
    [("deepseek_v3", 12, "auto"), ("glm_moe_dsa", 6, "auto"), ("deepseek_v3", 9, "fp8")],
)
def test_latent_attention_under_the_engine(
    name: str, alike: int, kept: str, device: EmulatedDevice, tmp_path: Path
) -> None:
    """Whole models, experts and shared choices of positions among their layers: the tokens that the
    interpreter gives on a machine that rounds less. Of the keys by which positions are chosen (8 of 6 to
    17 here) that is so much less that other positions are chosen at some time; latents in FP8 that lie
    between two numbers become the other one."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 96,
             "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
             "qk_rope_head_dim": 16, "q_lora_rank": 32, "moe_intermediate_size": 32}  # fmt: skip
    families.make(name, tmp_path, torch.bfloat16, **sizes)
    options: dict[str, Any] = {
        "skip_tokenizer_init": True, "max_model_len": 64, "kv_cache_dtype": kept,
    }  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    exact = LLM(tmp_path, backend="interpreter", **options)
    gpu = LLM(tmp_path, backend="cuda", **options)
    prompt = {"prompt_token_ids": [5, 9, 33, 7, 61, 12]}
    (wanted,), (found,) = (m.generate([prompt], params) for m in (exact, gpu))
    assert len(found.outputs[0].token_ids) == 12
    assert found.outputs[0].token_ids[:alike] == wanted.outputs[0].token_ids[:alike]


def test_the_checkpoints_layer_guesses(
    device: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of plain decoding with guesses of which some are right, in one program; a stop within a
    step."""
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 96,
        "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "qk_rope_head_dim": 16, "q_lora_rank": 32, "moe_intermediate_size": 32,
    }  # fmt: skip
    guessing.make("deepseek_v3", tmp_path, 0.01, dtype=torch.bfloat16, **sizes)
    model = LLM(tmp_path, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=2, backend="cuda",
                num_speculative_tokens=3, speculative_method="mtp")  # fmt: skip
    assert model.speculative_method == "mtp"

    def made(**changes: Any) -> RequestOutput:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **changes)
        return model.generate({"prompt_token_ids": [61]}, params)[0]

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "_guess_steps", lambda *_: 0)
        patch.setattr(engine.Engine, "_draft", lambda *_: [])
        plain = made().outputs[0].token_ids
    own = made()
    assert own.outputs[0].token_ids == plain
    assert {1, 2} & set(own.metrics.verified) != set(own.metrics.verified)
    output = made(stop_token_ids=[plain[5]]).outputs[0]
    assert output.token_ids == plain[: plain.index(plain[5]) + 1]
    model.engine.cache.check()


@pytest.mark.parametrize("of_outputs", [False, True])
def test_hidden_states_of_a_step_in_pieces(of_outputs: bool) -> None:
    """A launch takes two rows and leaves ten times what it was given; in a layer that guesses, of the rows
    that have logits."""

    class Made:
        program = SimpleNamespace(
            tokens=2, buffer_ids={"hidden": 0}, buffers=[SimpleNamespace(name="hidden")],
            ops=[Norm(NONE, NONE, Buf(0) if of_outputs else NONE, Buf(0), NONE, 2, 2, 3, 2, 1e-5)],
        )  # fmt: skip

        def __init__(self) -> None:
            shapes = {"tokens": (1, 2), "positions": (1, 2), "sequences": (1, 2), "pages": (1, 4),
                      "output_rows": (1, 2), "counts": (1, 2)}  # fmt: skip
            self.state: dict[str, Any] = {n: np.zeros(s, np.int32) for n, s in shapes.items()}
            self.state["given"] = np.zeros((2, 3), np.float32)

        def steps(self, count: int) -> Any:
            yield self.state["tokens"][0, : self.state["counts"][0, 0]]

        def read(self, name: str) -> Any:
            return 10 * self.state["given"] if name == "hidden" else self.state["tokens"].T * 1.0

    pieces = runtime.Pieces(Made(), 8)  # type: ignore[arg-type]
    given = np.arange(15, dtype=np.float32).reshape(5, 3)
    pieces.state["given"][:5] = given
    pieces.state["tokens"][0, :5] = range(5)
    pieces.state["counts"][0] = 5, 2
    pieces.state["output_rows"][0, :2] = 1, 4
    list(pieces.steps(1))
    hidden = pieces.read("hidden")
    assert np.array_equal(hidden[:5], 10 * (given[[1, 4]] if of_outputs else given))
    assert pieces.read("logits").tolist() == [[1], [4]]


def test_tokens_of_a_mixture_equal_the_cpu(tmp_path: Path, device: EmulatedDevice) -> None:
    """Several requests share steps, in which each token has experts of its own."""
    families.make("qwen3_moe", tmp_path, vocab_size=300)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    cpu = LLM(tmp_path, skip_tokenizer_init=True, max_model_len=64)
    gpu = LLM(tmp_path, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
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


@pytest.fixture
def tuning(
    device: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """A small search with a cache of its own."""
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))
    for name, value in {
        "FLIGHT": (4096, 8192, 16384), "UNITS": (8192, 2048, 6144), "PAST": 4, "STEPS": 2, "REPEATS": 1,
        "WARMING": 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(tune, name, value)
    return monkeypatch


def tunable(folder: Path) -> LLM:
    return LLM(folder, skip_tokenizer_init=True, max_model_len=64, backend="cuda")


def imagined(tuning: pytest.MonkeyPatch, seconds: Callable[[Machine], float]) -> None:
    """No kernels: times and logits that the machine alone decides."""
    tuning.setattr(CudaRuntime, "bound", lambda place, program: SimpleNamespace(program=program))
    tuning.setattr(tune, "_fill_past", lambda backend: None)
    tuning.setattr(tune, "_logits", lambda backend: np.ones(4, np.float32))
    tuning.setattr(tune, "_milliseconds", lambda backend: seconds(backend.program.machine))


def settings(machine: Machine) -> tuple[int, int, int, bool]:
    return machine.slot_bytes, machine.window, machine.splits, machine.even


GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=4, ignore_eos=True)


def test_tuning_goes_from_one_setting_to_the_next(
    glassllm: Path, device: EmulatedDevice, tuning: pytest.MonkeyPatch
) -> None:
    """Windows, units, splits, dealing, windows again, each from the best so far."""
    device.machine = own = replace(device.machine, workers_per_device=16, slots=8)
    runner, path, said = (model := tunable(glassllm)).runner, model.tuning_path, list[str]()
    best = replace(own, slots=4, slot_bytes=8192, window=1, even=True)

    def cost(machine: Machine) -> float:
        far = abs(machine.window * machine.slot_bytes - 8192) / 8192
        return 1 + far + (machine.slot_bytes != 8192) + (machine.splits != 0) - machine.even / 2

    imagined(tuning, cost)
    found = tune.search(runner, path, 600, said.append)
    rule = next(op.splits for op in runner.program("decode").ops if isinstance(op, Attend))
    assert [settings(m) for m in found] == [
        (4096, 2, 0, False), (4096, 1, 0, False), (4096, 4, 0, False),
        (6144, 1, 0, False), (8192, 1, 0, False),  # 2048 is less than a page of a head
        (8192, 1, rule // 2, False), (8192, 1, 0, True), (8192, 2, 0, True),
    ]  # fmt: skip
    assert tunable(glassllm).runner.machine == best
    assert said[0] == (
        "8 units of 4 KB, window 2, splits by rule, a whole step dealt evenly: 2.0000 ms per token"
    )
    assert said[-1] == (
        "kept: 4 units of 8 KB, window 1, splits by rule, each op dealt evenly:"
        " 0.5000 ms per token, 2.0000 before"
    )
    assert len(said) == len(found) + 1


def test_tuning_begins_nothing_that_would_end_too_late(
    glassllm: Path, tuning: pytest.MonkeyPatch
) -> None:
    now, said, model = [0.0], list[str](), tunable(glassllm)
    tuning.setattr(tune.time, "perf_counter", lambda: now[0])

    def cost(machine: Machine) -> float:
        now[0] += 10
        return 1.0

    imagined(tuning, cost)
    for seconds, tried in (
        (0.5, 1),
        (25, 2),
        (30, 3),
    ):  # the first of other machines has no forecast
        assert len(tune.search(model.runner, model.tuning_path, seconds, said.append)) == tried
        assert said[-2].startswith("no time left for 4 units of 4 KB, window ") or tried == 3
        assert said[-1].endswith("1.0000 ms per token, 1.0000 before")


def test_noise_changes_no_setting(glassllm: Path, tuning: pytest.MonkeyPatch) -> None:
    model = tunable(glassllm)
    imagined(tuning, lambda machine: 1 - 0.002 * (machine != model.runner.machine))
    assert len(tune.search(model.runner, model.tuning_path, 600, print)) > 4
    assert tunable(glassllm).runner.machine == model.runner.machine


def test_every_tuned_program_has_the_tokens_of_the_first(
    glassllm: Path, device: EmulatedDevice, tuning: pytest.MonkeyPatch
) -> None:
    """Real kernels: other windows and dealing with the same bits, other units and splits nearly. No weights
    are loaded again, and what is kept holds for all kinds of programs."""
    device.machine = own = replace(device.machine, workers_per_device=5, slots=8)
    first = tunable(glassllm)
    greedy, sampled = (answers(first, params) for params in (GREEDY, SAMPLED))
    others = [
        replace(own, window=1), replace(own, even=True), replace(own, splits=3),
        replace(own, slots=32768 // 6144, slot_bytes=6144),
    ]  # fmt: skip
    logits: list[bytes] = []
    look = tune._logits

    def looked(backend: CudaBackend) -> np.ndarray:
        logits.append((found := look(backend)).tobytes())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "upload", None)
        patch.setattr(tune, "_logits", looked)
        patch.setattr(tune._Search, "_candidates", lambda search: iter(others))
        assert list(tune.search(first.runner, first.tuning_path, 600, print)) == [own, *others]
    assert logits[0] == logits[1] == logits[2]
    for machine in others:
        fields = {name: getattr(machine, name) for name in tune.FIELDS}
        keep(first.tuning_path, json.dumps(fields).encode())
        tuned = tunable(glassllm)
        assert tuned.runner.machine == machine
        assert answers(tuned, GREEDY) == greedy
    assert answers(tuned, SAMPLED) == sampled
    assert tuned.runner.program("sampled").machine == others[-1]


def test_a_program_that_computes_something_else_is_not_kept(
    glassllm: Path, tuning: pytest.MonkeyPatch
) -> None:
    model = tunable(glassllm)
    imagined(tuning, lambda machine: 1.0 / machine.window)
    tuning.setattr(
        tune, "_logits", lambda backend: np.ones(4) + 1e-6 * (backend.program.machine.window == 1)
    )
    with pytest.raises(RuntimeError, match=r"window 1, .* a logit is 1e-06 off, where 0 can be$"):
        tune.search(model.runner, model.tuning_path, 600, print)
    assert tunable(glassllm).runner.machine == model.runner.machine
    off = 0.02
    tuning.setattr(
        tune,
        "_logits",
        lambda backend: np.ones(4) + off * (backend.program.machine.slot_bytes != 4096),
    )
    assert len(tune.search(model.runner, model.tuning_path, 600, print)) > 4
    off = 0.2
    with pytest.raises(RuntimeError, match=r"of 6 KB, .* a logit is 0\.2 off, where 0\.1 can be$"):
        tune.search(model.runner, model.tuning_path, 600, print)


def test_a_unit_that_the_kernel_does_not_have_is_passed_over(
    glassllm: Path, tuning: pytest.MonkeyPatch
) -> None:
    model, said = tunable(glassllm), list[str]()
    imagined(tuning, lambda machine: 1.0)

    def bound(place: CudaRuntime, program: Program) -> SimpleNamespace:
        if program.machine.slot_bytes == 8192:
            raise UserError("the shape is odd")
        return SimpleNamespace(program=program)

    tuning.setattr(CudaRuntime, "bound", bound)
    found = tune.search(model.runner, model.tuning_path, 600, said.append)
    assert all(machine.slot_bytes != 8192 for machine in found)
    assert sum(line.endswith("not for this model: the shape is odd") for line in said) == 1


@pytest.mark.parametrize(
    "given",
    [
        b"damaged", b"[1]", b"3", b"{}", b"null", b'{"window": "2"}', b'{"window": 0}', b'{"window": true}',
        b'{"slots": 1}', b'{"slots": 5}', b'{"slot_bytes": 1000}', b'{"slot_bytes": -2048}', b'{"splits": 1}',
        b'{"splits": 99}', b'{"even": 1}',
    ],
)  # fmt: skip
def test_what_is_kept_but_cannot_be_counts_for_nothing(
    given: bytes, device: EmulatedDevice, tmp_path: Path
) -> None:
    keep(path := tmp_path / "kept", given)
    assert tune.tuned(device.machine, device.name, 0, path) == device.machine
    path.write_bytes(given)  # without its checksum
    assert tune.tuned(device.machine, device.name, 0, path) == device.machine


def test_results_of_older_versions_are_used(device: EmulatedDevice, tmp_path: Path) -> None:
    keep(path := tmp_path / "kept", b'{"window": 1, "ms": {"1": 0.5}, "device": "emulated GPU"}')
    assert tune.tuned(device.machine, device.name, 0, path) == replace(device.machine, window=1)
    keep(path, b'{"window": 9, "more": 3}')
    assert tune.tuned(device.machine, device.name, 0, path).window == device.machine.slots


def test_what_was_measured_before_counts_until_a_model_is_tuned(
    glassllm: Path, device: EmulatedDevice, tuning: pytest.MonkeyPatch
) -> None:
    size = sum(array.nbytes for array in tunable(glassllm).runner.weights.values())
    entries = (
        Shipped("another GPU", 0, 10 * size, {"window": 4}),
        Shipped("emulated", 0, size - 1, {"window": 4}),
        Shipped("emulated", size + 1, 10 * size, {"window": 4}),
        Shipped("emulated", size, size, {"window": 1, "slots": 3}),
        Shipped("emulated", 0, 10 * size, {"window": 3}),
    )  # fmt: skip
    tuning.setattr(shipping, "SHIPPED", entries)
    model = tunable(glassllm)
    assert model.runner.machine == replace(device.machine, window=1, slots=3)
    imagined(tuning, lambda machine: 1.0 / machine.window)
    tune.search(model.runner, model.tuning_path, 600, print)
    assert tunable(glassllm).runner.machine.window > 1


def test_what_comes_with_tilert_fits_its_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every entry, and one of another field; other cards and larger models get nothing."""
    entries = (*SHIPPED, Shipped("H200", 0, 1_300_000_000, {"window": 2}))
    monkeypatch.setattr(shipping, "SHIPPED", entries)
    for entry in entries:
        own = by_name(entry.card)
        made = tune.tuned(own, f"NVIDIA {entry.card}", entry.most_bytes, tmp_path / "none")
        assert made == replace(own, **entry.settings) != own
        assert tune.tuned(own, f"NVIDIA {entry.card}", 1 << 50, tmp_path / "none") == own
    assert tune.tuned(B200, "NVIDIA B200", 1 << 30, tmp_path / "none") == B200


def test_a_ring_of_other_units_may_be_kept(tmp_path: Path) -> None:
    """Slots of 20 KB leave some of the 192 KB unused."""
    grown = replace(H200, slots=9, slot_bytes=20 << 10)
    for tuned, before in ((H200, grown), (grown, H200)):
        fields = {name: getattr(tuned, name) for name in tune.FIELDS}
        keep(path := tmp_path / "kept", json.dumps(fields).encode())
        assert tune.tuned(before, "NVIDIA H200", 0, path) == tuned


def test_a_result_is_found_again_with_another_context(glassllm: Path, device: Any) -> None:
    short, long = (
        LLM(glassllm, skip_tokenizer_init=True, max_model_len=n, backend="cuda").tuning_path
        for n in (64, 128)
    )
    assert short == long


def test_tuning_times_steps_of_a_gpu_only(
    glassllm: Path, device: EmulatedDevice, tuning: pytest.MonkeyPatch
) -> None:
    backend = tunable(glassllm).runner.backend("decode")
    assert isinstance(backend, CudaBackend)
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
    assert launches == [1, 4, 7]  # the prompt, which gives the first token, and two launches
    monkeypatch.setattr("tilert.engine.engine.LAUNCH_STEPS", 1)
    assert [d.token_id for d in gpu.stream(prompt, params)] == together
    monkeypatch.setattr(type(gpu.runner), "samples", False)
    assert [d.token_id for d in gpu.stream(prompt, params)] == together


@pytest.mark.parametrize(
    "given", [{"temperature": 0}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}]
)
def test_logprobs_of_the_device_are_those_of_the_host(
    given: dict[str, Any], glassllm: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, ranks and numbers, with a stop id in a launch, and many to a launch."""
    launches: list[int] = []
    steps = CudaBackend.steps

    def counted(backend: CudaBackend, count: int) -> Any:
        launches.append(count)
        return steps(backend, count)

    monkeypatch.setattr(CudaBackend, "steps", counted)
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=64, backend="cuda")
    prompt = {"prompt_token_ids": PROMPTS[1]}
    free = SamplingParams(**given, max_tokens=10, ignore_eos=True)
    (output,) = gpu.generate(prompt, free)
    ids = output.outputs[0].token_ids
    stop = next(t for t in ids if ids.index(t) > 4)
    asked = replace(free, logprobs=4, stop_token_ids=[stop])
    launches.clear()
    (ours,) = gpu.generate(prompt, asked)
    assert launches == [1, 9]
    monkeypatch.setattr(type(gpu.runner), "samples", False)
    (expected,) = gpu.generate(prompt, asked)
    assert launches[2:] == [1] * len(expected.outputs[0].token_ids)  # the prompt's among them
    assert ours.outputs == expected.outputs
    assert ours.outputs[0].token_ids == ids[: ids.index(stop) + 1]
    assert ours.outputs[0].logprobs is not None
    assert len(ours.outputs[0].logprobs) == len(ours.outputs[0].token_ids)


def test_the_prompts_length_alone_says_how_it_is_computed(
    glassllm: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some launches of the program for a few tokens (eight), or the prompt runner, waited for."""
    monkeypatch.setattr(runtime, "SHORT_LAUNCHES", 3)
    asked: list[Any] = []

    class Runner:
        def wait(self) -> None:
            asked.append("wait")

        hidden = torch.zeros(0, 0)

        def run(self, tokens: Any, begin: int, pages: Any, outputs: Any, _: None) -> torch.Tensor:
            asked.append((len(tokens), begin, outputs))
            return torch.zeros(len(outputs), 1024)

    monkeypatch.setattr(device, "prompt_runner", lambda *_: Runner())
    gpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=128, backend="cuda")
    cpu = LLM(glassllm, skip_tokenizer_init=True, max_model_len=128)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for count in (9, 24):
        prompt = {"prompt_token_ids": list(range(1, count + 1))}
        (ours,), (expected,) = gpu.generate(prompt, one), cpu.generate(prompt, one)
        assert ours.outputs[0].token_ids == expected.outputs[0].token_ids
    assert not asked
    (output,) = gpu.generate({"prompt_token_ids": [7] * 25}, one)
    assert output.outputs[0].token_ids == [0]
    assert asked == ["wait", (25, 0, [24])]
    asked.clear()
    monkeypatch.setattr(runtime, "RUNNER_ROWS", 35)
    again = LLM(glassllm, skip_tokenizer_init=True, max_model_len=128, backend="cuda")
    again.generate({"prompt_token_ids": [7] * 60}, one)
    assert asked == ["wait", (35, 0, []), "wait", (25, 35, [24])]
    assert gpu.first_use.keys() == {"few", "prompts"}
