// Weigh: of pages of 64 packed keys the log of the sum of the exponentials of their scores (attention/pages.py).
//
// Threads: a simdgroup takes one page after the other, a lane two of its keys, as in decode_lanes.metal: a packed word is
// loaded once and unpacked once for R query rows of its KV head, codes are not shifted, and there is one reduction per row
// and page. Row tiles of R are threadgroups side by side; NT simdgroups share the queries.
// Bytes: codes and scales of the pages' keys once per R rows, one float per row and page. Inputs are whole buffers; LISTED:
// the pages are those of pages [B, Hkv, count], where they lie, else the first `count`. A token that a sequence does not have
// counts for nothing; of a page of such tokens the weight is minus infinity, and nothing is read.
//
// Template: T type of queries; KF, KG, KF2 formats (OtqFormat) and group; KE channels of a packed key and of a query; R rows; NT simdgroups; CAP
// softcap. books: 32 lanes of two books. meta = {query rows, KV heads, packed rows, count}; real = {scale, softcap}.
// Output: float [B Hkv, query rows, count].
// ---- body
  constexpr int KN = KF2 ? KE / 2 : KE;  // channels of the first run
  constexpr int KW = otq_words<KF, KN>(), KM = otq_more<KF, KF2, KN>(), KH = otq_halves<KF, KE, KG>();
  threadgroup float4 q_shared[KE * R / 4];
  threadgroup float qsum_shared[(KE + KG - 1) / KG * R];
  threadgroup float* qs = (threadgroup float*)q_shared;

  const int lane = thread_index_in_simdgroup;
  const int rows = meta[0], kv_heads = meta[1], capacity = meta[2], count = meta[3];
  const int head = threadgroup_position_in_grid.z, row0 = threadgroup_position_in_grid.x * R;
  const int held = lens[3 * (head / kv_heads)], packed = held - 64 * max(0, (held + 63) / 64 - count);  // those that are listed
  const auto listed = pages + (LISTED ? head * count : 0);
  const size_t n_row = size_t(head) * rows + row0;

  otq_queries<KF, KG, KE, KE, R>(
      q + n_row * KE, rows - row0, CAP ? real[0] : real[0] * OTQ_LOG2E, qs, qsum_shared, thread_index_in_threadgroup, 32 * NT);

  const device uint* k_head = (const device uint*)k_codes + size_t(head) * capacity * KW;
  const device uchar* km_head = (const device uchar*)k_more + size_t(head) * capacity * KM;
  const device half* ks_head = k_scales + size_t(head) * capacity * KH;
  const float book = otq_looked_up<KF>() ? books[lane] : 0.0f;
  const float book2 = otq_looked_up<KF2>() || KF == OTQ_POLAR ? books[32 + lane] : 0.0f;

  const int stride = threadgroups_per_grid.y * NT;
  for (int page = threadgroup_position_in_grid.y * NT + simdgroup_index_in_threadgroup; page < count; page += stride) {
    const int there = packed - 64 * page;
    uint weight = 0xff800000u;  // minus infinity, in a way that is safe in any math mode
    if (there > 0) {            // the same in all lanes
      OtqKeys<2, R> keys;
#pragma clang loop unroll(full)
      for (int k = 0; k < 2; k++) {
        int row = otq_token<LISTED>(listed, 64 * page) + min(lane + 32 * k, there - 1);
        keys.row[k] = k_head + row * KW;
        keys.more[k] = km_head + row * KM;
        keys.scale[k] = ks_head + row * KH;
      }
      otq_packed_scores<KF, KF2, KN, KG, R, 2>(keys, qs, qsum_shared, book, book2);
#pragma clang loop unroll(full)
      for (int r = 0; r < R; r++) {
        float a = CAP ? otq_capped(keys.s[0][r], real[1]) : keys.s[0][r];
        float b = CAP ? otq_capped(keys.s[1][r], real[1]) : keys.s[1][r];
        a = lane < there ? a : OTQ_MASKED;
        b = lane + 32 < there ? b : OTQ_MASKED;
        const float top = simd_max(max(a, b));
        const float sum = simd_sum(fast::exp2(a - top) + fast::exp2(b - top));
        if (lane == r) {
          weight = as_type<uint>((top + log2(sum)) / OTQ_LOG2E);
        }
      }
    }
    if (lane < min(R, rows - row0)) {
      ((device uint*)weights)[(n_row + lane) * count + page] = weight;
    }
  }
