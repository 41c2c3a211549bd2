// Merge: the splits of one query row become its output. A threadgroup is a row.
//
// out = sum_s w_s acc_s / (sum_s w_s sum_s + sink), w_s = exp2(max_s - max). A row that saw no key gives zeros.
// Bytes: every partial once. Template: T output type, DV, SPLITS at most (a power of two), SINK. Threads: 128.
// ---- body
  threadgroup float weight[SPLITS];
  threadgroup float total_shared[1];
  const int row = threadgroup_position_in_grid.x;
  const int lane = thread_index_in_simdgroup;
  const int splits = meta[0], L = meta[1], heads = meta[2];
  const size_t first = size_t(row) * splits;  // a small stat is in constant memory, so no pointer to it is made
  float top = OTQ_LOWEST;
  for (int s = lane; s < splits; s += 32) {
    top = max(top, stat[2 * (first + s)]);
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
      float w = fast::exp2(stat[2 * (first + s)] - top);
      weight[s] = w;
      total += w * stat[2 * (first + s) + 1];
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
  for (int d = thread_position_in_threadgroup.x; d < DV; d += 128) {
    float x = 0;
    for (int s = 0; s < splits; s++) {
      x += weight[s] * partial[(first + s) * DV + d];
    }
    out[size_t(row) * DV + d] = T(x * total_shared[0]);
  }
