// Packs every operand, of any element type and any strides, into the order in which the micro-kernel reads it.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace fastcss::cpu {

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
    if constexpr (std::is_same_v<T, BFloat16>) return load(reinterpret_cast<const float*>(p));
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
    if constexpr (std::is_same_v<T, BFloat16>) return reinterpret_cast<Bits>(v);
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
