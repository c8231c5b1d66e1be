// Quantising rows to E4M3 with one float32 scale each, and decoding. Compiled once per instruction set: see vec.h, whose
// rules hold here too. cachedit_kernels/float8/reference.py is the definition.
#pragma once

#include "vec.h"

namespace cachedit {
namespace CACHEDIT_ISA {
namespace {

constexpr float kLargest = 448.0f;
constexpr float kSmallestScale = 0x1p-126f;  // the smallest normal number: rows of zeros divide like others

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

// The code of each x, in a lane's low byte: to nearest even, saturating. NaN keeps its sign.
inline Bits encode(Floats x) {
  const Bits bits = (Bits)x;
  const Ints magnitude = (Ints)(bits & 0x7fffffffu);
  constexpr uint32_t kRebias = (127 - 7) << 23;
  const Bits normal = ((Bits)magnitude - kRebias + 0x7ffffu + (((Bits)magnitude >> 20) & 1u)) >> 20;
  const Bits subnormal = (Bits)((Floats)magnitude + 0x1p14f) - 0x46800000u;  // 2^14 has steps of 2^-9, as subnormals do
  Bits code = select((Bits)(magnitude < 0x3c800000), subnormal, normal);  // 2^-6
  code = select((Bits)(magnitude >= 0x43e00000), Bits{} + 0x7eu, code);   // 448
  code = select((Bits)(magnitude > 0x7f800000), Bits{} + 0x7fu, code);
  return code | ((bits >> 24) & 0x80u);
}

inline Floats decode(Bits code) {
  const Bits magnitude = code & 0x7fu;
  constexpr uint32_t kRebias = (127 - 7) << 23;
  const Bits subnormal = (Bits)(__builtin_convertvector((Ints)magnitude, Floats) * 0x1p-9f);
  Bits bits = select((Bits)((Ints)magnitude < 8), subnormal, (magnitude << 20) + kRebias);
  bits = select((Bits)((Ints)magnitude == 0x7f), Bits{} + 0x7fc00000u, bits);
  return (Floats)(bits | ((code & 0x80u) << 24));
}

// kPair codes as numbers, in the order in which Format holds elements in its two vectors.
template <class Format>
struct E4M3 {
  using Element = uint8_t;

  static Pair load(const uint8_t* p) { return {decode(load_vector(p)), decode(load_vector(p + kWidth))}; }

  static void store(uint8_t* p, Pair x) {
    store_vector(p, encode(x.a));
    store_vector(p + kWidth, encode(x.b));
  }

 private:
  static Bits load_vector(const uint8_t* p) {
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Bits);
  }

  static void store_vector(uint8_t* p, Bits codes) {
    const Bytes bytes = __builtin_convertvector(codes, Bytes);
    __builtin_memcpy(p, &bytes, sizeof bytes);
  }
};

template <>
struct E4M3<BFloat16> {  // even elements in the first vector: two codes to a 16-bit lane
  using Element = uint8_t;

  static Pair load(const uint8_t* p) {
    Halves halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    const Bits both = __builtin_convertvector(halves, Bits);
    return {decode(both & 0xffu), decode(both >> 8)};
  }

  static void store(uint8_t* p, Pair x) {
    const Halves halves = __builtin_convertvector(encode(x.a) | (encode(x.b) << 8), Halves);
    __builtin_memcpy(p, &halves, sizeof halves);
  }
};

// What a row to be quantised is read from: load(i) gives kPair elements, load(i, count) fewer, with zeros behind them.
template <class Format>
struct Values {
  const typename Format::Element* x;

  Pair load(int64_t i) const { return Format::load(x + i); }

  Pair load(int64_t i, int64_t count) const {
    typename Format::Element padded[kPair] = {};
    __builtin_memcpy(padded, x + i, count * sizeof padded[0]);
    return Format::load(padded);
  }
};

inline Floats larger(Floats x, Floats y) { return (Floats)select((Bits)(x > y), (Bits)x, (Bits)y); }  // y if x is NaN

template <class Row>
float scale_of(const Row& row, int64_t n) {
  Pair most = {};
  auto take = [&](Pair x) { most = {larger(abs(x.a), most.a), larger(abs(x.b), most.b)}; };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) take(row.load(i));
  if (i < n) take(row.load(i, n - i));
  const Floats both = larger(most.a, most.b);
  float amax = 0;
  for (int lane = 0; lane < kWidth; ++lane) amax = both[lane] > amax ? both[lane] : amax;
  const float scale = amax / kLargest;
  return scale > kSmallestScale ? scale : kSmallestScale;
}

// codes = E4M3(row / scale); returns the scale.
template <class Format, class Row>
float quantize_row(const Row& row, int64_t n, uint8_t* codes) {
  const float scale = scale_of(row, n);
  auto store = [&](uint8_t* p, Pair x) { E4M3<Format>::store(p, {x.a / scale, x.b / scale}); };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) store(codes + i, row.load(i));
  if (i < n) {
    uint8_t rest[kPair];
    store(rest, row.load(i, n - i));
    __builtin_memcpy(codes + i, rest, n - i);
  }
  return scale;
}

}  // namespace
}  // namespace CACHEDIT_ISA
}  // namespace cachedit
