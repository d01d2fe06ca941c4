// How past positions are dealt out to the shares of attention, and how the shares are merged.
#pragma once
#include "tile.cuh"

// Pages of the positions [lo, hi) are dealt out to the splits in rounds: page_share of
// ops/attend.py. Only the first active_shares() can have some.
__device__ __forceinline__ u32 active_shares(u32 lo, u32 hi, u32 splits) {
  if (lo >= hi) return 0;
  return lo < kPage ? min(splits, (hi + kPage - 1) / kPage) : splits;
}
__device__ __forceinline__ u32 page_of(u32 round, u32 split, u32 splits) {
  return round * splits + (split + splits - round % splits) % splits;
}
__device__ __forceinline__ u32 split_of(u32 page, u32 splits) {
  return (page + page / splits) % splits;
}
__device__ __forceinline__ u32 first_visible(u32 position, u32 window) {
  return window && position + 1 > window ? position + 1 - window : 0;
}

// The number of shares, from the first on, that hold something of a token; kAll: always all do.
template <int kAttnWindow>
struct PastPages {  // of Attend: the positions before the token's own, which the first share has
  static constexpr bool kAll = false;
  static __device__ __forceinline__ int count(const Block& b, u32 token, int splits) {
    const u32 hi = b.position(token);
    return max(1u, active_shares(first_visible(hi, kAttnWindow), hi, splits));
  }
};
struct SeenPages {  // of LatentAttention: all positions up to the token's own
  static constexpr bool kAll = false;
  static __device__ __forceinline__ int count(const Block& b, u32 token, int splits) {
    return active_shares(0, b.position(token) + 1, splits);
  }
};
struct EveryShare {  // of LatentAttention over chosen positions: empty shares say so
  static constexpr bool kAll = true;
  static __device__ __forceinline__ int count(const Block&, u32, int splits) { return splits; }
};

// Merges the shares that attention left; tile (t * kHeads + h) * kParts + p: part p of the columns
// of query head h of token t, so that tiles follow each other as columns of y do. Of more than
// eight shares each warp takes some, and they add up what they have found. Rows without a token get
// zeros, so that their tags are there.
template <int kHeads, int kGroup, int kHeadDim, int kParts, int kSplits, class Active, bool kTagsIn,
          bool kTagged, bool kNarrow>
struct Combine {
  static constexpr bool kShared = kSplits > 8;
  static constexpr u32 kAtOnce = kShared ? (kSplits + kWarps - 1) / kWarps : kSplits;
  static constexpr u32 kPairs = kHeadDim / kParts / 2;  // of columns, in a tile
  static constexpr u32 kRound = kShared ? 32 : kThreads;
  static constexpr int kPitch = kHeadDim + 2, kStride = kGroup * kPitch;  // of a head, of a share
  static_assert(kHeadDim % (2 * kParts) == 0, "a tile has pairs of columns");

  // What some shares add up to: their highest score, the sum of weights, two columns of values.
  struct Sum {
    float most = -infinity(), weight = 0;
    float2 v = {0, 0};
  };
  struct Scratch {
    float4 sums[2][kWarps][32];
  };
  static_assert(!kShared || sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<kTagsIn>(b, run)) return false;
    const u32 end = (run.first + run.count) * kPairs;
    u32 turn = 0;
#pragma unroll 1
    for (u32 first = run.first * kPairs; first < end; first += kRound, turn ^= 1) {
      const u32 pair = first + (kShared ? lane() : thread());
      Sum sum;
      if (pair < end) sum = of_shares(b, run, pair * 2);
      if constexpr (kShared) {
        auto& sums = reinterpret_cast<Scratch*>(b.scratch)->sums[turn];
        sums[warp()][lane()] = {sum.most, sum.weight, sum.v.x, sum.v.y};
        sync_consumers();
        if (warp() == 0) sum = of_warps(sums);
      }
      if (pair < end && (!kShared || warp() == 0)) store(b, run, pair * 2, sum);
    }
    sync_consumers();
    if (thread() == 0) signal<kTagged>(b, run);
    return true;
  }

 private:
  // Shares with their highest scores, sums of weights and values.
  template <u32 kCount>
  static __device__ __forceinline__ Sum added(const float2 (&top)[kCount],
                                              const float2 (&v)[kCount]) {
    Sum sum;
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) sum.most = fmaxf(sum.most, top[i].x);
    const float base = sum.most == -infinity() ? 0 : sum.most;
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) {
      const float weight = exp2_fast((top[i].x - base) * kLog2e);
      sum.weight = fmaf(weight, top[i].y, sum.weight);
      sum.v.x = fmaf(weight, v[i].x, sum.v.x), sum.v.y = fmaf(weight, v[i].y, sum.v.y);
    }
    return sum;
  }

  // The warp's shares of a token's head; column: of y, all rows one after another. All loads are
  // under way at once; again while tags say that some are late.
  static __device__ __forceinline__ Sum of_shares(const Block& b, const Run& run, u32 column) {
    const u32 head = column / kHeadDim, token = head / kHeads;  // head: of all tokens
    float2 top[kAtOnce], v[kAtOnce];
    if (token >= b.count()) return {};
    const u32 from = kShared ? warp() * kAtOnce : 0;
    const u32 shares = Active::count(b, token, kSplits);
    const auto given = [&](u32 i) {
      constexpr bool kWhole = Active::kAll && (!kShared || kSplits % kWarps == 0);
      return kWhole || from + i < shares;
    };
    const float* first =
        b.at(run.x) + (head / kGroup * kSplits * kGroup + head % kGroup + from * kGroup) * kPitch;
    const u32 tag = b.tag(run.x);
    Retry retry;
    for (u32 other = 1; other;) {
      other = 0;
#pragma unroll
      for (u32 i = 0; i < kAtOnce; ++i) {
        const float* share = first + i * kStride;
        top[i] = load_float2_if(given(i), share + kHeadDim, {-infinity(), 0});
        v[i] = load_float2_if(given(i), share + column % kHeadDim, {0, 0});
      }
      if constexpr (!kTagsIn) break;
#pragma unroll
      for (u32 i = 0; i < kAtOnce; ++i) {
        const u32 late = other_tag(top[i].x, tag) | other_tag(top[i].y, tag) |
                         other_tag(v[i].x, tag) | other_tag(v[i].y, tag);
        if (!given(i)) continue;
        other |= late;
        top[i] = {untagged(top[i].x), untagged(top[i].y)};
        v[i] = {untagged(v[i].x), untagged(v[i].y)};
      }
      if (other && retry.in_vain(b, tag)) break;
    }
    return added(top, v);
  }

  static __device__ __forceinline__ Sum of_warps(const float4 (&sums)[kWarps][32]) {
    float2 top[kWarps], v[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 sum = sums[w][lane()];
      top[w] = {sum.x, sum.y}, v[w] = {sum.z, sum.w};
    }
    return added(top, v);
  }

  static __device__ __forceinline__ void store(const Block& b, const Run& run, u32 column,
                                               const Sum& sum) {
    const bool given = column / (kHeads * kHeadDim) < b.count();
    const float inverse = given ? reciprocal(sum.weight) : 0;
    store_output<kTagged, kNarrow>(b.at(run.y), column, rounded_for_tag(sum.v.x * inverse),
                                   b.tag(run.y));
    store_output<kTagged, kNarrow>(b.at(run.y), column + 1, rounded_for_tag(sum.v.y * inverse),
                                   b.tag(run.y));
  }
};
