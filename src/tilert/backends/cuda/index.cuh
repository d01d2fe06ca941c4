// The indexer of sparse attention: keys and queries turned by a Hadamard matrix and rounded to
// e4m3, scores of all positions on the matrix units, and the search for the best of them. Keys are
// stored as [64 positions][kDim] e4m3 a page, and their scales as [64] f32.
#pragma once
#include "draw.cuh"
#include "mla.cuh"

// run.w: keys, run.w_up: their scales, run.norm and run.norm2: weight and shift of the keys' norm,
// run.bias_up: the rope table, run.x: the query heads, run.x2: the keys. A warp takes a tile of a
// token.
template <int kHeads, int kDim, int kRope, bool kInterleaved, bool kTagged, class Norm, class Shift,
          u32 kEpsBits, int kQPitch, int kKPitch>
struct IndexRope {
  static constexpr int kOwn = (kDim + 31) / 32;  // elements l + 32 i of a row are lane l's
  static_assert(kDim >= 16 && (kDim & (kDim - 1)) == 0, "the matrix is of a power of two");
  struct Scratch {
    float row[kWarps][kDim];
  };
  static_assert(sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const Here me;
    for (u32 i = me.warp; i < run.count * kTokens; i += kWarps) {
      const u32 tile = run.first + i / kTokens, token = i % kTokens;
      if (!given(b, token)) continue;
      tile < kHeads ? turn_query(me, b, run, token, tile) : append(me, b, run, token);
    }
    sync_consumers();
    if (me.thread == 0) signal<false>(b, run);
    return true;
  }

 private:
  static __device__ __forceinline__ bool inside(const Here& me, int i) {
    return me.lane + 32 * i < kDim;
  }

  static __device__ __forceinline__ void turn_query(const Here& me, Block& b, const Run& run,
                                                    u32 token, u32 head) {
    float* q = b.at(run.x) + token * kQPitch + head * kDim;
    float v[kOwn], factor;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) v[i] = inside(me, i) ? load_float(q + me.lane + 32 * i) : 0;
    turn(me, b, run, token, v);
    const float scale = scale_of(v, factor);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float rounded[4];
      floats_of_e4m3(e4m3_of(v[i] * factor, 0), rounded);
      if (inside(me, i)) store_float(q + me.lane + 32 * i, rounded[0] * scale);
    }
  }

  static __device__ __forceinline__ void append(const Here& me, Block& b, const Run& run,
                                                u32 token) {
    float v[kOwn], factor;
    fetch_normed(me, b, run, token, v);
    turn(me, b, run, token, v);
    const float scale = scale_of(v, factor);
    const u32 position = b.position(token);
    const u64 row = u64(physical_page(b, token, position)) * kPage + position % kPage;
    u8* key = const_cast<u8*>(run.w) + row * kDim;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (inside(me, i)) key[me.lane + 32 * i] = u8(e4m3_of(v[i] * factor, 0));
    if (me.lane == 0) reinterpret_cast<float*>(const_cast<u8*>(run.w_up))[row] = scale;
    fence_proxy();  // others will stream what is new
  }

  static __device__ __forceinline__ void fetch_normed(const Here& me, const Block& b,
                                                      const Run& run, u32 token, float (&v)[kOwn]) {
    const float* k = b.at(run.x2) + token * kKPitch;
    const float* from[kOwn];
    u32 tag[kOwn];
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      from[i] = inside(me, i) ? k + me.lane + 32 * i : nullptr;
      tag[i] = b.tag(run.x2);
    }
    if constexpr (kTagged) {
      load_tagged(b, from, tag, v);
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) v[i] = from[i] ? load_float(from[i]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += v[i];
    const float mean = warp_sum(sum) / kDim;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      v[i] = inside(me, i) ? v[i] - mean : 0;
      squares = fmaf(v[i], v[i], squares);
    }
    const float root = inverse_root(warp_sum(squares) / kDim + __uint_as_float(kEpsBits));
    auto weight = reinterpret_cast<const typename Norm::Bits*>(run.norm);
    auto shift = reinterpret_cast<const typename Shift::Bits*>(run.norm2);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int e = min(me.lane + 32 * i, kDim - 1);
      v[i] = fmaf(v[i] * root, Norm::widen(__ldg(weight + e)), Shift::widen(__ldg(shift + e)));
    }
  }

  // The rotation of the first columns, and the matrix: one bit of the elements' numbers at a time.
  static __device__ __forceinline__ void turn(const Here& me, Block& b, const Run& run, u32 token,
                                              float (&v)[kOwn]) {
    float* row = reinterpret_cast<Scratch*>(b.scratch)->row[me.warp];
    const float* angles =
        reinterpret_cast<const float*>(run.bias_up) + u64(b.position(token)) * kRope;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (inside(me, i)) row[me.lane + 32 * i] = v[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int e = me.lane + 32 * i;
      if (e < kRope)
        v[i] = turned<kRope, kInterleaved>([&](int from) { return row[from]; }, angles, e);
    }
    __syncwarp();  // the row is free for the next tile
#pragma unroll
    for (int bit = 1; bit < min(kDim, 32); bit *= 2)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float other = __shfl_xor_sync(~0u, v[i], bit);
        v[i] = me.lane & bit ? other - v[i] : v[i] + other;
      }
#pragma unroll
    for (int bit = 1; bit < kOwn; bit *= 2)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (i & bit) continue;
        const float first = v[i], second = v[i + bit];
        v[i] = first + second, v[i + bit] = first - second;
      }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) v[i] *= inverse_root(kDim);
  }

  // quantised of ops/index.py: the least power of two with which no element overflows; factor: one
  // over it.
  static __device__ __forceinline__ float scale_of(const float (&v)[kOwn], float& factor) {
    float most = 1e-4f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) most = fmaxf(most, v[i] < 0 ? -v[i] : v[i]);
#pragma unroll
    for (int o = 16; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    const u32 exponent = (__float_as_uint(most * (1 / 448.0f)) + 0x7fffffu) >> 23;
    factor = __uint_as_float((254 - exponent) << 23);
    return __uint_as_float(exponent << 23);
  }
};

// Tile s: scores of the pages of share s. A page, its keys and their scales, is a unit of the ring,
// for all tokens of a sequence. Rows of A are query heads, which are rounded already and so are f16
// without loss; a warp takes some of the heads of one token and some of the positions. run.w: keys,
// run.w_up: their scales, run.x: query heads, run.x2: their weights.
template <int kHeads, int kDim, int kTopk, int kSplits, int kWidth, bool kTagged, u32 kScaleBits,
          int kQPitch, int kWeightPitch>
struct IndexScore {
  static constexpr int kKeyBytes = kPage * kDim, kUnitBytes = kKeyBytes + kPage * 4;
  static_assert(kUnitBytes <= kSlotBytes, "a page of keys fits a slot");
  static_assert(kDim % 16 == 0 && kDim <= 128 && kHeads <= 128, "shape of the indexer");
  static constexpr int kRowBlocks = (kHeads + 15) / 16;
  static constexpr int kHeadWarps = kRowBlocks <= 2 ? 1 : kRowBlocks <= 4 ? 2 : 4;
  static constexpr int kBlocks = (kRowBlocks + kHeadWarps - 1) / kHeadWarps;  // of a warp
  static constexpr int kTokenWarps = kHeadWarps * kTokens;
  static_assert(kTokenWarps <= kWarps, "a token's heads have warps of their own");
  static constexpr int kColumns = kTokenWarps;  // blocks of 8 positions of a warp
  static constexpr int kSteps = kDim / 16;
  // Words of a key that a lane reads at once, each one step's: k-slots are dealt to suit them.
  static constexpr int kWords = kDim % 64 == 0 ? 4 : 1;

  struct Scratch {
    float part[2][kTokens][kHeadWarps][kPage];
  };
  static_assert(sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  // Tokens [begin, end) of the step, of one sequence.
  struct Span {
    u32 begin = 0, end = 0;
    __device__ __forceinline__ bool next(const Block& b) {
      begin = end;
      if (!given(b, begin)) return false;
      do ++end;
      while (given(b, end) && b.params.sequences[end] == b.params.sequences[begin]);
      return true;
    }
    __device__ __forceinline__ bool has(u32 token) const { return begin <= token && token < end; }
    // Positions that its last token sees; none where no token needs scores.
    __device__ __forceinline__ u32 seen(const Block& b) const {
      const u32 most = b.position(end - 1) + 1;
      return most > kTopk ? most : 0;
    }
  };

  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    Block& b = l.b;
    bool ready = kPasses > 1;
    if (ready && !l.past(run)) return false;
    for (u32 tile = run.first; tile < run.first + run.count; ++tile)
      for (Span span; span.next(b);) {
        const u32 seen = span.seen(b);
        for (u32 page = tile; page * kPage < seen; page += kSplits) {
          if (!ready && !l.past(run)) return false;
          ready = true;
          if (!l.acquire()) return false;
          const u64 at = physical_page(b, span.begin, page * kPage);
          l.expect(kUnitBytes);
          l.copy(0, run.w + at * kKeyBytes, kKeyBytes);
          l.copy(kKeyBytes, run.w_up + at * kPage * 4, kPage * 4);
          l.next();
        }
      }
    return true;
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const Here me;
    if (some_scored(b)) {
      Queries queries;
      fetch(me, b, run, queries);  // rows without a token hold anything
      u32 turn = 0;
      for (u32 tile = run.first; tile < run.first + run.count; ++tile)
        for (Span span; span.next(b);) {
          const u32 seen = span.seen(b);
          for (u32 page = tile; page * kPage < seen; page += kSplits, turn ^= 1)
            add_page(me, b, run, span, tile, page, turn, queries);
        }
      sync_consumers();
    }
    if (me.thread == 0) signal<false>(b, run);
    return true;
  }

 private:
  // What a warp multiplies keys with, and the weights of a lane's two heads of each block.
  struct Queries {
    u32 a[kBlocks][kSteps][4];
    float weight[kBlocks][2];
  };

  static __device__ __forceinline__ bool scored(const Block& b, u32 token) {
    return given(b, token) && b.position(token) >= kTopk;
  }

  static __device__ __forceinline__ bool some_scored(const Block& b) {
    for (u32 t = 0; t < given_tokens(b); ++t)
      if (scored(b, t)) return true;
    return false;
  }

  // Whose heads a warp has.
  static __device__ __forceinline__ u32 token(const Here& me) {
    return me.warp / kHeadWarps % kTokens;
  }

  // The first of the elements of a row that a lane has in a step: those of slots 2 quad, 2 quad +
  // 1, 8 + 2 quad and 9 + 2 quad.
  static __device__ __forceinline__ int column(const Here& me, int step) {
    return (step / kWords * 4 + me.lane % 4) * 4 * kWords + step % kWords * 4;
  }

  static __device__ __forceinline__ void fetch(const Here& me, const Block& b, const Run& run,
                                               Queries& to) {
    const int first = me.warp % kHeadWarps * kBlocks * 16 + me.lane / 4;
    const float *q = b.at(run.x) + token(me) * kQPitch,
                *w = b.at(run.x2) + token(me) * kWeightPitch;
    const float* from[2 * kBlocks];
    u32 tag[2 * kBlocks];
    float weight[2 * kBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const int head = first + i * 8;
      from[i] = head < kHeads ? w + head : nullptr;
      tag[i] = b.tag(run.x2);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        float4 four = {0, 0, 0, 0};
        if (head < kHeads) four = load_float4(q + head * kDim + column(me, step));
        to.a[i / 2][step][i % 2] = pack_f16(four.x, four.y);
        to.a[i / 2][step][2 + i % 2] = pack_f16(four.z, four.w);
      }
    }
    if constexpr (kTagged) {
      load_tagged(b, from, tag, weight);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) weight[i] = from[i] ? load_float(from[i]) : 0;
    }
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) to.weight[i / 2][i % 2] = weight[i];
  }

  static __device__ __forceinline__ void add_page(const Here& me, Block& b, const Run& run,
                                                  const Span& span, u32 split, u32 page, u32 turn,
                                                  const Queries& queries) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(b.scratch);
    wait_full(b);
    u8* slot = b.slot();
    if ((page + 1) * kPage > b.position(span.begin)) {
      const u32 token = span.begin + me.warp;
      if (token < span.end && b.position(token) / kPage == page) replace(me, b, run, token, slot);
      sync_consumers();
    }
    const float* scales = reinterpret_cast<const float*>(slot + kKeyBytes);
    const int heads = me.warp % kHeadWarps, first = me.warp / kTokenWarps * kColumns * 8;
    float* part = scratch.part[turn][token(me)][heads];
#pragma unroll 2
    for (int n = 0; n < kColumns; ++n) {
      if (kTokens > 1 && (!span.has(token(me)) || !scored(b, token(me)))) continue;
      float sum[2];
      score(me, slot + (first + n * 8 + me.lane / 4) * kDim, queries, sum);
      const int at = first + n * 8 + me.lane * 2;  // of the lanes that keep the sums
      if (me.lane < 4) part[at] = sum[0] * scales[at], part[at + 1] = sum[1] * scales[at + 1];
    }
    release_slot(b);
    sync_consumers();
    for (u32 i = me.thread; i < kTokens * kPage; i += kThreads) {
      const u32 token = i / kPage, at = i % kPage;
      if (!span.has(token) || !scored(b, token) || page * kPage + at > b.position(token)) continue;
      float sum = 0;
#pragma unroll
      for (int h = 0; h < kHeadWarps; ++h) sum += scratch.part[turn][token][h][at];
      const u32 column = split * kWidth + page / kSplits * kPage + at;
      store_float(b.at(run.y) + token * kSplits * kWidth + column,
                  sum * __uint_as_float(kScaleBits));
    }
  }

  // What was copied for a token's own position may be older than what is there now.
  static __device__ __forceinline__ void replace(const Here& me, const Block& b, const Run& run,
                                                 u32 token, u8* slot) {
    const u32 position = b.position(token), at = position % kPage;
    const u64 row = u64(physical_page(b, token, position)) * kPage + at;
    const float* from = reinterpret_cast<const float*>(run.w + row * kDim);
    float* to = reinterpret_cast<float*>(slot + at * kDim);
    if (me.lane < kDim / 4) to[me.lane] = load_float(from + me.lane);
    if (me.lane == 0)
      reinterpret_cast<float*>(slot + kKeyBytes)[at] =
          load_float(reinterpret_cast<const float*>(run.w_up) + row);
    fence_proxy();  // the copy engine will write to this slot again
  }

  // The weighted sums over a warp's heads for the 8 positions of whose keys the lanes name one
  // each; lane l < 4 gets those of positions 2 l and 2 l + 1.
  static __device__ __forceinline__ void score(const Here& me, const u8* key,
                                               const Queries& queries, float (&sum)[2]) {
    float c[kBlocks][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; step += kWords) {
      u32 word[kWords];
      const u8* from = key + column(me, step);
      if constexpr (kWords == 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
      } else {
        word[0] = *reinterpret_cast<const u32*>(from);
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        u32 low, high;
        halves_of_e4m3(word[i], low, high);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) multiply_f16(c[n], queries.a[n][step + i], low, high);
      }
    }
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum[e % 2] = fmaf(queries.weight[n][e / 2], fmaxf(c[n][e], 0), sum[e % 2]);
#pragma unroll
    for (int o = 4; o < 32; o *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[e] += __shfl_xor_sync(~0u, sum[e], o);
  }
};

// The kTopk positions with the largest scores, of equal ones the lower positions, in rising order.
// Up to three passes over the scores find the border, eleven bits at a time from the top; then each
// warp takes a stretch of the positions. The scores come from L2 in each pass, so many loads of a
// thread are under way together. Tile t: those of token t. run.x: scores, run.y: the chosen
// positions.
template <int kTopk, int kSplits, int kWidth>
struct Select {
  static constexpr int kDigits = 2048, kOwn = kDigits / kThreads;
  struct Scratch {
    u32 bins[kDigits];
    u32 sums[kWarps];
    u32 taken[kWarps][2];  // by a warp: scores above the border, and at it
    u32 digit, left, alike;
  };
  static_assert(sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const Here me;
    for (u32 token = run.first; token < run.first + run.count; ++token) {
      if (!given(b, token)) continue;
      const u32 seen = b.position(token) + 1;
      const Row row{b.at(run.x) + token * kSplits * kWidth, b.at(run.y) + token * kTopk, seen};
      if (seen <= kTopk)
        for (u32 i = me.thread; i < seen; i += kThreads) row.put(i, i);
      else
        choose(me, b, row);
      sync_consumers();
    }
    if (me.thread == 0) signal<false>(b, run);
    return true;
  }

 private:
  // What a token sees, and what is chosen of it.
  struct Row {
    const float* scores;
    float* chosen;
    u32 seen;
    __device__ __forceinline__ void put(u32 at, u32 position) const {
      store_float(chosen + at, __uint_as_float(position));
    }
    // Integers in the order of the scores of four positions; 0 and -0 are the same score.
    __device__ __forceinline__ void load(u32 position, u32 (&key)[4]) const {
      const u32 page = position / kPage;
      const float4 v =
          load_float4(scores + page % kSplits * kWidth + page / kSplits * kPage + position % kPage);
      key[0] = rising(v.x + 0.0f), key[1] = rising(v.y + 0.0f);
      key[2] = rising(v.z + 0.0f), key[3] = rising(v.w + 0.0f);
    }
  };

  // take(position, keys) for the positions begin, begin + stride, ... below end, four from each on;
  // from `last` on there are no keys.
  template <int kBatch, class Take>
  static __device__ __forceinline__ void for_each(const Row& row, u32 begin, u32 stride, u32 end,
                                                  u32 last, Take take) {
    for (u32 first = begin; first < end; first += kBatch * stride) {
      u32 key[kBatch][4];
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
        if (first + n * stride < last) row.load(first + n * stride, key[n]);
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
        if (first + n * stride < end) take(first + n * stride, key[n]);
    }
  }

  static __device__ __forceinline__ void choose(const Here& me, const Block& b, const Row& row) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(b.scratch);
    u32 border = 0, left = kTopk;  // left: how many are taken of those that begin like the border
#pragma unroll 1
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
      narrow(me, row, scratch, shift, border, left);
      if (shift == 10 && border && scratch.alike == left) {
        --border, left = 0;  // all that begin like it are taken, and are above this one
        break;
      }
    }
    const u32 each = (row.seen + 4 * kWarps - 1) / (4 * kWarps) * 4;
    const u32 begin = me.warp * each, end = min(begin + each, row.seen);
    u32 above = 0, equal = 0;
    for_each<8>(row, begin + me.lane * 4, 128, end, end, [&](u32 at, const u32(&key)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        above += at + i < end && key[i] > border;
        equal += at + i < end && key[i] == border;
      }
    });
#pragma unroll
    for (int o = 16; o; o /= 2) {
      above += __shfl_xor_sync(~0u, above, o);
      equal += __shfl_xor_sync(~0u, equal, o);
    }
    if (me.lane == 0) scratch.taken[me.warp][0] = above, scratch.taken[me.warp][1] = equal;
    sync_consumers();
    above = equal = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      if (w < me.warp) above += scratch.taken[w][0], equal += scratch.taken[w][1];
    list(me, row, begin, end, border, left, above, equal);
  }

  // A warp's stretch; above, equal: how many there are before it.
  static __device__ __forceinline__ void list(const Here& me, const Row& row, u32 begin, u32 end,
                                              u32 border, u32 left, u32 above, u32 equal) {
    // All lanes take part in each round, those behind the end with nothing.
    const u32 rounded = begin < end ? begin + (end - begin + 127) / 128 * 128 : begin;
    for_each<4>(row, begin + me.lane * 4, 128, rounded, end, [&](u32 at, const u32(&key)[4]) {
      u32 count = 0;  // above in the upper half, equal in the lower one
#pragma unroll
      for (int i = 0; i < 4; ++i)
        count += at + i >= end ? 0 : key[i] > border ? 1u << 16 : key[i] == border;
      u32 upto = count;
#pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        const u32 before = __shfl_up_sync(~0u, upto, o);
        if (me.lane >= o) upto += before;
      }
      u32 larger = above + ((upto - count) >> 16), same = equal + ((upto - count) & 0xffff);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (at + i >= end || key[i] < border) continue;
        const bool is_border = key[i] == border;
        if (!is_border || same < left) row.put(larger + min(same, left), at + i);
        is_border ? ++same : ++larger;
      }
      const u32 all = __shfl_sync(~0u, upto, 31);
      above += all >> 16, equal += all & 0xffff;
    });
  }

  // One more digit of the border: of the scores that begin like it, the digit at which `left` are
  // reached from the largest on; left: how many of those that have that digit, too.
  static __device__ __forceinline__ void narrow(const Here& me, const Row& row, Scratch& scratch,
                                                int shift, u32& border, u32& left) {
    const u32 mask = shift ? kDigits - 1 : 1023;
    for (int i = me.thread; i < kDigits; i += kThreads) scratch.bins[i] = 0;
    sync_consumers();
    for_each<8>(row, me.thread * 4, 4 * kThreads, row.seen, row.seen,
                [&](u32 at, const u32(&key)[4]) {
#pragma unroll
                  for (int i = 0; i < 4; ++i) {
                    const bool alike = (key[i] ^ border) >> shift <= mask || shift == 21;
                    if (at + i < row.seen && alike)
                      atomicAdd(&scratch.bins[key[i] >> shift & mask], 1u);
                  }
                });
    sync_consumers();
    find(me, scratch, left);
    sync_consumers();
    border |= scratch.digit << shift;
    left = scratch.left;
  }

  // Thread t has the bins from kDigits - 1 - t * kOwn downwards.
  static __device__ __forceinline__ void find(const Here& me, Scratch& scratch, u32 left) {
    const u32* top = scratch.bins + kDigits - 1 - me.thread * kOwn;
    u32 sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += top[-i];
    u32 upto = sum;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const u32 before = __shfl_up_sync(~0u, upto, o);
      if (me.lane >= o) upto += before;
    }
    if (me.lane == 31) scratch.sums[me.warp] = upto;
    sync_consumers();
#pragma unroll
    for (int w = 0; w < kWarps - 1; ++w)
      if (w < me.warp) upto += scratch.sums[w];
    u32 before = upto - sum;
    if (before >= left || upto < left) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (before < left && before + top[-i] >= left) {
        scratch.digit = kDigits - 1 - me.thread * kOwn - i;
        scratch.left = left - before;
        scratch.alike = top[-i];
      }
      before += top[-i];
    }
  }
};
