// Gives g++ the part of CUDA that csrc/cuda uses: sources compiled with this file run on the CPU, block after block, so
// that their values can be tested without a GPU. A block's threads are fibers of one thread; a warp runs until it waits
// for others, and they take turns in an order that the test sets. It is stricter than a GPU: threads that wait at
// different places, or for one that has ended, are an error, and shared memory is NaN before a block begins.
#pragma once

#include <math.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <functional>

// The launchers register for CUDA tensors; here there are none.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("cuda_shared")))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

constexpr int kWarp = 32;

struct Block {
  dim3 thread, block;  // of the fiber that runs now
};
extern Block current;

// Waits for every thread of the block.
void wait_block();
// Waits for every lane of the warp; the word that each lane brought.
const unsigned* wait_warp(const char* what, unsigned word);
// Runs a block's threads to their end, for every block of the grid.
void run(dim3 grid, unsigned threads, const std::function<void()>& kernel);

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current.thread)
#define blockIdx (cuda_on_cpu::current.block)

inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits<float>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline int atomicAdd(int* to, int x) {
  const int before = *to;
  *to += x;
  return before;
}

inline void __syncthreads() { cuda_on_cpu::wait_block(); }
int __syncthreads_and(int predicate);
inline void __syncwarp() { cuda_on_cpu::wait_warp("syncwarp", 0); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  const unsigned* words = cuda_on_cpu::wait_warp("shfl_xor", cuda_on_cpu::bits<unsigned>(x));
  return cuda_on_cpu::bits<T>(words[(threadIdx.x % cuda_on_cpu::kWarp) ^ mask]);
}
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned delta) {
  const unsigned* words = cuda_on_cpu::wait_warp("shfl_up", cuda_on_cpu::bits<unsigned>(x));
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  return cuda_on_cpu::bits<T>(words[lane < delta ? lane : lane - delta]);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const unsigned* words = cuda_on_cpu::wait_warp("ballot", predicate);
  unsigned all = 0;
  for (int i = 0; i < cuda_on_cpu::kWarp; ++i) all |= words[i] << i;
  return all;
}

// These replace what csrc/cuda/numeric.cuh writes in PTX.
namespace fastcss::cuda {
struct bf16;
struct f16;
float to_float(f16 x);
f16 to_half(float x);
bf16 to_bfloat(float x);
}  // namespace fastcss::cuda

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  cuda_on_cpu::run(config->gridDim, config->blockDim.x, [&] { kernel(params); });
  return cudaSuccess;
}
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
