// Scratch and running state of one task: a block of query rows, their quantised queries, and the online softmax.
//
// Rows of one KV head are ordered r = query_index * gqa + head, so a block of rows spans few positions. Scores are kept
// in units of log2 (the query is scaled by scale * log2(e) once), so that softmax needs 2^x only. A row's
// query becomes 15-bit integers of one step, in two signed bytes each, v = 256*hi + lo: an int8 query alone would cost
// 0.4 % in every score, which is more than fp16 attention loses.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "blocks.h"

namespace otq {

constexpr int CHUNK = 8;            // rows that go through scores, softmax and values together
constexpr float LOWEST = -1e30f;    // "no key yet": finite, so that differences of it are not NaN
constexpr float LEVELS = 32512.f;   // 127 * 256: the largest integer whose two signed bytes are exact
constexpr float LOG2E = 1.44269504088896f;

// One growing, 64-byte aligned piece of memory per thread, cut into arrays for the time of one task.
class Arena {
 public:
  ~Arena() { std::free(base_); }
  void reset(size_t bytes) {
    bytes = (bytes + 4095) & ~size_t(4095);
    if (bytes > size_) {
      std::free(base_);
      base_ = static_cast<uint8_t*>(std::aligned_alloc(4096, bytes));
      size_ = base_ ? bytes : 0;
      if (!base_) throw std::bad_alloc();
    }
    used_ = 0;
  }
  template <class T> T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 63) & ~size_t(63);
    return p;
  }

 private:
  uint8_t* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

constexpr int VECTORS = W == 16 ? 4 : W == 8 ? 2 : 4;  // dense products: vectors per row in the register block (dense.h),
constexpr int AHEAD_DEPTH = 8;                         // and multiply-adds of each between two steps

// Asks for the next block's cache lines a few at a time, between the products of this one: a hardware prefetcher stops at
// every 4 KB page, and 160 requests at once would stall.
struct Ahead {
  const uint8_t *k = nullptr, *k_end = nullptr, *v = nullptr, *v_end = nullptr;
  int pace = 0;  // lines a step
  INLINE void step() {
    int n = pace;
    for (; n > 0 && k < k_end; n--, k += 64) __builtin_prefetch(k, 0, 2);
    for (; n > 0 && v < v_end; n--, v += 64) __builtin_prefetch(v, 0, 2);
  }
  void start(const Packed& keys, const uint8_t* k_block, const Packed& values, const uint8_t* v_block, int rows, bool float_k,
             bool float_v) {
    const int64_t k_bytes = keys.block_bytes(), v_bytes = v_block ? values.block_bytes() : 0;  // no values: keys alone are read
    k = k_block, k_end = k + k_bytes, v = v_block, v_end = v + v_bytes;
    // Codes take one step per group of keys and per pair of value tiles, for each group of rows; raw tokens as they multiply.
    const int tiles = (rows + MAX_ROWS - 1) / MAX_ROWS, passes = rows <= MAX_ROWS / 2 ? 1 : 2, quads = (rows + 3) / 4;
    const int k_steps = float_k ? quads * 64 / (VECTORS * W) * (keys.dim / AHEAD_DEPTH) : tiles * PARTS * passes * keys.groups();
    const int v_steps =
        !v_block ? 0 : float_v ? quads * 64 / AHEAD_DEPTH * std::max(1, values.dim / (VECTORS * W)) : tiles * PARTS * ((values.tiles() + 1) / 2);
    pace = int((k_bytes + v_bytes) / 64 / (k_steps + v_steps)) + 1;
  }
};

INLINE float largest_score(const float* scores) {
  F m = set1(LOWEST);
  for (int i = 0; i < 64; i += W) m = max(load(scores + i), m);  // a NaN score loses
  return hmax(m);
}

struct Rows {
  int count = 0;
  int dim_q = 0, dim_v = 0;        // channels of dense keys and of values
  int dim_k = 0, groups_k = 0;     // of one run of packed keys
  int runs_k = 0, groups_v = 0;    // groups_v: of all runs of values
  int run_v = 0;                   // channels of one run of values
  float softcap = 0;
  float* weights = nullptr;        // [count][weights_stride]: of blocks, where these are asked for in place of attention
  int64_t weights_stride = 0;
  // query
  float* q;         // [count][dim_q], times scale * log2(e)
  float* projected; // [runs_k * dim_k]: one row's query of packed keys, times the same
  float* plain;     // [count][dim_q]: the query of outliers, times the same; null without any
  int8_t* q8;       // [runs_k][filled()][2][dim_k]: the bytes of its integers (quad_at)
  float* q_step;    // [count]: query ~ q_step * v, and the unit of packed scores
  float* q_sum;     // [runs_k][count][groups_k]: sum of these integers over the group, for the zeros
  // running softmax
  float* top;       // [count + 16]: largest score so far
  float* weight;    // [count][W]: lane-wise sums of probabilities
  float* acc;       // [count][dim_v]: sum of p * (v - zero)
  float* outliers;    // [count][dim_v]: sum of p * outliers; null without any
  float* zero;      // [count][groups_v][W]: lane-wise sums of p * zero
  // scratch of one chunk
  float* scores;    // [CHUNK][64]
  float* more;      // [CHUNK][64]: scores of a second run
  int8_t* p8;       // [groups_v][CHUNK][2][64]: those of its probabilities, two planes of four integers to a lane
  float* p_step;    // [groups_v][CHUNK]
  float* params;    // [groups_v][scale 64, zero 64]: one block's, as floats
  float* tame;      // [groups_v]: scale that every probability of the block may use, or 0 (see load_params)
  uint8_t *wide_k, *wide_v;  // one block with a byte per code, run after run
  mutable Ahead ahead;
  float *dense_k, *dense_v;  // one dense tile: keys [dim_q][64], values [64][dim_v]

  void allocate(Arena& arena, int rows, const Call& c) {
    count = rows, dim_q = c.dim_k, dim_v = c.dim_v, dim_k = c.k[0].dim, groups_k = c.k[0].groups();
    runs_k = c.k[1].dim ? 2 : 1, run_v = c.v[0].dim, groups_v = c.v[0].groups() + c.v[1].groups();
    const size_t n = rows, dq = dim_q, dk = runs_k * dim_k, dv = dim_v, gk = runs_k * groups_k, gv = groups_v;
    const size_t floats = n * (dq + gk + 1 + W + dv + gv * W + 1) + 16 + dk + CHUNK * (128 + gv) + 129 * gv + 64 * (dq + dv);
    const size_t plains = c.k_outliers.count ? n * dq : 0, outlying = c.v_outliers.count ? n * dv : 0;
    arena.reset(4 * (floats + plains + outlying) + filled() * 2 * dk + CHUNK * 128 * gv + 64 * (dk + dv) + 64 * 26);
    plain = plains ? arena.take<float>(plains) : nullptr, outliers = outlying ? arena.take<float>(outlying) : nullptr;
    q = arena.take<float>(n * dq), projected = arena.take<float>(dk), q8 = arena.take<int8_t>(filled() * 2 * dk);
    q_step = arena.take<float>(n), q_sum = arena.take<float>(n * gk);
    top = arena.take<float>(n + 16), weight = arena.take<float>(n * W), acc = arena.take<float>(n * dv);
    zero = arena.take<float>(n * gv * W), scores = arena.take<float>(CHUNK * 64), more = arena.take<float>(CHUNK * 64);
    p8 = arena.take<int8_t>(CHUNK * 128 * gv);
    p_step = arena.take<float>(CHUNK * gv), params = arena.take<float>(128 * gv), tame = arena.take<float>(gv);
    wide_k = arena.take<uint8_t>(64 * dk), wide_v = arena.take<uint8_t>(64 * dv);
    dense_k = arena.take<float>(64 * dq), dense_v = arena.take<float>(64 * dv);
    std::fill(top, top + n + 16, LOWEST);
    std::fill(weight, weight + n * W, 0.f);
    std::fill(acc, acc + n * dv, 0.f);
    std::fill(zero, zero + n * gv * W, 0.f);
    std::fill(outliers, outliers + outlying, 0.f);
  }

  // Rows of whole chunks: products may read those that fill up the last one.
  size_t filled() const { return size_t((count + CHUNK - 1) / CHUNK * CHUNK); }

  // Row r's weight of the i-th block, from its 64 scores in units of `step`.
  void weigh(int r, int64_t i, const float* block, float step) const {
    const float largest = largest_score(block) * step;
    F sum = set1(0.f);
    for (int t = 0; t < 64; t += W) sum = add(sum, exp2(fma(load(block + t), set1(step), set1(-largest))));
    weights[r * weights_stride + i] = (largest + std::log2(hsum(sum))) / LOG2E;
  }

  // The same rows as the second runs' products see them. A run of values has one group: those that follow it are empty.
  Rows second() const {
    Rows x = *this;
    x.q8 += filled() * 2 * dim_k, x.q_sum += size_t(count) * groups_k, x.scores = more, x.wide_k += 64 * dim_k;
    x.acc += run_v, x.p8 += CHUNK * 128, x.p_step += CHUNK, x.params += 128, x.tame += 1, x.wide_v += 64 * run_v;
    return x;
  }

  // Row r's query of packed keys, already scaled, -> integers of one step. Groups are multiples of 16 channels.
  void quantise_query(int r, const float* x, int group) {
    F most = set1(0.f);
    for (int d = 0; d < runs_k * dim_k; d += W) most = max(max(load(x + d), sub(set1(0.f), load(x + d))), most);
    // Below 1e-30 a query adds nothing to a score that fp32 could hold.
    const float largest = std::max(hmax(most), 1e-30f), inverse = LEVELS / largest;
    q_step[r] = largest / LEVELS;
    for (int run = 0; run < runs_k; run++, x += dim_k) {
      float* sum = q_sum + (size_t(run) * count + r) * groups_k;
      std::fill_n(sum, groups_k, 0.f);
      int8_t* out = q8 + run * filled() * 2 * dim_k;
      for (int d = 0; d < dim_k; d++) {
        const float rounded = std::nearbyint(x[d] * inverse);
        sum[d / group] += rounded;  // exact, and of what the products see: rounding then meets centred keys only
        put(out + quad_at(dim_k, r, d / 4 * 4), plane(dim_k), d % 4, rounded);  // not NaN, which goes into the sums, and these make the scores NaN
      }
    }
  }

  // A new largest score for rows [r0, r0 + n): old sums shrink. `next` has n entries.
  void raise(int r0, int n, const float* next) {
    for (int i = 0; i < n; i++) {
      const int r = r0 + i;
      if (!(next[i] > top[r])) continue;
      const float shrink = std::exp2(top[r] - next[i]);
      const F s = set1(shrink);
      top[r] = next[i];
      for (int d = 0; d < dim_v; d += W) store(acc + size_t(r) * dim_v + d, mul(s, load(acc + size_t(r) * dim_v + d)));
      if (outliers)
        for (int d = 0; d < dim_v; d += W) store(outliers + size_t(r) * dim_v + d, mul(s, load(outliers + size_t(r) * dim_v + d)));
      store(weight + r * W, mul(s, load(weight + r * W)));
      for (int g = 0; g < groups_v; g++) {
        float* z = zero + (size_t(r) * groups_v + g) * W;
        store(z, mul(s, load(z)));
      }
    }
  }

  // The row's sums with all lanes and zeros folded in: out [dim_out], returns the weight.
  float finish(int r, int group, float* out) const {
    std::copy_n(acc + size_t(r) * dim_v, dim_v, out);
    if (outliers) std::copy_n(outliers + size_t(r) * dim_v, dim_v, out + dim_v);
    for (int g = 0; g < groups_v; g++) {
      const float z = hsum(load(zero + (size_t(r) * groups_v + g) * W));
      for (int d = g * group; d < std::min((g + 1) * group, dim_v); d++) out[d] += z;
    }
    return hsum(load(weight + r * W));
  }
};

// softcap * tanh(x) * log2(e), for scores that were scaled by 1 / softcap.
INLINE F cap(F x, float softcap) {
  const F magnitude = max(x, sub(set1(0.f), x));
  const F e = exp2(mul(magnitude, set1(-2 * LOG2E)));
  const F positive = div(sub(set1(1.f), e), add(set1(1.f), e));
  const F limit = set1(softcap * LOG2E);
  // tanh is odd: copy the sign by x / |x|, with 0 / tiny = 0.
  return mul(mul(limit, positive), div(x, max(magnitude, set1(1e-30f))));
}

constexpr float ONES[CHUNK] = {1, 1, 1, 1, 1, 1, 1, 1};

// One row's 64 scores in units of `step`.
inline void cap_scores(float* scores, float step, float softcap) {
  for (int i = 0; i < 64; i += W) store(scores + i, cap(mul(load(scores + i), set1(step)), softcap));
}

// Keys outside `seen` (bit t = token t) get score -infinity, hence probability exactly 0.
inline void mask_scores(float* scores, uint64_t seen) {
  if (seen == ~uint64_t(0)) return;
  for (int t = 0; t < 64; t++)
    if (!(seen >> t & 1)) scores[t] = -INFINITY;
}

// Bits [from, to) of a 64-bit mask whose bit 0 stands for index `origin`.
inline uint64_t bits_between(int64_t from, int64_t to, int64_t origin) {
  const int64_t a = std::max<int64_t>(from - origin, 0), b = std::min<int64_t>(to - origin, 64);
  if (a >= b) return 0;
  return (b == 64 ? ~uint64_t(0) : (uint64_t(1) << b) - 1) & ~((uint64_t(1) << a) - 1);
}

}  // namespace otq
