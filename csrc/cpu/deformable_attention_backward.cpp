// The backward pass of fastcss::deformable_attention.cpu. An item of work is a head of an image, whose values no other
// item writes to: gradients are added in the order of the queries, on any number of threads. Let s be the products of
// dout and the values at a cell's corners; then dattention = Σ share · s, and dx = attention · the slope of Σ share · s
// along x.

#include <tuple>
#include <vector>

#include "deformable_points.h"
#include "parallel.h"
#include "rows.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "deformable_attention";

// Visits one corner at a time: dvalue += weight · dout, and dout · value, which stays a vector of partial sums.
template <class V, class T>
FASTCSS_INLINE void visit(const Points& points, const T* value, int64_t stride, const float* dout, int64_t D,
                          float* dvalue, float* partial) {
  for (int64_t i = 0; i < points.corners(); ++i) {
    const int64_t token = points.token()[i];
    const float weight = points.weight()[i];
    const T* at = value + token * stride;
    float* to = dvalue + token * D;
    V sum = {};
    int64_t d = 0;
    for (; d + kLanesIn<V> <= D; d += kLanesIn<V>) {
      const V g = load<V>(dout + d);
      sum += g * load<V>(at + d);
      store(to + d, load<V>(to + d) + weight * g);
    }
    if (d < D) {
      const V g = load<V>(dout + d, D - d);
      sum += g * load<V>(at + d, D - d);
      store(to + d, load<V>(to + d, D - d) + weight * g, D - d);
    }
    store(partial + i * kLanesIn<V>, sum);
  }
}

// product [slot] = the sum of each corner's partial sums, kLanesIn<V> corners at a time; 0 in slots without a corner.
template <class V>
FASTCSS_INLINE void add_up(const Points& points, const float* partial, float* product) {
  constexpr int kWide = kLanesIn<V>;
  std::fill_n(product, kCorners * points.padded(), 0.f);
  for (int64_t first = 0; first < points.corners(); first += kWide) {
    V rows[kWide], sum = {};
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) rows[i] = load<V>(partial + (first + i) * kWide);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) sum += rows[i];
    for (int64_t i = first; i < std::min(points.corners(), first + kWide); ++i)
      product[points.slot()[i]] = sum[i - first];
  }
}

// dvalue += weight · dout at the corners of one query and head, and product [slot] = dout · value.
template <class T>
void visit_corners(const Points& points, const Matrix& values, const float* dout, int64_t D, float* dvalue,
                   float* partial, float* product) {
  on_widest([&points, &values, dout, D, dvalue, partial, product]<class V>() FASTCSS_LOOP {
    visit<V>(points, static_cast<const T*>(values.data), values.lane_stride, dout, D, dvalue, partial);
    add_up<V>(points, partial, product);
  });
}
constexpr decltype(&visit_corners<float>) kVisits[] = {visit_corners<float>, visit_corners<BFloat16>,
                                                       visit_corners<Float16>};

// Computes for one query and head dlogits [count], and the gradients of the locations in cells, dat [count, 2].
void point_gradients(const Points& points, const float* product, float* dlogits, float* dat) {
  const int64_t padded = points.padded();
  float mean = 0;
  for (int64_t p = 0; p < points.count(); ++p) {
    const float s[kCorners] = {product[p], product[padded + p], product[2 * padded + p], product[3 * padded + p]};
    const float x = points.right_share(p), y = points.bottom_share(p), attention = points.attention(p);
    dlogits[p] = 0;
    for (int corner = 0; corner < kCorners; ++corner) dlogits[p] += points.share(corner * padded + p) * s[corner];
    mean += attention * dlogits[p];
    dat[2 * p] = attention * ((1 - y) * (s[1] - s[0]) + y * (s[3] - s[2]));
    dat[2 * p + 1] = attention * ((1 - x) * (s[2] - s[0]) + x * (s[3] - s[1]));
  }
  for (int64_t p = 0; p < points.count(); ++p) dlogits[p] = points.attention(p) * (dlogits[p] - mean);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deformable_attention_backward(const Tensor& dout_in, const Tensor& value_in,
                                                                         std::vector<int64_t> shapes,
                                                                         const Tensor& reference_in,
                                                                         const Tensor& offsets_in,
                                                                         const Tensor& logits_in, bool need_reference) {
  const Tensor value = with_channels(value_in), reference = torch::stable::contiguous(reference_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in), logits = torch::stable::contiguous(logits_in);
  const Tensor dout = torch::stable::contiguous(dout_in);
  const int64_t B = value.size(0), S = value.size(1), heads = value.size(2), D = value.size(3), Q = offsets.size(1);
  const int64_t xy = reference.size(3), per_level = offsets.size(4), count = offsets.size(3) * per_level;
  const int64_t coordinates = offsets.size(3) * xy;
  const DType dtype = dtype_of(value, kOp);
  const std::vector<Level> levels = levels_of(shapes);
  Tensor dvalue = torch::stable::new_empty(value, shape({B, S, heads, D}));
  Tensor doffsets = torch::stable::new_empty(offsets, offsets.sizes());
  Tensor dlogits = torch::stable::new_empty(logits, logits.sizes());
  Tensor dreference =
      torch::stable::new_zeros(reference, need_reference ? shape({B, Q, offsets.size(3), xy}) : shape({0}));
  std::vector<float> by_head(need_reference ? B * heads * Q * coordinates : 0, 0.f);
  parallel(B * heads, [&](int64_t item) {
    const int64_t b = item / heads, h = item % heads;
    const Matrix values = matrix(value, 1, 3, kOp).offset(b * value.stride(0) + h * value.stride(2));
    std::vector<float> sums(S * D, 0.f);
    Points points(levels, per_level, xy);
    std::vector<float> moves(2 * count), scores(count), g(D), dat(2 * count), product(kCorners * points.padded());
    std::vector<float> partial((kCorners * count + kLanes) * kLanes, 0.f);
    for (int64_t q = 0; q < Q; ++q) {
      const int64_t at = ((b * Q + q) * heads + h) * count;
      points.set_reference(static_cast<const float*>(reference.const_data_ptr()) + (b * Q + q) * coordinates);
      read_row(moves.data(), Matrix{offsets.const_data_ptr(), dtype, 0, 1}.offset(2 * at), 2 * count);
      read_row(scores.data(), Matrix{logits.const_data_ptr(), dtype, 0, 1}.offset(at), count);
      read_row(g.data(), Matrix{dout.const_data_ptr(), dtype, 0, 1}.offset(((b * Q + q) * heads + h) * D), D);
      points.set_head(moves.data(), scores.data());
      kVisits[static_cast<int>(dtype)](points, values, g.data(), D, sums.data(), partial.data(), product.data());
      point_gradients(points, product.data(), scores.data(), dat.data());
      for (int64_t i = 0; need_reference && i < count * xy; ++i)
        by_head[(item * Q + q) * coordinates + i / xy / per_level * xy + i % xy] +=
            dat[2 * (i / xy) + i % 2] * points.reference_slope(i / xy, i % xy, moves.data());
      for (int64_t i = 0; i < 2 * count; ++i) dat[i] *= points.offset_slope(i / 2, i % 2);
      if (points.lost()) std::fill_n(scores.data(), count, __builtin_nanf(""));
      write_row(image(doffsets, 0, dtype) + 2 * at * size_of(dtype), dtype, dat.data(), 2 * count);
      write_row(image(dlogits, 0, dtype) + at * size_of(dtype), dtype, scores.data(), count);
    }
    for (int64_t s = 0; s < S; ++s)
      write_row(image(dvalue, b, dtype) + (s * heads + h) * D * size_of(dtype), dtype, sums.data() + s * D, D);
  });
  for (int64_t item = 0; need_reference && item < B * heads; ++item)
    add_scaled(static_cast<float*>(dreference.mutable_data_ptr()) + item / heads * Q * coordinates, 1.f,
               by_head.data() + item * Q * coordinates, Q * coordinates);
  return {dvalue, dreference, doffsets, dlogits};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("deformable_attention_backward.cpu", FASTCSS_BOX(&fastcss::cpu::deformable_attention_backward));
}
