// Between the two GEMMs of experts with adapters: the activation with B s added, and s of the second projection. No torch, no CUDA header.
// Formulas in words: sglang_lora_moe/ops/moe_lora_act.py; tables: sglang_lora_moe/lora/stacks.py.
#pragma once
#include <stdint.h>

extern "C" {

struct MoeLoraAct {
  const float* gate_up;         // [pairs, 2 * inter], without halves [pairs, inter]; this and the others at multiples of 16 bytes
  const void* s;                // [pairs, s_width] of the first projection, 16-bit like all that follows; with split the up half's begin at max_rank
  const void* b_pool;           // of B of the first: [2 * inter or inter, rank] at b_offset[slot] + expert * b_stride[slot], multiples of eight
  const int64_t *b_offset, *b_stride;  // [slots]
  const int32_t *b_rank, *b_split;     // [slots]
  const void* a_pool;           // of A of the second: [rank, inter]
  const int64_t *a_offset, *a_stride;  // [slots]
  const int32_t* a_rank;        // [slots]
  const float* scaling;         // [slots] of the second
  const int64_t *next_offset, *next_stride;  // [slots] of B of the second, for the records
  const int32_t* slots;         // [tokens] or -1
  const int32_t* tiles;         // [.., 4] LoRA tiles: expert, slot, start, rows <= lora_block
  const int32_t* counts;        // counts[0] = pairs with an expert, which come first, counts[2] = LoRA tiles
  const int32_t* sorted_pairs;  // [pairs]
  void* act;                    // [pairs, inter]
  void* next;                   // s of the second [pairs, next_width]
  int64_t* records;             // [LoRA tiles, 5] first row, rows, rank, split (0), place of B in 16 bytes, of the second
  int32_t inter;                // a multiple of eight
  int32_t s_width, max_rank, next_width, top_k, lora_block, num_slots, pairs;
  int32_t is_bf16, gated;
  int32_t activation;           // as moe_activation's codes: 1 silu, 2 gelu, 3 gelu_tanh, 4 relu, 5 relu2, 6 clamped SwiGLU
  float alpha, limit;           // of the last
  int32_t overlap;              // start beside the end of the kernel before, which may have written gate_up and nothing else of this, and may have begun the one after
};

// Enqueue on `stream` in clusters of so many blocks, `parts` <= 8, each a share of the columns of a LoRA tile (1 where the GPU is not of sm_90), as
// many as these multiprocessors hold at once, or as `tiles` LoRA tiles need. Returns a cudaError_t, 0 = success. Never synchronises; safe to capture.
int moe_lora_act(const MoeLoraAct* arguments, int32_t tiles, int32_t parts, int32_t multiprocessors, void* stream);
}
