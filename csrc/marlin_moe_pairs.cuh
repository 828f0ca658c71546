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
//   * Where a block of gate_up is alone on a multiprocessor, it has eight such warps, which share all of this.
#pragma once
#include "marlin_moe_pairs_lora.cuh"

namespace {

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
  for (int i = 0; i < P::kRing; i++) load(i, true, !P::kDown), cp_commit();
  if constexpr (P::kDown) {
    wait_for_previous_kernel();
    ahead = walk, to_load = left;
#pragma unroll 1
    for (int i = 0; i < P::kRing; i++) load(i, false, true), cp_commit();
  }
  float sums[2][2][4] = {}, rows[4], total[4] = {};
  const bool writes = lane % 4 == 0 && (!P::kHalf || lane < 16);
  if (!P::kDown && per_outer == 0 && lane < 8) {  // fewer stages than warps
    const float none[4] = {};
    for (int i = 0; i < d.units; i++) store_floats(shared.sums + (i * kWarps + warp) * 32 + lane * 4, none);
  }
  for (int slot = 0; left > 0; slot = slot + 1 == P::kRing ? 0 : slot + 1) {
    cp_wait<P::kRing - 1>();
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
#pragma unroll
  for (int i = 0; P::kLora && i < P::kSums; i++) sum += shared.parts[i * rows + local];
  return sum;
}

// Blocks of a multiprocessor that registers are shared among; before Hopper two do not fit where zero points take some too.
template <class P>
constexpr int resident_pairs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 1;
#else
  return P::kWide ? 1 : 2;
#endif
}

// Where a helper has the second A.
template <class P>
DEVICE uint8_t* next_of(const PairsDerived& d, const PairsShared& shared) {
  return shared.next + (P::kWide ? (warp_index() - kWarps) * d.held_next * kNextBytes : 0);
}

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
    const bool early = a.starts || !P::kWide;  // a linear's blocks have time for B before the wait; of experts with many ranks s would only be asked for later
    for (int i = 0; early && i < d.slots; i++) down.fetch_b(down.four_of(i), i);
    wait_for_previous_kernel();
    for (int i = 0; i < d.slots; i++) down.fetch_parts(down.four_of(i), down.first_eight(), i);
    for (int i = 0; !early && i < d.slots; i++) down.fetch_b(down.four_of(i), i);
    for (int i = 0; i < d.slots; i++) cp_commit();  // the first of these groups has all
    for (int at = ((int)blockIdx.x * P::kHelpers + helper) * 32 + lane_index(); at < a.exchanged; at += (int)gridDim.x * P::kHelpers * 32) a.other_s[at] = as_float(kNotThere);
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
    shrink.run(owner);
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

// The same of gate_up's blocks that are alone, by all helpers alike.
template <class P>
DEVICE void adapt_wide(const MarlinMoePairs& a, const PairsDerived& d, const PairsShared& shared, int owner, int row_block, int slot, const PairsAdapter& next) {
  const int helper = warp_index() - kWarps;
  PairsAdapter first, l, then;
  first.find(a.a, slot), l.find(a.b, slot), then.find(a.then, slot);
  float* const parts = shared.parts + helper * d.rows;
  wait_for_previous_kernel();
  const int expert = expert_of<P>(a, owner, 0);
  if (expert >= 0 && l.rank > 0) {
    uint8_t* const turns = shared.a + helper * d.turns * kTurnBytes;
    PairsShrink<P> shrink(a, d, first, turns, owner, row_block, expert);
    shrink.begin();
    cp_commit();
    const PairsExpandWide<P> expand(a, d, l, row_block, expert);
    expand.prefetch_b();
    shrink.run(owner);
    if (next.rank > 0) {
      const PairsNext<P> second(a, d, next, row_block, expert);
      second.fetch(next_of<P>(d, shared), second.begin), cp_commit();
    }
    const uint8_t* matrix = (const uint8_t*)then.matrix(a.then, expert);
    for (int at = ((row_block * P::kHelpers + helper) * 32 + lane_index()) * 128; at < a.k * then.rank * 2; at += d.blocks * P::kHelpers * 32 * 128) prefetch(matrix + at);
    expand.run(turns, owner, parts);
  } else {
    for (int at = lane_index(); at < d.rows; at += 32) parts[at] = 0.f;
    if (expert >= 0 && next.rank > 0) {
      const PairsNext<P> second(a, d, next, row_block, expert);
      second.fetch(next_of<P>(d, shared), second.begin), cp_commit();
    }
  }
  cp_wait<0>();
}

template <class P>
KERNEL void __launch_bounds__(P::kThreads, resident_pairs<P>()) pairs_gemm(MarlinMoePairs a, PairsDerived d) {
  SMEM_DECL;
  using T = typename P::T;
  const PairsShared shared = carve_pairs<P>(d, smem_);
  const int owner = (int)blockIdx.x / d.blocks, row_block = (int)blockIdx.x - owner * d.blocks, i = thread_index(), half = a.rows / 2;
  PairsAdapter next;
  if (P::kLora && warp_index() >= kWarps) {
    const int slot = slot_of<P>(a, owner);
    if (!P::kDown && (P::kWide || warp_index() == kWarps)) next.find(a.next, slot);
    if (P::kDown) allow_next_kernel();  // gate_up only after its wait: down reads the router's choice before its own
    if constexpr (P::kWide && !P::kDown) adapt_wide<P>(a, d, shared, owner, row_block, slot, next);
    else adapt<P>(a, d, shared, owner, row_block, slot, next);
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
      if ((P::kWide ? warp_index() >= kWarps : warp_index() == kWarps) && next.rank > 0 && expert >= 0)
        PairsNext<P>(a, d, next, row_block, expert).run(next_of<P>(d, shared), shared.act, owner, row_block);
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
  d.ring_bytes = kWarps * (most < P::kRing ? most : P::kRing) * d.stage_bytes;
  d.rows = P::kHalf ? 16 : 32 * d.units;
  d.columns = ceil_div(ceil_div(a.k, kShares), kTurn) * kTurn, d.chunks = ceil_div(d.rows, 64);
  const int ranks = a.width / 16, fours = P::kDown ? ceil_div(a.top_k, 4) * ranks : ceil_div(2 * d.units, 4) * ranks;
  const int eights = ceil_div(ceil_div(a.parts, 8), 1 << sharers_log2<P>(fours)), most_bytes = plan.alone ? kWhole : kBeside;
  d.low_bytes = P::kDown ? (eights < kHeldParts ? eights : kHeldParts) * kFour : P::kWide ? 0 : ranks * 512;
  const auto hold = [&](int slots, int turns, int held_next) {
    d.slots = slots, d.turns = turns, d.held_next = held_next;
    d.held_b = P::kDown ? P::kHelpers * d.slots * d.rows / 16 : P::kWide ? 0 : fours < kHeldB ? fours : kHeldB;
    return carve_pairs<P>(d, (uint8_t*)1024).bytes <= most_bytes;
  };
  if constexpr (P::kWide && !P::kDown) {
    for (int held = d.chunks; !hold(1, 2, held) && held > 1; held--) {}
  } else if (!P::kLora || !P::kDown) {
    if (!hold(1, 4, kHeldNext)) hold(1, 2, kHeldNext);
  } else {
    for (int slots = ceil_div(fours, P::kHelpers) < 4 ? ceil_div(fours, P::kHelpers) : 4; !hold(slots, 1, 0) && slots > 1; slots--) {}
  }
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
  constexpr int kHelpers = LORA ? kFew : 0;
  if constexpr (LORA) {
    if (a.topk_weights == nullptr && plan.alone && (a.next_width > kFewRanks || a.k <= kAtOnce)) return launch_pairs<Pairs<F, false, false, kMany>>(a, plan, stream);
  }
  if (a.topk_weights == nullptr) return launch_pairs<Pairs<F, false, false, kHelpers>>(a, plan, stream);
  if (plan.units > 0) return launch_pairs<Pairs<F, true, false, kHelpers>>(a, plan, stream);
  if constexpr (LORA) {
    if (plan.alone && a.width > kFewRanks) return launch_pairs<Pairs<F, true, true, kMany>>(a, plan, stream);
  }
  return launch_pairs<Pairs<F, true, true, kHelpers>>(a, plan, stream);
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
