// CPU twin of cuda/channel_correlation.cu: the portable loops, the choice of instruction set, threads and joining.
#include <omp.h>

#include "cpu/channel_correlation.h"
#include "cpu/channel_correlation_body.h"
#include "cpu/isa.h"

namespace tsr {

void channel_correlation_chunk_portable(const ChannelCorrelation& a, int64_t first, int64_t last, double* moments,
                                        void* memory) {
  TSR_WITH_DTYPE(a.dtype, T, chunk<T>(a, first, last, moments, memory))
}
void channel_correlation_chunk_avx2(const ChannelCorrelation&, int64_t, int64_t, double*, void*);
void channel_correlation_chunk_avx512(const ChannelCorrelation&, int64_t, int64_t, double*, void*);
int64_t channel_correlation_scratch_portable(const ChannelCorrelation& a) {
  TSR_WITH_DTYPE(a.dtype, T, return scratch_bytes<T>(a))
  return 0;
}
int64_t channel_correlation_scratch_avx2(const ChannelCorrelation&);
int64_t channel_correlation_scratch_avx512(const ChannelCorrelation&);

namespace {

// Chunks of at least 2048 samples; 64 of them feed the largest machines. Fewer where their moments alone would take
// more than 32 MiB.
Chunks chunks_of(const ChannelCorrelation& a) {
  const int64_t room = (int64_t(1) << 22) / moments_size(a.student.channels, a.teacher.channels);
  return cut(samples(a), 2048, room < 1 ? 1 : room < 64 ? room : 64);
}

int64_t partial_bytes(const ChannelCorrelation& a) {
  return (chunks_of(a).count * moments_size(a.student.channels, a.teacher.channels) * int64_t(sizeof(double)) + 63) /
         64 * 64;
}

}  // namespace

void join_moments(double* a, const double* b, int64_t cs, int64_t ct) {
  const Join to = join(a[0], b[0]);
  for (int64_t k = 0; k < cs; ++k) {
    const double delta = (b[mean_at(k)] - a[mean_at(k)]) * to.weight;
    for (int64_t j = 0; j < ct; ++j) {
      const int64_t at = cross_at(k, j, cs, ct);
      a[at] += b[at] + delta * (b[mean_at(cs + j)] - a[mean_at(cs + j)]);
    }
  }
  for (int64_t c = 0; c < cs + ct; ++c) {
    const double delta = b[mean_at(c)] - a[mean_at(c)];
    a[mean_at(c)] += delta * to.part;
    a[m2_at(c, cs, ct)] += b[m2_at(c, cs, ct)] + delta * delta * to.weight;
  }
  a[0] += b[0];
}

int64_t channel_correlation_workspace_cpu(const ChannelCorrelation& a, int threads) {
  return partial_bytes(a) + threads * TSR_PICK_ISA(channel_correlation_scratch)(a);
}

void channel_correlation_cpu(const ChannelCorrelation& a, int threads) {
  const int64_t cs = a.student.channels, ct = a.teacher.channels, size = moments_size(cs, ct);
  const Chunks chunks = chunks_of(a);
  double* partial = static_cast<double*>(a.workspace);
  char* scratch = static_cast<char*>(a.workspace) + partial_bytes(a);
  const int64_t each = TSR_PICK_ISA(channel_correlation_scratch)(a);
  const auto chunk = TSR_PICK_ISA(channel_correlation_chunk);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks.count > 1)
  for (int64_t i = 0; i < chunks.count; ++i) {
    const int64_t first = i * chunks.length, end = first + chunks.length;
    chunk(a, first, end < samples(a) ? end : samples(a), partial + i * size, scratch + omp_get_thread_num() * each);
  }
  for (int64_t i = 0; i < size; ++i) a.moments[i] = chunks.count ? partial[i] : 0;
  for (int64_t i = 1; i < chunks.count; ++i) join_moments(a.moments, partial + i * size, cs, ct);
}

}  // namespace tsr
