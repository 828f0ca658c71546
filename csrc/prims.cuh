// Every device instruction that our kernels use, one name each. What Hopper alone has is in hopper_prims.cuh, what the GEMMs share in gemm_prims.cuh; no other file has PTX.
// Without nvcc the same names come from emulator/emu.h, so that each kernel file also compiles with g++ and runs on a CPU.
//
// Rules for kernels, which the emulator enforces:
//   * warp collectives (warp_ballot, shuffles, ldmatrix, mma) are reached by all 32 lanes; lanes that have no work pass neutral values;
//   * sync_block is reached by every thread of the block: no early return before the last barrier;
//   * shared memory is the one dynamic array `smem_` (SMEM_DECL); nothing in it is zero at start;
//   * threads per block are a multiple of 32, blocks are one-dimensional in threads.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ inline
#define KERNEL __global__
#define SMEM_DECL extern __shared__ __align__(128) uint8_t smem_[]

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE uint32_t warp_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
DEVICE uint32_t shuffle_up(uint32_t value, int delta) { return __shfl_up_sync(0xffffffffu, value, delta); }
DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE uint32_t warp_sum(uint32_t value) { return __reduce_add_sync(0xffffffffu, value); }
DEVICE int warp_max(int value) { return __reduce_max_sync(0xffffffffu, value); }
DEVICE void atomic_add(uint32_t* address, uint32_t value) { atomicAdd(address, value); }
DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
DEVICE int count_bits(uint32_t word) { return __popc(word); }
DEVICE int highest_bit(uint32_t word) { return 31 - __clz((int)word); }  // -1 for 0
DEVICE int lowest_bit(uint32_t word) { return __ffs((int)word) - 1; }    // -1 for 0

// One word from a block to later blocks of the same grid: what was written before publish() is seen after observe() returns that word.
// A block may wait for blocks of lower index only: those are started first.
DEVICE void publish(uint32_t* address, uint32_t value) { asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory"); }
DEVICE void publish_add(uint32_t* address, uint32_t value) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory"); }
DEVICE uint32_t observe(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Programmatic dependent launch (sm_90 and newer, else nothing): the next kernel of the stream, if launched with overlap, may start once
// every block has called allow_next_kernel; it sees this kernel's writes only after its own wait_for_previous_kernel.
DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// cp.async: 16 bytes global -> shared, past L1; zeros where the predicate is false. Data is there only after cp_wait and a barrier.
DEVICE void cp16(void* target, const void* source, bool predicate) {
  const int bytes = predicate ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes) : "memory");
}
DEVICE void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void cp_wait() {  // until at most PENDING of this thread's newest groups are still under way
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ldmatrix: four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16x8] += a[16x16] b[16x8], float32 accumulators, the documented fragment layout of m16n8k16.
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
DEVICE uint32_t pack_fp16(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

struct Launch {
  unsigned blocks, threads;
  size_t shared_bytes;
  void* stream;          // cudaStream_t
  bool overlap = false;  // may start before the previous kernel of the stream has ended: the kernel calls wait_for_previous_kernel
};

// Enqueue a kernel; more than 48 KB of dynamic shared memory is asked for first. Returns a cudaError_t, 0 = success.
template <class... Params, class... Args>
int launch(const Launch& how, void (*kernel)(Params...), Args... args) {
  if (how.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)how.shared_bytes);
    if (error != cudaSuccess) return (int)error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(how.blocks);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = (cudaStream_t)how.stream;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = how.overlap ? 1 : 0;
  return (int)cudaLaunchKernelEx(&config, kernel, args...);
}

// The current device's family: 8 = Ampere and Ada, 9 = Hopper, 10 and more = Blackwell. 0 if it cannot be told.
inline int device_family() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess ? major : 0;
}
// Whether kernels may be launched with overlap on the current device.
inline bool can_overlap() { return device_family() >= 9; }
// Blocks of the largest cluster: data-centre GPUs grant 16 if asked, sm_120 no more than every GPU with clusters.
inline int most_of_cluster() { return device_family() == 9 || device_family() == 10 ? 16 : 8; }

#else
#include "emulator/emu.h"
#endif

HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

DEVICE int thread_index() { return (int)threadIdx.x; }
DEVICE int lane_index() { return (int)(threadIdx.x & 31); }
DEVICE int warp_index() { return (int)(threadIdx.x >> 5); }
DEVICE int warps_per_block() { return (int)(blockDim.x >> 5); }
DEVICE uint32_t lanes_below() { return (1u << lane_index()) - 1u; }
DEVICE uint32_t lanes_upto() { return 0xffffffffu >> (31 - lane_index()); }

// Lanes that hold the same value as this one; values below 2^bits, bits <= 12 and the same for all. A ballot a bit: match.any takes longer
// the more different values a warp holds and serves one warp of a multiprocessor at a time (130 to 170 cycles each, by kernel times on an H200).
DEVICE uint32_t equal_lanes(uint32_t value, int bits) {
  uint32_t equal = 0xffffffffu;
#pragma unroll
  for (int group = 0; group < 12; group += 4) {
    if (group >= bits) break;
#pragma unroll
    for (int bit = group; bit < group + 4; bit++) {  // bits beyond the last are zero in all lanes and change nothing
      const bool set = (value & (1u << bit)) != 0;
      equal &= warp_ballot(set) ^ (set ? 0u : 0xffffffffu);
    }
  }
  return equal;
}

// Division of values below 2^31 by a number known at launch: three instructions instead of some thirty.
struct Divider {
  uint32_t by, factor, shift;
};

inline Divider make_divider(int by) {
  uint32_t shift = 0;
  while ((1u << shift) < (uint32_t)by) shift++;
  return {(uint32_t)by, (uint32_t)((((uint64_t)1 << 32) * (((uint64_t)1 << shift) - (uint64_t)by)) / (uint64_t)by + 1), shift};
}

DEVICE int operator/(int value, Divider d) { return (int)((multiply_high((uint32_t)value, d.factor) + (uint32_t)value) >> d.shift); }
