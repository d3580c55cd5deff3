// Gates: which ReLUs were open, one bit a unit.   Used by every backend; documented to users in
// tsrfast/ops/relu_gate.py.
//
//   unit u of an image (its flat index in C, H, W order) is bit u % 32 of the image's word u / 32;
//   the bit is 1 iff z > 0 (z = 0 and z = NaN are closed); an image has ceil(n / 32) words, unused bits are 0.
#pragma once
#include "core/portable.h"

namespace tsr {

constexpr int kGateBits = 32;

TSR_HD int64_t gate_words(int64_t units) { return (units + kGateBits - 1) / kGateBits; }
template <class C>
TSR_HD uint32_t gate_bit(C z) {
  return z > C(0) ? 1u : 0u;
}
// relu as PyTorch has it: NaN stays NaN.
template <class C>
TSR_HD C gate_relu(C z) {
  return z > C(0) || z != z ? z : C(0);
}

}  // namespace tsr
