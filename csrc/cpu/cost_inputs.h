// Shows the tensors of cost_filter as matrices whose lanes are pixels, or rows of text.
#pragma once

#include "tensors.h"

namespace fastcss::cpu {

inline constexpr const char* kCostFilter = "cost_filter";

// Joins R and S of [B, R, S, D] to one dimension with one stride, and copies if they have two strides.
inline Tensor joined(const Tensor& t) {
  const bool regular = t.size(1) == 1 || t.size(2) == 1 || t.stride(1) == t.size(2) * t.stride(2);
  return regular ? t : torch::stable::contiguous(t);
}
inline Matrix lanes_of(const Tensor& t, int64_t b) {
  const int64_t stride = t.size(2) > 1 ? t.stride(2) : t.stride(1);
  return Matrix{t.const_data_ptr(), dtype_of(t, kCostFilter), stride, t.stride(3)}.offset(b * t.stride(0));
}

inline Tensor as_pixels(const Tensor& image) { return joined(image); }
inline Tensor as_rows(const Tensor& text) { return joined(text); }
inline Matrix pixels_of(const Tensor& image, int64_t b) { return lanes_of(image, b); }
// Text [1, T, P, D] serves every image.
inline Matrix text_of(const Tensor& text, int64_t b) { return lanes_of(text, text.size(0) > 1 ? b : 0); }

}  // namespace fastcss::cpu
