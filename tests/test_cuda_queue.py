"""Queues that do not fit in shared memory: a few entries at a time, by the emulator and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emulator import EmulatedDevice
from test_cuda_kernel import Devices, begin, compiled, loaded

from tilert.backends import hang
from tilert.backends.cuda import backend as cuda
from tilert.backends.cuda.backend import CudaBackend, LaunchError
from tilert.backends.cuda.limits import ENTRIES, Layout, fitting, queue_bytes, shared_bytes
from tilert.ir.program import Program
from tilert.serve import replay


def in_parts(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """Back ends hold so many entries of a queue."""

    def given(program: Program, available: int) -> Layout:
        return replace(fitting(program, available), entries=entries)

    monkeypatch.setattr(cuda, "fitting", given)


def made_tokens(made: CudaBackend, steps: int) -> tuple[list[int], bytes]:
    begin(made, 5, 58)
    return [int(t[0]) for t in made.steps(steps)], made.read("logits").tobytes()


@pytest.mark.parametrize(
    ("name", "entries"), [("llama", 3), ("qwen3-moe", 4)]
)  # fmt: skip
def test_entries_in_turn_give_the_same_bits(
    name: str, entries: int, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer entries than a step has runs, over many steps and in several orders of threads."""
    program, weights = compiled(name)
    whole = made_tokens(loaded(program, weights, devices())[0], 9)
    in_parts(monkeypatch, entries)
    for seed in range(3):
        made, _ = loaded(program, weights, devices(seed))
        assert made.layout.entries == entries
        assert made_tokens(made, 9) == whole


def test_stops_and_traces(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that ends early leaves no copy behind, and each run has its times."""
    in_parts(monkeypatch, 3)
    program, weights = compiled("llama")
    made, _ = loaded(program, weights, devices())
    free, _ = made_tokens(made, 12)
    made.stop_ids = (free[4],)
    assert made_tokens(made, 12)[0] == free[: free.index(free[4]) + 1]
    made.stop_ids = ()
    made.trace(True)
    assert made_tokens(made, 3)[0] == free[:3]
    assert len(made.records()) == 3 * sum(map(len, program.queues))


def test_a_copy_that_is_lost_ends_the_launch(
    devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run or of weights (in the emulator alone): an error that says which, and the next one works."""
    monkeypatch.setenv("TILERT_CACHE", str(tmp_path))  # for the record of the hang
    in_parts(monkeypatch, 3)
    program, weights = compiled("llama")
    device = devices()
    if not isinstance(device, EmulatedDevice):
        pytest.skip("a device loses no copies")
    made, _ = loaded(program, weights, device)
    good = made_tokens(made, 3)
    said: list[str] = []
    for lost in (0, 1, 9, 30):
        device.lost_copy = lost
        with pytest.raises(LaunchError, match=r"\(\w+\) waited in vain for") as caught:
            made_tokens(made, 3)
        said.append(str(caught.value))
        device.lost_copy = -1
        assert made_tokens(made, 3) == good
    assert any("its entry of the queue" in text for text in said)
    assert any("weights or keys" in text for text in said)
    told = [replay.report(hang.load(record)) for record in (tmp_path / "hang").iterdir()]
    assert any("fault:  the device's: a copy" in line for lines in told for line in lines)


def test_a_queue_is_cut_where_it_takes_more_than_a_slot() -> None:
    program, _ = compiled("llama")

    def laid_out(program: Program, slots: int, spare: int) -> Layout:
        return fitting(program, shared_bytes(program, Layout(slots, ENTRIES)) + spare)

    long: Any = replace(program, queues=tuple(queue * 12 for queue in program.queues))
    slot = program.machine.slot_bytes + 128
    assert queue_bytes(long, 0) - queue_bytes(long, ENTRIES) > slot
    assert laid_out(long, 4, 0) == Layout(4, ENTRIES)
    assert laid_out(long, 3, 0) == Layout(3, ENTRIES)
    assert laid_out(long, 4, queue_bytes(long, 0)) == Layout(4, 0)
    longer: Any = replace(program, queues=tuple(queue * 3 for queue in program.queues))
    assert 0 < queue_bytes(longer, 0) - queue_bytes(longer, ENTRIES) < slot
    assert laid_out(longer, 4, 0) == Layout(3, 0)
