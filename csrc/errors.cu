#include "errors.h"

#include <cuda_runtime_api.h>

extern "C" const char* cuda_error_text(int code) { return cudaGetErrorString((cudaError_t)code); }
