// The caches of this back end are pages of whole rows: [page, 64, lora + rope] f32, or packed ones.
#include "mla.h"

#include <algorithm>

#include "state.h"

namespace tilert {
namespace {

constexpr int kChosenUnit = 16;  // CHOSEN_UNIT of ops/mla.py

template <class Fields>
PagedRows latent_cache(const Operands& in, const Fields& f) {
  if (f.packed) return in.rows(f.latent_cache, DType::kU8, PackedRow{f.lora, f.rope}.bytes());
  return in.rows(f.latent_cache, DType::kF32, int64_t{f.lora} + f.rope);
}

class LatentAppendTask final : public Task {
 public:
  LatentAppendTask(const Operands& in, const LatentAppendFields& f, const Kernels& kernels)
      : f_(f),
        kernels_(kernels),
        count_(in, f.counts, 0, f.rows),
        cache_(latent_cache(in, f)),
        places_(in, f, cache_.pages) {
    in.require(f.rope > 0 && f.rope % 2 == 0 && f.kv_col >= 0,
               "its columns cannot be rotated in pairs");
    in.require(f.context <= int64_t{f.page_cols} * kPage,
               "its context has more pages than its table");
    kv_ = in.floats(f.kv, f.rows, int64_t{f.kv_col} + f.lora + f.rope);
    weight_ = in.weight(f.weight, 1, f.lora);
    table_ = in.floats(f.table, f.context, f.rope);
  }

  int tiles() const override { return 1; }
  size_t scratch_bytes() const override { return (f_.lora + 2 * size_t(f_.rope)) * sizeof(float); }

  void run(int, int, float* scratch) const override {
    const int tokens = count_();
    for (int t = 0; t < tokens; ++t) {
      const int position = checked(places_.position(t), f_.context, "position");
      const float* angles = table_.row(position);
      const int64_t page = places_.pages(t, position, position + 1)[position / kPage];
      char* to = cache_.at(page, position);
      float* row = f_.packed ? scratch + f_.rope : reinterpret_cast<float*>(to);
      const float* kv = kv_.row(t) + f_.kv_col;
      kernels_.norm(row, kv, weight_, f_.lora, f_.eps);
      rotate(kernels_, row + f_.lora, kv + f_.lora, angles, f_.rope, f_.interleave, scratch);
      if (f_.packed) kernels_.latent_pack(to, row, {f_.lora, f_.rope});
    }
  }

 private:
  LatentAppendFields f_;
  const Kernels& kernels_;
  Count count_;
  PagedRows cache_;
  Places places_;
  Floats kv_, table_;
  Weight weight_;
};

class LatentAttentionTask final : public Task {
 public:
  LatentAttentionTask(const Operands& in, const LatentAttentionFields& f, const Kernels& kernels)
      : f_(f),
        kernels_(kernels),
        count_(in, f.counts, 0, f.rows),
        cache_(latent_cache(in, f)),
        places_(in, f, cache_.pages) {
    in.require(f.tile_heads > 0 && f.heads > 0 && f.heads % f.tile_heads == 0,
               "its heads are no multiple of those of a tile");
    in.require(f.splits > 0 && f.block > 0, "its tiles are not positive");
    in.require((f.selected >= 0) == (f.topk > 0), "it selects none of its positions");
    in.require(f.rope > 0 && f.rope % 2 == 0 && f.nope > 0 && f.q_col >= 0,
               "its columns cannot be rotated in pairs");
    in.require(f.context <= int64_t{f.page_cols} * kPage,
               "its context has more pages than its table");
    q_ = in.floats(f.q, f.rows, int64_t{f.heads} * f.lora);
    table_ = in.floats(f.table, f.context, f.rope);
    q_rope_ = in.floats(f.q_rope, f.rows, f.q_col + int64_t{f.heads} * (f.nope + f.rope));
    y_ = in.floats(f.y, f.rows, f.heads * width());
    selected_ = f.selected < 0 ? nullptr : in.ints(f.selected, f.rows, f.topk);
    args_ = {.ldq = f.rope,
             .heads = f.tile_heads,
             .lora = f.lora,
             .rope = f.rope,
             .scale = f.scale,
             .rounded = f.packed != 0};
  }

  int tiles() const override { return ceil_div(f_.rows, f_.block) * groups() * f_.splits; }

  size_t scratch_bytes() const override {
    const size_t rows = f_.packed ? size_t{kPage} * (f_.lora + f_.rope) : 0;
    return (rotated_floats() + state_floats() + rows) * sizeof(float);
  }

  void run(int lo, int hi, float* scratch) const override {
    const int tokens = count_();
    for (int tile = lo; tile < hi; ++tile) {
      const int split = tile % f_.splits, g = tile / f_.splits % groups();
      const int begin = tile / (f_.splits * groups()) * f_.block;
      for (int t = begin; t < std::min(begin + f_.block, tokens); ++t) token(t, g, split, scratch);
    }
  }

 private:
  int groups() const { return f_.heads / f_.tile_heads; }

  // The rotated columns of the heads of a tile, and what `rotate` needs.
  size_t rotated_floats() const { return padded((f_.tile_heads + size_t{1}) * f_.rope); }

  // What latent_rows needs; unpacked rows lie behind it.
  size_t state_floats() const {
    return padded(kernels_.latent_scratch(f_.tile_heads, f_.lora, f_.rope));
  }

  // Columns of y of one head, all shares together.
  int64_t width() const { return f_.splits == 1 ? f_.lora : int64_t{f_.splits} * (f_.lora + 2); }

  void token(int t, int g, int split, float* scratch) const {
    const int first = g * f_.tile_heads, head = f_.nope + f_.rope;
    const int visible = checked(places_.position(t), f_.context, "position") + 1;
    LatentArgs args = args_;
    args.q = q_.row(t) + int64_t{first} * f_.lora;
    args.q_rope = scratch;
    const float* from = q_rope_.row(t) + f_.q_col + int64_t{first} * head + f_.nope;
    for (int i = 0; i < f_.tile_heads; ++i)
      rotate(kernels_, scratch + int64_t{i} * f_.rope, from + int64_t{i} * head,
             table_.row(visible - 1), f_.rope, f_.interleave,
             scratch + int64_t{f_.tile_heads} * f_.rope);
    scratch += rotated_floats();
    kernels_.latent_begin(args, scratch);
    if (selected_) {
      chosen(args, t, std::min(f_.topk, visible), split, scratch);
    } else {
      pages(args, t, visible, split, scratch);
    }
    float* y = y_.row(t) + first * width() + int64_t{split} * (f_.lora + 2);
    kernels_.latent_end(args, y, width(), f_.splits > 1, scratch);
  }

  const char* row(const int32_t* pages, int position) const {
    return cache_.at(checked(pages[position / kPage], cache_.pages, "page"), position);
  }

  // Attention to n <= kPage rows, which are used where they lie unless they are packed.
  void take(const LatentArgs& args, const char* const* rows, int n, float* scratch) const {
    const float* taken[kPage];
    float* unpacked = scratch + state_floats();
    for (int s = 0; s < n; ++s, unpacked += f_.lora + f_.rope) {
      taken[s] = f_.packed ? unpacked : reinterpret_cast<const float*>(rows[s]);
      if (f_.packed) kernels_.latent_unpack(unpacked, rows[s], {f_.lora, f_.rope});
    }
    kernels_.latent_rows(args, taken, n, scratch);
  }

  // The pages of a share, as page_share of ops/attend.py deals them out.
  void pages(const LatentArgs& args, int t, int visible, int split, float* scratch) const {
    const int32_t* table = places_.pages(t);
    const char* rows[kPage];
    for (int page = 0; page * kPage < visible; ++page) {
      if ((page + page / f_.splits) % f_.splits != split) continue;
      const int n = std::min(kPage, visible - page * kPage);
      const char* begin = row(table, page * kPage);
      for (int s = 0; s < n; ++s) rows[s] = begin + s * cache_.row_bytes;
      take(args, rows, n, scratch);
    }
  }

  // An even part of the first `count` positions that were selected, in whole units.
  void chosen(const LatentArgs& args, int t, int count, int split, float* scratch) const {
    const int32_t *table = places_.pages(t), *positions = selected_ + int64_t{t} * f_.topk;
    const int64_t units = ceil_div(count, kChosenUnit);
    const auto border = [&](int64_t s) {
      return std::min(count, static_cast<int>(units * s / f_.splits) * kChosenUnit);
    };
    const char* rows[kPage];
    for (int i = border(split); i < border(split + 1);) {
      const int n = std::min(kPage, border(split + 1) - i);
      for (int s = 0; s < n; ++s, ++i) {
        rows[s] = row(table, checked(positions[i], int64_t{f_.page_cols} * kPage, "position"));
      }
      take(args, rows, n, scratch);
    }
  }

  LatentAttentionFields f_;
  const Kernels& kernels_;
  Count count_;
  PagedRows cache_;
  Places places_;
  Floats q_, q_rope_, table_, y_;
  const int32_t* selected_;
  LatentArgs args_;
};

}  // namespace

std::unique_ptr<Task> make_latent_append(const Operands& in, const LatentAppendFields& f,
                                         const Kernels& kernels) {
  return std::make_unique<LatentAppendTask>(in, f, kernels);
}

std::unique_ptr<Task> make_latent_attention(const Operands& in, const LatentAttentionFields& f,
                                            const Kernels& kernels) {
  return std::make_unique<LatentAttentionTask>(in, f, kernels);
}

}  // namespace tilert
