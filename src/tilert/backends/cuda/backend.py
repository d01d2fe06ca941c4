"""One program on one GPU: its tables in device memory, launches, and tokens as they are made.

A launch makes many steps. The kernel leaves each token in pinned memory, where the host finds it
while the next one is being made; a flag there ends the launch within one token.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Generator, Mapping
from shlex import quote
from typing import Any, Protocol

import numpy as np

from tilert.backends.cuda.limits import RUN_BYTES, fitting_slots, shared_bytes
from tilert.backends.cuda.source import KERNEL, Source, generate
from tilert.backends.hang import Hang, save
from tilert.ir.program import NONE, PAGE, Buf, Kind, Op, Program, Run
from tilert.ir.tags import TAGS, Tags, derive
from tilert.ops import (
    Adjust,
    Argmax,
    Attend,
    Bins,
    Combine,
    Draw,
    Embed,
    ExpertDown,
    ExpertGate,
    IndexRope,
    IndexScore,
    LatentAttention,
    LatentRope,
    Linear,
    NextToken,
    Report,
    Route,
    Select,
    Sift,
    Survey,
    Totals,
)
from tilert.ops.draw import BIASED, CONTROLS, COUNTED, MASKED
from tilert.ops.linear import ADD
from tilert.ops.logprobs import REPORT_HEAD, REPORT_WORDS

MAX_STEPS = 16384  # of one launch
MAX_TOKENS = 8  # kMaxTokens
MAX_STOPS = 16
COUNTER_PITCH = 32  # words
UNSET = 0xFFFFFFFF  # a letter that has not come
NO_SIGNAL = 0xFFFF
FAILED = 2  # enum Verdict
RANK_SHIFT = 24  # kRankShift
SAMPLING = {"controls": 0, "mask": MASKED, "biases": BIASED, "tally": COUNTED}  # flag that needs it
FAILURE_BYTES = 20  # struct Failure
RUN = np.dtype(  # struct Run
    [(name, "<u2") for name in ("variant", "wait_begin", "wait_count", "signal")]
    + [(name, "<u4") for name in ("first", "count")]
    + [
        (name, "<u8")
        for name in ("w", "w_up", "norm", "norm2", "bias", "bias_up", "scale", "scale_up")
    ]
    + [(name, "<u4") for name in ("x", "y", "x2", "x3")]
)
assert RUN.itemsize == RUN_BYTES


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
        for name in ("runs", "run_begin", "waits", "wait_begin", "totals", "counters", "arena", "tokens",
                     "pages", "stop_ids", "mailbox", "reports", "cancel", "verdict", "failures", "stamps",
                     "clocks")
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
        elif isinstance(op, LatentRope | IndexRope):
            latent = isinstance(op, LatentRope)
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
        self.slots = fitting_slots(program, device.shared_bytes)
        source = generate(program, self.slots)
        self.kernel = self._load(source)
        # Stamps, clocks and steps of the last launch, when it was traced.
        self._traced: tuple[Memory, Memory, int] | None = None
        self._tracing = False
        self._asked = _Params()  # of the last launch
        states = (b for b in program.buffers if b.kind is Kind.STATE)
        self.state = {b.name: np.zeros((b.rows, b.cols), b.dtype.numpy) for b in states}
        # What the ops of draw.cuh read, when the program has them.
        self.sampling = {
            name: device.allocate(a.nbytes) for name, a in self.state.items() if name in SAMPLING
        }
        self.stop_ids: tuple[int, ...] = ()
        assert program.arena_bytes < 4 << RANK_SHIFT, "offsets in the arena are words of 24 bits"
        homes = {name: memory.address for name, memory in self.sampling.items()}
        self.arena = device.allocate(program.arena_bytes)
        self.counters = device.allocate(4 * COUNTER_PITCH * len(program.counters))
        self.outcome = device.allocate(4 + FAILURE_BYTES * len(program.queues))  # verdict, failures
        self.tables = {
            name: self._upload(table)
            for name, table in _tables(
                program, source.variants, weights, caches, homes, self.arena.address
            ).items()
        }
        # Stop ids, token ids, page tables.
        self.inputs = device.allocate(4 * (MAX_STOPS + MAX_TOKENS + self.state["pages"].size))
        self.mailbox = device.pinned(MAX_STEPS * program.tokens + 1)  # at the end the cancel flag
        self.reports = np.zeros((0, REPORT_WORDS), np.uint32)
        if isinstance(program.ops[-1], Report):
            self.reports = device.pinned(MAX_STEPS * REPORT_WORDS).reshape(-1, REPORT_WORDS)

    def _load(self, source: Source) -> Kernel:
        return self.device.load(source, KERNEL, shared_bytes(self.program, self.slots))

    def trace(self, enabled: bool) -> None:
        """Record the times of every run from the next launch on, or stop doing so.

        Another kernel does it: the one that does not trace has nothing of it.
        """
        self._tracing = enabled
        self.kernel = self._load(generate(self.program, self.slots, trace=enabled))

    def records(self) -> np.ndarray:
        """int64 [runs, 6] of the last launch: worker, run, step, wait begin, start, end; times in ns.

        `run` counts from the start of the worker's queue. Each worker's cycles are laid over the clock
        that all share by two readings of both. Empty when the launch was not traced or was cut short.
        """
        if self._traced is None:
            return np.zeros((0, 6), np.int64)
        stamps, clocks, steps = self._traced
        workers, lengths = len(self.program.queues), [len(q) for q in self.program.queues]
        total = sum(lengths)
        cycles = stamps.read(0, 3 * total * steps, np.int64).reshape(steps, total, 3)
        clock = clocks.read(0, 4 * workers, np.int64).reshape(workers, 2, 2)  # [.., which, when]
        if not (clock[:, :, 1] > 0).all():
            return np.zeros((0, 6), np.int64)
        worker = np.repeat(np.arange(workers), lengths)
        run = np.concatenate([np.arange(length) for length in lengths])
        rate = np.diff(clock[:, 1])[:, 0] / np.diff(clock[:, 0])[:, 0]  # ns per cycle
        times = (cycles - clock[worker, 0, 0][:, None]) * rate[worker][:, None]
        times += (clock[:, 1, 0] - clock[:, 1, 0].min())[worker][:, None]
        step = np.repeat(np.arange(steps), total)
        where = np.stack([np.tile(worker, steps), np.tile(run, steps), step], axis=1)
        return np.concatenate([where, times.reshape(-1, 3).round().astype(np.int64)], axis=1)

    def _upload(self, array: np.ndarray) -> Memory:
        memory = self.device.allocate(max(array.nbytes, 16))
        memory.write(array)
        return memory

    def read(self, name: str) -> np.ndarray:
        """A copy of an activation."""
        b = self.program.buffers[self.program.buffer_ids[name]]
        assert b.kind is Kind.WORK, f"{name} is not an activation"
        return self.arena.read(b.offset, b.rows * b.cols, np.float32).reshape(b.rows, b.cols)

    def steps(self, count: int) -> Generator[np.ndarray, None, None]:
        """Run up to `count` steps; after each, the sampled token ids (and the state `report`, where the
        program has it). Closing it cancels the rest.

        Ends early after an id of `stop_ids`, if the program makes one token per step. Raises LaunchError
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
                self.state["tokens"][0, :rows] = tokens
                self.state["positions"][0, :rows] += 1
                yield np.asarray(tokens, np.int32)
        finally:
            self.mailbox[-1] = 1
            self.kernel.wait()
        self._check()

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
        self.inputs.write(np.concatenate([stops, tokens, state["pages"].ravel()]).astype(np.int32))
        self.arena.clear()  # no word has a tag from an earlier launch
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
            workers, runs = len(self.program.queues), sum(map(len, self.program.queues))
            stamps, clocks = (
                self.device.allocate(size) for size in (24 * runs * steps, 32 * workers)
            )
            for memory in (stamps, clocks):
                memory.clear()  # zeros stay where a worker did not come to
            self._traced = stamps, clocks, steps
        inputs, box = self.inputs.address, self.mailbox.ctypes.data
        params = _Params(
            **{name: memory.address for name, memory in self.tables.items()},
            counters=self.counters.address, arena=self.arena.address, stop_ids=inputs,
            tokens=inputs + 4 * MAX_STOPS, pages=inputs + 4 * (MAX_STOPS + MAX_TOKENS), mailbox=box,
            reports=self.reports.ctypes.data,
            cancel=box + 4 * (self.mailbox.size - 1), verdict=self.outcome.address,
            stamps=self._traced[0].address if self._traced else None,
            clocks=self._traced[1].address if self._traced else None,
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


def _tables(
    program: Program, variants: list[int], weights: Mapping[str, int], caches: Mapping[str, int],
    states: Mapping[str, int], arena: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The read-only tables of struct Params, with all operands resolved to addresses.

    states: where the state buffers are that ops find through their run; others come with Params.
    arena: where it begins.
    """
    tags = derive(program)
    homes = {Kind.WEIGHT: weights, Kind.CACHE: caches}
    at = [
        homes[b.kind][b.name] if b.kind in homes else states.get(b.name, b.offset // 4)
        for b in program.buffers
    ]
    choices = _choices(program)
    runs = np.zeros(sum(map(len, program.queues)), RUN)
    records = iter(runs)
    waits: list[int] = []
    wait_begin = [0]
    for queue in program.queues:
        known = -1  # the choice that the loader has
        for run in queue:
            record = next(records)
            record["variant"] = variants[run.op]
            record["wait_begin"] = len(waits) - wait_begin[-1]
            record["wait_count"] = len(run.waits)
            record["signal"] = NO_SIGNAL if run.signal < 0 else run.signal
            _resolve(record, program, run, at)
            ordered, op = run.waits, program.ops[run.op]
            if isinstance(op, ExpertGate | ExpertDown):
                maker, signals = choices[run.op]
                # Those for the choice first: the loader has them, too.
                ordered = sorted(run.waits, key=lambda w: bool(w.lag) or w.counter not in signals)
                if maker != known:
                    record["x3"] = sum(w.counter in signals and not w.lag for w in ordered)
                known = maker
                record["bias_up"] = arena + program.buffers[op.chosen].offset
                if isinstance(op, ExpertDown):
                    record["bias"] = arena + program.buffers[op.weights].offset
            _add_ranks(record, program, run.op, tags)
            waits += [w.counter | (w.threshold | w.lag << 15) << 16 for w in ordered]
        wait_begin.append(len(waits))
    starts = np.cumsum([0, *map(len, program.queues)])
    return {
        "runs": runs.view(np.uint8),
        "run_begin": starts.astype(np.uint32),
        "waits": np.asarray(waits, np.uint32),
        "wait_begin": np.asarray(wait_begin, np.uint32),
        "totals": np.asarray([c.total for c in program.counters], np.uint32),
    }


def _choices(program: Program) -> dict[int, tuple[int, set[int]]]:
    """For each op that streams what is chosen: the op that chooses, and the counters that it signals."""
    signals: dict[int, set[int]] = defaultdict(set)
    for run in (run for queue in program.queues for run in queue):
        signals[run.op].add(run.signal)
    found: dict[int, tuple[int, set[int]]] = {}
    last: dict[int, int] = {}  # the op that wrote each choice
    for index, op in enumerate(program.ops):
        if isinstance(op, ExpertGate | ExpertDown):
            found[index] = last[op.chosen], signals[last[op.chosen]]
        elif isinstance(op, Route):
            last[op.chosen] = index
    return found


def _add_ranks(record: Any, program: Program, index: int, tags: Tags) -> None:
    """Ranks of tags into the operands' top bytes: of the op's own write, of those that it reads."""
    op = program.ops[index]

    def writer(buf: Buf) -> int:
        return tags.rank[tags.writer(buf, index)] % TAGS << RANK_SHIFT

    if isinstance(op, Linear | ExpertGate | ExpertDown):
        if op.x in tags.writers:
            record["x"] += writer(op.x)
        adds = isinstance(op, ExpertDown) or (isinstance(op, Linear) and op.epilogue == ADD)
        if adds and op.y in tags.writers:
            record["x2"] = writer(op.y)
    operands: tuple[tuple[str, Buf], ...] = ()
    if isinstance(op, Attend):
        operands = ("x", op.q), ("x2", op.k), ("x3", op.v)
    elif isinstance(op, Route):
        operands = (("x", op.logits),)
    elif isinstance(op, LatentRope):
        operands = (("x2", op.kv),)
    elif isinstance(op, LatentAttention):
        operands = (("x", op.q),)
    elif isinstance(op, IndexRope):
        operands = (("x2", op.k),)
    elif isinstance(op, IndexScore):
        operands = (("x2", op.head_weights),)
    for name, buf in operands:
        if buf in tags.writers:
            record[name] += writer(buf)
    if tags.silent(index):
        record["y"] += tags.rank[index] % TAGS << RANK_SHIFT


def _resolve(record: Any, program: Program, run: Run, at: list[int]) -> None:
    """The fields of struct Run that depend on the op. at: address (arena: float) of each buffer."""
    op: Op = program.ops[run.op]

    def home(buf: int, row: int = 0, cols: int = 0) -> int:
        return 0 if buf == NONE else at[buf] + row * cols * program.buffers[buf].dtype.bytes

    if isinstance(op, Linear):
        begin, end = op.span(run.lo, run.hi)
        record["first"], record["count"] = begin, end - begin
        record["w"], record["w_up"] = home(op.w, begin, op.k), home(op.w_up, begin, op.k)
        record["bias"], record["bias_up"] = home(op.bias, begin, 1), home(op.bias_up, begin, 1)
        scales = (program.buffers[w].scale if w != NONE else NONE for w in (op.w, op.w_up))
        record["scale"], record["scale_up"] = (home(scale) for scale in scales)
        record["norm"], record["x"], record["y"] = (
            home(op.norm),
            at[op.x] + op.x_col,
            at[op.y] + op.y_col,
        )
        return
    record["first"], record["count"] = run.lo, run.hi - run.lo
    if isinstance(op, ExpertGate | ExpertDown):
        _resolve_experts(record, program, op, run, at)
    elif isinstance(op, Attend):
        record["w"], record["w_up"], record["y"] = at[op.k_cache], at[op.v_cache], at[op.y]
        record["norm"], record["norm2"] = home(op.q_norm), home(op.k_norm)
        record["bias_up"] = at[op.table]
        record["x"], record["x2"], record["x3"] = at[op.q], at[op.k] + op.k_col, at[op.v] + op.v_col
    elif isinstance(op, LatentRope):
        record["w"], record["norm"], record["bias_up"] = (
            at[op.latent_cache],
            at[op.weight],
            at[op.table],
        )
        record["x"], record["x2"] = at[op.q] + op.q_col, at[op.kv] + op.kv_col
    elif isinstance(op, LatentAttention):
        record["w"], record["y"] = at[op.latent_cache], at[op.y]
        record["x"], record["x2"] = at[op.q], at[op.q_rope] + op.q_col
        record["x3"] = 0 if op.selected == NONE else at[op.selected]
    elif isinstance(op, IndexRope):
        record["w"], record["w_up"] = at[op.index_cache], at[op.index_scale]
        record["norm"], record["norm2"] = at[op.weight], at[op.shift]
        record["bias_up"] = at[op.table]
        record["x"], record["x2"] = at[op.q] + op.q_col, at[op.k] + op.k_col
    elif isinstance(op, IndexScore):
        record["w"], record["w_up"] = at[op.index_cache], at[op.index_scale]
        record["x"], record["x2"] = at[op.q] + op.q_col, at[op.head_weights] + op.w_col
        record["y"] = at[op.y]
    elif isinstance(op, Select):
        record["x"], record["y"] = at[op.scores], at[op.chosen]
    elif isinstance(op, Embed):
        record["w"], record["y"] = at[op.table], at[op.y]
    elif isinstance(op, Argmax):
        record["x"], record["y"] = at[op.logits], at[op.part]
    elif isinstance(op, Route):
        record["norm"], record["x"] = home(op.bias), at[op.logits]
        record["y"], record["x2"] = at[op.chosen], at[op.weights]
    elif isinstance(op, NextToken):
        record["x"] = at[op.part]
    elif isinstance(op, Totals):
        record["x"], record["y"] = at[op.bins], at[op.totals]
    elif isinstance(op, Combine):
        record["x"], record["y"] = at[op.part], at[op.y]
    elif isinstance(op, Survey | Report):
        record["w"], record["x"], record["x2"] = at[op.controls], at[op.logits], at[op.part]
        record["y" if isinstance(op, Survey) else "x3"] = at[op.survey]
    elif isinstance(op, Adjust | Bins | Sift | Draw):
        _resolve_sampling(record, op, at)


def _resolve_experts(
    record: Any, program: Program, op: ExpertGate | ExpertDown, run: Run, at: list[int]
) -> None:
    """Rows of whole tiles: where they begin in a bank is known when the choice is."""
    begin, end = run.lo * op.tile_rows, run.hi * op.tile_rows
    if isinstance(op, ExpertDown):
        begin, end = op.span(run.lo, run.hi)
    record["first"], record["count"] = begin, end - begin
    record["x"], record["y"] = at[op.x], at[op.y]
    banks = {"": op.w, "_up": op.w_up} if isinstance(op, ExpertGate) else {"": op.w}
    for name, bank in banks.items():
        scale = program.buffers[bank].scale
        record[f"w{name}"], record[f"scale{name}"] = at[bank], 0 if scale == NONE else at[scale]
    if isinstance(op, ExpertGate) and op.norm != NONE:
        record["norm"] = at[op.norm]


def _resolve_sampling(record: Any, op: Adjust | Bins | Sift | Draw, at: list[int]) -> None:
    record["w"], record["y" if isinstance(op, Adjust) else "x"] = at[op.controls], at[op.scores]
    if isinstance(op, Adjust):
        record["w_up"], record["bias"] = at[op.mask], at[op.biases]
        record["bias_up"], record["x"], record["x2"] = at[op.tally], at[op.logits], at[op.peaks]
    elif isinstance(op, Bins):
        record["x2"], record["y"] = at[op.peaks], at[op.bins]
    elif isinstance(op, Sift):
        record["x2"], record["x3"], record["y"] = at[op.peaks], at[op.totals], at[op.candidates]
    else:
        record["x2"], record["x3"] = at[op.candidates], at[op.totals]
        record["bias_up"] = at[op.tally]
