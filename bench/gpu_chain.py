"""The same tiles as a chain of kernels: every op a launch of its own, all of a token in one CUDA graph.

What a persistent program is worth, with all else equal: the kernel is the same machine code, the tiles
lie on the same workers, but the border between two launches takes the place of waits and signals, and no
weights are fetched across it. Each launch also pays the kernel's prologue, which was written to be paid
once; a chain made for the purpose would have a shorter one. The position is fixed in the graph.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np

from tilert.backends.cuda.backend import CudaBackend
from tilert.backends.cuda.tables import NO_SIGNAL, WAIT, tables

FIRST = 17  # the token that the others follow


class Chain:
    """The program of a back end, op by op, over the same weights, caches and activations."""

    def __init__(self, backend: CudaBackend) -> None:
        self.backend, queues = backend, backend.program.queues
        self.workers = len(queues)
        runs = np.concatenate(backend.runs)
        runs["signal"], runs["wait_count"] = NO_SIGNAL, 0
        worker = np.repeat(np.arange(self.workers), [len(queue) for queue in queues])
        op = np.array([run.op for queue in queues for run in queue])
        self.launched: list[dict[str, Any]] = []  # the tables of each op's launch
        for each in np.unique(op):
            own = [runs[(op == each) & (worker == w)] for w in range(self.workers)]
            made = tables(backend.program, backend.layout, own, [np.zeros(0, WAIT)] * self.workers)
            self.launched.append({name: self._upload(table) for name, table in made.items()})

    def _upload(self, values: np.ndarray) -> Any:
        memory = self.backend.device.allocate(max(values.nbytes, 16))
        memory.write(values)
        return memory

    def launches(self, token: int, position: int) -> list[ctypes.Structure]:
        """Parameters of the kernel for each op in turn, for what follows `token` at `position`."""
        made = self.backend
        made.state["tokens"][0, 0], made.state["positions"][0, 0] = token, position
        prepared = made.prepare(1)
        launches: list[ctypes.Structure] = []
        for own in self.launched:
            params: Any = type(prepared).from_buffer_copy(prepared)
            for name, memory in own.items():
                setattr(params, name, memory.address)
            launches.append(params)
        return launches


def time_chain(backend: CudaBackend, position: int, steps: int, repeats: int) -> list[float]:
    """Milliseconds per token of `steps` launches of the graph in turn, without the host between them.

    The back end must be on a true device; its own token at `position` is what the chain must make.
    """
    import torch

    backend.state["tokens"][0, 0], backend.state["positions"][0, 0] = FIRST, position
    (expected,) = backend.steps(1)
    chain = Chain(backend)
    graph = _captured(chain, position)
    graph.replay()
    torch.cuda.synchronize()
    assert int(backend.mailbox[0]) == int(expected[0]), "the chain makes another token"
    found: list[float] = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            graph.replay()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) / steps * 1e3)
    return found[1:]


def _captured(chain: Chain, position: int) -> Any:
    """The launches of a token as a CUDA graph."""
    import torch
    from cuda.bindings import driver  # type: ignore[attr-defined]

    from tilert.backends.cuda.device import THREADS, _call

    kernel: Any = chain.backend.kernel
    graph, launches = torch.cuda.CUDAGraph(), chain.launches(FIRST, position)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for params in launches:
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
            grid, block = (chain.workers, 1, 1), (THREADS, 1, 1)
            arguments = kernel.shared_bytes, stream, ctypes.addressof(pointers), 0
            _call(driver.cuLaunchKernel(kernel._function, *grid, *block, *arguments))
    return graph
