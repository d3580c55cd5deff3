// What lets one header serve g++, nvcc and the emulator.
#pragma once
#include <cstdint>
#include <cstring>

// Internal linkage on purpose: a file compiled for AVX-512 must never hand its copy of a shared function to the rest
// of the binary (the linker keeps one copy of an inline function, and it may be that one).
#if defined(__CUDACC__)
#define TSR_HD static inline __host__ __device__
#else
#define TSR_HD [[maybe_unused]] static inline
#endif

// True only where nvcc compiles for the GPU itself (the emulator pretends to be one in every other respect).
#if defined(__CUDA_ARCH__) && !defined(TSR_EMU)
#define TSR_ON_GPU 1
#endif

namespace tsr {

template <class To, class From>
TSR_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace tsr
