// fastcss::mlp.cpu: x + W₂ gelu(W₁ norm(x) + b₁) + b₂, a block of rows at a time. What lies between the two products,
// in a transformer four times as wide as x, stays in the cache.

#include <cmath>
#include <optional>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "tensors.h"
#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "mlp";

// A weight [N, K] packed by columns of the product, and its bias.
struct Layer {
  int64_t N, K;
  const float* packed;      // [column panels][K][kCols]
  std::vector<float> bias;  // [N rounded up to kCols], zeros for none

  int64_t panels() const { return ceil_div(N, kCols); }
  int columns(int64_t c) const { return static_cast<int>(std::min<int64_t>(kCols, N - c * kCols)); }
};

int64_t packed_size(const Tensor& weight) { return ceil_div(weight.size(0), kCols) * kCols * weight.size(1); }

Layer packed_layer(const Tensor& weight, const std::optional<Tensor>& bias, float* to) {
  Layer layer{weight.size(0), weight.size(1), to, {}};
  layer.bias.resize(layer.panels() * kCols);
  parallel(layer.panels(), [&](int64_t c) {
    const int cols = layer.columns(c);
    pack(to + c * layer.K * kCols, kCols, cols, layer.K, matrix(weight, 0, 1, kOp).at(c * kCols, 0));
    if (bias) pack(&layer.bias[c * kCols], kCols, cols, 1, matrix(*bias, 0, 0, kOp).at(c * kCols, 0));
  });
  return layer;
}

struct Norm {
  const float *weight, *bias;
  float eps;
};

template <class V>
FASTCSS_INLINE float sum_of(V v) {
  float sum = 0;
  for (int i = 0; i < kLanesIn<V>; ++i) sum += v[i];
  return sum;
}

void normalize(const float* x, int64_t n, Norm norm, float* out) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    constexpr int64_t kWide = kLanesIn<V>;
    const int64_t whole = n / kWide * kWide;
    V sums{}, squares{};
    for (int64_t i = 0; i < whole; i += kWide) sums += load<V>(x + i);
    float sum = sum_of(sums), square = 0;
    for (int64_t i = whole; i < n; ++i) sum += x[i];
    const float mean = sum / n;
    for (int64_t i = 0; i < whole; i += kWide) {
      const V difference = load<V>(x + i) - mean;
      squares += difference * difference;
    }
    square = sum_of(squares);
    for (int64_t i = whole; i < n; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.f / std::sqrt(square / n + norm.eps);
    for (int64_t i = 0; i < whole; i += kWide)
      store(out + i, (load<V>(x + i) - mean) * scale * load<V>(norm.weight + i) + load<V>(norm.bias + i));
    for (int64_t i = whole; i < n; ++i) out[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
  });
}

// erfc(z) for z ≥ 0: relative error 1.2e-7 (Numerical Recipes, "erfcc").
template <class V>
FASTCSS_INLINE V erfc(V z) {
  const V t = 1.f / (1.f + 0.5f * z);
  V p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  return t * exp_negative(p - z * z);
}

void gelu(float* x, int64_t n) {  // n is a multiple of kCols
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int64_t i = 0; i < n; i += kLanesIn<V>) {
      const V v = load<V>(x + i);
      const V below = 0.5f * erfc<V>((v < 0.f ? -v : v) * 0.70710678f);  // Φ(−|x|)
      store(x + i, v * (v < 0.f ? below : 1.f - below));
    }
  });
}

FASTCSS_CLONES void add_rows(const float* x, const float* tile, int rows, int cols, int64_t ld, float* out) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) out[i * ld + j] = x[i * ld + j] + tile[i * kCols + j];
}

Tensor mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& weight1,
           const std::optional<Tensor>& bias1, const Tensor& weight2, const std::optional<Tensor>& bias2) {
  const int64_t M = x.size(0), K = x.size(1), H = weight1.size(0);
  for (const Tensor* t : {&x, &norm_weight, &norm_bias, &weight1, &weight2})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "mlp: the tensors must be float32");
  STD_TORCH_CHECK(x.is_contiguous() && norm_weight.is_contiguous() && norm_bias.is_contiguous(),
                  "mlp: x and the norm must be contiguous");
  STD_TORCH_CHECK(norm_weight.numel() == K && norm_bias.numel() == K && weight1.size(1) == K && weight2.size(0) == K &&
                      weight2.size(1) == H && (!bias1 || bias1->numel() == H) && (!bias2 || bias2->numel() == K),
                  "mlp: x, the norm and the layers do not fit together");
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const float* in = static_cast<const float*>(x.const_data_ptr());
  float* out = static_cast<float*>(y.mutable_data_ptr());
  const Norm norm{static_cast<const float*>(norm_weight.const_data_ptr()),
                  static_cast<const float*>(norm_bias.const_data_ptr()), static_cast<float>(eps)};

  float* weights = shared_workspace.get(packed_size(weight1) + packed_size(weight2));
  const Layer first = packed_layer(weight1, bias1, weights);
  const Layer second = packed_layer(weight2, bias2, weights + packed_size(weight1));

  const Kernel& kernel_of = kernel();
  const int height = kernel_of.rows;
  // pack() writes up to kLanes floats past the end.
  const int64_t rows_size = K * height + kLanes, hidden_size = H * height + kLanes;
  // The normalized panels of a block share the L2 cache; a packed column panel meets all of them.
  const int64_t panels = ceil_div(M, height), threads = torch::stable::get_num_threads();
  const int64_t most = std::clamp<int64_t>((512 << 10) / (rows_size * 4), 1, 32);
  const int64_t block = std::clamp<int64_t>(ceil_div(panels, 2 * threads), 1, most);
  parallel(ceil_div(panels, block), [&](int64_t b) {
    const int64_t start = b * block, count = std::min(block, panels - start);
    float* rows = local_workspace.get(block * (rows_size + hidden_size) + K * height);
    float *hidden = rows + block * rows_size, *normalized = hidden + block * hidden_size;
    alignas(64) float tile[kMaxRows * kCols];
    const auto rows_of = [&](int64_t p) { return static_cast<int>(std::min<int64_t>(height, M - p * height)); };
    for (int64_t p = 0; p < count; ++p) {
      const int64_t row = (start + p) * height;
      for (int i = 0; i < rows_of(start + p); ++i) normalize(in + (row + i) * K, K, norm, normalized + i * K);
      pack(rows + p * rows_size, height, rows_of(start + p), K, Matrix{normalized, DType::f32, K, 1});
    }
    for (int64_t c = 0; c < first.panels(); ++c)
      for (int64_t p = 0; p < count; ++p) {
        const int n = rows_of(start + p), cols = first.columns(c);
        kernel_of(n, cols, K, rows + p * rows_size, first.packed + c * K * kCols, kCols, &first.bias[c * kCols], 0,
                  tile, kCols);
        gelu(tile, n * kCols);
        pack(hidden + p * hidden_size + c * kCols * height, height, n, cols, Matrix{tile, DType::f32, kCols, 1});
      }
    for (int64_t c = 0; c < second.panels(); ++c)
      for (int64_t p = 0; p < count; ++p) {
        const int n = rows_of(start + p), cols = second.columns(c);
        kernel_of(n, cols, H, hidden + p * hidden_size, second.packed + c * H * kCols, kCols, &second.bias[c * kCols],
                  0, tile, kCols);
        const int64_t at = (start + p) * height * K + c * kCols;
        add_rows(in + at, tile, n, cols, K, out + at);
      }
  });
  return y;
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("mlp.cpu", FASTCSS_BOX(&fastcss::cpu::mlp)); }
