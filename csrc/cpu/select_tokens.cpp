// fastcss::select_tokens.cpu. One read of the tokens gives the best class of each and which other classes reach the
// threshold; what follows looks at a few numbers per token, and copies the few tokens that are kept.

#include <tuple>
#include <vector>

#include "best_class.h"
#include "rows.h"
#include "tensors.h"

namespace fastcss::cpu {
namespace {

constexpr const char* kOp = "select_tokens";

// Lists the tokens of each class in token order, as many as fit; how many there are; and, if given, their cosines' sum.
struct Lists {
  Lists(int64_t classes, int64_t places)
      : places(places), tokens(classes * places, -1), counts(classes, 0), sums(classes, 0) {}
  void fill(const float* cosine, const int32_t* best, int64_t N) {
    for (int64_t n = 0; n < N; ++n) {
      if (best[n] < 0) continue;
      const int64_t place = counts[best[n]]++;
      if (cosine) sums[best[n]] += cosine[n];
      if (place < places) tokens[best[n] * places + place] = n;
    }
  }
  int64_t places;
  std::vector<int64_t> tokens, counts;
  std::vector<double> sums;
};

// Adds up the columns of [rows][C].
FASTCSS_CLONES void add_rows(const float* from, int64_t rows, int64_t C, double* to) {
  std::fill_n(to, C, 0.);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < C; ++c) to[c] += from[row * C + c];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_tokens(const Tensor& tokens, const Tensor& classes,
                                                                         double threshold, int64_t length,
                                                                         bool best_only) {
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), C = classes.size(1);
  const DType dtype = dtype_of(tokens, kOp);
  const float lowest = static_cast<float>(threshold);
  const int64_t words = best_only ? 0 : ceil_div(C, 32), panels = best_only ? 0 : ceil_div(N, kCols);
  Tensor selected = torch::stable::new_empty(tokens, shape({B, C, length}));
  Tensor counts = torch::stable::new_empty(tokens, shape({B, C}), ScalarType::Long);
  Tensor presence = torch::stable::new_empty(tokens, shape({B, C}));
  Tensor support = torch::stable::new_empty(tokens, shape({B, C}), ScalarType::Long);
  Tensor best = torch::stable::new_empty(tokens, shape({B, N}), ScalarType::Int);
  Tensor above = torch::stable::new_empty(tokens, shape({B, N, words}), ScalarType::Int);
  const BestClass search(C, D, dtype == DType::bf16 && pair_kernel(), BestClass::Nan::never_wins);
  const int64_t places = ceil_div(length, D);
  for_images(B, N, [&](int64_t b) {
    const Matrix rows = matrix(tokens, 1, 2, kOp).offset(b * tokens.stride(0));
    float* packed = shared_workspace.get(search.size() + N + 2 * panels * C);
    float *value = packed + search.size(), *sums = value + N;
    int32_t* winner = static_cast<int32_t*>(best.mutable_data_ptr()) + b * N;
    uint32_t* bits = static_cast<uint32_t*>(above.mutable_data_ptr()) + b * N * words;
    const BestClass::Reached reached{C, lowest, bits, sums, sums + panels * C};
    search.pack_classes(packed, matrix(classes, 1, 2, kOp).offset(b * classes.stride(0)));
    search.normalise(packed);
    search.run(packed, rows, N, true, value, winner, best_only ? nullptr : &reached);
    for (int64_t n = 0; n < N; ++n)
      if (!(value[n] >= lowest)) winner[n] = -1;
    Lists lists(C, places);
    lists.fill(best_only ? value : nullptr, winner, N);
    int64_t* found = static_cast<int64_t*>(counts.mutable_data_ptr()) + b * C;
    int64_t* averaged = static_cast<int64_t*>(support.mutable_data_ptr()) + b * C;
    std::copy_n(lists.counts.data(), C, found);
    if (best_only) {
      std::copy_n(found, C, averaged);
    } else {
      std::vector<double> reaching(C);
      add_rows(reached.sums, panels, C, lists.sums.data());
      add_rows(reached.counts, panels, C, reaching.data());
      std::copy_n(reaching.data(), C, averaged);
    }
    std::vector<float> means(C);
    for (int64_t c = 0; c < C; ++c) means[c] = static_cast<float>(lists.sums[c] / std::max<int64_t>(averaged[c], 1));
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
  return {selected, counts, presence, support, best, above};
}

}  // namespace
}  // namespace fastcss::cpu

STABLE_TORCH_LIBRARY_IMPL(fastcss, CPU, m) { m.impl("select_tokens.cpu", FASTCSS_BOX(&fastcss::cpu::select_tokens)); }
