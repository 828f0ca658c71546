// moe_lora_align_block_size: stable counting sorts by block_rank.cuh.
//
// Small P, one launch of one block: two digits, least significant first. Slots belong to tokens, so the M tokens are ranked by slot, then
// the pairs, visited in that order, by expert. The groups (expert, slot) are then found as heads in the sorted keys.
//
// Larger P, few groups, so that each can have a counter: a bin is a group. One launch of a cluster, whose blocks read each other's counts,
// or two: (1) count groups per block; (2) every block sums the counts of all blocks by itself, places its pairs and cuts both kinds of
// tiles. The base alignment is the case of one group an expert.
//
// Larger P, many groups (there may be 263,000, with 64 in use), three launches: (1) and (2) with experts for bins; (3) one block an expert
// ranks its run by slot and cuts the lora tiles; the number of tiles of lower experts comes from their blocks through published words.
#include "moe_lora_align.h"

#include "block_rank.cuh"
#include "hopper_prims.cuh"

namespace {

constexpr int kMaxOneBlockPairs = 1024;   // a thread each
constexpr int kMaxBlocks = 128;           // of (1) and (2), as long as none gets more than:
constexpr int kMaxPairsPerBlock = 8191;   // so that the counts of eight blocks add up in 16 bits
constexpr size_t kSharedBytes = 99 * 1024;  // what every GPU from sm_80 on grants a block
constexpr int kSlotBits = 9;              // a key is expert << 9 | slot + 1, with slot + 1 <= 256
constexpr int kTokenBits = 10;            // of a token of one block
constexpr uint32_t kSlotMask = (1u << kSlotBits) - 1;
constexpr uint32_t kNoKey = 1u << 31;     // equals no key and has no slot
constexpr uint32_t kPublished = 1u << 31; // marks a published number of tiles

struct Problem {
  MoeLoraAlign a;
  int pairs, has_slots;
  int token_rows, log_lanes;  // of align_one_block: rows of its table of slots; lanes that order one token, 0 = by a ranking pass
  int groups;                 // of an expert that are bins: slots + 1, or 1 where slots are not told apart
  int bins;                   // experts * groups + 1: the last is for pairs without an expert
  Divider top_k, base_block, lora_block;
  Divider words;              // of a row of the histogram, two bins each
  uint32_t* histogram;        // [blocks][words]
  int parts, rows_per_part;   // its columns are summed in so many parts
  int clustered;              // the blocks are a cluster and read each other's counts
};

DEVICE int expert_bin(const Problem& p, int pair) {
  const int64_t id = p.a.ids_are_64bit ? ((const int64_t*)p.a.topk_ids)[pair] : (int64_t)((const int32_t*)p.a.topk_ids)[pair];
  return id >= 0 && id < p.a.experts ? (int)id : p.a.experts;
}

DEVICE int slot_bin(const Problem& p, int token) {
  const int slot = p.a.token_slots[token];
  return slot >= 0 && slot < p.a.slots ? slot + 1 : 0;
}

// Of a pair: the bin of its group, for an expert and a slot + 1.
DEVICE int group_bin(const Problem& p, int expert, int slot) { return expert * p.groups + (expert < p.a.experts ? slot : 0); }

// The base tile that ends with the pair at `offset` of the expert's run, if one does.
DEVICE void write_base_tile(const Problem& p, const Bins& bins, int expert, int offset) {
  if (expert >= p.a.experts) return;
  const Tile tile = tile_at(offset, (int)(bins.start[expert + 1] - bins.start[expert]), p.base_block);
  if (!tile.ends) return;
  int32_t* out = p.a.base_tiles + 3 * (int64_t)((int)bins.tile_start[expert] + tile.number);
  out[0] = expert;
  out[1] = (int)bins.start[expert] + offset + 1 - tile.rows;
  out[2] = tile.rows;
}

DEVICE void write_lora_tile(const Problem& p, int index, int expert, int slot, int position, int rows) {
  int32_t* out = p.a.lora_tiles + 4 * (int64_t)index;
  out[0] = expert;
  out[1] = slot;
  out[2] = position + 1 - rows;
  out[3] = rows;
}

// ---- One block -----------------------------------------------------------------------------------------------------

struct OneBlock {
  Table slots, experts;
  Bins bins;  // of either pass
  uint32_t *heads, *tiles, *order, *keys;
  uint32_t* slot_key;  // slot + 1 << kTokenBits | token, of each token
  uint16_t* expert_of;
  int words;
};

HOST_DEVICE OneBlock carve_one_block(const Problem& p, int rows, uint32_t* base) {
  Carver carver{base};
  OneBlock s;
  s.experts = carver.take_table(rows, p.a.experts + 1);
  s.slots = p.has_slots ? carver.take_table(p.token_rows, p.a.slots + 1) : Table{};
  s.bins = carver.take_bins(larger(p.a.experts, p.a.slots) + 1);
  s.heads = carver.take(rows + 1);
  s.tiles = carver.take(rows);
  s.order = carver.take(p.a.tokens);
  s.keys = carver.take(p.pairs + 1);
  s.slot_key = carver.take(p.a.tokens);
  s.expert_of = (uint16_t*)carver.take((p.pairs + 1) / 2);
  s.words = carver.words;
  return s;
}

// s.order = the tokens by (slot, token). Every thread calls; a barrier at the end.
DEVICE void order_tokens(const Problem& p, const OneBlock& s) {
  const int token = thread_index();
  const Ranked item = count_row(s.slots, warp_index(), token < p.a.tokens ? (int)(s.slot_key[token] >> kTokenBits) : -1);
  sync_block();
  scan_columns(s.slots, [&](int bin, uint32_t items) { s.bins.rows[bin] = items; });
  sync_block();
  scan_bins(s.bins, p.a.slots + 1, {0, 0}, p.lora_block);
  sync_block();
  if (item.bin >= 0) s.order[s.bins.start[item.bin] + rank_in_block(s.slots, warp_index(), item)] = (uint32_t)token;
  sync_block();
}

// The same by comparing every token with every other: 2 to 32 lanes a token (1 << log_lanes). Shorter than a ranking pass while there are few.
DEVICE void order_few_tokens(const Problem& p, const OneBlock& s) {
  const int lanes = 1 << p.log_lanes, part = thread_index() & (lanes - 1), token = thread_index() >> p.log_lanes;
  const uint32_t own = token < p.a.tokens ? s.slot_key[token] : 0;
  uint32_t lower = 0;
#pragma unroll 4
  for (int other = part; other < p.a.tokens; other += lanes) lower += s.slot_key[other] < own;
  FEW_ROUNDS
  for (int mask = 1; mask < lanes; mask *= 2) lower += shuffle_xor(lower, mask);
  if (part == 0 && token < p.a.tokens) s.order[lower] = (uint32_t)token;
  sync_block();
}

// lora_tiles and counts[2..3] from the sorted keys. Position `valid` counts as a head, so that every group has a successor.
DEVICE void write_lora_tiles(const Problem& p, const OneBlock& s, int valid) {
  const int own = warp_index(), rows = warps_per_block(), lane = lane_index(), position = thread_index();
  const uint32_t key = position < valid ? s.keys[position] : kNoKey;
  const uint32_t previous = position > 0 && position <= valid ? s.keys[position - 1] : kNoKey;
  const uint32_t heads = warp_ballot(key != previous), loras = warp_ballot((key & kSlotMask) != 0);
  if (lane == 0) s.heads[own] = heads;
  if (thread_index() == 0) s.heads[rows] = 1;  // position 32 * rows, if all are valid
  sync_block();

  const int head_row = lane < own && s.heads[lane] ? lane : -1;  // a row of an earlier warp: there are at most 32
  const int last_head = warp_max(head_row < 0 ? -1 : head_row * 32 + highest_bit(s.heads[head_row]));
  const uint32_t upto = heads & lanes_upto(), next = s.heads[own + 1];
  const int offset = position - (upto ? own * 32 + highest_bit(upto) : last_head);
  const bool last_of_group = lane < 31 ? heads >> (lane + 1) & 1 : next & 1;
  const Tile tile = tile_at(offset, last_of_group ? offset + 1 : -1, p.lora_block);
  const uint32_t ends = warp_ballot((loras >> lane & 1) != 0 && tile.ends), groups = (uint32_t)count_bits(heads & loras);
  if (lane == 0) s.tiles[own] = (uint32_t)count_bits(ends) | groups << 16;
  sync_block();

  const uint32_t lower = warp_sum(lane < own ? s.tiles[lane] : 0);
  const int index = (int)(lower & 0xffff);
  if (ends >> lane & 1) write_lora_tile(p, index + count_bits(ends & lanes_below()), (int)(key >> kSlotBits), (int)(key & kSlotMask) - 1, position, tile.rows);
  if (own == rows - 1 && lane == 0) {
    p.a.counts[2] = index + count_bits(ends);
    p.a.counts[3] = (int32_t)((lower >> 16) + groups);
  }
}

KERNEL void __launch_bounds__(1024, 1) align_one_block(Problem p) {
  SMEM_DECL;
  const int row = warp_index(), place = thread_index(), experts = p.a.experts;
  const OneBlock s = carve_one_block(p, warps_per_block(), (uint32_t*)smem_);
  clear(s.experts);
  if (p.has_slots) clear(s.slots);
  if (p.a.told && place == 0) publish(p.a.told, 1), observe(p.a.told);  // it is there before a later kernel may begin
  wait_for_previous_kernel();
  allow_next_kernel();  // after the wait, as in align_groups
  int pair = place, expert = place < p.pairs ? expert_bin(p, place) : -1, slot = p.has_slots && place < p.a.tokens ? slot_bin(p, place) : 0;
  if (p.has_slots) {
    if (place < p.pairs) s.expert_of[place] = (uint16_t)expert;
    if (place < p.a.tokens) s.slot_key[place] = (uint32_t)slot << kTokenBits | (uint32_t)place;
  }
  sync_block();
  if (p.has_slots && p.log_lanes > 0) order_few_tokens(p, s);
  else if (p.has_slots) order_tokens(p, s);
  if (p.has_slots && place < p.pairs) {  // the pair at this place when tokens are in order
    const int in_order = place / p.top_k, token = (int)s.order[in_order];
    pair += (token - in_order) * p.a.top_k;
    expert = s.expert_of[pair];
    slot = (int)(s.slot_key[token] >> kTokenBits);
  }
  const Ranked item = count_row(s.experts, row, expert);
  sync_block();
  scan_columns(s.experts, [&](int bin, uint32_t items) { s.bins.rows[bin] = items; });
  sync_block();
  scan_bins(s.bins, experts + 1, {0, experts}, p.base_block);
  sync_block();
  if (place == 0) {
    p.a.counts[0] = (int32_t)s.bins.start[experts];
    p.a.counts[1] = (int32_t)s.bins.tile_start[experts];
    if (!p.has_slots) p.a.counts[2] = p.a.counts[3] = 0;
  }
  if (item.bin >= 0) {
    const int offset = rank_in_block(s.experts, row, item), sorted = (int)s.bins.start[expert] + offset;
    p.a.sorted_pairs[sorted] = pair;
    s.keys[sorted] = (uint32_t)expert << kSlotBits | (uint32_t)slot;
    write_base_tile(p, s.bins, expert, offset);
  }
  if (!p.has_slots && !p.a.told) return;
  sync_block();
  if (p.a.told && place == 0) publish(p.a.told, 0);
  if (p.has_slots) write_lora_tiles(p, s, p.pairs - (int)s.bins.rows[experts]);
}

// ---- Several blocks ------------------------------------------------------------------------------------------------

HOST_DEVICE int64_t histogram_words(int64_t pairs, int64_t experts) { return (kMaxBlocks + pairs / (kMaxPairsPerBlock + 1)) * (experts + 1); }

// (1) histogram[block][bin], 16 bits each
KERNEL void __launch_bounds__(1024, 1) align_count(Problem p, int pairs_per_block) {
  SMEM_DECL;
  uint32_t* counts = (uint32_t*)smem_;
  const int words = (int)p.words.by, first = (int)blockIdx.x * pairs_per_block, last = smaller(first + pairs_per_block, p.pairs);
  fill_zero(counts, words);
  sync_block();
  wait_for_previous_kernel();
  allow_next_kernel();
  FEW_ROUNDS
  for (int pair = first + thread_index(); pair < last; pair += (int)blockDim.x) {
    const int slot = p.groups > 1 ? slot_bin(p, pair / p.top_k) : 0, bin = group_bin(p, expert_bin(p, pair), slot);
    atomic_add(&counts[bin / 2], bin % 2 ? 1u << 16 : 1u);
  }
  sync_block();
  uint32_t* row = p.histogram + (int64_t)blockIdx.x * words;
  FEW_ROUNDS
  for (int word = thread_index(); word < words; word += (int)blockDim.x) row[word] = counts[word];
}

// all[bin] += items of the bin, before[bin] += those of them in earlier blocks; word(row, column) of the histogram has two bins. LOADS are
// under way before the first is used.
template <int LOADS, class Word>
DEVICE void sum_histogram(const Problem& p, uint32_t* all, uint32_t* before, Word word) {
  const int own = (int)blockIdx.x;
  FEW_ROUNDS
  for (int item = thread_index(); item < (int)p.words.by * p.parts; item += (int)blockDim.x) {
    const int part = item / p.words, column = item - part * (int)p.words.by, last = smaller((part + 1) * p.rows_per_part, (int)gridDim.x);
    uint32_t low = 0, high = 0, low_before = 0, high_before = 0;
    FEW_ROUNDS
    for (int row = part * p.rows_per_part; row < last; row += LOADS) {
      uint32_t found[LOADS], both = 0, both_before = 0;  // two bins at once, as they lie there
#pragma unroll
      for (int i = 0; i < LOADS; i++) found[i] = row + i < last ? word(row + i, column) : 0;
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        both += found[i];
        if (row + i < own) both_before += found[i];
      }
      low += both & 0xffff, high += both >> 16;
      low_before += both_before & 0xffff, high_before += both_before >> 16;
    }
    if (low) atomic_add(&all[2 * column], low);
    if (high) atomic_add(&all[2 * column + 1], high);
    if (low_before) atomic_add(&before[2 * column], low_before);
    if (high_before) atomic_add(&before[2 * column + 1], high_before);
  }
}

// ---- Few groups ----------------------------------------------------------------------------------------------------

struct Groups {
  Table table;
  uint32_t* first;  // [bins] items; then, with slots, where the group begins in its expert's run
  uint32_t* next;   // [bins] items in earlier blocks
  uint16_t* own;    // [bins] items in this one, for others of its cluster
  uint32_t* tile;   // [bins] lora tiles of lower slots of the expert
  Bins experts;     // runs and base tiles
  Bins lora;        // rows and start: lora tiles of the expert and of lower ones
  uint32_t* found;  // groups with a slot that have items
  int words;
};

HOST_DEVICE Groups carve_groups(const Problem& p, int rows, bool slots, uint32_t* base) {
  Carver carver{base};
  Groups s = {};
  s.table = carver.take_table(rows, p.bins);
  s.first = carver.take(p.bins + 1);  // an even number, as the histogram's
  s.next = carver.take(p.bins + 1);
  s.own = (uint16_t*)carver.take(p.clustered ? (int)p.words.by : 0);
  s.experts = carver.take_bins(p.a.experts + 1);
  if (slots) {
    s.tile = carver.take(p.bins);
    s.lora = carver.take_bins(p.a.experts + 1);
    s.found = carver.take(1);
  } else {
    s.experts.rows = s.first;
  }
  s.words = carver.words;
  return s;
}

// From the groups' items: their places in the experts' runs, and the runs. A thread owns an expert.
DEVICE void add_groups(const Problem& p, const Groups& s) {
  constexpr int kBatch = 5;  // groups in registers
  uint32_t found = 0;
  FEW_ROUNDS
  for (int expert = thread_index(); expert <= p.a.experts; expert += (int)blockDim.x) {
    const int base = expert * p.groups, groups = expert < p.a.experts ? p.groups : 1;
    uint32_t rows = 0, tiles = 0;
    FEW_ROUNDS
    for (int slot = 0; slot < groups; slot += kBatch) {
      uint32_t own[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) own[i] = slot + i < groups ? s.first[base + slot + i] : 0;
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        if (slot + i < groups) {
          s.first[base + slot + i] = rows;
          s.tile[base + slot + i] = tiles;
        }
        rows += own[i];
        if (slot + i > 0) tiles += (uint32_t)(((int)(own[i] + p.lora_block.by) - 1) / p.lora_block);
        found += slot + i > 0 && own[i] > 0;
      }
    }
    s.experts.rows[expert] = rows;
    s.lora.rows[expert] = tiles;
  }
  found = warp_sum(found);
  if (lane_index() == 0 && found) atomic_add(s.found, found);
}

template <bool SLOTS>
DEVICE void put_pair(const Problem& p, const Groups& s, int pair, int expert, int slot, int row, const Ranked& item) {
  const int in_group = (int)s.next[item.bin] + rank_in_block(s.table, row, item);
  const int group = SLOTS ? (int)s.first[item.bin] : 0, offset = group + in_group, place = (int)s.experts.start[expert] + offset;
  p.a.sorted_pairs[place] = pair;
  write_base_tile(p, s.experts, expert, offset);
  if (!SLOTS || slot == 0 || expert == p.a.experts) return;
  const int end = slot < p.a.slots ? (int)s.first[item.bin + 1] : (int)s.experts.rows[expert];
  const Tile tile = tile_at(in_group, end - group, p.lora_block);
  if (tile.ends) write_lora_tile(p, (int)(s.lora.start[expert] + s.tile[item.bin]) + tile.number, expert, slot - 1, place, tile.rows);
}

// (2), or all there is if a cluster has all pairs. No block has more pairs than threads.
template <bool SLOTS>
KERNEL void __launch_bounds__(1024, 1) align_groups(Problem p, int pairs_per_block, int rows) {
  SMEM_DECL;
  const Groups s = carve_groups(p, rows, SLOTS, (uint32_t*)smem_);
  const int experts = p.a.experts, row = warp_index(), pair = (int)blockIdx.x * pairs_per_block + thread_index();
  const bool live = thread_index() < pairs_per_block && pair < p.pairs;
  clear(s.table);
  fill_zero(s.first, 2 * (p.bins + 1));  // and next
  if (SLOTS) fill_zero(s.found, 1);
  sync_block();
  if (p.clustered) wait_for_previous_kernel();
  // Not before a wait, here or in (1): the next may read what this one's inputs were made with before it waits itself.
  allow_next_kernel();
  const int expert = live ? expert_bin(p, pair) : experts, slot = SLOTS && live ? slot_bin(p, pair / p.top_k) : 0;
  Ranked item = {-1, 0};
  if (row < rows) item = count_row(s.table, row, live ? group_bin(p, expert, slot) : -1);
  sync_block();
  scan_columns(s.table, [&](int bin, uint32_t items) {
    if (p.clustered) s.own[bin] = (uint16_t)items;
  });
  if (p.clustered) {
    sync_cluster();
    sum_histogram<8>(p, s.first, s.next, [&](int row, int column) { return load_word_of((const uint32_t*)s.own + column, row); });
    arrive_at_cluster();
  } else {  // what needs no other block's counts came before the wait
    wait_for_previous_kernel();
    sum_histogram<SLOTS ? 16 : 8>(p, s.first, s.next, [&](int row, int column) { return p.histogram[row * (int)p.words.by + column]; });
  }
  sync_block();
  if (SLOTS) {
    add_groups(p, s);
    sync_block();
    const int half = warps_per_block() / 2;
    const bool lora = warp_index() >= half;
    const Bins bins = {lora ? s.lora.rows : s.experts.rows, lora ? s.lora.start : s.experts.start, lora ? s.lora.tile_start : s.experts.tile_start};
    scan_bins(bins, experts + 1, {0, lora ? 0 : experts}, p.base_block, warp_index() - (lora ? half : 0), half);
  } else {
    scan_bins(s.experts, experts + 1, {0, experts}, p.base_block);
  }
  sync_block();
  if (blockIdx.x == 0 && thread_index() == 0) {
    p.a.counts[0] = (int32_t)s.experts.start[experts];
    p.a.counts[1] = (int32_t)s.experts.tile_start[experts];
    p.a.counts[2] = SLOTS ? (int32_t)s.lora.start[experts] : 0;
    p.a.counts[3] = SLOTS ? (int32_t)*s.found : 0;
  }
  if (item.bin >= 0) put_pair<SLOTS>(p, s, pair, expert, slot, row, item);
  if (p.clustered) {
    sync_warp();
    wait_for_cluster();  // until nobody reads what lies here
  }
}

// ---- Many groups, several blocks -----------------------------------------------------------------------------------

struct Workspace {
  uint32_t *pairs, *slots;  // [pairs] by (expert, pair); slots: slot + 1 of the pair
  uint32_t* tiles;          // [experts] kPublished | lora tiles
  uint32_t* start;          // [experts + 1]; the histogram follows
};

DEVICE Workspace split_workspace(const Problem& p) {
  Workspace w;
  w.pairs = p.a.workspace;
  w.slots = w.pairs + p.pairs;
  w.tiles = w.slots + p.pairs;
  w.start = w.tiles + p.a.experts;
  return w;
}

struct Placing {  // shared memory of (2) and (3)
  Table table;
  Bins bins;
  uint32_t* next;    // place of the bin's next item
  uint32_t* count;   // items of the bin in the round under way
  uint32_t* totals;  // [3]
  int words;
};

HOST_DEVICE Placing carve_placing(int bins, int rows, uint32_t* base) {
  Carver carver{base};
  Placing s;
  s.table = carver.take_table(rows, bins);
  s.bins = carver.take_bins(bins + 1);  // an even number at least, as the histogram's
  s.next = carver.take(bins + 1);
  s.count = carver.take(bins);
  s.totals = carver.take(3);
  s.words = carver.words;
  return s;
}

// The items after the first blockDim.x, a block's worth at a time: put(item, bin, place), stable. The first have taken their places, counted
// from next[bin]; count[bin] of them. Every thread calls.
template <class BinOf, class Put>
DEVICE void place_rest(const Placing& s, int bins, int items, BinOf bin_of, Put put) {
  FEW_ROUNDS
  for (int base = (int)blockDim.x; base < items; base += (int)blockDim.x) {
    sync_block();  // all have read next and the table
    clear(s.table);
    FEW_ROUNDS
    for (int bin = thread_index(); bin < bins; bin += (int)blockDim.x) s.next[bin] += s.count[bin];
    sync_block();
    const int i = base + thread_index(), bin = i < items ? bin_of(i) : -1;
    const Ranked item = count_row(s.table, warp_index(), bin);
    sync_block();
    scan_columns(s.table, [&](int b, uint32_t count) { s.count[b] = count; });
    sync_block();
    if (bin >= 0) put(i, bin, (int)s.next[bin] + rank_in_block(s.table, warp_index(), item));
  }
}

// (2) pairs and slots by (expert, pair); base tiles; counts[0..1]
KERNEL void __launch_bounds__(1024, 1) align_place(Problem p, int pairs_per_block) {
  SMEM_DECL;
  const int bins = p.a.experts + 1, first = (int)blockIdx.x * pairs_per_block, items = smaller(pairs_per_block, p.pairs - first);
  const Placing s = carve_placing(bins, warps_per_block(), (uint32_t*)smem_);
  const Workspace w = split_workspace(p);
  const auto bin_of = [&](int i) { return expert_bin(p, first + i); };
  const auto slot_of = [&](int i) { return p.has_slots ? slot_bin(p, (first + i) / p.top_k) : 0; };
  allow_next_kernel();
  clear(s.table);
  fill_zero(s.bins.rows, bins + 1);
  fill_zero(s.next, bins + 1);
  // What needs no other block's counts comes before the wait.
  const int own = thread_index(), bin = own < items ? bin_of(own) : -1, slot = own < items ? slot_of(own) : 0;
  sync_block();
  const Ranked item = count_row(s.table, warp_index(), bin);
  sync_block();
  scan_columns(s.table, [&](int b, uint32_t count) { s.count[b] = count; });
  wait_for_previous_kernel();
  sum_histogram<8>(p, s.bins.rows, s.next, [&](int row, int column) { return p.histogram[row * (int)p.words.by + column]; });
  sync_block();
  scan_bins(s.bins, bins, {0, p.a.experts}, p.base_block);
  sync_block();
  if (blockIdx.x == 0 && thread_index() == 0) {
    p.a.counts[0] = (int32_t)s.bins.start[p.a.experts];
    p.a.counts[1] = (int32_t)s.bins.tile_start[p.a.experts];
    p.a.counts[2] = p.a.counts[3] = 0;  // (3) adds
  }
  const auto put = [&](int i, int expert, int slot, int offset) {
    const int place = (int)s.bins.start[expert] + offset;
    if (p.has_slots && expert < p.a.experts) {
      w.pairs[place] = (uint32_t)(first + i);
      w.slots[place] = (uint32_t)slot;
    } else {
      p.a.sorted_pairs[place] = first + i;
    }
    write_base_tile(p, s.bins, expert, offset);
  };
  if (bin >= 0) put(own, bin, slot, (int)s.next[bin] + rank_in_block(s.table, warp_index(), item));
  if (blockIdx.x == 0) {
    FEW_ROUNDS
    for (int b = thread_index(); b < bins; b += (int)blockDim.x) {
      w.start[b] = s.bins.start[b];
      if (b < p.a.experts) w.tiles[b] = 0;
    }
  }
  place_rest(s, bins, items, bin_of, [&](int i, int expert, int offset) { put(i, expert, slot_of(i), offset); });
}

// (3) one block an expert: its run by slot; lora tiles; counts[2..3]
KERNEL void __launch_bounds__(1024, 1) align_slots(Problem p) {
  SMEM_DECL;
  const int bins = p.a.slots + 1, expert = (int)blockIdx.x;
  const Placing s = carve_placing(bins, warps_per_block(), (uint32_t*)smem_);
  const Workspace w = split_workspace(p);
  allow_next_kernel();
  clear(s.table);
  fill_zero(s.bins.rows, bins);
  fill_zero(s.totals, 3);
  sync_block();
  wait_for_previous_kernel();
  const int start = (int)w.start[expert], items = (int)w.start[expert + 1] - start, own = thread_index();
  const uint32_t *slots = w.slots + start, *pairs = w.pairs + start;
  const int bin = own < items ? (int)slots[own] : -1, pair = own < items ? (int)pairs[own] : 0;
  FEW_ROUNDS
  for (int i = own + (int)blockDim.x; i < items; i += (int)blockDim.x) atomic_add(&s.bins.rows[slots[i]], 1);
  const Ranked item = count_row(s.table, warp_index(), bin);
  sync_block();
  scan_columns(s.table, [&](int b, uint32_t count) {
    s.bins.rows[b] += count;
    s.count[b] = count;
  });
  sync_block();
  scan_bins(s.bins, bins, {1, bins}, p.lora_block);
  sync_block();
  if (thread_index() == 0) {
    const uint32_t last = s.bins.rows[bins - 1], own_tiles = s.bins.tile_start[bins - 1] + (uint32_t)(((int)(last + p.lora_block.by) - 1) / p.lora_block);
    publish(&w.tiles[expert], kPublished | own_tiles);
    s.totals[2] = own_tiles;
  }
  uint32_t groups = 0, tiles = 0;
  FEW_ROUNDS
  for (int b = thread_index(); b < bins; b += (int)blockDim.x) {
    s.next[b] = s.bins.start[b];
    groups += b > 0 && s.bins.rows[b] > 0;
  }
  FEW_ROUNDS
  for (int lower = thread_index(); lower < expert; lower += (int)blockDim.x) {
    uint32_t word = observe(&w.tiles[lower]);
    while (word == 0) word = observe(&w.tiles[lower]);
    tiles += word & ~kPublished;
  }
  groups = warp_sum(groups);
  tiles = warp_sum(tiles);
  if (lane_index() == 0 && groups) atomic_add(&s.totals[0], groups);
  if (lane_index() == 0 && tiles) atomic_add(&s.totals[1], tiles);
  sync_block();
  const int lower_tiles = (int)s.totals[1];
  if (thread_index() == 0) {
    if (s.totals[0]) atomic_add((uint32_t*)&p.a.counts[3], s.totals[0]);
    if (expert == p.a.experts - 1) p.a.counts[2] = lower_tiles + (int)s.totals[2];
  }
  const auto put = [&](int pair, int slot, int place) {
    p.a.sorted_pairs[start + place] = pair;
    const Tile tile = tile_at(place - (int)s.bins.start[slot], (int)s.bins.rows[slot], p.lora_block);
    if (slot > 0 && tile.ends) write_lora_tile(p, lower_tiles + (int)s.bins.tile_start[slot] + tile.number, expert, slot - 1, start + place, tile.rows);
  };
  if (bin >= 0) put(pair, bin, (int)s.next[bin] + rank_in_block(s.table, warp_index(), item));
  place_rest(s, bins, items, [&](int i) { return (int)slots[i]; }, [&](int i, int slot, int place) { put((int)pairs[i], slot, place); });
}

struct Cut {
  int blocks, pairs_per_block;
};

// Few pairs a block shorten its work, many blocks lengthen the sum over their histograms: both are instructions, of which a multiprocessor
// issues few; measured on an H200.
Cut cut_pairs(const Problem& p, const MoeLoraAlignPlan& plan) {
  const int by_pairs = p.pairs <= 1024 ? 128 : p.pairs <= 8192 ? 256 : p.pairs <= 32768 ? 512 : 1024;
  const int wanted = plan.pairs_per_block > 0 ? plan.pairs_per_block : by_pairs;
  int blocks = smaller(ceil_div(p.pairs, wanted), kMaxBlocks);
  if (ceil_div(p.pairs, blocks) > kMaxPairsPerBlock) blocks = ceil_div(p.pairs, kMaxPairsPerBlock);
  const int pairs_per_block = ceil_div(p.pairs, blocks);
  return {ceil_div(p.pairs, pairs_per_block), pairs_per_block};
}

// Bins are the groups of so many of an expert; `histogram` for several blocks, whose sum has so many threads.
void choose_bins(Problem& p, int groups, uint32_t* histogram, int blocks, unsigned threads) {
  p.groups = groups;
  p.bins = p.a.experts * groups + 1;
  p.words = make_divider((p.bins + 1) / 2);
  p.histogram = histogram;
  p.parts = larger(1, (int)(threads / p.words.by));
  p.rows_per_part = ceil_div(blocks, p.parts);
}

constexpr int kDoesNotFit = -1;

// Groups for bins: one cluster, or two launches.
template <bool SLOTS>
int launch_groups(Problem p, const MoeLoraAlignPlan& plan, void* stream) {
  const int groups = SLOTS ? p.a.slots + 1 : 1, words = (p.a.experts * groups + 2) / 2;
  const int most_bins = plan.most_bins >= 0 ? plan.most_bins : p.pairs <= 8192 ? 4096 : 1024;
  Cut cut = cut_pairs(p, plan);
  p.clustered = p.pairs <= plan.cluster_pairs && can_overlap();  // which says Hopper or newer
  if (p.clustered) {
    cut.blocks = smaller(most_of_cluster(), power_of_two(cut.blocks));
    cut.pairs_per_block = ceil_div(p.pairs, cut.blocks);
  }
  if (cut.pairs_per_block > 1024 || (SLOTS && p.a.experts * groups > most_bins)) return kDoesNotFit;
  if ((int64_t)cut.blocks * words > moe_lora_align_workspace(p.pairs, p.a.experts)) return kDoesNotFit;
  const int least = larger(128, power_of_two(cut.pairs_per_block)), rows = power_of_two(ceil_div(cut.pairs_per_block, 32));
  const unsigned threads = (unsigned)larger(least, smaller(512, power_of_two(words)));  // many bins have work for more threads than pairs
  choose_bins(p, groups, p.a.workspace, cut.blocks, threads);
  const size_t shared = 4 * (size_t)carve_groups(p, rows, SLOTS, nullptr).words;
  if (shared > kSharedBytes) return kDoesNotFit;
  const Launch how = {(unsigned)cut.blocks, threads, shared, stream, plan.overlap && can_overlap()};
  if (p.clustered) return launch_clusters(how, how.blocks, align_groups<SLOTS>, p, cut.pairs_per_block, rows);
  const int error = launch({how.blocks, (unsigned)least, 4 * (size_t)words, stream, how.overlap}, align_count, p, cut.pairs_per_block);
  return error ? error : launch(how, align_groups<SLOTS>, p, cut.pairs_per_block, rows);
}

int launch_one_block(Problem p, bool overlap, void* stream) {
  const int for_bins = smaller(256, 32 * ceil_div(p.a.experts + 1, 32));  // a warp for 32 of them
  const int threads = larger(larger(128, for_bins), power_of_two(p.pairs)), lanes = smaller(32, threads / power_of_two(p.a.tokens));
  p.token_rows = power_of_two(ceil_div(p.a.tokens, 32));
  while (2 << p.log_lanes <= lanes && p.a.tokens <= 16 * lanes) p.log_lanes++;
  const size_t shared = 4 * (size_t)carve_one_block(p, threads / 32, nullptr).words;
  return shared > kSharedBytes ? kDoesNotFit : launch({1, (unsigned)threads, shared, stream, overlap}, align_one_block, p);
}

int launch_blocks(Problem p, const MoeLoraAlignPlan& plan, bool overlap, void* stream) {
  const auto shared = [](int bins, unsigned threads) { return 4 * (size_t)carve_placing(bins, (int)threads / 32, nullptr).words; };
  const auto fit = [&](int items, int bins) {  // threads that cover the items, as far as the table fits
    unsigned threads = (unsigned)smaller(1024, larger(128, power_of_two(items)));
    while (threads > 128 && shared(bins, threads) > kSharedBytes) threads /= 2;
    return threads;
  };
  const Cut cut = cut_pairs(p, plan);
  unsigned threads = fit(cut.pairs_per_block, p.a.experts + 1);
  choose_bins(p, 1, p.a.workspace + 2 * (int64_t)p.pairs + 2 * p.a.experts + 1, cut.blocks, threads);
  int error = launch({(unsigned)cut.blocks, threads, 4 * (size_t)p.words.by, stream, overlap}, align_count, p, cut.pairs_per_block);
  if (error) return error;
  error = launch({(unsigned)cut.blocks, threads, shared(p.bins, threads), stream, overlap}, align_place, p, cut.pairs_per_block);
  if (error || !p.has_slots) return error;
  threads = fit(2 * p.pairs / p.a.experts, p.a.slots + 1);  // twice the mean run
  return launch({(unsigned)p.a.experts, threads, shared(p.a.slots + 1, threads), stream, overlap}, align_slots, p);
}

}  // namespace

extern "C" MoeLoraAlignPlan moe_lora_align_default_plan() { return {512, 4096, 0, 1, -1}; }

extern "C" int64_t moe_lora_align_workspace(int64_t pairs, int64_t experts) { return 2 * pairs + histogram_words(pairs, experts) + 2 * experts + 1; }

extern "C" int moe_lora_align(const MoeLoraAlign* arguments, MoeLoraAlignPlan plan, void* stream) {
  const MoeLoraAlign& a = *arguments;
  Problem p = {};
  p.a = a;
  p.pairs = a.tokens * a.top_k;
  p.has_slots = a.token_slots != nullptr && a.slots > 0;
  p.top_k = make_divider(larger(a.top_k, 1));
  p.base_block = make_divider(a.base_block);
  p.lora_block = make_divider(a.lora_block);
  const bool overlap = plan.overlap && can_overlap();
  const bool one_block = p.pairs <= smaller(plan.one_block_pairs, kMaxOneBlockPairs) || p.pairs == 0;
  int error = one_block ? launch_one_block(p, overlap, stream) : kDoesNotFit;
  if (p.a.told) return error;  // no other kernel sets the word, for which the next would wait for ever
  if (error == kDoesNotFit) error = p.has_slots ? launch_groups<true>(p, plan, stream) : launch_groups<false>(p, plan, stream);
  if (error == kDoesNotFit && p.pairs <= kMaxOneBlockPairs && plan.one_block_pairs > 0) error = launch_one_block(p, overlap, stream);
  return error == kDoesNotFit ? launch_blocks(p, plan, overlap, stream) : error;
}

#ifdef __CUDACC__
extern "C" const char* cuda_error_text(int code) { return cudaGetErrorString((cudaError_t)code); }
#else
extern "C" const char* cuda_error_text(int) { return "no CUDA: the emulator"; }
#endif
