// Σ_keys value[key] · tanh(½ s[key][query]) for blocks of queries: the forward pass of affinity_attention and
// class_affinity. The map exists as a tile of kMapKeys × kCols elements, which stays in the first-level cache.
#pragma once

#include "affinity_tiles.h"
#include "parallel.h"

namespace fastcss::cpu {

constexpr int64_t kMapKeys = 192;  // a multiple of every kernel's panel height

class AffinityGather {
 public:
  // N pixels, K terms of a product, C values per pixel; `scale` multiplies the products. Operands are pairs of bfloat16
  // if the CPU multiplies those.
  AffinityGather(int64_t N, int64_t K, int64_t C, float scale, DType dtype);

  // Floats of the packed operands of one image, which pack_* fill and gather reads.
  int64_t size() const { return key_panels * key_size + value_panels * value_size; }
  void pack_keys(float* packed, Matrix k) const;  // lanes: keys
  // Fills `total` [C], too, with Σ_keys values.
  void pack_values(float* packed, Matrix v, float* total) const;  // lanes: values
  // The values of `count` ≤ kCols keys from `key` on, as a tile [values of the panel][kCols].
  void put_values(float* packed, int64_t panel, int64_t key, int count, const float* tile) const;

  // Calls use(first query, queries, sums [C][kCols] with queries on the lanes, room for `extra` floats) for every
  // kCols queries. Each sum is made in the same order whatever the blocks are.
  template <class F>
  void gather(const float* packed, Matrix q, int64_t extra, const F& use) const {
    const int64_t panels = ceil_div(N, kCols), block = queries_at_once() / kCols;
    parallel(ceil_div(panels, block), [&](int64_t item) {
      const int64_t first = item * block, count = std::min(block, panels - first);
      float* q_packed = local_workspace.get(count * (q_size + sum_size()) + kMapKeys * kCols + extra);
      float* map = q_packed + count * q_size;
      float* sums = map + kMapKeys * kCols;
      sum_block(packed, q, first, count, q_packed, map, sums);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t query = (first + p) * kCols;
        use(query, static_cast<int>(std::min<int64_t>(kCols, N - query)), sums + p * sum_size(),
            sums + count * sum_size());
      }
    });
  }

  int64_t words(int64_t terms) const { return pairs ? ceil_div(terms, 2) : terms; }
  int64_t sum_size() const { return C * kCols; }

  const int64_t N, K, C;
  const bool pairs;
  const Kernel& wide = pairs ? *pair_kernel() : kernel();
  const int height = wide.rows;
  const int64_t value_panels = ceil_div(C, height);

 private:
  int64_t queries_at_once() const;
  void sum_block(const float* packed, Matrix q, int64_t first, int64_t count, float* q_packed, float* map,
                 float* sums) const;

  const float factor;  // s → −s log₂e
  const int64_t key_panels = ceil_div(N, height);
  // pack() writes up to kLanes floats past the end.
  const int64_t key_size = words(K) * height + kLanes, value_size = words(N) * height + kLanes;
  const int64_t q_size = words(K) * kCols + kLanes;
};

}  // namespace fastcss::cpu
