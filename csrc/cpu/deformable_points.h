// Says where the points of a query read: the corners of their cells with their bilinear weights, and the attention on
// each. The forward and the backward pass of deformable_attention share it.
#pragma once

#include <vector>

#include "tensors.h"
#include "vector_math.h"

namespace fastcss::cpu {

struct Level {
  int64_t height, width, start;  // start: the level's first token
};

// Takes h and w of each level in turn.
inline std::vector<Level> levels_of(const std::vector<int64_t>& shapes) {
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < shapes.size(); i += 2) {
    levels.push_back({shapes[i], shapes[i + 1], start});
    start += shapes[i] * shapes[i + 1];
  }
  return levels;
}

// Returns value [B, S, heads, D] with its channels next to each other; copies it if they are not.
inline Tensor with_channels(const Tensor& value) {
  return value.size(3) <= 1 || value.stride(3) == 1 ? value : torch::stable::contiguous(value);
}

constexpr int kCorners = 4;  // of a cell: (x, y), (x + 1, y), (x, y + 1), (x + 1, y + 1)

// Holds the points of all levels for one query and head, kLanes at a time; all arrays are padded to whole vectors.
class Points {
 public:
  // xy: coordinates of a reference point, 2 or 4.
  Points(std::vector<Level> levels, int64_t points, int64_t xy);

  int64_t count() const { return count_; }
  int64_t padded() const { return padded_; }

  // Sets the reference points [levels, xy] of a query, once for all of its heads.
  void set_reference(const float* reference);
  // Sets one head's offsets [count, 2] and logits [count].
  void set_head(const float* offsets, const float* logits);

  // Lists the corners that lie in their level, point by point: each has its token, attention · share, and its number,
  // which is corner · padded() + point.
  int64_t corners() const { return corners_; }
  const int64_t* token() const { return token_.data(); }
  const float* weight() const { return weight_.data(); }
  const int32_t* slot() const { return slot_.data(); }

  float attention(int64_t p) const { return attention_[p]; }
  float share(int64_t slot) const { return share_[slot]; }  // bilinear weight
  float right_share(int64_t p) const { return right_[p]; }
  float bottom_share(int64_t p) const { return bottom_[p]; }
  // Tells whether some location is NaN or infinite, or some logit NaN: the result is NaN then, even if nothing is read.
  bool lost() const { return lost_; }

  // Returns by how many cells a location moves with its offset, and with its reference point's coordinate i.
  float offset_slope(int64_t p, int axis) const { return step_[axis * padded_ + p]; }
  float reference_slope(int64_t p, int64_t i, const float* offsets) const;

 private:
  void list_corners();

  std::vector<Level> levels_;
  int64_t points_, xy_, count_, padded_;
  std::vector<float> size_, base_, step_;  // [2][padded]: level's size; location without offset; per unit of offset
  std::vector<float> left_, top_, right_, bottom_, inside_, attention_, share_;
  std::vector<int64_t> token_;
  std::vector<float> weight_;
  std::vector<int32_t> slot_;
  int64_t corners_ = 0;
  bool lost_ = false;
};

}  // namespace fastcss::cpu
