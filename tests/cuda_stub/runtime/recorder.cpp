// Counts, violations and the functions that Python calls.
#include "recorder.h"

#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <tuple>

namespace stub {

using Listener = void (*)(const char* kind, const char* name);
using Visitor = void (*)(const char* label, const char* kind, const char* name, long count);

std::set<Capture*> active_captures;
thread_local cudaStreamCaptureMode thread_capture_mode = cudaStreamCaptureModeGlobal;

static std::mutex mutex;
static Listener listener = nullptr;
static std::string current_label;
static thread_local std::string thread_label;  // replaces `current_label` unless empty
static std::map<cudaStream_t, size_t> default_stream_progress;
static std::map<std::tuple<std::string, std::string, std::string>, long> counts;  // (label, kind, name) -> number
static std::vector<std::pair<std::string, std::string>> unreported;               // (kind, name)

// Names of kernels are those of the compiler.
static std::string demangle(const std::string& name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? readable : name;
  std::free(readable);
  return result;
}

Lock::Lock() { mutex.lock(); }

Lock::~Lock() {
  std::vector<std::pair<std::string, std::string>> events;
  events.swap(unreported);
  Listener receiver = listener;
  mutex.unlock();
  if (!receiver) return;
  for (const auto& [kind, name] : events) receiver(kind.c_str(), demangle(name).c_str());
}

void record(const std::string& kind, const std::string& name) {
  counts[{thread_label.empty() ? current_label : thread_label, kind, name}]++;
  if (kind != "launch" && kind != "replay") unreported.push_back({kind, name});
}

cudaError_t violation(Capture* capture, const std::string& description, cudaError_t error) {
  if (capture) capture->is_valid = false;
  record("violation", description);
  return error;
}

cudaError_t refuse_during_capture(const std::string& call) {
  if (thread_capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Capture* capture : active_captures) {
    bool same_thread = pthread_equal(capture->thread, pthread_self());
    bool both_global =
        thread_capture_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if ((same_thread && capture->mode != cudaStreamCaptureModeRelaxed) || both_global)
      return violation(capture, call + " during a capture", cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

Capture* capture_of(cudaStream_t stream) {
  for (Capture* capture : active_captures)
    if (capture->streams.count(stream)) return capture;
  return nullptr;
}

Capture* submit(cudaStream_t stream, const Operation& operation) {
  Capture* capture = capture_of(stream);
  if (capture) {
    capture->graph->operations.push_back(operation);
    capture->streams[stream][stream]++;
    record("captured launch", operation.name);
    return capture;
  }
  if (!active_captures.empty())
    violation(nullptr, demangle(operation.name) + " on a stream outside the current capture", cudaSuccess);
  record("launch", operation.name);
  if (!stream) launched_before(stream)++;
  return nullptr;
}

size_t& launched_before(cudaStream_t stream) { return default_stream_progress[stream]; }

void execute(const Operation& operation) {
  if (operation.kind == Operation::kCopy) std::memmove(operation.target, operation.source, operation.bytes);
  if (operation.kind == Operation::kMemset) std::memset(operation.target, operation.value, operation.bytes);
}

}  // namespace stub

extern "C" {

// Events are counted under `label` from now on.
void cuda_stub_set_label(const char* label) {
  stub::Lock lock;
  stub::current_label = label;
}

// Events of this thread are counted under `label` from now on.
void cuda_stub_set_thread_label(const char* label) { stub::thread_label = label; }

// `listener` is called with each event except launches and replays, in the thread that causes it.
void cuda_stub_set_listener(stub::Listener listener) {
  stub::Lock lock;
  stub::listener = listener;
}

// Launches a kernel in place of a function of a library that is not replaced.
void cuda_stub_launch(const char* name, cudaStream_t stream) {
  stub::Lock lock;
  stub::submit(stream, {stub::Operation::kKernel, name});
}

void cuda_stub_reset_counts() {
  stub::Lock lock;
  stub::counts.clear();
}

void cuda_stub_visit_counts(stub::Visitor visit) {
  decltype(stub::counts) counts;
  {
    stub::Lock lock;
    counts = stub::counts;
  }
  for (const auto& [key, count] : counts) {
    const auto& [label, kind, name] = key;
    visit(label.c_str(), kind.c_str(), stub::demangle(name).c_str(), count);
  }
}

}  // extern "C"
