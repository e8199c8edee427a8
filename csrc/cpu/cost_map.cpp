#include "cost_map.h"

#include "rows.h"

namespace fastcss::cpu {
namespace {

FASTCSS_CLONES void scale_columns(float* tile, int rows, const float* factors) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kCols; ++j) tile[i * kCols + j] *= factors[j];
}

// Cuts blocks so that every thread gets four items of work, if the images have enough panels.
int64_t block_of(int64_t panels, int64_t images, int64_t most) {
  return std::clamp<int64_t>(panels * images / (4 * torch::stable::get_num_threads()), 1, most);
}
int64_t shares_of(int64_t items, int64_t panels) {
  return std::clamp<int64_t>(ceil_div(4 * torch::stable::get_num_threads(), std::max<int64_t>(items, 1)), 1, panels);
}

}  // namespace

void PixelColumns::pack_panel(float* packed, Matrix pixels, int64_t p) const {
  float* to = packed + p * panel_size();
  float* inverse = packed + panels * panel_size() + p * kCols;
  pack(to, kCols, valid(p), width, pixels.at(p * kCols, 0), pairs);
  std::fill_n(inverse, kCols, 0.f);
  inverse_lengths(to, kCols, valid(p), words, pairs, inverse);
}

CostMap::CostMap(int64_t images, int64_t rows, const PixelColumns& columns)
    : images(images),
      rows(rows),
      height(kernel().rows),
      panels(ceil_div(rows, height)),
      block(block_of(panels, images, kBlock)),
      blocks(ceil_div(panels, block)),
      shares(shares_of(images * blocks, columns.panels)),
      columns(columns) {}

void CostMap::multiply(const float* const* text, int64_t first, int64_t last, const float* pixels, const float* inverse,
                       float (*tiles)[kMaxRows * kCols]) const {
  // This many words of the pixels, 32 KiB, stay in the L1 cache while all the text passes by.
  constexpr int64_t kWords = 256;
  alignas(64) static const float zeros[kCols] = {};
  const Kernel& run = columns.pairs ? *pair_kernel() : kernel();
  for (int64_t word = 0; word == 0 || word < columns.words; word += kWords)
    for (int64_t p = first; p < last; ++p) {
      float* tile = tiles[p - first];
      run(rows_of(p), kCols, std::min(kWords, columns.words - word), text[p - first] + word * height,
          pixels + word * kCols, kCols, word ? tile : zeros, word ? kCols : 0, tile, kCols);
    }
  for (int64_t p = first; p < last; ++p) scale_columns(tiles[p - first], rows_of(p), inverse);
}

}  // namespace fastcss::cpu
