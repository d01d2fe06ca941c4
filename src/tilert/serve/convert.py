"""`tilert convert`: joins a model's table of weights with the cutting of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tilert.errors import UserError
from tilert.models import load_config
from tilert.models.config import DecoderConfig
from tilert.models.decoder import build
from tilert.models.shards import cut_axes
from tilert.text import Tokenizer, write_gguf_tokenizer
from tilert.weights import read_config, resolve_model
from tilert.weights.convert import Job
from tilert.weights.convert import convert as cut
from tilert.weights.hub import Progress
from tilert.weights.manifest import Manifest
from tilert.weights.safetensors import locate_folder


def run(
    model: str, out: Path, devices: int, progress: Progress | None, notify: Callable[[str], None]
) -> Manifest:
    """Convert the checkpoint that `model` names into the folder `out`, for `devices` devices.

    Raises UserError like `locate_folder`, `load_config`, `cut_axes` and `convert`, and for a tokenizer that
    is not of this model.
    """
    folder = resolve_model(model, write_gguf_tokenizer, progress=progress)
    config = load_config(*read_config(folder))
    _check_tokenizer(folder, config)
    places = locate_folder(folder)
    # Types and shapes are all that the table of weights is compared with: arrays that take no memory.
    shapes = {n: np.broadcast_to(np.zeros((), p.dtype), p.shape) for n, p in places.items()}
    axes = cut_axes(build(config, 1), config, shapes, devices)
    return cut(Job(folder, places, out, axes, devices, progress, notify))


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
