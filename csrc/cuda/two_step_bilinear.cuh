// Joins two bilinear resizings, one after the other, to one weighted sum of four elements along each dimension. Each is
// what torch's upsample_bilinear2d (align_corners=False) computes for one output element.
#pragma once

#ifdef __CUDACC__
#define FASTCSS_BOTH __host__ __device__ inline
#else
#define FASTCSS_BOTH inline
#endif

namespace fastcss::cuda {

constexpr int kUpscale = 4;  // factor of the first resizing

// line → (1 − weight) line[near] + weight line[far]
struct Tap {
  int near, far;
  float weight;
};

// scale: input elements to an output element
FASTCSS_BOTH Tap tap(int output, float scale, int inputs) {
  const float source = (output + 0.5f) * scale - 0.5f, inside = source > 0.f ? source : 0.f;
  const int near = static_cast<int>(inside) < inputs - 1 ? static_cast<int>(inside) : inputs - 1;
  const float weight = inside - near;
  return {near, near < inputs - 1 ? near + 1 : near, weight < 1.f ? weight : 1.f};
}

FASTCSS_BOTH float mix(float near, float far, float weight) { return (1.f - weight) * near + weight * far; }

// line of `inputs` elements → line of kUpscale · inputs, of which the first `crop` → line of `outputs`
struct alignas(16) TwoTaps {
  Tap first, second;
  float weight;

  template <class Line>  // line(i) is element i
  FASTCSS_BOTH float operator()(const Line& line) const {
    return mix(mix(line(first.near), line(first.far), first.weight),
               mix(line(second.near), line(second.far), second.weight), weight);
  }
};

FASTCSS_BOTH TwoTaps two_taps(int output, int outputs, int crop, int inputs) {
  // A resizing that keeps the size is a copy, even if the element beside it is infinite or NaN.
  const Tap outer = outputs == crop ? Tap{output, output, 0.f}
                                    : tap(output, static_cast<float>(crop) / static_cast<float>(outputs), crop);
  return {tap(outer.near, 1.f / kUpscale, inputs), tap(outer.far, 1.f / kUpscale, inputs), outer.weight};
}

}  // namespace fastcss::cuda

#undef FASTCSS_BOTH
