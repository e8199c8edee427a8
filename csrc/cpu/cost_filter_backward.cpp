// The backward pass of fastcss::cost_filter.cpu, through the kept costs. Let ê and t̂ be the normalised rows, G = dcost
// and M = cost. Then de_n = (Σ_r G_rn t̂_r − ê_n Σ_r G_rn M_rn) / ‖e_n‖, and dt_r likewise: two products per image.

#include <tuple>
#include <vector>

#include "cost_inputs.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace fastcss::cpu {
namespace {

// Holds normalised rows [count][width], and 1 / the lengths they had.
struct UnitRows {
  float *rows, *inverse;
  int64_t width;
  static int64_t size(int64_t count, int64_t width) { return count * width + count; }

  void set(int64_t i, Matrix m) const {
    float* row = rows + i * width;
    read_row(row, m, width);
    inverse[i] = inverse_length(row, width);
    for (int64_t d = 0; d < width; ++d) row[d] *= inverse[i];
  }
  Matrix by_column() const { return {rows, DType::f32, 1, width}; }
};

// result [count][width] = (gradient · others − unit Σ gradient · cost) · inverse, a block of rows at a time; `gradient`
// and `cost` have the rows as lanes and `terms` terms. Calls done(i, row) with each result.
template <class Done>
void through_cosine(const UnitRows& own, int64_t count, const UnitRows& others, int64_t terms, Matrix gradient,
                    Matrix cost, const Done& done) {
  const int64_t width = own.width, padded = ceil_div(width, kCols) * kCols;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t block = std::min<int64_t>(ceil_div(ceil_div(count, threads), kMaxRows) * kMaxRows, 8 * kMaxRows * 8);
  parallel(ceil_div(count, block), [&](int64_t item) {
    const int64_t first = item * block, n = std::min(block, count - first);
    float* sums = local_workspace.get(n * padded + 2 * terms + product_scratch(n, terms));
    float *slope = sums + n * padded, *value = slope + terms;
    product(n, width, terms, gradient.at(first, 0), others.by_column(), sums, padded, false, value + terms);
    for (int64_t i = 0; i < n; ++i) {
      float* row = sums + i * padded;
      read_row(slope, gradient.at(first + i, 0), terms);
      read_row(value, cost.at(first + i, 0), terms);
      if (own.inverse[first + i] < kLargestInverse)
        add_scaled(row, -dot(slope, value, terms), own.rows + (first + i) * width, width);
      for (int64_t d = 0; d < width; ++d) row[d] *= own.inverse[first + i];
      done(first + i, row);
    }
  });
}

std::tuple<Tensor, Tensor> cost_filter_backward(const Tensor& dcost_in, const Tensor& image_in, const Tensor& text_in,
                                                const Tensor& cost_in, const Tensor& index) {
  const Tensor dcost = torch::stable::contiguous(dcost_in), cost = torch::stable::contiguous(cost_in);
  const Tensor image = as_pixels(image_in), text = as_rows(text_in);
  const int64_t B = image.size(0), N = image.size(1) * image.size(2), D = image.size(3);
  const int64_t T = text.size(1), P = text.size(2), R = index.size(1) * P;
  const DType dtype = dtype_of(image, kCostFilter);
  Tensor dimage = torch::stable::new_empty(image, image.sizes());
  Tensor dtext = torch::stable::new_zeros(text, text.sizes());
  const bool shared = text.size(0) == 1;
  std::vector<float> wide(shared && dtype != DType::f32 ? T * P * D : 0, 0.f);
  float* total = wide.empty() ? reinterpret_cast<float*>(cpu::image(dtext, 0, dtype)) : wide.data();  // Σ over images
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* kept = static_cast<const int64_t*>(index.const_data_ptr()) + b * index.size(1);
    float* memory = shared_workspace.get(UnitRows::size(N, D) + UnitRows::size(R, D));
    const UnitRows pixels{memory, memory + N * D, D};
    float* rest = memory + UnitRows::size(N, D);
    const UnitRows rows{rest, rest + R * D, D};
    const auto row_of = [&](int64_t r) { return kept[r / P] * P + r % P; };
    parallel(N, [&](int64_t n) { pixels.set(n, pixels_of(image, b).at(n, 0)); });
    parallel(R, [&](int64_t r) { rows.set(r, text_of(text, b).at(row_of(r), 0)); });
    const Matrix gradient{cpu::image(dcost, b, dtype), dtype, N, 1}, value{cpu::image(cost, b, dtype), dtype, N, 1};
    const Matrix gradient_by_pixel{gradient.data, dtype, 1, N}, value_by_pixel{value.data, dtype, 1, N};
    through_cosine(pixels, N, rows, R, gradient_by_pixel, value_by_pixel, [&](int64_t n, const float* row) {
      write_row(cpu::image(dimage, b, dtype) + n * D * size_of(dtype), dtype, row, D);
    });
    through_cosine(rows, R, pixels, N, gradient, value, [&](int64_t r, const float* row) {
      if (shared)
        add_scaled(total + row_of(r) * D, 1.f, row, D);
      else
        write_row(cpu::image(dtext, b, dtype) + row_of(r) * D * size_of(dtype), dtype, row, D);
    });
  }
  if (!wide.empty()) write_row(dtext.mutable_data_ptr(), dtype, total, T * P * D);
  return {dimage, dtext};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("cost_filter_backward.cpu", FASTCSS_BOX(&fastcss::cpu::cost_filter_backward));
}
