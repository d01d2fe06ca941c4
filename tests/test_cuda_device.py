"""Which GPUs are taken and which refused, and how memory is used, told by a driver that is played."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.driver")
from cuda.bindings import driver as real  # type: ignore[attr-defined]

from tilert.backends.cuda import device as module
from tilert.backends.cuda import late, open_device
from tilert.errors import UserError

OK = real.CUresult.CUDA_SUCCESS
H200: dict[str, Any] = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multiprocessor_count": 132}


class Driver:
    """The driver of a machine with such GPUs. Memory is the host's; copies arrive when waited for."""

    CUresult, CUdevice_attribute = real.CUresult, real.CUdevice_attribute
    CUevent_flags, CUstream_flags = real.CUevent_flags, real.CUstream_flags
    CUlimit = real.CUlimit
    CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP = 1, 2

    def __init__(self, count: int, version: int, state: Any, gpu: dict[str, Any]) -> None:
        self.count, self.version, self.state, self.gpu = count, version, state, H200 | gpu
        self.memory: dict[int, Any] = {}  # what is allocated, by address
        self.late: dict[int, list[tuple[int, int, int]]] = {}  # copies under way, by stream
        self.threads = threading.local()  # the context of each
        self.stacks: dict[int, int] = {}  # of contexts that are there: bytes of a thread
        self.failing: dict[str, Any] = {}  # errors by name of a call
        self.ids = iter(range(1, 10000))

    def cuInit(self, flags: int) -> Any:
        return (self.state,)

    def cuDeviceGetCount(self) -> Any:
        return OK, self.count

    def cuDriverGetVersion(self) -> Any:
        return OK, self.version

    def cuGetErrorString(self, error: Any) -> Any:
        return OK, error.name.encode()

    def cuCtxGetCurrent(self) -> Any:
        return OK, getattr(self.threads, "context", 0)

    def cuCtxGetDevice(self) -> Any:
        return OK, self.threads.context - 100

    def cuCtxSetCurrent(self, context: int) -> Any:
        self.threads.context = context
        return (OK,)

    def cuDevicePrimaryCtxGetState(self, gpu: int) -> Any:
        return OK, 0, int(100 + gpu in self.stacks)

    def cuDevicePrimaryCtxRetain(self, gpu: int) -> Any:
        self.stacks.setdefault(100 + gpu, 1024)
        return self.failing.get("cuDevicePrimaryCtxRetain", OK), 100 + gpu

    def cuCtxSetLimit(self, which: Any, value: int) -> Any:
        assert which == real.CUlimit.CU_LIMIT_STACK_SIZE
        assert not self.memory, "what is there already would be waited for"
        self.stacks[self.threads.context] = value
        return (self._checked("cuCtxSetLimit"),)

    def cuDeviceGet(self, number: int) -> Any:
        return OK, number

    def cuDeviceGetName(self, length: int, gpu: int) -> Any:
        return OK, self.gpu["name"].encode().ljust(length, b"\0")

    def cuDeviceGetAttribute(self, which: Any, gpu: int) -> Any:
        values = {"MULTIPROCESSOR_COUNT": self.gpu["multiprocessor_count"],
                  "COMPUTE_CAPABILITY_MAJOR": self.gpu["major"],
                  "COMPUTE_CAPABILITY_MINOR": self.gpu["minor"],
                  "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448}  # fmt: skip
        return OK, values[which.name.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    def _checked(self, name: str) -> Any:
        assert getattr(self.threads, "context", 0), "a call without a context"
        return self.failing.get(name, OK)

    def cuMemGetInfo(self) -> Any:
        return self._checked("cuMemGetInfo"), 140 << 30, 141 << 30

    def cuMemAlloc(self, size: int) -> Any:
        if (error := self._checked("cuMemAlloc")) != OK:
            return error, None
        if not size:
            return real.CUresult.CUDA_ERROR_INVALID_VALUE, None
        made = (ctypes.c_uint8 * size)(*[0xFF] * min(size, 100))
        self.memory[ctypes.addressof(made)] = made
        return OK, ctypes.addressof(made)

    def cuMemHostAlloc(self, size: int, flags: int) -> Any:
        assert flags == 3
        return self.cuMemAlloc(size)

    def cuMemFree(self, address: int) -> Any:
        del self.memory[address]
        return (self._checked("cuMemFree"),)

    cuMemFreeHost = cuMemFree

    def cuMemcpyHtoD(self, target: int, source: int, size: int) -> Any:
        ctypes.memmove(target, source, size)
        return (self._checked("cuMemcpyHtoD"),)

    cuMemcpyDtoH = cuMemcpyHtoD

    def cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> Any:
        assert stream == 0
        ctypes.memset(target, value, size)
        return (self._checked("cuMemsetD8Async"),)

    def cuStreamCreate(self, flags: int) -> Any:
        stream = next(self.ids)
        self.late[stream] = []
        return self._checked("cuStreamCreate"), stream

    def cuStreamDestroy(self, stream: int) -> Any:
        del self.late[stream]
        return (OK,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> Any:
        self.late[stream].append((target, source, size))
        return (self._checked("cuMemcpyHtoDAsync"),)

    def cuStreamSynchronize(self, stream: int) -> Any:
        for copy in self.late[stream]:
            ctypes.memmove(*copy)
        self.late[stream].clear()
        return (self._checked("cuStreamSynchronize"),)

    def cuEventCreate(self, flags: int) -> Any:
        return self._checked("cuEventCreate"), SimpleNamespace(stream=None, left=0)

    def cuEventDestroy(self, event: Any) -> Any:
        return (OK,)

    def cuEventRecord(self, event: Any, stream: int) -> Any:
        event.stream = stream
        return (self._checked("cuEventRecord"),)

    def cuEventSynchronize(self, event: Any) -> Any:
        return self.cuStreamSynchronize(event.stream) if event.stream else (OK,)


def pretend(
    monkeypatch: pytest.MonkeyPatch, *, count: int = 1, driver: int = 13000, state: Any = OK,
    **changes: Any,
) -> Driver:  # fmt: skip
    """A machine with such GPUs, and without PyTorch."""
    made = Driver(count, driver, state, changes)
    monkeypatch.setattr(module, "driver", made)
    monkeypatch.setattr(late, "find_spec", lambda name: None)
    return made


@pytest.mark.parametrize(
    ("changes", "arch", "workers", "read_bandwidth"),
    [
        ({}, "sm_90a", 132, 4.65e12),
        ({"name": "NVIDIA H100 PCIe", "multiprocessor_count": 114}, "sm_90a", 114, 3.15e12),
        ({"name": "NVIDIA B200", "major": 10, "multiprocessor_count": 148}, "sm_100a", 148, 7.4e12),
        ({"name": "RTX 5090", "major": 12, "multiprocessor_count": 170}, "sm_120a", 170, 3.15e12),
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
    assert gpu.shared_bytes == 232448


def test_of_several_one_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    pretend(monkeypatch, count=8)
    open_device(said.append)
    assert said == ["using GPU 0 (NVIDIA H200) of 8; CUDA_VISIBLE_DEVICES chooses another"]


def test_the_gpu_that_the_thread_uses_already_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    driver = pretend(monkeypatch, count=8)
    driver.cuCtxSetCurrent(105)
    assert open_device(said.append).context.handle == 105
    assert said == ["using GPU 5 (NVIDIA H200) of 8; CUDA_VISIBLE_DEVICES chooses another"]


def test_stacks_are_small_but_in_a_context_of_somebody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = pretend(monkeypatch, count=2)
    open_device()
    assert driver.stacks == {100: module.STACK}
    driver.stacks[101] = 4096  # PyTorch or whoever has it already
    driver.cuCtxSetCurrent(101)
    assert open_device().context.handle == 101
    open_device().allocate(8)
    assert driver.stacks == {100: module.STACK, 101: 4096}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "A100", "major": 8}, "A100 has compute capability 8.0; accepted is 9.0 or newer"),
        ({"driver": 12040}, "the GPU's driver speaks CUDA 12.4; accepted is 13.0 or newer"),
        ({"count": 0}, "^there is no CUDA device;"),
        ({"state": real.CUresult.CUDA_ERROR_NO_DEVICE}, "^there is no CUDA device;"),
    ],
)
def test_others_are_refused_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, changes: Any, message: str
) -> None:
    pretend(monkeypatch, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_device()
    assert "back end 'cpu'" in str(caught.value)


def test_memory_is_written_read_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pretend(monkeypatch)
    gpu = open_device()
    memory = gpu.allocate(24)
    memory.clear()
    part = memory.part(8, 12)
    part.write(np.arange(6, dtype=np.int16).reshape(2, 3).T)
    expected = [0, 0, 0, 0, 0, 3, 1, 4, 2, 5, 0, 0]
    assert memory.read(0, 12, np.int16).tolist() == expected
    assert part.read(2, 2, np.int16).tolist() == [3, 1]
    with pytest.raises(AssertionError, match="14 bytes into 12"):
        part.write(np.zeros(7, np.int16))
    del memory
    gc.collect()
    assert driver.memory  # a part keeps the whole
    del part
    gc.collect()
    assert not driver.memory


def test_pinned_words_are_zero_and_stay_while_a_view_does(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pretend(monkeypatch)
    words = open_device().pinned(5)
    assert words.tolist() == [0] * 5
    last = words[4:]
    del words
    gc.collect()
    last[0] = 9
    assert list(driver.memory) == [last.ctypes.data - 16]
    del last
    gc.collect()
    assert not driver.memory


def test_any_thread_can_use_and_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pretend(monkeypatch)
    memory: list[Any] = [open_device().allocate(8)]
    found: list[Any] = []

    def use() -> None:
        memory[0].write(np.arange(8, dtype=np.uint8))
        found.append(memory[0].read(4, 4, np.uint8).tolist())
        memory.clear()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [[4, 5, 6, 7]]
    assert not driver.memory


def test_weights_are_uploaded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER", 64)
    driver = pretend(monkeypatch)
    gpu, rng = open_device(), np.random.default_rng(2)
    arrays = [rng.integers(0, 255, size, np.uint8) for size in (1, 5000, 64, 999, 20000)]
    parts = [(gpu.allocate(array.size), array) for array in arrays]
    told: list[int] = []
    gpu.upload(parts, told.append)
    assert sum(told) == sum(array.size for array in arrays)
    for memory, array in parts:
        assert np.array_equal(memory.read(0, array.size, np.uint8), array)
    gc.collect()
    assert len(driver.memory) == len(arrays)  # the buffers are gone
    assert not driver.late


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuEventRecord"])
def test_an_upload_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(module, "BUFFER", 64)
    driver = pretend(monkeypatch)
    gpu = open_device()
    memory = gpu.allocate(5000)
    driver.failing[call] = real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(RuntimeError, match="CUDA: CUDA_ERROR_ILLEGAL_ADDRESS"):
        gpu.upload([(memory, np.zeros(5000, np.uint8))], lambda _: None)


def test_no_bytes_are_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    memory = open_device().allocate(0)  # a program of one worker waits for nothing
    memory.write(np.zeros(0, np.uint32))
    assert memory.size == 0


def test_memory_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pretend(monkeypatch)
    gpu = open_device()
    driver.failing["cuMemAlloc"] = real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(
        UserError, match=r"^the GPU has no 3\.2 GB left, .*: 150\.3 of 151\.4 GB are free; other"
    ):
        gpu.allocate(3 << 30)
    driver.failing["cuMemAlloc"] = real.CUresult.CUDA_ERROR_INVALID_CONTEXT
    with pytest.raises(RuntimeError, match="CUDA: CUDA_ERROR_INVALID_CONTEXT"):
        gpu.allocate(8)


def test_a_gpu_that_another_process_holds_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pretend(monkeypatch)
    driver.failing["cuDevicePrimaryCtxRetain"] = real.CUresult.CUDA_ERROR_DEVICE_UNAVAILABLE
    with pytest.raises(
        UserError, match=r"^GPU 0 \(NVIDIA H200\) cannot be used: .*; a process may"
    ):
        open_device()


def test_loading_needs_no_pytorch() -> None:
    code = (
        "import sys, tilert.serve.llm, tilert.backends.cuda.device; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_pytorch_there_is_no_prompt_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert open_device().prompt_runner(None, {}, {}, {}) is None  # type: ignore[arg-type]


def test_pytorch_that_finds_no_gpu_is_told_to_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runner = late.LateRunner(late.Later(lambda: None), None, {}, {}, {})  # type: ignore[arg-type]
    for ask in (runner.wait, lambda: runner.run([1], 0, [0], [0])):
        with pytest.raises(UserError, match=r"^PyTorch .* does not find the GPU; install one"):
            ask()


def test_what_a_prompt_took_is_given_back_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a little, and not between the pieces of a prompt, which use it again."""
    torch = pytest.importorskip("torch")
    said: list[str] = []
    held = {"reserved": 0, "allocated": 3 << 20}

    class Runner:
        def warm_up(self) -> None:
            held["reserved"] = 900 << 20

        def run(self, _: Any, begin: int, pages: Any, outputs: list[int], given: Any) -> list[int]:
            said.append(f"run {begin}")
            return outputs

    def empty() -> None:
        said.append("empty")
        held["reserved"] = late.IDLE + held["allocated"]

    monkeypatch.setattr(late, "import_torch", lambda: None)
    monkeypatch.setattr("tilert.backends.cuda.prompt.over_memory", lambda *_: Runner())
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    for name in held:
        monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda name=name: held[name])
    runner = late.LateRunner(late.Later(lambda: None), None, {}, {}, {})  # type: ignore[arg-type]
    runner.wait()
    assert said == ["empty"]
    runner.run([1], 0, [0], [0])
    assert said == ["empty", "run 0"]
    held["reserved"] += 1
    assert runner.run([1], 1, [0], []) == []
    assert runner.run([1], 2, [0], [0]) == [0]
    assert said == ["empty", "run 0", "run 1", "run 2", "empty"]


def test_pytorch_that_is_damaged_is_told_to_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"^PyTorch, which computes prompts, cannot be imported: "):
        late.import_torch()


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_libraries_loaded_ahead_leave_the_import_as_it_is() -> None:
    code = (
        "from tilert.backends.cuda import late; late._load_libraries();"
        "import torch; print(torch.ones(2, 2).matmul(torch.ones(2, 2)).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "8.0\n"
