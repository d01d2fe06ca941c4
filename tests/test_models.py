"""Every family against transformers on the same weights: logits in all programs, then greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tilert import LLM, SamplingParams
from tilert.engine.runner import Row

BACKENDS: list[tuple[Any, int]] = [("cpu", 1), ("cpu", 2), ("interpreter", 2)]
TOLERANCE = 1e-3  # max abs logit error in f32


def tokens_for(length: int) -> list[int]:
    """A fixed prompt of that length within the tiny vocabulary."""
    return [int(t) for t in np.random.default_rng(length).integers(3, 199, length)]


def own_logits(llm: LLM, tokens: list[int], sizes: list[int]) -> np.ndarray:
    """Logits of every position that a program can give, feeding `tokens` in steps of the given sizes."""
    runner, at, rows = llm.runner, 0, []
    pages = range(-(-len(tokens) // 64))
    runner.set_pages(0, list(pages))
    for size in sizes:
        step = [Row(tokens[p], p, 0) for p in range(at, at + size)]
        wanted = list(range(size)) if size <= 8 else [size - 1]
        runner.step(step, wanted)
        logits = runner.logits()
        rows += [(at + i, logits[n].copy()) for n, i in enumerate(wanted)]
        at += size
    out = np.full((len(tokens), rows[0][1].size), np.nan, np.float32)
    for position, row in rows:
        out[position] = row
    return out


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_equal_transformers(name: str, backend: Any, tmp_path: Path) -> None:
    model = families.make(name, tmp_path)
    llm = LLM(tmp_path, skip_tokenizer_init=True, backend=backend, threads=2, max_model_len=128)
    tokens = tokens_for(48)
    expected = families.logits(model, tokens)
    for sizes in ([1, 8, 5, 1, 1, 20, 12], [40, 8]):
        own = own_logits(llm, tokens, sizes)
        known = ~np.isnan(own[:, 0])
        assert known.sum() >= 9
        assert np.abs(own[known] - expected[known]).max() < TOLERANCE


@pytest.mark.parametrize("name", ["llama-dynamic-short", "llama-longrope", "llama-yarn", "mistral"])
def test_logits_beyond_the_original_context(name: str, tmp_path: Path) -> None:
    """Token by token past the border at which the rope scaling changes."""
    model = families.make(name, tmp_path)
    llm = LLM(tmp_path, skip_tokenizer_init=True, threads=1)
    tokens = tokens_for(80)
    own = own_logits(llm, tokens, [1] * 80)
    cache = None
    with torch.no_grad():
        for position, token in enumerate(tokens):
            result = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            error = np.abs(result.logits[0, 0].numpy() - own[position]).max()
            assert error < TOLERANCE, f"position {position}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_half_precision_is_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    families.make("llama", tmp_path, dtype)
    llm = LLM(tmp_path, skip_tokenizer_init=True, threads=2)
    tokens = tokens_for(48)
    own = own_logits(llm, tokens, [40, 8])
    known = ~np.isnan(own[:, 0])
    widened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = families.logits(widened, tokens)
    assert np.abs(own[known] - expected[known]).max() < TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "qwen3", "mistral", "qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v32"],
)
def test_greedy_tokens_of_all_back_ends_are_equal(name: str, tmp_path: Path) -> None:
    model = families.make(name, tmp_path)
    prompt = {"prompt_token_ids": tokens_for(21)}
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    made = [
        LLM(tmp_path, skip_tokenizer_init=True, backend=backend, threads=threads)
        .generate(prompt, params)[0]
        .outputs[0]
        .token_ids
        for backend, threads in BACKENDS
    ]
    with torch.no_grad():
        ids = torch.tensor([prompt["prompt_token_ids"]])
        expected = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert made == [expected[0, 21:].tolist()] * 3
