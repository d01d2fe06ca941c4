"""Strict reading of config.json: the decoder families' settings, checked and normalised.

A key is read, or refused unless it has the one value that tilert computes, or ignored for a reason
that IGNORED states; any other key is a UserError, because a setting that is not understood gives
wrong tokens without a sign. Meanings and defaults are those of transformers 5. Knows no tensors and
no graph; what differs between families stands in their own files as FamilyRules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.machine import Machine
from tilert.models import latent as latents
from tilert.models.experts import ExpertsConfig, ExpertsRules
from tilert.models.experts import parse as parse_experts
from tilert.models.latent import LatentConfig, LatentRules
from tilert.models.quantization import Quantization
from tilert.models.quantization import parse as parse_quantization
from tilert.models.section import Section, show
from tilert.ops.mla import packed_bytes

LayerType = Literal["full_attention", "sliding_attention"]
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched; a field that rope_type does not read is None or empty."""

    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None  # positions; yarn, longrope, llama3
    attention_factor: float | None = None  # None: yarn and longrope derive it from the factor
    beta_fast: float | None = None  # rotations over the original context; yarn
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] = ()  # [head_dim / 2]; longrope
    long_factor: tuple[float, ...] = ()
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder's settings under their names in transformers; sizes in elements."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool  # of gate, up and down
    qk_norm: bool  # an RMSNorm over each head of q and k
    sliding_window: int | None  # positions that a query sees in a sliding layer, its own included
    layer_types: tuple[LayerType, ...]  # one per layer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # of config.json, then those that generation_config.json adds
    dtype: str | None  # as config.json states it; the tensors decide
    quantization: Quantization | None = None
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None  # head_dim is then what is rotated: qk_rope_head_dim

    def cache_bytes(self, machine: Machine) -> int:
        """Bytes that all caches together hold per position on a machine."""
        each, latent = machine.cache_dtype.bytes, self.latent
        if latent is None:
            return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim * each
        row = latent.cache_width * each
        if machine.packed_latents:
            row = packed_bytes(latent.kv_lora_rank, latent.qk_rope_head_dim)
        key = 0
        if index := latent.index:
            scale = DType.F32.bytes if machine.index_dtype is DType.F8E4M3 else 0
            key = sum(index.full) * (index.index_head_dim * machine.index_dtype.bytes + scale)
        return self.num_hidden_layers * row + key


@dataclass(frozen=True, slots=True)
class FamilyRules:
    """What differs between the families: their keys, defaults, biases, norms and experts."""

    model_type: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]  # keys that are read, with the value where config.json is silent
    fixed: Mapping[str, tuple[Any, ...]]  # keys that tilert accepts with these values only
    qkv_bias: bool | None  # None: the key attention_bias decides
    o_bias: bool | None
    qk_norm: bool
    sliding: Literal["never", "every layer", "by layer"]  # layers that sliding_window applies to
    rope_theta: float = 10000.0  # where config.json is silent
    experts: ExpertsRules | None = None
    latent: LatentRules | None = None


_ORIGINAL = "original_max_position_embeddings"
_SHARED_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": None,
    "layer_types": None,
    "rope_theta": None,  # the family's, unless the rope's own object states it
    "rope_scaling": None,
    "rope_parameters": None,
    _ORIGINAL: None,
    "bos_token_id": None,
    "eos_token_id": None,
    "architectures": None,
    "dtype": None,
    "torch_dtype": None,
    "quantization_config": None,
}

# Settings that ask for another computation than tilert's, except at these values.
_SHARED_FIXED: Mapping[str, tuple[Any, ...]] = {
    "compression_config": (None,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),  # pairs are (i, i + head_dim / 2), not neighbours
    "use_mrope": (False, None),
    "per_layer_config": (None, {}),
    "is_llama_config": (True, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}),
}

_TRAINING = "acts in training only"
_OUTPUT = "selects what a call to transformers returns"
_ENGINE = "selects how transformers computes, not what"
_LABEL = "belongs to classifiers; another architecture is refused"
_SAMPLING = "a default of sampling; transformers drops it here and reads generation_config.json"
_TOKENS = "used by tokenizers, padding and encoders, which a batch of decoders does not have"
_ORIGIN = "says where the file came from"

_SAMPLING_KEYS = (
    "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping", "num_beams",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty",
    "num_beam_groups", "diversity_penalty",
)  # fmt: skip

# Keys that cannot change the logits, each with the reason.
IGNORED: Mapping[str, str] = {
    "model_type": "already used to choose the family",
    "transformers_version": _ORIGIN,
    "_name_or_path": _ORIGIN,
    "name_or_path": _ORIGIN,
    "_commit_hash": _ORIGIN,
    "unsloth_fixed": _ORIGIN,
    "unsloth_version": _ORIGIN,
    "auto_map": "names code outside the checkpoint's format; model_type alone decides, as in"
    " transformers without trust_remote_code",
    "transformers.js_config": "for another runtime",
    "max_sequence_length": "an old note on training data; max_position_embeddings is the limit",
    "initializer_range": _TRAINING,
    "attention_dropout": _TRAINING,
    "aux_loss_alpha": _TRAINING,
    "seq_aux": _TRAINING,
    "neftune_noise_alpha": _TRAINING,
    "router_aux_loss_coef": _TRAINING,
    "router_jitter_noise": _TRAINING,
    "gradient_checkpointing": _TRAINING,
    "use_cache": _ENGINE,
    "ep_size": _ENGINE,
    "chunk_size_feed_forward": _ENGINE,
    "torchscript": _ENGINE,
    "use_bfloat16": _ENGINE,
    "tf_legacy_loss": _ENGINE,
    "attn_implementation": _ENGINE,
    "_attn_implementation": _ENGINE,
    "_attn_implementation_internal": _ENGINE,
    "_attn_implementation_autoset": _ENGINE,
    "_experts_implementation": _ENGINE,
    "_experts_implementation_internal": _ENGINE,
    "_flash_attn_2_enabled": _ENGINE,
    "output_attentions": _OUTPUT,
    "output_router_logits": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "return_dict": _OUTPUT,
    "use_return_dict": _OUTPUT,
    "tie_last_hidden_states": _OUTPUT,
    "index_share_for_mtp_iteration": "of guesses, which are verified whatever they are",
    "id2label": _LABEL,
    "label2id": _LABEL,
    "num_labels": _LABEL,
    "problem_type": _LABEL,
    "finetuning_task": _LABEL,
    "classifier_dropout": _LABEL,
    "is_decoder": "the families here are decoders whatever it says",
    "task_specific_params": _SAMPLING,
    "prefix": _TOKENS,
    "tokenizer_class": _TOKENS,
    "pad_token_id": _TOKENS,
    "unk_token_id": _TOKENS,
    "sep_token_id": _TOKENS,
    "decoder_start_token_id": _TOKENS,
    **dict.fromkeys(_SAMPLING_KEYS, _SAMPLING),
}

# The largest sizes that are believed; beyond them a file is damaged, not ambitious.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 27,
}

_THETA = (2.0, 1e15)
_FACTOR = (1.0, 1e6)
_POSITIVE = (1e-6, 1e6)

# Of yarn only. "finetuned" is a note on the weights that no formula reads.
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned")
# rope_type -> (keys that must be there, keys that may be).
_ROPE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "longrope": (("short_factor", "long_factor"), ("factor", _ORIGINAL, "attention_factor")),
    "yarn": (("factor",), (_ORIGINAL, "attention_factor", *_YARN)),
}


@dataclass(frozen=True, slots=True)
class _Outer:
    """What a rope object may leave to the settings around it."""

    theta: float | None
    default_theta: float
    original: int | None
    head_dim: int
    max_positions: int


def parse(
    config: Mapping[str, Any],
    family: FamilyRules,
    generation_config: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    """The checked settings of a config.json.

    Of generation_config.json only eos_token_id is used here. Raises UserError for an unknown key, a
    value of the wrong type or out of range, or a setting that tilert does not compute.
    """
    section = _section(config, family)
    sizes = {
        key: section.integer(key, 1, limit)
        for key, limit in _LIMITS.items()
        if key not in ("head_dim", "num_key_value_heads")
    }
    latent = latents.parse(section, family.latent) if family.latent else None
    kv_heads, head_dim = _head_sizes(section, latent)
    max_positions = sizes["max_position_embeddings"]
    theta, scaling = _rope(section, family, head_dim, max_positions)
    window, layer_types = _layers(section, family, sizes["num_hidden_layers"])
    bos, eos = _token_ids(section, generation_config or {})
    section.one_of("hidden_act", ("silu", "swish"))  # two names of one function
    bias = "attention_bias" in family.defaults and section.boolean("attention_bias")
    return DecoderConfig(
        model_type=family.model_type,
        **sizes,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act="silu",
        rms_norm_eps=section.number("rms_norm_eps", 1e-20, 1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=section.boolean("tie_word_embeddings"),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=bias if family.o_bias is None else family.o_bias,
        mlp_bias="mlp_bias" in family.defaults and section.boolean("mlp_bias"),
        qk_norm=family.qk_norm,
        sliding_window=window,
        layer_types=layer_types,
        bos_token_id=bos,
        eos_token_ids=eos,
        dtype=_dtype(section),
        quantization=_quantization(section),
        experts=parse_experts(section, family.experts, sizes["num_hidden_layers"])
        if family.experts
        else None,
        latent=latent,
    )


def _section(config: Mapping[str, Any], family: FamilyRules) -> Section:
    """The config with its defaults, after the keys and the fixed values have been checked."""
    name = f"config.json of model_type '{family.model_type}'"
    latent = latents.defaults(family.latent) if family.latent else {}
    defaults = {**_SHARED_DEFAULTS, **latent, **family.defaults}
    fixed = {**_SHARED_FIXED, **family.fixed}
    stated = Section(name, config)
    for key in config:
        if key in defaults or key in IGNORED:
            continue
        if key not in fixed:
            raise UserError(
                f"{name} has the key {show(key)} that tilert does not know; known are"
                f" {', '.join(sorted({*defaults, *fixed}))}"
            )
        stated.one_of(key, fixed[key])
    section = Section(name, {**defaults, **config})
    architectures = section.values["architectures"]
    if architectures is not None and not (
        isinstance(architectures, list)
        and architectures
        and all(entry in family.architectures for entry in architectures)
    ):
        accepted = ", ".join(f"['{entry}']" for entry in family.architectures)
        raise section.error("architectures", f"accepted: {accepted}")
    return section


def _head_sizes(section: Section, latent: LatentConfig | None) -> tuple[int, int]:
    """(num_key_value_heads, head_dim)."""
    if latent is not None:
        return section.values["num_attention_heads"], latent.qk_rope_head_dim
    heads, hidden = section.values["num_attention_heads"], section.values["hidden_size"]
    kv_heads = heads
    if section.values["num_key_value_heads"] is not None:
        kv_heads = section.integer("num_key_value_heads", 1, _LIMITS["num_key_value_heads"])
    if heads % kv_heads:
        raise section.error("num_key_value_heads", f"accepted are divisors of the {heads} heads")
    if section.values["head_dim"] is None:
        if hidden % heads:
            raise section.error("hidden_size", f"accepted are multiples of the {heads} heads")
        head_dim = hidden // heads
    else:
        head_dim = section.integer("head_dim", 1, _LIMITS["head_dim"])
    if head_dim % 2:
        raise UserError(f"{section.name} has heads of {head_dim} elements; accepted are even sizes")
    return kv_heads, head_dim


def _layers(
    section: Section, family: FamilyRules, layers: int
) -> tuple[int | None, tuple[LayerType, ...]]:
    """(sliding_window, layer_types)."""
    window = None
    if family.sliding != "never" and section.values["sliding_window"] is not None:
        window = section.integer("sliding_window", 1, 1 << 31)
    first = 0 if window is not None else layers  # the first sliding layer, if nothing else is said
    if family.sliding == "by layer":
        used = section.boolean("use_sliding_window")
        window = window if used else None
        start = section.integer("max_window_layers", 0, 1 << 31)
        first = start if window is not None else layers
    derived: tuple[LayerType, ...] = tuple(
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    )
    stated = section.values["layer_types"]
    if stated is None:
        return window, derived
    if family.latent and stated in [[n] * layers for n in latents.layer_types(family.latent)]:
        return window, derived
    if not isinstance(stated, list) or any(entry not in _LAYER_TYPES for entry in stated):
        raise section.error("layer_types", f"accepted are lists of {', '.join(_LAYER_TYPES)}")
    if len(stated) != layers:
        raise UserError(
            f"{section.name} has {len(stated)} layer_types; accepted is one for each of the"
            f" {layers} num_hidden_layers"
        )
    if family.sliding != "by layer" and tuple(stated) != derived:
        raise section.error("layer_types", f"accepted is {derived[0]} in every layer")
    if window is None and "sliding_attention" in stated:
        raise section.error(
            "layer_types", "sliding_attention needs use_sliding_window true and a sliding_window"
        )
    return window, tuple(stated)


def _token_ids(
    section: Section, generation_config: Mapping[str, Any]
) -> tuple[int | None, tuple[int, ...]]:
    """(bos_token_id, eos_token_ids): the latter of both files, without repetition."""
    last = section.values["vocab_size"] - 1
    bos = None
    if section.values["bos_token_id"] is not None:
        bos = section.integer("bos_token_id", 0, last)
    eos: dict[int, None] = {}
    generation = Section("generation_config.json", generation_config)
    for source in (section, generation):
        stated = source.values.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if any(type(entry) is not int or not 0 <= entry <= last for entry in ids):
            raise source.error("eos_token_id", f"accepted are ids from 0 to {last}, one or a list")
        eos.update(dict.fromkeys(ids))
    return bos, tuple(eos)


def _dtype(section: Section) -> str | None:
    key = "torch_dtype" if section.values["dtype"] is None else "dtype"
    value = section.values[key]
    if value is not None and not isinstance(value, str):
        raise section.error(key, "accepted are names such as 'bfloat16', or null")
    return value.removeprefix("torch.") if value else None


def _quantization(section: Section) -> Quantization | None:
    try:
        return parse_quantization(section.values["quantization_config"])
    except UserError as error:
        raise UserError(f"{section.name}: {error}") from error


def _rope(
    section: Section, family: FamilyRules, head_dim: int, max_positions: int
) -> tuple[float, RopeScaling]:
    """(rope_theta, rope_scaling), from rope_parameters or from the older pair of keys."""
    original = None
    if section.values[_ORIGINAL] is not None:
        original = section.integer(_ORIGINAL, 1, _LIMITS["max_position_embeddings"])
    theta = section.maybe_number("rope_theta", *_THETA)
    outer = _Outer(theta, family.rope_theta, original, head_dim, max_positions)
    read: list[tuple[float, RopeScaling]] = []
    for key in ("rope_parameters", "rope_scaling"):
        value = section.values[key]
        if value is not None and not isinstance(value, Mapping):
            raise section.error(key, "accepted are an object and null")
        if not value:
            continue
        parts = {key: value}
        if any(entry in _LAYER_TYPES for entry in value):  # one object per layer type
            parts = {f"{key}.{entry}": part for entry, part in value.items()}
        for name, part in parts.items():
            if name != key and (name.split(".")[-1] not in _LAYER_TYPES or not _is_object(part)):
                raise section.error(key, f"accepted: one object, or one for each of {_LAYER_TYPES}")
            read.append(_rope_object(Section(f"{name} of {section.name}", part), outer))
    if not read:
        return theta or family.rope_theta, RopeScaling()
    if any(other != read[0] for other in read):
        raise UserError(
            f"{section.name} states several ropes that differ, in rope_parameters or rope_scaling;"
            " accepted is one rope for all layers"
        )
    return read[0]


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _rope_object(rope: Section, outer: _Outer) -> tuple[float, RopeScaling]:
    values = rope.values
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        key = "rope_type" if "rope_type" in values else "type"
        raise rope.error(key, f"accepted are {', '.join(_ROPE_KEYS)}")
    rope.agree("rope_type", kind, "type", values.get("type"))
    required, optional = _ROPE_KEYS[kind]
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *required, *optional)
    for key in values:
        if key not in known:
            raise UserError(
                f"{rope.name} has the key {show(key)} that tilert does not know for rope_type"
                f" '{kind}'; known are {', '.join(known)}"
            )
    for key in required:
        if key not in values:
            raise UserError(f"{rope.name} lacks {key}, which rope_type '{kind}' needs")
    rope.one_of("partial_rotary_factor", (1, None))
    theta = rope.maybe_number("rope_theta", *_THETA)
    rope.agree("rope_theta", theta, "rope_theta of config.json", outer.theta)
    return theta or outer.theta or outer.default_theta, _scaling(rope, kind, outer)


def _scaling(rope: Section, kind: str, outer: _Outer) -> RopeScaling:
    """The fields that the rope_type `kind` reads, from an object whose keys have been checked."""
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind, rope.number("factor", *_FACTOR))
    if kind == "dynamic":
        if outer.head_dim < 4:  # its exponent is head_dim / (head_dim - 2)
            raise rope.error("rope_type", f"head_dim is {outer.head_dim}; accepted is 4 or more")
        return RopeScaling(kind, rope.number("factor", *_FACTOR))
    original = None
    if rope.values.get(_ORIGINAL) is not None:
        original = rope.integer(_ORIGINAL, 1, _LIMITS["max_position_embeddings"])
    rope.agree(_ORIGINAL, original, f"{_ORIGINAL} of config.json", outer.original)
    original = original or outer.original or outer.max_positions
    if kind == "llama3":
        low = rope.number("low_freq_factor", *_POSITIVE)
        high = rope.number("high_freq_factor", *_POSITIVE)
        if low >= high:
            raise rope.error("high_freq_factor", f"accepted is more than low_freq_factor {low:g}")
        factor = rope.number("factor", *_FACTOR)
        return RopeScaling(kind, factor, original, low_freq_factor=low, high_freq_factor=high)
    factor = rope.maybe_number("factor", *_FACTOR)
    if factor is None:
        factor = outer.max_positions / original
    attention = rope.maybe_number("attention_factor", *_POSITIVE)
    if kind == "longrope":
        short, long = (_factors(rope, key, outer) for key in ("short_factor", "long_factor"))
        if original < 2 and attention is None:  # the default divides by its logarithm
            raise rope.error(_ORIGINAL, "accepted is 2 or more")
        return RopeScaling(kind, factor, original, attention, short_factor=short, long_factor=long)
    fast = rope.maybe_number("beta_fast", *_POSITIVE) or 32.0
    slow = rope.maybe_number("beta_slow", *_POSITIVE) or 1.0
    if fast < slow:
        raise rope.error("beta_fast", f"accepted is at least beta_slow, {slow:g}")
    return RopeScaling(
        kind, factor, original, attention, beta_fast=fast, beta_slow=slow,
        mscale=rope.maybe_number("mscale", 0.0, 1e6),
        mscale_all_dim=rope.maybe_number("mscale_all_dim", 0.0, 1e6),
        truncate="truncate" not in rope.values or rope.boolean("truncate"),
    )  # fmt: skip


def _factors(rope: Section, key: str, outer: _Outer) -> tuple[float, ...]:
    """A list of head_dim / 2 divisors of frequencies."""
    values, wanted = rope.values[key], outer.head_dim // 2
    if not isinstance(values, list) or len(values) != wanted:
        raise rope.error(key, f"accepted are lists of head_dim / 2 = {wanted} numbers")
    entries = Section(f"{key} of {rope.name}", {f"entry {i}": v for i, v in enumerate(values)})
    return tuple(entries.number(name, *_POSITIVE) for name in entries.values)
