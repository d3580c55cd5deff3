#include "core/hyperplane_projection.h"

#include "bind/bind.h"

namespace {

tsr::HyperplaneProjection arguments(Address t, Address w, Address b, Address out, double lo, double hi, int64_t n,
                                    int64_t d, int norm, int dtype) {
  return {at<const void>(t, n * d, "t"),
          at<const void>(w, n * d, "w"),
          at<const double>(b, n, "b"),
          at<void>(out, n * d, "out"),
          lo,
          hi,
          n,
          d,
          tsr::Norm(norm),
          tsr::Dtype(dtype)};
}

}  // namespace

void bind_hyperplane_projection(py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
  cpu.def(
      "hyperplane_projection",
      [](Address t, Address w, Address b, Address out, double lo, double hi, int64_t n, int64_t d, int norm, int dtype,
         int threads) { tsr::hyperplane_projection_cpu(arguments(t, w, b, out, lo, hi, n, d, norm, dtype), threads); },
      release_gil());
#ifdef TSR_WITH_CUDA
  cuda.def(
      "hyperplane_projection",
      [](Address t, Address w, Address b, Address out, double lo, double hi, int64_t n, int64_t d, int norm, int dtype,
         int device, Address stream) {
        tsr::hyperplane_projection_cuda(arguments(t, w, b, out, lo, hi, n, d, norm, dtype), device,
                                        reinterpret_cast<void*>(stream));
      },
      release_gil());
#endif
}
