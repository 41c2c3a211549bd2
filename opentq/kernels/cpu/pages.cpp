// Which pages a decode step reads: scores of all tokens from their sketches, the largest per page, the softmax's share of
// these, the pages with the most. Where packed keys are given, these pages are candidates: attend.cpp weighs them by
// their keys, and the heaviest of them are read.
//
// A page of sketches is C channels of 32 bytes (byte j: the 4-bit codes of tokens j and j + 32) and C fp16 scales; a code
// stands for (code - 7.5) * scale; then the mean key of the page, D signed bytes and a scale (attention/pages.py). A task
// is 64 pages of a KV head: every page is opened once, and leaves the largest score for every query row of the head;
// whoever finishes a head's last task adds up its rows' shares and picks. Bytes moved: all sketches once, from memory. The
// arithmetic, a multiply-add per channel, token and row, is what it costs: so several rows are done at a time, a page's
// scales go into the queries, and its codes are only made floats.
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "pool.h"
#include "state.h"

namespace otq {

constexpr int PAGE = 64;
constexpr int64_t PAGES_PER_TASK = 64;
constexpr int MAX_CHANNELS = 64, MAX_DIM = 1024;
constexpr float CENTRE = 7.5f;  // of the codes

static int64_t pages_of(int64_t tokens) { return (tokens + PAGE - 1) / PAGE; }

// The `count` pages of most weight of one head, ascending, the newest among them: of equal ones the first. weights [rows],
// `stride` numbers apart and of these up to W - 1 more than there are whole pages, times `unit` in units of log2.
static void pick(const float* weights, int64_t rows, int64_t stride, float unit, int64_t packed, int64_t count, int32_t* out) {
  const int64_t whole = packed / PAGE, pages = pages_of(packed);
  if (pages <= count) {  // all of them; what follows is left alone, but must be a page
    for (int64_t i = 0; i < count; i++) out[i] = int32_t(i < pages ? i : 0);
    return;
  }
  const size_t room = size_t(pages + W);
  std::vector<float> share(room, 0.f), part(room, 0.f);
  for (int64_t r = 0; r < rows; r++, weights += stride) {
    const float top = *std::max_element(weights, weights + whole);
    if (!(std::fabs(top) < 1e30f)) continue;  // a row that is not finite has no say
    F sums = set1(0.f);
    for (int64_t p = 0; p < whole; p += W) {
      store(part.data() + p, exp2(min(mul(sub(load(weights + p), set1(top)), set1(unit)), set1(0.f))));
    }
    std::fill(part.begin() + whole, part.end(), 0.f);
    for (int64_t p = 0; p < whole; p += W) sums = add(sums, load(part.data() + p));
    const float total = hsum(sums);
    if (!(total < 1e30f)) continue;
    const F factor = set1(1 / total);
    for (int64_t p = 0; p < whole; p += W) {
      store(share.data() + p, fma(load(part.data() + p), factor, load(share.data() + p)));
    }
  }
  const int64_t others = count - 1;
  std::copy_n(share.begin(), pages - 1, part.begin());
  float least = INFINITY;
  if (others) {
    std::nth_element(part.begin(), part.begin() + (others - 1), part.begin() + (pages - 1), std::greater<>());
    least = part[size_t(others - 1)];
  }
  const auto more = [&](float x) { return x > least; };
  int64_t equal = others - std::count_if(share.begin(), share.begin() + (pages - 1), more);
  for (int64_t p = 0; p < pages - 1; p++) {
    if (share[size_t(p)] > least || (share[size_t(p)] == least && equal-- > 0)) *out++ = int32_t(p);
  }
  *out = int32_t(pages - 1);
}

// The choice by sketches: `count` pages of every head.
class Choice {
 public:
  Choice(const PageCall& call, int64_t count, int32_t* out) : c_(call), count_(count), out_(out) {
    for (int64_t b = 0; b < c_.batch; b++) longest_ = std::max<int64_t>(longest_, c_.packed[b] / PAGE);
    heads_ = c_.batch * c_.kv_heads, tasks_ = std::max<int64_t>(1, (longest_ + PAGES_PER_TASK - 1) / PAGES_PER_TASK);
    stride_ = (longest_ + 15) / 16 * 16, dim_ = (c_.dim + 15) / 16 * 16;
    const size_t rows = size_t(heads_ * c_.rows);
    arena_.reset(4 * rows * size_t(stride_ + dim_ + c_.channels) + 3 * 64);
    weights_ = arena_.take<float>(rows * size_t(stride_)), whole_ = arena_.take<float>(rows * size_t(dim_));
    few_ = arena_.take<float>(rows * size_t(c_.channels));
    left_.reset(new std::atomic<int64_t>[size_t(heads_)]);
    for (int64_t i = 0; i < heads_; i++) left_[size_t(i)] = tasks_;
    const float* q = c_.queries;
    for (size_t r = 0; r < rows; r++) {
      float *few = few_ + r * size_t(c_.channels), *whole = whole_ + r * size_t(dim_);
      for (int64_t c = 0; c < c_.channels; c++) few[c] = *q++ * LOG2E;
      for (int64_t d = 0; d < c_.dim; d++) whole[d] = *q++ * LOG2E;
      std::fill(whole + c_.dim, whole + dim_, 0.f);
    }
  }

  void run() {
    Pool::get().run(int(heads_ * tasks_), c_.threads, [&](int i) {
      const int64_t head = i / tasks_, packed = c_.packed[head / c_.kv_heads];
      weigh(head, i % tasks_ * PAGES_PER_TASK);
      if (left_[size_t(head)].fetch_sub(1) != 1) return;
      pick(weights_ + head * c_.rows * stride_, c_.rows, stride_, 1.f, packed, count_, out_ + head * count_);
    });
  }

 private:
  const PageCall& c_;
  const int64_t count_;
  int32_t* const out_;
  int64_t longest_ = 0, heads_, tasks_, stride_, dim_;
  Arena arena_;
  float* weights_;  // [B * Hkv][rows][stride_], in units of log2
  float* whole_;    // [B * Hkv][rows][dim_]: the queries, in the same units
  float* few_;      // [B * Hkv][rows][channels]: their chosen channels
  std::unique_ptr<std::atomic<int64_t>[]> left_;

  void weigh(int64_t head, int64_t first) const {
    const int64_t b = head / c_.kv_heads, last = std::min<int64_t>(first + PAGES_PER_TASK, c_.packed[b] / PAGE);
    alignas(64) float x[MAX_CHANNELS * PAGE], scale[MAX_CHANNELS], mean[MAX_DIM];
    const uint8_t* page = c_.sketches + b * c_.batch_stride + head % c_.kv_heads * c_.head_stride + first * c_.page_stride;
    for (int64_t p = first; p < last; p++, page += c_.page_stride) {
      open(page, x, scale, mean);
      int64_t r = 0;
      for (; r + 4 <= c_.rows; r += 4) weigh_rows<4>(head * c_.rows + r, p, x, scale, mean);
      for (; r < c_.rows; r++) weigh_rows<1>(head * c_.rows + r, p, x, scale, mean);
    }
  }

  template <int NR>
  INLINE void weigh_rows(int64_t row, int64_t page, const float* x, const float* scale, const float* mean) const {
    const float* few = few_ + row * c_.channels;
    float factor[NR][MAX_CHANNELS], centre[NR] = {};
    for (int64_t c = 0; c < c_.channels; c++)
      UNROLL for (int r = 0; r < NR; r++) factor[r][c] = few[r * c_.channels + c] * scale[c], centre[r] += factor[r][c];
    F most[NR], sum[NR][2];
    UNROLL for (int r = 0; r < NR; r++) most[r] = set1(-INFINITY), sum[r][0] = sum[r][1] = set1(0.f);
    for (int token = 0; token < PAGE; token += 2 * W) {
      F s[NR][2];
      UNROLL for (int r = 0; r < NR; r++) s[r][0] = s[r][1] = set1(0.f);
      for (int64_t c = 0; c < c_.channels; c++) {
        F y[2];
        UNROLL for (int j = 0; j < 2; j++) y[j] = load(x + c * PAGE + token + W * j), stay(y[j]);
        UNROLL for (int r = 0; r < NR; r++) {
          const F f = set1(factor[r][c]);
          UNROLL for (int j = 0; j < 2; j++) s[r][j] = fma(f, y[j], s[r][j]);
        }
      }
      UNROLL for (int r = 0; r < NR; r++) most[r] = max(most[r], max(s[r][0], s[r][1]));
    }
    const float* whole = whole_ + row * dim_;
    for (int64_t d = 0; d < dim_; d += 16) {
      UNROLL for (int j = 0; j < 16 / W; j++) {
        F y = load(mean + d + W * j);
        stay(y);
        UNROLL for (int r = 0; r < NR; r++) sum[r][j % 2] = fma(load(whole + r * dim_ + d + W * j), y, sum[r][j % 2]);
      }
    }
    UNROLL for (int r = 0; r < NR; r++) {
      weights_[(row + r) * stride_ + page] = hmax(most[r]) - CENTRE * centre[r] + hsum(add(sum[r][0], sum[r][1]));
    }
  }

  // A page's codes [channels][PAGE] and their scales, and its mean key [dim_], as floats.
  void open(const uint8_t* page, float* x, float* scale, float* mean) const {
    const uint8_t *scales = page + c_.channels * (PAGE / 2), *rest = scales + 2 * c_.channels;
    for (int64_t c = 0; c < c_.channels; c++, page += PAGE / 2, x += PAGE) {
      for (int t = 0; t < PAGE / 2; t += W) {
        const I both = iload_signed(page + t);
        store(x + t, to_float(iand(both, iset32(15))));
        store(x + t + PAGE / 2, to_float(iand(shr32(both, 4), iset32(15))));
      }
    }
    alignas(64) uint16_t halves[MAX_CHANNELS] = {};
    std::memcpy(halves, scales, size_t(2 * c_.channels));
    for (int64_t c = 0; c < c_.channels; c += W) store(scale + c, load_half(halves + c));
    uint16_t unit;
    std::memcpy(&unit, rest + c_.dim, 2);
    const F width = set1(half_to_float(unit));
    for (int64_t d = 0; d < dim_; d += 16, rest += 16) {
      uint8_t end[16] = {};
      const bool inside = d + 16 <= c_.dim;
      if (!inside) std::memcpy(end, rest, size_t(c_.dim - d));
      for (int j = 0; j < 16; j += W) store(mean + d + j, mul(to_float(iload_signed((inside ? rest : end) + j)), width));
    }
  }
};

// The choice by keys among candidates, or of all pages.
static void choose_by_keys(const PageCall& c, const int32_t* candidates) {
  int64_t longest = 0;
  for (int64_t b = 0; b < c.batch; b++) longest = std::max(longest, pages_of(c.packed[b]));
  Call keys = *c.keys;
  const int64_t many = keys.page_count = candidates ? c.many : longest, heads = c.batch * c.kv_heads, rows = keys.gqa * keys.length;
  const std::unique_ptr<float[]> weights(new float[size_t(heads * rows * many + W)]);
  keys.pages = candidates, keys.weights = weights.get();
  if (opentq_attend(&keys)) throw std::bad_alloc();
  Pool::get().run(int(heads), c.threads, [&](int i) {
    const int64_t packed = c.packed[i / c.kv_heads], there = packed - PAGE * std::max<int64_t>(pages_of(packed) - many, 0);
    int32_t* out = c.out + i * c.count;
    pick(weights.get() + i * rows * many, rows, many, LOG2E, there, c.count, out);
    if (!candidates) return;
    for (int64_t n = 0; n < c.count; n++) out[n] = candidates[i * many + out[n]];
  });
}

}  // namespace otq

EXPORT int opentq_pages(const otq::PageCall* call) {
  try {
    if (call->channels > otq::MAX_CHANNELS || call->dim > otq::MAX_DIM) return 1;
    if (!call->keys) {
      otq::Choice(*call, call->count, call->out).run();
      return 0;
    }
    std::vector<int32_t> candidates(size_t(call->sketches ? call->batch * call->kv_heads * call->many : 0));
    if (call->sketches) otq::Choice(*call, call->many, candidates.data()).run();
    otq::choose_by_keys(*call, call->sketches ? candidates.data() : nullptr);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
EXPORT int64_t opentq_page_call_bytes() { return sizeof(otq::PageCall); }
