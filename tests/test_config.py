"""config.json against transformers' own config classes, and everything that must be refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tilert.errors import UserError
from tilert.models import FAMILIES, load_config
from tilert.models.config import IGNORED, DecoderConfig, RopeScaling
from tilert.models.rotary import rotary_table

CLASSES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}
SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 3,
    "eos_token_id": [7, 9],
    "tie_word_embeddings": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2, *[4.5] * 7]}
SAME = ("model_type", *SMALL.keys() - {"eos_token_id"}, "hidden_act")
QWEN = ("qwen2", "qwen3")
EVERY = tuple(CLASSES)
# (families, what is added to SMALL)
OPTIONS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (EVERY, {}),
    (EVERY, {"num_key_value_heads": 4, "eos_token_id": 11, "bos_token_id": None}),
    (EVERY, {"head_dim": 32, "torch_dtype": "bfloat16", "eos_token_id": None}),
    (EVERY, {"rope_theta": 500000, "rope_scaling": LLAMA3}),
    (EVERY, {"rope_theta": 12345.5, "rope_scaling": {"type": "linear", "factor": 2}}),
    (EVERY, {"rope_scaling": {"type": "dynamic", "factor": 2.5}}),
    (EVERY, {"rope_parameters": {"rope_theta": 1e6, **YARN}, "dtype": "float16"}),
    (EVERY, {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 20, "mscale": 0.5}}),
    (EVERY, {"head_dim": 16, "rope_scaling": LONGROPE, "original_max_position_embeddings": 32}),
    (EVERY, {"head_dim": 16, "rope_scaling": {**LONGROPE, "factor": 3.0, "attention_factor": 1.5}}),
    (EVERY, {"num_attention_heads": 8, "hidden_act": "silu", "attention_dropout": 0.25}),
    (("llama",), {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
    (("qwen3",), {"attention_bias": True}),
    (("mistral",), {"sliding_window": None}),
    (("mistral",), {"sliding_window": 32}),
    (QWEN, {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}),
    (QWEN, {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}),
    (QWEN, {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 9}),
    (QWEN, {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
    (
        QWEN,
        {
            "use_sliding_window": True,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
]
CASES = [(family, options) for families, options in OPTIONS for family in families]


def small(family: str, **options: Any) -> dict[str, Any]:
    return {"model_type": family, **SMALL, **options}


def expect(actual: DecoderConfig, hf: Any) -> None:
    """Every field of `actual` follows from the config of transformers."""
    for name in SAME:
        assert getattr(actual, name) == getattr(hf, name), name
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    assert actual.head_dim == head_dim
    stated = hf.eos_token_id
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    assert actual.eos_token_ids == tuple(ids)
    assert actual.dtype == (None if hf.dtype is None else str(hf.dtype).removeprefix("torch."))

    window = getattr(hf, "sliding_window", None)
    assert actual.sliding_window == window
    uniform = "full_attention" if window is None else "sliding_attention"
    layer_types = getattr(hf, "layer_types", None) or [uniform] * hf.num_hidden_layers
    assert actual.layer_types == tuple(layer_types)

    bias = bool(getattr(hf, "attention_bias", False))
    family = hf.model_type
    assert actual.qkv_bias == (bias or family == "qwen2")
    assert actual.o_bias == bias
    assert actual.mlp_bias == bool(getattr(hf, "mlp_bias", False))
    assert actual.qk_norm == (family == "qwen3")
    expect_rope(actual, hf)


def expect_rope(actual: DecoderConfig, hf: Any) -> None:
    hf.standardize_rope_params()
    rope, scaling = hf.rope_parameters, actual.rope_scaling
    assert actual.rope_theta == rope["rope_theta"]
    derived = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # where yarn's object is silent
    for field in dataclasses.fields(RopeScaling):
        value = rope.get(field.name)
        if value is None and rope["rope_type"] == "yarn":
            value = derived.get(field.name)
        if value is None and rope["rope_type"] in ("yarn", "longrope") and field.name == "factor":
            value = hf.max_position_embeddings / rope["original_max_position_embeddings"]
        if field.name.endswith(("short_factor", "long_factor")):
            value = tuple(value or ())
        assert getattr(scaling, field.name) == value, field.name


@pytest.mark.parametrize(("family", "options"), CASES)
def test_same_as_transformers(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Read as it is written by hand, as to_dict gives it, and as save_pretrained writes it."""
    config = small(family, **options)
    hf = CLASSES[family](
        **{k: v for k, v in json.loads(json.dumps(config)).items() if k != "model_type"}
    )
    expect(load_config(config), hf)
    expect(load_config(json.loads(json.dumps(hf.to_dict(), default=str))), hf)
    hf.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    expect(load_config(saved), AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", CLASSES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    expect(load_config({"model_type": family}), CLASSES[family]())


@pytest.mark.parametrize("key", sorted(SMALL))
@pytest.mark.parametrize("family", CLASSES)
def test_each_default_alone(family: str, key: str) -> None:
    config = {k: v for k, v in small(family, vocab_size=200_000).items() if k != key}
    hf = CLASSES[family](**{k: v for k, v in config.items() if k != "model_type"})
    if hf.num_attention_heads % hf.num_key_value_heads:  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="num_key_value_heads"):
            load_config(config)
        return
    expect(load_config(config), hf)


@pytest.mark.parametrize("family", CLASSES)
def test_old_file_with_every_shared_key(family: str) -> None:
    """Files of early versions of transformers hold the settings of all tasks."""
    old = {
        "_name_or_path": "x",
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "add_cross_attention": False,
        "bad_words_ids": None,
        "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None,
        "decoder_start_token_id": None,
        "finetuning_task": None,
        "id2label": {"0": "LABEL_0"},
        "initializer_range": 0.02,
        "is_encoder_decoder": False,
        "max_length": 20,
        "output_attentions": False,
        "pad_token_id": -1,
        "pretraining_tp": 1,
        "pruned_heads": {},
        "quantization_config": None,
        "rope_scaling": None,
        "temperature": 1.0,
        "torch_dtype": "torch.float16",
        "transformers_version": "4.28.0",
        "use_cache": True,
    }
    bare = load_config(small(family))
    assert load_config(small(family, **old)) == dataclasses.replace(bare, dtype="float16")


def test_smollm2() -> None:
    """Keys of a real file that is not quite what transformers writes."""
    config = load_config(
        small(
            "llama",
            is_llama_config=True,
            rope_interleaved=False,
            **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
        )
    )
    assert config == load_config(small("llama"))


@pytest.mark.parametrize("family", CLASSES)
@given(key=st.text(min_size=1), value=st.none() | st.booleans() | st.integers() | st.text())
def test_unknown_key_is_refused(family: str, key: str, value: Any) -> None:
    assume(key not in known_keys(family))
    with pytest.raises(UserError, match="that tilert does not know"):
        load_config(small(family, **{key: value}))


@functools.cache
def known_keys(family: str) -> set[str]:
    """Keys that are accepted with some value: those that the error text lists, and the ignored."""
    with pytest.raises(UserError) as caught:
        load_config({"model_type": family, "": 0})
    listed = str(caught.value).split("known are ")[1].split(", ")
    assert {*FAMILIES[family].defaults, *FAMILIES[family].fixed} <= {*listed}
    return {*listed, *IGNORED}


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    "key", ["foo", "logit_scale", "num_experts", "Hidden_size", "hidden_size "]
)
def test_misspelt_and_foreign_keys_are_refused(family: str, key: str) -> None:
    with pytest.raises(UserError, match=f"'{family}' has the key '{key}'"):
        load_config(small(family, **{key: None}))


@pytest.mark.parametrize("family", CLASSES)
def test_ignored_keys_change_nothing(family: str) -> None:
    plain = load_config(small(family))
    for key, reason in IGNORED.items():
        assert reason
        if key != "model_type":
            assert load_config(small(family, **{key: 0.5})) == plain, key


# (families, key, value, a piece of the sentence)
REFUSED: list[tuple[tuple[str, ...], str, Any, str]] = [
    (EVERY, "hidden_act", "gelu", "hidden_act 'gelu'; accepted are 'silu', 'swish'"),
    (EVERY, "hidden_act", None, "hidden_act null"),
    (
        EVERY,
        "quantization_config",
        {"quant_method": "awq"},
        "quant_method 'awq'; accepted are null",
    ),
    (EVERY, "quantization_config", {"quant_method": "fp8", "bits": 8}, "key 'bits'"),
    (EVERY, "quantization_config", {"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
    (EVERY, "quantization_config", {"quant_method": "fp8", "weight_block_size": 128}, "is 128"),
    (EVERY, "quantization_config", {"quant_method": "compressed-tensors"}, "format None"),
    (EVERY, "pretraining_tp", 2, "pretraining_tp 2; accepted are 1, null"),
    (EVERY, "pretraining_tp", True, "pretraining_tp true; accepted are 1, null"),
    (EVERY, "partial_rotary_factor", 0.5, "partial_rotary_factor 0.5"),
    (EVERY, "rope_interleaved", True, "rope_interleaved true"),
    (EVERY, "rope_interleaved", 0, "rope_interleaved 0"),
    (EVERY, "architectures", ["LlamaForSequenceClassification"], "ForCausalLM"),
    (EVERY, "architectures", "LlamaForCausalLM", "architectures"),
    (EVERY, "architectures", [], "architectures"),
    (EVERY, "vocab_size", 0, "vocab_size 0; accepted are whole numbers from 1"),
    (EVERY, "vocab_size", -5, "vocab_size -5"),
    (EVERY, "vocab_size", 1 << 40, "vocab_size"),
    (EVERY, "hidden_size", 64.0, "hidden_size 64.0"),
    (EVERY, "hidden_size", "64", "hidden_size '64'"),
    (EVERY, "hidden_size", True, "hidden_size true"),
    (EVERY, "hidden_size", None, "hidden_size null"),
    (EVERY, "num_hidden_layers", 10**9, "num_hidden_layers"),
    (EVERY, "num_attention_heads", 0, "num_attention_heads 0"),
    (
        EVERY,
        "num_key_value_heads",
        3,
        "num_key_value_heads 3; accepted are divisors of the 4 heads",
    ),
    (EVERY, "num_key_value_heads", 8, "num_key_value_heads 8"),
    (EVERY, "head_dim", 15, "heads of 15 elements; accepted are even"),
    (EVERY, "head_dim", True, "head_dim true"),
    (("llama", "qwen2", "mistral"), "hidden_size", 66, "hidden_size 66; accepted are multiples"),
    (EVERY, "rms_norm_eps", float("nan"), "rms_norm_eps nan"),
    (EVERY, "rms_norm_eps", 0, "rms_norm_eps 0"),
    (EVERY, "rms_norm_eps", "1e-5", "rms_norm_eps '1e-5'"),
    (EVERY, "rope_theta", float("inf"), "rope_theta inf"),
    (EVERY, "rope_theta", 10**400, "rope_theta 1000"),
    (EVERY, "rope_theta", False, "rope_theta false"),
    (EVERY, "tie_word_embeddings", 1, "tie_word_embeddings 1; accepted are true and false"),
    (EVERY, "tie_word_embeddings", None, "tie_word_embeddings null"),
    (EVERY, "bos_token_id", 500, "bos_token_id 500"),
    (EVERY, "eos_token_id", 500, "eos_token_id 500; accepted are ids from 0 to 499"),
    (EVERY, "eos_token_id", [1, -1], "eos_token_id [1, -1]"),
    (EVERY, "eos_token_id", [True], "eos_token_id [True]"),
    (EVERY, "eos_token_id", [[1]], "eos_token_id"),
    (EVERY, "eos_token_id", {"a": 1}, "eos_token_id"),
    (EVERY, "torch_dtype", 16, "torch_dtype 16"),
    (EVERY, "layer_types", ["full_attention"], "1 layer_types"),
    (EVERY, "layer_types", ["chunked_attention"] * 4, "layer_types"),
    (EVERY, "layer_types", "full_attention", "layer_types"),
    (QWEN, "layer_types", ["sliding_attention"] * 4, "needs use_sliding_window true"),
    (QWEN, "use_sliding_window", 0, "use_sliding_window 0"),
    (QWEN, "max_window_layers", -1, "max_window_layers -1"),
    (QWEN, "sliding_window", 0, "sliding_window 0"),
    (("mistral",), "sliding_window", 0, "sliding_window 0"),
    (("mistral",), "layer_types", ["full_attention"] * 4, "sliding_attention in every layer"),
    (("llama",), "layer_types", ["sliding_attention"] * 4, "full_attention in every layer"),
    (("llama",), "sliding_window", 4096, "sliding_window 4096; accepted is null"),
    (("mistral",), "attention_bias", True, "attention_bias true; accepted is false"),
    (("qwen2",), "attention_bias", False, "attention_bias false; accepted is true"),
    (("qwen2", "qwen3", "mistral"), "mlp_bias", True, "mlp_bias true; accepted is false"),
    (("llama", "qwen3"), "attention_bias", "yes", "attention_bias 'yes'"),
]
REFUSED_ROPES: list[tuple[Any, str]] = [
    ("yarn", "accepted are an object and null"),
    ([1], "accepted are an object and null"),
    ({"rope_type": "mrope"}, "rope_type 'mrope'; accepted are default, linear, dynamic, llama3"),
    ({"type": "su"}, "type 'su'"),
    ({"rope_type": None}, "rope_type null"),
    ({"rope_type": ["yarn"]}, "rope_type ['yarn']"),
    ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, "rope_type 'yarn' and type 'linear'"),
    ({"factor": 8.0}, "key 'factor' that tilert does not know for rope_type 'default'"),
    ({"rope_type": "linear"}, "lacks factor"),
    ({"rope_type": "linear", "factor": 0.5}, "factor 0.5"),
    ({"rope_type": "linear", "factor": None}, "factor null"),
    ({"rope_type": "linear", "factor": True}, "factor true"),
    ({"rope_type": "linear", "factor": 2, "alpha": 1}, "key 'alpha'"),
    ({"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 8}, "lacks factor"),
    ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings 0"),
    ({**YARN, "attention_factor": float("nan")}, "attention_factor nan"),
    ({**YARN, "attention_factor": -1.0}, "attention_factor -1.0"),
    ({**YARN, "beta_fast": 0.5}, "beta_fast 0.5; accepted is at least beta_slow, 1"),
    ({**YARN, "truncate": 1}, "truncate 1"),
    ({**YARN, "mscale": "1"}, "mscale '1'"),
    ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "lacks low_freq_factor"),
    ({**LLAMA3, "high_freq_factor": 1.0}, "accepted is more than low_freq_factor 1"),
    ({**LLAMA3, "attention_factor": 1.0}, "key 'attention_factor'"),
    ({"type": "longrope", "short_factor": [1.0] * 8}, "lacks long_factor"),
    ({**LONGROPE, "long_factor": [1.0] * 7}, "head_dim / 2 = 8 numbers"),
    ({**LONGROPE, "long_factor": [1.0] * 7 + [None]}, "entry 7 null"),
    ({**LONGROPE, "short_factor": [0.0] * 8}, "entry 0 0.0"),
    ({**LONGROPE, "short_factor": "1"}, "short_factor '1'"),
    ({"full_attention": {}, "rope_theta": 1e4}, "accepted: one object"),
    ({"full_attention": None}, "accepted: one object"),
    ({"full_attention": {"rope_theta": 1e4}, "sliding_attention": YARN}, "one rope for all layers"),
]


@pytest.mark.parametrize(
    ("family", "key", "value", "text"),
    [(family, *rest) for families, *rest in REFUSED for family in families],
)
def test_refused_value(family: str, key: str, value: Any, text: str) -> None:
    config = small(family, head_dim=None) if family != "qwen3" else small(family)
    with pytest.raises(UserError) as caught:
        load_config(config | {key: value})
    assert text in str(caught.value)
    assert family in str(caught.value)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("rope", "text"), REFUSED_ROPES)
def test_refused_rope(key: str, rope: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(small("llama", **{key: rope}))
    assert text in str(caught.value)
    assert "config.json of model_type 'llama'" in str(caught.value)


@pytest.mark.parametrize("head_dim", [2])
def test_dynamic_needs_four_elements(head_dim: int) -> None:
    with pytest.raises(UserError, match="head_dim is 2"):
        load_config(
            small("llama", head_dim=head_dim, rope_scaling={"type": "dynamic", "factor": 2})
        )


def test_ropes_in_two_places() -> None:
    """The same said twice is accepted, a contradiction is not."""
    both = small("qwen3", rope_theta=1e6, rope_scaling=YARN)
    both["rope_parameters"] = {"rope_theta": 1e6, **YARN}
    nested = small("qwen3", rope_parameters={"full_attention": both["rope_parameters"]})
    alone = small("qwen3", rope_parameters=both["rope_parameters"])
    assert load_config(both) == load_config(nested) == load_config(alone)
    with pytest.raises(UserError, match="ropes that differ"):
        load_config(both | {"rope_scaling": {**YARN, "factor": 2.0}})
    with pytest.raises(UserError, match=r"1000000\.0 and rope_theta of config"):
        load_config(both | {"rope_theta": 20})
    original = {"original_max_position_embeddings": 32}
    with pytest.raises(UserError, match="64 and original_max_position_embeddings of"):
        load_config(alone | original)


def test_null_and_empty_ropes_say_nothing() -> None:
    plain = load_config(small("llama"))
    for key in ("rope_scaling", "rope_parameters"):
        for value in (None, {}, {"rope_type": "default"}, {"type": "default"}):
            assert load_config(small("llama", **{key: value})) == plain


def test_eos_ids_of_both_files() -> None:
    config = small("llama", eos_token_id=7)
    for stated, ids in ((None, (7,)), (8, (7, 8)), ([7, 9, 9], (7, 9)), ([], (7,))):
        assert load_config(config, {"eos_token_id": stated, "top_p": 0.9}).eos_token_ids == ids
    assert load_config(small("llama", eos_token_id=None), {"eos_token_id": [5]}).eos_token_ids == (
        5,
    )
    with pytest.raises(UserError, match=r"generation_config.json has eos_token_id \[-1\]"):
        load_config(config, {"eos_token_id": [-1]})


def test_a_family_that_many_ask_for_is_told_what_it_would_need() -> None:
    needs = (
        "'gpt_oss', which needs attention sinks, experts with biases and MXFP4 weights that tilert"
    )
    with pytest.raises(UserError, match=f"model_type {needs} does not have; accepted are llama"):
        load_config({"model_type": "gpt_oss"})


@pytest.mark.parametrize("model_type", ["gpt2", 3, ["llama"], "LLAMA"])
def test_unknown_model_type(model_type: Any) -> None:
    with pytest.raises(UserError, match="accepted are llama, qwen2, qwen3, mistral"):
        load_config({"model_type": model_type})


def test_not_a_config() -> None:
    with pytest.raises(UserError, match="has no model_type"):
        load_config({})
    with pytest.raises(UserError, match="holds a list"):
        load_config([])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"config\.json holds a str"):
        load_config(small("llama"), "x")  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("family", CLASSES)
@given(data=st.data())
def test_no_value_gives_another_error(family: str, data: st.DataObject) -> None:
    """Whatever a known key holds, the answer is a config or a UserError."""
    keys = sorted(known_keys(family))
    damage = data.draw(st.dictionaries(st.sampled_from(keys), JSON, max_size=3))
    with contextlib.suppress(UserError):
        assert load_config(small(family, **damage)).head_dim > 0


NUMBERS = st.floats(1e-6, 1e6) | st.integers(1, 1000)
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "dynamic", "yarn", "llama3", "longrope"])},
    optional={
        **dict.fromkeys(("factor", "rope_theta", "low_freq_factor", "high_freq_factor"), NUMBERS),
        **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), NUMBERS),
        **dict.fromkeys(("short_factor", "long_factor"), st.lists(NUMBERS, min_size=8, max_size=8)),
        "original_max_position_embeddings": st.integers(1, 1000),
        "attention_factor": NUMBERS | st.none(),
        "truncate": st.booleans(),
    },
)
KEYS_OF = {  # without this nearly no rope that is drawn would be accepted
    "linear": {"rope_type", "rope_theta", "factor"},
    "dynamic": {"rope_type", "rope_theta", "factor"},
    "yarn": {"rope_theta", "truncate", "attention_factor", "mscale", "mscale_all_dim", *YARN}
    | {"beta_fast", "beta_slow"},
    "llama3": {"rope_theta", *LLAMA3},
    "longrope": {"rope_type", "rope_theta", "attention_factor", "factor", *LONGROPE} - {"type"},
}


@given(ROPES | st.dictionaries(st.sampled_from([*YARN, *LLAMA3, *LONGROPE]), JSON, max_size=4))
def test_an_accepted_rope_has_a_finite_table(rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type")
    if isinstance(kind, str) and kind in KEYS_OF:
        rope = {key: value for key, value in rope.items() if key in KEYS_OF[kind]}
    with contextlib.suppress(UserError):
        cos, sin = rotary_table(load_config(small("llama", rope_scaling=rope)), 300)
        assert np.isfinite(cos).all()
        assert np.isfinite(sin).all()
