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
// A whole decode step in one launch, where `Fused` says so: every block rotates its own queries and the newest keys and
// values, which wait in shared memory for the strips that they are part of; the blocks of a head's first row tile share the
// writing of its columns, old and new; and who has an output row turns it back before it is rounded.
//
// Where `Fused` says so, packed tokens are those of a list of pages, two records each: every KV head of a sequence has its
// own, ascending, the newest page among them; a sequence with fewer pages has all of them first.
//
// Merge. Warps merge through shared memory. With several splits, partials (fp32 numerators, maxima, sums) go to scratch
// and the last block to arrive at the ticket of its row tile merges them: no second launch.
//
// Inputs: q [B, Hq, L, QUERY] T, QUERY = Dk but where codes have a query of their own (formats.cuh); k, v: records
// [B, Hkv, blocks, 2 RECORD]; dense_k, dense_v [B, Hkv, Td, D] half; lens int [B, 3] = (packed, sink, tail_start), read
// where sequences differ; sinks float [Hq] (NaN in the first: none); tickets u32, zero between calls. Fused: fresh_k,
// fresh_v [B, Hkv, L, D] T, center [B, Hkv, 1, Dk] half; pages int [B, Hkv, listed].
// Outputs: out [B, Hq, L, Dv] T; scratch [tiles, splits, 8 NT, Dv + 2] float, unused with one split. Fused: new_k, new_v
// [B, Hkv, Td + L, D] half.
// Bytes moved: packed tokens x (record bytes / 32) per KV head and row tile, plus dense columns; nothing else of size.
#include "decode_warp.cuh"
#include "vector.cuh"

namespace opentq {

// Query rows of one KV head -> B fragments, their group sums, and the factor of each row. Loaded first, used later, so
// that the wait is shared with the one for the lengths.
template <class T, class KF, int NT, int NW, int ZERO_PARTS, bool ROTATE>
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

  __device__ __forceinline__ void store(float scale, u16* query, u16* sums, float* factor, float* biases, int warp,
                                        int lane) const {
    constexpr float LOG2E = 1.4426950408889634f;
#pragma unroll
    for (int k = 0; k < MINE; ++k) {
      const int r = warp + k * NW;
      if (r >= 8 * NT) break;
      Vector<KF::QUERY> vector;
      float(&x)[STEPS] = vector.x, top = 0.f;
#pragma unroll
      for (int i = 0; i < STEPS; ++i) x[i] = to_float(raw[k][i]);
      if constexpr (ROTATE) vector.rotate(lane);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) top = fmaxf(top, fabsf(x[i]));
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
        const u16 half = to_half_bits(x[i]), low = ROTATE ? to_half_bits(x[i] - half_bits(half)) : 0;
        if constexpr (KF::ZEROED || KF::BIASED)
#pragma unroll
          for (int group = 0; group < KF::GROUPS; ++group)
            if ((KF::GROUP % 32 ? d : 32 * i) / KF::GROUP == group) sum[group] += half_bits(half) + half_bits(low);  // as multiplied
        const int target = 4 * (r % 8) + d % 8 / 2;
        const int at = (((d / 16 * NT + r / 8) * 32 + target) * 2 + d % 16 / 8) * 2 + d % 2;
        if (d < KF::QUERY) query[at] = half;
        if (ROTATE && d < KF::QUERY) query[at + KF::QUERY / 16 * NT * 128] = low;
      }
      if constexpr (KF::ZEROED || KF::BIASED)
#pragma unroll
        for (int s = 16; s; s /= 2)
#pragma unroll
          for (int i = 0; i < KF::GROUPS; ++i) sum[i] += shuffle_xor(sum[i], s);
      if constexpr (ZERO_PARTS > 0) store_sums(sum, sums, r, lane);
      if constexpr (KF::BIASED)
#pragma unroll
        for (int i = 0; i < KF::GROUPS; ++i)
          if (lane == i) biases[i * 8 * NT + r] = -KF::bias(i) / UNIT * sum[i];
    }
  }

  static __device__ __forceinline__ void store_sums(const float (&sum)[KF::GROUPS], u16* sums, int r, int lane) {
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

// What a launch gets; `Fused` ones alone the last six.
template <class T>
struct Tensors {
  const T* q;
  const u32 *k, *v;
  const f16 *dense_k, *dense_v;
  const int* lens;
  const float* sinks;
  const u32* tickets;
  T* out;
  float* scratch;
  const int* pages;
  const T *fresh_k, *fresh_v;
  const f16* center;
  f16 *new_k, *new_v;
};

template <class T, class KF, class VF, int NT, int NW, int ST, class FUSED>
struct Block {
  using P = Plan<T, KF, VF, NT, NW, ST, FUSED>;
  using D = Decode<T, KF, VF, NT, NW, ST, FUSED>;
  static constexpr int ROWS = P::ROWS, THREADS = 32 * NW;
  static constexpr float LOG2E = 1.4426950408889634f;

  const Tensors<T>& in;
  const Call& call;
  D d;
  // Shared memory: the rings of the warps, and behind them what the launch needs once.
  unsigned char* ring;
  u32 *query, *sums;
  u64* bars;
  float *biases, *outputs, *factor, *warp_m, *warp_l;
  f16 *fresh_k, *fresh_v;
  int *position, *last;
  // Which rows, which keys.
  int lane, warp, split, splits, gqa, length, all_rows, head, r0, rows, tile_index;
  int packed, sink, tail_start, row_base, low_row, high_row, workers, worker, u0, u1;
  size_t kv;
  float first_sink;  // asked for at the start, looked at in the end

  __device__ __forceinline__ Block(const Tensors<T>& tensors, const Call& call) : in(tensors), call(call) {
    unsigned char* at = shared_memory() + P::AREA;
    query = reinterpret_cast<u32*>(at), at += P::QUERY;
    sums = reinterpret_cast<u32*>(at), at += P::SUMS;
    bars = reinterpret_cast<u64*>(at), at += P::BARS;
    outputs = reinterpret_cast<float*>(at), at += P::OUTPUT;
    fresh_k = reinterpret_cast<f16*>(at), fresh_v = fresh_k + FUSED::LENGTH * KF::DENSE, at += P::FRESH;
    biases = reinterpret_cast<float*>(at), at += P::BIASES;
    factor = reinterpret_cast<float*>(at);
    position = reinterpret_cast<int*>(factor + ROWS);
    warp_m = reinterpret_cast<float*>(position + ROWS), warp_l = warp_m + NW * ROWS;
    last = reinterpret_cast<int*>(warp_l + NW * ROWS);
    split = blockIdx.x, splits = gridDim.x, lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
    gqa = call.q_heads / call.kv_heads, length = call.length, all_rows = gqa * length;
    const int tiles = (all_rows + ROWS - 1) / ROWS;
    head = blockIdx.y / tiles, r0 = blockIdx.y % tiles * ROWS, rows = min(ROWS, all_rows - r0);
    kv = (size_t)blockIdx.z * call.kv_heads + head, tile_index = blockIdx.z * gridDim.y + blockIdx.y;
    ring = shared_memory() + warp * ST * P::STAGE;
  }

  // Lengths of this sequence, and the records [u0, u1) of 32 tokens, dealt out one by one to all warps of all splits.
  __device__ __forceinline__ void locate() {
    const bool ragged = call.packed < 0;
    const int* lens = in.lens + 3 * blockIdx.z;
    first_sink = in.sinks[0];
    packed = ragged ? lens[0] : call.packed, sink = ragged ? lens[1] : call.sink;
    tail_start = ragged ? lens[2] : call.tail_start;
    row_base = sink + packed + call.columns - length - tail_start;  // position of query token 0
    // Tokens of this tile: all of them once it spans a head's end, else r0 .. r0 + rows - 1.
    const bool spans = r0 % length + rows > length;
    low_row = row_base + (spans ? 0 : r0 % length);
    high_row = row_base + (spans ? length : r0 % length + rows) - 1;
    workers = splits * NW, worker = split * NW + warp;
    const int lowest = call.window ? max(0, low_row - call.window + 1 - sink) : 0;
    u0 = min(lowest, packed) / 32, u1 = (packed + 31) / 32;
    if constexpr (FUSED::LISTED) u1 = (packed - 64 * max(0, (packed + 63) / 64 - call.listed) + 31) / 32;
  }

  // Which record the `u`th to be read is.
  __device__ __forceinline__ int record(int u) const {
    if constexpr (FUSED::LISTED) return 2 * in.pages[kv * call.listed + u / 2] + u % 2;
    return u;
  }

  // Asks for the `u`th record of K and of V.
  __device__ __forceinline__ void fetch(int stage, int u) {
    const int unit = record(u);
    unsigned char* to = ring + stage * P::STAGE;
    u64* bar = bars + warp * ST + stage;
    const u32* k = in.k + kv * call.k_blocks * 2 * KF::RECORD + (size_t)unit * KF::RECORD;
    const u32* v = in.v + kv * call.v_blocks * 2 * VF::RECORD + (size_t)unit * VF::RECORD;
    barrier_expect(bar, P::STAGE);
    bulk_copy(to, k, KF::BYTES, bar);
    bulk_copy(to + KF::BYTES, v, VF::BYTES, bar);
  }
  __device__ __forceinline__ void fill_ring() {
    if (lane) return;
    for (int s = 0; s < ST; ++s) barrier_init(bars + warp * ST + s);
    for (int s = 0; s < ST; ++s)
      if (u0 + worker + s * workers < u1) fetch(s, u0 + worker + s * workers);
  }

  // New keys and values into shared memory, as they wait in fp16; and all columns into the new arrays.
  __device__ __forceinline__ void append() {
    const int old = call.columns - length;
#pragma unroll 1
    for (int i = warp; i < 2 * length; i += NW) {  // keys first
      const int token = i % length;
      const f16* center = call.centered ? in.center + kv * KF::DENSE : nullptr;
      if constexpr (KF::DENSE == VF::D && FUSED::ROTATE_K == FUSED::ROTATE_V) {  // one code for both sides
        const bool key = i < length;
        append_one<VF::D, FUSED::ROTATE_V>(key ? in.fresh_k : in.fresh_v, key ? center : nullptr,
                                           key ? fresh_k : fresh_v, key ? in.new_k : in.new_v, old, token);
      } else if (i < length) {
        append_one<KF::DENSE, FUSED::ROTATE_K>(in.fresh_k, center, fresh_k, in.new_k, old, token);
      } else {
        append_one<VF::D, FUSED::ROTATE_V>(in.fresh_v, nullptr, fresh_v, in.new_v, old, token);
      }
    }
    if (r0) return;
    copy(in.dense_k + kv * old * KF::DENSE, in.new_k + kv * call.columns * KF::DENSE, old * KF::DENSE);
    copy(in.dense_v + kv * old * VF::D, in.new_v + kv * call.columns * VF::D, old * VF::D);
  }
  template <int DIM, bool ROTATE>
  __device__ __forceinline__ void append_one(const T* from, const f16* center, f16* shared, f16* columns, int old,
                                             int token) const {
    Vector<DIM> x;
    x.load(from + (kv * length + token) * DIM, lane);
    if constexpr (ROTATE) x.rotate(lane);
    x.settle(center, lane);
    x.store(shared + token * DIM, lane);
    if (r0 == 0 && split == 0) x.store(columns + (kv * call.columns + old + token) * DIM, lane);
  }
  __device__ __forceinline__ void copy(const f16* from, f16* to, int count) const {  // this split's share
    for (int i = split * THREADS + threadIdx.x; i < count / 8; i += splits * THREADS)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }

  __device__ __forceinline__ void prepare() {
    if (threadIdx.x < ROWS) position[threadIdx.x] = row_base + (r0 + threadIdx.x) % length;
    if constexpr (KF::TABLES) KF::prepare();
    if constexpr (VF::TABLES) VF::prepare();
    sync_block();
    d.lane = lane, d.warp = warp, d.g = lane / 4, d.t = lane % 4;
    d.query = query, d.sums = sums, d.factor = factor, d.biases = biases, d.position = position;
    d.softcap = call.softcap * LOG2E;
    d.window = call.window, d.causal = call.causal, d.packed = packed, d.sink = sink;
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
  }

  // Dense strips: the sink's, then the tail's from the first that any row of the tile sees to the last.
  __device__ __forceinline__ void attend_dense() {
    const int old = FUSED::APPEND ? call.columns - length : call.columns;
    const Columns from = {in.dense_k + kv * old * KF::DENSE, in.dense_v + kv * old * VF::D, fresh_k, fresh_v,
                          old, tail_start, call.columns};
    const int tail_pos = sink + packed - tail_start;  // position of a tail column = tail_pos + column
    const int sink_strips = (sink + 15) / 16;
    int c0 = max(tail_start / 16, sink_strips), c1 = (call.columns + 15) / 16;
    if (call.window) c0 = max(c0, (low_row - call.window + 1 - tail_pos) / 16);
    if (call.causal) c1 = min(c1, (high_row - tail_pos) / 16 + 1);
    const int strips = sink_strips + max(0, c1 - c0);
    for (int i = workers - 1 - worker; i < strips; i += workers)
      d.dense(from, 16 * (i < sink_strips ? i : c0 + i - sink_strips));
    d.run.template scale_output<true>();
  }

  __device__ __forceinline__ void attend_packed() {
    int stage = 0, count = 0;
    u32 phase = 0;
    for (int u = u0 + worker; u < u1; u += workers) {
      barrier_wait(bars + warp * ST + stage, phase);
      u32* words = reinterpret_cast<u32*>(ring + stage * P::STAGE);
      const int first = 32 * record(u);
      const bool partial = first + 32 > packed;
      if (partial) d.blank(words + KF::RECORD, first);
      d.record(words, words + KF::RECORD, first, partial || (call.window && sink + first <= high_row - call.window),
               u1 - u0 <= workers);
      if (++count % 4 == 0) d.run.unbias();
      sync_warp();
      if (lane == 0 && u + ST * workers < u1) fetch(stage, u + ST * workers);
      if (++stage == ST) stage = 0, phase ^= 1;
    }
    d.run.unbias();
    d.run.template scale_output<false>();
  }

  // The warps' common maximum of a row, and its sum.
  __device__ __forceinline__ float total(int row, float& top) const {
    float sum = 0.f;
    top = -1e30f;
#pragma unroll
    for (int w = 0; w < NW; ++w) top = fmaxf(top, warp_m[w * ROWS + row]);
#pragma unroll
    for (int w = 0; w < NW; ++w) sum += warp_l[w * ROWS + row] * exp2_fast(warp_m[w * ROWS + row] - top);
    return sum;
  }
  // What numerators relative to `top` are multiplied with.
  __device__ __forceinline__ float finish(float sum, float top, int row) const {
    if (first_sink == first_sink) {
      const float x = in.sinks[head * gqa + (r0 + row) / length] * LOG2E, y = fmaxf(top, x);
      const float shrink = exp2_fast(top - y);
      return shrink / (sum * shrink + exp2_fast(x - y));
    }
    return sum > 0.f ? 1.f / sum : 0.f;
  }

  // Four channels of an output row; those that are to be rotated meet in shared memory first.
  __device__ __forceinline__ void emit(int row, int dim, const float4& sum, float f) const {
    if constexpr (FUSED::ROTATE_V) {
      put(outputs + row * (VF::D + 4) + dim, sum, f);
    } else {
      put(in.out + (kv * all_rows + r0 + row) * VF::D + dim, sum, f);
    }
  }
  __device__ __forceinline__ void finish_rows() const {
    if constexpr (FUSED::ROTATE_V) {
      sync_block();
#pragma unroll 1
      for (int row = warp; row < rows; row += NW) {
        Vector<VF::D> x;
        x.load(outputs + row * (VF::D + 4), lane);
        x.rotate(lane);
        x.store(in.out + (kv * all_rows + r0 + row) * VF::D, lane);
      }
    }
  }

  // Warps: maxima and sums, then the outputs, CHUNK tiles at a time. With several splits the results go to scratch.
  __device__ __forceinline__ void merge_warps() {
    const int g = d.g, t = d.t;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = warp * ROWS + 8 * n + 2 * t + r;
        if (g == 0) warp_m[at] = d.run.m[n][r], warp_l[at] = d.run.l[n][r];
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
    float* merge = reinterpret_cast<float*>(shared_memory());
    float* partial = in.scratch + ((size_t)tile_index * splits + split) * ROWS * (VF::D + 2);
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
              const float zero =
                  VF::ZEROED ? shuffle(d.run.oz[n][2 * (group / 8) + i % 2], 4 * (group % 8) + t) : 0.f;
              merge[(warp * ROWS + 8 * n + 2 * t + i % 2) * P::MERGE_ROW + 16 * jj + g + 8 * (i / 2)] =
                  (d.run.o[j][n][i] + zero) * mine[n][i % 2];
            }
        }
      sync_block();
      const int quads = min(4 * P::CHUNK, VF::D / 4 - 4 * j0);
#pragma unroll 1
      for (int i = threadIdx.x; i < rows * quads; i += THREADS) {
        const int row = i / quads, dim = i % quads * 4;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < NW; ++w)
          add(sum, 1.f, *reinterpret_cast<float4*>(merge + (w * ROWS + row) * P::MERGE_ROW + dim));
        if (splits == 1) {
          float top;
          const float l = total(row, top);
          emit(row, 16 * j0 + dim, sum, finish(l, top, row));
        } else {
          *reinterpret_cast<float4*>(partial + row * VF::D + 16 * j0 + dim) = sum;
        }
      }
      if (!P::WHOLE) sync_block();
    }
    if (splits > 1 && threadIdx.x < ROWS) {
      float top;
      const float l = total(threadIdx.x, top);
      *reinterpret_cast<float2*>(partial + ROWS * VF::D + 2 * threadIdx.x) = make_float2(top, l);
    }
  }

  // The last block of this row tile merges the splits, a batch of them in flight at a time. False in all others.
  __device__ __forceinline__ bool merge_splits() {
    sync_block();
    if (threadIdx.x == 0) *last = arrive_last(const_cast<u32*>(in.tickets) + tile_index, splits);
    sync_block();
    if (!*last) return false;
    const float* first = in.scratch + (size_t)tile_index * splits * ROWS * (VF::D + 2);
    constexpr int SPLIT = ROWS * (VF::D + 2), BATCH = 16;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * (VF::D / 4); i += THREADS) {
      const int row = i / (VF::D / 4), dim = i % (VF::D / 4) * 4;
      float top = -1e30f, l = 0.f;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int s0 = 0; s0 < splits; s0 += BATCH) {
        float4 x[BATCH];
        float2 ml[BATCH];
        const float before = top;
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
      emit(row, dim, sum, finish(l, top, row));
    }
    return true;
  }
};

template <class T, class KF, class VF, int NT, int NW, int ST, int SHARED,
          class FUSED = Fused<false, false, false, false, false>>
__device__ __forceinline__ void decode(const Tensors<T>& in, const Call& call) {
  using P = Plan<T, KF, VF, NT, NW, ST, FUSED>;
  static_assert(P::BYTES <= SHARED, "the launch geometry reserves too little shared memory");
  Block<T, KF, VF, NT, NW, ST, FUSED> block(in, call);
  QueryStage<T, KF, NT, NW, P::ZERO_PARTS, FUSED::ROTATE_K> stage;
  stage.load(in.q + (block.kv * block.all_rows + block.r0) * KF::QUERY, block.rows, block.warp, block.lane);
  block.locate();
  block.fill_ring();
  if constexpr (FUSED::APPEND) block.append();
  stage.store(call.scale, reinterpret_cast<u16*>(block.query), reinterpret_cast<u16*>(block.sums), block.factor,
              block.biases, block.warp, block.lane);
  block.prepare();
  block.attend_dense();
  block.attend_packed();
  block.merge_warps();
  if (block.splits == 1 || block.merge_splits()) block.finish_rows();
}

}  // namespace opentq
