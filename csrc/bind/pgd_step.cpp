#include "core/pgd_step.h"

#include "bind/bind.h"

namespace {

tsr::PgdStep arguments(Address x, Address x0, Address g, Address out, Address bad, Address step, Address eps,
                       double step_value, double eps_value, double lo, double hi, double sparsity, int64_t n, int64_t d,
                       int norm, int dtype, bool targeted) {
  return {at<const void>(x, n * d, "x"),
          at<const void>(x0, n * d, "x0"),
          at<const void>(g, n * d, "g"),
          at<void>(out, n * d, "out"),
          at<int64_t>(bad, n, "bad"),
          at<const double>(step, 0, "step"),
          at<const double>(eps, 0, "eps"),
          step_value,
          eps_value,
          lo,
          hi,
          sparsity,
          n,
          d,
          tsr::Norm(norm),
          tsr::Dtype(dtype),
          targeted};
}

}  // namespace

void bind_pgd_step(py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
  cpu.def(
      "pgd_step",
      [](Address x, Address x0, Address g, Address out, Address bad, Address step, Address eps, double step_value,
         double eps_value, double lo, double hi, double sparsity, int64_t n, int64_t d, int norm, int dtype,
         bool targeted, int threads) {
        tsr::pgd_step_cpu(arguments(x, x0, g, out, bad, step, eps, step_value, eps_value, lo, hi, sparsity, n, d, norm,
                                    dtype, targeted),
                          threads);
      },
      release_gil());
#ifdef TSR_WITH_CUDA
  cuda.def(
      "pgd_step",
      [](Address x, Address x0, Address g, Address out, Address bad, Address step, Address eps, double step_value,
         double eps_value, double lo, double hi, double sparsity, int64_t n, int64_t d, int norm, int dtype,
         bool targeted, int device, Address stream) {
        tsr::pgd_step_cuda(arguments(x, x0, g, out, bad, step, eps, step_value, eps_value, lo, hi, sparsity, n, d, norm,
                                     dtype, targeted),
                           device, reinterpret_cast<void*>(stream));
      },
      release_gil());
#endif
}
