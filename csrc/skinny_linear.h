// A linear layer of few tokens with 16-bit weights for sm_90, with the adapters' part of its output. No torch, no CUDA header.
// Formulas in words: sglang_lora_moe/ops/skinny_linear.py.
#pragma once
#include <stdint.h>

extern "C" {

// out[t] = w x[t] + bias + scaling[slot(t), part] * B(slot(t), part) (A(slot(t), part) x[t]) for the rows of every part
struct SkinnyLinear {
  const void* x;     // [m, k]
  const void* w;     // [n, k]
  const void* bias;  // [n], or null
  void* out;         // [m, n]
  float* s;                // two halves, for shares of A x [ceil(k / 1024), m, parts, width], in turns: all bits set before the first launch;
                           // with shares: A x [shares, m, parts, width], which the kernel before has made, and launches and half unused;
                           // null: no adapters, and the fields down to max_rank unused
  uint32_t* launches;      // with this s, so many times 2^16: each counts itself
  const int32_t* slots;    // [m], -1 = no adapter
  const int32_t* order;    // [m] tokens sorted by slot
  const int32_t* ordered;  // [m] the slots in that order
  const void* pool;        // A of part p in slot e at a_offset[p * part_stride + e], [rank, k], B [rows of p, rank]:
  const int64_t *a_offset, *b_offset;
  const int32_t* rank;
  const float* scaling;
  const int32_t* starts;   // [parts + 1] first row of each part, then n
  int32_t part_stride, parts, width, num_slots, max_rank;  // at most 4 parts
  int32_t m, n, k;         // m <= 64; n a multiple of 8, k of 64
  int32_t is_bf16;
  int32_t rows;            // of w in a block: a multiple of 8 up to 144
  int32_t splits;          // blocks of a cluster, which share the columns of w: 1, 2, 4 or 8
  int32_t overlap;         // start beside the end of the kernel before
  int32_t group;           // chunks of 64 columns that come with one copy: 2 or more
  int32_t half;            // floats of half of s, a multiple of 4
  int32_t shares;          // of a given s, or 0; with them width is a multiple of 4
};

// Bytes of shared memory that a block needs; more than the device gives: this shape cannot run.
int64_t skinny_linear_shared_bytes(const SkinnyLinear* arguments);

// With adapters all blocks, ceil(n / rows) * splits, must fit on the device at once, one a multiprocessor.
// Enqueue on `stream`. Returns a cudaError_t, 0 = success. Never synchronises; safe to capture.
int skinny_linear(const SkinnyLinear* arguments, void* stream);
}
