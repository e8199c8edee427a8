// Vectors, element types, and the packing that brings every operand into the order in which the micro-kernel reads it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#define FASTCSS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define FASTCSS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTCSS_CLONES
#endif

namespace fastcss::cpu {

constexpr int kLanes = 16;         // floats in a Vec
constexpr int kCols = 2 * kLanes;  // columns of a tile

typedef float Vec __attribute__((vector_size(4 * kLanes)));
// What a register of AVX2 and of SSE holds. GCC keeps no wider vector in registers from one turn of a loop to the next.
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));
template <class V>
constexpr int kLanesIn = sizeof(V) / sizeof(float);

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
typedef uint16_t Half16Bits __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef _Float16 Half16 __attribute__((vector_size(2 * kLanes)));

FASTCSS_INLINE Vec load(const BFloat16* p) {
  Half16Bits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<Vec>(__builtin_convertvector(bits, Bits) << 16);
}
FASTCSS_INLINE Vec load(const _Float16* p) {
  Half16 half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, Vec);
}
FASTCSS_INLINE void store(BFloat16* p, Vec v) {  // to nearest, ties to even; NaN stays NaN
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits nan = (bits >> 16) | 0x40;
  const auto narrow = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Half16Bits);
  std::memcpy(p, &narrow, sizeof(narrow));
}
FASTCSS_INLINE void store(_Float16* p, Vec v) {
  const Half16 half = __builtin_convertvector(v, Half16);
  std::memcpy(p, &half, sizeof(half));
}

// The first `n` lanes only; the others of a loaded vector are zero.
template <class T>
FASTCSS_INLINE Vec load(const T* p, int64_t n) {
  T whole[kLanes] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T>
FASTCSS_INLINE void store(T* p, Vec v, int64_t n) {
  T whole[kLanes];
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

// How words are read: one float32 term each …
template <class T>
struct Single {
  using Element = T;
  static constexpr int terms = 1;
  static FASTCSS_INLINE Vec along(const T* p) { return load(p); }
  static FASTCSS_INLINE Vec across(const T* p, int lanes, int64_t, int) {
    return lanes == kLanes ? load(p) : load(p, lanes);
  }
};
// … or two bfloat16 terms each.
template <class T>
struct Pair {
  using Element = T;
  static constexpr int terms = 2;
  static FASTCSS_INLINE Vec along(const T* p) {
    BFloat16 narrow[2 * kLanes];
    store(narrow, load(p)), store(narrow + kLanes, load(p + kLanes));
    return load(reinterpret_cast<const float*>(narrow));
  }
  static FASTCSS_INLINE Vec across(const T* p, int lanes, int64_t k_stride, int n) {
    const Bits first = round(Single<T>::across(p, lanes, 0, 1));
    const Bits second = n > 1 ? round(Single<T>::across(p + k_stride, lanes, 0, 1)) : Bits{};
    return reinterpret_cast<Vec>((first >> 16) | second);
  }
  static FASTCSS_INLINE Bits round(Vec v) {  // bfloat16 in the high half of each lane
    BFloat16 narrow[kLanes];
    store(narrow, v);
    return reinterpret_cast<Bits>(load(narrow));
  }
};

// One of the four rounds of a 16×16 transpose: exchanges the off-diagonal blocks of STEP × STEP.
template <int STEP>
FASTCSS_INLINE void exchange(Vec (&rows)[kLanes]) {
  const Bits lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Bits low = (lane & STEP) != 0 ? lane + kLanes - STEP : lane;
  const Bits high = (lane & STEP) != 0 ? lane + kLanes : lane + STEP;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & STEP) continue;
    const Vec x = rows[i], y = rows[i + STEP];
    rows[i] = __builtin_shuffle(x, y, low);
    rows[i + STEP] = __builtin_shuffle(x, y, high);
  }
}

// A block that ends early, copied to where it can be read whole. Out of line: it is rare, and long when inlined.
template <class T>
__attribute__((noinline)) void stage(T* block, int width, const T* src, int64_t lane_stride, int lanes, int64_t terms) {
  for (int i = 0; i < lanes; ++i)
    for (int64_t j = 0; j < width; ++j) block[i * width + j] = j < terms ? src[i * lane_stride + j] : T{};
}

// 16 words of up to 16 lanes, contiguous in k, as one vector a word.
template <class Word>
FASTCSS_INLINE void read_transposed(Vec (&words)[kLanes], const typename Word::Element* src, int64_t lane_stride,
                                    int lanes, int64_t terms) {
  constexpr int kBlock = kLanes * Word::terms;
  typename Word::Element block[kLanes * kBlock];
  if (terms < kBlock) {
    stage(block, kBlock, src, lane_stride, lanes, terms);
    src = block, lane_stride = kBlock;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) words[i] = i < lanes ? Word::along(src + i * lane_stride) : Vec{};
  exchange<8>(words), exchange<4>(words), exchange<2>(words), exchange<1>(words);
}

// A panel of `lanes` ≤ width lanes and k terms. The buffer needs room for kLanes floats past its end.
void pack(float* dst, int width, int lanes, int64_t k, Matrix m, bool pairs = false);

// sum += term
void add(float* sum, const float* term, int64_t n);

// ---- unpacking -----------------------------------------------------------------------------------------------------

// Writes the first `cols` columns of a float32 tile [rows][kCols] as elements of `dtype`.
void write(void* dst, DType dtype, int64_t ld, int rows, int cols, const float* tile);

// Writes a float32 tile [cols][kCols], whose rows are on the lanes, as `rows` ≤ kCols rows of `cols` elements.
void write_transposed(void* dst, DType dtype, int64_t ld, int rows, int64_t cols, const float* tile);

}  // namespace fastcss::cpu
