// One threadgroup at a time on one CPU thread: every lane is a fiber that runs until it needs the others.
//
// A lane stops at SIMD collectives and barriers; a collective completes when all 32 lanes of the simdgroup stand at the
// same call, which is also how divergence is found. Instrumented code reports every access to device, constant and
// threadgroup memory before it happens: bounds, alignment, initialisation and races are judged here, bytes are counted.
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unordered_map>
#include <vector>

typedef uint64_t u64;
typedef uint32_t u32;

namespace {

constexpr int SIMD = 32, MAX_THREADS = 1024, STACK = 128 << 10;
constexpr u64 GAP = 1 << 20, TG_LIMIT = 32768;

enum State { READY, COLLECTIVE, BARRIER, DONE };
enum Kind { REDUCE, SHUFFLE, VOTE, MMA, SIMD_BARRIER };

struct Lane {
  void* sp;
  char* stack;
  State state;
  const void* site;
  int kind, op, type;
  u64 in, fill, out;
  u32 by;
  float m[6];
  u32 pos[3];
};

struct Region {  // one device or constant buffer
  char* base;
  u64 bytes;
  bool output;
  std::vector<uint8_t> touched;
  std::vector<u64> writer;  // threadgroup << 32 | barrier epoch << 12 | thread + 1
  u64 lane_read, simd_read, lane_write;
};

struct Cell {  // shadow of two bytes of threadgroup memory
  u32 w_epoch, w_simd, r_epoch, r_simd;
  uint16_t w_thread, r_thread;
  uint8_t readers;  // 0 none, 1 one thread, 2 one simdgroup, 3 several
};

struct Block {  // one threadgroup array
  char* base;
  u64 bytes, cell, born;
  const char* name;
};

Lane lanes[MAX_THREADS];
void* scheduler_sp;
int current, n_threads, lane_order;
bool failed;
char message[1024];
char where[256];
std::vector<Region> regions;
std::vector<Block> blocks;
std::vector<Cell> cells;
u32 epoch, tg_first_epoch, simd_epoch[MAX_THREADS / SIMD];
u64 tg_bytes, tg_serial;
u32 tg_pos[3], tg_size[3], tg_count[3], grid[3], tg_shape[3];
void (*entry)(void**);
void** entry_args;
struct {
  u64 threads, threadgroups, barriers, simd_barriers, reduces, shuffles, mma, tg_read, tg_write, tg_peak, const_read;
} counts;

extern "C" void msl_swap(void** save, void* load);
asm(R"(
.text
.globl msl_swap
.type msl_swap,@function
msl_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void to_scheduler() { msl_swap(&lanes[current].sp, scheduler_sp); }

void describe() {
  const Lane& l = lanes[current];
  snprintf(where, sizeof where, "threadgroup (%u,%u,%u) thread (%u,%u,%u) simdgroup %d lane %d", tg_pos[0], tg_pos[1],
           tg_pos[2], l.pos[0], l.pos[1], l.pos[2], current / SIMD, current % SIMD);
}

void set_failure(const char* format, va_list args) {
  if (failed) return;
  failed = true;
  int n = vsnprintf(message, sizeof message, format, args);
  snprintf(message + n, sizeof message - n, "; %s", where);
}

void fail_here(const char* format, ...) {  // from the scheduler
  va_list args;
  va_start(args, format);
  set_failure(format, args);
  va_end(args);
}

[[noreturn]] void fail(const char* format, ...) {  // from a lane, which never runs again
  describe();
  va_list args;
  va_start(args, format);
  set_failure(format, args);
  va_end(args);
  to_scheduler();
  abort();
}

void lane_main() {
  entry(entry_args);
  lanes[current].state = DONE;
  to_scheduler();
  abort();
}

#include "collectives.h"
#include "memory.h"

// ---- one threadgroup --------------------------------------------------------------------------------------------------

void start_lane(int i) {
  Lane& l = lanes[i];
  if (!l.stack) l.stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  void** sp = (void**)(l.stack + STACK - 64);
  *--sp = nullptr;  // keeps the stack 16-byte aligned at lane_main's entry
  *--sp = (void*)lane_main;
  for (int k = 0; k < 6; k++) *--sp = nullptr;
  l.sp = sp;
  l.state = READY;
}

void run_threadgroup() {
  tg_serial++, epoch++, tg_first_epoch = epoch;
  tg_bytes = 0;
  for (auto& f : fetches) f.clear();
  for (int i = 0; i < n_threads; i++) {
    start_lane(i);
    lanes[i].pos[0] = i % tg_size[0], lanes[i].pos[1] = i / tg_size[0] % tg_size[1];
    lanes[i].pos[2] = i / (tg_size[0] * tg_size[1]);
  }
  int simdgroups = (n_threads + SIMD - 1) / SIMD;
  for (;;) {
    for (int s = 0; s < simdgroups; s++) {
      int sg = lane_order & 1 ? simdgroups - 1 - s : s;
      int first = sg * SIMD, n = n_threads - first < SIMD ? n_threads - first : SIMD;
      for (;;) {
        bool ran = false;
        for (int k = 0; k < n; k++) {
          int i = first + (lane_order & 2 ? n - 1 - k : k);
          if (lanes[i].state != READY) continue;
          current = i, ran = true;
          msl_swap(&scheduler_sp, lanes[i].sp);
          if (failed) return;
        }
        if (ran) continue;
        bool waits = false;
        for (int k = 0; k < n; k++) waits |= lanes[first + k].state == COLLECTIVE;
        if (!waits) break;
        if (!complete_collective(first, n)) return;
      }
    }
    int done = 0;
    for (int i = 0; i < n_threads; i++) done += lanes[i].state == DONE;
    if (done == n_threads) return;
    for (int i = 0; i < n_threads; i++) {
      current = i;
      describe();
      if (lanes[i].state == DONE) return fail_here("this thread finished while others wait at a threadgroup_barrier");
      if (lanes[i].site != lanes[0].site) return fail_here("this thread is at another threadgroup_barrier than thread 0");
    }
    counts.barriers++;
    if (lanes[0].op & 3) epoch++;
    for (int i = 0; i < n_threads; i++) lanes[i].state = READY;
  }
}

}  // namespace

#define SITE __builtin_return_address(0)
#define API extern "C" __attribute__((noinline, visibility("default")))

API u64 msl_reduce(u64 bits, int op, int type) {
  Lane& l = lanes[current];
  l.in = bits, l.op = op, l.type = type;
  collective(REDUCE, SITE);
  return l.out;
}
API u64 msl_shuffle(u64 bits, int kind, u32 by, u64 fill) {
  Lane& l = lanes[current];
  l.in = bits, l.op = kind, l.by = by, l.fill = fill;
  collective(SHUFFLE, SITE);
  return l.out;
}
API u64 msl_vote(bool value) {
  Lane& l = lanes[current];
  l.in = value;
  collective(VOTE, SITE);
  return l.out;
}
struct msl_pair { float x, y; };
static msl_pair multiply(const float (&m)[6], const void* site) {
  Lane& l = lanes[current];
  memcpy(l.m, m, sizeof m);
  collective(MMA, site);
  return {l.m[0], l.m[1]};
}
API msl_pair msl_mma(float a0, float a1, float b0, float b1, float c0, float c1) {
  return multiply({a0, a1, b0, b1, c0, c1}, SITE);
}
API msl_pair msl_mma_half(_Float16 a0, _Float16 a1, _Float16 b0, _Float16 b1, float c0, float c1) {
  return multiply({float(a0), float(a1), float(b0), float(b1), c0, c1}, SITE);
}
API void msl_simd_barrier(int flags) {
  lanes[current].op = flags;
  collective(SIMD_BARRIER, SITE);
}
API void msl_barrier(int flags) {
  Lane& l = lanes[current];
  l.op = flags, l.site = SITE, l.state = BARRIER;
  to_scheduler();
}
API u32 msl_matrix_lane() {
  int r, c;
  matrix_at(current % SIMD, r, c);
  return u32(r) << 8 | u32(c);
}

API void msl_declare(const volatile void* data, u64 bytes, const char* name) {
  for (auto& b : blocks)
    if (b.base == (char*)data) {
      if (b.born == tg_serial) return;
      b.born = tg_serial;
      tg_bytes += (bytes + 15) & ~15ull;
      goto check;
    }
  blocks.push_back({(char*)data, bytes, cells.size(), tg_serial, name});
  cells.resize(cells.size() + (bytes + 1) / 2);
  tg_bytes += (bytes + 15) & ~15ull;
check:
  if (tg_bytes > counts.tg_peak) counts.tg_peak = tg_bytes;
  if (tg_bytes > TG_LIMIT) fail("threadgroup memory: %lu bytes are declared, the limit is 32768", tg_bytes);
}

API u64 msl_attribute(int which, int axis) {
  const Lane& l = lanes[current];
  switch (which) {
    case 0: return l.pos[axis] + u64(tg_pos[axis]) * tg_shape[axis];  // thread_position_in_grid
    case 1: return tg_pos[axis];
    case 2: return l.pos[axis];
    case 3: return tg_size[axis];
    case 4: return tg_count[axis];
    case 5: return grid[axis];
    case 6: return current % SIMD;
    case 7: return current / SIMD;
    case 8: return (n_threads + SIMD - 1) / SIMD;
    case 9: return SIMD;
    case 10: return current;
    case 11: return current / 4;
    case 12: return current % 4;
    case 13: return tg_shape[axis];  // dispatch_threads_per_threadgroup
  }
  return 0;
}

API void msl_read_device(const char* p, u32 bytes, u32 align, u32 site) { device_access(p, bytes, align, site, false); }
API void msl_write_device(const char* p, u32 bytes, u32 align, u32 site) { device_access(p, bytes, align, site, true); }
API void msl_read_constant(const char* p, u32 bytes, u32 align, u32 site) {
  counts.const_read += bytes;
  if (find(p)) device_access(p, bytes, align, site, false);  // else a table of the program itself
}
API void msl_read_threadgroup(const char* p, u32 bytes, u32 align, u32) { tg_access(p, bytes, align, false); }
API void msl_write_threadgroup(const char* p, u32 bytes, u32 align, u32) { tg_access(p, bytes, align, true); }

#define MATH(f, e) API float msl_##f(float x) { return e; }
MATH(exp, expf(x)) MATH(exp2, exp2f(x)) MATH(exp10, powf(10, x)) MATH(log, logf(x)) MATH(log2, log2f(x))
MATH(log10, log10f(x)) MATH(sqrt, sqrtf(x)) MATH(rsqrt, 1 / sqrtf(x)) MATH(sin, sinf(x)) MATH(cos, cosf(x)) MATH(tan, tanf(x))
MATH(sinh, sinhf(x)) MATH(cosh, coshf(x)) MATH(tanh, tanhf(x)) MATH(asin, asinf(x)) MATH(acos, acosf(x)) MATH(atan, atanf(x))
MATH(asinh, asinhf(x)) MATH(acosh, acoshf(x)) MATH(atanh, atanhf(x)) MATH(sinpi, sinf(float(M_PI) * x))
MATH(cospi, cosf(float(M_PI) * x)) MATH(tanpi, tanf(float(M_PI) * x))
API float msl_pow(float x, float y) { return powf(x, y); }
API float msl_powr(float x, float y) { return powf(x, y); }
API float msl_atan2(float x, float y) { return atan2f(x, y); }
API float msl_fmod(float x, float y) { return fmodf(x, y); }
API float msl_nextafter(float x, float y) { return nextafterf(x, y); }
API float msl_divide(float x, float y) { return x / y; }
API float msl_ldexp(float x, int k) { return ldexpf(x, k); }

// The compiler's own helper for float to bfloat16, to nearest even.
API __bf16 __truncsfbf2(float x) {
  u32 u;
  memcpy(&u, &x, 4);
  uint16_t b = (u & 0x7fffffff) > 0x7f800000 ? uint16_t(u >> 16 | 64) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  return __builtin_bit_cast(__bf16, b);
}

// ---- what Python calls ------------------------------------------------------------------------------------------------

// Buffers are copied to addresses of their own with unmapped gaps between them. Returns 0, or 1 with the failure's text.
API int msl_run(void (*kernel)(void**), int n, void** data, const u64* bytes, const int* output, const u32* threads,
                const u32* tg, int order, char* error, int error_size, u64* buffer_counts, u64* total_counts) {
  failed = false, message[0] = where[0] = 0, lane_order = order;
  memset(&counts, 0, sizeof counts);
  blocks.clear(), cells.clear(), regions.clear();
  fetches.assign(MAX_THREADS / SIMD, {});
  std::vector<void*> args(n);
  std::vector<std::pair<void*, u64>> maps;
  for (int i = 0; i < n; i++) {
    if (!data[i]) { args[i] = nullptr; regions.push_back({(char*)16, 0, false}); continue; }
    u64 size = (bytes[i] + GAP * 2 + 4095) & ~4095ull;
    char* m = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    maps.push_back({m, size});
    char* base = m + GAP;
    memcpy(base, data[i], bytes[i]);
    Region r{base, bytes[i], output[i] != 0};
    r.touched.resize(bytes[i]);
    if (r.output) r.writer.resize(bytes[i]);
    regions.push_back(std::move(r));
    args[i] = base;
  }
  entry = kernel, entry_args = args.data();
  for (int a = 0; a < 3; a++) {
    grid[a] = threads[a], tg_shape[a] = tg[a] < threads[a] ? tg[a] : threads[a];
    tg_count[a] = (threads[a] + tg_shape[a] - 1) / tg_shape[a];
  }
  for (u32 z = 0; z < tg_count[2] && !failed; z++)
    for (u32 y = 0; y < tg_count[1] && !failed; y++)
      for (u32 x = 0; x < tg_count[0] && !failed; x++) {
        u32 at[3] = {x, y, z};
        for (int a = 0; a < 3; a++) {  // dispatchThreads: the last threadgroup of an axis may be smaller
          tg_pos[a] = at[a];
          u32 left = grid[a] - at[a] * tg_shape[a];
          tg_size[a] = left < tg_shape[a] ? left : tg_shape[a];
        }
        n_threads = tg_size[0] * tg_size[1] * tg_size[2];
        if (n_threads > MAX_THREADS) {
          fail_here("a threadgroup of %d threads; the limit is 1024", n_threads);
          break;
        }
        counts.threads += n_threads, counts.threadgroups++;
        run_threadgroup();
      }
  for (int i = 0; i < n; i++) {
    u64 unique = 0, unwritten = 0;
    for (uint8_t t : regions[i].touched) unique += t;
    if (regions[i].output) {
      for (u64 w : regions[i].writer) unwritten += w == 0;
      memcpy(data[i], regions[i].base, bytes[i]);
    }
    u64 row[5] = {unique, regions[i].simd_read, regions[i].lane_read, regions[i].lane_write, unwritten};
    memcpy(buffer_counts + 5 * i, row, sizeof row);
  }
  memcpy(total_counts, &counts, sizeof counts);
  for (auto& m : maps) munmap(m.first, m.second);
  snprintf(error, error_size, "%s", message);
  return failed;
}
