// fastcss::affinity_loss.cpu and its backward. Only pixels that are not ignored count: a pair of the same class costs
// softplus(−s), any other pair softplus(s).

#include <tuple>
#include <vector>

#include "affinity_gradient.h"
#include "tensors.h"
#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "affinity_loss";
constexpr int64_t kKeysAtOnce = 96;  // factors 1 + e^−|s| that are multiplied before a logarithm is taken: at most 2^96

// The pixels of one image that are not ignored.
struct Counted {
  std::vector<int64_t> pixels;
  std::vector<int32_t> labels;  // and room to read kCols more
  int64_t N, K;

  Counted(const Tensor& all, int64_t b, int64_t width, int64_t ignore_index) : K(width) {
    const int32_t* label = static_cast<const int32_t*>(all.const_data_ptr()) + b * all.stride(0);
    for (int64_t i = 0; i < all.size(1); ++i)
      if (label[i * all.stride(1)] != ignore_index) {
        pixels.push_back(i);
        labels.push_back(label[i * all.stride(1)]);
      }
    N = static_cast<int64_t>(pixels.size());
    labels.resize(N + kCols, -1);
  }

  // Returns their rows of t, lanes by terms: in place, or gathered in `rows` as float32 if some are left out.
  Matrix rows_of(const Tensor& t, int64_t b, std::vector<float>& rows) const {
    const Matrix from = matrix(t, 1, 2, kOp).offset(b * t.stride(0));
    if (N == t.size(1)) return from;
    rows.resize(N * K + kLanes);
    const Matrix turned{from.data, from.dtype, from.k_stride, from.lane_stride};
    parallel(ceil_div(N, kCols), [&](int64_t item) {
      std::vector<float> row(K + kLanes);
      for (int64_t i = item * kCols; i < std::min(N, (item + 1) * kCols); ++i) {
        pack(row.data(), static_cast<int>(K), static_cast<int>(K), 1, turned.at(0, pixels[i]));
        std::memcpy(rows.data() + i * K, row.data(), K * sizeof(float));
      }
    });
    return {rows.data(), DType::f32, K, 1};
  }

  // Puts the rows of these pixels into those of all pixels, [·, K], which are zeros.
  void scatter(const float* rows, void* to, DType dtype) const {
    parallel(ceil_div(N, kCols), [&](int64_t item) {
      for (int64_t i = item * kCols; i < std::min(N, (item + 1) * kCols); ++i)
        for (int64_t first = 0; first < K; first += kCols) {
          const int terms = static_cast<int>(std::min<int64_t>(kCols, K - first));
          float row[kCols];
          std::memcpy(row, rows + i * K + first, terms * sizeof(float));
          write(static_cast<char*>(to) + (pixels[i] * K + first) * size_of(dtype), dtype, K, 1, terms, row);
        }
    });
  }
};

void add_to(double* total, const Softplus& sum) {
  on_widest([total, &sum]<class V>() FASTCSS_LOOP {
    for (int first = 0; first < kCols; first += kLanesIn<V>) {
      const V x = load<V>(sum.twice_hinge + first) * (0.5f * kLn2) + log1p(load<V>(sum.excess + first));
      for (int i = 0; i < kLanesIn<V>; ++i) total[first + i] += x[i];
    }
  });
}

// Σ over all pairs of softplus(∓s).
double sum_of_pairs(const Counted& counted, const Tensor& q, const Tensor& k, int64_t b, float scale) {
  const int64_t N = counted.N, K = counted.K, height = kernel().rows;
  const int64_t key_panels = ceil_div(N, height), query_panels = ceil_div(N, kCols), key_size = K * height + kLanes;
  std::vector<float> q_rows, k_rows;
  const Matrix queries_at = counted.rows_of(q, b, q_rows), keys_at = counted.rows_of(k, b, k_rows);
  float* keys = shared_workspace.get(key_panels * key_size);
  parallel(key_panels, [&](int64_t p) {
    const int lanes = static_cast<int>(std::min(height, N - p * height));
    pack(keys + p * key_size, kernel().rows, lanes, K, keys_at.at(p * height, 0));
  });
  std::vector<double> totals(query_panels);
  parallel(query_panels, [&](int64_t p) {
    const int queries = static_cast<int>(std::min<int64_t>(kCols, N - p * kCols));
    float* packed = local_workspace.get(K * kCols);
    pack(packed, kCols, queries, K, queries_at.at(p * kCols, 0));
    double total[kCols] = {};
    for (int64_t first = 0; first < key_panels; first += kKeysAtOnce / height) {
      Softplus sum{};
      for (int64_t j = first; j < std::min(first + kKeysAtOnce / height, key_panels); ++j)
        affinity_tiles().softplus(K, keys + j * key_size, packed, scale * kLog2e, &counted.labels[j * height],
                                  &counted.labels[p * kCols], static_cast<int>(std::min(height, N - j * height)), &sum);
      add_to(total, sum);
    }
    for (int i = 0; i < queries; ++i) totals[p] += total[i];
  });
  double sum = 0;
  for (double total : totals) sum += total;
  return sum;
}

Tensor affinity_loss(const Tensor& q, const Tensor& k, const Tensor& labels, double scale, int64_t ignore_index) {
  const int64_t B = q.size(0);
  std::vector<double> sums(B), pairs(B);
  for_images(B, q.size(1), [&](int64_t b) {
    const Counted counted(labels, b, q.size(2), ignore_index);
    pairs[b] = static_cast<double>(counted.N) * static_cast<double>(counted.N);
    sums[b] = sum_of_pairs(counted, q, k, b, static_cast<float>(scale));
  });
  double sum = 0, count = 0;
  for (int64_t b = 0; b < B; ++b) sum += sums[b], count += pairs[b];
  Tensor loss = torch::stable::new_empty(q, shape({}), ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(sum / std::max(count, 1.0));
  return loss;
}

std::tuple<Tensor, Tensor> affinity_loss_backward(const Tensor& dloss, const Tensor& q, const Tensor& k,
                                                  const Tensor& labels, double scale, int64_t ignore_index) {
  const int64_t B = q.size(0), K = q.size(2);
  const DType dtype = dtype_of(q, kOp);
  Tensor dq = torch::stable::new_empty(q, q.sizes()), dk = torch::stable::new_empty(k, k.sizes());
  torch::stable::zero_(dq), torch::stable::zero_(dk);  // those of ignored pixels stay so
  std::vector<Counted> images;
  double pairs = 0;
  for (int64_t b = 0; b < B; ++b) {
    images.emplace_back(labels, b, K, ignore_index);
    pairs += static_cast<double>(images[b].N) * static_cast<double>(images[b].N);
  }
  const double slope = *static_cast<const float*>(dloss.const_data_ptr()) * scale / std::max(pairs, 1.0);
  for_images(B, q.size(1), [&](int64_t b) {
    const Counted& counted = images[b];
    std::vector<float> q_rows, k_rows;
    const AffinityGradientProblem problem{.N = counted.N,
                                          .K = K,
                                          .scale = static_cast<float>(scale),
                                          .q = counted.rows_of(q, b, q_rows),
                                          .k = counted.rows_of(k, b, k_rows),
                                          .ds_factor = static_cast<float>(slope),
                                          .labels = counted.labels.data()};
    if (counted.N == q.size(1)) {
      AffinityGradient(problem).run({image(dq, b, dtype), image(dk, b, dtype), dtype});
    } else {
      std::vector<float> dq_rows(counted.N * K), dk_rows(counted.N * K);
      AffinityGradient(problem).run({dq_rows.data(), dk_rows.data(), DType::f32});
      counted.scatter(dq_rows.data(), image(dq, b, dtype), dtype);
      counted.scatter(dk_rows.data(), image(dk, b, dtype), dtype);
    }
  });
  return {dq, dk};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("affinity_loss.cpu", FASTCSS_BOX(&fastcss::cpu::affinity_loss));
  m.impl("affinity_loss_backward.cpu", FASTCSS_BOX(&fastcss::cpu::affinity_loss_backward));
}
