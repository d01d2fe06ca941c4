"""Mixtures of experts in the CUDA kernel, against the interpreter: by the emulator, and on a GPU where
there is one. The programs here have layers of experts and nothing else, whose inputs the emulator and the
interpreter round alike; a whole model is in test_cuda_kernel.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator import SUPPORTED, EmulatedDevice

from tilert.backends import hang
from tilert.backends.cuda.backend import CudaBackend, LaunchError
from tilert.backends.cuda.limits import step_rows
from tilert.backends.cuda.runtime import GpuDevice
from tilert.backends.interpreter import Interpreter
from tilert.compiler import Limits, build
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.machine import Machine
from tilert.ir.program import Kind, Program, Scale, Wait
from tilert.models.experts import DEEPSEEK, QWEN2, QWEN3, ExpertsConfig, block
from tilert.ops import ExpertDown, ExpertGate, Route
from tilert.serve import replay

Devices = Callable[..., GpuDevice]  # called with the seed of an order of threads

VOCAB, LAYERS = 48, 2
SMALL = ExpertsConfig(
    rules=QWEN3, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64,
    sparse=(True,) * LAYERS, norm_topk_prob=True,
)  # fmt: skip
GROUPED = replace(SMALL, rules=DEEPSEEK, num_experts=40, num_experts_per_tok=4, n_group=8,
                  topk_group=3, routed_scaling_factor=2.5, shared_intermediate_size=96)  # fmt: skip
# name: (experts, hidden size, type of the weights, block of scales (0: all rows or columns), changes of
# the machine)
CASES: dict[str, tuple[ExpertsConfig, int, DType, tuple[int, int], dict[str, int]]] = {
    "bf16": (SMALL, 64, DType.BF16, (0, 0), {}),
    # Experts that end within a tile; x' on plain arithmetic.
    "odd-f16": (replace(SMALL, moe_intermediate_size=40, num_experts=37, num_experts_per_tok=5), 40,
                DType.F16, (0, 0), {"slot_bytes": 1024}),
    # Rows of an expert that take several units, and of `gate` as well.
    "in-pieces": (replace(SMALL, moe_intermediate_size=288, num_experts_per_tok=2), 256, DType.BF16,
                  (0, 0), {"slot_bytes": 1024}),
    "shared-with-gate": (replace(SMALL, rules=QWEN2, shared_intermediate_size=96), 64, DType.BF16,
                         (0, 0), {"slots": 2, "window": 1}),
    "grouped": (GROUPED, 64, DType.F32, (0, 0), {}),
    "groups-of-32": (replace(GROUPED, num_experts=128, n_group=4), 64, DType.F32, (0, 0), {}),
    # Units of four experts and of the other three; scales that change within a run.
    "fp8": (replace(SMALL, moe_intermediate_size=192, num_experts_per_tok=7), 128, DType.F8E4M3,
            (32, 64), {"slots": 8, "window": 3}),
    # All parts of a row in one unit.
    "fp8-side-by-side": (replace(SMALL, moe_intermediate_size=64, num_experts_per_tok=2), 256,
                         DType.F8E4M3, (32, 64), {"slots": 8, "window": 3, "slot_bytes": 2048}),
    # A scale for each row, or for all.
    "fp8-rows": (replace(SMALL, moe_intermediate_size=192), 128, DType.F8E4M3, (1, 0),
                 {"slots": 8, "window": 3}),
    "fp8-tensor": (replace(SMALL, moe_intermediate_size=192), 128, DType.F8E4M3, (0, 0),
                   {"slots": 8, "window": 3}),
}  # fmt: skip


def small(**changes: int) -> Machine:
    fields: dict[str, Any] = {"slots": 4, "slot_bytes": 4096, "window": 2, **changes}
    return Machine("small", 3, read_bandwidth=4e9, worker_bandwidth=2e9, worker_flops=1e9,
                   cache_dtype=DType.BF16, **fields)  # fmt: skip


def compiled(name: str, tokens: int = 1) -> tuple[Program, dict[str, np.ndarray]]:
    """A program of layers of experts, and random weights for it."""
    config, hidden, dtype, blocks, changes = CASES[name]
    graph = Graph(name)
    x = graph.embed("x", graph.weight("embed", VOCAB, hidden))
    for layer in range(LAYERS):
        weight = graph.vector(f"norm{layer}", hidden)
        x = block(graph, config, layer, x, graph.rms_norm(f"l{layer}.normed", x, weight, 1e-5))
    graph.linear("logits", x, graph.weight("head", VOCAB, hidden))
    rng = np.random.default_rng(11)
    weights: dict[str, np.ndarray] = {}
    scales: dict[str, Scale] = {}
    for weight, value in graph.weights.items():
        assert isinstance(value.rows, int)
        random = rng.standard_normal((value.rows, value.cols))
        values = 1 + 0.1 * random if "norm" in weight else random * value.cols**-0.5
        stored = DType.BF16 if dtype is DType.F8E4M3 else dtype
        if dtype is DType.F8E4M3 and "experts" in weight:
            stored, values = dtype, values * 50
            rows, cols = blocks[0] or value.rows, blocks[1] or value.cols
            scales[weight] = Scale(f"{weight}_scale", (rows, cols))
            shape = -(-value.rows // rows), -(-value.cols // cols)
            weights[f"{weight}_scale"] = rng.uniform(0.01, 0.03, shape).astype(np.float32)
        weights[weight] = values.astype(stored.numpy)
    dtypes = {weight: DType.of(array) for weight, array in weights.items()}
    limits = Limits(tokens, tokens, 1, 256)
    return build(graph, small(**changes), limits, dtypes, scales), weights


def loaded(program: Program, weights: dict[str, np.ndarray], device: GpuDevice) -> CudaBackend:
    homes = {b.name: device.allocate(b.bytes) for b in program.buffers if b.kind is Kind.WEIGHT}
    for name, home in homes.items():
        home.write(np.concatenate([weights[part].ravel() for part in name.split("+")]))
    made = CudaBackend(program, {name: home.address for name, home in homes.items()}, {}, device)
    made.__dict__["homes"] = homes
    made.state["counts"][0] = 1, 1
    return made


def begin(backend: CudaBackend | Interpreter, *tokens: int) -> None:
    count = len(tokens)
    backend.state["counts"][0] = count, count
    backend.state["tokens"][0, :count] = tokens
    backend.state["positions"][0, :count] = backend.state["output_rows"][0, :count] = range(count)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_interpreter(name: str, devices: Devices) -> None:
    program, weights = compiled(name)
    made, interpreter = loaded(program, weights, devices(1)), Interpreter(program, weights, {})
    for token in (3, 40):
        for each in (made, interpreter):
            begin(each, token)
            list(each.steps(1))
        logits, wanted = made.read("logits")[0], interpreter.read("logits")[0]
        assert np.abs(logits - wanted).max() < 5e-3 * np.abs(wanted).max(), token


@pytest.mark.parametrize(
    ("name", "rows"), [("odd-f16", 2), ("grouped", 4), ("groups-of-32", 4), ("fp8", 4)]
)
def test_each_token_has_experts_of_its_own(name: str, rows: int, devices: Devices) -> None:
    """In steps full or not: logits as the interpreter's, and bit for bit those of each token alone."""
    program, weights = compiled(name, tokens=rows)
    device, tokens = devices(2), (3, 40, 17)[: max(2, rows - 1)]
    alone = loaded(*compiled(name), device)
    assert step_rows(alone.program, device.shared_bytes) >= rows
    made, interpreter = loaded(program, weights, device), Interpreter(program, weights, {})
    for each in (made, interpreter):
        begin(each, *tokens)
        list(each.steps(1))
    logits, wanted = (each.read("logits")[: len(tokens)] for each in (made, interpreter))
    assert np.abs(logits - wanted).max() < 5e-3 * np.abs(wanted).max()
    for row, token in enumerate(tokens):
        begin(alone, token)
        list(alone.steps(1))
        assert alone.read("logits")[0].tobytes() == logits[row].tobytes(), row


def test_any_order_of_threads_gives_the_same_bits(devices: Devices) -> None:
    """Each step chooses others; loaders are far ahead of their warps or just behind the choice."""
    program, weights = compiled("bf16")
    results = []
    for seed in range(4):
        made = loaded(program, weights, devices(seed))
        begin(made, 5)
        results.append(([int(t[0]) for t in made.steps(10)], made.read("logits").tobytes()))
    assert all(result == results[0] for result in results)
    made = loaded(program, weights, devices(7))
    begin(made, 5)
    assert [int(t[0]) for _ in range(10) for t in made.steps(1)] == results[0][0]


def test_a_choice_that_never_comes_ends_the_launch(
    devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader waits as long as the warps do, and it is they who say for what."""
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))  # for the record of the hang
    program, weights = compiled("bf16")
    made = loaded(program, weights, devices())
    begin(made, 5)
    good = [int(t[0]) for t in made.steps(3)]
    op = next(i for i, o in enumerate(program.ops) if isinstance(o, Route))
    queues = [list(queue) for queue in program.queues]
    worker, place = next(
        (w, i) for w, queue in enumerate(queues) for i, run in enumerate(queue) if run.op == op
    )
    run = queues[worker][place]
    wait = Wait(run.waits[0].counter, run.waits[0].threshold + 1)
    queues[worker][place] = replace(run, waits=(wait, *run.waits[1:]))
    stuck = loaded(replace(program, queues=tuple(map(tuple, queues))), weights, devices())
    begin(stuck, 5)
    named = rf"worker {worker}, run {place} of step 0 \(route\).*counter {wait.counter}: it has"
    with pytest.raises(LaunchError, match=named):
        list(stuck.steps(3))
    begin(made, 5)
    assert [int(t[0]) for t in made.steps(3)] == good


def test_an_expert_that_never_arrives_ends_the_launch(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever copy is lost, also one that is under way while the loader waits for a choice."""
    if not SUPPORTED:
        pytest.skip("the emulator needs g++ on x86-64")
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))  # for the record of the hang
    device = EmulatedDevice(kernels)
    made = loaded(*compiled("bf16"), device)
    for lost in (2, 9):
        device.lost_copy = lost
        begin(made, 5)
        with pytest.raises(LaunchError, match=r"\(\w+\) waited in vain for weights or keys"):
            list(made.steps(3))
    record = max((tmp_path / "hang").iterdir())
    assert "a copy that never arrived" in "\n".join(replay.report(hang.load(record)))


# Routers: (experts, top_k, n_group, topk_group, sigmoid with a bias, norm_topk_prob)
ROUTERS = {
    "softmax": (37, 5, 1, 1, False, False),
    "renormalised": (128, 8, 1, 1, False, True),
    "sigmoid": (64, 6, 1, 1, True, True),
    "groups": (256, 8, 8, 4, True, True),
    "one": (1, 1, 1, 1, True, False),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_choices_equal_the_definition(name: str, devices: Devices) -> None:
    """Logits of few values, so that many are equal: the same experts, and their weights."""
    experts, top_k, n_group, topk_group, sigmoid, norm = ROUTERS[name]
    graph = Graph(name)
    logits = graph.embed("logits", graph.weight("rows", VOCAB, experts))
    bias = graph.vector("bias", experts) if sigmoid else None
    graph.route("route", logits, bias, top_k=top_k, n_group=n_group, topk_group=topk_group,
                sigmoid=sigmoid, norm_topk_prob=norm, routed_scaling_factor=2.5)  # fmt: skip
    rng = np.random.default_rng(5)
    rows = rng.integers(-20, 20, (VOCAB, experts)) / np.float32(8)
    weights = {"rows": rows.astype(np.float32)}
    if sigmoid:
        weights["bias"] = rng.integers(0, 3, (1, experts)).astype(np.float32)
    dtypes = dict.fromkeys(weights, DType.F32)
    program = build(graph, small(), Limits(1, 1, 1, 256), dtypes)
    made, interpreter = loaded(program, weights, devices()), Interpreter(program, weights, {})
    for token in range(0, VOCAB, 5):
        for each in (made, interpreter):
            begin(each, token)
            list(each.steps(1))
        chosen = made.read("route.chosen").view(np.int32)
        assert chosen.tolist() == interpreter.read("route.chosen").tolist()
        # A word keeps 16 bits beside its tag.
        assert np.allclose(made.read("route"), interpreter.read("route"), rtol=2**-15, atol=0)


def test_what_the_kernel_cannot_run_is_refused(devices: Devices) -> None:
    program, _ = compiled("bf16")

    def refused(changed: Callable[[Any], Any], kind: type, match: str) -> None:
        ops = tuple(changed(o) if isinstance(o, kind) else o for o in program.ops)
        with pytest.raises(UserError, match=match):
            CudaBackend(replace(program, ops=ops), {}, {}, devices())

    refused(lambda o: replace(o, top_k=33), Route, "33 experts for each token; .* 1?.*32")
    refused(lambda o: replace(o, n_group=64), Route, "64 groups of experts")
    refused(lambda o: replace(o, k=20), ExpertGate, "rows of 40 bytes; .* multiples of 16")
    refused(lambda o: replace(o, k=20), ExpertDown, "rows of 40 bytes; .* multiples of 16")
    program, _ = compiled("fp8-rows")
    few = "blocks of 1 rows, and tiles 4 rows; .* columns are multiples of 64"
    refused(lambda o: replace(o, x_type=DType.F32), ExpertDown, few)
