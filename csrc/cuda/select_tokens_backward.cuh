// select_tokens' backward. With t̂ = t / |t|, û = u / |u| and cos = t̂ · û, a surviving token's share of the presence is
//   d cos / dt = (û − cos t̂) / |t|,   d cos / du = (t̂ − cos û) / |u|,   each times dpresence / count;
// a length below 1e-12 was taken for that, and has no slope of its own: then the second term is not there.
#pragma once

#include "numeric.cuh"
#include "select_tokens_scan.cuh"

namespace fastcss::cuda::select_tokens_backward {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSlice = 1024;    // tokens whose unit vectors a block adds up
constexpr int kChannels = 256;  // of a block there
constexpr int kEach = kChannels / kWarp;
constexpr float kSmallest = 1e-12f;

struct Params {
  const void* dselected;  // [B, C, length]
  int64 dselected_image_stride, dselected_class_stride, dselected_stride;
  const void* dpresence;  // [B, C]
  int64 dpresence_image_stride, dpresence_stride;
  const void* tokens;  // [B, N, D]
  int64 token_image_stride, token_stride, token_channel_stride;
  const void* classes;  // [B, C, D]
  int64 class_image_stride, class_stride, class_channel_stride;
  const int64* counts;  // [B, C]
  const int* best;      // [B, N]
  const float* cosine;  // [B, N]
  int64 batch, count, class_count, channels, length, slices;
  int* rank;       // [B, N], of a token among those of its class
  float* inverse;  // [B, N], 1 / |t|
  float* units;    // [B, C, slices, D], Σ t̂ of a slice's tokens of the class
  float* cosines;  // [B, C, slices], Σ cos of them
  void* dtokens;   // [B, N, D]
  void* dclasses;  // [B, C, D]
};

// Grid (B · C), with scan::kThreads.
__device__ inline void rank(const Params& p, select_tokens::scan::Shared& s) {
  const int64 first = blockIdx.x / p.class_count * p.count;
  const int c = static_cast<int>(blockIdx.x % p.class_count);
  const auto found = select_tokens::scan::count(p.best + first, p.cosine + first, p.count, c, s);
  select_tokens::scan::for_ranks(p.best + first, p.count, c, found.before, p.count, [&](int64 token, int64 rank) {
    if (threadIdx.x % kWarp == 0) p.rank[first + token] = static_cast<int>(rank);
  });
}

// dpresence / count of class c of image b.
template <class T>
__device__ float share(const Params& p, int64 b, int64 c) {
  const T* dpresence = static_cast<const T*>(p.dpresence);
  return to_float(dpresence[b * p.dpresence_image_stride + c * p.dpresence_stride]) / p.counts[b * p.class_count + c];
}

template <class T>
__device__ float squares(const T* row, int64 stride, int64 channels) {
  float sum = 0.f;
#pragma unroll 4
  for (int64 d = threadIdx.x % kWarp; d < channels; d += kWarp) {
    const float x = to_float(row[d * stride]);
    sum += x * x;
  }
  return warp_sum(sum);
}

// A warp has a token. Grid (blocks of kWarps of the B · N tokens).
template <class T>
__device__ void dtokens(const Params& p) {
  const int lane = threadIdx.x % kWarp;
  const int64 at = static_cast<int64>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (at >= p.batch * p.count) return;
  const int64 b = at / p.count, c = p.best[at];
  T* out = static_cast<T*>(p.dtokens) + at * p.channels;
  if (c < 0) {
    for (int64 d = lane; d < p.channels; d += kWarp) store(out + d, 0.f);
    return;
  }
  const T* token = static_cast<const T*>(p.tokens) + b * p.token_image_stride + at % p.count * p.token_stride;
  const T* text = static_cast<const T*>(p.classes) + b * p.class_image_stride + c * p.class_stride;
  const T* dselected = static_cast<const T*>(p.dselected) + b * p.dselected_image_stride + c * p.dselected_class_stride;
  const float length = sqrtf(squares(token, p.token_channel_stride, p.channels));
  const float text_length = sqrtf(squares(text, p.class_channel_stride, p.channels));
  const float inverse = 1.f / (length < kSmallest ? kSmallest : length);
  const float text_inverse = 1.f / (text_length < kSmallest ? kSmallest : text_length);
  const float slope = share<T>(p, b, c) * inverse;
  const float along = length < kSmallest ? 0.f : p.cosine[at] * inverse;
  const int64 first = static_cast<int64>(p.rank[at]) * p.channels;
  for (int64 d = lane; d < p.channels; d += kWarp) {
    const float direction =
        to_float(text[d * p.class_channel_stride]) * text_inverse - to_float(token[d * p.token_channel_stride]) * along;
    const float copied = first + d < p.length ? to_float(dselected[(first + d) * p.dselected_stride]) : 0.f;
    store(out + d, copied + slope * direction);
  }
  if (lane == 0) p.inverse[at] = inverse;
}

struct Shared {
  float units[kWarps][kChannels];
  float cosines[kWarps];
};

// Σ t̂ and Σ cos of a class's tokens in a slice: a warp has a run of them. Grid (B · C, slices, blocks of channels).
template <class T>
__device__ void add_units(const Params& p, Shared& s) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64 b = blockIdx.x / p.class_count;
  const int c = static_cast<int>(blockIdx.x % p.class_count);
  constexpr int kRun = kSlice / kWarps;
  const int64 begin = static_cast<int64>(blockIdx.y) * kSlice + warp * kRun;
  const int64 channel = static_cast<int64>(blockIdx.z) * kChannels + lane;
  const T* tokens = static_cast<const T*>(p.tokens) + b * p.token_image_stride;
  float sum[kEach] = {}, cosines = 0.f;
  for (int64 first = begin; first < begin + kRun; first += kWarp) {
    const int64 n = first + lane;
    for (unsigned left = __ballot_sync(kAllLanes, n < p.count && p.best[b * p.count + n] == c); left;
         left &= left - 1) {
      const int64 token = first + __ffs(static_cast<int>(left)) - 1;
      const float inverse = p.inverse[b * p.count + token];
      cosines += p.cosine[b * p.count + token];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (channel + i * kWarp < p.channels)
          sum[i] += inverse * to_float(tokens[token * p.token_stride + (channel + i * kWarp) * p.token_channel_stride]);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) s.units[warp][lane + i * kWarp] = sum[i];
  if (lane == 0) s.cosines[warp] = cosines;
  __syncthreads();
  const int64 part = blockIdx.x * p.slices + blockIdx.y;
  float total = 0.f;
  for (int w = 0; w < kWarps; ++w) total += s.units[w][threadIdx.x];
  const int64 own = static_cast<int64>(blockIdx.z) * kChannels + threadIdx.x;
  if (own < p.channels) p.units[part * p.channels + own] = total;
  if (threadIdx.x != 0 || blockIdx.z != 0) return;
  float total_cosines = 0.f;
  for (int w = 0; w < kWarps; ++w) total_cosines += s.cosines[w];
  p.cosines[part] = total_cosines;
}

// Grid (B · C, blocks of kThreads channels).
template <class T>
__device__ void dclasses(const Params& p) {
  const int64 b = blockIdx.x / p.class_count, c = blockIdx.x % p.class_count;
  const int64 d = static_cast<int64>(blockIdx.y) * kThreads + threadIdx.x;
  const T* text = static_cast<const T*>(p.classes) + b * p.class_image_stride + c * p.class_stride;
  const float length = sqrtf(squares(text, p.class_channel_stride, p.channels));  // by every warp, for itself
  if (d >= p.channels) return;
  T* out = static_cast<T*>(p.dclasses) + blockIdx.x * p.channels + d;
  if (p.counts[blockIdx.x] == 0) {
    store(out, 0.f);
    return;
  }
  float units = 0.f, cosines = 0.f;
  for (int64 part = blockIdx.x * p.slices; part < (blockIdx.x + 1) * p.slices; ++part)
    units += p.units[part * p.channels + d], cosines += p.cosines[part];
  const float inverse = 1.f / (length < kSmallest ? kSmallest : length);
  const float along = length < kSmallest ? 0.f : cosines * inverse * to_float(text[d * p.class_channel_stride]);
  store(out, share<T>(p, b, c) * inverse * (units - along));
}

}  // namespace fastcss::cuda::select_tokens_backward

extern "C" __global__ void __launch_bounds__(fastcss::cuda::select_tokens::scan::kThreads)
    select_tokens_rank(fastcss::cuda::select_tokens_backward::Params p) {
  __shared__ fastcss::cuda::select_tokens::scan::Shared s;
  fastcss::cuda::select_tokens_backward::rank(p, s);
}
#define FASTCSS_SELECT_TOKENS_BACKWARD(type, T)                                                 \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::select_tokens_backward::kThreads) \
      select_tokens_dtokens_##type(fastcss::cuda::select_tokens_backward::Params p) {           \
    fastcss::cuda::select_tokens_backward::dtokens<T>(p);                                       \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::select_tokens_backward::kThreads) \
      select_tokens_units_##type(fastcss::cuda::select_tokens_backward::Params p) {             \
    __shared__ fastcss::cuda::select_tokens_backward::Shared s;                                 \
    fastcss::cuda::select_tokens_backward::add_units<T>(p, s);                                  \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::select_tokens_backward::kThreads) \
      select_tokens_dclasses_##type(fastcss::cuda::select_tokens_backward::Params p) {          \
    fastcss::cuda::select_tokens_backward::dclasses<T>(p);                                      \
  }
FASTCSS_SELECT_TOKENS_BACKWARD(f32, float)
FASTCSS_SELECT_TOKENS_BACKWARD(bf16, fastcss::cuda::bf16)
FASTCSS_SELECT_TOKENS_BACKWARD(f16, fastcss::cuda::f16)
#undef FASTCSS_SELECT_TOKENS_BACKWARD
