// y = epilogue(x' @ w + bias). Every unit of weights is taken by all warps, which hold x' in
// registers for the whole run. Partial sums of up to kChunkRows rows wait in shared memory for one
// barrier, then one warp finishes those rows while the others go on.
#pragma once
#include "products.cuh"

enum Epilogue { kStore = 0, kAdd = 1, kGate = 2 };

template <bool kFirst, class A, class B>
struct Either {
  using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using Type = B;
};

template <int kK, class Type, int kTileRows, int kEpilogue, bool kTagged, class Input, class Bias,
          class Scales>
struct Linear {
  using T = Tile<kK, Type, kTileRows, kEpilogue == kGate ? 2 : 1>;
  static constexpr bool kBlocksFit = !Scales::kGiven || Scales::kCols >= kK ||
                                     Scales::kCols * sizeof(typename Type::Bits) % 64 == 0;
  static constexpr bool kOnMatrixUnits = Type::kMatrixUnits && T::kRowBytes % 64 == 0 && kBlocksFit;
  using Product = typename Either<kOnMatrixUnits, Matrix<T, Scales>, Scalar<T, Scales>>::Type;
  using In = Inputs<Product>;
  static constexpr bool kRowScaled = Scales::kGiven && Scales::kCols >= kK;  // sums are multiplied

  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    return T::stream(l, run);
  }

  // One tile, or kTogether of them; `row` counts from the first of the run, `in_chunk` from the
  // first of the chunk.
  static __device__ __forceinline__ void take_together(Block& b, const Run& run,
                                                       typename Product::Operand& x, u32 row,
                                                       int in_chunk) {
    typename Product::Sums sums[Product::kTogether];
    Product::add_together(b, run, row, x, sums);
#pragma unroll
    for (int i = 0; i < Product::kTogether; ++i)
      Product::leave(b, 0, in_chunk + i * kTileRows, sums[i]);
  }

  static __device__ __forceinline__ void take(Block& b, const Run& run,
                                              typename Product::Operand& x, u32 row, int in_chunk) {
#pragma unroll
    for (int m = 0; m < (T::kWhole ? 1 : T::kMatrices); ++m) {
      typename Product::Sums sums;
#pragma unroll
      for (int piece = 0; piece < T::kPieces; ++piece) Product::add(b, run, row, piece, m, x, sums);
      Product::leave(b, m, in_chunk, sums);
    }
  }

  static __device__ __forceinline__ float add_up(Block& b, int row) {
    const float* from = part_of_sum(b, row, 0);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Product::kRowWarps; ++i) sum += from[i];
    return sum;
  }

  // What finishing a row needs besides its sums, fetched before they are there.
  struct Rest {
    float old = 0, scale = 1, scale_up = 1;
  };

  static __device__ __forceinline__ Rest fetch_rest(const Block& b, const Run& run, u32 row) {
    Rest rest;
    if (row >= run.count) return rest;
    if constexpr (kEpilogue == kAdd) {
      const float* const old[1] = {b.at(run.y) + run.first + row};
      float v[1];
      if constexpr (kTagged) load_tagged(b, old, b.tag(run.x2), v);
      rest.old = kTagged ? v[0] : load_float(old[0]);
    }
    if constexpr (kRowScaled) {
      rest.scale = __ldg(run.scale + (run.first + row) / Scales::kRows);
      if (T::kMatrices == 2)
        rest.scale_up = __ldg(run.scale_up + (run.first + row) / Scales::kRows);
    }
    return rest;
  }

  // One warp, a lane for each row of the chunk.
  static __device__ __forceinline__ void finish(Block& b, const Run& run, u32 row,
                                                const Rest& rest) {
    if (row >= run.count) return;
    float y = add_up(b, lane());
    if constexpr (kRowScaled) y *= rest.scale;
    if constexpr (Bias::kGiven)
      y += Bias::widen(reinterpret_cast<const typename Bias::Bits*>(run.bias)[row]);
    if constexpr (kEpilogue == kGate) {
      float up = add_up(b, kChunkRows + lane());
      if constexpr (kRowScaled) up *= rest.scale_up;
      if constexpr (Bias::kGiven)
        up += Bias::widen(reinterpret_cast<const typename Bias::Bits*>(run.bias_up)[row]);
      y = y / (1 + exp2_fast(-y * kLog2e)) * up;
    }
    if constexpr (kEpilogue == kAdd) y += rest.old;
    float* to = b.at(run.y) + run.first + row;
    kTagged ? store_tagged(to, y, b.tag(run.y)) : store_float(to, y);
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    typename In::template Held<Input> held;
    In::prefetch(run, held);
    typename Product::Operand operand;
    if constexpr (Product::kScaled) Product::load_scales(run, 0, operand);
    if (!wait_for_inputs<Input::kTagged>(b, run)) return false;
    typename In::X x;
    In::make(b, run, held, x);
    Product::hold(x, operand);
    for (u32 begin = 0; begin < run.count; begin += kChunkRows) {
      const bool mine = warp() == (begin / kChunkRows) % kWarps;
      const u32 row = begin + lane(), end = min(begin + kChunkRows, run.count);
      Rest rest;
      if (mine) rest = fetch_rest(b, run, row);
      u32 r = begin;
      if constexpr (Product::kTogether > 1) {
        // Tiles that are taken together have their scales in one block.
        constexpr int kStride = Product::kTogether * kTileRows;
        while (Product::kScaled && (run.first + r) % kStride && r < end) {
          take(b, run, operand, r, r - begin);
          r += kTileRows;
        }
        for (; r + kStride - kTileRows < end; r += kStride)
          take_together(b, run, operand, r, r - begin);
      }
      for (; r < end; r += kTileRows) take(b, run, operand, r, r - begin);
      sync_consumers();
      if (mine) {
        finish(b, run, row, rest);
        if (end == run.count) {
          __syncwarp();
          if (lane() == 0) signal<kTagged>(b, run);
        }
      }
      ++b.chunk;
    }
    return true;
  }
};
