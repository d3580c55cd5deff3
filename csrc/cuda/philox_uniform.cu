// Uniform random numbers keyed by image.   Formula and shapes: core/philox_uniform.h
//
// Work: a thread makes one block of 4 values; grid x runs over blocks, grid-stride in y over images. One write, no
// read: bound by 4 bytes a value and about 60 integer operations for four values.
#include "core/philox_uniform.h"
#include "cuda/launch.cuh"

namespace tsr {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) philox_uniform_kernel(PhiloxUniform a) {
  const int64_t block = int64_t(blockIdx.x) * kThreads + threadIdx.x, j = block * 4;
  if (j >= a.d) return;
  for (int64_t i = blockIdx.y; i < a.n; i += gridDim.y) {
    const Philox4 r = philox(a.seed, uint64_t(a.index[i]), a.draw, uint32_t(block));
    for (int k = 0; k < 4; ++k)
      if (j + k < a.d) a.out[i * a.d + j + k] = unit_interval(r.v[k]);
  }
}

}  // namespace

void philox_uniform_cuda(const PhiloxUniform& a, int device, void* stream) {
  if (a.n == 0 || a.d == 0) return;
  DeviceGuard guard(device);
  const int64_t blocks = ((a.d + 3) / 4 + kThreads - 1) / kThreads;
  launch(philox_uniform_kernel, dim3(unsigned(blocks), grid_limit(a.n)), dim3(kThreads), 0, stream, a);
}

}  // namespace tsr
