"""Programs that are kept on disk: found again, told apart, and compiled anew when damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tilert.compiler import Limits
from tilert.engine import programs
from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.ir.program import Scale
from tilert.models import load_config
from tilert.models.decoder import build as build_graph

LIMITS = Limits(1, 1, 1, 128)
TARGET = replace(machine.H100, workers_per_device=20)


def graph_of(layers: int = 1) -> Any:
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128,
              "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": 256, "rms_norm_eps": 1e-5}  # fmt: skip
    return build_graph(load_config(config), 128)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))
    return tmp_path / "program"


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each time that the compiler was called."""
    calls: list[object] = []
    build = programs.build

    def counted(*args: Any) -> Any:
        calls.append(args)
        return build(*args)

    monkeypatch.setattr(programs, "build", counted)
    return calls


def test_the_second_call_finds_an_equal_program(compiles: list[object]) -> None:
    first = programs.program_for(graph_of(), TARGET, LIMITS, {})
    assert programs.program_for(graph_of(), TARGET, LIMITS, {}) == first
    assert len(compiles) == 1


def test_whatever_decides_the_result_tells_them_apart(
    compiles: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = "model.layers.0.mlp.down_proj.weight"
    stored = {weight: DType.F8E4M3}
    given: list[tuple[Any, ...]] = [
        (graph_of(), TARGET, LIMITS, {}),
        (graph_of(2), TARGET, LIMITS, {}),
        (graph_of(), replace(TARGET, window=1), LIMITS, {}),
        (graph_of(), TARGET, replace(LIMITS, context=64), {}),
        (graph_of(), TARGET, replace(LIMITS, sampled=True), {}),
        (graph_of(), TARGET, LIMITS, {weight: DType.BF16}),
        (graph_of(), TARGET, LIMITS, stored, {weight: Scale("s", (32, 32))}),
        (graph_of(), TARGET, LIMITS, stored, {weight: Scale("s", (64, 64))}),
    ]
    for arguments in given:
        programs.program_for(*arguments)
    monkeypatch.setattr(programs, "_compiler", lambda: "another")
    programs.program_for(*given[0])
    assert len(compiles) == len(given) + 1


def test_a_damaged_file_is_compiled_again(folder: Path, compiles: list[object]) -> None:
    first = programs.program_for(graph_of(), TARGET, LIMITS, {})
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert programs.program_for(graph_of(), TARGET, LIMITS, {}) == first
    assert len(compiles) == 2
    assert programs.program_for(graph_of(), TARGET, LIMITS, {}) == first
    assert len(compiles) == 2


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: list[object]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        programs.program_for(graph_of(), TARGET, LIMITS, {})
    assert len(compiles) == 2


def test_few_workers_are_compiled_each_time(folder: Path, compiles: list[object]) -> None:
    for _ in range(2):
        programs.program_for(graph_of(), machine.cpu(2), LIMITS, {})
    assert len(compiles) == 2
    assert not folder.exists()
