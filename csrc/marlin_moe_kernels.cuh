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
  load_adapters<S, S::kThreads>(a, tile, l.adapters, s.stages + slot * S::kStageBytes, thread_index());
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
  if (!a.early) wait_for_previous_kernel();
  if (!a.early || (a.early == 2 && !a.tiles)) allow_next_kernel();  // by pair the next is the second shrink, which reads nothing of the first one's
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

constexpr int kCopyThreads = 128;

// The copying warpgroup: a tile's stages of adapters; one with nothing in it where there are none.
template <class S>
DEVICE void copy_adapters(const MarlinMoeGemm& a, const Shared& s, const Tile& tile, AdaptersAhead& l, Stages<S>& stages, int thread) {
  do {
    Barrier* full = stages.full + stages.slot;
    barrier_wait(stages.empty + stages.slot, stages.parity);
    const bool copied = load_adapters<S, kCopyThreads>(a, tile, l, s.stages + stages.slot * S::kStageBytes, thread);
    if (thread == 0) s.more[stages.slot] = l.next < l.last, barrier_arrive(full);
    if (copied) barrier_arrive_after_copies(full);
    else cp_commit(), cp_wait<0>(), barrier_arrive(full);
    stages.advance();
  } while (l.next < l.last);
}

// Rows of x of a tile as the copying warpgroup shares them: a thread copies the same piece of every kRowStep-th row.
template <class S>
struct CopiedRows {
  static constexpr int kStep = kCopyThreads / S::kXPieces, kLoads = S::kTokens / kStep;
  int first, piece;
  uint32_t x[kLoads];  // this thread's pieces at k = 0; their pairs before `enter`
};

// The pairs of this thread's rows.
template <class S>
DEVICE void ask_pairs(const MarlinMoeGemm& a, const Tile& tile, CopiedRows<S>& rows) {
#pragma unroll
  for (int i = 0; i < CopiedRows<S>::kLoads; i++) {
    const int row = rows.first + i * CopiedRows<S>::kStep, sorted = tile.start + row;
    if (row < tile.rows) rows.x[i] = (uint32_t)(a.tiles ? a.sorted_pairs[sorted] : sorted);
  }
}

// Where these rows begin in x; the multiplying warps learn their pairs.
template <class S>
DEVICE void enter_tile(const MarlinMoeGemm& a, const Derived& d, const Tile& tile, CopiedRows<S>& rows, int* pairs) {
#pragma unroll
  for (int i = 0; i < CopiedRows<S>::kLoads; i++) {
    const int row = rows.first + i * CopiedRows<S>::kStep, pair = (int)rows.x[i];
    if (row >= tile.rows) continue;
    rows.x[i] = (uint32_t)(a.gather ? d.token_of(pair) : tile.start + row) * (uint32_t)(a.k / 8) + rows.piece;
    if (rows.piece == 0) pairs[row] = pair;
  }
}

// Codes of a stage, by one lane of each warp.
template <class S>
DEVICE void copy_codes(const MarlinMoeGemm& a, uint8_t* target, Barrier* full, int row_unit, int present, int k_step, int warp) {
  if (lane_index() == 0) {
#pragma unroll
    for (int i = 0; i < S::kWarpsM; i += kCopyThreads / 32) {
      const int row = warp + i;
      const int64_t unit_of_k = (int64_t)(row_unit + row) * a.k_units + k_step * S::kKU;
      if (row < present) copy_bulk(target + row * S::kWarpBytes, (const uint8_t*)a.packed + unit_of_k * S::kUnitBytes, S::kWarpBytes, full);
    }
  }
}

// Scales and zero points of a stage, a piece a thread.
template <class S>
DEVICE void copy_scales(const MarlinMoeGemm& a, const Derived& d, const Shared& s, int slot, int row_unit, int present, int group, int thread) {
  const int row = thread >> (2 + d.groups_log2), piece = thread & ((4 << d.groups_log2) - 1);
  if (row < present) {
    const uint32_t scales = (uint32_t)((row_unit + row) * a.groups + group) * 4 + piece;
    cp16(s.scales + slot * d.scale_bytes + thread * 16, piece_of(a.scales, scales), true);
    if (S::Codes::kZeros && piece < 2 << d.groups_log2) {
      const uint32_t zeros = (uint32_t)((row_unit + row) * a.groups + group) * 2 + piece;
      cp16(s.zeros + slot * d.scale_bytes / 2 + (row << d.groups_log2) * 32 + piece * 16, piece_of(a.zeros, zeros), true);
    }
  }
}

// Rows of x of a stage; those beyond its `rows` are left as they are, and beyond the width zeros.
template <class S>
DEVICE void copy_rows(const CopiedRows<S>& mine, const uint8_t* x, uint8_t* target, int rows, bool inside) {
#pragma unroll
  for (int i = 0; i < CopiedRows<S>::kLoads; i++)
    if (i * CopiedRows<S>::kStep < rows) cp16(target + i * CopiedRows<S>::kStep * 128, piece_of(x, mine.x[i]), inside);
}

// The copying warpgroup: all stages of the block's tiles, one after another, each once the multiplying warps are done with what lay there. After a block's
// first tile the next is whichever nobody has taken yet, so that blocks that start late, beside a shrink, or have larger tiles do fewer.
template <class S>
DEVICE void copy_stages(const MarlinMoeGemm& a, const Derived& d, const Work& w, const Shared& s, Stages<S> stages) {
  const int thread = thread_index() - S::kThreads, piece = thread % S::kXPieces, first_row = thread / S::kXPieces;
  const int x_place = S::kWeightBytes + (piece / 8 * S::kTokens + first_row) * 128 + (piece % 8 ^ first_row % 8) * 16;
  static_assert(CopiedRows<S>::kStep % 8 == 0, "rows of a thread differ in their swizzle");
  uint32_t* const tickets = a.arrivals + a.gather;  // zero before and after; of gate_up and of down, which may begin before gate_up has ended
  const int draw_at = w.k_steps > 2 ? w.k_steps - 3 : 0;
  CopiedRows<S> mine;
  mine.first = first_row, mine.piece = piece;
  int entered = 0, ticket = 0;
  AdaptersAhead adapters;
  stages.parity = 1;  // nobody has to leave the first round
  Tile tile = find_tile<true>(a, d, w, (int)blockIdx.x);
  ask_pairs(a, tile, mine);
  for (int output = (int)blockIdx.x; output < w.outputs;) {
    const int queue = entered++ % kQueue, rows = tile.rows - first_row, row_unit = tile.expert * a.row_units + tile.row_tile * S::kWarpsM;
    const int left = a.row_units - tile.row_tile * S::kWarpsM, present = left < S::kWarpsM ? left : S::kWarpsM;
    const uint8_t* x = (const uint8_t*)a.x;
    if (thread == 0) s.tiles[queue] = tile;
    enter_tile(a, d, tile, mine, s.pairs + queue * S::kTokens);
    if (a.low && (!a.early || entered > 1)) adapters.ask(a, tile.index);
    sync_warpgroup(1);  // one thread's arrival below hands all of this over
    for (int k_step = 0; k_step < w.k_steps; k_step++, stages.advance()) {
      const int slot = stages.slot, group = k_step * S::kKU >> d.group_shift;
      const bool ends = k_step + 1 == w.k_steps;
      if (thread == 0 && k_step == draw_at) ticket = (int)take_ticket(tickets);
      if (a.low && ends && adapters.last >= 0) adapters.fetch(a);
      Barrier* full = stages.full + slot;
      barrier_wait(stages.empty + slot, stages.parity);
      uint8_t* target = s.stages + slot * S::kStageBytes;
      if (thread == 0) barrier_expect(full, present * S::kWarpBytes);
      copy_codes<S>(a, target, full, row_unit, present, k_step, thread / 32);
      copy_scales<S>(a, d, s, slot, row_unit, present, group, thread);
      copy_rows(mine, x, target + x_place, rows, k_step * S::kK + piece * 8 < a.k);
      x += S::kK * 2;
      barrier_arrive_after_copies(full);
    }
    if (thread == 0) {
      if (ticket == w.outputs - 1) *tickets = 0;  // the last that is drawn: each block draws until there is no tile for it
      *s.before = (uint32_t)(w.blocks + ticket);
    }
    sync_warpgroup(1);
    output = (int)*s.before;
    Tile next = tile;
    if (output < w.outputs) next = find_tile<true>(a, d, w, output), ask_pairs(a, next, mine);  // on their way beside the adapters of this one
    if (a.low) {
      if (adapters.last < 0) {
        if (a.early == 2) wait_for_previous_kernel(), allow_next_kernel();
        adapters.ask(a, tile.index);
        adapters.fetch(a);
      }
      copy_adapters<S>(a, s, tile, adapters, stages, thread);
    }
    tile = next;
  }
  // One stage more, so that the multiplying warps, which begin it with the last tile's end, learn that there is no tile.
  barrier_wait(stages.empty + stages.slot, stages.parity);
  if (thread == 0) s.tiles[entered % kQueue].rows = -1, barrier_arrive(stages.full + stages.slot);
  barrier_arrive(stages.full + stages.slot);
}

// The same product by wgmma, on sm_90: a warpgroup copies and the others multiply; whole tiles only.
template <class S>
KERNEL void __launch_bounds__(S::kThreads + kCopyThreads, 1) gemm_by_warpgroups(MarlinMoeGemm a, Derived d) {
#if SM90
  SMEM_DECL;
  const Shared s = carve<S>(d, smem_);
  const Stages<S> initial = {s.barriers, s.barriers + S::kStages};
  if (thread_index() < S::kStages) {
    barrier_init(initial.full + thread_index(), kCopyThreads + 1);
    barrier_init(initial.empty + thread_index(), S::kThreads / 32);
    publish_barriers();
  }
  if (a.early != 2) wait_for_previous_kernel(), allow_next_kernel();
  sync_block();
  const Work w = share_work(a, d, true);
  if ((int)blockIdx.x >= w.outputs) {
    if (a.early) wait_for_previous_kernel();
    return;
  }
  if (warp_index() >= S::kThreads / 32) {
    give_registers<72>();
    copy_stages<S>(a, d, w, s, initial);
  } else {
    take_registers<216>();
    Stages<S> stages = initial;
    Ready<S> ready;
    ready.rows.set_zeros(0x01010101u << (S::kBits - 1));
    ready.begin(d, s, stages);
    for (int done = 0;; done++) {
      const Tile tile = s.tiles[done % kQueue];
      if (tile.rows < 0) break;
      Sums<S> sums;
      sums.clear();
      for (int k_step = 0; k_step < w.k_steps; k_step++) multiply_by_warpgroup<S, false>(d, s, tile.rows, 0, stages, ready, sums);
      for (bool more = a.low; more;) {
        more = warp_ballot(lane_index() == 0 && s.more[stages.slot]);  // by the lane that gives the stage back: its arrival is ordered behind the read
        multiply_by_warpgroup<S, true>(d, s, tile.rows, 4 * a.halves - 4, stages, ready, sums);
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
  Launch how = {(unsigned)marlin_moe_blocks(plan), (unsigned)S::kThreads, (size_t)carve<S>(d, (uint8_t*)1024).bytes, stream, plan.overlap && can_overlap()};
  if constexpr (S::kWarpgroup) {
    how.threads += kCopyThreads;
    return launch(how, gemm_by_warpgroups<S>, a, d);
  } else {
    if constexpr (kBySlot<S>) {
      if constexpr (S::kTokens == 16)
        if (a.by_slot && a.by_slot->pool) return launch(how, gemm_by_slot<Shrinking<S>>, a, *a.by_slot, d);
      if (a.by_slot) return launch(how, gemm_by_slot<S>, a, *a.by_slot, d);
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
