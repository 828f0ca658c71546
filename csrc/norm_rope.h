// The kernels after the linears of attention for many tokens, which add what adapters add to these linears. No torch, no CUDA header.
// Formulas in words: sglang_lora_moe/ops/norm_rope.py.
#pragma once
#include <stdint.h>

extern "C" {

// y[t] += scaling[slot(t), part] * B(slot(t), part) (row_scale[t] * s[t, part]) for the rows of every part of y [m, rows]
struct AddedRows {
  const float* s;          // [splits, m, parts, width], the sum over its splits is A x
  const float* row_scale;  // [m], or null
  const int32_t* order;    // [m] the tokens by slot
  const int32_t* slots;    // [m] the slots in that order, -1 = no adapter
  const void* pool;        // of B: rows of part p in slot e at offset[p * part_stride + e], [rows of p, rank], likewise:
  const int64_t* offset;
  const int32_t* rank;
  const float* scaling;
  int32_t part_stride, parts, splits, width, num_slots;
};

// Norm and rotation of each head of q and k; k and v go to rows kv_slots[t] of the cache. Parts of what is added: q, k, v. Hopper alone; s of a
// width that is a multiple of 4, table_stride too.
struct RotateRows {
  const void* qkv;                  // [m, (heads + 2 kv_heads) * 128]
  void *q, *k_cache, *v_cache;      // [m, heads, 128], [rows, kv_heads, 128] twice
  const int64_t *kv_slots, *positions;  // [m] each
  const float *cos, *sin;           // [positions, 64], rows table_stride apart
  const void *q_weight, *k_weight;  // [128], or both null: no norm
  float eps;
  int32_t table_stride, m, heads, kv_heads, is_bf16, overlap, multiprocessors;
  AddedRows added;
};

// residual += x; out = norm(residual) * weight
struct NormRows {
  const void* x;       // [m, columns]
  void* residual;      // [m, columns]
  const void* weight;  // [columns]
  void* out;           // [m, columns]
  float eps;
  int32_t m, columns, is_bf16, overlap;  // columns: a multiple of 128 up to 4,096, with s of more than 16 ranks up to 2,048
  AddedRows added;
};

// Enqueue on `stream`. Return a cudaError_t, 0 = success. Never synchronise; safe to capture.
int rotate_rows(const RotateRows* arguments, void* stream);
int norm_rows(const NormRows* arguments, void* stream);
}
