// Which instruction set the CPU twins use: the best the processor has, or a lower one that was asked for.
#pragma once
#include <string>
#include <vector>

namespace tsr {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

Isa isa();                              // the level in force
void set_isa(const std::string& name);  // throws std::invalid_argument for a name or level this CPU lacks
std::string isa_name();                 // of the level in force
std::vector<std::string> isa_levels();  // what this binary has and this CPU can run, lowest first

}  // namespace tsr

// The best of an operator's implementations that the level in force admits.
#ifdef TSR_X86
#define TSR_PICK_ISA(f) \
  (::tsr::isa() >= ::tsr::Isa::avx512 ? f##_avx512 : ::tsr::isa() >= ::tsr::Isa::avx2 ? f##_avx2 : f##_portable)
#else
#define TSR_PICK_ISA(f) (f##_portable)
#endif
