// ReLU with bit gates, and gating back.   Formula and shapes: core/relu_gate.h
//
// Work: a warp makes one gate word: lane k takes unit k, a ballot collects the bits, so global memory sees whole
// 128-byte lines. One pass. Bound by memory: 2 values and 1/8 byte a unit, each way.
#include "core/relu_gate.h"
#include "cuda/launch.cuh"

namespace tsr {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class T>
__global__ void __launch_bounds__(kThreads) relu_gate_kernel(ReluGate a, int64_t words) {
  const T* z = static_cast<const T*>(a.z);
  T* out = static_cast<T*>(a.a);
  const int lane = int(threadIdx.x % 32);
  for (int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; w < a.n * words; w += int64_t(gridDim.x) * kWarps) {
    const int64_t image = w / words, unit = (w - image * words) * kGateBits + lane, at = image * a.d + unit;
    const bool there = unit < a.d;
    const auto value = there ? load(z[at]) : compute_t<T>(0);
    if (there) store(out[at], gate_relu(value));
    const uint32_t bits = __ballot_sync(0xffffffffu, int(gate_bit(value)));
    if (lane == 0) a.gate[w] = bits;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) relu_gate_backward_kernel(ReluGateBackward a, int64_t words) {
  const T* v = static_cast<const T*>(a.v);
  T* out = static_cast<T*>(a.out);
  const int lane = int(threadIdx.x % 32);
  for (int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; w < a.n * words; w += int64_t(gridDim.x) * kWarps) {
    const int64_t image = w / words, unit = (w - image * words) * kGateBits + lane, at = image * a.d + unit;
    if (unit < a.d) out[at] = a.gate[w] >> lane & 1u ? v[at] : T{};
  }
}

}  // namespace

void relu_gate_cuda(const ReluGate& a, int device, void* stream) {
  if (a.n == 0 || a.d == 0) return;
  DeviceGuard guard(device);
  const int64_t words = gate_words(a.d);
  const dim3 grid(grid_limit((a.n * words + kWarps - 1) / kWarps));
  TSR_WITH_DTYPE(a.dtype, T, launch(relu_gate_kernel<T>, grid, dim3(kThreads), 0, stream, a, words))
}

void relu_gate_backward_cuda(const ReluGateBackward& a, int device, void* stream) {
  if (a.n == 0 || a.d == 0) return;
  DeviceGuard guard(device);
  const int64_t words = gate_words(a.d);
  const dim3 grid(grid_limit((a.n * words + kWarps - 1) / kWarps));
  TSR_WITH_DTYPE(a.dtype, T, launch(relu_gate_backward_kernel<T>, grid, dim3(kThreads), 0, stream, a, words))
}

}  // namespace tsr
