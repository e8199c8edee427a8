// Computes the gradients through an affinity map: ds of a tile of the map, and at once dq += ds · k and dk += dsᵀ · q,
// and dv += T · e for affinity_attention. A tile is made once, and every product is taken of it while it is in cache.
#pragma once

#include "affinity_tiles.h"
#include "parallel.h"

namespace fastcss::cpu {

// One image of N pixels. All matrices are seen as lanes (pixels) by terms.
struct AffinityGradientProblem {
  int64_t N, K;
  float scale;  // s = scale · q · k
  Matrix q, k;
  float ds_factor;  // of dq and dk

  // The loss: ds is the slope of the pair's softplus. [N] labels, readable up to N + kCols.
  const int32_t* labels = nullptr;

  // Attention: T = tanh(½ s), ds = (1 − T²) · (e · v) up to ds_factor, e = half · (dintra − dinter), and
  // dv = T · e + Σ half · (dintra + dinter).
  int64_t C = 0;
  Matrix v = {}, dintra = {}, dinter = {};
  float half = 0;
};

class AffinityGradient : AffinityGradientProblem {
 public:
  explicit AffinityGradient(const AffinityGradientProblem& problem) : AffinityGradientProblem(problem) {}

  struct Products {  // contiguous [N, K]
    void *dq, *dk;
    DType dtype;
  };
  struct Values {  // contiguous [N, C]
    void* dv;
    DType dtype;
  };
  void run(Products products, Values values = {});

 private:
  static constexpr int64_t kKeys = 96, kQueries = 128;  // of a tile: multiples of every panel height, and of kCols

  void plan();
  void pack_all();
  void pack_e(int64_t panel);
  void block(int64_t queries, int64_t keys) const;
  void products(int64_t first_query, int64_t queries, int64_t first_key, int64_t keys, const float* map,
                const float* ds) const;
  void write_all(Products products, Values values);

  const Kernel& tile = kernel();
  const int height = tile.rows;
  int64_t query_panels, key_panels, blocks;
  // Panels of kCols queries or of `height` keys, and of kCols or `height` terms of those.
  int64_t q_size, e_size, k_size, v_size, rows, query_words, key_words;
  float *q_panels, *k_panels, *v_panels, *e_panels;  // terms after terms, pixels side by side
  float *q_words, *k_words, *e_words;                // pixel after pixel, terms side by side
  float *dq, *dk, *dv, *totals;
};

}  // namespace fastcss::cpu
