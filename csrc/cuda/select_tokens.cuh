// select_tokens: the class of each token, then the tokens of each class.
//
// The cosines of N tokens with C classes take 2·N·C·D operations for N·D elements read. 20 classes make 40 operations
// per element, or 10 per byte of float32; a GPU of 67 TFLOP/s and 4.8 TB/s does 14 per byte. So the products run on the
// ordinary units, exact in float32, and are no slower than the reading for up to some 28 classes.
#pragma once

#include "numeric.cuh"
#include "select_tokens_scan.cuh"

namespace fastcss::cuda::select_tokens {

constexpr int kThreads = 256;
constexpr int kTokens = 64;   // of a block
constexpr int kClasses = 32;  // at a time
constexpr int kDepth = 32;    // channels at a time
constexpr int kGroup = 8;     // threads that share tokens, each with every kGroup-th class
constexpr int kTokensEach = kTokens / (kThreads / kGroup);
constexpr int kClassesEach = kClasses / kGroup;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStride = kDepth + 4;  // of shared rows: eight of them read at once touch every bank once
constexpr float kSmallest = 1e-12f;

struct AssignParams {
  const void* tokens;  // [B, N, D]
  int64 token_image_stride, token_stride, token_channel_stride;
  const void* classes;  // [B, C, D]
  int64 class_image_stride, class_stride, class_channel_stride;
  int64 count, class_count, channels, tiles;  // tiles of kTokens tokens in an image
  double threshold;
  int* best;          // [B, N]
  float* cosine;      // [B, N], with the best
  int64 words;        // ⌈C / 32⌉; or 0 if presence is of the best class alone, and the rest is not written
  unsigned* above;    // [B, N, words], a bit for each class that the token reaches the threshold with
  float* tile_sums;   // [B, C, tiles], of these cosines
  float* tile_reach;  // [B, C, tiles], how many
};

struct alignas(16) AssignShared {
  float tokens[kTokens][kStride];
  float classes[kClasses][kStride];
  float token_length[kTokens];
  float class_length[kClasses];
  float sums[kWarps][kClasses];
  float reach[kWarps][kClasses];
};
static_assert(kClasses == 32, "the classes of a turn have one word of bits");

// Loads channels [first, first + kDepth) of `rows` rows as float32, with zeros past the ends. kThreads / rows threads
// share a row, and each returns the sum of squares of its own elements.
template <class T>
__device__ float load_rows(const T* from, int64 row_stride, int64 stride, int64 rows, int64 channels, int64 first,
                           bool packed, int tile, float (*to)[kStride]) {
  const int threads = kThreads / tile, each = kDepth / threads;
  const int row = threadIdx.x / threads, begin = threadIdx.x % threads * each;
  float squares = 0.f;
  for (int i = 0; i < each; i += 4) {
    const int64 channel = first + begin + i;
    float value[4];
    if (packed && row < rows && channel + 4 <= channels) {
      struct alignas(4 * sizeof(T)) Four {
        T at[4];
      };
      const Four four = *reinterpret_cast<const Four*>(from + row * row_stride + channel);
      for (int j = 0; j < 4; ++j) value[j] = to_float(four.at[j]);
    } else {
      for (int j = 0; j < 4; ++j)
        value[j] =
            row < rows && channel + j < channels ? to_float(from[row * row_stride + (channel + j) * stride]) : 0.f;
    }
    for (int j = 0; j < 4; ++j) {
      to[row][begin + i + j] = value[j];
      squares += value[j] * value[j];
    }
  }
  return squares;
}

// Returns max(√ Σ squares, 1e-12) of the row that `threads` neighbouring threads share.
__device__ inline float length_of(float squares, int threads) {
  for (int step = threads / 2; step > 0; step /= 2) squares += __shfl_xor_sync(kAllLanes, squares, step);
  const float length = sqrtf(squares);
  return length < kSmallest ? kSmallest : length;
}

// Notes which of a turn's classes reach the threshold: the bits of a thread's tokens, and the tile's sums. Neighbouring
// threads have the same tokens and different classes; the threads of a warp with the same classes are kGroup apart.
__device__ inline void keep_reached(const AssignParams& p, AssignShared& s,
                                    const float (&cosine)[kTokensEach][kClassesEach], int64 b, int64 first,
                                    int64 first_class) {
  const int group = threadIdx.x % kGroup, own = threadIdx.x / kGroup * kTokensEach;
  const float threshold = static_cast<float>(p.threshold);
  for (int t = 0; t < kTokensEach; ++t) {
    unsigned bits = 0;
    for (int c = 0; c < kClassesEach; ++c)
      if (cosine[t][c] >= threshold) bits |= 1u << (group + c * kGroup);
    for (int step = kGroup / 2; step > 0; step /= 2) bits |= __shfl_xor_sync(kAllLanes, bits, step);
    if (group == 0 && first + own + t < p.count)
      p.above[(b * p.count + first + own + t) * p.words + first_class / kClasses] = bits;
  }
  for (int c = 0; c < kClassesEach; ++c) {
    float sum = 0.f, reach = 0.f;
    for (int t = 0; t < kTokensEach; ++t)
      if (cosine[t][c] >= threshold) sum += cosine[t][c], reach += 1.f;
    for (int step = kWarp / 2; step >= kGroup; step /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
      reach += __shfl_xor_sync(kAllLanes, reach, step);
    }
    if (threadIdx.x % kWarp < kGroup) {
      s.sums[threadIdx.x / kWarp][group + c * kGroup] = sum;
      s.reach[threadIdx.x / kWarp][group + c * kGroup] = reach;
    }
  }
  __syncthreads();
  const int64 c = first_class + threadIdx.x;
  if (threadIdx.x >= kClasses || c >= p.class_count) return;
  float sum = 0.f, reach = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += s.sums[w][threadIdx.x], reach += s.reach[w][threadIdx.x];
  const int64 to = (b * p.class_count + c) * p.tiles + first / kTokens;
  p.tile_sums[to] = sum;
  p.tile_reach[to] = reach;
}

// Grid (B · tiles).
template <class T>
__device__ void assign(const AssignParams& p, AssignShared& s) {
  const int64 b = blockIdx.x / p.tiles, first = blockIdx.x % p.tiles * kTokens;
  const int64 tokens_left = p.count - first;
  const T* tokens = static_cast<const T*>(p.tokens) + b * p.token_image_stride + first * p.token_stride;
  const T* classes = static_cast<const T*>(p.classes) + b * p.class_image_stride;
  const bool packed_tokens = packed_rows<T>(p.tokens, p.token_image_stride, p.token_stride, p.token_channel_stride);
  const bool packed_classes = packed_rows<T>(p.classes, p.class_image_stride, p.class_stride, p.class_channel_stride);
  const int group = threadIdx.x % kGroup, own = threadIdx.x / kGroup * kTokensEach;
  float best[kTokensEach];
  int best_class[kTokensEach];
  for (int t = 0; t < kTokensEach; ++t) best[t] = -__int_as_float(0x7f800000), best_class[t] = 0;
  for (int64 first_class = 0; first_class < p.class_count; first_class += kClasses) {
    float sum[kTokensEach][kClassesEach] = {}, token_squares = 0.f, class_squares = 0.f;
    for (int64 depth = 0; depth < p.channels; depth += kDepth) {
      __syncthreads();
      token_squares += load_rows(tokens, p.token_stride, p.token_channel_stride, tokens_left, p.channels, depth,
                                 packed_tokens, kTokens, s.tokens);
      class_squares += load_rows(classes + first_class * p.class_stride, p.class_stride, p.class_channel_stride,
                                 p.class_count - first_class, p.channels, depth, packed_classes, kClasses, s.classes);
      __syncthreads();
#pragma unroll 2
      for (int d = 0; d < kDepth; d += 4) {
        Pack<float> token[kTokensEach], text[kClassesEach];
#pragma unroll
        for (int t = 0; t < kTokensEach; ++t) token[t] = *reinterpret_cast<const Pack<float>*>(&s.tokens[own + t][d]);
#pragma unroll
        for (int c = 0; c < kClassesEach; ++c)
          text[c] = *reinterpret_cast<const Pack<float>*>(&s.classes[group + c * kGroup][d]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int t = 0; t < kTokensEach; ++t)
#pragma unroll
            for (int c = 0; c < kClassesEach; ++c) sum[t][c] += token[t].at[i] * text[c].at[i];
      }
    }
    const float token_length = length_of(token_squares, kThreads / kTokens);
    const float class_length = length_of(class_squares, kThreads / kClasses);
    s.token_length[threadIdx.x / (kThreads / kTokens)] = token_length;
    s.class_length[threadIdx.x / (kThreads / kClasses)] = class_length;
    __syncthreads();
    for (int t = 0; t < kTokensEach; ++t)
      for (int c = 0; c < kClassesEach; ++c) {
        const int number = static_cast<int>(first_class) + group + c * kGroup;
        float& cosine = sum[t][c];
        cosine = cosine / s.token_length[own + t] / s.class_length[group + c * kGroup];
        if (number >= p.class_count || own + t >= tokens_left) cosine = __int_as_float(0x7fffffff);
        // NaN is never above; equal cosines keep the lower class, which comes first.
        if (cosine > best[t]) best[t] = cosine, best_class[t] = number;
      }
    if (p.words) keep_reached(p, s, sum, b, first, first_class);
  }
  for (int t = 0; t < kTokensEach; ++t) {
    for (int step = kGroup / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best[t], step);
      const int other_class = __shfl_xor_sync(kAllLanes, best_class[t], step);
      if (other > best[t] || (other == best[t] && other_class < best_class[t]))
        best[t] = other, best_class[t] = other_class;
    }
    const int64 to = b * p.count + first + own + t;
    if (group != 0 || own + t >= tokens_left) continue;
    p.best[to] = best[t] >= static_cast<float>(p.threshold) ? best_class[t] : -1;
    p.cosine[to] = best[t];
  }
}

struct CollectParams {
  const void* tokens;  // [B, N, D]
  int64 image_stride, stride, channel_stride;
  int64 count, class_count, channels, length;
  const int* best;      // [B, N]
  const float* cosine;  // [B, N]
  int64 words, tiles;   // as assign has them, and what it leaves
  const float* tile_sums;
  const float* tile_reach;
  void* selected;  // [B, C, length]
  int64* counts;   // [B, C]
  void* presence;  // [B, C]
  int64* support;  // [B, C], of how many tokens presence is the mean
};

// Grid (B · C): a block has one class of one image.
template <class T>
__device__ void collect(const CollectParams& p, scan::Shared& s) {
  const int64 b = blockIdx.x / p.class_count;
  const int lane = threadIdx.x % kWarp, c = static_cast<int>(blockIdx.x % p.class_count);
  const int* best = p.best + b * p.count;
  const scan::Found found = scan::count(best, p.cosine + b * p.count, p.count, c, s);
  scan::Total total{found.total, found.cosines};
  if (p.words) total = scan::total(p.tile_reach + blockIdx.x * p.tiles, p.tile_sums + blockIdx.x * p.tiles, p.tiles, s);
  const T* tokens = static_cast<const T*>(p.tokens) + b * p.image_stride;
  T* selected = static_cast<T*>(p.selected) + blockIdx.x * p.length;
  const int64 places = (p.length + p.channels - 1) / p.channels;
  scan::for_ranks(best, p.count, c, found.before, places, [&](int64 token, int64 rank) {
    const int64 to = rank * p.channels;
    for (int64 d = lane; d < p.channels && to + d < p.length; d += kWarp)
      selected[to + d] = tokens[token * p.stride + d * p.channel_stride];
  });
  const int64 filled = found.total < places ? found.total * p.channels : p.length;
  for (int64 i = filled + threadIdx.x; i < p.length; i += scan::kThreads) store(selected + i, 0.f);
  if (threadIdx.x != 0) return;
  p.counts[blockIdx.x] = found.total;
  p.support[blockIdx.x] = total.count;
  store(static_cast<T*>(p.presence) + blockIdx.x, total.count ? total.sum / total.count : 0.f);
}

}  // namespace fastcss::cuda::select_tokens

#define FASTCSS_SELECT_TOKENS(type, T)                                                       \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::select_tokens::kThreads)       \
      select_tokens_assign_##type(fastcss::cuda::select_tokens::AssignParams p) {            \
    __shared__ fastcss::cuda::select_tokens::AssignShared s;                                 \
    fastcss::cuda::select_tokens::assign<T>(p, s);                                           \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::select_tokens::scan::kThreads) \
      select_tokens_collect_##type(fastcss::cuda::select_tokens::CollectParams p) {          \
    __shared__ fastcss::cuda::select_tokens::scan::Shared s;                                 \
    fastcss::cuda::select_tokens::collect<T>(p, s);                                          \
  }
FASTCSS_SELECT_TOKENS(f32, float)
FASTCSS_SELECT_TOKENS(bf16, fastcss::cuda::bf16)
FASTCSS_SELECT_TOKENS(f16, fastcss::cuda::f16)
#undef FASTCSS_SELECT_TOKENS
