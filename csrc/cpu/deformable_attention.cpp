// fastcss::deformable_attention.cpu: each query and head reads its points' corners, whose channels lie next to each
// other, and adds them up in registers. Neighbouring queries read neighbouring tokens, which stay in cache.

#include <vector>

#include "deformable_points.h"
#include "parallel.h"
#include "rows.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "deformable_attention";
constexpr int64_t kQueries = 64;  // in one item of work

// out [D] = Σ weight · value at the corners, VECS vectors wide. It keeps two sums or four, so that no addition waits
// for the one before.
template <class V, int VECS, class T>
FASTCSS_INLINE void gather(const Points& points, const T* value, int64_t stride, float* out) {
  constexpr int kSums = VECS <= 2 ? 4 : 2;
  V sum[kSums][VECS] = {};
  const int64_t* token = points.token();
  const float* weight = points.weight();
  int64_t i = 0;
  for (; i + kSums <= points.corners(); i += kSums)
#pragma GCC unroll 4
    for (int n = 0; n < kSums; ++n)
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v)
        sum[n][v] += weight[i + n] * load<V>(value + token[i + n] * stride + v * kLanesIn<V>);
  for (; i < points.corners(); ++i)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) sum[0][v] += weight[i] * load<V>(value + token[i] * stride + v * kLanesIn<V>);
#pragma GCC unroll 8
  for (int v = 0; v < VECS; ++v) {
    V all = sum[0][v] + sum[1][v];
    if constexpr (kSums == 4) all += sum[2][v] + sum[3][v];
    store(out + v * kLanesIn<V>, all);
  }
}

// Does the same for any width D.
template <class V, class T>
FASTCSS_INLINE void gather_any(const Points& points, const T* value, int64_t stride, int64_t D, float* out) {
  std::fill_n(out, D, 0.f);
  for (int64_t i = 0; i < points.corners(); ++i) {
    const T* at = value + points.token()[i] * stride;
    for (int64_t d = 0; d < D; d += kLanesIn<V>) {
      const int64_t lanes = std::min<int64_t>(kLanesIn<V>, D - d);
      store(out + d, load<V>(out + d, lanes) + points.weight()[i] * load<V>(at + d, lanes), lanes);
    }
  }
}

template <class T>
void gather_head(const Points& points, const Matrix& values, int64_t D, float* out) {
  on_widest([&points, &values, D, out]<class V>() FASTCSS_LOOP {
    const T* value = static_cast<const T*>(values.data);
    const int64_t stride = values.lane_stride;
    if (D == 16) return gather<V, 16 / kLanesIn<V>>(points, value, stride, out);
    if (D == 32) return gather<V, 32 / kLanesIn<V>>(points, value, stride, out);
    if (D == 64)  // as many vectors at a time as registers hold
      for (int d = 0; d < 64; d += 4 * kLanesIn<V>) gather<V, 4>(points, value + d, stride, out + d);
    else
      gather_any<V>(points, value, stride, D, out);
  });
}

constexpr decltype(&gather_head<float>) kGathers[] = {gather_head<float>, gather_head<BFloat16>, gather_head<Float16>};

Tensor deformable_attention(const Tensor& value_in, std::vector<int64_t> shapes, const Tensor& reference_in,
                            const Tensor& offsets_in, const Tensor& logits_in) {
  const Tensor value = with_channels(value_in), reference = torch::stable::contiguous(reference_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in), logits = torch::stable::contiguous(logits_in);
  const int64_t B = value.size(0), heads = value.size(2), D = value.size(3), Q = offsets.size(1);
  const int64_t xy = reference.size(3), count = offsets.size(3) * offsets.size(4);
  const DType dtype = dtype_of(value, kOp);
  Tensor out = torch::stable::new_empty(value, shape({B, Q, heads * D}));
  const std::vector<Level> levels = levels_of(shapes);
  const int64_t blocks = ceil_div(Q, kQueries);
  parallel(B * blocks, [&](int64_t item) {
    const int64_t b = item / blocks, first = item % blocks * kQueries;
    Points points(levels, offsets.size(4), xy);
    std::vector<float> moves(2 * count), scores(count), row(heads * D);
    for (int64_t q = first; q < std::min(Q, first + kQueries); ++q) {
      points.set_reference(static_cast<const float*>(reference.const_data_ptr()) + (b * Q + q) * levels.size() * xy);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = ((b * Q + q) * heads + h) * count;
        read_row(moves.data(), Matrix{offsets.const_data_ptr(), dtype, 0, 1}.offset(2 * at), 2 * count);
        read_row(scores.data(), Matrix{logits.const_data_ptr(), dtype, 0, 1}.offset(at), count);
        points.set_head(moves.data(), scores.data());
        const Matrix values = matrix(value, 1, 3, kOp).offset(b * value.stride(0) + h * value.stride(2));
        kGathers[static_cast<int>(dtype)](points, values, D, row.data() + h * D);
        if (points.lost()) std::fill_n(row.data() + h * D, D, __builtin_nanf(""));
      }
      write_row(image(out, b, dtype) + q * heads * D * size_of(dtype), dtype, row.data(), heads * D);
    }
  });
  return out;
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("deformable_attention.cpu", FASTCSS_BOX(&fastcss::cpu::deformable_attention));
}
