// fastcss::top_margin.cpu. One read of the logits gives the two largest of each pixel and Σ exp: it takes a few hundred
// pixels at a time, whose running values stay in the L1 cache while the classes go by.

#include <cmath>
#include <limits>
#include <tuple>

#include "parallel.h"
#include "rows.h"
#include "tensors.h"
#include "vector_math_v4.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "top_margin";
constexpr int64_t kPixels = 512;  // 2 KiB of each class at a time: whole pages stream, and the state is 10 KiB
constexpr float kLeast = -std::numeric_limits<float>::max();

template <class V>
FASTCSS_INLINE IntsOf<V> load_ints(const int32_t* p) {
  return reinterpret_cast<IntsOf<V>>(load<V>(reinterpret_cast<const float*>(p)));
}
template <class Ints>
FASTCSS_INLINE void store_ints(int32_t* p, Ints v) {
  std::memcpy(p, &v, sizeof(v));
}

// Holds for each pixel so far the largest logit and the next, their classes, and Σ exp(z − largest).
struct Running {
  float first[kPixels], second[kPixels], sum[kPixels];
  int32_t first_class[kPixels], second_class[kPixels];
};

// Some classes join the running values of as many pixels as V has lanes. Equal logits leave the lower class in front;
// NaN and ∞ are seen in the sum.
template <class V, class Math, int CLASSES, class T>
FASTCSS_INLINE void join(Running& r, int64_t i, int32_t c, const T* logits, int64_t class_stride, int64_t lanes) {
  using Ints = IntsOf<V>;
  V first = load<V>(r.first + i), second = load<V>(r.second + i), sum = load<V>(r.sum + i);
  Ints first_class = load_ints<V>(r.first_class + i), second_class = load_ints<V>(r.second_class + i);
#pragma GCC unroll 4
  for (int n = 0; n < CLASSES; ++n, ++c) {
    const T* at = logits + c * class_stride + i;
    __builtin_prefetch(at + CLASSES * class_stride);
    const V x = lanes == kLanesIn<V> ? load<V>(at) : load<V>(at, lanes);
    // Comparisons are written out where they are used: GCC does not keep a variable of comparisons in a mask register.
    const V lower = x > first ? first : x, upper = x > first ? x : first;
    const V e = Math::exp2((lower - upper) * kLog2e);
    const V rest = x > second ? x : second;
    const Ints here = c - Ints{}, rest_class = x > second ? here : second_class;
    sum = x > first ? sum * e + 1.f : sum + e;
    second_class = x > first ? first_class : rest_class;
    second = x > first ? first : rest;
    first_class = x > first ? here : first_class;
    first = upper;
  }
  store(r.first + i, first), store(r.second + i, second), store(r.sum + i, sum);
  store_ints(r.first_class + i, first_class), store_ints(r.second_class + i, second_class);
}

template <class V, class Math, class T>
FASTCSS_INLINE void run_classes(Running& r, const T* logits, int64_t C, int64_t class_stride, int64_t pixels) {
  constexpr int kAtOnce = 4, kWide = kLanesIn<V>;
  std::fill_n(r.first, kPixels, kLeast), std::fill_n(r.second, kPixels, kLeast), std::fill_n(r.sum, kPixels, 0.f);
  std::fill_n(r.first_class, kPixels, 0), std::fill_n(r.second_class, kPixels, 0);
  const int64_t whole = pixels / kWide * kWide;
  int32_t c = 0;
  for (; c + kAtOnce <= C; c += kAtOnce)
    for (int64_t i = 0; i < whole; i += kWide) join<V, Math, kAtOnce>(r, i, c, logits, class_stride, kWide);
  for (; c < C; ++c)
    for (int64_t i = 0; i < whole; i += kWide) join<V, Math, 1>(r, i, c, logits, class_stride, kWide);
  for (c = 0; whole < pixels && c < C; ++c) join<V, Math, 1>(r, whole, c, logits, class_stride, pixels - whole);
}

template <class T>
void run(Running& r, Matrix logits, int64_t C, int64_t pixels) {
  on_widest([=, &r]<class V>() FASTCSS_LOOP {
    run_classes<V, MathOf<V>>(r, static_cast<const T*>(logits.data), C, logits.k_stride, pixels);
  });
}
constexpr decltype(&run<float>) kRuns[] = {run<float>, run<BFloat16>, run<Float16>};

// Holds what the results of each pixel are made of.
struct Found {
  float true_logit[kPixels], rival_logit[kPixels];
  int64_t true_class[kPixels], rival_class[kPixels];
};

// Orders the logits of one pixel whose two largest are not both finite: NaN above all, then by size, then by class. The
// softmax is NaN if the largest is not finite.
void careful(Matrix logits, int64_t pixel, int64_t C, Running& r) {
  const auto above = [](float x, float y) { return x > y || (std::isnan(x) && !std::isnan(y)); };
  int32_t first = 0, second = -1;
  float largest = value_at(logits.at(pixel, 0)), next = 0, sum = 0;
  for (int32_t c = 1; c < C; ++c) {
    const float x = value_at(logits.at(pixel, c));
    if (above(x, largest))
      next = largest, second = first, largest = x, first = c;
    else if (second < 0 || above(x, next))
      next = x, second = c;
  }
  for (int64_t c = 0; c < C; ++c) sum += std::exp(value_at(logits.at(pixel, c)) - largest);
  r.first[pixel] = largest, r.second[pixel] = next, r.sum[pixel] = sum;
  r.first_class[pixel] = first, r.second_class[pixel] = second;
}

// true_class -1: the pixel is ignored; -2: its label is no class.
constexpr int64_t kIgnored = -1, kUnknown = -2;

void compare(Running& r, Matrix logits, int64_t C, const int64_t* labels, int64_t ignore_index, int64_t pixels,
             Found& found) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < pixels; ++i)
    if (!(r.sum[i] < kInfinity && r.first[i] < kInfinity && r.second[i] > kLeast)) careful(logits, i, C, r);
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t label = labels ? labels[i] : r.first_class[i];
    const bool leads = label == r.first_class[i], known = label >= 0 && label < C;
    found.rival_class[i] = leads ? r.second_class[i] : r.first_class[i];
    found.rival_logit[i] = leads ? r.second[i] : r.first[i];
    found.true_class[i] = labels && label == ignore_index ? kIgnored : known ? label : kUnknown;
    found.true_logit[i] = leads ? r.first[i] : known ? value_at(logits.at(i, label)) : 0.f;
  }
}

// margin, p_true, p_rival, curvature and p_first, each [kPixels]
void conclude(const Running& r, const Found& found, int64_t pixels, float (&result)[5][kPixels]) {
  on_widest([=, &r, &found, &result]<class V>() FASTCSS_LOOP {
    for (int64_t i = 0; i < pixels; i += kLanesIn<V>) {
      const V own = load<V>(found.true_logit + i), rival = load<V>(found.rival_logit + i);
      const V first = load<V>(r.first + i), sum = load<V>(r.sum + i);
      const V p = exp_negative(own - first) / sum, q = exp_negative(rival - first) / sum;
      const V values[5] = {own - rival, p, q, (p + q) - (p - q) * (p - q), 1.f / sum};
      for (int n = 0; n < 5; ++n) store(result[n] + i, values[n]);
    }
    for (int64_t i = 0; i < pixels; ++i) {
      if (found.true_class[i] >= 0) continue;
      for (auto& values : result) values[i] = found.true_class[i] == kIgnored ? 0.f : __builtin_nanf("");
    }
  });
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results top_margin(const Tensor& logits, const Tensor& labels_in, int64_t ignore_index) {
  const int64_t B = logits.size(0), C = logits.size(1), N = logits.size(2);
  const Tensor labels = torch::stable::contiguous(labels_in);
  const DType dtype = dtype_of(logits, kOp);
  const auto made = [&](ScalarType type) { return torch::stable::new_empty(logits, shape({B, N}), type); };
  Tensor floats[4] = {made(logits.scalar_type()), made(logits.scalar_type()), made(logits.scalar_type()),
                      made(logits.scalar_type())};
  Tensor rival = made(ScalarType::Long), own = made(ScalarType::Long), p_first = made(ScalarType::Float);
  const bool planes = logits.stride(2) == 1 || N == 1;  // if not, kCols pixels at a time are brought next to each other
  const int64_t size = planes ? kPixels : kCols, tiles = ceil_div(N, size);
  parallel(B * tiles, [&](int64_t item) {
    const int64_t b = item / tiles, first = item % tiles * size, pixels = std::min(size, N - first), at = b * N + first;
    Matrix z = matrix(logits, 2, 1, kOp).offset(b * logits.stride(0)).at(first, 0);
    if (!planes) {
      float* panel = local_workspace.get(C * kCols);
      pack(panel, kCols, static_cast<int>(pixels), C, z);
      z = {panel, DType::f32, 1, kCols};
    }
    Running running;
    Found found;
    float result[5][kPixels];
    kRuns[static_cast<int>(z.dtype)](running, z, C, pixels);
    const auto* label = labels.numel() > 0 ? static_cast<const int64_t*>(labels.const_data_ptr()) + at : nullptr;
    compare(running, z, C, label, ignore_index, pixels, found);
    conclude(running, found, pixels, result);
    for (int n = 0; n < 4; ++n)
      write_row(static_cast<char*>(floats[n].mutable_data_ptr()) + at * size_of(dtype), dtype, result[n], pixels);
    for (int64_t i = 0; i < pixels; ++i) {
      const bool valid = found.true_class[i] >= 0;
      static_cast<int64_t*>(rival.mutable_data_ptr())[at + i] = valid ? found.rival_class[i] : -1;
      static_cast<int64_t*>(own.mutable_data_ptr())[at + i] = valid ? found.true_class[i] : -1;
    }
    std::copy_n(result[4], pixels, static_cast<float*>(p_first.mutable_data_ptr()) + at);
  });
  return {floats[0], rival, floats[1], floats[2], floats[3], own, p_first};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("top_margin.cpu", FASTCSS_BOX(&fastcss::cpu::top_margin)); }
