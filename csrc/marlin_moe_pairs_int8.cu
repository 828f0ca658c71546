// The kernels of marlin_moe_pairs.cu for int8 weights.
#include "marlin_moe_pairs.cuh"

int marlin_moe_pairs_int8(const MarlinMoePairs& a, MarlinMoePairsPlan plan, void* stream) { return dispatch_pairs_type<8>(a, plan, stream); }
