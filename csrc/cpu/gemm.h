// The project's CPU micro-kernel.
//
// A GEMM here is out = in + rows · cols. Both operands are packed so that the micro-kernel reads them in order:
//   rows: panels of `Kernel::rows` rows, [word][rows]      cols: panels of kCols columns, [word][kCols]
// A word is one term of the sum as float32 (what float16 and bfloat16 are packed to), or a pair of bfloat16 terms where
// the CPU multiplies those itself. Sums are float32. Each element of a result is summed in the same order whatever tile
// it falls in: results do not depend on what else is in the batch.
#pragma once

#include "pack.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define FASTCSS_TARGET(arch) __attribute__((target(arch)))
#endif

namespace fastcss::cpu {

constexpr int kMaxRows = 12;     // rows of a tile, at most
constexpr int64_t kDepth = 512;  // words summed before they join the rest: bounds the rounding error of long sums

// ---- micro-kernel: c_out = c_in + Σ_k a[k][rows] b[k][columns] ------------------------------------------------------

#define FASTCSS_TILE_ARGS \
  int64_t k, const float *a, const float *b, int64_t ldb, const float *c_in, int64_t ld_in, float *c_out, int64_t ld_out

using Tile = void (*)(FASTCSS_TILE_ARGS);

FASTCSS_INLINE Vec multiply_add(Vec sum, Vec x, Vec y) { return sum + x * y; }

// ROWS × VECS vectors are held in registers; `PANEL` is the row count that `a` was packed for.
template <int ROWS, int VECS, int PANEL, Vec (*MULTIPLY_ADD)(Vec, Vec, Vec) = multiply_add>
FASTCSS_INLINE void tile_body(FASTCSS_TILE_ARGS) {
  Vec sum[ROWS][VECS] = {};
  for (; k > 0; --k, a += PANEL, b += ldb) {
    Vec column[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec row = a[i] - Vec{};  // a[i] in every lane
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) sum[i][v] = MULTIPLY_ADD(sum[i][v], row, column[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v)
      store(c_out + i * ld_out + v * kLanes, load(c_in + i * ld_in + v * kLanes) + sum[i][v]);
}

// One instruction set: its panel height, and a tile for every row count and for one or two vectors of columns.
struct Kernel {
  int rows;
  Tile tile[kMaxRows][2];

  // c_out = c_in + a·b over the first `cols` columns, rounded up to whole vectors. Sums of more than kDepth terms are
  // made of blocks, joined in c_out.
  void operator()(int n_rows, int cols, int64_t k, const float* a, const float* b, int64_t ldb, const float* c_in,
                  int64_t ld_in, float* c_out, int64_t ld_out) const {
    const Tile run = tile[n_rows - 1][cols > kLanes];
    do {
      const int64_t depth = std::min(k, kDepth);
      run(depth, a, b, ldb, c_in, ld_in, c_out, ld_out);
      a += depth * rows, b += depth * ldb, k -= depth;
      c_in = c_out, ld_in = ld_out;
    } while (k > 0);
  }
};

#if defined(__x86_64__)
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v4")
void tile_v4(FASTCSS_TILE_ARGS) {  // 12 × 2 of 32 zmm registers
  tile_body<ROWS, VECS, 12>(k, a, b, ldb, c_in, ld_in, c_out, ld_out);
}
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v3")
void tile_v3(FASTCSS_TILE_ARGS) {  // 6 × 2 of 16 ymm registers, a vector at a time
  for (int v = 0; v < VECS; ++v)
    tile_body<ROWS, 1, 6>(k, a, b + v * kLanes, ldb, c_in + v * kLanes, ld_in, c_out + v * kLanes, ld_out);
}
// A word is a pair of bfloat16 terms: sum + x₀y₀ + x₁y₁ in one instruction.
FASTCSS_TARGET("arch=x86-64-v4,avx512bf16") inline Vec multiply_add_pairs(Vec sum, Vec x, Vec y) {
  return reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y)));
}
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v4,avx512bf16")
void tile_pairs(FASTCSS_TILE_ARGS) {
  tile_body<ROWS, VECS, 12, multiply_add_pairs>(k, a, b, ldb, c_in, ld_in, c_out, ld_out);
}
#endif
template <int ROWS, int VECS>
void tile_baseline(FASTCSS_TILE_ARGS) {  // 2 × 4 of 16 xmm registers
  for (int v = 0; v < VECS; ++v)
    tile_body<ROWS, 1, 2>(k, a, b + v * kLanes, ldb, c_in + v * kLanes, ld_in, c_out + v * kLanes, ld_out);
}

#define FASTCSS_TILES_2(f, r) \
  {f<r, 1>, f<r, 2>}, { f<r + 1, 1>, f<r + 1, 2> }
#define FASTCSS_TILES_6(f, r) FASTCSS_TILES_2(f, r), FASTCSS_TILES_2(f, r + 2), FASTCSS_TILES_2(f, r + 4)

// The best kernel of this CPU for float32 words.
inline const Kernel& kernel() {
  static const Kernel baseline{2, {FASTCSS_TILES_2(tile_baseline, 1)}};
#if defined(__x86_64__)
  static const Kernel v3{6, {FASTCSS_TILES_6(tile_v3, 1)}};
  static const Kernel v4{12, {FASTCSS_TILES_6(tile_v4, 1), FASTCSS_TILES_6(tile_v4, 7)}};
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return v3;
#endif
  return baseline;
}

// The kernel for pairs of bfloat16, or nullptr where this CPU has none. Its panels are as high as kernel()'s.
inline const Kernel* pair_kernel() {
#if defined(__x86_64__)
  static const Kernel pairs{12, {FASTCSS_TILES_6(tile_pairs, 1), FASTCSS_TILES_6(tile_pairs, 7)}};
  if (kernel().rows == pairs.rows && __builtin_cpu_supports("avx512bf16")) return &pairs;
#endif
  return nullptr;
}
#undef FASTCSS_TILES_2
#undef FASTCSS_TILES_6

// ---- few rows: c_out = c_in + Σ_k a[k][rows] m[lane][k] straight from memory, transposed in registers ---------------

constexpr int64_t kAhead = 64;  // terms of each lane to fetch ahead: too many streams for the hardware to follow

// The sums are made in the order of Kernel::operator(), so that a row's result is the same alone and in a batch.
template <class T, int ROWS>
FASTCSS_INLINE void few_body(int lanes, int64_t k, const float* a, int panel, const T* src, int64_t lane_stride,
                             const float* c_in, int64_t ld_in, float* c_out, int64_t ld_out) {
  constexpr int kVecs = kCols / kLanes;
  Vec total[ROWS][kVecs];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < kVecs; ++v) total[i][v] = load(c_in + i * ld_in + v * kLanes);
  while (k > 0) {
    const int64_t depth = std::min(k, kDepth);
    Vec sum[ROWS][kVecs] = {};
    for (int64_t first = 0; first < depth; first += kLanes)
      for (int v = 0; v * kLanes < lanes; ++v) {  // two independent sums hide each other's latency
        for (int i = 0; i < kLanes; ++i) __builtin_prefetch(src + (v * kLanes + i) * lane_stride + first + kAhead);
        Vec words[kLanes];
        read_transposed<Single<T>>(words, src + v * kLanes * lane_stride + first, lane_stride,
                                   std::min(kLanes, lanes - v * kLanes), depth - first);
        const int terms = static_cast<int>(std::min<int64_t>(kLanes, depth - first));
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
          if (j == terms) break;
#pragma GCC unroll 12
          for (int i = 0; i < ROWS; ++i)
            sum[i][v] = multiply_add(sum[i][v], a[(first + j) * panel + i] - Vec{}, words[j]);
        }
      }
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < kVecs; ++v) total[i][v] += sum[i][v];
    a += depth * panel, src += depth, k -= depth;
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < kVecs; ++v) store(c_out + i * ld_out + v * kLanes, total[i][v]);
}

// The row count is rounded up to one of these; `a` holds zeros there, and `c_out` has kMaxRows rows of kCols.
FASTCSS_CLONES inline void few_rows(int rows, int lanes, int64_t k, const float* a, int panel, Matrix m,
                                    const float* c_in, int64_t ld_in, float* c_out, int64_t ld_out) {
  const float* src = static_cast<const float*>(m.data);
#define FASTCSS_FEW(n) \
  if (rows <= n) return few_body<float, n>(lanes, k, a, panel, src, m.lane_stride, c_in, ld_in, c_out, ld_out);
  FASTCSS_FEW(1) FASTCSS_FEW(2) FASTCSS_FEW(4) FASTCSS_FEW(6) FASTCSS_FEW(12)
#undef FASTCSS_FEW
}

}  // namespace fastcss::cpu
