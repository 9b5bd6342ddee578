// What the stub CUDA runtime records, and the state that its parts share.
//
// Memory is host memory, kernels compute nothing, and every operation is complete when its call returns. The runtime
// keeps track of allocations, streams, events, captures and graphs, and reports what CUDA would refuse.
#pragma once

#include <cuda_runtime_api.h>
#include <pthread.h>

#include <cstddef>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace stub {

// An operation in a stream. A graph executes its copies and memsets when it is replayed.
struct Operation {
  enum Kind { kKernel, kCopy, kMemset, kHostFunction } kind;
  std::string name;
  void* target = nullptr;
  const void* source = nullptr;
  size_t bytes = 0;
  int value = 0;
};

struct Graph {
  unsigned long long id;
  std::vector<Operation> operations;
};

// For each stream of a capture, the number of its operations that have finished.
using Progress = std::map<cudaStream_t, size_t>;

struct Capture {
  unsigned long long id;
  pthread_t thread;
  cudaStreamCaptureMode mode;
  Graph* graph;
  bool is_valid = true;
  std::map<cudaStream_t, Progress> streams;  // what has finished before the next operation of each stream
};

// Holds the lock on all state. The listener is called after the lock is released, because it acquires Python's lock.
class Lock {
 public:
  Lock();
  ~Lock();
};

// The functions below require the lock.

// Counts an event under the current label. All events except launches and replays also go to the listener.
void record(const std::string& kind, const std::string& name);

// Records a call that CUDA refuses during a capture, which makes the capture invalid.
cudaError_t violation(Capture* capture, const std::string& description, cudaError_t error);

// Refuses a call that would synchronize or allocate if the calling thread may not make it because of a capture.
cudaError_t refuse_during_capture(const std::string& call);

// The capture that a stream takes part in, or null.
Capture* capture_of(cudaStream_t stream);

// Adds an operation to the capture of its stream, or counts it as launched. Returns the capture or null. The graph that
// is captured is the one that the last event "capture" has named.
Capture* submit(cudaStream_t stream, const Operation& operation);

// The number of operations of the default stream that have been launched, or that `stream` has waited for.
size_t& launched_before(cudaStream_t stream);

// Executes a copy or memset at once.
void execute(const Operation& operation);

const cudaDeviceProp& device_properties();

bool is_device_memory(const void* address);
bool is_pinned_memory(const void* address);

extern std::set<Capture*> active_captures;
extern thread_local cudaStreamCaptureMode thread_capture_mode;

}  // namespace stub
