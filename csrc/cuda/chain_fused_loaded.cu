// Kernels of the fused attack that were compiled while the program runs (tsrfast/chain/fusing.py).
//
// Mapping, passes and bound: chain_fused.cuh.
#include <list>
#include <mutex>

#include "cuda/chain_fused_entry.cuh"

namespace tsr {
namespace fused {
namespace {

struct Loaded {
  Shape teacher, student;
  int capability;
  LoadedKernel kernel;
};
std::mutex loading;
std::list<Loaded> loaded;  // only grows: what was found stays where it is

const Loaded* find(const Shape& teacher, const Shape& student, int capability) {
  const std::lock_guard<std::mutex> lock(loading);
  for (const Loaded& k : loaded)
    if (k.teacher == teacher && k.student == student && (k.capability == capability || capability == kAnyCapability))
      return &k;
  return nullptr;
}

}  // namespace

bool is_loaded(const Shape& teacher, const Shape& student, int capability) {
  return find(teacher, student, capability) != nullptr;
}

void load(const Shape& teacher, const Shape& student, int capability, const void* cubin, const char* symbol) {
  const Loaded made{teacher, student, capability, LoadedKernel(cubin, symbol)};
  const std::lock_guard<std::mutex> lock(loading);
  loaded.push_front(made);
}

void run_loaded(const Args& args, const Shape& teacher, const Shape& student, int capability, unsigned blocks,
                void* stream) {
  const Loaded* const k = find(teacher, student, capability);
  if (!k)
    throw std::runtime_error(
        "tsrfast: the fused kernel for these networks was compiled for another GPU than this one, of " +
        std::string("compute capability ") + std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
        "; tsrfast.chain.fuse compiles it for this one");
  k->kernel(dim3(blocks), dim3(kThreads), size_t(map_of(teacher, student).bytes), stream, args);
}

}  // namespace fused
}  // namespace tsr
