// The two products of packed.h on codes of BITS bits, for up to MAX_ROWS query rows at a time: scores and values. With
// LOOKUP, codes become the bytes of a codebook on their way from memory to the products.
//
// Code vectors are unpacked once per row group and feed 2 * MAX_ROWS dot products (two planes of each row, see Sum); on
// AVX-512 that is 16 accumulators, 2 code vectors and broadcasts. Each width is compiled in a file of its own, because
// fully unrolled loops take the compiler seconds (products.cpp).
#pragma once
#include "state.h"

namespace otq {

// What an integer product of 16 * PARTS tokens is worth: sum = product * scale + (sum of the other side) * zero.
struct Scale {
  F scale, zero;
};
INLINE Scale scale_of(const Packed& p, const uint16_t* params) {
  const F scale = load_half(params);
  if (p.form == AFFINE) return {scale, load_half(params + 64)};
  const F unit = mul(scale, set1(p.step));  // entries are stored plus 128
  return {unit, mul(unit, set1(-128.f))};
}

// Scores of NR rows against token fields F0 .. F0+NF (16 tokens each) of one block.
template <int BITS, bool LOOKUP, int NR, int NF, int F0>
INLINE void score_fields(const uint8_t* codes, const uint16_t* params, const Packed& k, const Rows& rows, int r0, float* scores) {
  const int groups = rows.groups_k, dim = rows.dim_k;
  const int8_t* q8 = rows.q8 + quad_at(dim, r0, 0);
  const float* sum = rows.q_sum + size_t(r0) * groups;
  constexpr bool WIDE = BITS == 8 || LOOKUP;
  const Reader<BITS, LOOKUP> read(k.book);
  for (int part = 0; part < PARTS; part++) {
    for (int g = 0; g < groups; g++) {
      rows.ahead.step();
      Sum total[NR][NF];
      for (int t = k.first_tile(g); t < k.last_tile(g); t++) {
        const uint8_t* tile = codes + t * 128 * BITS;
        UNROLL for (int s = 0; s < 4; s++) {
          I c[NF];
          UNROLL for (int n = 0; n < NF; n++) c[n] = read(tile, 4 * s + F0 + n, part);
          UNROLL for (int r = 0; r < NR; r++) {
            const int8_t* q = q8 + quad_at(dim, r, 16 * t + 4 * s);
            const I first = iset32(word(q)), second = iset32(word(q + plane(dim)));
            UNROLL for (int n = 0; n < NF; n++) total[r][n].template add<WIDE>(Bytes(c[n]), first, second);
          }
        }
      }
      UNROLL for (int n = 0; n < NF; n++) {
        const int token = 16 * (F0 + n) + W * part;
        const Scale x = scale_of(k, params + k.param_stride() * g + token);
        UNROLL for (int r = 0; r < NR; r++) {
          float* s = scores + 64 * r + token;
          const F before = fma(x.zero, set1(sum[r * groups + g]), g ? load(s) : set1(0.f));
          store(s, fma(total[r][n].value(), x.scale, before));
        }
      }
    }
  }
}

template <int BITS, bool LOOKUP, int NR>
INLINE void score_rows(const uint8_t* codes, const uint16_t* params, const Packed& k, const Rows& rows, int r0, float* scores) {
  if constexpr (NR <= MAX_ROWS / 2) {
    score_fields<BITS, LOOKUP, NR, 4, 0>(codes, params, k, rows, r0, scores);
  } else {
    score_fields<BITS, LOOKUP, NR, 2, 0>(codes, params, k, rows, r0, scores);
    score_fields<BITS, LOOKUP, NR, 2, 2>(codes, params, k, rows, r0, scores);
  }
}

// Channels of one or two tiles of group g: acc += p_step * (p . codes). A lone tile is read twice and stored once.
template <int BITS, bool LOOKUP, int NR>
INLINE void value_tiles(const Reader<BITS, LOOKUP>& read, const uint8_t* tile, int tiles, const Rows& rows, int r0, int c0, int g, int channel) {
  const uint8_t* both[2] = {tile, tile + (tiles - 1) * 128 * BITS};
  const int8_t* p8 = rows.p8 + (g * CHUNK + c0) * 128;
  const float* step = rows.p_step + g * CHUNK + c0;
  constexpr bool WIDE = BITS == 8 || LOOKUP;
  for (int part = 0; part < PARTS; part++) {
    rows.ahead.step();
    Sum total[NR][2];
    UNROLL for (int i = 0; i < 16; i++) {
      I c[2];
      UNROLL for (int n = 0; n < 2; n++) c[n] = read(both[n], i, part);
      UNROLL for (int r = 0; r < NR; r++) {
        const int8_t* p = p8 + r * 128 + 4 * i;
        const I first = iset32(word(p)), second = iset32(word(p + 64));
        UNROLL for (int n = 0; n < 2; n++) total[r][n].template add<WIDE>(Bytes(c[n]), first, second);
      }
    }
    UNROLL for (int n = 0; n < 2; n++) {
      if (n == tiles) break;
      UNROLL for (int r = 0; r < NR; r++) {
        float* a = rows.acc + size_t(r0 + r) * rows.dim_v + channel + 16 * n + W * part;
        store(a, fma(total[r][n].value(), set1(step[r]), load(a)));
      }
    }
  }
}

template <int BITS, bool LOOKUP, int NR>
INLINE void value_rows(const uint8_t* codes, const Packed& v, const Rows& rows, int r0, int c0) {
  const Reader<BITS, LOOKUP> read(v.book);
  for (int g = 0; g < rows.groups_v; g++)
    for (int t = v.first_tile(g), last = v.last_tile(g); t < last; t += 2)
      value_tiles<BITS, LOOKUP, NR>(read, codes + t * 128 * BITS, std::min(2, last - t), rows, r0, c0, g, 16 * t);
}

template <int BITS, bool LOOKUP>
void scores(const uint8_t* codes, const uint16_t* params, const Packed& k, const Rows& rows, int r0, int n, float* out) {
  for (int i = 0; i < n; i += MAX_ROWS) {
    const int left = std::min(n - i, MAX_ROWS);
    if (left == 1) score_rows<BITS, LOOKUP, 1>(codes, params, k, rows, r0 + i, out + 64 * i);
    else if (left == 2) score_rows<BITS, LOOKUP, 2>(codes, params, k, rows, r0 + i, out + 64 * i);
    else if constexpr (MAX_ROWS == 4) {
      if (left == 3) score_rows<BITS, LOOKUP, 3>(codes, params, k, rows, r0 + i, out + 64 * i);
      else score_rows<BITS, LOOKUP, 4>(codes, params, k, rows, r0 + i, out + 64 * i);
    }
  }
}

template <int BITS, bool LOOKUP> void values(const uint8_t* codes, const Packed& v, const Rows& rows, int r0, int n) {
  for (int i = 0; i < n; i += MAX_ROWS) {
    const int left = std::min(n - i, MAX_ROWS);
    if (left == 1) value_rows<BITS, LOOKUP, 1>(codes, v, rows, r0 + i, i);
    else if (left == 2) value_rows<BITS, LOOKUP, 2>(codes, v, rows, r0 + i, i);
    else if constexpr (MAX_ROWS == 4) {
      if (left == 3) value_rows<BITS, LOOKUP, 3>(codes, v, rows, r0 + i, i);
      else value_rows<BITS, LOOKUP, 4>(codes, v, rows, r0 + i, i);
    }
  }
}

}  // namespace otq
