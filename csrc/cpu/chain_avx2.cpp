#include "cpu/chain_moments.h"

namespace tsr {

void chain_forward_avx2(const ChainForward& a, int threads) { forward(a, threads); }
void chain_gradient_avx2(const ChainGradient& a, int threads) { gradient(a, threads); }
void chain_pgd_avx2(const ChainPgd& a, int threads) { pgd(a, threads); }
int64_t chain_workspace_avx2(const ChainPlan& student, const ChainPlan& teacher) { return workspace(student, teacher); }

void channel_correlation_chunk_avx2(const ChannelCorrelation&, int64_t, int64_t, double*, void*);
int64_t channel_correlation_scratch_avx2(const ChannelCorrelation&);
constexpr MomentsOf kMoments{channel_correlation_chunk_avx2, channel_correlation_scratch_avx2};
int64_t chain_correlation_lanes_avx2() { return kMostLanes; }
int64_t chain_correlation_scratch_avx2(const ChainCorrelation& a) { return group_scratch(a, kMoments); }
void chain_correlation_group_avx2(const ChainCorrelation& a, int64_t first, int64_t count, double* moments,
                                  void* memory) {
  group_moments(a, first, count, kMoments, moments, memory);
}

}  // namespace tsr
