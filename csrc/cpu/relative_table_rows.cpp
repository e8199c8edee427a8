#include "relative_table_rows.h"

#include <algorithm>

#include "left_product.h"
#include "rows.h"

namespace fastcss::cpu {
namespace {

bool is_finite(const float* x, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += 0 * x[i];
  return sum == 0;
}

}  // namespace

TableRows::TableRows(const RelativeWindows& w, const Tensor& table, int64_t size)
    : packed(w, table, size), size(size), D_(w.D), rows_((2 * size - 1) * w.D) {
  for (int64_t r = 0; r < 2 * size - 1; ++r)
    read_row(rows_.data() + r * D_, matrix(table, 0, 1, "relative_attention").at(r, 0), D_);
  finite_ = is_finite(rows_.data(), (2 * size - 1) * D_);
}

void TableRows::add_gradients(QueryRows queries, const int64_t* at, const float* dbias, float* dq, float* dtable,
                              float* scratch) const {
  const int64_t width = queries.width;
  if (!finite_ || !is_finite(queries.data, kCols * width)) return add_carefully(queries, at, dbias, dq, dtable);
  const auto [least, most] = std::minmax_element(at, at + kCols);
  const int64_t base = *least, rows = *most - base + size;
  std::fill_n(scratch, rows * kCols, 0.f);
  for (int64_t j = 0; j < size; ++j)
    for (int lane = 0; lane < queries.lanes; ++lane)
      scratch[(at[lane] - j + size - 1 - base) * kCols + lane] = dbias[j * kCols + lane];
  left_product(D_, rows, {rows_.data() + base * D_, 1, D_}, scratch, kCols, dq, kCols, true);
  for (int64_t c = 0; dtable && c < width; c += kCols)
    left_product(rows, queries.lanes, {scratch, kCols, 1}, queries.data + c, width, dtable + base * width + c, width,
                 true);
}

// Each query with its own rows of the table only: a zero times what is not finite is not zero.
void TableRows::add_carefully(QueryRows queries, const int64_t* at, const float* dbias, float* dq,
                              float* dtable) const {
  for (int lane = 0; lane < queries.lanes; ++lane)
    for (int64_t j = 0; j < size; ++j) {
      const int64_t r = at[lane] - j + size - 1;
      const float slope = dbias[j * kCols + lane];
      for (int64_t d = 0; d < D_; ++d) dq[d * kCols + lane] += slope * rows_[r * D_ + d];
      if (dtable) add_scaled(dtable + r * queries.width, slope, queries.data + lane * queries.width, D_);
    }
}

}  // namespace fastcss::cpu
