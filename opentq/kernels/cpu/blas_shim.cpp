// `cblas_sgemm` for MLX's CPU back end: a fast BLAS, cut into pieces for the threads of this project.
//
// MLX's CPU wheel for Linux brings a reference BLAS (about 5 GFLOP/s). Its symbol is looked up in the global scope
// first, so a library loaded there earlier (blas.py does so) takes its place. Only float32 matrix products pass through.
// `opentq_blas_use` must have returned 0 before MLX is loaded.
//
// OpenBLAS's own threads spin while they wait. On a machine where other programs run too, a product then waits for a
// thread that waits for a core, 10 to 30 times as long as one thread needs. So OpenBLAS computes each piece on one thread,
// and the pieces go through the same sleeping pool that attention uses (pool.h). Where the cuts are depends on shapes and
// the thread setting only, so results are the same from run to run.
#include <algorithm>
#include <cstdint>
#include <dlfcn.h>
#include <mutex>

#include "pool.h"

namespace otq {
void rows_times(int64_t rows, int64_t n, int64_t k, float alpha, const float* x, int64_t ldx, const float* b, int64_t ldb, float beta,
                float* y, int64_t ldy);  // rows.cpp
}

namespace {

using Long = void (*)(int, int, int, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t, float, float*, int64_t);
using Short = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
using LongVector = void (*)(int, int, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t, float, float*, int64_t);
using ShortVector = void (*)(int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
Long long_gemm = nullptr;
Short short_gemm = nullptr;
LongVector long_gemv = nullptr;
ShortVector short_gemv = nullptr;
void (*set_threads)(int) = nullptr;
int (*get_threads)() = nullptr;
int threads = 1;

constexpr int ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112;
constexpr int64_t PIECE = int64_t(1) << 19;  // multiply-adds that are worth waking a thread for
constexpr int64_t READ = int64_t(1) << 18;   // the same where each reads a number from memory: one row times a matrix
constexpr int FEW = 16;                      // rows that rows.cpp multiplies faster than OpenBLAS, up to twice as fast
constexpr int64_t ALIGN = 32;                // rows or columns: a piece fills the kernels' registers

// While a product runs here, the library uses one thread; the setting is the process's, and numpy's too.
class OneThread {
 public:
  OneThread() {
    if (!set_threads) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (users_++ == 0) before_ = get_threads(), set_threads(1);
  }
  ~OneThread() {
    if (!set_threads) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (--users_ == 0) set_threads(before_);
  }

 private:
  static std::mutex mutex_;
  static int users_, before_;
};
std::mutex OneThread::mutex_;
int OneThread::users_ = 0, OneThread::before_ = 1;

// Call `piece(from, to)` over `length`, in as many pieces as `work` multiply-adds are worth, two a thread at most: where one is
// held up, another takes more.
template <class Piece>
void cut(int64_t length, int64_t work, int64_t worth, const Piece& piece) {
  const int64_t most = (length + ALIGN - 1) / ALIGN, pieces = std::min({int64_t(2) * threads, most, work / worth});
  if (pieces < 2 || threads < 2) return piece(0, length);
  otq::Pool::get().run(int(pieces), threads, [&](int i) {
    piece(most * i / pieces * ALIGN, std::min(most * (i + 1) / pieces * ALIGN, length));
  });
}

// One row, `x [k]`, times op(B) `[k, n]`: as a product of matrices OpenBLAS would first copy all of B into its own order.
void row_times(int tb, int n, int k, float alpha, const float* x, int64_t stride, const float* b, int64_t ldb, float beta, float* y,
               int64_t step) {
  cut(n, int64_t(n) * k, READ, [&](int64_t from, int64_t to) {
    const bool rows = tb == TRANSPOSED;  // B's rows are the outputs
    const float* part = b + from * (rows ? ldb : 1);
    const int64_t m = rows ? to - from : k, columns = rows ? k : to - from;
    if (long_gemv) long_gemv(ROW_MAJOR, rows ? PLAIN : TRANSPOSED, m, columns, alpha, part, ldb, x, stride, beta, y + from * step, step);
    else short_gemv(ROW_MAJOR, rows ? PLAIN : TRANSPOSED, int(m), int(columns), alpha, part, int(ldb), x, int(stride), beta, y + from * step, int(step));
  });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
                        float beta, float* c, int ldc) {
  if (order != ROW_MAJOR) return cblas_sgemm(ROW_MAJOR, tb, ta, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);  // its transpose
  const auto piece = [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const float *left = a + (ta == TRANSPOSED ? row : row * lda), *right = b + (tb == TRANSPOSED ? column * ldb : column);
    float* out = c + row * ldc + column;
    if (long_gemm) long_gemm(order, ta, tb, rows, columns, k, alpha, left, lda, right, ldb, beta, out, ldc);
    else short_gemm(order, ta, tb, int(rows), int(columns), k, alpha, left, lda, right, ldb, beta, out, ldc);
  };
  if (m <= FEW && ta == PLAIN && tb == TRANSPOSED) {
    return cut(n, int64_t(n) * k * ((m + 3) / 4), READ, [&](int64_t from, int64_t to) {
      otq::rows_times(m, to - from, k, alpha, a, lda, b + from * ldb, ldb, beta, c + from, ldc);
    });
  }
  const OneThread quiet;
  if (long_gemv || short_gemv) {
    if (m == 1) return row_times(tb, n, k, alpha, a, ta == TRANSPOSED ? lda : 1, b, ldb, beta, c, 1);
    // One column: the transpose of one row.
    if (n == 1) return row_times(ta == TRANSPOSED ? PLAIN : TRANSPOSED, m, k, alpha, b, tb == TRANSPOSED ? 1 : ldb, a, lda, beta, c, ldc);
  }
  cut(std::max(m, n), int64_t(m) * n * k, PIECE, [&](int64_t from, int64_t to) {
    if (m > n) piece(from, to - from, 0, n);
    else piece(0, m, from, to - from);
  });
}

// Forward to `symbol` of `library`, products of one row to `row_symbol`; its integers have 64 bits or 32; on up to `count`
// threads; `setter` and `getter` name the library's own number of threads. 0: done, and a small product came out right. 1: the library can't be loaded. 2: it has
// no such symbol. 3: it computes something else.
EXPORT int opentq_blas_use(const char* library, const char* symbol, const char* row_symbol, int wide, const char* setter,
                           const char* getter, int count) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) return 1;
  void* found = dlsym(handle, symbol);
  if (!found) return 2;
  long_gemm = wide ? reinterpret_cast<Long>(found) : nullptr;
  short_gemm = wide ? nullptr : reinterpret_cast<Short>(found);
  void* vector = dlsym(handle, row_symbol);
  long_gemv = wide ? reinterpret_cast<LongVector>(vector) : nullptr;
  short_gemv = wide ? nullptr : reinterpret_cast<ShortVector>(vector);
  get_threads = reinterpret_cast<int (*)()>(dlsym(handle, getter));
  set_threads = get_threads ? reinterpret_cast<void (*)(int)>(dlsym(handle, setter)) : nullptr;
  threads = set_threads ? count : 1;  // a library that can't be told keeps its own threads
  const float a[6] = {1, 2, 3, 4, 5, 6}, b[6] = {1, 0, 2, 1, 0, 3};
  float c[4] = {1, 1, 1, 1};
  cblas_sgemm(101, 111, 111, 2, 2, 3, 1.f, a, 3, b, 2, 2.f, c, 2);
  return c[0] == 7 && c[1] == 13 && c[2] == 16 && c[3] == 25 ? 0 : 3;
}
