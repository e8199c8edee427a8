#include "deformable_points.h"

#include <cmath>
#include <utility>

namespace fastcss::cpu {
namespace {

// Locates points along one axis: at = base + step · offset, its cell and the share of the next cell. Returns whether
// all are finite.
FASTCSS_CLONES bool locate(const float* base, const float* step, const float* size, const float* offsets, int axis,
                           int64_t n, float* cell, float* share, float* inside) {
  uint32_t finite = ~0u;
  for (int64_t i = 0; i < n; ++i) {
    const float at = base[i] + step[i] * offsets[2 * i + axis];
    const bool reads = at > -1.f && at < size[i];
    cell[i] = reads ? std::floor(at) : 0.f;
    share[i] = at - cell[i];
    inside[i] = reads ? inside[i] : 0.f;
    finite &= at - at == 0.f ? ~0u : 0u;
  }
  return finite != 0;
}

FASTCSS_CLONES void bilinear(const float* right, const float* bottom, int64_t n, float* share) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = right[i], y = bottom[i];
    share[i] = (1 - x) * (1 - y), share[n + i] = x * (1 - y), share[2 * n + i] = (1 - x) * y, share[3 * n + i] = x * y;
  }
}

void softmax(const float* logits, int64_t count, int64_t padded, float* weight) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    float most = -__builtin_inff(), sum = 0;
    for (int64_t i = 0; i < count; ++i) most = logits[i] > most ? logits[i] : most;
    for (int64_t i = 0; i < padded; ++i) weight[i] = i < count ? logits[i] - most : -__builtin_inff();
    for (int64_t i = 0; i < padded; i += kLanesIn<V>) store(weight + i, exp_negative(load<V>(weight + i)));
    for (int64_t i = 0; i < count; ++i) sum += weight[i];
    for (int64_t i = 0; i < padded; ++i) weight[i] /= sum;
  });
}

}  // namespace

Points::Points(std::vector<Level> levels, int64_t points, int64_t xy)
    : levels_(std::move(levels)),
      points_(points),
      xy_(xy),
      count_(static_cast<int64_t>(levels_.size()) * points),
      padded_((count_ + kLanes - 1) / kLanes * kLanes) {
  for (auto* array : {&size_, &base_, &step_}) array->assign(2 * padded_, 0.f);
  for (auto* array : {&left_, &top_, &right_, &bottom_, &inside_, &attention_}) array->assign(padded_, 0.f);
  share_.assign(kCorners * padded_, 0.f);
  token_.resize(kCorners * count_ + 1), weight_.resize(kCorners * count_ + 1), slot_.resize(kCorners * count_ + 1);
  for (int64_t p = 0; p < count_; ++p) {
    size_[p] = static_cast<float>(levels_[p / points].width);
    size_[padded_ + p] = static_cast<float>(levels_[p / points].height);
  }
}

void Points::set_reference(const float* reference) {
  for (int64_t p = 0; p < count_; ++p)
    for (int axis = 0; axis < 2; ++axis) {
      const float* at = reference + p / points_ * xy_;
      const float size = size_[axis * padded_ + p];
      base_[axis * padded_ + p] = at[axis] * size - 0.5f;
      step_[axis * padded_ + p] = xy_ == 2 ? 1.f : at[2 + axis] * 0.5f / static_cast<float>(points_) * size;
    }
}

void Points::set_head(const float* offsets, const float* logits) {
  std::fill(inside_.begin(), inside_.end(), 1.f);
  const bool x =
      locate(base_.data(), step_.data(), size_.data(), offsets, 0, count_, left_.data(), right_.data(), inside_.data());
  const bool y = locate(base_.data() + padded_, step_.data() + padded_, size_.data() + padded_, offsets, 1, count_,
                        top_.data(), bottom_.data(), inside_.data());
  bilinear(right_.data(), bottom_.data(), padded_, share_.data());
  softmax(logits, count_, padded_, attention_.data());
  lost_ = !x || !y || (count_ > 0 && attention_[0] != attention_[0]);  // one NaN among the logits makes all weights NaN
  list_corners();
}

void Points::list_corners() {
  int64_t n = 0;
  for (int64_t p = 0; p < count_; ++p) {
    if (!inside_[p]) continue;
    const Level& level = levels_[p / points_];
    const int64_t x = static_cast<int64_t>(left_[p]), y = static_cast<int64_t>(top_[p]);
    const int64_t first = level.start + y * level.width + x;
    const int64_t tokens[kCorners] = {first, first + 1, first + level.width, first + level.width + 1};
    const bool left = x >= 0, right = x + 1 < level.width, top = y >= 0, bottom = y + 1 < level.height;
    const bool valid[kCorners] = {top && left, top && right, bottom && left, bottom && right};
    for (int corner = 0; corner < kCorners; ++corner) {
      token_[n] = tokens[corner], slot_[n] = static_cast<int32_t>(corner * padded_ + p);
      weight_[n] = attention_[p] * share_[corner * padded_ + p];
      n += valid[corner];
    }
  }
  corners_ = n;
}

float Points::reference_slope(int64_t p, int64_t i, const float* offsets) const {
  const float size = size_[i % 2 * padded_ + p];
  return i < 2 ? size : offsets[2 * p + i - 2] * 0.5f / static_cast<float>(points_) * size;
}

}  // namespace fastcss::cpu
