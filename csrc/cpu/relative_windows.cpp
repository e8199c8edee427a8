#include "relative_windows.h"

#include "parallel.h"
#include "rows.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "relative_attention";

// Reads neighbours in a row of the map, and fetches what is read next into the cache: tokens lie too far apart for the
// hardware to see to it. Of a map that is the tokens further on, of a window the next head.
void read_run(float* rows, const Tensor& t, int64_t b, int64_t h, int64_t y, int64_t x, int64_t tokens, int64_t D,
              bool whole_map) {
  constexpr int64_t kAhead = 8, kLine = 64;
  const Matrix from = matrix(t, 2, 4, kOp).offset(b * t.stride(0) + y * t.stride(1) + h * t.stride(3));
  const int64_t next = (whole_map ? kAhead * t.stride(2) : t.stride(3)) * size_of(from.dtype);
  for (int64_t i = 0; i < tokens; ++i) {
    const Matrix row = from.at(x + i, 0);
    for (int64_t byte = 0; byte < D * size_of(from.dtype); byte += kLine)
      __builtin_prefetch(static_cast<const char*>(row.data) + next + byte, 0, 2);
    read_row(rows + i * D, row, D);
  }
}

}  // namespace

RelativeWindows::RelativeWindows(const Tensor& q, int64_t window, double scale, bool may_pair)
    : B(q.size(0)),
      H(q.size(1)),
      W(q.size(2)),
      heads(q.size(3)),
      D(q.size(4)),
      height(window > 0 ? window : std::max<int64_t>(1, H)),
      width(window > 0 ? window : std::max<int64_t>(1, W)),
      rows(ceil_div(H, height)),
      columns(ceil_div(W, width)),
      n(height * width),
      scale(static_cast<float>(scale)),
      dtype(dtype_of(q, kOp)),
      pairs(may_pair && dtype == DType::bf16 && pair_kernel() != nullptr) {}

OnMap RelativeWindows::on_map(int64_t index) const {
  const int64_t top = index / columns * height, left = index % columns * width;
  return {top, left, std::min(height, H - top), std::min(width, W - left)};
}

void RelativeWindows::read_queries(float* rows, const Tensor& x, int64_t b, int64_t h, const OnMap& at, int64_t first,
                                   int lanes) const {
  std::fill_n(rows + lanes * D, (kCols - lanes) * D, 0.f);
  for_runs(at, first, lanes, [&](int lane, int run, int64_t row, int64_t column) {
    read_run(rows + lane * D, x, b, h, at.top + row, at.left + column, run, D, count() == 1);
  });
}

void RelativeWindows::read_keys(float* rows, const Tensor& x, const float* pad, int64_t b, int64_t h, const OnMap& at,
                                int64_t first, int64_t tokens) const {
  for (int64_t i = 0; i < tokens;) {
    const int64_t row = (first + i) / width, column = (first + i) % width, run = std::min(tokens - i, width - column);
    const int64_t on = row < at.height ? std::clamp<int64_t>(at.width - column, 0, run) : 0;
    if (on > 0) read_run(rows + i * D, x, b, h, at.top + row, at.left + column, on, D, count() == 1);
    for (int64_t j = i + on; j < i + run; ++j) std::copy_n(pad, D, rows + j * D);
    i += run;
  }
}

int64_t keys_size(const RelativeWindows& w) { return w.n * w.words(w.D) + kLanes; }
int64_t values_size(const RelativeWindows& w) { return w.words(w.n) * w.D + kLanes; }

void pack_keys(float* keys, const RelativeWindows& w, const Tensor& k, const float* pad, int64_t b, int64_t h,
               const OnMap& at, float* staged) {
  const int64_t height = kernel().rows;
  for (int64_t first = 0; first < w.n; first += kChunk) {
    const int64_t tokens = std::min(kChunk, w.n - first);
    w.read_keys(staged, k, pad, b, h, at, first, tokens);
    for (int64_t j = 0; j < tokens; j += height) {
      const int rows = static_cast<int>(std::min(height, tokens - j));
      pack(keys + (first + j) * w.words(w.D), rows, rows, w.D, {staged + j * w.D, DType::f32, w.D, 1}, w.pairs);
    }
  }
}

void pack_values(float* values, const RelativeWindows& w, const Tensor& v, const float* pad, int64_t b, int64_t h,
                 const OnMap& at, float* staged) {
  const int64_t panels = value_panels(w.D);
  for (int64_t first = 0; first < w.n; first += kChunk) {
    const int64_t tokens = std::min(kChunk, w.n - first);
    w.read_keys(staged, v, pad, b, h, at, first, tokens);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t channel = w.D * p / panels;
      const int rows = static_cast<int>(w.D * (p + 1) / panels - channel);
      pack(values, rows, rows, tokens, {staged + channel, DType::f32, 1, w.D}, w.pairs);
      values += rows * w.words(tokens);
    }
  }
}

void read_pad(float* dst, const Tensor& pad, int64_t b, int64_t h, int64_t D) {
  read_row(dst, matrix(pad, 0, 2, kOp).offset(b * pad.stride(0) + h * pad.stride(1)), D);
}

RelativeTable::RelativeTable(const RelativeWindows& w, const Tensor& table, int64_t size)
    : size_(size),
      rows_(2 * size - 1),
      panels_(ceil_div(rows_, kernel().rows)),
      words_(w.words(w.D)),
      pairs_(w.pairs),
      packed_(panels_ * kernel().rows * words_ + kLanes) {
  const int64_t height = kernel().rows;
  for (int64_t r = 0; r < rows_; r += height)
    pack(packed_.data() + r * words_, kernel().rows, static_cast<int>(std::min(height, rows_ - r)), w.D,
         matrix(table, 0, 1, kOp).at(r, 0), pairs_);
}

void RelativeTable::bias(float* bias, const float* queries, const int64_t* at, float* scratch) const {
  alignas(64) static const float zeros[kCols] = {};
  const Kernel& tile = pairs_ ? *pair_kernel() : kernel();
  const auto [least, most] = std::minmax_element(at, at + kCols);
  const int64_t base = *least / tile.rows * tile.rows;
  for (int64_t r = base; r < *most + size_; r += tile.rows)
    tile(static_cast<int>(std::min<int64_t>(tile.rows, rows_ - r)), kCols, words_, packed_.data() + r * words_, queries,
         kCols, zeros, 0, scratch + (r - base) * kCols, kCols);
  const float* from[kCols];
  for (int lane = 0; lane < kCols; ++lane) from[lane] = scratch + (at[lane] + size_ - 1 - base) * kCols + lane;
  for (int64_t j = 0; j < size_; ++j)
    for (int lane = 0; lane < kCols; ++lane) bias[j * kCols + lane] = from[lane][-j * kCols];
}

}  // namespace fastcss::cpu
