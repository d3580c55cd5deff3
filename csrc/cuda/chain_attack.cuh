// The attack's own kernels between two passes through the networks: images come in, are judged, and leave.
//
// A block takes an image: its first thread evaluates the loss (float64, a few thousand operations) and keeps the books,
// then all of them copy pixels. Latency-bound; a few microseconds beside the products.
#pragma once
#include "cuda/chain_layers.cuh"

namespace tsr {
namespace {

constexpr int kAttackThreads = 128;

// An image under attack.
struct Walk {
  int64_t image, step;
  float best;
  bool held, adversarial;  // whether there is a best candidate, and whether it is adversarial
};

// A chunk of images under attack; everything by their place in the chunk.
struct Chunk {
  Walk* walk;
  bool* done;
  float *x, *x0, *g;   // [images][inputs]
  double *step, *eps;  // [images]
  int64_t* bad;        // [images] of the last step
  Map logits[2];
  Shape shape[2];  // of the logits
  float* z[2];     // [images][classes] the logits in order; then
  float* cotangent[2];
  int64_t inputs, classes;
};

TSR_DEVICE void copy_image(float* to, const float* from, int64_t values) {
  for (int64_t i = threadIdx.x; i < values; i += kAttackThreads) to[i] = from[i];
}

__global__ void __launch_bounds__(kAttackThreads) chain_admit_kernel(ChainPgd a, Chunk c, int64_t first) {
  const int64_t l = blockIdx.x, image = first + l;
  copy_image(c.x + l * c.inputs, a.start + image * c.inputs, c.inputs);
  copy_image(c.x0 + l * c.inputs, a.x0 + image * c.inputs, c.inputs);
  if (threadIdx.x) return;
  c.walk[l] = {image, 0, 0.f, false, false};
  c.done[l] = false;
  c.step[l] = a.step ? a.step[image] : a.step_value;
  c.eps[l] = a.eps ? a.eps[image] : a.eps_value;
  c.bad[l] = 0;
  a.loss[image] = NAN;
  a.adversarial[image] = false;
  a.closeness[image] = NAN;
  a.bad[image] = a.queries[image] = 0;
}

// Takes over the count of the step that led here.
TSR_DEVICE void count_bad(const ChainPgd& a, const Chunk& c, int64_t l, int64_t image) {
  a.bad[image] += c.bad[l];
  c.bad[l] = 0;
}

enum : int { kWrites = 1, kDone = 2 };

// One image's loss, best candidate and early stop; what is to be done with its pixels.
TSR_DEVICE int judge(const ChainPgd& a, const Chunk& c, int64_t l) {
  Walk& w = c.walk[l];
  const int64_t at = l * c.classes;
  const bool pair = needs_teacher(a.criterion);
  count_bad(a, c, l, w.image);
  if (pair && w.step == 0) a.closeness[w.image] = chain_closeness(c.z[0] + at, c.z[1] + at, c.classes);
  const ChainLossValue now =
      chain_loss(a.criterion, c.z[0] + at, pair ? c.z[1] + at : nullptr, a.labels ? a.labels[w.image] : 0, c.classes,
                 a.targeted, c.cotangent[0] + at, moves_teacher(a.criterion) ? c.cotangent[1] + at : nullptr);
  ++a.queries[w.image];
  const bool done = w.step == a.steps || (a.early_stop && now.adversarial);
  // adversarial before not, then the better loss; a NaN loss is the worst
  const float value = float(now.value), signed_value = a.targeted ? -value : value;
  const float score = signed_value == signed_value ? signed_value : -INFINITY;
  const bool better =
      !w.held || (now.adversarial && !w.adversarial) || (now.adversarial == w.adversarial && score > w.best);
  const bool writes = a.keep_best ? better : done;
  if (writes) {
    w.held = true;
    w.best = score;
    w.adversarial = now.adversarial;
    a.loss[w.image] = value;
    a.adversarial[w.image] = now.adversarial;
  }
  return (writes ? kWrites : 0) | (done ? kDone : 0);
}

// An image that is done may still go through the networks with the others, but nobody looks at it again.
__global__ void __launch_bounds__(kAttackThreads) chain_judge_kernel(ChainPgd a, Chunk c) {
  TSR_DYNAMIC_SHARED(int, verdict);
  const int64_t l = blockIdx.x;
  Walk& w = c.walk[l];
  if (c.done[l]) return;
  for (int net = 0; net <= int(needs_teacher(a.criterion)); ++net) {
    const Shape s = c.shape[net];
    for (int64_t k = threadIdx.x; k < c.classes; k += kAttackThreads)
      c.z[net][l * c.classes + k] =
          load_value(c.logits[net], l * s.values() + k % s.pixels() * s.channels() + k / s.pixels());
  }
  __syncthreads();
  if (threadIdx.x == 0) *verdict = judge(a, c, l);
  __syncthreads();
  const int64_t image = w.image, step = w.step;
  const float* const x = c.x + l * c.inputs;
  const bool done = *verdict & kDone;
  if (*verdict & kWrites) copy_image(a.x + image * c.inputs, x, c.inputs);
  for (int64_t t = step; a.iterates && t <= (done ? a.steps : step); ++t)
    copy_image(a.iterates + (t * a.n + image) * c.inputs, x, c.inputs);
  __syncthreads();
  if (threadIdx.x == 0) ++w.step, c.done[l] = done;
}

// After the last step, where nobody asks for its loss.
__global__ void __launch_bounds__(kAttackThreads) chain_leave_kernel(ChainPgd a, Chunk c) {
  const int64_t l = blockIdx.x, image = c.walk[l].image;
  const float* const x = c.x + l * c.inputs;
  copy_image(a.x + image * c.inputs, x, c.inputs);
  if (a.iterates) copy_image(a.iterates + (a.steps * a.n + image) * c.inputs, x, c.inputs);
  if (threadIdx.x == 0) count_bad(a, c, l, image);
}

}  // namespace
}  // namespace tsr
