// Grouped GEMM over experts with 16-bit weights on sm_90: rows of the weight are wgmma's M, the tokens of a tile its N, so that a tile
// computes no more than its tokens rounded up to eight.
//
//   * A block walks tiles of 256 rows of one weight (with an activation 128 gate rows and the 128 up rows that belong to them) x up to 144
//     tokens, persistently. Four warps fetch: the weight by the tensor copy engine, the tokens' rows, scattered, by cp.async. Two
//     warpgroups multiply, each 64 + 64 rows, so that a thread ends with gate and up; meanwhile the next tile is fetched.
//   * In a cluster two blocks share a tile of up to 288 tokens: each fetches half of the weight, into the shared memory of both.
//   * The low-rank addend is more k of the same product: 16 columns of B of an adapter against 16 columns of s, zero outside its rows.
//   * With an addend the kernel before made s: only the fetch of s waits for it, the rest runs beside it.
//   * Without one, down runs behind gate_up: that reports in the list of tiles what it has stored of each, so that down's blocks begin where
//     gate_up's last round leaves multiprocessors idle, with tiles from a queue, and wait for a tile's rows rather than for the kernel.
//   * With adapters the next product's A is multiplied in gate_up too, of what is in shared memory for its store; a tile's columns give parts of s,
//     which are added up by the multiplying warps of the block that reports the last of them.
//
// Barriers of a stage: `full` (128 fetching threads, one more and the engine's bytes), `empty` (the multiplying warps of all blocks).
#include "moe_wgmma_gemm.h"

#include "hopper_prims.cuh"

#if !SM90
#pragma nv_diag_suppress 177  // nothing is used where the kernel is empty
#endif

namespace {

constexpr int kRows = 256, kK = 64;
constexpr int kFetchers = 128, kThreads = 384, kRecord = 5;
constexpr int kWeightBytes = kRows * 128;
constexpr int kLowRows = 128, kLowUnits = kLowRows / 16;  // of the next product's A in a stage, in rows of 128 columns
constexpr int kTold = -2;
constexpr int kLower = 0xffff, kOne = kLower + 1;  // of a word of a tile: what it says, and one of what is counted above

// What a kernel is compiled for: tokens of a tile, and with fewer of them more stages.
template <int TOKENS, int HALVES, int CLUSTER>
struct Form {
  static constexpr int kTokens = TOKENS, kHalves = HALVES, kCluster = CLUSTER;
  static constexpr int kStages = TOKENS > 32 ? 4 : 6, kStageBytes = kWeightBytes + TOKENS * 128;
  static constexpr int kPitch = 256 / HALVES + 16;                // bytes of a token that leaves through shared memory
  static constexpr int kChunk = (TOKENS > 32 ? 40 : 16) * HALVES;  // tokens that leave at once
  static constexpr int kOutBytes = kChunk * kPitch;
  static constexpr int kSharedBytes = kStages * kStageBytes + 2 * kOutBytes + 2 * TOKENS * 4 + 512;
  static constexpr int kPasses = (TOKENS * 8 + kFetchers - 1) / kFetchers;  // rows of x that a fetching thread brings a sixteen-byte piece of
  static_assert(kSharedBytes <= 227 * 1024, "a block's shared memory");
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
    rows = (int32_t*)(out + 2 * F::kOutBytes);
    full = (Barrier*)(rows + 2 * F::kTokens);
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
DEVICE uint8_t* low_piece_of(uint8_t* rows, int row, int piece) { return rows + row * 256 + ((piece ^ (row & 7)) << 4); }
DEVICE uint8_t* piece_of(uint8_t* rows, int row, int piece) { return rows + row * 128 + ((piece ^ (row & 7)) << 4); }
DEVICE int uniform(int value) { return (int)shuffle((uint32_t)value, 0); }  // tells the compiler that a warp agrees: wgmma may not stand where it could not
DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

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
      if (lane_index() == 0 && a.next.parts) ticket = arrive(word, kOne);
      else if (lane_index() == 0) publish_add(word, kOne);
    }
    tiles_told++, told_of = a.next.parts ? kTold : -1;
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
  const int64_t* records;
  int first = 0, next = 0, end = 0;                     // LoRA tiles
  int mine_start = 0, mine_rows = 0, mine_rank = 0, mine_split = 0;
  int64_t mine_place = 0;
  int low = 0, high = 0, rank = 0, split = 0, r0 = 0;  // the run: rows within this block's part of the tile; the sixteen
  int64_t place = 0;
  bool any = true;

  DEVICE void ask(int from, int to) {
    first = next = from, end = to;
    const int64_t* record = records + (int64_t)kRecord * (first + lane_index());
    if (first + lane_index() >= end) return;
    mine_start = (int)record[0], mine_rows = (int)record[1], mine_rank = (int)record[2], mine_split = (int)record[3], mine_place = record[4];
  }
  DEVICE int field(int value) const { return (int)shuffle((uint32_t)value, next - first); }
  DEVICE int64_t next_place() {
    if (next - first == 32) ask(next, end);
    const uint32_t top = shuffle((uint32_t)(mine_place >> 32), next - first);
    return (int64_t)((uint64_t)top << 32 | shuffle((uint32_t)mine_place, next - first));
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
      const int64_t last_place = (int64_t)((uint64_t)shuffle_up((uint32_t)(mine_place >> 32), 1) << 32 | shuffle_up((uint32_t)mine_place, 1));
      const bool same = lane_index() > 0 && last_stop > 0 && last_place == mine_place;  // one run with the LoRA tile before
      const uint32_t units = live ? (uint32_t)divide_up(mine_rank, 16) : 0;
      before += (int)warp_sum(mine_start < middle && !same ? units : 0);
      behind += (int)warp_sum(stop > middle && !(same && last_stop > middle) ? units : 0);
      if (end - first > 32) continue;
      if (first != from) ask(from, end);
      return divide_up(before > behind ? before : behind, each);
    }
  }
  DEVICE bool b_aligned() const { return rank % 8 == 0; }
  DEVICE bool s_aligned() const { return (rank | a.s_width | a.max_rank) % 8 == 0; }
};

// COUNT sixteens of the run's columns of B, from the unit-th of this stage on, and of s: those of gate and of up beside each other, or one.
// One warp a scheduler does this, so that instructions count: addresses advance, and ranks that are no multiple of eight have their own loop.
template <int HALVES, int COUNT, bool ALIGNED = true>
DEVICE void fetch_columns(const MoeWgmmaGemm& a, const Addend& u, uint8_t* stage, int unit, const Note& note) {
  constexpr int kOfB = 2 * COUNT, kOfS = 2 * COUNT * HALVES, kRowsB = kFetchers / kOfB, kRowsS = kFetchers / kOfS;  // pieces of a row, rows at once
  const int tid = thread_index(), row0 = tid / kOfB, r = u.r0 + tid % kOfB * 8, inside = r < u.rank ? a.n - note.n0 - row0 : 0;
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    const uint16_t* source = (const uint16_t*)a.pool + u.place * 8 + ((int64_t)half * a.n + note.n0 + row0) * u.rank + r;
    uint8_t* target = piece_of(stage + half * (kRows / 2) * 128, row0, 2 * unit + tid % kOfB);
#pragma unroll(ALIGNED ? 8 : 1)
    for (int row = 0; row < kRows / HALVES; row += kRowsB, source += kRowsB * u.rank, target += kRowsB * 128) {
      if constexpr (ALIGNED) cp16(target, source, row < inside);
      else load_piece(target, source, row < inside ? u.rank - r : 0, u.b_aligned());
    }
  }
  const int piece = tid % kOfS, half = piece / 2 % HALVES, s_r = u.r0 + piece / (2 * HALVES) * 16 + (piece & 1) * 8;
  const int low = s_r < u.rank ? u.low : INT32_MAX, high = u.high;
  const uint16_t* source = (const uint16_t*)a.s + ((int64_t)note.start + tid / kOfS) * a.s_width + half * u.split * a.max_rank + s_r;
  uint8_t* target = piece_of(stage + kWeightBytes, tid / kOfS, 2 * HALVES * unit + piece);
#pragma unroll 1
  for (int row = tid / kOfS; row < note.rows; row += kRowsS, source += kRowsS * a.s_width, target += kRowsS * 128) {
    const bool mine = row >= low && row < high;
    if constexpr (ALIGNED) cp16(target, source, mine);
    else load_piece(target, source, mine ? u.rank - s_r : 0, false);
  }
}

template <class F>
DEVICE void fetch_addend(Fetcher<F>& f, const MoeWgmmaGemm& a, Addend& u, Note note) {
  constexpr int kEach = kK / 16 / F::kHalves;
  int stages = 0;  // the blocks of a cluster keep step
  if (F::kCluster == 2) stages = u.stages(note.start + (cluster_rank() == 0 ? divide_up(note.rows, 8) * 8 : 0), kEach);
  u.load(note);
  do {
    uint8_t* const stage = f.begin();
    bool aligned = true;
    for (note.products = 0; note.products < kEach && u.any;) {
      const int left = divide_up(u.rank - u.r0, 16), room = u.s_aligned() ? kEach - note.products : 1, count = left >= 3 && room >= 4 ? 4 : left >= 2 && room >= 2 ? 2 : 1;
      aligned = aligned && u.s_aligned();
      if (!u.s_aligned()) fetch_columns<F::kHalves, 1, false>(a, u, stage, note.products, note);
      else if (count == 1) fetch_columns<F::kHalves, 1>(a, u, stage, note.products, note);
      else if (count == 2) fetch_columns<F::kHalves, 2>(a, u, stage, note.products, note);
      else fetch_columns<F::kHalves, kEach>(a, u, stage, note.products, note);
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
  int stages = 0;  // as many as whichever block of a cluster takes more
  if (F::kCluster == 2) stages = u.stages(note.start + (cluster_rank() == 0 ? divide_up(note.rows, 8) * 8 : 0), kLowUnits + 1 - a.next.width / 16);
  const int row0 = thread_index() / 16, piece = thread_index() % 16, rows = note.rows;
  const bool inside = note.n0 + piece * 8 < a.n;
  u.load(note);
  do {
    uint8_t* const stage = f.begin();
    note.products = 0;
    for (int unit = 0, units; u.any && unit + (units = divide_up(u.rank, 16)) <= kLowUnits; unit += units, u.load(note)) {
      if (thread_index() == 0) ((LowRun*)(stage + kWeightBytes))[note.products] = {u.low, u.high, unit, units};
      const uint16_t* source = (const uint16_t*)a.next.pool + (int64_t)(uint32_t)u.split * 8 + (int64_t)row0 * a.n + note.n0 + piece * 8;
      for (int row = row0; row < units * 16; row += kFetchers / 16, source += kFetchers / 16 * a.n) cp16(low_piece_of(stage, unit * 16 + row, piece), source, inside && row < u.rank);
      note.products++;
    }
    note.last = --stages <= 0 && !u.any, note.open = note.last ? *f.open_word() : -1;
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

template <int HALVES>
DEVICE Place place_of(const MoeWgmmaGemm& a, int64_t t, int tiles, int column_blocks) {
  const int group = (int)(t / ((int64_t)a.group * column_blocks)), local = (int)(t - (int64_t)group * a.group * column_blocks);
  const int members = tiles - group * a.group < a.group ? tiles - group * a.group : a.group, tile = group * a.group + local % members;
  return {tile, local / members * (kRows / HALVES), a.tiles[3 * tile] & kLower, a.tiles[3 * tile + 1], a.tiles[3 * tile + 2] & kLower};
}

// This block's rows of a tile, and what the fetching thread gathers by, on its way.
template <class F>
DEVICE Note part_of(const MoeWgmmaGemm& a, const Place& place, int (&rows)[F::kPasses]) {
  Note note = {place.expert, place.start, place.rows, place.n0, 0, 0, -1};
  if (F::kCluster == 2) {  // each block has half of the rows, the first the odd ones
    const int share = divide_up(note.rows, 16) * 8;
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
  barrier_expect(full, kWeightBytes);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint8_t* const target = stage_of(f.shared, step) + half * (kWeightBytes / 2);
    const int row = F::kHalves == 2 ? note.n0 : note.n0 + half * 128, matrix = F::kHalves == 2 ? 2 * note.expert + half : note.expert;
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
      if (row < note.rows) cp16(piece_of(stage + kWeightBytes, row, piece), x + (int64_t)source[i] * 16, inside);
    }
    f.end();
  }
}

// Which tiles a block computes: every stride-th one, or the first so and then whatever comes next of the queue. Known two tiles ahead.
struct Walk {
  const MoeWgmmaGemm& a;
  uint32_t* taken;
  int64_t now;
  const int stride;
  int64_t next = 0, after = 0;
  uint32_t coming = 0, turns = 0;

  DEVICE void ask() {  // for the tile behind `after`, told in turn()
    if (a.queued && thread_index() == 0) coming = take_ticket((uint32_t*)a.tiles + (a.behind ? 0 : 3), kOne);  // each product of a layer has its own count
  }
  DEVICE int64_t told() {
    if (!a.queued) return after + stride;
    uint32_t* const word = taken + (turns++ & 1);
    if (thread_index() == 0) *word = coming / kOne;
    sync_warpgroup(3);
    return stride + (int64_t)*word;
  }
  DEVICE void begin() {
    after = now;
    for (int i = 0; i < 2; i++) ask(), next = after, after = told();
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
  const int column_blocks = divide_up(a.n, kRows / F::kHalves), tiles = a.counts[1], stride = (int)gridDim.x / F::kCluster;
  const int64_t total = (int64_t)tiles * column_blocks;
  int rows[F::kPasses], next_rows[F::kPasses], asked = 0, range[2] = {0, 0};  // steps asked for early; the LoRA tiles of the next tile
  Walk walk{a, shared.taken, blockIdx.x / F::kCluster, stride};
  walk.begin();
  Place place, next, after;
  if (walk.now < total) place = place_of<F::kHalves>(a, walk.now, tiles, column_blocks);
  if (walk.next < total) next = place_of<F::kHalves>(a, walk.next, tiles, column_blocks);
  Note note = part_of<F>(a, place, rows);
  Addend u{a, a.records};
  if (a.s && a.behind && walk.now < total) range[0] = a.ranges[2 * place.tile], range[1] = a.ranges[2 * place.tile + 1];
  if (waits && (!a.s || a.behind)) {  // rows that the kernel before made, over tiles that were there before it: weights need not wait
    for (; walk.now < total && asked < F::kStages && asked * kK < a.k; asked++)
      if (thread_index() == 0) ask_weights(f, a, map, note, asked, asked * kK);
    if (!a.behind) wait_for_previous_kernel(), allow_next_kernel(), waits = false;
  }
  for (; walk.now < total; walk.turn()) {  // what the next tile begins with is asked for during this one, and its place during the one before
    if (a.s && (!waits || a.behind)) u.ask(range[0], range[1]);
    walk.ask();
    if (walk.after < total) after = place_of<F::kHalves>(a, walk.after, tiles, column_blocks);
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
      const int first = u.first;
      fetch_addend(f, a, u, note);
      if (F::kHalves == 2 && a.next.parts) {
        f.settle();
        if (thread_index() == 0) {
          const bool whole = F::kCluster == 1;
          shared.opened[f.tiles_told & 3] = {place.tile, whole ? note.start : a.tiles[3 * place.tile + 1], whole ? note.rows : a.tiles[3 * place.tile + 2] & kLower, first, u.end};
        }
        Addend v{a, a.next.records};
        v.ask(first, u.end);
        fetch_low(f, a, v, note);
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

// ---- multiplying -----------------------------------------------------------------------------------------------------------------------

template <class F>
struct Multiplier {
  const Shared<F>& shared;
  int group;  // 0 or 1
  uint32_t step = 0;

  DEVICE bool arrived() const { return uniform(barrier_passed(&shared.full[step % F::kStages], step / F::kStages & 1)); }
  DEVICE void wait() { barrier_wait(&shared.full[step % F::kStages], step / F::kStages & 1); }
  // A field of the stage's note, read by the lane that gives the stage back to this block alone, so that its arrival comes after all reads.
  DEVICE int told(int32_t Note::*field) const {
    const int owner = F::kCluster == 2 ? cluster_rank() : 0;
    return (int)shuffle(lane_index() == owner ? (uint32_t)(shared.notes[step % F::kStages].*field) : 0u, owner);
  }
  DEVICE void release(uint32_t of) {
    if (F::kCluster == 1) {
      if (lane_index() == 0) barrier_arrive(&shared.empty[of % F::kStages]);
    } else if (lane_index() < 2) {
      barrier_arrive_at(&shared.empty[of % F::kStages], lane_index());
    }
  }
  // First row of a half of this group's: its gate and its up rows, or 128 in a row.
  DEVICE int row(int half) const { return F::kHalves == 2 ? half * 128 + group * 64 : group * 128 + half * 64; }
};

// Sixteen of k: columns 16 i of the weights, and of the tokens' rows, with `apart` other ones for the second half.
template <class T, int NT, class M>
DEVICE void multiply_sixteen(float (&d)[2][72], const M& m, int i, int token_i, int apart, bool accumulate) {
  uint8_t* const stage = stage_of(m.shared, m.step);
#pragma unroll
  for (int half = 0; half < 2; half++)
    multiply_shared<T, NT>(d[half], wgmma_matrix(stage + m.row(half) * 128) + 2 * i, wgmma_matrix(stage + kWeightBytes) + 2 * (token_i + half * apart), accumulate);
}

template <class T, int NT, class F>
DEVICE void multiply_tile(float (&d)[2][72], Multiplier<F>& m, int steps, bool addend) {
  bool released = true;
  const auto begin = [&] {
    if (!m.arrived() && !released) {  // nothing to multiply yet: give back what is read
      wgmma_wait<0>();
      m.release(m.step - 1);
      released = true;
    }
    m.wait();
    see_copies();
  };
  const auto end = [&] {
    wgmma_commit();
    if (!released) {
      wgmma_wait<1>();
      m.release(m.step - 1);
    }
    released = false;
  };
  for (int k = 0; k < steps; k++, m.step++) {
    begin();
    wgmma_begin();
    if constexpr (NT > 0) {
#pragma unroll
      for (int i = 0; i < kK / 16; i++) multiply_sixteen<T, NT>(d, m, i, i, 0, true);
    }
    end();
  }
  for (bool last = !addend; !last; m.step++) {
    begin();
    const int products = m.told(&Note::products);
    last = m.told(&Note::last);
    wgmma_begin();
    if constexpr (NT > 0) {
      for (int i = 0; i < products; i++) multiply_sixteen<T, NT>(d, m, i, F::kHalves * i, F::kHalves - 1, true);
    }
    end();
  }
  wgmma_wait<0>();
  m.release(m.step - 1);
}

DEVICE float activate(const MoeWgmmaGemm& a, float gate, float up) {
  gate = fminf(gate, a.limit), up = fmaxf(fminf(up, a.limit), -a.limit);
  return gate * reciprocal(1.f + exp2_of(-1.44269504f * (a.alpha * (gate + a.cubic * gate * gate * gate)))) * (up + a.shift);
}

template <class T>
DEVICE float bias_of(const MoeWgmmaGemm& a, int64_t index, bool inside) {
  if (!a.bias || !inside) return 0.f;
  return T::low(((const uint16_t*)a.bias)[index]);
}

// Rows [c, end) of the tile, which are in shared memory, times the next product's A: sixteen rows of a run a warp. The stage that reaches beyond stays.
template <class T, class F>
DEVICE void multiply_low(const MoeWgmmaGemm& a, const Note& note, Multiplier<F>& m, int c, int end) {
  const int thread = thread_index_here(), lane = thread & 31, warp = uniform(thread / 32) - kFetchers / 32;
  uint8_t* const rows = m.shared.out + (lane & 15) * F::kPitch + (lane >> 4) * 16;
  for (;; m.step++) {
    m.wait();
    uint8_t* const stage = stage_of(m.shared, m.step);
    const int runs = m.told(&Note::products), until = m.told(&Note::rows);
    for (int i = 0, item = 0; i < runs; i++) {
      const LowRun run = ((const LowRun*)(stage + kWeightBytes))[i];
      const int low = run.low > c ? run.low : c, high = run.high < end ? run.high : end;
      for (int row0 = low & ~15; row0 < high; row0 += 16, item++) {
        if ((item & 7) != warp) continue;
        for (int unit = 0; unit < run.units; unit++) {
          float sum[2][4] = {};
#pragma unroll 4
          for (int k = 0; k < 8; k++) {
            uint32_t x[4], w[4];
            load_matrix_x4(x, rows + k / 4 * F::kOutBytes + (row0 - c) * F::kPitch + k % 4 * 32);
            load_matrix_x4(w, low_piece_of(stage, (run.unit + unit) * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
            const uint32_t w0[2] = {w[0], w[1]}, w1[2] = {w[2], w[3]};
            T::mma(sum[0], x, w0);
            T::mma(sum[1], x, w1);
          }
          float* const part = a.next.parts + ((int64_t)(note.n0 / (kRows / 2)) * a.pairs + note.start + row0 + lane / 4) * a.next.width + unit * 16 + lane % 4 * 2;
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int row = row0 + lane / 4 + h * 8;
            if (row < low || row >= high) continue;
            store_two_floats(part + h * 8 * a.next.width, sum[0][2 * h], sum[0][2 * h + 1]);
            store_two_floats(part + h * 8 * a.next.width + 8, sum[1][2 * h], sum[1][2 * h + 1]);
          }
        }
      }
    }
    if (until >= end) return;
    sync_warp();
    m.release(m.step);
  }
}

// This warpgroup's part of a tile: to 16 bit, transposed through shared memory, out in pieces of 16 bytes. Returns a tile to add up, or -1.
template <class T, class F>
DEVICE int store_tile(const MoeWgmmaGemm& a, const Note& note, const float (&d)[2][72], Multiplier<F>& m, const int (&row)[2]) {
  const Shared<F>& shared = m.shared;
  const int group = m.group;
  const bool low = F::kHalves == 2 && a.next.parts;
  const auto sync = [&] {  // both groups where their columns meet
    if (low) sync_two_warpgroups(4);
    else sync_warpgroup(1 + group);
  };
  constexpr int kColumns = 128 / F::kHalves, kPieces = kColumns / 8, kTogether = 128 / kPieces, kEach = F::kChunk / kTogether;
  const int tid = thread_index_here() & 127, lane = tid & 31, warp = tid / 32;
  const int column0 = note.n0 + group * kColumns;
  uint8_t* const out = shared.out + group * F::kOutBytes;
  int32_t* const rows = shared.rows + group * F::kTokens;
  float bias[2][2];
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int of = column0 + (F::kHalves == 2 ? 0 : half * 64) + warp * 16 + h * 8 + lane / 4;
      bias[half][h] = bias_of<T>(a, ((int64_t)note.expert * F::kHalves + (F::kHalves == 2 ? half : 0)) * a.n + of, of < a.n);
    }
  const int token0 = tid / kPieces, piece = tid % kPieces, column = column0 + piece * 8;
  uint8_t* const mine = out + (lane & 7) * F::kPitch + warp * 32 + (lane >> 3 & 1) * 16;
#pragma unroll
  for (int c = 0; c < F::kTokens; c += F::kChunk) {
    if (c >= note.rows) break;
    sync();  // whoever still reads what left before
    if (F::kHalves == 1 && c == 0) {
      if (tid < F::kTokens) rows[tid] = row[0];
      if (tid + 128 < F::kTokens) rows[128 + tid] = row[1];
    }
#pragma unroll
    for (int i = 0; i < F::kChunk / 8; i++) {
      const int at = (c / 8 + i) * 4;
      if (c + i * 8 >= F::kTokens || c + i * 8 >= note.rows) break;
      uint32_t value[2];
      if constexpr (F::kHalves == 2) {
#pragma unroll
        for (int h = 0; h < 2; h++)
          value[h] = T::pack(activate(a, d[0][at + 2 * h] + bias[0][h], d[1][at + 2 * h] + bias[1][h]),
                             activate(a, d[0][at + 2 * h + 1] + bias[0][h], d[1][at + 2 * h + 1] + bias[1][h]));
        store_matrix_x2_transposed(mine + i * 8 * F::kPitch, value[0], value[1]);
      } else {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
          for (int h = 0; h < 2; h++) value[h] = T::pack(d[half][at + 2 * h] + bias[half][h], d[half][at + 2 * h + 1] + bias[half][h]);
          store_matrix_x2_transposed(mine + i * 8 * F::kPitch + half * 128, value[0], value[1]);
        }
      }
    }
    sync();
    if constexpr (F::kHalves == 2) {
      if (low) multiply_low<T>(a, note, m, c, c + F::kChunk < note.rows ? c + F::kChunk : note.rows);
    }
    const int tokens = note.rows - c < F::kChunk ? note.rows - c : F::kChunk;
    uint32_t words[kEach][4];
#pragma unroll
    for (int i = 0; i < kEach; i++) load_words(words[i], out + (token0 + i * kTogether) * F::kPitch + piece * 16);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int token = token0 + i * kTogether;
      if (token >= tokens || column >= a.n) continue;
      const int to = F::kHalves == 1 ? rows[c + token] : note.start + c + token;
      store_words((uint16_t*)a.out + (int64_t)to * a.n + column, words[i]);
    }
  }
  int open = -1;
  for (bool last = !low; !last; m.step++) {  // what is left of A's stages
    m.wait();
    last = m.told(&Note::last), open = m.told(&Note::open);
    sync_warp();
    m.release(m.step);
  }
  return open;
}

// s of a tile whose parts are all there, by the multiplying warps, whose sums hold nothing now: four columns a thread, whose parts are asked for at
// once, since each wait is a round trip through L2.
DEVICE void add_parts(const MoeWgmmaGemm& a, const OpenTile& open) {
  constexpr int kParts = 6, kAdders = kThreads - kFetchers;
  const int start = open.start, rows = open.rows, from = open.first, to = open.end, tile = open.tile;
  const int parts = divide_up(a.n, kRows / 2), fours = a.next.width / 4, thread = thread_index_here() - kFetchers, lane = thread & 31;
  const int64_t apart = (int64_t)a.pairs * a.next.width;
  for (int first = from; first < to; first += 32) {  // lane l has LoRA tile first + l
    int64_t record[3] = {};
    if (first + lane < to)
#pragma unroll
      for (int i = 0; i < 3; i++) record[i] = a.next.records[(int64_t)kRecord * (first + lane) + i];
    for (int i = 0; i < rows * fours; i += kAdders) {
      const int row = (i + thread) / fours, r = (i + thread) % fours * 4;
      const float* const part = a.next.parts + (int64_t)(start + row) * a.next.width + r;
      float sum[4] = {}, scaling = 0.f;
      for (int j0 = 0; j0 < parts; j0 += kParts) {
        float more[kParts][4];
#pragma unroll
        for (int j = 0; j < kParts; j++)
          if (row < rows && j0 + j < parts) load_floats_l2(more[j], part + (j0 + j) * apart);
#pragma unroll
        for (int j = 0; j < kParts; j++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            if (row < rows && j0 + j < parts) sum[k] += more[j][k];
      }
      int rank = 0;
      for (int t = 0; t < 32 && first + t < to; t++) {
        const int low = (int)shuffle((uint32_t)record[0], t) - start, high = low + (int)shuffle((uint32_t)record[1], t), run_rank = (int)shuffle((uint32_t)record[2], t);
        const float run_scaling = as_float(shuffle((uint32_t)(record[1] >> 32), t));
        if (row < rows && row >= low && row < high) rank = run_rank, scaling = run_scaling;
      }
      if (r >= rank) continue;
      uint32_t words[2];
#pragma unroll
      for (int h = 0; h < 2; h++) words[h] = a.is_bf16 ? pack_bf16(sum[2 * h] * scaling, sum[2 * h + 1] * scaling) : pack_fp16(sum[2 * h] * scaling, sum[2 * h + 1] * scaling);
      uint16_t* const out = (uint16_t*)a.next.s + (int64_t)(start + row) * a.next.s_width + r;
      if (a.next.s_width % 4 == 0) store_words(out, words[0], words[1]);
      else
        for (int k = 0; k < 4 && r + k < a.next.s_width; k++) out[k] = (uint16_t)(words[k / 2] >> (k % 2 * 16));
    }
  }
  sync_two_warpgroups(4);
  if (thread == 0) publish_add((uint32_t*)a.tiles + 3 * tile + 2, kOne);
}

template <class T, class F>
DEVICE int multiply_and_store(const MoeWgmmaGemm& a, Multiplier<F>& m, int steps, int expert, int start, int packed) {
  float d[2][72] = {};  // all, and no first product that overwrites: from there to the store before, their registers are free
  int row[2];           // asked for before the products, needed after
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = (thread_index() & 127) + 128 * i;
    row[i] = start + token;
    if (F::kHalves == 1 && a.scatter && token < (packed & 255)) row[i] = a.sorted_pairs[row[i]];
  }
  const bool addend = a.s != nullptr;
  switch (divide_up(packed & 255, 8)) {
#define CASE(NT) \
  case NT: if constexpr (8 * NT <= F::kTokens) multiply_tile<T, NT>(d, m, steps, addend); break;
    CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16) CASE(17) CASE(18)
#undef CASE
  }
  const int again = anew(packed);
  return store_tile<T, F>(a, {expert, start, again & 255, again >> 8, 0, 0, -1}, d, m, row);
}

template <class T, class F>
DEVICE void multiply(const MoeWgmmaGemm& a, const Shared<F>& shared) {
  Multiplier<F> m{shared, uniform(warp_index() / 4) - 1};
  const int steps = divide_up(a.k, kK);
  for (bool more = true; more;) {
    m.wait();
    const int expert = m.told(&Note::expert), start = m.told(&Note::start), packed = m.told(&Note::rows) | m.told(&Note::n0) << 8;  // registers are few
    int open;
    if (expert >= 0) {
      open = multiply_and_store<T>(a, m, steps, expert, start, packed);
      if (a.report) {
        sync_warp();
        if (lane_index() == 0) barrier_arrive(shared.stored);
      }
    } else {
      open = m.told(&Note::open), more = false;
    }
    if constexpr (F::kHalves == 2) {
      if (open >= 0) add_parts(a, shared.opened[open]);
    }
  }
}

template <class T, class F>
KERNEL void __launch_bounds__(kThreads, 1) gemm(const MoeWgmmaGemm a, const GRID_CONSTANT TensorMap map, Divider top_k) {
#if SM90  // elsewhere an empty kernel, which is never launched: ops/moe_wgmma_gemm.py refuses
  SMEM_DECL;
  const Shared<F> shared(smem_);
  if (thread_index() == 0) {
    for (int i = 0; i < F::kStages; i++) barrier_init(&shared.full[i], kFetchers + 1), barrier_init(&shared.empty[i], 8 * F::kCluster);
    barrier_init(shared.stored, 8);
    publish_barriers();
  }
  if constexpr (F::kCluster == 2) sync_cluster();
  else sync_block();
  if (warp_index() < kFetchers / 32) {
    give_registers<136>();
    fetch<F>(a, map, top_k, shared);
  } else {
    take_registers<184>();
    multiply<T, F>(a, shared);
  }
  if constexpr (F::kCluster == 2) sync_cluster();  // the other block may still arrive here
#endif
}

// The weights as [experts * halves, n, k] for the copy engine: a box is 128 rows.
int describe(const MoeWgmmaGemm& a, TensorMap* map) {
  const uint64_t size[3] = {(uint64_t)a.k, (uint64_t)a.n, (uint64_t)a.halves * a.experts}, stride[2] = {(uint64_t)a.k, (uint64_t)a.n * a.k};  // in elements
  const uint32_t box[3] = {kK, kRows / 2, 1};
  return describe_boxes(map, a.w, a.is_bf16, size, stride, box);
}

template <class T, class F>
int enqueue(const MoeWgmmaGemm& a, const TensorMap& map, void* stream) {
  const Launch how = {(unsigned)a.blocks, kThreads, F::kSharedBytes, stream, a.overlap && can_overlap()};
  const Divider top_k = make_divider(a.top_k);
  if constexpr (F::kCluster == 2) return launch_clusters(how, 2, gemm<T, F>, a, map, top_k);
  else return launch(how, gemm<T, F>, a, map, top_k);
}

template <class T, int HALVES>
int dispatch(const MoeWgmmaGemm& a, const TensorMap& map, void* stream) {
  if (a.cluster == 2) return enqueue<T, Form<144, HALVES, 2>>(a, map, stream);
  return a.tokens == 144 ? enqueue<T, Form<144, HALVES, 1>>(a, map, stream) : enqueue<T, Form<32, HALVES, 1>>(a, map, stream);
}

}  // namespace

extern "C" int moe_wgmma_gemm(const MoeWgmmaGemm* arguments, void* stream) {
  const MoeWgmmaGemm& a = *arguments;
  if (a.pairs == 0) return 0;
  TensorMap map;
  const int error = describe(a, &map);
  if (error != 0) return error;
  if (a.is_bf16) return a.halves == 2 ? dispatch<BFloat16, 2>(a, map, stream) : dispatch<BFloat16, 1>(a, map, stream);
  return a.halves == 2 ? dispatch<Float16, 2>(a, map, stream) : dispatch<Float16, 1>(a, map, stream);
}
