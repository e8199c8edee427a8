#include "affinity_gather.h"

#include "vector_math.h"

namespace fastcss::cpu {
namespace {

// sum[i] += Σ_j rows[j][i] for rows of `width` ≤ kLanes floats. The last row may be read beyond its end.
void add_rows(double* sum, const float* rows, int width, int count, int64_t n) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int first = 0; first < count; first += kLanesIn<V>) {
      V part{};
      for (int64_t j = 0; j < n; ++j) part += load<V>(rows + j * width + first);
      for (int i = first; i < std::min(count, first + kLanesIn<V>); ++i) sum[i] += part[i - first];
    }
  });
}

}  // namespace

AffinityGather::AffinityGather(int64_t N, int64_t K, int64_t C, float scale, DType dtype)
    : N(N), K(K), C(C), pairs(dtype == DType::bf16 && pair_kernel() != nullptr), factor(-scale * kLog2e) {}

void AffinityGather::pack_keys(float* packed, Matrix k) const {
  parallel(key_panels, [&](int64_t p) {
    const int keys = static_cast<int>(std::min<int64_t>(height, N - p * height));
    pack(packed + p * key_size, height, keys, K, k.at(p * height, 0), pairs);
  });
}

void AffinityGather::pack_values(float* packed, Matrix v, float* total) const {
  packed += key_panels * key_size;
  parallel(value_panels, [&](int64_t p) {
    const int values = static_cast<int>(std::min<int64_t>(height, C - p * height));
    const Matrix from = v.at(p * height, 0);
    pack(packed + p * value_size, height, values, N, from, pairs);
    float block[kMapKeys * kMaxRows + kLanes];
    double sum[kMaxRows] = {};
    for (int64_t key = 0; key < N; key += kMapKeys) {
      const int64_t keys = std::min(kMapKeys, N - key);
      pack(block, height, values, keys, from.at(0, key));
      add_rows(sum, block, height, values, keys);
    }
    for (int i = 0; i < values; ++i) total[p * height + i] = static_cast<float>(sum[i]);
  });
}

void AffinityGather::put_values(float* packed, int64_t panel, int64_t key, int count, const float* tile) const {
  float block[kCols * kMaxRows + kLanes];
  const int values = static_cast<int>(std::min<int64_t>(height, C - panel * height));
  pack(block, height, values, count, {tile, DType::f32, kCols, 1}, pairs);
  float* to = packed + key_panels * key_size + panel * value_size + words(key) * height;
  std::memcpy(to, block, words(count) * height * sizeof(float));
}

// Returns so many queries that their sums take half of an L2 cache, or fewer if threads would have nothing to do.
int64_t AffinityGather::queries_at_once() const {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fit = std::max<int64_t>(1, (96 << 10) / (sum_size() + q_size));
  return kCols * std::clamp<int64_t>(ceil_div(N, kCols) / (4 * threads), 1, std::min<int64_t>(fit, 16));
}

void AffinityGather::sum_block(const float* packed, Matrix q, int64_t first, int64_t count, float* q_packed, float* map,
                               float* sums) const {
  const auto tanh = pairs ? affinity_tiles().tanh_pairs : affinity_tiles().tanh;
  const int64_t panel_words = words(height);
  for (int64_t p = 0; p < count; ++p) {
    const int64_t query = (first + p) * kCols;
    pack(q_packed + p * q_size, kCols, static_cast<int>(std::min<int64_t>(kCols, N - query)), K, q.at(query, 0), pairs);
  }
  std::fill_n(sums, count * sum_size(), 0.f);
  for (int64_t key = 0; key < N; key += kMapKeys) {
    const int64_t keys = std::min(kMapKeys, N - key), first_panel = key / height;
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t j = 0; j * height < keys; ++j)
        tanh(words(K), packed + (first_panel + j) * key_size, q_packed + p * q_size, factor,
             map + j * panel_words * kCols, kCols);
      if (pairs && keys % 2)  // the second half of the last word is no key: its tanh of 0 · ∞ would be NaN
        for (int64_t i = 0; i < kCols; ++i) reinterpret_cast<uint16_t*>(map + keys / 2 * kCols + i)[1] = 0;
      for (int64_t c = 0; c < value_panels; ++c) {
        const int values = static_cast<int>(std::min<int64_t>(height, C - c * height));
        const float* value = packed + key_panels * key_size + c * value_size + words(key) * height;
        float* sum = sums + p * sum_size() + c * height * kCols;
        wide(values, kCols, words(keys), value, map, kCols, sum, kCols, sum, kCols);
      }
    }
  }
}

}  // namespace fastcss::cpu
