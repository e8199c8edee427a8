#include "pack.h"

namespace fastcss::cpu {

namespace {

// Every store is a whole vector. What it writes past `lanes` is overwritten by the next word, or by the next lanes; the
// buffer has room for the last one.
template <class Word, class V>
FASTCSS_INLINE void pack_lanes(float* dst, int width, int lanes, int64_t k, Matrix m) {
  using T = typename Word::Element;
  constexpr int kWide = kLanesIn<V>, kBlock = kWide * Word::terms;
  const T* src = static_cast<const T*>(m.data);
  if (m.k_stride == 1 && m.lane_stride != 1) {
    for (; k > 0; k -= kBlock, src += kBlock, dst += kWide * width) {
      V words[kWide];
      read_transposed<Word>(words, src, m.lane_stride, lanes, k);
#pragma GCC unroll 16
      for (int j = 0; j < kWide; ++j)
        if (j * Word::terms < k) store(dst + j * width, words[j]);
    }
    return;
  }
  for (; k > 0; k -= Word::terms, src += Word::terms * m.k_stride, dst += width) {
    const int n = static_cast<int>(std::min<int64_t>(Word::terms, k));
    if (m.lane_stride == 1) {
      store(dst, Word::template across<V>(src, lanes, m.k_stride, n));
    } else {
      T gathered[kBlock] = {};
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < lanes; ++i) gathered[j * kWide + i] = src[j * m.k_stride + i * m.lane_stride];
      store(dst, Word::template across<V>(gathered, kWide, kWide, n));
    }
  }
}

template <class T>
void pack_words(float* dst, int width, int lanes, int64_t k, Matrix m) {
  const int end = std::min(width, (lanes + kLanes - 1) / kLanes * kLanes);  // zeros up to there, for any V
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int first = 0; first < end; first += kLanesIn<V>)
      pack_lanes<Single<T>, V>(dst + first, width, std::clamp(lanes - first, 0, kLanesIn<V>), k, m.at(first, 0));
  });
}

#define FASTCSS_PACK_PAIRS(name, T)                                                                     \
  FASTCSS_CLONES void name(float* dst, int width, int lanes, int64_t k, Matrix m) {                     \
    for (int first = 0; first < lanes; first += kLanes)                                                 \
      pack_lanes<Pair<T>, Vec>(dst + first, width, std::min(kLanes, lanes - first), k, m.at(first, 0)); \
  }
FASTCSS_PACK_PAIRS(pack_pairs_f32, float)
FASTCSS_PACK_PAIRS(pack_pairs_bf16, BFloat16)
FASTCSS_PACK_PAIRS(pack_pairs_f16, Float16)
#undef FASTCSS_PACK_PAIRS

// ---- unpacking -----------------------------------------------------------------------------------------------------

template <class T>
void write_rows(void* to, int64_t ld, int rows, int cols, const float* tile) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    T* dst = static_cast<T*>(to);
    for (int i = 0; i < rows; ++i)
      for (int first = 0; first < cols; first += kLanesIn<V>) {
        const V v = load<V>(tile + i * kCols + first);
        const int n = std::min(kLanesIn<V>, cols - first);
        n == kLanesIn<V> ? store(dst + i * ld + first, v) : store(dst + i * ld + first, v, n);
      }
  });
}

// Writes a tile [cols][kCols], whose rows are on the lanes, as `rows` ≤ kCols rows of `cols` elements.
template <class T>
void write_lanes(void* dst, int64_t ld, int rows, int64_t cols, const float* tile) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    constexpr int kWide = kLanesIn<V>;
    for (int64_t col = 0; col < cols; col += kWide)
      for (int row = 0; row < rows; row += kWide) {
        V block[kWide];
        const int n = static_cast<int>(std::min<int64_t>(kWide, cols - col));
#pragma GCC unroll 16
        for (int j = 0; j < kWide; ++j) block[j] = j < n ? load<V>(tile + (col + j) * kCols + row) : V{};
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kWide; ++i) {
          if (row + i == rows) break;
          T* to = static_cast<T*>(dst) + (row + i) * ld + col;
          n == kWide ? store(to, block[i]) : store(to, block[i], n);
        }
      }
  });
}

}  // namespace

void pack(float* dst, int width, int lanes, int64_t k, Matrix m, bool pairs) {
  constexpr decltype(&pack_words<float>) packers[2][3] = {
      {pack_words<float>, pack_words<BFloat16>, pack_words<Float16>},
      {pack_pairs_f32, pack_pairs_bf16, pack_pairs_f16}};
  packers[pairs][static_cast<int>(m.dtype)](dst, width, lanes, k, m);
}

FASTCSS_CLONES void add(float* sum, const float* term, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += term[i];
}

void write(void* dst, DType dtype, int64_t ld, int rows, int cols, const float* tile) {
  constexpr decltype(&write_rows<float>) writers[] = {write_rows<float>, write_rows<BFloat16>, write_rows<Float16>};
  writers[static_cast<int>(dtype)](dst, ld, rows, cols, tile);
}

void write_transposed(void* dst, DType dtype, int64_t ld, int rows, int64_t cols, const float* tile) {
  constexpr decltype(&write_lanes<float>) writers[] = {write_lanes<float>, write_lanes<BFloat16>, write_lanes<Float16>};
  writers[static_cast<int>(dtype)](dst, ld, rows, cols, tile);
}

}  // namespace fastcss::cpu
