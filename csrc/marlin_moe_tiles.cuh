// The parts of the grouped GEMM of marlin_moe.cu: shapes of tiles, who does which, loading, arithmetic, and the end of a tile.
#pragma once
#include <math.h>

#include "hopper_prims.cuh"
#include "marlin_moe.h"

namespace {

constexpr int kMostRuns = 6;  // of rows of one adapter, whose A a stage has room for: as many as AdaptersAhead has at hand
constexpr int kQueue = 8;  // tiles between the loader and the epilogue; more than stages
constexpr int kReport = 1 << 16;  // of a tile's rows, whose own number is smaller, what is counted above it
constexpr int kNoGroups = 30;
constexpr float kNoLimit = 1e38f;  // of an activation, this or more

// ---- Shapes of tiles -------------------------------------------------------------------------------------------------

// T activation type; BITS of a weight; whether there are zero points.
template <class T, int BITS, bool ZEROS>
struct Format {
  using Type = T;
  static constexpr int kBits = BITS;
  static constexpr bool kZeros = ZEROS;
};

// WM x WK warps over rows and k; NT eights of tokens; KU units of 32 k a warp takes of each stage.
// WARPGROUP: by wgmma, with a warpgroup more that copies.
template <class F, int WM, int WK, int NT, int KU, int STAGES, int BLOCKS, bool WARPGROUP = false>
struct Shape {
  using Codes = F;
  using Type = typename F::Type;
  static constexpr bool kWarpgroup = WARPGROUP, kDraws = false;
  static constexpr int kSkip = NT <= 4 ? 1 : 4;  // eights of tokens that are computed or left out together
  static constexpr int kAhead = STAGES - 1;      // stages loaded ahead
  static constexpr int kBits = F::kBits, kWarpsM = WM, kWarpsK = WK, kNT = NT, kKU = KU, kStages = STAGES, kBlocks = BLOCKS;
  static constexpr int kThreads = 32 * WM * WK, kRows = 32 * WM, kTokens = 8 * NT, kKUnits = KU * WK, kK = 32 * kKUnits;
  static constexpr int kUnitBytes = 128 * kBits, kUnitPieces = kUnitBytes / 16, kWarpBytes = KU * kUnitBytes;
  static constexpr int kWeightBytes = WM * WK * kWarpBytes, kXBytes = kTokens * kK * 2, kStageBytes = kWeightBytes + kXBytes;
  static constexpr int kSixteens = kWarpBytes < 2048 ? 1 : 2;    // of ranks in a stage of adapters: B takes the place of weights
  static constexpr int kXPieces = kK / 8;                        // of 16 bytes in a row of x
  static constexpr int kXLoads = kTokens * kXPieces / kThreads;  // of a thread in a stage
  static constexpr int kRowStep = kThreads / kXPieces;           // rows between them
  static_assert(STAGES > 2 && STAGES < kQueue && kThreads % kXPieces == 0 && kTokens * kXPieces % kThreads == 0 && KU % 2 == 0, "uneven copies");
};

// By wgmma, a gate_up that makes s of the second projection too (marlin_moe_next.cuh): a kernel of its own, since registers are few.
template <class S>
struct Following : S {};
template <class S>
constexpr bool kFollows = false;
template <class S>
constexpr bool kFollows<Following<S>> = true;

// One tile of the output; `start` and `rows` of the sorted pairs; `index` of its tile of tokens. By wgmma -1 rows: no more tiles.
struct Tile {
  int32_t expert, row_tile, start, rows, index;
};

struct Shared {
  uint8_t *stages, *scales, *zeros;
  Tile* tiles;       // [kQueue]
  int32_t* spans;    // [kQueue][2] where tiles are drawn, first and last + 1 of the units of each that are this block's
  int32_t* pairs;    // [kQueue][tokens]
  float* sums;       // of the warps beyond the first along k
  uint32_t* before;  // arrivals before this block's, or by wgmma the next tile; two places for what is next in a queue
  int32_t* more;     // of each stage: whether it holds adapters; by wgmma, twice the sixteens of ranks, and 1 if another stage of them follows
  int32_t *runs, *open;  // marlin_moe_next.cuh: of each stage first row and end of its runs; whether the tile before has its parts
  uint64_t* barriers;
  int bytes;
};

// What the launcher derives from the arguments, so that no thread has to.
struct Derived {
  int sms;
  int row_tiles, k_steps;  // tiles of rows of a weight; stages of a tile
  int group_shift;         // units of k in a group, as a power of 2
  int groups_log2;         // groups that a warp's share of a stage touches, likewise
  int group_mask;          // a unit whose number has none of these bits begins a group
  int scale_bytes;         // of a stage
  uint32_t top_k_inverse;  // 2^32 / top_k rounded up, exact for pairs below 2^32 / top_k; 0 for top_k 1
  DEVICE int token_of(int pair) const { return top_k_inverse ? (int)multiply_high((uint32_t)pair, top_k_inverse) : pair; }
};

template <class S>
Derived derive(const MarlinMoeGemm& a, int sms) {
  const int shift = a.group_size == 0 ? kNoGroups : a.group_size == 32 ? 0 : a.group_size == 64 ? 1 : 2;
  int log2 = 0;
  while (S::kKU >> shift >> (log2 + 1)) log2++;
  return {sms, ceil_div(a.row_units, S::kWarpsM), ceil_div(a.k_units, S::kKUnits), shift, log2, (1 << shift) - 1, (S::kThreads / 32 << log2) * 64,
          a.top_k == 1 ? 0 : 0xffffffffu / (uint32_t)a.top_k + 1};
}

template <class S>
HOST_DEVICE Shared carve(const Derived& d, uint8_t* base) {
  Shared s;
  int at = 0;
  const auto take = [&](int bytes) {
    uint8_t* found = base + at;
    at += (bytes + 15) / 16 * 16;
    return found;
  };
  s.stages = take(S::kStages * S::kStageBytes);
  s.tiles = (Tile*)take(kQueue * sizeof(Tile));
  s.pairs = (int32_t*)take(kQueue * S::kTokens * 4);
  s.sums = (float*)take((S::kWarpsK - 1) * S::kRows * S::kTokens * 4);
  s.before = (uint32_t*)take(12);
  s.spans = (int32_t*)take(S::kDraws ? kQueue * 8 : 0);
  s.more = (int32_t*)take(S::kStages * 4);
  s.runs = (int32_t*)take(S::kWarpgroup ? S::kStages * kMostRuns * 8 : 0);
  s.open = (int32_t*)take(S::kWarpgroup ? 4 : 0);
  s.barriers = (uint64_t*)take(S::kWarpgroup ? 2 * S::kStages * 8 : 0);
  s.scales = take(S::kStages * d.scale_bytes);  // last: all places but those of the zeros are constants, which costs no register
  s.zeros = take(S::Codes::kZeros ? S::kStages * d.scale_bytes / 2 : 0);
  s.bytes = at;
  return s;
}

// ---- Which block does what -------------------------------------------------------------------------------------------

struct Work {
  int tiles;           // of tokens
  int k_steps;         // stages of a tile
  int blocks;          // that have work
  int outputs, units;  // tiles of the output; units = (output, stage), in that order
  int share, more;     // units of a block; the first `more` blocks have `grain` units more
  int grain;           // k_steps where blocks take whole tiles, else 1
  int whole, items;    // drawn from a queue: so many whole tiles, then halves of the others; 0 items: each block has its share
  int given = 0;       // of these, one for each block to begin with; 0: where there are many a block draws its first, too, so that one that begins late does fewer
  DEVICE int first(int block) const { return block * share + (block < more ? block : more) * grain; }
  DEVICE int block_of(int unit) const {  // where blocks share tiles
    const int larger = more * (share + 1);
    return unit < larger ? unit / (share + 1) : more + (unit - larger) / share;
  }
};

// `always`: whole tiles only. `weight`: of the time that they take against that of shares, in percent; `between`: where blocks have one or two.
DEVICE Work share_work(const MarlinMoeGemm& a, const Derived& d, bool always, int weight = 101, int between = 101) {
  Work w;
  w.tiles = a.counts[1];
  w.k_steps = d.k_steps;
  w.outputs = w.tiles * d.row_tiles, w.units = w.outputs * w.k_steps;
  // In tenths of the time that a busy multiprocessor takes for one block's stage: whole tiles, of which a multiprocessor with few blocks
  // left needs more for each; or equal shares, and what it costs to add them up.
  const int grid = (int)gridDim.x, per_sm = grid / d.sms, rest = w.outputs % grid, alone = 7 * per_sm, left = 10 * ceil_div(rest, d.sms);
  const int64_t by_tiles = (int64_t)w.k_steps * (10 * per_sm * (w.outputs / grid) + (rest == 0 ? 0 : left > alone ? left : alone));
  const bool whole = by_tiles * (w.outputs > grid && w.outputs <= 2 * grid ? between : weight) <= (10 * (int64_t)w.units / d.sms + 120) * 100 || w.k_steps == 1 || always;
  const int work = whole ? w.outputs : w.units / 2;  // at least two units for a block that shares tiles
  w.blocks = work < 1 ? 1 : work < grid ? work : grid;
  const int pieces = whole ? w.outputs : w.units;
  w.grain = whole ? w.k_steps : 1;
  w.share = pieces / w.blocks * w.grain, w.more = pieces % w.blocks;
  w.whole = 0, w.items = 0;
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

DEVICE Tile find_tile(const MarlinMoeGemm& a, const Derived& d, const Work& w, int output) {
  const int t = output / d.row_tiles;
  const int32_t* record = a.tiles + 3 * (int64_t)t;
  const int expert = record[0], start = record[1], rows = record[2];
  const int below = t > 0 ? record[-3] : -1, above = t + 1 < w.tiles ? record[3] : -1;
  if (below != expert && above != expert) return {expert, output - t * d.row_tiles, start, rows, t};
  const int first = t - same_expert(a, t, -1, w.tiles, expert), count = t - first + 1 + same_expert(a, t, 1, w.tiles, expert);
  const int place = output - first * d.row_tiles, row_tile = place / count, index = first + place - row_tile * count;
  return {expert, row_tile, a.tiles[3 * (int64_t)index + 1], a.tiles[3 * (int64_t)index + 2], index};
}

// The same in two halves for loads that are to be on their way before they are needed: lane l looks at tile t - 16 + l, so that one round of
// loads finds the tiles of most experts that have several; of experts with one the other way takes one round too, and fewer instructions.
struct Nearby {
  int expert = -1, start = 0, rows = 0;
  DEVICE void look(const MarlinMoeGemm& a, const Derived& d, const Work& w, int output) {
    const int i = output / d.row_tiles - 16 + lane_index();
    const bool inside = i >= 0 && i < w.tiles;
    const int64_t record = inside ? 3 * (int64_t)i : 0;
    expert = inside ? a.tiles[record] : -1, start = inside ? a.tiles[record + 1] : 0, rows = inside ? a.tiles[record + 2] & (kReport - 1) : 0;
  }
  DEVICE Tile find(const MarlinMoeGemm& a, const Derived& d, const Work& w, int output) const {
    const int t = output / d.row_tiles, base = t - 16, mine = (int)shuffle((uint32_t)expert, 16);
    const uint32_t others = ~warp_ballot(expert == mine);
    int below = 15 - highest_bit(others & 0xffff), above = lowest_bit(others >> 17);
    if (below == 16) below += same_expert(a, base, -1, w.tiles, mine);
    if (above < 0) above = 15 + same_expert(a, t + 15, 1, w.tiles, mine);
    const int first = t - below, count = below + 1 + above, place = output - first * d.row_tiles, row_tile = place / count, index = first + place - row_tile * count;
    if (index < base || index >= base + 32) return {mine, row_tile, a.tiles[3 * (int64_t)index + 1], a.tiles[3 * (int64_t)index + 2] & (kReport - 1), index};
    return {mine, row_tile, (int)shuffle((uint32_t)start, index - base), (int)shuffle((uint32_t)rows, index - base), index};
  }
};

// ---- Loading ---------------------------------------------------------------------------------------------------------

// Of a tile's records (sglang_lora_moe/ops/low_rank.py) those that are still to load, and the first rank of the next. last < 0: not asked for.
struct Adapters {
  int next = 0, last = -1, rank = 0;
  DEVICE void ask(const MarlinMoeGemm& a, int tile) { next = a.low_ranges[2 * tile], last = a.low_ranges[2 * tile + 1], rank = 0; }
};

// The same with the next records at hand, a field a lane, asked for a stage before they are needed; the last ones stay there.
struct AdaptersAhead : Adapters {
  static constexpr int kAtHand = 6;
  int fields = 0;
  DEVICE int base() const { return last - next > kAtHand ? next : last - kAtHand; }  // of those at hand
  DEVICE void fetch(const int64_t* records) {
    const int64_t i = 5 * (int64_t)base() + lane_index();
    fields = lane_index() < 5 * kAtHand && i >= 0 ? (int)records[i] : 0;  // what is asked for of all of them fit 32 bits
  }
  DEVICE int field(int record, int i) const { return (int)shuffle((uint32_t)fields, 5 * record + i); }
};

// Places are counted in pieces of 16 bytes, in 32 bits: up to 64 GB. Each warp loads its own weights and scales; x is the block's.
template <class S>
struct Loader {
  int unit, end;  // next unit to load, and the block's last + 1
  int k_step, entered;
  int rows;      // of the tile
  bool present;  // this warp's rows lie within the weight
  uint32_t weights, scales;  // this lane's first pieces: weights of the next stage, scales at k = 0
  uint32_t x_rows[S::kXLoads];      // its pieces of x at k = 0
  Adapters adapters;
};

// Where weights and rows of a tile begin.
template <class S>
DEVICE void place_tile(const MarlinMoeGemm& a, const Derived& d, const Shared& s, const Tile& tile, Loader<S>& l) {
  const int slot = l.entered++ % kQueue, warp = warp_index(), unit_in_expert = tile.row_tile * S::kWarpsM + warp % S::kWarpsM;
  if (thread_index() == 0) s.tiles[slot] = tile;
  l.rows = tile.rows, l.present = unit_in_expert < a.row_units;
  const int row_unit = tile.expert * a.row_units + unit_in_expert;
  l.weights = (uint32_t)((row_unit * a.k_units + (l.k_step * S::kWarpsK + warp / S::kWarpsM) * S::kKU) * S::kUnitPieces + lane_index());
  l.scales = (uint32_t)(row_unit * a.groups * 4 + lane_index());
#pragma unroll
  for (int i = 0; i < S::kXLoads; i++) {
    const int row = thread_index() / S::kXPieces + i * S::kRowStep;
    if (row >= tile.rows) continue;
    const int sorted = tile.start + row, pair = a.sorted_pairs[sorted];
    l.x_rows[i] = (uint32_t)(a.gather ? d.token_of(pair) : sorted) * (uint32_t)(a.k / 8) + thread_index() % S::kXPieces;
    if (thread_index() % S::kXPieces == 0) s.pairs[slot * S::kTokens + row] = pair;
  }
}

DEVICE const uint8_t* piece_of(const void* base, uint32_t index) { return (const uint8_t*)base + (uint64_t)index * 16; }

template <class S>
DEVICE void load_weights(const MarlinMoeGemm& a, const Derived& d, const Shared& s, Loader<S>& l, int slot) {
  const int warp = warp_index(), lane = lane_index(), unit = (l.k_step * S::kWarpsK + warp / S::kWarpsM) * S::kKU;
  const uint8_t* from = piece_of(a.packed, l.weights);
  l.weights += S::kKUnits * S::kUnitPieces;
  if ((S::kWarpsM > 4 && !l.present) || (S::kWarpsK > 1 && unit >= a.k_units)) return;  // weights are padded to four units both ways
  uint8_t* to = s.stages + slot * S::kStageBytes + warp * S::kWarpBytes + lane * 16;
#pragma unroll
  for (int i = 0; i < S::kWarpBytes; i += 512) cp16(to + i, from + i, true);
  const int group = unit >> d.group_shift;
  to = s.scales + slot * d.scale_bytes + (warp << d.groups_log2) * 64 + lane * 16;
  if (lane < 4 << d.groups_log2) cp16(to, piece_of(a.scales, l.scales + group * 4), true);
  if constexpr (S::Codes::kZeros) {
    to = s.zeros + slot * d.scale_bytes / 2 + (warp << d.groups_log2) * 32 + lane * 16;
    if (lane < 2 << d.groups_log2) cp16(to, piece_of(a.zeros, (l.scales - lane) / 2 + lane + group * 2), true);
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
    if (row < l.rows) cp16(target + row * 128 + (piece % 8 ^ row % 8) * 16, piece_of(a.x, l.x_rows[i] + l.k_step * S::kXPieces), inside);
  }
}

// Adapters are more k of the same product: behind a tile's weights come stages with 16 ranks of B, or twice 16, in the place of weights (1 KB for the
// 32 rows of a warp, as ldmatrix reads them) and of s in the place of x: by rows, first those for the first fragment's half, 64 bytes on the up half's,
// zero in the rows of other adapters. By cp.async but for ranks that do not divide by 8, which are stored.
template <class S>
DEVICE void load_adapters(const MarlinMoeGemm& a, const Tile& tile, Adapters& l, uint8_t* stage, int thread) {
  const int lane = thread % 32, half_rows = a.rows / a.halves, apart = a.halves == 2 ? half_rows : 2;
#pragma unroll 1
  for (int i = 0; i < S::kSixteens; i++) {
    int first = 0, end = 0, rank = 0, up = 0, next = l.next;
    int64_t place = 0;
    if (next < l.last) {
      const int64_t* record = a.low_records + 5 * (int64_t)next;
      first = (int)record[0] - tile.start, end = first + (int)record[1], rank = (int)record[2], up = (int)record[3] * a.low_max_rank, place = record[4];
      for (next++, record += 5; next < l.last && record[4] == place && (int)record[0] - tile.start == end; next++, record += 5) end += (int)record[1];
    }
    const bool whole_b = rank % 8 == 0, whole_s = whole_b && (a.low_width | up) % 8 == 0;
    const uint16_t* b = (const uint16_t*)a.low_pool + place * 8 + l.rank + lane % 2 * 8;
#pragma unroll
    for (int warp = thread / 32; warp < S::kWarpsM; warp += S::kThreads / 32) {
      const int unit = tile.row_tile * S::kWarpsM + warp, row = a.halves == 2 ? 16 * unit + lane / 2 : 32 * unit + lane / 4 * 4 + lane / 2 % 2;
      uint8_t* target = stage + warp * S::kWarpBytes + i * 1024 + lane / 4 * 128;
#pragma unroll
      for (int f = 0; f < 2; f++)
        load_piece(target + ((4 * f + lane % 4) ^ lane / 4) * 16, b + (int64_t)(row + f * apart) * rank, row < half_rows ? rank - l.rank - lane % 2 * 8 : 0, whole_b);
    }
    const uint16_t* s = (const uint16_t*)a.low + (int64_t)tile.start * a.low_width + l.rank;
    for (int index = thread; index < tile.rows * 2 * a.halves; index += S::kThreads) {
      const int row = index >> a.halves, half = index >> 1 & (a.halves - 1), piece = index & 1;
      load_piece(stage + S::kWeightBytes + row * 128 + ((2 * i + piece + 4 * half) ^ row % 8) * 16, s + (int64_t)row * a.low_width + half * up + piece * 8,
                 row >= first && row < end ? rank - l.rank - piece * 8 : 0, whole_s);
    }
    l.rank += 16;
    if (l.rank >= rank) l.rank = 0, l.next = next;
  }
}

// By wgmma 16 ranks of B of a block's rows are lines of 128 bytes, four rows each, swizzled, as the tensor copy engine brings them where the rank is 16;
// with halves those of gate, then those of up. Two in the place of weights, without halves two more in the half of the place of x that s leaves free.
template <class S>
constexpr int kLinesOfB = S::kRows / 4;
template <class S>
DEVICE uint8_t* place_of_b(uint8_t* stage, int sixteen) {
  static_assert(!S::kWarpgroup || (S::kTokens >= 2 * kLinesOfB<S> && S::kWeightBytes >= 256 * kLinesOfB<S>), "B of a block's rows fits half of the place of x");
  return stage + (sixteen >= 2 ? S::kWeightBytes + S::kTokens * 128 : 0) + sixteen % 2 * kLinesOfB<S> * 128;
}

// Blocks of a multiprocessor that registers are shared among: no more than fit its memory, which before Hopper is 164 KB at most.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class S>
constexpr int kResident = S::kBlocks * S::kStages * S::kStageBytes <= 164 * 1024 ? S::kBlocks : 164 * 1024 / (S::kStages * S::kStageBytes);
#else
template <class S>
constexpr int kResident = S::kBlocks;
#endif

// ---- Arithmetic ------------------------------------------------------------------------------------------------------

// Scales and zeros of a lane's four rows (2 * fragment + half), as its format wants them. Weights come out times 1 / kGrowth.
// In general: a code in the low bits of a number whose last place is 1, minus that number and the zero point, times the scale.
template <class F, bool WIDE = F::Type::kIsBf16 && F::kBits == 8>
struct Rows {
  using T = typename F::Type;
  static constexpr float kGrowth = 1.f;
  DEVICE static uint32_t shrink(uint32_t pair) { return pair; }  // by kGrowth, as weights are
  uint32_t scale[4], zero[4];                                    // both halves of a word alike
  DEVICE void load_scales(const uint8_t* scales) {
    uint32_t pair[2];
    load_words(pair, scales + lane_index() / 4 * 8);
#pragma unroll
    for (int i = 0; i < 4; i++) scale[i] = i % 2 ? double_high(pair[i / 2]) : double_low(pair[i / 2]);
  }
  DEVICE void set_zeros(uint32_t bytes) {
#pragma unroll
    for (int i = 0; i < 4; i++) zero[i] = select_bytes(bytes, T::kMagicBytes, 0x4040 | i | i << 8);
  }
  DEVICE uint32_t weights(uint32_t magic_codes, int i) const { return T::multiply(T::subtract(magic_codes, zero[i]), scale[i]); }
};

template <class F>
struct Rows<F, true> {  // bf16 cannot hold 128 + q for 8 bits: by float32, in which the product is exact, then one rounding
  using T = typename F::Type;
  static constexpr float kGrowth = 1.f;
  DEVICE static uint32_t shrink(uint32_t pair) { return pair; }
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

// Symmetric int4 in bf16: a code in the lower or upper nibble of a half's low byte is, as it stands, the subnormal number q * 2^-133 or q * 2^-129.
// One fused multiply-add with s * 2^101 or s * 2^97 and -8 s * 2^-32 gives (q - 8) * s * 2^-32, rounded once as (q - 8) * s would be. The power keeps
// the factors finite up to scales of 2^27 and the weights normal down to 2^-94.
template <>
struct Rows<Format<BFloat16, 4, false>, false> {
  static constexpr float kGrowth = 4294967296.f;
  DEVICE static uint32_t shrink(uint32_t pair) { return multiply_bf16(pair, 0x2F802F80u); }
  uint32_t scale[4], offset[4];
  DEVICE void load_scales(const uint8_t* scales) {
    uint32_t pair[2];
    load_words(pair, scales + lane_index() / 4 * 8);
#pragma unroll
    for (int f = 0; f < 2; f++) {
      const uint32_t factor = multiply_bf16(pair[f], 0x70007200u), shift = multiply_bf16(pair[f], 0xB100B100u);
      scale[2 * f] = double_low(factor), scale[2 * f + 1] = double_high(factor);
      offset[2 * f] = double_low(shift), offset[2 * f + 1] = double_high(shift);
    }
  }
  DEVICE void set_zeros(uint32_t) {}
  DEVICE uint32_t weights(uint32_t codes, int i) const { return fma_bf16(codes, scale[i], offset[i]); }
};

// The rows' scales and zeros of local group `group` of this warp's share of a stage.
template <class S>
DEVICE void load_group(const Derived& d, const Shared& s, int slot, int group, Rows<typename S::Codes>& rows) {
  const int place = (warp_index() << d.groups_log2) + (kFollows<S> ? anew(group) : group);  // or each unit's would be kept: registers
  rows.load_scales(s.scales + slot * d.scale_bytes + place * 64);
  if constexpr (S::Codes::kZeros) rows.set_zeros(*(const uint32_t*)(s.zeros + slot * d.scale_bytes / 2 + place * 32 + lane_index() / 4 * 4));
}

// The two fragments [fragment][register] of k16 step `step` of a unit. words: int4 the lane's 4 words, int8 those of this step.
template <class F>
DEVICE void dequantize_step(uint32_t (&fragments)[2][4], const uint32_t (&words)[4], int step, const Rows<F>& rows) {
  using T = typename F::Type;
#pragma unroll
  for (int f = 0; f < 2; f++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = 2 * f + i % 2;
      if constexpr (F::kBits == 4 && T::kIsBf16 && !F::kZeros) {
        fragments[f][i] = rows.weights((i < 2 ? words[2 * step + f] : words[2 * step + f] >> 8) & (i % 2 ? 0x00f000f0u : 0x000f000fu), row);
      } else if constexpr (F::kBits == 4) {
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
}

// A unit of this warp's share of a stage; fragments [k16 step][fragment][register].
template <class S>
struct Unit {
  uint32_t words[S::kBits / 4][4];
  DEVICE void load(const Shared& s, int slot, int unit) {
    const uint8_t* codes = s.stages + slot * S::kStageBytes + warp_index() * S::kWarpBytes + unit * S::kUnitBytes + lane_index() * 16;
#pragma unroll
    for (int i = 0; i < S::kBits / 4; i++) load_words(words[i], codes + 512 * i);
  }
  DEVICE void dequantize(uint32_t (&fragments)[2][2][4], const Rows<typename S::Codes>& rows) const {
#pragma unroll
    for (int step = 0; step < 2; step++) dequantize_step<typename S::Codes>(fragments[step], words[S::kBits == 8 ? step : 0], step, rows);
  }
};

template <class S>
struct Sums {
  float value[2][S::kNT][4];  // fragment, eight of tokens, accumulators of m16n8
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 2 * S::kNT * 4; i++) value[i / (S::kNT * 4)][i / 4 % S::kNT][i % 4] = 0.f;
  }
};

// One stage: this warp's 32 rows and its KU units of k, for the first LIVE eights of tokens. ONE: within one group.
template <class S, int LIVE, bool ONE>
DEVICE void multiply_stage(const Derived& d, const Shared& s, int slot, Sums<S>& sums) {
  using T = typename S::Type;
  const int lane = lane_index(), panel = warp_index() / S::kWarpsM * (S::kKU / 2);  // 64 k are a panel of 128 bytes a row
  const uint8_t* x = s.stages + slot * S::kStageBytes + S::kWeightBytes + panel * S::kTokens * 128 + lane % 8 * 128;
  const int piece = (lane / 8 ^ lane % 8) * 16;
  Rows<typename S::Codes> rows;
  rows.set_zeros(0x01010101u << (S::kBits - 1));
#pragma unroll(S::kNT < 8 ? S::kKU : 1)  // more would spill
  for (int unit = 0; unit < S::kKU; unit++) {
    if (unit == 0 || (!ONE && (unit & d.group_mask) == 0)) load_group<S>(d, s, slot, unit >> d.group_shift, rows);
    Unit<S> codes;
    codes.load(s, slot, unit);
    uint32_t fragments[2][2][4];
    codes.dequantize(fragments, rows);
    const uint8_t* matrices = x + unit / 2 * S::kTokens * 128 + (unit % 2 ? piece ^ 64 : piece);
#pragma unroll
    for (int n = 0; n < LIVE; n++) {
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

// The same with as few eights of tokens as hold `live` rows.
template <class S, int LIVE = S::kSkip>
DEVICE void multiply_live(const Derived& d, const Shared& s, int slot, int live, Sums<S>& sums) {
  if constexpr (LIVE < S::kNT) {
    if (live > 8 * LIVE) return multiply_live<S, LIVE + S::kSkip>(d, s, slot, live, sums);
  }
  constexpr bool kBoth = S::kNT < (S::Codes::kZeros ? 2 : 4);  // more copies would spill
  if (kBoth && d.groups_log2 == 0) multiply_stage<S, LIVE, kBoth>(d, s, slot, sums);
  else multiply_stage<S, LIVE, false>(d, s, slot, sums);
}

// 16 ranks of this warp's rows of B, or twice 16, as fragments of weights [sixteen][fragment][register].
template <class S>
DEVICE void load_adapter_fragments(const Shared& s, int slot, uint32_t (&fragments)[2][2][4]) {
  const int lane = lane_index();
  const uint8_t* rows = s.stages + slot * S::kStageBytes + warp_index() * S::kWarpBytes + lane % 8 * 128;
#pragma unroll
  for (int i = 0; i < 2 * S::kSixteens; i++) {
    uint32_t(&fragment)[4] = fragments[i / 2][i % 2];
    load_matrix_x4(fragment, rows + i / 2 * 1024 + ((4 * (i % 2) + lane / 8 % 2 * 2 + lane / 16) ^ lane % 8) * 16);
#pragma unroll
    for (int j = 0; j < 4; j++) fragment[j] = Rows<typename S::Codes>::shrink(fragment[j]);
  }
}

// The same by wgmma: two sixteens from the first-th of the stage on. A lane's rows are two neighbours of every four, or with halves of both halves.
template <class S>
DEVICE void load_lines_of_b(const Shared& s, int slot, int first, bool halves, uint32_t (&fragments)[2][2][4]) {
  const int i = lane_index() % 8, piece = lane_index() / 8 % 2 * 2 + lane_index() / 16, warp = warp_index();
  const int line = halves ? 4 * warp + i / 2 : 8 * warp + i, place = line * 128 + ((halves ? i % 2 * 4 + piece : piece) ^ line % 8) * 16;
  const uint8_t* lines = place_of_b<S>(s.stages + slot * S::kStageBytes, first);
#pragma unroll
  for (int n = 0; n < 4; n++) {
    uint32_t(&fragment)[4] = fragments[n / 2][n % 2];
    load_matrix_x4(fragment, lines + n / 2 * kLinesOfB<S> * 128 + (n % 2 == 0 ? place : halves ? place + kLinesOfB<S> * 64 : place ^ 64));
#pragma unroll
    for (int j = 0; j < 4; j++) fragment[j] = Rows<typename S::Codes>::shrink(fragment[j]);
  }
}

// One stage of adapters, `sixteens` times 16 ranks, by the first warps along k.
template <class S>
DEVICE void multiply_adapters(const MarlinMoeGemm& a, const Shared& s, int slot, int live, Sums<S>& sums, int sixteens = S::kSixteens) {
  using T = typename S::Type;
  if (S::kWarpsK > 1 && warp_index() >= S::kWarpsM) return;
  const int lane = lane_index(), piece = (lane / 8 ^ lane % 8) * 16;
  const uint8_t* matrices = s.stages + slot * S::kStageBytes + S::kWeightBytes + lane % 8 * 128;
  uint32_t fragments[2][2][4];
  load_adapter_fragments<S>(s, slot, fragments);
#pragma unroll
  for (int n = 0; n < S::kNT; n++) {
    if (n * 8 >= live) break;
    uint32_t low[2][4];
    load_matrix_x4(low[0], matrices + n * 1024 + piece);
    load_matrix_x4(low[1], matrices + n * 1024 + (a.halves == 2 ? piece ^ 64 : piece));
#pragma unroll
    for (int i = 0; i < 2 * S::kSixteens; i++) {
      if (i / 2 >= sixteens) break;
      const uint32_t half[2] = {low[i % 2][i / 2 * 2], low[i % 2][i / 2 * 2 + 1]};
      T::mma(sums.value[i % 2][n], fragments[i / 2][i % 2], half);
    }
  }
}

// Stages of the kernel by wgmma: the copying warp and the multiplying warps pass them to and fro.
template <class S>
struct Stages {
  Barrier *full, *empty;
  int slot = 0, parity = 0;  // of the stage at hand: what `full` turns to when it is there
  DEVICE void wait() const {
    barrier_wait(full + slot, parity);
    publish_to_wgmma();
  }
  DEVICE void advance() {
    slot++;
    if (slot == S::kStages) slot = 0, parity ^= 1;
  }
};

// What a multiplying warp has ready for the stage at hand: the first unit.
template <class S>
struct Ready {
  Rows<typename S::Codes> rows;
  uint32_t fragments[2][2][2][4];  // of the unit at hand and of the one that products still read

  DEVICE void begin(const Derived& d, const Shared& s, const Stages<S>& stages) {
    stages.wait();
    Unit<S> codes;
    codes.load(s, stages.slot, 0);
    load_group<S>(d, s, stages.slot, 0, rows);
    codes.dequantize(fragments[0], rows);
  }
};

// One stage by wgmma, on 128 rows a warpgroup. The next one of the tile, if there is one, begins behind the last products: none may be under way across
// a branch, or the compiler makes all of them wait for each other. ADAPTERS: so many times 16 ranks, two a part; the up half's s lie `apart` 16 bytes on.
template <class S, bool ADAPTERS, int NT>
DEVICE void multiply_stage_by_warpgroup(const Derived& d, const Shared& s, int apart, int sixteens, bool begin_next, Stages<S>& stages, Ready<S>& ready, Sums<S>& sums) {
  using T = typename S::Type;
  const int slot = stages.slot;
  const uint64_t x = wgmma_matrix(s.stages + slot * S::kStageBytes + S::kWeightBytes);
  const auto multiply = [&](const uint32_t (&fragments)[2][2][4], const auto& place) {  // descriptors count 16 bytes
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int f = 0; f < 2; f++) T::template wgmma<NT>(sums.value[f], fragments[step][f], x + (uint64_t)place(step, f));
    wgmma_commit();
  };
  if constexpr (ADAPTERS) {
    for (int part = 0; 2 * part < sixteens; part++) {
      load_lines_of_b<S>(s, slot, 2 * part, apart > 0, ready.fragments[1]);
      if (2 * part + 1 < sixteens) {
        multiply(ready.fragments[1], [=](int step, int f) { return 4 * part + 2 * step + f * apart; });
        wgmma_wait<0>();
      } else {
        wgmma_begin();
#pragma unroll
        for (int f = 0; f < 2; f++) T::template wgmma<NT>(sums.value[f], ready.fragments[1][0][f], x + (uint64_t)(4 * part + f * apart));
        wgmma_commit();
        wgmma_wait<0>();
      }
    }
  } else {
#pragma unroll
    for (int unit = 0; unit < S::kKU; unit++) {
      Unit<S> codes;
      if (unit + 1 < S::kKU) codes.load(s, slot, unit + 1);
      multiply(ready.fragments[unit % 2], [=](int step, int) {  // 64 k are a panel of 128 bytes a row, 16 k are 32 bytes
        const int k16 = 2 * unit + step;
        return k16 / 4 * S::kTokens * 8 + k16 % 4 * 2;
      });
      wgmma_wait<1>();  // the other fragments are free
      if (unit + 1 < S::kKU) {
        if (((unit + 1) & d.group_mask) == 0) load_group<S>(d, s, slot, (unit + 1) >> d.group_shift, ready.rows);
        codes.dequantize(ready.fragments[(unit + 1) % 2], ready.rows);
      }
    }
  }
  stages.advance();
  if (begin_next) {
    ready.begin(d, s, stages);
    hold_here(ready.fragments[0]);  // not behind the wait
  }
  wgmma_wait<0>();
  sync_warp();  // behind all that its lanes read of this stage and of the tile before
  if (lane_index() == 0) barrier_arrive(stages.empty + slot);
}

// With as many columns as hold `live` rows, of the widths that are built: eights of columns, ascending. Below 32 dequantization takes longer than products.
template <class S, bool ADAPTERS, int NT, int... WIDER>
DEVICE void multiply_by_width(const Derived& d, const Shared& s, int live, int apart, int sixteens, bool begin_next, Stages<S>& stages, Ready<S>& ready, Sums<S>& sums) {
  if constexpr (sizeof...(WIDER) > 0) {
    if (live > 8 * NT) return multiply_by_width<S, ADAPTERS, WIDER...>(d, s, live, apart, sixteens, begin_next, stages, ready, sums);
  }
  multiply_stage_by_warpgroup<S, ADAPTERS, NT>(d, s, apart, sixteens, begin_next, stages, ready, sums);
}

template <class S, bool ADAPTERS>
DEVICE void multiply_by_warpgroup(const Derived& d, const Shared& s, int live, int apart, int sixteens, bool begin_next, Stages<S>& stages, Ready<S>& ready, Sums<S>& sums) {
  multiply_by_width<S, ADAPTERS, 4, 6, 8, 9, 10, 12, 14, 16, 17, S::kNT>(d, s, live, apart, sixteens, begin_next, stages, ready, sums);
}

// ---- The end of a tile -----------------------------------------------------------------------------------------------

// PLAIN: g * sigmoid(g) * u. slope = -alpha * log2(e)
template <bool PLAIN, class Arguments>
DEVICE float activate(const Arguments& a, float slope, float gate, float up) {
  if constexpr (PLAIN) return gate * reciprocal(1.f + exp2_of(slope * gate)) * up;
  const float g = fminf(gate, a.limit), u = fminf(fmaxf(up, -a.limit), a.limit);
  return g * reciprocal(1.f + exp2_of(slope * (g + a.cubic * g * g * g))) * (u + a.shift);
}

// Where a lane's outputs lie: two neighbouring columns of each fragment; those of the second are `up` columns on.
struct Columns {
  int first, up, half_rows;
  bool present;  // or padding
  template <class S>
  DEVICE static Columns of(const MarlinMoeGemm& a, const Tile& tile) {
    const int row_unit = tile.row_tile * S::kWarpsM + warp_index() % S::kWarpsM, half_rows = a.rows / a.halves;
    const int first = (a.halves == 2 ? 16 : 32) * row_unit + (a.halves == 2 ? 2 : 4) * (lane_index() / 4);
    return {first, a.halves == 2 ? half_rows : 2, half_rows, first < half_rows};
  }
};

// What becomes of a sum on its way to the output.
enum class End { kSum, kHalves, kActivation, kPlain };

// Bias, activation and store of the warp's rows.
template <class S, End END>
DEVICE void store_rows(const MarlinMoeGemm& a, const Tile& tile, const int32_t* pairs, const Sums<S>& sums) {
  using T = typename S::Type;
  constexpr float growth = Rows<typename S::Codes>::kGrowth;
  const Columns c = Columns::of<S>(a, tile);
  if (!c.present) return;  // no collective follows
  const int width = END >= End::kActivation ? c.half_rows : a.rows;
  const float slope = -1.4426950408889634f * a.alpha;
  float bias[4] = {0.f, 0.f, 0.f, 0.f};
  if (END != End::kPlain && a.bias) {
    const uint16_t* at = (const uint16_t*)a.bias + (int64_t)tile.expert * a.rows + c.first;
    for (int f = 0; f < 2; f++) {
      const uint32_t pair = *(const uint32_t*)(at + f * c.up);
      bias[2 * f] = T::low(pair), bias[2 * f + 1] = T::high(pair);
    }
  }
  uint16_t* first = (uint16_t*)a.out + (a.scatter ? 0 : (int64_t)tile.start * width) + c.first;
  const uint32_t row_pieces = (uint32_t)width / 8;  // of 16 bytes
#pragma unroll
  for (int n = 0; n < S::kNT; n++) {
    if (n * 8 >= tile.rows) break;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int row = n * 8 + lane_index() % 4 * 2 + j;
      uint16_t* out = first + (uint64_t)((uint32_t)(a.scatter ? pairs[row] : row) * row_pieces) * 8;
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = sums.value[i / 2][n][i % 2 * 2 + j] * growth + bias[i];
      const bool present = row < tile.rows;
      if constexpr (END >= End::kActivation) {
        const uint32_t pair = T::pack(activate<END == End::kPlain>(a, slope, v[0], v[2]), activate<END == End::kPlain>(a, slope, v[1], v[3]));
        if (present) *(uint32_t*)out = pair;
      } else {
        const uint32_t low = T::pack(v[0], v[1]), high = T::pack(v[2], v[3]);
        if (END == End::kSum && present) store_words(out, low, high);
        if (END == End::kHalves && present) *(uint32_t*)out = low, *(uint32_t*)(out + c.up) = high;
      }
    }
  }
}

// The complete sums of a tile to the output; `pairs` names the tile's rows of it where they are scattered.
template <class S>
DEVICE void store_tile(const MarlinMoeGemm& a, const Tile& tile, const int32_t* pairs, const Sums<S>& sums) {
  if (!a.activation && a.halves == 1) store_rows<S, End::kSum>(a, tile, pairs, sums);
  else if (!a.activation) store_rows<S, End::kHalves>(a, tile, pairs, sums);
  else if (a.bias || a.cubic != 0.f || a.shift != 0.f || a.limit < kNoLimit) store_rows<S, End::kActivation>(a, tile, pairs, sums);
  else store_rows<S, End::kPlain>(a, tile, pairs, sums);
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

// Leave the sums of a shared tile; the last block to arrive takes all of them, in order, and returns true. `second`: of two halves that are drawn;
// these have places of their own, blocks with shares two each, of which the tile's first takes its second.
template <class S>
DEVICE bool add_blocks(const MarlinMoeGemm& a, const Work& w, const Shared& s, int output, Sums<S>& sums, bool second = false) {
  constexpr int kStride = 32 * S::kWarpsM, kFloats = S::kRows * S::kTokens;
  const bool halves = S::kDraws && w.items > 0;
  const int first = halves ? 2 * (output - w.whole) : w.block_of(output * w.k_steps), last = halves ? first + 1 : w.block_of((output + 1) * w.k_steps - 1);
  const int block = halves ? first + second : (int)blockIdx.x;
  const int place = thread_index() % kStride;
  const bool adds = thread_index() < kStride;
  float* own = a.partials + (halves ? (int64_t)block : 2 * (int64_t)block + (block == first)) * kFloats;
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
        const float* theirs = a.partials + (halves ? (int64_t)b : 2 * (int64_t)b + (b == first)) * kFloats;
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

}  // namespace
