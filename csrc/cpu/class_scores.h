// Has what the forward and the backward pass of class_affinity share: the scores F Cᵀ of pixels and class centres, the
// softmax over the classes, and the mean centre that it gives.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace fastcss::cpu {

// The centres of one image [C, D], packed for both products.
class ClassCenters {
 public:
  ClassCenters(int64_t C, int64_t D, bool pairs) : C(C), D(D), pairs(pairs) {}

  int64_t size() const { return class_panels * class_size + channel_panels * channel_size; }
  int64_t output_size() const { return channel_panels * height * kCols; }  // [D rounded up][kCols]
  void pack_all(float* packed, Matrix centers) const;                      // lanes: classes

  // The features of `pixels` ≤ kCols pixels, as `scores` reads them.
  int64_t features_size() const { return words(D) * kCols + kLanes; }
  void pack_features(float* to, Matrix feats, int pixels) const { pack(to, kCols, pixels, D, feats, pairs); }
  // out [classes of the panel][ld] = centres · features, with pixels on the lanes
  void scores(const float* packed, int64_t panel, const float* features, float* out, int64_t ld) const;
  // out [D][kCols] = centresᵀ · weights [C][kCols]; `scratch` has the size of the weights.
  void average(const float* packed, const float* weights, float* scratch, float* out) const;

  int classes(int64_t panel) const { return static_cast<int>(std::min<int64_t>(height, C - panel * height)); }

  const int64_t C, D;
  const bool pairs;
  const Kernel& wide = pairs ? *pair_kernel() : kernel();
  const int height = wide.rows;
  const int64_t class_panels = ceil_div(C, height);

 private:
  int64_t words(int64_t terms) const { return pairs ? ceil_div(terms, 2) : terms; }

  const int64_t channel_panels = ceil_div(D, height);
  // pack() writes up to kLanes floats past the end.
  const int64_t class_size = words(D) * height + kLanes, channel_size = words(C) * height + kLanes;
};

// total[c] = Σ_panel partial[panel][c]
void sum_panels(const float* partial, int64_t panels, int64_t C, float* total);

// weights [C][kCols] = softmax over C of half · (total + sign · sums), queries on the lanes
void softmax(const float* sums, const float* total, float half, float sign, int64_t C, float* weights);

}  // namespace fastcss::cpu
