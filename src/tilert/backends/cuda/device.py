"""One GPU: what it offers, its memory, loading kernels, launching them. All that speaks to the driver.

PyTorch, which takes seconds to import, is not needed to load a model and to make tokens. It shares the
primary context and computes prompts; everything but the copies of weights is queued on the context's
default stream, by PyTorch as well, so that what is queued later comes later.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from cuda.bindings import driver  # type: ignore[attr-defined]

from tilert.backends.cuda.copying import Piece, copy_all, pieces, raw_bytes
from tilert.backends.cuda.jit import compile_cubin
from tilert.backends.cuda.late import LateRunner, libraries
from tilert.backends.cuda.source import Source
from tilert.errors import UserError
from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.program import Scale

if TYPE_CHECKING:
    import torch

THREADS = 384  # kThreads + kLoaderThreads
DRIVER = 13000  # CUDA 13.0, as cuDriverGetVersion counts
STREAM = 0  # the default stream, which waits for what was queued before
# Weights are copied by so many threads with two buffers each. Allocating pinned memory takes about 0.3 ms
# per MB, so the buffers are small; smaller ones would ask for the interpreter's lock more often.
LANES, BUFFER = 8, 4 << 20
# Bytes of a thread's stack that a new context is given. The driver reserves them for all threads that the GPU
# can hold, 270,000 on an H100: its own 1,024 are 277 MB. A program's kernel takes 0 to 500. A launch whose
# kernel takes more than there is makes the driver reserve that, once.
STACK = 128


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _call(result: tuple[Any, ...]) -> Any:
    """The value of a driver call, or its values; RuntimeError when it failed."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorString(error)
        raise RuntimeError(f"CUDA: {name.decode() if name else error}")
    return (values[0] if len(values) == 1 else values) if values else None


class Context:
    """The primary context of a GPU, the one that PyTorch uses too. Calling it calls the driver."""

    def __init__(self, gpu: Any) -> None:
        _, active = _call(driver.cuDevicePrimaryCtxGetState(gpu))
        self.handle = _call(driver.cuDevicePrimaryCtxRetain(gpu))
        self._make_current = driver.cuCtxSetCurrent
        if not active:  # else it is as somebody else in this process wants it
            self(driver.cuCtxSetLimit, driver.CUlimit.CU_LIMIT_STACK_SIZE, STACK)

    def __call__(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        """The value of a call of the driver."""
        self.enter()
        return _call(function(*arguments))

    def enter(self) -> None:
        """Make it current in this thread: it may not be the one that opened the GPU."""
        _call(self._make_current(self.handle))

    def release(self, free: Callable[[Any], Any], what: Any) -> None:
        """Give something back. A context that an error of a kernel has ended holds nothing anymore."""
        self._make_current(self.handle)
        free(what)

    def keep(self, owner: Any, free: Callable[[Any], Any], what: Any) -> None:
        """Release something with its owner, but not at the end of the process, which frees it all."""
        weakref.finalize(owner, self.release, free, what).atexit = False


class _Allocation:
    """Memory of the device that is freed with this object."""

    def __init__(self, context: Context, size: int) -> None:
        context.enter()
        error, address = driver.cuMemAlloc(size)
        if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = (count / 1e9 for count in context(driver.cuMemGetInfo))
            raise UserError(
                f"the GPU has no {size / 1e9:.1f} GB left, which are needed in one piece:"
                f" {free:.1f} of {total:.1f} GB are free; other processes may use it"
            )
        self.context, self.address = context, int(_call((error, address)))
        context.keep(self, driver.cuMemFree, self.address)


class Memory:
    """Bytes of the device; they stay while this or a part of it does."""

    def __init__(self, owner: _Allocation, address: int, size: int) -> None:
        self._owner, self.address, self.size = owner, address, size

    def part(self, begin: int, size: int) -> Memory:
        """Bytes [begin, begin + size) of it."""
        assert begin >= 0 and begin + size <= self.size, f"{begin} + {size} of {self.size} bytes"
        return Memory(self._owner, self.address + begin, size)

    def write(self, values: np.ndarray) -> None:
        """Replace the first values.nbytes bytes."""
        raw = raw_bytes(values)
        assert raw.size <= self.size, f"{raw.size} bytes into {self.size}"
        self._owner.context(driver.cuMemcpyHtoD, self.address, raw.ctypes.data, raw.size)

    def read(self, begin: int, count: int, dtype: Any) -> np.ndarray:
        """A copy of `count` elements from byte `begin` on."""
        values = np.empty(count, dtype)
        assert begin + values.nbytes <= self.size, f"{begin} + {values.nbytes} of {self.size} bytes"
        address = self.address + begin
        self._owner.context(driver.cuMemcpyDtoH, values.ctypes.data, address, values.nbytes)
        return values

    def clear(self) -> None:
        """Set all bytes to zero, before what is launched later."""
        self._owner.context(driver.cuMemsetD8Async, self.address, 0, self.size, STREAM)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """For PyTorch, which keeps this object while it has tensors of it."""
        data = self.address, False
        return {"version": 3, "shape": (self.size,), "typestr": "|u1", "data": data}

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes as a tensor that shares them; imports PyTorch."""
        import torch

        return torch.as_tensor(self)


class Kernel:
    """A loaded kernel, launched with one block per worker; at most one launch is under way."""

    def __init__(self, context: Context, cubin: bytes, name: str, shared_bytes: int) -> None:
        self.context, self.shared_bytes = context, shared_bytes
        self._library = context(driver.cuLibraryLoadData, cubin, [], [], 0, [], [], 0)
        handle = context(driver.cuLibraryGetKernel, self._library, name.encode())
        self._function = context(driver.cuKernelGetFunction, handle)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        context(driver.cuFuncSetAttribute, self._function, attribute, shared_bytes)
        self.event = _event(context, self)

    def attribute(self, name: str) -> int:
        """What the driver knows of it: LOCAL_SIZE_BYTES (the stack of a thread), NUM_REGS, ..."""
        which = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return int(self.context(driver.cuFuncGetAttribute, which, self._function))

    def launch(self, blocks: int, params: ctypes.Structure) -> None:
        """Start all blocks together (a cooperative launch fails when they cannot be resident)."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        grid, block = (blocks, 1, 1), (THREADS, 1, 1)
        arguments = self.shared_bytes, STREAM, ctypes.addressof(pointers)
        self.context(driver.cuLaunchCooperativeKernel, self._function, *grid, *block, *arguments)
        self.context(driver.cuEventRecord, self.event, STREAM)

    def done(self) -> bool:
        """True when the last launch has ended."""
        self.context.enter()
        (state,) = driver.cuEventQuery(self.event)
        if state == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        _call((state,))
        return True

    def wait(self) -> None:
        """Until the last launch has ended."""
        self.context(driver.cuEventSynchronize, self.event)


def _event(context: Context, owner: Any) -> Any:
    """An event that goes with its owner."""
    event = context(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
    context.keep(owner, driver.cuEventDestroy, event)
    return event


class _Lane:
    """A stream and two pinned buffers: one is filled while the other is on its way."""

    def __init__(self, context: Context, buffers: Iterable[np.ndarray]) -> None:
        self.context = context
        # It must not wait for the default stream, where PyTorch may be busy.
        self.stream = context(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        context.keep(self, driver.cuStreamDestroy, self.stream)
        self.buffers = cycle([(buffer, _event(context, self)) for buffer in buffers])

    def copy(self, piece: Piece) -> None:
        """Begin to copy a piece that a buffer holds."""
        buffer, sent = next(self.buffers)
        size = piece.source.size
        self.context(driver.cuEventSynchronize, sent)  # at once when it was never recorded
        np.copyto(buffer[:size], piece.source)  # without the interpreter's lock
        self.context(driver.cuMemcpyHtoDAsync, piece.target, buffer.ctypes.data, size, self.stream)
        self.context(driver.cuEventRecord, sent, self.stream)

    def finish(self) -> None:
        """Until all bytes have arrived."""
        self.context(driver.cuStreamSynchronize, self.stream)


def _count() -> int:
    """GPUs that the driver offers; 0 without a driver."""
    try:
        (state,) = driver.cuInit(0)
        return _call(driver.cuDeviceGetCount()) if state == driver.CUresult.CUDA_SUCCESS else 0
    except RuntimeError:  # of the bindings, that find no driver
        return 0


def _current() -> int:
    """The number of the GPU that this thread uses already, or 0."""
    return int(_call(driver.cuCtxGetDevice())) if int(_call(driver.cuCtxGetCurrent())) else 0


class Device:
    """The current CUDA device. Raises UserError when there is none that the kernels run on."""

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        count = _count()
        if not count:
            raise UserError("there is no CUDA device; the back end 'cpu' runs without one")
        version = _call(driver.cuDriverGetVersion())
        if version < DRIVER:
            raise UserError(
                f"the GPU's driver speaks CUDA {_dotted(version)}; accepted is {_dotted(DRIVER)} or newer;"
                " the back end 'cpu' runs without a GPU"
            )
        number = _current()
        self._gpu = _call(driver.cuDeviceGet(number))
        self.name = _call(driver.cuDeviceGetName(256, self._gpu)).partition(b"\0")[0].decode()
        self.capability = (
            self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR")
        )  # fmt: skip
        if self.capability < (9, 0):
            raise UserError(
                f"{self.name} has compute capability {'.'.join(map(str, self.capability))}; accepted is"
                " 9.0 or newer; the back end 'cpu' runs without a GPU"
            )
        self.shared_bytes = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        known = {"H100": machine.H100, "H200": machine.H200, "B200": machine.B200}
        nearest = next((m for name, m in known.items() if name in self.name), machine.H100)
        workers = self._attribute("MULTIPROCESSOR_COUNT")
        self.machine = replace(nearest, workers_per_device=workers)
        self.progress = progress
        if progress and count > 1:
            progress(
                f"using GPU {number} ({self.name}) of {count}; CUDA_VISIBLE_DEVICES chooses another"
            )
        try:
            self.context = Context(self._gpu)
        except RuntimeError as error:
            raise UserError(
                f"GPU {number} ({self.name}) cannot be used: {error}; a process may hold it for itself"
            ) from error
        self.torch = libraries()

    def _attribute(self, name: str) -> int:
        which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return _call(driver.cuDeviceGetAttribute(which, self._gpu))

    @property
    def arch(self) -> str:
        """The target of the kernels, as the compiler names it."""
        return f"sm_{self.capability[0]}{self.capability[1]}a"

    def free_bytes(self) -> int:
        """Memory that nobody has taken."""
        return self.context(driver.cuMemGetInfo)[0]

    def allocate(self, size: int) -> Memory:
        """Memory of the device, which holds anything."""
        owner = _Allocation(self.context, max(size, 1))  # the driver refuses to allocate nothing
        return Memory(owner, owner.address, size)

    def pinned(self, words: int) -> np.ndarray:
        """Zeroed u32 words of the host that the device can read and write at the same address."""
        values = self._pinned(4 * words).view(np.uint32)
        values[:] = 0
        return values

    def _pinned(self, size: int) -> np.ndarray:
        flags = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
        address = int(self.context(driver.cuMemHostAlloc, size, flags))
        owner = (ctypes.c_uint8 * size).from_address(address)  # the array below keeps it
        self.context.keep(owner, driver.cuMemFreeHost, address)
        return np.frombuffer(memoryview(owner), np.uint8)

    def upload(
        self, parts: Iterable[tuple[Memory, np.ndarray]], progress: Callable[[int], None]
    ) -> None:
        """Write many arrays; `progress` is told of bytes that are under way, many times."""
        staging = self._pinned(LANES * 2 * BUFFER).reshape(LANES, 2, BUFFER)
        lanes = [_Lane(self.context, buffers) for buffers in staging]
        copy_all(pieces(((a, m.address) for m, a in parts), BUFFER), lanes, progress)

    def prompt_runner(
        self, graph: Graph, weights: Mapping[str, tuple[Memory, tuple[int, ...], DType]],
        caches: Mapping[str, tuple[Memory, tuple[int, ...], DType]], scales: Mapping[str, Scale],
    ) -> LateRunner | None:  # fmt: skip
        """Prompts by PyTorch, over the same memory; None where it is not installed."""
        return self.torch and LateRunner(self.torch, graph, weights, caches, scales)

    def load(self, source: Source, kernel: str, shared_bytes: int) -> Kernel:
        """Compile (or find) and load one kernel."""
        cubin = compile_cubin(
            source.text, name=kernel, arch=self.arch, headers=source.headers,
            progress=self.progress,
        )  # fmt: skip
        return Kernel(self.context, cubin.data, kernel, shared_bytes)
