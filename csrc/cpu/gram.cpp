// ring_gram on contiguous elements. Compiled once per instruction set (see vec.h).
#include "kernels.h"
#include "vec.h"

namespace cachedit {
namespace CACHEDIT_ISA {
namespace {

// Sums are laid out alike for every instruction set, as in residual.cpp, so that all give the same bits. Chains of
// additions are short, 8 products, 4 of their sums and 16 of those: forecasters subtract what they have in common.
constexpr int kLanes = 32;
constexpr int kPairs = kLanes / kPair;
constexpr int64_t kChain = 8 * kLanes;
constexpr int64_t kBlock = 4 * kChain;  // small enough that all slots' elements stay in the first cache
constexpr int64_t kProducts = kMaxGramSlots * (kMaxGramSlots + 1) / 2;

struct Lanes {
  Pair pairs[kPairs];
};

template <class Format>
float add_lanes(const Lanes& sums) {
  float lanes[kLanes];
  for (int p = 0; p < kPairs; ++p) Format::store_floats(lanes + p * kPair, sums.pairs[p]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// sums[t] += the products of n elements of x with those of y[t], in lanes; n is a multiple of kLanes.
template <class Format, int kCount>
inline void multiply(const typename Format::Element* x, const typename Format::Element* const* y, int64_t n,
                     Lanes* sums) {
  Lanes totals[kCount] = {};
  for (int64_t chain = 0; chain < n; chain += kChain) {
    const int64_t stop = n - chain < kChain ? n : chain + kChain;
    Lanes lanes[kCount] = {};
    for (int64_t i = chain; i < stop; i += kLanes) {
      for (int p = 0; p < kPairs; ++p) {
        const Pair a = Format::load(x + i + p * kPair);
        for (int t = 0; t < kCount; ++t) {
          const Pair b = Format::load(y[t] + i + p * kPair);
          lanes[t].pairs[p].a += a.a * b.a;
          lanes[t].pairs[p].b += a.b * b.b;
        }
      }
    }
    for (int t = 0; t < kCount; ++t) {
      for (int p = 0; p < kPairs; ++p) {
        totals[t].pairs[p].a += lanes[t].pairs[p].a;
        totals[t].pairs[p].b += lanes[t].pairs[p].b;
      }
    }
  }
  for (int t = 0; t < kCount; ++t) {
    for (int p = 0; p < kPairs; ++p) {
      sums[t].pairs[p].a += totals[t].pairs[p].a;
      sums[t].pairs[p].b += totals[t].pairs[p].b;
    }
  }
}

// Several products with one slot at once: it is loaded once, and latencies overlap.
template <class Format>
void multiply_all(const typename Format::Element* const* slots, int64_t count, int64_t n, Lanes* sums) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j <= i;) {
      const int64_t left = i + 1 - j;
      const int64_t together = left <= 4 ? left : left <= 6 ? 3 : 4;
      switch (together) {
        case 1: multiply<Format, 1>(slots[i], slots + j, n, sums); break;
        case 2: multiply<Format, 2>(slots[i], slots + j, n, sums); break;
        case 3: multiply<Format, 3>(slots[i], slots + j, n, sums); break;
        default: multiply<Format, 4>(slots[i], slots + j, n, sums);
      }
      j += together;
      sums += together;
    }
  }
}

template <class Format>
void ring_gram(const void* const* slots, int64_t count, int64_t n, double* sums) {
  using Element = typename Format::Element;
  const Element* block[kMaxGramSlots];
  const int64_t products = count * (count + 1) / 2;
  Lanes lanes[kProducts];
  for (int64_t i = 0; i < products; ++i) lanes[i] = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const int64_t whole = size / kLanes * kLanes;
    for (int64_t k = 0; k < count; ++k) block[k] = static_cast<const Element*>(slots[k]) + begin;
    if (whole > 0) multiply_all<Format>(block, count, whole, lanes);
    if (whole < size) {  // padded with zeros, which add nothing
      Element padded[kMaxGramSlots][kLanes] = {};
      for (int64_t k = 0; k < count; ++k) {
        __builtin_memcpy(padded[k], block[k] + whole, (size - whole) * sizeof(Element));
        block[k] = padded[k];
      }
      multiply_all<Format>(block, count, kLanes, lanes);
    }
  }
  for (int64_t i = 0; i < products; ++i) sums[i] += add_lanes<Format>(lanes[i]);
}

}  // namespace

extern const GramKernels gram_kernels = {
    {ring_gram<Float32>, ring_gram<Float16>, ring_gram<BFloat16>},
};

}  // namespace CACHEDIT_ISA
}  // namespace cachedit
