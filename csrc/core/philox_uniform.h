// Uniform random numbers keyed by image.   Twins: cpu/philox_uniform.cpp, cuda/philox_uniform.cu
//
//   out[i, j] = lane j % 4 of philox(seed, index[i], draw, block = j / 4), mapped to [0, 1) with 24 bits
#pragma once
#include "core/philox.h"

namespace tsr {

struct PhiloxUniform {
  const int64_t* index;  // [N] number of each image in its data set
  float* out;            // [N, D]
  int64_t n, d;
  uint64_t seed;
  uint32_t draw;
};

void philox_uniform_cpu(const PhiloxUniform& args, int threads);
void philox_uniform_cuda(const PhiloxUniform& args, int device, void* stream);

}  // namespace tsr
