// What gate_up by wgmma does for the layer's second projection: s = scaling * A act of the rows of its tiles, up to rank 16.
//
//   * Behind a tile's adapters comes a stage with A of the second projection, its columns that are this tile's rows of the weight, for each run of
//     rows of one adapter (copy_next). The activation goes to the other half of that stage, is multiplied from there and leaves for memory.
//   * Each tile of rows gives a part of s. The block that reports a tile of tokens last adds them up, in order, a tile later, and reports once more.
#pragma once
#include "marlin_moe_lora.cuh"

namespace {

constexpr int kCopyThreads = 128;
constexpr int kNextRanks = 16, kRunBytes = kNextRanks * 256;  // of A in a run 16 rows of 128 columns
template <class S>
constexpr int kFirstRuns = S::kWeightBytes / kRunBytes < kMostRuns ? S::kWeightBytes / kRunBytes : kMostRuns;  // beside the activation; kMostRuns in other stages

// Columns of the activation in shared memory: rows of 256 bytes, whose sixteen-byte pieces are apart in banks from those of the next rows.
DEVICE uint8_t* next_piece(uint8_t* rows, int row, int piece) { return rows + row * 256 + ((piece ^ (row & 7)) << 4); }

// Whether a report of a tile was the last one of its rows, so that all parts are there.
DEVICE bool all_parts(const Derived& d, uint32_t before) { return (int)(before / kReport) + 1 == d.row_tiles; }

// The copying warpgroup. `reported`: of one thread, what it found where it reported the tile before this one, or 0.
template <class S>
DEVICE void copy_next(const MarlinMoeGemm& a, const Shared& s, const Derived& d, const Tile& tile, uint32_t reported, AdaptersAhead& l, Stages<S>& stages) {
  static_assert(!S::kWarpgroup || (S::kK == S::kRows / 2 && S::kStageBytes >= kMostRuns * kRunBytes), "A and the activation fit a stage");
  const int columns = a.rows / 2;
  int room = kFirstRuns<S>;
  do {
    const int thread = thread_index_here() - S::kThreads, base = l.base(), row = thread / 16, piece = thread % 16, column = tile.row_tile * (S::kRows / 2) + piece * 8;
    Barrier* full = stages.full + stages.slot;
    uint8_t* const stage = s.stages + stages.slot * S::kStageBytes;
    int32_t* const told = s.runs + stages.slot * 2 * kMostRuns;
    barrier_wait(stages.empty + stages.slot, stages.parity);
    int runs = 0;
#pragma unroll 1
    for (; runs < room && l.next - base < l.kAtHand; runs++) {
      int record = l.next - base;
      const int first = l.field(record, 0) - tile.start, rank = l.field(record, 2), place = l.field(record, 3);
      int end = first + l.field(record, 1);
      for (record++; record < l.kAtHand && l.field(record, 3) == place && l.field(record, 0) - tile.start == end; record++) end += l.field(record, 1);
      if (thread == 0) told[2 * runs] = first, told[2 * runs + 1] = end;
      const uint16_t* from = (const uint16_t*)a.next.pool + (int64_t)(uint32_t)place * 8 + (int64_t)row * columns + column;
      uint8_t* const target = next_piece(stage + runs * kRunBytes, row, piece);
      cp16(target, from, column < columns && row < rank);
      cp16(target + 8 * 256, from + 8 * (int64_t)columns, column < columns && row + 8 < rank);
      l.next = base + record;
    }
    const bool more = l.next < l.last;
    room = kMostRuns;
    if (base + l.kAtHand < l.last) l.fetch(a.next.records);
    if (thread == kCopyThreads - 32) *s.open = reported != 0 && all_parts(d, reported);
    if (thread == 0) s.more[stages.slot] = 2 * runs + more, barrier_arrive(full);
    barrier_arrive_after_copies(full);
    stages.advance();
  } while (l.next < l.last);
}

// The multiplying warps: the activation of their rows of the weight to shared memory, zeros where there are none.
template <class S, bool PLAIN>
DEVICE void keep_activation(const MarlinMoeGemm& a, const Tile& tile, uint8_t* act, int thread, const Sums<S>& sums) {
  using T = typename S::Type;
  constexpr float growth = Rows<typename S::Codes>::kGrowth;
  const int lane = thread % 32, piece = thread / 32 * 2 + lane / 16, half_rows = a.rows / 2, column = tile.row_tile * (S::kRows / 2) + thread / 32 * 16 + lane / 4 * 2;
  const bool present = column < half_rows;
  const float slope = -1.4426950408889634f * a.alpha;
  float bias[4] = {0.f, 0.f, 0.f, 0.f};
  if (!PLAIN && a.bias && present) {
    const uint16_t* at = (const uint16_t*)a.bias + (int64_t)tile.expert * a.rows + column;
    for (int f = 0; f < 2; f++) {
      const uint32_t pair = *(const uint32_t*)(at + f * half_rows);
      bias[2 * f] = T::low(pair), bias[2 * f + 1] = T::high(pair);
    }
  }
  uint8_t* first[2];
#pragma unroll
  for (int j = 0; j < 2; j++) first[j] = next_piece(act, lane % 4 * 2 + j, piece) + lane / 4 % 4 * 4;
#pragma unroll
  for (int n = 0; n < S::kNT; n++) {
    if (n * 8 >= tile.rows) break;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = sums.value[i / 2][n][i % 2 * 2 + j] * growth + bias[i];
      const uint32_t pair = T::pack(activate<PLAIN>(a, slope, v[0], v[2]), activate<PLAIN>(a, slope, v[1], v[3]));
      *(uint32_t*)(first[j] + n * 8 * 256) = present ? pair : 0;
    }
  }
}

// A part of s: the runs of the stage `low`, sixteen rows of the activation a warp.
template <class S>
DEVICE void multiply_runs(const MarlinMoeGemm& a, const Tile& tile, uint8_t* act, uint8_t* low, const int32_t* told, int runs, int thread) {
  using T = typename S::Type;
  const int lane = thread % 32;
  for (int row0 = thread / 32 * 16; row0 < tile.rows; row0 += S::kThreads / 32 * 16)
    for (int run = 0; run < runs; run++) {
      const int first = told[2 * run] > row0 ? told[2 * run] : row0, limit = told[2 * run + 1] < tile.rows ? told[2 * run + 1] : tile.rows, end = limit < row0 + 16 ? limit : row0 + 16;
      if (first >= end) continue;
      float sum[2][4] = {};
#pragma unroll
      for (int k = 0; k < S::kK / 16; k++) {
        uint32_t x[4], w[4];
        load_matrix_x4(x, next_piece(act, row0 + lane % 16, 2 * k + lane / 16));
        load_matrix_x4(w, next_piece(low + run * kRunBytes, lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        const uint32_t w0[2] = {w[0], w[1]}, w1[2] = {w[2], w[3]};
        T::mma(sum[0], x, w0);
        T::mma(sum[1], x, w1);
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = row0 + lane / 4 + h * 8;
        if (row < first || row >= end) continue;
        float* const part = a.next.parts + ((int64_t)tile.row_tile * a.pairs + tile.start + row) * kNextRanks + lane % 4 * 2;
        store_two_floats(part, sum[0][2 * h], sum[0][2 * h + 1]);
        store_two_floats(part + 8, sum[1][2 * h], sum[1][2 * h + 1]);
      }
    }
}

// The end of a tile. Returns whether the tile before it has all its parts.
template <class S>
DEVICE bool store_with_next(const MarlinMoeGemm& a, const Shared& s, const Tile& tile, const Sums<S>& sums, Stages<S>& stages) {
  stages.wait();
  const int held = stages.slot, half_rows = a.rows / 2, thread = thread_index_here();  // nothing that is made of it is kept beside the products: registers
  uint8_t* const act = s.stages + held * S::kStageBytes + S::kWeightBytes;
  if (a.bias || a.cubic != 0.f || a.shift != 0.f || a.limit < kNoLimit) keep_activation<S, false>(a, tile, act, thread, sums);
  else keep_activation<S, true>(a, tile, act, thread, sums);
  sync_two_warpgroups(2);
  bool open;
  for (bool more = true; more; stages.advance()) {  // the stage that holds the activation stays
    if (stages.slot != held) stages.wait();
    const int told = (int)shuffle((uint32_t)s.more[stages.slot], 0);
    more = told & 1, open = shuffle((uint32_t)*s.open, 0) != 0;
    multiply_runs<S>(a, tile, act, s.stages + stages.slot * S::kStageBytes, s.runs + stages.slot * 2 * kMostRuns, told >> 1, thread);
    sync_warp();
    if (stages.slot != held && thread % 32 == 0) barrier_arrive(stages.empty + stages.slot);
  }
  const int piece = thread % 16, column = tile.row_tile * (S::kRows / 2) + piece * 8;
  uint16_t* const out = (uint16_t*)a.out + (int64_t)tile.start * half_rows + column;
#pragma unroll 3
  for (int row = thread / 16; row < tile.rows; row += S::kThreads / 16) {
    uint32_t words[4];
    load_words(words, next_piece(act, row, piece));
    if (column < half_rows) store_words(out + (int64_t)row * half_rows, words);
  }
  sync_warp();
  if (thread % 32 == 0) barrier_arrive(stages.empty + held);
  return open;
}

// s of a tile whose parts are all there, by the multiplying warps, whose sums hold nothing now: four columns a thread, whose parts are asked for at once.
template <class S>
DEVICE void add_parts(const MarlinMoeGemm& a, const Tile& tile) {
  constexpr int kParts = 6;
  const int from = a.low_ranges[2 * tile.index], to = a.low_ranges[2 * tile.index + 1], parts = ceil_div(anew(a.rows) / 2, S::kRows / 2), thread = thread_index_here(), lane = thread % 32;
  const int64_t apart = (int64_t)anew(a.pairs) * kNextRanks;  // nor what is made of these
  for (int first = from; first < to; first += 32) {  // lane l has LoRA tile first + l
    int64_t record[3] = {};
    if (first + lane < to)
#pragma unroll
      for (int i = 0; i < 3; i++) record[i] = a.next.records[5 * (int64_t)(first + lane) + i];
    for (int row0 = 0; row0 < tile.rows; row0 += S::kThreads / 4) {
      const int row = row0 + thread / 4, r = thread % 4 * 4;
      const float* const part = a.next.parts + (int64_t)(tile.start + row) * kNextRanks + r;
      float sum[4] = {}, scaling = 0.f;
      for (int j0 = 0; j0 < parts; j0 += kParts) {
        float more[kParts][4] = {};  // or what was there before would be kept
#pragma unroll
        for (int j = 0; j < kParts; j++)
          if (row < tile.rows && j0 + j < parts) load_floats_l2(more[j], part + (j0 + j) * apart);
#pragma unroll
        for (int j = 0; j < kParts; j++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            if (row < tile.rows && j0 + j < parts) sum[k] += more[j][k];
      }
      int rank = 0;
      for (int t = 0; t < 32 && first + t < to; t++) {
        const int low = (int)shuffle((uint32_t)record[0], t) - tile.start, high = low + (int)shuffle((uint32_t)record[1], t), run_rank = (int)shuffle((uint32_t)record[2], t);
        const float run_scaling = as_float(shuffle((uint32_t)(record[1] >> 32), t));
        if (row < tile.rows && row >= low && row < high) rank = run_rank, scaling = run_scaling;
      }
      if (r >= rank) continue;
      const uint32_t words[2] = {S::Type::pack(sum[0] * scaling, sum[1] * scaling), S::Type::pack(sum[2] * scaling, sum[3] * scaling)};
      uint16_t* const out = (uint16_t*)a.next.s + (int64_t)(tile.start + row) * a.next.s_width + r;
      if (a.next.s_width % 4 == 0) store_words(out, words[0], words[1]);
      else
        for (int k = 0; k < 4 && r + k < a.next.s_width; k++) out[k] = (uint16_t)(words[k / 2] >> (k % 2 * 16));
    }
  }
  sync_two_warpgroups(2);
  if (thread == 0) publish_add((uint32_t*)a.tiles + 3 * (int64_t)tile.index + 2, kReport);
}

}  // namespace
