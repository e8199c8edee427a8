// fastcss::class_affinity.cpu: affinity attention whose values are the pixels' scores for each class, P = F Cᵀ, and at
// once, while a block of queries is in cache, the softmax over the classes and the product with the centres.

#include <tuple>

#include "affinity_gather.h"
#include "tensors.h"
#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "class_affinity";

// The centres of one image, packed for both products.
class Centers {
 public:
  Centers(const AffinityGather& gather, int64_t D) : gather(gather), D(D) {}

  int64_t size() const { return gather.value_panels * score_size + output_panels * output_size; }
  int64_t output_panels_floats() const { return output_panels * gather.height * kCols; }

  void pack_centers(float* packed, Matrix c) const {  // lanes: classes
    parallel(gather.value_panels + output_panels, [&](int64_t i) {
      const int64_t height = gather.height;
      if (i < gather.value_panels) {
        const int64_t first = i * height;
        const int classes = static_cast<int>(std::min(height, gather.C - first));
        return pack(packed + i * score_size, gather.height, classes, D, c.at(first, 0), gather.pairs);
      }
      const int64_t panel = i - gather.value_panels, first = panel * height;
      const int channels = static_cast<int>(std::min(height, D - first));
      const Matrix by_channel{c.at(0, first).data, c.dtype, c.k_stride, c.lane_stride};
      pack(packed + gather.value_panels * score_size + panel * output_size, gather.height, channels, gather.C,
           by_channel, gather.pairs);
    });
  }

  // P for every pixel, put among the values of `gather`, and Σ P [C].
  void score(const float* packed, Matrix feats, float* values, float* total, float* partial) const {
    const int64_t panels = ceil_div(gather.N, kCols), C = gather.C;
    alignas(64) static const float zeros[kCols] = {};
    parallel(panels, [&](int64_t p) {
      const int64_t first = p * kCols;
      const int pixels = static_cast<int>(std::min<int64_t>(kCols, gather.N - first));
      float* f = local_workspace.get(gather.words(D) * kCols);
      pack(f, kCols, pixels, D, feats.at(first, 0), gather.pairs);
      for (int64_t panel = 0; panel < gather.value_panels; ++panel) {
        alignas(64) float tile[kMaxRows * kCols];
        const int classes = static_cast<int>(std::min<int64_t>(gather.height, C - panel * gather.height));
        gather.wide(classes, kCols, gather.words(D), packed + panel * score_size, f, kCols, zeros, 0, tile, kCols);
        gather.put_values(values, panel, first, pixels, tile);
        for (int c = 0; c < classes; ++c) {
          float sum = 0;
          for (int i = 0; i < pixels; ++i) sum += tile[c * kCols + i];
          partial[p * C + panel * gather.height + c] = sum;
        }
      }
    });
    parallel(ceil_div(C, kCols), [&](int64_t item) {
      for (int64_t c = item * kCols; c < std::min(C, (item + 1) * kCols); ++c) {
        double sum = 0;
        for (int64_t p = 0; p < panels; ++p) sum += partial[p * C + c];
        total[c] = static_cast<float>(sum);
      }
    });
  }

  // out [D][kCols] = centersᵀ · weights [C][kCols]
  void average(const float* packed, const float* weights, float* words, float* out) const {
    alignas(64) static const float zeros[kCols] = {};
    packed += gather.value_panels * score_size;
    if (gather.pairs) {
      pack(words, kCols, kCols, gather.C, {weights, DType::f32, 1, kCols}, true);
      weights = words;
    }
    for (int64_t panel = 0; panel < output_panels; ++panel) {
      const int channels = static_cast<int>(std::min<int64_t>(gather.height, D - panel * gather.height));
      gather.wide(channels, kCols, gather.words(gather.C), packed + panel * output_size, weights, kCols, zeros, 0,
                  out + panel * gather.height * kCols, kCols);
    }
  }

  const AffinityGather& gather;
  const int64_t D;

 private:
  const int64_t output_panels = ceil_div(D, gather.height);
  // pack() writes up to kLanes floats past the end.
  const int64_t score_size = gather.words(D) * gather.height + kLanes;
  const int64_t output_size = gather.words(gather.C) * gather.height + kLanes;
};

// weights [C][kCols] = softmax over C of half · (total + sign · sums), queries on the lanes.
FASTCSS_CLONES void softmax(const float* sums, const float* total, float half, float sign, int64_t C, float* weights) {
  float most[kCols], sum[kCols] = {};
  for (float& m : most) m = -__builtin_inff();
  for (int64_t c = 0; c < C; ++c)
    for (int i = 0; i < kCols; ++i) {
      const float x = half * (total[c] + sign * sums[c * kCols + i]);
      weights[c * kCols + i] = x;
      most[i] = x > most[i] ? x : most[i];
    }
  for (int64_t c = 0; c < C; ++c)
    for (int first = 0; first < kCols; first += kLanes) {
      const Vec e = exp_negative(load(weights + c * kCols + first) - load(most + first));
      store(weights + c * kCols + first, e);
      store(sum + first, load(sum + first) + e);
    }
  for (int64_t c = 0; c < C; ++c)
    for (int i = 0; i < kCols; ++i) weights[c * kCols + i] /= sum[i];
}

std::tuple<Tensor, Tensor, Tensor> class_affinity(const Tensor& q, const Tensor& k, const Tensor& feats,
                                                  const Tensor& centers, double scale, bool mean, bool save_tp) {
  const int64_t B = feats.size(0), N = feats.size(1), D = feats.size(2), C = centers.size(1);
  const DType dtype = dtype_of(feats, kOp);
  Tensor intra = torch::stable::new_empty(feats, feats.sizes()), inter = torch::stable::new_empty(feats, feats.sizes());
  Tensor tp = torch::stable::new_empty(feats, save_tp ? shape({B, N, C}) : shape({0}), ScalarType::Float);
  const AffinityGather gather(N, q.size(2), C, static_cast<float>(scale), dtype);
  const Centers product(gather, D);
  const float half = mean ? 0.5f / static_cast<float>(N) : 0.5f;
  for_images(B, N, [&](int64_t b) {
    float* total = shared_workspace.get(C + gather.size() + product.size() + ceil_div(N, kCols) * C);
    float *values = total + C, *packed = values + gather.size(), *partial = packed + product.size();
    gather.pack_keys(values, matrix(k, 1, 2, kOp).offset(b * k.stride(0)));
    product.pack_centers(packed, matrix(centers, 1, 2, kOp).offset(b * centers.stride(0)));
    product.score(packed, matrix(feats, 1, 2, kOp).offset(b * feats.stride(0)), values, total, partial);
    const int64_t room = 2 * gather.sum_size() + product.output_panels_floats();
    gather.gather(values, matrix(q, 1, 2, kOp).offset(b * q.stride(0)), room,
                  [&](int64_t query, int queries, float* sums, float* weights) {
                    float *words = weights + gather.sum_size(), *out = words + gather.sum_size();
                    if (save_tp) write_transposed(image(tp, b, DType::f32) + query * C * 4, DType::f32, C, queries, C, sums);
                    for (const auto& [result, sign] : {std::pair{&intra, 1.f}, std::pair{&inter, -1.f}}) {
                      softmax(sums, total, half, sign, C, weights);
                      product.average(packed, weights, words, out);
                      char* to = image(*result, b, dtype) + query * D * size_of(dtype);
                      write_transposed(to, dtype, D, queries, D, out);
                    }
                  });
    shared_workspace.trim();
  });
  return {intra, inter, tp};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("class_affinity.cpu", TORCH_BOX(&fastcss::cpu::class_affinity));
}
