#include "left_product.h"

namespace fastcss::cpu {
namespace {

#define FASTCSS_LEFT_ARGS \
  int64_t k, const float *a, int64_t stride, const float *b, int64_t ldb, float *c, int64_t ldc, bool add

using LeftTile = void (*)(FASTCSS_LEFT_ARGS);
constexpr int kVecs = kCols / kLanes;

// BY_WORD means that the rows lie side by side and the words `stride` apart; without it, the other way round.
template <class V, int ROWS, int VECS, bool BY_WORD>
FASTCSS_INLINE void left_tile(FASTCSS_LEFT_ARGS) {
  V sum[ROWS][VECS] = {};
  for (; k > 0; --k, a += BY_WORD ? stride : 1, b += ldb) {
    V column[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) column[v] = load<V>(b + v * kLanesIn<V>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const V row = a[BY_WORD ? i : i * stride] - V{};  // in every lane
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) sum[i][v] = multiply_add(sum[i][v], row, column[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) {
      float* to = c + i * ldc + v * kLanesIn<V>;
      store(to, add ? load<V>(to) + sum[i][v] : sum[i][v]);
    }
}

// One instruction set: how many rows a tile has at most, and one for each row count.
struct LeftTiles {
  int rows;
  LeftTile by_row[kMaxRows], by_word[kMaxRows];
};

#if defined(__x86_64__)
template <int ROWS, bool BY_WORD>
FASTCSS_TARGET("arch=x86-64-v4")
void left_v4(FASTCSS_LEFT_ARGS) {
  left_tile<Vec, ROWS, kVecs, BY_WORD>(k, a, stride, b, ldb, c, ldc, add);
}
template <int ROWS, bool BY_WORD>
FASTCSS_TARGET("arch=x86-64-v3")
void left_v3(FASTCSS_LEFT_ARGS) {  // kLanes columns at a time
  for (int v = 0; v < kVecs; ++v)
    left_tile<Vec8, ROWS, 2, BY_WORD>(k, a, stride, b + v * kLanes, ldb, c + v * kLanes, ldc, add);
}
#endif
template <int ROWS, bool BY_WORD>
void left_baseline(FASTCSS_LEFT_ARGS) {
  for (int v = 0; v < kVecs; ++v)
    left_tile<Vec4, ROWS, 4, BY_WORD>(k, a, stride, b + v * kLanes, ldb, c + v * kLanes, ldc, add);
}

#define FASTCSS_TILES_2(f, r, w) f<r, w>, f<r + 1, w>
#define FASTCSS_TILES_6(f, r, w) FASTCSS_TILES_2(f, r, w), FASTCSS_TILES_2(f, r + 2, w), FASTCSS_TILES_2(f, r + 4, w)

const LeftTiles& left_tiles() {
  static const LeftTiles baseline{
      2, {FASTCSS_TILES_2(left_baseline, 1, false)}, {FASTCSS_TILES_2(left_baseline, 1, true)}};
#if defined(__x86_64__)
  static const LeftTiles v3{6, {FASTCSS_TILES_6(left_v3, 1, false)}, {FASTCSS_TILES_6(left_v3, 1, true)}};
  static const LeftTiles v4{12,
                            {FASTCSS_TILES_6(left_v4, 1, false), FASTCSS_TILES_6(left_v4, 7, false)},
                            {FASTCSS_TILES_6(left_v4, 1, true), FASTCSS_TILES_6(left_v4, 7, true)}};
  if (kLevel == 4) return v4;
  if (kLevel == 3) return v3;
#endif
  return baseline;
}

}  // namespace

void left_product(int64_t M, int64_t k, Left a, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  if (M == 0) return;
  const LeftTiles& tiles = left_tiles();
  const bool by_word = a.row == 1 && a.step != 1;
  const int64_t stride = by_word ? a.step : a.row;
  // All panels have about the same height: a panel of a single row would wait for each of its sums.
  const int64_t panels = (M + tiles.rows - 1) / tiles.rows;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = M * p / panels, rows = M * (p + 1) / panels - first;
    const LeftTile tile = (by_word ? tiles.by_word : tiles.by_row)[rows - 1];
    const float *left = a.data + first * a.row, *right = b;
    int64_t left_k = k;
    bool more = add;
    do {  // sums of more than kDepth terms in blocks bound the rounding error
      const int64_t depth = std::min(left_k, kDepth);
      tile(depth, left, stride, right, ldb, c + first * ldc, ldc, more);
      left += depth * a.step, right += depth * ldb, left_k -= depth, more = true;
    } while (left_k > 0);
  }
}

}  // namespace fastcss::cpu
