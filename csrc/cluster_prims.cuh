// Clusters whose blocks show each other shared memory, by barriers that wait for nothing stored to global memory, and a count of launches.
// PTX here, the emulator's twins below.
#pragma once
#include "hopper_prims.cuh"

#ifdef __CUDACC__

// As sync_cluster, where all that blocks read of each other is shared memory. Its release for all memory waits until every store of the thread has reached
// L2 (MEMBAR.ALL.GPU in each thread); this one is for objects in this block's shared memory alone, of which there is one copy, in this multiprocessor, where
// neighbours' reads arrive too: MEMBAR.ALL.CTA is all that the compiler makes of it. It does not order what was stored to global memory.
DEVICE void share_with_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// As arrive_at_cluster, with nothing to show: others may overwrite, or leave, what this thread has read of them. The arrival orders nothing by itself: `seen`
// depends on all that was read, and a branch on it, where no arithmetic leads, stands before.
DEVICE void arrive_having_read(float seen) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred never;\nsetp.eq.b32 never, %0, 0xffffffff;\n@never trap;\nbarrier.cluster.arrive.relaxed.aligned;\n}" ::"r"(__float_as_uint(seen)) : "memory");
#endif
}
// From the same place in the shared memory of block `rank` of the cluster, this one being `own`.
DEVICE void load_floats_beside(float (&r)[4], const float* p, int, int rank) { load_floats_of(r, p, rank); }
DEVICE float load_float_beside(const float* p, int, int rank) {
  float value = 0.f;
#if SM90
  asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.f32 %0, [remote];\n}" : "=f"(value) : "r"(shared_address(p)), "r"(rank) : "memory");
#endif
  return value;
}
DEVICE uint32_t load_count(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
// Arithmetic with a word that was asked for stands behind this, and so does the wait for it, which the compiler would otherwise put in front of a loop.
DEVICE void use_here(uint32_t& word) { asm volatile("" : "+r"(word)); }
DEVICE void add_to_count(uint32_t* p, uint32_t value) { asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory"); }
// As launch_clusters, of no more blocks than the device holds at once, which may wait for each other.
template <class... Params, class... Args>
int launch_clusters_together(const Launch& how, unsigned cluster, void (*kernel)(Params...), Args... args) {
  return launch_clusters(how, cluster, kernel, args...);
}

#else  // the emulator: all blocks that run together meet at the barriers of a cluster

inline void share_with_cluster() { sync_cluster(); }
inline void arrive_having_read(float) { arrive_at_cluster(); }
inline void load_floats_beside(float (&r)[4], const float* p, int own, int rank) {
  if (own == rank) return (void)std::memcpy(r, p, 16);
  const uint8_t* shared = emu::cluster[(emu::block.index.x - (unsigned)own) % emu::cluster.size() + (unsigned)rank].shared.get();
  if (shared == nullptr) emu::fail("a read of the shared memory of a block that has ended");
  std::memcpy(r, shared + ((const uint8_t*)p - emu::block.shared.get()), 16);
}
inline float load_float_beside(const float* p, int own, int rank) {
  if (own == rank) return *p;
  const uint8_t* shared = emu::cluster[(emu::block.index.x - (unsigned)own) % emu::cluster.size() + (unsigned)rank].shared.get();
  if (shared == nullptr) emu::fail("a read of the shared memory of a block that has ended");
  return *(const float*)(shared + ((const uint8_t*)p - emu::block.shared.get()));
}
inline uint32_t load_count(const uint32_t* p) { return *p; }
inline void use_here(uint32_t&) {}
inline void add_to_count(uint32_t* p, uint32_t value) { *p += value; }
template <class... Params, class... Args>
int launch_clusters_together(const Launch& how, unsigned, void (*kernel)(Params...), Args... args) {
  return emu::launch(kernel, how.blocks, how.threads, how.shared_bytes, how.blocks, args...);
}

#endif

HOST_DEVICE int pitch_of(int rows) { return rows + (40 - rows % 32) % 32; }  // floats of a token's sums: eight more than a multiple of 32 keep the banks apart
