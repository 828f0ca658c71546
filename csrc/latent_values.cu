// Values of latent attention at decode: the splits are merged where their sum is multiplied. For sm_90.
//
//   * A cluster owns a head and 16 tokens. Each of its blocks merges a share of the latent's columns, reads from its neighbours what they merged,
//     and multiplies a share of the rows of w by it.
//   * Weights are in shared memory before attention is complete: blocks take so little that they run beside two of its programs on a multiprocessor.
//   * Rows of w are the first operand of the m16n8k16 products, tokens the second one. Which of 32 columns counts as which is free as long as both
//     agree: a lane has eight next to each other, one load of either.
//   * Where a thread for each four columns of a token would leave threads without work, several share its splits.
//   * Warps share the columns of the products; their sums meet where the weights were and are added in the order of the warps.
#include "latent_values.h"

#include "cluster_prims.cuh"

#if !SM90
#pragma nv_diag_suppress 177  // nothing is used where the kernel is empty
#endif

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kTokens = 16, kMostSplits = 32;
constexpr int kChunk = 32, kChunks = 2;  // columns of w that a lane's 16 bytes of each row are of; such chunks of a warp
constexpr int kMostTiles = 4;            // of 16 rows of w in a block
constexpr int kMostBlocks = 264;         // two on each multiprocessor of an H200
constexpr int kAtOnce = 8;               // splits whose loads do not wait for one another

HOST_DEVICE constexpr int sums_pitch(int tiles) { return tiles * 16 + 4; }  // floats of a token's sums: what a warp stores at a time lies in different banks
HOST_DEVICE constexpr int row_bytes(int columns) { return columns * 2 + 64; }  // bytes of a row: what eight lanes read at a time lies in different banks

struct Plan {
  int blocks;                 // of a cluster
  int columns;                // that a block merges
  int groups;                 // of a token's splits, each a thread's
  int merged, shares, meet;   // in shared memory, behind the weights
  Divider by_columns, quads, items, pieces;  // columns; fours of them, of a token and of all; eights of a row of w
};

// The block's rows of w, which nothing of a step writes.
DEVICE void copy_weights(const LatentValues& a, const Plan& plan, uint8_t* w, int head, int rank) {
  const int rows = a.rows / plan.blocks, pieces = a.columns / 8;
  const uint16_t* const source = (const uint16_t*)a.w + ((int64_t)head * (a.skipped + a.rows) + a.skipped + rank * rows) * a.columns;
#pragma unroll 1
  for (int piece = thread_index(); piece < rows * pieces; piece += kThreads) {
    const int row = piece / plan.pieces;
    cp16(w + row * row_bytes(a.columns) + (piece - row * pieces) * 16, source + piece * 8, true);
  }
  cp_commit();
}

// How much each split counts, a warp for two tokens, a lane for a split.
DEVICE void weigh_splits(const LatentValues& a, float* shares, int head, int first, int tokens) {
  const int lane = lane_index(), token = warp_index();
  float lse[kTokens / kWarps];
#pragma unroll
  for (int i = 0; i < kTokens / kWarps; i++) {
    const bool real = token + i * kWarps < tokens && lane < a.splits;
    lse[i] = real ? load_float_l2(a.lse + ((int64_t)(first + token + i * kWarps) * a.heads + head) * a.splits + lane) : -INFINITY;
  }
#pragma unroll
  for (int i = 0; i < kTokens / kWarps; i++) {
    float top = lse[i];
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) top = fmaxf(top, as_float(shuffle_xor(as_bits(top), apart)));
    const float share = exp2_of(lse[i] - (top == -INFINITY ? 0.f : top));
    float total = share;
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) total += as_float(shuffle_xor(as_bits(total), apart));
    shares[(token + i * kWarps) * kMostSplits + lane] = total == 0.f ? 0.f : share / total;
  }
}

// sum = the weighted sum of four columns over `count` splits, whose parts are `apart` floats from each other.
DEVICE void add_splits(float (&sum)[4], const float* part, int apart, const float* shares, int count) {
#pragma unroll
  for (int e = 0; e < 4; e++) sum[e] = 0.f;
#pragma unroll 1
  for (int split = 0; split < count; split += kAtOnce) {
    float value[kAtOnce][4] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)  // what counts for nothing was perhaps not written
      if (split + i < count && shares[split + i] != 0.f) load_floats_l2(value[i], part + (split + i) * apart);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
#pragma unroll
      for (int e = 0; e < 4 && split + i < count; e++) sum[e] += shares[split + i] * value[i][e];
  }
}

// The block's columns of all tokens, in w's type.
template <class T>
DEVICE void merge(const LatentValues& a, const Plan& plan, uint8_t* merged, const float* shares, float* meet, int head, int first, int tokens, int column) {
  const int quads = plan.columns / 4, items = tokens * quads, count = a.splits / plan.groups;
  const int group = plan.groups > 1 ? thread_index() / plan.items : 0, split = group * count;
  const auto store = [&](int item, const float(&sum)[4]) {
    const int token = item / plan.quads;
    store_words(merged + token * row_bytes(plan.columns) + (item - token * quads) * 8, T::pack(sum[0], sum[1]), T::pack(sum[2], sum[3]));
  };
#pragma unroll 1
  for (int item = thread_index() - group * (int)plan.items.by; item < items && group < plan.groups; item += kThreads) {
    const int token = item / plan.quads;
    const float* const part = a.parts + (((int64_t)(first + token) * a.heads + head) * a.splits + split) * a.columns + column + (item - token * quads) * 4;
    float sum[4];
    add_splits(sum, part, a.columns, shares + token * kMostSplits + split, count);
    if (plan.groups == 1) store(item, sum);
    else store_floats(meet + thread_index() * 4, sum);
  }
  if (plan.groups == 1) return;
  sync_block();
  if (thread_index() >= items) return;
  float sum[4] = {};
#pragma unroll 1
  for (int i = 0; i < plan.groups; i++) {
    float value[4];
    load_floats(value, meet + (i * (int)plan.items.by + thread_index()) * 4);
#pragma unroll
    for (int e = 0; e < 4; e++) sum[e] += value[e];
  }
  store(thread_index(), sum);
}

template <int TILES>
using Sums = float[TILES][kTokens / 8][4];  // of a lane: rows lane / 4 and 8 below, tokens 2 (lane % 4) and the next

// d = the warp's columns of w times x, which lies in the blocks of the cluster. Columns of absent tokens are garbage that nobody reads.
template <class T, int TILES>
DEVICE void multiply(Sums<TILES>& d, const uint8_t* w, const LatentValues& a, const Plan& plan, const uint8_t* merged, int rank, int tokens) {
  const int lane = lane_index();
  float x[kChunks][kTokens / 8][4] = {};
#pragma unroll
  for (int i = 0; i < kChunks; i++) {
    const int column = (warp_index() + i * kWarps) * kChunk + lane % 4 * 8, owner = column / plan.by_columns;
#pragma unroll
    for (int n = 0; n < kTokens / 8; n++)
      if (column < a.columns && n * 8 < tokens)
        load_floats_beside(x[i][n], (const float*)(merged + (n * 8 + lane / 4) * row_bytes(plan.columns) + (column - owner * plan.columns) * 2), rank, owner);
  }
#pragma unroll
  for (int i = 0; i < kChunks; i++) {
    const int column = (warp_index() + i * kWarps) * kChunk;
    if (column >= a.columns) break;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      uint32_t upper[4], lower[4];
      load_words(upper, w + (t * 16 + lane / 4) * row_bytes(a.columns) + (column + lane % 4 * 8) * 2);
      load_words(lower, w + (t * 16 + 8 + lane / 4) * row_bytes(a.columns) + (column + lane % 4 * 8) * 2);
#pragma unroll
      for (int half = 0; half < 4; half += 2)
#pragma unroll
        for (int n = 0; n < kTokens / 8; n++) {
          const uint32_t rows[4] = {upper[half], lower[half], upper[half + 1], lower[half + 1]}, values[2] = {as_bits(x[i][n][half]), as_bits(x[i][n][half + 1])};
          T::mma(d[t][n], rows, values);
        }
    }
  }
}

template <int TILES>
DEVICE void leave_sums(const Sums<TILES>& d, float* sums) {
  const int lane = lane_index();
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int n = 0; n < kTokens / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[(warp_index() * kTokens + n * 8 + lane % 4 * 2 + e % 2) * sums_pitch(TILES) + t * 16 + e / 2 * 8 + lane / 4] = d[t][n][e];
}

// The sums of all warps that had columns.
template <class T, int TILES>
DEVICE void add_up(const LatentValues& a, const float* sums, int head, int rank, int first, int tokens) {
  constexpr int kFours = TILES * 4;  // of rows
  const int chunks = a.columns / kChunk, warps = chunks < kWarps ? chunks : kWarps;
#pragma unroll 1
  for (int item = thread_index(); item < tokens * kFours; item += kThreads) {
    const int token = item / kFours, row = item % kFours * 4;
    float sum[4] = {};
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) {
      float value[4] = {};
      if (warp < warps) load_floats(value, sums + (warp * kTokens + token) * sums_pitch(TILES) + row);
#pragma unroll
      for (int e = 0; e < 4; e++) sum[e] += value[e];
    }
    store_words((uint16_t*)a.out + ((int64_t)(first + token) * a.heads + head) * a.rows + rank * TILES * 16 + row, T::pack(sum[0], sum[1]), T::pack(sum[2], sum[3]));
  }
}

template <class T, int TILES>
KERNEL void __launch_bounds__(kThreads, TILES < 4 ? 3 : 2) values(const LatentValues a, const Plan plan) {
#if SM90  // elsewhere an empty kernel, which is never launched: ops/latent_attention.py asks
  SMEM_DECL;
  allow_next_kernel();
  uint8_t *const w = smem_, *const merged = smem_ + plan.merged;
  float *const sums = (float*)w, *const shares = (float*)(smem_ + plan.shares), *const meet = (float*)(smem_ + plan.meet);
  const int rank = cluster_rank(), unit = (int)blockIdx.x / plan.blocks, head = unit % a.heads, first = unit / a.heads * kTokens;
  const int tokens = a.m - first < kTokens ? a.m - first : kTokens;
  copy_weights(a, plan, w, head, rank);
  wait_for_previous_kernel();
  weigh_splits(a, shares, head, first, tokens);
  sync_block();
  merge<T>(a, plan, merged, shares, meet, head, first, tokens, rank * plan.columns);
  cp_wait<0>();
  share_with_cluster();
  Sums<TILES> d = {};
  multiply<T>(d, w, a, plan, merged, rank, tokens);
  float seen = 0.f;
#pragma unroll
  for (int i = 0; i < TILES * kTokens / 2; i++) seen += d[i / 8][i / 4 % 2][i % 4];
  arrive_having_read(seen);
  sync_block();  // the weights are read
  leave_sums<TILES>(d, sums);
  sync_block();
  add_up<T, TILES>(a, sums, head, rank, first, tokens);
  wait_for_cluster();  // others may still read what this block merged
#endif
}

// The largest cluster that leaves all blocks running at once, or the smallest that can be.
int blocks_of(const LatentValues& a) {
  const int units = a.heads * ((a.m + kTokens - 1) / kTokens);
  int found = 0;
  for (int blocks = 8; blocks > 0; blocks /= 2) {
    const int tiles = a.rows / (16 * blocks);
    if (tiles == 0 || tiles > kMostTiles || a.columns % (8 * blocks)) continue;
    found = blocks;
    if (units * blocks <= kMostBlocks) break;
  }
  return found;
}

template <class T, int TILES>
int launch_form(const LatentValues& a, Plan plan, void* stream) {
  const int weights = TILES * 16 * row_bytes(a.columns), sums = kWarps * kTokens * sums_pitch(TILES) * 4;
  plan.merged = weights > sums ? weights : sums;
  plan.shares = plan.merged + kTokens * row_bytes(plan.columns);
  plan.meet = plan.shares + kTokens * kMostSplits * 4;
  const size_t total = (size_t)plan.meet + (plan.groups > 1 ? kThreads * 16 : 0);
  const unsigned units = (unsigned)(a.heads * ((a.m + kTokens - 1) / kTokens));
  const Launch how = {units * (unsigned)plan.blocks, kThreads, total, stream, a.overlap && can_overlap()};
  return launch_clusters(how, (unsigned)plan.blocks, values<T, TILES>, a, plan);
}

template <class T>
int dispatch(const LatentValues& a, void* stream) {
  Plan plan = {};
  plan.blocks = blocks_of(a), plan.columns = a.columns / plan.blocks;
  const int quads = plan.columns / 4, items = (a.m < kTokens ? a.m : kTokens) * quads;
  for (plan.groups = 1; plan.groups < a.splits && 2 * plan.groups * items <= kThreads;) plan.groups *= 2;
  plan.by_columns = make_divider(plan.columns), plan.quads = make_divider(quads), plan.items = make_divider(items), plan.pieces = make_divider(a.columns / 8);
  switch (a.rows / (16 * plan.blocks)) {
    case 1: return launch_form<T, 1>(a, plan, stream);
    case 2: return launch_form<T, 2>(a, plan, stream);
    default: return launch_form<T, 4>(a, plan, stream);
  }
}

}  // namespace

extern "C" int latent_values(const LatentValues* a, void* stream) { return a->m == 0 ? 0 : a->is_bf16 ? dispatch<BFloat16>(*a, stream) : dispatch<Float16>(*a, stream); }
