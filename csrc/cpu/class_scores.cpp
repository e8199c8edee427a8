#include "class_scores.h"

#include "vector_math.h"

namespace fastcss::cpu {

alignas(64) static const float kZeros[kCols] = {};

void ClassCenters::pack_all(float* packed, Matrix centers) const {
  parallel(class_panels + channel_panels, [&](int64_t i) {
    if (i < class_panels) return pack(packed + i * class_size, height, classes(i), D, centers.at(i * height, 0), pairs);
    const int64_t panel = i - class_panels, first = panel * height;
    const int channels = static_cast<int>(std::min<int64_t>(height, D - first));
    const Matrix turned{centers.at(0, first).data, centers.dtype, centers.k_stride, centers.lane_stride};
    pack(packed + class_panels * class_size + panel * channel_size, height, channels, C, turned, pairs);
  });
}

void ClassCenters::scores(const float* packed, int64_t panel, const float* features, float* out, int64_t ld) const {
  wide(classes(panel), kCols, words(D), packed + panel * class_size, features, kCols, kZeros, 0, out, ld);
}

void ClassCenters::average(const float* packed, const float* weights, float* scratch, float* out) const {
  packed += class_panels * class_size;
  if (pairs) {
    pack(scratch, kCols, kCols, C, {weights, DType::f32, 1, kCols}, true);
    weights = scratch;
  }
  for (int64_t panel = 0; panel < channel_panels; ++panel) {
    const int channels = static_cast<int>(std::min<int64_t>(height, D - panel * height));
    wide(channels, kCols, words(C), packed + panel * channel_size, weights, kCols, kZeros, 0,
         out + panel * height * kCols, kCols);
  }
}

void sum_panels(const float* partial, int64_t panels, int64_t C, float* total) {
  parallel(ceil_div(C, kCols), [&](int64_t item) {
    for (int64_t c = item * kCols; c < std::min(C, (item + 1) * kCols); ++c) {
      double sum = 0;
      for (int64_t p = 0; p < panels; ++p) sum += partial[p * C + c];
      total[c] = static_cast<float>(sum);
    }
  });
}

void softmax(const float* sums, const float* total, float half, float sign, int64_t C, float* weights) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    float most[kCols], sum[kCols] = {};
    for (float& m : most) m = -__builtin_inff();
    for (int64_t c = 0; c < C; ++c)
      for (int i = 0; i < kCols; ++i) {
        const float x = half * (total[c] + sign * sums[c * kCols + i]);
        weights[c * kCols + i] = x;
        most[i] = x > most[i] ? x : most[i];
      }
    for (int64_t c = 0; c < C; ++c)
      for (int first = 0; first < kCols; first += kLanesIn<V>) {
        const V e = exp_negative(load<V>(weights + c * kCols + first) - load<V>(most + first));
        store(weights + c * kCols + first, e);
        store(sum + first, load<V>(sum + first) + e);
      }
    for (int64_t c = 0; c < C; ++c)
      for (int i = 0; i < kCols; ++i) weights[c * kCols + i] /= sum[i];
  });
}

}  // namespace fastcss::cpu
