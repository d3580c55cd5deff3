// CPU twin of cuda/pgd_step.cu: the portable loops, and the choice of instruction set.
#include "cpu/isa.h"
#include "cpu/pgd_step_body.h"

namespace tsr {

void pgd_step_portable(const PgdStep& a, int threads) { TSR_WITH_DTYPE(a.dtype, T, run<T>(a, threads)) }
void pgd_step_avx2(const PgdStep& a, int threads);
void pgd_step_avx512(const PgdStep& a, int threads);
void pgd_step_linf_avx512bf16(const PgdStep& a, int threads);

void pgd_step_cpu(const PgdStep& a, int threads) {
#ifdef TSR_X86
  if (isa() >= Isa::avx512bf16 && a.norm == Norm::linf && a.dtype == Dtype::bf16)
    return pgd_step_linf_avx512bf16(a, threads);
#endif
  TSR_PICK_ISA(pgd_step)(a, threads);
}

}  // namespace tsr
