// fastcss::merge_masks.cpu. A tile of the label map takes the masks in the order of their scores until each of its
// pixels has one. An interpolated logit lies between those it is made of. So a mask is passed over if none of its
// logits under the tile is above the threshold, and takes the whole rest of the tile if all are. Pixels are
// interpolated only where the edge of a mask crosses the tile.

#include <tuple>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "tensors.h"
#include "two_step_bilinear.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "merge_masks";
constexpr int64_t kTileRows = 16, kTileVectors = 4, kTileColumns = kTileVectors * kLanes;

// The taps of 16 columns.
struct Columns {
  int64_t first;           // input of the first tap of the first lane
  int32_t offset[kLanes];  // of each lane's first tap, counted from there
  float weight[kTaps][kLanes];
  int64_t end() const { return first + offset[kLanes - 1] + kTaps; }
};

std::vector<Taps> row_taps(int64_t in, int64_t crop, int64_t size) {
  std::vector<Taps> taps(size);
  for (int64_t i = 0; i < size; ++i) taps[i] = two_step(i, in, crop, size);
  return taps;
}

std::vector<Columns> column_taps(int64_t in, int64_t crop, int64_t size) {
  const std::vector<Taps> taps = row_taps(in, crop, size);
  std::vector<Columns> columns(ceil_div(size, kLanes));
  for (int64_t i = 0; i < static_cast<int64_t>(columns.size()) * kLanes; ++i) {
    Columns& to = columns[i / kLanes];
    const Taps& from = taps[std::min(i, size - 1)];
    if (i % kLanes == 0) to.first = from.first;
    to.offset[i % kLanes] = static_cast<int32_t>(from.first - to.first);
    for (int t = 0; t < kTaps; ++t) to.weight[t][i % kLanes] = from.weight[t];
  }
  return columns;
}

// Notes for each block of a mask whether nothing, something or everything is above the threshold. NaN is not above it.
class Blocks {
 public:
  Blocks(int64_t masks, int64_t h, int64_t w)
      : h_(h), w_(w), down_(ceil_div(h, kRows)), across_(ceil_div(w, kLanes)), flags_(masks * down_ * across_) {}

  void fill(Matrix mask, int64_t k, int64_t row_stride, float threshold) {
    std::vector<float> row(across_ * kLanes);
    for (int64_t y = 0; y < h_; ++y) {
      read_row(row.data(), mask.offset(y * row_stride), w_);
      uint8_t* to = &flags_[(k * down_ + y / kRows) * across_];
      for (int64_t x = 0; x < across_; ++x) {
        const int count = above(&row[x * kLanes], std::min<int64_t>(kLanes, w_ - x * kLanes), threshold);
        const uint8_t flags = (count > 0 ? kAny : 0) | (count == std::min<int64_t>(kLanes, w_ - x * kLanes) ? kAll : 0);
        to[x] = y % kRows == 0 ? flags : ((to[x] | flags) & kAny) | (to[x] & flags & kAll);
      }
    }
  }

  static constexpr uint8_t kAny = 1, kAll = 2;
  uint8_t of(int64_t k, int64_t row, int64_t row_end, int64_t column, int64_t column_end) const {
    uint8_t any = 0, all = kAll;
    for (int64_t y = row / kRows; y <= (std::min(row_end, h_) - 1) / kRows; ++y)
      for (int64_t x = column / kLanes; x <= (std::min(column_end, w_) - 1) / kLanes; ++x) {
        const uint8_t flags = flags_[(k * down_ + y) * across_ + x];
        any |= flags, all &= flags;
      }
    return (any & kAny) | (all & kAll);
  }

 private:
  static constexpr int64_t kRows = 8;
  static int above(const float* logits, int64_t n, float threshold) {
    int count = 0;
    for (int64_t i = 0; i < n; ++i) count += logits[i] > threshold;
    return count;
  }
  int64_t h_, w_, down_, across_;
  std::vector<uint8_t> flags_;
};

// Up to kTileRows × kTileColumns pixels of the label map, and the logits of one mask that they are made of.
struct Tile {
  const Taps* taps;
  const Columns* columns;
  int64_t rows, vectors;
  int32_t label[kTileRows * kTileColumns];

  int64_t first_row() const { return taps[0].first; }
  int64_t end_row() const { return taps[rows - 1].first + kTaps; }
  int64_t first_column() const { return columns[0].first; }
  int64_t end_column() const { return columns[vectors - 1].end(); }
  // The stride of the logits in memory leaves room to load two vectors from anywhere.
  int64_t stride() const { return ceil_div(end_column() - first_column(), kLanes) * kLanes + 2 * kLanes; }
};

// Sums over the taps for some of the 16 columns of one row, from lane `first` on.
template <class V>
FASTCSS_INLINE V interpolate(const Columns& c, int first, const float* row) {
  constexpr int kWide = kLanesIn<V>;
  V sum = {};
  row += c.offset[first];
  if (c.offset[first + kWide - 1] - c.offset[first] + kTaps <= 2 * kWide) {
    IntsOf<V> offset;
    std::memcpy(&offset, c.offset + first, sizeof(offset));
    offset -= c.offset[first];
    const V low = load<V>(row), high = load<V>(row + kWide);
#pragma GCC unroll 3
    for (int t = 0; t < kTaps; ++t) sum += load<V>(c.weight[t] + first) * __builtin_shuffle(low, high, offset + t);
    return sum;
  }
  for (int t = 0; t < kTaps; ++t) {
    V tap;
    for (int lane = 0; lane < kWide; ++lane) tap[lane] = row[c.offset[first + lane] - c.offset[first] + t];
    sum += load<V>(c.weight[t] + first) * tap;
  }
  return sum;
}

// Labels the pixels that have none and whose logit is above the threshold; returns how many have none after that.
int64_t paint(Tile& tile, const float* logits, float threshold, int32_t label, float* row) {
  int64_t count = 0;
  on_widest([=, &tile, &count]<class V>() FASTCSS_LOOP {
    constexpr int kWide = kLanesIn<V>;
    const int64_t stride = tile.stride();
    IntsOf<V> open = {};
    for (int64_t y = 0; y < tile.rows; ++y) {
      const float* from = logits + (tile.taps[y].first - tile.first_row()) * stride;
      for (int64_t x = 0; x < stride; x += kWide) {
        V sum = {};
#pragma GCC unroll 3
        for (int t = 0; t < kTaps; ++t) sum += tile.taps[y].weight[t] * load<V>(from + t * stride + x);
        store(row + x, sum);
      }
      for (int64_t x = 0; x < tile.vectors * kLanes; x += kWide) {
        const Columns& columns = tile.columns[x / kLanes];
        const V logit = interpolate<V>(columns, x % kLanes, row + columns.first - tile.first_column());
        int32_t* to = tile.label + y * kTileColumns + x;
        IntsOf<V> labels;
        std::memcpy(&labels, to, sizeof(labels));
        labels = (labels == 0) & (logit > threshold) ? label - IntsOf<V>{} : labels;
        std::memcpy(to, &labels, sizeof(labels));
        open -= labels == 0;
      }
    }
    for (int lane = 0; lane < kWide; ++lane) count += open[lane];
  });
  return count;
}

struct Masks {
  Matrix data;
  int64_t h, w, mask_stride, row_stride;

  // Reads the logits under a tile, zeros outside of the mask.
  void read(int64_t k, const Tile& tile, float* logits) const {
    const int64_t stride = tile.stride(), columns = std::min(tile.end_column(), w) - tile.first_column();
    for (int64_t y = tile.first_row(); y < tile.end_row(); ++y, logits += stride) {
      std::fill_n(logits, stride, 0.f);
      if (y < h)
        read_row(logits, data.offset(k * mask_stride + y * row_stride + tile.first_column() * data.k_stride), columns);
    }
  }
};

void label_tile(Tile& tile, const Masks& masks, const Blocks& blocks, const int64_t* order, int64_t K,
                float threshold) {
  std::fill_n(tile.label, kTileRows * kTileColumns, 0);
  const int64_t logits_size = (tile.end_row() - tile.first_row()) * tile.stride();
  float* logits = local_workspace.get(logits_size + tile.stride());
  for (int64_t i = 0; i < K; ++i) {
    const int64_t k = order[i];
    const uint8_t above = blocks.of(k, tile.first_row(), tile.end_row(), tile.first_column(), tile.end_column());
    if (!(above & Blocks::kAny)) continue;
    const int32_t label = static_cast<int32_t>(k + 1);
    if (above & Blocks::kAll) {
      for (int32_t& pixel : tile.label) pixel = pixel ? pixel : label;
      return;
    }
    masks.read(k, tile, logits);
    if (paint(tile, logits, threshold, label, logits + logits_size) == 0) return;
  }
}

std::tuple<Tensor, Tensor> merge_masks(const Tensor& masks, const Tensor& scores, const Tensor& order, int64_t height,
                                       int64_t width, int64_t crop_height, int64_t crop_width, double threshold,
                                       bool want_score) {
  const int64_t K = masks.size(0), h = masks.size(1), w = masks.size(2);
  const DType score_dtype = dtype_of(scores, kOp);
  Tensor labels = torch::stable::new_empty(masks, shape({height, width}), ScalarType::Long);
  Tensor score = torch::stable::new_empty(scores, want_score ? shape({height, width}) : shape({0}));
  const Masks all{matrix(masks, 1, 2, kOp), h, w, masks.stride(0), masks.stride(1)};
  const float bar = static_cast<float>(threshold);
  Blocks blocks(K, h, w);
  parallel(K, [&](int64_t k) { blocks.fill(all.data.offset(k * all.mask_stride), k, all.row_stride, bar); });
  const std::vector<Taps> taps = row_taps(h, crop_height, height);
  const std::vector<Columns> columns = column_taps(w, crop_width, width);
  std::vector<float> confidence(K + 1, 0.f);  // of each label
  read_row(confidence.data() + 1, matrix(scores, 0, 0, kOp), K);
  const int64_t across = ceil_div(width, kTileColumns);
  parallel(ceil_div(height, kTileRows) * across, [&](int64_t item) {
    const int64_t y = item / across * kTileRows, v = item % across * kTileVectors;
    Tile tile{&taps[y],
              &columns[v],
              std::min(kTileRows, height - y),
              std::min<int64_t>(kTileVectors, columns.size() - v),
              {}};
    label_tile(tile, all, blocks, static_cast<const int64_t*>(order.const_data_ptr()), K, bar);
    const int64_t valid = std::min(kTileColumns, width - v * kLanes);
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int32_t* from = tile.label + i * kTileColumns;
      const int64_t at = (y + i) * width + v * kLanes;
      std::copy_n(from, valid, static_cast<int64_t*>(labels.mutable_data_ptr()) + at);
      if (!want_score) continue;
      float row[kTileColumns];
      for (int64_t x = 0; x < valid; ++x) row[x] = confidence[from[x]];
      write_row(static_cast<char*>(score.mutable_data_ptr()) + at * size_of(score_dtype), score_dtype, row, valid);
    }
  });
  return {labels, score};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("merge_masks.cpu", FASTCSS_BOX(&fastcss::cpu::merge_masks)); }
