#include "cost_map.h"

#include "rows.h"

namespace fastcss::cpu {
namespace {

FASTCSS_CLONES void scale_columns(float* tile, int rows, const float* factors) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kCols; ++j) tile[i * kCols + j] *= factors[j];
}

int64_t block_of(int64_t panels, int64_t most) {
  return std::clamp<int64_t>(panels / (4 * torch::stable::get_num_threads()), 1, most);
}

}  // namespace

void PixelColumns::pack_all(float* packed, Matrix pixels) const {
  parallel(panels, [&](int64_t p) {
    float* to = packed + p * panel_size();
    float* inverse = packed + panels * panel_size() + p * kCols;
    pack(to, kCols, valid(p), width, pixels.at(p * kCols, 0), pairs);
    std::fill_n(inverse, kCols, 0.f);
    inverse_lengths(to, kCols, valid(p), words, pairs, inverse);
  });
}

CostMap::CostMap(int64_t rows, const PixelColumns& columns)
    : rows(rows),
      height(kernel().rows),
      panels(ceil_div(rows, height)),
      block(block_of(panels, kBlock)),
      blocks(ceil_div(panels, block)),
      shares(std::clamp<int64_t>(ceil_div(4 * torch::stable::get_num_threads(), blocks), 1, columns.panels)),
      columns(columns) {}

void CostMap::multiply(const float* text, int text_rows, const float* pixels, const float* inverse, float* tile) const {
  alignas(64) static const float zeros[kCols] = {};
  const Kernel& run = columns.pairs ? *pair_kernel() : kernel();
  run(text_rows, kCols, columns.words, text, pixels, kCols, zeros, 0, tile, kCols);
  scale_columns(tile, text_rows, inverse);
}

}  // namespace fastcss::cpu
