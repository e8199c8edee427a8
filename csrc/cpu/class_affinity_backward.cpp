// fastcss::class_affinity_backward.cpu goes through the mean of the centres and its softmax to the scores T P, through
// the affinity map to q, k and P, and through P = F Cᵀ to the features and the centres.

#include <tuple>
#include <utility>

#include "affinity_gradient.h"
#include "class_scores.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "class_affinity";

// slopes [C][ld] = weights · (slopes − Σ_c weights · slopes) with weights [C][kCols]
FASTCSS_CLONES void softmax_slopes(float* slopes, int64_t ld, const float* weights, int64_t C) {
  float mean[kCols] = {};
  for (int64_t c = 0; c < C; ++c)
    for (int i = 0; i < kCols; ++i) mean[i] += weights[c * kCols + i] * slopes[c * ld + i];
  for (int64_t c = 0; c < C; ++c)
    for (int i = 0; i < kCols; ++i) slopes[c * ld + i] = weights[c * kCols + i] * (slopes[c * ld + i] - mean[i]);
}

// One image.
struct Problem {
  int64_t N, K, C, D;
  float scale, half;
  Matrix q, k, feats, centers, dintra, dinter;  // lanes: pixels or classes
  const float* tp;                              // [N][C]
  void *dq, *dk, *dfeats, *dcenters;
  DType dtype;
};

class Backward : Problem {
 public:
  explicit Backward(const Problem& problem) : Problem(problem) {}

  void run() {
    const int64_t part = C * columns;
    float* start = map_workspace.get(classes.size() + 3 * C * ld + (panels + 1) * C + chunks * part);
    packed = start, scores = packed + classes.size();
    dlogits[0] = scores + C * ld, dlogits[1] = dlogits[0] + C * ld;
    total = dlogits[1] + C * ld, parts = total + (panels + 1) * C;
    dscores = scores;  // the scores were read for the last time before these are written
    classes.pack_all(packed, centers);
    parallel(panels, [&](int64_t p) { score(p); });
    sum_panels(total + C, panels, C, total);
    parallel(chunks, [&](int64_t i) { through_softmax(i, parts + i * part); });
    const auto by_pixel = [&](float* map) { return Matrix{map, DType::f32, 1, ld}; };
    const AffinityGradientProblem map{.N = N,
                                      .K = K,
                                      .scale = scale,
                                      .q = q,
                                      .k = k,
                                      .ds_factor = scale / 2,
                                      .C = C,
                                      .v = by_pixel(scores),
                                      .dintra = by_pixel(dlogits[0]),
                                      .dinter = by_pixel(dlogits[1]),
                                      .half = half};
    AffinityGradient(map).run({dq, dk, dtype}, {dscores, DType::f32});
    parallel(chunks, [&](int64_t i) { through_scores(i, parts + i * part); });
    parallel(C, [&](int64_t c) {
      float* sum = parts + c * columns;
      for (int64_t i = 1; i < chunks; ++i) add(sum, parts + i * part + c * columns, columns);
      for (int64_t d = 0; d < D; d += kCols)
        write(static_cast<char*>(dcenters) + (c * D + d) * size_of(dtype), dtype, D, 1,
              static_cast<int>(std::min<int64_t>(kCols, D - d)), sum + d);
    });
  }

 private:
  int count(int64_t panel) const { return static_cast<int>(std::min<int64_t>(kCols, N - panel * kCols)); }

  void score(int64_t p) const {
    float *features = local_workspace.get(classes.features_size()), *to = scores + p * kCols;
    classes.pack_features(features, feats.at(p * kCols, 0), count(p));
    for (int64_t panel = 0; panel < classes.class_panels; ++panel)
      classes.scores(packed, panel, features, to + panel * classes.height * ld, ld);
    for (int64_t c = 0; c < C; ++c) {
      float sum = 0;
      for (int i = 0; i < count(p); ++i) sum += to[c * ld + i];
      total[(p + 1) * C + c] = sum;
    }
  }

  // Computes dlogits of a chunk of pixels, and its part of dcenters: Σ_n weights dout.
  void through_softmax(int64_t chunk, float* part) const {
    const int64_t first = chunk * size, pixels = std::min(size, N - first);
    float* sums =
        local_workspace.get(2 * C * kCols + classes.features_size() + C * size + kLanes + product_scratch(C, pixels));
    float *weights = sums + C * kCols, *features = weights + C * kCols;
    float *all_weights = features + classes.features_size(), *scratch = all_weights + C * size + kLanes;
    const std::pair<Matrix, float> sides[] = {{dintra, 1.f}, {dinter, -1.f}};
    for (int side = 0; side < 2; ++side) {
      const auto [dout, sign] = sides[side];
      for (int64_t p = first / kCols; p * kCols < first + pixels; ++p) {
        pack(sums, kCols, count(p), C, {tp + p * kCols * C, DType::f32, C, 1});
        softmax(sums, total, half, sign, C, weights);
        float* slopes = dlogits[side] + p * kCols;
        classes.pack_features(features, dout.at(p * kCols, 0), count(p));
        for (int64_t panel = 0; panel < classes.class_panels; ++panel)
          classes.scores(packed, panel, features, slopes + panel * classes.height * ld, ld);
        softmax_slopes(slopes, ld, weights, C);
        for (int64_t c = 0; c < C; ++c)
          std::copy_n(weights + c * kCols, kCols, all_weights + c * size + p * kCols - first);
      }
      product(C, D, pixels, {all_weights, DType::f32, size, 1}, turned(dout).at(0, first), part, columns, side > 0,
              scratch);
    }
  }

  // Computes dfeats of a chunk of pixels, and its part of dcenters: Σ_n dscores f.
  void through_scores(int64_t chunk, float* part) const {
    const int64_t first = chunk * size, pixels = std::min(size, N - first);
    float* weights = local_workspace.get(C * kCols + classes.output_size() + product_scratch(C, pixels));
    float *out = weights + C * kCols, *scratch = out + classes.output_size();
    for (int64_t p = first / kCols; p * kCols < first + pixels; ++p) {
      pack(weights, kCols, count(p), C, {dscores + p * kCols * C, DType::f32, C, 1});
      classes.average(packed, weights, nullptr, out);
      write_transposed(static_cast<char*>(dfeats) + p * kCols * D * size_of(dtype), dtype, D, count(p), D, out);
    }
    product(C, D, pixels, {dscores + first * C, DType::f32, 1, C}, turned(feats).at(0, first), part, columns, true,
            scratch);
  }

  static Matrix turned(Matrix m) { return {m.data, m.dtype, m.k_stride, m.lane_stride}; }

  const ClassCenters classes{C, D, false};
  const int64_t panels = ceil_div(N, kCols), ld = panels * kCols, columns = ceil_div(D, kCols) * kCols;
  // Pixels are summed in chunks; how many there are depends on the shape, not on the number of threads.
  const int64_t size = kCols * std::max<int64_t>(16, ceil_div(N, 32 * kCols)), chunks = ceil_div(N, size);
  float *packed, *scores, *dlogits[2], *dscores, *total, *parts;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> class_affinity_backward(const Tensor& dintra, const Tensor& dinter,
                                                                   const Tensor& q, const Tensor& k,
                                                                   const Tensor& feats, const Tensor& centers,
                                                                   const Tensor& tp, double scale, bool mean) {
  const int64_t B = feats.size(0), N = feats.size(1), D = feats.size(2), C = centers.size(1);
  const DType dtype = dtype_of(feats, kOp);
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  Tensor dq = like(q), dk = like(k), dfeats = like(feats), dcenters = like(centers);
  if (N == 0) torch::stable::zero_(dcenters);
  for_images(N == 0 ? 0 : B, N, [&](int64_t b) {
    const auto rows = [&](const Tensor& t) { return matrix(t, 1, 2, kOp).offset(b * t.stride(0)); };
    const Problem problem{.N = N,
                          .K = q.size(2),
                          .C = C,
                          .D = D,
                          .scale = static_cast<float>(scale),
                          .half = mean ? 0.5f / static_cast<float>(N) : 0.5f,
                          .q = rows(q),
                          .k = rows(k),
                          .feats = rows(feats),
                          .centers = rows(centers),
                          .dintra = rows(dintra),
                          .dinter = rows(dinter),
                          .tp = static_cast<const float*>(tp.const_data_ptr()) + b * N * C,
                          .dq = image(dq, b, dtype),
                          .dk = image(dk, b, dtype),
                          .dfeats = image(dfeats, b, dtype),
                          .dcenters = image(dcenters, b, dtype),
                          .dtype = dtype};
    Backward(problem).run();
  });
  return {dq, dk, dfeats, dcenters};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("class_affinity_backward.cpu", FASTCSS_BOX(&fastcss::cpu::class_affinity_backward));
}
