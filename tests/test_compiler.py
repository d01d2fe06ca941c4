"""The compiler: golden program texts, determinism, forms that round-trip, balance, folding."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import make_weights, outcome, tiny_model

from tilert.compiler import Limits, build
from tilert.compiler.simulate import simulate
from tilert.compiler.units import with_units
from tilert.ir import encode, machine
from tilert.ir.dtype import DType
from tilert.ir.machine import Machine
from tilert.ir.program import Kind, Program
from tilert.models import load_config
from tilert.models.decoder import build as build_graph
from tilert.models.derived import ROPE_TABLE
from tilert.ops import OPS, Attend, Attention, Combine, Linear, Norm

GOLDEN = Path(__file__).parent / "golden"
TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN3 = {**TINY, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}
EXPERTS = {**TINY, "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
           "mlp_only_layers": [0]}  # fmt: skip
SMOLLM2 = {**TINY, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
           "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
           "max_position_embeddings": 8192, "tie_word_embeddings": True}  # fmt: skip
LLAMA_1B = {**SMOLLM2, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip


QWEN3_4B = {**QWEN3, "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip


def compiled(
    config: dict[str, Any],
    target: Machine,
    tokens: int = 1,
    context: int = 128,
    layers: int | None = None,
) -> Program:
    """The program of a config with all weights in bf16."""
    parsed = load_config(config)
    if layers is not None:
        parsed = replace(parsed, num_hidden_layers=layers, layer_types=parsed.layer_types[:layers])
    graph = build_graph(parsed, context)
    dtypes = {name: DType.BF16 for name in graph.weights if name != ROPE_TABLE}
    outputs = tokens if tokens <= 8 else 1
    return build(graph, target, Limits(tokens, outputs, 8, context), dtypes)


@pytest.mark.parametrize(
    ("name", "config", "target", "tokens"),
    [
        ("llama-cpu2", TINY, machine.cpu(2), 1),
        ("qwen3-null-4-tokens", QWEN3, machine.NULL, 4),
        ("qwen2_moe-null-2-tokens", EXPERTS, machine.NULL, 2),
    ],
)
def test_golden_program_text(
    name: str, config: dict[str, Any], target: Machine, tokens: int
) -> None:
    """A change of these texts is a change of every compiled program: look at it, then renew the file
    by running the test with TILERT_RENEW_GOLDEN=1."""
    text = encode.to_text(compiled(config, target, tokens))
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("TILERT_RENEW_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("target", [machine.cpu(2), machine.NULL, machine.H100])
def test_same_input_gives_the_same_bytes_and_both_forms_agree(target: Machine) -> None:
    first, second = (compiled(TINY, target) for _ in range(2))
    data = encode.to_bytes(first)
    assert data == encode.to_bytes(second)
    again = encode.from_bytes(data, OPS)
    assert again == first
    assert encode.to_text(again) == encode.to_text(first)


def test_a_cut_off_binary_program_is_refused() -> None:
    data = encode.to_bytes(compiled(TINY, machine.cpu(2)))
    for size in (0, 8, 60, len(data) // 2):
        with pytest.raises((AssertionError, ValueError)):
            encode.from_bytes(data[:size], OPS)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_bytes_are_balanced_over_workers(workers: int, tokens: int) -> None:
    program = compiled(SMOLLM2, machine.cpu(workers), tokens, context=2048)
    moved = []
    for queue in program.queues:
        costs = [program.ops[r.op].cost(r.lo, r.hi, 2, 512) for r in queue]
        moved.append(sum(c.bytes + c.cache_bytes for c in costs))
    assert max(moved) <= 1.03 * sum(moved) / workers


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_what_takes_mostly_latency_is_dealt_to_all_workers(tokens: int) -> None:
    """Also where there are more tiles than workers: 256 heads of eight tokens were on four of them."""
    program = compiled(LLAMA_1B, machine.H100, tokens, context=2048, layers=2)
    for index, op in enumerate(program.ops):
        if isinstance(op, Attend | Combine):
            runs = [r.hi - r.lo for queue in program.queues for r in queue if r.op == index]
            assert max(runs) == -(-op.tiles // 132), op
            assert len(runs) == min(op.tiles, 132), op


def test_norms_are_folded_for_few_tokens_only() -> None:
    few, many = (compiled(TINY, machine.cpu(2), tokens) for tokens in (1, 64))
    assert sum(isinstance(op, Norm) for op in few.ops) == 1  # the last, which gathers
    assert sum(isinstance(op, Norm) for op in many.ops) == 2 * 2 + 1
    assert all(op.norm == -1 for op in many.ops if isinstance(op, Linear))


def test_attention_is_split_when_heads_do_not_divide_over_workers() -> None:
    splits = {
        workers: next(
            op.splits for op in compiled(SMOLLM2, machine.cpu(workers), layers=1).ops
            if isinstance(op, Attention)
        )
        for workers in (1, 2, 3, 4)
    }  # fmt: skip
    assert splits == {1: 1, 2: 2, 3: 1, 4: 4}


@pytest.mark.parametrize("target", [machine.cpu(3), machine.NULL])
def test_splits_are_what_the_machine_says(target: Machine) -> None:
    """The same in all steps of few tokens; prompts do without."""
    for tokens, splits in ((1, 4), (8, 4), (64, 1)):
        ops = compiled(TINY, replace(target, splits=4), tokens).ops
        found = {op.splits for op in ops if isinstance(op, Attention | Attend | Combine)}
        assert found == {splits}


def linear_spread(program: Program) -> list[int]:
    """Of each product, tiles of the worker that has most less tiles of the one that has least."""
    tiles = [[0] * len(program.queues) for _ in program.ops]
    for worker, queue in enumerate(program.queues):
        for run in queue:
            tiles[run.op][worker] += run.hi - run.lo
    return [
        max(t) - min(t) for t, op in zip(tiles, program.ops, strict=True) if isinstance(op, Linear)
    ]


def test_each_op_or_a_whole_step_is_dealt_evenly() -> None:
    """A step is even in bytes either way, for who gets less of an op is next in line for more."""
    programs = [
        compiled(LLAMA_1B, replace(machine.H200, even=even), layers=4, context=2048)
        for even in (False, True)
    ]
    step, each = map(linear_spread, programs)
    assert max(step) > 1
    assert max(each) == 1
    for program in programs:
        moved = [
            sum(program.ops[r.op].cost(r.lo, r.hi, 2, 0).bytes for r in queue)
            for queue in program.queues
        ]
        assert max(moved) <= 1.03 * sum(moved) / len(moved)


def test_a_window_changes_nothing_else() -> None:
    first, second = (compiled(TINY, replace(machine.NULL, window=n)) for n in (1, 3))
    assert replace(first, machine=second.machine) == second


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize(
    "changes", [{"even": True}, {"splits": 3}, {"slots": 2, "slot_bytes": 96}, {"slot_bytes": 512}]
)
def test_tuned_programs_compute_the_same(changes: dict[str, int], tokens: int) -> None:
    """All of them are verified when they are compiled; nearly, for splits change the order of sums."""
    plain, tuned = (tiny_model(m, tokens) for m in (machine.NULL, replace(machine.NULL, **changes)))
    assert plain.queues != tuned.queues
    weights = make_weights(plain)
    expected, found = outcome(plain, weights, "sequential"), outcome(tuned, weights, "random", 5)
    assert found.sampled == expected.sampled
    both = (np.frombuffer(o.memory["logits"], np.float32) for o in (found, expected))
    ours, wanted = (logits.reshape(tokens, -1)[:2] for logits in both)  # of rows with tokens
    assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_activations_share_storage_over_layers() -> None:
    two, six = (compiled(SMOLLM2, machine.cpu(2), layers=n) for n in (2, 6))
    assert two.arena_bytes == six.arena_bytes
    work = [b for b in six.buffers if b.kind is Kind.WORK]
    assert sum(b.bytes for b in work) <= six.arena_bytes


def test_simulated_step_is_near_the_byte_floor_and_never_below() -> None:
    for target in (machine.cpu(1), machine.cpu(2), machine.H100):
        program = compiled(LLAMA_1B, target, layers=4)
        total = max(span.end for span in simulate(program, 128))
        rate = min(target.read_bandwidth, target.worker_bandwidth * target.workers)
        floor = (
            sum(program.ops[r.op].cost(r.lo, r.hi, 2, 128).bytes for q in program.queues for r in q)
            / rate
        )
        assert floor <= total <= 1.35 * floor


@pytest.mark.parametrize("slot_bytes", [8192, 16384, 24576, 32768])
def test_ring_machines_stream_every_weight_byte_through_slots(slot_bytes: int) -> None:
    target = replace(machine.H100, slots=(192 << 10) // slot_bytes, slot_bytes=slot_bytes)
    program = compiled(LLAMA_1B, target, layers=1)
    assert all(run.ring >= 0 for queue in program.queues for run in queue)
    for op in program.ops:
        if isinstance(op, Linear):
            units = program.ring_units(op, 0, 1)
            assert op.cost(0, 1, 2, 0).bytes <= units * program.machine.slot_bytes


def units_for(config: dict[str, Any], target: Machine) -> Machine:
    graph = build_graph(load_config(config), 128)
    dtypes = {name: DType.BF16 for name in graph.weights if name != ROPE_TABLE}
    return with_units(graph, target, dtypes)


def test_units_grow_until_tiles_have_four_rows() -> None:
    h200 = machine.H200
    assert units_for(LLAMA_1B, h200) == h200  # rows of 4 KB: four fit 16 KB
    grown = units_for(QWEN3_4B, h200)  # rows of 5 KB: four fit 20 KB
    assert grown == replace(h200, slots=9, slot_bytes=20480)
    rows = {
        target.slot_bytes: [
            op.tile_rows
            for op in compiled(QWEN3_4B, target, layers=1).ops
            if isinstance(op, Linear)
        ]
        for target in (h200, grown)
    }
    assert rows == {16384: [2, 4, 1, 2, 2], 20480: [4, 2, 2, 2, 4]}
    shorter = {**QWEN3_4B, "hidden_size": 1024, "intermediate_size": 3072,
               "num_attention_heads": 16}  # fmt: skip
    assert units_for(shorter, h200).slot_bytes == 24576  # for rows of 6 KB


def test_units_stay_where_there_is_no_room() -> None:
    deep = replace(machine.H200, window=5)  # nine slots are less than twice that
    assert units_for(QWEN3_4B, deep) == deep
    assert units_for(QWEN3_4B, machine.cpu(2)) == machine.cpu(2)


def test_units_hold_sixteen_rows_of_a_latent_cache() -> None:
    latent = {"model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 1024, "rms_norm_eps": 1e-6,
              "intermediate_size": 512, "num_hidden_layers": 1, "first_k_dense_replace": 1,
              "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 256,
              "max_position_embeddings": 128}  # fmt: skip
    h200 = machine.H200
    assert units_for(latent, h200) == replace(h200, slots=9, slot_bytes=20480)
    small = replace(h200, slots=24, slot_bytes=8192)  # half as much again is not enough
    assert units_for(latent, small) == replace(small, slots=10, slot_bytes=18432)
