"""`tilert convert`: joins a model's table of weights with the cutting of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tilert.errors import UserError
from tilert.models import load_config
from tilert.models.config import DecoderConfig
from tilert.models.decoder import build
from tilert.models.shards import cut_axes
from tilert.text import Tokenizer, write_gguf_tokenizer
from tilert.weights import open_checkpoint, resolve_model
from tilert.weights.convert import Job
from tilert.weights.convert import convert as cut
from tilert.weights.hub import Progress
from tilert.weights.manifest import Manifest


def run(
    model: str, out: Path, devices: int, progress: Progress | None, notify: Callable[[str], None]
) -> Manifest:
    """Convert the checkpoint that `model` names into the folder `out`, for `devices` devices.

    Raises UserError like `open_checkpoint`, `load_config`, `cut_axes` and `convert`, and for a tokenizer that
    is not of this model.
    """
    folder = resolve_model(model, write_gguf_tokenizer, progress=progress)
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint.config, checkpoint.generation_config)
    _check_tokenizer(folder, config)
    axes = cut_axes(build(config, 1), config, checkpoint.tensors, devices)
    return cut(Job(folder, out, axes, devices, progress, notify))


def _check_tokenizer(folder: Path, config: DecoderConfig) -> None:
    """UserError when the folder's tokenizer, if it has one, gives ids that the embedding lacks."""
    if not (folder / "tokenizer.json").exists():
        return
    known = Tokenizer.from_folder(folder).vocab_size
    if known > config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {known} ids, but the model only {config.vocab_size}; accepted"
            " is the tokenizer of this model"
        )


def summary(manifest: Manifest) -> str:
    """What a conversion consists of, in a line."""
    size = sum(record.bytes for record in manifest.files.values())
    devices = manifest.tensor_parallel
    return (
        f"{len(manifest.files)} files, {size:,} bytes, for {devices} device{'s' * (devices > 1)}, all as"
        " they were written"
    )
