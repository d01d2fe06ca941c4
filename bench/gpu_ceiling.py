"""The rate at which all multiprocessors of this GPU together read its memory: the floor of a token.

Two ways, of which the faster counts: bulk copies of 16 KB into shared memory, as the kernel's own ring
has them, and plain loads of 16 bytes. Medians of several passes over more bytes than any cache holds.
"""

from __future__ import annotations

import ctypes
import statistics
from typing import Any

from tilert.backends.cuda.source import FOLDER, Source

SIZE, UNIT, SLOTS = 4 << 30, 16384, 12
PASSES, WARM = 11, 2
KERNELS = {"bulk": SLOTS * UNIT + 256, "plain": 0}  # name: bytes of shared memory
TEXT = """
#include "ptx.cuh"
struct Reads { u8* from; u64 units; };
constexpr u32 kUnit = 16384, kSlots = 12, kThreads = 384, kDeep = 16;

extern "C" __global__ void __launch_bounds__(kThreads, 1) bulk(const __grid_constant__ Reads r) {
  u8* memory = shared_memory();
  u64* full = reinterpret_cast<u64*>(memory + kSlots * kUnit);
  if (threadIdx.x) return;
  for (u32 i = 0; i < kSlots; ++i) barrier_init(full + i, 1);
  barrier_init_done();
  u64 n = 0;
  for (u64 unit = blockIdx.x; unit < r.units; unit += gridDim.x, ++n) {
    u64* b = full + n % kSlots;
    if (n >= kSlots) while (!barrier_test(b, (n / kSlots - 1) & 1)) {}
    barrier_expect(b, kUnit);
    copy_bulk(memory + n % kSlots * kUnit, r.from + unit * kUnit, kUnit, b);
  }
  for (u64 i = n > kSlots ? n - kSlots : 0; i < n; ++i)
    while (!barrier_test(full + i % kSlots, (i / kSlots) & 1)) {}
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) plain(const __grid_constant__ Reads r) {
  const uint4* from = reinterpret_cast<const uint4*>(r.from);
  const u64 count = r.units * (kUnit / 16), stride = u64(gridDim.x) * kThreads * kDeep;
  u32 sum = 0;
  for (u64 i = u64(blockIdx.x) * kThreads * kDeep + threadIdx.x;
       i + (kDeep - 1) * kThreads < count; i += stride) {
    uint4 v[kDeep];
#pragma unroll
    for (u32 d = 0; d < kDeep; ++d)
      asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[d].x), "=r"(v[d].y), "=r"(v[d].z), "=r"(v[d].w)
                   : "l"(from + i + d * kThreads));
#pragma unroll
    for (u32 d = 0; d < kDeep; ++d) sum ^= v[d].x ^ v[d].y ^ v[d].z ^ v[d].w;
  }
  if (sum == 0x9e3779b9) r.from[0] = 0;  // hardly ever, but the compiler must make the sum
}
"""


class Reads(ctypes.Structure):
    """struct Reads of TEXT."""

    _fields_ = [("start", ctypes.c_void_p), ("units", ctypes.c_uint64)]


def source() -> Source:
    """What the compiler is given."""
    return Source(TEXT, {"ptx.cuh": (FOLDER / "ptx.cuh").read_text(encoding="utf-8")}, [])


def measure(device: Any) -> dict[str, float]:
    """Bytes per second by way of reading."""
    memory = device.allocate(SIZE)
    memory.tensor.random_(0, 255)
    return {name: _rate(device, name, memory.address) for name in KERNELS}


def _rate(device: Any, name: str, address: int) -> float:
    import torch

    kernel = device.load(source(), name, KERNELS[name])
    rates: list[float] = []
    for _ in range(PASSES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kernel.launch(device.machine.workers_per_device, Reads(address, SIZE // UNIT))
        end.record()
        end.synchronize()
        rates.append(SIZE / start.elapsed_time(end) * 1e3)
    return statistics.median(rates[WARM:])
