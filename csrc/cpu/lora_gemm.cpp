#include "lora_gemm.h"

namespace fastcss::cpu {

constexpr int64_t kFewRows = 12;  // on average for an adapter, for which packing it would cost more than it saves

// sums [rows of s][kCols] hold rows · A for the packed rows first … first + cols of A: scale them into the panel's
// hidden activations from `column` on, and into `hidden` where they are wanted later.
void LoraGemm::keep(const float* sums, int64_t first, int cols, const Segment& s, Panel panel, int64_t column) const {
  float* to = panel.hidden + column * height + s.lane;
  float* later = hidden ? hidden + hidden_slot[s.slot] + s.row * hidden_ld + column - hidden_first[s.slot] : nullptr;
  for (int j = 0; j < cols; ++j)
    for (int i = 0; i < s.count; ++i) {
      const float h = sums[i * kCols + j] * (row_scale.empty() ? scale[s.slot] : row_scale[first + j]);
      to[j * height + i] = h;
      if (later) later[i * hidden_ld + j] = h;
    }
}

void LoraGemm::shrink(Adapter t, const float* packed, const Segment& s, Panel panel, int64_t column) const {
  alignas(64) float sums[kMaxRows * kCols];
  alignas(64) const float zeros[kCols] = {};
  for (int64_t c = 0; c < t.rank; c += kCols) {
    const int cols = static_cast<int>(std::min<int64_t>(kCols, t.rank - c));
    if (in_place)
      few_rows(s.count, cols, K, panel.rows + s.lane, height, a.at(t.first + c, 0), zeros, 0, sums, kCols);
    else
      wide(s.count, cols, words, panel.rows + s.lane, packed + c * words, kCols, zeros, 0, sums, kCols);
    keep(sums, t.first + c, cols, s, panel, column + c);
  }
}

// Fetches what few_rows() reads first.
void LoraGemm::prefetch_a(int64_t slot) const {
  if (!in_place) return;
  for (int64_t r = 0; r < adapter[slot].rank; ++r)
    for (int64_t k = 0; k < std::min<int64_t>(K, 4 * kLanes); k += kLanes)
      __builtin_prefetch(a.at(adapter[slot].first + r, k).data);
}

void LoraGemm::shrink_slot(int64_t slot, const Segment& s, Panel panel, int64_t column) const {
  if (adapter[slot].rank) shrink(adapter[slot], in_place ? nullptr : a_panels[used_of[slot]], s, panel, column);
}

// Rounds the hidden activations to pairs of bfloat16; each slot's begin at a new word.
void LoraGemm::round_hidden(const Segments& parts, Panel panel) const {
  if (!pairs) return;
  const auto pack_columns = [&](int64_t word, int64_t column, int64_t count) {
    const Matrix columns{panel.hidden + column * height, DType::f32, 1, height};
    pack(panel.factors + word * height, height, parts.rows, count, columns, true);
  };
  if (fan == Fan::kOut) {
    for (int64_t t = 0; t < slots; ++t) pack_columns(factor_first[t], hidden_first[t], adapter[t].rank);
    return;
  }
  for (const Segment& s :
       parts)  // the slots of a panel lie side by side: end odd ranks with a zero, pack them together
    std::fill_n(panel.hidden + adapter[s.slot].rank * height + s.lane, s.count, 0.f);
  pack_columns(0, 0, widest);
}

void LoraGemm::prepare(int64_t panel, Panel to, float* scratch) const {
  const auto parts = segments(panel);
  const Segment& whole = parts.of[0];
  if (fan == Fan::kEach) {
    // Slots that share a panel lie one after the other.
    pack(to.rows, height, parts.rows, K, rows.at(whole.row, 0).offset(whole.slot * rows_slot), pairs);
    for (int i = 0; i < parts.size; ++i) {
      if (i + 1 < parts.size) prefetch_a(parts.of[i + 1].slot);
      shrink_slot(parts.of[i].slot, parts.of[i], to, 0);
    }
    round_hidden(parts, to);
  } else if (fan == Fan::kOut) {
    pack(to.rows, height, whole.count, K, rows.at(whole.row, 0), pairs);
    if (stacked)
      shrink({0, ranks}, a_panels[0], whole, to, 0);
    else
      for (int64_t t = 0; t < slots; ++t) shrink_slot(t, {t, whole.row, 0, whole.count}, to, hidden_first[t]);
    round_hidden(parts, to);
  } else {
    for (int64_t t = 0; t < slots; ++t) {
      float* packed = t == 0 ? to.rows : scratch;
      pack(packed, height, whole.count, K, rows.at(whole.row, 0).offset(t * rows_slot));
      shrink_slot(t, {t, whole.row, 0, whole.count}, {packed, to.hidden, to.factors}, hidden_first[t]);
      if (t > 0) add(to.rows, packed, K * height);
    }
  }
}

// base [rows][kCols] holds a panel's rows · W + bias: adds every slot's hidden · B and writes the result.
void LoraGemm::expand(int64_t panel, Panel from, int64_t column_panel, float* base, BRows b_rows) const {
  alignas(64) float result[kMaxRows * kCols];
  const int64_t column = column_panel * kCols;
  const int cols = static_cast<int>(std::min<int64_t>(kCols, N - column));
  const auto parts = segments(panel);

  const auto b_at = [&](int64_t t) {
    if (adapter[t].rank == 0) return b_rows.data;
    return b_rows.data + (b_rows.packed ? b_first[used_of[t]] : adapter[t].first) * b_rows.ld;
  };
  // base + hidden · B for one slot's rows, written to `slot` of out
  const auto add_adapter = [&](const Segment& s, int64_t t, int64_t slot) {
    const float* h = from.factors + factor_first[t] * height + s.lane;
    const float* b = b_at(t);
    const int64_t k = words_of(adapter[t].rank);
    const float* in = base + s.lane * kCols;
    const int64_t at = (slot * M + s.row) * N + column;
    if (out_dtype == DType::f32 && cols % kLanes == 0) {
      wide(s.count, cols, k, h, b, b_rows.ld, in, kCols, static_cast<float*>(out) + at, N);
    } else {
      wide(s.count, cols, k, h, b, b_rows.ld, in, kCols, result, kCols);
      write(static_cast<char*>(out) + at * size_of(out_dtype), out_dtype, N, s.count, cols, result);
    }
  };
  const Segment& whole = parts.of[0];
  if (fan == Fan::kEach) {
    for (const Segment& s : parts) add_adapter(s, s.slot, s.slot);
  } else if (fan == Fan::kOut) {
    for (int64_t t = 0; t < slots; ++t) add_adapter(whole, t, t);
  } else {
    for (int64_t t = 0; t + 1 < slots; ++t)
      wide(whole.count, cols, words_of(adapter[t].rank), from.factors + factor_first[t] * height, b_at(t), b_rows.ld,
           base, kCols, base, kCols);
    add_adapter(whole, slots - 1, 0);
  }
}

// Adds each slot's hidden · B to the base in `out`, a slot after the other, so that each B is read in one go.
void LoraGemm::expand_in_place(int64_t panel, Panel from) const {
  for (const Segment& s : segments(panel)) {
    const Adapter t = adapter[s.slot];
    float* to = static_cast<float*>(out) + (s.slot * M + s.row) * N;
    few_terms(s.count, N, t.rank, from.factors + s.lane, height, static_cast<const float*>(b.at(0, t.first).data),
              b.k_stride, to, N);
  }
}

void LoraGemm::pack_column_panel(int64_t c, float* weight_panel, float* b_panel) const {
  const int cols = static_cast<int>(std::min<int64_t>(kCols, N - c * kCols));
  pack(weight_panel, kCols, cols, K, weight.at(c * kCols, 0), pairs);
  if (!in_place) pack_b(c, b_panel);
}

void LoraGemm::pack_b(int64_t c, float* b_panel) const {
  const int cols = static_cast<int>(std::min<int64_t>(kCols, N - c * kCols));
  for (size_t u = 0; u < used.size(); ++u)
    pack(b_panel + b_first[u] * kCols, kCols, cols, used[u].rank, b.at(c * kCols, used[u].first), pairs);
}

// Serves so few rows that reading W, A and B is most of the work: they are read from memory as they are, not packed.
void LoraGemm::run_few() {
  alignas(64) const float zeros[kCols] = {};
  float* packed = shared_workspace.get(rows_size + hidden_size);
  const Panel panel{packed, packed + rows_size, packed + rows_size};
  const auto parts = segments(0);
  pack(panel.rows, height, parts.rows, K, rows);

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
    if (fan == Fan::kEach)
      add_jobs(s, adapter[s.slot].first, adapter[s.slot].rank, 0);
    else if (stacked)
      add_jobs(s, 0, ranks, 0);
    else
      for (int64_t t = 0; t < slots; ++t)
        add_jobs({t, s.row, 0, s.count}, adapter[t].first, adapter[t].rank, hidden_first[t]);
  }
  parallel(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const Job& job = jobs[i];
    alignas(64) float sums[kMaxRows * kCols];
    const int cols = static_cast<int>(job.rank);
    few_rows(job.segment.count, cols, K, panel.rows + job.segment.lane, height, a.at(job.first, 0), zeros, 0, sums,
             kCols);
    keep(sums, job.first, cols, job.segment, panel, job.column);
  });
  parallel(out ? ceil_div(N, kCols) : 0, [&](int64_t c) {
    alignas(64) float base[kMaxRows * kCols];
    const int cols = static_cast<int>(std::min<int64_t>(kCols, N - c * kCols));
    few_rows(parts.rows, cols, K, panel.rows, height, weight.at(c * kCols, 0), &bias[c * kCols], 0, base, kCols);
    if (b.lane_stride == 1 && cols == kCols) {
      expand(0, panel, c, base, {static_cast<const float*>(b.at(c * kCols, 0).data), b.k_stride, false});
    } else {
      float* b_panel = local_workspace.get(b_words * kCols);
      pack_b(c, b_panel);
      expand(0, panel, c, base, {b_panel, kCols, true});
    }
  });
}

void LoraGemm::run() {
  plan();
  const bool float_rows = weight.dtype == DType::f32 && a.dtype == DType::f32 && b.dtype == DType::f32;
  const bool may_be_in_place = fan != Fan::kIn && float_rows && a.k_stride == 1;
  if (panels == 1 && may_be_in_place && weight.k_stride == 1) return run_few();
  // An adapter that few rows run through is read once or twice, which packing it would cost, too.
  in_place = may_be_in_place && fan == Fan::kEach && b.lane_stride == 1 && b_words &&
             slots * M <= kFewRows * static_cast<int64_t>(used.size());
  // Adapters whose A is packed together: all of them, or one by one.
  const auto groups = stacked && fan == Fan::kOut ? std::vector<Adapter>{{0, ranks}}
                      : in_place                  ? std::vector<Adapter>{}
                                                  : used;

  const int64_t column_panels = out ? ceil_div(N, kCols) : 0;
  const int64_t threads = torch::stable::get_num_threads();
  // The panels of a block share the L2 cache and meet a packed column panel together; a block has more of them if there
  // are many panels.
  const int64_t block =
      std::clamp<int64_t>((512 << 10) / (rows_size * 4), 1, std::clamp<int64_t>(panels / (8 * threads), 8, 32));
  const int64_t blocks = ceil_div(panels, block);
  const bool streamed = blocks >= 4 * threads;  // else too few blocks to go round: threads share out the columns
  const bool prepacked = blocks > 1;            // else a weight panel is used once, by the thread that packs it

  // Everything the threads share: packed A, packed W and B, and all panels where they are not streamed.
  const int64_t weight_size = words * kCols, b_size = in_place ? 0 : b_words * kCols,
                column_size = weight_size + b_size;
  int64_t a_size = 0;
  for (const Adapter& g : groups) a_size += ceil_div(g.rank, kCols) * kCols * words;
  const int64_t panel_size = rows_size + hidden_size + factors_size;
  float* a_packed = shared_workspace.get(a_size + (prepacked ? column_panels * column_size : 0) +
                                         (streamed ? 0 : panels * panel_size));
  float* columns_packed = a_packed + a_size;
  float* panels_packed = columns_packed + (prepacked ? column_panels * column_size : 0);

  std::vector<std::pair<Adapter, float*>> a_jobs;  // a panel of A, and where it goes
  for (const Adapter& g : groups) {
    a_panels.push_back(a_packed);
    for (int64_t c = 0; c < g.rank; c += kCols, a_packed += kCols * words)
      a_jobs.push_back({{g.first + c, std::min<int64_t>(kCols, g.rank - c)}, a_packed});
  }
  const int64_t a_count = static_cast<int64_t>(a_jobs.size());
  parallel(a_count + (prepacked ? column_panels : 0), [&](int64_t i) {
    if (i < a_count)
      return pack(a_jobs[i].second, kCols, a_jobs[i].first.rank, K, a.at(a_jobs[i].first.first, 0), pairs);
    float* to = columns_packed + (i - a_count) * column_size;
    pack_column_panel(i - a_count, to, to + weight_size);
  });

  const auto compute = [&](int64_t p, Panel from, int64_t c, const float* weight_panel) {
    alignas(64) float base[kMaxRows * kCols];
    const int cols = static_cast<int>(std::min<int64_t>(kCols, N - c * kCols));
    const auto parts = segments(p);
    // Nothing is added here: the base is the result.
    const bool alone = b_words == 0 && parts.size == 1 && (fan != Fan::kOut || slots == 1);
    const bool direct = (alone || in_place) && out_dtype == DType::f32 && cols % kLanes == 0;
    const int64_t at = (parts.of[0].slot * M + parts.of[0].row) * N + c * kCols;
    float* to = direct ? static_cast<float*>(out) + at : base;
    wide(parts.rows, cols, words, from.rows, weight_panel, kCols, &bias[c * kCols], 0, to, direct ? N : kCols);
    if (direct) return;
    if (in_place) return write(static_cast<float*>(out) + at, out_dtype, N, parts.rows, cols, base);
    expand(p, from, c, base, {weight_panel + weight_size, kCols, true});
  };
  const auto panel_at = [&](float* start, int64_t i) {
    float *rows_at = start + i * panel_size, *hidden_at = rows_at + rows_size;
    return Panel{rows_at, hidden_at, pairs ? hidden_at + hidden_size : hidden_at};
  };
  if (streamed) {
    parallel(blocks, [&](int64_t i) {
      const int64_t first = i * block, count = std::min(block, panels - first);
      float* local = local_workspace.get((block + 1) * panel_size);
      for (int64_t p = 0; p < count; ++p) prepare(first + p, panel_at(local, p), panel_at(local, block).rows);
      for (int64_t c = 0; c < column_panels; ++c)
        for (int64_t p = 0; p < count; ++p) compute(first + p, panel_at(local, p), c, columns_packed + c * column_size);
      for (int64_t p = 0; in_place && p < count; ++p) expand_in_place(first + p, panel_at(local, p));
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
    if (in_place && out) parallel(panels, [&](int64_t p) { expand_in_place(p, panel_at(panels_packed, p)); });
  }
}

}  // namespace fastcss::cpu
