"""One program on one GPU: its tables in device memory, launches, and tokens as they are made.

A launch makes many steps. The kernel leaves each token in pinned memory, where the host finds it
while the next one is being made; a flag there ends the launch within one token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Mapping
from shlex import quote
from typing import Any, Protocol

import numpy as np

from tilert.backends.cuda.limits import fitting, shared_bytes
from tilert.backends.cuda.source import KERNEL, Source, generate, passes
from tilert.backends.cuda.tables import RANK_SHIFT, queues, tables
from tilert.backends.hang import Hang, save
from tilert.ir.dtype import DType
from tilert.ir.program import PAGE, Kind, Program
from tilert.ir.tags import derive
from tilert.ops import Attend, IndexRope, LatentAppend, Report
from tilert.ops.draw import BIASED, CONTROLS, COUNTED, MASKED
from tilert.ops.logprobs import REPORT_HEAD, REPORT_WORDS

MAX_STEPS = 16384  # of one launch
MAX_TOKENS = 8  # kMaxTokens
MAX_STOPS = 16
COUNTER_PITCH = 32  # words
CHOICE_SHIFT = 8  # kChoiceShift of numbers with tags
UNSET = 0xFFFFFFFF  # a letter that has not come
NO_TOKEN = 0xFFFFFFFE  # kNoToken
FAILED = 2  # enum Verdict
SAMPLING = {"controls": 0, "mask": MASKED, "biases": BIASED, "tally": COUNTED}  # flag that needs it
FAILURE_BYTES = 20  # struct Failure


class Memory(Protocol):
    """Memory of a device."""

    address: int
    size: int  # bytes

    def part(self, begin: int, size: int) -> Memory:
        """Bytes [begin, begin + size) of it."""
        ...

    def write(self, values: np.ndarray) -> None:
        """Replace the first values.nbytes bytes."""
        ...

    def read(self, begin: int, count: int, dtype: Any) -> np.ndarray:
        """A copy of `count` elements from byte `begin` on."""
        ...

    def clear(self) -> None:
        """Set all bytes to zero."""
        ...


class Kernel(Protocol):
    """A loaded kernel; at most one launch is under way."""

    def launch(self, blocks: int, params: ctypes.Structure) -> None:
        """Start all blocks together."""
        ...

    def done(self) -> bool:
        """True when the last launch has ended."""
        ...

    def wait(self) -> None:
        """Until the last launch has ended."""
        ...


class Device(Protocol):
    """What the back end needs of a GPU. There are two: device.py, and the emulator of the tests."""

    name: str
    shared_bytes: int  # of a block, at most

    def allocate(self, size: int) -> Memory:
        """Memory of the device, which holds anything."""
        ...

    def pinned(self, words: int) -> np.ndarray:
        """Zeroed u32 words of the host that the device can read and write at the same address."""
        ...

    def load(self, source: Source, kernel: str, shared_bytes: int) -> Kernel:
        """Compile and load a kernel."""
        ...


class LaunchError(RuntimeError):
    """A launch ended without making its tokens: a wait that never held, or an error of the device."""


class _Params(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("queues", "queue_begin", "run_begin", "counters", "arena", "tokens", "passes",
                     "pages", "stop_ids", "mailbox", "reports", "cancel", "verdict", "failures", "stamps")
    ] + [(name, ctypes.c_uint32 * MAX_TOKENS) for name in ("positions", "sequences")
    ] + [(name, ctypes.c_uint32) for name in ("count", "page_cols", "steps")]  # fmt: skip


def cache_shapes(program: Program, pages: int) -> dict[str, tuple[int, int, int, int]]:
    """Shape [pages, kv_heads, 64, head_dim] of each cache by buffer name; latents and what an indexer keeps
    are of one head."""
    shapes: dict[str, tuple[int, int, int, int]] = {}
    for op in program.ops:
        if isinstance(op, Attend):
            for buf in (op.k_cache, op.v_cache):
                shapes[program.buffers[buf].name] = (pages, op.kv_heads, PAGE, op.head_dim)
        elif isinstance(op, LatentAppend | IndexRope):
            latent = isinstance(op, LatentAppend)
            for buf in (op.latent_cache,) if latent else (op.index_cache, op.index_scale):
                b = program.buffers[buf]
                shapes[b.name] = (pages, 1, PAGE, b.cols)
    return shapes


def swizzle(head_dim: int) -> np.ndarray:
    """Where element e of row r of a page is stored: [64, head_dim] columns, each row its own inverse.

    The 16-byte pieces of a row are permuted so that the matrix units read eight rows without bank
    conflicts; `swizzle` of attend.cuh is the same function.
    """
    pieces = head_dim // 8
    mask = next(m for m in (7, 3, 1, 0) if pieces % (m + 1) == 0)
    e, rows = np.arange(head_dim), np.arange(PAGE)[:, None]
    return (e // 8 ^ rows & mask) * 8 + e % 8


class CudaBackend:
    """A program of up to 8 tokens per step, bound to weights and caches on `device`.

    In `state`, tokens of one sequence stand together and at consecutive positions; with several tokens
    every one has an output.
    weights: address by buffer name, of the bytes as stored. caches: likewise, in the shapes of cache_shapes;
    pages in bf16 are swizzled as attend.cuh says. Whoever gives addresses keeps what lies there.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, int],
        caches: Mapping[str, int],
        device: Device,
    ) -> None:
        assert program.tokens == program.outputs <= MAX_TOKENS, "every token has an output"
        self.program, self.device = program, device
        self.layout = fitting(program, device.shared_bytes)
        source = generate(program, self.layout)
        self.kernel = self._load(source)
        # Stamps and steps of the last launch, when it was traced.
        self._traced: tuple[Memory, int] | None = None
        self._tracing = False
        self._asked = _Params()  # of the last launch
        states = (b for b in program.buffers if b.kind is Kind.STATE)
        self.state = {b.name: np.zeros((b.rows, b.cols), b.dtype.numpy) for b in states}
        # What the ops of draw.cuh read, when the program has them.
        self.sampling = {
            name: device.allocate(a.nbytes) for name, a in self.state.items() if name in SAMPLING
        }
        self.stop_ids: tuple[int, ...] = ()
        homes = {name: memory.address for name, memory in self.sampling.items()}
        # What the host gives for every token lies behind the activations.
        first, given = -(-program.arena_bytes // 64) * 64, self.state.get("given")
        self.arena = device.allocate(first + (0 if given is None else given.nbytes))
        if given is not None:
            homes["given"], self.given = first // 4, self.arena.part(first, given.nbytes)
        assert first < 4 << RANK_SHIFT, "offsets in the arena are words of 24 bits"
        self.counters = device.allocate(4 * COUNTER_PITCH * len(program.counters))
        self.outcome = device.allocate(4 + FAILURE_BYTES * len(program.queues))  # verdict, failures
        self.runs, self.waits = queues(  # see `tables`
            program, source.variants, weights, caches, homes, self.arena.address
        )
        self.tables = {
            name: self._upload(table)
            for name, table in tables(program, self.layout, self.runs, self.waits).items()
        }
        self.passes = passes(program)[-1]
        own = 2 * self.passes + 2 * program.tokens  # struct Passes
        # Stop ids, token ids, passes, page tables.
        self.inputs = device.allocate(4 * (MAX_STOPS + MAX_TOKENS + own + self.state["pages"].size))
        self.mailbox = device.pinned(MAX_STEPS * program.tokens + 1)  # at the end the cancel flag
        self.reports = np.zeros((0, REPORT_WORDS), np.uint32)
        if isinstance(program.ops[-1], Report):
            self.reports = device.pinned(MAX_STEPS * REPORT_WORDS).reshape(-1, REPORT_WORDS)

    def _load(self, source: Source) -> Kernel:
        return self.device.load(source, KERNEL, shared_bytes(self.program, self.layout))

    def trace(self, enabled: bool) -> None:
        """Record the times of every run from the next launch on, or stop doing so.

        Another kernel does it: the one that does not trace has nothing of it.
        """
        self._tracing = enabled
        self.kernel = self._load(generate(self.program, self.layout, trace=enabled))

    def records(self) -> np.ndarray:
        """int64 [runs, 6] of the last launch: worker, run, step, wait begin, start, end; times in ns.

        `run` counts from the start of the worker's queue. Empty when the launch was not traced or was cut
        short.
        """
        if self._traced is None:
            return np.zeros((0, 6), np.int64)
        stamps, steps = self._traced
        lengths = [len(q) for q in self.program.queues]
        total = sum(lengths)
        times = stamps.read(0, 3 * total * steps, np.int64).reshape(-1, 3)
        if not times.all():
            return np.zeros((0, 6), np.int64)
        worker = np.repeat(np.arange(len(lengths)), lengths)
        run = np.concatenate([np.arange(length) for length in lengths])
        step = np.repeat(np.arange(steps), total)
        where = np.stack([np.tile(worker, steps), np.tile(run, steps), step], axis=1)
        return np.concatenate([where, times - times.min()], axis=1)

    def _upload(self, array: np.ndarray) -> Memory:
        memory = self.device.allocate(max(array.nbytes, 16))
        memory.write(array)
        return memory

    def read(self, name: str) -> np.ndarray:
        """A copy of an activation, in words of f32 whatever they are."""
        index = self.program.buffer_ids[name]
        b = self.program.buffers[index]
        assert b.kind is Kind.WORK, f"{name} is not an activation"
        words = self.arena.read(b.offset, b.rows * b.cols, np.float32).reshape(b.rows, b.cols)
        if b.dtype is DType.I32 and index in derive(self.program).writers:
            words = (words.view(np.int32) >> CHOICE_SHIFT).view(np.float32)
        return words

    def steps(self, count: int) -> Generator[np.ndarray, None, None]:
        """Run up to `count` steps; after each, the sampled token ids, in a program that makes guesses -1
        behind the last (and the state `report`, where the program has it). Closing it cancels the rest.

        Ends early after an id of `stop_ids`, if the tokens of a step are of one sequence. Raises LaunchError
        when a wait of the kernel never held.
        """
        assert 1 <= count <= MAX_STEPS, f"{count} steps in one launch"
        rows, width = int(self.state["counts"][0, 0]), self.program.tokens
        self._launch(count)
        try:
            for index in range(count):
                tokens = [self._receive(self.mailbox, index * width + row) for row in range(rows)]
                if None in tokens or not self._told(index):
                    return
                if self.passes > 1:
                    tokens = [-1 if token == NO_TOKEN else token for token in tokens]
                    self.state["positions"][0, :rows] += rows - tokens.count(-1)
                else:
                    self.state["tokens"][0, :rows] = tokens
                    self.state["positions"][0, :rows] += 1
                yield np.asarray(tokens, np.int32)
        finally:
            self.mailbox[-1] = 1
            self.kernel.wait()
        self._check()
        if self.passes > 1:  # what the last step has guessed
            self.state["tokens"][0, :rows] = self.inputs.read(4 * MAX_STOPS, rows, np.int32)

    def _launch(self, steps: int) -> None:
        self.kernel.launch(len(self.program.queues), self.prepare(steps))

    def prepare(self, steps: int) -> ctypes.Structure:
        """Everything on the device as it is before a launch of so many steps; the kernel's parameters."""
        state, rows = self.state, int(self.state["counts"][0, 0])
        assert rows == state["counts"][0, 1] and 1 <= rows <= self.program.tokens, (
            "a row per output"
        )
        _check_spans(state["sequences"][0, :rows].tolist(), state["positions"][0, :rows].tolist())
        stops, tokens = np.full(MAX_STOPS, -1, np.int32), np.zeros(MAX_TOKENS, np.int32)
        stops[: len(self.stop_ids)] = self.stop_ids
        tokens[:rows] = state["tokens"][0, :rows]
        own = np.zeros(2 * self.passes + 2 * self.program.tokens, np.int32)
        own[: 2 * self.passes] = [0, 1] * self.passes
        own[:2] = state["positions"][0, 0], rows
        given = np.concatenate([stops, tokens, own, state["pages"].ravel()])
        self.inputs.write(given.astype(np.int32))
        self.arena.clear()  # no word has a tag from an earlier launch
        if "given" in state:
            self.given.write(state["given"])
        for name, memory in self.sampling.items():
            if name == "controls" or state["controls"][0, 0] & SAMPLING[name]:
                memory.write(state[name])
        self.counters.clear()
        self.outcome.clear()
        self.mailbox[: steps * self.program.tokens] = UNSET
        self.reports[:steps] = UNSET
        self.mailbox[-1] = 0
        self._traced = None
        if self._tracing:
            runs = sum(map(len, self.program.queues))
            stamps = self.device.allocate(24 * runs * steps)
            stamps.clear()  # zeros stay where a worker did not come to
            self._traced = stamps, steps
        inputs, box = self.inputs.address, self.mailbox.ctypes.data
        params = _Params(
            **{name: memory.address for name, memory in self.tables.items()},
            counters=self.counters.address, arena=self.arena.address, stop_ids=inputs,
            tokens=inputs + 4 * MAX_STOPS, passes=inputs + 4 * (MAX_STOPS + MAX_TOKENS),
            pages=inputs + 4 * (MAX_STOPS + MAX_TOKENS + own.size), mailbox=box,
            reports=self.reports.ctypes.data,
            cancel=box + 4 * (self.mailbox.size - 1), verdict=self.outcome.address,
            stamps=self._traced[0].address if self._traced else None,
            failures=self.outcome.address + 4, page_cols=state["pages"].shape[1], steps=steps,
            count=rows,
        )  # fmt: skip
        params.positions[:rows] = state["positions"][0, :rows].tolist()
        params.sequences[:rows] = state["sequences"][0, :rows].tolist()
        self._asked = params
        return params

    def _receive(self, box: np.ndarray, index: int) -> int | None:
        """A letter of the mailbox or of a report; None when the launch ended before it."""
        spins = 0
        while (word := int(box[index])) == UNSET:
            spins += 1
            if spins % 1024 == 0 and self.kernel.done():
                self._check()
                last = int(box[index])  # it may have come just before the end
                return None if last == UNSET else last
        return word

    def _told(self, step: int) -> bool:
        """Take the report of a step into the state, word by word as they come; False when there is none
        because the step ended the launch without one."""
        if not len(self.reports):
            return True
        asked = int(self.state["controls"].view(CONTROLS)[0, 0]["logprobs"])
        size = REPORT_HEAD + 2 * asked
        words = [self._receive(self.reports[step], index) for index in range(size)]
        if None in words:
            return False
        report = self.state["report"][0]
        report[:], report[:size] = 0, np.asarray(words, np.uint32).view(np.int32)
        return True

    def _check(self) -> None:
        self.kernel.wait()
        verdict, *words = self.outcome.read(0, 1 + 5 * len(self.program.queues), np.uint32).tolist()
        if verdict == FAILED:
            raise LaunchError(self._explain(np.reshape(words, (-1, 5)).tolist()))

    def _explain(self, failures: list[list[int]]) -> str:
        """What the failed launch waited for, and where its record lies for whoever wants to replay it.

        failures: struct Failure of each worker; `want` is 0 where it was not waiting.
        """
        asked = self._asked
        hang = Hang(
            self.program, asked.steps, tuple(asked.positions[: asked.count]),
            tuple(asked.sequences[: asked.count]), tuple(map(tuple, failures)),
        )  # fmt: skip
        path = save(hang)
        return hang.cause() + (
            f"; for the reason: tilert replay {quote(str(path))}" if path else ""
        )


def _check_spans(sequences: list[int], positions: list[int]) -> None:
    """The kernel takes tokens of one sequence together, each after the one before it."""
    ends = [i for i in range(1, len(sequences)) if sequences[i] != sequences[i - 1]]
    assert len(ends) + 1 == len(set(sequences)), "tokens of one sequence stand together"
    steps = [positions[i] - positions[i - 1] for i in range(1, len(positions)) if i not in ends]
    assert all(step == 1 for step in steps), "at consecutive positions"
