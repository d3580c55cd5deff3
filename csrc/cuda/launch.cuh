// The one place that knows how a kernel is started. No other file uses <<<...>>>.
//
// Kernels take their shared memory as TSR_DYNAMIC_SHARED: the emulator fills it with NaN before every block, which it
// cannot do for static arrays of templates.
#pragma once
#include <cstdint>
#ifndef __CUDACC_RTC__  // the compiler of NVRTC sees device code only
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#endif
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
struct DeviceTraits {
  int capability = 90, multiprocessors = 2, shared = 232448;
  explicit DeviceTraits(int) {}
};
class LoadedKernel {  // there are none
 public:
  LoadedKernel(const void*, const char*) {
    throw std::runtime_error("tsrfast: kernels compiled at run time need a GPU, the emulator cannot run them");
  }
  template <class... A>
  void operator()(dim3, dim3, size_t, void*, const A&...) const {}
};
class Replay {
 public:
  Replay(std::function<void(void*)> launches, void*) : launches_(std::move(launches)) {}
  void operator()(void* stream) const { launches_(stream); }

 private:
  std::function<void(void*)> launches_;
};

}  // namespace tsr

#define __grid_constant__

#define TSR_DYNAMIC_SHARED(T, name) EMU_DYNAMIC_SHARED(T, name)
#else
#define TSR_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char tsr_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(tsr_dynamic_shared)
#endif

#if !defined(TSR_EMU) && !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>

namespace tsr {

inline void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  cudaGetLastError();  // else this thread's next launch would report it once more
  throw std::runtime_error(std::string("tsrfast: ") + what + ": " + cudaGetErrorName(e) + ": " + cudaGetErrorString(e));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  constexpr size_t kUsual = 48 * 1024;  // beyond it, a kernel has to be told first
  if (smem > kUsual)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem)),
          "shared memory for a kernel");
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), "kernel launch");
}

// Makes `device` current for a scope.
struct DeviceGuard {
  int old = 0, now;
  explicit DeviceGuard(int device) : now(device) {
    check(cudaGetDevice(&old), "cudaGetDevice");
    if (old != device) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (old != now) cudaSetDevice(old);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

struct DeviceTraits {
  int capability, multiprocessors, shared;  // capability: 90 for 9.0; shared: bytes that a block may ask for
  explicit DeviceTraits(int device) {
    int major, minor;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory of a block");
    capability = 10 * major + minor;
  }
};

// A kernel that was compiled while the program runs: `symbol` of a cubin. Stays loaded for good: it may be running, or
// be part of a graph. The constructor makes the current device take it, so that a cubin for another GPU is found out
// there.
class LoadedKernel {
 public:
  LoadedKernel(const void* cubin, const char* symbol) {
#if CUDART_VERSION >= 12080
    cudaLibrary_t library;
    check(cudaLibraryLoadData(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0), "loading a kernel");
    cudaKernel_t kernel;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaLibraryGetKernel(&kernel, library, symbol);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) cudaLibraryUnload(library);
    check(error, "loading a kernel");
    kernel_ = kernel;
#else
    (void)cubin, (void)symbol;
    throw std::runtime_error("tsrfast: loading a kernel: built with a CUDA toolkit older than 12.8, which cannot");
#endif
  }
  template <class... A>  // exactly the kernel's parameters
  void operator()(dim3 grid, dim3 block, size_t smem, void* stream, const A&... args) const {
    check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem)),
          "shared memory for a kernel");
    void* addresses[] = {const_cast<A*>(&args)...};
    check(cudaLaunchKernel(kernel_, grid, block, addresses, smem, static_cast<cudaStream_t>(stream)), "kernel launch");
  }

 private:
  const void* kernel_ = nullptr;
};

// Launches that are repeated with the same arguments: captured once as a graph, on a stream of its own. Where the
// caller's stream is being captured itself, they become part of that graph instead, one by one.
class Replay {
 public:
  Replay(std::function<void(void*)> launches, void* stream) : launches_(std::move(launches)) {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
    if (status == cudaStreamCaptureStatusNone) capture();
  }
  ~Replay() {
    if (graph_) cudaGraphExecDestroy(graph_);  // one that still runs is freed when it has ended
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  void operator()(void* stream) const {
    if (graph_)
      check(cudaGraphLaunch(graph_, static_cast<cudaStream_t>(stream)), "cudaGraphLaunch");
    else
      launches_(stream);
  }

 private:
  struct Stream {
    cudaStream_t own;
    Stream() { check(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
    ~Stream() { cudaStreamDestroy(own); }
  };
  void capture() {
    const Stream stream;
    check(cudaStreamBeginCapture(stream.own, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      launches_(stream.own);
    } catch (...) {
      cudaStreamEndCapture(stream.own, &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaGetLastError();  // of the capture that was given up
      throw;
    }
    check(cudaStreamEndCapture(stream.own, &graph), "cudaStreamEndCapture");
    const cudaError_t made = cudaGraphInstantiateWithFlags(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    check(made, "cudaGraphInstantiate");
  }

  std::function<void(void*)> launches_;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace tsr
#endif

namespace tsr {

// Grids are capped where a kernel strides: enough blocks to fill any GPU, within the limit of grid dimensions y and z.
inline unsigned grid_limit(int64_t blocks) { return unsigned(blocks < 65535 ? blocks : 65535); }

}  // namespace tsr
