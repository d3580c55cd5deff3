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

// Moves bits, whatever they mean: Word is an unsigned integer as long as an element.
template <class Word>
void backward(const ReluGateBackward& a, int threads) {
  const Word* v = static_cast<const Word*>(a.v);
  Word* out = static_cast<Word*>(a.out);
  const int64_t words = gate_words(a.d), total = a.n * words;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && total > 1024)
  for (int64_t w = 0; w < total; ++w) {
    const int64_t image = w / words, first = (w - image * words) * kGateBits, at = image * a.d + first;
    const uint32_t bits = a.gate[w];
    if (a.d - first >= kGateBits) {
      for (int k = 0; k < kGateBits; ++k) out[at + k] = v[at + k] & Word(-Word(bits >> k & 1u));
    } else {
      for (int k = 0; k < int(a.d - first); ++k) out[at + k] = v[at + k] & Word(-Word(bits >> k & 1u));
    }
  }
}

void backward_any(const ReluGateBackward& a, int threads) {
  switch (a.dtype) {
    case Dtype::f32:
      return backward<uint32_t>(a, threads);
    case Dtype::f64:
      return backward<uint64_t>(a, threads);
    default:
      return backward<uint16_t>(a, threads);
  }
}

}  // namespace
}  // namespace tsr
