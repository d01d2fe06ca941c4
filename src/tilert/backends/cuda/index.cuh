// The indexer of sparse attention: keys and queries turned by a Hadamard matrix and rounded to
// e4m3, and scores of all positions on the matrix units, sorted within each share. Keys are stored
// as [64 positions][kDim] e4m3 a page, and their scales as [64] f32.
#pragma once
#include "mla.cuh"
#include "select.cuh"

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
      float v[kOwn], factor;
      const bool is_key = tile == kHeads;
      is_key ? fetch_normed(me, b, run, token, v) : fetch(me, query(b, run, token, tile), v);
      turn(me, b, run, token, v);
      const float scale = scale_of(v, factor);
      is_key ? append(me, b, run, token, v, factor, scale)
             : put_back(me, query(b, run, token, tile), v, factor, scale);
    }
    sync_consumers();
    if (me.thread == 0) signal<false>(b, run);
    return true;
  }

 private:
  static __device__ __forceinline__ bool inside(const Here& me, int i) {
    return kDim >= 32 || me.lane < kDim;
  }

  static __device__ __forceinline__ float* query(const Block& b, const Run& run, u32 token,
                                                 u32 head) {
    return b.at(run.x) + token * kQPitch + head * kDim;
  }

  static __device__ __forceinline__ void fetch(const Here& me, const float* q, float (&v)[kOwn]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) v[i] = inside(me, i) ? load_float(q + me.lane + 32 * i) : 0;
  }

  static __device__ __forceinline__ void put_back(const Here& me, float* q, const float (&v)[kOwn],
                                                  float factor, float scale) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float rounded[4];
      floats_of_e4m3(e4m3_of(v[i] * factor, 0), rounded);
      if (inside(me, i)) store_float(q + me.lane + 32 * i, rounded[0] * scale);
    }
  }

  static __device__ __forceinline__ void append(const Here& me, const Block& b, const Run& run,
                                                u32 token, const float (&v)[kOwn], float factor,
                                                float scale) {
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
      if (32 * i < kRope && e < kRope)
        v[i] = turned<kRope, kInterleaved>([&](int from) { return row[from]; }, angles, e);
    }
    __syncwarp();  // the row is free for the next tile
#pragma unroll 1
    for (int bit = 1; bit < min(kDim, 32); bit *= 2) {
      const float sign = me.lane & bit ? -1 : 1;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) v[i] = fmaf(sign, v[i], __shfl_xor_sync(~0u, v[i], bit));
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

// Tile s: scores of the pages of share s, the largest first. A page, its keys and their scales, is
// a unit of the ring, for all tokens of a sequence. Rows of A are the query heads of one token,
// which are rounded already and so are f16 without loss; a warp has them all in registers, and some
// of the positions of each page. run.w: keys, run.w_up: their scales, run.x: query heads, run.x2:
// their weights, run.y: scores, run.x3: their positions.
template <int kHeads, int kDim, int kTopk, int kSplits, int kWidth, bool kTagged, u32 kScaleBits,
          int kQPitch, int kWeightPitch>
struct IndexScore {
  static constexpr int kKeyBytes = kPage * kDim, kUnitBytes = kKeyBytes + kPage * 4;
  static_assert(kUnitBytes <= kSlotBytes, "a page of keys fits a slot");
  static_assert(kDim % 16 == 0 && kDim <= 128 && kHeads <= 64, "shape of the indexer");
  static_assert(kWarps % kTokens == 0, "tokens have warps of their own");
  static constexpr int kBlocks = (kHeads + 15) / 16, kSteps = kDim / 16;
  static constexpr int kColumns = kTokens;  // blocks of 8 positions of a warp, in each page
  // Words of a key that a lane reads at once, each one step's: k-slots are dealt to suit them.
  static constexpr int kWords = kDim % 64 == 0 ? 4 : 1;
  static constexpr int kPitch = kDim + 8;  // of a query in shared memory; no bank conflicts

  // Of the scores of a share: as integers, by position; and sorted, with their positions.
  struct Ranking {
    u64 ranked[2][kWidth];
    alignas(16) u32 keys[kTokens][kWidth];
  };
  // Of a token, on the way to registers.
  struct Given {
    alignas(16) u16 q[kBlocks * 16][kPitch];
    float weight[kBlocks * 16];
  };
  union Scratch {
    Given given;
    Ranking ranking;
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
    const bool wanted = some_scored(b);
    if (wanted) {
      Queries queries;
      fetch(me, b, run, queries);  // of a token that needs no scores they hold anything
      for (u32 tile = run.first; tile < run.first + run.count; ++tile) {
        for (Span span; span.next(b);) {
          const u32 seen = span.seen(b);
          for (u32 page = tile; page * kPage < seen; page += kSplits)
            add_page(me, b, run, span, page, queries);
        }
        sync_consumers();
#pragma unroll 1
        for (u32 t = 0; t < kTokens; ++t)
          if (scored(b, t)) rank(me, b, run, tile, t);
      }
    }
    // Where nobody wants scores, without order (Op.spared), but where tokens are those of a pass.
    if (me.thread == 0) signal(b, run, !wanted && kPasses == 1);
    return true;
  }

 private:
  // What a warp multiplies keys with, and the weights of a lane's two heads of each block.
  struct Queries {  // set, so that no register is kept for them through all other ops
    u32 a[kBlocks][kSteps][4] = {};
    float weight[kBlocks][2] = {};
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
  static __device__ __forceinline__ u32 token(const Here& me) { return me.warp % kTokens; }

  static __device__ __forceinline__ Ranking& ranking(Block& b) {
    return reinterpret_cast<Scratch*>(b.scratch)->ranking;
  }

  // By way of shared memory, so that each query comes from L2 once.
  static __device__ __forceinline__ void fetch(const Here& me, Block& b, const Run& run,
                                               Queries& to) {
    Given& given = reinterpret_cast<Scratch*>(b.scratch)->given;
    const u32 from = shared_address(given.q[me.lane % 16]) + me.lane / 16 * 16;
#pragma unroll 1
    for (u32 t = 0; t < kTokens; ++t) {
      if (!scored(b, t)) continue;
      put(me, b, run, t, given);
      sync_consumers();
      if (t == token(me)) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          to.weight[n][0] = given.weight[n * 16 + me.lane / 4];
          to.weight[n][1] = given.weight[n * 16 + me.lane / 4 + 8];
#pragma unroll
          for (int step = 0; step < kSteps; ++step)
            load_matrices(to.a[n][step], from + n * 16 * kPitch * 2 + step * 32);
        }
      }
      sync_consumers();
    }
  }

  // A thread has the weight of one head.
  static __device__ __forceinline__ void put_weight(const Here& me, const Block& b, const Run& run,
                                                    u32 token, float (&to)[kBlocks * 16]) {
    const float* from[1] = {nullptr};
    if (me.thread < kHeads) from[0] = b.at(run.x2) + token * kWeightPitch + me.thread;
    const u32 tag[1] = {b.tag(run.x2)};
    float v[1];
    if constexpr (kTagged) {
      load_tagged(b, from, tag, v);
    } else {
      v[0] = from[0] ? load_float(from[0]) : 0;
    }
    if (me.thread < kBlocks * 16) to[me.thread] = v[0];
  }

  // A token's queries and weights to shared memory. Queries are rows of A, each element in the slot
  // where the lane that has it of a key looks for it; rows without a head are zeros.
  static __device__ __forceinline__ void put(const Here& me, const Block& b, const Run& run,
                                             u32 token, Given& to) {
    constexpr u32 kOfRow = kDim / 4, kRows = kThreads / kOfRow;  // pieces of four elements
    constexpr int kLoads = (kBlocks * 16 + kRows - 1) / kRows;
    const u32 first = me.thread / kOfRow, piece = me.thread % kOfRow;
    const float* from = b.at(run.x) + token * kQPitch + first * kDim + piece * 4;
    float4 v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      v[i] = {0, 0, 0, 0};
      if (kHeads % kRows == 0 || first + i * kRows < kHeads)
        v[i] = load_float4(from + i * kRows * kDim);
    }
    put_weight(me, b, run, token, to.weight);  // while the queries are under way
    const u32 step = piece / (4 * kWords) * kWords + piece % kWords, quad = piece / kWords % 4;
    u32* words = reinterpret_cast<u32*>(to.q[first]) + step * 8 + quad;
#pragma unroll
    for (int i = 0; i < kLoads; ++i, words += kRows * kPitch / 2) {
      if (kBlocks * 16 % kRows && first + i * kRows >= kBlocks * 16) continue;
      words[0] = pack_f16(v[i].x, v[i].y), words[4] = pack_f16(v[i].z, v[i].w);
    }
  }

  static __device__ __forceinline__ void add_page(const Here& me, Block& b, const Run& run,
                                                  const Span& span, u32 page,
                                                  const Queries& queries) {
    wait_full(b);
    u8* slot = b.slot();
    if ((page + 1) * kPage > b.position(span.begin)) {
      const u32 token = span.begin + me.warp;
      if (token < span.end && b.position(token) / kPage == page) replace(me, b, run, token, slot);
      sync_consumers();
    }
    if (span.has(token(me)) && scored(b, token(me))) {
      const float* scales = reinterpret_cast<const float*>(slot + kKeyBytes);
      const u32 first = me.warp / kTokens * kColumns * 8;
      const u32 last = b.position(token(me)) - page * kPage;  // or a number that is too large
      const bool seen = page * kPage <= b.position(token(me));
      u32* keys = ranking(b).keys[token(me)] + page / kSplits * kPage;
#pragma unroll 1
      for (u32 at = first; at < first + kColumns * 8; at += 8) {
        float sum[2];
        score(me, slot + (at + me.lane / 4) * kDim, queries, sum);
        if (me.lane >= 4) continue;  // the others have the same sums, or nothing
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
          const u32 own = at + me.lane * 2 + i;
          const float v = sum[i] * scales[own] * __uint_as_float(kScaleBits);
          keys[own] = seen && own <= last ? rising(v + 0.0f) : 0;
        }
      }
    }
    release_slot(b);
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

  // The weighted sums over all heads for the 8 positions of whose keys the lanes name one each;
  // lane l < 4 gets those of positions 2 l and 2 l + 1.
  static __device__ __forceinline__ void score(const Here& me, const u8* key,
                                               const Queries& queries, float (&sum)[2]) {
    float c[kBlocks][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; step += kWords) {
      u32 word[kWords];
      const u8* from = key + (step / kWords * 4 + me.lane % 4) * 4 * kWords;
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

  // Scores of a token in a share, which stand by position, to where whoever selects reads them. The
  // place of a score in its page is how many are larger; then stretches are merged two by two, each
  // score counting by bisection how many of the other stretch come before it.
  static __device__ __forceinline__ void rank(const Here& me, Block& b, const Run& run, u32 split,
                                              u32 token) {
    Ranking& sorted = ranking(b);
    const u32 count = share_count<kSplits>(split, b.position(token) + 1);
#pragma unroll 1
    for (u32 i = me.thread; i < count; i += kThreads) {
      const u32 *page = sorted.keys[token] + i / kPage * kPage, at = i % kPage;
      sorted.ranked[0][i - at + larger_in_page(page, at)] =
          u64(page[at]) << 32 | ~((i / kPage * kSplits + split) * kPage + at);
    }
    sync_consumers();
    u32 turn = 0;
#pragma unroll 1
    for (u32 bits = kPageBits; 1u << bits < count; ++bits, turn ^= 1) {
      const u64* from = sorted.ranked[turn];
#pragma unroll 1
      for (u32 i = me.thread; i < count; i += kThreads) {
        const u32 other = (i >> bits ^ 1) << bits;
        const u32 end = other < count ? min(1u << bits, count - other) : 0;
        u32 larger = 0;
#pragma unroll 1
        for (u32 step = 1u << bits; step; step /= 2)
          if (larger + step <= end && from[other + larger + step - 1] > from[i]) larger += step;
        sorted.ranked[turn ^ 1][(i >> (bits + 1) << (bits + 1)) + i % (1u << bits) + larger] =
            from[i];
      }
      sync_consumers();
    }
    const u32 row = (token * kSplits + split) * kWidth;
#pragma unroll 1
    for (u32 i = me.thread; i < count; i += kThreads) {
      const u64 each = sorted.ranked[turn][i];
      store_float(b.at(run.y) + row + i, score_of(each));
      store_float(b.at(run.x3) + row + i, __uint_as_float(id_of(each)));
    }
    sync_consumers();
  }

  // How many keys of a page come before one of them: the larger ones, and equal ones before it.
  static __device__ __forceinline__ u32 larger_in_page(const u32* keys, u32 own) {
    const u32 mine = keys[own], quad = own / 4 * 4;
    u32 count = 0;
#pragma unroll 4
    for (u32 at = 0; at < kPage; at += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(keys + at);
      const u32 below = at < quad ? mine - 1 : mine;
      count += (v.x > below) + (v.y > below) + (v.z > below) + (v.w > below);
    }
#pragma unroll 1
    for (u32 at = quad; at < own; ++at) count += keys[at] == mine;
    return count;
  }
  static constexpr int kPageBits = 6;
  static_assert(1 << kPageBits == kPage);
};
