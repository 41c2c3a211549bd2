// Attention with 8x8 simdgroup matrices: prefill over a compressed prefix, and the second variant of decode.
//
// Rows are the (head, token) pairs that share a KV head; a simdgroup owns 8 of them, with its queries and its output in
// matrix registers. Keys, then values, come in tiles of TK tokens: decoded once into threadgroup memory as TT, multiplied
// from there. Scores go through threadgroup memory for the softmax, four lanes to a row. Only documented operations are
// used: rows are rescaled by a product with a diagonal matrix, and no lane knows which elements it holds.
//   OWN = false (prefill)  NSG simdgroups have NSG * 8 different rows and decode every tile together: 2 threadgroup barriers
//                          per half tile; K and V bytes are fetched once per NSG * 8 rows.
//   OWN = true (decode)    all simdgroups have the same 8 rows and run through tiles of their own, without threadgroup
//                          barriers: every packed byte is fetched once.
// FINAL: one split, so the output is divided, joined by the sinks, and written as OT; else OT is float and the merge kernel
// does that. Arrays, lens, meta and real as in decode_lanes.metal. Grid: (32 * NSG, splits, KV heads * row tiles).

// Codes of eight consecutive values from d0 (a multiple of 8).
template <int FORMAT, int D>
METAL_FUNC void otq_eight(const device uint* row, int d0, thread uint* c) {
  constexpr int LOW = otq_low<FORMAT>(), HIGH = otq_high<FORMAT>();
  if (LOW == 8) {
    uint2 w = ((const device uint2*)row)[d0 / 8];
#pragma clang loop unroll(full)
    for (int j = 0; j < 4; j++) {
      c[j] = (w.x >> (8 * j)) & 255u;
      c[j + 4] = (w.y >> (8 * j)) & 255u;
    }
    return;
  }
  uint w, h = 0;
  if (LOW == 4) {
    w = row[d0 / 8];
  } else if (LOW == 2) {
    w = ((const device ushort*)row)[d0 / 8];
  } else {
    w = ((const device uchar*)row)[d0 / 8];
  }
  if (HIGH == 1) {
    h = ((const device uchar*)(row + otq_low_words<FORMAT, D>()))[d0 / 8];
  } else if (HIGH == 2) {
    h = ((const device ushort*)(row + otq_low_words<FORMAT, D>()))[d0 / 8];
  }
#pragma clang loop unroll(full)
  for (int j = 0; j < 8; j++) {
    c[j] = (w >> (LOW * j)) & ((1u << LOW) - 1u);
    if (HIGH > 0) {
      c[j] |= ((h >> (HIGH * j)) & ((1u << HIGH) - 1u)) << LOW;
    }
  }
}

// A decoded vector may be longer than the original.
template <typename TT>
METAL_FUNC TT otq_fit(float x) {
  return TT(sizeof(TT) == 2 ? clamp(x, -65504.0f, 65504.0f) : x);
}

// The value of a code.
template <typename TT, int FORMAT>
METAL_FUNC TT otq_value(uint code, half2 sz, float book) {
  if (otq_looked_up<FORMAT>()) {
    return otq_fit<TT>(otq_entry<FORMAT>(book, code) * float(sz.x));
  }
  return fma(TT(code), TT(sz.x), TT(sz.y));
}

// D channels of TK tokens from token `from`, of G groups in all, decoded into `tile` ([TK][STRIDE]) by WORKERS threads. Tokens
// from `limit` on, and dense columns in the gap, repeat a valid one; their scores are masked and their weights are 0.
template <typename TT, int FORMAT, int D, int GROUP, int G, int STRIDE, int TK, int WORKERS>
METAL_FUNC void otq_decode(
    const device uint* rows, const device uchar* more, const device half* scales, int from, int limit, int2 gap,
    threadgroup TT* tile, int worker, float book, float book2) {
  constexpr int W = otq_words<FORMAT, D>(), C = D / 8;
  constexpr bool EVEN = WORKERS % C == 0;  // then a thread keeps its dims
  int t = worker / C, d0 = worker % C * 8;
  for (int i = 0; i < TK * C; i += WORKERS) {  // as many times in all lanes, so that they can look up together
    if (!EVEN) {
      t = (i + worker) / C;
      d0 = (i + worker) % C * 8;
    }
    int at = min(from + t, limit - 1);
    at = at >= gap.x && at < gap.y ? min(gap.y, limit - 1) : at;
    vec<TT, 4> low, high;
    if (FORMAT == OTQ_HALF) {
      uint4 w = ((const device uint4*)(rows + at * W))[d0 / 8];
      low = vec<TT, 4>(half4(as_type<half2>(w.x), as_type<half2>(w.y)));
      high = vec<TT, 4>(half4(as_type<half2>(w.z), as_type<half2>(w.w)));
    } else if (FORMAT == OTQ_POLAR) {
      OtqBlock<D> block;
      block.load(rows + at * W, more + at * otq_more<FORMAT, 0, D>(), scales + at * (D / 16), d0 / 16);
      float4 a = block.four(d0 / 4 & 2, book, book2), b = block.four((d0 / 4 & 2) + 1, book, book2);
      low.x = otq_fit<TT>(a.x), low.y = otq_fit<TT>(a.y), low.z = otq_fit<TT>(a.z), low.w = otq_fit<TT>(a.w);
      high.x = otq_fit<TT>(b.x), high.y = otq_fit<TT>(b.y), high.z = otq_fit<TT>(b.z), high.w = otq_fit<TT>(b.w);
    } else {
      uint c[8];
      otq_eight<FORMAT, D>(rows + at * W, d0, c);
      half2 sz = otq_scale<FORMAT>(scales, at * G + d0 / GROUP);
      low.x = otq_value<TT, FORMAT>(c[0], sz, book);
      low.y = otq_value<TT, FORMAT>(c[1], sz, book);
      low.z = otq_value<TT, FORMAT>(c[2], sz, book);
      low.w = otq_value<TT, FORMAT>(c[3], sz, book);
      high.x = otq_value<TT, FORMAT>(c[4], sz, book);
      high.y = otq_value<TT, FORMAT>(c[5], sz, book);
      high.z = otq_value<TT, FORMAT>(c[6], sz, book);
      high.w = otq_value<TT, FORMAT>(c[7], sz, book);
    }
    if (TK * C % WORKERS == 0 || t < TK) {
      threadgroup vec<TT, 4>* to = (threadgroup vec<TT, 4>*)(tile + t * STRIDE + d0);
      to[0] = low;
      to[1] = high;
    }
    t += WORKERS / C;
  }
}

// score += query . keys, over D channels of a tile.
template <typename TT, int D, int TK, int STRIDE>
METAL_FUNC void otq_products(
    const thread simdgroup_matrix<TT, 8, 8>* query, const threadgroup TT* tile,
    thread simdgroup_matrix<float, 8, 8>* score) {
#pragma clang loop unroll(full)
  for (int d = 0; d < D / 8; d++) {
#pragma clang loop unroll(full)
    for (int t = 0; t < TK / 8; t++) {
      simdgroup_matrix<TT, 8, 8> k;
      simdgroup_load(k, tile + t * 8 * STRIDE + d * 8, STRIDE, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(score[t], query[d], k, score[t]);
    }
  }
}
// ---- body
  constexpr int KN = KF2 ? KE / 2 : KE, VN = VF2 ? DV / 2 : DV;  // channels of the first run
  constexpr int KQ = QE - KE;                                    // query channels that packed keys do not meet
  constexpr int KW = otq_words<KF, KN>(), VW = otq_words<VF, VN>();
  constexpr int KM = otq_more<KF, KF2, KN>(), VM = otq_more<VF, VF2, VN>();
  constexpr int KH = otq_halves<KF, KE, KG>(), VH = otq_halves<VF, DV, VG>();
  constexpr int GK = (KE + KG - 1) / KG, GV = (DV + VG - 1) / VG;
  constexpr int KS = KE + 8, VS = DV + 8;  // elements from token to token of a tile
  constexpr int DMAX = KE > DV ? KE : DV;
  constexpr int COLS = TK / 4;  // score columns of a lane

  threadgroup float4 tile_shared[(OWN ? NSG : 1) * TK * (DMAX + 8) * sizeof(TT) / 16];
  threadgroup float s_shared[NSG * 8 * TK];
  threadgroup TT p_shared[NSG * 8 * TK];
  threadgroup float diagonal_shared[NSG * 64];

  const int lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int L = meta[0], gqa = meta[1], kv_heads = meta[2], Td = meta[3], capacity = meta[4], window = meta[5];
  const bool causal = meta[6] != 0;
  constexpr int ROWS = OWN ? 8 : 8 * NSG;
  const int row_tiles = (gqa * L + ROWS - 1) / ROWS;
  const int z = threadgroup_position_in_grid.z;
  const int head = z / row_tiles, b = head / kv_heads;
  const int tile_row = (z % row_tiles) * ROWS;         // first row of the threadgroup
  const int row0 = tile_row + (OWN ? 0 : 8 * sg);      // first row of the simdgroup
  const int n_rows = gqa * L - row0;                   // rows that exist; may be above 8, or not positive
  const int packed = lens[3 * b], sink = lens[3 * b + 1], tail_start = lens[3 * b + 2];
  const int splits = threadgroups_per_grid.y * (OWN ? NSG : 1);
  const int split = OWN ? int(threadgroup_position_in_grid.y) * NSG + sg : int(threadgroup_position_in_grid.y);

  threadgroup TT* tile = (threadgroup TT*)tile_shared + (OWN ? sg * TK * (DMAX + 8) : 0);
  threadgroup float* ss = s_shared + sg * 8 * TK;
  threadgroup TT* ps = p_shared + sg * 8 * TK;
  threadgroup float* dg = diagonal_shared + sg * 64;

  const size_t q_row = size_t(head) * gqa * L + row0;
  simdgroup_matrix<TT, 8, 8> query[QE / 8];
#pragma clang loop unroll(full)
  for (int d = 0; d < QE / 8; d++) {
    for (int i = lane; i < 64; i += 32) {
      ps[i] = i / 8 < n_rows ? TT(float(q[(q_row + i / 8) * QE + d * 8 + i % 8])) : TT(0.0f);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(query[d], ps, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  simdgroup_matrix<float, 8, 8> acc[DV / 8];
#pragma clang loop unroll(full)
  for (int d = 0; d < DV / 8; d++) {
    acc[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }

  // Positions: of this lane's row, and of the threadgroup's first and last token.
  const int q_position = sink + packed + Td - tail_start - L;
  const int row = lane / 4, col = lane % 4 * COLS;
  const int at_row = q_position + (row0 + row) % L;
  int oldest = 0, newest = L - 1;
  if (tile_row / L == (tile_row + ROWS - 1) / L) {
    oldest = tile_row % L;
    newest = min(L - 1, oldest + ROWS - 1);
  }
  int first = 0;
  if (WIN) {
    first = max(0, min(packed, q_position + oldest + 1 - window - sink)) / TK * TK;
  }
  const int packed_tiles = (packed - first + TK - 1) / TK;
  int columns = Td;
  if (causal) {
    columns = max(sink, Td - L + newest + 1);
  }
  const int tiles = packed_tiles + (columns + TK - 1) / TK;
  const int share = (tiles + splits - 1) / splits;
  const int tile0 = min(tiles, split * share), tile1 = min(tiles, tile0 + share);

  const device uint* k_head = (const device uint*)k_codes + size_t(head) * capacity * KW;
  const device uint* v_head = (const device uint*)v_codes + size_t(head) * capacity * VW;
  const device uchar* km_head = (const device uchar*)k_more + size_t(head) * capacity * KM;
  const device uchar* vm_head = (const device uchar*)v_more + size_t(head) * capacity * VM;
  const device half* ks_head = k_scales + size_t(head) * capacity * KH;
  const device half* vs_head = v_scales + size_t(head) * capacity * VH;
  const device uint* dk_head = (const device uint*)dense_k + size_t(head) * Td * (DK / 2);
  const device uint* dv_head = (const device uint*)dense_v + size_t(head) * Td * (DV / 2);
  const int worker = OWN ? lane : int(thread_index_in_threadgroup);
  constexpr int WORKERS = OWN ? 32 : 32 * NSG;
  const float k_book = otq_looked_up<KF>() ? books[lane] : 0.0f;
  const float k_book2 = otq_looked_up<KF2>() || KF == OTQ_POLAR ? books[32 + lane] : 0.0f;
  const float v_book = otq_looked_up<VF>() ? books[64 + lane] : 0.0f;
  const float v_book2 = otq_looked_up<VF2>() || VF == OTQ_POLAR ? books[96 + lane] : 0.0f;

  float top = OTQ_LOWEST, sum = 0;
  for (int n = tile0; n < tile1; n++) {
    const bool dense = n >= packed_tiles;
    const int from = dense ? (n - packed_tiles) * TK : first + n * TK;
    const int limit = dense ? Td : packed;
    const int2 gap = int2(sink, tail_start);

    if (dense) {
      otq_decode<TT, OTQ_HALF, DK, DK, 1, KS, TK, WORKERS>(
          dk_head, km_head, ks_head, from, limit, gap, tile, worker, k_book, k_book2);
    } else {
      otq_decode<TT, KF, KN, KG, GK, KS, TK, WORKERS>(
          k_head, km_head, ks_head, from, limit, int2(0), tile, worker, k_book, k_book2);
      if (KF2) {
        otq_decode<TT, (KF2 ? KF2 : KF), KN, KG, GK, KS, TK, WORKERS>(
            (const device uint*)km_head, km_head, ks_head + 1, from, limit, int2(0), tile + KN, worker, k_book2, k_book2);
      }
    }
    if (OWN) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
    } else {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    simdgroup_matrix<float, 8, 8> score[TK / 8];
#pragma clang loop unroll(full)
    for (int t = 0; t < TK / 8; t++) {
      score[t] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    if (QE > DK && dense) {
      otq_products<TT, DK, TK, KS>(query, tile, score);
    } else {
      otq_products<TT, KE, TK, KS>(query + KQ / 8, tile, score);
    }
#pragma clang loop unroll(full)
    for (int t = 0; t < TK / 8; t++) {
      simdgroup_store(score[t], ss + t * 8, TK);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    float s[COLS], fresh = top;
#pragma clang loop unroll(full)
    for (int c = 0; c < COLS; c++) {
      int key = from + col + c;
      int position = dense ? otq_position(key, packed, sink, tail_start) : sink + key;
      bool seen = key < limit && (!dense || key < sink || key >= tail_start);
      seen = seen && (!causal || !dense || position <= at_row) && (!WIN || position > at_row - window);
      float x = ss[row * TK + col + c] * real[0];
      x = CAP ? precise::tanh(x / real[1]) * (real[1] * OTQ_LOG2E) : x * OTQ_LOG2E;
      s[c] = seen ? x : OTQ_MASKED;
      fresh = max(fresh, s[c]);
    }
    fresh = max(fresh, simd_shuffle_xor(fresh, 1));
    fresh = max(fresh, simd_shuffle_xor(fresh, 2));
    float factor = fast::exp2(top - fresh);
    bool moved = simd_any(fresh != top);
    top = fresh;
    sum *= factor;
#pragma clang loop unroll(full)
    for (int c = 0; c < COLS; c++) {
      TT p = TT(fast::exp2(s[c] - top));
      sum += float(p);
      ps[row * TK + col + c] = p;
    }
    if (moved) {
      dg[row * 8 + lane % 4 * 2] = row == lane % 4 * 2 ? factor : 0.0f;
      dg[row * 8 + lane % 4 * 2 + 1] = row == lane % 4 * 2 + 1 ? factor : 0.0f;
      simdgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_matrix<float, 8, 8> diagonal;
      simdgroup_load(diagonal, dg, 8);
#pragma clang loop unroll(full)
      for (int d = 0; d < DV / 8; d++) {
        simdgroup_multiply(acc[d], diagonal, acc[d]);
      }
    }
    if (!OWN) {  // all have read the keys, and the values take their place; one simdgroup's own order is kept above
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (dense) {
      otq_decode<TT, OTQ_HALF, DV, DV, 1, VS, TK, WORKERS>(
          dv_head, vm_head, vs_head, from, limit, gap, tile, worker, v_book, v_book2);
    } else {
      otq_decode<TT, VF, VN, VG, GV, VS, TK, WORKERS>(
          v_head, vm_head, vs_head, from, limit, int2(0), tile, worker, v_book, v_book2);
      if (VF2) {
        otq_decode<TT, (VF2 ? VF2 : VF), VN, VG, GV, VS, TK, WORKERS>(
            (const device uint*)vm_head, vm_head, vs_head + 1, from, limit, int2(0), tile + VN, worker, v_book2, v_book2);
      }
    }
    if (OWN) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
    } else {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
#pragma clang loop unroll(full)
    for (int t = 0; t < TK / 8; t++) {
      simdgroup_matrix<TT, 8, 8> p;
      simdgroup_load(p, ps + t * 8, TK);
#pragma clang loop unroll(full)
      for (int d = 0; d < DV / 8; d++) {
        simdgroup_matrix<TT, 8, 8> v;
        simdgroup_load(v, tile + t * 8 * VS + d * 8, VS);
        simdgroup_multiply_accumulate(acc[d], p, v, acc[d]);
      }
    }
    if (OWN) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
    } else {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  sum += simd_shuffle_xor(sum, 1);
  sum += simd_shuffle_xor(sum, 2);
  float inverse = 1;
  if (FINAL) {
    float total = sum;
    if (SINK) {
      float sink_score = float(sinks[(head % kv_heads) * gqa + min(row0 + row, gqa * L - 1) / L]) * OTQ_LOG2E;
      float highest = max(top, sink_score);
      inverse = fast::exp2(top - highest);
      total = sum * inverse + fast::exp2(sink_score - highest);
    }
    inverse = total > 0 ? inverse / total : 0;
  }
  dg[row * 8 + lane % 4 * 2] = row == lane % 4 * 2 ? inverse : 0.0f;
  dg[row * 8 + lane % 4 * 2 + 1] = row == lane % 4 * 2 + 1 ? inverse : 0.0f;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<float, 8, 8> diagonal;
  simdgroup_load(diagonal, dg, 8);
#pragma clang loop unroll(full)
  for (int d = 0; d < DV / 8; d++) {
    simdgroup_multiply(acc[d], diagonal, acc[d]);
    simdgroup_store(acc[d], ss, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = lane; i < 64; i += 32) {
      if (i / 8 < n_rows) {
        out[((q_row + i / 8) * splits + split) * (FINAL ? DV : DV + 2) + d * 8 + i % 8] = OT(ss[i]);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (!FINAL && lane % 4 == 0 && row < n_rows) {
    const size_t behind = ((q_row + row) * splits + split) * (DV + 2) + DV;
    out[behind] = OT(top);
    out[behind + 1] = OT(sum);
  }
