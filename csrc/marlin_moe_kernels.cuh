// The two kernels of the grouped GEMM of marlin_moe.cu, and the shapes of tiles that are built.
#pragma once
#include "marlin_moe_lora.cuh"

namespace {

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
  if (adapters || l.unit >= l.end) return;
  if (l.k_step == w.k_steps) l.k_step = 0, enter_tile<S>(a, d, w, s, l);
  if (weights) load_weights<S>(a, d, s, l, slot);
  load_x<S>(a, s, l, slot);
  l.unit++, l.k_step++;
}

// The first stages. Weights of the first tile come first: where tiles are older than the kernel before this one, they need not wait for its end.
template <class S>
DEVICE void load_first(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, Loader<S>& l) {
  const int k_step = l.k_step, left = l.end - l.unit < w.k_steps - k_step ? l.end - l.unit : w.k_steps - k_step;
  int loaded = 0;
  if (a.early == 1) {
#pragma unroll 1
    for (; loaded < S::kAhead && loaded < left; loaded++, l.k_step++) load_weights<S>(a, d, s, l, loaded);
    l.k_step = k_step;
    wait_for_previous_kernel(), allow_next_kernel();
  }
#pragma unroll 1
  for (int i = 0; i < S::kAhead; i++) load_stage<S>(a, d, w, s, l, i, i >= loaded), cp_commit();
}

template <class S>
KERNEL void __launch_bounds__(S::kThreads, kResident<S>) gemm(MarlinMoeGemm a, Derived d) {
  SMEM_DECL;
  if (!a.early) wait_for_previous_kernel(), allow_next_kernel();
  const Shared s = carve<S>(d, smem_);
  const Work w = share_work(a, d, S::kWarpgroup);
  const int block = (int)blockIdx.x;
  if (block >= w.blocks || w.units == 0) {
    if (a.early) wait_for_previous_kernel();  // so that whoever waits for this kernel has waited for those before
    return;
  }
  Loader<S> l;
  l.unit = w.first(block), l.end = w.first(block + 1), l.entered = 0;
  l.k_step = l.unit % w.k_steps;
  int unit = l.unit, slot = 0, ahead = S::kAhead;
  enter_tile<S>(a, d, w, s, l);
  load_first<S>(a, d, w, s, l);
  sync_block();  // the first tile's record is there

  for (int done = 0; unit < l.end; done++) {
    const int output = unit / w.k_steps, begin = output * w.k_steps, end = begin + w.k_steps < l.end ? begin + w.k_steps : l.end;
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
    const bool stores = (complete || add_blocks<S>(a, w, s, output, sums)) && thread_index() < 32 * S::kWarpsM;
    if (a.early == 2) wait_for_previous_kernel(), allow_next_kernel();
    if (stores) store_tile<S>(a, s.tiles[done % kQueue], s.pairs + done % kQueue * S::kTokens, sums);
  }
}

// By wgmma, the i-th sixteen ranks of a stage, from r0 on, of rows `first` to `end` of the tile. One warp a scheduler copies, so that instructions
// count: addresses advance. WHOLE: ranks that divide by 8.
constexpr int kCopyThreads = 128;
template <class S, bool WHOLE>
DEVICE void copy_sixteen(const MarlinMoeGemm& a, const Tile& tile, uint8_t* stage, int i, int r0, int rank, int up, uint32_t place, int first, int end, int thread) {
  const int lane = thread % 32, warp = thread / 32, half_rows = a.rows / a.halves, unit_rows = 32 / a.halves, ranks = rank - r0 - lane % 2 * 8;
  const int row = unit_rows * (tile.row_tile * S::kWarpsM + warp) + (a.halves == 2 ? lane / 2 : lane / 4 * 4 + lane / 2 % 2);
  const int further = unit_rows * (kCopyThreads / 32), other = (a.halves == 2 ? half_rows : 2) * rank;
  const uint16_t* b = (const uint16_t*)a.low_pool + (int64_t)place * 8 + (int64_t)row * rank + r0 + lane % 2 * 8;
  const int part = i / S::kSixteens, warp_bytes = part ? 2048 : S::kWarpBytes;
  uint8_t* target = place_of_b<S>(stage, part) + warp * warp_bytes + i % S::kSixteens * 1024 + lane / 4 * 128;
  const int piece = (lane % 4 ^ lane / 4) * 16;
#pragma unroll
  for (int j = 0; j < S::kWarpsM / (kCopyThreads / 32); j++, b += further * rank, target += kCopyThreads / 32 * warp_bytes) {
    const int count = row + j * further < half_rows ? ranks : 0;
    load_piece(target + piece, b, count, WHOLE);
    load_piece(target + (piece ^ 64), b + other, count, WHOLE);
  }
  const int at_once = kCopyThreads >> a.halves, half = thread >> 1 & (a.halves - 1), row0 = thread >> a.halves, low_ranks = rank - r0 - thread % 2 * 8;
  const uint16_t* s = (const uint16_t*)a.low + (int64_t)(tile.start + row0) * a.low_width + r0 + half * up + thread % 2 * 8;
  target = stage + S::kWeightBytes + row0 * 128 + ((2 * i + thread % 2 + 4 * half) ^ row0 % 8) * 16;
#pragma unroll 1
  for (int at = row0; at < tile.rows; at += at_once, s += at_once * a.low_width, target += at_once * 128)
    load_piece(target, s, at >= first && at < end ? low_ranks : 0, WHOLE);
}

// The next stage of a tile's records by wgmma. Returns whether all of it is on its way by cp.async; parts: how many of place_of_b it has.
template <class S>
DEVICE bool copy_records(const MarlinMoeGemm& a, const Tile& tile, AdaptersAhead& l, uint8_t* stage, int thread, int& parts) {
  const int base = l.next, at_hand = l.last - base < l.kAtHand ? l.last - base : l.kAtHand;
  bool copied = true;
  parts = 1;
#pragma unroll 1
  for (int i = 0; i < S::kSixteens * parts; i++) {
    int first = 0, end = 0, rank = 0, up = 0, record = l.next - base;
    uint32_t place = 0;
    if (record < at_hand) {
      first = l.field(record, 0) - tile.start, end = first + l.field(record, 1), rank = l.field(record, 2), up = l.field(record, 3) * a.low_max_rank;
      place = (uint32_t)l.field(record, 4);
      for (record++; record < at_hand && l.field(record, 4) == (int)place && l.field(record, 0) - tile.start == end; record++) end += l.field(record, 1);
    }
    const bool whole = (rank | a.low_width | up) % 8 == 0;
    if (whole) copy_sixteen<S, true>(a, tile, stage, i, l.rank, rank, up, place, first, end, thread);
    else copy_sixteen<S, false>(a, tile, stage, i, l.rank, rank, up, place, first, end, thread);
    copied = copied && whole;
    l.rank += 16;
    if (l.rank >= rank) l.rank = 0, l.next = base + record;
    if (i + 1 == S::kSixteens && a.halves == 1 && l.next - base < at_hand) parts = 2;
  }
  l.fetch(a);
  return copied;
}

// The copying warpgroup: a tile's stages of adapters; one with nothing in it where there are none.
template <class S>
DEVICE void copy_adapters(const MarlinMoeGemm& a, const Shared& s, const Tile& tile, AdaptersAhead& l, Stages<S>& stages, int thread) {
  do {
    Barrier* full = stages.full + stages.slot;
    barrier_wait(stages.empty + stages.slot, stages.parity);
    int parts;
    const bool copied = copy_records<S>(a, tile, l, s.stages + stages.slot * S::kStageBytes, thread, parts);
    if (thread == 0) s.more[stages.slot] = 2 * parts + (l.next < l.last), barrier_arrive(full);
    if (copied) barrier_arrive_after_copies(full);
    else cp_commit(), cp_wait<0>(), barrier_arrive(full);
    stages.advance();
  } while (l.next < l.last);
}

// Registers of a thread, of which a block gets 168 for each of its three warpgroups and no more: one that asks for them waits for ever.
template <class S>
constexpr bool kFewRegisters = S::kBits == 8 && S::Codes::kZeros;  // to copy with: the others dequantize with more
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
DEVICE void report_tile(const MarlinMoeGemm& a, int tile) {
  if (a.report) publish_add((uint32_t*)a.tiles + 3 * (int64_t)tile + 2, kReport);
}
DEVICE void wait_for_rows(const MarlinMoeGemm& a, int tile) {
  if (a.behind)
    while ((int)(observe((const uint32_t*)a.tiles + 3 * (int64_t)tile + 2) / kReport) < a.behind) {}
}

// The copying warpgroup: all stages of the block's tiles, one after another, each once the multiplying warps are done with what lay there.
template <class S>
DEVICE void copy_stages(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, const TensorMap& map, Stages<S> stages) {
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
    from.enter(a, d, tile, thread);
    if (thread == 0) s.tiles[queue] = tile;
#pragma unroll
    for (int i = 0; i < next.kPairs; i++)
      if (thread + i * kCopyThreads < S::kTokens) here[thread + i * kCopyThreads] = next.pairs[i];
    if (a.low && (!a.early || entered > 1)) adapters.ask(a, tile.index);
    if (thread == 0) wait_for_rows(a, tile.index);
    sync_warpgroup(1);  // one thread's arrival below hands all of this over
    if (a.behind && lane_index() == 0) publish_rows();
    if (a.gather && !kFewRegisters<S>)
#pragma unroll
      for (int i = 0; i < from.kLoads; i++) from.x_rows[i] = from.x_row(a, d, here, thread, i);
    for (int k_step = 0; k_step < w.k_steps; k_step++, stages.advance()) {
      next.step(k_step);
      if (a.low && k_step + 1 == w.k_steps && adapters.last >= 0) adapters.fetch(a);
      barrier_wait(stages.empty + stages.slot, stages.parity);
      if (k_step == S::kStages && entered > 1 && thread == kCopyThreads - 32) report_tile(a, before);  // all multiplying warps are in this tile
      copy_stage<S>(a, d, s, map, here, from, stages.slot, k_step * S::kK, x_place, thread, stages.full + stages.slot);
    }
    before = tile.index;
    if (!a.low) continue;
    if (adapters.last < 0) {
      if (a.early == 2) wait_for_previous_kernel(), allow_next_kernel();
      adapters.ask(a, tile.index);
      adapters.fetch(a);
    }
    copy_adapters<S>(a, s, tile, adapters, stages, thread);
  }
  if (a.behind) wait_for_previous_kernel(), allow_next_kernel();  // whoever waits for this kernel has waited for those before
  // One stage more, so that the multiplying warps, which begin it with the last tile's end, learn that there is no tile.
  barrier_wait(stages.empty + stages.slot, stages.parity);
  if (thread == 0) s.tiles[entered % kQueue].rows = -1, barrier_arrive(stages.full + stages.slot);
  barrier_arrive(stages.full + stages.slot);
  if (!a.report || thread != kCopyThreads - 32) return;
  barrier_wait(stages.empty + stages.slot, stages.parity ^ 1);  // they have stored the last
  report_tile(a, before);
}

// The same product by wgmma, on sm_90: a warpgroup copies and the others multiply; whole tiles only.
template <class S>
KERNEL void __launch_bounds__(S::kThreads + kCopyThreads, 1) gemm_by_warpgroups(MarlinMoeGemm a, Derived d, const GRID_CONSTANT TensorMap map) {
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
    copy_stages<S>(a, d, w, s, map, initial);
  } else {
    take_registers<kMultiplyRegisters<S>>();
    Stages<S> stages = initial;
    Ready<S> ready;
    ready.rows.set_zeros(0x01010101u << (S::kBits - 1));
    for (int done = 0;; done++) {  // a tile begins behind the end of the one before, which need not wait for its first stage
      ready.begin(d, s, stages);
      const Tile tile = s.tiles[done % kQueue];
      if (tile.rows < 0) {
        sync_warp();
        if (lane_index() == 0) barrier_arrive(stages.empty + stages.slot);
        break;
      }
      Sums<S> sums;
      sums.clear();
      for (int left = w.k_steps - 1; left >= 0; left--) multiply_by_warpgroup<S, false>(d, s, tile.rows, 0, 0, left > 0, stages, ready, sums);
      for (bool more = a.low; more;) {
        stages.wait();
        const int told = (int)shuffle((uint32_t)s.more[stages.slot], 0);
        more = told & 1;
        multiply_by_warpgroup<S, true>(d, s, tile.rows, 4 * a.halves - 4, told >> 1, false, stages, ready, sums);
      }
      if (a.early == 2) wait_for_previous_kernel(), allow_next_kernel();
      store_tile<S>(a, tile, s.pairs + done % kQueue * S::kTokens, sums);
    }
  }
#endif
}

template <class S>
int launch_gemm(const MarlinMoeGemm& a, MarlinMoePlan plan, void* stream) {
  const Derived d = derive<S>(a, plan.sms);
  if ((a.report && (!S::kWarpgroup || a.low || d.k_steps <= S::kStages)) || (a.behind && (!S::kWarpgroup || a.low))) return 1;  // cudaErrorInvalidValue
  Launch how = {(unsigned)marlin_moe_blocks(plan), (unsigned)S::kThreads, (size_t)carve<S>(d, (uint8_t*)1024).bytes, stream, plan.overlap && can_overlap()};
  if constexpr (S::kWarpgroup) {
    how.threads += kCopyThreads;
    TensorMap map = {};
    const int error = a.gather ? 0 : describe_boxes(&map, a.x, a.is_bf16, {(uint64_t)a.k, (uint64_t)a.pairs, 1}, {(uint64_t)a.k, (uint64_t)a.k * a.pairs}, {64, kBoxRows, 1});
    return error ? error : launch(how, gemm_by_warpgroups<S>, a, d, map);
  } else {
    if constexpr (kBySlot<S>)
      if (a.by_slot) return kShrinks<S> == (a.by_slot->pool != nullptr) ? launch(how, gemm_by_slot<S>, a, *a.by_slot, d) : 1;
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
