// The two products of products.h on Intel's matrix unit (AMX, Sapphire Rapids and later): a chunk of rows at once.
//
// A query row is two rows of the left operand, its high and its low bytes, so a chunk of eight fills the unit's sixteen;
// the right operand is 16 fields of a block that was widened to bytes, just as they lie (blocks.h): 16 tokens x 64
// channels of keys, 16 channels x 64 tokens of values. One instruction does the work of sixteen or more dot products, and what remains
// is unpacking and scaling. Sums are exact and scaled in the same order as there: the results are the same bit for bit.
#pragma once
#include "products.h"

namespace otq {
constexpr int MATRIX_ROWS = 5;  // fewer are quicker without the unit
}

#if defined(__AMX_INT8__) && defined(__linux__) && !defined(OPENTQ_NO_MATRIX)
#include <sys/syscall.h>
#include <unistd.h>

namespace otq {

// Linux gives a process the unit's registers when it asks.
inline bool matrix_unit() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

// Compilers don't know that tiles are loaded from memory: what is there must have been written.
INLINE void written(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// The unit's registers, which compilers want by number. Keys contract `step` channels at a time, a divisor of all groups.
//   0  sums [16 rows][16 lanes]
//   1  codes of keys [step / 4][16 tokens x 4 channels]
//   2  probabilities [16 rows][64 tokens], 3  codes of values [16][16 channels x 4 tokens]
//   4 .. 7  queries [16 rows][step], of four groups where they have one step each

// Channels of keys that one product contracts.
inline int matrix_step(const Packed& k) {
  const int all = k.group | k.dim;  // its lowest set bit divides every group, the last and short one, too
  return std::min(all & -all, 64);
}

// The unit is set up for the time of one task, and left as it was found.
class MatrixUnit {
 public:
  MatrixUnit(bool wanted, int step) : on_(wanted) {
    if (!on_) return;
    const auto bytes = uint16_t(step);
    const auto rows = uint8_t(step / 4);
    const struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shapes = {1, 0, {}, {64, 64, 64, 64, bytes, bytes, bytes, bytes}, {16, rows, 16, 16, 16, 16, 16, 16}};
    written(&shapes);
    _tile_loadconfig(&shapes);
  }
  ~MatrixUnit() {
    if (on_) _tile_release();
  }
  MatrixUnit(const MatrixUnit&) = delete;
  // The unit falls asleep after some 1,000 idle cycles, and waking it takes 700. A product that nobody reads keeps it up.
  INLINE void stay_awake() const {
    if (on_) _tile_dpbsud(0, 2, 3);
  }

 private:
  const bool on_;
};

// Sums of all rows of a chunk: [8][hi, lo][16 lanes].
using Sums = int32_t[2 * CHUNK][16];

INLINE F total(const Sums& sums, int r) { return to_float(join(iload(sums[2 * r]), iload(sums[2 * r + 1]))); }

// sums += queries in register 4 + i, times the codes of keys at `codes`
INLINE void matrix_multiply(int i, const uint8_t* codes) {
  _tile_loadd(1, codes, 256);
  if (i == 0) _tile_dpbsud(0, 4, 1);
  if (i == 1) _tile_dpbsud(0, 5, 1);
  if (i == 2) _tile_dpbsud(0, 6, 1);
  if (i == 3) _tile_dpbsud(0, 7, 1);
}

// Adds COUNT groups from g0 on to the scores, of one step each where they are four. What leaves the unit can't be
// forwarded to a load, so sums are read one turn after they were stored.
template <int COUNT>
INLINE void matrix_score_groups(const uint8_t* codes, const uint16_t* params, const Packed& k, const Rows& rows, int r0, int n, int g0,
                                float* scores) {
  alignas(64) Sums sums[2][COUNT];
  const int8_t* q8 = rows.q8 + size_t(r0) * 2 * k.dim;
  if (COUNT == 4) {
    _tile_loadd(4, q8 + g0 * k.group, k.dim);
    _tile_loadd(5, q8 + (g0 + 1) * k.group, k.dim);
    _tile_loadd(6, q8 + (g0 + 2) * k.group, k.dim);
    _tile_loadd(7, q8 + (g0 + 3) * k.group, k.dim);
  }
  UNROLL for (int turn = 0; turn <= 4; turn++) {  // the fields turn, turn + 4, turn + 8 ... of a tile
    if (turn < 4) {
      UNROLL for (int i = 0; i < COUNT; i++) {
        rows.ahead.step();
        _tile_zero(0);
        if (COUNT == 4) {
          matrix_multiply(i, codes + 64 * (g0 + i) * k.group + 64 * turn);
        } else {
          const int step = matrix_step(k);
          for (int d = 16 * k.first_tile(g0); d < 16 * k.last_tile(g0); d += step) {
            _tile_loadd(4, q8 + d, k.dim);
            matrix_multiply(0, codes + 64 * d + 64 * turn);
          }
        }
        _tile_stored(0, sums[turn % 2][i], 64);
      }
    }
    if (turn == 0) continue;
    const int field = turn - 1;
    F scale[COUNT], zero[COUNT];
    UNROLL for (int i = 0; i < COUNT; i++) {
      const Scale x = scale_of(k, params + k.param_stride() * (g0 + i) + 16 * field);
      scale[i] = x.scale, zero[i] = x.zero;
    }
    const float* sum = rows.q_sum + size_t(r0) * rows.groups_k + g0;
    float* s = scores + 16 * field;
    for (int r = 0; r < n; r++, sum += rows.groups_k, s += 64) {
      F x = g0 ? load(s) : set1(0.f);
      UNROLL for (int i = 0; i < COUNT; i++) x = fma(total(sums[field % 2][i], r), scale[i], fma(zero[i], set1(sum[i]), x));
      store(s, x);
    }
  }
}

// `scores` of products.h; codes are bytes, rows at most CHUNK.
inline void matrix_scores(const uint8_t* codes, const uint16_t* params, const Packed& k, const Rows& rows, int r0, int n, float* scores) {
  int g = 0;
  written(rows.q8);
  if (k.group == matrix_step(k))
    for (; g + 4 <= rows.groups_k; g += 4) matrix_score_groups<4>(codes, params, k, rows, r0, n, g, scores);
  for (; g < rows.groups_k; g++) matrix_score_groups<1>(codes, params, k, rows, r0, n, g, scores);
}

// `values` of products.h; codes are bytes, rows at most CHUNK.
inline void matrix_values(const uint8_t* codes, const Packed& v, const Rows& rows, int r0, int n) {
  constexpr int AT_ONCE = 8;  // tiles
  alignas(64) Sums sums[AT_ONCE];
  written(rows.p8);
  for (int t0 = 0; t0 < v.tiles(); t0 += AT_ONCE) {
    const int count = std::min(AT_ONCE, v.tiles() - t0);
    const float* step[AT_ONCE];
    for (int i = 0, before = -1; i < count; i++) {
      const int g = (t0 + i) * 16 / v.group;
      if (g != before) _tile_loadd(2, rows.p8 + g * CHUNK * 128, 64);
      before = g, step[i] = rows.p_step + g * CHUNK;
      rows.ahead.step();
      _tile_zero(0);
      _tile_loadd(3, codes + 1024 * (t0 + i), 64);
      _tile_dpbsud(0, 2, 3);
      _tile_stored(0, sums[i], 64);
    }
    for (int r = 0; r < n; r++) {
      float* a = rows.acc + size_t(r0 + r) * rows.dim_v + 16 * t0;
      for (int i = 0; i < count; i++, a += 16) store(a, fma(total(sums[i], r), set1(step[i][r]), load(a)));
    }
  }
}

}  // namespace otq

#else

namespace otq {
inline bool matrix_unit() { return false; }
inline int matrix_step(const Packed&) { return 0; }
struct MatrixUnit {
  MatrixUnit(bool, int) {}
  void stay_awake() const {}
};
inline void matrix_scores(const uint8_t*, const uint16_t*, const Packed&, const Rows&, int, int, float*) {}
inline void matrix_values(const uint8_t*, const Packed&, const Rows&, int, int) {}
}  // namespace otq

#endif
