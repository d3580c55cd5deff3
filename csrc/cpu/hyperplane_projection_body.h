// The loops of hyperplane_projection for one instruction set; compiled once for each by
// hyperplane_projection{,_avx2,_avx512}.cpp.
#include "core/hyperplane_projection.h"
#include "core/lane_sum.h"

namespace tsr {
namespace {

template <class T>
struct Image {
  const T *t, *w;
  T* out;
  int64_t d;
  double side, lo, hi;
  double c;  // what the change has to add up to

  Coordinate at(int64_t j) const { return coordinate(double(load(t[j])), double(load(w[j])), side, lo, hi); }
  auto key(int64_t j) const { return weight_key(load(w[j])); }
};

// d_j = -s_j v(j)
template <class T, class F>
void write(const Image<T> m, F v) {
  using C = compute_t<T>;
  C part[kTile];
  for (int64_t at = 0; at < m.d; at += kTile) {
    const int n = int(m.d - at < kTile ? m.d - at : kTile);
#pragma omp simd
    for (int k = 0; k < n; ++k) {
      const Coordinate x = m.at(at + k);
      part[k] = C(x.sign != 0 ? -x.sign * v(at + k, x) : 0.0);
    }
#pragma omp simd
    for (int k = 0; k < n; ++k) store(m.out[at + k], part[k]);
  }
}

template <Norm norm, class T>
void slide(const Image<T> m, double all_slope) {
  Rise r{m.c / all_slope, all_slope};
  for (bool on = true; on;) {
    const double lambda = r.lambda;
    const Two s = sums(m.d, [=](int64_t j) {
      const Coordinate x = m.at(j);
      return Two{x.weight * moved<norm>(x, lambda), slope<norm>(x, lambda)};
    });
    on = rise(r, s.first, s.second, m.c);
  }
  const double lambda = r.lambda;
  write(m, [=](int64_t, const Coordinate& x) { return moved<norm>(x, lambda); });
}

template <class T>
void fill(const Image<T> m, double all) {
  using Key = decltype(magnitude_key(compute_t<T>(0)));
  Split<Key> s = split_start<Key>(all, double(m.d));
  while (split_next(s)) {
    const Key least = s.mu | s.bit;
    const Two some = sums(m.d, [=](int64_t j) {
      const Coordinate x = m.at(j);
      const bool takes = m.key(j) >= least;
      return Two{takes ? x.weight * x.room : 0.0, takes ? 1.0 : 0.0};
    });
    split_refine(s, some.first, some.second, m.c);
  }
  const double share = (m.c - s.full) / (s.covered - s.full);
  const Key mu = s.mu, above = s.above;
  write(m, [=](int64_t j, const Coordinate& x) {
    const Key key = m.key(j);
    return key >= above ? x.room : key >= mu ? x.room * share : 0.0;
  });
}

template <class T>
void project(Image<T> m, double b, Norm norm) {
  const double value = sum(m.d, [=](int64_t j) {
    const double w = double(load(m.w[j]));
    return is_finite(w) ? w * double(load(m.t[j])) : 0.0;
  });
  m.side = value >= b ? 1.0 : -1.0;
  m.c = m.side * (value - b);
  if (!(m.c > 0)) return write(m, [](int64_t, const Coordinate&) { return 0.0; });
  const Two all = sums(m.d, [=](int64_t j) {
    const Coordinate x = m.at(j);
    return Two{x.weight * x.room, norm == Norm::linf ? slope<Norm::linf>(x, 0.0) : slope<Norm::l2>(x, 0.0)};
  });
  if (all.first <= m.c) return write(m, [](int64_t, const Coordinate& x) { return x.room; });
  if (norm == Norm::linf) return slide<Norm::linf>(m, all.second);
  if (norm == Norm::l2) return slide<Norm::l2>(m, all.second);
  fill(m, all.first);
}

// Images are independent: one thread takes whole images.
template <class T>
void run(const HyperplaneProjection& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && a.n > 1)
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t at = i * a.d;
    project(Image<T>{static_cast<const T*>(a.t) + at, static_cast<const T*>(a.w) + at, static_cast<T*>(a.out) + at, a.d,
                     1.0, a.lo, a.hi, 0.0},
            a.b[i], a.norm);
  }
}

}  // namespace
}  // namespace tsr
