"""config.json of models with latent attention: published files, what transformers writes, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers

from tilert.errors import UserError
from tilert.ir import machine
from tilert.models import load_config
from tilert.models.decoder import build
from tilert.models.mla import attention_scale

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
       "weight_block_size": [128, 128]}  # fmt: skip
# As deepseek-ai/DeepSeek-V3 publishes it.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": FP8, "rms_norm_eps": 1e-06, "rope_scaling": YARN,
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip
V32: dict[str, Any] = {
    **V3, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32",
    "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
    "quantization_config": {**FP8, "scale_fmt": "ue8m0"},
}  # fmt: skip
GLM5: dict[str, Any] = {
    **V32, "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "head_dim": 64,
    "hidden_size": 6144, "index_n_heads": 32, "indexer_rope_interleave": True,
    "intermediate_size": 12288, "max_position_embeddings": 202752, "n_group": 1,
    "num_attention_heads": 64, "num_hidden_layers": 78, "num_key_value_heads": 64, "q_lora_rank": 2048,
    "qk_head_dim": 256, "qk_nope_head_dim": 192, "rms_norm_eps": 1e-05, "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "topk_group": 1,
    "v_head_dim": 256, "vocab_size": 154880, "eos_token_id": [154820, 154827, 154829],
}  # fmt: skip
for _key in ("rope_scaling", "rope_theta", "auto_map", "aux_loss_alpha", "seq_aux", "torch_dtype",
             "bos_token_id"):  # fmt: skip
    del GLM5[_key]
GLM5 |= {"dtype": "bfloat16", "pad_token_id": 154820, "quantization_config": FP8}
_FULL = {0, 1, 2, *range(6, 78, 4)}
# As zai-org/GLM-5.2-FP8 publishes it: head_dim is not that of any product.
GLM52: dict[str, Any] = {
    **GLM5, "head_dim": 192, "index_share_for_mtp_iteration": True, "index_skip_topk_offset": 3,
    "index_topk_freq": 4, "index_topk_pattern": None,
    "indexer_types": ["full" if layer in _FULL else "shared" for layer in range(78)],
    "max_position_embeddings": 1048576, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "moe_router_dtype": "float32", "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "quantization_config": {**FP8, "modules_to_not_convert": ["lm_head", "model.layers.3.mlp.gate"]},
}  # fmt: skip
PUBLISHED = {"deepseek_v3": V3, "deepseek_v32": V32, "glm_moe_dsa": GLM5}
CLASSES = {"deepseek_v3": "DeepseekV3Config", "deepseek_v32": "DeepseekV32Config",
           "glm_moe_dsa": "GlmMoeDsaConfig"}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_files_are_read(family: str) -> None:
    config = load_config(PUBLISHED[family])
    latent, experts = config.latent, config.experts
    assert latent
    assert experts
    assert config.head_dim == 64
    assert latent.cache_width == 576
    assert latent.num_nextn_predict_layers == 1
    assert sum(experts.sparse) == config.num_hidden_layers - 3
    assert (latent.index is None) == (family == "deepseek_v3")
    if latent.index:
        assert latent.index.index_topk == 2048
        assert all(latent.index.full)
        assert latent.index.interleave == (family == "glm_moe_dsa")
    layers, indexed = config.num_hidden_layers, latent.index is not None
    assert config.cache_bytes(machine.cpu(2)) == layers * 4 * (576 + 128 * indexed)
    assert config.cache_bytes(machine.H100) == layers * (1152 + 132 * indexed)
    packed = replace(machine.H100, packed_latents=True)
    assert config.cache_bytes(packed) == layers * (656 + 132 * indexed)
    expected = 192**-0.5 * (1 + 0.1 * 3.6888794541139363) ** 2  # ln 40
    if family != "glm_moe_dsa":
        assert attention_scale(config, latent) == pytest.approx(expected)


def test_glm_5_2_shares_choices() -> None:
    config = load_config(GLM52)
    assert config.latent
    assert config.latent.index
    assert {layer for layer, full in enumerate(config.latent.index.full) if full} == _FULL
    assert config.rope_theta == 8e6
    assert config.max_position_embeddings == 1 << 20
    assert config.head_dim == 64  # of what is rotated
    # Other names for the same, and the rule that the list of indexers follows.
    again = {"num_experts": 256, "layer_types": ["deepseek_sparse_attention"] * 78}
    assert load_config({**GLM52, **again, "indexer_types": None}) == config


@pytest.mark.parametrize("family", CLASSES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    made = getattr(transformers, CLASSES[family])()
    config = load_config({"model_type": family})
    latent, experts, index = config.latent, config.experts, config.latent and config.latent.index
    assert latent
    assert experts
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
                "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                "bos_token_id", "tie_word_embeddings"):  # fmt: skip
        assert getattr(config, key) == getattr(made, key), key
    for key in (
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ):
        assert getattr(latent, key) == getattr(made, key), key
    for key in ("index_n_heads", "index_head_dim", "index_topk") if index else ():
        assert getattr(index, key) == getattr(made, key), key
    for key in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
                "routed_scaling_factor", "norm_topk_prob"):  # fmt: skip
        assert getattr(experts, key) == getattr(made, key), key
    assert experts.num_experts == made.n_routed_experts
    assert list(experts.sparse) == [i >= 3 for i in range(config.num_hidden_layers)]


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"index_topk_freq": 3},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_pattern": "FFSSFS"},
        {"indexer_types": ["full", "shared", "shared", "full", "shared", "full"]},
    ],
)
def test_which_layers_have_an_indexer_is_what_transformers_says(stated: dict[str, Any]) -> None:
    made = transformers.GlmMoeDsaConfig(num_hidden_layers=6, **stated)
    config = load_config({"model_type": "glm_moe_dsa", "num_hidden_layers": 6, **stated})
    assert config.latent
    assert config.latent.index
    kinds = made.indexer_types or []
    assert list(config.latent.index.full) == [kind == "full" for kind in kinds]
    indexed = {name.split(".")[2] for name in build(config, 64).weights if "indexer" in name}
    assert indexed == {str(i) for i, kind in enumerate(kinds) if kind == "full"}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank 0; accepted are whole numbers from 1"),
    ("deepseek_v3", {"qk_rope_head_dim": 63}, "qk_rope_head_dim 63; accepted are even sizes"),
    ("deepseek_v3", {"q_lora_rank": "1536"}, "q_lora_rank '1536'; accepted are whole numbers"),
    ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads 8; accepted are 128, null"),
    ("deepseek_v3", {"index_topk": 2048}, "has the key 'index_topk' that tilert does not know"),
    ("deepseek_v3", {"rope_interleave": 1}, "rope_interleave 1; accepted are true and false"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'; accepted are 'sigmoid'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy'; accepted are 'noaux_tc'"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2; accepted are 1, null"),
    ("deepseek_v3", {"num_nextn_predict_layers": -1}, "accepted are whole numbers from 0 to 64"),
    ("deepseek_v3", {"layer_types": ["indexed_attention"] * 61}, "accepted are lists of full_att"),
    ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank null; accepted are whole numbers, for the"),
    ("deepseek_v32", {"rope_interleave": False}, "rope_interleave false; accepted are true, null"),
    ("deepseek_v32", {"index_head_dim": 96}, "index_head_dim 96; accepted are powers of two from"),
    ("deepseek_v32", {"index_head_dim": 32}, "index_head_dim 32; accepted are powers of two from"),
    ("deepseek_v32", {"index_topk": 0}, "index_topk 0; accepted are whole numbers from 1"),
    ("deepseek_v32", {"indexer_rope_interleave": True}, "indexer_rope_interleave true; accepted are f"),
    ("deepseek_v32", {"mlp_layer_types": ["dense"]}, "has 1 mlp_layer_types; accepted is one for each"),
    ("deepseek_v32", {"mlp_layer_types": ["moe"] * 61}, "accepted are lists of dense and sparse"),
    ("glm_moe_dsa", {"indexer_types": ["shared"] * 78}, "accepted is full in the first layer"),
    ("glm_moe_dsa", {"indexer_types": ["full"]}, "has 1 indexer_types; accepted is one for each"),
    ("glm_moe_dsa", {"index_topk_pattern": "FX"}, "accepted are lists of full and shared, or"),
    ("glm_moe_dsa", {"index_topk_freq": -1}, "index_topk_freq -1; accepted are whole numbers"),
    ("glm_moe_dsa", {"moe_router_dtype": "bfloat16"}, "'bfloat16'; accepted are 'float32', null"),
    ("glm_moe_dsa", {"num_experts": 64}, "n_routed_experts 256"),
    ("glm_moe_dsa", {"layer_types": ["indexed_attention"]}, "accepted are lists of full_att"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "text"), REFUSED)
def test_refused_value(family: str, change: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config({**PUBLISHED[family], **change})
    assert text in str(caught.value)
