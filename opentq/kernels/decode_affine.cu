// Attention of a few query rows over a packed KV cache and its dense fp16 region, in one launch.
//
// Who does what. Grid: (split, KV head x row tile, sequence). The query rows of one KV head, `gqa` heads times L tokens,
// are cut into row tiles of 8 NT rows; a block serves one row tile over its share of the keys, so that every packed byte
// is read once for up to 8 NT rows. Inside, each of NW warps works alone on records of 32 tokens, with its own running
// softmax; warps meet only at the end.
//
// How bytes arrive. Each warp owns a ring of ST stages in shared memory. One lane asks the copy engine for a whole record
// of K and of V (they are contiguous), and refills a stage as soon as the warp has used it: no register and no
// instruction waits for memory. NW * ST * 5 KB (int4 g32, D = 128) are in flight per block.
//
// Arithmetic, for one record and one tile of 8 rows. Scores: S^T = K q^T, with the 16 x 16 code tiles of `affine_block.cuh`
// as the A operand, the 8 rows as columns of B. Codes enter the tensor core raw, as fp16 denormals; per group of dims
//   S[key, row] += scale[key, group] * sum_d code[key, d] q[row, d]       (fp32)
// and the zeros come in through one more mma, zero[key, group] x sum_{d in group} q[row, d], whose B operand is split in
// a high and a low half to keep 22 bits. The C fragment of S^T becomes the B operand of the second product by two 8 x 8
// transposes. Output: O^T = V^T P^T with raw codes as A again; the scales multiply P (one fp16 multiply per key pair and
// group), the zeros are one mma into `oz`. Powers of two that the code fields carry (UNIT, LIFT) are taken back in fp32.
// Queries are scaled by a power of two into [1, 2) per row, so that bf16 and fp32 ranges fit fp16 exactly. fp32 queries and
// the probabilities that go with them are split in two halves each (PARTS = 2): 22 bits instead of 11.
//
// Dense columns go 16 at a time to the warps with the least packed work, straight from global memory with the same
// fragments, before any packed record, while the ring fills.
//
// Merge. Warps merge through shared memory. With several splits, partials (fp32 numerators, maxima, sums) go to scratch and
// the last block to arrive at the ticket of its row tile merges them: no second launch.
//
// Inputs: q [B, Hq, L, Dk] T; k, v: records [B, Hkv, blocks, 2 RECORD]; dense_k, dense_v [B, Hkv, Td, D] half; lens int
// [B, 3] = (packed, sink, tail_start); params int [4] = (scale, softcap as float bits, window, causal); sinks float [Hq] (NaN
// in the first: none); tickets u32, zero between calls. Outputs: out [B, Hq, L, Dv] T; scratch [tiles, splits, 8 NT,
// Dv + 2] float, unused with one split.
// Bytes moved: packed tokens x (record bytes / 32) per KV head and row tile, plus dense columns; nothing else of size.
#include "affine_block.cuh"

namespace opentq {

struct Shape4 {  // what the host knows: blocks allocated for k and v, dense columns, heads, rows
  int k_blocks, v_blocks, columns, q_heads, length, kv_heads;
};

__device__ __forceinline__ float bits_to_float(int x) { return __int_as_float(x); }
__device__ __forceinline__ void add(float4& y, float w, const float4& x) {
  y.x += w * x.x, y.y += w * x.y, y.z += w * x.z, y.w += w * x.w;
}
template <class T>
__device__ __forceinline__ void put(T* y, const float4& x, float f) {
  assign(y[0], x.x * f), assign(y[1], x.y * f), assign(y[2], x.z * f), assign(y[3], x.w * f);
}

template <class T, class KF, class VF, int NT, int NW, int ST>
struct Plan {
  static constexpr int ROWS = 8 * NT;
  static constexpr int PARTS = sizeof(T) == 4 ? 2 : 1;
  static constexpr int STAGE = KF::BYTES + VF::BYTES;
  static constexpr int RING = NW * ST * STAGE;
  static constexpr bool WHOLE = NW * ROWS * (VF::D + 4) * 4 <= 48 * 1024;       // outputs of all warps fit at once
  static constexpr int CHUNK = WHOLE || VF::TILES < 4 ? VF::TILES : 4;          // output tiles merged at a time
  static constexpr int MERGE_ROW = CHUNK * 16 + 4;                              // floats; +4: no bank conflict
  static constexpr int MERGE = NW * ROWS * MERGE_ROW * 4;
  static constexpr int AREA = RING > MERGE ? RING : MERGE;
  static constexpr int QUERY = KF::TILES * NT * PARTS * 64 * 4;                 // B fragments of q
  static constexpr int ZERO_PARTS = KF::GROUPS > 8 ? 2 : 1;
  static constexpr int SUMS = NT * ZERO_PARTS * 64 * 4;                         // B fragments of group sums of q
  static constexpr int BARS = NW * ST * 8;
  static constexpr int SMALL = ROWS * 8 + 2 * NW * ROWS * 4 + 16;               // row factors, positions, warp maxima, sums
  static constexpr int BYTES = AREA + QUERY + SUMS + BARS + SMALL;
};

// Running softmax of one warp: rows 2t, 2t+1 of every row tile, equal in the 8 lanes that share t; l is a lane's own part.
template <int NT, int TILES>
struct Running {
  float m[NT][2], l[NT][2];
  float o[TILES][NT][4];  // O^T: dims g, g+8 of a tile x rows 2t, 2t+1
  float oz[NT][4];        // zeros' share, groups g, g+8

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      m[n][0] = m[n][1] = -1e30f, l[n][0] = l[n][1] = 0.f;
      oz[n][0] = oz[n][1] = oz[n][2] = oz[n][3] = 0.f;
#pragma unroll
      for (int j = 0; j < TILES; ++j) o[j][n][0] = o[j][n][1] = o[j][n][2] = o[j][n][3] = 0.f;
    }
  }

  // Scores (log2 units, -infinity where masked) of STRIPS strips -> probabilities; rescales what was summed before.
  template <int STRIPS>
  __device__ __forceinline__ void softmax(float (&x)[STRIPS][NT][4]) {
    float top[NT][2];
    bool grown = false;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[n][r] = fmaxf(x[0][n][r], x[0][n][r + 2]);
#pragma unroll
        for (int s = 1; s < STRIPS; ++s) top[n][r] = fmaxf(top[n][r], fmaxf(x[s][n][r], x[s][n][r + 2]));
        grown |= top[n][r] > m[n][r];
      }
    if (any_lane(grown)) {
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float y = fmaxf(m[n][r], top[n][r]);
          y = fmaxf(y, shuffle_xor(y, 4)), y = fmaxf(y, shuffle_xor(y, 8)), y = fmaxf(y, shuffle_xor(y, 16));
          const float f = exp2_fast(m[n][r] - y);
          m[n][r] = y, l[n][r] *= f, oz[n][r] *= f, oz[n][r + 2] *= f;
#pragma unroll
          for (int j = 0; j < TILES; ++j) o[j][n][r] *= f, o[j][n][r + 2] *= f;
        }
    }
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[s][n][i] = exp2_fast(x[s][n][i] - m[n][i & 1]);
          l[n][i & 1] += x[s][n][i];
        }
  }

  __device__ __forceinline__ void scale_output(float even_rows, float odd_rows) {
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
      for (int n = 0; n < NT; ++n)
        o[j][n][0] *= even_rows, o[j][n][1] *= even_rows, o[j][n][2] *= odd_rows, o[j][n][3] *= odd_rows;
  }
};

// Probabilities of one strip (C fragment, keys x rows) as the B operand (keys x rows) of the output product.
template <int PARTS>
__device__ __forceinline__ void probabilities(u32 (&b)[PARTS][2], const float (&p)[4]) {
  const u32 lo = pack_half2(p[0], p[1]), hi = pack_half2(p[2], p[3]);
  b[0][0] = transpose8x8(lo), b[0][1] = transpose8x8(hi);
  if constexpr (PARTS == 2) {
    b[1][0] = transpose8x8(pack_half2(p[0] - low_half(lo), p[1] - high_half(lo)));
    b[1][1] = transpose8x8(pack_half2(p[2] - low_half(hi), p[3] - high_half(hi)));
  }
}

// Probabilities times the V scales of a key pair, in as many parts as they came.
template <int PARTS>
__device__ __forceinline__ void weigh(u32 (&w)[PARTS], u32 high, u32 low, u32 scale) {
  if constexpr (PARTS == 1) {
    w[0] = mul_half2(high, scale);
  } else {
    const float x = (low_half(high) + low_half(low)) * low_half(scale);
    const float y = (high_half(high) + high_half(low)) * high_half(scale);
    w[0] = pack_half2(x, y);
    w[1] = pack_half2(x - low_half(w[0]), y - high_half(w[0]));
  }
}

template <class T, class KF, class VF, int NT, int NW, int ST>
struct Decode {
  using P = Plan<T, KF, VF, NT, NW, ST>;
  static constexpr int ROWS = P::ROWS, PARTS = P::PARTS, RS = KF::TILES * NT * PARTS <= 16 ? 1 : 0;

  int lane, warp, g, t;
  const u32 *query, *sums;                // shared
  const float* factor;                    // shared: score of a row in log2 units = factor * sum q' k
  const int* position;                    // shared: logical position of each row
  u32 held[RS ? KF::TILES : 1][NT][PARTS][2];  // q in registers where it is small
  float softcap, f[NT][2];
  int window, causal, packed, sink;
  Running<NT, VF::TILES> run;

  __device__ __forceinline__ void load_query(u32 (&b)[2], int j, int n, int part) const {
    if constexpr (RS) {
      b[0] = held[j][n][part][0], b[1] = held[j][n][part][1];
    } else {
      const uint2 v = reinterpret_cast<const uint2*>(query)[((j * NT + n) * PARTS + part) * 32 + lane];
      b[0] = v.x, b[1] = v.y;
    }
  }

  // Raw products -> scores in log2 units. `even`, `odd`: what the products of rows g and g+8 still lack.
  template <int STRIPS>
  __device__ __forceinline__ void to_scores(float (&x)[STRIPS][NT][4], float even, float odd) const {
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[s][n][i] *= f[n][i & 1] * (i < 2 ? even : odd);
    if (softcap > 0.f) {
#pragma unroll
      for (int s = 0; s < STRIPS; ++s)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) x[s][n][i] = softcap * tanhf(x[s][n][i] / softcap);
    }
  }

  // Hide one key (0: row g of the fragment, 1: row g+8) at logical position `pos` from the rows that don't see it.
  __device__ __forceinline__ void mask(float (&x)[NT][4], int key, int pos, bool exists) const {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = position[8 * n + 2 * t + r];
        const bool seen = exists && (!causal || pos <= row) && (!window || pos > row - window);
        if (!seen) x[n][2 * key + r] = bits_to_float(0xff800000);
      }
  }

  // The V scales and zeros of tokens that do not exist may be anything, NaN included: make them zeros, in place.
  __device__ __forceinline__ void blank(u32* v, int first) const {
    u16* numbers = reinterpret_cast<u16*>(v + VF::SCALES);
    const int at = 8 * (lane % 8 / 2) + 4 * (lane / 16) + 2 * (lane / 8 % 2) + lane % 2;
    if (first + lane >= packed)
      for (int i = 0; i < 2 * VF::GROUPS; ++i) numbers[32 * i + at] = 0;
    fence_bulk();
    sync_warp();
  }

  // One record of 32 tokens. Straight-line code but for the rare masks: two strips at a time keep the tensor cores busy.
  __device__ __forceinline__ void record(const u32* k, const u32* v, int first, bool masked) {
    float x[2][NT][4];
    const u16* k_scales = reinterpret_cast<const u16*>(k + KF::SCALES) + g * KF::GROUPS;
    const u16* k_zeros = reinterpret_cast<const u16*>(k + KF::ZEROS) + g * KF::GROUPS;
    constexpr int EIGHT = 8 * KF::GROUPS;  // eight keys on
    u32 a[4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      a[0] = key_zeros<KF::GROUPS>(k_zeros + 2 * s * EIGHT, 2 * t);
      a[1] = key_zeros<KF::GROUPS>(k_zeros + (2 * s + 1) * EIGHT, 2 * t);
      // Up to 8 groups: the lower half of the contraction meets the sums' high parts, the upper half their low parts.
      a[2] = P::ZERO_PARTS == 1 ? a[0] : key_zeros<KF::GROUPS>(k_zeros + 2 * s * EIGHT, 2 * t + 8);
      a[3] = P::ZERO_PARTS == 1 ? a[1] : key_zeros<KF::GROUPS>(k_zeros + (2 * s + 1) * EIGHT, 2 * t + 8);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        x[s][n][0] = x[s][n][1] = x[s][n][2] = x[s][n][3] = 0.f;
#pragma unroll
        for (int z = 0; z < P::ZERO_PARTS; ++z) {
          const uint2 b = reinterpret_cast<const uint2*>(sums)[(n * P::ZERO_PARTS + z) * 32 + lane];
          mma(x[s][n], a, b.x, b.y);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) x[s][n][i] *= (i < 2 ? 1.f : KF::LIFT) / UNIT;
      }
    }
    float scale[2][2][KF::GROUPS];  // strip, key g or g+8
#pragma unroll
    for (int s = 0; s < 4; ++s) key_scales<KF::GROUPS>(scale[s / 2][s % 2], k_scales + s * EIGHT);
    Fragments<KF> upper;
    Fragments<KF, KF::TILES> lower;
#pragma unroll
    for (int group = 0; group < KF::GROUPS; ++group) {
      float c[2][NT][4];
#pragma unroll
      for (int i = 0; i < 8 * NT; ++i) c[i / (4 * NT)][i / 4 % NT][i % 4] = 0.f;
#pragma unroll
      for (int j = group * KF::GROUP / 16; j < KF::TILES && j < (group + 1) * KF::GROUP / 16; ++j) {
        u32 b[4];
        upper.tile(a, k, lane, j);
        lower.tile(b, k, lane, KF::TILES + j);
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int part = 0; part < PARTS; ++part) {
            u32 w[2];
            load_query(w, j, n, part);
            mma(c[0][n], a, w[0], w[1]);
            mma(c[1][n], b, w[0], w[1]);
          }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) x[s][n][i] += scale[s][i / 2][group] * c[s][n][i];
    }
    to_scores(x, UNIT, UNIT / KF::LIFT);
    if (masked)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first + 8 * i + g;
        mask(x[i / 2], i % 2, sink + token, token < packed);
      }
    run.softmax(x);

    const u16* v_scales = reinterpret_cast<const u16*>(v + VF::SCALES) + 8 * t;
    const u16* v_zeros = reinterpret_cast<const u16*>(v + VF::ZEROS) + 8 * t;
    Fragments<VF> values;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      u32 b[NT][PARTS][2];
#pragma unroll
      for (int n = 0; n < NT; ++n) probabilities<PARTS>(b[n], x[s][n]);
      a[0] = a[1] = a[2] = a[3] = 0u;
#pragma unroll
      for (int half = 0; half < (VF::GROUPS > 8 ? 2 : 1); ++half)
        if (g + 8 * half < VF::GROUPS) {
          const uint2 z = *reinterpret_cast<const uint2*>(v_zeros + (g + 8 * half) * 32 + 4 * s);
          a[half] = z.x, a[2 + half] = z.y;
        }
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) mma(run.oz[n], a, b[n][part][0], b[n][part][1]);
#pragma unroll
      for (int group = 0; group < VF::GROUPS; ++group) {
        const uint2 scales = *reinterpret_cast<const uint2*>(v_scales + group * 32 + 4 * s);
        u32 w[NT][2][PARTS];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          weigh<PARTS>(w[n][0], b[n][0][0], b[n][PARTS - 1][0], scales.x);
          weigh<PARTS>(w[n][1], b[n][0][1], b[n][PARTS - 1][1], scales.y);
        }
#pragma unroll
        for (int j = group * VF::GROUP / 16; j < VF::TILES && j < (group + 1) * VF::GROUP / 16; ++j) {
          values.tile(a, v, lane, s * VF::TILES + j);
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int part = 0; part < PARTS; ++part) mma(run.o[j][n], a, w[n][0][part], w[n][1][part]);
        }
      }
    }
  }

  // 16 dense columns from `first`; those in [sink, tail_start) and from `columns` on do not exist.
  __device__ __forceinline__ void dense(const __half* k, const __half* v, int first, int tail_start, int columns) {
    const int column[2] = {first + g, first + g + 8};
    bool exists[2];
    const u32 *k_row[2], *v_row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      exists[i] = column[i] < sink || (column[i] >= tail_start && column[i] < columns);
      const int safe = exists[i] ? column[i] : columns - 1;
      k_row[i] = reinterpret_cast<const u32*>(k + (size_t)safe * KF::D) + t;
      v_row[i] = reinterpret_cast<const u32*>(v + (size_t)safe * VF::D) + t;
    }
    // All values are asked for before the first key is used, where registers allow it: one wait instead of two.
    constexpr int AHEAD = VF::TILES * NT <= 8 ? VF::TILES : 1;
    u32 ahead[AHEAD][4];
    auto value = [&](int j, int i) {  // i: dims + 8 (i % 2), keys + 8 (i / 2)
      const u32 w = v_row[i / 2][8 * j + 4 * (i % 2)];
      return exists[i / 2] ? w : 0u;
    };
#pragma unroll
    for (int i = 0; i < 4 * AHEAD; ++i) ahead[i / 4][i % 4] = value(i / 4, i % 4);
    float x[1][NT][4];
#pragma unroll
    for (int n = 0; n < NT; ++n) x[0][n][0] = x[0][n][1] = x[0][n][2] = x[0][n][3] = 0.f;
#pragma unroll
    for (int j = 0; j < KF::TILES; ++j) {
      const u32 a[4] = {k_row[0][8 * j], k_row[1][8 * j], k_row[0][8 * j + 4], k_row[1][8 * j + 4]};
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          u32 w[2];
          load_query(w, j, n, part);
          mma(x[0][n], a, w[0], w[1]);
        }
    }
    to_scores(x, 1.f, 1.f);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      mask(x[0], i, column[i] < sink ? column[i] : sink + packed + column[i] - tail_start, exists[i]);
    run.softmax(x);
    u32 b[NT][PARTS][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) probabilities<PARTS>(b[n], x[0][n]);
#pragma unroll
    for (int j = 0; j < VF::TILES; ++j) {
      u32 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = transpose8x8(j < AHEAD ? ahead[j % AHEAD][i] : value(j, i));
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) mma(run.o[j][n], a, b[n][part][0], b[n][part][1]);
    }
  }
};

// Query rows of one KV head -> B fragments, their group sums, and the factor of each row. Loaded first, used later, so that
// the wait is shared with the one for the lengths.
template <class T, class KF, int NT, int NW, int PARTS, int ZERO_PARTS>
struct QueryStage {
  static constexpr int STEPS = (KF::D + 31) / 32, MINE = (8 * NT + NW - 1) / NW;
  T raw[MINE][STEPS];

  __device__ __forceinline__ void load(const T* q, int rows, int warp, int lane) {
#pragma unroll
    for (int k = 0; k < MINE; ++k)
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        const int r = warp + k * NW, d = 32 * i + lane;
        if (r < rows && d < KF::D) {
          raw[k][i] = q[(size_t)r * KF::D + d];
        } else {
          assign(raw[k][i], 0.f);
        }
      }
  }

  __device__ __forceinline__ void store(float scale, u16* query, u16* sums, float* factor, int warp, int lane) const {
    constexpr float LOG2E = 1.4426950408889634f;
#pragma unroll
    for (int k = 0; k < MINE; ++k) {
      const int r = warp + k * NW;
      if (r >= 8 * NT) break;
      float x[STEPS], top = 0.f;
#pragma unroll
      for (int i = 0; i < STEPS; ++i) x[i] = to_float(raw[k][i]), top = fmaxf(top, fabsf(x[i]));
#pragma unroll
      for (int i = 16; i; i /= 2) top = fmaxf(top, shuffle_xor(top, i));
      const int e = top > 1e-30f ? ilogbf(top) : 0;
      const float shrink = ldexpf(1.f, -e);
      if (lane == 0) factor[r] = scale * LOG2E * ldexpf(1.f, e);
      float sum[KF::GROUPS];
#pragma unroll
      for (int i = 0; i < KF::GROUPS; ++i) sum[i] = 0.f;
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        x[i] *= shrink;
        const int d = 32 * i + lane;
        u16 part[2];
        part[0] = to_half_bits(x[i]);
        part[1] = to_half_bits(x[i] - half_bits(part[0]));
        // The sum is over what the tensor core will multiply.
        sum[32 * i / KF::GROUP] += half_bits(part[0]) + (PARTS == 2 ? half_bits(part[1]) : 0.f);
        if (d < KF::D) {
          const int target = 4 * (r % 8) + d % 8 / 2;
#pragma unroll
          for (int p = 0; p < PARTS; ++p)
            query[(((((d / 16) * NT + r / 8) * PARTS + p) * 32 + target) * 2 + d % 16 / 8) * 2 + d % 2] = part[p];
        }
      }
#pragma unroll
      for (int s = 16; s; s /= 2)
#pragma unroll
        for (int i = 0; i < KF::GROUPS; ++i) sum[i] += shuffle_xor(sum[i], s);
      // Contraction rows: the high parts of the sums, then the low parts, each padded to 8 or 16 groups.
      constexpr int PAD = 8 * ZERO_PARTS;
#pragma unroll
      for (int i = 0; i < PAD; ++i) {
        const float mine = i < KF::GROUPS ? sum[i < KF::GROUPS ? i : 0] : 0.f;
        const u16 high = to_half_bits(mine), low = to_half_bits(mine - half_bits(high));
        if (lane == i || lane == i + PAD) {
          const int d = lane % 16, target = 4 * (r % 8) + d % 8 / 2;
          sums[((((r / 8) * ZERO_PARTS + lane / 16) * 32 + target) * 2 + d / 8) * 2 + d % 2] = lane < PAD ? high : low;
        }
      }
    }
  }
};

template <class T, class KF, class VF, int NT, int NW, int ST, int SHARED>
__device__ __forceinline__ void decode(const T* q, const u32* k, const u32* v, const __half* dense_k,
                                       const __half* dense_v, const int* lens, const int* params, const float* sinks,
                                       const u32* tickets, T* out, float* scratch, Shape4 shape) {
  using P = Plan<T, KF, VF, NT, NW, ST>;
  using D = Decode<T, KF, VF, NT, NW, ST>;
  static_assert(P::BYTES <= SHARED, "the launch geometry reserves too little shared memory");
  constexpr int ROWS = P::ROWS;
  unsigned char* shared = shared_memory();
  unsigned char* at = shared + P::AREA;
  u32* query = reinterpret_cast<u32*>(at);
  u32* sums = reinterpret_cast<u32*>(at + P::QUERY);
  u64* bars = reinterpret_cast<u64*>(at + P::QUERY + P::SUMS);
  float* factor = reinterpret_cast<float*>(at + P::QUERY + P::SUMS + P::BARS);
  int* position = reinterpret_cast<int*>(factor + ROWS);
  float* warp_m = reinterpret_cast<float*>(position + ROWS);
  float* warp_l = warp_m + NW * ROWS;
  int* last = reinterpret_cast<int*>(warp_l + NW * ROWS);

  const int split = blockIdx.x, splits = gridDim.x, b = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int gqa = shape.q_heads / shape.kv_heads, length = shape.length, all_rows = gqa * length;
  const int tiles = (all_rows + ROWS - 1) / ROWS, head = blockIdx.y / tiles, r0 = blockIdx.y % tiles * ROWS;
  const int rows = min(ROWS, all_rows - r0);
  const size_t kv = (size_t)b * shape.kv_heads + head;
  QueryStage<T, KF, NT, NW, P::PARTS, P::ZERO_PARTS> stage_query;
  stage_query.load(q + (kv * all_rows + r0) * KF::D, rows, warp, lane);
  const int packed = lens[3 * b], sink = lens[3 * b + 1], tail_start = lens[3 * b + 2];
  const int window = params[2], causal = params[3], columns = shape.columns;
  const int row_base = sink + packed + columns - length - tail_start;  // position of query token 0

  // Tokens of this tile: all of them once it spans a head's end, else r0 .. r0 + rows - 1.
  const bool spans = r0 % length + rows > length;
  const int low_row = row_base + (spans ? 0 : r0 % length);
  const int high_row = row_base + (spans ? length : r0 % length + rows) - 1;

  // Records [u0, u1) of 32 tokens, dealt out one by one to all warps of all splits.
  const int workers = splits * NW, worker = split * NW + warp;
  const int lowest = window ? max(0, low_row - window + 1 - sink) : 0;
  const int u0 = min(lowest, packed) / 32, u1 = (packed + 31) / 32;
  const u32* k_records = k + kv * shape.k_blocks * 2 * KF::RECORD;
  const u32* v_records = v + kv * shape.v_blocks * 2 * VF::RECORD;
  unsigned char* ring = shared + warp * ST * P::STAGE;
  u64* bar = bars + warp * ST;
  auto fetch = [&](int stage, int unit) {
    unsigned char* to = ring + stage * P::STAGE;
    barrier_expect(bar + stage, P::STAGE);
    bulk_copy(to, k_records + (size_t)unit * KF::RECORD, KF::BYTES, bar + stage);
    bulk_copy(to + KF::BYTES, v_records + (size_t)unit * VF::RECORD, VF::BYTES, bar + stage);
  };
  if (lane == 0) {
    for (int s = 0; s < ST; ++s) barrier_init(bar + s);
    for (int s = 0; s < ST; ++s)
      if (u0 + worker + s * workers < u1) fetch(s, u0 + worker + s * workers);
  }

  stage_query.store(bits_to_float(params[0]), reinterpret_cast<u16*>(query), reinterpret_cast<u16*>(sums), factor, warp,
                    lane);
  for (int r = threadIdx.x; r < ROWS; r += NW * 32) position[r] = row_base + (r0 + r) % length;
  sync_block();

  D d;
  d.lane = lane, d.warp = warp, d.g = lane / 4, d.t = lane % 4;
  d.query = query, d.sums = sums, d.factor = factor, d.position = position;
  d.softcap = bits_to_float(params[1]) * 1.4426950408889634f;
  d.window = window, d.causal = causal, d.packed = packed, d.sink = sink;
  d.run.clear();
#pragma unroll
  for (int n = 0; n < NT; ++n) d.f[n][0] = factor[8 * n + 2 * d.t], d.f[n][1] = factor[8 * n + 2 * d.t + 1];
  if constexpr (D::RS) {
#pragma unroll
    for (int j = 0; j < KF::TILES; ++j)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int p = 0; p < P::PARTS; ++p) {
          const uint2 w = reinterpret_cast<const uint2*>(query)[((j * NT + n) * P::PARTS + p) * 32 + lane];
          d.held[j][n][p][0] = w.x, d.held[j][n][p][1] = w.y;
        }
  }

  // Dense strips: the sink's, then the tail's from the first that any row of the tile sees to the last.
  const int tail_pos = sink + packed - tail_start;  // position of a tail column = tail_pos + column
  const int sink_strips = (sink + 15) / 16;
  int c0 = max(tail_start / 16, sink_strips), c1 = (columns + 15) / 16;
  if (window) c0 = max(c0, (low_row - window + 1 - tail_pos) / 16);
  if (causal) c1 = min(c1, (high_row - tail_pos) / 16 + 1);
  const int strips = sink_strips + max(0, c1 - c0);
  for (int i = workers - 1 - worker; i < strips; i += workers)
    d.dense(dense_k + kv * columns * KF::D, dense_v + kv * columns * VF::D,
            16 * (i < sink_strips ? i : c0 + i - sink_strips), tail_start, columns);
  d.run.scale_output(1.f / UNIT, VF::LIFT / UNIT);

  int stage = 0;
  u32 phase = 0;
  for (int u = u0 + worker; u < u1; u += workers) {
    barrier_wait(bar + stage, phase);
    u32* record = reinterpret_cast<u32*>(ring + stage * P::STAGE);
    const bool partial = 32 * u + 32 > packed;
    if (partial) d.blank(record + KF::RECORD, 32 * u);
    d.record(record, record + KF::RECORD, 32 * u, partial || (window && sink + 32 * u <= high_row - window));
    sync_warp();
    if (lane == 0 && u + ST * workers < u1) fetch(stage, u + ST * workers);
    if (++stage == ST) stage = 0, phase ^= 1;
  }
  d.run.scale_output(UNIT, UNIT / VF::LIFT);

  // Warps: maxima and sums, then the outputs, CHUNK tiles at a time.
  const int g = d.g, t = d.t;
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float l = d.run.l[n][r];
      l += shuffle_xor(l, 4), l += shuffle_xor(l, 8), l += shuffle_xor(l, 16);
      if (g == 0) warp_m[warp * ROWS + 8 * n + 2 * t + r] = d.run.m[n][r], warp_l[warp * ROWS + 8 * n + 2 * t + r] = l;
    }
  sync_block();  // also: every warp is done with its ring
  float mine[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = -1e30f;
      for (int w = 0; w < NW; ++w) m = fmaxf(m, warp_m[w * ROWS + 8 * n + 2 * t + r]);
      mine[n][r] = exp2_fast(d.run.m[n][r] - m);
    }
  float* merge = reinterpret_cast<float*>(shared);
  const int tile_index = blockIdx.z * gridDim.y + blockIdx.y;
  float* partial = scratch + ((size_t)tile_index * splits + split) * ROWS * (VF::D + 2);
  T* out_rows = out + (kv * all_rows + r0) * VF::D;

  // The warps' common maximum of a row, and its sum.
  auto total = [&](int row, float& top) {
    float sum = 0.f;
    top = -1e30f;
#pragma unroll
    for (int w = 0; w < NW; ++w) top = fmaxf(top, warp_m[w * ROWS + row]);
#pragma unroll
    for (int w = 0; w < NW; ++w) sum += warp_l[w * ROWS + row] * exp2_fast(warp_m[w * ROWS + row] - top);
    return sum;
  };
  auto finish = [&](float sum, float top, int row) {  // what numerators relative to `top` are multiplied with
    if (sinks[0] == sinks[0]) {
      const float x = sinks[head * gqa + (r0 + row) / length] * 1.4426950408889634f, y = fmaxf(top, x);
      const float shrink = exp2_fast(top - y);
      return shrink / (sum * shrink + exp2_fast(x - y));
    }
    return sum > 0.f ? 1.f / sum : 0.f;
  };

  constexpr int GROUP_TILES = VF::GROUP / 16;
#pragma unroll
  for (int j0 = 0; j0 < VF::TILES; j0 += P::CHUNK) {
#pragma unroll
    for (int jj = 0; jj < P::CHUNK; ++jj)
      if (j0 + jj < VF::TILES) {
        const int j = j0 + jj, group = j / GROUP_TILES;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float zero = shuffle(d.run.oz[n][2 * (group / 8) + i % 2], 4 * (group % 8) + t);
            merge[(warp * ROWS + 8 * n + 2 * t + i % 2) * P::MERGE_ROW + 16 * jj + g + 8 * (i / 2)] =
                (d.run.o[j][n][i] + zero) * mine[n][i % 2];
          }
      }
    sync_block();
    const int quads = min(4 * P::CHUNK, VF::D / 4 - 4 * j0);
    for (int i = threadIdx.x; i < rows * quads; i += NW * 32) {
      const int row = i / quads, dim = i % quads * 4;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < NW; ++w) add(sum, 1.f, *reinterpret_cast<float4*>(merge + (w * ROWS + row) * P::MERGE_ROW + dim));
      if (splits == 1) {
        float top;
        const float l = total(row, top);
        put(out_rows + (size_t)row * VF::D + 16 * j0 + dim, sum, finish(l, top, row));
      } else {
        *reinterpret_cast<float4*>(partial + row * VF::D + 16 * j0 + dim) = sum;
      }
    }
    if (!P::WHOLE) sync_block();
  }
  if (splits == 1) return;
  if (threadIdx.x < ROWS) {
    float top;
    const float l = total(threadIdx.x, top);
    *reinterpret_cast<float2*>(partial + ROWS * VF::D + 2 * threadIdx.x) = make_float2(top, l);
  }
  sync_block();

  // The last block of this row tile merges the splits, a batch of them in flight at a time.
  if (threadIdx.x == 0) *last = arrive_last(const_cast<u32*>(tickets) + tile_index, splits);
  sync_block();
  if (!*last) return;
  const float* first = scratch + (size_t)tile_index * splits * ROWS * (VF::D + 2);
  constexpr int SPLIT = ROWS * (VF::D + 2), BATCH = 16;
  for (int i = threadIdx.x; i < rows * (VF::D / 4); i += NW * 32) {
    const int row = i / (VF::D / 4), dim = i % (VF::D / 4) * 4;
    float top = -1e30f, l = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int s0 = 0; s0 < splits; s0 += BATCH) {
      float4 x[BATCH];
      float2 ml[BATCH];
      float before = top;
#pragma unroll
      for (int s = 0; s < BATCH; ++s) {
        const float* piece = first + (size_t)(s0 + s) * SPLIT;
        ml[s] = make_float2(-1e30f, 0.f), x[s] = sum;
        if (s0 + s < splits) {
          ml[s] = load_global(reinterpret_cast<const float2*>(piece + ROWS * VF::D) + row);
          x[s] = load_global(reinterpret_cast<const float4*>(piece + row * VF::D + dim));
        }
      }
#pragma unroll
      for (int s = 0; s < BATCH; ++s) top = fmaxf(top, ml[s].x);
      const float f = exp2_fast(before - top);
      l *= f, sum.x *= f, sum.y *= f, sum.z *= f, sum.w *= f;
#pragma unroll
      for (int s = 0; s < BATCH; ++s)
        if (s0 + s < splits) {
          const float w = exp2_fast(ml[s].x - top);
          l += w * ml[s].y;
          add(sum, w, x[s]);
        }
    }
    put(out_rows + (size_t)row * VF::D + dim, sum, finish(l, top, row));
  }
}

}  // namespace opentq
