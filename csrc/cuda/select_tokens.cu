// fastcss::select_tokens.cuda and its backward
#include <tuple>

#include "launch.h"
#include "select_tokens.cuh"
#include "select_tokens_backward.cuh"

namespace fastcss::cuda {
namespace {

constexpr const char* kOp = "select_tokens";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& tokens, const Tensor& classes,
                                                                   double threshold, int64_t length, bool best_only) {
  using namespace select_tokens;
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), C = classes.size(1);
  Tensor selected = torch::stable::new_empty(tokens, shape({B, C, length}));
  Tensor counts = torch::stable::new_empty(tokens, shape({B, C}), ScalarType::Long);
  Tensor presence = torch::stable::new_empty(tokens, shape({B, C}));
  Tensor support = torch::stable::new_empty(tokens, shape({B, C}), ScalarType::Long);
  Tensor best = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Int);
  Tensor cosine = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Float);
  const int64_t tiles = blocks(N, kTokens), words = best_only ? 0 : blocks(C, kClasses);
  Tensor above = torch::stable::new_empty(tokens, shape({B, N, words}), ScalarType::Int);
  Tensor sums = torch::stable::new_empty(tokens, shape({B, best_only ? 0 : C, tiles}), ScalarType::Float);
  Tensor reach = torch::stable::new_empty(tokens, shape({B, best_only ? 0 : C, tiles}), ScalarType::Float);
  const Launcher launch(kOp, tokens);
  launch(by_dtype(tokens, kOp, select_tokens_assign_f32, select_tokens_assign_bf16, select_tokens_assign_f16),
         dim3(B * tiles), kThreads,
         {read(tokens), tokens.stride(0), tokens.stride(1), tokens.stride(2), read(classes), classes.stride(0),
          classes.stride(1), classes.stride(2), N, C, D, tiles, threshold, write<int>(best), write<float>(cosine),
          words, write<unsigned>(above), write<float>(sums), write<float>(reach)});
  launch(by_dtype(tokens, kOp, select_tokens_collect_f32, select_tokens_collect_bf16, select_tokens_collect_f16),
         dim3(B * C), scan::kThreads,
         {read(tokens), tokens.stride(0), tokens.stride(1), tokens.stride(2), N, C, D, length, read<int>(best),
          read<float>(cosine), words, tiles, read<float>(sums), read<float>(reach), write(selected),
          write<int64>(counts), write(presence), write<int64>(support)});
  return {selected, counts, presence, support, best, above};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dselected, const Tensor& dpresence, const Tensor& tokens,
                                    const Tensor& classes, const Tensor& support, const Tensor& best,
                                    const Tensor& above) {
  using namespace select_tokens_backward;
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), C = classes.size(1);
  const int64_t slices = blocks(N, kSlice);
  Tensor dtokens = torch::stable::new_empty(tokens, shape({B, N, D}));
  Tensor dclasses = torch::stable::new_empty(classes, shape({B, C, D}));
  Tensor rank = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Int);
  Tensor inverse = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Float);
  Tensor units = torch::stable::new_empty(tokens, shape({B, C, slices, D}), ScalarType::Float);
  Tensor slope = torch::stable::new_empty(tokens, shape({B, C}), ScalarType::Float);
  const Tensor dense_support = torch::stable::contiguous(support), dense_best = torch::stable::contiguous(best),
               dense_above = torch::stable::contiguous(above);
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
                      read<int64>(dense_support),
                      read<int>(dense_best),
                      read<unsigned>(dense_above),
                      above.size(2),
                      B,
                      N,
                      C,
                      D,
                      dselected.size(2),
                      slices,
                      write<int>(rank),
                      write<float>(slope),
                      write<float>(inverse),
                      write<float>(units),
                      write(dtokens),
                      write(dclasses)};
  const Launcher launch(kOp, tokens);
  launch(by_dtype(tokens, kOp, select_tokens_rank_f32, select_tokens_rank_bf16, select_tokens_rank_f16), dim3(B * C),
         select_tokens::scan::kThreads, params);
  launch(by_dtype(tokens, kOp, select_tokens_dtokens_f32, select_tokens_dtokens_bf16, select_tokens_dtokens_f16),
         dim3(blocks(B * N, kWarps)), kThreads, params);
  launch(by_dtype(tokens, kOp, select_tokens_units_f32, select_tokens_units_bf16, select_tokens_units_f16),
         dim3(B * C, slices, blocks(D, kChannels)), kThreads, params);
  launch(by_dtype(tokens, kOp, select_tokens_dclasses_f32, select_tokens_dclasses_bf16, select_tokens_dclasses_f16),
         dim3(B * C), kThreads, params);
  return {dtokens, dclasses};
}

}  // namespace
}  // namespace fastcss::cuda

STABLE_TORCH_LIBRARY_IMPL(fastcss, CUDA, m) {
  m.impl("select_tokens.cuda", TORCH_BOX(&fastcss::cuda::forward));
  m.impl("select_tokens_backward.cuda", TORCH_BOX(&fastcss::cuda::backward));
}
