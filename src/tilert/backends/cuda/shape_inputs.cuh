// x' of products of all shapes (shapes.cuh), in shared memory: of each token a 16th of its elements
// in f16. A block's elements lie as lanes read them: 8 of each quad, then the other 8, and in every
// other block the two halves are exchanged, so that lanes of two segments read from all banks.
#pragma once
#include "experts.cuh"
#include "shape.cuh"

// kChosen: x' of what a choice names may take the weights of the choice.
template <bool kChosen>
struct ShapeInputs {
  static constexpr int kLane = 16, kBlock = 4 * kLane, kHalf = kBlock / 2;  // elements
  static constexpr float kInputFactor = 1 / 16.0f;
  static constexpr u32 kPad = 32;  // elements behind each token's x: no two in the same banks

  static __device__ __forceinline__ u16* x(Block& b) { return reinterpret_cast<u16*>(b.scratch); }
  static __device__ __forceinline__ u32 place(u32 block, u32 quad) {
    return block * kBlock + (block & 1) * kHalf + quad * 8;  // the other half: exclusive or kHalf
  }

  // meanwhile: done once, while the first loads are under way.
  template <class Meanwhile>
  static __device__ __forceinline__ void make(const Here& me, Block& b, const Run& run,
                                              const Shape& s, u32 first, Meanwhile meanwhile) {
    const u32 first_x =
        s.rows == kDiagonal ? quotient(run.first + first, s.bank_inverse) * s.x_stride : 0;
    float sums[kTokens] = {};  // of squares
    bool begun = false;
    const auto begin = [&] {
      if (!begun) meanwhile();
      begun = true;
    };
    Turn turn(me);
#pragma unroll 1
    while (turn.there(s.elements())) make_some(b, run, s, turn, first_x, sums, begin);
    if (!s.normed) return;
#pragma unroll
    for (u32 token = 0; token < kTokens; ++token) {
      const float sum = warp_sum(sums[token]);
      if (me.lane == 0) b.shared.squares[me.warp][token] = sum;
    }
  }

 private:
  static __device__ __forceinline__ u32 pack(float low, float high) {
    return pack_f16(low * kInputFactor, high * kInputFactor);
  }

  // Where a thread is among the elements of all tokens, of which it takes four at a time.
  struct Turn {
    static constexpr u32 kStride = 4 * kThreads;
    u32 begin, at, token = 0;
    __device__ __forceinline__ explicit Turn(const Here& me) : begin(me.thread * 4), at(begin) {}
    // Of all threads alike: whether some of them have elements here.
    __device__ __forceinline__ bool there(u32 elements) const {
      return kTokens == 1 ? at - begin < elements : token < kTokens;
    }
    __device__ __forceinline__ bool inside(u32 elements) const {
      return at < elements && (kTokens == 1 || token < kTokens);
    }
    __device__ __forceinline__ void next(u32 elements) {
      at += kStride;
      if (kTokens > 1 && at - begin >= elements) at = begin, ++token;
    }
  };

  // The elements that a thread fetches at once, four at a place, of one token after another.
  static constexpr int kBatch = kTokens > 1 ? 10 : 8;
  template <class Begin>
  static __device__ __forceinline__ void make_some(Block& b, const Run& run, const Shape& s,
                                                   Turn& turn, u32 first_x, float (&sums)[kTokens],
                                                   Begin begin) {
    const u32 elements = s.elements(), tag = b.tag(run.x), checked = s.tagged_x ? kTagMask : 0;
    const float* from = b.at(run.x) + first_x;
    float4 v[kBatch] = {};
    uint2 norm[kBatch] = {};  // what not all paths set would take registers in all other ops
    float weight[kBatch] = {};
    Turn here = turn;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, here.next(elements))
      if (s.normed && here.inside(elements))
        norm[i] = __ldg(reinterpret_cast<const uint2*>(run.norm + 2 * here.at));
    const u32 choice_tag = b.tag(run.x3);
    Retry retry;
    for (u32 other = 1; other;) {
      other = 0, here = turn;
#pragma unroll
      for (int i = 0; i < kBatch; ++i, here.next(elements))
        load_float4_if(here.inside(elements), from + here.token * s.x_pitch + here.at, v[i]);
      if (kChosen && s.weighted) {
        here = turn;
#pragma unroll
        for (int i = 0; i < kBatch; ++i, here.next(elements))
          if (here.inside(elements))
            weight[i] = load_float(reinterpret_cast<const float*>(run.bias) + here.token * s.count +
                                   quotient(here.at, s.k_inverse));
      }
      begin();
      here = turn;
#pragma unroll
      for (int i = 0; i < kBatch; ++i, here.next(elements)) {
        if (!here.inside(elements)) continue;
        other |= differs(v[i].x, tag) | differs(v[i].y, tag) | differs(v[i].z, tag) |
                 differs(v[i].w, tag);
        other &= checked;
        if (kChosen && kChoiceTagged && s.weighted)
          other |= differs(weight[i], choice_tag) & kTagMask, weight[i] = untagged(weight[i]);
      }
      if (other && retry.in_vain(b, tag)) break;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i, turn.next(elements)) {
      if (!turn.inside(elements)) continue;
      float e[4] = {bare(v[i].x, checked), bare(v[i].y, checked), bare(v[i].z, checked),
                    bare(v[i].w, checked)};
      if (s.normed) {
        const u32 words[2] = {norm[i].x, norm[i].y};
        float sum = of_token(sums, turn.token);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum = fmaf(e[j], e[j], sum);
          e[j] *= BF16::widen(u16(words[j / 2] >> 16 * (j % 2)));
        }
#pragma unroll
        for (u32 t = 0; t < kTokens; ++t) sums[t] = t == turn.token ? sum : sums[t];
      }
      if (kChosen && s.weighted)
#pragma unroll
        for (int j = 0; j < 4; ++j) e[j] *= weight[i];
      const u32 in_lane = turn.at % kLane;
      u16* to = x(b) + turn.token * (elements + kPad);
      *reinterpret_cast<uint2*>(
          to + (place(turn.at / kBlock, turn.at / kLane % 4) ^ in_lane / 8 * kHalf) +
          in_lane % 8) = {pack(e[0], e[1]), pack(e[2], e[3])};
    }
  }
  static __device__ __forceinline__ float of_token(const float (&sums)[kTokens], u32 token) {
    float v = sums[0];
#pragma unroll
    for (u32 t = 1; t < kTokens; ++t) v = t == token ? sums[t] : v;
    return v;
  }
  static __device__ __forceinline__ u32 differs(float v, u32 tag) {
    return __float_as_uint(v) ^ tag;
  }
  static __device__ __forceinline__ float bare(float v, u32 checked) {
    return __uint_as_float(__float_as_uint(v) & ~checked);
  }
};
