#include "windows.h"

#include "rows.h"
#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "window_attention";
constexpr float kApart = -100.f;

template <class V, class T>
FASTCSS_INLINE void gather(float* dst, int64_t width, const T* map, int64_t stride, int64_t D, int64_t n,
                           const int64_t* places, const float* padding) {
  constexpr int kWide = kLanesIn<V>;
  for (int64_t i = 0; i < n; ++i, dst += width) {
    const T* src = places[i] == kPadding ? map : map + places[i] * stride;
    for (int64_t d = 0; d < width; d += kWide) {
      V row = {};
      const int64_t lanes = std::min<int64_t>(kWide, D - d);
      if (lanes > 0 && places[i] == kPadding)
        row = padding == nullptr ? V{} : load<V>(padding + d, lanes);
      else if (lanes > 0)
        row = lanes == kWide ? load<V>(src + d) : load<V>(src + d, lanes);
      store(dst + d, row);
    }
  }
}

template <class V, class T>
FASTCSS_INLINE void scatter(T* map, int64_t stride, int64_t D, int64_t n, const int64_t* places, const float* src,
                            int64_t width) {
  constexpr int kWide = kLanesIn<V>;
  for (int64_t i = 0; i < n; ++i, src += width) {
    if (places[i] == kPadding) continue;
    T* to = map + places[i] * stride;
    for (int64_t d = 0; d < D; d += kWide)
      d + kWide <= D ? store(to + d, load<V>(src + d)) : store(to + d, load<V>(src + d), D - d);
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

void gather_rows(float* dst, const Windows& w, Matrix map, const int64_t* places, const float* padding) {
  on_widest([=, width = w.width, D = w.D, n = w.n]<class V>() FASTCSS_LOOP {
    if (map.dtype == DType::f32)
      gather<V>(dst, width, static_cast<const float*>(map.data), map.lane_stride, D, n, places, padding);
    if (map.dtype == DType::bf16)
      gather<V>(dst, width, static_cast<const BFloat16*>(map.data), map.lane_stride, D, n, places, padding);
    if (map.dtype == DType::f16)
      gather<V>(dst, width, static_cast<const Float16*>(map.data), map.lane_stride, D, n, places, padding);
  });
}

void fetch_rows(const Windows& w, Matrix map, const int64_t* places) {
  for (int64_t i = 0; i < w.n; ++i) {
    if (places[i] == kPadding) continue;
    const char* row = static_cast<const char*>(map.at(places[i], 0).data);
    for (int64_t byte = 0; byte < w.D * size_of(w.dtype); byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

void scatter_rows(void* map, int64_t stride, const Windows& w, const int64_t* places, const float* src) {
  on_widest([=, dtype = w.dtype, width = w.width, D = w.D, n = w.n]<class V>() FASTCSS_LOOP {
    if (dtype == DType::f32) scatter<V>(static_cast<float*>(map), stride, D, n, places, src, width);
    if (dtype == DType::bf16) scatter<V>(static_cast<BFloat16*>(map), stride, D, n, places, src, width);
    if (dtype == DType::f16) scatter<V>(static_cast<Float16*>(map), stride, D, n, places, src, width);
  });
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

void window_softmax(float* scores, const float* bias, const float* mask, int64_t n, int64_t panels, float* inverse) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int64_t lane = 0; lane < panels * kCols; lane += kLanesIn<V>) {
      const int64_t panel = lane / kCols * n * kCols + lane % kCols;
      V most = -__builtin_inff() - V{};
      for (int64_t key = 0; key < n; ++key) {
        float* at = scores + panel + key * kCols;
        V t = load<V>(at) + load<V>(bias + panel + key * kCols);
        if (mask != nullptr) t += load<V>(mask + panel + key * kCols);
        store(at, t);
        most = t > most ? t : most;
      }
      V sum = {};
      for (int64_t key = 0; key < n; ++key) {
        float* at = scores + panel + key * kCols;
        const V e = exp_negative(load<V>(at) - most);
        store(at, e);
        sum += e;
      }
      store(inverse + lane, 1.f / sum);
    }
  });
}

void scale_rows(float* rows, const float* factor, int64_t n, int64_t width) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < width; d += kLanesIn<V>)
        store(rows + i * width + d, load<V>(rows + i * width + d) * factor[i]);
  });
}

void window_softmax_backward(float* weights, float* dweights, const float* inverse, int64_t n, int64_t panels) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int64_t lane = 0; lane < panels * kCols; lane += kLanesIn<V>) {
      const int64_t panel = lane / kCols * n * kCols + lane % kCols;
      const V share = load<V>(inverse + lane);
      V delta = {};
      for (int64_t key = 0; key < n; ++key) {
        float* at = weights + panel + key * kCols;
        const V p = load<V>(at) * share;
        store(at, p);
        delta += p * load<V>(dweights + panel + key * kCols);
      }
      for (int64_t key = 0; key < n; ++key) {
        float* at = dweights + panel + key * kCols;
        store(at, load<V>(weights + panel + key * kCols) * (load<V>(at) - delta));
      }
    }
  });
}

}  // namespace fastcss::cpu
