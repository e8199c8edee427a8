// Has what Portable in vector_math.h has, with AVX-512, and GELU. Only functions of that target may use Avx512.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "vector_math.h"

namespace fastcss::cpu {

#if defined(__x86_64__)
#define FASTCSS_V4 FASTCSS_TARGET("arch=x86-64-v4")
constexpr __mmask16 kAll = 0xffff;  // the unmasked forms make GCC 12 warn of its own headers

FASTCSS_V4 inline Vec times_power(Vec x, Vec power) {  // x · 2^⌊power⌋, 0 at −∞
  return reinterpret_cast<Vec>(
      _mm512_maskz_scalef_ps(kAll, reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(power)));
}
// At 2⁻²⁰⁰ the result of times_power is 0; −∞ less the nearest whole number would be NaN.
FASTCSS_V4 inline Vec at_least_least(Vec t) { return larger(-200.f - Vec{}, t); }
FASTCSS_V4 inline Vec nearest(Vec t) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return reinterpret_cast<Vec>(_mm512_maskz_roundscale_ps(kAll, reinterpret_cast<__m512>(t), kNearest));
}
FASTCSS_V4 inline Vec from_nearest(Vec t) {  // t − nearest(t), 0 at ±∞
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return reinterpret_cast<Vec>(_mm512_maskz_reduce_ps(kAll, reinterpret_cast<__m512>(t), kNearest));
}
FASTCSS_V4 inline Vec reciprocal14(Vec x) {
  return reinterpret_cast<Vec>(_mm512_maskz_rcp14_ps(kAll, reinterpret_cast<__m512>(x)));
}

struct Avx512 {
  static FASTCSS_V4 inline Vec exp2(Vec t) { return times_power(exp2_fraction(from_nearest(t)), nearest(t)); }
  static FASTCSS_V4 inline Vec exp_negative(Vec x) {
    x = larger(-140.f - Vec{}, x);  // whose result is 0, as that of −∞
    const Vec whole = nearest(x * kLog2e);
    return times_power(exp2_fraction((x * kLog2e - whole) + x * kLog2eRest), whole);
  }
  static FASTCSS_V4 inline Vec reciprocal(Vec x) {  // and one Newton step
    const Vec y = reciprocal14(x);
    return y + y * (1.f - x * y);
  }
  // The instruction returns its second operand if one is NaN.
  static FASTCSS_V4 inline Vec at_most(Vec x, float high) {
    return reinterpret_cast<Vec>(_mm512_maskz_min_ps(kAll, _mm512_set1_ps(high), reinterpret_cast<__m512>(x)));
  }
};
template <class V>
using MathOf = std::conditional_t<std::is_same_v<V, Vec>, Avx512, Portable>;
#else
template <class V>
using MathOf = Portable;
#endif

// x Φ(x) by erfc(z) for z = |x|/√2, relative error 1.2e-7 (Numerical Recipes, "erfcc").
struct Gelu {
  template <class V>
  static FASTCSS_INLINE V of(V x) {
    const V size = x < 0.f ? -x : x;
    const V t = MathOf<V>::reciprocal(MathOf<V>::at_most(size * 0.35355339f + 1.f, 1e30f));
    V p = t * 0.17087277f - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    const V below = 0.5f * t * MathOf<V>::exp_negative(p - 0.5f * size * size);  // Φ(−|x|)
    return x * (x < 0.f ? below : 1.f - below);
  }
};

#if defined(__x86_64__)
// The same with relative error 4e-4, half of it that of t, for results that are rounded to bfloat16, by 2⁻⁹.
// Φ(−|x|) = t 2^(p(t) − x²/2 log₂e), where p is fitted to the largest relative error up to |x| = 13.5.
struct RoughGelu {
  static FASTCSS_V4 inline Vec of(Vec x) {
    const Vec size = x < 0.f ? -x : x;
    const Vec t = reciprocal14(size * 0.25f + 1.f);
    Vec p = -t * 0.59403467f + 1.2434704f;
    p = p * t + 0.12036246f;
    p = p * t + 1.5672654f;
    p = p * t - 3.3369873f;
    const Vec power = at_least_least(p - 0.5f * kLog2e * size * size), whole = nearest(power), r = power - whole;
    Vec e = r * 0.05500892922282219f + 0.2422109693288803f;
    e = e * r + 0.6932829022407532f;
    const Vec below = t * times_power(e * r + 1.f, whole);
    return x * (x < 0.f ? below : 1.f - below);
  }
};
#endif

}  // namespace fastcss::cpu
