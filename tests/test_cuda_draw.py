"""Sampling inside the kernel: the same tokens as the host's sampler for equal logits, by the emulator and
the interpreter, and on a GPU where there is one. The program here has nothing but an embedding whose
rows are the logits, and the choice: token t of one step picks row t for the next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator import SUPPORTED, EmulatedDevice

from tilert import SamplingParams
from tilert.backends.cuda import open_device
from tilert.backends.cuda.backend import CudaBackend
from tilert.backends.cuda.runtime import GpuDevice
from tilert.backends.interpreter import Interpreter
from tilert.compiler import Limits, build
from tilert.engine.sampling import SampledToken, Sampler
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.machine import Machine
from tilert.ir.program import Program
from tilert.ops import draw

Backend = CudaBackend | Interpreter
Bound = Callable[..., Backend]  # called with logits [rows, vocab], and workers and a seed of orders

VOCAB = 997
EOS = (2, 7)
PROMPT = [5, 6, 5, 100]


def compiled(shape: tuple[int, ...], workers: int, logprobs: bool = False) -> Program:
    """Embedding and choice alone."""
    rows, vocab = shape
    graph = Graph("rows")
    graph.embed("logits", graph.weight("rows", rows, vocab))
    machine = Machine("small", workers, slots=4, slot_bytes=4096, window=2, read_bandwidth=4e9,
                      worker_bandwidth=2e9, worker_flops=1e9, cache_dtype=DType.BF16)  # fmt: skip
    return build(graph, machine, Limits(1, 1, 1, 4096, True, logprobs), {"rows": DType.F32})


@pytest.fixture(params=["interpreter", "emulator", "gpu"])
def bound(request: pytest.FixtureRequest, kernels: Path) -> Bound:
    """Makes a back end that samples from given logits."""

    def on(device: GpuDevice, logits: np.ndarray, workers: int, logprobs: bool) -> Backend:
        weights = device.allocate(logits.nbytes)
        weights.write(logits)
        program = compiled(logits.shape, workers, logprobs)
        made = CudaBackend(program, {"rows": weights.address}, {}, device)
        made.__dict__["home"] = weights
        return made

    if request.param == "interpreter":
        return lambda logits, workers=3, seed=0, logprobs=False: Interpreter(
            compiled(logits.shape, workers, logprobs), {"rows": logits}, {}, seed=seed
        )
    if request.param == "emulator":
        if not SUPPORTED:
            pytest.skip("the emulator needs g++ on x86-64")
        return lambda logits, workers=3, seed=0, logprobs=False: on(
            EmulatedDevice(kernels, seed=seed), logits, workers, logprobs
        )
    try:
        gpu = open_device()
    except UserError as error:
        pytest.skip(str(error))
    return lambda logits, workers=3, seed=0, logprobs=False: on(gpu, logits, workers, logprobs)


def rows(count: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng([seed, vocab]).standard_normal((count, vocab))
    return (noise * scale).astype(np.float32)


def sampler(params: dict[str, Any], vocab: int = VOCAB, prompt: Sequence[int] = PROMPT) -> Sampler:
    return Sampler(SamplingParams(max_tokens=None, **params), prompt, vocab, EOS)


def launch(backend: Backend, subject: Sampler, row: int, position: int, steps: int) -> list[int]:
    """Tokens of one launch that begins with the token `row`; the sampler is told of them."""
    return [token.token_id for token in told(backend, subject, row, position, steps)]


def told(
    backend: Backend, subject: Sampler, row: int, position: int, steps: int
) -> list[SampledToken]:
    """Likewise, with log-probabilities where the program has them."""
    state = backend.state
    state["tokens"][0, 0], state["positions"][0, 0] = row, position
    state["counts"][0] = 1, 1
    subject.fill(state, position)
    made: list[tuple[int, np.ndarray | None]] = []
    for ids in backend.steps(steps):
        made.append((int(ids[0]), state["report"][0].copy() if "report" in state else None))
    return [subject.commit(*each) for each in made]


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "hottest": {"temperature": 100.0, "top_p": 0.9},
    "cold": {"temperature": 0.01},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k of most": {"top_k": 990},
    "top_k above the vocabulary": {"top_k": 5000},
    "top_p": {"top_p": 0.8},
    "small top_p": {"top_p": 1e-9},
    "large top_p": {"top_p": 0.9999},
    "min_p": {"min_p": 0.1},
    "min_p of one": {"min_p": 1.0},
    "top_k and top_p": {"temperature": 3.0, "top_k": 300, "top_p": 0.7},
    "all truncations": {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "repetition": {"repetition_penalty": 1.7},
    "reward of repetition": {"repetition_penalty": 0.6},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": -1.5},
    "all penalties": {
        "repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4, "top_k": 20
    },
    "greedy with penalties": {"temperature": 0, "frequency_penalty": 1.1, "top_p": 0.2},
    "bias": {"logit_bias": {11: 8.0, 500: 9.5, 996: 100.0, 3: -100.0}},
    "allowed": {"allowed_token_ids": [2, 9, 44, 996], "top_p": 0.9},
    "all masked but one": {"allowed_token_ids": [515]},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": [9], "logit_bias": {2: 50, 7: 50, 9: 50}},
    "everything": {
        "temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
        "frequency_penalty": 0.2, "presence_penalty": 0.1, "min_tokens": 3, "logit_bias": {4: 3.0},
        "allowed_token_ids": list(range(0, 900, 2)),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_tokens_are_those_of_the_host(name: str, bound: Bound) -> None:
    """Launches of several steps against a sampler that is asked token by token."""
    logits = rows(VOCAB, scale=2.0)
    backend = bound(logits)
    given = FEATURES[name] | {"seed": 12345}
    subject, expected = sampler(given), sampler(given)
    row, position = 4, len(PROMPT)
    while position < 16:
        made = launch(backend, subject, row, position, subject.steady(7))
        for token in made:
            assert token == expected.sample(logits[row]).token_id, f"position {position}"
            row, position = token, position + 1


def random_params(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    def maybe(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    return {
        "temperature": maybe(1e-5, 0.1, 0.7, 1.0, 1.0, 3.0, 100.0),
        "top_k": maybe(0, 0, 1, 3, 40, 300, vocab - 1),
        "top_p": maybe(1e-9, 0.3, 0.9, 0.95, 0.99999999, 1.0, 1.0),
        "min_p": maybe(0.0, 0.0, 0.05, 1.0),
        "frequency_penalty": maybe(0.0, 0.0, -0.3, 1.9),
        "repetition_penalty": maybe(1.0, 1.0, 1.2),
        "seed": int(rng.integers(0, 2**63)),
    }


@pytest.mark.parametrize("vocab", [1, 2, 33, 600, 6011])
def test_any_parameters_give_the_tokens_of_the_host(vocab: int, bound: Bound) -> None:
    """Rows with ties, -inf and large steps among them."""
    rng = np.random.default_rng(vocab)
    logits = rows(12, vocab, 4.0)
    logits[3:6] = np.round(logits[3:6])  # many ties
    logits[6] = 0
    logits[7] *= 40
    logits[8, vocab // 2 + 1 :] = -np.inf
    logits[9] = -(logits[9] ** 2) - 1000
    logits[10] = -0.0
    logits[10, ::2] = 0.0
    logits[11] *= 1e-4
    backend = bound(logits)
    for case in range(60):
        prompt = [int(rng.integers(vocab))]
        params = random_params(rng, vocab)
        subject, expected = sampler(params, vocab, prompt), sampler(params, vocab, prompt)
        row = case % 12
        for position in range(1, 3):
            made = launch(backend, subject, row, position, 1)
            assert made == [expected.sample(logits[row]).token_id], (row, params)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_any_workers_in_any_order_give_the_same_tokens(workers: int, bound: Bound) -> None:
    logits = rows(200, 200)
    for seed in range(3):
        params = {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 3}
        expected = sampler(params, 200)
        made = launch(bound(logits, workers, seed), sampler(params, 200), 1, 4, 6)
        assert made == [expected.sample(logits[row]).token_id for row in [1, *made[:-1]]]


@pytest.mark.parametrize(
    "given",
    [
        {}, {"temperature": 0.5}, {"top_p": 0.6}, {"top_k": 4}, {"min_p": 0.15},
        {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.03},
    ],
)  # fmt: skip
def test_draws_follow_the_distribution(given: dict[str, Any], kernels: Path) -> None:
    """Chi-square of one long launch, whose rows are all the same, against double precision."""
    if not SUPPORTED:
        pytest.skip("the emulator needs g++ on x86-64")
    draws, vocab = 800, 24
    row = rows(1, vocab, 1.2)[0].astype(np.float64)
    weights = np.exp((row - row.max()) / given.get("temperature", 1.0))
    weights[weights < given.get("min_p", 0.0)] = 0
    order = np.argsort(-row, kind="stable")
    if given.get("top_k"):
        weights[order[given["top_k"] :]] = 0
    shares = weights[order].cumsum() / weights.sum()
    if "top_p" in given:
        weights[order[int(shares.searchsorted(given["top_p"])) + 1 :]] = 0
    expected = weights / weights.sum() * draws

    device = EmulatedDevice(kernels)
    table = np.tile(row.astype(np.float32), (vocab, 1))
    home = device.allocate(table.nbytes)
    home.write(table)
    backend = CudaBackend(compiled((vocab, vocab), 2), {"rows": home.address}, {}, device)
    counts = Counter(launch(backend, sampler({**given, "seed": 99}, vocab, [1]), 0, 1, draws))

    assert set(counts) <= set(np.flatnonzero(expected).tolist())
    often = [t for t in range(vocab) if expected[t] >= 5]
    chi_square = sum((counts[t] - expected[t]) ** 2 / expected[t] for t in often)
    freedom = len(often) - 1
    spread = 2 / (9 * freedom)  # Wilson and Hilferty, 3.1 standard deviations
    assert chi_square < freedom * (1 - spread + 3.1 * math.sqrt(spread)) ** 3


def test_a_stop_id_ends_the_launch(bound: Bound) -> None:
    logits = rows(VOCAB)
    backend = bound(logits)
    if not isinstance(backend, CudaBackend):
        pytest.skip("the interpreter knows no stop ids")
    free = launch(backend, sampler({"seed": 1}), 4, 4, 12)
    assert len(set(free)) > 6
    backend.stop_ids = (free[6],)
    again = launch(backend, sampler({"seed": 1}), 4, 4, 12)
    assert again == free[: free.index(free[6]) + 1]


def test_closing_cancels(bound: Bound) -> None:
    backend = bound(rows(VOCAB))
    subject = sampler({"seed": 1})
    first = launch(backend, subject, 4, 4, 3)
    subject = sampler({"seed": 1})
    backend.state["tokens"][0, 0], backend.state["positions"][0, 0] = 4, 4
    subject.fill(backend.state, 4)
    steps: Any = backend.steps(200)
    assert [int(next(steps)[0]) for _ in range(3)] == first
    steps.close()
    assert (
        launch(backend, sampler({"seed": 1}), 4, 4, 3) == first
    )  # and the device can be used again


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_logits_that_are_no_numbers_end_the_launch(value: float, bound: Bound) -> None:
    logits = rows(VOCAB)
    logits[4, 700] = value
    backend = bound(logits)
    given: dict[str, Any] = {"top_k": 5, "top_p": 0.5, "frequency_penalty": 0.5, "seed": 2}
    made = launch(backend, sampler(given), 4, 4, 3)
    assert made[0] == 0
    if isinstance(backend, CudaBackend):
        assert made == [0]
        assert not np.isfinite(backend.read("peaks").max())
    assert len(launch(backend, sampler(given), 5, 4, 3)) == 3


def test_a_mask_of_nothing_ends_the_launch(bound: Bound) -> None:
    backend = bound(rows(VOCAB))
    subject = sampler({"allowed_token_ids": [3], "seed": 1})
    state = backend.state
    state["tokens"][0, 0], state["positions"][0, 0] = 4, 4
    state["counts"][0] = 1, 1
    subject.fill(state, 4)
    state["mask"][:] = 0
    assert [int(ids[0]) for ids in backend.steps(1)] == [0]
    assert backend.read("peaks").max() == -math.inf


def test_tallies_go_on_where_a_launch_was_cut(bound: Bound) -> None:
    """Penalties that forbid a token that was made: no token comes twice, whatever the launches."""
    logits = np.zeros((40, 40), np.float32)
    given: dict[str, Any] = {"presence_penalty": 2.0, "temperature": 0.02, "seed": 4}
    backend = bound(logits)
    together = launch(backend, sampler(given, 40, [1]), 1, 1, 30)
    assert len(set(together)) == 30
    subject, pieces = sampler(given, 40, [1]), list[int]()
    for steps in (1, 11, 2, 16):
        pieces += launch(backend, subject, pieces[-1] if pieces else 1, 1 + len(pieces), steps)
    assert pieces == together


def test_weights_are_exponentials() -> None:
    scores = np.sort(np.random.default_rng(0).uniform(-40, 0, 20_000)).astype(np.float32)
    scores[-1] = 0
    weights = draw.weigh(scores, np.float32(0), 1.0)
    exact = np.exp(scores.astype(np.float64)) * 2.0**40
    assert np.abs(weights - exact).max() < 2.0**40 * 2.0**-23
    assert (np.abs(weights - exact) <= 3e-7 * exact + 1).all()
    assert weights[-1] == 2**40
    nothing = np.full(1, -np.inf, np.float32)
    assert draw.weigh(nothing, np.float32(3), 0.5).tolist() == [0]


def test_shares_are_exact() -> None:
    assert draw.share_bits(1.0) == 0
    assert draw.share_bits(0.5) == 1 << 63
    assert draw.nucleus_weight(3, draw.share_bits(0.5)) == 2
    assert draw.nucleus_weight(4, draw.share_bits(0.5)) == 2
    assert draw.nucleus_weight(2**62, draw.share_bits(1e-30)) == 1
    assert draw.least_weight(1.0) == 2**40
    assert draw.least_weight(0.0) == 0
    assert draw.aim(2**53 - 1, 10) == 9


def test_candidates_beyond_shared_memory_are_read_again(bound: Bound) -> None:
    """A border among thousands of tokens within one bin."""
    logits = rows(2, 6011, 0.01)
    backend = bound(logits, 4)
    for params in ({"top_k": 3000}, {"top_p": 0.5}, {"top_k": 5000, "top_p": 0.7}):
        for seed in range(6):
            given: dict[str, Any] = {**params, "seed": seed}
            made = launch(backend, sampler(given, 6011, [1]), 1, 1, 1)
            assert made == [sampler(given, 6011, [1]).sample(logits[1]).token_id]


def test_bfloat16_logits_have_many_equals(bound: Bound) -> None:
    logits = rows(4, 3000, 0.5).astype(ml_dtypes.bfloat16).astype(np.float32)
    backend = bound(logits, 4)
    for row in range(4):
        for top_k in (2, 17, 500):
            given: dict[str, Any] = {"top_k": top_k, "seed": row, "temperature": 5.0}
            made = launch(backend, sampler(given, 3000, [1]), row, 1, 1)
            assert made == [sampler(given, 3000, [1]).sample(logits[row]).token_id]


TOLD: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "logprobs": 5},
    "the token alone": {"temperature": 1.5, "logprobs": 0},
    "one": {"logprobs": 1, "temperature": 3.0},
    "most": {"logprobs": 20, "temperature": 2.0, "top_p": 0.9},
    "raw logits count": {
        "logprobs": 7, "logit_bias": {11: 8.0, 3: -100.0}, "frequency_penalty": 1.5, "temperature": 1.2,
        "repetition_penalty": 1.3, "allowed_token_ids": [*range(0, 990, 3)], "top_k": 40,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_logprobs_are_those_of_the_host(name: str, bound: Bound) -> None:
    """Ids, ranks and numbers of whole launches, bit for bit: weights are integers on both sides."""
    logits = rows(VOCAB, scale=2.0)
    given = TOLD[name] | {"seed": 5}
    subject, expected = sampler(given), sampler(given)
    row = 4
    for token in told(bound(logits, logprobs=True), subject, row, len(PROMPT), 9):
        assert token == expected.sample(logits[row])
        row = token.token_id


@pytest.mark.parametrize("vocab", [1, 2, 33, 600, 6011])
def test_logprobs_of_any_rows(vocab: int, bound: Bound) -> None:
    """Ties of either sign of zero, -inf, large steps, and vocabularies smaller than what is asked for."""
    logits = rows(8, vocab, 4.0)
    logits[1:3] = np.round(logits[1:3])  # many ties
    logits[3] = 0
    logits[4] *= 40
    logits[5, vocab // 2 + 1 :] = -np.inf
    logits[6] = -0.0
    logits[6, ::2] = 0.0
    logits[7] = np.sort(logits[7])[::-1]  # the best in one chunk
    backend = bound(logits, logprobs=True)
    for row in range(8):
        for count in (0, 1, 2, 20):
            params = {"logprobs": count, "seed": row, "temperature": 5.0}
            subject, expected = (sampler(params, vocab, [0]) for _ in range(2))
            (made,) = told(backend, subject, row, 1, 1)
            assert made == expected.sample(logits[row])
            exact = logits[row].astype(np.float64)
            exact -= exact.max()
            exact -= math.log(np.exp(exact).sum())
            for token, logprob, _ in made.top:
                assert logprob == pytest.approx(exact[token], abs=1e-6)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_logprobs_do_not_depend_on_the_order(workers: int, bound: Bound) -> None:
    logits = rows(200, 200)
    for seed in range(3):
        params = {"logprobs": 6, "seed": 3}
        expected = sampler(params, 200)
        made = told(bound(logits, workers, seed, True), sampler(params, 200), 1, 4, 6)
        fed = [1, *(token.token_id for token in made[:-1])]
        assert made == [expected.sample(logits[row]) for row in fed]


def test_logprobs_come_with_the_token_that_ends_a_launch(bound: Bound) -> None:
    """A stop id, a cancel, and logits that are no numbers, after which there is nothing to tell."""
    logits = rows(VOCAB)
    logits[7, 5] = math.nan
    backend = bound(logits, logprobs=True)
    if not isinstance(backend, CudaBackend):
        pytest.skip("the interpreter knows no stop ids")
    params = {"logprobs": 3, "seed": 1}
    free = told(backend, sampler(params), 4, 4, 12)
    ids = [token.token_id for token in free]
    backend.stop_ids = (ids[6],)
    assert told(backend, sampler(params), 4, 4, 12) == free[: ids.index(ids[6]) + 1]
    backend.stop_ids = ()
    steps: Any = backend.steps(200)
    assert len(next(steps)) == 1
    steps.close()
    assert told(backend, sampler(params), 4, 4, 12) == free
    assert told(backend, sampler(params), 7, 4, 12) == []
    assert not np.isfinite(backend.read("peaks").max())
