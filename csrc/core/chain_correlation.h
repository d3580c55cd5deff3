// Moments of two chains' channels, layer by layer, while the images pass through both.   Twins:
// cpu/chain_correlation.cpp, cuda/chain_correlation.cu
//
// For pair p of records (at_student[p], at_teacher[p]), whose results have the same height and width, the numbers of
// channel_correlation.h over all n images: what channel_correlation says of the two chains' activations, but these stay
// in a thread's scratch memory (CPU) or in a block's shared memory (CUDA) and are never written out.
#pragma once
#include "core/chain.h"
#include "core/channel_correlation.h"

namespace tsr {

struct ChainCorrelation {
  ChainNet student, teacher;
  const float* x;             // [N, inputs]
  const int64_t* at_student;  // [pairs] records, in any order
  const int64_t* at_teacher;
  double* const* moments;  // [pairs] of moments_size(student's channels, teacher's channels)
  int64_t n, pairs;        // at least one pair
  void* workspace;         // chain_correlation_workspace_*, 64-byte aligned
};

int64_t chain_correlation_workspace_cpu(const ChainCorrelation& args, int threads);
void chain_correlation_cpu(const ChainCorrelation& args, int threads);

// float16 only (chain.h: Precision), and only for networks that have a kernel: 3x3 convolutions with ReLU as in
// chain_fused.h, all of their layers asked for, in order. Moments are NaN where a float16 value is not finite. Sums
// without a shift: a correlation is off by about 4e-6 (1 + (mean / std)^2), and a channel whose std is below 1e-3 of
// its root mean square counts as one that never changes: its m2 and cross are 0.
bool chain_correlation_covers(const ChainPlan& student, const ChainPlan& teacher, int device);
int64_t chain_correlation_workspace_cuda(const ChainCorrelation& args, int device);
void chain_correlation_cuda(const ChainCorrelation& args, int device, void* stream);

}  // namespace tsr
