// A linear of up to 64 tokens on sm_90: a stream of weights, which stand still in shared memory before the tokens are known.
//
//   * A cluster owns `rows` rows of w, each of its blocks a share of their columns, small enough to lie in shared memory whole. So all
//     copies of weights are under way before the kernel before this one is complete: they depend on nothing.
//   * The tokens, brought in chunks of 64 columns, are wgmma's 64 rows, weights its columns: any multiple of eight rows of w fits, so that
//     one wave of blocks fills the GPU; rows of absent tokens compute garbage that nobody reads.
//   * Adapters: s = A x first. Eight rows of A of one adapter (16 of large ranks) and 1,024 columns of them are one block's work, for eight tokens, and in its
//     registers before the tokens are known. The sums go to memory, where all blocks wait for those that they need: one wave holds all blocks.
//     A sum that is there differs from kEmpty. Launches take turns at two halves of s, and each makes the other's half empty: nobody reads that now.
//     Until then who has what to do is on the way of everything: tables are asked for by all warps at once, first of all.
//   * Then B s is more k of the same product: 16 columns of B of one adapter against 16 of s, zero for the tokens of others. B comes while the
//     weights stream, what has no room beside them where they have been read; the blocks of a cluster share these columns too.
//   * Of few tokens the kernel before makes s, in shares (given). Then no block waits for another, and B s is added where sums are added up.
//   * Blocks leave their sums in shared memory, and each adds up and writes a share of the output, in the order of the blocks.
#include "skinny_linear_given.cuh"

namespace {

// ---- weights and tokens ----------------------------------------------------------------------------------------------------------------

DEVICE void fetch_weights(const SkinnyLinear& a, const TensorMap& w_map, const Shared& shared, const Part& part, int from, int to) {  // groups of chunks
  const int bytes = a.group * a.rows * 128, ahead = kFlight / bytes > 0 ? kFlight / bytes : 1;
  for (int i = from; i < to && i * a.group < part.chunks; i++) {  // the last copy may bring chunks of the next block too: there is room, nobody reads them
    if (i >= ahead) barrier_wait(&shared.w_full[i - ahead], 0);
    barrier_expect(&shared.w_full[i], bytes);
    copy_box(shared.w + i * bytes, &w_map, &shared.w_full[i], 0, part.n0, part.first + i * a.group, kKeep);
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

// What a warp knows of its part before the kernel before is complete: a slot each lane, and the slots of the tokens.
struct Known {
  int rank, slot[2], before[2], from, to;
  int64_t a_place, b_place;
  float scaling;
};

DEVICE void know(const SkinnyLinear& a, int p, int slot, Known& k) {
  const bool real = p < a.parts && slot < a.num_slots;
  const int entry = p * a.part_stride + slot;
  k.rank = real ? a.rank[entry] : 0, k.a_place = real ? a.a_offset[entry] : 0, k.b_place = real ? a.b_offset[entry] : 0, k.scaling = real ? a.scaling[entry] : 0.f;
}

DEVICE void know_tokens(const SkinnyLinear& a, const Part& part, int p, Known& k) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int i = 32 * h + lane_index();
    k.slot[h] = i < a.m ? a.ordered[i] : -1, k.before[h] = i < a.m && i > 0 ? a.ordered[i - 1] : -1;
  }
  k.from = p < a.parts ? a.starts[p] - part.n0 : 0, k.to = p < a.parts ? a.starts[p + 1] - part.n0 : 0;
}

// Where each slot's tokens are, in the order of slots: the first one above, how many below. One warp.
DEVICE void find_runs(const SkinnyLinear& a, const Known& k, int32_t* runs) {
  const int lane = lane_index();
  uint32_t begins[2];  // tokens whose slot differs from that of the one before
#pragma unroll
  for (int h = 0; h < 2; h++) begins[h] = warp_ballot(32 * h + lane < a.m && (32 * h + lane == 0 || k.slot[h] != k.before[h]));
#pragma unroll 1
  for (int i = lane; i < a.num_slots; i += 32) runs[i] = 0;
  sync_warp();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int i = 32 * h + lane;
    const uint32_t later = lane < 31 ? begins[h] >> (lane + 1) : 0u;
    const int end = later ? i + 1 + lowest_bit(later) : h == 0 && begins[1] ? 32 + lowest_bit(begins[1]) : a.m;
    if (k.slot[h] >= 0 && (begins[h] >> lane & 1)) runs[k.slot[h]] = i << 16 | (end - i);
  }
  sync_warp();
}

// How many pieces of a lane's slot there are: eights above, sixteens that touch the block's rows below.
template <int HIGH>
DEVICE int count_pieces(const SkinnyLinear& a, const Known& k, int run, int cuts) {
  const int tokens = run & 0xffff;
  if (tokens == 0) return 0;
  return ceil_div(k.rank, HIGH) * cuts * ceil_div(tokens, 8) << kSixteenBits | (k.from < a.rows && k.to > 0 ? ceil_div(k.rank, 16) : 0);
}

// The first sixteen of a part that is this block's: the parts that a block has rows of begin with different blocks, so that a token's are shared evenly.
DEVICE int first_of(const SkinnyLinear& a, const Part& part, int p) { return (part.rank - p) & (a.splits - 1); }

// Lists those of a lane's slot that are this block's: of eights and, of this part, sixteens so many come before. `place`: of the part's first sixteen.
// Where the slot's tokens were is then where its sixteens are: the first one above, how many below.
template <int HIGH>
DEVICE void list_slot(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part, const Known& k, int p, int slot, int run, int before, int place) {
  const int cuts = l.cuts.by, eights = ceil_div(k.rank, HIGH), first = run >> 16, tokens = run & 0xffff;
  if (tokens == 0) return;
  int own = 0;
  const int eight = before >> kSixteenBits, end = eight + eights * cuts * ceil_div(tokens, 8);
#pragma unroll 1
  for (int mine = (int)blockIdx.x, turn = 0; mine < end; mine += l.blocks, turn++) {
    if (mine < eight) continue;
    int rows = (mine - eight) / l.cuts, above = 0;
    const int cut = mine - eight - rows * cuts;
#pragma unroll 1
    for (; rows >= eights; rows -= eights) above += 8;
    shared.eights[turn] = {k.a_place + (int64_t)rows * HIGH * a.k, p, k.rank, rows * HIGH, cut, first + above, tokens - above};
  }
  const int sixteens = k.from < a.rows && k.to > 0 ? ceil_div(k.rank, 16) : 0, above = (before & ((1 << kSixteenBits) - 1)) - first_of(a, part, p);
#pragma unroll 1
  for (int i = -above & (a.splits - 1); i < sixteens; i += a.splits, own++)
    shared.sixteens[place + ((above + i) >> l.shift)] = {k.b_place + i * 16, p, k.rank, i * 16, k.from, k.to, k.scaling};
  shared.runs[p * a.num_slots + slot] = (place + ((above + a.splits - 1) >> l.shift)) << 16 | own;
}

// What this block does of the step's adapters, part by part in the order of slots: every splits-th of the sixteens that touch its rows, and its own of
// all eights. A warp for each part, a lane for each slot, so that no load waits for another. `k`: of the first 32 slots.
template <int HIGH>
DEVICE void list_pieces(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part, int p, Known& k) {
  const int lane = lane_index();
  int32_t* const runs = shared.runs + p * a.num_slots;
  int run = 0, total = 0;
  if (p < a.parts) {
    find_runs(a, k, runs);
    run = lane < a.num_slots ? runs[lane] : 0;
    total = (int)warp_sum((uint32_t)count_pieces<HIGH>(a, k, run, l.cuts.by));
#pragma unroll 1
    for (int slot = lane + 32; slot - lane < a.num_slots; slot += 32) {
      Known other = k;
      know(a, p, slot, other);
      total += (int)warp_sum((uint32_t)count_pieces<HIGH>(a, other, slot < a.num_slots ? runs[slot] : 0, l.cuts.by));
    }
  }
  if (lane == 0) shared.count[2 + p] = total;
  sync_warpgroup(1);
  int before = 0, place = 0, sixteens = 0, all = 0;
#pragma unroll
  for (int i = 0; i < kMostParts; i++) {
    const int of_part = shared.count[2 + i], own = ((of_part & ((1 << kSixteenBits) - 1)) - first_of(a, part, i) + a.splits - 1) >> l.shift;
    if (i < p) before += of_part >> kSixteenBits << kSixteenBits, place += own;
    sixteens += own, all += of_part >> kSixteenBits;
  }
  if (p < a.parts) {
#pragma unroll 1
    for (int slot = lane;;) {
      const int mine = count_pieces<HIGH>(a, k, run, l.cuts.by);
      int sum = mine;
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        const int others = (int)shuffle_up((uint32_t)sum, delta);
        if (lane >= delta) sum += others;
      }
      list_slot<HIGH>(a, l, shared, part, k, p, slot, run, before + sum - mine, place);
      slot += 32;
      if (slot - lane >= a.num_slots) break;
      before += (int)shuffle((uint32_t)sum, 31);
      know(a, p, slot, k), run = slot < a.num_slots ? runs[slot] : 0;
    }
  }
  if (p == 0 && lane == 0) {
    int eights = 0;
    for (int mine = (int)blockIdx.x; mine < all; mine += l.blocks) eights++;
    shared.count[0] = sixteens, shared.count[1] = eights;
  }
}

// Rows of a cut of A: a lane has row lane / 4 of each eight, and of every fourth 32 columns the eight from 8 (lane % 4) on.
template <int HIGH>
DEVICE void hold_eight(const SkinnyLinear& a, const Eight& u, int warp, uint32_t (&held)[HIGH / 8][kHeld][4]) {
  const int column = u.cut * kCut + warp * 32 + lane_index() % 4 * 8;
#pragma unroll
  for (int h = 0; h < HIGH / 8; h++) {
    const int row = h * 8 + lane_index() / 4;
    const int columns = u.r0 + row < u.rank ? a.k - column : 0;
    const uint16_t* const source = (const uint16_t*)a.pool + u.place + (int64_t)row * a.k + column;
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) held[h][i][e] = 0;
      if (i * 128 < columns) load_words(held[h][i], source + i * 128);
    }
  }
}

// What does not fit before the wait is on its way to L2 meanwhile: further eights of this block, and its sixteens from number `early` on.
template <int HIGH>
DEVICE void prefetch_rest(const SkinnyLinear& a, const Shared& shared, int early, int tid) {
  for (int index = tid + HIGH * 16; index < shared.count[1] * HIGH * 16; index += kPreparing) {  // 16 lines of 64 values in a row of a cut
    const Eight& u = shared.eights[index / (HIGH * 16)];
    const int row = index >> 4 & (HIGH - 1), column = u.cut * kCut + (index & 15) * 64;
    if (u.r0 + row < u.rank && column < a.k) prefetch((const uint16_t*)a.pool + u.place + (int64_t)row * a.k + column);
  }
  for (int i = early; i < shared.count[0]; i++) {
    const Sixteen& u = shared.sixteens[i];
    for (int row = tid; row < a.rows; row += kPreparing)
      if (row >= u.from && row < u.to) prefetch((const uint16_t*)a.pool + u.place + (int64_t)(row - u.from) * u.rank);
  }
}

// This lane's of the tokens; -1: there are fewer.
DEVICE int token_of(const SkinnyLinear& a, const Eight& u) { return lane_index() / 4 < u.tokens ? a.order[u.first + lane_index() / 4] : -1; }

DEVICE int half_of(uint32_t launches) { return (int)(launches / kLaunch & 1); }

// Their products with the tokens, each warp over its columns. The order of the columns is the lanes' own, the same on both sides.
template <class T, int HIGH>
DEVICE void multiply_eight(const SkinnyLinear& a, const Eight& u, int warp, const uint32_t (&held)[HIGH / 8][kHeld][4], int token, float (&sum)[HIGH / 4]) {
  constexpr int kChains = HIGH == 8 ? 2 : 1;  // of products, each of which waits for the one before it
  const int column = u.cut * kCut + warp * 32 + lane_index() % 4 * 8;
  const int columns = token >= 0 ? a.k - column : 0;
  const uint16_t* const x = (const uint16_t*)a.x + token * a.k + column;
  uint32_t row[kHeld][4];
#pragma unroll
  for (int j = 0; j < kHeld; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) row[j][e] = 0;
    if (j * 128 < columns) load_words_l2(row[j], x + j * 128);
  }
  float d[HIGH / 8][kChains][4] = {};
#pragma unroll
  for (int j = 0; j < kHeld; j++)
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int h = 0; h < HIGH / 8; h++) {
        const uint32_t left[4] = {row[j][2 * k], 0, row[j][2 * k + 1], 0}, right[2] = {held[h][j][2 * k], held[h][j][2 * k + 1]};
        T::mma(d[h][k % kChains], left, right);
      }
#pragma unroll
  for (int h = 0; h < HIGH / 8; h++)
#pragma unroll
    for (int e = 0; e < 2; e++) sum[2 * h + e] = kChains == 2 ? d[h][0][e] + d[h][kChains - 1][e] : d[h][0][e];
}

// The first warp adds up what all have. `sums`: not those of the products before, which may still be read. `launches`: before this one, of which the first warp knows.
template <int HIGH>
DEVICE void hand_over(const SkinnyLinear& a, float* sums, const Eight& u, int warp, int token, uint32_t launches, float (&sum)[HIGH / 4]) {
  constexpr int kEach = HIGH / 4;
#pragma unroll
  for (int h = 0; h < kEach; h += 2)
    if (warp > 0) store_two_floats(sums + ((warp - 1) * 32 + lane_index()) * kEach + h, sum[h], sum[h + 1]);
  sync_warpgroup(1);
  if (warp > 0 || token < 0) return;
  use_here(launches);
#pragma unroll
  for (int other = 0; other < 3; other++)
#pragma unroll
    for (int e = 0; e < kEach; e++) sum[e] += sums[(other * 32 + lane_index()) * kEach + e];
  const int r = u.r0 + 2 * (lane_index() % 4);
  float* const target = a.s + half_of(launches) * a.half + ((u.cut * a.m + token) * a.parts + u.part) * a.width + r;
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const int at = e / 2 * 8 + e % 2;
    if (r + at < u.rank) store_relaxed(target + at, sum[e]);
  }
}

// Four ranks of a token's s, and where they are multiplied.
struct Wanted {
  const float* s;
  int ranks, shares;  // of them that exist; that are still to come
  float scaling;
  uint8_t* target;    // null: nothing is wanted
};

struct Walk {  // over the sixteens of a thread's two tokens, part by part from `first_part` to `end_part`
  int first_part, end_part, part, token, next, end;
};

// The next one, of the `here` from `first` on, that has ranks of this thread's.
DEVICE Wanted want(const SkinnyLinear& a, const Layout& l, const Shared& shared, const float* s, int first, int here, Walk& w, const int (&slots)[2], int tid) {
  const int q = tid & 3;
#pragma unroll 1
  while (w.token < 2) {
    const int slot = w.token == 0 ? slots[0] : slots[1], row = tid / 4 + 32 * w.token;
    if (w.next < w.end) {
      const int place = w.next++ - first;
      const Sixteen& u = shared.sixteens[first + place];
      const int r = u.r0 + 4 * q;
      if (place < 0 || place >= here || r >= u.rank) continue;
      uint8_t* const target = piece_of(low_of(l, shared, place / kSixteens), row, place % kSixteens * 2 + (q >> 1)) + (q & 1) * 8;
      return {s + ((int64_t)row * a.parts + u.part) * a.width + r, u.rank - r, cuts_of(a), u.scaling, target};
    }
    if (slot < 0 || w.part >= w.end_part) {
      w.token++, w.part = w.first_part;
      continue;
    }
    const int own = shared.runs[w.part++ * a.num_slots + slot];
    w.next = own >> 16, w.end = w.next + (own & 0xffff);
  }
  return {};
}

template <int PLACES>
constexpr int kShares = PLACES == 1 ? 4 : 8 / PLACES;  // of each place that are asked for at once

// Adds what is there of the next shares of several places, and says whether any are still to come.
template <int PLACES>
DEVICE bool add_shares(const SkinnyLinear& a, float (&sum)[PLACES][4], Wanted (&w)[PLACES], int64_t apart) {
  float value[PLACES][kShares<PLACES>][4] = {};
#pragma unroll
  for (int i = 0; i < PLACES; i++)
#pragma unroll
    for (int c = 0; c < kShares<PLACES>; c++) {
      if (c >= w[i].shares) break;
      if (a.width % 4 == 0) {
        load_floats_relaxed(value[i][c], w[i].s + c * apart);
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (e < w[i].ranks) value[i][c][e] = load_relaxed(w[i].s + c * apart + e);
      }
    }
  const float* missing = nullptr;
  bool more = false;
#pragma unroll
  for (int i = 0; i < PLACES; i++) {
    if (w[i].shares <= 0) continue;
    const float* first = nullptr;
#pragma unroll
    for (int c = 0; c < kShares<PLACES>; c++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (c < w[i].shares && e < w[i].ranks && as_bits(value[i][c][e]) == kEmpty) first = w[i].s + c * apart + e;
    if (first) {
      missing = first;
      continue;
    }
#pragma unroll
    for (int c = 0; c < kShares<PLACES>; c++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (c < w[i].shares && e < w[i].ranks) sum[i][e] += value[i][c][e];
    w[i].s += kShares<PLACES> * apart, w[i].shares -= kShares<PLACES>;
    more |= w[i].shares > 0;
  }
  if (missing) look_again(missing);
  return missing || more;
}

// s of this thread's tokens and ranks, once it is there, to where it is multiplied: four threads a token, each with four columns of a sixteen. What a thread
// waits for is asked for at once, as each answer takes its way from L2.
template <class T, int PLACES>
DEVICE void place_s(const SkinnyLinear& a, const Layout& l, const Shared& shared, const float* s, int first, int here, const int (&slots)[2], int tid) {
  const int64_t apart = (int64_t)a.m * a.parts * a.width;
  const int first_part = here > 0 ? shared.sixteens[first].part : 0, end_part = here > 0 ? shared.sixteens[first + here - 1].part + 1 : 0;
  for (Walk walk = {first_part, end_part, first_part, 0, 0, 0};;) {
    Wanted w[PLACES];
    float sum[PLACES][4] = {};
#pragma unroll
    for (int i = 0; i < PLACES; i++) w[i] = want(a, l, shared, s, first, here, walk, slots, tid);
    if (!w[0].target) return;
    while (add_shares<PLACES>(a, sum, w, apart)) {
    }
#pragma unroll
    for (int i = 0; i < PLACES; i++)
      if (w[i].target) store_words(w[i].target, T::pack(sum[i][0] * w[i].scaling, sum[i][1] * w[i].scaling), T::pack(sum[i][2] * w[i].scaling, sum[i][3] * w[i].scaling));
  }
}

// Columns of B to shared memory, those of the list from `from` on, a multiple of kSixteens, to `to`.
DEVICE void fetch_b(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Sixteen* list, int from, int to, int tid) {
  const int piece = tid & 7;
  for (int i = from + (piece >> 1); i < to; i += kSixteens) {
    uint8_t* const low_b = low_of(l, shared, i / kSixteens) + l.x_bytes;
    const Sixteen& u = list[i];
    const int first = u.from, end = u.to, rank = u.rank, r = (piece & 1) * 8, columns = rank - u.r0 - r;
    const uint16_t* const b = (const uint16_t*)a.pool + u.place + r;
    for (int row = tid >> 3; row < a.rows; row += kPreparing / 8) {
      const bool inside = row >= first && row < end;
      load_piece(piece_of(low_b, row, piece), b + (inside ? row - first : 0) * rank, inside ? columns : 0, rank % 8 == 0);
    }
  }
}

// Zeros where s of the same will be, but for the tokens that have it.
DEVICE void clear_s(const SkinnyLinear& a, const Layout& l, const Shared& shared, int from, int to, int tid) {
  for (int low = from / kSixteens; low * kSixteens < to; low++)
    for (int index = tid; index < a.m * 8; index += kPreparing) {
      uint8_t* const target = piece_of(low_of(l, shared, low), index >> 3, index & 7);
      store_words(target, 0, 0), store_words(target + 8, 0, 0);
    }
}

// A block's share of the half of s that the launch before this one used, which is complete.
DEVICE void empty_half(const SkinnyLinear& a, const Layout& l, int half, int tid) {
  const uint32_t empty[4] = {kEmpty, kEmpty, kEmpty, kEmpty};
#pragma unroll 1
  for (int i = ((int)blockIdx.x * kPreparing + tid) * 4; i < a.half; i += l.blocks * kPreparing * 4) store_words(a.s + half * a.half + i, empty);
}

template <class T, int PLACES>
DEVICE void prepare(const SkinnyLinear& a, const Layout& l, const Shared& shared, const Part& part, Known& known) {
  constexpr int HIGH = rows_of(PLACES);
  const int tid = thread_index() - kMultiplying, warp = uniform(tid / 32);
  list_pieces<HIGH>(a, l, shared, part, warp, known);
  sync_warpgroup(1);
  const int count = shared.count[0], eights = uniform(shared.count[1]), most = (l.lows + l.later) * kSixteens;
  const int early = count < l.lows * kSixteens ? count : l.lows * kSixteens;
  uint32_t held[HIGH / 8][kHeld][4], launches = 0;
  int token = -1, slots[2];  // of the first eight; of this thread's two tokens in s
  if (eights > 0) hold_eight<HIGH>(a, shared.eights[0], warp, held), token = token_of(a, shared.eights[0]);
#pragma unroll
  for (int i = 0; i < 2; i++) slots[i] = tid / 4 + 32 * i < a.m ? a.slots[tid / 4 + 32 * i] : -1;
  const bool few = count <= kSixteens;  // more take so many instructions that others would wait for this block's share of s meanwhile
  prefetch_rest<HIGH>(a, shared, few ? early : 0, tid);
  if (few) fetch_b(a, l, shared, shared.sixteens, 0, early, tid);
  clear_s(a, l, shared, 0, early, tid);
  wait_for_previous_kernel();
  if (warp == 0) launches = load_count(a.launches);
  for (int e = 0; e < eights; e++) {
    float sum[HIGH / 4];
    multiply_eight<T, HIGH>(a, shared.eights[e], warp, held, token, sum);
    hand_over<HIGH>(a, shared.eight_sums + (e & 1) * kEightSums * (HIGH / 8), shared.eights[e], warp, token, launches, sum);
    if (e + 1 < eights) hold_eight<HIGH>(a, shared.eights[e + 1], warp, held), token = token_of(a, shared.eights[e + 1]);
  }
  if (tid == 0) {
    *shared.half = half_of(launches);
    add_to_count(a.launches, blockIdx.x == 0 ? kLaunch - (uint32_t)(l.blocks - 1) : 1u);  // bit 16 changes once all blocks have read it
  }
  if (!few) fetch_b(a, l, shared, shared.sixteens, 0, early, tid);
  sync_warpgroup(1);
  const int half = *shared.half;
  empty_half(a, l, 1 - half, tid);
  for (int first = 0, turn = 0;; turn++) {
    const int here = count - first < most ? count - first : most, there = turn == 0 ? early : 0;
    if (there < count - first) {  // where the weights, or sixteens before these, have been read: no turn of the barrier is left out where another follows
      barrier_wait(shared.low_empty, turn & 1);
      fetch_b(a, l, shared, shared.sixteens + first, there, here, tid);
      clear_s(a, l, shared, there, here, tid);
      sync_warpgroup(1);
    }
    place_s<T, PLACES>(a, l, shared, a.s + half * a.half, first, here, slots, tid);
    publish_to_wgmma();
    barrier_arrive(shared.low_full);
    barrier_arrive_after_copies(shared.low_full);
    first += here;
    if (first >= count) return;
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
  if (!a.s || a.shares) return;
  sync_warp();
  if (lane_index() == 0) barrier_arrive(shared.low_empty);
  const int most = uniform((l.lows + l.later) * kSixteens);
  for (int c = 0; c == 0 || c * most < uniform(*shared.count); c++) {
    barrier_wait(shared.low_full, c & 1);
    see_copies();
    const int left = uniform(*shared.count) - c * most, here = left < most ? left : most;
    wgmma_begin();
    for (int k = group; k < here; k += 2) {
      const uint8_t* const low = low_of(l, shared, k / kSixteens);
      multiply_shared<T, NT>(d, wgmma_matrix(low) + k % kSixteens * 2, wgmma_matrix(low + l.x_bytes) + k % kSixteens * 2, true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    sync_warp();
    if (lane_index() == 0) barrier_arrive(shared.low_empty);
  }
}

template <int MOST>
DEVICE void leave_sums(const SkinnyLinear& a, const Shared& shared, const float (&d)[72]) {
  const int lane = lane_index(), warp = warp_index(), pitch = pitch_of(a.rows);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int token = warp % 4 * 16 + h * 8 + lane / 4;
    if (token >= a.m) continue;
    float* const target = shared.sums + (warp / 4 * a.m + token) * pitch + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < MOST / 8; i++) {
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
        load_floats_beside(value, shared.sums + ((i & 1) * a.m + token) * pitch + row + half * 4, part.rank, i >> 1);
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

// Blocks of few registers start earlier, beside a merge of attention or a norm.
constexpr int registers_of(int most, int places) { return places == 4 ? 128 : most == kTall ? 120 : 96; }

// MOST: rows of w in a block. PLACES: of s that a thread waits for at once; 0: there are no adapters.
template <class T, int MOST, int PLACES>
KERNEL void __maxnreg__(registers_of(MOST, PLACES)) linear(const SkinnyLinear a, const GRID_CONSTANT TensorMap w_map, const GRID_CONSTANT TensorMap x_map, const Layout l) {
#if SM90  // elsewhere an empty kernel, which is never launched: ops/skinny_linear.py refuses
  SMEM_DECL;
  allow_next_kernel();
  const Shared shared = carve(smem_, l);
  Part part;
  part.rank = (int)blockIdx.x & (a.splits - 1);
  part.n0 = ((int)blockIdx.x >> l.shift) * a.rows;
  const int chunks = a.k / kK;
  part.first = (chunks * part.rank) >> l.shift;
  part.chunks = (chunks * (part.rank + 1) >> l.shift) - part.first;
  if (thread_index() == kThreads - 32) {
    for (int i = 0; i * a.group < l.chunks; i++) barrier_init(&shared.w_full[i], 1);
#pragma unroll 1
    for (int i = 0; i < l.stages; i++) barrier_init(&shared.x_full[i], 1), barrier_init(&shared.x_empty[i], kMultiplying / 32);
    barrier_init(shared.low_full, 2 * kPreparing), barrier_init(shared.low_empty, kMultiplying / 32);
    publish_barriers();
    fetch_weights(a, w_map, shared, part, 0, 1);
    prefetch_map(&x_map);
  }
  const int warp = uniform(warp_index());
  Known known = {};
  if (PLACES > 0 && PLACES != kGiven && a.s && warp >= kMultiplying / 32 && warp < (kMultiplying + kPreparing) / 32) {
    know(a, warp - kMultiplying / 32, lane_index(), known);
    know_tokens(a, part, warp - kMultiplying / 32, known);
  }
  sync_block();
  float d[72];
  if (warp < kMultiplying / 32) {
    switch (uniform(a.rows / 8)) {
#define CASE(NT) \
  case NT: \
    if constexpr (NT * 8 <= MOST) multiply<T, NT>(a, l, shared, part, d); \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16) CASE(17) CASE(18)
#undef CASE
    }
  } else if (warp < (kMultiplying + kPreparing) / 32) {
    if constexpr (PLACES == kGiven) {
      prepare_given(a, l, shared, part);
    } else if constexpr (PLACES > 0) {
      if (a.s) prepare<T, PLACES>(a, l, shared, part, known);
    }
  } else if (warp == (kMultiplying + kPreparing) / 32) {
    if (lane_index() == 0) {
      wait_for_previous_kernel();
      fetch_tokens(a, x_map, l, shared, part);
    }
  } else if (lane_index() == 0) {
    fetch_weights(a, w_map, shared, part, 1, kGroups);
  }
  sync_block();  // the weights are read: the sums may stand where they stood
  if (warp < kMultiplying / 32) leave_sums<MOST>(a, shared, d);
  share_with_cluster();
  if constexpr (PLACES == kGiven) add_up_given<T>(a, l, shared, part);
  else add_up<T>(a, l, shared, part);
  share_with_cluster();  // others may still read these sums; this thread's reads are complete, as what it made of them is stored
#endif
}

// A matrix [rows, columns] for the copy engine, as chunks of 64 columns: a box is `box_rows` rows of `group` chunks, one chunk behind the other.
int describe_chunks(TensorMap* map, const void* base, const SkinnyLinear& a, int rows, int box_rows) {
  return describe_boxes(map, base, a.is_bf16, {64, (uint64_t)rows, (uint64_t)a.k / 64}, {(uint64_t)a.k, 64}, {64, (uint32_t)box_rows, (uint32_t)a.group});
}

template <class T, int MOST, int PLACES>
int launch_form(const SkinnyLinear& a, const Layout& l, const TensorMap& w, const TensorMap& x, void* stream) {
  const Launch how = {(unsigned)(ceil_div(a.n, a.rows) * a.splits), kThreads, (size_t)l.total, stream, a.overlap && can_overlap()};
  return launch_clusters_together(how, (unsigned)a.splits, linear<T, MOST, PLACES>, a, w, x, l);
}

template <class T, int MOST>
int launch_most(const SkinnyLinear& a, const Layout& l, const TensorMap& w, const TensorMap& x, void* stream) {
  if (!a.s) return launch_form<T, MOST, 0>(a, l, w, x, stream);
  if (l.places == kGiven) return launch_form<T, MOST, kGiven>(a, l, w, x, stream);
  if (l.places == 1) return launch_form<T, MOST, 1>(a, l, w, x, stream);
  return l.places == 2 ? launch_form<T, MOST, 2>(a, l, w, x, stream) : launch_form<T, MOST, 4>(a, l, w, x, stream);
}

template <class T>
int dispatch(const SkinnyLinear& a, const Layout& l, const TensorMap& w, const TensorMap& x, void* stream) {
  return a.rows <= kShort ? launch_most<T, kShort>(a, l, w, x, stream) : launch_most<T, kTall>(a, l, w, x, stream);
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
