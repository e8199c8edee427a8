// The project's CPU micro-kernel and what stands around it: packing, conversion, work sharing, workspaces.
//
// A GEMM here is out = in + rows · cols. Both operands are packed so that the micro-kernel reads them in order:
//   rows: panels of `Kernel::rows` rows, [word][rows]      cols: panels of kCols columns, [word][kCols]
// A word is one term of the sum as float32 (what float16 and bfloat16 are packed to), or a pair of bfloat16 terms where
// the CPU multiplies those itself. Sums are float32. Each element of a result is summed in the same order whatever tile
// it falls in: results do not depend on what else is in the batch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
constexpr int64_t kDepth = 512;    // words summed before they join the rest: bounds the rounding error of long sums

typedef float Vec __attribute__((vector_size(4 * kLanes)));

FASTCSS_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTCSS_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// ---- micro-kernel: c_out = c_in + Σ_k a[k][rows] b[k][columns] ------------------------------------------------------

#define FASTCSS_TILE_ARGS                                                                              \
  int64_t k, const float *a, const float *b, int64_t ldb, const float *c_in, int64_t ld_in, float *c_out, \
      int64_t ld_out

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
FASTCSS_TARGET("arch=x86-64-v4") void tile_v4(FASTCSS_TILE_ARGS) {  // 12 × 2 of 32 zmm registers
  tile_body<ROWS, VECS, 12>(k, a, b, ldb, c_in, ld_in, c_out, ld_out);
}
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v3") void tile_v3(FASTCSS_TILE_ARGS) {  // 6 × 2 of 16 ymm registers, a vector at a time
  for (int v = 0; v < VECS; ++v)
    tile_body<ROWS, 1, 6>(k, a, b + v * kLanes, ldb, c_in + v * kLanes, ld_in, c_out + v * kLanes, ld_out);
}
// A word is a pair of bfloat16 terms: sum + x₀y₀ + x₁y₁ in one instruction.
FASTCSS_TARGET("arch=x86-64-v4,avx512bf16") inline Vec multiply_add_pairs(Vec sum, Vec x, Vec y) {
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x),
                                                reinterpret_cast<__m512bh>(y)));
}
template <int ROWS, int VECS>
FASTCSS_TARGET("arch=x86-64-v4,avx512bf16") void tile_pairs(FASTCSS_TILE_ARGS) {
  tile_body<ROWS, VECS, 12, multiply_add_pairs>(k, a, b, ldb, c_in, ld_in, c_out, ld_out);
}
#endif
template <int ROWS, int VECS>
void tile_baseline(FASTCSS_TILE_ARGS) {  // 2 × 4 of 16 xmm registers
  for (int v = 0; v < VECS; ++v)
    tile_body<ROWS, 1, 2>(k, a, b + v * kLanes, ldb, c_in + v * kLanes, ld_in, c_out + v * kLanes, ld_out);
}

#define FASTCSS_TILES_2(f, r) {f<r, 1>, f<r, 2>}, {f<r + 1, 1>, f<r + 1, 2>}
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
  static FASTCSS_INLINE Vec along(const T* p, int64_t n) { return n == kLanes ? load(p) : load(p, n); }
  static FASTCSS_INLINE Vec across(const T* p, int lanes, int64_t, int) { return along(p, lanes); }
};
// … or two bfloat16 terms each.
template <class T>
struct Pair {
  using Element = T;
  static constexpr int terms = 2;
  static FASTCSS_INLINE Vec along(const T* p, int64_t n) {
    BFloat16 terms_of_words[2 * kLanes] = {};
    for (int64_t first = 0; first < n; first += kLanes)
      store(terms_of_words + first, n - first >= kLanes ? load(p + first) : load(p + first, n - first));
    return load(reinterpret_cast<const float*>(terms_of_words));
  }
  static FASTCSS_INLINE Vec across(const T* p, int lanes, int64_t k_stride, int n) {
    const Bits first = round(Single<T>::along(p, lanes)), second = n > 1 ? round(Single<T>::along(p + k_stride, lanes)) : Bits{};
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

// 16 words of up to 16 lanes, contiguous in k, as one vector a word.
template <class Word>
FASTCSS_INLINE void read_transposed(Vec (&words)[kLanes], const typename Word::Element* src, int64_t lane_stride,
                                    int lanes, int64_t terms) {
  const int64_t n = std::min<int64_t>(kLanes * Word::terms, terms);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) words[i] = i < lanes ? Word::along(src + i * lane_stride, n) : Vec{};
  exchange<8>(words), exchange<4>(words), exchange<2>(words), exchange<1>(words);
}

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

#define FASTCSS_PACK(name, word)                                                                      \
  FASTCSS_CLONES inline void name(float* dst, int width, int lanes, int64_t k, Matrix m) { \
    pack_lanes<word>(dst, width, lanes, k, m);                                                        \
  }
FASTCSS_PACK(pack_f32, Single<float>)
FASTCSS_PACK(pack_bf16, Single<BFloat16>)
FASTCSS_PACK(pack_f16, Single<_Float16>)
FASTCSS_PACK(pack_pairs_f32, Pair<float>)
FASTCSS_PACK(pack_pairs_bf16, Pair<BFloat16>)
FASTCSS_PACK(pack_pairs_f16, Pair<_Float16>)
#undef FASTCSS_PACK

// A panel of `lanes` ≤ width lanes and k terms. The buffer needs room for kLanes floats past its end.
inline void pack(float* dst, int width, int lanes, int64_t k, Matrix m, bool pairs = false) {
  constexpr decltype(&pack_f32) packers[2][3] = {{pack_f32, pack_bf16, pack_f16},
                                                 {pack_pairs_f32, pack_pairs_bf16, pack_pairs_f16}};
  for (int first = 0; first < lanes; first += kLanes)
    packers[pairs][static_cast<int>(m.dtype)](dst + first, width, std::min(kLanes, lanes - first), k, m.at(first, 0));
}

// ---- few rows: c_out = c_in + Σ_k a[k][rows] m[lane][k] straight from memory, transposed in registers ---------------

constexpr int kFewRows = 4;  // up to here reading the right operand is the work, and packing it would double that

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
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        if (v * kLanes >= lanes) continue;
        Vec words[kLanes];
        read_transposed<Single<T>>(words, src + v * kLanes * lane_stride + first, lane_stride,
                                   std::min(kLanes, lanes - v * kLanes), depth - first);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j)
          if (first + j < depth)
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) sum[i][v] = multiply_add(sum[i][v], a[(first + j) * panel + i] - Vec{}, words[j]);
      }
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < kVecs; ++v) total[i][v] += sum[i][v];
    a += depth * panel, src += depth, k -= depth;
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < kVecs; ++v) store(c_out + i * ld_out + v * kLanes, total[i][v]);
}

// The result is written in whole vectors of kCols. Wants float32, contiguous in k.
FASTCSS_CLONES inline void few_rows(int rows, int lanes, int64_t k, const float* a, int panel, Matrix m, const float* c_in,
                                    int64_t ld_in, float* c_out, int64_t ld_out) {
  const float* src = static_cast<const float*>(m.data);
  if (rows == 1) few_body<float, 1>(lanes, k, a, panel, src, m.lane_stride, c_in, ld_in, c_out, ld_out);
  if (rows == 2) few_body<float, 2>(lanes, k, a, panel, src, m.lane_stride, c_in, ld_in, c_out, ld_out);
  if (rows == 3) few_body<float, 3>(lanes, k, a, panel, src, m.lane_stride, c_in, ld_in, c_out, ld_out);
  if (rows == 4) few_body<float, 4>(lanes, k, a, panel, src, m.lane_stride, c_in, ld_in, c_out, ld_out);
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
