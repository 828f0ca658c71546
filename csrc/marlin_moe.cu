// Grouped GEMM over experts with int4 or int8 weights: weights are the A operand of m16n8k16 in fragment order, tokens are N.
//
//   * A block works on whole tiles (block_rows of one expert's weight x up to block_tokens of its tokens) or, where those would leave
//     multiprocessors idle, on an equal share of all (tile, k) units; with adapters blocks draw tiles, and halves of the last ones, from a queue.
//     Blocks that share a tile leave float32 sums in `partials`, and the last to arrive adds them in order: results do not depend on timing. Nobody waits for anybody, but for s in marlin_moe_lora.cuh.
//   * A ring of cp.async stages runs ahead across tiles; each warp loads its own weights, 32 rows, and dequantizes 32 k of them from one 16-byte
//     load a lane (int4) to exactly the 16-bit value of (q - z) * s; tokens come by ldmatrix from rows swizzled as wgmma wants them too.
//   * Many tokens on sm_90: by wgmma, whole tiles of 256 rows x 144 tokens, each block's next one the first that nobody has taken, with a warpgroup
//     that only copies and finds a tile during the one before (gemm_by_warpgroups). Down begins with
//     the rows that gate_up has stored, with adapters where that makes s of down (marlin_moe_next.cuh).
//   * Adapters are more k of the same product, in 16 bit: stages of the same ring behind a tile's weights (load_adapters; of few sorted rows
//     marlin_moe_lora.cuh). Bias and activation are
//     part of the end of a tile.
//   * Tiles of one expert are neighbours with the row tile outermost: several token tiles read the same weights one after another, from L2.
#include "marlin_moe_kernels.cuh"

int marlin_moe_gemm_int8(const MarlinMoeGemm& a, MarlinMoePlan plan, void* stream);  // in a file of its own, to be compiled beside this one

namespace {

// ---- The layout ------------------------------------------------------------------------------------------------------

// The logical row at place p of a unit; may lie beyond the rows there are. Lane l holds p = 4 * (l / 4) + 2 * fragment + half.
DEVICE int row_at(int unit, int p, int rows, int halves) {
  if (halves == 1) return 32 * unit + p;
  const int i = 16 * unit + 2 * (p >> 2) + (p & 1);
  return i < rows / 2 ? (p >> 1 & 1) * (rows / 2) + i : rows;
}

// One thread for each lane and 16-byte piece of a unit.
template <int BITS>
KERNEL void __launch_bounds__(256) repack(MarlinMoeRepack a) {
  constexpr int pieces = 32 * (BITS / 4), per_word = 32 / BITS;
  const int64_t index = (int64_t)blockIdx.x * blockDim.x + thread_index(), all = (int64_t)a.experts * a.row_units * a.k_units * pieces;
  if (index >= all) return;
  const int piece = (int)(index % pieces), lane = piece % 32;
  const int64_t unit = index / pieces, row_unit = unit / a.k_units;
  const int k_unit = (int)(unit % a.k_units), expert = (int)(row_unit / a.row_units);
  const int words = ceil_div(a.k * BITS, 32);
  uint32_t out[4] = {0, 0, 0, 0};
#pragma unroll
  for (int fragment = 0; fragment < 2; fragment++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_at((int)(row_unit % a.row_units), 4 * (lane / 4) + 2 * fragment + half, a.rows, a.halves);
      if (row >= a.rows) continue;
      const uint32_t* codes = a.codes + ((int64_t)expert * a.rows + row) * words;
#pragma unroll
      for (int j = 0; j < (BITS == 4 ? 8 : 4); j++) {  // j: element | upper k of the fragment << 1 | k16 step << 2 (int8: the step is the piece's)
        const int step = BITS == 4 ? j >> 2 : piece / 32, upper = j >> 1 & 1, element = j & 1;
        const int k = 32 * k_unit + 16 * step + 8 * upper + 2 * (lane % 4) + element;
        if (k >= a.k) continue;
        const uint32_t code = codes[k / per_word] >> k % per_word * BITS & ((1u << BITS) - 1);
        if (BITS == 4) out[2 * (j >> 2) + fragment] |= code << (4 * (half + 2 * upper) + 16 * element);
        else out[2 * fragment + upper] |= code << (16 * half + 8 * element);
      }
    }
  uint32_t* target = a.packed + index * 4;
  store_words(target, out[0], out[1]);
  store_words(target + 2, out[2], out[3]);
}

}  // namespace

extern "C" MarlinMoeShape marlin_moe_shape(int32_t config) {
  using All = Shapes<Format<BFloat16, 4, false>>;
  switch (config) {
    case 0: return describe<All::S0>();
    case 1: return describe<All::S1>();
    case 2: return describe<All::S2>();
    case 3: return describe<All::S3>();
    case 4: return describe<All::S4>();
    default: return {0, 0, 0, 0, 0, 0};
  }
}

extern "C" int32_t marlin_moe_blocks(MarlinMoePlan plan) { return plan.sms * marlin_moe_shape(plan.config).blocks_per_sm; }

extern "C" int64_t marlin_moe_partials(MarlinMoePlan plan) {
  const MarlinMoeShape shape = marlin_moe_shape(plan.config);
  return 2 * (int64_t)marlin_moe_blocks(plan) * shape.block_rows * shape.block_tokens;
}

extern "C" int32_t marlin_moe_counters(MarlinMoePlan plan) {
  return marlin_moe_blocks(plan) + 2 * kSlotCounters;
}

extern "C" int marlin_moe_repack(const MarlinMoeRepack* arguments, void* stream) {
  const MarlinMoeRepack& a = *arguments;
  const int64_t pieces = (int64_t)a.experts * a.row_units * a.k_units * 32 * (a.bits / 4);
  if (pieces == 0) return 0;
  const Launch how = {(unsigned)((pieces + 255) / 256), 256, 0, stream};
  return a.bits == 4 ? launch(how, repack<4>, a) : launch(how, repack<8>, a);
}

extern "C" int marlin_moe_gemm(const MarlinMoeGemm* arguments, MarlinMoePlan plan, void* stream) {
  const MarlinMoeGemm& a = *arguments;
  if (a.pairs == 0) return 0;
  return a.bits == 4 ? dispatch_type<4>(a, plan, stream) : marlin_moe_gemm_int8(a, plan, stream);
}
