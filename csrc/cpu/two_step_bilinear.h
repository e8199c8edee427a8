// Joins SAM's two bilinear resizings of a mask along one axis: from h to 4h, and from the first `crop` of those to
// `size`. Neighbours in the second are neighbours in the first, so a result is a sum over three consecutive inputs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastcss::cpu {

// Output i of a bilinear resizing reads input `low` and the next one, whose share is `fraction`.
struct Linear {
  int64_t low;
  float fraction;
};
inline Linear linear(int64_t i, int64_t in, int64_t out) {  // torch's, with align_corners=False
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  const float at = std::max((static_cast<float>(i) + 0.5f) * scale - 0.5f, 0.f);
  const int64_t low = std::min(static_cast<int64_t>(at), in - 1);
  return {low, std::min(at - static_cast<float>(low), 1.f)};
}

constexpr int64_t kUpscale = 4;
constexpr int kTaps = 3;

// An output reads inputs first … first + 2; those beyond the end have weight 0.
struct Taps {
  int64_t first;
  float weight[kTaps];
};
inline Taps two_step(int64_t i, int64_t in, int64_t crop, int64_t size) {
  const Linear second = linear(i, crop, size);
  const int64_t middle[2] = {second.low, std::min(second.low + 1, crop - 1)};
  const float share[2] = {1.f - second.fraction, second.fraction};
  Taps taps{linear(middle[0], in, kUpscale * in).low, {}};
  for (int step = 0; step < 2; ++step) {
    const Linear first = linear(middle[step], in, kUpscale * in);
    const int64_t at = first.low - taps.first;
    taps.weight[at] += share[step] * (1.f - first.fraction);
    taps.weight[std::min(first.low + 1, in - 1) - taps.first] += share[step] * first.fraction;
  }
  return taps;
}

}  // namespace fastcss::cpu
