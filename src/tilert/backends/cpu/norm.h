// RMSNorm of one row; see ops/norm.py.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace tilert::TILERT_ISA {

template <typename T>
inline void norm_row(float* y, const float* x, const T* weight, int width, float eps) {
  Vec squares{};
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (int j = i; j < width; j++) total += x[j] * x[j];
  float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
  for (i = 0; i + kLanes <= width; i += kLanes)
    store(y + i, load(x + i) * scale * load(weight + i));
  for (; i < width; i++) y[i] = x[i] * scale * widen(weight[i]);
}

inline void norm(float* y, const float* x, Weight weight, int width, float eps) {
  with_type(weight.data, weight.dtype, [&](auto* p) { norm_row(y, x, p, width, eps); });
}

}  // namespace tilert::TILERT_ISA
