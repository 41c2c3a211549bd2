// `cblas_sgemm` for MLX's CPU back end, forwarded to a fast BLAS.
//
// MLX's CPU wheel for Linux brings a reference BLAS (about 5 GFLOP/s). Its symbol is looked up in the global scope
// first, so a library loaded there earlier (blas.py does so) takes its place. Only float32 matrix products pass through.
// `opentq_blas_use` must have returned 0 before MLX is loaded.
#include <cstdint>
#include <dlfcn.h>

using Long = void (*)(int, int, int, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t, float, float*, int64_t);
using Short = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
static Long long_gemm = nullptr;
static Short short_gemm = nullptr;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
                        float beta, float* c, int ldc) {
  if (long_gemm) long_gemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  else short_gemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// Forward to `symbol` of `library`, whose integers have 64 bits or 32. 0: done, and a small product came out right.
// 1: the library can't be loaded. 2: it has no such symbol. 3: it computes something else.
EXPORT int opentq_blas_use(const char* library, const char* symbol, int wide) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) return 1;
  void* found = dlsym(handle, symbol);
  if (!found) return 2;
  long_gemm = wide ? reinterpret_cast<Long>(found) : nullptr;
  short_gemm = wide ? nullptr : reinterpret_cast<Short>(found);
  const float a[6] = {1, 2, 3, 4, 5, 6}, b[6] = {1, 0, 2, 1, 0, 3};
  float c[4] = {1, 1, 1, 1};
  cblas_sgemm(101, 111, 111, 2, 2, 3, 1.f, a, 3, b, 2, 2.f, c, 2);
  return c[0] == 7 && c[1] == 13 && c[2] == 16 && c[3] == 25 ? 0 : 3;
}
