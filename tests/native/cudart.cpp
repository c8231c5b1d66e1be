// As much of a CUDA runtime as csrc/cuda/graphs.cpp needs, on the host: graphs run when they are launched, in the order
// of their edges. In place of what torch captures there are graphs of one node that write a letter to a log, or call back.
#include <cuda_runtime_api.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "cuda/graphs.h"
#include "cuda/policy_kernel.h"

using cachedit::cuda::PolicyArguments;

struct CUgraphNode_st {
  cudaGraphNodeType type;
  std::vector<cudaGraphNode_t> after;
  char letter = 0;
  void (*callback)() = nullptr;
  PolicyArguments arguments = {};
  cudaGraphConditionalHandle handle = 0;
  std::vector<std::unique_ptr<CUgraph_st>> graphs;  // the child, or the bodies
  std::vector<cudaGraph_t> bodies;
};

struct CUgraph_st {
  std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
};

struct CUgraphExec_st {
  cudaGraph_t graph;
};

namespace {

std::string written;
std::vector<unsigned> conditions;  // by handle
int driver = 13000;

void policy_step() {}  // its address stands for the kernel

std::unique_ptr<CUgraph_st> clone(cudaGraph_t graph) {
  auto copy = std::make_unique<CUgraph_st>();
  for (const auto& node : graph->nodes) {  // graphs of letters: one node, no edges
    copy->nodes.push_back(std::make_unique<CUgraphNode_st>());
    copy->nodes.back()->type = node->type;
    copy->nodes.back()->letter = node->letter;
    copy->nodes.back()->callback = node->callback;
    for (const auto& child : node->graphs) copy->nodes.back()->graphs.push_back(clone(child.get()));
  }
  return copy;
}

CUgraphNode_st& add(cudaGraphNode_t* node, cudaGraph_t graph, cudaGraphNodeType type, const cudaGraphNode_t* after,
                    size_t count) {
  graph->nodes.push_back(std::make_unique<CUgraphNode_st>());
  CUgraphNode_st& added = *graph->nodes.back();
  added.type = type;
  added.after.assign(after, after + count);
  *node = &added;
  return added;
}

void run(const CUgraph_st& graph);

void run(const CUgraphNode_st& node) {
  if (node.letter != 0) written += node.letter;
  if (node.callback != nullptr) node.callback();
  if (node.type == cudaGraphNodeTypeGraph) run(*node.graphs[0]);
  if (node.type == cudaGraphNodeTypeConditional) run(*node.graphs[conditions[node.handle] != 0 ? 0 : 1]);
  if (node.type == cudaGraphNodeTypeKernel && node.arguments.control != nullptr) {
    const PolicyArguments& a = node.arguments;
    const bool reuse = take_step(a.control->live, a.control->records, a.sums, a.slot, a.weights);
    if (a.conditional) conditions[a.handle] = reuse;
  }
}

void run(const CUgraph_st& graph) {  // backwards wherever the edges leave it open, so that a missing one shows
  std::unordered_set<const CUgraphNode_st*> done;
  while (done.size() < graph.nodes.size()) {
    const size_t before = done.size();
    for (size_t i = graph.nodes.size(); i-- > 0 && done.size() == before;) {
      const CUgraphNode_st* node = graph.nodes[i].get();
      bool ready = done.count(node) == 0;
      for (const cudaGraphNode_t other : node->after) ready = ready && done.count(other) != 0;
      if (ready) {
        run(*node);
        done.insert(node);
      }
    }
    if (done.size() == before) throw std::logic_error("edges in a circle");
  }
}

}  // namespace

const void* cachedit::cuda::policy_kernel() { return reinterpret_cast<const void*>(&policy_step); }

const char* cachedit_cuda_control_set_step(void* device_control, int64_t step, void*) {
  static_cast<cachedit::cuda::Control*>(device_control)->live.state.step = step;
  return nullptr;
}

extern "C" {

#pragma GCC visibility push(default)
void* fake_graph(char letter, int type) {
  auto* graph = new CUgraph_st();
  cudaGraphNode_t node;
  add(&node, graph, static_cast<cudaGraphNodeType>(type), nullptr, 0).letter = letter;
  return graph;
}
void* fake_callback_graph(void (*callback)()) {
  auto* graph = new CUgraph_st();
  cudaGraphNode_t node;
  add(&node, graph, cudaGraphNodeTypeKernel, nullptr, 0).callback = callback;
  return graph;
}
const char* fake_log() { return written.c_str(); }
void fake_driver(int version) { driver = version; }
#pragma GCC visibility pop

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "another error";
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = new CUgraph_st();
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }  // what was instantiated still runs it

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (graph == nullptr) return cudaErrorInvalidValue;
  for (size_t i = 0; nodes != nullptr && i < *count; ++i) nodes[i] = graph->nodes[i].get();
  *count = graph->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  *type = node->type;
  return cudaSuccess;
}

cudaError_t cudaGraphChildGraphNodeGetGraph(cudaGraphNode_t node, cudaGraph_t* graph) {
  *graph = node->graphs[0].get();
  return cudaSuccess;
}

cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                                       size_t count, cudaGraph_t child) {
  if (child == nullptr) return cudaErrorInvalidValue;
  add(node, graph, cudaGraphNodeTypeGraph, after, count).graphs.push_back(clone(child));
  return cudaSuccess;
}

cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                                   const cudaKernelNodeParams* params) {
  if (params->func != cachedit::cuda::policy_kernel() || params->blockDim.x != 32) return cudaErrorInvalidValue;
  add(node, graph, cudaGraphNodeTypeKernel, after, count).arguments =
      *static_cast<const PolicyArguments*>(params->kernelParams[0]);
  return cudaSuccess;
}

cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t, unsigned value, unsigned) {
  *handle = conditions.size();
  conditions.push_back(value);
  return cudaSuccess;
}

cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
#if CUDART_VERSION >= 13000
                             const cudaGraphEdgeData*,
#endif
                             size_t count, cudaGraphNodeParams* params) {
  CUgraphNode_st& added = add(node, graph, params->type, after, count);
  added.handle = params->conditional.handle;
  for (unsigned i = 0; i < params->conditional.size; ++i) {
    added.graphs.push_back(std::make_unique<CUgraph_st>());
    added.bodies.push_back(added.graphs.back().get());
  }
  params->conditional.phGraph_out = added.bodies.data();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph};  // not a copy
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  run(*exec->graph);
  return cudaSuccess;
}

}  // extern "C"
