// Streams and events. Work is complete when its call returns, so waiting only has to be counted and checked.
#include <algorithm>

#include "recorder.h"

using stub::Capture;

// The last record of an event that was recorded in a capture: what had finished by then in its streams.
struct EventRecord {
  unsigned long long capture_id;
  stub::Progress progress;
};
static std::map<cudaEvent_t, EventRecord> captured_events;
static std::map<cudaEvent_t, size_t> default_stream_progress;  // `launched_before` of its stream at the last record

// The active capture in which an event was last recorded, or null.
static Capture* capture_of_event(cudaEvent_t event) {
  auto entry = captured_events.find(event);
  if (entry == captured_events.end()) return nullptr;
  for (Capture* capture : stub::active_captures)
    if (capture->id == entry->second.capture_id) return capture;
  return nullptr;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned int, int) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  stub::Lock lock;
  if (Capture* capture = stub::capture_of(stream))
    return stub::violation(capture, "query of a capturing stream", cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  stub::Lock lock;
  if (Capture* capture = stub::capture_of(stream))
    return stub::violation(capture, "synchronization of a capturing stream", cudaErrorStreamCaptureUnsupported);
  if (cudaError_t error = stub::refuse_during_capture("cudaStreamSynchronize")) return error;
  stub::record("synchronization", "cudaStreamSynchronize");
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  stub::Lock lock;
  if (!stub::active_captures.empty())
    return stub::violation(*stub::active_captures.begin(), "synchronization of the device during a capture",
                           cudaErrorStreamCaptureUnsupported);
  stub::record("synchronization", "cudaDeviceSynchronize");
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) {
  *event = reinterpret_cast<cudaEvent_t>(new char);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  stub::Lock lock;
  captured_events.erase(event);
  delete reinterpret_cast<char*>(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  stub::Lock lock;
  captured_events.erase(event);
  default_stream_progress[event] = stub::launched_before(stream);
  if (Capture* capture = stub::capture_of(stream)) captured_events[event] = {capture->id, capture->streams[stream]};
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  stub::Lock lock;
  if (Capture* capture = capture_of_event(event))
    return stub::violation(capture, "query of an event in a capture", cudaErrorCapturedEvent);
  return stub::refuse_during_capture("cudaEventQuery");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  stub::Lock lock;
  if (Capture* capture = capture_of_event(event))
    return stub::violation(capture, "synchronization of an event in a capture", cudaErrorCapturedEvent);
  if (cudaError_t error = stub::refuse_during_capture("cudaEventSynchronize")) return error;
  stub::record("synchronization", "cudaEventSynchronize");
  return cudaSuccess;
}

// Every duration is the same, so that a choice by a measured duration is always that of the first candidate.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// A stream that waits for an event of a capture takes part in the capture from then on.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
  stub::Lock lock;
  Capture *waiting = stub::capture_of(stream), *recorded = capture_of_event(event);
  size_t& progress = stub::launched_before(stream);
  if (stream) progress = std::max(progress, default_stream_progress[event]);
  if (!waiting && !recorded) return cudaSuccess;
  if (!recorded)
    return stub::violation(waiting, "a capturing stream waits for work outside the capture",
                           cudaErrorStreamCaptureIsolation);
  if (waiting && waiting != recorded)
    return stub::violation(waiting, "a capturing stream waits for another capture", cudaErrorStreamCaptureMerge);
  stub::Progress& finished = recorded->streams[stream];
  for (const auto& [other, count] : captured_events[event].progress) finished[other] = std::max(finished[other], count);
  return cudaSuccess;
}
