// The whole attack on one or two small networks in one kernel: what cuda/chain_fused.cu offers to cuda/chain.cu.
//
// Networks: layers of 3x3 convolutions with ReLU (stride 1, no padding), then one linear layer on all units. Which of
// them have a kernel depends on channel counts and image size; see chain_fused.cu.
#pragma once
#include "core/chain.h"

namespace tsr {

// The network's share of the packed parameters (ChainPackedCuda): values in the sections `floats` and `hi`; 0 and 0 for
// a network that no fused kernel can take. The maps are filled as chain_map_cuda says.
struct ChainFusedSize {
  int64_t floats, hi;
};
ChainFusedSize chain_fused_size(const ChainPlan& plan);
void chain_fused_map(const ChainPlan& plan, int32_t* floats, int32_t* hi);

// A network as the fused kernel reads it; hi is 16-byte aligned.
struct ChainFusedNet {
  ChainPlan plan;
  const float* floats;
  const void* hi;
};
// Is there a kernel for this attack? Never depends on the number of images.
bool chain_fused_covers(const ChainPlan& student, const ChainPlan& teacher, ChainLoss criterion, Norm norm);
int64_t chain_fused_workspace(const ChainPlan& student, const ChainPlan& teacher, int64_t n);
// args.student.packed and args.teacher.packed are not looked at.
void chain_fused_pgd(const ChainPgd& args, const ChainFusedNet& student, const ChainFusedNet& teacher, int device,
                     void* stream);

}  // namespace tsr
