"""The parts of the GPU benchmark that need no GPU: shapes, bytes, and what it says without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tilert.ir import machine
from tilert.models import load_config

SCRIPT = Path(__file__).parents[1] / "bench" / "decode_gpu.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("decode_gpu", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shapes_are_accepted(bench: Any) -> None:
    for name in bench.MODELS:
        config = load_config(bench.config_of(name))
        assert config.hidden_size == bench.MODELS[name]["hidden_size"]


# Parameters of the model cards, without embeddings that only look up a row.
@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("Llama-3.2-1B", 2.471), ("Qwen3-0.6B", 1.192), ("Qwen3-0.6B-FP8", 0.752)],
)
def test_bytes_of_a_step(bench: Any, name: str, gigabytes: float) -> None:
    small = SimpleNamespace(machine=machine.H200)
    program = bench.compiled(name, 128, small)
    weights = bench.step_bytes(name, program, 0)
    assert weights / 1e9 == pytest.approx(gigabytes, rel=2e-3)
    config = load_config(bench.config_of(name))
    position = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert bench.step_bytes(name, program, 100) - weights == 100 * position


def test_without_a_gpu_it_says_so() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=hidden,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no CUDA device")


def test_an_unknown_model_is_refused() -> None:
    command = [sys.executable, str(SCRIPT), "--models", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "model 'none' is not known; accepted are Llama-3.2-1B" in done.stderr
