// The few machine instructions that the CUDA kernels are built from, each behind one small function.
//
// Everything above this file is plain C++ over 32-bit words: `tests/cuda/emulate.hpp` replaces this file by a warp
// emulator, so that the same kernels run, slowly, on a machine without a GPU. No header is included, so that NVRTC
// needs no toolkit and little time.
//
// Fragments of mma.m16n8k16 (lane = 4 g + t, g = 0..7, t = 0..3; every register holds two halves):
//   A [16 x 16]: a0 = (row g, cols 2t,2t+1)  a1 = (row g+8, same cols)  a2 = (row g, cols 2t+8,+9)  a3 = (row g+8, ..)
//   B [16 x 8]:  b0 = (rows 2t,2t+1, col g)  b1 = (rows 2t+8,2t+9, col g)
//   C [16 x 8]:  c0,c1 = (row g, cols 2t,2t+1)  c2,c3 = (row g+8, same cols), fp32
namespace opentq {

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

// Two floats, rounded, as one register of two halves; and back.
__device__ __forceinline__ u32 pack_half2(float lo, float hi) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
__device__ __forceinline__ float half_bits(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ __forceinline__ u16 to_half_bits(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float low_half(u32 x) { return half_bits((u16)(x & 0xffffu)); }
__device__ __forceinline__ float high_half(u32 x) { return half_bits((u16)(x >> 16)); }
__device__ __forceinline__ u32 mul_half2(u32 a, u32 b) {
  u32 y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
// What `mul_half2` has rounded off.
__device__ __forceinline__ u32 mul_rest_half2(u32 a, u32 b) {
  u32 y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(mul_half2(a, b) ^ 0x80008000u));
  return y;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return half_bits(x.bits); }
__device__ __forceinline__ float to_float(bf16 x) { return __int_as_float((int)x.bits << 16); }
__device__ __forceinline__ void assign(float& y, float x) { y = x; }
__device__ __forceinline__ void assign(f16& y, float x) { y.bits = to_half_bits(x); }
__device__ __forceinline__ void assign(bf16& y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
// Two 16-bit numbers of type T as one register. Decoded values may be longer than fp16 reaches: they stop at its end.
__device__ __forceinline__ u32 pack_pair(const f16*, float a, float b) {
  return pack_half2(fminf(fmaxf(a, -65504.f), 65504.f), fminf(fmaxf(b, -65504.f), 65504.f));
}
__device__ __forceinline__ u32 pack_pair(const bf16*, float a, float b) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
  return y;
}

__device__ __forceinline__ float bits_to_float(int x) { return __int_as_float(x); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Byte i of the result is byte s of the eight bytes of (b, a), s = nibble i of `selector`; where the nibble's upper bit
// is set, it is that byte's upper bit eight times: 0 for a byte below 128.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
  return y;
}

// The upper sixteen bits in the place of the lower ones; no nibble has its upper bit set. A shift would do, but that pipe
// is the busiest; an fp16 product with one is exact for such bits, and moves them for nothing.
__device__ __forceinline__ u32 upper_half(u32 x) {
  u32 y;
  asm("{\n.reg .b16 lo, hi;\n.reg .b32 both;\nmov.b32 {lo, hi}, %1;\nmov.b32 both, {hi, hi};\n"
      "mul.rn.f16x2 %0, both, %2;\n}"
      : "=r"(y)
      : "r"(x), "r"(0x3c003c00u));
  return y;
}

// c += A B.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// An 8 x 8 matrix of halves, lane (g, t) holding (row g, cols 2t,2t+1), transposed.
__device__ __forceinline__ u32 transpose8x8(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
// `x` of lane 0, which the compiler then knows to be equal in the whole warp: what depends on it alone can't diverge.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
__device__ __forceinline__ bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char opentq_shared[];
  return opentq_shared;
}

// Bulk copies global -> shared: one lane asks for `bytes` (a multiple of 16, both ends 16-byte aligned), the copy
// engine moves them, and the barrier flips its phase when all bytes announced to it have arrived. No register is held
// meanwhile.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u64* bar) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(bar)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* bar, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra ready;\nbra again;\nready:\n}"
      ::"r"(shared_address(bar)), "r"(phase)
      : "memory");
}
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, u32 bytes, u64* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}

// After ordinary writes to shared memory that a later bulk copy overwrites.
__device__ __forceinline__ void fence_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Between blocks: what a block wrote before one of its threads arrives (behind a block barrier) is seen by the block
// that arrives last. The increment wraps to zero at the last arrival: the ticket is ready for its next use, nobody
// resets it.
__device__ __forceinline__ bool arrive_last(u32* ticket, u32 count) {
  u32 before;
  asm volatile("fence.acq_rel.gpu;\natom.relaxed.gpu.global.inc.u32 %0, [%1], %2;\nfence.acq_rel.gpu;"
               : "=r"(before)
               : "l"(ticket), "r"(count - 1)
               : "memory");
  return before == count - 1;
}
__device__ __forceinline__ float4 load_global(const float4* p) { return __ldcg(p); }
__device__ __forceinline__ float2 load_global(const float2* p) { return __ldcg(p); }

}  // namespace opentq
