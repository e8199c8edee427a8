#include "partial_select.h"

#include <utility>
#include <vector>

#include "gemm.h"

namespace fastcss::cpu {
namespace {

// Maps floats to whole numbers of the same order: −0 like 0, every NaN above all.
FASTCSS_INLINE uint32_t sortable(float x) {
  if (x != x) return 0xffffffff;
  uint32_t bits;
  x += 0.f;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
}

struct Candidate {
  uint32_t rank;  // the smaller the better: ~sortable(value)
  uint32_t index;
};

// Sorts by rank; candidates of the same rank stay in order. It is a radix sort, since the CPU mispredicts half of the
// comparisons of random values, which costs more than four passes.
void sort(std::vector<Candidate>& candidates, std::vector<Candidate>& other) {
  constexpr int kDigits = 4, kValues = 256;
  int32_t place[kDigits][kValues] = {};
  for (const Candidate& c : candidates)
    for (int d = 0; d < kDigits; ++d) ++place[d][c.rank >> 8 * d & 0xff];
  other.resize(candidates.size());
  for (int d = 0; d < kDigits; ++d) {
    for (int32_t value = 0, before = 0; value < kValues; ++value) before += std::exchange(place[d][value], before);
    for (const Candidate& c : candidates) other[place[d][c.rank >> 8 * d & 0xff]++] = c;
    candidates.swap(other);
  }
}

// Holds the k best so far, and their worst value: the bar. Only values above the bar are looked at once more, which are
// about k ln(n / k) in a row of n random values.
class Best {
 public:
  Best(const float* values, int64_t k) : values_(values), k_(k) {}
  float bar() const { return bar_; }
  bool open() const { return static_cast<int64_t>(best_.size()) < k_; }  // everything passes
  void add(const std::vector<uint32_t>& list, int64_t count) {
    const size_t before = best_.size();
    best_.resize(before + count);
    for (int64_t i = 0; i < count; ++i) best_[before + i] = {~sortable(values_[list[i]]), list[i]};
    sort(best_, other_);
    if (open()) return;
    best_.resize(k_);
    bar_ = values_[best_.back().index];
  }
  void write(int64_t* index) const {
    for (int64_t i = 0; i < k_; ++i) index[i] = best_[i].index;
  }

 private:
  const float* values_;
  int64_t k_;
  float bar_ = 0;
  std::vector<Candidate> best_, other_;
};

// Lists the indices, from `first` on, of values that are not at or below the bar, until n or until the list is full.
using Scan = int64_t (*)(const float* values, int64_t first, int64_t n, float bar, bool open, uint32_t* list,
                         int64_t room, int64_t* count);

int64_t scan_portable(const float* values, int64_t first, int64_t n, float bar, bool open, uint32_t* list, int64_t room,
                      int64_t* count) {
  int64_t found = 0;
  for (; first < n && found < room; ++first) {
    list[found] = static_cast<uint32_t>(first);
    found += open || !(values[first] <= bar);
  }
  *count = found;
  return first;
}

#if defined(__x86_64__)
FASTCSS_TARGET("arch=x86-64-v4")
int64_t scan_v4(const float* values, int64_t first, int64_t n, float bar, bool open, uint32_t* list, int64_t room,
                int64_t* count) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 bars = _mm512_set1_ps(bar);
  int64_t found = 0;
  for (; first < n && found + kLanes <= room; first += kLanes) {
    const __mmask16 valid = n - first < kLanes ? (1 << (n - first)) - 1 : 0xffff;
    const __m512 x = _mm512_maskz_loadu_ps(valid, values + first);
    const __mmask16 above = open ? valid : _mm512_mask_cmp_ps_mask(valid, x, bars, _CMP_NLE_UQ);
    if (!above) continue;
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(first)));
    _mm512_storeu_si512(list + found, _mm512_maskz_compress_epi32(above, index));
    found += __builtin_popcount(above);
  }
  *count = found;
  return std::min(first, n);
}
#endif

Scan scan() {
#if defined(__x86_64__)
  if (kLevel == 4) return scan_v4;
#endif
  return scan_portable;
}

}  // namespace

void select_top(const float* values, int64_t n, int64_t k, int64_t* index) {
  static const Scan next = scan();
  const int64_t room = 3 * k + 8 * kLanes;  // enough new ones to make sorting them and the k best worth its while
  std::vector<uint32_t> list(room);
  Best best(values, k);
  for (int64_t first = 0, count; first < n;) {
    first = next(values, first, n, best.bar(), best.open(), list.data(), room, &count);
    best.add(list, count);
  }
  best.write(index);
}

}  // namespace fastcss::cpu
