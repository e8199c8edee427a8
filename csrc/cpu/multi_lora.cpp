// fastcss::multi_lora.cpu and its backward: checks, operand roles and the adapters' gradients around LoraGemm.

#include <optional>
#include <tuple>

#include "lora_gemm.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "multi_lora";

// The adapters as the kernels want them: which one each slot runs, and where it keeps its hidden activations.
struct Route {
  std::vector<Adapter> adapter;  // of each slot
  std::vector<int64_t> slot_adapter;
  std::vector<Adapter> all;
  std::vector<float> scale;  // of each slot
  std::vector<int64_t> hidden_slot;
  int64_t hidden_ld, ranks = 0;
};

Route route(const Tensor& offsets, const Tensor& scales, const std::optional<Tensor>& index, int64_t rows_of_a,
            int64_t rows, int64_t max_rank) {
  Route r;
  const int64_t count = scales.size(0);
  const auto* offset = static_cast<const int32_t*>(offsets.const_data_ptr());
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  const bool spans = offsets.dim() == 2;  // [T, 2]: the rows of each adapter, anywhere in a and b
  STD_TORCH_CHECK((spans ? offsets.size(0) == count && offsets.size(1) == 2 : offsets.size(0) == count + 1) &&
                      offsets.scalar_type() == ScalarType::Int && scales.scalar_type() == ScalarType::Float,
                  "multi_lora: offsets must be int32 [T + 1] or [T, 2], and scales float32 [T]");
  const int64_t to_end = offsets.stride(spans ? 1 : 0);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t first = offset[t * offsets.stride(0)], end = offset[t * offsets.stride(0) + to_end];
    STD_TORCH_CHECK(spans || (first == r.ranks && end >= first && end - first <= max_rank),
                    "multi_lora: offsets must be the running sum of the ranks, none above max_rank ", max_rank);
    r.all.push_back({first, end - first});
    r.ranks = spans ? rows_of_a : end;
  }
  r.hidden_ld = index ? max_rank : r.ranks;
  const int64_t slots = index ? index->size(0) : count;
  for (int64_t s = 0; s < slots; ++s) {
    int64_t t = s;
    if (index) {
      const char* at = static_cast<const char*>(index->const_data_ptr());
      t = index->scalar_type() == ScalarType::Int ? reinterpret_cast<const int32_t*>(at)[s * index->stride(0)]
                                                  : reinterpret_cast<const int64_t*>(at)[s * index->stride(0)];
      STD_TORCH_CHECK(t >= -1 && t < count, "multi_lora: index must be in [-1, ", count, "), got ", t);
    }
    r.slot_adapter.push_back(t);
    STD_TORCH_CHECK(t < 0 || (r.all[t].first >= 0 && r.all[t].rank >= 0 && r.all[t].rank <= max_rank &&
                              r.all[t].first + r.all[t].rank <= rows_of_a),
                    "multi_lora: adapter ", t, " has no rows in a and b, or more than max_rank ", max_rank);
    r.adapter.push_back(t < 0 ? Adapter{0, 0} : r.all[t]);
    r.scale.push_back(t < 0 ? 0.f : scale[t * scales.stride(0)]);
    r.hidden_slot.push_back(index ? s * rows * max_rank : r.all[t].first);
  }
  return r;
}

LoraProblem problem(Fan fan, const Route& r, const Tensor& rows, Matrix weight, int64_t N, Matrix a, Matrix b,
                    bool stacked) {
  const int64_t dims = rows.dim();
  Matrix row_matrix = matrix(rows, dims - 2, dims - 1, kOp);
  if (dims == 3 && rows.size(1) == 1)
    row_matrix.lane_stride = rows.stride(0);  // the stride of a single row means nothing
  return {.fan = fan,
          .slots = static_cast<int64_t>(r.adapter.size()),
          .M = rows.size(dims - 2),
          .K = rows.size(dims - 1),
          .N = N,
          .rows = row_matrix,
          .rows_slot = dims == 3 ? rows.stride(0) : 0,
          .weight = weight,
          .a = a,
          .b = b,
          .ranks = r.ranks,
          .adapter = r.adapter,
          .stacked = stacked,
          .scale = r.scale,
          .bias = std::vector<float>(ceil_div(N, kCols) * kCols),
          .out = nullptr,
          .out_dtype = dtype_of(rows, kOp),
          .hidden = nullptr,
          .hidden_slot = r.hidden_slot,
          .hidden_ld = r.hidden_ld};
}

// Slots that are shorter than a panel share panels, which are packed in one go. So their rows must all be one stride
// apart; this copies them if they are not.
Tensor even_rows(const Tensor& t) {
  const bool even = t.dim() == 2 || t.size(1) == 1 || t.size(1) >= kMaxRows || t.stride(0) == t.size(1) * t.stride(1);
  return even ? t : torch::stable::contiguous(t);
}

Tensor hidden_like(const Tensor& x, const Route& r, bool indexed, int64_t rows, int64_t max_rank) {
  const int64_t slots = static_cast<int64_t>(r.adapter.size());
  const auto sizes = indexed ? shape({slots, rows, max_rank}) : shape({rows, r.ranks});
  Tensor hidden = torch::stable::new_empty(x, sizes, ScalarType::Float);
  return indexed ? torch::stable::zero_(hidden) : hidden;  // columns beyond a slot's own rank are not written
}

std::tuple<Tensor, Tensor> multi_lora(const Tensor& x_any, const Tensor& weight, const std::optional<Tensor>& bias,
                                      const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& scales,
                                      const std::optional<Tensor>& index, int64_t max_rank, bool save_h) {
  const Tensor x = even_rows(x_any);
  const bool shared = x.dim() == 2;
  const int64_t rows = x.size(x.dim() - 2), N = weight.size(0);
  const Route r = route(offsets, scales, index, a.size(0), rows, max_rank);
  const int64_t slots = static_cast<int64_t>(r.adapter.size());
  STD_TORCH_CHECK(a.size(0) == r.ranks && b.size(0) == r.ranks && b.size(1) == N && a.size(1) == weight.size(1) &&
                      x.size(x.dim() - 1) == weight.size(1) && (!bias || bias->size(0) == N),
                  "multi_lora: x, weight, bias, lora_a and lora_b do not fit together");
  STD_TORCH_CHECK(shared || x.size(0) == slots, "multi_lora: x must have one slot for each of ", slots, " adapters");

  LoraProblem g = problem(shared ? Fan::kOut : Fan::kEach, r, x, matrix(weight, 0, 1, kOp), N, matrix(a, 0, 1, kOp),
                          matrix(b, 1, 0, kOp), !index.has_value() && offsets.dim() == 1);
  Tensor y = torch::stable::new_empty(x, shape({slots, rows, N}));
  Tensor h = save_h ? hidden_like(x, r, index.has_value(), rows, max_rank)
                    : torch::stable::new_empty(x, shape({0}), ScalarType::Float);
  for (int64_t c = 0; bias && c < N; c += kCols)
    pack(&g.bias[c], kCols, static_cast<int>(std::min<int64_t>(kCols, N - c)), 1, matrix(*bias, 0, 0, kOp).at(c, 0));
  g.out = y.mutable_data_ptr();
  g.hidden = save_h ? static_cast<float*>(h.mutable_data_ptr()) : nullptr;
  LoraGemm(std::move(g)).run();
  return {y, h};
}

// One adapter's gradient: Σ over its slots of leftᵀ · right, left [M, rank] float32 and right [M, columns].
struct Contraction {
  Adapter adapter;
  std::vector<std::pair<Matrix, Matrix>> parts;
};

// out[adapter rows] = Σ leftᵀ · right for every contraction; out is [Σr, columns] of `dtype`.
void contract(const std::vector<Contraction>& tasks, int64_t M, int64_t columns, void* out, DType dtype) {
  const Kernel& tile = kernel();
  const int height = tile.rows;
  const int64_t left_size = M * height + kLanes, column_panels = ceil_div(columns, kCols);

  struct Left {  // a packed panel of left: up to `height` ranks by M
    Matrix source;
    int count;
  };
  std::vector<Left> lefts;
  std::vector<int64_t> first_left;  // of each task
  for (const Contraction& task : tasks) {
    first_left.push_back(static_cast<int64_t>(lefts.size()));
    for (const auto& [left, right] : task.parts)
      for (int64_t i = 0; i < task.adapter.rank; i += height)
        lefts.push_back({left.at(i, 0), static_cast<int>(std::min<int64_t>(height, task.adapter.rank - i))});
  }
  float* left_packed = shared_workspace.get(static_cast<int64_t>(lefts.size()) * left_size);
  parallel(static_cast<int64_t>(lefts.size()),
           [&](int64_t i) { pack(left_packed + i * left_size, height, lefts[i].count, M, lefts[i].source); });

  parallel(static_cast<int64_t>(tasks.size()) * column_panels, [&](int64_t item) {
    const int64_t t = item / column_panels, column = item % column_panels * kCols;
    const Adapter adapter = tasks[t].adapter;
    const int cols = static_cast<int>(std::min<int64_t>(kCols, columns - column));
    float* right_packed = local_workspace.get(kDepth * kCols + adapter.rank * kCols);
    float* sum = right_packed + kDepth * kCols;
    std::fill_n(sum, adapter.rank * kCols, 0.f);
    int64_t left = first_left[t];
    for (const auto& [_, right] : tasks[t].parts) {
      for (int64_t row = 0; row < M; row += kDepth) {
        const int64_t depth = std::min(kDepth, M - row);
        pack(right_packed, kCols, cols, depth, right.at(column, row));
        for (int64_t i = 0; i * height < adapter.rank; ++i)
          tile(lefts[left + i].count, cols, depth, left_packed + (left + i) * left_size + row * height, right_packed,
               kCols, sum + i * height * kCols, kCols, sum + i * height * kCols, kCols);
      }
      left += ceil_div(adapter.rank, height);
    }
    char* to = static_cast<char*>(out) + (adapter.first * columns + column) * size_of(dtype);
    write(to, dtype, columns, static_cast<int>(adapter.rank), cols, sum);
  });
}

std::tuple<Tensor, Tensor, Tensor> multi_lora_backward(const Tensor& dy_any, const Tensor& x, const Tensor& weight,
                                                       const Tensor& a, const Tensor& b, const Tensor& offsets,
                                                       const Tensor& scales, const std::optional<Tensor>& index,
                                                       const Tensor& h_saved, int64_t max_rank, bool need_dx,
                                                       bool need_dlora) {
  const Tensor dy = even_rows(dy_any);
  const bool shared = x.dim() == 2, indexed = index.has_value();
  const int64_t M = dy.size(1), N = dy.size(2), K = weight.size(1);
  const Route r = route(offsets, scales, index, a.size(0), M, max_rank);
  const int64_t slots = static_cast<int64_t>(r.adapter.size());

  STD_TORCH_CHECK(!need_dlora || offsets.dim() == 1, "multi_lora: adapters given by spans [T, 2] get no gradients");
  // dx = dy W + g A with g = scale · dy Bᵀ: the same GEMM, W and the adapters turned round.
  Tensor dx = need_dx ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, shape({0}));
  Tensor g = torch::stable::new_empty(x, shape({0}), ScalarType::Float);
  LoraProblem input = problem(shared ? Fan::kIn : Fan::kEach, r, dy, matrix(weight, 1, 0, kOp), K, matrix(b, 0, 1, kOp),
                              matrix(a, 1, 0, kOp), !indexed && offsets.dim() == 1);
  if (need_dx && shared && slots == 0) torch::stable::zero_(dx);
  if (need_dx) input.out = dx.mutable_data_ptr();
  if (need_dlora) {
    g = hidden_like(x, r, indexed, M, max_rank);
    input.hidden = static_cast<float*>(g.mutable_data_ptr());
  }
  if (slots > 0) LoraGemm(std::move(input)).run();
  const auto none = shape({0});
  if (!need_dlora) return {dx, torch::stable::new_empty(a, none), torch::stable::new_empty(b, none)};

  Tensor h = h_saved;
  if (h.numel() == 0) {  // the forward pass did not keep them: the hidden activations alone are computed again
    const Tensor rows = even_rows(x);
    h = hidden_like(x, r, indexed, M, max_rank);
    LoraProblem again = problem(shared ? Fan::kOut : Fan::kEach, r, rows, matrix(weight, 0, 1, kOp), N,
                                matrix(a, 0, 1, kOp), matrix(b, 1, 0, kOp), !indexed);
    again.hidden = static_cast<float*>(h.mutable_data_ptr());
    LoraGemm(std::move(again)).run();
  }

  // dA = Σ gᵀ x and dBᵀ = Σ hᵀ dy over the slots of each adapter.
  const auto hidden_part = [&](const Tensor& hidden, int64_t s) {
    return Matrix{static_cast<const float*>(hidden.const_data_ptr()) + r.hidden_slot[s], DType::f32, 1, r.hidden_ld};
  };
  const auto slot_part = [&](const Tensor& t, int64_t s) {
    const int64_t dims = t.dim();
    return matrix(t, dims - 1, dims - 2, kOp).offset(dims == 3 ? s * t.stride(0) : 0);
  };
  std::vector<Contraction> for_a, for_b;
  if (shared && !indexed) {
    for_a.push_back({{0, r.ranks}, {{hidden_part(g, 0), slot_part(x, 0)}}});
  }
  for (size_t t = 0; t < r.all.size(); ++t) {
    Contraction ca{r.all[t], {}}, cb{r.all[t], {}};
    for (int64_t s = 0; s < slots; ++s) {
      if (r.slot_adapter[s] != static_cast<int64_t>(t)) continue;
      ca.parts.push_back({hidden_part(g, s), slot_part(x, s)});
      cb.parts.push_back({hidden_part(h, s), slot_part(dy, s)});
    }
    if (!shared || indexed) for_a.push_back(ca);
    for_b.push_back(cb);
  }
  Tensor da = torch::stable::new_empty(a, a.sizes()), db = torch::stable::new_empty(b, b.sizes());
  contract(for_a, M, K, da.mutable_data_ptr(), dtype_of(a, kOp));
  contract(for_b, M, N, db.mutable_data_ptr(), dtype_of(b, kOp));
  return {dx, da, db};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("multi_lora.cpu", FASTCSS_BOX(&fastcss::cpu::multi_lora));
  m.impl("multi_lora_backward.cpu", FASTCSS_BOX(&fastcss::cpu::multi_lora_backward));
}
