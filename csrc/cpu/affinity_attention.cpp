// fastcss::affinity_attention.cpu and its backward. They use T = tanh(s/2), for which M V = ½ (Σ V + T V) and
// (1 − M) V = ½ (Σ V − T V).

#include <tuple>

#include "affinity_gather.h"
#include "affinity_gradient.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "affinity_attention";

FASTCSS_CLONES void split(float* sums, float* others, const float* total, float half, int64_t values) {
  for (int64_t c = 0; c < values; ++c)
    for (int i = 0; i < kCols; ++i) {
      const float all = total[c] * half, part = sums[c * kCols + i] * half;
      sums[c * kCols + i] = all + part, others[c * kCols + i] = all - part;
    }
}

std::tuple<Tensor, Tensor> affinity_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                              bool mean) {
  const int64_t B = v.size(0), N = v.size(1), D = v.size(2);
  const DType dtype = dtype_of(v, kOp);
  Tensor intra = torch::stable::new_empty(v, v.sizes()), inter = torch::stable::new_empty(v, v.sizes());
  const AffinityGather gather(N, q.size(2), D, static_cast<float>(scale), dtype);
  const float half = mean ? 0.5f / static_cast<float>(N) : 0.5f;
  for_images(B, N, [&](int64_t b) {
    float* total = shared_workspace.get(D + gather.size());
    float* packed = total + D;
    gather.pack_keys(packed, matrix(k, 1, 2, kOp).offset(b * k.stride(0)));
    gather.pack_values(packed, matrix(v, 2, 1, kOp).offset(b * v.stride(0)), total);
    gather.gather(packed, matrix(q, 1, 2, kOp).offset(b * q.stride(0)), gather.sum_size(),
                  [&](int64_t query, int queries, float* sums, float* others) {
                    split(sums, others, total, half, D);
                    const int64_t at = query * D * size_of(dtype);
                    write_transposed(image(intra, b, dtype) + at, dtype, D, queries, D, sums);
                    write_transposed(image(inter, b, dtype) + at, dtype, D, queries, D, others);
                  });
  });
  return {intra, inter};
}

std::tuple<Tensor, Tensor, Tensor> affinity_attention_backward(const Tensor& dintra, const Tensor& dinter,
                                                               const Tensor& q, const Tensor& k, const Tensor& v,
                                                               double scale, bool mean) {
  const int64_t B = v.size(0), N = v.size(1), D = v.size(2), K = q.size(2);
  const DType dtype = dtype_of(v, kOp);
  Tensor dq = torch::stable::new_empty(q, q.sizes()), dk = torch::stable::new_empty(k, k.sizes()),
         dv = torch::stable::new_empty(v, v.sizes());
  const auto pixels = [&](const Tensor& t, int64_t b) { return matrix(t, 1, 2, kOp).offset(b * t.stride(0)); };
  for_images(B, N, [&](int64_t b) {
    const AffinityGradientProblem problem{.N = N,
                                          .K = K,
                                          .scale = static_cast<float>(scale),
                                          .q = pixels(q, b),
                                          .k = pixels(k, b),
                                          .ds_factor = static_cast<float>(scale / 2),
                                          .C = D,
                                          .v = pixels(v, b),
                                          .dintra = pixels(dintra, b),
                                          .dinter = pixels(dinter, b),
                                          .half = mean ? 0.5f / static_cast<float>(N) : 0.5f};
    AffinityGradient(problem).run({image(dq, b, dtype), image(dk, b, dtype), dtype}, {image(dv, b, dtype), dtype});
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("affinity_attention.cpu", FASTCSS_BOX(&fastcss::cpu::affinity_attention));
  m.impl("affinity_attention_backward.cpu", FASTCSS_BOX(&fastcss::cpu::affinity_attention_backward));
}
