// What skinny_linear.cu is made of: sizes, where things lie in shared memory, and what a block knows of its place.
#pragma once
#include "cluster_prims.cuh"
#include "skinny_linear.h"

#if !SM90
#pragma nv_diag_suppress 177  // nothing is used where the kernel is empty
#endif

namespace {

constexpr int kTokens = 64, kK = 64, kStages = 8;
constexpr int kMultiplying = 256, kPreparing = 128, kThreads = kMultiplying + kPreparing + 64;
constexpr int kSixteens = kK / 16, kMostLows = 4;  // of adapters' columns in a chunk; such chunks in shared memory
constexpr int kFlight = 48 << 10;           // bytes of weights that a block has under way at most: more would only make all other loads wait behind them
constexpr int kMostShared = 227 * 1024, kTooLarge = 1;  // the error is cudaErrorInvalidValue
constexpr int kSpare = 9 << 10;  // left at 17 to 32 tokens to blocks of combine and norm, 1 KB each, which a block waits for else (measured; 64 need it for tokens)

constexpr int kCut = 1024, kHeld = kCut / 128;  // columns of A that a block multiplies at once; runs of 32 columns of each of four warps
constexpr int kTallBeyond = 16;                 // ranks beyond which it may take sixteen rows of A at once, not eight: fewer turns, x read less often
constexpr int kShort = 80, kTall = 144;         // rows of w in a block, at most: of few, sums take few registers
constexpr uint32_t kEmpty = 0xffffffff;         // a word of s: a NaN that no arithmetic makes
constexpr int kEightSums = 3 * 32 * 2;          // floats that three warps hand to the first, of eight rows
constexpr int kMostParts = 4;                   // of a linear with adapters
constexpr int kGiven = 3;                       // in place of places: s is the kernel before's
constexpr int kTogether = 8;                    // shares of a given s that a thread asks for at once
constexpr uint32_t kLaunch = 1 << 16;           // what the blocks of a launch add to the count of launches, together
constexpr int kSixteenBits = 12;                // of a word that counts sixteens, and eights above

struct Sixteen {  // columns of B of one adapter's part, which one product adds
  int64_t place;  // of B(slot, part)[0, r0] in the pool
  int32_t part, rank, r0;
  int32_t from, to;  // rows of the part, counted from this block's first
  float scaling;
};

struct Eight {  // rows of a cut of A, eight or sixteen, for at most eight tokens of the slot
  int64_t place;  // of A(slot, part)[r0, 0] in the pool
  int32_t part, rank, r0, cut;
  int32_t first, tokens;  // in the order of slots
};

struct Added {  // what is added to a token's rows of a part
  int64_t place;  // of B(slot, part)[row 0 of w]
  int32_t rank;
  float scaling;
};

HOST_DEVICE constexpr int rows_of(int places) { return places == 4 ? 16 : 8; }  // of A at once

// Where things lie in shared memory. A block reads 64 rows of tokens from any chunk of `x`, also where fewer are there: what follows is garbage to it.
struct Layout {
  int chunks, x_bytes, stages;        // of w in a block, at most; of a chunk of tokens; groups of such chunks
  int lows, low_bytes;                // chunks of adapters' columns, s and behind it B, that have room beside the weights; of one
  int later;                          // of them that come where the weights have been read
  int high;                           // rows of A that a block multiplies at once
  int places;                         // of s that a thread waits for at once: 1, 2 or 4, and with 4 sixteen rows of A are multiplied at once; or kGiven
  int w, low, barriers, eight_sums, list, b, total;  // offsets
  int sixteens, eights;               // most of a block
  int shift;                          // of splits
  int blocks;                         // of the grid
  Divider pieces, cuts;               // rows / 8; of A's columns
  int ranks;                          // given: of an adapter at most, in sixteens
  Divider share, fours;               // given: rows of the output that a block of a cluster writes, at most; ranks / 4
};

constexpr int kGroups = 64;  // most groups of chunks of w

HOST_DEVICE int cuts_of(const SkinnyLinear& a) { return ceil_div(a.k, kCut); }

inline Layout layout_of(const SkinnyLinear& a) {
  Layout l;
  l.chunks = ceil_div(ceil_div(a.k, kK), a.splits);
  l.x_bytes = ceil_div(a.m, 8) * 8 * 128;
  const int w_bytes = ceil_div(l.chunks, a.group) * a.group * a.rows * 128;
  const int adapters = a.m < a.num_slots ? a.m : a.num_slots, blocks = ceil_div(a.n, a.rows) * a.splits;
  l.sixteens = ceil_div(adapters * a.parts * ceil_div(a.max_rank, 16), a.splits) + a.parts;
  l.places = ceil_div(a.m, 32) * ceil_div(ceil_div(a.max_rank, 16), a.splits);
  l.places = a.shares ? kGiven : l.places == 1 ? 1 : a.max_rank > kTallBeyond ? 4 : 2;
  l.high = rows_of(l.places);
  l.eights = ceil_div((adapters + (a.m - adapters) / 8) * a.parts * ceil_div(a.max_rank, l.high) * cuts_of(a), blocks);
  l.ranks = ceil_div(a.max_rank, 16) * 16;
  const int sum_bytes = a.shares ? a.m * a.parts * l.ranks * 4 : a.s ? 2 * kEightSums * (l.high / 8) * 4 : 0;
  const int b_bytes = a.shares ? a.m * ceil_div(a.rows / 8, a.splits) * 8 * l.ranks * 2 : 0;
  const int list_bytes = a.shares ? 32 + a.m * a.parts * (int)sizeof(Added) + sum_bytes + b_bytes : a.s ? l.sixteens * (int)sizeof(Sixteen) + l.eights * (int)sizeof(Eight) + kMostParts * a.num_slots * 4 + 32 + sum_bytes : 0;
  const int barriers = (kGroups + 2 * kStages + 2) * (int)sizeof(Barrier);
  l.low_bytes = l.x_bytes + a.rows * 128;
  l.lows = a.s && !a.shares ? ceil_div(ceil_div(adapters * ceil_div(a.max_rank, 16), a.splits), kSixteens) : 0;
  l.lows = l.lows > kMostLows ? kMostLows : l.lows;
  const auto stages = [&](int most) { return (most - w_bytes - l.lows * l.low_bytes - list_bytes - barriers) / (l.x_bytes * a.group); };
  while (l.lows > 1 && stages(kMostShared) < 2) l.lows--;
  l.stages = stages(kMostShared);
  if (a.m > 16 && a.m <= 32 && l.stages > 3) l.stages = stages(kMostShared - kSpare) > 3 ? stages(kMostShared - kSpare) : 3;
  const int groups = ceil_div(l.chunks, a.group);
  l.stages = l.stages < 2 ? 2 : l.stages > kStages ? kStages : l.stages;  // one is given back when the products of the next are under way
  l.stages = l.stages > groups ? groups : l.stages;
  l.w = l.stages * l.x_bytes * a.group;
  l.low = l.w + w_bytes;
  l.barriers = l.low + l.lows * l.low_bytes;
  const int sums = 2 * a.m * pitch_of(a.rows) * 4;
  l.eight_sums = l.barriers + barriers;
  if (a.shares && l.eight_sums < l.w + sums) l.eight_sums = l.w + sums;  // a given s is read beside the sums
  l.list = l.eight_sums + sum_bytes, l.b = l.list + 32 + a.m * a.parts * (int)sizeof(Added);
  l.later = a.shares ? 0 : ceil_div(l.sixteens, kSixteens) - l.lows;
  l.later = l.later < 0 ? 0 : l.later > w_bytes / l.low_bytes ? w_bytes / l.low_bytes : l.later;
  l.total = l.eight_sums + list_bytes;
  l.shift = a.splits == 8 ? 3 : a.splits / 2;
  l.blocks = blocks, l.pieces = make_divider(a.rows / 8), l.cuts = make_divider(cuts_of(a));
  l.share = make_divider(ceil_div(a.rows / 8, a.splits) * 8), l.fours = make_divider(a.shares ? l.ranks / 4 : 1);
  if (l.total < l.w + kTokens * 128) l.total = l.w + kTokens * 128;
  if (l.total < l.w + sums) l.total = l.w + sums;
  if (a.s && !a.shares && l.total < l.barriers - l.low_bytes + kTokens * 128) l.total = l.barriers - l.low_bytes + kTokens * 128;
  return l;
}

struct Shared {
  uint8_t *x, *w, *low;
  Barrier *w_full, *x_full, *x_empty, *low_full, *low_empty;
  int32_t* count;            // sixteens and eights of this block, then of each part
  int32_t* half;             // of s: whose turn it is
  Sixteen* sixteens;
  Eight* eights;
  int32_t* runs;             // [parts, num_slots]
  float* eight_sums;         // [2, 3 warps, 32 lanes, 2 or 4]; given: s [m, parts, ranks]
  Added* added;              // [m, parts], over the lists; behind it B of the rows that this block writes, for each token: [m, share, ranks]
  uint8_t* b;
  float* sums;               // over w, when it has been read
};

DEVICE Shared carve(uint8_t* memory, const Layout& l) {
  Shared s;
  s.x = memory, s.w = memory + l.w, s.low = memory + l.low;
  s.w_full = (Barrier*)(memory + l.barriers), s.x_full = s.w_full + kGroups, s.x_empty = s.x_full + kStages;
  s.low_full = s.x_empty + kStages, s.low_empty = s.low_full + 1;
  s.count = (int32_t*)(memory + l.list), s.half = s.count + 2 + kMostParts, s.sixteens = (Sixteen*)(memory + l.list + 32), s.eights = (Eight*)(s.sixteens + l.sixteens);
  s.runs = (int32_t*)(s.eights + l.eights), s.added = (Added*)s.sixteens, s.b = memory + l.b;
  s.eight_sums = (float*)(memory + l.eight_sums);
  s.sums = (float*)s.w;
  return s;
}

// Adapters' columns: the first chunks beside the weights, others over them.
DEVICE uint8_t* low_of(const Layout& l, const Shared& shared, int chunk) {
  return chunk < l.lows ? shared.low + chunk * l.low_bytes : shared.w + (chunk - l.lows) * l.low_bytes;
}

struct Part {  // of this block in the work
  int rank;           // in the cluster
  int n0;             // first row of w
  int first, chunks;  // columns of w, in chunks
};

}  // namespace
