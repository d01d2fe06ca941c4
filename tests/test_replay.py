"""Hangs: recorded by the CUDA back end (on the emulator), kept, and told by `tilert replay`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from emulator import SUPPORTED, EmulatedDevice
from programs import GOOD
from test_cuda_kernel import begin, compiled, loaded, rewrite

from tilert.backends import hang
from tilert.backends.cuda import backend as cuda
from tilert.backends.cuda import tables
from tilert.backends.cuda.backend import CudaBackend, LaunchError
from tilert.backends.hang import Hang
from tilert.backends.protocol import BY_TAG, Protocol, Stuck
from tilert.errors import UserError
from tilert.files import keep
from tilert.ir import encode
from tilert.ir.program import Program, Wait
from tilert.ops import Append, Linear
from tilert.serve import cli
from tilert.serve.replay import report

emulated = pytest.mark.skipif(not SUPPORTED, reason="the emulator needs g++ on x86-64")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def device(kernels: Path) -> EmulatedDevice:
    return EmulatedDevice(kernels)


def with_wait(program: Program, worker: int, place: int, wait: Wait) -> Program:
    """The program with the first wait of one run replaced."""
    queues = [list(queue) for queue in program.queues]
    run = queues[worker][place]
    queues[worker][place] = replace(run, waits=(wait, *run.waits[1:]))
    return replace(program, queues=tuple(map(tuple, queues)))


def failed(made: CudaBackend, position: int = 5) -> tuple[str, Path]:
    """The sentence of a launch that hangs, and the record that it names."""
    begin(made, 5, position)
    with pytest.raises(LaunchError) as caught:
        list(made.steps(3))
    text = str(caught.value)
    found = re.search(r"; for the reason: tilert replay (\S+)$", text)
    assert found, text
    return text, Path(found[1])


def replayed(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["replay", str(path)]) == 0
    return capsys.readouterr().out


def frozen(program: Program, worker: int, place: int, step: int, steps: int = 8) -> Hang:
    """What the others record when one worker never ends a run."""
    launch = Protocol(program, steps)
    moved = True
    while moved:
        moved = False
        for at in launch.places:
            stands = (at.worker, at.position, at.step) == (worker, place, step)
            if not stands and launch.ready(at):
                launch.finish(at)
                moved = True
    failures: list[tuple[int, ...]] = [(0, 0, 0, 0, 0)] * len(program.queues)
    for s in launch.stuck():
        failures[s.worker] = tuple(s[1:])
    failures[worker] = (0, 0, 0, 0, 0)
    return Hang(program, steps, (5,), (0,), tuple(failures))


@emulated
def test_a_wrong_threshold_is_the_fault_of_the_program(
    device: EmulatedDevice, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, weights = compiled("llama")
    place, run = next((i, r) for i, r in enumerate(program.queues[1]) if r.waits)
    wait = run.waits[0]
    wrong = wait._replace(threshold=wait.threshold + 1)
    made, _ = loaded(with_wait(program, 1, place, wrong), weights, device)
    text, path = failed(made)
    assert f"worker 1, run {place} of step 0" in text
    assert path.parent == cache / "hang"
    kept = hang.load(path)
    assert (kept.program, kept.steps, kept.positions) == (made.program, 3, (5,))
    said = replayed(path, capsys)
    cause = next(line for line in said.splitlines() if line.startswith("cause:"))
    assert f"worker 1, run {place} (o{run.op} " in cause
    assert (
        f"in step 0 waits for c{wait.counter}: it has {wait.threshold}, wants {wrong.threshold}"
        in cause
    )
    assert "this wait can never hold" in said
    assert f"worker 1, run {place}: the cause" in said
    assert "fault:  the program's" in said
    assert "the device stood at the same place" in said


@emulated
def test_a_signal_that_the_device_lost_is_its_own_fault(
    device: EmulatedDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    program, weights = compiled("llama")
    made, _ = loaded(program, weights, device)
    place = next(i for i, r in enumerate(program.queues[1]) if r.signal >= 0)
    lost = program.queues[1][place].signal
    made.runs[1]["signal"][place] = tables.NO_SIGNAL
    rewrite(made)
    _, path = failed(made)
    said = replayed(path, capsys)
    assert "runs through to the end, so the program is sound" in said
    assert re.search(rf"cause: .* waits for c{lost}: .*; no other's wait explains it", said)
    assert "so a signal is lost" in said
    assert "fault:  the device's" in said


@emulated
def test_words_with_other_tags_are_told_as_such(
    device: EmulatedDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    program, weights = compiled("llama")
    made, _ = loaded(program, weights, device)
    place = next(
        i for i, r in enumerate(program.queues[1]) if isinstance(program.ops[r.op], Linear)
    )
    made.runs[1]["x"][place] ^= 1 << cuda.RANK_SHIFT
    rewrite(made)
    text, path = failed(made)
    assert re.search(rf"worker 1, run {place} of step 0 .* words with tag \d+; ", text)
    said = replayed(path, capsys)
    assert re.search(
        rf"words:  worker 1, run {place} .* words with tag \d+ and finds other tags", said
    )
    assert "the device's tables differ" in said
    assert "c4294967295" not in said
    assert "fault:  the device's" in said


def test_words_that_never_came_name_their_writer() -> None:
    program, _ = compiled("llama")
    place, run = next(
        (i, r) for i, r in enumerate(program.queues[1]) if isinstance(program.ops[r.op], Linear)
    )
    failures = [(0, 0, 0, 0, 0), (place, 0, BY_TAG, 0, 1), (0, 0, 0, 0, 0)]
    said = "\n".join(report(Hang(program, 4, (5,), (0,), tuple(failures))))
    assert f"(o{run.op} linear" in said
    assert "that is what o0 embed writes to 'embed' in this step" in said


@pytest.mark.parametrize("step", [0, 1, 6])
@pytest.mark.parametrize("worker", [0, 1, 2])
def test_a_worker_that_stands_still_is_found(worker: int, step: int) -> None:
    """In a sound program, at every run of the worker that somebody else waits for. What is appended is missed
    in the next step alone; before that the runs behind it in the queue are."""
    program, _ = compiled("llama")
    others = {
        wait.counter
        for other, queue in enumerate(program.queues)
        if other != worker
        for run in queue
        for wait in run.waits
    }
    for place, run in enumerate(program.queues[worker]):
        if run.signal not in others or isinstance(program.ops[run.op], Append):
            continue
        lines = report(frozen(program, worker, place, step))
        assert f"no word of worker {worker}" in lines[1]
        assert "replay: the protocol runs through to the end, so the program is sound" in lines
        assert any(
            line.startswith(f"first:  worker {worker}, run {place} ") and f"in step {step} " in line
            for line in lines
        ), "\n".join(lines)
        assert lines[-1].startswith(
            "fault:  the device's: a worker that was killed or took too long"
        )


def test_a_circle_is_told_as_one() -> None:
    program = with_wait(GOOD["greedy"], 0, 0, Wait(1, 2))  # needs what waits for it
    said = report(Hang(program, 2, (0,), (0,), ((0, 0, 1, 0, 2), (0, 0, 0, 0, 1))))
    assert "cause:  workers wait for each other in a circle, of which no wait can ever hold" in said
    assert any("where the circle closes" in line for line in said)
    assert (
        said[-1]
        == "        the device stood at the same place: the same waiter, counter and values"
    )


def test_a_record_comes_back_as_it_was() -> None:
    program, _ = compiled("llama", tokens=4)
    given = Hang(
        program, 16, (62, 63, 7), (0, 0, 2), ((3, 1, 2, 7, 8), (0,) * 5, (4, 1, BY_TAG, 0, 255))
    )
    path = hang.save(given)
    assert path is not None
    assert hang.save(given) == path
    assert hang.load(path) == given
    assert given.stuck == [Stuck(0, 3, 1, 2, 7, 8), Stuck(2, 4, 1, BY_TAG, 0, 255)]


def test_a_cache_that_cannot_be_written_leaves_the_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path / "file"))
    assert hang.save(frozen(GOOD["greedy"], 0, 0, 0)) is None


def record(head: dict[str, object] | None = None, binary: bytes | None = None) -> bytes:
    """The content of a record, with other fields in its head or another program."""
    made = frozen(GOOD["greedy"], 1, 0, 0)
    path = hang.save(made)
    assert path is not None
    line, _, program = path.read_bytes().partition(b"\n")[2].partition(b"\n")
    changed = json.dumps({**json.loads(line), **(head or {})}).encode()
    return changed + b"\n" + (program if binary is None else binary)


def of_version(version: int) -> bytes:
    words = bytearray(encode.to_bytes(GOOD["greedy"]))
    words[4:8] = version.to_bytes(4, "little")
    return bytes(words)


def test_files_that_are_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = tmp_path / "checked"
    keep(checked, record())
    whole = checked.read_bytes()
    damaged: dict[str, bytes | None] = {
        "missing": None, "empty": b"", "cut": whole[:-9], "head only": whole[:100],
        "changed": whole[:-1] + b"?", "json": b'{"model_type": "llama"}', "bytes": bytes(range(256)),
    }  # fmt: skip
    foreign: dict[str, bytes] = {
        "other json": b'{"model_type": "llama"}', "no object": b"[1, 2]\n", "no json": b"hello\nyou",
        "other format": record({"format": "tilert hang 0"}), "no steps": record({"steps": 0}),
        "few failures": record({"failures": []}), "words": record({"failures": [[1, 2], [3]]}),
        "strange": record({"failures": [[0, 0, 99, 0, 1], [0] * 5]}), "text": record({"steps": "x"}),
        "no program": record(binary=b""), "half a program": record(binary=of_version(1)[:200]),
        "next version": record(binary=of_version(2)),
    }  # fmt: skip
    for name, data in damaged.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    for name, data in foreign.items():
        keep(tmp_path / name, data)
    for name in (*damaged, *foreign, "."):
        assert cli.main(["replay", str(tmp_path / name)]) == 2, name
        said = capsys.readouterr().err
        assert said.startswith(
            ("tilert replay: cannot read", f"tilert replay: {tmp_path / name} is not")
        )
        assert said.count("\n") == 1
    with pytest.raises(UserError, match=f"accepted is '{hang.FORMAT}' with a program of version 1"):
        hang.load(tmp_path / "next version")
