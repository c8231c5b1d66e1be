// Quantising rows to E4M3 and back. Compiled once per instruction set (see vec.h).
#include "kernels.h"
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

struct CodePair {
  Bits a, b;
};

// Codes of kPair elements, in the order in which the format holds them in its two vectors.
template <class Format>
struct Codes {
  static CodePair load(const uint8_t* p) { return {load_vector(p), load_vector(p + kWidth)}; }

  static void store(uint8_t* p, CodePair codes) {
    store_vector(p, codes.a);
    store_vector(p + kWidth, codes.b);
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
struct Codes<BFloat16> {  // even elements in the first vector: two codes to a 16-bit lane
  static CodePair load(const uint8_t* p) {
    Halves halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    const Bits both = __builtin_convertvector(halves, Bits);
    return {both & 0xffu, both >> 8};
  }

  static void store(uint8_t* p, CodePair codes) {
    const Halves halves = __builtin_convertvector(codes.a | (codes.b << 8), Halves);
    __builtin_memcpy(p, &halves, sizeof halves);
  }
};

inline Floats larger(Floats x, Floats y) { return (Floats)select((Bits)(x > y), (Bits)x, (Bits)y); }  // y if x is NaN

template <class Format>
float scale_of(const typename Format::Element* x, int64_t n) {
  Pair most = {};
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const Pair p = Format::load(x + i);
    most = {larger(abs(p.a), most.a), larger(abs(p.b), most.b)};
  }
  if (i < n) {
    typename Format::Element padded[kPair] = {};
    __builtin_memcpy(padded, x + i, (n - i) * sizeof padded[0]);
    const Pair p = Format::load(padded);
    most = {larger(abs(p.a), most.a), larger(abs(p.b), most.b)};
  }
  const Floats both = larger(most.a, most.b);
  float amax = 0;
  for (int lane = 0; lane < kWidth; ++lane) amax = both[lane] > amax ? both[lane] : amax;
  const float scale = amax / kLargest;
  return scale > kSmallestScale ? scale : kSmallestScale;
}

template <class Format>
inline void quantize_pair(const typename Format::Element* x, float scale, uint8_t* codes) {
  const Pair p = Format::load(x);
  Codes<Format>::store(codes, {encode(p.a / scale), encode(p.b / scale)});
}

template <class Format>
inline void dequantize_pair(const uint8_t* codes, float scale, typename Format::Element* out) {
  const CodePair c = Codes<Format>::load(codes);
  Format::store(out, {decode(c.a) * scale, decode(c.b) * scale});
}

template <class Format>
void quantize(const void* values, int64_t rows, int64_t n, uint8_t* codes, float* scales) {
  using Element = typename Format::Element;
  const Element* x = static_cast<const Element*>(values);
  for (int64_t row = 0; row < rows; ++row, x += n, codes += n) {
    const float scale = scale_of<Format>(x, n);
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) quantize_pair<Format>(x + i, scale, codes + i);
    if (i < n) {
      Element padded[kPair] = {};
      uint8_t rest[kPair];
      __builtin_memcpy(padded, x + i, (n - i) * sizeof(Element));
      quantize_pair<Format>(padded, scale, rest);
      __builtin_memcpy(codes + i, rest, n - i);
    }
    scales[row] = scale;
  }
}

template <class Format>
void dequantize(const uint8_t* codes, const float* scales, int64_t rows, int64_t n, void* values) {
  using Element = typename Format::Element;
  Element* out = static_cast<Element*>(values);
  for (int64_t row = 0; row < rows; ++row, codes += n, out += n) {
    const float scale = scales[row];
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) dequantize_pair<Format>(codes + i, scale, out + i);
    if (i < n) {
      uint8_t padded[kPair] = {};
      Element rest[kPair];
      __builtin_memcpy(padded, codes + i, n - i);
      dequantize_pair<Format>(padded, scale, rest);
      __builtin_memcpy(out + i, rest, (n - i) * sizeof(Element));
    }
  }
}

}  // namespace

extern const UlyssesKernels ulysses_kernels = {
    {quantize<Float32>, quantize<Float16>, quantize<BFloat16>},
    {dequantize<Float32>, dequantize<Float16>, dequantize<BFloat16>},
};

}  // namespace CACHEDIT_ISA
}  // namespace cachedit
