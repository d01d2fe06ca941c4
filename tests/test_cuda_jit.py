"""Compiling for GPUs without one: every kernel for every target, the cache, and what goes wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tilert.backends.cuda import jit
from tilert.backends.cuda.jit import TARGETS, compile_cubin
from tilert.backends.cuda.limits import fitting
from tilert.backends.cuda.source import KERNEL, Source, generate
from tilert.compiler import Limits, build
from tilert.compiler.units import with_units
from tilert.errors import UserError
from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.ir.graph import Speculation
from tilert.ir.program import Scale
from tilert.models import load_config, mtp
from tilert.models.decoder import build as build_graph
from tilert.models.derived import ROPE_TABLE

pytest.importorskip("cuda.bindings.nvrtc")

SOURCE = '#include "n.h"\nextern "C" __global__ void twice(float* x) { x[threadIdx.x] *= N; }\n'
BASE: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "num_hidden_layers": 1,
                        "max_position_embeddings": 8192, "vocab_size": 4096}  # fmt: skip
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}  # fmt: skip
# One layer of each shape; the vocabulary is cut, for only its product and sampling depend on it.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
                 "num_key_value_heads": 8},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                 "num_key_value_heads": 8},
    "qwen3-0.6b": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "qwen3-4b": {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "qwen2-7b": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
                 "num_attention_heads": 28, "num_key_value_heads": 4},
    "mistral-7b": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3-8b-fp8": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    # Sampling that reports log-probabilities has all ops of sampling.
    "sampled": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 151936},
    "qwen3-30b-a3b": QWEN3_30B,
    "qwen3-30b-a3b-fp8": QWEN3_30B,
    "mixtral-8x7b": {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
                     "num_experts_per_tok": 2},
    # As one of eight GPUs has it; a layer without experts.
    "deepseek-v3.2": {"model_type": "deepseek_v32", "hidden_size": 7168, "intermediate_size": 2304,
                      "num_attention_heads": 16, "num_key_value_heads": 16, "first_k_dense_replace": 1},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
                "num_key_value_heads": 3},
}  # fmt: skip


def twice(cache: Path, **changes: Any) -> jit.Cubin:
    given: dict[str, Any] = {
        "source": SOURCE, "name": "twice", "arch": "sm_90a", "headers": {"n.h": "#define N 2.0f\n"},
        "cache": cache,
    }  # fmt: skip
    return compile_cubin(**given | changes)


def source_of(name: str, arch: str, tokens: int = 1, **tuned: int) -> Source:
    graph = build_graph(load_config({**BASE, **SHAPES[name]}), 8192)
    dtypes = {w: DType.BF16 for w in graph.weights if w != ROPE_TABLE}
    target = machine.B200 if arch == "sm_100a" else machine.H200
    scales: dict[str, Scale] = {}
    if name.endswith("fp8"):
        scales = {w: Scale(f"{w}_scale_inv", (128, 128)) for w in dtypes if "_proj" in w}
        dtypes |= dict.fromkeys(scales, DType.F8E4M3)
    if name.startswith("deepseek"):
        target = with_units(graph, target, dtypes)
    target = replace(target, **tuned)
    limits = Limits(tokens, tokens, tokens, 8192, name == "sampled", name == "sampled")
    program = build(graph, target, limits, dtypes, scales)
    return generate(program, fitting(program, TARGETS[arch]))


# Models whose ops have the forms of another one's, with other numbers: one target stands for all.
ALIKE = ("llama-8b", "qwen3-0.6b", "qwen3-4b", "qwen3-30b-a3b")


@pytest.mark.parametrize(
    ("name", "arch"),
    [(n, a) for n in SHAPES for a in TARGETS if n not in ALIKE or a == "sm_90a"],
)  # fmt: skip
def test_kernels_compile_for_every_target(name: str, arch: str, tmp_path: Path) -> None:
    """What little is spilled lives from one op to the next; see the test below."""
    source = source_of(name, arch)
    cubin = compile_cubin(
        source.text, name=KERNEL, arch=arch, headers=source.headers, cache=tmp_path
    )
    used = cubin.resources[KERNEL]
    assert used.registers <= 168
    mixture = (
        name.startswith("deepseek") or {"num_experts", "num_local_experts"} & SHAPES[name].keys()
    )
    most = 512 if mixture else 256
    if name.startswith("qwen3-30b") and arch != "sm_120a":
        most = 16  # what its threads spill does not fit the L1 that shared memory leaves
    assert max(used.stack, used.spill_stores) <= most, used


def resources(source: Source, numbers: Sequence[str], arch: str, cache: Path) -> jit.Resources:
    """What a kernel of some of a source's variants takes."""
    cases = " ".join(f"X({number})" for number in numbers)
    some = re.sub(r"(?<=VARIANTS\(X\)).*", f" {cases}", source.headers["variants.h"])
    headers = {**source.headers, "variants.h": some}
    cubin = compile_cubin(source.text, name=KERNEL, arch=arch, headers=headers, cache=cache)
    return cubin.resources[KERNEL]


@pytest.mark.parametrize("name", SHAPES)
def test_no_op_spills_in_its_loops(name: str, tmp_path: Path) -> None:
    """A kernel of one variant has no values to keep for others, so all that it spilled would be its own."""
    source = source_of(name, "sm_90a")
    kinds = dict(re.findall(r"using V(\d+) = (.*);", source.headers["variants.h"]))
    own = re.compile(
        "Route|InTurn|SideBySide|Latent|Index|Select|Blocks|Adjust|Bins|Totals|Sift|Draw|Survey|Report"
    )
    if any(own.search(kind) for kind in kinds.values()):  # other models have the rest as well
        kinds = {number: kind for number, kind in kinds.items() if own.search(kind)}
    alike = re.compile(
        "(Embed|Argmax|NextToken)<"
    )  # they read no weights; one model stands for all
    for number, kind in kinds.items():
        if name != "llama-1b" and alike.match(kind):
            continue
        used = resources(source, [number], "sm_90a", tmp_path)
        assert used.stack == used.spill_stores == used.spill_loads == 0, (number, used)


@pytest.mark.parametrize("tokens", [1, 4])
def test_packed_latents_do_not_spill(tokens: int, tmp_path: Path) -> None:
    source = source_of("deepseek-v3.2", "sm_90a", tokens, packed_latents=True)
    kinds = re.findall(r"using V(\d+) = (Latent\w+)<", source.headers["variants.h"])
    assert {kind for _, kind in kinds} == {"LatentAppend", "LatentAttention"}
    for number, kind in kinds:
        used = resources(source, [number], "sm_90a", tmp_path)
        assert used.stack == used.spill_stores == used.spill_loads == 0, (kind, used)


def test_what_verifies_and_makes_guesses_does_not_spill(tmp_path: Path) -> None:
    config = load_config({**BASE, **SHAPES["deepseek-v3.2"], "num_nextn_predict_layers": 1})
    graph, layer = build_graph(config, 8192, hidden=True), mtp.build(config, 8192, ())
    dtypes = {w: DType.BF16 for w in {**graph.weights, **layer.weights} if w != ROPE_TABLE}
    target = with_units(graph, replace(machine.H200, workers_per_device=16), dtypes)
    program = build(Speculation(graph, layer, 3), target, Limits(4, 4, 1, 8192), dtypes)
    source = generate(program, fitting(program, TARGETS["sm_90a"]))
    kinds = re.findall(r"using V(\d+) = (Norm|Accept|Guess)<", source.headers["variants.h"])
    assert {kind for _, kind in kinds} == {"Norm", "Accept", "Guess"}
    for number, _ in kinds:
        used = resources(source, [number], "sm_90a", tmp_path)
        assert used.stack == used.spill_stores == used.spill_loads == 0, (number, used)


@pytest.mark.parametrize(
    ("name", "tokens", "stack"), [("llama-8b", 4, 64), ("llama-1b", 8, 128), ("llama-8b", 8, 256)]
)
def test_kernels_of_several_tokens_have_their_registers(
    name: str, tokens: int, stack: int, tmp_path: Path
) -> None:
    """Of all ops together: a register that only some lanes write, and none before, is kept for its op from
    one run to the next, and what others spill for it only the whole kernel shows."""
    source = source_of(name, "sm_90a", tokens)
    cubin = compile_cubin(
        source.text, name=KERNEL, arch="sm_90a", headers=source.headers, cache=tmp_path
    )
    assert cubin.resources[KERNEL].stack <= stack


# What is of each token by itself, and how many bytes of stack it may take: down products keep some of x'
# while they make the next of it.
OF_TOKENS = {
    "Latent|Index|Select|Combine": 32,
    r"Route|false, false, \d|InTurn": 0,
    "SideBySide": 256,
}
# On sm_120a the larger one has too little memory, and `down` of the other spills 328 bytes.
FOUR_TOKENS = [
    ("deepseek-v3.2", "sm_90a"),
    ("qwen3-30b-a3b", "sm_90a"),
    ("qwen3-30b-a3b", "sm_100a"),
]


@pytest.mark.parametrize(("name", "arch"), FOUR_TOKENS)
def test_steps_of_four_tokens_compile(name: str, arch: str, tmp_path: Path) -> None:
    """As when three guesses are verified."""
    source = source_of(name, arch, tokens=4)
    kinds = re.findall(r"using V(\d+) = (.*);", source.headers["variants.h"])
    for own, stack in OF_TOKENS.items():
        numbers = [number for number, kind in kinds if re.search(own, kind)]
        if not numbers:
            continue
        used = resources(source, numbers, arch, tmp_path)
        assert used.stack <= stack, (own, used)


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        ("llama-1b", {"slots": 24, "slot_bytes": 8192}), ("llama-1b", {"slots": 6, "slot_bytes": 32768}),
        ("llama-1b", {"splits": 16}), ("qwen3-0.6b", {"slots": 8, "slot_bytes": 24576}),
        ("qwen3-8b-fp8", {"slots": 8, "slot_bytes": 24576}),
    ],
)  # fmt: skip
def test_what_tune_tries_compiles(name: str, tuned: dict[str, int], tmp_path: Path) -> None:
    """Spills would only cost time there, and tune measures that."""
    made = source_of(name, "sm_90a", **tuned)
    cubin = compile_cubin(
        made.text, name=KERNEL, arch="sm_90a", headers=made.headers, cache=tmp_path
    )
    assert cubin.resources[KERNEL].registers <= 168


SPILLS = """
__device__ __noinline__ float far(const float* x, int n) {
  float kept[400];
  for (int i = 0; i < 400; ++i) kept[i] = x[i * n];
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += kept[(i * 7) % 400];
  return sum;
}
typedef float (*Function)(const float*, int);
__device__ Function pointer = far;
extern "C" __global__ void calls(float* x, int n) { x[threadIdx.x] = pointer(x, n); }
extern "C" __global__ void plain(float* x) { x[threadIdx.x] += 1; }
"""


def test_local_memory_of_called_functions_is_seen(tmp_path: Path) -> None:
    resources = twice(tmp_path, source=SPILLS).resources
    assert resources["calls"].stack >= 1600
    assert resources["plain"].stack == resources["plain"].spill_stores == 0


def test_an_equal_compile_is_found(tmp_path: Path) -> None:
    said: list[str] = []
    first = twice(tmp_path, progress=said.append)
    second = twice(tmp_path, progress=said.append)
    assert said == ["compiling twice for sm_90a (once; a few seconds)"]
    assert first.seconds > 0
    assert second == replace(first, seconds=0.0)
    assert first.resources["twice"].registers > 0
    changed = twice(tmp_path, headers={"n.h": "#define N 3.0f\n"}, progress=said.append)
    assert len(said) == 2
    assert changed.data != first.data


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:80] + b"x" + b[81:]]
)
def test_a_damaged_file_is_compiled_again(tmp_path: Path, damage: Any) -> None:
    first = twice(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert twice(tmp_path).data == first.data
    assert twice(tmp_path).seconds == 0


def test_several_at_once_leave_one_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: twice(tmp_path).data, range(4)))
    assert len(set(made)) == len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert twice(blocked / "cache").data


def test_a_refused_source_leaves_its_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refused twice for sm_90a; its log is .*\.log$") as caught:
        twice(tmp_path, source="nonsense")
    log = Path(str(caught.value).rsplit(" ", 1)[1])
    assert "nonsense" in log.read_text()
    with pytest.raises(UserError, match="'sm_80' is not known; accepted are sm_90a"):
        twice(tmp_path, arch="sm_80")


def test_without_the_packages_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UserError, match=r"pip install 'tilert\[cuda\]'"):
        twice(tmp_path)
