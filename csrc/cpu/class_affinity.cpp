// fastcss::class_affinity.cpu: affinity attention whose values are the pixels' scores for each class, P = F Cᵀ. The
// softmax over the classes and the product with the centres follow while a block of queries is in cache.

#include <tuple>
#include <utility>

#include "affinity_gather.h"
#include "class_scores.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "class_affinity";

// Puts P = F Cᵀ of every pixel among the values of `gather`, and sums Σ P [C].
void score_all(const ClassCenters& centers, const float* packed, Matrix feats, const AffinityGather& gather,
               float* values, float* total, float* partial) {
  const int64_t panels = ceil_div(gather.N, kCols);
  parallel(panels, [&](int64_t p) {
    const int64_t first = p * kCols;
    const int pixels = static_cast<int>(std::min<int64_t>(kCols, gather.N - first));
    float* features = local_workspace.get(centers.features_size());
    centers.pack_features(features, feats.at(first, 0), pixels);
    for (int64_t panel = 0; panel < centers.class_panels; ++panel) {
      alignas(64) float tile[kMaxRows * kCols];
      centers.scores(packed, panel, features, tile, kCols);
      gather.put_values(values, panel, first, pixels, tile);
      for (int c = 0; c < centers.classes(panel); ++c) {
        float sum = 0;
        for (int i = 0; i < pixels; ++i) sum += tile[c * kCols + i];
        partial[p * centers.C + panel * centers.height + c] = sum;
      }
    }
  });
  sum_panels(partial, panels, centers.C, total);
}

std::tuple<Tensor, Tensor, Tensor> class_affinity(const Tensor& q, const Tensor& k, const Tensor& feats,
                                                  const Tensor& centers, double scale, bool mean, bool save_tp) {
  const int64_t B = feats.size(0), N = feats.size(1), D = feats.size(2), C = centers.size(1);
  const DType dtype = dtype_of(feats, kOp);
  Tensor intra = torch::stable::new_empty(feats, feats.sizes()), inter = torch::stable::new_empty(feats, feats.sizes());
  Tensor tp = torch::stable::new_empty(feats, save_tp ? shape({B, N, C}) : shape({0}), ScalarType::Float);
  const AffinityGather gather(N, q.size(2), C, static_cast<float>(scale), dtype);
  const ClassCenters classes(C, D, gather.pairs);
  const float half = mean ? 0.5f / static_cast<float>(N) : 0.5f;
  for_images(B, N, [&](int64_t b) {
    float* total = shared_workspace.get(C + gather.size() + classes.size() + ceil_div(N, kCols) * C);
    float *values = total + C, *packed = values + gather.size(), *partial = packed + classes.size();
    gather.pack_keys(values, matrix(k, 1, 2, kOp).offset(b * k.stride(0)));
    classes.pack_all(packed, matrix(centers, 1, 2, kOp).offset(b * centers.stride(0)));
    score_all(classes, packed, matrix(feats, 1, 2, kOp).offset(b * feats.stride(0)), gather, values, total, partial);
    const int64_t room = 2 * gather.sum_size() + classes.output_size();
    gather.gather(values, matrix(q, 1, 2, kOp).offset(b * q.stride(0)), room,
                  [&](int64_t query, int queries, float* sums, float* weights) {
                    float *words = weights + gather.sum_size(), *out = words + gather.sum_size();
                    if (save_tp)
                      write_transposed(image(tp, b, DType::f32) + query * C * 4, DType::f32, C, queries, C, sums);
                    for (const auto& [result, sign] : {std::pair{&intra, 1.f}, std::pair{&inter, -1.f}}) {
                      softmax(sums, total, half, sign, C, weights);
                      classes.average(packed, weights, words, out);
                      char* to = image(*result, b, dtype) + query * D * size_of(dtype);
                      write_transposed(to, dtype, D, queries, D, out);
                    }
                  });
  });
  return {intra, inter, tp};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("class_affinity.cpu", FASTCSS_BOX(&fastcss::cpu::class_affinity)); }
