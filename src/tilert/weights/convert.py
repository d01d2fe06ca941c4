"""A checkpoint cut for several devices: streamed, resumable, with a checksum for every file.

    DIR/config.json, tokenizer, ...        copied
    DIR/rank-R-of-N/model-*.safetensors    the parts of device R, with an index; for N = 1 in DIR itself,
                                           which is then a plain Hugging Face folder
    DIR/manifest.json                      written last: what was converted, size and sha256 of all files

Each tensor is read once, in pieces, and every piece goes to the files of all devices at once, so that
memory holds one piece whatever the model's size. A journal names what is complete; a conversion that was
interrupted goes on from there. Knows no model: which axis of a tensor is cut comes with the call.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tilert.errors import UserError
from tilert.files import atomic, check_space
from tilert.weights.hub import Progress, make_folder
from tilert.weights.manifest import FORMAT, MANIFEST, Manifest, Record, read_manifest, verify
from tilert.weights.safetensors import Place, Source, file_header

JOURNAL = ".convert.journal"
SHARD_BYTES = 5_000_000_000  # most bytes of tensors in a file, unless a single one has more
PIECE_BYTES = 64 << 20  # read at a time
RESERVE = 64 << 20  # bytes that stay free for indices and copies
SAMPLE = 4096  # bytes at both ends of a file that its fingerprint covers
COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*")
Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the checkpoint, and the axis along which devices divide it; None: all hold the whole."""

    name: str
    place: Place
    axis: int | None

    def part(self, devices: int) -> Source:
        """What one device gets, without its content."""
        shape = list(self.place.shape)
        if self.axis is not None:
            assert shape[self.axis] % devices == 0, f"{self.name}: {shape} over {devices}"
            shape[self.axis] //= devices
        return Source(self.name, self.place.dtype, tuple(shape), ())


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion: `places` has all tensors of the folder `source`, `axes` the axis of each that is cut."""

    source: Path
    places: Mapping[str, Place]
    out: Path
    axes: Mapping[str, int | None]
    devices: int
    progress: Progress | None
    notify: Notify


def convert(job: Job) -> Manifest:
    """Do the job, or what is left of it, and check what was written.

    `notify` gets a sentence when something of an earlier run is used or thrown away. Raises UserError for a
    damaged checkpoint, a folder `out` that is not free for it, a full disk, and bytes that come back
    from the disk otherwise than they were written.
    """
    made = _head(job)
    if _is_finished(job, made):
        job.notify(f"{job.out} is complete already; checking it")
        return verify(job.out, job.progress)
    with _journal(job, made) as (journal, recorded):
        groups = _groups(job)
        files = [_file_names(job.devices, g, len(groups)) for g in range(len(groups))]
        records = _kept(job, files, recorded)
        _write_groups(job, made, groups, files, records, journal)
        records |= _write_small(job, groups, files)
        manifest = Manifest(FORMAT, job.devices, made.fingerprint, made.config, made.cuts, records)
        content = manifest.to_json()
        with atomic(job.out / MANIFEST, len(content)) as file:
            file.write(content)
        (job.out / JOURNAL).unlink()
    return verify(job.out, job.progress)


def _head(job: Job) -> Manifest:
    """The manifest without files: what the conversion is of."""
    config = (job.source / "config.json").read_bytes()
    cuts = json.dumps({name: job.axes.get(name) for name in sorted(job.places)}).encode()
    return Manifest(
        FORMAT, job.devices, _fingerprint(config, job.places), hashlib.sha256(config).hexdigest(),
        hashlib.sha256(cuts).hexdigest(), {},
    )  # fmt: skip


def _fingerprint(config: bytes, places: Mapping[str, Place]) -> str:
    """A checksum of the config and, for each file of tensors, its size and both of its ends.

    The front holds names, types and shapes; the content between is too much to be read for this.
    """
    digest = hashlib.sha256(config)
    starts: dict[Path, int] = {}
    for place in places.values():
        starts[place.path] = min(place.offset, starts.get(place.path, place.offset))
    for path in sorted(starts):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size} ".encode() + file.read(starts[path] + SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()


def _is_finished(job: Job, made: Manifest) -> bool:
    """Whether this very conversion is complete in `out`; UserError when another one is."""
    if not (job.out / MANIFEST).exists():
        return False
    found = read_manifest(job.out)
    if found.head() == made.head():
        return True
    what = "of another checkpoint"
    if found.fingerprint == made.fingerprint:
        what = f"of this checkpoint for {found.tensor_parallel} devices"
    raise UserError(
        f"{job.out} holds the conversion {what}; accepted is another or an empty folder"
    )


@contextmanager
def _journal(job: Job, made: Manifest) -> Iterator[tuple[BinaryIO, dict[str, Record]]]:
    """(the locked journal, what it says is complete); takes the folder `out` or refuses it."""
    if job.out.resolve() == job.source.resolve():
        raise UserError(f"{job.out} is the checkpoint itself; accepted is another folder")
    path = job.out / JOURNAL
    make_folder(job.out)
    if not path.exists() and any(job.out.iterdir()):
        raise UserError(
            f"{job.out} is not empty and holds no conversion of tilert; accepted are a new or an empty"
            " folder, and one in which a conversion was interrupted"
        )
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another conversion is writing to {job.out}") from error
        yield file, _resume(job, made, file)


def _resume(job: Job, made: Manifest, journal: BinaryIO) -> dict[str, Record]:
    """What of an interrupted run may be used; everything else that it left is removed."""
    journal.seek(0)
    content = journal.read()
    head, *lines = content.split(b"\n")
    begin = json.dumps(made.head() | {"times": _times(job.source)}).encode()
    for partial in (*job.out.glob(".*.partial"), *job.out.glob("rank-*/.*.partial")):
        partial.unlink()
    if head == begin:
        journal.truncate(content.rindex(b"\n") + 1)  # the last line may be cut off
        return dict(Record.from_line(line) for line in lines[:-1])
    with suppress(ValueError, KeyError, TypeError):  # no head that can be read
        if json.loads(head)["config"] != made.config:
            raise UserError(
                f"{job.out} holds the unfinished conversion of another model; accepted is another or an"
                " empty folder"
            )
    if head:
        job.notify(
            f"the checkpoint or the options are not those of the unfinished conversion in {job.out};"
            " starting over"
        )
    for file in job.out.glob("model-*.safetensors"):
        file.unlink()
    for folder in job.out.glob("rank-*-of-*"):
        shutil.rmtree(folder)
    journal.truncate(0)
    journal.write(begin + b"\n")
    return {}


def _times(source: Path) -> dict[str, int]:
    """When the files of the checkpoint were changed, for who goes on with them."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(source.glob("*.safetensors"))}


def _groups(job: Job) -> list[list[Piece]]:
    """The tensors of each file, in the order of the checkpoint, wide elements first."""
    order = sorted(job.places.items(), key=lambda item: (item[1].path, item[1].offset))
    groups: list[list[Piece]] = [[]]
    size = 0
    for name, place in order:
        piece = Piece(name, place, job.axes.get(name))
        part = piece.part(job.devices).bytes
        if groups[-1] and size + part > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += part
    return [sorted(group, key=lambda piece: -piece.place.dtype.itemsize) for group in groups]


def _file_names(devices: int, group: int, groups: int) -> list[str]:
    """The file of each device, from the folder on."""
    name = f"model-{group + 1:05}-of-{groups:05}.safetensors"
    return [f"{_rank_folder(rank, devices)}{name}" for rank in range(devices)]


def _rank_folder(rank: int, devices: int) -> str:
    return "" if devices == 1 else f"rank-{rank}-of-{devices}/"


def _kept(
    job: Job, files: Sequence[Sequence[str]], recorded: Mapping[str, Record]
) -> dict[str, Record]:
    """The files of an interrupted run whose size and checksum are those of the journal."""
    groups = [group for group in files if all(name in recorded for name in group)]
    found = {name: recorded[name] for group in groups for name in group}
    total, done = sum(record.bytes for record in found.values()), 0
    good: dict[str, Record] = {}
    for name, record in found.items():
        if record.fits(job.out / name):
            good[name] = record
        done += record.bytes
        if job.progress:
            job.progress("checking what is there", done, total)
    kept = {n: good[n] for group in groups if all(n in good for n in group) for n in group}
    if recorded:
        job.notify(f"going on with the conversion in {job.out}: {len(kept)} files are complete")
    return kept


def _write_groups(
    job: Job, made: Manifest, groups: Sequence[Sequence[Piece]], files: Sequence[Sequence[str]],
    records: dict[str, Record], journal: BinaryIO,
) -> None:  # fmt: skip
    """Write what `records` lacks, and add it there and to the journal."""
    todo = [g for g, names in enumerate(files) if names[0] not in records]
    headers = {
        g: [file_header([p.part(job.devices) for p in groups[g]], made.metadata(rank))
            for rank in range(job.devices)]
        for g in todo
    }  # fmt: skip
    sizes = {
        g: sum(p.part(job.devices).bytes for p in groups[g]) + max(map(len, headers[g]))
        for g in todo
    }
    total, done = sum(sizes.values()) * job.devices, 0
    check_space(job.out, total + RESERVE)
    for rank in range(job.devices):
        make_folder(job.out / _rank_folder(rank, job.devices))

    def tick(size: int) -> None:
        nonlocal done
        done += size
        if job.progress:
            job.progress("converting", done, total)

    for g in todo:
        with ExitStack() as stack:
            sinks = [
                _Sink(stack.enter_context(atomic(job.out / name, sizes[g])), tick)
                for name in files[g]
            ]
            reader = stack.enter_context(_Reader())
            for sink, header in zip(sinks, headers[g], strict=True):
                sink.write(header)
            for piece in groups[g]:
                _distribute(piece, reader, sinks)
        for name, sink in zip(files[g], sinks, strict=True):
            records[name] = sink.record()
            journal.write(records[name].to_line(name))
        os.fsync(journal.fileno())


class _Sink:
    """A file under construction: counts and sums up what is written to it."""

    def __init__(self, file: BinaryIO, tick: Callable[[int], None]) -> None:
        self.file, self.tick, self.size = file, tick, 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.file.write(data)
        self.size += len(data)
        self.tick(len(data))

    def record(self) -> Record:
        return Record(self.size, self.digest.hexdigest())


class _Reader:
    """The checkpoint's files, each open once; one buffer for whatever is read."""

    def __init__(self) -> None:
        self.files: dict[Path, BinaryIO] = {}
        self.buffer = np.empty(0, np.uint8)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()

    def rows(self, place: Place, begin: int, end: int) -> Iterator[np.ndarray]:
        """Bytes [n, bytes of a row] of rows [begin, end) of the first axis; valid until the next."""
        width = int(np.prod(place.shape[1:], dtype=np.int64)) * place.dtype.itemsize
        step = max(1, PIECE_BYTES // width) if width else end - begin
        for row in range(begin, end if width else begin, step):
            n = min(step, end - row)
            yield self._read(place.path, place.offset + row * width, n * width).reshape(n, width)

    def _read(self, path: Path, offset: int, size: int) -> np.ndarray:
        if self.buffer.size < size:
            self.buffer = np.empty(size, np.uint8)
        target, at = self.buffer[:size], 0
        try:
            file = self.files.get(path) or self.files.setdefault(path, path.open("rb", buffering=0))
            while at < size:
                got = os.preadv(file.fileno(), [target[at:].data], offset + at)
                if not got:
                    raise UserError(f"{path} became shorter while it was read")
                at += got
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        return target


def _distribute(piece: Piece, reader: _Reader, sinks: Sequence[_Sink]) -> None:
    """Read a tensor once, and give each device its part."""
    place = piece.place
    rows = place.shape[0] if place.shape else 1
    if piece.axis == 0:
        share = rows // len(sinks)
        for rank, sink in enumerate(sinks):
            for block in reader.rows(place, rank * share, (rank + 1) * share):
                sink.write(block.reshape(-1).data)
        return
    for block in reader.rows(place, 0, rows):
        width = block.shape[1] // len(sinks)
        for rank, sink in enumerate(sinks):
            part = block
            if piece.axis == 1:
                part = np.ascontiguousarray(block[:, rank * width : (rank + 1) * width])
            sink.write(part.reshape(-1).data)


def _write_small(
    job: Job, groups: Sequence[Sequence[Piece]], files: Sequence[Sequence[str]]
) -> dict[str, Record]:
    """The index of each device, then config and tokenizer as they are in the checkpoint."""
    content: dict[str, bytes] = {}
    total = sum(p.part(job.devices).bytes for group in groups for p in group)
    for rank in range(job.devices):
        folder = _rank_folder(rank, job.devices)
        places = {
            piece.name: names[rank].removeprefix(folder)
            for group, names in zip(groups, files, strict=True)
            for piece in group
        }
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": places}
        content[f"{folder}model.safetensors.index.json"] = json.dumps(index, indent=1).encode()
    for path in sorted({p for pattern in COPIED for p in job.source.glob(pattern)}):
        if path.is_file() and path.name not in (MANIFEST, "model.safetensors.index.json"):
            content[path.name] = path.read_bytes()
    records: dict[str, Record] = {}
    for name in sorted(content, key=lambda name: name == "config.json"):  # last: then it is a model
        with atomic(job.out / name, len(content[name])) as file:
            file.write(content[name])
        records[name] = Record(len(content[name]), hashlib.sha256(content[name]).hexdigest())
    return records
