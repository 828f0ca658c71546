// What the warp-specialised GEMM of sm_90 needs beside prims.cuh: barriers in shared memory, the tensor copy engine, wgmma with both
// operands in shared memory. PTX here, the emulator's twins below. On other architectures the device functions do nothing: never launched there.
#pragma once
#include "gemm_prims.cuh"

#ifdef __CUDACC__

#include <cuda.h>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SM90 1
#else
#define SM90 0
#endif

#define GRID_CONSTANT __grid_constant__
using Barrier = uint64_t;  // in shared memory
using TensorMap = CUtensorMap;

DEVICE void barrier_init(Barrier* barrier, int arrivals) {
#if SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}
DEVICE void publish_barriers() {  // before the block's barrier after barrier_init: the copy engine sees them too
#if SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
DEVICE void barrier_arrive(Barrier* barrier) {
#if SM90
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
DEVICE void barrier_expect(Barrier* barrier, int bytes) {  // an arrival that also waits for so many bytes of the copy engine
#if SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}
DEVICE bool barrier_passed(Barrier* barrier, uint32_t parity) {  // whether the phase of this parity is complete
  uint32_t done = 1;
#if SM90
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
  return done;
}
DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {  // until the phase of this parity is complete
#if SM90
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}
// An arrival once this thread's copies by cp16 so far have landed. Whoever waits passes see_copies before wgmma reads them.
DEVICE void barrier_arrive_after_copies(Barrier* barrier) {
#if SM90
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
DEVICE void see_copies() { publish_to_wgmma(); }
// One thread's copy of contiguous bytes, all addresses and sizes multiples of 16.
DEVICE void copy_bulk(void* target, const void* source, int bytes, Barrier* barrier) {
#if SM90
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(target)), "l"(source), "r"(bytes),
               "r"(shared_address(barrier))
               : "memory");
#endif
}
// What this thread has seen other blocks write, before the tensor copy engine reads it.
DEVICE void publish_rows() {
#if SM90
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
constexpr uint64_t kKeep = 0x1000000000000000, kStream = 0x12F0000000000000;  // how L2 ranks what it reads, as createpolicy makes them: as usual; first to leave
// A box of a three-dimensional tensor into shared memory, in 128-byte rows swizzled as wgmma wants them; its bytes count on `barrier`.
DEVICE void copy_box(void* target, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, uint64_t policy) {
#if SM90
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(target)),
               "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
               : "memory");
#endif
}

DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }  // its first use is soon

// A cluster of two blocks: the same box to the same place in both, counting on the same barrier of each.
DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return (int)rank;
}
DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
DEVICE void arrive_at_cluster() {  // the first half of sync_cluster
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void wait_for_cluster() {  // and the second
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
DEVICE void copy_box_to_both(void* target, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, uint64_t policy) {
#if SM90
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(
                   shared_address(target)),
               "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"((uint16_t)3), "l"(policy)
               : "memory");
#endif
}
DEVICE void barrier_arrive_at(Barrier* barrier, int rank) {  // at the same barrier of that block of the cluster
#if SM90
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}
// A word, and four floats, from the same place in the shared memory of that block of the cluster.
DEVICE uint32_t load_word_of(const uint32_t* p, int rank) {
  uint32_t word = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.u32 %0, [remote];\n}"
      : "=r"(word)
      : "r"(shared_address(p)), "r"(rank));
#endif
  return word;
}
DEVICE void load_floats_of(float (&r)[4], const float* p, int rank) {
#if SM90
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3])
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
#endif
}
template <int REGISTERS>
DEVICE void give_registers() {
#if SM90
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS>
DEVICE void take_registers() {
#if SM90
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
DEVICE void sync_warpgroup(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }  // id 1..: 0 is sync_block's
DEVICE int anew(int value) {  // what is derived from it is derived again, rather than kept
  asm volatile("" : "+r"(value));
  return value;
}
DEVICE int thread_index_here() {  // asked anew, so that what depends on it takes no register before
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
DEVICE void sync_two_warpgroups(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
// Two 8x8 matrices of 16-bit values, transposed: lane l < 16 gives the address of column l % 8 of matrix l / 8, as a row in memory.
DEVICE void store_matrix_x2_transposed(void* row, uint32_t a, uint32_t b) {
#if SM90
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(a), "r"(b) : "memory");
#endif
}
// As launch of prims.cuh, in clusters of so many blocks.
template <class... Params, class... Args>
int launch_clusters(const Launch& how, unsigned cluster, void (*kernel)(Params...), Args... args) {
  if (how.shared_bytes > 48 * 1024) {  // as launch: never lowers the limit below what a kernel has without being asked
    const cudaError_t error = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)how.shared_bytes);
    if (error != cudaSuccess) return (int)error;
  }
  if (cluster > 8) {  // more than every GPU has to grant
    const cudaError_t refused = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (refused != cudaSuccess) return (int)refused;
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster, attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(how.blocks), config.blockDim = dim3(how.threads), config.dynamicSmemBytes = how.shared_bytes, config.stream = (cudaStream_t)how.stream;
  config.attrs = attributes, config.numAttrs = how.overlap ? 2 : 1;
  return (int)cudaLaunchKernelEx(&config, kernel, args...);
}
// As launch, of no more blocks than the device holds at once, which may wait for each other.
template <class... Params, class... Args>
int launch_together(const Launch& how, void (*kernel)(Params...), Args... args) {
  return launch(how, kernel, args...);
}
// 16-bit values [size[2], size[1], size[0]] for the copy engine, lines of size[0] next to each other; the outer strides in elements. Boxes of
// box[2] x box[1] lines of 64 values arrive swizzled by the last three bits of the line.
inline int describe_boxes(TensorMap* map, const void* base, bool is_bf16, const uint64_t (&size)[3], const uint64_t (&stride)[2], const uint32_t (&box)[3]) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode encode = nullptr;  // of the driver: looked up, so that the library needs no driver to load
  if (!encode) {
    cudaDriverEntryPointQueryResult found;
    void* function = nullptr;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return (int)error;
    if (found != cudaDriverEntryPointSuccess) return (int)cudaErrorNotSupported;
    encode = (Encode)function;
  }
  const cuuint64_t sizes[3] = {size[0], size[1], size[2]}, bytes[2] = {stride[0] * 2, stride[1] * 2};
  const cuuint32_t boxes[3] = {box[0], box[1], box[2]}, steps[3] = {1, 1, 1};
  const CUtensorMapDataType type = is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(map, type, 3, const_cast<void*>(base), sizes, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : (int)cudaErrorInvalidValue;
}

// d[64 x 8 NT] (+)= a[64 x 16] b[16 x 8 NT], one warpgroup, both in shared memory: rows of 64 values swizzled by their last three bits;
// accumulate = false: d is overwritten.
#define D4(i) "+f"(d[4 * (i)]), "+f"(d[4 * (i) + 1]), "+f"(d[4 * (i) + 2]), "+f"(d[4 * (i) + 3])
#define SUMS_1 D4(0)
#define SUMS_2 SUMS_1, D4(1)
#define SUMS_3 SUMS_2, D4(2)
#define SUMS_4 SUMS_3, D4(3)
#define SUMS_5 SUMS_4, D4(4)
#define SUMS_6 SUMS_5, D4(5)
#define SUMS_7 SUMS_6, D4(6)
#define SUMS_8 SUMS_7, D4(7)
#define SUMS_9 SUMS_8, D4(8)
#define SUMS_10 SUMS_9, D4(9)
#define SUMS_11 SUMS_10, D4(10)
#define SUMS_12 SUMS_11, D4(11)
#define SUMS_13 SUMS_12, D4(12)
#define SUMS_14 SUMS_13, D4(13)
#define SUMS_15 SUMS_14, D4(14)
#define SUMS_16 SUMS_15, D4(15)
#define SUMS_17 SUMS_16, D4(16)
#define SUMS_18 SUMS_17, D4(17)
#define PRODUCT(TYPE, NT, N, A, B, P)                                                                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST_##NT "}, " A \
               ", " B ", p, 1, 1, 0, 0;\n}"                                                                                                      \
               : SUMS_##NT                                                                                                                      \
               : "l"(a), "l"(b), "r"((int)accumulate))
#define PRODUCTS(TYPE)                                             \
  if constexpr (NT == 1) PRODUCT(TYPE, 1, 8, "%4", "%5", "%6");      \
  if constexpr (NT == 2) PRODUCT(TYPE, 2, 16, "%8", "%9", "%10");    \
  if constexpr (NT == 3) PRODUCT(TYPE, 3, 24, "%12", "%13", "%14");  \
  if constexpr (NT == 4) PRODUCT(TYPE, 4, 32, "%16", "%17", "%18");  \
  if constexpr (NT == 5) PRODUCT(TYPE, 5, 40, "%20", "%21", "%22");  \
  if constexpr (NT == 6) PRODUCT(TYPE, 6, 48, "%24", "%25", "%26");  \
  if constexpr (NT == 7) PRODUCT(TYPE, 7, 56, "%28", "%29", "%30");  \
  if constexpr (NT == 8) PRODUCT(TYPE, 8, 64, "%32", "%33", "%34");  \
  if constexpr (NT == 9) PRODUCT(TYPE, 9, 72, "%36", "%37", "%38");  \
  if constexpr (NT == 10) PRODUCT(TYPE, 10, 80, "%40", "%41", "%42"); \
  if constexpr (NT == 11) PRODUCT(TYPE, 11, 88, "%44", "%45", "%46"); \
  if constexpr (NT == 12) PRODUCT(TYPE, 12, 96, "%48", "%49", "%50"); \
  if constexpr (NT == 13) PRODUCT(TYPE, 13, 104, "%52", "%53", "%54"); \
  if constexpr (NT == 14) PRODUCT(TYPE, 14, 112, "%56", "%57", "%58"); \
  if constexpr (NT == 15) PRODUCT(TYPE, 15, 120, "%60", "%61", "%62"); \
  if constexpr (NT == 16) PRODUCT(TYPE, 16, 128, "%64", "%65", "%66"); \
  if constexpr (NT == 17) PRODUCT(TYPE, 17, 136, "%68", "%69", "%70"); \
  if constexpr (NT == 18) PRODUCT(TYPE, 18, 144, "%72", "%73", "%74")
template <class T, int NT>
DEVICE void multiply_shared(float (&d)[72], uint64_t a, uint64_t b, bool accumulate) {
#if SM90
  if constexpr (T::kIsBf16) {
    PRODUCTS("bf16");
  } else {
    PRODUCTS("f16");
  }
#endif
}

// The second operand of multiply_transposed: lines of 64 values, swizzled likewise, one for each k; columns 64.. `apart` bytes behind.
DEVICE uint64_t wgmma_matrix_transposed(const void* p, int apart) {
  return (uint64_t)((shared_address(p) & 0x3FFFF) >> 4) | (uint64_t)(apart >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
// d[64 x 128] (+)= a[64 x 16] b[16 x 128], a in registers as m16n8k16 has it.
template <class T>
DEVICE void multiply_transposed(float (&d)[72], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
#if SM90
#define TRANSPOSED(TYPE)                                                                                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" LIST_16                     \
               "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}"                                                                                           \
               : SUMS_16                                                                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate))
  if constexpr (T::kIsBf16) TRANSPOSED("bf16");
  else TRANSPOSED("f16");
#undef TRANSPOSED
#endif
}

#else  // the emulator

#define SM90 1

#include <functional>
#include <map>

#define GRID_CONSTANT

struct TensorMap {
  const uint16_t* base;
  int64_t size[3], stride[3];  // in elements
  int box[3];
};
using Barrier = uint64_t;  // only its address counts

namespace emu {

// Phases as mbarrier has them. What the copy engine moves appears at the first wait that it satisfies; until then the target is poisoned.
struct SharedBarrier {
  int arrivals = 0, pending = 0;
  unsigned phase = 0;
  std::vector<std::function<void()>> copies;
};
inline std::map<const void*, SharedBarrier> barriers;

struct Products {  // of one thread: committed groups of wgmma, oldest first, which compute at the wait that completes them
  std::vector<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open;
};
inline std::map<std::pair<unsigned, int>, Products> products;  // by block and thread
inline Products& my_products() { return products[{block.index.x, block.current}]; }

struct GroupBarrier {
  int arrived = 0;
  unsigned generation = 0;
};
inline std::map<std::pair<unsigned, int>, GroupBarrier> group_barriers;  // by block and id

}  // namespace emu

inline void barrier_init(Barrier* barrier, int arrivals) {
  emu::barriers[barrier] = {arrivals, arrivals, 0, {}};
}
inline void publish_barriers() {}
inline void barrier_arrive(Barrier* barrier) {
  emu::SharedBarrier& b = emu::barriers.at(barrier);
  if (--b.pending == 0) b.pending = b.arrivals, b.phase++;
}
inline void barrier_expect(Barrier* barrier, int) { barrier_arrive(barrier); }  // bytes are on their way at once, see copy_box
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  emu::SharedBarrier& b = emu::barriers.at(barrier);
  while ((b.phase & 1) == parity) emu::wait_for(b.phase);
  for (const auto& copy : b.copies) copy();
  b.copies.clear();
}
inline bool barrier_passed(Barrier* barrier, uint32_t parity) { return (emu::barriers.at(barrier).phase & 1) != parity; }
inline uint8_t* swizzled(uint8_t* address) {  // as if shared memory began at a multiple of 1,024
  const int64_t offset = address - emu::block.shared.get();
  return emu::block.shared.get() + (offset ^ (offset >> 7 & 7) << 4);
}
inline void publish_rows() {}
constexpr uint64_t kKeep = 0, kStream = 1;
inline void copy_box(void* target, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, uint64_t) {
  const TensorMap m = *map;
  uint8_t* out = (uint8_t*)target;
  emu::poison(out, (size_t)m.box[0] * m.box[1] * m.box[2] * 2);
  emu::barriers.at(barrier).copies.push_back([=] {
    for (int line = 0; line < m.box[1] * m.box[2]; line++)
      for (int i = 0; i < m.box[0]; i++) {
        const int row = c1 + line % m.box[1], plane = c2 + line / m.box[1];
        const bool inside = c0 + i < m.size[0] && row < m.size[1] && plane < m.size[2];
        const uint16_t value = inside ? m.base[c0 + i + row * m.stride[1] + plane * m.stride[2]] : 0;
        std::memcpy(swizzled(out + line * 128 + 2 * i), &value, 2);
      }
  });
}
inline void prefetch_map(const TensorMap*) {}
inline void barrier_arrive_after_copies(Barrier* barrier) {
  auto& copies = emu::barriers.at(barrier).copies;
  copies.push_back([open = std::move(emu::self().open)] { emu::copy_now(open); });
  emu::self().open.clear();
  barrier_arrive(barrier);
}
inline void see_copies() {}
inline int cluster_rank() { return (int)(emu::block.index.x % emu::cluster.size()); }
inline void arrive_at_cluster() {
  emu::self().cluster_generation = emu::cluster_generation;
  if (++emu::cluster_arrived < emu::cluster.size() * emu::block.thread.size()) return;
  emu::cluster_arrived = 0;
  emu::cluster_generation++;
}
inline void wait_for_cluster() {
  if (emu::self().cluster_generation == emu::cluster_generation) emu::wait_for(emu::cluster_generation);
}
inline void sync_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}
inline uint32_t load_word_of(const uint32_t* p, int rank) {
  if (rank == cluster_rank()) return *p;
  const uint8_t* shared = emu::cluster[(size_t)rank].shared.get();
  if (shared == nullptr) emu::fail("a read of the shared memory of a block that has ended");
  return *(const uint32_t*)(shared + ((const uint8_t*)p - emu::block.shared.get()));
}
// A tile in clusters of two is not emulated.
inline void copy_box_to_both(void*, const TensorMap*, Barrier*, int, int, int, uint64_t) { emu::fail("tiles of clusters are not emulated"); }
inline void barrier_arrive_at(Barrier*, int) { emu::fail("tiles of clusters are not emulated"); }
inline void load_floats_of(float (&r)[4], const float* p, int) { std::memcpy(r, p, 16); }
inline int describe_boxes(TensorMap* map, const void* base, bool, const uint64_t (&size)[3], const uint64_t (&stride)[2], const uint32_t (&box)[3]) {
  map->base = (const uint16_t*)base;
  for (int i = 0; i < 3; i++) map->size[i] = (int64_t)size[i], map->stride[i] = i ? (int64_t)stride[i - 1] : 1, map->box[i] = (int)box[i];
  return 0;
}
template <class... Params, class... Args>
int launch_clusters(const Launch& how, unsigned cluster, void (*kernel)(Params...), Args... args) {
  return emu::launch(kernel, how.blocks, how.threads, how.shared_bytes, cluster, args...);
}
template <class... Params, class... Args>
int launch_together(const Launch& how, void (*kernel)(Params...), Args... args) {
  return emu::launch(kernel, how.blocks, how.threads, how.shared_bytes, how.blocks, args...);
}
template <int REGISTERS>
void give_registers() {}
template <int REGISTERS>
void take_registers() {}
inline void sync_warpgroup(int id, int threads = 128) {
  emu::GroupBarrier& barrier = emu::group_barriers[{emu::block.index.x, id}];
  if (++barrier.arrived < threads) return emu::wait_for(barrier.generation);
  barrier.arrived = 0;
  barrier.generation++;
}
inline int anew(int value) { return value; }
inline int thread_index_here() { return (int)threadIdx.x; }
inline void sync_two_warpgroups(int id) { sync_warpgroup(id, 256); }
inline void store_matrix_x2_transposed(void* row, uint32_t a, uint32_t b) {
  struct Argument {
    uint8_t* row;
    uint32_t value[2];
  } argument{(uint8_t*)row, {a, b}};
  emu::collective("store_matrix", &argument, [](void** lane) {
    for (int l = 0; l < 32; l++)
      for (int m = 0; m < 2; m++)
        for (int h = 0; h < 2; h++) {  // lane l holds row l / 4, columns 2 (l % 4) and the next
          const uint16_t value = (uint16_t)(((Argument*)lane[l])->value[m] >> 16 * h);
          std::memcpy(((Argument*)lane[m * 8 + l % 4 * 2 + h])->row + l / 4 * 2, &value, 2);
        }
  });
}
inline void publish_to_wgmma() {}
inline uint64_t wgmma_matrix(const void* p) { return (uint64_t)((const uint8_t*)p - emu::block.shared.get()) >> 4; }
inline void wgmma_begin() {}
inline void wgmma_commit() {
  auto& p = emu::my_products();
  p.groups.push_back(std::move(p.open));
  p.open.clear();
}
template <int PENDING>
void wgmma_wait() {
  auto& groups = emu::my_products().groups;
  while (groups.size() > PENDING) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}
inline void copy_bulk(void* target, const void* source, int bytes, Barrier* barrier) {
  if (((uintptr_t)target | (uintptr_t)source | (uintptr_t)bytes) % 16 != 0) emu::fail("copy_bulk: an address or a size is not a multiple of 16");
  emu::poison(target, (size_t)bytes);
  emu::barriers.at(barrier).copies.push_back([=] { std::memcpy(target, source, (size_t)bytes); });
}
template <class T>
float decoded(uint16_t bits) {
  return T::kIsBf16 ? emu::from_bf16(bits) : emu::from_fp16(bits);
}
// The value at (row, k) of a swizzled matrix in shared memory.
template <class T>
float value_at(uint64_t matrix, int row, int k) {
  uint16_t bits;
  std::memcpy(&bits, swizzled(emu::block.shared.get() + (matrix << 4) + row * 128 + k * 2), 2);
  return decoded<T>(bits);
}
struct Row {  // sixteen values of it, from k = 0 on
  float values[16];
};
template <class T>
Row row_at(uint64_t matrix, int row) {
  Row found;
  for (int piece = 0; piece < 2; piece++) {
    uint16_t bits[8];
    std::memcpy(bits, swizzled(emu::block.shared.get() + (matrix << 4) + row * 128 + piece * 16), 16);
    for (int e = 0; e < 8; e++) found.values[piece * 8 + e] = decoded<T>(bits[e]);
  }
  return found;
}
// The two rows of a wgmma's first operand that a lane's sums are of, from the warp's registers.
template <class T>
std::array<Row, 2> rows_in_registers(const uint32_t (&a)[4]) {
  struct Argument {
    const uint32_t* a;
    std::array<Row, 2> rows;
  } argument{a, {}};
  emu::collective("wgmma", &argument, [](void** lane) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 32; i++) {  // lane l holds rows l / 4 and that + 8, columns 2 * (l % 4) and the next, and those + 8
        const int row = i / 16, k = i % 16;
        const uint32_t pair = ((Argument*)lane[l / 4 * 4 + k % 8 / 2])->a[row + k / 8 * 2];
        ((Argument*)lane[l])->rows[row].values[k] = decoded<T>((uint16_t)(pair >> 16 * (k & 1)));
      }
  });
  return argument.rows;
}
// A lane's sums of eights of columns, four each: its two rows times columns 2 * (lane % 4) and the next, which are rows of b. Half of all time goes here:
// the sanitizers watch what row_at reads of shared memory.
template <class T>
__attribute__((no_sanitize("address", "undefined"))) void add_products(float* sums, int eights, const std::array<Row, 2>& rows, uint64_t b, int lane) {
  for (int i = 0; i < 2 * eights; i++) {
    const Row column = row_at<T>(b, i / 2 * 8 + lane % 4 * 2 + i % 2);
    for (int half = 0; half < 2; half++)
      for (int k = 0; k < 16; k++) sums[i / 2 * 4 + half * 2 + i % 2] += rows[half].values[k] * column.values[k];
  }
}
template <class T, int NT>
void wgmma_by_registers(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {
  const auto rows = rows_in_registers<T>(a);
  const int lane = lane_index();
  emu::my_products().open.push_back([=] { add_products<T>(d[0], NT, rows, b, lane); });
}
template <int NT>
void wgmma_bf16(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {
  wgmma_by_registers<BFloat16, NT>(d, a, b);
}
template <int NT>
void wgmma_fp16(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {
  wgmma_by_registers<Float16, NT>(d, a, b);
}
template <class T, int NT>
void multiply_shared(float (&d)[72], uint64_t a, uint64_t b, bool accumulate) {
  float* sums = d;
  const int lane = lane_index(), row = warp_index() % 4 * 16 + lane / 4;
  emu::my_products().open.push_back([=] {
    if (!accumulate) std::fill_n(sums, 4 * NT, 0.f);
    add_products<T>(sums, NT, {row_at<T>(a, row), row_at<T>(a, row + 8)}, b, lane);
  });
}
inline uint64_t wgmma_matrix_transposed(const void* p, int apart) { return wgmma_matrix(p) | (uint64_t)(apart >> 4) << 16; }
template <class T>
void multiply_transposed(float (&d)[72], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  const auto rows = rows_in_registers<T>(a);
  const int lane = lane_index();
  float* const sums = d;
  emu::my_products().open.push_back([=] {
    if (!accumulate) std::fill_n(sums, 64, 0.f);
    for (int i = 0; i < 32; i++) {
      const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; k++) {
        const float value = value_at<T>((b & 0xFFFF) + (b >> 16) * (uint64_t)(column / 64), k, column % 64);
        for (int half = 0; half < 2; half++) sums[i / 2 * 4 + half * 2 + i % 2] += rows[half].values[k] * value;
      }
    }
  });
}

#endif

DEVICE int uniform(int value) { return (int)shuffle((uint32_t)value, 0); }  // tells the compiler that a warp agrees: wgmma may not stand where it could not
// Sixteen bytes of a row of 64 columns in shared memory, apart in banks from those of other rows.
DEVICE uint8_t* piece_of(uint8_t* rows, int row, int piece) { return rows + row * 128 + ((piece ^ (row & 7)) << 4); }
