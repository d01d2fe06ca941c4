"""SmolLM2-135M-Instruct: the real model against transformers, and back ends against each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tilert import LLM, SamplingParams
from tilert.text import write_gguf_tokenizer
from tilert.weights import resolve_model

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue.",
]
BACKENDS: list[tuple[Any, int]] = [("cpu", 1), ("cpu", 2), ("interpreter", 2)]
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def f32(smollm2_gguf: Path) -> Path:
    return resolve_model(str(smollm2_gguf), write_gguf_tokenizer, dtype="float32", progress=None)


@pytest.fixture(scope="module")
def reference(f32: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(f32, dtype=torch.float32).eval()


def test_64_greedy_tokens_equal_transformers(f32: Path, reference: Any) -> None:
    llm = LLM(f32, threads=2)
    for question in QUESTIONS:
        prompt = llm.chat_prompt([{"role": "user", "content": question}])
        ids = prompt["prompt_token_ids"]
        own = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
        with torch.no_grad():
            prompt_ids = torch.tensor([ids])
            full = reference.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),  # the chat template uses the padding id
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
            )
        assert own == full[0, len(ids) :].tolist()


def test_interpreter_and_threads_give_the_same_tokens(f32: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    made = [
        LLM(f32, threads=threads, backend=backend)
        .generate("The sea is", params)[0]
        .outputs[0]
        .token_ids
        for backend, threads in BACKENDS
    ]
    assert made[0] == made[1] == made[2]


def test_a_stop_string_that_straddles_tokens_ends_the_text_before_it(f32: Path) -> None:
    llm = LLM(f32, threads=2)
    messages = [{"role": "user", "content": QUESTIONS[2]}]
    free = llm.chat(messages, SamplingParams(temperature=0, max_tokens=48))[0].outputs[0]
    stop = free.text[21:30]
    assert stop.strip(), "the answer is too short for this test"
    params = SamplingParams(temperature=0, max_tokens=48, stop=[stop])
    cut = llm.chat(messages, params)[0].outputs[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert len(cut.token_ids) < len(free.token_ids)


def test_min_tokens_holds_stop_strings_back(f32: Path) -> None:
    llm = LLM(f32, threads=2)
    given = {"temperature": 0, "max_tokens": 12, "stop": [" "]}
    early = llm.generate("The sea is", SamplingParams(**given))[0].outputs[0]
    assert (early.text, early.finish_reason) == ("", "stop")
    late = llm.generate("The sea is", SamplingParams(**given, min_tokens=5))[0].outputs[0]
    assert len(late.token_ids) == 6
    assert late.text.count(" ") == 5
    assert (late.finish_reason, late.stop_reason) == ("stop", " ")


def test_logprobs_are_those_of_the_logits(f32: Path, reference: Any) -> None:
    llm = LLM(f32, threads=2)
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, ignore_eos=True)
    result = llm.generate("Once upon a", params)[0]
    output = result.outputs[0]
    ids = torch.tensor([result.prompt_token_ids + output.token_ids])
    with torch.no_grad():
        expected = torch.log_softmax(reference(ids).logits[0], dim=-1)
    assert output.logprobs is not None
    for i, entry in enumerate(output.logprobs):
        row = expected[len(result.prompt_token_ids) - 1 + i]
        assert len(entry) == 3
        for token, logprob in entry.items():
            assert abs(logprob.logprob - float(row[token])) < 1e-3


def test_loading_needs_little_more_memory_than_the_file(f32: Path) -> None:
    program = (
        "import sys; from tilert import LLM; LLM(sys.argv[1]);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(f32)], capture_output=True, text=True, check=True
    )
    peak = int(run.stdout) * 1024
    assert peak < (f32 / "model.safetensors").stat().st_size + 300e6
