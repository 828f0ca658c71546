// Grouped GEMM over experts with int4 or int8 weights and 16-bit activations, and the layout it reads. No torch, no CUDA header.
// Formulas and the layout in words: sglang_lora_moe/ops/marlin_moe.py.
#pragma once
#include <stdint.h>

extern "C" {

// Canonical weights [experts, rows, k] -> units of 32 rows x 32 k in fragment order [experts, row_units, k_units, 32 lanes * bits / 4 words].
struct MarlinMoeRepack {
  const uint32_t* codes;  // [experts, rows, k * bits / 32], low bits first along k
  uint32_t* packed;
  int32_t experts, rows, k, bits;
  int32_t row_units, k_units;
  int32_t halves;  // 2: the first half of the rows (gate) and the second (up) alternate by fragment; else 1
};

// The adapters of sorted rows by slot, for tiles of up to 32 tokens; tables as sglang_lora_moe/lora/stacks.py has them.
struct MarlinMoeSlots {
  const int32_t* slots;                // [tokens] or -1
  const int32_t *rank, *split;         // [slots]
  const int64_t *b_offset, *b_stride;  // [slots]
  // What down needs to compute s itself, where tiles have 16 tokens; of 32 `pool` is null and `low` filled by the kernel before.
  const void* pool;                // of A
  const int64_t *offset, *stride;  // [slots]
  const float* scaling;            // [slots]
  const int32_t* tiles;            // [.., 4] LoRA tiles: expert, slot, start, rows <= 16; counts[2] of them
  int32_t num_slots;
  int32_t parts;  // items of a LoRA tile, each of every so many eight rows of A
};

// s[row] = scaling * A(slot, expert) out[row] for the layer's second projection, of up to 16 ranks: csrc/marlin_moe_next.cuh.
struct MarlinMoeNext {
  const void* pool;        // of A [rank, out columns]
  const int64_t* records;  // [LoRA tiles, 5] first row, rows and above them the scaling's bits, rank, place of A in 16 bytes, place of B
  float* parts;            // [tiles of rows, pairs, 16], or null: none of this
  void* s;                 // [pairs, s_width]
  int32_t s_width;
};

// out[row] = act(w[expert] x[row] + bias[expert]) for the rows of every tile.
struct MarlinMoeGemm {
  const void* x;                // [.., k] of the activation type
  const uint32_t* packed;       // as above
  const void* scales;           // [experts, row_units, groups, 32] of the activation type, rows in fragment order
  const uint8_t* zeros;         // the same shape, or null: 2^(bits - 1)
  const void* bias;             // [experts, rows] of the activation type, or null
  const int32_t* tiles;         // [.., 3] expert, start, rows <= token block
  const int32_t* counts;        // counts[1] = tiles
  const int32_t* sorted_pairs;  // [pairs]
  void* out;                    // [.., out_columns]
  float* partials;              // marlin_moe_partials() floats
  uint32_t* arrivals;           // marlin_moe_counters() words, zero before and after
  // Adapters, or null: out gets B s more before its activation, B's places below 2^32. As LowRank of sglang_lora_moe/ops/low_rank.py has them.
  const void* low;             // s [sorted pairs, low_width] of the activation type; with two A the up half's begin at low_max_rank
  const void* low_pool;        // B of all adapters, of the activation type
  const int64_t* low_records;  // [.., 5] first sorted row, rows, rank, whether gate and up have their own A, place of B in 16 bytes
  const int32_t* low_ranges;   // [tiles, 2] records that meet each tile
  int32_t low_width, low_max_rank;
  int32_t low_lines;           // of 128 bytes in low_pool
  const MarlinMoeSlots* by_slot;  // on the host; instead of records and ranges
  MarlinMoeNext next;             // by wgmma, with an activation, adapters and report
  int32_t experts, pairs, top_k;
  int32_t rows, k;              // logical widths of a weight: rows = 2I or H
  int32_t row_units, k_units, groups;  // groups of the padded k
  int32_t group_size;           // 32, 64, 128; 0 = one group
  int32_t bits, is_bf16, halves;
  int32_t activation;           // 0 none; 1 with halves 2: g * sigmoid(alpha * (g + cubic * g^3)) * (u + shift), g = min(gate, limit), u = clamp(up, limit)
  float alpha, cubic, limit, shift;
  const uint32_t* told;         // or null: a word that is set once x is complete; by mma.sync, with early 2 and without adapters
  int32_t early;                // what the kernel before this one in the stream may have written: 0 anything; 1 x alone; 2 low* alone
  int32_t gather, scatter;      // x by token (pair / top_k) rather than by row; out by pair rather than by row
  int32_t report, behind;       // by wgmma: count in `tiles` what is stored of each, and s of the next; x is that of the kernel before, which reports each tile so often
};

struct MarlinMoePlan {
  int32_t config;   // index of a shape of tiles, see marlin_moe_shape
  int32_t sms;      // multiprocessors
  int32_t overlap;  // start beside the end of the kernel before, where the GPU can
};

struct MarlinMoeShape {
  int32_t block_rows, block_tokens, block_k, threads, blocks_per_sm, stages;
};

// The shapes of tiles; block_tokens 0 beyond the last.
MarlinMoeShape marlin_moe_shape(int32_t config);
int32_t marlin_moe_blocks(MarlinMoePlan plan);
int64_t marlin_moe_partials(MarlinMoePlan plan);  // floats of scratch
int32_t marlin_moe_counters(MarlinMoePlan plan);  // of blocks that share tiles, or by wgmma the two queues of tiles; behind them those of adapters by slot

// Enqueue on `stream`. Return a cudaError_t, 0 = success. Never synchronise; safe to capture.
int marlin_moe_repack(const MarlinMoeRepack* arguments, void* stream);
int marlin_moe_gemm(const MarlinMoeGemm* arguments, MarlinMoePlan plan, void* stream);
}
