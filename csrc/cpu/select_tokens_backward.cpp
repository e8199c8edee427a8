// fastcss::select_tokens_backward.cpu. The presence of a class is the mean of t̂ · ĉ over its n tokens. Let
// g = dpresence / n, u = Σ g ĉ over the classes that average a token, and v = Σ t̂ over the tokens of a class. Then
//   dt = (u − (u · t̂) t̂) / ‖t‖,   dc = g (v − (v · ĉ) ĉ) / ‖c‖
// and a selected token gets the gradient of its copy, too. The forward pass tells which class averages which token: by
// bits, or, if only the best class does, by the best class.

#include <tuple>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "select_tokens";

// The pairs of one image.
struct Pairs {
  const int32_t* best;   // [N], -1 for a token without a class
  const uint32_t* bits;  // [N][words]
  int64_t words;         // 0: a token is averaged by its best class alone

  template <class F>
  void for_classes(int64_t n, const F& f) const {
    if (best[n] < 0) return;
    if (words == 0) return f(best[n]);
    for (int64_t w = 0; w < words; ++w)
      for (uint32_t left = bits[n * words + w]; left; left &= left - 1) f(32 * w + __builtin_ctz(left));
  }
};

// Returns the number of slices of tokens, each with a Σ t̂ of its own: so many that threads can share them and that
// their sums take 16 MiB at most. It depends on sizes only, so that no result depends on the number of threads.
int64_t slices_of(int64_t N, int64_t C, int64_t D) {
  return std::max<int64_t>(1, std::min({ceil_div(N, 256), int64_t{32}, (int64_t{4} << 20) / (C * D)}));
}

std::tuple<Tensor, Tensor> select_tokens_backward(const Tensor& dselected, const Tensor& dpresence,
                                                  const Tensor& tokens, const Tensor& classes, const Tensor& support,
                                                  const Tensor& best, const Tensor& above) {
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), C = classes.size(1);
  const int64_t length = dselected.size(2), slices = slices_of(N, C, D), per_slice = ceil_div(N, slices);
  const DType dtype = dtype_of(tokens, kOp);
  Tensor dtokens = torch::stable::new_empty(tokens, tokens.sizes());
  Tensor dclasses = torch::stable::new_empty(classes, classes.sizes());
  for_images(B, N, [&](int64_t b) {
    const Matrix rows = matrix(tokens, 1, 2, kOp).offset(b * tokens.stride(0));
    const Matrix given = matrix(dselected, 1, 2, kOp).offset(b * dselected.stride(0));
    const int64_t* averaged = static_cast<const int64_t*>(support.const_data_ptr()) + b * C;
    const int64_t words = above.size(2);
    const Pairs pairs{static_cast<const int32_t*>(best.const_data_ptr()) + b * N,
                      static_cast<const uint32_t*>(above.const_data_ptr()) + b * N * words, words};
    std::vector<int64_t> place(N), next(C, 0);  // of a token among those of its best class
    for (int64_t n = 0; n < N; ++n)
      if (pairs.best[n] >= 0) place[n] = next[pairs.best[n]]++;
    float* units = shared_workspace.get(C * D + 2 * C + slices * C * D);
    float *inverse = units + C * D, *slope = inverse + C, *partial = slope + C;
    read_row(slope, matrix(dpresence, 0, 1, kOp).at(b, 0), C);
    for (int64_t c = 0; c < C; ++c) {
      float* unit = units + c * D;
      read_row(unit, matrix(classes, 1, 2, kOp).offset(b * classes.stride(0)).at(c, 0), D);
      inverse[c] = inverse_length(unit, D);
      for (int64_t i = 0; i < D; ++i) unit[i] *= inverse[c];
      slope[c] = averaged[c] ? slope[c] / static_cast<float>(averaged[c]) : 0.f;
    }
    char* to = image(dtokens, b, dtype);
    parallel(slices, [&](int64_t slice) {
      float* row = local_workspace.get(3 * D);
      float *pull = row + D, *own = pull + D, *sums = partial + slice * C * D;
      std::fill_n(sums, C * D, 0.f);
      for (int64_t n = slice * per_slice; n < std::min(N, (slice + 1) * per_slice); ++n) {
        char* out = to + n * D * size_of(dtype);
        if (pairs.best[n] < 0) {
          std::fill_n(out, D * size_of(dtype), char(0));
          continue;
        }
        read_row(row, rows.at(n, 0), D);
        const float scale = inverse_length(row, D);
        std::fill_n(pull, D, 0.f);
        pairs.for_classes(n, [&](int64_t c) {
          add_scaled(pull, slope[c], units + c * D, D);
          add_scaled(sums + c * D, scale, row, D);
        });
        std::fill_n(own, D, 0.f);
        const int64_t first = place[n] * D;
        if (first < length) read_row(own, given.at(pairs.best[n], first), std::min(D, length - first));
        add_scaled(own, scale, pull, D);
        const float along = scale * dot(pull, row, D);
        if (scale < kLargestInverse) add_scaled(own, -scale * scale * along, row, D);
        write_row(out, dtype, own, D);
      }
    });
    parallel(C, [&](int64_t c) {
      float* sum = local_workspace.get(D);
      const float* unit = units + c * D;
      std::fill_n(sum, D, 0.f);
      for (int64_t slice = 0; slice < slices; ++slice) add_scaled(sum, 1.f, partial + (slice * C + c) * D, D);
      // The tokens of a class lie along it, so little is left of the sum; a second time removes what rounding left
      // there.
      for (int times = 0; times < 2 && inverse[c] < kLargestInverse; ++times)
        add_scaled(sum, -dot(sum, unit, D), unit, D);
      for (int64_t i = 0; i < D; ++i) sum[i] *= slope[c] * inverse[c];
      write_row(image(dclasses, b, dtype) + c * D * size_of(dtype), dtype, sum, D);
    });
  });
  return {dtokens, dclasses};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("select_tokens_backward.cpu", FASTCSS_BOX(&fastcss::cpu::select_tokens_backward));
}
