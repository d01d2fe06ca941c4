// Packed rows of a latent cache, whose bytes ops/mla.py: pack defines: how a row is made, and how
// units of 16 become rows of bf16 again, which is what matrix units read.
#pragma once
#include "heads.cuh"

template <int kLora, int kRope>
struct Packed {
  static constexpr int kScaleCols = 128, kScales = (kLora + kScaleCols - 1) / kScaleCols;
  static constexpr int kKey = kLora + (kScales * 4 + 15) / 16 * 16;  // where the rotated key begins
  static constexpr int kRowBytes = kKey + 2 * kRope;
  static constexpr int kWideBytes = 2 * (kLora + kRope);              // of a row of bf16
  static constexpr int kPieces = kLora / 16, kKeyPieces = kRope / 8;  // of 16 bytes
  static_assert(kLora % 16 == 0 && kRope % 8 == 0, "rows are whole pieces");

  // A warp's latents to a row, and their scales; latent(e): element e. A lane makes a piece, and
  // the pieces of a scale are those of eight lanes.
  template <class Latent>
  static __device__ __forceinline__ void put_latents(u8* row, Latent latent) {
    constexpr int kLanes = kScaleCols / 16, kTurns = (kPieces + 31) / 32;
    float* scales = reinterpret_cast<float*>(row + kLora);
#pragma unroll 1
    for (int turn = 0; turn < kTurns; ++turn) {
      const u32 piece = lane() + 32 * turn, tile = 32 / kLanes * turn + lane() % (32 / kLanes);
      float v[16], most = 0;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        v[k] = piece < kPieces ? latent(piece * 16 + k) : 0;
        most = fmaxf(most, fabsf(v[k]));
      }
#pragma unroll
      for (int o = 1; o < kLanes; o *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
      const float scale = fmaxf(most / 448, 1.17549435e-38f), factor = 1 / scale;
      u32 words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        words[k] = e4m3_of(v[4 * k] * factor, v[4 * k + 1] * factor) |
                   e4m3_of(v[4 * k + 2] * factor, v[4 * k + 3] * factor) << 16;
      if (piece < kPieces)
        reinterpret_cast<uint4*>(row)[piece] = {words[0], words[1], words[2], words[3]};
      const float of_tile = __shfl_sync(~0u, scale, lane() % (32 / kLanes) * kLanes);
      if (lane() < 32 / kLanes) scales[tile] = tile < kScales ? of_tile : 0;
    }
  }

  // kRows rows that lie at the end of a unit, to rows of bf16 that fill it, whose pieces are
  // permuted by their place in it. The two warps of a pair do this, four rows at a time: as soon as
  // those are in registers what they were may be written over, for the rows that are left lie
  // behind all that is written until then.
  template <int kRows>
  static __device__ __forceinline__ void widen(u8* unit, u32 thread, u32 pair) {
    constexpr int kLanes = 16, kOwn = (kPieces + kLanes - 1) / kLanes;
    constexpr int kOwnKeys = (kKeyPieces + kLanes - 1) / kLanes;
    const u32 first = thread % kLanes;
#pragma unroll 1
    for (u32 row = thread / kLanes; row < kRows; row += 64 / kLanes) {
      const u8* from = unit + kRows * (kWideBytes - kRowBytes) + row * kRowBytes;
      uint4 latents[kOwn], keys[kOwnKeys];
      float scale[kOwn];
      // Lanes without a piece read the last one: what only some write is kept from run to run.
#pragma unroll
      for (u32 i = 0; i < kOwn; ++i) {
        const u32 piece = min(first + i * kLanes, u32(kPieces - 1));
        latents[i] = reinterpret_cast<const uint4*>(from)[piece];
        scale[i] = reinterpret_cast<const float*>(from + kLora)[piece / (kScaleCols / 16)];
      }
#pragma unroll
      for (u32 i = 0; i < kOwnKeys; ++i)
        keys[i] = reinterpret_cast<const uint4*>(
            from + kKey)[min(first + i * kLanes, u32(kKeyPieces - 1))];
      sync_pair(pair);
      uint4* to = reinterpret_cast<uint4*>(unit + row * kWideBytes);
#pragma unroll
      for (u32 i = 0; i < kOwn; ++i) {
        const u32 piece = first + i * kLanes;
        if (kPieces % kLanes && piece >= kPieces) continue;
        to[place(row, 2 * piece)] = widened(latents[i].x, latents[i].y, scale[i]);
        to[place(row, 2 * piece + 1)] = widened(latents[i].z, latents[i].w, scale[i]);
      }
#pragma unroll
      for (u32 i = 0; i < kOwnKeys; ++i)
        if (const u32 piece = first + i * kLanes; piece < kKeyPieces)
          to[place(row, 2 * kPieces + piece)] = keys[i];
    }
    fence_proxy_shared();  // the copy engine will write to this slot again
    sync_pair(pair);
  }

 private:
  static __device__ __forceinline__ u32 place(u32 row, u32 piece) {
    return swizzle<kLora + kRope>(row, piece);
  }
  // Eight e4m3 times their scale.
  static __device__ __forceinline__ uint4 widened(u32 low, u32 high, float scale) {
    float a[4], b[4];
    floats_of_e4m3(low, a);
    floats_of_e4m3(high, b);
    return {pack_bf16(a[0] * scale, a[1] * scale), pack_bf16(a[2] * scale, a[3] * scale),
            pack_bf16(b[0] * scale, b[1] * scale), pack_bf16(b[2] * scale, b[3] * scale)};
  }
};
