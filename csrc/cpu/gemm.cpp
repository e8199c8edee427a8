#include "gemm.h"

namespace fastcss::cpu {
namespace {

#if defined(__x86_64__)
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v4")
void tile_v4(FASTCSS_TILE_ARGS) {  // 12 × 2 of 32 zmm registers
  tile_body<Vec, ROWS, VECS, 12>(k, a, b, ldb, c_in, ld_in, c_out, ld_out, ahead);
}
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v3")
void tile_v3(FASTCSS_TILE_ARGS) {  // 6 × 2 of 16 ymm registers, kLanes columns at a time
  for (int v = 0; v < VECS; ++v)
    tile_body<Vec8, ROWS, 2, 6>(k, a, b + v * kLanes, ldb, c_in + v * kLanes, ld_in, c_out + v * kLanes, ld_out, ahead);
}
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v4,avx512bf16")
void tile_pairs(FASTCSS_TILE_ARGS) {
  tile_body<Vec, ROWS, VECS, 12, multiply_add_pairs>(k, a, b, ldb, c_in, ld_in, c_out, ld_out, ahead);
}
#endif
template <int ROWS, int VECS>
void tile_baseline(FASTCSS_TILE_ARGS) {  // 2 × 4 of 16 xmm registers, kLanes columns at a time
  for (int v = 0; v < VECS; ++v)
    tile_body<Vec4, ROWS, 4, 2>(k, a, b + v * kLanes, ldb, c_in + v * kLanes, ld_in, c_out + v * kLanes, ld_out, ahead);
}

#define FASTCSS_TILES_2(f, r) \
  {f<r, 1>, f<r, 2>}, { f<r + 1, 1>, f<r + 1, 2> }
#define FASTCSS_TILES_6(f, r) FASTCSS_TILES_2(f, r), FASTCSS_TILES_2(f, r + 2), FASTCSS_TILES_2(f, r + 4)

}  // namespace

const Kernel& kernel() {
  static const Kernel baseline{2, {FASTCSS_TILES_2(tile_baseline, 1)}};
#if defined(__x86_64__)
  static const Kernel v3{6, {FASTCSS_TILES_6(tile_v3, 1)}};
  static const Kernel v4{12, {FASTCSS_TILES_6(tile_v4, 1), FASTCSS_TILES_6(tile_v4, 7)}};
  if (kLevel == 4) return v4;
  if (kLevel == 3) return v3;
#endif
  return baseline;
}

const Kernel* pair_kernel() {
#if defined(__x86_64__)
  static const Kernel pairs{12, {FASTCSS_TILES_6(tile_pairs, 1), FASTCSS_TILES_6(tile_pairs, 7)}};
  if (kernel().rows == pairs.rows && __builtin_cpu_supports("avx512bf16")) return &pairs;
#endif
  return nullptr;
}
#undef FASTCSS_TILES_2
#undef FASTCSS_TILES_6

namespace {

constexpr int64_t kAhead = 64;  // terms of each lane to prefetch: there are too many streams for the hardware to follow

template <class V, int ROWS>
FASTCSS_INLINE void few_body(int lanes, int64_t k, const float* a, int panel, const float* src, int64_t lane_stride,
                             const float* c_in, int64_t ld_in, float* c_out, int64_t ld_out) {
  constexpr int kWide = kLanesIn<V>, kVecs = kCols / kWide;
  V total[ROWS][kVecs];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < kVecs; ++v) total[i][v] = load<V>(c_in + i * ld_in + v * kWide);
  while (k > 0) {
    const int64_t depth = std::min(k, kDepth);
    V sum[ROWS][kVecs] = {};
    for (int64_t first = 0; first < depth; first += kWide)
      for (int v = 0; v * kWide < lanes; ++v) {  // independent sums hide each other's latency
        for (int i = 0; i < kWide; ++i) __builtin_prefetch(src + (v * kWide + i) * lane_stride + first + kAhead);
        V words[kWide];
        read_transposed<Single<float>>(words, src + v * kWide * lane_stride + first, lane_stride,
                                       std::min(kWide, lanes - v * kWide), depth - first);
        const int terms = static_cast<int>(std::min<int64_t>(kWide, depth - first));
#pragma GCC unroll 16
        for (int j = 0; j < kWide; ++j) {
          if (j == terms) break;
#pragma GCC unroll 12
          for (int i = 0; i < ROWS; ++i)
            sum[i][v] = multiply_add(sum[i][v], a[(first + j) * panel + i] - V{}, words[j]);
        }
      }
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < kVecs; ++v) total[i][v] += sum[i][v];
    a += depth * panel, src += depth, k -= depth;
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < kVecs; ++v) store(c_out + i * ld_out + v * kWide, total[i][v]);
}

constexpr int64_t kStrip = 1024;  // columns whose sums stay in the L1 cache

// sum [columns rounded up to V] += Σ factor · row of b, over consecutive rows
template <class V, class... Factor>
FASTCSS_INLINE void join_terms(float* sum, int64_t columns, const float* b, int64_t ldb, Factor... factor) {
  constexpr int kWide = kLanesIn<V>;
  int64_t c = 0;
  for (; c + kWide <= columns; c += kWide) {
    V total = load<V>(sum + c);
    const float* at = b + c;
    ((total = multiply_add(total, factor, load<V>(at)), at += ldb), ...);
    store(sum + c, total);
  }
  if (c == columns) return;
  V total = load<V>(sum + c);
  const float* at = b + c;
  ((total = multiply_add(total, factor, load<V>(at, static_cast<int>(columns - c))), at += ldb), ...);
  store(sum + c, total);
}

}  // namespace

void few_terms(int rows, int64_t columns, int64_t k, const float* a, int panel, const float* b, int64_t ldb, float* out,
               int64_t ld_out) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    alignas(64) float sums[kMaxRows * kStrip];
    for (int64_t first = 0; first < columns; first += kStrip) {
      const int64_t width = std::min(kStrip, columns - first);
      for (int64_t block = 0; block < k; block += kDepth) {
        const int64_t end = std::min(k, block + kDepth);
        for (int i = 0; i < rows; ++i) std::fill_n(sums + i * kStrip, (width + kLanes - 1) / kLanes * kLanes, 0.f);
        int64_t term = block;
        for (; term + 4 <= end; term += 4)  // four join a sum for each time that it is read and written
          for (int i = 0; i < rows; ++i) {
            const float* t = a + term * panel + i;
            join_terms<V>(sums + i * kStrip, width, b + term * ldb + first, ldb, t[0] - V{}, t[panel] - V{},
                          t[2 * panel] - V{}, t[3 * panel] - V{});
          }
        for (; term < end; ++term)
          for (int i = 0; i < rows; ++i)
            join_terms<V>(sums + i * kStrip, width, b + term * ldb + first, ldb, a[term * panel + i] - V{});
        for (int i = 0; i < rows; ++i)
          for (int64_t c = 0; c < width; ++c) out[i * ld_out + first + c] += sums[i * kStrip + c];
      }
    }
  });
}

void few_rows(int rows, int lanes, int64_t k, const float* a, int panel, Matrix m, const float* c_in, int64_t ld_in,
              float* c_out, int64_t ld_out) {
  const float* src = static_cast<const float*>(m.data);
  on_widest([=]<class V>() FASTCSS_LOOP {
#define FASTCSS_FEW(n) \
  if (rows <= n) return few_body<V, n>(lanes, k, a, panel, src, m.lane_stride, c_in, ld_in, c_out, ld_out);
    FASTCSS_FEW(1) FASTCSS_FEW(2) FASTCSS_FEW(4) FASTCSS_FEW(6) FASTCSS_FEW(12)
#undef FASTCSS_FEW
  });
}

int64_t product_scratch(int64_t M, int64_t k) {
  const int64_t height = kernel().rows, panels = (M + height - 1) / height;
  return panels * (k * height + kLanes) + k * kCols + kLanes;
}

void product(int64_t M, int64_t N, int64_t k, Matrix left, Matrix right, float* out, int64_t ld, bool add,
             float* scratch) {
  alignas(64) static const float zeros[kCols] = {};
  const Kernel& tile = kernel();
  const int64_t height = tile.rows, panel_size = k * height + kLanes;
  const auto rows = [&](int64_t first) { return static_cast<int>(std::min(height, M - first)); };
  float* columns = scratch;
  for (int64_t i = 0; i < M; i += height, columns += panel_size) pack(columns, tile.rows, rows(i), k, left.at(i, 0));
  for (int64_t j = 0; j < N; j += kCols) {
    pack(columns, kCols, static_cast<int>(std::min<int64_t>(kCols, N - j)), k, right.at(j, 0));
    for (int64_t i = 0; i < M; i += height) {
      float* to = out + i * ld + j;
      tile(rows(i), kCols, k, scratch + i / height * panel_size, columns, kCols, add ? to : zeros, add ? ld : 0, to,
           ld);
    }
  }
}

}  // namespace fastcss::cpu
