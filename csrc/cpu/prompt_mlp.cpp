// fastcss::prompt_mlp.cpu and its backward. Commonly each class has one row: every weight is read once for two FLOPs,
// and memory is the limit. Rows of the same class share the read; each row is summed in the same order alone and with
// others.

#include <tuple>
#include <utility>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "prompt_mlp";
constexpr int64_t kAtOnce = 4;  // rows of weights: four reads of memory are in flight, and the sums are stored once

// Holds the rows that ask for the same class.
struct Group {
  int64_t index;
  std::vector<int64_t> rows;
};

std::vector<Group> groups_of(const Tensor& index, int64_t classes) {
  const int64_t* of = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t stride = index.stride(0);
  std::vector<int64_t> place(classes, -1);
  std::vector<Group> groups;
  for (int64_t r = 0; r < index.size(0); ++r) {
    const int64_t k = of[r * stride];
    STD_TORCH_CHECK(k >= -1 && k < classes, kOp, ": index must be at least -1 and below K = ", classes, ", got ", k);
    if (k < 0) continue;
    if (place[k] < 0) place[k] = groups.size(), groups.push_back({k, {}});
    groups[place[k]].rows.push_back(r);
  }
  return groups;
}

Matrix weights_of(const Tensor& w, int64_t k) { return matrix(w, 1, 2, kOp).offset(k * w.stride(0)); }

// sum [n] += Σ_l x[l] w[l], with `terms` ≤ kAtOnce rows w.
template <class V, class T>
FASTCSS_INLINE void add_rows(const float* x, int64_t terms, const T* w, int64_t ld, int64_t n, float* sum) {
  constexpr int kWide = kLanesIn<V>;
  if (terms == kAtOnce) {
    int64_t i = 0;
    for (; i + kWide <= n; i += kWide) {
      V total = load<V>(sum + i);
      for (int64_t l = 0; l < kAtOnce; ++l) total += x[l] * load<V>(w + l * ld + i);
      store(sum + i, total);
    }
    if (i < n) {
      V total = load<V>(sum + i, n - i);
      for (int64_t l = 0; l < kAtOnce; ++l) total += x[l] * load<V>(w + l * ld + i, n - i);
      store(sum + i, total, n - i);
    }
    return;
  }
  for (int64_t l = 0; l < terms; ++l)
    for (int64_t i = 0; i < n; i += kWide) {
      const int64_t lanes = std::min<int64_t>(kWide, n - i);
      store(sum + i, load<V>(sum + i, lanes) + x[l] * load<V>(w + l * ld + i, lanes), lanes);
    }
}

void add_weighted(const float* x, int64_t terms, Matrix w, int64_t n, float* sum) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    if (w.dtype == DType::f32)
      add_rows<V>(x, terms, static_cast<const float*>(w.data), w.lane_stride, n, sum);
    else if (w.dtype == DType::bf16)
      add_rows<V>(x, terms, static_cast<const BFloat16*>(w.data), w.lane_stride, n, sum);
    else
      add_rows<V>(x, terms, static_cast<const Float16*>(w.data), w.lane_stride, n, sum);
  });
}

FASTCSS_CLONES void relu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < 0 ? 0.f : x[i];  // NaN stays
}

// Returns weights whose rows are contiguous; copies them if they are not.
Tensor with_rows(const Tensor& w) { return w.size(2) <= 1 || w.stride(2) == 1 ? w : torch::stable::contiguous(w); }

// out [R][N] = x [R][L] · w [L][N] + b for every group's rows, a share of the columns at a time.
void layer(const std::vector<Group>& groups, const float* x, const Tensor& w, const Tensor& b, float* out) {
  const int64_t L = w.size(1), N = w.size(2), count = groups.size();
  const int64_t wanted = ceil_div(2 * torch::stable::get_num_threads(), std::max<int64_t>(count, 1));
  const int64_t columns = std::max<int64_t>(ceil_div(ceil_div(N, wanted), kCols), 1) * kCols,
                shares = ceil_div(N, columns);
  parallel(count * shares, [&](int64_t item) {
    const Group& group = groups[item / shares];
    const int64_t first = item % shares * columns, n = std::min(columns, N - first);
    const Matrix weights = weights_of(w, group.index).at(0, first);
    for (int64_t r : group.rows) read_row(out + r * N + first, matrix(b, 0, 1, kOp).at(group.index, first), n);
    for (int64_t l = 0; l < L; l += kAtOnce)
      for (int64_t r : group.rows)
        add_weighted(x + r * L + l, std::min(kAtOnce, L - l), weights.at(l, 0), n, out + r * N + first);
  });
}

std::tuple<Tensor, Tensor> prompt_mlp(const Tensor& z, const Tensor& w1_in, const Tensor& b1, const Tensor& w2_in,
                                      const Tensor& b2, const Tensor& index) {
  const Tensor w1 = with_rows(w1_in), w2 = with_rows(w2_in);
  const int64_t R = z.size(0), L = w1.size(1), H = w1.size(2), O = w2.size(2);
  const std::vector<Group> groups = groups_of(index, w1.size(0));
  const DType dtype = dtype_of(z, kOp);
  Tensor y = torch::stable::new_empty(z, shape({R, O}));
  Tensor hidden = torch::stable::new_empty(z, shape({R, H}), ScalarType::Float);
  float* h = static_cast<float*>(hidden.mutable_data_ptr());
  float* x = shared_workspace.get(R * (L + O));
  float* out = x + R * L;
  std::fill_n(h, R * H, 0.f);
  std::fill_n(out, R * O, 0.f);
  for (int64_t r = 0; r < R; ++r) read_row(x + r * L, matrix(z, 0, 1, kOp).at(r, 0), L);
  layer(groups, x, w1, b1, h);
  relu(h, R * H);
  layer(groups, h, w2, b2, out);
  for (int64_t r = 0; r < R; ++r) write_row(image(y, r, dtype), dtype, out + r * O, O);
  return {y, hidden};
}

// Goes back through one layer: dx = dout wᵀ and, if `dw` is given, dw = xᵀ dout, a block of the rows of w at a time.
void layer_backward(const std::vector<Group>& groups, const float* dout, const float* x, const Tensor& w, float* dx,
                    const Tensor* dw) {
  constexpr int64_t kRows = 64;
  const int64_t L = w.size(1), N = w.size(2), blocks = ceil_div(L, kRows);
  const DType dtype = dtype_of(w, kOp);
  parallel(static_cast<int64_t>(groups.size()) * blocks, [&](int64_t item) {
    const Group& group = groups[item / blocks];
    float* row = local_workspace.get(N);
    for (int64_t l = item % blocks * kRows; l < std::min(L, (item % blocks + 1) * kRows); ++l) {
      if (dx) {
        read_row(row, weights_of(w, group.index).at(l, 0), N);
        for (int64_t r : group.rows) dx[r * L + l] = dot(row, dout + r * N, N);
      }
      if (!dw) continue;
      std::fill_n(row, N, 0.f);
      for (int64_t r : group.rows) add_scaled(row, x[r * L + l], dout + r * N, N);
      write_row(image(*dw, group.index, dtype) + l * N * size_of(dtype), dtype, row, N);
    }
  });
}

void bias_backward(const std::vector<Group>& groups, const float* dout, const Tensor& db) {
  const int64_t N = db.size(1);
  const DType dtype = dtype_of(db, kOp);
  parallel(groups.size(), [&](int64_t g) {
    float* sum = local_workspace.get(N);
    std::fill_n(sum, N, 0.f);
    for (int64_t r : groups[g].rows) add_scaled(sum, 1.f, dout + r * N, N);
    write_row(image(db, groups[g].index, dtype), dtype, sum, N);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_mlp_backward(const Tensor& dy, const Tensor& z,
                                                                       const Tensor& w1, const Tensor& w2,
                                                                       const Tensor& index, const Tensor& hidden,
                                                                       bool need_dz, bool need_weights) {
  const int64_t R = z.size(0), K = w1.size(0), L = w1.size(1), H = w1.size(2), O = w2.size(2);
  const std::vector<Group> groups = groups_of(index, K);
  const DType dtype = dtype_of(z, kOp);
  const auto weights = [&](std::vector<int64_t> sizes) {
    return torch::stable::new_zeros(z, need_weights ? sizes : shape({0}));
  };
  Tensor dw1 = weights({K, L, H}), db1 = weights({K, H}), dw2 = weights({K, H, O}), db2 = weights({K, O});
  Tensor dz = torch::stable::new_empty(z, need_dz ? shape({R, L}) : shape({0}));
  const float* h = static_cast<const float*>(hidden.const_data_ptr());
  float* dout = shared_workspace.get(R * (O + H + 2 * L));
  float *dh = dout + R * O, *x = dh + R * H, *dx = x + R * L;
  std::fill_n(dx, R * L, 0.f);
  for (int64_t r = 0; r < R; ++r) {
    read_row(dout + r * O, matrix(dy, 0, 1, kOp).at(r, 0), O);
    read_row(x + r * L, matrix(z, 0, 1, kOp).at(r, 0), L);
  }
  layer_backward(groups, dout, h, w2, dh, need_weights ? &dw2 : nullptr);
  for (const Group& group : groups)
    for (int64_t i : group.rows)
      for (int64_t j = 0; j < H; ++j) dh[i * H + j] = h[i * H + j] <= 0 ? 0.f : dh[i * H + j];
  layer_backward(groups, dh, x, w1, need_dz ? dx : nullptr, need_weights ? &dw1 : nullptr);
  if (need_weights) bias_backward(groups, dout, db2), bias_backward(groups, dh, db1);
  for (int64_t r = 0; need_dz && r < R; ++r) write_row(image(dz, r, dtype), dtype, dx + r * L, L);
  return {dz, dw1, db1, dw2, db2};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("prompt_mlp.cpu", FASTCSS_BOX(&fastcss::cpu::prompt_mlp));
  m.impl("prompt_mlp_backward.cpu", FASTCSS_BOX(&fastcss::cpu::prompt_mlp_backward));
}
