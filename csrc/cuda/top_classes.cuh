// top_classes: a radix select, then a sort of what was selected.
//
// Score and index are one 64-bit key that no other element of the row has: the larger key is the better score, or the
// lower index of equal scores. So the k best are all keys at and above a bound, found digit by digit from histograms,
// and their order is that of their keys, however they were collected. A block gives kBlockRanks ranks of one row.
#pragma once

#include "numeric.cuh"

namespace fastcss::cuda::top_classes {

constexpr int kThreads = 1024;
constexpr int kBlockRanks = 1024;
constexpr int kBins = 2048;

struct Params {
  const void* score;  // [B, T]
  int64 row_stride, stride, classes, k;
  void* values;  // [B, k]
  int64* index;  // [B, k]
};

struct Shared {
  uint64 kept[kBlockRanks];
  int bins[kBins];
  int warps[kThreads / kWarp];
  uint64 prefix;
  int above, inside, count;
};

// Orders NaN above all numbers, and −0 like 0, as torch's sort does.
__device__ inline uint64 key_of(float score, int64 index) {
  const unsigned bits = __float_as_uint(score + 0.f);
  const unsigned ordered = score != score ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
  return static_cast<uint64>(ordered) << 32 | static_cast<unsigned>(~index);
}

// Calls f(key) for every element of the row, with several loads in flight at once.
template <class T, class F>
__device__ void for_keys(const Params& p, const T* row, F f) {
  constexpr int kUnroll = 8;
  for (int64 first = threadIdx.x; first < p.classes; first += kUnroll * kThreads) {
    float score[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64 at = first + i * kThreads;
      score[i] = at < p.classes ? to_float(row[at * p.stride]) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (first + i * kThreads < p.classes) f(key_of(score[i], first + i * kThreads));
  }
}

// Finds the bin, from the highest down, that holds the element of this rank (1 is the first): s.above elements lie
// above it and s.inside in it. Every thread gets it.
__device__ inline int find_bin(Shared& s, int rank) {
  constexpr int kEach = kBins / kThreads;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  int own = 0;
  for (int i = 0; i < kEach; ++i) own += s.bins[top - i];
  int sum = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += lower;
  }
  if (lane == kWarp - 1) s.warps[warp] = sum;
  __syncthreads();
  int lower_warps = lane < warp ? s.warps[lane] : 0;
  for (int step = kWarp / 2; step > 0; step /= 2) lower_warps += __shfl_xor_sync(kAllLanes, lower_warps, step);
  sum += lower_warps;
  int above = sum - own;
  if (above < rank && rank <= sum)
    for (int i = 0; i < kEach; ++i) {
      const int inside = s.bins[top - i];
      if (rank <= above + inside) {
        s.above = above, s.inside = inside, s.count = top - i;
        break;
      }
      above += inside;
    }
  __syncthreads();
  return s.count;
}

// Returns a bound that exactly `rank` keys of the row reach; 0 < rank ≤ classes.
template <class T>
__device__ uint64 bound_of(const Params& p, const T* row, int64 rank, Shared& s) {
  uint64 prefix = 0;
  int shift = 64;
  int remaining = static_cast<int>(rank);
  while (shift > 0) {
    const int bits = shift == 42 || shift == 10 ? 10 : 11, above_digit = shift;
    shift -= bits;
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
    __syncthreads();
    for_keys(p, row, [&](uint64 key) {
      if (above_digit == 64 || key >> above_digit == prefix) atomicAdd(&s.bins[key >> shift & ((1 << bits) - 1)], 1);
    });
    __syncthreads();
    prefix = prefix << bits | find_bin(s, remaining);
    remaining -= s.above;
    const bool whole = s.inside == remaining;
    __syncthreads();  // the next digit overwrites what was just read
    if (whole) break;
  }
  return prefix << shift;
}

// Sorts s.kept[0, size) from largest to smallest; size is a power of two. If the distance is at most 32, a warp's
// threads exchange among their own 64 keys and need not wait for other warps.
__device__ inline void sort_kept(Shared& s, int size) {
  int last = kWarp + 1;
  for (int run = 2; run <= size; run *= 2)
    for (int distance = run / 2; distance > 0; distance /= 2) {
      if (distance > kWarp || last > kWarp)
        __syncthreads();
      else
        __syncwarp();
      last = distance;
      const int t = threadIdx.x;
      if (t >= size / 2) continue;
      const int low = 2 * t - (t & (distance - 1)), high = low + distance;
      const uint64 a = s.kept[low], b = s.kept[high];
      if ((low & run) == 0 ? a < b : a > b) s.kept[low] = b, s.kept[high] = a;
    }
  __syncthreads();
}

// Grid (B, blocks of kBlockRanks ranks).
template <class T>
__device__ void run(const Params& p, Shared& s) {
  const T* row = static_cast<const T*>(p.score) + blockIdx.x * p.row_stride;
  const int64 first = static_cast<int64>(blockIdx.y) * kBlockRanks, left = p.k - first;
  const int ranks = left < kBlockRanks ? static_cast<int>(left) : kBlockRanks;
  const uint64 lowest = bound_of(p, row, first + ranks, s);
  const uint64 ceiling = first ? bound_of(p, row, first, s) : 0;
  int size = 1;
  while (size < ranks) size *= 2;
  if (threadIdx.x == 0) s.count = 0;
  for (int i = threadIdx.x; i < size; i += kThreads) s.kept[i] = 0;  // below every key
  __syncthreads();
  for_keys(p, row, [&](uint64 key) {
    if (key >= lowest && (first == 0 || key < ceiling)) s.kept[atomicAdd(&s.count, 1)] = key;
  });
  sort_kept(s, size);
  for (int i = threadIdx.x; i < ranks; i += kThreads) {
    const int64 at = static_cast<unsigned>(~s.kept[i]), to = blockIdx.x * p.k + first + i;
    static_cast<T*>(p.values)[to] = row[at * p.stride];
    p.index[to] = at;
  }
}

}  // namespace fastcss::cuda::top_classes

#define FASTCSS_TOP_CLASSES(name, T)                                                 \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::top_classes::kThreads) \
      name(fastcss::cuda::top_classes::Params p) {                                   \
    __shared__ fastcss::cuda::top_classes::Shared s;                                 \
    fastcss::cuda::top_classes::run<T>(p, s);                                        \
  }
FASTCSS_TOP_CLASSES(top_classes_f32, float)
FASTCSS_TOP_CLASSES(top_classes_bf16, fastcss::cuda::bf16)
FASTCSS_TOP_CLASSES(top_classes_f16, fastcss::cuda::f16)
#undef FASTCSS_TOP_CLASSES
