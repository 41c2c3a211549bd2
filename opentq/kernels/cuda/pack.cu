// Encoding straight into the storage layout of record.cuh, one launch, one read and one write.
//
// Input y [B, H, T, D], rotated, T a multiple of 64; output records [B, H, T/64, 2 RECORD]. A block makes one record of
// 32 tokens: every code once, as a byte in shared memory (rows padded by a word, so that neither rows nor columns meet
// in a bank), and then every thread builds whole words of the layout from their fields. Values, rounding and order are
// those of the codecs, so the bits are the same.
//   Affine (codecs/affine.py): scale = fp16((max - min) / top), zero = fp16(min), code = rint((x - zero) / scale)
//   clipped to 0 .. top; a group whose scale rounds to 0 stores zero = fp16((min + max) / 2) and codes 0.
//   Codebooks (codecs/turbo.py): the lengths [B, H, T, runs] float come with the call, because a mean depends on the
//   order of its sum; scale = fp16(length), code = how many boundaries lie below x / scale. NORM: what is stored is
//   fp16(length / length of the entries).
// Bytes moved: T * D * sizeof(T) read, the record written.
#include "record.cuh"

namespace opentq {

constexpr int THREADS = 128;
constexpr int PAD = 4;  // bytes behind a row of codes

template <class T>
__device__ __forceinline__ float clipped(const T& x) {
  return fminf(fmaxf(to_float(x), -65504.f), 65504.f);
}

// Where the number of a token and group lies behind the codes.
template <bool KEYS>
__device__ __forceinline__ int number_at(int token, int group, int groups) {
  if constexpr (KEYS) return token * groups + group;
  return group * 32 + 8 * (token % 8 / 2) + 4 * (token / 16) + 2 * (token / 8 % 2) + token % 2;
}

// Where word `index` of `lane` lies in a plane of COUNT words per lane.
template <int COUNT>
__device__ __forceinline__ void locate(int at, int& index, int& lane) {
  constexpr int QUADS = COUNT / 4 * 128, REST = COUNT % 4 ? COUNT % 4 : 1;
  if (at < QUADS) {
    index = at / 128 * 4 + at % 4, lane = at % 128 / 4;
  } else {
    index = COUNT / 4 * 4 + (at - QUADS) % REST, lane = (at - QUADS) / REST;
  }
}

// The codes [32][D + PAD] of one run -> its words, all planes.
template <class F, bool KEYS>
__device__ __forceinline__ void write_codes(const unsigned char* codes, u32* out) {
  // The word of one lane's registers [first, first + count), in the low or the high plane.
  auto word = [&](int first, int count, int lane, bool high) {
    u32 bits = 0;
    for (int k = 0; k < count && first + k < 8 * F::TILES; ++k) {
      const int i = (first + k) / 4, r = (first + k) % 4, strip = i / F::TILES, tile = i % F::TILES;
      for (int h = 0; h < 2; ++h) {
        const int row = lane / 4 + 8 * (r % 2), col = 2 * (lane % 4) + h + 8 * (r / 2);
        const int token = 16 * strip + (KEYS ? row : col), dim = 16 * tile + (KEYS ? col : row);
        const u32 code = codes[token * (F::D + PAD) + dim];
        if constexpr (F::HIGH > 0) {
          bits |= high ? F::high(code, k, h) : F::low(code, k, h);
        } else {
          bits |= F::low(code, k, h);
        }
      }
    }
    return bits;
  };
  for (int i = threadIdx.x; i < 32 * F::LOW; i += THREADS) {
    int index, lane;
    locate<F::LOW>(i, index, lane);
    out[i] = word(16 / F::PLANE * index, 16 / F::PLANE, lane, false);
  }
  if constexpr (F::HIGH > 0)
    for (int i = threadIdx.x; i < 32 * F::HIGH; i += THREADS) {
      int index, lane;
      locate<F::HIGH>(i, index, lane);
      out[32 * F::LOW + i] = word(16 * index, 16, lane, true);
    }
}

template <class T, class F, bool KEYS>
__device__ __forceinline__ void pack_affine(const T* y, u32* records) {
  constexpr int ROW = F::D + 1, TOP = (1 << F::BITS) - 1;
  float* x = reinterpret_cast<float*>(shared_memory());
  float2* pairs = reinterpret_cast<float2*>(x + 32 * ROW);  // scale and zero, [32][GROUPS]
  unsigned char* codes = reinterpret_cast<unsigned char*>(pairs + 32 * F::GROUPS);
  y += (size_t)blockIdx.x * 32 * F::D;
  u32* out = records + (size_t)blockIdx.x * F::RECORD;
  for (int i = threadIdx.x; i < 32 * F::D; i += THREADS) x[i / F::D * ROW + i % F::D] = clipped(y[i]);
  sync_block();
  u16* numbers = reinterpret_cast<u16*>(out + F::SCALES);
  for (int i = threadIdx.x; i < 32 * F::GROUPS; i += THREADS) {
    const int token = i % 32, group = i / 32;
    const int first = group * F::GROUP, last = min(first + F::GROUP, F::D);
    const float* row = x + token * ROW;
    float low = row[first], high = low;
    for (int d = first + 1; d < last; ++d) low = fminf(low, row[d]), high = fmaxf(high, row[d]);
    const u16 scale = to_half_bits(__fdiv_rn(high - low, (float)TOP));
    const u16 zero = to_half_bits(scale ? low : (low + high) / 2);
    pairs[token * F::GROUPS + group] = make_float2(half_bits(scale), half_bits(zero));
    const int at = number_at<KEYS>(token, group, F::GROUPS);
    numbers[at] = scale, numbers[32 * F::GROUPS + at] = zero;
  }
  sync_block();
  for (int i = threadIdx.x; i < 32 * F::D; i += THREADS) {
    const int token = i / F::D, d = i % F::D;
    const float2 pair = pairs[token * F::GROUPS + d / F::GROUP];
    const float code = pair.x == 0.f ? 0.f : rintf(__fdiv_rn(x[token * ROW + d] - pair.y, pair.x));
    codes[token * (F::D + PAD) + d] = (unsigned char)fminf(fmaxf(code, 0.f), (float)TOP);
  }
  sync_block();
  write_codes<F, KEYS>(codes, out);
}

// Run RUN of a record of format R, in codes of book F. `cuts`: the boundaries, `step`: as the codec multiplies by it.
template <class T, class R, class F, int RUN, bool KEYS, bool NORM, int CUTS>
__device__ __forceinline__ void pack_book(const T* y, const float* lengths, u32* records, const float (&cuts)[CUTS],
                                          float step) {
  constexpr int RUNS = R::GROUPS, ROW = F::D + PAD;
  unsigned char* codes = shared_memory();
  y += (size_t)blockIdx.x * 32 * RUNS * F::D + RUN * F::D;
  lengths += (size_t)blockIdx.x * 32 * RUNS + RUN;
  u32* out = records + (size_t)blockIdx.x * R::RECORD;
  if (RUN > 0) sync_block();  // the bytes of the run before have been read
  for (int i = threadIdx.x; i < 32 * F::D; i += THREADS) {
    const int token = i / F::D, d = i % F::D;
    const u16 scale = to_half_bits(lengths[token * RUNS]);
    const float x = __fdiv_rn(clipped(y[token * RUNS * F::D + d]), scale ? half_bits(scale) : 1.f);
    int code = 0;
#pragma unroll
    for (int j = 0; j < CUTS; ++j) code += x > cuts[j];
    codes[token * ROW + d] = (unsigned char)F::ranked(code);
  }
  sync_block();
  if (threadIdx.x < 32) {
    const int token = threadIdx.x;
    float length = lengths[token * RUNS];
    if constexpr (NORM) {
      int squares = 0;  // exact in any order
      for (int d = 0; d < F::D; ++d) {
        const int entry = F::entry(codes[token * ROW + d]);
        squares += entry * entry;
      }
      length = fminf(__fdiv_rn(length, __fsqrt_rn(__fdiv_rn((float)squares, (float)F::D)) * step), 65504.f);
    }
    reinterpret_cast<u16*>(out + R::SCALES)[number_at<KEYS>(token, RUN, RUNS)] = to_half_bits(length);
  }
  write_codes<F, KEYS>(codes, out + RUN * (R::SCALES - F::SCALES));
}

}  // namespace opentq
