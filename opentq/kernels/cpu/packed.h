// Attention over stored blocks: codes go into byte dot products as they are, and nothing is dequantised.
//
//   score[r][t] = step[r] * sum_g  scale[g][t] * (code . v)[r][g][t]  +  zero[g][t] * sum(q[r] over g) / step[r]
//   out[r][d]  += sum_t  p[r][t] * scale[g][t] * code[t][d]              +  p[r][t] * zero[g][t]
//
// A token's value scale can't leave the sum over tokens, so it moves into the probability: p * scale becomes a 15-bit
// integer in two signed bytes. Per block: scores of up to eight rows, softmax, values (products.h). Lanes are tokens for
// scores and channels for values, so no product needs a horizontal sum; sums of p and of p * zero stay lane-wise until
// the task ends. Bytes moved: each packed block once per task, from memory; the rest lives in L1. A block that more than
// 16 rows read is unpacked to bytes once, so prefill pays for unpacking once per 128 rows.
//
// A codebook's code becomes its entry, a byte, by one look-up in registers; from there on it is an 8-bit code with one
// scale per token and zero = -128 * scale. Two runs of codes are two products: scores add up, and values make the two
// halves of the channels. Keys or values that are not such codes become floats, a block at a time (dense.h, polar.h); so do
// codes that several heads read on a machine that multiplies bytes slowly (decoded.h).
#pragma once
#include "decoded.h"
#include "dense.h"
#include "matrix.h"
#include "polar.h"
#include "outliers.h"

namespace otq {

using ScoresFn = void (*)(const uint8_t*, const uint16_t*, const Packed&, const Rows&, int, int, float*);
using ValuesFn = void (*)(const uint8_t*, const Packed&, const Rows&, int, int);
using WidenFn = void (*)(const uint8_t*, int, const uint8_t*, uint8_t*);

// What can be read: compiled apart, one object file each (products.cpp).
#define OPENTQ_KINDS(X) X(2, false) X(3, false) X(4, false) X(8, false) X(1, true) X(2, true) X(3, true) X(4, true) X(5, true) X(6, true)

#define OPENTQ_EXTERN(BITS, LOOKUP)                                                                                          \
  extern template void scores<BITS, LOOKUP>(const uint8_t*, const uint16_t*, const Packed&, const Rows&, int, int, float*); \
  extern template void values<BITS, LOOKUP>(const uint8_t*, const Packed&, const Rows&, int, int);
OPENTQ_KINDS(OPENTQ_EXTERN)

struct Products {
  ScoresFn scores;
  ValuesFn values;
  WidenFn widen;
};
inline Products products_for(int bits, bool lookup) {
#define OPENTQ_CASE(BITS, LOOKUP) \
  if (bits == BITS && lookup == LOOKUP) return {scores<BITS, LOOKUP>, values<BITS, LOOKUP>, widen<BITS, LOOKUP>};
  OPENTQ_KINDS(OPENTQ_CASE)
  return {};  // not such codes
}

// One block's value scales and zeros as floats. Probabilities of a block are at most 1, so where its scales differ little
// they share one integer step: the scales are multiplied by LEVELS / largest here, and `tame` is that step. A block with
// wild scales (tame = 0) gets a step per row, which costs a horizontal maximum each.
inline void load_params(Rows& rows, const Packed& v, const uint16_t* params, uint64_t seen) {
  for (int g = 0; g < v.groups(); g++, params += v.param_stride()) {
    float *scale = rows.params + 128 * g, *zero = scale + 64;
    F most = set1(0.f), least = set1(1e30f);
    for (int t = 0; t < 64; t += W) {
      const Scale x = scale_of(v, params + t);
      most = max(x.scale, most), least = min(x.scale, least);
      store(scale + t, x.scale), store(zero + t, x.zero);
    }
    rows.tame[g] = 0.f;
    if (seen != ~uint64_t(0)) {  // slots that nobody wrote may hold anything, and 0 * anything must be 0
      for (int t = 0; t < 64; t++)
        if (!(seen >> t & 1)) scale[t] = zero[t] = 0.f;
    } else if (const float largest = hmax(most); largest <= 8 * hmin(least) && largest > 1e-30f) {
      rows.tame[g] = largest / LEVELS;
      const F inverse = set1(LEVELS / largest);
      for (int t = 0; t < 64; t += W) store(scale + t, mul(load(scale + t), inverse));
    }
  }
}

// Softmax of one chunk: scores, in units of `step` per row, -> integers p8 with p_step, and the float sums of the state;
// for outliers, floats in the place of the scores, too.
inline void softmax_packed(Rows& rows, int r0, int n, const float* step, const MatrixUnit& unit) {
  const int groups = rows.groups_v;
  alignas(64) float block_top[CHUNK + 16], next[CHUNK + 16], share[CHUNK + 16];
  for (int i = 0; i < n; i++) {
    block_top[i] = std::max(largest_score(rows.scores + 64 * i) * step[i], LOWEST);
    next[i] = std::max(block_top[i], rows.top[r0 + i]);
  }
  rows.raise(r0, n, next);
  for (int i = 0; i < n; i += W) store(share + i, exp2(sub(load(block_top + i), load(next + i))));
  for (int i = 0; i < n; i++) {
    const int r = r0 + i;
    const F one = set1(step[i]), top = set1(-block_top[i]), f = set1(share[i]);
    F p[TOKEN_VECTORS], sum = set1(0.f);
    UNROLL for (int j = 0; j < TOKEN_VECTORS; j++) {
      p[j] = exp2(fma(load(rows.scores + 64 * i + W * j), one, top));
      sum = add(sum, p[j]);
    }
    store(rows.weight + r * W, fma(sum, f, load(rows.weight + r * W)));
    if (i % 4 == 3) unit.stay_awake();
    if (rows.outliers)
      UNROLL for (int j = 0; j < TOKEN_VECTORS; j++) store(rows.scores + 64 * i + W * j, mul(p[j], f));
    for (int g = 0; g < groups; g++) {
      const float *scale = rows.params + 128 * g, *zero = scale + 64;
      F v[TOKEN_VECTORS], z = set1(0.f);
      UNROLL for (int j = 0; j < TOKEN_VECTORS; j++) z = fma(p[j], load(zero + W * j), z);
      float* zeros = rows.zero + (size_t(r) * groups + g) * W;
      store(zeros, fma(z, f, load(zeros)));
      float p_step = rows.tame[g];
      if (p_step > 0.f) {
        UNROLL for (int j = 0; j < TOKEN_VECTORS; j++) v[j] = fma(p[j], load(scale + W * j), set1(MAGIC + BIAS));
      } else {
        F most = set1(0.f);
        UNROLL for (int j = 0; j < TOKEN_VECTORS; j++) {
          v[j] = mul(p[j], load(scale + W * j));
          most = max(v[j], most);
        }
        const float largest = std::max(hmax(most), 1e-30f);  // less than that is nothing
        p_step = largest / LEVELS;
        const F inverse = set1(LEVELS / largest);
        UNROLL for (int j = 0; j < TOKEN_VECTORS; j++) v[j] = fma(v[j], inverse, set1(MAGIC + BIAS));
      }
      rows.p_step[g * CHUNK + i] = share[i] * p_step;
      int8_t* out = rows.p8 + (g * CHUNK + i) * 128;
      UNROLL for (int j = 0; j < PARTS; j++) {  // tokens l, l + 16, l + 32, l + 48
        const F quad[4] = {v[j], v[PARTS + j], v[2 * PARTS + j], v[3 * PARTS + j]};
        I hi, lo;
        narrow(quad, hi, lo);
        istore(out + 4 * W * j, hi), istore(out + 64 + 4 * W * j, lo);
      }
    }
  }
}

// Which packed tokens a row sees: [low, high).
struct Range {
  int64_t low, high;
};

// One run of codes as a task reads it, block after block.
struct Run {
  Run(const Packed& run, int64_t batch, int64_t head, bool often, bool matrix, uint8_t* scratch)
      : p(run), data(run.data + batch * run.batch_stride + head * run.head_stride), scratch(scratch) {
    products = products_for(run.bits, run.form == BOOK);
    if (!(often || matrix) || !run.coded()) return;
    if (run.bits != 8) widen = products.widen, products = products_for(8, false);
    if (matrix) products.scores = matrix_scores, products.values = matrix_values;
  }
  void open(int64_t block) {
    at = data + block * p.block_stride, codes = at;
    params = reinterpret_cast<const uint16_t*>(at + p.code_bytes());
    if (!widen) return;
    widen(at, p.tiles(), p.book, scratch);
    codes = scratch;
  }
  void scores(const Rows& rows, int r0, int n) const { products.scores(codes, params, p, rows, r0, n, rows.scores); }
  void values(const Rows& rows, int r0, int n) const { products.values(codes, p, rows, r0, n); }
  void widen_keys(Rows& rows, uint64_t any) const {
    if (p.coded()) decode_keys(rows, p, codes, params);
    else if (p.form == POLAR) widen_polar_keys(rows, p, at, any);
    else otq::widen_keys(rows, reinterpret_cast<const uint16_t*>(at), p.token_bytes() / 2, any);
  }
  void widen_values(Rows& rows, uint64_t any) const {
    if (p.coded()) decode_values(rows, p, codes, params, any);
    else if (p.form == POLAR) widen_polar_values(rows, p, at, any);
    else otq::widen_values(rows, reinterpret_cast<const uint16_t*>(at), p.token_bytes() / 2, any);
  }
  const uint8_t* block(int64_t i) const { return data + i * p.block_stride; }

  const Packed& p;
  const uint8_t *data, *at = nullptr, *codes = nullptr;
  const uint16_t* params = nullptr;
  uint8_t* scratch;
  WidenFn widen = nullptr;  // a block that many chunks read, or the matrix unit, is unpacked once
  Products products;
};

// Rows of one task against stored blocks [first, last) of one KV head, or of its list of pages. Keys and values may be codes or floats, each for itself.
inline void attend_packed(Rows& rows, const Range* seen, const Call& c, int64_t batch, int64_t head, int64_t first, int64_t last) {
  const bool often = rows.count > 2 * CHUNK, float_k = keys_as_floats(c), float_v = as_floats(c.v, c.gqa), two_k = c.k[1].dim, two_v = c.v[1].dim;
  const bool matrix = rows.count >= MATRIX_ROWS && !(float_k && float_v) && matrix_unit();
  const MatrixUnit unit(matrix, matrix_step(c.k[0]));
  Rows more = rows.second();
  Run k(c.k[0], batch, head, often || float_k, matrix, rows.wide_k), v(c.v[0], batch, head, often || float_v, matrix, rows.wide_v);
  Run k2(c.k[1], batch, head, often, matrix, more.wide_k), v2(c.v[1], batch, head, often, matrix, more.wide_v);
  OutlierBlock k_outliers(c.k_outliers, batch, head, rows.dim_q), v_outliers(c.v_outliers, batch, head, rows.dim_v);
  int64_t low = 0, high = INT64_MAX, any_low = INT64_MAX, any_high = 0;  // tokens that every row sees, and that any row sees
  for (int r = 0; r < rows.count; r++) {
    low = std::max(low, seen[r].low), high = std::min(high, seen[r].high);
    any_low = std::min(any_low, seen[r].low), any_high = std::max(any_high, seen[r].high);
  }
  const int32_t* pages = c.pages ? c.pages + (batch * c.kv_heads + head) * c.page_count : nullptr;
  for (int64_t i = first; i < last; i++) {
    const int64_t b = pages ? pages[i] : i, next = i + 1 == last ? -1 : pages ? pages[i + 1] : i + 1;
    const bool whole = low <= b * BLOCK && (b + 1) * BLOCK <= high;
    const uint64_t any = whole ? ~uint64_t(0) : bits_between(any_low, any_high, b * BLOCK);
    k.open(b), unit.stay_awake();
    if (two_k) k2.open(b);
    if (float_k) k.widen_keys(rows, any);
    if (rows.plain) k_outliers.open(b, any);
    if (!rows.weights) {
      v.open(b);
      if (next >= 0) rows.ahead.start(k.p, k.block(next), v.p, v.block(next), rows.count, float_k, float_v);
      if (two_v) v2.open(b), load_params(more, v2.p, v2.params, any);
      if (next >= 0 && (two_k || two_v)) more.ahead.start(k2.p, k2.block(next), v2.p, v2.block(next), rows.count, float_k, float_v);
      if (float_v) v.widen_values(rows, any);
      else load_params(rows, v.p, v.params, any);
      if (rows.outliers) v_outliers.open(b, any);
    } else if (next >= 0) {
      rows.ahead.start(k.p, k.block(next), v.p, nullptr, rows.count, float_k, float_v);
    }
    unit.stay_awake();
    for (int r0 = 0; r0 < rows.count; r0 += CHUNK) {
      const int n = std::min(CHUNK, rows.count - r0);
      const float* step = float_k ? ONES : rows.q_step + r0;
      if (float_k) dense_scores(rows, r0, n);
      else k.scores(rows, r0, n);
      if (two_k) {
        k2.scores(more, r0, n);
        for (int i = 0; i < 64 * n; i += W) store(rows.scores + i, add(load(rows.scores + i), load(more.scores + i)));
      }
      if (rows.plain)
        for (int i = 0; i < n; i++) k_outliers.add_scores(rows.plain + size_t(r0 + i) * rows.dim_q, 1 / step[i], rows.scores + 64 * i);
      if (rows.softcap != 0.f) {
        for (int i = 0; i < n; i++) cap_scores(rows.scores + 64 * i, step[i], rows.softcap);
        step = ONES;
      }
      if (!whole)
        for (int i = 0; i < n; i++) mask_scores(rows.scores + 64 * i, bits_between(seen[r0 + i].low, seen[r0 + i].high, b * BLOCK));
      if (rows.weights) {
        for (int j = 0; j < n; j++) rows.weigh(r0 + j, i, rows.scores + 64 * j, step[j]);
        continue;
      }
      if (float_v) {
        softmax_dense(rows, r0, n, step);
        dense_values(rows, r0, n, BLOCK);
      } else {
        softmax_packed(rows, r0, n, step, unit);
        v.values(rows, r0, n);
        if (two_v) v2.values(more, r0, n);
      }
      if (rows.outliers)
        for (int i = 0; i < n; i++) v_outliers.add_values(rows.scores + 64 * i, rows.outliers + size_t(r0 + i) * rows.dim_v);
    }
  }
}

}  // namespace otq
