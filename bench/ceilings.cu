// What the GPU at hand can do at best, in the terms in which the kernels are planned: bytes per second of device
// memory, bytes per cycle from L2 and from shared memory, cycles per tensor-core instruction, alone and beside its
// loads.
//
//   nvcc -std=c++17 -O3 -Icsrc -arch=sm_90a bench/ceilings.cu -o ceilings && ./ceilings
//
// prints one JSON object. "cycles" are of block 0, of the one SM it ran on; rates per second are of the whole GPU, by
// events, the best of kRuns. An SM has four sub-cores, each with a tensor core: warp w belongs to number w % 4.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "cuda/tensor.cuh"

namespace {

using namespace tsr;

constexpr int kRuns = 5;

// --- device memory: grid-stride, a float4 a thread and turn

__global__ void copy_kernel(const float4* from, float4* to, int64_t n) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) to[i] = from[i];
}
__global__ void read_kernel(const float4* from, float* sink, int64_t n) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  float sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const float4 v = from[i];
    sum += v.x + v.y + v.z + v.w;
  }
  if (sum == 1) *sink = sum;  // never: the buffer is zero; keeps the loads
}

// --- L2: every block reads the same bytes again and again, past L1, ten loads of 16 bytes in flight a thread

constexpr int kInFlight = 10;

TSR_DEVICE uint4 load_past_l1(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__global__ void l2_kernel(const uint4* p, int n, int rounds, long long* cycles, uint32_t* sink) {
  uint32_t sum = 0;
  __syncthreads();
  const long long start = clock64();
  for (int r = 0; r < rounds; ++r)
    for (int i = int(threadIdx.x); i < n; i += kInFlight * int(blockDim.x)) {  // n is a multiple of the step
      uint4 v[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) v[k] = load_past_l1(p + i + k * int(blockDim.x));
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = clock64() - start;
  if (sum == 1) *sink = sum;
}

// --- tensor cores and ldmatrix: a round is kProducts independent products, and kLoads loads for the next round between
// them, as in the main loop of a convolution. Rows of 80 bytes: 8 of them touch all banks once.

constexpr int kRow = 80, kWarpBytes = 2560, kSharedBytes = 65536;

template <int kWarps, int kProducts, int kLoads>
__global__ void __launch_bounds__(32 * kWarps, 1) mix_kernel(int rounds, long long* cycles, float* sink) {
  TSR_DYNAMIC_SHARED(unsigned char, memory);
  const Shared s = shared_address(memory);
  // Small float16 numbers that are not alike: what tensor cores draw in power depends on their operands.
  for (uint32_t i = threadIdx.x; i < kSharedBytes / 4; i += blockDim.x)
    store_u32(s + 4 * i, 0x2c002c00u + (i * 2654435761u & 0x03ff03ffu));
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32;
  const Shared at = s + threadIdx.x / 32 * kWarpBytes + lane % 16 * kRow + lane / 16 * 16;

  constexpr int kFragments = kLoads ? kLoads : 1;
  float d[kProducts ? kProducts : 1][4] = {};
  uint32_t a[2][kFragments][4];
  for (auto& set : a)
    for (auto& fragment : set) ldmatrix_x4(fragment, at);
  const uint32_t b0 = 0x2c112c31u + lane, b1 = 0x2c172c30u + lane;

  __syncthreads();
  const long long start = clock64();
  for (int r = 0; r < rounds; r += 2) {
#pragma unroll
    for (int now = 0; now < 2; ++now) {
      int loaded = 0;
#pragma unroll
      for (int p = 0; p < kProducts; ++p) {
        if (loaded * kProducts < p * kLoads + kProducts && loaded < kLoads) {
          ldmatrix_x4(a[now ^ 1][loaded], at + uint32_t(loaded * kRow * 16));
          ++loaded;
        }
        mma_f16_k16(d[p], a[kLoads ? now : 0][p % kFragments], b0, b1);
      }
#pragma unroll
      for (; loaded < kLoads; ++loaded) ldmatrix_x4(a[now ^ 1][loaded], at + uint32_t(loaded * kRow * 16));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = clock64() - start;
  float sum = float(a[0][0][0] ^ a[1][0][0]);
  for (auto& row : d)
    for (float v : row) sum += v;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// --- measuring

struct Gpu {
  int sms;
  long long* cycles;  // on the GPU
  float* sink;
};
template <class T>
T* allocate(size_t bytes) {
  void* p;
  check(cudaMalloc(&p, bytes), "cudaMalloc");
  check(cudaMemset(p, 0, bytes), "cudaMemset");
  return static_cast<T*>(p);
}
struct Best {
  double seconds = 1e30;
  long long cycles = 0;  // of the fastest run
};
template <class F>
Best best_of(const Gpu& gpu, F run) {
  cudaEvent_t from, to;
  check(cudaEventCreate(&from), "cudaEventCreate");
  check(cudaEventCreate(&to), "cudaEventCreate");
  run();  // warm up
  Best best;
  for (int k = 0; k < kRuns; ++k) {
    check(cudaEventRecord(from), "cudaEventRecord");
    run();
    check(cudaEventRecord(to), "cudaEventRecord");
    check(cudaEventSynchronize(to), "cudaEventSynchronize");
    float ms;
    check(cudaEventElapsedTime(&ms, from, to), "cudaEventElapsedTime");
    if (1e-3 * ms < best.seconds) {
      best.seconds = 1e-3 * ms;
      check(cudaMemcpy(&best.cycles, gpu.cycles, 8, cudaMemcpyDeviceToHost), "cudaMemcpy");
    }
  }
  return best;
}

void memory_rates(const Gpu& gpu) {
  size_t free, total;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const size_t bytes = std::min<size_t>(free / 4, size_t(1) << 31) / 1024 * 1024;  // far more than L2 holds
  auto *const a = allocate<float4>(bytes), *const b = allocate<float4>(bytes);
  const int64_t n = int64_t(bytes / 16);
  const unsigned blocks = unsigned(gpu.sms) * 16;
  const Best copy = best_of(gpu, [&] { launch(copy_kernel, blocks, 512, 0, nullptr, (const float4*)a, b, n); });
  const Best read = best_of(gpu, [&] { launch(read_kernel, blocks, 512, 0, nullptr, (const float4*)a, gpu.sink, n); });
  check(cudaFree(a), "cudaFree");
  check(cudaFree(b), "cudaFree");
  std::printf(" \"copy_gb_per_s\": %.1f,\n \"read_gb_per_s\": %.1f,\n", 2e-9 * bytes / copy.seconds,
              1e-9 * bytes / read.seconds);
}

void l2_rates(const Gpu& gpu) {
  constexpr int kRounds = 64, kThreads = 256, kStep = kInFlight * kThreads;
  std::printf(" \"l2_bytes_per_cycle_and_sm\": {");
  for (const int kib : {270, 1080}) {  // a linear layer's weights, and four of them
    const int n = kib * 64 / kStep * kStep;
    auto* const p = allocate<uint4>(size_t(n) * 16);
    const Best best = best_of(gpu, [&] {
      launch(l2_kernel, unsigned(gpu.sms), kThreads, 0, nullptr, (const uint4*)p, n, kRounds, gpu.cycles,
             reinterpret_cast<uint32_t*>(gpu.sink));
    });
    std::printf("%s\"%d KiB\": %.2f", kib == 270 ? "" : ", ", kib, 16. * n * kRounds / double(best.cycles));
    check(cudaFree(p), "cudaFree");
  }
  std::printf("},\n");
}

template <int kWarps, int kProducts, int kLoads>
void mix_rate(const Gpu& gpu, bool last = false) {
  constexpr int kRounds = 4096;
  const auto kernel = mix_kernel<kWarps, kProducts, kLoads>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
  const Best best = best_of(gpu, [&] {
    launch(kernel, unsigned(gpu.sms), 32 * kWarps, kSharedBytes, nullptr, kRounds, gpu.cycles, gpu.sink);
  });
  const double products = double(kRounds) * kProducts * kWarps, loads = double(kRounds) * kLoads * kWarps;  // of an SM
  const double cycles = double(best.cycles);
  std::printf("  {\"mma\": %d, \"ldmatrix\": %d, \"warps\": %d", kProducts, kLoads, kWarps);
  if constexpr (kProducts > 0)
    std::printf(", \"cycles_per_mma_and_subcore\": %.3f, \"tflop_per_s\": %.1f", 4 * cycles / products,
                1e-12 * products * 2 * 16 * 8 * 16 * gpu.sms / best.seconds);
  if constexpr (kLoads > 0) std::printf(", \"ldmatrix_bytes_per_cycle_and_sm\": %.1f", loads * 512 / cycles);
  std::printf(", \"mhz\": %.0f}%s\n", 1e-6 * cycles / best.seconds, last ? "" : ",");
}

void run() {
  cudaDeviceProp about;
  check(cudaGetDeviceProperties(&about, 0), "cudaGetDeviceProperties");
  const Gpu gpu{about.multiProcessorCount, allocate<long long>(8),
                allocate<float>(size_t(about.multiProcessorCount) * 2048)};
  std::printf("{\"sms\": %d, \"l2_mib\": %.0f,\n", gpu.sms, about.l2CacheSize / 1048576.);
  memory_rates(gpu);
  l2_rates(gpu);
  std::printf(" \"tensor\": [\n");
  mix_rate<4, 16, 0>(gpu);
  mix_rate<8, 16, 0>(gpu);
  mix_rate<16, 16, 0>(gpu);
  mix_rate<8, 0, 8>(gpu);
  mix_rate<8, 35, 7>(gpu);
  mix_rate<8, 35, 10>(gpu);
  mix_rate<8, 24, 8>(gpu);
  mix_rate<8, 7, 1>(gpu);
  mix_rate<8, 4, 4>(gpu, true);
  std::printf(" ]\n}\n");
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
