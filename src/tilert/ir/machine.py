"""Machines that a program can be made for: how many workers, what rings, how fast.

A *worker* is an SM of a GPU or a core of a CPU. Bandwidths are measured ceilings, not data sheets;
the figures for GPUs come from the probes described in docs/memory-model.md. The null machine has
round numbers, so that the whole compiler can be tested where there is no device at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tilert.errors import UserError
from tilert.ir.dtype import DType


@dataclass(frozen=True, slots=True)
class Machine:
    """A description that the compiler reads; nothing here touches hardware.

    slots/slot_bytes/window describe the ring that streams weights on each worker (0 slots: weights
    are read in place). splits: shares of the past positions of one kv head in steps of few tokens (0:
    the compiler's rule). even: each op is dealt out evenly for itself (False: a whole step is, but
    for models with weights that are chosen at run time). These
    five are what `tilert tune` searches. Times are in seconds, bandwidths in bytes per second, flops per
    second.
    """

    name: str
    workers_per_device: int
    devices: int = 1
    slots: int = 0
    slot_bytes: int = 0
    window: int = 0
    splits: int = 0
    even: bool = False
    read_bandwidth: float = 0.0  # all workers of one device together
    worker_bandwidth: float = 0.0  # one worker alone
    worker_flops: float = 0.0  # one worker, f32 multiply-adds counted as two
    run_overhead: float = 0.0  # fetch a run, check its waits, signal
    handoff: float = 0.0  # signal of one worker until another sees it
    link_bandwidth: float = 0.0  # between two devices, one direction
    arena_bytes: int = 1 << 40  # activations of one device
    cache_dtype: DType = DType.F32  # of keys and values
    index_dtype: DType = DType.F32  # of the keys of an indexer of sparse attention
    packed_latents: bool = False  # rows of latent caches are those of ops/mla.py: pack

    @property
    def workers(self) -> int:
        """Workers of all devices together."""
        return self.workers_per_device * self.devices

    def device_of(self, worker: int) -> int:
        """The device that a worker belongs to."""
        return worker // self.workers_per_device


# Rings: 192 KB of shared memory as 12 slots of 16 KB with a 32 KB window in flight (docs/log.md).
H100 = Machine(
    "h100", 132, slots=12, slot_bytes=16384, window=2, read_bandwidth=3.15e12,
    worker_bandwidth=40e9, worker_flops=500e9, run_overhead=0.3e-6, handoff=0.61e-6,
    link_bandwidth=363e9, arena_bytes=8 << 30, cache_dtype=DType.BF16,
    index_dtype=DType.F8E4M3,
)  # fmt: skip
H200 = replace(H100, name="h200", read_bandwidth=4.65e12, handoff=0.49e-6, window=3)
# B200 has not been measured: SM count from its data sheet, bandwidth as 93 % of it.
B200 = replace(H100, name="b200", workers_per_device=148, read_bandwidth=7.4e12, window=3)
NULL = Machine(
    "null", 4, slots=4, slot_bytes=4096, window=2, read_bandwidth=4e9, worker_bandwidth=1e9,
    worker_flops=1e9, run_overhead=1e-6, handoff=1e-6, link_bandwidth=1e9,
)  # fmt: skip


def cpu(workers: int, *, read_bandwidth: float = 16e9, worker_bandwidth: float = 11e9) -> Machine:
    """A CPU with `workers` cores used; the defaults for bandwidth are those of a small cloud machine."""
    return Machine(
        f"cpu{workers}", workers, read_bandwidth=read_bandwidth, worker_flops=60e9,
        worker_bandwidth=min(worker_bandwidth, read_bandwidth), run_overhead=0.1e-6, handoff=0.2e-6,
    )  # fmt: skip


def by_name(name: str) -> Machine:
    """The machine of a command-line name: h100, h200, b200, null or cpuN.

    Raises UserError for any other name.
    """
    fixed = {"h100": H100, "h200": H200, "b200": B200, "null": NULL}
    key = name.lower()
    if key in fixed:
        return fixed[key]
    digits = key.removeprefix("cpu")
    if key.startswith("cpu") and digits.isdecimal() and 1 <= int(digits) <= 1024:
        return cpu(int(digits))
    raise UserError(
        f"machine '{name}' is not known; accepted are h100, h200, b200, null and cpuN (cpu1 to cpu1024)"
    )
