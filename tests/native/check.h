// What the sanitized checks of chains share: what was found, random numbers, memory of exactly the size that is needed.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "core/philox_uniform.h"

namespace check {

inline int failures = 0;
inline std::string where;  // names the case that runs, for messages

struct Random {
  uint64_t seed, drawn = 0;
  float uniform() { return float(double(tsr::philox(seed, 0, 0, uint32_t(drawn++)).v[0]) * 0x1p-32); }
};

// A heap block of exactly that size, every byte 0xFF: NaN as float, -1 as integer; bool false.
template <class T>
std::unique_ptr<T[]> unwritten(int64_t size) {
  std::unique_ptr<T[]> v(new T[size_t(size)]);
  if (size) std::memset(static_cast<void*>(v.get()), sizeof(T) == 1 ? 0 : 0xFF, size_t(size) * sizeof(T));
  return v;
}

// Likewise for workspaces, which begin where kernels want them to.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;
template <int64_t kAlign>
Memory memory(int64_t bytes) {
  const size_t size = size_t((bytes + kAlign - 1) / kAlign * kAlign);
  void* const p = std::aligned_alloc(size_t(kAlign), size);
  std::memset(p, 0xFF, size);
  return Memory(p);
}

}  // namespace check
