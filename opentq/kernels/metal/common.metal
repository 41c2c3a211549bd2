// What every Metal kernel of opentq shares: the packed formats, read without a shift.
//
// A code is used where it lies: word & (mask << bits*j) is the code times 2^(bits*j), and the factor 2^-(bits*j) is put
// into the other operand once (the query) or into the result once (the output). Both are exact, because the factors are
// powers of two and a masked code has at most 8 significant bits. "Weighted" means: times that power.
//
//   int 2, 4, 8    value d: word d*bits/32, bit d*bits%32                  weight 2^(bits * (d % (32/bits)))
//   int 3          low two bits as above; bit 2 of value d: word D/16 + d/32, bit d%32   weight of the 2-bit field
//   half           one half per value (uncompressed codec, sinks, tail)    weight 1
//   book 1 to 6    codes of so many bits into a book; 3, 5 and 6 in two planes (2 + 1, 4 + 1, 4 + 2)        weight 1
//   polar          blocks: per 16 channels a radius and the codes of 15 angles (OtqBlock)             weight 1
//   scales         half pairs (scale, zero) per group: x = code * scale + zero; of a book one half: x = book[code] * scale
//
// A book lies in a simdgroup's registers, an entry in each lane, and a look-up is a shuffle: no memory, no conflicts, one
// instruction whatever the bits. So all lanes have to look up together, in uniform control flow. One token may be two runs
// of codes, of one length, with a book, an array and a scale each.

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

static constant constexpr const float OTQ_MASKED = -1e30f;  // a score that is not there; finite, so that any math mode is safe
static constant constexpr const float OTQ_LOWEST = -1e25f;  // the running maximum of nothing: exp2(MASKED - LOWEST) is 0
static constant constexpr const float OTQ_LOG2E = 1.44269504f;

// How one run of keys or values is packed, as `launch.Format`.
enum OtqFormat : int {
  OTQ_NONE,                                                               // a second run that is not there
  OTQ_INT2, OTQ_INT3, OTQ_INT4, OTQ_INT8,                                 // integers
  OTQ_HALF,                                                               // halves
  OTQ_BOOK1, OTQ_BOOK2, OTQ_BOOK3, OTQ_BOOK4, OTQ_BOOK5, OTQ_BOOK6,       // codes into a book
  OTQ_POLAR,                                                              // blocks of angles
};

template <int FORMAT>
METAL_FUNC constexpr bool otq_integers() {
  return FORMAT >= OTQ_INT2 && FORMAT <= OTQ_INT8;
}

// Whether values come from tables in the lanes.
template <int FORMAT>
METAL_FUNC constexpr bool otq_looked_up() {
  return FORMAT >= OTQ_BOOK1;
}

// Bits of a value in the first array; of polar blocks, the 4 that two channels of the first level share.
template <int FORMAT>
METAL_FUNC constexpr int otq_bits() {
  return FORMAT == OTQ_NONE ? 0 : FORMAT == OTQ_POLAR ? 2 : FORMAT >= OTQ_BOOK1 ? FORMAT - OTQ_BOOK1 + 1
      : FORMAT == OTQ_HALF ? 16 : FORMAT == OTQ_INT8 ? 8 : FORMAT - OTQ_INT2 + 2;
}

// Widths of the low and the high plane of codes (0: no high plane).
template <int FORMAT>
METAL_FUNC constexpr int otq_low() {
  return otq_bits<FORMAT>() == 3 ? 2 : otq_bits<FORMAT>() == 5 || otq_bits<FORMAT>() == 6 ? 4 : otq_bits<FORMAT>();
}
template <int FORMAT>
METAL_FUNC constexpr int otq_high() {
  return otq_bits<FORMAT>() == 3 || otq_bits<FORMAT>() == 5 ? 1 : otq_bits<FORMAT>() == 6 ? 2 : 0;
}

// Halves of metadata per token of D channels.
template <int FORMAT, int D, int GROUP>
METAL_FUNC constexpr int otq_halves() {
  return FORMAT == OTQ_POLAR ? D / 16 : FORMAT == OTQ_HALF ? 0 : (otq_looked_up<FORMAT>() ? 1 : 2) * ((D + GROUP - 1) / GROUP);
}

// Exponent of the weight of value d.
template <int FORMAT>
METAL_FUNC constexpr int otq_shift(int d) {
  return !otq_integers<FORMAT>() ? 0 : otq_low<FORMAT>() * (d % (32 / otq_low<FORMAT>()));
}

METAL_FUNC float otq_pow2(int e) {
  return as_type<float>(uint(127 + e) << 23);
}

// 32-bit words of one token, and of its low plane.
template <int FORMAT, int D>
METAL_FUNC constexpr int otq_words() {
  return (D * otq_low<FORMAT>() + 31) / 32 + (D * otq_high<FORMAT>() + 31) / 32;
}
template <int FORMAT, int D>
METAL_FUNC constexpr int otq_low_words() {
  return (D * otq_low<FORMAT>() + 31) / 32;
}

// Bytes of one token in the second array: the codes of a second run of D channels, or a polar block's upper angles.
template <int FORMAT, int SECOND, int D>
METAL_FUNC constexpr int otq_more() {
  return FORMAT == OTQ_POLAR ? (7 * D + 63) / 64 : SECOND ? 4 * otq_words<(SECOND ? SECOND : OTQ_BOOK1), D>() : 0;
}

// (scale, zero) of group i, counted from `scales`.
template <int FORMAT>
METAL_FUNC half2 otq_scale(const device half* scales, int i) {
  return otq_looked_up<FORMAT>() ? half2(scales[i], half(0.0f)) : ((const device half2*)scales)[i];
}

// The lane's part of a book: entry lane % 2^b, or of 6 bits, whose 64 entries are odd (book[63 - c] = -book[c]), the upper
// half. The value of `code`.
template <int FORMAT>
METAL_FUNC float otq_entry(float book, uint code) {
  if (FORMAT == OTQ_BOOK6) {
    float x = simd_shuffle(book, ushort(code & 32u ? code & 31u : code ^ 31u));
    return code & 32u ? x : -x;
  }
  return simd_shuffle(book, ushort(code));
}

// UNIT consecutive fields of WIDTH bits, u units in: the words that hold them. ALIGN: words to whose multiple a row is aligned.
template <int WIDTH, int UNIT, int ALIGN>
struct OtqPlane {
  static constant constexpr const int N = UNIT * WIDTH > 32 ? UNIT * WIDTH / 32 : 1;
  uint w[N];

  METAL_FUNC void load(const device uint* plane, int u) {
    if (N % 4 == 0 && ALIGN % 4 == 0) {
      const device uint4* p = (const device uint4*)(plane + u * N);
#pragma clang loop unroll(full)
      for (int i = 0; i < N / 4; i++) {
        uint4 x = p[i];
        w[4 * i] = x.x, w[4 * i + 1] = x.y, w[4 * i + 2] = x.z, w[4 * i + 3] = x.w;
      }
    } else if (N % 2 == 0 && ALIGN % 2 == 0) {
      const device uint2* p = (const device uint2*)(plane + u * N);
#pragma clang loop unroll(full)
      for (int i = 0; i < N / 2; i++) {
        uint2 x = p[i];
        w[2 * i] = x.x, w[2 * i + 1] = x.y;
      }
    } else {
#pragma clang loop unroll(full)
      for (int i = 0; i < N; i++) {
        w[i] = plane[u * UNIT * WIDTH / 32 + i];
      }
    }
    if (UNIT * WIDTH < 32) {
      w[0] >>= UNIT * WIDTH * (u % (32 / (UNIT * WIDTH)));
    }
  }

  // Field d, which must be known at compile time.
  METAL_FUNC uint get(int d) const {
    return (w[d * WIDTH / 32] >> (d * WIDTH % 32)) & ((1u << WIDTH) - 1u);
  }
};

// Polar: block i of a token. Four levels of angles, of codes of 4, 2, 2 and 2 bits: level 1 in the first array, eight codes
// a word; in the second, bytes, all codes of level 2, then of level 3, then of level 4. Radii are stored divided by 4.
template <int D>
struct OtqBlock {
  uint first, upper;
  float radius;

  METAL_FUNC void load(const device uint* row, const device uchar* rest, const device half* radii, int i) {
    const int at = D / 8 * 3 + i;
    uint pair = uint(rest[D / 16 + i / 2]) >> (4 * (i & 1)), top = uint(rest[at / 4]) >> (2 * (at & 3)) & 3u;
    first = row[i];
    // Level 2; then, for either half of the block, its code of level 3 and that of level 4, in the upper half mirrored.
    upper = uint(rest[i]) | (pair & 3u) << 8 | top << 10 | (pair & 12u) << 10 | (top ^ 3u) << 14;
    radius = float(radii[i]) * 4.0f;
  }

  // Channels 4q to 4q + 3. `low` holds the cosines, then the sines of level 1; `high` cosines: products of levels 3 and 4,
  // then level 2. Angles of these levels lie symmetrically in the quarter circle: a sine is the cosine of the mirrored code.
  METAL_FUNC float4 four(int q, float low, float high) const {
    uint c = (upper >> (8 + 2 * (q & 2)) & 15u) ^ (q & 1 ? 3u : 0u);
    float r = radius * simd_shuffle(high, ushort(c));
    c = upper >> (2 * q) & 3u;
    float a = r * simd_shuffle(high, ushort(16u + c)), b = r * simd_shuffle(high, ushort(19u - c));
    c = first >> (8 * q) & 15u;
    float4 x;
    x.x = a * simd_shuffle(low, ushort(c));
    x.y = a * simd_shuffle(low, ushort(16u + c));
    c = first >> (8 * q + 4) & 15u;
    x.z = b * simd_shuffle(low, ushort(c));
    x.w = b * simd_shuffle(low, ushort(16u + c));
    return x;
  }
};

// UNIT consecutive values of one token, u units in.
template <int FORMAT, int D, int UNIT>
struct OtqUnit {
  static constant constexpr const int LOW = otq_low<FORMAT>(), HIGH = otq_high<FORMAT>(), W = otq_words<FORMAT, D>();
  OtqPlane<LOW, UNIT, W> low;
  OtqPlane<(HIGH > 0 ? HIGH : 1), UNIT, (W % 2 == 0 ? 2 : 1)> high;

  METAL_FUNC void load(const device uint* row, const device uchar*, const device half*, int u, float, float) {
    low.load(row, u);
    if (HIGH > 0) {
      high.load(row + otq_low_words<FORMAT, D>(), u);
    }
  }

  // Value d of the unit, weighted. d must be known at compile time.
  METAL_FUNC float get(int d, float book) const {
    if (FORMAT == OTQ_HALF) {
      half2 pair = as_type<half2>(low.w[d / 2]);
      return d % 2 ? float(pair.y) : float(pair.x);
    } else if (otq_looked_up<FORMAT>()) {
      return otq_entry<FORMAT>(book, HIGH > 0 ? low.get(d) | high.get(d) << LOW : low.get(d));
    } else if (FORMAT == OTQ_INT3) {
      float x = float(low.w[d / 16] & (3u << (2 * (d % 16))));
      float top = float(high.w[0] & (1u << d));
      // bit 2 counts 4 in the basis of the low field: 4 * 4^(d%16) / 2^d
      return fma(top, 4.0f * float(1u << (2 * (d % 16))) / float(1u << d), x);
    } else {
      return float(low.w[d * LOW / 32] & (((1u << (LOW & 15)) - 1u) << (d * LOW % 32)));
    }
  }
};

template <int D, int UNIT>
struct OtqUnit<OTQ_POLAR, D, UNIT> {
  float x[16];

  METAL_FUNC void load(
      const device uint* row, const device uchar* more, const device half* radii, int u, float book, float book2) {
    OtqBlock<D> block;
    block.load(row, more, radii, u);
#pragma clang loop unroll(full)
    for (int q = 0; q < 4; q++) {
      float4 four = block.four(q, book, book2);
      x[4 * q] = four.x, x[4 * q + 1] = four.y, x[4 * q + 2] = four.z, x[4 * q + 3] = four.w;
    }
  }

  METAL_FUNC float get(int d, float) const {
    return x[d];
  }
};

// The planes of four consecutive codes of one token from value d0, a multiple of 4: in the low bits of `low` and `high`.
template <int FORMAT, int D>
METAL_FUNC void otq_fields(const device uint* row, int d0, thread uint& w, thread uint& h) {
  constexpr int LOW = otq_low<FORMAT>(), HIGH = otq_high<FORMAT>();
  if (LOW == 8) {
    w = row[d0 / 4];
  } else if (LOW == 4) {
    w = ((const device ushort*)row)[d0 / 4];
  } else if (LOW == 2) {
    w = ((const device uchar*)row)[d0 / 4];
  } else {
    w = uint(((const device uchar*)row)[d0 / 8]) >> (d0 & 4);
  }
  if (HIGH == 1) {
    h = uint(((const device uchar*)(row + otq_low_words<FORMAT, D>()))[d0 / 8]) >> (d0 & 4);
  } else if (HIGH == 2) {
    h = ((const device uchar*)(row + otq_low_words<FORMAT, D>()))[d0 / 4];
  }
}

// Four consecutive codes into a book.
template <int FORMAT, int D>
METAL_FUNC uint4 otq_codes(const device uint* row, int d0) {
  constexpr int LOW = otq_low<FORMAT>(), HIGH = otq_high<FORMAT>();
  constexpr uint M = (1u << LOW % 16) - 1u, MH = (1u << HIGH) - 1u;
  uint w, h = 0;
  otq_fields<FORMAT, D>(row, d0, w, h);
  uint4 c;
  c.x = (w & M) | (h & MH) << LOW;
  c.y = (w >> LOW & M) | (h >> HIGH & MH) << LOW;
  c.z = (w >> 2 * LOW & M) | (h >> 2 * HIGH & MH) << LOW;
  c.w = (w >> 3 * LOW & M) | (h >> 3 * HIGH & MH) << LOW;
  return c;
}

// Four consecutive values of one token from value d0 (a multiple of 4), weighted by 2^(field bits * j), j = 0..3.
template <int FORMAT, int D>
METAL_FUNC float4 otq_four(const device uint* row, int d0, float book) {
  constexpr int LOW = otq_low<FORMAT>();
  float4 x;
  if (FORMAT == OTQ_HALF) {
    x = float4(((const device half4*)row)[d0 / 4]);
  } else if (otq_looked_up<FORMAT>()) {
    uint4 c = otq_codes<FORMAT, D>(row, d0);
    x.x = otq_entry<FORMAT>(book, c.x);
    x.y = otq_entry<FORMAT>(book, c.y);
    x.z = otq_entry<FORMAT>(book, c.z);
    x.w = otq_entry<FORMAT>(book, c.w);
  } else {
    constexpr uint M = (1u << LOW % 16) - 1u;
    uint w, h = 0;
    otq_fields<FORMAT, D>(row, d0, w, h);
    x = float4(float(w & M), float(w & M << LOW), float(w & M << 2 * LOW), float(w & M << 3 * LOW));
    if (FORMAT == OTQ_INT3) {
      x += float4(float(h & 1u), float(h & 2u), float(h & 4u), float(h & 8u)) * float4(4.0f, 8.0f, 16.0f, 32.0f);
    }
  }
  return x;
}

// Field bits of otq_four's weights.
template <int FORMAT>
METAL_FUNC constexpr int otq_field() {
  return otq_integers<FORMAT>() ? otq_low<FORMAT>() : 0;
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

// A Walsh-Hadamard transform of 32 * E numbers, lane i with E of them from i * E on, then one factor.
template <int E>
METAL_FUNC void otq_hadamard(thread float* x, int lane, float factor) {
#pragma clang loop unroll(full)
  for (int h = 1; h < E; h *= 2) {
#pragma clang loop unroll(full)
    for (int j = 0; j < E; j++) {
      if ((j & h) == 0) {
        float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
    }
  }
#pragma clang loop unroll(full)
  for (int h = 1; h < 32; h *= 2) {
#pragma clang loop unroll(full)
    for (int j = 0; j < E; j++) {
      float other = simd_shuffle_xor(x[j], ushort(h));
      x[j] = lane & h ? other - x[j] : x[j] + other;
    }
  }
#pragma clang loop unroll(full)
  for (int j = 0; j < E; j++) {
    x[j] *= factor;
  }
}
