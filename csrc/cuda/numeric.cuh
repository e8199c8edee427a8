// Has the tensors' element types and the few warp sums that every kernel takes. It includes no header, since NVRTC,
// which has none, compiles the same text as nvcc. A kernel's parameters are one struct of 8-byte members (pointers,
// int64, double), so that a caller without this header can lay them out, too.
#pragma once

namespace fastcss::cuda {

using int64 = long long;
using uint64 = unsigned long long;

struct bf16 {
  unsigned short bits;
};
struct f16 {
  unsigned short bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

#ifdef __CUDACC__
__device__ inline float to_float(f16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
__device__ inline f16 to_half(float x) {
  f16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
__device__ inline bf16 to_bfloat(float x) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
#endif

__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(bf16* to, float x) { *to = to_bfloat(x); }
__device__ inline void store(f16* to, float x) { *to = to_half(x); }

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Adds in the same order in every lane, so that every lane has the same sum.
__device__ inline float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// 16 bytes of a row at once.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

// Tells whether the elements of a row […, size] lie one after the other and every row begins at a multiple of 16 bytes.
template <class T>
__device__ inline bool packed_rows(const void* data, int64 outer_stride, int64 row_stride, int64 stride) {
  return stride == 1 && (reinterpret_cast<uint64>(data) | outer_stride * sizeof(T) | row_stride * sizeof(T)) % 16 == 0;
}

}  // namespace fastcss::cuda
