// The fetching warps of csrc/moe_wgmma_gemm.cu, which says how it works, and what they share with the multiplying ones.
#pragma once
#include "moe_wgmma_gemm.h"

#include "hopper_prims.cuh"

#if !SM90
#pragma nv_diag_suppress 177  // nothing is used where the kernel is empty
#endif

namespace {

constexpr int kK = 64, kFetchers = 128, kRecord = 5;
constexpr int kLowUnits = 8;  // sixteens of rows of the next product's A in a stage
constexpr int kTold = -2;
constexpr int kLower = 0xffff, kOne = kLower + 1;  // of a word of a tile: what it says, and one of what is counted above

// What a kernel is compiled for: tokens of a tile, and with fewer of them more stages. Tiles of 72 tokens have 128 rows and one multiplying warpgroup, so that
// two blocks share a multiprocessor: one's weights come while the other ends a tile. ROOM: with fewer stages and
// registers, so that a block begins while one of the shrink before it still runs on its multiprocessor.
template <int TOKENS, int HALVES, int CLUSTER, bool ROOM = false>
struct Form {
  static constexpr int kTokens = TOKENS, kHalves = HALVES, kCluster = CLUSTER;
  static constexpr int kGroups = TOKENS == 72 ? 1 : 2, kRows = 128 * kGroups, kBlocks = 2 / kGroups;  // multiplying warpgroups; blocks on a multiprocessor
  static constexpr int kWarps = 4 * kGroups, kThreads = kFetchers + 32 * kWarps;
  static constexpr bool kMakes = HALVES == 2 && CLUSTER == 1;  // the next product's s, if asked to
  static constexpr int kWeightBytes = kRows * 128, kStages = TOKENS > 32 || ROOM ? 4 : 6, kStageBytes = kWeightBytes + TOKENS * 128;
  static constexpr int kPitch = 256 / HALVES + 16;  // bytes of a token that leaves through shared memory
  static constexpr int kChunk = (TOKENS == 144 ? 40 : TOKENS == 72 ? 8 : 16) * HALVES;  // tokens that leave at once
  static constexpr int kOutBytes = kChunk * kPitch;
  static constexpr int kSharedBytes = kStages * kStageBytes + kGroups * kOutBytes + kGroups * TOKENS * 4 + (kGroups == 2 ? 512 : 384);
  static constexpr int kPasses = (TOKENS * 8 + kFetchers - 1) / kFetchers;  // rows of x that a fetching thread brings a sixteen-byte piece of
  static constexpr int kFetcherRegisters = ROOM ? 112 : kGroups == 2 ? 136 : 120, kMultiplierRegisters = kGroups == 1 || ROOM ? 136 : 184;
  static constexpr int kBound = ROOM ? 512 : kThreads;  // so many threads would each have as many registers as each of these
  static_assert((kSharedBytes + 1024) * kBlocks <= 228 * 1024, "the blocks' shared memory");
};

struct Note {  // from the fetching warps, with a stage
  int32_t expert, start, rows, n0;  // the tile, of a cluster's tile this block's part; expert -1: no more
  int32_t products, last;           // addend only: sixteens of k in this stage, and whether it ends the tile; with the next product's A: its runs
  int32_t open;                     // with the last of A's stages: which tile before has its parts, for this block to add up, or -1
};

struct LowRun {  // with a stage of the next product's A: rows within this block's part, and which sixteens of the stage are theirs
  int32_t low, high, unit, units;
};

struct OpenTile {  // rows of s whose parts are to be added up, and the LoRA tiles that they meet
  int32_t tile, start, rows, first, end;
};

template <class F>
struct Shared {
  uint8_t* stages;
  uint8_t* out;
  int32_t* rows;  // of the output, for each group's tile
  Barrier *full, *empty, *stored;  // stored: the multiplying warps of this block have stored a tile
  Note* notes;
  uint32_t* taken;  // tiles from the queue: of an even and of an odd turn
  int32_t* open;    // likewise: which of the following is to be added up, or -1
  OpenTile* opened;  // the last four tiles

  DEVICE explicit Shared(uint8_t* memory) : stages(memory) {
    out = memory + F::kStages * F::kStageBytes;
    rows = (int32_t*)(out + F::kGroups * F::kOutBytes);
    full = (Barrier*)(rows + F::kGroups * F::kTokens);
    empty = full + F::kStages;
    stored = empty + F::kStages;
    notes = (Note*)(stored + 1);
    taken = (uint32_t*)(notes + F::kStages);
    open = (int32_t*)(taken + 2);
    opened = (OpenTile*)(open + 2);
  }
};

template <class F>
DEVICE uint8_t* stage_of(const Shared<F>& s, uint32_t step) {
  return s.stages + step % F::kStages * F::kStageBytes;
}
template <class F>
DEVICE uint8_t* low_piece_of(uint8_t* rows, int row, int piece) {  // as many columns as a tile has
  return rows + row * F::kRows + ((piece ^ (row & 7)) << 4);
}

// ---- fetching --------------------------------------------------------------------------------------------------------------------------

template <class F>
struct Fetcher {
  const MoeWgmmaGemm& a;
  const Shared<F>& shared;
  uint32_t step = 0, tiles_told = 0, ticket = 0;
  int told_of = -1;  // a tile before this one whose end nobody was told of; kTold: of whose end all were told, and whose parts may be this block's to add up

  // The last of the fetching warps tells kernels behind this one that the tile before is stored, once that needs no pause.
  DEVICE void tell() {
    if (told_of < 0) return;
    if (warp_index() == kFetchers / 32 - 1) {
      barrier_wait(shared.stored, tiles_told & 1);
      uint32_t* const word = (uint32_t*)a.tiles + 3 * told_of + 2;
      if (lane_index() == 0 && a.next.s) ticket = arrive(word, kOne);
      else if (lane_index() == 0) publish_add(word, kOne);
    }
    tiles_told++, told_of = a.next.s ? kTold : -1;
  }
  // Notes the tile told of where its report was the last of all, so that its parts are there, else -1.
  DEVICE void settle() {
    tell();
    if (thread_index() == kFetchers - 32) *open_word() = told_of == kTold && (int)(ticket / kOne) + 1 == a.report ? (int)((tiles_told - 1) & 3) : -1;
    sync_warpgroup(3);
    told_of = -1;
  }
  DEVICE int32_t* open_word() { return shared.open + (tiles_told & 1); }
  DEVICE uint8_t* begin() {  // a stage that nobody reads any more, in neither block
    barrier_wait(&shared.empty[step % F::kStages], (step / F::kStages & 1) ^ 1);
    return stage_of(shared, step);
  }
  DEVICE void note(const Note& n) {  // before the first thread's arrival
    if (thread_index() == 0) shared.notes[step % F::kStages] = n;
  }
  DEVICE void end(bool copies_only = true) {  // copies_only: nothing was stored but by cp16
    if (!copies_only) cp_commit(), cp_wait<0>(), barrier_arrive(&shared.full[step % F::kStages]);
    else barrier_arrive_after_copies(&shared.full[step % F::kStages]);
    step++;
  }
};

// The LoRA tiles that meet a tile, as runs of rows that share one B, and of each the sixteens of its columns. Lane l of every warp
// holds the record of LoRA tile first + l, asked for before the tile's products: a chain of loads would stand behind them otherwise.
struct Addend {
  const MoeWgmmaGemm& a;
  bool following = false;  // of the next product's A, no more of B
  int first = 0, next = 0, end = 0;                     // LoRA tiles
  int mine_start = 0, mine_rows = 0, mine_rank = 0, mine_split = 0;
  uint32_t mine_place = 0;
  int low = 0, high = 0, rank = 0, split = 0, r0 = 0;  // the run: rows within this block's part of the tile; the sixteen
  uint32_t place = 0;
  bool any = true;
  uint32_t starts = 0, live = 0;

  DEVICE void ask(int from, int to) {
    first = next = from, end = to;
    const int64_t* record = (following ? a.next.records : a.records) + (int64_t)kRecord * (first + lane_index());
    if (first + lane_index() >= end) return;
    mine_start = (int)record[0], mine_rows = (int)record[1], mine_rank = (int)record[2], mine_split = (int)record[3], mine_place = (uint32_t)record[4];
  }
  // The same LoRA tiles with the next product's A, of which lanes have rank and place already.
  DEVICE void follow(int from, int to, int next_rank, int next_a) {
    following = true;
    if (to - from > 32) return ask(from, to);
    next = from, mine_rank = next_rank, mine_split = next_a, mine_place = (uint32_t)next_a;
  }
  DEVICE int field(int value) const { return (int)shuffle((uint32_t)value, next - first); }
  DEVICE uint32_t next_place() {
    if (next - first == 32) ask(next, end);
    return shuffle(mine_place, next - first);
  }
  DEVICE void load(const Note& part) {
    for (any = false; !any && next < end; next++) {
      place = next_place();
      low = field(mine_start) - part.start, rank = field(mine_rank), split = field(mine_split), high = low + field(mine_rows);
      any = rank > 0 && high > 0 && low < part.rows;
    }
    for (; next < end && next_place() == place; next++) high = field(mine_start) + field(mine_rows) - part.start;
    r0 = 0;
  }
  DEVICE void advance(const Note& part, int sixteens) {
    if ((r0 += 16 * sixteens) >= rank) load(part);
  }
  // Stages of `each` sixteens that the tile's rows before `middle` need, or those behind it, whichever are more.
  DEVICE int stages(int middle, int each) {
    int before = 0, behind = 0;
    for (const int from = first;; ask(first + 32, end)) {
      const bool live = first + lane_index() < end && mine_rank > 0;
      const int stop = live ? mine_start + mine_rows : 0, last_stop = (int)shuffle_up((uint32_t)stop, 1);
      const uint32_t last_place = shuffle_up(mine_place, 1);
      const bool same = lane_index() > 0 && last_stop > 0 && last_place == mine_place;  // one run with the LoRA tile before
      const uint32_t units = live ? (uint32_t)ceil_div(mine_rank, 16) : 0;
      before += (int)warp_sum(mine_start < middle && !same ? units : 0);
      behind += (int)warp_sum(stop > middle && !(same && last_stop > middle) ? units : 0);
      if (end - first > 32) continue;
      if (first != from) ask(from, end);
      return ceil_div(before > behind ? before : behind, each);
    }
  }
  // Where no run has more than sixteen ranks, of whole pieces, a ballot finds them, and each warp takes its own: bits of the lanes that hold the first of one.
  DEVICE bool plain(const Note& part) {
    const int low_row = mine_start - part.start;
    const bool is_live = first + lane_index() < end && mine_rank > 0 && low_row < part.rows && low_row + mine_rows > 0;
    live = warp_ballot(is_live);
    const uint32_t before = shuffle_up(mine_place, 1);
    starts = warp_ballot(is_live && !(lane_index() > 0 && (live >> (lane_index() - 1) & 1) && before == mine_place));
    return end - first <= 32 && warp_ballot(is_live && (mine_rank > 16 || mine_rank % 8 != 0)) == 0 && (a.s_width | a.max_rank) % 8 == 0;
  }
  DEVICE void take(int n, const Note& part) {  // the n-th run
    uint32_t rest = starts;
    for (int i = 0; i < n; i++) rest &= rest - 1u;
    any = rest != 0;
    const uint32_t later = rest & (rest - 1u);
    const int lane = any ? lowest_bit(rest) : 0, last = any ? highest_bit(later ? live & ((later & (0u - later)) - 1u) : live) : 0;
    low = (int)shuffle((uint32_t)mine_start, lane) - part.start, high = (int)shuffle((uint32_t)(mine_start + mine_rows), last) - part.start;
    rank = (int)shuffle((uint32_t)mine_rank, lane), split = (int)shuffle((uint32_t)mine_split, lane), place = shuffle(mine_place, lane);
  }
  DEVICE bool b_aligned() const { return rank % 8 == 0; }
  DEVICE bool s_aligned() const { return (rank | a.s_width | a.max_rank) % 8 == 0; }
};

// COUNT sixteens of the run's columns of B, from the unit-th of this stage on, and of s: those of gate and of up beside each other, or one.
// One warp a scheduler does this, so that instructions count: addresses advance, and ranks that are no multiple of eight have their own loop.
template <class F, int COUNT, bool ALIGNED = true>
DEVICE void fetch_columns(const MoeWgmmaGemm& a, const Addend& u, uint8_t* stage, int unit, const Note& note) {
  constexpr int HALVES = F::kHalves, kOfB = 2 * COUNT, kOfS = 2 * COUNT * HALVES, kRowsB = kFetchers / kOfB, kRowsS = kFetchers / kOfS;  // pieces of a row, rows at once
  const int tid = thread_index_here(), row0 = tid / kOfB, r = u.r0 + tid % kOfB * 8, inside = r < u.rank ? a.n - note.n0 - row0 : 0;
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    const uint16_t* source = (const uint16_t*)a.pool + (int64_t)u.place * 8 + ((int64_t)half * a.n + note.n0 + row0) * u.rank + r;
    uint8_t* target = piece_of(stage + half * (F::kRows / 2) * 128, row0, 2 * unit + tid % kOfB);
#pragma unroll(ALIGNED ? 8 : 1)
    for (int row = 0; row < F::kRows / HALVES; row += kRowsB, source += kRowsB * u.rank, target += kRowsB * 128) {
      if constexpr (ALIGNED) cp16(target, source, row < inside);
      else load_piece(target, source, row < inside ? u.rank - r : 0, u.b_aligned());
    }
  }
  const int piece = tid % kOfS, half = piece / 2 % HALVES, s_r = u.r0 + piece / (2 * HALVES) * 16 + (piece & 1) * 8;
  const int low = s_r < u.rank ? u.low : INT32_MAX, high = u.high;
  const uint16_t* source = (const uint16_t*)a.s + ((int64_t)note.start + tid / kOfS) * a.s_width + half * u.split * a.max_rank + s_r;
  uint8_t* target = piece_of(stage + F::kWeightBytes, tid / kOfS, 2 * HALVES * unit + piece);
#pragma unroll 1
  for (int row = tid / kOfS; row < note.rows; row += kRowsS, source += kRowsS * a.s_width, target += kRowsS * 128) {
    const bool mine = row >= low && row < high;
    if constexpr (ALIGNED) cp16(target, source, mine);
    else load_piece(target, source, mine ? u.rank - s_r : 0, false);
  }
}

// The same of a run of at most sixteen ranks by one warp: a half of it, with HALVES 2.
template <class F>
DEVICE void fetch_run(const MoeWgmmaGemm& a, const Addend& u, uint8_t* stage, int unit, int half, const Note& note) {
  constexpr int HALVES = F::kHalves;
  const int piece = lane_index() & 1, row0 = lane_index() >> 1, inside = piece * 8 < u.rank ? a.n - note.n0 - row0 : 0;
  const uint16_t* source = (const uint16_t*)a.pool + (int64_t)u.place * 8 + ((int64_t)half * a.n + note.n0 + row0) * u.rank + piece * 8;
  uint8_t* target = piece_of(stage + half * (F::kRows / 2) * 128, row0, 2 * unit + piece);
#pragma unroll 8
  for (int row = 0; row < F::kRows / HALVES; row += 16, source += 16 * u.rank, target += 16 * 128) cp16(target, source, row < inside);
  const int low = piece * 8 < u.rank ? u.low : INT32_MAX;
  const uint16_t* of_s = (const uint16_t*)a.s + ((int64_t)note.start + row0) * a.s_width + half * u.split * a.max_rank + piece * 8;
  target = piece_of(stage + F::kWeightBytes, row0, 2 * (HALVES * unit + half) + piece);
#pragma unroll 4
  for (int row = row0; row < note.rows; row += 16, of_s += 16 * a.s_width, target += 16 * 128) cp16(target, of_s, row >= low && row < u.high);
}

template <class F>
DEVICE void fetch_addend(Fetcher<F>& f, const MoeWgmmaGemm& a, Addend& u, Note note) {
  constexpr int kEach = kK / 16 / F::kHalves;
  int stages = 0;  // the blocks of a cluster keep step
  if (F::kCluster == 2) stages = u.stages(note.start + (cluster_rank() == 0 ? ceil_div(note.rows, 8) * 8 : 0), kEach);
  if (u.plain(note)) {
    const int runs = count_bits(u.starts);
    for (int from = 0; from == 0 || !note.last; from += kEach) {
      u.take(from + warp_index() / F::kHalves, note);
      uint8_t* const stage = f.begin();
      if (u.any) fetch_run<F>(a, u, stage, warp_index() / F::kHalves, warp_index() % F::kHalves, note);
      note.products = runs - from < kEach ? runs - from : kEach;
      if (note.products < 0) note.products = 0;
      note.last = --stages <= 0 && from + kEach >= runs;
      f.note(note);
      if (thread_index() == 0) barrier_arrive(&f.shared.full[f.step % F::kStages]);  // in place of the engine's
      f.end();
    }
    return;
  }
  u.load(note);
  do {
    uint8_t* const stage = f.begin();
    bool aligned = true;
    for (note.products = 0; note.products < kEach && u.any;) {
      const int left = ceil_div(u.rank - u.r0, 16), room = u.s_aligned() ? kEach - note.products : 1, count = left >= 3 && room >= 4 ? 4 : left >= 2 && room >= 2 ? 2 : 1;
      aligned = aligned && u.s_aligned();
      if (!u.s_aligned()) fetch_columns<F, 1, false>(a, u, stage, note.products, note);
      else if (count == 1) fetch_columns<F, 1>(a, u, stage, note.products, note);
      else if (count == 2 || kEach == 2) fetch_columns<F, 2>(a, u, stage, note.products, note);
      else fetch_columns<F, kEach>(a, u, stage, note.products, note);
      note.products += count;
      u.advance(note, count);
    }
    note.last = --stages <= 0 && !u.any;
    f.note(note);
    if (thread_index() == 0) barrier_arrive(&f.shared.full[f.step % F::kStages]);  // in place of the engine's
    f.end(aligned);
  } while (!note.last);
}

// The columns of the next product's A that the tile's rows are multiplied by once they are in shared memory, all sixteens of a run in one stage.
template <class F>
DEVICE void fetch_low(Fetcher<F>& f, const MoeWgmmaGemm& a, Addend& u, Note note) {
  constexpr int kPieces = F::kRows / 16, kOfWarp = 32 / kPieces, kOfAll = kFetchers / kPieces;  // of a row; rows at once
  const int row0 = thread_index() / kPieces, piece = thread_index() % kPieces, rows = note.rows;
  const bool inside = note.n0 + piece * 8 < a.n;
  if (u.plain(note)) {
    const int runs = count_bits(u.starts), lane = lane_index();
    for (int from = 0; from == 0 || !note.last; from += kLowUnits) {
      uint8_t* const stage = f.begin();
      for (int unit = 0; warp_index() == 0 && unit < kLowUnits && from + unit < runs; unit++) {
        u.take(from + unit, note);
        if (lane == 0) ((LowRun*)(stage + F::kWeightBytes))[unit] = {u.low, u.high, unit, 1};
      }
      for (int unit = warp_index(); unit < kLowUnits && from + unit < runs; unit += kFetchers / 32) {
        u.take(from + unit, note);
        const uint16_t* source = (const uint16_t*)a.next.pool + (int64_t)(uint32_t)u.split * 8 + (int64_t)(lane / kPieces) * a.n + note.n0 + piece * 8;
#pragma unroll 2
        for (int row = lane / kPieces; row < 16; row += kOfWarp, source += kOfWarp * a.n) cp16(low_piece_of<F>(stage, unit * 16 + row, piece), source, inside && row < u.rank);
      }
      note.products = runs - from < kLowUnits ? runs - from : kLowUnits;
      if (note.products < 0) note.products = 0;
      note.last = from + kLowUnits >= runs, note.open = note.last ? *f.open_word() : -1;
      u.take(from + kLowUnits, note);
      note.rows = u.any ? u.low : INT32_MAX;
      f.note(note);
      note.rows = rows;
      if (thread_index() == 0) barrier_arrive(&f.shared.full[f.step % F::kStages]);
      f.end();
    }
    return;
  }
  u.load(note);
  do {
    uint8_t* const stage = f.begin();
    note.products = 0;
    for (int unit = 0, units; u.any && unit + (units = ceil_div(u.rank, 16)) <= kLowUnits; unit += units, u.load(note)) {
      if (thread_index() == 0) ((LowRun*)(stage + F::kWeightBytes))[note.products] = {u.low, u.high, unit, units};
      const uint16_t* source = (const uint16_t*)a.next.pool + (int64_t)(uint32_t)u.split * 8 + (int64_t)row0 * a.n + note.n0 + piece * 8;
      for (int row = row0; row < units * 16; row += kOfAll, source += kOfAll * a.n) cp16(low_piece_of<F>(stage, unit * 16 + row, piece), source, inside && row < u.rank);
      note.products++;
    }
    note.last = !u.any, note.open = note.last ? *f.open_word() : -1;
    note.rows = u.any ? u.low : INT32_MAX;  // rows before this one need no other stage
    f.note(note);
    note.rows = rows;
    if (thread_index() == 0) barrier_arrive(&f.shared.full[f.step % F::kStages]);
    f.end();
  } while (!note.last);
}

struct Place {  // of the walk: the tile, its first column, and the tile's entry, on its way
  int tile = 0, n0 = 0, expert = -1, start = 0, rows = 0;
};

template <class F>
DEVICE Place place_of(const MoeWgmmaGemm& a, int t, int tiles, int column_blocks) {
  const int together = a.group * column_blocks, group = t / together, local = t - group * together;
  const int members = tiles - group * a.group < a.group ? tiles - group * a.group : a.group, tile = group * a.group + local % members;
  return {tile, local / members * (F::kRows / F::kHalves), a.tiles[3 * tile] & kLower, a.tiles[3 * tile + 1], a.tiles[3 * tile + 2] & kLower};
}

// This block's rows of a tile, and what the fetching thread gathers by, on its way.
template <class F>
DEVICE Note part_of(const MoeWgmmaGemm& a, const Place& place, int (&rows)[F::kPasses]) {
  Note note = {place.expert, place.start, place.rows, place.n0, 0, 0, -1};
  if (F::kCluster == 2) {  // each block has half of the rows, the first the odd ones
    const int share = ceil_div(note.rows, 16) * 8;
    if (cluster_rank() == 0) note.rows = note.rows < share ? note.rows : share;
    else note.start += share, note.rows = note.rows > share ? note.rows - share : 0;
  }
#pragma unroll
  for (int i = 0; i < F::kPasses; i++) {
    const int row = (thread_index() >> 3) + i * (kFetchers / 8);
    rows[i] = note.start + row;
    if (a.gather && row < note.rows) rows[i] = a.sorted_pairs[rows[i]];
  }
  return note;
}

// One thread: a step's weights, and with them the note.
template <class F>
DEVICE void ask_weights(const Fetcher<F>& f, const MoeWgmmaGemm& a, const TensorMap& map, const Note& note, uint32_t step, int k) {
  f.shared.notes[step % F::kStages] = note;
  Barrier* const full = &f.shared.full[step % F::kStages];
  barrier_expect(full, F::kWeightBytes);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint8_t* const target = stage_of(f.shared, step) + half * (F::kWeightBytes / 2);
    const int row = F::kHalves == 2 ? note.n0 : note.n0 + half * (F::kRows / 2), matrix = F::kHalves == 2 ? 2 * note.expert + half : note.expert;
    const uint64_t policy = a.stream ? kStream : kKeep;
    if (F::kCluster == 1) copy_box(target, &map, full, k, row, matrix, policy);
    else if (half == cluster_rank()) copy_box_to_both(target, &map, full, k, row, matrix, policy);
  }
}

// `asked`: steps whose weights are on their way already.
template <class F>
DEVICE void fetch_products(Fetcher<F>& f, const MoeWgmmaGemm& a, const TensorMap& map, Divider top_k, const Note& note, const int (&rows)[F::kPasses], int asked) {
  const int piece = thread_index() & 7, row0 = thread_index() >> 3;
  uint32_t source[F::kPasses];  // in 16 bytes
#pragma unroll
  for (int i = 0; i < F::kPasses; i++) source[i] = (uint32_t)(a.gather ? rows[i] / top_k : rows[i]) * (uint32_t)(a.k / 8) + piece;
  for (int k = 0; k < a.k; k += kK) {
    if (k == F::kStages * 2 * kK) f.tell();
    uint8_t* const stage = f.begin();
    if (thread_index() == 0 && k >= asked * kK) ask_weights(f, a, map, note, f.step, k);
    const uint8_t* const x = (const uint8_t*)a.x + k * 2;
    const bool inside = k + piece * 8 < a.k;
#pragma unroll
    for (int i = 0; i < F::kPasses; i++) {
      const int row = row0 + i * (kFetchers / 8);
      if (row < note.rows) cp16(piece_of(stage + F::kWeightBytes, row, piece), x + (int64_t)source[i] * 16, inside);
    }
    f.end();
  }
}

// Which tiles a block computes: every stride-th one, or the first so and then whatever comes next of the queue. Known two tiles ahead.
struct Walk {
  const MoeWgmmaGemm& a;
  uint32_t* taken;
  int now, next = 0, after = 0;
  uint32_t coming = 0, turns = 0;

  DEVICE int stride() const { return (int)gridDim.x >> (a.cluster - 1); }
  DEVICE uint32_t* count() const { return (uint32_t*)a.tiles + (a.behind ? 0 : 3); }  // each product of a layer has its own
  DEVICE void ask() {  // for the tile behind `after`, told in turn()
    if (a.queued && thread_index() == 0) coming = take_ticket(count(), kOne);
  }
  DEVICE int told() {
    if (!a.queued) return after + stride();
    uint32_t* const word = taken + (turns++ & 1);
    if (thread_index() == 0) *word = coming / kOne;
    sync_warpgroup(3);
    return stride() + (int)*word;
  }
  DEVICE void begin() {  // both at once: a ticket is a round trip
    if (a.queued && thread_index() == 0) coming = take_ticket(count(), 2 * kOne);
    after = now, next = told(), after = next + (a.queued ? 1 : stride());
  }
  DEVICE void turn() {
    now = next, next = after, after = told();
  }
};

template <class F>
DEVICE void fetch(const MoeWgmmaGemm& a, const TensorMap& map, Divider top_k, const Shared<F>& shared) {
  Fetcher<F> f{a, shared};
  bool waits = true;  // for the kernel before, which made s
  if (!a.s && a.gather) wait_for_previous_kernel(), allow_next_kernel(), waits = false;
  const int column_blocks = ceil_div(a.n, F::kRows / F::kHalves), tiles = a.counts[1];
  const int total = tiles * column_blocks;
  int rows[F::kPasses], next_rows[F::kPasses], asked = 0, range[2] = {0, 0};  // steps asked for early; the LoRA tiles of the next tile
  Walk walk{a, shared.taken, (int)blockIdx.x / F::kCluster};
  walk.begin();
  Place place, next, after;
  if (walk.now < total) place = place_of<F>(a, walk.now, tiles, column_blocks);
  if (walk.next < total) next = place_of<F>(a, walk.next, tiles, column_blocks);
  Note note = part_of<F>(a, place, rows);
  Addend u{a};
  if (a.s && a.behind && walk.now < total) range[0] = a.ranges[2 * place.tile], range[1] = a.ranges[2 * place.tile + 1];
  if (waits && (!a.s || a.behind)) {  // rows that the kernel before made, over tiles that were there before it: weights need not wait
    for (; walk.now < total && asked < F::kStages && asked * kK < a.k; asked++)
      if (thread_index() == 0) ask_weights(f, a, map, note, asked, asked * kK);
    if (!a.behind) wait_for_previous_kernel(), allow_next_kernel(), waits = false;
  }
  for (; walk.now < total; walk.turn()) {  // what the next tile begins with is asked for during this one, and its place during the one before
    if (a.s && (!waits || a.behind)) u.ask(range[0], range[1]);
    walk.ask();
    if (walk.after < total) after = place_of<F>(a, walk.after, tiles, column_blocks);
    const Note next_note = part_of<F>(a, next, next_rows);
    if (a.s && (!waits || a.behind)) range[0] = a.ranges[2 * next.tile], range[1] = a.ranges[2 * next.tile + 1];
    if (a.behind) {
      if (waits && walk.next >= total) wait_for_previous_kernel(), allow_next_kernel(), waits = false;
      while ((int)(observe((const uint32_t*)a.tiles + 3 * place.tile + 2) / kOne) < a.behind) {}
    }
    fetch_products(f, a, map, top_k, note, rows, asked);
    asked = 0;
    if (a.s) {
      if (waits && !a.behind) {
        wait_for_previous_kernel(), allow_next_kernel(), waits = false;
        u.ask(a.ranges[2 * place.tile], a.ranges[2 * place.tile + 1]);
        range[0] = a.ranges[2 * next.tile], range[1] = a.ranges[2 * next.tile + 1];
      }
      const int first = u.first, end = u.end;
      int next_rank = 0, next_a = 0;
      if (F::kMakes && a.next.parts && first + lane_index() < end) {  // asked for here, since a chain of loads would stand behind the addend otherwise
        const int64_t* const record = a.next.records + (int64_t)kRecord * (first + lane_index());
        next_rank = (int)record[2], next_a = (int)record[3];
      }
      fetch_addend(f, a, u, note);
      if (F::kMakes && a.next.parts) {
        f.settle();
        if (thread_index() == 0) {
          const bool whole = F::kCluster == 1;
          shared.opened[f.tiles_told & 3] = {place.tile, whole ? note.start : a.tiles[3 * place.tile + 1], whole ? note.rows : a.tiles[3 * place.tile + 2] & kLower, first, end};
        }
        u.follow(first, end, next_rank, next_a);
        fetch_low(f, a, u, note);
        u.following = false;
      }
    }
    if (a.report) f.tell(), f.told_of = place.tile;
    note = next_note, place = next, next = after;
#pragma unroll
    for (int i = 0; i < F::kPasses; i++) rows[i] = next_rows[i];
  }
  if (waits) wait_for_previous_kernel(), allow_next_kernel();  // blocks without a tile: whoever follows relies on all of them
  f.settle();
  f.begin();
  f.note({-1, 0, 0, 0, 0, 0, *f.open_word()});
  if (thread_index() == 0) barrier_arrive(&shared.full[f.step % F::kStages]);
  f.end();
}

}  // namespace
