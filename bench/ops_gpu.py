"""What each op of a model's step costs on one GPU, from the stamps of its own program.

    python bench/ops_gpu.py --model Qwen3-30B-A3B [--input 1024] [--rows 1,4] [--out FILE]

Random weights at true shapes, as in decode_gpu.py. Ops stand in a chain, so an op takes the time from
when all ops before it have ended to its own end, of its last worker, and the times of all add up to the step.
Ops that other workers run at the same time (compiler/levels.py) share a row, and below it each has one of
its own, in which all times count from when the ops before the level have ended.
A kind of op, or of level, is a row, the median over its layers and over steps:

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
from typing import Any

import gpu_ceiling
from decode_gpu import (
    FIRST,
    RandomModel,
    capacity,
    comma_list,
    environment,
    known,
    one_sentence,
    result_options,
)

from tilert.backends.cuda import open_device
from tilert.backends.cuda.backend import CudaBackend
from tilert.compiler.levels import side_by_side
from tilert.compiler.simulate import Span
from tilert.ir.program import Program, Run
from tilert.serve.trace import Timeline, moved, op_names, timelines

STEPS, SKIPPED = 24, 4  # of a launch; the first ones are not counted
COLUMNS = ("takes", "first", "begin", "work", "longest")
Samples = defaultdict[str, list[float]]  # of a kind of op: of every layer and step


def timed(program: Program, steps: Sequence[Timeline], ceiling: float) -> list[dict[str, Any]]:
    """A row for each kind of level, in the order in which a step comes to them; times in us. One of several
    ops has their rows in `beside`.

    ceiling: bytes per second.
    """
    found: dict[tuple[str, ...], list[Samples]] = {}
    names, levels = op_names(program), side_by_side(program)
    for step in steps:
        spans: dict[int, list[Span]] = {op: [] for op in range(len(program.ops))}
        for span in step.spans:
            spans[program.queues[span.worker][span.index].op].append(span)
        before = 0.0
        for level in levels:
            kinds = tuple(names[op][0] for op in level)
            rows = found.setdefault(kinds, [defaultdict(list) for _ in range(1 + len(level))])
            for row, ops in zip(rows, (level, *([op] for op in level)), strict=True):
                size = sum(
                    moved(program, Run(op, 0, program.ops[op].tiles), step.context) for op in ops
                )
                _sample(row, [span for op in ops for span in spans[op]], before, size)
            before = max(before, *(span.end for op in level for span in spans[op]))
    return [
        _row(" | ".join(kinds), whole, len(steps), ceiling)
        | ({"beside": [_row(kind, own, len(steps), ceiling)
                       for kind, own in zip(kinds, each, strict=True)]} if len(kinds) > 1 else {})
        for kinds, (whole, *each) in found.items()
    ]  # fmt: skip


def _sample(row: Samples, spans: Sequence[Span], before: float, size: int) -> None:
    """Note what the runs of an op or a level took in one step. before: when all ops before had ended."""
    row["takes"].append(max(max(span.end for span in spans) - before, 0.0))
    row["first"].append(min(span.start for span in spans) - before)
    row["begin"].append(statistics.median(span.start for span in spans) - before)
    row["work"].append(statistics.median(span.end - span.start for span in spans))
    row["longest"].append(max(span.end - span.start for span in spans))
    row["bytes"].append(size)


def _row(name: str, samples: Samples, steps: int, ceiling: float) -> dict[str, Any]:
    size = statistics.median(samples["bytes"])
    return {
        "op": name, "times": len(samples["takes"]) // steps,
        **{column: statistics.median(samples[column]) * 1e6 for column in COLUMNS},
        "step": sum(samples["takes"]) / steps * 1e6,  # of one step, all ops of the kind
        "bytes": size, "bytes_us": size / ceiling * 1e6,
    }  # fmt: skip


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
    width = max(len(row["op"]) for row in rows) + 2
    lines += [
        f"{'op':<{width}}{'times':>6}"
        + "".join(f"{c:>9}" for c in COLUMNS)
        + f"{'step':>9}{'MB':>9}{'us':>8}"
    ]
    for row in rows:
        for each in (row, *row.get("beside", ())):
            step = f"{row['step']:>9.1f}" if each is row else " " * 9
            lines.append(
                f"{'  ' * (each is not row) + each['op']:<{width}}{each['times']:>6}"
                + "".join(f"{each[c]:>9.2f}" for c in COLUMNS)
                + f"{step}{each['bytes'] / 1e6:>9.2f}{each['bytes_us']:>8.2f}"
            )
    return "\n".join(lines)


@one_sentence
def main() -> int:
    """Print the tables and write them as JSON; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=known(), required=True)
    parser.add_argument("--input", type=int, default=1024, help="positions before the step")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in comma_list(text)], default=[1],
                        help="tokens of a step, with commas: 1,2,4,8")  # fmt: skip
    result_options(parser)
    args = parser.parse_args()
    device = open_device()
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
