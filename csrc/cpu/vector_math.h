// Functions of a Vec, for any CPU; where an instruction set has better ones, they are beside their use.
#pragma once

#include "pack.h"

namespace fastcss::cpu {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// 2^r for |r| ≤ ½: relative error 9e-8, exact at 0.
FASTCSS_INLINE Vec exp2_fraction(Vec r) {
  Vec p = r * 0.001326472731307149f + 0.009671512991189957f;
  p = p * r + 0.05550733581185341f;
  p = p * r + 0.24022242426872253f;
  p = p * r + 0.6931470036506653f;
  return p * r + 1.f;
}

struct Portable {
  // t ≤ 126, or NaN; 2⁻¹²⁶ below it.
  static FASTCSS_INLINE Vec exp2(Vec t) {
    t = t < -126.f ? -126.f - Vec{} : t;
    const Vec shifted = t + 12582912.f;  // 1.5 · 2²³: leaves the nearest whole number in the low bits
    const Bits scale = (reinterpret_cast<Bits>(shifted) << 23) + 0x3f800000;
    return exp2_fraction(t - (shifted - 12582912.f)) * reinterpret_cast<Vec>(scale);
  }
  static FASTCSS_INLINE Vec reciprocal(Vec x) { return 1.f / x; }
  static FASTCSS_INLINE Vec at_most(Vec x, float high) { return x > high ? high - Vec{} : x; }  // NaN stays NaN
};

// e^x for x ≤ 0; 0 below the normal numbers.
FASTCSS_INLINE Vec exp_negative(Vec x) {
  const Vec t = x * kLog2e;
  const Vec shifted = (t < -126.f ? -126.f - Vec{} : t) + 12582912.f;
  const Vec whole = shifted - 12582912.f;
  const Vec fraction = (x * kLog2e - whole) + x * 1.925963033500e-8f;  // log₂e to twice the digits
  const Bits scale = (reinterpret_cast<Bits>(shifted) << 23) + 0x3f800000;
  const Vec e = exp2_fraction(fraction) * reinterpret_cast<Vec>(scale);
  return t < -126.f ? Vec{} : e;
}

// ln(1 + x) for x ≥ 0, exact where x is tiny.
FASTCSS_INLINE Vec log1p(Vec x) {
  const Vec u = 1.f + x;
  // u = 2^n m with m in [√½, √2)
  const Bits shifted = reinterpret_cast<Bits>(u) - 0x3f3504f3;
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
  const Vec n = __builtin_convertvector(reinterpret_cast<Ints>(shifted) >> 23, Vec);
  const Vec m = reinterpret_cast<Vec>((shifted & 0x7fffff) + 0x3f3504f3);
  const Vec z = (m - 1.f) / (m + 1.f), zz = z * z;
  const Vec series = 2.f + zz * (0.66666667f + zz * (0.4f + zz * (0.28571429f + zz * 0.22222222f)));
  const Vec rounded = (x - (u - 1.f)) / u;  // what u lost of x
  const Vec result = z * series + n * kLn2 + rounded;
  return x < 3e38f ? result : x;  // ∞ and NaN as they are
}

}  // namespace fastcss::cpu
