"""Ops beside each other: order, workers and storage of levels."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from programs import make_weights, outcome

from tilert import compiler
from tilert.compiler import Limits, build
from tilert.compiler.balance import PASTS, Work, level_seconds, shares
from tilert.compiler.guess import lower_speculation
from tilert.compiler.levels import arrange, side_by_side
from tilert.compiler.lower import lower
from tilert.compiler.simulate import simulate
from tilert.compiler.units import with_units
from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Speculation
from tilert.ir.machine import Machine
from tilert.ir.program import Buffer, Kind, Op, Program
from tilert.models import load_config, mtp
from tilert.models.decoder import build as build_graph
from tilert.models.derived import ROPE_TABLE
from tilert.models.shards import part_of

CONTEXT = 128
SPARSE: dict[str, Any] = {
    "model_type": "deepseek_v32", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_group": 4, "topk_group": 2,
    "norm_topk_prob": True, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
SHARED: dict[str, Any] = {
    **LLAMA, "model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
}  # fmt: skip
# The widths of DeepSeek-V3.2, of which one of eight devices has a part.
WIDE: dict[str, Any] = {
    **SPARSE, "hidden_size": 7168, "intermediate_size": 18432, "vocab_size": 1024,
    "num_hidden_layers": 2, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "moe_intermediate_size": 2048, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 2048, "max_position_embeddings": 65536,
}  # fmt: skip
MANY = replace(machine.NULL, name="many", workers_per_device=24)
ROUTED = ("mlp.gate.weight", "embed_tokens.weight", "lm_head.weight", "weights_proj.weight")


def lowered(config: dict[str, Any], target: Machine, tokens: int) -> tuple[list[Buffer], list[Op]]:
    graph = build_graph(load_config(config), CONTEXT)
    return lower(graph, target, Limits(tokens, tokens, 1, CONTEXT), {}, {})


def guessing(target: Machine) -> tuple[list[Buffer], list[Op]]:
    config = load_config(SPARSE)
    graph = build_graph(config, CONTEXT, hidden=True)
    both = Speculation(graph, mtp.build(config, CONTEXT, ()), 2)
    return lower_speculation(both, target, Limits(4, 4, 1, CONTEXT), {}, {})


def compiled(config: dict[str, Any], target: Machine, tokens: int = 1) -> Program:
    graph = build_graph(load_config(config), CONTEXT)
    return build(graph, target, Limits(tokens, tokens, 2, CONTEXT), {})


class Built(NamedTuple):
    """A program and what it was made of."""

    graph: Graph
    dtypes: dict[str, DType]
    target: Machine
    limits: Limits
    program: Program


@pytest.fixture(scope="module")
def rank() -> Built:
    """One of eight devices, FP8 without scales."""
    context = 40960
    graph = part_of(build_graph(load_config(WIDE), context), 8)
    dtypes = {
        name: DType.BF16 if name.endswith(ROUTED) else DType.F8E4M3
        for name, value in graph.weights.items() if value.rows != 1 and name != ROPE_TABLE
    }  # fmt: skip
    target = with_units(graph, machine.H200, dtypes)
    limits = Limits(1, 1, 1, context)
    return Built(graph, dtypes, target, limits, build(graph, target, limits, dtypes))


def conflict(a: Op, b: Op, caches: set[int]) -> bool:
    """True when one writes what the other touches; rows of caches are not told apart."""
    touched = [
        (r._replace(row_lo=0, row_hi=1) if r.buffer in caches else r, written, op)
        for op in (a, b)
        for written, regions in ((False, op.reads(0, op.tiles)), (True, op.writes(0, op.tiles)))
        for r in regions
    ]
    return any(
        (p or q) and x is not y and r.overlaps(s)
        for (r, p, x), (s, q, y) in itertools.combinations(touched, 2)
    )


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", ["sparse", "shared", "guessing"])
def test_order_and_levels_keep_what_ops_need(name: str, tokens: int) -> None:
    """Every pair of ops that touch the same keeps its order, a level apart."""
    if name == "guessing":
        buffers, ops = guessing(MANY)
    else:
        buffers, ops = lowered({"sparse": SPARSE, "shared": SHARED}[name], MANY, tokens)
    arranged, levels = arrange(MANY, buffers, ops)
    assert levels == sorted(levels)
    assert len(set(levels)) < len(ops), "nothing stands beside anything"
    place = {id(op): i for i, op in enumerate(arranged)}
    assert place.keys() == {id(op) for op in ops}
    moved = name == "guessing"  # then rows of caches count from several positions
    caches = {i for i, b in enumerate(buffers) if moved and b.kind is Kind.CACHE}
    positions = {getattr(op, "positions", -1) for op in ops} - {-1}
    for earlier, later in itertools.combinations(ops, 2):
        first, second = (levels[place[id(op)]] for op in (earlier, later))
        ends = any(r.buffer in positions for op in (earlier, later) for r in op.writes(0, op.tiles))
        assert first < second or not (ends or conflict(earlier, later, caches))


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (LLAMA, machine.H200),
        (LLAMA, machine.cpu(8)),
        (SPARSE, machine.cpu(8)),
        (SHARED, machine.cpu(2)),
    ],
)
def test_elsewhere_each_op_stands_for_itself(config: dict[str, Any], target: Machine) -> None:
    buffers, ops = lowered(config, target, 1)
    assert arrange(target, buffers, ops) == (ops, list(range(len(ops))))


def test_a_chain_stays_as_it_is() -> None:
    """In a dense model only appending does not belong to the chain, and that stays for itself."""
    target = replace(machine.H200, even=True)
    buffers, ops = lowered(LLAMA, target, 1)
    arranged, levels = arrange(target, buffers, ops)
    assert arranged == ops
    assert len(set(levels)) == len(ops)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("config", [SPARSE, SHARED], ids=["sparse", "shared"])
def test_levels_compute_the_same(
    config: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, for sums keep their order."""
    beside = compiled(config, MANY, tokens)
    monkeypatch.setattr(compiler, "arrange", lambda m, b, ops: (ops, list(range(len(ops)))))
    alone = compiled(config, MANY, tokens)
    assert beside.queues != alone.queues
    weights = make_weights(alone)
    expected, found = outcome(alone, weights, "sequential"), outcome(beside, weights, "random", 3)
    assert found.sampled == expected.sampled
    kept = ["logits", *(b.name for b in alone.buffers if b.kind is Kind.CACHE)]
    assert [found.memory[name] for name in kept] == [expected.memory[name] for name in kept]


def names(program: Program, level: list[int]) -> list[str]:
    """The kind of an op, or the weight of a product."""
    buffers = (program.buffers[getattr(program.ops[op], "w", -1)] for op in level)
    kinds = [type(program.ops[op]).__name__ for op in level]
    return sorted(
        b.name.split("+")[0].split(".")[-2] if kind == "Linear" else kind
        for b, kind in zip(buffers, kinds, strict=True)
    )


def test_a_rank_of_eight(rank: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does little by itself stands beside what has much to do, and the step has fewer runs."""
    graph, dtypes, target, limits, program = rank
    levels = [level for level in side_by_side(program) if len(level) > 1]
    found = {tuple(names(program, level)) for level in levels}
    assert any("weights_proj" in level for level in found), "the indexer's head weights"
    assert ("gate", "gate_proj") in found, "the shared expert beside the router"
    assert ("Route", "down_proj") in found, "and its sum beside the choice"
    tiles: dict[int, list[int]] = defaultdict(list)
    for queue in program.queues:
        for run in queue:
            tiles[run.op].append(run.hi - run.lo)
    for level in levels:
        assert sum(len(tiles[op]) for op in level) <= target.workers
        assert all(max(tiles[op]) - min(tiles[op]) <= 1 for op in level)
    monkeypatch.setattr(compiler, "arrange", lambda m, b, ops: (ops, list(range(len(ops)))))
    alone = build(graph, target, limits, dtypes)
    assert sum(map(len, program.queues)) < sum(map(len, alone.queues))
    for past in (32, 1024, 32768):
        step, before = (max(s.end for s in simulate(p, past)) for p in (program, alone))
        assert step <= 1.005 * before


def test_equal_levels_are_dealt_out_alike(rank: Built) -> None:
    """Layer after layer a worker meets the same code."""
    program = rank.program
    kinds = {
        op: tuple(names(program, level))
        for level in side_by_side(program)
        if len(level) > 1
        for op in level
    }
    for queue in program.queues:
        met: dict[tuple[str, ...], set[tuple[str, int, int]]] = defaultdict(set)
        for run in queue:
            if run.op in kinds:
                ((kind,)) = names(program, [run.op])
                met[kinds[run.op]].add((kind, run.lo, run.hi))
        assert all(len(each) == 1 for each in met.values())


def test_workers_are_shared_out_so_that_the_last_ends_soonest() -> None:
    """Against every way to share them out; times are whole so that there is no rounding."""
    random, beside = np.random.default_rng(0), 0
    for _ in range(60):
        workers = int(random.integers(3, 12))
        level = tuple(
            Work(
                int(random.integers(1, 30)),
                tuple((float(random.choice([4, 16])), float(random.choice([1, 2, 5])))
                      for _ in PASTS),
            )
            for _ in range(random.integers(2, 4))
        )  # fmt: skip

        def seconds(counts: tuple[int, ...], level: tuple[Work, ...] = level) -> list[float]:
            ends = [w.seconds(-(-w.tiles // n)) for w, n in zip(level, counts, strict=True)]
            return [max(each) for each in zip(*ends, strict=True)]

        every = itertools.product(range(1, workers + 1), repeat=len(level))
        best = min(max(seconds(counts)) for counts in every if sum(counts) <= workers)
        in_turn = sum(sum(w.seconds(-(-w.tiles // workers))) for w in level)
        counts = shares(level, workers)
        if not counts:
            assert level_seconds(level, workers) == in_turn
            continue
        beside += 1
        assert max(seconds(counts)) == best
        assert level_seconds(level, workers) == sum(seconds(counts)) < in_turn
        assert sum(counts) == workers or counts == tuple(w.tiles for w in level)
    assert 20 < beside < 60


def test_a_level_of_large_ops_is_run_in_turn() -> None:
    """Two products that keep few workers busy for long: a whole number of workers each is less even."""
    large = (Work(90, ((4.0, 10.0),) * len(PASTS)), Work(30, ((4.0, 10.0),) * len(PASTS)))
    assert shares(large, 3) == ()
    assert level_seconds(large, 3) == len(PASTS) * (2 * 4 + 400)


def test_an_op_that_is_idle_at_first_is_weighed_at_its_longest() -> None:
    """What makes queries of an indexer does nothing for short contexts, and most beyond."""
    level = (Work(100, ((9.0, 1.0), (9.0, 1.0))), Work(100, ((1.0, 0.01), (9.0, 3.0))))
    first, second = shares(level, 100)
    assert second > 2 * first
