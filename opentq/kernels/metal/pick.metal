// Pick: of every KV head the pages with the largest shares of the softmax of log weights, summed over query rows, and the
// newest page, ascending.
//
// Threads: a threadgroup of NS simdgroups is a KV head. A simdgroup finds the maximum and the sum of one row; then a thread has
// pages t, t + 32 NS, ... Shares are not negative, so their bits are ordered as they are: the count-th largest is found by
// halving a range of bits, and of those that tie with it the first ones are taken.
// Bytes: weights three times, shares once out and some thirty times in, all from a cache.
//
// Template: NS. meta = {query rows, KV heads, pages, count}. Inputs: weights float [B Hkv, query rows, pages], natural
// logarithms; packed [B] tokens. Outputs: list int [B Hkv, count]; shares float [B Hkv, pages], for the kernel alone. Where a
// sequence has no more pages than are asked for, all of them come first, and what follows is page 0.
// ---- body
  constexpr int T = 32 * NS;
  threadgroup float top_shared[NS];
  threadgroup float inverse_shared[NS];
  threadgroup int sum_shared[NS];
  const int t = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int rows = meta[0], kv_heads = meta[1], pages = meta[2], count = meta[3];
  const int head = threadgroup_position_in_grid.y, tokens = packed[head / kv_heads];
  const int whole = tokens / 64, last = (tokens + 63) / 64 - 1;
  const size_t row = size_t(head) * rows;
  device float* share = shares + size_t(head) * pages;
  device int* chosen = list + size_t(head) * count;
  for (int p = t; p < pages; p += T) {
    share[p] = 0;
  }
  if (last < count) {  // the same in all threads
    for (int i = t; i < count; i += T) {
      chosen[i] = i <= last ? i : 0;
    }
    return;
  }

  for (int r0 = 0; r0 < rows; r0 += NS) {
    const size_t from = (row + min(r0 + simdgroup, rows - 1)) * pages;
    float top = OTQ_LOWEST, total = 0;
    for (int p = lane; p < whole; p += 32) {
      top = max(top, weights[from + p]);
    }
    top = simd_max(top);
    for (int p = lane; p < whole; p += 32) {
      total += fast::exp2((weights[from + p] - top) * OTQ_LOG2E);
    }
    total = simd_sum(total);
    if (lane == 0) {
      top_shared[simdgroup] = top;
      inverse_shared[simdgroup] = top < -OTQ_LOWEST && total > 0 ? 1 / total : 0;  // a row that is not finite has no say
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < min(NS, rows - r0); i++) {
      const float high = top_shared[i], inverse = inverse_shared[i];
      for (int p = t; p < whole && inverse > 0; p += T) {
        share[p] += fast::exp2((weights[(row + r0 + i) * pages + p] - high) * OTQ_LOG2E) * inverse;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  uint low = 0, high = 0x7f800000u;
  int more = 0;  // pages above `high`'s share
  while (high - low > 1) {
    const uint middle = low + (high - low) / 2;
    int above = 0;
    for (int p = t; p < last; p += T) {
      above += as_type<uint>(share[p]) >= middle ? 1 : 0;
    }
    above = simd_sum(above);
    if (lane == 0) {
      sum_shared[simdgroup] = above;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    above = simd_sum(lane < NS ? sum_shared[lane] : 0);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (above >= count - 1) {
      low = middle;
    } else {
      high = middle;
      more = above;
    }
  }

  const int room = count - 1 - more;  // for pages of that share
  int taken = 0, tied = 0;
  for (int p0 = 0; p0 < last; p0 += T) {
    const int p = p0 + t;
    const uint bits = p < last ? as_type<uint>(share[p]) : 0u;
    const bool above = p < last && bits > low, tie = p < last && bits == low;
    const int both = (above ? 1 : 0) + (tie ? 1 << 16 : 0);
    int before = simd_prefix_exclusive_sum(both), all = simd_sum(both);
    if (lane == 0) {
      sum_shared[simdgroup] = all;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    before += simd_sum(lane < simdgroup ? sum_shared[lane] : 0);
    all = simd_sum(lane < NS ? sum_shared[lane] : 0);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int ties = tied + (before >> 16);
    if (above || (tie && ties < room)) {
      chosen[taken + (before & 0xffff) + min(ties, room)] = p;
    }
    taken += all & 0xffff;
    tied += all >> 16;
  }
  if (t == 0) {
    chosen[count - 1] = last;
  }
