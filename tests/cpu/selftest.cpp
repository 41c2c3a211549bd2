// The CPU kernels without Python: conformance shapes against a scalar double-precision twin, for sanitizers and emulators.
//
// Every buffer is a heap block of its exact size, and packed and dense data start at odd addresses, so a read past an end
// or an aligned load of unaligned memory is caught. Exit status: the number of shapes that failed (at most 100).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "abi.h"

using namespace otq;

static uint64_t seed = 88172645463325252ull;
static double uniform() {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return double(seed >> 11) / 9007199254740992.0;
}
static float normal() { return float(std::sqrt(-2 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform())); }

static double half(uint16_t h) {
  const int e = h >> 10 & 31, m = h & 1023;
  const double x = e == 0 ? std::ldexp(m, -24) : e == 31 ? INFINITY : std::ldexp(1024 + m, e - 25);
  return h & 0x8000 ? -x : x;
}
static uint16_t to_half(double x) {  // nearest, for |x| in the normal range
  const int e = std::max(-14, std::ilogb(std::fabs(x) + 1e-30));
  const long m = std::lrint(std::fabs(x) * std::ldexp(1.0, 10 - e));
  return uint16_t((x < 0 ? 0x8000 : 0) | (m < 1024 ? m : ((e + 15) << 10) + (m - 1024)));
}

// A heap block whose contents start one byte (or one element) after an aligned address.
template <class T> struct Odd {
  explicit Odd(size_t n) : p(static_cast<char*>(std::malloc(n * sizeof(T) + sizeof(T)))) {}
  ~Odd() { std::free(p); }
  T* get() const { return reinterpret_cast<T*>(p + sizeof(T)); }
  char* p;
};

// A side's coding by number: 2, 3, 4, 8 affine bits; 101 .. 106 codebooks of 1 .. 6 bits; 16 raw fp16; 2ab two runs of a and
// b bits, half of the channels each; 3ab two runs of all channels and 40r one run of r bits a channel, both for keys, whose
// queries are projected; 500 angles; and on top of any of them, 1000 for every outlier of a token.
constexpr int RAW16 = 16, BOOKS = 100, HALVES = 200, SKETCH = 300, SIGNS = 400, ANGLES = 500;

struct Shape {
  int kb, vb, group, dk, dv, gqa, length, packed, sink, tail;
  bool causal;
  int window, batch, threads;
  float softcap;
  bool sinks;
};

// One run of codes. A codebook is evenly spaced here, from -127 to 127 steps of STEP.
constexpr float STEP = 3.f / 127;
struct Run {
  Run(int bits, bool book, int group, int dim, bool values) {
    const int count = 1 << std::min(bits, 6);
    for (int i = 0; i < 64; i++) entries[i] = uint8_t(1 + 254 * (i % count) / (count - 1));
    for (int i = 0; i + 1 < count; i++) cuts[i] = STEP * ((entries[i] + entries[i + 1]) / 2.f - 128);
    f = {bits, book ? dim : group, dim, values, book ? BOOK : AFFINE, 0, nullptr, nullptr, STEP, 0};
  }
  // Floats [rows, tokens, dim] -> blocks, and the decoded values as doubles, `stride` to a token. Checks that load and store
  // are inverse and that codes are nearest.
  bool pack(const std::vector<float>& x, int rows, int tokens, uint8_t* blocks, double* decoded, int stride);
  Packed view(const uint8_t* data, int heads, int slots) const {
    const int64_t size = f.block_bytes(), head = slots / 64 * size;
    const int group = f.form == BOOK && !f.is_values ? std::min(128, f.dim) : f.group;
    return {data, heads * head, head, size, f.bits, group, f.dim, f.form, entries, STEP, 0};
  }
  Format f;
  uint8_t entries[64];
  float cuts[63];
};

// Angles and their tables (polar.h): any numbers that are all different will do.
struct Angles {
  static double angle(int level, int code) { return level == 1 ? 0.2 + 0.39 * code : 0.1 + 0.3 * code + 0.05 * level; }
  static double part(int level, int code, int which) { return which ? std::sin(angle(level, code)) : std::cos(angle(level, code)); }
  Angles() {
    for (int i = 0; i < 64; i++)
      for (int q = 0; q < 4; q++) tables[4 * i + q] = float(4 * part(4, i & 3, q / 2) * part(3, i >> (q < 2 ? 2 : 4) & 3, q % 2));
    for (int i = 0; i < 4; i++)
      for (int c = 0; c < 4; c++) tables[256 + 4 * i + c] = float(part(2, i, c / 2));
    for (int i = 0; i < 256; i++)
      for (int c = 0; c < 4; c++) tables[272 + 4 * i + c] = float(part(1, i >> 4 * (c / 2) & 15, c % 2));
  }
  static size_t bytes(int dim) { return size_t(dim) / 16 * 6 + (14 * size_t(dim) / 16 + 7) / 8; }
  // A random token, and what it decodes to.
  static void make(int dim, uint8_t* token, double* out) {
    const int n = dim / 16, rest = 4 * n, radii = int(bytes(dim)) - 2 * n;
    std::memset(token, 0, bytes(dim));
    std::vector<double> lengths(n), longer;
    for (int j = 0; j < n; j++) {
      const uint16_t h = to_half(0.2 + uniform());
      std::memcpy(token + radii + 2 * j, &h, 2), lengths[j] = 4 * half(h);
    }
    for (int level = 4, first = 12 * n; level >= 1; level--, first -= 32 * n >> level) {  // first: the level's first bit in `rest`
      longer.clear();
      for (size_t i = 0; i < lengths.size(); i++) {
        const int code = int(uniform() * (level == 1 ? 16 : 4)), bit = level == 1 ? 4 * int(i) : 8 * rest + first + 2 * int(i);
        token[bit / 8] |= uint8_t(code << bit % 8);
        for (int which : {0, 1}) longer.push_back(lengths[i] * part(level, code, which));
      }
      lengths = longer;
    }
    std::copy(lengths.begin(), lengths.end(), out);
  }
  float tables[4 * 324];
};
static const Angles angles;

// A side of `rows` heads with `slots` random tokens each: the stored runs, and what they decode to.
struct Side {
  Side(int coding, int group, int dim, bool values, int rows, int slots) : rows(rows), slots(slots), dim(dim), outliers(coding / 1000) {
    const int number = coding % 1000;
    raw = number == RAW16, polar = number == ANGLES;
    if (raw || polar) width = dim;
    else if (number > SIGNS) runs.emplace_back(1, true, 0, (number - SIGNS) * dim, values), projects = true;
    else if (number > HALVES)
      for (int bits : {number / 10 % 10, number % 10}) runs.emplace_back(bits, true, 0, number < SKETCH ? dim / 2 : dim, values), projects = number > SKETCH;
    else runs.emplace_back(number % BOOKS, number > BOOKS, group, dim, values);
    for (Run& r : runs) width += r.f.dim;
    decoded.resize(size_t(rows) * slots * width);
    const size_t count = size_t(rows) * slots * outliers;
    channels.reset(new Odd<uint8_t>(count * channel_bytes())), numbers.reset(new Odd<uint16_t>(count));
    for (size_t i = 0; i < count; i++) {
      const int channel = int(uniform() * dim);
      std::memcpy(channels->get() + i * channel_bytes(), &channel, channel_bytes()), numbers->get()[i] = to_half(4 * normal());
    }
  }
  size_t channel_bytes() const { return dim > 256 ? 2 : 1; }
  // Calls body(channel, value) for the outliers of one token.
  template <class Body> void for_outliers(size_t slot, Body body) const {
    for (size_t i = slot * outliers; i < (slot + 1) * outliers; i++) {
      int channel = 0;
      std::memcpy(&channel, channels->get() + i * channel_bytes(), channel_bytes());
      body(channel, half(numbers->get()[i]));
    }
  }
  bool fill() {
    int from = 0;
    if (raw) {
      blocks[0].reset(new Odd<uint8_t>(2 * decoded.size()));
      for (size_t i = 0; i < decoded.size(); i++) {
        const uint16_t h = to_half(normal());
        std::memcpy(blocks[0]->get() + 2 * i, &h, 2), decoded[i] = half(h);
      }
    }
    if (polar) {
      blocks[0].reset(new Odd<uint8_t>(size_t(rows) * slots * Angles::bytes(dim)));
      for (int t = 0; t < rows * slots; t++) Angles::make(dim, blocks[0]->get() + t * Angles::bytes(dim), decoded.data() + size_t(t) * dim);
    }
    for (size_t i = 0; i < runs.size(); i++) {
      std::vector<float> x(size_t(rows) * slots * runs[i].f.dim);
      for (float& y : x) y = normal();
      blocks[i].reset(new Odd<uint8_t>(size_t(rows) * slots / 64 * runs[i].f.block_bytes()));
      if (!runs[i].pack(x, rows, slots, blocks[i]->get(), decoded.data() + from, width)) return false;
      from += runs[i].f.dim;
    }
    return true;
  }
  // As attention reads them.
  void view(int heads, Packed* out, Outliers& extra) const {
    const auto strided = [&](const void* data, int64_t token) {
      return Strided{static_cast<const uint8_t*>(data), heads * slots * token, slots * token, 64 * token, token};
    };
    extra = {strided(channels->get(), outliers * channel_bytes()), strided(numbers->get(), outliers * 2), outliers, int32_t(channel_bytes())};
    if (raw) out[0] = {blocks[0]->get(), int64_t(heads) * slots * 2 * dim, int64_t(slots) * 2 * dim, 128 * dim, 16, dim, dim, RAW, nullptr, 0, 0};
    if (polar) {
      const int64_t token = Angles::bytes(dim), head = slots * token;
      out[0] = {blocks[0]->get(), heads * head, head, 64 * token, 0, dim, dim, POLAR, reinterpret_cast<const uint8_t*>(angles.tables), 0, 0};
    }
    for (size_t i = 0; i < runs.size(); i++) out[i] = runs[i].view(blocks[i]->get(), heads, slots);
  }
  int rows, slots;
  bool raw, polar, projects = false;
  int dim, width = 0, outliers;  // channels, and numbers of a decoded token
  std::unique_ptr<Odd<uint8_t>> channels;
  std::unique_ptr<Odd<uint16_t>> numbers;
  std::vector<Run> runs;
  std::unique_ptr<Odd<uint8_t>> blocks[2];
  std::vector<double> decoded;
};

bool Run::pack(const std::vector<float>& x, int rows, int tokens, uint8_t* blocks, double* decoded, int stride) {
  f.cuts = cuts, f.book = entries;
  const Grid grid{1, rows, tokens / 64, int64_t(rows) * tokens * f.dim, int64_t(tokens) * f.dim, f.dim, FLOAT32, 2};
  const size_t n = size_t(rows) * tokens, bytes = size_t(rows) * (tokens / 64) * f.block_bytes();
  std::vector<float> lengths(n);
  for (size_t t = 0; t < n; t++) {
    double sum = 0;
    for (int d = 0; d < f.dim; d++) sum += double(x[t * f.dim + d]) * x[t * f.dim + d];
    lengths[t] = float(std::sqrt(sum / f.dim));
  }
  if (opentq_pack(&f, &grid, x.data(), lengths.data(), blocks)) return false;
  std::vector<uint32_t> codes(n * f.words());
  std::vector<uint16_t> scales(n * f.params());
  const Grid back{1, rows, tokens / 64, 0, tokens / 64 * f.block_bytes(), f.block_bytes(), FLOAT32, 2};
  if (opentq_load(&f, &back, blocks, reinterpret_cast<uint8_t*>(codes.data()), scales.data())) return false;
  std::vector<uint8_t> again(bytes);
  if (opentq_store(&f, &grid, reinterpret_cast<uint8_t*>(codes.data()), scales.data(), again.data())) return false;
  bool good = bytes == 0 || std::memcmp(again.data(), blocks, bytes) == 0;
  if (!good) std::printf("store(load(x)) != x\n");
  for (size_t t = 0; t < n; t++)
    for (int d = 0; d < f.dim; d++) {
      const uint32_t* w = codes.data() + t * f.words();
      const int low = f.bits == 3 ? 2 : f.bits == 5 || f.bits == 6 ? 4 : f.bits, high = f.bits - low;
      uint32_t code = w[d * low / 32] >> (d * low % 32) & ((1u << low) - 1);
      if (high) code |= (w[f.low_words() + d * high / 32] >> (d * high % 32) & ((1u << high) - 1)) << low;
      double& y = decoded[t * stride + d];
      const float given = x[t * f.dim + d];
      if (f.form == BOOK) {
        const double step = double(half(scales[t])) * STEP;
        y = step * (entries[code] - 128);
        const double wide = step * (127. / ((1 << f.bits) - 1) + 0.51);  // half a cell of rounded entries
        if (std::fabs(given - y) > wide && code != 0 && code + 1 != 1u << f.bits) good = false;
        continue;
      }
      const double scale = half(scales[t * 2 * f.groups() + 2 * (d / f.group)]), zero = half(scales[t * 2 * f.groups() + 2 * (d / f.group) + 1]);
      y = code * scale + zero;
      if (std::fabs(y - given) > 0.505 * scale + 4e-3 * std::fabs(zero)) good = false;
    }
  return good;
}

static bool run(const Shape& s) {
  const int heads = 2, slots = (s.packed + 63) / 64 * 64, columns = s.sink + s.tail + s.length;
  const int rows = s.batch * heads, q_heads = heads * s.gqa;
  Side k(s.kb, s.group, s.dk, false, rows, slots), v(s.vb, s.group, s.dv, true, rows, slots);
  if (!k.fill() || !v.fill()) return false;
  // Any projection will do: here it has nothing to do with q.
  const size_t q_rows = size_t(s.batch) * q_heads * s.length;
  std::vector<float> q(q_rows * s.dk), projected(k.projects ? q_rows * k.width : 0), plain(q.size());
  for (auto* a : {&q, &projected, &plain})
    for (auto& x : *a) x = normal();
  Odd<uint16_t> dense_k(size_t(rows) * columns * s.dk), dense_v(size_t(rows) * columns * s.dv);
  for (size_t i = 0; i < size_t(rows) * columns * s.dk; i++) dense_k.get()[i] = to_half(normal());
  for (size_t i = 0; i < size_t(rows) * columns * s.dv; i++) dense_v.get()[i] = to_half(normal());
  std::vector<float> sinks(q_heads, 0.5f), out(q_rows * s.dv * (v.outliers ? 2 : 1)), second(out.size());
  std::vector<int32_t> lens;
  for (int b = 0; b < s.batch; b++) {  // ragged: later sequences are shorter, and skip columns before their tail
    lens.push_back(std::max(0, s.packed - 37 * b)), lens.push_back(s.sink), lens.push_back(s.sink + std::min(s.tail, 3 * b));
  }
  Call c{};
  c.batch = s.batch, c.kv_heads = heads, c.gqa = s.gqa, c.length = s.length, c.columns = columns;
  const auto queries = [&](const std::vector<float>& x, int64_t dim) {
    return Queries{x.data(), q_heads * s.length * dim, s.length * dim, dim};
  };
  c.q = queries(q, s.dk), c.projected = k.projects ? queries(projected, k.width) : c.q, c.plain = queries(plain, s.dk);
  c.dim_k = s.dk, c.dim_v = s.dv;
  c.causal = s.causal, c.window = s.window, c.softcap = s.softcap, c.scale = float(1 / std::sqrt(s.dk)), c.threads = s.threads;
  k.view(heads, c.k, c.k_outliers), v.view(heads, c.v, c.v_outliers);
  c.dense_k = {dense_k.get(), int64_t(heads) * columns * s.dk, int64_t(columns) * s.dk, s.dk};
  c.dense_v = {dense_v.get(), int64_t(heads) * columns * s.dv, int64_t(columns) * s.dv, s.dv};
  c.lens = lens.data(), c.sinks = s.sinks ? sinks.data() : nullptr, c.out = out.data();
  if (opentq_attend(&c)) return false;
  c.out = second.data();
  if (opentq_attend(&c) || std::memcmp(out.data(), second.data(), 4 * out.size())) {
    std::printf("two runs differ\n");
    return false;
  }
  double worst = 0, largest = 0;
  for (int b = 0; b < s.batch; b++)
    for (int h = 0; h < q_heads; h++)
      for (int i = 0; i < s.length; i++) {
        const int packed = lens[3 * b], sink = lens[3 * b + 1], start = lens[3 * b + 2], row = b * heads + h / s.gqa;
        const int total = sink + packed + columns - start, at = total - s.length + i;
        const size_t q_row = size_t(b * q_heads + h) * s.length + i;
        const float *query = &q[q_row * s.dk], *packed_query = k.projects ? &projected[q_row * k.width] : query;
        std::vector<double> score(total, -INFINITY), o(c.dim_out(), 0);
        double top = s.sinks ? 0.5 : -INFINITY, sum = 0;
        for (int t = 0; t < total; t++) {
          if ((s.causal && t > at) || (s.window && t <= at - s.window)) continue;
          const bool dense = t < sink || t >= sink + packed;
          const size_t column = size_t(row) * columns + (t < sink ? t : start + t - sink - packed), slot = size_t(row) * slots + (t - sink);
          double dot = 0;
          if (dense)
            for (int d = 0; d < s.dk; d++) dot += query[d] * half(dense_k.get()[column * s.dk + d]);
          else
            for (int d = 0; d < k.width; d++) dot += packed_query[d] * k.decoded[slot * k.width + d];
          if (!dense) k.for_outliers(slot, [&](int channel, double value) { dot += value * plain[q_row * s.dk + channel]; });
          score[t] = dot * c.scale;
          if (s.softcap != 0) score[t] = s.softcap * std::tanh(score[t] / s.softcap);
          top = std::max(top, score[t]);
        }
        if (s.sinks) sum = std::exp(0.5 - top);
        for (int t = 0; t < total; t++) {
          if (score[t] == -INFINITY) continue;
          const double p = std::exp(score[t] - top);
          const bool dense = t < sink || t >= sink + packed;
          const size_t column = size_t(row) * columns + (t < sink ? t : start + t - sink - packed), slot = size_t(row) * slots + (t - sink);
          sum += p;
          for (int d = 0; d < s.dv; d++) o[d] += p * (dense ? half(dense_v.get()[column * s.dv + d]) : v.decoded[slot * s.dv + d]);
          if (!dense) v.for_outliers(slot, [&](int channel, double value) { o[s.dv + channel] += p * value; });
        }
        for (int d = 0; d < c.dim_out(); d++) {
          const double want = sum > 0 ? o[d] / sum : 0, got = out[q_row * c.dim_out() + d];
          worst = std::max(worst, std::isfinite(got) ? std::fabs(got - want) : 1e9), largest = std::max(largest, std::fabs(want));
        }
      }
  if (worst <= 5e-4 * largest) return true;
  std::printf("error %.2e of %.2e\n", worst, largest);
  return false;
}

// Pages chosen by random sketches: what they have of the softmax, against the most that so many pages can have.
static bool choose(int channels, int dim, int rows, int pages, int count, int threads) {
  const int heads = 2, row_bytes = channels * 34 + dim + 2, packed = 64 * pages - 64 + (pages % 2 ? 64 : 5), whole = packed / 64;
  Odd<uint8_t> sketches(size_t(heads) * pages * row_bytes);
  std::vector<float> queries(size_t(heads) * rows * (channels + dim));
  for (float& x : queries) x = normal();
  for (int i = 0; i < heads * pages; i++) {
    uint8_t *page = sketches.get() + size_t(i) * row_bytes, *rest = page + 34 * channels;
    for (int j = 0; j < row_bytes; j++) page[j] = uint8_t(256 * uniform());
    for (int c = 0; c <= channels; c++) {
      const uint16_t scale = to_half(float(c < channels ? 0.01 + 0.2 * uniform() : 0.005));
      std::memcpy(c < channels ? page + 32 * channels + 2 * c : rest + dim, &scale, 2);
    }
  }
  std::vector<int32_t> out(size_t(heads) * count), again(out.size());
  const int32_t lens[1] = {packed};
  PageCall c{};
  c.sketches = sketches.get(), c.page_stride = row_bytes, c.head_stride = c.batch_stride = int64_t(pages) * row_bytes;
  c.queries = queries.data(), c.packed = lens, c.out = out.data();
  c.batch = 1, c.kv_heads = heads, c.rows = rows, c.channels = channels, c.dim = dim, c.count = count, c.threads = threads;
  if (opentq_pages(&c)) return false;
  c.out = again.data(), c.threads = 1;
  if (opentq_pages(&c) || out != again) return false;
  for (int h = 0; h < heads; h++) {
    std::vector<double> share(size_t(whole), 0);
    for (int r = 0; r < rows; r++) {
      const float* q = &queries[size_t(h * rows + r) * (channels + dim)];
      std::vector<double> weight(size_t(whole), -INFINITY);
      double sum = 0;
      for (int p = 0; p < whole; p++) {
        const uint8_t *page = sketches.get() + (size_t(h) * pages + p) * row_bytes, *rest = page + 34 * channels;
        uint16_t scale;
        for (int t = 0; t < 64; t++) {
          double score = 0;
          for (int i = 0; i < channels; i++) {
            std::memcpy(&scale, page + 32 * channels + 2 * i, 2);
            score += q[i] * half(scale) * ((t < 32 ? page[32 * i + t] & 15 : page[32 * i + t - 32] >> 4) - 7.5);
          }
          weight[p] = std::max(weight[p], score);
        }
        std::memcpy(&scale, rest + dim, 2);
        for (int d = 0; d < dim; d++) weight[p] += q[channels + d] * int8_t(rest[d]) * half(scale);
        sum += std::exp(weight[p]);
      }
      for (int p = 0; p < whole; p++) share[p] += std::exp(weight[p]) / sum;
    }
    double mine = 0, most = 0;
    const int newest = (packed + 63) / 64 - 1;
    for (int i = 0; i < count; i++) {
      const int page = out[size_t(h * count + i)];
      if (page < 0 || page > newest || (i && page <= out[size_t(h * count + i - 1)]) || (i == count - 1 && page != newest)) return false;
      if (page != newest) mine += share[page];
    }
    share.resize(size_t(newest));
    std::sort(share.begin(), share.end(), std::greater<>());
    for (int i = 0; i < count - 1; i++) most += share[i];
    if (!(mine >= 0.9999 * most)) return std::printf("%.6f of %.6f\n", mine, most), false;
  }
  return true;
}

int main(int argc, char** argv) {
  const bool forks = !(argc > 1 && std::strcmp(argv[1], "--no-fork") == 0);  // qemu-user can't fork a process with threads

  const Shape split{4, 4, 32, 32, 32, 4, 1, 3000, 4, 60, true, 0, 1, 3, 0, false};  // cut into ranges and merged
  std::vector<Shape> shapes{split};
  for (int kb : {2, 3, 4, 8})
    for (int vb : {2, 3, 4, 8}) shapes.push_back({kb, vb, 32, 32, 48, 3, 1, 100, 0, 5, true, 0, 1, 2, 0, false});
  for (int dim : {16, 64, 80, 112, 192})
    for (int group : {32, 64, 128}) shapes.push_back({4, 3, group, dim, dim, 2, 1, 70, 2, 3, true, 0, 1, 1, 0, false});
  for (int gqa : {1, 2, 4, 5, 7, 8, 16}) shapes.push_back({4, 4, 32, 64, 64, gqa, 2, 130, 0, 9, true, 0, 1, 2, 0, false});
  shapes.push_back({4, 2, 64, 512, 256, 2, 1, 64, 0, 0, true, 0, 1, 2, 0, false});
  shapes.push_back({4, 4, 32, 32, 32, 4, 1, 0, 0, 0, true, 0, 1, 2, 0, false});       // nothing packed
  shapes.push_back({4, 8, 32, 32, 32, 4, 1, 300, 4, 60, true, 100, 1, 3, 0, false});  // window
  shapes.push_back({4, 4, 32, 32, 32, 1, 5, 300, 2, 0, true, 3, 1, 1, 0, false});     // window inside the query block
  shapes.push_back({3, 4, 32, 32, 32, 2, 40, 200, 4, 70, true, 0, 1, 3, 0, false});   // prefill
  shapes.push_back({4, 2, 32, 32, 32, 2, 90, 200, 4, 10, true, 64, 1, 3, 0, false});  // prefill in a window
  shapes.push_back({4, 4, 32, 32, 32, 2, 20, 65, 0, 0, false, 0, 1, 2, 0, false});    // not causal
  shapes.push_back({4, 4, 32, 32, 32, 2, 3, 150, 2, 30, true, 0, 3, 2, 0, false});    // ragged
  shapes.push_back({4, 4, 32, 32, 32, 2, 2, 150, 2, 30, true, 0, 1, 2, 3.f, true});   // softcap, sinks
  for (int number : {101, 102, 103, 104, 105, 106, RAW16}) {
    shapes.push_back({number, 4, 32, 48, 32, 3, 1, 100, 0, 5, true, 0, 1, 2, 0, false});
    shapes.push_back({3, number, 32, 32, 48, 8, 1, 150, 2, 5, true, 0, 1, 2, 0, false});
    shapes.push_back({number, number, 32, 160, 144, 2, 20, 100, 1, 5, true, 40, 2, 2, 0, false});  // prefill, in a window
  }
  for (int dim : {16, 80, 144}) shapes.push_back({ANGLES, ANGLES, 32, dim, dim, 5, 1, 100, 1, 5, true, dim == 80 ? 70 : 0, 2, 2, 0, false});
  shapes.push_back({ANGLES, 4, 32, 64, 32, 2, 20, 200, 1, 5, true, 40, 2, 2, 0, false});
  for (int number : {4, 104, 221, 500}) {
    shapes.push_back({2000 + number, 1000 + number, 32, 64, 32, 3, 1, 100, 1, 5, true, 0, 2, 2, 0, false});
    shapes.push_back({1000 + number, 8000 + number, 32, 288, 288, 2, 20, 100, 0, 5, true, 40, 1, 2, 3.f, true});
  }
  shapes.push_back({3331, 2102, 32, 64, 64, 4, 1, 3000, 4, 60, true, 0, 1, 3, 0, false});  // cut into ranges and merged
  for (int number : {221, 232, 243}) {
    shapes.push_back({number, 4, 32, 64, 32, 3, 1, 100, 1, 5, true, 0, 1, 2, 0, false});
    shapes.push_back({4, number, 32, 32, 96, 8, 1, 150, 0, 5, true, 0, 1, 2, 0, false});
    shapes.push_back({number, number, 32, 64, 32, 2, 20, 100, 1, 5, true, 40, 2, 2, 0, false});
  }
  for (int number : {311, 321, 331, 401, 402, 408}) {
    shapes.push_back({number, 4, 32, 48, 32, 3, 1, 100, 1, 5, true, 0, 1, 2, 3.f, true});
    shapes.push_back({number, 221, 32, 48, 32, 2, 20, 100, 1, 5, true, 0, 2, 2, 0, false});
  }
  shapes.push_back({331, 243, 32, 256, 64, 4, 1, 3000, 4, 60, true, 0, 1, 3, 0, false});  // cut into ranges and merged
  int failed = 0;
  for (const Shape& s : shapes) {
    if (run(s)) continue;
    failed++;
    std::printf("FAILED k%d v%d g%d D %d %d gqa %d L %d packed %d sink %d tail %d causal %d window %d batch %d softcap %g sinks %d\n", s.kb, s.vb,
                s.group, s.dk, s.dv, s.gqa, s.length, s.packed, s.sink, s.tail, s.causal, s.window, s.batch, double(s.softcap), s.sinks);
  }
  for (int channels : {1, 3, 4, 6, 9})
    for (int dim : {24, 40, 128})
      for (int rows : {1, 3, 8, 21})
        if (!choose(channels, dim, rows, 60 + channels + rows, 9, 3)) failed++, std::printf("FAILED pages by %d of %d channels, %d rows\n", channels, dim, rows);
  // The thread pool's workers don't survive a fork: the child must start new ones instead of waiting for them.
  const pid_t child = forks ? fork() : 0;
  int status = 0;
  if (forks && child == 0) _exit(run(split) ? 0 : 1);
  if (forks) waitpid(child, &status, 0);
  if (status != 0) failed++, std::printf("FAILED in a forked child\n");
  std::printf("%s: %zu shapes, %d failed\n", opentq_isa(), shapes.size(), failed);
  return std::min(failed, 100);
}
