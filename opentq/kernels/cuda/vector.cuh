// One head vector in the registers of a warp, and its Walsh-Hadamard rotation.
//
// Lane l holds channels l, l + 32, ... in fp32: five butterflies between lanes, the others within one.
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
  // As it waits in a cache's fp16 columns: `center`, if there is one, taken off what fp16 holds of the vector.
  __device__ __forceinline__ void settle(const f16* center, int lane) {
    clip();
    if (!center) return;
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
      if (32 * i + lane < D) x[i] = half_bits(to_half_bits(x[i])) - to_float(center[32 * i + lane]);
    clip();
  }
  __device__ __forceinline__ void clip() {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) x[i] = fminf(fmaxf(x[i], -65504.f), 65504.f);
  }
};

}  // namespace opentq
