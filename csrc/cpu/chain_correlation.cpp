// CPU twin of cuda/chain_correlation.cu: groups of images, threads, and joining. The work on a group is
// chain_moments.h.
//
// A group has as many images as the widest vectors have lanes; consecutive groups are a chunk, worked on by one thread
// in order; chunks are joined in order. All of that follows from the number of images and the instruction set: any
// thread count, same bits.
#include <omp.h>

#include "core/chain_correlation.h"
#include "cpu/channel_correlation.h"
#include "cpu/isa.h"

namespace tsr {

int64_t chain_correlation_lanes_portable();
int64_t chain_correlation_scratch_portable(const ChainCorrelation&);
void chain_correlation_group_portable(const ChainCorrelation&, int64_t first, int64_t count, double*, void* memory);
int64_t chain_correlation_lanes_avx2();
int64_t chain_correlation_scratch_avx2(const ChainCorrelation&);
void chain_correlation_group_avx2(const ChainCorrelation&, int64_t first, int64_t count, double*, void* memory);
int64_t chain_correlation_lanes_avx512();
int64_t chain_correlation_scratch_avx512(const ChainCorrelation&);
void chain_correlation_group_avx512(const ChainCorrelation&, int64_t first, int64_t count, double*, void* memory);

namespace {

// f(offset of the pair's moments among those of all pairs, its channels)
template <class F>
int64_t each_pair(const ChainCorrelation& a, F f) {
  int64_t at = 0;
  for (int64_t p = 0; p < a.pairs; ++p) {
    const int64_t cs = a.student.plan.record[a.at_student[p]].oc, ct = a.teacher.plan.record[a.at_teacher[p]].oc;
    f(p, at, cs, ct);
    at += moments_size(cs, ct);
  }
  return at;
}
void join_all(const ChainCorrelation& a, double* moments, const double* more) {
  each_pair(a, [&](int64_t, int64_t at, int64_t cs, int64_t ct) { join_moments(moments + at, more + at, cs, ct); });
}

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// How the work is cut, and the workspace: [chunks] moments, then for each thread a group's moments and its scratch.
struct Plan {
  int64_t lanes, size, scratch;  // size: of all pairs' moments
  Chunks chunks;                 // of groups
  explicit Plan(const ChainCorrelation& a)
      : lanes(TSR_PICK_ISA(chain_correlation_lanes)()),
        size(each_pair(a, [](int64_t, int64_t, int64_t, int64_t) {})),
        scratch(TSR_PICK_ISA(chain_correlation_scratch)(a)) {
    // 64 chunks feed the largest machines; fewer where their moments would take more than 128 MiB.
    const int64_t room = (int64_t(1) << 24) / size;
    chunks = cut((a.n + lanes - 1) / lanes, 1, room < 1 ? 1 : room < 64 ? room : 64);
  }
  int64_t moments_bytes() const { return whole_lines(size * int64_t(sizeof(double))); }
  int64_t partial_bytes() const { return whole_lines(chunks.count * size * int64_t(sizeof(double))); }
  int64_t thread_bytes() const { return moments_bytes() + scratch; }
};

// Moments of the images [first, end), group by group.
void chunk(const ChainCorrelation& a, const Plan& plan, int64_t first, int64_t end, double* moments, char* memory) {
  const auto group = TSR_PICK_ISA(chain_correlation_group);
  double* const more = reinterpret_cast<double*>(memory);
  for (int64_t at = first; at < end; at += plan.lanes) {
    const int64_t count = end - at < plan.lanes ? end - at : plan.lanes;
    group(a, at, count, at == first ? moments : more, memory + plan.moments_bytes());
    if (at != first) join_all(a, moments, more);
  }
}

}  // namespace

int64_t chain_correlation_workspace_cpu(const ChainCorrelation& a, int threads) {
  const Plan plan(a);
  return plan.partial_bytes() + threads * plan.thread_bytes();
}

void chain_correlation_cpu(const ChainCorrelation& a, int threads) {
  const Plan plan(a);
  double* const partial = static_cast<double*>(a.workspace);
  char* const memory = static_cast<char*>(a.workspace) + plan.partial_bytes();
  const int64_t images = plan.chunks.length * plan.lanes;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && plan.chunks.count > 1)
  for (int64_t i = 0; i < plan.chunks.count; ++i) {
    const int64_t first = i * images, end = first + images < a.n ? first + images : a.n;
    chunk(a, plan, first, end, partial + i * plan.size, memory + omp_get_thread_num() * plan.thread_bytes());
  }
  for (int64_t i = 1; i < plan.chunks.count; ++i) join_all(a, partial, partial + i * plan.size);
  each_pair(a, [&](int64_t p, int64_t at, int64_t cs, int64_t ct) {
    for (int64_t k = 0; k < moments_size(cs, ct); ++k) a.moments[p][k] = plan.chunks.count ? partial[at + k] : 0;
  });
}

}  // namespace tsr
