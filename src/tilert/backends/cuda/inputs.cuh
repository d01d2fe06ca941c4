// How x', the input of a product, is made of what lies in the arena: copied, normed, or multiplied
// by weights of a choice. Every block makes its own, each thread the elements that it will need.
//
// x' begins `first_x` floats behind run.x: a block-diagonal product takes another part for each
// block. kPitch: from one token's x' to the next one's.
//
// A Layout says which: kRounds pieces of kWide elements; piece r begins at offset(r) of row(r), a
// token, where inside(r), and put(operand, r, values) takes it. Pieces r = i modulo kPair are of
// the i-th row of a thread.
#pragma once
#include "tile.cuh"

template <bool kChecked, int kPitch>
struct Plain {
  static constexpr bool kTagged = kChecked, kNormed = false;
};
// In bf16, as the products take it.
struct Stored {
  static constexpr bool kTagged = false, kNormed = false;
};
// The products are divided by the root of the mean square at their end: see Inputs::factor.
template <bool kChecked, class Type, u32 kEpsBits, int kPitch>
struct Normed {
  static constexpr bool kTagged = kChecked, kNormed = true;
};
// Each kEach elements are multiplied with a number of their own: what is chosen has a weight.
template <bool kChecked, int kEach, int kCount>
struct Weighted {
  static constexpr bool kTagged = false, kNormed = false;  // the weights have no tags
};

// By what a normed row is divided, of the squares that its warps have summed up; inverse: of the
// number of elements.
template <int kRowWarps>
__device__ __forceinline__ float norm_factor(const Block& b, int row, float inverse, float eps) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kRowWarps; ++i) sum += b.shared.squares[i][row];
  return inverse_root(fmaf(sum, inverse, eps));
}

template <class Layout>
struct Inputs {
  static constexpr int kRounds = Layout::kRounds, kWide = Layout::kWide;
  static constexpr int kBatch = kWide >= 64 ? 1 : 64 / kWide;  // rounds whose loads go out together
  using Operand = typename Layout::Operand;
  using Alone = typename Layout::Alone;  // the layout of what is normed

  // Bits of the norm's weight, fetched while the inputs are awaited.
  template <class Input>
  struct Held {};
  template <bool kTagged, class T, u32 kEps, int kPitch>
  struct Held<Normed<kTagged, T, kEps, kPitch>> {
    alignas(16) typename T::Bits v[Alone::kRounds / Alone::kPair][kWide] = {};
  };

  template <class Input>
  static __device__ __forceinline__ void prefetch(const Run&, Held<Input>&) {}
  template <bool kTagged, class T, u32 kEps, int kPitch>
  static __device__ __forceinline__ void prefetch(const Run& run,
                                                  Held<Normed<kTagged, T, kEps, kPitch>>& held) {
    using B = typename T::Bits;
    const B* w = reinterpret_cast<const B*>(run.norm);
#pragma unroll
    for (int h = 0; h < Alone::kRounds / Alone::kPair; ++h) {
      const int r = h * Alone::kPair;
      if (!Alone::inside(r)) continue;
      const B* at = w + Alone::offset(r);
      constexpr int kBytes = kWide * sizeof(B);
      if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i)
          reinterpret_cast<uint4*>(held.v[h])[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
      } else if constexpr (kBytes == 8) {
        reinterpret_cast<uint2*>(held.v[h])[0] = __ldg(reinterpret_cast<const uint2*>(at));
      } else {
#pragma unroll
        for (int i = 0; i < kWide; ++i) held.v[h][i] = __ldg(at + i);
      }
    }
  }

  template <bool kTagged, int kPitch>
  static __device__ __forceinline__ void make(Block& b, const Run& run, u32 first_x,
                                              Held<Plain<kTagged, kPitch>>&, Operand& out) {
    fill<kTagged, kPitch>(b, run, first_x,
                          [&](int round, float (&v)[kWide]) { Layout::put(out, round, v); });
  }

  template <bool kTagged, int kEach, int kCount>
  static __device__ __forceinline__ void make(Block& b, const Run& run, u32 first_x,
                                              Held<Weighted<kTagged, kEach, kCount>>&,
                                              Operand& out) {
    static_assert(kEach % kWide == 0 && kCount * kEach == Layout::kK, "a piece has one weight");
    constexpr int kAll = kCount * kTokens, kOwn = (kAll + 31) / 32;
    float weight[kOwn];  // weight l + 32 i of all tokens is lane l's
    const float* from[kOwn];
    u32 tag[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      from[i] = reinterpret_cast<const float*>(run.bias) + min(lane() + 32 * i, kAll - 1);
      tag[i] = b.tag(run.x3);
      if (!kChoiceTagged) weight[i] = load_float(from[i]);
    }
    if constexpr (kChoiceTagged) load_tagged(b, from, tag, weight);
    fill<kTagged, Layout::kK>(b, run, first_x, [&](int round, float (&v)[kWide]) {
      // Worked out anew each time, or a register would be kept for each round.
      const u32 element = Layout::offset(round) + (kTokens > 1 ? opaque(0) : 0);
      const int at = Layout::inside(round) ? Layout::row(round) * kCount + element / kEach : 0;
      float own = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float other = __shfl_sync(~0u, weight[i], at % 32);
        own = at / 32 == i ? other : own;
      }
#pragma unroll
      for (int i = 0; i < kWide; ++i) v[i] *= own;
      Layout::put(out, round, v);
    });
  }

  template <class L = Layout>
  static __device__ __forceinline__ void make(Block& b, const Run& run, u32, Held<Stored>&,
                                              Operand& out) {
    L::load_stored(reinterpret_cast<const u16*>(b.at(run.x)), out);
  }

  template <bool kTagged, class T, u32 kEps, int kPitch>
  static __device__ __forceinline__ void make(Block& b, const Run& run, u32 first_x,
                                              Held<Normed<kTagged, T, kEps, kPitch>>& held,
                                              Operand& out) {
    if constexpr (Layout::kStaged)
      stage<kTagged, T, kPitch>(b, run, first_x, held.v, out);
    else
      norm<kTagged, T, kPitch>(b, run, first_x, held.v, out);
  }

  // What the products of a row are multiplied with; behind a barrier after make().
  template <class Input>
  struct Factor {
    static __device__ __forceinline__ float of(const Block&, int) { return 1; }
  };
  template <bool kTagged, class T, u32 kEps, int kPitch>
  struct Factor<Normed<kTagged, T, kEps, kPitch>> {
    static __device__ __forceinline__ float of(const Block& b, int row) {
      return norm_factor<Layout::kRowWarps>(b, row, 1.0f / Layout::kK, __uint_as_float(kEps));
    }
  };

 private:
  // x' times the norm's weight, and the squares of x of each token for Factor.
  template <bool kTagged, class T, int kPitch, class Weight>
  static __device__ __forceinline__ void norm(Block& b, const Run& run, u32 first_x,
                                              const Weight& weight, Operand& out) {
    float sums[Layout::kPair][Layout::kParts];
    fill<kTagged, kPitch>(b, run, first_x, [&](int round, float (&v)[kWide]) {
      if (round == 0)  // again where words are read again
#pragma unroll
        for (int i = 0; i < Layout::kPair * Layout::kParts; ++i)
          sums[i / Layout::kParts][i % Layout::kParts] = 0;
      float& sum = sums[round % Layout::kPair][Layout::part(round)];
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        sum = fmaf(v[i], v[i], sum);
        v[i] = Layout::inside(round) ? v[i] * T::widen(weight[round / Layout::kPair][i]) : 0;
      }
      if constexpr (kRounds > 16)
        compute_here(sum);  // put off, it would keep all pieces in registers
      Layout::put(out, round, v);
    });
#pragma unroll
    for (int i = 0; i < Layout::kPair; ++i) {
      const float sum = row_sum(sums[i]);
      if (lane() % 4 == 0 && lane() / 4 < kTokens && lane() / 4 == Layout::row(i))
        b.shared.squares[warp()][lane() / 4] = sum;
    }
  }

  // The same of several tokens for the matrix units, some at a time. Each is taken as if it were
  // alone, so that its squares are summed in that order; then the lanes of a warp exchange what
  // they have made. In a loop: unrolled, this is half of an op's code, for all that it runs once.
  template <bool kTagged, class T, int kPitch, class Weight>
  static __device__ __forceinline__ void stage(Block& b, const Run& run, u32 first_x,
                                               const Weight& weight, Operand& out) {
    using Staged = typename Layout::Staged;
    constexpr int kAtOnce = Staged::kAtOnce;
    const float* from = b.at(run.x) + first_x;
    using Rows = Values[kAtOnce][Alone::kRounds];
    Rows v;
    out.clear();
#pragma unroll 1
    for (int first = 0; first < kTokens; first += kAtOnce, from += kAtOnce * kPitch) {
      load_rows<kPitch>(from, v);
      if constexpr (kTagged) check<kPitch>(b, from, b.tag(run.x), v);
      float sums[kAtOnce];
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        float parts[Alone::kParts] = {};
#pragma unroll
        for (int r = 0; r < Alone::kRounds; ++r) {
          float& sum = parts[Alone::part(r)];
#pragma unroll
          for (int i = 0; i < kWide; ++i) {
            sum = fmaf(v[t][r][i], v[t][r][i], sum);
            v[t][r][i] = Alone::inside(r) ? v[t][r][i] * T::widen(weight[r][i]) : 0;
          }
          Staged::put(b, t, r, v[t][r]);
        }
        sums[t] = part_sum<Alone>(parts);
      }
      constexpr int kShare = 32 / kAtOnce;  // lanes that get the sum of a token
      const float sum = warp_sums(sums);
      if (lane() % kShare == 0) b.shared.squares[warp()][first + lane() / kShare] = sum;
      __syncwarp();
      Staged::take(b, first, out);
      __syncwarp();
    }
  }

  using Values = float[kWide];
  template <int kRows, class Do>
  static __device__ __forceinline__ void each(const Values (&)[kRows][Alone::kRounds], Do act) {
#pragma unroll
    for (int t = 0; t < kRows; ++t)
#pragma unroll
      for (int r = 0; r < Alone::kRounds; ++r)
#pragma unroll
        for (int i = 0; i < kWide; ++i) act(t, r, i);
  }

  // What this thread takes of kRows tokens that are normed.
  template <int kPitch, int kRows>
  static __device__ __forceinline__ void load_rows(const float* from,
                                                   Values (&v)[kRows][Alone::kRounds]) {
#pragma unroll
    for (int t = 0; t < kRows; ++t)
#pragma unroll
      for (int r = 0; r < Alone::kRounds; ++r) load<Alone, kPitch>(from + t * kPitch, r, v[t][r]);
  }
  // Words that have come, without their tags; again while those say that some are late.
  template <int kPitch, int kRows>
  static __device__ __forceinline__ void check(const Block& b, const float* from, u32 tag,
                                               Values (&v)[kRows][Alone::kRounds]) {
    Retry retry;
    for (;;) {
      u32 other = 0;
      each(v, [&](int t, int r, int i) {
        if (Alone::inside(r)) other |= other_tag(v[t][r][i], tag);
      });
      if (!other || retry.in_vain(b, tag)) break;
      load_rows<kPitch>(from, v);
    }
    each(v, [&](int t, int r, int i) { v[t][r][i] = untagged(v[t][r][i]); });
  }

  // The sum of a row over all lanes of a warp, for those that hold it. Parts are what lanes are
  // where there are fewer tokens, so the order of the sum is the same for any number of them.
  static __device__ __forceinline__ float row_sum(float (&parts)[Layout::kParts]) {
    float sum = part_sum<Layout>(parts);
#pragma unroll
    for (int o = 16; o >= 4 * Layout::kWidth; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
#pragma unroll
    for (int o = 4; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    return sum;
  }

  template <class L>
  static __device__ __forceinline__ float part_sum(float (&parts)[L::kParts]) {
#pragma unroll
    for (int n = L::kParts / 2; n; n /= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
    return parts[0];
  }

  // Loads all pieces of this thread, again while tags say that some are late, and gives each to
  // take(round, values).
  template <bool kTagged, int kPitch, class Take>
  static __device__ __forceinline__ void fill(const Block& b, const Run& run, u32 first_x,
                                              Take take) {
    const float* from = b.at(run.x) + first_x;
    const u32 tag = b.tag(run.x);
    Retry retry;
    for (bool again = true; again;) {
      u32 other = 0;
#pragma unroll
      for (int first = 0; first < kRounds; first += kBatch) {
        float v[kBatch][kWide];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (first + i < kRounds) load<Layout, kPitch>(from, first + i, v[i]);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i >= kRounds) continue;
          if constexpr (kTagged) {
#pragma unroll
            for (int e = 0; e < kWide; ++e) {
              if (Layout::inside(first + i)) other |= __float_as_uint(v[i][e]) ^ tag;
              v[i][e] = untagged(v[i][e]);
            }
          }
          take(first + i, v[i]);
        }
      }
      // All lanes go on together: put() exchanges words between them.
      again = kTagged && __any_sync(~0u, (other & kTagMask) != 0) &&
              !__any_sync(~0u, retry.in_vain(b, tag));
    }
  }

  template <class L, int kPitch>
  static __device__ __forceinline__ void load(const float* from, int round, float (&v)[kWide]) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] = 0;
    if (!L::inside(round)) return;
    const float* at = from + L::row(round) * kPitch + L::offset(round);
    if constexpr (kWide % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWide; i += 4) {
        float4 four = load_float4(at + i);
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWide; ++i) v[i] = load_float(at + i);
    }
  }
};
