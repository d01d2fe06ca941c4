"""The CPU back end: a program run by C++ threads, one worker each.

Python owns all memory as numpy arrays and checks what it is given; the extension module gets addresses
and runs whole launches. Knows programs and ops; knows no model and no compiler. Caches are stored as
the kernels read them: keys [page, kv_head, head_dim, position], values [page, kv_head, position,
head_dim], latents and keys of indexers [page, position, columns], 64 positions per page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing

import numpy as np

from tilert.backends.cpu import _core
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.encode import to_bytes
from tilert.ir.program import PAGE, Buf, Buffer, Kind, Program
from tilert.ops import Attention, IndexRope, IndexScore, LatentAppend, LatentAttention, Rope
from tilert.ops.mla import cache_cols

__all__ = ["CpuBackend", "Pool", "allocate_caches", "make_pool"]

ALIGN = 64  # bytes; a cache line
MAX_THREADS = 1024
ISAS = ("portable", "avx2", "avx512")
LOOK = 0.1  # seconds between looks for KeyboardInterrupt while waiting
TRACE_COLUMNS = ("worker", "run", "step", "wait_begin", "start", "end")


class Pool:
    """`size` threads that sleep between launches; the programs of one model share it and take turns.

    Thread i is bound to the i-th CPU that the process may use, when there are at least `size`. `isa`
    names the kernels that they run: portable, avx2 or avx512.
    """

    def __init__(self, threads: int, isa: str) -> None:
        self.core, self.isa = _core.Pool(threads), isa

    @property
    def size(self) -> int:
        """Number of threads."""
        return self.core.size

    def measure_read_rate(self, arrays: Sequence[np.ndarray]) -> float:
        """Bytes per second at which all threads together read `arrays` once, with plain loads."""
        return self.core.read_rate(self.isa, [_address(array) for array in arrays])


def make_pool(threads: int | None = None) -> Pool:
    """A pool of `threads`, by default one for each CPU that the process may use.

    The environment variable TILERT_CPU_ISA chooses among the kernels; the best ones that this machine
    can run by default. Raises UserError for a number of threads outside 1 to 1024 and for kernels that
    do not exist or that this machine cannot run.
    """
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    if not 1 <= threads <= MAX_THREADS:
        raise UserError(f"threads is {threads}; accepted are 1 to {MAX_THREADS}")
    wanted = os.environ.get("TILERT_CPU_ISA", "")
    isa = _core.find_isa(wanted)
    if isa is None:
        good = [name for name in ISAS if _core.find_isa(name)]
        raise UserError(
            f"TILERT_CPU_ISA is '{wanted}'; this machine accepts {', '.join(good)}, or none for the best"
        )
    try:
        return Pool(threads, isa)
    except RuntimeError as error:
        raise UserError(f"cannot start {threads} threads: {error}") from error


def cache_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shape of one page of each cache, by the name of its buffer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for op in program.ops:
        if isinstance(op, Rope | Attention):
            name = {b: program.buffers[b].name for b in (op.k_cache, op.v_cache)}
            shapes[name[op.k_cache]] = (op.kv_heads, op.head_dim, PAGE)
            shapes[name[op.v_cache]] = (op.kv_heads, PAGE, op.head_dim)
        elif isinstance(op, LatentAppend | LatentAttention):
            shapes[program.buffers[op.latent_cache].name] = (PAGE, cache_cols(op))
        elif isinstance(op, IndexRope | IndexScore):
            shapes[program.buffers[op.index_cache].name] = (PAGE, op.head_dim)
    return shapes


def allocate_caches(program: Program, pages: int) -> dict[str, np.ndarray]:
    """Zeroed caches of `pages` pages for all layers; memory is taken when it is first written."""
    types = {b.name: b.dtype.numpy for b in program.buffers}
    shapes = cache_shapes(program)
    return {name: np.zeros((pages, *shape), types[name]) for name, shape in shapes.items()}


class CpuBackend:
    """One program bound to its weights, to caches that programs may share, and to a pool.

    weights and caches: arrays by buffer name. Raises UserError when a weight is absent or has another
    shape, dtype or layout than the program says, and when the program needs what this back end lacks.
    """

    allocate_caches = staticmethod(allocate_caches)

    def __init__(
        self, program: Program, weights: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray],
        pool: Pool, *, wait_limit: float = 60.0,
    ) -> None:  # fmt: skip
        """wait_limit: seconds after which a worker's wait counts as a deadlock and ends the launch."""
        _check_runnable(program, pool)
        self.program = program
        arena = _aligned(program.arena_bytes)
        pages = cache_shapes(program)
        self._parts: list[list[np.ndarray]] = []  # of each buffer; one, but for banks
        banks = {
            b.scale: b.bank for b in program.buffers
        }  # scales have a part for each matrix, too
        for buf, buffer in enumerate(program.buffers):
            if buffer.kind is Kind.WEIGHT:
                bank = max(buffer.bank, banks.get(Buf(buf), 1))
                self._parts.append(_weight(buffer, bank, weights))
            elif buffer.kind is Kind.CACHE:
                self._parts.append([_cache(buffer, caches, pages)])
            elif buffer.kind is Kind.STATE:
                self._parts.append([_typed(_aligned(buffer.bytes), buffer)])
            else:
                raw = arena[buffer.offset : buffer.offset + buffer.bytes]
                self._parts.append([_typed(raw, buffer)])
        described = zip(program.buffers, self._parts, strict=True)
        self.state = {b.name: parts[0] for b, parts in described if b.kind is Kind.STATE}
        addresses = [[_address(array) for array in parts] for parts in self._parts]
        self._core = _core.Executor(pool.core, pool.isa, to_bytes(program), addresses, self._parts)
        self._core.set_wait_limit(wait_limit)
        self._trace = False

    def read(self, name: str) -> np.ndarray:
        """A view of an activation or state buffer; the next launch overwrites it."""
        buf = self.program.buffer_ids[name]
        assert self.program.buffers[buf].kind in (Kind.WORK, Kind.STATE), f"{name} has other owners"
        return self._parts[buf][0]

    def steps(self, count: int) -> Generator[np.ndarray, None, None]:
        """Run `count` steps; gives the sampled ids [outputs] of each as soon as it is known.

        The launch goes on while the caller works on a token. Closing the iterator, or any exception
        while it waits, cancels: steps that a worker has begun are finished, no other is begun, and the
        threads are idle again; the state may then be some steps ahead of the last ids given. Raises
        RuntimeError when the program was aborted: a wait took longer than the limit, or state names a
        token, position or page that does not exist.
        """
        assert count >= 1, f"{count} steps"
        outputs, columns = int(self.state["counts"][0, 1]), self.program.outputs
        self._core.launch(count, self._trace)
        done, running = 0, True
        try:
            while running and done < count:
                completed, running = self._core.wait(done + 1, LOOK)
                rows = np.frombuffer(self._core.history(done, completed), np.int32)
                for row in rows.reshape(-1, columns):
                    yield row[:outputs].copy()
                done = completed
        finally:
            self._core.cancel()
            self._core.finish()

    def run(
        self, steps: int = 1, on_token: Callable[[np.ndarray], bool] | None = None
    ) -> list[np.ndarray]:
        """Run up to `steps` steps and return the sampled ids [outputs] of each.

        on_token is called with each step's ids while later steps go on; when it returns True, that
        step is the last in the list.
        """
        made = []
        with closing(self.steps(steps)) as launched:
            for sampled in launched:
                made.append(sampled)
                if on_token is not None and on_token(sampled):
                    break
        return made

    def trace(self, enabled: bool) -> None:
        """Record the times of every run from the next launch on, or stop doing so."""
        self._trace = enabled

    def records(self) -> np.ndarray:
        """int64 [runs, 6] of the last launch, columns as in TRACE_COLUMNS; times in ns of one clock.

        `run` counts from the start of the worker's queue. Empty when the launch was not traced.
        """
        return np.frombuffer(self._core.trace(), np.int64).reshape(-1, len(TRACE_COLUMNS))


def _check_runnable(program: Program, pool: Pool) -> None:
    machine = program.machine
    lacks = "the CPU back end does not run it"
    if machine.devices > 1:
        raise UserError(f"the program is for {machine.devices} devices; {lacks}")
    if machine.slots or any(run.ring >= 0 for queue in program.queues for run in queue):
        raise UserError(f"the program of machine '{machine.name}' streams through rings; {lacks}")
    if len(program.queues) > pool.size:
        raise UserError(
            f"the program has {len(program.queues)} workers, but the pool has {pool.size} threads"
        )


def _weight(buffer: Buffer, bank: int, weights: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The tensors of a weight, used where they lie: the `bank` matrices of a bank, else one."""
    names = buffer.parts
    assert len(names) in (1, bank), f"{buffer.label} must be copied into one"
    rows = buffer.rows // len(names)
    return [_part(name, (rows, buffer.cols), buffer.dtype, weights) for name in names]


def _part(
    name: str, shape: tuple[int, int], dtype: DType, weights: Mapping[str, np.ndarray]
) -> np.ndarray:
    array = weights.get(name)
    if array is None:
        raise UserError(f"weight '{name}' is missing")
    if array.shape != shape and not (shape[0] == 1 and array.shape == shape[1:]):
        raise UserError(f"weight '{name}' has shape {array.shape}; the program needs {shape}")
    if array.dtype != dtype.numpy:
        raise UserError(f"weight '{name}' has dtype {array.dtype}; the program needs {dtype.numpy}")
    if not array.flags.c_contiguous:
        raise UserError(f"weight '{name}' is not contiguous; its rows must follow each other")
    return array


def _cache(
    buffer: Buffer, caches: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> np.ndarray:
    assert buffer.name in shapes, f"cache {buffer.name} is used by no op"
    array, shape = caches.get(buffer.name), shapes[buffer.name]
    assert array is not None, f"cache {buffer.name} is missing"
    good = array.shape[1:] == shape and array.dtype == buffer.dtype.numpy
    assert good and array.flags.c_contiguous and array.flags.writeable, (
        f"cache {buffer.name} is {array.dtype} {array.shape}, wanted {buffer.dtype.numpy} [pages, {shape}]"
    )
    return array


def _aligned(size: int) -> np.ndarray:
    """`size` zeroed bytes that start at a cache line."""
    raw = np.zeros(size + ALIGN, np.uint8)
    first = -raw.ctypes.data % ALIGN
    return raw[first : first + size]


def _typed(raw: np.ndarray, buffer: Buffer) -> np.ndarray:
    return raw.view(buffer.dtype.numpy).reshape(buffer.rows, buffer.cols)


def _address(array: np.ndarray) -> tuple[int, int]:
    return array.ctypes.data, array.nbytes
