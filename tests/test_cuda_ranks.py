"""The runtime of the CUDA back end with what `tilert convert` makes for one of several devices."""

from __future__ import annotations

import json
from pathlib import Path

import families
import numpy as np
import pytest
import tiny_deepseek
import torch
from emulator import SUPPORTED, EmulatedDevice
from test_convert import EVEN, make

from tilert.backends.cuda.backend import CudaBackend
from tilert.backends.cuda.runtime import CudaRuntime
from tilert.compiler.units import with_units
from tilert.engine.runner import Row, Runner
from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.models import load_config
from tilert.models.decoder import build
from tilert.models.load import bind, scales
from tilert.models.shards import part_of
from tilert.weights.safetensors import read_folder

TOKENS = [7, 201, 33, 7, 150]


@pytest.mark.skipif(not SUPPORTED, reason="the emulator needs g++ on x86-64")
@pytest.mark.parametrize("name", ["qwen2", "deepseek_v32"])
def test_a_rank_is_loaded_and_runs(name: str, kernels: Path, tmp_path: Path) -> None:
    """Its logits are the interpreter's, of each of two ranks, whose sums are their own shares alone."""
    source, found = tmp_path / "model", list[np.ndarray]()
    if name == "deepseek_v32":
        tiny_deepseek.make(source, tiny_deepseek.CONFIG | {"vocab_size": 512}, files=1)
        (source / "tokenizer.json").unlink()  # whose vocabulary is larger
    else:
        families.make(name, source, torch.bfloat16, **EVEN)
    make(source, tmp_path / "out", 2)
    config = load_config(json.loads((source / "config.json").read_text()))
    graph = part_of(build(config, 64), 2)
    for rank in range(2):
        tensors, _ = read_folder(tmp_path / "out" / f"rank-{rank}-of-2")
        weights, stored = bind(graph, config, 64, tensors), scales(graph, config, tensors)
        device = EmulatedDevice(kernels)
        runtime = CudaRuntime(device, graph, weights, 1)
        dtypes = {name: DType.of(array) for name, array in weights.items()}
        target = with_units(graph, device.machine, dtypes, stored)
        runners = [
            Runner(
                graph, weights, on, context=64, sequences=1, num_pages=1, place=place, scales=stored
            )
            for on, place in ((target, runtime), (machine.cpu(2), None))
        ]
        made = runners[0].backend("decode")
        assert isinstance(made, CudaBackend)
        made.state["counts"][0] = 1, 1
        for at, token in enumerate(TOKENS):
            made.state["tokens"][0, 0], made.state["positions"][0, 0] = token, at
            list(made.steps(1))
        runners[1].set_pages(0, [0])
        runners[1].step([Row(t, at, 0) for at, t in enumerate(TOKENS)], [len(TOKENS) - 1])
        own, wanted = made.read("logits")[0], runners[1].logits()[0]
        assert np.abs(own - wanted).max() < 2e-2 * np.abs(wanted).max()
        found.append(wanted.copy())
    assert np.abs(found[0] - found[1]).max() > 0.1 * np.abs(found[0]).max()
