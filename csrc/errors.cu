#include "errors.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>

extern "C" const char* cuda_error_text(int code) { return cudaGetErrorString((cudaError_t)code); }
#else
extern "C" const char* cuda_error_text(int) { return "no CUDA: the emulator"; }
#endif
