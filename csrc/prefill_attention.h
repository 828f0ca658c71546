// Causal attention of requests with several query tokens over the paged KV cache. No torch, no CUDA header.
// Formulas in words: sglang_lora_moe/ops/paged_attention.py.
#pragma once
#include <stdint.h>

extern "C" {

struct PrefillAttention {
  const void* q;                 // [m, heads, 128]
  const void *k_cache, *v_cache;  // [cache_rows, kv_heads, 128] each
  const int32_t* page_table;     // [requests, max_pages]
  const int32_t* query_starts;   // [requests + 1] of the packed tokens
  const int32_t* seq_lens;       // [requests], query tokens included
  uint32_t* tickets;             // [2], zero before and after a launch: no two at a time may share them
  void* out;                     // [m, heads, 128]
  float scale;                   // of q k, with log2(e)
  int32_t m, heads, kv_heads, requests, max_pages, page_size, is_bf16, blocks, overlap;  // heads / kv_heads and page_size: powers of two, page_size at least 8
  int64_t cache_rows;
};

// Enqueue on `stream`. Returns a cudaError_t, 0 = success. Never synchronises; safe to capture.
int prefill_attention(const PrefillAttention* arguments, void* stream);
}
