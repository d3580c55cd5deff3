// Instances of the fused attack: the networks of chain_fused_4.cu with one more layer before the last.
//
// What does not fit into 227 KB: unpruned networks (64-64-64-64: 286 KB), 64 channels in front of the teacher's (259
// KB), and, by 1 KB, a pair with 64 and 70 channels appended.
#include "cuda/chain_fused_entry.cuh"

namespace tsr {
namespace fused {

Entries entries_of_5_layers() {
  using Teacher = Net<32, 10, 45, 32, 32, 32, 20>;
  using Student = Net<32, 10, 50, 35, 35, 35, 22>;
  static const Entry all[] = {entry<Teacher, Student>(), entry<NoNet, Teacher>(), entry<NoNet, Student>()};
  return {all, 3};
}

}  // namespace fused
}  // namespace tsr
