// One warp's attention over its share of the keys: records of packed tokens, and strips of dense columns.
//
// Arithmetic, for one record of 32 tokens and one tile of 8 query rows. Scores: S^T = K q^T, with the 16 x 16 code
// tiles of `record.cuh` as the A operand and the 8 rows as columns of B. Codes enter the tensor core as fp16 denormals;
// per group of dims
//   S[key, row] += scale[key, group] * sum_d number[key, d] q[row, d]       (fp32)
// and zeros, where the format has them, come in through one more mma, zero[key, group] x sum_{d in group} q[row, d],
// whose B operand is split in a high and a low half to keep 22 bits. The C fragment of S^T becomes the B operand of the
// second product by two 8 x 8 transposes. Output: O^T = V^T P^T with codes as A again; the scales multiply P (one fp16
// multiply per key pair and group), the zeros are one mma into `oz`. Factors that the numbers carry (UNIT, STEP, LIFT)
// are taken back in fp32. Where numbers are biased, the sums of a score start with what the bias adds to them, and one mma
// per strip and group with the bias as its codes says what it adds to the outputs. Queries are scaled by a power of two
// into [1, 2) per row, so that bf16's range fits fp16; those that were rotated here come as a high and a low half, since
// one would round away more of a score than attention in the model's own dtype does.
#include "record.cuh"

namespace opentq {

struct Call {  // what the host knows: blocks allocated for k and v, dense columns, heads, query tokens, and the options
  int k_blocks, v_blocks, columns, q_heads, kv_heads, length, window, causal;
  int packed, sink, tail_start;  // of all sequences, where they agree; else packed is -1, and they are in memory
  float scale, softcap;
  int centered;  // `Fused`: whether keys have a center
  int listed;    // `Fused`: pages of a list
};

// What only some launches do. APPEND: the newest `length` of `columns` come with it, and it writes all columns anew;
// ROTATE_K rotates queries and new keys, ROTATE_V new values and the outputs back. LISTED: of the packed tokens it reads
// the pages of a list. CAPPED: scores have a softcap.
template <bool APPEND_, bool ROTATE_K_, bool ROTATE_V_, bool LISTED_, bool CAPPED_>
struct Fused {
  static constexpr bool APPEND = APPEND_, ROTATE_K = ROTATE_K_, ROTATE_V = ROTATE_V_, LISTED = LISTED_, CAPPED = CAPPED_;
  static constexpr int LENGTH = 8;  // query tokens at most
};

__device__ __forceinline__ void add(float4& y, float w, const float4& x) {
  y.x += w * x.x, y.y += w * x.y, y.z += w * x.z, y.w += w * x.w;
}
template <class T>
__device__ __forceinline__ void put(T* y, const float4& x, float f) {
  assign(y[0], x.x * f), assign(y[1], x.y * f), assign(y[2], x.z * f), assign(y[3], x.w * f);
}

template <class T, class KF, class VF, int NT, int NW, int ST, class FUSED>
struct Plan {
  static constexpr int ROWS = 8 * NT;
  static constexpr int STAGE = KF::BYTES + VF::BYTES;
  static constexpr int RING = NW * ST * STAGE;
  static constexpr bool WHOLE = NW * ROWS * (VF::D + 4) * 4 <= (RING > 49152 ? RING : 49152);  // outputs fit at once
  static constexpr int CHUNK = WHOLE || VF::TILES < 4 ? VF::TILES : 4;          // output tiles merged at a time
  static constexpr int MERGE_ROW = CHUNK * 16 + 4;                              // floats; +4: no bank conflict
  static constexpr int MERGE = NW * ROWS * MERGE_ROW * 4;
  static constexpr int AREA = RING > MERGE ? RING : MERGE;
  static constexpr int PARTS = FUSED::ROTATE_K ? 2 : 1;                         // of a query: high, low
  static constexpr int QUERY = PARTS * (KF::QUERY / 16) * NT * 64 * 4;          // B fragments of q
  static constexpr int ZERO_PARTS = !KF::ZEROED ? 0 : KF::GROUPS > 8 ? 2 : 1;
  static constexpr int SUMS = NT * ZERO_PARTS * 64 * 4;                         // B fragments of group sums of q
  static constexpr int BIASES = KF::BIASED ? KF::GROUPS * ROWS * 4 : 0;         // where the sums of a score start
  static constexpr int FRESH = FUSED::APPEND ? FUSED::LENGTH * (KF::DENSE + VF::D) * 2 : 0;  // new keys and values
  static constexpr int OUTPUT = FUSED::ROTATE_V ? ROWS * (VF::D + 4) * 4 : 0;   // outputs on their way to be rotated
  static constexpr int BARS = NW * ST * 8;
  static constexpr int SMALL = ROWS * 8 + 2 * NW * ROWS * 4 + 16;               // factors, positions, maxima, sums
  static constexpr int BYTES = AREA + QUERY + SUMS + BARS + BIASES + FRESH + OUTPUT + SMALL;
};

// Running softmax of one warp: rows 2t, 2t+1 of every row tile, equal in the 8 lanes that share t. Probabilities are
// 2^(x - m), so they stop at 1 as long as m is no less than any score: where a score exceeds it, m rises beyond by SLACK,
// which spares most of the rescaling that a running maximum would ask for. The tensor core adds up the same fp16
// probabilities that multiply the values, so that their rounding cancels.
template <int NT, class V>
struct Running {
  static constexpr int TILES = V::TILES;
  static constexpr float SLACK = 2.f;
  float m[NT][2];
  float l[NT][4];         // as o: the sum of a row's probabilities in every dim
  float o[TILES][NT][4];  // O^T: dims g, g+8 of a tile x rows 2t, 2t+1
  float oz[NT][4];        // zeros' share, groups g, g+8
  float ob[V::BIASED ? V::GROUPS : 1][NT][4];  // less the bias's share, equal for all dims of a group

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      m[n][0] = m[n][1] = -1e30f, l[n][0] = l[n][1] = l[n][2] = l[n][3] = 0.f;
      oz[n][0] = oz[n][1] = oz[n][2] = oz[n][3] = 0.f;
#pragma unroll
      for (int i = 0; V::BIASED && i < V::GROUPS; ++i) ob[i][n][0] = ob[i][n][1] = ob[i][n][2] = ob[i][n][3] = 0.f;
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
          float y = top[n][r];
          y = fmaxf(y, shuffle_xor(y, 4)), y = fmaxf(y, shuffle_xor(y, 8)), y = fmaxf(y, shuffle_xor(y, 16));
          y = y > m[n][r] ? y + SLACK : m[n][r];
          const float f = exp2_fast(m[n][r] - y);
          m[n][r] = y, l[n][r] *= f, l[n][r + 2] *= f, oz[n][r] *= f, oz[n][r + 2] *= f;
#pragma unroll
          for (int i = 0; V::BIASED && i < V::GROUPS; ++i) ob[i][n][r] *= f, ob[i][n][r + 2] *= f;
#pragma unroll
          for (int j = 0; j < TILES; ++j) o[j][n][r] *= f, o[j][n][r + 2] *= f;
        }
    }
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[s][n][i] = exp2_fast(x[s][n][i] - m[n][i & 1]);
  }

  // Probabilities of one strip (C fragments, keys x rows) as B operands (keys x rows) of the output product, and added up.
  __device__ __forceinline__ void probabilities(u32 (&b)[NT][2], const float (&p)[NT][4]) {
    const u32 ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      b[n][0] = transpose8x8(pack_half2(p[n][0], p[n][1])), b[n][1] = transpose8x8(pack_half2(p[n][2], p[n][3]));
      mma(l[n], ones, b[n][0], b[n][1]);
    }
  }

  // Takes the bias back from the outputs: every few records, before it outgrows them.
  __device__ __forceinline__ void unbias() {
    if constexpr (V::BIASED) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < TILES; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (V::bias(16 * j / V::GROUP)) o[j][n][i] += ob[16 * j / V::GROUP][n][i];
#pragma unroll
        for (int i = 0; i < V::GROUPS; ++i) ob[i][n][0] = ob[i][n][1] = ob[i][n][2] = ob[i][n][3] = 0.f;
      }
    }
  }

  // Outputs as numbers of the format V -> values, or the other way.
  template <bool BACK>
  __device__ __forceinline__ void scale_output() {
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const float even = UNIT * V::STEP * (j * 16 >= V::GROUP ? V::SECOND : 1.f), odd = even / V::LIFT;
      const float f[2] = {BACK ? 1.f / even : even, BACK ? 1.f / odd : odd};
#pragma unroll
      for (int n = 0; n < NT; ++n) o[j][n][0] *= f[0], o[j][n][1] *= f[0], o[j][n][2] *= f[1], o[j][n][3] *= f[1];
    }
  }
};

// Dense columns of one KV head in logical order; from `old` on they are not in memory yet but in shared memory.
struct Columns {
  const f16 *k, *v, *fresh_k, *fresh_v;
  int old, tail_start, all;
};

template <class T, class KF, class VF, int NT, int NW, int ST, class FUSED>
struct Decode {
  using P = Plan<T, KF, VF, NT, NW, ST, FUSED>;
  static constexpr int ROWS = P::ROWS;
  static constexpr int QUERY_TILES = KF::QUERY / 16;
  static constexpr bool HELD = QUERY_TILES * NT <= 16;  // high halves of q in registers where they are few
  static constexpr int LINKS = NT == 1 && KF::GROUP >= 64 ? 2 : 1;  // chains of mma per strip: a long one waits

  int lane, warp, g, t;
  const u32 *query, *sums;                // shared
  const float* factor;                    // shared: score of a row in log2 units = factor * sum q' k
  const float* biases;                    // shared: [group][row], where the sums of a score start
  const int* position;                    // shared: logical position of each row
  u32 held[HELD ? QUERY_TILES : 1][NT][2];
  float softcap, f[NT][2];
  int window, causal, packed, sink;
  Running<NT, VF> run;

  __device__ __forceinline__ void load_query(u32 (&b)[2], int j, int n) const {
    if constexpr (HELD) {
      b[0] = held[j][n][0], b[1] = held[j][n][1];
    } else {
      load_part(b, j, n, 0);
    }
  }
  __device__ __forceinline__ void load_part(u32 (&b)[2], int j, int n, int part) const {
    const uint2 v = reinterpret_cast<const uint2*>(query)[((part * QUERY_TILES + j) * NT + n) * 32 + lane];
    b[0] = v.x, b[1] = v.y;
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
    if constexpr (FUSED::CAPPED) {
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

  // The V scales and zeros of tokens that do not exist may be anything, NaN included: make them 0, in place.
  __device__ __forceinline__ void blank(u32* v, int first) const {
    u16* numbers = reinterpret_cast<u16*>(v + VF::SCALES);
    const int at = 8 * (lane % 8 / 2) + 4 * (lane / 16) + 2 * (lane / 8 % 2) + lane % 2;
    if (first + lane >= packed)
      for (int i = 0; i < VF::NUMBERS * VF::GROUPS; ++i) numbers[32 * i + at] = 0;
    fence_bulk();
    sync_warp();
  }

  // One record of 32 tokens. Straight-line code but for the rare masks: two strips at a time keep the tensor cores
  // busy. `few`: no warp has more than one.
  __device__ __forceinline__ void record(const u32* k, const u32* v, int first, bool masked, bool few) {
    float x[2][NT][4] = {};
    const u16* k_scales = reinterpret_cast<const u16*>(k + KF::SCALES) + g * KF::GROUPS;
    constexpr int EIGHT = 8 * KF::GROUPS;  // eight keys on
    u32 a[4];
#pragma unroll
    for (int s = 0; s < 2 && KF::ZEROED; ++s) {
      const u16* k_zeros = reinterpret_cast<const u16*>(k + KF::ZEROS) + g * KF::GROUPS;
      a[0] = key_zeros<KF::GROUPS>(k_zeros + 2 * s * EIGHT, 2 * t);
      a[1] = key_zeros<KF::GROUPS>(k_zeros + (2 * s + 1) * EIGHT, 2 * t);
      // Up to 8 groups: the lower half of the contraction meets the sums' high parts, the upper half their low parts.
      a[2] = P::ZERO_PARTS == 1 ? a[0] : key_zeros<KF::GROUPS>(k_zeros + 2 * s * EIGHT, 2 * t + 8);
      a[3] = P::ZERO_PARTS == 1 ? a[1] : key_zeros<KF::GROUPS>(k_zeros + (2 * s + 1) * EIGHT, 2 * t + 8);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
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
      float c[LINKS][2][NT][4] = {};
#pragma unroll
      for (int n = 0; n < NT && KF::bias(group); ++n) {
        const float2 start = *reinterpret_cast<const float2*>(biases + group * ROWS + 8 * n + 2 * t);
#pragma unroll
        for (int s = 0; s < 2; ++s)
          c[0][s][n][0] = c[0][s][n][2] = start.x, c[0][s][n][1] = c[0][s][n][3] = start.y;
      }
#pragma unroll
      for (int j = group * KF::GROUP / 16; j < KF::TILES && j < (group + 1) * KF::GROUP / 16; ++j) {
        u32 b[4];
        upper.tile(a, k, lane, j);
        lower.tile(b, k, lane, KF::TILES + j);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          u32 w[2];
          load_query(w, KF::FIRST + j, n);
          mma(c[j % LINKS][0][n], a, w[0], w[1]);
          mma(c[j % LINKS][1][n], b, w[0], w[1]);
          if constexpr (P::PARTS == 2) {
            load_part(w, KF::FIRST + j, n, 1);
            mma(c[j % LINKS][0][n], a, w[0], w[1]);
            mma(c[j % LINKS][1][n], b, w[0], w[1]);
          }
        }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            x[s][n][i] += scale[s][i / 2][group] * (group ? KF::SECOND : 1.f) *
                          (LINKS == 2 ? c[0][s][n][i] + c[LINKS - 1][s][n][i] : c[0][s][n][i]);
    }
    to_scores(x, UNIT * KF::STEP, UNIT * KF::STEP / KF::LIFT);
    if (masked)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first + 8 * i + g;
        mask(x[i / 2], i % 2, sink + token, token < packed);
      }
    run.softmax(x);

    const u16* v_scales = reinterpret_cast<const u16*>(v + VF::SCALES) + 8 * t;
    Fragments<VF> values;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      u32 b[NT][2];
      run.probabilities(b, x[s]);
      if constexpr (VF::ZEROED) {
        const u16* v_zeros = reinterpret_cast<const u16*>(v + VF::ZEROS) + 8 * t;
        a[0] = a[1] = a[2] = a[3] = 0u;
#pragma unroll
        for (int half = 0; half < (VF::GROUPS > 8 ? 2 : 1); ++half)
          if (g + 8 * half < VF::GROUPS) {
            const uint2 z = *reinterpret_cast<const uint2*>(v_zeros + (g + 8 * half) * 32 + 4 * s);
            a[half] = z.x, a[2 + half] = z.y;
          }
#pragma unroll
        for (int n = 0; n < NT; ++n) mma(run.oz[n], a, b[n][0], b[n][1]);
      }
#pragma unroll
      for (int group = 0; group < VF::GROUPS; ++group) {
        const uint2 scales = *reinterpret_cast<const uint2*>(v_scales + group * 32 + 4 * s);
        u32 w[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) w[n][0] = mul_half2(b[n][0], scales.x), w[n][1] = mul_half2(b[n][1], scales.y);
        if (VF::bias(group)) {
          a[0] = a[1] = a[2] = a[3] = 0x80008000u | (u32)VF::bias(group) * 0x10001u;
#pragma unroll
          for (int n = 0; n < NT; ++n) mma(run.ob[VF::BIASED ? group : 0][n], a, w[n][0], w[n][1]);
        }
#pragma unroll
        for (int j = group * VF::GROUP / 16; j < VF::TILES && j < (group + 1) * VF::GROUP / 16; ++j) {
          values.tile(a, v, lane, s * VF::TILES + j);
#pragma unroll
          for (int n = 0; n < NT; ++n) mma(run.o[j][n], a, w[n][0], w[n][1]);
        }
      }
      if constexpr (VF::ZEROED)
        if (few) s ? add_rests<1>(b, v) : add_rests<0>(b, v);
    }
  }
  // Codes of zeroed formats are up to four times the values, and so is the error of what they are multiplied with. Over
  // many tokens it averages out; over few, which leave time for it, the rest is added.
  template <int S>
  __device__ __forceinline__ void add_rests(const u32 (&b)[NT][2], const u32* v) {
    const u16* v_scales = reinterpret_cast<const u16*>(v + VF::SCALES) + 8 * t;
    Fragments<VF, S * VF::TILES> values;
#pragma unroll
    for (int j = 0; j < VF::TILES; ++j) {
      const uint2 scales = *reinterpret_cast<const uint2*>(v_scales + j * 16 / VF::GROUP * 32 + 4 * S);
      u32 a[4];
      values.tile(a, v, lane, S * VF::TILES + j);
#pragma unroll
      for (int n = 0; n < NT; ++n)
        mma(run.o[j][n], a, mul_rest_half2(b[n][0], scales.x), mul_rest_half2(b[n][1], scales.y));
    }
  }

  // 16 dense columns from `first`; those in [sink, tail_start) and behind the last do not exist.
  __device__ __forceinline__ void dense(const Columns& from, int first) {
    const int column[2] = {first + g, first + g + 8};
    bool exists[2];
    const u32 *k_row[2], *v_row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      exists[i] = column[i] < sink || (column[i] >= from.tail_start && column[i] < from.all);
      const int safe = exists[i] ? column[i] : from.all - 1;
      const bool fresh = FUSED::APPEND && safe >= from.old;
      const f16* key = fresh ? from.fresh_k + (safe - from.old) * KF::DENSE : from.k + (size_t)safe * KF::DENSE;
      const f16* value = fresh ? from.fresh_v + (safe - from.old) * VF::D : from.v + (size_t)safe * VF::D;
      k_row[i] = reinterpret_cast<const u32*>(key) + t, v_row[i] = reinterpret_cast<const u32*>(value) + t;
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
    float x[1][NT][4] = {};
#pragma unroll
    for (int j = 0; j < KF::DENSE / 16; ++j) {
      const u32 a[4] = {k_row[0][8 * j], k_row[1][8 * j], k_row[0][8 * j + 4], k_row[1][8 * j + 4]};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        u32 w[2];
        load_query(w, j, n);
        mma(x[0][n], a, w[0], w[1]);
        if constexpr (P::PARTS == 2) {
          load_part(w, j, n, 1);
          mma(x[0][n], a, w[0], w[1]);
        }
      }
    }
    to_scores(x, 1.f, 1.f);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      mask(x[0], i, column[i] < sink ? column[i] : sink + packed + column[i] - from.tail_start, exists[i]);
    run.softmax(x);
    u32 b[NT][2];
    run.probabilities(b, x[0]);
#pragma unroll
    for (int j = 0; j < VF::TILES; ++j) {
      u32 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = transpose8x8(j < AHEAD ? ahead[j % AHEAD][i] : value(j, i));
#pragma unroll
      for (int n = 0; n < NT; ++n) mma(run.o[j][n], a, b[n][0], b[n][1]);
    }
  }
};

}  // namespace opentq
