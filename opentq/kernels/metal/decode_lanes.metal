// Decode, lane layout: attention of a few query rows over [packed | dense], one pass over the compressed bytes.
//
// Threads: a team of DS simdgroups owns a run of tiles of one KV head and all its query rows, at most R (the heads that
// share the KV head, times the tokens of the call), NT teams to a threadgroup, so every packed byte is fetched once for all R rows.
//   keys     a lane is a key (KPL of them): its dot products with all rows stay in the lane, so there is no reduction per
//            key; q is read from threadgroup memory at an address all lanes share; a word is unpacked once for R rows.
//   softmax  one simd_max per row and tile; exp2; the running sum stays per lane until the end.
//   values   a lane is four dims: it adds p * scale (from threadgroup memory) times the code, one word for R rows. The
//            zeros are a small product of their own, p times zero per group, shared out over the lanes as (row, group).
// Bytes: codes and scales of the visible packed tokens once, dense columns once, one float partial [DV + 2] per row and
// team. Inputs are whole buffers, row-contiguous; how much of them counts stands in lens = (packed, sinks, tail start). LISTED:
// of packed tokens those of pages [B, Hkv, listed] are read, 64 a page, ascending, as if they stood behind each other.
//
// Template: KF, KG, VF, VG formats (OtqFormat) and groups; KF2, VF2 of a second run of codes, or OTQ_NONE; DK, DV; KE
// channels of packed keys, QE of a query; R rows; KPL keys a lane; DS simdgroups a team; NT teams; SUB keys that a simdgroup
// hands over at a time; WIN window; CAP softcap. Where keys are packed as a sketch, a query is longer than a key: its first
// DK channels meet dense keys, its last KE packed ones (maybe all of it). k_more, v_more: codes of second runs, or polar's
// second array. books: 32 lanes of the two books of keys, then of values. meta = {L, gqa, KV heads, dense columns, packed
// rows, window, causal, listed}; real = {scale, softcap}. Output: float [rows, splits, DV + 2], acc before (max, sum).
// ---- body
  constexpr int KN = KF2 ? KE / 2 : KE, VN = VF2 ? DV / 2 : DV;  // channels of the first run
  constexpr int KQ = QE - KE;                                    // query channels that packed keys do not meet
  constexpr int KW = otq_words<KF, KN>(), VW = otq_words<VF, VN>();
  constexpr int KM = otq_more<KF, KF2, KN>(), VM = otq_more<VF, VF2, VN>();
  constexpr int KH = otq_halves<KF, KE, KG>(), VH = otq_halves<VF, DV, VG>();
  constexpr int GK = (KE + KG - 1) / KG, GV = (DV + VG - 1) / VG;
  constexpr int SPAN = SUB * DS;        // keys handed over at a time by a team
  constexpr int TILE = 32 * KPL * DS;   // keys of a tile
  constexpr int DIMS = DV / DS;         // dims of a simdgroup
  constexpr int LANES = DIMS / 4;       // lanes that they keep busy
  constexpr int KP = LANES <= 16 ? 2 : 1;
  constexpr int PAIRS = (R * GV + 32 * DS - 1) / (32 * DS);

  threadgroup float4 q_shared[QE * R / 4];
  threadgroup float qsum_shared[GK * R];
  threadgroup float4 pv_shared[NT * SPAN * GV * R / 4];
  threadgroup float p_shared[NT * SPAN * R];
  threadgroup float z_shared[NT * SPAN * GV];
  threadgroup float team_shared[NT * 2 * DS * R];
  threadgroup float az_shared[NT * GV * R];

  const int lane = thread_index_in_simdgroup;
  const int simdgroup = simdgroup_index_in_threadgroup;
  const int team = simdgroup / DS, member = simdgroup % DS;
  const int L = meta[0], gqa = meta[1], kv_heads = meta[2], Td = meta[3], capacity = meta[4], window = meta[5];
  const bool causal = meta[6] != 0;
  const int head = threadgroup_position_in_grid.z, b = head / kv_heads, n_rows = gqa * L;
  const int held = lens[3 * b], sink = lens[3 * b + 1], tail_start = lens[3 * b + 2];
  const int packed = LISTED ? held - 64 * max(0, (held + 63) / 64 - meta[7]) : held;  // those that are read
  const auto listed = pages + (LISTED ? head * meta[7] : 0);
  const int splits = threadgroups_per_grid.y * NT, split = threadgroup_position_in_grid.y * NT + team;

  threadgroup float* qs = (threadgroup float*)q_shared;
  threadgroup float* pv = (threadgroup float*)pv_shared + team * SPAN * GV * R;
  threadgroup float* ps = p_shared + team * SPAN * R;
  threadgroup float* zs = z_shared + team * SPAN * GV;
  threadgroup float* ts = team_shared + team * 2 * DS * R;
  threadgroup float* az = az_shared + team * GV * R;

  otq_queries<KF, KG, KE, QE, R>(
      q + size_t(head) * n_rows * QE, n_rows, CAP ? real[0] : real[0] * OTQ_LOG2E, qs, qsum_shared,
      thread_index_in_threadgroup, 32 * DS * NT);

  // Position of the row with the query's first token; row r is r % L further.
  const int q_position = sink + packed + Td - tail_start - L;
  int first = 0;
  if (WIN) {
    first = max(0, min(packed, q_position + 1 - window - sink)) / TILE * TILE;
  }
  const int packed_tiles = (packed - first + TILE - 1) / TILE;
  const int tiles = packed_tiles + (Td + TILE - 1) / TILE;
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

  const float k_book = otq_looked_up<KF>() ? books[lane] : 0.0f;
  const float k_book2 = otq_looked_up<KF2>() || KF == OTQ_POLAR ? books[32 + lane] : 0.0f;
  const float v_book = otq_looked_up<VF>() ? books[(VF2 && lane >= 16 ? 96 : 64) + lane] : 0.0f;  // of two runs: 16 entries of each
  const float v_book2 = VF == OTQ_POLAR ? books[96 + lane] : 0.0f;
  const bool busy = lane % (32 / KP) < LANES;  // the others do what the last one does, and do not write
  const int d0 = member * DIMS + 4 * min(lane % (32 / KP), LANES - 1);
  const int half_of = KP == 2 ? lane / 16 : 0;
  const int pair = lane + 32 * member;  // this lane's first (row, group) pair
  const int my_group = d0 / VG;
  const bool second = VF2 && d0 >= VN;
  const OtqRows<VF, VF2, DV> packed_v = {second ? (const device uint*)vm_head : v_head, vm_head, vs_head, second};
  const OtqRows<OTQ_HALF, OTQ_NONE, DV> dense_v_rows = {dv_head, vm_head, vs_head, false};

  OtqAcc<R> acc;
  OtqZeros<R, GV, PAIRS> zero;
  float top[R], sum[R];
#pragma clang loop unroll(full)
  for (int r = 0; r < R; r++) {
    top[r] = OTQ_LOWEST;
    sum[r] = acc.x[r][0] = acc.x[r][1] = acc.x[r][2] = acc.x[r][3] = 0;
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < PAIRS; i++) {
    zero.sum[i] = 0;
  }

  for (int tile = tile0; tile < tile1; tile++) {
    const bool dense = tile >= packed_tiles;
    const int base = dense ? (tile - packed_tiles) * TILE : first + tile * TILE;
    const int limit = dense ? Td : packed;

    OtqKeys<KPL, R> keys;
    int key[KPL], row[KPL];
#pragma clang loop unroll(full)
    for (int k = 0; k < KPL; k++) {
      key[k] = base + k * 32 * DS + (lane / SUB) * SPAN + member * SUB + lane % SUB;
      int safe = min(key[k], limit - 1);
      row[k] = dense ? safe : otq_token<LISTED>(listed, safe);
      keys.row[k] = dense ? dk_head + safe * (DK / 2) : k_head + row[k] * KW;
      keys.more[k] = km_head + row[k] * (dense ? 0 : KM);
      keys.scale[k] = ks_head + row[k] * (dense ? 0 : KH);
    }
    if (dense) {
      otq_scores<OTQ_HALF, DK, DK, R, KPL, KF, 0>(keys, qs, qsum_shared, k_book, k_book2);
    } else {
      otq_packed_scores<KF, KF2, KN, KG, R, KPL>(keys, qs + KQ * R, qsum_shared, k_book, k_book2);
    }

    if (CAP) {
#pragma clang loop unroll(full)
      for (int k = 0; k < KPL; k++) {
#pragma clang loop unroll(full)
        for (int r = 0; r < R; r++) {
          keys.s[k][r] = otq_capped(keys.s[k][r], real[1]);
        }
      }
    }
    if (WIN || dense || base + TILE > limit) {  // else all keys of the tile are there for all rows
#pragma clang loop unroll(full)
      for (int k = 0; k < KPL; k++) {
        bool there = key[k] < limit && (!dense || key[k] < sink || key[k] >= tail_start);
        int position = dense ? otq_position(key[k], packed, sink, tail_start) : sink + key[k];
#pragma clang loop unroll(full)
        for (int r = 0; r < R; r++) {
          int at = q_position + r % L;
          bool seen = there && (!causal || position <= at) && (!WIN || position > at - window);
          keys.s[k][r] = seen ? keys.s[k][r] : OTQ_MASKED;
        }
      }
    }
    float fresh[R];
#pragma clang loop unroll(full)
    for (int r = 0; r < R; r++) {
      fresh[r] = top[r];
#pragma clang loop unroll(full)
      for (int k = 0; k < KPL; k++) {
        fresh[r] = max(fresh[r], keys.s[k][r]);
      }
    }
    bool moved = false;
#pragma clang loop unroll(full)
    for (int r = 0; r < R; r++) {
      fresh[r] = simd_max(fresh[r]);
      if (DS == 1) {
        moved = moved || fresh[r] != top[r];
      } else if (lane == r) {
        ts[member * R + r] = fresh[r];
      }
    }
    if (DS > 1) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
      for (int r = 0; r < R; r++) {
        for (int m = 0; m < DS; m++) {
          fresh[r] = max(fresh[r], ts[m * R + r]);
        }
        moved = moved || fresh[r] != top[r];
      }
    }
    if (moved) {  // the same in all lanes of the team
#pragma clang loop unroll(full)
      for (int r = 0; r < R; r++) {
        float f = fast::exp2(top[r] - fresh[r]);
        top[r] = fresh[r];
        sum[r] *= f;
        acc.x[r][0] *= f;
        acc.x[r][1] *= f;
        acc.x[r][2] *= f;
        acc.x[r][3] *= f;
        if (lane == r) {
          ts[(DS + member) * R + r] = f;
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
      for (int i = 0; i < PAIRS; i++) {
        int c = pair + 32 * DS * i;
        zero.sum[i] *= c < R * GV ? ts[(DS + member) * R + c % R] : 0.0f;
      }
    }
#pragma clang loop unroll(full)
    for (int k = 0; k < KPL; k++) {
#pragma clang loop unroll(full)
      for (int r = 0; r < R; r++) {
        keys.s[k][r] = fast::exp2(keys.s[k][r] - top[r]);
        sum[r] += keys.s[k][r];
      }
      for (int h = 0; h < 32 / SUB; h++) {
        const int from = base + k * 32 * DS + h * SPAN;
        const int n = min(SPAN, limit - from);
        if (n <= 0) {
          break;
        }
        const int start = dense ? from : otq_token<LISTED>(listed, from);  // SPAN tokens lie in one page
        if (lane / SUB == h) {
          const int slot = member * SUB + lane % SUB;
          for (int g = 0; g < GV; g++) {
            float2 sz = float2(1.0f, 0.0f);
            if (VF != OTQ_HALF && VF != OTQ_POLAR && !dense) {
              sz = float2(otq_scale<VF>(vs_head, row[k] * GV + g));
            }
            zs[slot * GV + g] = sz.y;
#pragma clang loop unroll(full)
            for (int r = 0; r < R; r++) {
              pv[(slot * GV + g) * R + r] = keys.s[k][r] * sz.x;
            }
          }
#pragma clang loop unroll(full)
          for (int r = 0; r < R; r++) {
            ps[slot * R + r] = keys.s[k][r];
          }
        }
        otq_team_barrier<DS>();
        if (dense) {
          int3 gap = int3(sink, tail_start, Td - 1) - from;
          otq_values<OTQ_HALF, OTQ_NONE, DV, VF, R, KP, GV * R, true>(
              dense_v_rows, from, gap, n, half_of, d0, pv + my_group * R, v_book, v_book2, acc);
        } else if (n == SPAN) {  // the usual case, with a length known to the compiler
          otq_values<VF, VF2, DV, VF, R, KP, GV * R, false>(
              packed_v, start, int3(0), SPAN, half_of, d0, pv + my_group * R, v_book, v_book2, acc);
          if (otq_integers<VF>()) {
            zero.add(ps, zs, SPAN, pair, 32 * DS);
          }
        } else {
          otq_values<VF, VF2, DV, VF, R, KP, GV * R, true>(
              packed_v, start, int3(0, 0, n - 1), n, half_of, d0, pv + my_group * R, v_book, v_book2, acc);
          if (otq_integers<VF>()) {
            zero.add(ps, zs, n, pair, 32 * DS);
          }
        }
        otq_team_barrier<DS>();
      }
    }
  }

  // The team's partial result.
#pragma clang loop unroll(full)
  for (int i = 0; i < PAIRS; i++) {
    int c = pair + 32 * DS * i;
    if (c < R * GV) {
      az[c] = zero.sum[i];
    }
  }
#pragma clang loop unroll(full)
  for (int r = 0; r < R; r++) {
    float total = simd_sum(sum[r]);
    if (lane == r) {
      ts[member * R + r] = total;
    }
    if (KP == 2) {
#pragma clang loop unroll(full)
      for (int j = 0; j < 4; j++) {
        acc.x[r][j] += simd_shuffle_xor(acc.x[r][j], 16);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
  for (int r = 0; r < R; r++) {
    if (r < n_rows) {
      size_t at = ((size_t(head) * n_rows + r) * splits + split) * (DV + 2);
      if (busy && half_of == 0) {
#pragma clang loop unroll(full)
        for (int j = 0; j < 4; j++) {
          partial[at + d0 + j] = acc.x[r][j] * otq_pow2(-otq_field<VF>() * j) + az[my_group * R + r];
        }
      }
      if (member == 0 && lane == 0) {
        float total = 0;
        for (int m = 0; m < DS; m++) {
          total += ts[m * R + r];
        }
        partial[at + DV] = top[r];
        partial[at + DV + 1] = total;
      }
    }
  }
