// Codes of a block as floats, for the products of dense.h: where the machine has no instruction for dot products of bytes, one is made
// of two (words) or more, and multiplying floats costs less, as soon as some rows share what was decoded.
#pragma once
#include "products.h"

namespace otq {

// Query heads per KV head from which on codes become floats. Nothing else decides, so that a token's numbers don't depend on how
// many others come with it: guessed tokens are checked by the very sums of single steps.
#if defined(OPENTQ_SLOW_DOT) || defined(OPENTQ_WORDS)
constexpr int64_t FLOAT_GQA = 4;
#else
constexpr int64_t FLOAT_GQA = INT64_MAX;
#endif
// Rows up to which words are quicker. Only the weights of pages may go by them: nothing is checked by their sums.
#ifdef OPENTQ_WORDS
constexpr int64_t FEW_ROWS = 8;
#else
constexpr int64_t FEW_ROWS = 0;
#endif

// Whether keys or values, one or two runs, are read so. Queries of projected keys don't multiply the vectors themselves.
inline bool as_floats(const Packed* side, int64_t gqa) { return !side->coded() || (gqa >= FLOAT_GQA && !side[1].dim); }
inline bool keys_as_floats(const Call& c) {
  const bool few = c.weights && c.gqa * c.length <= FEW_ROWS;
  return as_floats(c.k, c.projected.data == c.q.data && !few ? c.gqa : 0);
}

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
