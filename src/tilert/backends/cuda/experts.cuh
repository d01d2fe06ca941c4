// Mixtures of experts: which experts a token goes to, and where the rows of the chosen ones lie.
// The products with them are Linear's, whose Source tells the loader, once a choice is there, from
// which matrices of a bank the rows of a run come.
#pragma once
#include "linear.cuh"

// Lane i knows the i-th of the chosen experts of each token.
template <int kCount>
struct Chosen {
  u32 own[kTokens];
  static __device__ __forceinline__ Chosen of(const Run& run) {
    const u32* chosen = reinterpret_cast<const u32*>(run.bias_up);
    Chosen all;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      all.own[t] = load_relaxed(chosen + t * kCount + min(lane(), kCount - 1)) >> kChoiceShift;
    return all;
  }
  // An earlier run of the queue has waited for it, as the loader has.
  static __device__ __forceinline__ bool known(const Run& run) { return choice_known(run); }
  __device__ __forceinline__ u32 of_token(u32 token) const {
    u32 known = own[0];
#pragma unroll
    for (u32 t = 1; t < kTokens; ++t) known = t == token ? own[t] : known;
    return known;
  }
};

// Where a choice names the rows: each token has others, and a unit is of one token. It is
// multiplied with x' of all tokens, which the registers hold side by side as they do elsewhere.
template <int kCount>
struct OfChosen : Straight {
  static constexpr bool kChosen = true, kOfToken = kTokens > 1;
  static constexpr u32 kNumbers = kCount;
  static_assert(kCount <= kMaxChosen, "a lane has one expert");
  using Choice = Chosen<kCount>;
  static __device__ __forceinline__ Choice choice(const Run& run) { return Choice::of(run); }
  static __device__ __forceinline__ bool known(const Run& run) { return Choice::known(run); }
  static __device__ __forceinline__ bool leaves(int token, int only) {
    return !kOfToken || token == only;
  }
  static __device__ __forceinline__ bool ready(Loader& l, const Run& run) {
    return l.choose(run, kCount * kTokens);
  }
  static __device__ __forceinline__ u32 expert(const Block& b, u32 token, u32 slot) {
    return load_shared(&b.shared.chosen[token * kCount + slot]);
  }
};

// Rows of the chosen matrices of kRows rows, one matrix after another: the outputs of all follow
// one another. Each matrix begins a tile, so where kRows is not whole tiles, rows of a run are
// skipped.
template <int kRows, int kTileRows, int kCount>
struct InTurn : OfChosen<kCount> {
  using Choice = Chosen<kCount>;
  static constexpr int kPitch = (kRows + kTileRows - 1) / kTileRows * kTileRows;
  static __device__ __forceinline__ u32 slot(const Run& run, u32 row) {
    return (run.first + row) / kPitch;
  }
  static __device__ __forceinline__ u32 in_matrix(const Run& run, u32 row) {
    return (run.first + row) % kPitch;
  }

  static __device__ __forceinline__ u32 stored(const Block& b, const Run& run, u32 row, u32 token,
                                               int) {
    return InTurn::expert(b, token, slot(run, row)) * kRows + in_matrix(run, row);
  }
  static __device__ __forceinline__ u32 rows(const Run& run, u32 row, u32 tile_rows) {
    return min(tile_rows, kRows - in_matrix(run, row));
  }

  static __device__ __forceinline__ bool inside(const Run& run, u32 row) {
    return row < run.count && in_matrix(run, row) < kRows;
  }
  static __device__ __forceinline__ u32 output(const Run& run, u32 row) {
    return slot(run, row) * kRows + in_matrix(run, row);
  }
  template <u32 kStride>
  static __device__ __forceinline__ bool pairs(const Run& run, u32 row) {
    return in_matrix(run, row) % kStride == 0 && in_matrix(run, row) + kTileRows < kPitch;
  }
  template <u32 kBlockRows>
  static __device__ __forceinline__ u32 scale_group(const Run& run, u32 row) {
    return slot(run, row) * kBlocks<kBlockRows> + in_matrix(run, row) / kBlockRows;
  }
  template <u32 kBlockRows>
  static __device__ __forceinline__ u32 scale_row(u32 own, u32 group, int) {
    constexpr u32 kEach = kBlocks<kBlockRows>;
    return __shfl_sync(~0u, own, group / kEach % kCount) * kEach + group % kEach;
  }

 private:
  template <u32 kBlockRows>
  static constexpr u32 kBlocks = (kRows + kBlockRows - 1) / kBlockRows;  // of scales in a matrix
};

// Rows of which each chosen matrix, of kRows rows, has a part: the sum over all of them.
template <int kRows, int kCount>
struct SideBySide : OfChosen<kCount> {
  using Choice = Chosen<kCount>;
  static constexpr int kParts = kCount;
  static __device__ __forceinline__ u32 stored(const Block& b, const Run& run, u32 row, u32 token,
                                               int part) {
    return SideBySide::expert(b, token, part) * kRows + run.first + row;
  }
  template <u32 kBlockRows>
  static __device__ __forceinline__ u32 scale_row(u32 own, u32 group, int part) {
    constexpr u32 kBlocks = (kRows + kBlockRows - 1) / kBlockRows;
    return __shfl_sync(~0u, own, part) * kBlocks + group;
  }
};

enum Scoring { kSoftmax = 0, kSigmoid = 1 };

// The choice for each token, by a warp; see ops/experts.py. Lane l has the experts l, l + 32, ...
template <int kExperts, int kTopK, int kNGroup, int kTopkGroup, int kScoring, bool kNormTopkProb,
          u32 kFactorBits, bool kTagged, class Bias>
struct Route {
  static constexpr int kEach = (kExperts + 31) / 32, kGroupSize = kExperts / kNGroup;
  static_assert(kTopK <= kMaxChosen && kNGroup <= 32,
                "a lane has one of the chosen, and one group");
  static_assert(kNGroup == 1 || kTokens * kExperts * 4 <= kScratchBytes, "scratch is too small");

  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    float bias[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      bias[i] = Bias::kGiven && inside(i)
                    ? Bias::widen(
                          __ldg(reinterpret_cast<const typename Bias::Bits*>(run.norm) + expert(i)))
                    : 0;
    if (!wait_for_inputs<kTagged>(b, run)) return false;
    const u32 token = run.first + warp();
    if (token < run.first + run.count) choose(b, run, token, bias);
    if constexpr (kTokens > 1)
      sync_consumers();
    else
      __syncwarp();
    if (thread() == 0) signal<kChoiceTagged>(b, run);
    if constexpr (kTokens == 1 && kNGroup > 1 && kGroupSize != 32)
      sync_consumers();  // the scratch memory is free
    return true;
  }

 private:
  static __device__ __forceinline__ int expert(int i) { return i * 32 + lane(); }
  static __device__ __forceinline__ bool inside(int i) {
    return kExperts % 32 == 0 || expert(i) < kExperts;
  }

  // In the order of floats; 0 is below all of them.
  static __device__ __forceinline__ u32 rising(float v) {
    const u32 bits = __float_as_uint(v + 0.0f);  // both zeros are one
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }

  static __device__ __forceinline__ float risen(u32 key) {  // the float of it
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
  }

  static __device__ __forceinline__ void load_logits(Block& b, const Run& run, u32 token,
                                                     float (&v)[kEach]) {
    const float* from[kEach];
    u32 tags[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      from[i] = inside(i) ? b.at(run.x) + token * kExperts + expert(i) : nullptr;
      tags[i] = b.tag(run.x);
    }
    if constexpr (kTagged) return load_tagged(b, from, tags, v);
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] = from[i] ? load_float(from[i]) : 0;
  }

  // Scores in place of the logits; returned is what the sum of all scores is divided by.
  static __device__ __forceinline__ float score(float (&v)[kEach]) {
    if constexpr (kScoring == kSigmoid) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) v[i] = reciprocal(1 + exp2_fast(-v[i] * kLog2e));
      return 1;
    }
    float most = -infinity(), sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (inside(i)) most = fmaxf(most, v[i]);
#pragma unroll
    for (int o = 16; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      v[i] = inside(i) ? exp2_fast((v[i] - most) * kLog2e) : 0;
      sum += v[i];
    }
    return warp_sum(sum);
  }

  // The largest key of all lanes, and of equal ones the lowest index.
  static __device__ __forceinline__ u32 best(const u32 (&keys)[kEach]) {
    u32 own = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (keys[i] > own) own = keys[i], at = i;
    const u32 most = __reduce_max_sync(~0u, own);
    return __reduce_min_sync(~0u, own == most ? u32(expert(at)) : 0xffffffffu);
  }

  // The two best of group `lane`.
  static __device__ __forceinline__ void find_two(Block& b, u32 token, const float (&v)[kEach],
                                                  float& first, float& second) {
    float* all = reinterpret_cast<float*>(b.scratch) + token * kExperts;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (inside(i)) all[expert(i)] = v[i];
    __syncwarp();
    const int group = min(lane(), kNGroup - 1);
#pragma unroll 4
    for (int i = 0; i < kGroupSize; ++i) {
      const float v = all[group * kGroupSize + (i + lane()) % kGroupSize];  // another bank each
      second = fmaxf(second, fminf(first, v));
      first = fmaxf(first, v);
    }
  }

  // Takes out the experts of all but the best groups: lane g adds up the two best of group g.
  static __device__ __forceinline__ void keep_groups(Block& b, u32 token, const float (&v)[kEach],
                                                     u32 (&keys)[kEach]) {
    float first = -infinity(), second = -infinity();
    if constexpr (kGroupSize == 32) {  // group g is what all lanes have as their g-th
#pragma unroll
      for (int g = 0; g < kNGroup; ++g) {
        const u32 key = rising(v[g]), most = __reduce_max_sync(~0u, key);
        const u32 taken = __reduce_min_sync(~0u, key == most ? u32(lane()) : 0xffffffffu);
        const u32 next = __reduce_max_sync(~0u, u32(lane()) == taken ? 0 : key);
        if (lane() == g) first = risen(most), second = risen(next);
      }
    } else {
      find_two(b, token, v, first, second);
    }
    u32 left = lane() < kNGroup ? rising(first + second) : 0, kept = 0;
#pragma unroll
    for (int n = 0; n < kTopkGroup; ++n) {
      const u32 most = __reduce_max_sync(~0u, left);
      const u32 taken = __reduce_min_sync(~0u, left == most ? u32(lane()) : 0xffffffffu);
      if (u32(lane()) == taken) left = 0;
      kept |= 1u << taken;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (!(kept >> min(expert(i) / kGroupSize, 31) & 1)) keys[i] = 0;
  }

  static __device__ __forceinline__ void choose(Block& b, const Run& run, u32 token,
                                                const float (&bias)[kEach]) {
    float scores[kEach], values[kEach];  // values: in whose order experts are chosen
    load_logits(b, run, token, scores);
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = scores[i] + bias[i];
    const float total = score(scores);
    u32 keys[kEach], picked = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (kScoring == kSigmoid) values[i] = scores[i] + bias[i];
      keys[i] = inside(i) ? max(1u, rising(values[i])) : 0;
    }
    if constexpr (kNGroup > 1) keep_groups(b, token, values, keys);
#pragma unroll 1
    for (int n = 0; n < kTopK; ++n) {
      const u32 taken = best(keys);
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (u32(expert(i)) == taken) keys[i] = 0, picked |= 1u << i;
    }
    const float share = 1 / total;  // one division for all: this warp is alone
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      scores[i] = picked >> i & 1 ? scores[i] * share : 0;
      sum += scores[i];
    }
    float factor = __uint_as_float(kFactorBits);
    if (kNormTopkProb) factor /= warp_sum(sum) + 1e-20f;
    int before = 0;  // chosen experts of lower numbers
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool own = picked >> i & 1;
      const u32 lanes = __ballot_sync(~0u, own);
      const u32 at = token * kTopK + before + __popc(lanes & ((1u << lane()) - 1));
      before += __popc(lanes);
      if (!own) continue;
      const u32 tag = b.tag(run.y);  // of both
      const u32 id = u32(expert(i)) << kChoiceShift | (kChoiceTagged ? tag : 0);
      store_float(b.at(run.y) + at, __uint_as_float(id));
      const float weight = rounded_for_tag(scores[i] * factor);  // with a tag or without
      store_output<kChoiceTagged, false>(b.at(run.x2), at, weight, tag);
    }
  }
};
