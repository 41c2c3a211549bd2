// Pack: quantise rotated vectors and write words, scales and zeros. A simdgroup is a token, four to a threadgroup.
//
// The arithmetic is codecs/affine.py's, operation by operation in float, so that the bytes are the same: scale and zero are
// rounded to half before the codes are chosen; rint rounds halves to even. Bytes: the vector once, the packed form once.
// Template: the format FORMAT, GROUP, D. y [tokens, D] any float type; meta = {tokens}. Output: codes uint [tokens, W], scales half
// [tokens, 2G] as (scale, zero) pairs.

// The code of one value.
template <int FORMAT>
METAL_FUNC uint otq_code(float x, float scale, float zero) {
  float top = float((1u << otq_bits<FORMAT>()) - 1u);
  return scale == 0 ? 0u : uint(clamp(rint((x - zero) / scale), 0.0f, top));
}

// COUNT fields of WIDTH bits from the codes of the values d0, d0 + 1, ..., each shifted right by `drop` and cut to WIDTH.
template <int FORMAT, int WIDTH, int D, int GROUP>
METAL_FUNC uint otq_word(const threadgroup float* x, const threadgroup float2* sz, int d0, int drop) {
  uint word = 0;
  for (int j = 0; j < 32 / WIDTH; j++) {
    if (d0 + j < D) {
      float2 pair = sz[(d0 + j) / GROUP];
      uint code = otq_code<FORMAT>(x[d0 + j], pair.x, pair.y);
      word |= ((code >> drop) & ((1u << WIDTH) - 1u)) << (WIDTH * j);
    }
  }
  return word;
}
// ---- body
  constexpr int W = otq_words<FORMAT, D>(), G = (D + GROUP - 1) / GROUP;
  constexpr int LOW = otq_low<FORMAT>();
  threadgroup float x_shared[4 * D];
  threadgroup float2 sz_shared[4 * G];
  const int lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int token = int(threadgroup_position_in_grid.x) * 4 + sg;
  threadgroup float* x = x_shared + sg * D;
  threadgroup float2* sz = sz_shared + sg * G;
  if (token < meta[0]) {  // the same for a whole simdgroup
    for (int d = lane; d < D; d += 32) {
      x[d] = clamp(float(y[size_t(token) * D + d]), -65504.0f, 65504.0f);
    }
    // Groups begin at multiples of 32, so that in this loop a lane reads what it wrote.
    for (int g = 0; g < G; g++) {
      float low = 65504.0f, high = -65504.0f;
      for (int d = g * GROUP + lane; d < min(D, g * GROUP + GROUP); d += 32) {
        low = min(low, x[d]);
        high = max(high, x[d]);
      }
      low = simd_min(low);
      high = simd_max(high);
      half scale = half((high - low) / float((1u << otq_bits<FORMAT>()) - 1u));
      half zero = scale == 0 ? half((low + high) / 2) : half(low);
      if (lane == 0) {
        sz[g] = float2(float(scale), float(zero));
        scales[(size_t(token) * G + g) * 2] = scale;
        scales[(size_t(token) * G + g) * 2 + 1] = zero;
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int w = lane; w < W; w += 32) {
      uint word;
      if (FORMAT == OTQ_INT3 && w >= D / 16) {
        word = otq_word<FORMAT, 1, D, GROUP>(x, sz, (w - D / 16) * 32, 2);
      } else {
        word = otq_word<FORMAT, LOW, D, GROUP>(x, sz, w * (32 / LOW), 0);
      }
      codes[size_t(token) * W + w] = word;
    }
  }
