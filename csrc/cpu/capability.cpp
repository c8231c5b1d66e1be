// Which of the compiled instruction sets to use.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

#if defined(CACHEDIT_WITH_avx2)
#include <cpuid.h>
#endif

namespace cachedit {
namespace {

#define CACHEDIT_TABLES(isa) \
  &isa::residual_kernels, &isa::forecast_kernels, &isa::gram_kernels, &isa::attention_kernels, &isa::ulysses_kernels

constexpr Kernels kBaseline = {"default", CACHEDIT_TABLES(baseline)};

#if defined(CACHEDIT_WITH_avx2)
constexpr Kernels kAvx2 = {"avx2", CACHEDIT_TABLES(avx2)};
constexpr Kernels kAvx512 = {"avx512", CACHEDIT_TABLES(avx512)};

bool has_f16c() {  // older compilers' __builtin_cpu_supports does not know it
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && has_f16c(); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_f16c();
}
#endif

Kernels choose() {
#if defined(CACHEDIT_WITH_avx2)
  const char* wanted = std::getenv("CACHEDIT_CPU_CAPABILITY");  // can lower the choice, not raise it
  const bool only_default = wanted != nullptr && std::strcmp(wanted, "default") == 0;
  const bool only_avx2 = wanted != nullptr && std::strcmp(wanted, "avx2") == 0;
  __builtin_cpu_init();
  if (has_avx512() && !only_default && !only_avx2) return kAvx512;
  if (has_avx2() && !only_default) return kAvx2;
#endif
  return kBaseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace cachedit

extern "C" __attribute__((visibility("default"))) const char* cachedit_cpu_capability() {
  return cachedit::kernels().capability;
}
