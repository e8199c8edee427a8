// Vectors, element types, and the packing that brings every operand into the order in which the micro-kernel reads it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__clang__) || !defined(__GNUC__) || __GNUC__ < 12
#error "fastcss: GCC 12 or newer is what compiles the CPU kernels; set CXX to one"
#endif

#define FASTCSS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define FASTCSS_TARGET(arch) __attribute__((target(arch)))
#define FASTCSS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTCSS_CLONES
#endif

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
// The instruction set x86-64-v… that kernels make use of: the highest that they are compiled for and the CPU has whole,
// as the compiler counts it, or less if `asked`, the value of ATEN_CPU_CAPABILITY, is "avx2" or "default".
int level_of(bool has_v3, bool has_v4, const char* asked);
int find_level();
inline const int kLevel = find_level();

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

// ---- packing: dst[word][width] -------------------------------------------------------------------------------------

// A matrix seen as lanes (rows of the left operand, columns of the right one) by terms of the sum.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t lane_stride, k_stride;  // in elements
  Matrix offset(int64_t elements) const {
    return {static_cast<const char*>(data) + elements * size_of(dtype), dtype, lane_stride, k_stride};
  }
  Matrix at(int64_t lane, int64_t k) const { return offset(lane * lane_stride + k * k_stride); }
};

// Reads words of one float32 term each …
template <class T>
struct Single {
  using Element = T;
  static constexpr int terms = 1;
  template <class V>
  static FASTCSS_INLINE V along(const T* p) {
    return load<V>(p);
  }
  template <class V>
  static FASTCSS_INLINE V across(const T* p, int lanes, int64_t, int) {
    return lanes == kLanesIn<V> ? load<V>(p) : load<V>(p, lanes);
  }
};
// … or of two bfloat16 terms each, if the CPU multiplies those: as a Vec only.
template <class T>
struct Pair {
  using Element = T;
  static constexpr int terms = 2;
  template <class V>
  static FASTCSS_INLINE Vec along(const T* p) {
    BFloat16 narrow[2 * kLanes];
    store(narrow, load(p)), store(narrow + kLanes, load(p + kLanes));
    return load(reinterpret_cast<const float*>(narrow));
  }
  template <class V>
  static FASTCSS_INLINE Vec across(const T* p, int lanes, int64_t k_stride, int n) {
    const Bits first = round(Single<T>::template across<Vec>(p, lanes, 0, 1));
    const Bits second = n > 1 ? round(Single<T>::template across<Vec>(p + k_stride, lanes, 0, 1)) : Bits{};
    return reinterpret_cast<Vec>((first >> 16) | second);
  }
  static FASTCSS_INLINE Bits round(Vec v) {  // bfloat16 in the high half of each lane
    BFloat16 narrow[kLanes];
    store(narrow, v);
    return reinterpret_cast<Bits>(load(narrow));
  }
};

// One round of a transpose: exchanges the off-diagonal blocks of STEP × STEP.
template <int STEP, class V, int N>
FASTCSS_INLINE void exchange(V (&rows)[N]) {
  const BitsOf<V> lane = lane_numbers<V>();
  const BitsOf<V> low = (lane & STEP) != 0 ? lane + N - STEP : lane;
  const BitsOf<V> high = (lane & STEP) != 0 ? lane + N : lane + STEP;
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    if (i & STEP) continue;
    const V x = rows[i], y = rows[i + STEP];
    rows[i] = __builtin_shuffle(x, y, low);
    rows[i + STEP] = __builtin_shuffle(x, y, high);
  }
}
template <class V, int N>
FASTCSS_INLINE void transpose(V (&rows)[N]) {
  static_assert(N == kLanesIn<V>);
  if constexpr (N == 16) exchange<8>(rows);
  if constexpr (N >= 8) exchange<4>(rows);
  exchange<2>(rows), exchange<1>(rows);
}

// Copies a block that ends early to where it can be read whole. It is not inlined because it is rare and long.
template <class T>
__attribute__((noinline)) void stage(T* block, int width, const T* src, int64_t lane_stride, int lanes, int64_t terms) {
  for (int i = 0; i < lanes; ++i)
    for (int64_t j = 0; j < width; ++j) block[i * width + j] = j < terms ? src[i * lane_stride + j] : T{};
}

// Reads N words of up to N lanes, contiguous in k, as one vector per word.
template <class Word, class V, int N>
FASTCSS_INLINE void read_transposed(V (&words)[N], const typename Word::Element* src, int64_t lane_stride, int lanes,
                                    int64_t terms) {
  constexpr int kBlock = N * Word::terms;
  typename Word::Element block[N * kBlock];
  if (terms < kBlock) {
    stage(block, kBlock, src, lane_stride, lanes, terms);
    src = block, lane_stride = kBlock;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) words[i] = i < lanes ? Word::template along<V>(src + i * lane_stride) : V{};
  transpose(words);
}

// Packs a panel of `lanes` ≤ width lanes and k terms. The buffer needs room for kLanes floats past its end.
void pack(float* dst, int width, int lanes, int64_t k, Matrix m, bool pairs = false);

// sum += term
void add(float* sum, const float* term, int64_t n);

// ---- unpacking -----------------------------------------------------------------------------------------------------

// Writes the first `cols` columns of a float32 tile [rows][kCols] as elements of `dtype`.
void write(void* dst, DType dtype, int64_t ld, int rows, int cols, const float* tile);

// Writes a float32 tile [cols][kCols], whose rows are on the lanes, as `rows` ≤ kCols rows of `cols` elements.
void write_transposed(void* dst, DType dtype, int64_t ld, int rows, int64_t cols, const float* tile);

}  // namespace fastcss::cpu
