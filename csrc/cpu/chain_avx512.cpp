#include "cpu/chain_body.h"

namespace tsr {

void chain_forward_avx512(const ChainForward& a, int threads) { forward(a, threads); }
void chain_gradient_avx512(const ChainGradient& a, int threads) { gradient(a, threads); }
void chain_pgd_avx512(const ChainPgd& a, int threads) { pgd(a, threads); }
int64_t chain_workspace_avx512(const ChainPlan& student, const ChainPlan& teacher) {
  return workspace(student, teacher);
}

}  // namespace tsr
