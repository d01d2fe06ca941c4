"""Files that tilert makes: where it keeps them, and how they appear complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tilert.errors import UserError


def cache_folder() -> Path:
    """Where tilert keeps what it fetched, converted or compiled."""
    stated = os.environ.get("TILERT_CACHE")
    return Path(os.path.abspath(os.path.expanduser(stated or "~/.cache/tilert")))


@contextmanager
def atomic(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file that appears under `path` only when the block ends well; `size` bytes are expected.

    Raises UserError, with the free and the needed bytes when the disk is full.
    """
    check_space(path.parent, size)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise write_error(path, size, error) from error
    finally:
        with suppress(OSError):  # where it could not be made, it cannot be removed
            partial.unlink()


def keep(path: Path, data: bytes) -> None:
    """Put data into the cache, with its checksum. A cache that cannot be written only costs time."""
    whole = hashlib.sha256(data).hexdigest().encode() + b"\n" + data
    with suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, len(whole)) as file:
            file.write(whole)


def kept(path: Path) -> bytes | None:
    """What was kept there; None when there is nothing or it is damaged."""
    try:
        head, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest().encode() == head else None


def check_space(folder: Path, size: int) -> None:
    """UserError when the disk of an existing folder has less than `size` bytes free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    if free < size:
        raise UserError(f"{folder} has {free} bytes free, but {size} are needed")


def write_error(path: Path, size: int, error: OSError) -> UserError:
    """The sentence for a failure to write `size` bytes to `path`, whose folder may be on a full disk."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"cannot write {path}: {error.strerror or error}")
    try:
        free = f"{shutil.disk_usage(path.parent).free}"
    except OSError:
        free = "too few"
    return UserError(f"the disk is full: {path} needs {size} bytes, but {free} are free")
