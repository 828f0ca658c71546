// A linear of 65 tokens and more with adapters on sm_90: one wave of blocks, each with a tile of at most 128 tokens and `rows` rows of w, all of one part.
//
//   * A cluster shares the columns of w. Each of its blocks goes over its own in chunks of 64, which the copy engine brings in a ring; those of w that
//     fit are under way before the kernel before this one is complete. Two warpgroups multiply 64 tokens each; rows of absent tokens compute
//     garbage that nobody reads.
//   * Adapters: B s is more k of the same product, by sixteens of ranks of one adapter, s zero for the tokens of others: four of these are one more
//     chunk in the ring. s comes to registers beside the product, each thread asking for all of its tokens at once, since each answer takes its way
//     from L2; it knows by then where each slot's sixteens are. The blocks of a cluster share the sixteens too.
//   * Blocks leave their sums in shared memory, and each adds up and writes a share of the tokens, in the order of the blocks.
#include "middle_linear.h"

#include "cluster_prims.cuh"

#if !SM90
#pragma nv_diag_suppress 177  // nothing is used where the kernel is empty
#endif

namespace {

constexpr int kK = 64, kMostStages = 8, kTokens = 128;
constexpr int kMultiplying = 256, kPreparing = 128, kThreads = kMultiplying + kPreparing + 32;
constexpr int kSixteens = kK / 16;  // of adapters' columns in a chunk
constexpr int kHeld = 4;            // sixteens of a token, which are ranks of its adapter
constexpr int kOwn = kTokens * 4 / kPreparing;  // tokens of a thread that prepares: four threads have a token's s, each four columns of a sixteen
constexpr int kMostParts = 4;         // of a linear
constexpr int kMostShared = 190 * 1024, kTooLarge = 1;  // leaves a block of the kernel that makes s its place; the error is cudaErrorInvalidValue

struct Sixteen {  // columns of B of one adapter, which one product adds
  int64_t place;  // of B(slot, part)[0, r0] in the pool
  int32_t rank, r0;
};

struct Slot {  // of this block's tokens
  int32_t first, rank;  // its first sixteen among all of the part
  float scaling;
};

struct Layout {
  int x_bytes, stage_bytes, stages, barriers, list, slots, total;
  int tiles, shift;   // of tokens; of splits
  int first_tile[kMostParts + 1];  // of rows, of each part
  Divider pieces;     // rows / 8
};

inline Layout layout_of(const MiddleLinear& a) {
  Layout l;
  l.x_bytes = a.tokens * 128, l.stage_bytes = l.x_bytes + a.rows * 128;
  const int adapters = a.tokens < a.num_slots ? a.tokens : a.num_slots;
  const int sixteens = ceil_div(adapters * ceil_div(a.max_rank, 16), a.splits) + 1;
  const int barriers = (4 * kMostStages + 2) * (int)sizeof(Barrier), fixed = barriers + sixteens * (int)sizeof(Sixteen) + a.num_slots * (int)sizeof(Slot);
  l.stages = (kMostShared - fixed) / l.stage_bytes;
  l.stages = l.stages > kMostStages ? kMostStages : l.stages;
  l.barriers = l.stages * l.stage_bytes;
  l.list = l.barriers + barriers;
  l.slots = l.list + sixteens * (int)sizeof(Sixteen);
  l.total = l.barriers + fixed;
  const int sums = a.tokens * pitch_of(a.rows) * 4, reach = l.barriers - l.stage_bytes + kTokens * 128;  // tokens are read as 128 rows
  if (l.total < sums) l.total = sums;
  if (l.total < reach) l.total = reach;
  l.tiles = ceil_div(a.m, a.tokens);
  l.shift = a.splits == 8 ? 3 : a.splits / 2;
  l.first_tile[0] = 0;
  for (int p = 0; p < kMostParts; p++) l.first_tile[p + 1] = l.first_tile[p] + (p < a.parts ? ceil_div(a.starts[p + 1] - a.starts[p], a.rows) : 0);
  l.pieces = make_divider(a.rows / 8);
  return l;
}

struct Part {  // of this block in the work
  int rank;           // in the cluster
  int part, start, end;  // of the linear, and its rows of w
  int n0;             // first row of w
  int t0;             // first token
  int first, chunks;  // columns of w, in chunks
};

struct Shared {
  uint8_t* ring;
  Barrier *full, *empty, *room, *low_full, *listed;  // room, low_full: of a stage, for a chunk of adapters' columns
  int32_t* count;
  Sixteen* sixteens;
  Slot* slots;  // [num_slots]
};

DEVICE Shared carve(uint8_t* memory, const Layout& l) {
  Barrier* const barriers = (Barrier*)(memory + l.barriers);
  return {memory,           barriers,           barriers + kMostStages, barriers + 2 * kMostStages, barriers + 3 * kMostStages, barriers + 4 * kMostStages,
          (int32_t*)(barriers + 4 * kMostStages + 1), (Sixteen*)(memory + l.list), (Slot*)(memory + l.slots)};
}

struct Place {  // in the ring
  int stage = 0, phase = 0;
  DEVICE void next(const Layout& l) {
    if (++stage == l.stages) stage = 0, phase ^= 1;
  }
};

// ---- weights and tokens ----------------------------------------------------------------------------------------------------------------

DEVICE void copy_weights(const MiddleLinear& a, const TensorMap& w_map, const Layout& l, const Shared& shared, const Part& part, int c, int stage) {
  barrier_expect(&shared.full[stage], a.rows * 128);
  copy_box(shared.ring + stage * l.stage_bytes + l.x_bytes, &w_map, &shared.full[stage], 0, part.n0, part.first + c, kKeep);
}

// One thread. `begun`: chunks whose weights are under way.
DEVICE void fetch(const MiddleLinear& a, const TensorMap& w_map, const TensorMap& x_map, const Layout& l, const Shared& shared, const Part& part, int begun) {
  wait_for_previous_kernel();
  Place at;
  for (int c = 0; c < part.chunks; c++, at.next(l)) {
    if (c >= begun) {
      barrier_wait(&shared.empty[at.stage], at.phase ^ 1);
      copy_weights(a, w_map, l, shared, part, c, at.stage);
    }
    barrier_expect(&shared.full[at.stage], l.x_bytes);
    copy_box(shared.ring + at.stage * l.stage_bytes, &x_map, &shared.full[at.stage], 0, part.t0, part.first + c, kKeep);
  }
  barrier_wait(shared.listed, 0);
  for (int left = *shared.count; left > 0; left -= kSixteens, at.next(l)) {  // who has seen all phases of a stage tells when it is free
    barrier_wait(&shared.empty[at.stage], at.phase ^ 1);
    barrier_arrive(&shared.room[at.stage]);
  }
}

// ---- adapters --------------------------------------------------------------------------------------------------------------------------

// One warp: where each slot's sixteens are, and the list of this block's, every splits-th.
DEVICE void list_sixteens(const MiddleLinear& a, const Layout& l, const Shared& shared, const Part& part) {
  const int lane = lane_index();
  int before = 0;
#pragma unroll 1
  for (int first = 0; first < a.num_slots; first += 32) {
    const int slot = first + lane, entry = part.part * a.part_stride + slot;
    const bool real = slot < a.num_slots;
    const int rank = real ? a.rank[entry] : 0;
    const int64_t place = real ? a.offset[entry] : 0;
    const float scaling = real ? a.scaling[entry] : 0.f;
    const int mine = real && shared.slots[slot].rank ? ceil_div(rank, 16) : 0;
    int sum = mine;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int others = (int)shuffle_up((uint32_t)sum, delta);
      if (lane >= delta) sum += others;
    }
    const int mine_first = before + sum - mine;
    if (real) shared.slots[slot] = {mine_first, mine ? rank : 0, scaling};
    for (int i = (part.rank - mine_first) & (a.splits - 1); i < mine; i += a.splits) shared.sixteens[(mine_first + i) >> l.shift] = {place + i * 16, rank, i * 16};
    before += (int)shuffle((uint32_t)sum, 31);
  }
  if (lane == 0) *shared.count = (before - part.rank + a.splits - 1) >> l.shift;
}

// What a thread that prepares has of a token: s of its sixteens in this block's list, from `first` on.
struct Own {
  int first, r, left;  // first rank of these, and how many are behind it
  float scale;
  const float* s;
};

DEVICE Own own_of(const MiddleLinear& a, const Layout& l, const Shared& shared, const Part& part, int token, int slot) {
  if (slot < 0) return {};
  const Slot& of = shared.slots[slot];
  const int skip = (part.rank - of.first) & (a.splits - 1), r = skip * 16 + (thread_index() & 3) * 4;
  return {(of.first + skip) >> l.shift, r, of.rank - r, of.scaling, a.s + ((int64_t)(part.t0 + token) * a.parts + part.part) * a.width + r};
}

// Four ranks each of the i-th sixteens of a thread's tokens, those that exist, times their scales.
template <class T>
DEVICE void read_s(uint32_t (&out)[kOwn][2], const Own (&own)[kOwn], int ahead) {
  float value[kOwn][4] = {};
#pragma unroll
  for (int t = 0; t < kOwn; t++)
    if (own[t].left > ahead) load_floats(value[t], own[t].s + ahead);
#pragma unroll
  for (int t = 0; t < kOwn; t++) {
#pragma unroll
    for (int e = 0; e < 4; e++) value[t][e] = ahead + e < own[t].left ? value[t][e] * own[t].scale : 0.f;
    out[t][0] = T::pack(value[t][0], value[t][1]), out[t][1] = T::pack(value[t][2], value[t][3]);
  }
}

// A chunk's columns of B to shared memory, each thread a piece of some rows.
DEVICE void copy_b(const MiddleLinear& a, const Part& part, uint8_t* target, const Sixteen* list, int here, int tid) {
  const int piece = tid & 7;
  if (piece >> 1 >= here) return;
  const Sixteen u = list[piece >> 1];
  const int r = (piece & 1) * 8, columns = u.rank - u.r0 - r, start = part.n0 - part.start;
  const uint16_t* const b = (const uint16_t*)a.pool + u.place + r;
  for (int row = tid >> 3; row < a.rows; row += kPreparing / 8) {
    const bool inside = part.n0 + row < part.end;
    load_piece(piece_of(target, row, piece), b + (int64_t)(inside ? start + row : 0) * u.rank, inside ? columns : 0, u.rank % 8 == 0);
  }
}

template <class T>
DEVICE void prepare(const MiddleLinear& a, const Layout& l, const Shared& shared, const Part& part) {
  const int tid = thread_index() - kMultiplying, q = tid & 3;
  const auto slot_of = [&](int token) { return token < a.tokens && part.t0 + token < a.m ? a.slots[part.t0 + token] : -1; };
  const int present = slot_of(tid);
  int slot[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i++) slot[i] = slot_of(tid / 4 + 32 * i);
  for (int i = tid; i < a.num_slots; i += kPreparing) shared.slots[i].rank = 0;
  sync_warpgroup(1);
  if (present >= 0) shared.slots[present].rank = 1;
  sync_warpgroup(1);
  if (tid < 32) {
    list_sixteens(a, l, shared, part);
    sync_warp();
    if (tid == 0) barrier_arrive(shared.listed);
  }
  sync_warpgroup(1);
  const int count = *shared.count;
  for (int i = 0; i < count; i++) {  // on its way to L2
    const Sixteen u = shared.sixteens[i];
    for (int row = tid; row < a.rows; row += kPreparing)
      if (part.n0 + row < part.end) prefetch((const uint16_t*)a.pool + u.place + (int64_t)(part.n0 - part.start + row) * u.rank);
  }
  Own own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i++) own[i] = own_of(a, l, shared, part, tid / 4 + 32 * i, slot[i]);
  wait_for_previous_kernel();
  uint32_t low[kHeld][kOwn][2] = {};
#pragma unroll
  for (int h = 0; h < kHeld; h++) {
    if (h * 16 * a.splits >= a.max_rank) break;
    read_s<T>(low[h], own, h * 16 * a.splits);
  }
  Place at = {part.chunks % l.stages, 0};
  for (int c = 0; c < count; c += kSixteens, at.next(l)) {
    const int here = count - c < kSixteens ? count - c : kSixteens;
    uint8_t* const low_s = shared.ring + at.stage * l.stage_bytes;
    barrier_wait(&shared.room[at.stage], c / kSixteens / l.stages & 1);
    copy_b(a, part, low_s + l.x_bytes, shared.sixteens + c, here, tid);
#pragma unroll
    for (int j = 0; j < kSixteens; j++) {
      if (j >= here) break;
#pragma unroll
      for (int i = 0; i < kOwn; i++) {
        uint32_t words[2] = {};
#pragma unroll
        for (int h = 0; h < kHeld; h++)
          if (slot[i] >= 0 && own[i].first + h == c + j) words[0] = low[h][i][0], words[1] = low[h][i][1];
        const int token = tid / 4 + 32 * i;
        if (token < a.tokens) store_words(piece_of(low_s, token, 2 * j + (q >> 1)) + (q & 1) * 8, words[0], words[1]);
      }
    }
    publish_to_wgmma();
    barrier_arrive(&shared.low_full[at.stage]);
    barrier_arrive_after_copies(&shared.low_full[at.stage]);
  }
}

// ---- multiplying -----------------------------------------------------------------------------------------------------------------------

template <class T, int NT>
DEVICE void multiply_chunk(const Layout& l, const uint8_t* stage, int group, float (&d)[72], int sixteens, bool accumulate) {
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kSixteens; k++)
    if (k < sixteens) multiply_shared<T, NT>(d, wgmma_matrix(stage + group * 64 * 128) + 2 * k, wgmma_matrix(stage + l.x_bytes) + 2 * k, accumulate || k > 0);
  wgmma_commit();
}

template <class T, int NT>
DEVICE void multiply(const Layout& l, const Shared& shared, const Part& part, float (&d)[72]) {
  const int group = uniform(warp_index() / 4);
  Barrier* before = nullptr;
  Place at;
  const auto pass = [&](Barrier* next) {  // the stage before is read
    sync_warp();
    if (before && lane_index() == 0) barrier_arrive(before);
    before = next;
  };
  for (int c = 0; c < part.chunks; c++, at.next(l)) {
    barrier_wait(&shared.full[at.stage], at.phase);
    multiply_chunk<T, NT>(l, shared.ring + at.stage * l.stage_bytes, group, d, kSixteens, c > 0);
    wgmma_wait<1>();
    pass(&shared.empty[at.stage]);
  }
  wgmma_wait<0>();
  pass(nullptr);
  barrier_wait(shared.listed, 0);
  const int count = uniform(*shared.count);
  for (int c = 0; c < count; c += kSixteens, at.next(l)) {
    barrier_wait(&shared.low_full[at.stage], c / kSixteens / l.stages & 1);
    see_copies();
    multiply_chunk<T, NT>(l, shared.ring + at.stage * l.stage_bytes, group, d, count - c, true);
    wgmma_wait<0>();
    sync_warp();
    if (lane_index() == 0) barrier_arrive(&shared.empty[at.stage]);
  }
}

template <int NT>
DEVICE void leave_sums(const MiddleLinear& a, float* sums, const float (&d)[72]) {
  const int lane = lane_index(), warp = warp_index(), pitch = pitch_of(a.rows);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int token = warp * 16 + h * 8 + lane / 4;
    if (token >= a.tokens) continue;
    float* const target = sums + token * pitch + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < NT; i++) store_two_floats(target + i * 8, d[4 * i + 2 * h], d[4 * i + 2 * h + 1]);
  }
}

template <class T>
DEVICE void add_up(const MiddleLinear& a, const Layout& l, const float* sums, const Part& part) {
  const int pieces = a.rows / 8, share = (a.tokens * pieces + a.splits - 1) >> l.shift, pitch = pitch_of(a.rows);
  for (int index = thread_index(); index < share; index += kThreads) {
    const int item = part.rank * share + index, place = item / l.pieces, row = (item - place * pieces) * 8, n = part.n0 + row, token = part.t0 + place;
    if (place >= a.tokens || token >= a.m || n >= part.end) continue;
    float sum[8] = {};
#pragma unroll 2
    for (int i = 0; i < a.splits; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float value[4];
        load_floats_beside(value, sums + place * pitch + row + half * 4, part.rank, i);
#pragma unroll
        for (int e = 0; e < 4; e++) sum[half * 4 + e] += value[e];
      }
    }
    uint32_t words[4], bias[4] = {};
    if (a.bias) load_words(bias, (const uint16_t*)a.bias + n);
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = T::pack(sum[2 * i] + T::low(bias[i]), sum[2 * i + 1] + T::high(bias[i]));
    store_words((uint16_t*)a.out + (int64_t)token * a.n + n, words);
  }
}

// Few registers: the block begins beside blocks of the kernel that makes s.
template <class T, bool CLUSTER, int NT>
KERNEL void __maxnreg__(96) linear(const MiddleLinear a, const GRID_CONSTANT TensorMap w_map, const GRID_CONSTANT TensorMap x_map, const Layout l) {
#if SM90  // elsewhere an empty kernel, which is never launched: ops/middle_linear.py refuses
  SMEM_DECL;
  allow_next_kernel();
  const Shared shared = carve(smem_, l);
  Part part;
  part.rank = (int)blockIdx.x & (a.splits - 1);
  const int tile = (int)blockIdx.x >> l.shift, row_tile = tile / l.tiles, chunks = a.k / kK;
#pragma unroll
  for (int p = 0; p < kMostParts; p++)
    if (p < a.parts && row_tile >= l.first_tile[p]) part.part = p, part.start = a.starts[p], part.end = a.starts[p + 1], part.n0 = part.start + (row_tile - l.first_tile[p]) * a.rows;
  part.t0 = tile % l.tiles * a.tokens;
  part.first = (chunks * part.rank) >> l.shift;
  part.chunks = (chunks * (part.rank + 1) >> l.shift) - part.first;
  int begun = 0;
  if (thread_index() == kThreads - 32) {
    for (int i = 0; i < l.stages; i++)  // full: weights and tokens; low_full: what each thread stores and what it copies
      barrier_init(&shared.full[i], 2), barrier_init(&shared.empty[i], kMultiplying / 32), barrier_init(&shared.room[i], 1), barrier_init(&shared.low_full[i], 2 * kPreparing);
    barrier_init(shared.listed, 1);
    publish_barriers();
    for (; begun < part.chunks && begun < l.stages; begun++) copy_weights(a, w_map, l, shared, part, begun, begun);
    prefetch_map(&x_map);
  }
  sync_block();
  const int warp = uniform(warp_index());
  float d[72];
  if (warp < kMultiplying / 32) {
    multiply<T, NT>(l, shared, part, d);
  } else if (warp < (kMultiplying + kPreparing) / 32) {
    prepare<T>(a, l, shared, part);
  } else if (lane_index() == 0) {
    fetch(a, w_map, x_map, l, shared, part, begun);
  }
  sync_block();  // the ring is read: the sums may stand where it stood
  if (warp < kMultiplying / 32) leave_sums<NT>(a, (float*)smem_, d);
  if constexpr (CLUSTER) share_with_cluster();
  else sync_block();
  add_up<T>(a, l, (const float*)smem_, part);
  if constexpr (CLUSTER) share_with_cluster();  // others may still read these sums
#endif
}

// A matrix [rows, columns] for the copy engine: a box is `box_rows` rows of 64 columns.
int describe(TensorMap* map, const void* base, const MiddleLinear& a, int rows, int box_rows) {
  return describe_boxes(map, base, a.is_bf16, {64, (uint64_t)rows, (uint64_t)a.k / 64}, {(uint64_t)a.k, 64}, {64, (uint32_t)box_rows, 1});
}

template <class T, int NT>
int launch_form(const MiddleLinear& a, const Layout& l, const TensorMap& w, const TensorMap& x, void* stream) {
  const Launch how = {(unsigned)(l.first_tile[kMostParts] * l.tiles * a.splits), kThreads, (size_t)l.total, stream, a.overlap && can_overlap()};
  return a.splits > 1 ? launch_clusters_together(how, (unsigned)a.splits, linear<T, true, NT>, a, w, x, l) : launch(how, linear<T, false, NT>, a, w, x, l);
}

template <class T>
int dispatch(const MiddleLinear& a, const Layout& l, const TensorMap& w, const TensorMap& x, void* stream) {
  switch (a.rows / 16) {
#define CASE(SIXTEENS) \
  case SIXTEENS: return launch_form<T, 2 * SIXTEENS>(a, l, w, x, stream);
    CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
  return kTooLarge;
}

}  // namespace

extern "C" int middle_linear(const MiddleLinear* arguments, void* stream) {
  const MiddleLinear& a = *arguments;
  if (a.m == 0) return 0;
  const Layout l = layout_of(a);
  TensorMap w, x;
  if (l.total > kMostShared || l.stages < 2 || a.max_rank > 16 * kHeld) return kTooLarge;
  int error = describe(&w, a.w, a, a.n, a.rows);
  if (error == 0) error = describe(&x, a.x, a, a.m, a.tokens);
  if (error != 0) return error;
  return a.is_bf16 ? dispatch<BFloat16>(a, l, w, x, stream) : dispatch<Float16>(a, l, w, x, stream);
}
