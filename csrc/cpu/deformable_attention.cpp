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
constexpr int64_t kQueries = 64;  // of one item of work

// out [D] = Σ weight · value at the corners; four sums, so that none has to wait for the one before.
template <class T, int VECS>
FASTCSS_INLINE void gather(const Points& points, const T* value, int64_t stride, float* out) {
  constexpr int kSums = 4;
  Vec sum[kSums][VECS] = {};
  const int64_t* token = points.token();
  const float* weight = points.weight();
  int64_t i = 0;
  for (; i + kSums <= points.corners(); i += kSums)
#pragma GCC unroll 4
    for (int n = 0; n < kSums; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sum[n][v] += weight[i + n] * load(value + token[i + n] * stride + v * kLanes);
  for (; i < points.corners(); ++i)
    for (int v = 0; v < VECS; ++v) sum[0][v] += weight[i] * load(value + token[i] * stride + v * kLanes);
  for (int v = 0; v < VECS; ++v) store(out + v * kLanes, (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]));
}

// Of any width.
template <class T>
FASTCSS_INLINE void gather_any(const Points& points, const T* value, int64_t stride, int64_t D, float* out) {
  std::fill_n(out, D, 0.f);
  for (int64_t i = 0; i < points.corners(); ++i) {
    const T* at = value + points.token()[i] * stride;
    for (int64_t d = 0; d < D; d += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, D - d);
      store(out + d, load(out + d, lanes) + points.weight()[i] * load(at + d, lanes), lanes);
    }
  }
}

template <class T>
FASTCSS_INLINE void gather_width(const Points& points, const void* values, int64_t stride, int64_t D, float* out) {
  const T* value = static_cast<const T*>(values);
  if (D == kLanes) return gather<T, 1>(points, value, stride, out);
  if (D == 2 * kLanes) return gather<T, 2>(points, value, stride, out);
  if (D == 4 * kLanes) return gather<T, 4>(points, value, stride, out);
  gather_any(points, value, stride, D, out);
}

FASTCSS_CLONES void gather_head(const Points& points, Matrix value, int64_t D, float* out) {
  if (value.dtype == DType::f32)
    gather_width<float>(points, value.data, value.lane_stride, D, out);
  else if (value.dtype == DType::bf16)
    gather_width<BFloat16>(points, value.data, value.lane_stride, D, out);
  else
    gather_width<_Float16>(points, value.data, value.lane_stride, D, out);
}

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
        gather_head(points, matrix(value, 1, 3, kOp).offset(b * value.stride(0) + h * value.stride(2)), D,
                    row.data() + h * D);
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
  m.impl("deformable_attention.cpu", TORCH_BOX(&fastcss::cpu::deformable_attention));
}
