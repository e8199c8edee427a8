#include "bi_attention_operands.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "bi_attention";

std::optional<Tensor> contiguous(const std::optional<Tensor>& mask) {
  return mask ? std::optional<Tensor>(torch::stable::contiguous(*mask)) : std::nullopt;
}

// [tokens][D] of one head; its rows are the lanes.
Matrix head(const Tensor& x, int64_t b, int64_t h) {
  return matrix(x, 1, 3, kOp).offset(b * x.stride(0) + h * x.stride(2));
}

void copy(float* dst, int64_t width, Matrix m, int64_t rows, int64_t D) {
  for (int64_t i = 0; i < rows; ++i, dst += width) {
    read_row(dst, m.at(i, 0), D);
    std::fill(dst + D, dst + width, 0.f);
  }
}

}  // namespace

BiOperands::BiOperands(const Tensor& q, const Tensor& k, const Tensor& v_image, const Tensor& v_text,
                       const std::optional<Tensor>& text_mask, const std::optional<Tensor>& image_mask)
    : B(q.size(0)),
      N(q.size(1)),
      L(k.size(1)),
      heads(q.size(2)),
      D(q.size(3)),
      width(ceil_div(D, kCols) * kCols),
      panels(ceil_div(L, kCols)),
      chunks(ceil_div(N, kChunk)),
      dtype(dtype_of(q, kOp)),
      q(q),
      k(k),
      v_image(v_image),
      v_text(v_text),
      text_mask_(contiguous(text_mask)),
      image_mask_(contiguous(image_mask)) {}

void BiOperands::pack_text(float* dst, const Tensor& x, int64_t b, int64_t h, float factor) const {
  std::fill_n(dst, panels * D * kCols, 0.f);
  for (int64_t j = 0; j < panels; ++j) {
    const int lanes = static_cast<int>(std::min<int64_t>(kCols, L - j * kCols));
    pack(dst + j * D * kCols, kCols, lanes, D, head(x, b, h).at(j * kCols, 0));
  }
  if (factor != 1.f)
    for (int64_t i = 0; i < panels * D * kCols; ++i) dst[i] *= factor;
}

void BiOperands::copy_rows(float* dst, const Tensor& x, int64_t b, int64_t h) const {
  copy(dst, width, head(x, b, h), L, D);
}

Rows BiOperands::read_rows(float* buffer, const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t rows) const {
  const Matrix all = head(x, b, h);
  // Each row lies on another page: too far apart for the hardware to fetch the next block's rows ahead.
  for (int64_t i = 0; i < std::min(rows, x.size(1) - first - rows); ++i) {
    const char* ahead = static_cast<const char*>(all.at(first + rows + i, 0).data);
    for (int64_t byte = 0; byte < D * size_of(dtype); byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
  }
  if (whole() && all.k_stride == 1) return {static_cast<const float*>(all.at(first, 0).data), all.lane_stride};
  copy(buffer, width, all.at(first, 0), rows, D);
  return {buffer, width};
}

char* BiOperands::row(const Tensor& x, int64_t b, int64_t h, int64_t i) const {
  const int64_t tokens = x.numel() / (B * heads * D);
  return static_cast<char*>(x.mutable_data_ptr()) + ((b * tokens + i) * heads + h) * D * size_of(dtype);
}

void BiOperands::write_rows(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t rows,
                            const float* src) const {
  for (int64_t i = 0; i < rows; ++i) write_row(row(x, b, h, first + i), dtype, src + i * width, D);
}

void BiOperands::hidden_text(int64_t b, float* hidden) const {
  for (int64_t l = 0; l < lanes(); ++l) hidden[l] = l >= L || (text_mask_ && flags(*text_mask_)[b * L + l]);
}

}  // namespace fastcss::cpu
