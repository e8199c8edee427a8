// Defines vectors of floats for each instruction set, and the element types that they are read from and written to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "instruction_set.h"

namespace fastcss::cpu {

constexpr int kLanes = 16;         // floats in a Vec
constexpr int kCols = 2 * kLanes;  // columns of a tile

// ---- vectors: a register of AVX-512, of AVX2, and of SSE or NEON ---------------------------------------------------
//
// GCC keeps a vector wider than those of the CPU in memory, so loops are written for any width V and run through
// `on_widest`; loops over plain floats are FASTCSS_CLONES, which the compiler makes vectors of.

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));

// GCC 12 has no _Float16 for ARM in C++. __fp16 is the same 16 bits there, and vectors of it are converted alike.
#if defined(__aarch64__)
typedef __fp16 Float16;
#else
typedef _Float16 Float16;
#endif

template <class V>
constexpr int kLanesIn = sizeof(V) / sizeof(float);

// Vectors of other types with as many lanes.
template <class V>
struct Lanes {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(V))));
  typedef int32_t Ints __attribute__((vector_size(sizeof(V))));
  typedef uint16_t HalfBits __attribute__((vector_size(sizeof(V) / 2)));
  typedef Float16 Half __attribute__((vector_size(sizeof(V) / 2)));
};
template <class V>
using BitsOf = typename Lanes<V>::Bits;
template <class V>
using IntsOf = typename Lanes<V>::Ints;
using Bits = BitsOf<Vec>;
using Half16Bits = Lanes<Vec>::HalfBits;

// 0, 1, 2, …
template <class V>
FASTCSS_INLINE BitsOf<V> lane_numbers() {
  if constexpr (kLanesIn<V> == 16)
    return BitsOf<V>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  else if constexpr (kLanesIn<V> == 8)
    return BitsOf<V>{0, 1, 2, 3, 4, 5, 6, 7};
  else
    return BitsOf<V>{0, 1, 2, 3};
}

#if defined(__x86_64__)
template <class F>
FASTCSS_TARGET("arch=x86-64-v4")
void on_v4(const F& loop) {
  loop.template operator()<Vec>();
}
template <class F>
FASTCSS_TARGET("arch=x86-64-v3")
void on_v3(const F& loop) {
  loop.template operator()<Vec8>();
}
#endif

// Runs a loop `[=]<class V>() FASTCSS_LOOP { … }` for the registers of this CPU, compiled for its instruction set.
#define FASTCSS_LOOP __attribute__((always_inline))
template <class F>
void on_widest(const F& loop) {
#if defined(__x86_64__)
  if (kLevel == 4) return on_v4(loop);
  if (kLevel == 3) return on_v3(loop);
#endif
  loop.template operator()<Vec4>();
}

template <class V = Vec>
FASTCSS_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
FASTCSS_INLINE void store(float* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// ---- element types -------------------------------------------------------------------------------------------------

enum class DType { f32, bf16, f16 };
inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};

template <class V = Vec>
FASTCSS_INLINE V load(const BFloat16* p) {
  typename Lanes<V>::HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<V>(__builtin_convertvector(bits, BitsOf<V>) << 16);
}
template <class V = Vec>
FASTCSS_INLINE V load(const Float16* p) {
  typename Lanes<V>::Half half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, V);
}
template <class V>
FASTCSS_INLINE void store(BFloat16* p, V v) {  // to nearest, ties to even; NaN stays NaN
  const BitsOf<V> bits = reinterpret_cast<BitsOf<V>>(v);
  const BitsOf<V> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const BitsOf<V> nan = (bits >> 16) | 0x40;
  using Narrow = typename Lanes<V>::HalfBits;
  const Narrow narrow = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Narrow);
  std::memcpy(p, &narrow, sizeof(narrow));
}
template <class V>
FASTCSS_INLINE void store(Float16* p, V v) {
  using Half = typename Lanes<V>::Half;
  const Half half = __builtin_convertvector(v, Half);
  std::memcpy(p, &half, sizeof(half));
}

// Loads the first `n` lanes only; the others are zero.
template <class V = Vec, class T>
FASTCSS_INLINE V load(const T* p, int64_t n) {
  T whole[kLanesIn<V>] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load<V>(whole);
}
template <class T, class V>
FASTCSS_INLINE void store(T* p, V v, int64_t n) {
  T whole[kLanesIn<V>];
  store(whole, v);
  std::memcpy(p, whole, n * sizeof(T));
}

}  // namespace fastcss::cpu
