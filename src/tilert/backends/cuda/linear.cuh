// y = epilogue(x' @ w + bias), for each token. Every unit of weights is taken by all warps, which
// hold x' of all tokens in registers for the whole run. Partial sums of up to kChunkRows rows wait
// in shared memory for one barrier, then one or more warps finish those rows while the others go
// on.
#pragma once
#include "products.cuh"

enum Epilogue { kStore = 0, kAdd = 1, kGate = 2 };

// What the sum of an output is added to: loaded before the sum is there, and looked at behind it.
__device__ __forceinline__ float load_residual(const Block& b, const Run& run, u32 y) {
  return load_float(b.at(run.x2) + y);
}
// Of what was loaded; read again while its tag says that it is late.
__device__ __forceinline__ float residual(const Block& b, const Run& run, u32 y, bool tagged,
                                          float old) {
  if (!tagged) return old;
  const u32 tag = b.tag(run.x2);
  Retry retry;
  while (other_tag(old, tag) && !retry.in_vain(b, tag)) old = load_residual(b, run, y);
  return untagged(old);
}

__device__ __forceinline__ float silu(float v) { return v / (1 + exp2_fast(-v * kLog2e)); }

// Whether a token of the step sees more than so many positions.
__device__ __forceinline__ bool sees_beyond(const Block& b, u32 positions) {
  bool sees = false;
  for (u32 t = 0; t < (kTokens == 1 ? 1 : b.params.count); ++t) sees |= b.position(t) >= positions;
  return sees;
}
// The hand-off of a run that is left out: without order, for nobody looks for its words, nor by way
// of it for those of others (Op.spared). False: the launch has ended.
__device__ __forceinline__ bool pass_on(Block& b, const Run& run) {
  if (!wait_for_inputs<false>(b, run)) return false;
  if (thread() == 0) signal<true>(b, run);
  return true;
}

template <bool kFirst, class A, class B>
struct Either {
  using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using Type = B;
};

template <int kK, class Type, int kTileRows, int kEpilogue, bool kTagged, bool kNarrow,
          bool kOnMatrixUnits, int kPitch, class Input, class Bias, class Scales,
          class Source = Straight>
struct Linear {
  using T = Tile<kK, Type, kTileRows, kEpilogue == kGate ? 2 : 1, Source>;
  using Product = typename Either<kOnMatrixUnits, Matrix<T, Scales>, Scalar<T, Scales>>::Type;
  using Operand = typename Product::Operand;
  using In = Inputs<Product>;
  static constexpr u32 kBlockRows = Source::kBlockRows;
  static_assert(kBlockRows % kTileRows == 0 && (kBlockRows == 0 || !Input::kNormed),
                "a tile lies in one block");
  static constexpr bool kRowScaled = Scales::kGiven && !Product::kScaled;  // sums are multiplied
  // All inputs say themselves whether they are there; a choice does not.
  static constexpr bool kSelfTold = Input::kTagged && !Source::kChosen;
  static constexpr int kFinishers = kChunkRows * kTokens / 32;  // warps that finish a chunk

  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    return T::stream(l, run);
  }

  // One tile, or kTogether of them; `row` counts from the first of the run, `in_chunk` from the
  // first of the chunk.
  static __device__ __forceinline__ void take_together(Block& b, const Run& run, Operand& x,
                                                       u32 row, int in_chunk, u32 token) {
    typename Product::Sums sums[Product::kTogether];
    Product::add_together(b, run, row, x, sums);
#pragma unroll
    for (int i = 0; i < Product::kTogether; ++i)
      Product::leave(b, in_chunk + i * kTileRows, token, sums[i]);
  }

  // Tiles that are taken together have their scales in one block.
  static __device__ __forceinline__ bool goes_together(const Run& run, u32 row, u32 end) {
    constexpr int kStride = Product::kTogether * kTileRows;
    if (row + kStride - kTileRows >= end) return false;
    return !Product::kScaled || Source::template pairs<kStride>(run, row);
  }

  static __device__ __forceinline__ void take(Block& b, const Run& run, Operand& x, u32 row,
                                              int in_chunk, u32 token) {
    typename Product::Sums sums;
#pragma unroll
    for (int piece = 0; piece < T::kPieces; ++piece) Product::add(b, run, row, piece, x, sums);
    Product::leave(b, in_chunk, token, sums);
  }

  // One output of a chunk, for a lane: of which token, and where; which row in the chunk and in the
  // run.
  struct Place {
    int token;
    u32 in_chunk, row, y;  // y: element of the output buffer
    bool inside;
    __device__ __forceinline__ Place(const Run& run, u32 begin, u32 index, u32 last)
        : token(index / kChunkRows),
          in_chunk(index % kChunkRows),
          row(begin + in_chunk),
          y(token * kPitch + Source::output(run, row)),
          inside(row < last && Source::inside(run, row)) {}
  };

  // What finishing a row needs besides its sums, fetched before they are there.
  struct Rest {
    float old = 0, scale = 1, scale_up = 1;
  };

  static __device__ __forceinline__ Rest fetch_rest(const Block& b, const Run& run,
                                                    const typename Source::Choice& choice,
                                                    const Place& at) {
    Rest rest;
    u32 scale = 0;
    if constexpr (kRowScaled) {
      const u32 group = Source::template scale_group<Scales::kRows>(run, at.row);
#pragma unroll
      for (int t = 0; t < (Source::kOfToken ? kTokens : 1); ++t) {
        const u32 of_token =
            Source::template scale_row<Scales::kRows>(choice.of_token(t), group, 0);
        if (!Source::kOfToken || t == at.token) scale = of_token;
      }
    }
    if (!at.inside) return rest;
    if constexpr (kEpilogue == kAdd) rest.old = load_residual(b, run, at.y);
    if constexpr (kRowScaled) {
      rest.scale = __ldg(run.scale + scale);
      if (T::kMatrices == 2) rest.scale_up = __ldg(run.scale_up + scale);
    }
    return rest;
  }

  static __device__ __forceinline__ float finished(Block& b, const Run& run, const Place& at,
                                                   int matrix, float factor) {
    float y = sum_of_parts<Product::kRowWarps>(b, matrix * kChunkRows + at.in_chunk, at.token);
    y *= factor;
    if constexpr (Bias::kGiven)
      y += Bias::widen(
          reinterpret_cast<const typename Bias::Bits*>(matrix ? run.bias_up : run.bias)[at.row]);
    return y;
  }

  static __device__ __forceinline__ void finish(Block& b, const Run& run, const Place& at,
                                                const Rest& rest) {
    if (!at.inside) return;
    const float factor = In::template Factor<Input>::of(b, at.token);
    float y = finished(b, run, at, 0, factor * rest.scale);
    if constexpr (kEpilogue == kGate) y = silu(y) * finished(b, run, at, 1, factor * rest.scale_up);
    if constexpr (kEpilogue == kAdd) y += residual(b, run, at.y, kTagged, rest.old);
    store_output<kTagged, kNarrow>(b.at(run.y), at.y, y, b.tag(run.y));
  }

  // By the warps that have finished the last chunk of a run.
  static __device__ __forceinline__ void tell(const Block& b, const Run& run, int finisher) {
    if constexpr (kFinishers > 1)
      sync_threads<2, 32 * kFinishers>();
    else
      __syncwarp();
    if (finisher == 0 && lane() == 0) signal<kTagged>(b, run);
  }

  // Those of the first tile; others follow as they are needed.
  static __device__ __forceinline__ void fetch_scales(const Run& run,
                                                      typename Source::Choice& choice, Operand& x) {
    if constexpr (Scales::kGiven) choice = Source::choice(run);
    if constexpr (Product::kScaled) Product::load_scales(run, 0, 0, choice, x);
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    typename In::template Held<Input> held;
    In::prefetch(run, held);
    Operand x(b);
    typename Source::Choice choice;
    const bool known = Source::known(run);
    if constexpr (!Source::kChosen) {
      fetch_scales(run, choice, x);
      if (!wait_for_inputs<kSelfTold>(b, run)) return false;
    } else {  // scales come first where it is known whose; in a loop, so that both have one code
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        if (known == (turn == 0))
          fetch_scales(run, choice, x);
        else if (!wait_for_choice(b, run, Source::kNumbers))
          return false;
      }
    }
    if constexpr (kBlockRows == 0) {
      In::make(b, run, 0, held, x);
      multiply_rows(b, run, choice, x, 0, run.count);
    } else {
      for (u32 first = 0; first < run.count;) {
        const u32 at = run.first + first,
                  end = min(first + kBlockRows - at % kBlockRows, run.count);
        In::make(b, run, at / kBlockRows * Source::kBlockStride, held, x);
        multiply_rows(b, run, choice, x, first, end);
        first = end;
      }
    }
    return true;
  }

 private:
  // Rows [first, last) of the run.
  static __device__ __forceinline__ void multiply_rows(Block& b, const Run& run,
                                                       const typename Source::Choice& choice,
                                                       Operand& x, u32 first, u32 last) {
    for (u32 begin = first; begin < last; begin += kChunkRows) {
      const int finisher = (warp() - begin / kChunkRows * kFinishers) % kWarps;
      const bool mine = finisher < kFinishers;
      const Place at(run, begin, finisher * 32 + lane(), last);
      const u32 end = min(begin + kChunkRows, last);
      Rest rest;
      if (mine) rest = fetch_rest(b, run, choice, at);
      const u32 tokens = Source::kOfToken ? b.count() : 1;
#pragma unroll 1
      for (u32 token = 0; token < tokens; ++token)
        multiply_chunk(b, run, choice, x, begin, end, token);
      sync_consumers();
      if (mine) {
        finish(b, run, at, rest);
        if (end == run.count) tell(b, run, finisher);
      }
      ++b.chunk;
    }
  }

  // Rows [begin, end): for all tokens, or the rows that are for one of them.
  static __device__ __forceinline__ void multiply_chunk(Block& b, const Run& run,
                                                        const typename Source::Choice& choice,
                                                        Operand& x, u32 begin, u32 end, u32 token) {
    for (u32 r = begin; r < end;) {
      if constexpr (Product::kScaled) Product::load_scales(run, r, token, choice, x);
      if constexpr (Product::kTogether > 1) {
        if (goes_together(run, r, end)) {
          take_together(b, run, x, r, r - begin, token);
          r += Product::kTogether * kTileRows;
          continue;
        }
      }
      take(b, run, x, r, r - begin, token);
      r += kTileRows;
    }
  }
};

// A product that nobody reads where no token sees more than kPositions positions: it is left out
// there, by loader and warps alike, but its hand-off is made.
template <int kPositions, class Op>
struct Beyond {
  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    return !sees_beyond(l.b, kPositions) || Op::stream(l, run);
  }
  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    return sees_beyond(b, kPositions) ? Op::consume(b, run) : pass_on(b, run);
  }
};
