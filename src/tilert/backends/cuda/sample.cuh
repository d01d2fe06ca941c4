// Token ids: to rows of the embedding table, from the largest logit, and into the next step.
#pragma once
#include "linear.cuh"

template <int kWidth, class Type, bool kTagged>
struct Embed {
  using Bits = typename Type::Bits;
  static constexpr int kEach = (kWidth + kThreads - 1) / kThreads;  // elements of a thread

  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    for (u32 token = run.first; token < run.first + run.count; ++token) {
      const Bits* row =
          reinterpret_cast<const Bits*>(run.w) + u64(load_relaxed(ids(b) + token)) * kWidth;
      float* y = b.at(run.y) + token * kWidth;
      Bits bits[kEach];  // all loads before the first store: every op of the step waits for this
#pragma unroll
      for (int i = 0; i < kEach; ++i) bits[i] = __ldg(row + min(at(i), kWidth - 1));
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (at(i) < kWidth)
          store_output<kTagged, false>(y, at(i), Type::widen(bits[i]), b.tag(run.y));
    }
    sync_consumers();
    if (thread() == 0) signal<kTagged>(b, run);
    return true;
  }

 private:
  static __device__ __forceinline__ int at(int i) { return thread() + i * kThreads; }
  static __device__ __forceinline__ const u32* ids(const Block& b) {
    if (b.pass == 0) return b.params.tokens;
    return b.pass == 1 ? b.passes().following : b.passes().guess;
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

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int o = 16; o; o /= 2)
    best.take(__shfl_xor_sync(~0u, best.value, o), __shfl_xor_sync(~0u, best.index, o));
  return best;
}

// The best of all threads, for all threads of warp 0.
__device__ __forceinline__ Best block_best(Block& b, Best best) {
  best = warp_best(best);
  Best* found = reinterpret_cast<Best*>(b.scratch);
  if (lane() == 0) found[warp()] = best;
  sync_consumers();
  if (warp() == 0 && lane() < kWarps) best.take(found[lane()].value, found[lane()].index);
#pragma unroll
  for (int o = kWarps / 2; o; o /= 2)
    best.take(__shfl_xor_sync(~0u, best.value, o), __shfl_xor_sync(~0u, best.index, o));
  return best;
}

// The best logit of each chunk: one token by all warps, of several each by its own.
template <int kVocab, int kChunk>
struct Argmax {
  static constexpr int kLanes = kTokens == 1 ? kThreads : 32;  // that look at one token
  static constexpr int kPitch = (kVocab + kChunk - 1) / kChunk * 2;
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const int token = thread() / kLanes;
    const bool mine = token < kTokens;
    for (u32 tile = run.first; tile < run.first + run.count; ++tile) {
      Best best;
      const float* logits = b.at(run.x) + (mine ? token * kVocab : 0);
      const int end = mine ? min(int(tile + 1) * kChunk, kVocab) : 0;
#pragma unroll 8
      for (int i = tile * kChunk + thread() % kLanes; i < end; i += kLanes)
        best.take(load_float(logits + i), i);
      best = kTokens == 1 ? block_best(b, best) : warp_best(best);
      if (mine && thread() % kLanes == 0) {
        float* y = b.at(run.y) + token * kPitch + 2 * tile;
        store_float(y, best.value), store_float(y + 1, float(best.index));
      }
      sync_consumers();
    }
    if (thread() == 0) signal<false>(b, run);
    return true;
  }
};

// By one thread, behind all that the run stores: the next step may begin, and the host is told of
// the tokens of this one.
__device__ __forceinline__ void hand_on(Block& b, const Run& run, const u32 (&tokens)[kTokens],
                                        bool last) {
  if (last || load_relaxed(b.params.verdict) != kGoOn) {
    swap_if(b.params.verdict, kGoOn, kStopped);
    store_shared(&b.shared.verdict, 1);
  }
  signal<false>(b, run);
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
    store_system(b.params.mailbox + b.step * kTokens + t, tokens[t]);
}

// The best of all chunks of a row, by a warp.
template <int kChunks>
__device__ __forceinline__ Best best_of_row(const Block& b, const Run& run, u32 row) {
  Best best;
  for (int i = lane(); i < kChunks; i += 32) {
    float2 chunk = load_float2(b.at(run.x) + (row * kChunks + i) * 2);
    best.take(chunk.x, u32(chunk.y));
  }
  return warp_best(best);
}

// Of each token, a warp for each; behind a barrier, and in memory that the next op may use.
template <int kChunks>
__device__ __forceinline__ const u32* best_of_rows(Block& b, const Run& run) {
  u32* found = reinterpret_cast<u32*>(b.scratch);
  if (warp() < kTokens) {
    const Best best = best_of_row<kChunks>(b, run, warp());
    if (lane() == 0) found[warp()] = best.index;
  }
  sync_consumers();
  return found;
}

// The best of all chunks, for each token. Only for one token stop ids are looked at: of several the
// host knows which belongs to whom.
template <int kChunks>
struct NextToken {
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    // Read across the bus while the inputs are awaited.
    const u32 cancelled = thread() == 0 ? load_system(b.params.cancel) : 0;
    const u32 stop =
        kTokens == 1 && thread() < kMaxStops ? __ldg(b.params.stop_ids + thread()) : 0xffffffffu;
    if (!wait_for_inputs<false>(b, run)) return false;
    const u32* found = best_of_rows<kChunks>(b, run);
    if (warp() == 0) {
      // Where the logits are no numbers nothing was found, which ends the launch as well.
      const bool stops = __any_sync(~0u, stop == found[kTokens == 1 ? 0 : lane() % kTokens]);
      u32 tokens[kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) tokens[t] = found[t];
      if (lane() == 0) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) b.params.tokens[t] = tokens[t];
        hand_on(b, run, tokens, cancelled || stops);
      }
    }
    sync_consumers();
    return load_shared(&b.shared.verdict) == 0;
  }
};

// How many guesses were right: where the layer that guesses and the next step begin. What is not
// given to the host is kNoToken.
constexpr u32 kNoToken = 0xfffffffeu;
// What the embedding is asked for: where logits are no numbers, too, nothing else than a token.
__device__ __forceinline__ u32 looked_up(u32 found) { return found == 0xffffffffu ? 0 : found; }

template <int kChunks>
struct Accept {
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    const u32 cancelled = thread() == 0 ? load_system(b.params.cancel) : 0;
    if (!wait_for_inputs<false>(b, run)) return false;
    const u32* found = best_of_rows<kChunks>(b, run);
    if (thread() == 0) accept(b, run, found, cancelled);
    sync_consumers();
    return load_shared(&b.shared.verdict) == 0;
  }

 private:
  static __device__ __forceinline__ void accept(Block& b, const Run& run, const u32* found,
                                                bool last) {
    Passes& passes = b.passes();
    const u32 first = b.position(0), count = b.count();
    u32 right = 0;
    while (right + 1 < count && load_relaxed(b.params.tokens + right + 1) == found[right]) ++right;
    u32 tokens[kTokens];
#pragma unroll
    for (u32 t = 0; t < kTokens; ++t) {
      tokens[t] = t <= right ? found[t] : kNoToken;
      passes.following[t] = t <= right ? looked_up(found[t]) : 0;
      for (int i = 0; i < kMaxStops; ++i)
        last |= t <= right && found[t] == __ldg(b.params.stop_ids + i);
    }
    b.params.tokens[0] = looked_up(found[right]);
    passes.at[1] = {first, right + 1};
    passes.at[0].first = first + right + 1;
    hand_on(b, run, tokens, last);
  }
};

// The guess of a pass, of which the first row has logits: a token of the next step and, at the
// position behind the tokens of this pass, that of the next pass.
template <int kChunks>
struct Guess {
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    if (warp() == 0) {
      const Best best = best_of_row<kChunks>(b, run, 0);
      if (lane() == 0) {
        Passes& passes = b.passes();
        b.params.tokens[b.pass] = passes.guess[0] = looked_up(best.index);
        if (b.pass + 1 < kPasses) passes.at[b.pass + 1].first = b.position(0) + b.count();
        signal<false>(b, run);
      }
    }
    sync_consumers();
    return true;
  }
};
