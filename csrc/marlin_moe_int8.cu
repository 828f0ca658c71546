// The grouped GEMM of marlin_moe.cu for int8 weights.
#include "marlin_moe_kernels.cuh"

int marlin_moe_gemm_int8(const MarlinMoeGemm& a, MarlinMoePlan plan, void* stream) { return dispatch_type<8>(a, plan, stream); }
