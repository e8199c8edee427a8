// Reads the operands of bi_attention and its backward pass by samples and heads, and cuts the image into chunks.
#pragma once

#include <optional>

#include "bi_attention_block.h"
#include "parallel.h"
#include "rows.h"
#include "tensors.h"

namespace fastcss::cpu {

// Image tokens of one item of work: its partial sums for the text do not depend on how many threads there are.
constexpr int64_t kChunk = 40 * kTokens;

struct Rows {
  const float* data;
  int64_t ld;
};
struct RowsOut {
  float* data;
  int64_t ld;
};

struct BiOperands {
  BiOperands(const Tensor& q, const Tensor& k, const Tensor& v_image, const Tensor& v_text,
             const std::optional<Tensor>& text_mask, const std::optional<Tensor>& image_mask);

  int64_t B, N, L, heads, D;
  int64_t width;   // D in whole tiles of columns
  int64_t panels;  // of the text
  int64_t chunks;  // of the image
  DType dtype;
  Tensor q, k, v_image, v_text;

  int64_t lanes() const { return panels * kCols; }
  bool whole() const { return dtype == DType::f32 && D == width; }
  int64_t block() const { return panels * kTokens * kCols; }  // elements of a block of logits

  // Packs the text of one head as [panel][D][kCols], times `factor`, with zeros beyond it.
  void pack_text(float* dst, const Tensor& x, int64_t b, int64_t h, float factor) const;
  // Copies the text of one head as [L][width], with zeros beyond the D of each row.
  void copy_rows(float* dst, const Tensor& x, int64_t b, int64_t h) const;
  // Returns rows of one head in place, if they are float32 and D fills whole tiles; else copies them to `buffer`
  // [rows][width], with zeros beyond the D of each row.
  Rows read_rows(float* buffer, const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t rows) const;
  // Returns where to make the rows of a contiguous result [B, ·, heads, D]: in place, or in `buffer` for write_rows.
  RowsOut result_rows(float* buffer, const Tensor& x, int64_t b, int64_t h, int64_t first) const {
    return whole() ? RowsOut{reinterpret_cast<float*>(row(x, b, h, first)), heads * D} : RowsOut{buffer, width};
  }
  void write_rows(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t rows, const float* src) const;

  void hidden_text(int64_t b, float* hidden) const;  // hidden [lanes]: 1 for a lane that is not read, else 0
  const bool* hidden_image(int64_t b) const { return image_mask_ ? flags(*image_mask_) + b * N : nullptr; }

 private:
  char* row(const Tensor& x, int64_t b, int64_t h, int64_t i) const;
  static const bool* flags(const Tensor& mask) { return static_cast<const bool*>(mask.const_data_ptr()); }
  std::optional<Tensor> text_mask_, image_mask_;
};

}  // namespace fastcss::cpu
