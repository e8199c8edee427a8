#include "relative_windows.h"

#include "parallel.h"
#include "rows.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "relative_attention";

void fetch(Matrix row, int64_t D) {
  constexpr int64_t kLine = 64;
  for (int64_t byte = 0; byte < D * size_of(row.dtype); byte += kLine)
    __builtin_prefetch(static_cast<const char*>(row.data) + byte, 0, 2);
}

// Reads D terms of a row as they are packed.
void stage_row(char* dst, Matrix row, DType dtype, int64_t D) {
  if (row.dtype != dtype) return read_row(reinterpret_cast<float*>(dst), row, D);
  if (row.k_stride == 1 || D <= 1) {
    std::memcpy(dst, row.data, D * size_of(dtype));
    return;
  }
  for (int64_t d = 0; d < D; ++d) std::memcpy(dst + d * size_of(dtype), row.at(0, d).data, size_of(dtype));
}

}  // namespace

Tokens::Tokens(const Tensor& x)
    : first(matrix(x, 2, 4, kOp)), image(x.stride(0)), head(x.stride(3)), row(x.stride(1)) {}

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

void RelativeWindows::read_queries(float* rows, const Tokens& x, int64_t b, int64_t h, const OnMap& at, int64_t first,
                                   int lanes) const {
  constexpr int64_t kAhead = 8;  // tokens lie too far apart for the hardware to fetch the next
  const int64_t bytes = D * size_of(staged());
  char* to = reinterpret_cast<char*>(rows);
  std::memset(to + lanes * bytes, 0, (kCols - lanes) * bytes);
  for_runs(at, first, lanes, [&](int lane, int run, int64_t row, int64_t column) {
    const Matrix from = x.at(b, h, at.top + row, at.left + column);
    for (int i = 0; i < run; ++i) {
      if (count() == 1) cpu::fetch(from.at(i + kAhead, 0), D);
      stage_row(to + (lane + i) * bytes, from.at(i, 0), staged(), D);
    }
  });
}

void RelativeWindows::read_keys(float* rows, const Tokens& x, const Tensor& pad, int64_t b, int64_t h, const OnMap& at,
                                int64_t first, int64_t tokens) const {
  constexpr int64_t kAhead = 8;
  const int64_t bytes = D * size_of(staged());
  const Matrix beyond = matrix(pad, 0, 2, kOp).offset(b * pad.stride(0) + h * pad.stride(1));
  char* to = reinterpret_cast<char*>(rows);
  for (int64_t i = 0; i < tokens;) {
    const int64_t row = (first + i) / width, column = (first + i) % width, run = std::min(tokens - i, width - column);
    const int64_t on = row < at.height ? std::clamp<int64_t>(at.width - column, 0, run) : 0;
    if (on > 0) {
      const Matrix from = x.at(b, h, at.top + row, at.left + column);
      for (int64_t j = 0; j < on; ++j) {
        if (count() == 1) cpu::fetch(from.at(j + kAhead, 0), D);
        stage_row(to + (i + j) * bytes, from.at(j, 0), staged(), D);
      }
    }
    for (int64_t j = i + on; j < i + run; ++j) stage_row(to + j * bytes, beyond, staged(), D);
    i += run;
  }
}

void RelativeWindows::fetch(const Tokens& x, int64_t b, int64_t h, const OnMap& at, int64_t part, int64_t parts) const {
  const int64_t last = at.tokens() * (part + 1) / parts;
  for (int64_t i = at.tokens() * part / parts; i < last;) {
    const int64_t run = std::min(last - i, at.width - i % at.width);
    const Matrix from = x.at(b, h, at.top + i / at.width, at.left + i % at.width);
    for (int64_t j = 0; j < run; ++j) cpu::fetch(from.at(j, 0), D);
    i += run;
  }
}

int64_t keys_size(const RelativeWindows& w) { return w.n * w.words(w.D) + kLanes; }
int64_t values_size(const RelativeWindows& w) { return w.words(w.n) * w.D + kLanes; }

void pack_keys(float* keys, const RelativeWindows& w, const Tokens& k, const Tensor& pad, int64_t b, int64_t h,
               const OnMap& at, float* staged) {
  const int64_t height = kernel().rows;
  for (int64_t first = 0; first < w.n; first += kChunk) {
    const int64_t tokens = std::min(kChunk, w.n - first);
    w.read_keys(staged, k, pad, b, h, at, first, tokens);
    for (int64_t j = 0; j < tokens; j += height) {
      const int rows = static_cast<int>(std::min(height, tokens - j));
      pack(keys + (first + j) * w.words(w.D), rows, rows, w.D, Matrix{staged, w.staged(), w.D, 1}.at(j, 0), w.pairs);
    }
  }
}

void pack_values(float* values, const RelativeWindows& w, const Tokens& v, const Tensor& pad, int64_t b, int64_t h,
                 const OnMap& at, float* staged) {
  const int64_t panels = value_panels(w.D);
  for (int64_t first = 0; first < w.n; first += kChunk) {
    const int64_t tokens = std::min(kChunk, w.n - first);
    w.read_keys(staged, v, pad, b, h, at, first, tokens);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t channel = w.D * p / panels;
      const int rows = static_cast<int>(w.D * (p + 1) / panels - channel);
      // Whole vectors are read: what the lanes beyond a panel hold, its next word overwrites.
      pack(values, rows, kLanes, tokens, Matrix{staged, w.staged(), 1, w.D}.at(channel, 0), w.pairs);
      values += rows * w.words(tokens);
    }
  }
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
