// Attention of a query block over [sink | packed | tail], on stored bytes: decode and prefill.
//
// One task is a block of up to 128 query rows (all heads of one KV head, query by query) against a range of packed blocks,
// and, for the last range, the dense columns. So every packed byte is read once per 128 rows: once per call in decode.
// Ranges are cut so that every thread gets several tasks; a row block that was cut leaves partial (acc, max, sum) per
// range, and whoever finishes the last one merges them in order. The cut depends on shapes, lengths and the thread
// setting only, so results are the same bit by bit from run to run.
//
// With a list of pages, which never comes with a window, a task's range is one of the list. Where the weights of blocks are
// asked for, keys alone are read, and a task ends with the scores of its range.
//
// blocks.h has the packed layout, products.h the products on codes, dense.h those on fp16, packed.h what joins them.
// A key whose score is NaN gets no weight; infinite scores give zeros or NaN in their row, never a crash.
#include <memory>

#include "dense.h"
#include "packed.h"
#include "pool.h"

namespace otq {

constexpr int ROW_BLOCK = 128;
constexpr int TASKS_PER_THREAD = 6;
constexpr int64_t MIN_BLOCKS = 4;  // per task: below this a cut costs more than it gains

struct Task {
  int64_t batch, head, row, rows, first, last;  // packed blocks [first, last), of those that are read
  int group, part;                              // which row block, which of its ranges
};

// One row block: its partial results, if it was cut.
struct Group {
  int parts = 1;
  std::atomic<int> left{1};
  std::unique_ptr<float[]> partial;  // [parts][rows][dim_out + 2]: acc, max, sum
};

static float read(const void* p, int64_t i, int32_t dtype) {
  if (dtype == FLOAT32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  if (dtype == FLOAT16) return half_to_float(h);
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

static void write(void* p, int64_t i, int32_t dtype, float x) {
  if (dtype == FLOAT32) {
    static_cast<float*>(p)[i] = x;
  } else if (dtype == FLOAT16) {
    static_cast<uint16_t*>(p)[i] = float_to_half(x);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    static_cast<uint16_t*>(p)[i] = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

class Attention {
 public:
  explicit Attention(const Call& call) : c_(call), total_rows_(call.gqa * call.length) {
    plan();
  }

  void run() {
    std::atomic<bool> failed{false};
    // A thread is worth waking for about 20 microseconds of work.
    const int64_t units = work_ / 24 + 1;
    Pool::get().run(int(tasks_.size()), int(std::min<int64_t>(c_.threads, units)), [&](int i) {
      try {
        task(tasks_[size_t(i)]);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
    });
    if (failed) throw std::bad_alloc();
  }

 private:
  const Call& c_;
  const int64_t total_rows_;
  int64_t work_ = 0;
  std::vector<Task> tasks_;
  std::unique_ptr<Group[]> groups_;

  struct Lengths {
    int64_t packed, sink, tail;
  };
  Lengths lengths(int64_t b) const { return {c_.lens[3 * b], c_.lens[3 * b + 1], c_.lens[3 * b + 2]}; }
  // Packed blocks that are read.
  int64_t blocks(int64_t b) const {
    const int64_t all = (lengths(b).packed + BLOCK - 1) / BLOCK;
    return c_.pages ? std::min(all, c_.page_count) : all;
  }
  // Logical position of query row i.
  int64_t position(int64_t b, int64_t i) const {
    const Lengths n = lengths(b);
    return n.sink + n.packed + c_.columns - c_.length + i - n.tail;
  }
  Range packed_range(int64_t b, int64_t i) const {
    const Lengths n = lengths(b);
    return {c_.window ? std::max<int64_t>(0, position(b, i) - c_.window + 1 - n.sink) : 0, n.packed};
  }
  Columns dense_columns(int64_t b, int64_t i) const {
    const Lengths n = lengths(b);
    const int64_t from = c_.window ? std::max<int64_t>(0, position(b, i) - c_.window + 1) : 0;
    const int64_t end = c_.causal ? c_.columns - c_.length + i + 1 : c_.columns;
    return {from, std::min(n.sink, end), n.tail + std::max<int64_t>(0, from - n.sink - n.packed), end};
  }

  void plan() {
    const int64_t row_blocks = (total_rows_ + ROW_BLOCK - 1) / ROW_BLOCK;
    int64_t all = 0;
    for (int64_t b = 0; b < c_.batch; b++) {
      const int64_t chunks = (total_rows_ + CHUNK - 1) / CHUNK;
      work_ += c_.kv_heads * chunks * (blocks(b) + (c_.columns + BLOCK - 1) / BLOCK);
      all += c_.kv_heads * row_blocks * blocks(b);
    }
    const int64_t per_task = std::max<int64_t>(MIN_BLOCKS, all / (std::max(c_.threads, 1) * TASKS_PER_THREAD) + 1);
    groups_ = std::make_unique<Group[]>(size_t(c_.batch * c_.kv_heads * row_blocks));
    int group = 0;
    for (int64_t b = 0; b < c_.batch; b++) {
      for (int64_t h = 0; h < c_.kv_heads; h++) {
        for (int64_t row = 0; row < total_rows_; row += ROW_BLOCK, group++) {
          const int64_t rows = std::min<int64_t>(ROW_BLOCK, total_rows_ - row);
          // Later rows see less of the past through a window: the first row's bound covers all.
          const Range r = packed_range(b, row / c_.gqa);
          const int64_t first = std::min(r.low, r.high) / BLOCK, last = blocks(b);
          const int64_t parts = std::max<int64_t>(1, (last - first + per_task - 1) / per_task);
          Group& g = groups_[size_t(group)];
          g.parts = int(parts), g.left = int(parts);
          if (parts > 1 && !c_.weights) g.partial.reset(new float[size_t(parts * rows * (c_.dim_out() + 2))]);
          for (int64_t p = 0; p < parts; p++)
            tasks_.push_back({b, h, row, rows, first + (last - first) * p / parts, first + (last - first) * (p + 1) / parts, group, int(p)});
        }
      }
    }
  }

  void load_queries(const Task& t, Rows& rows) const {
    const float factor = c_.softcap != 0.f ? c_.scale / c_.softcap : c_.scale * LOG2E;
    for (int r = 0; r < rows.count; r++) {
      const int64_t i = (t.row + r) / c_.gqa, head = t.head * c_.gqa + (t.row + r) % c_.gqa;
      float* q = rows.q + size_t(r) * rows.dim_q;
      read_query(c_.q, t.batch, head, i, factor, rows.dim_q, q);
      if (rows.plain) read_query(c_.plain, t.batch, head, i, factor, rows.dim_q, rows.plain + size_t(r) * rows.dim_q);
      if (t.first == t.last || keys_as_floats(c_)) continue;
      if (c_.projected.data != c_.q.data) {
        q = rows.projected;
        read_query(c_.projected, t.batch, head, i, factor, rows.runs_k * rows.dim_k, q);
      }
      rows.quantise_query(r, q, c_.k[0].group);
    }
  }

  void read_query(const Queries& from, int64_t batch, int64_t head, int64_t i, float factor, int dim, float* out) const {
    const int64_t at = batch * from.batch_stride + head * from.head_stride + i * from.row_stride;
    for (int d = 0; d < dim; d++) out[d] = factor * read(from.data, at + d, c_.dtype);
  }

  void task(const Task& t) {
    thread_local Arena arena;
    Rows rows;
    rows.allocate(arena, int(t.rows), c_);
    rows.softcap = c_.softcap;
    if (c_.weights) {
      rows.weights = c_.weights + ((t.batch * c_.kv_heads + t.head) * total_rows_ + t.row) * c_.page_count;
      rows.weights_stride = c_.page_count;
    }
    load_queries(t, rows);
    if (t.first < t.last) {
      Range seen[ROW_BLOCK];
      for (int r = 0; r < rows.count; r++) seen[r] = packed_range(t.batch, (t.row + r) / c_.gqa);
      attend_packed(rows, seen, c_, t.batch, t.head, t.first, t.last);
    }
    if (c_.weights) return;
    Group& group = groups_[size_t(t.group)];
    if (t.part == group.parts - 1) {
      Columns seen[ROW_BLOCK];
      for (int r = 0; r < rows.count; r++) seen[r] = dense_columns(t.batch, (t.row + r) / c_.gqa);
      attend_dense(rows, seen, c_.dense_k.data + t.batch * c_.dense_k.batch_stride + t.head * c_.dense_k.head_stride,
                   c_.dense_k.token_stride, c_.dense_v.data + t.batch * c_.dense_v.batch_stride + t.head * c_.dense_v.head_stride,
                   c_.dense_v.token_stride, seen[rows.count - 1].high);
    }
    float* out = rows.dense_v;  // scratch from here on, at least dim_out + 2 long
    if (group.parts == 1) {
      for (int r = 0; r < rows.count; r++) {
        const float sum = rows.finish(r, c_.v[0].group, out);
        emit(t, r, out, rows.top[r], sum);
      }
      return;
    }
    const int64_t width = c_.dim_out() + 2;
    for (int r = 0; r < rows.count; r++) {
      float* p = group.partial.get() + (t.part * t.rows + r) * width;
      p[c_.dim_out() + 1] = rows.finish(r, c_.v[0].group, p);
      p[c_.dim_out()] = rows.top[r];
    }
    if (group.left.fetch_sub(1) == 1) merge(t, group, out);
  }

  void merge(const Task& t, const Group& group, float* out) const {
    const int64_t dim = c_.dim_out(), width = dim + 2;
    for (int64_t r = 0; r < t.rows; r++) {
      float top = LOWEST, sum = 0;
      const float* p = group.partial.get() + r * width;
      for (int i = 0; i < group.parts; i++) top = std::max(top, p[i * t.rows * width + dim]);
      std::fill_n(out, dim, 0.f);
      for (int i = 0; i < group.parts; i++) {
        const float *part = p + i * t.rows * width, share = std::exp2(part[dim] - top);
        for (int64_t d = 0; d < dim; d++) out[d] += share * part[d];
        sum += share * part[dim + 1];
      }
      emit(t, int(r), out, top, sum);
    }
  }

  // Normalise row r of a task and write it in q's dtype.
  void emit(const Task& t, int r, const float* acc, float top, float sum) const {
    const int64_t i = (t.row + r) / c_.gqa, head = t.head * c_.gqa + (t.row + r) % c_.gqa;
    float shrink = 1;
    if (c_.sinks) {
      const float sink = c_.sinks[head] * LOG2E, peak = std::max(top, sink);
      shrink = std::exp2(top - peak);
      sum = shrink * sum + std::exp2(sink - peak);
    }
    const float factor = sum > 0.f ? shrink / sum : 0.f;  // a row that sees nothing is zeros
    const int64_t at = ((t.batch * c_.kv_heads * c_.gqa + head) * c_.length + i) * c_.dim_out();
    for (int64_t d = 0; d < c_.dim_out(); d++) write(c_.out, at + d, c_.dtype, factor == 0.f ? 0.f : acc[d] * factor);
  }
};

}  // namespace otq

EXPORT int opentq_attend(const otq::Call* call) {
  try {
    otq::Attention(*call).run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

EXPORT const char* opentq_isa() { return otq::matrix_unit() ? OPENTQ_ISA "+amx" : OPENTQ_ISA; }
EXPORT int64_t opentq_call_bytes() { return sizeof(otq::Call); }
