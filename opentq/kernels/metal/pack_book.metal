// Pack with a codebook: round every coordinate to its nearest entry and write words and scales. A simdgroup is a token, four
// to a threadgroup.
//
// The arithmetic is codecs/turbo.py's, operation by operation in float, so that the bytes are the same; lengths come from
// there. The scale is rounded to half before it divides; NORM stores the one that gives the decoded vector its original
// length, from a sum of squares of whole numbers, which is exact in any order. Bytes: the vector once, the packed form once.
// Template: formats FORMAT, and FORMAT2 of a second run or OTQ_NONE; N channels of a run; NORM. y [tokens, runs * N] any
// float type; lengths [tokens, runs]; cuts [runs * 64]: 63 boundaries, and the step of the entries; entries [runs * 64];
// meta = {tokens}. Output: codes uint [tokens, words of all runs], scales half [tokens, runs].

// Word w of the packed form of N codes.
template <int FORMAT, int N>
METAL_FUNC uint otq_book_word(const threadgroup ushort* code, int w) {
  constexpr int LOW = otq_low<FORMAT>(), HIGH = otq_high<FORMAT>() > 0 ? otq_high<FORMAT>() : 1;
  const bool high = w >= otq_low_words<FORMAT, N>();
  const int width = high ? HIGH : LOW, drop = high ? LOW : 0;
  const int d0 = (high ? w - otq_low_words<FORMAT, N>() : w) * (32 / width);
  uint word = 0;
  for (int j = 0; j < 32 / width; j++) {
    if (d0 + j < N) {
      word |= ((uint(code[d0 + j]) >> drop) & ((1u << width) - 1u)) << (width * j);
    }
  }
  return word;
}

// One run of one token: its words, by all lanes, and its scale.
template <int FORMAT, int N, bool NORM, typename T>
METAL_FUNC half otq_book_run(
    const device T* y, float length, const device float* cuts, const device float* entries, threadgroup ushort* code,
    device uint* words, int lane) {
  half scale = half(length);
  const float divisor = scale == 0 ? 1.0f : float(scale);
  float squares = 0;
  for (int d = lane; d < N; d += 32) {
    float x = clamp(float(y[d]), -65504.0f, 65504.0f) / divisor;
    int c = 0;
    for (int j = 0; j < (1 << otq_bits<FORMAT>()) - 1; j++) {
      c += x > cuts[j] ? 1 : 0;
    }
    code[d] = ushort(c);
    squares += NORM ? entries[c] * entries[c] : 0.0f;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int w = lane; w < otq_words<FORMAT, N>(); w += 32) {
    words[w] = otq_book_word<FORMAT, N>(code, w);
  }
  if (NORM) {
    scale = half(min(length / (precise::sqrt(simd_sum(squares) / float(N)) * cuts[63]), 65504.0f));
  }
  return scale;
}
// ---- body
  constexpr int RUNS = FORMAT2 ? 2 : 1;
  constexpr int W = otq_words<FORMAT, N>(), W2 = FORMAT2 ? otq_words<(FORMAT2 ? FORMAT2 : FORMAT), N>() : 0;
  threadgroup ushort code_shared[4 * RUNS * N];
  const int lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int token = int(threadgroup_position_in_grid.x) * 4 + sg;
  threadgroup ushort* code = code_shared + sg * RUNS * N;
  if (token < meta[0]) {  // the same for a whole simdgroup
    const size_t row = size_t(token) * (RUNS * N);
    device uint* words = codes + size_t(token) * (W + W2);
    half scale = otq_book_run<FORMAT, N, NORM>(y + row, lengths[token * RUNS], cuts, entries, code, words, lane);
    if (lane == 0) {
      scales[token * RUNS] = scale;
    }
    if (FORMAT2) {
      scale = otq_book_run<(FORMAT2 ? FORMAT2 : FORMAT), N, NORM>(
          y + row + N, lengths[token * RUNS + 1], cuts + 64, entries + 64, code + N, words + W, lane);
      if (lane == 0) {
        scales[token * RUNS + 1] = scale;
      }
    }
  }
