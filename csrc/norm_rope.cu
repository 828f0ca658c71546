// The kernels after the attention's linears for many tokens: norm, rotation and cache write of q, k and v; residual, norm. Both add what adapters
// have to add to the linear's output on the way, with tensor cores and without shared memory.
//
//   * A warp owns 8 tokens, in the order of their slots, and 128 columns; a lane 8 columns next to each other of every 32, of one token: 16-byte
//     loads and stores. An m16n8k16 product has these tokens as half of its rows, the others are zero: fewer registers, more warps at a time.
//     Its columns are assigned to match, ranks so that a lane's four lie next to each other.
//   * B and s are read through L1, past which go the activations; blocks of the rotation take all tokens for one block of heads, then the next, so
//     that a multiprocessor has the B of few heads at a time.
//   * Rows of other slots have s = 0, so that a product leaves them as they are.
#include "norm_rope.h"

#include "gemm_prims.cuh"

namespace {

constexpr int kRows = 8, kColumns = 128, kWarps = 4;
constexpr int kNone = 1 << 30;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocks = 5;  // of the rotation on a multiprocessor: with six registers do not suffice there
#else
constexpr int kBlocks = 6;
#endif

struct Row {  // a lane's token
  int token, slot;
  bool inside;
};

DEVICE Row row_of(const AddedRows& a, int m, int tile) {
  const int place = tile * kRows + lane_index() / 4;
  const bool inside = place < m;
  return {inside ? a.order[place] : 0, inside ? a.slots[place] : -1, inside};
}

// The smallest slot of the tile above `slot`, or kNone.
DEVICE int next_slot(const Row& row, int slot) { return -warp_max(row.slot > slot ? -row.slot : -kNone); }

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

// The row's s times `scaling` if it is of `slot`, zero otherwise: ranks as in load_b. Loads of two splits do not wait for one another.
template <class T>
DEVICE void load_s(uint32_t (&out)[2], const AddedRows& a, const Row& row, int m, int slot, int part, int rank, int r0, float scaling) {
  const int r = r0 + lane_index() % 4 * 4;
  const int64_t apart = (int64_t)m * a.parts * a.width;
  const bool mine = row.slot == slot && r < rank;
  const float* s = a.s + ((int64_t)row.token * a.parts + part) * a.width + r;
  float sum[4] = {};
#pragma unroll 2
  for (int split = 0; split < a.splits; split++, s += apart) {
    float value[4] = {};
    if (mine && a.width % 4 == 0) load_floats(value, s);
    else if (mine)
      for (int e = 0; e < 4; e++)
        if (r + e < rank) value[e] = s[e];
#pragma unroll
    for (int e = 0; e < 4; e++) sum[e] += value[e];
  }
  if (mine && a.row_scale) scaling *= a.row_scale[row.token];
#pragma unroll
  for (int e = 0; e < 4; e++) sum[e] = r + e < rank ? sum[e] * scaling : 0.f;
  out[0] = T::pack(sum[0], sum[1]), out[1] = T::pack(sum[2], sum[3]);
}

// x [32 columns each][8 columns] += B s, rounded as the linear would have rounded it. WIDE: ranks beyond 16, which need float32 between their products.
template <class T, bool WIDE>
DEVICE void add_row(uint32_t (&x)[4][4], const AddedRows& a, const Row& row, int m, int part, int first_row) {
  float sum[16][2];
#pragma unroll
  for (int i = 0; i < 16; i++) sum[i][0] = T::low(x[i / 4][i % 4]), sum[i][1] = T::high(x[i / 4][i % 4]);
#pragma unroll 1
  for (int slot = next_slot(row, -1); slot != kNone; slot = next_slot(row, slot)) {
    const int entry = part * a.part_stride + slot, rank = a.rank[entry];
    const uint16_t* const matrix = (const uint16_t*)a.pool + a.offset[entry] + (int64_t)first_row * rank;
#pragma unroll 1
    for (int r0 = 0; r0 < rank; r0 += 16) {
      uint32_t s[2];
      load_s<T>(s, a, row, m, slot, part, rank, r0, a.scaling[entry]);
      const uint32_t rows[4] = {s[0], 0, s[1], 0};
#pragma unroll
      for (int g = 0; g < 4; g++) {
        uint32_t b[4][2];
        load_b(b, matrix + g * 32 * rank, rank, r0);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          uint32_t& pair = x[g][j];
          float* const both = sum[4 * g + j];
          float d[4] = {WIDE ? both[0] : T::low(pair), WIDE ? both[1] : T::high(pair), 0.f, 0.f};
          T::mma(d, rows, b[j]);
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
  for (int g = 0; g < 4; g++)
#pragma unroll
    for (int j = 0; j < 4; j++) sum += T::low(x[g][j]) * T::low(x[g][j]) + T::high(x[g][j]) * T::high(x[g][j]);
  return sum;
}

// ---- rotation --------------------------------------------------------------------------------------------------------------------------

// One pair of packed columns of a head's halves: norm's scale and weights (rounded between, as transformers does), then the turn.
template <class T>
DEVICE void turn(uint32_t& low, uint32_t& high, bool norm, float scale, uint32_t low_weight, uint32_t high_weight, const float* cos, const float* sin) {
  if (norm) {
    low = T::pack(T::low(low) * scale * T::low(low_weight), T::high(low) * scale * T::high(low_weight));
    high = T::pack(T::low(high) * scale * T::low(high_weight), T::high(high) * scale * T::high(high_weight));
  }
  const float a[2] = {T::low(low), T::high(low)}, b[2] = {T::low(high), T::high(high)};
  low = T::pack(a[0] * cos[0] - b[0] * sin[0], a[1] * cos[1] - b[1] * sin[1]);
  high = T::pack(b[0] * cos[0] + a[0] * sin[0], b[1] * cos[1] + a[1] * sin[1]);
}

template <class T, bool WIDE>
KERNEL void __launch_bounds__(kWarps * 32, WIDE ? 4 : kBlocks) rotate(const RotateRows a, int tiles) {
  const int heads = a.heads + 2 * a.kv_heads, head = (int)blockIdx.x / tiles * kWarps + warp_index(), quarter = lane_index() % 4 * 8;
  const int part = head < a.heads ? 0 : head < a.heads + a.kv_heads ? 1 : 2;
  const int head_in_part = head - (part == 0 ? 0 : part == 1 ? a.heads : a.heads + a.kv_heads);
  const Row row = row_of(a.added, a.m, (int)blockIdx.x % tiles);
  const void* const weight = part == 0 ? a.q_weight : a.k_weight;
  const bool norm = part < 2 && weight != nullptr;
  int place = 0, target_row = row.token;  // what no kernel of a step writes is read before the linear is complete
  if (row.inside && part < 2) place = (int)a.positions[row.token] * a.table_stride + quarter;
  if (row.inside && part > 0) target_row = (int)a.kv_slots[row.token];
  wait_for_previous_kernel();
  allow_next_kernel();
  if (head >= heads) return;
  uint32_t x[4][4] = {};
  const uint16_t* const source = (const uint16_t*)a.qkv + ((int64_t)row.token * heads + head) * kColumns + quarter;
#pragma unroll
  for (int g = 0; g < 4; g++)
    if (row.inside) load_words_once(x[g], source + g * 32);
  add_row<T, WIDE>(x, a.added, row, a.m, part, head_in_part * kColumns);
  const float scale = norm ? inverse_root(sum_of_four(squares<T>(x)) / kColumns + a.eps) : 1.f;
  if (!row.inside) return;
  if (part < 2) {
#pragma unroll
    for (int g = 0; g < 2; g++) {
      uint32_t weights[2][4] = {};
      if (norm) load_words(weights[0], (const uint16_t*)weight + g * 32 + quarter), load_words(weights[1], (const uint16_t*)weight + (g + 2) * 32 + quarter);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float cos[4], sin[4];
        load_floats(cos, a.cos + place + g * 32 + i * 4), load_floats(sin, a.sin + place + g * 32 + i * 4);
#pragma unroll
        for (int j = 0; j < 2; j++)
          turn<T>(x[g][2 * i + j], x[g + 2][2 * i + j], norm, scale, weights[0][2 * i + j], weights[1][2 * i + j], cos + 2 * j, sin + 2 * j);
      }
    }
  }
  uint16_t* const out = part == 0 ? (uint16_t*)a.q : (uint16_t*)(part == 1 ? a.k_cache : a.v_cache);
  uint16_t* const target = out + ((int64_t)target_row * (part == 0 ? a.heads : a.kv_heads) + head_in_part) * kColumns + quarter;
#pragma unroll
  for (int g = 0; g < 4; g++) store_words(target + g * 32, x[g]);
}

// ---- norm ------------------------------------------------------------------------------------------------------------------------------

template <class T, bool WIDE>
KERNEL void __launch_bounds__(WIDE ? 512 : 1024, 1) add_norm(const NormRows a) {
  SMEM_DECL;
  const int warp = warp_index(), lane = lane_index(), column = warp * kColumns, warps = warps_per_block();
  const Row row = row_of(a.added, a.m, (int)blockIdx.x);
  wait_for_previous_kernel();
  allow_next_kernel();
  uint32_t x[4][4] = {};
  const int place = row.token * a.columns + column + lane % 4 * 8;
#pragma unroll
  for (int g = 0; g < 4; g++)
    if (row.inside) load_words_once(x[g], (const uint16_t*)a.x + place + g * 32);
  add_row<T, WIDE>(x, a.added, row, a.m, 0, column);
#pragma unroll
  for (int g = 0; g < 4; g++) {
    uint32_t residual[4] = {};
    if (row.inside) load_words_once(residual, (const uint16_t*)a.residual + place + g * 32);
#pragma unroll
    for (int j = 0; j < 4; j++) x[g][j] = T::pack(T::low(x[g][j]) + T::low(residual[j]), T::high(x[g][j]) + T::high(residual[j]));
    if (row.inside) store_words((uint16_t*)a.residual + place + g * 32, x[g]);
  }
  float* const sums = (float*)smem_;  // [tokens][warps]
  const float mine = sum_of_four(squares<T>(x));
  if (lane % 4 == 0) sums[lane / 4 * warps + warp] = mine;
  sync_block();
  float sum = 0.f;
  for (int i = 0; i < warps; i++) sum += sums[lane / 4 * warps + i];
  const float scale = inverse_root(sum / (float)a.columns + a.eps);
#pragma unroll
  for (int g = 0; g < 4; g++) {
    uint32_t weight[4];
    load_words(weight, (const uint16_t*)a.weight + column + g * 32 + lane % 4 * 8);
#pragma unroll
    for (int j = 0; j < 4; j++) x[g][j] = T::pack(T::low(x[g][j]) * scale * T::low(weight[j]), T::high(x[g][j]) * scale * T::high(weight[j]));
    if (row.inside) store_words((uint16_t*)a.out + place + g * 32, x[g]);
  }
}

template <class T>
int rotate_as(const RotateRows& a, void* stream) {
  const int tiles = (a.m + kRows - 1) / kRows, head_blocks = (a.heads + 2 * a.kv_heads + kWarps - 1) / kWarps;
  const Launch how = {(unsigned)(head_blocks * tiles), kWarps * 32, 0, stream, a.overlap && can_overlap()};
  return a.added.width <= 16 ? launch(how, rotate<T, false>, a, tiles) : launch(how, rotate<T, true>, a, tiles);
}

template <class T>
int norm_as(const NormRows& a, void* stream) {
  const unsigned warps = (unsigned)(a.columns / kColumns);
  const Launch how = {(unsigned)((a.m + kRows - 1) / kRows), warps * 32, kRows * warps * 4, stream, a.overlap && can_overlap()};
  return a.added.width <= 16 ? launch(how, add_norm<T, false>, a) : launch(how, add_norm<T, true>, a);
}

}  // namespace

extern "C" int rotate_rows(const RotateRows* a, void* stream) { return a->is_bf16 ? rotate_as<BFloat16>(*a, stream) : rotate_as<Float16>(*a, stream); }
extern "C" int norm_rows(const NormRows* a, void* stream) { return a->is_bf16 ? norm_as<BFloat16>(*a, stream) : norm_as<Float16>(*a, stream); }
