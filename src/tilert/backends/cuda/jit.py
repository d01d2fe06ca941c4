"""CUDA C++ to a cubin through NVRTC, with a cache on disk. Needs no GPU and no installed toolkit.

The cache key covers everything that decides the result: source, headers, options, target, compiler.
A cached file carries its own checksum, so one that is cut off is compiled again, not loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilert.errors import UserError
from tilert.files import cache_folder, keep, kept

# Bytes of shared memory that a block may take, by target.
TARGETS = {"sm_90a": 232448, "sm_100a": 232448, "sm_120a": 101376}
OPTIONS = ("--std=c++20", "--generate-line-info", "--ptxas-options=-v")
FORMAT = 1  # of a cached file
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one thread of a kernel takes with all functions that it calls, by the assembler's own
    account; sizes in bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code for one target, and the resources of each kernel in it by name."""

    data: bytes
    arch: str
    resources: dict[str, Resources]
    seconds: float  # the compiler took; 0 when it was found in the cache


def compile_cubin(
    source: str, *, name: str, arch: str, headers: Mapping[str, str],
    progress: Callable[[str], None] | None = None, cache: Path | None = None,
) -> Cubin:  # fmt: skip
    """The cubin of a source whose includes are `headers` (file name to text).

    cache: a folder, by default that of this user. progress: told before a compile that takes time.
    Raises UserError for an unknown target, without the compiler, and with the path of the compiler's
    log when it refuses the source.
    """
    if arch not in TARGETS:
        raise UserError(f"target '{arch}' is not known; accepted are {', '.join(TARGETS)}")
    nvrtc = _compiler()
    version = ".".join(map(str, _checked(nvrtc, nvrtc.nvrtcVersion())))
    cache = default_cache() if cache is None else cache
    parts = [FORMAT, version, arch, OPTIONS, source, sorted(headers.items())]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = cache / f"{name}-{arch}-{key[:32]}"
    if (found := _load(path, arch)) is not None:
        return found
    if progress:
        progress(f"compiling {name} for {arch} (once; a few seconds)")
    started = time.perf_counter()
    data, log = _compile(nvrtc, source, name, arch, headers, cache)
    made = Cubin(data, arch, _resources(log), time.perf_counter() - started)
    _store(path, made)
    return made


def default_cache() -> Path:
    """Where this user's cubins are kept."""
    return cache_folder() / "cubin"


def _compiler() -> Any:
    try:
        from cuda.bindings import nvrtc  # type: ignore[attr-defined]
    except ImportError as error:
        raise UserError(
            f"compiling for a GPU needs the package {error.name}; install tilert with its extra:"
            " pip install 'tilert[cuda]'"
        ) from error
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the bindings are there, the library is not
        raise UserError(
            "compiling for a GPU needs the library NVRTC; install tilert with its extra:"
            " pip install 'tilert[cuda]'"
        ) from error
    return nvrtc


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    error, *values = result
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(error)[1].decode()}")
    return values[0] if len(values) == 1 else values


def _compile(
    nvrtc: Any, source: str, name: str, arch: str, headers: Mapping[str, str], cache: Path
) -> tuple[bytes, str]:
    """(cubin, log)."""
    texts = [text.encode() for text in headers.values()]
    names = [file.encode() for file in headers]
    program = _checked(
        nvrtc,
        nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), len(texts), texts, names),
    )
    try:
        options = [f"--gpu-architecture={arch}".encode(), *(o.encode() for o in OPTIONS)]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        # One byte more: a bytes object of one byte is shared by the whole process.
        log = b" " * (1 + _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        text = log.partition(b"\0")[0].decode(errors="replace")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            where = _write_log(cache, name, arch, text)
            raise UserError(f"the CUDA compiler refused {name} for {arch}; its log is {where}")
        data = b" " * _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, data))
        return data, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _resources(log: str) -> dict[str, Resources]:
    found: dict[str, Resources] = {}
    for part in log.split("Compiling entry function '")[1:]:
        frames = [tuple(map(int, frame)) for frame in _FRAME.findall(part)]
        registers = re.search(r"Used (\d+) registers", part)
        assert registers and frames, f"the assembler's report has changed: {part[:200]}"
        total = re.search(r"(\d+) bytes cumulative stack size", part)
        stack, stores, loads = (sum(column) for column in zip(*frames, strict=True))
        stack = max(stack, int(total[1]) if total else 0)
        found[part.partition("'")[0]] = Resources(int(registers[1]), stack, stores, loads)
    return found


def _write_log(cache: Path, name: str, arch: str, text: str) -> Path:
    for folder in (cache, Path(tempfile.gettempdir())):
        path = folder / f"{name}-{arch}-{secrets.token_hex(4)}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError:
            continue
        return path
    return Path(os.devnull)


def _load(path: Path, arch: str) -> Cubin | None:
    """What an earlier compile left; None when there is nothing or it is damaged."""
    if (whole := kept(path)) is None:
        return None
    table, _, data = whole.partition(b"\n")
    try:
        resources = {name: Resources(*values) for name, values in json.loads(table).items()}
    except (ValueError, TypeError):
        return None
    return Cubin(data, arch, resources, 0.0)


def _store(path: Path, made: Cubin) -> None:
    """Keep a cubin for the next process."""
    table = {
        name: [r.registers, r.stack, r.spill_stores, r.spill_loads]
        for name, r in made.resources.items()
    }
    keep(path, json.dumps(table).encode() + b"\n" + made.data)
