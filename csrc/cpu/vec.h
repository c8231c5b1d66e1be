// Vectors of float32 in the width of the instruction set that the including file is compiled for, and their loads and
// stores in float32, float16 and bfloat16.
//
// Files that include this are compiled once per instruction set. Everything lies in an anonymous namespace and nothing
// with external inline functions (the standard library's templates, torch) may be included beside it: the linker keeps
// one copy of such a function, possibly the AVX-512 one, for all callers.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace cachedit {
namespace CACHEDIT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

constexpr int kPair = 2 * kWidth;

// kPair elements: two vectors, in an order that is the format's own.
struct Pair {
  Floats a, b;
};

inline Bits select(Bits mask, Bits yes, Bits no) { return (yes & mask) | (no & ~mask); }

inline Floats abs(Floats x) { return (Floats)((Bits)x & 0x7fffffffu); }

// For the formats whose first vector holds the first elements.
template <class Format>
struct InOrder {
  template <class Element>
  static Pair load(const Element* p) {
    return {Format::load_vector(p), Format::load_vector(p + kWidth)};
  }

  template <class Element>
  static void store(Element* p, Pair x) {
    Format::store_vector(p, x.a);
    Format::store_vector(p + kWidth, x.b);
  }

  static void store_floats(float* p, Pair x) { __builtin_memcpy(p, &x, sizeof x); }
};

struct Float32 : InOrder<Float32> {
  using Element = float;

  static Floats load_vector(const float* p) {
    Floats x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }

  static void store_vector(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
};

// Two elements to a 32-bit lane, those of even index (low halves: little-endian) in the first vector: half the loads
// and none of the shuffles that widening in order would take.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "BFloat16 takes the low half for the first element");
struct BFloat16 {
  using Element = uint16_t;

  static Pair load(const uint16_t* p) {
    Bits bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return {(Floats)(bits << 16), (Floats)(bits & 0xffff0000u)};
  }

  static void store(uint16_t* p, Pair x) {
    Bits bits = (round(x.a) >> 16) | (round(x.b) & 0xffff0000u);
    __builtin_memcpy(p, &bits, sizeof bits);
  }

  static void store_floats(float* p, Pair x) {
    for (int i = 0; i < kWidth; ++i) {
      p[2 * i] = x.a[i];
      p[2 * i + 1] = x.b[i];
    }
  }

  static Bits round(Floats x) {  // upper half: to nearest even; the addition would turn some NaN into a number
    Bits bits = (Bits)x;
    return select((Bits)(x != x), Bits{} + 0x7fc00000u, bits + 0x7fffu + ((bits >> 16) & 1u));
  }
};

struct Float16 : InOrder<Float16> {
  using Element = uint16_t;

#if defined(__AVX512F__)
  static Floats load_vector(const uint16_t* p) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static void store_vector(uint16_t* p, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static Floats load_vector(const uint16_t* p) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static void store_vector(uint16_t* p, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Floats load_vector(const uint16_t* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    Bits half = __builtin_convertvector(h, Bits);
    Bits magnitude = half & 0x7fffu;
    constexpr uint32_t kRebias = (127 - 15) << 23;
    Bits normal = (magnitude << 13) + kRebias;
    Bits special = (normal + kRebias) | ((Bits)(magnitude > 0x7c00u) & 0x400000u);  // inf, and NaN made quiet
    Bits subnormal = (Bits)(__builtin_convertvector((Ints)magnitude, Floats) * 0x1p-24f);
    Bits bits = select((Bits)(magnitude < 0x400u), subnormal, select((Bits)(magnitude >= 0x7c00u), special, normal));
    return (Floats)(bits | ((half & 0x8000u) << 16));
  }

  static void store_vector(uint16_t* p, Floats x) {  // to nearest even
    Bits bits = (Bits)x;
    Bits magnitude = bits & 0x7fffffffu;
    constexpr uint32_t kRebias = (127 - 15) << 23;
    Bits normal = (magnitude - kRebias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    Bits subnormal = (Bits)((Floats)magnitude + 0.5f) - 0x3f000000u;  // 0.5 has steps of 2^-24, as subnormals do
    Bits nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
    Bits half = select((Bits)(magnitude < 0x38800000u), subnormal, normal);
    half = select((Bits)(magnitude >= 0x47800000u), Bits{} + 0x7c00u, half);
    half = select((Bits)(magnitude > 0x7f800000u), nan, half);
    Halves h = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves);
    __builtin_memcpy(p, &h, sizeof h);
  }
#endif
};

}  // namespace
}  // namespace CACHEDIT_ISA
}  // namespace cachedit
