"""The parts of the GPU benchmark that need no GPU: shapes, bytes, tables, peers, and what it says without
one. Its own flow, and the chain of kernels, by the emulator."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulator
import numpy as np
import pytest
import torch
import transformers
from emulator import SUPPORTED, EmulatedDevice

from tilert import LLM, SamplingParams
from tilert.backends.cuda.jit import compile_cubin
from tilert.ir import machine
from tilert.models import load_config
from tilert.serve.trace import simulated

SCRIPT = Path(__file__).parents[1] / "bench" / "decode_gpu.py"
TINY: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 96, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
emulated = pytest.mark.skipif(not SUPPORTED, reason="the emulator needs g++ on x86-64")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module(SCRIPT.stem)


@pytest.fixture
def tiny(bench: Any, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """A device for the model 'Tiny', which three tokens of output are enough for."""
    monkeypatch.setitem(bench.MODELS, "Tiny", TINY)
    monkeypatch.setattr(bench, "STEPS", 3)
    tensor = property(lambda memory: torch.from_numpy(memory.bytes))
    monkeypatch.setattr(emulator.Memory, "tensor", tensor, raising=False)
    return EmulatedDevice(kernels)


@emulated
def test_settings_take_turns_over_the_same_weights(
    tiny: EmulatedDevice, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = importlib.import_module("settings_gpu")
    for name, value in (("POSITIONS", (3, 70)), ("STEPS", 2), ("LAUNCHES", 1)):
        monkeypatch.setattr(settings, name, value)
    rows = settings.time_settings("Tiny", [1], tiny)
    assert [(r["window"], r["even"]) for r in rows] == [(1, False), (1, True)]
    assert all(ms > 0 for row in rows for ms in row["ms_per_token"].values())
    assert all([*row["ms_per_token"]] == ["3", "70"] for row in rows)


@emulated
def test_runs_that_differ_are_told(
    tiny: EmulatedDevice, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("repeat_gpu")
    monkeypatch.setattr(script, "STEPS", 3)
    model = bench.RandomModel("Tiny", 64, tiny)
    assert script.first_that_differs(model, 3) == -1
    true, runs = script.outcome, iter(range(5))
    monkeypatch.setattr(script, "outcome", lambda model: (true(model), next(runs) == 2))
    assert script.first_that_differs(model, 4) == 2


def test_ops_of_a_step_add_up_to_it(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MODELS, "Tiny", TINY)
    ops = importlib.import_module("ops_gpu")
    device = SimpleNamespace(name="NVIDIA H100", machine=machine.by_name("h100"))
    program = bench.compiled("Tiny", 64, device)
    steps = [simulated(program, context, 3e12, 4e10) for context in (12, 20)]
    rows = ops.timed(program, steps, 1e9)
    assert sum(row["times"] for row in rows) == len(program.ops)
    assert [row["times"] for row in rows if row["op"] == "Attend"] == [TINY["num_hidden_layers"]]
    assert sum(row["step"] for row in rows) == pytest.approx(
        sum(step.seconds for step in steps) / len(steps) * 1e6
    )
    moved = sum(row["bytes"] * row["times"] for row in rows)
    assert moved == pytest.approx(bench.step_bytes("Tiny", program, 16), rel=0.1)
    assert ops.table(rows, 1.0).count("\n") == 1 + len(rows)


def test_ops_beside_each_other_share_a_row(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a level takes is counted once, and each of its ops is told from the level's begin on."""
    rank = importlib.import_module("rank_gpu")
    ops = importlib.import_module("ops_gpu")
    program = rank.compiled(rank.Asked("DeepSeek-V3.2", 8, 4, 8320, 0), machine.H200, 1)
    step = simulated(program, 20, 3e12, 4e10)
    rows = ops.timed(program, [step], 1e9)
    assert sum(row["step"] for row in rows) == pytest.approx(step.seconds * 1e6)
    shared = [row for row in rows if "beside" in row]
    assert {row["op"] for row in shared} >= {"gate | gate_proj", "Route | down_proj"}
    for row in shared:
        each = row["beside"]
        assert " | ".join(r["op"] for r in each) == row["op"]
        assert max(r["takes"] for r in each) == pytest.approx(row["takes"])
        assert sum(r["bytes"] for r in each) == pytest.approx(row["bytes"])
    lines = ops.table(rows, 1.0).splitlines()
    assert len(lines) == 2 + len(rows) + sum(len(row["beside"]) for row in shared)


@emulated
def test_memory_is_taken_apart(
    tiny: EmulatedDevice, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("memory_gpu")
    for name, value in (("PROMPT", 128), ("CHUNK", 64), ("STEPS", 2)):
        monkeypatch.setattr(script, name, value)
    asked: list[str] = []
    attribute = lambda kernel, name: asked.append(name) or 8  # noqa: E731
    monkeypatch.setattr(emulator.Kernel, "attribute", attribute, raising=False)
    used = iter(range(10**6, 10**9, 10**6))  # every step takes 1 MB
    meter = script.Meter(lambda: next(used), 0)
    script.measure("Tiny", 128, tiny, meter)
    steps = {line["step"]: line for line in meter.lines}
    assert len(steps) == len(meter.lines)
    assert {line["step_mb"] for line in meter.lines} == {1.0}
    for kind in ("decode", "sampled"):
        assert steps[f"{kind}: kernel"]["local_size_bytes"] == 8
        assert {f"{kind}: tables, arena", f"{kind}: launch"} <= steps.keys()
    held = sum(steps[name]["known_mb"] for name in ("weights", "cache"))
    last = meter.lines[-1]
    assert last["beyond_mb"] == pytest.approx(len(steps) - held, abs=0.11)
    assert "prompt of 128, 128 at a time, again" in steps
    left = last["beyond_mb"] - steps[script.WHOLE]["beyond_mb"]  # the last two steps give back
    assert left == pytest.approx(2.0)


def test_memory_under_limits_of_the_stack_stands_side_by_side(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Two processes that are played, of which one fails behind its first line."""
    script = importlib.import_module("memory_gpu")
    play = tmp_path / "play.py"
    play.write_text(
        "import json, sys\n"
        "limit = int(sys.argv[sys.argv.index('--stack-limit') + 1])\n"
        "print('said by a library')\n"
        "print(json.dumps({'step': 'context', 'step_mb': limit / 4, 'beyond_mb': limit / 4}))\n"
        "if limit == 64: sys.exit(3)\n"
        "print(json.dumps({'step': 'all of a process', 'step_mb': 1.0, 'beyond_mb': 9.5}))\n"
    )
    device = SimpleNamespace(name="NVIDIA H100", machine=machine.by_name("h100"))
    monkeypatch.setattr(script, "__file__", str(play))
    monkeypatch.setattr(script, "open_device", lambda: device)
    monkeypatch.setattr(script, "loading", lambda: "LAZY")
    out = tmp_path / "x.json"
    for given, code in (([], 0), (["--stack-limits", "64,2048"], 1)):
        monkeypatch.setattr(sys, "argv", ["memory_gpu.py", "--out", str(out), *given])
        assert script.main() == code
    found = json.loads(out.read_text())["stack_limits"]
    assert [line["step"] for line in found["64"]] == ["context", "failed"]
    assert found["64"][-1]["code"] == 3
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "MB of the step stack 1024 stack 128" in printed
    assert "context 256.0 32.0" in printed
    assert "all of a process, beyond weights and cache 9.5 9.5" in printed
    assert "context 16.0 512.0" in printed


def test_shapes_are_read_as_they_are_meant(bench: Any) -> None:
    for name, given in bench.MODELS.items():
        own = load_config(given)
        for config in (own, transformers.AutoConfig.for_model(**given)):
            for key in given.keys() - {"rope_scaling", "rope_theta"}:
                home = config if hasattr(config, key) else own.experts
                assert getattr(home, key) == given[key], (name, key)
        rope = transformers.AutoConfig.for_model(**given).rope_parameters
        assert rope == {"rope_type": "default", "rope_theta": given["rope_theta"]} | given.get(
            "rope_scaling", {}
        )
        assert load_config(given).rope_scaling.rope_type == rope["rope_type"]
        assert bench.config_of(name + bench.FP8) == given


# Parameters of the model cards, without embeddings that only look up a row.
@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("Llama-3.2-1B", 2.471), ("Qwen3-0.6B", 1.192), ("Qwen3-0.6B-FP8", 0.752)],
)
def test_bytes_of_a_step(bench: Any, name: str, gigabytes: float) -> None:
    small: Any = SimpleNamespace(name="NVIDIA H200", machine=machine.H200)
    program = bench.compiled(name, 128, small)
    weights = bench.step_bytes(name, program, 0)
    assert weights / 1e9 == pytest.approx(gigabytes, rel=2e-3)
    config = load_config(bench.config_of(name))
    position = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert bench.step_bytes(name, program, 100) - weights == 100 * position


@pytest.mark.parametrize(("kind", "each"), [("", 2 * 3 * 64 * 128), ("-FP8", 3 * (64 * 128 + 4))])
def test_of_experts_those_of_a_token_count(
    bench: Any, kind: str, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of one expert, in FP8 with one scale for each matrix."""
    sizes = {**TINY, "model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": 8,
             "moe_intermediate_size": 128}  # fmt: skip
    found: list[float] = []
    for chosen in (1, 4):
        monkeypatch.setitem(bench.MODELS, "Mix", {**sizes, "num_experts_per_tok": chosen})
        device = SimpleNamespace(name="NVIDIA H200", machine=machine.H200)
        program = bench.compiled(f"Mix{kind}", 128, device)
        found.append(bench.step_bytes(f"Mix{kind}", program, 0))
    assert found[1] - found[0] == 3 * each


def test_the_capacity_holds_the_last_token_in_whole_pages(bench: Any) -> None:
    assert [bench.capacity(n) for n in ([32], [1024, 32], [64], [65])] == [192, 1152, 192, 256]


def test_a_row_is_made_of_medians(bench: Any) -> None:
    found = [
        {"token_ms": [3.0, 1.0, 2.0], "first_token_ms": [9.0]},
        {"token_ms": [5.0, 4.0, 6.0], "first_token_ms": []},
        {"token_ms": [2.5, 2.5, 7.0], "first_token_ms": [11.0]},
    ]
    row = bench.row_of("Llama-3.2-1B", 32, found, moved=2.5e9, ceiling=2e12)
    assert row == {
        "model": "Llama-3.2-1B", "input": 32, "ms_per_token": 2.5, "min": 1.0, "max": 7.0,
        "processes": [2.0, 5.0, 2.5], "bytes": 2.5e9, "share": 0.5, "first_token_ms": 10.0, "steps": {},
        "peers": {},
    }  # fmt: skip
    bench.add_peer(row, "eager", {"token_ms": 10.0})
    assert row["peers"] == {"eager": {"token_ms": 10.0, "ratio": 4.0}}
    assert bench.line_of(row) == (
        "Llama-3.2-1B   after     32 |  2.5000 ms/token (1.0000 to 7.0000) |  50.0% of the ceiling"
        " | first token 10.0 ms | eager 10.000 ms, ratio 4.00"
    )
    for each in found:
        each |= {"rows_4_ms": [5.0], "rows_8_ms": [], "trace_ms": [2.5, 2.75, 3.0]}
    row = bench.row_of("Llama-3.2-1B", 32, found, moved=2.5e9, ceiling=2e12)
    assert row["steps"].keys() == {"rows_4", "trace"}
    assert row["steps"]["rows_4"]["ratio"] == 2.0
    assert row["steps"]["trace"]["ratio"] == pytest.approx(1.1)
    assert "10.0 ms | rows 4 5.0000 ms, x2.000 | trace 2.7500 ms, x1.100" in bench.line_of(row)


@pytest.mark.parametrize(
    ("device", "file"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("RTX 5090", "rtx-5090"),
    ],
)
def test_results_are_named_after_the_device(bench: Any, device: str, file: str) -> None:
    assert bench.results_file(device).name == f"decode-gpu-{file}.json"


@emulated
@pytest.mark.parametrize("name", ["Tiny", "Tiny-FP8"])
def test_the_whole_flow(
    name: str, bench: Any, tiny: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LONGEST_PROMPT", 10)
    monkeypatch.setattr(bench.gpu_ceiling, "measure", lambda _: {"bulk": 4e12, "plain": 3e12})
    asked: list[list[str]] = []

    def in_child(arguments: list[str], timeout: float) -> Any:
        asked.append(arguments)
        if "--peer" in arguments:
            return {"token_ms": [1.0, 2.0, 3.0]}
        return json.loads(json.dumps(bench.time_ours(name, [5, 70], 2, tiny)))

    monkeypatch.setattr(bench, "in_child", in_child)
    monkeypatch.setattr(sys, "argv", ["decode_gpu.py", "--models", name, "--commit", "abc"])
    args = argparse.Namespace(
        models=[name], inputs=[5, 70], processes=2, repeats=2, peers=["eager", "chain"], commit="abc",
        rows=[], trace=False, peer_timeout=1.0, gpt_fast=tmp_path / "none", megakernels=None,
        out=tmp_path / "out" / "x.json",
    )  # fmt: skip
    bench.run(args, tiny)
    result = json.loads(args.out.read_text())
    assert result["ceiling"] == 4e12
    assert result["device"] == "emulated GPU"
    assert result["command"] == f"python bench/decode_gpu.py --models {name}"
    assert result.keys() >= {
        "driver",
        "cuda",
        "torch",
        "transformers",
        "date",
        "protocol",
        "commit",
    }
    assert [row["input"] for row in result["rows"]] == [5, 70]
    for row in result["rows"]:
        assert len(row["processes"]) == 2
        assert row["min"] <= row["ms_per_token"] <= row["max"]
        assert (row["first_token_ms"] is None) == (row["input"] == 70)
        assert row["peers"].keys() == ({"chain"} if name.endswith("FP8") else {"eager", "chain"})
        assert row["peers"]["chain"]["token_ms"] == 2.0
    assert asked[0] == ["--child", "--models", name, "--inputs", "5,70", "--repeats", "2"]


@emulated
@pytest.mark.parametrize("name", ["Tiny", "Tiny-FP8"])
def test_a_prompt_by_torch_and_row_by_row(
    name: str, bench: Any, tiny: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.driver")
    from tilert.backends.cuda.device import Device

    ids, found = list(range(40, 90)), []
    ready = SimpleNamespace(get=lambda: None)
    monkeypatch.setattr("tilert.backends.cuda.late.import_torch", lambda: None)  # it has no GPU
    monkeypatch.setattr(EmulatedDevice, "torch", ready, raising=False)
    for runner in (EmulatedDevice.prompt_runner, Device.prompt_runner):
        monkeypatch.setattr(EmulatedDevice, "prompt_runner", runner)
        torch.manual_seed(5)
        model = bench.RandomModel(name, 128, tiny)
        first = model.first_token(ids)
        found.append([first, *model.tokens(first, len(ids), 3)])
        assert type(model.prompt).__name__ == ("Prompts" if len(found) == 2 else "Pieces")
    assert found[0] == found[1]


@emulated
def test_steps_over_several_tokens_and_with_the_trace(bench: Any, tiny: EmulatedDevice) -> None:
    found = bench.time_ours("Tiny", [5], 2, tiny, (2, 4), trace=True)["5"]
    assert found.keys() == {"token_ms", "first_token_ms", "rows_2_ms", "rows_4_ms", "trace_ms"}
    assert all(len(samples) == 2 for samples in found.values())
    model = bench.RandomModel("Tiny", 128, tiny)
    assert len(model.steps_of(2, 5, 3)) == 3
    assert model.steps_of(3, 5, 3) is None  # there is no program for three


@emulated
def test_the_chain_makes_the_same_bits(bench: Any, tiny: EmulatedDevice) -> None:
    chains = importlib.import_module("gpu_chain")
    model = bench.RandomModel("Tiny", 128, tiny)
    expected = model.tokens(3, 60, 6)
    logits = model.decode.read("logits")
    chain = chains.Chain(model.decode)
    found: list[int] = []
    for position in range(60, 66):
        for params in chain.launches(found[-1] if found else 3, position):
            model.decode.kernel.launch(chain.workers, params)
            model.decode.kernel.wait()
        found.append(int(model.decode.mailbox[0]))
    assert found == expected
    assert np.array_equal(model.decode.read("logits"), logits)
    assert len(chain.launched) == len(model.decode.program.ops)


def test_the_ceiling_is_read_without_spills(bench: Any) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    made = bench.gpu_ceiling.source()
    cubin = compile_cubin(made.text, name="ceiling", arch="sm_90a", headers=made.headers)
    assert cubin.resources.keys() == bench.gpu_ceiling.KERNELS.keys()
    assert all(r.stack == 0 for r in cubin.resources.values())
    assert cubin.resources["plain"].registers >= 64  # 16 loads of 4 words under way


def test_transformers_makes_tokens(bench: Any) -> None:
    made = bench.gpu_peers.time_transformers(TINY, 9, 12, 2, compiled=False, device="cpu")
    assert made.keys() == {"token_ms", "first_token_ms"}
    assert all(len(samples) == 2 and min(samples) > 0 for samples in made.values())


def test_a_peer_has_its_time_and_no_more(bench: Any, tmp_path: Path) -> None:
    mark = tmp_path / "late"
    late = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    with pytest.raises(bench.NotMeasured, match=r"it took more than 0\.5 s"):
        bench.output_of([sys.executable, "-c", code], 0.5)
    time.sleep(2.5)
    assert not mark.exists()
    code = "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"
    with pytest.raises(bench.NotMeasured, match=r"code 3 and said\nno such thing"):
        bench.output_of([sys.executable, "-c", code], 20)


def test_what_a_process_started_ends_when_it_is_asked_to_end(tmp_path: Path) -> None:
    marks = tmp_path / "begun", tmp_path / "lived"
    begun, lived = map(str, marks)
    late = f"import time; open({begun!r}, 'w'); time.sleep(2); open({lived!r}, 'w')"
    code = f"import gpu_peers, sys; gpu_peers.output_of([sys.executable, '-c', {late!r}], 60)"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=SCRIPT.parent)
    while not marks[0].exists():
        time.sleep(0.02)
    child.terminate()
    assert child.wait(30) == 128 + signal.SIGTERM
    time.sleep(2.5)
    assert not marks[1].exists()


def test_checkouts_of_others(bench: Any, tmp_path: Path) -> None:
    peers = bench.gpu_peers
    with pytest.raises(peers.NotMeasured, match=r"there is no .*generate\.py"):
        peers.time_gpt_fast(tmp_path, "Llama-3.2-1B", 128, 20)
    echo = "import sys; print(sys.argv[1:]); print('{}: 250.00')"
    (tmp_path / "generate.py").write_text(echo.format("Average tokens/sec"))
    with pytest.raises(peers.NotMeasured, match=r"has no model\.pth of Llama-3\.2-1B"):
        peers.time_gpt_fast(tmp_path, "Llama-3.2-1B", 128, 20)
    weights = tmp_path / "checkpoints" / "meta-llama" / "Llama-3.2-1B-Instruct" / "model.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert peers.time_gpt_fast(tmp_path, "Llama-3.2-1B", 128, 20) == 4.0
    script = tmp_path / "megakernels" / "scripts" / "generate.py"
    script.parent.mkdir(parents=True)
    script.write_text(echo.format("Tokens per second"))
    assert peers.time_megakernels(tmp_path, "Llama-3.2-1B", 128, 20) == 4.0
    with pytest.raises(peers.NotMeasured, match="not for Qwen3-4B"):
        peers.time_megakernels(tmp_path, "Qwen3-4B", 128, 20)
    script.write_text("print('nothing')")
    with pytest.raises(peers.NotMeasured, match="names no tokens per second"):
        peers.time_megakernels(tmp_path, "Llama-3.2-1B", 128, 20)


def test_the_checkpoint_of_the_start_loads(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(bench.MODELS, "Tiny", TINY)
    start = importlib.import_module("start_gpu")
    start.write_checkpoint(tmp_path, "Tiny")
    model = LLM(tmp_path, skip_tokenizer_init=True, max_model_len=64)
    (output,) = model.generate({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=2))
    assert len(output.outputs[0].token_ids) == 2
    runs = [{"seconds": {"import": t, "sum": 2 * t}} for t in (1.0, 3.0, 2.0)]
    assert start.phases(runs) == {"import": 2.0, "sum": 4.0}
    plain = {"token_ms": [1.0], "tokens": [3, 4], "verified": [], "drafted": 0, "accepted": 0}
    made = plain | {"token_ms": [0.5, 0.25, 0.5], "verified": [4, 2], "drafted": 7, "accepted": 4}
    assert start.told(made, plain) == {
        "ms_per_token": 0.5, "steps": 2, "drafted": 7, "accepted": 4,
        "tokens_per_verifying_step": 3.0, "same_tokens": True,
    }  # fmt: skip


@pytest.mark.parametrize("script", ["decode_gpu.py", "start_gpu.py", "memory_gpu.py"])
def test_without_a_gpu_it_says_so(script: str) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT.parent / script)], capture_output=True, text=True, env=hidden,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no CUDA device")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "none"], "model 'none' is not known; accepted are Llama-3.2-1B"),
        (["--peers", "none"], "peer 'none' is not known; accepted are transformers, eager, chain"),
        (["--inputs", "40960"], "--inputs accepts numbers from 1 to 40832 for these models"),
        (["--processes", "0"], "--processes and --repeats accept 1 and more"),
    ],
)
def test_what_is_not_known_is_refused(arguments: list[str], message: str) -> None:
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
