// Instances of the fused attack: the paper's pruned teacher of 4 layers, and the student that is a tenth wider.
#include "cuda/chain_fused_entry.cuh"

namespace tsr {
namespace fused {

Entries entries_of_4_layers() {
  using Teacher = Net<32, 10, 45, 32, 32, 20>;
  using Student = Net<32, 10, 50, 35, 35, 22>;
  static const Entry all[] = {entry<Teacher, Student>(), entry<NoNet, Teacher>(), entry<NoNet, Student>()};
  return {all, 3};
}

#ifdef TSR_EMU
// Small; between them: 2 to 6 layers, odd and even numbers of tiles, several passes, warps without a tile.
Entries entries_for_tests() {
  static const Entry all[] = {entry<NoNet, Net<12, 10, 9, 8, 5>>(),
                              entry<NoNet, Net<12, 4, 8, 16>>(),
                              entry<NoNet, Net<32, 3, 24, 64, 8>>(),
                              entry<NoNet, Net<16, 5, 5, 16, 9, 8, 12, 7>>(),
                              entry<Net<12, 10, 9, 8, 5>, Net<12, 10, 17, 8, 24, 6>>(),
                              entry<Net<14, 3, 20, 8>, Net<14, 3, 7, 33, 8>>()};
  return {all, 6};
}
#endif

}  // namespace fused
}  // namespace tsr
