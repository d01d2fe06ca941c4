"""The FP8 form of latent caches: its bytes against PyTorch's e4m3, models against transformers whose latents
are rounded in the same way, the setting, and the memory that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from test_mla import error, opened
from test_models import own_logits, tokens_for

from tilert import SamplingParams
from tilert.backends.cpu import CpuBackend
from tilert.backends.cuda import prompt_latent
from tilert.backends.interpreter import Interpreter
from tilert.errors import UserError
from tilert.ops.mla import pack, packed_bytes, unpack

# Of what rounding latents does to logits (an e4m3 is off by 2^-4 of itself at most), the part that may come
# beside it: queries and rotated keys in bf16, of which the reference knows nothing, are off by 2^-9, and
# where a latent lies between two numbers it takes the other one for that.
BESIDE = 0.25
WIDE: dict[str, Any] = {
    "q_lora_rank": 96, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
}  # fmt: skip


def rounded(latents: torch.Tensor) -> torch.Tensor:
    """Latents [..., lora] as attention finds them: each 128 of them in e4m3 of their largest magnitude over
    448, widened to bf16. As FlashMLA's tests quantise a cache."""
    tiles = []
    for tile in latents.float().split(128, dim=-1):
        scale = tile.abs().amax(dim=-1, keepdim=True) / 448
        tiles.append((tile / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(tiles, dim=-1).to(torch.bfloat16).to(latents.dtype)


def in_fp8(model: Any) -> Any:
    """The model of transformers with its latents rounded before anything reads them."""
    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.register_forward_hook(lambda _m, _i, out: rounded(out))
    return model


def rows(count: int, lora: int, rope: int) -> np.ndarray:
    """f32 [count, lora + rope] of which each has a size of its own."""
    dice = np.random.default_rng(count)
    sizes = np.exp2(dice.integers(-12, 12, (count, 1)))
    return (dice.standard_normal((count, lora + rope)) * sizes).astype(np.float32)


@pytest.mark.parametrize(("lora", "rope", "size"), [(512, 64, 656), (160, 8, 192), (16, 4, 40)])
def test_a_packed_row_is_what_pytorch_makes_of_it(lora: int, rope: int, size: int) -> None:
    """Bytes by hand: latents, scales up to a multiple of 16, keys; and no latent moves by more than half of
    the last of e4m3's four digits, or half of its smallest number."""
    assert packed_bytes(lora, rope) == size
    plain = rows(40, lora, rope)
    plain[7, :lora] = 0
    stored = np.stack([pack(row, lora) for row in plain])
    assert stored.shape == (40, size)
    given = torch.from_numpy(plain)
    for first in range(0, lora, 128):
        tile = given[:, first : min(first + 128, lora)]
        scale = (tile.abs().amax(dim=1, keepdim=True) / 448).clamp(min=2.0**-126)
        at = lora + first // 128 * 4
        assert stored[:, at : at + 4].tobytes() == scale.numpy().tobytes()
        values = (tile / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        assert (stored[:, first : first + values.shape[1]] == values).all()
    keys = given[:, lora:].to(torch.bfloat16).view(torch.uint8).numpy()
    assert (stored[:, size - 2 * rope :] == keys).all()
    assert (stored[:, lora + -(-lora // 128) * 4 : size - 2 * rope] == 0).all()
    widened = unpack(stored, lora).astype(np.float32)
    spread = np.abs(plain[:, :lora]).max(axis=1, keepdims=True) / 448 * 2.0**-10
    moved = np.abs(widened - plain)[:, :lora]
    assert (moved <= np.maximum(np.abs(plain[:, :lora]) * (2.0**-4 + 2.0**-8), spread)).all()


@pytest.mark.parametrize(("lora", "rope"), [(512, 64), (160, 8), (576, 64)])
def test_prompts_pack_the_same_bytes(lora: int, rope: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch makes of rows for prompts on a GPU, and of bytes, a few rows at a time."""
    monkeypatch.setattr(prompt_latent, "MOST", 4 * lora)
    plain = rows(21, lora, rope)
    plain[3] = 0
    stored = np.stack([pack(row, lora) for row in plain])
    own = prompt_latent.packed(torch.from_numpy(plain)[:, None], lora)
    assert own.shape == (21, 1, packed_bytes(lora, rope))
    assert (own[:, 0].numpy() == stored).all()
    widened = prompt_latent.unpacked(torch.from_numpy(stored), lora)
    assert widened.dtype == torch.bfloat16
    assert (widened.float().numpy() == unpack(stored, lora).astype(np.float32)).all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_both_back_ends_keep_the_same_bytes(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the first layer, whose inputs hang on no attention: a sum in another order moves an e4m3
    by a step at most, and hardly any."""
    monkeypatch.setenv("TILERT_CPU_ISA", isa)
    families.make("deepseek_v3", tmp_path, **WIDE)
    tokens, kept = tokens_for(70), []
    for backend in ("cpu", "interpreter"):
        try:
            llm = opened(tmp_path, backend, kv_cache_dtype="fp8")
        except UserError:
            pytest.skip(f"this machine has no {isa}")
        own_logits(llm, tokens, [60, 8, 1, 1])
        bound = llm.runner.backend("decode")
        assert isinstance(bound, CpuBackend | Interpreter)
        caches = llm.runner._caches
        assert caches
        assert all(c.shape[1:] == (64, 656) and c.dtype == np.uint8 for c in caches.values())
        kept.append(caches["layers.0.latent_cache"][:2].reshape(128, 656)[:70])
    own, wanted = (unpack(each, 512).astype(np.float32) for each in kept)
    assert (kept[0] != kept[1]).mean() < 0.01
    assert (np.abs(own - wanted) <= 0.13 * np.abs(wanted) + 1e-6).all()


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "glm_moe_dsa"])
def test_logits_are_those_of_rounded_latents(name: str, backend: str, tmp_path: Path) -> None:
    """One token and several at a time. What rounding latents does to transformers' logits it does to ours,
    so they are off from the plain ones by 1 + BESIDE of that at most."""
    changes: dict[str, Any] = {} if name == "deepseek_v3" else {"index_topk": 64}  # all are chosen
    model = families.make(name, tmp_path, num_hidden_layers=3, first_k_dense_replace=3, **changes)
    tokens = tokens_for(40)
    plain = families.logits(model, tokens)
    expected = families.logits(in_fp8(model), tokens)
    shift = np.abs(expected - plain).max()
    llm = opened(tmp_path, backend, kv_cache_dtype="fp8")
    for sizes in ([1, 8, 5, 1, 1, 12], [32, 8]):
        own = own_logits(llm, tokens[: sum(sizes)], sizes)
        assert error(own, expected) < BESIDE * shift, sizes
        assert error(own, plain) > shift / 4, sizes


def test_sizes_of_real_models_and_greedy_tokens(tmp_path: Path) -> None:
    """Latents of four scales over two pages, alone and shared between requests, against the interpreter."""
    model = families.make("deepseek_v3", tmp_path, **WIDE)
    llm = opened(tmp_path, kv_cache_dtype="fp8", max_num_seqs=2)
    tokens = tokens_for(100)
    plain = families.logits(model, tokens)
    expected = families.logits(in_fp8(model), tokens)
    own = own_logits(llm, tokens, [70, 8, 1, 20, 1])
    assert error(own, expected) < BESIDE * np.abs(expected - plain).max()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [{"prompt_token_ids": tokens[:n]} for n in (70, 9)]
    made = [
        [out.outputs[0].token_ids for out in each.generate(prompts, params)]
        for each in (llm, opened(tmp_path, "interpreter", kv_cache_dtype="fp8", max_num_seqs=2))
    ]
    assert made[0] == made[1]
    # Near the best of transformers' at every step, given what was made before it.
    after = families.logits(model, tokens[:70] + list(made[0][0]))[69:-1]
    chosen = after[np.arange(8), list(made[0][0])]
    assert (after.max(axis=1) - chosen).max() < 2 * BESIDE * np.abs(expected - plain).max()


def test_what_a_token_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pages fit as their caches say: 40 bytes in each of three layers, and the indexer's keys."""
    families.make("deepseek_v32", tmp_path)
    memory = 2 * 64 * 3 * (40 + 4 * 16) + 100
    monkeypatch.setattr("tilert.serve.llm._available_memory", lambda: 2 * memory)
    llm = opened(tmp_path, kv_cache_dtype="fp8", max_model_len=128, max_num_seqs=4)
    assert llm.runner.num_pages == 2
    llm.runner.backend("decode")
    assert llm.runner._caches
    assert sum(cache.nbytes for cache in llm.runner._caches.values()) == memory - 100
    with pytest.raises(UserError, match="the KV cache of 128 positions needs"):
        opened(tmp_path, max_model_len=128)


def test_only_latents_can_be_in_fp8(tmp_path: Path) -> None:
    families.make("llama", tmp_path)
    with pytest.raises(
        UserError, match="kv_cache_dtype is 'fp8', but a model of type 'llama' has no latent cache"
    ):
        opened(tmp_path, kv_cache_dtype="fp8")
    with pytest.raises(UserError, match="kv_cache_dtype is 'int8'; accepted are auto and fp8"):
        opened(tmp_path, kv_cache_dtype="int8")
