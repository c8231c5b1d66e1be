// csrc/policy.h for Python; built by its test only, because pybind11 ties it to one Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "policy.h"

namespace py = pybind11;
using namespace cachedit::policy;

namespace {

enum Event : int { kRestart = 1, kRelease = 2, kStreamsChanged = 4, kNotStored = 8, kStepSkipped = 16 };

using Row = std::tuple<int64_t, bool, std::optional<double>, int, int, std::vector<double>>;

Rules make_rules(double threshold, double accumulated_limit, int64_t max_cached_steps,
                 int64_t max_continuous_cached_steps, int64_t warmup, int64_t warmup_interval, int64_t refresh_hint,
                 bool refresh_repeats, const std::vector<uint8_t>& mask, bool mask_is_static, int order) {
  Rules rules{threshold, accumulated_limit, max_cached_steps, max_continuous_cached_steps, warmup, warmup_interval,
              refresh_hint, refresh_repeats, order};
  if (!mask.empty() && !set_mask(rules, mask.data(), static_cast<int64_t>(mask.size()), mask_is_static)) {
    throw py::value_error("mask is too long");
  }
  return rules;
}

// A request: one row per step, and how many differences were not finite.
std::pair<std::vector<Row>, int64_t> run(const Rules& rules, const std::vector<double>& diffs,
                                         const std::vector<int>& events) {
  State state;
  std::vector<Row> rows;
  for (size_t i = 0; i < diffs.size(); ++i) {
    const int event = events[i];
    if (event & kStepSkipped) ++state.step;
    if (event & kRestart) restart(state);
    if (event & kRelease) release(state);
    if (event & kStreamsChanged) {  // cachedit.context.State.check_streams: the request goes on
      const int64_t origin = state.origin;
      state.stored ? restart(state) : release(state);
      state.origin = origin;
    }
    const Step step = decide(rules, state, diffs[i]);
    carry_out(rules, state, step, !(event & kNotStored));
    rows.emplace_back(step.step, step.reused, step.measured ? std::optional<double>(step.diff) : std::nullopt,
                      step.reason, step.slot, std::vector<double>(step.weights, step.weights + rules.order + 1));
  }
  return {rows, state.nonfinite};
}

}  // namespace

PYBIND11_MODULE(policy_native, module) {
  py::class_<Rules>(module, "Rules").def_readonly("warmup", &Rules::warmup);
  module.def("make_rules", &make_rules);
  module.def("run", &run);
  module.def("relative", &relative);
  module.attr("MAX_MASK") = kMaxMask;
}
