// Small kernels with and without planted errors: what the emulator must compute, and what it must not let pass. Also compiled by nvcc.
#include "hopper_prims.cuh"

// out[i] = in[i] through shared memory by cp.async; WAIT: with the wait that makes it right.
template <bool WAIT>
KERNEL void copy_rows(const uint32_t* in, uint32_t* out) {
  SMEM_DECL;
  uint32_t* rows = (uint32_t*)smem_;
  const int i = thread_index() * 4;
  cp16(rows + i, in + i, true);
  cp_commit();
  cp16(rows + 128 + i, in + 128 + i, thread_index() < 16);  // the second half of the second group is zero-filled
  cp_commit();
  if (WAIT) cp_wait<1>();
  sync_warp();
  for (int k = 0; k < 4; k++) out[i + k] = rows[(i + k + 4) % 128];  // a neighbour's copy
  cp_wait<0>();
  sync_warp();
  for (int k = 0; k < 4; k++) out[128 + i + k] = rows[128 + (i + k + 4) % 128];
}

// out = a[16x16] * b[16x8] by ldmatrix and mma. b is stored [k][n] and loaded transposed.
template <bool BF16>
KERNEL void multiply(const uint16_t* a, const uint16_t* b, float* out) {
  SMEM_DECL;
  uint16_t* shared = (uint16_t*)smem_;  // a: 16 rows of 16; b: 16 rows of 8
  for (int i = thread_index(); i < 256; i += 32) shared[i] = a[i];
  for (int i = thread_index(); i < 128; i += 32) shared[256 + i] = b[i];
  sync_block();
  const int lane = lane_index();
  uint32_t fa[4], fb[4];
  float d[4] = {0, 0, 0, 0};
  load_matrix_x4(fa, shared + (lane % 16) * 16 + lane / 16 * 8);
  load_matrix_x4_transposed(fb, shared + 256 + (lane % 16) * 8);  // matrices 2 and 3 repeat 0 and 1
  const uint32_t b2[2] = {fb[0], fb[1]};
  if (BF16) mma_bf16(d, fa, b2);
  else mma_fp16(d, fa, b2);
  for (int i = 0; i < 4; i++) out[(lane / 4 + (i >> 1) * 8) * 8 + lane % 4 * 2 + (i & 1)] = d[i];
}

// Collectives against what they mean, lane by lane: out[lane][...].
KERNEL void collectives(const int* in, uint32_t* out) {
  const int lane = lane_index(), value = in[lane];
  uint32_t* row = out + lane * 8;
  row[0] = warp_ballot(value & 1);
  row[1] = equal_lanes((uint32_t)value, 4);
  row[2] = shuffle_up((uint32_t)value, 3) + 1000 * shuffle_xor((uint32_t)value, 6);
  row[3] = shuffle((uint32_t)value, 5);
  row[4] = warp_sum((uint32_t)value);
  row[5] = (uint32_t)warp_max(-value);
  row[6] = lanes_below() + (uint32_t)count_bits((uint32_t)value);
  row[7] = (uint32_t)(highest_bit((uint32_t)value) * 100 + lowest_bit((uint32_t)value));
}

// out[block][thread] = what the next block of the cluster has there; BEFORE and AFTER: with the barriers that make it right.
template <bool BEFORE, bool AFTER>
KERNEL void pass_on(const uint32_t* in, uint32_t* out) {
  SMEM_DECL;
  uint32_t* shared = (uint32_t*)smem_;
  const int i = (int)(blockIdx.x * blockDim.x) + thread_index();
  shared[thread_index()] = in[i];
  if (BEFORE) sync_cluster();
  out[i] = load_word_of(shared + thread_index(), (int)((blockIdx.x + 1) % gridDim.x));
  arrive_at_cluster();
  if (AFTER) wait_for_cluster();
}

// Reverse through shared memory; BARRIER: with the barrier that makes it right.
template <bool BARRIER>
KERNEL void reverse(const int* in, int* out) {
  SMEM_DECL;
  int* shared = (int*)smem_;
  shared[thread_index()] = in[thread_index()];
  if (BARRIER) sync_block();
  out[thread_index()] = shared[blockDim.x - 1 - thread_index()];
}

KERNEL void early_return(int* out) {
  if (thread_index() == 7) return;
  sync_block();
  out[thread_index()] = 1;
}

KERNEL void split_warp(uint32_t* out) {
  if (thread_index() < 16) out[thread_index()] = warp_ballot(true);
  else out[thread_index()] = warp_sum(1);
}

KERNEL void overrun(int* out) {
  SMEM_DECL;
  ((int*)smem_)[thread_index() + 1] = thread_index();
  sync_block();
  out[thread_index()] = ((int*)smem_)[thread_index()];
}

KERNEL void pack(const float* in, uint32_t* out) {
  const int i = thread_index();
  out[2 * i] = pack_bf16(in[2 * i], in[2 * i + 1]);
  out[2 * i + 1] = pack_fp16(in[2 * i], in[2 * i + 1]);
}

#ifndef __CUDACC__
#include <cstdio>
#include <string>
#include <vector>

// Reads the kernel's input from stdin, writes its output to stdout: NAME IN_BYTES OUT_BYTES ORDER
int main(int, char** argv) {
  const std::string name = argv[1];
  std::vector<char> in(std::stoul(argv[2])), out(std::stoul(argv[3]));
  emu::order_seed = std::stoul(argv[4]);
  if (!in.empty() && std::fread(in.data(), 1, in.size(), stdin) != in.size()) return 2;
  const auto i = [&](auto* type) { return (decltype(type))in.data(); };
  auto* words = (uint32_t*)out.data();
  auto* ints = (int*)out.data();
  const uint16_t* half = i((uint16_t*)nullptr);
  if (name == "copy") launch({1, 32, 1024, nullptr}, copy_rows<true>, i((uint32_t*)nullptr), words);
  if (name == "copy_without_wait") launch({1, 32, 1024, nullptr}, copy_rows<false>, i((uint32_t*)nullptr), words);
  if (name == "multiply_bf16") launch({1, 32, 768, nullptr}, multiply<true>, half, half + 256, (float*)out.data());
  if (name == "multiply_fp16") launch({1, 32, 768, nullptr}, multiply<false>, half, half + 256, (float*)out.data());
  if (name == "collectives") launch({1, 32, 0, nullptr}, collectives, i((int*)nullptr), words);
  if (name == "reverse") launch({1, 128, 512, nullptr}, reverse<true>, i((int*)nullptr), ints);
  if (name == "reverse_without_barrier") launch({1, 128, 512, nullptr}, reverse<false>, i((int*)nullptr), ints);
  if (name == "pass_on") launch_clusters({4, 32, 128, nullptr}, 4, pass_on<true, true>, i((uint32_t*)nullptr), words);
  if (name == "pass_on_at_once") launch_clusters({4, 32, 128, nullptr}, 4, pass_on<false, true>, i((uint32_t*)nullptr), words);
  if (name == "pass_on_and_leave") launch_clusters({2, 32, 128, nullptr}, 2, pass_on<false, false>, words, words);
  if (name == "early_return") launch({1, 64, 0, nullptr}, early_return, ints);
  if (name == "split_warp") launch({1, 32, 0, nullptr}, split_warp, words);
  if (name == "overrun") launch({1, 32, 128, nullptr}, overrun, ints);
  if (name == "pack") launch({1, 32, 0, nullptr}, pack, i((float*)nullptr), words);
  std::fwrite(out.data(), 1, out.size(), stdout);
  return 0;
}
#else
template __global__ void pass_on<true, true>(const uint32_t*, uint32_t*);
template __global__ void copy_rows<true>(const uint32_t*, uint32_t*);
template __global__ void multiply<true>(const uint16_t*, const uint16_t*, float*);
template __global__ void multiply<false>(const uint16_t*, const uint16_t*, float*);
#endif
