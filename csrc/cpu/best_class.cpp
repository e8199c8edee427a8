#include "best_class.h"

#include "rows.h"

namespace fastcss::cpu {
namespace {

struct Best {
  float value[kCols];
  int32_t index[kCols];
};

// Keeps the first of equal values; comparisons with NaN are false.
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

// Sums the lanes of two vectors by halves, always in the same order.
template <class V>
FASTCSS_INLINE Vec4 across(V x, V y) {
  if constexpr (kLanesIn<V> == 16) {
    constexpr auto half = [](V v) FASTCSS_LOOP {
      return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    };
    return across<Vec8>(half(x), half(y));
  } else if constexpr (kLanesIn<V> == 8) {
    constexpr auto half = [](V v) FASTCSS_LOOP {
      return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
    };
    return across<Vec4>(half(x), half(y));
  } else {
    const V pairs = __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
    return pairs + __builtin_shufflevector(pairs, pairs, 1, 0, 3, 2);  // x, x, y, y
  }
}

// Notes which of `rows` classes from `first` on reach the threshold in a panel of tokens: bits [words][kCols], and for
// each class a sum and a count. Lanes without a token have NaN for their length, and NaN reaches nothing.
void keep_reached(const float* tile, int rows, const float* factors, const float* offsets, const float* inverse,
                  float threshold, int64_t first, uint32_t* bits, float* sums, float* counts) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    constexpr int kWide = kLanesIn<V>, kVectors = kCols / kWide;
    BitsOf<V> kept[kVectors];  // the bits of one word, until its 32 classes are done
    uint32_t* word = bits + first / 32 * kCols;
    std::memcpy(kept, word, sizeof(kept));
    for (int i = 0; i < rows; ++i) {
      if (i > 0 && (first + i) % 32 == 0) {
        std::memcpy(word, kept, sizeof(kept));
        word += kCols;
        std::memset(kept, 0, sizeof(kept));
      }
      const BitsOf<V> bit = BitsOf<V>{} + (uint32_t{1} << (first + i) % 32);
      V sum = {}, count = {};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const V x = (load<V>(tile + i * kCols + v * kWide) * factors[i] + offsets[i]) * load<V>(inverse + v * kWide);
        const auto reaches = x >= threshold;
        kept[v] |= reaches ? bit : BitsOf<V>{};
        sum += reaches ? x : V{};
        count += reaches ? V{} + 1.f : V{};
      }
      const Vec4 total = across(sum, count);
      sums[i] = total[0], counts[i] = total[2];
    }
    std::memcpy(word, kept, sizeof(kept));
  });
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

void BestClass::run(float* packed, Matrix tokens, int64_t N, bool normalised, float* value, int32_t* index,
                    const Reached* reached) const {
  alignas(64) static const float zeros[kCols] = {};
  parallel(ceil_div(N, kCols), [&](int64_t item) {
    const int64_t first = item * kCols;
    const int count = static_cast<int>(std::min<int64_t>(kCols, N - first));
    const int64_t words = reached ? reached->words() : 0;
    float* columns = local_workspace.get(words_ * kCols + kLanes + words * kCols);
    uint32_t* bits = reinterpret_cast<uint32_t*>(columns + words_ * kCols + kLanes);
    std::fill_n(bits, words * kCols, 0);
    pack(columns, kCols, count, width_, tokens.at(first, 0), pairs_);
    float inverse[kCols];
    if (normalised) {
      std::fill_n(inverse, kCols, __builtin_nanf(""));
      inverse_lengths(columns, kCols, count, words_, pairs_, inverse);
    }
    Best best;
    std::fill_n(best.value, kCols, -__builtin_inff());
    std::fill_n(best.index, kCols, 0);
    for (int64_t p = 0; p < panels_; ++p) {
      alignas(64) float tile[kMaxRows * kCols];
      kernel_(lanes(p), kCols, words_, packed + p * panel_size(), columns, kCols, zeros, 0, tile, kCols);
      keep_best(tile, lanes(p), factors(packed) + p * kernel_.rows, offsets(packed) + p * kernel_.rows,
                static_cast<int32_t>(p * kernel_.rows), nan_ == Nan::wins, best);
      if (reached) {
        const int64_t to = item * classes_ + p * kernel_.rows;
        keep_reached(tile, lanes(p), factors(packed) + p * kernel_.rows, offsets(packed) + p * kernel_.rows, inverse,
                     reached->threshold, p * kernel_.rows, bits, reached->sums + to, reached->counts + to);
      }
    }
    if (normalised)
      for (int j = 0; j < count; ++j) best.value[j] *= inverse[j];
    for (int j = 0; j < count; ++j)
      for (int64_t w = 0; w < words; ++w) reached->bits[(first + j) * words + w] = bits[w * kCols + j];
    std::copy_n(best.value, count, value + first);
    if (index) std::copy_n(best.index, count, index + first);
  });
}

}  // namespace fastcss::cpu
