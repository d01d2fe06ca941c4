// Units of weights times x', two ways. Each row of a unit is cut along k over kRowWarps warps, and
// each warp leaves its part of the sum in shared memory.
//
// Both have the interface of Inputs' Layout, and besides
//   Operand: x' as the products want it, in a thread's own registers for the whole run
//   Sums, add(unit, ...): one unit, whose slot is given back on the way
//   kTogether, add_together(...): so many tiles at once, if that is more than one
//   leave(Sums, ...): to shared memory; `only`: of one token, where a unit is not for all of them
#pragma once
#include "inputs.cuh"
#include "staged.cuh"

struct Unscaled {
  static constexpr bool kGiven = false;
  static constexpr int kRows = 1, kCols = 1;
};
// One f32 for each block of so many rows and columns of a weight.
template <int kBlockRows, int kBlockCols>
struct Scaled {
  static constexpr bool kGiven = true;
  static constexpr int kRows = kBlockRows, kCols = kBlockCols;
};

// Where the part of this warp for a sum of the chunk goes, one for each row of x'.
__device__ __forceinline__ float* part_of_sum(Block& b, int sum, int part, int row) {
  return b.shared.partial[b.chunk & 1][row] + sum * kPartialPitch + part;
}
template <int kParts>
__device__ __forceinline__ float sum_of_parts(Block& b, int sum, int row) {
  const float* from = part_of_sum(b, sum, 0, row);
  float all = 0;
#pragma unroll
  for (int i = 0; i < kParts; ++i) all += from[i];
  return all;
}

// Matrix units, for bf16 and e4m3, with f32 sums. x' is rounded: to bf16, or for weights in e4m3,
// which are widened to f16, to f16 of x' / 16, so that only what is beyond a million is cut off.
//
// A product takes 16 rows of 16 weights. Where a unit has fewer rows, each row is cut into segments
// that take their places; segment s meets the columns of B that hold its own part of x', one for
// each token, and what other columns make of it is not used. k is taken in blocks of 64 bytes, of
// which a lane reads 16, and those are the k-slots of its products.
//
// Of x' two lanes of neighbouring columns load every second group of four for each other, so that
// no load leaves half of a sector of memory unused. One token has two columns that hold the same.
//
// A token's sums are the same bits however many tokens there are: only the column differs.
// Scales of blocks of k multiply the sum of each block.
template <class T, class Scales>
struct Matrix {
  using Bits = typename T::Bits;
  static constexpr bool kF8 = sizeof(Bits) == 1;
  static constexpr int kLane = 16 / sizeof(Bits);  // elements of a block in a lane
  static constexpr int kProducts = kLane / 4, kBlock = 4 * kLane;
  static constexpr int kK = T::kK, kWide = 4, kRowWarps = kWarps;
  static constexpr float kInputFactor = kF8 ? 1 / 16.0f : 1, kSumFactor = kF8 ? 16 : 1;
  using Source = typename T::Source;
  static constexpr bool kScaled =
      Scales::kGiven && (Scales::kCols < T::kPartK || Source::kParts > 1);
  static constexpr int kScaleCols = (T::kPartK + Scales::kCols - 1) / Scales::kCols;
  // Each lane holds the scales of its own rows; those of a tile may be one or differ.
  static constexpr bool kEachRow = Scales::kRows == 1;
  static_assert(!kScaled || ((Scales::kCols % kBlock == 0 || kScaleCols == 1) &&
                             (kEachRow || Scales::kRows % T::kTileRows == 0)),
                "a block has one scale, and so has a tile or each of its rows");
  static constexpr int kSegments = T::kUnitRows >= 16 ? 1 : 16 / T::kUnitRows;
  static constexpr int kRowBlocks = T::kUnitRows > 16 ? T::kUnitRows / 16 : 1;
  static constexpr int kWidth = kTokens == 1 ? 2 : kTokens;  // columns of a segment
  static constexpr int kColumns = kSegments * kWidth;
  static constexpr int kColumnBlocks = kColumns > 8 ? kColumns / 8 : 1;
  static constexpr int kSpread = kWarps * kSegments;  // blocks that are taken at once
  static constexpr int kPieceBlocks = T::kPieceBytes / (4 * 16);
  static constexpr int kCycleBlocks = T::kCycleBytes / (4 * 16);
  static constexpr int kLastBlocks = kCycleBlocks - (T::kCycle - 1) * kPieceBlocks;
  static constexpr int kPieceSteps = (kPieceBlocks + kSpread - 1) / kSpread;
  static constexpr int kSteps =
      (T::kPieces - 1) * kPieceSteps + (kLastBlocks + kSpread - 1) / kSpread;
  static constexpr int kChains = kRowBlocks == 1 && kSegments <= 8 ? 2 : 1;  // independent sums
  static_assert(T::kPartK % kBlock == 0, "k is whole blocks");

  // Layout: a lane's column of B is one segment of one token, and another segment in each column
  // block. In each round it loads four elements, for itself or the lane beside it.
  static constexpr int kPair = kTokens == 1 ? 1 : 2;  // tokens that two lanes load for
  static constexpr int kGroups = kLane / 8;           // of four, of a token in a block of k
  static constexpr int kParts = kColumnBlocks;
  static constexpr int kRounds = kSteps * kParts * kGroups * kPair;
  static __device__ __forceinline__ int quad() { return lane() % 4; }
  static __device__ __forceinline__ int column() { return lane() / 4; }
  static __device__ __forceinline__ int odd() { return column() % 2; }
  static __device__ __forceinline__ int row(int round) {
    return kTokens == 1 ? 0 : column() % kWidth / kPair * kPair + round % kPair;
  }
  static __device__ __forceinline__ int part(int round) {
    return round / (kGroups * kPair) % kParts;
  }
  static __device__ __forceinline__ int step(int round) {
    return round / (kGroups * kPair * kParts);
  }
  static __device__ __forceinline__ int segment(int round) {
    return part(round) * (8 / kWidth) + column() / kWidth;  // a constant and what the lane has
  }
  // The block of a segment in its piece.
  static __device__ __forceinline__ int block(int step, int segment) {
    return (step % kPieceSteps * kWarps + warp()) * kSegments + segment;
  }
  static __device__ __forceinline__ bool block_inside(int step, int segment) {
    const bool last = step / kPieceSteps % T::kCycle == T::kCycle - 1;
    if ((last ? kLastBlocks : kPieceBlocks) % kSpread == 0) return true;
    return block(step, segment) < (last ? kLastBlocks : kPieceBlocks);
  }
  // The first block of k of a piece.
  static __device__ __forceinline__ int piece_block(int piece) {
    return piece / T::kCycle * kCycleBlocks + piece % T::kCycle * kPieceBlocks;
  }
  static __device__ __forceinline__ bool inside(int round) {
    if (kColumns < 8 && segment(round) >= kSegments) return false;
    return block_inside(step(round), segment(round));
  }
  static __device__ __forceinline__ int offset(int round) {
    const int group = round / kPair % kGroups * 2 + odd(), at = step(round);
    return (piece_block(at / kPieceSteps) + block(at, segment(round))) * kBlock + quad() * kLane +
           group * kWide;
  }

  // What registers do not hold of x' lies in shared memory, where each thread has its own part.
  static constexpr int kStepWords = kColumnBlocks * 2 * kProducts;
  static constexpr int kHeld = kSteps * kStepWords <= kHeldWords ? kSteps : kHeldWords / kStepWords;
  static constexpr int kRestBytes = (kSteps - kHeld) * kStepWords * 4 * kThreads;
  static_assert(kRestBytes <= kScratchBytes, "x' does not fit");
  using Alone = AsOneToken<Matrix>;
  using Staged = Staging<Matrix>;
  static constexpr bool kStaged = kTokens > 1;  // what is normed
  struct Operand {
    u32 b[kHeld][kColumnBlocks][2 * kProducts];
    uint4* rest;  // [kSteps - kHeld, kColumnBlocks, kProducts / 2, kThreads]
    // Of the two rows of a lane's sums in each step, for the rows of one block of scales.
    float scale[kSteps][kRowBlocks][2] = {};
    u32 group = 0xffffffffu, token = 0;  // whose scales these are
    __device__ __forceinline__ explicit Operand(const Block& b)
        : rest(reinterpret_cast<uint4*>(b.scratch) + thread()) {}

    // Of what is first written in some lanes alone. Else its registers would be kept for it from
    // one run of the op to the next.
    __device__ __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
#pragma unroll
        for (int m = 0; m < kColumnBlocks; ++m)
#pragma unroll
          for (int w = 0; w < 2 * kProducts; ++w) b[i][m][w] = 0;
    }
    // The words of one step and column block.
    __device__ __forceinline__ void get(int step, int m, u32 (&to)[2 * kProducts]) const {
#pragma unroll
      for (int i = 0; i < kProducts / 2; ++i) {
        uint4 four;
        if (step < kHeld) {
          const u32(&held)[2 * kProducts] = b[step][m];
          four = {held[4 * i], held[4 * i + 1], held[4 * i + 2], held[4 * i + 3]};
        } else {
          four = rest[place(step, m, i)];
        }
        to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
      }
    }
    __device__ __forceinline__ void set(int step, int m, const u32 (&from)[2 * kProducts]) {
#pragma unroll
      for (int i = 0; i < 2 * kProducts; ++i)
        if (step < kHeld) b[step][m][i] = from[i];
#pragma unroll
      for (int i = 0; i < kProducts / 2; ++i)
        if (step >= kHeld)
          rest[place(step, m, i)] = {from[4 * i], from[4 * i + 1], from[4 * i + 2],
                                     from[4 * i + 3]};
    }
    static __device__ __forceinline__ int place(int step, int m, int i) {
      return (((step - kHeld) * kColumnBlocks + m) * (kProducts / 2) + i) * kThreads;
    }
  };

  // Rows that are stored as the products take them.
  static __device__ __forceinline__ void load_stored(const u16* from, Operand& out) {
#pragma unroll
    for (int at = 0; at < kSteps; ++at)
#pragma unroll
      for (int m = 0; m < kColumnBlocks; ++m) {
        const int round = (at * kColumnBlocks + m) * kGroups * kPair;
        const u16* piece = from + column() % kTokens * kK + offset(round) - odd() * kWide;
        const float4 words =
            inside(round) ? load_float4(reinterpret_cast<const float*>(piece)) : float4{0, 0, 0, 0};
        out.set(at, m,
                {__float_as_uint(words.x), __float_as_uint(words.y), __float_as_uint(words.z),
                 __float_as_uint(words.w)});
      }
  }

  static __device__ __forceinline__ u32 pack(float low, float high) {
    return kF8 ? pack_f16(low * kInputFactor, high * kInputFactor) : pack_bf16(low, high);
  }
  // Four elements are the words of one product.
  static __device__ __forceinline__ void put(Operand& out, int round, const float (&v)[kWide]) {
    u32 to[2 * kProducts];
    out.get(step(round), part(round), to);
    const int group = round / kPair % kGroups;
    const bool own = kPair == 1 || odd() == round % kPair;  // else it is for the lane beside
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 word = pack(v[2 * i], v[2 * i + 1]), other = __shfl_xor_sync(~0u, word, 4);
      u32 &even = to[group * 4 + i], &odds = to[group * 4 + 2 + i];
      const u32 before[2] = {round % kPair ? even : 0, round % kPair ? odds : 0};
      even = own ? (odd() ? other : word) : before[0];
      odds = own ? (odd() ? word : other) : before[1];
    }
    out.set(step(round), part(round), to);
  }

  static __device__ __forceinline__ void load_scales(const Run& run, u32 row, u32 token,
                                                     const typename Source::Choice& choice,
                                                     Operand& x) {
    const u32 group = Source::template scale_group<Scales::kRows>(run, row);
    if (group == x.group && (!Source::kOfToken || token == x.token)) return;
    x.group = group, x.token = token;
    const auto known = choice.of_token(token);
    u32 block_row = Source::template scale_row<Scales::kRows>(known, group, 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 2 * kRowBlocks; ++i) {
        const int place = i * 8 + column(), segment = place % kSegments;
        const bool up = place / kSegments >= T::kTileRows;
        const int k = (piece_block(step / kPieceSteps) + block(step, segment)) * kBlock;
        u32 own = group;  // a tile's rows are of one matrix and may reach beyond the run
        if constexpr (kEachRow)
          own = Source::template scale_group<1>(
              run, min(row + place / kSegments % T::kTileRows, run.count - 1));
        if constexpr (kEachRow || Source::kParts > 1)
          block_row = Source::template scale_row<Scales::kRows>(known, own, k / T::kPartK);
        const float* from = (up ? run.scale_up : run.scale) + u64(block_row) * kScaleCols;
        x.scale[step][i / 2][i % 2] =
            block_inside(step, segment) ? __ldg(from + k % T::kPartK / Scales::kCols) : 0;
      }
  }

  struct Sums {
    float c[kRowBlocks][kColumnBlocks][kChains][4] = {};
  };

  static __device__ __forceinline__ uint4 load(const u8* slot, const Run& run, u32 row,
                                               int virtual_row, int step) {
    const int unit_row = virtual_row / kSegments, segment = virtual_row % kSegments;
    if (!block_inside(step, segment)) return {0, 0, 0, 0};
    const int at = T::offset(run, row, unit_row) + T::within(block(step, segment) * (4 * 16));
    return *reinterpret_cast<const uint4*>(slot + at + quad() * 16);
  }

  struct Weights {
    uint4 v[kPieceSteps][kRowBlocks][2];
  };

  // Takes the next unit out of its slot.
  static __device__ __forceinline__ void fetch(Block& b, const Run& run, u32 row, int piece,
                                               Weights& w) {
    wait_full(b);
    const u8* slot = b.slot();
#pragma unroll
    for (int i = 0; i < kPieceSteps; ++i)
#pragma unroll
      for (int n = 0; n < kRowBlocks; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          w.v[i][n][half] = load(slot, run, row, n * 16 + half * 8 + column(),
                                 min(piece * kPieceSteps + i, kSteps - 1));
    release_slot(b);
  }

  static __device__ __forceinline__ void words(const uint4& low, const uint4& high, int product,
                                               u32 (&a)[4]) {
    const u32 l[4] = {low.x, low.y, low.z, low.w}, h[4] = {high.x, high.y, high.z, high.w};
    if constexpr (kF8) {
      halves_of_e4m3(l[product], a[0], a[2]);
      halves_of_e4m3(h[product], a[1], a[3]);
    } else {
      a[0] = l[2 * product], a[1] = h[2 * product];
      a[2] = l[2 * product + 1], a[3] = h[2 * product + 1];
    }
  }

  static __device__ __forceinline__ void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (kF8)
      multiply_f16(c, a, b0, b1);
    else
      multiply(c, a, b0, b1);
  }

  // One step of a unit: step `i` of what was fetched, step `step` of all of k.
  static __device__ __forceinline__ void add(const Weights& w, int step, int i, const Operand& x,
                                             Sums& sums) {
#pragma unroll
    for (int n = 0; n < kRowBlocks; ++n) {
      float own[kColumnBlocks][kChains][4] = {};
      float (&c)[kColumnBlocks][kChains][4] = kScaled ? own : sums.c[n];
      u32 b[kColumnBlocks][2 * kProducts];
#pragma unroll
      for (int m = 0; m < kColumnBlocks; ++m) x.get(step, m, b[m]);
#pragma unroll
      for (int p = 0; p < kProducts; ++p) {
        u32 a[4];
        words(w.v[i][n][0], w.v[i][n][1], p, a);
#pragma unroll
        for (int m = 0; m < kColumnBlocks; ++m)
          product(c[m][p % kChains], a, b[m][2 * p], b[m][2 * p + 1]);
      }
      if constexpr (kScaled) {
        const float (&scale)[2] = x.scale[step][n];
#pragma unroll
        for (int m = 0; m < kColumnBlocks; ++m)
#pragma unroll
          for (int chain = 0; chain < kChains; ++chain)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              sums.c[n][m][chain][e] = fmaf(c[m][chain][e], scale[e / 2], sums.c[n][m][chain][e]);
      }
    }
  }

  static __device__ __forceinline__ void add(Block& b, const Run& run, u32 row, int piece,
                                             Operand& x, Sums& sums) {
    Weights w;
    fetch(b, run, row, piece, w);
#pragma unroll
    for (int i = 0; i < kPieceSteps; ++i)
      if (piece * kPieceSteps + i < kSteps) add(w, piece * kPieceSteps + i, i, x, sums);
  }

  // Two whole tiles, so that the products of one hide what the other waits for; where many tokens
  // have several blocks of columns, those do that for each other.
  static constexpr bool kAside = kTokens <= 4 ? kColumnBlocks * kProducts <= 8 : kColumnBlocks == 1;
  static constexpr int kTogether = T::kWhole && kRowBlocks == 1 && kAside &&
                                           (!kScaled || Scales::kRows % (2 * T::kTileRows) == 0)
                                       ? 2
                                       : 1;
  static __device__ __forceinline__ void add_together(Block& b, const Run& run, u32 row, Operand& x,
                                                      Sums (&sums)[kTogether]) {
    Weights w[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) fetch(b, run, row + t * T::kTileRows, 0, w[t]);
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int t = 0; t < kTogether; ++t) add(w[t], i, i, x, sums[t]);
  }

  // The useful sums stand where a row's segment meets its own columns: each lane picks those that
  // it has, of two tokens or of one, and the segments of a row are added up.
  static constexpr int kOwn = kTokens >= 2 ? 2 : 1;
  static __device__ __forceinline__ void leave(Block& b, int first, int only, Sums& sums) {
#pragma unroll
    for (int n = 0; n < kRowBlocks; ++n) {
      float own[2][kOwn];
#pragma unroll
      for (int half = 0; half < 2; ++half) pick(sums.c[n], half, own[half]);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if constexpr (kSegments == 16) own[0][i] += own[1][i];
#pragma unroll
        for (int half = 0; half < (kSegments == 16 ? 1 : 2); ++half) {
          const float sum = segment_sum(own[half][i]) * kSumFactor;
          const int row = n * 16 + (half * 8 + column()) / kSegments, token = quad() * kOwn + i;
          if (column() % kSegments == 0 && token < kTokens && Source::leaves(token, only))
            *part_of_sum(b, first + T::sum_of(row), warp(), token) = sum;
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void pick(const float (&c)[kColumnBlocks][kChains][4], int half,
                                              float (&own)[kOwn]) {
    const int at = (half * 8 + column()) % kSegments * kWidth;  // the first of the columns
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      own[i] = 0;
#pragma unroll
      for (int m = 0; m < kColumnBlocks; ++m) {
        const int from = at - m * 8 - quad() * 2;  // from here, if it is in this lane and block
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          v[e] = c[m][0][half * 2 + e];
          if constexpr (kChains == 2) v[e] += c[m][1][half * 2 + e];
        }
        own[i] = from <= 0 && from > -kWidth ? v[i] : own[i];
      }
    }
  }

  // First over the lanes of which only one has picked something, then over the segments: the order
  // is the same for any number of tokens.
  static __device__ __forceinline__ float segment_sum(float v) {
#pragma unroll
    for (int o = kWidth >= 4 ? kWidth / 2 : 1; o < 4; o *= 2) v += __shfl_xor_sync(~0u, v, o);
#pragma unroll
    for (int o = 4; o < 4 * min(kSegments, 8); o *= 2) v += __shfl_xor_sync(~0u, v, o);
    return v;
  }
};

// Plain arithmetic, for all types and shapes: k in chunks of 16 bytes, or of one element where rows
// do not start at a multiple of 16. Thread t of a group holds the chunks t, t + kRound, ... of each
// piece, of all tokens; the rows of a unit are dealt to the groups.
template <class T, class Scales>
struct Scalar {
  using Bits = typename T::Bits;
  using Type = typename T::Type;
  static constexpr int kK = T::kK;
  static constexpr int kWide = T::kAligned ? 16 / sizeof(Bits) : 1;
  static constexpr int kChunks = kK / kWide;
  static constexpr int kPieceChunks = T::kWhole ? kChunks : T::kPieceBytes / 16;
  static constexpr int kCycleChunks = T::kAligned ? T::kCycleBytes / 16 : kChunks;
  static constexpr int kLastChunks = kCycleChunks - (T::kCycle - 1) * kPieceChunks;
  static constexpr int kRowWarps = kChunks >= 256 ? 8 : kChunks >= 128 ? 4 : kChunks >= 64 ? 2 : 1;
  static constexpr int kGroups = kWarps / kRowWarps;
  static constexpr int kRound = 32 * kRowWarps;  // chunks that a group takes at once
  static constexpr int kPieceRounds = (kPieceChunks + kRound - 1) / kRound;
  static constexpr int kOwnChunks =  // of a token, in a thread
      (T::kPieces - 1) * kPieceRounds + (kLastChunks + kRound - 1) / kRound;
  static constexpr int kGroupRows = (T::kUnitRows + kGroups - 1) / kGroups;
  static_assert(kGroups % T::kUnitRows == 0 || T::kUnitRows % kGroups == 0, "powers of two");
  // Scales that cover whole rows multiply the finished sums, others the sum of each chunk.
  using Source = typename T::Source;
  static constexpr bool kScaled =
      Scales::kGiven && (Scales::kCols < T::kPartK || Source::kParts > 1);
  static constexpr int kScaleCols = (T::kPartK + Scales::kCols - 1) / Scales::kCols;
  static_assert(!kScaled || ((Scales::kCols % kWide == 0 || kScaleCols == 1) &&
                             Scales::kRows % T::kTileRows == 0),
                "a chunk has one scale, and so have the rows of a tile");

  static __device__ __forceinline__ int group() { return warp() / kRowWarps; }
  static __device__ __forceinline__ int group_thread() {
    return (warp() % kRowWarps) * 32 + lane();
  }
  static __device__ __forceinline__ int chunk_of(int own) {
    const int piece = own / kPieceRounds;
    return piece / T::kCycle * kCycleChunks + piece % T::kCycle * kPieceChunks + in_piece(own);
  }
  static __device__ __forceinline__ int in_piece(int own) {
    return own % kPieceRounds * kRound + group_thread();
  }
  // False where a chunk is beyond the end of its piece.
  static __device__ __forceinline__ bool chunk_inside(int own) {
    if constexpr (kPieceChunks % kRound == 0 && kLastChunks % kRound == 0) return true;
    const bool last = own / kPieceRounds % T::kCycle == T::kCycle - 1;
    return in_piece(own) < (last ? kLastChunks : kPieceChunks);
  }

  // Layout: a round is a chunk of a token, one token after another.
  using Alone = Scalar;
  static constexpr bool kStaged = false;
  static constexpr int kTogether = 1;
  static constexpr int kParts = 1, kPair = kTokens, kRounds = kOwnChunks * kTokens;
  static constexpr int kWidth = 2;  // as of Matrix where all lanes have parts of the same token
  static __device__ __forceinline__ int row(int round) { return round % kTokens; }
  static __device__ __forceinline__ int part(int) { return 0; }
  static __device__ __forceinline__ int offset(int round) {
    return chunk_of(round / kTokens) * kWide;
  }
  static __device__ __forceinline__ bool inside(int round) { return chunk_inside(round / kTokens); }
  struct Operand {
    float x[kTokens][kOwnChunks][kWide] = {};
    float scale[T::kMatrices][kOwnChunks] =
        {};  // of this thread's chunks, for the rows of one block
    u32 group = 0xffffffffu, token = 0;
    __device__ __forceinline__ explicit Operand(const Block&) {}
  };
  static __device__ __forceinline__ void put(Operand& out, int round, const float (&v)[kWide]) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) out.x[row(round)][round / kTokens][i] = v[i];
  }

  struct Sums {
    float v[kTokens][kGroupRows] = {};
  };

  static __device__ __forceinline__ void add(Block& b, const Run& run, u32 row, int piece,
                                             Operand& x, Sums& sums) {
    wait_full(b);
    const u8* slot = b.slot();
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      int unit_row = i * kGroups + group();
      if (T::kUnitRows < kGroups && unit_row >= T::kUnitRows) continue;
#pragma unroll
      for (int token = 0; token < kTokens; ++token)
        sums.v[token][i] +=
            dot(slot + T::offset(run, row, unit_row), x, token, piece, unit_row / T::kTileRows);
    }
    release_slot(b);
  }

  static __device__ __forceinline__ void leave(Block& b, int first, int only, Sums& sums) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      float total = warp_sums(sums.v[token]);
      constexpr int kShare = 32 / kGroupRows;
      int unit_row = (lane() / kShare) * kGroups + group();
      if (lane() % kShare == 0 && unit_row < T::kUnitRows && Source::leaves(token, only))
        *part_of_sum(b, first + T::sum_of(unit_row), warp() % kRowWarps, token) = total;
    }
  }

  static __device__ __forceinline__ void load_scales(const Run& run, u32 row, u32 token,
                                                     const typename Source::Choice& choice,
                                                     Operand& x) {
    const u32 group = Source::template scale_group<Scales::kRows>(run, row);
    if (group == x.group && (!Source::kOfToken || token == x.token)) return;
    x.group = group, x.token = token;
    const auto known = choice.of_token(token);
    u32 block_row = Source::template scale_row<Scales::kRows>(known, group, 0);
#pragma unroll
    for (int m = 0; m < T::kMatrices; ++m)
#pragma unroll
      for (int r = 0; r < kOwnChunks; ++r) {
        const int k = chunk_of(r) * kWide;
        if constexpr (Source::kParts > 1)
          block_row = Source::template scale_row<Scales::kRows>(known, group, k / T::kPartK);
        const float* from = (m ? run.scale_up : run.scale) + u64(block_row) * kScaleCols;
        x.scale[m][r] = chunk_inside(r) ? __ldg(from + k % T::kPartK / Scales::kCols) : 0;
      }
  }

 private:
  // The dot product of this thread's part of one row, or of one piece of it, with one token's x'.
  static __device__ __forceinline__ float dot(const u8* row, const Operand& x, int token, int piece,
                                              int matrix) {
    float a = 0, c = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < kPieceRounds; ++i) {
      const int r = piece * kPieceRounds + i;
      if (r >= kOwnChunks) continue;
      if (!chunk_inside(r)) continue;
      add_chunk(row, i * kRound + group_thread(), x.x[token][r], a, c);
      if constexpr (kScaled) {
        float scale = x.scale[0][r];
        if (T::kMatrices == 2 && matrix) scale = x.scale[T::kMatrices - 1][r];
        sum = fmaf(a + c, scale, sum);
        a = c = 0;
      }
    }
    return kScaled ? sum : a + c;
  }

  static __device__ __forceinline__ void add_chunk(const u8* row, int at, const float (&x)[kWide],
                                                   float& a, float& c) {
    if constexpr (!T::kAligned) {
      a = fmaf(Type::widen(reinterpret_cast<const Bits*>(row)[at]), x[0], a);
    } else {
      uint4 w = *reinterpret_cast<const uint4*>(row + T::within(at * 16));
      const u32 word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(Bits) == 2) {
          float low, high;
          Type::widen(word[k], low, high);
          a = fmaf(low, x[2 * k], a);
          c = fmaf(high, x[2 * k + 1], c);
        } else if constexpr (sizeof(Bits) == 1) {
          float f[4];
          floats_of_e4m3(word[k], f);
          a = fmaf(f[0], x[4 * k], a), c = fmaf(f[1], x[4 * k + 1], c);
          a = fmaf(f[2], x[4 * k + 2], a), c = fmaf(f[3], x[4 * k + 3], c);
        } else {
          a = fmaf(__uint_as_float(word[k]), x[k], a);
        }
      }
    }
  }
};
