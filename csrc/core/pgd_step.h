// One step of projected gradient ascent, for a batch.   Twins: cpu/pgd_step.cpp, cuda/pgd_step.cu
//
//   x' = clamp(project(x + step * direction(g)), lo, hi)          per image, D values each (Madry et al. 2018)
//
//   linf  direction = sign(g), sign(0) = 0;             project = clamp to [x0 - eps, x0 + eps]
//   l2    direction = g / |g|, 0 where g = 0;           project = x0 + d * min(1, eps / |d|),  d = x - x0
//   l1    direction = sign(g) / m on the m coordinates of largest |g| that the box lets move, m = ceil(sparsity * D)
//         (more where magnitudes tie): the sparse step of Tramer & Boneh (2019);
//         project = the exact Euclidean projection on {|z - x0|_1 <= eps} intersected with the box (Croce & Hein 2021,
//         "Mind the box", prop. 2.1): z = x0 + sign(d) * clamp(|d| - lambda, 0, u), u = the room the box leaves.
//         Projecting on the ball and clamping afterwards, as is usual, gives a point that is not the nearest one.
//
// `targeted` reverses the direction. A gradient entry that has no direction (NaN; infinite too in l2 and l1) leaves its
// pixel where it is, up to the projection, and is counted. Norms, lambda and sums are float64; the rest is the compute
// type.
#pragma once
#include "core/dtype.h"

namespace tsr {

enum class Norm : int { linf = 0, l2 = 1, l1 = 2 };

struct PgdStep {
  const void* x;       // [N, D] current iterate
  const void* x0;      // [N, D] clean images
  const void* g;       // [N, D] gradient of the loss
  void* out;           // [N, D] may be x
  int64_t* bad;        // [N] number of gradient entries without a direction
  const double* step;  // [N], or null: step_value for all
  const double* eps;   // [N], or null: eps_value for all
  double step_value, eps_value, lo, hi;
  double sparsity;  // l1: the fraction of coordinates that move
  int64_t n, d;
  Norm norm;
  Dtype dtype;
  bool targeted;
};

TSR_HD double step_of(const PgdStep& a, int64_t image) { return a.step ? a.step[image] : a.step_value; }
TSR_HD double eps_of(const PgdStep& a, int64_t image) { return a.eps ? a.eps[image] : a.eps_value; }

template <class C>
TSR_HD C clamp(C v, C lo, C hi) {  // NaN stays NaN; one select after the other, as vector code wants it
  const C above = v < lo ? lo : v;
  return above > hi ? hi : above;
}
template <class C>
TSR_HD bool is_finite(C v) {
  return v - v == C(0);
}
template <class C>
TSR_HD C sign(C v) {  // of NaN: 0
  const C up = v > C(0) ? C(1) : C(0), down = v < C(0) ? C(1) : C(0);
  return up - down;
}

template <class C>
TSR_HD C linf_step(C x, C x0, C g, C step, C eps, C lo, C hi) {
  return clamp(clamp(x + step * sign(g), x0 - eps, x0 + eps), lo, hi);
}

// l2: the step before projection, as an offset from x0. `scale` is step / |g|, in double since |g| may be tiny.
template <class C>
TSR_HD C l2_offset(C x, C x0, C g, double scale) {
  return x + C(is_finite(g) ? double(g) * scale : 0.0) - x0;
}

// l1: a coordinate is a candidate if its gradient has a direction in which the box lets it move.
template <class C>
TSR_HD bool l1_candidate(C x, C g, C lo, C hi) {
  return is_finite(g) & (((g > C(0)) & (x < hi)) | ((g < C(0)) & (x > lo)));  // no branches: vector code
}
// Magnitudes as unsigned integers of the same order, so that the k-th largest is found bit by bit.
TSR_HD uint32_t magnitude_key(float g) { return bit_cast<uint32_t>(g) & 0x7fffffffu; }
TSR_HD uint64_t magnitude_key(double g) { return bit_cast<uint64_t>(g) & 0x7fffffffffffffffull; }

TSR_HD int64_t l1_moved(double sparsity, int64_t d) {
  const double k = sparsity * double(d);
  const int64_t whole = int64_t(k);
  return whole < 1 ? 1 : whole + (double(whole) < k ? 1 : 0);
}

// l1: offset from x0 before projection, and how far the box lets that coordinate go in the same direction.
template <class C>
struct L1Offset {
  double size, room, sign;
};
template <class C, class Key>
TSR_HD L1Offset<C> l1_offset(C x, C x0, C g, C step, Key threshold, C lo, C hi) {
  const bool moves = l1_candidate(x, g, lo, hi) & (magnitude_key(g) >= threshold);
  const double d = double(x + (moves ? step * sign(g) : C(0))) - double(x0);
  const double room = d > 0 ? double(hi) - double(x0) : double(x0) - double(lo);
  return {d < 0 ? -d : d, room > 0 ? room : 0.0, d < 0 ? -1.0 : 1.0};
}
// The share of a coordinate that soft thresholding by lambda leaves.
TSR_HD double l1_keep(double size, double room, double lambda) { return clamp(size - lambda, 0.0, room); }

// The search for lambda with kept(lambda) = eps: Newton's method inside a shrinking bracket. kept is decreasing and
// piecewise linear, so a step from the right piece lands on the root. Usual: 4 to 10 evaluations.
struct L1Search {
  double below, above, lambda;
  int left;
};
TSR_HD L1Search l1_search(double largest) { return {0.0, largest, 0.0, 200}; }
// Takes kept(lambda) and the number of coordinates on the slope there; returns false when lambda is as good as it gets.
TSR_HD bool l1_refine(L1Search& s, double kept, int64_t on_slope, double eps) {
  if (kept == eps || s.left-- == 0) return false;
  (kept > eps ? s.below : s.above) = s.lambda;
  double next = on_slope > 0 ? s.lambda + (kept - eps) / double(on_slope) : s.below;
  if (!(next > s.below && next < s.above)) next = s.below + (s.above - s.below) / 2;
  const bool moved = next > s.below && next < s.above && next != s.lambda;
  if (moved) s.lambda = next;
  return moved;
}

void pgd_step_cpu(const PgdStep& args, int threads);
void pgd_step_cuda(const PgdStep& args, int device, void* stream);

}  // namespace tsr
