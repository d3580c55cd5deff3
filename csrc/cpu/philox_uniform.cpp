// CPU twin of cuda/philox_uniform.cu. Bound by integer arithmetic: about 10 rounds for 4 values.
#include "core/philox_uniform.h"

namespace tsr {

void philox_uniform_cpu(const PhiloxUniform& a, int threads) {
  const int64_t blocks = (a.d + 3) / 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && a.n > 1)
  for (int64_t i = 0; i < a.n; ++i) {
    float* row = a.out + i * a.d;
    for (int64_t b = 0; b < blocks; ++b) {
      const Philox4 r = philox(a.seed, uint64_t(a.index[i]), a.draw, uint32_t(b));
      for (int64_t j = b * 4, k = 0; k < 4 && j < a.d; ++j, ++k) row[j] = unit_interval(r.v[k]);
    }
  }
}

}  // namespace tsr
