// Shows torch's tensors as the kernels take them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "pack.h"

namespace fastcss::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, op, ": the tensors must be float32, bfloat16 or float16");
  }
}

inline Matrix matrix(const Tensor& t, int64_t lane_dim, int64_t k_dim, const char* op) {
  return {t.const_data_ptr(), dtype_of(t, op), t.stride(lane_dim), t.stride(k_dim)};
}

// Returns the address of element 0 of image b of a contiguous result [B, …].
inline char* image(const Tensor& t, int64_t b, DType dtype) {
  return static_cast<char*>(t.mutable_data_ptr()) + b * t.stride(0) * size_of(dtype);
}

inline std::vector<int64_t> shape(std::initializer_list<int64_t> sizes) { return sizes; }

}  // namespace fastcss::cpu
