// Computes attention with relative positions for one panel of queries and some of its keys. Queries are on the SIMD
// lanes, so that each lane has its own running softmax, and the two parts of the bias are two vectors for a key: one of
// its row, one of its column.
#pragma once

#include "gemm.h"

namespace fastcss::cpu {

constexpr int64_t kChunk = 132;  // keys whose scores stay in the first-level cache: whole panels of any kernel().rows

// The keys and values of a window and head as the tiles read them. A word is one float32 term, or a pair of bfloat16.
struct PackedKeys {
  int64_t n, D;
  int64_t columns;  // of the window: key j is in its row j / columns
  bool pairs;
  const float* keys;    // panels of kernel().rows keys, [panel][word of D][rows]
  const float* values;  // [chunk of keys][panel of channels][word of the chunk][channels]

  int64_t words(int64_t terms) const { return pairs ? (terms + 1) / 2 : terms; }
  int64_t chunks() const { return (n + kChunk - 1) / kChunk; }
  int64_t in_chunk(int64_t chunk) const { return n - chunk * kChunk < kChunk ? n - chunk * kChunk : kChunk; }
  const float* panel(int64_t key) const { return keys + key * words(D); }
  const float* value_panel(int64_t chunk, int64_t channel) const {
    return values + words(chunk * kChunk) * D + words(in_chunk(chunk)) * channel;
  }
};
// How many panels of about equal height the channels have; panel p starts at channel D · p / panels.
int64_t value_panels(int64_t D);

// Up to kCols queries, and what they have attended to so far.
struct QueryPanel {
  int lanes;
  const float* queries;          // [word of D][kCols]
  const float *bias_h, *bias_w;  // [rows of the window][kCols], [columns][kCols]
  float* out;                    // Σ weight · value [D][kCols]
  float *most, *sum;             // of the scores and of the weights [kCols]; weights are e^(score − most)
};

// Goes on with a chunk of the keys. `scores` has room for kChunk · kCols floats.
void attend(const PackedKeys& keys, int64_t chunk, const QueryPanel& panel, float scale, float* scores);

// ---- the backward pass, which has no pairs -------------------------------------------------------------------------

// weights [key of the chunk][kCols] = e^(score − most) once more; the panel's sum += those
void weigh_again(const PackedKeys& keys, int64_t chunk, const QueryPanel& panel, float scale, float* weights);
// dweights [key of the chunk][kCols] = values · dout, delta [kCols] += Σ weights · dweights. `values` are packed like
// keys, `dout` [D][kCols] like queries.
void weight_gradients(const PackedKeys& values, int64_t chunk, const float* dout, const float* weights, float* dweights,
                      float* delta);
// dscores = share · weights · (dweights − delta), in the place of dweights; each is added to dbias_h [rows][kCols] and
// dbias_w [columns][kCols].
void score_gradients(const PackedKeys& keys, int64_t chunk, const float* share, const float* delta,
                     const float* weights, float* dweights, float* dbias_h, float* dbias_w);
// out [D][kCols] += values · weights
void add_values(const PackedKeys& keys, int64_t chunk, const float* weights, float* out);

}  // namespace fastcss::cpu
