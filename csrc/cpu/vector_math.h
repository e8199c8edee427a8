// Has functions of a vector V, for any CPU; an instruction set's better ones stand beside their use.
#pragma once

#include "pack.h"

namespace fastcss::cpu {

constexpr float kLog2e = 1.44269504f, kLog2eRest = 1.925963033500e-8f;  // together log₂e to twice the digits
constexpr float kLn2 = 0.693147181f;

template <class V>
FASTCSS_INLINE V larger(V x, V y) {  // y if one is NaN
  return x > y ? x : y;
}

// 2^r for |r| ≤ ½: relative error 9e-8, exact at 0.
template <class V>
FASTCSS_INLINE V exp2_fraction(V r) {
  V p = r * 0.001326472731307149f + 0.009671512991189957f;
  p = p * r + 0.05550733581185341f;
  p = p * r + 0.24022242426872253f;
  p = p * r + 0.6931470036506653f;
  return p * r + 1.f;
}

// e^x for x ≤ 0; 0 below the normal numbers.
template <class V>
FASTCSS_INLINE V exp_negative(V x) {
  const V t = x * kLog2e;
  const V shifted = (t < -126.f ? -126.f - V{} : t) + 12582912.f;
  const V whole = shifted - 12582912.f;
  const V fraction = (x * kLog2e - whole) + x * kLog2eRest;
  const BitsOf<V> scale = (reinterpret_cast<BitsOf<V>>(shifted) << 23) + 0x3f800000;
  const V e = exp2_fraction(fraction) * reinterpret_cast<V>(scale);
  return t < -126.f ? V{} : e;
}

struct Portable {
  // Takes t ≤ 126, or NaN; below −126 the result is 2⁻¹²⁶.
  template <class V>
  static FASTCSS_INLINE V exp2(V t) {
    t = t < -126.f ? -126.f - V{} : t;
    const V shifted = t + 12582912.f;  // 1.5 · 2²³: leaves the nearest whole number in the low bits
    const BitsOf<V> scale = (reinterpret_cast<BitsOf<V>>(shifted) << 23) + 0x3f800000;
    return exp2_fraction(t - (shifted - 12582912.f)) * reinterpret_cast<V>(scale);
  }
  template <class V>
  static FASTCSS_INLINE V exp_negative(V x) {
    return cpu::exp_negative(x);
  }
  template <class V>
  static FASTCSS_INLINE V reciprocal(V x) {
    return 1.f / x;
  }
  template <class V>
  static FASTCSS_INLINE V at_most(V x, float high) {  // NaN stays NaN
    return x > high ? high - V{} : x;
  }
};

// ln(1 + x) for x ≥ 0, exact where x is tiny.
template <class V>
FASTCSS_INLINE V log1p(V x) {
  const V u = 1.f + x;
  // u = 2^n m with m in [√½, √2)
  const BitsOf<V> shifted = reinterpret_cast<BitsOf<V>>(u) - 0x3f3504f3;
  const V n = __builtin_convertvector(reinterpret_cast<IntsOf<V>>(shifted) >> 23, V);
  const V m = reinterpret_cast<V>((shifted & 0x7fffff) + 0x3f3504f3);
  const V z = (m - 1.f) / (m + 1.f), zz = z * z;
  const V series = 2.f + zz * (0.66666667f + zz * (0.4f + zz * (0.28571429f + zz * 0.22222222f)));
  const V rounded = (x - (u - 1.f)) / u;  // the part of x that rounding took from u
  const V result = z * series + n * kLn2 + rounded;
  return x < 3e38f ? result : x;  // ∞ and NaN as they are
}

}  // namespace fastcss::cpu
