// The half of prompt_mlp's backward that writes gradients of weights: whole tensors, zeros for the classes of no row.
// dweight[k] = Σ x[r] ⊗ dy[r] over the rows r of class k, in their order.
#pragma once

#include "numeric.cuh"

namespace fastcss::cuda::prompt_mlp_backward {

constexpr int kThreads = 256;
constexpr int kColumns = 128;  // of dweight, in a block
constexpr int kRows = 32;
constexpr int kColumnsEach = 4;
constexpr int kColumnThreads = kColumns / kColumnsEach;
constexpr int kRowsEach = kRows / (kThreads / kColumnThreads);
constexpr int kFound = 256;  // rows of the class looked up at a time

struct Params {
  const void* x;  // [R, inputs]
  int64 x_row_stride, x_stride;
  const void* dy;  // [R, outputs]
  int64 dy_row_stride, dy_stride;
  const int64* index;  // [R]
  int64 index_stride, rows, inputs, outputs;
  void* dweight;  // [K, inputs, outputs]
  void* dbias;    // [K, outputs]
};

struct Shared {
  int64 found[kFound];
  int count;
};

// The rows of class c from `first` on, as many as fit; returns where to go on. Warp 0 looks, the others wait.
__device__ inline int64 find_rows(const Params& p, int64 c, int64 first, Shared& s) {
  __syncthreads();
  int count = 0;
  for (; first < p.rows && count + kWarp <= kFound; first += kWarp) {
    if (threadIdx.x >= kWarp) continue;
    const int64 row = first + threadIdx.x;
    const bool mine = row < p.rows && p.index[row * p.index_stride] == c;
    const unsigned all = __ballot_sync(kAllLanes, mine);
    if (mine) s.found[count + __popc(all & ((1u << threadIdx.x) - 1))] = row;
    count += __popc(all);
  }
  return first;
}

// Grid (blocks of columns, blocks of rows, K); one block of rows also has the bias.
template <class X, class Y, class T>
__device__ void run(const Params& p, Shared& s) {
  const int64 c = blockIdx.z;
  const int64 column = static_cast<int64>(blockIdx.x) * kColumns + threadIdx.x % kColumnThreads * kColumnsEach;
  const int64 row = static_cast<int64>(blockIdx.y) * kRows + threadIdx.x / kColumnThreads * kRowsEach;
  float sum[kRowsEach][kColumnsEach] = {}, bias[kColumnsEach] = {};
  for (int64 first = 0; first < p.rows;) {
    // find_rows
    for (int i = 0; i < s.count; ++i) {
    }
  }
}

}  // namespace fastcss::cuda::prompt_mlp_backward
