"""Time per output token on one GPU, beside the rate at which its memory can be read, and peers.

    make bench-gpu        or, for a part: python bench/decode_gpu.py --models Llama-3.2-1B

Random bf16 weights at true shapes (what they are changes no time; that the numbers are right is shown by
tests/test_cuda_shapes.py), batch 1, greedy, no speculation. 128 tokens after 32, 1024, ... others, of
which 127 steps are timed: on the host's clock, from the launch to the last token on the host. The cache
holds random values for what went before. Each figure is the median over processes of the medians of
their repeats. `ceiling`: what bulk copies into shared memory read, measured in the same run; `share`: the
time in which weights and cache could be read at that rate, over the time taken.

The peer is transformers with a static cache, which it compiles (torch.compile, CUDA graphs) by itself,
on the same weights' shapes; the time of 129 tokens less that of 2.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tilert.backends.cuda import open_device
from tilert.backends.cuda.backend import CudaBackend, cache_shapes
from tilert.backends.cuda.source import FOLDER, Source
from tilert.compiler import Limits, build
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.program import NONE, PAGE, Kind, Program, Scale
from tilert.models import load_config
from tilert.models.decoder import ROPE_TABLE
from tilert.models.decoder import build as build_graph
from tilert.models.rotary import rotary_table

STEPS, BLOCK = 127, (128, 128)
RESULTS = Path(__file__).parent / "results"
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "max_position_embeddings": 40960, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "head_dim": 64, "tie_word_embeddings": True},
    "Llama-3.1-8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336,
                     "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False},
    "Qwen3-0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16},
    "Qwen3-1.7B": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                   "num_attention_heads": 16},
    "Qwen3-4B": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32},
    "Qwen3-8B": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
FP8 = "-FP8"  # behind a model's name: linear layers in e4m3 with a scale for each 128 x 128 block

CEILING = """
#include "ptx.cuh"
struct Reads { const u8* from; u64 units; };
constexpr u32 kUnit = 16384, kSlots = 12;
extern "C" __global__ void __launch_bounds__(384, 1) reads(const __grid_constant__ Reads r) {
  u8* memory = shared_memory();
  u64* full = reinterpret_cast<u64*>(memory + kSlots * kUnit);
  if (threadIdx.x) return;
  for (u32 i = 0; i < kSlots; ++i) barrier_init(full + i, 1);
  barrier_init_done();
  u64 n = 0;
  for (u64 unit = blockIdx.x; unit < r.units; unit += gridDim.x, ++n) {
    u64* b = full + n % kSlots;
    if (n >= kSlots) while (!barrier_test(b, (n / kSlots - 1) & 1)) {}
    barrier_expect(b, kUnit);
    copy_bulk(memory + n % kSlots * kUnit, r.from + unit * kUnit, kUnit, b);
  }
  for (u64 i = n > kSlots ? n - kSlots : 0; i < n; ++i)
    while (!barrier_test(full + i % kSlots, (i / kSlots) & 1)) {}
}
"""


class Reads(ctypes.Structure):
    """struct Reads of CEILING."""

    _fields_ = [("start", ctypes.c_void_p), ("units", ctypes.c_uint64)]


def config_of(name: str) -> dict[str, Any]:
    """The Hugging Face configuration of a model's name, with or without FP8 behind it."""
    return MODELS[name.removesuffix(FP8)]


def compiled(name: str, context: int, device: Any) -> Program:
    """The decoding program of a model for that many positions."""
    graph = build_graph(load_config(config_of(name)), context)
    dtypes = {n: DType.BF16 for n in graph.weights if n != ROPE_TABLE}
    scales: dict[str, Scale] = {}
    if name.endswith(FP8):
        linear = [n for n in dtypes if n.endswith("_proj.weight")]
        scales = {n: Scale(f"{n}_scale_inv", BLOCK) for n in linear}
        dtypes |= dict.fromkeys(linear, DType.F8E4M3)
    return build(graph, device.machine, Limits(1, 1, 1, context), dtypes, scales)


def random_weights(name: str, program: Program, device: Any) -> dict[str, Any]:
    """Memory with random values for each weight of the program."""
    import torch

    made: dict[str, Any] = {}
    scales = {program.buffers[b.scale].name for b in program.buffers if b.scale != NONE}
    for b in (b for b in program.buffers if b.kind is Kind.WEIGHT):
        memory = made[b.name] = device.allocate(b.bytes)
        if b.name == ROPE_TABLE:
            table = rotary_table(load_config(config_of(name)), b.rows)
            memory.write(np.concatenate(table, axis=1))
        elif b.name in scales:
            memory.tensor.view(torch.float32).fill_(1 / 400)
        elif b.dtype is DType.F8E4M3:
            values = torch.randn(b.rows, b.cols, device="cuda") * 400 * b.cols**-0.5
            memory.tensor.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8).view(-1))
        else:
            values = torch.randn(b.rows, b.cols, device="cuda") * b.cols**-0.5
            if b.rows == 1:
                values = 1 + 0.1 * torch.randn(1, b.cols, device="cuda")
            memory.tensor.view(torch.bfloat16).copy_(values.bfloat16().view(-1))
    return made


def step_bytes(name: str, program: Program, past: float) -> float:
    """Bytes of weights that a step reads, and of the cache with `past` positions."""
    config = load_config(config_of(name))
    weights = sum(
        b.bytes for b in program.buffers
        if b.kind is Kind.WEIGHT and b.name != ROPE_TABLE
        and (config.tie_word_embeddings or "embed_tokens" not in b.name)
    )  # fmt: skip
    width = config.num_key_value_heads * config.head_dim
    return weights + past * config.num_hidden_layers * 2 * 2 * width


def time_ours(name: str, inputs: list[int], repeats: int, program: Program) -> dict[int, float]:
    """Median milliseconds per token of this process, by number of tokens before."""
    import torch

    device = open_device()
    weights = random_weights(name, program, device)
    pages = program.context // PAGE
    caches = {
        n: device.allocate(2 * int(np.prod(s))) for n, s in cache_shapes(program, pages).items()
    }
    for memory in caches.values():
        memory.tensor.view(torch.bfloat16).normal_(0, 0.5)
    backend = CudaBackend(
        program, {n: m.address for n, m in weights.items()},
        {n: m.address for n, m in caches.items()}, device,
    )  # fmt: skip
    backend.state["counts"][0] = 1, 1
    backend.state["pages"][0] = np.arange(pages)
    found: dict[int, float] = {}
    for before in inputs:
        times: list[float] = []
        for _ in range(repeats + 1):
            backend.state["tokens"][0, 0], backend.state["positions"][0, 0] = 17, before
            torch.cuda.synchronize()
            begin = time.perf_counter()
            tokens = sum(1 for _ in backend.steps(STEPS))
            times.append((time.perf_counter() - begin) / STEPS * 1e3)
            assert tokens == STEPS
        found[before] = statistics.median(times[1:])
    return found


def time_transformers(name: str, before: int, repeats: int) -> float:
    """Median milliseconds per token of transformers with a static cache and its own compiling."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**config_of(name))
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (1, before), device="cuda")

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, cache_implementation="static", pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    for count in (2, 129) * 3:
        seconds(count)
    return statistics.median((seconds(129) - seconds(2)) / STEPS * 1e3 for _ in range(repeats))


def measure_ceiling(device: Any) -> float:
    """Bytes per second that all multiprocessors together read by bulk copies; the best of 10."""
    import torch

    size = 4 << 30
    memory = device.allocate(size)
    memory.tensor.random_(0, 255)
    source = Source(CEILING, {"ptx.cuh": (FOLDER / "ptx.cuh").read_text()}, [])
    kernel = device.load(source, "reads", 12 * 16384 + 256)
    best = 0.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kernel.launch(device.machine.workers_per_device, Reads(memory.address, size // 16384))
        end.record()
        end.synchronize()
        best = max(best, size / start.elapsed_time(end) * 1e3)
    return best


def in_child(arguments: list[str], timeout: float) -> Any:
    """What a process of this script prints as its last line; None when it fails or takes too long."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        print(f"{' '.join(arguments)}: more than {timeout:g} s", file=sys.stderr)
        return None
    if done.returncode:
        print(f"{' '.join(arguments)}: {done.stderr[-600:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(
    name: str, args: argparse.Namespace, device: Any, ceiling: float
) -> list[dict[str, Any]]:
    """The table's rows of one model."""
    context = -(-(max(args.inputs) + STEPS + 1) // PAGE) * PAGE
    program = compiled(name, context, device)
    listed = ",".join(map(str, args.inputs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program"
        path.write_bytes(pickle.dumps(program))
        child = [
            "--child",
            name,
            "--inputs",
            listed,
            "--repeats",
            str(args.repeats),
            "--program",
            str(path),
        ]
        found = [in_child(child, 300) for _ in range(args.processes)]
    rows: list[dict[str, Any]] = []
    for before in args.inputs:
        medians = [each[str(before)] for each in found if each]
        if not medians:
            continue
        ms = statistics.median(medians)
        size = step_bytes(name, program, before + STEPS / 2)
        row = {
            "model": name, "input": before, "ms_per_token": ms, "processes": medians, "bytes": size,
            "share": size / ceiling / ms * 1e3,
        }  # fmt: skip
        if args.peers and not name.endswith(FP8):
            child = ["--peer", name, "--inputs", str(before), "--repeats", str(args.repeats)]
            row["transformers_ms"] = in_child(child, args.peer_timeout)
        rows.append(row)
        peer = row.get("transformers_ms")
        print(
            f"{name:18} {before:6} {ms:8.4f} ms  {row['share']:6.1%} of the ceiling"
            + (f"  transformers {peer:.3f} ms, ratio {peer / ms:.2f}" if peer else ""), flush=True,
        )  # fmt: skip
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*MODELS, *(f"{name}{FP8}" for name in MODELS)]
    parser.add_argument(
        "--models", default=",".join([*MODELS, "Qwen3-8B-FP8"]), help="names, with commas"
    )
    parser.add_argument("--inputs", default="32,1024", help="tokens before, with commas")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="time transformers too")
    parser.add_argument("--peer-timeout", type=float, default=300, help="seconds")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    parser.add_argument("--out", type=Path, help="file of the results")
    for hidden in ("--child", "--peer", "--program"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.models, args.inputs = args.models.split(","), [int(n) for n in args.inputs.split(",")]
    if unknown := [name for name in args.models if name not in names]:
        parser.error(f"model '{unknown[0]}' is not known; accepted are {', '.join(names)}")
    return args


def main() -> int:
    """Run the benchmark; 2 without a GPU."""
    args = arguments()
    if args.peer:
        print(json.dumps(time_transformers(args.peer, args.inputs[0], args.repeats)))
        return 0
    if args.child:
        program = pickle.loads(Path(args.program).read_bytes())
        print(json.dumps(time_ours(args.child, args.inputs, args.repeats, program)))
        return 0
    try:
        device = open_device()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import torch

    ceiling = measure_ceiling(device)
    torch.cuda.empty_cache()
    print(f"{device.name}: reads {ceiling / 1e9:.0f} GB/s", flush=True)
    rows = [row for name in args.models for row in rows_of(name, args, device, ceiling)]
    chosen = sys.argv[1:]
    for option in ("--commit", "--out"):  # they say nothing of what was measured
        if option in chosen:
            del chosen[chosen.index(option) : chosen.index(option) + 2]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = args.commit or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    result = {
        "device": device.name, "workers": device.machine.workers_per_device, "ceiling": ceiling,
        "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit,
        "transformers": version("transformers") if args.peers else None,
        "date": date.today().isoformat(), "command": " ".join(["python bench/decode_gpu.py", *chosen]),
        "repeats": args.repeats, "rows": rows,
    }  # fmt: skip
    out = args.out or RESULTS / f"decode-gpu-{device.name.split()[-1].lower()}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
