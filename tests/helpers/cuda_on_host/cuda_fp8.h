// E4M3 on the CPU, by looking for the nearest of all numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_fp16.h"

using __nv_fp8_storage_t = uint8_t;
enum __nv_saturation_t { __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3 };

inline __half __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t code, __nv_fp8_interpretation_t) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  float value = exponent == 0 ? std::ldexp(mantissa / 8.0f, -6) : std::ldexp(1 + mantissa / 8.0f, exponent - 7);
  if ((code & 0x7f) == 0x7f) value = NAN;
  return {static_cast<_Float16>(code & 0x80 ? -value : value)};
}

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t, __nv_fp8_interpretation_t kind) {
  if (x != x) return 0x7f;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::fabs(x);
  uint8_t low = 0, high = 0x7e;  // 448
  if (magnitude >= 448.0f) return sign | high;
  while (high - low > 1) {
    const uint8_t middle = (low + high) / 2;
    (__half2float(__nv_cvt_fp8_to_halfraw(middle, kind)) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - static_cast<double>(__half2float(__nv_cvt_fp8_to_halfraw(low, kind)));
  const double above = static_cast<double>(__half2float(__nv_cvt_fp8_to_halfraw(high, kind))) - magnitude;
  return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
}
