"""How long a step takes on paper: workers walk their queues; waits, reads and hand-offs cost time.

All reads in progress on a device share its bandwidth equally, and none exceeds what one worker can
read alone; the share changes whenever a read begins or ends. A run computes while it reads, so it
takes the longer of both. What is ordered in advance through a ring is not modelled: a run's bytes
start to flow when its waits hold. The result has the same fields as a measured trace, so that both
can be shown side by side.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from tilert.ir.program import Program, Run


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


class _Simulation:
    """Events in the order of time: a run starts, its bytes are read, it ends and signals."""

    def __init__(self, program: Program, context: int) -> None:
        machine = program.machine
        self.program, self.machine, self.context = program, machine, context
        self.position = [0] * machine.workers
        self.free = [0.0] * machine.workers  # end of the worker's last run
        self.started = [0.0] * machine.workers
        self.computed = [0.0] * machine.workers  # when the run's arithmetic is done
        self.starts: list[tuple[float, int]] = []
        self.ends: list[tuple[float, int]] = []
        self.memories = [
            _Memory(machine.read_bandwidth, machine.worker_bandwidth)
            for _ in range(machine.devices)
        ]
        self.signals: list[list[tuple[float, int]]] = [[] for _ in program.counters]
        self.waiting: list[list[tuple[int, int]]] = [[] for _ in program.counters]
        self.spans: list[Span] = []

    def run(self) -> list[Span]:
        for worker in range(self.machine.workers):
            self._next_run(worker)
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
                worker = memory.finish(read)
                self._arithmetic(read, worker)
            else:
                self._start(*heapq.heappop(self.starts))

    def _run_of(self, worker: int) -> Run:
        return self.program.queues[worker][self.position[worker]]

    def _start(self, now: float, worker: int) -> None:
        run = self._run_of(worker)
        op = self.program.ops[run.op]
        cost = op.cost(run.lo, run.hi, self.program.weight_itemsize(op), self.context)
        self.started[worker] = now
        self.computed[worker] = now + cost.flops / self.machine.worker_flops
        moved = cost.bytes + cost.cache_bytes
        if moved:
            self.memories[self.machine.device_of(worker)].begin(now, worker, moved)
        else:
            self._arithmetic(now, worker)

    def _arithmetic(self, now: float, worker: int) -> None:
        """The run's bytes are there; what is left is arithmetic and the run's fixed cost."""
        end = max(now, self.computed[worker]) + self.machine.run_overhead
        heapq.heappush(self.ends, (end, worker))

    def _end(self, now: float, worker: int) -> None:
        run = self._run_of(worker)
        self.spans.append(
            Span(worker, self.position[worker], self.free[worker], self.started[worker], now)
        )
        self.free[worker] = now
        self.position[worker] += 1
        if run.signal >= 0:
            seen = self.signals[run.signal]
            seen.append((now, worker))
            woken = [w for threshold, w in self.waiting[run.signal] if threshold <= len(seen)]
            self.waiting[run.signal] = [
                (threshold, w) for threshold, w in self.waiting[run.signal] if threshold > len(seen)
            ]
            for other in woken:
                self._next_run(other)
        self._next_run(worker)

    def _next_run(self, worker: int) -> None:
        """Set the start of the worker's next run, or the counter that it has to wait for first."""
        if self.position[worker] == len(self.program.queues[worker]):
            return
        at = self.free[worker]
        for wait in self._run_of(worker).waits:
            if wait.lag:
                continue  # the step before is over
            if len(self.signals[wait.counter]) < wait.threshold:
                self.waiting[wait.counter].append((wait.threshold, worker))
                return
            at = max(at, self._seen(wait.counter, wait.threshold, worker))
        heapq.heappush(self.starts, (at, worker))

    def _seen(self, counter: int, threshold: int, worker: int) -> float:
        """When the worker sees the first `threshold` signals; its own it sees at once."""
        for end, sender in reversed(self.signals[counter][:threshold]):
            if sender != worker:
                return end + self.machine.handoff
        return 0.0
