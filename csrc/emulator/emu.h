// Host twin of prims.cuh: runs a kernel on a CPU, one block at a time, one fiber per thread.
//
// Meant to fail loudly where a GPU fails rarely:
//   * shared memory is poisoned at the start of each block, with NaN of every type, and allocated at its exact size, so AddressSanitizer sees overruns;
//   * cp.async poisons its target when issued and copies only at the wait that completes its group, so a missing wait shows;
//   * warps run one by one as far as they can, in forward, reverse or shuffled order (emu::order_seed), so a missing barrier shows
//     as a wrong result;
//   * a barrier or collective that some thread never reaches, or different collectives in one warp, stop the program with a sentence.
// Not modelled: the memory model between blocks (they run one after another, those of a cluster in turns), bank conflicts.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "fiber.h"

#define DEVICE inline
#define HOST_DEVICE inline
#define KERNEL static
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define SMEM_DECL uint8_t* const smem_ = emu::block.shared.get()

namespace emu {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Copy {
  void* target;
  const void* source;  // nullptr: zeros
};

struct Thread {
  Fiber fiber;
  bool done = false;
  const unsigned* waits_for = nullptr;  // generation counter of the barrier or warp it is blocked on
  unsigned generation = 0;
  unsigned cluster_generation = 0;        // when it arrived at its cluster's barrier
  std::vector<std::vector<Copy>> groups;  // committed cp.async groups, oldest first
  std::vector<Copy> open;                 // copies since the last commit
};

struct Warp {
  const char* operation = nullptr;  // what the first lane to arrive called
  int arrived = 0;
  unsigned generation = 0;
  void* lane[32] = {};
};

struct Block {
  Dim index, grid, threads;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  int current = 0, arrived = 0, observed = 0;
  unsigned generation = 0;
  size_t left = 0;  // threads that have not ended
  std::unique_ptr<uint8_t[]> shared;
  std::function<void()> body;
};

inline Block block;                 // the running one
inline std::vector<Block> cluster;  // its cluster, with something else in its own place
inline size_t cluster_arrived = 0;  // threads at the cluster's barrier
inline unsigned cluster_generation = 0;
inline uint64_t order_seed = 0;  // 0 forward, 1 reverse, else the seed of a shuffle

[[noreturn]] inline void fail(const char* what, const char* detail = "") {
  std::fprintf(stderr, "emulator: %s%s (block %u, thread %d)\n", what, detail, block.index.x, block.current);
  std::abort();
}

constexpr uint16_t kPoison = 0x7fff;  // NaN in 16 bits and, twice, in 32; as an integer far beyond all that is there

inline void poison(void* memory, size_t bytes) {  // whole values of 16 bits
  std::fill_n((uint16_t*)memory, bytes / 2, kPoison);
}

inline Thread& self() { return block.thread[block.current]; }

inline void wait_for(const unsigned& generation) {
  Thread& me = self();
  me.waits_for = &generation;
  me.generation = generation;
  me.fiber.leave();
}

// Rendezvous of 32 lanes. Each passes a pointer to its own argument; the last to arrive computes for all.
template <class F>
void collective(const char* operation, void* argument, F compute) {
  Warp& warp = block.warp[block.current / 32];
  if (warp.arrived == 0) warp.operation = operation;
  if (std::strcmp(warp.operation, operation) != 0) fail("lanes of one warp are at different collectives: ", operation);
  warp.lane[block.current % 32] = argument;
  if (++warp.arrived < 32) return wait_for(warp.generation);
  compute(warp.lane);
  warp.arrived = 0;
  warp.generation++;
}

inline void run_thread() { block.body(); }

// 0..count-1 forward, backward or shuffled.
inline std::vector<int> make_order(int count, uint64_t salt) {
  std::vector<int> order(count);
  for (int i = 0; i < count; i++) order[i] = order_seed == 1 ? count - 1 - i : i;
  uint64_t state = order_seed + salt;
  for (int i = count - 1; order_seed > 1 && i > 0; i--) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(order[i], order[(state >> 33) % (uint64_t)(i + 1)]);
  }
  return order;
}

// Run one thread until it blocks; whether it could run at all.
inline bool advance(int index) {
  Thread& thread = block.thread[index];
  if (thread.done || (thread.waits_for && *thread.waits_for == thread.generation)) return false;
  thread.waits_for = nullptr;
  block.current = index;
  thread.done = thread.fiber.enter();
  block.left -= thread.done;
  return true;
}

inline void begin_block(unsigned index, size_t shared_bytes) {
  block.index = {index, 0, 0};
  block.shared.reset(new uint8_t[shared_bytes]);
  poison(block.shared.get(), shared_bytes);
  block.arrived = block.observed = 0;
  block.left = block.thread.size();
  for (Warp& warp : block.warp) warp.arrived = 0;
  for (Thread& thread : block.thread) {
    thread.done = false;
    thread.waits_for = nullptr;
    thread.groups.clear();
    thread.open.clear();
    thread.fiber.start(run_thread);
  }
}

// Until no thread can run: each warp as far as it can before the next one, the schedule furthest from lockstep. Whether any could.
inline bool run_block(const std::vector<int>& warps, const std::vector<int>& lanes) {
  bool any = false;
  for (bool moved = true; moved && block.left; any |= moved) {
    moved = false;
    for (int warp : warps)
      for (bool warp_moved = true; warp_moved; moved |= warp_moved) {
        warp_moved = false;
        for (int lane : lanes) warp_moved |= advance(warp * 32 + lane);
      }
  }
  return any;
}

// Blocks run one after another, those of a cluster in turns. A kernel's parameters are copies, as on the device.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared_bytes, unsigned cluster_size, Args... args) {
  if (threads == 0 || threads > 1024 || threads % 32 != 0 || blocks == 0) fail("launch: threads must be a multiple of 32 up to 1024, blocks at least 1");
  if (blocks % cluster_size != 0) fail("launch: blocks must be a multiple of the cluster");
  const std::vector<int> warps = make_order((int)threads / 32, 0), lanes = make_order(32, 1);
  cluster.resize(cluster_size);
  const auto in_each = [](auto what) {
    bool any = false;
    for (Block& other : cluster) {
      std::swap(block, other);
      any |= what();
      std::swap(block, other);
    }
    return any;
  };
  unsigned index = 0;
  while (index < blocks) {
    in_each([&] {
      block.grid = {blocks, 1, 1};
      block.threads = {threads, 1, 1};
      block.thread.resize(threads);
      block.warp.assign(threads / 32, {});
      block.body = [=] { kernel(args...); };
      begin_block(index++, shared_bytes);
      return false;
    });
    while (in_each([&] {
      const bool moved = run_block(warps, lanes);
      if (!block.left) block.shared.reset();
      return moved;
    })) {}
    in_each([] {
      if (block.left) fail("a barrier or collective is not reached by all of its threads");
      return false;
    });
  }
  return 0;
}

inline float from_bf16(uint16_t bits) {
  const uint32_t word = (uint32_t)bits << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
inline uint16_t to_bf16(float value) {  // round to nearest even
  if (std::isnan(value)) return 0x7fff;  // whatever its bits are, which rounding might make a number
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
inline const std::array<float, 1 << 16> fp16_values = [] {  // of all halves: to work one out takes longer than to multiply it
  std::array<float, 1 << 16> values;
  for (int bits = 0; bits < 1 << 16; bits++) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float value = exponent == 0 ? std::ldexp((float)fraction, -24) : exponent == 31 ? (fraction ? NAN : INFINITY) : std::ldexp((float)(fraction | 1024), exponent - 25);
    values[bits] = bits >> 15 ? -value : value;
  }
  return values;
}();
inline float from_fp16(uint16_t bits) { return fp16_values[bits]; }
inline uint16_t to_fp16(float value) {  // round to nearest even; overflow gives infinity
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(size)) return sign | 0x7e00;
  if (size >= 65520.f) return sign | 0x7c00;
  if (size < 6.103515625e-5f) return sign | (uint16_t)std::nearbyint(std::ldexp(size, 24));  // subnormal
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
  return sign | (uint16_t)(((exponent + 14) << 10) + (int)std::nearbyint(std::ldexp(fraction, 11)) - 1024);
}

inline void copy_now(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.source) std::memcpy(copy.target, copy.source, 16);
    else std::memset(copy.target, 0, 16);
  }
}

inline void load_matrix(const char* operation, uint32_t* r, const void* row, bool transposed) {
  struct Argument {
    uint32_t* r;
    const char* row;
  } argument{r, (const char*)row};
  collective(operation, &argument, [transposed](void** lane) {
    for (int l = 0; l < 32; l++)
      for (int m = 0; m < 4; m++) {  // lane l receives row l / 4, columns 2 * (l % 4) and the next, of each matrix
        uint16_t pair[2];
        for (int h = 0; h < 2; h++) {
          const int i = transposed ? l % 4 * 2 + h : l / 4, j = transposed ? l / 4 : l % 4 * 2 + h;
          std::memcpy(&pair[h], ((Argument*)lane[m * 8 + i])->row + j * 2, 2);
        }
        std::memcpy(&((Argument*)lane[l])->r[m], pair, 4);
      }
  });
}

inline void mma(const char* operation, float* d, const uint32_t* a, const uint32_t* b, float (*decode)(uint16_t)) {
  struct Argument {
    float* d;
    const uint32_t *a, *b;
  } argument{d, a, b};
  collective(operation, &argument, [decode](void** lane) {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; l++) {
      const Argument& in = *(Argument*)lane[l];
      for (int h = 0; h < 2; h++) {
        const int shift = 16 * h, column = l % 4 * 2 + h;
        for (int i = 0; i < 4; i++) A[l / 4 + (i & 1) * 8][column + (i >> 1) * 8] = decode((uint16_t)(in.a[i] >> shift));
        for (int i = 0; i < 2; i++) B[column + i * 8][l / 4] = decode((uint16_t)(in.b[i] >> shift));
      }
    }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        const int row = l / 4 + (i >> 1) * 8, column = l % 4 * 2 + (i & 1);
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
        ((Argument*)lane[l])->d[i] += sum;
      }
  });
}

// One value from and to each lane; `compute` fills out[] from in[].
template <class T, class F>
T exchange(const char* operation, T value, F compute) {
  struct Argument {
    T in, out;
  } argument{value, T{}};
  collective(operation, &argument, [&compute](void** lane) {
    for (int l = 0; l < 32; l++) ((Argument*)lane[l])->out = compute(l, [&](int from) { return ((Argument*)lane[from])->in; });
  });
  return argument.out;
}

}  // namespace emu

#define threadIdx (emu::Dim{(unsigned)emu::block.current, 0, 0})
#define blockIdx emu::block.index
#define blockDim emu::block.threads
#define gridDim emu::block.grid

inline void sync_block() {
  if (++emu::block.arrived < (int)emu::block.thread.size()) return emu::wait_for(emu::block.generation);
  emu::block.arrived = 0;
  emu::block.generation++;
}
inline void sync_warp() {
  emu::collective("sync_warp", nullptr, [](void**) {});
}
inline uint32_t warp_ballot(bool predicate) {
  return emu::exchange<uint32_t>("ballot", predicate, [](int, auto from) {
    uint32_t mask = 0;
    for (int l = 0; l < 32; l++) mask |= from(l) << l;
    return mask;
  });
}
inline uint32_t shuffle_up(uint32_t value, int delta) {
  return emu::exchange("shuffle_up", value, [delta](int lane, auto from) { return from(lane >= delta ? lane - delta : lane); });
}
inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return emu::exchange("shuffle_xor", value, [mask](int lane, auto from) { return from(lane ^ mask); });
}
inline uint32_t shuffle(uint32_t value, int source) {  // every lane must name the same source here
  return emu::exchange("shuffle", value, [source](int, auto from) { return from(source & 31); });
}
inline uint32_t warp_sum(uint32_t value) {
  return emu::exchange("warp_sum", value, [](int, auto from) {
    uint32_t sum = 0;
    for (int l = 0; l < 32; l++) sum += from(l);
    return sum;
  });
}
inline int warp_max(int value) {
  return emu::exchange("warp_max", value, [](int, auto from) {
    int most = from(0);
    for (int l = 1; l < 32; l++) most = from(l) > most ? from(l) : most;
    return most;
  });
}
inline void atomic_add(uint32_t* address, uint32_t value) { *address += value; }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
inline void publish(uint32_t* address, uint32_t value) { *address = value; }
inline void publish_add(uint32_t* address, uint32_t value) { *address += value; }
inline uint32_t observe(const uint32_t* address) {  // blocks run in order: what a correct kernel waits for is there
  if (++emu::block.observed > 1 << 20) emu::fail("a block waits for a word that no earlier block has published");
  return *address;
}
inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() {}
inline int count_bits(uint32_t word) { return __builtin_popcount(word); }
inline int highest_bit(uint32_t word) { return word ? 31 - __builtin_clz(word) : -1; }
inline int lowest_bit(uint32_t word) { return __builtin_ffs((int)word) - 1; }

inline void cp16(void* target, const void* source, bool predicate) {
  if ((uintptr_t)target % 16 != 0 || (predicate && (uintptr_t)source % 16 != 0)) emu::fail("cp16: an address is not a multiple of 16");
  emu::poison(target, 16);
  emu::self().open.push_back({target, predicate ? source : nullptr});
}
inline void cp_commit() {
  emu::self().groups.push_back(std::move(emu::self().open));
  emu::self().open.clear();
}
template <int PENDING>
void cp_wait() {
  auto& groups = emu::self().groups;
  while (groups.size() > PENDING) {
    emu::copy_now(groups.front());
    groups.erase(groups.begin());
  }
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { emu::load_matrix("load_matrix_x4", r, row, false); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) { emu::load_matrix("load_matrix_x4_transposed", r, row, true); }
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emu::mma("mma_bf16", d, a, b, emu::from_bf16); }
inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emu::mma("mma_fp16", d, a, b, emu::from_fp16); }
inline uint32_t pack_bf16(float low, float high) { return emu::to_bf16(low) | (uint32_t)emu::to_bf16(high) << 16; }
inline uint32_t pack_fp16(float low, float high) { return emu::to_fp16(low) | (uint32_t)emu::to_fp16(high) << 16; }

struct Launch {
  unsigned blocks, threads;
  size_t shared_bytes;
  void* stream;
  bool overlap = false;
};

template <class... Params, class... Args>
int launch(const Launch& how, void (*kernel)(Params...), Args... args) {
  return emu::launch(kernel, how.blocks, how.threads, how.shared_bytes, 1, args...);
}
inline bool can_overlap() { return true; }
inline int most_of_cluster() { return 16; }
