// Puts steps together from captured graphs, and what the host knows of the memory that decides them.
#include "cuda/graphs.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "cuda/control.h"
#include "cuda/policy_kernel.h"

using namespace cachedit::cuda;
namespace policy = cachedit::policy;

namespace {

constexpr int kTwoBodies = 12080;  // the driver that knows IF nodes with an ELSE

struct StepGraph {
  cudaGraph_t graph = nullptr;
  cudaGraphNode_t last = nullptr;

  const cudaGraphNode_t* after() const { return last == nullptr ? nullptr : &last; }
  size_t count() const { return last == nullptr ? 0 : 1; }
};

thread_local char message[256];

const char* failed(const char* what, cudaError_t error) {
  std::snprintf(message, sizeof(message), "%s: %s", what, cudaGetErrorString(error));
  return message;
}

#define CACHEDIT_TRY(call)                                                                       \
  do {                                                                                           \
    if (const cudaError_t error = (call); error != cudaSuccess) return failed(#call, error);     \
  } while (false)

// What conditional bodies may hold, of the kinds of nodes that stream capture makes.
const char* check_body(const char* name, cudaGraph_t graph) {
  size_t count = 0;
  CACHEDIT_TRY(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  CACHEDIT_TRY(cudaGraphGetNodes(graph, nodes.data(), &count));
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    CACHEDIT_TRY(cudaGraphNodeGetType(node, &type));
    switch (type) {
      case cudaGraphNodeTypeKernel:
      case cudaGraphNodeTypeMemcpy:
      case cudaGraphNodeTypeMemset:
      case cudaGraphNodeTypeEmpty:
      case cudaGraphNodeTypeConditional:
        break;
      case cudaGraphNodeTypeGraph: {
        cudaGraph_t child = nullptr;
        CACHEDIT_TRY(cudaGraphChildGraphNodeGetGraph(node, &child));
        if (const char* error = check_body(name, child)) return error;
        break;
      }
      default:
        std::snprintf(message, sizeof(message),
                      "%s: a body of a conditional node may hold kernels, copies and fills, not a node of type %d (%s)",
                      name, static_cast<int>(type),
                      type == cudaGraphNodeTypeHost       ? "host function"
                      : type == cudaGraphNodeTypeMemAlloc ? "allocation"
                                                          : "see cudaGraphNodeType");
        return message;
    }
  }
  return nullptr;
}

cudaError_t add_conditional(StepGraph& step, cudaGraphNodeParams& params) {
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(&step.last, step.graph, step.after(), nullptr, step.count(), &params);
#else
  return cudaGraphAddNode(&step.last, step.graph, step.after(), step.count(), &params);
#endif
}

const char* add_kernel(StepGraph& step, PolicyArguments arguments) {
  void* pointers[] = {&arguments};  // copied when the node is added
  cudaKernelNodeParams params = {};
  params.func = const_cast<void*>(policy_kernel());
  params.gridDim = {1, 1, 1};
  params.blockDim = {32, 1, 1};
  params.kernelParams = pointers;
  CACHEDIT_TRY(cudaGraphAddKernelNode(&step.last, step.graph, step.after(), step.count(), &params));
  return nullptr;
}

}  // namespace

int64_t cachedit_cuda_control_bytes() { return sizeof(Control); }

const char* cachedit_cuda_control_init(void* control, double threshold, double accumulated_limit,
                                       int64_t max_cached_steps, int64_t max_continuous_cached_steps, int64_t warmup,
                                       int64_t warmup_interval, int64_t refresh_hint, bool refresh_repeats,
                                       const uint8_t* mask, int64_t mask_length, bool mask_is_static, int order) {
  if (order < 0 || order > policy::kMaxOrder) {
    std::snprintf(message, sizeof(message), "order: expected 0 to %d, got %d", policy::kMaxOrder, order);
    return message;
  }
  policy::Rules rules{threshold, accumulated_limit, max_cached_steps, max_continuous_cached_steps, warmup,
                      warmup_interval, refresh_hint, refresh_repeats, order};
  if (mask != nullptr && !policy::set_mask(rules, mask, mask_length, mask_is_static)) {
    std::snprintf(message, sizeof(message), "mask: expected at most %d steps, got %lld", policy::kMaxMask,
                  static_cast<long long>(mask_length));
    return message;
  }
  std::memset(control, 0, sizeof(Control));
  new (control) Live{rules, policy::State(), 0};
  return nullptr;
}

const char* cachedit_cuda_control_resume(void* control, int64_t step, int64_t origin, int64_t reused, int64_t run,
                                         double accumulated, bool stored, int next_slot, const int64_t* steps,
                                         int count) {
  Live& live = static_cast<Control*>(control)->live;
  const int slots = live.rules.order + 1;
  if (count < 0 || count > slots || next_slot < 0 || next_slot >= slots) {
    std::snprintf(message, sizeof(message), "steps: expected at most %d and a slot below it, got %d and slot %d", slots,
                  count, next_slot);
    return message;
  }
  policy::State& state = live.state;
  state.step = step;
  state.origin = origin;
  state.reused = reused;
  state.run = run;
  state.accumulated = accumulated;
  state.stored = stored;
  state.ring.next_slot = next_slot;
  state.ring.count = count;
  for (int i = 0; i < count; ++i) state.ring.steps[i] = steps[i];
  return nullptr;
}

int64_t cachedit_cuda_control_records(const void* control, double* rows, int64_t room) {
  const Control& read = *static_cast<const Control*>(control);
  const int64_t kept = read.live.recorded < kMaxRecords ? read.live.recorded : kMaxRecords;
  for (int64_t i = 0; i < kept && i < room; ++i, rows += 5) {
    const Record& record = read.records[i];
    rows[0] = static_cast<double>(record.step);
    rows[1] = record.reused ? 1.0 : 0.0;
    rows[2] = record.measured ? 1.0 : 0.0;
    rows[3] = record.diff;
    rows[4] = static_cast<double>(record.reason);
  }
  return read.live.recorded;
}

const char* cachedit_cuda_step_new(void** step) {
  StepGraph made;
  CACHEDIT_TRY(cudaGraphCreate(&made.graph, 0));
  *step = new StepGraph(made);
  return nullptr;
}

const char* cachedit_cuda_step_add(void* step, void* graph) {
  StepGraph& to = *static_cast<StepGraph*>(step);
  CACHEDIT_TRY(
      cudaGraphAddChildGraphNode(&to.last, to.graph, to.after(), to.count(), static_cast<cudaGraph_t>(graph)));
  return nullptr;
}

const char* cachedit_cuda_step_add_policy(void* step, void* device_control, const float* device_sums,
                                          int64_t* device_slot, float* device_weights) {
  return add_kernel(*static_cast<StepGraph*>(step),
                    {static_cast<Control*>(device_control), device_sums, device_slot, device_weights, 0, false});
}

const char* cachedit_cuda_step_add_branch(void* step, void* device_control, const float* device_sums,
                                          int64_t* device_slot, float* device_weights, void* reuse, void* compute) {
  StepGraph& to = *static_cast<StepGraph*>(step);
  int driver = 0;
  CACHEDIT_TRY(cudaDriverGetVersion(&driver));
  if (driver < kTwoBodies) {
    std::snprintf(message, sizeof(message), "the decision in a graph needs a driver for CUDA 12.8, this one is for %d.%d",
                  driver / 1000, driver % 1000 / 10);
    return message;
  }
  const cudaGraph_t bodies[] = {static_cast<cudaGraph_t>(reuse), static_cast<cudaGraph_t>(compute)};
  if (const char* error = check_body("reuse", bodies[0])) return error;
  if (const char* error = check_body("compute", bodies[1])) return error;

  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  // 0 unless the policy says otherwise: compute.
  CACHEDIT_TRY(cudaGraphConditionalHandleCreate(&params.conditional.handle, to.graph, 0, cudaGraphCondAssignDefault));
  params.conditional.type = cudaGraphCondTypeIf;
  params.conditional.size = 2;
  if (const char* error = add_kernel(to, {static_cast<Control*>(device_control), device_sums, device_slot,
                                          device_weights, params.conditional.handle, true})) {
    return error;
  }
  CACHEDIT_TRY(add_conditional(to, params));
  for (int i = 0; i < 2; ++i) {
    cudaGraphNode_t child = nullptr;
    CACHEDIT_TRY(cudaGraphAddChildGraphNode(&child, params.conditional.phGraph_out[i], nullptr, 0, bodies[i]));
  }
  return nullptr;
}

const char* cachedit_cuda_step_instantiate(void* step, void** exec) {
  cudaGraphExec_t made = nullptr;
  CACHEDIT_TRY(cudaGraphInstantiate(&made, static_cast<StepGraph*>(step)->graph, 0));
  *exec = made;
  return nullptr;
}

void cachedit_cuda_step_free(void* step) {
  StepGraph* freed = static_cast<StepGraph*>(step);
  cudaGraphDestroy(freed->graph);
  delete freed;
}

const char* cachedit_cuda_exec_launch(void* exec, void* stream) {
  CACHEDIT_TRY(cudaGraphLaunch(static_cast<cudaGraphExec_t>(exec), static_cast<cudaStream_t>(stream)));
  return nullptr;
}

void cachedit_cuda_exec_free(void* exec) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(exec)); }
