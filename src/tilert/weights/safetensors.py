"""Safetensors files: tensors as views of a read-only memory map or as places in a file, and an atomic
streaming writer.

The reader is strict: the header of an untrusted file is checked completely before any tensor is
made, and every complaint is one sentence. Knows bytes, names and dtypes; knows no model.
The format is that of huggingface.co/docs/safetensors: a length in 8 bytes, a JSON header, then the
tensors' bytes without holes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tilert.errors import UserError
from tilert.files import atomic

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_DIMENSIONS = 16
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Entry(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


class Place(NamedTuple):
    """Where a tensor is stored; for who reads it in pieces and maps nothing."""

    path: Path
    offset: int  # bytes from the start of the file
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def quoted(value: Any) -> str:
    """A value from a file, fit for a sentence: on one line and not long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def map_file(path: Path, smallest: int, kind: str) -> mmap.mmap:
    """A read-only map of a whole file; UserError when it has fewer than `smallest` bytes."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < smallest:
                raise UserError(f"{path} has {size} bytes; a {kind} file has at least {smallest}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from error


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], mmap.mmap]:
    """(tensors in the order of their bytes, the map whose read-only views they are).

    A tensor that does not lie at a multiple of its element size is copied, so that every array is
    aligned; files written by the usual libraries have none.
    Raises UserError when the file cannot be opened, is cut off, or its header is not sound.
    """
    mapped, start, entries = _open(path)
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        count = math.prod(entry.shape)
        array = np.frombuffer(mapped, entry.dtype, count, start + entry.begin).reshape(entry.shape)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        tensors[entry.name] = array
    return tensors, mapped


def _open(path: Path) -> tuple[mmap.mmap, int, list[_Entry]]:
    """(map, where the tensors' bytes begin, what the header lists); everything is checked."""
    mapped = map_file(path, 8, "safetensors")
    (length,) = struct.unpack("<Q", mapped[:8])
    start = 8 + length
    if length > MAX_HEADER:
        raise UserError(f"{path} has a header of {length} bytes; accepted are up to {MAX_HEADER}")
    if start > len(mapped):
        raise UserError(
            f"{path} is cut off: its header needs {start} bytes, but {len(mapped)} are there"
        )
    entries = _entries(path, mapped[8:start])
    _check_layout(path, entries, start, len(mapped))
    return mapped, start, entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys; ValueError names the first one that is repeated."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {quoted(key)} occurs twice")
        made[key] = value
    return made


def _entries(path: Path, header: bytes) -> list[_Entry]:
    """The tensors that a header lists, sorted by offset."""
    if not header.startswith(b"{"):
        raise UserError(f"{path} is not a safetensors file: its header is not a JSON object")
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the header of {path} is not valid JSON: {error}") from error
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"the __metadata__ of {path} does not map names to strings")
    return sorted((_entry(path, name, value) for name, value in table.items()), key=lambda e: e[3:])


def _entry(path: Path, name: str, value: Any) -> _Entry:
    where = f"tensor {quoted(name)} in {path}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} needs exactly dtype, shape and data_offsets")
    stated, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = DTYPES.get(stated) if isinstance(stated, str) else None
    if dtype is None:
        raise UserError(f"{where} has dtype {quoted(stated)}; accepted are {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise UserError(
            f"{where} has shape {quoted(shape)}; accepted are up to {MAX_DIMENSIONS} sizes of 0 or more"
        )
    if not _naturals(offsets) or len(offsets) != 2:
        raise UserError(f"{where} has data_offsets {quoted(offsets)}; accepted are [begin, end]")
    begin, end = offsets
    size = math.prod(shape) * dtype.itemsize
    # Beside a zero, sizes that are too large for an array could hide.
    if size != end - begin or math.prod(n for n in shape if n) * dtype.itemsize >= 2**63:
        raise UserError(
            f"{where} has shape {quoted(shape)} of {stated}, {size} bytes, but its offsets span"
            f" {end - begin}"
        )
    return _Entry(name, dtype, tuple(shape), begin, end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_layout(path: Path, entries: list[_Entry], start: int, size: int) -> None:
    """The tensors must fill the file from byte `start` to its `size` without holes or overlaps."""
    at = 0
    for entry in entries:
        if entry.begin != at:
            what = (
                "overlaps the tensor before it" if entry.begin < at else "leaves a hole before it"
            )
            raise UserError(f"tensor {quoted(entry.name)} in {path} {what}")
        at = entry.end
    if start + at > size:
        raise UserError(
            f"{path} is cut off: its tensors need {start + at} bytes, but {size} are there"
        )
    if start + at < size:
        raise UserError(f"{path} has {size - start - at} bytes behind its last tensor")


def read_folder(folder: Path) -> tuple[dict[str, np.ndarray], tuple[mmap.mmap, ...]]:
    """(tensors, maps) of a model folder: model.safetensors, or the shards that its index names.

    Raises UserError for a folder without weights, and for shards that are not what the index says.
    """
    tensors: dict[str, np.ndarray] = {}
    maps: list[mmap.mmap] = []
    for path, expected in _shards(folder):
        found, mapped = read_safetensors(path)
        _check_shard(path, expected, found.keys(), tensors.keys())
        tensors |= found
        maps.append(mapped)
    return tensors, tuple(maps)


def locate_folder(folder: Path) -> dict[str, Place]:
    """Where the tensors of a model folder are, by file and offset. Raises like `read_folder`."""
    places: dict[str, Place] = {}
    for path, expected in _shards(folder):
        mapped, start, entries = _open(path)
        mapped.close()
        found = {e.name: Place(path, start + e.begin, e.dtype, e.shape) for e in entries}
        _check_shard(path, expected, found.keys(), places.keys())
        places |= found
    return places


def _shards(folder: Path) -> list[tuple[Path, set[str]]]:
    """The files with a folder's tensors, and the names that each has by the index."""
    single = folder / "model.safetensors"
    if os.path.exists(single):
        return [(single, set())]
    index = folder / "model.safetensors.index.json"
    if not os.path.exists(index):
        raise UserError(f"{folder} holds no weights; accepted are {single.name} and {index.name}")
    expected: dict[str, set[str]] = {}
    for name, shard in read_index(index).items():
        expected.setdefault(shard, set()).add(name)
    for shard in sorted(expected):
        if not os.path.exists(folder / shard):
            raise UserError(f"{folder} lacks the shard {quoted(shard)} that its index names")
    return [(folder / shard, expected[shard]) for shard in sorted(expected)]


def _check_shard(path: Path, expected: set[str], found: Set[str], before: Set[str]) -> None:
    if doubled := sorted(found & before):
        raise UserError(f"tensor {quoted(doubled[0])} is in two shards of {path.parent}")
    if missing := sorted(expected - found):
        raise UserError(f"the shard {path} lacks the tensor {quoted(missing[0])} of the index")


def read_index(index: Path) -> dict[str, str]:
    """Tensor name to shard, a plain file name in the same folder; UserError for anything else."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor names to file names")
    for shard in weight_map.values():
        if shard != Path(shard).name or shard in ("", ".."):
            raise UserError(
                f"{index} names the shard {quoted(shard)}; accepted are plain file names"
            )
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it cannot be read or is something else."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; accepted is a JSON object")
    return value


class Source(NamedTuple):
    """A tensor to be written; `chunks` are its elements in order, so it need not be in memory."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Iterable[np.ndarray]

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_header(tensors: Sequence[Source], metadata: Mapping[str, str]) -> bytes:
    """What stands before the bytes of `tensors`, which follow in this order.

    Tensors of wide elements must come first, so that all are aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at, width = 0, max((t.dtype.itemsize for t in tensors), default=1)
    for tensor in tensors:
        assert tensor.name not in header, f"tensor {tensor.name} is given twice"
        assert tensor.dtype.itemsize <= width, f"tensor {tensor.name} comes too late"
        width, end = tensor.dtype.itemsize, at + tensor.bytes
        shape, dtype = list(tensor.shape), _NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensors begin at a cache line
    return struct.pack("<Q", len(text)) + text


def write_safetensors(path: Path, tensors: Iterable[Source]) -> None:
    """Write a file under a temporary name and rename it when it is complete and on disk.

    Raises UserError when the disk is full or cannot be written; nothing half-written stays, whatever
    ends the writing.
    """
    sources = sorted(tensors, key=lambda source: -source.dtype.itemsize)
    header = file_header(sources, {})
    with atomic(path, len(header) + sum(source.bytes for source in sources)) as file:
        file.write(header)
        for source in sources:
            written = 0
            for chunk in source.chunks:
                assert chunk.dtype == source.dtype, f"{source.name}: {chunk.dtype}"
                written += file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
            assert written == source.bytes, f"{source.name}: {written} bytes, not {source.bytes}"
