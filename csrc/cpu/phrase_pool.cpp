// fastcss::phrase_pool.cpu and its backward. Most of the work is to read the phrases: each class's are read once for
// all images.

#include <cmath>
#include <tuple>

#include "parallel.h"
#include "rows.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "phrase_pool";

// Reads rows [count][width], and computes 1 / their lengths.
void read_rows(Matrix m, int64_t count, int64_t width, float* rows, float* inverse) {
  for (int64_t i = 0; i < count; ++i) {
    read_row(rows + i * width, m.at(i, 0), width);
    inverse[i] = inverse_length(rows + i * width, width);
  }
}

void read_unit_rows(Matrix m, int64_t count, int64_t width, float* rows, float* inverse) {
  read_rows(m, count, width, rows, inverse);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < width; ++d) rows[i * width + d] *= inverse[i];
}

// weight = softmax(cosine), both [M]
void softmax(const float* cosine, int64_t M, float* weight) {
  float most = -__builtin_inff(), sum = 0;
  for (int64_t m = 0; m < M; ++m) most = cosine[m] > most ? cosine[m] : most;
  for (int64_t m = 0; m < M; ++m) sum += weight[m] = std::exp(cosine[m] - most);
  for (int64_t m = 0; m < M; ++m) weight[m] /= sum;
}

// The phrases of one class, and how close image b is to each.
struct Phrases {
  int64_t M, D;
  float *row, *inverse, *cosine, *weight;

  static int64_t size(int64_t M, int64_t D) { return M * D + 3 * M; }
  Phrases(Matrix phrases, int64_t M, int64_t D, float* memory)
      : M(M), D(D), row(memory), inverse(row + M * D), cosine(inverse + M), weight(cosine + M) {
    read_rows(phrases, M, D, row, inverse);
  }
  void weigh(const float* unit_cls) {
    for (int64_t m = 0; m < M; ++m) cosine[m] = dot(row + m * D, unit_cls, D) * inverse[m];
    softmax(cosine, M, weight);
  }
};

Tensor phrase_pool(const Tensor& cls, const Tensor& phrases) {
  const int64_t B = cls.size(0), D = cls.size(1), C = phrases.size(0), M = phrases.size(1);
  const DType dtype = dtype_of(cls, kOp);
  Tensor pooled = torch::stable::new_empty(cls, shape({B, C, D}));
  float* images = shared_workspace.get(B * D + B);
  read_unit_rows(matrix(cls, 0, 1, kOp), B, D, images, images + B * D);
  parallel(C, [&](int64_t c) {
    float* sum = local_workspace.get(D + Phrases::size(M, D));
    Phrases own(matrix(phrases, 1, 2, kOp).offset(c * phrases.stride(0)), M, D, sum + D);
    for (int64_t b = 0; b < B; ++b) {
      own.weigh(images + b * D);
      std::fill_n(sum, D, 0.f);
      for (int64_t m = 0; m < M; ++m) add_scaled(sum, own.weight[m], own.row + m * D, D);
      write_row(image(pooled, b, dtype) + c * D * size_of(dtype), dtype, sum, D);
    }
  });
  return pooled;
}

// Let g be the phrases, α the weights, s the cosines and p = Σ α g. Then dα_m = dp · g_m and ds = α (dα − Σ α dα); a
// cosine gives ds (ĉ − s ĝ) / ‖g‖ to the phrase and ds (ĝ − s ĉ) / ‖c‖ to the image.
std::tuple<Tensor, Tensor> phrase_pool_backward(const Tensor& dpooled, const Tensor& cls, const Tensor& phrases) {
  const int64_t B = cls.size(0), D = cls.size(1), C = phrases.size(0), M = phrases.size(1);
  const DType dtype = dtype_of(cls, kOp);
  Tensor dcls = torch::stable::new_empty(cls, cls.sizes());
  Tensor dphrases = torch::stable::new_empty(phrases, phrases.sizes());
  float* images = shared_workspace.get(B * D + B + C * B * D);
  float *inverse = images + B * D, *parts = inverse + B;  // parts [C][B][D]: what each class gives to the images
  read_unit_rows(matrix(cls, 0, 1, kOp), B, D, images, inverse);
  std::fill_n(parts, C * B * D, 0.f);
  parallel(C, [&](int64_t c) {
    float* given = local_workspace.get(D + M + M * D + Phrases::size(M, D));
    float *slope = given + D, *dphrase = slope + M;
    std::fill_n(dphrase, M * D, 0.f);
    Phrases own(matrix(phrases, 1, 2, kOp).offset(c * phrases.stride(0)), M, D, dphrase + M * D);
    for (int64_t b = 0; b < B; ++b) {
      const float* image = images + b * D;
      float *part = parts + (c * B + b) * D, mean = 0, along = 0;
      read_row(given, matrix(dpooled, 1, 2, kOp).offset(b * dpooled.stride(0)).at(c, 0), D);
      own.weigh(image);
      for (int64_t m = 0; m < M; ++m) {
        slope[m] = dot(given, own.row + m * D, D);
        mean += own.weight[m] * slope[m];
      }
      for (int64_t m = 0; m < M; ++m) {
        const float ds = own.weight[m] * (slope[m] - mean), ds_by_length = ds * own.inverse[m];
        float* to = dphrase + m * D;
        add_scaled(to, own.weight[m], given, D);
        add_scaled(to, ds_by_length, image, D);
        if (own.inverse[m] < kLargestInverse)
          add_scaled(to, -ds_by_length * own.cosine[m] * own.inverse[m], own.row + m * D, D);
        add_scaled(part, ds_by_length, own.row + m * D, D);
        along += ds * own.cosine[m];
      }
      if (inverse[b] < kLargestInverse) add_scaled(part, -along, image, D);
    }
    for (int64_t m = 0; m < M; ++m)
      write_row(cpu::image(dphrases, c, dtype) + m * D * size_of(dtype), dtype, dphrase + m * D, D);
  });
  for (int64_t b = 0; b < B; ++b) {
    float* sum = images + b * D;
    std::fill_n(sum, D, 0.f);
    for (int64_t c = 0; c < C; ++c) add_scaled(sum, inverse[b], parts + (c * B + b) * D, D);
    write_row(image(dcls, b, dtype), dtype, sum, D);
  }
  return {dcls, dphrases};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("phrase_pool.cpu", FASTCSS_BOX(&fastcss::cpu::phrase_pool));
  m.impl("phrase_pool_backward.cpu", FASTCSS_BOX(&fastcss::cpu::phrase_pool_backward));
}
