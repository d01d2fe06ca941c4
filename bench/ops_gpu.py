"""What each op of a model's step costs on one GPU, from the stamps of its own program.

    python bench/ops_gpu.py --model Qwen3-30B-A3B [--input 1024] [--rows 1,4] [--out FILE]

Random weights at true shapes, as in decode_gpu.py. Ops stand in a chain, so an op takes the time from
when all ops before it have ended to its own end, of its last worker, and the times of all add up to the step.
A kind of op is a row, the median over its layers and over steps:

    takes    microseconds of the step
    first    until its first worker begins, from the end of the op before (less than 0: they overlap)
    begin    until the median worker begins
    work     of the median worker
    longest  of the worker that takes longest
    bytes    of weights and cache, and what they would take at the ceiling of gpu_ceiling.py, in us
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_ceiling
from decode_gpu import FIRST, FP8, MODELS, RandomModel, capacity, comma_list, environment

from tilert.backends.cuda import open_device
from tilert.backends.cuda.backend import CudaBackend
from tilert.errors import UserError
from tilert.ir.program import Program, Run
from tilert.serve.trace import Timeline, moved, op_names, timelines

STEPS, SKIPPED = 24, 4  # of a launch; the first ones are not counted
COLUMNS = ("takes", "first", "begin", "work", "longest")


def timed(program: Program, steps: Sequence[Timeline], ceiling: float) -> list[dict[str, Any]]:
    """A row for each kind of op, in the order in which a step comes to them; times in us.

    ceiling: bytes per second.
    """
    found: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    names = op_names(program)
    for step in steps:
        spans: dict[int, list[Any]] = {op: [] for op in range(len(program.ops))}
        for span in step.spans:
            spans[program.queues[span.worker][span.index].op].append(span)
        before = 0.0
        for op, own in spans.items():
            end = max(span.end for span in own)
            row = found[names[op][0]]
            row["takes"].append(max(end - before, 0.0))
            row["first"].append(min(span.start for span in own) - before)
            row["begin"].append(statistics.median(span.start for span in own) - before)
            row["work"].append(statistics.median(span.end - span.start for span in own))
            row["longest"].append(max(span.end - span.start for span in own))
            row["bytes"].append(moved(program, Run(op, 0, program.ops[op].tiles), step.context))
            before = max(before, end)
    return [
        {
            "op": kind, "times": len(row["takes"]) // len(steps),
            **{name: statistics.median(row[name]) * 1e6 for name in COLUMNS},
            "step": sum(row["takes"]) / len(steps) * 1e6,  # of one step, all ops of the kind
            "bytes": statistics.median(row["bytes"]),
            "bytes_us": statistics.median(row["bytes"]) / ceiling * 1e6,
        }
        for kind, row in found.items()
    ]  # fmt: skip


def recorded(
    backend: CudaBackend, rows: int, position: int, count: int = STEPS, skipped: int = SKIPPED
) -> list[Timeline]:
    """Steps of one launch of `count` with the trace on, over `rows` consecutive tokens from `position` on;
    the first ones are left out."""
    state = backend.state
    state["counts"][0] = rows, rows
    state["tokens"][0, :rows] = FIRST
    backend.trace(True)
    for _ in range(2):  # the first is the warm-up
        state["positions"][0, :rows] = range(position, position + rows)
        made = sum(1 for _ in backend.steps(count))
    assert made == count, f"{made} steps instead of {count}"
    steps = timelines(backend.records(), position)[skipped:]
    backend.trace(False)
    return steps


def table(rows: Sequence[dict[str, Any]], ms: float) -> str:
    """The rows as text, and the step's time over them."""
    lines = [f"step {ms:.4f} ms, {sum(r['bytes_us'] * r['times'] for r in rows):.1f} us of bytes"]
    lines += [
        f"{'op':<16}{'times':>6}"
        + "".join(f"{c:>9}" for c in COLUMNS)
        + f"{'step':>9}{'MB':>9}{'us':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row['op']:<16}{row['times']:>6}" + "".join(f"{row[c]:>9.2f}" for c in COLUMNS)
            + f"{row['step']:>9.1f}{row['bytes'] / 1e6:>9.2f}{row['bytes_us']:>8.2f}"
        )  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Print the tables and write them as JSON; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*MODELS, *(f"{name}{FP8}" for name in MODELS)]
    parser.add_argument("--model", choices=known, required=True)
    parser.add_argument("--input", type=int, default=1024, help="positions before the step")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in comma_list(text)], default=[1],
                        help="tokens of a step, with commas: 1,2,4,8")  # fmt: skip
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    parser.add_argument("--out", type=Path, help="file of the results")
    args = parser.parse_args()
    try:
        device = open_device()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ceiling = max(gpu_ceiling.measure(device).values())
    model = RandomModel(args.model, capacity([args.input]), device)
    result: dict[str, Any] = {
        **environment(device, "ops_gpu.py", args.commit), "model": args.model, "input": args.input,
        "ceiling": ceiling, "rows": {},
    }  # fmt: skip
    for count in args.rows:
        backend = model.decode if count == 1 else model.of_rows(count)
        if backend is None:
            print(f"{args.model}: the device has no program for {count} tokens", file=sys.stderr)
            continue
        backend.state["pages"][0] = range(model.num_pages)
        steps = recorded(backend, count, args.input)
        rows = timed(backend.program, steps, ceiling)
        ms = statistics.median(each.seconds for each in steps) * 1e3
        print(f"{args.model}, {count} tokens after {args.input}: {table(rows, ms)}", flush=True)
        result["rows"][count] = {"ms": ms, "ops": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
