// One step of projected gradient ascent.   Formula and shapes: core/pgd_step.h
//
// linf: elementwise; grid x = pieces of an image, y = images; one pass, 4 values in and out: bound by 16 bytes a
// float32 value. l2:   a block an image; 3 passes (|g|, |d|, write), the last two from L1/L2: 16 bytes a value of
// memory traffic. l1:   a block an image; 31 passes for the k-th largest |g| (63 in float64) and about 5 to 10 for
// lambda, all but the first
//       from L1/L2 (CIFAR: 36 KB an image): bound by L2, not by memory.
#include "core/pgd_step.h"
#include "cuda/reduce.cuh"

namespace tsr {
namespace {

constexpr int kThreads = 256, kPerThread = 4;

template <class T>
struct Image {
  using C = compute_t<T>;
  const T *x, *x0, *g;
  T* out;
  C direction, lo, hi;
  double step, eps;

  __device__ Image(const PgdStep& a, int64_t i)
      : x(static_cast<const T*>(a.x) + i * a.d),
        x0(static_cast<const T*>(a.x0) + i * a.d),
        g(static_cast<const T*>(a.g) + i * a.d),
        out(static_cast<T*>(a.out) + i * a.d),
        direction(C(a.targeted ? -1 : 1)),
        lo(C(a.lo)),
        hi(C(a.hi)),
        step(step_of(a, i)),
        eps(eps_of(a, i)) {}
  __device__ C gradient(int64_t j) const { return direction * load(g[j]); }
};

template <class T>
__global__ void __launch_bounds__(kThreads) pgd_step_linf_kernel(PgdStep a) {
  using C = compute_t<T>;
  for (int64_t i = blockIdx.y; i < a.n; i += gridDim.y) {
    const Image<T> m(a, i);
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t j = (int64_t(blockIdx.x) * kPerThread + k) * kThreads + threadIdx.x;
      const C g = j < a.d ? m.gradient(j) : C(0);
      if (j < a.d) store(m.out[j], linf_step(load(m.x[j]), load(m.x0[j]), g, C(m.step), C(m.eps), m.lo, m.hi));
      const uint32_t nan = __ballot_sync(0xffffffffu, int(g != g));
      if (nan && threadIdx.x % 32 == 0)  // counts are integers: their order does not matter
        atomicAdd(reinterpret_cast<unsigned long long*>(a.bad + i), static_cast<unsigned long long>(__popc(nan)));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) pgd_step_l2_kernel(PgdStep a) {
  using C = compute_t<T>;
  TSR_DYNAMIC_SHARED(double, part);
  const int64_t i = blockIdx.x;
  const Image<T> m(a, i);
  double gg = 0, bad = 0;
  for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {
    const double g = double(m.gradient(j));
    gg += is_finite(g) ? g * g : 0.0;
    bad += is_finite(g) ? 0.0 : 1.0;
  }
  gg = block_sum(gg, part);
  bad = block_sum(bad, part);
  const double scale = gg > 0 ? m.step / sqrt(gg) : 0.0;
  double dd = 0;
  for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {
    const double v = double(l2_offset(load(m.x[j]), load(m.x0[j]), m.gradient(j), scale));
    dd += v * v;
  }
  const double length = sqrt(block_sum(dd, part));
  const C shrink = length > m.eps ? C(m.eps / length) : C(1);
  for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {  // a value is read and written by one thread: out may be x
    const C x0 = load(m.x0[j]);
    store(m.out[j], clamp(x0 + l2_offset(load(m.x[j]), x0, m.gradient(j), scale) * shrink, m.lo, m.hi));
  }
  if (threadIdx.x == 0) a.bad[i] = int64_t(bad);
}

template <class T>
__global__ void __launch_bounds__(kThreads) pgd_step_l1_kernel(PgdStep a) {
  using C = compute_t<T>;
  using Key = decltype(magnitude_key(C(0)));
  TSR_DYNAMIC_SHARED(double, part);
  const int64_t i = blockIdx.x;
  const Image<T> m(a, i);

  auto at_least = [&](Key key) {  // counts below 2^53 are exact in double
    double n = 0;
    for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {
      const C g = m.gradient(j);
      n += l1_candidate(load(m.x[j]), g, m.lo, m.hi) && magnitude_key(g) >= key ? 1.0 : 0.0;
    }
    return block_sum(n, part);
  };
  const double wanted = double(l1_moved(a.sparsity, a.d));
  Key threshold = 0;
  for (Key bit = Key(1) << (8 * sizeof(Key) - 2); bit; bit >>= 1)
    if (at_least(threshold | bit) >= wanted) threshold |= bit;
  const double moved = at_least(threshold);
  const C each = moved > 0 ? C(m.step / moved) : C(0);

  auto offset = [&](int64_t j) {
    return l1_offset(load(m.x[j]), load(m.x0[j]), m.gradient(j), each, threshold, m.lo, m.hi);
  };
  double on_slope = 0;
  auto kept = [&](double lambda) {
    double total = 0, slope = 0;
    for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {
      const auto o = offset(j);
      total += l1_keep(o.size, o.room, lambda);
      slope += o.size > lambda && o.size - lambda < o.room ? 1.0 : 0.0;
    }
    on_slope = block_sum(slope, part);
    return block_sum(total, part);
  };
  double lambda = 0;
  double all = kept(0);
  if (all > m.eps) {  // the same in every thread, as all that follows
    double largest = 0;
    for (int64_t j = threadIdx.x; j < a.d; j += kThreads) largest = Max{}(largest, offset(j).size);
    L1Search s = l1_search(block_reduce(largest, 0.0, Max{}, part));
    while (l1_refine(s, all, int64_t(on_slope), m.eps)) all = kept(s.lambda);
    lambda = s.lambda;
  }
  double bad = 0;
  for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {
    bad += is_finite(m.gradient(j)) ? 0.0 : 1.0;
    const auto o = offset(j);
    store(m.out[j], clamp(C(double(load(m.x0[j])) + o.sign * l1_keep(o.size, o.room, lambda)), m.lo, m.hi));
  }
  bad = block_sum(bad, part);
  if (threadIdx.x == 0) a.bad[i] = int64_t(bad);
}

template <class T>
void run(const PgdStep& a, void* stream) {
  if (a.norm == Norm::linf) {
    const int64_t pieces = (a.d + kThreads * kPerThread - 1) / (kThreads * kPerThread);
    launch(pgd_step_linf_kernel<T>, dim3(unsigned(pieces), grid_limit(a.n)), dim3(kThreads), 0, stream, a);
  } else {
    launch(a.norm == Norm::l2 ? pgd_step_l2_kernel<T> : pgd_step_l1_kernel<T>, dim3(unsigned(a.n)), dim3(kThreads),
           32 * sizeof(double), stream, a);
  }
}

}  // namespace

void pgd_step_cuda(const PgdStep& a, int device, void* stream) {
  if (a.n == 0 || a.d == 0) return;
  DeviceGuard guard(device);
  TSR_WITH_DTYPE(a.dtype, T, run<T>(a, stream))
}

}  // namespace tsr
