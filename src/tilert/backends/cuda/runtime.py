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
from tilert.ir.program import NONE, Kind, Program, Scale

Progress = Callable[[str, int, int], None]  # (label, done bytes, total bytes)
# Prompts of up to so many launches of the program for a few tokens do not go to the prompt runner. That
# program is ready in a fifth of a second when it is kept, PyTorch in several, and once both are warm a
# small model's launches are faster still. It depends on the prompt's length alone, not on what is ready:
# the two round differently, and the same prompt has the same tokens.
SHORT_LAUNCHES = 4


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
        self, graph: Graph, weights: Mapping[str, tuple[Any, np.ndarray]],
        caches: Mapping[str, tuple[Any, tuple[int, ...], DType]], scales: Mapping[str, Scale],
    ) -> Any:  # fmt: skip
        """A LateRunner over memory of this device; None when the device has none."""
        ...


class CudaRuntime:
    """Weights of `graph` on a device, and caches of `num_pages` pages: loaded for the first program."""

    def __init__(
        self, device: GpuDevice, graph: Graph, weights: Mapping[str, np.ndarray], num_pages: int,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.device, self.graph, self.arrays, self.num_pages = device, graph, weights, num_pages
        self.progress = progress
        self.seconds: dict[str, float] = {}  # what loading took: program, weights, kernel
        self.first_use: dict[str, float] = {}  # what the first requests waited for: few, ...
        self.weights: dict[str, Memory] = {}
        self.caches: dict[str, Memory] = {}
        self._decode: CudaBackend | None = None
        self._few: dict[str, CudaBackend] = {}
        self._prompts: Any = None

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
            return Prompts(partial(self._pieces, kind, program), short, self._runner, decode, 256)
        return self._pieces(kind, program)

    def _pieces(self, kind: str, program: Callable[[str], Program]) -> Pieces:
        rows = min(self.step_rows(program), {"few2": 2, "few4": 4}.get(kind, 8))
        taken = {1: "decode", 2: "few2", 4: "few4", 8: "few"}[rows]
        if rows == 1:
            self._few[taken] = self._decoder(program)
        elif taken not in self._few:
            with self._noted(taken):
                self._few[taken] = self.bound(program(taken))
        return Pieces(self._few[taken], 256 if kind == "prompt" else 8)

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

    def step_rows(self, program: Callable[[str], Program]) -> int:
        """Most tokens of a step of one launch; see limits.step_rows."""
        return step_rows(program("decode"), self.device.shared_bytes)

    def _decoder(self, program: Callable[[str], Program]) -> CudaBackend:
        if self._decode is None:
            marks = [time.perf_counter()]
            made = program("decode")
            marks.append(time.perf_counter())
            tensors = self._load(made)
            marks.append(time.perf_counter())
            shapes = cache_shapes(made, self.num_pages)
            types = {b.name: b.dtype for b in made.buffers if b.kind is Kind.CACHE}
            self.caches = {
                n: self.device.allocate(types[n].bytes * int(np.prod(s))) for n, s in shapes.items()
            }
            for memory in self.caches.values():
                memory.clear()  # values that no token has written yet are multiplied by 0
            self._prompts = self.device.prompt_runner(
                self.graph, {n: (m, self.arrays[n]) for n, m in tensors.items()},
                {n: (m, shapes[n], types[n]) for n, m in self.caches.items()}, _scales(made),
            )  # fmt: skip
            self._decode = self.bound(made)
            marks.append(time.perf_counter())
            spans = (b - a for a, b in pairwise(marks))
            self.seconds = dict(zip(("program", "weights", "kernel"), spans, strict=True))
        return self._decode

    def bound(self, program: Program) -> CudaBackend:
        """A program over the weights and caches of all."""
        return CudaBackend(
            program, {n: m.address for n, m in self.weights.items()},
            {n: m.address for n, m in self.caches.items()}, self.device,
        )  # fmt: skip

    def _load(self, program: Program) -> dict[str, Memory]:
        """Put the weights of the program into memory; the part of each tensor in it."""
        tensors: dict[str, Memory] = {}
        for buffer in (b for b in program.buffers if b.kind is Kind.WEIGHT):
            memory = self.weights[buffer.name] = self.device.allocate(buffer.bytes)
            begin = 0
            for name in buffer.parts:
                tensors[name] = memory.part(begin, self.arrays[name].nbytes)
                begin += self.arrays[name].nbytes
        total, done = sum(array.nbytes for array in self.arrays.values()), 0

        def told(size: int) -> None:
            nonlocal done
            done += size
            if self.progress:
                self.progress("loading", done, total)

        self.device.upload([(memory, self.arrays[n]) for n, memory in tensors.items()], told)
        return tensors


def _scales(program: Program) -> dict[str, Scale]:
    """Block scales by the tensor that they belong to."""
    buffers = program.buffers
    return {
        part: Scale(scale, b.block)
        for b in buffers if b.scale != NONE
        for part, scale in zip(b.parts, buffers[b.scale].parts, strict=True)
    }  # fmt: skip


class _Rows:
    """State of a step of several rows, in the shape of the engine's Backend."""

    def __init__(self, made: CudaBackend, rows: int) -> None:
        self.made = made
        names = ("tokens", "positions", "sequences", "output_rows")
        self.state = {name: np.zeros((1, rows), np.int32) for name in names}
        self.state["counts"] = np.zeros((1, 2), np.int32)
        self.state["pages"] = np.zeros_like(made.state["pages"])


class Pieces(_Rows):
    """A step in launches of as many rows as the program takes; logits are fetched when asked for."""

    def __init__(self, made: CudaBackend, rows: int) -> None:
        super().__init__(made, rows)
        self.kept: dict[
            int, np.ndarray
        ] = {}  # logits by row, of all launches of a step but the last
        self.begin = 0  # first row of the last launch

    def steps(self, count: int) -> Generator[np.ndarray, None, None]:
        """Run one step; gives the greedy ids of its outputs."""
        assert count == 1, "several rows make one step per call"
        tokens, outputs = self.state["counts"][0].tolist()
        wanted, width = self.state["output_rows"][0, :outputs], self.made.program.tokens
        found = np.zeros(tokens, np.int32)
        self.kept = {}
        for begin in range(0, tokens, width):
            if begin:
                rows = [row for row in wanted.tolist() if self.begin <= row < begin]
                logits = self.made.read("logits") if rows else None
                self.kept |= {row: logits[row - self.begin] for row in rows if logits is not None}
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
        (sampled,) = self.made.steps(1)
        return sampled

    def read(self, name: str) -> np.ndarray:
        """The logits of the last step, [outputs, vocab_size]."""
        assert name == "logits", f"{name} is not kept"
        last = self.made.read("logits")
        wanted = self.state["output_rows"][0, : self.state["counts"][0, 1]].tolist()
        return np.asarray([self.kept.get(row, last[row - self.begin]) for row in wanted])


class Prompts(_Rows):
    """Consecutive tokens of one sequence: up to `short` in pieces, more by the device's prompt runner."""

    def __init__(
        self, pieces: Callable[[], Pieces], short: int, runner: Callable[[], Any], made: CudaBackend,
        rows: int,
    ) -> None:  # fmt: skip
        super().__init__(made, rows)
        self._make_pieces, self.short, self.runner = pieces, short, runner
        self.logits = np.zeros((0, 0), np.float32)

    @cached_property
    def pieces(self) -> Pieces:
        """Made for the first short prompt; it shares the state."""
        made = self._make_pieces()
        made.state = self.state
        return made

    def read(self, name: str) -> np.ndarray:
        """The logits of the last step."""
        assert name == "logits", f"{name} is not kept"
        return self.logits

    def steps(self, count: int) -> Generator[np.ndarray, None, None]:
        """Run one step; gives the greedy ids of its outputs."""
        assert count == 1, "several rows make one step per call"
        tokens, outputs = self.state["counts"][0].tolist()
        if tokens <= self.short:
            (sampled,) = self.pieces.steps(1)
            self.logits = self.pieces.read("logits")
        else:
            self.logits = self._long(tokens, outputs)
            sampled = self.logits.argmax(axis=1).astype(np.int32)
        yield sampled

    def _long(self, tokens: int, outputs: int) -> np.ndarray:
        state = self.state
        logits = self.runner().run(
            state["tokens"][0, :tokens].tolist(), int(state["positions"][0, 0]),
            state["pages"][state["sequences"][0, 0]].tolist(), state["output_rows"][0, :outputs].tolist(),
        )  # fmt: skip
        return logits.float().cpu().numpy()
