// select_tokens' backward. Let t̂ = t / |t|, û = c / |c|, and g = dpresence / n for a class c that averages n tokens:
//   w = Σ g û over the classes that average a token,   v = Σ t̂ over the tokens of a class,
//   dt = (w − (w · t̂) t̂) / |t|,   dc = g (v − (v · û) û) / |c|.
// A length below 1e-12 was replaced by 1e-12, which has no slope: the second term is missing then.
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
  const int64* support;   // [B, C], n
  const int* best;        // [B, N]
  const unsigned* above;  // [B, N, words], bits of the classes that average a token
  int64 words;            // 0 if only its best class averages a token
  int64 batch, count, class_count, channels, length, slices;
  int* rank;       // [B, N], of a token among those of its best class
  float* slope;    // [B, C], g / |c|
  float* inverse;  // [B, N], 1 / |t|
  float* units;    // [B, C, slices, D], Σ t̂ of a slice's tokens of the class
  void* dtokens;   // [B, N, D]
  void* dclasses;  // [B, C, D]
};

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

// Grid (B · C), with scan::kThreads.
template <class T>
__device__ void rank(const Params& p, select_tokens::scan::Shared& s) {
  const int64 b = blockIdx.x / p.class_count, first = b * p.count;
  const int c = static_cast<int>(blockIdx.x % p.class_count);
  const auto found = select_tokens::scan::count(p.best + first, nullptr, p.count, c, s);
  select_tokens::scan::for_ranks(p.best + first, p.count, c, found.before, p.count, [&](int64 token, int64 rank) {
    if (threadIdx.x % kWarp == 0) p.rank[first + token] = static_cast<int>(rank);
  });
  if (threadIdx.x >= kWarp) return;
  const T* text = static_cast<const T*>(p.classes) + b * p.class_image_stride + c * p.class_stride;
  const float length = sqrtf(squares(text, p.class_channel_stride, p.channels));
  const T* dpresence = static_cast<const T*>(p.dpresence) + b * p.dpresence_image_stride + c * p.dpresence_stride;
  const int64 n = p.support[blockIdx.x];
  if (threadIdx.x == 0)
    p.slope[blockIdx.x] = n ? to_float(*dpresence) / n / (length < kSmallest ? kSmallest : length) : 0.f;
}

// Returns the classes of word w that average a token whose best class is `best`.
__device__ inline unsigned classes_of(const Params& p, int64 token, int best, int64 w) {
  if (p.words) return p.above[token * p.words + w];
  return best >= 0 && best / 32 == w ? 1u << best % 32 : 0u;
}

// Computes channel d of w for a token of image b.
template <class T>
__device__ float pull(const Params& p, int64 b, int64 token, int best, int64 d) {
  const T* classes = static_cast<const T*>(p.classes) + b * p.class_image_stride + d * p.class_channel_stride;
  const float* slope = p.slope + b * p.class_count;
  float sum = 0.f;
  for (int64 w = p.words ? 0 : best / 32; w < (p.words ? p.words : best / 32 + 1); ++w)
    for (unsigned left = classes_of(p, token, best, w); left; left &= left - 1) {
      const int64 c = 32 * w + __ffs(static_cast<int>(left)) - 1;
      sum += slope[c] * to_float(classes[c * p.class_stride]);
    }
  return sum;
}

// Each warp has one token. Grid (blocks of kWarps of the B · N tokens).
template <class T>
__device__ void dtokens(const Params& p) {
  const int lane = threadIdx.x % kWarp;
  const int64 at = static_cast<int64>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (at >= p.batch * p.count) return;
  const int64 b = at / p.count;
  const int c = p.best[at];
  T* out = static_cast<T*>(p.dtokens) + at * p.channels;
  if (c < 0) {
    for (int64 d = lane; d < p.channels; d += kWarp) store(out + d, 0.f);
    return;
  }
  const T* token = static_cast<const T*>(p.tokens) + b * p.token_image_stride + at % p.count * p.token_stride;
  const T* dselected = static_cast<const T*>(p.dselected) + b * p.dselected_image_stride + c * p.dselected_class_stride;
  float along = 0.f;
  for (int64 d = lane; d < p.channels; d += kWarp)
    along += to_float(token[d * p.token_channel_stride]) * pull<T>(p, b, at, c, d);
  along = warp_sum(along);
  const float length = sqrtf(squares(token, p.token_channel_stride, p.channels));
  const float inverse = 1.f / (length < kSmallest ? kSmallest : length);
  along = length < kSmallest ? 0.f : along * inverse * inverse;
  const int64 first = static_cast<int64>(p.rank[at]) * p.channels;
  for (int64 d = lane; d < p.channels; d += kWarp) {
    const float direction = pull<T>(p, b, at, c, d) - to_float(token[d * p.token_channel_stride]) * along;
    const float copied = first + d < p.length ? to_float(dselected[(first + d) * p.dselected_stride]) : 0.f;
    store(out + d, copied + inverse * direction);
  }
  if (lane == 0) p.inverse[at] = inverse;
}

struct Shared {
  float units[kWarps][kChannels];
};

// Sums t̂ of a class's tokens in a slice; each warp has a run of them. Grid (B · C, slices, blocks of channels).
template <class T>
__device__ void add_units(const Params& p, Shared& s) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64 b = blockIdx.x / p.class_count;
  const int c = static_cast<int>(blockIdx.x % p.class_count);
  constexpr int kRun = kSlice / kWarps;
  const int64 begin = static_cast<int64>(blockIdx.y) * kSlice + warp * kRun;
  const int64 channel = static_cast<int64>(blockIdx.z) * kChannels + lane;
  const T* tokens = static_cast<const T*>(p.tokens) + b * p.token_image_stride;
  float sum[kEach] = {};
  for (int64 first = begin; first < begin + kRun; first += kWarp) {
    const int64 n = first + lane, at = b * p.count + n;
    const bool averaged = n < p.count && (classes_of(p, at, p.best[at], c / 32) >> c % 32 & 1u);
    for (unsigned left = __ballot_sync(kAllLanes, averaged); left; left &= left - 1) {
      const int64 token = first + __ffs(static_cast<int>(left)) - 1;
      const float inverse = p.inverse[b * p.count + token];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (channel + i * kWarp < p.channels)
          sum[i] += inverse * to_float(tokens[token * p.token_stride + (channel + i * kWarp) * p.token_channel_stride]);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) s.units[warp][lane + i * kWarp] = sum[i];
  __syncthreads();
  const int64 part = blockIdx.x * p.slices + blockIdx.y;
  float total = 0.f;
  for (int w = 0; w < kWarps; ++w) total += s.units[w][threadIdx.x];
  const int64 own = static_cast<int64>(blockIdx.z) * kChannels + threadIdx.x;
  if (own < p.channels) p.units[part * p.channels + own] = total;
}

// Computes channel d of v: adds up the class's slices in their order.
__device__ inline float sum_slices(const Params& p, int64 d) {
  float sum = 0.f;
  for (int64 part = blockIdx.x * p.slices; part < (blockIdx.x + 1) * p.slices; ++part)
    sum += p.units[part * p.channels + d];
  return sum;
}

// Grid (B · C).
template <class T>
__device__ void dclasses(const Params& p, Shared& s) {
  const int64 b = blockIdx.x / p.class_count, c = blockIdx.x % p.class_count;
  const T* text = static_cast<const T*>(p.classes) + b * p.class_image_stride + c * p.class_stride;
  T* out = static_cast<T*>(p.dclasses) + blockIdx.x * p.channels;
  const float length = sqrtf(squares(text, p.class_channel_stride, p.channels));  // every warp computes its own copy
  float along = 0.f;
  for (int64 d = threadIdx.x; d < p.channels; d += kThreads)
    along += to_float(text[d * p.class_channel_stride]) * sum_slices(p, d);
  along = warp_sum(along);
  if (threadIdx.x % kWarp == 0) s.units[threadIdx.x / kWarp][0] = along;
  __syncthreads();
  along = 0.f;
  for (int w = 0; w < kWarps; ++w) along += s.units[w][0];
  along = length < kSmallest ? 0.f : along / length / length;
  for (int64 d = threadIdx.x; d < p.channels; d += kThreads) {
    const float direction = sum_slices(p, d) - along * to_float(text[d * p.class_channel_stride]);
    store(out + d, p.support[blockIdx.x] ? p.slope[blockIdx.x] * direction : 0.f);
  }
}

}  // namespace fastcss::cuda::select_tokens_backward

#define FASTCSS_SELECT_TOKENS_BACKWARD(type, T)                                                 \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::select_tokens::scan::kThreads)    \
      select_tokens_rank_##type(fastcss::cuda::select_tokens_backward::Params p) {              \
    __shared__ fastcss::cuda::select_tokens::scan::Shared s;                                    \
    fastcss::cuda::select_tokens_backward::rank<T>(p, s);                                       \
  }                                                                                             \
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
    __shared__ fastcss::cuda::select_tokens_backward::Shared s;                                 \
    fastcss::cuda::select_tokens_backward::dclasses<T>(p, s);                                   \
  }
FASTCSS_SELECT_TOKENS_BACKWARD(f32, float)
FASTCSS_SELECT_TOKENS_BACKWARD(bf16, fastcss::cuda::bf16)
FASTCSS_SELECT_TOKENS_BACKWARD(f16, fastcss::cuda::f16)
#undef FASTCSS_SELECT_TOKENS_BACKWARD
