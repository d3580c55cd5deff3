// The one place that knows how a kernel is started. No other file uses <<<...>>>.
//
// Kernels take their shared memory as TSR_DYNAMIC_SHARED: the emulator fills it with NaN before every block, which it
// cannot do for static arrays of templates.
#pragma once
#include <cstdint>
#ifdef TSR_EMU
#include "emu/emu.h"

namespace tsr {

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void*, A... args) {
  emu::launch(grid, block, smem, [=] { kernel(args...); });
}
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

}  // namespace tsr

#define TSR_DYNAMIC_SHARED(T, name) EMU_DYNAMIC_SHARED(T, name)
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace tsr {

inline void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess)
    throw std::runtime_error(std::string("tsrfast: ") + what + ": " + cudaGetErrorName(e) + ": " +
                             cudaGetErrorString(e));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), "kernel launch");
}

// Makes `device` current for a scope.
struct DeviceGuard {
  int old = 0;
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&old), "cudaGetDevice");
    if (old != device) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(old); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

}  // namespace tsr

#define TSR_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char tsr_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(tsr_dynamic_shared)
#endif

namespace tsr {

// Grids are capped where a kernel strides: enough blocks to fill any GPU, within the limit of grid dimensions y and z.
inline unsigned grid_limit(int64_t blocks) { return unsigned(blocks < 65535 ? blocks : 65535); }

}  // namespace tsr
