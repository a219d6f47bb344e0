// The operators on GPUs: the kernels' plan, launched on torch's current stream. Nothing here waits for the GPU, and all
// memory is torch's, so that streams and CUDA graphs see what they expect.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

#include "../operators.h"
#include "../select.h"
#include "plans.h"

namespace heedful::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call that asks finds it again
  throw std::runtime_error(std::string("heedful.attention: ") + what + ": " + cudaGetErrorString(error));
}

// torch's own function for it, looked up by name in the library that torch has loaded: a build has no need of a torch
// with CUDA.
cudaStream_t current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("heedful.attention: this torch does not tell its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

int capability_of(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "the GPU's compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "the GPU's compute capability");
  return 10 * major + minor;
}

// Above 48 KB a kernel has to be told, once on each device.
void allow_shared_memory(const Launch& launch, int device) {
  constexpr uint32_t kAlways = 48 * 1024;
  if (launch.shared_bytes <= kAlways) return;
  static std::mutex mutex;
  static std::set<std::pair<Kernel, int>> told;
  const std::lock_guard lock(mutex);
  if (told.count({launch.kernel, device})) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(launch.kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(launch.shared_bytes)),
        launch.name);
  told.insert({launch.kernel, device});
}

void start(const Launch& launch, Problem& p, int device, cudaStream_t stream) {
  if (launch.blocks > kMostBlocks)
    throw std::runtime_error("heedful.attention: q, k, v: expected sizes that make at most 2147483647 blocks of " +
                             std::string(launch.name) + ", got " + std::to_string(launch.blocks));
  allow_shared_memory(launch, device);
  void* arguments[] = {&p};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(launch.kernel), dim3(unsigned(launch.blocks)),
                         dim3(unsigned(launch.threads)), arguments, launch.shared_bytes, stream),
        launch.name);
}

struct Device {
  static constexpr Memory kMemory = Memory::device;

  static void run(Problem& p, bool backward, const Tensor& like) {
    const int device = like.get_device_index();
    // NOTE: both, because this library has a CUDA runtime of its own, which keeps a current device of its own.
    const torch::stable::accelerator::DeviceGuard guard(device);
    check(cudaSetDevice(device), "the GPU");
    Machine machine;
    machine.cuda_capability = capability_of(device);
    const Selection selection = select(p, "cuda", machine, false);
    if (selection.kernel.empty()) raise_unsupported("cuda", selection);
    Plan plan;
    (backward ? plan_backward : plan_forward)(p, &plan);
    const int64_t size = int64_t(plan.workspace_bytes);
    const Tensor workspace = torch::stable::new_empty(like, {&size, 1}, torch::headeronly::ScalarType::Byte);
    p.workspace = workspace.data_ptr();
    const cudaStream_t stream = current_stream(device);
    for (int n = 0; n < plan.launch_count; ++n) start(plan.launches[n], p, device, stream);
  }
};

}  // namespace
}  // namespace heedful::cuda

// For heedful.explain: 1000 * major + 10 * minor. A driver of an older major version than the runtime's runs nothing.
extern "C" __attribute__((visibility("default"))) void heedful_cuda_versions(int* driver, int* runtime) {
  *runtime = CUDART_VERSION;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
}

STABLE_TORCH_LIBRARY_IMPL(heedful, CUDA, library) { heedful::register_operators<heedful::cuda::Device>(library); }
