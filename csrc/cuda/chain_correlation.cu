// Moments of two chains' channels: which networks have a kernel, its start, and from sums to moments.
//
// Mapping, passes and bound: chain_correlation.cuh. The blocks' sums are then added in order by a thread for each
// moment, which reads up to seven of them in each block, in L2.
#include "cuda/chain_correlation.cuh"

#include "core/chain_correlation.h"
#include "core/chain_fused.h"
#include "cuda/chain_fused_entry.cuh"

namespace tsr {
namespace {

using namespace fused;

struct CorrelationEntry {
  Shape teacher, student;
  int bytes;  // of a block's shared memory
  void (*run)(const CorrelationArgs&, unsigned blocks, void* stream);
};

template <class I>
void run_correlation(const CorrelationArgs& args, unsigned blocks, void* stream) {
  launch(chain_correlation_kernel<I>, dim3(blocks), dim3(kThreads), size_t(I::kBytes), stream, args);
}
template <class Teacher, class Student>
CorrelationEntry correlation() {
  using I = Correlation<Teacher, Student>;
  return {Teacher::kShape, Student::kShape, I::kBytes, run_correlation<I>};
}

// The paper's pruned teachers of 4 and 5 layers, each with the student that is a tenth wider. For tests, with odd and
// even numbers of tiles, and more blocks of channels than warps: small ones of 2 to 4 layers.
const CorrelationEntry kEntries[] = {
    correlation<Net<32, 10, 45, 32, 32, 20>, Net<32, 10, 50, 35, 35, 22>>(),
    correlation<Net<32, 10, 45, 32, 32, 32, 20>, Net<32, 10, 50, 35, 35, 35, 22>>(),
#ifdef TSR_EMU
    correlation<Net<12, 10, 9, 8, 5>, Net<12, 10, 17, 8, 24>>(),
    correlation<Net<14, 3, 20, 8>, Net<14, 3, 7, 33>>(),
    correlation<Net<12, 4, 8, 16, 5, 24>, Net<12, 4, 5, 8, 9, 7>>(),
    correlation<Net<10, 2, 45, 9>, Net<10, 2, 50, 16>>(),
#endif
};

// In the build, or null. The linear layers are not read.
const CorrelationEntry* find_correlation(const ChainPlan& student, const ChainPlan& teacher) {
  Shape s = shape_of(student), t = shape_of(teacher);
  for (const CorrelationEntry& e : kEntries) {
    s.classes = t.classes = e.student.classes;
    if (s == e.student && t == e.teacher) return &e;
  }
  return nullptr;
}
const CorrelationEntry& entry_of(const ChainCorrelation& a) {
  const CorrelationEntry* const e = find_correlation(a.student.plan, a.teacher.plan);
  if (!e) throw std::runtime_error("tsrfast: chain_correlation: there is no kernel for these networks");
  return *e;
}
unsigned blocks_of(const ChainCorrelation& a, const DeviceTraits& traits) {
  return unsigned(a.n < traits.multiprocessors ? a.n : traits.multiprocessors);
}

Pointers pointers(const ChainNet& net) {
  const ChainFusedNet fused = chain_fused_net(net);
  return {fused.floats, static_cast<const unsigned char*>(fused.hi)};
}

struct BlockSums {
  const double* of_layer;  // in the first block
  int64_t next, blocks;    // from block to block
  int64_t samples, cs, ct;
};

__global__ void __launch_bounds__(kThreads) chain_correlation_join_kernel(BlockSums b, double* moments) {
  // What the sums cannot tell from a channel that never changes, counts as one: sum x^2 is off by up to 4e-7.
  constexpr double kNothing = 1e-6;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, first_m2 = m2_at(0, b.cs, b.ct);
  if (i >= moments_size(b.cs, b.ct)) return;
  const auto sum = [&](int64_t at) {
    double v = 0;
    for (int64_t block = 0; block < b.blocks; ++block) v += b.of_layer[block * b.next + at];
    return v;
  };
  const double n = double(b.samples);
  const auto m2 = [&](int64_t channel) {
    const double all = sum(mean_at(channel)), square = sum(first_m2 + channel), v = square - all * all / n;
    return v < kNothing * square ? 0 : v;  // NaN stays
  };
  if (i == 0 || b.samples == 0) {
    moments[i] = i == 0 ? n : 0;
  } else if (i < first_m2) {
    moments[i] = sum(i) / n;
  } else if (i < cross_at(0, 0, b.cs, b.ct)) {
    moments[i] = m2(i - first_m2);
  } else {
    const int64_t at = i - cross_at(0, 0, b.cs, b.ct), k = at / b.ct, j = at - k * b.ct;
    const bool still = m2(k) == 0 || m2(b.cs + j) == 0;
    moments[i] = still ? 0 : sum(i) - sum(mean_at(k)) * sum(mean_at(b.cs + j)) / n;
  }
}

}  // namespace

bool chain_correlation_covers(const ChainPlan& student, const ChainPlan& teacher, int device) {
  const CorrelationEntry* const e = find_correlation(student, teacher);
  if (!e) return false;
  const DeviceTraits traits(device);
  return traits.capability >= kLeastCapability && traits.shared >= e->bytes;
}

int64_t chain_correlation_workspace_cuda(const ChainCorrelation& a, int device) {
  const CorrelationEntry& e = entry_of(a);
  return blocks_of(a, DeviceTraits(device)) * sums_before(e.teacher, e.student, e.student.depth) *
         int64_t(sizeof(double));
}

void chain_correlation_cuda(const ChainCorrelation& a, int device, void* stream) {
  const CorrelationEntry& e = entry_of(a);
  const Shape &t = e.teacher, &s = e.student;
  bool all = a.pairs == s.depth;
  for (int64_t p = 0; all && p < a.pairs; ++p) all = a.at_student[p] == p && a.at_teacher[p] == p;
  if (!all)
    throw std::invalid_argument("tsrfast: chain_correlation: the kernel wants all pairs of convolutions, in order");
  const DeviceGuard guard(device);
  const DeviceTraits traits(device);
  if (traits.capability < kLeastCapability)
    throw std::runtime_error(
        "tsrfast: chain_correlation needs a GPU of compute capability 9.0 or later, this one has " +
        std::to_string(traits.capability / 10) + "." + std::to_string(traits.capability % 10));
  const unsigned blocks = blocks_of(a, traits);
  double* const sums = static_cast<double*>(a.workspace);
  const int64_t each = sums_before(t, s, s.depth);
  if (blocks) e.run({a.x, pointers(a.student), pointers(a.teacher), sums, each, a.n}, blocks, stream);
  for (int l = 0; l < s.depth; ++l) {
    const BlockSums b{sums + sums_before(t, s, l), each, int64_t(blocks), a.n * s.area_of(l), s.c[l], t.c[l]};
    const auto grid = unsigned((moments_size(b.cs, b.ct) + kThreads - 1) / kThreads);
    launch(chain_correlation_join_kernel, dim3(grid), dim3(kThreads), 0, stream, b, a.moments[l]);
  }
}

}  // namespace tsr
