#include "task.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "experts.h"
#include "index.h"
#include "kernels.h"
#include "mla.h"
#include "operands.h"
#include "state.h"

namespace tilert {
namespace {

class LinearTask final : public Task {
 public:
  LinearTask(const Operands& in, const LinearFields& f, const Kernels& kernels)
      : f_(f), kernels_(kernels), count_(in, f.counts, f.count_index, f.rows) {
    in.require(f.gather < 0 && f.x_rows == 1,
               "it gathers rows, which only machines with rings are given");
    in.require(f.tile_rows > 0 && f.y_col >= 0, "its tiles are not positive");
    in.require(f.epilogue >= 0 && f.epilogue <= 2, "its epilogue is unknown");
    in.require((f.epilogue == 2) == (f.w_up >= 0), "a gate has two matrices, others one");
    in.require(f.groups > 0 && f.n % f.groups == 0 && f.x_col >= 0 && f.x_stride >= 0,
               "its rows do not fall into groups");
    in.require(f.groups == 1 || (f.norm < 0 && f.epilogue == 0),
               "its groups do more than multiply");
    const Floats x = in.floats(f.x, f.rows, f.x_col + (f.groups - 1) * int64_t{f.x_stride} + f.k);
    const Floats y = in.floats(f.y, f.rows, int64_t{f.y_col} + f.n);
    const Floats old = f.residual < 0 ? y : in.floats(f.residual, f.rows, int64_t{f.y_col} + f.n);
    in.require(old.stride == y.stride, "its sum and what it is added to differ in columns");
    norm_ = in.weight_or_none(f.norm, 1, f.k);
    args_ = {.y = y.data + f.y_col,
             .ldy = y.stride,
             .old = old.data + f.y_col,
             .x = x.data + f.x_col,
             .ldx = x.stride,
             .w = in.matrix(f.w, f.n, f.k),
             .w_up = f.w_up < 0 ? Weight{} : in.matrix(f.w_up, f.n, f.k),
             .bias = in.weight_or_none(f.bias, 1, f.n),
             .bias_up = in.weight_or_none(f.bias_up, 1, f.n),
             .k = f.k,
             .epilogue = f.epilogue};
    in.require(f.w_up < 0 || args_.w.dtype == args_.w_up.dtype, "its matrices differ in dtype");
  }

  int tiles() const override { return f_.groups * group_tiles(); }

  size_t scratch_bytes() const override {
    const size_t normed = norm_.data ? f_.rows * padded(f_.k) : 0;
    return (normed + kernels_.linear_scratch(f_.k, f_.rows)) * sizeof(float);
  }

  void run(int lo, int hi, float* scratch) const override {
    LinearArgs args = args_;
    const int rows = count_();
    if (norm_.data) {
      args.ldx = static_cast<int64_t>(padded(f_.k));
      for (int t = 0; t < rows; ++t) {
        kernels_.norm(scratch + t * args.ldx, args_.x + t * args_.ldx, norm_, f_.k, f_.eps);
      }
      args.x = scratch;
      scratch += f_.rows * args.ldx;
    }
    const float* x = args.x;
    for (int g = lo / group_tiles(); g * group_tiles() < hi; ++g) {
      args.x = x + int64_t{g} * f_.x_stride;
      const int first = g * group_tiles();
      kernels_.linear(args, rows, row_of(g, lo - first), row_of(g, hi - first), scratch);
    }
  }

 private:
  int group_rows() const { return f_.n / f_.groups; }
  int group_tiles() const { return ceil_div(group_rows(), f_.tile_rows); }

  // The row at which tile `tile` of group g begins, inside that group.
  int row_of(int g, int tile) const {
    const int64_t row = std::max<int64_t>(0, int64_t{tile} * f_.tile_rows);
    return g * group_rows() + static_cast<int>(std::min<int64_t>(row, group_rows()));
  }

  LinearFields f_;
  const Kernels& kernels_;
  Count count_;
  Weight norm_;
  LinearArgs args_;
};

class NormTask final : public Task {
 public:
  NormTask(const Operands& in, const NormFields& f, const Kernels& kernels)
      : f_(f), kernels_(kernels), count_(in, f.counts, f.gather < 0 ? 0 : 1, f.rows) {
    in.require(f.block > 0, "its tiles are not positive");
    x_ = in.floats(f.x, f.gather < 0 ? f.rows : f.x_rows, f.width);
    y_ = in.floats(f.y, f.rows, f.width);
    weight_ = in.weight(f.weight, 1, f.width);
    gather_ = f.gather < 0 ? nullptr : in.ints(f.gather, 1, f.rows);
  }

  int tiles() const override { return ceil_div(f_.rows, f_.block); }

  void run(int lo, int hi, float*) const override {
    const int end = std::min(hi * f_.block, count_());
    for (int row = lo * f_.block; row < end; ++row) {
      const int from = gather_ ? checked(gather_[row], f_.x_rows, "row") : row;
      kernels_.norm(y_.row(row), x_.row(from), weight_, f_.width, f_.eps);
    }
  }

 private:
  NormFields f_;
  const Kernels& kernels_;
  Count count_;
  Floats x_, y_;
  Weight weight_;
  const int32_t* gather_;
};

class EmbedTask final : public Task {
 public:
  EmbedTask(const Operands& in, const EmbedFields& f, const Kernels& kernels)
      : f_(f), kernels_(kernels), count_(in, f.counts, 0, f.rows) {
    in.require(f.block > 0, "its tiles are not positive");
    tokens_ = in.ints(f.tokens, 1, f.rows);
    table_ = in.weight(f.table, f.vocab, f.width);
    y_ = in.floats(f.y, f.rows, f.width);
  }

  int tiles() const override { return ceil_div(f_.rows, f_.block); }

  void run(int lo, int hi, float*) const override {
    const int end = std::min(hi * f_.block, count_());
    for (int t = lo * f_.block; t < end; ++t) {
      kernels_.embed(y_.row(t), table_, checked(tokens_[t], f_.vocab, "token id"), f_.width);
    }
  }

 private:
  EmbedFields f_;
  const Kernels& kernels_;
  Count count_;
  const int32_t* tokens_;
  Weight table_;
  Floats y_;
};

class RopeTask final : public Task {
 public:
  RopeTask(const Operands& in, const RopeFields& f, const Kernels& kernels)
      : f_(f),
        kernels_(kernels),
        count_(in, f.counts, 0, f.rows),
        k_cache_(in.cache(f.k_cache, f.kv_heads, f.head_dim)),
        v_cache_(in.cache(f.v_cache, f.kv_heads, f.head_dim)),
        places_(in, f, std::min(k_cache_.pages, v_cache_.pages)) {
    in.require(f.head_dim % 2 == 0, "its head_dim is odd");
    in.require(f.context <= int64_t{f.page_cols} * kPage,
               "its context has more pages than its table");
    q_ = in.floats(f.q, f.rows, int64_t{f.heads} * f.head_dim);
    k_ = in.floats(f.k, f.rows, int64_t{f.kv_heads} * f.head_dim);
    v_ = in.floats(f.v, f.rows, int64_t{f.kv_heads} * f.head_dim);
    q_norm_ = in.weight_or_none(f.q_norm, 1, f.head_dim);
    k_norm_ = in.weight_or_none(f.k_norm, 1, f.head_dim);
    table_ = in.floats(f.table, f.context, f.head_dim);
  }

  int tiles() const override { return f_.heads + f_.kv_heads; }
  size_t scratch_bytes() const override { return f_.head_dim * sizeof(float); }

  void run(int lo, int hi, float* scratch) const override {
    const int tokens = count_();
    for (int t = 0; t < tokens; ++t) {
      const int position = checked(places_.position(t), f_.context, "position");
      const float* angles = table_.row(position);
      for (int head = lo; head < std::min(hi, f_.heads); ++head) {
        float* q = q_.row(t) + int64_t{head} * f_.head_dim;
        kernels_.rope(q, q, q_norm_, f_.eps, angles, f_.head_dim);
      }
      if (hi <= f_.heads) continue;
      const int64_t page = places_.pages(t, position, position + 1)[position / kPage];
      for (int g = std::max(lo - f_.heads, 0); g < hi - f_.heads; ++g) {
        append(t, g, (page * f_.kv_heads + g) * f_.head_dim * kPage, position % kPage, angles,
               scratch);
      }
    }
  }

 private:
  // Keys lie [head_dim, kPage] in a page, values [kPage, head_dim].
  void append(int t, int g, int64_t page_begin, int slot, const float* angles,
              float* turned) const {
    const int d = f_.head_dim;
    kernels_.rope(turned, k_.row(t) + int64_t{g} * d, k_norm_, f_.eps, angles, d);
    float* k = k_cache_.data + page_begin + slot;
    for (int i = 0; i < d; ++i) k[int64_t{i} * kPage] = turned[i];
    std::copy_n(v_.row(t) + int64_t{g} * d, d, v_cache_.data + page_begin + int64_t{slot} * d);
  }

  RopeFields f_;
  const Kernels& kernels_;
  Count count_;
  Cache k_cache_, v_cache_;
  Places places_;
  Floats q_, k_, v_, table_;
  Weight q_norm_, k_norm_;
};

class AttentionTask final : public Task {
 public:
  AttentionTask(const Operands& in, const AttentionFields& f, const Kernels& kernels)
      : f_(f),
        kernels_(kernels),
        count_(in, f.counts, 0, f.rows),
        k_cache_(in.cache(f.k_cache, f.kv_heads, f.head_dim)),
        v_cache_(in.cache(f.v_cache, f.kv_heads, f.head_dim)),
        places_(in, f, std::min(k_cache_.pages, v_cache_.pages)),
        group_(f.heads / f.kv_heads) {
    in.require(f.heads > 0 && f.heads % f.kv_heads == 0, "its heads are no multiple of kv_heads");
    in.require(f.splits > 0 && f.block > 0 && f.window >= 0, "its tiles are not positive");
    const int64_t width = f.splits == 1 ? f.head_dim : int64_t{f.splits} * (f.head_dim + 2);
    q_ = in.floats(f.q, f.rows, int64_t{f.heads} * f.head_dim);
    y_ = in.floats(f.y, f.rows, f.heads * width);
    args_ = {.ldq = q_.stride,
             .page_stride = int64_t{f.kv_heads} * f.head_dim * kPage,
             .group = group_,
             .head_dim = f.head_dim,
             .window = f.window,
             .scale = f.scale};
  }

  int tiles() const override { return ceil_div(f_.rows, f_.block) * f_.kv_heads * f_.splits; }

  size_t scratch_bytes() const override {
    const int tokens = f_.splits == 1 ? std::min(f_.block, f_.rows) : 1;
    return kernels_.attention_scratch(group_, f_.head_dim, tokens) * sizeof(float);
  }

  void run(int lo, int hi, float* scratch) const override {
    const int tokens = count_();
    for (int tile = lo; tile < hi; ++tile) {
      const int split = tile % f_.splits, g = tile / f_.splits % f_.kv_heads;
      const int begin = tile / (f_.splits * f_.kv_heads) * f_.block;
      const int end = std::min(begin + f_.block, tokens);
      for (int t = begin; t < end;) {
        if (f_.splits > 1) {
          partial(t++, g, split, scratch);
        } else {
          const int next = end_of_stretch(t, end);
          whole(t, next, g, scratch);
          t = next;
        }
      }
    }
  }

 private:
  // Tokens [t, result) follow each other in one sequence and share the pages that they read.
  int end_of_stretch(int t, int end) const {
    const int64_t position = places_.position(t);
    int next = t + 1;
    while (next < end && places_.sequence(next) == places_.sequence(t) &&
           places_.position(next) == position + next - t) {
      ++next;
    }
    return next;
  }

  // What a token at `position` sees first.
  int oldest(int position) const { return f_.window ? std::max(0, position + 1 - f_.window) : 0; }

  AttentionArgs args(int t, int g, const int32_t* pages) const {
    AttentionArgs out = args_;
    out.q = q_.row(t) + int64_t{g} * group_ * f_.head_dim;
    out.k_cache = k_cache_.data + int64_t{g} * f_.head_dim * kPage;
    out.v_cache = v_cache_.data + int64_t{g} * f_.head_dim * kPage;
    out.pages = pages;
    return out;
  }

  void whole(int t, int end, int g, float* scratch) const {
    const int position = places_.position(t);
    const int32_t* pages = places_.pages(t, oldest(position), position + end - t);
    float* y = y_.row(t) + int64_t{g} * group_ * f_.head_dim;
    kernels_.attention(args(t, g, pages), y, y_.stride, end - t, position, scratch);
  }

  void partial(int t, int g, int split, float* scratch) const {
    const int position = places_.position(t);
    const int first = oldest(position), length = position + 1 - first;
    const auto border = [&](int64_t s) { return first + static_cast<int>(length * s / f_.splits); };
    const int begin = border(split), end = border(split + 1);
    const int32_t* pages = places_.pages(t, begin, end);
    const int64_t column = (int64_t{g} * f_.splits + split) * group_ * (f_.head_dim + 2);
    kernels_.attention_partial(args(t, g, pages), y_.row(t) + column, begin, end, scratch);
  }

  AttentionFields f_;
  const Kernels& kernels_;
  Count count_;
  Cache k_cache_, v_cache_;
  Places places_;
  int group_;
  Floats q_, y_;
  AttentionArgs args_;
};

class CombineTask final : public Task {
 public:
  CombineTask(const Operands& in, const CombineFields& f, const Kernels& kernels)
      : f_(f), kernels_(kernels), count_(in, f.counts, 0, f.rows) {
    in.require(f.kv_heads > 0 && f.heads > 0 && f.heads % f.kv_heads == 0,
               "its heads are no multiple of kv_heads");
    in.require(f.splits > 0 && f.head_dim > 0, "its shares are not positive");
    in.require(f.parts == 1,
               "its tiles are parts of heads, which only machines with rings are given");
    part_ = in.floats(f.part, f.rows, int64_t{f.heads} * f.splits * (f.head_dim + 2));
    y_ = in.floats(f.y, f.rows, int64_t{f.heads} * f.head_dim);
  }

  int tiles() const override { return f_.rows * f_.heads; }

  void run(int lo, int hi, float*) const override {
    const int group = f_.heads / f_.kv_heads, width = f_.head_dim + 2;
    hi = std::min(hi, count_() * f_.heads);
    for (int tile = lo; tile < hi; ++tile) {
      const int t = tile / f_.heads, head = tile % f_.heads;
      const int64_t first = int64_t{head / group} * f_.splits * group + head % group;
      kernels_.combine(y_.row(t) + int64_t{head} * f_.head_dim, part_.row(t) + first * width,
                       f_.splits, group, f_.head_dim);
    }
  }

 private:
  CombineFields f_;
  const Kernels& kernels_;
  Count count_;
  Floats part_, y_;
};

class ArgmaxTask final : public Task {
 public:
  ArgmaxTask(const Operands& in, const ArgmaxFields& f, const Kernels& kernels)
      : f_(f), kernels_(kernels), count_(in, f.counts, 1, f.rows) {
    in.require(f.chunk > 0, "its tiles are not positive");
    logits_ = in.floats(f.logits, f.rows, f.vocab);
    part_ = in.floats(f.part, f.rows, 2 * int64_t{ceil_div(f.vocab, f.chunk)});
  }

  int tiles() const override { return ceil_div(f_.vocab, f_.chunk); }

  void run(int lo, int hi, float*) const override {
    const int rows = count_();
    for (int row = 0; row < rows; ++row) {
      for (int tile = lo; tile < hi; ++tile) {
        const int begin = tile * f_.chunk, length = std::min(f_.chunk, f_.vocab - begin);
        const int best = begin + kernels_.argmax(logits_.row(row) + begin, length);
        part_.row(row)[2 * tile] = logits_.row(row)[best];
        part_.row(row)[2 * tile + 1] = static_cast<float>(best);  // exact up to 2^24
      }
    }
  }

 private:
  ArgmaxFields f_;
  const Kernels& kernels_;
  Count count_;
  Floats logits_, part_;
};

// Chunks are in id order: the first of equal values has the lowest id.
int32_t best_of(const float* part, int chunks) {
  int best = 0;
  for (int chunk = 1; chunk < chunks; ++chunk) {
    if (part[2 * chunk] > part[2 * best]) best = chunk;
  }
  return static_cast<int32_t>(part[2 * best + 1]);
}

class NextTokenTask final : public Task {
 public:
  NextTokenTask(const Operands& in, const NextTokenFields& f, const Kernels&)
      : f_(f), count_(in, f.counts, 1, f.rows) {
    part_ = in.floats(f.part, f.rows, 2 * int64_t{f.chunks});
    sampled_ = in.ints(f.sampled, 1, f.rows);
    tokens_ = f.feed ? in.ints(f.tokens, 1, f.rows) : nullptr;
    positions_ = f.feed ? in.ints(f.positions, 1, f.rows) : nullptr;
  }

  int tiles() const override { return 1; }

  void run(int lo, int hi, float*) const override {
    const int rows = lo < hi ? count_() : 0;
    for (int row = 0; row < rows; ++row) {
      sampled_[row] = best_of(part_.row(row), f_.chunks);
      if (!f_.feed) continue;
      tokens_[row] = sampled_[row];
      positions_[row] += 1;
    }
  }

 private:
  NextTokenFields f_;
  Count count_;
  Floats part_;
  int32_t *sampled_, *tokens_, *positions_;
};

class AcceptTask final : public Task {
 public:
  AcceptTask(const Operands& in, const AcceptFields& f, const Kernels&)
      : f_(f), count_(in, f.counts, 1, f.rows) {
    part_ = in.floats(f.part, f.rows, 2 * int64_t{f.chunks});
    sampled_ = in.ints(f.sampled, 1, f.rows);
    tokens_ = in.ints(f.tokens, 1, f.rows);
    positions_ = in.ints(f.positions, 1, f.rows);
    following_ = in.ints(f.following, 1, f.rows);
    places_ = in.ints(f.places, 1, f.rows);
    kept_ = in.ints(f.kept, 1, 2);
    last_ = in.ints(f.last, 1, 1);
    place_ = in.ints(f.place, 1, 1);
  }

  int tiles() const override { return 1; }

  void run(int lo, int hi, float*) const override {
    const int rows = lo < hi ? count_() : 0;
    if (rows == 0) return;
    for (int row = 0; row < rows; ++row) {
      following_[row] = best_of(part_.row(row), f_.chunks);
      places_[row] = positions_[row];
    }
    int right = 0;
    while (right + 1 < rows && tokens_[right + 1] == following_[right]) ++right;
    for (int row = 0; row < f_.rows; ++row) sampled_[row] = row <= right ? following_[row] : -1;
    for (int row = 0; row < rows; ++row) positions_[row] += right + 1;
    tokens_[0] = following_[right];
    kept_[0] = right + 1;
    kept_[1] = 1;
    *last_ = right;
    *place_ = places_[right];
  }

 private:
  AcceptFields f_;
  Count count_;
  Floats part_;
  int32_t *sampled_, *tokens_, *positions_, *following_, *places_, *kept_, *last_, *place_;
};

class GuessTask final : public Task {
 public:
  GuessTask(const Operands& in, const GuessFields& f, const Kernels&) : f_(f) {
    part_ = in.floats(f.part, 1, 2 * int64_t{f.chunks});
    sampled_ = in.ints(f.sampled, 1, 1);
    tokens_ = in.ints(f.tokens, 1, int64_t{f.column} + 1);
    positions_ = in.ints(f.positions, 1, 1);
  }

  int tiles() const override { return 1; }

  void run(int lo, int hi, float*) const override {
    if (lo == hi) return;
    *sampled_ = tokens_[f_.column] = best_of(part_.row(0), f_.chunks);
    *positions_ += 1;
  }

 private:
  GuessFields f_;
  Floats part_;
  int32_t *sampled_, *tokens_, *positions_;
};

template <class Made, class Fields>
std::unique_ptr<Task> make(const Program& program, int op, const Memory& memory,
                           const Kernels& kernels) {
  return std::make_unique<Made>(Operands(program, op, memory), program.fields<Fields>(op), kernels);
}

}  // namespace

std::unique_ptr<Task> make_task(const Program& p, int op, const Memory& memory, const Kernels& k) {
  switch (p.opcode(op)) {
    case Opcode::kLinear:
      return make<LinearTask, LinearFields>(p, op, memory, k);
    case Opcode::kNorm:
      return make<NormTask, NormFields>(p, op, memory, k);
    case Opcode::kEmbed:
      return make<EmbedTask, EmbedFields>(p, op, memory, k);
    case Opcode::kRope:
      return make<RopeTask, RopeFields>(p, op, memory, k);
    case Opcode::kAttention:
      return make<AttentionTask, AttentionFields>(p, op, memory, k);
    case Opcode::kCombine:
      return make<CombineTask, CombineFields>(p, op, memory, k);
    case Opcode::kArgmax:
      return make<ArgmaxTask, ArgmaxFields>(p, op, memory, k);
    case Opcode::kNextToken:
      return make<NextTokenTask, NextTokenFields>(p, op, memory, k);
    case Opcode::kAccept:
      return make<AcceptTask, AcceptFields>(p, op, memory, k);
    case Opcode::kGuess:
      return make<GuessTask, GuessFields>(p, op, memory, k);
    case Opcode::kRoute:
      return make_route(Operands(p, op, memory), p.fields<RouteFields>(op), k);
    case Opcode::kExpertGate:
      return make_expert_gate(Operands(p, op, memory), p.fields<ExpertGateFields>(op), k);
    case Opcode::kExpertDown:
      return make_expert_down(Operands(p, op, memory), p.fields<ExpertDownFields>(op), k);
    case Opcode::kLatentAppend:
      return make_latent_append(Operands(p, op, memory), p.fields<LatentAppendFields>(op), k);
    case Opcode::kLatentAttention:
      return make_latent_attention(Operands(p, op, memory), p.fields<LatentAttentionFields>(op), k);
    case Opcode::kIndexRope:
      return make_index_rope(Operands(p, op, memory), p.fields<IndexRopeFields>(op), k);
    case Opcode::kIndexScore:
      return make_index_score(Operands(p, op, memory), p.fields<IndexScoreFields>(op), k);
    case Opcode::kSelect:
      return make_select(Operands(p, op, memory), p.fields<SelectFields>(op));
  }
  throw std::runtime_error("op " + std::to_string(op) + " has an opcode that the CPU does not run");
}

const char* op_name(Opcode code) {
  switch (code) {
    case Opcode::kLinear:
      return "linear";
    case Opcode::kNorm:
      return "norm";
    case Opcode::kEmbed:
      return "embed";
    case Opcode::kRope:
      return "rope";
    case Opcode::kAttention:
      return "attention";
    case Opcode::kCombine:
      return "combine";
    case Opcode::kArgmax:
      return "argmax";
    case Opcode::kNextToken:
      return "next token";
    case Opcode::kAccept:
      return "accept";
    case Opcode::kGuess:
      return "guess";
    case Opcode::kRoute:
      return "route";
    case Opcode::kExpertGate:
      return "expert gate";
    case Opcode::kExpertDown:
      return "expert down";
    case Opcode::kLatentAppend:
      return "latent append";
    case Opcode::kLatentAttention:
      return "latent attention";
    case Opcode::kIndexRope:
      return "index rope";
    case Opcode::kIndexScore:
      return "index score";
    case Opcode::kSelect:
      return "select";
  }
  return "unknown";
}

}  // namespace tilert
