"""Which GPUs are taken and which refused, told by what the driver says of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from tilert.backends.cuda import device as module
from tilert.backends.cuda import open_device
from tilert.errors import UserError

H200: dict[str, Any] = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132,
                        "shared_memory_per_block_optin": 232448}  # fmt: skip


def pretend(
    monkeypatch: pytest.MonkeyPatch, *, count: int = 1, driver: int = 13000, **changes: Any
) -> None:
    """A machine with such a GPU."""
    success = module.driver.CUresult.CUDA_SUCCESS
    for name, value in {
        "is_available": True, "current_device": 0, "device_count": count,
        "mem_get_info": (140 << 30, 141 << 30),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    properties = SimpleNamespace(**H200 | changes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(module.driver, "cuDriverGetVersion", lambda: (success, driver))


@pytest.mark.parametrize(
    ("changes", "arch", "workers", "read_bandwidth"),
    [
        ({}, "sm_90a", 132, 4.65e12),
        ({"name": "NVIDIA H100 PCIe", "multi_processor_count": 114}, "sm_90a", 114, 3.15e12),
        (
            {"name": "NVIDIA B200", "major": 10, "multi_processor_count": 148},
            "sm_100a",
            148,
            7.4e12,
        ),
        ({"name": "RTX 5090", "major": 12, "multi_processor_count": 170}, "sm_120a", 170, 3.15e12),
    ],
)
def test_the_machine_is_the_nearest_known_with_its_own_workers(
    monkeypatch: pytest.MonkeyPatch, changes: Any, arch: str, workers: int, read_bandwidth: float
) -> None:
    pretend(monkeypatch, **changes)
    gpu = open_device()
    assert (gpu.arch, gpu.machine.workers, gpu.machine.read_bandwidth) == (
        arch,
        workers,
        read_bandwidth,
    )
    assert gpu.free_bytes() == 140 << 30


def test_of_several_one_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    pretend(monkeypatch, count=8)
    open_device(said.append)
    assert said == ["using GPU 0 (NVIDIA H200) of 8; CUDA_VISIBLE_DEVICES chooses another"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "A100", "major": 8}, "A100 has compute capability 8.0; accepted is 9.0 or newer"),
        ({"driver": 12040}, "the GPU's driver speaks CUDA 12.4; accepted is 13.0 or newer"),
    ],
)
def test_others_are_refused_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, changes: Any, message: str
) -> None:
    pretend(monkeypatch, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_device()
    assert "back end 'cpu'" in str(caught.value)
