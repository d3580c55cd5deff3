// Sums of an image's values in a fixed order: the same bits on every instruction set and for any number of threads.
#pragma once
#include "core/portable.h"

namespace tsr {
namespace {

constexpr int kLanes = 16, kTile = 256;

// Loops are free of branches (hence & for &&) and written in two stages, so that they become vector code: values of a
// tile to a buffer, whatever they are; then sixteen running sums in a fixed order, which gives the same bits on every
// instruction set.
struct Sum {
  typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));
  Lanes lane = {};

  void add(double* part, int n) {  // of kTile, the first n
    for (int k = n; k % kLanes; ++k) part[k] = 0;
    for (int k = 0; k < n; k += kLanes) {
      Lanes more;
      memcpy(&more, part + k, sizeof(Lanes));
      lane += more;
    }
  }
  double total() {
    for (int half = kLanes / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
    return lane[0];
  }
};

// f(j) summed over [0, d).
template <class F>
double sum(int64_t d, F f) {
  Sum s;
  double part[kTile];
  for (int64_t at = 0; at < d; at += kTile) {
    const int n = int(d - at < kTile ? d - at : kTile);
#pragma omp simd
    for (int k = 0; k < n; ++k) part[k] = f(at + k);
    s.add(part, n);
  }
  return s.total();
}

struct Two {
  double first, second;
};
template <class F>
Two sums(int64_t d, F f) {
  Sum s, t;
  double part[kTile], other[kTile];
  for (int64_t at = 0; at < d; at += kTile) {
    const int n = int(d - at < kTile ? d - at : kTile);
#pragma omp simd
    for (int k = 0; k < n; ++k) {
      const Two v = f(at + k);
      part[k] = v.first;
      other[k] = v.second;
    }
    s.add(part, n);
    t.add(other, n);
  }
  return {s.total(), t.total()};
}

}  // namespace
}  // namespace tsr
