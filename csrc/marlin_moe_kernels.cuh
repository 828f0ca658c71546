// The two kernels of the grouped GEMM of marlin_moe.cu, and the shapes of tiles that are built.
#pragma once
#include "marlin_moe_next.cuh"

namespace {

// A shape whose blocks draw tiles, and halves of tiles, from a queue.
template <class S>
struct Drawing : S {
  static constexpr bool kDraws = true;
};

// With adapters blocks beside the shrink begin late and equal shares end late with them: where there is more than a tile for each block they draw tiles,
// some of the last ones in halves where these do not come out even or are many. Without adapters, or with two whole tiles for most, that takes longer.
constexpr int kLeastSteps = 4;  // of a tile that is drawn
constexpr int kMostSteps = 16;  // of tiles of which the last are halves though all come out whole: measured, longer ones end later
DEVICE Work queue_up(const MarlinMoeGemm& a, const Derived& d) {
  Work w = share_work(a, d, false, 92, 100);
  const int grid = w.given = (int)gridDim.x;
  const bool even = w.grain == w.k_steps;
  if (w.outputs < grid || w.k_steps < kLeastSteps || (even && w.outputs <= 2 * grid)) return w;
  const bool cut = even && w.k_steps <= kMostSteps;
  w.whole = w.outputs - (cut ? grid / 8 : even ? 0 : grid / 4), w.items = 2 * w.outputs - w.whole;
  if (cut && 2 * w.items >= 5 * grid) w.given = 0;
  return w;
}

template <class S>
DEVICE void enter_tile(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, Loader<S>& l) {
  uint32_t next = 0;
  if (S::kDraws && w.items && thread_index() == 0) next = w.given + take_ticket(slot_counters(a));  // on its way while the tile is found
  const int output = l.unit / w.k_steps, slot = l.entered % kQueue;
  const Tile tile = find_tile(a, d, w, output);
  if (a.low && (!a.early || (S::kDraws ? l.adapters.last >= 0 : l.entered > 0))) l.adapters.ask(a, tile.index);
  place_tile<S>(a, d, s, tile, l);
  if constexpr (S::kDraws) {
    const int end = (output + 1) * w.k_steps;
    if (thread_index() == 0) s.spans[2 * slot] = l.unit, s.spans[2 * slot + 1] = end < l.end ? end : l.end, s.before[1 + l.entered % 2] = next;
  }
}

// What item `item` of the queue is.
template <class S>
DEVICE void begin_item(const Work& w, int item, Loader<S>& l) {
  const int half = w.k_steps / 2, other = item - w.whole;
  const bool whole = other < 0, second = !whole && other % 2 == 1;
  l.unit = (whole ? item : w.whole + other / 2) * w.k_steps + (second ? half : 0);
  l.end = l.unit + (whole ? w.k_steps : second ? w.k_steps - half : half);
}

// The next item, if there is one, to be entered.
template <class S>
DEVICE bool draw_item(const Work& w, const Shared& s, Loader<S>& l) {
  if (!w.items) return false;
  sync_block();  // it is there
  const int item = (int)s.before[1 + l.entered % 2];  // two places: who reads this may be behind who enters the tile
  if (item >= w.items) return false;
  begin_item<S>(w, item, l);
  l.k_step = w.k_steps;
  return true;
}

// A block has taken its last ticket: the last one that says so puts the counters back.
template <class S>
DEVICE void leave_queue(const MarlinMoeGemm& a, const Work& w) {
  uint32_t* const counters = slot_counters(a);
  if (S::kDraws && w.items && thread_index() == 0 && arrive(counters + 1) == gridDim.x - 1) counters[0] = counters[1] = 0;
}

// The next stage of adapters of the tile whose weights are loaded, if there is one.
template <class S>
DEVICE bool load_more(const MarlinMoeGemm& a, const Shared& s, Loader<S>& l, int slot) {
  sync_block();  // the tile's record is there
  const Tile tile = s.tiles[(l.entered - 1) % kQueue];
  if (l.adapters.last < 0) {
    if (a.early == 2) wait_for_previous_kernel(), allow_next_kernel();
    l.adapters.ask(a, tile.index);
  }
  if (l.adapters.next >= l.adapters.last) return false;
  load_adapters<S>(a, tile, l.adapters, s.stages + slot * S::kStageBytes, thread_index());
  return true;
}

// The next stage, or without its weights; the caller commits.
template <class S>
DEVICE void load_stage(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, Loader<S>& l, int slot, bool weights) {
  const bool adapters = a.low && l.k_step == w.k_steps && load_more<S>(a, s, l, slot);
  if (thread_index() == 0) s.more[slot] = adapters;
  if constexpr (S::kDraws) {
    if (adapters || (l.unit >= l.end && !draw_item<S>(w, s, l))) return;
    if (l.k_step == w.k_steps) l.k_step = l.unit % w.k_steps, enter_tile<S>(a, d, w, s, l);
  } else {
    if (adapters || l.unit >= l.end) return;
    if (l.k_step == w.k_steps) l.k_step = 0, enter_tile<S>(a, d, w, s, l);
  }
  if (weights) load_weights<S>(a, d, s, l, slot);
  load_x<S>(a, s, l, slot);
  l.unit++, l.k_step++;
}

// The first stages. Weights of the first tile come first: where tiles are older than what x waits for, the kernel before this one or a word, they need not.
template <class S>
DEVICE void load_first(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, Loader<S>& l) {
  const int k_step = l.k_step, left = l.end - l.unit < w.k_steps - k_step ? l.end - l.unit : w.k_steps - k_step;
  int loaded = 0;
  if (a.early == 1 || a.told) {
#pragma unroll 1
    for (; loaded < S::kAhead && loaded < left; loaded++, l.k_step++) load_weights<S>(a, d, s, l, loaded);
    l.k_step = k_step;
    if (!a.told) wait_for_previous_kernel(), allow_next_kernel();
    else
      while (observe(a.told) == 0) {}
  }
#pragma unroll 1
  for (int i = 0; i < S::kAhead; i++) load_stage<S>(a, d, w, s, l, i, i >= loaded), cp_commit();
}

template <class S>
KERNEL void __launch_bounds__(S::kThreads, kResident<S>) gemm(MarlinMoeGemm a, Derived d) {
  SMEM_DECL;
  if (!a.early) wait_for_previous_kernel(), allow_next_kernel();
  const Shared s = carve<S>(d, smem_);
  const Work w = S::kDraws ? queue_up(a, d) : share_work(a, d, false);
  int block = (int)blockIdx.x;
  if (S::kDraws && w.given == 0) {
    if (thread_index() == 0) *s.before = take_ticket(slot_counters(a));
    sync_block();
    block = (int)*s.before;
  }
  if (block >= (S::kDraws && w.items ? w.items : w.blocks) || w.units == 0) {
    if (a.early) wait_for_previous_kernel();  // so that whoever waits for this kernel has waited for those before
    return leave_queue<S>(a, w);
  }
  Loader<S> l;
  l.unit = w.first(block), l.end = w.first(block + 1), l.entered = 0;
  if (S::kDraws && w.items) begin_item<S>(w, block, l);
  l.k_step = l.unit % w.k_steps;
  int unit = l.unit, slot = 0, ahead = S::kAhead;
  enter_tile<S>(a, d, w, s, l);
  load_first<S>(a, d, w, s, l);
  sync_block();  // the first tile's record is there

  for (int done = 0; S::kDraws ? done < l.entered : unit < l.end; done++) {  // drawn: at a tile's end the next one has been entered, if there is one
    const int32_t* const span = s.spans + done % kQueue * 2;
    if (S::kDraws) unit = span[0];
    const int output = unit / w.k_steps, begin = output * w.k_steps, end = S::kDraws ? span[1] : begin + w.k_steps < l.end ? begin + w.k_steps : l.end;
    const bool complete = unit == begin && end == begin + w.k_steps;
    const int live = s.tiles[done % kQueue].rows;
    Sums<S> sums;
    sums.clear();
    while (unit < end || s.more[slot]) {  // after the weights the tile's adapters
      cp_wait<S::kAhead - 1>();
      sync_block();
      load_stage<S>(a, d, w, s, l, ahead, true);
      cp_commit();
      if (unit == end) {
        multiply_adapters<S>(a, s, slot, live, sums);
      } else {
        const int k_unit = ((unit++ - begin) * S::kWarpsK + warp_index() / S::kWarpsM) * S::kKU;
        if (S::kWarpsK == 1 || k_unit < a.k_units) multiply_live<S>(d, s, slot, live, sums);
      }
      slot = slot + 1 == S::kStages ? 0 : slot + 1;
      ahead = ahead + 1 == S::kStages ? 0 : ahead + 1;
    }
    add_warps<S>(s, sums);
    bool stores;
    if constexpr (S::kDraws) stores = span[1] - span[0] == w.k_steps || add_blocks<S>(a, w, s, span[0] / w.k_steps, sums, span[0] % w.k_steps != 0);
    else stores = complete || add_blocks<S>(a, w, s, output, sums);
    stores = stores && thread_index() < 32 * S::kWarpsM;
    if (a.early == 2) wait_for_previous_kernel(), allow_next_kernel();
    if (stores) store_tile<S>(a, s.tiles[done % kQueue], s.pairs + done % kQueue * S::kTokens, sums);
  }
  leave_queue<S>(a, w);
}

// By wgmma, 16 ranks of B from r0 on where the tensor copy engine cannot bring them. WHOLE: ranks that divide by 8.
template <class S, int HALVES, bool WHOLE>
DEVICE void copy_lines_of_b(const MarlinMoeGemm& a, const Tile& tile, uint8_t* lines, int r0, int rank, uint32_t place, int thread) {
  constexpr int kAtOnce = kCopyThreads / 2;
  static_assert(S::kRows / HALVES % kAtOnce == 0);
  const int half_rows = a.rows / HALVES, row0 = S::kRows / HALVES * tile.row_tile + thread / 2, ranks = rank - r0 - thread % 2 * 8;
  const uint16_t* b = (const uint16_t*)a.low_pool + (int64_t)place * 8 + (int64_t)row0 * rank + r0 + thread % 2 * 8;
  uint8_t* target = lines + thread / 8 * 128 + (thread ^ thread / 8) % 8 * 16;
#pragma unroll(WHOLE ? 4 : 1)
  for (int i = 0; i < S::kRows / kAtOnce; i++, target += kAtOnce / 4 * 128) {
    const int row = i % (S::kRows / HALVES / kAtOnce) * kAtOnce, up = i * kAtOnce >= S::kRows / HALVES ? half_rows : 0;
    load_piece(target, b + (int64_t)(row + up) * rank, row0 + row < half_rows ? ranks : 0, WHOLE);
  }
}

// s of the same ranks for rows `first` to `end` of the tile, zeros for the others. One warp a scheduler copies, so that instructions count.
template <class S, int HALVES, bool WHOLE>
DEVICE void copy_s(const MarlinMoeGemm& a, const Tile& tile, uint8_t* stage, int i, int r0, int rank, int up, int first, int end, int thread) {
  constexpr int kAtOnce = kCopyThreads / (2 * HALVES);
  const int row0 = thread / (2 * HALVES), half = thread / 2 % HALVES, piece = thread % 2, ranks = rank - r0 - piece * 8, low = first - row0, high = end - row0;
  const uint16_t* s = (const uint16_t*)a.low + (int64_t)(tile.start + row0) * a.low_width + r0 + half * up + piece * 8;
  uint8_t* target = stage + S::kWeightBytes + row0 * 128 + ((2 * i + piece + 4 * half) ^ row0 % 8) * 16;
#pragma unroll(WHOLE ? 8 : 1)
  for (int at = 0; at < S::kTokens; at += kAtOnce, s += kAtOnce * a.low_width) {
    if (at >= tile.rows || (at + kAtOnce > S::kTokens && at + row0 >= S::kTokens)) break;
    load_piece(target + at * 128, s, at >= low && at < high ? ranks : 0, WHOLE);
  }
}

template <class S, int HALVES>
DEVICE int copy_records(const MarlinMoeGemm& a, const TensorMap& lines, const Tile& tile, AdaptersAhead& l, uint8_t* stage, int thread, Barrier* full, int& sixteens, bool& copied) {
  constexpr int kMost = 4 / HALVES, kBox = kLinesOfB<S> / 2;  // sixteens of a stage; lines that are copied at once
  const int base = l.base(), at_hand = l.kAtHand;
  int bytes = 0;
  copied = true;
#pragma unroll 1
  for (sixteens = 0; sixteens < kMost && l.next - base < at_hand; sixteens++) {
    int record = l.next - base;
    const int first = l.field(record, 0) - tile.start, rank = l.field(record, 2), up = l.field(record, 3) * a.low_max_rank, place = l.field(record, 4);
    int end = first + l.field(record, 1);
    for (record++; record < at_hand && l.field(record, 4) == place && l.field(record, 0) - tile.start == end; record++) end += l.field(record, 1);
    const bool whole = (rank | a.low_width | up) % 8 == 0;
    uint8_t* const b = place_of_b<S>(stage, sixteens);
    if (rank == 16 && place % 8 == 0) {
      const int line = (int)((uint32_t)place / 8) + kLinesOfB<S> / HALVES * tile.row_tile;
      if (thread == 0) copy_box(b, &lines, full, 0, line, 0, kKeep), copy_box(b + kBox * 128, &lines, full, 0, line + (HALVES == 2 ? a.rows / 8 : kBox), 0, kKeep);
      bytes += 2 * kBox * 128;
    } else if (rank % 8 == 0) {
      copy_lines_of_b<S, HALVES, true>(a, tile, b, l.rank, rank, (uint32_t)place, thread);
    } else {
      copy_lines_of_b<S, HALVES, false>(a, tile, b, l.rank, rank, (uint32_t)place, thread);
    }
    if (whole) copy_s<S, HALVES, true>(a, tile, stage, sixteens, l.rank, rank, up, first, end, thread);
    else copy_s<S, HALVES, false>(a, tile, stage, sixteens, l.rank, rank, up, first, end, thread);
    copied = copied && whole;
    l.rank += 16;
    if (l.rank >= rank) l.rank = 0, l.next = base + record;
  }
  if (base + at_hand < l.last) l.fetch(a.low_records);
  return bytes;
}

// The copying warpgroup: a tile's stages of adapters; one with nothing in it where there are none.
template <class S>
DEVICE void copy_adapters(const MarlinMoeGemm& a, const Shared& s, const TensorMap& lines, const Tile& tile, AdaptersAhead& l, Stages<S>& stages) {
  do {
    const int thread = thread_index_here() - S::kThreads;  // nothing that is made of it is kept beside a tile's other stages: registers
    Barrier* full = stages.full + stages.slot;
    uint8_t* const stage = s.stages + stages.slot * S::kStageBytes;
    barrier_wait(stages.empty + stages.slot, stages.parity);
    int sixteens;
    bool copied;
    const int bytes = a.halves == 2 ? copy_records<S, 2>(a, lines, tile, l, stage, thread, full, sixteens, copied) : copy_records<S, 1>(a, lines, tile, l, stage, thread, full, sixteens, copied);
    if (thread == 0) s.more[stages.slot] = 2 * sixteens + (l.next < l.last), barrier_expect(full, bytes);
    if (copied) barrier_arrive_after_copies(full);
    else cp_commit(), cp_wait<0>(), barrier_arrive(full);
    stages.advance();
  } while (l.next < l.last);
}

// Registers of a thread, of which a block gets 168 for each of its three warpgroups and no more: one that asks for them waits for ever.
template <class S>
constexpr bool kFewRegisters = S::kBits == 8 && (S::Codes::kZeros || kFollows<S>);  // to copy with: the others dequantize with more
template <class S>
constexpr int kCopyRegisters = kFewRegisters<S> ? 72 : 88;
template <class S>
constexpr int kMultiplyRegisters = (3 * 168 - kCopyRegisters<S>) / 2;

// The copying warpgroup's way from tile to tile. After a block's first the next is whichever nobody has taken yet, so that blocks that start late,
// beside a shrink, or have larger tiles do fewer. What a tile begins with is found during the last stages of the one before, each load a stage
// before it is needed.
template <class S>
struct Finder {
  static constexpr int kPairs = (S::kTokens + kCopyThreads - 1) / kCopyThreads;
  const MarlinMoeGemm& a;
  const Derived& d;
  const Work& w;
  const Shared& s;
  const int thread;
  int output = (int)blockIdx.x, ticket = 0;
  Nearby near = {};
  Tile tile = {};
  int32_t pairs[kPairs] = {};  // this thread's share of the tile's

  DEVICE void begin() {
    near.look(a, d, w, output);
    tile = near.find(a, d, w, output);
    ask_pairs();
  }
  DEVICE void ask_pairs() {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int row = thread + i * kCopyThreads, sorted = tile.start + row;
      pairs[i] = row < tile.rows ? a.sorted_pairs[sorted] : sorted;
    }
  }
  DEVICE void look() {
    if (thread == 0) {
      if (ticket == w.outputs - 1) a.arrivals[a.gather] = 0;  // the last that is drawn: each block draws until there is no tile for it
      *s.before = (uint32_t)(w.blocks + ticket);
    }
    sync_warpgroup(1);
    output = (int)*s.before;
    if (output < w.outputs) near.look(a, d, w, output);
  }
  // Before each stage of the tile at hand; leaves `tile` the next one.
  DEVICE void step(int k_step) {
    const auto before_end = [&](int stages_left) { return k_step == (w.k_steps > stages_left ? w.k_steps - stages_left : 0); };
    // A counter of gate_up's and one of down's, which may begin before gate_up has ended.
    if (thread == 0 && before_end(4)) ticket = (int)take_ticket(a.arrivals + a.gather);
    if (before_end(3)) look();
    if (before_end(2) && output < w.outputs) tile = near.find(a, d, w, output);
    if (k_step + 1 == w.k_steps) ask_pairs();
  }
};

// What a copying thread knows of a tile: where it reads in the next stage, and its pieces of x at k = 0. One warp a scheduler copies and shares it
// with those that multiply, so that instructions count.
constexpr int kBoxRows = 16;  // that the tensor copy engine brings at once
template <class S>
struct Source {
  static constexpr int kRowStep = kCopyThreads / S::kXPieces, kLoads = S::kTokens / kRowStep;  // rows of x that are copied at once; of a thread
  static_assert(kRowStep % 8 == 0, "rows of a thread differ in their swizzle");
  const uint8_t *codes, *scales, *zeros, *x;
  uint32_t x_rows[kFewRegisters<S> ? 1 : kLoads];  // with few registers they are found in every stage
  int start, all, rows;      // of the tile; rows from this thread's first on
  int present, scale_place;  // rows of units that lie within the weight; the piece of a stage's scales, -1: none

  DEVICE void enter(const MarlinMoeGemm& a, const Derived& d, const Tile& tile, int thread) {
    const int row_unit = tile.expert * a.row_units + tile.row_tile * S::kWarpsM, left = a.row_units - tile.row_tile * S::kWarpsM;
    const int row = thread >> (2 + d.groups_log2), piece = thread & ((4 << d.groups_log2) - 1);
    present = left < S::kWarpsM ? left : S::kWarpsM, start = tile.start, all = tile.rows, rows = tile.rows - thread / S::kXPieces;
    scale_place = row < present ? thread * 16 : -1;
    x = (const uint8_t*)a.x;
    codes = (const uint8_t*)a.packed + (int64_t)(row_unit + thread / 32) * a.k_units * S::kUnitBytes;
    scales = piece_of(a.scales, (uint32_t)(row_unit + row) * a.groups * 4 + piece);
    if (S::Codes::kZeros) zeros = piece_of(a.zeros, (uint32_t)(row_unit + row) * a.groups * 2 + piece);
  }
  // Of the i-th row that a thread copies.
  DEVICE static uint32_t x_row(const MarlinMoeGemm& a, const Derived& d, const int32_t* pairs, int thread, int i) {
    return (uint32_t)d.token_of(pairs[thread / S::kXPieces + i * kRowStep]) * (uint32_t)(a.k / 8) + thread % S::kXPieces;
  }
};

// The copying warpgroup: one stage of a tile's weights, scales and x.
template <class S>
DEVICE void copy_stage(const MarlinMoeGemm& a, const Derived& d, const Shared& s, const TensorMap& map, const int32_t* pairs, Source<S>& from, int slot, int k, int x_place, int thread, Barrier* full) {
  uint8_t* target = s.stages + slot * S::kStageBytes;
  const int boxes = a.gather ? 0 : ceil_div(from.all, kBoxRows), step = (S::kKU >> d.group_shift) * 64;
  if (thread == 0) barrier_expect(full, from.present * S::kWarpBytes + boxes * (S::kK / 64 * kBoxRows * 128));
  if (lane_index() == 0) {
#pragma unroll
    for (int i = 0; i < S::kWarpsM; i += kCopyThreads / 32) {
      const int row = thread / 32 + i;
      if (row < from.present) copy_bulk(target + row * S::kWarpBytes, from.codes + i * (int64_t)a.k_units * S::kUnitBytes, S::kWarpBytes, full);
    }
  }
  if (from.scale_place >= 0) {
    cp16(s.scales + slot * d.scale_bytes + from.scale_place, from.scales, true);
    if constexpr (S::Codes::kZeros) {
      const int row = thread >> (2 + d.groups_log2), piece = thread & ((4 << d.groups_log2) - 1);
      if (piece < 2 << d.groups_log2) cp16(s.zeros + slot * d.scale_bytes / 2 + (row << d.groups_log2) * 32 + piece * 16, from.zeros, true);
    }
  }
  from.codes += S::kWarpBytes, from.scales += step;
  if constexpr (S::Codes::kZeros) from.zeros += step / 2;
  if (a.gather) {
    target += x_place;
    hold_here(target);
    const bool inside = k + thread % S::kXPieces * 8 < a.k;
#pragma unroll
    for (int i = 0; i < from.kLoads; i++)
      if (i * from.kRowStep < from.rows) cp16(target + i * from.kRowStep * 128, piece_of(from.x, kFewRegisters<S> ? from.x_row(a, d, pairs, thread, i) : from.x_rows[i]), inside);
    from.x += S::kK * 2;
  } else if (lane_index() == 0) {  // rows in order: by the tensor copy engine
    for (int row = thread / 64 * kBoxRows, panel = thread / 32 % 2; row < boxes * kBoxRows; row += 2 * kBoxRows)
      copy_box(target + S::kWeightBytes + (panel * S::kTokens + row) * 128, &map, full, k + panel * 64, from.start + row, 0, kKeep);
  }
  barrier_arrive_after_copies(full);
}

// Down need not wait for gate_up's end: gate_up counts beside a tile's rows, in the upper half of their word, the tiles of rows that are stored.
DEVICE uint32_t* report_of(const MarlinMoeGemm& a, int tile) { return (uint32_t*)a.tiles + 3 * (int64_t)tile + 2; }
DEVICE void report_tile(const MarlinMoeGemm& a, int tile) {
  if (a.report) publish_add(report_of(a, tile), kReport);
}
DEVICE void wait_for_rows(const MarlinMoeGemm& a, int tile) {
  if (a.behind)
    while ((int)(observe(report_of(a, tile)) / kReport) < a.behind) {}
}

// The copying warpgroup: all stages of the block's tiles, one after another, each once the multiplying warps are done with what lay there.
template <class S>
DEVICE void copy_stages(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, const TensorMap& map, const TensorMap& lines, Stages<S> stages) {
  const int thread = thread_index() - S::kThreads, piece = thread % S::kXPieces, first_row = thread / S::kXPieces;
  const int x_place = S::kWeightBytes + (piece / 8 * S::kTokens + first_row) * 128 + (piece % 8 ^ first_row % 8) * 16;
  int entered = 0, before = 0;  // the tile before this one
  Finder<S> next{a, d, w, s, thread};
  next.begin();
  Source<S> from;
  AdaptersAhead adapters;
  stages.parity = 1;  // nobody has to leave the first round
  while (next.output < w.outputs) {
    const Tile tile = next.tile;
    const int queue = entered++ % kQueue;
    int32_t* const here = s.pairs + queue * S::kTokens;
    from.enter(a, d, tile, kFollows<S> ? thread_index_here() - S::kThreads : thread);  // of which nothing is kept: registers
    if (thread == 0) s.tiles[queue] = tile;
#pragma unroll
    for (int i = 0; i < next.kPairs; i++)
      if (thread + i * kCopyThreads < S::kTokens) here[thread + i * kCopyThreads] = next.pairs[i];
    if (a.low && (a.early != 2 || entered > 1)) adapters.ask(a, tile.index);
    if (thread == 0) wait_for_rows(a, tile.index);
    sync_warpgroup(1);  // one thread's arrival below hands all of this over
    if (a.behind && lane_index() == 0) publish_rows();
    if (a.gather && !kFewRegisters<S>)
#pragma unroll
      for (int i = 0; i < from.kLoads; i++) from.x_rows[i] = from.x_row(a, d, here, thread, i);
    for (int k_step = 0; k_step < w.k_steps; k_step++, stages.advance()) {
      next.step(k_step);
      if (a.low && k_step == (w.k_steps > 2 ? w.k_steps - 2 : 0) && adapters.last >= 0) adapters.fetch(a.low_records);
      barrier_wait(stages.empty + stages.slot, stages.parity);
      if (!kFollows<S> && k_step == S::kStages && entered > 1 && thread == kCopyThreads - 32) report_tile(a, before);  // all multiplying warps are in this tile
      copy_stage<S>(a, d, s, map, here, from, stages.slot, k_step * S::kK, x_place, thread, stages.full + stages.slot);
    }
    if constexpr (!kFollows<S>) before = tile.index;
    if (!a.low) continue;
    if (adapters.last < 0) {
      if (a.early == 2) wait_for_previous_kernel(), allow_next_kernel();
      adapters.ask(a, tile.index);
      adapters.fetch(a.low_records);
    }
    if constexpr (kFollows<S>) {
      // All multiplying warps are in this tile. What comes of the arrival is looked at when it is needed.
      const uint32_t reported = entered > 1 && thread == kCopyThreads - 32 ? arrive(report_of(a, s.tiles[(entered - 2) % kQueue].index), kReport) : 0;
      AdaptersAhead next = adapters;
      next.fetch(a.next.records);
      copy_adapters<S>(a, s, lines, tile, adapters, stages);
      copy_next<S>(a, s, d, tile, reported, next, stages);
    } else {
      copy_adapters<S>(a, s, lines, tile, adapters, stages);
    }
  }
  if (a.behind) wait_for_previous_kernel(), allow_next_kernel();  // whoever waits for this kernel has waited for those before
  // One stage more, so that the multiplying warps, which begin it with the last tile's end, learn that there is no tile.
  barrier_wait(stages.empty + stages.slot, stages.parity);
  if (thread == 0) s.tiles[entered % kQueue].rows = -1, barrier_arrive(stages.full + stages.slot);
  barrier_arrive(stages.full + stages.slot);
  if (!a.report) return;
  if (thread == kCopyThreads - 32) {
    barrier_wait(stages.empty + stages.slot, stages.parity ^ 1);  // they have stored the last
    if constexpr (kFollows<S>) *s.open = all_parts(d, arrive(report_of(a, s.tiles[(entered - 1) % kQueue].index), kReport));
    else report_tile(a, before);
  }
  if (!kFollows<S>) return;
  stages.advance();  // and one more, to say whether the last tile's parts are theirs to add up
  barrier_wait(stages.empty + stages.slot, stages.parity);
  if (thread == 0) barrier_arrive(stages.full + stages.slot);
  barrier_arrive(stages.full + stages.slot);
}

// The same product by wgmma, on sm_90: a warpgroup copies and the others multiply; whole tiles only.
template <class S>
KERNEL void __launch_bounds__(S::kThreads + kCopyThreads, 1) gemm_by_warpgroups(MarlinMoeGemm a, Derived d, const GRID_CONSTANT TensorMap map, const GRID_CONSTANT TensorMap lines) {
#if SM90
  static_assert(S::kThreads == 256 && kMultiplyRegisters<S> % 8 == 0, "two multiplying warpgroups");
  SMEM_DECL;
  const Shared s = carve<S>(d, smem_);
  const Stages<S> initial = {s.barriers, s.barriers + S::kStages};
  if (thread_index() < S::kStages) {
    barrier_init(initial.full + thread_index(), kCopyThreads + 1);
    barrier_init(initial.empty + thread_index(), S::kThreads / 32);
    publish_barriers();
  }
  if (a.early != 2 && !a.behind) wait_for_previous_kernel(), allow_next_kernel();
  sync_block();
  const Work w = share_work(a, d, true);
  if ((int)blockIdx.x >= w.outputs) {
    if (a.early) wait_for_previous_kernel();
    return;
  }
  if (warp_index() >= S::kThreads / 32) {
    give_registers<kCopyRegisters<S>>();
    copy_stages<S>(a, d, w, s, map, lines, initial);
  } else {
    take_registers<kMultiplyRegisters<S>>();
    Stages<S> stages = initial;
    Ready<S> ready;
    ready.rows.set_zeros(0x01010101u << (S::kBits - 1));
    for (int queue = 0;; queue = (queue + 1) % kQueue) {  // a tile begins behind the end of the one before, which need not wait for its first stage
      ready.begin(d, s, stages);
      const int known = s.tiles[queue].rows;
      if (known < 0) {
        sync_warp();
        if (lane_index() == 0) barrier_arrive(stages.empty + stages.slot);
        if constexpr (kFollows<S>) {
          stages.advance();
          stages.wait();
          if (shuffle((uint32_t)*s.open, 0)) add_parts<S>(a, s.tiles[(queue + kQueue - 1) % kQueue]);
        }
        break;
      }
      const int packed = kFollows<S> ? anew(known | queue << 16) : known, mask = kFollows<S> ? 0xffff : -1;  // in one register; the rest is read again for the store
      Sums<S> sums;
      sums.clear();
      for (int left = w.k_steps - 1; left >= 0; left--) multiply_by_warpgroup<S, false>(d, s, packed & mask, 0, 0, left > 0, stages, ready, sums);
      for (bool more = a.low; more;) {
        stages.wait();
        const int told = (int)shuffle((uint32_t)s.more[stages.slot], 0);
        more = told & 1;
        multiply_by_warpgroup<S, true>(d, s, packed & mask, 4 * a.halves - 4, told >> 1, false, stages, ready, sums);
      }
      if (a.early == 2) wait_for_previous_kernel(), allow_next_kernel();
      if constexpr (kFollows<S>) {
        queue = anew(packed) >> 16;
        if (store_with_next<S>(a, s, s.tiles[queue], sums, stages)) add_parts<S>(a, s.tiles[(queue + kQueue - 1) % kQueue]);
      } else {
        store_tile<S>(a, s.tiles[queue], s.pairs + queue * S::kTokens, sums);
      }
    }
  }
#endif
}

template <class S>
int launch_gemm(const MarlinMoeGemm& a, MarlinMoePlan plan, void* stream) {
  const Derived d = derive<S>(a, plan.sms);
  const bool behind = a.report || a.behind, next = a.next.parts != nullptr;
  if ((behind && !S::kWarpgroup) || (a.report && ((a.low && !next) || d.k_steps <= S::kStages)) || (next && !(a.report && a.low && a.activation))) return 1;  // cudaErrorInvalidValue
  Launch how = {(unsigned)marlin_moe_blocks(plan), (unsigned)S::kThreads, (size_t)carve<S>(d, (uint8_t*)1024).bytes, stream, plan.overlap && can_overlap()};
  if constexpr (S::kWarpgroup) {
    how.threads += kCopyThreads;
    TensorMap map = {}, lines = {};
    int error = a.gather ? 0 : describe_boxes(&map, a.x, a.is_bf16, {(uint64_t)a.k, (uint64_t)a.pairs, 1}, {(uint64_t)a.k, (uint64_t)a.k * a.pairs}, {64, kBoxRows, 1});
    if (!error && a.low && a.low_lines > 0) error = describe_boxes(&lines, a.low_pool, a.is_bf16, {64, (uint64_t)a.low_lines, 1}, {64, 64 * (uint64_t)a.low_lines}, {64, kLinesOfB<S> / 2, 1});
    if (error) return error;
    return next ? launch(how, gemm_by_warpgroups<Following<S>>, a, d, map, lines) : launch(how, gemm_by_warpgroups<S>, a, d, map, lines);
  } else {
    if constexpr (kBySlot<S>)
      if (a.by_slot) return kShrinks<S> == (a.by_slot->pool != nullptr) ? launch(how, gemm_by_slot<S>, a, *a.by_slot, d) : 1;
    if constexpr (S::kTokens == 16 && !S::Codes::kZeros) {  // zero points take registers
      how.shared_bytes = (size_t)carve<Drawing<S>>(d, (uint8_t*)1024).bytes;
      if (a.low) return launch(how, gemm<Drawing<S>>, a, d);
      how.shared_bytes = (size_t)carve<S>(d, (uint8_t*)1024).bytes;
    }
    return launch(how, gemm<S>, a, d);
  }
}

template <class S>
constexpr MarlinMoeShape describe() {
  return {S::kRows, S::kTokens, S::kK, S::kThreads, S::kBlocks, S::kStages};
}

// The shapes, in the order of `config`.
template <class F>
struct Shapes {
  static constexpr bool kFour = F::kBits == 4;                      // int8 takes twice the shared memory for the same numbers
  using S0 = Shape<F, 1, 4, 1, 4, 4, 4>;                            // few rows in all: 32 rows, four warps along k; 8 tokens
  using S1 = Shape<F, 4, 1, 2, 4, kFour ? 4 : 3, kFour ? 4 : 3>;    // 16
  using S2 = Shape<F, 4, 1, 4, 4, 3, kFour && !F::kZeros ? 4 : 3>;  // 32; zero points take registers
  using S3 = Shape<F, 4, 1, 8, 2, 4, 2>;                            // 64
  using S4 = Shape<F, 8, 1, 18, 4, kFour ? 4 : 3, 1, true>;  // 144 by wgmma, on sm_90 alone: experts of 128 rows on average fit one tile, of 256 two
};

template <class F>
int dispatch(const MarlinMoeGemm& a, MarlinMoePlan plan, void* stream) {
  using All = Shapes<F>;
  switch (plan.config) {
    case 0: return launch_gemm<typename All::S0>(a, plan, stream);
    case 1: return launch_gemm<typename All::S1>(a, plan, stream);
    case 2: return launch_gemm<typename All::S2>(a, plan, stream);
    case 4: return launch_gemm<typename All::S4>(a, plan, stream);
    default: return launch_gemm<typename All::S3>(a, plan, stream);
  }
}

// For the activation type, and with or without zero points.
template <int BITS>
int dispatch_type(const MarlinMoeGemm& a, MarlinMoePlan plan, void* stream) {
  if (a.is_bf16) return a.zeros ? dispatch<Format<BFloat16, BITS, true>>(a, plan, stream) : dispatch<Format<BFloat16, BITS, false>>(a, plan, stream);
  return a.zeros ? dispatch<Format<Float16, BITS, true>>(a, plan, stream) : dispatch<Format<Float16, BITS, false>>(a, plan, stream);
}

}  // namespace
