// Codes of a block as floats, for the products of dense.h: where the machine has no instruction for dot products of bytes, building
// one out of three costs more than multiplying floats, as soon as a few rows share what was decoded.
#pragma once
#include "products.h"

namespace otq {

// Rows that share a block from which on its codes become floats. Instructions for bytes do four times the work of one for floats.
#ifdef OPENTQ_SLOW_DOT
constexpr int FLOAT_ROWS = 9;
#else
constexpr int FLOAT_ROWS = 1 << 30;
#endif

// Whether a side of a call, one or two runs, is read so by this many rows.
inline bool as_floats(const Packed* side, int rows) { return !side->coded() || (rows >= FLOAT_ROWS && !side[1].dim); }
// Queries of keys that were projected are not those that multiply the vectors themselves.
inline bool keys_as_floats(const Call& c, int rows) { return as_floats(c.k, c.projected.data == c.q.data ? rows : 0); }

// Byte j of every 32-bit lane.
INLINE F byte_of(I x, int j) { return to_float(iand(shr32(x, 8 * j), iset32(255))); }

// Keys [dim_q][64] of a block's codes, a byte each, and its parameters.
inline void decode_keys(Rows& rows, const Packed& k, const uint8_t* codes, const uint16_t* params) {
  for (int g = 0; g < k.groups(); g++, params += k.param_stride()) {
    for (int token = 0; token < 64; token += W) {
      const Scale x = scale_of(k, params + token);
      for (int quad = 4 * k.first_tile(g); quad < 4 * k.last_tile(g); quad++) {  // four channels
        const I c = iload(codes + 256 * quad + 4 * token);
        float* out = rows.dense_k + size_t(256) * quad + token;
        UNROLL for (int j = 0; j < 4; j++) store(out + 64 * j, fma(byte_of(c, j), x.scale, x.zero));
      }
    }
  }
}

// Values [64][dim_v], in the same way. Tokens that no row sees (not in `any`) may hold anything, and are zeros here.
inline void decode_values(Rows& rows, const Packed& v, const uint8_t* codes, const uint16_t* params, uint64_t any) {
  alignas(64) float scale[64], zero[64];
  for (int g = 0; g < v.groups(); g++, params += v.param_stride()) {
    for (int token = 0; token < 64; token += W) {
      const Scale x = scale_of(v, params + token);
      store(scale + token, x.scale), store(zero + token, x.zero);
    }
    for (int token = 0; token < 64; token++)
      if (!(any >> token & 1)) scale[token] = zero[token] = 0.f;
    for (int tile = v.first_tile(g); tile < v.last_tile(g); tile++)
      for (int i = 0; i < 16; i++)
        for (int part = 0; part < PARTS; part++) {
          const I c = iload(codes + 1024 * tile + 64 * i + 4 * W * part);
          float* out = rows.dense_v + size_t(i) * rows.dim_v + 16 * tile + W * part;
          UNROLL for (int j = 0; j < 4; j++) store(out + size_t(16 * j) * rows.dim_v, fma(byte_of(c, j), set1(scale[i + 16 * j]), set1(zero[i + 16 * j])));
        }
  }
}

}  // namespace otq
