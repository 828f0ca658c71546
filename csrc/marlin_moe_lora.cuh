// The GEMM of marlin_moe.cu with adapters, for up to 32 sorted rows a tile.
//
//   * Whose adapter a row has is found by its slot, which is asked for when a tile is entered, and by tables that lie in L1 at its end: there is no chain of records.
//   * Whole tiles are taken from a queue, so that blocks that begin late, beside a shrink, do fewer. Who does a tile changes no sum.
//   * Down computes s = scaling * A x itself where its registers allow it (kShrinks): its blocks begin with A and the weights of their first tiles
//     while gate_up still runs, and share the items of the shrink from a queue, so that whoever waits for s waits for blocks that have started.
//     Products straight from memory to tensor cores: they take k in any order, so that a lane reads eight neighbours of a row at once.
#pragma once
#include "marlin_moe_tiles.cuh"

namespace {

constexpr int kSlotCounters = 4;  // tiles taken, blocks that have ended, items taken, items done; zero before and after
constexpr int kItemRows = 16, kItemRanks = 8, kItemSteps = 8;  // steps: of 32 columns of a warp that are under way at once

DEVICE uint32_t* slot_counters(const MarlinMoeGemm& a) {
  return a.arrivals + gridDim.x + (a.gather ? 0 : kSlotCounters);  // down's blocks may begin before gate_up has ended
}

template <class S>
constexpr bool kBySlot = !S::kWarpgroup && S::kWarpsK == 1 && S::kTokens <= 32;
// Whether s is computed here: of tiles whose registers allow it.
template <class S>
constexpr bool kShrinks = S::kTokens == 16;

// An item of the shrink: rows of one expert and slot by every parts-th eight rows of A. Lane l has row l / 4 of both and eight columns of each 32.
template <class S>
struct Item {
  using T = typename S::Type;
  bool any;  // or there are no more
  int start, rows, first;  // first row, rows, first row of A
  int rank, all;           // of the slot: ranks, rows of A
  float scaling;
  const uint16_t* matrix;

  DEVICE void find(const MarlinMoeSlots& b, int item, int items) {
    any = item < items;
    if (!any) return;
    uint32_t tile[4];
    const int index = item / b.parts;
    load_words(tile, b.tiles + 4 * (int64_t)index);
    const int expert = (int)tile[0], slot = (int)tile[1];
    start = (int)tile[2], rows = (int)tile[3], first = (item - index * b.parts) * kItemRanks;
    rank = b.rank[slot], all = rank * (1 + b.split[slot]), scaling = b.scaling[slot];
    matrix = (const uint16_t*)b.pool + b.offset[slot] + expert * b.stride[slot];
  }
  DEVICE static int column(int step) { return (step * 4 + warp_index()) * 32 + lane_index() % 4 * 8; }

  DEVICE void load_matrix(const MarlinMoeGemm& a, int row0, int step0, uint32_t (&weights)[kItemSteps][4]) const {
    const int row = row0 + lane_index() / 4;
    const uint16_t* from = matrix + (int64_t)row * a.k;
#pragma unroll
    for (int i = 0; i < kItemSteps; i++) {
      const int k = column(step0 + i);
      if (row < all && k < a.k) load_words(weights[i], from + k);
      else weights[i][0] = weights[i][1] = weights[i][2] = weights[i][3] = 0;
    }
  }
  DEVICE void multiply(const MarlinMoeGemm& a, int step0, const uint32_t (&weights)[kItemSteps][4], float (&sum)[4]) const {
#pragma unroll 1
    for (int half = 0; half < 2 && 8 * half < rows; half++) {
      const int row = lane_index() / 4 + 8 * half;
      const uint16_t* from = (const uint16_t*)a.x + (int64_t)(start + row) * a.k;
      uint32_t values[kItemSteps][4];
#pragma unroll
      for (int i = 0; i < kItemSteps; i++) {
        const int k = column(step0 + i);
        if (row < rows && k < a.k) load_words(values[i], from + k);
        else values[i][0] = values[i][1] = values[i][2] = values[i][3] = 0;
      }
#pragma unroll
      for (int i = 0; i < kItemSteps; i++)
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const uint32_t left[4] = {half ? 0 : values[i][j], half ? values[i][j] : 0, half ? 0 : values[i][j + 1], half ? values[i][j + 1] : 0};
          const uint32_t right[2] = {weights[i][j], weights[i][j + 1]};
          T::mma(sum, left, right);
        }
    }
  }
  // Add up the four warps and leave s.
  DEVICE void store(const MarlinMoeGemm& a, float* sums, int row0, const float (&sum)[4]) const {
    float* mine = sums + warp_index() * kItemRows * kItemRanks + lane_index() / 4 * kItemRanks + lane_index() % 4 * 2;
    mine[0] = sum[0], mine[1] = sum[1], mine[8 * kItemRanks] = sum[2], mine[8 * kItemRanks + 1] = sum[3];
    sync_block();
    const int row = thread_index() / kItemRanks, r = row0 + thread_index() % kItemRanks;
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < 4; warp++) total += sums[warp * kItemRows * kItemRanks + thread_index()];
    if (row < rows && r < all) ((uint16_t*)a.low)[(int64_t)(start + row) * a.low_width + (r < rank ? r : r + a.low_max_rank - rank)] = (uint16_t)T::pack(total * scaling, 0.f);
  }
  // `weights`: those of the first steps.
  DEVICE void run(const MarlinMoeGemm& a, const MarlinMoeSlots& b, float* sums, uint32_t (&weights)[kItemSteps][4]) const {
    const int steps = ceil_div(a.k, 128);
#pragma unroll 1
    for (int row0 = first; row0 < all; row0 += b.parts * kItemRanks) {
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (int step = 0; step < steps; step += kItemSteps) {
        if (step > 0 || row0 > first) load_matrix(a, row0, step, weights);
        multiply(a, step, weights, sum);
      }
      if (row0 > first) sync_block();  // the sums before are read
      store(a, sums, row0, sum);
    }
    sync_block();
  }
};

// The loader of a tile whose rows' adapters are found by slot: lane l of every warp looks at row l.
template <class S>
struct RowLoader : Loader<S> {
  int slot;
  uint32_t left;  // rows whose adapters are still to load, or that have none
  int first;      // their first rank to load
  bool ready;     // s is there
};

// Whether a block's next tile is whichever nobody has taken yet.
DEVICE bool by_queue(const Work& w) { return w.grain == w.k_steps; }

template <class S>
DEVICE void enter_tile(const MarlinMoeGemm& a, const MarlinMoeSlots& b, const Derived& d, const Work& w, const Shared& s, RowLoader<S>& l) {
  uint32_t next = 0;
  if (by_queue(w) && thread_index() == 0) next = gridDim.x + take_ticket(slot_counters(a));  // the tile after this one, on its way while this one is found
  const Tile tile = find_tile(a, d, w, l.unit / w.k_steps);
  const int pair = lane_index() < tile.rows ? a.sorted_pairs[tile.start + lane_index()] : -1;
  place_tile<S>(a, d, s, tile, l);
  if (by_queue(w) && thread_index() == 0) s.before[1 + l.entered % 2] = next;
  l.left = 0xffffffffu, l.first = 0;
  l.slot = pair < 0 ? -1 : b.slots[d.token_of(pair)];  // waited for at the tile's end
}

// As load_piece, but a value at a time where rows of odd ranks are not aligned: few registers.
DEVICE void load_piece_by_one(uint8_t* target, const uint16_t* source, int count, bool aligned) {
  if (aligned || count <= 0) return cp16(target, source, count > 0);
#pragma unroll 1
  for (int i = 0; i < 8; i++) ((uint16_t*)target)[i] = i < count ? source[i] : 0;
}

// B of sixteen ranks from `first` on, the i-th of a stage.
template <class S>
DEVICE void load_b(const MarlinMoeGemm& a, const Tile& tile, uint8_t* stage, int i, int first, int rank, int64_t place) {
  const int lane = lane_index(), half_rows = a.rows / a.halves, apart = a.halves == 2 ? half_rows : 2, unit = tile.row_tile * S::kWarpsM + warp_index();
  const int row = a.halves == 2 ? 16 * unit + lane / 2 : 32 * unit + lane / 4 * 4 + lane / 2 % 2;
  const uint16_t* from = (const uint16_t*)a.low_pool + place * 8 + first + lane % 2 * 8;
#pragma unroll 1
  for (int f = 0; f < 2; f++)
    load_piece_by_one(stage + warp_index() * S::kWarpBytes + i * 1024 + lane / 4 * 128 + ((4 * f + lane % 4) ^ lane / 4) * 16, from + (int64_t)(row + f * apart) * rank,
                      row < half_rows ? rank - first - lane % 2 * 8 : 0, rank % 8 == 0);
}

// s of the same for the rows `mine`, zeros for the others; `up` columns from the gate half's to the up half's.
template <class S>
DEVICE void load_s(const MarlinMoeGemm& a, const Tile& tile, uint8_t* stage, int i, int first, int rank, int up, uint32_t mine) {
  const bool whole = (rank | a.low_width | up) % 8 == 0;
#pragma unroll 1
  for (int index = thread_index(); index < tile.rows * 2 * a.halves; index += S::kThreads) {
    const int row = index >> a.halves, half = index >> 1 & (a.halves - 1), piece = index & 1;
    const uint16_t* from = (const uint16_t*)a.low + (int64_t)(tile.start + row) * a.low_width + first + half * up + piece * 8;
    load_piece_by_one(stage + S::kWeightBytes + row * 128 + ((2 * i + piece + 4 * half) ^ row % 8) * 16, from, mine >> row & 1 ? rank - first - piece * 8 : 0, whole);
  }
}

// The next stage of adapters of the tile whose weights are loaded: how many times 16 ranks it holds.
template <class S>
DEVICE int load_more(const MarlinMoeGemm& a, const MarlinMoeSlots& b, const Shared& s, RowLoader<S>& l, uint8_t* stage) {
  if (l.left == 0) return 0;
  const bool known = l.slot >= 0 && l.slot < b.num_slots;  // the tables lie in L1
  const int lane_rank = known ? b.rank[l.slot] : 0, lane_split = known ? b.split[l.slot] : 0;
  const int64_t offset = known ? b.b_offset[l.slot] : 0, stride = known ? b.b_stride[l.slot] : 0;
  sync_block();  // the tile's record is there
  const Tile tile = s.tiles[(l.entered - 1) % kQueue];
  const uint32_t lane_place = (uint32_t)((offset + tile.expert * stride) / 8);
  l.left &= warp_ballot(lane_rank > 0);
  int i = 0;
#pragma unroll 1
  for (; i < S::kSixteens && l.left != 0; i++) {
    const int leader = lowest_bit(l.left), rank = (int)shuffle((uint32_t)lane_rank, leader), up = (int)shuffle((uint32_t)lane_split, leader) * a.low_max_rank;
    const uint32_t mine = warp_ballot(l.slot == (int)shuffle((uint32_t)l.slot, leader)), place = shuffle(lane_place, leader);
    load_b<S>(a, tile, stage, i, l.first, rank, place);
    if (!l.ready) {
      if constexpr (kShrinks<S>) {
        if (thread_index() == 0)
          while (observe(slot_counters(a) + 3) != (uint32_t)(a.counts[2] * b.parts)) {}
      } else {
        wait_for_previous_kernel(), allow_next_kernel();
      }
      l.ready = true;
      sync_block();
    }
    load_s<S>(a, tile, stage, i, l.first, rank, up, mine);
    l.first += 16;
    if (l.first >= rank) l.first = 0, l.left &= ~mine;
  }
  return i;
}

// The next stage, or without its weights; the caller commits.
template <class S>
DEVICE void load_stage(const MarlinMoeGemm& a, const MarlinMoeSlots& b, const Derived& d, const Work& w, const Shared& s, RowLoader<S>& l,
                       int slot, bool weights) {
  const int adapters = l.k_step == w.k_steps ? load_more<S>(a, b, s, l, s.stages + slot * S::kStageBytes) : 0;
  if (thread_index() == 0) s.more[slot] = adapters;
  if (adapters) return;
  if (by_queue(w) && l.unit == l.end) {
    const int next = (int)s.before[1 + l.entered % 2];  // two places: who reads this may be behind who enters the tile
    if (next < w.tiles * d.row_tiles) l.unit = next * w.k_steps, l.end = l.unit + w.k_steps;
  }
  if (l.unit >= l.end) return;
  if (l.k_step == w.k_steps) l.k_step = 0, enter_tile<S>(a, b, d, w, s, l);
  if (weights) load_weights<S>(a, d, s, l, slot);
  load_x<S>(a, s, l, slot);
  l.unit++, l.k_step++;
}

// What a block begins with: its first tile.
template <class S>
DEVICE Work begin_tiles(const MarlinMoeGemm& a, const MarlinMoeSlots& b, const Derived& d, const Shared& s, RowLoader<S>& l) {
  const Work w = share_work(a, d, false);
  const int block = (int)blockIdx.x;
  const bool works = block < w.blocks && w.units > 0;
  l.unit = !works ? 0 : by_queue(w) ? block * w.k_steps : w.first(block);
  l.end = !works ? 0 : by_queue(w) ? l.unit + w.k_steps : w.first(block + 1);
  l.entered = 0, l.ready = false, l.k_step = l.unit % w.k_steps;
  if (works) enter_tile<S>(a, b, d, w, s, l);
  return w;
}

// The first stages, whose weights are older than the kernel before this one; x at its end; then this block's items. Returns how many stages.
template <class S>
DEVICE int shrink(const MarlinMoeGemm& a, const MarlinMoeSlots& b, const Derived& d, const Work& w, const Shared& s, RowLoader<S>& l) {
  static_assert(S::kStageBytes >= 4 * kItemRows * kItemRanks * 4 && S::kThreads == kItemRows * kItemRanks);
  float* const sums = (float*)(s.stages + S::kAhead * S::kStageBytes);  // which no copy reaches before the first product
  uint32_t* const counters = slot_counters(a) + 2;
  const int items = a.counts[2] * b.parts, k_step = l.k_step, left = l.end - l.unit < w.k_steps - k_step ? l.end - l.unit : w.k_steps - k_step;
  Item<S> item;
  uint32_t matrix[kItemSteps][4];
  item.find(b, (int)*s.before, items);
  if (item.any) item.load_matrix(a, item.first, 0, matrix);
  int loaded = 0;
#pragma unroll 1
  for (; loaded < S::kAhead && loaded < left; loaded++, l.k_step++) load_weights<S>(a, d, s, l, loaded);
  l.k_step = k_step;
  if (a.early) wait_for_previous_kernel(), allow_next_kernel();
#pragma unroll 1
  for (int i = 0; i < loaded; i++) {
    if (thread_index() == 0) s.more[i] = 0;
    load_x<S>(a, s, l, i);
    cp_commit();
    l.unit++, l.k_step++;
  }
  while (item.any) {
    item.run(a, b, sums, matrix);
    if (thread_index() == 0) publish_add(counters + 1, 1), *s.before = take_ticket(counters);
    sync_block();
    item.find(b, (int)*s.before, items);
    if (item.any) item.load_matrix(a, item.first, 0, matrix);
  }
  return loaded;
}

// Zero points, and fp16 in wide tiles, take more registers than four blocks have; the queue gives blocks that wait for a place fewer tiles.
template <class S>
constexpr int kSlotResident = kResident<S> > 3 && (S::Codes::kZeros || (!S::Type::kIsBf16 && S::kTokens > 16)) ? 3 : kResident<S>;

template <class S>
KERNEL void __launch_bounds__(S::kThreads, kSlotResident<S>) gemm_by_slot(MarlinMoeGemm a, MarlinMoeSlots b, Derived d) {
  SMEM_DECL;
  const Shared s = carve<S>(d, smem_);
  if (kShrinks<S> && thread_index() == 0) *s.before = take_ticket(slot_counters(a) + 2);
  if (!a.early) wait_for_previous_kernel(), allow_next_kernel();
  sync_block();
  RowLoader<S> l;
  const Work w = begin_tiles<S>(a, b, d, s, l);
  int loaded = 0, unit = l.unit, slot = 0;
  if constexpr (kShrinks<S>) loaded = shrink<S>(a, b, d, w, s, l);
  if (l.entered > 0)  // behind this block's items: whoever gets to a tile's end here waits for all of them
#pragma unroll 1
    for (int i = loaded; i < S::kAhead; i++) load_stage<S>(a, b, d, w, s, l, i, true), cp_commit();
  sync_block();  // the first tile's record is there

  for (int done = 0; done < l.entered; done++) {  // at a tile's end the next one has been entered, if there is one
    const int output = unit / w.k_steps, rest = (output + 1) * w.k_steps - unit;
    int steps = by_queue(w) ? w.k_steps : rest < l.end - unit ? rest : l.end - unit;
    const bool complete = steps == w.k_steps;
    const int live = s.tiles[done % kQueue].rows;
    Sums<S> sums;
    sums.clear();
    while (steps > 0 || s.more[slot]) {  // after the weights the tile's adapters
      cp_wait<S::kAhead - 1>();
      sync_block();
      load_stage<S>(a, b, d, w, s, l, slot == 0 ? S::kAhead : slot - 1, true);
      cp_commit();
      if (steps == 0) multiply_adapters<S>(a, s, slot, live, sums, s.more[slot]);
      else steps--, unit++, multiply_live<S>(d, s, slot, live, sums);
      slot = slot + 1 == S::kStages ? 0 : slot + 1;
    }
    if (complete || add_blocks<S>(a, w, s, output, sums)) store_tile<S>(a, s.tiles[done % kQueue], s.pairs + done % kQueue * S::kTokens, sums);
  }
  if (!kShrinks<S> && !l.ready) wait_for_previous_kernel();  // so that whoever waits for this kernel has waited for those before
  if (thread_index() == 0) {
    uint32_t* const counters = slot_counters(a);
    if (arrive(counters + 1) == gridDim.x - 1) counters[0] = counters[1] = counters[2] = counters[3] = 0;
  }
}

}  // namespace
