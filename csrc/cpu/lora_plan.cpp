// What LoraGemm knows before it computes: which adapters its slots have, where each slot's part lies in a panel's
// memory, and which rows of which slots a panel holds.
#include "lora_gemm.h"

namespace fastcss::cpu {

void LoraGemm::plan() {
  const int64_t total = fan == Fan::kEach ? slots * M : M;
  panels_a_slot = fan == Fan::kEach && M < height ? 0 : ceil_div(M, height);
  panels = fan == Fan::kEach && panels_a_slot ? slots * panels_a_slot : ceil_div(total, height);
  find_used();
  const bool stack = stacked && fan == Fan::kOut;
  int64_t columns = 0, factors = 0;
  for (int64_t s = 0; s < slots; ++s) {
    const Adapter& t = adapter[s];
    if (stack) row_scale.insert(row_scale.end(), t.rank, scale[s]);
    hidden_first.push_back(fan == Fan::kEach ? 0 : columns);
    factor_first.push_back(fan == Fan::kEach ? 0 : factors);
    columns = fan == Fan::kEach ? std::max(columns, t.rank) : columns + t.rank;
    factors = fan == Fan::kEach ? words_of(columns) : factors + words_of(t.rank);
    widest = std::max(widest, t.rank);
  }
  // pack() writes up to kLanes floats past the end.
  rows_size = words * height + kLanes;
  hidden_size = columns * height + (pairs ? height : 0);  // and a row of zeros for a widest rank that is odd
  factors_size = pairs ? factors * height + kLanes : 0;
}

// Lists the adapters that some slot has, by their first rows.
void LoraGemm::find_used() {
  std::vector<int64_t> order;
  for (int64_t s = 0; s < slots; ++s)
    if (adapter[s].rank) order.push_back(s);
  const auto rows_of = [&](int64_t s) { return std::pair(adapter[s].first, adapter[s].rank); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t s, int64_t t) { return rows_of(s) < rows_of(t); });
  used_of.assign(slots, 0);
  for (const int64_t s : order) {
    if (used.empty() || !(used.back() == adapter[s])) {
      used.push_back(adapter[s]);
      b_first.push_back(b_words);
      b_words += words_of(adapter[s].rank);
    }
    used_of[s] = static_cast<int64_t>(used.size()) - 1;
  }
}

LoraGemm::Segments LoraGemm::segments(int64_t panel) const {
  Segments found;
  const bool each = fan == Fan::kEach, apart = !each || panels_a_slot > 0;
  int64_t row = apart ? panel % panels_a_slot * height : panel * height;
  const int64_t end = std::min(row + height, apart ? M : slots * M);
  while (row < end) {
    const int64_t slot = !each ? 0 : apart ? panel / panels_a_slot : row / M;
    const int count = static_cast<int>(apart ? end - row : std::min(end, (slot + 1) * M) - row);
    found.of[found.size++] = {slot, apart ? row : row % M, found.rows, count};
    found.rows += count, row += count;
  }
  return found;
}

}  // namespace fastcss::cpu
