// The kernel of marlin_moe_pairs.h. Eight warps stream weights, each its share of k through a ring of its own; nothing but the end of a block needs a
// barrier. With adapters, which are instances of their own, two more warps add them beside it, on tensor cores and through shared memory alone.
//   * gate_up: a block is some row units of one pair, its eight warps divide k. down: a block is the 32 or 16 rows of a token that its warps
//     multiply by all its experts, one after another, so that the router's weights are applied here too.
//   * Products are m16n8k16 with x in every column; for 16 rows the two halves of a warp hold different k, and so do columns 0 and 1.
//   * All of an adapter is asked for before most weights, which memory answers in turn: its places before the kernel before has ended, A, B and the next
//     A as soon as the experts are known; down's B is brought into L2 beside gate_up's weights and asked for before its own.
//   * A x is sixteen rows and an eighth of the columns at a time, by the pair's first blocks; all its blocks find each value once it is there, before
//     weights are through. These few blocks wait for each other, later ones for earlier ones: a GPU starts them in order. down empties these values again.
//   * B s has what is to be summed side by side in the eight columns: the eighths of A x, and in down the parts of A act that gate_up's blocks have left.
//     s is two factors there, rounded and what that left.
#pragma once
#include "marlin_moe_pairs.h"
#include "marlin_moe_tiles.cuh"

namespace {

constexpr int kWarps = 8, kHelpers = 2, kSharers = 32 * kWarps, kRing = 4;
constexpr int kShares = 8;                       // of A's columns: m16n8k16 has so many
constexpr int kTurn = 128, kTurnBytes = 4352;    // columns of sixteen rows of A, and of x, that are asked for together
constexpr int kFour = 4 * 512;                   // bytes of four sixteens of B, of rows by ranks, or of four pairs' s
constexpr int kHeldB = 4;                        // such fours of gate_up's B under way
constexpr int kHeldNext = 4, kNextBytes = 1024;  // of the second A, 16 rows by 32 columns
constexpr int kHeldParts = 8;                    // eights of gate_up's blocks whose parts of A act are under way
constexpr int kBeside = 113 * 1024, kAlone = 116 * 1024;  // of a block of which a multiprocessor of sm_90 has two, and one
constexpr uint32_t kNotThere = 0xffffffffu;      // a value of A x: no sum has these bits

template <class F, bool DOWN, bool HALF, bool LORA>
struct Pairs {
  using Codes = F;
  using T = typename F::Type;
  static constexpr bool kDown = DOWN, kHalf = HALF, kLora = LORA;
  static constexpr int kThreads = kSharers + (LORA ? 32 * kHelpers : 0);
  static constexpr int kUnits = 16 / F::kBits, kUnitBytes = 128 * F::kBits, kWeightBytes = kUnits * kUnitBytes;
  static constexpr int kSpan = HALF ? 2 * kUnits : kUnits, kXBytes = 64 * kSpan;  // units of k of a stage
};

struct PairsDerived {
  int blocks;   // of a pair (gate_up) or a token (down)
  int shrinks;  // of a pair's first blocks that share its A x
  int units;    // of rows of a block
  int steps;    // stages along k
  int group_shift, groups_log2, group_mask;  // as in Derived
  int stage_bytes, ring_bytes;               // of one stage; of all
  int rows;           // of a block
  int columns;        // of a share of A, whole turns
  int turns;          // of A under way, 2 or 4
  int chunks;         // gate_up: thirty-twos of the block's part of the activation
  int slots;          // down: fours of pairs that a helper has under way
  int held_b;         // fours of B in shared memory
  int low_bytes;      // of gate_up's s, or of the parts of four pairs' s of down
};

struct PairsShared {
  uint8_t *ring, *a, *b, *next, *low;  // of the weights; of A; of B; of the second A; of s or its parts
  float *sums, *parts;                 // of the warps; B s of the block's rows
  uint16_t* act;                       // the block's part of the activation
  int bytes;
};

template <class P>
HOST_DEVICE PairsShared carve_pairs(const PairsDerived& d, uint8_t* base) {
  PairsShared s;
  const bool first = P::kLora && !P::kDown;
  s.ring = base;
  s.sums = (float*)(base + d.ring_bytes);
  s.a = (uint8_t*)(s.sums + d.units * kWarps * 32);
  s.next = s.a + (first ? d.turns * kTurnBytes : 0);
  s.b = s.next + (first ? kHeldNext * kNextBytes : 0);
  s.low = s.b + (P::kLora ? d.held_b * kFour : 0);
  s.parts = (float*)(s.low + (P::kLora ? (P::kDown ? kHelpers * d.slots : 1) * d.low_bytes : 0));
  s.act = (uint16_t*)(s.parts + (P::kLora ? (P::kDown ? kHelpers : 1) * d.rows : 0));
  s.bytes = (int)((uint8_t*)(s.act + (first ? 32 * d.chunks : 0)) - base);
  return s;
}

// ---- Adapters --------------------------------------------------------------------------------------------------------

HOST_DEVICE int sixteens(int rank) { return (rank + 15) / 16; }

// What a slot's tables say of one projection.
struct PairsAdapter {
  int rank = 0, split = 0;
  float scaling = 0.f;
  int64_t place = 0, stride = 0;
  DEVICE void find(const MarlinMoeTable& t, int slot) {
    if (slot < 0) return;
    rank = t.rank[slot], split = t.split ? t.split[slot] : 0, scaling = t.scaling ? t.scaling[slot] : 0.f, place = t.offset[slot], stride = t.stride ? t.stride[slot] : 0;
  }
  DEVICE const uint16_t* matrix(const MarlinMoeTable& t, int expert) const { return (const uint16_t*)t.pool + place + expert * stride; }
};

// The owner's slot, -1: no adapter.
template <class P>
DEVICE int slot_of(const MarlinMoePairs& a, int owner) {
  const int slot = a.slots[P::kDown ? owner : owner / a.top_k];
  return slot < a.num_slots ? slot : -1;
}

// The expert of the owner's j-th pair, -1: none.
template <class P>
DEVICE int expert_of(const MarlinMoePairs& a, int owner, int j) {
  const int expert = a.topk_ids[P::kDown ? owner * a.top_k + j : owner];
  return expert >= 0 && expert < a.experts ? expert : -1;
}

// A lane's place in m16n8k16: row (and the one eight below) of the first factor, column of the second; and which quarter of what is summed, whose
// order is free as long as both factors have the same.
DEVICE int row_of_lane() { return lane_index() / 4; }
DEVICE int quarter_of_lane() { return lane_index() % 4; }

// d += 16 rows by 32 columns at `rows`, 64 bytes each, times the same 32 values in every column.
template <class T>
DEVICE void multiply_step(float (&d)[2][4], const uint8_t* rows, const uint8_t* values) {
  uint32_t upper[4], lower[4], x[4];
  load_words(upper, rows + lane_index() * 16), load_words(lower, rows + 512 + lane_index() * 16), load_words(x, values + quarter_of_lane() * 16);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t a[4] = {upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]}, b[2] = {x[2 * i], x[2 * i + 1]};
    T::mma(d[i], a, b);
  }
}

// Of equal columns: the first lane of four has its row, the second the one eight below; others nothing.
DEVICE int row_of_sum() { return quarter_of_lane() < 2 ? row_of_lane() + 8 * quarter_of_lane() : -1; }
DEVICE float sum_of_row(const float (&d)[2][4]) { return quarter_of_lane() == 0 ? d[0][0] + d[1][0] : d[0][2] + d[1][2]; }

// Four ranks of s in a column as factors: rounded, and what that left.
template <class T>
DEVICE void split_s(uint32_t (&words)[4], const float (&s)[4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    words[i] = T::pack(s[2 * i], s[2 * i + 1]);
    words[2 + i] = T::pack(s[2 * i] - T::low(words[i]), s[2 * i + 1] - T::high(words[i]));
  }
}

// d += 16 rows by 16 ranks of B times s, by its two factors apart.
template <class T>
DEVICE void multiply_b(float (&d)[2][4], const uint8_t* b, const uint32_t (&s)[4]) {
  uint32_t upper[2], lower[2];
  b += row_of_lane() * 32 + quarter_of_lane() * 8;
  load_words(upper, b), load_words(lower, b + 256);
  const uint32_t a[4] = {upper[0], lower[0], upper[1], lower[1]};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t factor[2] = {s[2 * i], s[2 * i + 1]};
    T::mma(d[i], a, factor);
  }
}

// The columns of d summed, to sixteen rows.
DEVICE void store_parts(float* parts, const float (&d)[2][4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float sum = (d[0][2 * i] + d[0][2 * i + 1]) + (d[1][2 * i] + d[1][2 * i + 1]);
    sum += as_float(shuffle_xor(as_bits(sum), 1));
    sum += as_float(shuffle_xor(as_bits(sum), 2));
    if (quarter_of_lane() == 0) parts[row_of_lane() + 8 * i] = sum;
  }
}

// Sixteen rows of B, a lane half of one: `count` of its ranks are there.
DEVICE void load_b(uint8_t* to, const uint16_t* from, int count, int rank) { load_piece(to + lane_index() * 16, from, count, rank % 8 == 0); }

// A x of the pair by the first helper: units are sixteen rows by a share of the columns, of which this block takes every `shrinks`-th.
template <class P>
struct PairsShrink {
  const MarlinMoePairs& a;
  const PairsDerived& d;
  const PairsAdapter& l;
  const uint16_t *matrix, *x;
  uint8_t* turns;
  int units, unit, rows, column, end;  // what is fetched next: of `rows` rows, this lane's first column, of those before `end`
  const uint16_t* from;

  DEVICE PairsShrink(const MarlinMoePairs& a, const PairsDerived& d, const PairsAdapter& l, uint8_t* turns, int pair, int row_block, int expert)
      : a(a), d(d), l(l), matrix(l.matrix(a.a, expert)), x((const uint16_t*)a.x + (int64_t)(pair / a.top_k) * a.k), turns(turns), unit(row_block) {
    units = row_block < d.shrinks ? sixteens(l.rank) * (1 + l.split) * kShares : 0;
    enter();
  }
  DEVICE void enter() {
    const int tile = unit / kShares, half = tile >= sixteens(l.rank), first = (tile - half * sixteens(l.rank)) * 16;
    rows = l.rank - first, column = unit % kShares * d.columns, end = column + d.columns, column += quarter_of_lane() * 8;
    from = matrix + (int64_t)(half * l.rank + first + row_of_lane()) * a.k + column;
  }
  DEVICE void fetch(int turn) {
    if (unit >= units) return;
    uint8_t* to = turns + turn * kTurnBytes + lane_index() * 16;
#pragma unroll
    for (int i = 0; i < kTurn / 32; i++) {
      const bool inside = column + 32 * i < a.k;
      cp16(to + i * 1024, from + 32 * i, inside && row_of_lane() < rows), cp16(to + i * 1024 + 512, from + 8 * a.k + 32 * i, inside && row_of_lane() + 8 < rows);
    }
    const int piece = column + (lane_index() - quarter_of_lane()) * 8;  // of x
    if (lane_index() < kTurn / 8) cp16(to + kTurn / 32 * 1024, x + piece, piece < a.k);
    from += kTurn, column += kTurn;
    if (column >= end) unit += d.shrinks, enter();
  }
  DEVICE void begin() {  // all but a commit
    for (int i = 0; i < d.turns; i++) {
      if (i > 0) cp_commit();
      fetch(i);
    }
  }
  DEVICE void run(int pair, int row_block) {
    int turn = 0;
    for (int done = row_block; done < units; done += d.shrinks) {
      float sums[2][4] = {};
      for (int i = 0; i < d.columns; i += kTurn) {
        const uint8_t* there = turns + turn * kTurnBytes;
        if (d.turns == 2) cp_wait<1>();
        else cp_wait<3>();
        sync_warp();
#pragma unroll
        for (int step = 0; step < kTurn / 32; step++) multiply_step<typename P::T>(sums, there + step * 1024, there + kTurn / 32 * 1024 + step * 64);
        sync_warp();
        fetch(turn), cp_commit();
        turn = turn + 1 == d.turns ? 0 : turn + 1;
      }
      float* s = a.s + ((int64_t)pair * kShares + done % kShares) * a.width + done / kShares * 16;
      if (row_of_sum() >= 0) store_relaxed(s + row_of_sum(), sum_of_row(sums) * l.scaling);
    }
  }
};

// gate_up: s of the pair as factors, each value once it is there.
template <class T>
DEVICE void collect_s(const MarlinMoePairs& a, const PairsAdapter& l, int pair, uint8_t* low) {
  const float* s = a.s + ((int64_t)pair * kShares + row_of_lane()) * a.width + quarter_of_lane() * 4;
  for (int tile = 0; tile < sixteens(l.rank) * (1 + l.split); tile++) {
    float values[4];
    const float* missing;
    do {
      missing = nullptr;
      load_floats_relaxed(values, s + tile * 16);
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (as_bits(values[i]) == kNotThere) missing = s + tile * 16 + i;
      if (missing) look_again(missing);
    } while (missing);
    uint32_t words[4];
    split_s<T>(words, values);
    store_words(low + tile * 512 + lane_index() * 16, words);
  }
}

// gate_up's B s by the second helper: four times sixteen rows at once, of the gate, then of the up half, by sixteens of ranks.
template <class P>
struct PairsExpand {
  const MarlinMoePairs& a;
  const PairsDerived& d;
  const PairsAdapter& l;
  const uint16_t* matrix;
  int row_block, ranks, tiles, tile, rank;  // sixteens of ranks, of rows; what is fetched next

  DEVICE PairsExpand(const MarlinMoePairs& a, const PairsDerived& d, const PairsAdapter& l, int row_block, int expert)
      : a(a), d(d), l(l), matrix(l.matrix(a.b, expert)), row_block(row_block), ranks(sixteens(l.rank)), tiles(2 * d.units), tile(0), rank(0) {}
  DEVICE void fetch(uint8_t* b) {
#pragma unroll 1
    for (int i = 0; i < d.held_b && tile < tiles; i++) {
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const bool up = tile + t >= d.units;
        const int column = (row_block * d.units + tile + t - (up ? d.units : 0)) * 16 + lane_index() / 2, half = a.rows / 2, first = rank * 16 + lane_index() % 2 * 8;
        load_b(b + i * kFour + t * 512, matrix + (int64_t)(up ? half + column : column) * l.rank + first, tile + t < tiles && column < half ? l.rank - first : 0, l.rank);
      }
      if (++rank == ranks) rank = 0, tile += 4;
    }
  }
  DEVICE void run(uint8_t* b, const uint8_t* low, float* parts) {
    float sums[4][2][4] = {};
    for (int from = 0, g = 0; from < tiles;) {
      cp_wait<0>();
      sync_warp();
      for (int i = 0; i < d.held_b && from < tiles; i++) {
        uint32_t gate[4], up[4];
        load_words(gate, low + g * 512 + lane_index() * 16), load_words(up, low + (l.split * ranks + g) * 512 + lane_index() * 16);
#pragma unroll
        for (int t = 0; t < 4; t++) {
          uint32_t s[4];
#pragma unroll
          for (int j = 0; j < 4; j++) s[j] = from + t < d.units ? gate[j] : up[j];
          multiply_b<typename P::T>(sums[t], b + i * kFour + t * 512, s);
        }
        if (++g < ranks) continue;
#pragma unroll
        for (int t = 0; t < 4; t++) {
          if (from + t < tiles) store_parts(parts + (from + t) * 16, sums[t]);
#pragma unroll
          for (int j = 0; j < 8; j++) sums[t][j / 4][j % 4] = 0.f;
        }
        g = 0, from += 4;
      }
      if (from >= tiles) break;
      sync_warp();
      fetch(b), cp_commit();
    }
  }
};

// What this block's part of the activation adds to A act: sixteen rows of A by 32 columns after another.
template <class P>
struct PairsNext {
  const MarlinMoePairs& a;
  const PairsDerived& d;
  const PairsAdapter& l;
  const uint16_t* matrix;  // at the block's first column
  int columns, all;        // of the block, without padding

  DEVICE PairsNext(const MarlinMoePairs& a, const PairsDerived& d, const PairsAdapter& l, int row_block, int expert)
      : a(a), d(d), l(l), matrix(l.matrix(a.next, expert) + row_block * (d.rows / 2)), columns(a.rows / 2 - row_block * (d.rows / 2)), all(sixteens(l.rank) * d.chunks) {}
  DEVICE void fetch(uint8_t* next, int first) const {
#pragma unroll 1
    for (int i = 0; i < kHeldNext && first + i < all; i++) {
      const int tile = (first + i) / d.chunks, row = tile * 16 + row_of_lane(), column = (first + i - tile * d.chunks) * 32 + quarter_of_lane() * 8;
      const uint16_t* from = matrix + (int64_t)row * (a.rows / 2) + column;
      const bool inside = column < columns && column < d.rows / 2;
      uint8_t* to = next + i * kNextBytes + lane_index() * 16;
      cp16(to, from, inside && row < l.rank), cp16(to + 512, from + 8 * (a.rows / 2), inside && row + 8 < l.rank);
    }
  }
  DEVICE void run(uint8_t* next, const uint16_t* act, int owner, int row_block) const {
    float* s = a.other_s + ((int64_t)owner * d.blocks + row_block) * a.next_width;
    float sums[2][4] = {};
    int tile = 0, chunk = 0;
    for (int first = 0; first < all; first += kHeldNext) {
      if (first > 0) fetch(next, first), cp_commit(), cp_wait<0>();
      for (int i = 0; i < kHeldNext && first + i < all; i++) {
        multiply_step<typename P::T>(sums, next + i * kNextBytes, (const uint8_t*)(act + chunk * 32));
        if (++chunk < d.chunks) continue;
        if (row_of_sum() >= 0) s[tile * 16 + row_of_sum()] = sum_of_row(sums) * l.scaling;
        chunk = 0, tile++;
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j / 4][j % 4] = 0.f;
      }
    }
  }
};

// A helper of down: every second four of the token's pairs, whose s is the sum of what gate_up's blocks have left, for sixteen ranks after another.
template <class P>
struct PairsDown {
  static constexpr int kTiles = P::kHalf ? 1 : 2;  // sixteens of rows
  const MarlinMoePairs& a;
  const PairsDerived& d;
  const PairsAdapter& l;
  int owner, row_block, helper, fours, all, eights;  // fours of pairs; with all ranks; eights of parts
  int four_step, eight_step;                         // which of both a helper takes: every second four, or where there is one, every second eight
  int expert;                                        // a lane's pair's, and its weight
  float weight;
  int pair_step, part_step;  // of s
  const float* s;            // of the token's first pair
  uint8_t *b, *low;

  DEVICE PairsDown(const MarlinMoePairs& a, const PairsDerived& d, const PairsAdapter& l, const PairsShared& shared, int owner, int row_block, int part, int expert, float weight)
      : a(a), d(d), l(l), owner(owner), row_block(row_block), helper(warp_index() - kWarps), fours((a.top_k + 3) / 4), all(fours * sixteens(l.rank)), eights((a.parts + 7) / 8),
        expert(expert), weight(weight) {
    four_step = all == 1 ? 1 : kHelpers, eight_step = all == 1 ? kHelpers : 1;
    pair_step = a.starts ? a.linear_parts * a.s_width : a.parts * a.width, part_step = a.starts ? a.tokens * pair_step : a.width;
    s = a.s + (int64_t)owner * a.top_k * pair_step + part * a.s_width;
    b = shared.b + helper * d.slots * kTiles * kFour, low = shared.low + helper * d.slots * d.low_bytes;
  }
  DEVICE int four_of(int turn) const { return (all == 1 ? 0 : helper) + turn * four_step; }
  DEVICE int first_eight() const { return all == 1 ? helper : 0; }
  DEVICE uint8_t* low_of(int slot) const { return low + slot * d.low_bytes; }
  DEVICE void fetch_b(int four, int slot) const {
    if (four >= all) return;
    const int g = four / fours, first = (four - g * fours) * 4, rank = g * 16 + lane_index() % 2 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int chosen = (int)shuffle((uint32_t)expert, (first + i) % 32);
      const uint16_t* matrix = l.matrix(a.b, chosen < 0 ? 0 : chosen);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        const int row = row_block * d.rows + tile * 16 + lane_index() / 2;
        load_b(b + (slot * kTiles + tile) * kFour + i * 512, matrix + (int64_t)row * l.rank + rank, row < a.rows && chosen >= 0 ? l.rank - rank : 0, l.rank);
      }
    }
  }
  DEVICE void fetch_parts(int four, int eight, int slot) const {
    if (four >= all) return;
    const int g = four / fours, first = (four - g * fours) * 4;
    uint8_t* to = low_of(slot) + lane_index() * 16;
    const float* from = s + first * pair_step + (eight * 8 + row_of_lane()) * part_step + g * 16 + quarter_of_lane() * 4;
    const uint32_t routed = warp_ballot(expert >= 0), there = g * 16 + quarter_of_lane() * 4 < l.rank ? routed >> first : 0u;
#pragma unroll 1
    for (int i = 0; i < kHeldParts && eight < eights; i++, eight += eight_step, to += kFour, from += eight_step * 8 * part_step)
#pragma unroll
      for (int j = 0; j < 4; j++) cp16(to + j * 512, from + j * pair_step, (there >> j & 1) && eight * 8 + row_of_lane() < a.parts);
  }
  DEVICE void run(float* parts) const {
    float sums[kTiles][2][4] = {};
    int slot = 0;
    for (int four = four_of(0); four < all; four += four_step) {
      float s[4][4] = {};  // a lane's column and ranks, of what it has copied itself
      if (d.slots == 1) cp_wait<0>();
      else cp_wait<1>();
      sync_warp();
      for (int eight = first_eight(); eight < eights; eight += kHeldParts * eight_step) {
        if (eight >= kHeldParts * eight_step) fetch_parts(four, eight, slot), cp_commit(), cp_wait<0>();
        const uint8_t* from = low_of(slot) + lane_index() * 16;
        for (int i = 0; i < kHeldParts && eight + i * eight_step < eights; i++, from += kFour)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            float more[4];
            load_floats(more, (const float*)(from + j * 512));
#pragma unroll
            for (int r = 0; r < 4; r++) s[j][r] += more[r];
          }
      }
      const int g = four / fours, first = (four - g * fours) * 4, ranks = l.rank - g * 16 - quarter_of_lane() * 4;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float factor = as_float(shuffle(as_bits(weight), (first + j) % 32));
#pragma unroll
        for (int r = 0; r < 4; r++) s[j][r] = r < ranks ? s[j][r] * factor : 0.f;
        uint32_t words[4];
        split_s<typename P::T>(words, s[j]);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) multiply_b<typename P::T>(sums[tile], b + (slot * kTiles + tile) * kFour + j * 512, words);
      }
      sync_warp();
      fetch_b(four + d.slots * four_step, slot), fetch_parts(four + d.slots * four_step, first_eight(), slot), cp_commit();
      slot = slot + 1 == d.slots ? 0 : slot + 1;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) store_parts(parts + helper * d.rows + tile * 16, sums[tile]);
  }
};

// ---- The base --------------------------------------------------------------------------------------------------------

// A warp's stages in order: `outer` is a row unit (gate_up) or one of the token's pairs (down), `step` a stage along k.
struct Walk {
  int outer, step, first, last;
  DEVICE void advance() {
    if (++step == last) step = first, outer++;
  }
};

// Where the walk's weights begin: of this lane, at k = 0.
template <class P>
struct PairsSource {
  const uint8_t *weights, *scales, *zeros, *x;
  int upper;     // units by which this lane's k is ahead of the stage's
  int upper_scales;  // the same of its piece of the scales, and of the zeros
  int upper_zeros;
  bool present;

  DEVICE void enter(const MarlinMoePairs& a, const PairsDerived& d, int owner, int row_block, int outer) {
    const int lane = lane_index(), expert = expert_of<P>(a, owner, outer), half = row_block & 1;
    const int row_unit = (expert < 0 ? 0 : expert) * a.row_units + (P::kDown ? (P::kHalf ? row_block / 2 : row_block) : row_block * d.units + outer);
    present = expert >= 0;
    upper = P::kHalf ? lane / 16 * P::kUnits : 0, upper_scales = P::kHalf ? (lane >> 1 & 1) * P::kUnits : 0, upper_zeros = P::kHalf ? (lane & 1) * P::kUnits : 0;
    weights = (const uint8_t*)a.packed + ((int64_t)row_unit * a.k_units + upper) * P::kUnitBytes + (P::kHalf ? half * 256 + lane % 16 * 16 : lane * 16);
    scales = (const uint8_t*)a.scales + (int64_t)row_unit * a.groups * 64 + (P::kHalf ? (lane >> 2) * 64 + half * 32 + (lane & 1) * 16 : lane * 16);
    if (P::Codes::kZeros) zeros = a.zeros + (int64_t)row_unit * a.groups * 32 + (P::kHalf ? (lane >> 1) * 32 + half * 16 : lane * 16);
    x = (const uint8_t*)a.x + ((int64_t)(P::kDown ? owner * a.top_k + outer : owner / a.top_k) * a.k + lane * 8) * 2;
  }
  DEVICE void load_weights(const MarlinMoePairs& a, const PairsDerived& d, uint8_t* stage, int step) const {
    const int lane = lane_index(), unit = step * P::kSpan;
    const uint8_t* from = weights + (int64_t)unit * P::kUnitBytes;
    const bool inside = present && unit + upper < a.k_units;
#pragma unroll
    for (int i = 0; i < P::kWeightBytes; i += 512) cp16(stage + i + lane * 16, from + i, inside);
    stage += P::kWeightBytes + P::kXBytes;
    if (lane < 4 << d.groups_log2) cp16(stage + lane * 16, scales + ((unit + upper_scales) >> d.group_shift) * 64, present && unit + upper_scales < a.k_units);
    if constexpr (P::Codes::kZeros) {
      stage += 64 << d.groups_log2;
      if (lane < 2 << d.groups_log2) cp16(stage + lane * 16, zeros + ((unit + upper_zeros) >> d.group_shift) * 32, present && unit + upper_zeros < a.k_units);
    }
  }
  DEVICE void load_x(const MarlinMoePairs& a, uint8_t* stage, int step) const {
    const int lane = lane_index(), k = step * P::kSpan * 32;
    if (lane < P::kXBytes / 16) cp16(stage + P::kWeightBytes + lane * 16, x + k * 2, present && k + lane * 8 < a.k);
  }
};

// One stage: products of this warp's rows, column 0 (and 1). ONE: within one group.
template <class P, bool ONE>
DEVICE void multiply_pairs_stage(const PairsDerived& d, const uint8_t* stage, float (&sums)[2][2][4]) {
  using T = typename P::T;
  constexpr int kWords = P::Codes::kBits / 4;
  const int lane = lane_index(), column = P::kHalf && lane % 8 != 0 ? P::kUnits * 64 : 0;
  const uint8_t *x = stage + P::kWeightBytes + column + lane / 8 * 16, *scales = stage + P::kWeightBytes + P::kXBytes, *zeros = scales + (64 << d.groups_log2) + lane / 4 * 4;
  Rows<typename P::Codes> rows;
  rows.set_zeros(0x01010101u << (P::Codes::kBits - 1));
  uint32_t words[P::kUnits][kWords][4], b[P::kUnits][4];
#pragma unroll
  for (int unit = 0; unit < P::kUnits; unit++) {
    load_matrix_x4(b[unit], x + unit * 64);
#pragma unroll
    for (int i = 0; i < kWords; i++) load_words(words[unit][i], stage + unit * P::kUnitBytes + 512 * i + lane * 16);
  }
#pragma unroll
  for (int unit = 0; unit < P::kUnits; unit++) {
    if (unit == 0 || (!ONE && (unit & d.group_mask) == 0)) {
      rows.load_scales(scales + (unit >> d.group_shift) * 64);
      if constexpr (P::Codes::kZeros) rows.set_zeros(*(const uint32_t*)(zeros + (unit >> d.group_shift) * 32));
    }
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t fragments[2][4];
      dequantize_step<typename P::Codes>(fragments, words[unit][P::Codes::kBits == 8 ? step : 0], step, rows);
      const uint32_t half[2] = {b[unit][2 * step], b[unit][2 * step + 1]};
#pragma unroll
      for (int f = 0; f < 2; f++) T::mma(sums[step][f], fragments[f], half);
    }
  }
}

// The sums of this lane's four rows, places 4 * (lane / 4) on; of 16 rows in the first lanes. Clears them.
template <class P>
DEVICE void take_sums(float (&sums)[2][2][4], float (&rows)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = i % 2 * 2;
    float value = sums[0][i / 2][at] + sums[1][i / 2][at];
    if constexpr (P::kHalf) {
      value = lane_index() < 16 ? value : sums[0][i / 2][at + 1] + sums[1][i / 2][at + 1];
      value += as_float(shuffle_xor(as_bits(value), 16));
    }
    rows[i] = value * Rows<typename P::Codes>::kGrowth;
  }
#pragma unroll
  for (int i = 0; i < 16; i++) sums[i / 8][i / 4 % 2][i % 4] = 0.f;
}

// A warp's share of the block's weights; its sums to shared memory.
template <class P>
DEVICE void stream_weights(const MarlinMoePairs& a, const PairsDerived& d, const PairsShared& shared, int owner, int row_block) {
  const int warp = warp_index(), lane = lane_index();
  Walk walk;
  int left, per_outer;
  if constexpr (P::kDown) {
    const int all = a.top_k * d.steps, begin = warp * all / kWarps;
    left = (warp + 1) * all / kWarps - begin, per_outer = d.steps;
    walk = {begin / d.steps, begin % d.steps, 0, d.steps};
  } else {
    const int units = a.row_units - row_block * d.units;
    walk = {0, warp * d.steps / kWarps, warp * d.steps / kWarps, (warp + 1) * d.steps / kWarps};
    per_outer = walk.last - walk.first;
    left = expert_of<P>(a, owner, 0) < 0 ? 0 : per_outer * (units < d.units ? units : d.units);
  }
  uint8_t* const ring = shared.ring + warp * (d.ring_bytes / kWarps);
  PairsSource<P> source;
  Walk ahead = walk;
  int to_load = left;
  const auto load = [&](int slot, bool weights, bool x) {
    if (to_load > 0) {
      if (ahead.step == ahead.first || to_load == left) source.enter(a, d, owner, row_block, ahead.outer);
      if (weights) source.load_weights(a, d, ring + slot * d.stage_bytes, ahead.step);
      if (x) source.load_x(a, ring + slot * d.stage_bytes, ahead.step);
      ahead.advance(), to_load--;
    }
  };
#pragma unroll 1
  for (int i = 0; i < kRing; i++) load(i, true, !P::kDown), cp_commit();
  if constexpr (P::kDown) {
    wait_for_previous_kernel();
    ahead = walk, to_load = left;
#pragma unroll 1
    for (int i = 0; i < kRing; i++) load(i, false, true), cp_commit();
  }
  float sums[2][2][4] = {}, rows[4], total[4] = {};
  const bool writes = lane % 4 == 0 && (!P::kHalf || lane < 16);
  if (!P::kDown && per_outer == 0 && lane < 8) {  // fewer stages than warps
    const float none[4] = {};
    for (int i = 0; i < d.units; i++) store_floats(shared.sums + (i * kWarps + warp) * 32 + lane * 4, none);
  }
  for (int slot = 0; left > 0; slot = slot + 1 == kRing ? 0 : slot + 1) {
    cp_wait<kRing - 1>();
    sync_warp();
    if (d.groups_log2 == 0) multiply_pairs_stage<P, true>(d, ring + slot * d.stage_bytes, sums);
    else multiply_pairs_stage<P, false>(d, ring + slot * d.stage_bytes, sums);
    sync_warp();
    load(slot, true, true);
    cp_commit();
    const int outer = walk.outer;
    walk.advance(), left--;
    if (walk.outer == outer && left > 0) continue;
    take_sums<P>(sums, rows);
    if constexpr (P::kDown) {
      const float weight = a.topk_weights[owner * a.top_k + outer];
#pragma unroll
      for (int i = 0; i < 4; i++) total[i] += weight * rows[i];
    } else if (writes) {
      store_floats(shared.sums + (outer * kWarps + warp) * 32 + lane, rows);
    }
  }
  if (P::kDown && writes) store_floats(shared.sums + warp * 32 + lane, total);
}

// The sum of all warps at a place of a row unit, and B s of that row.
template <class P>
DEVICE float row_sum(const PairsShared& shared, int rows, int unit, int place, int local) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) sum += shared.sums[(unit * kWarps + w) * 32 + place];
  if (P::kLora) sum += shared.parts[local];
  if (P::kLora && P::kDown) sum += shared.parts[rows + local];
  return sum;
}

// Blocks of a multiprocessor that registers are shared among; before Hopper two do not fit where zero points take some too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kResidentPairs = 1;
#else
constexpr int kResidentPairs = 2;
#endif

// A helper until weights are through: parts = B s. `next` is the second A's adapter for gate_up's first one.
template <class P>
DEVICE void adapt(const MarlinMoePairs& a, const PairsDerived& d, const PairsShared& shared, int owner, int row_block, int slot, const PairsAdapter& next) {
  const int helper = warp_index() - kWarps;
  PairsAdapter l;
  if constexpr (P::kDown) {
    const int lane = lane_index(), expert = lane < a.top_k ? expert_of<P>(a, owner, lane) : -1;
    float weight = lane < a.top_k ? a.topk_weights[owner * a.top_k + lane] : 0.f;
    int part = 0;
    if (a.starts) {
      const int first = lane < a.linear_parts ? a.starts[lane] : 0x7fffffff;
      part = count_bits(warp_ballot(first <= row_block * d.rows)) - 1;
      l.find(a.b, slot < 0 ? -1 : part * a.part_stride + slot);
      l.place -= (int64_t)(int)shuffle((uint32_t)first, part) * l.rank, weight *= l.scaling;  // B's rows are counted from the part's first
    } else {
      l.find(a.b, slot);
    }
    const PairsDown<P> down(a, d, l, shared, owner, row_block, part, expert, weight);
    for (int i = 0; i < d.slots; i++) down.fetch_b(down.four_of(i), i);
    wait_for_previous_kernel();
    for (int i = 0; i < d.slots; i++) down.fetch_parts(down.four_of(i), down.first_eight(), i), cp_commit();
    for (int at = ((int)blockIdx.x * kHelpers + helper) * 32 + lane_index(); at < a.exchanged; at += (int)gridDim.x * kHelpers * 32) a.other_s[at] = as_float(kNotThere);
    down.run(shared.parts);
  } else if (helper == 0) {
    l.find(a.a, slot);
    wait_for_previous_kernel();
    const int expert = expert_of<P>(a, owner, 0);
    if (expert < 0) return;
    PairsShrink<P> shrink(a, d, l, shared.a, owner, row_block, expert);
    shrink.begin();
    if (next.rank > 0) PairsNext<P>(a, d, next, row_block, expert).fetch(shared.next, 0);
    cp_commit();
    shrink.run(owner, row_block);
  } else {
    PairsAdapter then;
    l.find(a.b, slot), then.find(a.then, slot);
    wait_for_previous_kernel();
    const int expert = expert_of<P>(a, owner, 0);
    const bool adapts = l.rank > 0 && expert >= 0;
    PairsExpand<P> expand(a, d, l, row_block, expert < 0 ? 0 : expert);
    if (adapts) expand.fetch(shared.b), cp_commit();
    if (then.rank > 0 && expert >= 0) {
      const uint8_t* matrix = (const uint8_t*)then.matrix(a.then, expert);
      for (int at = (row_block * 32 + lane_index()) * 128; at < a.k * then.rank * 2; at += d.blocks * 32 * 128) prefetch(matrix + at);
    }
    if (adapts) collect_s<typename P::T>(a, l, owner, shared.low), expand.run(shared.b, shared.low, shared.parts);
    for (int at = lane_index(); !adapts && at < d.rows; at += 32) shared.parts[at] = 0.f;
  }
  cp_wait<0>();
}

template <class P>
KERNEL void __launch_bounds__(P::kThreads, kResidentPairs) pairs_gemm(MarlinMoePairs a, PairsDerived d) {
  SMEM_DECL;
  using T = typename P::T;
  const PairsShared shared = carve_pairs<P>(d, smem_);
  const int owner = (int)blockIdx.x / d.blocks, row_block = (int)blockIdx.x - owner * d.blocks, i = thread_index(), half = a.rows / 2;
  PairsAdapter next;
  if (P::kLora && warp_index() >= kWarps) {
    const int slot = slot_of<P>(a, owner);
    if (!P::kDown && warp_index() == kWarps) next.find(a.next, slot);
    allow_next_kernel();
    adapt<P>(a, d, shared, owner, row_block, slot, next);
  } else {
    if (!P::kDown) wait_for_previous_kernel();
    allow_next_kernel();
    stream_weights<P>(a, d, shared, owner, row_block);
  }
  const int expert = P::kDown ? 0 : expert_of<P>(a, owner, 0);
  sync_block();

  const uint16_t* bias = (const uint16_t*)a.bias;
  if constexpr (P::kDown) {
    const int row = row_block * d.rows + i;
    if (i >= d.rows || row >= a.rows) return;
    float value = row_sum<P>(shared, d.rows, 0, i, i);
    if (bias)
      for (int j = 0; j < a.top_k; j++) {
        const int chosen = expert_of<P>(a, owner, j);
        if (chosen >= 0) value += a.topk_weights[owner * a.top_k + j] * T::low(bias[(int64_t)chosen * a.rows + row]);
      }
    ((uint16_t*)a.out)[(int64_t)owner * a.rows + row] = (uint16_t)T::pack(value, 0.f);
  } else {
    const int column = row_block * (d.rows / 2) + i, place = 4 * (i % 16 / 2) + i % 2;
    uint32_t act = 0;
    if (i < d.rows / 2 && column < half && expert >= 0) {
      float gate = row_sum<P>(shared, d.rows, i / 16, place, i), up = row_sum<P>(shared, d.rows, i / 16, place + 2, d.rows / 2 + i);
      if (bias) gate += T::low(bias[(int64_t)expert * a.rows + column]), up += T::low(bias[(int64_t)expert * a.rows + half + column]);
      act = T::pack(activate<false>(a, -1.4426950408889634f * a.alpha, gate, up), 0.f);
      ((uint16_t*)a.out)[(int64_t)owner * half + column] = (uint16_t)act;
    }
    if constexpr (P::kLora) {
      if (i < 32 * d.chunks) shared.act[i] = (uint16_t)act;
      sync_block();
      if (warp_index() == kWarps && next.rank > 0 && expert >= 0) PairsNext<P>(a, d, next, row_block, expert).run(shared.next, shared.act, owner, row_block);
    }
  }
}

template <class P>
PairsDerived derive_pairs(const MarlinMoePairs& a, MarlinMoePairsPlan plan) {
  PairsDerived d;
  const int shift = a.group_size == 0 ? kNoGroups : a.group_size == 32 ? 0 : a.group_size == 64 ? 1 : 2;
  d.units = plan.units < 1 ? 1 : plan.units;
  d.blocks = P::kHalf ? 2 * a.row_units : ceil_div(a.row_units, d.units);
  d.shrinks = plan.shrinks < d.blocks ? plan.shrinks : d.blocks;
  d.steps = ceil_div(a.k_units, P::kSpan);
  d.group_shift = shift, d.group_mask = (1 << shift) - 1, d.groups_log2 = 0;
  while (P::kUnits >> shift >> (d.groups_log2 + 1)) d.groups_log2++;
  d.stage_bytes = P::kWeightBytes + P::kXBytes + (64 << d.groups_log2) + (P::Codes::kZeros ? 32 << d.groups_log2 : 0);
  const int most = P::kDown ? ceil_div(a.top_k * d.steps, kWarps) : ceil_div(d.steps, kWarps) * d.units;  // stages of a warp
  d.ring_bytes = kWarps * (most < kRing ? most : kRing) * d.stage_bytes;
  d.rows = P::kHalf ? 16 : 32 * d.units;
  d.columns = ceil_div(ceil_div(a.k, kShares), kTurn) * kTurn, d.chunks = ceil_div(d.rows, 64);
  const int ranks = a.width / 16, fours = P::kDown ? ceil_div(a.top_k, 4) * ranks : ceil_div(2 * d.units, 4) * ranks;
  d.slots = fours > kHelpers ? 2 : 1;
  d.held_b = P::kDown ? kHelpers * d.slots * d.rows / 16 : fours < kHeldB ? fours : kHeldB;
  const int eights = ceil_div(ceil_div(a.parts, 8), fours == 1 ? kHelpers : 1);
  d.low_bytes = P::kDown ? (eights < kHeldParts ? eights : kHeldParts) * kFour : ranks * 512;
  d.turns = 4;
  if (carve_pairs<P>(d, (uint8_t*)1024).bytes > kBeside) d.turns = 2;
  return d;
}

template <class P>
int launch_pairs(const MarlinMoePairs& a, MarlinMoePairsPlan plan, void* stream) {
  const PairsDerived d = derive_pairs<P>(a, plan);
  const int owners = a.tokens * (P::kDown ? 1 : a.top_k);
  const int bytes = carve_pairs<P>(d, (uint8_t*)1024).bytes, least = plan.alone ? kAlone : 0;
  const Launch how = {(unsigned)(d.blocks * owners), (unsigned)P::kThreads, (size_t)(bytes < least ? least : bytes), stream,
                      plan.overlap && can_overlap()};
  return launch_together(how, pairs_gemm<P>, a, d);
}

template <class F, bool LORA>
int dispatch_pairs_kernel(const MarlinMoePairs& a, MarlinMoePairsPlan plan, void* stream) {
  if (a.topk_weights == nullptr) return launch_pairs<Pairs<F, false, false, LORA>>(a, plan, stream);
  if (plan.units > 0) return launch_pairs<Pairs<F, true, false, LORA>>(a, plan, stream);
  return launch_pairs<Pairs<F, true, true, LORA>>(a, plan, stream);
}

template <class F>
int dispatch_pairs(const MarlinMoePairs& a, MarlinMoePairsPlan plan, void* stream) {
  return a.slots ? dispatch_pairs_kernel<F, true>(a, plan, stream) : dispatch_pairs_kernel<F, false>(a, plan, stream);
}

template <int BITS>
int dispatch_pairs_type(const MarlinMoePairs& a, MarlinMoePairsPlan plan, void* stream) {
  if (a.is_bf16) {
    if (a.zeros) return dispatch_pairs<Format<BFloat16, BITS, true>>(a, plan, stream);
    return dispatch_pairs<Format<BFloat16, BITS, false>>(a, plan, stream);
  }
  if (a.zeros) return dispatch_pairs<Format<Float16, BITS, true>>(a, plan, stream);
  return dispatch_pairs<Format<Float16, BITS, false>>(a, plan, stream);
}

}  // namespace
