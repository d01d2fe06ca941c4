"""Prompts through PyTorch, on the CPU: against transformers, in pieces, with pages in any order."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import families
import guessing
import numpy as np
import pytest
import torch
from test_cuda_experts import ROUTERS
from test_models import tokens_for
from torch.nn import functional

from tilert.backends.cuda import prompt
from tilert.backends.cuda import prompt_experts as experts
from tilert.backends.cuda.backend import swizzle
from tilert.backends.cuda.paged import StepCaches
from tilert.backends.cuda.prompt import PromptRunner
from tilert.ir.graph import Graph
from tilert.ir.program import NONE, Buf
from tilert.models import load_config, mtp
from tilert.models.decoder import build
from tilert.models.load import bind
from tilert.ops import Route
from tilert.weights import open_checkpoint

PAGES = [5, 2, 7, 0]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def loaded(
    folder: Path, dtype: torch.dtype = torch.float32, *, guesses: bool | None = None
) -> PromptRunner:
    """guesses: of a model whose hidden states are an output, or of the layer that guesses from them."""
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint.config, checkpoint.generation_config)
    tensors = mtp.layer_tensors(config, checkpoint.tensors) if guesses else checkpoint.tensors
    graph = build(config, 256, hidden=guesses is False)
    if guesses:
        graph = mtp.build(config, 256, tensors.keys())
    arrays = bind(graph, config, 256, tensors)
    weights = {name: torch.tensor(array.astype(np.float32)) for name, array in arrays.items()}
    weights = {n: w if n == "tilert.rope_table" else w.to(dtype) for n, w in weights.items()}
    heads, widths = config.num_key_value_heads, dict.fromkeys("kv", config.head_dim)
    if config.latent:
        index = config.latent.index
        heads, widths = 1, {"latent": config.latent.cache_width}
        widths |= {"index": index.index_head_dim} if index else {}
    caches = {
        f"layers.{i}.{kind}_cache": torch.full((8, heads, 64, width), 9.0, dtype=dtype)
        for i in range(config.num_hidden_layers + 1) for kind, width in widths.items()
    }  # fmt: skip
    weights, _ = families.stacked(graph, weights, {})
    return PromptRunner(graph, weights, caches, {})


# Heads of 6 elements and latents of 20 have no whole pieces; the kernel refuses such as well.
WHOLE: dict[str, Any] = {"qk_rope_head_dim": 8}


def made(name: str, folder: Path) -> Any:
    """See families.make."""
    latent = "kv_lora_rank" in families.FAMILIES[name][1]
    return families.make(name, folder, torch.float32, **(WHOLE if latent else {}))


def test_hidden_states_and_guesses_are_those_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two runs of several pieces."""
    reference = guessing.make("deepseek_v32", tmp_path, **WHOLE)
    tokens = tokens_for(71)
    model, layer = (loaded(tmp_path, guesses=guesses) for guesses in (False, True))
    monkeypatch.setattr(prompt, "CHUNK", 16)
    rows, hidden, expected = [3, 39], reference.hidden(tokens), reference.logits(tokens)
    for begin, end in ((0, 30), (30, 70)):
        ids = tokens[begin:end]
        model.run(ids, begin, PAGES, [])
        assert (model.hidden - hidden[begin:end]).abs().max() < 1e-3
        outputs = [row for row in rows if row < len(ids)]
        given = model.hidden.numpy()
        logits = layer.run(tokens[begin + 1 : end + 1], begin, PAGES, outputs, given)
        assert np.abs(logits.numpy() - expected[begin:end][outputs]).max() < 1e-3
        assert layer.hidden.shape == (len(outputs), hidden.shape[1])


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "llama-odd"])
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = made(name, tmp_path)
    limit = model.config.max_position_embeddings
    tokens = tokens_for(min(150, limit if "dynamic" in name else 60 if "longrope" in name else 150))
    expected = families.logits(model, tokens)
    rows = [0, 3, len(tokens) - 1]
    got = loaded(tmp_path).run(tokens, 0, PAGES, rows)
    assert np.abs(got.numpy() - expected[rows]).max() < 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "deepseek_v3", "glm_moe_dsa"])
def test_pieces_give_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(name, tmp_path)
    tokens = tokens_for(150)
    whole = loaded(tmp_path)
    expected = whole.run(tokens, 0, PAGES, [149])
    pieces = loaded(tmp_path)
    for begin, end in ((0, 1), (1, 70), (70, 149)):
        assert pieces.run(tokens[begin:end], begin, PAGES, []).shape == (0, expected.shape[1])
    assert (pieces.run(tokens[149:], 149, PAGES, [0]) - expected).abs().max() < 1e-4
    monkeypatch.setattr(prompt, "CHUNK", 37)
    chunks = loaded(tmp_path)
    got = chunks.run(tokens, 0, PAGES, [149, 40, 39])
    assert (got[:1] - expected).abs().max() < 1e-4
    assert (got[1:] - whole.run(tokens, 0, PAGES, [40, 39])).abs().max() < 1e-4
    for cache, other in zip(whole.caches.values(), chunks.caches.values(), strict=True):
        assert (cache - other).abs().max() < 1e-4
        assert (cache[[1, 3, 4, 6]] == 9).all()  # pages of others
        assert (cache[7, :, 22:] == 9).all()  # positions that have not come


def test_an_indexer_bounds_how_many_tokens_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("glm_moe_dsa", tmp_path)
    tokens, runner, taken = tokens_for(150), loaded(tmp_path), list[int]()
    expected = runner.run(tokens, 0, PAGES, [149])
    chunk = PromptRunner._chunk

    def counted(runner: PromptRunner, step: Any) -> torch.Tensor:
        taken.append(len(step.tokens))
        return chunk(runner, step)

    monkeypatch.setattr(PromptRunner, "_chunk", counted)
    monkeypatch.setattr(prompt, "CHUNK", 100)
    monkeypatch.setattr(prompt, "SCORES", 70 * 120)
    assert (runner.run(tokens, 0, PAGES, [149]) - expected).abs().max() < 1e-4
    assert taken == [84, 64, 2]


def test_pages_are_stored_as_the_kernel_reads_them(tmp_path: Path) -> None:
    families.make("llama-tied", tmp_path)  # head_dim 16
    runner = loaded(tmp_path)
    runner.run(tokens_for(70), 0, PAGES, [])
    plain = torch.gather(
        runner.caches["layers.0.v_cache"], 3,
        torch.from_numpy(swizzle(16)).expand(8, 2, 64, 16),
    )  # fmt: skip
    read = StepCaches(runner.caches, torch.tensor(PAGES), 0, 70).read("layers.0.v_cache")
    assert torch.equal(read[:, :64], plain[5])
    assert torch.equal(read[:, 64:70], plain[2][:, :6])


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v32"])
def test_what_an_unwritten_row_holds_does_not_matter(name: str, tmp_path: Path) -> None:
    made(name, tmp_path)
    tokens = tokens_for(70)
    expected = loaded(tmp_path).run(tokens, 0, PAGES, [69])
    runner = loaded(tmp_path)
    for cache in runner.caches.values():
        cache.fill_(float("nan"))
    runner.run(tokens[:30], 0, PAGES, [])
    assert (runner.run(tokens[30:], 30, PAGES, [39]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("begin", [0, 30])
def test_attention_takes_a_fused_kernel(
    begin: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one, of math, holds the scores of all heads at once."""
    families.make("llama", tmp_path)
    runner, tokens = loaded(tmp_path), tokens_for(70)
    runner.run(tokens[:begin], 0, PAGES, [])
    masks: list[bool] = []
    real = functional.scaled_dot_product_attention

    def attend(q: Any, k: Any, v: Any, **options: Any) -> torch.Tensor:
        masks.append("attn_mask" in options)
        assert torch.ops.aten._fused_sdp_choice(q, k, v, **options) != 0
        return real(q, k, v, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    runner.run(tokens[begin:], begin, PAGES, [])
    assert masks == [begin > 0] * 3


def test_half_precision_is_close(tmp_path: Path) -> None:
    families.make("llama", tmp_path)
    tokens = tokens_for(100)
    exact = loaded(tmp_path).run(tokens, 0, PAGES, [99])
    most = 0.05 * exact.abs().max()
    assert (loaded(tmp_path, torch.bfloat16).run(tokens, 0, PAGES, [99]) - exact).abs().max() < most
    pieces = loaded(tmp_path, torch.bfloat16)  # the second of which has keys before its own
    pieces.run(tokens[:70], 0, PAGES, [])
    assert (pieces.run(tokens[70:], 70, PAGES, [29]) - exact).abs().max() < most


@needs_gpu
@pytest.mark.parametrize("past", [0, 5, 300])
def test_gpu_attention_behind_other_keys(past: int) -> None:
    """Without a mask the same as with one."""
    make = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
    q, k, v = make(8, 70, 64), make(2, past + 70, 64), make(2, past + 70, 64)
    seen = torch.ones(70, past + 70, dtype=torch.bool, device="cuda").tril(past)
    ours, masked = prompt.attend_all(q, k, v, 0.1), prompt.attend(q, k, v, 0.1, seen)
    assert (ours - masked).abs().max() < 0.02


def test_an_op_that_it_does_not_know_is_refused() -> None:
    graph = Graph("none")
    graph._add("conv", "y", "outputs", 4, {})
    with pytest.raises(AssertionError, match="cannot compute conv"):
        PromptRunner(graph, {"w": torch.zeros(1)}, {}, {})


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "deepseek_v32"])
def test_warming_up_leaves_caches_alone(name: str, tmp_path: Path) -> None:
    made(name, tmp_path)
    runner = loaded(tmp_path)
    runner.warm_up()
    assert all((cache == 9).all() for cache in runner.caches.values())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", id="gpu", marks=needs_gpu)])
@pytest.mark.parametrize("kind", ["f32", "bf16", "bf16 in odd rows", "e4m3", "without grouped_mm"])
def test_grouped_products(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows times the matrix of their expert; some experts have no rows."""
    n, k = (20, 12) if "odd" in kind else (24, 32)
    rng = torch.Generator().manual_seed(4)
    x, w = torch.randn(19, k, generator=rng), torch.randn(5, n, k, generator=rng)
    ends = torch.tensor([0, 3, 3, 11, 19], dtype=torch.int32, device=device)
    x, w = x.to(device), w.to(device, torch.float32 if kind == "f32" else torch.bfloat16)
    bank = experts.Bank(w)
    if kind == "e4m3":
        monkeypatch.setattr(experts, "WIDENED", 2 * n * k * 2)  # bytes of two of the five
        stored, scale = w.to(torch.float8_e4m3fn), torch.rand(5, 2, 2, generator=rng).to(device)
        bank = experts.Bank(stored, scale, (16, 16))
        spread = scale.repeat_interleave(16, 1)[:, :n].repeat_interleave(16, 2)
        w = (stored.float() * spread).to(torch.bfloat16)
        assert torch.equal(bank.part(0, 5), w)  # rounded once
    if kind == "without grouped_mm":
        monkeypatch.setattr(experts, "_grouped_mm", None)
    groups = experts.Groups(ends)
    y = groups.product(x, bank)
    of = torch.searchsorted(ends, torch.arange(19, device=device), right=True)
    expected = torch.einsum("rk,rnk->rn", x.to(w.dtype).double(), w[of].double())
    assert y.dtype is w.dtype
    assert (y - expected).abs().max() < (1e-5 if kind == "f32" else 2**-8 * expected.abs().max())
    assert ("borders" in groups.__dict__) == (kind != "bf16")  # a GPU would be waited for


class Arrays:
    """What the reference body of an op reads and writes, by its number."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays

    def read(self, buf: int, row: int, last_row: int, col: int, last_col: int) -> np.ndarray:
        return self.arrays[buf][row:last_row, col:last_col]

    def write(self, buf: int, row: int, col: int, values: np.ndarray) -> None:
        self.arrays[buf][row : row + values.shape[0], col : col + values.shape[1]] = values


@pytest.mark.parametrize("name", ROUTERS)
def test_choices_equal_the_definition(name: str) -> None:
    """Logits of few values, so that many are equal: the same experts, and their weights."""
    count, top_k, n_group, topk_group, sigmoid, norm = ROUTERS[name]
    rng = np.random.default_rng(5)
    logits = (rng.integers(-20, 20, (40, count)) / 8).astype(np.float32)
    bias = rng.integers(0, 3, (1, count)).astype(np.float32)
    chosen, weights = np.zeros((40, top_k), np.int32), np.zeros((40, top_k), np.float32)
    memory: Any = Arrays(logits, chosen, weights, np.asarray([[40, 40]]), bias)
    op = Route(Buf(0), Buf(4) if sigmoid else NONE, Buf(1), Buf(2), Buf(3), 40, count, top_k, n_group,
               topk_group, int(sigmoid), int(norm), 2.5)  # fmt: skip
    op.reference(memory, 0, 40)
    attrs = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group, "sigmoid": sigmoid,
             "norm_topk_prob": norm, "routed_scaling_factor": 2.5}  # fmt: skip
    given = torch.from_numpy(bias[0]) if sigmoid else None
    ours = experts.choose(torch.from_numpy(logits), given, attrs)
    assert ours[0].tolist() == chosen.tolist()
    assert np.allclose(ours[1], weights, rtol=1e-5, atol=0)
