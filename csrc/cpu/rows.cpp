#include "rows.h"

#include <cmath>

namespace fastcss::cpu {
namespace {

constexpr float kShortest = 1e-12f;

template <class T>
FASTCSS_INLINE void read(float* dst, const T* src, int64_t stride, int64_t n) {
  if (stride == 1) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
    if (i < n) store(dst + i, load(src + i, n - i), n - i);
    return;
  }
  T block[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, n - i);
    for (int64_t j = 0; j < lanes; ++j) block[j] = src[(i + j) * stride];
    store(dst + i, load(block), lanes);
  }
}

template <class T>
FASTCSS_INLINE void write(T* dst, const float* src, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  if (i < n) store(dst + i, load(src + i, n - i), n - i);
}

FASTCSS_INLINE float inverse(float square) { return 1.f / std::max(std::sqrt(square), kShortest); }

}  // namespace

FASTCSS_CLONES void read_row(float* dst, Matrix m, int64_t n) {
  if (m.dtype == DType::f32) read(dst, static_cast<const float*>(m.data), m.k_stride, n);
  if (m.dtype == DType::bf16) read(dst, static_cast<const BFloat16*>(m.data), m.k_stride, n);
  if (m.dtype == DType::f16) read(dst, static_cast<const _Float16*>(m.data), m.k_stride, n);
}

FASTCSS_CLONES void write_row(void* dst, DType dtype, const float* src, int64_t n) {
  if (dtype == DType::f32) write(static_cast<float*>(dst), src, n);
  if (dtype == DType::bf16) write(static_cast<BFloat16*>(dst), src, n);
  if (dtype == DType::f16) write(static_cast<_Float16*>(dst), src, n);
}

FASTCSS_CLONES float dot(const float* x, const float* y, int64_t n) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int v = 0; v < 4; ++v) sums[v] += load(x + i + v * kLanes) * load(y + i + v * kLanes);
  for (; i + kLanes <= n; i += kLanes) sums[0] += load(x + i) * load(y + i);
  if (i < n) sums[1] += load(x + i, n - i) * load(y + i, n - i);
  const Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0;
  for (int j = 0; j < kLanes; ++j) total += sum[j];
  return total;
}

FASTCSS_CLONES void add_scaled(float* sum, float factor, const float* term, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * term[i];
}

float inverse_length(const float* row, int64_t n) { return inverse(dot(row, row, n)); }

FASTCSS_CLONES void inverse_lengths(const float* panel, int width, int lanes, int64_t words, bool pairs,
                                    float* result) {
  constexpr int64_t kBlock = 32;  // words summed before they join the rest: bounds the rounding error
  for (int first = 0; first < lanes; first += kLanes) {
    Vec total = {};
    for (int64_t k = 0; k < words; k += kBlock) {
      Vec sum = {};
      for (int64_t i = k; i < std::min(words, k + kBlock); ++i) {
        const Vec word = load(panel + i * width + first);
        if (pairs) {
          const Bits bits = reinterpret_cast<Bits>(word);
          const Vec low = reinterpret_cast<Vec>(bits << 16), high = reinterpret_cast<Vec>(bits & 0xffff0000);
          sum += low * low + high * high;
        } else {
          sum += word * word;
        }
      }
      total += sum;
    }
    for (int i = first; i < std::min(lanes, first + kLanes); ++i) result[i] = inverse(total[i - first]);
  }
}

}  // namespace fastcss::cpu
