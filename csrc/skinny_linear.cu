// A linear of up to 64 tokens on sm_90: a stream of weights, which stand still in shared memory before the tokens are known.
//
//   * A cluster owns `rows` rows of w, each of its blocks a share of their columns, small enough to lie in shared memory whole. So all
//     copies of weights are under way before the kernel before this one is complete: they depend on nothing.
//   * The tokens, brought in chunks of 64 columns, are wgmma's 64 rows, weights its columns: any multiple of eight rows of w fits, so that
//     one wave of blocks fills the GPU; rows of absent tokens compute garbage that nobody reads.
//   * Adapters are more k of the same product: 16 columns of B of one adapter against 16 of s, zero for the tokens of others. Four warps
//     find the step's adapters, bring B and s while the weights stream; the blocks of a cluster share these columns too.
//   * Blocks leave their sums in shared memory, and each adds up and writes a share of the output, in the order of the blocks.
#include "skinny_linear.h"

#include "hopper_prims.cuh"

#if !SM90
#pragma nv_diag_suppress 177  // nothing is used where the kernel is empty
#endif

namespace {

constexpr int kTokens = 64, kK = 64, kStages = 8;
constexpr int kMultiplying = 256, kPreparing = 128, kThreads = kMultiplying + kPreparing + 32;
constexpr int kSixteens = kK / 16;          // of adapters' columns in a chunk
constexpr int kMostShared = 227 * 1024, kTooLarge = 1;  // the error is cudaErrorInvalidValue

struct Sixteen {  // columns of B that one product adds
  int64_t place;  // of B(slot, part)[0, r0] in the pool
  int32_t slot, part, rank, r0;
};

HOST_DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// Where things lie in shared memory. A block reads 64 rows of tokens from any chunk of `x`, also where fewer are there: what follows is garbage to it.
struct Layout {
  int chunks, x_bytes, stages;        // of w in a block, at most; of a chunk of tokens; groups of such chunks
  int w, low, barriers, list, total;  // offsets
  int shift;                          // of splits
  Divider pieces;                     // rows / 8
};

constexpr int kGroups = 64;  // most groups of chunks of w

HOST_DEVICE int pitch_of(int rows) { return rows + (40 - rows % 32) % 32; }  // floats of a token's sums: eight more than a multiple of 32 keep the banks apart

inline Layout layout_of(const SkinnyLinear& a) {
  Layout l;
  l.chunks = divide_up(divide_up(a.k, kK), a.splits);
  l.x_bytes = divide_up(a.m, 8) * 8 * 128;
  const int w_bytes = divide_up(l.chunks, a.group) * a.group * a.rows * 128, low_bytes = a.s ? kTokens * 128 + a.rows * 128 : 0;
  const int adapters = a.m < a.num_slots ? a.m : a.num_slots;
  const int list_bytes = a.s ? (divide_up(adapters * a.parts * divide_up(a.max_rank, 16), a.splits) + 1) * (int)sizeof(Sixteen) + 16 : 0;
  const int barriers = (kGroups + 2 * kStages + 2) * (int)sizeof(Barrier);
  l.stages = (kMostShared - w_bytes - low_bytes - list_bytes - barriers) / (l.x_bytes * a.group);
  const int groups = divide_up(l.chunks, a.group);
  l.stages = l.stages < 2 ? 2 : l.stages > kStages ? kStages : l.stages;  // one is given back when the products of the next are under way
  l.stages = l.stages > groups ? groups : l.stages;
  l.w = l.stages * l.x_bytes * a.group;
  l.low = l.w + w_bytes;
  l.barriers = l.low + low_bytes;
  l.list = l.barriers + barriers;
  l.total = l.list + list_bytes;
  l.shift = a.splits == 8 ? 3 : a.splits / 2;
  l.pieces = make_divider(a.rows / 8);
  const int sums = 2 * a.m * pitch_of(a.rows) * 4;
  if (l.total < l.w + kTokens * 128) l.total = l.w + kTokens * 128;
  if (l.total < l.w + sums) l.total = l.w + sums;
  return l;
}

struct Shared {
  uint8_t *x, *w, *low_s, *low_b;
  Barrier *w_full, *x_full, *x_empty, *low_full, *low_empty;
  int32_t* count;  // of `list`
  Sixteen* list;
  float* sums;     // over w, when it has been read
};

DEVICE Shared carve(uint8_t* memory, const Layout& l) {
  Shared s;
  s.x = memory, s.w = memory + l.w;
  s.low_s = memory + l.low, s.low_b = s.low_s + kTokens * 128;
  s.w_full = (Barrier*)(memory + l.barriers), s.x_full = s.w_full + kGroups, s.x_empty = s.x_full + kStages;
  s.low_full = s.x_empty + kStages, s.low_empty = s.low_full + 1;
  s.count = (int32_t*)(memory + l.list), s.list = (Sixteen*)(memory + l.list + 16);
  s.sums = (float*)s.w;
  return s;
}

struct Part {  // of this block in the work
  int rank;           // in the cluster
  int n0;             // first row of w
  int first, chunks;  // columns of w, in chunks
};

DEVICE uint8_t* piece_of(uint8_t* rows, int row, int piece) { return rows + row * 128 + ((piece ^ (row & 7)) << 4); }
DEVICE int uniform(int value) { return (int)shuffle((uint32_t)value, 0); }  // tells the compiler that a warp agrees: wgmma may not stand where it could not

// ---- weights and tokens ----------------------------------------------------------------------------------------------------------------

DEVICE void fetch_weights(const SkinnyLinear& a, const TensorMap& w_map, const Shared& shared, const Part& part) {
  const int bytes = a.group * a.rows * 128;
  uint8_t* target = shared.w;
  for (int c = 0, i = 0; c < part.chunks; c += a.group, i++, target += bytes) {  // the last copy may bring chunks of the next block too: there is room, nobody reads them
    barrier_expect(&shared.w_full[i], bytes);
    copy_box(target, &w_map, &shared.w_full[i], 0, part.n0, part.first + c, kKeep);
  }
}
DEVICE void fetch_tokens(const SkinnyLinear& a, const TensorMap& x_map, const Layout& l, const Shared& shared, const Part& part) {
  const int bytes = l.x_bytes * a.group;
  for (int c = 0, stage = 0, phase = 1; c < part.chunks; c += a.group) {
    barrier_wait(&shared.x_empty[stage], phase);
    barrier_expect(&shared.x_full[stage], bytes);
    copy_box(shared.x + stage * bytes, &x_map, &shared.x_full[stage], 0, 0, part.first + c, kKeep);
    if (++stage == l.stages) stage = 0, phase ^= 1;
  }
}

// ---- adapters --------------------------------------------------------------------------------------------------------------------------

// This block's sixteens of the step's adapters that touch its rows: every splits-th of all. One warp.
DEVICE void list_sixteens(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part) {
  int mine = 0, total = 0;
  for (int pass = 0; pass < 2; pass++) {  // count, then write
    int at = 0;
    if (pass == 1) {
      int sum = mine;
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        const int before = (int)shuffle_up((uint32_t)sum, delta);
        if (lane_index() >= delta) sum += before;
      }
      at = sum - mine, total = (int)shuffle((uint32_t)sum, 31);
    }
    for (int i = lane_index(); i < a.m; i += 32) {
      const int slot = a.ordered[i];
      if (slot < 0 || (i > 0 && a.ordered[i - 1] == slot)) continue;
      for (int p = 0; p < a.parts; p++) {
        if (a.starts[p] >= part.n0 + a.rows || a.starts[p + 1] <= part.n0) continue;
        const int entry = p * a.part_stride + slot, rank = a.rank[entry];
        if (pass == 0) mine += divide_up(rank, 16);
        for (int r0 = 0; pass == 1 && r0 < rank; r0 += 16, at++)
          if ((at & (a.splits - 1)) == part.rank) shared.list[at >> l.shift] = {a.offset[entry] + r0, slot, p, rank, r0};
      }
    }
  }
  if (lane_index() == 0) *shared.count = (total - part.rank + a.splits - 1) >> l.shift;
}

// Four values of s of a token from r on, summed over the splits, those beyond the rank zero.
DEVICE void load_s(const SkinnyLinear& a, float (&sum)[4], int token, const Sixteen& u, int r) {
  const float* s = a.s + ((int64_t)token * a.parts + u.part) * a.width + r;
  const int64_t apart = (int64_t)a.m * a.parts * a.width;
  if (a.width % 4 == 0) {
#pragma unroll 8
    for (int split = 0; split < a.s_splits; split++) {
      float value[4];
      load_floats_l2(value, s + split * apart);
#pragma unroll
      for (int i = 0; i < 4; i++) sum[i] += value[i];
    }
  } else {
    for (int split = 0; split < a.s_splits; split++)
      for (int i = 0; i < 4; i++)
        if (r + i < u.rank) sum[i] += s[split * apart + i];
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (r + i >= u.rank) sum[i] = 0.f;
}

template <class T>
DEVICE void prepare(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part) {
  const int tid = thread_index() - kMultiplying, lane = lane_index();
  if (tid < 32) list_sixteens(a, l, shared, part);
  sync_warpgroup(1);
  const int count = *shared.count;
  for (int c = 0; c == 0 || c * kSixteens < count; c++) {
    const int here = count - c * kSixteens < kSixteens ? count - c * kSixteens : kSixteens;
    const Sixteen* const list = shared.list + c * kSixteens;
    if (c > 0) barrier_wait(shared.low_empty, (c - 1) & 1);
    for (int index = tid; index < a.rows * 8; index += kPreparing) {
      const int row = index >> 3, piece = index & 7, r = (piece & 1) * 8;
      if (piece >> 1 >= here) continue;
      const Sixteen u = list[piece >> 1];
      const int n = part.n0 + row - a.starts[u.part];
      const bool inside = n >= 0 && part.n0 + row < a.starts[u.part + 1];
      load_piece(piece_of(shared.low_b, row, piece), (const uint16_t*)a.pool + u.place + (int64_t)(inside ? n : 0) * u.rank + r, inside ? u.rank - u.r0 - r : 0, u.rank % 8 == 0);
    }
    for (int index = tid; index < a.m * 8; index += kPreparing) {
      uint8_t* const target = piece_of(shared.low_s, index >> 3, index & 7);
      store_words(target, 0, 0), store_words(target + 8, 0, 0);
    }
    if (c == 0) wait_for_previous_kernel();
    sync_warpgroup(1);
    for (int token = tid >> 2; token < a.m; token += kPreparing / 4) {  // four threads a token, each with four columns of a sixteen
      const int slot = a.slots[token], q = lane & 3;
      for (int j = 0; j < here; j++) {
        const Sixteen u = list[j];
        if (u.slot != slot || u.r0 + 4 * q >= u.rank) continue;
        float sum[4] = {};
        load_s(a, sum, token, u, u.r0 + 4 * q);
        const float scale = a.scaling[u.part * a.part_stride + slot] * (a.row_scale ? a.row_scale[token] : 1.f);
        store_words(piece_of(shared.low_s, token, 2 * j + (q >> 1)) + (q & 1) * 8, T::pack(sum[0] * scale, sum[1] * scale), T::pack(sum[2] * scale, sum[3] * scale));
      }
    }
    publish_to_wgmma();
    barrier_arrive(shared.low_full);
    barrier_arrive_after_copies(shared.low_full);
  }
}

// ---- multiplying -----------------------------------------------------------------------------------------------------------------------

// The two warpgroups take turns at the chunks, and at the adapters' sixteens.
template <class T, int NT>
DEVICE void multiply(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part, float (&d)[72]) {
  const int group = uniform(warp_index() / 4);
  const int w_bytes = a.rows * 128;
  const uint8_t *x = shared.x, *w = shared.w;
  Barrier* before = nullptr;
  for (int i = 0, stage = 0, phase = 0, left = part.chunks; left > 0; i++, left -= a.group) {
    barrier_wait(&shared.w_full[i], 0);
    barrier_wait(&shared.x_full[stage], phase);
    for (int c = group; c < a.group && c < left; c += 2) {
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kK / 16; k++) multiply_shared<T, NT>(d, wgmma_matrix(x + c * l.x_bytes) + 2 * k, wgmma_matrix(w + c * w_bytes) + 2 * k, i + c + k > group);
      wgmma_commit();
      wgmma_wait<1>();
      if (before && lane_index() == 0) barrier_arrive(before);
      before = nullptr;
    }
    before = &shared.x_empty[stage];
    w += a.group * w_bytes, x += a.group * l.x_bytes;
    if (++stage == l.stages) stage = 0, phase ^= 1, x = shared.x;
  }
  wgmma_wait<0>();
  if (!a.s) return;
  for (int c = 0; c == 0 || c * kSixteens < uniform(*shared.count); c++) {
    barrier_wait(shared.low_full, c & 1);
    see_copies();
    const int here = uniform(*shared.count) - c * kSixteens;
    wgmma_begin();
    for (int k = group; k < kSixteens && k < here; k += 2) multiply_shared<T, NT>(d, wgmma_matrix(shared.low_s) + 2 * k, wgmma_matrix(shared.low_b) + 2 * k, true);
    wgmma_commit();
    wgmma_wait<0>();
    if (lane_index() == 0) barrier_arrive(shared.low_empty);
  }
}

DEVICE void leave_sums(const SkinnyLinear& a, const Shared& shared, const float (&d)[72]) {
  const int lane = lane_index(), warp = warp_index(), pitch = pitch_of(a.rows);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int token = warp % 4 * 16 + h * 8 + lane / 4;
    if (token >= a.m) continue;
    float* const target = shared.sums + (warp / 4 * a.m + token) * pitch + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 18; i++) {
      if (i >= a.rows / 8) break;
      target[i * 8] = d[4 * i + 2 * h], target[i * 8 + 1] = d[4 * i + 2 * h + 1];
    }
  }
}

template <class T>
DEVICE void add_up(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part) {
  const int pieces = a.rows / 8, share = (a.m * pieces + a.splits - 1) >> l.shift, pitch = pitch_of(a.rows);
  for (int index = thread_index(); index < share; index += kThreads) {
    const int item = part.rank * share + index, token = item / l.pieces, row = (item - token * pieces) * 8, n = part.n0 + row;
    if (token >= a.m || n >= a.n) continue;
    float sum[8] = {};
#pragma unroll 4
    for (int i = 0; i < 2 * a.splits; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float value[4];
        load_floats_of(value, shared.sums + ((i & 1) * a.m + token) * pitch + row + half * 4, i >> 1);
#pragma unroll
        for (int e = 0; e < 4; e++) sum[half * 4 + e] += value[e];
      }
    }
    uint32_t words[4], bias[4] = {};
    if (a.bias) load_words(bias, (const uint16_t*)a.bias + n);
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = T::pack(sum[2 * i] + T::low(bias[i]), sum[2 * i + 1] + T::high(bias[i]));
    uint16_t* const out = (uint16_t*)a.out + (int64_t)token * a.n + n;
    store_words(out, words[0], words[1]), store_words(out + 4, words[2], words[3]);
  }
}

template <class T, bool CLUSTER>
KERNEL void __launch_bounds__(kThreads, 1) linear(const SkinnyLinear a, const GRID_CONSTANT TensorMap w_map, const GRID_CONSTANT TensorMap x_map, const Layout l) {
#if SM90  // elsewhere an empty kernel, which is never launched: ops/skinny_linear.py refuses
  SMEM_DECL;
  allow_next_kernel();
  const Shared shared = carve(smem_, l);
  Part part;
  part.rank = CLUSTER ? cluster_rank() : 0;
  part.n0 = ((int)blockIdx.x >> l.shift) * a.rows;
  const int chunks = a.k / kK;
  part.first = (chunks * part.rank) >> l.shift;
  part.chunks = (chunks * (part.rank + 1) >> l.shift) - part.first;
  if (thread_index() == kThreads - 32) {
    for (int i = 0; i * a.group < l.chunks; i++) barrier_init(&shared.w_full[i], 1);
    for (int i = 0; i < l.stages; i++) barrier_init(&shared.x_full[i], 1), barrier_init(&shared.x_empty[i], kMultiplying / 32);
    barrier_init(shared.low_full, 2 * kPreparing), barrier_init(shared.low_empty, kMultiplying / 32);
    publish_barriers();
    fetch_weights(a, w_map, shared, part);
    prefetch_map(&x_map);
  }
  sync_block();
  const int warp = uniform(warp_index());
  float d[72];
  if (warp < kMultiplying / 32) {
    switch (uniform(a.rows / 8)) {
#define CASE(NT) \
  case NT: multiply<T, NT>(a, l, shared, part, d); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16) CASE(17) CASE(18)
#undef CASE
    }
  } else if (warp < (kMultiplying + kPreparing) / 32) {
    if (a.s) prepare<T>(a, l, shared, part);
  } else if (warp == (kMultiplying + kPreparing) / 32) {
    if (lane_index() == 0) {
      wait_for_previous_kernel();
      fetch_tokens(a, x_map, l, shared, part);
    }
  }
  sync_block();  // the weights are read: the sums may stand where they stood
  if (warp < kMultiplying / 32) leave_sums(a, shared, d);
  if constexpr (CLUSTER) sync_cluster();
  else sync_block();
  add_up<T>(a, l, shared, part);
  if constexpr (CLUSTER) sync_cluster();  // others may still read these sums
#endif
}

// A matrix [rows, columns] for the copy engine, as chunks of 64 columns: a box is `box_rows` rows of `group` chunks, one chunk behind the other.
int describe_chunks(TensorMap* map, const void* base, const SkinnyLinear& a, int rows, int box_rows) {
  return describe_boxes(map, base, a.is_bf16, {64, (uint64_t)rows, (uint64_t)a.k / 64}, {(uint64_t)a.k, 64}, {64, (uint32_t)box_rows, (uint32_t)a.group});
}

template <class T>
int dispatch(const SkinnyLinear& a, const Layout& l, const TensorMap& w, const TensorMap& x, void* stream) {
  const Launch how = {(unsigned)(divide_up(a.n, a.rows) * a.splits), kThreads, (size_t)l.total, stream, a.overlap && can_overlap()};
  return a.splits > 1 ? launch_clusters(how, (unsigned)a.splits, linear<T, true>, a, w, x, l) : launch(how, linear<T, false>, a, w, x, l);
}

}  // namespace

extern "C" int64_t skinny_linear_shared_bytes(const SkinnyLinear* arguments) { return layout_of(*arguments).total; }

extern "C" int skinny_linear(const SkinnyLinear* arguments, void* stream) {
  const SkinnyLinear& a = *arguments;
  if (a.m == 0) return 0;
  const Layout l = layout_of(a);
  TensorMap w, x;
  if (l.total > kMostShared) return kTooLarge;
  int error = describe_chunks(&w, a.w, a, a.n, a.rows);
  if (error == 0) error = describe_chunks(&x, a.x, a, a.m, l.x_bytes / 128);
  if (error != 0) return error;
  return a.is_bf16 ? dispatch<BFloat16>(a, l, w, x, stream) : dispatch<Float16>(a, l, w, x, stream);
}
