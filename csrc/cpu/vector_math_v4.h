// Has what Portable in vector_math.h has, with AVX-512. Only functions of that target may use it.
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

}  // namespace fastcss::cpu
