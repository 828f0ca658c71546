// LoRA shrinks of sorted rows, for rows and matrices that lie in L2 or come from memory: a stream that is hardly computed with.
//
//   * A block walks items, persistently: up to 144 rows of a LoRA tile (of one expert and slot) by up to 128 rows of its A. Both come by cp.async
//     in chunks of columns through a ring, which the next item begins to fill while this one is computed: its place in all tables was
//     asked for an item ahead.
//   * Only rows that exist are fetched, of x and of A, and multiplied in sixteens. The warps share the columns of a chunk, so that each value
//     is read once from shared memory; their sums meet at the item's end in the chunk that was just read, and are added in a fixed order.
//   * Many rows of high ranks are multiplied by wgmma, with rows of A as its first operand: by mma.sync they ran at 150 TFLOP/s.
//   * The matrix A of a block's first item is on its way before the kernel before this one is complete, where the tiles are older.
#include "moe_lora_shrink.h"

#include <type_traits>

#include "hopper_prims.cuh"

namespace {

constexpr int kRecord = 5, kNotes = 8;  // notes: more than items that a ring holds parts of

// An item's most rows of x and of A, columns of a chunk, chunks in the ring.
template <int ROWS, int LOW, int K, int STAGES, int THREADS>
struct Ring {
  static constexpr int kRows = ROWS, kLow = LOW, kK = K, kStages = STAGES, kThreads = THREADS;
  static constexpr int kPieces = K / 8, kAtOnce = kThreads / kPieces;  // rows that all threads fetch a piece each of
  static constexpr int kPasses = ceil_div(ROWS, kAtOnce), kLowPasses = ceil_div(LOW, kAtOnce), kOfWarp = 32 / kPieces;  // kOfWarp: rows in a pass
  static constexpr int kStageBytes = (ROWS + LOW) * K * 2;
  static constexpr int kSharedBytes = STAGES * kStageBytes + kNotes * 32 + kPasses * kAtOnce * 4, kFit = 227 * 1024 / (kSharedBytes + 1024);
  static constexpr int kResident = kFit * kThreads > 640 ? 640 / kThreads : kFit;  // more would leave too few registers
  static_assert(kAtOnce % 8 == 0 && kPasses * kOfWarp <= 32 && STAGES < kNotes);
};

// How warps share rows of A and columns.
template <int ROWS, int LOW, int K, int STAGES, int WN, int WK>
struct Shape : Ring<ROWS, LOW, K, STAGES, 32 * WN * WK> {
  static constexpr bool kWgmma = false;
  static constexpr int kWN = WN, kWK = WK;
  static constexpr int kSixteens = ROWS / 16, kEights = LOW / 8 / WN, kPitch = LOW + 8;  // of a warp; floats of a row of sums
  static_assert(WK * 16 * kPitch * 4 <= Shape::kStageBytes && kEights % 2 == 0 && K / 16 % WK == 0);
};

// Two warpgroups, which share rows of A, or rows of x where A has no more than 64.
template <int ROWS, int LOW, int STAGES>
struct WideShape : Ring<ROWS, LOW, 64, STAGES, 256> {
  static constexpr bool kWgmma = true;
  static constexpr int kParts = 128 / LOW, kPart = ceil_div(ROWS, 16 * kParts) * 16;  // of the rows
  static constexpr int kSlice = ROWS < 64 ? ROWS : 64, kPitch = LOW * 2 + 16;         // rows that leave at once, bytes of one
  static_assert(kPart <= 144 && kSlice * kPitch <= WideShape::kStageBytes);
};

struct Note {  // of an item, from the fetching side of the block to the multiplying one
  int32_t start, rows;  // no rows: no more items
  int32_t rank, first, low;  // of the slot; first row of A and how many
  float scaling;
  int32_t unused[2];
};

struct Walk {
  Divider top_k, per_tile, low_blocks;  // per_tile: items of a tile
  int32_t most;                         // items that the list of tiles has room for
};

// A position in shared memory: sixteen bytes of a row of a chunk, apart in banks from those of other rows.
template <class S>
DEVICE uint8_t* piece_of(uint8_t* rows, int row, int piece) {
  return rows + row * (S::kK * 2) + ((piece ^ (row & 7)) << 4);
}

// ---- fetching --------------------------------------------------------------------------------------------------------------------------

template <class S>
struct Fetcher {
  static constexpr int kHeld = S::kWgmma ? 1 : S::kPasses;  // rows of x whose sources a thread finds: its own, or beside wgmma's sums a part of its warp's
  const MoeLoraShrink& a;
  const Walk& by;
  uint8_t* const ring;
  Note* const notes;
  uint32_t* const sources;  // of the item's rows of x, in 16 bytes, by wgmma: those that a warp fetches are written by its own lanes
  const int per_tile;       // items of a tile
  int count = 0;       // of all items
  // The item that is fetched from.
  const uint16_t* matrix = nullptr;  // of A: this thread's piece of the first row of the item
  uint32_t source[kHeld] = {};
  int item = 0, number = -1, rows = 0, low = 0, chunk = 0;  // number: in this block
  // The next one: what the tables say, on its way, and the tile of the one after.
  uint32_t tile[4] = {}, next_tile[4] = {};
  int64_t offset = 0, stride = 0;
  int32_t rank = 0, split = 0, pair[kHeld] = {};
  float scaling = 0.f;

  DEVICE bool any() const { return item < count; }
  DEVICE int row() const { return thread_index() / S::kPieces; }
  DEVICE int piece() const { return thread_index() % S::kPieces; }
  DEVICE int held_row(int i) const {
    return S::kWgmma ? lane_index() / S::kOfWarp * S::kAtOnce + warp_index() * S::kOfWarp + lane_index() % S::kOfWarp : row() + i * S::kAtOnce;
  }

  DEVICE void ask_tile(int of) {  // does not wait for their number: entries beyond it are undefined, but there
    if (of < by.most) load_words(next_tile, a.tiles + 4 * (int64_t)(of / by.per_tile));
  }
  DEVICE int first_row(int of) const { return (of - of / by.per_tile * per_tile) / by.low_blocks * S::kRows; }
  DEVICE void ask_tables(int of) {
#pragma unroll
    for (int i = 0; i < 4; i++) tile[i] = next_tile[i];
    if (of >= count) return;
    const int slot = (int)tile[1], first = first_row(of);
    offset = a.offset[slot], stride = a.stride[slot], rank = a.rank[slot], split = a.split[slot], scaling = a.scaling[slot];
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      const int r = first + held_row(i);
      pair[i] = (int)tile[2] + r;
      if (a.gather && r < (int)tile[3]) pair[i] = a.sorted_pairs[pair[i]];
    }
  }
  DEVICE void begin() {
    count = a.counts[2] * per_tile;
    item = (int)blockIdx.x;
    ask_tile(item);
    ask_tables(item);
    ask_tile(item + (int)gridDim.x);
    item -= (int)gridDim.x;
    turn();
  }
  // Go on to the next item that has something to fetch, and say of it what the multiplying side needs.
  DEVICE void turn() {
    bool skip;
    do {
      item += (int)gridDim.x;
      if (any()) take();
      skip = any() && low <= 0;
      number += !skip;
      if (thread_index() == 0 && !skip) notes[number % kNotes] = {(int)tile[2] + first_row(item), any() ? rows : 0, rank, first_low(), low, scaling, {}};
      if (!any()) return;
      ask_tables(item + (int)gridDim.x);
      ask_tile(item + 2 * (int)gridDim.x);
    } while (skip);
  }
  DEVICE int first_low() const { return (item - item / by.low_blocks * (int)by.low_blocks.by) * S::kLow; }
  DEVICE void take() {
    const int first = first_row(item), r0 = first_low(), all = rank * (1 + split);
    rows = (int)tile[3] - first < S::kRows ? (int)tile[3] - first : S::kRows;
    low = rows <= 0 ? 0 : all - r0 < S::kLow ? all - r0 : S::kLow;
    matrix = (const uint16_t*)a.pool + offset + (int64_t)tile[0] * stride + (int64_t)(r0 + row()) * a.cols + piece() * 8;
#pragma unroll
    for (int i = 0; i < kHeld; i++) source[i] = (uint32_t)(a.gather ? pair[i] / by.top_k : pair[i]) * (uint32_t)(a.cols / 8);
    if constexpr (S::kWgmma) {
      sync_warp();  // the sources before are read
      if (lane_index() < S::kPasses * S::kOfWarp) sources[held_row(0)] = source[0];
      sync_warp();
    }
    chunk = 0;
  }
  DEVICE void fetch_matrix(int stage, int of) const {
    uint8_t* const target = piece_of<S>(ring + stage * S::kStageBytes + S::kRows * S::kK * 2, row(), piece());
    const bool inside = of * S::kK + piece() * 8 < a.cols;
#pragma unroll
    for (int i = 0; i < S::kLowPasses; i++)
      if (row() + i * S::kAtOnce < low) cp16(target + i * S::kAtOnce * S::kK * 2, matrix + (int64_t)i * S::kAtOnce * a.cols + of * S::kK, inside);
  }
  DEVICE void fetch_rows(int stage, int of) const {
    uint8_t* const target = piece_of<S>(ring + stage * S::kStageBytes, row(), piece());
    const bool inside = of * S::kK + piece() * 8 < a.cols;
    const uint8_t* const x = (const uint8_t*)a.x + of * S::kK * 2 + piece() * 16;
#pragma unroll
    for (int i = 0; i < S::kPasses; i++)
      if (row() + i * S::kAtOnce < rows) cp16(target + i * S::kAtOnce * S::kK * 2, x + (int64_t)(S::kWgmma ? sources[row() + i * S::kAtOnce] : source[i % kHeld]) * 16, inside);
  }
  // The next chunk, as one group of copies; an empty group where there is none.
  DEVICE void step(int stage) {
    if (any()) {
      if (!a.early || number > 0 || chunk >= S::kStages - 1) fetch_matrix(stage, chunk);  // the first item's first ones are under way
      fetch_rows(stage, chunk);
      if (++chunk * S::kK >= a.cols) turn();
    }
    cp_commit();
  }
};

// ---- multiplying -----------------------------------------------------------------------------------------------------------------------

template <class T, class S>
struct Multiplier {
  uint8_t* const ring;
  float d[S::kSixteens][S::kEights][4];

  DEVICE int wn() const { return warp_index() % S::kWN; }
  DEVICE int wk() const { return warp_index() / S::kWN; }

  DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < S::kSixteens; m++)
#pragma unroll
      for (int n = 0; n < S::kEights; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) d[m][n][i] = 0.f;
  }
  DEVICE void chunk(int stage, const Note& note) {
    uint8_t* const x = ring + stage * S::kStageBytes;
    uint8_t* const matrix = x + S::kRows * S::kK * 2;
    const int lane = lane_index(), seven = lane & 7, eighth = lane >> 3;
#pragma unroll
    for (int i = 0; i < S::kK / 16 / S::kWK; i++) {
      const int sixteen = i * S::kWK + wk();
      uint32_t low[S::kEights / 2][4];
#pragma unroll
      for (int n = 0; n < S::kEights / 2; n++)
        load_matrix_x4(low[n], piece_of<S>(matrix, (wn() * S::kEights / 2 + n) * 16 + (eighth >> 1) * 8 + seven, 2 * sixteen + (eighth & 1)));
#pragma unroll
      for (int m = 0; m < S::kSixteens; m++) {
        if (m * 16 >= note.rows) break;
        uint32_t row[4];
        load_matrix_x4(row, piece_of<S>(x, m * 16 + (eighth & 1) * 8 + seven, 2 * sixteen + (eighth >> 1)));
#pragma unroll
        for (int n = 0; n < S::kEights; n++) {
          const uint32_t b[2] = {low[n / 2][n % 2 * 2], low[n / 2][n % 2 * 2 + 1]};
          T::mma(d[m][n], row, b);
        }
      }
    }
  }
  // Add up what the warps have, sixteen rows at a time, in the chunk that was read last.
  DEVICE void finish(const MoeLoraShrink& a, int stage, const Note& note) {
    constexpr int kSlice = 16, kFours = S::kLow / 4;
    float* const sums = (float*)(ring + stage * S::kStageBytes);
    const int lane = lane_index();
    const bool whole = (note.rank | a.max_rank | a.width) % 4 == 0;
#pragma unroll
    for (int m = 0; m < S::kSixteens; m++) {
      if (m * kSlice >= note.rows) break;
      sync_block();  // the chunk, or the sums before, are read
#pragma unroll
      for (int n = 0; n < S::kEights; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float* const target = sums + (wk() * kSlice + h * 8 + lane / 4) * S::kPitch + (wn() * S::kEights + n) * 8 + lane % 4 * 2;
          target[0] = d[m][n][2 * h], target[1] = d[m][n][2 * h + 1];
        }
      sync_block();
      for (int index = thread_index(); index < kSlice * kFours; index += S::kThreads) {
        const int row = index / kFours, column = index % kFours * 4, r = note.first + column;
        if (m * kSlice + row >= note.rows || column >= note.low) continue;
        float sum[4] = {};
#pragma unroll
        for (int w = 0; w < S::kWK; w++) {
          float part[4];
          load_floats(part, sums + (w * kSlice + row) * S::kPitch + column);
#pragma unroll
          for (int i = 0; i < 4; i++) sum[i] += part[i];
        }
        const uint32_t words[2] = {T::pack(sum[0] * note.scaling, sum[1] * note.scaling), T::pack(sum[2] * note.scaling, sum[3] * note.scaling)};
        uint16_t* const out = (uint16_t*)a.s + (int64_t)(note.start + m * kSlice + row) * a.width;
        if (whole) {
          store_words(out + (r < note.rank ? r : r + a.max_rank - note.rank), words[0], words[1]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (column + i < note.low) out[r + i < note.rank ? r + i : r + i + a.max_rank - note.rank] = (uint16_t)(words[i / 2] >> (i % 2 * 16));
        }
      }
    }
  }
};

// The same by wgmma: rows of A are its first operand, rows of x its columns. Each warpgroup has all columns of a chunk.
template <class T, class S>
struct WideMultiplier {
  uint8_t* const ring;
  float d[72];

  DEVICE int group() const { return (int)shuffle((uint32_t)warp_index() / 4, 0); }
  DEVICE int low0() const { return S::kParts == 1 ? group() * 64 : 0; }
  DEVICE int row0() const { return S::kParts == 1 ? 0 : group() * S::kPart; }
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 72; i++) d[i] = 0.f;
  }
  template <int SIXTEENS>
  DEVICE void products(uint8_t* x, uint8_t* matrix) {
    if constexpr (16 * SIXTEENS <= S::kPart) {
      wgmma_begin();
#pragma unroll
      for (int i = 0; i < S::kK / 16; i++) multiply_shared<T, 2 * SIXTEENS>(d, wgmma_matrix(matrix) + 2 * i, wgmma_matrix(x) + 2 * i, true);
      wgmma_commit();
      wgmma_wait<0>();
    }
  }
  DEVICE void chunk(int stage, const Note& note) {
    uint8_t* const x = ring + stage * S::kStageBytes;
    const int rows = (int)shuffle((uint32_t)note.rows, 0) - row0();
    switch (ceil_div(rows < S::kPart ? rows : S::kPart, 16)) {
#define CASE(SIXTEENS) \
  case SIXTEENS: products<SIXTEENS>(x + row0() * 128, x + (S::kRows + low0()) * 128); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9)
#undef CASE
    }
  }
  // Rows leave by way of the chunk that was read last, where they come to lie by row.
  DEVICE void finish(const MoeLoraShrink& a, int stage, const Note& note) {
    uint8_t* const out = ring + stage * S::kStageBytes;
    const int lane = lane_index(), warp = warp_index() & 3;
    const int wide = (note.rank | a.max_rank | a.width) % 8 == 0 ? 8 : 1, pieces = ceil_div(note.low, wide);  // columns that are written at once
#pragma unroll
    for (int c = 0; c < S::kRows; c += S::kSlice) {
      if (c >= note.rows) break;
      sync_block();  // the chunk, or the rows before, are read
#pragma unroll
      for (int i = 0; i < S::kPart / 8; i++) {
        const int row = row0() + i * 8;
        if (row < c || row >= c + S::kSlice || row >= note.rows) continue;
        uint32_t value[2];
#pragma unroll
        for (int h = 0; h < 2; h++) value[h] = T::pack(d[4 * i + 2 * h] * note.scaling, d[4 * i + 2 * h + 1] * note.scaling);
        store_matrix_x2_transposed(out + (row - c + (lane & 7)) * S::kPitch + (low0() + warp * 16 + (lane >> 3 & 1) * 8) * 2, value[0], value[1]);
      }
      sync_block();
      const int rows = note.rows - c < S::kSlice ? note.rows - c : S::kSlice;
#pragma unroll 1
      for (int index = thread_index(); index < rows * pieces; index += S::kThreads) {
        const int row = index / pieces, column = (index - row * pieces) * wide, r = note.first + column;
        uint16_t* const s = (uint16_t*)a.s + (int64_t)(note.start + c + row) * a.width + (r < note.rank ? r : r + a.max_rank - note.rank);
        const uint8_t* const from = out + row * S::kPitch + column * 2;
        if (wide == 8) {
          uint32_t words[4];
          load_words(words, from);
          store_words(s, words);
        } else {
          *s = *(const uint16_t*)from;
        }
      }
    }
  }
};

// Per base tile the LoRA tiles that overlap it: both lists ascend by first row. The blocks with the fewest items begin.
DEVICE void write_ranges(const MoeLoraShrink& a) {
  const int threads = (int)(gridDim.x * blockDim.x), tiles = a.counts[2];
  for (int i = (int)(gridDim.x - 1 - blockIdx.x) * (int)blockDim.x + thread_index(); i < a.counts[1]; i += threads) {
    const int start = a.base_tiles[3 * i + 1], end = start + a.base_tiles[3 * i + 2];
    int before = 0, within = 0;
    for (int step = tiles > 0 ? 1 << highest_bit((uint32_t)tiles) : 0; step > 0; step >>= 1) {  // how many end before the tile, how many begin before its end
      const int b = before + step, w = within + step;
      if (b <= tiles && a.tiles[4 * (b - 1) + 2] + a.tiles[4 * (b - 1) + 3] <= start) before = b;
      if (w <= tiles && a.tiles[4 * (w - 1) + 2] < end) within = w;
    }
    a.ranges[2 * i] = before, a.ranges[2 * i + 1] = within;
  }
}

// The records that the GEMM knows LoRA tiles by, and those of the layer's second projection where its shrink is within its GEMMs.
DEVICE void write_records(const MoeLoraShrink& a) {
  const MoeLoraNext& next = a.next;
  const int threads = (int)(gridDim.x * blockDim.x), tiles = a.counts[2];
  for (int i = (int)(gridDim.x - 1 - blockIdx.x) * (int)blockDim.x + thread_index(); i < tiles; i += threads) {
    uint32_t tile[4];
    load_words(tile, a.tiles + 4 * (int64_t)i);
    const int64_t expert = (int)tile[0], slot = (int)tile[1];
    int64_t* record = a.records + kRecord * (int64_t)i;
    record[0] = (int)tile[2], record[1] = (int)tile[3], record[2] = a.rank[slot], record[3] = a.split[slot];
    record[4] = (a.b_offset[slot] + expert * a.b_stride[slot]) / 8;
    if (!next.records) continue;
    record = next.records + kRecord * (int64_t)i;
    record[0] = (int)tile[2], record[1] = (int64_t)((uint64_t)next.scaling[slot] << 32 | tile[3]), record[2] = next.rank[slot];
    record[3] = (next.offset[slot] + expert * next.stride[slot]) / 8, record[4] = (next.b_offset[slot] + expert * next.b_stride[slot]) / 8;
  }
}

template <class T, class S>
KERNEL void __launch_bounds__(S::kThreads, S::kResident) shrink(const MoeLoraShrink a, const Walk by) {
  SMEM_DECL;
  Note* const notes = (Note*)(smem_ + S::kStages * S::kStageBytes);
  if (!a.early) wait_for_previous_kernel(), allow_next_kernel();
  const int per_tile = (int)by.per_tile.by;
  Fetcher<S> f{a, by, smem_, notes, (uint32_t*)(notes + kNotes), per_tile};
  f.begin();
  if (a.early) {
    for (int i = 0; i < S::kStages - 1 && i * S::kK < a.cols && f.any(); i++) f.fetch_matrix(i, i);
    wait_for_previous_kernel(), allow_next_kernel();
  }
  std::conditional_t<S::kWgmma, WideMultiplier<T, S>, Multiplier<T, S>> m{smem_, {}};
  Note note = {};
  for (int stage = 0, ahead = 0, number = 0, k = 0;;) {
    if (ahead == S::kStages - 1) {
      cp_wait<S::kStages - 2>();
      if constexpr (S::kWgmma) see_copies();
      sync_block();  // the chunk is there, and the one before it is read
      if (k == 0) note = notes[number % kNotes], m.clear();
      if (note.rows <= 0) break;
      if constexpr (!S::kWgmma) m.chunk(stage, note);  // before the next copies, behind which its loads from shared memory would queue
    }
    f.step(stage + ahead < S::kStages ? stage + ahead : stage + ahead - S::kStages);
    if (ahead < S::kStages - 1) {
      if (++ahead == S::kStages - 1) {
        if (a.ranges) write_ranges(a);
        write_records(a);
      }
      continue;
    }
    if constexpr (S::kWgmma) m.chunk(stage, note);
    if ((k += S::kK) >= a.cols) m.finish(a, stage, notes[number % kNotes]), number++, k = 0;
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
  }
  cp_wait<0>();
}

template <class T, class S>
int run(const MoeLoraShrink& a, int32_t tiles, int32_t multiprocessors, void* stream) {
  const int low_blocks = ceil_div(a.width, S::kLow), per_tile = low_blocks * ceil_div(a.lora_block, S::kRows);
  const Walk by = {make_divider(a.top_k), make_divider(per_tile), make_divider(low_blocks), tiles * per_tile};
  const int resident = multiprocessors * S::kResident;
  const unsigned blocks = (unsigned)(by.most < resident ? (by.most < 1 ? 1 : by.most) : resident);  // one also where there is no tile: whoever follows relies on its wait
  return launch(Launch{blocks, S::kThreads, (size_t)S::kSharedBytes, stream, a.overlap && can_overlap()}, shrink<T, S>, a, by);
}

// `use` on the shape for tiles of so many rows and so many columns of s.
template <class F>
auto with_shape(int lora_block, int width, F use) {
  const int low = width <= 16 ? 0 : width <= 32 ? 1 : width <= 64 ? 2 : 3;
  if (lora_block > 32 && lora_block <= 48 && low == 1) return use(Shape<48, 32, 64, 5, 1, 4>{});
  switch ((lora_block <= 16 ? 0 : lora_block <= 32 ? 4 : lora_block <= 64 ? 8 : 12) + low) {
    case 0: return use(Shape<16, 16, 128, 4, 1, 4>{});
    case 1: return use(Shape<16, 32, 128, 4, 1, 4>{});
    case 2: case 3: return use(Shape<16, 64, 128, 3, 1, 4>{});
    case 4: return use(Shape<32, 16, 128, 4, 1, 4>{});
    case 5: return use(Shape<32, 32, 128, 3, 1, 4>{});
    case 6: case 7: return use(Shape<32, 64, 128, 3, 1, 4>{});
    case 8: case 12: return use(Shape<64, 16, 128, 3, 1, 4>{});
    case 9: case 13: return use(Shape<64, 32, 128, 3, 1, 4>{});
    case 10: return use(Shape<64, 64, 128, 3, 2, 2>{});
    case 11: return use(WideShape<64, 128, 4>{});
    case 14: return use(WideShape<144, 64, 4>{});
    default: return use(WideShape<144, 128, 3>{});
  }
}

}  // namespace

extern "C" int moe_lora_shrink(const MoeLoraShrink* arguments, int32_t tiles, int32_t multiprocessors, void* stream) {
  const MoeLoraShrink& a = *arguments;
  return with_shape(a.lora_block, a.width, [&](auto shape) {
    using S = decltype(shape);
    return a.is_bf16 ? run<BFloat16, S>(a, tiles, multiprocessors, stream) : run<Float16, S>(a, tiles, multiprocessors, stream);
  });
}
