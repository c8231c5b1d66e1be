// A stand-in for NVIDIA's driver (libcuda.so.1) and management library (libnvidia-ml.so.1): it serves the CUDA version of
// $FAKE_CUDA, as 13000 for 13.0, and has a GPU for each compute capability in $FAKE_GPUS, as "90 89".
#include <cstdlib>
#include <sstream>
#include <vector>

namespace {
std::vector<int> gpus() {
  const char* listed = std::getenv("FAKE_GPUS");
  std::istringstream text(listed == nullptr ? "" : listed);
  std::vector<int> found;
  for (int capability; text >> capability;) found.push_back(capability);
  return found;
}
}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int cuDriverGetVersion(int* version) { return *version = std::atoi(std::getenv("FAKE_CUDA")), 0; }

EXPORTED int nvmlInit_v2() { return 0; }
EXPORTED int nvmlShutdown() { return 0; }
EXPORTED int nvmlDeviceGetCount_v2(unsigned* count) { return *count = static_cast<unsigned>(gpus().size()), 0; }
EXPORTED int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) {
  return *handle = reinterpret_cast<void*>(static_cast<size_t>(gpus()[index])), 0;
}
EXPORTED int nvmlDeviceGetCudaComputeCapability(void* handle, int* major, int* minor) {
  const int capability = static_cast<int>(reinterpret_cast<size_t>(handle));
  return *major = capability / 10, *minor = capability % 10, 0;
}
