// A linear layer of more tokens than a tile of 64 with 16-bit weights for sm_90, which adds B s of its adapters. No torch, no CUDA header.
// Formulas in words: sglang_lora_moe/ops/middle_linear.py.
#pragma once
#include <stdint.h>

extern "C" {

// out[t] = w x[t] + bias + scaling[slot(t), part] * B(slot(t), part) s[t, part] for the rows of every part
struct MiddleLinear {
  const void* x;           // [m, k]
  const void* w;           // [n, k]
  const void* bias;        // [n], or null
  void* out;               // [m, n]
  const float* s;          // [m, parts, width] A x
  const int32_t* slots;    // [m], -1 = no adapter
  const void* pool;        // B of part p in slot e at offset[p * part_stride + e], [rows of p, rank]
  const int64_t* offset;
  const int32_t* rank;     // at most 64
  const float* scaling;
  int32_t starts[5];       // first row of each part, then n
  int32_t part_stride, parts, width, num_slots, max_rank;  // at most 4 parts; width a multiple of 4
  int32_t m, n, k;         // n a multiple of 8, as are the parts' rows, k of 64
  int32_t is_bf16;
  int32_t tokens;          // of a block: a multiple of 8 up to 128
  int32_t rows;            // of w in a block: a multiple of 16 from 32 to 128
  int32_t splits;          // blocks of a cluster, which share the columns of w: 1, 2, 4 or 8
  int32_t overlap;         // start beside the end of the kernel before
};

// Enqueue on `stream`. Returns a cudaError_t, 0 = success. Never synchronises; safe to capture.
int middle_linear(const MiddleLinear* arguments, void* stream);
}
