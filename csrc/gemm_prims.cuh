// Device instructions of the tensor-core GEMMs, beside prims.cuh, under the same rules: the only other file with PTX and intrinsics.
// The emulator's twins stand below them; wgmma exists on the device alone.
#pragma once
#include "prims.cuh"

#ifdef __CUDACC__

DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

template <class Vector>
DEVICE uint32_t as_word(Vector v) {
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <class Vector>
DEVICE Vector as_vector(uint32_t word) {
  return *reinterpret_cast<const Vector*>(&word);
}
DEVICE uint32_t subtract_bf16(uint32_t a, uint32_t b) { return as_word(__hsub2(as_vector<__nv_bfloat162>(a), as_vector<__nv_bfloat162>(b))); }
DEVICE uint32_t subtract_fp16(uint32_t a, uint32_t b) { return as_word(__hsub2(as_vector<__half2>(a), as_vector<__half2>(b))); }
DEVICE uint32_t multiply_bf16(uint32_t a, uint32_t b) { return as_word(__hmul2(as_vector<__nv_bfloat162>(a), as_vector<__nv_bfloat162>(b))); }
DEVICE uint32_t multiply_fp16(uint32_t a, uint32_t b) { return as_word(__hmul2(as_vector<__half2>(a), as_vector<__half2>(b))); }
DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float low_fp16(uint32_t pair) { return __low2float(as_vector<__half2>(pair)); }
DEVICE float high_fp16(uint32_t pair) { return __high2float(as_vector<__half2>(pair)); }

DEVICE void load_words(uint32_t (&r)[4], const void* p) {
  const uint4 v = *(const uint4*)p;
  r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
DEVICE void load_words(uint32_t (&r)[2], const void* p) {
  const uint2 v = *(const uint2*)p;
  r[0] = v.x, r[1] = v.y;
}
DEVICE void store_words(void* p, uint32_t a, uint32_t b) { *(uint2*)p = make_uint2(a, b); }

// Four floats that another block wrote in this launch: past L1, which may hold older ones.
DEVICE void load_floats_l2(float (&r)[4], const float* p) {
  const float4 v = __ldcg((const float4*)p);
  r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
DEVICE void store_floats(float* p, const float (&r)[4]) { *(float4*)p = make_float4(r[0], r[1], r[2], r[3]); }

// Count an arrival and learn how many came before: what each block wrote before its own (behind a barrier) is seen by those after it.
DEVICE uint32_t arrive(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// How L2 keeps what cp16_with brings: evicted first (read once), or as usual.
DEVICE uint64_t l2_policy(bool read_once) {
  uint64_t once, usual;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(usual));
  return read_once ? once : usual;
}
DEVICE void cp16_with(void* target, const void* source, bool predicate, uint64_t policy) {
  const int bytes = predicate ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(target)), "l"(source), "r"(bytes), "l"(policy) : "memory");
}

#else

inline uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float low_bf16(uint32_t pair) { return emu::from_bf16((uint16_t)pair); }
inline float high_bf16(uint32_t pair) { return emu::from_bf16((uint16_t)(pair >> 16)); }
inline float low_fp16(uint32_t pair) { return emu::from_fp16((uint16_t)pair); }
inline float high_fp16(uint32_t pair) { return emu::from_fp16((uint16_t)(pair >> 16)); }
inline uint32_t subtract_bf16(uint32_t a, uint32_t b) { return pack_bf16(low_bf16(a) - low_bf16(b), high_bf16(a) - high_bf16(b)); }
inline uint32_t subtract_fp16(uint32_t a, uint32_t b) { return pack_fp16(low_fp16(a) - low_fp16(b), high_fp16(a) - high_fp16(b)); }
inline uint32_t multiply_bf16(uint32_t a, uint32_t b) { return pack_bf16(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b)); }
inline uint32_t multiply_fp16(uint32_t a, uint32_t b) { return pack_fp16(low_fp16(a) * low_fp16(b), high_fp16(a) * high_fp16(b)); }
inline void load_words(uint32_t (&r)[4], const void* p) { std::memcpy(r, p, 16); }
inline void load_words(uint32_t (&r)[2], const void* p) { std::memcpy(r, p, 8); }
inline void store_words(void* p, uint32_t a, uint32_t b) {
  const uint32_t words[2] = {a, b};
  if ((uintptr_t)p % 8 != 0) emu::fail("store_words: the address is not a multiple of 8");
  std::memcpy(p, words, 8);
}
inline void load_floats_l2(float (&r)[4], const float* p) { std::memcpy(r, p, 16); }
inline void store_floats(float* p, const float (&r)[4]) { std::memcpy(p, r, 16); }
inline uint32_t arrive(uint32_t* counter) { return (*counter)++; }
inline uint64_t l2_policy(bool) { return 0; }
inline void cp16_with(void* target, const void* source, bool predicate, uint64_t) { cp16(target, source, predicate); }

#endif

// The two activation types: packed pairs, and the bits under which an integer in the low bits of a half is itself plus a constant.
struct BFloat16 {
  static constexpr bool kIsBf16 = true;
  static constexpr uint32_t kMagic = 0x43004300u;       // 128 + q for q < 128
  static constexpr uint32_t kMagicBytes = 0x43434343u;  // the high byte of it
  DEVICE static uint32_t subtract(uint32_t a, uint32_t b) { return subtract_bf16(a, b); }
  DEVICE static uint32_t multiply(uint32_t a, uint32_t b) { return multiply_bf16(a, b); }
  DEVICE static uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  DEVICE static float low(uint32_t pair) { return low_bf16(pair); }
  DEVICE static float high(uint32_t pair) { return high_bf16(pair); }
  DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(d, a, b); }
};
struct Float16 {
  static constexpr bool kIsBf16 = false;
  static constexpr uint32_t kMagic = 0x64006400u;  // 1024 + q for q < 1024
  static constexpr uint32_t kMagicBytes = 0x64646464u;
  DEVICE static uint32_t subtract(uint32_t a, uint32_t b) { return subtract_fp16(a, b); }
  DEVICE static uint32_t multiply(uint32_t a, uint32_t b) { return multiply_fp16(a, b); }
  DEVICE static uint32_t pack(float low, float high) { return pack_fp16(low, high); }
  DEVICE static float low(uint32_t pair) { return low_fp16(pair); }
  DEVICE static float high(uint32_t pair) { return high_fp16(pair); }
  DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_fp16(d, a, b); }
};
