#include "affinity_tiles.h"

#include "vector_math_v4.h"

namespace fastcss::cpu {
namespace {

#if defined(__x86_64__)
// For results that are rounded to bfloat16 at once, by up to 2⁻⁹: errors 1e-4 of e^x and 2⁻¹⁴ of 1/x.
struct Avx512Rough : Avx512 {
  static FASTCSS_V4 inline Vec exp2(Vec t) {
    const Vec r = from_nearest(t);
    return times_power(((r * 0.05500892922282219f + 0.2422109693288803f) * r + 0.6932829022407532f) * r + 1.f,
                       nearest(t));
  }
  static FASTCSS_V4 inline Vec reciprocal(Vec x) { return reciprocal14(x); }
};
#endif

// ---- what becomes of an element ------------------------------------------------------------------------------------

// tanh(s/2) of t = −s · log₂e: (1 − e) / (1 + e) with e = 2^t, exact at 0 and ±∞.
template <class Isa>
FASTCSS_INLINE Vec tanh_half(Vec t) {
  const Vec e = Isa::exp2(Isa::at_most(t, 80.f));
  return (1.f - e) * Isa::reciprocal(1.f + e);
}

constexpr uint32_t kSign = 0x80000000;

// −t where both pixels have one label, else t.
FASTCSS_INLINE Vec signed_by(Vec t, Bits row_labels, int32_t key_label) {
  const Bits same = reinterpret_cast<Bits>(row_labels == static_cast<uint32_t>(key_label));
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(t) ^ (same & kSign));
}

// ---- tiles of ROWS keys by VECS vectors of queries ------------------------------------------------------------------

template <class Isa, int ROWS, int VECS>
FASTCSS_INLINE void tanh_body(FASTCSS_MAP_ARGS, float* map, int64_t ld) {
  Vec sum[ROWS][VECS] = {};
  accumulate<ROWS>(sum, k, a, b, kCols);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) store(map + i * ld + v * kLanes, tanh_half<Isa>(sum[i][v] * factor));
}

template <int ROWS, int VECS>
FASTCSS_INLINE void tanh_slope_body(FASTCSS_MAP_ARGS, const float* map, float* slope, int64_t ld) {
  Vec sum[ROWS][VECS] = {};
  accumulate<ROWS>(sum, k, a, b, kCols);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) {
      const Vec t = load(map + i * ld + v * kLanes);
      store(slope + i * ld + v * kLanes, (factor - factor * t * t) * sum[i][v]);
    }
}

template <class Isa, int ROWS, int VECS>
FASTCSS_INLINE void softplus_body(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels, int keys,
                                  Vec* twice_hinge, Vec* excess) {
  Vec sum[ROWS][VECS] = {};
  accumulate<ROWS>(sum, k, a, b, kCols);
#pragma GCC unroll 16
  for (int v = 0; v < VECS; ++v) {
    const Bits labels = reinterpret_cast<Bits>(load(reinterpret_cast<const float*>(row_labels) + v * kLanes));
    Vec hinge = twice_hinge[v], more = excess[v];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      if (i == keys) break;
      const Vec x = signed_by(sum[i][v] * factor, labels, key_labels[i]);
      const Vec minus = reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) | kSign);  // −|x|
      hinge += x - minus;
      const Vec e = Isa::exp2(minus);
      more += e * (1.f + more);
    }
    twice_hinge[v] = hinge, excess[v] = more;
  }
}

template <class Isa, int ROWS, int VECS>
FASTCSS_INLINE void softplus_slope_body(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels,
                                        float* slope, int64_t ld) {
  Vec sum[ROWS][VECS] = {};
  accumulate<ROWS>(sum, k, a, b, kCols);
#pragma GCC unroll 16
  for (int v = 0; v < VECS; ++v) {
    const Bits labels = reinterpret_cast<Bits>(load(reinterpret_cast<const float*>(row_labels) + v * kLanes));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec minus = signed_by(sum[i][v] * -factor, labels, key_labels[i]);  // −x
      const Vec sigmoid = Isa::reciprocal(1.f + Isa::exp2(Isa::at_most(minus, 126.f)));
      store(slope + i * ld + v * kLanes, signed_by(sigmoid, labels, key_labels[i]));
    }
  }
}

// ---- one table an instruction set ----------------------------------------------------------------------------------

#define FASTCSS_TILES(name, target, Isa, ROWS, VECS)                                                             \
  target void tanh_##name(FASTCSS_MAP_ARGS, float* map, int64_t ld) {                                            \
    for (int v = 0; v < kCols; v += VECS * kLanes) tanh_body<Isa, ROWS, VECS>(k, a, b + v, factor, map + v, ld); \
  }                                                                                                              \
  target void tanh_slope_##name(FASTCSS_MAP_ARGS, const float* map, float* slope, int64_t ld) {                  \
    for (int v = 0; v < kCols; v += VECS * kLanes)                                                               \
      tanh_slope_body<ROWS, VECS>(k, a, b + v, factor, map + v, slope + v, ld);                                  \
  }                                                                                                              \
  target void softplus_##name(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels, int keys,  \
                              Softplus* sum) {                                                                   \
    for (int v = 0; v < kCols; v += VECS * kLanes)                                                               \
      softplus_body<Isa, ROWS, VECS>(k, a, b + v, factor, key_labels, row_labels + v, keys,                      \
                                     sum->twice_hinge + v / kLanes, sum->excess + v / kLanes);                   \
  }                                                                                                              \
  target void softplus_slope_##name(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels,      \
                                    float* slope, int64_t ld) {                                                  \
    for (int v = 0; v < kCols; v += VECS * kLanes)                                                               \
      softplus_slope_body<Isa, ROWS, VECS>(k, a, b + v, factor, key_labels, row_labels + v, slope + v, ld);      \
  }
#define FASTCSS_TABLE(name, pairs) {tanh_##name, pairs, tanh_slope_##name, softplus_##name, softplus_slope_##name}

#if defined(__x86_64__)
FASTCSS_TILES(v4, FASTCSS_TARGET("arch=x86-64-v4"), Avx512, 12, 2)
FASTCSS_TILES(v3, FASTCSS_TARGET("arch=x86-64-v3"), Portable, 6, 1)

#define FASTCSS_BF16 FASTCSS_TARGET("arch=x86-64-v4,avx512bf16")
// Lane by lane the pair (first, second), rounded to bfloat16.
FASTCSS_BF16 inline Vec round_pairs(Vec first, Vec second) {
  const Half16Bits low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const Half16Bits high = low + 8;
  alignas(64) uint16_t order[2 * kLanes];
  std::memcpy(order, &low, sizeof(low)), std::memcpy(order + kLanes, &high, sizeof(high));
  const auto both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
  return reinterpret_cast<Vec>(_mm512_permutexvar_epi16(_mm512_load_si512(order), reinterpret_cast<__m512i>(both)));
}
FASTCSS_BF16 void tanh_pairs_v4(FASTCSS_MAP_ARGS, float* map, int64_t ld) {
  Vec sum[12][2] = {};
  accumulate<12, Vec, 12, 2, multiply_add_pairs>(sum, k, a, b, kCols);
#pragma GCC unroll 16
  for (int i = 0; i < 12; i += 2)
#pragma GCC unroll 16
    for (int v = 0; v < 2; ++v)
      store(map + i / 2 * ld + v * kLanes,
            round_pairs(tanh_half<Avx512Rough>(sum[i][v] * factor), tanh_half<Avx512Rough>(sum[i + 1][v] * factor)));
}
#endif
FASTCSS_TILES(baseline, , Portable, 2, 1)

}  // namespace

const AffinityTiles& affinity_tiles() {
  static const AffinityTiles baseline FASTCSS_TABLE(baseline, nullptr);
#if defined(__x86_64__)
  static const AffinityTiles v4 FASTCSS_TABLE(v4, tanh_pairs_v4), v3 FASTCSS_TABLE(v3, nullptr);
  if (level() == 4) return v4;
  if (level() == 3) return v3;
#endif
  return baseline;
}

}  // namespace fastcss::cpu
