// Vectors of L images: every activation of a chain is stored as [unit][L], so a lane is an image and whatever a network
// does is one operation on vectors. The lanes never meet: an image's result does not depend on who shares its vector,
// nor on L (all products that are summed go through fma, in one order).
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/chain.h"

namespace tsr {
namespace {

template <int L>
struct Lanes;

// fma; open(z): bit l set where not z[l] <= 0; nonzero(z): where z[l] != 0; select(bits, a, b): a where the bit is set,
// else b.
#if defined(__AVX2__)
template <>
struct Lanes<1> {  // where there is one image only, products take vectors of outputs instead
  typedef float V __attribute__((vector_size(4)));
  static V fma(V a, V b, V c) { return V{__builtin_fmaf(a[0], b[0], c[0])}; }
  static unsigned open(V z) { return z[0] <= 0 ? 0 : 1; }
  static unsigned nonzero(V z) { return z[0] != 0 ? 1 : 0; }
  static V select(unsigned bits, V a, V b) { return bits ? a : b; }
};
#endif
#if defined(__AVX512F__)
template <>
struct Lanes<16> {
  typedef float V __attribute__((vector_size(64)));
  static V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static unsigned open(V z) { return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_NLE_UQ); }
  static unsigned nonzero(V z) { return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
  static V select(unsigned bits, V a, V b) { return (V)_mm512_mask_blend_ps(__mmask16(bits), (__m512)b, (__m512)a); }
};
template <>
struct Lanes<8> {
  typedef float V __attribute__((vector_size(32)));
  static V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static unsigned open(V z) { return _mm256_cmp_ps_mask((__m256)z, _mm256_setzero_ps(), _CMP_NLE_UQ); }
  static unsigned nonzero(V z) { return _mm256_cmp_ps_mask((__m256)z, _mm256_setzero_ps(), _CMP_NEQ_UQ); }
  static V select(unsigned bits, V a, V b) { return (V)_mm256_mask_blend_ps(__mmask8(bits), (__m256)b, (__m256)a); }
};
template <>
struct Lanes<4> {
  typedef float V __attribute__((vector_size(16)));
  static V fma(V a, V b, V c) { return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c); }
  static unsigned open(V z) { return _mm_cmp_ps_mask((__m128)z, _mm_setzero_ps(), _CMP_NLE_UQ); }
  static unsigned nonzero(V z) { return _mm_cmp_ps_mask((__m128)z, _mm_setzero_ps(), _CMP_NEQ_UQ); }
  static V select(unsigned bits, V a, V b) { return (V)_mm_mask_blend_ps(__mmask8(bits), (__m128)b, (__m128)a); }
};
constexpr int kMostLanes = 16, kRows = 8;  // a tile of 8 x 3 sums, 3 inputs, a weight: 28 of 32 registers
#elif defined(__AVX2__)
template <>
struct Lanes<8> {
  typedef float V __attribute__((vector_size(32)));
  static V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static unsigned open(V z) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)z, _mm256_setzero_ps(), _CMP_NLE_UQ)); }
  static unsigned nonzero(V z) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)z, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  }
  static V select(unsigned bits, V a, V b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
    return (V)_mm256_blendv_ps((__m256)b, (__m256)a, _mm256_castsi256_ps(set));
  }
};
template <>
struct Lanes<4> {
  typedef float V __attribute__((vector_size(16)));
  static V fma(V a, V b, V c) { return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c); }
  static unsigned open(V z) { return _mm_movemask_ps(_mm_cmp_ps((__m128)z, _mm_setzero_ps(), _CMP_NLE_UQ)); }
  static unsigned nonzero(V z) { return _mm_movemask_ps(_mm_cmp_ps((__m128)z, _mm_setzero_ps(), _CMP_NEQ_UQ)); }
  static V select(unsigned bits, V a, V b) {
    const __m128i lane = _mm_setr_epi32(1, 2, 4, 8);
    const __m128i set = _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(int(bits)), lane), lane);
    return (V)_mm_blendv_ps((__m128)b, (__m128)a, _mm_castsi128_ps(set));
  }
};
constexpr int kMostLanes = 8, kRows = 4;  // 12 sums, 3 inputs, a weight: 16 registers
#else
template <>
struct Lanes<4> {
  typedef float V __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static V fma(V a, V b, V c) { return a * b + c; }  // rounded twice: without the instruction, one rounding costs much
  static unsigned open(V z) {
    unsigned bits = 0;
    for (int l = 0; l < 4; ++l) bits |= unsigned(!(z[l] <= 0)) << l;
    return bits;
  }
  static unsigned nonzero(V z) {
    unsigned bits = 0;
    for (int l = 0; l < 4; ++l) bits |= unsigned(z[l] != 0) << l;
    return bits;
  }
  static V select(unsigned bits, V a, V b) {
    const I lane = {1, 2, 4, 8}, set = (lane & int32_t(bits)) == lane;
    return set ? a : b;
  }
};
constexpr int kMostLanes = 4, kRows = 4;
#endif

template <int L>
using Vec = typename Lanes<L>::V;

// Pixels (or tiles) that are worked on together: columns of a tile of sums.
template <int L>
constexpr int kPoints = L == 1 ? 12 : 3;

template <int L>
Vec<L> all(float v) {
  return Vec<L>{} + v;
}

using Gate = uint16_t;  // a bit a lane

// Where a record's results go. Forward: through the activation, whose gates are kept. Backward: through the gates of
// the record before.
template <int L>
struct Sink {
  enum Mode { plain, relu, leaky, gate_relu, gate_leaky };
  Vec<L>* out;
  Gate* gate;
  float slope;
  Mode mode;

  void put(int64_t unit, Vec<L> z) const {
    using T = Lanes<L>;
    if (mode == relu || mode == leaky) {
      const unsigned open = T::open(z);
      gate[unit] = Gate(open);
      z = T::select(open, z, mode == relu ? Vec<L>{} : z * slope);
    } else if (mode != plain) {
      z = T::select(gate[unit], z, mode == gate_relu ? Vec<L>{} : z * slope);
    }
    out[unit] = z;
  }
};

}  // namespace
}  // namespace tsr
