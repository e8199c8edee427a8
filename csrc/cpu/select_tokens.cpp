// fastcss::select_tokens.cpu and its backward. The best class of each token comes out of one read of the tokens; what
// follows looks at one number a token, and copies the few that are kept.

#include <tuple>
#include <vector>

#include "best_class.h"
#include "rows.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "select_tokens";

// The tokens of each class in token order, as many as fit, and how many there are and the sum of their cosines.
struct Lists {
  Lists(int64_t classes, int64_t places)
      : places(places), tokens(classes * places, -1), counts(classes, 0), sums(classes, 0) {}
  void fill(const float* cosine, const int32_t* best, int64_t N) {
    for (int64_t n = 0; n < N; ++n) {
      if (best[n] < 0) continue;
      const int64_t place = counts[best[n]]++;
      sums[best[n]] += cosine[n];
      if (place < places) tokens[best[n] * places + place] = n;
    }
  }
  int64_t places;
  std::vector<int64_t> tokens, counts;
  std::vector<double> sums;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select_tokens(const Tensor& tokens, const Tensor& classes,
                                                                 double threshold, int64_t length) {
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), C = classes.size(1);
  const DType dtype = dtype_of(tokens, kOp);
  Tensor selected = torch::stable::new_empty(tokens, shape({B, C, length}));
  Tensor counts = torch::stable::new_empty(tokens, shape({B, C}), ScalarType::Long);
  Tensor presence = torch::stable::new_empty(tokens, shape({B, C}));
  Tensor best = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Int);
  Tensor cosine = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Float);
  const BestClass search(C, D, dtype == DType::bf16 && pair_kernel(), BestClass::Nan::never_wins);
  const int64_t places = ceil_div(length, D);
  for_images(B, N, [&](int64_t b) {
    const Matrix rows = matrix(tokens, 1, 2, kOp).offset(b * tokens.stride(0));
    float* packed = shared_workspace.get(search.size());
    float* value = static_cast<float*>(cosine.mutable_data_ptr()) + b * N;
    int32_t* winner = static_cast<int32_t*>(best.mutable_data_ptr()) + b * N;
    search.pack_classes(packed, matrix(classes, 1, 2, kOp).offset(b * classes.stride(0)));
    search.normalise(packed);
    search.run(packed, rows, N, true, value, winner);
    for (int64_t n = 0; n < N; ++n)
      if (!(value[n] >= static_cast<float>(threshold))) winner[n] = -1;
    Lists lists(C, places);
    lists.fill(value, winner, N);
    std::copy_n(lists.counts.data(), C, static_cast<int64_t*>(counts.mutable_data_ptr()) + b * C);
    std::vector<float> means(C);
    for (int64_t c = 0; c < C; ++c)
      means[c] = static_cast<float>(lists.sums[c] / std::max<int64_t>(lists.counts[c], 1));
    write_row(image(presence, b, dtype), dtype, means.data(), C);
    parallel(C, [&](int64_t c) {
      float* flat = local_workspace.get(places * D);
      for (int64_t i = 0; i < places; ++i) {
        const int64_t token = lists.tokens[c * places + i];
        if (token < 0)
          std::fill_n(flat + i * D, D, 0.f);
        else
          read_row(flat + i * D, rows.at(token, 0), D);
      }
      write_row(image(selected, b, dtype) + c * length * size_of(dtype), dtype, flat, length);
    });
  });
  return {selected, counts, presence, best, cosine};
}

// The presence of a class is the mean of t̂ · ĉ over its tokens: with g = dpresence / count, dt = g (ĉ − cos t̂) / ‖t‖
// and dc = g Σ (t̂ − cos ĉ) / ‖c‖. A token that is among the selected ones has their gradient, too.
std::tuple<Tensor, Tensor> select_tokens_backward(const Tensor& dselected, const Tensor& dpresence,
                                                  const Tensor& tokens, const Tensor& classes, const Tensor& counts,
                                                  const Tensor& best, const Tensor& cosine) {
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), C = classes.size(1);
  const int64_t length = dselected.size(2), places = ceil_div(length, D);
  const DType dtype = dtype_of(tokens, kOp);
  Tensor dtokens = torch::stable::new_empty(tokens, tokens.sizes());
  Tensor dclasses = torch::stable::new_empty(classes, classes.sizes());
  for (int64_t b = 0; b < B; ++b) {
    const Matrix rows = matrix(tokens, 1, 2, kOp).offset(b * tokens.stride(0));
    const int32_t* winner = static_cast<const int32_t*>(best.const_data_ptr()) + b * N;
    const float* value = static_cast<const float*>(cosine.const_data_ptr()) + b * N;
    const int64_t* count = static_cast<const int64_t*>(counts.const_data_ptr()) + b * C;
    std::vector<std::vector<int64_t>> members(C);
    for (int64_t n = 0; n < N; ++n)
      if (winner[n] >= 0) members[winner[n]].push_back(n);
    std::vector<float> slope(C);
    read_row(slope.data(), matrix(dpresence, 0, 1, kOp).at(b, 0), C);
    char* to = image(dtokens, b, dtype);
    std::fill_n(to, N * D * size_of(dtype), char(0));  // where there is none, to is null: no memset
    parallel(C, [&](int64_t c) {
      float* unit = local_workspace.get(3 * D + places * D + 4 * kLanes);
      float *row = unit + D, *dclass = row + D, *given = dclass + D;
      read_row(unit, matrix(classes, 1, 2, kOp).offset(b * classes.stride(0)).at(c, 0), D);
      const float inverse = inverse_length(unit, D);
      for (int64_t i = 0; i < D; ++i) unit[i] *= inverse;
      std::fill_n(dclass, D, 0.f);
      std::fill_n(given, places * D, 0.f);
      read_row(given, matrix(dselected, 1, 2, kOp).offset(b * dselected.stride(0)).at(c, 0), length);
      const float g = slope[c] / static_cast<float>(std::max<int64_t>(count[c], 1));
      float cosines = 0;
      for (size_t place = 0; place < members[c].size(); ++place) {
        const int64_t n = members[c][place];
        read_row(row, rows.at(n, 0), D);
        const float scale = inverse_length(row, D);
        add_scaled(dclass, scale, row, D);
        cosines += value[n];
        for (int64_t i = 0; i < D; ++i) {
          const float own = static_cast<int64_t>(place) < places ? given[place * D + i] : 0.f;
          row[i] = own + g * scale * (unit[i] - value[n] * scale * row[i]);
        }
        write_row(to + n * D * size_of(dtype), dtype, row, D);
      }
      for (int64_t i = 0; i < D; ++i) dclass[i] = g * inverse * (dclass[i] - cosines * unit[i]);
      write_row(image(dclasses, b, dtype) + c * D * size_of(dtype), dtype, dclass, D);
    });
  }
  return {dtokens, dclasses};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) {
  m.impl("select_tokens.cpu", FASTCSS_BOX(&fastcss::cpu::select_tokens));
  m.impl("select_tokens_backward.cpu", FASTCSS_BOX(&fastcss::cpu::select_tokens_backward));
}
