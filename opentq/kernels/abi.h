// The C interface of the CPU kernels: plain structures, mirrored field by field in cpu.py.
#pragma once
#include <algorithm>
#include <cstdint>

namespace otq {

enum Dtype : int32_t { FLOAT32, FLOAT16, BFLOAT16 };

// Affine-coded keys or values in the blocked layout (blocks.h): [B, Hkv, blocks, block_bytes], strides in bytes, so that
// over-allocated and sliced buffers are read in place.
struct Packed {
  const uint8_t* data;
  int64_t batch_stride, head_stride, block_stride;
  int32_t bits, group, dim, pad;
  int groups() const { return (dim + group - 1) / group; }
  int tiles() const { return dim / 16; }
  int64_t code_bytes() const { return int64_t(8) * bits * dim; }
  int64_t block_bytes() const { return code_bytes() + 256 * groups(); }
  // Tiles [first, last) of group g; the last group may be short.
  int first_tile(int g) const { return g * group / 16; }
  int last_tile(int g) const { return std::min((g + 1) * group, dim) / 16; }
};

// fp16 [B, Hkv, columns, D]; strides in elements, channels contiguous.
struct Dense {
  const uint16_t* data;
  int64_t batch_stride, head_stride, token_stride;
};

// One attention call. Logical order of keys: dense columns [0, sink), packed tokens, dense columns [tail_start, columns);
// the last `length` columns are the tokens of the queries themselves.
struct Call {
  int64_t batch, kv_heads, gqa, length, columns;  // length = query rows per head
  const void* q;                                  // [B, Hq, L, Dk], strides in elements, channels contiguous
  int64_t q_batch_stride, q_head_stride, q_row_stride;
  int32_t dtype, causal;
  Packed k, v;
  Dense dense_k, dense_v;
  const int32_t* lens;  // [B][packed, sink, tail_start]
  const float* sinks;   // [Hq] logits for the softmax denominator, or null
  void* out;            // [B, Hq, L, Dv], contiguous, dtype of q
  float scale, softcap; // softcap 0: none
  int64_t window;       // 0: none
  int32_t threads, pad;
};

// What one packed token is made of.
struct Format {
  int32_t bits, group, dim, is_values;
  int groups() const { return (dim + group - 1) / group; }
  int64_t code_bytes() const { return int64_t(8) * bits * dim; }
  int64_t block_bytes() const { return code_bytes() + 256 * groups(); }
  int words() const { return bits == 3 ? dim / 16 + (dim + 31) / 32 : dim * bits / 32; }
};

// Blocks [batch, heads, blocks], and where the strided side of a copy lies.
struct Grid {
  int64_t batch, heads, blocks, batch_stride, head_stride, token_stride;
  int32_t dtype, threads;
};

}  // namespace otq

#define EXPORT extern "C" __attribute__((visibility("default")))

// All return 0, or 1 when memory ran out.
EXPORT int opentq_attend_affine(const otq::Call* call);
// x [B, H, 64 n, D] of `dtype`, strides in elements -> blocks, contiguous.
EXPORT int opentq_pack_affine(const otq::Format* f, const otq::Grid* n, const void* x, uint8_t* blocks);
// codes uint32 [B, H, 64 n, words] and scales fp16 [B, H, 64 n, 2 G], contiguous -> blocks, contiguous.
EXPORT int opentq_store_affine(const otq::Format* f, const otq::Grid* n, const uint8_t* codes, const uint16_t* scales, uint8_t* blocks);
// blocks, strides in bytes -> codes and scales, contiguous.
EXPORT int opentq_load_affine(const otq::Format* f, const otq::Grid* n, const uint8_t* blocks, uint8_t* codes, uint16_t* scales);
EXPORT const char* opentq_isa();
EXPORT int64_t opentq_call_bytes();
