// PolarQuant tokens (codecs/polar.py) as floats, for the products of dense.h.
//
// A token is its canonical arrays one behind the other: with n = D/16 blocks, n words of eight 4-bit angles; 2-bit angles,
// four to a byte, first those of all quarters (4n of them), then of halves (2n), then of whole blocks (n); n fp16 radii. The
// four quarters of a block are its radius times four products of cosines and sines, which 6 bits choose; a quarter's two
// pairs are its cosine and sine, and a byte chooses those of both pairs. So four channels take two products of vectors:
//
//   tables [64][4]  lengths of the quarters: block angle + 4 * half angles
//          [4][4]   (c, c, s, s) of the angle of a quarter
//          [256][4] (c, s, c, s) of the angles of two pairs
#pragma once
#include "state.h"

namespace otq {

typedef float Four __attribute__((vector_size(16)));

INLINE Four four(const float* p) {
  Four x;
  std::memcpy(&x, p, 16);
  return x;
}

// Channels [16 * j, 16 * j + 16) of a token of n blocks.
INLINE void polar_block(const uint8_t* token, int n, int j, float radius, const float* tables, Four* x) {
  const uint8_t* rest = token + 4 * n;
  const int block = 12 * n + 2 * j, halves = 8 * n + 4 * j, quarters = rest[j];
  const int upper = (rest[block / 8] >> block % 8 & 3) + 4 * (rest[halves / 8] >> halves % 8 & 15);
  const Four lengths = four(tables + 4 * upper) * radius;
  UNROLL for (int i = 0; i < 4; i++)
    x[i] = lengths[i] * four(tables + 256 + 4 * (quarters >> 2 * i & 3)) * four(tables + 272 + 4 * token[4 * j + i]);
}

// The radii of blocks [j, j + 8).
INLINE void polar_radii(const uint8_t* token, int n, int j, float* out) {
  const uint8_t* radii = token + 4 * n + (14 * n + 7) / 8 + 2 * j;
  Eight halves = {};
  if (j + 8 <= n) std::memcpy(&halves, radii, 16);
  else std::memcpy(&halves, radii, size_t(2 * (n - j)));
  widen8(halves, out);
}

// 64 tokens at `at`: keys [dim_q][64], values [64][dim_v]. Tokens that no row sees (not in `any`) may not exist.
inline void widen_polar_keys(Rows& rows, const Packed& k, const uint8_t* at, uint64_t any) {
  const auto* tables = reinterpret_cast<const float*>(k.book);
  const int n = rows.dim_q / 16;
  for (int t0 = 0; t0 < 64; t0 += 4) {
    const int seen = any >> t0 & 15;
    if (!seen) {
      for (int d = 0; d < rows.dim_q; d++) std::fill_n(rows.dense_k + size_t(d) * 64 + t0, 4, 0.f);
      continue;
    }
    const uint8_t* token[4];  // another one in the place of one that may not exist: its score is masked
    for (int i = 0; i < 4; i++) token[i] = at + (t0 + (seen >> i & 1 ? i : __builtin_ctz(seen))) * k.token_bytes();
    float radii[4][8];
    for (int j = 0; j < n; j++) {
      if (j % 8 == 0)
        for (int i = 0; i < 4; i++) polar_radii(token[i], n, j, radii[i]);
      Four x[4][4];
      UNROLL for (int i = 0; i < 4; i++) polar_block(token[i], n, j, radii[i][j % 8], tables, x[i]);
      float* out = rows.dense_k + size_t(16 * j) * 64 + t0;
      UNROLL for (int q = 0; q < 4; q++, out += 4 * 64) {
        const Four a = __builtin_shufflevector(x[0][q], x[1][q], 0, 4, 1, 5), b = __builtin_shufflevector(x[2][q], x[3][q], 0, 4, 1, 5);
        const Four c = __builtin_shufflevector(x[0][q], x[1][q], 2, 6, 3, 7), d = __builtin_shufflevector(x[2][q], x[3][q], 2, 6, 3, 7);
        const Four by_channel[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                                    __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
        UNROLL for (int i = 0; i < 4; i++) std::memcpy(out + 64 * i, &by_channel[i], 16);
      }
    }
  }
}

inline void widen_polar_values(Rows& rows, const Packed& v, const uint8_t* at, uint64_t any) {
  const auto* tables = reinterpret_cast<const float*>(v.book);
  const int n = rows.dim_v / 16;
  for (int t = 0; t < 64; t++, at += v.token_bytes()) {
    float* out = rows.dense_v + size_t(t) * rows.dim_v;
    if (!(any >> t & 1)) {
      std::fill_n(out, rows.dim_v, 0.f);
      continue;
    }
    float radii[8];
    for (int j = 0; j < n; j++, out += 16) {
      if (j % 8 == 0) polar_radii(at, n, j, radii);
      Four x[4];
      polar_block(at, n, j, radii[j % 8], tables, x);
      UNROLL for (int i = 0; i < 4; i++) std::memcpy(out + 4 * i, &x[i], 16);
    }
  }
}

}  // namespace otq
