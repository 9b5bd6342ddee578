// Stream capture and CUDA graphs.
#include "recorder.h"

using stub::Capture;
using stub::Graph;
using stub::Operation;

#undef cudaStreamGetCaptureInfo

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, stub::thread_capture_mode);
  return cudaSuccess;
}

static std::string graph_name(const Graph* graph) { return "graph " + std::to_string(graph->id); }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  static unsigned long long next_id = 1;
  stub::Lock lock;
  if (!stream) return stub::violation(nullptr, "capture of the default stream", cudaErrorStreamCaptureUnsupported);
  if (Capture* capture = stub::capture_of(stream))
    return stub::violation(capture, "second capture of a capturing stream", cudaErrorIllegalState);
  auto* capture = new Capture{next_id++, pthread_self(), mode, nullptr};
  capture->graph = new Graph{capture->id, {}};
  capture->streams[stream] = {};
  stub::active_captures.insert(capture);
  stub::record("capture", graph_name(capture->graph));
  return cudaSuccess;
}

// Every stream that took part must have been waited for by `origin`, directly or through other streams.
static void check_joined(Capture* capture, cudaStream_t origin) {
  for (auto& [stream, progress] : capture->streams)
    if (capture->streams[origin][stream] < progress[stream])
      stub::violation(capture, "a stream was not joined before the end of the capture", cudaErrorStreamCaptureUnjoined);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  stub::Lock lock;
  Capture* capture = stub::capture_of(stream);
  if (!capture) return cudaErrorIllegalState;
  check_joined(capture, stream);
  stub::active_captures.erase(capture);
  bool is_valid = capture->is_valid;
  *graph = is_valid ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  if (!is_valid) delete capture->graph;
  delete capture;
  return is_valid ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  stub::Lock lock;
  *status = stub::capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

extern "C" cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                                unsigned long long* id, cudaGraph_t* graph,
                                                const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                                size_t* num_dependencies) {
  static cudaGraphNode_t no_nodes[1];
  stub::Lock lock;
  Capture* capture = stub::capture_of(stream);
  *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  if (dependencies) *dependencies = no_nodes;
  if (edges) *edges = nullptr;
  if (num_dependencies) *num_dependencies = 0;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* num_nodes) {
  *num_nodes = reinterpret_cast<Graph*>(graph)->operations.size();
  return cudaSuccess;
}

static bool is_allocated(const void* address) {
  return stub::is_device_memory(address) || stub::is_pinned_memory(address);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  stub::Lock lock;
  if (Capture* capture = stub::capture_of(stream))
    return stub::violation(capture, "replay in a capture", cudaErrorStreamCaptureUnsupported);
  auto* graph = reinterpret_cast<Graph*>(executable);
  for (const Operation& operation : graph->operations) {
    if (operation.kind == Operation::kKernel) continue;
    bool has_source = operation.kind == Operation::kCopy;
    if (is_allocated(operation.target) && (!has_source || is_allocated(operation.source)))
      stub::execute(operation);
    else
      stub::violation(nullptr, "replay of a " + operation.name + " in memory that was freed", cudaSuccess);
  }
  stub::record("replay", graph_name(graph));
  if (!stream) stub::launched_before(stream)++;
  return cudaSuccess;
}
