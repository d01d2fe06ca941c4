// Attention of one kv head and its group of query heads over a share of the past positions, whose
// keys and values arrive through the ring a page at a time. Pages are stored as the matrix units
// like to read them: [64 positions][head_dim] bf16, with the 16-byte pieces of a row permuted (see
// swizzle).
//
// Scores and sums are mma products with the query heads as the 16 rows of A; rows beyond the group
// hold anything, and what comes of them is not used. A warp takes 16 positions, warps 0 to 3 the
// first page, the third, ... and warps 4 to 7 the others. Each warp keeps its own maximum and sums
// (online softmax, in powers of two); they are merged at the end.
#pragma once
#include "linear.cuh"

template <int kHeadDim>
__device__ __forceinline__ u32 swizzle(u32 row, u32 piece) {
  constexpr u32 kPieces = kHeadDim / 8;
  constexpr u32 kMask = kPieces % 8 == 0 ? 7 : kPieces % 4 == 0 ? 3 : kPieces % 2 == 0 ? 1 : 0;
  return piece ^ (row & kMask);
}

template <int kHeads, int kKvHeads, int kHeadDim, int kAttnWindow, int kSplits, bool kTagged,
          class QNorm, class KNorm, u32 kEpsBits, u32 kScaleBits>
struct Attend {
  static constexpr int kGroup = kHeads / kKvHeads;
  static_assert(kGroup <= 16 && kHeadDim % 16 == 0 && kHeadDim <= 128, "shape of a kv head");
  static constexpr u32 kPageBytes = kPage * kHeadDim * 2;
  static_assert(kPageBytes <= kSlotBytes, "a page of one kv head fits a slot");
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kPairs = (kHeadDim / 2 + 31) / 32;  // rotated pairs of a head per lane
  static constexpr int kPitch = kHeadDim + 2;
  static __device__ __forceinline__ float scale() { return __uint_as_float(kScaleBits) * kLog2e; }

  static constexpr int kFirstAppender = kWarps - 2;

  // The memory between barriers: rotated queries, the new key and value, its scores, and the
  // partial results of four warps.
  struct Scratch {
    u16 q[16 * kHeadDim], k[kHeadDim], v[kHeadDim];
    float merged[4][kGroup][kPitch];
    float own[kGroup];
  };
  static_assert(sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  static __device__ __forceinline__ u32 active(const Block& b) {
    return active_shares(first_visible(b.position(), kAttnWindow), b.position(), kSplits);
  }

  static __device__ __forceinline__ void share(const Block& b, u32 split, u32& begin, u32& end) {
    u32 hi = b.position();
    page_share(first_visible(hi, kAttnWindow), hi, split, kSplits, begin, end);
  }

  static __device__ __forceinline__ u64 page_at(const Block& b, u32 page, u32 g) {
    return (u64(__ldg(b.params.pages + page)) * kKvHeads + g) * kPageBytes;
  }

  // Rows that this launch has appended may be streamed once the run after this one has started in
  // the step before: it comes after all appends of this op (verified as rule `stream`).
  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    Block& b = l.b;
    if (b.step) {
      u32 passed = (b.step - 1) * b.length + b.number + 2;
      while (load_shared(&b.shared.progress) < passed)
        if (load_shared(&b.shared.verdict)) return false;
      fence_proxy();
    }
    for (u32 tile = run.first; tile < run.first + run.count; ++tile) {
      u32 begin, end;
      share(b, tile % kSplits, begin, end);
      for (u32 page = begin / kPage; page * kPage < end; ++page) {
        u64 at = page_at(b, page, tile / kSplits);
#pragma unroll
        for (int kv = 0; kv < 2; ++kv) {
          if (!l.acquire()) return false;
          l.expect(kPageBytes);
          l.copy(0, (kv ? run.w_up : run.w) + at, kPageBytes);
          l.next();
        }
      }
    }
    return true;
  }

  // A head as the products left it, and then normed and rotated; lane l has the elements l + 32 i
  // of both halves.
  static __device__ __forceinline__ void load_head(const Block& b, u32 operand, u32 head,
                                                   float (&low)[kPairs], float (&high)[kPairs]) {
    constexpr int kHalf = kHeadDim / 2;
    const float* from[2 * kPairs];
    float v[2 * kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int e = lane() + 32 * i;
      const float* at = b.at(operand) + head * kHeadDim + e;
      from[2 * i] = e < kHalf ? at : nullptr, from[2 * i + 1] = e < kHalf ? at + kHalf : nullptr;
    }
    if constexpr (kTagged) {
      load_tagged(b, from, b.tag(operand), v);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) v[i] = from[i] ? load_float(from[i]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) low[i] = v[2 * i], high[i] = v[2 * i + 1];
  }

  // What turning a head needs, fetched while the inputs are awaited.
  struct Held {
    float cosine[kPairs], sine[kPairs];
    float q_norm[2 * kPairs], k_norm[2 * kPairs];
  };

  template <class Norm>
  static __device__ __forceinline__ void fetch_norm(const u8* norm, float (&to)[2 * kPairs]) {
    if constexpr (Norm::kGiven) {
      auto w = reinterpret_cast<const typename Norm::Bits*>(norm);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int e = min(lane() + 32 * i, kHeadDim / 2 - 1);
        to[2 * i] = Norm::widen(__ldg(w + e)),
               to[2 * i + 1] = Norm::widen(__ldg(w + kHeadDim / 2 + e));
      }
    }
  }

  static __device__ __forceinline__ void prefetch(const Block& b, const Run& run, Held& held) {
    const float* table = reinterpret_cast<const float*>(run.bias_up) + u64(b.position()) * kHeadDim;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int e = min(lane() + 32 * i, kHeadDim / 2 - 1);
      held.cosine[i] = __ldg(table + e), held.sine[i] = __ldg(table + kHeadDim / 2 + e);
    }
    fetch_norm<QNorm>(run.norm, held.q_norm);
    fetch_norm<KNorm>(run.norm2, held.k_norm);
  }

  template <class Norm>
  static __device__ __forceinline__ void turn(const Held& held, const float (&norm)[2 * kPairs],
                                              float (&low)[kPairs], float (&high)[kPairs]) {
    float sum = 0, factor = 1;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) sum += low[i] * low[i] + high[i] * high[i];
    if constexpr (Norm::kGiven)
      factor = inverse_root(warp_sum(sum) / kHeadDim + __uint_as_float(kEpsBits));
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float a = low[i], c = high[i];
      if constexpr (Norm::kGiven) a *= factor * norm[2 * i], c *= factor * norm[2 * i + 1];
      low[i] = a * held.cosine[i] - c * held.sine[i],
      high[i] = c * held.cosine[i] + a * held.sine[i];
    }
  }

  static __device__ __forceinline__ void put(u16* rows, u32 row, u32 e, float v) {
    rows[row * kHeadDim + swizzle<kHeadDim>(row, e / 8) * 8 + e % 8] = u16(pack_bf16(v, 0));
  }

  static __device__ __forceinline__ void put_head(u16* rows, u32 row, const float (&low)[kPairs],
                                                  const float (&high)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      u32 e = lane() + 32 * i;
      if (e >= kHeadDim / 2) continue;
      put(rows, row, e, low[i]), put(rows, row, kHeadDim / 2 + e, high[i]);
    }
  }

  // Queries to shared memory, a warp for each head; for split 0 the last two warps do the same with
  // the new key and value and append them to the cache.
  static __device__ __forceinline__ void prepare(Block& b, const Run& run, const Held& held, u32 g,
                                                 u32 split, Scratch& scratch) {
    float low[kPairs], high[kPairs];
    for (int h = warp(); h < kGroup; h += kWarps) {
      load_head(b, run.x, g * kGroup + h, low, high);
      turn<QNorm>(held, held.q_norm, low, high);
      put_head(scratch.q, h, low, high);
    }
    if (split || warp() < kFirstAppender) return;
    const bool key = warp() == kFirstAppender;
    load_head(b, key ? run.x2 : run.x3, g, low, high);
    if (key) turn<KNorm>(held, held.k_norm, low, high);
    put_head(key ? scratch.k : scratch.v, 0, low, high);
    u8* cache = const_cast<u8*>(key ? run.w : run.w_up);
    u32 page = b.position() / kPage, row = b.position() % kPage;
    put_head(reinterpret_cast<u16*>(cache + page_at(b, page, g)), row, low, high);
  }

  // Scores of the step's own position, in powers of two; its one key needs no matrix unit.
  static __device__ __forceinline__ void score_own(Scratch& scratch) {
    for (int h = warp() - kWarps / 2; h < kGroup; h += kWarps / 2) {
      float sum = 0;
      for (u32 e = lane(); e < kHeadDim; e += 32) {
        const u32 q = h * kHeadDim + swizzle<kHeadDim>(h, e / 8) * 8 + e % 8;
        sum += BF16::widen(scratch.q[q]) * BF16::widen(scratch.k[e]);
      }
      sum = warp_sum(sum) * scale();
      if (lane() == 0) scratch.own[h] = sum;
    }
  }

  // Online softmax of one warp. Rows of A are query heads: lane l has rows l / 4 and l / 4 + 8.
  struct State {
    float most[2] = {-infinity(), -infinity()}, sum[2] = {0, 0};
    float out[kHeadDim / 8][4];
  };

  // s = q k^T of 16 positions. The queries are read again each time: held in registers they would
  // be a fifth of all that a thread has.
  static __device__ __forceinline__ void score(const u16* q, const u16* k, u32 row0,
                                               float (&s)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      u32 a[4], m[4];
      load_at(a, q, lane() % 16, step * 2 + lane() / 16);
      load_at(m, k, row0 + lane() % 8 + lane() / 16 * 8, step * 2 + lane() / 8 % 2);
      multiply(s[0], a, m[0], m[1]);
      multiply(s[1], a, m[2], m[3]);
    }
  }

  // The four blocks whose rows the lanes name, 8 lanes for each.
  static __device__ __forceinline__ void load_at(u32 (&m)[4], const u16* rows, u32 row, u32 piece) {
    load_matrices(m, shared_address(rows + row * kHeadDim + swizzle<kHeadDim>(row, piece) * 8));
  }

  // Scores to weights for 16 positions, of which [lo, hi) are visible; p: the weights as rows of A.
  static __device__ __forceinline__ void weigh(State& state, float (&s)[2][4], int lo, int hi,
                                               u32 (&p)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = state.most[half];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int at = n * 8 + (lane() % 4) * 2 + i;
          float& v = s[n][half * 2 + i];
          v = at < lo || at >= hi ? -infinity() : v * scale();
          most = fmaxf(most, v);
        }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      float base = most == -infinity() ? 0 : most, fade = exp2_fast(state.most[half] - base);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& v = s[n][half * 2 + i];
          v = exp2_fast(v - base);
          sum += v;
        }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      state.most[half] = most;
      state.sum[half] = state.sum[half] * fade + sum;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        state.out[d][half * 2] *= fade, state.out[d][half * 2 + 1] *= fade;
      }
    }
    p[0] = pack_bf16(s[0][0], s[0][1]), p[1] = pack_bf16(s[0][2], s[0][3]);
    p[2] = pack_bf16(s[1][0], s[1][1]), p[3] = pack_bf16(s[1][2], s[1][3]);
  }

  static __device__ __forceinline__ void add_values(State& state, const u32 (&p)[4], const u16* v,
                                                    u32 row0) {
    u32 row = row0 + lane() % 16;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      u32 m[4], piece = d * 2 + lane() / 16;
      load_matrices_transposed(
          m, shared_address(v + row * kHeadDim + swizzle<kHeadDim>(row, piece) * 8));
      multiply(state.out[2 * d], p, m[0], m[1]);
      multiply(state.out[2 * d + 1], p, m[2], m[3]);
    }
  }

  static __device__ __forceinline__ void store_state(const State& state, float (*to)[kPitch]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int head = lane() / 4 + half * 8;
      if (head >= kGroup) continue;
      if (lane() % 4 == 0)
        to[head][kHeadDim] = state.most[half], to[head][kHeadDim + 1] = state.sum[half];
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        float* at = to[head] + d * 8 + (lane() % 4) * 2;
        at[0] = state.out[d][half * 2], at[1] = state.out[d][half * 2 + 1];
      }
    }
  }

  // What another warp has found joins this warp's.
  static __device__ __forceinline__ void join(State& state, float (*from)[kPitch]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int head = lane() / 4 + half * 8;
      if (head >= kGroup) continue;
      float other = from[head][kHeadDim], most = fmaxf(state.most[half], other);
      float base = most == -infinity() ? 0 : most;
      float mine = exp2_fast(state.most[half] - base), theirs = exp2_fast(other - base);
      state.most[half] = most;
      state.sum[half] = state.sum[half] * mine + from[head][kHeadDim + 1] * theirs;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& v = state.out[d][half * 2 + i];
          v = v * mine + from[head][d * 8 + (lane() % 4) * 2 + i] * theirs;
        }
    }
  }

  // Warps 4 to 7, if they had pages, give to 0 to 3, and all threads add up those four and the
  // step's own position.
  static __device__ __forceinline__ void merge(State& state, Scratch& scratch, bool both, bool own,
                                               float* y) {
    if (both) {
      if (warp() >= 4) store_state(state, scratch.merged[warp() - 4]);
      sync_consumers();
      if (warp() < 4) join(state, scratch.merged[warp()]);
      __syncwarp();
    }
    if (warp() < 4) store_state(state, scratch.merged[warp()]);
    sync_consumers();
    constexpr int kHeadPairs = kPitch / 2;  // of columns; the last is maximum and sum
    for (int i = thread(); i < kGroup * kHeadPairs; i += kThreads) {
      const int head = i / kHeadPairs, column = i % kHeadPairs * 2;
      const bool last = column == kHeadDim;
      float most = own ? scratch.own[head] : -infinity();
#pragma unroll
      for (int w = 0; w < 4; ++w) most = fmaxf(most, scratch.merged[w][head][kHeadDim]);
      const float base = most == -infinity() ? 0 : most;
      float2 sum = {0, 0};
      if (own) {
        const float weight = exp2_fast(scratch.own[head] - base);
        sum.x = last ? 0 : weight * BF16::widen(scratch.v[column]);
        sum.y = last ? weight : weight * BF16::widen(scratch.v[column + 1]);
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float* part = scratch.merged[w][head];
        const float weight = exp2_fast(part[kHeadDim] - base);
        if (!last) sum.x += weight * part[column];
        sum.y += weight * part[column + 1];
      }
      if (last) sum.x = most / kLog2e;
      store_float2(y + 2 * i, sum);
    }
  }

  static __device__ __forceinline__ void tile(Block& b, const Run& run, const Held& held, u32 index,
                                              Scratch& scratch) {
    const u32 g = index / kSplits, split = index % kSplits;
    if (split > 0 && split >= active(b)) return;  // nobody reads the result
    prepare(b, run, held, g, split, scratch);
    sync_consumers();
    if (split == 0 && warp() >= kWarps / 2) score_own(scratch);
    if (split == 0 && warp() >= kFirstAppender) fence_proxy();  // others will stream what is new
    State state;
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) state.out[d][i] = 0;
    u32 begin, end;
    share(b, split, begin, end);
    const u32 row0 = warp() % 4 * 16, first = begin / kPage;
    for (u32 page = first; page * kPage < end; ++page) {
      const bool mine = (page - first) % 2 == u32(warp() / 4);
      u32 p[4];
      wait_full(b);
      if (mine) {
        float s[2][4];
        score(scratch.q, reinterpret_cast<const u16*>(b.slot()), row0, s);
        int at = int(page * kPage + row0);
        weigh(state, s, int(begin) - at, int(end) - at, p);
      }
      release_slot(b);
      wait_full(b);
      if (mine) add_values(state, p, reinterpret_cast<const u16*>(b.slot()), row0);
      release_slot(b);
    }
    const bool both = end > (first + 1) * kPage;
    merge(state, scratch, both, split == 0, b.at(run.y) + index * kGroup * kPitch);
    sync_consumers();
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    Held held;
    prefetch(b, run, held);
    if (!wait_for_inputs<kTagged>(b, run)) return false;
    Scratch& scratch = *reinterpret_cast<Scratch*>(b.scratch);
    for (u32 i = 0; i < run.count; ++i) tile(b, run, held, run.first + i, scratch);
    if (thread() == 0) signal<false>(b, run);
    return true;
  }
};
