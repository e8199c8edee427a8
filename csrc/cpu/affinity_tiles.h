// Makes tiles of the affinity map and uses them in registers: S = K Qᵀ for a panel of keys by kCols queries, and what
// each op makes of S before it is stored. Queries are on the SIMD lanes, so that neither keys nor values need padding.
#pragma once

#include "gemm.h"

namespace fastcss::cpu {

// Σ softplus(x) over some keys for kCols queries, in pieces: softplus(x) = max(x, 0) + ln(1 + e^−|x|), and the
// factors of the logarithm are multiplied first. Units of x are log₂e.
struct Softplus {
  float twice_hinge[kCols];  // Σ x + |x|: NaN where x is −∞, as in torch's binary cross-entropy
  float excess[kCols];       // Π (1 + e^−|x|) − 1, exact where all factors are close to 1
};

#define FASTCSS_MAP_ARGS int64_t k, const float *a, const float *b, float factor

// A panel of keys by kCols queries; `a` is packed [k][rows of the kernel], `b` [k][kCols], and t = factor · S.
struct AffinityTiles {
  void (*tanh)(FASTCSS_MAP_ARGS, float* map, int64_t ld);        // map = tanh(s/2) of t = −s log₂e
  void (*tanh_pairs)(FASTCSS_MAP_ARGS, float* map, int64_t ld);  // the same, bfloat16 pairs of keys
  // slope = (1 − map²) · (a · b)
  void (*tanh_slope)(FASTCSS_MAP_ARGS, const float* map, float* slope, int64_t ld);
  // adds softplus(±t) of the first `keys` keys
  void (*softplus)(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels, int keys, Softplus* sum);
  // slope = d softplus(±t) / dt
  void (*softplus_slope)(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels, float* slope,
                         int64_t ld);
};

// Returns those of this CPU. Panels of keys are as high as kernel()'s; tanh_pairs exists if pair_kernel() does.
const AffinityTiles& affinity_tiles();

}  // namespace fastcss::cpu
