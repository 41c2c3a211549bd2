// Affine encoding straight into the storage layout of record.cuh, one launch, one read and one write.
//
// Input y [B, H, T, D], rotated, T a multiple of 64; output records [B, H, T/64, 2 RECORD]. A block makes one record of
// 32 tokens. It stages the vectors in shared memory as fp32 (rows padded by one word, so that neither rows nor columns
// meet in a bank), finds scale and zero of every (token, group), and then every thread builds whole words of the layout
// from their fields. Values, rounding and order are those of `codecs/affine.py`, so the bits are the same:
//   scale = fp16((max - min) / top), zero = fp16(min), code = rint((x - zero) / scale) clipped to 0 .. top;
//   a group whose scale rounds to 0 stores zero = fp16((min + max) / 2) and codes 0.
// Bytes moved: T * D * sizeof(T) read, the record written.
#include "record.cuh"

namespace opentq {

template <class F, int BITS, bool KEYS>
struct Encoder {
  static constexpr int ROW = F::D + 1;
  static constexpr int TOP = (1 << BITS) - 1;
  const float* x;       // [32][ROW]
  const float* scales;  // [32][GROUPS][2]

  __device__ __forceinline__ u32 code(int token, int dim) const {
    const float* pair = scales + (token * F::GROUPS + dim / F::GROUP) * 2;
    if (pair[0] == 0.f) return 0u;
    const float y = rintf(divide(x[token * ROW + dim] - pair[1], pair[0]));
    return (u32)fminf(fmaxf(y, 0.f), (float)TOP);
  }

  // Code of fragment element (register r, half h) of tile i as seen by `lane`.
  __device__ __forceinline__ u32 element(int i, int lane, int r, int h) const {
    const int g = lane / 4, t = lane % 4, strip = i / F::TILES, tile = i % F::TILES;
    const int row = g + 8 * (r % 2), col = 2 * t + h + 8 * (r / 2);
    return KEYS ? code(16 * strip + row, 16 * tile + col) : code(16 * strip + col, 16 * tile + row);
  }

  // Word `index` of a lane in the first plane, and in the plane of high bits of 3-bit codes.
  __device__ __forceinline__ u32 low_word(int index, int lane) const {
    u32 word = 0;
    if constexpr (BITS == 8) {
      for (int r = 0; r < 2; ++r)
        for (int h = 0; h < 2; ++h) word |= element(index / 2, lane, 2 * (index % 2) + r, h) << (8 * r + 16 * h);
    } else if constexpr (BITS == 4) {
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h) word |= element(index, lane, r, h) << (4 * r + 16 * h);
    } else {
      for (int i = 0; i < 2; ++i)
        for (int r = 0; r < 4; ++r)
          for (int h = 0; h < 2; ++h) word |= (element(2 * index + i, lane, r, h) & 3u) << (8 * i + 2 * r + 16 * h);
    }
    return word;
  }
  __device__ __forceinline__ u32 high_word(int index, int lane) const {
    u32 word = 0;
    for (int i = 0; i < 4 && 4 * index + i < 2 * F::TILES; ++i)
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h)
          word |= (element(4 * index + i, lane, r, h) >> 2) << (4 * i + r / 2 + 2 * (r % 2) + 16 * h);
    return word;
  }

  static __device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
};

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

template <class T, class F, int BITS, bool KEYS>
__device__ __forceinline__ void pack(const T* y, u32* records) {
  using E = Encoder<F, BITS, KEYS>;
  float* x = reinterpret_cast<float*>(shared_memory());
  float* scales = x + 32 * E::ROW;
  const size_t record = blockIdx.x;
  y += record * 32 * F::D;
  u32* out = records + record * F::RECORD;
  const int threads = 128;
  for (int i = threadIdx.x; i < 32 * F::D; i += threads)
    x[i / F::D * E::ROW + i % F::D] = fminf(fmaxf(to_float(y[i]), -65504.f), 65504.f);
  sync_block();
  u16* numbers = reinterpret_cast<u16*>(out + F::SCALES);
  for (int i = threadIdx.x; i < 32 * F::GROUPS; i += threads) {
    const int token = i % 32, group = i / 32;
    const int first = group * F::GROUP, last = min(first + F::GROUP, F::D);
    const float* row = x + token * E::ROW;
    float low = row[first], high = low;
    for (int d = first + 1; d < last; ++d) low = fminf(low, row[d]), high = fmaxf(high, row[d]);
    const u16 scale = to_half_bits(E::divide(high - low, (float)E::TOP));
    const u16 zero = to_half_bits(scale ? low : (low + high) / 2);
    scales[(token * F::GROUPS + group) * 2] = half_bits(scale);
    scales[(token * F::GROUPS + group) * 2 + 1] = half_bits(zero);
    const int at = KEYS ? token * F::GROUPS + group
                        : group * 32 + 8 * (token % 8 / 2) + 4 * (token / 16) + 2 * (token / 8 % 2) + token % 2;
    numbers[at] = scale, numbers[32 * F::GROUPS + at] = zero;
  }
  sync_block();
  const E encoder{x, scales};
  for (int i = threadIdx.x; i < 32 * F::LOW; i += threads) {
    int index, lane;
    locate<F::LOW>(i, index, lane);
    out[i] = encoder.low_word(index, lane);
  }
  if constexpr (F::HIGH > 0)
    for (int i = threadIdx.x; i < 32 * F::HIGH; i += threads) {
      int index, lane;
      locate<F::HIGH>(i, index, lane);
      out[32 * F::LOW + i] = encoder.high_word(index, lane);
    }
}

}  // namespace opentq
