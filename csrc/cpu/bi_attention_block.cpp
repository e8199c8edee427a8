#include "bi_attention_block.h"

#include <cmath>

#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr float kInf = __builtin_inff();
constexpr int64_t kPanel = kTokens * kCols;

// Where in a token's row, or in a panel's first row, a lane lies.
FASTCSS_INLINE int64_t at(int64_t lane) { return lane / kCols * kPanel + lane % kCols; }

FASTCSS_INLINE float largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}
FASTCSS_INLINE float total(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

}  // namespace

FASTCSS_CLONES void extend(Extent* extent, const float* logits, int tokens, int64_t text) {
  const Bits lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec most = extent->most - Vec{}, least = extent->least - Vec{}, nan = {};
  for (int64_t first = 0; first < text; first += kLanes)
    for (int i = 0; i < tokens; ++i) {
      // A lane beyond the text counts as what has been seen.
      const Vec read = load(logits + at(first) + i * kCols);
      const Vec s = lane < static_cast<uint32_t>(text - first) ? read : most;
      const Vec low = lane < static_cast<uint32_t>(text - first) ? read : least;
      most = s > most ? s : most;
      least = low < least ? low : least;
      nan = s == s ? nan : s;
    }
  extent->most = largest(most), extent->least = -largest(-least);
  extent->nan |= std::isnan(total(nan));
}

FASTCSS_CLONES void lower(float* logits, int tokens, int64_t panels, Floor floor) {
  for (int64_t j = 0; j < panels; ++j)
    for (int64_t i = 0; i < tokens * kCols; i += kLanes) {
      const Vec t = load(logits + j * kPanel + i) - floor.peak;
      store(logits + j * kPanel + i, t < floor.least ? floor.least - Vec{} : t);
    }
}

FASTCSS_CLONES void image_softmax(const float* logits, float* weights, int tokens, int64_t panels, const float* hidden,
                                  Stats* stats) {
  const int64_t lanes = panels * kCols;
  for (int i = 0; i < tokens; ++i) {
    const float* row = logits + i * kCols;
    float* out = weights + i * kCols;
    Vec most = -kInf - Vec{};
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const Vec t = load(row + at(lane)), off = load(hidden + lane);
      const Vec seen = off != 0.f ? -kInf - Vec{} : t;
      most = seen > most ? seen : most;
    }
    const float peak = largest(most);
    Vec sum = {};
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const Vec t = load(row + at(lane)), off = load(hidden + lane);
      const Vec e = exp_negative((off != 0.f ? -kInf - Vec{} : t) - peak);
      store(out + at(lane), e);
      sum += e;
    }
    const float all = total(sum), share = 1.f / all;
    for (int64_t lane = 0; lane < lanes; lane += kLanes) store(out + at(lane), load(out + at(lane)) * share);
    stats[i] = {peak, std::log(all)};
  }
}

FASTCSS_CLONES void text_weights(const float* logits, float* weights, int tokens, int64_t panels, const bool* hidden,
                                 float* most, float* sum, float* factor) {
  for (int64_t lane = 0; lane < panels * kCols; lane += kLanes) {
    const float* read = logits + at(lane);
    float* out = weights + at(lane);
    const Vec before = load(most + lane);
    Vec now = before;
    for (int i = 0; i < tokens; ++i) {
      if (hidden != nullptr && hidden[i]) continue;
      const Vec t = load(read + i * kCols);
      now = t > now ? t : now;
    }
    const Vec finite = now == -kInf ? Vec{} : now;
    Vec added = {};
    for (int i = 0; i < kTokens; ++i) {
      const bool off = i >= tokens || (hidden != nullptr && hidden[i]);
      const Vec e = off ? Vec{} : exp_negative(load(read + i * kCols) - finite);
      store(out + i * kCols, e);
      added += e;
    }
    const Vec scale = exp_negative(before - finite);
    store(most + lane, now), store(factor + lane, scale);
    store(sum + lane, load(sum + lane) * scale + added);
  }
}

FASTCSS_CLONES void softmax_gradients(float* logits, float* dimage, float* dtext, int tokens, int64_t panels,
                                      const BlockGradient& g) {
  const int64_t lanes = panels * kCols;
  for (int i = 0; i < tokens; ++i) {
    float *row = logits + i * kCols, *from_image = dimage + i * kCols, *from_text = dtext + i * kCols;
    const Stats image = g.image[i];
    Vec delta = {};
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const Vec t = load(row + at(lane)) - g.floor.peak, off = load(g.hidden_text + lane);
      const Vec raised = t < g.floor.least ? g.floor.least - Vec{} : t;
      const Vec weight = exp_negative(((off != 0.f ? -kInf - Vec{} : raised) - image.largest) - image.log_sum);
      delta += off != 0.f ? Vec{} : weight * load(from_image + at(lane));
      store(row + at(lane), t);
    }
    const float sum = total(delta), off_image = g.hidden_image != nullptr && g.hidden_image[i] ? -kInf : 0.f;
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const Vec t = load(row + at(lane)), off = load(g.hidden_text + lane);
      const Vec raised = t < g.floor.least ? g.floor.least - Vec{} : t;
      const Vec of_image = exp_negative(((off != 0.f ? -kInf - Vec{} : raised) - image.largest) - image.log_sum);
      const Vec of_text =
          exp_negative(((raised + off_image) - load(g.text_largest + lane)) - load(g.text_log_sum + lane));
      Vec ds = off != 0.f ? Vec{} : of_image * (load(from_image + at(lane)) - sum);
      if (off_image == 0.f) ds += of_text * (load(from_text + at(lane)) - load(g.text_delta + lane));
      store(row + at(lane), t >= g.floor.least ? ds : Vec{});
      store(from_image + at(lane), of_image);
      store(from_text + at(lane), of_text);
    }
  }
}

}  // namespace fastcss::cpu
