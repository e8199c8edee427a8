// fastcss::select_tokens.cuda and its backward
#include <tuple>

#include "launch.h"
#include "select_tokens.cuh"
#include "select_tokens_backward.cuh"

namespace fastcss::cuda {
namespace {

constexpr const char* kOp = "select_tokens";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& tokens, const Tensor& classes,
                                                           double threshold, int64_t length) {
  using namespace select_tokens;
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), C = classes.size(1);
  Tensor selected = torch::stable::new_empty(tokens, shape({B, C, length}));
  Tensor counts = torch::stable::new_empty(tokens, shape({B, C}), ScalarType::Long);
  Tensor presence = torch::stable::new_empty(tokens, shape({B, C}));
  Tensor best = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Int);
  Tensor cosine = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Float);
  const int64_t tiles = blocks(N, kTokens);
  const Launcher launch(kOp, tokens);
  launch(by_dtype(tokens, kOp, select_tokens_assign_f32, select_tokens_assign_bf16, select_tokens_assign_f16),
         dim3(B * tiles), kThreads,
         {read(tokens), tokens.stride(0), tokens.stride(1), tokens.stride(2), read(classes), classes.stride(0),
          classes.stride(1), classes.stride(2), N, C, D, tiles, threshold, write<int>(best), write<float>(cosine)});
  launch(by_dtype(tokens, kOp, select_tokens_collect_f32, select_tokens_collect_bf16, select_tokens_collect_f16),
         dim3(B * C), scan::kThreads,
         {read(tokens), tokens.stride(0), tokens.stride(1), tokens.stride(2), N, C, D, length, read<int>(best),
          read<float>(cosine), write(selected), write<int64>(counts), write(presence)});
  return {selected, counts, presence, best, cosine};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dselected, const Tensor& dpresence, const Tensor& tokens,
                                    const Tensor& classes, const Tensor& counts, const Tensor& best,
                                    const Tensor& cosine) {
  using namespace select_tokens_backward;
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), C = classes.size(1);
  const int64_t slices = blocks(N, kSlice);
  Tensor dtokens = torch::stable::new_empty(tokens, shape({B, N, D}));
  Tensor dclasses = torch::stable::new_empty(classes, shape({B, C, D}));
  Tensor rank = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Int);
  Tensor inverse = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Float);
  Tensor units = torch::stable::new_empty(tokens, shape({B, C, slices, D}), ScalarType::Float);
  Tensor cosines = torch::stable::new_empty(tokens, shape({B, C, slices}), ScalarType::Float);
  const Tensor dense_counts = torch::stable::contiguous(counts), dense_best = torch::stable::contiguous(best),
               dense_cosine = torch::stable::contiguous(cosine);
  const Params params{read(dselected),
                      dselected.stride(0),
                      dselected.stride(1),
                      dselected.stride(2),
                      read(dpresence),
                      dpresence.stride(0),
                      dpresence.stride(1),
                      read(tokens),
                      tokens.stride(0),
                      tokens.stride(1),
                      tokens.stride(2),
                      read(classes),
                      classes.stride(0),
                      classes.stride(1),
                      classes.stride(2),
                      read<int64>(dense_counts),
                      read<int>(dense_best),
                      read<float>(dense_cosine),
                      B,
                      N,
                      C,
                      D,
                      dselected.size(2),
                      slices,
                      write<int>(rank),
                      write<float>(inverse),
                      write<float>(units),
                      write<float>(cosines),
                      write(dtokens),
                      write(dclasses)};
  const Launcher launch(kOp, tokens);
  launch(select_tokens_rank, dim3(B * C), select_tokens::scan::kThreads, params);
  launch(by_dtype(tokens, kOp, select_tokens_dtokens_f32, select_tokens_dtokens_bf16, select_tokens_dtokens_f16),
         dim3(blocks(B * N, kWarps)), kThreads, params);
  launch(by_dtype(tokens, kOp, select_tokens_units_f32, select_tokens_units_bf16, select_tokens_units_f16),
         dim3(B * C, slices, blocks(D, kChannels)), kThreads, params);
  launch(by_dtype(tokens, kOp, select_tokens_dclasses_f32, select_tokens_dclasses_bf16, select_tokens_dclasses_f16),
         dim3(B * C, blocks(D, kThreads)), kThreads, params);
  return {dtokens, dclasses};
}

}  // namespace
}  // namespace fastcss::cuda

STABLE_TORCH_LIBRARY_IMPL(fastcss, CUDA, m) {
  m.impl("select_tokens.cuda", TORCH_BOX(&fastcss::cuda::forward));
  m.impl("select_tokens_backward.cuda", TORCH_BOX(&fastcss::cuda::backward));
}
