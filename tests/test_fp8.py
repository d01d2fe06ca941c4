"""FP8 checkpoints: read as stored, in both ways of writing them down, against the dequantised model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from emulator import EmulatedDevice, Memory
from safetensors.torch import load_file, save_file
from test_models import own_logits, tokens_for
from transformers import AutoModelForCausalLM

from tilert import LLM
from tilert.backends.cuda import prompt_experts, runtime
from tilert.backends.cuda.prompt import PromptRunner, over_memory
from tilert.compiler import Limits
from tilert.compiler import build as compile_program
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.program import JOIN
from tilert.models.decoder import build
from tilert.models.load import bind, scales

E4M3_MAX = 448.0
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16],
          "fmt": "e4m3"}  # fmt: skip


def compressed(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy,
               "dynamic": False}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"]}  # fmt: skip


# name: (quantization_config, rows and columns of a block, None for all; suffix of the scales)
KINDS: dict[str, tuple[dict[str, Any], tuple[int | None, int | None], str]] = {
    "blocks": (BLOCKS, (16, 16), "_scale_inv"),
    "tensor": (compressed("tensor"), (None, None), "_scale"),
    "channel": (compressed("channel"), (1, None), "_scale"),
}


def quantize(folder: Path, exact: Path, kind: str, family: str = "qwen3", **changes: Any) -> None:
    """A random model in FP8 in `folder`, and the same numbers in f32 in `exact`."""
    families.make(family, exact, **changes)
    tensors, config = (
        load_file(exact / "model.safetensors"),
        json.loads((exact / "config.json").read_text()),
    )
    quantization, (rows, cols), suffix = KINDS[kind]
    stored = dict(tensors)
    for name, w in tensors.items():
        if "_proj.weight" not in name:
            continue
        block = rows or w.shape[0], cols or w.shape[1]
        grid = [-(-n // b) for n, b in zip(w.shape, block, strict=True)]
        wide = [torch.arange(n) // b for n, b in zip(w.shape, block, strict=True)]
        padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
        padded[: w.shape[0], : w.shape[1]] = w.abs()
        scale = padded.view(grid[0], block[0], grid[1], block[1]).amax(dim=(1, 3)) / E4M3_MAX
        spread = scale[wide[0]][:, wide[1]]
        q = (w / spread).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}{suffix}"] = q, scale.view(1) if scale.numel() == 1 else scale
        tensors[name] = q.float() * spread
    save_file(tensors, exact / "model.safetensors", {"format": "pt"})
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def quantized(tmp_path: Path, kind: str, family: str) -> tuple[Path, np.ndarray]:
    """An FP8 model, and logits of the dequantised one by transformers."""
    folder, exact = tmp_path / "fp8", tmp_path / "exact"
    folder.mkdir()
    quantize(folder, exact, kind, family)
    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()
    return folder, families.logits(model, tokens_for(24))


@pytest.fixture(params=KINDS)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A dense model."""
    return quantized(tmp_path, request.param, "qwen3")


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
def test_logits_equal_the_dequantised_model(folders: tuple[Path, np.ndarray], backend: Any) -> None:
    folder, expected = folders
    llm = LLM(folder, skip_tokenizer_init=True, backend=backend, max_model_len=64)
    made = [own_logits(llm, tokens_for(24), sizes) for sizes in ([8, 8, 8], [1] * 24, [16, 8])]
    for own in made:
        known = ~np.isnan(own[:, 0])
        assert np.abs(own[known] - expected[known]).max() < 1e-3
    if backend == "cpu":  # a row has the same bits alone and among others
        np.testing.assert_array_equal(made[0], made[1])


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen3_moe", "blocks"),
        ("qwen3_moe", "channel"),
        ("qwen2_moe", "blocks"),
        ("qwen2_moe", "tensor"),
        ("deepseek_v32", "blocks"),
        ("deepseek_v32", "channel"),
    ],
)
def test_logits_of_experts_equal_the_dequantised_model(
    family: str, kind: str, tmp_path: Path
) -> None:
    """Each expert has blocks of its own: its 20 rows do not fill the second block of 16. Blocks of
    kv_b_proj reach over borders of heads."""
    folder, expected = quantized(tmp_path, kind, family)
    backends: tuple[Any, ...] = ("cpu", "interpreter")
    for backend in backends:
        llm = LLM(folder, skip_tokenizer_init=True, backend=backend, max_model_len=64)
        for sizes in ([8, 8, 8], [16, 8]):
            own = own_logits(llm, tokens_for(24), sizes)
            known = ~np.isnan(own[:, 0])
            assert np.abs(own[known] - expected[known]).max() < 1e-3


def test_experts_with_different_scales_are_refused(tmp_path: Path) -> None:
    quantize(tmp_path, tmp_path / "exact", "channel", "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    tensors[name] = tensors[name].reshape(-1)[:1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    message = (
        r"experts.3.up_proj.weight' and '.*experts.0.up_proj.weight' have scales for .*one kind"
    )
    with pytest.raises(UserError, match=message):
        LLM(tmp_path, skip_tokenizer_init=True, backend="interpreter")


def prompt_logits(folder: Path) -> np.ndarray:
    """Of the last token, by PyTorch as for prompts on a GPU."""
    llm = LLM(folder, skip_tokenizer_init=True, backend="interpreter", max_model_len=64)
    graph = build(llm.config, 64)
    arrays = bind(graph, llm.config, 64, llm.checkpoint.tensors)
    weights = {
        name: torch.from_numpy(a.view(np.uint8).copy()).view(torch.float8_e4m3fn)
        if a.dtype.itemsize == 1 else torch.from_numpy(np.array(a))
        for name, a in arrays.items()
    }  # fmt: skip
    shape = (1, llm.config.num_key_value_heads, 64, llm.config.head_dim)
    caches = {f"layers.{i}.{kv}_cache": torch.zeros(shape) for i in range(3) for kv in "kv"}
    where = scales(graph, llm.config, llm.checkpoint.tensors)
    weights, where = families.stacked(graph, weights, where)
    return PromptRunner(graph, weights, caches, where).run(tokens_for(24), 0, [0], [23])[0].numpy()


def test_prompts_on_a_gpu_read_them_too(
    folders: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = folders
    whole = prompt_logits(folder)
    assert np.abs(whole - expected[23]).max() < 0.02 * np.abs(expected[23]).max()
    monkeypatch.setattr(prompt_experts, "WIDENED", 2 * 48 * 17)  # bytes of 17 of its rows, or 16
    np.testing.assert_allclose(prompt_logits(folder), whole, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_moe", "blocks"), ("qwen3_moe", "channel"), ("qwen2_moe", "tensor")],
)
def test_prompts_on_a_gpu_read_experts_too(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them at a time; blocks do not fill the 20 rows of a matrix."""
    folder, expected = quantized(tmp_path, kind, family)
    monkeypatch.setattr(prompt_experts, "WIDENED", 2 * 20 * 48 * 2)
    assert np.abs(prompt_logits(folder) - expected[23]).max() < 0.02 * np.abs(expected[23]).max()


def test_prompts_on_a_gpu_find_banks_in_the_programs_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, exact = tmp_path / "fp8", tmp_path / "exact"
    folder.mkdir()
    quantize(folder, exact, "channel", "qwen3_moe")
    llm = LLM(folder, skip_tokenizer_init=True, backend="interpreter", max_model_len=64)
    graph = build(llm.config, 64)
    where = scales(graph, llm.config, llm.checkpoint.tensors)
    arrays = bind(graph, llm.config, 64, llm.checkpoint.tensors)
    device = EmulatedDevice(tmp_path)
    dtypes = {name: DType.of(array) for name, array in arrays.items()}
    program = compile_program(graph, device.machine, Limits(1, 1, 1, 64), dtypes, where)
    made = runtime.CudaRuntime(device, graph, arrays, 1)
    made._load(program)
    stored = made._stored(program)
    assert not any("experts" in name and JOIN not in name for name in stored)
    shape = (1, llm.config.num_key_value_heads, 64, llm.config.head_dim)
    caches = {
        f"layers.{i}.{kv}_cache": (device.allocate(4 * int(np.prod(shape))), shape, DType.F32)
        for i in range(3) for kv in "kv"
    }  # fmt: skip
    tensor = property(lambda memory: torch.from_numpy(memory.bytes))
    monkeypatch.setattr(Memory, "tensor", tensor, raising=False)
    runner = over_memory(graph, stored, caches, runtime._scales(program))
    logits = runner.run(tokens_for(24), 0, [0], [23])[0].numpy()
    np.testing.assert_array_equal(logits, prompt_logits(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no config", "is FP8, but config.json has no quantization_config"),
        ("no scales", r"its scales '.*weight_scale_inv' are missing"),
        ("few scales", r"have shape \[1, 1\], which does not fit \[.*\] in blocks of \[16, 16\]"),
        ("embedding", r"embed_tokens.weight' is float8_e4m3fn; accepted are float32"),
    ],
)
def test_damaged_ones_are_refused(tmp_path: Path, change: str, message: str) -> None:
    exact = tmp_path / "exact"
    quantize(tmp_path, exact, "blocks")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    if change == "no config":
        (tmp_path / "config.json").write_text((exact / "config.json").read_text())
        tensors = {n: t for n, t in tensors.items() if "scale" not in n}
    elif change == "no scales":
        del tensors[name]
    elif change == "few scales":
        tensors[name] = tensors[name][:1, :1].clone()
    else:
        embedding = "model.embed_tokens.weight"
        tensors[embedding] = tensors[embedding].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        LLM(tmp_path, skip_tokenizer_init=True, backend="interpreter")
