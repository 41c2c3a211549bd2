// Attention over the dense fp16 region: sink columns, the recent tail, and the tokens of this call, in fp32.
//
// 64 columns at a time are widened to fp32, keys transposed so that lanes are tokens; then both products are the same
// register-blocked outer product (4 rows x several vectors), 2 loads per multiply-add at worst. A tile is widened
// once per task and serves all its rows. Raw keys and values of the packed region take the same way (packed.h).
#pragma once
#include "state.h"

namespace otq {

// out[r][0 .. NV*W) (+)= sum_k a[r][k] * b[k][0 .. NV*W)
template <int NR, int NV, bool ADD>
INLINE void outer(Ahead& ahead, const float* a, int a_stride, const float* b, int b_stride, int depth, float* out, int out_stride) {
  F x[NR][NV];
  UNROLL for (int r = 0; r < NR; r++) UNROLL for (int j = 0; j < NV; j++) x[r][j] = ADD ? load(out + r * out_stride + W * j) : set1(0.f);
  for (int k = 0; k < depth; k++) {
    if (k % AHEAD_DEPTH == 0) ahead.step();
    F y[NV];
    UNROLL for (int j = 0; j < NV; j++) y[j] = load(b + size_t(k) * b_stride + W * j), stay(y[j]);
    UNROLL for (int r = 0; r < NR; r++) {
      const F s = set1(a[r * a_stride + k]);
      UNROLL for (int j = 0; j < NV; j++) x[r][j] = fma(s, y[j], x[r][j]);
    }
  }
  UNROLL for (int r = 0; r < NR; r++) UNROLL for (int j = 0; j < NV; j++) store(out + r * out_stride + W * j, x[r][j]);
}

template <int NR, bool ADD>
INLINE void outer_columns(Ahead& ahead, const float* a, int a_stride, const float* b, int b_stride, int depth, float* out,
                          int out_stride, int columns) {
  int j = 0;
  for (; j + VECTORS * W <= columns; j += VECTORS * W)
    outer<NR, VECTORS, ADD>(ahead, a, a_stride, b + j, b_stride, depth, out + j, out_stride);
  for (; j < columns; j += W) outer<NR, 1, ADD>(ahead, a, a_stride, b + j, b_stride, depth, out + j, out_stride);
}

// out [n][columns] (+)= a [n][depth] * b [depth][columns]; columns a multiple of 16
template <bool ADD>
void product(Ahead& ahead, const float* a, int a_stride, const float* b, int b_stride, int depth, float* out, int out_stride, int n,
             int columns) {
  for (int r = 0; r < n; r += 4, a += 4 * a_stride, out += 4 * out_stride) {
    const int left = n - r;
    if (left == 1) outer_columns<1, ADD>(ahead, a, a_stride, b, b_stride, depth, out, out_stride, columns);
    else if (left == 2) outer_columns<2, ADD>(ahead, a, a_stride, b, b_stride, depth, out, out_stride, columns);
    else if (left == 3) outer_columns<3, ADD>(ahead, a, a_stride, b, b_stride, depth, out, out_stride, columns);
    else outer_columns<4, ADD>(ahead, a, a_stride, b, b_stride, depth, out, out_stride, columns);
  }
}

// 64 fp16 tokens, `stride` numbers apart, as floats: keys [dim_q][64], values [64][dim_v]. Tokens that no row sees (not in
// `any`) may not exist or hold anything, so they are zeros here.
inline void widen_keys(Rows& rows, const uint16_t* k, int64_t stride, uint64_t any) {
  static const uint16_t nothing[16] = {};
  for (int t0 = 0; t0 < 64; t0 += 16) {
    const uint16_t* tokens[16];
    for (int d = 0; d < rows.dim_q; d += 16) {
      for (int t = 0; t < 16; t++) tokens[t] = any >> (t0 + t) & 1 ? k + (t0 + t) * stride + d : nothing;
      transpose_half(tokens, rows.dense_k + size_t(d) * 64 + t0, 64);
    }
  }
}

inline void widen_values(Rows& rows, const uint16_t* v, int64_t stride, uint64_t any) {
  for (int t = 0; t < 64; t++) {
    const uint16_t* token = v + t * stride;
    float* out = rows.dense_v + size_t(t) * rows.dim_v;
    if (!(any >> t & 1)) {
      std::fill_n(out, rows.dim_v, 0.f);
      continue;
    }
    for (int d = 0; d < rows.dim_v; d += W) store(out + d, load_half(token + d));
  }
}

// Scores of rows [r0, r0 + n) against the widened keys, in units of 1.
inline void dense_scores(Rows& rows, int r0, int n) {
  product<false>(rows.ahead, rows.q + size_t(r0) * rows.dim_q, rows.dim_q, rows.dense_k, 64, rows.dim_q, rows.scores, 64, n, 64);
}

// Scores in units of `step` -> probabilities in their place, and the sums of the state.
inline void softmax_dense(Rows& rows, int r0, int n, const float* step) {
  float next[CHUNK];
  for (int i = 0; i < n; i++) next[i] = std::max(largest_score(rows.scores + 64 * i) * step[i], rows.top[r0 + i]);
  rows.raise(r0, n, next);
  for (int i = 0; i < n; i++) {
    F sum = load(rows.weight + (r0 + i) * W);
    for (int t = 0; t < 64; t += W) {
      const F p = exp2(fma(load(rows.scores + 64 * i + t), set1(step[i]), set1(-next[i])));
      sum = add(sum, p);
      store(rows.scores + 64 * i + t, p);
    }
    store(rows.weight + (r0 + i) * W, sum);
  }
}

// acc += probabilities * the first `tokens` widened values.
inline void dense_values(Rows& rows, int r0, int n, int tokens) {
  product<true>(rows.ahead, rows.scores, 64, rows.dense_v, rows.dim_v, tokens, rows.acc + size_t(r0) * rows.dim_v, rows.dim_v, n, rows.dim_v);
}

// Which dense columns a row sees: [sink_low, sink_high) and [low, high).
struct Columns {
  int64_t sink_low, sink_high, low, high;
  uint64_t bits(int64_t origin) const { return bits_between(sink_low, sink_high, origin) | bits_between(low, high, origin); }
};

// Rows of one task against dense columns [0, end) of one KV head.
inline void attend_dense(Rows& rows, const Columns* seen, const uint16_t* k, int64_t k_stride, const uint16_t* v, int64_t v_stride,
                         int64_t end) {
  for (int64_t column = 0; column < end; column += 64) {
    uint64_t any = 0;
    for (int r = 0; r < rows.count; r++) any |= seen[r].bits(column);
    if (!any) continue;
    widen_keys(rows, k + column * k_stride, k_stride, any);
    widen_values(rows, v + column * v_stride, v_stride, any);
    const int depth = int(std::min<int64_t>(64, end - column));
    for (int r0 = 0; r0 < rows.count; r0 += CHUNK) {
      const int n = std::min(CHUNK, rows.count - r0);
      uint64_t bits[CHUNK], some = 0;
      for (int i = 0; i < n; i++) some |= bits[i] = seen[r0 + i].bits(column);
      if (!some) continue;
      dense_scores(rows, r0, n);
      if (rows.softcap != 0.f)
        for (int i = 0; i < n; i++) cap_scores(rows.scores + 64 * i, 1.f, rows.softcap);
      for (int i = 0; i < n; i++) mask_scores(rows.scores + 64 * i, bits[i]);
      softmax_dense(rows, r0, n, ONES);
      dense_values(rows, r0, n, depth);
    }
  }
}

}  // namespace otq
