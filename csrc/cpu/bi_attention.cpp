// fastcss::bi_attention.cpu: one sweep over the image makes each logit once, and takes both softmaxes of it while it is
// in cache. The published model raises logits to a floor below the largest one. Only after the sweep is it known
// whether any logit is that low, and the samples where one is are swept again with the floor.

#include <cmath>
#include <tuple>
#include <vector>

#include "bi_attention_operands.h"
#include "left_product.h"

namespace fastcss::cpu {
namespace {

constexpr float kInf = __builtin_inff();

struct Outputs {
  Tensor image, text;
  Stats *image_stats, *text_stats;
  Floor* floor;
};

class Sweeps {
 public:
  Sweeps(const BiOperands& in, const Outputs& out, float scale)
      : in_(in), out_(out), extents_(in.B * in.heads * in.chunks) {
    const int64_t pairs = in.B * in.heads;
    text_size_ = in.panels * in.D * kCols + in.lanes() * in.width;
    memory_ = shared_workspace.get(pairs * (text_size_ + in.chunks * partial_size()));
    parallel(pairs, [&](int64_t i) {
      in_.pack_text(keys(i), in_.k, i / in_.heads, i % in_.heads, scale);
      in_.copy_rows(values(i), in_.v_text, i / in_.heads, i % in_.heads);
    });
  }

  void run(int64_t group) {
    const int64_t each = in_.heads * in_.chunks;
    parallel(in_.B * each, [&](int64_t item) { sweep<false>(item); });
    for (int64_t b = 0; b < in_.B; b += group) {
      const int64_t samples = std::min(group, in_.B - b);
      if (settle(b, samples)) parallel(samples * each, [&](int64_t item) { sweep<true>(b * each + item); });
    }
    parallel(in_.B * in_.heads, [&](int64_t pair) { finish(pair); });
  }

 private:
  float* keys(int64_t pair) const { return memory_ + pair * text_size_; }                // [panel][D][kCols]
  float* values(int64_t pair) const { return keys(pair) + in_.panels * in_.D * kCols; }  // [L][width]

  // Each chunk of the image has its share of the text's results: Σ weight · value [L][width], and for each lane the
  // largest logit and the sum of the weights.
  int64_t partial_size() const { return in_.lanes() * (in_.width + 2); }
  float* partial(int64_t item) const { return memory_ + in_.B * in_.heads * text_size_ + item * partial_size(); }
  float* most(int64_t item) const { return partial(item) + in_.lanes() * in_.width; }
  float* sum(int64_t item) const { return most(item) + in_.lanes(); }

  // Finds the group's largest logit, and tells whether some logit is below the floor.
  bool settle(int64_t first, int64_t samples) {
    const int64_t each = in_.heads * in_.chunks;
    Extent all;
    for (int64_t i = first * each; i < (first + samples) * each; ++i) {
      all.most = std::max(all.most, extents_[i].most), all.least = std::min(all.least, extents_[i].least);
      all.nan |= extents_[i].nan;
    }
    const bool bites = all.nan || !(all.most - all.least <= -kLeast);
    for (int64_t b = first; b < first + samples; ++b) {
      out_.floor[b] = bites ? Floor{all.nan ? __builtin_nanf("") : all.most, kLeast} : Floor{0, -kInf};
    }
    return bites;
  }

  template <bool LOWER>
  void sweep(int64_t item);
  void finish(int64_t pair);

  const BiOperands& in_;
  const Outputs& out_;
  std::vector<Extent> extents_;
  int64_t text_size_;
  float* memory_;
};

template <bool LOWER>
void Sweeps::sweep(int64_t item) {
  const int64_t pair = item / in_.chunks, b = pair / in_.heads, h = pair % in_.heads, width = in_.width;
  const int64_t chunk = item % in_.chunks * kChunk, lanes = in_.lanes();
  float* logits = local_workspace.get(2 * in_.block() + 3 * kTokens * width + 2 * lanes);
  float *weights = logits + in_.block(), *q_buffer = weights + in_.block(), *v_buffer = q_buffer + kTokens * width;
  float *out_buffer = v_buffer + kTokens * width, *hidden = out_buffer + kTokens * width, *factor = hidden + lanes;
  in_.hidden_text(b, hidden);
  std::fill_n(partial(item), lanes * width, 0.f);
  std::fill_n(most(item), lanes, -kInf), std::fill_n(sum(item), lanes, 0.f);
  Extent extent;
  for (int64_t first = chunk; first < std::min(in_.N, chunk + kChunk); first += kTokens) {
    const int tokens = static_cast<int>(std::min(kTokens, in_.N - first));
    const auto text = [&](int64_t j) { return std::min<int64_t>(kCols, in_.L - j * kCols); };
    const Rows q = in_.read_rows(q_buffer, in_.q, b, h, first, tokens);
    const Rows v = in_.read_rows(v_buffer, in_.v_image, b, h, first, tokens);
    const RowsOut out = in_.result_rows(out_buffer, out_.image, b, h, first);
    for (int64_t j = 0; j < in_.panels; ++j)
      left_product(tokens, in_.D, {q.data, q.ld, 1}, keys(pair) + j * in_.D * kCols, kCols,
                   logits + j * kTokens * kCols, kCols, false);
    LOWER ? lower(logits, tokens, in_.panels, out_.floor[b]) : extend(&extent, logits, tokens, in_.L);

    image_softmax(logits, weights, tokens, in_.panels, hidden, out_.image_stats + pair * in_.N + first);
    for (int64_t c = 0; c < width; c += kCols)
      for (int64_t j = 0; j < in_.panels; ++j)
        left_product(tokens, text(j), {weights + j * kTokens * kCols, kCols, 1}, values(pair) + j * kCols * width + c,
                     width, out.data + c, out.ld, j > 0);
    if (out.data == out_buffer) in_.write_rows(out_.image, b, h, first, tokens, out_buffer);

    const bool* hidden_image = in_.hidden_image(b);
    text_weights(logits, weights, tokens, in_.panels, hidden_image ? hidden_image + first : nullptr, most(item),
                 sum(item), factor);
    for (int64_t l = 0; l < in_.L; ++l) {
      float* row = partial(item) + l * width;
      if (factor[l] != 1.f)
        for (int64_t d = 0; d < width; ++d) row[d] *= factor[l];
    }
    for (int64_t j = 0; j < in_.panels; ++j)
      for (int64_t c = 0; c < width; c += kCols)
        left_product(text(j), tokens, {weights + j * kTokens * kCols, 1, kCols}, v.data + c, v.ld,
                     partial(item) + j * kCols * width + c, width, true);
  }
  if (!LOWER) extents_[item] = extent;
}

// Adds up the chunks' sums, in their order.
void Sweeps::finish(int64_t pair) {
  const int64_t b = pair / in_.heads, h = pair % in_.heads, width = in_.width, first = pair * in_.chunks;
  std::vector<float> row(width);
  for (int64_t l = 0; l < in_.L; ++l) {
    float largest = -kInf, total = 0;
    for (int64_t i = first; i < first + in_.chunks; ++i) largest = std::max(largest, most(i)[l]);
    const float finite = largest == -kInf ? 0.f : largest;
    std::fill(row.begin(), row.end(), 0.f);
    for (int64_t i = first; i < first + in_.chunks; ++i) {
      const float factor = std::exp(most(i)[l] - finite);
      total += factor * sum(i)[l];
      add_scaled(row.data(), factor, partial(i) + l * width, width);
    }
    for (float& value : row) value /= total;
    in_.write_rows(out_.text, b, h, l, 1, row.data());
    out_.text_stats[pair * in_.L + l] = {largest, std::log(total)};
  }
}

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bi_attention(const Tensor& q, const Tensor& k, const Tensor& v_image,
                                                                const Tensor& v_text, const Optional& text_mask,
                                                                const Optional& image_mask, double scale,
                                                                int64_t group) {
  const BiOperands in(q, k, v_image, v_text, text_mask, image_mask);
  const auto result = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_empty(q, shape(sizes)); };
  const auto statistic = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_zeros(q, shape(sizes), ScalarType::Float);
  };
  Tensor image = result({in.B, in.N, in.heads * in.D}), text = result({in.B, in.L, in.heads * in.D});
  Tensor image_stats = statistic({in.B, in.heads, in.N, 2}), text_stats = statistic({in.B, in.heads, in.L, 2});
  Tensor floor = statistic({in.B, 2});
  if (in.N == 0 || in.L == 0 || in.D == 0) {  // nothing to read
    torch::stable::zero_(image), torch::stable::zero_(text);
  } else if (in.B > 0 && in.heads > 0) {
    const Outputs out{image, text, static_cast<Stats*>(image_stats.mutable_data_ptr()),
                      static_cast<Stats*>(text_stats.mutable_data_ptr()),
                      static_cast<Floor*>(floor.mutable_data_ptr())};
    Sweeps(in, out, static_cast<float>(scale)).run(group);
  }
  return {image, text, image_stats, text_stats, floor};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("bi_attention.cpu", FASTCSS_BOX(&fastcss::cpu::bi_attention)); }
