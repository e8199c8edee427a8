// Knows the windows of a map: which tokens each holds, and their scores with the softmax, keys by queries. Queries are
// on the SIMD lanes, so that each lane does its own softmax.
#pragma once

#include <vector>

#include "parallel.h"
#include "tensors.h"

namespace fastcss::cpu {

constexpr int64_t kPadding = -1;  // a token beyond the map

// Returns [B, H, W, heads, D] with its channels next to each other, and all tokens one stride apart.
Tensor with_tokens(const Tensor& x);
// Returns the tokens of one head as lanes.
Matrix head_of(const Tensor& x, int64_t b, int64_t h);
// Reads row (b, h) of pads [B, heads, D].
void read_padding(float* dst, const Tensor& pad, int64_t b, int64_t h, int64_t D);

struct Windows {
  Windows(const Tensor& q, const Tensor& bias, int64_t window, int64_t shift, double scale);

  int64_t B, H, W, heads, D;
  int64_t window, shift, rows, columns;  // of windows
  int64_t n;                             // tokens of a window
  int64_t panels;                        // of kCols queries
  int64_t width;                         // D in whole tiles of columns
  float scale;
  DType dtype;

  int64_t count() const { return rows * columns; }
  int64_t scores() const { return panels * n * kCols; }  // elements of a window's scores [panel][n][kCols]

  // Finds the places of a window's tokens in the map, kPadding for those beyond it.
  void tokens(int64_t index, int64_t* places) const;
  // The scores get two summands: the bias of a head, and a mask, -100 for tokens that only the shift has made
  // neighbours; the mask is nullptr for a window without such tokens.
  const float* bias(int64_t head) const { return bias_.data() + head * scores(); }
  const float* mask(int64_t index) const;

 private:
  std::vector<float> bias_, masks_;  // [heads or kinds][panel][n][kCols]
};

// Gathers one head's rows at `places` as [n][width]; tokens beyond the map get `padding` [D], or zeros if it is
// nullptr.
void gather_rows(float* dst, const Windows& windows, Matrix map, const int64_t* places, const float* padding);
void fetch_rows(const Windows& windows, Matrix map, const int64_t* places);  // into the cache
void scatter_rows(void* map, int64_t stride, const Windows& windows, const int64_t* places, const float* src);
// sum [width] += the rows [n][width] of the tokens beyond the map.
void sum_padding(float* sum, const Windows& windows, const int64_t* places, const float* rows);

// packed [panel][D][kCols] = rows [n][width] · factor, with zeros beyond them.
void pack_queries(float* packed, const Windows& windows, const float* rows, float factor);

// scores [panel][n][kCols] → e^(score + bias + mask − largest) of each query, and inverse [panel · kCols] of their sum.
void window_softmax(float* scores, const float* bias, const float* mask, int64_t n, int64_t panels, float* inverse);

// Multiplies each of rows [n][width] by its factor.
void scale_rows(float* rows, const float* factor, int64_t n, int64_t width);

// dscores = weights · inverse · (dweights − Σ over the keys of weights · inverse · dweights), and weights *= inverse
void window_softmax_backward(float* weights, float* dweights, const float* inverse, int64_t n, int64_t panels);

}  // namespace fastcss::cpu
