// What one hand-off between GPUs costs, by kernels of the form that a program has: all blocks are
// resident, eight warps compute, one thread streams weights. handoff_gpu.py launches them, one on
// each GPU, and says what they measure; kParts and kRows are of its making.
#include "ptx.cuh"
#include "system.cuh"

constexpr u32 kMost = 8;         // GPUs
constexpr u32 kComputing = 256;  // threads
constexpr u32 kEach = kRows / (4 * kComputing);
constexpr u32 kUnit = 16384, kWindow = 2;  // the stream: bytes of a copy, copies under way
constexpr u32 kTagMask = 0xff;
// Parts that are loaded together, by as many registers as there are.
constexpr u32 kGroup = kParts % 4 == 0 ? 4 : kParts % 3 == 0 ? 3 : kParts % 2 == 0 ? 2 : 1;
static_assert(kEach * 4 * kComputing == kRows && kParts <= kMost);

struct Failure {
  u32 block, round, what, have, want;
};
enum What : u32 { kWord = 100, kCounter, kSum, kEnd };  // below: words of that part

struct Job {
  float* parts;           // [2][kParts][kRows]: what the parts of a sum are read from, on this GPU
  float* targets[kMost];  // the same of the GPU that each of this one's writes goes to
  u32* counters[kMost];   // theirs
  float* sums;            // [2][kRows]
  u32* counter;           // of parts that are here; behind it, a line further, that of sums
  u32* words[2];          // ping-pong: where each player waits
  u32* verdict;           // not 0: a wait was in vain
  Failure* failure;
  u64* stamps;  // [blocks][3]: begin, end, units streamed
  float* out;   // [blocks][kRows]: the last sum as each block has it
  const u8* stream;
  u64 units;                  // of the stream; 0: none
  u64 patience;               // ns
  u32 written[kMost];         // the part that each write is of
  u32 rounds, warm;           // all, and how many of them are not timed
  u32 first_player, players;  // ping-pong: of this GPU
};

struct Shared {
  float x[2][kRows];
  u8 ring[kWindow][kUnit];
  u64 full[kWindow];
  u32 lost, ended;  // the round in which a wait was in vain; 0: none
};
static_assert(sizeof(Shared) <= kSharedBytes);

constexpr u32 kLine = 32;  // words between counters

__device__ __forceinline__ void sync_computing() { sync_threads<1, kComputing>(); }

// The bits that a tag leaves hold the numbers of this probe exactly.
__device__ __forceinline__ u32 tag_of(u32 round) { return 1 + round % 255; }
__device__ __forceinline__ u32 tagged(float v, u32 tag) { return __float_as_uint(v) | tag; }
__device__ __forceinline__ float untagged(u32 v) { return __uint_as_float(v & ~kTagMask); }
__device__ __forceinline__ bool all_tagged(uint4 v, u32 tag) {
  return (((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) & kTagMask) == 0;
}

// Asked again and again by whoever waits: has it been too long, or has somebody else given up?
struct Patience {
  u64 since = 0;
  u32 spins = 0;
  __device__ __forceinline__ bool ended(const Job& job, Shared& shared, u32 round, u32 what,
                                        u32 have, u32 want) {
    if (++spins % 64) return false;
    const u64 now = nanoseconds();
    if (!since) since = now;
    if (now - since < job.patience && load_relaxed(job.verdict) == 0) return false;
    if (swap_if(job.verdict, 0, 1) == 0) *job.failure = {blockIdx.x, round, what, have, want};
    store_shared(&shared.lost, round);
    return true;
  }
};

// Weights pass by, as they do in a program, until the block has ended.
__device__ void stream(const Job& job, Shared& shared) {
  u64 n = 0, unit = blockIdx.x;
  for (; !load_shared(&shared.ended); ++n, unit += gridDim.x) {
    if (unit >= job.units) unit = blockIdx.x;
    u64* full = shared.full + n % kWindow;
    if (n >= kWindow)
      while (!barrier_test(full, (n / kWindow - 1) & 1)) {
      }
    barrier_expect(full, kUnit);
    copy_bulk(shared.ring[n % kWindow], job.stream + unit * kUnit, kUnit, full);
  }
  for (u64 i = n > kWindow ? n - kWindow : 0; i < n; ++i)
    while (!barrier_test(shared.full + i % kWindow, (i / kWindow) & 1)) {
    }
  job.stamps[3 * blockIdx.x + 2] = n;
}

// All threads: what is shared is as at the start.
__device__ Shared& prepared() {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  for (u32 i = threadIdx.x; i < kRows; i += blockDim.x) shared.x[0][i] = 0;
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < kWindow; ++i) barrier_init(shared.full + i, 1);
    barrier_init_done();
    shared.lost = shared.ended = 0;
  }
  __syncthreads();
  return shared;
}

// Rows of a block: all have some, and an even number.
__device__ __forceinline__ u32 first_row(u32 block) { return kRows / 2 * block / gridDim.x * 2; }

// What a block adds to the sum of a round: it needs all of the one before, and is exact in bf16.
__device__ __forceinline__ float share(const float* x, u32 row, u32 round, u32 part) {
  const u32 v = u32(x[(5 * row + round) % kRows]) + (row * 40503 >> 6) + round;
  return float((part + 1) * (v % 32));
}

// Until a counter is there, by one thread; the others wait for it. In vain: the round's end tells.
template <bool kOrdered>
__device__ __forceinline__ void wait(const Job& job, Shared& shared, const u32* counter, u32 want,
                                     u32 round, u32 what) {
  if (threadIdx.x == 0) {
    Patience patience;
    for (;;) {
      const u32 have = kOrdered ? load_peer_acquire(counter) : load_peer(counter);
      if (static_cast<int>(have - want) >= 0) break;
      if (patience.ended(job, shared, round, what, have, want)) break;
    }
  }
  sync_computing();
}

// This thread's rows of `kCount` parts from `from` on, added up to s in turn.
template <u32 kCount>
__device__ __forceinline__ void add_tagged(const Job& job, Shared& shared, const float* from,
                                           u32 round, u32 what, float4 (&s)[kEach]) {
  const u32 tag = tag_of(round);
  uint4 v[kCount][kEach];
  Patience patience;
  for (;;) {
    bool all = true;
#pragma unroll
    for (u32 p = 0; p < kCount; ++p)
#pragma unroll
      for (u32 k = 0; k < kEach; ++k)
        v[p][k] = load_peer4(from + p * kRows + 4 * (k * kComputing + threadIdx.x));
#pragma unroll
    for (u32 p = 0; p < kCount; ++p)
#pragma unroll
      for (u32 k = 0; k < kEach; ++k) all = all && all_tagged(v[p][k], tag);
    if (all || patience.ended(job, shared, round, what, v[0][0].x & kTagMask, tag)) break;
  }
#pragma unroll
  for (u32 p = 0; p < kCount; ++p)
#pragma unroll
    for (u32 k = 0; k < kEach; ++k) {
      s[k].x += untagged(v[p][k].x), s[k].y += untagged(v[p][k].y);
      s[k].z += untagged(v[p][k].z), s[k].w += untagged(v[p][k].w);
    }
}

// The same of parts in bf16, four of them in 8 bytes, which are there.
__device__ __forceinline__ void add_halves(const float* from, float4 (&s)[kEach]) {
  uint2 v[kEach];
#pragma unroll
  for (u32 k = 0; k < kEach; ++k) v[k] = load_peer2(from + 2 * (k * kComputing + threadIdx.x));
#pragma unroll
  for (u32 k = 0; k < kEach; ++k) {
    s[k].x += __uint_as_float(v[k].x << 16), s[k].y += __uint_as_float(v[k].x & 0xffff0000u);
    s[k].z += __uint_as_float(v[k].y << 16), s[k].w += __uint_as_float(v[k].y & 0xffff0000u);
  }
}

// Rows of this block to all who add them up: kRowsAtATime threads for each of them.
template <bool kHalves>
__device__ __forceinline__ void push(const Job& job, const float* x, u32 round) {
  constexpr u32 kRowsAtATime = 64;
  const u32 begin = first_row(blockIdx.x), end = first_row(blockIdx.x + 1);
  for (u32 w = threadIdx.x / kRowsAtATime; w < kParts; w += kComputing / kRowsAtATime) {
    const u32 part = job.written[w];
    float* to = job.targets[w] + (round % 2 * kParts + part) * kRows;
    for (u32 i = threadIdx.x % kRowsAtATime; begin + (kHalves ? 2 * i : i) < end;
         i += kRowsAtATime) {
      if constexpr (kHalves) {
        const u32 row = begin + 2 * i;
        const float low = share(x, row, round, part), high = share(x, row + 1, round, part);
        store_system(reinterpret_cast<u32*>(to) + row / 2, pack_bf16(low, high));
      } else {
        const float v = share(x, begin + i, round, part);
        store_system(reinterpret_cast<u32*>(to) + begin + i, tagged(v, tag_of(round)));
      }
    }
  }
}

// This block's rows of the sum, from all parts, for the other blocks of this GPU.
__device__ __forceinline__ void combine(const Job& job, Shared& shared, u32 round) {
  const float* from = job.parts + round % 2 * kParts * kRows;
  u32* to = reinterpret_cast<u32*>(job.sums + round % 2 * kRows);
  const u32 end = first_row(blockIdx.x + 1), tag = tag_of(round);
  for (u32 row = first_row(blockIdx.x) + threadIdx.x; row < end; row += kComputing) {
    u32 v[kParts];
    Patience patience;
    for (;;) {
      u32 other = 0;
#pragma unroll
      for (u32 p = 0; p < kParts; ++p)
        v[p] = load_peer(reinterpret_cast<const u32*>(from) + p * kRows + row);
#pragma unroll
      for (u32 p = 0; p < kParts; ++p) other |= (v[p] ^ tag) & kTagMask;
      if (!other || patience.ended(job, shared, round, 0, v[0] & kTagMask, tag)) break;
    }
    float sum = 0;
#pragma unroll
    for (u32 p = 0; p < kParts; ++p) sum += untagged(v[p]);
    store_system(to + row, tagged(sum, tag));
  }
}

enum class Way {
  kTagged,    // words with tags, behind a counter that orders nothing: as between workers of a GPU
  kPolled,    // words with tags, and no counter
  kCombined,  // each block adds up its own rows and hands the sums to the others of its GPU
  kCounted    // pairs of bf16 behind a counter that orders them
};

// False: a wait was in vain. All threads say the same: one that is ahead has lost a later round.
template <Way kWay>
__device__ __forceinline__ bool one_sum(const Job& job, Shared& shared, u32 round) {
  constexpr bool kHalves = kWay == Way::kCounted;
  push<kHalves>(job, shared.x[(round - 1) % 2], round);
  if constexpr (kWay == Way::kTagged || kHalves) {
    sync_computing();
    if (threadIdx.x < kParts) {
      if constexpr (kHalves) fence_system();
      add_peer(job.counters[threadIdx.x]);
    }
    wait<kHalves>(job, shared, job.counter, kParts * gridDim.x * round, round, kCounter);
  }
  const float* from = job.parts + round % 2 * kParts * kRows;
  float4 s[kEach] = {};
  if constexpr (kWay == Way::kCombined) {
    combine(job, shared, round);
    sync_computing();
    if (threadIdx.x == 0) add_relaxed(job.counter + kLine);
    wait<false>(job, shared, job.counter + kLine, gridDim.x * round, round, kSum);
    add_tagged<1>(job, shared, job.sums + round % 2 * kRows, round, kSum, s);
  } else if constexpr (kHalves) {
    for (u32 p = 0; p < kParts; ++p) add_halves(from + p * kRows, s);
  } else {
#pragma unroll
    for (u32 p = 0; p < kParts; p += kGroup)
      add_tagged<kGroup>(job, shared, from + p * kRows, round, p, s);
  }
  float4* x = reinterpret_cast<float4*>(shared.x[round % 2]);
#pragma unroll
  for (u32 k = 0; k < kEach; ++k) x[k * kComputing + threadIdx.x] = s[k];
  sync_computing();
  return load_shared(&shared.lost) != round;
}

template <Way kWay>
__device__ __forceinline__ void sums(const Job& job) {
  Shared& shared = prepared();
  if (threadIdx.x == kComputing && job.units) stream(job, shared);
  if (threadIdx.x >= kComputing) return;
  for (u32 round = 1; round <= job.rounds; ++round) {
    if (!one_sum<kWay>(job, shared, round)) break;
    if (threadIdx.x == 0 && round == job.warm) job.stamps[3 * blockIdx.x] = nanoseconds();
  }
  if (threadIdx.x == 0) {
    job.stamps[3 * blockIdx.x + 1] = nanoseconds();
    store_shared(&shared.ended, 1);
  }
  const float* last = shared.x[job.rounds % 2];
  for (u32 i = threadIdx.x; i < kRows; i += kComputing) job.out[blockIdx.x * kRows + i] = last[i];
}

// Two players, each one thread, hand a word to and fro; all other blocks wait for the end.
template <bool kOrdered>
__device__ __forceinline__ void play(const Job& job, Shared& shared, u32 player) {
  const auto hand_over = [&](u32 to, u32 v) {
    kOrdered ? store_peer_release(job.words[to], v) : store_system(job.words[to], v);
  };
  const auto await = [&](u32 v) {
    Patience patience;
    for (;;) {
      const u32* own = job.words[player];
      const u32 have = kOrdered ? load_peer_acquire(own) : load_peer(own);
      if (have == v) return true;
      if (patience.ended(job, shared, v, kWord, have, v)) return false;
    }
  };
  for (u32 i = 1; i <= job.rounds; ++i) {
    if (player == 0) hand_over(1, i);
    if (!await(i)) break;
    if (player == 1) hand_over(0, i);
    if (i == job.warm) job.stamps[3 * blockIdx.x] = nanoseconds();
  }
  job.stamps[3 * blockIdx.x + 1] = nanoseconds();
  add_relaxed(job.counter);
}

template <bool kOrdered>
__device__ __forceinline__ void ping_pong(const Job& job) {
  Shared& shared = prepared();
  if (threadIdx.x == kComputing && job.units) stream(job, shared);
  if (threadIdx.x) return;
  if (blockIdx.x < job.players) {
    play<kOrdered>(job, shared, job.first_player + blockIdx.x);
  } else {
    Patience patience;
    for (u32 have; (have = load_peer(job.counter)) < job.players; stand_back())
      if (patience.ended(job, shared, job.rounds, kEnd, have, job.players)) break;
  }
  store_shared(&shared.ended, 1);
}

#define HANDOFF_KERNEL(name, body)                                                             \
  extern "C" __global__ void __launch_bounds__(384, 1) name(const __grid_constant__ Job job) { \
    body(job);                                                                                 \
  }
HANDOFF_KERNEL(tagged_sums, sums<Way::kTagged>)
HANDOFF_KERNEL(polled_sums, sums<Way::kPolled>)
HANDOFF_KERNEL(combined_sums, sums<Way::kCombined>)
HANDOFF_KERNEL(counted_sums, sums<Way::kCounted>)
HANDOFF_KERNEL(relaxed_ping, ping_pong<false>)
HANDOFF_KERNEL(ordered_ping, ping_pong<true>)
