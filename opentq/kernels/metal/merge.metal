// Merge: the splits of one query row become its output. A threadgroup is a row.
//
// out = sum_s w_s acc_s / (sum_s w_s sum_s + sink), w_s = exp2(max_s - max). A row that saw no key gives zeros.
// Bytes: every partial once. Template: T output type, DV, SPLITS at most (a power of two), SINK; ROT: the output leaves the
// values' basis by a Walsh-Hadamard transform in threadgroup memory, pair by pair. Threads: 128.
// ---- body
  threadgroup float weight[SPLITS];
  threadgroup float total_shared[1];
  threadgroup float x_shared[ROT ? DV : 1];
  const int row = threadgroup_position_in_grid.x;
  const int lane = thread_index_in_simdgroup;
  const int splits = meta[0], L = meta[1], heads = meta[2];
  const size_t first = size_t(row) * splits;  // small partials are in constant memory, so no pointer to them is made
  float top = OTQ_LOWEST;
  for (int s = lane; s < splits; s += 32) {
    top = max(top, partial[(first + s) * (DV + 2) + DV]);
  }
  top = simd_max(top);
  float sink = OTQ_MASKED;
  if (SINK) {
    sink = float(sinks[row / L % heads]) * OTQ_LOG2E;
    top = max(top, sink);
  }
  if (simdgroup_index_in_threadgroup == 0) {
    float total = 0;
    for (int s = lane; s < splits; s += 32) {
      float w = fast::exp2(partial[(first + s) * (DV + 2) + DV] - top);
      weight[s] = w;
      total += w * partial[(first + s) * (DV + 2) + DV + 1];
    }
    total = simd_sum(total);
    if (SINK) {
      total += fast::exp2(sink - top);
    }
    if (lane == 0) {
      total_shared[0] = total > 0 ? 1 / total : 0;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int thread_index = thread_position_in_threadgroup.x;
  for (int d = thread_index; d < DV; d += 128) {
    float x = 0;
    for (int s = 0; s < splits; s++) {
      x += weight[s] * partial[(first + s) * (DV + 2) + d];
    }
    x *= total_shared[0];
    if (ROT) {
      x_shared[d] = x;
    } else {
      out[size_t(row) * DV + d] = T(x);
    }
  }
  if (ROT) {
    for (int h = 1; h < DV; h *= 2) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int i = thread_index; i < DV / 2; i += 128) {
        const int d = i / h * (2 * h) + i % h;
        float a = x_shared[d], b = x_shared[d + h];
        x_shared[d] = a + b;
        x_shared[d + h] = a - b;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = thread_index; d < DV; d += 128) {
      out[size_t(row) * DV + d] = T(x_shared[d] / precise::sqrt(float(DV)));
    }
  }
