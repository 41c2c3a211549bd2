// The Walsh-Hadamard rotation of head vectors, one warp per vector: alone, for queries and outputs, and on the way into
// the fp16 columns of a cache. What would be three to twelve small operations per layer and token is one launch.
//
// Lane l holds channels l, l + 32, ... in fp32: five butterflies between lanes, the others within one. Grids: vectors /
// 4; in `extend` with one row of blocks for keys and one for values.
// Inputs: x [vectors, D] T. `extend`: old columns [B H, T, D] half, new vectors [B H, L, D] T. Outputs: y as x; columns
// [B H, T + L, D] half: the old ones copied, the new ones rotated where the codec rotates, and clipped to fp16's range.
// Bytes moved: what is read and written.
#include "warp.cuh"

namespace opentq {

template <int D>
struct Vector {
  static constexpr int STEPS = (D + 31) / 32;
  float x[STEPS];

  template <class T>
  __device__ __forceinline__ void load(const T* p, int lane) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) x[i] = 32 * i + lane < D ? to_float(p[32 * i + lane]) : 0.f;
  }
  template <class T>
  __device__ __forceinline__ void store(T* p, int lane) const {
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
      if (32 * i + lane < D) assign(p[32 * i + lane], x[i]);
  }
  __device__ __forceinline__ void rotate(int lane) {
    static_assert(D >= 32 && (D & (D - 1)) == 0, "powers of two");
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
#pragma unroll
      for (int s = 1; s < 32; s *= 2) {
        const float other = shuffle_xor(x[i], s);
        x[i] = lane & s ? other - x[i] : x[i] + other;
      }
#pragma unroll
    for (int s = 1; s < STEPS; s *= 2)
#pragma unroll
      for (int i = 0; i < STEPS; ++i)
        if (!(i & s)) {
          const float a = x[i], b = x[i + s];
          x[i] = a + b, x[i + s] = a - b;
        }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) x[i] *= rsqrtf((float)D);
  }
  __device__ __forceinline__ void clip() {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) x[i] = fminf(fmaxf(x[i], -65504.f), 65504.f);
  }
};

template <class T, int D>
__device__ __forceinline__ void rotate(const T* x, T* y, int vectors) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= vectors) return;
  Vector<D> v;
  v.load(x + (size_t)row * D, lane);
  v.rotate(lane);
  v.store(y + (size_t)row * D, lane);
}

template <class T, int D, bool ROTATED>
__device__ __forceinline__ void extend(const f16* old, const T* fresh, f16* out, int heads, int columns, int length) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32, all = columns + length;
  if (row >= heads * all) return;
  const int head = row / all, column = row % all;
  Vector<D> v;
  if (column < columns) {
    v.load(old + ((size_t)head * columns + column) * D, lane);
  } else {
    v.load(fresh + ((size_t)head * length + column - columns) * D, lane);
    if constexpr (ROTATED) v.rotate(lane);
    v.clip();
  }
  v.store(out + (size_t)row * D, lane);
}

}  // namespace opentq
