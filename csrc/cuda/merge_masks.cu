// fastcss::merge_masks.cuda
#include <tuple>

#include "launch.h"
#include "merge_masks.cuh"

namespace fastcss::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& masks, const Tensor& scores, const Tensor& order, int64_t height,
                                   int64_t width, int64_t crop_height, int64_t crop_width, double threshold,
                                   bool want_score) {
  const char* op = "merge_masks";
  Tensor labels = torch::stable::new_empty(masks, shape({height, width}), ScalarType::Long);
  Tensor score = torch::stable::new_empty(scores, want_score ? shape({height, width}) : shape({0}));
  const merge_masks::Params params{read(masks),
                                   masks.stride(0),
                                   masks.stride(1),
                                   masks.stride(2),
                                   masks.size(0),
                                   masks.size(1),
                                   masks.size(2),
                                   read(scores),
                                   scores.stride(0),
                                   static_cast<int64>(scores.element_size()),
                                   read<int64>(order),
                                   order.stride(0),
                                   height,
                                   width,
                                   crop_height,
                                   crop_width,
                                   threshold,
                                   write<int64>(labels),
                                   want_score ? write(score) : nullptr};
  const auto kernel = by_dtype(masks, op, merge_masks_f32, merge_masks_bf16, merge_masks_f16);
  const dim3 grid(blocks(width, merge_masks::kTile), blocks(height, merge_masks::kTile));
  Launcher(op, masks)(kernel, grid, merge_masks::kThreads, params);
  return {labels, score};
}

}  // namespace
}  // namespace fastcss::cuda

STABLE_TORCH_LIBRARY_IMPL(fastcss, CUDA, m) { m.impl("merge_masks.cuda", TORCH_BOX(&fastcss::cuda::forward)); }
