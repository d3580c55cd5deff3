// Compiled instances of the fused attack. They are spread over files of their own, since each takes long to compile.
#pragma once
#include "cuda/chain_fused.cuh"

namespace tsr {
namespace fused {

constexpr int kLeastCapability = 90;  // mbarriers and bulk copies

// Depth 0 for a network that no kernel can take.
Shape shape_of(const ChainPlan& plan);

struct Entry {
  Shape teacher, student;  // teacher.depth 0: none
  void (*run)(const Args&, unsigned blocks, void* stream);
};
struct Entries {
  const Entry* first;
  int count;
  const Entry* begin() const { return first; }
  const Entry* end() const { return first + count; }
};
Entries entries_of_4_layers();
Entries entries_of_5_layers();
#ifdef TSR_EMU
Entries entries_for_tests();
#endif

// Kernels compiled at run time, each for one compute capability: chain_fused_loaded.cu. Any thread may call these.
constexpr int kAnyCapability = 0;
bool is_loaded(const Shape& teacher, const Shape& student, int capability);
void load(const Shape& teacher, const Shape& student, int capability, const void* cubin, const char* symbol);
void run_loaded(const Args& args, const Shape& teacher, const Shape& student, int capability, unsigned blocks,
                void* stream);

template <class I>
void run(const Args& args, unsigned blocks, void* stream) {
  launch(chain_fused_kernel<I>, dim3(blocks), dim3(kThreads), size_t(I::kBytes), stream, args);
}
template <class Teacher, class Student>
Entry entry() {
  return {Teacher::kShape, Student::kShape, run<Instance<Teacher, Student>>};
}

}  // namespace fused
}  // namespace tsr
