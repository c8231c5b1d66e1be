// The element types that all kernels take, on CPU and on GPUs.
#pragma once

namespace cachedit {

enum DType : int { kFloat32, kFloat16, kBFloat16, kDTypes };

}  // namespace cachedit
