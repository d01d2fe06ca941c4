"""A model's token under other windows and dealings than its card's own, weights staying where they are.

    python bench/settings_gpu.py --models Llama-3.1-8B [--windows 2,3,4] [--out FILE]

What `tilert tune` searches for one model, laid out as a table: where the defaults of a card come from
(ir/machine.py, serve/shipped.py). Random weights, batch 1, greedy; the settings take turns, a launch of 100
steps each, and the figures are medians over the launches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from decode_gpu import (
    FIRST,
    FP8,
    MODELS,
    RandomModel,
    capacity,
    comma_list,
    config_of,
    environment,
    one_sentence,
    result_options,
    stored,
)

from tilert.backends.cuda import open_device
from tilert.backends.cuda.backend import CudaBackend
from tilert.backends.cuda.runtime import GpuDevice
from tilert.compiler import Limits
from tilert.compiler.units import with_units
from tilert.engine.programs import program_for
from tilert.ir.machine import Machine
from tilert.models import load_config
from tilert.models.decoder import build as build_graph

POSITIONS, STEPS, LAUNCHES = (32, 1000), 100, 5


def machines(base: Machine, windows: list[int]) -> Iterator[Machine]:
    """The machine with each window, a whole step or each op dealt out evenly."""
    for window, even in product(windows, (False, True)):
        yield replace(base, window=window, even=even)


def backends(
    name: str, windows: list[int], device: GpuDevice
) -> tuple[RandomModel, dict[Machine, CudaBackend]]:
    """A model's weights, and its program of one token for each setting over them."""
    context = capacity([max(POSITIONS)])
    model, graph = (
        RandomModel(name, context, device),
        build_graph(load_config(config_of(name)), context),
    )
    dtypes, scales = stored(name, graph)
    made: dict[Machine, CudaBackend] = {}
    for machine in machines(with_units(graph, device.machine, dtypes, scales), windows):
        program = program_for(graph, machine, Limits(1, 1, 1, context), dtypes, scales)
        made[machine] = model.bound(program)
        made[machine].state["counts"][0] = 1, 1
        made[machine].state["pages"][0] = np.arange(model.num_pages)
    return model, made


def launch(backend: CudaBackend, position: int) -> float:
    """Milliseconds per step of one launch."""
    backend.state["tokens"][0, 0], backend.state["positions"][0, 0] = FIRST, position
    backend.arena.read(0, 1, np.uint8)  # the device has nothing else to do
    begin = time.perf_counter()
    made = sum(1 for _ in backend.steps(STEPS))
    return (time.perf_counter() - begin) / made * 1e3


def time_settings(name: str, windows: list[int], device: GpuDevice) -> list[dict[str, Any]]:
    """A row for each setting: its fields, and milliseconds per token by position."""
    model, made = backends(name, windows, device)
    found = {machine: {position: [] for position in POSITIONS} for machine in made}
    for number in range(LAUNCHES + 1):
        for machine, backend in made.items():
            for position, samples in found[machine].items():
                taken = launch(backend, position)
                samples += [taken] if number else []  # the first is the warm-up
    del model
    return [
        {
            "model": name, "window": machine.window, "even": machine.even,
            "slots": machine.slots, "slot_bytes": machine.slot_bytes,
            "ms_per_token": {str(p): statistics.median(ms) for p, ms in samples.items()},
        }
        for machine, samples in found.items()
    ]  # fmt: skip


@one_sentence
def main() -> int:
    """Print the table and write it as JSON; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=comma_list, default=[*MODELS])
    parser.add_argument("--windows", type=lambda text: [int(n) for n in comma_list(text)],
                        default=[2, 3, 4], help="units under way, with commas")  # fmt: skip
    result_options(parser)
    args = parser.parse_args()
    if unknown := [name for name in args.models if name.removesuffix(FP8) not in MODELS]:
        parser.error(f"model '{unknown[0]}' is not known; accepted are {', '.join(MODELS)}")
    device = open_device()
    result = {
        **environment(device, "settings_gpu.py", args.commit), "steps": STEPS, "launches": LAUNCHES,
        "rows": [],
    }  # fmt: skip
    for name in args.models:
        for row in time_settings(name, args.windows, device):
            print(
                f"{name:<14} window {row['window']} {'each op' if row['even'] else 'a step'} evenly:"
                + "".join(f" {ms:.4f} ms after {at}" for at, ms in row["ms_per_token"].items()),
                flush=True,
            )
            result["rows"].append(row)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
