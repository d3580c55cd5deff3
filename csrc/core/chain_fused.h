// The whole attack on one or two small networks in one kernel: what cuda/chain_fused.cu offers to cuda/chain.cu.
//
// Networks: layers of 3x3 convolutions with ReLU (stride 1, no padding), then one linear layer on all units. Channel
// counts and image size are constants of a kernel: some are in the build (chain_fused.cu), for others that fit into
// shared memory one is compiled at run time (tsrfast/chain/fusing.py).
#pragma once
#include "core/chain.h"

namespace tsr {

// The network's share of the packed parameters (ChainPackedCuda): values in the sections `floats` and `hi`; 0 and 0 for
// a network that no fused kernel can take, in the build or not: parameters packed before a kernel is compiled serve it
// too. The maps are filled as chain_map_cuda says.
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
// The same of a network whose parameters are packed as chain_packed_cuda says (cuda/chain.cu, which lays them out).
ChainFusedNet chain_fused_net(const ChainNet& net);
// Is there a kernel for this attack on that device? Never depends on the number of images.
bool chain_fused_covers(const ChainPlan& student, const ChainPlan& teacher, ChainLoss criterion, Norm norm, int device);
int64_t chain_fused_workspace(const ChainPlan& student, const ChainPlan& teacher, int64_t n);
// args.student.packed and args.teacher.packed are not looked at.
void chain_fused_pgd(const ChainPgd& args, const ChainFusedNet& student, const ChainFusedNet& teacher, int device,
                     void* stream);

// The kernel for attacks on these networks (no teacher: a plan without records), whether there is one already or not.
// Throws std::invalid_argument, with the reason, where there can be none.
struct ChainFusedKernel {
  int64_t bytes;   // of a block's shared memory
  char name[512];  // in C++, declared in cuda/chain_fused.cuh
};
ChainFusedKernel chain_fused_kernel_of(const ChainPlan& student, const ChainPlan& teacher);
// Is it at hand for GPUs of that compute capability (90 for 9.0)?
bool chain_fused_ready(const ChainPlan& student, const ChainPlan& teacher, int capability);
// Takes it from a cubin, compiled from chain_fused_headers for that device.
void chain_fused_load(const ChainPlan& student, const ChainPlan& teacher, const void* cubin, const char* symbol,
                      int device);

// cuda/chain_fused.cuh and all that it includes, as they were when this module was built; ends with a null name.
struct ChainFusedHeader {
  const char *name, *text;
};
extern const ChainFusedHeader chain_fused_headers[];

}  // namespace tsr
