"""What one hand-off between GPUs of one host costs, as a program over several of them would do it.

    python bench/handoff_gpu.py [--out FILE]

Persistent kernels (handoff.cu), one on each GPU, write into each other's memory and poll their own:

  ping-pong   one word to and fro, 1,000 times: `relaxed` (a tag in the word) or `ordered` (release, acquire)
  sum         7,168 f32, as a rank of DeepSeek-V3.2 has them after o_proj and after the experts: all blocks
              push their rows of this rank's part to every GPU, and every block has all parts added up in one
              order; the next round's parts need that sum. Four ways:
    tagged    words of 24 bits and a tag, behind a counter that orders nothing, as within one GPU today
    polled    the same without the counter
    combined  each block adds up its own rows of all parts and hands their sums to the others of its GPU
    counted   pairs of bf16 behind a counter that orders them (fence.acq_rel.sys)

`alone`: one GPU with one part, a hand-off that every program has between its blocks; `local`: one GPU that
writes and reads as many parts as there are GPUs. `added_us`: to the same alone. Everything is measured quiet
and with a stream of weights beside it (each block has two copies of 16 KB under way). Each figure is the
median over repeats; a repeat is one launch, timed by the GPU's clock from round 101 to 1,000; of several GPUs
the one that takes longest counts. The last sum, of every block, is compared with numpy's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from decode_gpu import environment, one_sentence, result_options, results_file

from tilert.backends.cuda import open_device
from tilert.backends.cuda.source import FOLDER, Source
from tilert.errors import UserError

ROWS, ROUNDS, WARM, REPEATS = 7168, 1000, 100, 7
MOST = 8  # kMost
SHARED = 92 << 10  # bytes of a block: two sums, the ring, and little else
UNIT, STREAMED = 16384, 1 << 30  # bytes of a copy, and of what is streamed again and again
PATIENCE = 1.0  # seconds until a kernel gives up; the host waits half a second longer
WAYS = ("tagged", "polled", "combined", "counted")
ORDERS = ("relaxed", "ordered")
LINE = 128  # bytes between words that do not lie together
VERDICT, COUNTER, WORD, FAILURE = 0, LINE, 3 * LINE, 4 * LINE  # of a GPU's state; two counters
WHAT = {
    100: "the other's word",
    101: "the counter",
    102: "the sums of its own blocks",
    103: "the end",
}


class Job(ctypes.Structure):
    """struct Job of handoff.cu."""

    _fields_ = [
        ("parts", ctypes.c_void_p), ("targets", ctypes.c_void_p * MOST),
        ("counters", ctypes.c_void_p * MOST),
        *[(name, ctypes.c_void_p) for name in ("sums", "counter")],
        ("words", ctypes.c_void_p * 2),
        *[(name, ctypes.c_void_p) for name in ("verdict", "failure", "stamps", "out", "stream")],
        ("units", ctypes.c_uint64), ("patience", ctypes.c_uint64),
        ("written", ctypes.c_uint32 * MOST),
        *[(name, ctypes.c_uint32) for name in ("rounds", "warm", "first_player", "players")],
    ]  # fmt: skip


class Failed(RuntimeError):
    """A wait of a kernel was in vain, or a sum is wrong."""


@dataclass(frozen=True)
class Case:
    """A sum to be timed: how, on how many GPUs, of how many parts, with a stream beside it or not."""

    way: str
    gpus: int
    parts: int
    stream: bool

    @property
    def place(self) -> str:
        """alone, local or across."""
        return "across" if self.gpus > 1 else "local" if self.parts > 1 else "alone"


def source(parts: int, rows: int = ROWS) -> Source:
    """Kernels for sums of so many parts."""
    here = Path(__file__).parent
    sizes = {"kParts": parts, "kRows": rows, "kSharedBytes": SHARED}
    head = "".join(f"constexpr unsigned {name} = {value};\n" for name, value in sizes.items())
    headers = {
        file.name: file.read_text("utf-8") for file in (FOLDER / "ptx.cuh", here / "system.cuh")
    }
    return Source(head + (here / "handoff.cu").read_text("utf-8"), headers, [])


@cache
def expected(parts: int, rows: int, rounds: int) -> np.ndarray:
    """f32 [rows]: the last sum, as handoff.cu defines it."""
    x, row = np.zeros(rows, np.int64), np.arange(rows)
    for turn in range(1, rounds + 1):
        own = (x[(5 * row + turn) % rows] + (row * 40503 >> 6) + turn) % 32
        x = np.sum([(part + 1) * own for part in range(parts)], axis=0)
    return x.astype(np.float32)


class Gpu:
    """One of several GPUs: its memory and its kernels."""

    def __init__(self, device: Any, streamed: int = STREAMED, rows: int = ROWS) -> None:
        """streamed: bytes of the stream, whatever they are."""
        self.device, self.rows, self.blocks = device, rows, device.machine.workers_per_device
        self.parts = device.allocate(4 * 2 * MOST * rows)
        self.sums = device.allocate(4 * 2 * rows)
        self.state = device.allocate(5 * LINE)
        self.stamps = device.allocate(24 * self.blocks)
        self.out = device.allocate(4 * self.blocks * rows)
        self.stream = device.allocate(streamed)
        self.kernels: dict[tuple[str, int], Any] = {}

    def kernel(self, name: str, parts: int) -> Any:
        """A kernel, compiled when it is first asked for."""
        if (name, parts) not in self.kernels:
            made = self.device.load(source(parts, self.rows), name, SHARED)
            self.kernels[name, parts] = made
        return self.kernels[name, parts]

    def clear(self) -> None:
        """As before all rounds; it is so when this returns."""
        for memory in (self.parts, self.sums, self.state, self.stamps):
            memory.clear()
        self.state.read(0, 1, np.uint32)  # waits for what was queued before

    def job(self, *, stream: bool, rounds: int, warm: int) -> Job:
        """What all launches have in common."""
        state = self.state.address
        return Job(
            parts=self.parts.address, sums=self.sums.address, counter=state + COUNTER,
            verdict=state + VERDICT, failure=state + FAILURE, stamps=self.stamps.address,
            out=self.out.address, stream=self.stream.address,
            units=self.stream.size // UNIT if stream else 0, patience=int(PATIENCE * 1e9),
            rounds=rounds, warm=warm,
        )  # fmt: skip

    def times(self) -> np.ndarray:
        """u64 [blocks, 3]: begin and end in ns, and units streamed; zeros where a block did not come to."""
        return self.stamps.read(0, 3 * self.blocks, np.uint64).reshape(-1, 3)

    def check(self, number: int) -> None:
        """Failed, with who waited for what, when a wait was in vain."""
        if not self.state.read(VERDICT, 1, np.uint32)[0]:
            return
        block, turn, what, have, want = self.state.read(FAILURE, 5, np.uint32).tolist()
        raise Failed(
            f"GPU {number}, block {block} waited in vain for {WHAT.get(what, f'part {what}')} of round"
            f" {turn}: it was {have} instead of {want}"
        )


def launch(gpus: Sequence[Gpu], name: str, parts: int, jobs: Sequence[Job]) -> None:
    """One launch on each GPU, all at once, until all have ended. Raises Failed where that takes too long."""
    for gpu in gpus:
        gpu.kernel(name, parts)  # loaded before anything waits for it
        gpu.clear()
    for gpu, job in zip(gpus, jobs, strict=True):
        gpu.kernel(name, parts).launch(gpu.blocks, job)
    deadline = time.monotonic() + PATIENCE + 0.5
    waiting = list(enumerate(gpus))
    while waiting := [(i, g) for i, g in waiting if not g.kernel(name, parts).done()]:
        if time.monotonic() > deadline:
            raise Failed(f"GPU {waiting[0][0]} has not ended its launch in time")
    for number, gpu in enumerate(gpus):
        gpu.check(number)


def sum_jobs(gpus: Sequence[Gpu], case: Case, rounds: int, warm: int) -> list[Job]:
    """One for each GPU. Each begins to write at another one; alone it writes all parts itself."""
    jobs: list[Job] = []
    for rank, gpu in enumerate(gpus):
        job = gpu.job(stream=case.stream, rounds=rounds, warm=warm)
        for write in range(case.parts):
            other = gpus[(rank + write) % len(gpus)]
            job.targets[write] = other.parts.address
            job.counters[write] = other.state.address + COUNTER
            job.written[write] = rank if len(gpus) > 1 else write
        jobs.append(job)
    return jobs


def sum_once(
    gpus: Sequence[Gpu], case: Case, rounds: int = ROUNDS, warm: int = WARM
) -> tuple[float, float]:
    """(microseconds of a sum, bytes per second that the slowest GPU streamed beside it)."""
    launch(gpus, f"{case.way}_sums", case.parts, sum_jobs(gpus, case, rounds, warm))
    wanted, took, rates = expected(case.parts, gpus[0].rows, rounds), [], []
    for number, gpu in enumerate(gpus):
        found = gpu.out.read(0, gpu.blocks * gpu.rows, np.float32).reshape(-1, gpu.rows)
        if wrong := int((found != wanted).any(axis=1).sum()):
            raise Failed(f"GPU {number} has a wrong sum in {wrong} of {gpu.blocks} blocks")
        begin, end, units = gpu.times().astype(np.int64).T
        took.append(float(end.max() - begin.min()) / (rounds - warm) / 1e3)
        rates.append(float(units.sum()) * UNIT / (took[-1] * rounds) * 1e6)
    return max(took), min(rates)


def ping_once(
    gpus: Sequence[Gpu], order: str, *, stream: bool, rounds: int = ROUNDS, warm: int = WARM
) -> float:
    """Microseconds of a round trip between two GPUs, or between two blocks of one."""
    jobs = [gpu.job(stream=stream, rounds=rounds, warm=warm) for gpu in gpus]
    places = [gpu.state.address + WORD for gpu in gpus]
    words = places if len(gpus) == 2 else [places[0], places[0] + LINE // 2]
    for number, job in enumerate(jobs):
        job.words[0], job.words[1] = words
        job.first_player, job.players = number, 2 // len(gpus)
    launch(gpus, f"{order}_ping", 1, jobs)
    begin, end, _ = gpus[0].times()[0].astype(np.int64)
    return float(end - begin) / (rounds - warm) / 1e3


def cases(visible: int) -> Iterator[Case]:
    """All sums, one alone before those that are compared with it."""
    counts = [n for n in range(2, visible + 1) if n in (2, 4, visible)]
    for stream, way in product((False, True), WAYS):
        yield Case(way, 1, 1, stream)
        for count in counts:
            yield Case(way, 1, count, stream)
            yield Case(way, count, count, stream)


def figures(samples: Sequence[float]) -> dict[str, float]:
    """Median and extremes of the repeats, in microseconds."""
    return {"us": statistics.median(samples), "min": min(samples), "max": max(samples)}


def with_added(rows: Sequence[dict[str, Any]], kind: str) -> None:
    """Into each row, what it takes more than the same (`kind`, stream) alone, and than the same parts of one
    GPU where there is such a row."""
    for row in rows:
        like = [r for r in rows if (r[kind], r["stream"]) == (row[kind], row["stream"])]
        (alone,) = [r for r in like if r["place"] == "alone"]
        row["added_us"] = row["us"] - alone["us"]
        for local in (r for r in like if r["place"] == "local" and r["parts"] == row.get("parts")):
            row["added_to_local_us"] = row["us"] - local["us"]


def time_pings(gpus: Sequence[Gpu], repeats: int) -> list[dict[str, Any]]:
    """Rows of round trips: in one GPU, and between the first and each other one."""
    rows: list[dict[str, Any]] = []
    for stream, order in product((False, True), ORDERS):
        for other in range(len(gpus)):
            two = [gpus[0], gpus[other]] if other else [gpus[0]]
            trips = [ping_once(two, order, stream=stream) for _ in range(repeats)]
            row = {"order": order, "place": "across" if other else "alone", "between": [0, other],
                   "stream": stream, **figures(trips)}  # fmt: skip
            rows.append(row | {"one_way_us": row["us"] / 2})
    with_added(rows, "order")
    return rows


def time_sums(gpus: Sequence[Gpu], repeats: int) -> list[dict[str, Any]]:
    """Rows of sums."""
    rows: list[dict[str, Any]] = []
    for case in cases(len(gpus)):
        found = [sum_once(gpus[: case.gpus], case) for _ in range(repeats)]
        rows.append(
            {"way": case.way, "place": case.place, "gpus": case.gpus, "parts": case.parts,
             "stream": case.stream, **figures([us for us, _ in found]),
             "streamed": statistics.median(rate for _, rate in found)}
        )  # fmt: skip
    with_added(rows, "way")
    return rows


def line_of(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "order" in row:
        what = f"round trip, {row['order']}"
        where = "two blocks of one GPU" if row["place"] == "alone" else f"GPUs {row['between']}"
    else:
        what, where = f"sum, {row['way']}", f"{row['parts']} parts on {row['gpus']} GPU(s)"
    beside = f"stream {row['streamed'] / 1e9:.0f} GB/s" if row.get("streamed") else "stream"
    return (
        f"{what:<22}{where:<24}{beside if row['stream'] else 'quiet':<18}{row['us']:8.2f} us"
        f" ({row['min']:.2f} to {row['max']:.2f}){row['added_us']:+8.2f} to one GPU"
        + (
            f"{row['added_to_local_us']:+8.2f} to its parts local"
            if "added_to_local_us" in row
            else ""
        )
    )


def open_all() -> list[Any]:
    """All visible GPUs, each with access to the memory of the others.

    Raises UserError with fewer than two, and where a pair has no such access.
    """
    first = open_device()
    from tilert.backends.cuda.device import Context, _call, driver  # type: ignore[attr-defined]

    count = min(_call(driver.cuDeviceGetCount()), MOST)
    if count < 2:
        raise UserError(
            f"there is one CUDA device ({first.name}); a hand-off needs two of one host"
        )
    handles = [_call(driver.cuDeviceGet(number)) for number in range(count)]
    devices: list[Any] = []
    for handle in handles:
        Context(handle).enter()
        devices.append(open_device())  # the one that this thread uses
    for (i, one), (k, other) in product(enumerate(devices), repeat=2):
        if i == k:
            continue
        if not _call(driver.cuDeviceCanAccessPeer(handles[i], handles[k])):
            raise UserError(
                f"GPU {i} cannot reach the memory of GPU {k}; accepted are GPUs with NVLink"
            )
        one.context(driver.cuCtxEnablePeerAccess, other.context.handle, 0)
    return devices


@one_sentence
def main() -> int:
    """Print the table and write it as JSON; 2 without two GPUs, 1 when a launch failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=REPEATS)
    result_options(parser)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats accepts 1 and more")
    devices = open_all()
    gpus = [Gpu(device) for device in devices]
    result: dict[str, Any] = {
        **environment(devices[0], "handoff_gpu.py", args.commit), "gpus": len(gpus),
        "protocol": {"rows": ROWS, "rounds": ROUNDS, "not_timed": WARM, "repeats": args.repeats},
    }  # fmt: skip
    out = args.out or results_file(devices[0].name, "handoff-gpu")
    for name, measure in (("round_trips", time_pings), ("sums", time_sums)):
        try:
            result[name] = measure(gpus, args.repeats)
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        for row in result[name]:
            print(line_of(row), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
