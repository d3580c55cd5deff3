// CPU twin of cuda/relu_gate.cu: the portable loops, and the choice of instruction set.
#include "cpu/isa.h"
#include "cpu/relu_gate_body.h"

namespace tsr {

void relu_gate_portable(const ReluGate& a, int threads) { TSR_WITH_DTYPE(a.dtype, T, forward<T>(a, threads)) }
void relu_gate_avx2(const ReluGate& a, int threads);
void relu_gate_avx512(const ReluGate& a, int threads);
void relu_gate_backward_portable(const ReluGateBackward& a, int threads) { backward_any(a, threads); }
void relu_gate_backward_avx2(const ReluGateBackward& a, int threads);
void relu_gate_backward_avx512(const ReluGateBackward& a, int threads);

void relu_gate_cpu(const ReluGate& a, int threads) { TSR_PICK_ISA(relu_gate)(a, threads); }
void relu_gate_backward_cpu(const ReluGateBackward& a, int threads) { TSR_PICK_ISA(relu_gate_backward)(a, threads); }

}  // namespace tsr
