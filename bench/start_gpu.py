"""From the start of a process to the first token on one GPU, and the memory that it takes there.

    python bench/start_gpu.py [--out FILE]

A checkpoint of Llama-3.2-1B's shape with random weights is written to a temporary folder. Each process then
imports tilert, loads it, and makes a token after 32 others; the first one also compiles, so it is shown but
does not count. `beyond`: GPU memory in use at the end, after a prompt of 1,024 tokens and a few sampled ones,
beyond weights and cache. The tokens that repeat make the last lines: with and without speculation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decode_gpu import MODELS, environment, one_sentence, result_options
from gpu_peers import output_of

from tilert.backends.cuda import open_device

NAME = "Llama-3.2-1B"
TIMEOUT = 300.0  # seconds of a process
REPEATING = [5, 9, 33, 7, 260, 12] * 6


def write_checkpoint(folder: Path, name: str) -> None:
    """A Hugging Face checkpoint of a model's shape with random weights, by the processor."""
    import torch
    from safetensors.torch import save_file

    from tilert.models import load_config
    from tilert.models.decoder import build as build_graph
    from tilert.models.derived import ROPE_TABLE

    config = {**MODELS[name], "torch_dtype": "bfloat16", "eos_token_id": 2}
    graph = build_graph(load_config(config), 64)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in graph.weights.items():
        rows, cols = int(value.rows), value.cols
        if name != ROPE_TABLE:
            values = torch.ones(cols) if rows == 1 else torch.randn(rows, cols) * cols**-0.5
            tensors[name] = values.bfloat16()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(folder / "model.safetensors"))


START = """
import time
start = time.perf_counter()
import json
import sys
from tilert import LLM, SamplingParams
seconds = {"import": time.perf_counter() - start}
llm = LLM(sys.argv[1], backend="cuda", skip_tokenizer_init=True, max_model_len=2048)
greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
mark = time.perf_counter()
next(stream := llm.stream({"prompt_token_ids": list(range(100, 132))}, greedy))
seconds |= {**llm.load_phases, "first token": time.perf_counter() - mark}
seconds["sum"] = time.perf_counter() - start
stream.close()
long = {"prompt_token_ids": [7 + i % 999 for i in range(1024)]}
llm.generate(long, greedy)
llm.generate(long, SamplingParams(temperature=0.8, seed=1, max_tokens=8))
place = llm.runner.place
held = sum(m.size for m in (*place.weights.values(), *place.caches.values()))
from cuda.bindings import driver
_, free, total = driver.cuMemGetInfo()
print(json.dumps({"seconds": seconds, "held": held, "used": total - free}))
"""

SPECULATION = """
import json, sys, time
from tilert import LLM, SamplingParams
llm = LLM(sys.argv[1], backend="cuda", skip_tokenizer_init=True, max_model_len=2048,
          num_speculative_tokens=int(sys.argv[2]))
prompt = {"prompt_token_ids": json.loads(sys.argv[3])}
params = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True)
times = []
for _ in range(6):
    (output,) = llm.generate(prompt, params)
    times.append(output.metrics.time_per_output_token * 1e3)
m = output.metrics
print(json.dumps({"token_ms": times[1:], "tokens": output.outputs[0].token_ids, "verified": m.verified,
                  "drafted": m.drafted_tokens, "accepted": m.accepted_tokens}))
"""


def child(code: str, *arguments: object) -> dict[str, Any]:
    """What a process that runs `code` prints as its last line."""
    text = output_of([sys.executable, "-c", code, *map(str, arguments)], TIMEOUT)
    return json.loads(text.splitlines()[-1])


def used_by_others() -> int:
    """Bytes of the GPU's memory that are in use while only this process runs."""
    asked = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) << 20


def phases(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians of the seconds of each phase."""
    names = runs[0]["seconds"]
    return {name: statistics.median(run["seconds"][name] for run in runs) for name in names}


@one_sentence
def main() -> int:
    """Print the figures and write them as JSON; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=5)
    result_options(parser)
    args = parser.parse_args()
    device = open_device()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), NAME)
        before = used_by_others()
        cold = child(START, folder)
        warm = [child(START, folder) for _ in range(args.processes)]
        guessing = {n: child(SPECULATION, folder, n, REPEATING) for n in (0, 3, 7)}
    result = {
        **environment(device, "start_gpu.py", args.commit), "model": NAME, "cold": cold["seconds"],
        "warm": phases(warm), "sums": [run["seconds"]["sum"] for run in warm],
        "weights_and_cache": warm[0]["held"],
        "beyond": max(run["used"] - before - run["held"] for run in [cold, *warm]),
        "speculation": {str(n): told(each, guessing[0]) for n, each in guessing.items()},
    }  # fmt: skip
    for name in ("cold", "warm"):
        print(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in result[name].items()) + " s")
    print(f"GPU memory beyond weights and cache: {result['beyond'] / 1e6:.0f} MB")
    for count, each in result["speculation"].items():
        print(f"up to {count} guessed tokens: {each}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def told(found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The figures of a text that comes to repeat itself; plain: without guesses."""
    verified = found["verified"]
    return {
        "ms_per_token": statistics.median(found["token_ms"]), "steps": len(verified),
        "drafted": found["drafted"], "accepted": found["accepted"],
        "tokens_per_verifying_step": sum(verified) / len(verified) if verified else None,
        "same_tokens": found["tokens"] == plain["tokens"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
