// The C interface of the CPU kernels: plain structures, mirrored field by field in cpu.py.
#pragma once
#include <algorithm>
#include <cstdint>

namespace otq {

enum Dtype : int32_t { FLOAT32, FLOAT16, BFLOAT16 };

// How a vector became bits. AFFINE: x = code * scale + zero, one fp16 pair per group of channels. BOOK: x = scale * step *
// (book[code] - 128), one fp16 scale per vector. RAW: fp16 [T, D] as it is. POLAR: radii and angles (polar.h).
enum Form : int32_t { AFFINE, BOOK, RAW, POLAR };

// Stored keys or values: [B, Hkv, blocks of 64 tokens], strides in bytes, so that over-allocated and sliced buffers are read
// in place. AFFINE and BOOK lie in the blocked layout (blocks.h); RAW and POLAR tokens are block_stride / 64 bytes apart.
struct Packed {
  const uint8_t* data;
  int64_t batch_stride, head_stride, block_stride;
  int32_t bits, group, dim, form;
  const uint8_t* book;  // BOOK: 64 bytes, the 2^bits entries again and again; POLAR: floats
  float step;
  int32_t pad;
  bool coded() const { return form == AFFINE || form == BOOK; }  // multiplied as integers; else as floats
  // Products are cut into groups: those that share a scale, and short enough for 32-bit sums (128 channels of 8 bits).
  int groups() const { return dim ? (dim + group - 1) / group : 0; }
  int tiles() const { return dim / 16; }
  int64_t code_bytes() const { return int64_t(8) * bits * dim; }
  // fp16 numbers between the parameters of one group and the next.
  int param_stride() const { return form == AFFINE ? 128 : 0; }
  int64_t block_bytes() const { return coded() ? code_bytes() + (form == AFFINE ? 256 * groups() : 128) : block_stride; }
  int64_t token_bytes() const { return block_stride / 64; }  // RAW, POLAR
  // Tiles [first, last) of group g; the last group may be short.
  int first_tile(int g) const { return g * group / 16; }
  int last_tile(int g) const { return std::min((g + 1) * group, dim) / 16; }
};

// [B, Hkv, blocks of 64 tokens]; strides in bytes.
struct Strided {
  const uint8_t* data;
  int64_t batch_stride, head_stride, block_stride, token_stride;
};

// `count` fp16 numbers of a token (outliers.h) and the channels that they belong to, `width` bytes each. count 0: none.
struct Outliers {
  Strided channels, values;
  int32_t count, width;
};

// fp16 [B, Hkv, columns, D]; strides in elements, channels contiguous.
struct Dense {
  const uint16_t* data;
  int64_t batch_stride, head_stride, token_stride;
};

// [B, Hq, L, channels]; strides in elements, channels contiguous.
struct Queries {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// One attention call. Logical order of keys: dense columns [0, sink), packed tokens, dense columns [tail_start, columns);
// the last `length` columns are the tokens of the queries themselves.
struct Call {
  int64_t batch, kv_heads, gqa, length, columns;  // length = query rows per head
  Queries q;                                      // [B, Hq, L, Dk], for dense and raw keys
  Queries projected;                              // [B, Hq, L, E], for coded keys; q itself where nothing is projected
  Queries plain;                                  // [B, Hq, L, Dk], not rotated, for outliers of keys
  int32_t dtype, causal, dim_k, dim_v;            // channels of dense keys and values
  // One run of codes, or two of the same dim (else dim is 0). The second run of keys meets the second half of a projected
  // query; the second run of values is the second half of the channels.
  Packed k[2], v[2];
  Outliers k_outliers, v_outliers;
  Dense dense_k, dense_v;
  const int32_t* lens;  // [B][packed, sink, tail_start]
  const float* sinks;   // [Hq] logits for the softmax denominator, or null
  void* out;            // [B, Hq, L, dim_out], contiguous, dtype of the queries
  float scale, softcap; // softcap 0: none
  int64_t window;       // 0: none
  const int32_t* pages; // [B][Hkv][page_count]: the blocks to read, ascending, or null: all
  int64_t page_count;   // a sequence with fewer blocks has all of them first
  float* weights;       // [B][Hkv][gqa * L, query by query][page_count], or null: in place of attention, the logarithm
                        // of the sum of exponentials of each block's scores, of `pages` or of all
  int32_t threads, pad;
  int dim_out() const { return v_outliers.count ? 2 * dim_v : dim_v; }  // outliers behind the rest
};

// Which pages a decode step reads (pages.cpp). Strides in bytes.
struct PageCall {
  const uint8_t* sketches;  // [B, Hkv, pages, channels * 34 + dim + 2], or null: keys choose among all pages
  int64_t batch_stride, head_stride, page_stride;
  const float* queries;   // [B, Hkv, rows, channels + dim], scaled, contiguous
  const int32_t* packed;  // [B]: tokens
  int32_t* out;           // [B, Hkv, count]
  int64_t batch, kv_heads, rows, channels, dim, count;
  const Call* keys;  // null: sketches choose; else they name `many` pages, and among these the keys of this call choose
  int64_t many;
  int32_t threads, pad;
};

// What one packed token is made of.
struct Format {
  int32_t bits, group, dim, is_values;
  int32_t form, norm;     // norm: the scale keeps the vector's length, not the codes' (BOOK, as the rest; to quantise only)
  const float* cuts;      // 2^bits - 1 boundaries between entries, in units of the scale
  const uint8_t* book;    // as in Packed
  float step;
  int32_t pad;
  int groups() const { return (dim + group - 1) / group; }
  int params() const { return form == AFFINE ? 2 * groups() : 1; }  // fp16 numbers
  int64_t code_bytes() const { return int64_t(8) * bits * dim; }
  int64_t block_bytes() const { return code_bytes() + 128 * params(); }
  // Widths whose codes don't fill a byte evenly lie in two planes, low bits first.
  int low() const { return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits; }
  int high() const { return bits - low(); }
  int low_words() const { return (dim * low() + 31) / 32; }
  int words() const { return low_words() + (dim * high() + 31) / 32; }
};

// Blocks [batch, heads, blocks], and where the strided side of a copy lies.
struct Grid {
  int64_t batch, heads, blocks, batch_stride, head_stride, token_stride;
  int32_t dtype, threads;
};

}  // namespace otq

#define EXPORT extern "C" __attribute__((visibility("default")))

// All return 0, or 1 when memory ran out.
EXPORT int opentq_attend(const otq::Call* call);
// x [B, H, 64 n, D] of `dtype`, strides in elements -> blocks, contiguous. BOOK: with |x| / sqrt(D),
// [B, H, 64 n], contiguous.
EXPORT int opentq_pack(const otq::Format* f, const otq::Grid* n, const void* x, const float* lengths, uint8_t* blocks);
// codes uint32 [B, H, 64 n, words] and scales fp16 [B, H, 64 n, params], contiguous -> blocks, contiguous.
EXPORT int opentq_store(const otq::Format* f, const otq::Grid* n, const uint8_t* codes, const uint16_t* scales, uint8_t* blocks);
// blocks, strides in bytes -> codes and scales, contiguous.
EXPORT int opentq_load(const otq::Format* f, const otq::Grid* n, const uint8_t* blocks, uint8_t* codes, uint16_t* scales);
EXPORT int opentq_pages(const otq::PageCall* call);
EXPORT int64_t opentq_page_call_bytes();
EXPORT const char* opentq_isa();
EXPORT int64_t opentq_call_bytes();
