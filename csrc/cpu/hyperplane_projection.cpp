// CPU twin of cuda/hyperplane_projection.cu: the portable loops, and the choice of instruction set.
#include "cpu/hyperplane_projection_body.h"
#include "cpu/isa.h"

namespace tsr {

void hyperplane_projection_portable(const HyperplaneProjection& a, int threads) {
  TSR_WITH_DTYPE(a.dtype, T, run<T>(a, threads))
}
void hyperplane_projection_avx2(const HyperplaneProjection& a, int threads);
void hyperplane_projection_avx512(const HyperplaneProjection& a, int threads);

void hyperplane_projection_cpu(const HyperplaneProjection& a, int threads) {
  TSR_PICK_ISA(hyperplane_projection)(a, threads);
}

}  // namespace tsr
