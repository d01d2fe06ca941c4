// The persistent program: one block per worker walks its queue, step after step, until all steps
// are made or somebody ends the launch. constants.h is made for one program: shapes, sizes,
// variants.
#include "attend.cuh"
#include "experts.cuh"
#include "index.cuh"
#include "logprobs.cuh"
#include "norm.cuh"
#include "shapes.cuh"
#include "variants.h"

__device__ __forceinline__ void next_step(Block& b) {
  ++b.step;
  b.turn = (b.turn + kTurn) % kTags;
}

__device__ __forceinline__ void load_weights(Block& b) {
  Loader loader{b};
  for (b.step = 0; b.step < b.params.steps; next_step(b))
    for (b.number = 0; b.number < b.length; ++b.number) {
      if (!loader.next_run()) return loader.drain();
      const Run& run = b.run();
      b.pass = pass_of(run);
      bool going = false;
      switch (variant_of(run)) {
#define TILERT_CASE(i)                 \
  case i:                              \
    going = V##i::stream(loader, run); \
    break;
        TILERT_VARIANTS(TILERT_CASE)
#undef TILERT_CASE
      }
      if (!going) return loader.drain();
    }
  loader.drain();
}

// By one thread: copies entries of the queue ahead of loader and warps, again in each step. It sees
// how far both have come, and nobody does anything for it.
__device__ __forceinline__ void fetch_queue(const Block& b, const u8* from) {
  constexpr u32 kCount = kEntries ? kEntries : 1;
  const u32 total = b.params.steps * b.length;
  u32 index = 0, number = 0;
  for (; index < total; ++index) {
    // All warps have left a run when the waits of the second run after it have held: they are
    // behind the barrier of the first.
    while (index >= kCount && (load_shared(&b.shared.progress) < index - kCount + 3 ||
                               load_shared(&b.shared.streamed) < index - kCount + 1)) {
      if (load_shared(&b.shared.verdict)) break;
      stand_back();
    }
    if (load_shared(&b.shared.verdict)) break;
    fence_proxy();
    u64* barrier = &b.shared.fetched[index % kCount];
    barrier_expect(barrier, kEntryBytes);
    copy_bulk(b.queue + index % kCount * kEntryBytes, from + number * kEntryBytes, kEntryBytes,
              barrier);
    if (++number == b.length) number = 0;
  }
  // No copy may arrive in the memory of a block that has left.
  const u64 since = nanoseconds();
  for (u32 i = index > kCount ? index - kCount : 0; i < index; ++i)
    while (!barrier_test(&b.shared.fetched[i % kCount], i / kCount % 2))
      if (nanoseconds() - since > kPatience) return;
}

// With kTrace, by thread 0. Another warp may still finish the last rows of a run; that is not seen.
__device__ __forceinline__ void note_run(const Block& b, u64 wait) {
  const u64 row = u64(b.step) * b.params.run_begin[gridDim.x] + b.params.run_begin[blockIdx.x];
  b.params.stamps[row + b.number] = {wait, b.started, timestamp()};
}

__device__ __forceinline__ void compute(Block& b) {
  for (b.step = 0; b.step < b.params.steps; next_step(b))
    for (b.number = 0; b.number < b.length; ++b.number) {
      if (!wait_for_run(b)) return;
      const Run& run = b.run();
      const u64 begin = kTrace ? timestamp() : 0;
      b.pass = pass_of(run);
      bool going = false;
      switch (variant_of(run)) {
#define TILERT_CASE(i)             \
  case i:                          \
    going = V##i::consume(b, run); \
    break;
        TILERT_VARIANTS(TILERT_CASE)
#undef TILERT_CASE
      }
      if (!going) return;
      if (kTrace && thread() == 0) note_run(b, begin);
    }
}

// Registers of a thread: what the compiler may give all threads alike is dealt out anew, most of it
// to those that compute. A claim beyond what the block was given would wait for ever.
constexpr int kBlockThreads = kThreads + kLoaderThreads;
constexpr int kGivenRegisters = 65536 / kBlockThreads / 8 * 8;
// A loader that follows a choice or reads shapes has no room in 24.
constexpr int kLoaderRegisters = kShapeScales ? 56 : kMixture ? 40 : 24;
constexpr int kComputeRegisters = 240 - (kLoaderRegisters - 24) / 2;
static_assert(kComputeRegisters * kThreads + kLoaderRegisters * kLoaderThreads <=
                  kGivenRegisters * kBlockThreads,
              "the block has no more registers");

static_assert(sizeof(Shared) <= kSharedBytes, "the host leaves too little for it");

extern "C" __global__ void __launch_bounds__(kBlockThreads, 1)
    tilert_program(const __grid_constant__ Params params) {
  u8* memory = shared_memory();
  u8* scratch = memory + kSlots * kSlotPitch;
  Shared& shared = *reinterpret_cast<Shared*>(scratch + kScratchBytes);
  u8* queue = scratch + kScratchBytes + (sizeof(Shared) + 15) / 16 * 16;
  const u32 length = params.run_begin[blockIdx.x + 1] - params.run_begin[blockIdx.x];
  const u32 begin = params.queue_begin[blockIdx.x], end = params.queue_begin[blockIdx.x + 1];
  const uint4* from = reinterpret_cast<const uint4*>(params.queues) + begin;
  if constexpr (kEntries == 0)
    for (u32 i = threadIdx.x; i < end - begin; i += blockDim.x)
      reinterpret_cast<uint4*>(queue)[i] = from[i];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kWarps);
    }
    for (int i = 0; i < kEntries; ++i) barrier_init(&shared.fetched[i], 1);
    barrier_init_done();
    shared.verdict = shared.progress = shared.listed = 0;
    shared.streamed = shared.lost = shared.stopped = 0;
  }
  __syncthreads();
  Block block{params, shared, memory, scratch, queue, length};
  if (threadIdx.x < kThreads) {
    claim_registers<kComputeRegisters>();
    compute(block);
    if (thread() == 0) tell_lost(block);
  } else {
    keep_registers<kLoaderRegisters>();
    if (threadIdx.x == kThreads) load_weights(block);
    if (kEntries && threadIdx.x == kThreads + 32)
      fetch_queue(block, reinterpret_cast<const u8*>(from));
  }
}
