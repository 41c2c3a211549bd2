// The storage layout "mma64": canonical codes, permuted so that a lane's words are its mma fragments.
//
// Tokens are stored in blocks of 64, a block in two records of 32 tokens, a record in two strips of 16. A strip is cut
// along the head dimension into tiles of 16 x 16 values, each exactly one A operand of mma.m16n8k16 (fragments:
// warp.cuh): rows are keys and columns dims where the side is K (scores = K q), rows are dims and columns keys where it
// is V (out = V^T p). Lane 4g+t owns 8 values of a tile, e = 0..7, in register e/2, half e%2 of the fragment:
//   K: key = g + 8 (e/2 % 2),          dim = 2t + e%2 + 8 (e/4)
//   V: dim = g + 8 (e/2 % 2),          key = 2t + e%2 + 8 (e/4)
// Tile i = strip * D/16 + dim/16 of a lane takes PLANE bits per value of one word (two words for 8 bits): 4/PLANE tiles
// share a word. Widths 3 and 5 have a second plane of one bit per value, four tiles to a word. Where in its word a
// value lies is the format's affair: `formats.cuh`.
// The words of a plane lie as [word/4][lane][word%4], so that one 16-byte load per lane fetches four and a warp reads
// 512 bytes without a bank conflict; a remainder of n words lies as [lane][n].
// Where codes are of two runs (`Pair`), the words of the first are followed by those of the second.
// After the codes come the scales of the record and then, in formats that have them, its zeros, fp16:
//   K: [32 keys][G]                    V: [G][32 keys], key at 8 t + 4 strip + 2 (key/8 % 2) + key%2, t = key%8 / 2
// A record has the bytes of 32 canonical tokens (polar: and 2 bits per 16 channels).
#include "formats.cuh"

namespace opentq {

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
    u32 word, more = 0;
    if constexpr (F::PLANE == 8) {
      word = low.word(record, lane, 2 * i, first || i % 2 == 0);
      more = low.word(record, lane, 2 * i + 1, false);
    } else {
      constexpr int SHARE = 4 / F::PLANE;
      word = low.word(record, lane, i / SHARE, first || i % (4 * SHARE) == 0);
    }
    if constexpr (F::HIGH > 0) more = high.word(record + 32 * F::LOW, lane, i / 4, first || i % 16 == 0);
    F::fragment(a, word, more, i);
  }
};

template <class F1, class F2, int DENSE, int START>
struct Fragments<Pair<F1, F2, DENSE>, START> {
  static constexpr int TILES = F1::TILES;  // of either, per strip
  static_assert(START % (2 * TILES) == 0, "a strip");
  Fragments<F1, START / 2> one;
  Fragments<F2, START / 2> two;

  __device__ __forceinline__ void tile(u32 (&a)[4], const u32* record, int lane, int i) {
    const int strip = i / (2 * TILES), j = i % (2 * TILES);
    if (j < TILES) {
      one.tile(a, record, lane, strip * TILES + j);
    } else {
      two.tile(a, record + F1::SCALES, lane, strip * TILES + j - TILES);
    }
  }
};

template <int DIM, bool KEYS, class L1, class L2, class L3, class L4, int START>
struct Fragments<Polar<DIM, KEYS, L1, L2, L3, L4>, START> {
  using F = Polar<DIM, KEYS, L1, L2, L3, L4>;

  __device__ __forceinline__ void tile(u32 (&a)[4], const u32* record, int lane, int i) {
    const int g = lane / 4, t = lane % 4, at = i % F::TILES * 32 + i / F::TILES * 16;
    const u32* first = record + at;
    const u16* rest = reinterpret_cast<const u16*>(record + 32 * F::TILES) + at;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if constexpr (KEYS) {
        const int key = g + 8 * (r % 2);
        const float length = F::length(rest[key], r / 2, t);
        const float2 x = F::tables().circle[F::angle(first[key], r / 2, t)];
        a[r] = pack_half2(length * x.x, length * x.y);
      } else {
        const float* circle = &F::tables().circle[0].x + g % 2;
        float x[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int key = 2 * t + 8 * (r / 2) + h;
          x[h] = F::length(rest[key], r % 2, g / 2) * circle[2 * F::angle(first[key], r % 2, g / 2)];
        }
        a[r] = pack_half2(x[0], x[1]);
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
