// What surrounds the attention of a decode step: queries, new keys and values rotated, and these put behind the fp16 columns;
// afterwards the output rotated back. A library of its own, since it is small and `attend.cpp` takes minutes.
//
// A rotation is a Walsh-Hadamard transform: additions in the order of MLX's, then one factor, so that a token's bits are
// the same whichever path appends it. New keys are rounded to fp16 before `center` is taken off, as in the cache. Bytes:
// all columns once, which are few.
#include <cmath>
#include <cstring>

#include "simd.h"
#include "step.h"

namespace otq {

// Vector (b, h, t) of [B, H, T, D].
template <class F>
static const F* vector(const Tensor& x, int64_t b, int64_t h, int64_t t) {
  const int64_t* s = x.strides;
  return reinterpret_cast<const F*>(static_cast<const uint8_t*>(x.data) + x.offset) + b * s[0] + h * s[1] + t * s[2];
}

template <class F>
static void copy(F* out, const F* from, int dim, int64_t stride) {
  if (stride == 1) {
    std::memcpy(out, from, dim * sizeof(F));
  } else {
    for (int i = 0; i < dim; i++) out[i] = from[i * stride];
  }
}

constexpr int MAX_DIM = 1024;
constexpr float HALF_MAX = 65504.f;

static void turn(float* x, int dim) {
  for (int h = 1; h < dim; h *= 2)
    for (int i = 0; i < dim; i += 2 * h)
      for (int j = i; j < i + h; j++) {
        const float a = x[j], b = x[j + h];
        x[j] = a + b, x[j + h] = a - b;
      }
  const float factor = 1.f / std::sqrt(float(dim));
  for (int i = 0; i < dim; i++) x[i] *= factor;
}

static uint16_t clipped(float x) { return float_to_half(std::min(std::max(x, -HALF_MAX), HALF_MAX)); }

static void append(const StepCall& c, const Tensor& fresh, const Tensor& old, const Tensor* center, uint16_t* out, int dim, bool turned) {
  float x[MAX_DIM];
  uint16_t mean[MAX_DIM];
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t h = 0; h < c.kv_heads; h++) {
      for (int64_t t = 0; t < c.columns; t++, out += dim) copy(out, vector<uint16_t>(old, b, h, t), dim, old.strides[3]);
      if (center) copy(mean, vector<uint16_t>(*center, b, h, 0), dim, center->strides[3]);
      for (int64_t t = 0; t < c.length; t++, out += dim) {
        copy(x, vector<float>(fresh, b, h, t), dim, fresh.strides[3]);
        if (turned) turn(x, dim);
        for (int i = 0; i < dim; i++) out[i] = clipped(x[i]);
        if (center)
          for (int i = 0; i < dim; i++) out[i] = clipped(half_to_float(out[i]) - half_to_float(mean[i]));
      }
    }
}

}  // namespace otq

EXPORT void opentq_append(const otq::StepCall* call) {
  const otq::StepCall& c = *call;
  float* out = c.q_out;
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t h = 0; h < c.q_heads; h++)
      for (int64_t t = 0; t < c.length; t++, out += c.dim_k) {
        otq::copy(out, otq::vector<float>(*c.q, b, h, t), c.dim_k, c.q->strides[3]);
        if (c.turn_k) otq::turn(out, c.dim_k);
      }
  otq::append(c, *c.k, *c.old_k, c.center, c.k_out, c.dim_k, c.turn_k);
  otq::append(c, *c.v, *c.old_v, nullptr, c.v_out, c.dim_v, c.turn_v);
}

EXPORT void opentq_turn(float* x, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; r++) otq::turn(x + r * dim, int(dim));
}
EXPORT int64_t opentq_step_call_bytes() { return sizeof(otq::StepCall); }
