// Weights times activations: two regimes.
//
// Up to kFewTokens rows of x, the time is that of reading the weights: each is widened in a
// register and used for all tokens at once. A (row, token) pair has one accumulator whatever the
// number of tokens, so a token's result does not depend on its neighbours. For more tokens the
// weights of a panel of output rows are widened and transposed into scratch, and gemm.h does the
// rest. Block scales multiply the sum of a block, there each weight.
#pragma once
#include <type_traits>

#include "gemm.h"
#include "kernels.h"

namespace tilert::TILERT_ISA {

constexpr int kDepth = 1024;  // longest stretch of k that a panel holds
constexpr int kAhead = 6656;  // bytes that weights are asked for ahead of their use
constexpr int kRegisters = kLanes == 16 ? 16 : 8;  // accumulators that leave room for operands

inline float bias_at(Weight bias, int row) {
  if (!bias.data) return 0.0f;
  return with_type(bias.data, bias.dtype, [&](auto* p) { return widen(p[row]); });
}

inline float silu(float x) { return x / (1.0f + exp(splat(-x))[0]); }

// x in the order in which `times` wants it: for bf16, the even and then the odd elements of each
// two vectors, because the two halves of a 32-bit word widen with one instruction each.
template <typename T>
inline void arrange(float* out, const float* x, int k) {
  int i = 0;
  if constexpr (std::is_same_v<T, Bf16>)
    for (; i + 2 * kLanes <= k; i += 2 * kLanes)
      for (int j = 0; j < kLanes; j++) {
        out[i + j] = x[i + 2 * j];
        out[i + kLanes + j] = x[i + 2 * j + 1];
      }
  for (; i < k; i++) out[i] = x[i];
}

// Two vectors of weights, widened to the order of `arrange`.
template <typename T>
inline void widen_two(const T* p, Vec& first, Vec& second) {
  if constexpr (std::is_same_v<T, Bf16>) {
    UInts pairs = load_as<UInts>(p);
    first = reinterpret_cast<Vec>(pairs << 16);
    second = reinterpret_cast<Vec>(pairs & 0xffff0000u);
  } else {
    first = load(p);
    second = load(p + kLanes);
  }
}

// The scale of row `row` in the block of columns that `col` is in; 1 for weights without scales.
inline float scale_at(const Weight& w, int k, int row, int col) {
  if (!w.scales) return 1.0f;
  int across = (k + w.block_cols - 1) / w.block_cols;
  return w.scales[static_cast<int64_t>(row / w.block_rows) * across + col / w.block_cols];
}

// The scales of `width` columns from `col` on, which may be in several blocks.
inline Vec scales_at(const Weight& w, int k, int row, int col, int width) {
  if (col % w.block_cols + width <= w.block_cols) return splat(scale_at(w, k, row, col));
  Vec v{};
  for (int i = 0; i < width; i++) v[i] = scale_at(w, k, row, col + i);
  return v;
}

// sums[r][t] += x[t][begin..end) * w[r][begin..end) for kR rows of w and kT tokens of arranged x.
template <int kR, int kT, typename T>
inline void accumulate(Vec (&sums)[kR][kT], const T* w, const float* x, int64_t ldx, int k,
                       int begin, int end) {
  int i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    Vec first[kR], second[kR];
    for (int r = 0; r < kR; r++) {
      const T* p = w + static_cast<int64_t>(r) * k + i;
      // Into all levels: asking past the cache (locality 0) halved the rate that was measured.
      for (size_t line = 0; line < 2 * kLanes * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + line, 0, 3);
      widen_two(p, first[r], second[r]);
    }
    for (int t = 0; t < kT; t++) {
      Vec x0 = load(x + t * ldx + i), x1 = load(x + t * ldx + i + kLanes);
      for (int r = 0; r < kR; r++) {
        sums[r][t] += first[r] * x0;
        sums[r][t] += second[r] * x1;
      }
    }
  }
  for (; i < end; i += kLanes) {
    int n = end - i < kLanes ? end - i : kLanes;
    for (int t = 0; t < kT; t++) {
      Vec xs = load_tail(x + t * ldx + i, n);
      for (int r = 0; r < kR; r++)
        sums[r][t] += load_tail(w + static_cast<int64_t>(r) * k + i, n) * xs;
    }
  }
}

// out[r][t] = dot(x[t], w[row + r]) for kR rows and kT tokens of arranged x; T is w's type.
template <int kR, int kT, typename T>
inline void dots(float (&out)[kR][kT], const Weight& w, int row, const float* x, int64_t ldx,
                 int k) {
  const T* p = static_cast<const T*>(w.data) + static_cast<int64_t>(row) * k;
  Vec sums[kR][kT] = {};
  if constexpr (std::is_same_v<T, F8>) {
    for (int begin = 0; begin < k; begin += w.block_cols) {
      Vec part[kR][kT] = {};
      accumulate(part, p, x, ldx, k, begin, k - begin < w.block_cols ? k : begin + w.block_cols);
      for (int r = 0; r < kR; r++) {
        Vec scale = splat(scale_at(w, k, row + r, begin));
        for (int t = 0; t < kT; t++) sums[r][t] += part[r][t] * scale;
      }
    }
  } else {
    accumulate(sums, p, x, ldx, k, 0, k);
  }
  for (int r = 0; r < kR; r++)
    for (int t = 0; t < kT; t++) out[r][t] = sum(sums[r][t]);
}

// Rows [row, row + kR) of the op for kT tokens, epilogue included; x [kT, k] is arranged.
template <int kR, int kT, typename T>
inline void few_rows(const LinearArgs& args, const float* x, int row) {
  float out[kR][kT], ups[kR][kT];
  dots<kR, kT, T>(out, args.w, row, x, args.k, args.k);
  if (args.w_up.data) dots<kR, kT, T>(ups, args.w_up, row, x, args.k, args.k);
  for (int r = 0; r < kR; r++) {
    float bias = bias_at(args.bias, row + r), bias_up = bias_at(args.bias_up, row + r);
    for (int t = 0; t < kT; t++) {
      const int64_t at = t * args.ldy + row + r;
      float value = out[r][t] + bias;
      if (args.epilogue == 1) value += args.old[at];
      if (args.epilogue == 2) value = silu(value) * (ups[r][t] + bias_up);
      args.y[at] = value;
    }
  }
}

template <int kT>
inline void few_tokens(const LinearArgs& args, int begin, int end, float* x) {
  constexpr int kR = 2 * kT <= kRegisters ? 2 : 1;  // more rows at once measured slower
  with_type(args.w.data, args.w.dtype, [&](auto* w) {
    using T = std::remove_cvref_t<decltype(*w)>;
    for (int t = 0; t < kT; t++)
      arrange<T>(x + static_cast<int64_t>(t) * args.k, args.x + t * args.ldx, args.k);
    int row = begin;
    for (; row + kR <= end; row += kR) few_rows<kR, kT, T>(args, x, row);
    for (; row < end; row++) few_rows<1, kT, T>(args, x, row);
  });
}

// Transposes kLanes x kLanes values: in stage s, lanes whose bit s differs from their row's change
// place.
template <int kS = 1>
inline void transpose(Vec (&v)[kLanes]) {
  if constexpr (kS < kLanes) {
    constexpr auto lanes = std::make_index_sequence<kLanes>();
    for (int i = 0; i < kLanes; i++) {
      if (i & kS) continue;
      Vec a = v[i], b = v[i + kS];
      v[i] = [&]<size_t... kI>(std::index_sequence<kI...>) {
        return __builtin_shufflevector(a, b, (kI & kS ? kLanes + kI - kS : kI)...);
      }(lanes);
      v[i + kS] = [&]<size_t... kI>(std::index_sequence<kI...>) {
        return __builtin_shufflevector(a, b, (kI & kS ? kLanes + kI : kI + kS)...);
      }(lanes);
    }
    transpose<2 * kS>(v);
  }
}

// panel[i][r] = w[row + r][from + i] for i < depth, r < kPanel; rows beyond `end` become zeros.
template <typename T>
inline void pack(float* panel, const Weight& w, int k, int row, int end, int from, int depth) {
  for (int r0 = 0; r0 < kPanel; r0 += kLanes) {
    const T* p = static_cast<const T*>(w.data) + static_cast<int64_t>(row + r0) * k + from;
    int live = end - row - r0 < kLanes ? (end - row - r0 > 0 ? end - row - r0 : 0) : kLanes;
    for (int i = 0; i < depth; i += kLanes) {
      int width = depth - i < kLanes ? depth - i : kLanes;
      Vec v[kLanes] = {};
      for (int r = 0; r < live; r++) {
        const T* q = p + static_cast<int64_t>(r) * k + i;
        v[r] = width == kLanes ? load(q) : load_tail(q, width);
        if constexpr (std::is_same_v<T, F8>) v[r] *= scales_at(w, k, row + r0 + r, from + i, width);
      }
      transpose(v);
      for (int j = 0; j < width; j++) store(panel + (i + j) * kPanel + r0, v[j]);
    }
  }
}

// out [tokens, kPanel] = x @ w[row .. row + kPanel].T
inline void panel_product(float* out, Weight w, const LinearArgs& args, int tokens, int row,
                          int end, float* panel) {
  for (int from = 0; from < args.k; from += kDepth) {
    int depth = args.k - from < kDepth ? args.k - from : kDepth;
    with_type(w.data, w.dtype, [&](auto* p) {
      pack<std::remove_cvref_t<decltype(*p)>>(panel, w, args.k, row, end, from, depth);
    });
    gemm({args.x + from, args.ldx, panel, kPanel, out, kPanel, depth, from > 0}, tokens, kPanel);
  }
}

inline size_t many_scratch(int k, int tokens) {
  int depth = k < kDepth ? k : kDepth;
  return static_cast<size_t>(kPanel) * (depth + 2 * static_cast<size_t>(tokens));
}

inline size_t linear_scratch(int k, int tokens) {
  return tokens <= kFewTokens ? static_cast<size_t>(tokens) * k : many_scratch(k, tokens);
}

// y[t, row .. ) = epilogue of one panel's sums; `up` null unless gated.
inline void finish_panel(const LinearArgs& args, const float* out, const float* up, int tokens,
                         int row, int width) {
  float bias[kPanel] = {}, bias_up[kPanel] = {};
  for (int r = 0; r < width; r++) {
    bias[r] = bias_at(args.bias, row + r);
    bias_up[r] = bias_at(args.bias_up, row + r);
  }
  for (int t = 0; t < tokens; t++) {
    float* y = args.y + t * args.ldy + row;
    for (int r = 0; r < width; r += kLanes) {
      Vec value = load(out + t * kPanel + r) + load(bias + r);
      int n = width - r < kLanes ? width - r : kLanes;
      if (args.epilogue == 1) {
        const float* old = args.old + t * args.ldy + row + r;
        value += n == kLanes ? load(old) : load_tail(old, n);
      }
      if (args.epilogue == 2)
        value = value / (1.0f + exp(-value)) * (load(up + t * kPanel + r) + load(bias_up + r));
      n == kLanes ? store(y + r, value) : store_tail(y + r, value, n);
    }
  }
}

inline void many_tokens(const LinearArgs& args, int tokens, int begin, int end, float* scratch) {
  float* out = scratch;
  float* up = out + static_cast<size_t>(tokens) * kPanel;
  float* panel = up + static_cast<size_t>(tokens) * kPanel;
  for (int row = begin; row < end; row += kPanel) {
    panel_product(out, args.w, args, tokens, row, end, panel);
    if (args.w_up.data) panel_product(up, args.w_up, args, tokens, row, end, panel);
    finish_panel(args, out, up, tokens, row, end - row < kPanel ? end - row : kPanel);
  }
}

inline void linear(const LinearArgs& args, int tokens, int begin, int end, float* scratch) {
  switch (tokens) {
    case 0:
      return;
    case 1:
      return few_tokens<1>(args, begin, end, scratch);
    case 2:
      return few_tokens<2>(args, begin, end, scratch);
    case 3:
      return few_tokens<3>(args, begin, end, scratch);
    case 4:
      return few_tokens<4>(args, begin, end, scratch);
    case 5:
      return few_tokens<5>(args, begin, end, scratch);
    case 6:
      return few_tokens<6>(args, begin, end, scratch);
    case 7:
      return few_tokens<7>(args, begin, end, scratch);
    case 8:
      return few_tokens<8>(args, begin, end, scratch);
    default:
      return many_tokens(args, tokens, begin, end, scratch);
  }
}

}  // namespace tilert::TILERT_ISA
