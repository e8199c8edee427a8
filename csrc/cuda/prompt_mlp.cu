// fastcss::prompt_mlp.cuda and its backward
#include <tuple>

#include "launch.h"
#include "prompt_mlp.cuh"
#include "prompt_mlp_backward.cuh"

namespace fastcss::cuda {
namespace {

constexpr const char* kOp = "prompt_mlp";

prompt_mlp::LayerParams layer(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& index,
                              const Tensor& out) {
  return {read(x),          x.stride(0),    x.stride(1),    read(weight),   weight.stride(0),   weight.stride(1),
          weight.stride(2), read(bias),     bias.stride(0), bias.stride(1), read<int64>(index), index.stride(0),
          weight.size(0),   weight.size(1), weight.size(2), write(out)};
}

prompt_mlp::TransposedParams transposed(const Tensor& x, const Tensor& weight, const float* positive,
                                        const Tensor& index, const Tensor& out) {
  return {read(x),          x.stride(0),      x.stride(1),    read(weight),       weight.stride(0),
          weight.stride(1), weight.stride(2), positive,       read<int64>(index), index.stride(0),
          weight.size(0),   weight.size(2),   weight.size(1), write(out)};
}

prompt_mlp_backward::Params outer(const Tensor& x, const Tensor& dy, const Tensor& index, const Tensor& dweight,
                                  const Tensor& dbias) {
  return {read(x),         x.stride(0), x.stride(1), read(dy),   dy.stride(0),   dy.stride(1), read<int64>(index),
          index.stride(0), x.size(0),   x.size(1),   dy.size(1), write(dweight), write(dbias)};
}

std::tuple<Tensor, Tensor> forward(const Tensor& z, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                   const Tensor& b2, const Tensor& index) {
  const int64_t R = z.size(0), H = w1.size(2), O = w2.size(2);
  Tensor y = torch::stable::new_empty(z, shape({R, O}));
  Tensor hidden = torch::stable::new_empty(z, shape({R, H}), ScalarType::Float);
  const int64_t columns = prompt_mlp::kColumnBytes / static_cast<int64_t>(w1.element_size());
  const Launcher launch(kOp, z);
  launch(by_dtype(z, kOp, prompt_mlp_hidden_f32, prompt_mlp_hidden_bf16, prompt_mlp_hidden_f16),
         dim3(R, blocks(H, columns)), prompt_mlp::kThreads, layer(z, w1, b1, index, hidden));
  launch(by_dtype(z, kOp, prompt_mlp_output_f32, prompt_mlp_output_bf16, prompt_mlp_output_f16),
         dim3(R, blocks(O, columns)), prompt_mlp::kThreads, layer(hidden, w2, b2, index, y));
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& z, const Tensor& w1,
                                                            const Tensor& w2, const Tensor& index, const Tensor& hidden,
                                                            bool need_dz, bool need_weights) {
  const int64_t R = z.size(0), K = w1.size(0), L = w1.size(1), H = w1.size(2), O = w2.size(2);
  const auto weight = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(w1, need_weights ? shape(sizes) : shape({0}));
  };
  Tensor dz = torch::stable::new_empty(z, need_dz ? shape({R, L}) : shape({0}));
  Tensor dw1 = weight({K, L, H}), db1 = weight({K, H}), dw2 = weight({K, H, O}), db2 = weight({K, O});
  Tensor dhidden = torch::stable::new_empty(z, shape({R, H}), ScalarType::Float);
  const Tensor positive = torch::stable::contiguous(hidden);
  const Launcher launch(kOp, z);
  launch(by_dtype(z, kOp, prompt_mlp_dhidden_f32, prompt_mlp_dhidden_bf16, prompt_mlp_dhidden_f16),
         dim3(R, blocks(H, prompt_mlp::kWarps)), prompt_mlp::kThreads,
         transposed(dy, w2, read<float>(positive), index, dhidden));
  if (need_dz)
    launch(by_dtype(z, kOp, prompt_mlp_dz_f32, prompt_mlp_dz_bf16, prompt_mlp_dz_f16),
           dim3(R, blocks(L, prompt_mlp::kWarps)), prompt_mlp::kThreads, transposed(dhidden, w1, nullptr, index, dz));
  if (need_weights) {
    using prompt_mlp_backward::kColumns, prompt_mlp_backward::kRows, prompt_mlp_backward::kThreads;
    launch(by_dtype(z, kOp, prompt_mlp_dw1_f32, prompt_mlp_dw1_bf16, prompt_mlp_dw1_f16),
           dim3(blocks(H, kColumns), blocks(std::max<int64_t>(L, 1), kRows), K), kThreads,
           outer(z, dhidden, index, dw1, db1));
    launch(by_dtype(z, kOp, prompt_mlp_dw2_f32, prompt_mlp_dw2_bf16, prompt_mlp_dw2_f16),
           dim3(blocks(O, kColumns), blocks(std::max<int64_t>(H, 1), kRows), K), kThreads,
           outer(hidden, dy, index, dw2, db2));
  }
  return {dz, dw1, db1, dw2, db2};
}

}  // namespace
}  // namespace fastcss::cuda

STABLE_TORCH_LIBRARY_IMPL(fastcss, CUDA, m) {
  m.impl("prompt_mlp.cuda", TORCH_BOX(&fastcss::cuda::forward));
  m.impl("prompt_mlp_backward.cuda", TORCH_BOX(&fastcss::cuda::backward));
}
