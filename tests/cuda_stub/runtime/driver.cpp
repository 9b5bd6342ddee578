// The functions of the driver that torch, Triton and the kernels of torch.compile call.
#include <cuda.h>

#include <fstream>
#include <iterator>

#include "cubin.h"
#include "recorder.h"

// A loaded module, and a kernel of it.
struct CUmod_st {
  std::string image;
};
struct CUfunc_st {
  std::string name;
  stub::Resources resources;
};

static CUcontext only_context() {
  static char context;
  return reinterpret_cast<CUcontext>(&context);
}

extern "C" {

CUresult cuInit(unsigned int) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  const cudaDeviceProp& device = stub::device_properties();
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device.major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device.minor; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = device.multiProcessorCount; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = device.warpSize; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = device.regsPerBlock; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = device.sharedMemPerBlockOptin; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = device.sharedMemPerMultiprocessor; break;
    default: *value = 1;  // clock rates and the width of the memory bus, which only change the choice of a benchmark
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned int* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = only_context();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = only_context();
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));  // the codes of both APIs have the same meanings
  return CUDA_SUCCESS;
}

// Triton asks whether the device can use an address.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  stub::Lock lock;
  auto pointer = reinterpret_cast<const void*>(address);
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  if (!stub::is_device_memory(pointer) && !stub::is_pinned_memory(pointer)) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<CUdeviceptr*>(value) = address;
  return CUDA_SUCCESS;
}

// Loading a module allocates device memory, so a kernel must have run before it is captured.
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  stub::Lock lock;
  if (stub::refuse_during_capture("cuModuleLoadData")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *module = new CUmod_st{stub::copy_cubin(image)};
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}

CUresult cuModuleLoad(CUmodule* module, const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return cuModuleLoadData(module, image.data());
}

CUresult cuModuleUnload(CUmodule module) {
  delete module;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  stub::Resources resources;
  if (!stub::find_kernel(module->image, name, resources)) return CUDA_ERROR_NOT_FOUND;
  *function = new CUfunc_st{name, resources};
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->resources.registers; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->resources.local_bytes; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->resources.shared_bytes; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_NOT_SUPPORTED;
  bool fits = value <= static_cast<int>(stub::device_properties().sharedMemPerBlockOptin);
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

static CUresult launch(CUfunction function, unsigned int threads, unsigned int shared_bytes, CUstream stream) {
  stub::Lock lock;
  const cudaDeviceProp& device = stub::device_properties();
  if (shared_bytes > device.sharedMemPerBlockOptin || threads > 1024) return CUDA_ERROR_INVALID_VALUE;
  if (threads * function->resources.registers > static_cast<unsigned int>(device.regsPerBlock))
    return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  stub::submit(stream, {stub::Operation::kKernel, function->name});
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned int, unsigned int, unsigned int, unsigned int x, unsigned int y,
                        unsigned int z, unsigned int shared_bytes, CUstream stream, void**, void**) {
  return launch(function, x * y * z, shared_bytes, stream);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
  unsigned int threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  return launch(function, threads, config->sharedMemBytes, config->hStream);
}

}  // extern "C"
