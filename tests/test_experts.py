"""Mixtures of experts: routers and blocks against transformers, bits, settings and damaged checkpoints.

Whole models are compared in test_models.py, FP8 in test_fp8.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import programs
import pytest
import torch
import transformers
from broken import without_wait
from programs import Draft, phased
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tilert import LLM
from tilert.backends.cpu import CpuBackend, make_pool
from tilert.backends.interpreter import ORDERS, Interpreter
from tilert.compiler import Limits, build
from tilert.compiler.simulate import simulate
from tilert.compiler.verify import VerifyError, verify
from tilert.errors import UserError
from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.machine import Machine, cpu
from tilert.ir.program import NONE, Buf, Kind, Program
from tilert.ir.tags import derive
from tilert.models import experts, load_config
from tilert.models.decoder import build as build_graph
from tilert.models.experts import DEEPSEEK
from tilert.models.section import Section
from tilert.ops import Argmax, Embed, ExpertDown, ExpertGate, NextToken, Route
from tilert.serve import report
from tilert.weights import open_checkpoint

Run = Callable[[Program, dict[str, np.ndarray]], Any]


def interpreted(program: Program, weights: dict[str, np.ndarray]) -> Interpreter:
    return Interpreter(program, weights, {}, order="starve", seed=1)


def compiled(program: Program, weights: dict[str, np.ndarray]) -> CpuBackend:
    return CpuBackend(program, weights, {}, make_pool(len(program.queues)))


BACKENDS: list[Run] = [interpreted, compiled]


# --- the router -------------------------------------------------------------------------------------


def routed(
    run: Run, logits: np.ndarray, bias: np.ndarray | None = None, **fields: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(chosen, weights) of rows of logits, which are rows of an embedding here."""
    rows, count = logits.shape
    d = Draft(cpu(2), rows, 1)
    counts, tokens = d.state("counts", 2), d.state("tokens", rows)
    x, weights = d.work("x", rows, count), d.work("weights", rows, fields["top_k"])
    chosen = d.work("chosen", rows, fields["top_k"])
    d.buffers[chosen] = replace(d.buffers[chosen], dtype=DType.I32)
    table = d.weight("table", rows, count)
    given = {"table": logits}
    if bias is not None:
        given["bias"] = bias[None]
    bias_id = NONE if bias is None else d.weight("bias", 1, count)
    d.op(Embed(tokens, table, x, counts, rows, rows, count, 1))
    options = {"n_group": 1, "topk_group": 1, "scoring": 0, "norm_topk_prob": 0,
               "routed_scaling_factor": 1.0, **fields}  # fmt: skip
    d.op(Route(x, bias_id, chosen, weights, counts, rows, count, **options))
    part, sampled = d.work("part", 1, 2), d.state("sampled", 1)
    d.op(Argmax(x, part, counts, 1, count, count))
    d.op(NextToken(part, sampled, tokens, d.state("positions", rows), counts, 1, 1, 0))
    phased(d)
    made = run(d.program(), given)
    made.state["counts"][0] = rows, 1
    made.state["tokens"][0] = range(rows)
    made.run(1)
    return made.read("chosen").copy(), made.read("weights").copy()


def by_expert(chosen: Any, weights: Any, count: int) -> np.ndarray:
    """[rows, count] weight of every expert, zero for those that are not chosen."""
    out = np.zeros((len(chosen), count), np.float32)
    np.put_along_axis(out, np.asarray(chosen), np.asarray(weights, np.float32), axis=1)
    return out


def identity(router: Any, count: int) -> Any:
    """A router whose logits are its input."""
    router.weight.data = torch.eye(count)
    return router


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("count", "top_k"), [(8, 2), (60, 4), (128, 8), (5, 5)])
def test_softmax_routers_equal_transformers(run: Run, norm: bool, count: int, top_k: int) -> None:
    logits = np.random.default_rng(count).standard_normal((40, count), np.float32) * 2
    config = transformers.Qwen3MoeConfig(
        num_experts=count, num_experts_per_tok=top_k, hidden_size=count, norm_topk_prob=norm
    )
    routers = [identity(Qwen3MoeTopKRouter(config), count)]
    if norm:
        mixtral = transformers.MixtralConfig(
            num_local_experts=count, num_experts_per_tok=top_k, hidden_size=count
        )
        routers.append(identity(MixtralTopKRouter(mixtral), count))
    own = by_expert(*routed(run, logits, top_k=top_k, norm_topk_prob=int(norm)), count)
    for router in routers:
        _, weights, chosen = router(torch.from_numpy(logits))
        expected = by_expert(chosen, weights.detach(), count)
        np.testing.assert_allclose(own, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("count", "top_k", "n_group", "topk_group"), [(256, 8, 8, 4), (64, 6, 1, 1), (12, 3, 4, 2)]
)
def test_the_router_of_deepseek_equals_transformers(
    run: Run, norm: bool, count: int, top_k: int, n_group: int, topk_group: int
) -> None:
    random = np.random.default_rng(count)
    logits = random.standard_normal((40, count), np.float32)
    bias = random.standard_normal(count, np.float32) * 0.3
    config = transformers.DeepseekV3Config(
        n_routed_experts=count, num_experts_per_tok=top_k, n_group=n_group, topk_group=topk_group,
        hidden_size=count, norm_topk_prob=norm, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = identity(DeepseekV3TopkRouter(config), count)
    router.e_score_correction_bias.copy_(torch.from_numpy(bias))
    _, weights, chosen = router(torch.from_numpy(logits))
    own = routed(
        run, logits, bias, top_k=top_k, n_group=n_group, topk_group=topk_group, scoring=1,
        norm_topk_prob=int(norm), routed_scaling_factor=2.5,
    )  # fmt: skip
    assert (np.diff(own[0], axis=1) > 0).all()  # each once, in rising order
    np.testing.assert_allclose(
        by_expert(*own, count), by_expert(chosen, weights.detach(), count), rtol=2e-5
    )


@pytest.mark.parametrize("run", BACKENDS)
def test_of_equal_experts_the_lower_number_is_chosen(run: Run) -> None:
    logits = np.zeros((4, 12), np.float32)
    logits[1, [2, 5, 7]] = 1
    logits[2] = np.nan
    logits[3] = -np.inf
    logits[3, 11] = 3
    chosen, _ = routed(run, logits, top_k=4)
    assert chosen[0].tolist() == [0, 1, 2, 3]
    assert chosen[1].tolist() == [0, 2, 5, 7]
    assert chosen[3].tolist() == [0, 1, 2, 11]
    grouped, _ = routed(run, logits[:2], top_k=4, n_group=3, topk_group=2, scoring=1)
    assert grouped[0].tolist() == [0, 1, 2, 3]  # the first two of three equal groups
    assert grouped[1].tolist() == [0, 2, 5, 7]
    for row in (*chosen, *grouped):  # whatever the logits are, these are experts, each once
        assert len({*row.tolist()} & {*range(12)}) == 4


# --- the block --------------------------------------------------------------------------------------

WIDTH, WORDS = 48, 31
SETTINGS = {
    "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 0,
}  # fmt: skip


def block_graph() -> Graph:
    """Embedding, DeepSeek's mixture after a norm, a head: no attention, so tokens are on their own."""
    config = experts.parse(Section("a config", SETTINGS), DEEPSEEK, 1)
    graph = Graph("block")
    x = graph.embed("embed", graph.weight("table", WORDS, WIDTH))
    normed = graph.rms_norm("in", x, graph.vector("norm", WIDTH), 1e-5)
    x = experts.block(graph, config, 0, x, normed)
    last = graph.rms_norm("final", x, graph.vector("last", WIDTH), 1e-5, gather=True)
    graph.linear("logits", last, graph.weight("head", WORDS, WIDTH))
    return graph


def block_weights(graph: Graph, dtype: DType = DType.F32) -> dict[str, np.ndarray]:
    random, made = np.random.default_rng(5), dict[str, np.ndarray]()
    for name, v in graph.weights.items():
        assert isinstance(v.rows, int)
        values = random.standard_normal((v.rows, v.cols)) * (0.3 if v.rows > 1 else 1)
        vector = "norm" in name or "bias" in name
        made[name] = values.astype(np.float32 if vector else dtype.numpy)
    return made


def block_program(
    graph: Graph, weights: dict[str, np.ndarray], tokens: int, on: Machine
) -> Program:
    dtypes = {name: DType.of(array) for name, array in weights.items()}
    return build(graph, on, Limits(tokens, 1 if tokens > 8 else tokens, 1, 64), dtypes)


def residual(made: Any, tokens: list[int]) -> np.ndarray:
    """[tokens, WIDTH] after the block."""
    made.state["counts"][0] = len(tokens), 1
    made.state["tokens"][0, : len(tokens)] = tokens
    made.run(1)
    added = next(op for op in made.program.ops if isinstance(op, ExpertDown))
    return made.read(made.program.buffers[added.y].name)[: len(tokens)].copy()


def expected_residual(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """The same by transformers."""
    config = transformers.DeepseekV3Config(hidden_size=WIDTH, **SETTINGS)
    config._experts_implementation = "eager"
    module = DeepseekV3MoE(config)
    prefix = "model.layers.0.mlp."
    named = {
        n.removeprefix(prefix): torch.from_numpy(w.astype(np.float32))
        for n, w in weights.items() if n.startswith(prefix)
    }  # fmt: skip
    each = [
        {m: named[f"experts.{e}.{m}_proj.weight"] for m in ("gate", "up", "down")}
        for e in range(12)
    ]
    module.gate.weight.data = named["gate.weight"]
    module.gate.e_score_correction_bias.copy_(named["gate.e_score_correction_bias"][0])
    module.experts.gate_up_proj.data = torch.stack([torch.cat([w["gate"], w["up"]]) for w in each])
    module.experts.down_proj.data = torch.stack([w["down"] for w in each])
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        shared = getattr(module.shared_experts, matrix)
        shared.weight.data = named[f"shared_experts.{matrix}.weight"]
    x = torch.from_numpy(weights["table"][tokens].astype(np.float32))
    with torch.no_grad():
        normed = functional.rms_norm(x, (WIDTH,), torch.from_numpy(weights["norm"][0]), 1e-5)
        return (x + module(normed[None])[0]).numpy()


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize(("capacity", "count"), [(1, 1), (4, 3), (8, 8), (33, 33), (40, 9)])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F16])
def test_a_block_equals_transformers(run: Run, capacity: int, count: int, dtype: DType) -> None:
    graph = block_graph()
    weights = block_weights(graph, dtype)
    program = block_program(graph, weights, capacity, cpu(2))
    tokens = np.random.default_rng(count).integers(0, WORDS, count).tolist()
    own = residual(run(program, weights), tokens)
    np.testing.assert_allclose(own, expected_residual(weights, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_a_ring_computes_the_same(tokens: int) -> None:
    """On a machine with rings x is rounded as the matrix units take it, but not for the router."""
    graph = block_graph()
    weights = block_weights(graph, DType.BF16)
    program = block_program(graph, weights, tokens, machine.NULL)
    own = residual(interpreted(program, weights), list(range(tokens)))
    expected = expected_residual(weights, list(range(tokens)))
    np.testing.assert_allclose(own, expected, rtol=0.05, atol=0.05)
    router = next(op for op in program.ops if program.buffers[getattr(op, "y", 0)].cols == 12)
    assert getattr(router, "x_type", None) == DType.F32


@pytest.mark.parametrize(("on", "tokens"), [(cpu(3), 1), (cpu(3), 3), (machine.NULL, 2)])
def test_every_order_gives_the_bits_of_the_op_table(on: Machine, tokens: int) -> None:
    graph = block_graph()
    weights = block_weights(graph, DType.BF16)
    program = block_program(graph, weights, tokens, on)

    def bits(order: str, seed: int) -> bytes:
        made = Interpreter(program, weights, {}, order=order, seed=seed)
        made.state["counts"][0] = tokens, tokens
        made.state["tokens"][0] = range(tokens)
        return b"".join(ids.tobytes() for ids in made.run(3)) + made.read("logits").tobytes()

    expected = bits("sequential", 0)
    assert all(bits(order, seed) == expected for order in ORDERS for seed in range(2))


def test_each_run_that_streams_experts_needs_its_wait_for_the_choice() -> None:
    graph = block_graph()
    program = block_program(graph, block_weights(graph), 2, machine.NULL)
    refused: list[tuple[str, str]] = []
    signals = {r.signal for q in program.queues for r in q if isinstance(program.ops[r.op], Route)}
    for worker, queue in enumerate(program.queues):
        for position, run in enumerate(queue):
            op = program.ops[run.op]
            for which, wait in enumerate(run.waits):
                if wait.counter in signals and op.choice != NONE:
                    with pytest.raises(VerifyError) as caught:
                        verify(without_wait(program, worker, position, which))
                    refused.append((type(op).__name__, caught.value.rule))
    # A worker knows the choice from what it waits for before ExpertDown; its loader does not.
    assert set(refused) == {("ExpertGate", "ordering"), ("ExpertDown", "choice")}
    assert len(refused) == sum(program.ops[r.op].choice != NONE for q in program.queues for r in q)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_all_kernels_agree(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILERT_CPU_ISA", isa)
    try:
        make_pool(1)
    except UserError:
        pytest.skip(f"this machine lacks {isa}")
    test_a_block_equals_transformers(compiled, 33, 20, DType.BF16)


@pytest.mark.parametrize("capacity", [8, 33])
def test_bits_of_a_token_do_not_depend_on_its_neighbours(capacity: int) -> None:
    """Neither on how many chose the same experts, nor on which; in a step of few tokens not on the
    size of the step either."""
    graph = block_graph()
    weights = block_weights(graph, DType.BF16)
    made = compiled(block_program(graph, weights, capacity, cpu(2)), weights)
    random = np.random.default_rng(3)
    alone = {t: residual(made, [t] if capacity == 8 else [t] * capacity)[0] for t in range(6)}
    for _ in range(5):
        tokens = [*range(6), *random.integers(0, WORDS, capacity - 6).tolist()]
        random.shuffle(tokens)
        rows = residual(made, tokens)
        for t, row in zip(tokens, rows, strict=True):
            if t in alone:
                assert row.tobytes() == alone[t].tobytes()


def test_tensors_are_used_where_they_lie() -> None:
    graph = block_graph()
    weights = block_weights(graph)
    made = compiled(block_program(graph, weights, 1, cpu(2)), weights)
    for buffer, parts in zip(made.program.buffers, made._parts, strict=True):
        if buffer.kind is Kind.WEIGHT:
            assert len(parts) == len(buffer.parts) == buffer.bank
            for name, array in zip(buffer.parts, parts, strict=True):
                assert np.shares_memory(array, weights[name])


def test_an_expert_outside_the_bank_ends_the_launch() -> None:
    """What Route can not write, in memory that was tampered with."""
    d = programs.experts_draft(cpu(1))
    route = d.ops.pop(2)
    assert isinstance(route, Route)
    d.op(replace(d.ops[1], y=route.weights, n=2))  # type: ignore[type-var]
    for i, b in enumerate(d.buffers):
        if b.kind is Kind.WEIGHT:
            d.buffers[i] = replace(b, dtype=DType.F32, scale=NONE, block=(0, 0))
        if b.name == "chosen":
            d.buffers[i] = replace(b, kind=Kind.STATE, offset=-1)
    phased(d)
    program = d.program()
    made = compiled(program, programs.make_weights(program))
    programs.set_state(made.state, program)
    made.state["chosen"][0] = 1, 4
    with pytest.raises(RuntimeError, match=r"expert gate\): expert 4 is outside \[0, 4\)"):
        made.run(1)


# --- what a step costs ------------------------------------------------------------------------------

BIG = {
    "model_type": "qwen3_moe", "vocab_size": 4096, "hidden_size": 2048, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip


def big(tokens: int) -> Program:
    """Two layers in the shape of Qwen3-30B-A3B for one H100."""
    graph = build_graph(load_config(BIG), 256)
    return build(
        graph,
        machine.H100,
        Limits(tokens, tokens, 1, 256),
        dict.fromkeys(graph.weights, DType.BF16),
    )


@pytest.mark.parametrize(("tokens", "read"), [(1, 8), (2, 16), (8, 64)])
def test_a_step_reads_what_its_tokens_choose(tokens: int, read: int) -> None:
    program = big(tokens)
    for op in program.ops:
        if not isinstance(op, ExpertGate | ExpertDown):
            continue
        matrix = 2048 * 768 * 2 * (2 if isinstance(op, ExpertGate) else 1)
        whole = op.cost(0, op.tiles, 2, 0).bytes
        assert whole == read * matrix
        assert abs(sum(op.cost(t, t + 1, 2, 0).bytes for t in range(op.tiles)) - whole) <= op.tiles
        # Slots of the ring hold every choice of every token, whoever else made it.
        slots = program.ring_units(op, 0, op.tiles)
        assert slots * program.machine.slot_bytes >= tokens * 8 * matrix
        assert slots == op.tiles * program.ring_units(op, 0, 1)
    held = {b.name: b for b in program.buffers if b.bank > 1}
    assert len(held) == 6
    assert all(b.bank == len(b.parts) == 128 for b in held.values())


@pytest.mark.parametrize("tokens", [1, 4])
def test_on_a_gpu_a_choice_says_itself_that_it_is_there(tokens: int) -> None:
    """For one token; the rows of tokens that a step of several has not are not written."""
    program = big(tokens)
    tags = derive(program)
    for index, op in enumerate(program.ops):
        if isinstance(op, Route):
            assert op.logits in tags.writers
            assert tags.silent(index) == (tokens == 1)
            assert ({op.chosen, op.weights} <= tags.writers.keys()) == (tokens == 1)
        elif isinstance(op, ExpertGate | ExpertDown):
            assert {op.x, op.y} <= tags.writers.keys()
            assert tags.silent(index)


def test_no_more_experts_are_read_than_there_are() -> None:
    x, w, w_up, norm, chosen, y, counts = (Buf(i) for i in range(7))
    op = ExpertGate(x, w, w_up, norm, chosen, y, counts, 64, 32, 16, 8, 4, 4, 0, 1e-5)
    assert op.cost(0, op.tiles, 2, 0).bytes == 8 * 2 * 16 * 32 * 2


def test_a_simulated_step_waits_for_the_choice() -> None:
    program = big(1)
    spans = simulate(program, 128)
    routed: dict[int, float] = {}
    for span in spans:
        op = program.ops[program.queues[span.worker][span.index].op]
        if isinstance(op, Route):
            routed[op.chosen] = span.end
        elif isinstance(op, ExpertGate):
            assert span.start >= routed[op.chosen]
    assert len(routed) == 1  # the layers share the memory


# --- settings and checkpoints -----------------------------------------------------------------------

QWEN3 = {**BIG, "num_experts": 8, "num_experts_per_tok": 2}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "hidden_size": 64, "num_attention_heads": 4,
           "num_key_value_heads": 4, "num_hidden_layers": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (QWEN3, {"num_experts": None}, "lacks num_experts, the number of experts"),
        (QWEN3, {"num_experts": 0}, "num_experts 0; accepted are whole numbers from 1 to 4096"),
        (QWEN3, {"num_local_experts": 4}, "num_experts 8 and num_local_experts 4"),
        (QWEN3, {"num_experts_per_tok": 9}, "num_experts_per_tok 9; accepted are .* 1 to 8"),
        (QWEN3, {"moe_intermediate_size": "x"}, "moe_intermediate_size 'x'; accepted are whole"),
        (QWEN3, {"norm_topk_prob": 1}, "norm_topk_prob 1; accepted are true and false"),
        (QWEN3, {"decoder_sparse_step": 0}, "decoder_sparse_step 0; accepted are whole numbers"),
        (QWEN3, {"mlp_only_layers": [-1]}, r"mlp_only_layers \[-1\]; accepted are lists"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window true; accepted is false"),
        (QWEN3, {"n_group": 2}, "has the key 'n_group' that tilert does not know"),
        (MIXTRAL, {"num_local_experts": 1}, "num_experts_per_tok 2; accepted are .* 1 to 1"),
        (MIXTRAL, {"router_bias": True}, "has the key 'router_bias'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    load_config(config)
    with pytest.raises(UserError, match=message) as caught:
        load_config({**config, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 5}, "n_group 5; accepted are divisors of the 12 experts"),
        ({"n_group": 12, "topk_group": 12}, "n_group 12; accepted are .* groups of two or more"),
        ({"topk_group": 5}, "topk_group 5; accepted are whole numbers from 1 to 4"),
        (
            {"num_experts_per_tok": 7},
            "num_experts_per_tok 7; accepted are whole numbers from 1 to 6",
        ),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor 0; accepted are numbers"),
        ({"n_shared_experts": -1}, "n_shared_experts -1"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace -1"),
    ],
)
def test_settings_of_deepseek_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        experts.parse(Section("a config", {**SETTINGS, **changes}), DEEPSEEK, 3)


def test_layers_with_experts_are_those_that_transformers_gives_them() -> None:
    changes = {"num_hidden_layers": 9, "decoder_sparse_step": 3, "mlp_only_layers": [5]}
    found = load_config({**QWEN3, **changes}).experts
    assert found is not None
    assert [layer for layer, sparse in enumerate(found.sparse) if sparse] == [2, 8]
    dense = experts.parse(
        Section("a config", {**SETTINGS, "first_k_dense_replace": 2}), DEEPSEEK, 3
    )
    assert dense.sparse == (False, False, True)
    assert dense.shared_intermediate_size == 40


def test_the_default_of_rope_theta_is_the_family_s() -> None:
    assert load_config(MIXTRAL).rope_theta == 1e6
    stated = {**MIXTRAL, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert load_config(stated).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"lacks the tensor 'model.layers.1.mlp.experts.7.up_proj.weight' for"),
        (
            "one less",
            r"lacks the tensor 'model.layers.0.mlp.experts.7.down_proj.weight' and 8 more",
        ),
        (
            "one more",
            r"unknown tensor 'model.layers.2.mlp.experts.8.up_proj.weight' for model_type",
        ),
        ("together", r"unknown tensor 'model.layers.0.mlp.experts.gate_up_proj' for model_type"),
        ("shape", r"experts.7.up_proj.weight' has shape \[20, 47\], but .* \[20, 48\]"),
        ("type", r"experts.7.up_proj.weight' is bfloat16 and '.*experts.0.up_proj.weight' float32"),
    ],
)
def test_damaged_checkpoints_are_refused(change: str, message: str, tmp_path: Path) -> None:
    families.make("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "one less":
        tensors = {n: t for n, t in tensors.items() if ".experts.7." not in n}
    elif change == "one more":
        other = "model.layers.2.mlp.experts.8.up_proj.weight"
        tensors[other] = tensors[name].clone()
    elif change == "together":
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(8, 40, 48)
    elif change == "shape":
        tensors[name] = tensors[name][:, :-1].clone()
    else:
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        LLM(tmp_path, skip_tokenizer_init=True)


def test_inspect_counts_the_experts_that_a_token_takes(tmp_path: Path) -> None:
    families.make("qwen3_moe", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    text = report.inspect(tmp_path, load_config(checkpoint.config), checkpoint)
    assert "experts 8, 3 per token, moe_intermediate_size 20, in 3 layers, " in text
    stored = {name: array.nbytes for name, array in checkpoint.tensors.items()}
    each = sum(n for name, n in stored.items() if ".experts." in name)
    read = sum(stored.values()) - stored["model.embed_tokens.weight"] - each * 5 // 8
    assert f"a token reads {read / 1e6:.1f} MB of weights" in text
