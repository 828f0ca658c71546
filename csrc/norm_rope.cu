// The kernels after the attention's linears for many tokens: norm, rotation and cache write of q, k and v; residual, norm. Both add what adapters
// have to add to the linear's output on the way, with tensor cores: a warp owns 8 tokens, in the order of their slots, and 128 columns. Rows of other
// slots have s = 0, so that a product leaves them as they are.
//
//   * Rotation: columns are the first operand of the m16n8k16 products, tokens the second one. A lane has 8 columns next to each other in both halves
//     of a head, of two tokens: what is turned lies in one lane. A block goes over tiles of 8 tokens, as many blocks as a GPU holds at once; B stays
//     in registers while the slot stays. What a tile needs comes into shared memory two tiles ahead: rows by the copy engine, since the kernel is
//     bound by instructions (copies by each lane took 30 % of them and half of the time), the short rows of s and of angles by cp.async.
//   * Norm: tokens are half of the first operand's rows, the others are zero: fewer registers, more warps at a time; no shared memory. A lane has 8
//     columns next to each other of every 32, of one token. B and s are read through L1, past which go the activations. Few tokens: a cluster of
//     blocks shares a tile's columns, and each lane has the registers to ask for all that it needs at once.
//   * The kernel before is often a library's, which lets nothing start beside it: as few loads as can be wait for each other.
#include "norm_rope.h"

#include "cluster_prims.cuh"

namespace {

constexpr int kRows = 8, kColumns = 128;
constexpr int kHeads = 8, kBlocks = 2, kMostStages = 3;  // rotation: of a block, of a multiprocessor, tiles in shared memory
constexpr int kTokens = kHeads * 32;                     // of a block, at most
constexpr int kRotateRow = kHeads * kColumns * 2 + 16;   // bytes of a row in shared memory: what a warp reads at a time lies in different banks
constexpr int kMemory = 227 * 1024, kReserved = 1024;    // of a multiprocessor, and what each block takes of it beside its own
constexpr int kNone = 1 << 30;

// The smallest slot of a tile above `slot`, or kNone. `mine`: of the lane's row.
DEVICE int next_slot(int mine, int slot) { return -warp_max(mine > slot ? -mine : -kNone); }

struct Entry {  // of a slot, in the tables
  int rank;
  float scaling;
  int64_t offset;
};

DEVICE Entry entry_of(const AddedRows& a, int part, int slot) {
  const int entry = part * a.part_stride + slot;
  return {a.rank[entry], a.scaling[entry], a.offset[entry]};
}

// `first`: the lane's entry of the first 32 slots, asked for beside the tokens' slots rather than behind them.
DEVICE Entry entry_of(const AddedRows& a, int part, int slot, const Entry& first) {
  if (slot >= 32) return entry_of(a, part, slot);
  const uint32_t low = shuffle((uint32_t)first.offset, slot), high = shuffle((uint32_t)(first.offset >> 32), slot);
  return {(int)shuffle((uint32_t)first.rank, slot), as_float(shuffle(as_bits(first.scaling), slot)), (int64_t)((uint64_t)high << 32 | low)};
}

// ---- rotation --------------------------------------------------------------------------------------------------------------------------

struct Tokens {  // of a block, absent ones -1
  Barrier there[kMostStages + 1];  // of each stage: its tile is; what follows lies on a 16-byte boundary
  int token[kTokens], slot[kTokens];
  int place[kTokens], target[kTokens];  // rotation: first element of its row in the tables of angles, its row in the cache
};

struct Share {  // of a block: tiles
  int first, count;
};

DEVICE Share share_of(int m, int index, int shares) {
  const int64_t tiles = (m + kRows - 1) / kRows;
  const int first = (int)(tiles * index / shares);
  return {first, (int)(tiles * (index + 1) / shares) - first};
}

// A tile is there when each of its rows has been asked for and has come, and the copies of each thread.
DEVICE void begin_ring(Tokens& tokens) {
  if (thread_index() != 0) return;
  for (int stage = 0; stage < kMostStages; stage++) barrier_init(tokens.there + stage, kRows + warps_per_block() * 32);
  publish_barriers();
}

DEVICE int load_token(Tokens& tokens, const AddedRows& a, int m, int i, const Share& share) {
  const int place = share.first * kRows + i;
  tokens.slot[i] = place < m ? a.slots[place] : -1;
  return tokens.token[i] = place < m ? a.order[place] : -1;
}

// A lane's part of B for COUNT of the eight products from `first` on, and 16 ranks from r0 on. Product i is for columns 2 (i % 4) and the next of the
// lane's eight in half i / 4; the lane's eight begin at 8 (lane / 4).
template <int COUNT>
DEVICE void load_b(uint32_t (&b)[COUNT][4], const uint16_t* matrix, int rank, int r0, int first) {
  const int r = r0 + lane_index() % 4 * 4;
  const uint16_t* const own = matrix + (first / 4 * 64 + lane_index() / 4 * 8 + first % 4 * 2) * rank + r;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const uint16_t* const row = own + (i / 4 * 64 + i % 4 * 2 + odd) * rank;
      uint32_t ranks[2] = {};
      if (rank % 4 == 0) {
        if (r < rank) load_words(ranks, row);
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (r + e < rank) ranks[e / 2] |= (uint32_t)row[e] << e % 2 * 16;
      }
      b[i][odd] = ranks[0], b[i][2 + odd] = ranks[1];
    }
  }
}

// A tile's s of the linear's parts from `part` on, splits x rows x pieces of 16 bytes: a split by each warp.
DEVICE void copy_s(uint8_t* target, const int* tile_tokens, const AddedRows& a, int m, int part, int pieces) {
  const int row = lane_index() / 4, token = tile_tokens[row];
  for (int split = warp_index(); split < a.splits; split += warps_per_block()) {
    const float* const source = a.s + (((int64_t)split * m + (token < 0 ? 0 : token)) * a.parts + part) * a.width;
    for (int piece = lane_index() % 4; piece < pieces; piece += 4) cp16(target + ((split * kRows + row) * pieces + piece) * 16, source + piece * 4, token >= 0);
  }
}

// What of an adapter a warp has in registers: so many sixteens of ranks; 0: there are more than fit, and each product reads its own.
template <int SIXTEENS>
struct Held {
  int slot = -1, rank;
  float scaling;
  const uint16_t* matrix;  // the warp's rows of B
  uint32_t b[SIXTEENS ? SIXTEENS : 1][8][4];
};

template <int SIXTEENS>
DEVICE void hold(Held<SIXTEENS>& held, const AddedRows& a, int slot, const Entry& entry, int first_row) {
  held.slot = slot, held.rank = entry.rank, held.scaling = entry.scaling;
  held.matrix = (const uint16_t*)a.pool + entry.offset + (int64_t)first_row * held.rank;
#pragma unroll
  for (int n = 0; n < SIXTEENS; n++) load_b(held.b[n], held.matrix, held.rank, 16 * n, 0);
}

// Four ranks of token lane / 4 from the tile's s, summed over the splits, `apart` bytes from each other, times `factor`; zeros from `left` ranks on.
template <class T>
DEVICE void read_s(uint32_t (&out)[2], const uint8_t* s, int splits, int apart, int left, float factor) {
  float sum[4] = {};
  if (left > 0)
#pragma unroll 4
    for (int split = 0; split < splits; split++, s += apart) {
      float value[4];
      load_floats(value, (const float*)s);
#pragma unroll
      for (int e = 0; e < 4; e++) sum[e] += value[e];
    }
#pragma unroll
  for (int e = 0; e < 4; e++) sum[e] = e < left ? sum[e] * factor : 0.f;
  out[0] = T::pack(sum[0], sum[1]), out[1] = T::pack(sum[2], sum[3]);
}

// What the first tile needs. `slot`: that of token lane / 4; `first`: the lane's entry of the first 32 slots.
template <int SIXTEENS>
DEVICE void hold_first(Held<SIXTEENS>& held, const AddedRows& a, int slot, int part, int first_row, const Entry& first) {
  const int found = next_slot(slot, -1);
  if (found != kNone) hold(held, a, found, entry_of(a, part, found, first), first_row);
}

// A lane's part of a warp's tile: pair i % 4 of its eight columns in half i / 4, of tokens 2 (lane % 4) + e: [i][e] and [i][2 + e].
using Sums = float[8][4];

// sum += B s. `token` (in shared memory, read if needed), `mine`, `s`: token lane / 4 of the tile, its slot, its s.
template <class T, int SIXTEENS>
DEVICE void add_tile(Sums& sum, Held<SIXTEENS>& held, const AddedRows& a, const int& token, int mine, int part, int first_row, const uint8_t* s, int apart) {
#pragma unroll 1
  for (int slot = next_slot(mine, -1); slot != kNone; slot = next_slot(mine, slot)) {
    if (held.slot != slot) hold(held, a, slot, entry_of(a, part, slot), first_row);
    const float factor = a.row_scale && mine == slot ? held.scaling * a.row_scale[token] : held.scaling;
#pragma unroll
    for (int n = 0; n < SIXTEENS; n++) {
      if (SIXTEENS > 1 && n * 16 >= held.rank) break;
      const int r = n * 16 + lane_index() % 4 * 4;
      uint32_t low[2];
      read_s<T>(low, s + r * 4, a.splits, apart, mine == slot ? held.rank - r : 0, factor);
#pragma unroll
      for (int i = 0; i < 8; i++) T::mma(sum[i], held.b[n][i], low);
    }
#pragma unroll 1
    for (int r0 = 0; SIXTEENS == 0 && r0 < held.rank; r0 += 16) {
      const int r = r0 + lane_index() % 4 * 4;
      uint32_t low[2];
      read_s<T>(low, s + r * 4, a.splits, apart, mine == slot ? held.rank - r : 0, factor);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        uint32_t b[1][4];
        load_b(b, held.matrix, held.rank, r0, i);
        T::mma(sum[i], b[0], low);
      }
    }
  }
}

DEVICE float sum_of_eight(float value) {  // over the lanes of a token
  value += as_float(shuffle_xor(as_bits(value), 4));
  value += as_float(shuffle_xor(as_bits(value), 8));
  return value + as_float(shuffle_xor(as_bits(value), 16));
}

// The pairs at one place of a head's halves: norm's scale and weights (rounded between, as transformers does), then the turn.
template <class T>
DEVICE void turn(uint32_t& low, uint32_t& high, const float (&x)[4], const float (&y)[4], int e, float scale, uint32_t low_weight, uint32_t high_weight,
                 const float* cos, const float* sin) {
  low = T::pack(x[e] * scale * T::low(low_weight), x[2 + e] * scale * T::high(low_weight));
  high = T::pack(y[e] * scale * T::low(high_weight), y[2 + e] * scale * T::high(high_weight));
  const float a[2] = {T::low(low), T::high(low)}, b[2] = {T::low(high), T::high(high)};
  low = T::pack(a[0] * cos[0] - b[0] * sin[0], a[1] * cos[1] - b[1] * sin[1]);
  high = T::pack(b[0] * cos[0] + a[0] * sin[0], b[1] * cos[1] + a[1] * sin[1]);
}

// How blocks go over tiles and heads, and where a tile's angles and s lie in its stage of shared memory.
struct RotatePlan {
  int groups, shares, angles, s, bytes;
};

constexpr HOST_DEVICE int stages_of(int sixteens) { return sixteens ? kMostStages : 2; }  // tiles in shared memory: s of more ranks takes more of it

HOST_DEVICE int part_of(const RotateRows& a, int head) { return head < a.heads ? 0 : head < a.heads + a.kv_heads ? 1 : 2; }

// Parts that a block's heads are of.
HOST_DEVICE int parts_of(const RotateRows& a, int group) {
  const int last = group * kHeads + kHeads - 1, heads = a.heads + 2 * a.kv_heads;
  return part_of(a, last < heads ? last : heads - 1) - part_of(a, group * kHeads) + 1;
}

// By which a row's pieces of angles are exchanged, so that the rows that a warp reads at a time lie in different banks.
DEVICE int turned(int row) { return (row >> 1 & 1) | (row >> 2 & 1) << 2; }

template <class T, int SIXTEENS>
KERNEL void __launch_bounds__(kHeads * 32, SIXTEENS > 1 ? 1 : kBlocks) rotate(const RotateRows a, const RotatePlan plan) {
  SMEM_DECL;
  constexpr int kStages = stages_of(SIXTEENS);
  Tokens& tokens = *(Tokens*)smem_;
  uint8_t* const ring = smem_ + sizeof(Tokens);
  const int heads = a.heads + 2 * a.kv_heads, group = (int)blockIdx.x % plan.groups, warp = warp_index(), lane = lane_index();
  const int head = group * kHeads + warp, part = part_of(a, head), first_part = part_of(a, group * kHeads);
  const int head_in_part = head - (part == 0 ? 0 : part == 1 ? a.heads : a.heads + a.kv_heads);
  const int row_bytes = (heads - group * kHeads < kHeads ? heads - group * kHeads : kHeads) * kColumns * 2, pieces = parts_of(a, group) * a.added.width / 4;
  const Share share = share_of(a.m, (int)blockIdx.x / plan.groups, plan.shares);
  const int first_place = share.first * kRows + lane / 4, first_slot = first_place < a.m ? a.added.slots[first_place] : -1;
  const Entry first = entry_of(a.added, part, lane < a.added.num_slots ? lane : 0);
  const bool has_token = thread_index() < share.count * kRows;
  const int token = has_token ? load_token(tokens, a.added, a.m, thread_index(), share) : -1;  // what no kernel of a step writes is read before the linear is complete
  begin_ring(tokens);
  Held<SIXTEENS> held;
  if (head < heads) hold_first(held, a.added, first_slot, part, head_in_part * kColumns, first);
  sync_block();
  wait_for_previous_kernel();
  allow_next_kernel();
  const auto copy_rows = [&](int tile) {  // one by each warp
    if (tile >= share.count) return;
    uint8_t* const stage = ring + tile % kStages * plan.bytes;
    Barrier* const there = tokens.there + tile % kStages;
    const int token = tokens.token[tile * kRows + warp];
    if (lane == 0 && token < 0) barrier_arrive(there);
    if (lane == 0 && token >= 0) {
      barrier_expect(there, row_bytes);
      copy_bulk(stage + warp * kRotateRow, (const uint16_t*)a.qkv + ((int64_t)token * heads + group * kHeads) * kColumns, row_bytes, there);
    }
    copy_s(stage + plan.s, tokens.token + tile * kRows, a.added, a.m, first_part, pieces);
  };
  const auto copy_angles = [&](int tile) {
    if (tile >= share.count) return;
    uint8_t* const target = ring + tile % kStages * plan.bytes + plan.angles + (warp * 32 + (lane ^ turned(warp))) * 16;
    cp16(target, (lane < 16 ? a.cos : a.sin) + tokens.place[tile * kRows + warp] + lane % 16 * 4, true);
    barrier_arrive_after_copies(tokens.there + tile % kStages);
  };
  copy_rows(0);  // which wait for no positions
  if (has_token) {
    tokens.place[thread_index()] = token < 0 ? 0 : (int)a.positions[token] * a.table_stride;
    tokens.target[thread_index()] = token < 0 ? 0 : (int)a.kv_slots[token];
  }
  sync_block();
  copy_angles(0);
  const void* const weight = part == 0 ? a.q_weight : a.k_weight;
  const bool norm = part < 2 && weight != nullptr;
  const uint32_t one = T::pack(1.f, 1.f);  // times which nothing changes
  uint32_t weights[2][4] = {{one, one, one, one}, {one, one, one, one}};
  if (norm) load_words(weights[0], (const uint16_t*)weight + lane / 4 * 8), load_words(weights[1], (const uint16_t*)weight + 64 + lane / 4 * 8);
#pragma unroll 1
  for (int tile = 2 - kStages; tile < share.count; tile++) {
    if (tile > 0) sync_block();  // all are done with the tile before, whose memory is filled again
    copy_rows(tile + kStages - 1), copy_angles(tile + kStages - 1);
    if (tile < 0) continue;
    barrier_wait(tokens.there + tile % kStages, tile / kStages & 1);
    if (head >= heads) continue;
    const uint8_t* const stage = ring + tile % kStages * plan.bytes;
    const uint8_t* const source = stage + lane % 4 * 2 * kRotateRow + warp * kColumns * 2 + lane / 4 * 16;
    const int row = tile * kRows + lane / 4;
    Sums sum;
#pragma unroll
    for (int i = 0; i < 4; i++) {  // token i / 2, half i % 2
      uint32_t x[4];
      load_words(x, source + i / 2 * kRotateRow + i % 2 * kColumns);
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i % 2 * 4 + j][i / 2] = T::low(x[j]), sum[i % 2 * 4 + j][2 + i / 2] = T::high(x[j]);
    }
    const uint8_t* const s = stage + plan.s + lane / 4 * pieces * 16 + (part - first_part) * a.added.width * 4;
    add_tile<T, SIXTEENS>(sum, held, a.added, tokens.token[row], tokens.slot[row], part, head_in_part * kColumns, s, kRows * pieces * 16);
    uint16_t* const out = (part == 0 ? (uint16_t*)a.q : (uint16_t*)(part == 1 ? a.k_cache : a.v_cache)) + head_in_part * kColumns + lane / 4 * 8;
    const int* const targets = (part == 0 ? tokens.token : tokens.target) + tile * kRows + lane % 4 * 2;
    const int columns = (part == 0 ? a.heads : a.kv_heads) * kColumns;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      uint32_t low[4], high[4];
      if (part < 2) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) squares += sum[i][e] * sum[i][e] + sum[i][2 + e] * sum[i][2 + e];
        const float scale = norm ? inverse_root(sum_of_eight(squares) / kColumns + a.eps) : 1.f;
        const uint8_t* const angles = stage + plan.angles + (lane % 4 * 2 + e) * 512;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float cos[4], sin[4];
          const int piece = ((lane / 4 * 2 + i) ^ turned(lane % 4 * 2)) * 16;
          load_floats(cos, (const float*)(angles + piece)), load_floats(sin, (const float*)(angles + 256 + piece));
#pragma unroll
          for (int j = 2 * i; j < 2 * i + 2; j++)
            turn<T>(low[j], high[j], sum[j], sum[4 + j], e, scale, weights[0][j], weights[1][j], cos + j % 2 * 2, sin + j % 2 * 2);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) low[j] = T::pack(sum[j][e], sum[j][2 + e]), high[j] = T::pack(sum[4 + j][e], sum[4 + j][2 + e]);
      }
      uint16_t* const target = out + (int64_t)targets[e] * columns;
      if (tokens.token[tile * kRows + lane % 4 * 2 + e] >= 0) store_words(target, low), store_words(target + 64, high);
    }
  }
}

// ---- norm ------------------------------------------------------------------------------------------------------------------------------

struct Row {  // a lane's token
  int token, slot;
  bool inside;
};

DEVICE Row row_of(const AddedRows& a, int m, int tile) {
  const int place = tile * kRows + lane_index() / 4;
  const bool inside = place < m;
  return {inside ? a.order[place] : 0, inside ? a.slots[place] : -1, inside};
}

// A lane's part of B for 32 columns: of column (n / 2) * 8 + 2 j + n % 2, n = lane / 4, the ranks 4 (lane % 4) .. + 3 from r0 on.
DEVICE void load_b(uint32_t (&b)[4][2], const uint16_t* matrix, int rank, int r0) {
  const int n = lane_index() / 4, r = r0 + lane_index() % 4 * 4;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const uint16_t* p = matrix + ((n >> 1) * 8 + 2 * j + (n & 1)) * rank + r;
    if (rank % 4 == 0) {
      b[j][0] = b[j][1] = 0;
      if (r < rank) load_words(b[j], p);
    } else {
#pragma unroll
      for (int i = 0; i < 2; i++) b[j][i] = (r + 2 * i < rank ? p[2 * i] : 0u) | (r + 2 * i + 1 < rank ? (uint32_t)p[2 * i + 1] << 16 : 0u);
    }
  }
}

// The row's s times `scaling` if it is of `slot`, zero otherwise: ranks as in load_b. Loads of AT_ONCE splits do not wait for one another.
template <class T, int AT_ONCE>
DEVICE void load_s(uint32_t (&out)[2], const AddedRows& a, const Row& row, int m, int slot, int part, int rank, int r0, float scaling) {
  const int r = r0 + lane_index() % 4 * 4;
  const int64_t apart = (int64_t)m * a.parts * a.width;
  const bool mine = row.slot == slot && r < rank;
  const float* s = a.s + ((int64_t)row.token * a.parts + part) * a.width + r;
  float sum[4] = {};
#pragma unroll 1
  for (int split = 0; split < a.splits; split += AT_ONCE, s += AT_ONCE * apart) {
    float value[AT_ONCE][4] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (!mine || split + i >= a.splits) continue;
      if (a.width % 4 == 0) load_floats(value[i], s + i * apart);
      else
        for (int e = 0; e < 4; e++)
          if (r + e < rank) value[i][e] = s[i * apart + e];
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[e] += value[i][e];
  }
  if (mine && a.row_scale) scaling *= a.row_scale[row.token];
#pragma unroll
  for (int e = 0; e < 4; e++) sum[e] = r + e < rank ? sum[e] * scaling : 0.f;
  out[0] = T::pack(sum[0], sum[1]), out[1] = T::pack(sum[2], sum[3]);
}

// x [32 columns each][8 columns] += B s, rounded as the linear would have rounded it. WIDE: ranks beyond 16, which need float32 between their products.
// FEW: few warps, with registers for all of a step's loads at once.
template <class T, bool WIDE, bool FEW>
DEVICE void add_row(uint32_t (&x)[4][4], const AddedRows& a, const Row& row, const Entry& first, int m, int part, int first_row) {
  float sum[16][2];
#pragma unroll
  for (int i = 0; i < 16; i++) sum[i][0] = T::low(x[i / 4][i % 4]), sum[i][1] = T::high(x[i / 4][i % 4]);
#pragma unroll 1
  for (int slot = next_slot(row.slot, -1); slot != kNone; slot = next_slot(row.slot, slot)) {
    const Entry entry = FEW ? entry_of(a, part, slot, first) : entry_of(a, part, slot);
    const int rank = entry.rank;
    const uint16_t* const matrix = (const uint16_t*)a.pool + entry.offset + (int64_t)first_row * rank;
#pragma unroll 1
    for (int r0 = 0; r0 < rank; r0 += 16) {
      uint32_t s[2], b[FEW ? 4 : 1][4][2];
#pragma unroll
      for (int g = 0; g < 4 && FEW; g++) load_b(b[FEW ? g : 0], matrix + g * 32 * rank, rank, r0);
      load_s<T, FEW ? 16 : 2>(s, a, row, m, slot, part, rank, r0, entry.scaling);
      const uint32_t rows[4] = {s[0], 0, s[1], 0};
#pragma unroll
      for (int g = 0; g < 4; g++) {
        if (!FEW) load_b(b[0], matrix + g * 32 * rank, rank, r0);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          uint32_t& pair = x[g][j];
          float* const both = sum[4 * g + j];
          float d[4] = {WIDE ? both[0] : T::low(pair), WIDE ? both[1] : T::high(pair), 0.f, 0.f};
          T::mma(d, rows, b[FEW ? g : 0][j]);
          if (WIDE) both[0] = d[0], both[1] = d[1];
          else pair = T::pack(d[0], d[1]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 16 && WIDE; i++) x[i / 4][i % 4] = T::pack(sum[i][0], sum[i][1]);
}

DEVICE float sum_of_four(float value) {  // over the lanes of a token
  value += as_float(shuffle_xor(as_bits(value), 1));
  return value + as_float(shuffle_xor(as_bits(value), 2));
}

template <class T>
DEVICE float squares(const uint32_t (&x)[4][4]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 16; i++) sum += T::low(x[i / 4][i % 4]) * T::low(x[i / 4][i % 4]) + T::high(x[i / 4][i % 4]) * T::high(x[i / 4][i % 4]);
  return sum;
}

constexpr int kShared = 4, kFewTokens = 512;  // blocks of a cluster, which share a tile's columns where tiles are few: up to so many tokens

template <class T, bool WIDE, bool FEW>
KERNEL void __launch_bounds__(FEW ? 1024 / kShared : WIDE ? 512 : 1024, 1) add_norm(const NormRows a) {
  SMEM_DECL;
  const int warp = warp_index(), lane = lane_index(), warps = warps_per_block(), rank = FEW ? cluster_rank() : 0;
  const int column = (rank * warps + warp) * kColumns;
  const Row row = row_of(a.added, a.m, (int)blockIdx.x / (FEW ? kShared : 1));
  const Entry first = entry_of(a.added, 0, lane < a.added.num_slots ? lane : 0);
  uint32_t x[4][4] = {}, residual[4][4] = {}, weight[4][4];
  const auto load_weight = [&](int g) { load_words(weight[g], (const uint16_t*)a.weight + column + g * 32 + lane % 4 * 8); };
#pragma unroll
  for (int g = 0; g < 4 && FEW; g++) load_weight(g);
  wait_for_previous_kernel();
  allow_next_kernel();
  const int place = row.token * a.columns + column + lane % 4 * 8;
#pragma unroll
  for (int g = 0; g < 4; g++)
    if (row.inside) load_words_once(x[g], (const uint16_t*)a.x + place + g * 32);
#pragma unroll
  for (int g = 0; g < 4; g++)
    if (FEW && row.inside) load_words_once(residual[g], (const uint16_t*)a.residual + place + g * 32);
  add_row<T, WIDE, FEW>(x, a.added, row, first, a.m, 0, column);
#pragma unroll
  for (int g = 0; g < 4; g++) {
    if (!FEW && row.inside) load_words_once(residual[g], (const uint16_t*)a.residual + place + g * 32);
#pragma unroll
    for (int j = 0; j < 4; j++) x[g][j] = T::pack(T::low(x[g][j]) + T::low(residual[g][j]), T::high(x[g][j]) + T::high(residual[g][j]));
    if (row.inside) store_words((uint16_t*)a.residual + place + g * 32, x[g]);
  }
  float* const sums = (float*)smem_;  // [tokens][warps], then [tokens] of the block
  const float mine = sum_of_four(squares<T>(x));
  if (lane % 4 == 0) sums[lane / 4 * warps + warp] = mine;
  sync_block();
  float sum = 0.f;
  for (int i = 0; i < warps; i++) sum += sums[lane / 4 * warps + i];
  if (FEW) {
    float* const of_block = sums + kRows * warps;
    if (warp == 0 && lane % 4 == 0) of_block[lane / 4] = sum;
    share_with_cluster();
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < kShared; i++) sum += as_float(load_word_of((const uint32_t*)of_block + lane / 4, i));
    arrive_having_read(sum);
  }
  const float scale = inverse_root(sum / (float)a.columns + a.eps);
#pragma unroll
  for (int g = 0; g < 4; g++) {
    if (!FEW) load_weight(g);
#pragma unroll
    for (int j = 0; j < 4; j++) x[g][j] = T::pack(T::low(x[g][j]) * scale * T::low(weight[g][j]), T::high(x[g][j]) * scale * T::high(weight[g][j]));
    if (row.inside) store_words((uint16_t*)a.out + place + g * 32, x[g]);
  }
  if (FEW) wait_for_cluster();  // others may still read these sums
}

// In how many shares blocks go over the tiles: as many as are held at once, and no more tokens each than a block has places for.
int shares_of(int m, int held) {
  const int tiles = (m + kRows - 1) / kRows, least = (tiles * kRows + kTokens - 1) / kTokens + 1;
  return held > tiles ? tiles : held > least ? held : least;
}

template <class T>
int rotate_as(const RotateRows& a, void* stream) {
  const int width = a.added.width;
  const int groups = (a.heads + 2 * a.kv_heads + kHeads - 1) / kHeads;
  int parts = 1;
  for (int group = 0; group < groups; group++) parts = parts_of(a, group) > parts ? parts_of(a, group) : parts;
  RotatePlan plan = {groups, 0, kRows * kRotateRow, kRows * (kRotateRow + 512), 0};
  plan.bytes = plan.s + a.added.splits * kRows * parts * width * 4;
  const auto bytes = [&](int sixteens) { return sizeof(Tokens) + stages_of(sixteens) * plan.bytes; };
  const int sixteens = width > 64 || bytes(1) + kReserved > kMemory ? 0 : width > 32 ? 4 : width > 16 ? 2 : 1;
  const size_t shared = bytes(sixteens);
  const int fit = (int)(kMemory / (shared + kReserved)), most = sixteens > 1 ? 1 : kBlocks;
  plan.shares = shares_of(a.m, a.multiprocessors * (fit < most ? fit : most) / groups);
  const Launch how = {(unsigned)(groups * plan.shares), kHeads * 32, shared, stream, a.overlap && can_overlap()};
  switch (sixteens) {
    case 1: return launch(how, rotate<T, 1>, a, plan);
    case 2: return launch(how, rotate<T, 2>, a, plan);
    case 4: return launch(how, rotate<T, 4>, a, plan);
    default: return launch(how, rotate<T, 0>, a, plan);
  }
}

template <class T>
int norm_as(const NormRows& a, void* stream) {
  const unsigned warps = (unsigned)(a.columns / kColumns), tiles = (unsigned)((a.m + kRows - 1) / kRows);
  if (a.m <= kFewTokens && warps % kShared == 0 && can_overlap()) {  // clusters came with Hopper, as overlap did
    const Launch how = {tiles * kShared, warps / kShared * 32, kRows * (warps / kShared + 1) * 4, stream, a.overlap && can_overlap()};
    return a.added.width <= 16 ? launch_clusters(how, kShared, add_norm<T, false, true>, a) : launch_clusters(how, kShared, add_norm<T, true, true>, a);
  }
  const Launch how = {tiles, warps * 32, kRows * warps * 4, stream, a.overlap && can_overlap()};
  return a.added.width <= 16 ? launch(how, add_norm<T, false, false>, a) : launch(how, add_norm<T, true, false>, a);
}

}  // namespace

extern "C" int rotate_rows(const RotateRows* a, void* stream) { return a->is_bf16 ? rotate_as<BFloat16>(*a, stream) : rotate_as<Float16>(*a, stream); }
extern "C" int norm_rows(const NormRows* a, void* stream) { return a->is_bf16 ? norm_as<BFloat16>(*a, stream) : norm_as<Float16>(*a, stream); }
