// One sequence's keys or values of a few KV heads as one plain matrix in logical order, for prefill.
//
// A prompt chunk is thousands of rows: its attention is bound by arithmetic, not by bytes, and the vendor's fp16 kernel
// is the best there is. So a few KV heads at a time are laid out as it wants them, [heads, tokens, D], attended, and
// thrown away; what exists at any time is a bounded piece of one layer.
//
// A block of 4 warps; warp i of the grid takes record i (32 tokens) of the packed region, then groups of 32 dense
// columns. Codes come as mma fragments (record.cuh); x = number * scale + zero in fp32, rounded once to T, half or
// bfloat16. In K a fragment register holds two neighbouring dims of a key; in V two keys of a dim, turned by one 8 x 8
// transpose. A strip of 16 tokens meets in shared memory, the warp's own, and leaves in whole rows, 16 bytes a lane:
// written from the fragments, every store would touch eight rows and fill half a sector of each.
// Grid: (records and dense groups / 4, heads, sides). Inputs: records [B, H, blocks, 2 RECORD], dense [B, H, Td, D]
// half, where int [8] = (sequence, first head, packed, sink, tail_start). Output: y [heads, tokens, D] T.
// Bytes moved: the records read, tokens * D * sizeof(T) written.
#include "record.cuh"

namespace opentq {

template <class F, bool KEYS, class T>
__device__ __forceinline__ void unpack(const u32* __restrict__ records, const f16* __restrict__ dense, const int* where,
                                       T* __restrict__ y, int blocks, int heads, int columns, int tokens) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int unit = blockIdx.x * 4 + threadIdx.x / 32, head = where[1] + blockIdx.y;
  const int packed = where[2], sink = where[3], tail_start = where[4], n_records = (packed + 31) / 32;
  const size_t kv = (size_t)where[0] * heads + head;
  y += (size_t)blockIdx.y * tokens * F::D;
  if constexpr (F::TABLES) {
    F::prepare();
    sync_block();
  }
  if (unit < n_records) {
    const u32* record = records + (kv * blocks * 2 + unit) * F::RECORD;
    const u16* scales = reinterpret_cast<const u16*>(record + F::SCALES);
    const u16* zeros = reinterpret_cast<const u16*>(record + F::ZEROS);
    auto zero = [&](int at) { return F::ZEROED ? half_bits(zeros[at]) : 0.f; };
    constexpr int ROW = F::D / 2 + 4;  // words; + 4: rows start in other banks
    u32* strip_rows = reinterpret_cast<u32*>(shared_memory()) + threadIdx.x / 32 * 16 * ROW;
    Fragments<F> fragments;
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
#pragma unroll
      for (int tile = 0; tile < F::TILES; ++tile) {
        const int group = tile * 16 / F::GROUP;
        u32 a[4];
        fragments.tile(a, record, lane, strip * F::TILES + tile);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float unit_value = F::STEP * (group ? F::SECOND : 1.f) / (r % 2 ? F::LIFT : 1.f);
          float x = (low_half(a[r]) * UNIT - F::bias(group)) * unit_value;
          float z = (high_half(a[r]) * UNIT - F::bias(group)) * unit_value;
          int row, dim;
          if constexpr (KEYS) {
            row = g + 8 * (r % 2), dim = 16 * tile + 2 * t + 8 * (r / 2);
            const int at = (16 * strip + row) * F::GROUPS + group;
            x = fmaf(x, half_bits(scales[at]), zero(at)), z = fmaf(z, half_bits(scales[at]), zero(at));
          } else {
            row = g + 8 * (r / 2), dim = 16 * tile + 2 * t + 8 * (r % 2);
            const int at = group * 32 + 8 * t + 4 * strip + 2 * (r / 2);
            x = fmaf(x, half_bits(scales[at]), zero(at)), z = fmaf(z, half_bits(scales[at + 1]), zero(at + 1));
          }
          const u32 pair = pack_pair(y, x, z);
          strip_rows[row * ROW + dim / 2] = KEYS ? pair : transpose8x8(pair);
        }
      }
      sync_warp();
      const int token = 32 * unit + 16 * strip, rows = min(16, packed - token);
      uint4* to = reinterpret_cast<uint4*>(y + (size_t)(sink + token) * F::D);
      for (int i = lane; i < rows * (F::D / 8); i += 32)
        to[i] = *reinterpret_cast<const uint4*>(strip_rows + i / (F::D / 8) * ROW + i % (F::D / 8) * 4);
      sync_warp();  // before the next strip overwrites this one
    }
    return;
  }
  const int first = 32 * (unit - n_records);
  dense += kv * columns * F::D;
  for (int i = lane; i < 32 * F::D; i += 32) {
    const int column = first + i / F::D;
    if (column < sink || (column >= tail_start && column < columns)) {
      const int position = column < sink ? column : sink + packed + column - tail_start;
      assign(y[(size_t)position * F::D + i % F::D], to_float(dense[(size_t)column * F::D + i % F::D]));
    }
  }
}

}  // namespace opentq
