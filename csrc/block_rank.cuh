// Stable ranking of items by bin inside a block, and runs cut into tiles: what the kernels of moe_lora_align.cu share.
//
//   rank      32 consecutive items are a row of one warp; ballots find a lane's equals in its row, their number goes into
//             counters[row][bin], and a scan down each column gives what lies in the rows above.
//             An item's place = items of lower bins + equal items in earlier rows + equal items in lower lanes.
//   tiles     A run of rows is cut into tiles by the item that ends one: it knows its offset in the run. Number of the tile = tiles of
//             lower bins + offset / block.
#pragma once
#include "prims.cuh"

namespace {

constexpr int kRowsAtOnce = 8;  // of a column that one lane scans; the rows of a table are a multiple of it

HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
HOST_DEVICE int larger(int a, int b) { return a > b ? a : b; }
HOST_DEVICE int power_of_two(int least) {
  int power = 1;
  while (power < least) power *= 2;
  return power;
}

// Loops that run once or twice: unrolled, the count of their rounds alone would cost a division.
#define FEW_ROUNDS _Pragma("unroll 1")

DEVICE void fill_zero(uint32_t* words, int count) {
  FEW_ROUNDS
  for (int i = thread_index(); i < count; i += (int)blockDim.x) words[i] = 0;
}

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

// start and tile_start from rows, by `warps` warps, this one being number `warp`: each has 32 bins and sums the lower ones by itself, which
// takes fewer instructions one after another than a warp with all bins. Bins in `tiled` are cut into tiles of `block`.
DEVICE void scan_bins(const Bins& bins, int count, Range tiled, Divider block, int warp = warp_index(), int warps = warps_per_block()) {
  const auto tiles_of = [&](int bin, uint32_t rows) { return bin >= tiled.first && bin < tiled.last ? (uint32_t)(((int)(rows + block.by) - 1) / block) : 0u; };
  FEW_ROUNDS
  for (int base = warp * 32; base < count; base += warps * 32) {
    const int own = base + lane_index();
    const uint32_t rows = own < count ? bins.rows[own] : 0, tiles = tiles_of(own, rows);
    uint32_t lower_rows = 0, lower_tiles = 0;
#pragma unroll 4
    for (int bin = lane_index(); bin < base; bin += 32) {
      lower_rows += bins.rows[bin];
      lower_tiles += tiles_of(bin, bins.rows[bin]);
    }
    uint32_t rows_sum = rows, tiles_sum = tiles;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const uint32_t other_rows = shuffle_up(rows_sum, delta), other_tiles = shuffle_up(tiles_sum, delta);
      if (lane_index() >= delta) {
        rows_sum += other_rows;
        tiles_sum += other_tiles;
      }
    }
    lower_rows = warp_sum(lower_rows);
    lower_tiles = warp_sum(lower_tiles);
    if (own < count) {
      bins.start[own] = lower_rows + rows_sum - rows;
      bins.tile_start[own] = lower_tiles + tiles_sum - tiles;
    }
  }
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

}  // namespace
