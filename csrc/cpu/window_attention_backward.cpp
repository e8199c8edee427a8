// fastcss::window_attention_backward.cpu: each window's weights are computed again. A token is in one window only, so
// its gradients are written once; those of the bias and of the padding are summed over the windows, in their order.

#include <tuple>

#include "left_product.h"
#include "rows.h"
#include "windows.h"

namespace fastcss::cpu {
namespace {

constexpr int64_t kGroup = 8;  // windows that share one sum, whatever the number of threads

struct Inputs {
  Tensor dout, q, k, v, pad_key, pad_value;  // dout [B, H, W, heads, D]
};
struct Gradients {
  Tensor dq, dk, dv;
};

class Backward {
 public:
  Backward(const Windows& w, const Inputs& in, const Gradients& out, bool need_bias)
      : w_(w), in_(in), out_(out), need_bias_(need_bias), groups_(ceil_div(w.count(), kGroup)) {
    size_ = 2 * w.width + (need_bias ? w.scores() : 0);
    sums_ = shared_workspace.get(w.B * groups_ * w.heads * size_);
  }

  void run() {
    parallel(w_.B * groups_ * w_.heads, [&](int64_t item) { group(item); });
  }
  void finish(const Tensor& dbias, const Tensor& dpad_key, const Tensor& dpad_value) const;

 private:
  // Each sample, group and head has dpad_key and dpad_value [width], and dbias [panel][n][kCols].
  float* sums(int64_t b, int64_t group, int64_t head) const {
    return sums_ + ((b * groups_ + group) * w_.heads + head) * size_;
  }
  void group(int64_t item);

  const Windows& w_;
  const Inputs& in_;
  const Gradients& out_;
  const bool need_bias_;
  const int64_t groups_;
  int64_t size_;
  float* sums_;
};

void Backward::group(int64_t item) {
  const int64_t head = item % w_.heads, group = item / w_.heads % groups_, b = item / w_.heads / groups_;
  const int64_t n = w_.n, width = w_.width, rows = n * width, packed_size = w_.panels * kCols * w_.D;
  float* sum = sums(b, group, head);
  std::fill_n(sum, size_, 0.f);
  float* weights = local_workspace.get(2 * w_.scores() + 5 * rows + packed_size + w_.panels * kCols + 2 * width);
  float *dweights = weights + w_.scores(), *q = dweights + w_.scores(), *k = q + rows, *v = k + rows;
  float *dout = v + rows, *result = dout + rows, *packed = result + rows, *inverse = packed + packed_size;
  float *pad_key = inverse + w_.panels * kCols, *pad_value = pad_key + width;
  read_padding(pad_key, in_.pad_key, b, head, w_.D);
  read_padding(pad_value, in_.pad_value, b, head, w_.D);
  std::vector<int64_t> places(n);
  const auto queries = [&](int64_t j) { return std::min<int64_t>(kCols, n - j * kCols); };
  // scores [panel][n][kCols] = keys · queriesᵀ
  const auto scores = [&](const float* keys, const float* of_queries, float factor, float* to) {
    pack_queries(packed, w_, of_queries, factor);
    for (int64_t j = 0; j < w_.panels; ++j)
      left_product(n, w_.D, {keys, width, 1}, packed + j * w_.D * kCols, kCols, to + j * n * kCols, kCols, false);
  };
  // result [n][width] = map · rows, summed over the queries
  const auto of_keys = [&](const float* map, const float* of_queries) {
    for (int64_t c = 0; c < width; c += kCols)
      for (int64_t j = 0; j < w_.panels; ++j)
        left_product(n, queries(j), {map + j * n * kCols, kCols, 1}, of_queries + j * kCols * width + c, width,
                     result + c, width, j > 0);
  };
  const auto write = [&](const Tensor& x) {
    scatter_rows(image(x, b, w_.dtype) + head * w_.D * size_of(w_.dtype), w_.heads * w_.D, w_, places.data(), result);
  };
  const std::vector<float> scales(n, w_.scale);
  for (int64_t index = group * kGroup; index < std::min(w_.count(), (group + 1) * kGroup); ++index) {
    w_.tokens(index, places.data());
    gather_rows(q, w_, head_of(in_.q, b, head), places.data(), nullptr);
    gather_rows(k, w_, head_of(in_.k, b, head), places.data(), pad_key);
    gather_rows(v, w_, head_of(in_.v, b, head), places.data(), pad_value);
    gather_rows(dout, w_, head_of(in_.dout, b, head), places.data(), nullptr);
    scores(k, q, w_.scale, weights);
    window_softmax(weights, w_.bias(head), w_.mask(index), n, w_.panels, inverse);
    scores(v, dout, 1, dweights);
    window_softmax_backward(weights, dweights, inverse, n, w_.panels);
    if (need_bias_) add(sum + 2 * width, dweights, w_.scores());

    of_keys(weights, dout);
    write(out_.dv), sum_padding(sum + width, w_, places.data(), result);
    of_keys(dweights, q);
    scale_rows(result, scales.data(), n, width);
    write(out_.dk), sum_padding(sum, w_, places.data(), result);
    for (int64_t j = 0; j < w_.panels; ++j)
      for (int64_t c = 0; c < width; c += kCols)
        left_product(queries(j), n, {dweights + j * n * kCols, 1, kCols}, k + c, width, result + j * kCols * width + c,
                     width, false);
    scale_rows(result, scales.data(), n, width);
    write(out_.dq);
  }
}

void Backward::finish(const Tensor& dbias, const Tensor& dpad_key, const Tensor& dpad_value) const {
  const DType dtype = w_.dtype;
  std::vector<float> all(w_.heads * size_), row(w_.n), pads(w_.heads * size_);
  for (int64_t b = 0; b < w_.B; ++b) {
    std::fill(pads.begin(), pads.end(), 0.f);
    for (int64_t group = 0; group < groups_; ++group) add(pads.data(), sums(b, group, 0), w_.heads * size_);
    for (int64_t h = 0; h < w_.heads; ++h) {
      const int64_t at = h * w_.D * size_of(dtype);
      write_row(image(dpad_key, b, dtype) + at, dtype, &pads[h * size_], w_.D);
      write_row(image(dpad_value, b, dtype) + at, dtype, &pads[h * size_ + w_.width], w_.D);
    }
    add(all.data(), pads.data(), w_.heads * size_);
  }
  for (int64_t h = 0; need_bias_ && h < w_.heads; ++h)
    for (int64_t query = 0; query < w_.n; ++query) {
      const float* lane = &all[h * size_ + 2 * w_.width] + query / kCols * w_.n * kCols + query % kCols;
      for (int64_t key = 0; key < w_.n; ++key) row[key] = lane[key * kCols];
      write_row(image(dbias, h, dtype) + query * w_.n * size_of(dtype), dtype, row.data(), w_.n);
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& pad_key,
    const Tensor& pad_value, int64_t window, int64_t shift, double scale, bool need_bias) {
  const Windows w(q, bias, window, shift, scale);
  const Tensor by_head = torch::stable::view(torch::stable::contiguous(dout), shape({w.B, w.H, w.W, w.heads, w.D}));
  const Inputs in{by_head, with_tokens(q), with_tokens(k), with_tokens(v), pad_key, pad_value};
  const auto like = [](const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); };
  const Gradients out{like(q), like(k), like(v)};
  const Tensor dbias = need_bias ? like(bias) : torch::stable::new_empty(bias, shape({0}));
  const Tensor dpad_key = like(pad_key), dpad_value = like(pad_value);
  Backward backward(w, in, out, need_bias);
  backward.run();
  backward.finish(dbias, dpad_key, dpad_value);
  return {out.dq, out.dk, out.dv, dbias, dpad_key, dpad_value};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("window_attention_backward.cpu", FASTCSS_BOX(&fastcss::cpu::window_attention_backward));
}
