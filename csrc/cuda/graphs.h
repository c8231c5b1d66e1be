// Steps as CUDA graphs, plain C: graphs that somebody captured, in a row, and the decision between two of them on the
// device. Pointers named device_* are on the device. Functions return null, or what went wrong; the text is valid until
// the thread's next call.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)  // Python calls these by name
extern "C" {
// The memory that decides (cachedit::cuda::Control). `init` fills a host copy; rules are named as in
// cachedit.DBCacheConfig. mask: one byte per step, 1 computes; may be null. refresh_hint, accumulated_limit: 0 is none.
int64_t cachedit_cuda_control_bytes();
const char* cachedit_cuda_control_init(void* control, double threshold, double accumulated_limit,
                                       int64_t max_cached_steps, int64_t max_continuous_cached_steps, int64_t warmup,
                                       int64_t warmup_interval, int64_t refresh_hint, bool refresh_repeats,
                                       const uint8_t* mask, int64_t mask_length, bool mask_is_static, int order);
// What `init` has filled takes over a request from where it stands (cachedit::policy::State). steps: those whose
// residuals are stored, newest first.
const char* cachedit_cuda_control_resume(void* control, int64_t step, int64_t origin, int64_t reused, int64_t run,
                                         double accumulated, bool stored, int next_slot, const int64_t* steps,
                                         int count);
// Rows of (step, reused, measured, diff, reason) of a copy read back; returns how many steps
// there were, of which the first `room` are written. Reasons are numbered as in csrc/policy.h.
int64_t cachedit_cuda_control_records(const void* control, double* rows, int64_t room);
// Sets the number of the step to come, in the order of the stream: a guidance branch need not run at each.
const char* cachedit_cuda_control_set_step(void* device_control, int64_t step, void* stream);

// A step is put together piece by piece, each running after the one before. Graphs (cudaGraph_t) are copied; what they
// work on must stay where it is. sums, slot, weights: see take_step in control.h.
const char* cachedit_cuda_step_new(void** step);
const char* cachedit_cuda_step_add(void* step, void* graph);
const char* cachedit_cuda_step_add_policy(void* step, void* device_control, const float* device_sums,
                                          int64_t* device_slot, float* device_weights);
// The policy, then one of both graphs as it decides.
const char* cachedit_cuda_step_add_branch(void* step, void* device_control, const float* device_sums,
                                          int64_t* device_slot, float* device_weights, void* reuse, void* compute);
const char* cachedit_cuda_step_instantiate(void* step, void** exec);
void cachedit_cuda_step_free(void* step);

const char* cachedit_cuda_exec_launch(void* exec, void* stream);
void cachedit_cuda_exec_free(void* exec);
}
#pragma GCC visibility pop
