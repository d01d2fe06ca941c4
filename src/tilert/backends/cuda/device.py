"""One GPU: what it offers, loading kernels, launching them. Everything that speaks to the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver  # type: ignore[attr-defined]

from tilert.backends.cuda.jit import compile_cubin
from tilert.backends.cuda.prompt import PromptRunner
from tilert.backends.cuda.source import Source
from tilert.errors import UserError
from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.program import Scale

_TORCH = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16,
          DType.F8E4M3: torch.float8_e4m3fn}  # fmt: skip
THREADS = 384  # kThreads + kLoaderThreads
DRIVER = 13000  # CUDA 13.0, as cuDriverGetVersion counts
PIECE = 64 << 20  # bytes of a file that are held at a time while they are copied to the GPU


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _call(result: tuple[Any, ...]) -> Any:
    """The value of a driver call; RuntimeError when it failed."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorString(error)
        raise RuntimeError(f"CUDA: {name.decode() if name else error}")
    return values[0] if values else None


class Memory:
    """Memory of the device, as a tensor of bytes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.address = tensor, tensor.data_ptr()

    def part(self, begin: int, size: int) -> Memory:
        """Bytes [begin, begin + size) of it."""
        return Memory(self.tensor[begin : begin + size])

    def write(self, values: np.ndarray) -> None:
        """Replace the first values.nbytes bytes."""
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for begin in range(0, raw.size, PIECE):  # a copy, for torch takes no read-only arrays
            piece = torch.from_numpy(raw[begin : begin + PIECE].copy())
            self.tensor[begin : begin + len(piece)].copy_(piece)

    def read(self, begin: int, count: int, dtype: Any) -> np.ndarray:
        """A copy of `count` elements from byte `begin` on."""
        size = count * np.dtype(dtype).itemsize
        return self.tensor[begin : begin + size].cpu().numpy().view(dtype)

    def clear(self) -> None:
        """Set all bytes to zero."""
        self.tensor.zero_()


class Kernel:
    """A loaded kernel, launched with one block per worker; at most one launch is under way."""

    def __init__(self, library: Any, name: str, shared_bytes: int) -> None:
        self._library = library  # unloading it would take the kernel away
        handle = _call(driver.cuLibraryGetKernel(library, name.encode()))
        self._function = _call(driver.cuKernelGetFunction(handle))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))
        self.shared_bytes = shared_bytes
        self.stream = torch.cuda.current_stream()
        self.event = torch.cuda.Event()

    def launch(self, blocks: int, params: ctypes.Structure) -> None:
        """Start all blocks together (a cooperative launch fails when they cannot be resident)."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        grid, block = (blocks, 1, 1), (THREADS, 1, 1)
        stream, arguments = self.stream.cuda_stream, ctypes.addressof(pointers)
        _call(
            driver.cuLaunchCooperativeKernel(
                self._function, *grid, *block, self.shared_bytes, stream, arguments
            )
        )
        self.event.record(self.stream)

    def done(self) -> bool:
        """True when the last launch has ended."""
        return self.event.query()

    def wait(self) -> None:
        """Until the last launch has ended."""
        self.event.synchronize()


def _tensor(memory: Memory, dtype: np.dtype[Any], shape: tuple[int, ...]) -> torch.Tensor:
    return memory.tensor.view(_TORCH[DType.of(np.empty(0, dtype))]).view(shape)


class Device:
    """The current CUDA device. Raises UserError when there is none that the kernels run on."""

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device; the back end 'cpu' runs without one")
        version = _call(driver.cuDriverGetVersion())
        if version < DRIVER:
            raise UserError(
                f"the GPU's driver speaks CUDA {_dotted(version)}; accepted is {_dotted(DRIVER)} or newer;"
                " the back end 'cpu' runs without a GPU"
            )
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name = properties.name
        self.capability = (properties.major, properties.minor)
        if self.capability < (9, 0):
            raise UserError(
                f"{self.name} has compute capability {properties.major}.{properties.minor}; accepted is"
                " 9.0 or newer; the back end 'cpu' runs without a GPU"
            )
        self.shared_bytes = properties.shared_memory_per_block_optin
        known = {"H100": machine.H100, "H200": machine.H200, "B200": machine.B200}
        nearest = next((m for name, m in known.items() if name in self.name), machine.H100)
        self.machine = replace(nearest, workers_per_device=properties.multi_processor_count)
        self.progress = progress
        if progress and torch.cuda.device_count() > 1:
            progress(
                f"using GPU {torch.cuda.current_device()} ({self.name}) of {torch.cuda.device_count()};"
                " CUDA_VISIBLE_DEVICES chooses another"
            )

    @property
    def arch(self) -> str:
        """The target of the kernels, as the compiler names it."""
        return f"sm_{self.capability[0]}{self.capability[1]}a"

    def free_bytes(self) -> int:
        """Memory that nobody has taken."""
        return torch.cuda.mem_get_info()[0]

    def allocate(self, size: int) -> Memory:
        """Zeroed memory of the device."""
        return Memory(torch.zeros(size, dtype=torch.uint8, device="cuda"))

    def pinned(self, words: int) -> np.ndarray:
        """Zeroed u32 words of the host that the device can read and write at the same address."""
        return torch.zeros(words, dtype=torch.int32, pin_memory=True).numpy().view(np.uint32)

    def prompt_runner(
        self, graph: Graph, weights: Mapping[str, tuple[Memory, np.ndarray]],
        caches: Mapping[str, tuple[Memory, tuple[int, ...]]], scales: Mapping[str, Scale],
    ) -> PromptRunner:  # fmt: skip
        """Prompts by PyTorch, over the same memory."""
        typed = {n: _tensor(m, a.dtype, a.shape) for n, (m, a) in weights.items()}
        pages = {n: m.tensor.view(torch.bfloat16).view(shape) for n, (m, shape) in caches.items()}
        return PromptRunner(graph, typed, pages, scales)

    def load(self, source: Source, kernel: str, shared_bytes: int) -> Kernel:
        """Compile (or find) and load one kernel."""
        cubin = compile_cubin(
            source.text, name=kernel, arch=self.arch, headers=source.headers,
            progress=self.progress,
        )  # fmt: skip
        library = _call(driver.cuLibraryLoadData(cubin.data, [], [], 0, [], [], 0))
        return Kernel(library, kernel, shared_bytes)
