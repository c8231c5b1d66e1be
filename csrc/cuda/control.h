// What decides a section's steps on the device, in one piece of memory: the host fills it, copies it there before a
// request, and reads it back after. See docs/architecture.md, "The decision on the device".
#pragma once

#include "policy.h"

namespace cachedit {
namespace cuda {

constexpr int64_t kMaxRecords = 1024;  // later steps are decided, but not recorded

struct Record {
  int64_t step;
  double diff;
  policy::Reason reason;
  bool measured;
  bool reused;
};

// The part that a step reads and writes, small enough to lie in shared memory while it does.
struct Live {
  policy::Rules rules;
  policy::State state;
  int64_t recorded;
};

struct Control {
  Live live;
  Record records[kMaxRecords];
};

// Decides a step and takes it as carried out: in a graph nothing fails halfway. True: reuse.
//
// sums      float32 [2] as residual_l1 returns them for hidden_states; null where nothing is measured
// slot      where residual_push writes on a computed step; where the newest residual lies on a reused one
// weights   float32 [2, order + 1] by slot, for residual_forecast: the forecast's, and the newest residual as it is
CACHEDIT_HD inline bool take_step(Live& live, Record* records, const float* sums, int64_t* slot, float* weights) {
  const double diff = sums == nullptr ? static_cast<double>(INFINITY) : policy::relative(sums[0], sums[1]);
  const policy::Step step = policy::decide(live.rules, live.state, diff);
  policy::carry_out(live.rules, live.state, step);
  const int32_t slots = live.rules.order + 1;
  *slot = step.slot;
  for (int32_t k = 0; k < slots; ++k) {
    weights[k] = static_cast<float>(step.weights[k]);
    weights[slots + k] = step.reused && k == step.slot ? 1.0f : 0.0f;
  }
  if (live.recorded < kMaxRecords) {
    records[live.recorded] = {step.step, step.diff, step.reason, step.measured, step.reused};
  }
  ++live.recorded;
  return step.reused;
}

}  // namespace cuda
}  // namespace cachedit
