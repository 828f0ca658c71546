// What marlin_moe_pairs.cuh's kernels know of adapters, and of each other: the warps beside those that stream weights.
#pragma once
#include "marlin_moe_pairs.h"
#include "marlin_moe_tiles.cuh"

namespace {

constexpr int kWarps = 8, kSharers = 32 * kWarps;
constexpr int kShares = 8;                       // of A's columns: m16n8k16 has so many
constexpr int kTurn = 128, kTurnBytes = 4352;    // columns of sixteen rows of A, and of x, that are asked for together
constexpr int kFour = 4 * 512;                   // bytes of four sixteens of B, of rows by ranks, or of four pairs' s
constexpr int kHeldB = 4;                        // such fours of gate_up's B under way
constexpr int kHeldNext = 4, kNextBytes = 1024;  // of the second A, 16 rows by 32 columns
constexpr int kHeldParts = 8;                    // eights of gate_up's blocks whose parts of A act are under way
constexpr int kBeside = 113 * 1024, kAlone = 116 * 1024, kWhole = 227 * 1024;  // of a block: two fit a multiprocessor of sm_90; only one; one at most
constexpr uint32_t kNotThere = 0xffffffffu;      // a value of A x: no sum has these bits
constexpr int kFew = 2, kMany = 8;               // helpers, warps of a block beside those of weights; many: of gate_up's blocks that are alone on a multiprocessor,
constexpr int kFewRanks = 16, kAtOnce = 2 * kTurn * kShares;  // with more ranks than these, or so few columns of A that a helper asks for its share at once

template <class F, bool DOWN, bool HALF, int HELPERS>
struct Pairs {
  using Codes = F;
  using T = typename F::Type;
  static constexpr bool kDown = DOWN, kHalf = HALF, kLora = HELPERS > 0, kWide = HELPERS > kFew;
  static constexpr int kHelpers = HELPERS, kThreads = kSharers + 32 * HELPERS;
  static constexpr int kRing = kWide && !DOWN ? 5 : 4;        // stages of a warp under way
  static constexpr int kSums = kDown || kWide ? HELPERS : 1;  // of B s, one for each helper that makes some
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
  int turns;          // of A that a helper has under way, 2 or 4
  int chunks;         // gate_up: thirty-twos of the block's part of the activation
  int slots;          // down: fours of pairs that a helper has under way
  int held_b;         // fours of B in shared memory
  int held_next;      // of the second A, thirty-twos of columns
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
  s.next = s.a + (first ? (P::kWide ? P::kHelpers : 1) * d.turns * kTurnBytes : 0);
  s.b = s.next + (first ? (P::kWide ? P::kHelpers : 1) * d.held_next * kNextBytes : 0);
  s.low = s.b + (P::kLora ? d.held_b * kFour : 0);
  s.parts = (float*)(s.low + (P::kLora ? (P::kDown ? P::kHelpers * d.slots : 1) * d.low_bytes : 0));
  s.act = (uint16_t*)(s.parts + (P::kLora ? P::kSums * d.rows : 0));
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

// The columns of d summed, to sixteen rows, or added to what is there.
template <bool ADD = false>
DEVICE void store_parts(float* parts, const float (&d)[2][4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float sum = (d[0][2 * i] + d[0][2 * i + 1]) + (d[1][2 * i] + d[1][2 * i + 1]);
    sum += as_float(shuffle_xor(as_bits(sum), 1));
    sum += as_float(shuffle_xor(as_bits(sum), 2));
    if (quarter_of_lane() == 0) parts[row_of_lane() + 8 * i] = ADD ? parts[row_of_lane() + 8 * i] + sum : sum;
  }
}

// Sixteen rows of B, a lane half of one: `count` of its ranks are there.
DEVICE void load_b(uint8_t* to, const uint16_t* from, int count, int rank) { load_piece(to + lane_index() * 16, from, count, rank % 8 == 0); }

// A x of the pair by a helper: units are sixteen rows by a share of the columns, of which it takes every `stride`-th from `unit` on.
template <class P>
struct PairsShrink {
  const MarlinMoePairs& a;
  const PairsDerived& d;
  const PairsAdapter& l;
  const uint16_t *matrix, *x;
  uint8_t* turns;
  int units, stride, first, unit, rows, column, end;  // what is fetched next: of `rows` rows, this lane's first column, of those before `end`
  const uint16_t* from;

  DEVICE PairsShrink(const MarlinMoePairs& a, const PairsDerived& d, const PairsAdapter& l, uint8_t* turns, int pair, int row_block, int expert)
      : a(a), d(d), l(l), matrix(l.matrix(a.a, expert)), x((const uint16_t*)a.x + (int64_t)(pair / a.top_k) * a.k), turns(turns) {
    first = unit = P::kWide ? (warp_index() - kWarps) * d.shrinks + row_block : row_block, stride = P::kWide ? P::kHelpers * d.shrinks : d.shrinks;
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
    if (column >= end) unit += stride, enter();
  }
  DEVICE void begin() {  // all but a commit
    for (int i = 0; i < d.turns; i++) {
      if (i > 0) cp_commit();
      fetch(i);
    }
  }
  DEVICE void run(int pair) {
    int turn = 0;
    for (int done = first; done < units; done += stride) {
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

// gate_up: s of two sixteens of a pair's ranks as factors, once all of it is there. `s`, `more`: of this lane's share and ranks.
template <class T>
DEVICE void collect_two(const float* s, const float* more, uint32_t (&words)[4], uint32_t (&more_words)[4]) {
  float values[2][4];
  const float* missing;
  do {
    missing = nullptr;
    load_floats_relaxed(values[0], s), load_floats_relaxed(values[1], more);
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (as_bits(values[i / 4][i % 4]) == kNotThere) missing = (i < 4 ? s : more) + i % 4;
    if (missing) look_again(missing);
  } while (missing);
  split_s<T>(words, values[0]), split_s<T>(more_words, values[1]);
}

DEVICE const float* collected_by(const MarlinMoePairs& a, int pair) { return a.s + ((int64_t)pair * kShares + row_of_lane()) * a.width + quarter_of_lane() * 4; }

template <class T>
DEVICE void collect_s(const MarlinMoePairs& a, const PairsAdapter& l, int pair, uint8_t* low) {
  const float* s = collected_by(a, pair);
  const int tiles = sixteens(l.rank) * (1 + l.split);
  for (int tile = 0; tile < tiles; tile += 2) {
    const int other = tile + 1 < tiles ? tile + 1 : tile;
    uint32_t words[4], more[4];
    collect_two<T>(s + tile * 16, s + other * 16, words, more);
    store_words(low + tile * 512 + lane_index() * 16, words), store_words(low + other * 512 + lane_index() * 16, more);
  }
}

// Sixteen rows of gate_up's B by sixteen ranks; tiles of the gate's half come before those of the other.
DEVICE void fetch_tile(const MarlinMoePairs& a, const PairsDerived& d, const PairsAdapter& l, const uint16_t* matrix, int row_block, int tile, int rank, uint8_t* to) {
  const bool up = tile >= d.units;
  const int column = (row_block * d.units + tile - (up ? d.units : 0)) * 16 + lane_index() / 2, half = a.rows / 2, first = rank * 16 + lane_index() % 2 * 8;
  load_b(to, matrix + (int64_t)(up ? half + column : column) * l.rank + first, tile < 2 * d.units && column < half ? l.rank - first : 0, l.rank);
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
      for (int t = 0; t < 4; t++) fetch_tile(a, d, l, matrix, row_block, tile + t, rank, b + i * kFour + t * 512);
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

// The same by all helpers, an equal run of the fours each, tiles innermost, so that one needs s of few ranks. B lies where its turns of A were.
template <class P>
struct PairsExpandWide {
  const MarlinMoePairs& a;
  const PairsDerived& d;
  const PairsAdapter& l;
  const uint16_t* matrix;
  int row_block, fours, begin, end;

  DEVICE PairsExpandWide(const MarlinMoePairs& a, const PairsDerived& d, const PairsAdapter& l, int row_block, int expert)
      : a(a), d(d), l(l), matrix(l.matrix(a.b, expert)), row_block(row_block), fours((2 * d.units + 3) / 4) {
    const int all = sixteens(l.rank) * fours, helper = warp_index() - kWarps;
    begin = helper * all / P::kHelpers, end = (helper + 1) * all / P::kHelpers;
  }
  DEVICE void prefetch_b() const {  // what this helper will fetch: runs of rows
    const int half = a.rows / 2, column = row_block * (d.rows / 2), rows = half - column < d.rows / 2 ? half - column : d.rows / 2, bytes = rows * l.rank * 2;
    for (int at = ((warp_index() - kWarps) * 32 + lane_index()) * 64; at < bytes; at += P::kHelpers * 32 * 64)
      prefetch((const uint8_t*)(matrix + column * l.rank) + at), prefetch((const uint8_t*)(matrix + (int64_t)(half + column) * l.rank) + at);
  }
  DEVICE void fetch(uint8_t* b, int from) const {
#pragma unroll 1
    for (int i = 0; i < kHeldB && from + i < end; i++) {
      const int rank = (from + i) / fours, tile = (from + i - rank * fours) * 4;
#pragma unroll
      for (int t = 0; t < 4; t++) fetch_tile(a, d, l, matrix, row_block, tile + t, rank, b + i * kFour + t * 512);
    }
  }
  DEVICE void run(uint8_t* b, int pair, float* parts) const {
    const float* s = collected_by(a, pair);
    const int up = l.split * sixteens(l.rank);
    uint32_t gate[4], other[4];
    for (int i = lane_index(); i < d.rows; i += 32) parts[i] = 0.f;
    for (int at = begin, held = 0, collected = -1; at < end; at++, held = held + 1 == kHeldB ? 0 : held + 1) {
      const int rank = at / fours, tile = (at - rank * fours) * 4;
      if (held == 0) {
        sync_warp();
        fetch(b, at), cp_commit();
      }
      if (rank != collected) collect_two<typename P::T>(s + rank * 16, s + (up + rank) * 16, gate, other), collected = rank;
      if (held == 0) {
        cp_wait<0>();
        sync_warp();
      }
#pragma unroll
      for (int t = 0; t < 4; t++) {
        float sums[2][4] = {};
        uint32_t factors[4];
#pragma unroll
        for (int j = 0; j < 4; j++) factors[j] = tile + t < d.units ? gate[j] : other[j];
        multiply_b<typename P::T>(sums, b + held * kFour + t * 512, factors);
        if (tile + t < 2 * d.units) store_parts<true>(parts + (tile + t) * 16, sums);
      }
    }
  }
};

// What this block's part of the activation adds to A act: sixteen rows of A by 32 columns after another, all of them or a helper's share of the rows.
template <class P>
struct PairsNext {
  const MarlinMoePairs& a;
  const PairsDerived& d;
  const PairsAdapter& l;
  const uint16_t* matrix;  // at the block's first column
  int columns;      // of the block, without padding
  int begin, all;   // thirty-twos of columns, of one sixteen of rows after another

  DEVICE PairsNext(const MarlinMoePairs& a, const PairsDerived& d, const PairsAdapter& l, int row_block, int expert)
      : a(a), d(d), l(l), matrix(l.matrix(a.next, expert) + row_block * (d.rows / 2)), columns(a.rows / 2 - row_block * (d.rows / 2)) {
    const int tiles = sixteens(l.rank), helper = warp_index() - kWarps;
    begin = P::kWide ? helper * tiles / P::kHelpers * d.chunks : 0, all = (P::kWide ? (helper + 1) * tiles / P::kHelpers : tiles) * d.chunks;
  }
  DEVICE void fetch(uint8_t* next, int first) const {
#pragma unroll 1
    for (int i = 0; i < d.held_next && first + i < all; i++) {
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
    int tile = begin / d.chunks, chunk = 0;
    for (int first = begin; first < all; first += d.held_next) {
      if (first > begin) fetch(next, first), cp_commit(), cp_wait<0>();
      for (int i = 0; i < d.held_next && first + i < all; i++) {
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

// log2 of the helpers of down that share a four where there are few: no division, which would lie between s and its use.
template <class P>
HOST_DEVICE int sharers_log2(int fours) { return (2 * fours <= P::kHelpers) + (4 * fours <= P::kHelpers) + (8 * fours <= P::kHelpers); }

// A helper of down: some fours of the token's pairs, whose s is the sum of what gate_up's blocks have left, for sixteen ranks after another. Which ones
// is the same for all ranks, so that s is asked for before the tables are there.
template <class P>
struct PairsDown {
  static constexpr int kTiles = P::kHalf ? 1 : 2;  // sixteens of rows
  const MarlinMoePairs& a;
  const PairsDerived& d;
  const PairsAdapter& l;
  int owner, row_block, helper, fours, all, eights;  // fours of pairs; with all ranks; eights of parts
  int four_step, eight_step, eight_log2;             // which of both a helper takes
  int expert;                                        // a lane's pair's, and its weight
  float weight;
  int pair_step, part_step;  // of s
  const float* s;            // of the token's first pair
  uint8_t *b, *low;

  DEVICE PairsDown(const MarlinMoePairs& a, const PairsDerived& d, const PairsAdapter& l, const PairsShared& shared, int owner, int row_block, int part, int expert, float weight)
      : a(a), d(d), l(l), owner(owner), row_block(row_block), helper(warp_index() - kWarps), fours((a.top_k + 3) / 4), all(fours * (a.width / 16)), eights((a.parts + 7) / 8),
        expert(expert), weight(weight) {
    eight_log2 = sharers_log2<P>(all), eight_step = 1 << eight_log2, four_step = P::kHelpers >> eight_log2;
    pair_step = a.starts ? a.linear_parts * a.s_width : a.parts * a.width, part_step = a.starts ? a.tokens * pair_step : a.width;
    s = a.s + (int64_t)owner * a.top_k * pair_step + part * a.s_width;
    b = shared.b + helper * d.slots * kTiles * kFour, low = shared.low + helper * d.slots * d.low_bytes;
  }
  DEVICE int four_of(int turn) const { return (helper >> eight_log2) + turn * four_step; }
  DEVICE int first_eight() const { return helper & (eight_step - 1); }
  DEVICE uint8_t* low_of(int slot) const { return low + slot * d.low_bytes; }
  DEVICE void fetch_b(int four, int slot) const {
    if (four >= all) return;
    const int g = four / fours, first = (four - g * fours) * 4, rank = g * 16 + lane_index() % 2 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (first + i >= a.top_k) break;
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
    const uint32_t routed = warp_ballot(expert >= 0), there = g * 16 + quarter_of_lane() * 4 < (a.starts ? a.s_width : a.width) ? routed >> first : 0u;
#pragma unroll 1
    for (int i = 0; i < kHeldParts && eight < eights; i++, eight += eight_step, to += kFour, from += eight_step * 8 * part_step)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (first + j >= a.top_k) break;
        cp16(to + j * 512, from + j * pair_step, (there >> j & 1) && eight * 8 + row_of_lane() < a.parts);
      }
  }
  DEVICE void run(float* parts) const {
    float sums[kTiles][2][4] = {};
    int slot = 0;
    for (int four = four_of(0); four < all; four += four_step) {
      const int g = four / fours, first = (four - g * fours) * 4, ranks = l.rank - g * 16 - quarter_of_lane() * 4;
      float s[4][4] = {};  // a lane's column and ranks, of what it has copied itself
      if (d.slots == 1) cp_wait<0>();
      else if (d.slots == 2) cp_wait<1>();
      else if (d.slots == 3) cp_wait<2>();
      else cp_wait<3>();
      sync_warp();
      for (int eight = first_eight(); eight < eights; eight += kHeldParts * eight_step) {
        if (eight >= kHeldParts * eight_step) fetch_parts(four, eight, slot), cp_commit(), cp_wait<0>();
        const uint8_t* from = low_of(slot) + lane_index() * 16;
        for (int i = 0; i < kHeldParts && eight + i * eight_step < eights; i++, from += kFour)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            if (first + j >= a.top_k) break;
            float more[4];
            load_floats(more, (const float*)(from + j * 512));
#pragma unroll
            for (int r = 0; r < 4; r++) s[j][r] += more[r];
          }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (first + j >= a.top_k) break;
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

}  // namespace
