// Attention of one kv head and its group of query heads over a share of the past positions, whose
// keys and values arrive through the ring a page at a time. Pages are stored as the matrix units
// like to read them: [64 positions][head_dim] bf16, with the 16-byte pieces of a row permuted (see
// swizzle).
//
// Scores and sums are mma products with rows of A for the query heads of some tokens of one
// sequence, 16 at most: further tokens of a step have tiles of their own, which other workers take.
// Rows beyond them hold anything, and what comes of them is not used. A warp takes 16
// positions, warps 0 to 3 the even pages of the share and warps 4 to 7 the odd ones. Each warp
// keeps its own maximum and sums (online softmax, in powers of two); they are merged at the end.
//
// The op Append is made of the same code, for it is small: its tiles follow those of the shares,
// and put the step's keys and values into the cache. A token's own position is scored apart, from
// shared memory. The earlier tokens of its sequence in the same step are put into their pages where
// those have arrived, for the cache may not have them yet. So a token finds the same bits whether
// those before it were in its step or in earlier ones.
#pragma once
#include "combine.cuh"
#include "heads.cuh"

template <int kHeads, int kKvHeads, int kHeadDim, int kAttnWindow, int kSplits, int kBlock,
          bool kTagged, class QNorm, class KNorm, u32 kEpsBits, u32 kScaleBits, int kQPitch,
          int kKPitch, int kVPitch, bool kTagsOut>
struct Attend {
  using H = Head<kHeadDim>;
  using Values = typename H::Values;
  static constexpr int kGroup = kHeads / kKvHeads, kRows = kGroup * kBlock;
  static_assert(kRows <= 16 && kHeadDim % 16 == 0 && kHeadDim <= 128, "shape of a kv head");
  static constexpr u32 kPageBytes = H::kPageBytes;
  static_assert(kPageBytes <= kSlotBytes, "a page of one kv head fits a slot");
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr u32 kBlockTiles = kKvHeads * kSplits;  // of kBlock tokens
  static constexpr u32 kTiles = (kTokens + kBlock - 1) / kBlock * kBlockTiles;
  static constexpr int kPitch = kHeadDim + 2;
  static constexpr int kMergePitch = kTokens == 1 ? kPitch : kHeadDim + 8;  // rows in other banks
  static constexpr int kYPitch = kHeads * kSplits * kPitch;                 // of a token's results
  // Heads that a tile takes: queries, then key and value of each token up to its last.
  static constexpr int kTaken = kRows + 2 * kTokens;
  static constexpr int kPieces = kHeadDim / 4;  // loaded at once, of a head
  static constexpr int kLoads = (kTaken * kPieces + kThreads - 1) / kThreads;
  static_assert(kTokens * kPieces <= kThreads, "a thread loads one piece of the angles");
  static __device__ __forceinline__ float scale() { return __uint_as_float(kScaleBits) * kLog2e; }

  // The memory between barriers: rotated queries, the new keys and values, the scores of each with
  // its own; first the heads as the products left them, then the partial results of four warps.
  struct Scratch {
    u16 q[16 * kHeadDim], k[kTokens][kHeadDim], v[kTokens][kHeadDim];
    float angles[kTokens][kHeadDim];  // cosines of a position, then sines
    union {
      float raw[kTaken][kHeadDim];
      float merged[4][kRows][kMergePitch];
    };
    float own[kRows];
  };
  static_assert(sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  // Tokens [begin, end) of the step, of one sequence, whose first token in the step is `first`.
  struct Span {
    u32 first = 0, begin = 0, end = 0;
    // The next one that has tokens in [lo, hi).
    __device__ __forceinline__ bool next(const Params& p, u32 lo, u32 hi) {
      if constexpr (kTokens == 1) {
        begin = end;
        return end++ == 0;
      }
      begin = max(end, lo);
      if (begin >= hi) return false;
      const u32 sequence = p.sequences[begin];
      end = begin + 1;
#pragma unroll 1
      while (end < hi && p.sequences[end] == sequence) ++end;
      first = begin;
#pragma unroll 1
      while (first > 0 && p.sequences[first - 1] == sequence) --first;
      return true;
    }
    // The next one of a tile; tiles that append have all tokens.
    __device__ __forceinline__ bool next_of(const Params& p, u32 tile) {
      const u32 lo = tile / kBlockTiles * kBlock;
      return tile < kTiles ? next(p, lo, min(lo + kBlock, p.count)) : next(p, 0, p.count);
    }
    __device__ __forceinline__ u32 tokens() const { return end - begin; }
    __device__ __forceinline__ u32 known() const { return end - first; }  // of the sequence
    __device__ __forceinline__ u32 before() const { return begin - first; }
  };

  // The pages of a span, from the first that its first token sees; a split has one of each round.
  static __device__ __forceinline__ u32 first_of(const Block& b, const Span& span) {
    return first_visible(b.position(span.begin), kAttnWindow) / kPage;
  }
  static __device__ __forceinline__ u32 end_of(const Block& b, const Span& span) {
    return (b.position(span.end - 1) + kPage - 1) / kPage;
  }
  // Nobody reads the result of a split that has no page, but for the first.
  static __device__ __forceinline__ bool idle(const Block& b, const Span& span, u32 split) {
    const u32 hi = b.position(span.end - 1);
    return split > 0 && split >= active_shares(first_visible(hi, kAttnWindow), hi, kSplits);
  }

  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    Block& b = l.b;
    if (run.first >= kTiles) return true;
    if (!l.past(run)) return false;
    for (u32 tile = run.first; tile < run.first + run.count; ++tile)
      for (Span span; span.next_of(b.params, tile);) {
        const u32 split = tile % kSplits, first = first_of(b, span), end = end_of(b, span);
        if (idle(b, span, split)) continue;
        for (u32 round = first / kSplits; round * kSplits < end; ++round) {
          const u32 page = page_of(round, split, kSplits);
          if (page < first || page >= end) continue;
          u64 at = H::template page_at<kKvHeads>(b, span.begin, page, tile % kBlockTiles / kSplits);
#pragma unroll
          for (int kv = 0; kv < 2; ++kv) {
            if (!l.acquire()) return false;
            l.expect(kPageBytes);
            l.copy(0, (kv ? run.w_up : run.w) + at, kPageBytes);
            l.next();
          }
        }
      }
    return true;
  }

  // What turning heads needs, fetched while the inputs are awaited.
  struct Held {
    Values q_norm, k_norm;
  };

  // A head that a tile takes: of which token, from the first that the span knows, and which one.
  struct Taken {
    u32 token, column, operand, pitch;
    bool wanted;
    __device__ __forceinline__ Taken(const Run& run, u32 g, const Span& span, u32 index,
                                     bool queries, bool fresh) {
      const bool query = index < kRows, value = (index - kRows) % 2;
      token = query ? span.before() + index / kGroup : (index - kRows) / 2;
      column = query ? g * kGroup + index % kGroup : g;
      operand = query ? run.x : value ? run.x3 : run.x2;
      pitch = query ? kQPitch : value ? kVPitch : kKPitch;
      wanted = index < kTaken && token < span.known() && (query ? queries : fresh);
    }
  };

  // The tokens' angles and heads to shared memory, all loads under way at once; queries, and keys
  // and values, only where they are needed.
  static __device__ __forceinline__ void gather(const Block& b, const Run& run, u32 g,
                                                const Span& span, bool queries, bool fresh,
                                                Scratch& scratch) {
    float4 angle = {}, v[kLoads] = {};  // else kept, for who loads none, from run to run
    const u32 of = thread() / kPieces, at = thread() % kPieces * 4;
    if (of < span.known()) {
      const u64 row = b.position(span.first + of);
      angle = __ldg(reinterpret_cast<const float4*>(run.bias_up + (row * kHeadDim + at) * 4));
    }
    Retry retry;
    for (u32 other = 1; other;) {
      other = 0;
      u32 tag[kLoads];
      bool in[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const u32 index = thread() + i * kThreads;
        const Taken head(run, g, span, index / kPieces, queries, fresh);
        tag[i] = b.tag(head.operand), in[i] = head.wanted;
        const float* from = b.at(head.operand) + (span.first + head.token) * head.pitch +
                            head.column * kHeadDim + index % kPieces * 4;
        if (in[i]) v[i] = load_float4(from);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (kTagged && in[i])
          other |= other_tag(v[i].x, tag[i]) | other_tag(v[i].y, tag[i]) |
                   other_tag(v[i].z, tag[i]) | other_tag(v[i].w, tag[i]);
      if (other && retry.in_vain(b, tag[0])) break;
    }
    if (of < span.known()) *reinterpret_cast<float4*>(scratch.angles[of] + at) = angle;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const u32 index = thread() + i * kThreads;
      if (index >= kTaken * kPieces) continue;
      if (kTagged) v[i] = {untagged(v[i].x), untagged(v[i].y), untagged(v[i].z), untagged(v[i].w)};
      *reinterpret_cast<float4*>(scratch.raw[index / kPieces] + index % kPieces * 4) = v[i];
    }
  }

  // True when a split needs the new keys and values: for the tokens' own positions, or for a page
  // that they are in.
  static __device__ __forceinline__ bool takes_new(const Block& b, const Span& span, u32 split) {
    if (split == 0) return true;
    if (span.known() == 1) return false;
    const u32 first = b.position(span.first) / kPage, last = (b.position(span.end - 1) - 1) / kPage;
    return split == split_of(first, kSplits) || split == split_of(last, kSplits);
  }

  // Queries to shared memory, and new keys and values, where they are needed.
  static __device__ __forceinline__ void prepare(Block& b, const Run& run, const Held& held, u32 g,
                                                 const Span& span, bool queries, bool fresh,
                                                 Scratch& scratch) {
    gather(b, run, g, span, queries, fresh, scratch);
    sync_consumers();
#pragma unroll 1
    for (u32 i = warp(); i < kRows + 2 * span.known(); i += kWarps) {
      const Taken head(run, g, span, i, queries, fresh);
      if (!head.wanted) continue;
      Values v, angles;
      H::take(scratch.raw[i], v);
      H::take(scratch.angles[head.token], angles);
      if (i < kRows) {
        H::template turn<QNorm, kEpsBits>(angles, held.q_norm, v);
        H::put(scratch.q, i, v);
      } else {
        const bool key = (i - kRows) % 2 == 0;
        if (key) H::template turn<KNorm, kEpsBits>(angles, held.k_norm, v);
        H::put((key ? scratch.k : scratch.v)[head.token], 0, v);
      }
    }
    sync_consumers();
  }

  // A row in its place in a page.
  static __device__ __forceinline__ void put_row(const u16 (&made)[kHeadDim], u16* page, u32 at) {
    if (lane() < kHeadDim / 8)
      reinterpret_cast<uint4*>(page + at * kHeadDim)[swizzle<kHeadDim>(at, lane())] =
          reinterpret_cast<const uint4*>(made)[lane()];
  }

  // New keys and values of kv head g into the caches.
  static __device__ __forceinline__ void append(const Block& b, const Run& run, u32 g,
                                                const Span& span, const Scratch& scratch) {
#pragma unroll 1
    for (u32 i = warp(); i < 2 * span.tokens(); i += kWarps) {
      const u32 token = i / 2, position = b.position(span.begin + token);
      u8* cache = const_cast<u8*>(i % 2 ? run.w_up : run.w);
      const u64 at = H::template page_at<kKvHeads>(b, span.begin, position / kPage, g);
      put_row((i % 2 ? scratch.v : scratch.k)[token], reinterpret_cast<u16*>(cache + at),
              position % kPage);
    }
    fence_proxy();  // others will stream what is new
    sync_consumers();
  }

  // Scores of the tokens' own positions, in powers of two; one key each needs no matrix unit.
  static __device__ __forceinline__ void score_own(Scratch& scratch, u32 rows, u32 before) {
#pragma unroll 1
    for (u32 r = warp() - kWarps / 2; r < rows; r += kWarps / 2) {
      float sum = 0;
      for (u32 e = lane(); e < kHeadDim; e += 32) {
        const u32 q = r * kHeadDim + swizzle<kHeadDim>(r, e / 8) * 8 + e % 8;
        sum = fmaf(BF16::widen(scratch.q[q]), BF16::widen(scratch.k[before + r / kGroup][e]), sum);
      }
      sum = warp_sum(sum) * scale();
      if (lane() == 0) scratch.own[r] = sum;
    }
  }

  // The 16 positions of this warp in a page get what the step's earlier tokens have for them.
  static __device__ __forceinline__ void patch(const Block& b, const Span& span, u32 position0,
                                               const u16 (&made)[kTokens][kHeadDim], u16* page) {
    const u32 first = b.position(span.first);
#pragma unroll 1
    for (u32 t = 0; t + 1 < span.known(); ++t) {
      const u32 row = first + t - position0;
      if (row >= 16) continue;
      put_row(made[t], page, position0 % kPage + row);
    }
    fence_proxy();  // the copy engine will write to this slot again
    __syncwarp();
  }

  // Online softmax of one warp. Rows of A are query heads: lane l has rows l / 4 and l / 4 + 8.
  struct State {
    float most[2] = {-infinity(), -infinity()}, sum[2] = {0, 0};
    float out[kHeadDim / 8][4];
  };

  // Of what follows from it the compiler keeps nothing from run to run: steps of several tokens
  // have no registers for that.
  static __device__ __forceinline__ u32 lane_here() {
    return kTokens > 1 ? opaque(lane()) : lane();
  }

  // s = q k^T of 16 positions. The queries are read again each time: held in registers they would
  // be a fifth of all that a thread has.
  static __device__ __forceinline__ void score(const u16* q, const u16* k, u32 row0,
                                               float (&s)[2][4]) {
    const u32 here = lane_here();
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      u32 m[4], a[4];
      load_at(m, k, row0 + here % 8 + here / 16 * 8, step * 2 + here / 8 % 2);
      load_at(a, q, here % 16, step * 2 + here / 16);
      multiply(s[0], a, m[0], m[1]);
      multiply(s[1], a, m[2], m[3]);
    }
  }

  // The four blocks whose rows the lanes name, 8 lanes for each.
  static __device__ __forceinline__ void load_at(u32 (&m)[4], const u16* rows, u32 row, u32 piece) {
    load_matrices(m, shared_address(rows + row * kHeadDim + swizzle<kHeadDim>(row, piece) * 8));
  }

  // Positions [lo, hi) that the two rows of a lane see.
  struct Visible {
    int lo[2], hi[2];
    __device__ __forceinline__ void find(const Block& b, const Span& span) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 token = kTokens == 1 ? 0 : (half * 8 + lane() / 4) / kGroup;
        const bool in = kTokens == 1 || token < span.tokens();
        hi[half] = in ? b.position(span.begin + token) : 0;
        lo[half] = in ? first_visible(hi[half], kAttnWindow) : 0;
      }
    }
  };

  // Scores to weights for the 16 positions from `from` on; p: the weights as rows of A.
  static __device__ __forceinline__ void weigh(State& state, float (&s)[2][4], const Visible& seen,
                                               int from, u32 (&p)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int lo = seen.lo[half] - from, hi = seen.hi[half] - from;
      float most = state.most[half];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int at = n * 8 + (lane() % 4) * 2 + i;
          float& v = s[n][half * 2 + i];
          v = at < lo || at >= hi ? -infinity() : v * scale();
          most = fmaxf(most, v);
        }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      float base = most == -infinity() ? 0 : most, fade = exp2_fast(state.most[half] - base);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& v = s[n][half * 2 + i];
          v = exp2_fast(v - base);
          sum += v;
        }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      state.most[half] = most;
      state.sum[half] = fmaf(state.sum[half], fade, sum);
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        state.out[d][half * 2] *= fade, state.out[d][half * 2 + 1] *= fade;
      }
    }
    p[0] = pack_bf16(s[0][0], s[0][1]), p[1] = pack_bf16(s[0][2], s[0][3]);
    p[2] = pack_bf16(s[1][0], s[1][1]), p[3] = pack_bf16(s[1][2], s[1][3]);
  }

  static __device__ __forceinline__ void add_values(State& state, const u32 (&p)[4], const u16* v,
                                                    u32 row0) {
    const u32 here = lane_here(), row = row0 + here % 16;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      u32 m[4], piece = d * 2 + here / 16;
      load_matrices_transposed(
          m, shared_address(v + row * kHeadDim + swizzle<kHeadDim>(row, piece) * 8));
      multiply(state.out[2 * d], p, m[0], m[1]);
      multiply(state.out[2 * d + 1], p, m[2], m[3]);
    }
  }

  static __device__ __forceinline__ void store_state(const State& state, float (*to)[kMergePitch]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = lane() / 4 + half * 8;
      if (row >= kRows) continue;
      if (lane() % 4 == 0)
        to[row][kHeadDim] = state.most[half], to[row][kHeadDim + 1] = state.sum[half];
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        float* at = to[row] + d * 8 + (lane() % 4) * 2;
        at[0] = state.out[d][half * 2], at[1] = state.out[d][half * 2 + 1];
      }
    }
  }

  // What another warp has found joins this warp's.
  static __device__ __forceinline__ void join(State& state, float (*from)[kMergePitch]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = lane() / 4 + half * 8;
      if (row >= kRows) continue;
      float other = from[row][kHeadDim], most = fmaxf(state.most[half], other);
      float base = most == -infinity() ? 0 : most;
      float mine = exp2_fast(state.most[half] - base), theirs = exp2_fast(other - base);
      state.most[half] = most;
      state.sum[half] = fmaf(state.sum[half], mine, from[row][kHeadDim + 1] * theirs);
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& v = state.out[d][half * 2 + i];
          v = fmaf(v, mine, from[row][d * 8 + (lane() % 4) * 2 + i] * theirs);
        }
    }
  }

  // Warps 4 to 7, if they had pages, give to 0 to 3, and all threads add up those four and the
  // tokens' own positions. y: of the span's first token, this tile's columns.
  static __device__ __forceinline__ void merge(State& state, Scratch& scratch, const Span& span,
                                               bool both, bool own, float* y, u32 tag) {
    if (both) {
      if (warp() >= 4) store_state(state, scratch.merged[warp() - 4]);
      sync_consumers();
      if (warp() < 4) join(state, scratch.merged[warp()]);
      __syncwarp();
    }
    if (warp() < 4) store_state(state, scratch.merged[warp()]);
    sync_consumers();
    constexpr u32 kRowPairs = kPitch / 2;  // of columns; the last is maximum and sum
    const u32 rows = span.tokens() * kGroup;
    const auto put = [&](const Parts& parts, u32 row, u32 pair) {
      float2 v = parts.sum(scratch, row, pair * 2, span.before());
      if constexpr (kTagsOut) v = {tagged(v.x, tag), tagged(v.y, tag)};
      store_float2(y + row / kGroup * kYPitch + row % kGroup * kPitch + pair * 2, v);
    };
    if constexpr (kTokens == 1) {
#pragma unroll 1
      for (u32 i = thread(); i < rows * kRowPairs; i += kThreads)
        put(Parts(scratch, i / kRowPairs, own), i / kRowPairs, i % kRowPairs);
    } else {  // a thread has one row, whose parts it weighs once
      constexpr u32 kOf = kThreads / 16;
      const u32 row = thread() / kOf;
      if (row >= rows) return;
      const Parts parts(scratch, row, own);
#pragma unroll 1
      for (u32 pair = thread() % kOf; pair < kRowPairs; pair += kOf) put(parts, row, pair);
    }
  }

  // The parts of a row, of four warps and of the token's own position, and their weights.
  struct Parts {
    float most, base, weight[4], own_weight = 0;
    bool own;
    __device__ __forceinline__ Parts(const Scratch& scratch, u32 row, bool with_own)
        : own(with_own) {
      most = own ? scratch.own[row] : -infinity();
#pragma unroll
      for (int w = 0; w < 4; ++w) most = fmaxf(most, scratch.merged[w][row][kHeadDim]);
      base = most == -infinity() ? 0 : most;
      if (own) own_weight = exp2_fast(scratch.own[row] - base);
#pragma unroll
      for (int w = 0; w < 4; ++w) weight[w] = exp2_fast(scratch.merged[w][row][kHeadDim] - base);
    }
    __device__ __forceinline__ float2 sum(const Scratch& scratch, u32 row, u32 column,
                                          u32 before) const {
      const bool last = column == kHeadDim;
      float2 sum = {0, 0};
      if (own) {
        const u16* v = scratch.v[before + row / kGroup];
        sum.x = last ? 0 : own_weight * BF16::widen(v[column]);
        sum.y = last ? own_weight : own_weight * BF16::widen(v[column + 1]);
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float* from = scratch.merged[w][row];
        if (!last) sum.x = fmaf(weight[w], from[column], sum.x);
        sum.y = fmaf(weight[w], from[column + 1], sum.y);
      }
      if (last) sum.x = most / kLog2e;
      return sum;
    }
  };

  static __device__ __forceinline__ void tile(Block& b, const Run& run, const Held& held, u32 index,
                                              const Span& span, Scratch& scratch) {
    const bool appends = index >= kTiles;
    const u32 place = index % kBlockTiles, g = appends ? index - kTiles : place / kSplits;
    const u32 split = place % kSplits;
    if (!appends && idle(b, span, split)) return;
    prepare(b, run, held, g, span, !appends, appends || takes_new(b, span, split), scratch);
    if (appends) return append(b, run, g, span, scratch);
    if (split == 0 && warp() >= kWarps / 2)
      score_own(scratch, span.tokens() * kGroup, span.before());
    State state;
    Visible seen;
    seen.find(b, span);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) state.out[i / 4][i % 4] = 0;
    bool both = false;
    const u32 first = first_of(b, span), end = end_of(b, span);
    for (u32 round = first / kSplits; round * kSplits < end; ++round) {
      const u32 page = page_of(round, split, kSplits);
      if (page < first || page >= end) continue;
      both |= round % 2;
      add_page(b, span, page, round % 2 == (warp() >= 4), scratch, seen, state);
    }
    float* y = b.at(run.y) + span.begin * kYPitch + place * kGroup * kPitch;
    merge(state, scratch, span, both, split == 0, y, b.tag(run.y));
    sync_consumers();
  }

  // A page's keys and then its values, each a unit of the ring.
  static __device__ __forceinline__ void add_page(Block& b, const Span& span, u32 page, bool mine,
                                                  const Scratch& scratch, const Visible& seen,
                                                  State& state) {
    const u32 row0 = warp() % 4 * 16, from = page * kPage + row0;
    const bool fresh = kTokens > 1 && span.known() > 1 && from + 16 > b.position(span.first);
    u32 p[4] = {};
    wait_full(b);
    if (mine) {
      if (fresh) patch(b, span, from, scratch.k, reinterpret_cast<u16*>(b.slot()));
      float s[2][4];
      score(scratch.q, reinterpret_cast<const u16*>(b.slot()), row0, s);
      weigh(state, s, seen, int(from), p);
    }
    release_slot(b);
    wait_full(b);
    if (mine) {
      if (fresh) patch(b, span, from, scratch.v, reinterpret_cast<u16*>(b.slot()));
      add_values(state, p, reinterpret_cast<const u16*>(b.slot()), row0);
    }
    release_slot(b);
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    Held held;
    H::template fetch_norm<QNorm>(run.norm, held.q_norm);
    H::template fetch_norm<KNorm>(run.norm2, held.k_norm);
    if (!wait_for_inputs<kTagged>(b, run)) return false;
    Scratch& scratch = *reinterpret_cast<Scratch*>(b.scratch);
    for (u32 i = run.first; i < run.first + run.count; ++i)
      for (Span span; span.next_of(b.params, i);) tile(b, run, held, i, span, scratch);
    if (thread() == 0) run.first < kTiles ? signal<kTagsOut>(b, run) : signal<false>(b, run);
    return true;
  }
};
