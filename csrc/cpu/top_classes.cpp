// fastcss::top_classes.cpu: the k best of every row of scores.

#include <tuple>

#include "parallel.h"
#include "partial_select.h"
#include "rows.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "top_classes";

std::tuple<Tensor, Tensor> top_classes(const Tensor& score, int64_t k) {
  const int64_t B = score.size(0), T = score.size(1);
  const DType dtype = dtype_of(score, kOp);
  Tensor best = torch::stable::new_empty(score, shape({B, k}));
  Tensor index = torch::stable::new_empty(score, shape({B, k}), ScalarType::Long);
  parallel(B, [&](int64_t b) {
    const Matrix row = matrix(score, 0, 1, kOp).at(b, 0);
    const float* values = static_cast<const float*>(row.data);
    float* kept = local_workspace.get(T + k);
    if (dtype != DType::f32 || row.k_stride != 1) {
      read_row(kept + k, row, T);
      values = kept + k;
    }
    int64_t* where = static_cast<int64_t*>(index.mutable_data_ptr()) + b * k;
    select_top(values, T, k, where);
    for (int64_t i = 0; i < k; ++i) kept[i] = values[where[i]];
    write_row(image(best, b, dtype), dtype, kept, k);
  });
  return {best, index};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("top_classes.cpu", FASTCSS_BOX(&fastcss::cpu::top_classes)); }
