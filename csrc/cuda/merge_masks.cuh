// merge_masks: a block decides kTile × kTile pixels. It tries the masks from the best score down until every one of its
// pixels has a mask. No resized mask leaves the chip.
//
// An interpolated value lies between the elements it is made of, so a mask is passed over if none of its elements under
// the tile is above the threshold; each warp checks another mask for that. Any other mask is resized along its rows
// into shared memory first, then from there along the columns.
#pragma once

#include "numeric.cuh"
#include "two_step_bilinear.cuh"

namespace fastcss::cuda::merge_masks {

constexpr int kThreads = 256;
constexpr int kTile = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowsEach = kTile / kWarps;  // pixels of a thread, in one column
constexpr int kRows = 40;                  // rows of a mask under a tile that fit in shared memory
// Rounding can add this much to an interpolated value, relative to its largest element: a dozen half units of 2⁻²⁴.
constexpr float kSlack = 2e-6f;

struct Params {
  const void* masks;  // [K, h, w]
  int64 mask_stride, row_stride, stride, count, rows, columns;
  const void* scores;  // [K], each of score_size bytes
  int64 score_stride, score_size;
  const int64* order;  // [K]
  int64 order_stride, height, width, crop_height, crop_width;
  double threshold;
  int64* labels;  // [height, width]
  void* score;    // [height, width], or null
};

struct Shared {
  TwoTaps down[kTile];        // of each row of the tile
  float lines[kRows][kTile];  // rows of the mask, resized along themselves
  bool may[kWarps];           // whether each warp's mask may be above the threshold here
};

// Names the elements that some pixels of a tile are made of, along one dimension.
struct Span {
  int first, last;
};

__device__ inline Span span(int first, int64 outputs, int64 crop, int64 inputs) {
  const int last = first + kTile < outputs ? first + kTile - 1 : static_cast<int>(outputs) - 1;
  return {two_taps(first, outputs, crop, inputs).first.near, two_taps(last, outputs, crop, inputs).second.far};
}

// Tells whether the mask may be above the threshold somewhere in the tile; a whole warp must call it.
template <class T>
__device__ bool reaches(const Params& p, const T* mask, Span rows, Span columns, float threshold) {
  float most = -__int_as_float(0x7f800000), size = 0.f;  // −∞; NaN is no mask, and enters neither
  const int width = columns.last - columns.first + 1, elements = (rows.last - rows.first + 1) * width;
#pragma unroll 4
  for (int i = threadIdx.x % kWarp; i < elements; i += kWarp) {
    const int row = rows.first + i / width, column = columns.first + i % width;
    const float value = to_float(mask[row * p.row_stride + column * p.stride]);
    most = fmaxf(most, value), size = fmaxf(size, fabsf(value));
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
    size = fmaxf(size, __shfl_xor_sync(kAllLanes, size, step));
  }
  return !(most <= threshold - kSlack * size);
}

__device__ inline void copy_score(const Params& p, int64 pixel, int64 mask) {
  const int64 from = mask * p.score_stride;
  if (p.score_size == 2)
    static_cast<unsigned short*>(p.score)[pixel] = mask < 0 ? 0 : static_cast<const unsigned short*>(p.scores)[from];
  else if (p.score_size == 4)
    static_cast<unsigned*>(p.score)[pixel] = mask < 0 ? 0 : static_cast<const unsigned*>(p.scores)[from];
  else
    static_cast<uint64*>(p.score)[pixel] = mask < 0 ? 0 : static_cast<const uint64*>(p.scores)[from];
}

// Grid (tiles along the width, tiles along the height).
template <class T>
__device__ void run(const Params& p, Shared& s) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int left = blockIdx.x * kTile, top = blockIdx.y * kTile;
  const int column = left + lane;
  const float threshold = static_cast<float>(p.threshold);
  const Span rows = span(top, p.height, p.crop_height, p.rows), columns = span(left, p.width, p.crop_width, p.columns);
  const bool fits = rows.last - rows.first < kRows;
  // Threads past the picture's edge work on its last column and row, and write nothing.
  const TwoTaps across = two_taps(column < p.width ? column : p.width - 1, p.width, p.crop_width, p.columns);
  if (warp == 0) {
    const int row = top + lane;
    s.down[lane] = two_taps(row < p.height ? row : p.height - 1, p.height, p.crop_height, p.rows);
  }
  int winner[kRowsEach];
  for (int i = 0; i < kRowsEach; ++i) winner[i] = -1;
  bool decided = false;
  for (int64 place = 0; place < p.count && !decided; place += kWarps) {
    const int64 own = place + warp;
    const int64 candidate = own < p.count ? p.order[own * p.order_stride] : -1;
    const bool known = candidate >= 0 && candidate < p.count;
    const T* masks = static_cast<const T*>(p.masks);
    const bool may = known && reaches(p, masks + candidate * p.mask_stride, rows, columns, threshold);
    if (lane == 0) s.may[warp] = may;
    __syncthreads();
    for (int i = 0; i < kWarps && !decided; ++i) {
      if (!s.may[i]) continue;
      const int64 k = p.order[(place + i) * p.order_stride];
      const T* mask = masks + k * p.mask_stride;
      const auto resized = [&](int row) {
        return across([&](int c) { return to_float(mask[row * p.row_stride + c * p.stride]); });
      };
      if (fits)
        for (int row = rows.first + warp; row <= rows.last; row += kWarps)
          s.lines[row - rows.first][lane] = resized(row);
      __syncthreads();
      bool all = true;
      for (int j = 0; j < kRowsEach; ++j) {
        if (winner[j] >= 0) continue;
        const TwoTaps down = s.down[warp + j * kWarps];
        const float value = fits ? down([&](int row) { return s.lines[row - rows.first][lane]; }) : down(resized);
        if (value > threshold)
          winner[j] = static_cast<int>(k);
        else
          all = false;
      }
      decided = __syncthreads_and(all);
    }
    __syncthreads();  // before s.may is written again
  }
  for (int i = 0; i < kRowsEach; ++i) {
    const int row = top + warp + i * kWarps;
    if (column >= p.width || row >= p.height) continue;
    const int64 pixel = row * p.width + column;
    p.labels[pixel] = winner[i] + 1;
    if (p.score) copy_score(p, pixel, winner[i]);
  }
}

}  // namespace fastcss::cuda::merge_masks

#define FASTCSS_MERGE_MASKS(name, T)                                                 \
  extern "C" __global__ void __launch_bounds__(fastcss::cuda::merge_masks::kThreads) \
      name(fastcss::cuda::merge_masks::Params p) {                                   \
    __shared__ fastcss::cuda::merge_masks::Shared s;                                 \
    fastcss::cuda::merge_masks::run<T>(p, s);                                        \
  }
FASTCSS_MERGE_MASKS(merge_masks_f32, float)
FASTCSS_MERGE_MASKS(merge_masks_bf16, fastcss::cuda::bf16)
FASTCSS_MERGE_MASKS(merge_masks_f16, fastcss::cuda::f16)
#undef FASTCSS_MERGE_MASKS
