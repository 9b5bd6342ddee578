// Kernels: their names are registered when a library is loaded; launches are recorded and compute nothing.
#include <cuda.h>

#include <unordered_map>

#include "recorder.h"

using stub::Operation;

// Not a global object: libraries register their kernels while they are loaded, in any order.
static std::unordered_map<const void*, std::string>& kernel_names() {
  static auto* names = new std::unordered_map<const void*, std::string>;
  return *names;
}

static cudaError_t launch(const void* kernel, cudaStream_t stream) {
  stub::Lock lock;
  auto name = kernel_names().find(kernel);
  stub::submit(stream, {Operation::kKernel, name == kernel_names().end() ? "unknown kernel" : name->second});
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return launch(kernel, config->stream);
}

// The functions that code compiled by nvcc calls.
extern "C" {

void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernel_names()[kernel] = name;
}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}

}  // extern "C"
