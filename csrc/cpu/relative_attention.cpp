// fastcss::relative_attention.cpu: the scores of a panel of queries with some of the keys are made, weighed and used up
// in cache, and the softmax goes on from there to the next keys.

#include <cmath>
#include <tuple>

#include "parallel.h"
#include "relative_windows.h"

namespace fastcss::cpu {
namespace {

constexpr int64_t kPanels = 8;                 // of queries of an item of work, which share what is read of the keys
constexpr int64_t kPacked = int64_t{8} << 20;  // floats of packed keys and values at a time

struct Inputs {
  Tokens q, k, v;
  const Tensor &pad_key, &pad_value;
};

class Forward {
 public:
  Forward(const RelativeWindows& w, const Inputs& in, const RelativeTable& rel_h, const RelativeTable& rel_w,
          const Tensor& out, const Tensor& stats)
      : w_(w),
        in_(in),
        rel_h_(rel_h),
        rel_w_(rel_w),
        out_(out),
        stats_(stats),
        blocks_(ceil_div(w.n, kPanels * kCols)) {}

  void run() {
    const int64_t total = w_.B * w_.heads * w_.count(), each = packed_size();
    if (blocks_ == 1)  // keys that one item needs are packed where it finds them in its cache
      return parallel(total, [&](int64_t i) {
        float* memory = local_workspace.get(each + block_size());
        block(i, 0, pack(i, memory), memory + each);
      });
    const int64_t round = std::clamp<int64_t>(kPacked / each, 1, total);
    float* memory = shared_workspace.get(round * each);
    std::vector<PackedKeys> packed(round);
    for (int64_t first = 0; first < total; first += round) {
      const int64_t count = std::min(round, total - first);
      parallel(count, [&](int64_t i) { packed[i] = pack(first + i, memory + i * each); });
      parallel(count * blocks_, [&](int64_t i) {
        block(first + i / blocks_, i % blocks_, packed[i / blocks_], local_workspace.get(block_size()));
      });
    }
  }

 private:
  PackedKeys pack(int64_t index, float* memory) const {
    const auto [b, h, at] = place(index);
    float *keys = memory, *values = keys + keys_size(w_), *staged = values + values_size(w_);
    pack_keys(keys, w_, in_.k, in_.pad_key, b, h, at, staged);
    pack_values(values, w_, in_.v, in_.pad_value, b, h, at, staged);
    return {w_.n, w_.D, w_.width, w_.pairs, keys, values};
  }
  int64_t packed_size() const { return keys_size(w_) + values_size(w_) + w_.staged_size(kChunk); }
  std::tuple<int64_t, int64_t, OnMap> place(int64_t index) const {
    const int64_t window = index / w_.heads;  // the heads of a token lie side by side
    return {window / w_.count(), index % w_.heads, w_.on_map(window % w_.count())};
  }

  // A panel's queries, bias and result, and the largest score and the sum of each lane.
  int64_t panel_size() const { return (2 * w_.D + w_.height + w_.width + 2) * kCols + kLanes; }
  int64_t block_size() const { return kPanels * panel_size() + kChunk * kCols + scratch_size(); }
  int64_t scratch_size() const {
    return std::max({rel_h_.scratch_size(), rel_w_.scratch_size(), w_.staged_size(kCols)});
  }
  void block(int64_t index, int64_t block, const PackedKeys& keys, float* memory) const;
  QueryPanel begin(int64_t b, int64_t h, const OnMap& at, int64_t first, float* memory, float* scratch) const;
  void finish(int64_t b, int64_t h, const OnMap& at, int64_t first, const QueryPanel& panel) const;

  const RelativeWindows& w_;
  const Inputs& in_;
  const RelativeTable &rel_h_, &rel_w_;
  const Tensor &out_, &stats_;
  const int64_t blocks_;
};

void Forward::block(int64_t index, int64_t block, const PackedKeys& keys, float* memory) const {
  const auto [b, h, at] = place(index);
  float *scores = memory + kPanels * panel_size(), *scratch = scores + kChunk * kCols;
  const int64_t first = block * kPanels * kCols, count = std::min(kPanels * kCols, at.tokens() - first);
  QueryPanel panels[kPanels];
  const int64_t used = count > 0 ? ceil_div(count, kCols) : 0;
  for (int64_t p = 0; p < used; ++p) panels[p] = begin(b, h, at, first + p * kCols, memory + p * panel_size(), scratch);
  const bool fetches = blocks_ == 1 && index + 1 < w_.B * w_.count() * w_.heads;
  const auto [next_b, next_h, next_at] = place(fetches ? index + 1 : index);
  for (int64_t chunk = 0; chunk < keys.chunks(); ++chunk)
    for (int64_t p = 0; p < used; ++p) {
      for (const Tokens* x : {&in_.q, &in_.k, &in_.v})  // while this window is computed, the next arrives
        if (fetches) w_.fetch(*x, next_b, next_h, next_at, chunk * used + p, keys.chunks() * used);
      attend(keys, chunk, panels[p], w_.scale, scores);
    }
  for (int64_t p = 0; p < used; ++p) finish(b, h, at, first + p * kCols, panels[p]);
}

QueryPanel Forward::begin(int64_t b, int64_t h, const OnMap& at, int64_t first, float* memory, float* scratch) const {
  float *queries = memory, *bias_h = queries + w_.D * kCols + kLanes, *bias_w = bias_h + w_.height * kCols;
  float *out = bias_w + w_.width * kCols, *most = out + w_.D * kCols, *sum = most + kCols;
  const int lanes = static_cast<int>(std::min<int64_t>(kCols, at.tokens() - first));
  w_.read_queries(scratch, in_.q, b, h, at, first, lanes);
  cpu::pack(queries, kCols, kCols, w_.D, {scratch, w_.staged(), w_.D, 1}, w_.pairs);
  int64_t row[kCols], column[kCols];
  for (int lane = 0; lane < kCols; ++lane) {
    const int64_t token = first + std::min(lane, lanes - 1);
    row[lane] = token / at.width, column[lane] = token % at.width;
  }
  rel_h_.bias(bias_h, queries, row, scratch), rel_w_.bias(bias_w, queries, column, scratch);
  std::fill_n(out, w_.D * kCols, 0.f), std::fill_n(sum, kCols, 0.f), std::fill_n(most, kCols, -__builtin_inff());
  return {lanes, queries, bias_h, bias_w, out, most, sum};
}

void Forward::finish(int64_t b, int64_t h, const OnMap& at, int64_t first, const QueryPanel& panel) const {
  float share[kCols];
  for (int lane = 0; lane < kCols; ++lane) share[lane] = 1.f / panel.sum[lane];
  for (int64_t d = 0; d < w_.D; ++d)
    for (int lane = 0; lane < kCols; ++lane) panel.out[d * kCols + lane] *= share[lane];
  float* stats = static_cast<float*>(stats_.mutable_data_ptr()) + (b * w_.heads + h) * w_.H * w_.W * 2;
  w_.for_runs(at, first, panel.lanes, [&](int lane, int run, int64_t row, int64_t column) {
    const int64_t token = (at.top + row) * w_.W + at.left + column, ld = w_.heads * w_.D;
    write_transposed(image(out_, b, w_.dtype) + (token * ld + h * w_.D) * size_of(w_.dtype), w_.dtype, ld, run, w_.D,
                     panel.out + lane);
    for (int i = 0; i < run; ++i) {
      stats[(token + i) * 2] = panel.most[lane + i];
      stats[(token + i) * 2 + 1] = std::log(panel.sum[lane + i]);
    }
  });
}

std::tuple<Tensor, Tensor> relative_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rel_h,
                                              const Tensor& rel_w, const Tensor& pad_key, const Tensor& pad_value,
                                              int64_t window, double scale) {
  const RelativeWindows w(q, window, scale, true);
  Tensor out = torch::stable::new_empty(q, shape({w.B, w.H, w.W, w.heads * w.D}));
  Tensor stats = torch::stable::new_empty(q, shape({w.B, w.heads, w.H, w.W, 2}), ScalarType::Float);
  if (stats.numel() > 0) {
    const RelativeTable of_rows(w, rel_h, w.height), of_columns(w, rel_w, w.width);
    const Inputs in{Tokens(q), Tokens(k), Tokens(v), pad_key, pad_value};
    Forward(w, in, of_rows, of_columns, out, stats).run();
  }
  return {out, stats};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("relative_attention.cpu", FASTCSS_BOX(&fastcss::cpu::relative_attention));
}
