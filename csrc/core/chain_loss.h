// Losses of the attack on chains: value, cotangents of the logits, and whether the image is adversarial.
//
//   s, t: logits of student and teacher at x';  y: label;  c = argmax t  (names and formulas of
//   tsrfast/attacks/losses.py)
//
//   cross_entropy          logsumexp(s) - s_y                    ds = softmax(s) - onehot(y)
//   margin                 max_{k != y} s_k - s_y                ds = onehot(k) - onehot(y); ties share
//   oracle_l2              |s - t|^2                             ds = 2 (s - t) = -dt
//   oracle_cross_entropy   cross_entropy at y = c                no gradient through t
//   oracle_margin          margin at y = c                       likewise
//   oracle_kl              sum_k p_k (log p_k - log q_k)         ds = q - p, dt_k = p_k (log p_k - log q_k - value),
//                          p = softmax(t), q = softmax(s)
//   oracle_max_difference  max_k |s_k - t_k|                     ds = sign(s_k - t_k) onehot(k) = -dt, the first such k
//
// Everything in float64. The cotangents of an image are scaled by a power of two, to a largest entry in [1, 2): no step
// looks at a gradient's length, and small ones do not underflow on their way back.
#pragma once
#include <cmath>

#include "core/portable.h"

namespace tsr {

// The tags are spoken by Python too: tsrfast/ops/chain.py.
enum class ChainLoss : int {
  cross_entropy = 0,
  margin = 1,
  oracle_l2 = 2,
  oracle_cross_entropy = 3,
  oracle_margin = 4,
  oracle_kl = 5,
  oracle_max_difference = 6
};

TSR_HD bool needs_teacher(ChainLoss loss) { return loss >= ChainLoss::oracle_l2; }
TSR_HD bool moves_teacher(ChainLoss loss) {
  return loss == ChainLoss::oracle_l2 || loss == ChainLoss::oracle_kl || loss == ChainLoss::oracle_max_difference;
}

// The first largest; NaN is larger than all, as in torch.argmax.
TSR_HD int64_t argmax(const float* z, int64_t classes) {
  int64_t best = 0;
  for (int64_t k = 1; k < classes; ++k)
    if (z[k] > z[best] || (z[k] != z[k] && z[best] == z[best])) best = k;
  return best;
}

TSR_HD double logsumexp(const float* z, int64_t classes) {
  double most = z[0], sum = 0;
  for (int64_t k = 1; k < classes; ++k) most = z[k] > most || z[k] != z[k] ? double(z[k]) : most;
  if (most - most != 0) return most;  // infinite or NaN: so is the sum
  for (int64_t k = 0; k < classes; ++k) sum += ::exp(z[k] - most);
  return most + ::log(sum);
}

TSR_HD double chain_margin(const float* s, int64_t y, int64_t classes, float* ds) {
  double most = -INFINITY;
  int64_t ties = 0;
  for (int64_t k = 0; k < classes; ++k) {
    if (k == y) continue;
    if (s[k] > most || s[k] != s[k]) most = s[k], ties = 0;
    ties += s[k] == most ? 1 : 0;
  }
  if (ds)
    for (int64_t k = 0; k < classes; ++k) ds[k] = k == y ? -1.f : s[k] == most ? float(1.0 / double(ties)) : 0.f;
  if (ds && (most != most || s[y] != s[y])) ds[y] = NAN;  // a broken model: its gradient has no direction
  return most - s[y];
}

// The power of two that brings `most` into [1, 2); 1 for what cannot be scaled (0, infinity, NaN).
TSR_HD double chain_scale(double most) {
  if (!(most > 0) || most - most != 0) return 1;
  int exponent;
  ::frexp(most, &exponent);
  return ::ldexp(1.0, exponent > -1022 ? 1 - exponent : 1023);  // of a subnormal: as far as it goes
}

TSR_HD double chain_cross_entropy(const float* s, int64_t y, int64_t classes, float* ds) {
  const double all = logsumexp(s, classes);
  double rest = all - all;  // 1 - softmax(s)_y, added up: the difference would cancel. NaN where the logits are broken
  for (int64_t k = 0; k < classes; ++k) rest += k == y ? 0 : ::exp(s[k] - all);
  const double scale = chain_scale(rest);
  if (ds)
    for (int64_t k = 0; k < classes; ++k) ds[k] = float(scale * (k == y ? -rest : ::exp(s[k] - all)));
  return all - s[y];
}

// |s - t| / |t|: how near the student is, the factor by which rounding is amplified in s - t.
TSR_HD float chain_closeness(const float* s, const float* t, int64_t classes) {
  double difference = 0, length = 0;
  for (int64_t k = 0; k < classes; ++k) {
    const double d = double(s[k]) - double(t[k]);
    difference += d * d;
    length += double(t[k]) * double(t[k]);
  }
  return float(::sqrt(difference / length));
}

struct ChainLossValue {
  double value;
  bool adversarial;  // the model's answer is not the right one; targeted: it is the target
};

// ds, dt: [classes], or null where only the value is asked for.
TSR_HD ChainLossValue chain_loss(ChainLoss loss, const float* s, const float* t, int64_t y, int64_t classes,
                                 bool targeted, float* ds, float* dt) {
  const int64_t answer = needs_teacher(loss) ? argmax(t, classes) : y;
  ChainLossValue out{0, (argmax(s, classes) != answer) != targeted};
  switch (loss) {
    case ChainLoss::cross_entropy:
    case ChainLoss::oracle_cross_entropy:
      out.value = chain_cross_entropy(s, answer, classes, ds);
      break;
    case ChainLoss::margin:
    case ChainLoss::oracle_margin:
      out.value = chain_margin(s, answer, classes, ds);
      break;
    case ChainLoss::oracle_l2: {
      double most = 0;
      for (int64_t k = 0; k < classes; ++k) {
        const double d = double(s[k]) - double(t[k]);
        out.value += d * d;
        most = ::fabs(d) > most ? ::fabs(d) : most;
      }
      const double scale = chain_scale(most);
      for (int64_t k = 0; ds && k < classes; ++k) {
        ds[k] = float(scale * (double(s[k]) - double(t[k])));
        dt[k] = -ds[k];
      }
      break;
    }
    case ChainLoss::oracle_kl: {
      const double p_all = logsumexp(t, classes), q_all = logsumexp(s, classes);
      for (int64_t k = 0; k < classes; ++k) {
        const double log_p = t[k] - p_all;
        out.value += ::exp(log_p) * (log_p - (s[k] - q_all));
      }
      double most = 0;
      for (int64_t k = 0; k < classes; ++k) {
        const double log_p = t[k] - p_all, log_q = s[k] - q_all, p = ::exp(log_p);
        const double a = ::fabs(::exp(log_q) - p), b = ::fabs(p * (log_p - log_q - out.value));
        most = a > most ? a : most;
        most = b > most ? b : most;
      }
      const double scale = chain_scale(most);
      for (int64_t k = 0; ds && k < classes; ++k) {
        const double log_p = t[k] - p_all, log_q = s[k] - q_all, p = ::exp(log_p);
        ds[k] = float(scale * (::exp(log_q) - p));
        dt[k] = float(scale * (p * (log_p - log_q - out.value)));
      }
      break;
    }
    case ChainLoss::oracle_max_difference: {
      int64_t at = 0;
      for (int64_t k = 0; k < classes; ++k) {
        const double d = ::fabs(double(s[k]) - double(t[k]));
        if (k == 0 || d > out.value || (d != d && out.value == out.value)) out.value = d, at = k;
      }
      for (int64_t k = 0; ds && k < classes; ++k) {
        const float d = s[k] - t[k];
        ds[k] = k != at ? 0.f : d > 0 ? 1.f : d < 0 ? -1.f : d;  // of NaN: NaN
        dt[k] = -ds[k];
      }
      break;
    }
  }
  return out;
}

}  // namespace tsr
