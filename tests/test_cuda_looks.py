"""When runs begin to look for their x: which waits the queues of the kernel have, of those of the program."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tilert.backends.cuda import looks as module
from tilert.backends.cuda.looks import Looks
from tilert.compiler import Limits, build
from tilert.ir import machine
from tilert.ir.program import Program, Run, Wait
from tilert.ir.tags import derive
from tilert.models import load_config
from tilert.models.decoder import build as build_graph
from tilert.ops import Linear


def small(tokens: int = 1, workers: int = 3) -> Program:
    config = load_config({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 64, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    })  # fmt: skip
    few = replace(machine.H100, workers_per_device=workers)
    return build(build_graph(config, 128), few, Limits(tokens, tokens, 1, 128), {})


def kept(program: Program) -> list[tuple[Run, set[int], dict[Wait, int]]]:
    """Of all runs: the ops of their worker, and the waits that are left."""
    looks = Looks(program, derive(program))
    return [
        (run, own, looks.wanted(run, own))
        for queue in program.queues for own in [{run.op for run in queue}] for run in queue
    ]  # fmt: skip


def for_x(program: Program, run: Run) -> set[Wait]:
    """The waits of a product's run for those who write its x."""
    op, tags = program.ops[run.op], derive(program)
    if not isinstance(op, Linear):
        return set()
    maker = tags.writer(op.x, run.op)
    signals = {r.signal for queue in program.queues for r in queue if r.op == maker}
    return {wait for wait in run.waits if wait.counter in signals and not wait.lag}


def test_a_short_x_is_looked_for_at_once_and_all_else_is_awaited() -> None:
    program = small()
    left_out = 0
    for run, own, wanted in kept(program):
        own_x = for_x(program, run)
        left_out += len(own_x - wanted.keys())
        assert {w: n for w, n in wanted.items() if w not in own_x} == {
            w: w.threshold for w in run.waits if w not in own_x
        }
        # A worker that has not read what was there before waits for one signal.
        others = derive(program).told(program, run.op)[1]
        assert {*wanted} & own_x == (set() if others & own else own_x)
        assert all(wanted[w] == 1 for w in {*wanted} & own_x)
    assert left_out


def test_a_long_x_when_most_have_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT", 0)
    program = small(workers=5)
    counts = {
        (wait.threshold, count)
        for run, _, wanted in kept(program)
        for wait, count in wanted.items() if wait in for_x(program, run)
    }  # fmt: skip
    assert counts == {(total, max(1, int(module.MOST * total))) for total, _ in counts}
    assert any(count < total for total, count in counts)


def test_steps_of_several_tokens_wait_for_all() -> None:
    for run, _, wanted in kept(small(tokens=4)):
        assert wanted == {wait: wait.threshold for wait in run.waits}
