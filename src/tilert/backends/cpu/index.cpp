// The caches of this back end are pages of whole rows: [page, 64, head_dim], f32 always.
#include "index.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "state.h"

namespace tilert {
namespace {

// Scores as integers of the same order, -0 as 0; and back.
uint32_t rising(float score) {
  const auto bits = std::bit_cast<uint32_t>(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
float score_of(uint32_t key) { return std::bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key); }

class IndexRopeTask final : public Task {
 public:
  IndexRopeTask(const Operands& in, const IndexRopeFields& f, const Kernels& kernels)
      : f_(f),
        kernels_(kernels),
        count_(in, f.counts, 0, f.rows),
        cache_(in.cache(f.index_cache, 1, f.head_dim)),
        places_(in, f, cache_.pages),
        weight_(f.head_dim),
        shift_(f.head_dim) {
    in.require(f.index_scale < 0, "it rounds keys to e4m3, which only GPUs do");
    in.require(std::has_single_bit(static_cast<unsigned>(f.head_dim)),
               "its head_dim is no power of two");
    in.require(
        f.rope > 0 && f.rope % 2 == 0 && f.rope <= f.head_dim && f.q_col >= 0 && f.k_col >= 0,
        "its columns cannot be rotated in pairs");
    in.require(f.context <= int64_t{f.page_cols} * kPage,
               "its context has more pages than its table");
    q_ = in.floats(f.q, f.rows, f.q_col + int64_t{f.heads} * f.head_dim);
    k_ = in.floats(f.k, f.rows, int64_t{f.k_col} + f.head_dim);
    table_ = in.floats(f.table, f.context, f.rope);
    kernels.embed(weight_.data(), in.weight(f.weight, 1, f.head_dim), 0, f.head_dim);
    kernels.embed(shift_.data(), in.weight(f.shift, 1, f.head_dim), 0, f.head_dim);
  }

  int tiles() const override { return f_.heads + 1; }
  size_t scratch_bytes() const override { return f_.rope * sizeof(float); }

  void run(int lo, int hi, float* scratch) const override {
    const int tokens = count_();
    for (int t = 0; t < tokens; ++t) {
      const int position = checked(places_.position(t), f_.context, "position");
      const float* angles = table_.row(position);
      for (int head = lo; head < std::min(hi, f_.heads); ++head) {
        turn(q_.row(t) + f_.q_col + int64_t{head} * f_.head_dim, angles, scratch);
      }
      if (hi <= f_.heads) continue;
      const int64_t page = places_.pages(t, position, position + 1)[position / kPage];
      float* key = cache_.data + (page * kPage + position % kPage) * f_.head_dim;
      kernels_.layer_norm(key, k_.row(t) + f_.k_col, weight_.data(), shift_.data(), f_.head_dim,
                          f_.eps);
      turn(key, angles, scratch);
    }
  }

 private:
  void turn(float* x, const float* angles, float* scratch) const {
    rotate(kernels_, x, x, angles, f_.rope, f_.interleave, scratch);
    kernels_.hadamard(x, f_.head_dim);
  }

  IndexRopeFields f_;
  const Kernels& kernels_;
  Count count_;
  Cache cache_;
  Places places_;
  Floats q_, k_, table_;
  std::vector<float> weight_, shift_;
};

class IndexScoreTask final : public Task {
 public:
  IndexScoreTask(const Operands& in, const IndexScoreFields& f, const Kernels& kernels)
      : f_(f),
        kernels_(kernels),
        count_(in, f.counts, 0, f.rows),
        cache_(in.cache(f.index_cache, 1, f.head_dim)),
        places_(in, f, cache_.pages) {
    in.require(f.index_scale < 0, "its keys are e4m3, which only GPUs read");
    in.require(f.splits > 0 && f.block > 0 && f.width > 0 && f.width % kPage == 0 && f.topk > 0,
               "its tiles are not positive");
    in.require(int64_t{f.splits} * f.width >= int64_t{f.page_cols} * kPage,
               "its shares have too few columns");
    q_ = in.floats(f.q, f.rows, f.q_col + int64_t{f.heads} * f.head_dim);
    weights_ = in.floats(f.head_weights, f.rows, int64_t{f.w_col} + f.heads);
    y_ = in.floats(f.y, f.rows, int64_t{f.splits} * f.width);
    order_ = in.ints(f.order, f.rows, int64_t{f.splits} * f.width);
  }

  int tiles() const override { return ceil_div(f_.rows, f_.block) * f_.splits; }
  size_t scratch_bytes() const override {
    return size_t(f_.heads) * kPage * sizeof(float) + size_t(f_.width) * sizeof(uint64_t);
  }

  void run(int lo, int hi, float* scratch) const override {
    const int tokens = count_();
    for (int tile = lo; tile < hi; ++tile) {
      const int split = tile % f_.splits, begin = tile / f_.splits * f_.block;
      for (int t = begin; t < std::min(begin + f_.block, tokens); ++t) token(t, split, scratch);
    }
  }

 private:
  void token(int t, int split, float* scratch) const {
    const int visible = places_.position(t) + 1;
    if (visible <= f_.topk) return;  // all of them are selected, whatever their scores
    const int32_t* table = places_.pages(t);
    const int64_t row = int64_t{t} * f_.splits + split;
    float* y = y_.row(t) + int64_t{split} * f_.width;
    int seen = 0;
    for (int page = split; page * kPage < visible; page += f_.splits) {
      const int64_t at = checked(table[page], cache_.pages, "page");
      const int positions = std::min(kPage, visible - page * kPage);
      kernels_.index_scores(y + seen, q_.row(t) + f_.q_col, weights_.row(t) + f_.w_col,
                            cache_.data + at * kPage * f_.head_dim, f_.heads, f_.head_dim,
                            positions, f_.scale, scratch);
      seen += positions;
    }
    rank(y, order_ + row * f_.width, seen, split,
         reinterpret_cast<uint64_t*>(scratch + int64_t{f_.heads} * kPage));
  }

  // The scores of a share, which come in the order of their positions: the largest first, of equal
  // ones the lower position.
  void rank(float* y, int32_t* order, int count, int split, uint64_t* ranked) const {
    for (int i = 0; i < count; ++i) {
      const int position = (i / kPage * f_.splits + split) * kPage + i % kPage;
      ranked[i] = uint64_t{~rising(y[i])} << 32 | static_cast<uint32_t>(position);
    }
    std::sort(ranked, ranked + count);
    for (int i = 0; i < count; ++i) {
      y[i] = score_of(~static_cast<uint32_t>(ranked[i] >> 32));
      order[i] = static_cast<int32_t>(ranked[i]);
    }
  }

  IndexScoreFields f_;
  const Kernels& kernels_;
  Count count_;
  Cache cache_;
  Places places_;
  Floats q_, weights_, y_;
  int32_t* order_;
};

class SelectTask final : public Task {
 public:
  SelectTask(const Operands& in, const SelectFields& f)
      : f_(f), count_(in, f.counts, 0, f.rows), positions_(in.ints(f.positions, 1, f.rows)) {
    in.require(f.topk > 0 && f.splits > 0 && f.width > 0, "its sizes are not positive");
    scores_ = in.floats(f.scores, f.rows, int64_t{f.splits} * f.width);
    order_ = in.ints(f.order, f.rows, int64_t{f.splits} * f.width);
    chosen_ = in.ints(f.chosen, f.rows, f.topk);
  }

  int tiles() const override { return f_.rows; }
  size_t scratch_bytes() const override { return size_t(f_.splits) * f_.width * sizeof(uint32_t); }

  void run(int lo, int hi, float* scratch) const override {
    const int end = std::min(hi, count_());
    for (int t = lo; t < end; ++t) {
      const int visible = checked(positions_[t], int64_t{f_.splits} * f_.width, "position") + 1;
      int32_t* chosen = chosen_ + int64_t{t} * f_.topk;
      if (visible <= f_.topk) {
        for (int i = 0; i < visible; ++i) chosen[i] = i;
      } else {
        auto* keys = reinterpret_cast<uint32_t*>(scratch);
        read(keys, t, visible);
        best(chosen, keys, visible);
      }
    }
  }

 private:
  // Scores in the order of positions, as integers of the same order.
  void read(uint32_t* keys, int t, int visible) const {
    const float* scores = scores_.row(t);
    const int32_t* order = order_ + int64_t{t} * f_.splits * f_.width;
    for (int page = 0; page * kPage < visible; ++page) {
      // As many entries of the page's share as the page has positions; which ones does not matter.
      const int64_t first = int64_t{page % f_.splits} * f_.width + page / f_.splits * kPage;
      for (int i = 0; i < std::min(kPage, visible - page * kPage); ++i) {
        keys[checked(order[first + i], visible, "selected position")] = rising(scores[first + i]);
      }
    }
  }

  // The topk largest of n keys. The key of the last of them is found byte by byte: how many have a
  // larger first byte, then among those with its byte how many a larger second one, and so on.
  void best(int32_t* chosen, const uint32_t* keys, int n) const {
    uint32_t border = 0, mask = 0;
    int left = f_.topk;  // to be found among those that agree with the border so far
    for (int shift = 24; shift >= 0; shift -= 8) {
      int tally[256] = {};
      for (int i = 0; i < n; ++i) {
        if ((keys[i] & mask) == border) ++tally[keys[i] >> shift & 255];
      }
      int byte = 255;
      for (; tally[byte] < left; --byte) left -= tally[byte];
      border |= static_cast<uint32_t>(byte) << shift;
      mask |= 255u << shift;
    }
    int found = 0;
    for (int i = 0; found < f_.topk; ++i) {
      if (keys[i] > border || (keys[i] == border && left-- > 0)) chosen[found++] = i;
    }
  }

  SelectFields f_;
  Count count_;
  Floats scores_;
  const int32_t *order_, *positions_;
  int32_t* chosen_;
};

}  // namespace

std::unique_ptr<Task> make_index_rope(const Operands& in, const IndexRopeFields& f,
                                      const Kernels& kernels) {
  return std::make_unique<IndexRopeTask>(in, f, kernels);
}

std::unique_ptr<Task> make_index_score(const Operands& in, const IndexScoreFields& f,
                                       const Kernels& kernels) {
  return std::make_unique<IndexScoreTask>(in, f, kernels);
}

std::unique_ptr<Task> make_select(const Operands& in, const SelectFields& f) {
  return std::make_unique<SelectTask>(in, f);
}

}  // namespace tilert
