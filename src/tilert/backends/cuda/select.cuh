// The choice of positions of sparse attention: the best of the scores that each share has sorted.
#pragma once
#include "draw.cuh"
#include "mla.cuh"

// How many of the first `seen` positions are in a share.
template <int kSplits>
__device__ __forceinline__ u32 share_count(u32 split, u32 seen) {
  const u32 pages = seen / kPage;  // whole ones
  const u32 rest = pages % kSplits == split ? seen % kPage : 0;
  return (pages + kSplits - 1 - split) / kSplits * kPage + rest;
}

// The kTopk positions with the largest scores, of equal ones the lower positions, in rising order.
// What it looks at are entries: scores as integers above the complements of their positions, so
// that no two are equal. Of each share, whose scores fall, it takes some to begin with, and finds
// the border among all that it has: the least of the kTopk largest. Shares whose last entry is
// above that may have more; of those, and of those alone, it takes further ones, until there are
// none. Tile t: those of token t. run.x: scores, run.x2: their positions, run.y: the chosen
// positions.
template <int kTopk, int kSplits, int kWidth>
struct Select {
  // Entries that are looked at together: those that may be chosen, and further ones, of each share
  // four at least. There is always room: a share is read further only if all that was taken of it
  // may be chosen, which was 28 entries or more.
  static constexpr u32 kLeast = kTopk * 13 / 8 > 28 * kSplits ? kTopk * 13 / 8 : 28 * kSplits;
  static constexpr u32 kPool = kLeast < 6 * kThreads ? 6 * kThreads : (kLeast + 3) / 4 * 4;
  static constexpr int kBinBits = 9, kBins = 1 << kBinBits;
  static_assert(kBins == 2 * kThreads && kTopk < 65536 && kWidth < 65536 && kSplits <= 256);
  // Positions that are listed at a time: as bits, words of a thread, and behind them how many are
  // set before each word. They take the place of the keys.
  static constexpr u32 kWords = kPool < 12 * kThreads ? 4 : 8, kStretch = kWords * kThreads * 32;
  struct Pool {
    alignas(16) u32 keys[kPool], places[kPool];  // upper and lower halves of entries
    __device__ __forceinline__ u64 operator[](u32 i) const {
      return u64(keys[i]) << 32 | places[i];
    }
    __device__ __forceinline__ void set(u32 i, u64 entry) {
      keys[i] = u32(entry >> 32), places[i] = u32(entry);
    }
  };
  struct Scratch {
    Pool pool;
    uint2 bins[kThreads];  // how many entries they have
    u32 sums[kWarps], least[kWarps], most[kWarps];
    u32 bin, left, alike;  // where the border is; how many of the bin are taken, and are in it
    u32 kept, further;     // entries that stay, shares that are read further
    u16 read[kSplits];     // of each share
    u8 shares[2][kSplits];
  };
  static_assert(sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  static __device__ __forceinline__ bool stream(Loader&, const Run&) { return true; }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const Here me;
    for (u32 token = run.first; token < run.first + run.count; ++token) {
      if (!given(b, token)) continue;
      const Row row{b.at(run.x) + token * kSplits * kWidth, b.at(run.x2) + token * kSplits * kWidth,
                    b.at(run.y) + token * kTopk, b.position(token) + 1};
      if (row.seen <= kTopk) {
#pragma unroll 1
        for (u32 i = me.thread; i < row.seen; i += kThreads) row.put(i, i);
      } else {
        choose(me, *reinterpret_cast<Scratch*>(b.scratch), row);
      }
      sync_consumers();
    }
    if (me.thread == 0) signal<false>(b, run);
    return true;
  }

 private:
  // What a token sees, and what is chosen of it.
  struct Row {
    const float *scores, *order;
    float* chosen;
    u32 seen;
    __device__ __forceinline__ void put(u32 at, u32 position) const {
      store_float(chosen + at, __uint_as_float(position));
    }
  };
  // The keys of entries.
  struct Range {
    u32 least = ~0u, most = 0;
  };

  static __device__ __forceinline__ void choose(const Here& me, Scratch& scratch, const Row& row) {
    u32 shares = min(u32(kSplits), (row.seen + kPage - 1) / kPage), kept = 0;
#pragma unroll 1
    for (u32 i = me.thread; i < shares; i += kThreads)
      scratch.shares[0][i] = i, scratch.read[i] = 0;
    u64 border = 0;
    Range range;
#pragma unroll 1
    for (u32 turn = 0;; turn ^= 1) {
      const u32 each = min((kPool - kept) / shares / 4 * 4, u32(kWidth));
      if (me.thread == 0) scratch.further = 0;
      sync_consumers();
      take(me, scratch, row, scratch.shares[turn], shares, each, kept, range);
      border = find(me, scratch, border ? border : u64(range.least) << 32, range.most,
                    kept + shares * each);
      if (me.thread == 0) scratch.kept = 0;
#pragma unroll 1
      for (u32 i = me.thread; i < shares; i += kThreads) {
        const u32 share = scratch.shares[turn][i], read = scratch.read[share] + each;
        scratch.read[share] = read;
        if (scratch.pool[kept + (i + 1) * each - 1] >= border &&
            read < share_count<kSplits>(share, row.seen))
          scratch.shares[turn ^ 1][atomicAdd(&scratch.further, 1u)] = share;
      }
      sync_consumers();
      const u32 size = kept + shares * each;
      shares = scratch.further;
      if (!shares) return list(me, scratch, row, border, size);
      kept = keep(me, scratch, border, size);
    }
  }

  // `each` more entries of some shares, behind those that were kept; zeros where a share has no
  // more. Eight threads take a share, each four entries at a time.
  static __device__ __forceinline__ void take(const Here& me, Scratch& scratch, const Row& row,
                                              const u8* of, u32 shares, u32 each, u32 kept,
                                              Range& range) {
    const u32 from = me.thread % 8 * 4;
#pragma unroll 1
    for (u32 i = me.thread / 8; i < shares; i += kThreads / 8)
#pragma unroll 1
      for (u32 k = from; k < each; k += 32) {
        const u32 at = kept + i * each + k, column = min(scratch.read[of[i]] + k, u32(kWidth) - 4);
        copy_piece(scratch.pool.keys + at, row.scores + of[i] * kWidth + column);
        copy_piece(scratch.pool.places + at, row.order + of[i] * kWidth + column);
      }
    await_pieces();
#pragma unroll 1
    for (u32 i = me.thread / 8; i < shares; i += kThreads / 8) {
      const u32 end = share_count<kSplits>(of[i], row.seen), read = scratch.read[of[i]];
#pragma unroll 1
      for (u32 k = from; k < each; k += 32) {
        const u32 at = kept + i * each + k;
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
          const float score = __uint_as_float(scratch.pool.keys[at + e]);
          const u32 own = read + k + e < end ? rising(score + 0.0f) : 0;
          scratch.pool.set(at + e, u64(own) << 32 | ~scratch.pool.places[at + e]);
          if (own) range.least = min(range.least, own);
          range.most = max(range.most, own);
        }
      }
    }
    const u32 least = __reduce_min_sync(~0u, range.least),
              most = __reduce_max_sync(~0u, range.most);
    if (me.lane == 0) scratch.least[me.warp] = least, scratch.most[me.warp] = most;
    sync_consumers();
    range = {__reduce_min_sync(~0u, scratch.least[me.lane % kWarps]),
             __reduce_max_sync(~0u, scratch.most[me.lane % kWarps])};
  }

  // The border among the first `size` entries of the pool, none of which is chosen that is below
  // `from`: that, where kTopk are not more. Nine bits at a time, of those in which they differ.
  static __device__ __forceinline__ u64 find(const Here& me, Scratch& scratch, u64 from, u32 most,
                                             u32 size) {
    u32* bins = reinterpret_cast<u32*>(scratch.bins);
    u32 left = kTopk;
    // Bits below a bin's number, and those of a bin in the pass before.
    int shift = max(0, 64 - kBinBits - __clzll((u64(most) << 32 | ~0u) - from)),
        width = shift + kBinBits;
#pragma unroll 1
    for (;;) {
      scratch.bins[me.thread] = {0, 0};
      sync_consumers();
#pragma unroll 4
      for (u32 i = me.thread; i < size; i += kThreads) {
        const u64 entry = scratch.pool[i], bin = (entry - from) >> shift;
        if (entry >= from && bin >> (width - shift) == 0) atomicAdd(&bins[u32(bin)], 1u);
      }
      sync_consumers();
      reach(me, scratch, left);
      sync_consumers();
      from += u64(scratch.bin) << shift;
      left = scratch.left;
      if (scratch.alike == left) return from;
      width = shift, shift = max(shift - kBinBits, 0);
    }
  }

  // The bin with which `left` are reached from the largest on; with all bins they may not be, and
  // then the first one stands for all. Thread t has two bins, kBins - 1 - 2 t and the next lower.
  static __device__ __forceinline__ void reach(const Here& me, Scratch& scratch, u32 left) {
    const uint2 v = scratch.bins[kThreads - 1 - me.thread];
    const u32 sum = v.x + v.y;
    const u32 upto = running(me, scratch, sum);
    if (me.thread == kThreads - 1 && upto < left) scratch.bin = scratch.left = scratch.alike = 0;
    const u32 before = upto - sum;
    if (before >= left || upto < left) return;
    const bool lower = before + v.y < left;
    scratch.bin = kBins - 1 - me.thread * 2 - lower;
    scratch.left = left - before - (lower ? v.y : 0);
    scratch.alike = lower ? v.x : v.y;
  }

  // The sum of all threads up to and with this one.
  static __device__ __forceinline__ u32 running(const Here& me, Scratch& scratch, u32 v) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const u32 before = __shfl_up_sync(~0u, v, o);
      if (me.lane >= o) v += before;
    }
    if (me.lane == 31) scratch.sums[me.warp] = v;
    sync_consumers();
    return v + __reduce_add_sync(~0u, me.lane < me.warp ? scratch.sums[me.lane] : 0);
  }

  // What is not below the border to the front of the pool, in any order; how much that is, with
  // zeros up to a multiple of four, for pieces of four follow.
  static __device__ __forceinline__ u32 keep(const Here& me, Scratch& scratch, u64 border,
                                             u32 size) {
#pragma unroll 1
    for (u32 i = me.thread; i < size + me.thread; i += kThreads) {  // as often for all threads
      const u64 entry = i < size ? scratch.pool[i] : 0;
      const u32 others = __ballot_sync(~0u, entry >= border);
      u32 first = 0;
      sync_consumers();  // what is overwritten has been read
      if (me.lane == 0) first = atomicAdd(&scratch.kept, u32(__popc(others)));
      first = __shfl_sync(~0u, first, 0);
      if (entry >= border) scratch.pool.set(first + __popc(others & ((1u << me.lane) - 1)), entry);
    }
    sync_consumers();
    const u32 kept = scratch.kept, whole = (kept + 3) / 4 * 4;
    if (kept + me.thread < whole) scratch.pool.set(kept + me.thread, 0);
    return whole;
  }

  // The positions of what is not below the border, in rising order.
  static __device__ __forceinline__ void list(const Here& me, Scratch& scratch, const Row& row,
                                              u64 border, u32 size) {
    u32 *bits = scratch.pool.keys, *places = scratch.pool.places, listed = 0;
    uint4* own = reinterpret_cast<uint4*>(bits + me.thread * kWords);
    u16* before = reinterpret_cast<u16*>(bits + kWords * kThreads);
#pragma unroll 2
    for (u32 i = me.thread; i < size; i += kThreads)
      places[i] = scratch.pool[i] < border ? ~0u : ~places[i];
#pragma unroll 1
    for (u32 begin = 0; begin < row.seen; begin += kStretch) {
      sync_consumers();  // nobody looks at the keys any more
#pragma unroll
      for (u32 i = 0; i < kWords / 4; ++i) own[i] = {0, 0, 0, 0};
      sync_consumers();
#pragma unroll 2
      for (u32 i = me.thread; i < size; i += kThreads) {
        const u32 at = places[i] - begin;
        if (at < kStretch) atomicAdd(&bits[at / 32], 1u << at % 32);
      }
      sync_consumers();
      u32 count = 0;
#pragma unroll
      for (u32 i = 0; i < kWords / 4; ++i)
        count += __popc(own[i].x) + __popc(own[i].y) + __popc(own[i].z) + __popc(own[i].w);
      u32 upto = listed + running(me, scratch, count) - count;
#pragma unroll 1
      for (u32 i = me.thread * kWords; i < (me.thread + 1) * kWords; ++i)
        before[i] = upto, upto += __popc(bits[i]);
      if (me.thread == kThreads - 1) scratch.kept = upto;
      sync_consumers();
      listed = scratch.kept;
#pragma unroll 2
      for (u32 i = me.thread; i < size; i += kThreads) {
        const u32 at = places[i] - begin;
        if (at >= kStretch) continue;
        const u32 lower = bits[at / 32] & ((1u << at % 32) - 1);
        row.put(before[at / 32] + __popc(lower), begin + at);
      }
    }
  }
};
