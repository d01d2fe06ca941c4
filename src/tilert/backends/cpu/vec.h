// Vectors of f32 in the width of the instruction set, and the ways to load weights into them.
//
// Compiler vector extensions carry the arithmetic; only f16 needs intrinsics. Everything here is in
// a namespace of its instruction set, so that no inline function of one build is linked into
// another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "ops.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace tilert::TILERT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using UInts = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct F8 {  // e4m3fn: no infinity, one NaN of each sign
  uint8_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }

template <typename V, typename T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const float* p) { return load_as<Vec>(p); }

inline Vec load(const Bf16* p) {
  auto wide = __builtin_convertvector(load_as<Halves>(p), Ints);
  return reinterpret_cast<Vec>(wide << 16);
}

inline float widen(float x) { return x; }

inline float widen(Bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Exact for every finite value and infinity; subnormals by scaling with 2^112.
inline float widen(F16 x) {
  uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  uint32_t bits = rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : rest << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  if (rest < 0x7c00u) value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline Vec widen(Halves f16) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(f16)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(f16)));
#else
  Vec v{};
  for (int i = 0; i < kLanes; i++) v[i] = widen(F16{f16[i]});
  return v;
#endif
}

inline Vec load(const F16* p) { return widen(load_as<Halves>(p)); }

// The bits of e4m3 shifted into f16 are 2^-8 of its value, subnormals included.
inline float widen(F8 x) {
  uint32_t magnitude = x.bits & 0x7fu;
  uint32_t bits = (x.bits & 0x80u) << 8 | magnitude << 7 | (magnitude == 0x7f ? 0x7c00u : 0);
  return widen(F16{static_cast<uint16_t>(bits)}) * 256.0f;
}

inline Vec load(const F8* p) {
  auto wide = __builtin_convertvector(load_as<Bytes>(p), Halves);
  Halves magnitude = wide & 0x7f;
  Halves nan = reinterpret_cast<Halves>(magnitude == 0x7f) & 0x7c00;
  return widen((wide & 0x80) << 8 | magnitude << 7 | nan) * 256.0f;
}

// The first n < kLanes elements, zeros behind them.
template <typename T>
inline Vec load_tail(const T* p, int n) {
  Vec v{};
  for (int i = 0; i < n; i++) v[i] = widen(p[i]);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store_tail(float* p, Vec v, int n) {
  for (int i = 0; i < n; i++) p[i] = v[i];
}

// Sum of all lanes, halves first: the order does not depend on anything but the width.
template <int kHalf = kLanes / 2>
inline float sum(Vec v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    v += [&]<size_t... kI>(std::index_sequence<kI...>) {
      return __builtin_shufflevector(v, v, (kI ^ kHalf)...);
    }(std::make_index_sequence<kLanes>());
    return sum<kHalf / 2>(v);
  }
}

inline Vec select(Ints mask, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((mask & reinterpret_cast<Ints>(yes)) |
                               (~mask & reinterpret_cast<Ints>(no)));
}

inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }

// e^x to about 2 units in the last place (degree 6 on [-ln2/2, ln2/2]); 0 below -87.3, where the
// result would be subnormal, and finite above: callers subtract a maximum or divide by 1 + e^x.
inline Vec exp(Vec x) {
  Vec clamped = select(x < 88.0f, x, splat(88.0f));
  clamped = select(clamped > -88.0f, clamped, splat(-88.0f));
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  Vec shifted = clamped * 1.44269504f + 12582912.0f;
  Ints exponent = reinterpret_cast<Ints>(shifted) << 23;
  Vec n = shifted - 12582912.0f;
  Vec r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Vec result = reinterpret_cast<Vec>(reinterpret_cast<Ints>(p) + exponent);
  return select(x < -87.3f, Vec{}, result);
}

// Calls f with a typed pointer to the weight's data.
template <typename F>
inline auto with_type(const void* data, DType dtype, F f) {
  switch (dtype) {
    case DType::kBF16:
      return f(static_cast<const Bf16*>(data));
    case DType::kF16:
      return f(static_cast<const F16*>(data));
    case DType::kF8E4M3:
      return f(static_cast<const F8*>(data));
    default:
      return f(static_cast<const float*>(data));
  }
}

}  // namespace tilert::TILERT_ISA
