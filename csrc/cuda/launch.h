// Gives the launchers torch's tensors and stream, through its stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

namespace fastcss::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::vector<int64_t> shape(std::initializer_list<int64_t> sizes) { return sizes; }

template <class T = void>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T = void>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class Kernel>
Kernel by_dtype(const Tensor& t, const char* op, Kernel f32, Kernel bf16, Kernel f16) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f32;
    case ScalarType::BFloat16:
      return bf16;
    case ScalarType::Half:
      return f16;
    default:
      STD_TORCH_CHECK(false, op, ": the tensors must be float32, bfloat16 or float16");
  }
}

inline unsigned blocks(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

// Launches kernels on the current stream of the tensors' device, and makes that device current.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& on) : op_(op), guard_(on.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class Params>
  void operator()(void (*kernel)(Params), dim3 grid, int threads, const Params& params) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.stream = stream_;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorString(error));
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fastcss::cuda
