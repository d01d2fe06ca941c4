// Weights of a linear op as they are stored, and how their rows are cut into units of the ring.
#pragma once
#include "program.cuh"

struct BF16 {
  static constexpr bool kGiven = true, kMatrixUnits = true;
  using Bits = u16;
  static __device__ __forceinline__ float widen(u16 v) { return __uint_as_float(u32(v) << 16); }
  static __device__ __forceinline__ void widen(u32 v, float& a, float& b) {
    a = __uint_as_float(v << 16);
    b = __uint_as_float(v & 0xffff0000u);
  }
};
struct F16 {
  static constexpr bool kGiven = true, kMatrixUnits = false;
  using Bits = u16;
  static __device__ __forceinline__ float widen(u16 v) { return float_of_half(v); }
  static __device__ __forceinline__ void widen(u32 v, float& a, float& b) {
    a = float_of_half(u16(v));
    b = float_of_half(u16(v >> 16));
  }
};
struct F32 {
  static constexpr bool kGiven = true, kMatrixUnits = false;
  using Bits = float;
  static __device__ __forceinline__ float widen(float v) { return v; }
};

struct F8 {
  static constexpr bool kGiven = true, kMatrixUnits = true;
  using Bits = u8;
  static __device__ __forceinline__ float widen(u8 v) {
    float f[4];
    floats_of_e4m3(v, f);
    return f[0];
  }
};

struct None {  // of an operand that an op does not have
  using Bits = u16;
  static constexpr bool kGiven = false;
  static __device__ __forceinline__ float widen(u16) { return 0; }
};

// kTileRows output rows at a time, of kMatrices matrices (gate and up). Where a tile fits a slot it
// is one unit, the matrices one after the other; of a larger one all rows are streamed in pieces,
// side by side in the slot.
template <int kInputs, class StoredType, int kRows, int kPairs>
struct Tile {
  using Type = StoredType;
  using Bits = typename Type::Bits;
  static constexpr int kK = kInputs, kTileRows = kRows, kMatrices = kPairs;
  static constexpr int kRowBytes = kK * sizeof(Bits);
  static constexpr bool kAligned = kRowBytes % 16 == 0;
  static constexpr int kUnitRows = kTileRows * kMatrices;
  static constexpr bool kWhole = kUnitRows * kRowBytes <= kSlotBytes;
  static constexpr int kShare = kSlotBytes / kUnitRows;  // of a slot, for a row
  static constexpr int kPieces = kWhole ? 1 : (kRowBytes + kShare - 1) / kShare;
  static constexpr int kPieceBytes =  // of a row; the last piece may be smaller
      kWhole ? kRowBytes : ((kRowBytes + kPieces - 1) / kPieces + 63) / 64 * 64;
  static_assert(kWhole || (kAligned && kPieceBytes <= kShare), "pieces begin at multiples of 64");
  static constexpr int kMatrixPitch =  // in the slot
      kAligned ? kTileRows * kPieceBytes : (kTileRows * kRowBytes + 47) / 16 * 16;
  static_assert(kChunkRows % kTileRows == 0, "a chunk of rows is whole tiles");

  // The loader's side.
  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    for (u32 row = 0; row < run.count; row += kTileRows) {
      u32 rows = min(u32(kTileRows), run.count - row);
      if (!(kWhole ? stream_tile(l, run, row, rows) : stream_pieces(l, run, row, rows)))
        return false;
    }
    return true;
  }

  // Where a row of a unit begins in its slot. Rows that are not aligned came with their neighbours'
  // bytes, from the last multiple of 16 on; `row` is the first of the tile in its run.
  static __device__ __forceinline__ int offset(const Run& run, u32 row, int unit_row) {
    int matrix = unit_row / kTileRows, tile_row = unit_row % kTileRows;
    int at = matrix * kMatrixPitch + tile_row * kPieceBytes;
    if constexpr (!kAligned)
      at += reinterpret_cast<u64>((matrix ? run.w_up : run.w) + u64(row) * kRowBytes) & 15;
    return at;
  }

  // Which of the chunk's sums a row of a unit gets, from the first of its tile on; those of w_up
  // come second.
  static __device__ __forceinline__ int sum_of(int unit_row) {
    return unit_row / kTileRows * kChunkRows + unit_row % kTileRows;
  }

 private:
  static __device__ __forceinline__ bool stream_tile(Loader& l, const Run& run, u32 row, u32 rows) {
    if (!l.acquire()) return false;
    const u8* from[2] = {run.w + u64(row) * kRowBytes, run.w_up + u64(row) * kRowBytes};
    u32 bytes[2];
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      u32 shift = kAligned ? 0 : u32(reinterpret_cast<u64>(from[m]) & 15);
      from[m] -= shift;
      bytes[m] = kAligned ? rows * kRowBytes : (rows * kRowBytes + shift + 15) / 16 * 16;
    }
    l.expect(kMatrices == 2 ? bytes[0] + bytes[1] : bytes[0]);
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) l.copy(m * kMatrixPitch, from[m], bytes[m]);
    l.next();
    return true;
  }

  static __device__ __forceinline__ bool stream_pieces(Loader& l, const Run& run, u32 row,
                                                       u32 rows) {
    for (int done = 0; done < kRowBytes; done += kPieceBytes) {
      if (!l.acquire()) return false;
      const u32 bytes = min(kPieceBytes, kRowBytes - done);
      l.expect(kMatrices * rows * bytes);
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        const u8* from = (m ? run.w_up : run.w) + u64(row) * kRowBytes + done;
#pragma unroll 1
        for (u32 r = 0; r < rows; ++r)
          l.copy(m * kMatrixPitch + r * kPieceBytes, from + u64(r) * kRowBytes, bytes);
      }
      l.next();
    }
    return true;
  }
};
