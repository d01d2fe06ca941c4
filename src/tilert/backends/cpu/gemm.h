// c[m, n] (+)= a[m, k] @ b[k, n] with b read along its rows: the product under prompts and
// attention.
//
// A block of kRows x (2 vectors) of c stays in registers; a is broadcast, b is loaded.
#pragma once
#include "vec.h"

namespace tilert::TILERT_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 12;  // 24 accumulators, 2 of b, 1 of a: of 32 registers
#else
constexpr int kRows = 6;  // 12 accumulators, 2 of b, 1 of a: of 16 registers
#endif
constexpr int kPanel = 2 * kLanes;  // columns of a block

struct Product {
  const float* a;  // [m, k], rows lda apart
  int64_t lda;
  const float* b;  // [k, n], rows ldb apart
  int64_t ldb;
  float* c;  // [m, n], rows ldc apart
  int64_t ldc;
  int k;
  bool add;  // to what c holds
};

template <int kM, int kVecs>
inline void block(const Product& p, int row, int col) {
  const float* a = p.a + row * p.lda;
  const float* b = p.b + col;
  float* c = p.c + row * p.ldc + col;
  Vec sums[kM][kVecs];
  for (int m = 0; m < kM; m++)
    for (int v = 0; v < kVecs; v++) sums[m][v] = p.add ? load(c + m * p.ldc + v * kLanes) : Vec{};
  for (int i = 0; i < p.k; i++) {
    Vec bs[kVecs];
    for (int v = 0; v < kVecs; v++) bs[v] = load(b + i * p.ldb + v * kLanes);
    for (int m = 0; m < kM; m++) {
      Vec x = splat(a[m * p.lda + i]);
      for (int v = 0; v < kVecs; v++) sums[m][v] += x * bs[v];
    }
  }
  for (int m = 0; m < kM; m++)
    for (int v = 0; v < kVecs; v++) store(c + m * p.ldc + v * kLanes, sums[m][v]);
}

// Rows [row, row + m) of one column block, m <= kRows.
template <int kVecs, int kM = kRows>
inline void rows(const Product& p, int m, int row, int col) {
  if (m == kM) return block<kM, kVecs>(p, row, col);
  if constexpr (kM > 1) rows<kVecs, kM - 1>(p, m, row, col);
}

// Columns that fill no vector. A part of a vector, not a loop over floats: a compiler splits that
// one by k into a stretch that rounds products and a rest that does not, and the result would
// depend on k even where what is added is zero, as it is for positions that a token does not see.
inline void last_columns(const Product& p, int m, int col, int n) {
  for (int r = 0; r < m; r++) {
    float* c = p.c + r * p.ldc + col;
    Vec sums = p.add ? load_tail(c, n) : Vec{};
    for (int i = 0; i < p.k; i++)
      sums += splat(p.a[r * p.lda + i]) * load_tail(p.b + i * p.ldb + col, n);
    store_tail(c, sums, n);
  }
}

inline void gemm(const Product& p, int m, int n) {
  int col = 0;
  for (; col + kPanel <= n; col += kPanel)
    for (int row = 0; row < m; row += kRows)
      rows<2>(p, m - row < kRows ? m - row : kRows, row, col);
  for (; col + kLanes <= n; col += kLanes)
    for (int row = 0; row < m; row += kRows)
      rows<1>(p, m - row < kRows ? m - row : kRows, row, col);
  if (col < n) last_columns(p, m, col, n - col);
}

}  // namespace tilert::TILERT_ISA
