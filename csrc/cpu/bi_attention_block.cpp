#include "bi_attention_block.h"

#include <cmath>

#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr float kInf = __builtin_inff();
constexpr int64_t kPanel = kTokens * kCols;

// Returns where a lane lies in a token's row, or in a panel's first row.
FASTCSS_INLINE int64_t at(int64_t lane) { return lane / kCols * kPanel + lane % kCols; }

template <class V>
FASTCSS_INLINE float largest(V v) {
  float most = v[0];
  for (int i = 1; i < kLanesIn<V>; ++i) most = v[i] > most ? v[i] : most;
  return most;
}
template <class V>
FASTCSS_INLINE float total(V v) {
  float sum = 0;
  for (int i = 0; i < kLanesIn<V>; ++i) sum += v[i];
  return sum;
}

}  // namespace

void extend(Extent* extent, const float* logits, int tokens, int64_t text) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    const BitsOf<V> lane = lane_numbers<V>();
    V most = extent->most - V{}, least = extent->least - V{}, nan = {};
    for (int64_t first = 0; first < text; first += kLanesIn<V>)
      for (int i = 0; i < tokens; ++i) {
        // A lane beyond the text takes a value that was seen before, and so changes nothing.
        const V read = load<V>(logits + at(first) + i * kCols);
        const V s = lane < static_cast<uint32_t>(text - first) ? read : most;
        const V low = lane < static_cast<uint32_t>(text - first) ? read : least;
        most = s > most ? s : most;
        least = low < least ? low : least;
        nan = s == s ? nan : s;
      }
    extent->most = largest(most), extent->least = -largest(-least);
    extent->nan |= std::isnan(total(nan));
  });
}

void lower(float* logits, int tokens, int64_t panels, Floor floor) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int64_t j = 0; j < panels; ++j)
      for (int64_t i = 0; i < tokens * kCols; i += kLanesIn<V>) {
        const V t = load<V>(logits + j * kPanel + i) - floor.peak;
        store(logits + j * kPanel + i, t < floor.least ? floor.least - V{} : t);
      }
  });
}

void image_softmax(const float* logits, float* weights, int tokens, int64_t panels, const float* hidden, Stats* stats) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    const int64_t lanes = panels * kCols;
    for (int i = 0; i < tokens; ++i) {
      const float* row = logits + i * kCols;
      float* out = weights + i * kCols;
      V most = -kInf - V{};
      for (int64_t lane = 0; lane < lanes; lane += kLanesIn<V>) {
        const V t = load<V>(row + at(lane)), off = load<V>(hidden + lane);
        const V seen = off != 0.f ? -kInf - V{} : t;
        most = seen > most ? seen : most;
      }
      const float peak = largest(most);
      V sum = {};
      for (int64_t lane = 0; lane < lanes; lane += kLanesIn<V>) {
        const V t = load<V>(row + at(lane)), off = load<V>(hidden + lane);
        const V e = exp_negative((off != 0.f ? -kInf - V{} : t) - peak);
        store(out + at(lane), e);
        sum += e;
      }
      const float all = total(sum), share = 1.f / all;
      for (int64_t lane = 0; lane < lanes; lane += kLanesIn<V>) store(out + at(lane), load<V>(out + at(lane)) * share);
      stats[i] = {peak, std::log(all)};
    }
  });
}

void text_weights(const float* logits, float* weights, int tokens, int64_t panels, const bool* hidden, float* most,
                  float* sum, float* factor) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int64_t lane = 0; lane < panels * kCols; lane += kLanesIn<V>) {
      const float* read = logits + at(lane);
      float* out = weights + at(lane);
      const V before = load<V>(most + lane);
      V now = before;
      for (int i = 0; i < tokens; ++i) {
        if (hidden != nullptr && hidden[i]) continue;
        const V t = load<V>(read + i * kCols);
        now = t > now ? t : now;
      }
      const V finite = now == -kInf ? V{} : now;
      V added = {};
      for (int i = 0; i < kTokens; ++i) {
        const bool off = i >= tokens || (hidden != nullptr && hidden[i]);
        const V e = off ? V{} : exp_negative(load<V>(read + i * kCols) - finite);
        store(out + i * kCols, e);
        added += e;
      }
      const V scale = exp_negative(before - finite);
      store(most + lane, now), store(factor + lane, scale);
      store(sum + lane, load<V>(sum + lane) * scale + added);
    }
  });
}

void softmax_gradients(float* logits, float* dimage, float* dtext, int tokens, int64_t panels, const BlockGradient& g) {
  on_widest([=, &g]<class V>() FASTCSS_LOOP {
    const int64_t lanes = panels * kCols;
    for (int i = 0; i < tokens; ++i) {
      float *row = logits + i * kCols, *from_image = dimage + i * kCols, *from_text = dtext + i * kCols;
      const Stats image = g.image[i];
      V delta = {};
      for (int64_t lane = 0; lane < lanes; lane += kLanesIn<V>) {
        const V t = load<V>(row + at(lane)) - g.floor.peak, off = load<V>(g.hidden_text + lane);
        const V raised = t < g.floor.least ? g.floor.least - V{} : t;
        const V weight = exp_negative(((off != 0.f ? -kInf - V{} : raised) - image.largest) - image.log_sum);
        delta += off != 0.f ? V{} : weight * load<V>(from_image + at(lane));
        store(row + at(lane), t);
      }
      const float sum = total(delta), off_image = g.hidden_image != nullptr && g.hidden_image[i] ? -kInf : 0.f;
      for (int64_t lane = 0; lane < lanes; lane += kLanesIn<V>) {
        const V t = load<V>(row + at(lane)), off = load<V>(g.hidden_text + lane);
        const V raised = t < g.floor.least ? g.floor.least - V{} : t;
        const V of_image = exp_negative(((off != 0.f ? -kInf - V{} : raised) - image.largest) - image.log_sum);
        const V of_text =
            exp_negative(((raised + off_image) - load<V>(g.text_largest + lane)) - load<V>(g.text_log_sum + lane));
        V ds = off != 0.f ? V{} : of_image * (load<V>(from_image + at(lane)) - sum);
        if (off_image == 0.f) ds += of_text * (load<V>(from_text + at(lane)) - load<V>(g.text_delta + lane));
        store(row + at(lane), t >= g.floor.least ? ds : V{});
        store(from_image + at(lane), of_image);
        store(from_text + at(lane), of_text);
      }
    }
  });
}

}  // namespace fastcss::cpu
