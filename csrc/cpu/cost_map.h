// Multiplies text and pixels, a tile at a time; both passes of cost_filter run it, over all classes and over the kept
// ones.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace fastcss::cpu {

// Holds the pixels of an image, packed as columns, and 1 / their lengths.
class PixelColumns {
 public:
  PixelColumns(int64_t pixels, int64_t width, bool pairs)
      : count(pixels),
        panels(ceil_div(pixels, kCols)),
        words(pairs ? (width + 1) / 2 : width),
        width(width),
        pairs(pairs) {}

  int64_t size() const { return panels * (panel_size() + kCols); }
  void pack_panel(float* packed, Matrix pixels, int64_t p) const;  // lanes: pixels
  const float* panel(const float* packed, int64_t p) const { return packed + p * panel_size(); }
  const float* inverse(const float* packed, int64_t p) const { return packed + panels * panel_size() + p * kCols; }
  int valid(int64_t p) const { return static_cast<int>(std::min<int64_t>(kCols, count - p * kCols)); }

  const int64_t count, panels, words, width;
  const bool pairs;

 private:
  int64_t panel_size() const { return words * kCols + kLanes; }
};

// Computes rows · columns of some images in blocks that stay in cache; `rows` are packed panel by panel of text. Items
// of work are images times blocks of panels times shares of the columns, so many that every thread gets some.
class CostMap {
 public:
  CostMap(int64_t images, int64_t rows, const PixelColumns& columns);

  int rows_of(int64_t panel) const { return static_cast<int>(std::min(height, rows - panel * height)); }
  int64_t panel_size() const { return columns.words * height + kLanes; }

  // read(image, panel, share, memory) returns a packed panel of text, which it may make in `memory`; it is called once
  // for each share of the columns. use(image, panel, column panel, share, tile) takes their product,
  // [rows_of(panel)][kCols], times 1 / the lengths of the pixels.
  template <class Read, class Use>
  void run(const float* packed, const Read& read, const Use& use) const {
    parallel(images * blocks * shares, [&](int64_t item) {
      const int64_t image = item / (blocks * shares), share = item % shares;
      const int64_t first = item / shares % blocks * block, last = std::min(panels, first + block);
      const float* pixels = packed + image * columns.size();
      float* memory = local_workspace.get(block * panel_size());
      const float* text[kBlock];
      for (int64_t p = first; p < last; ++p)
        text[p - first] = read(image, p, share, memory + (p - first) * panel_size());
      float tiles[kBlock][kMaxRows * kCols];
      for (int64_t c = share * columns.panels / shares; c < (share + 1) * columns.panels / shares; ++c) {
        multiply(text, first, last, columns.panel(pixels, c), columns.inverse(pixels, c), tiles);
        for (int64_t p = first; p < last; ++p) use(image, p, c, share, tiles[p - first]);
      }
    });
  }

  const int64_t images, rows, height, panels, block, blocks, shares;
  const PixelColumns& columns;

 private:
  static constexpr int64_t kBlock = 8;  // panels of 24 KiB at a width of 512; L2 holds them and a column panel
  // Computes the tiles of the text's panels first … last and one panel of pixels.
  void multiply(const float* const* text, int64_t first, int64_t last, const float* pixels, const float* inverse,
                float (*tiles)[kMaxRows * kCols]) const;
};

}  // namespace fastcss::cpu
