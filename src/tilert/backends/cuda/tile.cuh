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

// What rows of weights a product takes, and where its results go: those of one matrix in turn. A
// run has rows; a row of weights has `kParts` parts along k, each of another matrix. For others
// than this one see experts.cuh.
struct Straight {
  static constexpr bool kChosen = false;   // by what an earlier op has left
  static constexpr bool kOfToken = false;  // each token of several has rows of its own
  static constexpr int kParts = 1;
  static constexpr u32 kBlockRows = 0, kBlockStride = 0;  // all rows have the same x
  struct Choice {                                         // what the warps know of it
    __device__ __forceinline__ Choice of_token(u32) const { return {}; }
  };
  static __device__ __forceinline__ Choice choice(const Run&) { return {}; }
  static __device__ __forceinline__ bool known(const Run&) { return true; }  // before its waits

  // The loader's side. False: the launch has ended.
  static __device__ __forceinline__ bool ready(Loader&, const Run&) { return true; }
  // The row of weights in a table of rows that `matrix`, run.w or run.w_up, points to, for a token.
  static __device__ __forceinline__ u32 stored(const Block&, const Run&, u32 row, u32, int) {
    return row;
  }
  // Of a tile of so many rows, those that there are.
  static __device__ __forceinline__ u32 rows(const Run& run, u32 row, u32 tile_rows) {
    return min(tile_rows, run.count - row);
  }

  static __device__ __forceinline__ bool inside(const Run& run, u32 row) { return row < run.count; }
  static __device__ __forceinline__ u32 output(const Run& run, u32 row) { return run.first + row; }
  // Whether the tiles at a multiple of kStride rows and the one after it have their scales in one
  // block, where blocks are of multiples of so many rows.
  template <u32 kStride>
  static __device__ __forceinline__ bool pairs(const Run& run, u32 row) {
    return (run.first + row) % kStride == 0;
  }
  // Rows of one group have the same rows of scales, one for each part, by the choice of a token.
  template <u32 kBlockRows>
  static __device__ __forceinline__ u32 scale_group(const Run& run, u32 row) {
    return (run.first + row) / kBlockRows;
  }
  template <u32 kBlockRows>
  static __device__ __forceinline__ u32 scale_row(const Choice&, u32 group, int) {
    return group;
  }
  // Whether a product leaves the sums of a token when it has multiplied the rows of token `only`.
  static __device__ __forceinline__ bool leaves(int, int) { return true; }
};

// Rows of a block-diagonal matrix: so many have the same x, and that of the next ones is so much
// further on.
template <u32 kRows, u32 kStride>
struct Blocks : Straight {
  static constexpr u32 kBlockRows = kRows, kBlockStride = kStride;
};

// kTileRows output rows at a time, of kMatrices matrices (gate and up). Where a tile fits a slot it
// is one unit, the matrices one after the other; of a larger one all rows are streamed in pieces,
// side by side in the slot. Where rows have parts, a unit holds as many of them as fit, one after
// another, or a piece of one.
template <int kInputs, class StoredType, int kRows, int kPairs, class RowSource = Straight>
struct Tile {
  using Type = StoredType;
  using Bits = typename Type::Bits;
  using Source = RowSource;
  static constexpr int kPartK = kInputs, kK = kPartK * Source::kParts;
  static constexpr int kTileRows = kRows, kMatrices = kPairs;
  static constexpr int kRowBytes = kPartK * sizeof(Bits);  // of a part
  static constexpr bool kAligned = kRowBytes % 16 == 0;
  static constexpr int kUnitRows = kTileRows * kMatrices;
  static constexpr int kPartBytes = kUnitRows * kRowBytes;
  static constexpr bool kFits = kPartBytes <= kSlotBytes;
  static constexpr int kShare = kSlotBytes / kUnitRows;  // of a slot, for a row
  static constexpr int kPartPieces = kFits ? 1 : (kRowBytes + kShare - 1) / kShare;
  static constexpr int kFitting = kSlotBytes / kPartBytes;
  static constexpr int kUnits =  // of all parts
      kFits ? (Source::kParts + kFitting - 1) / (kFits ? kFitting : 1) : Source::kParts;
  static constexpr int kTogetherParts = (Source::kParts + kUnits - 1) / kUnits;  // in a unit
  static constexpr int kPieces = kUnits * kPartPieces;
  static constexpr bool kWhole = kPieces == 1;
  static constexpr int kRowPiece =  // bytes of a row that lie together; the last may be fewer
      kFits ? kRowBytes : ((kRowBytes + kPartPieces - 1) / kPartPieces + 63) / 64 * 64;
  static constexpr int kPieceBytes = kTogetherParts * kRowPiece;  // of a row
  // After so many pieces, and so many bytes of a row, one begins with a part again.
  static constexpr int kCycle = kFits ? kPieces : kPartPieces;
  static constexpr int kCycleBytes = kFits ? Source::kParts * kRowBytes : kRowBytes;
  static_assert(kFits || (kAligned && kRowPiece <= kShare), "pieces begin at multiples of 64");
  static_assert(kMatrices == 1 || Source::kParts == 1, "parts are of one matrix each");
  static_assert(kAligned || !Source::kChosen, "rows that a choice names begin at multiples of 16");
  static constexpr int kMatrixPitch =  // in the slot
      kAligned ? kTileRows * kRowPiece : (kTileRows * kRowBytes + 47) / 16 * 16;
  static_assert(kChunkRows % kTileRows == 0, "a chunk of rows is whole tiles");

  // The loader's side.
  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    if (!Source::ready(l, run)) return false;
    if constexpr (!Source::kOfToken) return stream_rows(l, run, 0, run.count, 0);
    const u32 tokens = l.count();
    for (u32 begin = 0; begin < run.count; begin += kChunkRows)
      for (u32 token = 0; token < tokens; ++token)
        if (!stream_rows(l, run, begin, min(begin + kChunkRows, run.count), token)) return false;
    return true;
  }

  // Where a row of a unit begins in its slot. Rows that are not aligned came with their neighbours'
  // bytes, from the last multiple of 16 on; `row` is the first of the tile in its run.
  static __device__ __forceinline__ int offset(const Run& run, u32 row, int unit_row) {
    int matrix = unit_row / kTileRows, tile_row = unit_row % kTileRows;
    int at = matrix * kMatrixPitch + tile_row * kRowPiece;
    if constexpr (!kAligned)
      at += reinterpret_cast<u64>((matrix ? run.w_up : run.w) + u64(row) * kRowBytes) & 15;
    return at;
  }
  // Where byte `at` of a row's piece lies, from where the row begins.
  static __device__ __forceinline__ int within(int at) {
    if constexpr (kTogetherParts == 1) return at;
    return at / kRowBytes * kPartBytes + at % kRowBytes;
  }

  // Which of the chunk's sums a row of a unit gets, from the first of its tile on; those of w_up
  // come second.
  static __device__ __forceinline__ int sum_of(int unit_row) {
    return unit_row / kTileRows * kChunkRows + unit_row % kTileRows;
  }

 private:
  static __device__ __forceinline__ bool stream_rows(Loader& l, const Run& run, u32 begin, u32 end,
                                                     u32 token) {
    for (u32 row = begin; row < end; row += kTileRows) {
      u32 rows = Source::rows(run, row, kTileRows);
      if (!(kFits ? stream_whole(l, run, row, rows, token)
                  : stream_pieces(l, run, row, rows, token)))
        return false;
    }
    return true;
  }

  static __device__ __forceinline__ const u8* stored(const Loader& l, const Run& run, u32 row,
                                                     u32 token, int matrix, int part) {
    const u32 at = Source::stored(l.b, run, row, token, part);
    return (matrix ? run.w_up : run.w) + u64(at) * kRowBytes;
  }

  // All of a tile, some parts at a time.
  static __device__ __forceinline__ bool stream_whole(Loader& l, const Run& run, u32 row, u32 rows,
                                                      u32 token) {
#pragma unroll 1
    for (int first = 0; first < Source::kParts; first += kTogetherParts) {
      if (!l.acquire()) return false;
      if constexpr (Source::kParts > 1)
        stream_parts(l, run, row, rows, token, first);
      else
        stream_tile(l, run, row, rows, token);
      l.next();
    }
    return true;
  }

  static __device__ __forceinline__ void stream_tile(Loader& l, const Run& run, u32 row, u32 rows,
                                                     u32 token) {
    const u8* from[2] = {stored(l, run, row, token, 0, 0), nullptr};
    if constexpr (kMatrices == 2) from[1] = stored(l, run, row, token, 1, 0);
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
  }

  static __device__ __forceinline__ void stream_parts(Loader& l, const Run& run, u32 row, u32 rows,
                                                      u32 token, int first) {
    const int count = min(kTogetherParts, Source::kParts - first);
    l.expect(count * rows * kRowBytes);
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      l.copy(i * kPartBytes, stored(l, run, row, token, 0, first + i), rows * kRowBytes);
  }

  static __device__ __forceinline__ bool stream_pieces(Loader& l, const Run& run, u32 row, u32 rows,
                                                       u32 token) {
#pragma unroll 1
    for (int part = 0; part < Source::kParts; ++part)
#pragma unroll 1
      for (int done = 0; done < kRowBytes; done += kRowPiece) {
        if (!l.acquire()) return false;
        const u32 bytes = min(kRowPiece, kRowBytes - done);
        l.expect(kMatrices * rows * bytes);
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          const u8* from = stored(l, run, row, token, m, part) + done;
#pragma unroll 1
          for (u32 r = 0; r < rows; ++r)
            l.copy(m * kMatrixPitch + r * kRowPiece, from + u64(r) * kRowBytes, bytes);
        }
        l.next();
      }
    return true;
  }
};
