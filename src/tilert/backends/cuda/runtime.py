"""A model on one GPU: weights and caches in its memory, and the back ends that the engine asks for.

One token of one sequence is the persistent program, and steps of a few tokens are another one where the
registers of a block hold what they need. Prompts of more tokens are handed to the device's own prompt
runner where it has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from tilert.backends.cuda.backend import CudaBackend, Device, Memory, cache_shapes
from tilert.backends.cuda.limits import step_rows
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.machine import Machine
from tilert.ir.program import NONE, Buffer, Kind, Program, Scale
from tilert.ops import Norm

Progress = Callable[[str, int, int], None]  # (label, done bytes, total bytes)
# Prompts of up to so many launches of the program for a few tokens do not go to the prompt runner. That
# program is ready in a fifth of a second when it is kept, PyTorch in several, and once both are warm a
# small model's launches are faster still. It depends on the prompt's length alone, not on what is ready:
# the two round differently, and the same prompt has the same tokens.
SHORT_LAUNCHES = 4
# Tokens of a step of a prompt. In launches of the program for a few tokens, others wait for it; the prompt
# runner reads all weights for a step, and calls PyTorch as often for many tokens as for few.
PIECES_ROWS, RUNNER_ROWS = 256, 1024


class GpuDevice(Device, Protocol):
    """A device that models can be loaded onto."""

    machine: Machine

    def free_bytes(self) -> int:
        """Memory that nobody has taken."""
        ...

    def upload(
        self, parts: Iterable[tuple[Any, np.ndarray]], progress: Callable[[int], None]
    ) -> None:
        """Write arrays to its memory; `progress` is told of more bytes."""
        ...

    def prompt_runner(
        self, graph: Graph, weights: Mapping[str, tuple[Any, tuple[int, ...], DType]],
        caches: Mapping[str, tuple[Any, tuple[int, ...], DType]], scales: Mapping[str, Scale],
    ) -> Any:  # fmt: skip
        """A LateRunner over memory of this device, which holds what the shapes and types say; None when the
        device has none."""
        ...


class CudaRuntime:
    """Weights of `graph` on a device, and caches of `num_pages` pages: loaded for the first program."""

    def __init__(
        self, device: GpuDevice, graph: Graph, weights: Mapping[str, np.ndarray], num_pages: int,
        progress: Progress | None = None, beside: CudaRuntime | None = None,
    ) -> None:  # fmt: skip
        """beside: whose weights are shared where they have the same name; its first program is made."""
        self.device, self.graph, self.arrays, self.num_pages = device, graph, weights, num_pages
        self.progress = progress
        self.seconds: dict[str, float] = {}  # what loading took: program, weights, kernel
        self.first_use: dict[str, float] = {}  # what the first requests waited for: few, ...
        self.weights: dict[str, Memory] = dict(beside.weights) if beside else {}
        self.tensors: dict[str, Memory] = dict(beside.tensors) if beside else {}  # parts of those
        self.caches: dict[str, Memory] = {}
        self._decode: CudaBackend | None = None
        self._few: dict[str, CudaBackend] = {}
        self._prompts: Any = None
        self._step_rows = 0  # not known yet

    def backend(
        self, kind: str, program: Callable[[str], Program]
    ) -> CudaBackend | Pieces | Prompts:
        """The back end for steps of that kind; program: makes programs.

        'decode' makes greedy tokens, 'sampled' and 'logprobs' sampled ones; 'few2', 'few4' and 'few' take
        up to 2, 4 and 8 rows, 'prompt' any number.
        """
        decode = self._decoder(program)
        if kind == "decode":
            return decode
        if kind in ("sampled", "logprobs"):
            with self._noted(kind):
                return self.bound(program(kind))
        if kind == "prompt" and self._prompts is not None:
            short = SHORT_LAUNCHES * self.step_rows(program)
            pieces = partial(self._pieces, kind, program)
            return Prompts(pieces, short, self._runner, decode, RUNNER_ROWS)
        return self._pieces(kind, program)

    def _pieces(self, kind: str, program: Callable[[str], Program]) -> Pieces:
        rows = min(self.step_rows(program), {"few2": 2, "few4": 4}.get(kind, 8))
        taken = {1: "decode", 2: "few2", 4: "few4", 8: "few"}[rows]
        if rows == 1:
            self._few[taken] = self._decoder(program)
        elif taken not in self._few:
            with self._noted(taken):
                self._few[taken] = self.bound(program(taken))
        return Pieces(self._few[taken], self.prompt_rows(program) if kind == "prompt" else 8)

    def _runner(self) -> Any:
        """The prompt runner, when it is ready."""
        with self._noted("prompts"):
            self._prompts.wait()
        return self._prompts

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        """Keeps how long the first of such blocks takes."""
        begin = time.perf_counter()
        yield
        self.first_use.setdefault(name, time.perf_counter() - begin)

    def prompt_rows(self, program: Callable[[str], Program]) -> int:
        """Most tokens of a step of one sequence's."""
        self._decoder(program)
        return PIECES_ROWS if self._prompts is None else RUNNER_ROWS

    def step_rows(self, program: Callable[[str], Program]) -> int:
        """Most tokens of a step of one launch; see limits.step_rows. Asked before each step, so kept."""
        if self._step_rows == 0:
            self._step_rows = step_rows(program("decode"), self.device.shared_bytes)
        return self._step_rows

    def _decoder(self, program: Callable[[str], Program]) -> CudaBackend:
        if self._decode is None:
            marks = [time.perf_counter()]
            made = program("decode")
            marks.append(time.perf_counter())
            self._load(made)
            marks.append(time.perf_counter())
            shapes = cache_shapes(made, self.num_pages)
            types = {b.name: b.dtype for b in made.buffers if b.kind is Kind.CACHE}
            self.caches = {
                n: self.device.allocate(types[n].bytes * int(np.prod(s))) for n, s in shapes.items()
            }
            for memory in self.caches.values():
                memory.clear()  # values that no token has written yet are multiplied by 0
            self._prompts = self.device.prompt_runner(
                self.graph, self._stored(made),
                {n: (m, shapes[n], types[n]) for n, m in self.caches.items()}, _scales(made),
            )  # fmt: skip
            self._decode = self.bound(made)
            marks.append(time.perf_counter())
            spans = (b - a for a, b in pairwise(marks))
            self.seconds = dict(zip(("program", "weights", "kernel"), spans, strict=True))
        return self._decode

    def beside(self, graph: Graph, weights: Mapping[str, np.ndarray]) -> CudaRuntime:
        """Another graph on the same device, with caches of its own in as many pages."""
        return CudaRuntime(self.device, graph, weights, self.num_pages, self.progress, self)

    def bound(self, program: Program, other: CudaRuntime | None = None) -> CudaBackend:
        """A program over the weights and caches of all, and over those of another graph's programs."""
        weights, caches = self.weights, self.caches
        if other:
            weights, caches = weights | other.weights, caches | other.caches
        return CudaBackend(
            program, {n: m.address for n, m in weights.items()},
            {n: m.address for n, m in caches.items()}, self.device,
        )  # fmt: skip

    def _stored(self, program: Program) -> dict[str, tuple[Memory, tuple[int, ...], DType]]:
        """Where prompts find the weights, with shapes and types: tensors, and banks as a whole."""
        found: dict[str, tuple[Memory, tuple[int, ...], DType]] = {}
        buffers = program.buffers
        banks = [b for b in buffers if b.bank > 1]
        banks += [buffers[b.scale] for b in banks if b.scale != NONE]
        for b in banks:
            found[b.name] = self.weights[b.name], (b.rows, b.cols), b.dtype
        inside = {part for b in banks for part in b.parts}
        for name in self.arrays.keys() - inside:
            array = self.arrays[name]
            found[name] = self.tensors[name], array.shape, DType.of(array)
        return found

    def _load(self, program: Program) -> None:
        """Put the weights of the program into memory that are not there."""
        tensors: dict[str, Memory] = {}
        weights = (b for b in program.buffers if b.kind is Kind.WEIGHT)
        for buffer in (b for b in weights if b.name not in self.weights):
            memory = self.weights[buffer.name] = self.device.allocate(buffer.bytes)
            begin = 0
            for name in buffer.parts:
                tensors[name] = memory.part(begin, self.arrays[name].nbytes)
                begin += self.arrays[name].nbytes
        self.tensors |= tensors
        total, done = sum(self.arrays[name].nbytes for name in tensors), 0

        def told(size: int) -> None:
            nonlocal done
            done += size
            if self.progress:
                self.progress("loading", done, total)

        self.device.upload([(memory, self.arrays[n]) for n, memory in tensors.items()], told)


def _scales(program: Program) -> dict[str, Scale]:
    """Block scales by the tensor, or the bank, that they belong to."""
    buffers = program.buffers
    return {
        part: Scale(scale, b.block)
        for b in buffers if b.scale != NONE
        for part, scale in zip(_wholes(b), _wholes(b, buffers[b.scale]), strict=True)
    }  # fmt: skip


def _wholes(weight: Buffer, of: Buffer | None = None) -> tuple[str, ...]:
    """What prompts know the tensors of a weight, or of its scales, by: a bank is one."""
    of = of or weight
    return (of.name,) if weight.bank > 1 else of.parts


class _Rows:
    """State of a step of several rows, in the shape of the engine's Backend."""

    def __init__(self, made: CudaBackend, rows: int) -> None:
        self.made = made
        names = ("tokens", "positions", "sequences", "output_rows")
        self.state: dict[str, np.ndarray] = {n: np.zeros((1, rows), np.int32) for n in names}
        self.state["counts"] = np.zeros((1, 2), np.int32)
        self.state["pages"] = np.zeros_like(made.state["pages"])
        if "given" in made.state:
            self.state["given"] = np.zeros((rows, made.state["given"].shape[1]), np.float32)


class Pieces(_Rows):
    """A step in launches of as many rows as the program takes; logits are fetched when asked for, and hidden
    states where the program has them as an output."""

    def __init__(self, made: CudaBackend, rows: int) -> None:
        super().__init__(made, rows)
        # Of all launches of a step but the last: logits by row, and hidden states.
        self.kept: dict[int, np.ndarray] = {}
        self.hidden: list[np.ndarray] = []
        self.begin = 0  # first row of the last launch
        program = made.program
        self.has_hidden = "hidden" in program.buffer_ids
        # They may be of the rows that have logits alone, and then stand in their order.
        self.of_outputs = any(
            isinstance(op, Norm) and op.gather != NONE and program.buffers[op.y].name == "hidden"
            for op in program.ops
        )

    def steps(self, count: int) -> Generator[np.ndarray, None, None]:
        """Run one step; gives the greedy ids of its outputs."""
        assert count == 1, "several rows make one step per call"
        tokens, outputs = self.state["counts"][0].tolist()
        wanted, width = self.state["output_rows"][0, :outputs], self.made.program.tokens
        found = np.zeros(tokens, np.int32)
        self.kept, self.hidden = {}, []
        for begin in range(0, tokens, width):
            if begin:
                rows = [row for row in wanted.tolist() if self.begin <= row < begin]
                logits = self.made.read("logits") if rows else None
                self.kept |= {row: logits[row - self.begin] for row in rows if logits is not None}
                if self.has_hidden:
                    self.hidden.append(self.made.read("hidden"))
            end = min(begin + width, tokens)
            found[begin:end] = self._launch(begin, end)
            self.begin = begin
        yield found[wanted]

    def _launch(self, begin: int, end: int) -> np.ndarray:
        state, own = self.state, self.made.state
        for name in ("tokens", "positions", "sequences"):
            own[name][0, : end - begin] = state[name][0, begin:end]
        own["output_rows"][0, : end - begin] = range(end - begin)
        own["counts"][0] = end - begin
        own["pages"][:] = state["pages"]
        if "given" in state:
            own["given"][: end - begin] = state["given"][begin:end]
        (sampled,) = self.made.steps(1)
        return sampled

    def read(self, name: str) -> np.ndarray:
        """The logits of the last step, [outputs, vocab_size], or its hidden states."""
        assert name in ("logits", "hidden"), f"{name} is not kept"
        last = self.made.read(name)
        if name == "hidden":
            rows = np.concatenate([*self.hidden, last])
            outputs = self.state["output_rows"][0, : self.state["counts"][0, 1]]
            return rows[outputs] if self.of_outputs else rows
        wanted = self.state["output_rows"][0, : self.state["counts"][0, 1]].tolist()
        kept = self.kept
        return np.asarray([kept[r] if r in kept else last[r - self.begin] for r in wanted])


class Prompts(_Rows):
    """Consecutive tokens of one sequence: up to `short` in pieces, more by the device's prompt runner."""

    def __init__(
        self, pieces: Callable[[], Pieces], short: int, runner: Callable[[], Any], made: CudaBackend,
        rows: int,
    ) -> None:  # fmt: skip
        super().__init__(made, rows)
        self._make_pieces, self.short, self.runner = pieces, short, runner
        self.logits = self.hidden = np.zeros((0, 0), np.float32)

    @cached_property
    def pieces(self) -> Pieces:
        """Made for the first short prompt; it shares the state."""
        made = self._make_pieces()
        made.state = self.state
        return made

    def read(self, name: str) -> np.ndarray:
        """The logits of the last step, or its hidden states."""
        assert name in ("logits", "hidden"), f"{name} is not kept"
        return self.logits if name == "logits" else self.hidden

    def steps(self, count: int) -> Generator[np.ndarray, None, None]:
        """Run one step; gives the greedy ids of its outputs."""
        assert count == 1, "several rows make one step per call"
        tokens, outputs = self.state["counts"][0].tolist()
        if tokens <= self.short:
            (sampled,) = self.pieces.steps(1)
            self.logits = self.pieces.read("logits")
            if self.pieces.has_hidden:
                self.hidden = self.pieces.read("hidden")
        else:
            self.logits = self._long(tokens, outputs)
            sampled = self.logits.argmax(axis=1).astype(np.int32)
        yield sampled

    def _long(self, tokens: int, outputs: int) -> np.ndarray:
        state, runner = self.state, self.runner()
        logits = runner.run(
            state["tokens"][0, :tokens].tolist(), int(state["positions"][0, 0]),
            state["pages"][state["sequences"][0, 0]].tolist(), state["output_rows"][0, :outputs].tolist(),
            state["given"][:tokens] if "given" in state else None,
        )  # fmt: skip
        self.hidden = runner.hidden.float().cpu().numpy()
        return logits.float().cpu().numpy()
