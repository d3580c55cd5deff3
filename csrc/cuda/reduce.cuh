// Sums and maxima over a block. blockDim.x must be a multiple of 32, at most 1024.
#pragma once
#include "cuda/launch.cuh"

namespace tsr {

struct Add {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

template <class V, class Op>
__device__ inline V warp_reduce(V v, Op op) {
  for (int o = 16; o; o >>= 1) v = op(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

// Every thread gets the result. `part` is room for 32 values in shared memory and may be used again right after the
// call. `neutral` stands in for warps that do not exist.
template <class V, class Op>
__device__ inline V block_reduce(V v, V neutral, Op op, V* part) {
  v = warp_reduce(v, op);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  v = warp_reduce(threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : neutral, op);
  __syncthreads();
  return v;
}

template <class V>
__device__ inline V block_sum(V v, V* part) {
  return block_reduce(v, V(0), Add{}, part);
}

}  // namespace tsr
