// How x', the input of a product, is made of what lies in the arena: copied, normed, or merged from
// the shares of attention. Every block makes its own, each thread the elements that it will need.
//
// A Layout says which: kRounds pieces of kWide elements, piece r from offset(r) on, where
// inside(r). Each element belongs to one thread of a group of kRowWarps warps.
#pragma once
#include "tile.cuh"

template <bool kChecked>
struct Plain {
  static constexpr bool kTagged = kChecked;
};
template <bool kChecked, class Type, u32 kEpsBits>
struct Normed {
  static constexpr bool kTagged = kChecked;
};
template <int kSplits, int kGroup, int kHeadDim, int kAttnWindow>
struct Merged {
  static constexpr bool kTagged = false;
};

// Positions [lo, hi) of the past that belong to a share: page_share of ops/attend.py. The first
// active_shares() have some.
__device__ __forceinline__ u32 active_shares(u32 lo, u32 hi, u32 splits) {
  return lo < hi ? min(splits, (hi + kPage - 1) / kPage - lo / kPage) : 0;
}
__device__ __forceinline__ void page_share(u32 lo, u32 hi, u32 split, u32 splits, u32& begin,
                                           u32& end) {
  begin = end = 0;  // no page lies in between
  const u32 active = active_shares(lo, hi, splits);
  if (split >= active) return;
  const u32 first = lo / kPage, pages = (hi + kPage - 1) / kPage - first;
  begin = max(lo, (first + pages * split / active) * kPage);
  end = min(hi, (first + pages * (split + 1) / active) * kPage);
}

__device__ __forceinline__ u32 first_visible(u32 position, u32 window) {
  return window && position + 1 > window ? position + 1 - window : 0;
}

template <class Layout>
struct Inputs {
  static constexpr int kRounds = Layout::kRounds, kWide = Layout::kWide;
  struct X {
    float v[kRounds][kWide];
  };

  // Bits of the norm's weight, fetched while the inputs are awaited.
  template <class Input>
  struct Held {};
  template <bool kTagged, class T, u32 kEps>
  struct Held<Normed<kTagged, T, kEps>> {
    alignas(16) typename T::Bits v[kRounds][kWide];
  };

  template <class Input>
  static __device__ __forceinline__ void prefetch(const Run&, Held<Input>&) {}
  template <bool kTagged, class T, u32 kEps>
  static __device__ __forceinline__ void prefetch(const Run& run,
                                                  Held<Normed<kTagged, T, kEps>>& held) {
    using B = typename T::Bits;
    const B* w = reinterpret_cast<const B*>(run.norm);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (!Layout::inside(r)) continue;
      const B* at = w + Layout::offset(r);
      constexpr int kBytes = kWide * sizeof(B);
      if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i)
          reinterpret_cast<uint4*>(held.v[r])[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
      } else if constexpr (kBytes == 8) {
        reinterpret_cast<uint2*>(held.v[r])[0] = __ldg(reinterpret_cast<const uint2*>(at));
      } else {
#pragma unroll
        for (int i = 0; i < kWide; ++i) held.v[r][i] = __ldg(at + i);
      }
    }
  }

  template <bool kTagged>
  static __device__ __forceinline__ void make(Block& b, const Run& run, Held<Plain<kTagged>>&,
                                              X& x) {
    load<kTagged>(b, run, x);
  }

  template <bool kTagged, class T, u32 kEps>
  static __device__ __forceinline__ void make(Block& b, const Run& run,
                                              Held<Normed<kTagged, T, kEps>>& held, X& x) {
    load<kTagged>(b, run, x);
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
#pragma unroll
      for (int i = 0; i < kWide; ++i) sum += x.v[r][i] * x.v[r][i];
    sum = warp_sum(sum);
    if (lane() == 0) b.shared.squares[warp()] = sum;
    sync_consumers();
    sum = 0;
#pragma unroll
    for (int i = 0; i < Layout::kRowWarps; ++i)
      sum += b.shared.squares[warp() / Layout::kRowWarps * Layout::kRowWarps + i];
    float scale = inverse_root(sum / Layout::kK + __uint_as_float(kEps));
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        x.v[r][i] = Layout::inside(r) ? x.v[r][i] * scale * T::widen(held.v[r][i]) : 0;
  }

  // Adds up the shares of attention that Attend left: merge of ops/attention.py. Shares are taken a
  // few at a time, all loads of those before the first use.
  template <int kSplits, int kGroup, int kHeadDim, int kAttnWindow>
  static __device__ __forceinline__ void make(Block& b, const Run& run,
                                              Held<Merged<kSplits, kGroup, kHeadDim, kAttnWindow>>&,
                                              X& x) {
    static_assert(kHeadDim % kWide == 0, "a piece lies in one head");
    constexpr int kPitch = kHeadDim + 2, kStride = kGroup * kPitch;  // of a head, of a share
    const u32 hi = b.position();
    const int shares = max(1u, active_shares(first_visible(hi, kAttnWindow), hi, kSplits));
    float most[kRounds], sum[kRounds];
    const float* from[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) x.v[r][i] = 0;
      most[r] = -infinity(), sum[r] = 0;
      int at = Layout::inside(r) ? Layout::offset(r) : 0, head = at / kHeadDim;
      from[r] =
          b.at(run.x) + (head / kGroup * kSplits * kGroup + head % kGroup) * kPitch + at % kHeadDim;
    }
    constexpr int kBatch = 2;
    for (int first = 0; first < shares; first += kBatch) {
      float2 top[kBatch][kRounds];  // maximum and sum of a share
      float v[kBatch][kRounds][kWide];
#pragma unroll
      for (int s = 0; s < kBatch; ++s)
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          const bool in = Layout::inside(r) && first + s < shares;
          const float* share = from[r] + (first + s) * kStride;
          const int column = Layout::offset(r) % kHeadDim;
          top[s][r] = load_float2_if(in, share - column + kHeadDim, {-infinity(), 0});
          load_pairs(in, share, v[s][r]);
        }
#pragma unroll
      for (int s = 0; s < kBatch; ++s)
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          const float higher = fmaxf(most[r], top[s][r].x);
          const float base = higher == -infinity() ? 0 : higher;
          const float fade = exp2_fast((most[r] - base) * kLog2e);
          const float weight = exp2_fast((top[s][r].x - base) * kLog2e);
          most[r] = higher;
          sum[r] = sum[r] * fade + weight * top[s][r].y;
#pragma unroll
          for (int i = 0; i < kWide; ++i) x.v[r][i] = x.v[r][i] * fade + weight * v[s][r][i];
        }
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const float inverse = Layout::inside(r) ? 1 / sum[r] : 0;
#pragma unroll
      for (int i = 0; i < kWide; ++i) x.v[r][i] *= inverse;
    }
  }

 private:
  template <bool kTagged>
  static __device__ __forceinline__ void load(const Block& b, const Run& run, X& x) {
    const float* from = b.at(run.x);
    const u32 tag = b.tag(run.x);
    load_once(from, x);
    if constexpr (kTagged) {
      Retry retry;
      while (has_other_tags(x, tag) && !retry.in_vain(b, tag)) load_once(from, x);
#pragma unroll
      for (int r = 0; r < kRounds; ++r)
#pragma unroll
        for (int i = 0; i < kWide; ++i) x.v[r][i] = untagged(x.v[r][i]);
    }
  }

  static __device__ __forceinline__ bool has_other_tags(const X& x, u32 tag) {
    u32 other = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        if (Layout::inside(r)) other |= other_tag(x.v[r][i], tag);
    return other != 0;
  }

  static __device__ __forceinline__ void load_once(const float* from, X& x) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) x.v[r][i] = 0;
      if (!Layout::inside(r)) continue;
      const float* at = from + Layout::offset(r);
      if constexpr (kWide % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kWide; i += 4) {
          float4 v = load_float4(at + i);
          x.v[r][i] = v.x, x.v[r][i + 1] = v.y, x.v[r][i + 2] = v.z, x.v[r][i + 3] = v.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWide; ++i) x.v[r][i] = load_float(at + i);
      }
    }
  }

  static __device__ __forceinline__ void load_pairs(bool in, const float* from,
                                                    float (&to)[kWide]) {
    if constexpr (kWide % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kWide; i += 2) {
        float2 two = load_float2_if(in, from + i, {0, 0});
        to[i] = two.x, to[i + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWide; ++i) to[i] = in ? load_float(from + i) : 0;
    }
  }
};
