// Element types: how they are stored, in which type they are computed.
#pragma once
#include "core/portable.h"

namespace tsr {

// The tags are spoken by Python too: tsrfast/_native.py.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type of arithmetic on values of type T.
template <class T>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename compute<T>::type;

TSR_HD float load(float v) { return v; }
TSR_HD double load(double v) { return v; }
TSR_HD float load(bfloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
TSR_HD float load(float16 v) {
#ifdef TSR_ON_GPU
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  // The exponent is rebased by a multiplication, which is exact and gets subnormals right; inf and NaN are patched.
  const uint32_t magnitude = v.bits & 0x7fffu;
  uint32_t u = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  u |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(u | uint32_t(v.bits & 0x8000u) << 16);
#endif
}

// Rounding to nearest, ties to even, as PyTorch does.
TSR_HD void store(float& to, float v) { to = v; }
TSR_HD void store(double& to, double v) { to = v; }
TSR_HD void store(bfloat16& to, float v) {
  const uint32_t u = bit_cast<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  to.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
TSR_HD void store(float16& to, float v) {
#ifdef TSR_ON_GPU
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
#else
  const uint32_t u = bit_cast<uint32_t>(v), x = u & 0x7fffffffu;
  const uint32_t huge = x > 0x7f800000u ? 0x7e00u : 0x7c00u;                          // NaN, or at least 65536
  const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(x) + 0.5f) - 0x3f000000u;  // the addition rounds
  const uint32_t usual = (x + 0xc8000fffu + (x >> 13 & 1u)) >> 13;
  to.bits = uint16_t((x >= 0x47800000u ? huge : x < 0x38800000u ? tiny : usual) | (u >> 16 & 0x8000u));
#endif
}

}  // namespace tsr

// Runs a statement with `T` standing for the element type of a tag: TSR_WITH_DTYPE(a.dtype, T, run<T>(a));
#define TSR_WITH_DTYPE(tag, T, ...) \
  switch (tag) {                    \
    case ::tsr::Dtype::f32: {       \
      using T = float;              \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case ::tsr::Dtype::bf16: {      \
      using T = ::tsr::bfloat16;    \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case ::tsr::Dtype::f16: {       \
      using T = ::tsr::float16;     \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case ::tsr::Dtype::f64: {       \
      using T = double;             \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
  }
