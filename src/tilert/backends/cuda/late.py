"""PyTorch for long prompts, got ready by threads.

Its libraries are loaded while the main thread loads the model: that goes on without the interpreter's lock.
The rest of the import is Python code, a second or more of it. Threads that copy weights would have to wait
for the lock again and again (1.4 GB/s instead of 10 were seen), so it begins when the weights are there.
Only prompts that are too long for the persistent program wait for it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph
from tilert.ir.program import Scale

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tilert.backends.cuda.prompt import PromptRunner

T = TypeVar("T")
IDLE = 64 << 20  # bytes that PyTorch may keep from one prompt to the next; asking again takes time


class Later(Generic[T]):
    """What a function gives that a thread of its own calls from now on.

    The thread is no daemon: one that is stopped inside of PyTorch's import can crash the process's end.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._made: Future[T] = Future()
        threading.Thread(target=self._run, args=(make,), name="tilert-later").start()

    def _run(self, make: Callable[[], T]) -> None:
        try:
            self._made.set_result(make())
        except BaseException as error:  # raised again by whoever needs it
            self._made.set_exception(error)

    def get(self) -> T:
        """Waits for it; raises what the function has raised."""
        return self._made.result()


def libraries() -> Later[None] | None:
    """PyTorch's libraries, being loaded; None where it is not installed."""
    return Later(_load_libraries) if find_spec("torch") else None


def _load_libraries() -> None:
    """Load what `import torch` loads first, in its order.

    The import would hold the interpreter's lock meanwhile, and everything else would stand still. It tells
    what is wrong with a library, so nothing is said here.
    """
    spec = find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    dlopen = ctypes.CDLL(None).dlopen  # which ctypes calls without the lock
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    for name, scope in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch.so", 0)):
        dlopen(os.fsencode(folder / name), os.RTLD_LAZY | scope)


def import_torch() -> None:
    """`import torch`; UserError when that fails or it has no GPU."""
    try:
        import torch
    except (ImportError, OSError) as error:
        raise UserError(f"PyTorch, which computes prompts, cannot be imported: {error}") from error
    if not torch.cuda.is_available():
        raise UserError(
            f"PyTorch {torch.__version__}, which computes prompts, does not find the GPU; install one"
            " that is built for CUDA, or none: prompts then go through tilert's own kernel"
        )


def give_back() -> None:
    """What PyTorch keeps of the GPU's memory for a next prompt, when that is more than a little: between
    prompts nothing uses it. Call it after `import torch`."""
    import torch

    if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > IDLE:
        torch.cuda.empty_cache()


class LateRunner:
    """A PromptRunner that is being made, over memory of the device, and run once to be warm."""

    def __init__(
        self, loaded: Later[None], graph: Graph, weights: Mapping[str, tuple[Any, tuple[int, ...], DType]],
        caches: Mapping[str, tuple[Any, tuple[int, ...], DType]], scales: Mapping[str, Scale],
    ) -> None:  # fmt: skip
        def make() -> PromptRunner:
            loaded.get()
            import_torch()
            from tilert.backends.cuda.prompt import over_memory

            made = over_memory(graph, weights, caches, scales)
            made.warm_up()
            give_back()
            return made

        self._made = Later(make)

    def wait(self) -> None:
        """Until it is made; UserError when it cannot be."""
        self._made.get()

    def run(
        self, tokens: Sequence[int], begin: int, pages: Sequence[int], outputs: Sequence[int],
        given: np.ndarray | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See PromptRunner.run. Where outputs are asked for a prompt ends, and memory is given back."""
        logits = self._made.get().run(tokens, begin, pages, outputs, given)
        if outputs:
            give_back()
        return logits

    @property
    def hidden(self) -> torch.Tensor:
        """See PromptRunner."""
        return self._made.get().hidden
