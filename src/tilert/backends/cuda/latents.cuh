// Rows of a latent cache: the op that appends those of a step, and what is rotated, where.
#pragma once
#include "combine.cuh"
#include "heads.cuh"
#include "packed.cuh"

// Element `e` of a rotated piece of kRope elements; x: the elements before. Interleaved: neighbours
// are pairs, and the first elements of all pairs come before the second ones.
template <int kRope, bool kInterleaved, class Load>
__device__ __forceinline__ float turned(Load x, const float* angles, int e) {
  constexpr int kHalf = kRope / 2;
  const int pair = e % kHalf;
  const float first = x(kInterleaved ? 2 * pair : pair);
  const float second = x(kInterleaved ? 2 * pair + 1 : pair + kHalf);
  const float cosine = __ldg(angles + pair), sine = __ldg(angles + kHalf + pair);
  return e < kHalf ? fmaf(first, cosine, -(second * sine)) : fmaf(second, cosine, first * sine);
}

// Cosines of a token's angles, then sines; run.bias_up: the table.
template <int kRope>
__device__ __forceinline__ const float* angles_of(const Block& b, const Run& run, u32 token) {
  return reinterpret_cast<const float*>(run.bias_up) + u64(b.position(token)) * kRope;
}

// The page of a token's sequence that holds a position, as a number of the cache.
__device__ __forceinline__ u32 physical_page(const Block& b, u32 token, u32 position) {
  const u32* table = b.params.pages + b.params.sequences[token] * b.params.page_cols;
  return __ldg(table + position / kPage);
}

__device__ __forceinline__ u32 given_tokens(const Block& b) { return kTokens == 1 ? 1 : b.count(); }
__device__ __forceinline__ bool given(const Block& b, u32 token) { return token < given_tokens(b); }

// The first of the step's tokens that are of the same sequence as this one.
__device__ __forceinline__ u32 first_of_sequence(const Block& b, u32 token) {
  const u32* of = b.params.sequences;
  while (kTokens > 1 && token > 0 && of[token - 1] == of[token]) --token;
  return token;
}

// run.w: the cache, run.norm: weight of the latent's norm, run.bias_up: the rope table, run.x: the
// latent and the shared key. A warp takes a token.
template <int kRope, int kLora, bool kInterleaved, bool kTagged, class Norm, u32 kEpsBits,
          int kKvPitch, bool kPacked>
struct LatentAppend {
  static constexpr int kWidth = kLora + kRope;
  static constexpr int kLoads = (kWidth + 31) / 32, kTurned = (kRope + 31) / 32;
  static constexpr int kPieces = (kLora / 8 + 31) / 32;
  struct Scratch {
    float row[kTokens][kWidth];
  };
  static_assert(sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    static_assert(kTokens <= kWarps, "a warp for each token");
    if (const u32 token = warp(); token < kTokens && given(b, token)) {
      if constexpr (kPacked)
        append_packed(b, run, token);
      else
        append(b, run, token);
    }
    sync_consumers();
    if (thread() == 0) signal<false>(b, run);
    return true;
  }

 private:
  static __device__ __forceinline__ void append(Block& b, const Run& run, u32 token) {
    float* row = reinterpret_cast<Scratch*>(b.scratch)->row[token];
    const float factor = fetch(b, run, token, row);
    const float* angles = angles_of<kRope>(b, run, token);
    const u32 position = b.position(token), at = position % kPage;
    u8* cache =
        const_cast<u8*>(run.w) + u64(physical_page(b, token, position)) * kPage * kWidth * 2;
    u16* to = reinterpret_cast<u16*>(cache) + at * kWidth;
    auto weight = reinterpret_cast<const typename Norm::Bits*>(run.norm);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const u32 piece = lane() + 32 * i;
      if (piece >= kLora / 8) continue;
      u32 words[4];
#pragma unroll
      for (u32 k = 0; k < 4; ++k) {
        const u32 e = piece * 8 + 2 * k;
        words[k] = pack_bf16(row[e] * factor * Norm::widen(__ldg(weight + e)),
                             row[e + 1] * factor * Norm::widen(__ldg(weight + e + 1)));
      }
      reinterpret_cast<uint4*>(to)[swizzle<kWidth>(at, piece)] = {words[0], words[1], words[2],
                                                                  words[3]};
    }
#pragma unroll
    for (int i = 0; i < kTurned; ++i) {
      const u32 e = lane() + 32 * i, column = kLora + e;
      if (e >= kRope) continue;
      const float v =
          turned<kRope, kInterleaved>([&](int from) { return row[kLora + from]; }, angles, e);
      to[swizzle<kWidth>(at, column / 8) * 8 + column % 8] = u16(pack_bf16(v, 0));
    }
    fence_proxy();  // others will stream what is new
  }

  static __device__ __forceinline__ void append_packed(Block& b, const Run& run, u32 token) {
    using Row = Packed<kLora, kRope>;
    float* from = reinterpret_cast<Scratch*>(b.scratch)->row[token];
    const float factor = fetch(b, run, token, from);
    const float* angles = angles_of<kRope>(b, run, token);
    const u32 position = b.position(token), page = physical_page(b, token, position);
    u8* row = const_cast<u8*>(run.w) + (u64(page) * kPage + position % kPage) * Row::kRowBytes;
    auto weight = reinterpret_cast<const typename Norm::Bits*>(run.norm);
    Row::put_latents(row, [&](u32 e) { return from[e] * factor * Norm::widen(__ldg(weight + e)); });
    u16* key = reinterpret_cast<u16*>(row + Row::kKey);
    auto raw = [&](int e) { return from[kLora + e]; };
#pragma unroll 1
    for (u32 e = lane(); e < kRope; e += 32)
      key[e] = u16(pack_bf16(turned<kRope, kInterleaved>(raw, angles, e), 0));
    fence_proxy();  // others will stream what is new
  }

  // What the product left, to shared memory; the factor that norms the latent.
  static __device__ __forceinline__ float fetch(const Block& b, const Run& run, u32 token,
                                                float* row) {
    const float* kv = b.at(run.x) + token * kKvPitch;
    const float* from[kLoads];
    u32 tag[kLoads];
    float v[kLoads], sum = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      tag[i] = b.tag(run.x);
      from[i] = lane() + 32 * i < kWidth ? kv + lane() + 32 * i : nullptr;
    }
    if constexpr (kTagged) {
      load_tagged(b, from, tag, v);
    } else {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) v[i] = from[i] ? load_float(from[i]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (from[i]) row[lane() + 32 * i] = v[i];
      if (lane() + 32 * i < kLora) sum = fmaf(v[i], v[i], sum);
    }
    __syncwarp();
    return inverse_root(warp_sum(sum) / kLora + __uint_as_float(kEpsBits));
  }
};
