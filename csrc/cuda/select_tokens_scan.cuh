// Finds the tokens of one class: a block has one class of one image, and each of its warps a run of the tokens.
#pragma once

#include "numeric.cuh"

namespace fastcss::cuda::select_tokens::scan {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;

struct Shared {
  int64 counts[kWarps];
  float cosines[kWarps];
};

struct Found {
  int64 before;  // tokens of the class in the runs of the warps before one's own
  int64 total;
  float cosines;  // their sum, always in the same order
};

// Returns how many tokens a warp's run has: a multiple of a ballot's lanes.
__device__ inline int64 run_length(int64 tokens) { return (tokens + kThreads - 1) / kThreads * kWarp; }

// Counts the tokens of class c, and sums their cosines unless `cosine` is null.
__device__ inline Found count(const int* best, const float* cosine, int64 tokens, int c, Shared& s) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64 run = run_length(tokens), begin = warp * run, end = begin + run < tokens ? begin + run : tokens;
  int own = 0;
  float sum = 0.f;
#pragma unroll 8
  for (int64 n = begin + lane; n < end; n += kWarp)
    if (best[n] == c) {
      ++own;
      if (cosine) sum += cosine[n];
    }
  for (int step = kWarp / 2; step > 0; step /= 2) own += __shfl_xor_sync(kAllLanes, own, step);
  sum = warp_sum(sum);
  if (lane == 0) s.counts[warp] = own, s.cosines[warp] = sum;
  __syncthreads();
  Found found{0, 0, 0.f};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) found.before += s.counts[w];
    found.total += s.counts[w];
    found.cosines += s.cosines[w];
  }
  return found;
}

struct Total {
  int64 count;
  float sum;
};

// Adds up two lists by the whole block, always in the same order. Every thread has the result.
__device__ inline Total total(const float* counts, const float* sums, int64 size, Shared& s) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float count = 0.f, sum = 0.f;  // a tile has few tokens and a thread few tiles, so count is a whole number
  for (int64 i = threadIdx.x; i < size; i += kThreads) count += counts[i], sum += sums[i];
  count = warp_sum(count), sum = warp_sum(sum);
  __syncthreads();
  if (lane == 0) s.counts[warp] = static_cast<int64>(count), s.cosines[warp] = sum;
  __syncthreads();
  Total result{0, 0.f};
  for (int w = 0; w < kWarps; ++w) result.count += s.counts[w], result.sum += s.cosines[w];
  return result;
}

// Calls visit(token, rank) by the whole warp for every token of class c in its run, up to the rank `limit`.
template <class Visit>
__device__ void for_ranks(const int* best, int64 tokens, int c, int64 rank, int64 limit, Visit visit) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64 run = run_length(tokens), begin = warp * run, end = begin + run < tokens ? begin + run : tokens;
  for (int64 first = begin; first < end && rank < limit; first += kWarp) {
    unsigned left = __ballot_sync(kAllLanes, first + lane < end && best[first + lane] == c);
    for (; left && rank < limit; left &= left - 1, ++rank) visit(first + __ffs(static_cast<int>(left)) - 1, rank);
  }
}

}  // namespace fastcss::cuda::select_tokens::scan
