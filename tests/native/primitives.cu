// Every function of cuda/tensor.cuh in a kernel, on bits and numbers from a file: what a GPU makes of them, and what
// the emulator does (-DTSR_EMU). test_primitives.py compares both with definitions of its own.
//
//   primitives FILE     FILE: 1024 words of any bits, then 1024 float32
//
// prints a line for each function: its name, then what each thread got, as hexadecimal words. A block is two warps.
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/tensor.cuh"

namespace {

using namespace tsr;

constexpr int kThreads = 64, kWords = 1024;  // words of bits, of numbers, and of shared memory for each
constexpr size_t kSharedBytes = 2 * kWords * 4;

// Shared memory as all kernels find it: the bits, then the bits once more from the end.
TSR_DEVICE Shared fill(const uint32_t* bits) {
  TSR_DYNAMIC_SHARED(unsigned char, memory);
  const Shared s = shared_address(memory);
  for (int i = int(threadIdx.x); i < kWords; i += kThreads) {
    store_u32(s + 4 * i, bits[i]);
    store_u32(s + 4 * (kWords + i), bits[kWords - 1 - i]);
  }
  __syncthreads();
  return s;
}
// Where a thread looks: anywhere in the bits, a multiple of `bytes`.
TSR_DEVICE uint32_t somewhere(const uint32_t* bits, uint32_t bytes) {
  return bits[threadIdx.x] % (kWords * 4 / bytes) * bytes;
}
TSR_DEVICE uint32_t word(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
TSR_DEVICE void put(uint32_t* out, double v) { memcpy(out, &v, 8); }
TSR_DEVICE int next(int& k) { return k++ * kThreads + int(threadIdx.x); }

// --- who and where

__global__ void shared_address_check(const uint32_t*, const float*, uint32_t* out) {
  TSR_DYNAMIC_SHARED(unsigned char, memory);
  out[threadIdx.x] = shared_address(memory + 12 * threadIdx.x) - shared_address(memory);
}
__global__ void lane_id_check(const uint32_t*, const float*, uint32_t* out) { out[threadIdx.x] = lane_id(); }
__global__ void warp_id_check(const uint32_t*, const float*, uint32_t* out) { out[threadIdx.x] = uint32_t(warp_id()); }

// Threads come to the barrier in two places, those of the second warp too, and then read what another one has written.
__global__ void block_barrier_check(const uint32_t* bits, const float*, uint32_t* out) {
  constexpr int kHere = 40;
  const Shared s = fill(bits), other = s + 4 * (kThreads - 1 - threadIdx.x);
  store_u32(s + 4 * threadIdx.x, ~bits[threadIdx.x]);
  if (threadIdx.x < kHere) {
    block_barrier();
    out[threadIdx.x] = load_u32(other);
  } else {
    block_barrier();
    out[threadIdx.x] = load_u32(other) + 1;
  }
}

// --- shared memory by address

__global__ void load_u32_check(const uint32_t* bits, const float*, uint32_t* out) {
  out[threadIdx.x] = load_u32(fill(bits) + somewhere(bits, 4));
}
__global__ void load_f32_check(const uint32_t* bits, const float*, uint32_t* out) {
  out[threadIdx.x] = word(load_f32(fill(bits) + somewhere(bits, 4)));
}
__global__ void load_f64_check(const uint32_t* bits, const float*, uint32_t* out) {
  put(out + 2 * threadIdx.x, load_f64(fill(bits) + somewhere(bits, 8)));
}
__global__ void load_u32x2_check(const uint32_t* bits, const float*, uint32_t* out) {
  uint32_t* const o = out + 2 * threadIdx.x;
  load_u32x2(o[0], o[1], fill(bits) + somewhere(bits, 8));
}
__global__ void load_u32x4_check(const uint32_t* bits, const float*, uint32_t* out) {
  uint32_t* const o = out + 4 * threadIdx.x;
  load_u32x4(o[0], o[1], o[2], o[3], fill(bits) + somewhere(bits, 16));
}
// Stores go to the second half, a thread's own 16 bytes; all of it is then read by others.
TSR_DEVICE void read_all(Shared s, uint32_t* out) {
  __syncthreads();
  for (int i = int(threadIdx.x); i < 4 * kThreads; i += kThreads) out[i] = load_u32(s + 4 * (kWords + i));
}
TSR_DEVICE Shared own(Shared s) { return s + 4 * kWords + 16 * threadIdx.x; }
__global__ void store_u32_check(const uint32_t* bits, const float*, uint32_t* out) {
  const Shared s = fill(bits);
  store_u32(own(s) + 4, bits[threadIdx.x]);
  read_all(s, out);
}
__global__ void store_f32_check(const uint32_t* bits, const float* value, uint32_t* out) {
  const Shared s = fill(bits);
  store_f32(own(s) + 8, value[threadIdx.x]);
  read_all(s, out);
}
__global__ void store_f64_check(const uint32_t* bits, const float* value, uint32_t* out) {
  const Shared s = fill(bits);
  store_f64(own(s) + 8, double(value[threadIdx.x]));
  read_all(s, out);
}
__global__ void store_u32x4_check(const uint32_t* bits, const float*, uint32_t* out) {
  const Shared s = fill(bits);
  const uint32_t* const b = bits + 4 * threadIdx.x;
  store_u32x4(own(s), b[0], b[1], b[2], b[3]);
  read_all(s, out);
}

// --- matrices

__global__ void ldmatrix_x4_check(const uint32_t* bits, const float*, uint32_t* out) {
  uint32_t r[4];
  ldmatrix_x4(r, fill(bits) + somewhere(bits, 16));
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}
__global__ void ldmatrix_x4_trans_check(const uint32_t* bits, const float*, uint32_t* out) {
  uint32_t r[4];
  ldmatrix_x4_trans(r, fill(bits) + somewhere(bits, 16));
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}
// Operands: registers a0 .. a3, b0, b1 of two numbers each, then four sums, the
// first numbers again; number k of thread t is value[64 k + t].
template <class Pack>
TSR_DEVICE void operands(const float* value, uint32_t (&a)[4], uint32_t (&b)[2], float (&d)[4], Pack pack) {
  int k = 0;
  for (uint32_t& r : a) {
    const float lo = value[next(k)];
    r = pack(lo, value[next(k)]);
  }
  for (uint32_t& r : b) {
    const float lo = value[next(k)];
    r = pack(lo, value[next(k)]);
  }
  k = 0;  // the last quarter of the numbers is for conversions
  for (float& sum : d) sum = value[next(k)];
}
TSR_DEVICE void put_sums(uint32_t* out, const float (&d)[4]) {
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = word(d[i]);
}
__global__ void mma_f16_k16_check(const uint32_t*, const float* value, uint32_t* out) {
  uint32_t a[4], b[2];
  float d[4];
  operands(value, a, b, d, [](float lo, float hi) { return pack_f16(lo, hi); });
  mma_f16_k16(d, a, b[0], b[1]);
  put_sums(out, d);
}
__global__ void mma_f16_k8_check(const uint32_t*, const float* value, uint32_t* out) {
  uint32_t a[4], b[2];
  float d[4];
  operands(value, a, b, d, [](float lo, float hi) { return pack_f16(lo, hi); });
  mma_f16_k8(d, a[0], a[1], b[0]);
  put_sums(out, d);
}
__global__ void mma_bf16_k16_check(const uint32_t*, const float* value, uint32_t* out) {
  uint32_t a[4], b[2];
  float d[4];
  operands(value, a, b, d, [](float lo, float hi) { return pack_bf16(lo, hi); });
  mma_bf16_k16(d, a, b[0], b[1]);
  put_sums(out, d);
}
__global__ void mma_tf32_k8_check(const uint32_t*, const float* value, uint32_t* out) {
  uint32_t a[4], b[2];
  float d[4];
  int k = 0;
  for (uint32_t& r : a) r = round_tf32(value[next(k)]);
  for (uint32_t& r : b) r = round_tf32(value[next(k)]);
  k = 0;
  for (float& sum : d) sum = value[next(k)];
  mma_tf32_k8(d, a, b[0], b[1]);
  put_sums(out, d);
}

// --- conversions, of all numbers or all bits

template <class F>
TSR_DEVICE void each(F f) {
  for (int i = int(threadIdx.x); i < kWords; i += kThreads) f(i);
}
__global__ void pack_f16_check(const uint32_t*, const float* v, uint32_t* out) {
  each([=](int i) { out[i] = pack_f16(v[i], v[kWords - 1 - i]); });
}
__global__ void pack_f16_relu_check(const uint32_t*, const float* v, uint32_t* out) {
  each([=](int i) { out[i] = pack_f16_relu(v[i], v[kWords - 1 - i]); });
}
__global__ void pack_bf16_check(const uint32_t*, const float* v, uint32_t* out) {
  each([=](int i) { out[i] = pack_bf16(v[i], v[kWords - 1 - i]); });
}
__global__ void unpack_f16_check(const uint32_t* bits, const float*, uint32_t* out) {
  each([=](int i) {
    float lo, hi;
    unpack_f16(bits[i], lo, hi);
    out[2 * i] = word(lo), out[2 * i + 1] = word(hi);
  });
}
__global__ void half_bits_to_float_check(const uint32_t* bits, const float*, uint32_t* out) {
  each([=](int i) { out[i] = word(half_bits_to_float(uint16_t(bits[i]))); });
}
__global__ void float_to_half_bits_check(const uint32_t*, const float* v, uint32_t* out) {
  each([=](int i) { out[i] = float_to_half_bits(v[i]); });
}
__global__ void round_tf32_check(const uint32_t*, const float* v, uint32_t* out) {
  each([=](int i) { out[i] = round_tf32(v[i]); });
}
__global__ void sign_masks_check(const uint32_t* bits, const float*, uint32_t* out) {
  each([=](int i) { out[i] = sign_masks(bits[i]); });
}

// --- copies in the background

// Two groups of one copy each; every third thread copies nothing, which is zeros. The first group is read while the
// second may still be on its way.
__global__ void copy_async_16_check(const uint32_t* bits, const float*, uint32_t* out) {
  const Shared s = fill(bits), to = own(s);
  const Shared second = to + 16 * kThreads;
  copy_async_16(to, bits + somewhere(bits, 16) / 4, threadIdx.x % 3 != 0);
  copy_async_commit();
  copy_async_16(second, bits + 4 * threadIdx.x);
  copy_async_commit();
  uint32_t* const o = out + 8 * threadIdx.x;
  copy_async_wait<1>();
  load_u32x4(o[0], o[1], o[2], o[3], to);
  copy_async_wait<0>();
  load_u32x4(o[4], o[5], o[6], o[7], second);
}
// Of 4 bytes, of 8 and of 16, in one group.
__global__ void copy_async_cached_check(const uint32_t* bits, const float*, uint32_t* out) {
  const Shared s = fill(bits), to = own(s);
  copy_async_cached<4>(to, bits + somewhere(bits, 4) / 4, threadIdx.x % 3 != 0);
  copy_async_cached<8>(to + 8, bits + somewhere(bits, 8) / 4, threadIdx.x % 5 != 0);
  const Shared second = to + 16 * kThreads;
  copy_async_cached<16>(second, bits + somewhere(bits, 16) / 4, threadIdx.x % 3 != 0);
  copy_async_commit();
  copy_async_wait<0>();
  uint32_t* const o = out + 4 * kThreads + 4 * threadIdx.x;
  load_u32x4(o[0], o[1], o[2], o[3], second);
  read_all(s, out);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The second half of shared memory is filled twice with one part of the bits by each warp: by the last in the first
// phase of the barrier, and the other way round in the second.
__global__ void copy_bulk_check(const uint32_t* bits, const float*, uint32_t* out) {
  constexpr uint32_t kBytes = kWords * 4, kPart = kBytes / 2, kPhases = 2;
  const Shared s = fill(bits), to = s + kBytes, barrier = s;  // over bits that nobody reads any more
  const bool leads = threadIdx.x % 32 == 0;
  if (threadIdx.x == 0) {
    barrier_init(barrier, kThreads / 32);
    fence_before_copy();
  }
  __syncthreads();
  for (uint32_t phase = 0; phase < kPhases; ++phase) {
    const uint32_t part = uint32_t(warp_id()) ^ phase;
    if (leads) {
      fence_before_copy();
      barrier_arrive_expect(barrier, kPart);
      copy_bulk(to + part * kPart, bits + (part ^ 1) * (kPart / 4) + phase * 4, kPart - phase * 16, barrier);
      if (phase) copy_bulk(to + (part + 1) * kPart - 16, bits, 16, barrier);
    }
    barrier_wait(barrier, phase & 1);
    each([=](int i) { out[phase * kWords + i] = load_u32(to + 4 * i); });
    __syncthreads();
  }
}
#else
__global__ void copy_bulk_check(const uint32_t*, const float*, uint32_t*) {}
#endif

__global__ void count_up_check(const uint32_t*, const float*, uint32_t* out) {
  TSR_DYNAMIC_SHARED(unsigned char, memory);
  const Shared counter = shared_address(memory);
  if (threadIdx.x == 0) store_u32(counter, 0);
  __syncthreads();
  out[threadIdx.x] = count_up(counter, 5);
}

struct Check {
  const char* name;
  void (*kernel)(const uint32_t*, const float*, uint32_t*);
  int words;       // that it writes
  int since = 80;  // the first architecture that has it
};
const Check kChecks[] = {
    {"shared_address", shared_address_check, kThreads},
    {"lane_id", lane_id_check, kThreads},
    {"warp_id", warp_id_check, kThreads},
    {"block_barrier", block_barrier_check, kThreads},
    {"load_u32", load_u32_check, kThreads},
    {"load_f32", load_f32_check, kThreads},
    {"load_f64", load_f64_check, 2 * kThreads},
    {"load_u32x2", load_u32x2_check, 2 * kThreads},
    {"load_u32x4", load_u32x4_check, 4 * kThreads},
    {"store_u32", store_u32_check, 4 * kThreads},
    {"store_f32", store_f32_check, 4 * kThreads},
    {"store_f64", store_f64_check, 4 * kThreads},
    {"store_u32x4", store_u32x4_check, 4 * kThreads},
    {"ldmatrix_x4", ldmatrix_x4_check, 4 * kThreads},
    {"ldmatrix_x4_trans", ldmatrix_x4_trans_check, 4 * kThreads},
    {"mma_f16_k16", mma_f16_k16_check, 4 * kThreads},
    {"mma_f16_k8", mma_f16_k8_check, 4 * kThreads},
    {"mma_bf16_k16", mma_bf16_k16_check, 4 * kThreads},
    {"mma_tf32_k8", mma_tf32_k8_check, 4 * kThreads},
    {"pack_f16", pack_f16_check, kWords},
    {"pack_f16_relu", pack_f16_relu_check, kWords},
    {"pack_bf16", pack_bf16_check, kWords},
    {"unpack_f16", unpack_f16_check, 2 * kWords},
    {"half_bits_to_float", half_bits_to_float_check, kWords},
    {"float_to_half_bits", float_to_half_bits_check, kWords},
    {"round_tf32", round_tf32_check, kWords},
    {"sign_masks", sign_masks_check, kWords},
    {"copy_async_16", copy_async_16_check, 8 * kThreads},
    {"copy_async_cached", copy_async_cached_check, 8 * kThreads},
    {"copy_bulk", copy_bulk_check, 2 * kWords, 90},
    {"count_up", count_up_check, kThreads},
};

#ifdef TSR_EMU
int architecture() { return 90; }
void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
#else
int architecture() {
  cudaDeviceProp about;
  check(cudaGetDeviceProperties(&about, 0), "cudaGetDeviceProperties");
  return 10 * about.major + about.minor;
}
void* allocate(size_t bytes) {
  void* p;
  check(cudaMalloc(&p, bytes), "cudaMalloc");
  return p;
}
void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}
#endif

void run(const char* path) {
  std::vector<uint32_t> in(2 * kWords);
  std::FILE* const file = std::fopen(path, "rb");
  if (!file || std::fread(in.data(), 4, in.size(), file) != in.size()) throw std::runtime_error("FILE is too short");
  std::fclose(file);
  constexpr size_t kOut = 2 * kWords * 4;
  auto* const bits = static_cast<uint32_t*>(allocate(kSharedBytes));
  auto* const out = static_cast<uint32_t*>(allocate(kOut));
  copy(bits, in.data(), kSharedBytes);
  const int has = architecture();
  for (const Check& c : kChecks) {
    if (c.since > has) continue;
    std::vector<uint32_t> got(2 * kWords, 0xdeadbeef);
    copy(out, got.data(), kOut);
    tsr::launch(c.kernel, 1, kThreads, kSharedBytes, nullptr, static_cast<const uint32_t*>(bits),
                reinterpret_cast<const float*>(bits + kWords), out);
    copy(got.data(), out, kOut);
    std::printf("%s", c.name);
    for (int i = 0; i < c.words; ++i) std::printf(" %08x", got[size_t(i)]);
    std::printf("\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 2) throw std::runtime_error("usage: primitives FILE");
    run(argv[1]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
