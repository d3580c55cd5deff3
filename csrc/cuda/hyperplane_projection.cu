// The smallest change onto a hyperplane inside the box.   Formula and shapes: core/hyperplane_projection.h
//
// A block an image, threads stride over its values. Passes: one for <w, t>, one for sums over all, then linf and l2
// about 3 to 8 for lambda, l1 about 12 to 25 for mu (bisection ends when one coordinate is left), and one that writes;
// all but the first from L1/L2 (CIFAR: 24 KB an image): bound by L2 and by two block sums a pass, not by memory (12
// bytes a float32 value).
#include "core/hyperplane_projection.h"
#include "cuda/reduce.cuh"

namespace tsr {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Image {
  const T *t, *w;
  T* out;
  int64_t d;
  double side, lo, hi, c;
  double* part;  // shared, for sums

  __device__ Coordinate at(int64_t j) const { return coordinate(double(load(t[j])), double(load(w[j])), side, lo, hi); }
  __device__ auto key(int64_t j) const { return weight_key(load(w[j])); }

  // f(j, first, second) adds to two running sums; all threads get both.
  template <class F>
  __device__ void sums(double& first, double& second, F f) const {
    double a = 0, b = 0;
    for (int64_t j = threadIdx.x; j < d; j += kThreads) f(j, a, b);
    first = block_sum(a, part);
    second = block_sum(b, part);
  }
  // d_j = -s_j v(j)
  template <class F>
  __device__ void write(F v) const {
    for (int64_t j = threadIdx.x; j < d; j += kThreads) {
      const Coordinate x = at(j);
      store(out[j], compute_t<T>(x.sign != 0 ? -x.sign * v(j, x) : 0.0));
    }
  }
};

template <Norm norm, class T>
__device__ void slide(const Image<T>& m, double all_slope) {
  Rise r{m.c / all_slope, all_slope};
  for (bool on = true; on;) {  // the same in every thread
    double sum, slope_there;
    m.sums(sum, slope_there, [&](int64_t j, double& a, double& b) {
      const Coordinate x = m.at(j);
      a += x.weight * moved<norm>(x, r.lambda);
      b += slope<norm>(x, r.lambda);
    });
    on = rise(r, sum, slope_there, m.c);
  }
  m.write([&](int64_t, const Coordinate& x) { return moved<norm>(x, r.lambda); });
}

template <class T>
__device__ void fill(const Image<T>& m, double all) {
  using Key = decltype(magnitude_key(compute_t<T>(0)));
  Split<Key> s = split_start<Key>(all, double(m.d));
  while (split_next(s)) {
    const Key least = s.mu | s.bit;
    double sum, count;
    m.sums(sum, count, [&](int64_t j, double& a, double& b) {
      const Coordinate x = m.at(j);
      const bool takes = m.key(j) >= least;
      a += takes ? x.weight * x.room : 0.0;
      b += takes ? 1.0 : 0.0;
    });
    split_refine(s, sum, count, m.c);
  }
  const double share = (m.c - s.full) / (s.covered - s.full);
  m.write([&](int64_t j, const Coordinate& x) {
    const Key key = m.key(j);
    return key >= s.above ? x.room : key >= s.mu ? x.room * share : 0.0;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) hyperplane_projection_kernel(HyperplaneProjection a) {
  TSR_DYNAMIC_SHARED(double, part);
  const int64_t i = blockIdx.x;
  Image<T> m{static_cast<const T*>(a.t) + i * a.d,
             static_cast<const T*>(a.w) + i * a.d,
             static_cast<T*>(a.out) + i * a.d,
             a.d,
             1.0,
             a.lo,
             a.hi,
             0.0,
             part};
  double value = 0;
  for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {
    const double w = double(load(m.w[j]));
    value += is_finite(w) ? w * double(load(m.t[j])) : 0.0;
  }
  value = block_sum(value, part);
  m.side = value >= a.b[i] ? 1.0 : -1.0;
  m.c = m.side * (value - a.b[i]);
  if (!(m.c > 0)) return m.write([](int64_t, const Coordinate&) { return 0.0; });
  double all, all_slope;
  m.sums(all, all_slope, [&](int64_t j, double& p, double& q) {
    const Coordinate x = m.at(j);
    p += x.weight * x.room;
    q += a.norm == Norm::linf ? slope<Norm::linf>(x, 0.0) : slope<Norm::l2>(x, 0.0);
  });
  if (all <= m.c) return m.write([](int64_t, const Coordinate& x) { return x.room; });
  if (a.norm == Norm::linf) return slide<Norm::linf>(m, all_slope);
  if (a.norm == Norm::l2) return slide<Norm::l2>(m, all_slope);
  fill(m, all);
}

}  // namespace

void hyperplane_projection_cuda(const HyperplaneProjection& a, int device, void* stream) {
  if (a.n == 0 || a.d == 0) return;
  DeviceGuard guard(device);
  TSR_WITH_DTYPE(
      a.dtype, T,
      launch(hyperplane_projection_kernel<T>, dim3(unsigned(a.n)), dim3(kThreads), 32 * sizeof(double), stream, a))
}

}  // namespace tsr
