// Functions of the driver that torch and Triton refer to, and that fastcifar does not call.
extern "C" {

#define UNSUPPORTED(function) \
  int function() { return 801; }  // CUDA_ERROR_NOT_SUPPORTED
UNSUPPORTED(cuCtxGetLimit)
UNSUPPORTED(cuCtxSetLimit)
UNSUPPORTED(cuLaunchCooperativeKernel)
UNSUPPORTED(cuLinkAddData_v2)
UNSUPPORTED(cuLinkComplete)
UNSUPPORTED(cuLinkCreate_v2)
UNSUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
UNSUPPORTED(cuTensorMapEncodeTiled)

}  // extern "C"
