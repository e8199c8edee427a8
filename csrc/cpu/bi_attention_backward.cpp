// fastcss::bi_attention_backward.cpu: one sweep makes each logit again, with the gradients of both of its weights.

#include <tuple>

#include "bi_attention_operands.h"
#include "left_product.h"

namespace fastcss::cpu {
namespace {

using Optional = std::optional<Tensor>;

struct Saved {
  Tensor dimage, dtext, text;  // [B, ·, heads, D]
  const Stats *image, *of_text;
  const Floor* floor;
};
struct Gradients {
  Tensor dq, dk, dv_image, dv_text;
};

class Backward {
 public:
  Backward(const BiOperands& in, const Saved& saved, const Gradients& out, float scale)
      : in_(in), saved_(saved), out_(out), scale_(scale) {
    packed_ = in.panels * in.D * kCols, rows_ = in.lanes() * in.width;
    text_size_ = 3 * packed_ + 2 * rows_ + 3 * in.lanes();
    const int64_t pairs = in.B * in.heads;
    memory_ = shared_workspace.get(pairs * (text_size_ + in.chunks * 2 * rows_));
    parallel(pairs, [&](int64_t pair) { prepare(pair); });
  }

  void run() {
    parallel(in_.B * in_.heads * in_.chunks, [&](int64_t item) { sweep(item); });
    parallel(in_.B * in_.heads, [&](int64_t pair) { finish(pair); });
  }

 private:
  // Each sample and head (a pair) has its text packed: k · scale, v_text and dtext; then rows of k · scale and of
  // dtext; then for each lane Σ dtext · text and its stats.
  float* text(int64_t pair) const { return memory_ + pair * text_size_; }
  float* rows(int64_t pair) const { return text(pair) + 3 * packed_; }
  float* delta(int64_t pair) const { return rows(pair) + 2 * rows_; }
  // Each chunk has its share of dk / scale and of dv_text, [L][width] each.
  float* partial(int64_t item) const { return memory_ + in_.B * in_.heads * text_size_ + item * 2 * rows_; }

  void prepare(int64_t pair);
  void sweep(int64_t item);
  void finish(int64_t pair);

  const BiOperands& in_;
  const Saved& saved_;
  const Gradients& out_;
  float scale_;
  int64_t packed_, rows_, text_size_;
  float* memory_;
};

void Backward::prepare(int64_t pair) {
  const int64_t b = pair / in_.heads, h = pair % in_.heads, lanes = in_.lanes();
  in_.pack_text(text(pair), in_.k, b, h, scale_);
  in_.pack_text(text(pair) + packed_, in_.v_text, b, h, 1);
  in_.pack_text(text(pair) + 2 * packed_, saved_.dtext, b, h, 1);
  float *k = rows(pair), *dtext = k + rows_;
  in_.copy_rows(k, saved_.text, b, h);
  in_.copy_rows(dtext, saved_.dtext, b, h);
  std::fill_n(delta(pair), 3 * lanes, 0.f);
  for (int64_t l = 0; l < in_.L; ++l) {
    // This is summed in the same way as the gradients of the weights: both are equal if a text token reads only one
    // image token.
    alignas(64) float products[kCols];
    const float* lanes_of_dtext = text(pair) + 2 * packed_ + l / kCols * in_.D * kCols;
    left_product(1, in_.D, {k + l * in_.width, in_.width, 1}, lanes_of_dtext, kCols, products, kCols, false);
    delta(pair)[l] = products[l % kCols];
    const Stats stats = saved_.of_text[pair * in_.L + l];
    delta(pair)[lanes + l] = stats.largest, delta(pair)[2 * lanes + l] = stats.log_sum;
  }
  in_.copy_rows(k, in_.k, b, h);
  for (int64_t i = 0; i < in_.L * in_.width; ++i) k[i] *= scale_;
}

void Backward::sweep(int64_t item) {
  const int64_t pair = item / in_.chunks, b = pair / in_.heads, h = pair % in_.heads, width = in_.width;
  const int64_t chunk = item % in_.chunks * kChunk, block = in_.block(), staged = kTokens * width;
  float* maps = local_workspace.get(3 * block + 4 * staged + in_.lanes());  // logits, dimage's and dtext's weights
  float *buffers = maps + 3 * block, *out_buffer = buffers + 3 * staged, *hidden = out_buffer + staged;
  in_.hidden_text(b, hidden);
  std::fill_n(partial(item), 2 * rows_, 0.f);
  for (int64_t first = chunk; first < std::min(in_.N, chunk + kChunk); first += kTokens) {
    const int tokens = static_cast<int>(std::min(kTokens, in_.N - first));
    const auto length = [&](int64_t j) { return std::min<int64_t>(kCols, in_.L - j * kCols); };
    const Rows left[3] = {in_.read_rows(buffers, in_.q, b, h, first, tokens),
                          in_.read_rows(buffers + staged, saved_.dimage, b, h, first, tokens),
                          in_.read_rows(buffers + 2 * staged, in_.v_image, b, h, first, tokens)};
    for (int64_t i = 0; i < 3; ++i)
      for (int64_t j = 0; j < in_.panels; ++j)
        left_product(tokens, in_.D, {left[i].data, left[i].ld, 1}, text(pair) + i * packed_ + j * in_.D * kCols, kCols,
                     maps + i * block + j * kTokens * kCols, kCols, false);
    const bool* hidden_image = in_.hidden_image(b);
    softmax_gradients(
        maps, maps + block, maps + 2 * block, tokens, in_.panels,
        {saved_.floor[b], saved_.image + pair * in_.N + first, delta(pair) + in_.lanes(), delta(pair) + 2 * in_.lanes(),
         delta(pair), hidden, hidden_image ? hidden_image + first : nullptr});

    // dq = dS (k · scale), dv_image = P_text dtext; dk / scale += dSᵀ q, dv_text += P_imageᵀ dimage
    const Tensor* results[2] = {&out_.dq, &out_.dv_image};
    const float *of_token[2] = {maps, maps + 2 * block}, *of_text[2] = {maps, maps + block};
    for (int i = 0; i < 2; ++i) {
      const RowsOut out = in_.result_rows(out_buffer, *results[i], b, h, first);
      for (int64_t c = 0; c < width; c += kCols)
        for (int64_t j = 0; j < in_.panels; ++j) {
          left_product(tokens, length(j), {of_token[i] + j * kTokens * kCols, kCols, 1},
                       rows(pair) + i * rows_ + j * kCols * width + c, width, out.data + c, out.ld, j > 0);
          left_product(length(j), tokens, {of_text[i] + j * kTokens * kCols, 1, kCols}, left[i].data + c, left[i].ld,
                       partial(item) + i * rows_ + j * kCols * width + c, width, true);
        }
      if (out.data == out_buffer) in_.write_rows(*results[i], b, h, first, tokens, out_buffer);
    }
  }
}

void Backward::finish(int64_t pair) {
  const int64_t b = pair / in_.heads, h = pair % in_.heads, first = pair * in_.chunks;
  float* sum = partial(first);
  for (int64_t i = first + 1; i < first + in_.chunks; ++i) add(sum, partial(i), 2 * rows_);
  for (int64_t i = 0; i < rows_; ++i) sum[i] *= scale_;
  in_.write_rows(out_.dk, b, h, 0, in_.L, sum);
  in_.write_rows(out_.dv_text, b, h, 0, in_.L, sum + rows_);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bi_attention_backward(
    const Tensor& dimage, const Tensor& dtext, const Tensor& q, const Tensor& k, const Tensor& v_image,
    const Tensor& v_text, const Optional& text_mask, const Optional& image_mask, const Tensor& text,
    const Tensor& image_stats, const Tensor& text_stats, const Tensor& floor, double scale) {
  const BiOperands in(q, k, v_image, v_text, text_mask, image_mask);
  const auto like = [](const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); };
  const auto by_head = [&](const Tensor& x) {
    return torch::stable::view(torch::stable::contiguous(x), shape({in.B, x.size(1), in.heads, in.D}));
  };
  const Gradients out{like(q), like(k), like(v_image), like(v_text)};
  if (in.N == 0 || in.L == 0 || in.D == 0) {
    for (const Tensor& t : {out.dq, out.dk, out.dv_image, out.dv_text}) torch::stable::zero_(const_cast<Tensor&>(t));
  } else if (in.B > 0 && in.heads > 0) {
    const Tensor image = torch::stable::contiguous(image_stats), of_text = torch::stable::contiguous(text_stats);
    const Tensor floors = torch::stable::contiguous(floor);
    const Saved saved{by_head(dimage),
                      by_head(dtext),
                      by_head(text),
                      static_cast<const Stats*>(image.const_data_ptr()),
                      static_cast<const Stats*>(of_text.const_data_ptr()),
                      static_cast<const Floor*>(floors.const_data_ptr())};
    Backward(in, saved, out, static_cast<float>(scale)).run();
  }
  return {out.dq, out.dk, out.dv_image, out.dv_text};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("bi_attention_backward.cpu", FASTCSS_BOX(&fastcss::cpu::bi_attention_backward));
}
