// Sketches: every page's weight by its sketch, for every query row (attention/pages.py).
//
// A page of sketches is C channels of 32 bytes (byte j: the 4-bit codes of tokens j and j + 32) and C halves, their scales; a
// code stands for (code - 7.5) * scale; then the mean key of the page, D signed bytes and a half, their scale.
// Threads: a simdgroup takes one page after the other: lane j has tokens j and j + 32 of all channels, and every 32nd channel
// of the mean, in registers and meets one query row after the other. Row tiles of R are threadgroups side by side; NT
// simdgroups share the queries.
// Bytes: the sketches once per R rows, one float per row and page.
//
// Template: C; D, even; R rows; NT simdgroups. meta = {query rows, pages held, pages}.
// Inputs: sketches bytes [B Hkv, held, 34 C + D + 2]; queries float [B Hkv, query rows, C + D], scaled, the C channels first.
// Output: float [B Hkv, query rows, pages], the log of the sum of the exponentials of the page's scores.
// ---- body
  constexpr int PAGE = 34 * C + D + 2, STEPS = (D + 31) / 32, Q = C + D;
  threadgroup float qs[R * Q];
  const int lane = thread_index_in_simdgroup;
  const int rows = meta[0], held = meta[1], pages = meta[2];
  const int head = threadgroup_position_in_grid.z, row0 = threadgroup_position_in_grid.x * R, n_rows = min(R, rows - row0);
  const size_t row = size_t(head) * rows + row0;
  for (int i = thread_index_in_threadgroup; i < R * Q; i += 32 * NT) {
    qs[i] = i < n_rows * Q ? queries[row * Q + i] * OTQ_LOG2E : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int stride = threadgroups_per_grid.y * NT;
  for (int page = threadgroup_position_in_grid.y * NT + simdgroup_index_in_threadgroup; page < pages; page += stride) {
    const device uchar* at = sketches + (size_t(head) * held + page) * PAGE;
    const device half* scales = (const device half*)(at + 32 * C);
    const device int8_t* means = (const device int8_t*)(at + 34 * C);
    float low[C], high[C], mean[STEPS];
#pragma clang loop unroll(full)
    for (int c = 0; c < C; c++) {
      const float scale = float(scales[c]);
      const uint codes = at[32 * c + lane];
      low[c] = (float(codes & 15u) - 7.5f) * scale;
      high[c] = (float(codes >> 4) - 7.5f) * scale;
    }
    const float width = float(*(const device half*)(means + D));
#pragma clang loop unroll(full)
    for (int i = 0; i < STEPS; i++) {
      const int d = 32 * i + lane;
      mean[i] = d < D ? float(means[d]) * width : 0.0f;
    }
    float weight = 0;
    for (int r = 0; r < R; r++) {  // as many times in all lanes, which reduce together
      const threadgroup float* q = qs + r * Q;
      float a = 0, b = 0, rest = 0;
#pragma clang loop unroll(full)
      for (int c = 0; c < C; c++) {
        a += q[c] * low[c];
        b += q[c] * high[c];
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < STEPS; i++) {
        rest += q[C + min(32 * i + lane, D - 1)] * mean[i];
      }
      const float top = simd_max(max(a, b));
      const float sum = simd_sum(fast::exp2(a - top) + fast::exp2(b - top));
      rest = simd_sum(rest);
      weight = lane == r ? (top + log2(sum) + rest) / OTQ_LOG2E : weight;
    }
    if (lane < n_rows) {
      weights[(row + lane) * pages + page] = weight;
    }
  }
