// ReLU that remembers its gates, and the way back.   Twins: cpu/relu_gate.cpp, cuda/relu_gate.cu
//
//   forward     a = max(z, 0),  gate = [z > 0] as bits (core/gates.h)
//   backward    out = v * gate        D_l of the recursive gradient rule (Tian 2019, Lemma 1)
#pragma once
#include "core/dtype.h"
#include "core/gates.h"

namespace tsr {

struct ReluGate {
  const void* z;   // [N, D] pre-activations
  void* a;         // [N, D] activations; may be z
  uint32_t* gate;  // [N, ceil(D / 32)]
  int64_t n, d;
  Dtype dtype;
};

struct ReluGateBackward {
  const void* v;         // [N, D] vectors to be gated
  const uint32_t* gate;  // [N, ceil(D / 32)]
  void* out;             // [N, D]; may be v
  int64_t n, d;
  Dtype dtype;
};

void relu_gate_cpu(const ReluGate& args, int threads);
void relu_gate_cuda(const ReluGate& args, int device, void* stream);
void relu_gate_backward_cpu(const ReluGateBackward& args, int threads);
void relu_gate_backward_cuda(const ReluGateBackward& args, int device, void* stream);

}  // namespace tsr
