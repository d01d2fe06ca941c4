// Attention of many query heads over one row per position, and the indexer that selects positions;
// see ops/mla.py and ops/index.py.
//
// Rows of the cache are used where they lie, through pointers: selected positions are anywhere, and
// the same row is key and value. Up to kPage rows are taken at a time, with a running maximum.
#pragma once
#include <algorithm>
#include <cfloat>

#include "attention.h"
#include "kernels.h"

namespace tilert::TILERT_ISA {

constexpr int kHeadsAtOnce = kLanes == 16 ? 4 : 2;  // with 4 rows: accumulators of a block

// out[j * ldo + s] = dot(q[j], rows[s]) for kJ queries and kS rows of `width`. Each sum has one
// accumulator, so its order does not depend on kJ and kS.
template <int kJ, int kS>
inline void cross(float* out, int64_t ldo, const float* q, int64_t ldq, const float* const* rows,
                  int width) {
  Vec sums[kJ][kS] = {};
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Vec qs[kJ];
    for (int j = 0; j < kJ; j++) qs[j] = load(q + j * ldq + i);
    for (int s = 0; s < kS; s++) {
      Vec row = load(rows[s] + i);
      for (int j = 0; j < kJ; j++) sums[j][s] += qs[j] * row;
    }
  }
  if (i < width)
    for (int s = 0; s < kS; s++) {
      Vec row = load_tail(rows[s] + i, width - i);
      for (int j = 0; j < kJ; j++) sums[j][s] += load_tail(q + j * ldq + i, width - i) * row;
    }
  for (int j = 0; j < kJ; j++)
    for (int s = 0; s < kS; s++) out[j * ldo + s] = sum(sums[j][s]);
}

template <int kJ>
inline void cross_rows(float* out, int64_t ldo, const float* q, int64_t ldq,
                       const float* const* rows, int n, int width) {
  int s = 0;
  for (; s + 4 <= n; s += 4) cross<kJ, 4>(out + s, ldo, q, ldq, rows + s, width);
  for (; s < n; s++) cross<kJ, 1>(out + s, ldo, q, ldq, rows + s, width);
}

// out [m, ldo] = q [m, ldq] times n rows.
inline void cross_all(float* out, int64_t ldo, const float* q, int64_t ldq, int m,
                      const float* const* rows, int n, int width) {
  int j = 0;
  for (; j + kHeadsAtOnce <= m; j += kHeadsAtOnce)
    cross_rows<kHeadsAtOnce>(out + j * ldo, ldo, q + j * ldq, ldq, rows, n, width);
  for (; j < m; j++) cross_rows<1>(out + j * ldo, ldo, q + j * ldq, ldq, rows, n, width);
}

// A block of kM x kVecs vectors of out += weights [m, kPage] times the first columns of n rows.
template <int kM, int kVecs>
inline void mix_block(float* out, int64_t ldo, const float* weights, const float* const* rows,
                      int n, int col) {
  Vec sums[kM][kVecs];
  for (int m = 0; m < kM; m++)
    for (int v = 0; v < kVecs; v++) sums[m][v] = load(out + m * ldo + col + v * kLanes);
  for (int s = 0; s < n; s++) {
    Vec values[kVecs];
    for (int v = 0; v < kVecs; v++) values[v] = load(rows[s] + col + v * kLanes);
    for (int m = 0; m < kM; m++) {
      Vec weight = splat(weights[m * kPage + s]);
      for (int v = 0; v < kVecs; v++) sums[m][v] += weight * values[v];
    }
  }
  for (int m = 0; m < kM; m++)
    for (int v = 0; v < kVecs; v++) store(out + m * ldo + col + v * kLanes, sums[m][v]);
}

template <int kM>
inline void mix_rows(float* out, int64_t ldo, const float* weights, const float* const* rows, int n,
                     int width) {
  int col = 0;
  for (; col + kPanel <= width; col += kPanel) mix_block<kM, 2>(out, ldo, weights, rows, n, col);
  for (; col + kLanes <= width; col += kLanes) mix_block<kM, 1>(out, ldo, weights, rows, n, col);
  if (col == width) return;
  for (int m = 0; m < kM; m++) {
    Vec sums = load_tail(out + m * ldo + col, width - col);
    for (int s = 0; s < n; s++)
      sums += splat(weights[m * kPage + s]) * load_tail(rows[s] + col, width - col);
    store_tail(out + m * ldo + col, sums, width - col);
  }
}

// The same for m <= kM queries.
template <int kM = kRows>
inline void mix(float* out, int64_t ldo, const float* weights, int m, const float* const* rows,
                int n, int width) {
  if (m == kM) return mix_rows<kM>(out, ldo, weights, rows, n, width);
  if constexpr (kM > 1) mix<kM - 1>(out, ldo, weights, m, rows, n, width);
}

inline size_t latent_scratch(int heads, int lora, int rope) {
  return AttentionScratch::floats(heads, lora + rope, lora);
}

inline AttentionScratch latent_state(const LatentArgs& args, float* scratch) {
  return {scratch, args.heads, args.lora + args.rope, args.lora};
}

// Rounded to bf16, to the nearest and of two to the even one; NaNs here have no low bits that
// carry.
inline Vec rounded_to_bf16(Vec v) {
  auto bits = reinterpret_cast<UInts>(v);
  return reinterpret_cast<Vec>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}
inline float rounded_to_bf16(float v) { return rounded_to_bf16(splat(v))[0]; }

// The nearest e4m3, of two the even one; what is too large becomes the largest, 448.
inline uint8_t e4m3_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  float magnitude;
  std::memcpy(&magnitude, &size, 4);
  if (magnitude != magnitude) return sign | 0x7f;
  if (magnitude >= 448.0f) return sign | 0x7e;
  if (magnitude < 0x1p-6f) {  // subnormal: multiples of 2^-9, the last place of 2^14
    float sum = magnitude + 0x1p14f;
    std::memcpy(&bits, &sum, 4);
    return sign | (bits & 15u);
  }
  return sign | ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (127 - 7) * 8;
}

inline void latent_pack(char* row, const float* x, const PackedRow& layout) {
  std::memset(row + layout.lora, 0, layout.key() - layout.lora);
  for (int tile = 0; tile < layout.scales(); tile++) {
    const int first = tile * PackedRow::kScaleCols;
    const int end = std::min(first + PackedRow::kScaleCols, layout.lora);
    float most = 0.0f;
    for (int i = first; i < end; i++) most = std::max(most, std::abs(x[i]));
    const float scale = std::max(most / 448.0f, FLT_MIN);
    for (int i = first; i < end; i++) row[i] = static_cast<char>(e4m3_of(x[i] / scale));
    std::memcpy(row + layout.lora + tile * 4, &scale, 4);
  }
  for (int i = 0; i < layout.rope; i++) {
    const float v = rounded_to_bf16(x[layout.lora + i]);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const auto half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(row + layout.key() + 2 * i, &half, 2);
  }
}

inline void latent_unpack(float* x, const char* row, const PackedRow& layout) {
  const auto* latents = reinterpret_cast<const F8*>(row);
  for (int tile = 0; tile < layout.scales(); tile++) {
    float scale;
    std::memcpy(&scale, row + layout.lora + tile * 4, 4);
    int i = tile * PackedRow::kScaleCols;
    const int end = std::min(i + PackedRow::kScaleCols, layout.lora);
    for (; i + kLanes <= end; i += kLanes) store(x + i, rounded_to_bf16(load(latents + i) * scale));
    if (i < end)
      store_tail(x + i, rounded_to_bf16(load_tail(latents + i, end - i) * scale), end - i);
  }
  for (int i = 0; i < layout.rope; i++) {
    Bf16 v;
    std::memcpy(&v, row + layout.key() + 2 * i, 2);
    x[layout.lora + i] = widen(v);
  }
}

// Scaled queries, latent and rotated part side by side as rows of the cache are.
inline void latent_begin(const LatentArgs& args, float* scratch) {
  AttentionScratch s = latent_state(args, scratch);
  for (int j = 0; j < args.heads; j++) {
    float* q = s.q + static_cast<int64_t>(j) * (args.lora + args.rope);
    const float* latent = args.q + static_cast<int64_t>(j) * args.lora;
    const float* rotated = args.q_rope + j * args.ldq;
    const auto element = [&](float v) {
      return (args.rounded ? rounded_to_bf16(v) : v) * args.scale;
    };
    for (int i = 0; i < args.lora; i++) q[i] = element(latent[i]);
    for (int i = 0; i < args.rope; i++) q[args.lora + i] = element(rotated[i]);
    for (int i = 0; i < args.lora; i++) s.out[static_cast<int64_t>(j) * args.lora + i] = 0.0f;
    s.top[j] = -INFINITY;
    s.total[j] = 0.0f;
  }
}

inline void latent_rows(const LatentArgs& args, const float* const* rows, int n, float* scratch) {
  AttentionScratch s = latent_state(args, scratch);
  const int width = args.lora + args.rope;
  cross_all(s.scores, kPage, s.q, width, args.heads, rows, n, width);
  for (int j = 0; j < args.heads; j++) soften(s, j, 0, n, args.lora);
  for (int j = 0; j < args.heads; j += kRows)
    mix(s.out + static_cast<int64_t>(j) * args.lora, args.lora, s.scores + j * kPage,
        args.heads - j < kRows ? args.heads - j : kRows, rows, n, args.lora);
}

inline void latent_end(const LatentArgs& args, float* y, int64_t ldy, bool partial,
                       float* scratch) {
  AttentionScratch s = latent_state(args, scratch);
  for (int j = 0; j < args.heads; j++) {
    const float* out = s.out + static_cast<int64_t>(j) * args.lora;
    float* to = y + j * ldy;
    const float divisor = partial ? 1.0f : s.total[j];
    for (int i = 0; i < args.lora; i++) to[i] = out[i] / divisor;
    if (!partial) continue;
    to[args.lora] = s.top[j];
    to[args.lora + 1] = s.total[j];
  }
}

// y = (x - mean) / sqrt(variance + eps) * weight + shift, for one row.
inline void layer_norm(float* y, const float* x, const float* weight, const float* shift, int width,
                       float eps) {
  float total = 0.0f, squares = 0.0f;
  for (int i = 0; i < width; i++) total += x[i];
  const float mean = total / static_cast<float>(width);
  for (int i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  for (int i = 0; i < width; i++) y[i] = (x[i] - mean) * scale * weight[i] + shift[i];
}

// x times the Hadamard matrix of its width, a power of two, over the root of the width.
inline void hadamard(float* x, int width) {
  for (int step = 1; step < width; step *= 2)
    for (int i = 0; i < width; i += 2 * step)
      for (int j = i; j < i + step; j++) {
        float first = x[j], second = x[j + step];
        x[j] = first + second;
        x[j + step] = first - second;
      }
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  for (int i = 0; i < width; i++) x[i] *= scale;
}

// y[s] = scale * sum over heads of weights[h] * max(0, dot(q[h], keys[s])) for n <= kPage keys that
// follow each other. scratch: heads * kPage floats.
inline void index_scores(float* y, const float* q, const float* weights, const float* keys,
                         int heads, int dim, int n, float scale, float* scratch) {
  const float* rows[kPage];
  for (int s = 0; s < n; s++) rows[s] = keys + static_cast<int64_t>(s) * dim;
  cross_all(scratch, kPage, q, dim, heads, rows, n, dim);
  for (int s = 0; s < n; s++) y[s] = 0.0f;
  for (int h = 0; h < heads; h++)
    for (int s = 0; s < n; s++) {
      const float dot = scratch[h * kPage + s];
      y[s] += weights[h] * (dot > 0.0f ? dot : 0.0f);
    }
  for (int s = 0; s < n; s++) y[s] *= scale;
}

}  // namespace tilert::TILERT_ISA
