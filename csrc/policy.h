// The decision of a step, as numbers: the twin of python/cachedit/policy.py (what is decided), store.py (slots of the
// ring) and forecast.py (TaylorSeer's weights). It compiles for the host, where tests/cachedit/test_policy_native.py
// compares it with these step by step, and for the device (csrc/cuda/policy.cu). Nothing allocates, nothing throws.
//
// A step is decide(), then carry_out(). Arithmetic is in double with products rounded before they are added (g++ needs
// -ffp-contract=off for that), so that all of it gives Python's bits.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define CACHEDIT_HD __host__ __device__
#else
#define CACHEDIT_HD
#endif

namespace cachedit::policy {

constexpr int32_t kMaxMask = 1024;  // steps
constexpr int32_t kMaxOrder = 4;
constexpr int32_t kMaxSlots = kMaxOrder + 1;

enum Reason : int32_t {  // why a step was decided as it was; python/cachedit/policy.py words them
  kNothingStored,
  kWarmup,
  kMask,
  kMaxCachedSteps,
  kMaxContinuousCachedSteps,
  kAccumulatedDiff,
  kThreshold,
  kNonFiniteDiff,
  kDiff,
};

// What a request is decided by; does not change while it runs. Fields as in cachedit.DBCacheConfig.
struct Rules {
  double threshold = 0.0;
  double accumulated_limit = 0.0;  // 0 or less: none
  int64_t max_cached_steps = -1;   // negative: no limit
  int64_t max_continuous_cached_steps = -1;
  int64_t warmup = 0;  // steps 0, interval, 2 * interval, ... below it
  int64_t warmup_interval = 1;
  int64_t refresh_hint = 0;  // 0: none
  bool refresh_repeats = false;
  int32_t order = 0;  // of TaylorSeer, 0 to kMaxOrder; 0 reuses the last residual as it is
  bool mask_is_static = false;
  int32_t mask_length = 0;  // 0: none
  uint32_t mask[kMaxMask / 32] = {};
};

// Stored residuals: which steps they are of, and where they lie.
struct Ring {
  int32_t next_slot = 0;
  int32_t count = 0;
  int64_t steps[kMaxSlots] = {};  // newest first
};

struct State {
  int64_t step = 0;    // of the request; may be set between steps, because a guidance branch need not run at each
  int64_t origin = 0;  // where the cache last started over
  int64_t reused = 0;
  int64_t run = 0;  // reused in a row
  int64_t nonfinite = 0;
  double accumulated = 0.0;
  bool stored = false;
  Ring ring;
};

struct Step {
  int64_t step;
  double diff;  // if measured
  bool measured;
  bool reused;
  Reason reason;
  int32_t slot;               // computed: where the residual goes; reused: where the newest one lies
  double weights[kMaxSlots];  // by slot; of a reused step, else 0
};

CACHEDIT_HD inline bool computes(const Rules& rules, int64_t step) {
  return (rules.mask[step / 32] >> (step % 32)) & 1;
}

// Takes over a mask (1 computes), and cuts the warm-up to the ones that it begins with. False where it is too long.
inline bool set_mask(Rules& rules, const uint8_t* mask, int64_t length, bool is_static) {
  if (length > kMaxMask) return false;
  int64_t leading_ones = 0;
  while (leading_ones < length && mask[leading_ones]) ++leading_ones;
  for (uint32_t& word : rules.mask) word = 0;
  for (int64_t i = 0; i < length; ++i) rules.mask[i / 32] |= static_cast<uint32_t>(mask[i] != 0) << (i % 32);
  rules.mask_length = static_cast<int32_t>(length);
  rules.mask_is_static = is_static;
  rules.warmup = rules.warmup < leading_ones ? rules.warmup : leading_ones;
  return true;
}

// How far something has moved, of sums as residual_l1 and l1 return them.
CACHEDIT_HD inline double relative(float moved, float size) {
  if (size != 0.0f) return static_cast<double>(moved) / static_cast<double>(size);
  return moved == 0.0f ? 0.0 : static_cast<double>(INFINITY);
}

// Residuals are dropped, counts carry on: the next step is computed.
CACHEDIT_HD inline void release(State& state) {
  state.stored = false;
  state.ring = Ring();
}

// Starts over, as at the first step of a request; only statistics carry on.
CACHEDIT_HD inline void restart(State& state) {
  release(state);
  state.origin = state.step;
  state.reused = state.run = 0;
  state.accumulated = 0.0;
}

CACHEDIT_HD inline bool refresh_due(const Rules& rules, const State& state) {
  const int64_t hint = rules.refresh_hint;
  if (hint == 0) return false;
  if (rules.refresh_repeats) return state.step / hint > state.origin / hint;
  return state.origin < hint && hint <= state.step;
}

// Decides as far as the difference is not needed. True: it is, and step is left undecided.
CACHEDIT_HD inline bool needs_diff(const Rules& rules, const State& state, Step& decided) {
  const int64_t step = state.step - state.origin;
  const bool masked = rules.mask_length > 0, within = step < rules.mask_length;
  const auto because = [&decided](Reason reason, bool reused = false) {
    decided.reason = reason;
    decided.reused = reused;
    return false;
  };
  if (!state.stored) return because(kNothingStored);
  if (step < rules.warmup && step % rules.warmup_interval == 0) return because(kWarmup);
  if (within && computes(rules, step)) return because(kMask);
  if (masked && rules.mask_is_static) return because(kMask, within);
  if (0 <= rules.max_cached_steps && rules.max_cached_steps <= state.reused) return because(kMaxCachedSteps);
  if (0 <= rules.max_continuous_cached_steps && rules.max_continuous_cached_steps <= state.run) {
    return because(kMaxContinuousCachedSteps);
  }
  if (0.0 < rules.accumulated_limit && rules.accumulated_limit <= state.accumulated) return because(kAccumulatedDiff);
  if (rules.threshold <= 0.0) return because(kThreshold);
  return true;
}

CACHEDIT_HD inline double add_product(double sum, double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(sum, __dmul_rn(a, b));  // never fused
#else
  return sum + a * b;
#endif
}

// TaylorSeer's ladder of derivatives, for unit vectors: see taylor_weights in python/cachedit/forecast.py.
CACHEDIT_HD inline void forecast(const Ring& ring, int32_t slots, int64_t step, double* by_slot) {
  double ladder[kMaxSlots][kMaxSlots] = {};  // rung seen from stored step j, as weights of the stored steps
  for (int32_t j = 0; j < ring.count; ++j) ladder[j][j] = 1.0;
  const int64_t elapsed = step - ring.steps[0];
  int64_t power = 1, factorial = 1;
  for (int32_t i = 0; i < ring.count; ++i) {
    if (i > 0) {
      power *= elapsed;
      factorial *= i;
      for (int32_t j = 0; j < ring.count - i; ++j) {
        const double gap = static_cast<double>(ring.steps[j] - ring.steps[j + 1]);
        for (int32_t k = 0; k < ring.count; ++k) ladder[j][k] = (ladder[j][k] - ladder[j + 1][k]) / gap;
      }
    }
    const double factor = static_cast<double>(power) / static_cast<double>(factorial);
    for (int32_t k = 0; k < ring.count; ++k) {
      double& weight = by_slot[(ring.next_slot + slots - 1 - k) % slots];
      weight = add_product(weight, factor, ladder[0][k]);
    }
  }
}

// Decides the step. A computed one is stored only once it is carried out: until then nothing is.
CACHEDIT_HD inline Step decide(const Rules& rules, State& state, double diff) {
  const int32_t slots = rules.order + 1;
  if (refresh_due(rules, state)) restart(state);
  Step decided = {};
  decided.step = state.step;
  decided.measured = needs_diff(rules, state, decided);
  if (decided.measured) {
    decided.diff = diff;
    if (std::isfinite(diff)) {
      decided.reason = kDiff;
      decided.reused = diff < rules.threshold;
    } else {
      decided.reason = kNonFiniteDiff;
      ++state.nonfinite;
      state.ring = Ring();  // what is stored may be as bad, and forecasts weigh several steps
    }
  }
  decided.slot = state.ring.next_slot;
  if (decided.reused) {
    decided.slot = (state.ring.next_slot + slots - 1) % slots;
    forecast(state.ring, slots, state.step, decided.weights);
  } else {
    state.stored = false;
  }
  return decided;
}

// Takes note that the step was carried out as decided, and moves to the next. stored: a computed one left its residual.
CACHEDIT_HD inline void carry_out(const Rules& rules, State& state, const Step& decided, bool stored = true) {
  if (decided.reused) {
    ++state.reused;
    ++state.run;
    if (decided.measured) state.accumulated += decided.diff;
  } else {
    state.run = 0;
    state.accumulated = 0.0;
    state.stored = stored;
  }
  if (!decided.reused && stored) {
    const int32_t slots = rules.order + 1;
    Ring& ring = state.ring;
    ring.count = ring.count < slots ? ring.count + 1 : slots;
    for (int32_t i = ring.count - 1; i > 0; --i) ring.steps[i] = ring.steps[i - 1];
    ring.steps[0] = state.step;
    ring.next_slot = (ring.next_slot + 1) % slots;
  }
  ++state.step;
}

}  // namespace cachedit::policy
