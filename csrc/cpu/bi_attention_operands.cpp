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

void BiOperands::read_rows(float* dst, const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t rows) const {
  for (int64_t i = 0; i < rows; ++i, dst += width) {
    read_row(dst, head(x, b, h).at(first + i, 0), D);
    std::fill(dst + D, dst + width, 0.f);
  }
}

void BiOperands::write_rows(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t rows,
                            const float* src) const {
  const int64_t tokens = x.numel() / (B * heads * D);
  char* dst = static_cast<char*>(x.mutable_data_ptr()) + ((b * tokens + first) * heads + h) * D * size_of(dtype);
  for (int64_t i = 0; i < rows; ++i, src += width, dst += heads * D * size_of(dtype)) write_row(dst, dtype, src, D);
}

void BiOperands::hidden_text(int64_t b, float* hidden) const {
  for (int64_t l = 0; l < lanes(); ++l) hidden[l] = l >= L || (text_mask_ && flags(*text_mask_)[b * L + l]);
}

}  // namespace fastcss::cpu
