"""The benchmark of one rank of several: shapes, bytes and its own flow, by the emulator."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import emulator
import pytest
import tiny_deepseek
import torch
from emulator import SUPPORTED, EmulatedDevice

from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.ir.program import NONE, Kind

SCRIPT = Path(__file__).parents[1] / "bench" / "rank_gpu.py"
TINY = tiny_deepseek.CONFIG | {"vocab_size": 192, "num_hidden_layers": 2}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module(SCRIPT.stem)
    known = {k: v for k, v in TINY.items() if k != "quantization_config"}
    monkeypatch.setitem(module.MODELS, "Tiny", known)
    return module


def test_the_published_model(bench: Any) -> None:
    for key, value in bench.MODELS["DeepSeek-V3.2"].items():
        assert tiny_deepseek.PUBLISHED[key] == value, key
    assert all(name.endswith(tiny_deepseek.WIDE) for name in bench.BF16)
    assert bench.F32 == tiny_deepseek.F32


def test_a_rank_has_the_shapes_of_its_shard(bench: Any) -> None:
    """Sizes by hand, of a dense layer and one with experts."""
    asked = bench.Asked("DeepSeek-V3.2", 8, 4, 8320, 0)
    program = bench.compiled(asked, machine.H200, 1)
    sizes = {
        b.name.removeprefix("model.layers.3."): (b.rows, b.cols, b.dtype)
        for b in program.buffers if b.kind is Kind.WEIGHT and b.dtype is not DType.F32
    }  # fmt: skip
    f8, bf16 = DType.F8E4M3, DType.BF16
    assert sizes["lm_head.weight"] == (129280 // 8, 7168, bf16)
    assert sizes["model.embed_tokens.weight"] == (129280, 7168, bf16)
    assert sizes["model.layers.0.mlp.down_proj.weight"] == (7168, 18432 // 8, f8)
    assert sizes["self_attn.o_proj.weight"] == (7168, 16 * 128, f8)
    assert sizes["mlp.gate.weight"] == (256, 7168, bf16)
    assert sizes["mlp.shared_experts.up_proj.weight"] == (256, 7168, f8)
    assert sizes["tilert.layers.3.key_up"] == (16 * 512, 128, f8)
    bank = next(b for b in program.buffers if b.bank == 256)
    assert (bank.rows, bank.cols, bank.block) == (256 * 256, 7168, (128, 128))
    assert all(b.scale != NONE for b in program.buffers if b.dtype is f8 and b.kind is Kind.WEIGHT)
    # By hand: 3 layers of 88.0 MB, one of 91.7 with 8 experts of 5.5 MB, 231.7 MB of head; beyond 2048
    # positions the product for the indexer's queries, 12.6 MB, and what it scores.
    latents = 4 * 1152  # bytes of a position
    assert bench.step_bytes(program, 0) / 1e6 == pytest.approx(587.5, rel=1e-3)
    assert bench.step_bytes(program, 1024) - bench.step_bytes(program, 512) == 512 * latents
    assert bench.step_bytes(program, 2047) == pytest.approx(587.5e6 + 2048 * latents, rel=1e-3)
    packed = bench.compiled(bench.Asked("DeepSeek-V3.2", 8, 4, 8320, 0, "fp8"), machine.H200, 1)
    assert bench.step_bytes(packed, 1024) - bench.step_bytes(packed, 512) == 512 * 4 * 656
    far = 587.5e6 + 4 * 12.583e6 + 2048 * latents + 4 * 8192 * 132
    assert bench.step_bytes(program, 8192) == pytest.approx(far, rel=2e-3)


@pytest.mark.skipif(not SUPPORTED, reason="the emulator needs g++ on x86-64")
def test_the_whole_flow(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On both sides of the number of positions that the indexer selects; a process is a call."""
    for name, value in (("STEPS", 2), ("TRACED", 3), ("SKIPPED", 1), ("CHUNK", 4096)):
        monkeypatch.setattr(bench, name, value)
    tensor = property(lambda memory: torch.from_numpy(memory.bytes))
    monkeypatch.setattr(emulator.Memory, "tensor", tensor, raising=False)
    device = EmulatedDevice(tmp_path / "kernels")
    monkeypatch.setattr(bench.gpu_ceiling, "measure", lambda _: {"bulk": 1e9})
    monkeypatch.setattr(
        bench, "in_child", lambda given: json.loads(json.dumps(bench.child(given, device)))
    )
    out = tmp_path / "made" / "rank.json"
    asked = "--model Tiny --devices 2 --inputs 3,70 --tokens 1,8 --repeats 1 --processes 1 --ops"
    monkeypatch.setattr(
        "sys.argv", ["x", *asked.split(), "--kv-cache-dtype", "fp8", "--out", str(out)]
    )
    bench.run(bench.arguments(), device)
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    assert [(r["tokens"], r["input"]) for r in result["rows"]][:2] == [(1, 3), (1, 70)]
    assert all(r["ms"] > 0 and r["share"] > 0 for r in result["rows"])
    assert "steps over 8 tokens" in said or any(r["tokens"] == 8 for r in result["rows"])
    assert (result["rank"]["devices"], result["rank"]["kv_cache_dtype"]) == (2, "fp8")
    table = result["ops"][0]
    rows = [each for row in table["ops"] for each in row.get("beside", [row])]
    assert {"Select", "LatentAttention", "ExpertGate", "lm_head"} <= {row["op"] for row in rows}
    assert "1 tokens after 70:" in said
    assert "one rank of 2" in out.with_suffix(".html").read_text()


def test_what_is_not_known_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("--inputs 0", "--inputs 200000", "--tokens 3", "--repeats 0", "--model GPT"):
        monkeypatch.setattr("sys.argv", ["x", *wrong.split()])
        with pytest.raises(SystemExit):
            bench.arguments()
