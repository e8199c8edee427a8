// prompt_mlp and the half of its backward that reads weights. Each row multiplies one vector with the matrices of its
// class, so only the bytes count: loads have 16 bytes, and there are enough blocks to keep many in flight. A row's
// result depends on its class and the sizes only, not on the other rows.
#pragma once

#include "numeric.cuh"

namespace fastcss::cuda::prompt_mlp {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumnBytes = 128;  // bytes of each weight row that a block reads in `layer`
constexpr int kLanes = kColumnBytes / 16;
constexpr int kSlices = kThreads / kLanes;

// weight [K, inputs, outputs], out [R, outputs]
struct LayerParams {
  const void* x;  // [R, inputs]
  int64 x_row_stride, x_stride;
  const void* weight;
  int64 class_stride, row_stride, stride;
  const void* bias;  // [K, outputs]
  int64 bias_class_stride, bias_stride;
  const int64* index;  // [R]
  int64 index_stride, classes, inputs, outputs;
  void* out;
};

// weight [K, outputs, inputs], out [R, outputs]; positive [R, outputs], or null: the result is 0 where it is not above
// 0
struct TransposedParams {
  const void* x;  // [R, inputs]
  int64 x_row_stride, x_stride;
  const void* weight;
  int64 class_stride, row_stride, stride;
  const float* positive;
  const int64* index;  // [R]
  int64 index_stride, classes, inputs, outputs;
  void* out;
};

__device__ inline float not_a_number() { return __int_as_float(0x7fc00000); }

template <class T>
struct Shared {
  float sums[kSlices][kColumnBytes / sizeof(T)];
};

// out = x · weight + bias, or its positive part. A thread takes columns of 16 bytes and every kSlices-th row of the
// matrix; the slices are added in order. Grid (R, blocks of columns).
template <class X, class T, class Y, bool kRelu>
__device__ void layer(const LayerParams& p, Shared<T>& s) {
  constexpr int kEach = Pack<T>::size, kColumns = kLanes * kEach;
  const int lane = threadIdx.x % kLanes, slice = threadIdx.x / kLanes;
  const int64 row = blockIdx.x, first = static_cast<int64>(blockIdx.y) * kColumns, column = first + lane * kEach;
  const int64 c = p.index[row * p.index_stride];
  Y* out = static_cast<Y*>(p.out) + row * p.outputs + first;
  const int64 columns = p.outputs - first < kColumns ? p.outputs - first : kColumns;
  if (c < 0 || c >= p.classes) {
    if (threadIdx.x < columns) store(out + threadIdx.x, c == -1 ? 0.f : not_a_number());
    return;
  }
  const X* x = static_cast<const X*>(p.x) + row * p.x_row_stride;
  const T* weight = static_cast<const T*>(p.weight) + c * p.class_stride + column * p.stride;
  float sum[kEach] = {};
  if (packed_rows<T>(p.weight, p.class_stride, p.row_stride, p.stride) && column + kEach <= p.outputs) {
#pragma unroll 8
    for (int64 i = slice; i < p.inputs; i += kSlices) {
      const Pack<T> w = *reinterpret_cast<const Pack<T>*>(weight + i * p.row_stride);
      const float factor = to_float(x[i * p.x_stride]);
#pragma unroll
      for (int j = 0; j < kEach; ++j) sum[j] += factor * to_float(w.at[j]);
    }
  } else {
    for (int64 i = slice; i < p.inputs; i += kSlices)
#pragma unroll
      for (int j = 0; j < kEach; ++j)
        if (column + j < p.outputs)
          sum[j] += to_float(x[i * p.x_stride]) * to_float(weight[i * p.row_stride + j * p.stride]);
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) s.sums[slice][lane * kEach + j] = sum[j];
  __syncthreads();
  if (threadIdx.x >= columns) return;
  float total = 0.f;
  for (int i = 0; i < kSlices; ++i) total += s.sums[i][threadIdx.x];
  const int64 bias = c * p.bias_class_stride + (first + threadIdx.x) * p.bias_stride;
  total += to_float(static_cast<const T*>(p.bias)[bias]);
  store(out + threadIdx.x, kRelu && total <= 0.f ? 0.f : total);
}

// out = weight · x: a warp has one row of the matrix. Grid (R, blocks of kWarps matrix rows).
template <class X, class T, class Y>
__device__ void transposed(const TransposedParams& p) {
  constexpr int kEach = Pack<T>::size;
  const int lane = threadIdx.x % kWarp;
  const int64 row = blockIdx.x, o = static_cast<int64>(blockIdx.y) * kWarps + threadIdx.x / kWarp;
  if (o >= p.outputs) return;
  const int64 c = p.index[row * p.index_stride];
  Y* out = static_cast<Y*>(p.out) + row * p.outputs + o;
  if (c < 0 || c >= p.classes) {
    if (lane == 0) store(out, c == -1 ? 0.f : not_a_number());
    return;
  }
  if (p.positive && p.positive[row * p.outputs + o] <= 0.f) {
    if (lane == 0) store(out, 0.f);
    return;
  }
  const X* x = static_cast<const X*>(p.x) + row * p.x_row_stride;
  const T* weight = static_cast<const T*>(p.weight) + c * p.class_stride + o * p.row_stride;
  const bool packed = packed_rows<T>(p.weight, p.class_stride, p.row_stride, p.stride);
  const int64 whole = packed ? p.inputs / kEach * kEach : 0;
  float sum = 0.f;
#pragma unroll 4
  for (int64 i = lane * kEach; i < whole; i += kWarp * kEach) {
    const Pack<T> w = *reinterpret_cast<const Pack<T>*>(weight + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) sum += to_float(w.at[j]) * to_float(x[(i + j) * p.x_stride]);
  }
  for (int64 i = whole + lane; i < p.inputs; i += kWarp)
    sum += to_float(weight[i * p.stride]) * to_float(x[i * p.x_stride]);
  sum = warp_sum(sum);
  if (lane == 0) store(out, sum);
}

}  // namespace fastcss::cuda::prompt_mlp

#define FASTCSS_PROMPT_MLP(type, T)                                                 \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::prompt_mlp::kThreads) \
      prompt_mlp_hidden_##type(fastcss::cuda::prompt_mlp::LayerParams p) {          \
    __shared__ fastcss::cuda::prompt_mlp::Shared<T> s;                              \
    fastcss::cuda::prompt_mlp::layer<T, T, float, true>(p, s);                      \
  }                                                                                 \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::prompt_mlp::kThreads) \
      prompt_mlp_output_##type(fastcss::cuda::prompt_mlp::LayerParams p) {          \
    __shared__ fastcss::cuda::prompt_mlp::Shared<T> s;                              \
    fastcss::cuda::prompt_mlp::layer<float, T, T, false>(p, s);                     \
  }                                                                                 \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::prompt_mlp::kThreads) \
      prompt_mlp_dhidden_##type(fastcss::cuda::prompt_mlp::TransposedParams p) {    \
    fastcss::cuda::prompt_mlp::transposed<T, T, float>(p);                          \
  }                                                                                 \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::prompt_mlp::kThreads) \
      prompt_mlp_dz_##type(fastcss::cuda::prompt_mlp::TransposedParams p) {         \
    fastcss::cuda::prompt_mlp::transposed<float, T, T>(p);                          \
  }
FASTCSS_PROMPT_MLP(f32, float)
FASTCSS_PROMPT_MLP(bf16, fastcss::cuda::bf16)
FASTCSS_PROMPT_MLP(f16, fastcss::cuda::f16)
#undef FASTCSS_PROMPT_MLP
