// Grouped GEMM over experts with 16-bit weights for sm_90, with its low-rank addend. No torch, no CUDA header.
// Formulas in words: sglang_lora_moe/ops/moe_wgmma_gemm.py.
#pragma once
#include <stdint.h>

extern "C" {

// s[row] = scaling * A(slot, expert) out[row], for the layer's next product: each tile's share of the columns as a part. These are added up by
// whoever reports a tile's rows last, or without s by down's blocks before they begin; who adds them up reports the tile once more.
struct MoeWgmmaNext {
  const void* pool;        // of A [rank, n]
  const int64_t* records;  // [LoRA tiles, 5] first row, rows and above them the scaling's bits, rank, place of A in 16 bytes, place of B
  float* parts;            // [ceil(n / 128), pairs, width], with tiles of 72 tokens ceil(n / 64), or null: none of this; of down k in place of n
  void* s;                 // [pairs, s_width], or null: left to down
  int32_t width, s_width;  // width: the largest rank rounded up to 16, at most 64
};

// out[row] = act(w[expert] x[row] + bias[expert] + B(slot, expert) s[row]) for the rows of every tile.
struct MoeWgmmaGemm {
  const void* x;                // [.., k]
  const void* w;                // [experts, halves * n, k]
  const void* bias;             // [experts, halves * n], or null
  void* out;                    // [.., n]
  // [.., 3] expert, start, rows <= tokens * cluster, in the lower 16 bits. In the upper ones, zero at first, kernels of a layer count: beside the
  // rows what is stored of a tile (report), beside the first expert the tiles that down's blocks have taken (queued), beside the second gate_up's.
  int32_t* tiles;
  const int32_t* counts;        // counts[1] = tiles
  const int32_t* sorted_pairs;  // [pairs]
  const void* s;                // [pairs, s_width] scaled A x in the order of the tiles, or null: no addend, and the four below unused
  const void* pool;             // of B
  const int64_t* records;       // [LoRA tiles, 5] first row, rows, rank, split, place of B in 16 bytes
  const int32_t* ranges;        // [tiles, 2] first and end of the LoRA tiles that meet a tile
  MoeWgmmaNext next;            // with halves 2 and report
  int32_t s_width, max_rank;
  int32_t experts, n, k, pairs, top_k;
  int32_t halves;      // 2: w has gate rows, then up rows
  int32_t is_bf16;
  int32_t activation;  // with halves 2: g * sigmoid(alpha * (g + cubic * g^3)) * (u + shift), g = min(gate, limit), u = up within +-limit
  float alpha, cubic, limit, shift;
  int32_t gather, scatter;  // x by token (pair / top_k) rather than by row; out by pair rather than by row, with halves 1
  int32_t group;            // tiles that walk the columns together
  int32_t blocks;           // of the grid: multiprocessors, fewer where there are fewer tiles
  int32_t tokens;           // of a block's tile: 144, with cluster 1 also 32, which keeps more weights on their way, or 72, with two blocks on a multiprocessor
  int32_t cluster;          // 2: two blocks share a tile of up to twice the tokens, and fetch each weight once
  int32_t stream;           // weights leave L2 first: worth it where one tile of tokens reads them
  int32_t report;           // each block counts its part of a tile when it is stored, so often in all; 0: nobody waits for it
  int32_t behind;           // rows of a tile are there when so much of it is reported by the kernel before, whose end only the last tile waits for
  int32_t queued;           // blocks take the next tile when they are ready for it; fewer than 65,536 in all
  int32_t overlap;          // start beside the end of the kernel before
};

// Enqueue on `stream`. Returns a cudaError_t, 0 = success. Never synchronises; safe to capture.
int moe_wgmma_gemm(const MoeWgmmaGemm* arguments, void* stream);
}
