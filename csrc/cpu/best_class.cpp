#include "best_class.h"

#include "rows.h"

namespace fastcss::cpu {
namespace {

struct Best {
  float value[kCols];
  int32_t index[kCols];
};

// Of equal values the first stays; comparisons with NaN are false.
FASTCSS_CLONES void keep_best(const float* tile, int rows, const float* factors, const float* offsets, int32_t first,
                              bool nan_wins, Best& best) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kCols; ++j) {
      const float x = tile[i * kCols + j] * factors[i] + offsets[i];
      const bool better = (x > best.value[j]) | (nan_wins & (x != x));
      best.value[j] = better ? x : best.value[j];
      best.index[j] = better ? first + i : best.index[j];
    }
}

}  // namespace

void BestClass::pack_classes(float* packed, Matrix classes) const {
  parallel(panels_, [&](int64_t p) {
    pack(packed + p * panel_size(), kernel_.rows, lanes(p), width_, classes.at(p * kernel_.rows, 0), pairs_);
  });
  std::fill_n(factors(packed), panels_ * kernel_.rows, 1.f);
  std::fill_n(offsets(packed), panels_ * kernel_.rows, 0.f);
}

void BestClass::normalise(float* packed) const {
  for (int64_t p = 0; p < panels_; ++p)
    inverse_lengths(packed + p * panel_size(), kernel_.rows, lanes(p), words_, pairs_,
                    factors(packed) + p * kernel_.rows);
}

void BestClass::run(float* packed, Matrix tokens, int64_t N, bool normalised, float* value, int32_t* index) const {
  alignas(64) static const float zeros[kCols] = {};
  parallel(ceil_div(N, kCols), [&](int64_t item) {
    const int64_t first = item * kCols;
    const int count = static_cast<int>(std::min<int64_t>(kCols, N - first));
    float* columns = local_workspace.get(words_ * kCols + kLanes);
    pack(columns, kCols, count, width_, tokens.at(first, 0), pairs_);
    Best best;
    std::fill_n(best.value, kCols, -__builtin_inff());
    std::fill_n(best.index, kCols, 0);
    for (int64_t p = 0; p < panels_; ++p) {
      alignas(64) float tile[kMaxRows * kCols];
      kernel_(lanes(p), kCols, words_, packed + p * panel_size(), columns, kCols, zeros, 0, tile, kCols);
      keep_best(tile, lanes(p), factors(packed) + p * kernel_.rows, offsets(packed) + p * kernel_.rows,
                static_cast<int32_t>(p * kernel_.rows), nan_ == Nan::wins, best);
    }
    if (normalised) {
      float inverse[kCols];
      inverse_lengths(columns, kCols, count, words_, pairs_, inverse);
      for (int j = 0; j < count; ++j) best.value[j] *= inverse[j];
    }
    std::copy_n(best.value, count, value + first);
    if (index) std::copy_n(best.index, count, index + first);
  });
}

}  // namespace fastcss::cpu
