// The merge of decode's splits and the values of latent attention in one kernel for sm_90. No torch, no CUDA header.
// Formulas in words: sglang_lora_moe/ops/latent_attention.py.
#pragma once
#include <stdint.h>

extern "C" {

// out[t, h] = w[h] x[t, h], x[t, h] = sum over splits of softmax(lse[t, h])[split] * parts[t, h, split], rounded to w's type; no lse above -inf: 0
struct LatentValues {
  const float* parts;  // [m, heads, splits, columns]; anything where lse is -inf
  const float* lse;    // [m, heads, splits], in powers of two
  const void* w;       // [heads, skipped + rows, columns]: of each head the last rows
  void* out;           // [m, heads, rows]
  int32_t m, heads, splits, columns, skipped, rows;  // splits: a power of two, 2 to 32; columns: a multiple of 32 up to 512; rows: a power of two, 16 to 256
  int32_t is_bf16, overlap;
};

// Enqueue on `stream`. Returns a cudaError_t, 0 = success. Never synchronises; safe to capture.
int latent_values(const LatentValues* arguments, void* stream);
}
