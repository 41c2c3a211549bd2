// What the words of a record mean: one type per codec family, and everything that the kernels ask of it.
//
// A format gives the sizes of its records, and `fragment`: the words of a tile -> an A operand of fp16 denormals,
// value = number * 2^-24, exact. `low` and `high` are the way back: the bits of a code in its word of either plane, for
// register k of the word and half h. What the numbers lack is said by two constants: odd registers (rows 8..15 of the
// operand) are LIFT times too large, and all of them are counted in units of STEP. Both are factors of rows, so they
// are taken back in fp32. NUMBERS is 2 where every group of channels has a scale and a zero, 1 where it has only a
// scale. Where the format is of two runs of codes, SECOND is the step of the second in units of STEP. Where it has
// TABLES, `prepare` fills them in shared memory, once per block and before a barrier.
// Codes may meet another query than dense keys do. A row of the query has QUERY channels, the first DENSE of them for
// dense keys; those for the codes begin with tile FIRST.
#include "warp.cuh"

namespace opentq {

[[maybe_unused]] constexpr float UNIT = 16777216.f;  // 2^24: one over the value of number 1 as an fp16 denormal

template <int DIM, int PLANE_, bool MORE, int GROUP_, int NUMBERS_>
struct Sizes {
  static constexpr int D = DIM, PLANE = PLANE_, GROUP = GROUP_ < DIM ? GROUP_ : DIM, NUMBERS = NUMBERS_;
  static constexpr int TILES = D / 16;                       // per strip
  static constexpr int GROUPS = (D + GROUP - 1) / GROUP;
  static constexpr int LOW = (TILES * PLANE + 1) / 2;        // words per lane and record, first plane
  static constexpr int HIGH = MORE ? (TILES + 1) / 2 : 0;
  static constexpr int SCALES = 32 * (LOW + HIGH);           // word offset of the scales in a record
  static constexpr int ZEROS = SCALES + 16 * GROUPS;
  static constexpr int RECORD = SCALES + 16 * GROUPS * NUMBERS;  // words
  static constexpr int BYTES = 4 * RECORD;
  static constexpr bool ZEROED = NUMBERS == 2, TABLES = false, BIASED = false;
  static constexpr float SECOND = 1.f;
  static __device__ constexpr int bias(int) { return 0; }
  static constexpr int DENSE = D, QUERY = D, FIRST = 0;
  static_assert(D % 16 == 0, "head dims are multiples of 16");
};

// Affine codes: value = scale * code + zero. Code of register r, half h:
//   8 bits: word r/2 of two, bit 8 (r%2) + 16 h
//   4 bits: bit 4 r + 16 h
//   2 bits: bit 8 (i%2) + 2 r + 16 h
//   3 bits: its low two bits as above; its high bit in the second plane, bit 4 (i%4) + r/2 + 2 (r%2) + 16 h
// A code is used where it lies: `word & mask` is a pair of denormals, with no conversion at all; one step to the left
// (odd registers) it is LIFT times larger.
template <int DIM, int BITS_, int GROUP_>
struct Affine : Sizes<DIM, BITS_ == 3 ? 2 : BITS_, BITS_ == 3, GROUP_, 2> {
  static constexpr int BITS = BITS_;
  static constexpr float LIFT = BITS == 8 ? 1.f : BITS == 4 ? 16.f : 4.f, STEP = 1.f;

  static __device__ __forceinline__ u32 low(u32 code, int k, int h) {
    if constexpr (BITS == 8) return code << (8 * k + 16 * h);
    if constexpr (BITS == 4) return code << (4 * k + 16 * h);
    return (code & 3u) << (8 * (k / 4) + 2 * (k % 4) + 16 * h);
  }
  static __device__ __forceinline__ u32 high(u32 code, int k, int h) {
    return (code >> 2) << (4 * (k / 4) + k % 4 / 2 + 2 * (k % 2) + 16 * h);
  }

  static __device__ __forceinline__ void fragment(u32 (&a)[4], u32 word, u32 more, int i) {
    if constexpr (BITS == 8) {
      a[0] = word & 0x00ff00ffu, a[1] = (word >> 8) & 0x00ff00ffu;
      a[2] = more & 0x00ff00ffu, a[3] = (more >> 8) & 0x00ff00ffu;
    } else if constexpr (BITS == 4) {
      const u32 x = word >> 8;
      a[0] = word & 0x000f000fu, a[1] = word & 0x00f000f0u;
      a[2] = x & 0x000f000fu, a[3] = x & 0x00f000f0u;
    } else {
      const u32 w = word >> (8 * (i % 2)), x = w >> 4;
      a[0] = w & 0x00030003u, a[1] = w & 0x000c000cu;
      a[2] = x & 0x00030003u, a[3] = x & 0x000c000cu;
      if constexpr (BITS == 3) {
        // Bit 2 of even registers belongs at bit 2, of odd ones at bit 4; they lie at 4 (i%4) + r/2 and two above.
        const int at = 4 * (i % 4);
        const u32 h0 = at >= 2 ? more >> (at - 2) : more << (2 - at);
        const u32 h1 = at >= 1 ? more >> (at - 1) : more << (1 - at);
        a[0] |= h0 & 0x00040004u, a[1] |= h0 & 0x00100010u;
        a[2] |= h1 & 0x00040004u, a[3] |= h1 & 0x00100010u;
      }
    }
  }
};

// Codebook codes: value = scale * STEP * book[code], the book odd and of signed bytes, its magnitudes in M0..M3. Bytes are
// looked up by `permute`, four at a time: a nibble is a selector. Element e = 2 r + h of a tile.
// 2 and 3 bits (DIRECT): the code itself is the selector, and what it selects is 128 + book[code]. Nibble e has two bits
// of a code, those of the second tile of a word two bits higher; the third bit comes from the second plane, which holds
// four tiles, once it is shifted as `selectors` says.
// 1, 4 and 5 bits: a sign (the code's upper bit: 1 is positive) and the rank of a magnitude (the other bits, inverted where
// the sign is negative). Nibble e is the rank. Signs: byte e%4 of a word for each half of the elements, bit 7 once it is
// shifted as `fragment` says; in 1- and 5-bit codes the second plane (1 bit: the only one) holds four tiles of them.
// Sixteen magnitudes are two lookups: with a selector's upper bit set `permute` gives the sign of a byte, 0 for those here,
// so the upper eight, less what the lower eight lack of them.
template <int DIM, int BITS, u32 M0, u32 M1, u32 M2, u32 M3, int STEP_2_31>
struct Book : Sizes<DIM, BITS == 1 ? 1 : BITS / 2 * 2, BITS == 3 || BITS == 5, DIM, 1> {
  static constexpr float LIFT = 1.f, STEP = STEP_2_31 / 2147483648.f;
  static constexpr u32 RANKS = 1u << (BITS - 1);
  static constexpr bool DIRECT = BITS == 2 || BITS == 3, BIASED = DIRECT;
  static_assert(BITS <= 5, "a register pair holds eight magnitudes, two pairs sixteen");
  static __device__ constexpr int bias(int) { return DIRECT ? 128 : 0; }

  // Entries [first, first + 4) of a book of 2 or 3 bits, biased.
  static __device__ constexpr u32 entries(u32 first) {
    u32 bytes = 0;
    for (u32 i = 0; i < 4 && first + i < 2 * RANKS; ++i) {
      const u32 code = first + i;
      const u32 size = M0 >> (8 * (code < RANKS ? RANKS - 1 - code : code - RANKS)) & 0xffu;
      bytes |= (code < RANKS ? 128 - size : 128 + size) << (8 * i);
    }
    return bytes;
  }

  // A canonical code, which is the index of its entry, as it is stored; and the magnitude of a stored code's entry.
  static __device__ __forceinline__ u32 ranked(u32 code) {
    return DIRECT || code >> (BITS - 1) ? code : code ^ (RANKS - 1);
  }
  static __device__ __forceinline__ int entry(u32 code) {
    if constexpr (DIRECT) return (int)(permute(entries(0), entries(4), code) & 0xffu) - 128;
    return magnitudes(code & (RANKS - 1)) & 0xffu;
  }

  static __device__ __forceinline__ u32 low(u32 code, int k, int h) {
    const int i = k / 4, r = k % 4, sign = 8 * (2 * (r % 2) + h), nibble = 4 * (2 * r + h);
    if constexpr (BITS == 1) return high(code, k, h);
    if constexpr (DIRECT) return (code & 3u) << (nibble + 2 * i);
    const u32 rank = (code & (RANKS - 1)) << nibble;
    return BITS == 5 ? rank : rank | (code >> (BITS - 1)) << (sign + 7 - 4 * (r / 2));
  }
  static __device__ __forceinline__ u32 high(u32 code, int k, int h) {
    const int i = k / 4, r = k % 4;
    if constexpr (DIRECT) return (code >> 2) << (4 * (2 * r + h) + (i < 3 ? 2 - i : 3));
    return (code >> (BITS - 1)) << (8 * (2 * (r % 2) + h) + 7 - 2 * i - r / 2);
  }

  // Selectors of the eight codes of a tile.
  static __device__ __forceinline__ u32 selectors(u32 word, u32 more, int i) {
    const u32 two = i % 2 ? word >> 2 : word;
    if constexpr (BITS == 2) return two & 0x33333333u;
    const u32 third = i % 4 == 3 ? more >> 1 : more << (i % 4);
    return (two & 0x33333333u) | (third & 0x44444444u);
  }

  static __device__ __forceinline__ u32 magnitudes(u32 ranks) {  // of the four lower nibbles
    if constexpr (BITS == 1) return M0;
    if constexpr (BITS == 5) return permute(M2, M3, ranks & 0x7777u) - permute(M2 - M0, M3 - M1, ranks);
    return permute(M0, M1, ranks);
  }

  static __device__ __forceinline__ void fragment(u32 (&a)[4], u32 word, u32 more, int i) {
    if constexpr (DIRECT) {
      const u32 lower = selectors(word, more, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 bytes = permute(entries(0), entries(4), half ? upper_half(lower) : lower);
        a[2 * half] = permute(bytes, 0u, 0x4140u), a[2 * half + 1] = permute(bytes, 0u, 0x4342u);
      }
      return;
    }
    u32 plus[2];  // signs in bit 7 of every byte: elements 0..3, and 4..7
    if constexpr (BITS == 4) {
      plus[0] = word, plus[1] = word << 4;
    } else {
      const u32 signs = BITS == 1 ? word : more;
      plus[0] = signs << (2 * (i % 4)), plus[1] = signs << (2 * (i % 4) + 1);
    }
    const u32 ranks = word & 0x77777777u;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 mine = half ? upper_half(ranks) : ranks, minus = ~plus[half] & 0x80808080u;
      u32 size = M0;
      if constexpr (BITS == 4) size = permute(M0, M1, mine);
      if constexpr (BITS == 5) size = permute(M2, M3, mine) - permute(M2 - M0, M3 - M1, word >> (16 * half));
      a[2 * half] = permute(size, minus, 0x5140u), a[2 * half + 1] = permute(size, minus, 0x7362u);
    }
  }
};

// Two runs of codebook codes of equal length, each a group with its own scale: the codes of the first, those of the
// second, the scales. DENSE channels are those of both runs, or of one where both describe the same vector.
template <class F1, class F2, int DENSE_>
struct Pair {
  static constexpr int D = F1::D + F2::D, GROUP = F1::D, GROUPS = 2, NUMBERS = 1, TILES = D / 16;
  static constexpr int SCALES = F1::SCALES + F2::SCALES, ZEROS = SCALES + 32, RECORD = ZEROS, BYTES = 4 * RECORD;
  static constexpr bool ZEROED = false, TABLES = false, BIASED = F1::BIASED || F2::BIASED;
  static constexpr float LIFT = 1.f, STEP = F1::STEP, SECOND = F2::STEP / F1::STEP;
  static constexpr int DENSE = DENSE_, QUERY = D, FIRST = 0;
  static __device__ constexpr int bias(int group) { return group ? F2::bias(0) : F1::bias(0); }
  static_assert(F1::D == F2::D && F1::GROUPS == 1 && F2::GROUPS == 1 && F1::LIFT == 1.f && F2::LIFT == 1.f);
};

// Angles in the first quadrant, four of them, symmetric about 45 degrees; given are the cosines, in units of 2^-30.
template <int C0, int C1, int C2, int C3>
struct Quadrant {
  static __device__ __forceinline__ float cosine(int code) {
    constexpr float ONE = 1073741824.f;
    return code & 2 ? (code & 1 ? C3 / ONE : C2 / ONE) : (code & 1 ? C1 / ONE : C0 / ONE);
  }
};

// Polar codes (codecs/polar.py): value = 4 * scale * a product of four cosines and sines. A block of 16 channels is a
// tile and a group. Codes lie by block and token, not by lane: [block][32 tokens] words of eight angles of 4 bits, then
// [block][32 tokens] 16 bits with the angles of levels 2 to 4, 2 bits each. Half of the channels needs a byte of those:
// the angle of level 2 of its first four channels, that of level 3, that of level 4 (in both bytes), that of level 2 of
// its other four; so six neighbouring bits say a product, which a table in shared memory has. A sine is the cosine of
// the inverted code. Numbers are ordinary halves, so STEP takes the denormals' unit back.
template <int DIM, bool KEYS_, class L1, class L2, class L3, class L4>
struct Polar {
  static constexpr int D = DIM, GROUP = 16, TILES = D / 16, GROUPS = TILES, NUMBERS = 1;
  static constexpr int SCALES = 48 * TILES, ZEROS = SCALES + 16 * GROUPS, RECORD = ZEROS, BYTES = 4 * RECORD;
  static constexpr bool ZEROED = false, KEYS = KEYS_, TABLES = true, BIASED = false;
  static constexpr float LIFT = 1.f, STEP = 4.f / UNIT, SECOND = 1.f;
  static constexpr int DENSE = D, QUERY = D, FIRST = 0;
  static __device__ constexpr int bias(int) { return 0; }

  struct Tables {
    float product[2][64];  // by which four channels of a half; six bits
    float2 circle[16];     // cosine and sine
  };
  static __device__ __forceinline__ Tables& tables() {
    __shared__ Tables all;
    return all;
  }
  static __device__ __forceinline__ void prepare() {
    if (threadIdx.x >= 32) return;
    for (int i = threadIdx.x; i < 64; i += 32) {
      tables().product[0][i] = L2::cosine(i & 3) * L3::cosine(i >> 2 & 3) * L4::cosine(i >> 4);
      tables().product[1][i] = L3::cosine(~i & 3) * L4::cosine(i >> 2 & 3) * L2::cosine(i >> 4);
    }
    const int code = threadIdx.x;
    if (code < 16) tables().circle[code] = make_float2(cosine(code), cosine(code - 4));
  }
  static __device__ __forceinline__ float cosine(int code) {  // of a full circle of 16
    const float x = L1::cosine(code & 4 ? ~code : code);
    return (code + 4) & 8 ? -x : x;
  }

  // The length of channels 8 half + 2 pair and the next one, of a token with these angles; and the angle of level 1.
  static __device__ __forceinline__ float length(u32 rest, int half, int pair) {
    const int quad = pair / 2, second = pair % 2, flip = quad ? 12 * half + 48 * second : 48 * half + 3 * second;
    return tables().product[quad][(rest >> (8 * half + 2 * quad) & 63) ^ flip];
  }
  static __device__ __forceinline__ int angle(u32 first, int half, int pair) {
    return first >> (16 * half + 4 * pair) & 15;
  }
};

// Codes of keys in a basis of their own: rows of the query are [q, what multiplies the codes].
template <class F, int DENSE_>
struct Sketch : F {
  static constexpr int DENSE = DENSE_, QUERY = DENSE_ + F::D, FIRST = DENSE_ / 16;
};

}  // namespace opentq
