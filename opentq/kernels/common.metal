// What every Metal kernel of opentq shares: the packed formats, read without a shift.
//
// A code is used where it lies: word & (mask << bits*j) is the code times 2^(bits*j), and the factor 2^-(bits*j) is put
// into the other operand once (the query) or into the result once (the output). Both are exact, because the factors are
// powers of two and a masked code has at most 8 significant bits. "Weighted" means: times that power.
//
//   bits 2, 4, 8   value d: word d*bits/32, bit d*bits%32                  weight 2^(bits * (d % (32/bits)))
//   bits 3         low two bits as above; bit 2 of value d: word D/16 + d/32, bit d%32   weight of the 2-bit field
//   bits 16        one half per value (uncompressed codec, sinks, tail)    weight 1
//   scales         half pairs (scale, zero) per group: x = code * scale + zero

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

static constant constexpr const float OTQ_MASKED = -1e30f;  // a score that is not there; finite, so that any math mode is safe
static constant constexpr const float OTQ_LOWEST = -1e25f;  // the running maximum of nothing: exp2(MASKED - LOWEST) is 0
static constant constexpr const float OTQ_LOG2E = 1.44269504f;

// Exponent of the weight of value d.
template <int BITS>
METAL_FUNC constexpr int otq_shift(int d) {
  return BITS == 16 ? 0 : BITS == 3 ? 2 * (d % 16) : BITS * (d % (32 / BITS));
}

METAL_FUNC float otq_pow2(int e) {
  return as_type<float>(uint(127 + e) << 23);
}

// 32-bit words of one token.
template <int BITS, int D>
METAL_FUNC constexpr int otq_words() {
  return BITS == 3 ? D / 16 + (D + 31) / 32 : D * BITS / 32;
}

// UNIT consecutive values of one token, u units in: the words that hold them.
template <int BITS, int D, int UNIT>
struct OtqUnit {
  static constant constexpr const int N = BITS == 3 ? UNIT / 16 : UNIT * BITS / 32;
  uint w[N];
  uint high;

  METAL_FUNC void load(const device uint* row, int u) {
    if (N % 4 == 0) {
      const device uint4* p = (const device uint4*)(row + u * N);
#pragma clang loop unroll(full)
      for (int i = 0; i < N / 4; i++) {
        uint4 x = p[i];
        w[4 * i] = x.x, w[4 * i + 1] = x.y, w[4 * i + 2] = x.z, w[4 * i + 3] = x.w;
      }
    } else if (N == 2 && BITS != 3) {
      uint2 x = *(const device uint2*)(row + u * N);
      w[0] = x.x, w[N - 1] = x.y;
    } else {
#pragma clang loop unroll(full)
      for (int i = 0; i < N; i++) {
        w[i] = row[u * N + i];
      }
    }
    if (BITS == 3) {
      high = row[D / 16 + u * UNIT / 32] >> (UNIT == 16 ? 16 * (u & 1) : 0);
    }
  }

  // Value d of the unit, weighted. d must be known at compile time.
  METAL_FUNC float get(int d) const {
    if (BITS == 16) {
      half2 pair = as_type<half2>(w[d / 2]);
      return d % 2 ? float(pair.y) : float(pair.x);
    } else if (BITS == 3) {
      float low = float(w[d / 16] & (3u << (2 * (d % 16))));
      float top = float(high & (1u << d));
      // bit 2 counts 4 in the basis of the low field: 4 * 4^(d%16) / 2^d
      return fma(top, 4.0f * float(1u << (2 * (d % 16))) / float(1u << d), low);
    } else {
      return float(w[d * BITS / 32] & (((1u << (BITS & 15)) - 1u) << (d * BITS % 32)));
    }
  }
};

// Four consecutive values of one token from value d0 (a multiple of 4), weighted by 2^(field bits * j), j = 0..3.
template <int BITS, int D>
METAL_FUNC float4 otq_four(const device uint* row, int d0) {
  if (BITS == 16) {
    return float4(((const device half4*)row)[d0 / 4]);
  } else if (BITS == 8) {
    uint w = row[d0 / 4];
    return float4(float(w & 0xffu), float(w & 0xff00u), float(w & 0xff0000u), float(w & 0xff000000u));
  } else if (BITS == 4) {
    uint w = ((const device ushort*)row)[d0 / 4];
    return float4(float(w & 0xfu), float(w & 0xf0u), float(w & 0xf00u), float(w & 0xf000u));
  } else {
    uint w = ((const device uchar*)row)[d0 / 4];
    float4 x = float4(float(w & 3u), float(w & 12u), float(w & 48u), float(w & 192u));
    if (BITS == 3) {
      uint h = uint(((const device uchar*)(row + D / 16))[d0 / 8]) >> (d0 & 4);
      x += float4(float(h & 1u), float(h & 2u), float(h & 4u), float(h & 8u)) * float4(4.0f, 8.0f, 16.0f, 32.0f);
    }
    return x;
  }
}

// Field bits of otq_four's weights.
template <int BITS>
METAL_FUNC constexpr int otq_field() {
  return BITS == 16 ? 0 : BITS == 3 ? 2 : BITS;
}

// R floats that all lanes read from one place.
template <int R>
METAL_FUNC void otq_rows(const threadgroup float* p, thread float* x) {
  if (R % 4 == 0) {
#pragma clang loop unroll(full)
    for (int i = 0; i < R / 4; i++) {
      float4 v = ((const threadgroup float4*)p)[i];
      x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
    }
  } else {
#pragma clang loop unroll(full)
    for (int i = 0; i < R; i++) {
      x[i] = p[i];
    }
  }
}

// Where a key stands among all tokens: dense columns are sinks, then, behind the packed tokens, the tail.
METAL_FUNC int otq_position(int column, int packed, int sink, int tail_start) {
  return column < sink ? column : sink + packed + column - tail_start;
}
