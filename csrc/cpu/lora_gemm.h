// out = rows · W + bias, with every adapter's (scale · rows · A) · B added while a tile is in cache: out is written
// once. The forward pass and the input gradient are both this GEMM; only the operands' roles differ.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "gemm.h"
#include "parallel.h"

namespace fastcss::cpu {

// Says how the slots' rows and results correspond.
enum class Fan {
  kOut,   // one input, a result per slot: the base tile is computed once
  kEach,  // an input and a result per slot
  kIn,    // an input per slot, one summed result: the inputs are summed before their base tile is computed
};

struct Adapter {
  int64_t first, rank;  // its rows of the packed A and B
  bool operator==(const Adapter&) const = default;
};

struct LoraProblem {
  Fan fan;
  int64_t slots, M, K, N;        // M rows a slot, K terms, N columns
  Matrix rows;                   // lanes: M, terms: K
  int64_t rows_slot;             // elements from one slot's rows to the next's
  Matrix weight;                 // lanes: N, terms: K
  Matrix a, b;                   // lanes: Σr, terms: K; lanes: N, terms: Σr
  int64_t ranks;                 // Σr
  std::vector<Adapter> adapter;  // of each slot; rank 0 where it has none
  bool stacked;                  // the slots are all adapters in packed order, so kOut shrinks them in one GEMM
  std::vector<float> scale;      // of each slot
  std::vector<float> bias;       // [N rounded up to kCols], zeros for none
  void* out;                     // contiguous [slots, M, N] (kIn: [M, N]); nullptr: only `hidden` is wanted
  DType out_dtype;
  float* hidden;                     // scale · rows · A, kept for later, or nullptr
  std::vector<int64_t> hidden_slot;  // where each slot's part starts
  int64_t hidden_ld;                 // from row to row
};

class LoraGemm : LoraProblem {
 public:
  explicit LoraGemm(LoraProblem problem) : LoraProblem(std::move(problem)) {}
  void run();

 private:
  struct Segment {  // the rows of a panel that belong to one slot
    int64_t slot, row;
    int lane, count;
  };
  struct Segments {  // of one panel
    Segment of[kMaxRows];
    int size = 0, rows = 0;
    const Segment* begin() const { return of; }
    const Segment* end() const { return of + size; }
  };
  struct Panel {     // one panel of rows, packed
    float* rows;     // [words][height]
    float* hidden;   // scale · rows · A, float32: [hidden columns][height]
    float* factors;  // the same as the words that meet B: [words][height] a slot
  };

  struct BRows {  // the columns of B that a tile meets: packed by pack_b(), or the rows of B themselves
    const float* data;
    int64_t ld;
    bool packed;
  };

  void plan();
  void find_used();
  void run_few();
  Segments segments(int64_t panel) const;
  void prepare(int64_t panel, Panel to, float* scratch) const;
  void shrink(Adapter t, const float* packed, const Segment& s, Panel panel, int64_t column) const;
  void prefetch_a(int64_t slot) const;
  void shrink_slot(int64_t slot, const Segment& s, Panel panel, int64_t column) const;
  void round_hidden(const Segments& parts, Panel panel) const;
  void keep(const float* sums, int64_t first, int cols, const Segment& s, Panel panel, int64_t column) const;
  void expand(int64_t panel, Panel from, int64_t column_panel, float* base, BRows b_rows) const;
  void expand_in_place(int64_t panel, Panel from) const;
  void pack_column_panel(int64_t c, float* weight_panel, float* b_panel) const;
  void pack_b(int64_t c, float* b_panel) const;
  int64_t words_of(int64_t terms) const { return pairs ? ceil_div(terms, 2) : terms; }

  // Products run on pairs of bfloat16 where the CPU multiplies them; all sums are float32.
  const bool pairs = rows.dtype == DType::bf16 && fan != Fan::kIn && pair_kernel() != nullptr;
  const Kernel& tile = kernel();
  const Kernel& wide = pairs ? *pair_kernel() : tile;
  const int height = tile.rows;
  const int64_t words = words_of(K);
  int64_t panels, panels_a_slot;                 // panels_a_slot 0: short slots share panels
  int64_t rows_size, hidden_size, factors_size;  // floats of a Panel
  int64_t widest = 0;                            // rank
  bool in_place = false;                         // A and B are read where they are, not packed
  std::vector<Adapter> used;                     // every adapter of some slot, once
  std::vector<int64_t> used_of;                  // by slot: its place in `used`, if its rank is not 0
  std::vector<float> row_scale;                  // [Σr] of a stack, else empty
  std::vector<int64_t> hidden_first;             // hidden column of each slot
  std::vector<int64_t> factor_first;             // its first word among the factors
  std::vector<int64_t> b_first;                  // of each used adapter: its first word of a packed panel of B
  int64_t b_words = 0;                           // of a packed panel of B
  std::vector<const float*> a_panels;            // of each used adapter (or the stack): where its packed A starts
};

}  // namespace fastcss::cpu
