// What lanes do together: reductions, shuffles, votes, 8x8 matrix products; and whether all of them came.
// Part of runtime.cpp, which includes it inside its namespace.

float as_float(u64 x) { u32 u = u32(x); float f; memcpy(&f, &u, 4); return f; }
u64 of_float(float f) { u32 u; memcpy(&u, &f, 4); return u; }
float half_to_float(u64 x) { _Float16 h; uint16_t u = uint16_t(x); memcpy(&h, &u, 2); return float(h); }
u64 float_to_half(float f) { _Float16 h = _Float16(f); uint16_t u; memcpy(&u, &h, 2); return u; }

template <typename T> T combine(int op, T a, T b) {
  switch (op) {
    case 0: case 7: case 8: return T(a + b);
    case 1: case 9: case 10: return T(a * b);
    case 2: return a < b ? b : a;
    case 3: return b < a ? b : a;
  }
  return a;
}

u64 combine_bits(int op, int type, u64 a, u64 b) {
  if (op == 4) return a & b;
  if (op == 5) return a | b;
  if (op == 6) return a ^ b;
  switch (type) {
    case 0: return of_float(op == 2 ? fmaxf(as_float(a), as_float(b)) : op == 3 ? fminf(as_float(a), as_float(b))
                                    : combine<float>(op, as_float(a), as_float(b)));
    case 1: return float_to_half(combine<float>(op, half_to_float(a), half_to_float(b)));
    case 2: return u32(combine<int32_t>(op, int32_t(a), int32_t(b)));
    case 3: return combine<u32>(op, u32(a), u32(b));
    case 4: return uint16_t(combine<int16_t>(op, int16_t(a), int16_t(b)));
    default: return combine<uint16_t>(op, uint16_t(a), uint16_t(b));
  }
}

u64 one_or_zero(int op, int type) {
  if (op != 10) return 0;
  return type == 0 ? of_float(1) : type == 1 ? float_to_half(1) : 1;
}

void reduce(Lane* l, int n) {
  int op = l[0].op, type = l[0].type;
  if (op >= 7) {  // prefix
    u64 sum = one_or_zero(op, type);
    for (int i = 0; i < n; i++) {
      bool exclusive = op == 8 || op == 10;
      u64 next = i == 0 && !exclusive ? l[0].in : combine_bits(op, type, sum, l[i].in);
      l[i].out = exclusive ? sum : next;
      sum = next;
    }
    return;
  }
  u64 v[SIMD];
  for (int i = 0; i < n; i++) v[i] = l[i].in;
  int m = n;
  while (m > 1) {  // a butterfly's order of additions
    int h = (m + 1) / 2;
    for (int i = 0; i + h < m; i++) v[i] = combine_bits(op, type, v[i], v[i + h]);
    m = h;
  }
  for (int i = 0; i < n; i++) l[i].out = v[0];
}

void shuffle(Lane* l, int n) {
  for (int i = 0; i < n; i++) {
    int by = int(l[i].by), from = i;
    switch (l[i].op) {
      case 0: case 4: from = by; break;
      case 1: from = i ^ by; break;
      case 2: case 7: from = i + by; break;
      case 3: case 8: from = i - by; break;
      case 5: from = (i + by) % SIMD; break;
      case 6: from = (i - by + SIMD) % SIMD; break;
      case 9: from = (i & ~3) | ((i & 3) ^ by); break;
      case 10: from = (i & ~3) | ((i & 3) + by & 3); break;
      case 11: from = 0; break;
    }
    bool inside = from >= 0 && from < n;
    if (l[i].op == 7 || l[i].op == 8) l[i].out = inside ? l[from].in : l[i].fill;
    // Outside the simdgroup MSL leaves down and up undefined: an obvious wrong value, not a lucky one.
    else l[i].out = inside ? l[from].in : 0x7fc07fc07fc07fc0ull;
  }
}

void matrix_at(int lane, int& row, int& col) {
  int quad = lane / 4;
  row = (quad & 4) + (lane / 2) % 4;
  col = (quad & 2) * 2 + (lane % 2) * 2;
}

void mma(Lane* l) {
  float a[8][8], b[8][8];
  int r, c;
  for (int i = 0; i < SIMD; i++) {
    matrix_at(i, r, c);
    a[r][c] = l[i].m[0], a[r][c + 1] = l[i].m[1], b[r][c] = l[i].m[2], b[r][c + 1] = l[i].m[3];
  }
  for (int i = 0; i < SIMD; i++) {
    matrix_at(i, r, c);
    for (int e = 0; e < 2; e++) {
      float sum = l[i].m[4 + e];
      for (int k = 0; k < 8; k++) sum += a[r][k] * b[k][c + e];
      l[i].m[e] = sum;
    }
  }
}

const char* kind_name[] = {"simd reduction", "simd shuffle", "simd vote", "simdgroup_matrix multiply", "simdgroup_barrier"};

bool complete_collective(int first, int n) {
  Lane* l = lanes + first;
  for (int i = 0; i < n; i++) {
    current = first + i;
    describe();
    if (l[i].state != COLLECTIVE) {
      fail_here("divergent simdgroup: this lane is %s while others wait at a %s",
                l[i].state == DONE ? "finished" : "at a threadgroup_barrier", kind_name[l[i == 0 ? n - 1 : 0].kind]);
      return false;
    }
    if (l[i].site != l[0].site || l[i].kind != l[0].kind) {
      fail_here("divergent simdgroup: this lane is at another %s than lane 0's %s", kind_name[l[i].kind],
                kind_name[l[0].kind]);
      return false;
    }
  }
  switch (l[0].kind) {
    case REDUCE: reduce(l, n); counts.reduces++; break;
    case SHUFFLE: shuffle(l, n); counts.shuffles++; break;
    case VOTE: {
      u64 mask = 0;
      for (int i = 0; i < n; i++) mask |= u64(l[i].in != 0) << i;
      for (int i = 0; i < n; i++) l[i].out = mask;
      break;
    }
    case MMA:
      if (n != SIMD) return fail_here("simdgroup_matrix needs 32 lanes, this simdgroup has %d", n), false;
      mma(l);
      counts.mma++;
      break;
    case SIMD_BARRIER:
      counts.simd_barriers++;
      if (l[0].op & 2) simd_epoch[first / SIMD]++;
      break;
    default: break;
  }
  for (int i = 0; i < n; i++) l[i].state = READY;
  return true;
}

void collective(int kind, const void* site) {
  Lane& l = lanes[current];
  l.kind = kind, l.site = site, l.state = COLLECTIVE;
  to_scheduler();
}
