// The persistent program: one block per worker walks its queue, step after step, until all steps
// are made or somebody ends the launch. constants.h is made for one program: shapes, sizes,
// variants.
#include "experts.cuh"
#include "index.cuh"
#include "logprobs.cuh"
#include "variants.h"

__device__ __forceinline__ void load_weights(Block& b) {
  Loader loader{b};
  for (b.step = 0; b.step < b.params.steps; ++b.step)
    for (b.number = 0; b.number < b.length; ++b.number) {
      const Run& run = b.queue[b.number];
      bool going = false;
      switch (run.variant) {
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

// With kTrace, by thread 0. Another warp may still finish the last rows of a run; that is not seen.
__device__ __forceinline__ void note_clock(const Block& b, int which) {
  Clock& clock = b.params.clocks[blockIdx.x];
  clock.cycles[which] = cycles();
  clock.nanoseconds[which] = nanoseconds();
}

__device__ __forceinline__ void note_run(const Block& b, u64 wait) {
  const u64 row = u64(b.step) * b.params.run_begin[gridDim.x] + b.params.run_begin[blockIdx.x];
  b.params.stamps[row + b.number] = {wait, b.started, cycles()};
}

__device__ __forceinline__ void compute(Block& b) {
  if (kTrace && thread() == 0) note_clock(b, 0);
  for (b.step = 0; b.step < b.params.steps; ++b.step, b.turn = (b.turn + kTurn) % kTags)
    for (b.number = 0; b.number < b.length; ++b.number) {
      const Run& run = b.queue[b.number];
      const u64 begin = kTrace ? cycles() : 0;
      bool going = false;
      switch (run.variant) {
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
  if (kTrace && thread() == 0) note_clock(b, 1);
}

// Registers of a thread: what the compiler may give all threads alike is dealt out anew, most of it
// to those that compute. A claim beyond what the block was given would wait for ever.
constexpr int kBlockThreads = kThreads + kLoaderThreads;
constexpr int kGivenRegisters = 65536 / kBlockThreads / 8 * 8;
constexpr int kComputeRegisters = 240, kLoaderRegisters = 24;
static_assert(kComputeRegisters * kThreads + kLoaderRegisters * kLoaderThreads <=
                  kGivenRegisters * kBlockThreads,
              "the block has no more registers");

static_assert(sizeof(Shared) <= kSharedBytes, "the host leaves too little for it");

extern "C" __global__ void __launch_bounds__(kBlockThreads, 1)
    tilert_program(const __grid_constant__ Params params) {
  u8* memory = shared_memory();
  u8* scratch = memory + kSlots * kSlotPitch;
  Shared& shared = *reinterpret_cast<Shared*>(scratch + kScratchBytes);
  Run* queue = reinterpret_cast<Run*>(scratch + kScratchBytes + (sizeof(Shared) + 15) / 16 * 16);
  const u32 first = params.run_begin[blockIdx.x];
  const u32 length = params.run_begin[blockIdx.x + 1] - first;
  Wait* waits = reinterpret_cast<Wait*>(queue + length);
  const u32 first_wait = params.wait_begin[blockIdx.x];
  const u32 num_waits = params.wait_begin[blockIdx.x + 1] - first_wait;
  u32* totals = reinterpret_cast<u32*>(waits + num_waits);

  const u32* from = reinterpret_cast<const u32*>(params.runs + first);
  for (u32 i = threadIdx.x; i < length * sizeof(Run) / 4; i += blockDim.x)
    reinterpret_cast<u32*>(queue)[i] = from[i];
  for (u32 i = threadIdx.x; i < num_waits; i += blockDim.x) waits[i] = params.waits[first_wait + i];
  for (u32 i = threadIdx.x; i < kCounters; i += blockDim.x) totals[i] = params.totals[i];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kWarps);
    }
    barrier_init_done();
    shared.verdict = shared.progress = shared.listed = shared.lost = shared.stopped = 0;
  }
  __syncthreads();
  Block block{params, shared, memory, scratch, queue, waits, totals, length};
  if (threadIdx.x < kThreads) {
    claim_registers<kComputeRegisters>();
    compute(block);
    if (thread() == 0) tell_lost(block);
  } else {
    keep_registers<kLoaderRegisters>();
    if (threadIdx.x == kThreads) load_weights(block);
  }
}
