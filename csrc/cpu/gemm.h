// The project's CPU micro-kernel.
//
// A GEMM here is out = in + rows · cols. Both operands are packed so that the micro-kernel reads them in order:
//   rows: panels of `Kernel::rows` rows, [word][rows]      cols: panels of kCols columns, [word][kCols]
// A word is one term of the sum as float32 (to which float16 and bfloat16 are converted), or a pair of bfloat16 terms
// if the CPU multiplies those itself. Sums are float32. Each element of a result is summed in the same order whatever
// tile it falls in: results do not depend on what else is in the batch.
#pragma once

#include "pack.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastcss::cpu {

constexpr int kMaxRows = 12;     // rows of a tile, at most
constexpr int64_t kDepth = 512;  // words summed before they join the rest: bounds the rounding error of long sums

// ---- micro-kernel: c_out = c_in + Σ_k a[k][rows] b[k][columns] ------------------------------------------------------

// While a tile is computed, the second-level cache fetches what lies `ahead` floats from `a`, as fast as `a` is read:
// a weight that is read for the first time comes from far away. What is near already would cost time; 0 is for that.
#define FASTCSS_TILE_ARGS                                                                                 \
  int64_t k, const float *a, const float *b, int64_t ldb, const float *c_in, int64_t ld_in, float *c_out, \
      int64_t ld_out, int64_t ahead

using Tile = void (*)(FASTCSS_TILE_ARGS);

template <class V>
FASTCSS_INLINE V multiply_add(V sum, V x, V y) {
  return sum + x * y;
}

// ROWS × VECS vectors are held in registers; `PANEL` is the row count that `a` was packed for.
template <int PANEL, class V, int ROWS, int VECS, V (*MULTIPLY_ADD)(V, V, V) = multiply_add<V>, bool FETCHES = false>
FASTCSS_INLINE void accumulate(V (&sum)[ROWS][VECS], int64_t k, const float* a, const float* b, int64_t ldb,
                               int64_t ahead = 0) {
  for (; k > 0; --k, a += PANEL, b += ldb) {
    if constexpr (FETCHES) __builtin_prefetch(a + ahead, 0, 2);
    V column[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) column[v] = load<V>(b + v * kLanesIn<V>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const V row = a[i] - V{};  // a[i] in every lane
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) sum[i][v] = MULTIPLY_ADD(sum[i][v], row, column[v]);
    }
  }
}

template <class V, int ROWS, int VECS, int PANEL, V (*MULTIPLY_ADD)(V, V, V) = multiply_add<V>>
FASTCSS_INLINE void tile_body(FASTCSS_TILE_ARGS) {
  V sum[ROWS][VECS] = {};
  accumulate<PANEL, V, ROWS, VECS, MULTIPLY_ADD, true>(sum, k, a, b, ldb, ahead);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v)
      store(c_out + i * ld_out + v * kLanesIn<V>, load<V>(c_in + i * ld_in + v * kLanesIn<V>) + sum[i][v]);
}

// One instruction set: its panel height, and a tile for every row count and for one or two vectors of columns.
struct Kernel {
  int rows;
  Tile tile[kMaxRows][2];

  // c_out = c_in + a·b over the first `cols` columns, rounded up to whole vectors. Sums of more than kDepth terms are
  // made of blocks, joined in c_out.
  void operator()(int n_rows, int cols, int64_t k, const float* a, const float* b, int64_t ldb, const float* c_in,
                  int64_t ld_in, float* c_out, int64_t ld_out, int64_t ahead = 0) const {
    const Tile run = tile[n_rows - 1][cols > kLanes];
    do {
      const int64_t depth = std::min(k, kDepth);
      run(depth, a, b, ldb, c_in, ld_in, c_out, ld_out, ahead);
      a += depth * rows, b += depth * ldb, k -= depth;
      c_in = c_out, ld_in = ld_out;
    } while (k > 0);
  }
};

#if defined(__x86_64__)
#define FASTCSS_V4_PAIRS FASTCSS_TARGET("arch=x86-64-v4,avx512bf16")
// A word is a pair of bfloat16 terms: sum + x₀y₀ + x₁y₁ in one instruction.
FASTCSS_V4_PAIRS inline Vec multiply_add_pairs(Vec sum, Vec x, Vec y) {
  return reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y)));
}
// Makes a word of each lane's two terms, rounded.
FASTCSS_V4_PAIRS inline Vec join_pairs(Vec first, Vec second) {
  const __m512i terms =
      reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i order;
  std::memcpy(&order, kOrder, sizeof(order));
  return reinterpret_cast<Vec>(_mm512_maskz_permutexvar_epi16(0xffffffff, order, terms));
}
// Runs a loop as on_widest does, if pair_kernel() is there.
template <class F>
FASTCSS_V4_PAIRS void on_pairs(const F& loop) {
  loop.template operator()<Vec>();
}
#endif

// The best kernel of this CPU for float32 words.
const Kernel& kernel();

// The kernel for pairs of bfloat16, or nullptr if this CPU has none. Its panels are as high as kernel()'s.
const Kernel* pair_kernel();

// c_out = c_in + Σ_k a[k][rows] m[lane][k] for few rows: m is read straight from memory and transposed in registers.
// The sums are made in the order of Kernel::operator(), so that a row's result is the same alone and in a batch. The
// row count is rounded up to 1, 2, 4, 6 or 12; `a` holds zeros there, and `c_out` has kMaxRows rows of kCols.
void few_rows(int rows, int lanes, int64_t k, const float* a, int panel, Matrix m, const float* c_in, int64_t ld_in,
              float* c_out, int64_t ld_out);

// out += Σ_k a[k][rows] b[k][column] for few rows and few terms: each row of b is read from memory once and in order.
// The sums are made in the order of Kernel::operator(), and joined with `out` as there.
void few_terms(int rows, int64_t columns, int64_t k, const float* a, int panel, const float* b, int64_t ldb, float* out,
               int64_t ld_out);

// out [M][ld] = left · right over k terms, or with `add` out += that, packed and computed on this thread. `out` has
// room for columns up to a multiple of kCols; `scratch` for product_scratch floats.
void product(int64_t M, int64_t N, int64_t k, Matrix left, Matrix right, float* out, int64_t ld, bool add,
             float* scratch);
int64_t product_scratch(int64_t M, int64_t k);

}  // namespace fastcss::cpu
