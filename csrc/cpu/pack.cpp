#include "pack.h"

namespace fastcss::cpu {
namespace {

// Every store is a whole vector: what runs over `lanes` is overwritten by the next word, or by the next 16 lanes, and
// the buffer has room for the last one.
template <class Word>
FASTCSS_INLINE void pack_lanes(float* dst, int width, int lanes, int64_t k, Matrix m) {
  using T = typename Word::Element;
  const T* src = static_cast<const T*>(m.data);
  constexpr int kBlock = kLanes * Word::terms;
  if (m.k_stride == 1 && m.lane_stride != 1) {
    for (; k > 0; k -= kBlock, src += kBlock, dst += kLanes * width) {
      Vec words[kLanes];
      read_transposed<Word>(words, src, m.lane_stride, lanes, k);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        if (j * Word::terms < k) store(dst + j * width, words[j]);
    }
    return;
  }
  for (; k > 0; k -= Word::terms, src += Word::terms * m.k_stride, dst += width) {
    const int n = static_cast<int>(std::min<int64_t>(Word::terms, k));
    if (m.lane_stride == 1) {
      store(dst, Word::across(src, lanes, m.k_stride, n));
    } else {
      T gathered[Word::terms * kLanes] = {};
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < lanes; ++i) gathered[j * kLanes + i] = src[j * m.k_stride + i * m.lane_stride];
      store(dst, Word::across(gathered, kLanes, kLanes, n));
    }
  }
}

#define FASTCSS_PACK(name, word)                                                    \
  FASTCSS_CLONES void name(float* dst, int width, int lanes, int64_t k, Matrix m) { \
    pack_lanes<word>(dst, width, lanes, k, m);                                      \
  }
FASTCSS_PACK(pack_f32, Single<float>)
FASTCSS_PACK(pack_bf16, Single<BFloat16>)
FASTCSS_PACK(pack_f16, Single<_Float16>)
FASTCSS_PACK(pack_pairs_f32, Pair<float>)
FASTCSS_PACK(pack_pairs_bf16, Pair<BFloat16>)
FASTCSS_PACK(pack_pairs_f16, Pair<_Float16>)
#undef FASTCSS_PACK

// ---- unpacking -----------------------------------------------------------------------------------------------------

template <class T>
FASTCSS_INLINE void write_rows(T* dst, int64_t ld, int rows, int cols, const float* tile) {
  for (int i = 0; i < rows; ++i)
    for (int first = 0; first < cols; first += kLanes) {
      const Vec v = load(tile + i * kCols + first);
      const int n = std::min(kLanes, cols - first);
      n == kLanes ? store(dst + i * ld + first, v) : store(dst + i * ld + first, v, n);
    }
}
FASTCSS_CLONES void write_f32(float* dst, int64_t ld, int rows, int cols, const float* tile) {
  write_rows(dst, ld, rows, cols, tile);
}
FASTCSS_CLONES void write_bf16(BFloat16* dst, int64_t ld, int rows, int cols, const float* tile) {
  write_rows(dst, ld, rows, cols, tile);
}
FASTCSS_CLONES void write_f16(_Float16* dst, int64_t ld, int rows, int cols, const float* tile) {
  write_rows(dst, ld, rows, cols, tile);
}

// A tile [cols][kCols], whose rows are on the lanes, as `rows` ≤ kCols rows of `cols` elements.
template <class T>
FASTCSS_INLINE void write_lanes(T* dst, int64_t ld, int rows, int64_t cols, const float* tile) {
  for (int64_t col = 0; col < cols; col += kLanes)
    for (int row = 0; row < rows; row += kLanes) {
      Vec block[kLanes];
      const int n = static_cast<int>(std::min<int64_t>(kLanes, cols - col));
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) block[j] = j < n ? load(tile + (col + j) * kCols + row) : Vec{};
      exchange<8>(block), exchange<4>(block), exchange<2>(block), exchange<1>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (row + i == rows) break;
        T* to = dst + (row + i) * ld + col;
        n == kLanes ? store(to, block[i]) : store(to, block[i], n);
      }
    }
}
FASTCSS_CLONES void write_lanes_f32(float* dst, int64_t ld, int rows, int64_t cols, const float* tile) {
  write_lanes(dst, ld, rows, cols, tile);
}
FASTCSS_CLONES void write_lanes_bf16(BFloat16* dst, int64_t ld, int rows, int64_t cols, const float* tile) {
  write_lanes(dst, ld, rows, cols, tile);
}
FASTCSS_CLONES void write_lanes_f16(_Float16* dst, int64_t ld, int rows, int64_t cols, const float* tile) {
  write_lanes(dst, ld, rows, cols, tile);
}

}  // namespace

void pack(float* dst, int width, int lanes, int64_t k, Matrix m, bool pairs) {
  constexpr decltype(&pack_f32) packers[2][3] = {{pack_f32, pack_bf16, pack_f16},
                                                 {pack_pairs_f32, pack_pairs_bf16, pack_pairs_f16}};
  for (int first = 0; first < lanes; first += kLanes)
    packers[pairs][static_cast<int>(m.dtype)](dst + first, width, std::min(kLanes, lanes - first), k, m.at(first, 0));
}

FASTCSS_CLONES void add(float* sum, const float* term, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += term[i];
}

void write(void* dst, DType dtype, int64_t ld, int rows, int cols, const float* tile) {
  if (dtype == DType::f32) write_f32(static_cast<float*>(dst), ld, rows, cols, tile);
  if (dtype == DType::bf16) write_bf16(static_cast<BFloat16*>(dst), ld, rows, cols, tile);
  if (dtype == DType::f16) write_f16(static_cast<_Float16*>(dst), ld, rows, cols, tile);
}

void write_transposed(void* dst, DType dtype, int64_t ld, int rows, int64_t cols, const float* tile) {
  if (dtype == DType::f32) write_lanes_f32(static_cast<float*>(dst), ld, rows, cols, tile);
  if (dtype == DType::bf16) write_lanes_bf16(static_cast<BFloat16*>(dst), ld, rows, cols, tile);
  if (dtype == DType::f16) write_lanes_f16(static_cast<_Float16*>(dst), ld, rows, cols, tile);
}

}  // namespace fastcss::cpu
