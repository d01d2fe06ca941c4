// Softmax attention over pages, one page at a time with a running maximum; see ops/attention.py.
//
// The rows of a product are (token, query head) pairs of one kv head: all of them use the page
// while it is in the cache. Within a page keys are [head_dim, 64], so that scores of 64 positions
// form along vectors, and values [64, head_dim], so that outputs do.
#pragma once
#include "gemm.h"
#include "kernels.h"

namespace tilert::TILERT_ISA {

// Scratch of `m` rows: scaled queries, scores of one page, outputs, running maxima and sums.
struct AttentionScratch {
  float *q, *scores, *out, *top, *total;

  // key, value: columns of a query, and of what comes out.
  AttentionScratch(float* p, int m, int key, int value)
      : q(p),
        scores(q + static_cast<size_t>(m) * key),
        out(scores + static_cast<size_t>(m) * kPage),
        top(out + static_cast<size_t>(m) * value),
        total(top + m) {}

  static size_t floats(int m, int key, int value) {
    return static_cast<size_t>(m) * (static_cast<size_t>(key) + value + kPage + 2);
  }
};

inline size_t attention_scratch(int group, int head_dim, int tokens) {
  return AttentionScratch::floats(group * tokens, head_dim, head_dim);
}

inline void begin_rows(const AttentionArgs& args, AttentionScratch& s, int tokens) {
  for (int t = 0; t < tokens; t++)
    for (int j = 0; j < args.group; j++) {
      int row = t * args.group + j;
      const float* q = args.q + t * args.ldq + static_cast<int64_t>(j) * args.head_dim;
      for (int i = 0; i < args.head_dim; i++) {
        s.q[row * args.head_dim + i] = q[i] * args.scale;
        s.out[row * args.head_dim + i] = 0.0f;
      }
      s.top[row] = -INFINITY;
      s.total[row] = 0.0f;
    }
}

// Scores of one row become weights exp(score - maximum); positions [lo, hi) of the page are seen.
inline void soften(AttentionScratch& s, int row, int lo, int hi, int head_dim) {
  float* scores = s.scores + static_cast<size_t>(row) * kPage;
  for (int i = 0; i < lo; i++) scores[i] = -INFINITY;
  for (int i = hi; i < kPage; i++) scores[i] = -INFINITY;
  Vec tops = load(scores);
  for (int i = kLanes; i < kPage; i += kLanes) tops = max(tops, load(scores + i));
  float top = s.top[row];
  for (int i = 0; i < kLanes; i++) top = tops[i] > top ? tops[i] : top;
  if (top == -INFINITY) {  // nothing seen so far
    for (int i = 0; i < kPage; i++) scores[i] = 0.0f;
    return;
  }
  float keep = exp(splat(s.top[row] - top))[0];
  Vec sums{};
  for (int i = 0; i < kPage; i += kLanes) {
    Vec weights = exp(load(scores + i) - top);
    store(scores + i, weights);
    sums += weights;
  }
  s.total[row] = s.total[row] * keep + sum(sums);
  s.top[row] = top;
  if (keep != 1.0f)
    for (int i = 0; i < head_dim; i++) s.out[row * head_dim + i] *= keep;
}

// Adds what tokens at first_position.. see of page `page`, limited to positions [begin, end).
inline void add_page(const AttentionArgs& args, AttentionScratch& s, int page, int tokens,
                     int first_position, int begin, int end) {
  int m = tokens * args.group, base = page * kPage;
  int64_t at = args.pages[page] * args.page_stride;
  gemm({s.q, args.head_dim, args.k_cache + at, kPage, s.scores, kPage, args.head_dim, false}, m,
       kPage);
  for (int row = 0; row < m; row++) {
    int position = first_position + row / args.group;
    int lo = args.window && position + 1 - args.window > begin ? position + 1 - args.window : begin;
    int hi = position + 1 < end ? position + 1 : end;
    lo = lo - base < 0 ? 0 : lo - base > kPage ? kPage : lo - base;
    hi = hi - base > kPage ? kPage : hi - base < lo ? lo : hi - base;
    soften(s, row, lo, hi, args.head_dim);
  }
  // Slots behind the last position may hold anything, so they are left out, not multiplied by 0.
  int used = end - base < kPage ? end - base : kPage;
  gemm({s.scores, kPage, args.v_cache + at, args.head_dim, s.out, args.head_dim, used, true}, m,
       args.head_dim);
}

inline void attention(const AttentionArgs& args, float* y, int64_t ldy, int tokens,
                      int first_position, float* scratch) {
  AttentionScratch s(scratch, tokens * args.group, args.head_dim, args.head_dim);
  begin_rows(args, s, tokens);
  int oldest = args.window ? first_position + 1 - args.window : 0, end = first_position + tokens;
  oldest = oldest < 0 ? 0 : oldest;
  for (int page = oldest / kPage; page * kPage < end; page++)
    add_page(args, s, page, tokens, first_position, oldest, end);
  for (int t = 0; t < tokens; t++)
    for (int j = 0; j < args.group; j++) {
      int row = t * args.group + j;
      float* out = y + t * ldy + static_cast<int64_t>(j) * args.head_dim;
      for (int i = 0; i < args.head_dim; i++)
        out[i] = s.out[row * args.head_dim + i] / s.total[row];
    }
}

inline void attention_partial(const AttentionArgs& args, float* y, int begin, int end,
                              float* scratch) {
  AttentionScratch s(scratch, args.group, args.head_dim, args.head_dim);
  begin_rows(args, s, 1);
  AttentionArgs all = args;
  all.window = 0;  // [begin, end) is what the token sees
  if (begin < end)
    for (int page = begin / kPage; page * kPage < end; page++)
      add_page(all, s, page, 1, end - 1, begin, end);
  for (int j = 0; j < args.group; j++) {
    float* out = y + static_cast<int64_t>(j) * (args.head_dim + 2);
    for (int i = 0; i < args.head_dim; i++) out[i] = s.out[j * args.head_dim + i];
    out[args.head_dim] = s.top[j];
    out[args.head_dim + 1] = s.total[j];
  }
}

// The head's shares lie group * (head_dim + 2) apart.
inline void combine(float* y, const float* part, int splits, int group, int head_dim) {
  auto share = [&](int split) {
    return part + static_cast<int64_t>(split) * group * (head_dim + 2);
  };
  float top = -INFINITY, total = 0.0f;
  for (int s = 0; s < splits; s++) top = share(s)[head_dim] > top ? share(s)[head_dim] : top;
  for (int i = 0; i < head_dim; i++) y[i] = 0.0f;
  for (int s = 0; s < splits; s++) {
    float weight = exp(splat(share(s)[head_dim] - top))[0];
    total += weight * share(s)[head_dim + 1];
    for (int i = 0; i < head_dim; i++) y[i] += weight * share(s)[i];
  }
  for (int i = 0; i < head_dim; i++) y[i] /= total;
}

}  // namespace tilert::TILERT_ISA
