// The backward pass of fastcss::top_margin.cpu. Let p be the softmax, t the true class and r its rival. Every result is
// a function of z_t − z_r, p_t and p_r, so dz_j = a (δ_jt − p_j) + b (δ_jr − p_j) + dmargin (δ_jt − δ_jr). The larger
// of z_t and z_r is the largest logit of all, and p_j = exp(z_j − largest) p_first.

#include "parallel.h"
#include "rows.h"
#include "tensors.h"
#include "vector_math.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "top_margin";
constexpr int64_t kPixels = 512;

// Holds what the gradients of some pixels' logits are made of.
struct Slopes {
  float first[kPixels];                              // the largest logit
  float own[kPixels], rival[kPixels];                // the coefficients of δ_jt and δ_jr
  float spread[kPixels];                             // and of −exp(z_j − first): (a + b) p_first
  int32_t own_class[kPixels], rival_class[kPixels];  // −1 if the pixel has none
};

// Turns the logits of the true class (p) and of its rival (q) into p_t and p_r, and returns the larger logit in
// `first`.
void softmax(float* p, float* q, const float* p_first, float* first) {
  on_widest([=]<class V>() FASTCSS_LOOP {
    for (int64_t i = 0; i < kPixels; i += kLanesIn<V>) {
      const V own = load<V>(p + i), rival = load<V>(q + i), largest = own > rival ? own : rival;
      store(p + i, exp_negative(own - largest) * load<V>(p_first + i));
      store(q + i, exp_negative(rival - largest) * load<V>(p_first + i));
      store(first + i, largest);
    }
  });
}

// Sets the slopes from p_t and p_r, and the gradients of margin, p_true, p_rival and curvature in `given`.
FASTCSS_CLONES void set_slopes(const float* p, const float* q, const float* p_first, const float (&given)[4][kPixels],
                               Slopes& s) {
  for (int64_t i = 0; i < kPixels; ++i) {
    const float twice = 2 * (p[i] - q[i]);
    const float a = p[i] * (given[1][i] + given[3][i] * (1 - twice));
    const float b = q[i] * (given[2][i] + given[3][i] * (1 + twice));
    s.own[i] = a + given[0][i], s.rival[i] = b - given[0][i], s.spread[i] = (a + b) * p_first[i];
  }
}

// One class's logits → their gradients.
template <class V, class T>
FASTCSS_INLINE void gradients(const Slopes& s, int32_t c, const T* logits, T* result, int64_t pixels) {
  constexpr int kWide = kLanesIn<V>;
  for (int64_t i = 0; i < pixels; i += kWide) {
    const int64_t lanes = std::min<int64_t>(kWide, pixels - i);
    const V z = lanes == kWide ? load<V>(logits + i) : load<V>(logits + i, lanes);
    IntsOf<V> own, rival;
    std::memcpy(&own, s.own_class + i, sizeof(own)), std::memcpy(&rival, s.rival_class + i, sizeof(rival));
    V dz = -load<V>(s.spread + i) * exp_negative(z - load<V>(s.first + i));
    dz += own == c ? load<V>(s.own + i) : V{};
    dz += rival == c ? load<V>(s.rival + i) : V{};
    dz = own < 0 ? V{} : dz;
    lanes == kWide ? store(result + i, dz) : store(result + i, dz, lanes);
  }
}

template <class T>
void gradients_of_class(const Slopes& s, int32_t c, const void* logits, void* result, int64_t pixels) {
  on_widest([=, &s]<class V>()
                FASTCSS_LOOP { gradients<V>(s, c, static_cast<const T*>(logits), static_cast<T*>(result), pixels); });
}
constexpr decltype(&gradients_of_class<float>) kGradients[] = {gradients_of_class<float>, gradients_of_class<BFloat16>,
                                                               gradients_of_class<Float16>};

Tensor top_margin_backward(const Tensor& dmargin, const Tensor& dp_true, const Tensor& dp_rival,
                           const Tensor& dcurvature, const Tensor& logits_in, const Tensor& own, const Tensor& rival,
                           const Tensor& p_first_in) {
  const Tensor logits = torch::stable::contiguous(logits_in);
  const int64_t B = logits.size(0), C = logits.size(1), N = logits.size(2), tiles = ceil_div(N, kPixels);
  const DType dtype = dtype_of(logits, kOp);
  Tensor dlogits = torch::stable::new_empty(logits, logits.sizes());
  parallel(B * tiles, [&](int64_t item) {
    const int64_t b = item / tiles, first = item % tiles * kPixels, pixels = std::min(kPixels, N - first);
    const int64_t at = b * N + first;
    const int64_t* own_class = static_cast<const int64_t*>(own.const_data_ptr()) + at;
    const int64_t* rival_class = static_cast<const int64_t*>(rival.const_data_ptr()) + at;
    const Matrix z = matrix(logits, 1, 2, kOp).offset(b * logits.stride(0)).at(0, first);
    float given[4][kPixels] = {}, p[kPixels] = {}, q[kPixels] = {}, p_first[kPixels] = {};
    const Tensor* gradients[4] = {&dmargin, &dp_true, &dp_rival, &dcurvature};
    for (int n = 0; n < 4; ++n) read_row(given[n], matrix(*gradients[n], 0, 1, kOp).at(b, first), pixels);
    Slopes slopes{};
    std::copy_n(static_cast<const float*>(p_first_in.const_data_ptr()) + at, pixels, p_first);
    std::copy_n(own_class, pixels, slopes.own_class);
    std::copy_n(rival_class, pixels, slopes.rival_class);
    for (int64_t i = 0; i < pixels; ++i) {  // prefetched together: each is in a cache line far from the others
      if (own_class[i] < 0) continue;
      __builtin_prefetch(z.at(own_class[i], i).data), __builtin_prefetch(z.at(rival_class[i], i).data);
    }
    for (int64_t i = 0; i < pixels; ++i) {
      if (own_class[i] < 0) continue;
      p[i] = value_at(z.at(own_class[i], i)), q[i] = value_at(z.at(rival_class[i], i));
    }
    softmax(p, q, p_first, slopes.first);
    set_slopes(p, q, p_first, given, slopes);
    char* to = image(dlogits, b, dtype) + first * size_of(dtype);
    for (int64_t c = 0; c < C; ++c)
      kGradients[static_cast<int>(dtype)](slopes, static_cast<int32_t>(c), z.at(c, 0).data, to + c * N * size_of(dtype),
                                          pixels);
  });
  return dlogits;
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("top_margin_backward.cpu", FASTCSS_BOX(&fastcss::cpu::top_margin_backward));
}
