// Bounds, alignment, initialisation, races and byte counts of every access.
// Part of runtime.cpp, which includes it inside its namespace.

Region* find(const char* p) {
  for (auto& r : regions)
    if (p >= r.base - GAP / 2 && p < r.base + r.bytes + GAP / 2) return &r;
  return nullptr;
}

// Bytes a simdgroup fetches: lanes that load the same address by the same instruction share one fetch.
struct Fetches {
  struct Slot { u64 key; u32 mask, age; };
  std::vector<Slot> slots = std::vector<Slot>(1 << 14);
  u32 age = 0, used = 0;
  void clear() { age++, used = 0; }
  bool first(u64 key, int lane) {
    if (used * 2 > slots.size()) {
      std::vector<Slot> old(slots.size() * 2);
      old.swap(slots);
      for (auto& s : old)
        if (s.age == age && s.key) *probe(s.key) = s;
    }
    Slot* s = probe(key);
    u32 bit = 1u << lane;
    if (s->age != age || s->key != key) {
      *s = {key, bit, age};
      used++;
      return true;
    }
    bool again = s->mask & bit;  // this lane is back: a new execution of the instruction
    s->mask = again ? bit : s->mask | bit;
    return again;
  }
  Slot* probe(u64 key) {
    u64 h = key * 0x9e3779b97f4a7c15ull >> 20;
    for (;; h++) {
      Slot* s = &slots[h & (slots.size() - 1)];
      if (s->age != age || s->key == key) return s;
    }
  }
};
std::vector<Fetches> fetches;

u64 writer_id() { return (u64(tg_serial) << 32) | (u64(epoch - tg_first_epoch) << 12 & 0xfffff000) | u64(current + 1); }

bool ordered(u64 id) {
  u64 now = writer_id();
  if (id >> 32 != now >> 32) return false;
  return (id & 0xfff) == (now & 0xfff) || (id >> 12 & 0xfffff) < (now >> 12 & 0xfffff);
}

void device_access(const char* p, u32 bytes, u32 align, u32 site, bool write) {
  Region* r = find(p);
  if (!r) fail("%s of %u bytes outside every buffer, at %p", write ? "write" : "read", bytes, p);
  long at = p - r->base;
  int index = int(r - regions.data());
  if (at < 0 || u64(at) + bytes > r->bytes)
    fail("out of bounds: %s of %u bytes at byte %ld of buffer %d, which has %lu bytes", write ? "write" : "read", bytes, at,
         index, r->bytes);
  if (at % align) fail("misaligned: %s at byte %ld of buffer %d needs alignment %u", write ? "write" : "read", at, index, align);
  if (write && !r->output) fail("write to input buffer %d", index);
  if (r->output)
    for (u32 i = 0; i < bytes; i++) {
      u64& w = r->writer[at + i];
      if (w && !ordered(w)) fail("race in device memory: byte %ld of output %d was written by another thread", at + i, index);
      if (write) w = writer_id();
      else if (!w) fail("read of byte %ld of output buffer %d before anything was written there", at + i, index);
    }
  if (write) {
    r->lane_write += bytes;
  } else {
    r->lane_read += bytes;
    if (fetches[current / SIMD].first((u64(at) << 24 | u64(index) << 16 | (site & 0xffff)) + 1, current % SIMD)) r->simd_read += bytes;
    memset(&r->touched[at], 1, bytes);
  }
}

Block* block_of(const char* p) {
  for (auto& b : blocks)
    if (p >= b.base && p < b.base + b.bytes) return &b;
  return nullptr;
}

void race(const char* what, Block* b, const char* p, int other) {
  fail("race in threadgroup memory: %s byte %ld of '%s' (other: thread %d, simdgroup %d) with no barrier between", what,
       long(p - b->base), b->name, other, other / SIMD);
}

void tg_access(const char* p, u32 bytes, u32 align, bool write) {
  Block* b = block_of(p);
  if (!b || b->born != tg_serial || p + bytes > b->base + b->bytes)
    fail("out of bounds: %s of %u bytes at byte %ld of threadgroup array '%s' of %lu bytes", write ? "write" : "read", bytes,
         b ? long(p - b->base) : -1L, b ? b->name : "?", b ? b->bytes : 0ul);
  if (u64(p - b->base) % align) fail("misaligned access to threadgroup array '%s'", b->name);
  if (bytes == 1) fail("single-byte access to threadgroup array '%s' is not modelled", b->name);
  (write ? counts.tg_write : counts.tg_read) += bytes;
  int sg = current / SIMD;
  u32 now_simd = simd_epoch[sg];
  Cell* c = &cells[b->cell + (p - b->base) / 2];
  for (u32 i = 0; i < bytes / 2; i++, c++) {
    bool written = c->w_epoch >= tg_first_epoch;
    if (c->w_epoch == epoch && c->w_thread != current && !(c->w_thread / SIMD == sg && c->w_simd < now_simd))
      race(write ? "two threads write" : "read of what another thread wrote at", b, p + 2 * i, c->w_thread);
    if (write) {
      if (c->readers && c->r_epoch == epoch) {
        bool mine = c->readers == 1 && c->r_thread == current;
        bool before = c->readers < 3 && c->r_thread / SIMD == sg && c->r_simd < now_simd;
        if (!mine && !before) race("write over what another thread reads at", b, p + 2 * i, c->r_thread);
      }
      *c = {epoch, now_simd, 0, 0, uint16_t(current), 0, 0};
    } else {
      if (!written) fail("read of uninitialised threadgroup memory: byte %ld of '%s'", long(p - b->base) + 2 * i, b->name);
      if (!c->readers || c->r_epoch != epoch) c->readers = 1, c->r_thread = uint16_t(current);
      else if (c->r_thread / SIMD != sg) c->readers = 3;
      else if (c->r_thread != current && c->readers == 1) c->readers = 2;
      c->r_epoch = epoch, c->r_simd = now_simd;
    }
  }
}
