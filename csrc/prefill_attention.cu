// Attention of many query tokens over the paged KV cache on sm_90, by wgmma, after FlashAttention-3 (Shah et al. 2024).
//
//   * A tile is 128 rows, (token, head) pairs of the query heads of one KV head, so that a tile reads each of its keys once for the whole group.
//     Blocks take tiles by ticket, those with most keys first where requests are alike.
//   * One warp fetches by the tensor copy engine: q of a tile, then keys and values in blocks of 128, one box of a page and 64 columns a lane.
//   * Two warpgroups have 64 rows each. The scores of the next block are multiplied beside the values of this one; the softmax of the next block
//     runs beside the values' product.
//   * A block whose keys end within it has values that nobody wrote: they are zeroed in shared memory, since 0 times NaN is no zero.
#include "prefill_attention.h"

#include "hopper_prims.cuh"

#if !SM90
#pragma nv_diag_suppress 177  // nothing is used where the kernel is empty
#endif

namespace {

constexpr int kHead = 128, kRows = 128, kKeys = 128, kStages = 3, kThreads = 384;
constexpr int kHalfBytes = 128 * 128, kTileBytes = 2 * kHalfBytes;  // 128 rows of 64 columns, and both halves of a head
constexpr int kSharedBytes = (1 + 2 * kStages) * kTileBytes + 256;

struct Note {  // a tile; kv_head -1: no more
  int32_t token, queries, kv_head, position, keys, seq_len;  // first token, how many, and the first one's position; keys up to the last row's
};

struct Shared {
  uint8_t *q, *k, *v;
  Barrier *q_full, *q_empty, *k_full, *k_empty, *v_full, *v_empty;
  Note* note;

  DEVICE explicit Shared(uint8_t* memory) : q(memory), k(memory + kTileBytes), v(k + kStages * kTileBytes) {
    q_full = (Barrier*)(v + kStages * kTileBytes), q_empty = q_full + 1;
    k_full = q_full + 2, k_empty = k_full + kStages, v_full = k_empty + kStages, v_empty = v_full + kStages;
    note = (Note*)(v_empty + kStages);
  }
};

HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// ---- fetching --------------------------------------------------------------------------------------------------------------------------

// The next tile with query tokens; request r owns the blocks of tokens from query_starts[r] / tokens + r on. One warp; `table`: its request's pages.
DEVICE Note next_tile(const PrefillAttention& a, int tokens, const int32_t*& table) {
  const int blocks = a.m / tokens + a.requests;
  while (true) {
    const int tile = (int)shuffle(lane_index() == 0 ? take_ticket(a.tickets) : 0u, 0);
    if (tile >= blocks * a.kv_heads) return {0, 0, -1, 0, 0, 0};
    const int block = blocks - 1 - tile / a.kv_heads;
    uint32_t before = 0;
    for (int r = lane_index(); r < a.requests; r += 32) before += a.query_starts[r] / tokens + r <= block;
    const int request = (int)warp_sum(before) - 1, start = a.query_starts[request], queries = a.query_starts[request + 1] - start;
    const int first = (block - (start / tokens + request)) * tokens, seq_len = a.seq_lens[request], position = seq_len - queries + first;
    if (first >= queries) continue;
    table = a.page_table + (int64_t)request * a.max_pages;
    return {start + first, smaller(tokens, queries - first), tile % a.kv_heads, position, smaller(position + tokens, seq_len), seq_len};
  }
}

// The cache row of this lane's box: lane / 2 pages, or 128 keys of a larger page, from key `first` on; -1 beyond the end of the request.
DEVICE int row_of(const PrefillAttention& a, const int32_t* table, const Note& note, int first, int unit) {
  const int key = first + lane_index() / 2 * unit;
  return lane_index() / 2 * unit < kKeys && key < note.seq_len ? table[key / a.page_size] * a.page_size + key % a.page_size : -1;
}

DEVICE void fetch_block(const TensorMap& map, uint8_t* target, Barrier* full, Barrier* empty, uint32_t turn, int row, int head, int unit) {
  const int half = lane_index() & 1;
  barrier_wait(empty, (turn & 1) ^ 1);
  if (row >= 0) copy_box(target + half * kHalfBytes + lane_index() / 2 * unit * 128, &map, full, half * 64, head, row, kKeep);
  const int boxes = count_bits(warp_ballot(row >= 0));
  if (lane_index() == 0) barrier_expect(full, boxes * unit * 128);
}

DEVICE void fetch(const PrefillAttention& a, const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map, const Shared& s) {
  const int group = a.heads / a.kv_heads, tokens = kRows / group, unit = smaller(a.page_size, kKeys);
  const int32_t* table = nullptr;
  uint32_t step = 0;
  for (uint32_t turn = 0;; turn++) {
    const Note note = next_tile(a, tokens, table);
    barrier_wait(s.q_empty, (turn & 1) ^ 1);
    if (lane_index() == 0) {
      *s.note = note;
      const bool any = note.keys > 0;
      for (int half = 0; half < 2 && any; half++) copy_box(s.q + half * kHalfBytes, &q_map, s.q_full, half * 64, note.kv_head * group, note.token, kKeep);
      barrier_expect(s.q_full, any ? kTileBytes : 0);
    }
    if (note.kv_head < 0) break;
    int row = row_of(a, table, note, 0, unit);
    for (int first = 0; first < note.keys; first += kKeys, step++) {
      const int next = row_of(a, table, note, first + kKeys, unit), stage = step % kStages;
      fetch_block(k_map, s.k + stage * kTileBytes, s.k_full + stage, s.k_empty + stage, step / kStages, row, note.kv_head, unit);
      fetch_block(v_map, s.v + stage * kTileBytes, s.v_full + stage, s.v_empty + stage, step / kStages, row, note.kv_head, unit);
      row = next;
    }
  }
  if (lane_index() == 0 && arrive(a.tickets + 1) == gridDim.x - 1) a.tickets[0] = a.tickets[1] = 0;  // nobody takes another
}

// ---- multiplying -----------------------------------------------------------------------------------------------------------------------

struct Rows {  // of a thread: two
  float maximum[2], total[2], decay[2];
  int position[2];  // the last key that they see
};

DEVICE void release(Barrier* empty, bool always = true) {
  if (always && lane_index() == 0) barrier_arrive(empty);
}

// scores [64 x 128] = q k^T.
template <class T>
DEVICE void multiply_keys(float (&scores)[72], const uint8_t* q, const uint8_t* k) {
  wgmma_begin();
#pragma unroll
  for (int i = 0; i < kHead / 16; i++)
    multiply_shared<T, 16>(scores, wgmma_matrix(q + i / 4 * kHalfBytes) + 2 * (i % 4), wgmma_matrix(k + i / 4 * kHalfBytes) + 2 * (i % 4), i > 0);
  wgmma_commit();
}

// out [64 x 128] (+)= p v.
template <class T>
DEVICE void multiply_values(float (&out)[72], const uint32_t (&p)[kKeys / 16][4], const uint8_t* v, bool accumulate) {
  wgmma_begin();
#pragma unroll
  for (int i = 0; i < kKeys / 16; i++) multiply_transposed<T>(out, p[i], wgmma_matrix_transposed(v, kHalfBytes) + 128 * i, accumulate || i > 0);
  wgmma_commit();
}

// Scores become exponentials against the maximum so far, in powers of two; decay: what earlier sums are multiplied by.
DEVICE void exponentials(float (&scores)[72], Rows& rows, float scale, int first, bool masked) {
  const int column = first + lane_index() % 4 * 2;
  if (masked) {
#pragma unroll
    for (int i = 0; i < 64; i++)
      if (column + i / 4 * 8 + (i & 1) > rows.position[i >> 1 & 1]) scores[i] = -INFINITY;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top = scores[2 * h];
#pragma unroll
    for (int i = 0; i < 16; i++) top = fmaxf(fmaxf(top, scores[4 * i + 2 * h]), scores[4 * i + 2 * h + 1]);
    top = fmaxf(top, as_float(shuffle_xor(as_bits(top), 1)));
    top = fmaxf(top, as_float(shuffle_xor(as_bits(top), 2)));
    const float maximum = fmaxf(rows.maximum[h], top * scale);
    rows.decay[h] = exp2_of(rows.maximum[h] - maximum);
    rows.maximum[h] = maximum;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& score = scores[4 * i + 2 * h + e];
        score = exp2_of(score * scale - maximum);
        sum += score;
      }
    rows.total[h] = rows.total[h] * rows.decay[h] + sum;
  }
}

template <class T>
DEVICE void pack_scores(uint32_t (&p)[kKeys / 16][4], const float (&scores)[72]) {
#pragma unroll
  for (int i = 0; i < 32; i++) p[i / 4][i % 4] = T::pack(scores[2 * i], scores[2 * i + 1]);
}

// Values of keys beyond the end of the request become zero; both warpgroups do this for themselves.
DEVICE void zero_values(uint8_t* v, int keys, int group) {
  const uint32_t zero[4] = {};
  for (int i = keys * 8 + (thread_index() & 127); i < kKeys * 8; i += 128) store_words(v + i * 16, zero), store_words(v + kHalfBytes + i * 16, zero);
  publish_to_wgmma();
  sync_warpgroup(1 + group);
}

// Four lanes' words of four eights of columns -> of each lane one eight.
DEVICE void turn_words(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool odd = lane_index() & bit;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int low = bit == 1 ? 2 * i : i, high = low + bit;
      const uint32_t got = shuffle_xor(odd ? w[low] : w[high], bit);
      if (odd) w[low] = got;
      else w[high] = got;
    }
  }
}

template <class T>
DEVICE void store_rows(const PrefillAttention& a, const Note& note, const float (&out)[72], const float (&factor)[2], int row0) {
  const int group = a.heads / a.kv_heads;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + h * 8, token = row / group;
    uint16_t* const target = (uint16_t*)a.out + ((int64_t)(note.token + token) * a.heads + note.kv_head * group + row % group) * kHead + lane_index() % 4 * 8;
#pragma unroll
    for (int g = 0; g < 4; g++) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = T::pack(out[16 * g + 4 * i + 2 * h] * factor[h], out[16 * g + 4 * i + 2 * h + 1] * factor[h]);
      turn_words(w);
      if (token < note.queries) store_words(target + g * 32, w);
    }
  }
}

template <class T>
DEVICE void attend(const PrefillAttention& a, const Shared& s) {
  const int group = uniform(warp_index() / 4) - 1, row0 = group * 64 + (warp_index() & 3) * 16 + lane_index() / 4, per_token = a.heads / a.kv_heads;
  const uint8_t* const q = s.q + group * 64 * 128;
  uint32_t step = 0;
  for (uint32_t turn = 0;; turn++) {
    barrier_wait(s.q_full, turn & 1);
    const Note note = *s.note;
    if (note.kv_head < 0) break;
    const int blocks = (note.keys + kKeys - 1) / kKeys;
    Rows rows;
#pragma unroll
    for (int h = 0; h < 2; h++) rows.maximum[h] = -INFINITY, rows.total[h] = 0.f, rows.position[h] = note.position + (row0 + h * 8) / per_token;
    float scores[72], out[72];
    uint32_t p[kKeys / 16][4];
    if (blocks > 0) {
      barrier_wait(s.k_full + step % kStages, step / kStages & 1);
      multiply_keys<T>(scores, q, s.k + step % kStages * kTileBytes);
      wgmma_wait<0>();
      release(s.k_empty + step % kStages);
      exponentials(scores, rows, a.scale, 0, kKeys > note.position + 1);
      pack_scores<T>(p, scores);
    }
    for (int block = 1; block < blocks; block++, step++) {
      const uint32_t stage = step % kStages, next = (step + 1) % kStages;
      barrier_wait(s.k_full + next, (step + 1) / kStages & 1);
      multiply_keys<T>(scores, q, s.k + next * kTileBytes);
      barrier_wait(s.v_full + stage, step / kStages & 1);
      multiply_values<T>(out, p, s.v + stage * kTileBytes, block > 1);
      wgmma_wait<1>();
      exponentials(scores, rows, a.scale, block * kKeys, (block + 1) * kKeys > note.position + 1);
      // Always true, which the compiler does not know: it would otherwise put the exponentials behind the wait for the product that they run beside.
      release(s.k_empty + next, !(rows.total[0] + rows.total[1] < 0.f));
      wgmma_wait<0>();
      release(s.v_empty + stage);
#pragma unroll
      for (int i = 0; i < 64; i++) out[i] *= rows.decay[i >> 1 & 1];
      pack_scores<T>(p, scores);
    }
    sync_warp();
    release(s.q_empty);
    if (blocks > 0) {
      uint8_t* const v = s.v + step % kStages * kTileBytes;
      barrier_wait(s.v_full + step % kStages, step / kStages & 1);
      if (note.seq_len < blocks * kKeys) zero_values(v, note.seq_len - (blocks - 1) * kKeys, group);
      multiply_values<T>(out, p, v, blocks > 1);
      wgmma_wait<0>();
      release(s.v_empty + step % kStages);
      step++;
    } else {  // padding
#pragma unroll
      for (int i = 0; i < 64; i++) out[i] = 0.f;
    }
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float total = rows.total[h];
      total += as_float(shuffle_xor(as_bits(total), 1));
      total += as_float(shuffle_xor(as_bits(total), 2));
      factor[h] = blocks > 0 ? 1.f / total : 0.f;
    }
    store_rows<T>(a, note, out, factor, row0);
  }
}

template <class T>
KERNEL void __launch_bounds__(kThreads, 1)
    attention(const PrefillAttention a, const GRID_CONSTANT TensorMap q_map, const GRID_CONSTANT TensorMap k_map, const GRID_CONSTANT TensorMap v_map) {
#if SM90  // elsewhere an empty kernel, which is never launched: ops/paged_attention.py asks first
  SMEM_DECL;
  const Shared s(smem_);
  if (thread_index() == 0) {
    barrier_init(s.q_full, 1), barrier_init(s.q_empty, 8);
    for (int i = 0; i < kStages; i++) barrier_init(s.k_full + i, 1), barrier_init(s.v_full + i, 1), barrier_init(s.k_empty + i, 8), barrier_init(s.v_empty + i, 8);
    publish_barriers();
  }
  sync_block();
  wait_for_previous_kernel();
  if (warp_index() < 4) {
    give_registers<40>();
    if (warp_index() == 0) fetch(a, q_map, k_map, v_map, s);
  } else {
    take_registers<232>();
    attend<T>(a, s);
  }
#endif
}

template <class T>
int enqueue(const PrefillAttention& a, const TensorMap (&maps)[3], void* stream) {
  const Launch how = {(unsigned)a.blocks, kThreads, kSharedBytes, stream, a.overlap && can_overlap()};
  return launch(how, attention<T>, a, maps[0], maps[1], maps[2]);
}

}  // namespace

extern "C" int prefill_attention(const PrefillAttention* arguments, void* stream) {
  const PrefillAttention& a = *arguments;
  if (a.m == 0) return 0;
  const uint32_t group = (uint32_t)(a.heads / a.kv_heads);
  TensorMap maps[3];
  for (int i = 0; i < 3; i++) {
    const uint64_t heads = (uint64_t)(i == 0 ? a.heads : a.kv_heads), size[3] = {kHead, heads, (uint64_t)(i == 0 ? a.m : a.cache_rows)}, stride[2] = {kHead, heads * kHead};
    const uint32_t box[3] = {64, i == 0 ? group : 1u, i == 0 ? kRows / group : (uint32_t)smaller(a.page_size, kKeys)};
    const int error = describe_boxes(&maps[i], i == 0 ? a.q : i == 1 ? a.k_cache : a.v_cache, a.is_bf16, size, stride, box);
    if (error != 0) return error;
  }
  return a.is_bf16 ? enqueue<BFloat16>(a, maps, stream) : enqueue<Float16>(a, maps, stream);
}
