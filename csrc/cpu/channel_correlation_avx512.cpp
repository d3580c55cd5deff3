#include "cpu/channel_correlation_body.h"

namespace tsr {

void channel_correlation_chunk_avx512(const ChannelCorrelation& a, int64_t first, int64_t last, double* moments,
                                      void* memory){
    TSR_WITH_DTYPE(a.dtype, T, chunk<T>(a, first, last, moments, memory))} int64_t
    channel_correlation_scratch_avx512(const ChannelCorrelation& a) {
  TSR_WITH_DTYPE(a.dtype, T, return scratch_bytes<T>(a))
  return 0;
}

}  // namespace tsr
