// Into and out of the blocked layout (blocks.h): quantise float vectors, store canonical arrays, load them back.
//
// Every path goes through one block at a time as 64 rows of D codes, a byte each (8 KB at D = 128, so it stays in L1), plus
// its fp16 parameters; then 16 channels at a time become 16 fields and the fields one tile. Quantising follows the codecs
// step by step in fp32 with the same roundings, so the bits are the same. One task is one block.
//
//   AFFINE (codecs/affine.py): clip to +-65504, scale = fp16((max - min) / (2^bits - 1)), zero = fp16(min), code =
//   clip(round_half_even((x - zero) / scale)); a group whose scale rounds to 0 gets zero = fp16((min + max) / 2) and
//   codes 0. (A zero may differ in sign: -0 for +0.)
//   BOOK (codecs/turbo.py): the length comes with the call, because a mean depends on the order of its sum; scale =
//   fp16(length), code = how many boundaries lie below x / scale; norm: scale = fp16(length / length of the entries).
#include <vector>

#include "blocks.h"
#include "pool.h"

namespace otq {

// One block, unpacked.
struct Codes {
  explicit Codes(const Format& f) : code(size_t(64) * f.dim), param(size_t(64) * f.params()) {}
  std::vector<uint8_t> code;    // [64][dim]
  std::vector<uint16_t> param;  // [params][64]: scale and zero of every group, or the scale
};

// Bits [shift, shift + width) of 16 fields <-> 128 * width bytes of a tile.
static void fields_to_plane(const uint8_t (*f)[64], int width, int shift, uint8_t* plane) {
  const int per = 8 / width, mask = (1 << width) - 1;
  for (int v = 0; v < 16 / per; v++, plane += 64) {
    std::memset(plane, 0, 64);
    for (int j = 0; j < per; j++)
      for (int x = 0; x < 64; x++) plane[x] |= uint8_t((f[v * per + j][x] >> shift & mask) << (width * j));
  }
}

static void plane_to_fields(const uint8_t* plane, int width, int shift, uint8_t (*f)[64]) {
  const int per = 8 / width, mask = (1 << width) - 1;
  for (int i = 0; i < 16; i++)
    for (int x = 0; x < 64; x++) f[i][x] |= uint8_t((plane[64 * (i / per) + x] >> (width * (i % per)) & mask) << shift);
}

static void write_block(const Format& f, const Codes& c, uint8_t* out) {
  uint8_t fields[16][64];
  for (int t = 0; t < f.dim / 16; t++) {
    const uint8_t* code = c.code.data() + 16 * t;
    for (int i = 0; i < 16; i++)
      for (int l = 0; l < 16; l++) {
        if (f.is_values)
          for (int j = 0; j < 4; j++) fields[i][4 * l + j] = code[size_t(i + 16 * j) * f.dim + l];
        else
          std::memcpy(&fields[i][4 * l], code + size_t(16 * (i % 4) + l) * f.dim + 4 * (i / 4), 4);
      }
    uint8_t* tile = out + int64_t(128) * f.bits * t;
    fields_to_plane(fields, f.low(), 0, tile);
    if (f.high()) fields_to_plane(fields, f.high(), f.low(), tile + 128 * f.low());
  }
  std::memcpy(out + f.code_bytes(), c.param.data(), 2 * c.param.size());
}

static void read_block(const Format& f, const uint8_t* in, Codes& c) {
  for (int t = 0; t < f.dim / 16; t++) {
    uint8_t* code = c.code.data() + 16 * t;
    const uint8_t* tile = in + int64_t(128) * f.bits * t;
    uint8_t fields[16][64] = {};
    plane_to_fields(tile, f.low(), 0, fields);
    if (f.high()) plane_to_fields(tile + 128 * f.low(), f.high(), f.low(), fields);
    for (int i = 0; i < 16; i++)
      for (int l = 0; l < 16; l++) {
        if (f.is_values)
          for (int j = 0; j < 4; j++) code[size_t(i + 16 * j) * f.dim + l] = fields[i][4 * l + j];
        else
          std::memcpy(code + size_t(16 * (i % 4) + l) * f.dim + 4 * (i / 4), &fields[i][4 * l], 4);
      }
  }
  std::memcpy(c.param.data(), in + f.code_bytes(), 2 * c.param.size());
}

// One token's codes as little-endian fields of `width` bits, taken from bit `shift` of each code.
static void pack_row(const uint8_t* code, int dim, int width, int shift, uint8_t* out) {
  const int per = 8 / width, mask = (1 << width) - 1;
  for (int i = 0; i < dim / per; i++) {
    int byte = 0;
    for (int j = 0; j < per; j++) byte |= (code[i * per + j] >> shift & mask) << (width * j);
    out[i] = uint8_t(byte);
  }
}

static void unpack_row(const uint8_t* in, int dim, int width, int shift, uint8_t* code) {
  const int per = 8 / width, mask = (1 << width) - 1;
  for (int i = 0; i < dim; i++) code[i] |= uint8_t((in[i / per] >> (width * (i % per)) & mask) << shift);
}

static void canonical_to_codes(const Format& f, const uint8_t* words, const uint16_t* params, Codes& c) {
  std::fill(c.code.begin(), c.code.end(), uint8_t(0));
  for (int t = 0; t < 64; t++, words += 4 * f.words(), params += f.params()) {
    uint8_t* code = c.code.data() + size_t(t) * f.dim;
    unpack_row(words, f.dim, f.low(), 0, code);
    if (f.high()) unpack_row(words + 4 * f.low_words(), f.dim, f.high(), f.low(), code);
    for (int i = 0; i < f.params(); i++) c.param[size_t(64 * i + t)] = params[i];
  }
}

static void codes_to_canonical(const Format& f, const Codes& c, uint8_t* words, uint16_t* params) {
  std::memset(words, 0, size_t(64) * 4 * f.words());
  for (int t = 0; t < 64; t++, words += 4 * f.words(), params += f.params()) {
    const uint8_t* code = c.code.data() + size_t(t) * f.dim;
    pack_row(code, f.dim, f.low(), 0, words);
    if (f.high()) pack_row(code, f.dim, f.high(), f.low(), words + 4 * f.low_words());
    for (int i = 0; i < f.params(); i++) params[i] = c.param[size_t(64 * i + t)];
  }
}

static void quantise_affine(const Format& f, const float* x, int t, Codes& c) {
  const F limit = set1(65504.f), bottom = set1(-65504.f);
  const float top = float((1 << f.bits) - 1);
  uint8_t* code = c.code.data() + size_t(t) * f.dim;
  int32_t v[16];
  for (int g = 0; g < f.groups(); g++) {
    const int from = g * f.group, to = std::min(from + f.group, f.dim);
    F low = limit, high = bottom;
    for (int d = from; d < to; d += W) {
      const F y = min(max(load(x + d), bottom), limit);
      low = min(y, low), high = max(y, high);
    }
    const float lo = hmin(low), hi = hmax(high);
    const uint16_t scale = float_to_half((hi - lo) / top);
    const bool constant = scale == 0;
    const uint16_t zero = float_to_half(constant ? (lo + hi) / 2 : lo);
    c.param[size_t(128 * g + t)] = scale, c.param[size_t(128 * g + 64 + t)] = zero;
    if (constant) {
      std::fill(code + from, code + to, uint8_t(0));
      continue;
    }
    const F z = set1(half_to_float(zero)), step = set1(half_to_float(scale));
    for (int d = from; d < to; d += 16) {
      for (int i = 0; i < 16; i += W) {
        const F y = min(max(load(x + d + i), bottom), limit);
        istore(v + i, round_int(min(max(div(sub(y, z), step), set1(0.f)), set1(top))));
      }
      for (int i = 0; i < 16; i++) code[d + i] = uint8_t(v[i]);
    }
  }
}

static void quantise_book(const Format& f, const float* x, float length, int t, Codes& c) {
  uint16_t scale = float_to_half(length);
  const F limit = set1(65504.f), bottom = set1(-65504.f), one = set1(1.f);
  const F unit = set1(scale & 0x7fff ? half_to_float(scale) : 1.f);
  uint8_t* code = c.code.data() + size_t(t) * f.dim;
  const int cuts = (1 << f.bits) - 1;
  int32_t v[16];
  for (int d = 0; d < f.dim; d += 16) {
    for (int i = 0; i < 16; i += W) {
      const F y = div(min(max(load(x + d + i), bottom), limit), unit);
      F count = set1(0.f);
      for (int j = 0; j < cuts; j++) count = add_if_above(count, one, y, set1(f.cuts[j]));
      istore(v + i, round_int(count));
    }
    for (int i = 0; i < 16; i++) code[d + i] = uint8_t(v[i]);
  }
  if (f.norm) {
    int squares = 0;  // exact
    for (int d = 0; d < f.dim; d++) squares += (f.book[code[d]] - 128) * (f.book[code[d]] - 128);
    scale = float_to_half(std::min(length / (std::sqrt(float(squares) / float(f.dim)) * f.step), 65504.f));
  }
  c.param[size_t(t)] = scale;
}

static void to_floats(const void* p, int64_t at, int n, int32_t dtype, float* out) {
  if (dtype == FLOAT32) {
    std::memcpy(out, static_cast<const float*>(p) + at, size_t(n) * 4);
  } else if (dtype == FLOAT16) {
    for (int d = 0; d < n; d += W) store(out + d, load_half(static_cast<const uint16_t*>(p) + at + d));
  } else {
    for (int d = 0; d < n; d++) {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[at + d]) << 16;
      std::memcpy(out + d, &bits, 4);
    }
  }
}

// body(block number, start of the block's 64 tokens in the other tensor) over all blocks; 0, or 1 when memory ran out.
template <class Body> static int for_blocks(const Grid& n, Body body) {
  std::atomic<int> failed{0};
  const int64_t total = n.batch * n.heads * n.blocks;
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(8, total / (4 * std::max(n.threads, 1))));
  Pool::get().run(int((total + step - 1) / step), n.threads, [&](int task) {
    try {
      for (int64_t i = task * step; i < std::min(total, (task + 1) * step); i++) {
        const int64_t block = i % n.blocks, head = i / n.blocks % n.heads, batch = i / n.blocks / n.heads;
        body(i, batch, head, block);
      }
    } catch (const std::bad_alloc&) {
      failed = 1;
    }
  });
  return failed;
}

}  // namespace otq

using namespace otq;

EXPORT int opentq_pack(const Format* f, const Grid* n, const void* x, const float* lengths, uint8_t* blocks) {
  return for_blocks(*n, [&](int64_t i, int64_t batch, int64_t head, int64_t block) {
    Codes c(*f);
    std::vector<float> row(size_t(f->dim));
    for (int t = 0; t < 64; t++) {
      const int64_t at = batch * n->batch_stride + head * n->head_stride + (64 * block + t) * n->token_stride;
      to_floats(x, at, f->dim, n->dtype, row.data());
      if (f->form == BOOK) quantise_book(*f, row.data(), lengths[64 * i + t], t, c);
      else quantise_affine(*f, row.data(), t, c);
    }
    write_block(*f, c, blocks + i * f->block_bytes());
  });
}

EXPORT int opentq_store(const Format* f, const Grid* n, const uint8_t* codes, const uint16_t* params, uint8_t* blocks) {
  return for_blocks(*n, [&](int64_t i, int64_t, int64_t, int64_t) {
    Codes c(*f);
    canonical_to_codes(*f, codes + 64 * i * 4 * f->words(), params + 64 * i * f->params(), c);
    write_block(*f, c, blocks + i * f->block_bytes());
  });
}

EXPORT int opentq_load(const Format* f, const Grid* n, const uint8_t* blocks, uint8_t* codes, uint16_t* params) {
  return for_blocks(*n, [&](int64_t i, int64_t batch, int64_t head, int64_t block) {
    Codes c(*f);
    read_block(*f, blocks + batch * n->batch_stride + head * n->head_stride + block * n->token_stride, c);
    codes_to_canonical(*f, c, codes + i * 64 * 4 * f->words(), params + i * 64 * f->params());
  });
}
