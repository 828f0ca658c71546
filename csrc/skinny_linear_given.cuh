// skinny_linear.cu where the kernel before has made s: what is added to a row of the output is added with the sums of the cluster's blocks.
#pragma once
#include "skinny_linear_layout.cuh"

namespace {

// The shares of s added up, zeros beyond an adapter's rank: four ranks of a token and part by as many threads as there are, of which each has some shares.
DEVICE void add_shares_up(const SkinnyLinear& a, const Layout& l, const Shared& shared, int tid) {
  const int fours = a.m * a.parts * (int)l.fours.by, apart = a.m * a.parts * a.width;
  int together = 1;  // threads of a four
  while (together < 32 && 2 * together <= a.shares && 2 * together * fours <= kPreparing) together *= 2;
  const int each = kPreparing / together, first = tid & (together - 1), mine = tid / together;
#pragma unroll 1
  for (int from = 0; from < fours; from += each) {
    const int four = from + mine, at = four / l.fours, r = (four - at * (int)l.fours.by) * 4, ranks = four < fours ? shared.added[at].rank - r : 0;
    float sum[4] = {};
#pragma unroll 1
    for (int share = first; share < a.shares; share += kTogether * together) {
      float value[kTogether][4] = {};
#pragma unroll
      for (int i = 0; i < kTogether; i++)
        if (ranks > 0 && share + i * together < a.shares) load_floats_relaxed(value[i], a.s + (share + i * together) * apart + at * a.width + r);
#pragma unroll
      for (int i = 0; i < kTogether; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (e < ranks) sum[e] += value[i][e];
    }
#pragma unroll 1
    for (int delta = 1; delta < together; delta *= 2)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[e] += as_float(shuffle_xor(as_bits(sum[e]), delta));
    if (four < fours && first == 0) store_floats(shared.eight_sums + four * 4, sum);
  }
}

struct Row {  // of the output, of one token
  int token, local, n;  // n < 0: none
  int added;            // which of them
};

DEVICE Row row_at(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part, int item) {
  const int share = (int)l.share.by, token = item / l.share, local = part.rank * share + item - token * share, n = part.n0 + local;
  if (token >= a.m || local >= a.rows || n >= a.n) return {0, 0, -1, 0};
  int p = 0;
#pragma unroll
  for (int i = 1; i < kMostParts; i++) p += i < a.parts && n >= shared.count[i];
  return {token, local, n, token * a.parts + p};
}

// What is added to the rows of the output that this block writes: B, and s once the kernel before is complete.
DEVICE void prepare_given(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part) {
  const int tid = thread_index() - kMultiplying;
  if (tid < a.parts) shared.count[tid] = a.starts[tid];
  for (int i = tid; i < a.m * a.parts; i += kPreparing) {
    const int token = i / a.parts, p = i - token * a.parts, slot = a.slots[token], entry = p * a.part_stride + slot;
    Added k = {0, 0, 0.f};
    if (slot >= 0) k.rank = a.rank[entry], k.place = a.b_offset[entry] - (int64_t)a.starts[p] * k.rank, k.scaling = a.scaling[entry];
    shared.added[i] = k;
  }
  sync_warpgroup(1);
  const int pieces = l.ranks / 8;  // of eight ranks
  for (int i = tid; i < pieces * a.m * (int)l.share.by; i += kPreparing) {
    const int item = i / pieces, r = (i - item * pieces) * 8;
    const Row row = row_at(a, l, shared, part, item);
    const Added k = shared.added[row.added];
    const int ranks = row.n < 0 ? 0 : k.rank - r;
    load_piece(shared.b + i * 16, (const uint16_t*)a.pool + k.place + (int64_t)row.n * k.rank + r, ranks, k.rank % 8 == 0);
  }
  cp_commit();
  wait_for_previous_kernel();
  add_shares_up(a, l, shared, tid);
  cp_wait<0>();
}

// As add_up, a row of a token a thread, with scaling * B s.
template <class T>
DEVICE void add_up_given(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part) {
  const int pitch = pitch_of(a.rows);
  for (int item = thread_index(); item < a.m * (int)l.share.by; item += kThreads) {
    const Row row = row_at(a, l, shared, part, item);
    if (row.n < 0) continue;
    float sum = 0.f, low = 0.f;
#pragma unroll 2
    for (int i = 0; i < 2 * a.splits; i++) sum += load_float_beside(shared.sums + ((i & 1) * a.m + row.token) * pitch + row.local, part.rank, i >> 1);
    const Added added = shared.added[row.added];
#pragma unroll 2
    for (int r = 0; r < added.rank; r += 8) {
      uint32_t b[4];
      float s[2][4];
      load_words(b, shared.b + (item * l.ranks + r) * 2);
      load_floats(s[0], shared.eight_sums + row.added * l.ranks + r), load_floats(s[1], shared.eight_sums + row.added * l.ranks + r + 4);
#pragma unroll
      for (int e = 0; e < 4; e++) low += s[e / 2][e % 2 * 2] * T::low(b[e]) + s[e / 2][e % 2 * 2 + 1] * T::high(b[e]);
    }
    if (added.rank > 0) sum += added.scaling * low;
    if (a.bias) sum += T::low(((const uint16_t*)a.bias)[row.n]);
    ((uint16_t*)a.out)[(int64_t)row.token * a.n + row.n] = (uint16_t)T::pack(sum, 0.f);
  }
}

}  // namespace
