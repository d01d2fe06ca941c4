// Log-probabilities of a step, as ops/logprobs.py defines them: what the drawn token and the best
// ones have under the raw logits. Weights are whole numbers, so their sum is exact; the logarithm
// is made by the host.
#pragma once
#include "draw.cuh"

constexpr int kSurveyHead = kSurveyWords - 2 * kMost;  // words of a row before its keys
constexpr int kReportHead = kReportWords - 2 * kMost;  // words before the best tokens
constexpr u32 kHalfBits = 30;                          // of the sum of weights in a word

// The largest logit, from what Argmax leaves of the chunks.
template <int kChunks>
__device__ __forceinline__ float best_logit(Block& b, const float* part) {
  static_assert(kChunks <= kThreads);
  u32 mine = thread() < kChunks ? rising(load_float(part + 2 * thread())) : 0;
  return of_rising(block_join(b, mine, [](u32 x, u32 y) { return max(x, y); }));
}

// How many of the first `size` keys in shared memory are larger.
__device__ __forceinline__ u32 larger(const DrawScratch& s, u32 size, u64 key) {
  u32 count = 0;
  for (u32 j = 0; j < size; ++j) count += s.keys[j] > key;
  return count;
}

// The `wanted` largest keys of kThreads lists, each with its place, in no order. head: the largest
// key of the thread's list, 0 where that is empty; the lists with the `wanted` largest heads hold
// them all. keys: visits what the thread has of all lists together.
template <class Keys, class Take>
__device__ __forceinline__ void take_largest(Block& b, u64 head, u32 wanted, const Keys& keys,
                                             Take take) {
  if (!wanted) return;
  DrawScratch& s = draw_scratch(b);
  sync_consumers();  // until s has been read
  s.keys[thread()] = head;
  if (thread() == 0) s.below = 1, s.size = 0;
  sync_consumers();
  if (head && larger(s, kThreads, head) == wanted - 1) s.below = head;
  sync_consumers();
  const u64 least = s.below;
  keys.visit([&](u64 key) {
    if (key >= least) s.keys[atomicAdd(&s.size, 1u)] = key;
  });
  sync_consumers();
  for (u32 j = thread(); j < s.size; j += kThreads) {
    const u32 place = larger(s, s.size, s.keys[j]);
    if (place < wanted) take(place, s.keys[j]);
  }
}

template <int kVocab, int kChunk>
struct Survey {
  static constexpr int kChunks = (kVocab + kChunk - 1) / kChunk;
  static constexpr int kEach = (kChunk + kThreads - 1) / kThreads;  // logits of a thread
  static_assert(kMost * kEach <= kListed, "all keys of the lists with the largest heads");

  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const float best = best_logit<kChunks>(b, b.at(run.x2));
    const u32 token = load_relaxed(b.params.tokens), wanted = controls_of(run).logprobs;
    const u64 own = key_of(load(b, run, token), token);
    for (u32 tile = run.first; tile < run.first + run.count; ++tile) {
      Own keys;
      u64 weight = 0, head = 0;
      u32 ahead = 0;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const u32 id = tile * kChunk + e * kThreads + thread();
        const bool inside = e * kThreads + thread() < kChunk && id < kVocab;
        const float logit = inside ? load(b, run, id) : 0;
        const u64 key = keys.key[e] = inside ? key_of(logit, id) : 0;
        weight += inside ? weight_at(__fsub_rn(logit, best)) : 0;
        head = max(head, key), ahead += key > own;
      }
      weight = block_sum(b, weight);
      ahead = u32(block_sum(b, ahead));
      float* row = b.at(run.y) + tile * kSurveyWords;
      if (thread() == 0) {
        store_float(row, __uint_as_float(ahead));
        store_words(row + 2, weight);
      }
      row += kSurveyHead;
      if (thread() < kMost) store_words(row + 2 * thread(), 0);
      take_largest(b, head, wanted, keys,
                   [&](u32 place, u64 key) { store_words(row + 2 * place, key); });
    }
    sync_consumers();
    if (thread() == 0) signal<false>(b, run);
    return true;
  }

 private:
  struct Own {
    u64 key[kEach];  // 0: none
    template <class Visit>
    __device__ __forceinline__ void visit(Visit take) const {
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        if (key[e]) take(key[e]);
    }
  };
  static __device__ __forceinline__ float load(Block& b, const Run& run, u32 id) {
    return __fadd_rn(load_float(b.at(run.x) + id), 0.0f);  // no negative zero
  }
};

// The last op of a step: tells the host of it, and then the next step may begin.
template <int kChunks>
struct Report {
  static_assert(kMost * kMost <= kListed, "all keys of the chunks with the largest heads");
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    // Read across the bus while the inputs are awaited.
    const u32 cancelled = thread() == 0 ? load_system(b.params.cancel) : 0;
    const u32 stop = thread() < kMaxStops ? __ldg(b.params.stop_ids + thread()) : 0xffffffffu;
    if (!wait_for_inputs<false>(b, run)) return false;
    const u32 token = load_relaxed(b.params.tokens), wanted = controls_of(run).logprobs;
    u32* to = b.params.reports + b.step * kReportWords;
    const float* rows = b.at(run.x3);
    const float* row = rows + thread() * kSurveyWords;
    const bool mine = thread() < kChunks;
    const float4 part = mine ? load_float4(row) : float4{};
    const u64 total = block_sum(b, wide(part.z, part.w));
    const u64 ahead = block_sum(b, __float_as_uint(part.x));
    const float best = best_logit<kChunks>(b, b.at(run.x2));
    if (thread() == 0) {
      store_system(to, 1 + u32(ahead));
      store_system(to + 1, __float_as_uint(__fadd_rn(load_float(b.at(run.x) + token), 0.0f)));
      store_system(to + 2, __float_as_uint(best));
      store_system(to + 3, u32(total) & ((1u << kHalfBits) - 1));
      store_system(to + 4, u32(total >> kHalfBits));
    }
    to += kReportHead;
    const u64 head = mine && wanted ? load_key(row, 0) : 0;
    take_largest(b, head, wanted, Rows{rows, wanted}, [&](u32 place, u64 key) {
      store_system(to + 2 * place, id_of(key));
      store_system(to + 2 * place + 1, __float_as_uint(score_of(key)));
    });
    sync_consumers();
    if (warp() == 0) {
      const bool stops = __any_sync(~0u, stop == token);
      const u32 tokens[kTokens] = {token};
      if (lane() == 0) hand_on(b, run, tokens, cancelled || stops);
    }
    sync_consumers();
    return load_shared(&b.shared.verdict) == 0;
  }

 private:
  static __device__ __forceinline__ u64 load_key(const float* row, u32 place) {
    const float2 v = load_float2(row + kSurveyHead + 2 * place);
    return wide(v.x, v.y);
  }
  struct Rows {
    const float* rows;
    u32 wanted;
    template <class Visit>
    __device__ __forceinline__ void visit(Visit take) const {
      for (u32 j = thread(); j < kChunks * wanted; j += kThreads)
        if (u64 key = load_key(rows + j / wanted * kSurveyWords, j % wanted)) take(key);
    }
  };
};
