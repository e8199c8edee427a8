// Computes the two softmaxes of one block of logits: kTokens image tokens by the text in panels of kCols lanes,
// [panel][kTokens][kCols]. The image side's is within a row; the text side's goes on from block to block in each lane.
#pragma once

#include <cstdint>

namespace fastcss::cpu {

constexpr int64_t kTokens = 48;     // image tokens of a block
constexpr float kLeast = -50000.f;  // the least that logit − largest logit may be

// The largest and the least logit, and whether one was not a number.
struct Extent {
  float most = -__builtin_inff(), least = __builtin_inff();
  bool nan = false;
};
// Extends it by the logits in the first `text` lanes.
void extend(Extent* extent, const float* logits, int tokens, int64_t text);

// A logit becomes max(logit − peak, least); NaN stays NaN.
struct Floor {
  float peak, least;
};
void lower(float* logits, int tokens, int64_t panels, Floor floor);

// Keeps of a softmax the largest logit that it reads, and the logarithm of Σ e^(logit − largest).
struct Stats {
  float largest, log_sum;
};

// weights = the softmax of each token's row, with 0 in the lanes where `hidden` [panels · kCols] is not 0; its
// `stats` [tokens].
void image_softmax(const float* logits, float* weights, int tokens, int64_t panels, const float* hidden, Stats* stats);

// weights = e^(logits − most), 0 for hidden tokens (nullptr: none is) and for those past `tokens`. `most` and `sum` of
// each lane are brought up to date; what was added up before must be multiplied by `factor`.
void text_weights(const float* logits, float* weights, int tokens, int64_t panels, const bool* hidden, float* most,
                  float* sum, float* factor);

// The gradient of a block takes the tokens' stats (`image`); the lanes' stats (`text_largest`, `text_log_sum`); and for
// each lane Σ gradient · result (`text_delta`).
struct BlockGradient {
  Floor floor;
  const Stats* image;
  const float *text_largest, *text_log_sum, *text_delta, *hidden_text;
  const bool* hidden_image;
};
// Takes the logits and the gradients of both weights, and overwrites all three: logits by their gradient, dimage by the
// image side's weights, dtext by the text side's.
void softmax_gradients(float* logits, float* dimage, float* dtext, int tokens, int64_t panels, const BlockGradient& g);

}  // namespace fastcss::cpu
