// CUDA on a CPU, for tests: one block at a time, one fiber a thread. cuda/launch.cuh includes this under -DTSR_EMU; the
// .cu files are then compiled as C++ (CMakeLists.txt: _emu, emu_check) and their kernels run as they are written.
//
// There are threadIdx and its kin, __syncthreads (also _or, _and, _count), __syncwarp, shuffles, votes, atomics,
// dynamic shared memory (TSR_DYNAMIC_SHARED; no static __shared__, which could not be refilled for kernels that are
// templates) and mma_m16n8k16_bf16.
//
// A fiber runs until it waits at a barrier or a warp collective, so a race that needs two threads at once is not seen,
// but a missing barrier is: EMU_ORDER=forward | reverse | random changes who runs first, and random lets warps drift
// apart. Shared memory is full of NaN when a block starts. Waiting for threads that never come, lanes that a mask does
// not name, and writing past the shared memory that was asked for (reading too, under AddressSanitizer) are errors.
// Blocks follow each other, so races between blocks are not seen; nor is anything about speed or memory order.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define __CUDA_ARCH__ 900

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned X = 1, unsigned Y = 1, unsigned Z = 1) : x(X), y(Y), z(Z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
inline float2 make_float2(float a, float b) { return {a, b}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fff)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};  // round to nearest even
}

using std::max;
using std::min;
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}

namespace emu {

enum Wait : uint8_t { RUN, BLOCK, WARP, DONE };

struct Fiber {
  void* sp = nullptr;
  Wait wait = RUN;
  bool spins = false;  // runs, but only to look again: it must not keep a warp that is starved from running
  uint64_t slot[4];
  uint32_t mask = 0;
  int op = 0;
  uint3 tid;
};

extern "C" void emu_switch(void** save_sp, void* load_sp);

// A word of shared memory, as the functions of emu/tensor.h watch it: when and by which warp it was written and read.
struct Watch {
  uint64_t written = 0, read = 0;
  int writer = -1, reader = -1;
  bool known = false;
};

struct Block {
  dim3 grid{}, block{};
  uint3 bid{};
  int n = 0, cur = -1;
  std::vector<Fiber> f;
  std::vector<char*> stacks;
  size_t stack_bytes = 64 * 1024;
  void* main_sp = nullptr;
  const std::function<void()>* body = nullptr;
  char* shared = nullptr;  // the dynamic shared memory of the block that runs
  int bar_or = 0, bar_and = 1, bar_count = 0, bar_or_r = 0, bar_and_r = 1, bar_count_r = 0;
  uint64_t switches = 0, barriers = 0, number = 0;  // number: of the block, among all that ran
  std::vector<Watch> watch;
  std::exception_ptr error;
};
inline thread_local Block B;  // of the OS thread that launched it

[[noreturn]] inline void die(const char* what) { throw std::runtime_error(std::string("emu: ") + what); }
inline void yield(Wait w) {
  Fiber& me = B.f[B.cur];
  me.wait = w;
  ++B.switches;
  emu_switch(&me.sp, B.main_sp);
}

inline void entry() {
  try {
    (*B.body)();
  } catch (...) {
    B.error = std::current_exception();
  }  // must not unwind past the fiber's first frame
  B.f[B.cur].wait = DONE;
  void* dummy = nullptr;
  emu_switch(&dummy, B.main_sp);
  __builtin_unreachable();
}

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
// Save the callee-saved registers and the stack pointer; about 20 instructions, where swapcontext makes two system
// calls.
asm(R"(
.text
.weak emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
inline void* fresh(int, char* stack, size_t bytes) {
  uintptr_t top = (uintptr_t(stack) + bytes) & ~uintptr_t(15);
  void** p = reinterpret_cast<void**>(top);
  *--p = nullptr;  // keeps rsp = 16n + 8 at entry, as after a call
  *--p = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  return p;
}
#else
// Portable: ucontext. The "stack pointer" is a pointer to an ucontext_t.
inline thread_local std::vector<ucontext_t*> pool;
extern "C" inline void emu_switch(void** save_sp, void* load_sp) {
  ucontext_t* me;
  if (*save_sp == nullptr) {
    me = new ucontext_t;
    *save_sp = me;
  } else
    me = static_cast<ucontext_t*>(*save_sp);
  swapcontext(me, static_cast<ucontext_t*>(load_sp));
}
inline void* fresh(int t, char* stack, size_t bytes) {
  while (int(pool.size()) <= t) pool.push_back(new ucontext_t);
  ucontext_t* u = pool[t];
  getcontext(u);
  u->uc_stack.ss_sp = stack;
  u->uc_stack.ss_size = bytes;
  u->uc_link = nullptr;
  makecontext(u, reinterpret_cast<void (*)()>(&entry), 0);
  return u;
}
#endif

inline int order_mode() {
  const char* e = std::getenv("EMU_ORDER");
  return !e ? 0 : !std::strcmp(e, "reverse") ? 1 : !std::strcmp(e, "random") ? 2 : 0;
}

// Exactly as many bytes as a launch asked for, then a fence: poisoned under AddressSanitizer, else looked at
// afterwards.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), all_((bytes + 2 * kAlign - 1) / kAlign * kAlign) {
    B.shared = static_cast<char*>(std::aligned_alloc(kAlign, all_));
    if (!B.shared) die("no memory for shared memory");
    std::memset(B.shared, kFence, all_);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(B.shared + bytes_, all_ - bytes_);
#endif
  }
  ~SharedMemory() {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(B.shared, all_);
#endif
    std::free(B.shared);
    B.shared = nullptr;
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  void before_block() {
    std::memset(B.shared, 0xFF, bytes_);  // all ones is NaN in every float type
    B.watch.assign(bytes_ / 4, Watch{});
    ++B.number;
  }
  void after_block() const {
#ifndef __SANITIZE_ADDRESS__
    for (size_t i = bytes_; i < all_; ++i)
      if (B.shared[i] != kFence) die("a thread wrote past the end of the shared memory");
#endif
  }

 private:
  static constexpr size_t kAlign = 128;
  static constexpr char kFence = 0x5A;
  size_t bytes_, all_;
};

inline void run_block(const std::function<void()>& body) {
  B.body = &body;
  B.f.assign(B.n, Fiber{});
  while (int(B.stacks.size()) < B.n) {
    void* m = mmap(nullptr, B.stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED) die("no memory for a fiber stack");
    B.stacks.push_back(static_cast<char*>(m));
  }
  for (int t = 0; t < B.n; ++t) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(B.stacks[t], B.stack_bytes);  // the last fiber on this stack never returned
#endif
    B.f[t].sp = fresh(t, B.stacks[t], B.stack_bytes);
    B.f[t].tid = {t % B.block.x, t / B.block.x % B.block.y, t / (B.block.x * B.block.y)};
  }
  std::vector<int> order(B.n);
  for (int t = 0; t < B.n; ++t) order[t] = t;
  int mode = order_mode();
  if (mode == 1) std::reverse(order.begin(), order.end());
  uint32_t seed = (B.bid.x + B.bid.y * 7919u + 1u) * 2654435761u;
  auto rnd = [&seed] {
    seed ^= seed << 13;
    seed ^= seed >> 17;
    return seed ^= seed << 5;
  };
  int done = 0, others = 1, victim = int(rnd() >> 4) % ((B.n + 31) / 32);
  unsigned turn = 0;
  while (done < B.n) {
    if (mode == 2)
      for (int i = B.n - 1; i > 0; --i) {
        std::swap(order[i], order[rnd() % (i + 1)]);
      }
    int ran = 0, at_block = 0;
    done = 0;
    uint32_t held = 0;  // random: warps drift apart
    if (mode == 2) {
      if (B.bid.x & 1)
        held = rnd() & rnd();  // odd blocks: each warp is held back one turn in four
      else if (others)
        held = 1u << victim;  // even blocks: one warp is starved while any other can run
      if (turn++ % 4096 == 4095) held = 0;
    }
    others = 0;
    for (int t : order) {
      if (held >> (t / 32 & 31) & 1) {
        ran += B.f[t].wait == RUN;
        continue;
      }
      if (B.f[t].wait == RUN) {
        B.cur = t;
        emu_switch(&B.main_sp, B.f[t].sp);
        others += t / 32 != victim && !B.f[t].spins;
        ++ran;
      }
      if (B.error) {
        auto e = B.error;
        B.error = nullptr;
        std::rethrow_exception(e);
      }
      if (B.f[t].wait == DONE) ++done;
    }
    // Release warps whose every participating lane waits at the same collective.
    for (int w = 0; w < B.n; w += 32) {
      int hi = std::min(w + 32, B.n);
      for (int t = w; t < hi; ++t) {
        if (B.f[t].wait != WARP) continue;
        uint32_t m = B.f[t].mask;
        bool ready = true;
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) {
            if (w + l >= hi) die("warp mask names a lane outside the block");
            Fiber& o = B.f[w + l];
            if (o.wait == DONE) die("a lane named in a warp mask has exited");
            if (o.wait != WARP || o.mask != m) {
              ready = false;
              break;
            }
            if (o.op != B.f[t].op) die("lanes of one warp mask wait at different collectives");
          }
        if (ready)
          for (int l = 0; l < 32; ++l)
            if (m >> l & 1) {
              B.f[w + l].wait = RUN;
              ++ran;
            }
      }
    }
    done = 0;
    at_block = 0;
    int runnable = 0;
    for (int t = 0; t < B.n; ++t) {
      at_block += B.f[t].wait == BLOCK;
      done += B.f[t].wait == DONE;
      runnable += B.f[t].wait == RUN;
    }
    if (runnable == 0 && at_block > 0 && at_block + done == B.n) {
      if (done) die("__syncthreads reached by some threads after others have exited");
      B.bar_or_r = B.bar_or;
      B.bar_and_r = B.bar_and;
      B.bar_count_r = B.bar_count;
      B.bar_or = 0;
      B.bar_and = 1;
      B.bar_count = 0;
      ++B.barriers;
      for (auto& x : B.f) x.wait = RUN;
      others = 1;
    } else if (ran == 0 && done < B.n) {
      die("deadlock: some threads wait at a barrier or warp collective that the others never reach");
    }
  }
}

template <class F>
void launch(dim3 grid, dim3 block, size_t dyn_bytes, F&& fn) {
  B.grid = grid;
  B.block = block;
  B.n = block.x * block.y * block.z;
  if (B.n < 1 || B.n > 1024) die("block size must be 1..1024");
  SharedMemory shared(dyn_bytes);
  std::function<void()> body = fn;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        B.bid = {x, y, z};
        shared.before_block();
        try {
          run_block(body);
          shared.after_block();
        } catch (const std::exception& e) {
          char at[96];
          std::snprintf(at, sizeof at, " [block (%u,%u,%u), thread %d]", x, y, z, B.cur);
          throw std::runtime_error(e.what() + std::string(at));
        }
      }
}

inline int lane() { return B.cur & 31; }
template <class T, class R>
inline T collect(uint32_t mask, T v, int op, R&& pick) {
  static_assert(sizeof(T) <= 32, "");
  Fiber& me = B.f[B.cur];
  if (!(mask >> lane() & 1)) die("a lane calls a warp collective that its mask does not name");
  std::memcpy(me.slot, &v, sizeof(T));
  me.mask = mask;
  me.op = op;
  yield(WARP);
  T r = pick(B.cur & ~31);
  Fiber& again = B.f[B.cur];
  again.op = op | 64;  // second half: nobody overwrites a slot before all have read it
  yield(WARP);
  return r;
}
template <class T>
inline T slot_of(int t) {
  T v;
  std::memcpy(&v, B.f[t].slot, sizeof(T));
  return v;
}
}  // namespace emu

#define threadIdx (emu::B.f[emu::B.cur].tid)
#define blockIdx (emu::B.bid)
#define blockDim (emu::B.block)
#define gridDim (emu::B.grid)
#define warpSize 32

inline void __syncthreads() { emu::yield(emu::BLOCK); }
inline int __syncthreads_or(int p) {
  emu::B.bar_or |= p != 0;
  emu::yield(emu::BLOCK);
  return emu::B.bar_or_r;
}
inline int __syncthreads_and(int p) {
  emu::B.bar_and &= p != 0;
  emu::yield(emu::BLOCK);
  return emu::B.bar_and_r;
}
inline int __syncthreads_count(int p) {
  emu::B.bar_count += p != 0;
  emu::yield(emu::BLOCK);
  return emu::B.bar_count_r;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emu::collect<int>(mask, 0, 1, [](int) { return 0; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
inline T __shfl_sync(uint32_t m, T v, int src, int width = 32) {
  int l = emu::lane(), from = (l & ~(width - 1)) | (src & (width - 1));
  return emu::collect<T>(m, v, 2, [&](int w) { return emu::slot_of<T>(w + from); });
}
template <class T>
inline T __shfl_xor_sync(uint32_t m, T v, int x, int width = 32) {
  int l = emu::lane(), from = l ^ x;
  if (from / width != l / width) from = l;
  return emu::collect<T>(m, v, 3, [&](int w) { return emu::slot_of<T>(w + from); });
}
template <class T>
inline T __shfl_down_sync(uint32_t m, T v, int d, int width = 32) {
  int l = emu::lane(), from = l + d;
  if (from / width != l / width) from = l;
  return emu::collect<T>(m, v, 4, [&](int w) { return emu::slot_of<T>(w + from); });
}
template <class T>
inline T __shfl_up_sync(uint32_t m, T v, int d, int width = 32) {
  int l = emu::lane(), from = l - d;
  if (from < 0 || from / width != l / width) from = l;
  return emu::collect<T>(m, v, 5, [&](int w) { return emu::slot_of<T>(w + from); });
}
inline uint32_t __ballot_sync(uint32_t m, int p) {
  return emu::collect<int>(m, p != 0, 6, [&](int w) {
    uint32_t r = 0;
    for (int l = 0; l < 32; ++l)
      if (m >> l & 1) r |= uint32_t(emu::slot_of<int>(w + l)) << l;
    return r;
  });
}
inline int __any_sync(uint32_t m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(uint32_t m, int p) { return __ballot_sync(m, p) == m; }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline uint32_t __activemask() { return 0xffffffffu; }
template <class T, class U>
inline T atomicAdd(T* p, U v) {
  T o = *p;
  *p = T(o + v);
  return o;
}
template <class T, class U>
inline T atomicMax(T* p, U v) {
  T o = *p;
  *p = std::max(o, T(v));
  return o;
}
template <class T>
inline T atomicCAS(T* p, T c, T v) {
  T o = *p;
  if (o == c) *p = v;
  return o;
}

// D = A*B + C for one warp, the lane layout of mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32:
// a[4]: two bf16 each; lane l holds rows l/4 and l/4+8, columns (l%4)*2+{0,1} and +8. b[2]: rows k, column l/4.
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  struct Frag {
    uint32_t a[4], b[2];
  } fr;
  std::memcpy(fr.a, a, 16);
  std::memcpy(fr.b, b, 8);
  float r[4];
  emu::collect<Frag>(0xffffffffu, fr, 7, [&](int w) {
    int g = emu::lane() / 4, q = emu::lane() % 4;
    auto bf = [](uint32_t v, int hi) {
      uint32_t u = hi ? v & 0xffff0000u : v << 16;
      float f;
      std::memcpy(&f, &u, 4);
      return f;
    };
    for (int i = 0; i < 4; ++i) {
      int row = g + (i >= 2 ? 8 : 0), col = q * 2 + (i & 1);
      float s = c[i];
      for (int k = 0; k < 16; ++k) {
        int la = (row % 8) * 4 + (k % 8) / 2, ra = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0);
        int lb = col * 4 + (k % 8) / 2, rb = k >= 8 ? 1 : 0;
        s = std::fma(bf(emu::slot_of<Frag>(w + la).a[ra], k & 1), bf(emu::slot_of<Frag>(w + lb).b[rb], k & 1), s);
      }
      r[i] = s;
    }
    return fr;
  });
  for (int i = 0; i < 4; ++i) d[i] = r[i];
}

// extern __shared__ float buf[];  ->  EMU_DYNAMIC_SHARED(float, buf);
#define EMU_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::B.shared)
