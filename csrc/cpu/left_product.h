// Multiplies by a left operand that is read in place, because it was made a moment ago: staged rows, a block of scores.
#pragma once

#include "gemm.h"

namespace fastcss::cpu {

// c [M][ldc] = a · b, or with `add` c += a · b, over k words and kCols columns. Element (i, word) of a lies at
// a[i · row + word · step], where row or step is 1; b is [k][ldb].
struct Left {
  const float* data;
  int64_t row, step;
};
void left_product(int64_t M, int64_t k, Left a, const float* b, int64_t ldb, float* c, int64_t ldc, bool add);

}  // namespace fastcss::cpu
