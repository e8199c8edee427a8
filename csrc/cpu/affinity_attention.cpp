// fastcss::affinity_attention.cpu: with T = tanh(s/2), M V = ½ (Σ V + T V) and (1 − M) V = ½ (Σ V − T V).

#include <tuple>

#include "affinity_gather.h"
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
  for (int64_t b = 0; b < B; ++b) {
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
  }
  shared_workspace.trim();
  return {intra, inter};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("affinity_attention.cpu", TORCH_BOX(&fastcss::cpu::affinity_attention));
}
