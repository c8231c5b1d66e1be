// Between graphs.cpp, which puts the kernel into graphs, and policy.cu, which has it.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/control.h"

namespace cachedit {
namespace cuda {

struct PolicyArguments {
  Control* control;
  const float* sums;
  int64_t* slot;
  float* weights;
  cudaGraphConditionalHandle handle;
  bool conditional;  // whether there is a node to tell
};

const void* policy_kernel();  // of one block of 32 threads, takes PolicyArguments

}  // namespace cuda
}  // namespace cachedit
