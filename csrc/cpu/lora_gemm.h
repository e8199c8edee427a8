// out = rows · W + bias, with every adapter's (scale · rows · A) · B added while a tile is in cache: out is written once.
// The forward pass and the input gradient are both this GEMM; only the operands' roles differ.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "gemm.h"

namespace fastcss::cpu {

// How the slots' rows meet the result.
enum class Fan {
  kOut,   // one input, a result a slot: the base tile is computed once
  kEach,  // an input and a result a slot
  kIn,    // an input a slot, one summed result: the inputs are summed before their base tile is computed
};

struct Adapter {
  int64_t first, rank;  // its rows of the packed A and B
};

struct LoraProblem {
  Fan fan;
  int64_t slots, M, K, N;            // M rows a slot, K terms, N columns
  Matrix rows;                       // lanes: M, terms: K
  int64_t rows_slot;                 // elements from one slot's rows to the next's
  Matrix weight;                     // lanes: N, terms: K
  Matrix a, b;                       // lanes: Σr, terms: K; lanes: N, terms: Σr
  int64_t ranks;                     // Σr
  std::vector<Adapter> adapter;      // of each slot; rank 0 where it has none
  bool stacked;                      // the slots are all adapters in packed order, so kOut shrinks them in one GEMM
  std::vector<float> scale;          // [Σr], its adapter's scale for every packed row
  std::vector<float> bias;           // [N rounded up to kCols], zeros for none
  void* out;                         // contiguous [slots, M, N] (kIn: [M, N]); nullptr: only `hidden` is wanted
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
  struct Panel {  // one panel of rows, packed: [K][height], and its hidden activations: [hidden columns][height]
    float* rows;
    float* hidden;
  };

  void plan();
  void run_few();
  std::vector<Segment> segments(int64_t panel) const;
  void prepare(int64_t panel, Panel to, float* scratch) const;
  void shrink(int64_t first, int64_t rank, const Segment& s, Panel panel, int64_t column) const;
  void keep(const float* sums, int64_t first, int cols, const Segment& s, Panel panel, int64_t column) const;
  void expand(int64_t panel, Panel from, int64_t column_panel, float* base, const float* b_rows, int64_t ldb) const;
  void pack_column_panel(int64_t c, float* weight_panel, float* b_panel) const;

  // Products over K run on pairs of bfloat16 where the CPU multiplies them; the deltas and all sums are float32.
  const bool pairs = rows.dtype == DType::bf16 && fan != Fan::kIn && pair_kernel() != nullptr;
  const Kernel& tile = kernel();
  const Kernel& wide = pairs ? *pair_kernel() : tile;
  const int height = tile.rows;
  const int64_t words = pairs ? ceil_div(K, 2) : K;
  int64_t panels, panels_a_slot;              // panels_a_slot 0: short slots share panels
  int64_t rows_size, hidden_size;             // floats of a Panel
  std::vector<int64_t> hidden_first;          // hidden column of each slot
  std::vector<const float*> a_panels;         // by packed row: where that row's adapter (or the stack) starts
};

inline thread_local Workspace shared_workspace, local_workspace;

inline void LoraGemm::plan() {
  const int64_t total = fan == Fan::kEach ? slots * M : M;
  panels_a_slot = fan == Fan::kEach && M < height ? 0 : ceil_div(M, height);
  panels = fan == Fan::kEach && panels_a_slot ? slots * panels_a_slot : ceil_div(total, height);
  int64_t columns = 0;
  for (const Adapter& t : adapter) {
    hidden_first.push_back(fan == Fan::kEach ? 0 : columns);
    columns = fan == Fan::kEach ? std::max(columns, t.rank) : columns + t.rank;
  }
  rows_size = words * height + kLanes;  // pack() writes up to kLanes floats past the end
  hidden_size = columns * height;
}

inline std::vector<LoraGemm::Segment> LoraGemm::segments(int64_t panel) const {
  if (fan != Fan::kEach || panels_a_slot) {
    const int64_t in_slot = fan == Fan::kEach ? panel % panels_a_slot : panel;
    const int64_t row = in_slot * height;
    return {{fan == Fan::kEach ? panel / panels_a_slot : 0, row, 0, static_cast<int>(std::min<int64_t>(height, M - row))}};
  }
  std::vector<Segment> found;
  for (int64_t row = panel * height, end = std::min(row + height, slots * M); row < end;) {
    const int64_t slot = row / M, count = std::min(end, (slot + 1) * M) - row;
    found.push_back({slot, row % M, static_cast<int>(row - panel * height), static_cast<int>(count)});
    row += count;
  }
  return found;
}

// sums [rows of s][kCols] hold rows · A for the packed rows first … first + cols of A: scale them into the panel's
// hidden activations from `column` on, and into `hidden` where they are wanted later.
inline void LoraGemm::keep(const float* sums, int64_t first, int cols, const Segment& s, Panel panel,
                           int64_t column) const {
  float* to = panel.hidden + column * height + s.lane;
  float* later = hidden ? hidden + hidden_slot[s.slot] + s.row * hidden_ld + column - hidden_first[s.slot] : nullptr;
  for (int j = 0; j < cols; ++j)
    for (int i = 0; i < s.count; ++i) {
      const float h = sums[i * kCols + j] * scale[first + j];
      to[j * height + i] = h;
      if (later) later[i * hidden_ld + j] = h;
    }
}

inline void LoraGemm::shrink(int64_t first, int64_t rank, const Segment& s, Panel panel, int64_t column) const {
  alignas(64) float sums[kMaxRows * kCols];
  alignas(64) const float zeros[kCols] = {};
  for (int64_t c = 0; c < rank; c += kCols) {
    const int cols = static_cast<int>(std::min<int64_t>(kCols, rank - c));
    wide(s.count, cols, words, panel.rows + s.lane, a_panels[first] + c * words, kCols, zeros, 0, sums, kCols);
    keep(sums, first + c, cols, s, panel, column + c);
  }
}

inline void LoraGemm::prepare(int64_t panel, Panel to, float* scratch) const {
  const auto parts = segments(panel);
  const Segment& whole = parts.front();
  if (fan == Fan::kEach) {
    const int count = parts.back().lane + parts.back().count;  // slots that share a panel lie one after the other
    pack(to.rows, height, count, K, rows.at(whole.row, 0).offset(whole.slot * rows_slot), pairs);
    for (const Segment& s : parts) shrink(adapter[s.slot].first, adapter[s.slot].rank, s, to, 0);
  } else if (fan == Fan::kOut) {
    pack(to.rows, height, whole.count, K, rows.at(whole.row, 0), pairs);
    if (stacked) return shrink(0, ranks, whole, to, 0);
    for (int64_t t = 0; t < slots; ++t)
      shrink(adapter[t].first, adapter[t].rank, {t, whole.row, 0, whole.count}, to, hidden_first[t]);
  } else {
    for (int64_t t = 0; t < slots; ++t) {
      float* packed = t == 0 ? to.rows : scratch;
      pack(packed, height, whole.count, K, rows.at(whole.row, 0).offset(t * rows_slot));
      shrink(adapter[t].first, adapter[t].rank, {t, whole.row, 0, whole.count}, {packed, to.hidden}, hidden_first[t]);
      if (t > 0) add(to.rows, packed, K * height);
    }
  }
}

// base [rows][kCols] holds a panel's rows · W + bias: adds every slot's hidden · B and writes the result.
inline void LoraGemm::expand(int64_t panel, Panel from, int64_t column_panel, float* base, const float* b_rows,
                             int64_t ldb) const {
  alignas(64) float result[kMaxRows * kCols];
  const int64_t column = column_panel * kCols;
  const int cols = static_cast<int>(std::min<int64_t>(kCols, N - column));
  const auto parts = segments(panel);

  // base + hidden · B for one slot's rows, written to `slot` of out
  const auto add_adapter = [&](const Segment& s, int64_t t, int64_t slot) {
    const float* h = from.hidden + hidden_first[t] * height + s.lane;
    const float* b = b_rows + adapter[t].first * ldb;
    const float* in = base + s.lane * kCols;
    const int64_t at = (slot * M + s.row) * N + column;
    if (out_dtype == DType::f32 && cols % kLanes == 0) {
      tile(s.count, cols, adapter[t].rank, h, b, ldb, in, kCols, static_cast<float*>(out) + at, N);
    } else {
      tile(s.count, cols, adapter[t].rank, h, b, ldb, in, kCols, result, kCols);
      write(static_cast<char*>(out) + at * size_of(out_dtype), out_dtype, N, s.count, cols, result);
    }
  };
  const Segment& whole = parts.front();
  if (fan == Fan::kEach) {
    for (const Segment& s : parts) add_adapter(s, s.slot, s.slot);
  } else if (fan == Fan::kOut) {
    for (int64_t t = 0; t < slots; ++t) add_adapter(whole, t, t);
  } else {
    for (int64_t t = 0; t + 1 < slots; ++t)
      tile(whole.count, cols, adapter[t].rank, from.hidden + hidden_first[t] * height, b_rows + adapter[t].first * ldb,
           ldb, base, kCols, base, kCols);
    add_adapter(whole, slots - 1, 0);
  }
}

inline void LoraGemm::pack_column_panel(int64_t c, float* weight_panel, float* b_panel) const {
  const int cols = static_cast<int>(std::min<int64_t>(kCols, N - c * kCols));
  pack(weight_panel, kCols, cols, K, weight.at(c * kCols, 0), pairs);
  pack(b_panel, kCols, cols, ranks, b.at(c * kCols, 0));
}

// So few rows that reading W, A and B is the work: they are used from memory as they are, and not packed.
inline void LoraGemm::run_few() {
  alignas(64) const float zeros[kCols] = {};
  float* packed = shared_workspace.get(rows_size + hidden_size);
  const Panel panel{packed, packed + rows_size};
  const auto parts = segments(0);
  const int count = parts.back().lane + parts.back().count;
  pack(panel.rows, height, count, K, rows.offset(parts.front().slot * rows_slot));

  struct Job {
    Segment segment;
    int64_t first, rank, column;
  };
  std::vector<Job> jobs;
  const auto add_jobs = [&](const Segment& s, int64_t first, int64_t rank, int64_t column) {
    for (int64_t c = 0; c < rank; c += kCols)
      jobs.push_back({s, first + c, std::min<int64_t>(kCols, rank - c), column + c});
  };
  for (const Segment& s : parts) {
    if (fan == Fan::kEach) add_jobs(s, adapter[s.slot].first, adapter[s.slot].rank, 0);
    else if (stacked) add_jobs(s, 0, ranks, 0);
    else
      for (int64_t t = 0; t < slots; ++t)
        add_jobs({t, s.row, 0, s.count}, adapter[t].first, adapter[t].rank, hidden_first[t]);
  }
  parallel(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const Job& job = jobs[i];
    alignas(64) float sums[kFewRows * kCols];
    const int cols = static_cast<int>(job.rank);
    few_rows(job.segment.count, cols, K, panel.rows + job.segment.lane, height, a.at(job.first, 0), zeros, 0, sums, kCols);
    keep(sums, job.first, cols, job.segment, panel, job.column);
  });
  parallel(out ? ceil_div(N, kCols) : 0, [&](int64_t c) {
    alignas(64) float base[kMaxRows * kCols];
    const int cols = static_cast<int>(std::min<int64_t>(kCols, N - c * kCols));
    few_rows(count, cols, K, panel.rows, height, weight.at(c * kCols, 0), &bias[c * kCols], 0, base, kCols);
    if (b.lane_stride == 1 && cols == kCols) {
      expand(0, panel, c, base, static_cast<const float*>(b.at(c * kCols, 0).data), b.k_stride);
    } else {
      float* b_panel = local_workspace.get(ranks * kCols);
      pack(b_panel, kCols, cols, ranks, b.at(c * kCols, 0));
      expand(0, panel, c, base, b_panel, kCols);
    }
  });
}

inline void LoraGemm::run() {
  plan();
  const bool float_rows = weight.dtype == DType::f32 && a.dtype == DType::f32 && b.dtype == DType::f32;
  if (panels == 1 && (fan == Fan::kEach ? slots * M : M) <= kFewRows && fan != Fan::kIn && float_rows &&
      weight.k_stride == 1 && a.k_stride == 1)
    return run_few();
  // Adapters whose A is packed together: all of them, or one by one.
  std::vector<Adapter> groups;
  if (stacked && fan == Fan::kOut) groups.push_back({0, ranks});
  else
    for (const Adapter& t : adapter)
      if (t.rank && std::none_of(groups.begin(), groups.end(), [&](const Adapter& g) { return g.first == t.first; }))
        groups.push_back(t);

  const int64_t column_panels = out ? ceil_div(N, kCols) : 0;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t block = std::clamp<int64_t>((512 << 10) / (rows_size * 4), 1, 8);  // panels that share the L2 cache
  const int64_t blocks = ceil_div(panels, block);
  const bool streamed = blocks >= 4 * threads;  // else too few blocks to go round: threads share out the columns
  const bool prepacked = blocks > 1;            // else a weight panel is used once, by the thread that packs it

  // Everything the threads share: packed A, packed W and B, and all panels where they are not streamed.
  const int64_t weight_size = words * kCols, b_size = ranks * kCols, column_size = weight_size + b_size;
  int64_t a_size = 0;
  for (const Adapter& g : groups) a_size += ceil_div(g.rank, kCols) * kCols * words;
  const int64_t panel_size = rows_size + hidden_size;
  float* a_packed = shared_workspace.get(a_size + (prepacked ? column_panels * column_size : 0) +
                                         (streamed ? 0 : panels * panel_size));
  float* columns_packed = a_packed + a_size;
  float* panels_packed = columns_packed + (prepacked ? column_panels * column_size : 0);

  a_panels.assign(ranks + 1, nullptr);
  std::vector<std::pair<Adapter, float*>> a_jobs;  // a panel of A, and where it goes
  for (const Adapter& g : groups) {
    a_panels[g.first] = a_packed;
    for (int64_t c = 0; c < g.rank; c += kCols, a_packed += kCols * words)
      a_jobs.push_back({{g.first + c, std::min<int64_t>(kCols, g.rank - c)}, a_packed});
  }
  const int64_t a_count = static_cast<int64_t>(a_jobs.size());
  parallel(a_count + (prepacked ? column_panels : 0), [&](int64_t i) {
    if (i < a_count) return pack(a_jobs[i].second, kCols, a_jobs[i].first.rank, K, a.at(a_jobs[i].first.first, 0), pairs);
    float* to = columns_packed + (i - a_count) * column_size;
    pack_column_panel(i - a_count, to, to + weight_size);
  });

  const auto compute = [&](int64_t p, Panel from, int64_t c, const float* weight_panel) {
    alignas(64) float base[kMaxRows * kCols];
    const auto parts = segments(p);
    const int cols = static_cast<int>(std::min<int64_t>(kCols, N - c * kCols));
    wide(parts.back().lane + parts.back().count, cols, words, from.rows, weight_panel, kCols, &bias[c * kCols], 0, base, kCols);
    expand(p, from, c, base, weight_panel + weight_size, kCols);
  };
  const auto panel_at = [&](float* start, int64_t i) {
    return Panel{start + i * panel_size, start + i * panel_size + rows_size};
  };
  if (streamed) {
    parallel(blocks, [&](int64_t i) {
      const int64_t first = i * block, count = std::min(block, panels - first);
      float* local = local_workspace.get((block + 1) * panel_size);
      for (int64_t p = 0; p < count; ++p) prepare(first + p, panel_at(local, p), panel_at(local, block).rows);
      for (int64_t c = 0; c < column_panels; ++c)
        for (int64_t p = 0; p < count; ++p) compute(first + p, panel_at(local, p), c, columns_packed + c * column_size);
    });
  } else {
    parallel(panels, [&](int64_t p) { prepare(p, panel_at(panels_packed, p), local_workspace.get(rows_size)); });
    parallel(blocks * column_panels, [&](int64_t i) {
      const int64_t c = i / blocks, first = i % blocks * block;
      float* columns = prepacked ? columns_packed + c * column_size : local_workspace.get(column_size);
      if (!prepacked) pack_column_panel(c, columns, columns + weight_size);
      for (int64_t p = first; p < std::min(first + block, panels); ++p)
        compute(p, panel_at(panels_packed, p), c, columns);
    });
  }
  shared_workspace.trim();
}

}  // namespace fastcss::cpu
