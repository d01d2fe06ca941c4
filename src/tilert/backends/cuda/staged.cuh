// x' of several tokens on its way to the matrix units, where it is normed: lanes make it of the
// elements that they would have if a token were alone, so that squares are summed in the same
// order, and hand it to those that multiply it through shared memory. Both are lanes of one warp.
//
// M: the Matrix whose x' it is; see there for steps, segments and blocks.
#pragma once
#include "program.cuh"

// The Layout of a token alone.
template <class M>
struct AsOneToken {
  static constexpr int kPair = 1, kWidth = 2, kColumns = M::kSegments * kWidth;
  static constexpr int kParts = kColumns > 8 ? kColumns / 8 : 1;
  static constexpr int kRounds = M::kSteps * kParts * M::kGroups;
  static __device__ __forceinline__ int row(int) { return 0; }
  static __device__ __forceinline__ int part(int round) { return round / M::kGroups % kParts; }
  static __device__ __forceinline__ int step(int round) { return round / (M::kGroups * kParts); }
  static __device__ __forceinline__ int segment(int round) {
    return part(round) * (8 / kWidth) + M::column() / kWidth;
  }
  static __device__ __forceinline__ bool inside(int round) {
    if (kColumns < 8 && segment(round) >= M::kSegments) return false;
    return M::block_inside(step(round), segment(round));
  }
  // Of a lane's four elements in their block.
  static __device__ __forceinline__ int within(int round) {
    return M::quad() * M::kLane + (round % M::kGroups * 2 + M::odd()) * M::kWide;
  }
  static __device__ __forceinline__ int offset(int round) {
    const int at = step(round), block = M::block(at, segment(round));
    return (M::piece_block(at / M::kPieceSteps) + block) * M::kBlock + within(round);
  }
};

// Room for some tokens, [kWarps, kAtOnce, kSteps, kSegments, kBlock] in 16 bits, behind what
// registers do not hold: so many that up to eight loads of a lane are under way.
template <class M>
struct Staging {
  using Alone = AsOneToken<M>;
  static constexpr int kLoads = Alone::kRounds, kMost = kLoads > 4 ? 1 : kLoads > 2 ? 2 : 4;
  static constexpr int kAtOnce = kMost < kTokens ? kMost : kTokens;
  static constexpr int kTokenSize = M::kSteps * M::kSegments * M::kBlock;
  static_assert(M::kRestBytes + kWarps * kAtOnce * kTokenSize * 2 <= kScratchBytes, "no room");

  static __device__ __forceinline__ void put(const Block& b, int token, int round,
                                             const float (&v)[M::kWide]) {
    if (!Alone::inside(round)) return;
    u16* to = at(b, token, Alone::step(round), Alone::segment(round)) + Alone::within(round);
    *reinterpret_cast<uint2*>(to) = {M::pack(v[0], v[1]), M::pack(v[2], v[3])};
  }

  // By the lanes whose column is one of the tokens from `first` on.
  static __device__ __forceinline__ void take(const Block& b, int first, typename M::Operand& out) {
    const int token = M::column() % M::kWidth - first;
    if (token < 0 || token >= kAtOnce) return;
#pragma unroll
    for (int step = 0; step < M::kSteps; ++step)
#pragma unroll
      for (int m = 0; m < M::kColumnBlocks; ++m) {
        const int round = (step * M::kColumnBlocks + m) * M::kGroups * M::kPair;
        u32 to[2 * M::kProducts] = {};
        if (M::inside(round)) {
          const u16* from = at(b, token, step, M::segment(round)) + M::quad() * M::kLane;
#pragma unroll
          for (int i = 0; i < M::kProducts / 2; ++i) {
            const uint4 four = reinterpret_cast<const uint4*>(from)[i];
            to[4 * i] = four.x, to[4 * i + 1] = four.y;
            to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
          }
        }
        out.set(step, m, to);
      }
  }

 private:
  static __device__ __forceinline__ u16* at(const Block& b, int token, int step, int segment) {
    const int place = (warp() * kAtOnce + token) * kTokenSize;
    return reinterpret_cast<u16*>(b.scratch + M::kRestBytes) + place +
           (step * M::kSegments + segment) * M::kBlock;
  }
};
