// The blocked storage layout of coded keys and values, bit by bit.
//
// A tensor [B, H, T, D] is stored as [B, H, T/64, block_bytes]: one block holds 64 tokens of one KV head,
//
//   D/16 tiles of 128*bits bytes | AFFINE: G groups of (64 fp16 scales, 64 fp16 zeros)
//                                | BOOK: 64 fp16 scales
//
// which is exactly the canonical number of bits: no padding. A tile is 16 channels x 64 tokens =
// 16 fields of 64 codes; a field is what one 64-byte vector holds when every code has a byte of its own:
//
//   keys:    field i = channels 4*(i/4) .. +4, tokens 16*(i%4) .. +16; byte 4*l + j = (token lane l, channel j)
//   values:  field i = tokens i, i+16, i+32, i+48, all 16 channels;     byte 4*l + j = (channel lane l, token i + 16*j)
//
// so a 4-way byte dot product sums over channels for keys and over tokens for values, lanes are what the result has, and
// no horizontal sum is ever needed; the tokens of a value field are those that share a lane in the scores, so that
// probabilities become its byte operand without a shuffle. Fields share vectors in the tile so that one shift and one mask unpack 64 codes:
//
//   8 bits   vector i
//   4 bits   vector i/2, bits 4*(i%2) of every byte
//   2 bits   vector i/4, bits 2*(i%4)
//   1 bit    vector i/8, bit i%8
//   3 bits   low two bits as the 2-bit tile (4 vectors), then the high bit as a 1-bit tile
//   5, 6     low four bits as the 4-bit tile (8 vectors), then the rest as a 1-bit or 2-bit tile
#pragma once
#include "abi.h"
#include "simd.h"

namespace otq {

constexpr int BLOCK = 64;                // tokens
constexpr int PARTS = 16 / W;            // vectors per 16 lanes
constexpr int TOKEN_VECTORS = BLOCK / W; // float vectors per 64 tokens

// Part `part` (4*W bytes) of field i of a tile, one code per byte. i is a constant once loops are unrolled.
template <int BITS> INLINE I field(const uint8_t* tile, int i, int part) {
  constexpr int LOW = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS, HIGH = BITS - LOW;
  constexpr int PER = 8 / LOW;
  tile += 4 * W * part;
  const I vector = iload(tile + 64 * (i / PER));
  if constexpr (BITS == 8) return vector;
  const I low = iand(shr(vector, LOW * (i % PER)), iset8((1 << LOW) - 1));
  if constexpr (HIGH == 0) {
    return low;
  } else {
    constexpr int HIGH_PER = 8 / HIGH;
    const I plane = iload(tile + 128 * LOW + 64 * (i / HIGH_PER));
    const int left = LOW - HIGH * (i % HIGH_PER);  // to where the high bits belong
    return ior(low, iand(left >= 0 ? shl(plane, left) : shr(plane, -left), iset8(((1 << HIGH) - 1) << LOW)));
  }
}

// What the integer products multiply: codes as they are, or the codebook's bytes, looked up in registers.
template <int BITS, bool LOOKUP> struct Reader {
  explicit Reader(const uint8_t*) {}
  INLINE I operator()(const uint8_t* tile, int i, int part) const { return field<BITS>(tile, i, part); }
};
template <int BITS> struct Reader<BITS, true> {
  explicit Reader(const uint8_t* entries) : book(entries) {}
  INLINE I operator()(const uint8_t* tile, int i, int part) const {
#if defined(OPENTQ_BOOK_OF_16)
    if constexpr (BITS > 4) {  // high bits choose among tables, and need not join the low ones
      constexpr int HIGH = BITS - 4, PER = 8 / HIGH;
      tile += 4 * W * part;
      const I low = iand(shr(iload(tile + 64 * (i / 2)), 4 * (i % 2)), iset8(15)), plane = iload(tile + 512 + 64 * (i / PER));
      return book.entry(low, shl(plane, 7 - HIGH * (i % PER)), shl(plane, 8 - HIGH - HIGH * (i % PER)));
    }
#endif
    return book[field<BITS>(tile, i, part)];
  }
  Table<BITS> book;
};

// All tiles of a block with one byte per code (the 8-bit layout), for callers that read a block many times.
template <int BITS, bool LOOKUP> void widen(const uint8_t* codes, int tiles, const uint8_t* book, uint8_t* out) {
  const Reader<BITS, LOOKUP> read(book);
  for (int t = 0; t < tiles; t++, codes += 128 * BITS, out += 1024)
    for (int part = 0; part < PARTS; part++)
      UNROLL for (int i = 0; i < 16; i++) istore(out + 64 * i + 4 * W * part, read(codes, i, part));
}

}  // namespace otq
