"""A device for the CUDA back end where there is none: the kernel itself, compiled for the CPU.

emulator.h stands in for ptx.cuh; emulator.cpp runs all threads as fibers in an order that a seed picks.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tilert.backends.cuda.copying import Piece, copy_all, pieces
from tilert.backends.cuda.source import Source
from tilert.ir.dtype import DType
from tilert.ir.machine import Machine

HERE = Path(__file__).parent
THREADS = 384
SUPPORTED = platform.machine() == "x86_64" and shutil.which("g++") is not None


def compile_cpp(*arguments: str | Path) -> None:
    """By g++; with the same options for all, or it would not take a compiled header."""
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


class Memory:
    """Bytes of the host that stand for memory of the device."""

    def __init__(self, values: np.ndarray) -> None:
        self.bytes, self.address, self.size = values, values.ctypes.data, values.nbytes

    def part(self, begin: int, size: int) -> Memory:
        return Memory(self.bytes[begin : begin + size])

    def write(self, values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.bytes[: raw.size] = raw

    def read(self, begin: int, count: int, dtype: Any) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        return self.bytes[begin : begin + size].copy().view(dtype)

    def clear(self) -> None:
        self.bytes[:] = 0


class Lane:
    """Copies at once."""

    def copy(self, piece: Piece) -> None:
        ctypes.memmove(piece.target, piece.source.ctypes.data, piece.source.size)

    def finish(self) -> None:
        pass


class Kernel:
    """A launch is a thread of the host that plays all threads of all blocks."""

    def __init__(self, library: ctypes.CDLL, shared_bytes: int, device: EmulatedDevice) -> None:
        self.library, self.shared_bytes, self.device = library, shared_bytes, device
        self.thread: threading.Thread | None = None
        self.stuck = False

    def launch(self, blocks: int, params: ctypes.Structure) -> None:
        def play() -> None:
            seed = self.device.seed
            ctypes.c_int.in_dll(self.library, "emulator_lost").value = self.device.lost_copy
            arguments = ctypes.byref(params), blocks, THREADS, self.shared_bytes, seed
            self.stuck = self.library.emulate(*arguments) != 0

        self.thread = threading.Thread(target=play, daemon=True)
        self.thread.start()

    def done(self) -> bool:
        """Asked by a host that spins: a moment's rest leaves the processor to the kernel, and to tests that
        run beside this one."""
        if self.thread is not None:
            self.thread.join(0.001)
        return self.thread is None or not self.thread.is_alive()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
        assert not self.stuck, "no thread of the kernel could go on"


class EmulatedDevice:
    """Compiles into `folder`, where equal sources are found again."""

    lost_copy = -1  # the copy of weights that never arrives, in launches from now on

    def __init__(self, folder: Path, shared_bytes: int = 232448, seed: int = 0) -> None:
        self.folder, self.shared_bytes, self.seed = folder, shared_bytes, seed
        self.machine = Machine(
            "emulated", 4, slots=4, slot_bytes=4096, window=2, read_bandwidth=4e9,
            worker_bandwidth=2e9, worker_flops=1e9, cache_dtype=DType.BF16,
            index_dtype=DType.F8E4M3,
        )  # fmt: skip

    name = "emulated GPU"

    def free_bytes(self) -> int:
        return 2 << 30

    def prompt_runner(self, graph: Any, weights: Any, caches: Any, scales: Any) -> None:
        return None

    def allocate(self, size: int) -> Memory:
        raw = np.full(size + 256, 0xFF, np.uint8)  # no numbers: a use of what nobody wrote shows
        return Memory(raw[-raw.ctypes.data % 256 :][:size])

    def upload(self, parts: Any, progress: Any) -> None:
        copy_all(pieces(((a, m.address) for m, a in parts), 1000), [Lane(), Lane()], progress)

    def pinned(self, words: int) -> np.ndarray:
        return np.zeros(words, np.uint32)

    def load(self, source: Source, kernel: str, shared_bytes: int) -> Kernel:
        own, header = (HERE / "emulator.cpp").read_text(), self._header()
        files = {**source.headers, "emulator.cpp": own, "kernel.cu": source.text}
        files["ptx.cuh"] = f'#include "emulator.h"  // {header.name}\n'
        digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
        made = self.folder / f"{digest}.so"
        if not made.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as own:
                folder = Path(own)
                for name, text in files.items():
                    (folder / name).write_text(text)
                compile_cpp(
                    "-shared", "-I", header, "-o", folder / "kernel.so", folder / "emulator.cpp"
                )
                (folder / "kernel.so").rename(made)  # at once: another process may look for it
        return Kernel(ctypes.CDLL(str(made)), shared_bytes, self)

    def _header(self) -> Path:
        """The folder with emulator.h, compiled once for all kernels: half a second less for each."""
        text = (HERE / "emulator.h").read_text()
        made = self.folder / f"header-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if not made.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            (folder / "emulator.h").write_text(text)
            compile_cpp("-x", "c++-header", "-o", folder / "emulator.h.gch", folder / "emulator.h")
            with suppress(OSError):  # another process was faster
                folder.rename(made)
        return made
