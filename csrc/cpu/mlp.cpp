// fastcss::mlp.cpu: x + W₂ gelu(W₁ norm(x) + b₁) + b₂, a block of rows at a time. What lies between the two products,
// in a transformer four times as wide as x, stays in the second-level cache.
//
// Rows of x are on the SIMD lanes: what the first product gives is then what the second one reads, without a transpose.
// float32 is computed as it is. bfloat16 is read as pairs, norm and GELU are float32, the normalized rows and the
// hidden activations are rounded once, and all sums are float32.

#include <cmath>
#include <optional>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "tensors.h"
#include "vector_math_v4.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "mlp";
constexpr int64_t kChunk = 504;  // words of hidden units at a time: whole panels of any kernel().rows

// ---- activation ----------------------------------------------------------------------------------------------------

// hidden [units][kCols] = gelu(sums [units][kCols] + bias [units]) over the first `lanes`
void activate(const float* sums, const float* bias, int units, int lanes, float* hidden) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int i = 0; i < units; ++i)
      for (int lane = 0; lane < lanes; lane += kLanesIn<V>)
        store(hidden + i * kCols + lane, Gelu::of(load<V>(sums + i * kCols + lane) + bias[i]));
  });
}

#if defined(__x86_64__)
// The same into words of two units: hidden [⌈units / 2⌉][kCols]
void activate_pairs(const float* sums, const float* bias, int units, int lanes, float* hidden) {
  on_pairs([=]<class V>() FASTCSS_LOOP {
    const auto unit = [=](int i, int lane) FASTCSS_LOOP {
      return i < units ? RoughGelu::of(load<V>(sums + i * kCols + lane) + bias[i]) : V{};
    };
    for (int i = 0; i < units; i += 2)
      for (int lane = 0; lane < lanes; lane += kLanes)
        store(hidden + i / 2 * kCols + lane, join_pairs(unit(i, lane), unit(i + 1, lane)));
  });
}
#else
constexpr auto activate_pairs = activate;  // there are no pairs
#endif

// ---- norm and residual ---------------------------------------------------------------------------------------------

struct Norm {
  std::vector<float> weight, bias;
  float eps;
};

template <class V>
FASTCSS_INLINE float sum_of(V v) {
  float sum = 0;
  for (int i = 0; i < kLanesIn<V>; ++i) sum += v[i];
  return sum;
}

template <class T>
void normalize(const float* x, const Norm& norm, T* out) {
  on_widest([&]<class V>() FASTCSS_LOOP {
    constexpr int64_t kWide = kLanesIn<V>;
    const int64_t n = static_cast<int64_t>(norm.weight.size()), whole = n / kWide * kWide;
    V sums{}, squares{};
    for (int64_t i = 0; i < whole; i += kWide) sums += load<V>(x + i);
    float sum = sum_of(sums), square = 0;
    for (int64_t i = whole; i < n; ++i) sum += x[i];
    const float mean = sum / n;
    for (int64_t i = 0; i < whole; i += kWide) {
      const V difference = load<V>(x + i) - mean;
      squares += difference * difference;
    }
    square = sum_of(squares);
    for (int64_t i = whole; i < n; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.f / std::sqrt(square / n + norm.eps);
    const auto normalized = [&](V v, V weight, V bias) FASTCSS_LOOP { return (v - mean) * scale * weight + bias; };
    const float *weight = norm.weight.data(), *bias = norm.bias.data();
    for (int64_t i = 0; i < whole; i += kWide)
      store(out + i, normalized(load<V>(x + i), load<V>(weight + i), load<V>(bias + i)));
    if (const int64_t rest = n - whole)
      store(out + whole,
            normalized(load<V>(x + whole, rest), load<V>(weight + whole, rest), load<V>(bias + whole, rest)), rest);
  });
}

// out [rows][n] = x + bias + sums [n][kCols], whose rows are on the lanes
template <class T>
void add_to_rows(const T* x, const float* bias, const float* sums, int rows, int64_t n, T* out) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    constexpr int kWide = kLanesIn<V>;
    for (int64_t column = 0; column < n; column += kWide)
      for (int row = 0; row < rows; row += kWide) {
        const int64_t count = std::min<int64_t>(kWide, n - column);
        V block[kWide];
#pragma GCC unroll 16
        for (int j = 0; j < kWide; ++j) block[j] = j < count ? load<V>(sums + (column + j) * kCols + row) : V{};
        transpose(block);
        const V shift = count == kWide ? load<V>(bias + column) : load<V>(bias + column, count);
#pragma GCC unroll 16
        for (int i = 0; i < kWide; ++i) {
          if (row + i == rows) break;
          const int64_t at = (row + i) * n + column;
          if (count == kWide)
            store(out + at, load<V>(x + at) + (block[i] + shift));
          else
            store(out + at, load<V>(x + at, count) + (block[i] + shift), count);
        }
      }
  });
}

// ---- the products --------------------------------------------------------------------------------------------------

std::vector<float> as_float(const Tensor& t) {
  std::vector<float> values(t.numel());
  read_row(values.data(), matrix(t, 0, 0, kOp), t.numel());
  return values;
}

// A weight [N, K] packed as rows of a product, in chunks of its terms, and its bias.
class Layer {
 public:
  Layer(const Tensor& weight, const std::optional<Tensor>& bias, bool pairs, int64_t chunk)
      : bias(bias ? as_float(*bias) : std::vector<float>(weight.size(0))),
        weight_(matrix(weight, 0, 1, kOp)),
        rows_(weight.size(0)),
        terms_(weight.size(1)),
        chunk_(chunk),
        pairs_(pairs) {}

  const std::vector<float> bias;

  int64_t panels() const { return ceil_div(rows_, kernel().rows); }
  int rows(int64_t p) const { return static_cast<int>(std::min<int64_t>(kernel().rows, rows_ - p * kernel().rows)); }
  int64_t chunks() const { return std::max<int64_t>(1, ceil_div(terms_, chunk_)); }
  int64_t terms(int64_t chunk) const { return std::min(chunk_, terms_ - chunk * chunk_); }
  int64_t words(int64_t chunk) const { return ceil_div(terms(chunk), 1 + pairs_); }
  const float* panel(int64_t chunk, int64_t p) const { return packed_ + (chunk * panels() + p) * panel_size(); }

  int64_t panel_size() const { return words(0) * kernel().rows + kLanes; }  // pack() writes whole vectors
  int64_t packed_size() const { return chunks() * panels() * panel_size(); }
  void pack(float* to) {
    packed_ = to;
    parallel(panels(), [&](int64_t p) {
      for (int64_t c = 0; c < chunks(); ++c)
        cpu::pack(to + (c * panels() + p) * panel_size(), kernel().rows, rows(p), terms(c),
                  weight_.at(p * kernel().rows, c * chunk_), pairs_);
    });
  }

 private:
  Matrix weight_;
  int64_t rows_, terms_, chunk_;
  bool pairs_;
  const float* packed_ = nullptr;
};

class Mlp {
 public:
  Mlp(int64_t rows, DType dtype, const Norm& norm, const Layer& first, const Layer& second)
      : M(rows),
        K(static_cast<int64_t>(norm.weight.size())),
        dtype_(dtype),
        norm_(norm),
        first_(first),
        second_(second) {}

  void run(const void* x, void* out) const {
    const int64_t panels = ceil_div(M, kCols), threads = torch::stable::get_num_threads();
    const int64_t most = std::max<int64_t>(1, kCached / panel_size());
    const int64_t blocks = std::min(panels, ceil_div(ceil_div(panels, most), threads) * threads);
    parallel(blocks, [&](int64_t b) {
      const int64_t first = panels * b / blocks, last = panels * (b + 1) / blocks;
      block(first, last - first, x, out);
    });
  }

 private:
  static constexpr int64_t kCached = 220 << 10;  // floats of a block, most of a second-level cache of 1 MiB

  struct Panel {      // kCols rows of x
    int rows, lanes;  // lanes: of the vectors that hold them
    float* normed;    // [word of K][kCols]
    float* hidden;    // [word of a chunk][kCols]
    float* sums;      // [K][kCols]
  };
  int64_t normed_size() const { return first_.words(0) * kCols + kLanes; }
  int64_t hidden_size() const { return second_.words(0) * kCols; }
  int64_t panel_size() const { return normed_size() + hidden_size() + K * kCols; }

  void block(int64_t first, int64_t count, const void* x, void* out) const {
    const int64_t width = size_of(dtype_) * K;
    float* memory = local_workspace.get(count * panel_size() + kLanes * K + K);
    std::vector<Panel> panels;
    for (int64_t p = first; p < first + count; ++p, memory += panel_size()) {
      const int rows = static_cast<int>(std::min<int64_t>(kCols, M - p * kCols));
      panels.push_back({rows, rows > kLanes ? kCols : kLanes, memory, memory + normed_size(),
                        memory + normed_size() + hidden_size()});
    }
    for (int64_t p = 0; p < count; ++p)
      read(static_cast<const char*>(x) + (first + p) * kCols * width, panels[p], memory);
    for (int64_t chunk = 0; chunk < second_.chunks(); ++chunk) multiply(chunk, panels);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at = (first + p) * kCols * width;
      write(static_cast<const char*>(x) + at, panels[p], static_cast<char*>(out) + at);
    }
  }
  void read(const char* x, const Panel& panel, float* scratch) const;
  void multiply(int64_t chunk, const std::vector<Panel>& panels) const;
  void write(const char* x, const Panel& panel, char* out) const;

  const int64_t M, K;
  const DType dtype_;
  const Norm& norm_;
  const Layer &first_, &second_;
};

void Mlp::read(const char* x, const Panel& panel, float* scratch) const {
  float *row = scratch, *normalized = row + K;
  for (int first = 0; first < panel.rows; first += kLanes) {
    const int rows = std::min(kLanes, panel.rows - first);
    for (int i = 0; i < rows; ++i) {
      read_row(row, Matrix{x, dtype_, K, 1}.at(first + i, 0), K);
      if (dtype_ == DType::f32)
        normalize(row, norm_, normalized + i * K);
      else
        normalize(row, norm_, reinterpret_cast<BFloat16*>(normalized) + i * K);
    }
    pack(panel.normed + first, kCols, rows, K, Matrix{normalized, dtype_, K, 1}, dtype_ == DType::bf16);
  }
}

void Mlp::multiply(int64_t chunk, const std::vector<Panel>& panels) const {
  const bool pairs = dtype_ == DType::bf16;
  const Kernel& tile = pairs ? *pair_kernel() : kernel();
  const int64_t units = kChunk * (1 + pairs), first_panel = chunk * units / tile.rows;
  alignas(64) static const float zeros[kCols] = {};
  alignas(64) float sums[kMaxRows * kCols];
  const int64_t words = second_.words(chunk), end = std::min(first_panel + units / tile.rows, first_.panels());
  // While the first panel of rows meets a packed panel of a weight, the next one is fetched.
  const auto ahead = [&](const Layer& layer, const Panel& panel) {
    return &panel == &panels.front() ? layer.panel_size() : 0;
  };
  for (int64_t p = first_panel; p < end; ++p)
    for (const Panel& panel : panels) {
      const int rows = first_.rows(p);
      tile(rows, panel.lanes, first_.words(0), first_.panel(0, p), panel.normed, kCols, zeros, 0, sums, kCols,
           ahead(first_, panel));
      float* hidden = panel.hidden + (p - first_panel) * tile.rows / (1 + pairs) * kCols;
      (pairs ? activate_pairs : activate)(sums, &first_.bias[p * tile.rows], rows, panel.lanes, hidden);
    }
  for (int64_t p = 0; p < second_.panels(); ++p)
    for (const Panel& panel : panels) {
      float* to = panel.sums + p * tile.rows * kCols;
      tile(second_.rows(p), panel.lanes, words, second_.panel(chunk, p), panel.hidden, kCols, chunk ? to : zeros,
           chunk ? kCols : 0, to, kCols, ahead(second_, panel));
    }
}

void Mlp::write(const char* x, const Panel& panel, char* out) const {
  const float* bias = second_.bias.data();
  if (dtype_ == DType::f32)
    add_to_rows(reinterpret_cast<const float*>(x), bias, panel.sums, panel.rows, K, reinterpret_cast<float*>(out));
  else
    add_to_rows(reinterpret_cast<const BFloat16*>(x), bias, panel.sums, panel.rows, K,
                reinterpret_cast<BFloat16*>(out));
}

Tensor mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& weight1,
           const std::optional<Tensor>& bias1, const Tensor& weight2, const std::optional<Tensor>& bias2) {
  const int64_t M = x.size(0), K = x.size(1), H = weight1.size(0);
  const DType dtype = dtype_of(x, kOp);
  const bool pairs = dtype == DType::bf16;
  STD_TORCH_CHECK(dtype == DType::f32 || (pairs && pair_kernel() != nullptr),
                  "mlp: the tensors must be float32, or bfloat16 on a CPU with AVX512-BF16");
  for (const Tensor* t : {&norm_weight, &norm_bias, &weight1, &weight2, bias1 ? &*bias1 : &x, bias2 ? &*bias2 : &x})
    STD_TORCH_CHECK(t->scalar_type() == x.scalar_type(), "mlp: the tensors must have one dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "mlp: x must be contiguous");
  STD_TORCH_CHECK(norm_weight.numel() == K && norm_bias.numel() == K && weight1.size(1) == K && weight2.size(0) == K &&
                      weight2.size(1) == H && (!bias1 || bias1->numel() == H) && (!bias2 || bias2->numel() == K),
                  "mlp: x, the norm and the layers do not fit together");
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const Norm norm{as_float(norm_weight), as_float(norm_bias), static_cast<float>(eps)};
  Layer first(weight1, bias1, pairs, std::max<int64_t>(1, K)), second(weight2, bias2, pairs, kChunk * (1 + pairs));
  float* weights = shared_workspace.get(first.packed_size() + second.packed_size());
  first.pack(weights), second.pack(weights + first.packed_size());
  Mlp(M, dtype, norm, first, second).run(x.const_data_ptr(), y.mutable_data_ptr());
  return y;
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("mlp.cpu", FASTCSS_BOX(&fastcss::cpu::mlp)); }
