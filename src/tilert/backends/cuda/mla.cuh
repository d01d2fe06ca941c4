// Latent attention: query heads over one row per position, whose first kLora elements are its
// values too. Pages are stored as [64 positions][kLora + kRope] bf16, with the 16-byte pieces of a
// row permuted (see swizzle), or as packed rows, which become such rows in their slot of the ring.
//
// A unit of the ring is 16 positions. The warps take a few units together: first two warps score
// the positions of a unit with all heads of the tile, which are the rows of A, each by half of a
// row, and leave the scores in shared memory; then each makes the weights of two heads; then each
// multiplies its own columns of the values with all of them. So nothing is merged at the end, and
// every row is read from memory once. What comes after the last unit has arrived is what a step
// waits for, and most of its instructions run once in a layer: loops are short and mostly not
// unrolled.
//
// A tile is of one token: the tokens of a step are other workers' tiles, which find the same rows
// in the L2 cache at about the same time. The rows that the step appends for the token and those
// before it are put where they have arrived, for the cache may not have had them when they were
// copied.
#pragma once
#include "latents.cuh"

// What a share covers of what a token sees, a piece of kTake at a time. Without chosen positions
// these are positions, of pages that are dealt out as page_share of ops/attend.py does; else places
// in the list of them, in whole units of kUnit. A list of all positions is not read: each stands at
// its own place.
template <int kTake, int kUnit, int kSplits, int kTopk>
struct Walk {
  u32 split, end;
  u32 from = 0, rows = 0;  // the piece
  u32 first = 0;           // of the list
  bool listed = false;     // some positions are not chosen

  __device__ __forceinline__ Walk(const Block& b, u32 token, u32 of_split) : split(of_split) {
    const u32 seen = b.position(token) + 1;
    end = seen;
    if constexpr (kTopk > 0) {
      const u32 chosen = min(seen, u32(kTopk)), units = (chosen + kUnit - 1) / kUnit;
      end = min(chosen, units * (split + 1) / kSplits * kUnit);
      next_at = first = units * split / kSplits * kUnit;
      listed = seen > kTopk;
    }
  }
  __device__ __forceinline__ bool next() {
    if constexpr (kTopk == 0) {
      for (;; ++round, next_at = 0) {
        const u32 page = page_of(round, split, kSplits) * kPage;
        if (page >= end) return false;
        if (next_at == kPage || page + next_at >= end) continue;
        from = page + next_at;
        break;
      }
    } else {
      if (next_at >= end) return false;
      from = next_at;
    }
    rows = min(u32(kTake), end - from);
    next_at += kTake;
    return true;
  }
  __device__ __forceinline__ bool idle() const {
    if constexpr (kTopk == 0) return split >= active_shares(0, end, kSplits);
    return first >= end;
  }

 private:
  u32 round = 0, next_at = 0;
};

// Tile (t * kGroups + g) * kSplits + s: token t, heads [g * kTileHeads, (g + 1) * kTileHeads),
// share s of the positions. With kTopk a token attends to the positions that Select has chosen.
// run.w: the cache, run.x: queries as latents, run.x2: queries whose last columns are rotated here,
// run.bias_up: the rope table, run.x3: the chosen positions.
template <int kHeads, int kTileHeads, int kNope, int kRope, int kLora, int kSplits, int kTopk,
          bool kInterleaved, bool kTagged, bool kRopeTagged, bool kTagsOut, u32 kScaleBits,
          int kQPitch, int kRopePitch, bool kPacked>
struct LatentAttention {
  using Row = Packed<kLora, kRope>;
  static constexpr int kWidth = kLora + kRope, kRowBytes = kPacked ? Row::kRowBytes : 2 * kWidth;
  static constexpr int kUnitRows = 16, kUnitBytes = kUnitRows * kRowBytes;
  static constexpr int kSlotRows = 2 * kUnitRows * kWidth;  // bytes of the rows of a unit as bf16
  static constexpr int kFirst = kSlotRows - kUnitBytes;     // where they are copied to
  static_assert(kWidth % 16 == 0 && kLora % 16 == 0 && kNope % 4 == 0 && kTileHeads <= 16, "shape");
  static_assert(kSlotRows <= kSlotBytes, "16 positions fit a slot");
  static constexpr int kUnits = kTakenUnits;  // taken together
  static_assert(kUnits <= kSlots && kUnits <= kWarps / 2 && kHeads % kTileHeads == 0,
                "units fit the ring, and have two warps each");
  static constexpr int kGroups = kHeads / kTileHeads;
  static constexpr int kTake = kUnits * kUnitRows;
  static constexpr int kSteps = kWidth / 16, kHalf = (kSteps + 1) / 2;
  static constexpr int kRowPieces = kRowBytes / 16;
  static constexpr int kColumns = kLora / 16;                    // blocks of columns of values
  static constexpr int kOwn = (kColumns + kWarps - 1) / kWarps;  // of a warp
  static constexpr int kPitch = kTake + 8;                       // no bank conflicts
  static constexpr int kListed =                                 // positions of a share at most
      ((kTopk + kUnitRows - 1) / kUnitRows + kSplits - 1) / kSplits * kUnitRows;
  static constexpr int kYPitch = kLora + 2;
  static constexpr u32 kPairBarrier = 3;  // of the first unit's warps; others have 0 to 2
  static constexpr int kLatents = kTileHeads * kLora / 4;  // pieces of four elements of queries
  static constexpr int kLoads = (kLatents + kThreads - 1) / kThreads;
  static constexpr int kTurned = kTileHeads * kRope / 4;  // pieces of two pairs
  static constexpr int kTurnedLoads = (kTurned + kThreads - 1) / kThreads;
  using Share = Walk<kTake, kUnitRows, kSplits, kTopk>;
  static __device__ __forceinline__ float scale() { return __uint_as_float(kScaleBits) * kLog2e; }

  struct Scratch {
    u16 q[16 * kWidth];
    u16 made[kTokens][kRowBytes / 2];         // the rows that the step appends, as they are stored
    alignas(16) float scores[2][16][kPitch];  // of both halves of a row
    alignas(16) u16 weights[16][kPitch];
    float fade[16];
    u32 rows[kListed + 4];  // of the cache
  };
  static_assert(sizeof(Scratch) <= kScratchBytes, "scratch is too small");

  struct Place {
    u32 token, group, split;
    __device__ __forceinline__ explicit Place(u32 tile)
        : token(kTokens == 1 ? 0 : tile / (kGroups * kSplits)),
          group(kTokens == 1 ? tile / kSplits : tile / kSplits % kGroups),
          split(tile % kSplits) {}
  };

  // Rows that this launch has appended may be streamed as those of Attend. Those of the step may
  // not: what is copied for them is replaced. Chosen rows may be once their list is made.
  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    Block& b = l.b;
    const Scratch& scratch = *reinterpret_cast<const Scratch*>(b.scratch);
    if (!l.past(run)) return false;
    for (u32 tile = run.first; tile < run.first + run.count; ++tile) {
      const Place at(tile);
      if (!given(b, at.token)) continue;
      Share share(b, at.token, at.split);
      if (share.idle()) continue;
      if (share.listed && !l.listed()) return false;
      while (share.next())
        for (u32 row = 0; row < share.rows; row += kUnitRows) {
          if (!l.acquire()) return false;
          l.expect(kUnitBytes);
          if (share.listed)
            copy_rows(l, run, scratch.rows + share.from - share.first + row);
          else
            l.copy(kFirst, run.w + row_at(b, at.token, share.from + row), kUnitBytes);
          l.next();
        }
    }
    return true;
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    if (!wait_for_inputs<false>(b, run)) return false;
    const Here me;
#pragma unroll 1
    for (u32 i = run.first; i < run.first + run.count; ++i) {
      const Place at(i);
      if (given(b, at.token)) tile(me, b, run, at);
    }
    if (me.thread == 0) signal<kTagsOut>(b, run);
    return true;
  }

 private:
  // Online softmax in powers of two: of two heads, of which lanes 0 to 15 have one and the others
  // the second; and sums of the warp's own columns for rows l / 4 and l / 4 + 8.
  struct State {
    float most = -infinity(), sum = 0;
    float out[2 * kOwn][4] = {};
  };
  static __device__ __forceinline__ u32 own_head(const Here& me) {
    return me.warp * 2 + me.lane / 16;
  }

  static __device__ __forceinline__ u64 row_at(const Block& b, u32 token, u32 position) {
    return (u64(physical_page(b, token, position)) * kPage + position % kPage) * kRowBytes;
  }

  static __device__ __forceinline__ void copy_rows(Loader& l, const Run& run, const u32* rows) {
#pragma unroll 2
    for (int r = 0; r < kUnitRows; ++r)
      l.copy(kFirst + r * kRowBytes, run.w + u64(load_shared(rows + r)) * kRowBytes, kRowBytes);
  }

  // Where the chosen positions of a share lie; the last unit is filled up with the last of them,
  // for what its weights of zero meet must be numbers.
  static __device__ __forceinline__ void list_rows(const Here& me, Block& b, const Run& run,
                                                   u32 token, const Share& share,
                                                   Scratch& scratch) {
    const u32* chosen = reinterpret_cast<const u32*>(b.at(run.x3)) + token * kTopk;
    const u32 count = share.end - share.first;
#pragma unroll 1
    for (u32 i = me.thread; i < (count + kUnitRows - 1) / kUnitRows * kUnitRows; i += kThreads) {
      const u32 position = load_relaxed(chosen + share.first + min(i, count - 1));
      scratch.rows[i] = physical_page(b, token, position) * kPage + position % kPage;
    }
    sync_consumers();
    if (me.thread == 0) store_shared(&b.shared.listed, ++b.lists);
  }

  // One query's elements [e, e + 4) to shared memory.
  static __device__ __forceinline__ void put(Scratch& scratch, u32 head, u32 e, float4 v) {
    u16* to = scratch.q + head * kWidth + swizzle<kWidth>(head, e / 8) * 8 + e % 8;
    *reinterpret_cast<uint2*>(to) = {pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)};
  }

  // Two pairs of elements that are rotated with each other: first elements, then second ones, or as
  // neighbours; heads: where the first head's begin.
  static __device__ __forceinline__ float4 load_pairs(const float* heads, u32 piece) {
    const float* from = heads + piece / (kRope / 4) * (kNope + kRope);
    const u32 at = piece % (kRope / 4);
    if constexpr (kInterleaved) return load_float4(from + at * 4);
    const float2 first = load_float2(from + at * 2);
    const float2 second = load_float2(from + kRope / 2 + at * 2);
    return {first.x, first.y, second.x, second.y};
  }
  // Rotated, to shared memory.
  static __device__ __forceinline__ void put_turned(Scratch& scratch, const float* angles,
                                                    u32 piece, float4 v) {
    constexpr int kPairs = kRope / 2;
    const u32 head = piece / (kRope / 4), at = piece % (kRope / 4) * 2;
    const float2 first = kInterleaved ? float2{v.x, v.z} : float2{v.x, v.y};
    const float2 second = kInterleaved ? float2{v.y, v.w} : float2{v.z, v.w};
    const float2 cosine = __ldg(reinterpret_cast<const float2*>(angles + at));
    const float2 sine = __ldg(reinterpret_cast<const float2*>(angles + kPairs + at));
    const u32 words[2] = {pack_bf16(fmaf(first.x, cosine.x, -(second.x * sine.x)),
                                    fmaf(first.y, cosine.y, -(second.y * sine.y))),
                          pack_bf16(fmaf(second.x, cosine.x, first.x * sine.x),
                                    fmaf(second.y, cosine.y, first.y * sine.y))};
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      const u32 e = kLora + half * kPairs + at;
      *reinterpret_cast<u32*>(scratch.q + head * kWidth + swizzle<kWidth>(head, e / 8) * 8 +
                              e % 8) = words[half];
    }
  }

  // Queries, and the list of rows if there is one or else the rows that the step appends, to shared
  // memory; the loads of queries are under way first, for all threads have them. Rows of q that no
  // head has hold anything.
  static __device__ __forceinline__ void prepare(const Here& me, Block& b, const Run& run,
                                                 const Place& at, const Share& share, u32 first,
                                                 Scratch& scratch) {
    constexpr u32 kOfHead = kLora / 4;
    const u32 tag = b.tag(run.x);
    const float* latents =
        b.at(run.x) + at.token * kQPitch + at.group * kTileHeads * kLora + me.thread * 4;
    const float* heads =
        b.at(run.x2) + at.token * kRopePitch + at.group * kTileHeads * (kNope + kRope) + kNope;
    float4 pairs[kTurnedLoads], v[kLoads];
    Retry retry;
    bool begun = false;
    for (u32 other = 1; other;) {
      other = 0;
#pragma unroll
      for (int i = 0; i < kTurnedLoads; ++i)
        if (const u32 piece = me.thread + i * kThreads; inside<kTurned>(piece))
          pairs[i] = load_pairs(heads, piece);
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (inside<kLatents>(me.thread + i * kThreads))
          v[i] = load_float4(latents + i * (kThreads * 4));
      if (!begun) {
        if (kTopk > 0 && share.listed)
          list_rows(me, b, run, at.token, share, scratch);
        else
          fetch_made(me, b, run, at.token, share, first, scratch);
      }
      begun = true;
#pragma unroll
      for (int i = 0; i < kTurnedLoads; ++i)
        if (kRopeTagged && inside<kTurned>(me.thread + i * kThreads))
          other |= other_tags(pairs[i], b.tag(run.x2));
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (kTagged && inside<kLatents>(me.thread + i * kThreads)) other |= other_tags(v[i], tag);
      if (other && retry.in_vain(b, tag)) break;
    }
#pragma unroll
    for (int i = 0; i < kTurnedLoads; ++i) {
      const u32 piece = me.thread + i * kThreads;
      if (inside<kTurned>(piece))
        put_turned(scratch, angles_of<kRope>(b, run, at.token), piece,
                   cleaned<kRopeTagged>(pairs[i]));
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const u32 piece = me.thread + i * kThreads;
      if (inside<kLatents>(piece))
        put(scratch, piece / kOfHead, piece % kOfHead * 4, cleaned<kTagged>(v[i]));
    }
    sync_consumers();
  }
  // Whether a thread has a piece; known beforehand where all threads have as many.
  template <u32 kCount>
  static __device__ __forceinline__ bool inside(u32 piece) {
    return kCount % kThreads == 0 || piece < kCount;
  }

  // The rows that the step appends for its tokens from `first` to this one, if the share sees some.
  static __device__ __forceinline__ void fetch_made(const Here& me, const Block& b, const Run& run,
                                                    u32 token, const Share& share, u32 first,
                                                    Scratch& scratch) {
    if (share.end <= b.position(first)) return;
#pragma unroll 1
    for (u32 i = me.thread; i < (token + 1 - first) * kRowPieces; i += kThreads) {
      const u64 row = row_at(b, token, b.position(first + i / kRowPieces));
      reinterpret_cast<float4*>(scratch.made)[i] =
          load_float4(reinterpret_cast<const float*>(run.w + row) + i % kRowPieces * 4);
    }
  }

  static __device__ __forceinline__ u32 other_tags(float4 v, u32 tag) {
    return other_tag(v.x, tag) | other_tag(v.y, tag) | other_tag(v.z, tag) | other_tag(v.w, tag);
  }
  template <bool kHasTags>
  static __device__ __forceinline__ float4 cleaned(float4 v) {
    if constexpr (!kHasTags) return v;
    return {untagged(v.x), untagged(v.y), untagged(v.z), untagged(v.w)};
  }

  static __device__ __forceinline__ void tile(const Here& me, Block& b, const Run& run,
                                              const Place& at) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(b.scratch);
    Share share(b, at.token, at.split);
    if (kTopk == 0 && share.idle()) return;  // nobody reads the result
    State state;
    if (!share.idle()) {
      const u32 first = first_of_sequence(b, at.token), fresh = b.position(first);
      prepare(me, b, run, at, share, first, scratch);
#pragma unroll 1
      for (bool again = false; share.next(); again = true)
        take(me, b, share, fresh, again, scratch, state);
    }
    store(me, b, run, at, state);
    sync_consumers();
  }

  // The next piece of a share; fresh: the first position that the step appends.
  static __device__ __forceinline__ void take(const Here& me, Block& b, const Share& share,
                                              u32 fresh, bool again, Scratch& scratch,
                                              State& state) {
    const Cursor first = b.cursor;
    const u32 units = (share.rows + kUnitRows - 1) / kUnitRows, mine = me.warp / 2;
    const u32* rows = share.listed ? scratch.rows + share.from - share.first : nullptr;
    if (mine < units) {
      wait_full(b, first.after(mine));
      u16* unit = reinterpret_cast<u16*>(b.slot(first.after(mine)));
      const u32 from = share.from + mine * kUnitRows;
      const u32 end = min(from + kUnitRows, share.from + share.rows);
      if (!share.listed && end > fresh) replace(me, unit, max(from, fresh), end, fresh, scratch);
      if constexpr (kPacked)
        Row::template widen<kUnitRows>(reinterpret_cast<u8*>(unit), me.thread % 64,
                                       kPairBarrier + mine);
      score(me, scratch, unit, rows ? rows + mine * kUnitRows : nullptr);
    }
    sync_consumers();
    weigh(me, state, scratch, share.rows);
    sync_consumers();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!again) continue;
      const float fade = scratch.fade[me.lane / 4 + half * 8];
#pragma unroll
      for (int n = 0; n < 2 * kOwn; ++n)
        state.out[n][half * 2] *= fade, state.out[n][half * 2 + 1] *= fade;
    }
#pragma unroll 1
    for (u32 u = 0; u < units; ++u) {
      wait_full(b);
      add_values(me, state, scratch.weights[0] + u * kUnitRows,
                 reinterpret_cast<const u16*>(b.slot()), rows ? rows + u * kUnitRows : nullptr);
      release_slot(b);
    }
  }

  // What was copied for positions of the step may be older than what is there now. Both warps of a
  // unit do this, and so find what they need in place without waiting for each other.
  static __device__ __forceinline__ void replace(const Here& me, u16* unit, u32 begin, u32 end,
                                                 u32 fresh, const Scratch& scratch) {
#pragma unroll 1
    for (u32 position = begin; position < end; ++position)
#pragma unroll 1
      for (u32 piece = me.lane; piece < kRowPieces; piece += 32)
        reinterpret_cast<uint4*>(unit + (kFirst + position % kUnitRows * kRowBytes) / 2)[piece] =
            reinterpret_cast<const uint4*>(scratch.made[position - fresh])[piece];
    fence_proxy();  // the copy engine will write to this slot again
    __syncwarp();
  }

  // Where a lane finds the pieces c + h of a row, c a constant and h its own, less than the power
  // of two that c is a multiple of: (c + h) ^ key is (c & ~7) + ((c & 7) ^ (h ^ key)). from: the
  // row of a page that it was, which tells how its pieces are permuted; those of packed rows are as
  // the row of the unit says.
  struct Pieces {
    u32 base, own;
    __device__ __forceinline__ Pieces(const u16* rows, u32 row, u32 from, u32 h)
        : base(shared_address(rows + row * kWidth)), own((h ^ swizzle<kWidth>(from, 0)) * 16) {}
    __device__ __forceinline__ u32 at(u32 c) const {
      return base + (own ^ (c & 7) * 16) + (c & ~7u) * 16;
    }
  };
  static __device__ __forceinline__ u32 origin(const u32* rows, u32 row) {
    return kTopk > 0 && !kPacked && rows ? rows[row] : row;
  }

  // q k^T of the warp's unit, over the warp's half of a row.
  static __device__ __forceinline__ void score(const Here& me, Scratch& scratch, const u16* unit,
                                               const u32* rows) {
    const u32 row = me.lane % 8 + me.lane / 16 * 8, head = me.lane % 16, half = me.warp % 2;
    const Pieces keys(unit, row, origin(rows, row), me.lane / 8 % 2);
    const Pieces queries(scratch.q, head, head, me.lane / 16);
    float s[2][4] = {};
#pragma unroll 3
    for (u32 i = 0; i < kHalf; ++i) {
      const u32 step = half * kHalf + i;
      if (kSteps % 2 && step == kSteps) break;
      u32 k[4], a[4];
      load_matrices(k, keys.at(step * 2));
      load_matrices(a, queries.at(step * 2));
      multiply(s[0], a, k[0], k[1]);
      multiply(s[1], a, k[2], k[3]);
    }
    float* to = &scratch.scores[half][me.lane / 4][me.warp / 2 * kUnitRows + me.lane % 4 * 2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int below = 0; below < 2; ++below)
        *reinterpret_cast<float2*>(to + below * 8 * kPitch + n * 8) = {s[n][below * 2],
                                                                       s[n][below * 2 + 1]};
  }

  // Scores of the warp's heads to weights; lane l has positions l modulo 16, those beyond `rows` do
  // not count.
  static __device__ __forceinline__ void weigh(const Here& me, State& state, Scratch& scratch,
                                               u32 rows) {
    const u32 head = own_head(me), at = me.lane % 16;
    float v[kUnits], most = state.most, sum = 0;
#pragma unroll
    for (u32 u = 0; u < kUnits; ++u) {
      const u32 column = u * kUnitRows + at;
      const float score = scratch.scores[0][head][column] + scratch.scores[1][head][column];
      v[u] = column < rows ? score * scale() : -infinity();
      most = fmaxf(most, v[u]);
    }
#pragma unroll
    for (int o = 8; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    const float base = most == -infinity() ? 0 : most;
    const float fade = exp2_fast(state.most - base);
#pragma unroll
    for (u32 u = 0; u < kUnits; ++u) {
      const u16 weight = u16(pack_bf16(exp2_fast(v[u] - base), 0));
      scratch.weights[head][u * kUnitRows + at] = weight;
      sum += BF16::widen(weight);
    }
#pragma unroll
    for (int o = 8; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (at == 0) scratch.fade[head] = fade;
    state.most = most;
    state.sum = fmaf(state.sum, fade, sum);
  }

  static __device__ __forceinline__ void add_values(const Here& me, State& state,
                                                    const u16* weights, const u16* unit,
                                                    const u32* rows) {
    const u32 row = me.lane % 16, piece = me.lane / 16;
    const Pieces values(unit, row, origin(rows, row), piece);
    u32 p[4];
    load_matrices(p, shared_address(weights + row * kPitch + piece * 8));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const u32 block = me.warp * kOwn + i;
      if (kColumns % kWarps && block >= kColumns) continue;
      u32 m[4];
      load_matrices_transposed(m, values.at(block * 2));
      multiply(state.out[2 * i], p, m[0], m[1]);
      multiply(state.out[2 * i + 1], p, m[2], m[3]);
    }
  }

  // A word of the result, no NaN; rounded in the same way where words have no tags.
  static __device__ __forceinline__ float word(float v, u32 tag) {
    const u32 bits = (__float_as_uint(v) + (kTagMask + 1) / 2) & ~kTagMask;
    return __uint_as_float(kTagsOut ? bits | tag : bits);
  }
  // NaNs become one that rounding leaves. They are looked for in all sums at once, as hardly ever
  // there are some.
  static __device__ __forceinline__ void sort_out(State& state) {
    float all = state.most + state.sum;
#pragma unroll
    for (int n = 0; n < 2 * kOwn; ++n)
      all = fmaf(state.out[n][0], state.out[n][1], fmaf(state.out[n][2], state.out[n][3], all));
    if (all == all) return;
    const auto quiet = [](float v) { return v == v ? v : __uint_as_float(0x7fc00000u); };
    state.most = quiet(state.most), state.sum = quiet(state.sum);
#pragma unroll
    for (int n = 0; n < 2 * kOwn; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) state.out[n][i] = quiet(state.out[n][i]);
  }

  static __device__ __forceinline__ void store(const Here& me, const Block& b, const Run& run,
                                               const Place& at, State& state) {
    sort_out(state);
    const u32 first = at.token * kHeads + at.group * kTileHeads, tag = b.tag(run.y);
    float* y = b.at(run.y) + (first * kSplits + at.split) * kYPitch;
    if (me.lane % 16 == 0 && own_head(me) < kTileHeads)
      store_float2(y + own_head(me) * (kSplits * kYPitch) + kLora,
                   {word(state.most * (1 / kLog2e), tag), word(state.sum, tag)});
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 row = me.lane / 4 + half * 8, column = me.warp * kOwn * 16 + me.lane % 4 * 2;
      if (row >= kTileHeads) continue;
      float* to = y + row * (kSplits * kYPitch) + column;
#pragma unroll
      for (int n = 0; n < 2 * kOwn; ++n)
        if (kColumns % kWarps == 0 || column + n * 8 < kLora)
          store_float2(to + n * 8,
                       {word(state.out[n][half * 2], tag), word(state.out[n][half * 2 + 1], tag)});
    }
  }
};
