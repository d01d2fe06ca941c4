"""The probe of hand-offs between GPUs: its kernels by the emulator, one host thread for each GPU, against
numpy; a GPU that never comes; what it says without GPUs."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulator
import pytest
from emulator import SUPPORTED, EmulatedDevice
from test_cuda_device import OK, Driver, pretend

from tilert.backends.cuda import device as module
from tilert.backends.cuda.jit import compile_cubin
from tilert.backends.cuda.source import Source

SCRIPT = Path(__file__).parents[1] / "bench" / "handoff_gpu.py"
ROWS = 1024
emulated = pytest.mark.skipif(not SUPPORTED, reason="the emulator needs g++ on x86-64")

# The names of system.cuh for fibers: who polls gives way.
SYSTEM = """
#pragma once
inline u32 load_peer(const u32* p) { return emulator::yield(), load_system(p); }
inline u32 load_peer_acquire(const u32* p) { return load_peer(p); }
inline uint4 load_peer4(const float* p) {
  emulator::yield();
  const volatile u32* v = reinterpret_cast<const volatile u32*>(p);
  return {v[0], v[1], v[2], v[3]};
}
inline uint2 load_peer2(const float* p) {
  const volatile u32* v = reinterpret_cast<const volatile u32*>(p);
  return {v[0], v[1]};
}
inline void store_peer_release(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline void add_peer(u32* p) { __atomic_fetch_add(p, 1, __ATOMIC_RELAXED); }
inline void fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
"""
KERNELS = (
    "tagged_sums",
    "polled_sums",
    "combined_sums",
    "counted_sums",
    "relaxed_ping",
    "ordered_ping",
)
# The emulator plays one kernel by name; this one is whichever the test asks for.
CHOICE = 'using Params = Job;\nextern "C" int chosen = 0;\ninline void tilert_program(const Params& p) {\n'
CHOICE += "".join(f"  if (chosen == {i}) {name}(p);\n" for i, name in enumerate(KERNELS)) + "}\n"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module(SCRIPT.stem)


class Chosen(emulator.Kernel):
    """One of the probe's kernels."""

    def __init__(self, made: emulator.Kernel, name: str) -> None:
        super().__init__(made.library, made.shared_bytes, made.device)
        self.name = name

    def launch(self, blocks: int, params: ctypes.Structure) -> None:
        ctypes.c_int.in_dll(self.library, "chosen").value = KERNELS.index(self.name)
        super().launch(blocks, params)


class Emulated(EmulatedDevice):
    """One of several GPUs: a library of its own, for an emulator has state."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__(folder, seed=number)
        self.number = number
        self.machine = replace(self.machine, workers_per_device=3)

    def load(self, source: Source, kernel: str, shared_bytes: int) -> emulator.Kernel:
        text = f"// GPU {self.number}\n{source.text}{CHOICE}"
        headers = {**source.headers, "system.cuh": SYSTEM}
        return Chosen(super().load(Source(text, headers, []), kernel, shared_bytes), kernel)


@pytest.fixture
def gpus(bench: Any, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Three, of which no wait is in vain: the emulator's clock counts polls, and a thread may sleep."""
    monkeypatch.setattr(bench, "PATIENCE", 1e9)
    made = [bench.Gpu(Emulated(kernels, n), 6 * bench.UNIT, ROWS) for n in range(3)]
    for gpu in made:
        gpu.stream.clear()
    return made


@emulated
@pytest.mark.parametrize("way", ["tagged", "polled", "combined", "counted"])
def test_sums_are_those_of_numpy(bench: Any, gpus: list[Any], way: str) -> None:
    for case in (
        bench.Case(way, 1, 1, True),
        bench.Case(way, 1, 2, False),
        bench.Case(way, 2, 2, True),
        bench.Case(way, 3, 3, False),
    ):
        used = gpus[: case.gpus]
        took, rate = bench.sum_once(used, case, rounds=4, warm=1)
        assert took > 0
        assert (rate > 0) == case.stream
    expected = bench.expected(2, ROWS, 4)
    assert len({*expected.tolist()}) > 20
    assert not (expected % 3).any()  # parts are once and twice the same


@emulated
@pytest.mark.parametrize("order", ["relaxed", "ordered"])
def test_a_word_goes_to_and_fro(bench: Any, gpus: list[Any], order: str) -> None:
    for used in (gpus[:1], gpus[:2]):
        assert bench.ping_once(used, order, stream=True, rounds=5, warm=2) > 0
        words = used[-1].state.read(bench.WORD, bench.LINE // 4, "u4")
        assert 5 in words.tolist()


@emulated
def test_a_wrong_sum_is_seen(bench: Any, gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.expected
    monkeypatch.setattr(bench, "expected", lambda *given: right(*given) + 1)
    with pytest.raises(bench.Failed, match="GPU 0 has a wrong sum in 3 of 3 blocks"):
        bench.sum_once(gpus[:1], bench.Case("polled", 1, 1, False), rounds=2, warm=1)


@emulated
@pytest.mark.parametrize(
    ("way", "waits"),
    [
        ("tagged", "the counter"),
        ("polled", "part [01]"),
        ("combined", "part 0"),
        ("counted", "the counter"),
    ],
)
def test_a_peer_that_never_comes_ends_in_a_sentence(
    bench: Any, gpus: list[Any], monkeypatch: pytest.MonkeyPatch, way: str, waits: str
) -> None:
    jobs = bench.sum_jobs(gpus, bench.Case(way, 2, 2, True), 4, 1)
    jobs[0].patience = 10**9
    with pytest.raises(
        bench.Failed, match=rf"^GPU 0, block \d waited in vain for {waits} of round 1: it"
    ):
        bench.launch(gpus[:1], f"{way}_sums", 2, jobs[:1])


@emulated
def test_a_player_that_never_comes_ends_in_a_sentence(
    bench: Any, gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PATIENCE", 1.0)
    absent: Any = bench.Gpu(Emulated(Path(), 1), bench.UNIT, ROWS)
    absent.kernel = lambda *_: type(
        "Absent", (), {"launch": lambda *_: None, "done": lambda _: True}
    )()
    with pytest.raises(bench.Failed, match=r"^GPU 0, block \d waited in vain for the .* of round"):
        bench.ping_once([gpus[0], absent], "relaxed", stream=False, rounds=5, warm=2)


def test_a_launch_that_does_not_end_is_left(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PATIENCE", -0.4)
    begun = threading.Event()
    kernel = type("Endless", (), {"launch": lambda *_: begun.set(), "done": lambda _: False})()
    gpu: Any = type(
        "Busy", (), {"kernel": lambda *_: kernel, "clear": lambda _: None, "blocks": 1}
    )()
    with pytest.raises(bench.Failed, match="GPU 0 has not ended its launch in time"):
        bench.launch([gpu], "polled_sums", 1, [bench.Job()])
    assert begun.is_set()


def test_the_kernels_compile_without_spills(bench: Any) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    for parts in (1, 2, 3, bench.MOST):
        made = bench.source(parts)
        cubin = compile_cubin(made.text, name="handoff", arch="sm_90a", headers=made.headers)
        assert cubin.resources.keys() == {*KERNELS}
        for used in cubin.resources.values():
            assert used.stack == used.spill_stores == 0
            assert used.registers <= 168  # 384 threads


def test_the_report_adds_up(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """Times that are made up: a microsecond for each part, two more for each GPU, and one for the stream."""
    monkeypatch.setattr(
        bench,
        "sum_once",
        lambda gpus, case: (case.parts + 2.0 * len(gpus) + case.stream, 2e12 * case.stream),
    )
    monkeypatch.setattr(
        bench,
        "ping_once",
        lambda gpus, order, stream: 1.0 * len(gpus) + stream + (order == "ordered"),
    )
    monkeypatch.setattr(bench, "open_all", lambda: [Emulated(tmp_path, n) for n in range(4)])
    monkeypatch.setattr(bench, "Gpu", lambda device: device)
    out = tmp_path / "new" / "x.json"
    monkeypatch.setattr(sys, "argv", ["handoff_gpu.py", "--out", str(out), "--commit", "abc"])
    assert bench.main() == 0
    result = json.loads(out.read_text())
    assert (result["gpus"], result["commit"], result["device"]) == (4, "abc", "emulated GPU")
    trips, sums = result["round_trips"], result["sums"]
    assert len(trips) == 2 * 2 * 4
    assert {(t["place"], t["added_us"]) for t in trips} == {("alone", 0.0), ("across", 1.0)}
    assert all(t["one_way_us"] == t["us"] / 2 for t in trips)
    assert len(sums) == 2 * 4 * (1 + 2 * 2)
    for row in sums:
        if row["place"] == "alone":
            assert row["added_us"] == 0
        elif row["place"] == "local":
            assert row["added_us"] == row["parts"] - 1
            assert row["added_to_local_us"] == 0
        else:
            assert row["added_us"] == row["parts"] - 1 + 2 * (row["gpus"] - 1)
            assert row["added_to_local_us"] == 2 * (row["gpus"] - 1)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(trips) + len(sums)
    assert "4 parts on 4 GPU(s)" in printed[-1]
    assert "+9.00 to one GPU   +6.00 to its parts local" in printed[-1]


class Peers(Driver):
    """GPUs of one host, each of which reaches the memory of those in `near`."""

    near: tuple[tuple[int, int], ...] = ((0, 1), (1, 0))

    def cuDeviceCanAccessPeer(self, gpu: int, other: int) -> Any:
        return OK, int((gpu, other) in self.near)

    def cuCtxEnablePeerAccess(self, context: int, flags: int) -> Any:
        self.enabled = [*getattr(self, "enabled", []), (self.threads.context, context)]
        return (OK,)


def test_gpus_reach_each_other(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """All of them, each with its own context; one that is alone or out of reach ends in a sentence."""
    pretend(monkeypatch)
    driver = Peers(2, 13000, OK, {})
    monkeypatch.setattr(module, "driver", driver)
    assert [device.context.handle for device in bench.open_all()] == [100, 101]
    assert driver.enabled == [(100, 101), (101, 100)]
    monkeypatch.setattr(sys, "argv", ["handoff_gpu.py"])
    for made, message in (
        (
            Peers(1, 13000, OK, {}),
            "there is one CUDA device (NVIDIA H200); a hand-off needs two of one",
        ),
        (
            Peers(3, 13000, OK, {}),
            "GPU 0 cannot reach the memory of GPU 2; accepted are GPUs with NVLink",
        ),
    ):
        monkeypatch.setattr(module, "driver", made)
        assert bench.main() == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1


def test_without_gpus_it_says_so() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=hidden, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no CUDA device")
    assert done.stderr.count("\n") == 1
