"""The manifest of a converted checkpoint: what it was made of, and size and checksum of every file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tilert.errors import UserError
from tilert.weights.hub import Progress
from tilert.weights.safetensors import quoted, read_json

MANIFEST = "manifest.json"
FORMAT = 1  # of the folder; another number is another way of cutting or naming


@dataclass(frozen=True, slots=True)
class Record:
    """A complete file."""

    bytes: int
    sha256: str

    def to_line(self, name: str) -> bytes:
        """The form in the journal."""
        return json.dumps([name, self.bytes, self.sha256]).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> tuple[str, Record]:
        """(name, record) of a line of the journal."""
        name, size, sha256 = json.loads(line)
        return name, cls(size, sha256)

    def fits(self, path: Path) -> bool:
        """Whether the file is there with these bytes; they are read from the disk, not from the cache."""
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != self.bytes:
                    return False
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Manifest:
    """A conversion; fingerprint, config and cuts are checksums of what went into it."""

    format: int
    tensor_parallel: int
    fingerprint: str  # of the checkpoint
    config: str  # of its config.json
    cuts: str  # of which tensor is cut how
    files: dict[str, Record]  # by path within the folder

    def head(self) -> dict[str, Any]:
        """All but the files."""
        return {k: v for k, v in asdict(self).items() if k != "files"}

    def metadata(self, rank: int) -> dict[str, str]:
        """What each file of tensors says of itself."""
        return {
            "tilert.format": f"{self.format}",
            "tilert.tensor_parallel": f"{self.tensor_parallel}",
            "tilert.rank": f"{rank}",
            "tilert.source": self.fingerprint,
        }

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        return json.dumps(asdict(self), indent=1).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished conversion. Raises UserError when there is none or it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} holds no finished conversion: there is no {MANIFEST}")
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {quoted(value.get('format'))}; accepted is {FORMAT}: convert again"
        )
    try:
        records = {name: Record(**record) for name, record in value.pop("files").items()}
        manifest = Manifest(**value, files=records)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    for name, record in records.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"{path} names the file {quoted(name)}; accepted are files of the folder"
            )
        if type(record.bytes) is not int:
            raise UserError(f"{path} is damaged: {quoted(name)} has {quoted(record.bytes)} bytes")
    if type(manifest.tensor_parallel) is not int:
        raise UserError(f"{path} is damaged: tensor_parallel is no number")
    return manifest


def verify(folder: Path, progress: Progress | None) -> Manifest:
    """The manifest of a finished conversion after all its files were read and compared with it.

    Raises UserError for the first file that is absent or has other bytes.
    """
    manifest = read_manifest(folder)
    total, done = sum(record.bytes for record in manifest.files.values()), 0
    for name, record in manifest.files.items():
        if not record.fits(folder / name):
            raise UserError(
                f"{folder / name} is absent or not as it was written (sha256 {record.sha256[:16]}..., "
                f"{record.bytes} bytes); convert again into an empty folder"
            )
        done += record.bytes
        if progress:
            progress("verifying", done, total)
    return manifest
