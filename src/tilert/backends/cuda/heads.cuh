// Heads of attention as the products left them: normed where there is a norm, rotated, and stored
// as the matrix units like to read them.
#pragma once
#include "linear.cuh"

template <int kHeadDim>
__device__ __forceinline__ u32 swizzle(u32 row, u32 piece) {
  constexpr u32 kPieces = kHeadDim / 8;
  constexpr u32 kMask = kPieces % 8 == 0 ? 7 : kPieces % 4 == 0 ? 3 : kPieces % 2 == 0 ? 1 : 0;
  return piece ^ (row & kMask);
}

// Elements l + 32 i of both halves of a head are lane l's: v[2 i] and v[2 i + 1].
template <int kHeadDim>
struct Head {
  static constexpr int kPairs = (kHeadDim / 2 + 31) / 32;
  static constexpr u32 kPageBytes = kPage * kHeadDim * 2;
  using Values = float[2 * kPairs];

  template <class Norm>
  static __device__ __forceinline__ void fetch_norm(const u8* norm, Values& to) {
    if constexpr (Norm::kGiven) {
      auto w = reinterpret_cast<const typename Norm::Bits*>(norm);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int e = min(lane() + 32 * i, kHeadDim / 2 - 1);
        to[2 * i] = Norm::widen(__ldg(w + e));
        to[2 * i + 1] = Norm::widen(__ldg(w + kHeadDim / 2 + e));
      }
    }
  }

  static __device__ __forceinline__ void take(const float* head, Values& v) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int e = lane() + 32 * i;
      v[2 * i] = e < kHeadDim / 2 ? head[e] : 0;
      v[2 * i + 1] = e < kHeadDim / 2 ? head[kHeadDim / 2 + e] : 0;
    }
  }

  template <class Norm, u32 kEpsBits>
  static __device__ __forceinline__ void turn(const Values& angle, const Values& norm, Values& v) {
    float sum = 0, factor = 1;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) sum = fmaf(v[i], v[i], sum);
    if constexpr (Norm::kGiven)
      factor = inverse_root(warp_sum(sum) / kHeadDim + __uint_as_float(kEpsBits));
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float a = v[2 * i], c = v[2 * i + 1];
      if constexpr (Norm::kGiven) a *= factor * norm[2 * i], c *= factor * norm[2 * i + 1];
      v[2 * i] = fmaf(a, angle[2 * i], -(c * angle[2 * i + 1]));
      v[2 * i + 1] = fmaf(c, angle[2 * i], a * angle[2 * i + 1]);
    }
  }

  static __device__ __forceinline__ void put(u16* rows, u32 row, const Values& v) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const u32 e = lane() + 32 * i;
      if (e >= kHeadDim / 2) continue;
      put(rows, row, e, v[2 * i]), put(rows, row, kHeadDim / 2 + e, v[2 * i + 1]);
    }
  }

  // Where a page of kv head g lies in a cache.
  template <int kKvHeads>
  static __device__ __forceinline__ u64 page_at(const Block& b, u32 token, u32 page, u32 g) {
    const u32* table = b.params.pages + b.params.sequences[token] * b.params.page_cols;
    return (u64(__ldg(table + page)) * kKvHeads + g) * kPageBytes;
  }

 private:
  static __device__ __forceinline__ void put(u16* rows, u32 row, u32 e, float v) {
    rows[row * kHeadDim + swizzle<kHeadDim>(row, e / 8) * 8 + e % 8] = u16(pack_bf16(v, 0));
  }
};
