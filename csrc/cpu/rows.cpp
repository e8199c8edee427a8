#include "rows.h"

#include <cmath>

namespace fastcss::cpu {
namespace {

constexpr float kShortest = 1e-12f;

template <class V, class T>
FASTCSS_INLINE void read(float* dst, const T* src, int64_t stride, int64_t n) {
  constexpr int kWide = kLanesIn<V>;
  if (stride == 1) {
    int64_t i = 0;
    for (; i + kWide <= n; i += kWide) store(dst + i, load<V>(src + i));
    if (i < n) store(dst + i, load<V>(src + i, n - i), n - i);
    return;
  }
  T block[kWide] = {};
  for (int64_t i = 0; i < n; i += kWide) {
    const int64_t lanes = std::min<int64_t>(kWide, n - i);
    for (int64_t j = 0; j < lanes; ++j) block[j] = src[(i + j) * stride];
    store(dst + i, load<V>(block), lanes);
  }
}

template <class V, class T>
FASTCSS_INLINE void write(T* dst, const float* src, int64_t n) {
  int64_t i = 0;
  for (; i + kLanesIn<V> <= n; i += kLanesIn<V>) store(dst + i, load<V>(src + i));
  if (i < n) store(dst + i, load<V>(src + i, n - i), n - i);
}

FASTCSS_INLINE float inverse(float square) { return 1.f / std::max(std::sqrt(square), kShortest); }

}  // namespace

void read_row(float* dst, Matrix m, int64_t n) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    if (m.dtype == DType::f32) read<V>(dst, static_cast<const float*>(m.data), m.k_stride, n);
    if (m.dtype == DType::bf16) read<V>(dst, static_cast<const BFloat16*>(m.data), m.k_stride, n);
    if (m.dtype == DType::f16) read<V>(dst, static_cast<const Float16*>(m.data), m.k_stride, n);
  });
}

void write_row(void* dst, DType dtype, const float* src, int64_t n) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    if (dtype == DType::f32) write<V>(static_cast<float*>(dst), src, n);
    if (dtype == DType::bf16) write<V>(static_cast<BFloat16*>(dst), src, n);
    if (dtype == DType::f16) write<V>(static_cast<Float16*>(dst), src, n);
  });
}

float dot(const float* x, const float* y, int64_t n) {
  float total = 0;
  on_widest([=, &total]<class V>() FASTCSS_LOOP {
    constexpr int kWide = kLanesIn<V>;
    V sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWide <= n; i += 4 * kWide)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sums[v] += load<V>(x + i + v * kWide) * load<V>(y + i + v * kWide);
    for (; i + kWide <= n; i += kWide) sums[0] += load<V>(x + i) * load<V>(y + i);
    if (i < n) sums[1] += load<V>(x + i, n - i) * load<V>(y + i, n - i);
    const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int j = 0; j < kWide; ++j) total += sum[j];
  });
  return total;
}

FASTCSS_CLONES void add_scaled(float* sum, float factor, const float* term, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * term[i];
}

float inverse_length(const float* row, int64_t n) { return inverse(dot(row, row, n)); }

void inverse_lengths(const float* panel, int width, int lanes, int64_t words, bool pairs, float* result) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    constexpr int64_t kBlock = 32;  // words summed before they join the rest: bounds the rounding error
    for (int first = 0; first < lanes; first += kLanesIn<V>) {
      V total = {};
      for (int64_t k = 0; k < words; k += kBlock) {
        V sum = {};
        for (int64_t i = k; i < std::min(words, k + kBlock); ++i) {
          const V word = load<V>(panel + i * width + first);
          if (pairs) {
            const BitsOf<V> bits = reinterpret_cast<BitsOf<V>>(word);
            const V low = reinterpret_cast<V>(bits << 16), high = reinterpret_cast<V>(bits & 0xffff0000);
            sum += low * low + high * high;
          } else {
            sum += word * word;
          }
        }
        total += sum;
      }
      for (int i = first; i < std::min(lanes, first + kLanesIn<V>); ++i) result[i] = inverse(total[i - first]);
    }
  });
}

}  // namespace fastcss::cpu
