// CPU twin of cuda/philox_uniform.cu. Bound by integer arithmetic: about 10 rounds for 4 values.
#include "core/philox_uniform.h"

namespace tsr {

void philox_uniform_cpu(const PhiloxUniform& a, int threads) {
  const int64_t whole = a.d / 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && a.n > 1)
  for (int64_t i = 0; i < a.n; ++i) {
    const uint64_t seed = a.seed, image = uint64_t(a.index[i]);
    const uint32_t draw = a.draw;
    float* row = a.out + i * a.d;
#pragma omp simd
    for (int64_t b = 0; b < whole; ++b) {  // lanes are blocks
      const Philox4 r = philox(seed, image, draw, uint32_t(b));
      row[b * 4] = unit_interval(r.v[0]);
      row[b * 4 + 1] = unit_interval(r.v[1]);
      row[b * 4 + 2] = unit_interval(r.v[2]);
      row[b * 4 + 3] = unit_interval(r.v[3]);
    }
    const Philox4 last = philox(seed, image, draw, uint32_t(whole));
    for (int64_t k = 0; k < a.d - whole * 4; ++k) row[whole * 4 + k] = unit_interval(last.v[k]);
  }
}

}  // namespace tsr
