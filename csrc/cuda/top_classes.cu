// fastcss::top_classes.cuda
#include <tuple>

#include "launch.h"
#include "top_classes.cuh"

namespace fastcss::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& score, int64_t k) {
  const char* op = "top_classes";
  const int64_t B = score.size(0), T = score.size(1);
  STD_TORCH_CHECK(T < int64_t{1} << 31, op, ": a row can have at most 2^31 - 1 classes, got ", T);
  Tensor values = torch::stable::new_empty(score, shape({B, k}));
  Tensor index = torch::stable::new_empty(score, shape({B, k}), ScalarType::Long);
  const auto kernel = by_dtype(score, op, top_classes_f32, top_classes_bf16, top_classes_f16);
  Launcher(op, score)(kernel, dim3(B, blocks(k, top_classes::kBlockRanks)), top_classes::kThreads,
                      {read(score), score.stride(0), score.stride(1), T, k, write(values), write<int64>(index)});
  return {values, index};
}

}  // namespace
}  // namespace fastcss::cuda

STABLE_TORCH_LIBRARY_IMPL(fastcss, CUDA, m) { m.impl("top_classes.cuda", TORCH_BOX(&fastcss::cuda::forward)); }
