// The kernel of the CUDA back end on a CPU: every thread of every block is a fiber, all in one
// thread of the host. Takes the place of backends/cuda/ptx.cuh, with the same names.
//
// Exact: what a warp does together (shuffles, votes, matrix products), barriers of threads,
// mbarriers with their counts of bytes, copies that land later and in any order. Not modelled:
// ordinary memory is seen by all at once, so a missing fence is not found here.
#pragma once
// Only headers that are small: half of the time of a test may be that of its compiler.
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
using std::max;
using std::min;
struct Index {
  u32 x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr u32 kStackBytes = 96 << 10;

struct Warp {  // what its lanes exchange; two sets, because the fastest lane may be one exchange
               // ahead
  u64 arrived[2] = {0, 0};
  alignas(16) u8 values[2][32][64];
};
struct BlockState {
  std::vector<u8> memory;
  u8* base;
  std::vector<Warp> warps;
  u64 arrived[16] = {}, uses[16] = {};  // of each barrier of threads
};
struct Fiber {
  void* stack_pointer = nullptr;
  u8* stack = nullptr;
  u32 block = 0, thread = 0;
  u64 exchanges = 0;
  const u64* awaited = nullptr;  // what it waits for, if anything, to become `until`
  u64 until = 0;
  bool ended = false;
};
struct Copy {
  u32 block;
  void* to;
  const void* from;
  u32 bytes;
  u64* barrier;
};

extern std::vector<BlockState> blocks;
extern std::deque<Copy> copies;
extern Fiber* current;
extern u64 rounds;    // turns of all fibers
extern u64 progress;  // counts what may let somebody go on
void yield();         // to another fiber
BlockState& block();

// Until a count has been reached. Nobody goes on to a fiber before that.
inline void await(const u64& count, u64 until) {
  current->awaited = &count, current->until = until;
  while (count < until) yield();
  current->awaited = nullptr;
}

inline Warp& warp() { return block().warps[threadIdx.x / 32]; }

// What all lanes of the warp bring, once all have brought it. Valid until the lane's next exchange.
template <class T>
const T* exchange(const T& mine) {
  static_assert(sizeof(T) <= 64);
  Warp& w = warp();
  u64 use = current->exchanges++;
  u32 set = use % 2;
  std::memcpy(w.values[set][threadIdx.x % 32], &mine, sizeof(T));
  ++w.arrived[set];
  ++progress;
  await(w.arrived[set], 32 * (use / 2 + 1));
  static T all[32];
  for (u32 i = 0; i < 32; ++i) std::memcpy(&all[i], w.values[set][i], sizeof(T));
  return all;
}

inline void barrier(u32 id, u32 threads) {
  BlockState& b = block();
  const u64 use = b.uses[id];  // not all are by the same warps, or as many
  if (++b.arrived[id] == threads) b.arrived[id] = 0, ++b.uses[id];
  ++progress;
  await(b.uses[id], use + 1);
}

// An mbarrier in its 8 bytes.
struct Phase {
  u16 expected, pending;
  u32 state;  // bytes under way << 1 | parity of the current phase; bytes may be negative for a
              // while
  void settle() {
    if (pending == 0 && static_cast<int>(state) >> 1 == 0) {
      pending = expected, state ^= 1;
      ++progress;
    }
  }
};
static_assert(sizeof(Phase) == 8);
inline Phase& phase(u64* b) { return *reinterpret_cast<Phase*>(b); }

}  // namespace emulator

inline float __uint_as_float(u32 v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline u32 __float_as_uint(float f) {
  u32 v;
  std::memcpy(&v, &f, 4);
  return v;
}
inline u64 __umul64hi(u64 a, u64 b) {
  return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __clzll(long long v) { return v ? __builtin_clzll(v) : 64; }
// Rounded once each; a compiler for x86-64 without options has no fused operation to offer.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
template <class T>
T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  ++emulator::progress;
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __syncwarp() { emulator::exchange(0); }
inline void __syncthreads() { emulator::barrier(0, blockDim.x); }
template <class T>
T __shfl_xor_sync(u32, T v, int mask) {
  return emulator::exchange(v)[(threadIdx.x % 32) ^ mask];
}
template <class T>
T __shfl_up_sync(u32, T v, int distance) {
  int from = int(threadIdx.x % 32) - distance;
  const T* all = emulator::exchange(v);
  return from < 0 ? v : all[from];
}
template <class T>
T __shfl_sync(u32, T v, int from) {
  return emulator::exchange(v)[from];
}
inline bool __all_sync(u32, bool v) {
  const bool* all = emulator::exchange(v);
  bool every = true;
  for (u32 i = 0; i < 32; ++i) every = every && all[i];
  return every;
}
inline bool __any_sync(u32, bool v) {
  const bool* all = emulator::exchange(v);
  bool some = false;
  for (u32 i = 0; i < 32; ++i) some = some || all[i];
  return some;
}

inline u32 __ballot_sync(u32, bool v) {
  const bool* all = emulator::exchange(v);
  u32 bits = 0;
  for (u32 i = 0; i < 32; ++i) bits |= u32(all[i]) << i;
  return bits;
}
inline u32 __reduce_max_sync(u32, u32 v) {
  const u32* all = emulator::exchange(v);
  for (u32 i = 0; i < 32; ++i) v = max(v, all[i]);
  return v;
}
inline u32 __reduce_min_sync(u32, u32 v) {
  const u32* all = emulator::exchange(v);
  for (u32 i = 0; i < 32; ++i) v = min(v, all[i]);
  return v;
}
inline u32 __reduce_add_sync(u32, u32 v) {
  const u32* all = emulator::exchange(v);
  u32 sum = 0;
  for (u32 i = 0; i < 32; ++i) sum += all[i];
  return sum;
}

inline u8* shared_memory() { return emulator::block().base; }
inline u32 shared_address(const void* p) {
  return static_cast<u32>(static_cast<const u8*>(p) - emulator::block().base);
}
inline u32 opaque(u32 v) { return v; }
inline const u8* opaque_pointer(const u8* p) { return p; }
inline void barrier_init(u64* b, u32 count) {
  emulator::phase(b) = {static_cast<u16>(count), static_cast<u16>(count), 0};
}
inline void barrier_init_done() {}
inline void barrier_expect(u64* b, u32 bytes) {
  emulator::Phase& p = emulator::phase(b);
  assert(p.pending > 0);
  --p.pending, p.state += bytes << 1;
  p.settle();
}
inline void barrier_arrive(u64* b) { barrier_expect(b, 0); }
inline bool barrier_test(u64* b, u32 parity) {
  if ((emulator::phase(b).state & 1) != parity) return true;
  emulator::yield();
  return false;
}
inline void copy_bulk(void* to, const void* from, u32 bytes, u64* b) {
  assert(bytes % 16 == 0 && reinterpret_cast<u64>(from) % 16 == 0 && shared_address(to) % 16 == 0);
  emulator::copies.push_back({blockIdx.x, to, from, bytes, b});
}
inline void copy_piece(void* to, const void* from) { std::memcpy(to, from, 16); }
inline void await_pieces() {}
inline void fence_proxy() {}
inline void fence_proxy_shared() {}
template <int kId, int kThreads>
void sync_threads() {
  emulator::barrier(kId, kThreads);
}
inline void sync_pair(u32 id) { emulator::barrier(id, 64); }
template <int>
void keep_registers() {}
template <int>
void claim_registers() {}

inline u32 load_acquire(const u32* p) {
  emulator::yield();
  return *p;
}
inline void add_release(u32* p) { ++*p, ++emulator::progress; }
inline void add_relaxed(u32* p) { ++*p, ++emulator::progress; }
inline u32 load_relaxed(const u32* p) { return *p; }
inline u32 load_system(const u32* p) { return *static_cast<const volatile u32*>(p); }
inline void store_system(u32* p, u32 v) { *static_cast<volatile u32*>(p) = v; }
inline u32 swap_if(u32* p, u32 expected, u32 v) {
  u32 old = *p;
  if (old == expected) *p = v;
  return old;
}
inline void compute_here(float&) {}
inline float4 load_float4(const float* p) {
  assert(reinterpret_cast<u64>(p) % 16 == 0);
  return {p[0], p[1], p[2], p[3]};
}
inline float2 load_float2(const float* p) {
  assert(reinterpret_cast<u64>(p) % 8 == 0);
  return {p[0], p[1]};
}
inline void load_float4_if(bool wanted, const float* p, float4& v) {
  if (wanted) v = load_float4(p);
}
inline float2 load_float2_if(bool wanted, const float* p, float2 otherwise) {
  return wanted ? load_float2(p) : otherwise;
}
inline float load_float(const float* p) { return *p; }
inline void store_float(float* p, float v) { *p = v, ++emulator::progress; }
inline void store_half(u16* p, u16 v) { *p = v, ++emulator::progress; }
inline void store_float2(float* p, float2 v) { p[0] = v.x, p[1] = v.y, ++emulator::progress; }
inline u32 load_shared(const u32* p) {
  emulator::yield();
  return *p;
}
inline void store_shared(u32* p, u32 v) { *p = v, ++emulator::progress; }

inline void read_again() { emulator::yield(); }
inline void stand_back() {}  // whoever polls has given way already

// Bits of bf16 and f16, rounded to nearest even.
inline float bf16_value(u32 bits) { return __uint_as_float(bits << 16); }
inline u32 bf16_bits(float f) {
  u32 v;
  std::memcpy(&v, &f, 4);
  if (f != f) return 0x7fff;
  return (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float float_of_half(
    u32 h) {  // by hand: the compiler calls a function that takes ten times as long
  const float size = __uint_as_float((h & 0x7fff) << 13) * 0x1p112f;
  const u32 special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
  return __uint_as_float(__float_as_uint(size) | special | (h & 0x8000) << 16);
}
inline u16 half_of_float(float f) {
  const _Float16 h = f;
  u16 bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline u32 pack_f16(float low, float high) {
  auto bits = [](float f) { return u32(half_of_float(max(-65504.0f, min(f, 65504.0f)))); };
  return bits(low) | bits(high) << 16;
}
inline float infinity() { return __uint_as_float(0x7f800000u); }
// e4m3 has no infinity: all ones is a NaN, and 448 the largest value.
inline void floats_of_e4m3(u32 v, float (&f)[4]) {
  for (int i = 0; i < 4; ++i, v >>= 8) {
    u32 exponent = v >> 3 & 15, mantissa = v & 7;
    float size = exponent ? std::ldexp(8.0f + mantissa, int(exponent) - 10)
                          : std::ldexp(float(mantissa), -9);
    if ((v & 127) == 127) size = __uint_as_float(0x7fc00000u);
    f[i] = v & 128 ? -size : size;
  }
}
inline void halves_of_e4m3(u32 v, u32& low, u32& high) {
  float f[4];
  floats_of_e4m3(v, f);
  low = pack_f16(f[0], f[1]), high = pack_f16(f[2], f[3]);
}
inline u32 e4m3_of(float low, float high) {
  auto bits = [](float f) {
    const float size = std::min(std::fabs(f), 448.0f);
    int exponent;
    std::frexp(size, &exponent);            // size is below 2^exponent
    exponent = std::max(exponent - 1, -6);  // of the leading bit, or of the smallest normal number
    const u32 mantissa = u32(std::nearbyint(std::ldexp(size, 3 - exponent)));  // carries go on
    return (u32(exponent + 6) << 3) + mantissa | (std::signbit(f) ? 128u : 0u);
  };
  return bits(low) | bits(high) << 8;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float inverse_root(float x) { return 1 / std::sqrt(x); }
inline u64 timestamp() {
  static u64 count = 0;
  return count += 3;
}
inline u64 nanoseconds() {
  return emulator::rounds * 500'000;  // the patience of a wait, in turns of all fibers
}

// Lane l names the row l % 8 of block l / 8 and gets the elements 2 (l % 4) and the next of row l
// / 4.
inline void load_blocks(u32 (&m)[4], u32 address, bool transposed) {
  const u32* rows = emulator::exchange(address);
  u32 lane = threadIdx.x % 32;
  const u8* base = shared_memory();
  for (u32 i = 0; i < 4; ++i) {
    u16 low, high;
    auto element = [&](u32 row, u32 column, u16& to) {
      assert(rows[i * 8 + row] % 16 == 0);
      std::memcpy(&to, base + rows[i * 8 + row] + 2 * column, 2);
    };
    u32 r = lane / 4, c = lane % 4 * 2;
    if (transposed) {
      element(c, r, low), element(c + 1, r, high);
    } else {
      element(r, c, low), element(r, c + 1, high);
    }
    m[i] = low | u32(high) << 16;
  }
}
inline void load_matrices(u32 (&m)[4], u32 address) { load_blocks(m, address, false); }
inline void load_matrices_transposed(u32 (&m)[4], u32 address) { load_blocks(m, address, true); }

// Fragments as the PTX manual draws them for m16n8k16.
template <class Value>
void multiply_as(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Value value) {
  struct Fragments {
    u32 a[4], b[2];
  };
  const Fragments* all = emulator::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  auto half = [&](u32 v, u32 i) { return value(i ? v >> 16 : v & 0xffff); };
  auto at_a = [&](u32 row, u32 k) {
    return half(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
  };
  auto at_b = [&](u32 k, u32 n) { return half(all[n * 4 + k % 8 / 2].b[k / 8], k % 2); };
  u32 lane = threadIdx.x % 32;
  for (u32 i = 0; i < 4; ++i) {
    u32 row = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (u32 k = 0; k < 16; ++k) c[i] += at_a(row, k) * at_b(k, n);
  }
}
inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_as(c, a, b0, b1, [](u32 bits) { return bf16_value(bits); });
}
inline void multiply_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_as(c, a, b0, b1, [](u32 bits) { return float_of_half(bits); });
}
