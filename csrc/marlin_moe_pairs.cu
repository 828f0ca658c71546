// The expert GEMMs of a few tokens (marlin_moe_pairs.cuh) with int4 weights.
#include "marlin_moe_pairs.cuh"

int marlin_moe_pairs_int8(const MarlinMoePairs& a, MarlinMoePairsPlan plan, void* stream);  // in a file of its own, to be compiled beside this one

extern "C" int marlin_moe_pairs(const MarlinMoePairs* arguments, MarlinMoePairsPlan plan, void* stream) {
  const MarlinMoePairs& a = *arguments;
  if (a.tokens == 0) return 0;
  return a.bits == 4 ? dispatch_pairs_type<4>(a, plan, stream) : marlin_moe_pairs_int8(a, plan, stream);
}
