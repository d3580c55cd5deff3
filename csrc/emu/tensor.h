// cuda/tensor.cuh under the emulator: the same functions, by their definition in the PTX manual.
//
// Shared memory is watched word by word. Errors: an address outside of what the launch asked for, or not a multiple of
// the access; reading what nobody has written in this block; a word that one warp writes and another reads or writes
// without a __syncthreads between them. Asynchronous copies fill their destination with NaN when they are started; they
// arrive at once under EMU_ORDER=forward and as late as they may otherwise.
#pragma once
#include <map>

#include "emu/emu.h"

#define TSR_DEVICE [[maybe_unused]] static inline

namespace emu {

struct Barrier {
  uint32_t count = 0, left = 0, parity = 0;
  int64_t bytes = 0;
};
struct Copy {
  uint32_t to, bytes, barrier;
  const void* from;  // null: zeros
};
struct Background {  // what is on its way, of the block that runs
  uint64_t block = 0;
  std::map<uint32_t, Barrier> barriers;
  std::vector<Copy> bulk;
  std::vector<std::vector<std::vector<Copy>>> groups;  // [thread][group]; the last is still open
};
inline thread_local Background S;

inline Background& background() {
  if (S.block != B.number) {
    S = Background{};
    S.block = B.number;
    S.groups.assign(size_t(B.n), {{}});
  }
  return S;
}

[[noreturn]] inline void die_at(const char* what, uint32_t a) {
  char text[160];
  std::snprintf(text, sizeof text, "%s at byte %u of shared memory (warp %d)", what, a, B.cur / 32);
  die(text);
}
inline void check_range(uint32_t a, uint32_t bytes, uint32_t multiple) {
  if (a % multiple) die_at("misaligned access", a);
  if (uint64_t(a) + bytes > B.watch.size() * 4) die_at("access out of range", a);
}
inline void will_read(uint32_t a, uint32_t bytes) {
  check_range(a, bytes, bytes);
  const int warp = B.cur / 32;
  for (uint32_t w = a / 4; w < (a + bytes) / 4; ++w) {
    Watch& m = B.watch[w];
    if (!m.known) die_at("nobody has written what is read", w * 4);
    if (m.written == B.barriers + 1 && m.writer != warp) die_at("race: read while another warp writes", w * 4);
    if (m.read == B.barriers + 1 && m.reader != warp)
      m.reader = -1;  // several
    else
      m.read = B.barriers + 1, m.reader = warp;
  }
}
inline void will_write(uint32_t a, uint32_t bytes) {
  check_range(a, bytes, bytes);
  const int warp = B.cur / 32;
  for (uint32_t w = a / 4; w < (a + bytes) / 4; ++w) {
    Watch& m = B.watch[w];
    if (m.written == B.barriers + 1 && m.writer != warp) die_at("race: two warps write", w * 4);
    if (m.read == B.barriers + 1 && m.reader != warp) die_at("race: written while another warp reads", w * 4);
    m = {B.barriers + 1, m.read, warp, m.reader, true};
  }
}
template <class T>
T load_shared(uint32_t a) {
  will_read(a, sizeof(T));
  T v;
  std::memcpy(&v, B.shared + a, sizeof(T));
  return v;
}
template <class T>
void store_shared(uint32_t a, T v) {
  will_write(a, sizeof(T));
  std::memcpy(B.shared + a, &v, sizeof(T));
}

inline bool copies_arrive_at_once() { return order_mode() == 0; }
inline void start(const Copy& c) {
  std::memset(B.shared + c.to, 0xFF, c.bytes);
  for (uint32_t w = c.to / 4; w < (c.to + c.bytes) / 4; ++w) B.watch[w] = {};
}
// `writer`: the warp whose own it is until the next barrier, or nobody's.
inline void arrive(const Copy& c, bool by_this_warp) {
  if (c.from)
    std::memcpy(B.shared + c.to, c.from, c.bytes);
  else
    std::memset(B.shared + c.to, 0, c.bytes);
  for (uint32_t w = c.to / 4; w < (c.to + c.bytes) / 4; ++w) {
    B.watch[w] = {};
    B.watch[w].known = true;
    if (by_this_warp) B.watch[w].written = B.barriers + 1, B.watch[w].writer = B.cur / 32;
  }
}
inline Barrier& barrier(uint32_t b) {
  const auto at = background().barriers.find(b);
  if (at == S.barriers.end()) die_at("no such barrier", b);
  return at->second;
}
inline void turn(Barrier& m) {
  if (m.left == 0 && m.bytes == 0) m.parity ^= 1, m.left = m.count;
}
inline void arrive_bulk(const Copy& c) {
  arrive(c, false);
  Barrier& m = barrier(c.barrier);
  m.bytes -= c.bytes;
  turn(m);
}

inline const float* half_values() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (uint32_t i = 0; i < 65536; ++i) {
      const uint16_t bits = uint16_t(i);
      _Float16 h;
      std::memcpy(&h, &bits, 2);
      t[i] = float(h);
    }
    return t;
  }();
  return table.data();
}
inline uint16_t half_bits(float f) {
  const _Float16 h = _Float16(f);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

struct Fragments {
  float a[8], b[4];  // a0 low, a0 high, a1 low, ...; likewise b
};
// d += A B of m16n8k16, or of m16n8k8 with k = 8.
inline void mma(float (&d)[4], const Fragments& mine, int depth, int op) {
  collect<const Fragments*>(0xffffffffu, &mine, op, [&](int w) {
    const int g = lane() / 4, t = lane() % 4;
    const Fragments *row[4], *column[2][4];  // of the lanes that hold my rows and my two columns
    for (int q = 0; q < 4; ++q) {
      row[q] = slot_of<const Fragments*>(w + g * 4 + q);
      for (int c = 0; c < 2; ++c) column[c][q] = slot_of<const Fragments*>(w + (2 * t + c) * 4 + q);
    }
    for (int i = 0; i < 4; ++i) {
      const int lower = i >= 2 ? 1 : 0;  // rows g + 8 are in a1 and a3
      float sum = 0;
      for (int k = 0; k < depth; ++k) {
        const Fragments &x = *row[k % 8 / 2], &y = *column[i & 1][k % 8 / 2];
        sum += x.a[(lower + 2 * (k / 8)) * 2 + k % 2] * y.b[k / 8 * 2 + k % 2];
      }
      d[i] += sum;
    }
    return &mine;
  });
}

}  // namespace emu

namespace tsr {

using Shared = uint32_t;

TSR_DEVICE Shared shared_address(const void* p) {
  const ptrdiff_t at = static_cast<const char*>(p) - emu::B.shared;
  if (at < 0 || uint64_t(at) > emu::B.watch.size() * 4) emu::die("not an address in shared memory");
  return Shared(at);
}
TSR_DEVICE uint32_t lane_id() { return uint32_t(emu::lane()); }
TSR_DEVICE int warp_id() { return emu::B.cur / 32; }

TSR_DEVICE void block_barrier() { __syncthreads(); }

TSR_DEVICE uint32_t load_u32(Shared a) { return emu::load_shared<uint32_t>(a); }
TSR_DEVICE float load_f32(Shared a) { return emu::load_shared<float>(a); }
TSR_DEVICE double load_f64(Shared a) { return emu::load_shared<double>(a); }
TSR_DEVICE void load_u32x2(uint32_t& x, uint32_t& y, Shared a) {
  const uint2 v = emu::load_shared<uint2>(a);
  x = v.x, y = v.y;
}
TSR_DEVICE void load_u32x4(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, Shared a) {
  const uint4 v = emu::load_shared<uint4>(a);
  x = v.x, y = v.y, z = v.z, w = v.w;
}
TSR_DEVICE void store_u32(Shared a, uint32_t v) { emu::store_shared(a, v); }
TSR_DEVICE void store_f32(Shared a, float v) { emu::store_shared(a, v); }
TSR_DEVICE void store_f64(Shared a, double v) { emu::store_shared(a, v); }
TSR_DEVICE void store_u32x4(Shared a, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  emu::store_shared(a, uint4{x, y, z, w});
}

TSR_DEVICE void ldmatrix(uint32_t (&r)[4], Shared a, bool transposed) {
  struct Rows {
    uint16_t v[8];
  };
  emu::will_read(a, 16);
  Rows mine;
  std::memcpy(&mine, emu::B.shared + a, 16);
  const Rows* const at = &mine;
  emu::collect<const Rows*>(0xffffffffu, at, 8 + transposed, [&](int w) {
    const int g = emu::lane() / 4, t = emu::lane() % 4;
    for (int q = 0; q < 4; ++q) {
      const auto value = [&](int row, int column) { return emu::slot_of<const Rows*>(w + 8 * q + row)->v[column]; };
      const uint32_t lo = transposed ? value(2 * t, g) : value(g, 2 * t);
      const uint32_t hi = transposed ? value(2 * t + 1, g) : value(g, 2 * t + 1);
      r[q] = lo | hi << 16;
    }
    return at;
  });
}
TSR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared a) { ldmatrix(r, a, false); }
TSR_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], Shared a) { ldmatrix(r, a, true); }

TSR_DEVICE void mma_f16_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const float* const half = emu::half_values();
  emu::Fragments f;
  for (int i = 0; i < 4; ++i) f.a[2 * i] = half[a[i] & 0xffff], f.a[2 * i + 1] = half[a[i] >> 16];
  f.b[0] = half[b0 & 0xffff], f.b[1] = half[b0 >> 16], f.b[2] = half[b1 & 0xffff], f.b[3] = half[b1 >> 16];
  emu::mma(d, f, 16, 10);
}
TSR_DEVICE void mma_f16_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  const float* const half = emu::half_values();
  const uint32_t a[2] = {a0, a1};
  emu::Fragments f = {};
  for (int i = 0; i < 2; ++i) f.a[2 * i] = half[a[i] & 0xffff], f.a[2 * i + 1] = half[a[i] >> 16];
  f.b[0] = half[b0 & 0xffff], f.b[1] = half[b0 >> 16];
  emu::mma(d, f, 8, 11);
}
TSR_DEVICE void mma_bf16_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto value = [](uint32_t bits) { return __bfloat162float({uint16_t(bits)}); };
  emu::Fragments f;
  for (int i = 0; i < 4; ++i) f.a[2 * i] = value(a[i] & 0xffff), f.a[2 * i + 1] = value(a[i] >> 16);
  f.b[0] = value(b0 & 0xffff), f.b[1] = value(b0 >> 16), f.b[2] = value(b1 & 0xffff), f.b[3] = value(b1 >> 16);
  emu::mma(d, f, 16, 12);
}

TSR_DEVICE void mma_tf32_k8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto value = [](uint32_t bits) {  // the hardware takes the upper 19 bits
    bits &= 0xffffe000u;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  };
  const emu::Fragments mine{{value(a[0]), value(a[1]), value(a[2]), value(a[3])}, {value(b0), value(b1)}};
  emu::collect<const emu::Fragments*>(0xffffffffu, &mine, 13, [&](int w) {
    const int g = emu::lane() / 4, t = emu::lane() % 4;
    const auto of = [w](int lane) -> const emu::Fragments& { return *emu::slot_of<const emu::Fragments*>(w + lane); };
    for (int i = 0; i < 4; ++i) {
      const int lower = i >= 2 ? 1 : 0;  // rows g + 8 are in a1 and a3
      float sum = 0;
      for (int k = 0; k < 8; ++k)
        sum += of(g * 4 + k % 4).a[lower + k / 4 * 2] * of((2 * t + i % 2) * 4 + k % 4).b[k / 4];
      d[i] += sum;
    }
    return &mine;
  });
}
TSR_DEVICE uint32_t round_tf32(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return v != v ? 0x7fffffffu : (bits & 0x7fffffffu) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

TSR_DEVICE uint32_t pack_f16(float lo, float hi) { return emu::half_bits(lo) | uint32_t(emu::half_bits(hi)) << 16; }
TSR_DEVICE uint32_t pack_f16_relu(float lo, float hi) {
  const auto relu = [](float v) -> uint32_t { return v > 0 ? emu::half_bits(v) : v != v ? 0x7fffu : 0u; };
  return relu(lo) | relu(hi) << 16;
}
TSR_DEVICE uint32_t pack_bf16(float lo, float hi) {
  return __float2bfloat16(lo).bits | uint32_t(__float2bfloat16(hi).bits) << 16;
}
TSR_DEVICE void unpack_f16(uint32_t p, float& lo, float& hi) {
  lo = emu::half_values()[p & 0xffff], hi = emu::half_values()[p >> 16];
}
TSR_DEVICE float half_bits_to_float(uint16_t h) { return emu::half_values()[h]; }
TSR_DEVICE uint16_t float_to_half_bits(float f) { return emu::half_bits(f); }
TSR_DEVICE uint32_t sign_masks(uint32_t m) { return (m & 0x8000u ? 0xffffu : 0u) | (m >> 31 ? 0xffff0000u : 0u); }

TSR_DEVICE void copy_async(Shared to, const void* from, bool there, uint32_t bytes) {
  emu::will_write(to, bytes);
  if (there && reinterpret_cast<uintptr_t>(from) % bytes)
    emu::die("an asynchronous copy from an address that is not a multiple of its size");
  const emu::Copy c{to, bytes, 0, there ? from : nullptr};
  emu::start(c);
  if (emu::copies_arrive_at_once())
    emu::arrive(c, true);
  else
    emu::background().groups[emu::B.cur].back().push_back(c);
}
TSR_DEVICE void copy_async_16(Shared to, const void* from, bool there = true) { copy_async(to, from, there, 16); }
template <int kBytes>
TSR_DEVICE void copy_async_cached(Shared to, const void* from, bool there = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "");
  copy_async(to, from, there, kBytes);
}
TSR_DEVICE void copy_async_commit() { emu::background().groups[emu::B.cur].emplace_back(); }
template <int kLeft>
TSR_DEVICE void copy_async_wait() {
  auto& groups = emu::background().groups[emu::B.cur];
  while (int(groups.size()) - 1 > kLeft) {
    for (const emu::Copy& c : groups.front()) emu::arrive(c, true);
    groups.erase(groups.begin());
  }
}

TSR_DEVICE void barrier_init(Shared b, uint32_t count) {
  emu::check_range(b, 8, 8);
  emu::background().barriers[b] = {count, count, 0, 0};
}
TSR_DEVICE void barrier_arrive_expect(Shared b, uint32_t bytes) {
  emu::Barrier& m = emu::barrier(b);
  if (m.left == 0) emu::die_at("more arrivals than a barrier was made for", b);
  m.bytes += bytes;
  --m.left;
  emu::turn(m);
}
TSR_DEVICE void barrier_wait(Shared b, uint32_t parity) {
  for (int turns = 0; emu::barrier(b).parity == parity; ++turns) {
    auto& bulk = emu::background().bulk;
    for (size_t i = 0; i < bulk.size();)
      if (bulk[i].barrier == b) {
        const emu::Copy c = bulk[i];
        bulk.erase(bulk.begin() + long(i));
        emu::arrive_bulk(c);
      } else {
        ++i;
      }
    if (emu::barrier(b).parity != parity) return;
    if (turns > 1000000) emu::die_at("deadlock: nobody completes the phase of a barrier", b);
    emu::B.f[emu::B.cur].spins = true;
    emu::yield(emu::RUN);
    emu::B.f[emu::B.cur].spins = false;
  }
}
TSR_DEVICE void copy_bulk(Shared to, const void* from, uint32_t bytes, Shared b) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    emu::die("copy_bulk of or from what is not a multiple of 16");
  emu::check_range(to, bytes, 16);
  const emu::Copy c{to, bytes, b, from};
  emu::start(c);
  if (emu::copies_arrive_at_once())
    emu::arrive_bulk(c);
  else
    emu::background().bulk.push_back(c);
}
TSR_DEVICE void fence_before_copy() {}

TSR_DEVICE uint32_t count_up(Shared a, uint32_t last) {
  emu::check_range(a, 4, 4);
  if (!emu::B.watch[a / 4].known) emu::die_at("nobody has written what is read", a);
  uint32_t old, next;
  std::memcpy(&old, emu::B.shared + a, 4);
  next = old >= last ? 0 : old + 1;
  std::memcpy(emu::B.shared + a, &next, 4);
  return old;
}

}  // namespace tsr
