// The half of prompt_mlp's backward that writes the gradients of the weights: whole tensors, with zeros for the classes
// without a row. dweight[k] = Σ x[r] ⊗ dy[r] and dbias[k] = Σ dy[r] over the rows r of class k, in their order.
#pragma once

#include "numeric.cuh"

namespace fastcss::cuda::prompt_mlp_backward {

constexpr int kThreads = 256;
constexpr int kColumns = 128;  // of dweight, in a block
constexpr int kRows = 32;
constexpr int kColumnsEach = kColumns / kWarp;  // of a thread, kWarp apart, so that those of a warp lie side by side
constexpr int kRowsEach = kRows / (kThreads / kWarp);

struct Params {
  const void* x;  // [R, inputs]
  int64 x_row_stride, x_stride;
  const void* dy;  // [R, outputs]
  int64 dy_row_stride, dy_stride;
  const int64* index;  // [R]
  int64 index_stride, count, inputs, outputs;
  void* dweight;  // [K, inputs, outputs]
  void* dbias;    // [K, outputs]
};

__device__ inline int64 clamped(int64 at, int64 size) { return at < size ? at : size - 1; }

// Grid (blocks of columns, blocks of rows, K); the first block of rows computes the bias, too.
template <class X, class Y, class T>
__device__ void run(const Params& p) {
  const int lane = threadIdx.x % kWarp;
  const int64 c = blockIdx.z, first_column = static_cast<int64>(blockIdx.x) * kColumns + lane;
  const int64 first_row = static_cast<int64>(blockIdx.y) * kRows + threadIdx.x / kWarp * kRowsEach;
  // Rows and columns past the end read the last one, and are not written.
  int64 x_at[kRowsEach], dy_at[kColumnsEach];
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) x_at[i] = clamped(first_row + i, p.inputs) * p.x_stride;
#pragma unroll
  for (int j = 0; j < kColumnsEach; ++j) dy_at[j] = clamped(first_column + j * kWarp, p.outputs) * p.dy_stride;
  float sum[kRowsEach][kColumnsEach] = {}, bias[kColumnsEach] = {};
  for (int64 first = 0; first < p.count; first += kWarp) {
    const bool mine = first + lane < p.count && p.index[(first + lane) * p.index_stride] == c;
    for (unsigned left = __ballot_sync(kAllLanes, mine); left; left &= left - 1) {
      const int64 r = first + __ffs(static_cast<int>(left)) - 1;
      const X* x = static_cast<const X*>(p.x) + r * p.x_row_stride;
      const Y* dy = static_cast<const Y*>(p.dy) + r * p.dy_row_stride;
      float factor[kRowsEach];
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) factor[i] = p.inputs ? to_float(x[x_at[i]]) : 0.f;
#pragma unroll
      for (int j = 0; j < kColumnsEach; ++j) {
        const float d = to_float(dy[dy_at[j]]);
        bias[j] += d;
#pragma unroll
        for (int i = 0; i < kRowsEach; ++i) sum[i][j] += factor[i] * d;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kColumnsEach; ++j) {
    const int64 column = first_column + j * kWarp;
    if (column >= p.outputs) continue;
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i)
      if (first_row + i < p.inputs)
        store(static_cast<T*>(p.dweight) + (c * p.inputs + first_row + i) * p.outputs + column, sum[i][j]);
    if (first_row == 0) store(static_cast<T*>(p.dbias) + c * p.outputs + column, bias[j]);
  }
}

}  // namespace fastcss::cuda::prompt_mlp_backward

#define FASTCSS_PROMPT_MLP_BACKWARD(type, T)                                                 \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::prompt_mlp_backward::kThreads) \
      prompt_mlp_dw1_##type(fastcss::cuda::prompt_mlp_backward::Params p) {                  \
    fastcss::cuda::prompt_mlp_backward::run<T, float, T>(p);                                 \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::prompt_mlp_backward::kThreads) \
      prompt_mlp_dw2_##type(fastcss::cuda::prompt_mlp_backward::Params p) {                  \
    fastcss::cuda::prompt_mlp_backward::run<float, T, T>(p);                                 \
  }
FASTCSS_PROMPT_MLP_BACKWARD(f32, float)
FASTCSS_PROMPT_MLP_BACKWARD(bf16, fastcss::cuda::bf16)
FASTCSS_PROMPT_MLP_BACKWARD(f16, fastcss::cuda::f16)
#undef FASTCSS_PROMPT_MLP_BACKWARD
