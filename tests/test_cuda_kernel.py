"""The CUDA kernel against the interpreter, with stops, cancels and faults: by the emulator, in many
thread orders, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulator import SUPPORTED, EmulatedDevice

from tilert.backends import hang
from tilert.backends.cuda import backend as cuda
from tilert.backends.cuda import limits, source
from tilert.backends.cuda.backend import CudaBackend, LaunchError, Memory
from tilert.backends.cuda.runtime import GpuDevice
from tilert.backends.cuda.tables import tables
from tilert.backends.interpreter import Interpreter, allocate_caches
from tilert.compiler import Limits, build
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.machine import Machine
from tilert.ir.program import PAGE, Kind, Program, Scale, Wait
from tilert.models import load_config
from tilert.models.decoder import build as build_graph
from tilert.models.derived import ROPE_TABLE
from tilert.models.rotary import rotary_table
from tilert.ops import Attend, LatentAttention, Linear
from tilert.ops.mla import pack
from tilert.serve import replay

Devices = Callable[..., GpuDevice]  # called with the seed of an order of threads

CONTEXT, PAGES, SEQUENCES = 256, 12, 3
TABLE = [5, 0, 3, 1]  # physical pages of the first sequence
TABLES = [TABLE, [2, 4, 6, 7], [8, 9, 10, 11]]
BASE: dict[str, Any] = {
    "model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "vocab_size": 96,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
# Latent attention with dense layers.
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v3", "head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
INDEX: dict[str, Any] = {
    **LATENT, "model_type": "glm_moe_dsa", "index_n_heads": 16, "index_head_dim": 16, "index_topk": 24,
    "indexer_types": ["full", "shared"],
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
           "norm_topk_prob": True}  # fmt: skip
# name: (changes of the config, type of the weights, workers, changes of the machine)
MODELS: dict[str, tuple[dict[str, Any], DType, int, dict[str, int]]] = {
    "llama": ({}, DType.BF16, 3, {}),
    "llama-untied-head-64": ({"tie_word_embeddings": False, "head_dim": 64}, DType.BF16, 2,
                             {"slot_bytes": 8192}),
    "llama-group-of-3": ({"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 192},
                         DType.BF16, 5, {}),
    "not-for-matrix-units": ({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144,
                              "intermediate_size": 48}, DType.BF16, 5, {}),
    "llama-head-128": ({"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
                       DType.BF16, 9, {"slot_bytes": 16384}),
    "llama-f16": ({}, DType.F16, 2, {}),
    "llama-f32": ({}, DType.F32, 2, {}),
    "odd-rows-f16": ({"intermediate_size": 341, "vocab_size": 101}, DType.F16, 4, {}),
    "rows-beyond-a-slot": ({"hidden_size": 520, "intermediate_size": 1032}, DType.F32, 3,
                           {"slot_bytes": 2048}),
    "one-slot-in-flight": ({"intermediate_size": 512}, DType.BF16, 2, {"slots": 2, "window": 1}),
    # Rows that 4 and 8 warps share, and a ring that holds more than a step.
    "wide-rows": ({"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1},
                  DType.BF16, 3, {"slot_bytes": 8192}),
    "deep-ring": ({"num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 33}, DType.BF16, 4,
                  {"slots": 24, "window": 8}),
    "fp8-blocks": ({"hidden_size": 64, "intermediate_size": 96}, DType.F8E4M3, 3, {}),
    "fp8-wide-blocks": ({"hidden_size": 512, "intermediate_size": 1088, "num_hidden_layers": 1},
                        DType.F8E4M3, 3, {}),
    "fp8-long-rows": ({"hidden_size": 64, "intermediate_size": 3072, "num_hidden_layers": 1},
                      DType.F8E4M3, 3, {}),
    "fp8-rows": ({"hidden_size": 64, "intermediate_size": 128}, DType.F8E4M3, 3, {}),
    "fp8-parts-of-rows": ({"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1},
                          DType.F8E4M3, 3, {}),
    "fp8-one-scale": ({"hidden_size": 512, "intermediate_size": 96}, DType.F8E4M3, 3, {}),
    "qwen2": ({"model_type": "qwen2", "head_dim": None, "hidden_size": 64}, DType.BF16, 3, {}),
    "qwen3": ({"model_type": "qwen3"}, DType.BF16, 4, {}),
    # As `tilert tune` may choose: units of no power of two, more shares than pages, ops dealt evenly.
    "units-of-6-kb": ({"hidden_size": 1024, "intermediate_size": 1536, "num_hidden_layers": 1},
                      DType.BF16, 3, {"slots": 3, "slot_bytes": 6144}),
    "many-splits": ({"model_type": "mistral", "sliding_window": 40}, DType.BF16, 9, {"splits": 16}),
    "dealt-evenly": ({"intermediate_size": 176}, DType.BF16, 5, {"even": True, "splits": 3}),
    "mistral-window": ({"model_type": "mistral", "sliding_window": 40}, DType.BF16, 3, {}),
    "latent": (LATENT, DType.BF16, 3, {}),
    "latent-deep-ring": ({**LATENT, "q_lora_rank": None, "rope_interleave": False}, DType.BF16, 9,
                         {"slots": 9}),
    "latent-indexed": (INDEX, DType.BF16, 3, {}),
    "latent-indexed-128": ({**INDEX, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 70,
                            "num_hidden_layers": 1, "indexer_types": ["full"]},
                           DType.BF16, 9, {"slots": 9, "slot_bytes": 8704}),
    "latent-512": ({**LATENT, "num_hidden_layers": 1, "num_attention_heads": 32,
                    "num_key_value_heads": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
                   DType.BF16, 5, {"slots": 9, "slot_bytes": 20480, "window": 3}),
    "fp8-latent": ({**LATENT, "hidden_size": 128, "intermediate_size": 192, "q_lora_rank": 64,
                    "kv_lora_rank": 64, "qk_nope_head_dim": 64, "v_head_dim": 64},
                   DType.F8E4M3, 3, {"slots": 8}),
    "fp8-indexed": ({**INDEX, "hidden_size": 128, "intermediate_size": 192, "q_lora_rank": 64,
                     "kv_lora_rank": 64, "qk_nope_head_dim": 64, "v_head_dim": 64},
                    DType.F8E4M3, 3, {"slots": 8}),
    # So many shares that all warps merge them, and heads that are merged in parts.
    "latent-shares": ({**INDEX, "num_hidden_layers": 1, "indexer_types": ["full"], "index_topk": 150,
                       "kv_lora_rank": 128}, DType.BF16, 5, {"splits": 12, "slot_bytes": 8704}),
    # Latents in FP8: of one scale, of which a part is chosen, and of four scales.
    "packed-latent": ({**LATENT, "rope_interleave": False}, DType.BF16, 3, {"packed_latents": True}),
    "packed-indexed": ({**INDEX, "kv_lora_rank": 48}, DType.BF16, 3, {"packed_latents": True}),
    "packed-512": ({**INDEX, "num_hidden_layers": 1, "indexer_types": ["full"], "index_topk": 150,
                    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 64},
                   DType.BF16, 5, {"slots": 9, "slot_bytes": 20480, "packed_latents": True}),
    "qwen3-moe": ({"model_type": "qwen3_moe", **EXPERTS}, DType.BF16, 4, {}),
}  # fmt: skip


def compiled(
    name: str, context: int = CONTEXT, tokens: int = 1
) -> tuple[Program, dict[str, np.ndarray]]:
    """A program for a small machine with rings, and random weights for it."""
    changes, dtype, workers, machine = MODELS[name]
    fields: dict[str, Any] = {"slots": 4, "slot_bytes": 4096, "window": 2, **machine}
    target = Machine("small", workers, read_bandwidth=4e9, worker_bandwidth=2e9, worker_flops=1e9,
                     cache_dtype=DType.BF16, index_dtype=DType.F8E4M3, **fields)  # fmt: skip
    given = {**BASE, "max_position_embeddings": max(1024, context), **changes}
    config = load_config({k: v for k, v in given.items() if v is not None})
    graph = build_graph(config, context)
    rng = np.random.default_rng(7)
    weights: dict[str, np.ndarray] = {}
    scales: dict[str, Scale] = {}
    for weight, value in graph.weights.items():
        if weight == ROPE_TABLE:
            weights[weight] = np.concatenate(rotary_table(config, context), axis=1)
            continue
        assert isinstance(value.rows, int)
        random = rng.standard_normal((value.rows, value.cols))
        scaled = 1 + 0.1 * random if "norm" in weight else random * value.cols**-0.5
        stored = dtype
        if dtype is DType.F8E4M3 and (value.rows == 1 or "embed" in weight):
            stored = DType.BF16
        elif dtype is DType.F8E4M3:
            blocks = {"blocks": (32, 32), "wide-blocks": (32, 64), "latent": (64, 64),
                      "indexed": (64, 64), "rows": (1, value.cols), "parts-of-rows": (1, 64)}  # fmt: skip
            block = blocks.get(name[4:], (value.rows, value.cols))
            scales[weight] = Scale(f"{weight}_scale", block)
            shape = -(-value.rows // block[0]), -(-value.cols // block[1])
            weights[f"{weight}_scale"] = rng.uniform(0.01, 0.03, shape).astype(np.float32)
            scaled = scaled * 50
        weights[weight] = scaled.astype(stored.numpy)
    dtypes = {weight: DType.of(array) for weight, array in weights.items()}
    limits = Limits(tokens, tokens, SEQUENCES, context)
    return build(graph, target, limits, dtypes, scales), weights


def loaded(
    program: Program, weights: dict[str, np.ndarray], device: GpuDevice, pages: int = PAGES
) -> tuple[CudaBackend, Interpreter]:
    """The same program on the emulator and on the interpreter, with the same random past."""
    rng = np.random.default_rng(3)
    interpreter = Interpreter(program, weights, allocate_caches(program, pages))
    homes: dict[str, Memory] = {}
    for b in program.buffers:
        if b.kind is Kind.WEIGHT:
            homes[b.name] = device.allocate(b.bytes)
            homes[b.name].write(np.concatenate([weights[part].ravel() for part in b.parts]))
    # By name: programs of one model may have their ops, and so their caches, in another order.
    for name, shape in sorted(cuda.cache_shapes(program, pages).items()):
        dtype = program.buffers[program.buffer_ids[name]].dtype
        if dtype is DType.U8:  # latents
            op = next(op for op in program.ops if isinstance(op, LatentAttention))
            rows = 0.5 * rng.standard_normal((pages * PAGE, op.lora + op.rope)).astype(np.float32)
            stored = np.stack([pack(row, op.lora) for row in rows]).reshape(shape)
            homes[name] = device.allocate(stored.nbytes)
            homes[name].write(stored)
            interpreter.memory.arrays[program.buffer_ids[name]][:] = stored[:, 0]
            continue
        past = 0.5 * rng.standard_normal(shape)
        past = (np.abs(past) if dtype is DType.F32 else past).astype(dtype.numpy)  # scales
        homes[name] = device.allocate(past.nbytes)
        stored = past
        if dtype is DType.BF16:
            columns = np.broadcast_to(cuda.swizzle(shape[3]), shape)
            stored = np.take_along_axis(past, columns, axis=3)
        homes[name].write(stored)
        cache = interpreter.memory.arrays[program.buffer_ids[name]]
        cache[:] = past.transpose(0, 2, 1, 3).reshape(pages, PAGE, -1)
    addresses = {name: home.address for name, home in homes.items()}
    made = CudaBackend(program, addresses, addresses, device)
    made.__dict__["homes"] = homes
    for each in (made, interpreter):
        each.state["counts"][0] = 1, 1
        each.state["pages"][:, : len(TABLE)] = TABLES
    return made, interpreter


def begin(backend: CudaBackend | Interpreter, token: int, position: int) -> None:
    backend.state["tokens"][0, 0], backend.state["positions"][0, 0] = token, position


def rewrite(backend: CudaBackend) -> None:
    """The device's queues as `backend.runs` has them now."""
    made = tables(backend.program, backend.layout, backend.runs, backend.waits)
    backend.tables["queues"].write(made["queues"])


@pytest.mark.parametrize("position", [0, 62, 200])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_interpreter(name: str, position: int, devices: Devices) -> None:
    """Three tokens from each position, page borders among them; weights of attention are rounded to bf16
    on the device. Queries of latents and inputs of experts are rounded once more on their way, so that
    sums which differ in their last bits differ by a whole bf16 more often."""
    most = 0.02 if any(part in name for part in ("latent", "indexed", "moe")) else 0.01
    device = devices(position)
    made, interpreter = loaded(*compiled(name), device)
    for each in (made, interpreter):
        begin(each, 3, position)
    for _ in range(3):
        (expected,) = interpreter.steps(1)
        (token,) = made.steps(1)
        logits, wanted = made.read("logits")[0], interpreter.read("logits")[0]
        assert np.abs(logits - wanted).max() < most * np.abs(wanted).max()
        assert token[0] == logits.argmax()
        made.state["tokens"][0, 0] = expected[0]


# Steps of several tokens: (tokens of the program, (sequence, position) of each row).
STEPS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "over-a-page-border": (4, [(0, 62), (0, 63), (0, 64), (0, 65)]),
    "from-the-start": (8, [(1, p) for p in range(8)]),
    "at-a-border": (8, [(2, p) for p in range(128, 133)]),
    "a-batch": (8, [(2, 70), (0, 5), (1, 127)]),
    "drafts-in-a-batch": (8, [(1, 63), (1, 64), (1, 65), (0, 200), (2, 0), (2, 1)]),
    "one-of-two": (2, [(0, 130)]),
    # Tokens that attention has in tiles of their own where groups are of 3, beside some of their sequence.
    "beyond-a-block": (8, [*((1, p) for p in range(61, 67)), (0, 200), (2, 0)]),
}
SEVERAL = ("llama", "llama-untied-head-64", "llama-group-of-3", "llama-head-128", "deep-ring",
           "units-of-6-kb", "many-splits", "fp8-wide-blocks", "fp8-rows", "qwen2", "qwen3")  # fmt: skip
# Where tokens have rows, experts or positions of their own.
OF_TOKENS = ("latent", "latent-indexed", "qwen3-moe")
# Each kernel takes longer to compile than to run, so not all models have one for two tokens.
TOGETHER = [
    *product(SEVERAL, list(STEPS)[:5]),
    *product(["llama-group-of-3"], ["beyond-a-block"]),
    *product(OF_TOKENS, ["over-a-page-border", "drafts-in-a-batch"]),
    *product(["llama", "fp8-wide-blocks", "latent-indexed"], ["one-of-two"]),
    *product(["llama-f16", "latent-indexed-128"], ["over-a-page-border"]),
    ("latent-shares", "drafts-in-a-batch"),
    ("packed-512", "drafts-in-a-batch"),
    ("packed-indexed", "over-a-page-border"),
]


def begin_rows(
    backend: CudaBackend | Interpreter, rows: list[tuple[int, int]], tokens: list[int]
) -> None:
    state = backend.state
    state["sequences"][0, : len(rows)], state["positions"][0, : len(rows)] = zip(*rows, strict=True)
    state["tokens"][0, : len(rows)] = tokens
    state["output_rows"][0, : len(rows)] = range(len(rows))
    state["counts"][0] = len(rows), len(rows)


@pytest.mark.parametrize(("name", "step"), TOGETHER)
def test_steps_of_several_tokens(name: str, step: str, devices: Devices) -> None:
    """Logits as the interpreter's; and the same bits as tokens one by one, so that it does not show in
    what a request gets whether its tokens were verified together, or beside others."""
    tokens, rows = STEPS[step]
    ids = [(7 * i + 3) % 30 for i in range(len(rows))]
    device = devices(len(rows))
    together, interpreter = loaded(*compiled(name, tokens=tokens), device)
    for each in (together, interpreter):
        begin_rows(each, rows, ids)
    (expected,), (found,) = interpreter.steps(1), together.steps(1)
    logits, wanted = together.read("logits")[: len(rows)], interpreter.read("logits")[: len(rows)]
    assert np.abs(logits - wanted).max() < 0.02 * np.abs(wanted).max()
    assert found.tolist() == logits.argmax(axis=1).tolist()
    assert len(expected) == len(rows)
    alone, _ = loaded(*compiled(name), device)
    for row, (where, token) in enumerate(zip(rows, ids, strict=True)):
        begin_rows(alone, [where], [token])
        list(alone.steps(1))
        assert alone.read("logits")[0].tobytes() == logits[row].tobytes(), row
    for cache in cuda.cache_shapes(together.program, PAGES):
        homes = together.__dict__["homes"][cache], alone.__dict__["homes"][cache]
        size = homes[0].read(0, PAGES * PAGE, np.uint16).size
        assert (
            homes[0].read(0, size, np.uint16).tobytes()
            == homes[1].read(0, size, np.uint16).tobytes()
        )


@pytest.mark.parametrize(("name", "words"), [("wide-rows", 16), ("fp8-long-rows", 32)])
def test_what_registers_do_not_hold_lies_in_shared_memory(
    name: str, words: int, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with rows of more than 8,192 weights and 8 tokens, but here of less."""
    for module in (limits, source):
        monkeypatch.setattr(module, "HELD_WORDS", words)
    program, _ = compiled(name, tokens=8)
    products = [op for op in program.ops if isinstance(op, Linear)]
    assert max(limits.kept_bytes(program, op, 8) for op in products) > 0
    test_steps_of_several_tokens(name, "a-batch", devices)


@pytest.mark.parametrize("name", ["llama", *OF_TOKENS])
def test_several_sequences_in_one_launch(name: str, devices: Devices) -> None:
    rows, ids, device = [(2, 60), (0, 20), (1, 126)], [4, 9, 2], devices()
    together, _ = loaded(*compiled(name, tokens=4), device)
    begin_rows(together, rows, ids)
    made = np.array(list(together.steps(6)))
    for row, (where, token) in enumerate(zip(rows, ids, strict=True)):
        alone, _ = loaded(*compiled(name), device)
        begin_rows(alone, [where], [token])
        assert [int(t[0]) for t in alone.steps(6)] == made[:, row].tolist()


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "one-slot-in-flight", "deep-ring", "latent-indexed", "packed-512"]
)
def test_any_order_of_threads_gives_the_same_bits(name: str, devices: Devices) -> None:
    program, weights = compiled(name)
    results = []
    for seed in range(4):
        made, _ = loaded(program, weights, devices(seed))
        begin(made, 5, 60)
        tokens = [int(t[0]) for t in made.steps(12)]
        results.append((tokens, made.read("logits").tobytes()))
    assert all(result == results[0] for result in results)


BARRIER = """  sync_consumers();
  if constexpr (kTrace) b.started = timestamp();
"""


@pytest.mark.parametrize("barrier", [True, False])
def test_one_worker_hands_over_by_the_barrier_between_its_runs(
    barrier: bool, kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a step nobody waits where there is one worker. Without the barrier, some order of threads gives
    other logits: with several tokens, some of what products take has no tags."""
    if not SUPPORTED:
        pytest.skip("the emulator needs g++ on x86-64")
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))
    generate = cuda.generate

    def without(*arguments: Any, **options: Any) -> source.Source:
        made = generate(*arguments, **options)
        assert made.headers["program.cuh"].count(BARRIER) == 1
        made.headers["program.cuh"] = made.headers["program.cuh"].replace(BARRIER, "")
        return made

    if not barrier:
        monkeypatch.setattr(cuda, "generate", without)
    changes, dtype, _, machine = MODELS["llama"]
    monkeypatch.setitem(MODELS, "alone", (changes, dtype, 1, machine))
    program, weights = compiled("alone", tokens=2)
    assert all(wait.lag for run in program.queues[0] for wait in run.waits)

    def right(seed: int) -> bool:
        made, interpreter = loaded(program, weights, EmulatedDevice(kernels, seed=seed))
        for each in (made, interpreter):
            begin_rows(each, [(0, 62), (0, 63)], [5, 6])
        interpreter.run(1)
        with suppress(LaunchError):  # where nobody waits, words may never come
            assert len([*made.steps(1)]) == 1
            logits, wanted = made.read("logits"), interpreter.read("logits")
            return bool(np.abs(logits - wanted).max() < 0.01 * np.abs(wanted).max())
        return False

    assert all(right(seed) for seed in range(24)) is barrier


@pytest.mark.parametrize("name", ["llama", "deep-ring", "latent"])
def test_one_launch_equals_many(name: str, devices: Devices) -> None:
    program, weights = compiled(name)
    made, _ = loaded(program, weights, devices())
    begin(made, 5, 0)
    together = [int(t[0]) for t in made.steps(70)]
    made, _ = loaded(program, weights, devices())
    begin(made, 5, 0)
    assert [int(t[0]) for _ in range(70) for t in made.steps(1)] == together


def test_ten_thousand_tokens_in_one_launch(devices: Devices) -> None:
    """No drift: the same tokens as launches of a thousand; the counters and tags wrap many times."""
    device = devices()
    if isinstance(device, EmulatedDevice):
        pytest.skip("takes an emulator too long")
    program, weights = compiled("llama", context=10240)
    found: list[tuple[list[int], bytes]] = []
    for launch in (10_000, 1000):
        made, _ = loaded(program, weights, device, pages=160)
        made.state["pages"][0] = np.random.default_rng(1).permutation(160)
        begin(made, 5, 0)
        tokens = [int(t[0]) for _ in range(10_000 // launch) for t in made.steps(launch)]
        found.append((tokens, made.read("logits").tobytes()))
    assert found[0] == found[1]
    assert len(found[0][0]) == 10_000


def test_of_equal_logits_the_lowest_id_wins(devices: Devices) -> None:
    program, weights = compiled("llama")
    embedding = weights["model.embed_tokens.weight"]
    embedding[48:] = embedding[:48]
    made, _ = loaded(program, weights, devices())
    begin(made, 5, 0)
    tokens = [int(t[0]) for t in made.steps(12)]
    assert max(tokens) < 48
    logits = made.read("logits")[0]
    assert np.array_equal(logits[:48], logits[48:])


def test_a_stop_id_ends_the_launch(devices: Devices) -> None:
    made, _ = loaded(*compiled("llama"), devices())
    begin(made, 5, 0)
    free = [int(t[0]) for t in made.steps(20)]
    stop = free[6]
    made, _ = loaded(*compiled("llama"), devices())
    made.stop_ids = (94, stop)
    begin(made, 5, 0)
    assert [int(t[0]) for t in made.steps(20)] == free[: free.index(stop) + 1]


def test_closing_cancels_within_one_token(devices: Devices) -> None:
    made, _ = loaded(*compiled("llama"), devices())
    begin(made, 5, 0)
    steps = made.steps(2000)
    first = [int(next(steps)[0]) for _ in range(3)]
    steps.close()
    assert np.count_nonzero(made.mailbox[:2000] != cuda.UNSET) < 2000
    begin(made, 5, 0)
    assert [int(t[0]) for t in made.steps(3)] == first  # and the device can be used again


def test_a_trace_has_every_run_in_its_order(devices: Devices) -> None:
    program, weights = compiled("llama")
    made, _ = loaded(program, weights, devices())
    begin(made, 5, 60)
    plain = [int(t[0]) for t in made.steps(5)]
    assert len(made.records()) == 0
    made, _ = loaded(program, weights, devices())
    made.trace(True)
    begin(made, 5, 60)
    assert [int(t[0]) for t in made.steps(5)] == plain
    records = made.records()
    assert len(records) == 5 * sum(map(len, program.queues))
    assert (np.diff(records[:, 3:]) >= 0).all()  # wait, start, end
    for worker, queue in enumerate(program.queues):
        own = records[records[:, 0] == worker]
        assert own[:, 1].tolist() == [*range(len(queue))] * 5
        assert (np.diff(own[:, 3:].ravel()) >= 0).all()  # one run after another
    made.trace(False)
    begin(made, 5, 60)
    assert [int(t[0]) for t in made.steps(5)] == plain
    assert len(made.records()) == 0


def test_a_wait_that_never_holds_names_waiter_and_counter(
    devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))  # for the record of the hang
    program, weights = compiled("llama")
    queues = [list(queue) for queue in program.queues]
    place, run = next((i, r) for i, r in enumerate(queues[1]) if r.waits)
    wait = run.waits[0]
    broken = Wait(wait.counter, wait.threshold + 1, wait.lag)
    queues[1][place] = replace(run, waits=(broken, *run.waits[1:]))
    made, _ = loaded(
        dataclasses.replace(program, queues=tuple(map(tuple, queues))),
        weights,
        devices(),
    )
    begin(made, 5, 0)
    with pytest.raises(
        LaunchError, match=rf"worker 1, run {place} .*counter {wait.counter}: it has"
    ):
        list(made.steps(3))


def test_words_that_never_come_end_the_launch(
    devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that expects the tag of a write that does not happen: an error, and the next launch works."""
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))  # for the record of the hang
    program, weights = compiled("llama")
    made, _ = loaded(program, weights, devices())
    begin(made, 5, 0)
    good = [int(t[0]) for t in made.steps(3)]
    place, run = next(
        (i, r) for i, r in enumerate(program.queues[1]) if isinstance(program.ops[r.op], Linear)
    )
    made.runs[1]["x"][place] ^= 1 << cuda.RANK_SHIFT
    rewrite(made)
    begin(made, 5, 0)
    with pytest.raises(
        LaunchError, match=rf"worker 1, run {place} of step 0 .* words with tag \d+"
    ):
        list(made.steps(3))
    made.runs[1]["x"][place] ^= 1 << cuda.RANK_SHIFT
    rewrite(made)
    begin(made, 5, 0)
    assert [int(t[0]) for t in made.steps(3)] == good
    assert run.signal >= 0


def test_weights_that_never_come_end_the_launch(
    devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is lost (in the emulator alone): an error, and the next launch works."""
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))  # for the record of the hang
    program, weights = compiled("llama")
    device = devices()
    if not isinstance(device, EmulatedDevice):
        pytest.skip("a device loses no copies")
    made, _ = loaded(program, weights, device)
    begin(made, 5, 0)
    good = [int(t[0]) for t in made.steps(3)]
    for lost in (0, 7, 20):
        device.lost_copy = lost
        begin(made, 5, 0)
        with pytest.raises(LaunchError, match=r"\(\w+\) waited in vain for weights or keys"):
            list(made.steps(3))
        device.lost_copy = -1
        begin(made, 5, 0)
        assert [int(t[0]) for t in made.steps(3)] == good
    (record, *_) = (tmp_path / "hang").iterdir()
    told = "\n".join(replay.report(hang.load(record)))
    assert "waits for a unit of weights or of the cache that it had asked for" in told
    assert "fault:  the device's: a copy that never arrived" in told


def test_what_the_kernel_cannot_run_is_refused(devices: Devices) -> None:
    program, _ = compiled("llama")
    device = SimpleNamespace(shared_bytes=9000)
    with pytest.raises(
        UserError, match=r"bytes of shared memory per block, but the device has 9000"
    ):
        CudaBackend(program, {}, {}, device)  # type: ignore[arg-type]
    heads = [replace(o, head_dim=24) if isinstance(o, Attend) else o for o in program.ops]
    with pytest.raises(UserError, match=r"heads of 24 elements, 2 for each kv head; .* up to 32"):
        CudaBackend(replace(program, ops=tuple(heads)), {}, {}, devices())
    with pytest.raises(AssertionError, match="every token has an output"):
        CudaBackend(replace(program, tokens=4), {}, {}, devices())
