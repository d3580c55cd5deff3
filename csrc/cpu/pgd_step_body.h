// The loops of pgd_step for one instruction set; compiled once for each by pgd_step{,_avx2,_avx512}.cpp.
#include "core/lane_sum.h"
#include "core/pgd_step.h"

namespace tsr {
namespace {

// For how many j in [0, d) f(j) holds.
template <class F>
int64_t count(int64_t d, F f) {
  constexpr int64_t kMost = 1 << 20;  // in 32 bits
  int64_t total = 0;
  for (int64_t at = 0; at < d; at += kMost) {
    const int n = int(d - at < kMost ? d - at : kMost);
    int32_t some = 0;
#pragma omp simd reduction(+ : some)
    for (int k = 0; k < n; ++k) some += f(at + k) ? 1 : 0;
    total += some;
  }
  return total;
}

// out[j] = clamp(f(j), lo, hi); f(j) may read out[j].
template <class C, class T, class F>
void write(T* out, int64_t d, C lo, C hi, F f) {
  C part[kTile];
  for (int64_t at = 0; at < d; at += kTile) {
    const int n = int(d - at < kTile ? d - at : kTile);
#pragma omp simd
    for (int k = 0; k < n; ++k) part[k] = f(at + k);
#pragma omp simd
    for (int k = 0; k < n; ++k) store(out[at + k], clamp(part[k], lo, hi));
  }
}

template <class T>
struct Image {
  using C = compute_t<T>;
  const T *x, *x0, *g;
  T* out;
  int64_t d;
  C direction;  // +1, or -1 for a targeted attack
  C step, lo, hi;
  double eps;

  C gradient(int64_t j) const { return direction * load(g[j]); }
};

template <class T>
int64_t linf(const Image<T> m) {
  using C = compute_t<T>;
  const C eps = C(m.eps);
  int64_t bad = 0;
#pragma omp simd reduction(+ : bad)
  for (int64_t j = 0; j < m.d; ++j) {
    const C g = m.gradient(j);
    bad += g != g ? 1 : 0;
    store(m.out[j], linf_step(load(m.x[j]), load(m.x0[j]), g, m.step, eps, m.lo, m.hi));
  }
  return bad;
}

template <class T>
int64_t l2(const Image<T> m, double step) {
  using C = compute_t<T>;
  int64_t bad = 0;
  double gg = sum(m.d, [=](int64_t j) {
    const double g = double(m.gradient(j));
    return g * g;
  });
  if (!is_finite(gg)) {  // usually it is: then every entry was
    bad = count(m.d, [=](int64_t j) { return !is_finite(m.gradient(j)); });
    gg = sum(m.d, [=](int64_t j) {
      const double g = double(m.gradient(j));
      return is_finite(g) ? g * g : 0.0;
    });
  }
  const double scale = gg > 0 ? step / __builtin_sqrt(gg) : 0.0;
  auto offset = [=](int64_t j) { return l2_offset(load(m.x[j]), load(m.x0[j]), m.gradient(j), scale); };
  const double length = __builtin_sqrt(sum(m.d, [=](int64_t j) {
    const double v = double(offset(j));
    return v * v;
  }));
  const C shrink = length > m.eps ? C(m.eps / length) : C(1);
  write(m.out, m.d, m.lo, m.hi, [=](int64_t j) { return load(m.x0[j]) + offset(j) * shrink; });
  return bad;
}

template <class T>
int64_t l1(const Image<T> m, double step, double sparsity) {
  using C = compute_t<T>;
  using Key = decltype(magnitude_key(C(0)));
  const int64_t bad = count(m.d, [=](int64_t j) { return !is_finite(m.gradient(j)); });
  auto at_least = [=](Key key) {
    return count(m.d, [=](int64_t j) {
      const C g = m.gradient(j);
      return l1_candidate(load(m.x[j]), g, m.lo, m.hi) & (magnitude_key(g) >= key);
    });
  };
  // The largest key that enough coordinates reach, bit by bit from the top.
  const int64_t wanted = l1_moved(sparsity, m.d);
  Key threshold = 0;
  for (Key bit = Key(1) << (8 * sizeof(Key) - 2); bit; bit >>= 1)
    if (at_least(threshold | bit) >= wanted) threshold |= bit;
  const int64_t moved = at_least(threshold);
  const C each = moved ? C(step / double(moved)) : C(0);

  auto offset = [=](int64_t j) {
    return l1_offset(load(m.x[j]), load(m.x0[j]), m.gradient(j), each, threshold, m.lo, m.hi);
  };
  auto kept = [=](double lambda) {  // and the number of coordinates on the slope
    return sums(m.d, [=](int64_t j) {
      const auto o = offset(j);
      return Two{l1_keep(o.size, o.room, lambda), (o.size > lambda) & (o.size - lambda < o.room) ? 1.0 : 0.0};
    });
  };
  double lambda = 0;
  if (Two all = kept(0); all.first > m.eps) {
    double largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < m.d; ++j) {
      const double size = offset(j).size;
      largest = size > largest ? size : largest;
    }
    L1Search s = l1_search(largest);
    while (l1_refine(s, all.first, int64_t(all.second), m.eps)) all = kept(s.lambda);
    lambda = s.lambda;
  }
  write(m.out, m.d, m.lo, m.hi, [=](int64_t j) {
    const auto o = offset(j);
    return C(double(load(m.x0[j])) + o.sign * l1_keep(o.size, o.room, lambda));
  });
  return bad;
}

// Images are independent: one thread takes whole images.
template <class T>
void run(const PgdStep& a, int threads) {
  using C = compute_t<T>;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && a.n > 1)
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t at = i * a.d;
    const double step = step_of(a, i);
    const Image<T> m{static_cast<const T*>(a.x) + at,
                     static_cast<const T*>(a.x0) + at,
                     static_cast<const T*>(a.g) + at,
                     static_cast<T*>(a.out) + at,
                     a.d,
                     C(a.targeted ? -1 : 1),
                     C(step),
                     C(a.lo),
                     C(a.hi),
                     eps_of(a, i)};
    a.bad[i] = a.norm == Norm::linf ? linf(m) : a.norm == Norm::l2 ? l2(m, step) : l1(m, step, a.sparsity);
  }
}

}  // namespace
}  // namespace tsr
