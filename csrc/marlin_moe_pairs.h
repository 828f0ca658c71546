// The two expert GEMMs of a few tokens over the layout of marlin_moe.h, a pair at a time, with adapters inside. No torch, no CUDA header.
#pragma once
#include <stdint.h>

extern "C" {

// Adapters' matrices of one projection by slot, as lora/stacks.py has them, of the activation type; pool null: none, split null: all 0.
struct MarlinMoeTable {
  const void* pool;
  const int64_t *offset, *stride;
  const int32_t *rank, *split;
  const float* scaling;
};

// gate_up: out[pair] = act(w[expert] x[token] + bias[expert]); down: out[token] = sum over its pairs of weight * (w[expert] x[pair] + bias[expert]).
// With adapters both have B s more for each pair, before the activation or the weight, s = scaling * A x. gate_up makes both s: down's in parts.
struct MarlinMoePairs {
  const void* x;                // gate_up [tokens, k], down [tokens * top_k, k], of the activation type
  const uint32_t* packed;       // as MarlinMoeGemm has them, with halves 2 for gate_up
  const void* scales;
  const uint8_t* zeros;         // or null
  const void* bias;             // [experts, rows], or null
  const int32_t* topk_ids;      // [tokens, top_k]
  const float* topk_weights;    // [tokens, top_k] for down; null for gate_up
  void* out;                    // gate_up [tokens * top_k, rows / 2], where there is an expert; down [tokens, rows]
  const int32_t* slots;         // [tokens], or null: no adapters
  MarlinMoeTable a, b, next, then;  // of this projection, without A for down; gate_up: A and B of down
  float* s;                     // gate_up [pairs, 8, width], in shares of A's columns, all bits set before gate_up and after down; down [pairs, parts, width]
  float* other_s;               // of the other one
  int32_t num_slots, width, next_width;  // slots; rows that A may have, in sixteens for each half, of this projection and of down
  int32_t exchanged;            // down: values of gate_up's s
  int32_t parts;                // gate_up's blocks of a pair, for down
  int32_t experts, tokens, top_k;
  int32_t rows, k;              // logical widths of a weight: rows = 2I or H
  int32_t row_units, k_units, groups, group_size;
  int32_t bits, is_bf16;
  float alpha, cubic, limit, shift;  // of the activation, as MarlinMoeGemm has them
  // A linear is down with one expert of weight 1. Its adapters, as ops/lora_linear.py has them: tables of part p begin p * part_stride further, and s is
  // A x [parts (of the sum), tokens, linear_parts, s_width], not scaled; ranks beyond an adapter's own are not read.
  const int32_t* starts;  // [linear_parts + 1] first rows, which divide by the rows of a block; null: experts
  int32_t linear_parts, part_stride, s_width;
};

struct MarlinMoePairsPlan {
  int32_t units;    // of 32 rows a block, 1 to 16; down: 1, or 0 for half of one
  int32_t shrinks;  // of a pair's first blocks that share its A x and wait for each other: no more than the GPU runs at once
  int32_t alone;    // sm_90: no two blocks on a multiprocessor, so that few are spread evenly; gate_up with adapters has more warps for them then
  int32_t overlap;  // start beside the end of the kernel before, where the GPU can: down's weights and adapters are older
};

// Enqueue on `stream`. Returns a cudaError_t, 0 = success. Never synchronises; safe to capture.
int marlin_moe_pairs(const MarlinMoePairs* arguments, MarlinMoePairsPlan plan, void* stream);
}
