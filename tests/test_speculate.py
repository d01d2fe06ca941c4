"""Speculation: drafts, their verification, and that nothing but the time shows it."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest

from tilert import LLM
from tilert.backends.cpu import ISAS
from tilert.engine.runner import FEW, Row, Runner
from tilert.errors import UserError
from tilert.ir.program import PAGE


def prefilled(runner: Runner, length: int) -> list[Row]:
    """Rows that follow `length` random tokens, whose keys and values are computed."""
    tokens = np.random.default_rng(length).integers(3, 199, length + FEW).tolist()
    runner.set_pages(0, range(-(-len(tokens) // PAGE)))
    rows = [Row(token, position, 0) for position, token in enumerate(tokens)]
    runner.step(rows[:length], [])
    return rows[length:]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("family", "threads"), [("llama", 1), ("mistral", 2), ("qwen3", 2)])
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
        alone = [runner.step([row], [0])[1][0].copy() for row in rows]
        for count in range(2, FEW + 1):
            _, together = runner.step(rows[:count], range(count))
            assert np.array_equal(together, alone[:count])
