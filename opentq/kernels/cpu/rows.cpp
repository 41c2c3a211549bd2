// A few rows times a matrix whose rows are the outputs, as a layer's weights lie: y[t][n] = sum_k x[t][k] * b[n][k].
//
// For so few rows OpenBLAS takes two or three times as long as for one: it first copies all of b into its own order. Here
// b is read once, where it lies: four of its rows stay in the first cache while all rows of x pass. Lanes are k. Every output
// is summed in the same order however many rows there are, so a token's numbers don't depend on who comes along.
#include "simd.h"

namespace otq {

constexpr int ROWS_TILE = W == 8 ? 3 : 4, COLUMNS_TILE = 4;  // sums, one operand's vectors and one of the other fill the registers

// out = alpha * x b^T + beta * out; where beta is 0, out may hold anything.
template <int ROWS, int COLUMNS, bool FIRST>
static INLINE void rows_tile(const float* x, int64_t ldx, const float* b, int64_t ldb, int64_t k, float alpha, float beta, float* y, int64_t ldy) {
  F sums[ROWS][COLUMNS];
  UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = set1(0.f);
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    F row[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) row[r] = load(x + r * ldx + i), stay(row[r]);
    UNROLL for (int c = 0; c < COLUMNS; c++) {
      F column = load(b + c * ldb + i);
      stay(column);
      if (FIRST) __builtin_prefetch(b + (COLUMNS + c) * ldb + i);  // the next tile, while its neighbours are at work
      UNROLL for (int r = 0; r < ROWS; r++) sums[r][c] = fma(row[r], column, sums[r][c]);
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int c = 0; c < COLUMNS; c++) {
      float sum = hsum(sums[r][c]);
      for (int64_t j = i; j < k; j++) sum = std::fma(x[r * ldx + j], b[c * ldb + j], sum);
      float& out = y[r * ldy + c];
      out = beta == 0.f ? alpha * sum : std::fma(beta, out, alpha * sum);
    }
}

template <int ROWS, int COLUMNS, bool FIRST>
static void all_rows(int64_t rows, const float* x, int64_t ldx, const float* b, int64_t ldb, int64_t k, float alpha, float beta, float* y,
                     int64_t ldy) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return all_rows<ROWS - 1, COLUMNS, FIRST>(rows, x, ldx, b, ldb, k, alpha, beta, y, ldy);
    rows_tile<ROWS, COLUMNS, FIRST>(x, ldx, b, ldb, k, alpha, beta, y, ldy);
    if (rows > ROWS) all_rows<ROWS, COLUMNS, false>(rows - ROWS, x + ROWS * ldx, ldx, b, ldb, k, alpha, beta, y + ROWS * ldy, ldy);
  }
}

// y [rows][n], of x [rows][k] and b [n][k].
void rows_times(int64_t rows, int64_t n, int64_t k, float alpha, const float* x, int64_t ldx, const float* b, int64_t ldb, float beta,
                float* y, int64_t ldy) {
  int64_t c = 0;
  for (; c + COLUMNS_TILE <= n; c += COLUMNS_TILE)
    all_rows<ROWS_TILE, COLUMNS_TILE, true>(rows, x, ldx, b + c * ldb, ldb, k, alpha, beta, y + c, ldy);
  for (; c < n; c++) all_rows<ROWS_TILE, 1, true>(rows, x, ldx, b + c * ldb, ldb, k, alpha, beta, y + c, ldy);
}

}  // namespace otq
