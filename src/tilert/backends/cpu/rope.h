// Half-split rotary embedding of one head, normed before where the model asks for it; see
// ops/rope.py.
#pragma once
#include "norm.h"

namespace tilert::TILERT_ISA {

// out may be x. cos_sin [head_dim]: cosines, then sines, of head_dim / 2 angles.
inline void rope(float* out, const float* x, Weight weight, float eps, const float* cos_sin,
                 int head_dim) {
  if (weight.data) {
    norm(out, x, weight, head_dim, eps);
    x = out;
  }
  int half = head_dim / 2;
  for (int i = 0; i < half; i++) {
    float first = x[i], second = x[half + i], cos = cos_sin[i], sin = cos_sin[half + i];
    out[i] = first * cos - second * sin;
    out[half + i] = second * cos + first * sin;
  }
}

}  // namespace tilert::TILERT_ISA
