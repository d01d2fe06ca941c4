"""GGUF files, converted once to a Hugging Face-shaped folder in the cache.

The file is untrusted: its header is walked by hand, and no length, count or offset is believed
before it was compared with the file's size. The gguf package supplies the block formats: tensors are
dequantised exactly to f32, or rounded to bf16, a few rows at a time. Knows the names that llama.cpp
and Hugging Face give the same thing, and that the llama architecture orders the rows of q and k by
neighbouring pairs; does not know what a model computes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import gguf
import gguf.quants
import ml_dtypes
import numpy as np

from tilert.errors import UserError
from tilert.files import cache_folder, check_space, write_error
from tilert.weights import hub
from tilert.weights.safetensors import Source, map_file, quoted, write_safetensors

WriteTokenizer = Callable[[Mapping[str, object], Path], None]  # metadata of the file, folder

VERSION = 2  # of the conversion: a new one makes cached folders stale
CHUNK = 1 << 21  # values that are dequantised at a time; some formats take 30 bytes for each
SMALL_FILES = 64 << 20  # bytes, more than config and tokenizer take
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Metadata that changes nothing here, and metadata that must have this value.
_IGNORED = (
    "vocab_size",  # the embedding decides
    "tensor_data_layout",
    "attention.layer_norm_epsilon",  # of another kind of norm
    "rope.scaling.finetuned",
)
_FIXED: Mapping[str, Any] = {
    "attention.causal": True,
    "use_parallel_residual": False,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
}
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as stored."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as in numpy
    data: np.ndarray  # [rows, bytes of a row] uint8, a view of the mapped file; a vector is one row


class _Entry(NamedTuple):
    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the begin of the first tensor
    size: int  # bytes


def convert_gguf(
    path: Path, dtype: str, write_tokenizer: WriteTokenizer, progress: hub.Progress | None
) -> Path:
    """The folder made of a GGUF file, from the cache when it was made before.

    dtype: 'bfloat16' or 'float32' for matrices; vectors (norms, biases) stay f32. Of a file in parts
    (-00001-of-00003.gguf) any one names all. Raises UserError for a damaged file, for an
    architecture or setting that is not supported, and for a full disk; nothing half-written stays.
    """
    assert dtype in ("bfloat16", "float32"), f"dtype {dtype}"
    files = _files(path)
    target = cache_folder() / "gguf" / f"{files[0].stem[:100]}-{_key(files, dtype)}"
    if target.is_dir():
        return target
    metadata, tensors = _read_parts(files)
    config = _config(path, metadata, tensors) | {"torch_dtype": dtype}
    _check_kinds(path, tensors)
    size = sum(math.prod(t.shape) for t in tensors) * (2 if dtype == "bfloat16" else 4)
    hub.make_folder(target.parent)
    check_space(target.parent, size + SMALL_FILES)
    built = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        built.mkdir()
        _write_json(built / "config.json", config)
        _write_json(built / "generation_config.json", _generation_config(path, metadata))
        write_tokenizer(metadata, built)
        metadata.clear()  # of many small strings
        write_safetensors(built / "model.safetensors", _sources(path, tensors, config, progress))
        hub.replace_folder(built, target)
    except OSError as error:
        raise write_error(target, size, error) from error
    finally:
        shutil.rmtree(built, ignore_errors=True)
    return target


def _files(path: Path) -> list[Path]:
    """The file, or all files of the model that it is a part of."""
    if match := _PART.fullmatch(path.name):
        count = int(match[2])
        return [
            path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)
        ] or [path]
    return [path]


def _key(files: list[Path], dtype: str) -> str:
    """A name for the result that changes with the files, the dtype and the converter."""
    stated: list[Any] = [VERSION, dtype]
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(f"cannot open {file}: {error.strerror}") from error
        stated.append((os.path.abspath(file), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(stated).encode()).hexdigest()[:16]


def _read_parts(files: list[Path]) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Metadata of the first part and the tensors of all."""
    metadata, tensors = read_gguf(files[0])
    if (count := metadata.get("split.count", 1)) not in (0, 1, len(files)):
        raise UserError(
            f"{files[0]} is one of {count} parts; accepted are files with names like"
            " NAME-00001-of-00003.gguf, all in one folder"
        )
    for file in files[1:]:
        tensors += read_gguf(file)[1]
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise UserError(f"{files[0]} has the tensor {quoted(tensor.name)} twice")
        names.add(tensor.name)
    return metadata, tensors


def read_gguf(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """(metadata as plain Python values, tensors in the order of their bytes).

    Raises UserError at the first length, type or offset that cannot be right.
    """
    return _Reader(path).read()


class _Reader:
    """A cursor over a mapped file that never goes past its end."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        self.data = map_file(path, 24, "GGUF")

    def read(self) -> tuple[dict[str, Any], list[GgufTensor]]:
        """Walks header, metadata and tensor table."""
        magic, version, tensors, pairs = self.take("4sIQQ")
        if magic != b"GGUF":
            raise UserError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'")
        if version not in (2, 3):
            swapped = " in big-endian order" if version and version % 65536 == 0 else ""
            raise UserError(f"{self.path} is GGUF version {version}{swapped}; accepted are 2 and 3")
        self.room(tensors, 24)  # bytes of the smallest tensor and the smallest pair
        self.room(pairs, 13)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            if key in metadata:
                self.fail(f"the key {quoted(key)} occurs twice")
            (kind,) = self.take("I")
            metadata[key] = self.array() if kind == _ARRAY else self.value(kind)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"its alignment is {quoted(alignment)}")
        entries = sorted((self.entry() for _ in range(tensors)), key=lambda entry: entry[3:])
        return metadata, self.views(entries, alignment)

    def fail(self, what: str) -> NoReturn:
        """Refuse the file."""
        raise UserError(f"{self.path} is a damaged GGUF file: {what} (near byte {self.at})")

    def room(self, count: int, size: int) -> None:
        """At least count * size bytes must follow."""
        if count * size > len(self.data) - self.at:
            self.fail(
                f"it needs {self.at + count * size} bytes or more, but {len(self.data)} are there"
            )

    def take(self, form: str) -> tuple[Any, ...]:
        """Little-endian values at the current place."""
        size = struct.calcsize(f"<{form}")
        self.room(1, size)
        self.at += size
        return struct.unpack_from(f"<{form}", self.data, self.at - size)

    def string(self) -> str:
        """A length and so many bytes of UTF-8."""
        (length,) = self.take("Q")
        self.room(length, 1)
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode("utf-8")
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8")

    def value(self, kind: int) -> Any:
        """A string, number or bool."""
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            self.fail(f"a value has the type {kind}")
        return self.take(_SCALARS[kind])[0]

    def array(self) -> list[Any]:
        """A list of values of one type."""
        kind, count = self.take("IQ")
        if kind == _STRING:
            self.room(count, 8)
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            self.fail(f"an array holds values of the type {kind}")
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        self.room(count, dtype.itemsize)
        self.at += count * dtype.itemsize
        begin = self.at - count * dtype.itemsize
        return np.frombuffer(self.data, dtype, count, begin).tolist()

    def entry(self) -> _Entry:
        """The next entry of the tensor table."""
        name = self.string()
        (dims,) = self.take("I")
        if not 1 <= dims <= 4:
            self.fail(f"the tensor {quoted(name)} has {dims} dimensions")
        shape = self.take(f"{dims}Q")[::-1]
        number, offset = self.take("IQ")
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            self.fail(f"the tensor {quoted(name)} has the type {number}, which is not known")
        count = math.prod(shape)
        if count == 0 or shape[-1] % block:
            self.fail(f"the tensor {quoted(name)} has the shape {list(shape)} in {kind.name}")
        return _Entry(name, kind, shape, offset, count // block * block_bytes)

    def views(self, entries: list[_Entry], alignment: int) -> list[GgufTensor]:
        """The tensors of the entries, which are sorted by offset."""
        start = -(-self.at // alignment) * alignment
        end = 0
        tensors: list[GgufTensor] = []
        for name, kind, shape, offset, size in entries:
            if offset < end or offset % alignment:
                where = "overlaps another" if offset < end else f"begins at {offset}"
                self.fail(f"the tensor {quoted(name)} {where}")
            end = offset + size
            if start + end > len(self.data):
                raise UserError(
                    f"{self.path} is cut off: tensor {quoted(name)} needs {start + end} bytes, but"
                    f" {len(self.data)} are there"
                )
            data = np.frombuffer(self.data, np.uint8, size, start + offset)
            rows = math.prod(shape[:-1])
            tensors.append(GgufTensor(name, kind, shape, data.reshape(rows, size // rows)))
        return tensors


class _Settings:
    """The metadata of the architecture, by name without its prefix; what was read is noted."""

    def __init__(self, path: Path, arch: str, metadata: Mapping[str, Any]) -> None:
        self.path, self.arch = path, arch
        prefix = f"{arch}."
        self.left = {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}

    def refuse(self, name: str, value: Any, accepted: str) -> UserError:
        return UserError(f"{self.path} has {self.arch}.{name} {quoted(value)}; accepted {accepted}")

    def take(self, name: str, default: Any) -> Any:
        """A value or its default; a list of the same value for every layer is that value."""
        value = self.left.pop(name, default)
        if isinstance(value, list):
            if not value or any(entry != value[0] for entry in value):
                raise self.refuse(name, value, "is one value for all layers")
            value = value[0]
        if value is None:
            raise UserError(f"{self.path} lacks the metadata {self.arch}.{name}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.take(name, default)
        if type(value) is not int or value < 1:
            raise self.refuse(name, value, "are whole numbers from 1 on")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number. The shortest decimal of an f32: 1e-05, not 9.99999974e-06."""
        value = self.take(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refuse(name, value, "are positive numbers")
        return float(str(np.float32(value)))

    def finish(self) -> None:
        """Refuses what nobody has read, since it may change what the model computes."""
        for name, value in self.left.items():
            if name in _FIXED:
                if value != _FIXED[name]:
                    raise self.refuse(name, value, f"is {_FIXED[name]}")
            elif name not in _IGNORED:
                raise UserError(
                    f"{self.path} has the metadata {self.arch}.{name}, which is not known"
                )


def _config(path: Path, metadata: Mapping[str, Any], tensors: list[GgufTensor]) -> dict[str, Any]:
    """config.json under the names of Hugging Face; UserError for what has no name there."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UserError(
            f"{path} has the architecture {quoted(arch)}; accepted are {', '.join(ARCHITECTURES)}"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{path} holds a {quoted(kind)}; accepted is a 'model'")
    by_name = {tensor.name: tensor for tensor in tensors}
    embedding = by_name.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path} lacks the matrix token_embd.weight")
    get = _Settings(path, arch, metadata)
    heads, hidden_size = get.integer("attention.head_count"), get.integer("embedding_length")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": get.integer("feed_forward_length"),
        "num_hidden_layers": get.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get.integer("attention.head_count_kv", heads),
        "hidden_act": "silu",
        "rms_norm_eps": get.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": get.number("rope.freq_base", 10000.0),
        "max_position_embeddings": get.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in by_name,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    head_dim = get.integer("attention.key_length", max(1, hidden_size // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if (value := get.integer(name, head_dim)) != head_dim:
            raise get.refuse(name, value, f"is the size of a head, {head_dim}")
    if head_dim * heads != hidden_size or f"{arch}.attention.key_length" in metadata:
        config["head_dim"] = head_dim
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    if arch == "llama":
        config |= {key: True for key, name in biases.items() if name in by_name}
    freqs = by_name.get("rope_freqs.weight")
    config |= _sliding_window(get, config) | _rope(get, config, head_dim, freqs)
    get.finish()
    return config


def _sliding_window(get: _Settings, config: Mapping[str, Any]) -> dict[str, Any]:
    """A window over all layers is Mistral's; for the others GGUF does not say which layers it has."""
    window = get.take("attention.sliding_window", 0)
    if window == 0 or (type(window) is int and window >= config["max_position_embeddings"]):
        return {}
    biased = "attention_bias" in config or "mlp_bias" in config
    if get.arch != "llama" or type(window) is not int or window < 1 or biased:
        raise get.refuse("attention.sliding_window", window, "is a model without a window")
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": window,
    }


def _rope(
    get: _Settings, config: Mapping[str, Any], head_dim: int, freqs: GgufTensor | None
) -> dict[str, Any]:
    """rope_scaling, where the metadata or the tensor rope_freqs.weight stretch the frequencies."""
    kind = get.take("rope.scaling.type", "linear")
    factor = get.number("rope.scaling.factor", get.number("rope.scale_linear", 1.0))
    context = config["max_position_embeddings"]
    stated = "rope.scaling.original_context_length" in get.left
    original = get.integer("rope.scaling.original_context_length", context)
    if kind not in ("none", "linear", "yarn"):
        raise get.refuse("rope.scaling.type", kind, "are none, linear and yarn")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        if freqs is None:
            return {}
        return _llama3(get.path, freqs, config["rope_theta"], head_dim, original)
    if freqs is not None:
        raise UserError(f"{get.path} has both rope_freqs.weight and rope scaling {quoted(kind)}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        if not stated:
            raise UserError(f"{get.path} lacks {get.arch}.rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in get.left:
                scaling[name] = get.number(f"rope.scaling.yarn_{name}")
    return {"rope_scaling": scaling}


def _llama3(
    path: Path, freqs: GgufTensor, theta: float, head_dim: int, original: int
) -> dict[str, Any]:
    """rope_scaling of type llama3 from the divisors of the head_dim / 2 frequencies.

    llama.cpp stores what the settings give, not the settings; low and high are 1 and 4 in every
    Llama, so a stretch and a context length are looked for that give the same divisors. The formula
    is that of transformers' modeling_rope_utils.
    """
    divisors = _dequantize(freqs.data, freqs.kind).reshape(-1)
    if divisors.size != head_dim // 2:
        raise UserError(f"{path} has {divisors.size} rope_freqs for heads of {head_dim} elements")
    factor = float(divisors.max())
    if np.all(divisors == 1):
        return {}
    wavelengths = 2 * np.pi * theta ** (2 * np.arange(divisors.size) / head_dim)  # positions
    for length in (original, *(1 << n for n in range(10, 21))):
        smooth = np.clip((length / wavelengths - 1) / 3, 0, 1)
        if factor > 1 and np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), 1e-4):
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                       "high_freq_factor": 4.0, "original_max_position_embeddings": length}  # fmt: skip
            return {"rope_scaling": scaling}
    raise UserError(
        f"{path} has a rope_freqs.weight that is not the scaling of Llama 3; no other is accepted"
    )


def _generation_config(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: every token that ends an answer (sequence, turn, message)."""
    config: dict[str, Any] = {}
    ends: dict[int, None] = {}
    for name in ("bos", "padding", "eos", "eot", "eom"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is None:
            continue
        if type(token) is not int:
            raise UserError(
                f"{path} has tokenizer.ggml.{name}_token_id {quoted(token)}; accepted are ids"
            )
        if name in ("bos", "padding"):
            config["bos_token_id" if name == "bos" else "pad_token_id"] = token
        else:
            ends[token] = None
    return config | ({"eos_token_id": list(ends)} if ends else {})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _hf_name(path: Path, name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name, re.ASCII)
    if match and (match[2] in _LINEARS or (match[2] in _NORMS and match[3] == "weight")):
        own = (_LINEARS | _NORMS)[match[2]]
        return f"model.layers.{int(match[1])}.{own}.{match[3]}"
    raise UserError(
        f"{path} has the tensor {quoted(name)}, which is not known for its architecture"
    )


def _check_kinds(path: Path, tensors: list[GgufTensor]) -> None:
    """Every block format must be one that the gguf package can read; tried on a block of zeros."""
    for kind, name in {tensor.kind: tensor.name for tensor in tensors}.items():
        try:
            _dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise UserError(
                f"tensor {quoted(name)} in {path} has the type {kind.name}, which cannot be read"
            ) from None


def _sources(
    path: Path, tensors: list[GgufTensor], config: Mapping[str, Any], progress: hub.Progress | None
) -> Iterator[Source]:
    """The tensors under their Hugging Face names, dequantised when they are written."""
    matrix = np.dtype(ml_dtypes.bfloat16 if config["torch_dtype"] == "bfloat16" else np.float32)
    total = sum(tensor.data.size for tensor in tensors)
    done = 0

    def chunks(
        tensor: GgufTensor, order: np.ndarray | None, dtype: np.dtype[Any]
    ) -> Iterator[np.ndarray]:
        nonlocal done
        for values in _rows(tensor, order):
            yield values.astype(dtype, copy=False)
            done += values.size * tensor.data.size // math.prod(tensor.shape)
            if progress:
                progress(f"converting {path.name}", done, total)

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        name = _hf_name(path, tensor.name)
        if name in names:  # blk.01 beside blk.1
            raise UserError(f"{path} has two tensors for {name}")
        names.add(name)
        order = None
        if config["model_type"] in ("llama", "mistral") and tensor.name.split(".")[-2] in heads:
            order = _half_split(path, tensor, heads[tensor.name.split(".")[-2]])
        dtype = matrix if len(tensor.shape) > 1 else np.dtype(np.float32)
        yield Source(name, dtype, tensor.shape, chunks(tensor, order, dtype))


def _half_split(path: Path, tensor: GgufTensor, heads: int) -> np.ndarray:
    """Where each row of q or k is stored.

    llama.cpp rotates the neighbours (2i, 2i + 1) of a head, Hugging Face rotates (i, i + d / 2).
    """
    rows = tensor.shape[0]
    if rows % (2 * heads):
        raise UserError(f"tensor {quoted(tensor.name)} in {path} has {rows} rows for {heads} heads")
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _rows(tensor: GgufTensor, order: np.ndarray | None) -> Iterator[np.ndarray]:
    """f32 values of a tensor, a few rows at a time, in the given order of rows."""
    if len(tensor.shape) == 1:
        values = _dequantize(tensor.data, tensor.kind).reshape(-1)
        yield values if order is None else values[order]
        return
    count = len(tensor.data)
    step = max(1, CHUNK * count // math.prod(tensor.shape))
    for begin in range(0, count, step):
        rows = slice(begin, begin + step) if order is None else order[begin : begin + step]
        yield _dequantize(tensor.data[rows], tensor.kind)


def _dequantize(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """[rows, bytes] to [rows, values] f32."""
    with np.errstate(all="ignore"):  # infinities in a damaged file are the file's
        return gguf.quants.dequantize(data, kind).astype(np.float32, copy=False)
