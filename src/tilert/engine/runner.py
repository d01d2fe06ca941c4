"""One model on one back end: its programs, its weights, its KV cache. Token ids in, logits out.

Programs share everything but activations: `decode` (one token), `sampled` (one token, sampled on the
device), `logprobs` (likewise, with what the step's log-probabilities are made of), `few` (up to eight tokens
of any sequences; on a GPU also `few2` and `few4`, whose steps cost less) and `prompt` (many tokens of one
sequence). Each is compiled when it is first needed. One more verifies and makes guesses, together with the
layer for that, whose other programs are those of a runner of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from tilert.backends.cpu import CpuBackend, Pool
from tilert.backends.cuda.backend import MAX_STOPS, CudaBackend
from tilert.backends.cuda.runtime import CudaRuntime
from tilert.backends.interpreter import Interpreter
from tilert.compiler import Limits
from tilert.engine.core import SamplingParams
from tilert.engine.programs import program_for
from tilert.engine.sampling import Sampler, check_finite
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Speculation
from tilert.ir.machine import Machine
from tilert.ir.program import PAGE, Program, Scale
from tilert.ops.draw import MAX_VOCAB

FEW, PROMPT = 8, 256  # most tokens of a step of the two larger programs
TOKENS = {"decode": 1, "sampled": 1, "logprobs": 1, "few2": 2, "few4": 4, "few": FEW,
          "prompt": PROMPT}  # fmt: skip


def program_kind(params: SamplingParams) -> str:
    """The program that samples for such a request."""
    return "sampled" if params.logprobs is None else "logprobs"


class Backend(Protocol):
    """What the runner needs of a back end that holds one program."""

    state: dict[str, np.ndarray]

    def read(self, name: str) -> np.ndarray:
        """A view of an activation or state buffer."""
        ...

    def steps(self, count: int) -> Iterator[np.ndarray]:
        """Run up to `count` steps; after each, the sampled token ids. Closing it cancels the rest."""
        ...


class Row:
    """One token of a step: its id, position, and the row of the page table of its sequence."""

    __slots__ = ("position", "slot", "token")

    def __init__(self, token: int, position: int, slot: int) -> None:
        self.token, self.position, self.slot = token, position, slot


class Runner:
    """Compiles and runs the programs of `graph` for up to `sequences` sequences at a time.

    place: threads for the CPU back end, a GPU with the model on it, or None for the interpreter.
    """

    def __init__(
        self, graph: Graph, weights: Mapping[str, np.ndarray], machine: Machine, *, context: int,
        sequences: int, num_pages: int, place: Pool | CudaRuntime | None,
        scales: Mapping[str, Scale] | None = None,
    ) -> None:  # fmt: skip
        self.scales = scales
        self.graph, self.weights, self.machine, self.place = graph, weights, machine, place
        self.context, self.sequences, self.num_pages = context, sequences, num_pages
        self.page_table = np.zeros((sequences, -(-context // PAGE)), dtype=np.int32)
        self.programs: dict[str, Program] = {}
        self._backends: dict[str, Backend] = {}
        self._caches: dict[str, np.ndarray] | None = None

    def beside(
        self, graph: Graph, weights: Mapping[str, np.ndarray], scales: Mapping[str, Scale]
    ) -> Runner:
        """A runner of another graph for the same sequences: it has caches of its own under the same page
        table."""
        place = self.place
        if isinstance(place, CudaRuntime):
            place = place.beside(graph, weights)
        other = Runner(
            graph, weights, self.machine, context=self.context, sequences=self.sequences,
            num_pages=self.num_pages, place=place, scales=scales,
        )  # fmt: skip
        other.page_table = self.page_table
        return other

    def program(self, kind: str) -> Program:
        """The program of that kind, compiled at the first call."""
        if kind not in self.programs:
            self.programs[kind] = self.compiled(kind, self.machine)
        return self.programs[kind]

    def compiled(self, kind: str, machine: Machine) -> Program:
        """The program of that kind for any machine."""
        tokens = TOKENS[kind]
        outputs = 1 if kind == "prompt" else tokens
        told = kind == "logprobs"
        sampled = told or kind == "sampled"
        limits = Limits(tokens, outputs, self.sequences, self.context, sampled, told)
        dtypes = {name: DType.of(array) for name, array in self.weights.items()}
        return program_for(self.graph, machine, limits, dtypes, self.scales)

    @property
    def prompt(self) -> int:
        """Most tokens of a step that are one sequence's."""
        if self.place is None or isinstance(self.place, Pool):
            return PROMPT
        return self.place.prompt_rows(self.program)

    @property
    def few(self) -> int:
        """Most rows of a step that one launch takes, and whose logits can all be had."""
        if self.place is None or isinstance(self.place, Pool):
            return FEW
        return self.place.step_rows(self.program)

    def _kind(self, rows: int) -> str:
        """The cheapest program that takes a step of so many rows."""
        if rows == 1 or rows > FEW:
            return "decode" if rows == 1 else "prompt"
        if self.place is None or isinstance(self.place, Pool):
            return "few"
        sizes = [kind for kind in ("few2", "few4", "few") if TOKENS[kind] <= self.few]
        return next((kind for kind in sizes if TOKENS[kind] >= rows), sizes[-1] if sizes else "few")

    @property
    def samples(self) -> bool:
        """True when `loop` takes samplers."""
        vocab = self.graph.nodes[-1].output.cols
        return self.place is not None and not isinstance(self.place, Pool) and vocab <= MAX_VOCAB

    def backend(self, kind: str) -> Backend:
        """The back end that holds the program of that kind."""
        if kind not in self._backends:
            if self.place is None or isinstance(self.place, Pool):
                program = self.program(kind)
                if self._caches is None:
                    owner = Interpreter if self.place is None else CpuBackend
                    self._caches = owner.allocate_caches(program, self.num_pages)
                self._backends[kind] = self._bound(program, self.weights, self._caches)
            else:
                self._backends[kind] = self.place.backend(kind, self.program)
        return self._backends[kind]

    def _bound(
        self, program: Program, weights: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray]
    ) -> Interpreter | CpuBackend:
        if isinstance(self.place, Pool):
            return CpuBackend(program, weights, caches, self.place)
        return Interpreter(program, weights, caches)

    def set_pages(self, slot: int, pages: Sequence[int]) -> None:
        """The physical pages of the sequence in `slot`."""
        self.page_table[slot, : len(pages)] = pages

    def step(
        self, rows: Sequence[Row], outputs: Sequence[int], given: np.ndarray | None = None
    ) -> np.ndarray:
        """Run one step; greedy ids [n] of the rows named in `outputs`.

        given: [rows, cols], what a graph with that input takes besides tokens. Rows of more than eight
        tokens must be one sequence's consecutive tokens. Raises UserError when the device found no largest
        logit because they are no numbers.
        """
        backend = self._fill(self.backend(self._kind(len(rows))), rows, outputs)
        if given is not None:
            backend.state["given"][: len(rows)] = given
        self._stepped = backend, len(outputs)
        (sampled,) = backend.steps(1)
        if (sampled < 0).any():
            check_finite(float("nan"))
        return sampled

    def logits(self) -> np.ndarray:
        """Logits [n, vocab_size] of the last step's outputs; a view that the next step overwrites."""
        backend, outputs = self._stepped
        return backend.read("logits")[:outputs]

    def hidden(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """A copy of rows [begin, end) of the last step's hidden states [rows, hidden_size], where the graph
        has them as an output: of the step's rows, or of its outputs, as the graph says."""
        return self._stepped[0].read("hidden")[begin:end].copy()

    def loop(
        self, row: Row, steps: int, stop_ids: Iterable[int] = (), sampler: Sampler | None = None
    ) -> Generator[tuple[int, np.ndarray | None], None, None]:
        """Tokens of one sequence, up to `steps`, chosen and fed back on the device: greedy ones, or those
        that `sampler` would give, which stays as it is. With each, where its log-probabilities are asked
        for, the report that Sampler.commit takes.

        A back end that knows stop ids ends by itself after one of them; with others the caller stops
        asking. Raises UserError at the end when the logits are no numbers.
        """
        kind = program_kind(sampler.params) if sampler else "decode"
        backend = self._fill(self.backend(kind), [row], [0])
        if sampler:
            sampler.fill(backend.state, row.position)
        if isinstance(backend, CudaBackend):
            backend.stop_ids = tuple(stop_ids)[:MAX_STOPS]  # the caller looks at them all
        for sampled in backend.steps(steps):
            report = backend.state["report"][0].copy() if kind == "logprobs" else None
            yield int(sampled[0]), report
        check_finite(backend.read("peaks" if sampler else "logits")[0].max())

    def guess(
        self, layer: Runner, tokens: Sequence[int], position: int, slot: int, steps: int,
        stop_ids: Iterable[int] = (),
    ) -> Generator[list[int], None, None]:  # fmt: skip
        """The tokens that each of up to `steps` steps gives a sequence, greedy ones: one, and one more for
        each right guess.

        tokens: the sequence's last one, at `position`, and guesses for those that follow it; `layer` makes
        the next ones within the same step. A step moves on by up to len(tokens) positions and touches up to
        2 * len(tokens) - 2 from its first one on. stop_ids, and errors: as of `loop`.
        """
        backend = self._guessing(layer, len(tokens) - 1)
        rows = [Row(token, position + i, slot) for i, token in enumerate(tokens)]
        backend = self._fill(backend, rows, range(len(rows)))
        backend.state["one"][:] = 1  # rows of the layer's further passes, and of their logits
        if isinstance(backend, CudaBackend):
            backend.stop_ids = tuple(stop_ids)[:MAX_STOPS]
        for sampled in backend.steps(steps):
            yield [int(token) for token in sampled if token >= 0]
        check_finite(backend.read("logits")[: len(rows)].max())

    def guesses(self, layer: Runner, drafts: int) -> list[int]:
        """Those that the last step of `guess` has made for what comes next, when it made all its steps."""
        return self._guessing(layer, drafts).state["tokens"][0, 1 : drafts + 1].tolist()

    def _guessing(self, layer: Runner, drafts: int) -> Backend:
        kind = f"guess{drafts}"
        if kind not in self._backends:
            program = self.guessing(layer, drafts, self.machine)
            if isinstance(self.place, CudaRuntime) and isinstance(layer.place, CudaRuntime):
                self._backends[kind] = self.place.bound(program, layer.place)
                return self._backends[kind]
            assert self._caches and layer._caches, "the first guesses come from steps of both"
            self._backends[kind] = self._bound(
                program, {**self.weights, **layer.weights}, {**self._caches, **layer._caches}
            )
        return self._backends[kind]

    def guessing(self, layer: Runner, drafts: int, machine: Machine) -> Program:
        """The program whose steps verify `drafts` guesses and make as many, for any machine."""
        rows = drafts + 1
        if machine.slots:  # kernels take 2, 4 or 8 rows
            rows = next(count for count in (2, 4, 8) if count >= rows)
        limits = Limits(rows, rows, self.sequences, self.context)
        weights, scales = {**self.weights, **layer.weights}, {**(self.scales or {})}
        dtypes = {name: DType.of(array) for name, array in weights.items()}
        return program_for(
            Speculation(self.graph, layer.graph, drafts), machine, limits, dtypes,
            scales | {**(layer.scales or {})},
        )  # fmt: skip

    def _fill(self, backend: Backend, rows: Sequence[Row], outputs: Sequence[int]) -> Backend:
        state, n = backend.state, len(rows)
        state["tokens"][0, :n] = [row.token for row in rows]
        state["positions"][0, :n] = [row.position for row in rows]
        state["sequences"][0, :n] = [row.slot for row in rows]
        state["output_rows"][0, : len(outputs)] = outputs
        state["counts"][0] = n, len(outputs)
        state["pages"][:] = self.page_table
        return backend
