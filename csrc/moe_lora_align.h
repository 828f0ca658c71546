// moe_lora_align_block_size: one sort of a layer's routed pairs by (expert, slot), and tile lists over it. No torch, no CUDA header.
// What the outputs mean, with a worked example: sglang_lora_moe/ops/moe_lora_align.py.
#pragma once
#include <stdint.h>

extern "C" {

struct MoeLoraAlign {
  const void* topk_ids;        // int32 or int64 [tokens, top_k]; < 0 or >= experts: no expert
  const int32_t* token_slots;  // [tokens], or null: no adapters; < 0 or >= slots: base model
  int32_t* sorted_pairs;       // [pairs]
  int32_t* base_tiles;         // [.., 3] expert, start, rows <= base_block
  int32_t* lora_tiles;         // [.., 4] expert, slot, start, rows <= lora_block
  int32_t* counts;             // [4] valid pairs, base tiles, lora tiles, lora groups
  uint32_t* workspace;         // [moe_lora_align_workspace(pairs, experts)], contents undefined before and after
  int32_t ids_are_64bit;
  int32_t tokens, top_k;       // M, K
  int32_t experts, slots;      // E <= 1024, S <= 256
  int32_t base_block, lora_block;
  uint32_t* told;              // null, or a word, 1 from the kernel's begin until all but lora_tiles and counts[2..3] is there, then 0: of one block alone
};

// How the work is cut. The defaults are moe_lora_align_default_plan's; tests and benchmarks force others.
struct MoeLoraAlignPlan {
  int32_t one_block_pairs;  // up to so many pairs (at most 1,024): one launch of one block, as far as shared memory allows
  int32_t cluster_pairs;    // up to so many: one launch of a cluster, on Hopper and newer, with a counter for each group
  int32_t pairs_per_block;  // beyond one block: so many pairs a block, more when that would be over 16 in a cluster, 128 otherwise; 0 = by P
  int32_t overlap;          // let a launch start while the one before it ends
  int32_t most_bins;        // up to so many groups (E * (S + 1)) have a counter each, as far as memory allows; < 0 = by P
};

MoeLoraAlignPlan moe_lora_align_default_plan();

// int32 elements of scratch for any plan.
int64_t moe_lora_align_workspace(int64_t pairs, int64_t experts);

// Enqueue on `stream` (a cudaStream_t). Returns a cudaError_t, 0 = success. Never synchronises; safe to capture.
int moe_lora_align(const MoeLoraAlign* arguments, MoeLoraAlignPlan plan, void* stream);
}
