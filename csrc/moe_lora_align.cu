// moe_lora_align_block_size: stable counting sorts, never a counter per (expert, slot), of which there may be 263,000 with 64 in use.
//
//   rank      One pass ranks items by bin inside a block: 32 consecutive items are a row of one warp; ballots find a lane's equals in
//             its row, their number goes into counters[row][bin], and a scan down each column gives what lies in the rows above.
//             An item's place = items of lower bins + equal items in earlier rows + equal items in lower lanes.
//   tiles     A run of rows is cut into tiles by the item that ends one: it knows its offset in the run. Number of the tile = tiles of
//             lower bins + offset / block.
//
// Small P, one launch of one block: two digits, least significant first. Slots belong to tokens, so the M tokens are ranked by slot,
// then the pairs, visited in that order, by expert. The groups (expert, slot) are then found as heads in the sorted keys.
//
// Large P, three launches: (1) count experts per block; (2) every block sums the counts of all blocks by itself and places its pairs by
// expert; (3) one block an expert ranks its run by slot and cuts the lora tiles; the number of tiles of lower experts comes from their
// blocks through published words. Without adapters the second launch is the last.
#include "moe_lora_align.h"

#include "prims.cuh"

namespace {

constexpr int kMaxOneBlockPairs = 4096;
constexpr int kMaxBlocks = 128;           // of (1) and (2), as long as none gets more than:
constexpr int kMaxPairsPerBlock = 8192;
constexpr int kSharedBytes = 96 * 1024;   // what every GPU from sm_80 on grants a block
constexpr int kRowsAtOnce = 8;            // of a column that one lane scans; the rows of a table are a multiple of it
constexpr int kSlotBits = 9;              // a key is expert << 9 | slot + 1, with slot + 1 <= 256
constexpr int kTokenBits = 12;            // of a token of the one-block kernel
constexpr uint32_t kSlotMask = (1u << kSlotBits) - 1;
constexpr uint32_t kNoKey = 1u << 31;     // equals no key and has no slot
constexpr uint32_t kPublished = 1u << 31; // marks a published number of tiles

struct Problem {
  MoeLoraAlign a;
  int pairs, has_slots;
  int token_rows, log_lanes;  // of the one-block kernel: rows of its table of slots; lanes that order one token, 0 = by a ranking pass
  Divider top_k, base_block, lora_block, bins;  // bins = experts + 1
};

HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
HOST_DEVICE int larger(int a, int b) { return a > b ? a : b; }
HOST_DEVICE int ceil_div(int value, int by) { return (value + by - 1) / by; }

DEVICE int expert_bin(const Problem& p, int pair) {
  const int64_t id = p.a.ids_are_64bit ? ((const int64_t*)p.a.topk_ids)[pair] : (int64_t)((const int32_t*)p.a.topk_ids)[pair];
  return id >= 0 && id < p.a.experts ? (int)id : p.a.experts;
}

DEVICE int slot_bin(const Problem& p, int token) {
  const int slot = p.a.token_slots[token];
  return slot >= 0 && slot < p.a.slots ? slot + 1 : 0;
}

// Loops that run once or twice: unrolled, the count of their rounds alone would cost a division.
#define FEW_ROUNDS _Pragma("unroll 1")

DEVICE void fill_zero(uint32_t* words, int count) {
  FEW_ROUNDS
  for (int i = thread_index(); i < count; i += (int)blockDim.x) words[i] = 0;
}

// ---- Ranking in a block --------------------------------------------------------------------------------------------

// counters[rows][bins] of 16 bits, in words of two bins; the odd number of words in a row spreads a column over the banks.
struct Table {
  uint32_t* words;
  int rows, width;  // width: words in a row
  int bins;
};

HOST_DEVICE int table_width(int bins) { return (bins + 1) / 2 | 1; }
HOST_DEVICE int table_rows(int rows) { return larger(rows, kRowsAtOnce); }

struct Bins {  // in shared memory
  uint32_t* rows;        // items of the bin
  uint32_t* start;       // items of lower bins
  uint32_t* tile_start;  // tiles of lower bins
};

struct alignas(16) Quad {
  uint32_t words[4];
};

DEVICE void clear(const Table& table) {  // rows are a multiple of 8 and tables lie first in shared memory: 16-byte stores
  FEW_ROUNDS
  for (int i = thread_index(); i < table.rows * table.width / 4; i += (int)blockDim.x) ((Quad*)table.words)[i] = {};
}

struct Ranked {
  int bin;     // -1: no item
  int before;  // equal items in lower lanes of the row
};

// Count a row's items; all lanes of the warp call. The table is zero before and complete after the next barrier.
DEVICE Ranked count_row(const Table& table, int row, int bin) {
  const uint32_t peers = equal_lanes((uint32_t)(bin < 0 ? table.bins : bin), highest_bit((uint32_t)table.bins) + 1), before = peers & lanes_below();
  if (bin >= 0 && before == 0) ((uint16_t*)(table.words + row * table.width))[bin] = (uint16_t)count_bits(peers);
  return {bin, count_bits(before)};
}

// Equal items in earlier rows and lower lanes, once the columns are scanned.
DEVICE int rank_in_block(const Table& table, int row, const Ranked& item) {
  return (int)((const uint16_t*)(table.words + row * table.width))[item.bin] + item.before;
}

// Each column becomes the sums of its lower rows; total(bin, items) receives every bin's number of items, from one thread.
// A column of two bins is scanned by rows / 8 neighbouring lanes, eight rows each.
template <class Total>
DEVICE void scan_columns(const Table& table, Total total) {
  const int parts = table.rows / kRowsAtOnce, log_parts = highest_bit((uint32_t)parts);
  FEW_ROUNDS
  for (int base = 0; base < table.width * parts; base += (int)blockDim.x) {  // the same number of rounds for all
    const int column = (base + thread_index()) >> log_parts, part = thread_index() & (parts - 1);
    uint32_t* words = table.words + part * kRowsAtOnce * table.width + column;
    uint32_t found[kRowsAtOnce], own = 0;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) found[i] = column < table.width ? words[i * table.width] : 0;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) own += found[i];
    uint32_t sum = own;
    FEW_ROUNDS
    for (int delta = 1; delta < parts; delta *= 2) {
      const uint32_t other = shuffle_up(sum, delta);
      if (part >= delta) sum += other;
    }
    if (column >= table.width) continue;
    uint32_t lower = sum - own;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      words[i * table.width] = lower;
      lower += found[i];
    }
    if (part == parts - 1) {
      if (2 * column < table.bins) total(2 * column, sum & 0xffff);
      if (2 * column + 1 < table.bins) total(2 * column + 1, sum >> 16);
    }
  }
}

struct Range {
  int first, last;
};

// start and tile_start from rows, by one warp. Bins in `tiled` are cut into tiles of `block`. Returns the number of tiles.
DEVICE uint32_t scan_bins(const Bins& bins, int count, Range tiled, Divider block) {
  constexpr int kBatch = 5;              // bins of a lane in registers; 128 experts and the bin after them take one batch
  const int span = ceil_div(count, 32) | 1;  // bins of a lane; odd, for the banks
  const int first = lane_index() * span, last = smaller(first + span, count);
  const auto load = [&](int base, uint32_t(&rows)[kBatch], uint32_t(&tiles)[kBatch]) {
#pragma unroll
    for (int i = 0; i < kBatch; i++) rows[i] = base + i < last ? bins.rows[base + i] : 0;
#pragma unroll
    for (int i = 0; i < kBatch; i++) tiles[i] = base + i >= tiled.first && base + i < tiled.last ? (uint32_t)(((int)(rows[i] + block.by) - 1) / block) : 0;
  };
  uint32_t rows[kBatch], tiles[kBatch], own_rows = 0, own_tiles = 0;
  FEW_ROUNDS
  for (int base = first; base < last; base += kBatch) {
    load(base, rows, tiles);
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      own_rows += rows[i];
      own_tiles += tiles[i];
    }
  }
  uint32_t rows_sum = own_rows, tiles_sum = own_tiles;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t other_rows = shuffle_up(rows_sum, delta), other_tiles = shuffle_up(tiles_sum, delta);
    if (lane_index() >= delta) {
      rows_sum += other_rows;
      tiles_sum += other_tiles;
    }
  }
  uint32_t start = rows_sum - own_rows, tile_start = tiles_sum - own_tiles;
  FEW_ROUNDS
  for (int base = first; base < last; base += kBatch) {
    if (span > kBatch) load(base, rows, tiles);  // else they are still there
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      if (base + i < last) {
        bins.start[base + i] = start;
        bins.tile_start[base + i] = tile_start;
      }
      start += rows[i];
      tile_start += tiles[i];
    }
  }
  return shuffle(tiles_sum, 31);
}

// Whether the item at `offset` of a run of `rows` ends a tile, and which.
struct Tile {
  bool ends;
  int number, rows;  // in the run; rows of the tile
};

DEVICE Tile tile_at(int offset, int rows, Divider block) {
  const int number = offset / block, in_block = offset - number * (int)block.by;
  return {in_block + 1 == (int)block.by || offset + 1 == rows, number, in_block + 1};
}

// The base tile that ends with the pair at `offset` of the expert's run, if one does.
DEVICE void write_base_tile(const Problem& p, const Bins& bins, int expert, int offset) {
  const Tile tile = tile_at(offset, (int)bins.rows[expert], p.base_block);
  if (!tile.ends || expert >= p.a.experts) return;
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

// Parts of shared memory, in words. The kernels and the launcher use the same functions, so that they cannot disagree.
struct Carver {
  uint32_t* base;
  int words = 0;
  HOST_DEVICE uint32_t* take(int count) {
    words += count;
    return base ? base + words - count : nullptr;
  }
  HOST_DEVICE Bins take_bins(int count) {
    uint32_t *rows = take(count), *start = take(count), *tile_start = take(count);
    return {rows, start, tile_start};
  }
  HOST_DEVICE Table take_table(int rows, int bins) { return {take(table_rows(rows) * table_width(bins)), table_rows(rows), table_width(bins), bins}; }
};

// ---- Small P -------------------------------------------------------------------------------------------------------

struct OneBlock {
  Table slots, experts;
  Bins bins;  // of either pass
  uint32_t *heads, *tiles, *order, *keys;
  uint32_t* slot_key;  // slot + 1 << kTokenBits | token, of each token
  uint16_t* expert_of;
  int words;
};

HOST_DEVICE int power_of_two(int least) {
  int power = 1;
  while (power < least) power *= 2;
  return power;
}

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
template <int ITEMS>
DEVICE void order_tokens(const Problem& p, const OneBlock& s) {
  const int first_row = warp_index() * ITEMS, lane = lane_index();
  Ranked item[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int token = (first_row + i) * 32 + lane;
    item[i] = count_row(s.slots, first_row + i, token < p.a.tokens ? (int)(s.slot_key[token] >> kTokenBits) : -1);
  }
  sync_block();
  scan_columns(s.slots, [&](int bin, uint32_t items) { s.bins.rows[bin] = items; });
  sync_block();
  if (warp_index() == 0) scan_bins(s.bins, p.a.slots + 1, {0, 0}, p.lora_block);
  sync_block();
#pragma unroll
  for (int i = 0; i < ITEMS; i++)
    if (item[i].bin >= 0) s.order[s.bins.start[item[i].bin] + rank_in_block(s.slots, first_row + i, item[i])] = (uint32_t)((first_row + i) * 32 + lane);
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
template <int ITEMS>
DEVICE void write_lora_tiles(const Problem& p, const OneBlock& s, int valid) {
  const int first_row = warp_index() * ITEMS, rows = warps_per_block() * ITEMS, lane = lane_index();
  uint32_t key[ITEMS], heads[ITEMS], loras[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int position = (first_row + i) * 32 + lane;
    key[i] = position < valid ? s.keys[position] : kNoKey;
    const uint32_t previous = position > 0 && position <= valid ? s.keys[position - 1] : kNoKey;
    heads[i] = warp_ballot(key[i] != previous);
    loras[i] = warp_ballot((key[i] & kSlotMask) != 0);
    if (lane == 0) s.heads[first_row + i] = heads[i];
  }
  if (thread_index() == 0) s.heads[rows] = 1;  // position 32 * rows, if all are valid
  sync_block();

  int last_head = -1;  // of the rows before this warp's
  FEW_ROUNDS
  for (int row = lane; row < first_row; row += 32)
    if (s.heads[row]) last_head = row * 32 + highest_bit(s.heads[row]);
  last_head = warp_max(last_head);
  Tile tile[ITEMS];
  uint32_t ends[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int position = (first_row + i) * 32 + lane;
    const uint32_t upto = heads[i] & lanes_upto(), next = s.heads[first_row + i + 1];
    const int offset = position - (upto ? (first_row + i) * 32 + highest_bit(upto) : last_head);
    const bool last_of_group = lane < 31 ? heads[i] >> (lane + 1) & 1 : next & 1;
    tile[i] = tile_at(offset, last_of_group ? offset + 1 : -1, p.lora_block);
    ends[i] = warp_ballot((loras[i] >> lane & 1) != 0 && tile[i].ends);
    if (lane == 0) s.tiles[first_row + i] = (uint32_t)count_bits(ends[i]) | (uint32_t)count_bits(heads[i] & loras[i]) << 16;  // tiles, groups
    if (heads[i]) last_head = (first_row + i) * 32 + highest_bit(heads[i]);
  }
  sync_block();

  uint32_t lower = 0;
  FEW_ROUNDS
  for (int row = lane; row < first_row; row += 32) lower += s.tiles[row];
  int index = (int)(warp_sum(lower) & 0xffff);
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int position = (first_row + i) * 32 + lane;
    if (ends[i] >> lane & 1)
      write_lora_tile(p, index + count_bits(ends[i] & lanes_below()), (int)(key[i] >> kSlotBits), (int)(key[i] & kSlotMask) - 1, position, tile[i].rows);
    index += count_bits(ends[i]);
  }
  if (warp_index() == warps_per_block() - 1) {
    const uint32_t groups = warp_sum(lower) >> 16;
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) own += (uint32_t)count_bits(heads[i] & loras[i]);
    if (lane == 0) {
      p.a.counts[2] = index;
      p.a.counts[3] = (int32_t)(groups + own);
    }
  }
}

template <int ITEMS>
KERNEL void __launch_bounds__(1024, 1) align_one_block(Problem p) {
  SMEM_DECL;
  const int rows = warps_per_block() * ITEMS, first_row = warp_index() * ITEMS, lane = lane_index();
  const OneBlock s = carve_one_block(p, rows, (uint32_t*)smem_);
  const int experts = p.a.experts;
  clear(s.experts);
  if (p.has_slots) clear(s.slots);
  wait_for_previous_kernel();
  allow_next_kernel();  // after the wait: the next may read what this one's inputs were made with before it waits itself
  int expert[ITEMS], slot[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {  // all reads of global memory, at once
    const int item = (first_row + i) * 32 + lane;
    expert[i] = item < p.pairs ? expert_bin(p, item) : -1;
    slot[i] = p.has_slots && item < p.a.tokens ? slot_bin(p, item) : 0;
  }
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int item = (first_row + i) * 32 + lane;
    if (item < p.pairs) s.expert_of[item] = (uint16_t)expert[i];
    if (item < p.a.tokens) s.slot_key[item] = (uint32_t)slot[i] << kTokenBits | (uint32_t)item;
  }
  sync_block();
  if (p.has_slots && p.log_lanes > 0) order_few_tokens(p, s);
  else if (p.has_slots) order_tokens<ITEMS>(p, s);

  int pair[ITEMS];
  Ranked item[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    pair[i] = (first_row + i) * 32 + lane;
    if (p.has_slots && pair[i] < p.pairs) {  // the pair at this place when tokens are in order
      const int place = pair[i] / p.top_k;
      const int token = (int)s.order[place];
      pair[i] += (token - place) * p.a.top_k;
      expert[i] = s.expert_of[pair[i]];
      slot[i] = (int)(s.slot_key[token] >> kTokenBits);
    }
    item[i] = count_row(s.experts, first_row + i, expert[i]);
  }
  sync_block();
  scan_columns(s.experts, [&](int bin, uint32_t items) { s.bins.rows[bin] = items; });
  sync_block();
  if (warp_index() == 0) {
    const uint32_t tiles = scan_bins(s.bins, experts + 1, {0, experts}, p.base_block);
    if (lane == 0) {
      p.a.counts[0] = p.pairs - (int32_t)s.bins.rows[experts];
      p.a.counts[1] = (int32_t)tiles;
      if (!p.has_slots) p.a.counts[2] = p.a.counts[3] = 0;
    }
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    if (item[i].bin < 0) continue;
    const int offset = rank_in_block(s.experts, first_row + i, item[i]), place = (int)s.bins.start[expert[i]] + offset;
    p.a.sorted_pairs[place] = pair[i];
    s.keys[place] = (uint32_t)expert[i] << kSlotBits | (uint32_t)slot[i];
    write_base_tile(p, s.bins, expert[i], offset);
  }
  if (!p.has_slots) return;
  sync_block();
  write_lora_tiles<ITEMS>(p, s, p.pairs - (int)s.bins.rows[experts]);
}

// ---- Large P -------------------------------------------------------------------------------------------------------

struct Workspace {
  uint32_t *pairs, *slots;  // [pairs] by (expert, pair); slots: slot + 1 of the pair
  uint32_t* histogram;      // [blocks][experts + 1]
  uint32_t* tiles;          // [experts] kPublished | lora tiles
  uint32_t* start;          // [experts + 1]
};

HOST_DEVICE int64_t histogram_words(int64_t pairs, int64_t experts) { return (kMaxBlocks + pairs / kMaxPairsPerBlock) * (experts + 1); }

DEVICE Workspace split_workspace(const Problem& p) {
  Workspace w;
  w.pairs = p.a.workspace;
  w.slots = w.pairs + p.pairs;
  w.histogram = w.slots + p.pairs;
  w.tiles = w.histogram + histogram_words(p.pairs, p.a.experts);
  w.start = w.tiles + p.a.experts;
  return w;
}

// (1) histogram[block][expert]
KERNEL void __launch_bounds__(1024, 1) align_count(Problem p, int pairs_per_block) {
  SMEM_DECL;
  uint32_t* counts = (uint32_t*)smem_;
  const Workspace w = split_workspace(p);
  const int bins = p.a.experts + 1, first = (int)blockIdx.x * pairs_per_block, last = smaller(first + pairs_per_block, p.pairs);
  fill_zero(counts, bins);
  wait_for_previous_kernel();
  allow_next_kernel();
  sync_block();
  FEW_ROUNDS
  for (int pair = first + thread_index(); pair < last; pair += (int)blockDim.x) atomic_add(&counts[expert_bin(p, pair)], 1);
  sync_block();
  uint32_t* row = w.histogram + (int64_t)blockIdx.x * bins;
  FEW_ROUNDS
  for (int bin = thread_index(); bin < bins; bin += (int)blockDim.x) row[bin] = counts[bin];
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
  s.bins = carver.take_bins(bins);
  s.next = carver.take(bins);
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

// bins.rows += items of every expert, next += those of them in earlier blocks, from the rows of (1).
DEVICE void sum_histogram(const Problem& p, const Placing& s, const uint32_t* histogram) {
  constexpr int kLoads = 8;  // in flight before the first is used
  const int bins = p.a.experts + 1, cells = (int)gridDim.x * bins, before = (int)blockIdx.x * bins;
  FEW_ROUNDS
  for (int base = thread_index(); base < cells; base += kLoads * (int)blockDim.x) {
    uint32_t found[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int cell = base + i * (int)blockDim.x;
      found[i] = cell < cells ? histogram[cell] : 0;
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int cell = base + i * (int)blockDim.x;
      if (found[i] == 0) continue;
      const int bin = cell - cell / p.bins * bins;
      atomic_add(&s.bins.rows[bin], found[i]);
      if (cell < before) atomic_add(&s.next[bin], found[i]);
    }
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
  fill_zero(s.bins.rows, bins);
  fill_zero(s.next, bins);
  // What needs no other block's counts comes before the wait.
  const int own = thread_index(), bin = own < items ? bin_of(own) : -1, slot = own < items ? slot_of(own) : 0;
  sync_block();
  const Ranked item = count_row(s.table, warp_index(), bin);
  sync_block();
  scan_columns(s.table, [&](int b, uint32_t count) { s.count[b] = count; });
  wait_for_previous_kernel();
  sum_histogram(p, s, w.histogram);
  sync_block();
  if (warp_index() == 0) {
    const uint32_t tiles = scan_bins(s.bins, bins, {0, p.a.experts}, p.base_block);
    if (blockIdx.x == 0 && lane_index() == 0) {
      p.a.counts[0] = p.pairs - (int32_t)s.bins.rows[p.a.experts];
      p.a.counts[1] = (int32_t)tiles;
      p.a.counts[2] = p.a.counts[3] = 0;  // (3) adds
    }
  }
  sync_block();
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
  if (warp_index() == 0) {
    const uint32_t tiles = scan_bins(s.bins, bins, {1, bins}, p.lora_block);
    if (lane_index() == 0) {
      publish(&w.tiles[expert], kPublished | tiles);
      s.totals[2] = tiles;
    }
  }
  sync_block();
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

int launch_large(const Problem& p, const MoeLoraAlignPlan& plan, void* stream) {
  // Few pairs a block shorten its work, many blocks lengthen the sum over their histograms; measured on an H200.
  const int wanted = plan.pairs_per_block > 0 ? plan.pairs_per_block : p.pairs <= 4096 ? 256 : p.pairs <= 16384 ? 512 : 1024;
  int blocks = smaller(ceil_div(p.pairs, wanted), kMaxBlocks);
  if (ceil_div(p.pairs, blocks) > kMaxPairsPerBlock) blocks = ceil_div(p.pairs, kMaxPairsPerBlock);
  const int pairs_per_block = ceil_div(p.pairs, blocks);
  blocks = ceil_div(p.pairs, pairs_per_block);
  const bool overlap = plan.overlap && can_overlap();

  const auto shared = [](int bins, unsigned threads) { return 4 * (size_t)carve_placing(bins, (int)threads / 32, nullptr).words; };
  const auto fit = [&](int items, int bins) {  // threads that cover the items, as far as the table fits
    unsigned threads = (unsigned)smaller(1024, larger(128, power_of_two(items)));
    while (threads > 128 && shared(bins, threads) > kSharedBytes) threads /= 2;
    return threads;
  };
  const int bins = p.a.experts + 1;
  unsigned threads = fit(pairs_per_block, bins);
  int error = launch({(unsigned)blocks, threads, 4 * (size_t)bins, stream, overlap}, align_count, p, pairs_per_block);
  if (error) return error;
  error = launch({(unsigned)blocks, threads, shared(bins, threads), stream, overlap}, align_place, p, pairs_per_block);
  if (error || !p.has_slots) return error;
  threads = fit(2 * p.pairs / p.a.experts, p.a.slots + 1);  // twice the mean run
  return launch({(unsigned)p.a.experts, threads, shared(p.a.slots + 1, threads), stream, overlap}, align_slots, p);
}

template <int ITEMS>
int launch_one_block(const Problem& p, size_t shared, unsigned threads, void* stream, bool overlap) {
  return launch({1, threads, shared, stream, overlap}, align_one_block<ITEMS>, p);
}

}  // namespace

extern "C" MoeLoraAlignPlan moe_lora_align_default_plan() { return {1024, 0, 1}; }

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
  p.bins = make_divider(a.experts + 1);
  if (p.pairs > smaller(plan.one_block_pairs, kMaxOneBlockPairs) && p.pairs > 0) return launch_large(p, plan, stream);

  const int items = p.pairs <= 1024 ? 1 : p.pairs <= 2048 ? 2 : 4;
  const int threads = larger(128, power_of_two(ceil_div(p.pairs, items)));
  p.token_rows = power_of_two(ceil_div(a.tokens, 32));
  const int lanes = smaller(32, threads / power_of_two(a.tokens));
  while (2 << p.log_lanes <= lanes && a.tokens <= 16 * lanes) p.log_lanes++;
  const size_t shared = 4 * (size_t)carve_one_block(p, threads / 32 * items, nullptr).words;
  if (shared > kSharedBytes) return launch_large(p, plan, stream);
  const bool overlap = plan.overlap && can_overlap();
  if (items == 1) return launch_one_block<1>(p, shared, (unsigned)threads, stream, overlap);
  return items == 2 ? launch_one_block<2>(p, shared, (unsigned)threads, stream, overlap) : launch_one_block<4>(p, shared, (unsigned)threads, stream, overlap);
}

#ifdef __CUDACC__
extern "C" const char* cuda_error_text(int code) { return cudaGetErrorString((cudaError_t)code); }
#else
extern "C" const char* cuda_error_text(int) { return "no CUDA: the emulator"; }
#endif
