// The blocked storage layout of affine-coded keys and values, bit by bit.
//
// A tensor [B, H, T, D] is stored as [B, H, T/64, block_bytes]: one block holds 64 tokens of one KV head,
//
//   D/16 tiles of 128*bits bytes | G groups of (64 fp16 scales, 64 fp16 zeros)          x = code * scale + zero
//
// which is exactly the canonical number of bits (8*bits*D + 256*G bytes): no padding. A tile is 16 channels x 64 tokens =
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
//   3 bits   low two bits as the 2-bit tile (4 vectors), then the high bit in vector 4 + i/8, bit i%8
#pragma once
#include "abi.h"
#include "simd.h"

namespace otq {

constexpr int BLOCK = 64;                // tokens
constexpr int PARTS = 16 / W;            // vectors per 16 lanes
constexpr int TOKEN_VECTORS = BLOCK / W; // float vectors per 64 tokens

// Part `part` (4*W bytes) of field i of a tile, one code per byte. i is a constant once loops are unrolled.
template <int BITS> INLINE I field(const uint8_t* tile, int i, int part) {
  tile += 4 * W * part;
  if (BITS == 8) return iload(tile + 64 * i);
  if (BITS == 4) return iand(shr(iload(tile + 64 * (i / 2)), 4 * (i % 2)), iset8(15));
  const I low = iand(shr(iload(tile + 64 * (i / 4)), 2 * (i % 4)), iset8(3));
  if (BITS == 2) return low;
  const I plane = iload(tile + 256 + 64 * (i / 8));  // bit i%8 goes to bit 2
  return ior(low, iand(i % 8 < 2 ? shl(plane, 2 - i % 8) : shr(plane, i % 8 - 2), iset8(4)));
}

// All tiles of a block with one byte per code (the 8-bit layout), for callers that read a block many times.
template <int BITS> void widen(const uint8_t* codes, int tiles, uint8_t* out) {
  for (int t = 0; t < tiles; t++, codes += 128 * BITS, out += 1024)
    for (int part = 0; part < PARTS; part++)
      UNROLL for (int i = 0; i < 16; i++) istore(out + 64 * i + 4 * W * part, field<BITS>(codes, i, part));
}

}  // namespace otq
