// Grouped GEMM over experts with 16-bit weights on sm_90: rows of the weight are wgmma's M, the tokens of a tile its N, so that a tile
// computes no more than its tokens rounded up to eight.
//
//   * A block walks tiles of 256 rows of one weight (with an activation 128 gate rows and the 128 up rows that belong to them) x up to 144
//     tokens, persistently. Four warps fetch: the weight by the tensor copy engine, the tokens' rows, scattered, by cp.async. Two
//     warpgroups multiply, each 64 + 64 rows, so that a thread ends with gate and up; meanwhile the next tile is fetched. Or 128 rows x up to 72
//     tokens with one such warpgroup, and two blocks on a multiprocessor.
//   * In a cluster two blocks share a tile of up to 288 tokens: each fetches half of the weight, into the shared memory of both.
//   * The low-rank addend is more k of the same product: 16 columns of B of an adapter against 16 columns of s, zero outside its rows.
//   * With an addend the kernel before made s: only the fetch of s waits for it, the rest runs beside it.
//   * Without one, down runs behind gate_up: that reports in the list of tiles what it has stored of each, so that down's blocks begin where
//     gate_up's last round leaves multiprocessors idle, with tiles from a queue, and wait for a tile's rows rather than for the kernel.
//   * With adapters the next product's A is multiplied in gate_up too, of what is in shared memory for its store; a tile's columns give parts of s,
//     which are added up by the multiplying warps of the block that reports the last of them, or of down's blocks before they begin.
//
// Barriers of a stage: `full` (128 fetching threads, one more and the engine's bytes), `empty` (the multiplying warps of all blocks).
#include "moe_wgmma_fetch.cuh"

namespace {

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
  DEVICE int row(int half) const { return F::kHalves == 2 ? half * (F::kRows / 2) + group * 64 : group * 128 + half * 64; }
};

// Sixteen of k: columns 16 i of the weights, and of the tokens' rows, with `apart` other ones for the second half.
template <class T, int NT, class F>
DEVICE void multiply_sixteen(float (&d)[2][72], const Multiplier<F>& m, int i, int token_i, int apart, bool accumulate) {
  uint8_t* const stage = stage_of(m.shared, m.step);
#pragma unroll
  for (int half = 0; half < 2; half++)
    multiply_shared<T, NT>(d[half], wgmma_matrix(stage + m.row(half) * 128) + 2 * i, wgmma_matrix(stage + F::kWeightBytes) + 2 * (token_i + half * apart), accumulate);
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
      const LowRun run = ((const LowRun*)(stage + F::kWeightBytes))[i];
      const int low = run.low > c ? run.low : c, high = run.high < end ? run.high : end;
      for (int row0 = low & ~15; row0 < high; row0 += 16, item++) {
        if ((item & (F::kWarps - 1)) != warp) continue;
        for (int unit = 0; unit < run.units; unit++) {
          float sum[2][4] = {};
#pragma unroll 4
          for (int k = 0; k < 4 * F::kGroups; k++) {
            uint32_t x[4], w[4];
            load_matrix_x4(x, rows + k / 4 * F::kOutBytes + (row0 - c) * F::kPitch + k % 4 * 32);
            load_matrix_x4(w, low_piece_of<F>(stage, (run.unit + unit) * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
            const uint32_t w0[2] = {w[0], w[1]}, w1[2] = {w[2], w[3]};
            T::mma(sum[0], x, w0);
            T::mma(sum[1], x, w1);
          }
          float* const part = a.next.parts + ((int64_t)(note.n0 / (F::kRows / 2)) * a.pairs + note.start + row0 + lane / 4) * a.next.width + unit * 16 + lane % 4 * 2;
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

// Of what down reads soon, while the weights that leave L2 first pass by.
DEVICE void store_words_to_stay(void* p, const uint32_t (&r)[4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr uint64_t kStay = 0x14F0000000000000;  // as createpolicy makes it: last to leave
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(kStay) : "memory");
#else
  store_words(p, r);
#endif
}

// This warpgroup's part of a tile: to 16 bit, transposed through shared memory, out in pieces of 16 bytes. Returns a tile to add up, or -1.
template <class T, class F>
DEVICE int store_tile(const MoeWgmmaGemm& a, const Note& note, const float (&d)[2][72], Multiplier<F>& m, const int (&row)[2]) {
  const Shared<F>& shared = m.shared;
  const int group = m.group;
  const bool low = F::kMakes && a.next.parts;
  const auto sync = [&] {  // both groups where their columns meet
    if (F::kGroups == 2 && low) sync_two_warpgroups(4);
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
      uint16_t* const target = (uint16_t*)a.out + (int64_t)to * a.n + column;
      if (F::kHalves == 2 && a.stream) store_words_to_stay(target, words[i]);
      else store_words(target, words[i]);
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
template <class F>
DEVICE void add_parts(const MoeWgmmaGemm& a, const OpenTile& open, int columns) {
  constexpr int kParts = 6, kAdders = 32 * F::kWarps;
  const int start = open.start, rows = open.rows, from = open.first, to = open.end, tile = open.tile;
  const int parts = ceil_div(columns, F::kRows / 2), fours = a.next.width / 4, thread = thread_index_here() - kFetchers, lane = thread & 31;
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
  if constexpr (F::kGroups == 2) sync_two_warpgroups(4);
  else sync_warpgroup(1);
  if (thread == 0) publish_add((uint32_t*)a.tiles + 3 * tile + 2, kOne);
}

// Of all tiles, where gate_up left it to down: each block adds up its share before it begins, while gate_up's last round leaves it the time.
template <class F>
DEVICE void add_share(const MoeWgmmaGemm& a) {
  for (int tile = (int)blockIdx.x; tile < a.counts[1]; tile += (int)gridDim.x) {
    while ((int)(observe((const uint32_t*)a.tiles + 3 * tile + 2) / kOne) + 1 < a.behind) {}
    add_parts<F>(a, {tile, a.tiles[3 * tile + 1], a.tiles[3 * tile + 2] & kLower, a.ranges[2 * tile], a.ranges[2 * tile + 1]}, a.k);
  }
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
  switch (ceil_div(packed & 255, 8)) {
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
  const int steps = ceil_div(a.k, kK);
  if constexpr (F::kHalves == 1 && F::kCluster == 1) {
    if (a.next.s) add_share<F>(a);
  }
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
      if (open >= 0) add_parts<F>(a, shared.opened[open], a.n);
    }
  }
}

template <class T, class F>
KERNEL void __launch_bounds__(F::kBound, F::kBlocks) gemm(const MoeWgmmaGemm a, const GRID_CONSTANT TensorMap map, Divider top_k) {
#if SM90  // elsewhere an empty kernel, which is never launched: ops/moe_wgmma_gemm.py refuses
  SMEM_DECL;
  const Shared<F> shared(smem_);
  if (thread_index() == 0) {
    for (int i = 0; i < F::kStages; i++) barrier_init(&shared.full[i], kFetchers + 1), barrier_init(&shared.empty[i], F::kWarps * F::kCluster);
    barrier_init(shared.stored, F::kWarps);
    publish_barriers();
  }
  if constexpr (F::kCluster == 2) sync_cluster();
  else sync_block();
  if (warp_index() < kFetchers / 32) {
    give_registers<F::kFetcherRegisters>();
    fetch<F>(a, map, top_k, shared);
  } else {
    take_registers<F::kMultiplierRegisters>();
    multiply<T, F>(a, shared);
  }
  if constexpr (F::kCluster == 2) sync_cluster();  // the other block may still arrive here
#endif
}

// The weights as [experts * halves, n, k] for the copy engine: a box is half of a tile's rows.
int describe(const MoeWgmmaGemm& a, TensorMap* map, int rows) {
  const uint64_t size[3] = {(uint64_t)a.k, (uint64_t)a.n, (uint64_t)a.halves * a.experts}, stride[2] = {(uint64_t)a.k, (uint64_t)a.n * a.k};  // in elements
  const uint32_t box[3] = {kK, (uint32_t)rows / 2, 1};
  return describe_boxes(map, a.w, a.is_bf16, size, stride, box);
}

template <class T, class F>
int enqueue(const MoeWgmmaGemm& a, void* stream) {
  TensorMap map;
  const int error = describe(a, &map, F::kRows);
  if (error != 0) return error;
#ifdef __CUDACC__
  if constexpr (F::kBlocks == 2) {  // else the driver may leave room for one
    const cudaError_t refused = cudaFuncSetAttribute((const void*)gemm<T, F>, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (refused != cudaSuccess) return (int)refused;
  }
#endif
  const Launch how = {(unsigned)a.blocks, F::kThreads, F::kSharedBytes, stream, a.overlap && can_overlap()};
  const Divider top_k = make_divider(a.top_k);
  if constexpr (F::kCluster == 2) return launch_clusters(how, 2, gemm<T, F>, a, map, top_k);
  else return launch(how, gemm<T, F>, a, map, top_k);
}

template <class T, int HALVES>
int dispatch(const MoeWgmmaGemm& a, void* stream) {
  if (a.cluster == 2) return enqueue<T, Form<144, HALVES, 2>>(a, stream);
  if constexpr (HALVES == 2) {
    if (a.tokens == 32 && a.s && a.s_width <= 32) return enqueue<T, Form<32, HALVES, 1, true>>(a, stream);
  }
  if (a.tokens == 72) return enqueue<T, Form<72, HALVES, 1>>(a, stream);
  return a.tokens == 144 ? enqueue<T, Form<144, HALVES, 1>>(a, stream) : enqueue<T, Form<32, HALVES, 1>>(a, stream);
}

}  // namespace

extern "C" int moe_wgmma_gemm(const MoeWgmmaGemm* arguments, void* stream) {
  const MoeWgmmaGemm& a = *arguments;
  if (a.pairs == 0) return 0;
  if (a.is_bf16) return a.halves == 2 ? dispatch<BFloat16, 2>(a, stream) : dispatch<BFloat16, 1>(a, stream);
  return a.halves == 2 ? dispatch<Float16, 2>(a, stream) : dispatch<Float16, 1>(a, stream);
}
