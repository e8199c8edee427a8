// The project's CPU micro-kernel and what stands around it: packing, conversion, work sharing, workspaces.
//
// A GEMM here is out = in + rows · cols. Both operands are packed so that the micro-kernel reads them in order:
//   rows: panels of `kernel().rows` rows, [k][rows]      cols: panels of kCols columns, [k][kCols]
// Packing converts bfloat16 and float16, so the micro-kernel is float32 only and accumulates in float32. Each element
// of a result is summed in the same order whatever tile it falls in: results do not depend on what else is in the batch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#define FASTCSS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define FASTCSS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FASTCSS_TARGET(arch) __attribute__((target(arch)))
#else
#define FASTCSS_CLONES
#endif

namespace fastcss::cpu {

constexpr int kLanes = 16;         // floats in a Vec
constexpr int kCols = 2 * kLanes;  // columns of a tile
constexpr int kMaxRows = 12;       // rows of a tile, at most
constexpr int64_t kDepth = 512;    // terms summed before they join the rest: bounds the rounding error of long sums

typedef float Vec __attribute__((vector_size(4 * kLanes)));

FASTCSS_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTCSS_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// ---- micro-kernel: c_out = c_in + Σ_k a[k][rows] b[k][columns] ------------------------------------------------------

using Tile = void (*)(int64_t k, const float* a, const float* b, const float* c_in, int64_t ld_in, float* c_out,
                      int64_t ld_out);

// ROWS × VECS vectors are held in registers; `PANEL` is the row count that `a` was packed for.
template <int ROWS, int VECS, int PANEL>
FASTCSS_INLINE void tile_body(int64_t k, const float* a, const float* b, const float* c_in, int64_t ld_in, float* c_out,
                              int64_t ld_out) {
  Vec sum[ROWS][VECS] = {};
  for (; k > 0; --k, a += PANEL, b += kCols) {
    Vec column[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec row = a[i] - Vec{};  // a[i] in every lane
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) sum[i][v] += row * column[v];
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
  void operator()(int n_rows, int cols, int64_t k, const float* a, const float* b, const float* c_in, int64_t ld_in,
                  float* c_out, int64_t ld_out) const {
    const Tile run = tile[n_rows - 1][cols > kLanes];
    do {
      const int64_t depth = std::min(k, kDepth);
      run(depth, a, b, c_in, ld_in, c_out, ld_out);
      a += depth * rows, b += depth * kCols, k -= depth;
      c_in = c_out, ld_in = ld_out;
    } while (k > 0);
  }
};

#define FASTCSS_TILE_ARGS \
  int64_t k, const float *a, const float *b, const float *c_in, int64_t ld_in, float *c_out, int64_t ld_out

#if defined(__x86_64__)
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v4") void tile_v4(FASTCSS_TILE_ARGS) {  // 12 × 2 of 32 zmm registers
  tile_body<ROWS, VECS, 12>(k, a, b, c_in, ld_in, c_out, ld_out);
}
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v3") void tile_v3(FASTCSS_TILE_ARGS) {  // 6 × 2 of 16 ymm registers, a vector at a time
  for (int v = 0; v < VECS; ++v)
    tile_body<ROWS, 1, 6>(k, a, b + v * kLanes, c_in + v * kLanes, ld_in, c_out + v * kLanes, ld_out);
}
#endif
template <int ROWS, int VECS>
void tile_baseline(FASTCSS_TILE_ARGS) {  // 2 × 4 of 16 xmm registers
  for (int v = 0; v < VECS; ++v)
    tile_body<ROWS, 1, 2>(k, a, b + v * kLanes, c_in + v * kLanes, ld_in, c_out + v * kLanes, ld_out);
}

inline const Kernel& kernel() {
#define FASTCSS_ROW(f, r) {f<r, 1>, f<r, 2>}
#if defined(__x86_64__)
  static const Kernel v4{12, {FASTCSS_ROW(tile_v4, 1), FASTCSS_ROW(tile_v4, 2), FASTCSS_ROW(tile_v4, 3),
                              FASTCSS_ROW(tile_v4, 4), FASTCSS_ROW(tile_v4, 5), FASTCSS_ROW(tile_v4, 6),
                              FASTCSS_ROW(tile_v4, 7), FASTCSS_ROW(tile_v4, 8), FASTCSS_ROW(tile_v4, 9),
                              FASTCSS_ROW(tile_v4, 10), FASTCSS_ROW(tile_v4, 11), FASTCSS_ROW(tile_v4, 12)}};
  static const Kernel v3{6, {FASTCSS_ROW(tile_v3, 1), FASTCSS_ROW(tile_v3, 2), FASTCSS_ROW(tile_v3, 3),
                             FASTCSS_ROW(tile_v3, 4), FASTCSS_ROW(tile_v3, 5), FASTCSS_ROW(tile_v3, 6)}};
#endif
  static const Kernel baseline{2, {FASTCSS_ROW(tile_baseline, 1), FASTCSS_ROW(tile_baseline, 2)}};
#undef FASTCSS_ROW
#if defined(__x86_64__)
  static const Kernel& best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                                  ? v4
                              : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? v3
                                                                                               : baseline;
  return best;
#else
  return baseline;
#endif
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

// ---- packing: dst[k][width] ----------------------------------------------------------------------------------------

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

// Terms k of up to 16 lanes, contiguous in k. Every store is a whole vector: what runs over `lanes` is overwritten by
// the next term, or by the next 16 lanes, and the buffer has room for the last one.
template <class T>
FASTCSS_INLINE void pack_transposed(float* dst, int width, int lanes, int64_t k, const T* src, int64_t lane_stride) {
  for (int64_t first = 0; first < k; first += kLanes) {
    const int64_t terms = std::min<int64_t>(kLanes, k - first);
    Vec rows[kLanes] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const T* p = src + i * lane_stride + first;
      if (i < lanes) rows[i] = terms == kLanes ? load(p) : load(p, terms);
    }
    exchange<8>(rows), exchange<4>(rows), exchange<2>(rows), exchange<1>(rows);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j)
      if (j < terms) store(dst + (first + j) * width, rows[j]);
  }
}

template <class T>
FASTCSS_INLINE void pack_lanes(float* dst, int width, int lanes, int64_t k, const T* src, int64_t lane_stride,
                               int64_t k_stride) {
  if (k_stride == 1 && lane_stride != 1) return pack_transposed(dst, width, lanes, k, src, lane_stride);
  for (int64_t j = 0; j < k; ++j, dst += width, src += k_stride) {
    if (lane_stride == 1) {
      store(dst, lanes == kLanes ? load(src) : load(src, lanes));
    } else {
      T gathered[kLanes] = {};
      for (int i = 0; i < lanes; ++i) gathered[i] = src[i * lane_stride];
      store(dst, load(gathered));
    }
  }
}

FASTCSS_CLONES inline void pack_f32(float* dst, int width, int lanes, int64_t k, Matrix m) {
  pack_lanes(dst, width, lanes, k, static_cast<const float*>(m.data), m.lane_stride, m.k_stride);
}
FASTCSS_CLONES inline void pack_bf16(float* dst, int width, int lanes, int64_t k, Matrix m) {
  pack_lanes(dst, width, lanes, k, static_cast<const BFloat16*>(m.data), m.lane_stride, m.k_stride);
}
FASTCSS_CLONES inline void pack_f16(float* dst, int width, int lanes, int64_t k, Matrix m) {
  pack_lanes(dst, width, lanes, k, static_cast<const _Float16*>(m.data), m.lane_stride, m.k_stride);
}

// A panel of `lanes` ≤ width lanes. The buffer needs room for kLanes floats past its end.
inline void pack(float* dst, int width, int lanes, int64_t k, Matrix m) {
  for (int first = 0; first < lanes; first += kLanes) {
    const int n = std::min(kLanes, lanes - first);
    const Matrix part = m.at(first, 0);
    if (m.dtype == DType::f32) pack_f32(dst + first, width, n, k, part);
    if (m.dtype == DType::bf16) pack_bf16(dst + first, width, n, k, part);
    if (m.dtype == DType::f16) pack_f16(dst + first, width, n, k, part);
  }
}

FASTCSS_CLONES inline void add(float* sum, const float* term, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += term[i];
}

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
FASTCSS_CLONES inline void write_f32(float* dst, int64_t ld, int rows, int cols, const float* tile) {
  write_rows(dst, ld, rows, cols, tile);
}
FASTCSS_CLONES inline void write_bf16(BFloat16* dst, int64_t ld, int rows, int cols, const float* tile) {
  write_rows(dst, ld, rows, cols, tile);
}
FASTCSS_CLONES inline void write_f16(_Float16* dst, int64_t ld, int rows, int cols, const float* tile) {
  write_rows(dst, ld, rows, cols, tile);
}

// Writes the first `cols` columns of a float32 tile [rows][kCols] as elements of `dtype`.
inline void write(void* dst, DType dtype, int64_t ld, int rows, int cols, const float* tile) {
  if (dtype == DType::f32) write_f32(static_cast<float*>(dst), ld, rows, cols, tile);
  if (dtype == DType::bf16) write_bf16(static_cast<BFloat16*>(dst), ld, rows, cols, tile);
  if (dtype == DType::f16) write_f16(static_cast<_Float16*>(dst), ld, rows, cols, tile);
}

// ---- threads and memory --------------------------------------------------------------------------------------------

// f(i) for every i < items, on torch's threads. Which thread takes which item is left open; no result depends on it.
template <class F>
void parallel(int64_t items, const F& f) {
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t i = 0; i < items; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(i);
  });
}

// A buffer that a thread keeps from call to call: no page faults after the first. Large ones are given back.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  float* get(int64_t floats) {
    floats += kLanes;  // pack() stores whole vectors
    if (floats > size_) {
      std::free(data_);
      size_ = (floats + 1023) / 1024 * 1024;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }
  void trim() {
    if (size_ * sizeof(float) <= kKept) return;
    std::free(data_);
    data_ = nullptr, size_ = 0;
  }

 private:
  static constexpr size_t kKept = size_t{64} << 20;
  float* data_ = nullptr;
  int64_t size_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastcss::cpu
