// fastcss::window_attention.cpu: each window's tokens are read from where they lie in the map, head by head, and what
// they attend to is written there.

#include "left_product.h"
#include "windows.h"

namespace fastcss::cpu {
namespace {

constexpr int64_t kRun = 4;  // windows of an item of work: while one is computed, the next is fetched

Tensor window_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& bias,
                        const Tensor& pad_key, const Tensor& pad_value, int64_t window, int64_t shift, double scale) {
  const Tensor q = with_tokens(q_any), k = with_tokens(k_any), v = with_tokens(v_any);
  const Windows w(q, bias, window, shift, scale);
  Tensor out = torch::stable::new_empty(q, shape({w.B, w.H, w.W, w.heads * w.D}));
  const int64_t rows = w.n * w.width;
  const int64_t runs = ceil_div(w.count(), kRun);
  parallel(w.B * runs, [&](int64_t item) {
    const int64_t b = item / runs, first = item % runs * kRun, last = std::min(w.count(), first + kRun);
    std::vector<int64_t> places(w.n), next(w.n);
    w.tokens(first, next.data());
    float* scores = local_workspace.get(w.scores() + 3 * rows + w.panels * kCols * (w.D + 1) + w.width);
    float *staged = scores + w.scores(), *keys = staged + rows, *values = keys + rows, *packed = values + rows;
    float *inverse = packed + w.panels * kCols * w.D, *padding = inverse + w.panels * kCols;
    for (int64_t index = first; index < last; ++index) {
      places.swap(next);
      w.tokens(std::min(index + 1, last - 1), next.data());
      for (int64_t h = 0; h < w.heads; ++h) {
        gather_rows(staged, w, head_of(q, b, h), places.data(), nullptr);
        read_padding(padding, pad_key, b, h, w.D);
        gather_rows(keys, w, head_of(k, b, h), places.data(), padding);
        read_padding(padding, pad_value, b, h, w.D);
        gather_rows(values, w, head_of(v, b, h), places.data(), padding);
        const bool more = h + 1 < w.heads;
        for (const Tensor* x : {&q, &k, &v})
          fetch_rows(w, head_of(*x, b, more ? h + 1 : 0), more ? places.data() : next.data());

        pack_queries(packed, w, staged, w.scale);
        for (int64_t j = 0; j < w.panels; ++j)
          left_product(w.n, w.D, {keys, w.width, 1}, packed + j * w.D * kCols, kCols, scores + j * w.n * kCols, kCols,
                       false);
        window_softmax(scores, w.bias(h), w.mask(index), w.n, w.panels, inverse);
        for (int64_t j = 0; j < w.panels; ++j)
          for (int64_t c = 0; c < w.width; c += kCols)
            left_product(std::min<int64_t>(kCols, w.n - j * kCols), w.n, {scores + j * w.n * kCols, 1, kCols},
                         values + c, w.width, staged + j * kCols * w.width + c, w.width, false);
        scale_rows(staged, inverse, w.n, w.width);
        scatter_rows(image(out, b, w.dtype) + h * w.D * size_of(w.dtype), w.heads * w.D, w, places.data(), staged);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("window_attention.cpu", FASTCSS_BOX(&fastcss::cpu::window_attention));
}
