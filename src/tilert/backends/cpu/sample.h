// The largest logit, and rows of the embedding table.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace tilert::TILERT_ISA {

inline int argmax(const float* x, int n) {
  Vec tops = splat(-INFINITY);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) tops = max(tops, load(x + i));
  float top = -INFINITY;
  for (int lane = 0; lane < kLanes; lane++) top = tops[lane] > top ? tops[lane] : top;
  for (; i < n; i++) top = x[i] > top ? x[i] : top;
  for (int j = 0; j < n; j++)
    if (x[j] == top) return j;
  return 0;  // only NaN
}

inline void embed(float* y, Weight table, int64_t row, int width) {
  with_type(table.data, table.dtype, [&](auto* p) {
    for (int i = 0; i < width; i++) y[i] = widen(p[row * width + i]);
  });
}

// Four lines at a time, so that the loads and not the additions decide.
inline uint64_t read(const void* data, size_t bytes) {
  const auto* p = static_cast<const float*>(data);
  size_t n = bytes / sizeof(float), i = 0;
  UInts sums[4] = {};
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int v = 0; v < 4; v++) {
      __builtin_prefetch(p + i + v * kLanes + 512, 0, 3);
      sums[v] += load_as<UInts>(p + i + v * kLanes);
    }
  UInts all = sums[0] + sums[1] + sums[2] + sums[3];
  uint64_t total = 0;
  for (int lane = 0; lane < kLanes; lane++) total += all[lane];
  return total;
}

}  // namespace tilert::TILERT_ISA
