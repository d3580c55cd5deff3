#include "cpu/hyperplane_projection_body.h"

namespace tsr {

void hyperplane_projection_avx512(const HyperplaneProjection& a, int threads) {
  TSR_WITH_DTYPE(a.dtype, T, run<T>(a, threads))
}

}  // namespace tsr
