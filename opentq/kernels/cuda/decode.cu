// Attention of a few query rows over a packed KV cache and its dense fp16 region, in one launch.
//
// Who does what. Grid: (split, KV head x row tile, sequence). The query rows of one KV head, `gqa` heads times L
// tokens, are cut into row tiles of 8 NT rows; a block serves one row tile over its share of the keys, so that every
// packed byte is read once for up to 8 NT rows. Inside, each of NW warps works alone on records of 32 tokens, with its
// own running softmax; warps meet only at the end.
//
// How bytes arrive. Each warp owns a ring of ST stages in shared memory. One lane asks the copy engine for a whole
// record of K and of V (they are contiguous), and refills a stage as soon as the warp has used it: no register and no
// instruction waits for memory. NW * ST * 5 KB (int4 g32, D = 128) are in flight per block.
//
// Arithmetic: `decode_warp.cuh`.
//
// Dense columns go 16 at a time to the warps with the least packed work, straight from global memory with the same
// fragments, before any packed record, while the ring fills.
//
// Merge. Warps merge through shared memory. With several splits, partials (fp32 numerators, maxima, sums) go to scratch
// and the last block to arrive at the ticket of its row tile merges them: no second launch.
//
// Inputs: q [B, Hq, L, QUERY] T, QUERY = Dk but where codes have a query of their own (formats.cuh); k, v: records
// [B, Hkv, blocks, 2 RECORD]; dense_k, dense_v [B, Hkv, Td, D] half; lens int [B, 3] = (packed, sink, tail_start), read
// where sequences differ; sinks float [Hq] (NaN in the first: none); tickets u32, zero between calls.
// Outputs: out [B, Hq, L, Dv] T; scratch [tiles, splits, 8 NT, Dv + 2] float, unused with one split.
// Bytes moved: packed tokens x (record bytes / 32) per KV head and row tile, plus dense columns; nothing else of size.
#include "decode_warp.cuh"

namespace opentq {

// Query rows of one KV head -> B fragments, their group sums, and the factor of each row. Loaded first, used later, so
// that the wait is shared with the one for the lengths.
template <class T, class KF, int NT, int NW, int ZERO_PARTS>
struct QueryStage {
  static constexpr int STEPS = (KF::QUERY + 31) / 32, MINE = (8 * NT + NW - 1) / NW;
  T raw[MINE][STEPS];

  __device__ __forceinline__ void load(const T* q, int rows, int warp, int lane) {
#pragma unroll
    for (int k = 0; k < MINE; ++k)
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        const int r = warp + k * NW, d = 32 * i + lane;
        if (r < rows && d < KF::QUERY) {
          raw[k][i] = q[(size_t)r * KF::QUERY + d];
        } else {
          assign(raw[k][i], 0.f);
        }
      }
  }

  __device__ __forceinline__ void store(float scale, u16* query, u16* sums, float* factor, int warp, int lane) const {
    constexpr float LOG2E = 1.4426950408889634f;
#pragma unroll
    for (int k = 0; k < MINE; ++k) {
      const int r = warp + k * NW;
      if (r >= 8 * NT) break;
      float x[STEPS], top = 0.f;
#pragma unroll
      for (int i = 0; i < STEPS; ++i) x[i] = to_float(raw[k][i]), top = fmaxf(top, fabsf(x[i]));
#pragma unroll
      for (int i = 16; i; i /= 2) top = fmaxf(top, shuffle_xor(top, i));
      const int e = top > 1e-30f ? ilogbf(top) : 0;
      const float shrink = ldexpf(1.f, -e);
      if (lane == 0) factor[r] = scale * LOG2E * ldexpf(1.f, e);
      float sum[KF::GROUPS];
#pragma unroll
      for (int i = 0; i < KF::GROUPS; ++i) sum[i] = 0.f;
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        x[i] *= shrink;
        const int d = 32 * i + lane;
        const u16 half = to_half_bits(x[i]);
        if constexpr (KF::ZEROED) sum[32 * i / KF::GROUP] += half_bits(half);  // what the tensor core multiplies
        const int target = 4 * (r % 8) + d % 8 / 2;
        if (d < KF::QUERY) query[(((d / 16 * NT + r / 8) * 32 + target) * 2 + d % 16 / 8) * 2 + d % 2] = half;
      }
      if constexpr (ZERO_PARTS > 0) store_sums(sum, sums, r, lane);
    }
  }

  static __device__ __forceinline__ void store_sums(float (&sum)[KF::GROUPS], u16* sums, int r, int lane) {
#pragma unroll
    for (int s = 16; s; s /= 2)
#pragma unroll
      for (int i = 0; i < KF::GROUPS; ++i) sum[i] += shuffle_xor(sum[i], s);
    // Contraction rows: the high parts of the sums, then the low parts, each padded to 8 or 16 groups.
    constexpr int PAD = 8 * ZERO_PARTS;
#pragma unroll
    for (int i = 0; i < PAD; ++i) {
      const float mine = i < KF::GROUPS ? sum[i < KF::GROUPS ? i : 0] : 0.f;
      const u16 high = to_half_bits(mine), low = to_half_bits(mine - half_bits(high));
      if (lane == i || lane == i + PAD) {
        const int d = lane % 16, target = 4 * (r % 8) + d % 8 / 2;
        sums[((((r / 8) * ZERO_PARTS + lane / 16) * 32 + target) * 2 + d / 8) * 2 + d % 2] = lane < PAD ? high : low;
      }
    }
  }
};

template <class T, class KF, class VF, int NT, int NW, int ST, int SHARED>
__device__ __forceinline__ void decode(const T* q, const u32* k, const u32* v, const f16* dense_k,
                                       const f16* dense_v, const int* lens, const float* sinks, const u32* tickets,
                                       T* out, float* scratch, Call call) {
  using P = Plan<T, KF, VF, NT, NW, ST>;
  using D = Decode<T, KF, VF, NT, NW, ST>;
  static_assert(P::BYTES <= SHARED, "the launch geometry reserves too little shared memory");
  constexpr int ROWS = P::ROWS;
  unsigned char* shared = shared_memory();
  unsigned char* at = shared + P::AREA;
  u32* query = reinterpret_cast<u32*>(at);
  u32* sums = reinterpret_cast<u32*>(at + P::QUERY);
  u64* bars = reinterpret_cast<u64*>(at + P::QUERY + P::SUMS);
  float* factor = reinterpret_cast<float*>(at + P::QUERY + P::SUMS + P::BARS);
  int* position = reinterpret_cast<int*>(factor + ROWS);
  float* warp_m = reinterpret_cast<float*>(position + ROWS);
  float* warp_l = warp_m + NW * ROWS;
  int* last = reinterpret_cast<int*>(warp_l + NW * ROWS);

  const int split = blockIdx.x, splits = gridDim.x, b = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int gqa = call.q_heads / call.kv_heads, length = call.length, all_rows = gqa * length;
  const int tiles = (all_rows + ROWS - 1) / ROWS, head = blockIdx.y / tiles, r0 = blockIdx.y % tiles * ROWS;
  const int rows = min(ROWS, all_rows - r0);
  const size_t kv = (size_t)b * call.kv_heads + head;
  QueryStage<T, KF, NT, NW, P::ZERO_PARTS> stage_query;
  stage_query.load(q + (kv * all_rows + r0) * KF::QUERY, rows, warp, lane);
  const bool ragged = call.packed < 0;
  const int packed = ragged ? lens[3 * b] : call.packed, sink = ragged ? lens[3 * b + 1] : call.sink;
  const int tail_start = ragged ? lens[3 * b + 2] : call.tail_start;
  const int window = call.window, columns = call.columns;
  const int row_base = sink + packed + columns - length - tail_start;  // position of query token 0

  // Tokens of this tile: all of them once it spans a head's end, else r0 .. r0 + rows - 1.
  const bool spans = r0 % length + rows > length;
  const int low_row = row_base + (spans ? 0 : r0 % length);
  const int high_row = row_base + (spans ? length : r0 % length + rows) - 1;

  // Records [u0, u1) of 32 tokens, dealt out one by one to all warps of all splits.
  const int workers = splits * NW, worker = split * NW + warp;
  const int lowest = window ? max(0, low_row - window + 1 - sink) : 0;
  const int u0 = min(lowest, packed) / 32, u1 = (packed + 31) / 32;
  const u32* k_records = k + kv * call.k_blocks * 2 * KF::RECORD;
  const u32* v_records = v + kv * call.v_blocks * 2 * VF::RECORD;
  unsigned char* ring = shared + warp * ST * P::STAGE;
  u64* bar = bars + warp * ST;
  auto fetch = [&](int stage, int unit) {
    unsigned char* to = ring + stage * P::STAGE;
    barrier_expect(bar + stage, P::STAGE);
    bulk_copy(to, k_records + (size_t)unit * KF::RECORD, KF::BYTES, bar + stage);
    bulk_copy(to + KF::BYTES, v_records + (size_t)unit * VF::RECORD, VF::BYTES, bar + stage);
  };
  if (lane == 0) {
    for (int s = 0; s < ST; ++s) barrier_init(bar + s);
    for (int s = 0; s < ST; ++s)
      if (u0 + worker + s * workers < u1) fetch(s, u0 + worker + s * workers);
  }

  stage_query.store(call.scale, reinterpret_cast<u16*>(query), reinterpret_cast<u16*>(sums), factor, warp, lane);
  for (int r = threadIdx.x; r < ROWS; r += NW * 32) position[r] = row_base + (r0 + r) % length;
  if constexpr (KF::TABLES) KF::prepare();
  if constexpr (VF::TABLES) VF::prepare();
  sync_block();

  D d;
  d.lane = lane, d.warp = warp, d.g = lane / 4, d.t = lane % 4;
  d.query = query, d.sums = sums, d.factor = factor, d.position = position;
  d.softcap = call.softcap * 1.4426950408889634f;
  d.window = window, d.causal = call.causal, d.packed = packed, d.sink = sink;
  d.run.clear();
#pragma unroll
  for (int n = 0; n < NT; ++n) d.f[n][0] = factor[8 * n + 2 * d.t], d.f[n][1] = factor[8 * n + 2 * d.t + 1];
  if constexpr (D::HELD) {
#pragma unroll
    for (int j = 0; j < D::QUERY_TILES; ++j)
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint2 w = reinterpret_cast<const uint2*>(query)[(j * NT + n) * 32 + lane];
        d.held[j][n][0] = w.x, d.held[j][n][1] = w.y;
      }
  }

  // Dense strips: the sink's, then the tail's from the first that any row of the tile sees to the last.
  const int tail_pos = sink + packed - tail_start;  // position of a tail column = tail_pos + column
  const int sink_strips = (sink + 15) / 16;
  int c0 = max(tail_start / 16, sink_strips), c1 = (columns + 15) / 16;
  if (window) c0 = max(c0, (low_row - window + 1 - tail_pos) / 16);
  if (call.causal) c1 = min(c1, (high_row - tail_pos) / 16 + 1);
  const int strips = sink_strips + max(0, c1 - c0);
  for (int i = workers - 1 - worker; i < strips; i += workers)
    d.dense(dense_k + kv * columns * KF::DENSE, dense_v + kv * columns * VF::D,
            16 * (i < sink_strips ? i : c0 + i - sink_strips), tail_start, columns);
  d.run.template scale_output<VF, true>();

  int stage = 0;
  u32 phase = 0;
  for (int u = u0 + worker; u < u1; u += workers) {
    barrier_wait(bar + stage, phase);
    u32* record = reinterpret_cast<u32*>(ring + stage * P::STAGE);
    const bool partial = 32 * u + 32 > packed;
    if (partial) d.blank(record + KF::RECORD, 32 * u);
    d.record(record, record + KF::RECORD, 32 * u, partial || (window && sink + 32 * u <= high_row - window));
    sync_warp();
    if (lane == 0 && u + ST * workers < u1) fetch(stage, u + ST * workers);
    if (++stage == ST) stage = 0, phase ^= 1;
  }
  d.run.template scale_output<VF, false>();

  // Warps: maxima and sums, then the outputs, CHUNK tiles at a time.
  const int g = d.g, t = d.t;
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float l = d.run.l[n][r];
      l += shuffle_xor(l, 4), l += shuffle_xor(l, 8), l += shuffle_xor(l, 16);
      if (g == 0) warp_m[warp * ROWS + 8 * n + 2 * t + r] = d.run.m[n][r], warp_l[warp * ROWS + 8 * n + 2 * t + r] = l;
    }
  sync_block();  // also: every warp is done with its ring
  float mine[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = -1e30f;
      for (int w = 0; w < NW; ++w) m = fmaxf(m, warp_m[w * ROWS + 8 * n + 2 * t + r]);
      mine[n][r] = exp2_fast(d.run.m[n][r] - m);
    }
  float* merge = reinterpret_cast<float*>(shared);
  const int tile_index = blockIdx.z * gridDim.y + blockIdx.y;
  float* partial = scratch + ((size_t)tile_index * splits + split) * ROWS * (VF::D + 2);
  T* out_rows = out + (kv * all_rows + r0) * VF::D;

  // The warps' common maximum of a row, and its sum.
  auto total = [&](int row, float& top) {
    float sum = 0.f;
    top = -1e30f;
#pragma unroll
    for (int w = 0; w < NW; ++w) top = fmaxf(top, warp_m[w * ROWS + row]);
#pragma unroll
    for (int w = 0; w < NW; ++w) sum += warp_l[w * ROWS + row] * exp2_fast(warp_m[w * ROWS + row] - top);
    return sum;
  };
  auto finish = [&](float sum, float top, int row) {  // what numerators relative to `top` are multiplied with
    if (sinks[0] == sinks[0]) {
      const float x = sinks[head * gqa + (r0 + row) / length] * 1.4426950408889634f, y = fmaxf(top, x);
      const float shrink = exp2_fast(top - y);
      return shrink / (sum * shrink + exp2_fast(x - y));
    }
    return sum > 0.f ? 1.f / sum : 0.f;
  };

  constexpr int GROUP_TILES = VF::GROUP / 16;
#pragma unroll
  for (int j0 = 0; j0 < VF::TILES; j0 += P::CHUNK) {
#pragma unroll
    for (int jj = 0; jj < P::CHUNK; ++jj)
      if (j0 + jj < VF::TILES) {
        const int j = j0 + jj, group = j / GROUP_TILES;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float zero = VF::ZEROED ? shuffle(d.run.oz[n][2 * (group / 8) + i % 2], 4 * (group % 8) + t) : 0.f;
            merge[(warp * ROWS + 8 * n + 2 * t + i % 2) * P::MERGE_ROW + 16 * jj + g + 8 * (i / 2)] =
                (d.run.o[j][n][i] + zero) * mine[n][i % 2];
          }
      }
    sync_block();
    const int quads = min(4 * P::CHUNK, VF::D / 4 - 4 * j0);
    for (int i = threadIdx.x; i < rows * quads; i += NW * 32) {
      const int row = i / quads, dim = i % quads * 4;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < NW; ++w)
        add(sum, 1.f, *reinterpret_cast<float4*>(merge + (w * ROWS + row) * P::MERGE_ROW + dim));
      if (splits == 1) {
        float top;
        const float l = total(row, top);
        put(out_rows + (size_t)row * VF::D + 16 * j0 + dim, sum, finish(l, top, row));
      } else {
        *reinterpret_cast<float4*>(partial + row * VF::D + 16 * j0 + dim) = sum;
      }
    }
    if (!P::WHOLE) sync_block();
  }
  if (splits == 1) return;
  if (threadIdx.x < ROWS) {
    float top;
    const float l = total(threadIdx.x, top);
    *reinterpret_cast<float2*>(partial + ROWS * VF::D + 2 * threadIdx.x) = make_float2(top, l);
  }
  sync_block();

  // The last block of this row tile merges the splits, a batch of them in flight at a time.
  if (threadIdx.x == 0) *last = arrive_last(const_cast<u32*>(tickets) + tile_index, splits);
  sync_block();
  if (!*last) return;
  const float* first = scratch + (size_t)tile_index * splits * ROWS * (VF::D + 2);
  constexpr int SPLIT = ROWS * (VF::D + 2), BATCH = 16;
  for (int i = threadIdx.x; i < rows * (VF::D / 4); i += NW * 32) {
    const int row = i / (VF::D / 4), dim = i % (VF::D / 4) * 4;
    float top = -1e30f, l = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int s0 = 0; s0 < splits; s0 += BATCH) {
      float4 x[BATCH];
      float2 ml[BATCH];
      float before = top;
#pragma unroll
      for (int s = 0; s < BATCH; ++s) {
        const float* piece = first + (size_t)(s0 + s) * SPLIT;
        ml[s] = make_float2(-1e30f, 0.f), x[s] = sum;
        if (s0 + s < splits) {
          ml[s] = load_global(reinterpret_cast<const float2*>(piece + ROWS * VF::D) + row);
          x[s] = load_global(reinterpret_cast<const float4*>(piece + row * VF::D + dim));
        }
      }
#pragma unroll
      for (int s = 0; s < BATCH; ++s) top = fmaxf(top, ml[s].x);
      const float f = exp2_fast(before - top);
      l *= f, sum.x *= f, sum.y *= f, sum.z *= f, sum.w *= f;
#pragma unroll
      for (int s = 0; s < BATCH; ++s)
        if (s0 + s < splits) {
          const float w = exp2_fast(ml[s].x - top);
          l += w * ml[s].y;
          add(sum, w, x[s]);
        }
    }
    put(out_rows + (size_t)row * VF::D + dim, sum, finish(l, top, row));
  }
}

}  // namespace opentq
