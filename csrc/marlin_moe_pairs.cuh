// The kernel of marlin_moe_pairs.h. Eight warps stream weights, each its share of k through a ring of its own; a ninth hands on A x. Nothing but the
// end of a block and adapters need a barrier.
//   * gate_up: a block is some row units of one pair, its eight warps divide k. down: a block is the 32 or 16 rows of a token that its warps
//     multiply by all its experts, one after another, so that the router's weights are applied here too.
//   * Products are m16n8k16 with x in every column; for 16 rows the two halves of a warp hold different k, and so do columns 0 and 1.
//   * All of an adapter is asked for before any weights, which memory answers in turn: its places before the kernel before has ended, A and B of
//     gate_up and the next A first of all, and down's B is brought into L2 beside gate_up's weights. B s is added when these are through.
//   * A x: the warps of a pair's first blocks share A's rows; the ninth warps of all its blocks find each value once it is there, long before weights
//     are through. These few blocks wait for each other, later ones for earlier ones: a GPU starts them in order. down empties these values again.
//   * A act is a sum over gate_up's blocks, of which each leaves its own part.
#pragma once
#include "marlin_moe_pairs.h"
#include "marlin_moe_tiles.cuh"

namespace {

constexpr int kWarps = 8, kSharers = 32 * kWarps, kThreads = kSharers + 32, kRing = 4;
constexpr int kHeldA = 8, kHeldB = 4;  // pieces of 16 bytes of A, and of B, that a thread has under way
constexpr int kShrinkStep = 256;  // columns of A that a warp takes at once
constexpr int kHeldNext = 4;      // words of the second A
constexpr int kHeldParts = 12;    // parts of A act that a thread has under way
constexpr uint32_t kNotThere = 0xffffffffu;  // a value of A x: no sum has these bits

template <class F, bool DOWN, bool HALF>
struct Pairs {
  using Codes = F;
  using T = typename F::Type;
  static constexpr bool kDown = DOWN, kHalf = HALF;
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
  int rows;     // of B in a block
  int lanes;    // threads of such a row, of one warp
  int columns;  // of a share of A
};

struct PairsShared {
  uint8_t *ring, *b;  // of the weights; of B
  float *sums, *parts, *s, *shares, *act;  // of the warps; B s of the block's rows; s of all pairs, and before it is summed; the block's part of the activation
  int bytes;
};

template <class P>
HOST_DEVICE PairsShared carve_pairs(const MarlinMoePairs& a, const PairsDerived& d, uint8_t* base) {
  PairsShared s;
  const int sums = d.units * kWarps * 32, rows = a.slots ? d.rows : 0, low = a.slots ? (P::kDown ? a.top_k : 1) * a.width : 0;
  const int b = a.slots ? kHeldB * kSharers * 16 : 0;
  s.ring = base, s.b = base + d.ring_bytes;
  s.sums = (float*)(s.b + b);
  s.parts = s.sums + sums;
  s.s = s.parts + rows;
  s.shares = s.act = s.s + low;
  s.bytes = d.ring_bytes + b + (sums + rows + low + (!P::kDown ? rows / 2 : low > kSharers ? low : kSharers)) * 4;
  return s;
}

// ---- Adapters --------------------------------------------------------------------------------------------------------

// What a slot's tables say of one projection.
struct PairsAdapter {
  int rank = 0, split = 0;
  float scaling = 0.f;
  int64_t place = 0, stride = 0;
  DEVICE void find(const MarlinMoeTable& t, int slot) {
    if (slot < 0) return;
    rank = t.rank[slot], split = t.split ? t.split[slot] : 0, scaling = t.scaling ? t.scaling[slot] : 0.f, place = t.offset[slot], stride = t.stride[slot];
  }
  DEVICE const uint16_t* matrix(const MarlinMoeTable& t, int expert) const { return (const uint16_t*)t.pool + place + expert * stride; }
};

// The owner's slot, -1: no adapter.
template <class P>
DEVICE int slot_of(const MarlinMoePairs& a, int owner) {
  const int slot = a.slots ? a.slots[P::kDown ? owner : owner / a.top_k] : -1;
  return slot < a.num_slots ? slot : -1;
}

// The expert of the owner's j-th pair, -1: none.
template <class P>
DEVICE int expert_of(const MarlinMoePairs& a, int owner, int j) {
  const int expert = a.topk_ids[P::kDown ? owner * a.top_k + j : owner];
  return expert >= 0 && expert < a.experts ? expert : -1;
}

DEVICE float warp_total(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += as_float(shuffle_xor(as_bits(value), mask));
  return value;
}

// s[pair, row, share] = scaling * A x over a share of the columns: rows and shares by the warps of the pair's first blocks in turn, of which this is one.
template <class P>
struct PairsShrink {
  using T = typename P::T;
  PairsAdapter l;
  const uint16_t* matrix = nullptr;  // null: nothing
  uint32_t words[kHeldA][4];

  DEVICE int first(int row_block) const { return row_block * kWarps + warp_index(); }
  // The pieces from column k on of what lies before `end`; no branch between loads, which would make them wait for each other.
  DEVICE void fetch(const MarlinMoePairs& a, int unit, int k, int end) {
    const uint16_t* row = matrix + (int64_t)(unit / a.shares) * a.k;
#pragma unroll
    for (int i = 0; i < kHeldA; i++) {
      const int at = k + i * kShrinkStep + lane_index() * 8;
      load_words(words[i], row + (at < end ? at : k));
    }
  }
  DEVICE void begin(const MarlinMoePairs& a, const PairsDerived& d, int row_block, int expert) {
    if (expert < 0 || row_block >= d.shrinks || l.rank == 0) return;
    matrix = l.matrix(a.a, expert);
    const int unit = first(row_block), k = unit % a.shares * d.columns;
    if (unit < l.rank * (1 + l.split) * a.shares && k < a.k) fetch(a, unit, k, k + d.columns < a.k ? k + d.columns : a.k);
  }
  DEVICE void run(const MarlinMoePairs& a, const PairsDerived& d, int pair, int row_block) {
    if (matrix == nullptr) return;
    const uint16_t* x = (const uint16_t*)a.x + (int64_t)(pair / a.top_k) * a.k;
    for (int unit = first(row_block); unit < l.rank * (1 + l.split) * a.shares; unit += d.shrinks * kWarps) {
      const int from = unit % a.shares * d.columns, end = from + d.columns < a.k ? from + d.columns : a.k;
      float sum = 0.f;
      for (int k = from; k < end; k += kHeldA * kShrinkStep) {
        if (unit > first(row_block) || k > from) fetch(a, unit, k, end);
#pragma unroll
        for (int half = 0; half < kHeldA; half += kHeldA / 2) {
          uint32_t values[kHeldA / 2][4];
#pragma unroll
          for (int i = 0; i < kHeldA / 2; i++) {
            const int at = k + (half + i) * kShrinkStep + lane_index() * 8;
            load_words(values[i], x + (at < end ? at : k));
          }
#pragma unroll
          for (int i = 0; i < kHeldA / 2; i++)
            if (k + (half + i) * kShrinkStep + lane_index() * 8 < end)
#pragma unroll
              for (int j = 0; j < 4; j++) sum += T::low(words[half + i][j]) * T::low(values[i][j]) + T::high(words[half + i][j]) * T::high(values[i][j]);
        }
      }
      sum = warp_total(sum);
      if (lane_index() == 0) store_relaxed(a.s + (int64_t)pair * a.width * a.shares + unit, sum * l.scaling);
    }
  }
};

// B s: a piece is eight ranks of a row of B for one pair. The threads of a row take its pieces in turn, each through places of its own in shared memory.
template <class P>
struct PairsExpand {
  const MarlinMoePairs& a;
  const PairsDerived& d;
  int owner, row_block;
  const PairsShared& shared;

  struct Piece {
    int local, part;  // row of the block; piece of it
  };
  DEVICE static int pieces(const MarlinMoePairs& a, int rank) { return (P::kDown ? a.top_k : 1) * ((rank + 7) / 8); }
  DEVICE Piece begin() const { return {thread_index() / d.lanes, thread_index() % d.lanes}; }
  DEVICE Piece after(Piece piece, int rank) const {  // the same number for all threads of a row
    piece.part += d.lanes;
    if (piece.part - thread_index() % d.lanes >= pieces(a, rank)) piece = {piece.local + kSharers / d.lanes, thread_index() % d.lanes};
    return piece;
  }
  DEVICE uint8_t* place(int i) const { return shared.b + (i * kSharers + thread_index()) * 16; }
  DEVICE bool up(int local) const { return !P::kDown && local >= d.rows / 2; }
  DEVICE int row_of(int local) const {  // of the weight; a.rows: padding
    const int column = row_block * (P::kDown ? d.rows : d.rows / 2) + (up(local) ? local - d.rows / 2 : local), half = a.rows / 2;
    return column >= (P::kDown ? a.rows : half) ? a.rows : up(local) ? half + column : column;
  }
  DEVICE void fetch(const PairsAdapter& l, Piece piece) const {
    const int of_pair = (l.rank + 7) / 8;
#pragma unroll 1
    for (int i = 0; i < kHeldB && piece.local < d.rows; i++, piece = after(piece, l.rank)) {
      const int j = P::kDown ? piece.part / of_pair : 0, rank = (piece.part - j * of_pair) * 8, row = row_of(piece.local);
      const int expert = piece.part < pieces(a, l.rank) ? expert_of<P>(a, owner, j) : -1;
      const bool present = row < a.rows && expert >= 0;
      load_piece(place(i), l.matrix(a.b, present ? expert : 0) + (int64_t)(present ? row : 0) * l.rank + (present ? rank : 0), present ? l.rank - rank : 0, l.rank % 8 == 0);
    }
  }
  // parts[row] = B s; the first pieces are there.
  DEVICE void run(int slot, int rank, int split) const {
    const int of_pair = (rank + 7) / 8;
    float sum = 0.f;
    for (Piece piece = begin(); piece.local < d.rows;) {
#pragma unroll 1
      for (int i = 0; i < kHeldB && piece.local < d.rows; i++) {
        const int j = P::kDown ? piece.part / of_pair : 0, first = (piece.part - j * of_pair) * 8;
        const float* low = shared.s + j * rank + (up(piece.local) ? split * rank : 0) + first;
        uint32_t b[4];
        load_words(b, place(i));
        if (piece.part < pieces(a, rank)) {
#pragma unroll
          for (int r = 0; r < 8; r++)
            if (first + r < rank) sum += low[r] * (r % 2 ? P::T::high(b[r / 2]) : P::T::low(b[r / 2]));
        }
        const Piece next = after(piece, rank);
        if (next.local != piece.local) {
          for (int mask = 1; mask < d.lanes; mask *= 2) sum += as_float(shuffle_xor(as_bits(sum), mask));
          if (thread_index() % d.lanes == 0) shared.parts[piece.local] = sum;
          sum = 0.f;
        }
        piece = next;
      }
      if (piece.local < d.rows) {
        PairsAdapter l;
        l.find(a.b, slot), fetch(l, piece), cp_commit(), cp_wait<0>();
      }
    }
  }
};

// gate_up: s of the pair, each value once it is there.
DEVICE void collect_s(const MarlinMoePairs& a, const PairsAdapter& l, int pair, float* s) {
  for (int i = lane_index(); i < l.rank * (1 + l.split); i += 32) {
    const float *from = a.s + ((int64_t)pair * a.width + i) * a.shares, *missing;
    float sum;
    do {
      missing = nullptr, sum = 0.f;
#pragma unroll 4
      for (int share = 0; share < a.shares; share++) {
        const float value = load_relaxed(from + share);
        if (as_bits(value) == kNotThere) missing = from + share;
        sum += value;
      }
      if (missing) look_again(missing);
    } while (missing);
    s[i] = sum;
  }
}

// down: s of the token's pairs is the sum of what gate_up's blocks have left, which the warps that stream weights share.
template <class P>
struct PairsSum {
  int all, groups;  // values of s; shares of each
  DEVICE PairsSum(const MarlinMoePairs& a, const PairsAdapter& l) : all(l.rank * a.top_k), groups(all > 0 && all < kSharers ? kSharers / all : 1) {}
  DEVICE void share(const MarlinMoePairs& a, const PairsAdapter& l, int owner, float* shares) const {
    for (int i = thread_index(); i < all * groups; i += kSharers) {
      const int group = i / all, j = (i - group * all) / l.rank;
      const float* part = a.s + (int64_t)(owner * a.top_k + j) * a.parts * a.width + (i - group * all - j * l.rank);
      const int parts = expert_of<P>(a, owner, j) < 0 ? 0 : a.parts;
      float sum = 0.f;
      for (int first = group; first < parts; first += kHeldParts * groups) {
        float values[kHeldParts];
#pragma unroll
        for (int b = 0; b < kHeldParts; b++) values[b] = first + b * groups < parts ? load_float_l2(part + (int64_t)(first + b * groups) * a.width) : 0.f;
#pragma unroll
        for (int b = 0; b < kHeldParts; b++) sum += values[b];
      }
      shares[i] = sum;
    }
  }
  DEVICE void finish(const MarlinMoePairs& a, const PairsAdapter& l, int owner, const float* shares, float* s) const {
    for (int i = lane_index(); i < all; i += 32) {
      float sum = 0.f;
      for (int group = 0; group < groups; group++) sum += shares[group * all + i];
      s[i] = sum * a.topk_weights[owner * a.top_k + i / l.rank];
    }
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

// What this block's part of the activation adds to A act: rows of A by warps in turn, two columns a word.
template <class P>
struct PairsNext {
  PairsAdapter l;
  const uint16_t* matrix = nullptr;  // at the block's first column; null: nothing
  uint32_t held[kHeldNext];

  DEVICE static int words(const PairsDerived& d) { return (d.rows / 4 + 31) / 32; }  // of a row, a lane's
  DEVICE static int columns(const MarlinMoePairs& a, const PairsDerived& d, int row_block) {  // of the block, without padding
    const int left = a.rows / 2 - row_block * (d.rows / 2);
    return left < d.rows / 2 ? left : d.rows / 2;
  }
  DEVICE int row(const PairsDerived& d, int i) const { return warp_index() + i / words(d) * kWarps; }
  DEVICE void begin(const MarlinMoePairs& a, const PairsDerived& d, int row_block, int expert) {
    if (l.rank == 0 || expert < 0) return;
    matrix = l.matrix(a.next, expert) + row_block * (d.rows / 2);
    fetch(a, d, row_block, 0);
  }
  DEVICE void fetch(const MarlinMoePairs& a, const PairsDerived& d, int row_block, int first) {
    const int end = columns(a, d, row_block);
#pragma unroll
    for (int i = 0; i < kHeldNext; i++) {
      const int column = 2 * (lane_index() + 32 * ((first + i) % words(d)));
      held[i] = row(d, first + i) < l.rank && column < end ? *(const uint32_t*)(matrix + (int64_t)row(d, first + i) * (a.rows / 2) + column) : 0;
    }
  }
  DEVICE void run(const MarlinMoePairs& a, const PairsDerived& d, int owner, int row_block, const float* act) {
    if (matrix == nullptr) return;
    float* s = a.other_s + ((int64_t)owner * d.blocks + row_block) * a.next_width;
    const int end = columns(a, d, row_block);
    float sum = 0.f;
    for (int first = 0; row(d, first) < l.rank; first += kHeldNext) {
      if (first > 0) fetch(a, d, row_block, first);
#pragma unroll
      for (int i = 0; i < kHeldNext; i++) {
        const int part = (first + i) % words(d), column = 2 * (lane_index() + 32 * part);
        if (column < end) sum += P::T::low(held[i]) * act[column] + P::T::high(held[i]) * act[column + 1];
        if (part + 1 < words(d)) continue;
        sum = warp_total(sum);
        if (lane_index() == 0 && row(d, first + i) < l.rank) s[row(d, first + i)] = sum * l.scaling;
        sum = 0.f;
      }
    }
  }
};

// A warp's share of the block's weights; its sums to shared memory.
template <class P>
DEVICE void stream_weights(const MarlinMoePairs& a, const PairsDerived& d, const PairsShared& shared, int owner, int row_block, PairsShrink<P>& shrink, const PairsExpand<P>& expand,
                           const PairsAdapter& adapter) {
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
  if constexpr (!P::kDown) {
    shrink.run(a, d, owner, row_block);
  } else {
    if (adapter.rank > 0) expand.fetch(adapter, expand.begin());
    wait_for_previous_kernel();
    ahead = walk, to_load = left;
#pragma unroll 1
    for (int i = 0; i < kRing; i++) load(i, false, true), cp_commit();
    if (a.slots) {
      PairsSum<P>(a, adapter).share(a, adapter, owner, shared.shares);
      sync_block();
    }
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
DEVICE float row_sum(const MarlinMoePairs& a, const PairsShared& shared, int unit, int place, int local) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) sum += shared.sums[(unit * kWarps + w) * 32 + place];
  if (a.slots) sum += shared.parts[local];
  return sum;
}

// Blocks of a multiprocessor that registers are shared among; before Hopper two do not fit where zero points take some too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kResidentPairs = 1;
#else
constexpr int kResidentPairs = 2;
#endif

template <class P>
KERNEL void __launch_bounds__(kThreads, kResidentPairs) pairs_gemm(MarlinMoePairs a, PairsDerived d) {
  SMEM_DECL;
  using T = typename P::T;
  const PairsShared shared = carve_pairs<P>(a, d, smem_);
  const int owner = (int)blockIdx.x / d.blocks, row_block = (int)blockIdx.x - owner * d.blocks, i = thread_index(), half = a.rows / 2, slot = slot_of<P>(a, owner);
  const bool streams = warp_index() < kWarps;
  PairsAdapter adapter, then;
  PairsShrink<P> shrink;
  PairsNext<P> next;
  adapter.find(a.b, slot);
  if constexpr (!P::kDown) {
    if (!streams) then.find(a.then, slot);
    else shrink.l.find(a.a, slot), next.l.find(a.next, slot);
    wait_for_previous_kernel();
  }
  allow_next_kernel();
  const int expert = P::kDown ? 0 : expert_of<P>(a, owner, 0);
  const PairsExpand<P> expand = {a, d, owner, row_block, shared};
  if (streams) {
    if constexpr (!P::kDown) {
      shrink.begin(a, d, row_block, expert), next.begin(a, d, row_block, expert);
      if (adapter.rank > 0 && expert >= 0) expand.fetch(adapter, expand.begin());
    }
    stream_weights<P>(a, d, shared, owner, row_block, shrink, expand, adapter);
  } else if constexpr (P::kDown) {
    wait_for_previous_kernel();
    if (a.slots) {
      for (int at = (int)blockIdx.x * 32 + lane_index(); at < a.exchanged; at += (int)gridDim.x * 32) a.other_s[at] = as_float(kNotThere);
      sync_block();
      PairsSum<P>(a, adapter).finish(a, adapter, owner, shared.shares, shared.s);
    }
  } else if (expert >= 0) {
    if (then.rank > 0) {
      const uint8_t* matrix = (const uint8_t*)then.matrix(a.then, expert);
      for (int at = (row_block * 32 + lane_index()) * 128; at < a.k * then.rank * 2; at += d.blocks * 32 * 128) prefetch(matrix + at);
    }
    if (adapter.rank > 0) collect_s(a, adapter, owner, shared.s);
  }
  cp_wait<0>();  // B, where a warp has no weights
  sync_block();
  if (a.slots) {
    if (streams && adapter.rank > 0 && expert >= 0) expand.run(slot, adapter.rank, adapter.split);
    else for (int at = i; streams && at < d.rows; at += kSharers) shared.parts[at] = 0.f;
    sync_block();
  }

  const uint16_t* bias = (const uint16_t*)a.bias;
  if constexpr (P::kDown) {
    const int row = row_block * d.rows + i;
    if (i >= d.rows || row >= a.rows) return;
    float value = row_sum<P>(a, shared, 0, i, i);
    if (bias)
      for (int j = 0; j < a.top_k; j++) {
        const int chosen = expert_of<P>(a, owner, j);
        if (chosen >= 0) value += a.topk_weights[owner * a.top_k + j] * T::low(bias[(int64_t)chosen * a.rows + row]);
      }
    ((uint16_t*)a.out)[(int64_t)owner * a.rows + row] = (uint16_t)T::pack(value, 0.f);
  } else {
    const int column = row_block * (d.rows / 2) + i, place = 4 * (i % 16 / 2) + i % 2;
    if (i < d.rows / 2 && column < half && expert >= 0) {
      float gate = row_sum<P>(a, shared, i / 16, place, i), up = row_sum<P>(a, shared, i / 16, place + 2, d.rows / 2 + i);
      if (bias) gate += T::low(bias[(int64_t)expert * a.rows + column]), up += T::low(bias[(int64_t)expert * a.rows + half + column]);
      const uint32_t act = T::pack(activate<false>(a, -1.4426950408889634f * a.alpha, gate, up), 0.f);
      ((uint16_t*)a.out)[(int64_t)owner * half + column] = (uint16_t)act;
      if (a.slots) shared.act[i] = T::low(act);
    }
    if (a.slots == nullptr) return;
    sync_block();
    if (warp_index() < kWarps && expert >= 0) next.run(a, d, owner, row_block, shared.act);
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
  d.lanes = 1;
  while (2 * d.lanes * d.rows <= kSharers) d.lanes *= 2;
  d.columns = a.slots && !P::kDown ? ceil_div(ceil_div(a.k, 8), a.shares) * 8 : 0;
  return d;
}

template <class P>
int launch_pairs(const MarlinMoePairs& a, MarlinMoePairsPlan plan, void* stream) {
  const PairsDerived d = derive_pairs<P>(a, plan);
  const int owners = a.tokens * (P::kDown ? 1 : a.top_k);
  const Launch how = {(unsigned)(d.blocks * owners), (unsigned)kThreads, (size_t)carve_pairs<P>(a, d, (uint8_t*)1024).bytes, stream,
                      plan.overlap && can_overlap()};
  return launch_together(how, pairs_gemm<P>, a, d);
}

template <class F>
int dispatch_pairs(const MarlinMoePairs& a, MarlinMoePairsPlan plan, void* stream) {
  if (a.topk_weights == nullptr) return launch_pairs<Pairs<F, false, false>>(a, plan, stream);
  if (plan.units > 0) return launch_pairs<Pairs<F, true, false>>(a, plan, stream);
  return launch_pairs<Pairs<F, true, true>>(a, plan, stream);
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
