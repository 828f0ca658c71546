// LoRA shrinks of sorted rows: s[row] = scaling * A(slot, expert) x[row], for the rows of every LoRA tile. No torch, no CUDA header.
// Formulas in words: sglang_lora_moe/ops/fused_moe_lora.py; tables: sglang_lora_moe/lora/stacks.py.
#pragma once
#include <stdint.h>

extern "C" {

struct MoeLoraNext {       // the adapters of a layer's second projection, whose A the first one's GEMM multiplies by
  const int64_t* offset;   // [slots] of A
  const int64_t* stride;   // [slots]
  const int32_t* rank;     // [slots]
  const uint32_t* scaling; // [slots] bits of float32
  const int64_t* b_offset; // [slots]
  const int64_t* b_stride; // [slots]
  int64_t* records;        // [LoRA tiles, 5] first row, rows and above them scaling's bits, rank, place of A in 16 bytes, place of B; or null
};

struct MoeLoraShrink {
  const void* x;                // [.., cols] by token with gather, else by row; at a multiple of 16 bytes
  const void* pool;             // of A, 16-bit like x: [rows of A, cols] at offset[slot] + expert * stride[slot], multiples of eight
  const int64_t* offset;        // [slots]
  const int64_t* stride;        // [slots]
  const int32_t* rank;          // [slots] 0 = nothing here
  const int32_t* split;         // [slots] 1: A has 2 * rank rows, those of gate, then those of up
  const float* scaling;         // [slots]
  const int64_t* b_offset;      // [slots] of B, for the records
  const int64_t* b_stride;      // [slots]
  const int32_t* tiles;         // [.., 4] LoRA tiles: expert, slot, start, rows <= lora_block; at a multiple of 16 bytes
  const int32_t* base_tiles;    // [.., 3] expert, start, rows
  const int32_t* counts;        // counts[1] = base tiles, counts[2] = LoRA tiles
  const int32_t* sorted_pairs;  // [pairs]
  void* s;                      // [pairs, width]: columns [0, rank), and with split [max_rank, max_rank + rank)
  int64_t* records;             // [LoRA tiles, 5] first row, rows, rank, split, place of B in 16 bytes
  int32_t* ranges;              // [base tiles, 2] first and end of the LoRA tiles that meet a base tile, or null
  MoeLoraNext next;
  int32_t cols;                 // a multiple of eight
  int32_t width, max_rank, top_k, lora_block;
  int32_t is_bf16, gather;
  int32_t early;    // the tiles are older than the kernel before this one: A is fetched while that one still runs
  int32_t overlap;  // start beside the end of the kernel before
};

// Enqueue on `stream` as many blocks as these multiprocessors of an H100 or H200 hold at once, or as `tiles` LoRA tiles need at most.
// Returns a cudaError_t, 0 = success. Never synchronises; safe to capture.
int moe_lora_shrink(const MoeLoraShrink* arguments, int32_t tiles, int32_t multiprocessors, void* stream);
}
