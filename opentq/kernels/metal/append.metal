// Append: what a step adds to a layer's fp16 columns, in one launch: old columns copied, the new keys and values rotated,
// rounded and put behind them, and the queries rotated on the way. A simdgroup is a vector, four to a threadgroup.
//
// A rotation is a Walsh-Hadamard transform: additions between numbers of a lane, then between lanes, then one factor, in
// float; that is how `codecs.rotation` computes it, but for the order of additions. New keys are rounded to half before
// `center` is taken off, as in the cache. Lane i holds the D / 32 numbers from i * D / 32 on. Bytes: everything once.
// Template: T the queries' type; DK, DV (multiples of 32; powers of two where they are rotated); RK, RV: rotated; CENTER. q
// [B, Hq, L, DK], new_k, new_v [B, H, L, D] any float type; dense_k, dense_v half [B, H, Td, D]; center half [B, H, DK];
// meta = {L, Td, B * H, B * Hq * L}; real = {1 / sqrt(DK), 1 / sqrt(DV)}. Output: q_out T as q; k_out, v_out half
// [B, H, Td + L, D].

// One new vector, as it waits in the columns: rotated, in the finite range, without the center.
template <int D, bool ROTATED, typename F>
METAL_FUNC void otq_column(
    const device F* from, const device half* center, bool centred, device half* to, int lane, float factor) {
  constexpr int E = D / 32;
  float x[E];
#pragma clang loop unroll(full)
  for (int j = 0; j < E; j++) {
    x[j] = float(from[lane * E + j]);
  }
  if (ROTATED) {
    otq_hadamard<E>(x, lane, factor);
  }
#pragma clang loop unroll(full)
  for (int j = 0; j < E; j++) {
    half y = half(clamp(x[j], -65504.0f, 65504.0f));
    if (centred) {
      y = half(clamp(float(y) - float(center[lane * E + j]), -65504.0f, 65504.0f));
    }
    to[lane * E + j] = y;
  }
}

// Column c of one head: an old one, or a new vector.
template <int D, bool ROTATED, typename F>
METAL_FUNC void otq_append(
    const device half* old, const device F* fresh, const device half* center, bool centred, device half* out, int c,
    int Td, int lane, float factor) {
  constexpr int E = D / 32;
  if (c >= Td) {
    otq_column<D, ROTATED>(fresh + size_t(c - Td) * D, center, centred, out + size_t(c) * D, lane, factor);
    return;
  }
#pragma clang loop unroll(full)
  for (int j = 0; j < E; j++) {
    out[size_t(c) * D + lane * E + j] = old[size_t(c) * D + lane * E + j];
  }
}
// ---- body
  const int lane = thread_index_in_simdgroup;
  const int L = meta[0], Td = meta[1], heads = meta[2], queries = meta[3];
  const int columns = Td + L;
  int task = int(threadgroup_position_in_grid.x) * 4 + int(simdgroup_index_in_threadgroup);
  if (task < heads * columns) {  // the same for a whole simdgroup, here and below
    const size_t h = task / columns;
    otq_append<DK, RK>(
        dense_k + h * Td * DK, new_k + h * L * DK, center + (CENTER ? h * DK : 0), CENTER, k_out + h * columns * DK,
        task % columns, Td, lane, real[0]);
  } else if (task < 2 * heads * columns) {
    task -= heads * columns;
    const size_t h = task / columns;
    otq_append<DV, RV>(
        dense_v + h * Td * DV, new_v + h * L * DV, center, false, v_out + h * columns * DV, task % columns, Td, lane,
        real[1]);
  } else if (task < 2 * heads * columns + queries) {
    constexpr int E = DK / 32;
    const size_t at = size_t(task - 2 * heads * columns) * DK + lane * E;
    float x[E];
#pragma clang loop unroll(full)
    for (int j = 0; j < E; j++) {
      x[j] = float(q[at + j]);
    }
    if (RK) {
      otq_hadamard<E>(x, lane, real[0]);
    }
#pragma clang loop unroll(full)
    for (int j = 0; j < E; j++) {
      q_out[at + j] = T(x[j]);
    }
  }
