// A small metal_stdlib for Clang on the CPU: what MSL 3.1 gives a compute kernel, and nothing else.
//
// Address spaces are Clang's own (device 1, constant 2, threadgroup 3, thread 0), the attribute Apple's compiler uses
// too, so that mixing them up is a compile error here as there. Everything that involves other lanes is an opaque,
// convergent call into runtime.cpp. No standard header is included: MSL has none of their names.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;  // converts more freely than in MSL 3.1, where a float becomes one only explicitly

#define MSL_CONVERGENT __attribute__((convergent))
#define MSL_PURE __attribute__((const, nothrow))

struct msl_pair {
  float x, y;
};

extern "C" {
ulong msl_reduce(ulong bits, int op, int type) MSL_CONVERGENT;
ulong msl_shuffle(ulong bits, int kind, uint by, ulong fill) MSL_CONVERGENT;
ulong msl_vote(bool value) MSL_CONVERGENT;
void msl_barrier(int flags) MSL_CONVERGENT;
void msl_simd_barrier(int flags) MSL_CONVERGENT;
msl_pair msl_mma(float a0, float a1, float b0, float b1, float c0, float c1) MSL_CONVERGENT;
msl_pair msl_mma_half(half a0, half a1, half b0, half b1, float c0, float c1) MSL_CONVERGENT;
void msl_declare(const volatile void* data, ulong bytes, const char* name);
ulong msl_attribute(int which, int axis) MSL_PURE;
uint msl_matrix_lane() MSL_PURE;
#define MSL_MATH1(f) float msl_##f(float) MSL_PURE;
#define MSL_MATH2(f) float msl_##f(float, float) MSL_PURE;
#define MSL_UNARY(F) F(exp) F(exp2) F(exp10) F(log) F(log2) F(log10) F(sqrt) F(rsqrt) F(sin) F(cos) F(tan) F(sinh) F(cosh) \
  F(tanh) F(asin) F(acos) F(atan) F(asinh) F(acosh) F(atanh) F(sinpi) F(cospi) F(tanpi)
#define MSL_BINARY(F) F(pow) F(powr) F(atan2) F(fmod) F(nextafter) F(divide)
MSL_UNARY(MSL_MATH1)
MSL_BINARY(MSL_MATH2)
float msl_ldexp(float, int) MSL_PURE;
}

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_VERSION__ 320
#define __METAL__ 1
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

// ---- vectors: Clang's ext_vector_type has MSL's swizzles; the constructors are rewritten to msl_make -----------------
#define MSL_VECTORS(T) \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(short) MSL_VECTORS(ushort) MSL_VECTORS(int) MSL_VECTORS(uint)
MSL_VECTORS(long) MSL_VECTORS(ulong) MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat)

template <typename T, int N> struct msl_vec;
#define MSL_VEC_NAMES(T) \
  template <> struct msl_vec<T, 2> { typedef T##2 type; }; \
  template <> struct msl_vec<T, 3> { typedef T##3 type; }; \
  template <> struct msl_vec<T, 4> { typedef T##4 type; };
MSL_VEC_NAMES(char) MSL_VEC_NAMES(uchar) MSL_VEC_NAMES(short) MSL_VEC_NAMES(ushort) MSL_VEC_NAMES(int) MSL_VEC_NAMES(uint)
MSL_VEC_NAMES(long) MSL_VEC_NAMES(ulong) MSL_VEC_NAMES(float) MSL_VEC_NAMES(half) MSL_VEC_NAMES(bfloat)

template <typename V> struct msl_traits { typedef V scalar; static constexpr int n = 1; };
#define MSL_TRAITS(T) \
  template <> struct msl_traits<T##2> { typedef T scalar; static constexpr int n = 2; }; \
  template <> struct msl_traits<T##3> { typedef T scalar; static constexpr int n = 3; }; \
  template <> struct msl_traits<T##4> { typedef T scalar; static constexpr int n = 4; };
MSL_TRAITS(char) MSL_TRAITS(uchar) MSL_TRAITS(short) MSL_TRAITS(ushort) MSL_TRAITS(int) MSL_TRAITS(uint)
MSL_TRAITS(long) MSL_TRAITS(ulong) MSL_TRAITS(float) MSL_TRAITS(half) MSL_TRAITS(bfloat)

template <typename V, typename A> METAL_FUNC constexpr V msl_make(A a) {
  if constexpr (msl_traits<A>::n == 1)
    return V(typename msl_traits<V>::scalar(a));
  else
    return __builtin_convertvector(a, V);
}
template <typename V, typename A, typename B> METAL_FUNC constexpr V msl_make(A a, B b) {
  if constexpr (msl_traits<A>::n == 2 && msl_traits<B>::n == 2)
    return V{a.x, a.y, b.x, b.y};
  else
    return V{typename msl_traits<V>::scalar(a), typename msl_traits<V>::scalar(b)};
}
template <typename V, typename A, typename B, typename C> METAL_FUNC constexpr V msl_make(A a, B b, C c) {
  typedef typename msl_traits<V>::scalar S;
  return V{S(a), S(b), S(c)};
}
template <typename V, typename A, typename B, typename C, typename D>
METAL_FUNC constexpr V msl_make(A a, B b, C c, D d) {
  typedef typename msl_traits<V>::scalar S;
  return V{S(a), S(b), S(c), S(d)};
}

template <typename To, typename From> METAL_FUNC constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, x);
}

namespace metal {

template <typename T, int N> using vec = typename msl_vec<T, N>::type;

// ---- type traits ---------------------------------------------------------------------------------------------------
template <bool B, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool B, typename T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F> struct conditional { typedef T type; };
template <typename T, typename F> struct conditional<false, T, F> { typedef F type; };
template <bool B, typename T, typename F> using conditional_t = typename conditional<B, T, F>::type;
template <typename A, typename B> inline constexpr bool is_same_v = __is_same(A, B);
template <typename A, typename B> struct is_same { static constexpr bool value = __is_same(A, B); };
template <typename A, typename B> inline constexpr bool is_convertible_v = __is_convertible_to(A, B);

template <typename T, T V> struct integral_constant {
  static constexpr T value = V;
  typedef T value_type;
  constexpr operator T() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <typename T> using remove_cv_t = __remove_cv(T);
template <typename T> struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T> struct is_floating_point : bool_constant<__is_floating_point(T) || is_same_v<T, half>> {};
template <typename T> struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <typename T> inline constexpr bool is_integral_v = is_integral<T>::value;

template <typename T> struct numeric_limits;
#define MSL_INT_LIMITS(T, lo, hi) \
  template <> struct numeric_limits<T> { \
    static constexpr T max() { return hi; } \
    static constexpr T min() { return lo; } \
  };
MSL_INT_LIMITS(char, -128, 127) MSL_INT_LIMITS(signed char, -128, 127) MSL_INT_LIMITS(uchar, 0, 255)
MSL_INT_LIMITS(short, -32768, 32767) MSL_INT_LIMITS(ushort, 0, 65535) MSL_INT_LIMITS(int, -2147483647 - 1, 2147483647)
MSL_INT_LIMITS(uint, 0, 4294967295u) MSL_INT_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l)
MSL_INT_LIMITS(ulong, 0, 18446744073709551615ul)
#define MSL_FLOAT_LIMITS(T, hi, lo, inf, nan) \
  template <> struct numeric_limits<T> { \
    static constexpr T max() { return T(hi); } \
    static constexpr T min() { return T(lo); } \
    static constexpr T infinity() { return T(inf); } \
    static constexpr T quiet_NaN() { return T(nan); } \
  };
MSL_FLOAT_LIMITS(float, 3.402823466e38f, 1.175494351e-38f, __builtin_inff(), __builtin_nanf(""))
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, __builtin_inff(), __builtin_nanf(""))
MSL_FLOAT_LIMITS(bfloat, 3.38953139e38f, 1.175494351e-38f, __builtin_inff(), __builtin_nanf(""))

// ---- math -----------------------------------------------------------------------------------------------------------
#define MSL_MINMAX(T) \
  METAL_FUNC T min(T a, T b) { return b < a ? b : a; } \
  METAL_FUNC T max(T a, T b) { return a < b ? b : a; } \
  METAL_FUNC T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
MSL_MINMAX(short) MSL_MINMAX(ushort) MSL_MINMAX(int) MSL_MINMAX(uint) MSL_MINMAX(long) MSL_MINMAX(ulong)
METAL_FUNC int abs(int x) { return x < 0 ? -x : x; }

// MSL: max and min ignore a NaN beside a number.
#define MSL_FLOATS(T) \
  METAL_FUNC T fmax(T a, T b) { return T(__builtin_fmaxf(float(a), float(b))); } \
  METAL_FUNC T fmin(T a, T b) { return T(__builtin_fminf(float(a), float(b))); } \
  METAL_FUNC T max(T a, T b) { return fmax(a, b); } \
  METAL_FUNC T min(T a, T b) { return fmin(a, b); } \
  METAL_FUNC T clamp(T x, T lo, T hi) { return fmin(fmax(x, lo), hi); } \
  METAL_FUNC T abs(T a) { return T(__builtin_fabsf(float(a))); } \
  METAL_FUNC T fabs(T a) { return T(__builtin_fabsf(float(a))); } \
  METAL_FUNC T floor(T a) { return T(__builtin_floorf(float(a))); } \
  METAL_FUNC T ceil(T a) { return T(__builtin_ceilf(float(a))); } \
  METAL_FUNC T rint(T a) { return T(__builtin_rintf(float(a))); } \
  METAL_FUNC T round(T a) { return T(__builtin_roundf(float(a))); } \
  METAL_FUNC T trunc(T a) { return T(__builtin_truncf(float(a))); } \
  METAL_FUNC T fma(T a, T b, T c) { return T(__builtin_fmaf(float(a), float(b), float(c))); } \
  METAL_FUNC bool isnan(T a) { return __builtin_isnan(float(a)); } \
  METAL_FUNC bool isinf(T a) { return __builtin_isinf(float(a)); }
MSL_FLOATS(float)
METAL_FUNC half fmax(half a, half b) { return __builtin_fmaxf16(a, b); }
METAL_FUNC half fmin(half a, half b) { return __builtin_fminf16(a, b); }
METAL_FUNC half max(half a, half b) { return fmax(a, b); }
METAL_FUNC half min(half a, half b) { return fmin(a, b); }
METAL_FUNC half abs(half a) { return __builtin_fabsf16(a); }
METAL_FUNC half fma(half a, half b, half c) { return __builtin_fmaf16(a, b, c); }

#define MSL_DEFINE1(f) \
  METAL_FUNC float f(float x) { return msl_##f(x); } \
  METAL_FUNC half f(half x) { return half(msl_##f(float(x))); }
#define MSL_DEFINE2(f) \
  METAL_FUNC float f(float x, float y) { return msl_##f(x, y); }
MSL_UNARY(MSL_DEFINE1)
MSL_BINARY(MSL_DEFINE2)
METAL_FUNC float ldexp(float x, int k) { return msl_ldexp(x, k); }
namespace fast {
MSL_UNARY(MSL_DEFINE1)
MSL_BINARY(MSL_DEFINE2)
using metal::max; using metal::min; using metal::clamp; using metal::fma;
}
namespace precise {
MSL_UNARY(MSL_DEFINE1)
MSL_BINARY(MSL_DEFINE2)
using metal::fma; using metal::rint; using metal::round;
}
template <typename T> METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
METAL_FUNC uint popcount(uint x) { return __builtin_popcount(x); }
METAL_FUNC uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
METAL_FUNC uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
METAL_FUNC uint extract_bits(uint x, uint offset, uint bits) { return (x >> offset) & ((1u << bits) - 1); }
template <typename V> METAL_FUNC float dot(V a, V b) {
  float s = a.x * b.x + a.y * b.y;
  if constexpr (msl_traits<V>::n > 2) s += a.z * b.z;
  if constexpr (msl_traits<V>::n > 3) s += a.w * b.w;
  return s;
}

// ---- barriers and lanes -----------------------------------------------------------------------------------------------
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
METAL_FUNC mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
METAL_FUNC void threadgroup_barrier(mem_flags f) { msl_barrier(int(f)); }
METAL_FUNC void simdgroup_barrier(mem_flags f) { msl_simd_barrier(int(f)); }

template <typename T> struct msl_code { static constexpr int value = -1; };
template <> struct msl_code<float> { static constexpr int value = 0; };
template <> struct msl_code<half> { static constexpr int value = 1; };
template <> struct msl_code<int> { static constexpr int value = 2; };
template <> struct msl_code<uint> { static constexpr int value = 3; };
template <> struct msl_code<short> { static constexpr int value = 4; };
template <> struct msl_code<ushort> { static constexpr int value = 5; };
template <> struct msl_code<bool> { static constexpr int value = 5; };

template <typename T> METAL_FUNC ulong msl_bits(T x) {
  if constexpr (sizeof(T) == 1) return ulong(__builtin_bit_cast(uchar, x));
  else if constexpr (sizeof(T) == 2) return ulong(__builtin_bit_cast(ushort, x));
  else if constexpr (sizeof(T) == 4) return ulong(__builtin_bit_cast(uint, x));
  else return __builtin_bit_cast(ulong, x);
}
template <typename T> METAL_FUNC T msl_value(ulong u) {
  if constexpr (sizeof(T) == 1) return __builtin_bit_cast(T, uchar(u));
  else if constexpr (sizeof(T) == 2) return __builtin_bit_cast(T, ushort(u));
  else if constexpr (sizeof(T) == 4) return __builtin_bit_cast(T, uint(u));
  else return __builtin_bit_cast(T, u);
}

#define MSL_REDUCE(f, op) \
  template <typename T> METAL_FUNC T f(T x) { \
    if constexpr (msl_traits<T>::n > 1) { \
      T r = x; \
      for (int i = 0; i < msl_traits<T>::n; i++) r[i] = f(typename msl_traits<T>::scalar(x[i])); \
      return r; \
    } else { \
      static_assert(msl_code<T>::value >= 0, "no simd reduction for this type"); \
      return msl_value<T>(msl_reduce(msl_bits(x), op, msl_code<T>::value)); \
    } \
  }
MSL_REDUCE(simd_sum, 0) MSL_REDUCE(simd_product, 1) MSL_REDUCE(simd_max, 2) MSL_REDUCE(simd_min, 3)
MSL_REDUCE(simd_and, 4) MSL_REDUCE(simd_or, 5) MSL_REDUCE(simd_xor, 6) MSL_REDUCE(simd_prefix_inclusive_sum, 7)
MSL_REDUCE(simd_prefix_exclusive_sum, 8) MSL_REDUCE(simd_prefix_inclusive_product, 9)
MSL_REDUCE(simd_prefix_exclusive_product, 10)

#define MSL_SHUFFLE(f, kind) \
  template <typename T> METAL_FUNC T f(T x, ushort by) { \
    if constexpr (sizeof(T) > 8) { \
      T r = x; \
      for (int i = 0; i < msl_traits<T>::n; i++) r[i] = f(typename msl_traits<T>::scalar(x[i]), by); \
      return r; \
    } else { \
      return msl_value<T>(msl_shuffle(msl_bits(x), kind, by, 0)); \
    } \
  }
MSL_SHUFFLE(simd_shuffle, 0) MSL_SHUFFLE(simd_shuffle_xor, 1) MSL_SHUFFLE(simd_shuffle_down, 2)
MSL_SHUFFLE(simd_shuffle_up, 3) MSL_SHUFFLE(simd_broadcast, 4) MSL_SHUFFLE(simd_shuffle_rotate_down, 5)
MSL_SHUFFLE(simd_shuffle_rotate_up, 6) MSL_SHUFFLE(quad_shuffle_xor, 9) MSL_SHUFFLE(quad_shuffle_down, 10)
template <typename T> METAL_FUNC T simd_shuffle_and_fill_down(T x, T fill, ushort by) {
  return msl_value<T>(msl_shuffle(msl_bits(x), 7, by, msl_bits(fill)));
}
template <typename T> METAL_FUNC T simd_shuffle_and_fill_up(T x, T fill, ushort by) {
  return msl_value<T>(msl_shuffle(msl_bits(x), 8, by, msl_bits(fill)));
}
template <typename T> METAL_FUNC T simd_broadcast_first(T x) { return msl_value<T>(msl_shuffle(msl_bits(x), 11, 0, 0)); }
template <typename T> METAL_FUNC T quad_sum(T x) { x += quad_shuffle_xor(x, 1); return x + quad_shuffle_xor(x, 2); }
METAL_FUNC bool simd_all(bool x) { return msl_vote(!x) == 0; }
METAL_FUNC bool simd_any(bool x) { return msl_vote(x) != 0; }

// ---- simdgroup_matrix: 8x8, two elements a lane, in the lane order of Apple's GPUs ----------------------------------
template <typename T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "only 8x8 simdgroup matrices exist");
  T e[2];
  simdgroup_matrix() = default;
  METAL_FUNC explicit simdgroup_matrix(T x) : e{x, x} {}
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <typename T, int R, int C> METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  return simdgroup_matrix<T, R, C>(x);
}
template <typename T, typename P>
METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, P p, ulong stride = 8, ulong2 at = 0, bool swap = false) {
  uint l = msl_matrix_lane(), r = l >> 8, c = l & 255;
  if (swap) {
    m.e[0] = p[(at.x + c) * stride + at.y + r];
    m.e[1] = p[(at.x + c + 1) * stride + at.y + r];
  } else {
    m.e[0] = p[(at.y + r) * stride + at.x + c];
    m.e[1] = p[(at.y + r) * stride + at.x + c + 1];
  }
}
template <typename T, typename P>
METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> m, P p, ulong stride = 8, ulong2 at = 0, bool swap = false) {
  uint l = msl_matrix_lane(), r = l >> 8, c = l & 255;
  if (swap) {
    p[(at.x + c) * stride + at.y + r] = m.e[0];
    p[(at.x + c + 1) * stride + at.y + r] = m.e[1];
  } else {
    p[(at.y + r) * stride + at.x + c] = m.e[0];
    p[(at.y + r) * stride + at.x + c + 1] = m.e[1];
  }
}
template <typename D, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
    simdgroup_matrix<C, 8, 8> c) {
  msl_pair r;
  if constexpr (is_same_v<A, half> && is_same_v<B, half>)
    r = msl_mma_half(a.e[0], a.e[1], b.e[0], b.e[1], float(c.e[0]), float(c.e[1]));
  else
    r = msl_mma(float(a.e[0]), float(a.e[1]), float(b.e[0]), float(b.e[1]), float(c.e[0]), float(c.e[1]));
  d.e[0] = D(r.x);
  d.e[1] = D(r.y);
}
template <typename D, typename A, typename B>
METAL_FUNC void simdgroup_multiply(
    thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<float, 8, 8>(0.0f));
}

struct os_log {
  constexpr os_log(constant const char*, constant const char*) {}
  template <typename... A> void log_debug(constant const char*, A...) const {}
};
}  // namespace metal

// ---- what MLX's bfloat overloads reach for --------------------------------------------------------------------------
template <typename T> struct msl_any_float { typedef T type; };
#define MSL_METAL1(f) METAL_FUNC float __metal_##f(float x, int) { return metal::f(x); }
#define MSL_METAL2(f) METAL_FUNC float __metal_##f(float x, float y, int) { return metal::f(x, y); }
MSL_UNARY(MSL_METAL1)
MSL_METAL1(fabs) MSL_METAL1(floor) MSL_METAL1(ceil) MSL_METAL1(rint) MSL_METAL1(round) MSL_METAL1(trunc)
MSL_METAL2(pow) MSL_METAL2(powr) MSL_METAL2(atan2) MSL_METAL2(fmod) MSL_METAL2(divide) MSL_METAL2(fmax) MSL_METAL2(fmin)
METAL_FUNC float __metal_nextafter(float x, float y) { return metal::nextafter(x, y); }
METAL_FUNC float __metal_ldexp(float x, int k, int) { return metal::ldexp(x, k); }
float __metal_frexp(float x, thread int* exponent);  // declared for MLX's overloads; no kernel here calls it
METAL_FUNC float __metal_frexp(float x, thread int& exponent, int = 0) { return __metal_frexp(x, &exponent); }
METAL_FUNC float __metal_fma(float a, float b, float c) { return metal::fma(a, b, c); }
METAL_FUNC float __metal_fmax3(float a, float b, float c, int) { return metal::fmax(a, metal::fmax(b, c)); }
METAL_FUNC float __metal_fmin3(float a, float b, float c, int) { return metal::fmin(a, metal::fmin(b, c)); }
METAL_FUNC float __metal_fmedian3(float a, float b, float c, int) {
  return metal::fmax(metal::fmin(a, b), metal::fmin(metal::fmax(a, b), c));
}
METAL_FUNC float __metal_fract(float x, int) { return x - metal::floor(x); }
METAL_FUNC ushort __metal_get_simdgroup_size(ushort) { return 32; }
#define MSL_METAL_SIMD(f) \
  template <typename T, typename... A> METAL_FUNC T __metal_##f(T x, A... a) { return metal::f(x, a...); }
MSL_METAL_SIMD(simd_sum) MSL_METAL_SIMD(simd_product) MSL_METAL_SIMD(simd_max) MSL_METAL_SIMD(simd_min)
MSL_METAL_SIMD(simd_xor) MSL_METAL_SIMD(simd_prefix_inclusive_sum) MSL_METAL_SIMD(simd_prefix_exclusive_sum)
MSL_METAL_SIMD(simd_prefix_inclusive_product) MSL_METAL_SIMD(simd_prefix_exclusive_product) MSL_METAL_SIMD(simd_shuffle)
MSL_METAL_SIMD(simd_shuffle_xor) MSL_METAL_SIMD(simd_shuffle_down) MSL_METAL_SIMD(simd_shuffle_up)
MSL_METAL_SIMD(simd_broadcast) MSL_METAL_SIMD(simd_shuffle_rotate_down) MSL_METAL_SIMD(simd_shuffle_rotate_up)
template <typename T, typename... A> METAL_FUNC T __metal_simd_shuffle_and_fill_down(T x, T f, ushort by, A...) {
  return metal::simd_shuffle_and_fill_down(x, f, by);
}
template <typename T, typename... A> METAL_FUNC T __metal_simd_shuffle_and_fill_up(T x, T f, ushort by, A...) {
  return metal::simd_shuffle_and_fill_up(x, f, by);
}

// ---- launch: the arguments of one kernel from a table of pointers and thread attributes ------------------------------
template <typename A> struct msl_arg {  // an attribute
  static METAL_FUNC A get(void** b, int slot) {
    if constexpr (msl_traits<A>::n == 1) {
      return A(msl_attribute(~slot, 0));
    } else {
      A v = 0;
      for (int i = 0; i < msl_traits<A>::n; i++) v[i] = msl_attribute(~slot, i);
      return v;
    }
  }
};
template <typename T> struct msl_arg<T*> {
  static METAL_FUNC T* get(void** b, int slot) { return (T*)(ulong)b[slot]; }
};
template <typename T> struct msl_arg<T&> {
  static METAL_FUNC T& get(void** b, int slot) { return *(T*)(ulong)b[slot]; }
};
template <int... I> struct msl_seq {};
template <int N, int... I> struct msl_count : msl_count<N - 1, N - 1, I...> {};
template <int... I> struct msl_count<0, I...> { typedef msl_seq<I...> type; };
template <typename... A, int N, int... I>
METAL_FUNC void msl_launch(void (*f)(A...), void** b, const int (&slots)[N], msl_seq<I...>) {
  f(msl_arg<A>::get(b, slots[I])...);
}
template <typename... A, int N> METAL_FUNC void msl_launch(void (*f)(A...), void** b, const int (&slots)[N]) {
  static_assert(sizeof...(A) == N, "argument list and slots differ");
  msl_launch(f, b, slots, typename msl_count<N>::type());
}

using namespace metal;
