#include "affinity_gradient.h"

#include "left_product.h"
#include "vector_math.h"

namespace fastcss::cpu {

void AffinityGradient::plan() {
  query_panels = ceil_div(N, kCols), key_panels = ceil_div(N, height);
  rows = key_panels * height;
  // The number of blocks is even, so that two threads share them. It depends on N alone, as the order of sums does on
  // it.
  blocks = N < 2 * kQueries ? 1 : 2 * ceil_div(N, 4 * kQueries);
  // pack() writes up to kLanes floats past the end.
  q_size = K * kCols + kLanes, e_size = C * kCols + kLanes;
  k_size = K * height + kLanes, v_size = C * height + kLanes;
  query_words = N * kCols + kLanes, key_words = N * height + kLanes;

  const int64_t k_cols = ceil_div(K, kCols), c_cols = ceil_div(C, kCols), k_rows = ceil_div(K, height);
  struct {
    float** start;
    int64_t floats;
  } parts[] = {{&q_panels, query_panels * q_size},
               {&k_panels, key_panels * k_size},
               {&v_panels, key_panels * v_size},
               {&e_panels, query_panels * e_size},
               {&q_words, k_cols * query_words},
               {&k_words, k_rows * key_words},
               {&e_words, c_cols * query_words},
               {&dq, query_panels * q_size},
               {&dk, k_cols * rows * kCols},
               {&dv, c_cols * rows * kCols},
               {&totals, query_panels * C + c_cols * kCols}};
  int64_t floats = 0;
  for (const auto& part : parts) floats += part.floats;
  float* next = shared_workspace.get(floats);
  for (const auto& part : parts) *part.start = next, next += part.floats;
}

// Packs e of kCols queries, in both orders, and sums their Σ half · (dintra + dinter).
void AffinityGradient::pack_e(int64_t panel) {
  const int64_t query = panel * kCols;
  const int queries = static_cast<int>(std::min<int64_t>(kCols, N - query));
  float *e = e_panels + panel * e_size, *other = local_workspace.get(e_size);
  pack(e, kCols, queries, C, dintra.at(query, 0));
  pack(other, kCols, queries, C, dinter.at(query, 0));
  for (int64_t c = 0; c < C; ++c) {
    float sum = 0;
    for (int i = 0; i < queries; ++i) {
      const float plus = e[c * kCols + i], minus = other[c * kCols + i];
      sum += half * (plus + minus);
      e[c * kCols + i] = half * (plus - minus);
    }
    totals[ceil_div(C, kCols) * kCols + panel * C + c] = sum;
  }
  for (int64_t c = 0; c < C; c += kCols) {
    float words[kCols * kCols + kLanes];
    const int values = static_cast<int>(std::min<int64_t>(kCols, C - c));
    pack(words, kCols, values, queries, {e + c * kCols, DType::f32, kCols, 1});
    std::memcpy(e_words + c / kCols * query_words + query * kCols, words, queries * kCols * sizeof(float));
  }
}

void AffinityGradient::pack_all() {
  const int64_t k_cols = ceil_div(K, kCols), k_rows = ceil_div(K, height), c_cols = ceil_div(C, kCols);
  const auto count = [](int64_t panel, int64_t width, int64_t of) {
    return static_cast<int>(std::min(width, of - panel * width));
  };
  const auto turned = [](Matrix m) { return Matrix{m.data, m.dtype, m.k_stride, m.lane_stride}; };
  parallel(query_panels, [&](int64_t p) {
    pack(q_panels + p * q_size, kCols, count(p, kCols, N), K, q.at(p * kCols, 0));
    std::fill_n(dq + p * q_size, q_size, 0.f);
    if (C > 0) pack_e(p);
  });
  parallel(key_panels, [&](int64_t p) {
    pack(k_panels + p * k_size, height, count(p, height, N), K, k.at(p * height, 0));
    if (C > 0) pack(v_panels + p * v_size, height, count(p, height, N), C, v.at(p * height, 0));
  });
  parallel(k_cols + k_rows, [&](int64_t i) {
    if (i < k_cols) return pack(q_words + i * query_words, kCols, count(i, kCols, K), N, turned(q).at(i * kCols, 0));
    const int64_t p = i - k_cols;
    pack(k_words + p * key_words, height, count(p, height, K), N, turned(k).at(p * height, 0));
  });
  std::fill_n(dk, k_cols * rows * kCols, 0.f);
  parallel(c_cols, [&](int64_t p) {  // dv starts from what every key gets
    for (int64_t c = p * kCols; c < std::min(C, (p + 1) * kCols); ++c) {
      double sum = 0;
      for (int64_t panel = 0; panel < query_panels; ++panel) sum += totals[c_cols * kCols + panel * C + c];
      totals[c] = static_cast<float>(sum);
    }
    for (int64_t key = 0; key < rows; ++key) std::copy_n(totals + p * kCols, kCols, dv + (p * rows + key) * kCols);
  });
}

// Computes the tiles of one block of queries by one block of keys.
void AffinityGradient::block(int64_t queries, int64_t keys) const {
  const int64_t query_end = (queries + 1) * query_panels / blocks, key_end = (keys + 1) * key_panels / blocks;
  const int64_t query_step = kQueries / kCols, key_step = kKeys / height;
  float *map = local_workspace.get(2 * kKeys * kQueries), *ds = map + kKeys * kQueries;
  const AffinityTiles& tiles = affinity_tiles();
  for (int64_t k0 = keys * key_panels / blocks; k0 < key_end; k0 += key_step)
    for (int64_t q0 = queries * query_panels / blocks; q0 < query_end; q0 += query_step) {
      const int64_t k_end = std::min(k0 + key_step, key_end), q_end = std::min(q0 + query_step, query_end);
      for (int64_t p = q0; p < q_end; ++p)
        for (int64_t j = k0; j < k_end; ++j) {
          const int64_t at = (j - k0) * height * kQueries + (p - q0) * kCols;
          const float *keys_at = k_panels + j * k_size, *queries_at = q_panels + p * q_size;
          if (labels) {
            tiles.softplus_slope(K, keys_at, queries_at, scale * kLog2e, labels + j * height, labels + p * kCols,
                                 ds + at, kQueries);
          } else {
            tiles.tanh(K, keys_at, queries_at, -scale * kLog2e, map + at, kQueries);
            tiles.tanh_slope(C, v_panels + j * v_size, e_panels + p * e_size, 1.f, map + at, ds + at, kQueries);
          }
        }
      products(q0, q_end, k0, k_end, map, ds);
    }
}

void AffinityGradient::products(int64_t q0, int64_t q_end, int64_t k0, int64_t k_end, const float* map,
                                const float* ds) const {
  const int64_t query = q0 * kCols, queries = std::min(q_end * kCols, N) - query;
  const int64_t key = k0 * height, keys = std::min(k_end * height, N) - key;
  const auto over_queries = [&](const float* left, const float* words, float* sums, int64_t terms) {
    for (int64_t c = 0; c * kCols < terms; ++c)
      left_product((k_end - k0) * height, queries, {left, kQueries, 1}, words + c * query_words + query * kCols, kCols,
                   sums + (c * rows + key) * kCols, kCols, true);
  };
  over_queries(map, e_words, dv, C);
  over_queries(ds, q_words, dk, K);
  for (int64_t p = q0; p < q_end; ++p)
    for (int64_t c = 0; c * height < K; ++c) {
      float* sum = dq + p * q_size + c * height * kCols;
      tile(static_cast<int>(std::min<int64_t>(height, K - c * height)), kCols, keys,
           k_words + c * key_words + key * height, ds + (p - q0) * kCols, kQueries, sum, kCols, sum, kCols);
    }
}

void AffinityGradient::write_all(Products products, Values values) {
  const auto at = [](void* to, DType dtype, int64_t element) {
    return static_cast<char*>(to) + element * size_of(dtype);
  };
  parallel(query_panels, [&](int64_t p) {
    const int64_t first = p * kCols;
    const int pixels = static_cast<int>(std::min<int64_t>(kCols, N - first));
    float* sums = dq + p * q_size;
    for (int64_t i = 0; i < K * kCols; ++i) sums[i] *= ds_factor;
    write_transposed(at(products.dq, products.dtype, first * K), products.dtype, K, pixels, K, sums);
    const auto write_rows = [&](void* to, DType dtype, const float* from, int64_t terms) {
      for (int64_t c = 0; c < terms; c += kCols)
        write(at(to, dtype, first * terms + c), dtype, terms, pixels,
              static_cast<int>(std::min<int64_t>(kCols, terms - c)), from + (c / kCols * rows + first) * kCols);
    };
    for (int64_t c = 0; c < K; c += kCols)
      for (int64_t i = 0; i < pixels * kCols; ++i) dk[(c / kCols * rows + first) * kCols + i] *= ds_factor;
    write_rows(products.dk, products.dtype, dk, K);
    write_rows(values.dv, values.dtype, dv, C);
  });
}

void AffinityGradient::run(Products products, Values values) {
  plan();
  pack_all();
  // Every block of queries meets another block of keys in each step. So no two threads add to the same sums, and each
  // sum is made in the same order on any number of threads.
  for (int64_t step = 0; step < blocks; ++step) parallel(blocks, [&](int64_t i) { block(i, (i + step) % blocks); });
  write_all(products, values);
}

}  // namespace fastcss::cpu
