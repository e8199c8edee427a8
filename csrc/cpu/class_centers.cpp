// fastcss::class_centers.cpu and its backward. A softmax over the classes divided by its mass is a softmax over the
// pixels, too, of logits − pixel_lse: both forms are Σ_n w_cn f_n with w = exp(logits − pixel_lse − class_lse). Every
// lse is kept as two numbers, the largest logit and the logarithm of the mass: in one number, a logit of 10⁴ would
// leave only three digits of the logarithm.

#include <tuple>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "tensors.h"
#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "class_centers";

// Finds the largest of `terms` rows [terms][kCols], and ln Σ exp(row − largest), lane by lane.
void log_sum_exp(const float* rows, int64_t terms, float* largest, float* log_mass) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    float most[kCols], sum[kCols] = {};
    for (float& m : most) m = -__builtin_inff();
    for (int64_t c = 0; c < terms; ++c)
      for (int i = 0; i < kCols; ++i) most[i] = rows[c * kCols + i] > most[i] ? rows[c * kCols + i] : most[i];
    for (int64_t c = 0; c < terms; ++c)
      for (int v = 0; v < kCols; v += kLanesIn<V>)
        store(sum + v, load<V>(sum + v) + exp_negative(load<V>(rows + c * kCols + v) - load<V>(most + v)));
    std::copy_n(most, kCols, largest);
    for (int v = 0; v < kCols; v += kLanesIn<V>)  // the sum is at least 1, or NaN
      store(log_mass + v, log1p(load<V>(sum + v) - 1.f));
  });
}

// row = exp(row − most), the softmax before it is divided by `sum`. If lse [2][n, in steps of `ld`] is given, it is
// subtracted from row first; `most` is the largest of the row.
void exponentials(float* row, const float* lse, int64_t ld, int64_t n, float* most, float* sum) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    float largest = -__builtin_inff(), total = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (lse) row[i] = (row[i] - lse[i]) - lse[ld + i];
      largest = row[i] > largest ? row[i] : largest;
    }
    for (int64_t i = 0; i < n; i += kLanesIn<V>) {
      const V e = exp_negative(load<V>(row + i) - largest);
      store(row + i, e);
      const int64_t lanes = std::min<int64_t>(kLanesIn<V>, n - i);
      for (int64_t j = 0; j < lanes; ++j) total += row[i + j];
    }
    *most = largest, *sum = total;
  });
}

// weights = exp(logits − pixel_lse [2][kCols] − class_lse [2][C]), [C][kCols] with pixels on the lanes
void weigh(const float* logits, const float* pixel_lse, const float* class_lse, int64_t C, float* weights) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int64_t c = 0; c < C; ++c)
      for (int v = 0; v < kCols; v += kLanesIn<V>) {
        V z = (load<V>(logits + c * kCols + v) - load<V>(pixel_lse + v)) - load<V>(pixel_lse + kCols + v);
        if (class_lse) z = (z - class_lse[c]) - class_lse[C + c];
        store(weights + c * kCols + v, exp_negative(z));
      }
  });
}

// dz = weights · (products − means); over the classes also dlogits = dz − probabilities · Σ_c dz.
FASTCSS_CLONES void slopes(float* products, const float* weights, const float* means, const float* probabilities,
                           int64_t C) {
  float sum[kCols] = {};
  for (int64_t c = 0; c < C; ++c)
    for (int i = 0; i < kCols; ++i) {
      products[c * kCols + i] = weights[c * kCols + i] * (products[c * kCols + i] - means[c]);
      sum[i] += products[c * kCols + i];
    }
  if (!probabilities) return;
  for (int64_t c = 0; c < C; ++c)
    for (int i = 0; i < kCols; ++i) products[c * kCols + i] -= probabilities[c * kCols + i] * sum[i];
}

// Sums pixels in chunks, each with its own maximum; how many there are depends on the shape, not on the threads.
struct Chunks {
  int64_t N, C, D;
  int64_t size = kLanes * std::max<int64_t>(16, ceil_div(N, 32 * kLanes)), count = ceil_div(N, size);
  int64_t columns = ceil_div(D, kCols) * kCols;

  // Computes one chunk's largest logits and sums of exponentials [C], and centres [C][columns] before the division.
  void run(int64_t chunk, Matrix logits, Matrix feats, const float* lse, float* most, float* sums,
           float* centers) const {
    const int64_t first = chunk * size, pixels = std::min(size, N - first);
    float* rows = local_workspace.get(C * size + kLanes + product_scratch(C, pixels));
    pack(rows, static_cast<int>(size), static_cast<int>(pixels), C, logits.at(first, 0));
    for (int64_t c = 0; c < C; ++c)
      exponentials(rows + c * size, lse ? lse + first : nullptr, N, pixels, most + c, sums + c);
    product(C, D, pixels, {rows, DType::f32, size, 1}, feats.at(0, first), centers, columns, false,
            rows + C * size + kLanes);
  }
};

// Combines the chunks' results into centres [C, D] and class_lse [2, C].
FASTCSS_CLONES void combine(const Chunks& s, int64_t c, const float* most, const float* sums, const float* centers,
                            float* out, float* class_lse) {
  float largest = -__builtin_inff(), total = 0;
  for (int64_t i = 0; i < s.count; ++i) largest = most[i * s.C + c] > largest ? most[i * s.C + c] : largest;
  std::fill_n(out, s.columns, 0.f);
  for (int64_t i = 0; i < s.count; ++i) {
    const float factor = exp_negative(Vec4{} + (most[i * s.C + c] - largest))[0];
    const float* from = centers + (i * s.C + c) * s.columns;
    for (int64_t d = 0; d < s.columns; ++d) out[d] += factor * from[d];
    total += factor * sums[i * s.C + c];
  }
  for (int64_t d = 0; d < s.columns; ++d) out[d] /= total;
  class_lse[c] = largest, class_lse[s.C + c] = log1p(Vec4{} + (total - 1.f))[0];
}

std::tuple<Tensor, Tensor, Tensor> class_centers(const Tensor& logits, const Tensor& feats, bool over_classes) {
  const int64_t B = logits.size(0), C = logits.size(1), N = logits.size(2), D = feats.size(2);
  Tensor centers = torch::stable::new_empty(feats, shape({B, C, D}), ScalarType::Float);
  Tensor class_lse = torch::stable::new_empty(feats, shape({B, 2, C}), ScalarType::Float);
  Tensor pixel_lse = torch::stable::new_empty(feats, over_classes ? shape({B, 2, N}) : shape({0}), ScalarType::Float);
  const Chunks chunks{N, C, D};
  for_images(B, N, [&](int64_t b) {
    const Matrix by_pixel = matrix(logits, 2, 1, kOp).offset(b * logits.stride(0));
    float* lse = over_classes ? static_cast<float*>(pixel_lse.mutable_data_ptr()) + b * 2 * N : nullptr;
    parallel(lse ? ceil_div(N, kCols) : 0, [&](int64_t p) {
      const int64_t first = p * kCols, pixels = std::min<int64_t>(kCols, N - first);
      float *rows = local_workspace.get(C * kCols), largest[kCols], log_mass[kCols];
      pack(rows, kCols, static_cast<int>(pixels), C, by_pixel.at(first, 0));
      log_sum_exp(rows, C, largest, log_mass);
      std::copy_n(largest, pixels, lse + first), std::copy_n(log_mass, pixels, lse + N + first);
    });
    const Matrix by_channel = matrix(feats, 2, 1, kOp).offset(b * feats.stride(0));
    const int64_t part = C * chunks.columns;
    float* most = shared_workspace.get(chunks.count * (2 * C + part));
    float *sums = most + chunks.count * C, *parts = sums + chunks.count * C;
    parallel(chunks.count, [&](int64_t i) {
      chunks.run(i, by_pixel, by_channel, lse, most + i * C, sums + i * C, parts + i * part);
    });
    parallel(C, [&](int64_t c) {
      float* out = local_workspace.get(chunks.columns);
      combine(chunks, c, most, sums, parts, out, static_cast<float*>(class_lse.mutable_data_ptr()) + b * 2 * C);
      std::copy_n(out, D, static_cast<float*>(centers.mutable_data_ptr()) + (b * C + c) * D);
    });
  });
  return {centers, class_lse, pixel_lse};
}

std::tuple<Tensor, Tensor> class_centers_backward(const Tensor& dcenters, const Tensor& logits, const Tensor& feats,
                                                  const Tensor& centers, const Tensor& class_lse,
                                                  const Tensor& pixel_lse) {
  const int64_t B = logits.size(0), C = logits.size(1), N = logits.size(2), D = feats.size(2);
  const bool over_classes = pixel_lse.dim() == 3;
  const DType dtype = dtype_of(feats, kOp);
  const Kernel& tile = kernel();
  const int64_t height = tile.rows, class_panels = ceil_div(C, height), channel_panels = ceil_div(D, height);
  // pack() writes up to kLanes floats past the end.
  const int64_t class_size = D * height + kLanes, channel_size = C * height + kLanes;
  Tensor dlogits = torch::stable::new_empty(logits, logits.sizes()),
         dfeats = torch::stable::new_empty(feats, feats.sizes());
  if (D == 0) torch::stable::zero_(dlogits);  // no output depends on the logits
  const auto lanes = [&](int64_t panel, int64_t of) { return static_cast<int>(std::min(height, of - panel * height)); };
  for_images(D == 0 ? 0 : B, N, [&](int64_t b) {
    float* by_class = shared_workspace.get(class_panels * class_size + channel_panels * channel_size + C);
    float *by_channel = by_class + class_panels * class_size, *means = by_channel + channel_panels * channel_size;
    const Matrix d = matrix(dcenters, 1, 2, kOp).offset(b * dcenters.stride(0));
    const Matrix turned{d.data, d.dtype, d.k_stride, d.lane_stride};
    parallel(class_panels, [&](int64_t p) {
      pack(by_class + p * class_size, tile.rows, lanes(p, C), D, d.at(p * height, 0));
      float* own = local_workspace.get(class_size);  // Σ_n w_cn (dcenters_c · f_n) = dcenters_c · centers_c
      pack(own, tile.rows, lanes(p, C), D, matrix(centers, 1, 2, kOp).offset(b * centers.stride(0)).at(p * height, 0));
      for (int i = 0; i < lanes(p, C); ++i) {
        double sum = 0;
        for (int64_t j = 0; j < D; ++j) sum += by_class[p * class_size + j * height + i] * own[j * height + i];
        means[p * height + i] = static_cast<float>(sum);
      }
    });
    parallel(channel_panels, [&](int64_t p) {
      pack(by_channel + p * channel_size, tile.rows, lanes(p, D), C, turned.at(p * height, 0));
    });
    parallel(ceil_div(N, kCols), [&](int64_t p) {
      alignas(64) static const float zeros[kCols] = {};
      const int64_t first = p * kCols;
      const int pixels = static_cast<int>(std::min<int64_t>(kCols, N - first));
      const int64_t map = C * kCols;
      float* rows = local_workspace.get(4 * map + D * kCols + kLanes + channel_panels * height * kCols);
      float *weights = rows + map, *probabilities = weights + map, *products = probabilities + map;
      float *f = products + map, *df = f + D * kCols + kLanes, lse[2 * kCols] = {};
      for (int half = 0; over_classes && half < 2; ++half)
        std::copy_n(static_cast<const float*>(pixel_lse.const_data_ptr()) + (b * 2 + half) * N + first, pixels,
                    lse + half * kCols);
      pack(rows, kCols, pixels, C, matrix(logits, 2, 1, kOp).offset(b * logits.stride(0)).at(first, 0));
      weigh(rows, lse, static_cast<const float*>(class_lse.const_data_ptr()) + b * 2 * C, C, weights);
      if (over_classes) weigh(rows, lse, nullptr, C, probabilities);
      pack(f, kCols, pixels, D, matrix(feats, 1, 2, kOp).offset(b * feats.stride(0)).at(first, 0));
      for (int64_t c = 0; c < class_panels; ++c)
        tile(lanes(c, C), kCols, D, by_class + c * class_size, f, kCols, zeros, 0, products + c * height * kCols,
             kCols);
      for (int64_t c = 0; c < channel_panels; ++c)
        tile(lanes(c, D), kCols, C, by_channel + c * channel_size, weights, kCols, zeros, 0, df + c * height * kCols,
             kCols);
      slopes(products, weights, means, over_classes ? probabilities : nullptr, C);
      write(image(dlogits, b, dtype) + first * size_of(dtype), dtype, N, static_cast<int>(C), pixels, products);
      write_transposed(image(dfeats, b, dtype) + first * D * size_of(dtype), dtype, D, pixels, D, df);
    });
  });
  return {dlogits, dfeats};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("class_centers.cpu", FASTCSS_BOX(&fastcss::cpu::class_centers));
  m.impl("class_centers_backward.cpu", FASTCSS_BOX(&fastcss::cpu::class_centers_backward));
}
