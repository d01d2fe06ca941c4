// Products of all shapes by one body of code, for weights in e4m3 with scales for blocks. A program
// of many shapes does not fit the instruction cache when each has code of its own (linear.cuh):
// then every op begins by waiting for its instructions. Here the shape is read from a table, loops
// are not unrolled over it, and x' lies in shared memory (shape_inputs.cuh), once for all warps.
//
// The products are those of Matrix: 16 rows of 16 weights, rows cut into segments where a unit has
// fewer of them, k in blocks of 64 bytes, sums of all warps added up by the warps that finish a
// chunk of rows. Columns of B are segments of tokens, so a token's sums are the same bits however
// many tokens there are.
#pragma once
#include "shape_inputs.cuh"

// kChosen: a choice names the weights; other products have no code for that.
template <bool kChosen>
struct AnyShape {
  using In = ShapeInputs<kChosen>;
  static constexpr int kBlock = In::kBlock, kHalf = In::kHalf, kProducts = In::kLane / 4;
  static constexpr float kSumFactor = 1 / In::kInputFactor;
  static constexpr bool kOfToken = kTokens > 1 && kChosen;  // each token has rows of its own
  // Tokens that a unit is multiplied with: its own, as if the step had no other, or all.
  static constexpr int kMet = kChosen ? 1 : kTokens;
  // Tiles whose products hide each other's waits; all their units are in the ring at once, and as
  // many others are on their way.
  static constexpr int kTogether = kMet == 1 && kSlots >= 8 ? 4 : 2;
  static constexpr int kMostColumns = kMet;  // blocks of 8 columns: 8 segments of each token
  static constexpr u32 kNamed = 4;           // experts of which the loader knows at a time

  // The scales that a warp fetches of its items, each of a group for one matrix or part.
  static constexpr int kItems = kTokens > 1 ? kTokens : 2, kColumnRounds = 2;
  struct Scales {
    float v[kItems][kColumnRounds];
    u32 items;  // of all warps
  };

  // What a lane is in all products of an op, and where in a unit, in x' and among a tile's scales
  // it begins: it goes on by the same steps through all of them.
  struct Lane : Here {
    u32 quad, column;
    u32 segments, block_rows;     // block_rows: blocks of 64 bytes in a row of weights
    u32 segment[2], unit_row[2];  // of its rows of A: column, column + 8
    u32 weights[2], scale[2], x[kMostColumns];
    __device__ __forceinline__ explicit Lane(const Shape& s)
        : quad(lane % 4),
          column(lane / 4),
          segments(1u << s.segment_shift),
          block_rows(s.elements() / kBlock) {
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        segment[h] = (h * 8 + column) & (segments - 1);
        unit_row[h] = (h * 8 + column) >> s.segment_shift;
        const u32 block = warp * segments + segment[h], part = quotient(block, s.block_inverse);
        weights[h] =
            (part * s.unit_rows() + unit_row[h]) * s.k + block * 64 - part * s.k + quad * 16;
        scale[h] = (unit_row[h] >= s.tile_rows ? s.columns : 0) + (block >> s.column_shift);
      }
#pragma unroll
      for (u32 m = 0; m < kMostColumns; ++m) {
        // Columns that have no segment, and blocks that are not there, take any number.
        const u32 segment = min((m * 8 + column) / kMet, segments - 1);
        x[m] = In::place(min(warp * segments + segment, block_rows - 1), quad);
      }
    }
  };

  static __device__ __forceinline__ const Shape& shape(const Run& run) {
    return kShapes[shape_of(run)];
  }
  static __device__ __forceinline__ bool left_out(const Block& b, const Shape& s) {
    return s.beyond && !sees_beyond(b, s.beyond);
  }

  // The loader's side. False: the launch has ended.
  static __device__ __forceinline__ bool stream(Loader& l, const Run& run) {
    const Shape& s = shape(run);
    if (left_out(l.b, s)) return true;
    if (kChosen && !l.choose(run, s.count * kTokens)) return false;
    const u32 tokens = kOfToken ? l.count() : 1;
    for (u32 begin = 0, span = 0; begin < run.count;) {
      if (begin == span) span = span_end(run, s, begin);
      const u32 end = kOfToken ? min(begin + chunk_rows(s), span) : span;
#pragma unroll 1
      for (u32 token = 0; token < tokens; ++token)
#pragma unroll 1
        for (u32 row = begin; row < end; row += s.tile_rows)
          if (!stream_tile(l, run, s, row, token)) return false;
      begin = end;
    }
    return true;
  }

  static __device__ __forceinline__ bool consume(Block& b, const Run& run) {
    const Shape& s = shape(run);
    if (left_out(b, s)) return pass_on(b, run);
    const Lane me(s);
    Scales scales = {};
    return kChosen ? of_choice(me, b, run, s, scales) : of_one(me, b, run, s, scales);
  }

 private:
  static __device__ __forceinline__ bool of_one(const Lane& me, Block& b, const Run& run,
                                                const Shape& s, Scales& scales) {
    fetch_scales(me, run, s, 0, scales);
    if (!wait_for_inputs(b, run, s.tagged_x)) return false;  // tagged: says whether it is there
#pragma unroll 1
    for (u32 first = 0; first < run.count;) {
      const u32 end = span_end(run, s, first);
      const auto meanwhile = [&] {  // while x is under way
        if (first > 0) fetch_scales(me, run, s, first, scales);
        keep_scales(me, b, s, scales);
      };
      if (first == 0 || s.rows == kDiagonal)
        In::make(me, b, run, s, first, meanwhile);
      else
        meanwhile();
      sync_consumers();
      multiply_rows(me, b, run, s, first, end);
      first = end;
    }
    return true;
  }

  // Scales come first where it is known whose they are, x' where its words say that it is there; in
  // a loop, so that either order has one code.
  static __device__ __forceinline__ bool of_choice(const Lane& me, Block& b, const Run& run,
                                                   const Shape& s, Scales& scales) {
    const bool known = choice_known(run), at_hand = x_at_hand(run);
    if (at_hand) sync_consumers();  // nobody reads what is left of the run before
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (known == (turn == 0)) fetch_scales(me, run, s, 0, scales);
      if (at_hand == (turn == 0)) In::make(me, b, run, s, 0, [] {});
      if (turn == 0 && !wait_for_choice(b, run, s.count)) return false;
    }
#pragma unroll 1
    for (u32 first = 0; first < run.count;) {
      const u32 end = span_end(run, s, first);
      if (first > 0) fetch_scales(me, run, s, first, scales);
      keep_scales(me, b, s, scales);
      sync_consumers();
      multiply_rows(me, b, run, s, first, end);
      first = end;
    }
    return true;
  }

  static __device__ __forceinline__ bool stream_tile(Loader& l, const Run& run, const Shape& s,
                                                     u32 row, u32 token) {
    if (!l.acquire()) return false;
    const u8 *from = run.w, *up = run.w_up;
    const u32 bytes = min(s.tile_rows, run.count - row) * s.k, pitch = s.tile_rows * s.k;
    l.expect(bytes * s.matrices * s.parts);
    if (s.rows == kSideBySide) {  // eight copies or so: what one of them takes counts
      from = opaque_pointer(from + u64(run.first + row) * s.k);  // one sum, not one in each copy
      const u32 bank_bytes = s.bank_rows * s.k, parts = s.parts;
      u32 to = 0;
#pragma unroll 1
      for (u32 first = 0; first < parts; first += kNamed) {
        u32 of[kNamed];  // experts, read at once: one after another would take longer than to copy
#pragma unroll
        for (u32 i = 0; i < kNamed; ++i) of[i] = expert(l.b, s, token, min(first + i, parts - 1));
#pragma unroll
        for (u32 i = 0; i < kNamed; ++i, to += pitch)
          if (first + i < parts) l.copy(to, from + u64(of[i]) * bank_bytes, bytes);
      }
    } else {
      u32 at = row;
      if (s.rows == kInTurn) {
        const u32 in_all = run.first + row, slot = quotient(in_all, s.bank_inverse);
        at = in_all - slot * s.bank_rows + expert(l.b, s, token, slot) * s.bank_rows;
      }
      l.copy(0, from + u64(at) * s.k, bytes);
      if (s.matrices > 1) l.copy(pitch, up + u64(at) * s.k, bytes);
    }
    l.next();
    return true;
  }
  static __device__ __forceinline__ u32 expert(const Block& b, const Shape& s, u32 token,
                                               u32 slot) {
    return load_shared(&b.shared.chosen[token * s.count + slot]);
  }

  // Scales. Rows of one group have the same ones; those of all groups of a span lie in shared
  // memory, for each token whose rows are its own: [token][group][matrix or part][columns].

  static __device__ __forceinline__ u32 group(const Run& run, const Shape& s, u32 row) {
    u32 at = run.first + row, before = 0;
    if (kChosen && s.rows == kInTurn) {
      const u32 slot = quotient(at, s.bank_inverse);
      at -= slot * s.bank_rows, before = slot * s.groups;
    }
    return before + (at >> s.row_shift);
  }
  static constexpr u32 kTables = kOfToken ? kTokens : 1;
  // Groups of a span.
  static __device__ __forceinline__ u32 groups(const Run& run, const Shape& s, u32 first) {
    return min(group(run, s, run.count - 1) - group(run, s, first) + 1, s.fitting);
  }
  // The end of the rows from `first` on that have the same x, and whose scales are kept together.
  static __device__ __forceinline__ u32 span_end(const Run& run, const Shape& s, u32 first) {
    u32 at = run.first + first, end = run.first + run.count;
    if (!kChosen || s.rows != kInTurn) {
      if (s.rows == kDiagonal) end = min(end, (quotient(at, s.bank_inverse) + 1) * s.bank_rows);
      return min(((at >> s.row_shift) + s.fitting) << s.row_shift, end) - run.first;
    }
    u32 matrix = quotient(at, s.bank_inverse) * s.bank_rows;
#pragma unroll 1
    for (u32 left = s.fitting; left && at < end; --left) {
      at = matrix + ((((at - matrix) >> s.row_shift) + 1) << s.row_shift);
      if (at >= matrix + s.bank_rows) at = matrix += s.bank_rows;
    }
    return min(at, end) - run.first;
  }

  // A warp fetches some items, a group's scales for one matrix or part each, and keeps them behind
  // the barrier of the wait for inputs.
  static __device__ __forceinline__ void fetch_scales(const Lane& me, const Run& run,
                                                      const Shape& s, u32 begin, Scales& to) {
    const u32 first = group(run, s, begin), each = s.matrices * s.parts;
    const u32 of_token = groups(run, s, begin) * each;
    to.items = of_token * kTables;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      u32 item = me.warp + i * kWarps, token = 0;
      if (item >= to.items) break;
      for (; kTokens > 1 && item >= of_token; ++token) item -= of_token;
      const u32 of_group = quotient(item, s.part_inverse), part = item - of_group * each;
      u32 row = first + of_group;
      if (kChosen) {
        u32 slot = part;
        if (s.rows == kInTurn) slot = quotient(row, s.group_inverse), row -= slot * s.groups;
        const u32* chosen = reinterpret_cast<const u32*>(run.bias_up) + token * s.count;
        row += (load_relaxed(chosen + slot) >> kChoiceShift) * s.groups;
      }
      const float* from = part && s.matrices > 1 ? run.scale_up : run.scale;
#pragma unroll
      for (int n = 0; n < kColumnRounds; ++n)
        to.v[i][n] = __ldg(from + u64(row) * s.columns + min(u32(me.lane + 32 * n), s.columns - 1));
    }
  }
  static __device__ __forceinline__ void keep_scales(const Lane& me, Block& b, const Shape& s,
                                                     const Scales& from) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const u32 item = me.warp + i * kWarps;
      if (item >= from.items) break;
#pragma unroll
      for (int n = 0; n < kColumnRounds; ++n)
        if (u32(me.lane + 32 * n) < s.columns)
          b.shared.scales[item * s.columns + me.lane + 32 * n] = from.v[i][n];
    }
  }

  // Products.

  struct Sums {
    float c[kMostColumns][4];
  };

  // Rows of a chunk: one matrix leaves room for twice as many.
  static __device__ __forceinline__ u32 chunk_rows(const Shape& s) {
    return kChunkRows << (s.matrices == 1);
  }

  // Rows [first, last) of the run.
  static __device__ __forceinline__ void multiply_rows(const Lane& me, Block& b, const Run& run,
                                                       const Shape& s, u32 first, u32 last) {
    const u32 chunk = chunk_rows(s), finishers = chunk * kTokens / 32;
#pragma unroll 1
    for (u32 begin = first; begin < last; begin += chunk) {
      const u32 finisher = (me.warp - begin / kChunkRows * (kChunkRows * kTokens / 32)) % kWarps;
      const bool mine = finisher < finishers;
      const u32 end = min(begin + chunk, last);
      const Place at(me, run, s, begin, finisher, end);
      Rest rest = 0;
      if (mine) rest = fetch_rest(b, run, s, at);
      const u32 tokens = kOfToken ? b.count() : 1;
#pragma unroll 1
      for (u32 token = 0; token < tokens; ++token)
#pragma unroll 1
        for (u32 row = begin; row < end; row += kTogether * s.tile_rows)
          multiply_tiles(me, b, run, s, first, row, begin, end, token);
      sync_consumers();
      if (mine) {
        finish(b, run, s, at, rest);
        if (end == run.count) tell(me, b, run, s, finisher, finishers);
      }
      ++b.chunk;
    }
  }

  // Up to kTogether tiles from `row` on, of a span that begins at `first` and a chunk that begins
  // at `begin`. token: whose rows these are, or 0.
  static __device__ __forceinline__ void multiply_tiles(const Lane& me, Block& b, const Run& run,
                                                        const Shape& s, u32 first, u32 row,
                                                        u32 begin, u32 end, u32 token) {
    // Of tiles that are not there: the last one's.
    const u32 tiles = min(u32(kTogether), (end - row + s.tile_rows - 1) >> s.tile_shift());
    const u32 before = group(run, s, first);
    const u8* slots[kTogether];
    const float* scale[kTogether];
    bool ready = true;
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const u32 tile = min(u32(t), tiles - 1);
      const Cursor unit = b.cursor.after(tile);
      ready &= barrier_test(&b.shared.full[unit.slot], unit.parity);
      slots[t] = b.slot(unit);
      u32 index = group(run, s, row + (tile << s.tile_shift())) - before;
      if (token) index += token * groups(run, s, first);
      scale[t] = b.shared.scales + index * s.matrices * s.parts * s.columns;
    }
#pragma unroll 1
    for (u32 tile = 0; !ready && tile < tiles; ++tile) wait_full(b, b.cursor.after(tile));
    Sums sums[kTogether] = {};
    const u32 stride = kWarps << s.segment_shift;
    Lane at = me;  // moves on
    const u16* x_of_token = In::x(b) + token * (me.block_rows * kBlock + In::kPad);
#pragma unroll 1
    for (u32 from = me.warp << s.segment_shift; from < me.block_rows; from += stride) {
      add(at, x_of_token, from, slots, scale, sums);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        at.weights[h] += s.weight_step, at.scale[h] += stride >> s.column_shift;
#pragma unroll
      for (int m = 0; m < kMostColumns; ++m) at.x[m] += stride * kBlock;
    }
    __syncwarp();
    if (me.lane == 0)
#pragma unroll 1
      for (u32 tile = 0; tile < tiles; ++tile)
        barrier_arrive(&b.shared.empty[b.cursor.after(tile).slot]);
    b.cursor = b.cursor.after(tiles);
    if constexpr (kMet == 1)
      leave_one(me, b, s, row - begin, token, tiles, sums);
    else
      leave(me, b, s, row - begin, tiles, sums);
  }

  // Blocks [from, from + segments) of all rows of the tiles.
  // x: of the first token that they meet.
  static __device__ __forceinline__ void add(const Lane& at, const u16* x, u32 from,
                                             const u8* const (&slots)[kTogether],
                                             const float* const (&scale)[kTogether],
                                             Sums (&sums)[kTogether]) {
    uint4 weights[kTogether][2];
    float factor[kTogether][2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const bool inside = from + at.segment[h] < at.block_rows;
        weights[t][h] =
            inside ? *reinterpret_cast<const uint4*>(slots[t] + at.weights[h]) : uint4{0, 0, 0, 0};
        factor[t][h] = inside ? scale[t][at.scale[h]] : 0;
      }
#pragma unroll
    for (int m = 0; m < kMostColumns; ++m) {
      if (m > 0 && u32(m * 8) >= at.segments * kMet) break;
      const u32 column = m * 8 + at.column, segment = min(column / kMet, at.segments - 1);
      const u32 here = from + segment < at.block_rows ? at.x[m] : 0;
      const u16* of_token = x + column % kMet * (at.block_rows * kBlock + In::kPad);
      u32 words[2 * kProducts];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 four = *reinterpret_cast<const uint4*>(of_token + (here ^ half * kHalf));
        words[4 * half] = four.x, words[4 * half + 1] = four.y;
        words[4 * half + 2] = four.z, words[4 * half + 3] = four.w;
      }
      multiply_blocks(weights, words, factor, m, sums);
    }
  }

  // Products of all tiles in turn: none waits for the one before it.
  static __device__ __forceinline__ void multiply_blocks(const uint4 (&w)[kTogether][2],
                                                         const u32 (&words)[2 * kProducts],
                                                         const float (&factor)[kTogether][2], int m,
                                                         Sums (&sums)[kTogether]) {
    constexpr int kChains = 2;  // sums of a tile that do not wait for each other
    float own[kTogether][kChains][4] = {};
#pragma unroll
    for (int p = 0; p < kProducts; ++p)
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const u32 low[4] = {w[t][0].x, w[t][0].y, w[t][0].z, w[t][0].w};
        const u32 high[4] = {w[t][1].x, w[t][1].y, w[t][1].z, w[t][1].w};
        u32 a[4];
        halves_of_e4m3(low[p], a[0], a[2]);
        halves_of_e4m3(high[p], a[1], a[3]);
        multiply_f16(own[t][p % kChains], a, words[2 * p], words[2 * p + 1]);
      }
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[t].c[m][e] = fmaf(own[t][0][e] + own[t][1][e], factor[t][e / 2], sums[t].c[m][e]);
  }

  // A lane has sums of two columns. Those that count stand where a row's segment meets its own
  // column; they are added up over the segments of a row.
  static __device__ __forceinline__ u32 place_in_chunk(const Shape& s, u32 unit_row) {
    return (unit_row & (s.tile_rows - 1)) + (unit_row >= s.tile_rows ? kChunkRows : 0);
  }
  // Each lane of a quad takes over a half of the rows of one of two tiles.
  static __device__ __forceinline__ void leave_one(const Lane& me, Block& b, const Shape& s,
                                                   u32 first, u32 token, u32 tiles,
                                                   const Sums (&sums)[kTogether]) {
    const bool odd = me.quad & 1, upper = me.quad & 2;
    float half[kTogether], v[kTogether / 2];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      float own[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = me.segment[h] % 2 ? sums[t].c[0][2 * h + 1] : sums[t].c[0][2 * h];
        own[h] = me.segment[h] / 2 == me.quad ? sum : 0;
      }
      half[t] = (odd ? own[1] : own[0]) + __shfl_xor_sync(~0u, odd ? own[0] : own[1], 1);
    }
#pragma unroll
    for (int i = 0; i < kTogether / 2; ++i)
      v[i] = (upper ? half[2 * i + 1] : half[2 * i]) +
             __shfl_xor_sync(~0u, upper ? half[2 * i] : half[2 * i + 1], 2);
#pragma unroll
    for (int o = 1; o < 8; o *= 2)
#pragma unroll
      for (int i = 0; i < kTogether / 2; ++i) {
        const float other = __shfl_xor_sync(~0u, v[i], 4 * o);
        v[i] += u32(o) < me.segments ? other : 0;
      }
    const u32 row = first + place_in_chunk(s, odd ? me.unit_row[1] : me.unit_row[0]);
#pragma unroll
    for (int i = 0; i < kTogether / 2; ++i)
      if (me.segment[0] == 0 && 2 * i + upper < tiles)
        *part_of_sum(b, row + (2 * i + upper) * s.tile_rows, me.warp, token) = v[i] * kSumFactor;
  }
  static __device__ __forceinline__ void leave(const Lane& me, Block& b, const Shape& s, u32 first,
                                               u32 tiles, const Sums (&sums)[kTogether]) {
    constexpr int kOwn = 2;           // tokens of a lane
    constexpr int kLanes = kMet / 2;  // that have all tokens of a segment
#pragma unroll
    for (int i = 0; i < 2 * kTogether; ++i) {
      const int t = i / 2, h = i % 2;
      float own[kOwn] = {};
#pragma unroll
      for (int m = 0; m < kMostColumns; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const u32 column = m * 8 + me.quad * 2 + e;
          if (column / kMet == me.segment[h]) own[e % kOwn] = sums[t].c[m][2 * h + e];
        }
      const u32 row = first + t * s.tile_rows + place_in_chunk(s, me.unit_row[h]);
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        float v = own[n];
#pragma unroll
        for (int o = kLanes; o < 4; o *= 2) v += __shfl_xor_sync(~0u, v, o);
#pragma unroll
        for (int o = 1; o < 8; o *= 2) {
          const float other = __shfl_xor_sync(~0u, v, 4 * o);
          v += u32(o) < me.segments ? other : 0;
        }
        const u32 token = me.quad * kOwn + n;
        if (u32(t) < tiles && me.segment[h] == 0 && token < kMet)
          *part_of_sum(b, row, me.warp, token) = v * kSumFactor;
      }
    }
  }

  // One output of a chunk, for a lane of a finishing warp.
  struct Place {
    u32 token, in_chunk, y;  // y: element of the output buffer
    bool inside;
    __device__ __forceinline__ Place(const Lane& me, const Run& run, const Shape& s, u32 begin,
                                     u32 finisher, u32 last) {
      const u32 index = finisher * 32 + me.lane;
      token = kTokens == 1 ? 0 : index / chunk_rows(s);
      in_chunk = kTokens == 1 ? index : index % chunk_rows(s);
      inside = begin + in_chunk < last;
      y = token * s.y_pitch + run.first + begin + in_chunk;
    }
  };

  // The residual that a sum is added to, fetched before the sum is there.
  using Rest = float;  // as it was loaded
  static __device__ __forceinline__ Rest fetch_rest(const Block& b, const Run& run, const Shape& s,
                                                    const Place& at) {
    return at.inside && s.epilogue == kAdd ? load_residual(b, run, at.y) : 0;
  }

  static __device__ __forceinline__ void finish(Block& b, const Run& run, const Shape& s,
                                                const Place& at, Rest rest) {
    if (!at.inside) return;
    const float factor = s.normed ? norm_factor<kWarps>(b, at.token, s.inverse, s.eps) : 1;
    float y = sum_of_parts<kWarps>(b, at.in_chunk, at.token) * factor;
    if (s.epilogue == kGate)
      y = silu(y) * (sum_of_parts<kWarps>(b, kChunkRows + at.in_chunk, at.token) * factor);
    if (s.epilogue == kAdd) y += residual(b, run, at.y, s.tagged_y, rest);
    const u32 tag = b.tag(run.y);
    if (s.narrow_y)
      store_output<false, true>(b.at(run.y), at.y, y, tag);
    else
      store_float(b.at(run.y) + at.y, s.tagged_y ? tagged(y, tag) : y);
  }

  // By the warps that have finished the last chunk of a run.
  static __device__ __forceinline__ void tell(const Lane& me, const Block& b, const Run& run,
                                              const Shape& s, u32 finisher, u32 finishers) {
    constexpr u32 kFewest = kChunkRows * kTokens / 32;
    if (finishers == 1)
      __syncwarp();
    else if (finishers == kFewest)
      sync_threads<2, 32 * kFewest>();
    else
      sync_threads<2, 64 * kFewest>();
    if (finisher == 0 && me.lane == 0) signal(b, run, s.tagged_y);
  }
};
