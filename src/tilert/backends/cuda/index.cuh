// The indexer of sparse attention: keys and queries turned by a Hadamard matrix and rounded to
// e4m3, scores of all positions on the matrix units, and the search for the best of them. Keys are
// stored as [64 positions][kDim] e4m3 a page, and their scales as [64] f32.
#pragma once
#include "draw.cuh"
#include "mla.cuh"

// run.w: keys, run.w_up: their scales, run.norm and run.norm2: weight and shift of the keys' norm,
// run.bias_up: the rope table, run.x: the query heads, run.x2: the step's key. A warp takes a tile.
template <int kHeads, int kDim, int kRope, bool kInterleaved, bool kTagged, class Norm, class Shift,
          u32 kEpsBits>
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
    for (u32 i = run.first + me.warp; i < run.first + run.count; i += kWarps)
      i < kHeads ? turn_query(me, b, run, i) : append(me, b, run);
    sync_consumers();
    if (me.thread == 0) signal<false>(b, run);
    return true;
  }

 private:
  static __device__ __forceinline__ bool inside(const Here& me, int i) {
    return me.lane + 32 * i < kDim;
  }

  static __device__ __forceinline__ void turn_query(const Here& me, Block& b, const Run& run,
                                                    u32 head) {
    float* q = b.at(run.x) + head * kDim;
    float v[kOwn], factor;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) v[i] = inside(me, i) ? load_float(q + me.lane + 32 * i) : 0;
    turn(me, b, run, v);
    const float scale = scale_of(v, factor);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float rounded[4];
      floats_of_e4m3(e4m3_of(v[i] * factor, 0), rounded);
      if (inside(me, i)) store_float(q + me.lane + 32 * i, rounded[0] * scale);
    }
  }

  static __device__ __forceinline__ void append(const Here& me, Block& b, const Run& run) {
    float v[kOwn], factor;
    fetch_normed(me, b, run, v);
    turn(me, b, run, v);
    const float scale = scale_of(v, factor);
    const u32 position = b.position(0);
    const u64 row = u64(physical_page(b, position)) * kPage + position % kPage;
    u8* key = const_cast<u8*>(run.w) + row * kDim;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (inside(me, i)) key[me.lane + 32 * i] = u8(e4m3_of(v[i] * factor, 0));
    if (me.lane == 0) reinterpret_cast<float*>(const_cast<u8*>(run.w_up))[row] = scale;
    fence_proxy();  // others will stream what is new
  }

  static __device__ __forceinline__ void fetch_normed(const Here& me, const Block& b,
                                                      const Run& run, float (&v)[kOwn]) {
    const float* from[kOwn];
    u32 tag[kOwn];
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      from[i] = inside(me, i) ? b.at(run.x2) + me.lane + 32 * i : nullptr;
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
  static __device__ __forceinline__ void turn(const Here& me, Block& b, const Run& run,
                                              float (&v)[kOwn]) {
    float* row = reinterpret_cast<Scratch*>(b.scratch)->row[me.warp];
    const float* angles = reinterpret_cast<const float*>(run.bias_up) + u64(b.position(0)) * kRope;
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

// Tile s: scores of the pages of share s. A page, its keys and their scales, is a unit of the ring.
// Rows of A are query heads, which are rounded already and so are f16 without loss; a warp takes
// some of the heads and some of the positions. run.w: keys, run.w_up: their scales, run.x: query
// heads, run.x2: their weights.
template <int kHeads, int kDim, int kTopk, int kSplits, int kWidth, bool kTagged, u32 kScaleBits>
struct IndexScore {
  static constexpr int kKeyBytes = kPage * kDim, kUnitBytes = kKeyBytes + kPage * 4;
  static_assert(kUnitBytes <= kSlotBytes, "a page of keys fits a slot");
  static_assert(kDim % 16 == 0 && kDim <= 128 && kHeads <= 128, "shape of the indexer");
  static constexpr int kRowBlocks = (kHeads + 15) / 16;
  static constexpr int kHeadWarps = kRowBlocks <= 2 ? 1 : kRowBlocks <= 4 ? 2 : 4;
  static constexpr int kBlocks = (kRowBlocks + kHeadWarps - 1) / kHeadWarps;  // of a warp
  static constexpr int kColumns = kHeadWarps;  // blocks of 8 positions of a warp
  static constexpr int kSteps = kDim / 16;
  // Words of a key that a lane reads at once, each one step's: k-slots are dealt to suit them.
  static constexpr int kWords = kDim % 64 == 0 ? 4 : 1;

  struct Scratch {
    float part[2][kHeadWarps][kPage];
  };
  static_assert(sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    Block& b = l.b;
    const u32 seen = b.position(0) + 1;
    if (seen <= kTopk) return true;
    if (b.step && !l.passed((b.step - 1) * b.length + b.number + kStreamLead + 1)) return false;
    for (u32 tile = run.first; tile < run.first + run.count; ++tile)
      for (u32 page = tile; page * kPage < seen; page += kSplits) {
        if (!l.acquire()) return false;
        const u64 at = physical_page(b, page * kPage);
        l.expect(kUnitBytes);
        l.copy(0, run.w + at * kKeyBytes, kKeyBytes);
        l.copy(kKeyBytes, run.w_up + at * kPage * 4, kPage * 4);
        l.next();
      }
    return true;
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const Here me;
    if (b.position(0) + 1 > kTopk) {
      Queries queries;
      fetch(me, b, run, queries);
      u32 turn = 0;
      for (u32 tile = run.first; tile < run.first + run.count; ++tile)
        for (u32 page = tile; page * kPage <= b.position(0); page += kSplits, turn ^= 1)
          add_page(me, b, run, tile, page, turn, queries);
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

  // The first of the elements of a row that a lane has in a step: those of slots 2 quad, 2 quad +
  // 1, 8 + 2 quad and 9 + 2 quad.
  static __device__ __forceinline__ int column(const Here& me, int step) {
    return (step / kWords * 4 + me.lane % 4) * 4 * kWords + step % kWords * 4;
  }

  static __device__ __forceinline__ void fetch(const Here& me, const Block& b, const Run& run,
                                               Queries& to) {
    const int first = me.warp % kHeadWarps * kBlocks * 16 + me.lane / 4;
    const float* from[2 * kBlocks];
    u32 tag[2 * kBlocks];
    float weight[2 * kBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const int head = first + i * 8;
      from[i] = head < kHeads ? b.at(run.x2) + head : nullptr;
      tag[i] = b.tag(run.x2);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        float4 q = {0, 0, 0, 0};
        if (head < kHeads) q = load_float4(b.at(run.x) + head * kDim + column(me, step));
        to.a[i / 2][step][i % 2] = pack_f16(q.x, q.y);
        to.a[i / 2][step][2 + i % 2] = pack_f16(q.z, q.w);
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
                                                  u32 split, u32 page, u32 turn,
                                                  const Queries& queries) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(b.scratch);
    const u32 own = b.position(0);
    wait_full(b);
    u8* slot = b.slot();
    if (page == own / kPage) {
      if (me.warp == 0) replace(me, b, run, own, slot);
      sync_consumers();
    }
    const float* scales = reinterpret_cast<const float*>(slot + kKeyBytes);
    const int heads = me.warp % kHeadWarps, first = me.warp / kHeadWarps * kColumns * 8;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float sum[2];
      score(me, slot + (first + n * 8 + me.lane / 4) * kDim, queries, sum);
      const int at = first + n * 8 + me.lane * 2;  // of the lanes that keep the sums
      if (me.lane >= 4) continue;
      scratch.part[turn][heads][at] = sum[0] * scales[at];
      scratch.part[turn][heads][at + 1] = sum[1] * scales[at + 1];
    }
    release_slot(b);
    sync_consumers();
    if (me.thread >= kPage || page * kPage + me.thread > own) return;
    float sum = 0;
#pragma unroll
    for (int h = 0; h < kHeadWarps; ++h) sum += scratch.part[turn][h][me.thread];
    store_float(b.at(run.y) + split * kWidth + page / kSplits * kPage + me.thread,
                sum * __uint_as_float(kScaleBits));
  }

  // What was copied for the token's own position may be older than what is there now.
  static __device__ __forceinline__ void replace(const Here& me, const Block& b, const Run& run,
                                                 u32 own, u8* slot) {
    const u64 row = u64(physical_page(b, own)) * kPage + own % kPage;
    const float* from = reinterpret_cast<const float*>(run.w + row * kDim);
    float* to = reinterpret_cast<float*>(slot + own % kPage * kDim);
    if (me.lane < kDim / 4) to[me.lane] = load_float(from + me.lane);
    if (me.lane == 0)
      reinterpret_cast<float*>(slot + kKeyBytes)[own % kPage] =
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
// thread are under way together. run.x: scores, run.y: the chosen positions.
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
    const u32 seen = b.position(0) + 1;
    if (seen <= kTopk)
      for (u32 i = me.thread; i < seen; i += kThreads) put(b, run, i, i);
    else
      choose(me, b, run, seen);
    sync_consumers();
    if (me.thread == 0) signal<false>(b, run);
    return true;
  }

 private:
  static __device__ __forceinline__ void put(const Block& b, const Run& run, u32 at, u32 position) {
    store_float(b.at(run.y) + at, __uint_as_float(position));
  }

  // Integers in the order of the scores of four positions; 0 and -0 are the same score.
  static __device__ __forceinline__ void load(const Block& b, const Run& run, u32 position,
                                              u32 (&key)[4]) {
    const u32 page = position / kPage;
    const float4 v = load_float4(b.at(run.x) + page % kSplits * kWidth + page / kSplits * kPage +
                                 position % kPage);
    key[0] = rising(v.x + 0.0f), key[1] = rising(v.y + 0.0f);
    key[2] = rising(v.z + 0.0f), key[3] = rising(v.w + 0.0f);
  }

  // take(position, keys) for the positions begin, begin + stride, ... below end, four from each on;
  // from `last` on there are no keys.
  template <int kBatch, class Take>
  static __device__ __forceinline__ void for_each(const Block& b, const Run& run, u32 begin,
                                                  u32 stride, u32 end, u32 last, Take take) {
    for (u32 first = begin; first < end; first += kBatch * stride) {
      u32 key[kBatch][4];
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
        if (first + n * stride < last) load(b, run, first + n * stride, key[n]);
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
        if (first + n * stride < end) take(first + n * stride, key[n]);
    }
  }

  static __device__ __forceinline__ void choose(const Here& me, const Block& b, const Run& run,
                                                u32 seen) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(b.scratch);
    u32 border = 0, left = kTopk;  // left: how many are taken of those that begin like the border
#pragma unroll 1
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
      narrow(me, b, run, seen, scratch, shift, border, left);
      if (shift == 10 && border && scratch.alike == left) {
        --border, left = 0;  // all that begin like it are taken, and are above this one
        break;
      }
    }
    const u32 each = (seen + 4 * kWarps - 1) / (4 * kWarps) * 4;
    const u32 begin = me.warp * each, end = min(begin + each, seen);
    u32 above = 0, equal = 0;
    for_each<8>(b, run, begin + me.lane * 4, 128, end, end, [&](u32 at, const u32(&key)[4]) {
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
    list(me, b, run, begin, end, border, left, above, equal);
  }

  // A warp's stretch; above, equal: how many there are before it.
  static __device__ __forceinline__ void list(const Here& me, const Block& b, const Run& run,
                                              u32 begin, u32 end, u32 border, u32 left, u32 above,
                                              u32 equal) {
    // All lanes take part in each round, those behind the end with nothing.
    const u32 rounded = begin < end ? begin + (end - begin + 127) / 128 * 128 : begin;
    for_each<4>(b, run, begin + me.lane * 4, 128, rounded, end, [&](u32 at, const u32(&key)[4]) {
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
        if (!is_border || same < left) put(b, run, larger + min(same, left), at + i);
        is_border ? ++same : ++larger;
      }
      const u32 all = __shfl_sync(~0u, upto, 31);
      above += all >> 16, equal += all & 0xffff;
    });
  }

  // One more digit of the border: of the scores that begin like it, the digit at which `left` are
  // reached from the largest on; left: how many of those that have that digit, too.
  static __device__ __forceinline__ void narrow(const Here& me, const Block& b, const Run& run,
                                                u32 seen, Scratch& scratch, int shift, u32& border,
                                                u32& left) {
    const u32 mask = shift ? kDigits - 1 : 1023;
    for (int i = me.thread; i < kDigits; i += kThreads) scratch.bins[i] = 0;
    sync_consumers();
    for_each<8>(b, run, me.thread * 4, 4 * kThreads, seen, seen, [&](u32 at, const u32(&key)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool alike = (key[i] ^ border) >> shift <= mask || shift == 21;
        if (at + i < seen && alike) atomicAdd(&scratch.bins[key[i] >> shift & mask], 1u);
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
