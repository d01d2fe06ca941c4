"""The public package's interface: its script word for word, its command, and what is refused."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_deepseek
import torch

from tilert import LLM, SamplingParams, generate
from tilert.backends import cpu
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.models.deepseek_v3_2.dsa_show_hands import ShowHandsGenerator
from tilert.serve import show_hands
from tilert.serve.convert import run as convert
from tilert.text import Tokenizer, deepseek
from tilert.weights import settings

SCRIPT = Path(__file__).parents[1] / "examples" / "show_hands.py"
PROMPT = "Tell me three jokes:\n\n1. A dad joke"


class Tiny(NamedTuple):
    """A checkpoint, its tokenizer and transformers' model of the same numbers."""

    folder: Path
    tokenizer: Tokenizer
    model: Any

    def ids(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt)

    def greedy(self, ids: list[int], tokens: int) -> list[int]:
        """What transformers makes after these ids; no token ends it."""
        given = torch.tensor([ids])
        with torch.no_grad():
            made = self.model.generate(
                given, max_new_tokens=tokens, do_sample=False, eos_token_id=None
            )
        return made[0, len(ids) :].tolist()

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def stop_at(self, token: int) -> None:
        """From now on this token ends an answer."""
        config = json.loads((self.folder / "config.json").read_text())
        (self.folder / "config.json").write_text(json.dumps(config | {"eos_token_id": token}))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Qwen3 in the layout of DeepSeek's checkpoints, converted; a prompt has no template."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "converted"))
    model = tiny_deepseek.make(source, tiny_deepseek.DENSE)
    convert(str(source), folder, 1, None, print)
    shutil.rmtree(source)
    return Tiny(folder, Tokenizer.from_folder(folder), model)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """DeepSeek-V3.2 with all that it has, converted."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "converted"))
    model = tiny_deepseek.make(source)
    convert(str(source), folder, 1, None, print)
    shutil.rmtree(source)
    return Tiny(folder, Tokenizer.from_folder(folder), model)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the user, and no GPU."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(settings.ENVIRONMENT, raising=False)
    monkeypatch.setattr(show_hands, "_has_gpu", lambda: False)


def generator(folder: Path, **options: Any) -> ShowHandsGenerator:
    made = ShowHandsGenerator(**{"max_new_tokens": 12, "model_weights_dir": folder, **options})
    made.from_pretrained()
    return made


def test_the_script_word_for_word(dense: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dense.folder, tmp_path / "model"))
    source = SCRIPT.read_text()
    start = source.index('    "Tell me')
    prompt = ast.literal_eval(f"({source[start : source.index(')', start)]})")
    expected = dense.greedy(dense.ids(prompt), 14)
    dense._replace(folder=folder).stop_at(expected[-1])
    expected = expected[: expected.index(expected[-1])]
    environment = {**os.environ, "MODEL_WEIGHTS_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True,
                          env=environment, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Prompt: {prompt}\nCompletion:\n{dense.text(expected)}\n"
    assert "tok/s" in done.stderr


def test_deepseek_v32_from_its_checkpoint_to_text(
    sparse: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """Converter, chat format, FP8 experts, sparse attention beyond what it selects, all on the CPU."""
    turn = f"<｜begin▁of▁sentence｜><｜User｜>{PROMPT}<｜Assistant｜></think>"
    ids = sparse.tokenizer.encode(turn, add_special_tokens=False)
    assert len(ids) > tiny_deepseek.CONFIG["index_topk"]
    expected = sparse.text(sparse.greedy(ids, 12))
    for with_mtp in (False, True):
        made = generator(sparse.folder, with_mtp=with_mtp)
        assert made.generate(PROMPT) == expected
        shown = capsys.readouterr()
        assert shown.out == expected + "\n"
        assert "interpreter" not in shown.err
        assert ("Accepted length: mean=" in shown.err) == with_mtp
        assert ("mtp: " in shown.err) == with_mtp  # the checkpoint's own layer
    made.enable_thinking = True
    assert made.llm is not None
    assert made._prompt(made.llm, PROMPT)["prompt"] == turn.replace("</think>", "<think>")


@pytest.mark.parametrize("with_mtp", [False, True])
def test_greedy_tokens_equal_transformers(
    dense: Tiny, capsys: pytest.CaptureFixture[str], with_mtp: bool
) -> None:
    expected = dense.text(dense.greedy(dense.ids(PROMPT), 12))
    made = generator(dense.folder, with_mtp=with_mtp)
    assert made.generate(PROMPT) == expected
    shown = capsys.readouterr()
    assert shown.out == expected + "\n"
    assert ("Accepted length: " in shown.err) == with_mtp
    assert ("has no layer for that" in shown.err) == with_mtp
    assert made.generate(PROMPT, print_log=False) == expected
    assert capsys.readouterr().out == ""


def test_latents_may_be_kept_in_fp8(sparse: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    model = LLM(sparse.folder, max_model_len=4096, kv_cache_dtype="fp8")
    made = generator(sparse.folder, max_new_tokens=3, kv_cache_dtype="fp8")
    asked = model.chat_prompt([{"role": "user", "content": PROMPT}], thinking=False)
    (expected,) = model.generate(asked, SamplingParams(temperature=0, max_tokens=3))
    assert made.generate(PROMPT, print_log=False) == expected.outputs[0].text
    assert made.llm is not None
    caches = [b for b in made.llm.runner.program("decode").buffers if "latent_cache" in b.name]
    assert caches
    assert all(b.dtype is DType.U8 for b in caches)
    command = ["--model-weights-dir", str(sparse.folder), "--kv-cache-dtype", "fp8"]
    assert generate.main([*command, "--max-new-tokens", "3", "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == expected.outputs[0].text + "\n"


def test_sampling(dense: Tiny) -> None:
    made = generator(dense.folder, use_topp=True, top_p=0.95, top_k=50, temperature=1.5)
    assert made.params.temperature == 1.5
    first = made.generate(PROMPT, print_log=False)
    assert made.generate(PROMPT, print_log=False) == first  # one seed
    made.update_sampling_params()
    greedy = made.generate(PROMPT, print_log=False)
    assert greedy == dense.text(dense.greedy(dense.ids(PROMPT), 12)) != first
    cases: list[tuple[dict[str, Any], tuple[float, float, int]]] = [
        ({}, (0.0, 1.0, 0)),
        ({"temperature": 0.7}, (0.7, 1.0, 0)),
        ({"use_topp": True}, (1.0, 0.9, 256)),
        ({"use_topp": True, "temperature": 0.0}, (0.0, 0.9, 256)),
    ]
    for options, expected in cases:
        params = ShowHandsGenerator(**options).params
        assert (params.temperature, params.top_p, params.top_k, params.seed) == (*expected, 42)


def test_what_the_cpu_lacks_the_interpreter_does(
    dense: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("the CPU back end does not run it")

    monkeypatch.setattr(cpu, "_check_runnable", refuse)
    made = generator(dense.folder, max_new_tokens=3)
    assert "does not run it; the interpreter takes its place" in capsys.readouterr().err
    assert made.generate(PROMPT, False) == dense.text(dense.greedy(dense.ids(PROMPT), 3))
    made.cleanup()
    with pytest.raises(UserError, match="the model is not loaded"):
        made.generate(PROMPT)


def test_the_folder_comes_from_the_settings(dense: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="give model_weights_dir, or set MODEL_WEIGHTS_DIR"):
        ShowHandsGenerator().from_pretrained()
    monkeypatch.setenv(settings.ENVIRONMENT, str(dense.folder))
    made = ShowHandsGenerator(max_new_tokens=2)
    made.from_pretrained()
    assert made.generate(PROMPT, print_log=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; accepted are integers from 1"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"use_topp": True, "top_p": 0.0}, "top_p is 0"),
        ({"sampling_seed": "x"}, "seed is 'x'"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShowHandsGenerator(**options)


def test_prompts_that_are_refused(dense: Tiny) -> None:
    made = generator(dense.folder)
    for prompt in ("", 7):
        with pytest.raises(UserError, match="accepted is a text that is not empty"):
            made.generate(prompt)  # type: ignore[arg-type]
    made.enable_thinking = True
    with pytest.raises(UserError, match="has no template that thinks"):
        made.generate(PROMPT)


def test_the_command(
    dense: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--model-weights-dir", str(dense.folder), "--max-new-tokens", "5"]
    expected = dense.text(dense.greedy(dense.ids(PROMPT), 5))
    assert generate.main([*common, "--prompt", PROMPT, "--with-mtp"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("One\n\nTwo\n/exit\nThree\n"))
    assert generate.main([*common, "--interactive"]) == 0
    lines = [dense.text(dense.greedy(dense.ids(line), 5)) for line in ("One", "Two")]
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "x"], "give model_weights_dir"),
        (["--prompt", "x", "--model-weights-dir", "/no/where"], "there is no model '/no/where'"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt-file", "/no/where"], "/no/where"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_prompt_of_deepseek_v32(tmp_path: Path) -> None:
    """As encoding/encoding_dsv32.py of the checkpoint writes a conversation."""
    tiny_deepseek.copy_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_templates == {}
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    first = f"{begin}system<｜User｜>user<｜Assistant｜></think>assistant{end}<｜User｜>user<｜Assistant｜>"
    for thinking, rest in ((False, "</think>"), (True, "<think>")):
        made = tokenizer.encode_chat(turns, chat_template=deepseek.CHAT_TEMPLATE, thinking=thinking)
        assert tokenizer.decode(made, skip_special_tokens=False) == first + rest
        for part in (begin, "<｜User｜>", "<｜Assistant｜>", rest, end):
            assert tokenizer.token_to_id(part) in made, f"{part} is not one token"
