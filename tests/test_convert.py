"""Conversion of checkpoints: every bit where it belongs, whatever interrupts, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny_deepseek
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fp8 import quantize
from test_models import tokens_for
from transformers import AutoModelForCausalLM

from tilert import LLM, SamplingParams
from tilert.engine.runner import Row, Runner
from tilert.errors import UserError
from tilert.ir import machine
from tilert.models import load_config
from tilert.models.decoder import build
from tilert.models.derived import ROPE_TABLE, tensor_parts
from tilert.models.load import bind, scales
from tilert.models.shards import cut_axes, part_of
from tilert.serve import cli
from tilert.serve.convert import run
from tilert.weights import convert
from tilert.weights.safetensors import locate_folder, read_folder

EVEN = {"vocab_size": 208, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "head_dim": 16}  # fmt: skip
# What devices divide, said once more by name: rows, columns.
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "q_b_proj", "kv_b_proj",
        "shared_head.head")  # fmt: skip
COLUMNS = ("o_proj.weight", "down_proj.weight")


def split(folder: Path, files: int) -> None:
    """The tensors of model.safetensors in several files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i in range(files):
        names, file = sorted(tensors)[i::files], f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 in blocks of 16, in three files."""
    folder = tmp_path_factory.mktemp("fp8")
    quantize(folder, folder / "exact", "blocks", "qwen3", **EVEN)
    shutil.rmtree(folder / "exact")
    split(folder, 3)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder with an index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for file in set(index.values()):
        found |= load_file(folder / file)
    assert found.keys() == index.keys()
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def make(source: Path, out: Path, devices: int = 1, **more: Any) -> list[str]:
    """Convert; what was said."""
    said: list[str] = []
    run(str(source), out, devices, more.get("progress"), said.append)
    return said


def check(source: Path, out: Path, devices: int) -> None:
    """Each device has its part of each tensor, bit by bit, in the type in which it was stored."""
    whole = stored(source)
    for rank in range(devices):
        own = stored(out / f"rank-{rank}-of-{devices}" if devices > 1 else out)
        assert own.keys() == whole.keys()
        for name, tensor in whole.items():
            rows = any(part in name for part in ROWS)
            columns = any(part in name for part in COLUMNS)
            part = tensor.chunk(devices, int(columns))[rank] if rows or columns else tensor
            assert own[name].dtype == tensor.dtype
            assert own[name].shape == part.shape, name
            assert raw(own[name]) == raw(part), name


@pytest.mark.parametrize("devices", [1, 2])
def test_every_device_has_its_part_bit_by_bit(
    checkpoint: Path, tmp_path: Path, devices: int
) -> None:
    assert make(checkpoint, tmp_path / "out", devices) == []
    check(checkpoint, tmp_path / "out", devices)
    assert cli.main(["convert", str(tmp_path / "out"), "--verify"]) == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if "partial" in path.name]


def test_biases_are_cut_as_the_rows_of_their_matrices(tmp_path: Path) -> None:
    families.make("qwen2", tmp_path / "model", torch.bfloat16, **EVEN)
    split(tmp_path / "model", 1)
    make(tmp_path / "model", tmp_path / "out", 2)
    check(tmp_path / "model", tmp_path / "out", 2)


def test_experts_latents_and_the_guessing_layer(tmp_path: Path) -> None:
    tiny_deepseek.make(tmp_path / "model", tiny_deepseek.CONFIG | {"vocab_size": 512})
    (tmp_path / "model" / "tokenizer.json").unlink()  # whose vocabulary is larger
    make(tmp_path / "model", tmp_path / "out", 2)
    check(tmp_path / "model", tmp_path / "out", 2)
    copied = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert copied == {"config.json", "tokenizer_config.json", "manifest.json"}
    message = "4 devices would cut tensor '.*' into parts of 64 .*, within a block of 128"
    with pytest.raises(UserError, match=message):
        make(tmp_path / "model", tmp_path / "four", 4)
    with pytest.raises(UserError, match="the model has 8 heads, which 3 devices do not divide"):
        make(tmp_path / "model", tmp_path / "three", 3)


@pytest.mark.parametrize("name", ["qwen2", "deepseek_v32"])
def test_a_device_computes_its_part_of_the_model(name: str, tmp_path: Path) -> None:
    """The graph of one device takes what the conversion gives it. Where the other adds nothing to any sum,
    its logits are those of the whole model, of its rows of the head."""
    source = tmp_path / "model"
    if name == "deepseek_v32":
        tiny_deepseek.make(source, tiny_deepseek.CONFIG | {"vocab_size": 512}, files=1)
        (source / "tokenizer.json").unlink()  # whose vocabulary is larger
    else:
        families.make(name, source, torch.bfloat16, **EVEN)
        split(source, 1)
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    for tensor in (t for n, t in tensors.items() if n.endswith(COLUMNS)):
        tensor[:, tensor.shape[1] // 2 :] = 0
    save_file(tensors, file, {"format": "pt"})
    make(source, tmp_path / "out", 2)
    tokens, found = tokens_for(20), list[np.ndarray]()
    config = load_config(json.loads((source / "config.json").read_text()))
    for devices, folder in ((1, source), (2, tmp_path / "out" / "rank-0-of-2")):
        graph, (own, _) = part_of(build(config, 64), devices), read_folder(folder)
        runner = Runner(
            graph, bind(graph, config, 64, own), machine.cpu(2), context=64, sequences=1, num_pages=1,
            place=None, scales=scales(graph, config, own),
        )  # fmt: skip
        runner.set_pages(0, [0])
        runner.step([Row(token, at, 0) for at, token in enumerate(tokens)], [len(tokens) - 1])
        found.append(runner.logits()[0].copy())
    whole, part = found
    assert part.size == whole.size // 2 > 0
    assert np.abs(part - whole[: part.size]).max() < 1e-4 * np.abs(whole).max()


def test_numbers_of_devices_that_do_not_divide_a_graph() -> None:
    graph = build(load_config(tiny_deepseek.PUBLISHED | {"num_hidden_layers": 4}), 1)
    with pytest.raises(UserError, match="the model has 128 heads, which 3 devices do not divide"):
        part_of(graph, 3)
    with pytest.raises(UserError, match="number of devices is 0; accepted are 1 to 64"):
        part_of(graph, 0)
    graph = build(load_config(tiny_deepseek.DENSE | {"vocab_size": 129281}), 1)
    with pytest.raises(
        UserError, match=r"'lm_head\.weight' has 129281 rows, which 2 devices do not"
    ):
        part_of(graph, 2)


def test_eight_devices_share_the_published_model() -> None:
    """All 61 layers by shape alone: every cut falls between blocks of scales, and nothing large is whole."""
    config = load_config(tiny_deepseek.PUBLISHED)
    graph, parts = build(config, 1), tensor_parts(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in graph.weights.items():
        assert isinstance(value.rows, int)
        if name in parts:
            shapes[parts[name].source] = parts[name].stored
        elif name != ROPE_TABLE:
            shapes[name] = (value.cols,) if value.rows == 1 else (value.rows, value.cols)
    types = {name: "bfloat16" for name in shapes}
    for name, shape in list(shapes.items()):
        if len(shape) == 2 and not name.endswith(tiny_deepseek.WIDE):
            types |= {name: "float8_e4m3fn", f"{name}_scale_inv": "float32"}
            shapes[f"{name}_scale_inv"] = (-(-shape[0] // 128), -(-shape[1] // 128))
    tensors = {n: np.broadcast_to(np.zeros((), types[n]), shape) for n, shape in shapes.items()}
    axes = cut_axes(graph, config, tensors, 8)
    size = {
        n: t.size * t.dtype.itemsize // (1 if axes[n] is None else 8) for n, t in tensors.items()
    }
    whole = sum(size[n] for n in tensors if axes[n] is None)
    assert 670e9 < sum(t.size * t.dtype.itemsize for t in tensors.values()) < 680e9
    assert 86e9 < sum(size.values()) < 90e9
    assert whole < 5e9, "latents, routers, the indexer and the embedding"


def test_files_say_what_they_are(checkpoint: Path, tmp_path: Path) -> None:
    make(checkpoint, tmp_path, 2)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for rank in range(2):
        (file,) = (tmp_path / f"rank-{rank}-of-2").glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        assert said == {"format": "pt", "tilert.format": "1", "tilert.tensor_parallel": "2",
                        "tilert.rank": f"{rank}", "tilert.source": manifest["fingerprint"]}  # fmt: skip
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == manifest["files"].keys() | {"manifest.json"}


def test_one_device_is_a_plain_folder(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model")
    make(tmp_path / "model", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for (name, a), b in zip(model.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(a, b), name
    ids, params = tokens_for(9), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    made = [
        LLM(folder, skip_tokenizer_init=True).generate({"prompt_token_ids": ids}, params)[0]
        for folder in (tmp_path / "model", tmp_path / "out")
    ]
    assert made[0].outputs[0].token_ids == made[1].outputs[0].token_ids


def test_the_parts_of_several_devices_are_not_a_model(checkpoint: Path, tmp_path: Path) -> None:
    make(checkpoint, tmp_path, 2)
    for folder, what in (
        (tmp_path, "is"),
        (tmp_path / "rank-1-of-2", "is what one device gets of"),
    ):
        message = (
            f"^{folder} {what} a model converted for 2 devices, each of which holds a part of the"
        )
        with pytest.raises(UserError, match=message):
            LLM(folder, skip_tokenizer_init=True)


def interrupted(source: Path, out: Path, devices: int, at: float) -> None:
    """A conversion that ends when the share `at` of its bytes is written."""

    def progress(label: str, done: int, total: int) -> None:
        if label == "converting" and done >= at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(source, out, devices, progress=progress)


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(convert, "PIECE_BYTES", 1_000)  # rows of one part are read in pieces, too


@pytest.mark.usefixtures("many_files")
def test_an_interrupted_conversion_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(checkpoint, out, 2, 0.6)
    assert not (out / "config.json").exists()
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    with pytest.raises(UserError, match="was interrupted and must be run again"):
        LLM(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(before) >= 4
    spoiled = sorted(before)[0]
    content = bytearray(spoiled.read_bytes())
    content[-1] ^= 1
    spoiled.write_bytes(content)
    (out / "rank-0-of-2" / ".model-00009.safetensors.abcd.partial").write_bytes(b"killed")
    with (out / convert.JOURNAL).open("ab") as journal:
        journal.write(b'["rank-0-of-2/model-0')  # it was killed here

    interrupted(checkpoint, out, 2, 0)
    said = make(checkpoint, out, 2)
    kept = len(before) - 2  # the spoiled file is made again, with that of the other device
    assert said == [f"going on with the conversion in {out}: {kept} files are complete"]
    unchanged = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert len(unchanged) == kept
    check(checkpoint, out, 2)
    assert {path.name for path in out.iterdir() if path.is_file()} >= {"manifest.json"}
    assert not list(out.rglob(".*"))


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("change", ["devices", "content"])
def test_another_conversion_starts_over(checkpoint: Path, tmp_path: Path, change: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(checkpoint, source)
    interrupted(source, out, 2, 0.6)
    if change == "content":
        file = source / "model-00002-of-00003.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    devices = 1 if change == "devices" else 2
    assert [s.split("; ")[-1] for s in make(source, out, devices)] == ["starting over"]
    check(source, out, devices)
    assert bool(list(out.glob("rank*"))) == (devices == 2)


def test_folders_that_are_not_free_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    families.make("llama", other)
    make(checkpoint, out, 2)
    assert make(checkpoint, out, 2) == [f"{out} is complete already; checking it"]
    with pytest.raises(UserError, match="holds the conversion of this checkpoint for 2 devices"):
        make(checkpoint, out)
    with pytest.raises(UserError, match="holds the conversion of another checkpoint"):
        make(other, out)
    with pytest.raises(UserError, match="is not empty and holds no conversion"):
        make(checkpoint, other)
    with pytest.raises(UserError, match="is the checkpoint itself"):
        make(other, other)
    begun = tmp_path / "begun"
    interrupted(checkpoint, begun, 1, 0)
    with pytest.raises(UserError, match="holds the unfinished conversion of another model"):
        make(other, begun)


def test_only_one_conversion_at_a_time_writes_to_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    def progress(label: str, done: int, total: int) -> None:
        with pytest.raises(UserError, match="another conversion is writing"):
            make(checkpoint, tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(checkpoint, tmp_path, progress=progress)


@pytest.mark.usefixtures("many_files")
def test_a_disk_that_fills_up(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, room = tmp_path / "out", 90_000
    write = convert._Sink.write

    def limited(self: Any, data: Any) -> None:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    with monkeypatch.context() as full:
        full.setattr(convert._Sink, "write", limited)
        with pytest.raises(UserError, match="the disk is full"):
            make(checkpoint, out, 2)
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    make(checkpoint, out, 2)  # what is complete is sound
    check(checkpoint, out, 2)


def test_too_little_space_is_known_before(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 10**5, 10**5))
    with pytest.raises(UserError, match="has 100000 bytes free, but 67"):
        make(checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_memory_holds_a_piece_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "PIECE_BYTES", 1 << 16)
    families.make("llama", tmp_path / "model", torch.float32, **(EVEN | {"vocab_size": 1 << 15}))
    file = tmp_path / "model" / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])  # one byte more: no tensor is aligned any longer
    file.write_bytes(
        struct.pack("<Q", length + 1) + content[8 : 8 + length] + b" " + content[8 + length :]
    )
    tracemalloc.start()
    try:
        make(tmp_path / "model", tmp_path / "out", 2)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def drop_tensor(folder: Path) -> None:
    file = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file)


def double_tensor(folder: Path) -> None:
    first, second = (folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file(load_file(second) | {name: tensors[name]}, second)


def double_name(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    entry = text[text.index("{", 1) + 1 : text.index(",")]
    index.write_text(text.replace(entry, f"{entry}, {entry}", 1))


def drop_file(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()


def cut_file(folder: Path) -> None:
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def shrink_scales(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        name = "model.layers.1.mlp.up_proj.weight_scale_inv"
        if name in tensors:
            tensors[name] = tensors[name][:2].contiguous()
        save_file(tensors, file)


def wrong_tokenizer(folder: Path) -> None:
    tokens = {f"t{i}": i for i in range(300)}
    model = {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_tensor, "lacks the tensor 'lm_head.weight' of the index"),
        (double_tensor, "tensor 'lm_head.weight' is in two shards"),
        (double_name, "occurs twice"),
        (drop_file, "lacks the shard 'model-00003-of-00003.safetensors'"),
        (cut_file, "is cut off"),
        (
            shrink_scales,
            r"scales of tensor '.*up_proj.weight' have shape \[2, 4\], which does not fit",
        ),
        (wrong_tokenizer, "has 300 ids, but the model only 208"),
    ],
)
def test_damaged_checkpoints_are_refused(
    checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        make(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "the number of devices is 0; accepted are 1 to 64"),
        (3, "the model has 2 key-value heads, which 3 devices do not divide; accepted are 1, 2"),
        (65, "the number of devices is 65"),
    ],
)
def test_numbers_of_devices_that_do_not_fit(
    checkpoint: Path, tmp_path: Path, devices: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(checkpoint, tmp_path / "out", devices)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("blocks", {"vocab_size": 199}, "'lm_head.weight' has 199 rows, which 2 devices do not"),
        ("blocks", {"intermediate_size": 80}, "parts of 40 rows, within a block of 16 rows"),
        ("blocks", {"intermediate_size": 81}, "has 81 rows"),
        ("channel", {}, None),
        ("tensor", {}, None),
    ],
)
def test_cuts_between_blocks_of_scales(
    tmp_path: Path, kind: str, changes: dict[str, int], message: str | None
) -> None:
    (tmp_path / "model").mkdir()
    quantize(tmp_path / "model", tmp_path / "exact", kind, "qwen3", **(EVEN | changes))
    if message:
        with pytest.raises(UserError, match=message):
            make(tmp_path / "model", tmp_path / "out", 2)
        return
    make(tmp_path / "model", tmp_path / "out", 2)
    own = stored(tmp_path / "out" / "rank-1-of-2")
    whole = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    expected = whole[name].chunk(2)[1] if kind == "channel" else whole[name]
    assert torch.equal(own[name], expected)
    name = "model.layers.0.mlp.down_proj.weight_scale"  # columns are cut; a row keeps its scale
    assert torch.equal(own[name], whole[name])


def test_a_manifest_finds_what_changed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(checkpoint, tmp_path, 2)
    (file,) = (tmp_path / "rank-1-of-2").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cli.main(["convert", str(tmp_path), "--verify"]) == 2
    assert f"{file} is absent or not as it was written" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for change, message in (
        ({"format": 2}, "has format 2; accepted is 1"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "accepted are files of the folder"),
        ({"files": 7}, "is damaged"),
        ({"colour": 7}, "is damaged"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
        assert cli.main(["convert", str(tmp_path), "--verify"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    (tmp_path / "manifest.json").unlink()
    assert cli.main(["convert", str(tmp_path), "--verify"]) == 2
    assert "there is no manifest.json" in capsys.readouterr().err


def test_a_checkpoint_that_shrinks_while_it_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    groups = convert._groups

    def then_cut(*args: Any) -> Any:
        cut_file(source)
        return groups(*args)

    monkeypatch.setattr(convert, "_groups", then_cut)
    with pytest.raises(UserError, match="became shorter while it was read"):
        make(source, tmp_path / "out")


def test_empty_and_scalar_tensors_are_carried(tmp_path: Path) -> None:
    """What no weight names is copied whole, whatever its shape."""
    header = {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
              "b": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]}}  # fmt: skip
    text = json.dumps(header).encode()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    file = tmp_path / "in" / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + np.float32(2.5).tobytes())
    places = locate_folder(tmp_path / "in")
    job = convert.Job(tmp_path / "in", places, tmp_path / "out", {}, 2, None, print)
    convert.convert(job)
    for rank in range(2):
        own = stored(tmp_path / "out" / f"rank-{rank}-of-2")
        assert own["a"].item() == 2.5
        assert own["b"].shape == (0, 3)
