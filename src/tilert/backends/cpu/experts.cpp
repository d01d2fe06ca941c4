// A step of few tokens reads each chosen matrix for the token that chose it, one token at a time.
// In a step of many tokens those that chose one expert are gathered, so that its rows are read once
// for all; the products then go the way of many tokens even where there are few, so that a token's
// result does not depend on which others chose the same expert.
#include "experts.h"

#include <algorithm>
#include <cmath>

#include "state.h"

namespace tilert {
namespace {

class RouteTask final : public Task {
 public:
  RouteTask(const Operands& in, const RouteFields& f, const Kernels& kernels)
      : f_(f), count_(in, f.counts, 0, f.rows), bias_(f.experts, 0.0f) {
    in.require(f.n_group > 0 && f.experts % f.n_group == 0 && f.topk_group > 0 &&
                   f.topk_group <= f.n_group,
               "its experts do not fall into groups");
    size_ = f.experts / f.n_group;
    in.require(f.top_k > 0 && f.top_k <= int64_t{f.topk_group} * size_, "it chooses too many");
    in.require(f.scoring == 0 || f.scoring == 1, "its scoring is unknown");
    logits_ = in.floats(f.logits, f.rows, f.experts);
    chosen_ = in.ints(f.chosen, f.rows, f.top_k);
    weights_ = in.floats(f.weights, f.rows, f.top_k);
    if (f.bias >= 0) kernels.embed(bias_.data(), in.weight(f.bias, 1, f.experts), 0, f.experts);
  }

  int tiles() const override { return f_.rows; }
  size_t scratch_bytes() const override {
    return (3 * size_t(f_.experts) + f_.n_group) * sizeof(float);
  }

  void run(int lo, int hi, float* scratch) const override {
    const int end = std::min(hi, count_());
    for (int t = lo; t < end; ++t) choose(t, scratch);
  }

 private:
  // What the choice goes by; the lower number of equal ones first, as `best` finds them.
  void choose(int t, float* scores) const {
    float *values = scores + f_.experts, *open = values + f_.experts;
    const float* logits = logits_.row(t);
    score(scores, logits);
    for (int e = 0; e < f_.experts; ++e) {
      values[e] = (f_.scoring == 1 ? scores[e] : logits[e]) + bias_[e];
    }
    std::fill_n(open, f_.experts, f_.n_group == 1 ? 1.0f : 0.0f);
    if (f_.n_group > 1) open_groups(values, open, open + f_.experts);
    int32_t* chosen = chosen_ + int64_t{t} * f_.top_k;
    for (int j = 0; j < f_.top_k; ++j) {
      chosen[j] = best(values, open, f_.experts);
      open[chosen[j]] = 0.0f;
    }
    std::sort(chosen, chosen + f_.top_k);
    float* weights = weights_.row(t);
    float sum = 0.0f;
    for (int j = 0; j < f_.top_k; ++j) sum += weights[j] = scores[chosen[j]];
    const float divisor = f_.norm_topk_prob ? sum + 1e-20f : 1.0f;
    for (int j = 0; j < f_.top_k; ++j) {
      weights[j] = weights[j] / divisor * f_.routed_scaling_factor;
    }
  }

  void score(float* scores, const float* logits) const {
    if (f_.scoring == 1) {
      for (int e = 0; e < f_.experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
      return;
    }
    const float top = *std::max_element(logits, logits + f_.experts);
    float sum = 0.0f;
    for (int e = 0; e < f_.experts; ++e) sum += scores[e] = std::exp(logits[e] - top);
    for (int e = 0; e < f_.experts; ++e) scores[e] /= sum;
  }

  // Opens the experts of the topk_group groups whose best two sum to most.
  void open_groups(const float* values, float* open, float* sums) const {
    for (int g = 0; g < f_.n_group; ++g) {
      float first = -INFINITY, second = -INFINITY;
      for (int e = g * size_; e < (g + 1) * size_; ++e) {
        second = std::max(second, std::min(first, values[e]));
        first = std::max(first, values[e]);
      }
      sums[g] = size_ > 1 ? first + second : first;
    }
    for (int kept = 0; kept < f_.topk_group; ++kept) {
      int g = 0;
      while (open[g * size_] != 0.0f) ++g;  // the first that is not yet open
      for (int other = g + 1; other < f_.n_group; ++other) {
        if (open[other * size_] == 0.0f && sums[other] > sums[g]) g = other;
      }
      std::fill_n(open + g * size_, size_, 1.0f);
    }
  }

  // The largest of the open values; one that is open even when none is a number.
  static int best(const float* values, const float* open, int n) {
    int found = -1;
    for (int i = 0; i < n; ++i) {
      if (open[i] != 0.0f && (found < 0 || values[i] > values[found])) found = i;
    }
    return found;
  }

  RouteFields f_;
  Count count_;
  std::vector<float> bias_;
  int size_;  // of a group
  Floats logits_, weights_;
  int32_t* chosen_;
};

// The choices of a step: which tokens, in which slots, chose each expert.
class Choices {
 public:
  Choices(const Operands& in, int chosen, int rows, int top_k, int bank)
      : chosen_(in.ints(chosen, rows, top_k)), top_k_(top_k), bank_(bank) {}

  int expert(int t, int j) const {
    return checked(chosen_[int64_t{t} * top_k_ + j], bank_, "expert");
  }

  // Words of scratch that `sort` fills.
  size_t words(int rows) const { return padded(bank_ + 1 + size_t(rows) * top_k_); }

  // starts [bank + 1], then t * top_k + j of all choices, by expert and then by token. In a result
  // starts[e] is where those of expert e begin.
  const int32_t* sort(int rows, float* scratch) const {
    auto* starts = reinterpret_cast<int32_t*>(scratch);
    std::fill_n(starts, bank_ + 1, 0);
    const int count = rows * top_k_;
    for (int i = 0; i < count; ++i) ++starts[expert(i / top_k_, i % top_k_) + 1];
    for (int e = 0; e < bank_; ++e) starts[e + 1] += starts[e];
    int32_t* sorted = starts + bank_ + 1;
    for (int i = 0; i < count; ++i) sorted[starts[chosen_[i]]++] = i;
    for (int e = bank_; e > 0; --e) starts[e] = starts[e - 1];
    starts[0] = 0;
    return starts;
  }

 private:
  const int32_t* chosen_;
  int top_k_, bank_;
};

// Calls f(e, choices, count) for every expert that some token chose.
template <class F>
void for_each_expert(const int32_t* starts, int bank, F f) {
  const int32_t* sorted = starts + bank + 1;
  for (int e = 0; e < bank; ++e) {
    if (starts[e] < starts[e + 1]) f(e, sorted + starts[e], starts[e + 1] - starts[e]);
  }
}

class ExpertGateTask final : public Task {
 public:
  ExpertGateTask(const Operands& in, const ExpertGateFields& f, const Kernels& kernels)
      : f_(f),
        kernels_(kernels),
        count_(in, f.counts, 0, f.rows),
        choices_(in, f.chosen, f.rows, f.top_k, f.bank),
        x_(in.floats(f.x, f.rows, f.k)),
        y_(in.floats(f.y, f.rows, int64_t{f.top_k} * f.n)),
        norm_(in.weight_or_none(f.norm, 1, f.k)),
        gate_(in.bank(f.w, f.bank, f.n, f.k)),
        up_(in.bank(f.w_up, f.bank, f.n, f.k)) {
    in.require(f.tile_rows > 0, "its tiles are not positive");
    in.require(gate_.dtype == up_.dtype, "its matrices differ in dtype");
  }

  int tiles() const override { return blocks() * (f_.by_slot ? f_.top_k : 1); }

  size_t scratch_bytes() const override {
    size_t floats = norm_.data ? f_.rows * padded(f_.k) : 0;
    if (f_.by_slot) {
      floats += kernels_.linear_scratch(f_.k, 1);
    } else {
      floats += choices_.words(f_.rows) + f_.rows * (padded(f_.k) + padded(f_.n));
      floats += kernels_.linear_many_scratch(f_.k, f_.rows);
    }
    return floats * sizeof(float);
  }

  void run(int lo, int hi, float* scratch) const override {
    const int rows = count_();
    Floats x = x_;
    if (norm_.data) {
      x = {scratch, static_cast<int64_t>(padded(f_.k))};
      for (int t = 0; t < rows; ++t) kernels_.norm(x.row(t), x_.row(t), norm_, f_.k, f_.eps);
      scratch += f_.rows * x.stride;
    }
    f_.by_slot ? few(x, rows, lo, hi, scratch) : many(x, rows, lo, hi, scratch);
  }

 private:
  int blocks() const { return ceil_div(f_.n, f_.tile_rows); }

  LinearArgs args(const float* x, int64_t ldx, float* y, int64_t ldy, int expert) const {
    return {.y = y,
            .ldy = ldy,
            .x = x,
            .ldx = ldx,
            .w = gate_[expert],
            .w_up = up_[expert],
            .bias = {},
            .bias_up = {},
            .k = f_.k,
            .epilogue = 2};
  }

  void few(const Floats& x, int rows, int lo, int hi, float* scratch) const {
    for (int tile = lo; tile < hi;) {
      const int j = tile / blocks(), next = std::min(hi, (j + 1) * blocks());
      const int begin = tile % blocks() * f_.tile_rows;
      const int end = std::min((next - j * blocks()) * f_.tile_rows, f_.n);
      for (int t = 0; t < rows; ++t) {
        float* y = y_.row(t) + int64_t{j} * f_.n;
        kernels_.linear(args(x.row(t), 0, y, 0, choices_.expert(t, j)), 1, begin, end, scratch);
      }
      tile = next;
    }
  }

  void many(const Floats& x, int rows, int lo, int hi, float* scratch) const {
    const int begin = lo * f_.tile_rows, end = std::min(hi * f_.tile_rows, f_.n);
    const int32_t* starts = choices_.sort(rows, scratch);
    scratch += choices_.words(f_.rows);
    const Floats in{scratch, static_cast<int64_t>(padded(f_.k))};
    const Floats out{in.row(f_.rows), static_cast<int64_t>(padded(f_.n))};
    for_each_expert(starts, f_.bank, [&](int e, const int32_t* choices, int count) {
      for (int i = 0; i < count; ++i) std::copy_n(x.row(choices[i] / f_.top_k), f_.k, in.row(i));
      kernels_.linear_many(args(in.data, in.stride, out.data, out.stride, e), count, begin, end,
                           out.row(f_.rows));
      for (int i = 0; i < count; ++i) {
        float* y = y_.row(choices[i] / f_.top_k) + int64_t{choices[i] % f_.top_k} * f_.n;
        std::copy(out.row(i) + begin, out.row(i) + end, y + begin);
      }
    });
  }

  ExpertGateFields f_;
  const Kernels& kernels_;
  Count count_;
  Choices choices_;
  Floats x_, y_;
  Weight norm_;
  Bank gate_, up_;
};

class ExpertDownTask final : public Task {
 public:
  ExpertDownTask(const Operands& in, const ExpertDownFields& f, const Kernels& kernels)
      : f_(f),
        kernels_(kernels),
        count_(in, f.counts, 0, f.rows),
        choices_(in, f.chosen, f.rows, f.top_k, f.bank),
        x_(in.floats(f.x, f.rows, int64_t{f.top_k} * f.k)),
        y_(in.floats(f.y, f.rows, f.n)),
        weights_(in.floats(f.weights, f.rows, f.top_k)),
        down_(in.bank(f.w, f.bank, f.n, f.k)) {
    in.require(f.tile_rows > 0, "its tiles are not positive");
  }

  int tiles() const override { return ceil_div(f_.n, f_.tile_rows); }

  size_t scratch_bytes() const override {
    size_t floats = padded(f_.n) + kernels_.linear_scratch(f_.k, 1);
    if (!few()) {
      floats = choices_.words(f_.rows) + f_.rows * (padded(f_.k) + padded(f_.n)) +
               kernels_.linear_many_scratch(f_.k, f_.rows);
    }
    return floats * sizeof(float);
  }

  void run(int lo, int hi, float* scratch) const override {
    const int rows = count_();
    const int begin = lo * f_.tile_rows, end = std::min(hi * f_.tile_rows, f_.n);
    few() ? one_by_one(rows, begin, end, scratch) : by_expert(rows, begin, end, scratch);
  }

 private:
  bool few() const { return f_.rows <= kFewTokens; }

  LinearArgs args(const float* x, int64_t ldx, float* y, int64_t ldy, int expert) const {
    return {.y = y,
            .ldy = ldy,
            .x = x,
            .ldx = ldx,
            .w = down_[expert],
            .w_up = {},
            .bias = {},
            .bias_up = {},
            .k = f_.k,
            .epilogue = 0};
  }

  // y += weight * made, for token t and its slot j.
  void add(int t, int j, const float* made, int begin, int end) const {
    const float weight = weights_.row(t)[j];
    float* y = y_.row(t);
    for (int r = begin; r < end; ++r) y[r] += weight * made[r];
  }

  void one_by_one(int rows, int begin, int end, float* scratch) const {
    for (int t = 0; t < rows; ++t) {
      for (int j = 0; j < f_.top_k; ++j) {
        const float* x = x_.row(t) + int64_t{j} * f_.k;
        kernels_.linear(args(x, 0, scratch, 0, choices_.expert(t, j)), 1, begin, end,
                        scratch + padded(f_.n));
        add(t, j, scratch, begin, end);
      }
    }
  }

  // Experts rise, and so do those of each token's slots: the sum has the order of the slots.
  void by_expert(int rows, int begin, int end, float* scratch) const {
    const int32_t* starts = choices_.sort(rows, scratch);
    scratch += choices_.words(f_.rows);
    const Floats in{scratch, static_cast<int64_t>(padded(f_.k))};
    const Floats out{in.row(f_.rows), static_cast<int64_t>(padded(f_.n))};
    for_each_expert(starts, f_.bank, [&](int e, const int32_t* choices, int count) {
      for (int i = 0; i < count; ++i) {
        const float* x = x_.row(choices[i] / f_.top_k) + int64_t{choices[i] % f_.top_k} * f_.k;
        std::copy_n(x, f_.k, in.row(i));
      }
      kernels_.linear_many(args(in.data, in.stride, out.data, out.stride, e), count, begin, end,
                           out.row(f_.rows));
      for (int i = 0; i < count; ++i) {
        add(choices[i] / f_.top_k, choices[i] % f_.top_k, out.row(i), begin, end);
      }
    });
  }

  ExpertDownFields f_;
  const Kernels& kernels_;
  Count count_;
  Choices choices_;
  Floats x_, y_, weights_;
  Bank down_;
};

}  // namespace

std::unique_ptr<Task> make_route(const Operands& in, const RouteFields& f, const Kernels& kernels) {
  return std::make_unique<RouteTask>(in, f, kernels);
}

std::unique_ptr<Task> make_expert_gate(const Operands& in, const ExpertGateFields& f,
                                       const Kernels& kernels) {
  return std::make_unique<ExpertGateTask>(in, f, kernels);
}

std::unique_ptr<Task> make_expert_down(const Operands& in, const ExpertDownFields& f,
                                       const Kernels& kernels) {
  return std::make_unique<ExpertDownTask>(in, f, kernels);
}

}  // namespace tilert
