// Knows the windows of a map, or the map as one window: where their tokens lie, how their keys and values are packed,
// and the two parts of the bias that the tables of relative positions give a panel of queries.
#pragma once

#include <vector>

#include "relative_tiles.h"
#include "tensors.h"

namespace fastcss::cpu {

// The part of a window that lies on the map, by its tokens' rows and columns.
struct OnMap {
  int64_t top, left, height, width;
  int64_t tokens() const { return height * width; }
};

// A tensor [B, H, W, heads, D], whose strides are asked for once.
struct Tokens {
  explicit Tokens(const Tensor& x);
  Matrix at(int64_t b, int64_t h, int64_t y, int64_t x) const {
    return first.offset(b * image + h * head + y * row).at(x, 0);
  }

  Matrix first;
  int64_t image, head, row;
};

struct RelativeWindows {
  // window 0 means that the map is the only one; pairs are used only if they may be.
  RelativeWindows(const Tensor& q, int64_t window, double scale, bool may_pair);

  int64_t B, H, W, heads, D;
  int64_t height, width;  // of a window
  int64_t rows, columns;  // of windows
  int64_t n;              // tokens of a window
  float scale;
  DType dtype;
  bool pairs;  // words are pairs of bfloat16

  int64_t count() const { return rows * columns; }
  OnMap on_map(int64_t index) const;
  int64_t words(int64_t terms) const { return pairs ? (terms + 1) / 2 : terms; }

  // Rows are read as they are packed: bfloat16 for pairs, else float32.
  DType staged() const { return pairs ? DType::bf16 : DType::f32; }
  // Floats for so many rows, and for what is read beyond the last by whole vectors.
  int64_t staged_size(int64_t rows) const { return rows * D + kLanes; }
  // Reads `lanes` queries of one head from the `first` of a window on, and zeros up to kCols: rows [kCols][D].
  void read_queries(float* rows, const Tokens& x, int64_t b, int64_t h, const OnMap& at, int64_t first,
                    int lanes) const;
  // Reads keys or values first … first + tokens − 1 of a window: rows [tokens][D]. Those beyond the map are row (b, h)
  // of `pad`.
  void read_keys(float* rows, const Tokens& x, const Tensor& pad, int64_t b, int64_t h, const OnMap& at, int64_t first,
                 int64_t tokens) const;
  // Fetches a share of a window's tokens of one head into the cache: part `part` of `parts`.
  void fetch(const Tokens& x, int64_t b, int64_t h, const OnMap& at, int64_t part, int64_t parts) const;
  // Calls f(lane, lanes, y, x) for each run of a panel's queries that are neighbours in a row of the map.
  template <class F>
  void for_runs(const OnMap& at, int64_t first, int lanes, const F& f) const;
};

// Pack all tokens of window `at` as PackedKeys has keys, or as it has values, into memory of keys_size or values_size
// floats. `staged` has room for staged_size(kChunk).
void pack_keys(float* keys, const RelativeWindows& w, const Tokens& k, const Tensor& pad, int64_t b, int64_t h,
               const OnMap& at, float* staged);
void pack_values(float* values, const RelativeWindows& w, const Tokens& v, const Tensor& pad, int64_t b, int64_t h,
                 const OnMap& at, float* staged);
int64_t keys_size(const RelativeWindows& w);
int64_t values_size(const RelativeWindows& w);

// A table [2 size − 1, D], of distances in rows or in columns of the window.
class RelativeTable {
 public:
  RelativeTable(const RelativeWindows& w, const Tensor& table, int64_t size);

  // bias [size][kCols] = queries · table[at − j + size − 1] for each j, where at [kCols] are the queries' own rows or
  // columns and `queries` is a packed panel. `scratch` has room for scratch_size() floats.
  void bias(float* bias, const float* queries, const int64_t* at, float* scratch) const;
  int64_t scratch_size() const { return (panels_ * kernel().rows + kLanes) * kCols; }
  int64_t size() const { return size_; }

 private:
  int64_t size_, rows_, panels_, words_;
  bool pairs_;
  std::vector<float> packed_;  // [panel][word of D][kernel().rows]
};

template <class F>
void RelativeWindows::for_runs(const OnMap& at, int64_t first, int lanes, const F& f) const {
  for (int lane = 0; lane < lanes;) {
    const int64_t y = (first + lane) / at.width, x = (first + lane) % at.width;
    const int run = static_cast<int>(std::min<int64_t>(lanes - lane, at.width - x));
    f(lane, run, y, x);
    lane += run;
  }
}

}  // namespace fastcss::cpu
