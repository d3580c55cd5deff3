#include "cpu/relu_gate_body.h"

namespace tsr {

void relu_gate_avx2(const ReluGate& a, int threads) { TSR_WITH_DTYPE(a.dtype, T, forward<T>(a, threads)) }
void relu_gate_backward_avx2(const ReluGateBackward& a, int threads) { backward_any(a, threads); }

}  // namespace tsr
