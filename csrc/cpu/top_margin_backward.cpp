// The backward pass of fastcss::top_margin.cpu. With p the softmax, t the true class and r its rival, every result is a
// function of z_t − z_r, p_t and p_r: dz_j = a (δ_jt − p_j) + b (δ_jr − p_j) + dmargin (δ_jt − δ_jr).

#include <vector>

#include "parallel.h"
#include "rows.h"
#include "tensors.h"
#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "top_margin";
constexpr int64_t kPixels = 512;

// row = −factor · exp(row − lse)
FASTCSS_CLONES void spread(float* row, const float* lse, const float* factor, int64_t pixels) {
  for (int64_t i = 0; i < pixels; i += kLanes)
    store(row + i, -load(factor + i) * exp_negative(load(row + i) - load(lse + i)));
}

// a and b from the probabilities and the gradients of p_true, p_rival and the curvature
FASTCSS_CLONES void slopes(const float* p, const float* q, const float* dp, const float* dq, const float* dcurvature,
                           int64_t pixels, float* a, float* b) {
  for (int64_t i = 0; i < pixels; ++i) {
    const float twice = 2 * (p[i] - q[i]);
    a[i] = p[i] * (dp[i] + dcurvature[i] * (1 - twice));
    b[i] = q[i] * (dq[i] + dcurvature[i] * (1 + twice));
  }
}

Tensor top_margin_backward(const Tensor& dmargin, const Tensor& dp_true, const Tensor& dp_rival,
                           const Tensor& dcurvature, const Tensor& logits, const Tensor& own, const Tensor& rival,
                           const Tensor& lse) {
  const int64_t B = logits.size(0), C = logits.size(1), N = logits.size(2), tiles = ceil_div(N, kPixels);
  const DType dtype = dtype_of(logits, kOp);
  Tensor dlogits = torch::stable::new_empty(logits, logits.sizes());
  parallel(B * tiles, [&](int64_t item) {
    const int64_t b = item / tiles, first = item % tiles * kPixels, pixels = std::min(kPixels, N - first);
    const int64_t at = b * N + first;
    const int64_t* classes[2] = {static_cast<const int64_t*>(own.const_data_ptr()) + at,
                                 static_cast<const int64_t*>(rival.const_data_ptr()) + at};
    const Matrix z = matrix(logits, 1, 2, kOp).offset(b * logits.stride(0)).at(0, first);
    float given[4][kPixels] = {}, p[2][kPixels] = {}, slope[2][kPixels], sum[kPixels], shift[kPixels] = {};
    const Tensor* gradients[4] = {&dmargin, &dp_true, &dp_rival, &dcurvature};
    for (int n = 0; n < 4; ++n) read_row(given[n], matrix(*gradients[n], 0, 1, kOp).at(b, first), pixels);
    std::copy_n(static_cast<const float*>(lse.const_data_ptr()) + at, pixels, shift);
    for (int n = 0; n < 2; ++n)
      for (int64_t i = 0; i < pixels; ++i)
        if (classes[0][i] >= 0) read_row(p[n] + i, z.at(classes[n][i], 0).offset(i * z.k_stride), 1);
    const float minus_one[2] = {1.f, -1.f};
    std::vector<float> ones(kPixels, -1.f);
    for (auto& logit : p) spread(logit, shift, ones.data(), pixels);
    slopes(p[0], p[1], given[1], given[2], given[3], kPixels, slope[0], slope[1]);
    for (int64_t i = 0; i < kPixels; ++i) {
      if (i >= pixels || classes[0][i] < 0) slope[0][i] = slope[1][i] = given[0][i] = 0;
      sum[i] = slope[0][i] + slope[1][i];
    }
    float row[kPixels];
    char* to = image(dlogits, b, dtype) + first * size_of(dtype);
    for (int64_t c = 0; c < C; ++c) {
      read_row(row, z.at(c, 0), pixels);
      spread(row, shift, sum, pixels);
      for (int n = 0; n < 2; ++n)
        for (int64_t i = 0; i < pixels; ++i)
          row[i] += classes[n][i] == c ? slope[n][i] + minus_one[n] * given[0][i] : 0.f;
      write_row(to + c * N * size_of(dtype), dtype, row, pixels);
    }
  });
  return dlogits;
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("top_margin_backward.cpu", TORCH_BOX(&fastcss::cpu::top_margin_backward));
}
