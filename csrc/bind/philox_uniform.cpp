#include "core/philox_uniform.h"

#include "bind/bind.h"

namespace {

tsr::PhiloxUniform arguments(Address index, Address out, int64_t n, int64_t d, uint64_t seed, uint32_t draw) {
  return {at<const int64_t>(index, n, "index"), at<float>(out, n * d, "out"), n, d, seed, draw};
}

}  // namespace

void bind_philox_uniform(py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
  cpu.def(
      "philox_uniform",
      [](Address index, Address out, int64_t n, int64_t d, uint64_t seed, uint32_t draw, int threads) {
        tsr::philox_uniform_cpu(arguments(index, out, n, d, seed, draw), threads);
      },
      release_gil());
#ifdef TSR_WITH_CUDA
  cuda.def(
      "philox_uniform",
      [](Address index, Address out, int64_t n, int64_t d, uint64_t seed, uint32_t draw, int device, Address stream) {
        tsr::philox_uniform_cuda(arguments(index, out, n, d, seed, draw), device, reinterpret_cast<void*>(stream));
      },
      release_gil());
#endif
}
