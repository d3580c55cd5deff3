// The smallest change that takes a point onto a hyperplane inside the box, for a batch.
// Twins: cpu/hyperplane_projection.cpp, cuda/hyperplane_projection.cu
//
//   d = argmin |d|_p   with   <w, t + d> = b   and   lo <= t + d <= hi            per image, D values each
//
// (Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack", section 3.1.)
// With c = |<w, t> - b|, every coordinate moves against the sign s_j of (<w, t> - b) w_j, at most as far as its room
// r_j >= 0 in the box lets it:   d_j = -s_j v_j,   sum |w_j| v_j = c,   where
//
//   linf  v_j = min(lambda, r_j)          l2  v_j = min(lambda |w_j|, r_j)
//   l1    v_j = r_j where |w_j| > mu, 0 where |w_j| < mu; coordinates with |w_j| = mu share what is left in proportion
//         to r_j (any way of sharing is as near)
//
// If the box does not reach the hyperplane, v_j = r_j: as near as it goes. A coordinate whose w_j is 0 or not finite
// stays, as does a point whose b is NaN. Everything is float64 but the values that come and go.
//
// The sum is concave and piecewise linear in lambda, so Newton's method from 0 rises to the root, each step to a later
// piece, and is exact once it stays on one: usual are 3 to 8 evaluations of D terms, in place of a sort. mu is found by
// bisection on the bits of |w_j|.
#pragma once
#include "core/pgd_step.h"

namespace tsr {

struct HyperplaneProjection {
  const void* t;    // [N, D] points, inside the box
  const void* w;    // [N, D] normals
  const double* b;  // [N] values of <w, x> on the hyperplanes
  void* out;        // [N, D] d
  double lo, hi;    // finite
  int64_t n, d;
  Norm norm;
  Dtype dtype;
};

struct Coordinate {
  double weight, room, sign;  // |w_j|, r_j, s_j
};
// `side`: 1 where <w, t> >= b, else -1. No branches: vector code.
TSR_HD Coordinate coordinate(double t, double w, double side, double lo, double hi) {
  const double weight = is_finite(w) ? w * sign(w) : 0.0, s = weight > 0 ? side * sign(w) : 0.0;
  const double room = s > 0 ? t - lo : hi - t;
  return {weight, room > 0 ? room : 0.0, s};
}
// Weights as integers of the same order.
template <class C>
TSR_HD auto weight_key(C w) {
  return is_finite(w) ? magnitude_key(w) : 0;
}
// How fast a coordinate moves with lambda, and how far it has come.
template <Norm norm>
TSR_HD double speed(const Coordinate& c) {
  return norm == Norm::linf ? 1.0 : c.weight;
}
template <Norm norm>
TSR_HD double moved(const Coordinate& c, double lambda) {
  const double v = lambda * speed<norm>(c);
  return v < c.room ? v : c.room;
}
// What a coordinate adds to the slope of the sum at lambda.
template <Norm norm>
TSR_HD double slope(const Coordinate& c, double lambda) {
  return lambda * speed<norm>(c) < c.room ? c.weight * speed<norm>(c) : 0.0;
}

// Newton's method. Takes the sum at lambda and the slope there; false when lambda is the root.
struct Rise {
  double lambda, slope;
};
TSR_HD bool rise(Rise& r, double sum, double slope, double c) {
  if (slope == r.slope || !(slope > 0)) return false;  // still on the piece from which lambda was reached
  const double next = r.lambda + (c - sum) / slope;
  const bool moves = next > r.lambda;
  if (moves) r = {next, slope};
  return moves;
}

// l1: bisection for mu. Coordinates with a key >= above cover less than c, those with a key >= mu cover it; it ends
// when one coordinate or one key is between.
template <class Key>
struct Split {
  Key mu, above, bit;
  double full, covered;  // sums over keys >= above and >= mu
  double count_full, count_covered;
};
template <class Key>
TSR_HD Split<Key> split_start(double all, double count) {
  const Key top = Key(1) << (8 * sizeof(Key) - 1);
  return {0, top, top, 0.0, all, 0.0, count};
}
// The next key to be looked at, or false: mu is found.
template <class Key>
TSR_HD bool split_next(Split<Key>& s) {
  s.bit >>= 1;
  return s.bit && s.count_covered - s.count_full > 1;
}
template <class Key>
TSR_HD void split_refine(Split<Key>& s, double sum, double count, double c) {
  if (sum >= c) {
    s.mu |= s.bit;
    s.covered = sum, s.count_covered = count;
  } else {
    s.above = s.mu | s.bit;
    s.full = sum, s.count_full = count;
  }
}

void hyperplane_projection_cpu(const HyperplaneProjection& args, int threads);
void hyperplane_projection_cuda(const HyperplaneProjection& args, int device, void* stream);

}  // namespace tsr
