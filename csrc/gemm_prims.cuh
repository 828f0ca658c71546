// Device instructions of the tensor-core GEMMs, beside prims.cuh, under the same rules. Its like for Hopper is hopper_prims.cuh.
// The emulator's twins stand below them; wgmma exists on the device alone.
#pragma once
#include "prims.cuh"

#ifdef __CUDACC__

DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
DEVICE float exp2_of(float x) {  // within 2^-22
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal(float x) {  // within 2^-23
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float inverse_root(float x) { return rsqrtf(x); }

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
DEVICE uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {  // rounds once, subnormals included
  return as_word(__hfma2(as_vector<__nv_bfloat162>(a), as_vector<__nv_bfloat162>(b), as_vector<__nv_bfloat162>(c)));
}
DEVICE uint32_t double_low(uint32_t pair) { return as_word(__low2bfloat162(as_vector<__nv_bfloat162>(pair))); }  // both halves the low one
DEVICE uint32_t double_high(uint32_t pair) { return as_word(__high2bfloat162(as_vector<__nv_bfloat162>(pair))); }
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
DEVICE void load_words_once(uint32_t (&r)[4], const void* p) {  // leaves L1 to what is read again
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p) : "memory");
}
DEVICE void store_words(void* p, uint32_t a, uint32_t b) { *(uint2*)p = make_uint2(a, b); }
DEVICE void store_words(void* p, const uint32_t (&r)[4]) { *(uint4*)p = make_uint4(r[0], r[1], r[2], r[3]); }

// Four floats that another block wrote in this launch: past L1, which may hold older ones.
DEVICE void load_floats_l2(float (&r)[4], const float* p) {
  const float4 v = __ldcg((const float4*)p);
  r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
DEVICE void store_pair(float* p, const float (&r)[2]) { *(float2*)p = make_float2(r[0], r[1]); }
// Words that blocks of the same launch hand to each other without anything else: each is there or not yet.
DEVICE void store_relaxed(float* p, float value) { asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(value) : "memory"); }
DEVICE float load_relaxed(const float* p) {
  float value;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(p) : "memory");
  return value;
}
DEVICE void load_floats_relaxed(float (&r)[4], const float* p) {
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]) : "l"(p) : "memory");
}
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }  // a line into L2
DEVICE void look_again(const void*) {}  // at a word that was not there yet
DEVICE void load_words_l2(uint32_t (&r)[4], const void* p) {
  const uint4 v = __ldcg((const uint4*)p);
  r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
DEVICE float load_float_l2(const float* p) { return __ldcg(p); }
DEVICE void load_floats(float (&r)[4], const float* p) {
  const float4 v = *(const float4*)p;
  r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
DEVICE void store_two_floats(float* p, float a, float b) { *(float2*)p = make_float2(a, b); }
DEVICE void store_floats(float* p, const float (&r)[4]) { *(float4*)p = make_float4(r[0], r[1], r[2], r[3]); }

// Count an arrival and learn how many came before: what each block wrote before its own (behind a barrier) is seen by those after it.
DEVICE uint32_t arrive(uint32_t* counter, uint32_t one = 1) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(one) : "memory");
  return before;
}

// The same where nothing is handed over.
DEVICE uint32_t take_ticket(uint32_t* counter, uint32_t one = 1) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(one) : "memory");
  return before;
}

// wgmma (sm_90a): d[64 x N] += a[64 x 16] b[16 x N], one warpgroup, a in registers as m16n8k16 has it (warp w: rows 16 w..), b in shared memory:
// N rows of 64 values, their 16-byte pieces swizzled by the row's last three bits, at a multiple of 1,024 bytes. d is as m16n8's, eight by eight columns.
DEVICE void wgmma_begin() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
DEVICE void wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int PENDING>
DEVICE void wgmma_wait() {  // until at most PENDING of the newest groups are under way
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}
// These registers are computed before what follows, which the compiler would otherwise be free to turn round.
DEVICE void hold_here(uint32_t (&fragments)[2][2][4]) {
#pragma unroll
  for (int i = 0; i < 16; i++) asm volatile("" : "+r"(fragments[i / 8][i / 4 % 2][i % 4])::"memory");
}
template <class T>
DEVICE void hold_here(T*& address) {
  asm volatile("" : "+l"(address));
}
// Between this thread's finished copies into shared memory and the barrier before a wgmma that reads them.
DEVICE void publish_to_wgmma() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEVICE uint64_t wgmma_matrix(const void* p) { return ((uint64_t)(shared_address(p) & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
template <int NT>  // eights of columns; d may have more
DEVICE void wgmma_bf16(float (*d)[4], const uint32_t (&a)[4], uint64_t b);
template <int NT>
DEVICE void wgmma_fp16(float (*d)[4], const uint32_t (&a)[4], uint64_t b);
// The registers of so many eights of columns, in the text of an instruction.
#define LIST_1 "%0,%1,%2,%3"
#define LIST_2 LIST_1 ",%4,%5,%6,%7"
#define LIST_3 LIST_2 ",%8,%9,%10,%11"
#define LIST_4 LIST_3 ",%12,%13,%14,%15"
#define LIST_5 LIST_4 ",%16,%17,%18,%19"
#define LIST_6 LIST_5 ",%20,%21,%22,%23"
#define LIST_7 LIST_6 ",%24,%25,%26,%27"
#define LIST_8 LIST_7 ",%28,%29,%30,%31"
#define LIST_9 LIST_8 ",%32,%33,%34,%35"
#define LIST_10 LIST_9 ",%36,%37,%38,%39"
#define LIST_11 LIST_10 ",%40,%41,%42,%43"
#define LIST_12 LIST_11 ",%44,%45,%46,%47"
#define LIST_13 LIST_12 ",%48,%49,%50,%51"
#define LIST_14 LIST_13 ",%52,%53,%54,%55"
#define LIST_15 LIST_14 ",%56,%57,%58,%59"
#define LIST_16 LIST_15 ",%60,%61,%62,%63"
#define LIST_17 LIST_16 ",%64,%65,%66,%67"
#define LIST_18 LIST_17 ",%68,%69,%70,%71"
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Both for NT eights: COLUMNS = 8 NT, DS the registers of d in the text, AS those of a and B that of b behind them; the operands of d follow.
#define WGMMA(NT, COLUMNS, DS, AS, B, ...) \
  WGMMA_TYPE(wgmma_bf16, "bf16", NT, COLUMNS, DS, AS, B, __VA_ARGS__) \
  WGMMA_TYPE(wgmma_fp16, "f16", NT, COLUMNS, DS, AS, B, __VA_ARGS__)
#define WGMMA_TYPE(NAME, TYPE, NT, COLUMNS, DS, AS, B, ...) \
  template <> \
  DEVICE void NAME<NT>(float (*d)[4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" DS "}, {" AS "}, " B ", 1, 1, 1, 0;" \
                 : __VA_ARGS__ \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
#define D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define D8(i) D4(i), D4(i + 1)
#define D16(i) D8(i), D8(i + 2)
WGMMA(2, "16", LIST_2, "%8, %9, %10, %11", "%12", D8(0))
WGMMA(4, "32", LIST_4, "%16, %17, %18, %19", "%20", D16(0))
WGMMA(6, "48", LIST_6, "%24, %25, %26, %27", "%28", D16(0), D8(4))
WGMMA(8, "64", LIST_8, "%32, %33, %34, %35", "%36", D16(0), D16(4))
WGMMA(9, "72", LIST_9, "%36, %37, %38, %39", "%40", D16(0), D16(4), D4(8))
WGMMA(10, "80", LIST_10, "%40, %41, %42, %43", "%44", D16(0), D16(4), D8(8))
WGMMA(11, "88", LIST_11, "%44, %45, %46, %47", "%48", D16(0), D16(4), D8(8), D4(10))
WGMMA(12, "96", LIST_12, "%48, %49, %50, %51", "%52", D16(0), D16(4), D16(8))
WGMMA(13, "104", LIST_13, "%52, %53, %54, %55", "%56", D16(0), D16(4), D16(8), D4(12))
WGMMA(14, "112", LIST_14, "%56, %57, %58, %59", "%60", D16(0), D16(4), D16(8), D8(12))
WGMMA(15, "120", LIST_15, "%60, %61, %62, %63", "%64", D16(0), D16(4), D16(8), D8(12), D4(14))
WGMMA(16, "128", LIST_16, "%64, %65, %66, %67", "%68", D16(0), D16(4), D16(8), D16(12))
WGMMA(17, "136", LIST_17, "%68, %69, %70, %71", "%72", D16(0), D16(4), D16(8), D16(12), D4(16))
WGMMA(18, "144", LIST_18, "%72, %73, %74, %75", "%76", D16(0), D16(4), D16(8), D16(12), D8(16))
#undef D16
#undef D8
#undef D4
#undef WGMMA_TYPE
#undef WGMMA
#else
template <int NT>
DEVICE void wgmma_bf16(float (*)[4], const uint32_t (&)[4], uint64_t) {}
template <int NT>
DEVICE void wgmma_fp16(float (*)[4], const uint32_t (&)[4], uint64_t) {}
#endif

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
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float exp2_of(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float inverse_root(float x) { return 1.f / std::sqrt(x); }
inline float low_bf16(uint32_t pair) { return emu::from_bf16((uint16_t)pair); }
inline float high_bf16(uint32_t pair) { return emu::from_bf16((uint16_t)(pair >> 16)); }
inline float low_fp16(uint32_t pair) { return emu::from_fp16((uint16_t)pair); }
inline float high_fp16(uint32_t pair) { return emu::from_fp16((uint16_t)(pair >> 16)); }
inline uint32_t subtract_bf16(uint32_t a, uint32_t b) { return pack_bf16(low_bf16(a) - low_bf16(b), high_bf16(a) - high_bf16(b)); }
inline uint32_t subtract_fp16(uint32_t a, uint32_t b) { return pack_fp16(low_fp16(a) - low_fp16(b), high_fp16(a) - high_fp16(b)); }
inline uint32_t multiply_bf16(uint32_t a, uint32_t b) { return pack_bf16(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b)); }
inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {  // exact in float64 for our operands, so that it rounds once
  return pack_bf16((float)((double)low_bf16(a) * low_bf16(b) + low_bf16(c)), (float)((double)high_bf16(a) * high_bf16(b) + high_bf16(c)));
}
inline uint32_t double_low(uint32_t pair) { return pair << 16 | (pair & 0xffff); }
inline uint32_t double_high(uint32_t pair) { return pair >> 16 | (pair & 0xffff0000u); }
inline uint32_t multiply_fp16(uint32_t a, uint32_t b) { return pack_fp16(low_fp16(a) * low_fp16(b), high_fp16(a) * high_fp16(b)); }
inline void load_words(uint32_t (&r)[4], const void* p) { std::memcpy(r, p, 16); }
inline void load_words_once(uint32_t (&r)[4], const void* p) { load_words(r, p); }
inline void load_words(uint32_t (&r)[2], const void* p) { std::memcpy(r, p, 8); }
inline void store_words(void* p, uint32_t a, uint32_t b) {
  const uint32_t words[2] = {a, b};
  if ((uintptr_t)p % 8 != 0) emu::fail("store_words: the address is not a multiple of 8");
  std::memcpy(p, words, 8);
}
inline void store_words(void* p, const uint32_t (&r)[4]) {
  if ((uintptr_t)p % 16 != 0) emu::fail("store_words: the address is not a multiple of 16");
  std::memcpy(p, r, 16);
}
inline void load_floats_l2(float (&r)[4], const float* p) { std::memcpy(r, p, 16); }
inline void store_pair(float* p, const float (&r)[2]) { std::memcpy(p, r, 8); }
inline void store_relaxed(float* p, float value) { *p = value; }
inline float load_relaxed(const float* p) { return *p; }
inline void load_floats_relaxed(float (&r)[4], const float* p) { std::memcpy(r, p, 16); }
inline void prefetch(const void*) {}
inline void look_again(const void* word) { emu::wait_for(*(const unsigned*)word); }
inline void load_words_l2(uint32_t (&r)[4], const void* p) { std::memcpy(r, p, 16); }
inline float load_float_l2(const float* p) { return *p; }
inline void load_floats(float (&r)[4], const float* p) { std::memcpy(r, p, 16); }
inline void store_two_floats(float* p, float a, float b) { p[0] = a, p[1] = b; }
inline void store_floats(float* p, const float (&r)[4]) { std::memcpy(p, r, 16); }
inline uint32_t arrive(uint32_t* counter, uint32_t one = 1) { return (*counter += one) - one; }
inline uint32_t take_ticket(uint32_t* counter, uint32_t one = 1) { return (*counter += one) - one; }
inline void hold_here(uint32_t (&)[2][2][4]) {}
template <class T>
void hold_here(T*&) {}
// In hopper_prims.cuh, as is what goes with them.
template <int NT>
void wgmma_bf16(float (*d)[4], const uint32_t (&a)[4], uint64_t b);
template <int NT>
void wgmma_fp16(float (*d)[4], const uint32_t (&a)[4], uint64_t b);

#endif

// Eight 16-bit values from any address that holds them, of which the first `count` count, the others become zero.
DEVICE void load_piece(uint8_t* target, const uint16_t* source, int count, bool aligned) {
  if (aligned || count <= 0) return cp16(target, source, count > 0);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = (2 * i < count ? source[2 * i] : 0u) | (2 * i + 1 < count ? (uint32_t)source[2 * i + 1] << 16 : 0u);
  store_words(target, words[0], words[1]);
  store_words(target + 8, words[2], words[3]);
}

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
  template <int NT>
  DEVICE static void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {
    wgmma_bf16<NT>(d, a, b);
  }
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
  template <int NT>
  DEVICE static void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {
    wgmma_fp16<NT>(d, a, b);
  }
};
