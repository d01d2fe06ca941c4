"""Time per step of one rank of eight of DeepSeek-V3.2 on one GPU, and what each op of it costs.

    python bench/rank_gpu.py [--inputs 32,1024,32768] [--tokens 1,4] [--layers 61] [--ops]

Random weights in the shapes and types that `tilert convert --tensor-parallel 8` gives one device: FP8 with
f32 scales for 128 x 128 elements, bf16 embedding, head and routers. The graph is that of the device
(models/shards.py: part_of), so sums over ranks are its own share of them alone, and nothing waits for
another GPU; multi-token prediction is off. The cache holds random values for all positions. A launch makes
127 steps, from its begin to the last token on the host, by the host's clock; each figure is the median over
processes of the medians of their repeats. All layers need 88 GB; --layers 8 takes the 3 dense ones and 5
of those with experts.

`ceiling`: what this GPU reads, measured in the same run (gpu_ceiling.py). `share`: the time in which the
weights and the cache of a step could be read at that rate, over the time taken.

--tokens 1,4: also steps over 4 tokens of one sequence (verification of 3 guesses), where the kernel has them.
--ops: also the table of what each op costs (see ops_gpu.py), and the trace page beside the results.
--compile: only compile programs and kernels into the cache, for an H200; needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_ceiling
import numpy as np
import ops_gpu
from decode_gpu import (
    FIRST,
    attempt,
    comma_list,
    environment,
    one_sentence,
    result_options,
    summary,
)
from gpu_peers import output_of

from tilert.backends.cuda import jit, open_device
from tilert.backends.cuda.backend import CudaBackend, Memory, cache_shapes
from tilert.backends.cuda.limits import fitting, step_rows
from tilert.backends.cuda.source import KERNEL, generate
from tilert.compiler import Limits
from tilert.compiler.units import with_units
from tilert.engine.programs import program_for
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.machine import H200, Machine
from tilert.ir.program import PAGE, Buffer, Kind, Program, Run, Scale
from tilert.models import load_config
from tilert.models.config import DecoderConfig
from tilert.models.decoder import build as build_graph
from tilert.models.derived import ROPE_TABLE, tensor_parts
from tilert.models.latent import LatentConfig
from tilert.models.rotary import rotary_table
from tilert.models.shards import part_of
from tilert.serve import trace
from tilert.serve.llm import with_cache_type

STEPS, BLOCK = 127, (128, 128)
TRACED, SKIPPED = 8, 2  # steps of a launch with the trace on, and how many of them are not counted
TIMEOUT = 560.0  # seconds of one process
CHUNK = 64 << 20  # bytes that are made at a time
RESULTS = Path(__file__).parent / "results"
MODELS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3.2": {
        "model_type": "deepseek_v32", "first_k_dense_replace": 3, "hidden_size": 7168,
        "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048,
        "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                         "type": "yarn"},
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
    },
}  # fmt: skip
# What the published checkpoint does not have in FP8: matrices in bf16, vectors in f32.
BF16 = ("mlp.gate.weight", "weights_proj.weight", "embed_tokens.weight", "lm_head.weight")
F32 = ("e_score_correction_bias", "indexer.k_norm.weight", "indexer.k_norm.bias")


@dataclass(frozen=True)
class Asked:
    """A rank: `devices` share the model `name`, of which `layers` are there (0: all); window 0: the card's
    own."""

    name: str
    devices: int
    layers: int
    context: int
    window: int
    kv_cache_dtype: str = "auto"

    @property
    def config(self) -> DecoderConfig:
        """The settings of the whole model."""
        given = MODELS[self.name]
        return load_config(given | ({"num_hidden_layers": self.layers} if self.layers else {}))


@cache
def described(asked: Asked) -> tuple[Graph, dict[str, DType], dict[str, Scale]]:
    """The graph of the rank, the types of its weights, and where the scales of those in FP8 are."""
    config = asked.config
    graph = part_of(build_graph(config, asked.context), asked.devices)
    parts = tensor_parts(config, asked.devices)
    dtypes: dict[str, DType] = {}
    scales: dict[str, Scale] = {}
    for name, value in graph.weights.items():
        if name == ROPE_TABLE:
            continue
        if value.rows == 1:
            dtypes[name] = DType.F32 if name.endswith(F32) else DType.BF16
        elif name.endswith(BF16):
            dtypes[name] = DType.BF16
        else:
            dtypes[name] = DType.F8E4M3
            block = parts[name].block(BLOCK) if name in parts else BLOCK
            scales[name] = Scale(f"{name}_scale_inv", block)
    return graph, dtypes, scales


def compiled(asked: Asked, machine: Machine, tokens: int) -> Program:
    """The program of so many tokens; compiled once, then kept on disk."""
    graph, dtypes, scales = described(asked)
    target = with_cache_type(machine, asked.config, asked.kv_cache_dtype)
    target = with_units(graph, target, dtypes, scales)
    if asked.window:
        target = replace(target, window=asked.window)
    limits = Limits(tokens, tokens, 1, asked.context)
    return program_for(graph, target, limits, dtypes, scales)


def step_bytes(program: Program, past: int) -> int:
    """Bytes of weights (of experts those that a step chooses) and of the cache that a step reads with `past`
    positions before it."""
    runs = (Run(i, 0, op.tiles) for i, op in enumerate(program.ops))
    return sum(trace.moved(program, run, past) for run in runs)


def fill(memory: Memory, buffer: Buffer, *, scale: bool) -> None:
    """Random values of a weight where they are needed, no more than a chunk of them at a time; scale: it
    holds scales of another, which are all the same."""
    import torch

    types = {DType.F32: torch.float32, DType.BF16: torch.bfloat16}
    base, size = 0.0, buffer.cols**-0.5
    if buffer.rows == 1:
        base, size = float(buffer.name.endswith("norm.weight")), 0.1
    for begin in range(0, buffer.bytes, CHUNK):
        part: Any = memory.part(begin, min(CHUNK, buffer.bytes - begin))
        tensor = part.tensor
        if buffer.dtype is DType.F8E4M3:
            values = torch.randn(tensor.numel(), device=tensor.device).mul_(400 * size)
            tensor.copy_(values.clamp_(-440, 440).to(torch.float8_e4m3fn).view(torch.uint8))
        elif scale:
            tensor.view(torch.float32).fill_(1 / 400)
        else:
            tensor.view(types[buffer.dtype]).normal_(base, size)


def fill_cache(memory: Any, buffer: Buffer, latent: LatentConfig) -> None:
    """Random latents, and keys of the indexer with their scales, for all positions."""
    import torch

    from tilert.backends.cuda.prompt_latent import packed

    dtype = buffer.dtype
    if dtype is DType.U8:
        for part in memory.tensor.view(-1, buffer.cols).split(CHUNK // buffer.cols):
            rows = torch.randn(len(part), latent.cache_width, device=part.device)
            part.copy_(packed(rows.mul_(0.5), latent.kv_lora_rank))
    elif dtype is DType.BF16:
        memory.tensor.view(torch.bfloat16).normal_(0, 0.5)
    elif dtype is DType.F32:
        memory.tensor.view(torch.float32).uniform_(0.005, 0.02)
    else:
        for part in memory.tensor.split(CHUNK):
            values = torch.randn(part.numel(), device=part.device).mul_(100).clamp_(-440, 440)
            part.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))


class Rank:
    """Random weights and a random cache of a rank on a device, and its programs over them."""

    def __init__(self, asked: Asked, device: Any) -> None:
        self.asked, self.device, self.pages = asked, device, asked.context // PAGE
        program = compiled(asked, device.machine, 1)
        scales = {b.scale for b in program.buffers}
        self.homes: dict[str, Memory] = {}
        for index, buffer in enumerate(program.buffers):
            if buffer.kind is not Kind.WEIGHT:
                continue
            memory = self.homes[buffer.name] = device.allocate(buffer.bytes)
            if buffer.name == ROPE_TABLE:
                table = rotary_table(asked.config, asked.context)
                memory.write(np.concatenate(table, axis=1).astype(np.float32))
            else:
                fill(memory, buffer, scale=index in scales)
        for name, shape in cache_shapes(program, self.pages).items():
            buffer, latent = program.buffers[program.buffer_ids[name]], asked.config.latent
            assert latent is not None, f"{asked.name} has no latent attention"
            self.homes[name] = device.allocate(buffer.dtype.bytes * int(np.prod(shape)))
            fill_cache(self.homes[name], buffer, latent)
        self.rows = step_rows(program, device.shared_bytes)
        self.backends: dict[int, CudaBackend] = {}

    def backend(self, tokens: int) -> CudaBackend | None:
        """What runs steps over so many tokens; None when the kernel has none."""
        if tokens > self.rows:
            return None
        if tokens not in self.backends:
            program = compiled(self.asked, self.device.machine, tokens)
            addresses = {name: memory.address for name, memory in self.homes.items()}
            made = self.backends[tokens] = CudaBackend(program, addresses, addresses, self.device)
            made.state["pages"][0] = np.arange(self.pages)
        return self.backends[tokens]


def step_ms(backend: CudaBackend, tokens: int, position: int) -> float:
    """Milliseconds per step of one launch; the first token of its first step is at `position`."""
    state = backend.state
    state["counts"][0], state["output_rows"][0] = tokens, np.arange(tokens)
    state["tokens"][0], state["positions"][0] = FIRST, position + np.arange(tokens)
    backend.arena.read(0, 1, np.uint8)  # the device has nothing else to do
    begin = time.perf_counter()
    made = sum(1 for _ in backend.steps(STEPS))
    taken = time.perf_counter() - begin
    assert made == STEPS, f"{made} steps instead of {STEPS}: the logits are no numbers"
    return taken / STEPS * 1e3


def time_steps(
    asked: Asked, inputs: Sequence[int], tokens: Sequence[int], repeats: int, device: Any
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of the repeats by number of tokens and by input; what the kernel has not is left out."""
    rank, found = Rank(asked, device), dict[str, dict[str, list[float]]]()
    for count in tokens:
        if (backend := rank.backend(count)) is None:
            continue
        found[str(count)] = {
            str(before): [step_ms(backend, count, before) for _ in range(repeats + 1)][1:]
            for before in inputs
        }
    return found


def ops_of(
    asked: Asked, inputs: Sequence[int], tokens: Sequence[int], ceiling: float, device: Any, page: Path
) -> list[dict[str, Any]]:  # fmt: skip
    """What each op costs (ops_gpu.timed), for each number of tokens and input; the first one's trace goes
    into the file `page`."""
    rank, found = Rank(asked, device), list[dict[str, Any]]()
    for count in tokens:
        if (backend := rank.backend(count)) is None:
            continue
        for before in inputs:
            steps = ops_gpu.recorded(backend, count, before, TRACED, SKIPPED)
            rows = ops_gpu.timed(backend.program, steps, ceiling)
            if not found:
                write_page(page, asked, backend, steps, ceiling)
            ms = statistics.median(each.seconds for each in steps) * 1e3
            found.append({"tokens": count, "input": before, "ms": ms, "ops": rows})
    return found


def write_page(
    path: Path, asked: Asked, backend: CudaBackend, steps: list[trace.Timeline], ceiling: float
) -> None:
    """The trace page of the step with the median time, beside the simulator's."""
    shown = steps.index(sorted(steps, key=lambda step: step.seconds)[len(steps) // 2])
    program, machine = backend.program, backend.program.machine
    paper = trace.simulated(program, steps[shown].context, ceiling, machine.worker_bandwidth)
    recorded = trace.Recorded(
        f"{asked.name}, one rank of {asked.devices}", backend.device.name, program, steps, shown,
        paper, [ceiling], machine.worker_bandwidth,
    )  # fmt: skip
    path.write_text(trace.page(recorded), encoding="utf-8")


def compile_all(asked: Asked, tokens: Sequence[int]) -> None:
    """Programs and kernels into the caches of this user, for an H200."""
    device = SimpleNamespace(machine=H200, shared_bytes=jit.TARGETS["sm_90a"])
    decode = compiled(asked, device.machine, 1)
    for count in (n for n in tokens if n <= step_rows(decode, device.shared_bytes)):
        begin = time.perf_counter()
        program = compiled(asked, device.machine, count)
        layout = fitting(program, device.shared_bytes)
        marks = [time.perf_counter() - begin]
        for traced in (False, True):
            source = generate(program, layout, trace=traced)
            cubin = jit.compile_cubin(
                source.text, name=KERNEL, arch="sm_90a", headers=source.headers, progress=print
            )
            marks.append(cubin.seconds)
        used = cubin.resources[KERNEL]
        print(f"{count} tokens: program {marks[0]:.1f} s, kernels {marks[1]:.1f} and {marks[2]:.1f} s,"
              f" ring of {layout.slots} slots, {layout.entries or 'all'} entries of queues of"
              f" {max(map(len, program.queues))} runs, {used.stack} bytes of stack")  # fmt: skip


def row_of(
    tokens: str, before: int, found: Sequence[dict[str, dict[str, list[float]]]], moved: float,
    ceiling: float,
) -> dict[str, Any]:  # fmt: skip
    """A row of the table from the processes' samples; moved: bytes of a step."""
    made = summary([each[tokens][str(before)] for each in found])
    share = moved / ceiling / made["ms"] * 1e3
    return {"tokens": int(tokens), "input": before, **made, "bytes": moved, "share": share}


def line_of(row: dict[str, Any], one: dict[str, Any]) -> str:
    """One line of the table; one: the row of a step of one token with the same input."""
    return (
        f"{row['tokens']} token{'s' * (row['tokens'] > 1)} after {row['input']:>6} |"
        f" {row['ms']:7.4f} ms/step ({row['min']:.4f} to {row['max']:.4f}) |"
        f" {row['bytes'] / 1e9:.2f} GB, {row['share']:6.1%} of the ceiling"
        + (f" | x{row['ms'] / one['ms']:.3f} of one token" if row is not one else "")
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(n) for n in comma_list(text)]

    parser.add_argument("--model", choices=[*MODELS], default="DeepSeek-V3.2")
    parser.add_argument("--devices", type=int, default=8, help="that share the model")
    parser.add_argument(
        "--layers", type=int, default=0, help="of the model, the first ones (0: all)"
    )
    parser.add_argument("--inputs", type=numbers, default=[32, 1024, 32768],
                        help="positions before, with commas")  # fmt: skip
    parser.add_argument("--tokens", type=numbers, default=[1], help="of a step, with commas: 1,4")
    parser.add_argument("--window", type=int, default=0, help="units under way (0: the card's)")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto",
                        help="fp8: latents in e4m3 with scales (default: bf16)")  # fmt: skip
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="in each process")
    parser.add_argument("--ops", action="store_true", help="also what each op costs, and the trace")
    parser.add_argument("--compile", action="store_true", help="only compile, without a GPU")
    result_options(parser, RESULTS / "rank-gpu.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what is asked of this process, as JSON
    args = parser.parse_args()
    longest = MODELS[args.model]["max_position_embeddings"] - STEPS - max(args.tokens, default=1)
    if not args.inputs or not 1 <= min(args.inputs) <= max(args.inputs) <= longest:
        parser.error(f"--inputs accepts numbers from 1 to {longest}")
    if not args.tokens or set(args.tokens) - {1, 2, 4, 8}:
        parser.error("--tokens accepts 1, 2, 4 and 8")
    if args.processes < 1 or args.repeats < 1:
        parser.error("--processes and --repeats accept 1 and more")
    return args


def asked_of(args: argparse.Namespace) -> Asked:
    """What the command line asks for."""
    positions = max(args.inputs) + STEPS + max(args.tokens)
    context = -(-positions // PAGE) * PAGE
    return Asked(args.model, args.devices, args.layers, context, args.window, args.kv_cache_dtype)


def child(given: dict[str, Any], device: Any) -> Any:
    """What one process measures, from what `run` asks it for."""
    asked, inputs, tokens = Asked(**given["asked"]), given["inputs"], given["tokens"]
    if "page" in given:
        return ops_of(asked, inputs, tokens, given["ceiling"], device, Path(given["page"]))
    return time_steps(asked, inputs, tokens, given["repeats"], device)


def in_child(given: dict[str, Any]) -> Any:
    """What this script, called again, prints as its last line."""
    text = output_of([sys.executable, __file__, "--child", json.dumps(given)], TIMEOUT)
    return json.loads(text.splitlines()[-1])


def run(args: argparse.Namespace, device: Any) -> None:
    """The whole benchmark, in processes of its own."""
    import torch

    ceiling = max(gpu_ceiling.measure(device).values())
    torch.cuda.empty_cache()  # for the processes
    print(f"{device.name}: ceiling {ceiling / 1e9:.0f} GB/s", flush=True)
    asked = asked_of(args)
    given = {"asked": asdict(asked), "inputs": args.inputs, "tokens": args.tokens,
             "repeats": args.repeats}  # fmt: skip
    program = compiled(asked, device.machine, 1)
    tokens = [n for n in args.tokens if n <= step_rows(program, device.shared_bytes)]
    for left_out in sorted(set(args.tokens) - set(tokens)):
        print(f"steps over {left_out} tokens are left out: the kernel has none for this model")
    protocol = {"timed_steps": STEPS, "processes": args.processes, "repeats": args.repeats}
    result: dict[str, Any] = {
        **environment(device, "rank_gpu.py", args.commit), "protocol": protocol, "ceiling": ceiling,
        "rank": {**asdict(asked), "weight_bytes": program.weight_bytes}, "rows": [], "ops": [],
    }  # fmt: skip
    tries = [attempt("a process", lambda: in_child(given)) for _ in range(args.processes)]
    found = [each for each in tries if each is not None]
    for count in tokens if found else []:
        own = compiled(asked, device.machine, count)
        for before in args.inputs:
            moved = step_bytes(own, before + STEPS // 2)
            row = row_of(str(count), before, found, moved, ceiling)
            result["rows"].append(row)
            one = next(r for r in result["rows"] if r["input"] == before)
            print(line_of(row, one), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.ops:
        page = {"page": str(args.out.with_suffix(".html")), "ceiling": ceiling}
        result["ops"] = attempt("the table of ops", lambda: in_child(given | page)) or []
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        for table in result["ops"]:
            print(f"{table['tokens']} tokens after {table['input']}:")
            print(ops_gpu.table(table["ops"], table["ms"]))


@one_sentence
def main() -> int:
    """Print the table and write it as JSON; 2 without a GPU."""
    args = arguments()
    if args.compile:
        compile_all(asked_of(args), args.tokens)
        return 0
    device = open_device()
    if args.child:
        print(json.dumps(child(json.loads(args.child), device)))
    else:
        run(args, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
