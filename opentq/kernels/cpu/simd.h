// Vectors of the machine under one set of names, chosen at compile time (-march=native decides).
//
//   F   W floats, W = 16 (AVX-512), 8 (AVX2), 4 (NEON and portable)
//   I   4*W bytes, or W int32, or 2*W int16: one code vector or one integer accumulator
//
// Everything above this file is written once in these names. The instructions that matter are
//
//   dot(acc, codes, q):   acc[l] += sum_{j<4} codes_u8[4l + j] * q_s8[4l + j]      (int32 lanes l < W)
//   dot_words(acc, a, b): acc[l] += sum_{j<2} a_s16[2l + j] * b_s16[2l + j]
//
// VNNI and i8mm have it; AVX2 and NEON build it. It is exact everywhere: unsigned codes up to 255, signed q, no saturation.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(OPENTQ_NO_AVX512)
#define OPENTQ_ISA "avx512-vnni"
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(OPENTQ_PORTABLE)
#if defined(__AVXVNNI__)
#define OPENTQ_ISA "avx2-vnni"
#else
#define OPENTQ_ISA "avx2"
#define OPENTQ_WORDS 1  // dot products of words take two instructions, those of bytes three or five
#endif
#define OPENTQ_AVX2 1
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && !defined(OPENTQ_PORTABLE)
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define OPENTQ_ISA "neon-i8mm"
#else
#define OPENTQ_ISA "neon-dotprod"
#endif
#define OPENTQ_NEON 1
#include <arm_neon.h>
#else
#define OPENTQ_ISA "portable"
#define OPENTQ_SLOW_DOT 1
#endif

// Loops over registers must be unrolled completely, or the registers become memory.
#define UNROLL _Pragma("GCC unroll 64")
#define INLINE inline __attribute__((always_inline))

namespace otq {

INLINE float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff, bits;
  if (rest >= 0x7c00) bits = 0x7f800000 | ((rest & 0x3ff) << 13);
  else if (rest >= 0x0400) bits = (rest << 13) + ((127 - 15) << 23);
  else {
    float tiny = float(rest) * 0x1p-24f;
    std::memcpy(&bits, &tiny, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even, overflow to infinity: what every IEEE converter does.
INLINE uint16_t float_to_half(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  const uint16_t sign = uint16_t(x >> 16) & 0x8000;
  x &= 0x7fffffff;
  if (x > 0x7f800000) return sign | 0x7e00;
  if (x >= 0x477ff000) return sign | 0x7c00;
  if (x < 0x38800000) {  // subnormal: adding 0.5 lets the float adder round at 2^-24
    float y;
    std::memcpy(&y, &x, 4);
    y += 0.5f;
    std::memcpy(&x, &y, 4);
    return sign | uint16_t(x - 0x3f000000);
  }
  return sign | uint16_t((x - (112u << 23) + 0xfff + ((x >> 13) & 1)) >> 13);
}

typedef uint16_t Eight __attribute__((vector_size(16)));  // fp16 numbers; widen8 stores them as floats

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(OPENTQ_NO_AVX512)

constexpr int W = 16, MAX_ROWS = 4;
using F = __m512;
using I = __m512i;
INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INLINE F set1(float x) { return _mm512_set1_ps(x); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void widen8(Eight x, float* out) { _mm256_storeu_ps(out, _mm256_cvtph_ps((__m128i)x)); }
INLINE float hmax(F x) { return _mm512_reduce_max_ps(x); }
INLINE float hmin(F x) { return _mm512_reduce_min_ps(x); }
INLINE float hsum(F x) { return _mm512_reduce_add_ps(x); }
INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
INLINE F add_if_above(F a, F b, F x, F y) { return _mm512_mask_add_ps(a, _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), a, b); }  // a + (x > y ? b : 0)
INLINE I round_int(F a) { return _mm512_cvtps_epi32(a); }
// 2^n for integral n >= -126 given as float(n) + 1.5 * 2^23, where `keep` holds, else 0; times p.
INLINE F scale_exp(F p, F magic_n, F t) {
  const __mmask16 keep = _mm512_cmp_ps_mask(t, _mm512_set1_ps(-126.f), _CMP_GE_OQ);
  const I n = _mm512_slli_epi32(_mm512_castps_si512(magic_n), 23);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(keep, _mm512_castps_si512(p), n));
}
INLINE I izero() { return _mm512_setzero_si512(); }
INLINE I iload(const void* p) { return _mm512_loadu_si512(p); }
INLINE I iload_signed(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }  // W bytes
INLINE void istore(void* p, I x) { _mm512_storeu_si512(p, x); }
INLINE I iset8(int x) { return _mm512_set1_epi8(char(x)); }
INLINE I iset32(int32_t x) { return _mm512_set1_epi32(x); }
INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
INLINE I ior(I a, I b) { return _mm512_or_si512(a, b); }
INLINE I shr(I a, int n) { return _mm512_srli_epi16(a, n); }
INLINE I shl(I a, int n) { return _mm512_slli_epi16(a, n); }
INLINE I shl32_16(I a) { return _mm512_slli_epi32(a, 16); }
INLINE I shr32(I a, int n) { return _mm512_srli_epi32(a, n); }
// Bits of a where mask is set, else of b.
INLINE I pick(I mask, I a, I b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }
INLINE I flip(I a, I b) { return _mm512_xor_si512(a, b); }
INLINE I bits_of(F a) { return _mm512_castps_si512(a); }
INLINE I join(I hi, I lo) { return _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo); }
INLINE I imax(I a, I b) { return _mm512_max_epi32(a, b); }
INLINE I iload_words(const void* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }  // of 2 * W signed bytes
INLINE I dot_words(I acc, I a, I b) { return _mm512_dpwssd_epi32(acc, a, b); }
template <bool WIDE> INLINE I dot(I acc, I codes, I q) { return _mm512_dpbusd_epi32(acc, codes, q); }
#if defined(__AVX512VBMI__)
template <int BITS> struct Table {
  I table;
  explicit Table(const uint8_t* p) : table(iload(p)) {}
  INLINE I operator[](I codes) const {
    return BITS <= 4 ? _mm512_shuffle_epi8(table, codes) : _mm512_permutexvar_epi8(codes, table);
  }
};
#else
#define OPENTQ_BOOK_OF_16
INLINE I entries16(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
INLINE I shuffle16(I table, I codes) { return _mm512_shuffle_epi8(table, codes); }
INLINE I by_top_bit(I selector, I a, I b) { return _mm512_mask_blend_epi8(_mm512_movepi8_mask(selector), a, b); }
#endif

#elif defined(OPENTQ_AVX2)

#if defined(OPENTQ_WORDS)
constexpr int W = 8, MAX_ROWS = 4;
#else
constexpr int W = 8, MAX_ROWS = 2;
#endif
using F = __m256;
using I = __m256i;
INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
INLINE F set1(float x) { return _mm256_set1_ps(x); }
INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
INLINE F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void widen8(Eight x, float* out) { store(out, _mm256_cvtph_ps((__m128i)x)); }
INLINE float hmax(F x) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}
INLINE float hmin(F x) { return -hmax(sub(_mm256_setzero_ps(), x)); }
INLINE float hsum(F x) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
INLINE F add_if_above(F a, F b, F x, F y) { return _mm256_add_ps(a, _mm256_and_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ), b)); }
INLINE I round_int(F a) { return _mm256_cvtps_epi32(a); }
INLINE F scale_exp(F p, F magic_n, F t) {
  const F keep = _mm256_cmp_ps(t, _mm256_set1_ps(-126.f), _CMP_GE_OQ);
  const I n = _mm256_slli_epi32(_mm256_castps_si256(magic_n), 23);
  return _mm256_and_ps(keep, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n)));
}
INLINE I izero() { return _mm256_setzero_si256(); }
INLINE I iload(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE I iload_signed(const void* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE void istore(void* p, I x) { _mm256_storeu_si256((__m256i*)p, x); }
INLINE I iset8(int x) { return _mm256_set1_epi8(char(x)); }
INLINE I iset32(int32_t x) { return _mm256_set1_epi32(x); }
INLINE I iand(I a, I b) { return _mm256_and_si256(a, b); }
INLINE I ior(I a, I b) { return _mm256_or_si256(a, b); }
INLINE I shr(I a, int n) { return _mm256_srli_epi16(a, n); }
INLINE I shl(I a, int n) { return _mm256_slli_epi16(a, n); }
INLINE I shl32_16(I a) { return _mm256_slli_epi32(a, 16); }
INLINE I shr32(I a, int n) { return _mm256_srli_epi32(a, n); }
INLINE I pick(I mask, I a, I b) { return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b)); }
INLINE I flip(I a, I b) { return _mm256_xor_si256(a, b); }
INLINE I bits_of(F a) { return _mm256_castps_si256(a); }
INLINE I join(I hi, I lo) { return _mm256_add_epi32(_mm256_slli_epi32(hi, 8), lo); }
INLINE I imax(I a, I b) { return _mm256_max_epi32(a, b); }
INLINE I iload_words(const void* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
INLINE I dot_words(I acc, I a, I b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
#if defined(__AVXVNNI__)
template <bool WIDE> INLINE I dot(I acc, I codes, I q) { return _mm256_dpbusd_avx_epi32(acc, codes, q); }
#endif
#define OPENTQ_BOOK_OF_16
INLINE I entries16(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
INLINE I shuffle16(I table, I codes) { return _mm256_shuffle_epi8(table, codes); }
INLINE I by_top_bit(I selector, I a, I b) { return _mm256_blendv_epi8(a, b, selector); }

#elif defined(OPENTQ_NEON)

constexpr int W = 4, MAX_ROWS = 4;
using F = float32x4_t;
using I = int32x4_t;
INLINE F load(const float* p) { return vld1q_f32(p); }
INLINE void store(float* p, F x) { vst1q_f32(p, x); }
INLINE F set1(float x) { return vdupq_n_f32(x); }
INLINE F add(F a, F b) { return vaddq_f32(a, b); }
INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
INLINE F div(F a, F b) { return vdivq_f32(a, b); }
INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
INLINE F max(F a, F b) { return vmaxnmq_f32(a, b); }
INLINE F min(F a, F b) { return vminnmq_f32(a, b); }
INLINE F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE void widen8(Eight x, float* out) {
  const float16x8_t h = vreinterpretq_f16_u16((uint16x8_t)x);
  store(out, vcvt_f32_f16(vget_low_f16(h))), store(out + 4, vcvt_f32_f16(vget_high_f16(h)));
}
INLINE float hmax(F x) { return vmaxnmvq_f32(x); }
INLINE float hmin(F x) { return vminnmvq_f32(x); }
INLINE float hsum(F x) { return vaddvq_f32(x); }
INLINE F to_float(I a) { return vcvtq_f32_s32(a); }
INLINE F add_if_above(F a, F b, F x, F y) {
  return vaddq_f32(a, vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(x, y), vreinterpretq_u32_f32(b))));
}
INLINE I round_int(F a) { return vcvtnq_s32_f32(a); }
INLINE F scale_exp(F p, F magic_n, F t) {
  const uint32x4_t keep = vcgeq_f32(t, vdupq_n_f32(-126.f));
  const I n = vshlq_n_s32(vreinterpretq_s32_f32(magic_n), 23);
  return vreinterpretq_f32_u32(vandq_u32(keep, vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(p), n))));
}
INLINE I izero() { return vdupq_n_s32(0); }
INLINE I iload(const void* p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p)); }
INLINE I iload_signed(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}
INLINE void istore(void* p, I x) { vst1q_u8((uint8_t*)p, vreinterpretq_u8_s32(x)); }
INLINE I iset8(int x) { return vreinterpretq_s32_s8(vdupq_n_s8(int8_t(x))); }
INLINE I iset32(int32_t x) { return vdupq_n_s32(x); }
INLINE I iand(I a, I b) { return vandq_s32(a, b); }
INLINE I ior(I a, I b) { return vorrq_s32(a, b); }
INLINE I shl(I a, int n) { return vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(a), vdupq_n_s16(int16_t(n)))); }
INLINE I shr(I a, int n) { return shl(a, -n); }
INLINE I shl32_16(I a) { return vshlq_n_s32(a, 16); }
INLINE I shr32(I a, int n) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-n))); }
INLINE I pick(I mask, I a, I b) { return vbslq_s32(vreinterpretq_u32_s32(mask), a, b); }
INLINE I flip(I a, I b) { return veorq_s32(a, b); }
INLINE I bits_of(F a) { return vreinterpretq_s32_f32(a); }
INLINE I join(I hi, I lo) { return vaddq_s32(vshlq_n_s32(hi, 8), lo); }
INLINE I imax(I a, I b) { return vmaxq_s32(a, b); }
INLINE I iload_words(const void* p) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8((const int8_t*)p))); }
INLINE I dot_words(I acc, I a, I b) {
  const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
  return vaddq_s32(acc, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}
template <bool WIDE> INLINE I dot(I acc, I codes, I q) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return vusdotq_s32(acc, vreinterpretq_u8_s32(codes), vreinterpretq_s8_s32(q));
#else
  const int8x16_t s = vreinterpretq_s8_s32(q);
  if (!WIDE) return vdotq_s32(acc, vreinterpretq_s8_s32(codes), s);
  // Signed dot products only: an 8-bit code goes in as 7 bits and its top bit, worth 64 twice.
  const uint8x16_t c = vreinterpretq_u8_s32(codes);
  acc = vdotq_s32(acc, vreinterpretq_s8_u8(vandq_u8(c, vdupq_n_u8(127))), s);
  const int8x16_t top = vreinterpretq_s8_u8(vshlq_n_u8(vshrq_n_u8(c, 7), 6));
  return vdotq_s32(vdotq_s32(acc, top, s), top, s);
#endif
}
template <int BITS> struct Table {
  uint8x16x4_t table;
  explicit Table(const uint8_t* p) : table(vld1q_u8_x4(p)) {}
  INLINE I operator[](I codes) const {
    const uint8x16_t c = vreinterpretq_u8_s32(codes);
    if constexpr (BITS <= 4) return vreinterpretq_s32_u8(vqtbl1q_u8(table.val[0], c));
    else if constexpr (BITS == 5) return vreinterpretq_s32_u8(vqtbl2q_u8({{table.val[0], table.val[1]}}, c));
    else return vreinterpretq_s32_u8(vqtbl4q_u8(table, c));
  }
};

#else  // portable: the vector extension of GCC and Clang, 16 bytes, for whatever the machine has

constexpr int W = 4, MAX_ROWS = 2;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(16)));
typedef int16_t S16 __attribute__((vector_size(16)));
typedef uint32_t U32 __attribute__((vector_size(16)));
INLINE F load(const float* p) { F r; std::memcpy(&r, p, sizeof r); return r; }
INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
INLINE F set1(float x) { return F{x, x, x, x}; }
INLINE F add(F a, F b) { return a + b; }
INLINE F sub(F a, F b) { return a - b; }
INLINE F mul(F a, F b) { return a * b; }
INLINE F div(F a, F b) { return a / b; }
INLINE F fma(F a, F b, F c) { return a * b + c; }
INLINE I bits_of(F a) { return (I)a; }
INLINE I pick(I mask, I a, I b) { return (mask & a) | (~mask & b); }  // bits of a where mask is set, else of b
INLINE F max(F a, F b) { return (F)pick(a > b, (I)a, (I)b); }
INLINE F min(F a, F b) { return (F)pick(a < b, (I)a, (I)b); }
INLINE F load_half(const uint16_t* p) {
  return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
INLINE void widen8(Eight x, float* out) { for (int l = 0; l < 8; l++) out[l] = half_to_float(x[l]); }
INLINE float hmax(F x) { return std::fmax(std::fmax(x[0], x[1]), std::fmax(x[2], x[3])); }
INLINE float hmin(F x) { return std::fmin(std::fmin(x[0], x[1]), std::fmin(x[2], x[3])); }
INLINE float hsum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE I iset32(int32_t x) { return I{x, x, x, x}; }
INLINE F to_float(I a) { return F{float(a[0]), float(a[1]), float(a[2]), float(a[3])}; }
INLINE F add_if_above(F a, F b, F x, F y) { return a + (F)((x > y) & (I)b); }
INLINE I round_int(F a) { return bits_of(a + set1(12582912.f)) - iset32(0x4b400000); }  // |a| < 2^22
INLINE F scale_exp(F p, F magic_n, F t) {
  return (F)((t >= set1(-126.f)) & (I)((U32)p + ((U32)magic_n << 23)));
}
INLINE I izero() { return I{}; }
INLINE I iload(const void* p) { I r; std::memcpy(&r, p, sizeof r); return r; }
INLINE I iload_signed(const void* p) {
  int8_t b[4];
  std::memcpy(b, p, 4);
  return I{b[0], b[1], b[2], b[3]};
}
INLINE void istore(void* p, I x) { std::memcpy(p, &x, sizeof x); }
INLINE I iset8(int x) { return iset32(int32_t(uint32_t(x & 255) * 0x01010101u)); }
INLINE I iand(I a, I b) { return a & b; }
INLINE I ior(I a, I b) { return a | b; }
INLINE I flip(I a, I b) { return a ^ b; }
INLINE I shr(I a, int n) { return (I)((U16)a >> uint16_t(n)); }
INLINE I shl(I a, int n) { return (I)((U16)a << uint16_t(n)); }
INLINE I shl32_16(I a) { return (I)((U32)a << 16); }
INLINE I shr32(I a, int n) { return (I)((U32)a >> n); }
INLINE I join(I hi, I lo) { return hi * 256 + lo; }
INLINE I imax(I a, I b) { return pick(a > b, a, b); }
INLINE I iload_words(const void* p) {
  int8_t b[8];
  std::memcpy(b, p, 8);
  return (I)S16{b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]};
}
INLINE I dot_words(I acc, I a, I b) { return acc + ((I)((U32)a << 16) >> 16) * ((I)((U32)b << 16) >> 16) + (a >> 16) * (b >> 16); }
template <bool WIDE> INLINE I dot(I acc, I codes, I q) {
  // Even and odd bytes apart: a product of an unsigned and a signed byte fits 16 bits, a sum of two doesn't.
  const S16 even = (S16)(codes & iset32(0x00ff00ff)) * ((S16)(shl(q, 8)) >> int16_t(8)), odd = (S16)shr(codes, 8) * ((S16)q >> int16_t(8));
  return acc + ((I)((U32)even << 16) >> 16) + ((I)even >> 16) + ((I)((U32)odd << 16) >> 16) + ((I)odd >> 16);
}
template <int BITS> struct Table {
  const uint8_t* table;
  explicit Table(const uint8_t* p) : table(p) {}
  INLINE I operator[](I codes) const {
    uint8_t c[16];
    istore(c, codes);
    for (uint8_t& x : c) x = table[x];
    return iload(c);
  }
};

#endif

// Table<BITS>(entries)[codes] looks up one byte per code: of 64 entries, of which 2^BITS count and repeat.
#if defined(OPENTQ_BOOK_OF_16)
template <int BITS> struct Table {
  static constexpr int TABLES = BITS <= 4 ? 1 : BITS == 5 ? 2 : 4;
  I table[TABLES];
  explicit Table(const uint8_t* p) {
    for (int i = 0; i < TABLES; i++) table[i] = entries16(p + 16 * i);
  }
  INLINE I operator[](I codes) const {
    if constexpr (BITS <= 4) return shuffle16(table[0], codes);
    return entry(codes, shl(codes, 3), shl(codes, 2));
  }
  // Of a code's low four bits and the rest, each as the highest bit of a byte.
  INLINE I entry(I low, I bit4, I bit5) const {
    const I first = by_top_bit(bit4, shuffle16(table[0], low), shuffle16(table[TABLES > 1], low));
    if constexpr (BITS <= 5) return first;
    return by_top_bit(bit5, first, by_top_bit(bit4, shuffle16(table[TABLES / 2], low), shuffle16(table[TABLES - 1], low)));
  }
};
#endif

// 16 rows of 16 fp16 numbers -> 16 columns of 16 floats, `stride` apart: 8 x 8 at a time by three perfect shuffles.
INLINE void transpose_half(const uint16_t* const* rows, float* out, int stride) {
  for (int corner = 0; corner < 4; corner++) {
    const int row = corner % 2 * 8, column = corner / 2 * 8;
    Eight x[8], y[8];
    UNROLL for (int i = 0; i < 8; i++) std::memcpy(&x[i], rows[row + i] + column, 16);
    UNROLL for (int round = 0; round < 3; round++) {
      UNROLL for (int i = 0; i < 4; i++) {
        y[2 * i] = __builtin_shufflevector(x[i], x[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
      }
      UNROLL for (int i = 0; i < 8; i++) x[i] = y[i];
    }
    UNROLL for (int i = 0; i < 8; i++) widen8(x[i], out + (column + i) * stride + row);
  }
}

// 1.5 * 2^23. A float x with |x| < 2^22 plus MAGIC is rounded to an integer that lies in the low bits of the sum.
constexpr float MAGIC = 12582912.f;

// Codes, a byte each, times integers in [-32512, 32512], four of each to a lane: the integers lie in two planes of 32 bits,
// which are the high and the low bytes of v = 256 * hi + lo, or where words multiply faster the even and the odd integers.
// Integers come as float(v + BIAS) + MAGIC.
#if defined(OPENTQ_WORDS)
constexpr float BIAS = 0.f;
struct Bytes {
  I even, odd;
  INLINE explicit Bytes(I c) : even(iand(c, iset32(0x00ff00ff))), odd(shr(c, 8)) {}
};
struct Sum {
  I all = izero();
  template <bool WIDE> INLINE void add(const Bytes& c, I even, I odd) { all = dot_words(dot_words(all, c.even, even), c.odd, odd); }
  INLINE F value() const { return to_float(all); }
};
INLINE void narrow(const F* v, I& even, I& odd) {
  const I words = iset32(0xffff);
  even = pick(words, bits_of(v[0]), shl32_16(bits_of(v[2]))), odd = pick(words, bits_of(v[1]), shl32_16(bits_of(v[3])));
}
// Where integers of channels from d on, a multiple of four, of row r lie, and how far from there the second plane: the rows
// of one product side by side, so that all of them are read off one address.
INLINE int64_t quad_at(int64_t dim, int64_t r, int64_t d) { return (r / MAX_ROWS * dim + d) * 2 * MAX_ROWS + r % MAX_ROWS * 8; }
INLINE int plane(int) { return 4; }
INLINE void put(int8_t* quad, int plane, int j, float x) {
  const auto v = int16_t(std::fabs(x) <= 32512.f ? x : 0.f);
  std::memcpy(quad + j % 2 * plane + j / 2 * 2, &v, 2);
}
#else
constexpr float BIAS = 128.f;
struct Bytes {
  I all;
  INLINE explicit Bytes(I c) : all(c) {}
};
struct Sum {
  I hi = izero(), lo = izero();
  template <bool WIDE> INLINE void add(const Bytes& c, I high, I low) { hi = dot<WIDE>(hi, c.all, high), lo = dot<WIDE>(lo, c.all, low); }
  INLINE F value() const { return to_float(join(hi, lo)); }
};
INLINE void narrow(const F* v, I& hi, I& lo) {
  const I words = iset32(0xffff), bytes = iset32(0x00ff00ff);
  const I a = pick(words, bits_of(v[0]), shl32_16(bits_of(v[2]))), b = pick(words, bits_of(v[1]), shl32_16(bits_of(v[3])));
  hi = pick(bytes, shr(a, 8), b);
  lo = flip(pick(bytes, a, shl(b, 8)), iset8(-128));
}
INLINE int64_t quad_at(int64_t dim, int64_t r, int64_t d) { return 2 * dim * r + d; }
INLINE int plane(int dim) { return dim; }
INLINE void put(int8_t* quad, int plane, int j, float x) {
  const float y = x + BIAS;
  const int v = std::fabs(y) <= 32768.f ? int(y) : 0;
  quad[j] = int8_t(v >> 8), quad[j + plane] = int8_t((v & 255) - 128);
}
#endif

// 2^t, exactly 0 below t = -126 and for NaN; relative error 2e-7. t must not exceed 127.
INLINE F exp2(F t) {
  const F n = add(t, set1(MAGIC)), f = sub(t, sub(n, set1(MAGIC)));
  F p = fma(set1(0.0013264720f), f, set1(0.0096715136f));
  p = fma(p, f, set1(0.055507338f));
  p = fma(p, f, set1(0.24022242f));
  p = fma(p, f, set1(0.69314698f));
  return scale_exp(fma(p, f, set1(1.f)), n, t);
}

INLINE int32_t word(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// Compilers would rather read an operand again for every product: each product then waits for a load or two.
#if defined(__x86_64__)
INLINE void stay(F& x) { __asm__("" : "+x"(x)); }
#elif defined(__aarch64__)
INLINE void stay(F& x) { __asm__("" : "+w"(x)); }
#else
INLINE void stay(F&) {}
#endif

}  // namespace otq
