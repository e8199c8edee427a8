// Finds the best class of every token, the largest of (class · token) · factor + offset over the classes, without
// storing the products.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace fastcss::cpu {

class BestClass {
 public:
  enum class Nan { wins, never_wins };

  BestClass(int64_t classes, int64_t width, bool pairs, Nan nan)
      : classes_(classes),
        width_(width),
        words_(pairs ? (width + 1) / 2 : width),
        pairs_(pairs),
        nan_(nan),
        kernel_(pairs ? *pair_kernel() : kernel()),
        panels_(ceil_div(classes, kernel_.rows)) {}

  // Floats of the packed classes with a factor and an offset for each.
  int64_t size() const { return panels_ * (panel_size() + 2 * kernel_.rows); }
  // Packs the classes with factor 1 and offset 0; lanes are classes.
  void pack_classes(float* packed, Matrix classes) const;
  float* factors(float* packed) const { return packed + panels_ * panel_size(); }
  float* offsets(float* packed) const { return factors(packed) + panels_ * kernel_.rows; }
  // Sets the factors to 1 / the lengths of the classes.
  void normalise(float* packed) const;

  // Records every class whose value reaches a threshold, be it the best or not. Bit c % 32 of word c / 32 in a token's
  // row of `bits` [N][words] tells; each panel of kCols tokens has the sum of such values and how many there are.
  struct Reached {
    int64_t words() const { return ceil_div(classes, 32); }
    int64_t classes;
    float threshold;
    uint32_t* bits;
    float *sums, *counts;  // [panels of tokens][classes]
  };

  // Writes value [N] and, if it is not null, index [N]; lanes are tokens. `normalised` divides value by the length of
  // the token, and so the values of `reached`, if that is not null.
  void run(float* packed, Matrix tokens, int64_t N, bool normalised, float* value, int32_t* index,
           const Reached* reached = nullptr) const;

 private:
  int64_t panel_size() const { return words_ * kernel_.rows + kLanes; }
  int lanes(int64_t p) const { return static_cast<int>(std::min<int64_t>(kernel_.rows, classes_ - p * kernel_.rows)); }

  const int64_t classes_, width_, words_;
  const bool pairs_;
  const Nan nan_;
  const Kernel& kernel_;
  const int64_t panels_;
};

}  // namespace fastcss::cpu
