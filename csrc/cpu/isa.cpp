#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace tsr {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

Isa best() {
#ifdef TSR_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa>& level() {
  static std::atomic<Isa> current{best()};
  return current;
}

}  // namespace

Isa isa() { return level().load(std::memory_order_relaxed); }

std::string isa_name() { return kNames[int(isa())]; }

std::vector<std::string> isa_levels() { return {kNames, kNames + int(best()) + 1}; }

void set_isa(const std::string& name) {
  std::string allowed;
  for (int i = 0; i <= int(best()); ++i) {
    if (name == kNames[i]) {
      level() = Isa(i);
      return;
    }
    allowed += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::invalid_argument("TSRFAST_ISA must be one of what this build and CPU can run (" + allowed + "), got '" +
                              name + "'");
}

}  // namespace tsr
