// y = epilogue(x' @ w + bias). Every unit of weights is taken by all warps: each row of it is cut
// along k over kRowWarps warps, so a thread keeps its part of x' in registers for the whole run.
// Partial sums of up to kChunkRows rows wait in shared memory for one barrier, then one warp
// finishes those rows.
#pragma once
#include "program.cuh"

struct BF16 {
  static constexpr bool kGiven = true;
  using Bits = u16;
  static __device__ __forceinline__ float widen(u16 v) { return __uint_as_float(u32(v) << 16); }
  static __device__ __forceinline__ void widen(u32 v, float& a, float& b) {
    a = __uint_as_float(v << 16);
    b = __uint_as_float(v & 0xffff0000u);
  }
};
struct F16 {
  static constexpr bool kGiven = true;
  using Bits = u16;
  static __device__ __forceinline__ float widen(u16 v) { return float_of_half(v); }
  static __device__ __forceinline__ void widen(u32 v, float& a, float& b) {
    a = float_of_half(u16(v));
    b = float_of_half(u16(v >> 16));
  }
};
struct F32 {
  static constexpr bool kGiven = true;
  using Bits = float;
  static __device__ __forceinline__ float widen(float v) { return v; }
};

struct F8 {
  static constexpr bool kGiven = true;
  using Bits = u8;
  static __device__ __forceinline__ float widen(u8 v) {
    float f[4];
    floats_of_e4m3(v, f);
    return f[0];
  }
};

// One f32 for each block of so many rows and columns of a weight.
struct Unscaled {
  static constexpr bool kGiven = false;
  static constexpr int kRows = 1, kCols = 1;
};
template <int kBlockRows, int kBlockCols>
struct Scaled {
  static constexpr bool kGiven = true;
  static constexpr int kRows = kBlockRows, kCols = kBlockCols;
};

struct None {  // of an operand that an op does not have
  using Bits = u16;
  static constexpr bool kGiven = false;
  static __device__ __forceinline__ float widen(u16) { return 0; }
};

enum Epilogue { kStore = 0, kAdd = 1, kGate = 2 };

// Sums over the warp of kCount values; lane l gets the one of index l / (32 / kCount).
template <int kCount>
__device__ __forceinline__ float warp_sums(float (&v)[kCount]) {
  int offset = 16;
#pragma unroll
  for (int n = kCount; n > 1; n /= 2, offset /= 2) {
    bool upper = lane() & offset;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      float send = upper ? v[i] : v[i + n / 2], keep = upper ? v[i + n / 2] : v[i];
      v[i] = keep + __shfl_xor_sync(~0u, send, offset);
    }
  }
  for (; offset; offset /= 2) v[0] += __shfl_xor_sync(~0u, v[0], offset);
  return v[0];
}

// Positions [lo, hi) of the past that belong to a share: page_share of ops/attend.py.
__device__ __forceinline__ void page_share(u32 lo, u32 hi, u32 split, u32 splits, u32& begin,
                                           u32& end) {
  begin = end = lo;
  if (lo >= hi) return;
  u32 first = lo / kPage, pages = (hi + kPage - 1) / kPage - first;
  u32 p = first + pages * split / splits, q = first + pages * (split + 1) / splits;
  begin = min(max(lo, p * kPage), hi);
  end = max(min(hi, q * kPage), lo);
}

__device__ __forceinline__ u32 first_visible(u32 position, u32 window) {
  return window && position + 1 > window ? position + 1 - window : 0;
}

// How x' is made of x in the arena.
struct Plain {};
template <class Type, u32 kEpsBits>
struct Normed {};
template <int kSplits, int kGroup, int kHeadDim, int kAttnWindow>
struct Merged {};

template <int kK, class Type, int kTileRows, int kEpilogue, class Input, class Bias, class Scales>
struct Linear {
  using Bits = typename Type::Bits;
  static constexpr int kMatrices = kEpilogue == kGate ? 2 : 1;
  static constexpr int kRowBytes = kK * sizeof(Bits);
  static constexpr int kTileBytes = kTileRows * kRowBytes * kMatrices;
  // Chunks of 16 bytes, or of one element where rows do not start at a multiple of 16.
  static constexpr bool kAligned = kRowBytes % 16 == 0;
  static constexpr int kWide = kAligned ? 16 / sizeof(Bits) : 1;
  static constexpr int kChunks = kK / kWide;
  static constexpr bool kWholeTiles = kTileBytes <= kSlotBytes;
  static constexpr int kPieces = kWholeTiles ? 1 : (kRowBytes + kSlotBytes - 1) / kSlotBytes;
  static constexpr int kPieceChunks = kWholeTiles ? kChunks : kSlotBytes / 16;
  static_assert(kWholeTiles || (kAligned && kTileRows == 1), "large rows are streamed one by one");
  static constexpr int kRowWarps = kChunks >= 256 ? 8 : kChunks >= 128 ? 4 : kChunks >= 64 ? 2 : 1;
  static constexpr int kGroups = kWarps / kRowWarps;
  static constexpr int kRound = 32 * kRowWarps;  // chunks that a group takes at once
  static constexpr int kPieceRounds = (kPieceChunks + kRound - 1) / kRound;
  static constexpr int kRounds =
      (kPieces - 1) * kPieceRounds + (kChunks - (kPieces - 1) * kPieceChunks + kRound - 1) / kRound;
  static constexpr int kUnitRows = kWholeTiles ? kTileRows * kMatrices : 1;
  static constexpr int kGroupRows = (kUnitRows + kGroups - 1) / kGroups;
  static_assert(kGroups % kUnitRows == 0 || kUnitRows % kGroups == 0, "both are powers of two");
  static constexpr int kMatrixPitch =  // in the slot
      kAligned ? kTileRows * kRowBytes : (kTileRows * kRowBytes + 47) / 16 * 16;
  static_assert(kChunkRows % kTileRows == 0, "a chunk of rows is whole tiles");
  // Scales that cover whole rows multiply the finished sums, others the sum of each chunk.
  static constexpr bool kRowScaled = Scales::kGiven && Scales::kCols >= kK;
  static constexpr bool kChunkScaled = Scales::kGiven && !kRowScaled;
  static constexpr int kScaleCols = (kK + Scales::kCols - 1) / Scales::kCols;
  static_assert(!kChunkScaled || (Scales::kCols % kWide == 0 && Scales::kRows % kTileRows == 0),
                "a chunk has one scale, and so have the rows of a tile");

  // The loader's side.

  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    for (u32 row = 0; row < run.count; row += kTileRows) {
      u32 rows = min(u32(kTileRows), run.count - row);
      if constexpr (kWholeTiles) {
        if (!l.acquire()) return false;
        const u8* from[2] = {run.w + u64(row) * kRowBytes, run.w_up + u64(row) * kRowBytes};
        u32 bytes[2];
        const u8* start[2];
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          u32 shift = kAligned ? 0 : u32(reinterpret_cast<u64>(from[m]) & 15);
          start[m] = from[m] - shift;
          bytes[m] = kAligned ? rows * kRowBytes : (rows * kRowBytes + shift + 15) / 16 * 16;
        }
        l.expect(kMatrices == 2 ? bytes[0] + bytes[1] : bytes[0]);
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) l.copy(m * kMatrixPitch, start[m], bytes[m]);
        l.next();
      } else {
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          const u8* from = (m ? run.w_up : run.w) + u64(row) * kRowBytes;
          for (int done = 0; done < kRowBytes; done += kSlotBytes) {
            if (!l.acquire()) return false;
            u32 bytes = min(kSlotBytes, kRowBytes - done);
            l.expect(bytes);
            l.copy(0, from + done, bytes);
            l.next();
          }
        }
      }
    }
    return true;
  }

  // The consumers' side. Thread t of a group holds the chunks t, t + kRound, ... of each piece.

  struct X {
    float v[kRounds][kWide];
  };

  static __device__ __forceinline__ int group() { return warp() / kRowWarps; }
  static __device__ __forceinline__ int group_thread() {
    return (warp() % kRowWarps) * 32 + lane();
  }
  static __device__ __forceinline__ int chunk_of(int round) {
    int piece = round / kPieceRounds;
    return piece * kPieceChunks + (round - piece * kPieceRounds) * kRound + group_thread();
  }
  // False where the last round of a piece goes beyond it.
  static __device__ __forceinline__ bool inside(int round) {
    if constexpr (kPieceChunks % kRound == 0 && kChunks % kRound == 0) return true;
    int piece = round / kPieceRounds;
    int in_piece = (round - piece * kPieceRounds) * kRound + group_thread();
    return in_piece < kPieceChunks && piece * kPieceChunks + in_piece < kChunks;
  }

  static __device__ __forceinline__ void load_floats(const float* from, float (&to)[kWide]) {
    if constexpr (kWide % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWide; i += 4) {
        float4 v = load_float4(from + i);
        to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWide; ++i) to[i] = load_float(from + i);
    }
  }

  static __device__ __forceinline__ void load_x(const float* x, X& out) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) out.v[r][i] = 0;
      if (inside(r)) load_floats(x + chunk_of(r) * kWide, out.v[r]);
    }
  }

  // Bits of the norm's weight, fetched while the inputs are awaited.
  template <class In>
  struct Held {};
  template <class T, u32 kEps>
  struct Held<Normed<T, kEps>> {
    typename T::Bits v[kRounds][kWide];
  };

  template <class In>
  static __device__ __forceinline__ void prefetch(const Run&, Held<In>&) {}
  template <class T, u32 kEps>
  static __device__ __forceinline__ void prefetch(const Run& run, Held<Normed<T, kEps>>& held) {
    using B = typename T::Bits;
    const B* w = reinterpret_cast<const B*>(run.norm);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (!inside(r)) continue;
      const B* at = w + chunk_of(r) * kWide;
      if constexpr (kWide * sizeof(B) % 16 == 0) {
#pragma unroll
        for (int i = 0; i < int(kWide * sizeof(B) / 16); ++i)
          reinterpret_cast<uint4*>(held.v[r])[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
      } else {
#pragma unroll
        for (int i = 0; i < kWide; ++i) held.v[r][i] = __ldg(at + i);
      }
    }
  }

  static __device__ __forceinline__ void make_x(Block& b, const Run& run, Held<Plain>&, X& x) {
    load_x(b.params.arena + run.x, x);
  }

  template <class T, u32 kEps>
  static __device__ __forceinline__ void make_x(Block& b, const Run& run,
                                                Held<Normed<T, kEps>>& held, X& x) {
    load_x(b.params.arena + run.x, x);
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
#pragma unroll
      for (int i = 0; i < kWide; ++i) sum += x.v[r][i] * x.v[r][i];
    sum = warp_sum(sum);
    if (lane() == 0) b.shared.squares[warp()] = sum;
    sync_consumers();
    sum = 0;
#pragma unroll
    for (int i = 0; i < kRowWarps; ++i) sum += b.shared.squares[group() * kRowWarps + i];
    float scale = inverse_root(sum / kK + __uint_as_float(kEps));
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        x.v[r][i] = inside(r) ? x.v[r][i] * scale * T::widen(held.v[r][i]) : 0;
  }

  // Adds up the shares of attention that Attend left: merge of ops/attention.py.
  template <int kSplits, int kGroup, int kHeadDim, int kAttnWindow>
  static __device__ __forceinline__ void make_x(
      Block& b, const Run& run, Held<Merged<kSplits, kGroup, kHeadDim, kAttnWindow>>&, X& x) {
    static_assert(kHeadDim % kWide == 0, "a chunk lies in one head");
    const float* part = b.params.arena + run.x;
    u32 hi = b.position(), lo = first_visible(hi, kAttnWindow);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) x.v[r][i] = 0;
      if (!inside(r)) continue;
      int at = chunk_of(r) * kWide, head = at / kHeadDim, column = at % kHeadDim;
      int g = head / kGroup, j = head % kGroup;
      const float* from = part + (g * kSplits * kGroup + j) * (kHeadDim + 2);
      constexpr int kStride = kGroup * (kHeadDim + 2);  // from share to share
      float2 top[kSplits];                              // maximum and sum of a share
      float most = -infinity(), sum = 0;
      u32 used = 0;  // a bit for each share that is not empty
#pragma unroll
      for (int s = 0; s < kSplits; ++s) {
        u32 begin, end;
        page_share(lo, hi, s, kSplits, begin, end);
        used |= u32(s == 0 || begin < end) << s;
        top[s] = {-infinity(), 0};
        if (used >> s & 1) top[s] = load_float2(from + s * kStride + kHeadDim);
        most = fmaxf(most, top[s].x);
      }
#pragma unroll
      for (int s = 0; s < kSplits; ++s) {
        if (!(used >> s & 1)) continue;
        float weight = exp2_fast((top[s].x - most) * kLog2e);
        sum += weight * top[s].y;
#pragma unroll
        for (int i = 0; i < kWide; i += kWide % 2 ? 1 : 2) {
          const float* at_i = from + s * kStride + column + i;
          if constexpr (kWide % 2 == 0) {
            float2 two = load_float2(at_i);
            x.v[r][i] += weight * two.x, x.v[r][i + 1] += weight * two.y;
          } else {
            x.v[r][i] += weight * load_float(at_i);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kWide; ++i) x.v[r][i] /= sum;
    }
  }

  // The scales of this thread's chunks for the rows of one block.
  struct S {
    float v[kMatrices][kRounds];
    u32 block = 0xffffffffu;
  };

  static __device__ __forceinline__ void load_scales(const Run& run, u32 row, S& s) {
    const u32 block = (run.first + row) / Scales::kRows;
    if (block == s.block) return;
    s.block = block;
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const float* from = (m ? run.scale_up : run.scale) + u64(block) * kScaleCols;
        s.v[m][r] = inside(r) ? __ldg(from + chunk_of(r) * kWide / Scales::kCols) : 0;
      }
  }

  // The dot product of this thread's part of one row, or of one piece of it.
  static __device__ __forceinline__ float dot(const u8* row, const X& x, int piece, const S& s,
                                              int matrix) {
    float a = 0, c = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < kPieceRounds; ++i) {
      const int r = piece * kPieceRounds + i;
      if (r >= kRounds) continue;
      if (!inside(r)) continue;
      const int at = i * kRound + group_thread();
      if constexpr (!kAligned) {
        a = fmaf(Type::widen(reinterpret_cast<const Bits*>(row)[at]), x.v[r][0], a);
      } else {
        uint4 w = reinterpret_cast<const uint4*>(row)[at];
        const u32 word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if constexpr (sizeof(Bits) == 2) {
            float low, high;
            Type::widen(word[k], low, high);
            a = fmaf(low, x.v[r][2 * k], a);
            c = fmaf(high, x.v[r][2 * k + 1], c);
          } else if constexpr (sizeof(Bits) == 1) {
            float f[4];
            floats_of_e4m3(word[k], f);
            a = fmaf(f[0], x.v[r][4 * k], a), c = fmaf(f[1], x.v[r][4 * k + 1], c);
            a = fmaf(f[2], x.v[r][4 * k + 2], a), c = fmaf(f[3], x.v[r][4 * k + 3], c);
          } else {
            a = fmaf(__uint_as_float(word[k]), x.v[r][k], a);
          }
        }
      }
      if constexpr (kChunkScaled) {
        float scale = s.v[0][r];
        if (kMatrices == 2 && matrix) scale = s.v[kMatrices - 1][r];
        sum = fmaf(a + c, scale, sum);
        a = c = 0;
      }
    }
    return kChunkScaled ? sum : a + c;
  }

  // Where the partial sum of this warp for row `row` of the chunk goes; rows of w_up come second.
  static __device__ __forceinline__ float* partial(Block& b, int row) {
    return b.shared.partial[b.chunk & 1] + row * kPartialPitch + warp() % kRowWarps;
  }

  // A tile that fits a slot: its rows are dealt to the groups.
  static __device__ __forceinline__ void take_tile(Block& b, const Run& run, const X& x, const S& s,
                                                   u32 row, int in_chunk) {
    wait_full(b);
    const u8* slot = b.slot();
    float sum[kGroupRows];
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      int unit_row = i * kGroups + group();
      sum[i] = 0;
      if (kUnitRows < kGroups && unit_row >= kUnitRows) continue;
      int matrix = unit_row / kTileRows, tile_row = unit_row % kTileRows;
      const u8* from = slot + matrix * kMatrixPitch + tile_row * kRowBytes;
      if constexpr (!kAligned) {
        const u8* base = (matrix ? run.w_up : run.w) + u64(row) * kRowBytes;
        from += reinterpret_cast<u64>(base) & 15;
      }
      sum[i] = dot(from, x, 0, s, matrix);
    }
    release_slot(b);
    float total = warp_sums(sum);
    constexpr int kShare = 32 / kGroupRows;
    int unit_row = (lane() / kShare) * kGroups + group();
    if (lane() % kShare == 0 && unit_row < kUnitRows) {
      int matrix = unit_row / kTileRows, tile_row = unit_row % kTileRows;
      *partial(b, matrix * kChunkRows + in_chunk + tile_row) = total;
    }
  }

  // A row that takes several slots.
  static __device__ __forceinline__ void take_row(Block& b, const X& x, const S& s, int in_chunk) {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      float sum = 0;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        wait_full(b);
        sum += dot(b.slot(), x, piece, s, m);
        release_slot(b);
      }
      sum = warp_sum(sum);
      if (lane() == 0) *partial(b, m * kChunkRows + in_chunk) = sum;
    }
  }

  static __device__ __forceinline__ float add_up(Block& b, int row) {
    const float* from = b.shared.partial[b.chunk & 1] + row * kPartialPitch;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kRowWarps; ++i) sum += from[i];
    return sum;
  }

  // One warp, a lane for each row of the chunk.
  static __device__ __forceinline__ void finish(Block& b, const Run& run, u32 row, float old,
                                                float scale, float scale_up) {
    if (row >= run.count) return;
    float y = add_up(b, lane());
    if constexpr (kRowScaled) y *= scale;
    if constexpr (Bias::kGiven)
      y += Bias::widen(reinterpret_cast<const typename Bias::Bits*>(run.bias)[row]);
    if constexpr (kEpilogue == kGate) {
      float up = add_up(b, kChunkRows + lane());
      if constexpr (kRowScaled) up *= scale_up;
      if constexpr (Bias::kGiven)
        up += Bias::widen(reinterpret_cast<const typename Bias::Bits*>(run.bias_up)[row]);
      y = y / (1 + exp2_fast(-y * kLog2e)) * up;
    }
    if constexpr (kEpilogue == kAdd) y += old;
    store_float(b.params.arena + run.y + run.first + row, y);
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    Held<Input> held;
    prefetch(run, held);
    if (!wait_for_inputs(b, run)) return false;
    X x;
    make_x(b, run, held, x);
    S s;
    for (u32 begin = 0; begin < run.count; begin += kChunkRows) {
      const bool mine = warp() == (begin / kChunkRows) % kWarps;
      const u32 row = begin + lane();
      float old = 0;
      if constexpr (kEpilogue == kAdd)
        if (mine && row < run.count) old = load_float(b.params.arena + run.y + run.first + row);
      float scale = 1, scale_up = 1;
      if constexpr (kRowScaled)
        if (mine && row < run.count) {
          scale = __ldg(run.scale + (run.first + row) / Scales::kRows);
          if (kMatrices == 2) scale_up = __ldg(run.scale_up + (run.first + row) / Scales::kRows);
        }
      const u32 end = min(begin + kChunkRows, run.count);
      for (u32 r = begin; r < end; r += kTileRows) {
        if constexpr (kChunkScaled) load_scales(run, r, s);
        if constexpr (kWholeTiles) {
          take_tile(b, run, x, s, r, r - begin);
        } else {
          take_row(b, x, s, r - begin);
        }
      }
      sync_consumers();
      if (mine) {
        finish(b, run, row, old, scale, scale_up);
        if (end == run.count) {
          __syncwarp();
          if (lane() == 0) signal(b, run);
        }
      }
      ++b.chunk;
    }
    return true;
  }
};
