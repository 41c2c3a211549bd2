// A warp emulator: stands in for opentq/kernels/warp.cuh, so that CUDA kernels run on a machine without a GPU.
//
// Every CUDA thread of a block is a fiber. Warp-wide operations (mma, shuffles, votes, transposes) gather one operand
// from each lane, compute all 32 results when the last lane arrives, and let the lanes go on; barriers do the same for
// a block. Blocks run one after the other. Fragment layouts are written out here from the PTX manual, independently of
// the kernels. Slow (microseconds per warp operation) and meant for small shapes.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __restrict__ __restrict

using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Dim3 { int x = 1, y = 1, z = 1; };
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline Dim3 threadIdx, blockIdx, gridDim;

namespace emulate {

struct Meeting {  // one rendezvous of `size` fibers
  int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline int current, block_threads;
inline std::vector<Meeting> warps;
inline Meeting block_meeting;
inline std::vector<uint64_t> slots;  // per thread: operand of 8 words
inline std::vector<unsigned char> shared;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); threadIdx.x = current; }

inline void meet(Meeting& m, int size, const std::function<void()>& last) {
  const int generation = m.generation;
  if (++m.arrived == size) {
    last();
    m.arrived = 0;
    ++m.generation;
    return;
  }
  while (m.generation == generation) yield();
}

// Every lane gives `n` words; `compute(all)` sees words [lane][8] of the warp and may overwrite them as results.
inline void collective(uint32_t* words, int n, const std::function<void(uint32_t (*)[8])>& compute) {
  const int warp = current / 32;
  auto* all = reinterpret_cast<uint32_t*>(slots.data()) + warp * 32 * 16;
  auto* in = reinterpret_cast<uint32_t(*)[8]>(all);
  auto* out = reinterpret_cast<uint32_t(*)[8]>(all + 32 * 8);
  const int lane = current % 32;
  std::memcpy(in[lane], words, 4 * n);
  meet(warps[warp], 32, [&] {
    compute(in);
    std::memcpy(out, in, 32 * 8 * 4);
  });
  // Lanes leave one by one while others may already bring their next operands: results lie in their own array, and the
  // next meeting can't complete before this lane has taken its own.
  std::memcpy(words, out[lane], 4 * n);
}

inline void entry() {
  threadIdx.x = current;
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void launch(Dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  body = kernel;
  block_threads = threads;
  fibers.resize(threads);
  warps.assign(threads / 32, {});
  slots.assign(threads * 8, 0);
  gridDim = grid;
  for (int z = 0; z < grid.z; ++z)
    for (int y = 0; y < grid.y; ++y)
      for (int x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        shared.assign(shared_bytes + 128, 0xff);  // poison: NaNs
        block_meeting = {};
        for (int i = 0; i < threads; ++i) {
          auto& f = fibers[i];
          f.stack.resize(256 << 10);
          f.done = false;
          getcontext(&f.context);
          f.context.uc_stack.ss_sp = f.stack.data();
          f.context.uc_stack.ss_size = f.stack.size();
          f.context.uc_link = &scheduler;
          makecontext(&f.context, entry, 0);
        }
        for (int left = threads; left > 0;) {
          left = 0;
          for (current = 0; current < threads; ++current)
            if (!fibers[current].done) {
              swapcontext(&scheduler, &fibers[current].context);
              left += !fibers[current].done;
            }
        }
      }
}

}  // namespace emulate

namespace opentq {

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct f16 { u16 bits; };
struct bf16 { u16 bits; };

inline float from_bits(u32 x) { float y; std::memcpy(&y, &x, 4); return y; }
inline u32 to_bits(float x) { u32 y; std::memcpy(&y, &x, 4); return y; }
inline float half_bits(u16 x) { _Float16 h; std::memcpy(&h, &x, 2); return (float)h; }
inline u16 to_half_bits(float x) { _Float16 h = (_Float16)x; u16 y; std::memcpy(&y, &h, 2); return y; }
inline float low_half(u32 x) { return half_bits(x & 0xffff); }
inline float high_half(u32 x) { return half_bits(x >> 16); }
inline u32 pack_half2(float lo, float hi) { return to_half_bits(lo) | (u32)to_half_bits(hi) << 16; }
inline u32 mul_half2(u32 a, u32 b) {
  return pack_half2(low_half(a) * low_half(b), high_half(a) * high_half(b));
}
inline u32 mul_rest_half2(u32 a, u32 b) {
  const u32 y = mul_half2(a, b);
  return pack_half2(low_half(a) * low_half(b) - low_half(y), high_half(a) * high_half(b) - high_half(y));
}
inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return half_bits(x.bits); }
inline float to_float(bf16 x) { return from_bits((u32)x.bits << 16); }
inline void assign(float& y, float x) { y = x; }
inline void assign(f16& y, float x) { y.bits = to_half_bits(x); }
inline void assign(bf16& y, float x) {
  const u32 b = to_bits(x);
  y.bits = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
inline u32 pack_pair(const f16*, float a, float b) {
  return pack_half2(std::clamp(a, -65504.f, 65504.f), std::clamp(b, -65504.f, 65504.f));
}
inline u32 pack_pair(const bf16*, float a, float b) {
  bf16 x, y;
  assign(x, a), assign(y, b);
  return x.bits | (u32)y.bits << 16;
}
inline float bits_to_float(int x) { return from_bits(x); }
inline u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 y = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 s = selector >> (4 * i) & 15, byte = bytes >> (8 * (s & 7)) & 255;
    y |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return y;
}
inline u32 upper_half(u32 x) { return x >> 16 | (x & 0xffff0000u); }
inline float exp2_fast(float x) { return std::exp2(x); }

inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  // A and B are gathered, products come back, and C never leaves its lane.
  u32 w[8] = {a[0], a[1], a[2], a[3], b0, b1, 0, 0};
  emulate::collective(w, 8, [](u32 (*x)[8]) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h)
          A[g + 8 * (r % 2)][2 * t + h + 8 * (r / 2)] = half_bits(x[lane][r] >> (16 * h));
      for (int r = 0; r < 2; ++r)
        for (int h = 0; h < 2; ++h) B[2 * t + h + 8 * r][g] = half_bits(x[lane][4 + r] >> (16 * h));
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += A[g + 8 * (i / 2)][k] * B[k][2 * t + i % 2];
        x[lane][i] = to_bits(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] += from_bits(w[i]);
}
inline u32 transpose8x8(u32 v) {
  u32 w[1] = {v};
  emulate::collective(w, 1, [](u32 (*x)[8]) {
    u16 m[8][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int h = 0; h < 2; ++h) m[lane / 4][2 * (lane % 4) + h] = x[lane][0] >> (16 * h);
    for (int lane = 0; lane < 32; ++lane)
      x[lane][0] = m[2 * (lane % 4)][lane / 4] | (u32)m[2 * (lane % 4) + 1][lane / 4] << 16;
  });
  return w[0];
}
inline float shuffle_xor(float v, int mask) {
  u32 w[1] = {to_bits(v)};
  emulate::collective(w, 1, [mask](u32 (*x)[8]) {
    u32 old[32];
    for (int i = 0; i < 32; ++i) old[i] = x[i][0];
    for (int i = 0; i < 32; ++i) x[i][0] = old[i ^ mask];
  });
  return from_bits(w[0]);
}
inline float shuffle(float v, int lane) {
  u32 w[2] = {to_bits(v), (u32)lane};
  emulate::collective(w, 2, [](u32 (*x)[8]) {
    u32 old[32];
    for (int i = 0; i < 32; ++i) old[i] = x[i][0];
    for (int i = 0; i < 32; ++i) x[i][0] = old[x[i][1] % 32];
  });
  return from_bits(w[0]);
}
inline int uniform(int x) { return x; }
inline bool any_lane(bool v) {
  u32 w[1] = {v};
  emulate::collective(w, 1, [](u32 (*x)[8]) {
    u32 any = 0;
    for (int i = 0; i < 32; ++i) any |= x[i][0];
    for (int i = 0; i < 32; ++i) x[i][0] = any;
  });
  return w[0];
}
inline void sync_warp() {
  u32 w[1] = {0};
  emulate::collective(w, 1, [](u32 (*)[8]) {});
}
inline void sync_block() { emulate::meet(emulate::block_meeting, emulate::block_threads, [] {}); }
inline unsigned char* shared_memory() {
  const auto at = reinterpret_cast<uintptr_t>(emulate::shared.data());
  return reinterpret_cast<unsigned char*>((at + 127) & ~uintptr_t(127));
}

// A bulk copy is done at once; a barrier counts the bytes that it waits for and its completed phases.
inline void barrier_init(u64* bar) { *bar = 0; }
inline void barrier_settle(u64* bar) {  // bits 0..31: bytes still to come, bit 32: announced, bits 33..: phase
  if ((*bar & 0xffffffffu) == 0 && (*bar >> 32 & 1)) *bar = ((*bar >> 33) + 1) << 33;
}
inline void barrier_expect(u64* bar, u32 bytes) { *bar += bytes | 1ull << 32; }
inline void bulk_copy(void* to, const void* from, u32 bytes, u64* bar) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    std::fprintf(stderr, "bulk copy is not 16-byte aligned\n");
    std::abort();
  }
  std::memcpy(to, from, bytes);
  *bar -= bytes;
  barrier_settle(bar);
}
inline void barrier_wait(u64* bar, u32 phase) {
  while ((*bar >> 33 & 1) == phase) emulate::yield();
}
inline bool arrive_last(u32* ticket, u32 count) {
  *ticket = *ticket == count - 1 ? 0 : *ticket + 1;
  return *ticket == 0;
}
inline void fence_bulk() {}
inline float4 load_global(const float4* p) { return *p; }
inline float2 load_global(const float2* p) { return *p; }

}  // namespace opentq
