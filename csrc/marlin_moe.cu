// Grouped GEMM over experts with int4 or int8 weights: weights are the A operand of m16n8k16 in fragment order, tokens are N.
//
//   * A block works on whole tiles (block_rows of one expert's weight x up to block_tokens of its tokens) or, where those would leave
//     multiprocessors idle, on an equal share of all (tile, k) units; blocks that share a tile leave float32 sums in `partials`, and the last
//     to arrive adds them in block order, so that results do not depend on timing. Nobody waits for anybody.
//   * A ring of cp.async stages runs ahead across tiles. A warp dequantizes its 32 rows x 32 k from one 16-byte load a lane (int4) to
//     exactly the 16-bit value of (q - z) * s; tokens come by ldmatrix from rows swizzled as wgmma wants them too.
//   * Tiles of one expert are neighbours with the row tile outermost: several token tiles read the same weights one after another, from L2.
#include "marlin_moe.h"

#include <math.h>

#include "gemm_prims.cuh"

namespace {

constexpr int kQueue = 8;  // tiles between the loader and the epilogue; more than stages
constexpr int kNoGroups = 30;

HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

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

// ---- Shapes of tiles -------------------------------------------------------------------------------------------------

// T activation type; BITS of a weight; WM x WK warps over rows and k; NT eights of tokens; KU units of 32 k a warp takes of each stage.
// WARPGROUP: by wgmma, whose products still read a stage while the next is dequantized, so that one stage less is under way.
template <class T, int BITS, int WM, int WK, int NT, int KU, int STAGES, int BLOCKS, bool WARPGROUP = false>
struct Shape {
  using Type = T;
  static constexpr bool kWarpgroup = WARPGROUP;
  static constexpr int kSkip = NT < 4 ? 1 : NT < 8 ? 2 : 4;  // eights of tokens that are computed or left out together
  static constexpr int kAhead = STAGES - 1 - WARPGROUP;  // stages loaded ahead
  static constexpr int kBits = BITS, kWarpsM = WM, kWarpsK = WK, kNT = NT, kKU = KU, kStages = STAGES, kBlocks = BLOCKS;
  static constexpr int kThreads = 32 * WM * WK, kRows = 32 * WM, kTokens = 8 * NT, kKUnits = KU * WK, kK = 32 * kKUnits;
  static constexpr int kUnitBytes = 128 * BITS, kUnitPieces = kUnitBytes / 16;
  static constexpr int kWeightBytes = WM * kKUnits * kUnitBytes, kXBytes = kTokens * kK * 2, kStageBytes = kWeightBytes + kXBytes;
  static constexpr int kXPieces = kK / 8;                               // of 16 bytes in a row of x
  static constexpr int kXLoads = kTokens * kXPieces / kThreads;         // of a thread in a stage
  static constexpr int kRowStep = kThreads / kXPieces;                  // rows between them
  static constexpr int kWeightLoads = kWeightBytes / 16 / kThreads;
  static_assert(STAGES < kQueue && kThreads % kXPieces == 0 && kTokens * kXPieces % kThreads == 0 && kWeightBytes % (16 * kThreads) == 0, "uneven copies");
};

// One tile of the output; `start` and `rows` of the sorted pairs. shared: other token tiles read the same weights.
struct Tile {
  int32_t expert, row_tile, start, rows, shared;
};

struct Shared {
  uint8_t *stages, *scales, *zeros;
  Tile* tiles;       // [kQueue]
  int32_t* pairs;    // [kQueue][tokens]
  float* sums;       // of the warps beyond the first along k
  uint32_t* before;  // arrivals before this block's
  int scale_bytes, bytes;
};

// What the launcher derives from the arguments, so that no thread has to.
struct Derived {
  int sms;
  int group_shift;  // units of k in a group, as a power of 2
  int groups_log2;  // groups that a stage touches, likewise
  int group_mask;   // a unit whose number has none of these bits begins a group
};

template <class S>
Derived derive(const MarlinMoeGemm& a, int sms) {
  const int shift = a.group_size == 0 ? kNoGroups : a.group_size == 32 ? 0 : a.group_size == 64 ? 1 : 2;
  int log2 = 0;
  while (S::kKUnits >> shift >> (log2 + 1)) log2++;
  return {sms, shift, log2, (1 << shift) - 1};
}

template <class S>
HOST_DEVICE Shared carve(const MarlinMoeGemm& a, const Derived& d, uint8_t* base) {
  Shared s;
  int at = 0;
  const auto take = [&](int bytes) {
    uint8_t* found = base + at;
    at += (bytes + 15) / 16 * 16;
    return found;
  };
  s.scale_bytes = (S::kWarpsM << d.groups_log2) * 64;
  s.stages = take(S::kStages * S::kStageBytes);
  s.tiles = (Tile*)take(kQueue * sizeof(Tile));
  s.pairs = (int32_t*)take(kQueue * S::kTokens * 4);
  s.sums = (float*)take((S::kWarpsK - 1) * S::kRows * S::kTokens * 4);
  s.before = (uint32_t*)take(4);
  s.scales = take(S::kStages * s.scale_bytes);  // last: all places but those of the zeros are constants, which costs no register
  s.zeros = take(a.zeros ? S::kStages * s.scale_bytes / 2 : 0);
  s.bytes = at;
  return s;
}

// ---- Which block does what -------------------------------------------------------------------------------------------

struct Work {
  int tiles, row_tiles, k_steps;  // tiles of tokens; of rows; stages of a tile
  int blocks;                     // that have work
  bool whole;                     // blocks take whole tiles
  int outputs, units;             // tiles of the output; units = (output, stage), in that order
  DEVICE int first(int block) const { return whole ? (int)((int64_t)outputs * block / blocks) * k_steps : (int)((int64_t)units * block / blocks); }
  DEVICE int block_of(int unit) const { return (int)(((int64_t)(unit + 1) * blocks - 1) / units); }  // where blocks share tiles
};

template <class S>
DEVICE Work share_work(const MarlinMoeGemm& a, int sms) {
  Work w;
  w.tiles = a.tiles ? a.counts[1] : a.pairs;
  w.row_tiles = ceil_div(32 * a.row_units, S::kRows);
  w.k_steps = ceil_div(a.k_units, S::kKUnits);
  w.outputs = w.tiles * w.row_tiles, w.units = w.outputs * w.k_steps;
  const int grid = (int)gridDim.x, slots = w.outputs < grid ? sms : grid;  // fewer tiles than blocks spread over the multiprocessors
  w.whole = (int64_t)ceil_div(w.outputs, slots) * slots * 100 <= (int64_t)w.outputs * 108 || w.k_steps == 1;
  const int work = w.whole ? w.outputs : w.units / 2;  // at least two units for a block that shares tiles
  w.blocks = work < 1 ? 1 : work < grid ? work : grid;
  return w;
}

// Tiles with the same expert right before (step -1) or after (step 1) tile t.
DEVICE int same_expert(const MarlinMoeGemm& a, int t, int step, int tiles, int expert) {
  for (int base = 0;; base += 32) {
    const int i = t + step * (base + lane_index() + 1);
    const uint32_t same = warp_ballot(i >= 0 && i < tiles && a.tiles[3 * (int64_t)i] == expert);
    if (same != 0xffffffffu) return base + lowest_bit(~same);
  }
}

DEVICE Tile find_tile(const MarlinMoeGemm& a, const Work& w, int output) {
  const int t = output / w.row_tiles;
  if (a.tiles == nullptr) {
    const int expert = a.topk_ids[t];
    const bool valid = expert >= 0 && expert < a.experts;
    return {valid ? expert : 0, output - t * w.row_tiles, t, (int)valid, 0};
  }
  const int expert = a.tiles[3 * (int64_t)t];
  const int first = t - same_expert(a, t, -1, w.tiles, expert), count = t - first + 1 + same_expert(a, t, 1, w.tiles, expert);
  const int place = output - first * w.row_tiles, row_tile = place / count;
  const int32_t* tile = a.tiles + 3 * (int64_t)(first + place - row_tile * count);
  return {expert, row_tile, tile[1], tile[2], (int)(count > 1)};
}

// ---- Loading ---------------------------------------------------------------------------------------------------------

// Places are counted in pieces of 16 bytes, in 32 bits: up to 64 GB.
template <class S>
struct Loader {
  int unit, end;  // next unit to load, and the block's last + 1
  int k_step, entered;
  Tile tile;
  uint32_t weights, scales, zeros;  // this thread's first pieces at k = 0
  uint32_t x_rows[S::kXLoads];      // its pieces of x at k = 0
};

// A stage's scales: 64 bytes for 32 rows and a group, of zeros half of it; one piece a thread.
template <class S>
struct ScalePlace {
  int m, group, piece;
  DEVICE ScalePlace(const Derived& d) {
    const int i = thread_index();
    m = i >> (2 + d.groups_log2), group = (i >> 2) & ((1 << d.groups_log2) - 1), piece = i & 3;
  }
};

template <class S>
DEVICE void enter_tile(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, Loader<S>& l) {
  constexpr int kPieces = S::kKUnits * S::kUnitPieces;  // of 32 rows in a stage
  l.tile = find_tile(a, w, l.unit / w.k_steps);
  const int slot = l.entered++ % kQueue, row_unit = l.tile.expert * a.row_units + l.tile.row_tile * S::kWarpsM;
  if (thread_index() == 0) s.tiles[slot] = l.tile;
  l.weights = (uint32_t)((row_unit + thread_index() / kPieces) * a.k_units * S::kUnitPieces + thread_index() % kPieces);
  const ScalePlace<S> place(d);
  l.scales = (uint32_t)(((row_unit + place.m) * a.groups + place.group) * 4 + place.piece);
  l.zeros = (uint32_t)(((row_unit + place.m) * a.groups + place.group) * 2 + place.piece);
#pragma unroll
  for (int i = 0; i < S::kXLoads; i++) {
    const int row = thread_index() / S::kXPieces + i * S::kRowStep;
    if (row >= l.tile.rows) continue;
    const int sorted = l.tile.start + row, pair = a.tiles ? a.sorted_pairs[sorted] : sorted;
    l.x_rows[i] = (uint32_t)(a.gather ? pair / a.top_k : sorted) * (uint32_t)(a.k / 8) + thread_index() % S::kXPieces;
    if (thread_index() % S::kXPieces == 0) s.pairs[slot * S::kTokens + row] = pair;
  }
}

DEVICE const uint8_t* piece_of(const void* base, uint32_t index) { return (const uint8_t*)base + (uint64_t)index * 16; }

template <class S>
DEVICE void load_weights(const MarlinMoeGemm& a, const Derived& d, const Shared& s, const Loader<S>& l, int slot) {
  constexpr int kPieces = S::kKUnits * S::kUnitPieces, kStep = S::kThreads / kPieces;  // rows of units that all threads copy at once
  constexpr bool kPadded = S::kWarpsM <= 4 && S::kKUnits <= 4;  // every stage lies within the padded weight
  uint8_t* target = s.stages + slot * S::kStageBytes + thread_index() * 16;
  const int k_unit = l.k_step * S::kKUnits;
  const uint8_t* first = piece_of(a.packed, l.weights + k_unit * S::kUnitPieces);
  const int64_t row_bytes = (int64_t)a.k_units * S::kUnitBytes;
#pragma unroll
  for (int i = 0; i < S::kWeightLoads; i++) {
    const int index = thread_index() + i * S::kThreads;
    const uint8_t* from = first + (kStep > 0 ? i * kStep : i * S::kThreads / kPieces) * row_bytes + (kStep > 0 ? 0 : i * S::kThreads % kPieces * 16);
    uint8_t* to = target + i * S::kThreads * 16;
    if constexpr (kPadded) {
      if (l.tile.shared) cp16(to, from, true);
      else cp16_once(to, from);
    } else {
      const bool inside = l.tile.row_tile * S::kWarpsM + index / kPieces < a.row_units && k_unit + index % kPieces / S::kUnitPieces < a.k_units;
      cp16(to, from, inside);
    }
  }
  const ScalePlace<S> place(d);
  if (place.m < S::kWarpsM) {
    const int group = k_unit >> d.group_shift;
    const bool inside = (kPadded || l.tile.row_tile * S::kWarpsM + place.m < a.row_units) && group + place.group < a.groups;
    cp16(s.scales + slot * s.scale_bytes + thread_index() * 16, piece_of(a.scales, l.scales + group * 4), inside);
    if (a.zeros && place.piece < 2) {
      uint8_t* to = s.zeros + slot * s.scale_bytes / 2 + thread_index() / 4 * 32 + place.piece * 16;
      cp16(to, piece_of(a.zeros, l.zeros + group * 2), inside);
    }
  }
}

// Rows of x beyond the tile's stay what they are: they only reach outputs that nobody stores.
template <class S>
DEVICE void load_x(const MarlinMoeGemm& a, const Shared& s, const Loader<S>& l, int slot) {
  const int piece = thread_index() % S::kXPieces, first_row = thread_index() / S::kXPieces;
  uint8_t* target = s.stages + slot * S::kStageBytes + S::kWeightBytes + piece / 8 * S::kTokens * 128;
  const bool inside = l.k_step * S::kK + piece * 8 < a.k;
#pragma unroll
  for (int i = 0; i < S::kXLoads; i++) {
    const int row = first_row + i * S::kRowStep;
    if (row < l.tile.rows) cp16(target + row * 128 + (piece % 8 ^ row % 8) * 16, piece_of(a.x, l.x_rows[i] + l.k_step * S::kXPieces), inside);
  }
}

// ---- Arithmetic ------------------------------------------------------------------------------------------------------

// Scales and zeros of a lane's four rows (2 * fragment + half), as its type of weights wants them.
template <class T, int BITS, bool WIDE = T::kIsBf16 && BITS == 8>
struct Rows {
  uint32_t scale[4], zero[4];  // both halves of a word alike
  DEVICE void load_scales(const uint8_t* scales) {
    uint32_t pair[2];
    load_words(pair, scales + lane_index() / 4 * 8);
#pragma unroll
    for (int i = 0; i < 4; i++) scale[i] = select_bytes(pair[i / 2], 0, i % 2 ? 0x3232 : 0x1010);
  }
  DEVICE void set_zeros(uint32_t bytes) {
#pragma unroll
    for (int i = 0; i < 4; i++) zero[i] = select_bytes(bytes, T::kMagicBytes, 0x4040 | i | i << 8);
  }
  DEVICE uint32_t weights(uint32_t magic_codes, int i) const { return T::multiply(T::subtract(magic_codes, zero[i]), scale[i]); }
};

template <class T, int BITS>
struct Rows<T, BITS, true> {  // bf16 cannot hold 128 + q for 8 bits: by float32, in which the product is exact, then one rounding
  float scale[4], zero[4];
  DEVICE void load_scales(const uint8_t* scales) {
    uint32_t pair[2];
    load_words(pair, scales + lane_index() / 4 * 8);
#pragma unroll
    for (int i = 0; i < 4; i++) scale[i] = i % 2 ? T::high(pair[i / 2]) : T::low(pair[i / 2]);
  }
  DEVICE void set_zeros(uint32_t bytes) {
#pragma unroll
    for (int i = 0; i < 4; i++) zero[i] = as_float(select_bytes(bytes, 0x4B000000u, 0x7440 | i));
  }
  DEVICE uint32_t weights(uint32_t low, uint32_t high, int i) const { return T::pack((as_float(low) - zero[i]) * scale[i], (as_float(high) - zero[i]) * scale[i]); }
};

// The two fragments [fragment][register] of k16 step `step` of a unit. words: int4 the lane's 4 words, int8 those of this step.
template <class T, int BITS>
DEVICE void dequantize(uint32_t (&fragments)[2][4], const uint32_t (&words)[4], int step, const Rows<T, BITS>& rows) {
#pragma unroll
  for (int f = 0; f < 2; f++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = 2 * f + i % 2;
      if constexpr (BITS == 4) {
        fragments[f][i] = rows.weights((words[2 * step + f] >> 4 * i & 0x000f000fu) | T::kMagic, row);
      } else if constexpr (T::kIsBf16) {
        const uint32_t word = words[2 * f + i / 2];
        const int byte = i % 2 * 2;
        fragments[f][i] = rows.weights(select_bytes(word, 0x4B000000u, 0x7440 | byte), select_bytes(word, 0x4B000000u, 0x7440 | (byte + 1)), row);
      } else {
        fragments[f][i] = rows.weights(select_bytes(words[2 * f + i / 2], T::kMagicBytes, i % 2 ? 0x4342 : 0x4140), row);
      }
    }
}

template <class S>
struct Sums {
  float value[2][S::kNT][4];  // fragment, eight of tokens, accumulators of m16n8
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 2 * S::kNT * 4; i++) value[i / (S::kNT * 4)][i / 4 % S::kNT][i % 4] = 0.f;
  }
};

// One stage: this warp's 32 rows and its KU units of k.
template <class S>
DEVICE void multiply_stage(const MarlinMoeGemm& a, const Derived& d, const Shared& s, int slot, int live, int k_step, Sums<S>& sums) {
  using T = typename S::Type;
  const uint8_t* weights = s.stages + slot * S::kStageBytes;
  const uint8_t* x = weights + S::kWeightBytes;
  const int warp_m = warp_index() % S::kWarpsM, warp_k = warp_index() / S::kWarpsM, lane = lane_index();
  Rows<T, S::kBits> rows;
  rows.set_zeros(0x01010101u << (S::kBits - 1));
#pragma unroll(S::kNT >= 2 ? 1 : 2)
  for (int ku = 0; ku < S::kKU; ku++) {
    const int unit = warp_k * S::kKU + ku;
    if (S::kKUnits > 4 && k_step * S::kKUnits + unit >= a.k_units) break;  // weights are padded to four units of k
    if (ku == 0 || (unit & d.group_mask) == 0) {
      const int group = (warp_m << d.groups_log2) + (unit >> d.group_shift);
      rows.load_scales(s.scales + slot * s.scale_bytes + group * 64);
      if (a.zeros) rows.set_zeros(*(const uint32_t*)(s.zeros + slot * s.scale_bytes / 2 + group * 32 + lane_index() / 4 * 4));
    }
    const uint8_t* codes = weights + (warp_m * S::kKUnits + unit) * S::kUnitBytes + lane * 16;
    uint32_t fragments[2][2][4], words[4];
    load_words(words, codes);
    dequantize<T, S::kBits>(fragments[0], words, 0, rows);
    if constexpr (S::kBits == 8) load_words(words, codes + 512);
    dequantize<T, S::kBits>(fragments[1], words, 1, rows);
    const int piece = unit * 4 + lane / 8;
    const uint8_t* matrices = x + (piece / 8 * S::kTokens + lane % 8) * 128 + (piece % 8 ^ lane % 8) * 16;
#pragma unroll
    for (int n = 0; n < S::kNT; n++) {
      if (S::kNT > 2 && n % S::kSkip == 0 && n * 8 >= live) break;
      uint32_t b[4];
      load_matrix_x4(b, matrices + n * 8 * 128);
#pragma unroll
      for (int step = 0; step < 2; step++) {
        const uint32_t half[2] = {b[2 * step], b[2 * step + 1]};
#pragma unroll
        for (int f = 0; f < 2; f++) T::mma(sums.value[f][n], fragments[step][f], half);
      }
    }
  }
}

#ifdef __CUDACC__
// The same by wgmma, on 128 rows a warpgroup. Returns with this stage's last products under way: the caller waits before it reads the sums.
template <class S, int NT>
DEVICE void multiply_stage_by_warpgroup(const MarlinMoeGemm& a, const Derived& d, const Shared& s, int slot, Sums<S>& sums) {
  using T = typename S::Type;
  const uint8_t* weights = s.stages + slot * S::kStageBytes;
  const uint64_t x = wgmma_matrix(weights + S::kWeightBytes);
  const int warp_m = warp_index();
  Rows<T, S::kBits> rows;
  rows.set_zeros(0x01010101u << (S::kBits - 1));
  uint32_t fragments[2][2][2][4];  // of the unit at hand and of the one that products still read
#pragma unroll
  for (int unit = 0; unit < S::kKU; unit++) {
    if (unit == 0 || (unit & d.group_mask) == 0) {
      const int group = (warp_m << d.groups_log2) + (unit >> d.group_shift);
      rows.load_scales(s.scales + slot * s.scale_bytes + group * 64);
      if (a.zeros) rows.set_zeros(*(const uint32_t*)(s.zeros + slot * s.scale_bytes / 2 + group * 32 + lane_index() / 4 * 4));
    }
    const uint8_t* codes = weights + (warp_m * S::kKUnits + unit) * S::kUnitBytes + lane_index() * 16;
    uint32_t words[4];
    load_words(words, codes);
    wgmma_wait<1>();  // the other fragments' products may go on
    dequantize<T, S::kBits>(fragments[unit % 2][0], words, 0, rows);
    if constexpr (S::kBits == 8) load_words(words, codes + 512);
    dequantize<T, S::kBits>(fragments[unit % 2][1], words, 1, rows);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int f = 0; f < 2; f++) {  // descriptors count 16 bytes: 64 k are a panel of 128 bytes a row, 16 k are 32 bytes
        const int k16 = 2 * unit + step;
        T::template wgmma<NT>(sums.value[f], fragments[unit % 2][step][f], x + (uint64_t)(k16 / 4 * S::kTokens * 8 + k16 % 4 * 2));
      }
    wgmma_commit();
  }
}
#endif

// ---- The end of a tile -----------------------------------------------------------------------------------------------

DEVICE float activate(const MarlinMoeGemm& a, float gate, float up) {
  const float g = fminf(gate, a.limit), u = fminf(fmaxf(up, -a.limit), a.limit);
  return g / (1.f + expf(-a.alpha * (g + a.cubic * g * g * g))) * (u + a.shift);
}

// Bias, activation and store of the warp's rows; `pairs` names the tile's rows of the output where they are scattered.
template <class S>
DEVICE void store_tile(const MarlinMoeGemm& a, const Tile& tile, const int32_t* pairs, const Sums<S>& sums) {
  using T = typename S::Type;
  const int lane = lane_index(), row_unit = tile.row_tile * S::kWarpsM + warp_index() % S::kWarpsM;
  const int half_rows = a.rows / a.halves, column = (a.halves == 2 ? 16 : 32) * row_unit + (a.halves == 2 ? 2 : 4) * (lane / 4);
  if (column >= half_rows) return;  // padding; no collective follows
  const int up = a.halves == 2 ? half_rows : 2;  // from the columns of the first fragment to those of the second
  const int width = a.activation ? half_rows : a.rows;
  float bias[4] = {0.f, 0.f, 0.f, 0.f};
  if (a.bias) {
    const uint16_t* at = (const uint16_t*)a.bias + (int64_t)tile.expert * a.rows + column;
    for (int f = 0; f < 2; f++) {
      const uint32_t pair = *(const uint32_t*)(at + f * up);
      bias[2 * f] = T::low(pair), bias[2 * f + 1] = T::high(pair);
    }
  }
#pragma unroll
  for (int n = 0; n < S::kNT; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int row = n * 8 + lane % 4 * 2 + j;
      if (row >= tile.rows) continue;
      uint16_t* out = (uint16_t*)a.out + (int64_t)(a.scatter ? pairs[row] : tile.start + row) * width + column;
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = sums.value[i / 2][n][i % 2 * 2 + j] + bias[i];
      if (a.activation) {
        *(uint32_t*)out = T::pack(activate(a, v[0], v[2]), activate(a, v[1], v[3]));
      } else if (a.halves == 2) {
        *(uint32_t*)out = T::pack(v[0], v[1]);
        *(uint32_t*)(out + up) = T::pack(v[2], v[3]);
      } else {
        store_words(out, T::pack(v[0], v[1]), T::pack(v[2], v[3]));
      }
    }
}

// Add up the warps along k, in the first of them.
template <class S>
DEVICE void add_warps(const Shared& s, Sums<S>& sums) {
  if constexpr (S::kWarpsK > 1) {
    constexpr int kStride = 32 * S::kWarpsM;
    const int warp_k = warp_index() / S::kWarpsM, place = thread_index() % kStride;
    if (warp_k > 0)
#pragma unroll
      for (int i = 0; i < 2 * S::kNT; i++) store_floats(s.sums + (((warp_k - 1) * 2 * S::kNT + i) * kStride + place) * 4, sums.value[i / S::kNT][i % S::kNT]);
    sync_block();
    if (warp_k > 0) return;
    for (int w = 0; w < S::kWarpsK - 1; w++)
#pragma unroll
      for (int i = 0; i < 2 * S::kNT; i++) {
        const float* found = s.sums + ((w * 2 * S::kNT + i) * kStride + place) * 4;
#pragma unroll
        for (int j = 0; j < 4; j++) sums.value[i / S::kNT][i % S::kNT][j] += found[j];
      }
  }
}

// Leave the sums of a shared tile; the last block to arrive takes all of them, in block order, and returns true.
template <class S>
DEVICE bool add_blocks(const MarlinMoeGemm& a, const Work& w, const Shared& s, int output, Sums<S>& sums) {
  constexpr int kStride = 32 * S::kWarpsM, kFloats = S::kRows * S::kTokens;
  const int block = (int)blockIdx.x, first = w.block_of(output * w.k_steps), last = w.block_of((output + 1) * w.k_steps - 1);
  const int place = thread_index() % kStride;
  const bool adds = thread_index() < kStride;
  float* own = a.partials + (2 * (int64_t)block + (block == first)) * kFloats;
  if (adds)
#pragma unroll
    for (int i = 0; i < 2 * S::kNT; i++) store_floats(own + (i * kStride + place) * 4, sums.value[i / S::kNT][i % S::kNT]);
  sync_block();
  if (thread_index() == 0) {
    *s.before = arrive(a.arrivals + first);
    if (*s.before == (uint32_t)(last - first)) a.arrivals[first] = 0;  // for the next launch
  }
  sync_block();
  if (*s.before != (uint32_t)(last - first)) return false;
  constexpr int kAtOnce = S::kNT < 2 ? 2 : 4;  // loads under way; more would need more registers
  if (adds)
#pragma unroll
    for (int i0 = 0; i0 < 2 * S::kNT; i0 += kAtOnce) {
      float total[kAtOnce][4] = {};
      for (int b = first; b <= last; b++) {
        const float* theirs = a.partials + (2 * (int64_t)b + (b == first)) * kFloats;
        float found[kAtOnce][4];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) load_floats_l2(found[i], theirs + ((i0 + i) * kStride + place) * 4);
#pragma unroll
        for (int i = 0; i < kAtOnce * 4; i++) total[i / 4][i % 4] += found[i / 4][i % 4];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce * 4; i++) sums.value[(i0 + i / 4) / S::kNT][(i0 + i / 4) % S::kNT][i % 4] = total[i / 4][i % 4];
    }
  return true;
}

// ---- The kernel ------------------------------------------------------------------------------------------------------

template <class S>
DEVICE void load_stage(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, Loader<S>& l, int slot) {
  if (l.unit < l.end) {
    if (l.k_step == w.k_steps) l.k_step = 0, enter_tile<S>(a, d, w, s, l);
    load_weights<S>(a, d, s, l, slot);
    load_x<S>(a, s, l, slot);
    l.unit++, l.k_step++;
  }
  cp_commit();
}

// One stage: this thread's copies of it have arrived; start those of a later one.
template <class S>
DEVICE void multiply(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, Loader<S>& l, int slot, int ahead, int done, int k_step, Sums<S>& sums) {
#ifdef __CUDACC__
  if constexpr (S::kWarpgroup) {
    publish_to_wgmma();
    sync_block();  // the products of the stage before the last are done in every warp: its place is free
    load_stage<S>(a, d, w, s, l, ahead);
    const int live = s.tiles[done % kQueue].rows;
    if (live <= 32) multiply_stage_by_warpgroup<S, 4>(a, d, s, slot, sums);
    else if (live <= 64) multiply_stage_by_warpgroup<S, 8>(a, d, s, slot, sums);
    else if (live <= 96) multiply_stage_by_warpgroup<S, 12>(a, d, s, slot, sums);
    else multiply_stage_by_warpgroup<S, 16>(a, d, s, slot, sums);
    return;
  }
#endif
  sync_block();
  load_stage<S>(a, d, w, s, l, ahead);
  multiply_stage<S>(a, d, s, slot, s.tiles[done % kQueue].rows, k_step, sums);
}

// The sums of a tile are complete in this warp.
template <class S>
DEVICE void finish() {
#ifdef __CUDACC__
  if constexpr (S::kWarpgroup) wgmma_wait<0>();
#endif
}

template <class S>
KERNEL void __launch_bounds__(S::kThreads, S::kBlocks) gemm(MarlinMoeGemm a, Derived d) {
  SMEM_DECL;
  wait_for_previous_kernel();
  allow_next_kernel();
  const Shared s = carve<S>(a, d, smem_);
  const Work w = share_work<S>(a, d.sms);
  const int block = (int)blockIdx.x;
  if (block >= w.blocks || w.units == 0) return;
  Loader<S> l;
  l.unit = w.first(block), l.end = w.first(block + 1), l.entered = 0;
  l.k_step = l.unit % w.k_steps;
  int unit = l.unit;
  if (unit < l.end) enter_tile<S>(a, d, w, s, l);
  int slot = 0, ahead = S::kAhead, done = 0;
  for (int i = 0; i < S::kAhead; i++) load_stage<S>(a, d, w, s, l, i);

  while (unit < l.end) {
    const int output = unit / w.k_steps, begin = output * w.k_steps, end = begin + w.k_steps < l.end ? begin + w.k_steps : l.end;
    const bool complete = unit == begin && end == begin + w.k_steps;
    Sums<S> sums;
    sums.clear();
    for (; unit < end; unit++) {
      cp_wait<S::kAhead - 1>();
      multiply<S>(a, d, w, s, l, slot, ahead, done, unit - begin, sums);
      slot = slot + 1 == S::kStages ? 0 : slot + 1;
      ahead = ahead + 1 == S::kStages ? 0 : ahead + 1;
    }
    finish<S>();
    const Tile tile = s.tiles[done % kQueue];
    add_warps<S>(s, sums);
    if ((complete || add_blocks<S>(a, w, s, output, sums)) && thread_index() < 32 * S::kWarpsM)
      store_tile<S>(a, tile, s.pairs + done % kQueue * S::kTokens, sums);
    done++;
  }
}

template <class S>
int launch_gemm(const MarlinMoeGemm& a, MarlinMoePlan plan, void* stream) {
  const Derived d = derive<S>(a, plan.sms);
  const Launch how = {(unsigned)marlin_moe_blocks(plan), (unsigned)S::kThreads, (size_t)carve<S>(a, d, (uint8_t*)1024).bytes, stream, plan.overlap && can_overlap()};
  return launch(how, gemm<S>, a, d);
}

template <class S>
constexpr MarlinMoeShape describe() {
  return {S::kRows, S::kTokens, S::kK, S::kThreads, S::kBlocks, S::kStages};
}

// The shapes, in the order of `config`: F(T, bits) is done with each.
template <class T, int BITS>
struct Shapes {
  static constexpr bool kFour = BITS == 4;  // int8 takes twice the shared memory for the same numbers
  using S0 = Shape<T, BITS, 1, 4, 1, 4, 4, 4>;                          // few rows in all: 32 rows, four warps along k
  using S1 = Shape<T, BITS, 4, 1, 1, 4, kFour ? 3 : 4, kFour ? 6 : 3>;  // 8 tokens
  using S2 = Shape<T, BITS, 4, 1, 2, 4, 4, kFour ? 4 : 3>;              // 16
  using S3 = Shape<T, BITS, 4, 1, 4, 4, 3, kFour ? 4 : 3>;              // 32
  using S4 = Shape<T, BITS, 4, 1, 8, 2, 4, 2>;                          // 64
  using S5 = Shape<T, BITS, 4, 1, 16, 2, 4, 2>;                         // 128
#ifdef __CUDACC__
  using S6 = Shape<T, BITS, 4, 1, 16, 2, 4, 2, true>;  // 128 by wgmma, on sm_90 alone
  using S7 = Shape<T, BITS, 8, 1, 16, 2, 6, 1, true>;  // two warpgroups share the tokens
#endif
};

template <class T, int BITS>
int dispatch(const MarlinMoeGemm& a, MarlinMoePlan plan, void* stream) {
  using All = Shapes<T, BITS>;
  switch (plan.config) {
    case 0: return launch_gemm<typename All::S0>(a, plan, stream);
    case 1: return launch_gemm<typename All::S1>(a, plan, stream);
    case 2: return launch_gemm<typename All::S2>(a, plan, stream);
    case 3: return launch_gemm<typename All::S3>(a, plan, stream);
    case 4: return launch_gemm<typename All::S4>(a, plan, stream);
#ifdef __CUDACC__
    case 6: return launch_gemm<typename All::S6>(a, plan, stream);
    case 7: return launch_gemm<typename All::S7>(a, plan, stream);
#endif
    default: return launch_gemm<typename All::S5>(a, plan, stream);
  }
}

}  // namespace

extern "C" MarlinMoeShape marlin_moe_shape(int32_t config) {
  using All = Shapes<BFloat16, 4>;
  switch (config) {
    case 0: return describe<All::S0>();
    case 1: return describe<All::S1>();
    case 2: return describe<All::S2>();
    case 3: return describe<All::S3>();
    case 4: return describe<All::S4>();
    case 5: return describe<All::S5>();
#ifdef __CUDACC__
    case 6: return describe<All::S6>();
    case 7: return describe<All::S7>();
#endif
    default: return {0, 0, 0, 0, 0, 0};
  }
}

extern "C" int32_t marlin_moe_blocks(MarlinMoePlan plan) { return plan.sms * marlin_moe_shape(plan.config).blocks_per_sm; }

extern "C" int64_t marlin_moe_partials(MarlinMoePlan plan) {
  const MarlinMoeShape shape = marlin_moe_shape(plan.config);
  return 2 * (int64_t)marlin_moe_blocks(plan) * shape.block_rows * shape.block_tokens;
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
  if (a.is_bf16) return a.bits == 4 ? dispatch<BFloat16, 4>(a, plan, stream) : dispatch<BFloat16, 8>(a, plan, stream);
  return a.bits == 4 ? dispatch<Float16, 4>(a, plan, stream) : dispatch<Float16, 8>(a, plan, stream);
}
