#include "core/relu_gate.h"

#include "bind/bind.h"

namespace {

tsr::ReluGate forward(Address z, Address a, Address gate, int64_t n, int64_t d, int dtype) {
  return {at<const void>(z, n * d, "z"),
          at<void>(a, n * d, "a"),
          at<uint32_t>(gate, n * d, "gate"),
          n,
          d,
          tsr::Dtype(dtype)};
}

tsr::ReluGateBackward backward(Address v, Address gate, Address out, int64_t n, int64_t d, int dtype) {
  return {at<const void>(v, n * d, "v"),
          at<const uint32_t>(gate, n * d, "gate"),
          at<void>(out, n * d, "out"),
          n,
          d,
          tsr::Dtype(dtype)};
}

}  // namespace

void bind_relu_gate(py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
  cpu.def(
      "relu_gate",
      [](Address z, Address a, Address gate, int64_t n, int64_t d, int dtype, int threads) {
        tsr::relu_gate_cpu(forward(z, a, gate, n, d, dtype), threads);
      },
      release_gil());
  cpu.def(
      "relu_gate_backward",
      [](Address v, Address gate, Address out, int64_t n, int64_t d, int dtype, int threads) {
        tsr::relu_gate_backward_cpu(backward(v, gate, out, n, d, dtype), threads);
      },
      release_gil());
#ifdef TSR_WITH_CUDA
  cuda.def(
      "relu_gate",
      [](Address z, Address a, Address gate, int64_t n, int64_t d, int dtype, int device, Address stream) {
        tsr::relu_gate_cuda(forward(z, a, gate, n, d, dtype), device, reinterpret_cast<void*>(stream));
      },
      release_gil());
  cuda.def(
      "relu_gate_backward",
      [](Address v, Address gate, Address out, int64_t n, int64_t d, int dtype, int device, Address stream) {
        tsr::relu_gate_backward_cuda(backward(v, gate, out, n, d, dtype), device, reinterpret_cast<void*>(stream));
      },
      release_gil());
#endif
}
