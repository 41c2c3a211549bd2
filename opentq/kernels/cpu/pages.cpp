// Which pages a decode step looks at: scores of all tokens from their sketches, the largest per page, the softmax's share
// of these, the pages with the most.
//
// A page of sketches is C channels of 32 bytes (byte j: the 4-bit codes of tokens j and j + 32) and C fp16 scales; a code
// stands for (code - 7.5) * scale; then the mean key of the page, D signed bytes and a scale (attention/pages.py). First
// every page leaves, for every query row of its KV head, the largest score; then every KV head adds up the rows' shares and
// picks. Bytes moved: all sketches once, from memory. The arithmetic, a multiply-add per channel, token and row, is what
// it costs.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "abi.h"
#include "pool.h"
#include "simd.h"

namespace otq {

constexpr int PAGE = 64;
constexpr int64_t PAGES_PER_TASK = 64;
constexpr int MAX_CHANNELS = 64, MAX_DIM = 1024;
constexpr float LOG2_OF_E = 1.44269504088896f;

class Choice {
 public:
  explicit Choice(const PageCall& call) : c_(call) {
    for (int64_t b = 0; b < c_.batch; b++) longest_ = std::max<int64_t>(longest_, c_.packed[b] / PAGE);
    stride_ = (longest_ + 15) / 16 * 16;
    const size_t all = size_t(c_.batch * c_.kv_heads * c_.rows * stride_);
    largest_.reset(new float[all]);
  }

  void run() {
    const int64_t chunks = (longest_ + PAGES_PER_TASK - 1) / PAGES_PER_TASK, heads = c_.batch * c_.kv_heads;
    Pool::get().run(int(heads * chunks), c_.threads, [&](int i) { weigh(i / chunks, i % chunks * PAGES_PER_TASK); });
    Pool::get().run(int(heads), c_.threads, [&](int i) { pick(i); });
  }

 private:
  const PageCall& c_;
  int64_t longest_ = 0, stride_ = 0;
  std::unique_ptr<float[]> largest_;  // [B * Hkv][rows][stride_], in units of log2

  int64_t width() const { return c_.channels + c_.dim; }

  void weigh(int64_t head, int64_t first) const {
    const int64_t b = head / c_.kv_heads, last = std::min<int64_t>(first + PAGES_PER_TASK, c_.packed[b] / PAGE);
    alignas(64) float x[MAX_CHANNELS * PAGE], mean[MAX_DIM];
    const uint8_t* page = c_.sketches + b * c_.batch_stride + head % c_.kv_heads * c_.head_stride + first * c_.page_stride;
    for (int64_t p = first; p < last; p++, page += c_.page_stride) {
      open(page, x, mean);
      for (int64_t r = 0; r < c_.rows; r++) {
        const float* q = c_.queries + (head * c_.rows + r) * width();
        F s[PAGE / W];
        UNROLL for (int j = 0; j < PAGE / W; j++) s[j] = set1(0.f);
        for (int64_t c = 0; c < c_.channels; c++) {
          const F factor = set1(q[c] * LOG2_OF_E);
          UNROLL for (int j = 0; j < PAGE / W; j++) s[j] = fma(factor, load(x + c * PAGE + W * j), s[j]);
        }
        F most = s[0];
        UNROLL for (int j = 1; j < PAGE / W; j++) most = max(most, s[j]);
        largest_[(head * c_.rows + r) * stride_ + p] = hmax(most) + product(q + c_.channels, mean) * LOG2_OF_E;
      }
    }
  }

  float product(const float* a, const float* b) const {
    F sum[2] = {set1(0.f), set1(0.f)};
    int64_t d = 0;
    for (; d + 2 * W <= c_.dim; d += 2 * W) {
      UNROLL for (int j = 0; j < 2; j++) sum[j] = fma(load(a + d + W * j), load(b + d + W * j), sum[j]);
    }
    float all = hsum(add(sum[0], sum[1]));
    for (; d < c_.dim; d++) all += a[d] * b[d];
    return all;
  }

  void open(const uint8_t* page, float* x, float* mean) const {
    const uint8_t* rest = page + c_.channels * (PAGE / 2 + 2);
    uint16_t width;
    std::memcpy(&width, rest + c_.dim, 2);
    const float unit = half_to_float(width);
    for (int64_t d = 0; d < c_.dim; d++) mean[d] = float(int8_t(rest[d])) * unit;
    for (int64_t c = 0; c < c_.channels; c++, page += PAGE / 2, x += PAGE) {
      uint16_t half;
      std::memcpy(&half, page + (c_.channels - c) * (PAGE / 2) + 2 * c, 2);
      const float scale = half_to_float(half);
      for (int t = 0; t < PAGE / 2; t++) {
        x[t] = (float(page[t] & 15) - 7.5f) * scale;
        x[t + PAGE / 2] = (float(page[t] >> 4) - 7.5f) * scale;
      }
    }
  }

  void pick(int64_t head) const {
    const int64_t packed = c_.packed[head / c_.kv_heads], whole = packed / PAGE, pages = (packed + PAGE - 1) / PAGE;
    int32_t* out = c_.out + head * c_.count;
    if (pages <= c_.count) {  // all of them; what follows is left alone, but must be a page
      for (int64_t i = 0; i < c_.count; i++) out[i] = int32_t(i < pages ? i : 0);
      return;
    }
    const size_t room = size_t(stride_);
    std::vector<float> share(room, 0.f), part(room, 0.f);
    for (int64_t r = 0; r < c_.rows; r++) {
      const int64_t row = (head * c_.rows + r) * stride_;
      const float* largest = largest_.get() + row;
      const float top = *std::max_element(largest, largest + whole);
      if (!(std::fabs(top) < 1e30f)) continue;  // a row that is not finite has no say
      F sums = set1(0.f);
      for (int64_t p = 0; p < whole; p += W) {
        store(part.data() + p, exp2(min(sub(load(largest + p), set1(top)), set1(0.f))));
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
    // Besides the newest the `count - 1` largest, of equal ones the first.
    const int64_t others = c_.count - 1;
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
};

}  // namespace otq

EXPORT int opentq_pages(const otq::PageCall* call) {
  try {
    if (call->channels > otq::MAX_CHANNELS || call->dim > otq::MAX_DIM) return 1;
    otq::Choice(*call).run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
EXPORT int64_t opentq_page_call_bytes() { return sizeof(otq::PageCall); }
