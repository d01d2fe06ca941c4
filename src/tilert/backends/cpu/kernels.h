// The table of compute kernels, built once per instruction set and chosen at run time.
//
// Activations and caches are f32, sums are f32 in a fixed order. A weight is row-major [n, k] in
// f32, bf16, f16 or, for products, e4m3 with block scales, read in place from the mapped file, so
// only its own element size aligns it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "ops.h"

namespace tilert {

constexpr int kFewTokens = 8;  // up to here a product streams weights past the activations

// A stored matrix or vector. e4m3 has scales: [ceil(n / block_rows), ceil(k / block_cols)].
struct Weight {
  const void* data;
  DType dtype;
  const float* scales = nullptr;
  int block_rows = 1, block_cols = 1;
};

// y[t, r] = epilogue(sum_i x[t, i] * w[r, i] + bias[r]); see ops/linear.py for the epilogues.
struct LinearArgs {
  float* y;          // [tokens, ldy], already at the op's first column
  int64_t ldy;       // elements from row to row, of `old` too
  const float* old;  // what a sum is added to, at the same column
  const float* x;    // [tokens, ldx], normed if the op asks for it
  int64_t ldx;
  Weight w, w_up;        // [n, k] of one dtype; w_up.data null unless gated
  Weight bias, bias_up;  // [n]; data null for none
  int k;
  int epilogue;  // 0 store, 1 add to old, 2 silu(w) * w_up
};

// Softmax attention of one kv head's query heads over the pages of one sequence.
struct AttentionArgs {
  const float* q;        // [tokens, ldq], at the first query head of the group
  int64_t ldq;           // elements from token to token
  const float* k_cache;  // page p of this head at k_cache + p * page_stride: [head_dim, kPage]
  const float* v_cache;  // the same: [kPage, head_dim]
  int64_t page_stride;   // elements from page to page
  const int32_t* pages;  // physical page of each 64 positions
  int group;             // query heads
  int head_dim;
  int window;  // 0: all of the past
  float scale;
};

// One token's queries against rows [lora + rope] of a latent cache.
struct LatentArgs {
  const float* q;       // [heads, lora]
  const float* q_rope;  // of head j at q_rope + j * ldq: [rope]
  int64_t ldq;
  int heads, lora, rope;
  float scale;
  bool rounded;  // queries, to bf16, as unpacked rows are
};

// Where the parts of a packed row are, in bytes; see `pack` of ops/mla.py.
struct PackedRow {
  int lora, rope;

  static constexpr int kScaleCols = 128;  // latents of a scale
  int scales() const { return (lora + kScaleCols - 1) / kScaleCols; }
  int key() const { return lora + (scales() * 4 + 15) / 16 * 16; }
  int bytes() const { return key() + 2 * rope; }
};

struct Kernels {
  const char* name;

  // Output rows [begin, end) for `tokens` rows of x. scratch: linear_scratch(k, tokens) floats.
  void (*linear)(const LinearArgs& args, int tokens, int begin, int end, float* scratch);
  size_t (*linear_scratch)(int k, int tokens);
  // The same in the way of many tokens whatever their number, so that a token's result does not
  // depend on it. scratch: linear_many_scratch(k, tokens) floats.
  void (*linear_many)(const LinearArgs& args, int tokens, int begin, int end, float* scratch);
  size_t (*linear_many_scratch)(int k, int tokens);

  // y = x / sqrt(mean(x^2) + eps) * weight for one row of `width`.
  void (*norm)(float* y, const float* x, Weight weight, int width, float eps);

  // out = rotate(norm(x)) for one head; norm.data null for none; cos_sin [head_dim], cosines first.
  void (*rope)(float* out, const float* x, Weight norm, float eps, const float* cos_sin,
               int head_dim);

  // `tokens` consecutive positions from first_position on, each seeing its past and itself.
  // y [tokens, ldy] at the group's first column. scratch: attention_scratch(args, tokens) floats.
  void (*attention)(const AttentionArgs& args, float* y, int64_t ldy, int tokens,
                    int first_position, float* scratch);
  // One token over positions [begin, end): per query head head_dim sums, maximum, sum of weights.
  void (*attention_partial)(const AttentionArgs& args, float* y, int begin, int end,
                            float* scratch);
  size_t (*attention_scratch)(int group, int head_dim, int tokens);

  // Merge the partial results [splits][group][head_dim + 2] of one kv head into y [group *
  // head_dim].
  void (*combine)(float* y, const float* part, int splits, int group, int head_dim);

  // Attention over rows that are handed over up to kPage at a time. latent_end: head j's weighted
  // sum of latents at y + j * ldy, or with `partial` the sums, maximum and sum of weights. scratch:
  // latent_scratch(heads, lora, rope) floats, the same from begin to end.
  void (*latent_begin)(const LatentArgs& args, float* scratch);
  void (*latent_rows)(const LatentArgs& args, const float* const* rows, int n, float* scratch);
  void (*latent_end)(const LatentArgs& args, float* y, int64_t ldy, bool partial, float* scratch);
  size_t (*latent_scratch)(int heads, int lora, int rope);
  // A row [lora + rope] to its packed form, and from there to floats.
  void (*latent_pack)(char* row, const float* x, const PackedRow& layout);
  void (*latent_unpack)(float* x, const char* row, const PackedRow& layout);

  // For the indexer, one row each; y of index_scores for n <= kPage keys [n, dim], scratch heads *
  // kPage floats.
  void (*layer_norm)(float* y, const float* x, const float* weight, const float* shift, int width,
                     float eps);
  void (*hadamard)(float* x, int width);
  void (*index_scores)(float* y, const float* q, const float* weights, const float* keys, int heads,
                       int dim, int n, float scale, float* scratch);

  // y = weight row `row` of [.., width] widened to f32.
  void (*embed)(float* y, Weight table, int64_t row, int width);

  // Index of the largest of n > 0 values, the first of equal ones.
  int (*argmax)(const float* x, int n);

  // Reads all bytes with plain vector loads; the result keeps the loads from being removed.
  uint64_t (*read)(const void* data, size_t bytes);
};

// The table of an instruction set: portable, avx2, avx512, or the best one of this machine for "".
// Null when it is unknown or this machine lacks it.
const Kernels* find_kernels(const std::string& isa);

}  // namespace tilert
