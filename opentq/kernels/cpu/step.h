// What surrounds the attention of a decode step, as its callers give it: step.cpp does it, graph.cpp makes it an operation of MLX's.
#pragma once
#include "abi.h"

namespace otq {

// An array as DLPack describes it; strides in elements.
struct Tensor {
  void* data;
  int32_t device_type, device, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
};

struct StepCall {
  const Tensor *q, *k, *v;       // float32 [B, H, L, D]
  const Tensor *old_k, *old_v;   // fp16 columns [B, Hkv, columns, D]
  const Tensor* center;          // fp16 [B, Hkv, 1, Dk], or null
  float* q_out;                  // contiguous, as the rest
  uint16_t *k_out, *v_out;       // [B, Hkv, columns + L, D]
  int64_t batch, q_heads, kv_heads, length, columns;
  int32_t dim_k, dim_v, turn_k, turn_v;
};

}  // namespace otq

EXPORT void opentq_append(const otq::StepCall* call);
EXPORT void opentq_turn(float* x, int64_t rows, int64_t dim);
EXPORT int64_t opentq_step_call_bytes();
