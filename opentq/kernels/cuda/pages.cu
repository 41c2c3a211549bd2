// Which pages a decode step reads, in two launches: every page's weight for every query row, then the largest shares.
//
// A page of sketches is C channels of 32 bytes (byte j: the 4-bit codes of tokens j and j + 32) and C fp16 scales; a code
// stands for (code - 7.5) * scale; then the mean key of the page, D signed bytes and a scale (attention/pages.py). `weigh`:
// one warp per page, lane j has tokens j and j + 32 of all channels, and every 32nd of the mean, in registers and meets
// one query row after the other; grid (pages / 4, B Hkv). `pick`: one block per KV head
// adds up the rows' shares of the softmax and finds the count-th largest by halving the range of its bits; grid B Hkv.
// Inputs: sketches [B Hkv, held, 34 C + D + 2] bytes, queries [B Hkv, rows, C + D] float, scaled; packed [B] tokens.
// Outputs: weights [B Hkv, rows, pages] float, log2; shares [B Hkv, pages] float; list [B Hkv, count], ascending.
// Bytes moved: the sketches once; weights (4 rows / 64 bytes a token) out and in again, from the cache.
#include "warp.cuh"

namespace opentq {

template <int C, int DIM>
__device__ __forceinline__ void weigh_pages(const unsigned char* sketches, const float* queries, float* weights, int pages,
                                            int held, int rows) {
  const int lane = threadIdx.x % 32, page = blockIdx.x * 4 + threadIdx.x / 32, head = blockIdx.y;
  if (page >= pages) return;
  const unsigned char* at = sketches + ((size_t)head * held + page) * (C * 34 + DIM + 2);
  float low[C], high[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const float scale = half_bits(((const u16*)(at + C * 32))[c]) * 1.44269504f;
    const u32 codes = at[c * 32 + lane];
    low[c] = ((float)(codes & 15) - 7.5f) * scale, high[c] = ((float)(codes >> 4) - 7.5f) * scale;
  }
  constexpr int STEPS = (DIM + 31) / 32;
  float mean[STEPS];
  const float width = half_bits(*(const u16*)(at + C * 34 + DIM)) * 1.44269504f;
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    const int d = 32 * i + lane;
    mean[i] = d < DIM ? (float)(signed char)at[C * 34 + d] * width : 0.f;
  }
  for (int r = 0; r < rows; ++r) {
    const float* q = queries + ((size_t)head * rows + r) * (C + DIM);
    float a = 0.f, b = 0.f, rest = 0.f;
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
      if (32 * i + lane < DIM) rest += q[C + 32 * i + lane] * mean[i];
#pragma unroll
    for (int c = 0; c < C; ++c) a += q[c] * low[c], b += q[c] * high[c];
    float most = fmaxf(a, b);
#pragma unroll
    for (int s = 1; s < 32; s *= 2) most = fmaxf(most, shuffle_xor(most, s));
    float sum = exp2_fast(a - most) + exp2_fast(b - most);
#pragma unroll
    for (int s = 1; s < 32; s *= 2) sum += shuffle_xor(sum, s), rest += shuffle_xor(rest, s);
    if (lane == 0) weights[((size_t)head * rows + r) * pages + page] = most + log2f(sum) + rest;
  }
}

// Reductions over a block of T threads: every thread gets the result.
template <int T, class Op>
__device__ __forceinline__ float over_block(float x, float* scratch, Op op) {
#pragma unroll
  for (int s = 1; s < 32; s *= 2) x = op(x, shuffle_xor(x, s));
  sync_block();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  sync_block();
  float y = scratch[0];
  for (int i = 1; i < T / 32; ++i) y = op(y, scratch[i]);
  return y;
}

struct Largest {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// Of one number per thread, the sum over the threads before; `all` is the sum over all.
template <int T>
__device__ __forceinline__ float before(float x, float* scratch, float& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = x;
#pragma unroll
  for (int s = 1; s < 32; s *= 2) {
    const float other = shuffle(sum, lane >= s ? lane - s : lane);
    if (lane >= s) sum += other;
  }
  sync_block();
  if (lane == 31) scratch[warp] = sum;
  sync_block();
  float ahead = 0.f;
  all = 0.f;
  for (int i = 0; i < T / 32; ++i) {
    if (i < warp) ahead += scratch[i];
    all += scratch[i];
  }
  return ahead + sum - x;
}

template <int T>
__device__ __forceinline__ void pick_pages(const float* weights, const int* packed, float* shares, int* list, int pages,
                                           int rows, int kv_heads, int count) {
  float* scratch = (float*)shared_memory();
  const int head = blockIdx.x, t = threadIdx.x, tokens = packed[head / kv_heads];
  const int whole = tokens / 64, all = (tokens + 63) / 64, need = count - 1;
  list += (size_t)head * count;
  float* share = shares + (size_t)head * pages;
  if (all <= count) {  // all of them; what follows is left alone, but must be a page
    for (int i = t; i < count; i += T) list[i] = i < all ? i : 0;
    return;
  }
  for (int p = t; p < pages; p += T) share[p] = 0.f;
  for (int r = 0; r < rows; ++r) {
    const float* w = weights + ((size_t)head * rows + r) * pages;
    float top = -1e30f, total = 0.f;
    for (int p = t; p < whole; p += T) top = fmaxf(top, w[p]);
    top = over_block<T>(top, scratch, Largest());
    for (int p = t; p < whole; p += T) total += exp2_fast(w[p] - top);
    total = over_block<T>(total, scratch, Sum());
    if (!(top < 1e30f && total > 0.f)) continue;  // a row that is not finite has no say
    for (int p = t; p < whole; p += T) share[p] += exp2_fast(w[p] - top) / total;
  }
  // Shares are not negative, so their bits are ordered as they are. The newest page, all - 1, is taken anyway.
  u32 low = 0, high = 0x7f800000u;
  while (need > 0 && high - low > 1) {
    const u32 middle = low + (high - low) / 2;
    const float cut = bits_to_float((int)middle);
    float above = 0.f;
    for (int p = t; p < all - 1; p += T) above += share[p] >= cut;
    if (over_block<T>(above, scratch, Sum()) >= need) low = middle;
    else high = middle;
  }
  const float cut = bits_to_float((int)low);
  const int each = (all - 1 + T - 1) / T, first = t * each, last = min(first + each, all - 1);
  float more = 0.f, ties = 0.f, all_more, all_ties;
  sync_block();  // shares of other threads from here on
  for (int p = first; p < last; ++p) more += share[p] > cut, ties += share[p] == cut;
  const int more_before = (int)before<T>(more, scratch, all_more), ties_before = (int)before<T>(ties, scratch, all_ties);
  const int room = need - (int)all_more;  // of those that tie, the first ones
  int taken = more_before + min(ties_before, room), tied = ties_before;
  for (int p = first; p < last && need > 0; ++p) {
    const bool tie = share[p] == cut;
    if (share[p] > cut || (tie && tied < room)) list[taken++] = p;
    tied += tie;
  }
  if (t == 0) list[need] = all - 1;
}

}  // namespace opentq
