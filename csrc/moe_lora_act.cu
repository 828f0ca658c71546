// Between the two GEMMs of experts with adapters, of few rows each: act = f(gate + B s, up + B s), s2 = scaling * A act, both by tensor cores
// with nothing in shared memory but the sums of s2.
//
//   * An item is up to 16 rows of a LoRA tile, or of 16 sorted rows those without an adapter. A cluster does it, each warp 32 of its columns at a time.
//   * Weights of adapters go straight from memory to fragments: which k or which column stands where in a product is free, so that a lane takes
//     neighbours by one load. They are asked for before the kernel before this one is complete, which wrote gate_up alone, and those
//     of the next item before the sums of this one are added up.
//   * Gate and up are what the products of B s begin with, and the activation of their results is, as it lies, the left operand of A act.
#include "moe_lora_act.h"

#include <math.h>

#include "hopper_prims.cuh"

namespace {

constexpr int kRows = 16, kColumns = 32, kRanks = 16, kWarps = 4, kThreads = 32 * kWarps, kRecord = 5;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kResident = 3;  // blocks of a multiprocessor: elsewhere the same takes more registers
#else
constexpr int kResident = 4;
#endif
constexpr int kMostParts = 8;  // blocks of a cluster that every GPU with clusters grants
enum { kSilu = 1, kGelu, kGeluTanh, kRelu, kRelu2, kClamped };

HOST_DEVICE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

struct Walk {
  Divider top_k, subs;  // subs: items of a LoRA tile
  int parts, clusters, most;  // most: LoRA tiles that the list has room for
  int per_part;         // groups of columns of a block
  int pitch;            // floats of a row of sums
};

struct Item {
  uint32_t rows;     // which of the sixteen it has; none: nothing to do
  int start;         // first row
  int rank, up;      // of the first projection; columns of s from the gate half's to the up half's
  int next_rank;     // of the second
  float scaling;     // of the second
  const uint16_t *b, *a;
};

// Where an item is found, a load ahead of what it points to.
struct Finder {
  const MoeLoraAct& m;
  const Walk& by;
  int index, items, chunks;  // items of LoRA tiles; chunks of sorted rows behind them
  uint32_t tile[4] = {};     // of the item at `index`

  DEVICE bool any() const { return index < items + chunks; }
  DEVICE void ask() {
    const int t = index / by.subs;
    if (t < by.most) load_words(tile, m.tiles + 4 * (int64_t)t);  // entries beyond their number are undefined, but there
  }
  // The item, whose record it writes if `says`; then on to the next.
  DEVICE Item take(bool says) {
    Item found = {};
    if (index < items) {
      const int t = index / by.subs, sub = index - t * (int)by.subs.by, expert = (int)tile[0], slot = (int)tile[1], rows = (int)tile[3] - sub * kRows;
      found.start = (int)tile[2] + sub * kRows;
      found.rows = rows <= 0 ? 0 : rows >= kRows ? 0xffff : (1u << rows) - 1;
      found.rank = m.b_rank[slot], found.up = m.b_split[slot] * m.max_rank, found.next_rank = m.a_rank[slot], found.scaling = m.scaling[slot];
      found.b = (const uint16_t*)m.b_pool + m.b_offset[slot] + expert * m.b_stride[slot];
      found.a = (const uint16_t*)m.a_pool + m.a_offset[slot] + expert * m.a_stride[slot];
      if (says && sub == 0) {
        int64_t* const record = m.records + kRecord * (int64_t)t;
        record[0] = found.start, record[1] = (int)tile[3], record[2] = found.next_rank, record[3] = 0, record[4] = (m.next_offset[slot] + expert * m.next_stride[slot]) / 8;
      }
    } else if (any()) {
      found.start = (index - items) * kRows;
      const int row = found.start + lane_index() % kRows;
      const int slot = row < m.counts[0] ? m.slots[m.sorted_pairs[row] / by.top_k] : 0;
      found.rows = warp_ballot(row < m.counts[0] && (slot < 0 || slot >= m.num_slots)) & 0xffff;
    }
    index += by.clusters;
    ask();
    return found;
  }
};

// Four 16-bit values from any address that holds `count` of them; what is beyond becomes zero.
DEVICE void load_four(uint32_t (&words)[2], const uint16_t* from, int count, bool aligned) {
  words[0] = words[1] = 0;
  if (count <= 0) return;
  if (aligned) return load_words(words, from);
  uint64_t all = 0;  // a value at a time: few registers
#pragma unroll 1
  for (int i = count < 4 ? count - 1 : 3; i >= 0; i--) all = all << 16 | from[i];
  words[0] = (uint32_t)all, words[1] = (uint32_t)(all >> 32);
}

// Of 32 columns: 16 ranks of both halves of B as right operands [eight columns][register], lane l with column 8 (n / 2) + 2 j + n % 2, n = l / 4, of the
// j-th eight, and ranks 4 (l % 4) .. + 3; 16 rows of A likewise [eight rows][step, register], lane l with columns 8 (l % 4) .. + 7.
template <bool GATED>
struct Adapters {
  uint32_t gate[4][2], up[GATED ? 4 : 1][2], a[2][4];

  DEVICE void load_b(const MoeLoraAct& m, const Item& item, int column0, int r0) {
    const int lane = lane_index(), n = lane / 4, ranks = item.rank - r0 - 4 * (lane % 4);
    const bool whole = item.rank % 4 == 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int column = column0 + 8 * (n / 2) + 2 * j + n % 2, count = column < m.inter ? ranks : 0;
      const uint32_t place = (uint32_t)(column * item.rank + r0 + 4 * (lane % 4));
      load_four(gate[j], item.b + place, count, whole);
      if constexpr (GATED) load_four(up[j], item.b + place + (uint32_t)(m.inter * item.rank), count, whole);
    }
  }
  DEVICE void load_a(const MoeLoraAct& m, const Item& item, int column0, int r0) {
    const int column = column0 + lane_index() % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = r0 + 8 * i + lane_index() / 4;
      if (r < item.next_rank && column < m.inter) load_words(a[i], item.a + (int64_t)r * m.inter + column);
      else a[i][0] = a[i][1] = a[i][2] = a[i][3] = 0;
    }
  }
};

// PLAIN: g * sigmoid(g) * u.
template <bool GATED, bool PLAIN>
DEVICE float activate(const MoeLoraAct& m, float gate, float up) {
  constexpr float kLog2E = 1.4426950408889634f;
  if constexpr (PLAIN) return gate * reciprocal(1.f + exp2_of(-kLog2E * gate)) * up;
  float value;
  if (m.activation == kClamped) {
    const float g = fminf(gate, m.limit);
    return g * reciprocal(1.f + exp2_of(-kLog2E * m.alpha * g)) * (fminf(fmaxf(up, -m.limit), m.limit) + 1.f);
  } else if (m.activation == kSilu) {
    value = gate * reciprocal(1.f + exp2_of(-kLog2E * gate));
  } else if (m.activation == kGelu) {
    value = 0.5f * gate * (1.f + erff(gate * 0.7071067811865476f));
  } else if (m.activation == kGeluTanh) {
    value = gate * reciprocal(1.f + exp2_of(-kLog2E * 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate)));
  } else {
    value = fmaxf(gate, 0.f);
    if (m.activation == kRelu2) value *= value;
  }
  return GATED ? value * up : value;
}

// Rows l / 4 and 8 on, columns 8 (l % 4) .. + 7 of 32, as a product has them: [eight][row, column].
DEVICE void load_sums(const MoeLoraAct& m, const Item& item, int column0, int width, int at, float (&d)[4][4]) {
  const int lane = lane_index(), column = column0 + lane % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + 8 * half;
    const bool there = (item.rows >> row & 1) && column < m.inter;
    const float* const from = m.gate_up + (int64_t)(item.start + row) * width + at + column;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float four[4] = {0.f, 0.f, 0.f, 0.f};
      if (there) load_floats(four, from + 4 * i);
#pragma unroll
      for (int j = 0; j < 4; j++) d[2 * i + j / 2][2 * half + j % 2] = four[j];
    }
  }
}

// Ranks r0 + 4 (l % 4) .. + 3 of s of the same rows, from column `at` on, as a left operand.
DEVICE void load_low(const MoeLoraAct& m, const Item& item, int r0, int at, uint32_t (&fragment)[4]) {
  const int lane = lane_index(), r = r0 + lane % 4 * 4;
  const bool whole = (item.rank | m.s_width | m.max_rank) % 4 == 0;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + 8 * half;
    uint32_t words[2];
    load_four(words, (const uint16_t*)m.s + (int64_t)(item.start + row) * m.s_width + at + r, item.rows >> row & 1 ? item.rank - r : 0, whole);
    fragment[half] = words[0], fragment[2 + half] = words[1];
  }
}

// 32 columns of an item: its act, and this warp's part of A act, in `sums` [16, pitch], which it begins if `first`.
template <class T, bool GATED, bool PLAIN>
DEVICE void compute(const MoeLoraAct& m, const Walk& by, const Item& item, int column0, bool first, Adapters<GATED>& adapters, float* sums) {
  const int lane = lane_index(), column = column0 + lane % 4 * 8;
  float gate[4][4], up[4][4];
  load_sums(m, item, column0, (1 + GATED) * m.inter, 0, gate);
  if constexpr (GATED) load_sums(m, item, column0, 2 * m.inter, m.inter, up);
#pragma unroll 1
  for (int r0 = 0; r0 < item.rank; r0 += kRanks) {
    uint32_t low[4], high[4];
    load_low(m, item, r0, 0, low);
    if constexpr (GATED) load_low(m, item, r0, item.up, high);
    if (r0 > 0) adapters.load_b(m, item, column0, r0);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      T::mma(gate[j], low, adapters.gate[j]);
      if constexpr (GATED) T::mma(up[j], high, adapters.up[j]);
    }
  }
  uint32_t act[2][4];  // left operands: [step][row, column]
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      act[j / 2][j % 2 * 2 + half] = T::pack(activate<GATED, PLAIN>(m, gate[j][2 * half], up[j][2 * half]), activate<GATED, PLAIN>(m, gate[j][2 * half + 1], up[j][2 * half + 1]));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + 8 * half;
    const uint32_t words[4] = {act[0][half], act[0][2 + half], act[1][half], act[1][2 + half]};
    if ((item.rows >> row & 1) && column < m.inter) store_words((uint16_t*)m.act + (int64_t)(item.start + row) * m.inter + column, words);
  }
#pragma unroll 1
  for (int r0 = 0; r0 < item.next_rank; r0 += kRanks) {
    if (r0 > 0) adapters.load_a(m, item, column0, r0);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float* const target = sums + lane / 4 * by.pitch + r0 + 8 * i + lane % 4 * 2;
      float d[4] = {0.f, 0.f, 0.f, 0.f};
      if (!first) d[0] = target[0], d[1] = target[1], d[2] = target[8 * by.pitch], d[3] = target[8 * by.pitch + 1];
#pragma unroll
      for (int step = 0; step < 2; step++) {
        const uint32_t right[2] = {adapters.a[i][2 * step], adapters.a[i][2 * step + 1]};
        T::mma(d, act[step], right);
      }
      store_two_floats(target, d[0], d[1]), store_two_floats(target + 8 * by.pitch, d[2], d[3]);
    }
  }
}

// s2 of an item: add up the warps in `sums` [warps, 16, pitch], then the blocks of the cluster, in their order; each stores a share.
template <class T>
DEVICE void add_up(const MoeLoraAct& m, const Walk& by, const Item& item, float* sums) {
  const int area = kRows * by.pitch, part = by.parts > 1 ? cluster_rank() : 0, warps = by.per_part < kWarps ? by.per_part : kWarps;
  const int pairs = divide_up(item.next_rank, 2);  // of ranks in a row
  sync_block();
  if (by.parts > 1) {
    for (int i = thread_index(); i < kRows * pairs; i += kThreads) {
      float* const at = sums + i / pairs * by.pitch + i % pairs * 2;
      float total[2] = {at[0], at[1]};
      for (int w = 1; w < warps; w++) total[0] += at[w * area], total[1] += at[w * area + 1];
      store_two_floats(at, total[0], total[1]);
    }
    sync_cluster();
  }
  for (int i = thread_index() + part * kThreads; i < kRows * pairs; i += kThreads * by.parts) {
    const int row = i / pairs, r = i % pairs * 2;
    const float* const at = sums + row * by.pitch + r;
    float total[2] = {0.f, 0.f};
    if (by.parts > 1) {
      for (int p = 0; p < by.parts; p++)
#pragma unroll
        for (int j = 0; j < 2; j++) total[j] += as_float(load_word_of((const uint32_t*)at + j, p));
    } else {
      for (int w = 0; w < warps; w++) total[0] += at[w * area], total[1] += at[w * area + 1];
    }
    if (!(item.rows >> row & 1)) continue;
    const uint32_t pair = T::pack(total[0] * item.scaling, total[1] * item.scaling);
    uint16_t* const out = (uint16_t*)m.next + (int64_t)(item.start + row) * m.next_width + r;
    out[0] = (uint16_t)pair;
    if (r + 1 < item.next_rank) out[1] = (uint16_t)(pair >> 16);
  }
  if (by.parts > 1) sync_cluster();  // all of it is read
  else sync_block();
}

template <class T, bool GATED, bool PLAIN>
KERNEL void __launch_bounds__(kThreads, kResident) moe_lora_act_kernel(const MoeLoraAct m, const Walk by) {
  SMEM_DECL;
  float* const all = (float*)smem_;
  float* const sums = all + warp_index() * kRows * by.pitch;
  const int part = by.parts > 1 ? cluster_rank() : 0, first = part * by.per_part + warp_index();
  const int end = divide_up(m.inter, kColumns) < (part + 1) * by.per_part ? divide_up(m.inter, kColumns) : (part + 1) * by.per_part;
  Finder finder{m, by, (int)blockIdx.x / by.parts, m.counts[2] * (int)by.subs.by, divide_up(m.counts[0], kRows)};
  Adapters<GATED> adapters;
  const auto load = [&](const Item& of, int group) {
    if (of.rows == 0 || group >= end) return;
    adapters.load_b(m, of, group * kColumns, 0);
    adapters.load_a(m, of, group * kColumns, 0);
  };
  finder.ask();
  const bool says = part == 0 && thread_index() == 0;
  Item item = finder.take(says);
  load(item, first);
  allow_next_kernel();  // it waits for this one's end before it reads what any kernel behind the alignment wrote
  wait_for_previous_kernel();
  for (bool more = true; more;) {
    for (int group = first; item.rows != 0 && group < end; group += kWarps) {
      if (group > first) load(item, group);
      compute<T, GATED, PLAIN>(m, by, item, group * kColumns, group == first, adapters, sums);
    }
    if (item.rows != 0 && item.next_rank > 0 && first >= end)  // a warp without columns
      for (int i = lane_index(); i < kRows * by.pitch; i += 32) sums[i] = 0.f;
    const Item done = item;
    more = finder.any();
    item = finder.take(says);
    if (more) load(item, first);
    if (done.rows != 0 && done.next_rank > 0) add_up<T>(m, by, done, all);
  }
}

template <class T, bool GATED, bool PLAIN>
int run(const MoeLoraAct& m, const Walk& by, void* stream) {
  const Launch how = {(unsigned)(by.clusters * by.parts), kThreads, (size_t)(kWarps * kRows * by.pitch * 4), stream, m.overlap && can_overlap()};
  if (by.parts == 1) return launch(how, moe_lora_act_kernel<T, GATED, PLAIN>, m, by);
  return launch_clusters(how, (unsigned)by.parts, moe_lora_act_kernel<T, GATED, PLAIN>, m, by);
}

template <class T>
int dispatch(const MoeLoraAct& m, const Walk& by, void* stream) {
  if (!m.gated) return run<T, false, false>(m, by, stream);
  return m.activation == kSilu ? run<T, true, true>(m, by, stream) : run<T, true, false>(m, by, stream);
}

}  // namespace

extern "C" int moe_lora_act(const MoeLoraAct* arguments, int32_t tiles, int32_t parts, int32_t multiprocessors, void* stream) {
  const MoeLoraAct& m = *arguments;
  if (m.pairs == 0) return 0;
  const int groups = divide_up(m.inter, kColumns), subs = divide_up(m.lora_block, kRows), most = parts > kMostParts ? kMostParts : parts;
  Walk by = {make_divider(m.top_k), make_divider(subs), most, 0, tiles, divide_up(groups, most), divide_up(m.next_width, kRanks) * kRanks + 8};
  by.parts = divide_up(groups, by.per_part);  // none without columns
  const int resident = kResident * multiprocessors / by.parts, items = tiles * subs + divide_up(m.pairs, kRows);
  by.clusters = items < resident ? items : resident;
  return m.is_bf16 ? dispatch<BFloat16>(m, by, stream) : dispatch<Float16>(m, by, stream);
}
