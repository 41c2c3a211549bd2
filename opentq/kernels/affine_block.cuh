// The storage layout "mma64" of affine codes: canonical bits, permuted so that a lane's words are its mma fragments.
//
// Tokens are stored in blocks of 64, a block in two records of 32 tokens, a record in two strips of 16. A strip is cut
// along the head dimension into tiles of 16 x 16 values, each exactly one A operand of mma.m16n8k16 (fragments:
// warp.cuh): rows are keys and columns dims where the side is K (scores = K q), rows are dims and columns keys where it
// is V (out = V^T p). Lane 4g+t owns 8 values of a tile, e = 0..7, in register e/2, half e%2 of the fragment:
//   K: key = g + 8 (e/2 % 2),          dim = 2t + e%2 + 8 (e/4)
//   V: dim = g + 8 (e/2 % 2),          key = 2t + e%2 + 8 (e/4)
// With tile i = strip * D/16 + dim/16 and register r = e/2, the value's field starts at
//   8 bits: word 2i + r/2 of the lane, bit 8 (r%2) + 16 (e%2)
//   4 bits: word i,                    bit 4 r     + 16 (e%2)
//   2 bits: word i/2,                  bit 8 (i%2) + 2 r + 16 (e%2)
//   3 bits: its low two bits as above; its high bit in a second plane,
//           word i/4,                  bit 4 (i%4) + r/2 + 2 (r%2) + 16 (e%2)
// The words of a plane lie as [word/4][lane][word%4], so that one 16-byte load per lane fetches four and a warp reads
// 512 bytes without a bank conflict; a remainder of n words lies as [lane][n].
// After the codes come the scales and then the zeros of the record, fp16:
//   K: [32 keys][G]                    V: [G][32 keys], key at 8 t + 4 strip + 2 (key/8 % 2) + key%2, t = key%8 / 2
// A record has exactly the bytes of 32 canonical tokens: 32 (W + G) words.
//
// A field is used where it lies: `word & mask` is a pair of fp16 denormals, value = field * 2^-24, exact, with no
// conversion at all. A field one step to the left (odd registers) is LIFT times larger. Odd registers are rows 8..15,
// so the factor is one per output row and is taken back in fp32.

#include "warp.cuh"

namespace opentq {

template <int DIM, int BITS_, int GROUP_>
struct Affine {
  static constexpr int D = DIM, BITS = BITS_, GROUP = GROUP_ < DIM ? GROUP_ : DIM;
  static constexpr int TILES = D / 16;                       // per strip
  static constexpr int GROUPS = (D + GROUP - 1) / GROUP;
  static constexpr int PLANE = BITS == 3 ? 2 : BITS;         // bits of the first plane
  static constexpr int LOW = TILES * PLANE / 2;              // words per lane and record, first plane
  static constexpr int HIGH = BITS == 3 ? (TILES + 1) / 2 : 0;
  static constexpr int SCALES = 32 * (LOW + HIGH);           // word offset of the scales in a record
  static constexpr int ZEROS = SCALES + 16 * GROUPS;
  static constexpr int RECORD = ZEROS + 16 * GROUPS;         // words
  static constexpr int BYTES = 4 * RECORD;
  static constexpr float LIFT = BITS == 8 ? 1.f : BITS == 4 ? 16.f : 4.f;
  static_assert(D % 16 == 0, "head dims are multiples of 16");
};

[[maybe_unused]] constexpr float UNIT = 16777216.f;  // 2^24: one over the value of field 1 as an fp16 denormal

// The four words that hold word `index` of this lane; `count` words per lane in the plane. A quad is loaded once.
template <int COUNT>
struct Plane {
  u32 quad[4];
  __device__ __forceinline__ u32 word(const u32* plane, int lane, int index, bool fresh) {
    if (fresh) {
      const int q = index / 4, rest = COUNT - 4 * q;
      if (rest >= 4) {
        const uint4 v = reinterpret_cast<const uint4*>(plane)[q * 32 + lane];
        quad[0] = v.x, quad[1] = v.y, quad[2] = v.z, quad[3] = v.w;
      } else {
        const u32* tail = plane + q * 128 + lane * rest;
        if (rest == 2) {
          const uint2 v = *reinterpret_cast<const uint2*>(tail);
          quad[0] = v.x, quad[1] = v.y;
        } else {
          for (int i = 0; i < rest; ++i) quad[i] = tail[i];
        }
      }
    }
    return quad[index % 4];
  }
};

// Hands out the A fragments of a record, tile after tile: call with i = START, START + 1, ... from unrolled loops.
template <class F, int START = 0>
struct Fragments {
  Plane<F::LOW> low;
  Plane<F::HIGH ? F::HIGH : 1> high;

  __device__ __forceinline__ void tile(u32 (&a)[4], const u32* record, int lane, int i) {
    const bool first = i == START;
    if constexpr (F::BITS == 8) {
      const u32 w0 = low.word(record, lane, 2 * i, first || i % 2 == 0), w1 = low.word(record, lane, 2 * i + 1, false);
      a[0] = w0 & 0x00ff00ffu, a[1] = (w0 >> 8) & 0x00ff00ffu;
      a[2] = w1 & 0x00ff00ffu, a[3] = (w1 >> 8) & 0x00ff00ffu;
    } else if constexpr (F::BITS == 4) {
      const u32 w = low.word(record, lane, i, first || i % 4 == 0), x = w >> 8;
      a[0] = w & 0x000f000fu, a[1] = w & 0x00f000f0u;
      a[2] = x & 0x000f000fu, a[3] = x & 0x00f000f0u;
    } else {
      const u32 w = low.word(record, lane, i / 2, first || i % 8 == 0) >> (8 * (i % 2)), x = w >> 4;
      a[0] = w & 0x00030003u, a[1] = w & 0x000c000cu;
      a[2] = x & 0x00030003u, a[3] = x & 0x000c000cu;
      if constexpr (F::BITS == 3) {
        // Field bit 2 of even registers belongs at bit 2, of odd ones at bit 4; they lie at 4 (i%4) + r/2 and two
        // above.
        const u32 h = high.word(record + 32 * F::LOW, lane, i / 4, first || i % 16 == 0);
        const int at = 4 * (i % 4);
        const u32 h0 = at >= 2 ? h >> (at - 2) : h << (2 - at), h1 = at >= 1 ? h >> (at - 1) : h << (1 - at);
        a[0] |= h0 & 0x00040004u, a[1] |= h0 & 0x00100010u;
        a[2] |= h1 & 0x00040004u, a[3] |= h1 & 0x00100010u;
      }
    }
  }
};

// The G scales of one key, as floats, from a K record.
template <int G>
__device__ __forceinline__ void key_scales(float (&s)[G], const u16* p) {
  if constexpr (G % 4 == 0) {
#pragma unroll
    for (int i = 0; i < G; i += 4) {
      const uint2 v = *reinterpret_cast<const uint2*>(p + i);
      s[i] = low_half(v.x), s[i + 1] = high_half(v.x), s[i + 2] = low_half(v.y), s[i + 3] = high_half(v.y);
    }
  } else if constexpr (G % 2 == 0) {
#pragma unroll
    for (int i = 0; i < G; i += 2) {
      const u32 v = *reinterpret_cast<const u32*>(p + i);
      s[i] = low_half(v), s[i + 1] = high_half(v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < G; ++i) s[i] = half_bits(p[i]);
  }
}

// The zeros of one key for groups `first`, `first + 1` as a register of two halves (0 beyond G), from a K record.
template <int G>
__device__ __forceinline__ u32 key_zeros(const u16* p, int first) {
  if constexpr (G % 2 == 0) {
    return first < G ? *reinterpret_cast<const u32*>(p + first) : 0u;
  } else {
    const u32 lo = first < G ? p[first] : 0u, hi = first + 1 < G ? p[first + 1] : 0u;
    return lo | hi << 16;
  }
}

}  // namespace opentq
