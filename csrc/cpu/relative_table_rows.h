// The gradients that pass through the bias of relative_attention: query · table[at − j + size − 1], for key j of a
// side.
#pragma once

#include <vector>

#include "relative_windows.h"

namespace fastcss::cpu {

// A panel of queries as rows.
struct QueryRows {
  const float* data;  // [kCols][width], zeros beyond D and beyond `lanes`
  int64_t width;
  int lanes;
};

// A table as rows of float32.
class TableRows {
 public:
  TableRows(const RelativeWindows& w, const Tensor& table, int64_t size);

  // Adds what dbias [size][kCols] gives to dq [D][kCols] and, unless it is nullptr, to dtable [2 size − 1][width].
  void add_gradients(QueryRows queries, const int64_t* at, const float* dbias, float* dq, float* dtable,
                     float* scratch) const;

  const RelativeTable packed;
  const int64_t size;

 private:
  void add_carefully(QueryRows queries, const int64_t* at, const float* dbias, float* dq, float* dtable) const;

  const int64_t D_;
  std::vector<float> rows_;  // [2 size − 1][D]
  bool finite_;
};

}  // namespace fastcss::cpu
