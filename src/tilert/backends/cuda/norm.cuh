// RMSNorm as an op of its own: of what others than one product read, or of one row of several.
#pragma once
#include "linear.cuh"

// A warp takes a row of the output. kOfLast: all of them are the norm of the last row that the
// pass has, for only the first is asked for. run.x: [kTokens, kWidth], run.norm: the weight.
template <int kWidth, bool kOfLast, bool kTagged, class Weight, u32 kEpsBits>
struct Norm {
  static constexpr int kOwn = (kWidth + 31) / 32;
  static constexpr int kBatch = kOwn < 16 ? kOwn : 16;  // loads that are under way together
  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    if (warp() < kTokens) {
      const float* x = b.at(run.x) + (kOfLast ? b.count() - 1 : warp()) * kWidth;
      float* y = b.at(run.y) + warp() * kWidth;
      auto weight = reinterpret_cast<const typename Weight::Bits*>(run.norm);
      float sum = 0;
      each(b, run, x, [&](int, float v) { sum = fmaf(v, v, sum); });
      const float factor = inverse_root(warp_sum(sum) / kWidth + __uint_as_float(kEpsBits));
      each(b, run, x, [&](int at, float v) {
        store_float(y + at, v * factor * Weight::widen(__ldg(weight + at)));
      });
    }
    sync_consumers();
    if (thread() == 0) signal<false>(b, run);
    return true;
  }

 private:
  // A lane's elements of a row.
  template <class Take>
  static __device__ __forceinline__ void each(const Block& b, const Run& run, const float* x,
                                              Take take) {
#pragma unroll 1
    for (int first = 0; first < kOwn; first += kBatch) {
      const float* from[kBatch];
      u32 tag[kBatch];
      float v[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = lane() + 32 * (first + i);
        from[i] = at < kWidth ? x + at : nullptr;
        tag[i] = b.tag(run.x);
      }
      if constexpr (kTagged) {
        load_tagged(b, from, tag, v);
      } else {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) v[i] = from[i] ? load_float(from[i]) : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (from[i]) take(lane() + 32 * (first + i), v[i]);
    }
  }
};
