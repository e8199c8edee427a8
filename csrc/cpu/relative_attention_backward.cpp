// fastcss::relative_attention_backward.cpu: the weights of a panel of queries and some of the keys are made again from
// the forward pass's statistics. The gradients of keys, values and tables are sums over queries: each unit of queries
// has its own, and the units are added up in their order.

#include <tuple>

#include "left_product.h"
#include "parallel.h"
#include "relative_table_rows.h"
#include "relative_windows.h"
#include "rows.h"

namespace fastcss::cpu {
namespace {

constexpr int64_t kPanels = 2;                  // of queries, which share what is read of the keys
constexpr int64_t kUnit = 32 * kCols;           // queries of an item of work
constexpr int64_t kMemory = int64_t{16} << 20;  // floats at a time

struct Inputs {
  Tokens dout, q, k, v;
  Tensor pad_key, pad_value, stats;
  bool need_tables;
};
struct Gradients {
  Tensor dq, dk, dv, drel_h, drel_w, dpad_key, dpad_value;
};

// A panel of queries with what their gradients need.
struct Panel {
  QueryPanel of;
  float *rows, *dout_rows;  // [kCols][width]
  float *dout, *delta;      // [D][kCols], [kCols]
  float *dbias_h, *dbias_w, *dq;
  float *weights, *dscores;           // with all keys [n][kCols]
  int64_t row[kCols], column[kCols];  // of each query in its window
};

class Backward {
 public:
  Backward(const RelativeWindows& w, const Inputs& in, const Gradients& out, const TableRows& rel_h,
           const TableRows& rel_w)
      : w_(w),
        in_(in),
        out_(out),
        rel_h_(rel_h),
        rel_w_(rel_w),
        width_(ceil_div(w.D, kCols) * kCols),
        units_(ceil_div(w.n, kUnit)),
        tables_(2 * (rel_h.size + rel_w.size - 1) * width_),
        pads_(w.B * w.heads * 2 * width_),
        table_sums_(in.need_tables ? tables_ : 0) {}

  void run() {
    const int64_t total = w_.B * w_.count() * w_.heads, each = packed_size() + units_ * sums_size();
    const int64_t round = std::clamp<int64_t>(kMemory / each, 1, total);
    float* memory = shared_workspace.get(round * each);
    for (int64_t first = 0; first < total; first += round) {
      const int64_t count = std::min(round, total - first);
      const auto packed = [&](int64_t i) { return memory + i * each; };
      const auto sums = [&](int64_t i, int64_t unit) { return packed(i) + packed_size() + unit * sums_size(); };
      parallel(count, [&](int64_t i) { pack(first + i, packed(i)); });
      parallel(count * units_, [&](int64_t item) {
        const int64_t i = item / units_, unit = item % units_;
        this->unit(first + i, unit, packed(i), sums(i, unit));
      });
      parallel(count, [&](int64_t i) {
        for (int64_t unit = 1; unit < units_; ++unit) add(sums(i, 0), sums(i, unit), sums_size());
        write_keys(first + i, sums(i, 0));
      });
      for (int64_t i = 0; i < count; ++i) add_up(first + i, sums(i, 0));
    }
    finish();
  }

 private:
  std::tuple<int64_t, int64_t, OnMap> place(int64_t index) const {
    const int64_t window = index / w_.heads;
    return {window / w_.count(), index % w_.heads, w_.on_map(window % w_.count())};
  }
  // Keys as keys and as values, and values as keys.
  int64_t packed_size() const { return 2 * keys_size(w_) + values_size(w_); }
  void pack(int64_t index, float* memory) const;
  // A unit has Σ dscore · query and Σ weight · dout [n][width], those of the padding [2][width], and those of the
  // tables.
  int64_t sums_size() const { return 2 * w_.n * width_ + tables_; }
  void unit(int64_t index, int64_t unit, const float* packed, float* sums) const;
  void begin(Panel& p, int64_t b, int64_t h, const OnMap& at, int64_t first, float* scratch) const;
  void share(const Panel& p) const;
  void gradients(const Panel& p, const PackedKeys& keys, int64_t chunk, float* dk, float* dv) const;
  void write_keys(int64_t index, float* sums) const;
  void add_up(int64_t index, const float* sums);
  void finish() const;

  int64_t scratch_size() const {
    return std::max({rel_h_.packed.scratch_size(), rel_w_.packed.scratch_size(), w_.staged_size(kCols)});
  }
  Panel panel(float*& memory) const {
    const auto take = [&](int64_t floats) { return std::exchange(memory, memory + floats); };
    Panel p;
    p.rows = take(kCols * width_), p.dout_rows = take(kCols * width_);
    float *queries = take(w_.D * kCols + kLanes), *bias_h = take(rel_h_.size * kCols);
    float *bias_w = take(rel_w_.size * kCols), *most = take(kCols), *sum = take(kCols);
    p.of = {0, queries, bias_h, bias_w, nullptr, most, sum};
    p.dout = take(w_.D * kCols + kLanes), p.delta = take(kCols);
    p.dbias_h = take(rel_h_.size * kCols), p.dbias_w = take(rel_w_.size * kCols), p.dq = take(w_.D * kCols + kLanes);
    p.weights = take(w_.n * kCols), p.dscores = take(w_.n * kCols);
    return p;
  }
  int64_t panel_size() const {
    return 2 * kCols * width_ + 3 * (w_.D * kCols + kLanes) + (2 * (rel_h_.size + rel_w_.size + w_.n) + 3) * kCols;
  }

  const RelativeWindows& w_;
  const Inputs& in_;
  const Gradients& out_;
  const TableRows &rel_h_, &rel_w_;
  const int64_t width_, units_, tables_;
  std::vector<float> pads_, table_sums_;  // [B][heads][2][width], [rows of both tables][width]
};

void Backward::pack(int64_t index, float* memory) const {
  const auto [b, h, at] = place(index);
  float *keys = memory, *values = keys + keys_size(w_), *by_channel = values + keys_size(w_);
  float* staged = local_workspace.get(w_.staged_size(kChunk));
  pack_keys(keys, w_, in_.k, in_.pad_key, b, h, at, staged);
  pack_values(by_channel, w_, in_.k, in_.pad_key, b, h, at, staged);
  pack_keys(values, w_, in_.v, in_.pad_value, b, h, at, staged);
}

void Backward::unit(int64_t index, int64_t unit, const float* packed, float* sums) const {
  const auto [b, h, at] = place(index);
  const float *values = packed + keys_size(w_), *by_channel = values + keys_size(w_);
  const PackedKeys keys{w_.n, w_.D, w_.width, false, packed, by_channel};
  const PackedKeys values_as_keys{w_.n, w_.D, w_.width, false, values, nullptr};
  float *dk = sums, *dv = dk + w_.n * width_, *dtable_h = dv + w_.n * width_;
  float* dtable_w = dtable_h + (2 * rel_h_.size - 1) * width_;
  std::fill_n(sums, sums_size(), 0.f);
  float *scratch = local_workspace.get(scratch_size() + kPanels * panel_size()), *next = scratch + scratch_size();
  Panel panels[kPanels];
  for (Panel& p : panels) p = panel(next);
  const int64_t last = std::min(at.tokens(), (unit + 1) * kUnit);
  for (int64_t first = unit * kUnit; first < last; first += kPanels * kCols) {
    const int64_t used = std::min(kPanels, ceil_div(last - first, kCols));
    for (int64_t p = 0; p < used; ++p) begin(panels[p], b, h, at, first + p * kCols, scratch);
    for (int64_t c = 0; c < keys.chunks(); ++c)
      for (int64_t i = 0; i < used; ++i) {
        const Panel& p = panels[i];
        float *weights = p.weights + c * kChunk * kCols, *dweights = p.dscores + c * kChunk * kCols;
        weigh_again(keys, c, p.of, w_.scale, weights);
        weight_gradients(values_as_keys, c, p.dout, weights, dweights, p.delta);
      }
    for (int64_t i = 0; i < used; ++i) share(panels[i]);
    for (int64_t c = 0; c < keys.chunks(); ++c)
      for (int64_t i = 0; i < used; ++i)
        gradients(panels[i], keys, c, dk + c * kChunk * width_, dv + c * kChunk * width_);
    for (int64_t i = 0; i < used; ++i) {
      const Panel& p = panels[i];
      for (int64_t j = 0; j < w_.D * kCols; ++j) p.dq[j] *= w_.scale;
      const QueryRows queries{p.rows, width_, p.of.lanes};
      rel_h_.add_gradients(queries, p.row, p.dbias_h, p.dq, in_.need_tables ? dtable_h : nullptr, scratch);
      rel_w_.add_gradients(queries, p.column, p.dbias_w, p.dq, in_.need_tables ? dtable_w : nullptr, scratch);
      w_.for_runs(at, first + i * kCols, p.of.lanes, [&](int lane, int run, int64_t row, int64_t column) {
        const int64_t token = (at.top + row) * w_.W + at.left + column, ld = w_.heads * w_.D;
        write_transposed(image(out_.dq, b, w_.dtype) + (token * ld + h * w_.D) * size_of(w_.dtype), w_.dtype, ld, run,
                         w_.D, p.dq + lane);
      });
    }
  }
}

void Backward::begin(Panel& p, int64_t b, int64_t h, const OnMap& at, int64_t first, float* scratch) const {
  const int lanes = static_cast<int>(std::min<int64_t>(kCols, at.tokens() - first));
  p.of.lanes = lanes;
  const auto read = [&](const Tokens& x, float* packed, float* rows) {
    w_.read_queries(scratch, x, b, h, at, first, lanes);
    cpu::pack(packed, kCols, kCols, w_.D, {scratch, DType::f32, w_.D, 1});
    std::fill_n(rows, kCols * width_, 0.f);
    for (int lane = 0; lane < lanes; ++lane) std::copy_n(scratch + lane * w_.D, w_.D, rows + lane * width_);
  };
  read(in_.q, const_cast<float*>(p.of.queries), p.rows), read(in_.dout, p.dout, p.dout_rows);
  const float* stats = static_cast<const float*>(in_.stats.const_data_ptr()) + (b * w_.heads + h) * w_.H * w_.W * 2;
  for (int lane = 0; lane < kCols; ++lane) {
    const int64_t token = first + std::min(lane, lanes - 1);
    p.row[lane] = token / at.width, p.column[lane] = token % at.width;
    p.of.most[lane] = stats[2 * ((at.top + p.row[lane]) * w_.W + at.left + p.column[lane])];
  }
  rel_h_.packed.bias(const_cast<float*>(p.of.bias_h), p.of.queries, p.row, scratch);
  rel_w_.packed.bias(const_cast<float*>(p.of.bias_w), p.of.queries, p.column, scratch);
  std::fill_n(p.dbias_h, rel_h_.size * kCols, 0.f), std::fill_n(p.dbias_w, rel_w_.size * kCols, 0.f);
  std::fill_n(p.dq, w_.D * kCols, 0.f), std::fill_n(p.of.sum, kCols, 0.f), std::fill_n(p.delta, kCols, 0.f);
}

// Divides by the sum of the weights, once all are there, so that the scores' gradients of a query are 0 in sum: what
// they lack, a gradient over many keys with the same key would gather.
void Backward::share(const Panel& p) const {
  for (int lane = 0; lane < kCols; ++lane) {
    p.of.sum[lane] = 1.f / p.of.sum[lane];
    p.delta[lane] *= p.of.sum[lane];
    for (int64_t d = 0; d < w_.D; ++d) p.dout_rows[lane * width_ + d] *= p.of.sum[lane];
  }
}

void Backward::gradients(const Panel& p, const PackedKeys& keys, int64_t chunk, float* dk, float* dv) const {
  const int64_t count = keys.in_chunk(chunk);
  const float* weights = p.weights + chunk * kChunk * kCols;
  float* dscores = p.dscores + chunk * kChunk * kCols;
  score_gradients(keys, chunk, p.of.sum, p.delta, weights, dscores, p.dbias_h, p.dbias_w);
  for (int64_t c = 0; c < width_; c += kCols) {  // over the queries that are there: the others' may not be finite
    left_product(count, p.of.lanes, {weights, kCols, 1}, p.dout_rows + c, width_, dv + c, width_, true);
    left_product(count, p.of.lanes, {dscores, kCols, 1}, p.rows + c, width_, dk + c, width_, true);
  }
  add_values(keys, chunk, dscores, p.dq);
}

// Writes the gradients of the window's keys and values, and leaves those of the padding in the place of the first.
void Backward::write_keys(int64_t index, float* sums) const {
  const auto [b, h, at] = place(index);
  std::vector<float> pads(2 * width_);
  for (const bool of_values : {false, true}) {
    float* rows = sums + of_values * w_.n * width_;
    char* to = image(of_values ? out_.dv : out_.dk, b, w_.dtype);
    for (int64_t j = 0; j < w_.n; ++j) {
      const int64_t row = j / w_.width, column = j % w_.width;
      float* from = rows + j * width_;
      for (int64_t d = 0; !of_values && d < w_.D; ++d) from[d] *= w_.scale;
      if (row < at.height && column < at.width) {
        const int64_t token = (at.top + row) * w_.W + at.left + column;
        write_row(to + (token * w_.heads + h) * w_.D * size_of(w_.dtype), w_.dtype, from, w_.D);
      } else {
        add(pads.data() + of_values * width_, from, w_.D);
      }
    }
  }
  std::copy_n(pads.data(), width_, sums), std::copy_n(pads.data() + width_, width_, sums + w_.n * width_);
}

void Backward::add_up(int64_t index, const float* sums) {
  const auto [b, h, at] = place(index);
  float* pads = pads_.data() + (b * w_.heads + h) * 2 * width_;
  add(pads, sums, width_), add(pads + width_, sums + w_.n * width_, width_);
  if (in_.need_tables) add(table_sums_.data(), sums + 2 * w_.n * width_, tables_);
}

void Backward::finish() const {
  const int64_t bytes = w_.D * size_of(w_.dtype);
  for (int64_t i = 0; i < w_.B * w_.heads; ++i) {
    char *key = image(out_.dpad_key, 0, w_.dtype), *value = image(out_.dpad_value, 0, w_.dtype);
    write_row(key + i * bytes, w_.dtype, pads_.data() + i * 2 * width_, w_.D);
    write_row(value + i * bytes, w_.dtype, pads_.data() + (i * 2 + 1) * width_, w_.D);
  }
  const int64_t of_rows = 2 * rel_h_.size - 1, of_columns = 2 * rel_w_.size - 1;
  for (int64_t r = 0; in_.need_tables && r < of_rows + of_columns; ++r) {
    char* to = r < of_rows ? image(out_.drel_h, r, w_.dtype) : image(out_.drel_w, r - of_rows, w_.dtype);
    write_row(to, w_.dtype, table_sums_.data() + r * width_, w_.D);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> relative_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rel_h, const Tensor& rel_w,
    const Tensor& pad_key, const Tensor& pad_value, const Tensor& /* out */, const Tensor& stats, int64_t window,
    double scale, bool need_tables) {
  const RelativeWindows w(q, window, scale, false);
  const auto like = [](const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); };
  const auto table = [&](const Tensor& x) { return need_tables ? like(x) : torch::stable::new_empty(x, shape({0})); };
  const Gradients grads{like(q), like(k), like(v), table(rel_h), table(rel_w), like(pad_key), like(pad_value)};
  if (q.numel() == 0) {
    for (const Tensor* x :
         {&grads.dq, &grads.dk, &grads.dv, &grads.drel_h, &grads.drel_w, &grads.dpad_key, &grads.dpad_value}) {
      Tensor zeros = *x;
      torch::stable::zero_(zeros);
    }
  } else {
    const Tensor by_head = torch::stable::view(torch::stable::contiguous(dout), shape({w.B, w.H, w.W, w.heads, w.D}));
    const Inputs in{
        Tokens(by_head), Tokens(q), Tokens(k), Tokens(v), pad_key, pad_value, torch::stable::contiguous(stats),
        need_tables};
    const TableRows of_rows(w, rel_h, w.height), of_columns(w, rel_w, w.width);
    Backward(w, in, grads, of_rows, of_columns).run();
  }
  return {grads.dq, grads.dk, grads.dv, grads.drel_h, grads.drel_w, grads.dpad_key, grads.dpad_value};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("relative_attention_backward.cpu", FASTCSS_BOX(&fastcss::cpu::relative_attention_backward));
}
