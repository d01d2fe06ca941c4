// Sampling, as ops/draw.py defines it: scores, bins, their totals, candidates at the border, the
// draw. Weights are whole numbers, so sums are exact and atomic additions to shared memory may come
// in any order. Where floats are rounded, the __f.._rn forms keep the compiler from fusing two
// operations.
#pragma once
#include "sample.cuh"

constexpr int kBins = kThreads;  // a thread for each
constexpr float kBinsPerUnit = 8;
constexpr u32 kMasked = 1, kBiased = 2, kCounted = 4;
constexpr u32 kInPrompt = 1u << 30;
constexpr int kListed =
    960;  // candidates that are kept in shared memory; the others are read again

// Written by the host before a launch. 64 bytes.
struct Controls {
  u32 flags, top_k;  // top_k: 0 for all
  float temperature, repetition, frequency, presence;
  u32 shift;     // from a position to the number of the token that is made there
  u32 logprobs;  // of how many of the best tokens
  u64 share;     // top_p in units of 2^-64; 0 for all
  u64 floor;     // least weight
  u64 seed, index;
};

// Run::w: controls, Run::w_up: mask, Run::bias: biases, Run::bias_up: tally.
__device__ __forceinline__ const Controls& controls_of(const Run& run) {
  return *reinterpret_cast<const Controls*>(run.w);
}

struct DrawScratch {
  u64 sums[kWarps];
  u64 keys[kListed];
  u64 below, total, above, word;
  // Tokens and weight of bins, of digits, of chunks. Weights in parts of 14 bits: shared memory
  // adds 32 bits in place, but 64 in a loop that is slow where many threads add to one place.
  u32 count[kBins], parts[3][kBins];
  u32 offset[kThreads + 1];
  u32 found, size;

  __device__ __forceinline__ void clear(u32 bin) {
    count[bin] = parts[0][bin] = parts[1][bin] = parts[2][bin] = 0;
  }
  // Weights are at most 2^40, and a bin gets at most 2^18 of them.
  __device__ __forceinline__ void add(u32 bin, u64 weight) {
    constexpr u32 kMask = (1u << 14) - 1;
    if (weight == 0) return;
    atomicAdd(&parts[0][bin], u32(weight) & kMask);
    atomicAdd(&parts[1][bin], u32(weight >> 14) & kMask);
    atomicAdd(&parts[2][bin], u32(weight >> 28));
  }
  __device__ __forceinline__ u64 weight(u32 bin) const {
    return parts[0][bin] + (u64(parts[1][bin]) << 14) + (u64(parts[2][bin]) << 28);
  }
};

__device__ __forceinline__ DrawScratch& draw_scratch(Block& b) {
  return *reinterpret_cast<DrawScratch*>(b.scratch);
}

// Floats as integers of the same order, a NaN above all.
__device__ __forceinline__ u32 rising(float v) {
  u32 bits = __float_as_uint(v);
  if (v != v) return 0xffffffffu;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_rising(u32 v) {
  return __uint_as_float(v >> 31 ? v ^ 0x80000000u : ~v);
}
__device__ __forceinline__ bool finite(float v) { return v - v == 0; }

__device__ __forceinline__ u64 wide(float low, float high) {
  return __float_as_uint(low) | u64(__float_as_uint(high)) << 32;
}
__device__ __forceinline__ void store_words(float* to, u64 v) {
  store_float(to, __uint_as_float(u32(v)));
  store_float(to + 1, __uint_as_float(u32(v >> 32)));
}

// Of all threads, for all threads; `join` in any order.
template <class T, class Join>
__device__ __forceinline__ T block_join(Block& b, T v, Join join) {
#pragma unroll
  for (int o = 16; o; o /= 2) v = join(v, __shfl_xor_sync(~0u, v, o));
  T* found = reinterpret_cast<T*>(draw_scratch(b).sums);
  sync_consumers();  // until an earlier use has been read
  if (lane() == 0) found[warp()] = v;
  sync_consumers();
  v = found[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) v = join(v, found[i]);
  return v;
}
__device__ __forceinline__ u64 block_sum(Block& b, u64 v) {
  return block_join(b, v, [](u64 x, u64 y) { return x + y; });
}

// Of all threads up to and with this one.
__device__ __forceinline__ u64 running_sum(Block& b, u64 v) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    u64 before = __shfl_up_sync(~0u, v, o);
    if (lane() >= o) v += before;
  }
  u64* sums = draw_scratch(b).sums;
  sync_consumers();  // until an earlier use has been read
  if (lane() == 31) sums[warp()] = v;
  sync_consumers();
#pragma unroll
  for (int i = 0; i < kWarps - 1; ++i) v += i < warp() ? sums[i] : 0;
  return v;
}

// The largest score of all chunks.
template <int kChunks>
__device__ __forceinline__ float best_score(Block& b, const float* peaks) {
  static_assert(kChunks <= kThreads);
  u32 mine = thread() < kChunks ? rising(load_float(peaks + thread())) : 0;
  return of_rising(block_join(b, mine, [](u32 x, u32 y) { return max(x, y); }));
}

// 2^40 exp(distance), cut to an integer. Cephes expf.
__device__ __forceinline__ u64 weight_at(float distance) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  float x = fmaxf(distance, -64.0f);
  float n = __fsub_rn(__fadd_rn(__fmul_rn(x, kLog2e), kRound), kRound);
  float r = __fsub_rn(x, __fmul_rn(n, 0.693359375f));
  r = __fsub_rn(r, __fmul_rn(n, -2.12194440e-4f));
  float y = 1.9875691500e-4f;
  y = __fadd_rn(__fmul_rn(y, r), 1.3981999507e-3f);
  y = __fadd_rn(__fmul_rn(y, r), 8.3334519073e-3f);
  y = __fadd_rn(__fmul_rn(y, r), 4.1665795894e-2f);
  y = __fadd_rn(__fmul_rn(y, r), 1.6666665459e-1f);
  y = __fadd_rn(__fmul_rn(y, r), 0.5f);
  y = __fadd_rn(__fadd_rn(__fmul_rn(y, __fmul_rn(r, r)), r), 1.0f);
  return u64(__fmul_rn(y, __uint_as_float(u32(int(n) + 167) << 23)));  // 2^(40 + n)
}
// At the request's temperature, or 0 below the floor.
__device__ __forceinline__ u64 weigh_score(const Controls& c, float score, float best) {
  u64 weight = weight_at(__fdiv_rn(__fsub_rn(score, best), c.temperature));
  return weight >= c.floor ? weight : 0;
}

__device__ __forceinline__ u32 bin_of(float score, float best) {
  float distance = __fmul_rn(__fsub_rn(best, score), kBinsPerUnit);
  return distance < kBins - 1 ? u32(distance) : kBins - 1;  // the last one takes a NaN as well
}

// The share of a weight, rounded up.
__device__ __forceinline__ u64 share_of(u64 weight, u64 share) {
  return __umul64hi(weight, share) + (weight * share != 0);
}

template <int kVocab, int kChunk>
struct Adjust {
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ float adjusted(const Run& run, float v, int i) {
    const Controls& c = controls_of(run);
    const u32* mask = reinterpret_cast<const u32*>(run.w_up);
    if (c.flags & kMasked && !(__ldg(mask + i / 32) >> i % 32 & 1)) v = -infinity();
    if (c.flags & kBiased) v = __fadd_rn(v, __ldg(reinterpret_cast<const float*>(run.bias) + i));
    if (c.flags & kCounted) {
      u32 tally = load_relaxed(reinterpret_cast<const u32*>(run.bias_up) + i);
      if (tally) v = v > 0 ? __fdiv_rn(v, c.repetition) : __fmul_rn(v, c.repetition);
      if (u32 made = tally & (kInPrompt - 1))
        v = __fsub_rn(v, __fadd_rn(__fmul_rn(c.frequency, float(made)), c.presence));
    }
    return __fadd_rn(v, 0.0f);  // no negative zero
  }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    for (u32 tile = run.first; tile < run.first + run.count; ++tile) {
      u32 peak = 0;
      for (int i = tile * kChunk + thread(); i < min(int(tile + 1) * kChunk, kVocab);
           i += kThreads) {
        float score = adjusted(run, load_float(b.at(run.x) + i), i);
        store_float(b.at(run.y) + i, score);
        peak = max(peak, rising(score));
      }
      peak = block_join(b, peak, [](u32 x, u32 y) { return max(x, y); });
      if (thread() == 0) store_float(b.at(run.x2) + tile, of_rising(peak));
    }
    sync_consumers();
    if (thread() == 0) signal<false>(b, run);
    return true;
  }
};

template <int kVocab, int kChunk>
struct Bins {
  static constexpr int kChunks = (kVocab + kChunk - 1) / kChunk;
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const Controls& c = controls_of(run);
    DrawScratch& s = draw_scratch(b);
    const float best = best_score<kChunks>(b, b.at(run.x2));
    for (u32 tile = run.first; tile < run.first + run.count; ++tile) {
      s.clear(thread());
      sync_consumers();
      for (int i = tile * kChunk + thread(); i < min(int(tile + 1) * kChunk, kVocab);
           i += kThreads) {
        float score = load_float(b.at(run.x) + i);
        u32 bin = bin_of(score, best);
        atomicAdd(&s.count[bin], 1u);
        s.add(bin, weigh_score(c, score, best));
      }
      sync_consumers();
      float* to = b.at(run.y) + 4 * (tile * kBins + thread());
      store_words(to, s.count[thread()]);
      store_words(to + 2, s.weight(thread()));
    }
    sync_consumers();
    if (thread() == 0) signal<false>(b, run);
    return true;
  }
};

// A warp for each bin.
template <int kChunks, int kWidth>
struct Totals {
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const int end = min(int(run.first + run.count) * kWidth, kBins);
    for (int bin = run.first * kWidth + warp(); bin < end; bin += kWarps) {
      u64 count = 0, weight = 0;
      for (int i = lane(); i < kChunks; i += 32) {
        float4 v = load_float4(b.at(run.x) + 4 * (i * kBins + bin));
        count += __float_as_uint(v.x), weight += wide(v.z, v.w);
      }
#pragma unroll
      for (int o = 16; o; o /= 2) {
        count += __shfl_xor_sync(~0u, count, o);
        weight += __shfl_xor_sync(~0u, weight, o);
      }
      if (lane() == 0) {
        store_words(b.at(run.y) + 4 * bin, count);
        store_words(b.at(run.y) + 4 * bin + 2, weight);
      }
    }
    sync_consumers();
    if (thread() == 0) signal<false>(b, run);
    return true;
  }
};

// The bins [low, high] hold the border; lower ones are kept, and count and weigh this.
struct BorderRange {
  u32 low, high;
  u64 count, weight, total;  // total: weight of all tokens
};

__device__ __forceinline__ BorderRange border_range(Block& b, const Controls& c,
                                                    const float* totals) {
  DrawScratch& s = draw_scratch(b);
  float4 v = load_float4(totals + 4 * thread());
  const u64 count = __float_as_uint(v.x), weight = wide(v.z, v.w);
  const u64 counts = running_sum(b, count), weights = running_sum(b, weight);
  if (thread() == kBins - 1) s.total = weights, s.found = kBins - 1, s.above = s.below = 0;
  sync_consumers();
  const u64 total = s.total, goal = c.top_k ? c.top_k : share_of(total, c.share);
  const u64 mine = c.top_k ? count : weight, sum = c.top_k ? counts : weights;
  if (sum >= goal && sum - mine < goal)
    s.found = thread(), s.above = counts - count, s.below = weights - weight;
  sync_consumers();
  BorderRange range{s.found, s.found, s.above, s.below, total};
  if (c.top_k && c.share) {
    range.low = 0, range.count = range.weight = 0;
  } else if (!c.top_k && !c.share) {
    range.low = range.high = kBins, range.weight = total;
  }
  return range;
}

// Of one chunk's candidates; rows begin at multiples of 16 bytes.
template <int kChunk>
constexpr int kRowWords = 4 + (kChunk + 1) / 2 * 4;

// Rises with the order of the tokens: larger comes first.
__device__ __forceinline__ u64 key_of(float score, u32 id) {
  return u64(rising(score)) << 32 | (0xffffffffu - id);
}
__device__ __forceinline__ float score_of(u64 key) { return of_rising(u32(key >> 32)); }
__device__ __forceinline__ u32 id_of(u64 key) { return 0xffffffffu - u32(key); }

template <int kVocab, int kChunk>
struct Sift {
  static constexpr int kChunks = (kVocab + kChunk - 1) / kChunk;
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const Controls& c = controls_of(run);
    DrawScratch& s = draw_scratch(b);
    const float best = best_score<kChunks>(b, b.at(run.x2));
    const BorderRange range = border_range(b, c, b.at(run.x3));
    for (u32 tile = run.first; tile < run.first + run.count; ++tile) {
      sync_consumers();  // until s.size and s.found have been read
      if (thread() == 0) s.size = 0;
      sync_consumers();
      float* row = b.at(run.y) + tile * kRowWords<kChunk>;
      u64 weight = 0;
      for (int i = tile * kChunk + thread(); i < min(int(tile + 1) * kChunk, kVocab);
           i += kThreads) {
        float score = load_float(b.at(run.x) + i);
        u32 bin = bin_of(score, best);
        if (bin < range.low) {
          weight += weigh_score(c, score, best);
        } else if (bin <= range.high) {
          store_words(row + 4 + 2 * atomicAdd(&s.size, 1u), key_of(score, i));
        }
      }
      weight = block_sum(b, weight);
      if (thread() == 0) {
        store_float(row, __uint_as_float(s.size));
        store_float(row + 1, best);
        store_words(row + 2, weight);
      }
    }
    sync_consumers();
    if (thread() == 0) signal<false>(b, run);
    return true;
  }
};

// 53 random bits in the upper places of a word: Philox 4x64-10, its first word.
__device__ __forceinline__ u64 random_word(const Controls& c, u32 place) {
  constexpr u64 kFirst = 0xd2e7470ee14c6c93u, kSecond = 0xca5a826395121157u;
  u64 x0 = u64(place) + 1, x1 = 0, x2 = 0, x3 = 0, key0 = c.seed, key1 = c.index;
#pragma unroll 1
  for (int i = 0; i < 10; ++i) {
    const u64 low0 = kFirst * x0, low1 = kSecond * x2;
    const u64 high0 = __umul64hi(kFirst, x0), high1 = __umul64hi(kSecond, x2);
    x0 = high1 ^ x1 ^ key0, x1 = low1;
    x2 = high0 ^ x3 ^ key1, x3 = low0;
    key0 += 0x9e3779b97f4a7c15u, key1 += 0xbb67ae8584caa73bu;
  }
  return x0 >> 11 << 11;
}

// The candidates of all chunks, and the search for the border among them.
template <int kChunk, int kChunks>
struct Candidates {
  Block& b;
  const Controls& c;
  const float* rows;
  float best;
  u32 size = 0;
  u64 smallest = 0;   // key
  int differing = 0;  // low bits in which keys differ

  // Where each chunk's candidates begin; the first of them are copied to shared memory.
  __device__ __forceinline__ void list(u32 mine) {
    DrawScratch& s = draw_scratch(b);
    u32 end = u32(running_sum(b, mine));
    s.offset[thread() + 1] = end;
    if (thread() == 0) s.offset[0] = 0;
    sync_consumers();
    size = s.offset[kThreads];
    u64 low = ~u64(0), high = 0;
    for (u32 j = thread(); j < size; j += kThreads) {
      u64 k = fetch(j);
      if (j < kListed) s.keys[j] = k;
      low = min(low, k), high = max(high, k);
    }
    smallest = block_join(b, low, [](u64 x, u64 y) { return min(x, y); });
    high = block_join(b, high, [](u64 x, u64 y) { return max(x, y); });
    differing = 64 - __clzll(static_cast<long long>(smallest ^ high));
  }
  __device__ __forceinline__ u64 fetch(u32 j) const {
    const u32* offset = draw_scratch(b).offset;
    u32 low = 0, high = kChunks;  // offset[low] <= j < offset[high]
    while (high - low > 1) {
      u32 middle = (low + high) / 2;
      (offset[middle] <= j ? low : high) = middle;
    }
    float2 v = load_float2(rows + low * kRowWords<kChunk> + 4 + 2 * (j - offset[low]));
    return wide(v.x, v.y);
  }
  __device__ __forceinline__ u64 key(u32 j) const {
    return j < kListed ? draw_scratch(b).keys[j] : fetch(j);
  }
  __device__ __forceinline__ u64 weight(u64 key) const {
    return weigh_score(c, score_of(key), best);
  }

  // The last key, in falling order from the largest on, that is needed to reach `goal` tokens, or
  // with kWeigh the weight `goal`; keys below `least` do not count. Found digit by digit from the
  // top; any number between that key and the next smaller one may be given for it.
  template <bool kWeigh>
  __device__ __forceinline__ u64 border(u64 least, u64 goal) const {
    DrawScratch& s = draw_scratch(b);
    int top = differing, shift = 0;
    u64 prefix = top < 64 ? smallest >> top : 0;
    for (; top > 0; top = shift) {
      shift = max(top - 8, 0);
      sync_consumers();  // until s has been read
      s.clear(thread());
      sync_consumers();
      for (u32 j = thread(); j < size; j += kThreads) {
        u64 k = key(j);
        if (k < least || (top < 64 && k >> top != prefix)) continue;
        u32 digit = (k >> shift) & ((1u << (top - shift)) - 1);
        atomicAdd(&s.count[digit], 1u);
        if constexpr (kWeigh) s.add(digit, weight(k));
      }
      sync_consumers();
      const u32 digit = 255 - thread(), count = s.count[digit];
      const u64 mine = kWeigh ? s.weight(digit) : count, sum = running_sum(b, mine);
      if (sum >= goal && sum - mine < goal) {
        s.found = digit, s.below = goal - (sum - mine);
        s.size = kWeigh ? count == 1 : sum == goal;  // all that begin with these digits are needed
      }
      sync_consumers();
      prefix = prefix << (top - shift) | s.found, goal = s.below;
      if (s.size) break;
    }
    return prefix << shift;
  }

  // Weight of the keys from `least` on.
  __device__ __forceinline__ u64 sum(u64 least) const {
    u64 mine = 0;
    for (u32 j = thread(); j < size; j += kThreads)
      if (u64 k = key(j); k >= least) mine += weight(k);
    return block_sum(b, mine);
  }
};

// With kFeed the next step may begin behind it, else behind what tells of the step (logprobs.cuh).
template <int kVocab, int kChunk, bool kFeed>
struct Draw {
  static constexpr int kChunks = (kVocab + kChunk - 1) / kChunk;
  static_assert(kVocab <= 1 << 18 && sizeof(DrawScratch) <= kScratchBytes);
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }

  // The key of the last candidate that is kept.
  static __device__ __forceinline__ u64 last_kept(const Candidates<kChunk, kChunks>& candidates,
                                                  const Controls& c, const BorderRange& range) {
    u64 cut = 0, total = range.total;
    if (c.top_k) cut = candidates.template border<false>(0, c.top_k - range.count);
    if (c.share) {
      if (c.top_k) total = candidates.sum(cut);
      cut =
          max(cut, candidates.template border<true>(cut, share_of(total, c.share) - range.weight));
    }
    return cut;
  }

  // In the order of ids, the token that covers a random part of the weight of all that are kept.
  // mine: how much of it the thread's chunk has in bins before the border's.
  static __device__ __forceinline__ u32 drawn(Candidates<kChunk, kChunks>& candidates,
                                              const Controls& c, const BorderRange& range,
                                              const float* scores, u64 mine, u64 word) {
    Block& b = candidates.b;
    DrawScratch& s = draw_scratch(b);
    const u64 cut = last_kept(candidates, c, range);
    sync_consumers();  // until s has been read
    s.clear(thread());
    sync_consumers();
    for (u32 j = thread(); j < candidates.size; j += kThreads)
      if (u64 k = candidates.key(j); k >= cut) s.add(id_of(k) / kChunk, candidates.weight(k));
    sync_consumers();
    mine += s.weight(thread());
    u64 sum = running_sum(b, mine);
    if (thread() == kThreads - 1) s.total = sum;
    sync_consumers();
    u64 goal = __umul64hi(word, s.total);
    if (sum > goal && sum - mine <= goal) s.found = thread(), s.below = goal - (sum - mine);
    sync_consumers();
    const u32 first = s.found * kChunk;
    goal = s.below;

    constexpr int kEach = (kChunk + kThreads - 1) / kThreads;
    const u32 begin = first + thread() * kEach;
    u64 weights[kEach];
    mine = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const u32 id = begin + e;
      const bool inside = id < min(first + kChunk, u32(kVocab));
      const float score = inside ? load_float(scores + id) : -infinity();
      const u32 bin = bin_of(score, candidates.best);
      const bool kept =
          inside && (bin < range.low || (bin <= range.high && key_of(score, id) >= cut));
      mine += weights[e] = kept ? weigh_score(c, score, candidates.best) : 0;
    }
    sum = running_sum(b, mine) - mine;
    if (sum <= goal && sum + mine > goal) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (sum <= goal && sum + weights[e] > goal) s.found = begin + e;
        sum += weights[e];
      }
    }
    sync_consumers();
    return s.found;
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    // Read across the bus, or computed, while the inputs are awaited.
    u32 cancelled = thread() == 0 ? load_system(b.params.cancel) : 0;
    u32 stop = thread() < kMaxStops ? __ldg(b.params.stop_ids + thread()) : 0xffffffffu;
    const Controls& c = controls_of(run);
    const u64 word = random_word(c, b.position(0) + c.shift);
    if (!wait_for_inputs<false>(b, run)) return false;
    const float* rows = b.at(run.x2);
    float4 share{};
    if (thread() < kChunks) share = load_float4(rows + thread() * kRowWords<kChunk>);
    Candidates<kChunk, kChunks> candidates{b, c, rows, load_float(rows + 1)};
    const bool sound = finite(candidates.best);
    u32 token = 0;
    if (!sound) {        // there is nothing to draw from
      sync_consumers();  // the verdict is told after all have seen that there was none
    } else {
      const BorderRange range = border_range(b, c, b.at(run.x3));
      candidates.list(__float_as_uint(share.x));
      token = drawn(candidates, c, range, b.at(run.x), wide(share.z, share.w), word);
    }
    if (warp() == 0) {
      bool stops = __any_sync(~0u, stop == token);
      if (lane() == 0) {
        u32* tally = reinterpret_cast<u32*>(const_cast<u8*>(run.bias_up));
        if (c.flags & kCounted) tally[token] = load_relaxed(tally + token) + 1;
        const u32 tokens[kTokens] = {token};
        b.params.tokens[0] = token;
        if (kFeed || !sound)
          hand_on(b, run, tokens, cancelled || stops || !sound);
        else
          signal<false>(b, run);
      }
    }
    sync_consumers();
    return load_shared(&b.shared.verdict) == 0;
  }
};
