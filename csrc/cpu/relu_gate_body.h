// The loops of relu_gate for one instruction set; compiled once for each by relu_gate{,_avx2,_avx512}.cpp.
#include "core/relu_gate.h"

namespace tsr {
namespace {

// Words are independent, so threads share them out whatever the batch size.
template <class T>
void forward(const ReluGate& a, int threads) {
  const T* z = static_cast<const T*>(a.z);
  T* out = static_cast<T*>(a.a);
  const int64_t words = gate_words(a.d), total = a.n * words;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && total > 1024)
  for (int64_t w = 0; w < total; ++w) {
    const int64_t image = w / words, first = (w - image * words) * kGateBits, at = image * a.d + first;
    uint32_t bits = 0;
    if (a.d - first >= kGateBits) {  // a constant trip count: this loop becomes vector code
      for (int k = 0; k < kGateBits; ++k) {
        const auto value = load(z[at + k]);
        bits |= gate_bit(value) << k;
        store(out[at + k], gate_relu(value));
      }
    } else {
      for (int k = 0; k < int(a.d - first); ++k) {
        const auto value = load(z[at + k]);
        bits |= gate_bit(value) << k;
        store(out[at + k], gate_relu(value));
      }
    }
    a.gate[w] = bits;
  }
}

template <class T>
void backward(const ReluGateBackward& a, int threads) {
  const T* v = static_cast<const T*>(a.v);
  T* out = static_cast<T*>(a.out);
  const int64_t words = gate_words(a.d), total = a.n * words;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && total > 1024)
  for (int64_t w = 0; w < total; ++w) {
    const int64_t image = w / words, first = (w - image * words) * kGateBits, at = image * a.d + first;
    const uint32_t bits = a.gate[w];
    if (a.d - first >= kGateBits) {
      for (int k = 0; k < kGateBits; ++k) out[at + k] = bits >> k & 1u ? v[at + k] : T{};
    } else {
      for (int k = 0; k < int(a.d - first); ++k) out[at + k] = bits >> k & 1u ? v[at + k] : T{};
    }
  }
}

}  // namespace
}  // namespace tsr
