// Which pages a decode step reads: scores of all tokens from their sketches, the largest per page, the softmax's share of
// these, the pages with the most. Where packed keys are given, these pages are candidates: attend.cpp weighs them by
// their keys, and the heaviest of them are read.
//
// A page of sketches is C channels of 32 bytes (byte j: the 4-bit codes of tokens j and j + 32) and C fp16 scales; a code
// stands for (code - 7.5) * scale; then the mean key of the page, D signed bytes and a scale (attention/pages.py). A task
// is 64 pages of a KV head: every page is opened once, and leaves the largest score for every query row of the head;
// whoever finishes a head's last task adds up its rows' shares and picks. Bytes moved: all sketches once, from memory. The
// arithmetic, a multiply-add per channel, token and row, is what it costs, so it is done in integers, two at a time: codes
// and means are some, a page's scales go into the queries' chosen channels, and queries become 15-bit integers of one step
// per row, of the chosen channels per row and page.
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
    float top = -INFINITY;
    F most = set1(top);
    int64_t last = 0;
    for (; last + W <= whole; last += W) most = max(load(weights + last), most);
    for (top = hmax(most); last < whole; last++) top = std::max(weights[last], top);
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
    stride_ = up(longest_, 16), dim_ = up(c_.dim, 2 * W), pairs_ = (c_.channels + 1) / 2, lanes_ = up(c_.rows, W);
    const auto rows = size_t(heads_ * c_.rows), few = size_t(heads_ * 2 * pairs_ * lanes_);
    arena_.reset(4 * (rows * size_t(stride_ + 1) + few) + 2 * rows * size_t(dim_) + 4 * 64);
    weights_ = arena_.take<float>(rows * size_t(stride_)), few_ = arena_.take<float>(few);
    whole_ = arena_.take<int16_t>(rows * size_t(dim_)), step_ = arena_.take<float>(rows);
    std::fill_n(few_, few, 0.f);
    left_.reset(new std::atomic<int64_t>[size_t(heads_)]);
    for (int64_t head = 0; head < heads_; head++) {
      left_[size_t(head)] = tasks_;
      for (int64_t r = 0; r < c_.rows; r++) read_query(head, r);
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
  // One page, opened: pairs of codes of a token, the channels' scales, and the mean key in units of `unit`.
  struct Page {
    alignas(64) int32_t codes[MAX_CHANNELS / 2 * PAGE];
    alignas(64) uint16_t halves[MAX_CHANNELS] = {};
    alignas(64) float scale[MAX_CHANNELS];
    alignas(64) int16_t mean[MAX_DIM];
    float unit;
  };
  // What every row's query makes of a page's codes: integers of one step, in pairs, and what to add for the centre of codes.
  struct Factors {
    alignas(64) int32_t words[MAX_CHANNELS / 2 * W];
    alignas(64) float step[W], zero[W];
  };

  const PageCall& c_;
  const int64_t count_;
  int32_t* const out_;
  int64_t longest_ = 0, heads_, tasks_, stride_, dim_, pairs_, lanes_;
  Arena arena_;
  float* weights_;  // [B * Hkv][rows][stride_], in units of log2
  float* few_;      // [B * Hkv][2 * pairs_][lanes_]: the queries' chosen channels, in the same units
  int16_t* whole_;  // [B * Hkv][rows][dim_]: all their channels, as integers
  float* step_;     // [B * Hkv][rows]: of these
  std::unique_ptr<std::atomic<int64_t>[]> left_;

  static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  void read_query(int64_t head, int64_t r) {
    const int64_t row = head * c_.rows + r;
    const float *few = c_.queries + row * (c_.channels + c_.dim), *whole = few + c_.channels;
    for (int64_t c = 0; c < c_.channels; c++) few_[(head * 2 * pairs_ + c) * lanes_ + r] = few[c] * LOG2E;
    float most = 1e-30f, all = 0;
    for (int64_t d = 0; d < c_.dim; d++) most = std::max(most, std::fabs(whole[d])), all += whole[d];
    const float levels = std::min(LEVELS, float(1 << 24) / float(c_.dim)), inverse = levels / most;  // sums fit 32 bits
    step_[row] = std::isfinite(all) ? LOG2E / inverse : NAN;
    int16_t* out = whole_ + row * dim_;
    for (int64_t d = 0; d < dim_; d++) out[d] = d < c_.dim && std::isfinite(all) ? int16_t(std::nearbyint(whole[d] * inverse)) : 0;
  }

  void weigh(int64_t head, int64_t first) const {
    const int64_t b = head / c_.kv_heads, last = std::min<int64_t>(first + PAGES_PER_TASK, c_.packed[b] / PAGE);
    const uint8_t* data = c_.sketches + b * c_.batch_stride + head % c_.kv_heads * c_.head_stride + first * c_.page_stride;
    Page page;
    Factors factors;
    for (int64_t p = first; p < last; p++, data += c_.page_stride) {
      open(data, page);
      for (int64_t lane = 0; lane < c_.rows; lane += W) {
        multiply(few_ + head * 2 * pairs_ * lanes_ + lane, page, factors);
        const int64_t row = head * c_.rows + lane, n = std::min<int64_t>(W, c_.rows - lane);
        if (pairs_ == 2) weigh_rows<2>(row, int(n), p, page, factors);
        else if (pairs_ == 3) weigh_rows<3>(row, int(n), p, page, factors);
        else weigh_rows<0>(row, int(n), p, page, factors);
      }
    }
  }

  void open(const uint8_t* data, Page& page) const {
    const uint8_t *scales = data + c_.channels * (PAGE / 2), *rest = scales + 2 * c_.channels;
    const I nibbles = iset32(0x000f000f);
    int32_t* out = page.codes;
    for (int64_t c = 0; c < c_.channels; c += 2, data += PAGE, out += PAGE) {
      const uint8_t* second = data + (c + 1 < c_.channels ? PAGE / 2 : 0);  // of a channel alone: times 0
      for (int t = 0; t < PAGE / 2; t += W) {
        const I both = ior(iand(iload_signed(data + t), iset32(255)), shl32_16(iload_signed(second + t)));
        istore(out + t, iand(both, nibbles)), istore(out + t + PAGE / 2, iand(shr(both, 4), nibbles));
      }
    }
    for (int64_t c = 0; c < c_.channels; c++) std::memcpy(page.halves + c, scales + 2 * c, 2);
    for (int64_t c = 0; c < c_.channels; c += W) store(page.scale + c, load_half(page.halves + c));
    for (int64_t d = 0; d < dim_; d += 2 * W, rest += 2 * W) {
      if (d + 2 * W <= c_.dim) {
        istore(page.mean + d, iload_words(rest));
        continue;
      }
      uint8_t end[2 * W] = {};
      std::memcpy(end, rest, size_t(c_.dim - d));
      istore(page.mean + d, iload_words(end));
    }
    uint16_t unit;
    std::memcpy(&unit, scales + 2 * c_.channels + c_.dim, 2);
    page.unit = half_to_float(unit);
  }

  // W rows, a lane each. What is not finite makes `zero`, and with it the weight, no number.
  void multiply(const float* few, const Page& page, Factors& out) const {
    F most = set1(1e-30f), zero = set1(0.f);
    for (int64_t c = 0; c < c_.channels; c++) {
      const F f = mul(load(few + c * lanes_), set1(page.scale[c]));
      zero = add(zero, f), most = max(max(f, sub(set1(0.f), f)), most);
    }
    const F inverse = div(set1(LEVELS), most);
    store(out.step, mul(most, set1(1 / LEVELS))), store(out.zero, mul(zero, set1(-7.5f)));
    for (int64_t p = 0; p < pairs_; p++) {
      const int64_t c = 2 * p;
      const I a = round_int(mul(mul(load(few + c * lanes_), set1(page.scale[c])), inverse));
      const I b = round_int(mul(mul(load(few + (c + 1) * lanes_), set1(page.scale[c + 1])), inverse));
      istore(out.words + p * W, ior(iand(a, iset32(0xffff)), shl32_16(b)));
    }
  }

  // `n` rows from lane 0 on. PAIRS: of channels, where they are the usual ones, so that what multiplies them stays in registers.
  template <int PAIRS> void weigh_rows(int64_t row, int n, int64_t p, const Page& page, const Factors& factors) const {
    int r = 0;
    for (; r + 4 <= n; r += 4) weigh_few<PAIRS, 4>(row + r, p, page, factors, r);
    for (; r < n; r++) weigh_few<PAIRS, 1>(row + r, p, page, factors, r);
  }

  template <int PAIRS, int NR> INLINE void weigh_few(int64_t row, int64_t p, const Page& page, const Factors& factors, int lane) const {
    I most[NR], sum[NR], f[PAIRS + 1][NR];
    UNROLL for (int r = 0; r < NR; r++) most[r] = iset32(INT32_MIN), sum[r] = izero();
    UNROLL for (int pair = 0; pair < PAIRS; pair++)
      UNROLL for (int r = 0; r < NR; r++) f[pair][r] = iset32(factors.words[pair * W + lane + r]);
    _Pragma("GCC unroll 1") for (int token = 0; token < PAGE; token += W) {
      I s[NR];
      UNROLL for (int r = 0; r < NR; r++) s[r] = izero();
      if constexpr (PAIRS) {
        UNROLL for (int pair = 0; pair < PAIRS; pair++) {
          const I x = iload(page.codes + pair * PAGE + token);
          UNROLL for (int r = 0; r < NR; r++) s[r] = dot_words(s[r], x, f[pair][r]);
        }
      } else {
        for (int64_t pair = 0; pair < pairs_; pair++) {
          const I x = iload(page.codes + pair * PAGE + token);
          UNROLL for (int r = 0; r < NR; r++) s[r] = dot_words(s[r], x, iset32(factors.words[pair * W + lane + r]));
        }
      }
      UNROLL for (int r = 0; r < NR; r++) most[r] = imax(most[r], s[r]);
    }
    const int16_t* whole = whole_ + row * dim_;
    _Pragma("GCC unroll 4") for (int64_t d = 0; d < dim_; d += 2 * W) {
      const I y = iload(page.mean + d);
      UNROLL for (int r = 0; r < NR; r++) sum[r] = dot_words(sum[r], y, iload(whole + r * dim_ + d));
    }
    UNROLL for (int r = 0; r < NR; r++) {
      const float best = hmax(to_float(most[r])) * factors.step[lane + r] + factors.zero[lane + r];
      weights_[(row + r) * stride_ + p] = best + hsum(to_float(sum[r])) * (step_[row + r] * page.unit);
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
