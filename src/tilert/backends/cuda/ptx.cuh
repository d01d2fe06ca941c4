// Every instruction that C++ has no word for, behind a name. Nothing here knows of programs or ops.
// tests/emulator.h has the same names for threads of a CPU, so that the kernel can be tested
// anywhere.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// The dynamic shared memory of the block.
__device__ __forceinline__ u8* shared_memory() {
  extern __shared__ __align__(1024) u8 memory[];
  return memory;
}

// The same value, of which the compiler knows nothing.
__device__ __forceinline__ u32 opaque(u32 v) {
  asm volatile("" : "+r"(v));
  return v;
}

__device__ __forceinline__ const u8* opaque_pointer(const u8* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// mbarriers: a phase completes when `count` arrivals and all announced bytes are in.

__device__ __forceinline__ void barrier_init(u64* b, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count));
}

__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

// True when the phase of that parity has completed; the hardware may wait a little before it says
// no.
__device__ __forceinline__ bool barrier_test(u64* b, u32 parity) {
  u32 done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
  return done != 0;
}

// Copies `bytes` (a multiple of 16, both ends aligned to 16) and announces them at the barrier.
// They leave L2 first, for each is read once in a step: code and activations stay there.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, u32 bytes, u64* b) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(b)), "l"(policy)
      : "memory");
}

// A thread's own copies of 16 bytes to shared memory, past the L1 cache: under way until it awaits
// them all.
__device__ __forceinline__ void copy_piece(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void await_pieces() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Orders ordinary accesses before or after what the copy engine does to the same memory.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same of shared memory alone, which waits for nothing that is on its way to other memory.
__device__ __forceinline__ void fence_proxy_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Threads of this block only; id 0 is __syncthreads.
template <int kId, int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// Two warps of this block, which give the same id.
__device__ __forceinline__ void sync_pair(u32 id) {
  asm volatile("bar.sync %0, 64;" ::"r"(id) : "memory");
}

// Moves registers between the groups of four warps of a block; all warps of a group call it.
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Memory that other blocks write: past the L1 cache.

__device__ __forceinline__ u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void add_release(u32* p) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}

__device__ __forceinline__ void add_relaxed(u32* p) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}

__device__ __forceinline__ u32 load_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ u32 load_system(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_system(u32* p, u32 v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ u32 swap_if(u32* p, u32 expected, u32 v) {
  u32 old;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(old)
               : "l"(p), "r"(expected), "r"(v)
               : "memory");
  return old;
}

// The compiler may not put off what makes this value.
__device__ __forceinline__ void compute_here(float& v) { asm volatile("" : "+f"(v)); }
__device__ __forceinline__ float4 load_float4(const float* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ float2 load_float2(const float* p) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
  return v;
}

// Where it is wanted; no branch, so that many loads are under way at once.
__device__ __forceinline__ void load_float4_if(bool wanted, const float* p, float4& v) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.u32 p, %5, 0;\n"
      " @p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
      : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
      : "l"(p), "r"(u32(wanted))
      : "memory");
}

// The same for two words, `otherwise` where they are not wanted.
__device__ __forceinline__ float2 load_float2_if(bool wanted, const float* p, float2 otherwise) {
  float2 v = otherwise;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.u32 p, %3, 0;\n @p ld.global.cg.v2.f32 {%0, %1}, [%2];\n}"
      : "+f"(v.x), "+f"(v.y)
      : "l"(p), "r"(u32(wanted))
      : "memory");
  return v;
}

__device__ __forceinline__ float load_float(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_float(float* p, float v) {
  asm volatile("st.global.cg.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
}

__device__ __forceinline__ void store_half(u16* p, u16 v) {
  asm volatile("st.global.cg.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}

__device__ __forceinline__ void store_float2(float* p, float2 v) {
  asm volatile("st.global.cg.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(v.x), "f"(v.y) : "memory");
}

// Words in shared memory that one thread writes and others poll.

__device__ __forceinline__ u32 load_shared(const u32* p) {
  u32 v;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(u32* p, u32 v) {
  asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(shared_address(p)), "r"(v) : "memory");
}

// Before words that were late are read again; nothing here (tests/emulator.h lets others go on).
__device__ __forceinline__ void read_again() {}

// Leaves the multiprocessor to others for a while.
__device__ __forceinline__ void stand_back() { asm volatile("nanosleep.u32 200;"); }

// Matrix units: 8 x 8 blocks of bf16 from shared memory, and a 16 x 8 x 16 product with f32 sums.

__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&m)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Numbers.

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y * (1.5f - 0.5f * x * y * y);  // one Newton step: the approximation has 22 bits
}

__device__ __forceinline__ float float_of_half(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

// Four e4m3 as four f16, which hold them exactly.
__device__ __forceinline__ void halves_of_e4m3(u32 v, u32& low, u32& high) {
  asm("{\n .reg .b16 a, b;\n mov.b32 {a, b}, %2;\n cvt.rn.f16x2.e4m3x2 %0, a;\n"
      " cvt.rn.f16x2.e4m3x2 %1, b;\n}"
      : "=r"(low), "=r"(high)
      : "r"(v));
}

__device__ __forceinline__ void floats_of_e4m3(u32 v, float (&f)[4]) {
  u32 low, high;
  halves_of_e4m3(v, low, high);
  f[0] = float_of_half(u16(low)), f[1] = float_of_half(u16(low >> 16));
  f[2] = float_of_half(u16(high)), f[3] = float_of_half(u16(high >> 16));
}

// Two floats rounded to e4m3, the first in the low byte; what is too large becomes the largest.
__device__ __forceinline__ u32 e4m3_of(float low, float high) {
  u16 v;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(high), "f"(low));
  return v;
}

// Two floats rounded to f16, the first in the low half; what is too large becomes the largest.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
  u32 v;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// Two floats rounded to bf16, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// A clock that all multiprocessors share; on an H100 it steps by 32 ns. Cycles do not run alike.
__device__ __forceinline__ u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
// The same, for what is recorded: where waits count polls instead (tests/emulator.h), it is
// another.
__device__ __forceinline__ u64 timestamp() { return nanoseconds(); }
