#include "cpu/pgd_step_body.h"

namespace tsr {

void pgd_step_avx2(const PgdStep& a, int threads) { TSR_WITH_DTYPE(a.dtype, T, run<T>(a, threads)) }

}  // namespace tsr
