// cuBLAS and cuBLASLt: a matrix product is a kernel with the name of its function in the stream of its handle.
//
// The functions declare only the parameters that they use; the calling convention allows callers to pass more.
#include <cstring>

#include "recorder.h"

struct Handle {
  cudaStream_t stream = nullptr;
};

static int product(const char* name, cudaStream_t stream) {
  stub::Lock lock;
  stub::submit(stream, {stub::Operation::kKernel, name});
  return 0;
}

static int create_descriptor(void** descriptor) {
  *descriptor = new char[1024]();
  return 0;
}

static int destroy_descriptor(void* descriptor) {
  delete[] static_cast<char*>(descriptor);
  return 0;
}

extern "C" {

int cublasCreate_v2(Handle** handle) {
  *handle = new Handle;
  return 0;
}

int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}

int cublasSetWorkspace_v2(Handle*, void*, size_t) { return 0; }
int cublasSetMathMode(Handle*, int) { return 0; }
int cublasGetMathMode(Handle*, int* mode) { return *mode = 0; }

#define PRODUCT(function) \
  int function(Handle* handle) { return product(#function, handle->stream); }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)

int cublasLtMatmulDescCreate(void** descriptor) { return create_descriptor(descriptor); }
int cublasLtMatmulDescDestroy(void* descriptor) { return destroy_descriptor(descriptor); }
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) { return 0; }
int cublasLtMatmulPreferenceCreate(void** descriptor) { return create_descriptor(descriptor); }
int cublasLtMatmulPreferenceDestroy(void* descriptor) { return destroy_descriptor(descriptor); }
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return 0; }
int cublasLtMatrixLayoutCreate(void** descriptor) { return create_descriptor(descriptor); }
int cublasLtMatrixLayoutDestroy(void* descriptor) { return destroy_descriptor(descriptor); }

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* count) {
  std::memset(result, 0, 64);
  *count = 1;
  return 0;
}

int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  return product("cublasLtMatmul", stream);
}

}  // extern "C"
