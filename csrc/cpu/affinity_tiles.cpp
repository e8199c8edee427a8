#include "affinity_tiles.h"

#include "vector_math_v4.h"

namespace fastcss::cpu {
namespace {

#if defined(__x86_64__)
// Serves results that are rounded to bfloat16 at once, by up to 2⁻⁹: e^x has errors of 1e-4, and 1/x of 2⁻¹⁴.
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
template <class Isa, class V>
FASTCSS_INLINE V tanh_half(V t) {
  const V e = Isa::exp2(Isa::at_most(t, 80.f));
  return (1.f - e) * Isa::reciprocal(1.f + e);
}

constexpr uint32_t kSign = 0x80000000;

// Returns −t if both pixels have the same label, else t.
template <class V>
FASTCSS_INLINE V signed_by(V t, BitsOf<V> row_labels, int32_t key_label) {
  const BitsOf<V> same = reinterpret_cast<BitsOf<V>>(row_labels == static_cast<uint32_t>(key_label));
  return reinterpret_cast<V>(reinterpret_cast<BitsOf<V>>(t) ^ (same & kSign));
}

// ---- tiles of ROWS keys by VECS vectors V of queries ----------------------------------------------------------------

template <class Isa, class V, int ROWS, int VECS>
FASTCSS_INLINE void tanh_body(FASTCSS_MAP_ARGS, float* map, int64_t ld) {
  V sum[ROWS][VECS] = {};
  accumulate<ROWS>(sum, k, a, b, kCols);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) store(map + i * ld + v * kLanesIn<V>, tanh_half<Isa>(sum[i][v] * factor));
}

template <class V, int ROWS, int VECS>
FASTCSS_INLINE void tanh_slope_body(FASTCSS_MAP_ARGS, const float* map, float* slope, int64_t ld) {
  V sum[ROWS][VECS] = {};
  accumulate<ROWS>(sum, k, a, b, kCols);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) {
      const V t = load<V>(map + i * ld + v * kLanesIn<V>);
      store(slope + i * ld + v * kLanesIn<V>, (factor - factor * t * t) * sum[i][v]);
    }
}

template <class Isa, class V, int ROWS, int VECS>
FASTCSS_INLINE void softplus_body(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels, int keys,
                                  float* twice_hinge, float* excess) {
  V sum[ROWS][VECS] = {};
  accumulate<ROWS>(sum, k, a, b, kCols);
#pragma GCC unroll 16
  for (int v = 0; v < VECS; ++v) {
    const int at = v * kLanesIn<V>;
    const auto labels = reinterpret_cast<BitsOf<V>>(load<V>(reinterpret_cast<const float*>(row_labels) + at));
    V hinge = load<V>(twice_hinge + at), more = load<V>(excess + at);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      if (i == keys) break;
      const V x = signed_by(sum[i][v] * factor, labels, key_labels[i]);
      const V minus = reinterpret_cast<V>(reinterpret_cast<BitsOf<V>>(x) | kSign);  // −|x|
      hinge += x - minus;
      const V e = Isa::exp2(minus);
      more += e * (1.f + more);
    }
    store(twice_hinge + at, hinge), store(excess + at, more);
  }
}

template <class Isa, class V, int ROWS, int VECS>
FASTCSS_INLINE void softplus_slope_body(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels,
                                        float* slope, int64_t ld) {
  V sum[ROWS][VECS] = {};
  accumulate<ROWS>(sum, k, a, b, kCols);
#pragma GCC unroll 16
  for (int v = 0; v < VECS; ++v) {
    const int at = v * kLanesIn<V>;
    const auto labels = reinterpret_cast<BitsOf<V>>(load<V>(reinterpret_cast<const float*>(row_labels) + at));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const V minus = signed_by(sum[i][v] * -factor, labels, key_labels[i]);  // −x
      const V sigmoid = Isa::reciprocal(1.f + Isa::exp2(Isa::at_most(minus, 126.f)));
      store(slope + i * ld + at, signed_by(sigmoid, labels, key_labels[i]));
    }
  }
}

// ---- one table an instruction set ----------------------------------------------------------------------------------

#define FASTCSS_TILES(name, target, Isa, V, ROWS, VECS)                                                              \
  target void tanh_##name(FASTCSS_MAP_ARGS, float* map, int64_t ld) {                                                \
    for (int v = 0; v < kCols; v += VECS * kLanesIn<V>)                                                              \
      tanh_body<Isa, V, ROWS, VECS>(k, a, b + v, factor, map + v, ld);                                               \
  }                                                                                                                  \
  target void tanh_slope_##name(FASTCSS_MAP_ARGS, const float* map, float* slope, int64_t ld) {                      \
    for (int v = 0; v < kCols; v += VECS * kLanesIn<V>)                                                              \
      tanh_slope_body<V, ROWS, VECS>(k, a, b + v, factor, map + v, slope + v, ld);                                   \
  }                                                                                                                  \
  target void softplus_##name(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels, int keys,      \
                              Softplus* sum) {                                                                       \
    for (int v = 0; v < kCols; v += VECS * kLanesIn<V>)                                                              \
      softplus_body<Isa, V, ROWS, VECS>(k, a, b + v, factor, key_labels, row_labels + v, keys, sum->twice_hinge + v, \
                                        sum->excess + v);                                                            \
  }                                                                                                                  \
  target void softplus_slope_##name(FASTCSS_MAP_ARGS, const int32_t* key_labels, const int32_t* row_labels,          \
                                    float* slope, int64_t ld) {                                                      \
    for (int v = 0; v < kCols; v += VECS * kLanesIn<V>)                                                              \
      softplus_slope_body<Isa, V, ROWS, VECS>(k, a, b + v, factor, key_labels, row_labels + v, slope + v, ld);       \
  }
#define FASTCSS_TABLE(name, pairs) {tanh_##name, pairs, tanh_slope_##name, softplus_##name, softplus_slope_##name}

#if defined(__x86_64__)
FASTCSS_TILES(v4, FASTCSS_TARGET("arch=x86-64-v4"), Avx512, Vec, 12, 2)
FASTCSS_TILES(v3, FASTCSS_TARGET("arch=x86-64-v3"), Portable, Vec8, 6, 2)

#define FASTCSS_BF16 FASTCSS_TARGET("arch=x86-64-v4,avx512bf16")
// Rounds to bfloat16 and makes a pair (first, second) in each lane.
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
FASTCSS_TILES(baseline, , Portable, Vec4, 2, 4)

}  // namespace

const AffinityTiles& affinity_tiles() {
  static const AffinityTiles baseline FASTCSS_TABLE(baseline, nullptr);
#if defined(__x86_64__)
  static const AffinityTiles v4 FASTCSS_TABLE(v4, tanh_pairs_v4), v3 FASTCSS_TABLE(v3, nullptr);
  if (kLevel == 4) return v4;
  if (kLevel == 3) return v3;
#endif
  return baseline;
}

}  // namespace fastcss::cpu
