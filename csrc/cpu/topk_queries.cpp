// fastcss::topk_queries.cpu finds the largest logit of each token, without storing the logits, and the tokens with the
// largest of those.

#include <optional>
#include <tuple>

#include "best_class.h"
#include "partial_select.h"
#include "rows.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "topk_queries";

std::tuple<Tensor, Tensor, Tensor> topk_queries(const Tensor& features, const Tensor& prototypes,
                                                const std::optional<Tensor>& bias, int64_t k) {
  const int64_t B = features.size(0), N = features.size(1), D = features.size(2), C = prototypes.size(0);
  const DType dtype = dtype_of(features, kOp);
  Tensor queries = torch::stable::new_empty(features, shape({B, k, D}));
  Tensor index = torch::stable::new_empty(features, shape({B, k}), ScalarType::Long);
  Tensor score = torch::stable::new_empty(features, shape({B, k}));
  const BestClass best(C, D, dtype == DType::bf16 && pair_kernel(), BestClass::Nan::wins);
  float* packed = shared_workspace.get(best.size() + N + k);
  float *value = packed + best.size(), *kept = value + N;
  best.pack_classes(packed, matrix(prototypes, 0, 1, kOp));
  if (bias) read_row(best.offsets(packed), matrix(*bias, 0, 0, kOp), C);
  for (int64_t b = 0; b < B; ++b) {
    const Matrix tokens = matrix(features, 1, 2, kOp).offset(b * features.stride(0));
    best.run(packed, tokens, N, false, value, nullptr);
    int64_t* where = static_cast<int64_t*>(index.mutable_data_ptr()) + b * k;
    select_top(value, N, k, where);
    for (int64_t i = 0; i < k; ++i) kept[i] = value[where[i]];
    write_row(image(score, b, dtype), dtype, kept, k);
    parallel(k, [&](int64_t i) {
      float* row = local_workspace.get(D);
      read_row(row, tokens.at(where[i], 0), D);
      write_row(image(queries, b, dtype) + i * D * size_of(dtype), dtype, row, D);
    });
  }
  return {queries, index, score};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("topk_queries.cpu", FASTCSS_BOX(&fastcss::cpu::topk_queries)); }
