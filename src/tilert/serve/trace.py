"""`tilert trace`: what every worker did in the steps of one prompt, beside what the simulator says.

A measured step and a simulated one are the same thing here, a Timeline of Spans; the page and the
Chrome trace are made from timelines alone and know nothing of where they come from. Only `record`
knows the back ends. The page's looks and behaviour are in trace.html.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tilert.backends.cpu import CpuBackend, make_pool
from tilert.backends.cuda.backend import CudaBackend
from tilert.compiler.simulate import Span, simulate
from tilert.engine.core import SamplingParams
from tilert.engine.runner import program_kind
from tilert.errors import UserError
from tilert.ir.program import NONE, Kind, Op, Program, Run
from tilert.ops import Combine, ExpertDown, ExpertGate, Linear, Route
from tilert.serve.llm import LLM

MAX_STEPS = 64  # steps kept, the last ones
MAX_EVENTS = 200_000  # runs in one Chrome trace; larger ones are slow to open
READS = 3  # measurements of the read rate before the prompt is run, and as many after it
NOISY = 1.25  # the rates of one machine at rest differ by less than this factor
SHORT_WAIT = 1e-6  # seconds; a wait that held at once takes less, and gets no bar of its own


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step at `context` past positions; its spans count from `begin`, where the step before ended.

    begin: in seconds on a clock that all steps of a record share; seconds: from there to the end.
    """

    context: int
    begin: float
    seconds: float
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A prompt's traced steps. `shown` is the index of the one with the median time; `simulated` is
    the same step on paper, on a machine that reads at the medians of the rates that were measured."""

    model: str
    processor: str
    program: Program
    steps: list[Timeline]
    shown: int
    simulated: Timeline
    read_rates: list[float]  # bytes per second, all workers together
    worker_rate: float  # bytes per second, one worker alone

    @property
    def read_rate(self) -> float:
        """Bytes per second at which all workers together read the weights."""
        return statistics.median(self.read_rates)

    @property
    def noisy(self) -> str:
        """A sentence when the machine was not at rest, else empty."""
        low, high = min(self.read_rates), max(self.read_rates)
        if high < NOISY * low:
            return ""
        return (
            f"The read rate varied from {low / 1e9:.1f} to {high / 1e9:.1f} GB/s: something else was"
            " running, so times are not those of the program alone."
        )

    @property
    def measured(self) -> Timeline:
        """The step that is shown."""
        return self.steps[self.shown]

    @property
    def step_bytes(self) -> int:
        """Bytes of weights and cache that the shown step reads."""
        context = self.measured.context
        runs = [run for queue in self.program.queues for run in queue]
        return sum(moved(self.program, run, context) for run in runs)


def moved(program: Program, run: Run, context: int) -> int:
    """Bytes of weights and cache that a run reads at `context` past positions."""
    op = program.ops[run.op]
    cost = op.cost(run.lo, run.hi, program.weight_itemsize(op), context)
    return cost.bytes + cost.cache_bytes


# Recording


def record(llm: LLM, prompt: Any, params: SamplingParams) -> Recorded:
    """Run a prompt and keep the last steps of the program that makes one token at a time.

    Raises UserError when the back end has no clock or when no such step was run.
    """
    sampled = llm.runner.samples and not (params.greedy and params.logprobs is None)
    backend = llm.runner.backend(program_kind(params) if sampled else "decode")
    if not isinstance(backend, CpuBackend | CudaBackend):
        raise UserError("a trace needs the back end 'cpu' or 'cuda'; the interpreter has no clock")
    program = backend.program
    before = _read_rates(llm, program)
    with _recording(backend) as launches:
        for _ in llm.stream(prompt, params):
            pass
    after = _read_rates(llm, program)
    steps = [step for context, rows in launches for step in timelines(rows, context)][-MAX_STEPS:]
    if not steps:
        raise UserError(
            "no step of one token was run, so there is nothing to show; ask for at least 2 tokens"
            " and one answer"
        )
    shown = steps.index(sorted(steps, key=lambda step: step.seconds)[len(steps) // 2])
    steps = [replace(step, begin=step.begin - steps[0].begin) for step in steps]
    rates, worker_rate = before[0] + after[0], statistics.median(before[1] + after[1])
    paper = simulated(program, steps[shown].context, statistics.median(rates), worker_rate)
    return Recorded(
        model_name(llm.path), _place(llm, backend), program, steps, shown, paper,
        rates, worker_rate,
    )  # fmt: skip


def simulated(program: Program, context: int, read_rate: float, worker_rate: float) -> Timeline:
    """A step on the program's machine with other bandwidths."""
    machine = replace(program.machine, read_bandwidth=read_rate, worker_bandwidth=worker_rate)
    spans = simulate(replace(program, machine=machine), context)
    return Timeline(context, 0.0, max(span.end for span in spans), spans)


@contextmanager
def _recording(backend: CpuBackend | CudaBackend) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Collect (past positions of the first step, records) of every launch."""
    launches: list[tuple[int, np.ndarray]] = []
    steps = backend.steps

    def recorded(count: int) -> Generator[np.ndarray, None, None]:
        context = int(backend.state["positions"][0, 0])
        try:
            yield from steps(count)
        finally:
            launches.append((context, backend.records()))

    backend.trace(True)
    backend.steps = recorded
    try:
        yield launches
    finally:
        del backend.steps
        backend.trace(False)


def timelines(records: np.ndarray, context: int) -> list[Timeline]:
    """The steps of one launch, whose first one had `context` past positions.

    records: int64 [runs, 6] of worker, run, step, wait begin, start, end, times in ns. A step lasts
    from the end of the step before, so the times of all steps add up to the launch's.
    """
    if not len(records):
        return []
    out: list[Timeline] = []
    begin = int(records[:, 3].min())
    for step in range(int(records[:, 2].max()) + 1):
        rows = records[records[:, 2] == step]
        seconds = (rows[:, 3:] - begin) * 1e-9
        spans = [  # what was waited for before the step began is not this step's time
            Span(int(worker), int(index), max(wait, min(start, 0.0)), start, end)
            for (worker, index), (wait, start, end) in zip(
                rows[:, :2].tolist(), seconds.tolist(), strict=True
            )
        ]
        end = int(rows[:, 5].max())
        out.append(Timeline(context + step, begin * 1e-9, (end - begin) * 1e-9, spans))
        begin = end
    return out


def _place(llm: LLM, backend: CpuBackend | CudaBackend) -> str:
    if isinstance(backend, CudaBackend):
        return f"{backend.device.name}, ring of {backend.layout.slots} slots"
    return f"{processor()}, {llm.pool.isa if llm.pool else 'no'} kernels"


def _read_rates(llm: LLM, program: Program) -> tuple[list[float], list[float]]:
    """Bytes per second of all workers together and of one alone: measured READS times each on a CPU,
    what the machine's description says of a GPU."""
    if (pool := llm.pool) is None:
        return [program.machine.read_bandwidth], [program.machine.worker_bandwidth]
    arrays = [llm.runner.weights[b.name] for b in program.buffers if b.kind is Kind.WEIGHT]
    every = [pool.measure_read_rate(arrays) for _ in range(READS)]
    if pool.size == 1:
        return every, every
    one = make_pool(1)
    return every, [one.measure_read_rate(arrays) for _ in range(READS)]


def model_name(folder: Path) -> str:
    """What people call the model in a folder: caches add a digest or hide the name two levels up."""
    if folder.parent.name == "snapshots":  # of the Hub: models--org--name/snapshots/commit
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return re.sub(r"-[0-9a-f]{16}$", "", folder.name)


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


# Names and sums


def op_names(program: Program) -> list[tuple[str, str]]:
    """(kind, label) of every op: ('gate_proj', 'layers.3.mlp.gate_proj'), ('Rope', 'layers.3 Rope')."""
    names: list[tuple[str, str]] = []
    layer = ""
    for op in program.ops:
        found = [m[0] for b in program.operands(op) if (m := re.search(r"layers\.\d+", b.name))]
        if found or not isinstance(op, Combine | Route):  # these belong to what stands before them
            layer = found[0] if found else ""
        if isinstance(op, Linear):
            label = program.buffers[op.w].name.removeprefix("model.").removesuffix(".weight")
            label = "lm_head" if label == "embed_tokens" else label  # a tied head
            names.append((label.rpartition(".")[2], label))
        else:
            kind = type(op).__name__
            names.append((kind, f"{layer} {kind}".strip()))
    return names


def weight_names(program: Program, op: Op) -> str:
    """The large weights that an op streams, with their shapes; empty when there are none."""
    if not isinstance(op, Linear | ExpertGate | ExpertDown):
        return ""
    weights = [program.buffers[w] for w in (op.w, getattr(op, "w_up", NONE)) if w != NONE]
    return " + ".join(f"{b.label} {b.dtype.name.lower()}[{b.rows}, {b.cols}]" for b in weights)


@dataclass(slots=True)
class Share:
    """Worker time of one kind of op in one step."""

    runs: int = 0
    work: float = 0.0
    wait: float = 0.0
    bytes: int = 0


def shares(program: Program, timeline: Timeline) -> dict[str, Share]:
    """Worker time by kind of op, largest first."""
    names = op_names(program)
    out: defaultdict[str, Share] = defaultdict(Share)
    for span in timeline.spans:
        run = program.queues[span.worker][span.index]
        share = out[names[run.op][0]]
        share.runs += 1
        share.work += span.end - span.start
        share.wait += span.start - span.wait
        share.bytes += moved(program, run, timeline.context)
    return dict(sorted(out.items(), key=lambda item: -item[1].work))


def waiting_share(program: Program, timeline: Timeline) -> float:
    """Part of all workers' time in which no run worked: waits, and the ends of uneven queues."""
    work = sum(span.end - span.start for span in timeline.spans)
    return max(0.0, 1 - work / (timeline.seconds * len(program.queues)))


def summary(recorded: Recorded) -> str:
    """A few lines for the terminal."""
    program, measured, paper = recorded.program, recorded.measured, recorded.simulated
    times = [step.seconds for step in recorded.steps]
    floor = recorded.step_bytes / recorded.read_rate
    lines = [
        f"{recorded.model} on {program.machine.name} ({recorded.processor})",
        f"reads {recorded.read_rate / 1e9:.1f} GB/s with all workers,"
        f" {recorded.worker_rate / 1e9:.1f} GB/s with one; a step reads"
        f" {recorded.step_bytes / 1e6:.1f} MB: floor {floor * 1e3:.3f} ms",
        f"measured  {measured.seconds * 1e3:.3f} ms/step (median of {len(times)};"
        f" {min(times) * 1e3:.3f} to {max(times) * 1e3:.3f}),"
        f" waiting {waiting_share(program, measured):.1%}",
        f"simulated {paper.seconds * 1e3:.3f} ms/step, {paper.seconds / measured.seconds:.2f} of"
        f" measured, waiting {waiting_share(program, paper):.1%}",
        *([recorded.noisy] if recorded.noisy else []),
        "",
        f"{'op':<14}{'runs':>6}{'work ms':>10}{'share':>8}{'wait ms':>10}{'GB/s':>8}{'simulated ms':>14}",
    ]
    on_paper = shares(program, paper)
    total = measured.seconds * len(program.queues)
    for kind, share in shares(program, measured).items():
        rate = f"{share.bytes / share.work / 1e9:.1f}" if share.bytes else ""
        lines.append(
            f"{kind:<14}{share.runs:>6}{share.work * 1e3:>10.3f}{share.work / total:>8.1%}"
            f"{share.wait * 1e3:>10.3f}{rate:>8}{on_paper[kind].work * 1e3:>14.3f}"
        )
    return "\n".join(lines)


# Chrome trace


def chrome_json(recorded: Recorded) -> str:
    """A trace for Perfetto (ui.perfetto.dev) and chrome://tracing: one process for the measured steps,
    one for the simulated step, which stands where the shown step does."""
    runs = sum(len(queue) for queue in recorded.program.queues)
    count = max(1, min(len(recorded.steps), MAX_EVENTS // max(runs, 1)))
    first = max(0, min(recorded.shown - count // 2, len(recorded.steps) - count))
    kept = recorded.steps[first : first + count]
    writer = _Chrome(recorded.program)
    writer.process(1, "measured")
    writer.process(2, "simulated")
    for number, step in enumerate(kept, first):
        writer.step(1, step, step.begin - kept[0].begin, number)
    at = recorded.measured.begin - kept[0].begin
    writer.step(2, recorded.simulated, at, recorded.shown)
    return json.dumps(
        {
            "displayTimeUnit": "ns",
            "otherData": {"model": recorded.model, "machine": recorded.program.machine.name},
            "traceEvents": writer.events,
        },
        separators=(",", ":"),
    )


@dataclass(slots=True)
class _Chrome:
    """Events of the Chrome trace format; times there are microseconds."""

    program: Program
    events: list[dict[str, Any]] = field(default_factory=list)

    def process(self, pid: int, name: str) -> None:
        self._name(pid, 0, "process_name", {"name": name})
        self._name(pid, 0, "process_sort_index", {"sort_index": pid})
        for worker in range(len(self.program.queues)):
            self._name(pid, worker, "thread_name", {"name": f"worker {worker}"})
            self._name(pid, worker, "thread_sort_index", {"sort_index": worker})

    def _name(self, pid: int, tid: int, what: str, args: Mapping[str, Any]) -> None:
        self.events.append({"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args})

    def step(self, pid: int, timeline: Timeline, at: float, number: int) -> None:
        names = op_names(self.program)
        for span in timeline.spans:
            run = self.program.queues[span.worker][span.index]
            kind, label = names[run.op]
            waits = [f"counter {w.counter} >= {w.threshold} of step - {w.lag}" for w in run.waits]
            size = moved(self.program, run, timeline.context)
            args: dict[str, Any] = {
                "step": number, "context": timeline.context, "op": run.op, "tiles": [run.lo, run.hi],
                "waits": waits, "wait_us": _us(span.start - span.wait), "bytes": size,
            }  # fmt: skip
            if weights := weight_names(self.program, self.program.ops[run.op]):
                args["weights"] = weights
            if size and span.end > span.start:
                args["GB/s"] = round(size / (span.end - span.start) / 1e9, 2)
            if span.start - span.wait >= SHORT_WAIT:
                self._bar(pid, span.worker, "wait", "wait", at + span.wait, at + span.start, {})
            self._bar(pid, span.worker, label, kind, at + span.start, at + span.end, args)

    def _bar(
        self, pid: int, tid: int, name: str, category: str, begin: float, end: float, args: Any
    ) -> None:
        self.events.append(
            {"ph": "X", "pid": pid, "tid": tid, "name": name, "cat": category, "ts": _us(begin),
             "dur": _us(end - begin), "args": args}
        )  # fmt: skip


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


# Page


def page(recorded: Recorded) -> str:
    """One HTML page that needs nothing else; every text in it is data, set as text by its script."""
    template = Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    before, mark, after = template.partition("@DATA@")
    assert mark, "trace.html has lost the place for its data"
    return before + embed(page_data(recorded)) + after


def embed(data: Any) -> str:
    """JSON that may stand inside a <script> element whatever strings it holds."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page_data(recorded: Recorded) -> dict[str, Any]:
    """What the page shows; times in ns, so that they are short integers."""
    program, context = recorded.program, recorded.measured.context
    times = [step.seconds for step in recorded.steps]
    signallers: list[set[int]] = [set() for _ in program.counters]
    for run in (run for queue in program.queues for run in queue if run.signal >= 0):
        signallers[run.signal].add(run.op)
    names = op_names(program)
    return {
        "model": recorded.model,
        "machine": program.machine.name,
        "processor": recorded.processor,
        "readRate": recorded.read_rate,
        "workerRate": recorded.worker_rate,
        "noisy": recorded.noisy,
        "bytes": recorded.step_bytes,
        "context": context,
        "steps": {"count": len(times), "shown": recorded.shown, "least": min(times), "most": max(times)},
        "waiting": [waiting_share(program, t) for t in (recorded.measured, recorded.simulated)],
        "ops": [
            [kind, label, op.tiles, weight_names(program, op)]
            for op, (kind, label) in zip(program.ops, names, strict=True)
        ],
        "counters": [
            [counter.total, sorted(ops)]
            for counter, ops in zip(program.counters, signallers, strict=True)
        ],
        "queues": [
            [
                [run.op, run.lo, run.hi, moved(program, run, context), [list(w) for w in run.waits]]
                for run in queue
            ]
            for queue in program.queues
        ],
        "timelines": [
            _page_timeline("measured", program, recorded.measured),
            _page_timeline("simulated", program, recorded.simulated),
        ],
    }  # fmt: skip


def _page_timeline(name: str, program: Program, timeline: Timeline) -> dict[str, Any]:
    """Per worker: index, wait, start, end of each span, one after another."""
    rows: list[list[int]] = [[] for _ in program.queues]
    for span in sorted(timeline.spans, key=lambda s: s.index):
        times = (round(t * 1e9) for t in (span.wait, span.start, span.end))
        rows[span.worker] += [span.index, *times]
    return {"name": name, "seconds": timeline.seconds, "rows": rows}
