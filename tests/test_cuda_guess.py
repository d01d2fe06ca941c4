"""Steps that verify guesses and make new ones, in the CUDA kernel: against the interpreter, against plain
decoding, and in launches of several steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_cuda_kernel import (
    BASE,
    INDEX,
    LATENT,
    SEQUENCES,
    Devices,
    begin_rows,
    loaded,
)

from tilert.backends.cuda.backend import CudaBackend
from tilert.compiler import Limits, build
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Speculation
from tilert.ir.machine import Machine
from tilert.ir.program import Program
from tilert.models import load_config, mtp
from tilert.models.decoder import build as build_graph
from tilert.models.derived import ROPE_TABLE, embedding_part, hidden_part
from tilert.models.rotary import rotary_table

CONTEXT = 256
EXPERTS = {"first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3,
           "moe_intermediate_size": 64, "n_group": 4, "topk_group": 2}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "latent": {**LATENT, "num_hidden_layers": 1, "tie_word_embeddings": False},
    "indexed-experts": {**INDEX, **EXPERTS},
}
MACHINE = Machine("small", 3, slots=4, slot_bytes=4096, window=2, read_bandwidth=4e9,
                  worker_bandwidth=2e9, worker_flops=1e9, cache_dtype=DType.BF16,
                  index_dtype=DType.F8E4M3)  # fmt: skip


def compiled(
    name: str, drafts: int, adds: float = 1
) -> tuple[Program, Program, dict[str, np.ndarray]]:
    """Plain decoding, and a program of so many guesses, of a model with random weights.

    adds: a factor on what all blocks add, as in guessing.make. At 0 every guess is right.
    """
    given = {**BASE, **MODELS[name], "num_nextn_predict_layers": 1}
    config = load_config({k: v for k, v in given.items() if v is not None})
    graph = build_graph(config, CONTEXT, hidden=True)
    layer = mtp.build(config, CONTEXT, ())
    rng, weights = np.random.default_rng(7), dict[str, np.ndarray]()
    for weight, value in (graph.weights | layer.weights).items():
        if weight == ROPE_TABLE:
            weights[weight] = np.concatenate(rotary_table(config, CONTEXT), axis=1)
            continue
        assert isinstance(value.rows, int)
        random = rng.standard_normal((value.rows, value.cols))
        scaled = 1 + 0.1 * random if "norm" in weight else random * value.cols**-0.5
        stored = DType.F32 if "correction" in weight else DType.BF16
        weights[weight] = scaled.astype(stored.numpy)
    if adds != 1:
        _agree(weights, config.num_hidden_layers, adds)
    dtypes = {weight: DType.of(array) for weight, array in weights.items()}

    def program(graph: Graph | Speculation, rows: int) -> Program:
        return build(graph, MACHINE, Limits(rows, rows, SEQUENCES, CONTEXT), dtypes)

    rows = {1: 2, 2: 4, 3: 4}[drafts]
    plain = build_graph(config, CONTEXT)
    return program(plain, 1), program(Speculation(graph, layer, drafts), rows), weights


def _agree(weights: dict[str, np.ndarray], layer: int, adds: float) -> None:
    """The layer takes the token, as the model does."""
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = (weights[name].astype(np.float32) * adds).astype(weights[name].dtype)
    prefix, of_token = f"model.layers.{layer}", weights[embedding_part(layer)]
    of_token[:] = np.eye(len(of_token))
    weights[hidden_part(layer)][:] = 0
    weights[f"{prefix}.enorm.weight"][:] = 1
    weights[f"{prefix}.shared_head.norm.weight"][:] = weights["model.norm.weight"]


def _longest(weights: dict[str, np.ndarray]) -> list[int]:
    """The tokens that follow one another, from a token that it takes long to come back to."""
    table, norm, head = (
        weights[f"{name}.weight"].astype(np.float32)
        for name in ("model.embed_tokens", "model.norm", "lm_head")
    )
    x = table / np.sqrt(np.mean(table * table, axis=1, keepdims=True) + 1e-5) * norm
    follows = (x @ head.T).argmax(axis=1)
    ways = [[token] for token in range(len(table))]
    for way in ways:
        while len(way) < 40:
            way.append(int(follows[way[-1]]))
    return max(ways, key=lambda way: len(set(way)))


def launched(made: CudaBackend, fed: list[int], start: int, steps: int) -> list[list[int]]:
    begin_rows(made, [(0, start + i) for i in range(len(fed))], fed)
    return [[int(t) for t in tokens if t >= 0] for tokens in made.steps(steps)]


def test_launches_of_many_steps_give_the_tokens_of_plain_decoding(devices: Devices) -> None:
    """In several orders of threads, and the same bits as steps one by one; some guesses are right."""
    plain, program, weights = compiled("latent", 3, 0.1)
    start, steps = 58, 6
    decoder, _ = loaded(plain, weights, devices())
    begin_rows(decoder, [(0, start)], [3])
    tokens = [int(t[0]) for t in decoder.steps(4 * steps)]
    fed, results = [3, tokens[0], tokens[1], 95], list[bytes]()
    for seed in range(3):
        made, _ = loaded(program, weights, devices(seed))
        found = launched(made, fed, start, steps)
        assert len(found[0]) == 3
        together = [token for step in found for token in step]
        assert together == tokens[: len(together)]
        assert made.state["positions"][0].tolist() == [start + len(together) + i for i in range(4)]
        assert len({len(step) for step in found}) > 1
        results.append(made.read("guess3.logits").tobytes() + made.state["tokens"].tobytes())
    made, _ = loaded(program, weights, devices())
    place, given = start, fed
    for step in found:
        assert launched(made, given, place, 1) == [step]
        place, given = place + len(step), made.state["tokens"][0].tolist()
    results.append(made.read("guess3.logits").tobytes() + made.state["tokens"].tobytes())
    assert all(result == results[0] for result in results)


def test_stops_and_cancels_end_a_launch(devices: Devices) -> None:
    _, program, weights = compiled("latent", 3, 0)
    tokens = _longest(weights)  # a token hangs on the one before it alone
    assert len(set(tokens[:9])) == 9
    made, _ = loaded(program, weights, devices())
    first, *tokens = tokens
    fed = [first, *tokens[:3]]
    for place in range(4, 8):  # each row of the second step
        made.stop_ids = (95, tokens[place])
        assert launched(made, fed, 10, 9) == [tokens[:4], tokens[4:8]]
    made.stop_ids = ()
    begin_rows(made, [(0, 10 + i) for i in range(4)], fed)
    for step in made.steps(500):
        assert step.tolist() == tokens[:4]
        break
    assert launched(made, fed, 10, 9) == [tokens[4 * i : 4 * i + 4] for i in range(9)]


@pytest.mark.parametrize(("name", "drafts"), [("latent", 3), ("indexed-experts", 2)])
def test_guesses_are_verified_and_made(name: str, drafts: int, devices: Devices) -> None:
    plain, program, weights = compiled(name, drafts)
    device = devices(drafts)
    decoder, _ = loaded(plain, weights, device)
    made, interpreter = loaded(program, weights, device)
    start, count = 61 if name == "latent" else 20, 14  # over a page's border; over what is selected
    begin_rows(decoder, [(0, start)], [3])
    tokens = [3, *(int(t[0]) for t in decoder.steps(count))]
    interpreter.state["one"][:] = 1
    at = 0
    for right in (0, drafts, 1, 0):
        fed = tokens[at : at + 1 + right]
        fed += [(tokens[at + right + 1] + 1) % 90] * (drafts + 1 - len(fed))
        rows = [(0, start + at + i) for i in range(drafts + 1)]
        for each in (made, interpreter):
            begin_rows(each, rows, fed)
        (found,), (expected,) = made.steps(1), interpreter.steps(1)
        at += right + 1
        assert found.tolist() == [*tokens[at - right : at + 1], *[-1] * (drafts - right)]
        assert expected.tolist() == found.tolist()
        # One of 24 positions that is chosen otherwise, for keys are in e4m3, moves logits by a twentieth.
        most = 0.1 if name == "indexed-experts" else 0.02
        for number in range(1, drafts + 1):
            logits = made.read(f"guess{number}.logits")[0]
            wanted = interpreter.read(f"guess{number}.logits")[0]
            assert np.abs(logits - wanted).max() < most * np.abs(wanted).max(), number
            assert made.state["tokens"][0, number] == logits.argmax()
        assert made.state["tokens"][0, 0] == tokens[at]
    made, _ = loaded(program, weights, device)
    found = [token for step in launched(made, tokens[: drafts + 1], start, 6) for token in step]
    assert found == tokens[1 : len(found) + 1]
