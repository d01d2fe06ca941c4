"""Latent attention and sparse attention: borders of the selection, what is selected, its e4m3 form,
derived weights, programs for rings, and the engine on top, against transformers and plain numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import programs
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import TOLERANCE, own_logits, tokens_for

from tilert import LLM, SamplingParams
from tilert.backends.interpreter import Interpreter
from tilert.engine.runner import Row, Runner
from tilert.errors import UserError
from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.ir.program import PAGE
from tilert.ir.tags import derive
from tilert.models.decoder import build as build_graph
from tilert.models.derived import HeadPart
from tilert.models.load import bind
from tilert.ops import Combine, IndexScore, LatentAttention, Linear
from tilert.ops.index import hadamard, quantised

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "vocab_size": 199}


def opened(folder: Path, backend: Any = "cpu", **options: Any) -> LLM:
    options = {"threads": 2, "max_model_len": 128, **options}
    return LLM(folder, skip_tokenizer_init=True, backend=backend, **options)


def error(own: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of the rows that are known."""
    known = ~np.isnan(own[:, 0])
    assert known.any()
    return float(np.abs(own[known] - expected[: len(own)][known]).max())


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
def test_steps_across_the_border_of_the_selection(backend: str, tmp_path: Path) -> None:
    """Eight positions are selected: below, at and above that, one token and several at a time."""
    model = families.make("deepseek_v32", tmp_path, **SMALL)
    tokens = tokens_for(24)
    expected = families.logits(model, tokens)
    llm = opened(tmp_path, backend)
    for sizes in ([1] * 12, [7, 1, 1, 1, 6, 8], [6, 5, 8, 5], [20, 1, 3]):
        assert error(own_logits(llm, tokens[: sum(sizes)], sizes), expected) < TOLERANCE, sizes


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
@pytest.mark.parametrize("size", [1, 4, 40])
def test_what_is_selected_is_what_transformers_selects(
    size: int, backend: str, tmp_path: Path
) -> None:
    """The sets of the last layer are equal wherever the scores at their border are not."""
    model = families.make("deepseek_v32", tmp_path, **SMALL)
    tokens = tokens_for(40)
    seen: list[torch.Tensor] = []
    indexer = model.model.layers[-1].self_attn.indexer
    indexer.register_forward_hook(lambda module, args, result: seen.append(result))
    families.logits(model, tokens)
    runner = opened(tmp_path, backend).runner
    runner.set_pages(0, [0])
    compared = 0
    for begin in range(0, 40, size):
        rows = [Row(tokens[p], p, 0) for p in range(begin, begin + size)]
        runner.step(rows, [])
        made = runner.backend({1: "decode", 4: "few", 40: "prompt"}[size])
        chosen, scores = made.read("l0.selected"), made.read("l0.index")
        for row, position in enumerate(range(begin, begin + size)):
            if position < 8:
                assert chosen[row, : position + 1].tolist() == list(range(position + 1))
                continue
            assert (np.diff(chosen[row]) > 0).all()
            ranked = np.sort(scores[row, : position + 1])[::-1]  # all in the first page
            if ranked[7] - ranked[8] > 1e-5:
                assert set(chosen[row].tolist()) == set(seen[0][0, position].tolist())
                compared += 1
    assert compared > 28


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
def test_of_equal_scores_the_lower_positions_are_selected(backend: str, tmp_path: Path) -> None:
    families.make("deepseek_v32", tmp_path, **SMALL)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if "weights_proj" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    runner = opened(tmp_path, backend).runner
    runner.set_pages(0, [0])
    runner.step([Row(t, p, 0) for p, t in enumerate(tokens_for(20))], [])
    assert runner.backend("prompt").read("l0.selected")[8:20].tolist() == [list(range(8))] * 12


def test_everything_is_selected_by_a_large_enough_indexer(tmp_path: Path) -> None:
    """Then the result is that of dense attention: of deepseek_v3 with the same weights."""
    model = families.make("deepseek_v32", tmp_path, **SMALL, index_topk=64)
    dense = families.make("deepseek_v3", tmp_path / "dense", **SMALL)
    dense.load_state_dict(model.state_dict(), strict=False)
    tokens = tokens_for(40)
    own = own_logits(opened(tmp_path), tokens, [8] * 5)
    assert error(own, families.logits(dense, tokens)) < TOLERANCE


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_sizes_of_real_models(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, latents and keys as wide as DeepSeek's, over several pages, few and many tokens."""
    monkeypatch.setenv("TILERT_CPU_ISA", isa)
    wide: dict[str, Any] = {
        "q_lora_rank": 96, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "index_head_dim": 128, "index_topk": 96, "num_attention_heads": 3,
        "num_key_value_heads": 3, "num_hidden_layers": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    model = families.make("deepseek_v32", tmp_path, **wide)
    try:
        llm = opened(tmp_path, max_model_len=256)
    except UserError:
        pytest.skip(f"this machine has no {isa}")
    tokens = tokens_for(203)
    own = own_logits(llm, tokens, [70, 90, 1, 8, 32, 1, 1])
    assert error(own, families.logits(model, tokens)) < 2 * TOLERANCE


# --- the e4m3 form of the indexer -------------------------------------------------------------------


def test_the_hadamard_rotation_is_orthogonal_and_in_sylvesters_order() -> None:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < 128:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    np.testing.assert_allclose(hadamard(x), x @ matrix / np.sqrt(128), rtol=0, atol=1e-5)


def torch_quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, scale) by torch: scale = 2^ceil(log2(max(largest, 1e-4) / 448))."""
    given = torch.from_numpy(x)
    largest = given.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(largest.double() / 448))).float()
    values = (given / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values.float().numpy(), scale.numpy()


def test_rows_are_quantised_as_the_reference_code_does() -> None:
    dice = np.random.default_rng(1)
    x = dice.standard_normal((200, 128)) * 2.0 ** dice.integers(-20, 20, (200, 1))
    x[0], x[1], x[2, :] = 0, 448, 0.25  # nothing at all, a scale of one, and equal elements
    values, scale = quantised(x.astype(np.float32))
    expected, scales = torch_quantised(x.astype(np.float32))
    np.testing.assert_array_equal(scale, scales)
    np.testing.assert_array_equal(values.astype(np.float32), expected)
    assert values.dtype == DType.F8E4M3.numpy


@pytest.mark.parametrize("tokens", [1, 2])
def test_e4m3_keys_and_queries_give_the_scores_of_the_reference_code(tokens: int) -> None:
    """What the f32 indexer turns, quantised by torch, scored as DeepSeek's fp8_index does."""

    def run(dtype: DType) -> tuple[Interpreter, dict[str, np.ndarray], Any]:
        draft = programs.latent_draft(replace(machine.cpu(2), index_dtype=dtype), tokens, 2)
        programs.phased(draft)
        program = draft.program()
        caches = Interpreter.allocate_caches(program, 5)
        exact = np.random.default_rng(3).standard_normal(caches["keys"].shape).astype(np.float32)
        if dtype is DType.F32:
            caches["keys"][:] = exact
        else:
            caches["keys"][:], caches["scales"][:] = quantised(exact)
        made = Interpreter(program, WEIGHTS, caches, order="sequential")
        programs.set_state(made.state, program)
        made.run(1)
        return made, caches, program

    draft = programs.latent_draft(machine.cpu(2), tokens, 2)
    programs.phased(draft)
    WEIGHTS = programs.make_weights(draft.program())
    exact, turned, program = run(DType.F32)
    rounded, stored, _ = run(DType.F8E4M3)
    score = next(op for op in program.ops if isinstance(op, IndexScore))
    page = exact.state["pages"][exact.state["sequences"][0, 0], 0]
    keys, scales = torch_quantised(turned["keys"][page, :63])
    np.testing.assert_array_equal(stored["keys"][page, :63].astype(np.float32), keys)
    np.testing.assert_array_equal(stored["scales"][page, :63], scales)
    q = exact.read("q")[0, score.q_col :].reshape(score.heads, score.head_dim)
    values, q_scale = torch_quantised(q)
    weights = exact.read("kv")[0, score.w_col : score.w_col + score.heads]
    logits = np.maximum(values @ keys.T, 0) * (weights[:, None] * q_scale * score.scale)
    expected = logits.sum(0) * scales[:, 0]
    made, order = (rounded.read(name)[0, :63] for name in ("scores", "order"))
    np.testing.assert_allclose(made, expected[order], rtol=1e-5, atol=1e-6)
    assert (np.diff(made) <= 0).all()
    np.testing.assert_array_equal(np.sort(order), np.arange(63))
    np.testing.assert_array_equal(rounded.read("selected")[0], np.sort(order[: score.topk]))


# --- derived weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(128, 128), (96, 64), (1, 512), (3 * 448, 512)])
def test_parts_of_kv_b_are_moved_with_their_scales(block: tuple[int, int]) -> None:
    """GLM's heads have 448 rows: its blocks reach across borders of heads and parts."""
    heads, nope, value, lora = 3, 192, 256, 512
    dice = np.random.default_rng(0)
    stored = dice.standard_normal((heads * (nope + value), lora)).astype(DType.F8E4M3.numpy)
    grid = -(-stored.shape[0] // block[0]), -(-lora // block[1])
    scale = dice.random(grid).astype(np.float32)

    def widened(values: np.ndarray, scales: np.ndarray, cut: tuple[int, int]) -> np.ndarray:
        rows, cols = (np.arange(n) // c for n, c in zip(values.shape, cut, strict=True))
        return values.astype(np.float32) * scales[rows][:, cols]

    exact = widened(stored, scale, block).reshape(heads, nope + value, lora)
    for keys in (True, False):
        part = HeadPart("kv_b", heads, nope, value, lora, keys)
        made = widened(part.rows(stored), part.scales(scale, block), part.block(block))
        wanted = exact[:, :nope].swapaxes(1, 2) if keys else exact[:, nope:]
        np.testing.assert_array_equal(made, wanted.reshape(made.shape))
        assert part.rows(stored).flags.c_contiguous


def test_layers_that_guess_further_tokens_are_accepted_and_left_alone(tmp_path: Path) -> None:
    model = families.make("deepseek_v3", tmp_path, **SMALL)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(48, 96)
    save_file(tensors, file, {"format": "pt"})
    tokens = tokens_for(9)
    own = own_logits(opened(tmp_path), tokens, [9])
    assert error(own, families.logits(model, tokens)) < TOLERANCE
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(48, 96)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"unknown tensor 'model.layers.3.eh_proj.weight'"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: None, r"lacks the tensor 'model.layers.1.self_attn.kv_b_proj.weight'"),
        (
            lambda w: w[:-1].clone(),
            r"kv_b_proj.weight' has shape \[119, 16\].* asks for \[120, 16\]",
        ),
        (lambda w: w.to(torch.float8_e4m3fn), r"kv_b_proj.weight' is FP8, but config.json has no"),
        (lambda w: w.to(torch.int32), r"kv_b_proj.weight' is int32; accepted"),
    ],
)
def test_a_damaged_kv_b_is_named(change: Any, message: str, tmp_path: Path) -> None:
    families.make("deepseek_v3", tmp_path, **SMALL)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    tensors[name] = change(tensors[name])
    if tensors[name] is None:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


# --- machines with rings ----------------------------------------------------------------------------


def ring_runner(folder: Path, target: machine.Machine) -> Runner:
    llm = opened(folder, "interpreter")
    graph = build_graph(llm.config, 128)
    weights = bind(graph, llm.config, 128, llm.checkpoint.tensors)
    return Runner(
        graph, weights, target, context=128, sequences=2, num_pages=4, place=None, scales={}
    )


@pytest.mark.parametrize(
    ("target", "tolerance"),
    [
        (machine.NULL, TOLERANCE),
        (replace(machine.NULL, cache_dtype=DType.BF16, index_dtype=DType.F8E4M3), 0.1),
    ],
)
def test_programs_for_rings_compute_the_same(
    target: machine.Machine, tolerance: float, tmp_path: Path
) -> None:
    """Products side by side, shares of attention; with rounded caches all positions are selected, so that
    rounding decides nothing."""
    topk = 8 if target is machine.NULL else 64
    model = families.make("deepseek_v32", tmp_path, **SMALL, index_topk=topk)
    runner, tokens = ring_runner(tmp_path, target), tokens_for(14)
    sizes = [1, 1, 1, 8, 1, 1, 1]
    own = own_logits(SimpleNamespace(runner=runner), tokens, sizes)  # type: ignore[arg-type]
    assert error(own, families.logits(model, tokens)) < tolerance
    ops = runner.program("decode").ops
    names = {runner.program("decode").buffers[op.w].name for op in ops if isinstance(op, Linear)}
    prefix = "model.layers.0.self_attn"
    tensors = ("q_a_proj", "kv_a_proj_with_mqa", "indexer.wk", "indexer.weights_proj")
    assert "+".join(f"{prefix}.{name}.weight" for name in tensors) in names
    assert {f"{prefix}.q_b_proj.weight", f"{prefix}.indexer.wq_b.weight"} <= names
    spared = [op for op in ops if isinstance(op, Linear) and op.beyond]
    assert [op.beyond for op in spared] == [topk] * 2
    for program in (runner.program("decode"), runner.program("few")):
        attention = next(op for op in program.ops if isinstance(op, LatentAttention))
        merging = [op for op in program.ops if isinstance(op, Combine)]
        assert [op.splits for op in merging] == [attention.splits] * 2
        tagged = derive(program).writers
        assert {attention.y, *(op.y for op in merging)} <= tagged.keys()


# --- the engine on top ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "glm_moe_dsa"])
def test_prefixes_are_used_again_and_requests_share_steps(name: str, tmp_path: Path) -> None:
    """Three prompts with one beginning of more than a page, one after another and together."""
    model = families.make(name, tmp_path)
    llm = opened(tmp_path, max_model_len=192, max_num_seqs=3)
    start = tokens_for(PAGE + 9)
    prompts = [start + tokens_for(n) for n in (5, 11, 1)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    sizes: list[int] = []
    step = llm.runner.step
    llm.runner.step = lambda rows, outputs: (sizes.append(len(rows)), step(rows, outputs))[1]  # type: ignore
    first = [llm.generate(prompt, params)[0] for prompt in given]
    assert sizes[:1] == [PAGE + 14]
    assert PAGE + 20 not in sizes  # the second prompt began with a page that was there
    together = llm.generate(given, params)
    made = [out.outputs[0].token_ids for out in first]
    assert [out.outputs[0].token_ids for out in together] == made
    with torch.no_grad():
        ids = torch.tensor([prompts[1]])
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert made[1] == expected[0, len(prompts[1]) :].tolist()
