// fastcss::cost_filter.cpu and pack_text.cpu. The largest cost of each class is taken during the product of text and
// pixels, whose tiles are never stored; the kept classes' products are made again, with the same sums in the same
// order.

#include <tuple>
#include <vector>

#include "cost_inputs.h"
#include "cost_map.h"
#include "partial_select.h"
#include "rows.h"

namespace fastcss::cpu {
namespace {

// Keeps the larger of two values, or NaN if either is.
FASTCSS_CLONES void keep_largest(const float* tile, int rows, int valid, float* most) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < valid; ++j) {
      const float x = tile[i * kCols + j], y = most[i * kCols + j];
      most[i * kCols + j] = x > y || x != x ? x : y;
    }
}
FASTCSS_CLONES float largest(const float* values, int64_t n) {
  float most[kCols];
  std::copy_n(values, kCols, most);
  for (int64_t i = kCols; i < n; i += kCols) keep_largest(values + i, 1, kCols, most);
  float result = most[0];
  for (int j = 1; j < kCols; ++j) result = most[j] > result || most[j] != most[j] ? most[j] : result;
  return result;
}

FASTCSS_CLONES void scale_rows(float* tile, int rows, const float* factors) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kCols; ++j) tile[i * kCols + j] *= factors[i];
}

// Holds the text of some images (T · P rows for each, or one set for all; perhaps packed already), and 1 / its lengths.
struct Text {
  Matrix rows;
  int64_t image_stride;  // of the rows; 0 where the images share them
  const float* panels;   // or null
  int64_t panels_stride;
  float* scale;
  int64_t scale_stride;
  bool scaled;

  Matrix row(int64_t image, int64_t r) const { return rows.offset(image * image_stride).at(r, 0); }
  float* scales(int64_t image) const { return scale + image * scale_stride; }

  const float* read(const CostMap& map, int64_t image, int64_t p, int64_t share, float* memory) const {
    const PixelColumns& columns = map.columns;
    const int height = static_cast<int>(map.height), lanes = map.rows_of(p);
    const float* panel = memory;
    if (panels)
      panel = panels + image * panels_stride + p * height * columns.width;
    else
      pack(memory, height, lanes, columns.width, row(image, p * height), columns.pairs);
    if (!scaled && share == 0 && (image == 0 || scale_stride))
      inverse_lengths(panel, height, lanes, columns.words, columns.pairs, scales(image) + p * height);
    return panel;
  }
};

// Finds best [T], the largest cost of each class, from the largest of each row and share in `most`.
void best_costs(const CostMap& map, const float* scale, int64_t T, const float* most, float* best) {
  const int64_t P = map.rows / T;
  for (int64_t t = 0; t < T; ++t) {
    float result = -__builtin_inff();
    for (int64_t share = 0; share < map.shares; ++share)
      for (int64_t row = t * P; row < (t + 1) * P; ++row) {
        const float cost = largest(most + (share * map.rows + row) * kCols, kCols) * scale[row];
        result = cost > result || cost != cost ? cost : result;
      }
    best[t] = result;
  }
}

// Computes cost [images, k, P, N] of the classes in index [images, k]; a class has P rows of the text.
void kept_costs(const float* pixels, const CostMap& map, const Text& text, int64_t P, const int64_t* index, DType dtype,
                char* cost) {
  const PixelColumns& columns = map.columns;
  const int64_t k = map.rows / P;
  const auto row_of = [&](int64_t image, int64_t kept) { return index[image * k + kept / P] * P + kept % P; };
  map.run(
      pixels,
      [&](int64_t image, int64_t p, int64_t, float* memory) {
        const int lanes = map.rows_of(p);
        std::vector<float> rows(lanes * columns.width + kLanes);
        for (int i = 0; i < lanes; ++i)
          read_row(rows.data() + i * columns.width, text.row(image, row_of(image, p * map.height + i)), columns.width);
        pack(memory, static_cast<int>(map.height), lanes, columns.width, {rows.data(), DType::f32, columns.width, 1},
             columns.pairs);
        return memory;
      },
      [&](int64_t image, int64_t p, int64_t c, int64_t, float* tile) {
        const int rows = map.rows_of(p);
        float scale[kMaxRows];
        for (int i = 0; i < rows; ++i) scale[i] = text.scales(image)[row_of(image, p * map.height + i)];
        scale_rows(tile, rows, scale);
        const int64_t at = (image * map.rows + p * map.height) * columns.count + c * kCols;
        write(cost + at * size_of(dtype), dtype, columns.count, rows, columns.valid(c), tile);
      });
}

// Returns how many images to work on at a time: more of them give every thread its share, but each needs a packed copy
// of its pixels.
int64_t images_at_a_time(int64_t images, int64_t floats_each) {
  constexpr int64_t kFloats = int64_t{3} << 18;  // 3 MiB
  return std::clamp<int64_t>(kFloats / std::max<int64_t>(floats_each, 1), 1, std::max<int64_t>(images, 1));
}

std::tuple<Tensor, Tensor, Tensor> cost_filter(const Tensor& image_in, const Tensor& text_in, const Tensor& scale_in,
                                               const Tensor& panels_in, int64_t k) {
  const Tensor image = as_pixels(image_in), text = as_rows(text_in);
  const Tensor scale = torch::stable::contiguous(scale_in), panels = torch::stable::contiguous(panels_in);
  const int64_t B = image.size(0), H = image.size(1), W = image.size(2), D = image.size(3);
  const int64_t T = text.size(1), P = text.size(2);
  const DType dtype = dtype_of(image, kCostFilter);
  Tensor cost = torch::stable::new_empty(image, shape({B, k, P, H, W}));
  Tensor index = torch::stable::new_empty(image, shape({B, k}), ScalarType::Long);
  Tensor score = torch::stable::new_empty(image, shape({B, k}));
  const int64_t padded = ceil_div(T * P, kMaxRows) * kMaxRows;
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && panels.scalar_type() == ScalarType::Float, kCostFilter,
                  ": scale and panels must be float32");
  STD_TORCH_CHECK(scale.numel() == 0 || scale.numel() == text.size(0) * T * P, kCostFilter, ": scale is not of text");
  STD_TORCH_CHECK(panels.numel() == 0 || panels.numel() == text.size(0) * padded * D, kCostFilter,
                  ": panels are not of text");
  const PixelColumns columns(H * W, D, dtype == DType::bf16 && pair_kernel());
  const bool own_text = text.size(0) > 1, scaled = scale.numel() > 0;
  const int64_t group = images_at_a_time(B, columns.size() + T * P * kCols);
  for (int64_t first = 0; first < B; first += group) {
    const int64_t images = std::min(group, B - first), from = own_text ? first : 0;
    const CostMap all(images, T * P, columns), kept(images, k * P, columns);
    const int64_t most_size = all.shares * all.rows * kCols;
    float* pixels = shared_workspace.get(images * (columns.size() + padded + T + k + most_size));
    float *scales = pixels + images * columns.size(), *best = scales + images * padded, *most = best + images * (T + k);
    Text rows{text_of(text, first),
              own_text ? text.stride(0) : 0,
              nullptr,
              own_text ? padded * D : 0,
              scales,
              own_text ? padded : 0,
              scaled};
    if (scaled)
      rows.scale = static_cast<float*>(scale.mutable_data_ptr()) + from * T * P,
      rows.scale_stride = own_text ? T * P : 0;
    if (panels.numel() > 0) rows.panels = static_cast<const float*>(panels.const_data_ptr()) + from * padded * D;
    parallel(images * columns.panels, [&](int64_t item) {
      const int64_t b = item / columns.panels;
      columns.pack_panel(pixels + b * columns.size(), pixels_of(image, first + b), item % columns.panels);
    });
    std::fill_n(most, images * most_size, -__builtin_inff());
    all.run(
        pixels, [&](int64_t b, int64_t p, int64_t share, float* memory) { return rows.read(all, b, p, share, memory); },
        [&](int64_t b, int64_t p, int64_t c, int64_t share, float* tile) {
          float* to = most + b * most_size + (share * all.rows + p * all.height) * kCols;
          keep_largest(tile, all.rows_of(p), columns.valid(c), to);
        });
    int64_t* classes = static_cast<int64_t*>(index.mutable_data_ptr()) + first * k;
    parallel(images, [&](int64_t b) {
      float* of = best + b * (T + k);
      best_costs(all, rows.scales(b), T, most + b * most_size, of);
      select_top(of, T, k, classes + b * k);
      for (int64_t j = 0; j < k; ++j) of[T + j] = of[classes[b * k + j]];
      write_row(cpu::image(score, first + b, dtype), dtype, of + T, k);
    });
    kept_costs(pixels, kept, rows, P, classes, dtype, cpu::image(cost, first, dtype));
  }
  return {cost, index, score};
}

std::tuple<Tensor, Tensor> pack_text(const Tensor& text_in, bool want_panels) {
  const Tensor text = as_rows(text_in);
  const int64_t B = text.size(0), rows = text.size(1) * text.size(2), D = text.size(3);
  const int64_t height = kernel().rows, padded = ceil_div(rows, kMaxRows) * kMaxRows;
  const bool pairs = dtype_of(text, kCostFilter) == DType::bf16 && pair_kernel();
  Tensor scale = torch::stable::new_empty(text, shape({B, text.size(1), text.size(2)}), ScalarType::Float);
  Tensor panels = torch::stable::new_empty(text, want_panels ? shape({B, padded, D}) : shape({0}), ScalarType::Float);
  const int64_t count = ceil_div(rows, height);
  parallel(B * count, [&](int64_t item) {
    const int64_t b = item / count, first = item % count * height;
    const int lanes = static_cast<int>(std::min(height, rows - first));
    float* panel = local_workspace.get(D * height + kLanes);
    pack(panel, static_cast<int>(height), lanes, D, text_of(text, b).at(first, 0), pairs);
    float inverse[kMaxRows];
    inverse_lengths(panel, static_cast<int>(height), lanes, pairs ? (D + 1) / 2 : D, pairs, inverse);
    std::copy_n(inverse, lanes, static_cast<float*>(scale.mutable_data_ptr()) + b * rows + first);
    if (!want_panels) return;
    float* to = static_cast<float*>(panels.mutable_data_ptr()) + (b * padded + first) * D;
    std::copy_n(panel, D * height, to);
    if (first + height >= rows) std::fill_n(to + D * height, D * (padded - first - height), 0.f);  // no rows there
  });
  return {scale, panels};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("cost_filter.cpu", FASTCSS_BOX(&fastcss::cpu::cost_filter));
  m.impl("pack_text.cpu", FASTCSS_BOX(&fastcss::cpu::pack_text));
}
