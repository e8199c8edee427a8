#include "windows.h"

#include "rows.h"
#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "window_attention";
constexpr float kApart = -100.f;

template <class T>
FASTCSS_INLINE void gather(float* dst, int64_t width, const T* map, int64_t stride, int64_t D, int64_t n,
                           const int64_t* places, const float* padding) {
  for (int64_t i = 0; i < n; ++i, dst += width) {
    const T* src = places[i] == kPadding ? map : map + places[i] * stride;
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec row = {};
      const int64_t lanes = std::min<int64_t>(kLanes, D - d);
      if (lanes > 0 && places[i] == kPadding)
        row = padding == nullptr ? Vec{} : load(padding + d, lanes);
      else if (lanes > 0)
        row = lanes == kLanes ? load(src + d) : load(src + d, lanes);
      store(dst + d, row);
    }
  }
}

template <class T>
FASTCSS_INLINE void scatter(T* map, int64_t stride, int64_t D, int64_t n, const int64_t* places, const float* src,
                            int64_t width) {
  for (int64_t i = 0; i < n; ++i, src += width) {
    if (places[i] == kPadding) continue;
    T* to = map + places[i] * stride;
    for (int64_t d = 0; d < D; d += kLanes)
      d + kLanes <= D ? store(to + d, load(src + d)) : store(to + d, load(src + d), D - d);
  }
}

}  // namespace

Tensor with_tokens(const Tensor& x) {
  const bool channels = x.size(4) <= 1 || x.stride(4) == 1;
  const bool tokens = x.size(1) <= 1 || x.size(2) <= 1 || x.stride(1) == x.size(2) * x.stride(2);
  return channels && tokens ? x : torch::stable::contiguous(x);
}

Matrix head_of(const Tensor& x, int64_t b, int64_t h) {
  return matrix(x, x.size(2) > 1 ? 2 : 1, 4, kOp).offset(b * x.stride(0) + h * x.stride(3));
}

void read_padding(float* dst, const Tensor& pad, int64_t b, int64_t h, int64_t D) {
  read_row(dst, matrix(pad, 0, 2, kOp).offset(b * pad.stride(0) + h * pad.stride(1)), D);
}

Windows::Windows(const Tensor& q, const Tensor& bias, int64_t window, int64_t shift, double scale)
    : B(q.size(0)),
      H(q.size(1)),
      W(q.size(2)),
      heads(q.size(3)),
      D(q.size(4)),
      window(window),
      shift(shift),
      rows(ceil_div(H, window)),
      columns(ceil_div(W, window)),
      n(window * window),
      panels(ceil_div(n, kCols)),
      width(ceil_div(D, kCols) * kCols),
      scale(static_cast<float>(scale)),
      dtype(dtype_of(q, kOp)),
      bias_(heads * scores()),
      masks_(shift > 0 ? 4 * scores() : 0) {
  const auto at = [&](int64_t key, int64_t query) { return (query / kCols * n + key) * kCols + query % kCols; };
  std::vector<float> row(n);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t query = 0; query < n; ++query) {
      read_row(row.data(), matrix(bias, 1, 2, kOp).offset(h * bias.stride(0)).at(query, 0), n);
      for (int64_t key = 0; key < n; ++key) bias_[h * scores() + at(key, query)] = row[key];
    }
  if (shift == 0) return;
  for (int64_t kind = 0; kind < 4; ++kind) {  // bit 0: of the last column, bit 1: of the last row
    const auto region = [&](int64_t token) {
      const bool below = kind & 2 && token / window >= window - shift;
      const bool right = kind & 1 && token % window >= window - shift;
      return 2 * below + right;
    };
    for (int64_t query = 0; query < n; ++query)
      for (int64_t key = 0; key < n; ++key)
        masks_[kind * scores() + at(key, query)] = region(key) == region(query) ? 0.f : kApart;
  }
}

const float* Windows::mask(int64_t index) const {
  const bool below = index / columns == rows - 1, right = index % columns == columns - 1;
  return shift > 0 && (below || right) ? masks_.data() + (2 * below + right) * scores() : nullptr;
}

void Windows::tokens(int64_t index, int64_t* places) const {
  const int64_t top = index / columns * window + shift, left = index % columns * window + shift;
  for (int64_t i = 0; i < window; ++i) {
    const int64_t y = (top + i) % (rows * window);
    for (int64_t j = 0; j < window; ++j) {
      const int64_t x = (left + j) % (columns * window);
      *places++ = y < H && x < W ? y * W + x : kPadding;
    }
  }
}

FASTCSS_CLONES void gather_rows(float* dst, const Windows& w, Matrix map, const int64_t* places, const float* padding) {
  if (map.dtype == DType::f32)
    gather(dst, w.width, static_cast<const float*>(map.data), map.lane_stride, w.D, w.n, places, padding);
  if (map.dtype == DType::bf16)
    gather(dst, w.width, static_cast<const BFloat16*>(map.data), map.lane_stride, w.D, w.n, places, padding);
  if (map.dtype == DType::f16)
    gather(dst, w.width, static_cast<const _Float16*>(map.data), map.lane_stride, w.D, w.n, places, padding);
}

void fetch_rows(const Windows& w, Matrix map, const int64_t* places) {
  for (int64_t i = 0; i < w.n; ++i) {
    if (places[i] == kPadding) continue;
    const char* row = static_cast<const char*>(map.at(places[i], 0).data);
    for (int64_t byte = 0; byte < w.D * size_of(w.dtype); byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

FASTCSS_CLONES void scatter_rows(void* map, int64_t stride, const Windows& w, const int64_t* places, const float* src) {
  if (w.dtype == DType::f32) scatter(static_cast<float*>(map), stride, w.D, w.n, places, src, w.width);
  if (w.dtype == DType::bf16) scatter(static_cast<BFloat16*>(map), stride, w.D, w.n, places, src, w.width);
  if (w.dtype == DType::f16) scatter(static_cast<_Float16*>(map), stride, w.D, w.n, places, src, w.width);
}

FASTCSS_CLONES void sum_padding(float* sum, const Windows& w, const int64_t* places, const float* rows) {
  for (int64_t i = 0; i < w.n; ++i)
    for (int64_t d = 0; d < w.width && places[i] == kPadding; ++d) sum[d] += rows[i * w.width + d];
}

FASTCSS_CLONES void multiply(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

void pack_queries(float* packed, const Windows& w, const float* rows, float factor) {
  for (int64_t j = 0; j < w.panels; ++j, packed += w.D * kCols) {
    const int lanes = static_cast<int>(std::min<int64_t>(kCols, w.n - j * kCols));
    if (lanes <= kCols - kLanes) std::fill_n(packed, w.D * kCols, 0.f);
    pack(packed, kCols, lanes, w.D, {rows + j * kCols * w.width, DType::f32, w.width, 1});
    multiply(packed, factor, w.D * kCols);
  }
}

FASTCSS_CLONES void window_softmax(float* scores, const float* bias, const float* mask, int64_t n, int64_t panels,
                                   float* inverse) {
  for (int64_t lane = 0; lane < panels * kCols; lane += kLanes) {
    const int64_t panel = lane / kCols * n * kCols + lane % kCols;
    Vec most = -__builtin_inff() - Vec{};
    for (int64_t key = 0; key < n; ++key) {
      float* at = scores + panel + key * kCols;
      Vec t = load(at) + load(bias + panel + key * kCols);
      if (mask != nullptr) t += load(mask + panel + key * kCols);
      store(at, t);
      most = t > most ? t : most;
    }
    Vec sum = {};
    for (int64_t key = 0; key < n; ++key) {
      float* at = scores + panel + key * kCols;
      const Vec e = exp_negative(load(at) - most);
      store(at, e);
      sum += e;
    }
    store(inverse + lane, 1.f / sum);
  }
}

FASTCSS_CLONES void scale_rows(float* rows, const float* factor, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < width; d += kLanes) store(rows + i * width + d, load(rows + i * width + d) * factor[i]);
}

FASTCSS_CLONES void window_softmax_backward(float* weights, float* dweights, const float* inverse, int64_t n,
                                            int64_t panels) {
  for (int64_t lane = 0; lane < panels * kCols; lane += kLanes) {
    const int64_t panel = lane / kCols * n * kCols + lane % kCols;
    const Vec share = load(inverse + lane);
    Vec delta = {};
    for (int64_t key = 0; key < n; ++key) {
      float* at = weights + panel + key * kCols;
      const Vec p = load(at) * share;
      store(at, p);
      delta += p * load(dweights + panel + key * kCols);
    }
    for (int64_t key = 0; key < n; ++key) {
      float* at = dweights + panel + key * kCols;
      store(at, load(weights + panel + key * kCols) * (load(at) - delta));
    }
  }
}

}  // namespace fastcss::cpu
