// Binds the pieces of csrc/cpu that no op shows by itself, for test_cpu_pieces.py. Arrays in and out are float32.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cpu/gemm.h"
#include "../../csrc/cpu/partial_select.h"
#include "../../csrc/cpu/rows.h"
#include "../../csrc/cpu/two_step_bilinear.h"

namespace py = pybind11;
using namespace fastcss::cpu;
using Array = py::array_t<float, py::array::c_style | py::array::forcecast>;

// rows [M, k] · columns [k, N] + start [M, N] by one call of the micro-kernel, M ≤ its panel height, N ≤ 32.
Array micro_kernel(const Array& rows, const Array& columns, const Array& start, bool pairs) {
  const Kernel& run = pairs ? *pair_kernel() : kernel();
  const int64_t M = rows.shape(0), k = rows.shape(1), N = columns.shape(1), words = pairs ? (k + 1) / 2 : k;
  std::vector<float> a(words * run.rows + kLanes), b(words * kCols + kLanes), c(kMaxRows * kCols, 0.f);
  pack(a.data(), run.rows, static_cast<int>(M), k, {rows.data(), DType::f32, k, 1}, pairs);
  pack(b.data(), kCols, static_cast<int>(N), k, {columns.data(), DType::f32, 1, N}, pairs);
  for (int64_t i = 0; i < M; ++i) std::copy_n(start.data(i, 0), N, &c[i * kCols]);
  run(static_cast<int>(M), static_cast<int>(N), words, a.data(), b.data(), kCols, c.data(), kCols, c.data(), kCols);
  Array out({M, N});
  for (int64_t i = 0; i < M; ++i) std::copy_n(&c[i * kCols], N, out.mutable_data(i, 0));
  return out;
}

Array whole_product(const Array& left, const Array& right, bool transposed) {
  const int64_t M = left.shape(0), k = left.shape(1), N = right.shape(transposed ? 0 : 1);
  const int64_t ld = (N + kCols - 1) / kCols * kCols;
  std::vector<float> out(M * ld), scratch(product_scratch(M, k) + kLanes);
  const Matrix columns{right.data(), DType::f32, transposed ? k : 1, transposed ? 1 : N};
  product(M, N, k, {left.data(), DType::f32, k, 1}, columns, out.data(), ld, false, scratch.data());
  Array result({M, N});
  for (int64_t i = 0; i < M; ++i) std::copy_n(&out[i * ld], N, result.mutable_data(i, 0));
  return result;
}

Array panel_lengths(const Array& rows, bool pairs) {  // 1 / length of each row, from a packed panel
  const int64_t n = rows.shape(0), k = rows.shape(1), words = pairs ? (k + 1) / 2 : k;
  std::vector<float> panel(words * kCols + kLanes);
  pack(panel.data(), kCols, static_cast<int>(n), k, {rows.data(), DType::f32, k, 1}, pairs);
  Array out(n);
  inverse_lengths(panel.data(), kCols, static_cast<int>(n), words, pairs, out.mutable_data());
  return out;
}

std::vector<int64_t> selected(const Array& values, int64_t k) {
  std::vector<int64_t> index(k);
  select_top(values.data(), values.size(), k, index.data());
  return index;
}

std::pair<int64_t, std::vector<float>> taps(int64_t i, int64_t in, int64_t crop, int64_t size) {
  const Taps found = two_step(i, in, crop, size);
  return {found.first, {found.weight, found.weight + kTaps}};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
#if defined(__x86_64__)
  m.def("level_of", [](bool has_v3, bool has_v4, const std::string& asked) {
    return level_of(has_v3, has_v4, asked.empty() ? nullptr : asked.c_str());
  });
#endif
  m.def("panel_height", [] { return kernel().rows; });
  m.def("has_pairs", [] { return pair_kernel() != nullptr; });
  m.def("micro_kernel", &micro_kernel);
  m.def("product", &whole_product);
  m.def("panel_lengths", &panel_lengths);
  m.def("select", &selected);
  m.def("taps", &taps);
}
