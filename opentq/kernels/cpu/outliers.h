// Outliers: the few largest channels of a token in fp16, beside the codes of the others (codecs/outliers.py). They are channels
// of the model's own basis, where an outlier is one number: a key's score gains value * q[channel], q not rotated, and values
// gather p * value in an accumulator of their own, which the caller rotates.
#pragma once
#include "state.h"

namespace otq {

constexpr int MAX_OUTLIERS = 8;

// The outliers of one side, block after block.
struct OutlierBlock {
  OutlierBlock(const Outliers& outliers, int64_t batch, int64_t head, int dim) : s(outliers), dim(dim) {
    channels = s.channels.data + batch * s.channels.batch_stride + head * s.channels.head_stride;
    values = s.values.data + batch * s.values.batch_stride + head * s.values.head_stride;
  }
  // Tokens that no row sees (not in `any`) may not exist.
  void open(int64_t block, uint64_t any) {
    for (int t = 0; t < 64; t++) {
      const uint8_t* c = channels + block * s.channels.block_stride + t * s.channels.token_stride;
      const uint8_t* v = values + block * s.values.block_stride + t * s.values.token_stride;
      for (int j = 0; j < s.count; j++) {
        int at = 0;
        uint16_t number = 0;
        if (any >> t & 1) {
          at = s.width == 1 ? c[j] : c[2 * j] + 256 * c[2 * j + 1];
          std::memcpy(&number, v + 2 * j, 2);
        }
        channel[j][t] = std::min(at, dim - 1), value[j][t] = half_to_float(number);
      }
    }
  }
  void add_scores(const float* q, float unit, float* __restrict scores) const {
    for (int j = 0; j < s.count; j++)
      for (int t = 0; t < 64; t++) scores[t] += unit * value[j][t] * q[channel[j][t]];
  }
  void add_values(const float* p, float* __restrict acc) const {
    for (int j = 0; j < s.count; j++)
      for (int t = 0; t < 64; t++) acc[channel[j][t]] += p[t] * value[j][t];
  }

  const Outliers& s;
  int dim;
  const uint8_t *channels, *values;
  int32_t channel[MAX_OUTLIERS][64];
  float value[MAX_OUTLIERS][64];
};

}  // namespace otq
