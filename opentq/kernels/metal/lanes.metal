// What decode_lanes.metal and weigh.metal are made of: scores of packed or dense keys, a lane a key; weighted values, a lane
// four dims. R query rows, KPL keys a lane; all else is said there.

// A KV head's query rows, transposed to [dim][row], with a factor and the weights of the packed keys, which meet the last KE of
// QE channels; then these channels' sums over groups, without the weights. Rows from n_rows on are 0.
template <int KF, int KG, int KE, int QE, int R, class Queries>
METAL_FUNC void otq_queries(
    Queries q, int n_rows, float factor, threadgroup float* qs, threadgroup float* qsum, int thread_index, int threads) {
  for (int i = thread_index; i < QE * R; i += threads) {
    int r = i % R, d = i / R;
    qs[i] = r < n_rows ? float(q[r * QE + d]) * factor * otq_pow2(-otq_shift<KF>(d)) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < (KE + KG - 1) / KG * R; i += threads) {
    float sum = 0;
    for (int d = i / R * KG; d < min(KE, i / R * KG + KG); d++) {
      sum += qs[(QE - KE + d) * R + i % R] * otq_pow2(otq_shift<KF>(d));
    }
    qsum[i] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Where a lane's keys are, and their scores against R rows.
template <int KPL, int R>
struct OtqKeys {
  const device uint* row[KPL];
  const device uchar* more[KPL];
  const device half* scale[KPL];
  float s[KPL][R];
};

// A lane's four output dims, weighted, of R rows.
template <int R>
struct OtqAcc {
  float x[R][4];
};

// The scores of D channels. RUN 1: those of a second run of codes, which has the second array and scale, are added.
template <int FORMAT, int D, int GROUP, int R, int KPL, int QF, int RUN>
METAL_FUNC void otq_scores(
    thread OtqKeys<KPL, R>& keys, const threadgroup float* q, const threadgroup float* qsum, float book,
    float book2) {
  constexpr int UNIT = FORMAT == OTQ_POLAR ? 16 : D % 32 == 0 ? 32 : D % 16 == 0 ? 16 : 8;
  constexpr int PER = (GROUP < D ? GROUP : D) / UNIT;
#pragma clang loop unroll(full)
  for (int k = 0; k < KPL; k++) {
#pragma clang loop unroll(full)
    for (int r = 0; r < R; r++) {
      keys.s[k][r] = RUN ? keys.s[k][r] : 0.0f;
    }
  }
  int g = 0;
  for (int u0 = 0; u0 < D / UNIT; u0 += PER, g++) {
    float part[KPL][R];
#pragma clang loop unroll(full)
    for (int k = 0; k < KPL; k++) {
#pragma clang loop unroll(full)
      for (int r = 0; r < R; r++) {
        part[k][r] = 0;
      }
    }
    int stop = min(u0 + PER, D / UNIT);
    for (int u = u0; u < stop; u++) {
      OtqUnit<FORMAT, D, UNIT> unit[KPL];
#pragma clang loop unroll(full)
      for (int k = 0; k < KPL; k++) {
        const device uint* row = RUN ? (const device uint*)keys.more[k] : keys.row[k];
        unit[k].load(row, keys.more[k], keys.scale[k], u, book, book2);
      }
#pragma clang loop unroll(full)
      for (int d = 0; d < UNIT; d++) {
        float x[R];
        otq_rows<R>(q + (u * UNIT + d) * R, x);
#pragma clang loop unroll(full)
        for (int k = 0; k < KPL; k++) {
          float f = unit[k].get(d, book);
          if (FORMAT == OTQ_HALF) {
            f *= float(1u << otq_shift<QF>(d));  // q carries the weights of the packed format
          }
#pragma clang loop unroll(full)
          for (int r = 0; r < R; r++) {
            part[k][r] += f * x[r];
          }
        }
      }
    }
    if (FORMAT == OTQ_HALF || FORMAT == OTQ_POLAR) {
#pragma clang loop unroll(full)
      for (int k = 0; k < KPL; k++) {
#pragma clang loop unroll(full)
        for (int r = 0; r < R; r++) {
          keys.s[k][r] += part[k][r];
        }
      }
    } else {
      float x[R];
      otq_rows<R>(qsum + g * R, x);
#pragma clang loop unroll(full)
      for (int k = 0; k < KPL; k++) {
        float2 sz = float2(otq_scale<FORMAT>(keys.scale[k], g + RUN));
#pragma clang loop unroll(full)
        for (int r = 0; r < R; r++) {
          float base = otq_looked_up<FORMAT>() ? keys.s[k][r] : fma(x[r], sz.y, keys.s[k][r]);
          keys.s[k][r] = fma(part[k][r], sz.x, base);
        }
      }
    }
  }
}

// The scores of packed keys: of KN channels, or of a second run of as many, too.
template <int KF, int KF2, int KN, int KG, int R, int KPL>
METAL_FUNC void otq_packed_scores(
    thread OtqKeys<KPL, R>& keys, const threadgroup float* q, const threadgroup float* qsum, float book, float book2) {
  otq_scores<KF, KN, KG, R, KPL, KF, 0>(keys, q, qsum, book, book2);
  if (KF2) {
    otq_scores<(KF2 ? KF2 : KF), KN, KG, R, KPL, KF, 1>(keys, q + KN * R, qsum, book2, book2);
  }
}

// A score with a softcap, times log2(e).
METAL_FUNC float otq_capped(float score, float cap) {
  return precise::tanh(score / cap) * (cap * OTQ_LOG2E);
}

// Values of one KV head as a lane reads them: rows of its run, and polar's other arrays. `second`: the lane's dims lie in
// the second run, whose book follows 16 lanes after the first one's.
template <int FORMAT, int SECOND, int D>
struct OtqRows {
  const device uint* row;
  const device uchar* more;
  const device half* scale;
  bool second;

  // Words from one token to the next.
  METAL_FUNC int words() const {
    return SECOND == OTQ_NONE ? otq_words<FORMAT, D>() : second ? otq_more<FORMAT, SECOND, D / 2>() / 4 : otq_words<FORMAT, D / 2>();
  }

  // Four dims from d0 of key i, whose row is `at`.
  METAL_FUNC float4 four(const device uint* at, int i, int d0, float book, float book2) const {
    if (FORMAT == OTQ_POLAR) {
      OtqBlock<D> block;
      block.load(at, more + i * otq_more<FORMAT, 0, D>(), scale + i * (D / 16), d0 / 16);
      return block.four(d0 / 4 & 3, book, book2);
    }
    if (SECOND) {
      float4 x;
      uint4 c = second ? otq_codes<(SECOND ? SECOND : FORMAT), D / 2>(at, d0 - D / 2) + 16u : otq_codes<FORMAT, D / 2>(at, d0);
      x.x = simd_shuffle(book, ushort(c.x));
      x.y = simd_shuffle(book, ushort(c.y));
      x.z = simd_shuffle(book, ushort(c.z));
      x.w = simd_shuffle(book, ushort(c.w));
      return x;
    }
    return otq_four<FORMAT, D>(at, d0, book);
  }
};

// acc += p * v for every KP-th of n keys behind `from`, from `first` on, rounded up to KP; this lane's four dims begin at d0.
// GAP: keys in [gap.x, gap.y) or above gap.z have no row, or one that was never written; their p is 0, and 0 times a NaN is
// not.
template <int FORMAT, int SECOND, int D, int VF, int R, int KP, int STRIDE, bool GAP>
METAL_FUNC void otq_values(
    OtqRows<FORMAT, SECOND, D> rows, int from, int3 gap, int n, int first, int d0, const threadgroup float* p, float book,
    float book2, thread OtqAcc<R>& acc) {
  const int W = rows.words();
  const device uint* row = rows.row + (from + first) * W;
  p += first * STRIDE;
#pragma clang loop unroll_count(8)
  for (int i = 0; i < n; i += KP) {  // as many times in all lanes, so that they can look up together
    int x = i + first;
    int at = min(x >= gap.x && x < gap.y ? gap.y : x, gap.z);
    float4 v = rows.four(GAP ? rows.row + (from + at) * W : row, from + (GAP ? at : x), d0, book, book2);
    if (FORMAT == OTQ_HALF && VF != OTQ_HALF) {
      v *= float4(1.0f, float(1u << otq_field<VF>()), float(1u << (2 * otq_field<VF>())), float(1u << (3 * otq_field<VF>())));
    }
    float w[R];
    otq_rows<R>(p, w);
#pragma clang loop unroll(full)
    for (int r = 0; r < R; r++) {
      acc.x[r][0] += w[r] * v.x;
      acc.x[r][1] += w[r] * v.y;
      acc.x[r][2] += w[r] * v.z;
      acc.x[r][3] += w[r] * v.w;
    }
    row += KP * W;
    p += KP * STRIDE;
  }
}

// The row of the x-th packed token that is read: of a list of pages, where there is one. MLX puts short lists into constant
// memory.
template <bool LISTED, class Pages>
METAL_FUNC int otq_token(Pages pages, int x) {
  return LISTED ? pages[x / 64] * 64 + x % 64 : x;
}

// sum += p * zero over n keys, for this lane's (row, group) pairs.
template <int R, int GV, int PAIRS>
struct OtqZeros {
  float sum[PAIRS];

  METAL_FUNC void add(const threadgroup float* p, const threadgroup float* zero, int n, int pair, int step) {
#pragma clang loop unroll(full)
    for (int i = 0; i < PAIRS; i++) {
      int c = pair + step * i;
      if (c < R * GV) {
        const threadgroup float* pp = p + c % R;
        const threadgroup float* zp = zero + c / R;
#pragma clang loop unroll_count(8)
        for (int x = 0; x < n; x++) {
          sum[i] += *pp * *zp;
          pp += R;
          zp += GV;
        }
      }
    }
  }
};

// A barrier of a team of DS simdgroups.
template <int DS>
METAL_FUNC void otq_team_barrier() {
  if (DS == 1) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
