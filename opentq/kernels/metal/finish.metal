// Finish: behind decode_lanes.metal in one kernel, where a threadgroup has all keys of its rows: what its teams found becomes
// the output, as in merge.metal. A simdgroup is a row. Bytes: every partial once, back from where this threadgroup left it.
// Template: as of both; E = DV / 32 numbers to a lane where the output leaves the values' basis (ROT).
// ---- body
  threadgroup_barrier(mem_flags::mem_device);
  for (int r = simdgroup; r < n_rows; r += DS * NT) {
    const size_t row = size_t(head) * n_rows + r, from = row * NT;
    const size_t mine = (from + min(lane, NT - 1)) * (DV + 2) + DV;
    float best = lane < NT ? partial[mine] : OTQ_LOWEST;
    float highest = simd_max(best), total = 0;
    if (SINK) {
      const float sink_score = float(sinks[row / L % (gqa * kv_heads)]) * OTQ_LOG2E;
      highest = max(highest, sink_score);
      total = fast::exp2(sink_score - highest);
    }
    const float weight = lane < NT ? fast::exp2(best - highest) : 0.0f;
    total += simd_sum(weight * partial[mine + 1]);
    const float inverse = total > 0 ? 1 / total : 0;
    if (ROT) {
      constexpr int E = DV < 32 ? 1 : DV / 32;
      float x[E];
#pragma clang loop unroll(full)
      for (int j = 0; j < E; j++) {
        x[j] = 0;
        for (int t = 0; t < NT; t++) {
          x[j] += simd_shuffle(weight, ushort(t)) * partial[(from + t) * (DV + 2) + lane * E + j];
        }
        x[j] *= inverse;
      }
      otq_hadamard<E>(x, lane, 1 / precise::sqrt(float(DV)));
#pragma clang loop unroll(full)
      for (int j = 0; j < E; j++) {
        out[row * DV + lane * E + j] = T(x[j]);
      }
    } else {
      for (int d0 = 0; d0 < DV; d0 += 32) {  // as many times in all lanes, so that they can look up together
        const int d = min(d0 + lane, DV - 1);
        float x = 0;
        for (int t = 0; t < NT; t++) {
          x += simd_shuffle(weight, ushort(t)) * partial[(from + t) * (DV + 2) + d];
        }
        if (d0 + lane < DV) {
          out[row * DV + d] = T(x * inverse);
        }
      }
    }
  }
