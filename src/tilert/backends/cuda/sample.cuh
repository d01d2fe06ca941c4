// Token ids: to rows of the embedding table, from the largest logit, and into the next step.
#pragma once
#include "linear.cuh"

template <int kWidth, class Type, bool kTagged>
struct Embed {
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    using Bits = typename Type::Bits;
    const Bits* row =
        reinterpret_cast<const Bits*>(run.w) + u64(load_relaxed(b.params.tokens)) * kWidth;
    for (int i = thread(); i < kWidth; i += kThreads) {
      const float v = Type::widen(__ldg(row + i));
      kTagged ? store_tagged(b.at(run.y) + i, v, b.tag(run.y)) : store_float(b.at(run.y) + i, v);
    }
    sync_consumers();
    if (thread() == 0) signal<kTagged>(b, run);
    return true;
  }
};

// A value and where it was found; of equal values the one with the lowest index wins.
struct Best {
  float value = -infinity();
  u32 index = 0xffffffffu;
  __device__ __forceinline__ void take(float v, u32 i) {
    if (v > value || (v == value && i < index)) value = v, index = i;
  }
};

// The best of all threads, for all threads of warp 0.
__device__ __forceinline__ Best block_best(Block& b, Best best) {
#pragma unroll
  for (int o = 16; o; o /= 2)
    best.take(__shfl_xor_sync(~0u, best.value, o), __shfl_xor_sync(~0u, best.index, o));
  Best* found = reinterpret_cast<Best*>(b.scratch);
  if (lane() == 0) found[warp()] = best;
  sync_consumers();
  if (warp() == 0 && lane() < kWarps) best.take(found[lane()].value, found[lane()].index);
#pragma unroll
  for (int o = kWarps / 2; o; o /= 2)
    best.take(__shfl_xor_sync(~0u, best.value, o), __shfl_xor_sync(~0u, best.index, o));
  return best;
}

template <int kVocab, int kChunk>
struct Argmax {
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    for (u32 tile = run.first; tile < run.first + run.count; ++tile) {
      Best best;
      const float* logits = b.at(run.x);
      for (int i = tile * kChunk + thread(); i < min(int(tile + 1) * kChunk, kVocab); i += kThreads)
        best.take(load_float(logits + i), i);
      best = block_best(b, best);
      if (thread() == 0) {
        store_float(b.at(run.y) + 2 * tile, best.value);
        store_float(b.at(run.y) + 2 * tile + 1, float(best.index));
      }
      sync_consumers();
    }
    if (thread() == 0) signal<false>(b, run);
    return true;
  }
};

// By one thread, behind all that the run stores: the next step may begin with this token, and the
// host is told of it.
__device__ __forceinline__ void hand_on(Block& b, const Run& run, u32 token, bool last) {
  *b.params.tokens = token;
  if (last || load_relaxed(b.params.verdict) != kGoOn) {
    swap_if(b.params.verdict, kGoOn, kStopped);
    store_shared(&b.shared.verdict, 1);
  }
  signal<false>(b, run);
  store_system(b.params.mailbox + b.step, token);
}

template <int kChunks>
struct NextToken {
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    // Read across the bus while the inputs are awaited.
    u32 cancelled = thread() == 0 ? load_system(b.params.cancel) : 0;
    u32 stop = thread() < kMaxStops ? __ldg(b.params.stop_ids + thread()) : 0xffffffffu;
    if (!wait_for_inputs<false>(b, run)) return false;
    Best best;
    for (int i = thread(); i < kChunks; i += kThreads) {
      float2 found = load_float2(b.at(run.x) + 2 * i);
      best.take(found.x, u32(found.y));
    }
    best = block_best(b, best);
    if (warp() == 0) {
      bool stops = __any_sync(~0u, stop == __shfl_sync(~0u, best.index, 0));
      if (lane() == 0) hand_on(b, run, best.index, cancelled || stops);
    }
    sync_consumers();
    return load_shared(&b.shared.verdict) == 0;
  }
};
