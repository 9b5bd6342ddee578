// One device, whose compute capability the environment variable CUDA_STUB_CAPABILITY selects.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "recorder.h"

#undef cudaGetDeviceProperties

// The limits of one GPU of each compute capability, from table "Technical Specifications per Compute Capability" of the
// CUDA C++ Programming Guide and from the specifications of the GPU.
struct Model {
  const char* capability;
  int multiprocessors;
  int threads_per_multiprocessor;
  size_t shared_bytes_per_block;
  size_t shared_bytes_per_multiprocessor;
  int l2_cache_mib;
  size_t memory_gib;
};
static const Model models[] = {
    {"7.5", 40, 1024, 65536, 65536, 4, 16},         // Tesla T4
    {"8.0", 108, 2048, 166912, 167936, 40, 80},     // A100
    {"9.0", 132, 2048, 232448, 233472, 50, 80},     // H100
    {"12.0", 170, 1536, 101376, 102400, 96, 32},    // GeForce RTX 5090
};

static const Model& selected_model() {
  const char* capability = std::getenv("CUDA_STUB_CAPABILITY");
  if (!capability) capability = "9.0";
  for (const Model& model : models)
    if (!std::strcmp(model.capability, capability)) return model;
  std::fprintf(stderr, "CUDA_STUB_CAPABILITY=%s is none of 7.5, 8.0, 9.0 and 12.0\n", capability);
  std::exit(1);
}

static cudaDeviceProp build_properties() {
  const Model& model = selected_model();
  cudaDeviceProp properties = {};
  std::snprintf(properties.name, sizeof properties.name, "CUDA stub of compute capability %s", model.capability);
  properties.major = std::atoi(model.capability);
  properties.minor = std::atoi(std::strchr(model.capability, '.') + 1);
  properties.totalGlobalMem = model.memory_gib << 30;
  properties.multiProcessorCount = model.multiprocessors;
  properties.warpSize = 32;
  properties.maxThreadsPerBlock = 1024;
  properties.maxThreadsPerMultiProcessor = model.threads_per_multiprocessor;
  properties.maxThreadsDim[0] = properties.maxThreadsDim[1] = 1024;
  properties.maxThreadsDim[2] = 64;
  properties.maxGridSize[0] = 2147483647;
  properties.maxGridSize[1] = properties.maxGridSize[2] = 65535;
  properties.regsPerBlock = properties.regsPerMultiprocessor = 65536;
  properties.sharedMemPerBlock = 49152;
  properties.sharedMemPerBlockOptin = model.shared_bytes_per_block;
  properties.sharedMemPerMultiprocessor = model.shared_bytes_per_multiprocessor;
  properties.l2CacheSize = model.l2_cache_mib << 20;
  properties.textureAlignment = 512;
  return properties;
}

const cudaDeviceProp& stub::device_properties() {
  static const cudaDeviceProp properties = build_properties();
  return properties;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

extern "C" cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = stub::device_properties();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

// Calls report their errors themselves; there is no asynchronous error.
cudaError_t cudaGetLastError() { return cudaSuccess; }

// Of the driver, only the functions of this library exist.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
