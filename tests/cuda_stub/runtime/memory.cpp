// Allocations, copies and memsets. "Device memory" is host memory whose address range is remembered.
#include <sys/mman.h>

#include "recorder.h"

using stub::Operation;

static std::map<const char*, size_t> device_ranges;
static std::map<const char*, size_t> pinned_ranges;

static bool contains(const std::map<const char*, size_t>& ranges, const void* address) {
  auto byte = static_cast<const char*>(address);
  auto next = ranges.upper_bound(byte);
  if (next == ranges.begin()) return false;
  auto [start, bytes] = *std::prev(next);
  return byte < start + bytes;
}

bool stub::is_device_memory(const void* address) { return contains(device_ranges, address); }
bool stub::is_pinned_memory(const void* address) { return contains(pinned_ranges, address); }

static cudaError_t allocate(std::map<const char*, size_t>& ranges, void** address, size_t bytes, const char* call) {
  stub::Lock lock;
  if (cudaError_t error = stub::refuse_during_capture(call)) return error;
  bytes = bytes ? bytes : 1;
  *address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*address == MAP_FAILED) return cudaErrorMemoryAllocation;
  ranges[static_cast<const char*>(*address)] = bytes;
  return cudaSuccess;
}

static cudaError_t release(std::map<const char*, size_t>& ranges, void* address, const char* call) {
  stub::Lock lock;
  if (cudaError_t error = stub::refuse_during_capture(call)) return error;
  auto range = ranges.find(static_cast<const char*>(address));
  if (range == ranges.end()) return address ? cudaErrorInvalidValue : cudaSuccess;
  munmap(address, range->second);
  ranges.erase(range);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t bytes) { return allocate(device_ranges, address, bytes, "cudaMalloc"); }
cudaError_t cudaFree(void* address) { return release(device_ranges, address, "cudaFree"); }

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned int) {
  return allocate(pinned_ranges, address, bytes, "cudaHostAlloc");
}
cudaError_t cudaFreeHost(void* address) { return release(pinned_ranges, address, "cudaFreeHost"); }

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  stub::Lock lock;
  *attributes = {};
  attributes->type = stub::is_device_memory(address)   ? cudaMemoryTypeDevice
                     : stub::is_pinned_memory(address) ? cudaMemoryTypeHost
                                                       : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

// Such as "copy from device to host".
static std::string describe_copy(const void* target, const void* source) {
  std::string from = stub::is_device_memory(source) ? "device" : "host";
  std::string to = stub::is_device_memory(target) ? "device" : "host";
  return "copy from " + from + " to " + to;
}

static bool is_pageable(const void* address) {
  return !stub::is_device_memory(address) && !stub::is_pinned_memory(address);
}

// A copy of pageable memory is an error in a capture. One of pinned memory is allowed by CUDA but reported too: the
// graph would use the host address in every replay.
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  stub::Lock lock;
  Operation copy{Operation::kCopy, describe_copy(target, source), target, source, bytes};
  bool pageable = is_pageable(target) || is_pageable(source);
  bool on_device = stub::is_device_memory(target) && stub::is_device_memory(source);
  stub::Capture* capture = stub::capture_of(stream);
  if (capture && pageable)
    return stub::violation(capture, "pageable " + copy.name + " in a capture", cudaErrorStreamCaptureUnsupported);
  if (capture && !on_device) stub::record("violation", copy.name + " in a capture");
  bool is_early = stub::launched_before(stream) < stub::launched_before(nullptr);
  if (!capture && is_early && stub::is_device_memory(source) && !on_device)
    stub::record("violation", copy.name + " that does not wait for the default stream");
  if (!stub::submit(stream, copy)) stub::execute(copy);
  if (!capture && pageable) stub::record("pageable copy", copy.name);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  stub::Lock lock;
  if (cudaError_t error = stub::refuse_during_capture("cudaMemcpy")) return error;
  stub::execute({Operation::kCopy, "", target, source, bytes});
  stub::record("synchronization", "cudaMemcpy");
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  stub::Lock lock;
  Operation memset{Operation::kMemset, "memset", target, nullptr, bytes, value};
  if (!stub::submit(stream, memset)) stub::execute(memset);
  return cudaSuccess;
}
