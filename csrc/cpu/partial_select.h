// The k largest of many values, in order.
#pragma once

#include <cstdint>

namespace fastcss::cpu {

// index[0 … k) of the k ≤ n largest, the largest first: NaN above all numbers, equal values by lower index.
void select_top(const float* values, int64_t n, int64_t k, int64_t* index);

}  // namespace fastcss::cpu
