"""glassllm, a trained model of 0.85 M parameters with odd sizes, against its own numpy forward.

A third implementation beside ours and transformers. Its rotary embedding turns neighbouring pairs, so
the rows of q and k are reordered once to the half-split order of the Hugging Face layout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tilert import LLM, SamplingParams
from tilert.engine.runner import Row


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (0, 1, 2, 3, ...) to (0, 2, ..., 1, 3, ...); weight [heads * d, k]."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.transpose(0, 2, 1, 3).reshape(weight.shape)


def convert(weights: Any, folder: Path) -> None:
    """Write glassllm's arrays as a Hugging Face folder in f16."""
    config = json.loads(str(weights["__config__"]))
    tensors = {
        "model.embed_tokens.weight": weights["E"],
        "model.norm.weight": weights["norm_f.gamma"],
    }
    for layer in range(config["n_layers"]):
        own, out = f"blocks.{layer}", f"model.layers.{layer}"
        matrices = {
            "self_attn.q_proj": half_split(weights[f"{own}.attn.W_Q"].T, config["n_heads"]),
            "self_attn.k_proj": half_split(weights[f"{own}.attn.W_K"].T, config["n_kv_heads"]),
            "self_attn.v_proj": weights[f"{own}.attn.W_V"].T,
            "self_attn.o_proj": weights[f"{own}.attn.W_O"].T,
            "mlp.gate_proj": weights[f"{own}.ffn.W1"].T,
            "mlp.up_proj": weights[f"{own}.ffn.W3"].T,
            "mlp.down_proj": weights[f"{own}.ffn.W2"].T,
            "input_layernorm": weights[f"{own}.norm1.gamma"],
            "post_attention_layernorm": weights[f"{own}.norm2.gamma"],
        }
        tensors |= {f"{out}.{name}.weight": array for name, array in matrices.items()}
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama", "vocab_size": config["vocab_size"],
                "hidden_size": config["d_model"], "intermediate_size": 341,
                "num_hidden_layers": config["n_layers"], "num_attention_heads": config["n_heads"],
                "num_key_value_heads": config["n_kv_heads"], "rms_norm_eps": config["eps"],
                "rope_theta": config["rope_base"], "max_position_embeddings": config["max_len"],
                "tie_word_embeddings": True,
            }
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def glass(glassllm_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    sys.path.insert(0, str(glassllm_wheel))
    try:
        import glassllm  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(glassllm_wheel))
    model, tokenizer = glassllm.load_pretrained("en")
    folder = tmp_path_factory.mktemp("glass")
    with np.load(glassllm_wheel / "glassllm" / "weights" / "en.npz") as weights:
        convert(weights, folder)
    return model, tokenizer, folder


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
def test_logits_equal_its_own_forward(glass: tuple[Any, Any, Path], backend: Any) -> None:
    model, tokenizer, folder = glass
    ids = tokenizer.encode("It was the best of times, it was the worst of times")
    llm = LLM(folder, skip_tokenizer_init=True, backend=backend, threads=2)
    llm.runner.set_pages(0, [0, 1])
    expected = model.forward(ids).data[0]
    for begin in range(0, len(ids) - 8, 8):
        rows = [Row(ids[p], p, 0) for p in range(begin, begin + 8)]
        llm.runner.step(rows, range(8))
        assert np.abs(llm.runner.logits() - expected[begin : begin + 8]).max() < 1e-3


def test_greedy_tokens_equal_its_own(glass: tuple[Any, Any, Path]) -> None:
    model, tokenizer, folder = glass
    ids = tokenizer.encode("The old man looked at the sea and")
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    made = LLM(folder, skip_tokenizer_init=True, threads=2).generate(
        {"prompt_token_ids": ids}, params
    )
    assert made[0].outputs[0].token_ids == [
        step.token for step in model.generate(ids, 64, greedy=True)
    ]
