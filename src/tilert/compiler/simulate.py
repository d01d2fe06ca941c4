"""How long a step takes on paper: workers walk their queues; waits, reads and hand-offs cost time.

All reads in progress on a device share its bandwidth equally, and none exceeds what one worker can
read alone; the share changes whenever a read begins or ends. A run computes while it reads, so it
takes the longer of both. Without a ring its bytes start to flow when its waits hold. Into a ring they
flow ahead of that, in the order of the queue, as far as there is room beyond what the worker has done or
is at; but what a choice names only when the choice has been seen, and what is not streamed only when the
run starts. A step begins with an empty ring. The result has the same fields as a measured trace, so that
both can be shown side by side.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from itertools import accumulate

from tilert.ir.program import NONE, Program, Run, Wait


@dataclass(frozen=True, slots=True)
class Span:
    """One run in time, in seconds from the start of the step: waiting, then working."""

    worker: int
    index: int  # position in the worker's queue
    wait: float
    start: float
    end: float


def simulate(program: Program, context: int) -> list[Span]:
    """Spans of one step at `context` past positions, in order of their start."""
    spans = _Simulation(program, context).run()
    assert len(spans) == sum(map(len, program.queues)), "the program never ends"
    return sorted(spans, key=lambda span: (span.start, span.worker))


class _Memory:
    """The reads in progress on one device. Each gets the same rate, so one number serves them all:
    `level`, the bytes that a read going on since time 0 would have got."""

    def __init__(self, device_rate: float, worker_rate: float) -> None:
        self.device_rate, self.worker_rate = device_rate, worker_rate
        self.now = self.level = 0.0
        self.reads: list[tuple[float, int]] = []  # (level at which it is complete, worker)

    @property
    def rate(self) -> float:
        """Bytes per second of each read in progress."""
        return min(self.worker_rate, self.device_rate / len(self.reads))

    def advance(self, now: float) -> None:
        if self.reads:
            self.level += (now - self.now) * self.rate
        self.now = now

    def begin(self, now: float, worker: int, size: int) -> None:
        self.advance(now)
        heapq.heappush(self.reads, (self.level + size, worker))

    def next_end(self) -> float:
        """When the first read is complete if no other begins before."""
        if not self.reads:
            return math.inf
        return self.now + max(0.0, self.reads[0][0] - self.level) / self.rate

    def finish(self, now: float) -> int:
        """Take out the first read; returns its worker."""
        self.advance(now)
        self.level, worker = heapq.heappop(self.reads)  # exact where `advance` has rounded
        return worker


@dataclass(slots=True)
class _Loader:
    """The stream of one worker's bytes: `ends` has for each of its runs where they end in it."""

    ends: list[int]
    run: int = 0  # whose bytes come next, or are being read
    loaded: int = 0  # bytes that have come
    reading: int = 0  # where the read in progress ends; 0 when there is none
    choices: dict[int, list[Wait]] = field(
        default_factory=dict[int, list[Wait]]
    )  # to be seen, by run


class _Simulation:
    """Events in the order of time: a run starts, its bytes are read, it ends and signals."""

    def __init__(self, program: Program, context: int) -> None:
        machine = program.machine
        self.program, self.machine, self.context = program, machine, context
        self.room = machine.slots * machine.slot_bytes
        self.position = [0] * machine.workers
        self.free = [0.0] * machine.workers  # end of the worker's last run
        self.started = [-1.0] * machine.workers  # start of its run; -1 before that
        self.computed = [0.0] * machine.workers  # when the run's arithmetic is done
        # Moments at which something may go on: a worker's next run (True), or its loader.
        self.starts: list[tuple[float, int, bool]] = []
        self.ends: list[tuple[float, int]] = []
        self.memories = [
            _Memory(machine.read_bandwidth, machine.worker_bandwidth)
            for _ in range(machine.devices)
        ]
        self.signals: list[list[tuple[float, int]]] = [[] for _ in program.counters]
        self.waiting: list[list[tuple[int, int, bool]]] = [[] for _ in program.counters]
        self.spans: list[Span] = []
        self.makers = self._makers()
        self.loaders = [self._loader(queue) for queue in program.queues]

    def _makers(self) -> list[set[int]]:
        """For each counter the buffers that are written before it is signalled."""
        made: list[set[int]] = [set() for _ in self.program.counters]
        for run in (run for queue in self.program.queues for run in queue if run.signal >= 0):
            op = self.program.ops[run.op]
            made[run.signal] |= {region.buffer for region in op.writes(run.lo, run.hi)}
        return made

    def _loader(self, queue: tuple[Run, ...]) -> _Loader:
        ops = [self.program.ops[run.op] for run in queue]
        costs = (
            op.cost(run.lo, run.hi, self.program.weight_itemsize(op), self.context)
            for op, run in zip(ops, queue, strict=True)
        )
        loader = _Loader(list(accumulate(cost.bytes + cost.cache_bytes for cost in costs)))
        for i, (op, run) in enumerate(zip(ops, queue, strict=True)):
            if self.room and op.choice != NONE:
                waits = [w for w in run.waits if not w.lag and op.choice in self.makers[w.counter]]
                loader.choices[i] = waits
        return loader

    def run(self) -> list[Span]:
        for worker in range(self.machine.workers):
            self._next_run(worker)
            self._load(0.0, worker)
        while True:
            memory = min(self.memories, key=_Memory.next_end)
            start = self.starts[0][0] if self.starts else math.inf
            end = self.ends[0][0] if self.ends else math.inf
            read = memory.next_end()
            if math.inf == start == end == read:
                return self.spans
            if end <= min(start, read):
                self._end(*heapq.heappop(self.ends))
            elif read <= start:
                self._loaded(read, memory.finish(read))
            else:
                now, worker, runs = heapq.heappop(self.starts)
                self._start(now, worker) if runs else self._load(now, worker)

    def _run_of(self, worker: int) -> Run:
        return self.program.queues[worker][self.position[worker]]

    def _start(self, now: float, worker: int) -> None:
        run = self._run_of(worker)
        op = self.program.ops[run.op]
        cost = op.cost(run.lo, run.hi, self.program.weight_itemsize(op), self.context)
        self.started[worker] = now
        self.computed[worker] = now + cost.flops / self.machine.worker_flops
        loader = self.loaders[worker]
        if loader.loaded >= loader.ends[self.position[worker]]:
            self._arithmetic(now, worker)
        self._load(now, worker)

    def _load(self, now: float, worker: int) -> None:
        """Read on, as far as there is room and nothing has to be seen first."""
        loader, at = self.loaders[worker], self.position[worker]
        while loader.run < len(loader.ends) and loader.loaded == loader.ends[loader.run]:
            loader.run += 1
        if loader.reading or loader.run == len(loader.ends):
            return
        running = self.started[worker] >= 0
        done = loader.ends[at] if running else loader.ends[at - 1] if at else 0
        limit = min(done + self.room, loader.ends[loader.run])
        early = loader.run > at or not running
        if early and not self.program.ops[self.program.queues[worker][loader.run].op].streamed:
            return
        if limit <= loader.loaded or (early and not self._chosen(now, worker, loader)):
            return
        loader.reading = limit
        memory = self.memories[self.machine.device_of(worker)]
        memory.begin(now, worker, limit - loader.loaded)

    def _chosen(self, now: float, worker: int, loader: _Loader) -> bool:
        """Whether the loader has seen the choice of its run; else it comes back when it can have."""
        waits = loader.choices.get(loader.run, [])
        while waits:
            seen = self._seen(waits[0], worker, False)
            if seen > now:
                if seen < math.inf:
                    heapq.heappush(self.starts, (seen, worker, False))
                return False
            waits.pop(0)
        return True

    def _loaded(self, now: float, worker: int) -> None:
        loader, at = self.loaders[worker], self.position[worker]
        loader.loaded, loader.reading = loader.reading, 0
        if self.started[worker] >= 0 and loader.run == at and loader.loaded == loader.ends[at]:
            self._arithmetic(now, worker)
        self._load(now, worker)

    def _arithmetic(self, now: float, worker: int) -> None:
        """The run's bytes are there; what is left is arithmetic and the run's fixed cost."""
        end = max(now, self.computed[worker]) + self.machine.run_overhead
        heapq.heappush(self.ends, (end, worker))

    def _end(self, now: float, worker: int) -> None:
        run = self._run_of(worker)
        self.spans.append(
            Span(worker, self.position[worker], self.free[worker], self.started[worker], now)
        )
        self.free[worker], self.started[worker] = now, -1.0
        self.position[worker] += 1
        if run.signal >= 0:
            seen = self.signals[run.signal]
            seen.append((now, worker))
            waiting, self.waiting[run.signal] = self.waiting[run.signal], []
            for threshold, other, runs in waiting:
                if threshold > len(seen):
                    self.waiting[run.signal].append((threshold, other, runs))
                elif runs:
                    self._next_run(other)
                else:
                    self._load(now, other)
        self._next_run(worker)
        if self.position[worker] < len(self.program.queues[worker]):
            self._load(now, worker)

    def _next_run(self, worker: int) -> None:
        """Set the start of the worker's next run, or the counter that it has to wait for first."""
        if self.position[worker] == len(self.program.queues[worker]):
            return
        at = self.free[worker]
        for wait in self._run_of(worker).waits:
            if not wait.lag:  # else the step before is over
                at = max(at, self._seen(wait, worker, True))
                if at == math.inf:
                    return
        heapq.heappush(self.starts, (at, worker, True))

    def _seen(self, wait: Wait, worker: int, runs: bool) -> float:
        """When the worker's run, or its loader, sees enough signals: its own it sees at once. inf when
        they are not there yet; it is asked again when they are."""
        signals = self.signals[wait.counter]
        if len(signals) < wait.threshold:
            self.waiting[wait.counter].append((wait.threshold, worker, runs))
            return math.inf
        for end, sender in reversed(signals[: wait.threshold]):
            if sender != worker:
                return end + self.machine.handoff
        return 0.0
