// moe_lora_align_block_size: a stable two-digit radix sort. Slots belong to tokens, so tokens are first ordered by slot
// (M items, S + 1 bins); then pairs, visited in that order, are placed by expert (P items, E + 1 bins, the last = no expert).
// That yields (expert, slot, pair) without a counter per (expert, slot), of which there may be 263,000 with 64 in use.
//
//   counting sort in a block   bins are counted per warp in shared memory; each warp owns a contiguous run of items, so that
//                              (warp, round, lane) is item order, and the place of an item is the sum of
//                                items in lower bins | same bin in lower warps | same bin earlier in this warp
//   base tiles                 written by the pair that ends a tile: its offset in the expert's run is known when it is placed
//   lora tiles                 from the sorted keys: heads of groups as bit masks, 32 positions a word; a position ends a tile if
//                              its successor is a head or its offset in the group is a block's last; numbered by prefix sums
//
// Small P: one launch, one block, all in shared memory. Large P: (1) every block orders the tokens by slot by itself, redundantly,
// takes its share of that order and counts its experts; (2) every block sums all blocks' counts by itself and places its share;
// (3) one block writes the lora tiles. The redundant reads hit L2 and cost less than another launch.
#include "moe_lora_align.h"

#include "prims.cuh"

namespace {

constexpr int kSlotBits = 9;  // a key is expert << 9 | slot + 1, with slot + 1 <= 256
constexpr uint32_t kSlotMask = (1u << kSlotBits) - 1;
constexpr uint32_t kNoKey = 1u << 31;         // equals no key and has no slot
constexpr int kScratchWords = 96;             // three words a warp
constexpr int kMaxRows = 128;                 // blocks in (1) and (2), as long as none gets more than:
constexpr int kMaxPairsPerBlock = 8192;
constexpr int kSharedBytes = 96 * 1024;       // what every GPU from sm_80 on grants a block
constexpr int kCounterBytes = 72 * 1024;      // of which counters: with many bins a block has fewer warps
constexpr int kLoadsAhead = 4;                // independent loads in flight before the first use

struct Range {
  int first, last;
};

HOST_DEVICE int ceil_div(int value, int by) { return (value + by - 1) / by; }
HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
HOST_DEVICE int larger(int a, int b) { return a > b ? a : b; }

// Divisors (K, block sizes) are powers of two in practice, and a division is some 30 instructions.
DEVICE int quotient(int value, int by) { return (by & (by - 1)) == 0 ? value >> highest_bit((uint32_t)by) : value / by; }
DEVICE int remainder(int value, int by) { return (by & (by - 1)) == 0 ? value & (by - 1) : value % by; }

// This warp's contiguous run of `items` items, a multiple of 32 long except at the end.
DEVICE Range warp_range(int items) {
  const int span = ceil_div(ceil_div(items, warps_per_block()), 32) * 32;
  const int first = smaller(warp_index() * span, items);
  return {first, smaller(first + span, items)};
}

// The consecutive bins that this thread scans.
DEVICE Range thread_bins(int bins) {
  const int span = ceil_div(bins, (int)blockDim.x);
  const int first = smaller(thread_index() * span, bins);
  return {first, smaller(first + span, bins)};
}

DEVICE int expert_bin(const MoeLoraAlign& a, int pair) {
  const int64_t id = a.ids_are_64bit ? ((const int64_t*)a.topk_ids)[pair] : (int64_t)((const int32_t*)a.topk_ids)[pair];
  return id >= 0 && id < a.experts ? (int)id : a.experts;
}

DEVICE int slot_bin(const MoeLoraAlign& a, int token) {
  const int slot = a.token_slots[token];
  return slot >= 0 && slot < a.slots ? slot + 1 : 0;
}

DEVICE bool has_slots(const MoeLoraAlign& a) { return a.token_slots != nullptr && a.slots > 0; }

DEVICE void fill_zero(uint32_t* words, int count) {
  for (int i = thread_index(); i < count; i += (int)blockDim.x) words[i] = 0;
}

// counters[warp][bin] += items of the bin in the warp's run.
template <class BinOf>
DEVICE void count_items(uint32_t* counters, int bins, int items, BinOf bin_of) {
  const Range run = warp_range(items);
  uint32_t* mine = counters + warp_index() * bins;
  for (int item = run.first + lane_index(); item < run.last; item += 32) atomic_add(&mine[bin_of(item)], 1);
}

// put(item, bin, rank) for each item of this warp's run, rank = counters[warp][bin] at entry + equal items before it in the run.
template <class BinOf, class Put>
DEVICE void place_items(uint32_t* counters, int bins, int items, BinOf bin_of, Put put) {
  const Range run = warp_range(items);
  uint32_t* mine = counters + warp_index() * bins;
  for (int base = run.first; base < run.last; base += 32) {
    const int item = base + lane_index();
    const int bin = item < run.last ? bin_of(item) : -1;
    const uint32_t peers = match_any(bin);
    const uint32_t before = peers & lanes_below();
    const uint32_t start = bin >= 0 ? mine[bin] : 0;
    sync_warp();  // all lanes have read
    if (bin >= 0 && before == 0) mine[bin] = start + (uint32_t)count_bits(peers);
    sync_warp();  // the next round reads what was written
    if (bin >= 0) put(item, bin, (int)start + count_bits(before));
  }
}

// Over warps: counters[warp][bin] becomes offset + items of the bin in lower warps. Returns offset + all of the bin's items.
DEVICE uint32_t scan_column(uint32_t* counters, int bins, int bin, uint32_t offset) {
  for (int warp = 0; warp < warps_per_block(); warp += 8) {
    uint32_t found[8];  // all loads before the stores, which the compiler cannot tell apart
#pragma unroll
    for (int i = 0; i < 8; i++) found[i] = warp + i < warps_per_block() ? counters[(warp + i) * bins + bin] : 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (warp + i < warps_per_block()) counters[(warp + i) * bins + bin] = offset;
      offset += found[i];
    }
  }
  return offset;
}

struct Bins {  // of one counting sort, in shared memory
  uint32_t* rows;        // items of the bin
  uint32_t* start;       // items of lower bins
  uint32_t* tile_start;  // tiles of lower bins
};

struct Sums {
  uint32_t rows, tiles;
};

// Sums over all lower threads of the block. One barrier inside.
DEVICE Sums sum_lower_threads(Sums value, uint32_t* scratch) {
  Sums sum = value;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const Sums other = {shuffle_up(sum.rows, delta), shuffle_up(sum.tiles, delta)};
    if (lane_index() >= delta) sum = {sum.rows + other.rows, sum.tiles + other.tiles};
  }
  if (lane_index() == 31) {
    scratch[warp_index()] = sum.rows;
    scratch[32 + warp_index()] = sum.tiles;
  }
  sync_block();
  const bool lower = lane_index() < warp_index();
  const uint32_t rows = warp_sum(lower ? scratch[lane_index()] : 0), tiles = warp_sum(lower ? scratch[32 + lane_index()] : 0);
  return {rows + sum.rows - value.rows, tiles + sum.tiles - value.tiles};
}

// start and tile_start from rows; each thread has written the rows of its thread_bins. Only the first `experts` bins have tiles.
// The caller's next barrier makes the result visible and frees the scratch.
DEVICE void scan_bins(Bins bins, int count, int experts, int block, uint32_t* scratch) {
  const Range own = thread_bins(count);
  Sums total = {0, 0};
  for (int bin = own.first; bin < own.last; bin++) {
    total.rows += bins.rows[bin];
    total.tiles += bin < experts ? (uint32_t)quotient((int)bins.rows[bin] + block - 1, block) : 0;
  }
  Sums lower = sum_lower_threads(total, scratch);
  for (int bin = own.first; bin < own.last; bin++) {
    bins.start[bin] = lower.rows;
    bins.tile_start[bin] = lower.tiles;
    lower.rows += bins.rows[bin];
    lower.tiles += bin < experts ? (uint32_t)quotient((int)bins.rows[bin] + block - 1, block) : 0;
  }
}

// order[i] = the token at place first + i when tokens are ordered by (slot, token), for places in [first, last).
// `counters` [warps][slots + 1] zero and visible at entry; a barrier at the end.
template <class BinOf>
DEVICE void order_tokens(const MoeLoraAlign& a, uint32_t* counters, Bins bins, uint32_t* scratch, Range places, uint32_t* order, BinOf bin_of) {
  if (!has_slots(a)) {
    for (int place = places.first + thread_index(); place < places.last; place += (int)blockDim.x) order[place - places.first] = (uint32_t)place;
    return sync_block();
  }
  const int count = a.slots + 1;
  count_items(counters, count, a.tokens, bin_of);
  sync_block();
  const Range own = thread_bins(count);
  for (int bin = own.first; bin < own.last; bin++) bins.rows[bin] = scan_column(counters, count, bin, 0);
  scan_bins(bins, count, 0, 1, scratch);
  sync_block();
  place_items(counters, count, a.tokens, bin_of, [&](int token, int bin, int rank) {
    const int place = (int)bins.start[bin] + rank;
    if (place >= places.first && place < places.last) order[place - places.first] = (uint32_t)token;
  });
  sync_block();
}

// The pair at place j of all pairs when tokens are ordered by slot.
DEVICE int pair_at(const MoeLoraAlign& a, const uint32_t* order, int j) {
  const int i = quotient(j, a.top_k);
  return (int)order[i] * a.top_k + (j - i * a.top_k);
}

// The base tile that ends with row `offset` of the expert's run, if one does.
DEVICE void write_base_tile(const MoeLoraAlign& a, Bins bins, int expert, int offset) {
  const int in_block = remainder(offset, a.base_block);
  if (expert >= a.experts || (in_block + 1 != a.base_block && offset + 1 != (int)bins.rows[expert])) return;
  int32_t* tile = a.base_tiles + 3 * (int64_t)((int)bins.tile_start[expert] + quotient(offset, a.base_block));
  tile[0] = expert;
  tile[1] = (int)bins.start[expert] + offset - in_block;
  tile[2] = in_block + 1;
}

// lora_tiles and counts[2..3] from the sorted keys [valid]. heads and loras: scratch of valid / 32 + 1 words each.
// Position `valid` counts as a head, so that every group has a successor.
DEVICE void write_lora_tiles(const MoeLoraAlign& a, const uint32_t* keys, int valid, uint32_t* heads, uint32_t* loras, uint32_t* scratch) {
  const Range run = warp_range(valid + 1);
  const int lane = lane_index(), warp = warp_index(), last_word = valid / 32;

  int last_head = -1;
  for (int base = run.first; base < run.last; base += 32 * kLoadsAhead) {
    uint32_t key[kLoadsAhead], previous[kLoadsAhead];
#pragma unroll
    for (int i = 0; i < kLoadsAhead; i++) {
      const int position = base + 32 * i + lane;
      key[i] = position < valid ? keys[position] : kNoKey;
      previous[i] = position > 0 && position <= valid ? keys[position - 1] : kNoKey;
    }
#pragma unroll
    for (int i = 0; i < kLoadsAhead; i++) {
      const uint32_t head = warp_ballot(key[i] != previous[i]), lora = warp_ballot((key[i] & kSlotMask) != 0);
      if (base + 32 * i >= run.last) continue;
      if (lane == 0) {
        heads[base / 32 + i] = head;
        loras[base / 32 + i] = lora;
      }
      if (head) last_head = base + 32 * i + highest_bit(head);
    }
  }
  if (lane == 0) scratch[warp] = (uint32_t)last_head;
  sync_block();

  // Walks this warp's words; visit(word, ends-candidate lanes' head position).
  const int head_before = warp_max(lane < warp ? (int)scratch[lane] : -1);
  int head_carried = head_before;
  uint32_t tiles = 0, groups = 0;
  for (int base = run.first; base < run.last; base += 32) {
    const int word = base / 32;
    const uint32_t head = heads[word], lora = loras[word], next = word < last_word ? heads[word + 1] : 0;
    const uint32_t upto = head & lanes_upto();
    const int offset = base + lane - (upto ? base + highest_bit(upto) : head_carried);
    const bool before_head = lane < 31 ? head >> (lane + 1) & 1 : next & 1;
    const bool end = (lora >> lane & 1) && (before_head || remainder(offset, a.lora_block) + 1 == a.lora_block);
    const uint32_t ends = warp_ballot(end);
    if (lane == 0) loras[word] = ends;  // the second walk needs only these
    tiles += (uint32_t)count_bits(ends);
    groups += (uint32_t)count_bits(head & lora);
    if (head) head_carried = base + highest_bit(head);
  }
  if (lane == 0) {
    scratch[32 + warp] = tiles;
    scratch[64 + warp] = groups;
  }
  sync_block();

  uint32_t tile_index = warp_sum(lane < warp ? scratch[32 + lane] : 0);
  if (warp == 0) {
    const uint32_t all_tiles = warp_sum(lane < warps_per_block() ? scratch[32 + lane] : 0);
    const uint32_t all_groups = warp_sum(lane < warps_per_block() ? scratch[64 + lane] : 0);
    if (lane == 0) {
      a.counts[2] = (int32_t)all_tiles;
      a.counts[3] = (int32_t)all_groups;
    }
  }
  head_carried = head_before;
  for (int base = run.first; base < run.last; base += 32) {
    const uint32_t head = heads[base / 32], ends = loras[base / 32];
    if (ends >> lane & 1) {
      const uint32_t upto = head & lanes_upto();
      const int position = base + lane, offset = position - (upto ? base + highest_bit(upto) : head_carried);
      const int in_block = remainder(offset, a.lora_block);
      const uint32_t key = keys[position];
      int32_t* tile = a.lora_tiles + 4 * (int64_t)(tile_index + (uint32_t)count_bits(ends & lanes_below()));
      tile[0] = (int32_t)(key >> kSlotBits);
      tile[1] = (int32_t)(key & kSlotMask) - 1;
      tile[2] = position - in_block;
      tile[3] = in_block + 1;
    }
    tile_index += (uint32_t)count_bits(ends);
    if (head) head_carried = base + highest_bit(head);
  }
}

DEVICE void write_counts(const MoeLoraAlign& a, Bins bins) {
  if (thread_index() != 0) return;
  a.counts[0] = (int32_t)bins.start[a.experts];
  a.counts[1] = (int32_t)bins.tile_start[a.experts];
  if (!has_slots(a)) a.counts[2] = a.counts[3] = 0;
}

// Parts of shared memory, in 32-bit words. Used by the kernels and by the launcher, so that they cannot disagree.
struct Carver {
  uint32_t* base;
  int words = 0;
  HOST_DEVICE uint32_t* take(int count) {
    words += count;
    return base ? base + words - count : nullptr;
  }
};

struct OneBlockShared {
  uint32_t *scratch, *counters, *slot_counters, *heads, *loras, *order, *keys;
  uint16_t *experts, *slots;
  Bins bins;
  int words;
};

HOST_DEVICE OneBlockShared carve_one_block(const MoeLoraAlign& a, int warps, uint32_t* base) {
  const int pairs = a.tokens * a.top_k, bins = larger(a.experts, a.slots) + 1, masks = pairs / 32 + 1;
  Carver carver{base};
  OneBlockShared s;
  s.scratch = carver.take(kScratchWords);
  s.counters = carver.take(warps * (a.experts + 1));
  s.slot_counters = carver.take(warps * (a.slots + 1));
  s.bins = {carver.take(bins), carver.take(bins), carver.take(bins)};
  s.heads = carver.take(masks);
  s.loras = carver.take(masks);
  s.order = carver.take(a.tokens);
  s.keys = carver.take(pairs);
  s.experts = (uint16_t*)carver.take((pairs + 1) / 2);
  s.slots = (uint16_t*)carver.take((a.tokens + 1) / 2);
  s.words = carver.words;
  return s;
}

KERNEL void __launch_bounds__(1024, 1) align_one_block(MoeLoraAlign a) {
  SMEM_DECL;
  const OneBlockShared s = carve_one_block(a, warps_per_block(), (uint32_t*)smem_);
  const int pairs = a.tokens * a.top_k, count = a.experts + 1;
  const bool slots = has_slots(a);
  for (int i = thread_index(); i < pairs; i += (int)blockDim.x) {  // the only reads of global memory, all at once
    const int expert = expert_bin(a, i), slot = slots && i < a.tokens ? slot_bin(a, i) : 0;
    s.experts[i] = (uint16_t)expert;
    if (i < a.tokens) s.slots[i] = (uint16_t)slot;
  }
  fill_zero(s.counters, warps_per_block() * count);
  if (slots) fill_zero(s.slot_counters, warps_per_block() * (a.slots + 1));
  sync_block();

  order_tokens(a, s.slot_counters, s.bins, s.scratch, {0, a.tokens}, s.order, [&](int token) { return (int)s.slots[token]; });

  const auto bin_of = [&](int j) { return (int)s.experts[pair_at(a, s.order, j)]; };
  count_items(s.counters, count, pairs, bin_of);
  sync_block();
  const Range own = thread_bins(count);
  for (int bin = own.first; bin < own.last; bin++) s.bins.rows[bin] = scan_column(s.counters, count, bin, 0);
  scan_bins(s.bins, count, a.experts, a.base_block, s.scratch);
  sync_block();
  place_items(s.counters, count, pairs, bin_of, [&](int j, int expert, int offset) {
    const int pair = pair_at(a, s.order, j), place = (int)s.bins.start[expert] + offset;
    a.sorted_pairs[place] = pair;
    s.keys[place] = (uint32_t)expert << kSlotBits | s.slots[quotient(pair, a.top_k)];
    write_base_tile(a, s.bins, expert, offset);
  });
  write_counts(a, s.bins);
  if (!slots) return;
  sync_block();
  write_lora_tiles(a, s.keys, (int)s.bins.start[a.experts], s.heads, s.loras, s.scratch);
}

// ---- Large P -------------------------------------------------------------------------------------------------------

struct Workspace {
  uint32_t *pairs, *keys, *sorted_keys;  // [pairs]; the first two in slot order
  uint32_t* histogram;                   // [blocks][experts + 1]
};

HOST_DEVICE Workspace split_workspace(const MoeLoraAlign& a) {
  const int64_t pairs = (int64_t)a.tokens * a.top_k;
  return {a.workspace, a.workspace + pairs, a.workspace + 2 * pairs, a.workspace + 3 * pairs};
}

struct CountShared {
  uint32_t *scratch, *slot_counters, *order, *histogram;
  Bins bins;
  int words;
};

HOST_DEVICE CountShared carve_count(const MoeLoraAlign& a, int tokens_per_block, int warps, uint32_t* base) {
  Carver carver{base};
  CountShared s;
  s.scratch = carver.take(kScratchWords);
  s.slot_counters = carver.take(warps * (a.slots + 1));
  s.bins = {carver.take(a.slots + 1), carver.take(a.slots + 1), carver.take(a.slots + 1)};
  s.order = carver.take(tokens_per_block);
  s.histogram = carver.take(a.experts + 1);
  s.words = carver.words;
  return s;
}

// This block's tokens in slot order -> their pairs and keys in that order, and how many of them each expert has.
KERNEL void __launch_bounds__(1024, 1) align_count(MoeLoraAlign a, int tokens_per_block) {
  SMEM_DECL;
  const CountShared s = carve_count(a, tokens_per_block, warps_per_block(), (uint32_t*)smem_);
  const Workspace w = split_workspace(a);
  const bool slots = has_slots(a);
  if (slots) fill_zero(s.slot_counters, warps_per_block() * (a.slots + 1));
  fill_zero(s.histogram, a.experts + 1);
  sync_block();
  const int first = (int)blockIdx.x * tokens_per_block;
  const Range places = {first, smaller(first + tokens_per_block, a.tokens)};
  order_tokens(a, s.slot_counters, s.bins, s.scratch, places, s.order, [&](int token) { return slot_bin(a, token); });

  const int count = (places.last - places.first) * a.top_k, offset = first * a.top_k;
  for (int j = thread_index(); j < count; j += (int)blockDim.x) {
    const int pair = pair_at(a, s.order, j), expert = expert_bin(a, pair);
    w.pairs[offset + j] = (uint32_t)pair;
    w.keys[offset + j] = (uint32_t)expert << kSlotBits | (uint32_t)(slots ? slot_bin(a, quotient(pair, a.top_k)) : 0);
    atomic_add(&s.histogram[expert], 1);
  }
  sync_block();
  uint32_t* row = w.histogram + (int64_t)blockIdx.x * (a.experts + 1);
  for (int bin = thread_index(); bin <= a.experts; bin += (int)blockDim.x) row[bin] = s.histogram[bin];
}

struct PlaceShared {
  uint32_t *scratch, *counters, *before;
  Bins bins;
  int words;
};

HOST_DEVICE PlaceShared carve_place(const MoeLoraAlign& a, int warps, uint32_t* base) {
  const int bins = a.experts + 1;
  Carver carver{base};
  PlaceShared s;
  s.scratch = carver.take(kScratchWords);
  s.counters = carver.take(warps * bins);
  s.before = carver.take(bins);
  s.bins = {carver.take(bins), carver.take(bins), carver.take(bins)};
  s.words = carver.words;
  return s;
}

KERNEL void __launch_bounds__(1024, 1) align_place(MoeLoraAlign a, int tokens_per_block) {
  SMEM_DECL;
  const PlaceShared s = carve_place(a, warps_per_block(), (uint32_t*)smem_);
  const Workspace w = split_workspace(a);
  const int bins = a.experts + 1, lane = lane_index();
  fill_zero(s.counters, warps_per_block() * bins);
  fill_zero(s.before, bins);
  fill_zero(s.bins.rows, bins);
  sync_block();
  for (int row = warp_index(); row < (int)gridDim.x; row += warps_per_block()) {
    const uint32_t* found = w.histogram + (int64_t)row * bins;
    for (int bin = lane; bin < bins; bin += 32) {
      const uint32_t value = found[bin];
      if (value == 0) continue;
      atomic_add(&s.bins.rows[bin], value);
      if (row < (int)blockIdx.x) atomic_add(&s.before[bin], value);
    }
  }
  const int first = (int)blockIdx.x * tokens_per_block * a.top_k;
  const int count = smaller(tokens_per_block * a.top_k, a.tokens * a.top_k - first);
  const auto bin_of = [&](int j) { return (int)(w.keys[first + j] >> kSlotBits); };
  count_items(s.counters, bins, count, bin_of);
  sync_block();
  const Range own = thread_bins(bins);
  for (int bin = own.first; bin < own.last; bin++) scan_column(s.counters, bins, bin, s.before[bin]);
  scan_bins(s.bins, bins, a.experts, a.base_block, s.scratch);
  sync_block();
  place_items(s.counters, bins, count, bin_of, [&](int j, int expert, int offset) {
    const int place = (int)s.bins.start[expert] + offset;
    a.sorted_pairs[place] = (int32_t)w.pairs[first + j];
    w.sorted_keys[place] = w.keys[first + j];
    write_base_tile(a, s.bins, expert, offset);
  });
  if (blockIdx.x == 0) write_counts(a, s.bins);
}

KERNEL void __launch_bounds__(1024, 1) align_lora_tiles(MoeLoraAlign a, int masks_in_shared) {
  SMEM_DECL;
  const Workspace w = split_workspace(a);
  uint32_t* scratch = (uint32_t*)smem_;
  uint32_t* masks = masks_in_shared ? scratch + kScratchWords : w.pairs;  // pairs are done with
  write_lora_tiles(a, w.sorted_keys, a.counts[0], masks, masks + a.tokens * a.top_k / 32 + 1, scratch);
}

// Fewer warps where the bins of each would not fit.
int fit_threads(int threads, int bins) {
  while (threads > 256 && threads / 32 * bins * 4 > kCounterBytes) threads /= 2;
  return threads;
}

int launch_large(const MoeLoraAlign& a, const MoeLoraAlignPlan& plan, void* stream) {
  const int pairs = a.tokens * a.top_k;
  int blocks = smaller(ceil_div(pairs, plan.pairs_per_block), kMaxRows);
  if (ceil_div(pairs, blocks) > kMaxPairsPerBlock) blocks = ceil_div(pairs, kMaxPairsPerBlock);
  const int tokens_per_block = ceil_div(a.tokens, blocks);
  blocks = ceil_div(a.tokens, tokens_per_block);

  int threads = fit_threads(plan.threads, a.slots + 1);
  int error = launch(align_count, blocks, threads, 4 * carve_count(a, tokens_per_block, threads / 32, nullptr).words, stream, a, tokens_per_block);
  if (error) return error;
  threads = fit_threads(plan.threads, a.experts + 1);
  error = launch(align_place, blocks, threads, 4 * carve_place(a, threads / 32, nullptr).words, stream, a, tokens_per_block);
  if (error || a.token_slots == nullptr || a.slots == 0) return error;
  const int64_t shared = 4 * (kScratchWords + 2 * (int64_t)(pairs / 32 + 1));
  const bool fits = shared <= kSharedBytes;
  return launch(align_lora_tiles, 1, plan.threads, fits ? (size_t)shared : 4 * kScratchWords, stream, a, (int)fits);
}

}  // namespace

extern "C" MoeLoraAlignPlan moe_lora_align_default_plan() { return {4096, 1024, 1024}; }

extern "C" int64_t moe_lora_align_workspace(int64_t pairs, int64_t experts) { return 3 * pairs + (kMaxRows + pairs / kMaxPairsPerBlock) * (experts + 1); }

extern "C" int moe_lora_align(const MoeLoraAlign* arguments, MoeLoraAlignPlan plan, void* stream) {
  const MoeLoraAlign& a = *arguments;
  const int pairs = a.tokens * a.top_k;
  const int threads = fit_threads(pairs <= 256 ? 256 : pairs <= 512 ? 512 : 1024, a.experts + 1);
  const size_t shared = 4 * (size_t)carve_one_block(a, threads / 32, nullptr).words;
  if (pairs == 0 || (pairs <= plan.one_block_pairs && shared <= kSharedBytes)) return launch(align_one_block, 1, threads, shared, stream, a);
  return launch_large(a, plan, stream);
}
